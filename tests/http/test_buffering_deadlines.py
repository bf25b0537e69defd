"""Buffered exchanges in time: stalls, the target's timeout, shutdown, and every cancellation."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.http import bodies
from kamal_proxy.http.connection import ClientConnection
from kamal_proxy.http.reasons import Reason
from kamal_proxy.target_options import TargetOptions
from tests.http.stepping import attempt_every_step, visit_and_leave
from tests.http.streams import HELLO, World, open_world, read_all, read_head
from tests.pairs import Steps

if TYPE_CHECKING:
    from pathlib import Path

GET = b"GET /path HTTP/1.1\r\nHost: app.test\r\n\r\n"
POST = b"POST /path HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
SIZE = 600_000
Opener = Callable[..., AbstractAsyncContextManager[World]]
Script = Callable[[trio.SocketStream], Awaitable[None]]

# Without memory every write is a trip to a thread.
PLACES = pytest.mark.parametrize("memory", [10 * SIZE, 1000], ids=["memory", "disk"])


def buffering(memory: int = SIZE, *, timeout: float = 30.0) -> TargetOptions:
    return TargetOptions(
        buffer_requests=True,
        buffer_responses=True,
        max_memory_buffer_size=memory,
        response_timeout=timeout,
    )


async def run_at_once(call: Callable[[], object], *, limiter: object) -> object:
    """Stand in for a thread: a mock clock would jump while it waits for a real one."""
    assert isinstance(limiter, trio.CapacityLimiter)
    await trio.lowlevel.checkpoint_if_cancelled()
    result = call()
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> Opener:
    """Return :func:`open_world` for this test."""
    monkeypatch.setattr(trio.to_thread, "run_sync", run_at_once)
    return partial(open_world, tmp_path, monkeypatch)


def steady(parts: int, every: float) -> Script:
    """Return a script that sends a response in parts, some seconds apart, then swallows all."""

    async def serve(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(RESPONSE % (parts * 10))
        for _ in range(parts):
            await trio.sleep(every)
            await stream.send_all(b"0123456789")
        await read_all(stream)

    return serve


@pytest.mark.parametrize("part", [b"", b"some"])
@PLACES
async def test_a_body_that_stalls(
    world: Opener, memory: int, part: bytes, autojump_clock: MockClock
) -> None:
    async with world(target_options=buffering(memory), stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % SIZE + part)
        await trio.sleep(50)
        await client.send_all(b"x" * 5000)
        response = await read_all(client)

        assert response.startswith(b"HTTP/1.1 408 ")
        # Afterwards the rest of the request is awaited for a moment.
        assert 110 <= trio.current_time() - start < 113
        assert here.targets == []
        assert here.statuses == [408]
        assert here.logged[0]["reason"] == Reason.BODY_TIMEOUT


async def test_a_client_that_was_told_to_continue_and_does_not(
    world: Opener, autojump_clock: MockClock
) -> None:
    """The proxy has answered, so it is the client's turn."""
    async with world(target_options=buffering(), stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all((POST % 9).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert await read_head(client) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(60)


async def test_a_long_upload_is_not_a_stall(world: Opener, autojump_clock: MockClock) -> None:
    async with world(target_options=buffering(timeout=30), stall_timeout=60) as here:
        client = here.connect()
        await client.send_all(POST % 20)
        for _ in range(20):
            await trio.sleep(59)
            await client.send_all(b"x")

        assert (await read_head(client)).endswith(b"hello")


@PLACES
async def test_a_target_that_takes_a_body_slowly_but_steadily(
    world: Opener, memory: int, autojump_clock: MockClock
) -> None:
    """The timeout is for the response; it begins when all of the request was sent."""
    taken = 0

    async def slow(stream: trio.SocketStream) -> None:
        nonlocal taken
        head = await read_head(stream)
        taken = len(head.partition(b"\r\n\r\n")[2])
        while taken < SIZE:
            await trio.sleep(2)
            taken += len(await stream.receive_some(64 * 1024))
        await stream.send_all(HELLO)

    async with world(slow, target_options=buffering(memory, timeout=10)) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % SIZE + bytes(SIZE))
        assert (await read_head(client)).endswith(b"hello")
        assert trio.current_time() - start > 15
        assert taken == SIZE


@pytest.mark.parametrize("waits_first", [False, True])
async def test_a_body_that_comes_from_disk_slowly(
    world: Opener, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, waits_first: bool
) -> None:
    """It is no fault of the target, which takes all there is, maybe after a slow start."""
    batch = 32 * 1024  # which the target's socket takes without a wait
    monkeypatch.setattr(bodies, "BATCH", batch)
    size = 20 * batch

    async def slow_disk(call: Callable[[], object], *, limiter: object) -> object:
        await trio.sleep(1)
        return await run_at_once(call, limiter=limiter)

    async def take_all(stream: trio.SocketStream) -> None:
        taken = len((await read_head(stream)).partition(b"\r\n\r\n")[2])
        if waits_first:
            await trio.sleep(5)
        while taken < size:
            taken += len(await stream.receive_some(1024 * 1024))
        await stream.send_all(HELLO)

    async with world(take_all, target_options=buffering(1000, timeout=8)) as here:
        monkeypatch.setattr(trio.to_thread, "run_sync", slow_disk)
        client = here.connect()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, POST % size + bytes(size))
            assert (await read_head(client)).endswith(b"hello")
        assert trio.current_time() - start > 20


