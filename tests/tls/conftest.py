"""Fixtures for tests of encrypted streams: both ends, the client moved by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tls.peers import VERSIONS, calling, secured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kamal_proxy.sockets import Poller
    from tests.tls.peers import Pair


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
async def pair(poller: Poller, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Provide a stream, of each version of TLS in turn, and its peer."""
    async with secured(poller, calling(request.param)) as pair:
        yield pair


@pytest.fixture
async def newest(poller: Poller) -> AsyncIterator[Pair]:
    """Provide a stream of the newest version and its peer."""
    async with secured(poller, calling()) as pair:
        yield pair
