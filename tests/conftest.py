"""Fixtures for tests that need a whole proxy (see `scripted` and `running`), or only a poller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fuzzing import register_profile
from tests.pairs import running_poller
from tests.running import Command, Embedded, open_command, open_directory, open_embedded
from tests.scripted import Client, Upstream, open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kamal_proxy.sockets import Poller

register_profile()


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    """Run a poller; at the end no stream of it may be left open."""
    async with running_poller() as poller:
        yield poller


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    """Run an embedded proxy with default options, no state and no admin API."""
    async with open_embedded() as embedded:
        yield embedded


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """Run a scripted target that by default answers every request with ``hello``."""
    async with open_upstream() as target:
        yield target


@pytest.fixture
async def client(proxy: Embedded) -> AsyncIterator[Client]:
    """Open a connection to the embedded proxy."""
    async with open_client(proxy.port) as connection:
        yield connection


@pytest.fixture
async def directory() -> AsyncIterator[Path]:
    """Provide a short temporary directory: HOME and XDG_RUNTIME_DIR of a real command."""
    async with open_directory() as path:
        yield path


@pytest.fixture
async def command(directory: Path) -> AsyncIterator[Command]:
    """Run the real command as a process; it must exit with 0 on SIGTERM at the end."""
    async with open_command(directory) as running:
        yield running