@PLACES
async def test_the_target_timeout_ends_with_the_head(
    world: Opener, memory: int, autojump_clock: MockClock
) -> None:
    """Whether the response is buffered is nothing that its target could know."""
    options = buffering(memory, timeout=30)
    async with world(steady(10, every=20), target_options=options) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET)
        response = await read_head(client)

        assert trio.current_time() - start == pytest.approx(200)
        assert response.endswith(b"0123456789" * 10)


@pytest.mark.parametrize("expected", [b"200", b"408"])
async def test_a_buffered_response_while_the_request_still_arrives(
    world: Opener, expected: bytes, autojump_clock: MockClock
) -> None:
    """The target's timeout is over, that of the client's body is not."""
    options = TargetOptions(buffer_responses=True, response_timeout=30)
    async with world(steady(10, every=20), target_options=options, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 20_000)
        for _ in range(2):
            await trio.sleep(50)
            await client.send_all(b"x" * 10_000 if expected == b"200" else b"x")
        response = await read_head(client)

        assert response.split(b" ")[1] == expected
        # 60 seconds after the last part of the request, or when the response is whole.
        wanted = 200 if expected == b"200" else 160
        assert trio.current_time() - start == pytest.approx(wanted)


async def test_a_silent_target(world: Opener, autojump_clock: MockClock) -> None:
    async def swallow(stream: trio.SocketStream) -> None:
        await read_all(stream)

    async with world(swallow, target_options=buffering(1000, timeout=30)) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 100_000 + b"x" * 100_000)
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(30)


