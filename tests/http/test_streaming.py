"""What no kind of buffering may change: statuses, streams, trailers, 1xx, the bytes."""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.running import open_embedded
from tests.scripted import Peer, ok, open_client, reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.running import Embedded
    from tests.scripted import Script, Upstream

MEGABYTE = 1024 * 1024
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
MODES: dict[str, dict[str, Any]] = {
    "streamed": {},
    "requests": {"buffer_requests": True},
    "responses": {"buffer_responses": True},
    "both": {"buffer_requests": True, "buffer_responses": True},
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the options of one mode."""
    return MODES[request.param]


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Embedded]:
    """Run a proxy whose buffered bodies go to disk early."""
    async with open_embedded(spill_directory=tmp_path) as embedded:
        yield embedded


async def deploy(proxy: Embedded, upstream: Upstream, mode: dict[str, Any]) -> None:
    await proxy.deploy(upstream.options(max_memory_buffer_size=64 * 1024, **mode))


def chunked(body: bytes, size: int = 10_000) -> bytes:
    """Return a body in chunks, without the last one."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


# Every status

STATUSES = [
    b"200 OK",
    b"201 Created",
    b"202 Accepted",
    b"204 No Content",
    b"205 Reset Content",
    b"206 Partial Content",
    b"299 Very Fine Indeed",
    b"301 Moved Permanently",
    b"302 Found",
    b"303 See Other",
    b"304 Not Modified",
    b"307 Temporary Redirect",
    b"308 Permanent Redirect",
    b"400 Bad Request",
    b"401 Unauthorized",
    b"403 Forbidden",
    b"404 Not Found",
    b"413 Own Limit",
    b"416 Range Not Satisfiable",
    b"418 I'm a teapot",
    b"429 Too Many Requests",
    b"431 Request Header Fields Too Large",
    b"499 Own",
    b"500 Internal Server Error",
    b"502 Bad Gateway",
    b"503 Service Unavailable",
    b"504 Gateway Timeout",
    b"507 Insufficient Storage",
    b"599 ",
    b"999 Odd",
]
FRAMINGS = ["length", "large", "chunked", "close"]
OWN = [
    (b"X-One", b"1"),
    (b"Location", b"/elsewhere?a=%2f"),
    (b"Content-Range", b"bytes 0-3/9"),
    (b"Content-Type", b"text/x; charset=odd"),
    (b"Set-Cookie", b"a=1; Path=/"),
    (b"Set-Cookie", b"b=2"),
    (b"Retry-After", b"7"),
    (b"WWW-Authenticate", b'Basic realm="x"'),
    (b"ETag", b'W/"e"'),
]
LONG = b"large " * 20_000  # more than is read at once


def without_body(method: bytes, status: int) -> bool:
    return method == b"HEAD" or status in (204, 304)


async def answer_as_asked(peer: Peer) -> None:
    """Answer ``/<framing>/<status and reason>`` with that, on one connection after another."""
    while (request := await peer.receive_request()) is not None:
        _, framing, number = request.target.decode().split("/")
        line = STATUSES[int(number)]
        status = int(line[:3])
        body = LONG if framing == "large" else b"body"
        head = b"HTTP/1.1 %b\r\n" % line + b"".join(b"%b: %b\r\n" % pair for pair in OWN)
        if framing == "chunked" and status != 204:
            head += b"Transfer-Encoding: chunked\r\n"
            body = chunked(body, 3) + b"0\r\n\r\n"
        elif framing != "close" and status != 204:
            head += b"Content-Length: %d\r\n" % len(body)
        if framing == "large":
            await peer.send(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n")
        head += b"\r\n"
        await peer.send(head if without_body(request.method, status) else head + body)
        if framing == "close":
            return


@pytest.mark.parametrize("method", [b"HEAD", b"GET", b"POST"])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_every_status(
    proxy: Embedded, upstream: Upstream, method: bytes, framing: str, mode: dict[str, Any]
) -> None:
    """On one connection: what were left of a response would be taken for the next one."""
    await deploy(proxy, upstream, mode)
    upstream.script(*[answer_as_asked] * 2 * len(STATUSES))
    data = b"Content-Length: 3\r\n\r\nabc" if method == b"POST" else b"\r\n"
    sent = [(name.lower(), value) for name, value in OWN]
    async with open_client(proxy.port) as client:
        for number, line in enumerate(STATUSES):
            status, reason = int(line[:3]), line[4:]
            path = f"/{framing}/{number}".encode()

            response = await client.request(
                method + b" " + path + b" HTTP/1.1\r\nHost: a\r\n" + data
            )

            whole = LONG if framing == "large" else b"body"
            body = b"" if without_body(method, status) else whole
            assert (response.status, response.reason, response.body) == (status, reason, body)
            own = {b"content-length", b"transfer-encoding"}
            assert [pair for pair in response.headers if pair[0] not in own] == sent, line
            counted = framing not in ("chunked", "close") and status != 204
            length = [b"%d" % len(whole)] if counted else []
            assert response.get(b"content-length") == length, line
            assert response.informational == ([102, 103] if framing == "large" else [])
    lines = await proxy.lines.wait_requests(len(STATUSES))
    assert [line["status"] for line in lines] == [int(line[:3]) for line in STATUSES]
    assert {line["msg"] for line in proxy.lines.all}.isdisjoint({"Error while proxying"})


# Streams

STREAMS = {
    "events": b"Content-Type: text/event-stream\r\n\r\n",
    "events in chunks": b"Content-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "events with a length": b"Content-Type: text/event-stream;charset=utf-8\r\n"
    b"Content-Length: 1200\r\n\r\n",
    "chunked": b"Content-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n",
    "until close": b"Content-Type: text/html\r\n\r\n",
    "asked for": b"X-Accel-Buffering: no\r\nContent-Length: 1200\r\n\r\n",
}
COUNT = 50
EVENT = b"data: %07d, of many\n\n"  # 24 bytes


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_each_part_arrives_before_the_next_is_sent(
    proxy: Embedded, upstream: Upstream, name: str, version: bytes, mode: dict[str, Any]
) -> None:
    await deploy(proxy, upstream, mode)
    head = STREAMS[name]
    got = [trio.Event() for _ in range(COUNT)]

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n" + head)
        for number in range(COUNT):
            event = EVENT % number
            await peer.send(chunked(event) if b"chunked" in head else event)
            await got[number].wait()
        if b"chunked" in head:
            await peer.send(b"0\r\n\r\n")

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(GET.replace(b"1.1", version))
        start = await client.receive_until(b"\r\n\r\n")
        received = b""
        for number in range(COUNT):
            received += await client.receive_until(EVENT % number)
            got[number].set()
        client.unread(start + received)
        response = await client.receive_response()

    assert response.status == 200
    assert response.body == b"".join(EVENT % number for number in range(COUNT))


async def test_a_request_streams_part_by_part(proxy: Embedded, upstream: Upstream) -> None:
    """Also where responses are buffered."""
    await deploy(proxy, upstream, {"buffer_responses": True})
    got = [trio.Event() for _ in range(COUNT)]

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        for number in range(COUNT):
            await peer.receive_until(EVENT % number)
            got[number].set()
        await peer.receive_until(b"0\r\n\r\n")
        await peer.send(ok(b"done"))

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(COUNT):
            await client.send(chunked(EVENT % number))
            await got[number].wait()
        await client.send(b"0\r\n\r\n")

        assert (await client.receive_response()).body == b"done"


async def test_first_byte(
    proxy: Embedded,
    upstream: Upstream,
    mode: dict[str, Any],
    record_property: Callable[[str, object], None],
) -> None:
    """Measured, for whoever reads the report; no time is required of a busy machine."""
    await deploy(proxy, upstream, mode)
    sent = [0.0]

    async def serve(peer: Peer) -> None:
        while await peer.receive_request() is not None:
            sent.append(time.perf_counter())
            await peer.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENT % 1)
            )
            await peer.send(b"0\r\n\r\n")

    upstream.script(serve)
    times = []
    async with open_client(proxy.port) as client:
        for _ in range(COUNT):
            await client.send(GET)
            begun = await client.receive_some()
            times.append(time.perf_counter() - sent[-1])
            client.unread(begun)
            assert (await client.receive_response()).body == EVENT % 1

    assert len(sent) == COUNT + 1, "one connection has carried them all"
    record_property("first_byte_median_ms", round(1000 * statistics.median(times), 3))
    record_property("first_byte_worst_ms", round(1000 * max(times), 3))


