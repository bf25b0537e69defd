"""Bodies that are read whole before they go on: requests, responses, limits, room on disk."""

from __future__ import annotations

import hashlib
import os
import random
import select
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.deployment import DrainResult
from kamal_proxy.http import downstream
from kamal_proxy.options import PauseOptions, StopOptions
from tests.running import open_embedded
from tests.scripted import Peer, deploy_options, ok, open_client, open_upstream, reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from kamal_proxy import DeployOptions
    from tests.running import Embedded
    from tests.scripted import Client, Request, Script, Upstream

MEGABYTE = 1024 * 1024
MEMORY = 64 * 1024  # of each body; what is over goes to disk
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /up?load HTTP/1.1\r\nHost: a\r\n"
LENGTH = POST + b"Content-Length: %d\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
EXPECTING = POST + b"Expect: 100-Continue\r\nContent-Length: %d\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"

SMALL = random.Random(1).randbytes(5000)
LARGE = random.Random(2).randbytes(3 * MEGABYTE)
BODIES = pytest.mark.parametrize("body", [SMALL, LARGE], ids=["memory", "disk"])


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Embedded]:
    """Run a proxy whose spill directory is this test's, and look that it is left empty."""
    async with open_embedded(spill_directory=tmp_path) as embedded:
        yield embedded
        while open_files(tmp_path):  # large ones are closed in a thread
            await wait_all_tasks_blocked()
    assert taken(embedded) == (0, 0)
    assert not names(tmp_path)


def taken(proxy: Embedded) -> tuple[int, int]:
    """Return how many bytes of buffered bodies are in memory and on disk now."""
    numbers = dict(
        line.rsplit(" ", 1)
        for line in proxy.proxy.metrics()[0].decode().splitlines()
        if not line.startswith("#")
    )
    memory, disk = "kamal_proxy_buffer_memory_bytes", "kamal_proxy_spill_bytes"
    return int(float(numbers[memory])), int(float(numbers[disk]))


def buffered(proxy: Embedded) -> int:
    """Return how many bytes the only buffered body has, wherever they are."""
    memory, disk = taken(proxy)
    return min(memory, MEMORY) + disk  # the rest of the memory waits to be written to disk


async def wait_buffered(proxy: Embedded, size: int) -> None:
    """Wait until the only buffered body has exactly so many bytes."""
    while buffered(proxy) != size:
        await wait_all_tasks_blocked()


def names(directory: Path) -> list[str]:
    """Return what a directory shows."""
    return [path.name for path in directory.iterdir()]


def open_files(directory: Path) -> int:
    """Count the descriptors of this process that belong to files in a directory."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            place = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue  # that of the listing itself
        count += place.startswith(f"{directory}/")
    return count


async def deploy(proxy: Embedded, upstream: Upstream, **options: Any) -> None:
    """Deploy with both kinds of buffering."""
    await proxy.deploy(buffering(upstream, **options))


def buffering(upstream: Upstream, **options: Any) -> DeployOptions:
    """Build the options of a deploy with both kinds of buffering."""
    settings: dict[str, Any] = {
        "buffer_requests": True,
        "buffer_responses": True,
        "max_memory_buffer_size": MEMORY,
    }
    return upstream.options(**(settings | options))


def chunks(body: bytes, size: int = 7000) -> bytes:
    """Return a body in chunks, without the last one."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def is_silent(client: Client) -> bool:
    """Return whether nothing has arrived at a client."""
    readable, _, _ = select.select([client.sock.fileno()], [], [], 0)
    return not readable


def framing(request: Request) -> tuple[list[bytes], list[bytes]]:
    return request.get(b"content-length"), request.get(b"transfer-encoding")


# Requests


