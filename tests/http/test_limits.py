"""What a client may take of time and room, by default; and that honest slowness is not stopped.

Times are those of a mock clock, with the defaults of ``run``. Connections in total are counted on
real sockets. That each limit can be set is shown in ``tests/e2e/test_run_options.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.run_options import RunOptions
from kamal_proxy.target_options import TargetOptions
from tests.http.streams import GET, HELLO, World, open_world, read_all, read_head
from tests.running import open_embedded
from tests.scripted import Held, open_client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.scripted import Client, Upstream

Opener = Callable[..., AbstractAsyncContextManager[World]]
POST = b"POST /path HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n"
KIB = 1024


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> Opener:
    """Return :func:`open_world` for this test."""
    return partial(open_world, tmp_path, monkeypatch)


async def trickle(client: trio.SocketStream, data: bytes, seconds: float) -> None:
    """Send byte by byte, each that long after the one before, as long as anybody listens."""
    try:
        for byte in data:
            await client.send_all(bytes([byte]))
            await trio.sleep(seconds)
    except trio.BrokenResourceError:
        return


def test_the_defaults() -> None:
    options = RunOptions()
    assert (options.head_timeout, options.idle_timeout, options.stall_timeout) == (30, 60, 60)
    assert (options.max_head_size, options.max_headers) == (64 * KIB, 200)
    assert options.max_connections == 10_000
    assert (options.max_spill, options.max_buffer_memory) == (10 * KIB**3, 256 * KIB**2)


# Slowness that is stopped


@pytest.mark.parametrize("seconds", [0.5, 5.0, 29.0])
async def test_a_head_that_trickles_in(
    world: Opener, seconds: float, autojump_clock: MockClock
) -> None:
    async with world() as here, trio.open_nursery() as nursery:
        client = here.connect()
        start = trio.current_time()
        nursery.start_soon(trickle, client, GET[:-2] + b"X: y\r\n" * 100, seconds)
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(30)
        await wait_all_tasks_blocked()
        assert [(line["status"], line["reason"]) for line in here.logged] == [(408, "head_timeout")]
        nursery.cancel_scope.cancel()


async def test_empty_lines_do_not_keep_a_connection(
    world: Opener, autojump_clock: MockClock
) -> None:
    """A server should ignore them before a request (RFC 9112 2.2), but not for ever."""
    async with world() as here, trio.open_nursery() as nursery:
        client = here.connect()
        start = trio.current_time()
        nursery.start_soon(trickle, client, b"\r\n" * 100, 2.0)
        await read_all(client)
        assert trio.current_time() - start == pytest.approx(30)
        nursery.cancel_scope.cancel()


async def test_the_first_byte(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as here:
        client = here.connect()
        start = trio.current_time()
        assert await read_all(client) == b""
        assert trio.current_time() - start == pytest.approx(30)
        assert here.logged == []


async def test_between_two_requests(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as here:
        client = here.connect()
        for _ in range(3):
            await client.send_all(GET)
            assert (await read_head(client)).endswith(b"hello")
            await trio.sleep(59)
        start = trio.current_time() - 59
        assert await read_all(client) == b""
        assert trio.current_time() - start == pytest.approx(60)
        assert here.statuses == [200] * 3


async def test_a_body_that_stalls(world: Opener, autojump_clock: MockClock) -> None:
    async with world(read_all) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 100 + b"some")
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(60)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert [(line["status"], line["reason"]) for line in here.logged] == [(408, "body_timeout")]


async def test_a_body_that_stalls_while_it_is_buffered(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(target_options=TargetOptions(buffer_requests=True)) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 100 + b"some")
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(60)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert [(line["status"], line["reason"]) for line in here.logged] == [(408, "body_timeout")]
        assert here.targets == [], "nobody was asked"


@pytest.mark.parametrize("buffered", [False, True], ids=["streamed", "buffered"])
async def test_a_client_that_takes_nothing(
    world: Opener, buffered: bool, autojump_clock: MockClock
) -> None:
    async def send_much(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        await stream.send_all(bytes(1_000_000))

    async with world(send_much, target_options=TargetOptions(buffer_responses=buffered)) as here:
        client = here.connect()
        await client.send_all(GET)
        await trio.sleep(59)
        assert here.server.connections == 1
        await trio.sleep(2)
        assert here.server.connections == 0
        assert [(line["status"], line["reason"]) for line in here.logged] == [
            (499, "client_stalled")
        ]


# Slowness that is not


@pytest.mark.parametrize("buffered", [False, True], ids=["streamed", "buffered"])
async def test_an_upload_may_take_hours(
    world: Opener, buffered: bool, autojump_clock: MockClock
) -> None:
    async def take(stream: trio.SocketStream) -> None:
        data = b""
        while not data.endswith(b"the end"):
            data += await stream.receive_some()
        await stream.send_all(HELLO)

    body = b"x" * 300 + b"the end"
    async with world(take, target_options=TargetOptions(buffer_requests=buffered)) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % len(body))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle, client, body, 59)
            assert (await read_head(client)).endswith(b"hello")
            nursery.cancel_scope.cancel()
        assert trio.current_time() - start > 5 * 3600
        await wait_all_tasks_blocked()
        assert here.statuses == [200]
        assert "reason" not in here.logged[0]


async def test_a_stream_may_last_for_days(world: Opener, autojump_clock: MockClock) -> None:
    async def tell_news(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(48):
            await trio.sleep(3600)
            await stream.send_all(b"data: news\n\n")

    async with world(tell_news) as here:
        client = here.connect()
        await client.send_all(GET)
        news = b""
        while news.count(b"news") < 48:
            news += await client.receive_some()
        await client.aclose()
        await wait_all_tasks_blocked()
        assert trio.current_time() > 47 * 3600
        assert here.logged[0]["resp_content_length"] == 48 * len(b"data: news\n\n")


async def test_waiting_for_the_target_is_not_the_clients_fault(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def think(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(3600)
        await stream.send_all(HELLO)

    async with world(think, target_options=TargetOptions(response_timeout=4000)) as here:
        client = here.connect()
        await client.send_all(GET)
        assert (await read_head(client)).endswith(b"hello")


@pytest.mark.parametrize("buffered", [False, True], ids=["streamed", "buffered"])
async def test_a_client_that_takes_little_at_a_time(
    world: Opener, buffered: bool, autojump_clock: MockClock
) -> None:
    """Of any piece that waits to be sent, some is taken in time; the whole piece is not."""
    size = 1_000_000

    async def send_much(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        await stream.send_all(bytes(size))

    async with world(send_much, target_options=TargetOptions(buffer_responses=buffered)) as here:
        client = here.connect()
        await client.send_all(GET)
        got = len(await client.receive_some(100))
        while got < size:
            await trio.sleep(2.5)
            part = await client.receive_some(10_000)
            assert part, "it was cut off"
            got += len(part)
        await client.aclose()


# Sizes


def padded(size: int) -> bytes:
    """Return a request whose head has exactly this size."""
    return GET[:-2] + b"X: " + b"y" * (size - len(GET) - 5) + b"\r\n\r\n"


def with_headers(count: int) -> bytes:
    """Return a request with exactly that many header fields."""
    return GET[:-2] + b"X: y\r\n" * (count - 1) + b"\r\n"


@pytest.mark.parametrize("split", [False, True], ids=["whole", "in two"])
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (padded(64 * KIB), 200),
        (padded(64 * KIB + 1), 431),
        (with_headers(200), 200),
        (with_headers(201), 431),
    ],
    ids=["size", "one byte more", "fields", "one field more"],
)
async def test_a_large_head(
    world: Opener, request_: bytes, status: int, split: bool, autojump_clock: MockClock
) -> None:
    async with world() as here:
        client = here.connect()
        for piece in (request_[:-3], request_[-3:]) if split else (request_,):
            await client.send_all(piece)
            await wait_all_tasks_blocked()
        assert (await read_head(client)).startswith(b"HTTP/1.1 %d " % status)
        await client.aclose()
        await wait_all_tasks_blocked()
        reasons = [(line["status"], line.get("reason")) for line in here.logged]
        assert reasons == [(status, None if status == 200 else "head_too_large")]
        assert (status == 200) == bool(here.targets)


async def test_a_head_without_end_is_refused_before_it_ends(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world() as here:
        client = here.connect()
        await client.send_all(padded(64 * KIB + 2)[:-1])
        assert (await read_head(client)).startswith(b"HTTP/1.1 431 ")
        await client.aclose()


async def test_the_limits_of_a_head_do_not_count_its_body(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def take(stream: trio.SocketStream) -> None:
        data = b""
        while len(data) < 100 * KIB:
            data += await stream.receive_some()
        await stream.send_all(HELLO)

    async with world(take, max_head_size=KIB, max_headers=2) as here:
        client = here.connect()
        await client.send_all(POST % (100 * KIB) + b"a: b\r\n" * (100 * KIB // 6) + bytes(4))
        assert (await read_head(client)).endswith(b"hello")
        await client.aclose()


# Connections in total


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("127.0.0.1", "127.0.0.2", "127.0.0.3")])
async def test_connections_over_the_limit_wait(
    upstream: Upstream, addresses: tuple[str, ...]
) -> None:
    """They are in the kernel's backlog, and are served as soon as another one has ended."""
    held = Held(upstream)
    async with (
        open_embedded(max_connections=1, bind=addresses) as proxy,
        AsyncExitStack() as opened,
    ):
        await proxy.deploy(upstream.options())
        for host in addresses:
            async with open_client(proxy.port, host=host) as client:
                assert (await client.get()).body == b"hello"
        await proxy.lines.wait_requests(len(addresses))
        await proxy.proxy.remove("web")  # and with it its kept connections
        await proxy.deploy(upstream.options())
        upstream.script(held)

        async def connect(host: str) -> Client:
            client = await opened.enter_async_context(open_client(proxy.port, host=host))
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            return client

        first = await connect(addresses[-1])
        await upstream.wait_requests(len(addresses) + 1)
        waiting = [await connect(host) for host in addresses * 2]
        await wait_all_tasks_blocked(0.05)
        assert b"\nkamal_proxy_http_open_connections 1.0\n" in proxy.proxy.metrics()[0]
        assert len(upstream.requests) == len(addresses) + 1
        held.release.set()
        assert (await first.receive_response()).body == b"held"
        first.close()
        # Each ends when it has its answer, in whatever order they get their turns.
        async with trio.open_nursery() as nursery:

            async def finish(client: Client) -> None:
                assert (await client.receive_response()).body == b"hello"
                client.close()

            for client in waiting:
                nursery.start_soon(finish, client)