async def test_trailers_both_ways(
    proxy: Embedded, upstream: Upstream, mode: dict[str, Any]
) -> None:
    await deploy(proxy, upstream, mode)

    async def serve(peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            upstream.record(request)
            await peer.send(
                b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n"
                + chunked(request.body[::-1])
                + b"0\r\nX-Sum: 6\r\nX-Sum: 7\r\nContent-Length: 9\r\n\r\n"
            )

    upstream.script(serve)
    body = b"there and back" * 10_000
    async with open_client(proxy.port) as client:
        for _ in range(2):
            await client.send(
                b"POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n"
                + chunked(body)
                + b"0\r\nX-Check: 1\r\nX-Check: 2\r\nAuthorization: evil\r\n\r\n"
            )
            response = await client.receive_response()

            assert response.body == body[::-1]
            assert response.trailers == [(b"x-sum", b"6"), (b"x-sum", b"7")]
            request = upstream.requests[-1]
            assert request.body == body
            assert request.trailers == [(b"x-check", b"1"), (b"x-check", b"2")]
            assert request.get(b"te") == [b"trailers"]


async def test_early_hints_are_early(
    proxy: Embedded, upstream: Upstream, mode: dict[str, Any]
) -> None:
    await deploy(proxy, upstream, mode)
    arrived = trio.Event()
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nLink: </b>\r\n\r\n"

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(hints)
        await arrived.wait()
        await peer.send(ok(b"late"))

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody")
        assert await client.receive_until(b"\r\n\r\n") == hints
        arrived.set()

        assert (await client.receive_response()).body == b"late"


# Bytes

LARGE = random.Random(3).randbytes(4 * MEGABYTE + 1)


def echo(down: str) -> Script:
    """Return a script that answers with the request's body, framed in one way or another."""

    async def serve(peer: Peer) -> None:
        request = await peer.receive_request()
        assert request is not None
        body = request.body
        if down == "length":
            await peer.send(ok(body))
        elif down == "chunked":
            await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await peer.send(chunked(body, 77_777) + b"0\r\n\r\n")
        else:
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)

    return serve