@BODIES
@pytest.mark.parametrize("chunked", [False, True])
async def test_the_target_sees_nothing_before_the_body_is_whole(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes, chunked: bool, tmp_path: Path
) -> None:
    await deploy(proxy, upstream)
    half = len(body) // 2
    first, second = body[:half], body[half:]

    if chunked:
        await client.send(CHUNKED + chunks(first))
    else:
        await client.send(LENGTH % len(body) + first)
    await wait_buffered(proxy, half)

    memory, disk = taken(proxy)
    assert (upstream.peers, proxy.open_streams) == ([], 1)
    assert open_files(tmp_path) == (1 if body is LARGE else 0)
    assert (disk > 0) == (body is LARGE)
    assert memory <= MEMORY + MEGABYTE
    assert not names(tmp_path)
    await client.send(chunks(second) + b"0\r\n\r\n" if chunked else second)
    response = await client.receive_response()

    assert (response.status, response.informational) == (200, [])
    (request,) = upstream.requests
    assert digest(request.body) == digest(body)
    assert framing(request) == ([b"%d" % len(body)], [])
    assert request.target == b"/up?load"
    await wait_buffered(proxy, 0)
    assert open_files(tmp_path) == 0
    assert (await client.get()).status == 200


@BODIES
async def test_trailers_keep_a_request_chunked(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes
) -> None:
    await deploy(proxy, upstream)

    await client.send(CHUNKED + chunks(body) + b"0\r\nX-Sum: 6\r\nHost: evil\r\n\r\n")
    response = await client.receive_response()

    assert response.status == 200
    (request,) = upstream.requests
    assert digest(request.body) == digest(body)
    assert framing(request) == ([], [b"chunked"])
    assert request.trailers == [(b"x-sum", b"6")]
    assert (await client.get()).status == 200


@pytest.mark.parametrize(
    ("method", "head", "data", "lengths"),
    [
        (b"POST", b"Content-Length: 0\r\n\r\n", b"", [b"0"]),
        (b"POST", b"Transfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n", [b"0"]),
        (b"POST", b"\r\n", b"", [b"0"]),
        (b"GET", b"Transfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n", []),
        (b"GET", b"Content-Length: 3\r\n\r\n", b"abc", [b"3"]),
    ],
)
@pytest.mark.parametrize("together", [True, False])
async def test_bodies_of_hardly_any_bytes(
    proxy: Embedded,
    upstream: Upstream,
    client: Client,
    method: bytes,
    head: bytes,
    data: bytes,
    lengths: list[bytes],
    together: bool,
) -> None:
    await deploy(proxy, upstream)

    await client.send(method + b" / HTTP/1.1\r\nHost: a\r\n" + head + (data if together else b""))
    if not together:
        await wait_all_tasks_blocked(0.01)
        await client.send(data)
    response = await client.receive_response()

    assert response.status == 200
    (request,) = upstream.requests
    assert framing(request) == (lengths, [])
    assert request.body == (b"abc" if b"abc" in data else b"")
    assert (await client.get()).status == 200


@pytest.mark.parametrize("limit", [10, 100_000])
@pytest.mark.parametrize("kind", ["length", "chunked"])
async def test_a_body_as_large_as_the_limit(
    proxy: Embedded, upstream: Upstream, client: Client, limit: int, kind: str
) -> None:
    await deploy(proxy, upstream, max_request_body_size=limit)
    body = bytes(limit)

    if kind == "length":
        await client.send(LENGTH % limit + body)
    else:
        await client.send(CHUNKED + chunks(body) + b"0\r\n\r\n")

    assert (await client.receive_response()).status == 200
    assert upstream.requests[0].body == body


@pytest.mark.parametrize("limit", [10, 100_000])
@pytest.mark.parametrize("kind", ["length", "expecting", "with body", "chunked"])
async def test_a_body_larger_than_the_limit(
    proxy: Embedded, upstream: Upstream, client: Client, limit: int, kind: str
) -> None:
    await deploy(proxy, upstream, max_request_body_size=limit)
    body = bytes(limit + 1)
    data = {
        "length": LENGTH % len(body),
        "expecting": EXPECTING % len(body),
        "with body": LENGTH % len(body) + body,
        "chunked": CHUNKED + chunks(body),  # more could follow
    }[kind]

    await client.send(data)
    response = await client.receive_response()

    assert (response.status, response.informational) == (413, [])
    assert b"<html" in response.body.lower()
    if kind == "with body" and limit == 10:
        # It was here whole when it was refused.
        assert response.get(b"connection") == []
        client.close()
    else:
        assert response.get(b"connection") == [b"close"]
        assert await client.receive_eof() == b""
    assert upstream.peers == []
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["reason"], line["target"]) == (413, "request_too_large", "")
    assert line["service"] == "web"


