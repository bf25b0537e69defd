"""Ordinary traffic through a whole proxy: what targets see, what clients get, byte by byte."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.running import open_embedded
from tests.scripted import ok, open_client, open_upstream, reply, respond

if TYPE_CHECKING:
    from tests.running import Embedded
    from tests.scripted import Client, Peer, Upstream

MEGABYTE = 1024 * 1024


async def test_what_the_target_sees(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(upstream.options())

    response = await client.request(
        b"POST /a%20b?q=%2f&x HTTP/1.1\r\nHost: App.example:8080\r\nAccept: */*\r\n"
        b"X-Two: 1\r\nX-Two: 2\r\nContent-Length: 3\r\n\r\nabc"
    )

    assert (response.status, response.reason, response.body) == (200, b"OK", b"hello")
    request = upstream.requests[0]
    head = request.head.decode().split("\r\n")
    assert head[0] == "POST /a%20b?q=%2f&x HTTP/1.1"
    fields = dict(line.split(": ", 1) for line in head[1:-2])
    request_id, start = fields.pop("X-Request-ID"), fields.pop("X-Request-Start")
    assert fields == {
        "Host": "App.example:8080",
        "Accept": "*/*",
        "X-Two": "2",
        "X-Forwarded-For": "127.0.0.1",
        "X-Forwarded-Host": "App.example:8080",
        "X-Forwarded-Proto": "http",
        "X-Kamal-Target": upstream.target,
        "Content-Length": "3",
    }
    assert request.get(b"x-two") == [b"1", b"2"]
    assert uuid.UUID(request_id).version == 4
    assert re.fullmatch(r"t=\d{13}", start)
    assert request.body == b"abc"


@pytest.mark.parametrize(
    ("method", "lengths"),
    [
        (b"POST", [b"0"]),
        (b"PUT", [b"0"]),
        (b"PATCH", [b"0"]),
        (b"GET", []),
        (b"DELETE", []),
        (b"OPTIONS", []),
    ],
)
async def test_requests_without_a_body(
    proxy: Embedded, upstream: Upstream, client: Client, method: bytes, lengths: list[bytes]
) -> None:
    """Some servers refuse a POST that states no length with 411."""
    await proxy.deploy(upstream.options())

    for _ in range(2):
        response = await client.request(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert response.body == b"hello"

    assert [request.get(b"content-length") for request in upstream.requests] == [lengths] * 2
    assert [request.get(b"transfer-encoding") for request in upstream.requests] == [[], []]


async def test_no_header_of_the_proxy_is_added_to_the_response(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(
            b"HTTP/1.1 200 Fine\r\nSet-Cookie: a=1\r\nX-Own: z\r\nSet-Cookie: b=2\r\n"
            b"Content-Length: 0\r\n\r\n"
        )

    upstream.script(serve)

    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

    assert await client.receive_until(b"\r\n\r\n") == (
        b"HTTP/1.1 200 Fine\r\nSet-Cookie: a=1\r\nX-Own: z\r\nSet-Cookie: b=2\r\n"
        b"Content-Length: 0\r\n\r\n"
    )


INCOMING = (
    "X-Forwarded-For: 10.0.0.9, 10.0.0.8\r\nX-Forwarded-Proto: https\r\n"
    "X-Forwarded-Host: first.example\r\nX-Request-ID: kept-1\r\nX-Request-Start: t=1\r\n"
    "X-Kamal-Target: before:1\r\nForwarded: for=1.2.3.4\r\n"
)


@pytest.mark.parametrize("forward", [True, False, None])
async def test_incoming_forwarded_headers(
    proxy: Embedded, upstream: Upstream, client: Client, forward: bool | None
) -> None:
    await proxy.deploy(upstream.options(forward_headers=forward))

    await client.get(headers=INCOMING)

    request = upstream.requests[0]
    believed = forward is not False
    target = upstream.target.encode()
    assert {
        name: request.get(name)
        for name in (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host")
    } == {
        b"x-forwarded-for": [b"10.0.0.9, 10.0.0.8, 127.0.0.1" if believed else b"127.0.0.1"],
        b"x-forwarded-proto": [b"https" if believed else b"http"],
        b"x-forwarded-host": [b"first.example" if believed else b"a.example"],
    }
    assert request.get(b"x-kamal-target") == [b"before:1, " + target if believed else target]
    assert request.get(b"x-request-id") == [b"kept-1"]
    assert request.get(b"x-request-start") == [b"t=1"]
    assert request.get(b"forwarded") == []


async def test_hop_by_hop_headers_of_requests_stay_behind(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    await client.get(
        headers="Connection: keep-alive, X-Private, Host\r\nX-Private: 1\r\nKeep-Alive: max=5\r\n"
        "Proxy-Authorization: Basic eA==\r\nProxy-Connection: close\r\nTE: trailers, deflate\r\n"
        "Upgrade: h2c\r\nX-Public: 2\r\n"
    )

    request = upstream.requests[0]
    names = {name for name, _ in request.headers}
    assert names.isdisjoint(
        {b"connection", b"x-private", b"keep-alive", b"proxy-authorization", b"proxy-connection"}
    )
    assert b"upgrade" not in names
    assert request.get(b"te") == [b"trailers"]
    assert request.get(b"host") == [b"a.example"]
    assert request.get(b"x-public") == [b"2"]


async def test_hop_by_hop_headers_of_responses_stay_behind(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(
            b"HTTP/1.1 200 OK\r\nConnection: X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n"
            b"Proxy-Authenticate: Basic\r\nX-Public: 2\r\nContent-Length: 2\r\n\r\nhi"
        )

    upstream.script(serve)

    response = await client.get()

    assert response.headers == [(b"x-public", b"2"), (b"content-length", b"2")]
    assert (await client.get()).status == 200  # the client's connection is none of the target's


async def test_a_target_that_closes_leaves_the_client_connection_open(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi")

    upstream.script(serve)

    assert (await client.get()).body == b"hi"
    assert (await client.get()).body == b"hello"
    assert len(upstream.peers) == 2


RAW_TARGETS = [
    "/",
    "//double//slash/",
    "/a/../b/./c",
    "/%41%2f%2F%00%ff",
    "/x?",
    "/x?a=b&a=c&&=",
    "/x?%zz%2&\"'<>[]{}|^`\\",
    "/x;p=1?y;z",
    "/+~!$&'()*,:@=",
]


@pytest.mark.parametrize("raw", RAW_TARGETS)
async def test_target_reaches_the_application_byte_for_byte(
    proxy: Embedded, upstream: Upstream, client: Client, raw: str
) -> None:
    await proxy.deploy(upstream.options())

    await client.get(raw)

    assert upstream.requests[0].target == raw.encode()


@pytest.mark.parametrize(
    ("prefix", "raw", "seen"),
    [
        ("/api", "/api", "/"),
        ("/api", "/api/", "/"),
        ("/api", "/api/x", "/x"),
        ("/api", "/api/api/x", "/api/x"),
        ("/api", "/api?q=/api", "/?q=/api"),
        ("/api", "/api/x%2fy%20z?a=%2F", "/x%2fy%20z?a=%2F"),
        ("/api", "/%61pi/%61pi", "/%61pi"),
        ("/api", "/a%70i?x", "/?x"),
        ("/api/v1", "/api/v1//x", "//x"),
        ("/api", "/apix", None),
        ("/api", "/ap", None),
        ("/api", "/API/x", None),
        ("/api", "/api%2fx", None),
        ("/api", "/", None),
    ],
)
async def test_prefix_is_stripped(
    proxy: Embedded, upstream: Upstream, client: Client, prefix: str, raw: str, seen: str | None
) -> None:
    await proxy.deploy(upstream.options(path_prefixes=[prefix]))

    response = await client.get(raw)

    assert [request.target.decode() for request in upstream.requests] == ([seen] if seen else [])
    assert response.status == (200 if seen else 404)


async def test_prefix_is_kept_when_asked(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options(path_prefixes=["/api"], strip_prefix=False))

    await client.get("/api/%78?y")

    assert upstream.requests[0].target == b"/api/%78?y"


async def test_upstream_connection_is_shared_by_clients(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options())

    for _ in range(3):
        async with open_client(proxy.port) as client:
            assert [(await client.get()).status for _ in range(3)] == [200] * 3

    assert len(upstream.requests) == 9
    assert len(upstream.peers) == 1


@pytest.mark.parametrize(
    ("method", "head"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\nETag: x\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (b"DELETE", b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ],
)
async def test_responses_without_a_body(
    proxy: Embedded, upstream: Upstream, client: Client, method: bytes, head: bytes
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(head)  # nothing follows, and nothing may be waited for
        await respond(b"hello")(peer)

    upstream.script(serve)

    response = await client.request(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")

    assert response.status == int(head.split()[1])
    assert response.body == b""
    lengths = re.findall(rb"Content-Length: (\d+)", head)
    assert response.get(b"content-length") == lengths
    assert (await client.get()).body == b"hello"  # the same connection is still in step
    assert [line["resp_content_length"] for line in await proxy.lines.wait_requests(2)] == [0, 5]


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        (b"HTTP/1.1 200", 200, b""),
        (b"HTTP/1.1 200 ", 200, b""),
        (b"HTTP/1.1 299 Very Fine Indeed", 299, b"Very Fine Indeed"),
        (b"HTTP/1.1 418 I'm a teapot", 418, b"I'm a teapot"),
        (b"HTTP/1.1 503 Own", 503, b"Own"),
        (b"HTTP/1.1 999 Odd", 999, b"Odd"),
        (b"HTTP/1.0 200 Old", 200, b"Old"),
    ],
)
async def test_status_of_the_target_passes_through(
    proxy: Embedded, upstream: Upstream, client: Client, line: bytes, status: int, reason: bytes
) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(reply(line + b"\r\nX-Own: 1\r\nContent-Length: 3\r\n\r\nown"))

    response = await client.get()

    assert (response.status, response.reason, response.body) == (status, reason, b"own")
    assert response.get(b"x-own") == [b"1"]
    (logged,) = await proxy.lines.wait_requests(1)
    assert logged["status"] == status


@pytest.mark.parametrize("data", [b"HTTP/1.1\r\nConnection: close", b"HTTP/1.0"])
async def test_client_that_wants_to_close(
    proxy: Embedded, upstream: Upstream, client: Client, data: bytes
) -> None:
    await proxy.deploy(upstream.options())

    response = await client.request(b"GET / " + data + b"\r\nHost: a\r\n\r\n")

    assert response.get(b"connection") == [b"close"]
    assert await client.receive_eof() == b""
    assert (b"connection", b"close") not in upstream.requests[0].headers
    async with open_client(proxy.port) as another:
        assert (await another.get()).status == 200
    assert len(upstream.peers) == 1  # the target's connection stays


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_close_delimited_response(
    proxy: Embedded, upstream: Upstream, client: Client, version: str
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/x\r\n\r\nfirst ")
        await peer.send(b"second")

    upstream.script(serve)

    response = await client.request(f"GET / HTTP/{version}\r\nHost: a\r\n\r\n".encode())

    assert response.body == b"first second"
    assert response.get(b"transfer-encoding") == ([b"chunked"] if version == "1.1" else [])
    if version == "1.1":
        assert (await client.get()).body == b"hello"
    else:
        assert await client.receive_eof() == b""


async def test_http_1_0_client_without_host(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    response = await client.request(b"GET /x HTTP/1.0\r\n\r\n")

    assert response.body == b"hello"
    assert await client.receive_eof() == b""
    assert upstream.requests[0].get(b"host") == [upstream.target.encode()]
    assert upstream.requests[0].head.startswith(b"GET /x HTTP/1.1\r\n")


async def test_chunked_response_streams_with_trailers(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    first_arrived = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await first_arrived.wait()
        await peer.send(b"3;ext=1\r\ntwo\r\n0\r\nX-Sum: 6\r\nContent-Length: 9\r\n\r\n")

    upstream.script(serve)

    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    begun = await client.receive_until(b"one\r\n")
    first_arrived.set()
    client.unread(begun)
    response = await client.receive_response()

    assert response.body == b"onetwo"
    assert response.trailers == [(b"x-sum", b"6")]


async def test_chunked_request_streams_with_trailers(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    await client.send(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        b"3\r\none\r\n"
    )
    peer = await upstream.wait_peers(1)
    while b"one" not in peer.received:
        await wait_all_tasks_blocked()
    await client.send(b"3\r\ntwo\r\n0\r\nX-Sum: 6\r\nHost: evil\r\nX-Forwarded-For: evil\r\n\r\n")
    response = await client.receive_response()

    assert response.status == 200
    assert upstream.requests[0].body == b"onetwo"
    assert upstream.requests[0].trailers == [(b"x-sum", b"6")]
    assert (await client.get()).status == 200


async def test_informational_responses_are_relayed(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(
            b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
        )

    upstream.script(serve, serve)

    response = await client.get()
    old = await client.request(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")

    assert (response.informational, response.body) == ([102, 103], b"hi")
    assert b"Link: </a>" in client.received
    assert (old.informational, old.body) == ([], b"hi")


async def test_hop_by_hop_headers_of_informational_responses_stay_behind(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(
        reply(
            b"HTTP/1.1 103 Early Hints\r\nConnection: close, X-Private\r\nX-Private: 1\r\n"
            b"Keep-Alive: timeout=1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n"
            b"Upgrade: h2c\r\nLink: </a>\r\n\r\n" + ok(b"hi")
        )
    )

    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

    hints = await client.receive_until(b"\r\n\r\n")
    assert hints == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    assert (await client.receive_response()).body == b"hi"
    assert (await client.get()).body == b"hello"


async def test_expect_continue_is_relayed(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        head = await peer.receive_until(b"\r\n\r\n")
        assert b"100-continue" in head
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await peer.receive_exactly(4) == b"body"
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    upstream.script(serve)

    await client.send(
        b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    )
    assert await client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(b"body")

    assert (await client.receive_response()).body == b"hi"


async def test_expect_continue_refused_by_the_target(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno")
        await peer.wait_closed()

    upstream.script(serve)

    await client.send(
        b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    )
    response = await client.receive_response()

    assert (response.status, response.body) == (417, b"no")
    assert await client.receive_eof() == b""  # whether the body still comes can't be known


async def echo(peer: Peer) -> None:
    """Send back a 10 MiB body while it is arriving."""
    await peer.receive_until(b"\r\n\r\n")
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (10 * MEGABYTE))
    left = 10 * MEGABYTE
    while left:
        data = await peer.receive_some()
        left -= len(data)
        await peer.send(data)


async def test_ten_megabytes_both_ways_at_once(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(echo)
    body = bytes(range(256)) * (10 * 4096)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            client.send,
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        )
        response = await client.receive_response()

    assert response.body == body
    # It began before the request was whole, and could not know that the rest would be read.
    assert response.get(b"connection") == [b"close"]
    assert await client.receive_eof() == b""
    line = (await proxy.lines.wait_requests(1))[0]
    assert (line["req_content_length"], line["resp_content_length"]) == (len(body), len(body))


async def test_slow_reader_stops_the_target(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    sent = 0
    total = 64 * MEGABYTE

    async def serve(peer: Peer) -> None:
        nonlocal sent
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            sent += await peer.sock.send(bytes(min(65536, total - sent)))

    upstream.script(serve)
    async with open_client(proxy.port, receive_buffer=65536) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.receive_until(b"\r\n\r\n")
        await wait_all_tasks_blocked(0.3)
        held_back = sent

        assert held_back < 16 * MEGABYTE  # what the kernel keeps on two connections, at most
        left = total
        while left:
            left -= len(await client.receive_some())
    assert sent == total


async def test_slow_target_stops_the_client(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    go_on = trio.Event()
    sent = 0
    total = 64 * MEGABYTE

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await go_on.wait()
        left = total
        while left:
            left -= len(await peer.receive_some())
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    async def upload(client: Client) -> None:
        nonlocal sent
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            sent += await client.sock.send(bytes(min(65536, total - sent)))

    upstream.script(serve)
    async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
        nursery.start_soon(upload, client)
        await upstream.wait_peers(1)
        await wait_all_tasks_blocked(0.3)
        held_back = sent

        assert held_back < 24 * MEGABYTE
        go_on.set()
        response = await client.receive_response()
    assert response.body == b"hi"


async def test_a_client_that_stops_reading_is_given_up(upstream: Upstream) -> None:
    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await peer.send(bytes(65536))

    async with open_embedded(stall_timeout=0.3) as proxy:
        await proxy.deploy(upstream.options())
        upstream.script(serve)
        async with open_client(proxy.port, receive_buffer=65536) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            (line,) = await proxy.lines.wait_requests(1)

            assert line["status"] == 499
            await proxy.wait_streams(0)


async def test_a_client_that_stops_sending_is_given_up(upstream: Upstream) -> None:
    async with open_embedded(stall_timeout=0.3) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
            response = await client.receive_response()

            assert response.status == 408
            assert await client.receive_eof() == b""
        (line,) = await proxy.lines.wait_requests(1)
        assert (line["status"], line["service"]) == (408, "web")


async def test_idle_connections_are_closed_silently(upstream: Upstream) -> None:
    async with open_embedded(idle_timeout=0.2, head_timeout=0.3) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as fresh, open_client(proxy.port) as used:
            await used.get()
            assert await used.receive_eof() == b""
            assert await fresh.receive_eof() == b""
        assert len(proxy.lines.requests) == 1


async def test_half_closed_client_still_gets_its_answer(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    closed = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await closed.wait()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    upstream.script(serve)

    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await upstream.wait_peers(1)
    client.shutdown_write()
    await wait_all_tasks_blocked(0.05)  # the proxy has seen the end of the stream
    closed.set()

    assert (await client.receive_response()).body == b"hi"


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_client_that_leaves_while_waiting(
    proxy: Embedded, upstream: Upstream, leave: str
) -> None:
    await proxy.deploy(upstream.options())
    released = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.wait_closed()
        released.set()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(b"GET /gone HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_peers(1)
        getattr(client, leave)()

        await released.wait()
    (line,) = await proxy.lines.wait_requests(1)

    assert (line["status"], line["path"], line["target"]) == (499, "/gone", upstream.target)
    await proxy.wait_streams(0)


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_client_that_leaves_after_a_late_body(
    proxy: Embedded, upstream: Upstream, leave: str
) -> None:
    """The proxy was relaying the body when it began to wait for the response."""
    await proxy.deploy(upstream.options())
    received, released = trio.Event(), trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        received.set()
        await peer.wait_closed()
        released.set()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(b"POST /gone HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel")
        peer = await upstream.wait_peers(1)
        while not peer.received.endswith(b"hel"):
            await wait_all_tasks_blocked()
        await client.send(b"lo")
        await received.wait()
        getattr(client, leave)()

        await released.wait()
    (line,) = await proxy.lines.wait_requests(1)

    assert line["status"] == 499
    await proxy.wait_streams(0)


async def test_client_that_leaves_during_its_upload(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    released = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        released.set()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(b"POST /gone HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel")
        await upstream.wait_peers(1)
        client.close()
        await released.wait()
    (line,) = await proxy.lines.wait_requests(1)

    assert line["status"] == 499
    await proxy.wait_streams(0)


async def test_client_that_leaves_in_the_middle_of_a_response(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options())
    released = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nabc")
        await peer.wait_closed()
        released.set()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.receive_until(b"abc")
        client.reset()
        await released.wait()
    (line,) = await proxy.lines.wait_requests(1)

    assert line["status"] == 499
    await proxy.wait_streams(0)


async def test_two_proxies_in_one_process_do_not_meet() -> None:
    async with (
        open_upstream() as one,
        open_upstream() as two,
        open_embedded() as first,
        open_embedded() as second,
        open_client(first.port) as to_first,
        open_client(second.port) as to_second,
    ):
        await first.deploy(one.options("app"))
        assert (await to_second.get()).status == 404
        await second.deploy(two.options("app"))
        await to_first.get("/1")
        await to_second.get("/2")
        await first.proxy.remove("app")

        assert (await to_first.get()).status == 404
        assert (await to_second.get()).status == 200
        assert [request.target for request in one.requests] == [b"/1"]
        assert [line["path"] for line in first.lines.requests] == ["/1", "/"]