@pytest.mark.parametrize("up", ["length", "chunked"])
@pytest.mark.parametrize("down", ["length", "chunked", "close"])
async def test_large_bodies_are_the_same_bytes(
    proxy: Embedded, upstream: Upstream, up: str, down: str, mode: dict[str, Any]
) -> None:
    await deploy(proxy, upstream, mode)
    upstream.script(echo(down))
    data = b"POST / HTTP/1.1\r\nHost: a\r\n"
    if up == "length":
        data += b"Content-Length: %d\r\n\r\n" % len(LARGE) + LARGE
    else:
        data += b"Transfer-Encoding: chunked\r\n\r\n" + chunked(LARGE, 33_333) + b"0\r\n\r\n"
    async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send, data)
        response = await client.receive_response()

        assert response.status == 200
        assert hashlib.sha256(response.body).digest() == hashlib.sha256(LARGE).digest()
        assert (await client.get()).body == b"hello"
    line = (await proxy.lines.wait_requests(2))[0]
    assert line["resp_content_length"] == len(LARGE)


COMPLETE = {
    "length": ok(b"x" * 60_000),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b"x" * 60_000)
    + b"0\r\n\r\n",
    "small": ok(b"x"),
}


@pytest.mark.parametrize("name", COMPLETE)
async def test_a_complete_response_before_a_reset_arrives_whole(
    proxy: Embedded, upstream: Upstream, name: str, mode: dict[str, Any]
) -> None:
    await deploy(proxy, upstream, mode)
    upstream.script(*[reply(COMPLETE[name], then=Peer.reset)] * 10)
    async with open_client(proxy.port) as client:
        for number in range(10):
            head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
            response = await client.request(head if number % 2 else GET)
            assert (response.status, response.reason) == (200, b"OK")
            assert response.body == b"x" * (1 if name == "small" else 60_000)
    assert {line["status"] for line in await proxy.lines.wait_requests(10)} == {200}
