"""A bug in the lane costs the connection it happens on, and no other.

The bugs are injected where the lane meets Python. When a world ends, nothing may be left open, in
flight, or in a limiter.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.deployment import DrainResult
from kamal_proxy.http.connection import ClientConnection
from kamal_proxy.http.lane import Lane
from tests.http.lanes import be_silent, taking_turns
from tests.http.streams import GET, HELLO, World, open_world, read_all, read_head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ODD = b"GET /path HTTP/1.0\r\n\r\n"  # for a task
HAND_OVERS = pytest.mark.parametrize(
    ("room", "step"), [(Lane, "give_away"), (Lane, "_connection"), (ClientConnection, "go_on")]
)


def fail_once(monkeypatch: pytest.MonkeyPatch, room: type, step: str) -> None:
    """Let a step raise the first time, and do what it did from then on."""
    real = getattr(room, step)

    def fail(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(room, step, real)
        raise RuntimeError("injected")

    monkeypatch.setattr(room, step, fail)


def failures(here: World) -> list[str]:
    return [line["error"] for line in here.lines.of("Connection failed")]


@asynccontextmanager
async def two_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, tuple[trio.SocketStream, trio.SocketStream]]]:
    """Open a world with two clients that wait in the lane for a target that says nothing."""
    answer = taking_turns(be_silent, be_silent)
    async with open_world(tmp_path, monkeypatch, answer, in_lane=True) as here:
        clients = here.connect(), here.connect()
        for _ in range(2):  # the first request finds no connection to the target, and gets a task
            for client in clients:
                await client.send_all(GET)
            await wait_all_tasks_blocked()
        for client in clients:
            assert await read_head(client) == HELLO
        assert here.lane is not None
        assert len(here.lane._visits) == 2
        assert here.deployment.in_flight == 2
        yield here, clients
        await wait_all_tasks_blocked()


async def starts(clients: tuple[trio.SocketStream, ...]) -> list[bytes]:
    """Return how the answers begin; in this order, since which connection is first is not said."""
    return sorted([(await read_all(client))[:12] for client in clients])


@HAND_OVERS
async def test_a_drain_goes_on_to_the_other_connections(
    room: type, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with two_waiting(tmp_path, monkeypatch) as (here, clients):
        fail_once(monkeypatch, room, step)
        assert await here.deployment.drain(5) == DrainResult(0, 2)
        assert await starts(clients) == [b"", b"HTTP/1.1 504"]
        assert failures(here) == ["RuntimeError('injected')"]


@HAND_OVERS
async def test_a_shutdown_goes_on_to_the_other_connections(
    room: type, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with two_waiting(tmp_path, monkeypatch) as (here, clients):
        fail_once(monkeypatch, room, step)
        here.server.close_idle(trio.current_time() + 10)
        here.server.abort()
        assert await starts(clients) == [b"", b"HTTP/1.1 503"]
        await here.server.wait_closed()
        assert failures(here) == ["RuntimeError('injected')"]


@HAND_OVERS
async def test_the_time_of_the_other_connections_is_looked_at(
    room: type, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with two_waiting(tmp_path, monkeypatch) as (here, clients):
        fail_once(monkeypatch, room, step)
        async with trio.open_nursery() as nursery:
            answers: list[bytes] = []

            async def read(client: trio.SocketStream) -> None:
                # Not to its end: the answer of 504 keeps the connection.
                answers.append((await read_head(client))[:12])

            for client in clients:
                nursery.start_soon(read, client)
        assert sorted(answers) == [b"", b"HTTP/1.1 504"]
        assert failures(here) == ["RuntimeError('injected')"]


@pytest.mark.parametrize("step", ["leave", "_connection", "_attend"])
async def test_what_is_not_ordinary(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with open_world(tmp_path, monkeypatch, in_lane=True) as here:
        fail_once(monkeypatch, Lane, step)
        client = here.connect()
        await client.send_all(ODD)
        assert await read_all(client) == b""
        await wait_all_tasks_blocked()
        assert here.server.connections == 0
        assert failures(here) == ["RuntimeError('injected')"]
        other = here.connect()
        await other.send_all(GET)
        assert await read_head(other) == HELLO


@pytest.mark.parametrize("step", ["tell_drained", "tell_failure"])
async def test_a_response_that_is_cut(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    cut = trio.Event()

    async def begin(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        await cut.wait()
        await stream.aclose()

    async with open_world(tmp_path, monkeypatch, taking_turns(begin), in_lane=True) as here:
        client = here.connect()
        for _ in range(2):
            await client.send_all(GET)
            await wait_all_tasks_blocked()
        fail_once(monkeypatch, Lane, step)
        if step == "tell_drained":
            await here.deployment.drain(5)
        else:
            cut.set()
        assert (await read_all(client)).endswith(b"\r\n\r\nhello")
        await wait_all_tasks_blocked()
        assert here.server.connections == 0
        assert failures(here) == ["RuntimeError('injected')"]