SWITCHING = b"Connection: Upgrade\r\nUpgrade: x-raw\r\n"


@pytest.mark.parametrize("kind", ["length", "chunked"])
async def test_a_wish_to_switch_is_no_way_around_the_limit(
    proxy: Embedded, upstream: Upstream, client: Client, kind: str
) -> None:
    await deploy(proxy, upstream, max_request_body_size=10)
    data = LENGTH % 11 if kind == "length" else CHUNKED + chunks(bytes(11))

    await client.send(data.replace(POST, POST + SWITCHING))

    assert (await client.receive_response()).status == 413
    assert await client.receive_eof() == b""
    assert upstream.peers == []


async def test_a_body_with_a_wish_to_switch_is_buffered_too(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await deploy(proxy, upstream)
    switched = b"HTTP/1.1 101 Go\r\n" + SWITCHING + b"\r\nover to you"

    async def serve(peer: Peer) -> None:
        request = await peer.receive_request()
        assert request is not None
        upstream.record(request)
        await peer.send(switched)

    upstream.script(serve)

    await client.send((LENGTH % len(SMALL)).replace(POST, POST + SWITCHING) + SMALL[:-1])
    await wait_buffered(proxy, len(SMALL) - 1)
    assert upstream.peers == []
    await client.send(SMALL[-1:])

    assert (await client.receive_until(b"over to you")).startswith(b"HTTP/1.1 101 ")
    (request,) = upstream.requests
    assert (request.get(b"upgrade"), request.body) == ([b"x-raw"], SMALL)


async def test_a_body_larger_than_the_limit_that_is_over(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await deploy(proxy, upstream, max_request_body_size=10)

    await client.send(CHUNKED + chunks(bytes(11)) + b"0\r\n\r\n")

    assert (await client.receive_response()).status == 413
    assert (await client.get()).status == 200  # on the same connection


@BODIES
async def test_expect_continue_is_answered_by_the_proxy(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes
) -> None:
    await deploy(proxy, upstream)

    await client.send(EXPECTING % len(body))
    assert await client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert upstream.peers == []
    await client.send(body)
    response = await client.receive_response()

    assert (response.status, response.informational) == (200, [])  # not a second time
    (request,) = upstream.requests
    assert request.get(b"expect") == []
    assert digest(request.body) == digest(body)


@pytest.mark.parametrize(
    "data",
    [
        EXPECTING % 4 + b"body",  # it is here
        EXPECTING % 0,
        POST + b"Expect: 100-continue\r\n\r\n",
        (EXPECTING % 4).replace(b"HTTP/1.1", b"HTTP/1.0") + b"body",
    ],
)
async def test_nobody_is_told_to_continue_without_need(
    proxy: Embedded, upstream: Upstream, client: Client, data: bytes
) -> None:
    await deploy(proxy, upstream)

    response = await client.request(data)

    assert (response.status, response.informational) == (200, [])


@pytest.mark.parametrize("bad", [b"zz\r\n", b"5\r\nabcdefg", b"-1\r\n", b"5 \r\n\r\n"])
async def test_a_malformed_chunk(
    proxy: Embedded, upstream: Upstream, client: Client, bad: bytes
) -> None:
    await deploy(proxy, upstream)

    await client.send(CHUNKED + chunks(SMALL))
    await wait_buffered(proxy, len(SMALL))
    await client.send(bad)
    response = await client.receive_response()

    assert response.status == 400
    assert await client.receive_eof() == b""
    assert upstream.peers == []
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["reason"]) == (400, "bad_request")
    assert taken(proxy) == (0, 0)


@BODIES
@pytest.mark.parametrize("leave", ["close", "reset", "shutdown_write"])
async def test_a_client_that_leaves_in_the_middle_of_its_body(
    proxy: Embedded, upstream: Upstream, body: bytes, leave: str
) -> None:
    await deploy(proxy, upstream)
    async with open_client(proxy.port) as client:
        await client.send(LENGTH % (len(body) + 1) + body)
        await wait_buffered(proxy, len(body))
        getattr(client, leave)()
        (line,) = await proxy.lines.wait_requests(1)

    assert (line["status"], line["reason"]) == (499, "client_gone")
    assert upstream.peers == []
    await proxy.wait_streams(0)
    assert taken(proxy) == (0, 0)


@BODIES
async def test_a_deploy_does_not_wait_for_a_body(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes
) -> None:
    await deploy(proxy, upstream)
    await client.send(LENGTH % (len(body) + 1) + body)
    await wait_buffered(proxy, len(body))
    async with open_upstream() as new:
        result = await proxy.proxy.deploy(buffering(new))
        await client.send(b"!")
        response = await client.receive_response()

        assert (result, response.status) == (DrainResult(), 200)
        assert digest(new.requests[0].body) == digest(body + b"!")
    assert upstream.peers == []


async def test_a_deploy_without_buffering_during_a_body(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    """What was read whole stays whole."""
    await deploy(proxy, upstream)
    await client.send(EXPECTING % 4)
    await client.receive_until(b"\r\n\r\n")
    async with open_upstream() as new:
        await proxy.deploy(new.options())
        await client.send(b"body")
        response = await client.receive_response()

        assert (response.status, response.informational) == (200, [])
        assert (new.requests[0].body, new.requests[0].get(b"expect")) == (b"body", [])


async def test_a_pause_during_a_body(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await deploy(proxy, upstream)
    await client.send(LENGTH % len(SMALL) + SMALL[:-1])
    await wait_buffered(proxy, len(SMALL) - 1)

    result = await proxy.proxy.pause("web", PauseOptions())
    await client.send(SMALL[-1:])
    await wait_buffered(proxy, len(SMALL))
    await wait_all_tasks_blocked(0.01)
    assert (result, upstream.peers) == (DrainResult(), [])
    assert is_silent(client)
    await proxy.proxy.resume("web")

    assert (await client.receive_response()).status == 200
    assert upstream.requests[0].body == SMALL


async def test_a_pause_that_expires_after_a_body(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await deploy(proxy, upstream)
    await client.send(LENGTH % len(SMALL) + SMALL[:-1])
    await wait_buffered(proxy, len(SMALL) - 1)

    await proxy.proxy.pause("web", PauseOptions(max_pause=0.05))
    await client.send(SMALL[-1:])

    assert (await client.receive_response()).status == 504
    assert taken(proxy) == (0, 0)
    await proxy.proxy.resume("web")
    assert (await client.get()).status == 200  # on the same connection


async def test_a_stop_during_a_body(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await deploy(proxy, upstream)
    await client.send(LENGTH % len(SMALL) + SMALL[:-1])
    await wait_buffered(proxy, len(SMALL) - 1)

    await proxy.proxy.stop_service("web", StopOptions(message="Back <soon>"))
    await client.send(SMALL[-1:])
    response = await client.receive_response()

    assert response.status == 503
    assert b"Back &lt;soon&gt;" in response.body
    assert upstream.peers == []
    await proxy.proxy.resume("web")
    assert (await client.get()).status == 200


async def test_a_service_that_is_removed_during_a_body(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await deploy(proxy, upstream)
    await client.send(LENGTH % len(SMALL) + SMALL[:-1])
    await wait_buffered(proxy, len(SMALL) - 1)

    await proxy.proxy.remove("web")
    await client.send(SMALL[-1:])

    assert (await client.receive_response()).status == 404
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["reason"]) == (404, "no_service")


@BODIES
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_pipelined_request_after_a_body(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes, chunked: bool
) -> None:
    await deploy(proxy, upstream)
    data = CHUNKED + chunks(body) + b"0\r\n\r\n" if chunked else LENGTH % len(body) + body

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, data + data + GET)
        responses = [await client.receive_response() for _ in range(3)]

    assert [response.status for response in responses] == [200] * 3
    assert [len(request.body) for request in upstream.requests] == [len(body), len(body), 0]
    assert [digest(request.body) for request in upstream.requests[:2]] == [digest(body)] * 2


@BODIES
async def test_a_body_goes_to_a_sibling_when_a_target_refuses(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes
) -> None:
    async with open_upstream() as dead:
        await proxy.deploy(
            deploy_options(
                "web", [dead, upstream], buffer_requests=True, max_memory_buffer_size=MEMORY
            )
        )
        dead.stop_listening()
        for _ in range(2):
            await client.send(LENGTH % len(body) + body)
            assert (await client.receive_response()).status == 200

    assert [digest(request.body) for request in upstream.requests] == [digest(body)] * 2
    text = proxy.proxy.metrics()[0].decode()
    assert 'kamal_proxy_upstream_retries_total{service="web"} 1.0' in text


@pytest.mark.parametrize("end", [Peer.close, Peer.reset, Peer.wait_closed])
@pytest.mark.parametrize("read", [0, 100_000])
async def test_an_early_answer_to_a_large_body(
    proxy: Embedded,
    upstream: Upstream,
    client: Client,
    end: Callable[[Peer], object],
    read: int,
) -> None:
    await deploy(proxy, upstream)
    large = bytes(16 * MEGABYTE)

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await peer.receive_exactly(read)
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\n\r\ntoo much")
        if end is Peer.wait_closed:
            await peer.wait_closed()
        else:
            end(peer)

    upstream.script(serve)

    await client.send(LENGTH % len(large) + large)
    response = await client.receive_response(b"POST")

    assert (response.status, response.body) == (413, b"too much")
    assert response.get(b"connection") == []  # all of the body was read, so the client may go on
    assert (await client.get()).body == b"hello"
    await wait_buffered(proxy, 0)


async def test_a_target_that_reads_slowly_gets_it_all(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await deploy(proxy, upstream)
    large = LARGE * 5
    received = b""
    go_on = trio.Event()

    async def serve(peer: Peer) -> None:
        nonlocal received
        await peer.receive_until(b"\r\n\r\n")
        received += await peer.receive_exactly(10_000)
        await go_on.wait()
        received += await peer.receive_exactly(len(large) - 10_000)
        await peer.send(ok(b"slow"))

    upstream.script(serve)

    await client.send(LENGTH % len(large) + large)
    while len(received) < 10_000:
        await wait_all_tasks_blocked()
    await wait_all_tasks_blocked(0.05)  # the kernel's buffers are full
    assert buffered(proxy) == len(large)  # it may have to be read again
    go_on.set()

    assert (await client.receive_response()).body == b"slow"
    assert digest(received) == digest(large)


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_client_that_leaves_while_its_body_goes_to_a_slow_target(
    proxy: Embedded, upstream: Upstream, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream, "GONE_GRACE", 0.05)
    await deploy(proxy, upstream, response_timeout=1000)
    large = bytes(16 * MEGABYTE)
    closed = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await leaving.wait()
        await proxy.lines.wait_requests(1)  # only then is there room for more
        await peer.wait_closed()
        closed.set()

    leaving = trio.Event()
    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(LENGTH % len(large) + large)
        await upstream.wait_peers(1)
        getattr(client, leave)()
        leaving.set()
        await closed.wait()
    (line,) = proxy.lines.requests

    assert (line["status"], line["reason"]) == (499, "client_gone")
    await proxy.wait_streams(0)
    await wait_buffered(proxy, 0)


# Responses


def held_response(body: bytes, go_on: trio.Event, *, at: int | None = None) -> Script:
    """Return a script that sends a response with a length, stopping in the middle of it."""
    cut = len(body) // 2 if at is None else at

    async def serve(peer: Peer) -> None:
        assert await peer.receive_request() is not None
        await peer.send(RESPONSE % len(body) + body[:cut])
        await go_on.wait()
        await peer.send(body[cut:])
        while await peer.receive_request() is not None:
            await peer.send(ok(b"next"))

    return serve


@BODIES
async def test_the_client_gets_nothing_before_the_response_is_whole(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes, tmp_path: Path
) -> None:
    await deploy(proxy, upstream)
    go_on = trio.Event()
    upstream.script(held_response(body, go_on))

    await client.send(GET)
    await wait_buffered(proxy, len(body) // 2)
    await wait_all_tasks_blocked(0.01)
    assert is_silent(client)
    assert open_files(tmp_path) == (1 if body is LARGE else 0)
    assert not names(tmp_path)
    go_on.set()
    response = await client.receive_response()

    assert (response.status, digest(response.body)) == (200, digest(body))
    assert response.get(b"content-length") == [b"%d" % len(body)]
    assert response.get(b"transfer-encoding") == []
    await wait_buffered(proxy, 0)
    assert open_files(tmp_path) == 0
    assert (await client.get()).body == b"next"
    assert len(upstream.peers) == 1


@BODIES
@pytest.mark.parametrize("end", [Peer.close, Peer.reset])
@pytest.mark.parametrize("sent", [0.0, 0.5])
async def test_a_target_that_breaks_off_is_an_error_page(
    proxy: Embedded,
    upstream: Upstream,
    client: Client,
    body: bytes,
    end: Callable[[Peer], object],
    sent: float,
) -> None:
    await deploy(proxy, upstream)
    data = RESPONSE % len(body) + body[: int(len(body) * sent)]
    upstream.script(reply(data, then=end))

    await client.send(GET)
    response = await client.receive_response()

    assert response.status == 502
    assert b"<html" in response.body.lower()
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["reason"]) == (502, "target_failed")
    assert (await client.get()).body == b"hello"  # on the same connection
    assert taken(proxy) == (0, 0)


@pytest.mark.parametrize("size", [11, 5000, 200_000])
@pytest.mark.parametrize("together", [True, False])
async def test_a_response_larger_than_the_limit(
    proxy: Embedded, upstream: Upstream, client: Client, size: int, together: bool
) -> None:
    await deploy(proxy, upstream, max_response_body_size=size - 1)

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(RESPONSE % size + (bytes(size) if together else b""))
        if not together:
            await wait_all_tasks_blocked(0.01)
            await peer.send(bytes(size))

    upstream.script(serve)

    response = await client.request(GET)

    assert response.status == 500
    assert b"\0" not in response.body
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["reason"]) == (500, "response_too_large")
    assert line["target"] == upstream.target
    assert (await client.get()).body == b"hello"


@pytest.mark.parametrize("size", [10, 5000, 200_000])
async def test_a_response_as_large_as_the_limit(
    proxy: Embedded, upstream: Upstream, client: Client, size: int
) -> None:
    await deploy(proxy, upstream, max_response_body_size=size)
    upstream.script(reply(ok(bytes(size))))

    response = await client.request(GET)

    assert (response.status, len(response.body)) == (200, size)


@pytest.mark.parametrize(
    ("method", "data"),
    [
        (b"HEAD", RESPONSE % 5000),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
async def test_what_has_no_body_is_never_too_large(
    proxy: Embedded, upstream: Upstream, client: Client, method: bytes, data: bytes
) -> None:
    await deploy(proxy, upstream, max_response_body_size=10)
    upstream.script(reply(data))

    response = await client.request(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")

    assert (b"%d" % response.status, response.body) == (data.split()[1], b"")
    assert response.get(b"content-length") == ([b"5000"] if b"5000" in data else [])


@BODIES
async def test_the_target_is_free_while_a_slow_client_reads(
    proxy: Embedded, upstream: Upstream, body: bytes
) -> None:
    body = body if body is SMALL else body * 5
    await deploy(proxy, upstream, max_memory_buffer_size=MEMORY)
    go_on = trio.Event()
    upstream.script(held_response(body, go_on))
    async with (
        open_client(proxy.port, receive_buffer=65536) as slow,
        open_client(proxy.port) as quick,
        open_upstream() as new,
    ):
        await slow.send(GET)
        await wait_buffered(proxy, len(body) // 2)
        go_on.set()
        while is_silent(slow):
            await wait_all_tasks_blocked()

        assert (await quick.get()).body == b"next"
        assert len(upstream.peers) == 1, "the connection was back in the pool"
        assert await proxy.proxy.deploy(buffering(new)) == DrainResult()
        assert proxy.proxy.services()[0].draining == 0
        if body is not SMALL:
            assert len(proxy.lines.requests) == 1, "the client has not got all of it"
        response = await slow.receive_response()

        assert digest(response.body) == digest(body)
        assert (await slow.get()).body == b"hello"


async def test_a_connection_that_was_spared_is_not_given_back_twice(
    proxy: Embedded, upstream: Upstream
) -> None:
    """Another request has it by the time that the first client has got its response."""
    body = LARGE * 5
    await deploy(proxy, upstream)
    go_on = trio.Event()

    async def serve(peer: Peer) -> None:
        for answer in (body, b"second"):
            request = await peer.receive_request()
            assert request is not None
            upstream.record(request)
            if answer is not body:
                await go_on.wait()
            await peer.send(ok(answer))

    upstream.script(serve)
    async with (
        open_client(proxy.port, receive_buffer=65536) as slow,
        open_client(proxy.port) as quick,
    ):
        await slow.send(GET)
        while is_silent(slow):
            await wait_all_tasks_blocked()
        await quick.send(GET)
        await upstream.wait_requests(2)
        assert len(upstream.peers) == 1, "the connection was back in the pool"
        assert proxy.lines.requests == [], "the first client has not got all of it"

        assert digest((await slow.receive_response()).body) == digest(body)
        await proxy.lines.wait_requests(1)
        go_on.set()

        assert (await quick.receive_response()).body == b"second"
        assert (len(upstream.peers), len(upstream.requests)) == (1, 2)


STREAMED = {
    "events": b"Content-Type: text/event-stream\r\nContent-Length: 10\r\n",
    "events with a charset": b"content-type: Text/Event-Stream; charset=utf-8\r\n"
    b"Content-Length: 10\r\n",
    "asked": b"X-Accel-Buffering: No\r\nContent-Length: 10\r\n",
    "lines of JSON": b"Content-Type: application/x-ndjson\r\nContent-Length: 10\r\n",
    "grpc": b"Content-Type: application/grpc+proto\r\nContent-Length: 10\r\n",
    "frames": b"Content-Type: multipart/x-mixed-replace;boundary=x\r\nContent-Length: 10\r\n",
    "until close": b"Content-Type: text/html\r\n",
}


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("limit", [0, 5])
async def test_what_is_made_to_be_streamed_is_not_buffered(
    proxy: Embedded, upstream: Upstream, client: Client, name: str, limit: int
) -> None:
    await deploy(proxy, upstream, max_response_body_size=limit)
    arrived = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n" + STREAMED[name] + b"\r\nfirst")
        await arrived.wait()
        await peer.send(b"+last")

    upstream.script(serve)

    await client.send(GET)
    client.unread(await client.receive_until(b"first"))
    arrived.set()

    assert (await client.receive_response()).body == b"first+last"


@BODIES
@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_client_that_leaves_before_the_response_is_whole(
    proxy: Embedded, upstream: Upstream, body: bytes, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream, "GONE_GRACE", 0.05)
    await deploy(proxy, upstream)
    closed = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(RESPONSE % len(body) + body[:-1])
        await peer.wait_closed()
        closed.set()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(GET)
        await wait_buffered(proxy, len(body) - 1)
        getattr(client, leave)()
        await closed.wait()
    (line,) = await proxy.lines.wait_requests(1)

    assert (line["status"], line["reason"]) == (499, "client_gone")
    await proxy.wait_streams(0)
    assert taken(proxy) == (0, 0)


@BODIES
async def test_a_drain_deadline_before_the_response_is_whole(
    proxy: Embedded, upstream: Upstream, client: Client, body: bytes
) -> None:
    await deploy(proxy, upstream)
    upstream.script(held_response(body, trio.Event(), at=len(body) - 1))
    await client.send(GET)
    await wait_buffered(proxy, len(body) - 1)
    async with open_upstream() as new:
        result = await proxy.proxy.deploy(buffering(new, drain_timeout=0.05))
        response = await client.receive_response()

        assert (result, response.status) == (DrainResult(cancelled=1), 504)
        assert await client.receive_eof() == b""
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["reason"]) == (504, "drained")


# Room


@pytest.mark.parametrize("what", ["request", "response"])
async def test_a_full_quota_fails_one_request(
    upstream: Upstream, tmp_path: Path, what: str
) -> None:
    async with (
        open_embedded(spill_directory=tmp_path, max_spill=MEGABYTE) as proxy,
        open_client(proxy.port) as client,
        open_client(proxy.port) as holder,
    ):
        await deploy(proxy, upstream)
        fitting = LARGE[: MEGABYTE // 2]
        await holder.send(LENGTH % (len(fitting) + 1) + fitting)
        await wait_buffered(proxy, len(fitting))

        if what == "request":
            await client.send(LENGTH % len(LARGE) + LARGE)
        else:
            upstream.script(reply(ok(LARGE)))
            await client.send(GET)
        response = await client.receive_response()

        assert (response.status, response.reason) == (507, b"Insufficient Storage")
        (line,) = await proxy.lines.wait_requests(1)
        assert (line["status"], line["reason"]) == (507, "spill_full")
        (error,) = [line for line in proxy.lines.all if line["msg"] == "Body can't be buffered"]
        assert (error["level"], "quota of 1048576 bytes" in error["error"]) == ("ERROR", True)
        await holder.send(b"!")
        assert (await holder.receive_response()).status == 200, "others are not concerned"
        await wait_buffered(proxy, 0)
        await holder.send(LENGTH % len(fitting) + fitting)
        assert (await holder.receive_response()).status == 200
    assert open_files(tmp_path) == 0


@pytest.mark.parametrize("what", ["request", "response"])
async def test_a_directory_that_is_lost(upstream: Upstream, tmp_path: Path, what: str) -> None:
    directory = tmp_path / "spill"
    async with (
        open_embedded(spill_directory=directory) as proxy,
        open_client(proxy.port) as client,
        open_client(proxy.port) as another,
    ):
        await deploy(proxy, upstream)

        if what == "request":
            await client.send(LENGTH % len(LARGE) + LARGE)
        else:
            upstream.script(reply(ok(LARGE)))
            await client.send(GET)

        assert (await client.receive_response()).status == 500
        (line,) = await proxy.lines.wait_requests(1)
        assert (line["status"], line["reason"]) == (500, "spill_failed")
        (error,) = [line for line in proxy.lines.all if line["msg"] == "Body can't be buffered"]
        assert str(directory) in error["error"]
        await another.send(LENGTH % len(SMALL) + SMALL)
        assert (await another.receive_response()).status == 200, "what fits into memory goes on"
        directory.mkdir()
        await another.send(LENGTH % len(LARGE) + LARGE)
        assert (await another.receive_response()).status == 200


async def test_many_at_once_share_the_memory(upstream: Upstream, tmp_path: Path) -> None:
    """What finds no room in memory any more goes to disk, and comes back byte for byte."""
    bodies = [random.Random(seed).randbytes(200_000) for seed in range(10)]
    answers: dict[int, str] = {}
    async with open_embedded(spill_directory=tmp_path, max_buffer_memory=500_000) as proxy:
        await deploy(proxy, upstream, max_memory_buffer_size=MEGABYTE)

        async def echo(peer: Peer) -> None:
            request = await peer.receive_request()
            assert request is not None
            await peer.send(ok(request.body))

        async def visit(number: int) -> None:
            async with open_client(proxy.port) as client:
                await client.send(LENGTH % 200_000 + bodies[number][:-1])
                waiting.add(number)
                await all_here.wait()
                await client.send(bodies[number][-1:])
                answers[number] = digest((await client.receive_response()).body)

        waiting, all_here = set[int](), trio.Event()
        upstream.script(*[echo] * len(bodies))
        async with trio.open_nursery() as nursery:
            for number in range(len(bodies)):
                nursery.start_soon(visit, number)
            while len(waiting) < 10 or sum(taken(proxy)) < 10 * 199_999:
                await wait_all_tasks_blocked()
            memory, _ = taken(proxy)
            assert memory <= 500_000
            assert open_files(tmp_path) >= 7
            all_here.set()
        assert taken(proxy) == (0, 0)
    assert answers == {number: digest(body) for number, body in enumerate(bodies)}