async def test_a_client_that_does_not_read_a_buffered_response(
    world: Opener, autojump_clock: MockClock
) -> None:
    """It costs nobody but itself, and not for ever."""
    async with world(large_response, target_options=buffering(1000), stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        assert (here.deployment.in_flight, here.server.spill.spilled) == (0, SIZE - 1000)
        here.server.close_idle(math.inf)
        await here.server.wait_closed()
        assert trio.current_time() - start == pytest.approx(60)
        assert here.logged[0]["reason"] == Reason.CLIENT_STALLED


async def test_shutdown_during_a_body(world: Opener, autojump_clock: MockClock) -> None:
    async with world(target_options=buffering(1000)) as here:
        finishing, stuck = here.connect(), here.connect()
        await finishing.send_all(POST % 20_000 + b"x" * 10_000)
        await stuck.send_all(POST % 20_000 + b"x" * 10_000)
        await wait_all_tasks_blocked()
        here.server.close_idle(math.inf)
        await finishing.send_all(b"x" * 10_000)

        assert (await read_all(finishing)).endswith(b"hello")
        here.server.abort()
        assert (await read_all(stuck)).startswith(b"HTTP/1.1 503 ")
        await here.server.wait_closed()
        assert here.statuses == [200, 503]
        assert here.logged[1]["reason"] == Reason.SHUTDOWN


async def test_shutdown_before_a_response_is_whole(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(steady(2, every=1000), target_options=buffering(5)) as here:
        client = here.connect()
        await client.send_all(GET)
        await trio.sleep(1500)
        here.server.close_idle(math.inf)
        here.server.abort()

        assert (await read_all(client)).startswith(b"HTTP/1.1 503 ")
        await here.server.wait_closed()
        assert here.logged[0]["reason"] == Reason.SHUTDOWN


# Cancellation at every step


async def upload(client: trio.SocketStream) -> None:
    await client.send_all(POST % SIZE)
    for _ in range(6):
        await client.send_all(b"x" * 100_000)
    await read_head(client)


async def upload_expecting(client: trio.SocketStream) -> None:
    await client.send_all((POST % 5000).replace(b"Host", b"Expect: 100-continue\r\nHost"))
    await read_head(client)
    await client.send_all(b"x" * 5000)
    await read_head(client)


async def get(client: trio.SocketStream) -> None:
    await client.send_all(GET)
    await read_head(client)


async def download(client: trio.SocketStream) -> None:
    await client.send_all(GET)
    size = 0
    while size < SIZE:
        size += len(await client.receive_some(100_000) or b"x" * SIZE)


async def swallow_upload(stream: trio.SocketStream) -> None:
    got = (await read_head(stream)).partition(b"\r\n\r\n")
    wanted = int(got[0].lower().split(b"content-length: ")[1].split(b"\r")[0])
    size = len(got[2])
    while size < wanted:
        size += len(await stream.receive_some() or b"x" * wanted)
    await stream.send_all(HELLO)


async def answer_early(stream: trio.SocketStream) -> None:
    await read_head(stream)
    await stream.send_all(HELLO)
    await read_all(stream)


async def large_response(stream: trio.SocketStream) -> None:
    await read_head(stream)
    await stream.send_all(RESPONSE % SIZE + b"x" * SIZE)
    await read_all(stream)


async def break_off(stream: trio.SocketStream) -> None:
    await read_head(stream)
    await stream.send_all(RESPONSE % SIZE + b"x" * 100_000)


@pytest.mark.parametrize("reason", [Reason.DRAINED, Reason.SHUTDOWN])
@pytest.mark.parametrize(
    ("answer", "visit"),
    [
        (swallow_upload, upload),
        (swallow_upload, upload_expecting),
        (answer_early, upload),
        (large_response, download),
        (break_off, get),
    ],
)
@PLACES
def test_cancelled_at_every_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
    answer: Script,
    visit: Callable[[trio.SocketStream], Awaitable[None]],
    reason: Reason,
) -> None:
    """As by the deadline of a drain, and by a shutdown: one line, and nothing is kept."""
    monkeypatch.setattr(trio.to_thread, "run_sync", run_at_once)

    async def attempt(here: World, step: int) -> bool:
        client = here.connect()
        await wait_all_tasks_blocked()
        (connection,) = here.server._connections
        assert isinstance(connection, ClientConnection)
        scope = connection.scope
        steps = Steps(step, lambda: connection.cancel(reason))
        async with trio.open_nursery() as visitors:
            trio.lowlevel.add_instrument(steps)
            visitors.start_soon(visit_and_leave, visit, client)
            here.server.closing = True  # it tells when the last connection has ended
            await here.server.wait_closed()
            trio.lowlevel.remove_instrument(steps)
        # That nothing is left of bodies is looked at by the world itself.
        assert here.deployment.in_flight == 0
        assert len(here.poller) <= 1, "at most the idle upstream connection is left"
        for line in here.logged:
            assert line["status"] in (200, 499, 502, reason.status)
        assert len(here.logged) <= 1
        if here.targets:
            assert here.logged, "a request that reached the target is logged"
        left = [path for path in (tmp_path / str(step)).iterdir() if path.name != "t.sock"]
        assert not left
        return scope.cancel_called

    options = buffering(memory)
    steps = attempt_every_step(
        tmp_path, monkeypatch, attempt, answer=answer, target_options=options
    )
    assert steps > 10
