"""Unhappy ends of exchanges in the lane inside TLS, where what was read tells of more than events.

Times are those of a mock clock. When a world ends, nothing may be left open or in flight.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.http.lanes import LARGE, Turn, be_silent, saying, taking_turns
from tests.http.streams import GET, HELLO, World, open_world
from tests.tls.peers import calling, secured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

    from tests.tls.peers import Peer


async def answer(peer: Peer) -> bytes:
    """Return what the client gets until nothing comes any more."""
    await wait_all_tasks_blocked()
    return await peer.drain()


@asynccontextmanager
async def secure_world(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *turns: Turn
) -> AsyncIterator[tuple[World, Peer]]:
    """Open a world with a connection inside TLS in the lane, on which one request was served."""
    async with (
        open_world(directory, monkeypatch, taking_turns(*turns), in_lane=True) as here,
        secured(here.poller, calling()) as (stream, peer),
    ):
        here.enter(stream)
        peer.send(GET)
        assert await answer(peer) == HELLO
        assert here.lane
        assert here.lane._visits
        yield here, peer
        peer.close()
        await wait_all_tasks_blocked()


async def test_a_client_that_says_goodbye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with secure_world(tmp_path, monkeypatch) as (here, peer):
        peer.end()
        await wait_all_tasks_blocked()
        assert here.server.connections == 0


@pytest.mark.parametrize("answers", [True, False])
async def test_a_client_that_says_goodbye_with_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, answers: bool
) -> None:
    turn = saying(HELLO) if answers else be_silent
    async with secure_world(tmp_path, monkeypatch, turn) as (here, peer):
        peer.far.sendall(peer.encrypt(GET) + peer.goodbye())
        if answers:
            assert await answer(peer) == HELLO
        else:
            await trio.sleep(1.1)
        assert here.server.connections == 0
        assert (here.logged[-1]["status"], here.logged[-1].get("reason", "")) == (
            (200, "") if answers else (499, "client_gone")
        )


async def test_a_client_that_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with secure_world(tmp_path, monkeypatch, be_silent) as (here, peer):
        peer.send(GET)
        await wait_all_tasks_blocked()
        peer.far.sendall(peer.encrypt(GET)[:9])
        peer.far.shutdown(socket.SHUT_WR)
        await trio.sleep(1.1)
        assert here.logged[-1]["reason"] == "client_gone"


@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_that_reads_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, reads: bool
) -> None:
    async with secure_world(tmp_path, monkeypatch, saying(LARGE)) as (here, peer):
        peer.send(GET)
        await wait_all_tasks_blocked()
        assert here.deployment.in_flight == 1
        if reads:
            await trio.sleep(50)
            assert await answer(peer) == LARGE
            peer.send(GET)
            assert await answer(peer) == HELLO
        else:
            await trio.sleep(60.1)
            assert here.logged[-1]["reason"] == "client_stalled"
