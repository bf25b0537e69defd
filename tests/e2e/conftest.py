"""Fixtures for tests of UDP services through the real command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.udp_room import Room, open_room

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    """Provide a UDP service's port, and what makes targets and clients for it."""
    async with open_room() as room:
        yield room
