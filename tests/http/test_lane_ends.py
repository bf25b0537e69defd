"""Unhappy ends of exchanges in the lane, and that they are those of connections with a task.

All tests but the last ones run both ways, with the first request served already: then the client's
connection, and one to the target, are kept. Times are those of a mock clock. When a world ends,
nothing may be left open, in flight or unlogged.
"""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.deployment import DrainResult
from tests.deploying import run_with_every_cancellation
from tests.http.lanes import LARGE, Turn, be_silent, saying, saying_and_closing, taking_turns
from tests.http.stepping import visit_and_leave
from tests.http.streams import GET, HELLO, World, open_world, read_all, read_head
from tests.pairs import Steps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Opener = Callable[..., AbstractAsyncContextManager[tuple[World, trio.SocketStream]]]

POST = b"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n"
BEGUN = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def begin(stream: trio.SocketStream) -> None:
    """Answer a part, and nothing more."""
    await stream.send_all(BEGUN)
    await trio.sleep_forever()


@pytest.fixture(params=[True, False], ids=["lane", "task"])
def world(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> Opener:
    """Return what opens a world in which one request was served, and the client of that."""

    @asynccontextmanager
    async def open_warm(
        *turns: Turn, **options: Any
    ) -> AsyncIterator[tuple[World, trio.SocketStream]]:
        in_lane = request.param
        answer = taking_turns(*turns)
        async with open_world(tmp_path, monkeypatch, answer, in_lane=in_lane, **options) as here:
            client = here.connect()
            await client.send_all(GET)
            assert await read_head(client) == HELLO
            await wait_all_tasks_blocked()
            assert bool(here.lane and here.lane._visits) == in_lane
            yield here, client
            await wait_all_tasks_blocked()

    return open_warm


def ends(here: World) -> list[tuple[int, str]]:
    """Return how the requests after the first ended."""
    return [(line["status"], line.get("reason", "")) for line in here.logged[1:]]


# Between two requests


async def test_a_client_that_leaves_between_two_requests(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world() as (here, client):
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.server.connections == 0
        assert ends(here) == []


async def test_a_client_that_is_idle(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as (here, client):
        start = trio.current_time()
        assert await client.receive_some() == b""
        assert trio.current_time() - start == pytest.approx(60, abs=0.1)
        assert ends(here) == []


async def test_a_client_that_never_says_anything(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as (here, _):
        start = trio.current_time()
        assert await here.connect().receive_some() == b""
        assert trio.current_time() - start == pytest.approx(30, abs=0.1)
        assert ends(here) == []


async def test_a_request_that_comes_slowly(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as (here, client):
        for byte in GET[:-1]:
            await client.send_all(bytes([byte]))
            await trio.sleep(0.2)
        await client.send_all(GET[-1:])
        assert await read_head(client) == HELLO
        start = trio.current_time()
        await client.send_all(GET[:10])
        assert (await read_all(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(30, abs=0.1)
        assert ends(here) == [(200, ""), (408, "head_timeout")]


# While the target is silent


async def test_a_client_that_leaves(world: Opener, autojump_clock: MockClock) -> None:
    async with world(be_silent) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        start = trio.current_time()
        await client.aclose()
        await here.targets[0].wait_send_all_might_not_block()
        await trio.sleep(0.9)
        assert here.deployment.in_flight == 1
        await trio.sleep(0.2)
        assert ends(here) == [(499, "client_gone")]
        assert trio.current_time() - start < 2


@pytest.mark.parametrize("body", [b"", b"x" * 9], ids=["get", "put"])
async def test_a_client_that_says_no_more_with_its_request(
    world: Opener, body: bytes, autojump_clock: MockClock
) -> None:
    async with world(be_silent) as (here, client):
        head = b"PUT / HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n" % len(body)
        # One event tells of both.
        os.write(client.socket.fileno(), head + body)
        client.socket.shutdown(socket.SHUT_WR)
        start = trio.current_time()
        assert await client.receive_some() == b""
        assert trio.current_time() - start == pytest.approx(1, abs=0.1)
        await wait_all_tasks_blocked()
        assert ends(here) == [(499, "client_gone")]


async def test_a_client_that_says_no_more_and_reads_on(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def answer_late(stream: trio.SocketStream) -> None:
        await trio.sleep(0.5)
        await stream.send_all(HELLO)

    async with world(answer_late) as (here, client):
        await client.send_all(GET)
        await client.send_eof()
        assert await read_all(client) == HELLO
        await wait_all_tasks_blocked()
        assert ends(here) == [(200, "")]


@pytest.mark.parametrize(("request_", "end"), [(GET, (200, "")), (POST, (502, "target_failed"))])
async def test_a_target_that_closes(
    world: Opener, request_: bytes, end: tuple[int, str], autojump_clock: MockClock
) -> None:
    async with world(saying_and_closing()) as (here, client):
        await client.send_all(request_)
        assert (await read_head(client)).startswith(b"HTTP/1.1 %d " % end[0])
        await wait_all_tasks_blocked()
        assert ends(here) == [end]


async def test_a_target_that_never_answers(world: Opener, autojump_clock: MockClock) -> None:
    async with world(be_silent) as (here, client):
        start = trio.current_time()
        await client.send_all(GET)
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(30, abs=0.1)
        await wait_all_tasks_blocked()
        assert ends(here) == [(504, "target_timeout")]


async def test_a_target_that_answers_half_a_head(world: Opener, autojump_clock: MockClock) -> None:
    async with world(saying(HELLO[:20])) as (here, client):
        start = trio.current_time()
        await client.send_all(GET)
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(30, abs=0.1)
        await wait_all_tasks_blocked()
        assert ends(here) == [(504, "target_timeout")]


# While the response is on its way


@pytest.mark.parametrize("begun", [BEGUN, CHUNKED + b"7\r\nhello", CHUNKED + b"5\r\nhello\r\n1"])
async def test_a_target_that_closes_in_the_middle(
    world: Opener, begun: bytes, autojump_clock: MockClock
) -> None:
    async with world(saying_and_closing(begun)) as (here, client):
        await client.send_all(GET)
        got = await read_all(client)
        assert b"hello" in got
        assert not got.endswith(b"0\r\n\r\n")
        await wait_all_tasks_blocked()
        assert ends(here) == [(200, "target_failed")]
        assert here.logged[1]["resp_content_length"] == 5
        (error,) = here.lines.of("Error while proxying")
        assert error["error"].startswith("response cut short: ")


@pytest.mark.parametrize(
    "bad", [b"5\r\nhelloXX", b"5\r\nhello\rX", b"1\r\nh\r\n4\r\nelloX\n0\r\n\r\n"]
)
async def test_a_malformed_chunk_in_a_later_read(
    world: Opener, bad: bytes, autojump_clock: MockClock
) -> None:
    async with world(saying(CHUNKED + b"1\r\nx\r\n", bad)) as (here, client):
        await client.send_all(GET)
        got = await read_all(client)
        assert b"x" in got
        assert got.endswith((b"hello", b"hello\r", b"hello\r\n", b"ello", b"ello\r\n"))
        await wait_all_tasks_blocked()
        assert ends(here) == [(200, "target_failed")]
        assert here.logged[1]["resp_content_length"] == 6


async def test_a_client_that_leaves_in_the_middle(world: Opener, autojump_clock: MockClock) -> None:
    async with world(begin) as (here, client):
        await client.send_all(GET)
        await read_head(client)
        await client.aclose()
        await trio.sleep(0.9)
        assert here.deployment.in_flight == 1
        await trio.sleep(0.2)
        assert ends(here) == [(499, "client_gone")]


async def test_a_client_that_takes_nothing(world: Opener, autojump_clock: MockClock) -> None:
    async with world(saying(LARGE)) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        start = trio.current_time()
        await here.deployment.drain(99)
        assert trio.current_time() - start == pytest.approx(60, abs=0.1)
        await wait_all_tasks_blocked()
        assert ends(here) == [(499, "client_stalled")]


async def test_a_client_that_takes_a_little_at_a_time(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(saying(LARGE)) as (here, client):
        await client.send_all(GET)
        got = 0
        while got < len(LARGE):
            await trio.sleep(20)
            part = await client.receive_some(200_000)
            assert part, (got, ends(here))
            got += len(part)
        await wait_all_tasks_blocked()
        assert ends(here) == [(200, "")]
        await client.send_all(GET)
        assert await read_head(client) == HELLO


async def test_a_client_that_resets_with_bytes_pending(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(saying(LARGE)) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        await client.aclose()
        await trio.sleep(2)
        assert ends(here) == [(499, "client_gone")]


# Drains and shutdowns


@pytest.mark.parametrize(
    ("turn", "end"),
    [(be_silent, (504, "drained")), (begin, (200, "drained")), (saying(LARGE), (200, "drained"))],
    ids=["silent", "begun", "pending"],
)
async def test_the_deadline_of_a_drain(
    world: Opener, turn: Turn, end: tuple[int, str], autojump_clock: MockClock
) -> None:
    async with world(turn) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.remove()
        here.deployment.retire(5)
        assert await here.deployment.wait_drained() == DrainResult(0, 1)
        assert (await read_all(client))[:13] == b"HTTP/1.1 %d " % end[0]
        await wait_all_tasks_blocked()
        assert ends(here) == [end]
        assert len(here.lines.of("Request cancelled due to draining")) == 1


async def test_two_drains_count_a_request_once(world: Opener, autojump_clock: MockClock) -> None:
    async with world(be_silent) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        results = []

        async def drain(seconds: float) -> None:
            results.append(await here.deployment.drain(seconds))

        async with trio.open_nursery() as drains:
            drains.start_soon(drain, 5)
            drains.start_soon(drain, 5)
        assert results == [DrainResult(0, 1)] * 2


async def test_a_drain_waits(world: Opener, autojump_clock: MockClock) -> None:
    release = trio.Event()

    async def answer_late(stream: trio.SocketStream) -> None:
        await stream.send_all(BEGUN)
        await release.wait()
        await stream.send_all(b"world")

    async with world(answer_late) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.remove()
        here.deployment.retire(5)
        await wait_all_tasks_blocked()
        assert not here.deployment.drained
        release.set()
        assert await here.deployment.wait_drained() == DrainResult(1, 0)
        await wait_all_tasks_blocked()
        assert ends(here) == [(200, "")]


async def test_a_shutdown_closes_idle_connections(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as (here, client):
        here.server.close_idle(trio.current_time() + 10)
        assert await client.receive_some() == b""
        await here.server.wait_closed()
        assert ends(here) == []


@pytest.mark.parametrize("begins", [True, False], ids=["relaying", "silent"])
async def test_a_shutdown_waits_for_requests(
    world: Opener, begins: bool, autojump_clock: MockClock
) -> None:
    release = trio.Event()

    async def answer_late(stream: trio.SocketStream) -> None:
        if begins:
            await stream.send_all(BEGUN)
        await release.wait()
        await stream.send_all(b"world" if begins else BEGUN + b"world")

    async with world(answer_late) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.server.close_idle(trio.current_time() + 10)
        await wait_all_tasks_blocked()
        assert here.server.connections == 1
        release.set()
        start = trio.current_time()
        got = await read_all(client)
        assert got.endswith(b"helloworld")
        assert (b"Connection: close" in got) == (not begins)
        await here.server.wait_closed()
        assert trio.current_time() == start
        assert ends(here) == [(200, "")]


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        (be_silent, (503, "shutdown")),
        (begin, (200, "shutdown")),
        (saying(LARGE), (200, "shutdown")),
    ],
    ids=["silent", "begun", "pending"],
)
async def test_what_a_shutdown_cuts(
    world: Opener, turn: Turn, end: tuple[int, str], autojump_clock: MockClock
) -> None:
    async with world(turn) as (here, client):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.server.close_idle(trio.current_time() + 10)
        here.server.abort()
        assert (await read_all(client))[:13] == b"HTTP/1.1 %d " % end[0]
        await here.server.wait_closed()
        assert ends(here) == [end]


def test_cancelled_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in the lane and some that get tasks; then all is cancelled, but clients stay."""
    parts = (GET, GET, POST[:20], POST[20:], GET + GET[:9])
    staying = []

    async def visit(client: trio.SocketStream) -> None:
        for part in parts:
            await client.send_all(part)
            if part is not parts[2] and not await client.receive_some():
                return

    async def main(step: int) -> bool:
        own = tmp_path / str(step)
        own.mkdir()
        done: list[bool] = []
        async with open_world(own, monkeypatch, in_lane=True) as here:
            scope = here.nursery.cancel_scope
            trio.lowlevel.add_instrument(steps := Steps(step, scope.cancel))
            client = here.connect()
            staying.append(socket.socket(fileno=os.dup(client.socket.fileno())))
            await visit_and_leave(visit, client)
            trio.lowlevel.remove_instrument(steps)
            # At its end the world is cancelled anyway.
            done.append(not scope.cancel_called)
        return not any(done)

    steps = run_with_every_cancellation(
        lambda step: trio.run(main, step, clock=MockClock(autojump_threshold=0))
    )
    assert steps > 30
    for sock in staying:
        sock.close()
