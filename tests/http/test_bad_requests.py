"""What clients can do wrong: a correct status or a closed connection, one log line, nothing leaked.

Every test ends by checking that an ordinary request still works and that no connection is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy import StopOptions
from tests.running import open_embedded
from tests.scripted import ConnectionCut, ok, open_client, open_upstream

if TYPE_CHECKING:
    from tests.running import Embedded
    from tests.scripted import Client, Peer, Upstream

HOST = b"Host: a.example\r\n"
KIB = 1024


async def require_sound(proxy: Embedded, logged: int) -> None:
    """Require that the proxy serves, logged so many requests, and holds no connection."""
    async with open_client(proxy.port) as client:
        assert (await client.get("/sound")).status == 200
    lines = await proxy.lines.wait_requests(logged + 1)
    await proxy.proxy.remove("web")
    await proxy.wait_streams(0)
    assert len(lines) == logged + 1
    assert lines[-1]["path"] == "/sound"
    assert not [line for line in proxy.lines.all if line["level"] == "ERROR"]


def get(line: bytes = b"GET / HTTP/1.1", headers: bytes = HOST) -> bytes:
    return line + b"\r\n" + headers + b"\r\n"


def post(headers: bytes, body: bytes = b"hello") -> bytes:
    return b"POST / HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body


CHUNKED = b"Transfer-Encoding: chunked\r\n"

REFUSED = {
    # Request line
    "no version": (get(b"GET /"), 400),
    "only a word": (get(b"GET"), 400),
    "three spaces": (get(b"GET  / HTTP/1.1"), 400),
    "space in target": (get(b"GET /a b HTTP/1.1"), 400),
    "trailing space": (get(b"GET / HTTP/1.1 "), 400),
    "leading space": (get(b" GET / HTTP/1.1"), 400),
    "tab between": (get(b"GET\t/\tHTTP/1.1"), 400),
    "empty method": (get(b" / HTTP/1.1"), 400),
    "method with a colon": (get(b"GE:T / HTTP/1.1"), 400),
    "method with braces": (get(b"{GET} / HTTP/1.1"), 400),
    "method beyond ASCII": (get(b"G\xc3\x89T / HTTP/1.1"), 400),
    "target with a tab": (get(b"GET /a\tb HTTP/1.1"), 400),
    "no target": (get(b"GET HTTP/1.1"), 400),
    "lower-case protocol": (get(b"GET / http/1.1"), 400),
    "other protocol": (get(b"GET / HTCPCP/1.0"), 400),
    "long version": (get(b"GET / HTTP/11.1"), 400),
    "short version": (get(b"GET / HTTP/1"), 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2 by version": (get(b"GET / HTTP/2.0"), 505),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/3 by version": (get(b"GET / HTTP/3.0"), 505),
    "HTTP/0.9 by version": (get(b"GET / HTTP/0.9"), 505),
    # Not HTTP at all
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)), 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    "binary zeros": (bytes(64), 400),
    # Lines
    "bare LF": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "one bare LF": (b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400),
    "bare CR": (b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", 400),
    "NUL in a value": (get(headers=HOST + b"X: a\0b\r\n"), 400),
    "NUL in a name": (get(headers=HOST + b"X\0: a\r\n"), 400),
    "control character": (get(headers=HOST + b"X: a\x08b\r\n"), 400),
    "DEL": (get(headers=HOST + b"X: a\x7fb\r\n"), 400),
    "escape in the target": (get(b"GET /\x1b HTTP/1.1"), 400),
    "obs-fold with a space": (get(headers=HOST + b"X: a\r\n b\r\n"), 400),
    "obs-fold with a tab": (get(headers=HOST + b"X: a\r\n\tb\r\n"), 400),
    "obs-fold in the first header": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    # Headers
    "space before the colon": (get(headers=HOST + b"X : a\r\n"), 400),
    "tab before the colon": (get(headers=HOST + b"X\t: a\r\n"), 400),
    "no colon": (get(headers=HOST + b"X\r\n"), 400),
    "empty name": (get(headers=HOST + b": a\r\n"), 400),
    "name with a space": (get(headers=HOST + b"X Y: a\r\n"), 400),
    "name beyond ASCII": (get(headers=HOST + b"X\xe9: a\r\n"), 400),
    "name with a slash": (get(headers=HOST + b"X/Y: a\r\n"), 400),
    # Host
    "no Host": (get(headers=b""), 400),
    "two Hosts": (get(headers=HOST + HOST), 400),
    "two different Hosts": (get(headers=HOST + b"Host: b.example\r\n"), 400),
    # Framing in the head: smuggling
    "two equal lengths": (post(b"Content-Length: 5\r\nContent-Length: 5\r\n"), 400),
    "two lengths": (post(b"Content-Length: 5\r\nContent-Length: 6\r\n"), 400),
    "two lengths in one": (post(b"Content-Length: 5, 6\r\n"), 400),
    "negative length": (post(b"Content-Length: -5\r\n"), 400),
    "length with a plus": (post(b"Content-Length: +5\r\n"), 400),
    "length in hex": (post(b"Content-Length: 0x5\r\n"), 400),
    "length with an underscore": (post(b"Content-Length: 1_0\r\n"), 400),
    "length with a point": (post(b"Content-Length: 5.0\r\n"), 400),
    "length of words": (post(b"Content-Length: five\r\n"), 400),
    "empty length": (post(b"Content-Length: \r\n"), 400),
    "length of other digits": (post("Content-Length: \u0665\r\n".encode()), 400),
    "length beyond all bounds": (post(b"Content-Length: " + b"9" * 5000 + b"\r\n"), 400),
    "length and chunked": (post(b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n"), 400),
    "chunked and length": (post(CHUNKED + b"Content-Length: 5\r\n", b"0\r\n\r\n"), 400),
    "chunked in HTTP/1.0": (
        b"POST / HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n0\r\n\r\n",
        400,
    ),
    "vertical tab in coding": (post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"), 400),
    # A coding the proxy doesn't have: 501 (RFC 9112 6.1)
    "chunked twice": (post(CHUNKED + CHUNKED, b"0\r\n\r\n"), 501),
    "chunked, chunked": (post(b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n"), 501),
    "empty coding": (post(b"Transfer-Encoding: \r\n", b"0\r\n\r\n"), 501),
    "quoted coding": (post(b'Transfer-Encoding: "chunked"\r\n', b"0\r\n\r\n"), 501),
    "gzip": (post(b"Transfer-Encoding: gzip\r\n", b""), 501),
    "gzip, chunked": (post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 501),
    "identity": (post(b"Transfer-Encoding: identity\r\n", b""), 501),
    # Size
    "one long header": (get(headers=HOST + b"X: " + b"a" * (70 * KIB) + b"\r\n"), 431),
    "many headers": (get(headers=HOST + b"X: abc\r\n" * (10 * KIB)), 431),
    "long target": (get(b"GET /" + b"a" * (70 * KIB) + b" HTTP/1.1"), 431),
    "endless request line": (b"GET /" + b"a" * (70 * KIB), 431),
    "endless header": (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * (70 * KIB), 431),
    "endless method": (b"A" * (70 * KIB), 431),
    "much more than the limit": (get(headers=HOST + b"X: " + b"a" * (1024 * KIB) + b"\r\n"), 431),
}


# The head is HTTP, so the connection stays in step, but it asks for what can't be.
IMPOSSIBLE = {
    "target without a slash": (get(b"GET foo HTTP/1.1"), 400),
    "target with half an escape": (get(b"GET /%4 HTTP/1.1"), 400),
    "target with a bad escape": (get(b"GET /%zz HTTP/1.1"), 400),
    "Host with a space": (get(headers=b"Host: a b\r\n"), 400),
    "Host with a path": (get(headers=b"Host: a/b\r\n"), 400),
    "Host with a user": (get(headers=b"Host: user@a\r\n"), 400),
    "Host with a comma port": (get(headers=b"Host: a:80,b\r\n"), 400),
    "Host with a word as port": (get(headers=b"Host: a:http\r\n"), 400),
    "Host with half a bracket": (get(headers=b"Host: [::1\r\n"), 400),
    "Host beyond ASCII": (get(headers=b"Host: \xc3\xa9\r\n"), 400),
    "Host with a question mark": (get(headers=b"Host: a?b\r\n"), 400),
    "CONNECT": (b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", 405),
    "CONNECT with a path": (get(b"CONNECT /x HTTP/1.1"), 405),
    "authority form": (get(b"GET a.example:80 HTTP/1.1"), 400),
    "GET *": (get(b"GET * HTTP/1.1"), 400),
    "absolute form of another scheme": (get(b"GET ftp://a.example/ HTTP/1.1"), 400),
    "absolute form without a host": (get(b"GET http:///x HTTP/1.1"), 400),
    "absolute form with a user": (get(b"GET http://user@a.example/ HTTP/1.1"), 400),
}


async def send_all(client: Client, data: bytes) -> None:
    """Send what the proxy takes; it may have answered and closed before it was all sent."""
    try:
        await client.send(data)
    except OSError:
        return


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_head(proxy: Embedded, upstream: Upstream, name: str) -> None:
    data, status = REFUSED[name]
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client:
        await send_all(client, data)
        response = await client.receive_response()

        assert response.status == status
        assert response.get(b"connection") == [b"close"]
        assert response.get(b"content-type") == [b"text/html; charset=utf-8"]
        assert response.body
        assert await client.receive_eof() == b""

    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["service"], line["target"]) == (status, "", "")
    assert line["client_addr"] == "127.0.0.1"
    assert upstream.peers == []  # nothing of it has reached a target
    await require_sound(proxy, logged=1)


@pytest.mark.parametrize("name", IMPOSSIBLE)
async def test_impossible_request(proxy: Embedded, upstream: Upstream, name: str) -> None:
    data, status = IMPOSSIBLE[name]
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client:
        await client.send(data)
        response = await client.receive_response()

        assert response.status == status
        assert response.get(b"content-type") == [b"text/html; charset=utf-8"]
        assert (await client.get()).status == 200

    lines = await proxy.lines.wait_requests(2)
    assert (lines[0]["status"], lines[0]["service"], lines[0]["target"]) == (status, "", "")
    assert lines[0]["method"] == data.split(b" ")[0].decode()
    assert len(upstream.requests) == 1
    await require_sound(proxy, logged=2)


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

BAD_BODIES = {
    "size of letters": b"xyz\r\nhello\r\n0\r\n\r\n",
    "empty size": b"\r\nhello\r\n0\r\n\r\n",
    "negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "plus size": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x size": b"0x5\r\nhello\r\n0\r\n\r\n",
    "space before the size": b" 5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
    "overflowing size": b"10000000000000000000005\r\nhello\r\n0\r\n\r\n",
    "size ends in LF": b"5\nhello\r\n0\r\n\r\n",
    "size ends in CR": b"5\rhello\r\n0\r\n\r\n",
    "data too long": b"5\r\nhello!\r\n0\r\n\r\n",
    "data without CRLF": b"5\r\nhello0\r\n\r\n",
    "data ends in LF": b"5\r\nhello\n0\r\n\r\n",
    "data ends in two others": b"5\r\nhelloXX0\r\n\r\n",
    "long extension": b"5;" + b"a" * (1024 * KIB) + b"\r\nhello\r\n0\r\n\r\n",
    "extension with LF": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "extension with CR": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "extension with NUL": b"5;a\0b\r\nhello\r\n0\r\n\r\n",
    "long trailers": b"0\r\nX: " + b"a" * (1024 * KIB) + b"\r\n\r\n",
    "trailer without a colon": b"0\r\nX\r\n\r\n",
    "trailer with a space before the colon": b"0\r\nX : a\r\n\r\n",
    "trailer with NUL": b"0\r\nX: a\0\r\n\r\n",
    "trailers end in LF": b"0\r\nX: a\n\n" + SMUGGLED,
    "trailer folded": b"0\r\nX: a\r\n b\r\n\r\n",
    "last chunk ends in LF": b"0\r\n\n" + SMUGGLED,
}


@pytest.mark.parametrize("split", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("name", BAD_BODIES)
async def test_malformed_chunks(
    proxy: Embedded, upstream: Upstream, name: str, split: bool
) -> None:
    await proxy.deploy(upstream.options())
    head = post(CHUNKED, b"")
    async with open_client(proxy.port) as client:
        if split:
            await client.send(head)
            peer = await upstream.wait_peers(1)
            await send_all(client, BAD_BODIES[name])
        else:
            await send_all(client, head + BAD_BODIES[name])
        response = await client.receive_response(b"POST")

        assert response.status == 400
        assert await client.receive_eof() == b""
    if split:
        await peer.wait_closed()

    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["method"], line["service"]) == (400, "POST", "web")
    assert upstream.requests == []
    await require_sound(proxy, logged=1)


# Padded: what counts is how much is read at a time, and the tests' own parser is slow.
TINY_CHUNK = b"1;" + b"x" * 120 + b"\r\nx\r\n"


async def test_many_small_chunks_with_extensions(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client:
        await client.send(post(CHUNKED, b"1;name=value\r\nx\r\n" * 5000 + b"0;last\r\n\r\n"))
        assert (await client.receive_response(b"POST")).status == 200
        assert (await client.get()).status == 200

    request = upstream.requests[0]
    assert request.body == b"x" * 5000
    await require_sound(proxy, logged=2)


ACCEPTED = {
    "lower-case method": (get(b"get / HTTP/1.1"), b"get / HTTP/1.1"),
    "unknown method": (get(b"M-SEARCH / HTTP/1.1"), b"M-SEARCH / HTTP/1.1"),
    "empty lines before": (b"\r\n\r\n" + get(), b"GET / HTTP/1.1"),
    "no space after the colon": (get(headers=b"Host:a.example\r\n"), b"GET / HTTP/1.1"),
    "empty Host": (get(headers=b"Host:\r\n"), b"GET / HTTP/1.1"),
    "IPv6 Host": (get(headers=b"Host: [::1]:80\r\n"), b"GET / HTTP/1.1"),
    "OPTIONS *": (get(b"OPTIONS * HTTP/1.1"), b"OPTIONS * HTTP/1.1"),
    "60 KiB of headers": (
        get(headers=HOST + b"X: " + b"a" * (60 * KIB) + b"\r\n"),
        b"GET / HTTP/1.1",
    ),
    "target in plain UTF-8": (
        get("GET /é?q=é HTTP/1.1".encode()),
        b"GET /%C3%A9?q=%C3%A9 HTTP/1.1",
    ),
    "target that is not even UTF-8": (get(b"GET /\xff HTTP/1.1"), b"GET /%FF HTTP/1.1"),
    "target with a fragment": (get(b"GET /a#b HTTP/1.1"), b"GET /a%23b HTTP/1.1"),
    "bytes beyond ASCII in a value": (get(headers=HOST + b"X: \xe9\r\n"), b"GET / HTTP/1.1"),
    "tab in a value": (get(headers=HOST + b"X: a\tb\r\n"), b"GET / HTTP/1.1"),
    "length zero": (post(b"Content-Length: 0\r\n", b""), b"POST / HTTP/1.1"),
    "length with leading zeros": (post(b"Content-Length: 0005\r\n"), b"POST / HTTP/1.1"),
    "equal lengths in one header": (post(b"Content-Length: 5, 5\r\n"), b"POST / HTTP/1.1"),
    "Chunked in capitals": (
        post(b"Transfer-Encoding: CHUNKED\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
        b"POST / HTTP/1.1",
    ),
    "GET with a body": (get(headers=HOST + b"Content-Length: 5\r\n") + b"hello", b"GET / HTTP/1.1"),
}


@pytest.mark.parametrize("name", ACCEPTED)
async def test_unusual_but_right(proxy: Embedded, upstream: Upstream, name: str) -> None:
    data, line = ACCEPTED[name]
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client:
        await client.send(data)
        assert (await client.receive_response()).status == 200

        assert upstream.requests[0].head.startswith(line + b"\r\n")
        assert (await client.get("/next")).status == 200
    first, second = upstream.requests
    assert first.body == (b"hello" if data.rstrip(b"0\r\n").endswith(b"hello") else b"")
    assert first.head.lower().count(b"\r\ncontent-length:") <= 1
    assert second.body == b""
    await require_sound(proxy, logged=2)


async def test_absolute_form_overrides_the_host(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options(hosts=["b.example"]))
    async with open_client(proxy.port) as client:
        response = await client.request(
            b"GET http://B.example:81/x?y HTTP/1.1\r\n" + HOST + b"\r\n"
        )
        bare = await client.request(b"GET http://b.example HTTP/1.1\r\n" + HOST + b"\r\n")
        query = await client.request(b"GET http://b.example?q HTTP/1.1\r\n" + HOST + b"\r\n")
        other = await client.request(b"GET http://c.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n")
        everything = await client.request(b"OPTIONS http://b.example HTTP/1.1\r\n" + HOST + b"\r\n")

    statuses = [r.status for r in (response, bare, query, other, everything)]
    assert statuses == [200, 200, 200, 404, 200]
    assert [request.target for request in upstream.requests] == [b"/x?y", b"/", b"/?q", b"*"]
    assert upstream.requests[0].get(b"host") == [b"B.example:81"]
    assert upstream.requests[0].get(b"x-forwarded-host") == [b"B.example:81"]
    assert proxy.lines.requests[0]["host"] == "B.example:81"


async def test_byte_at_a_time(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    data = post(CHUNKED + b"X-A: b\r\n", b"5;x\r\nhello\r\n0\r\nX-T: 1\r\n\r\n") + get(
        b"GET /2 HTTP/1.1"
    )
    async with open_client(proxy.port) as client:
        for index in range(len(data)):
            await client.send(data[index : index + 1])
            await trio.lowlevel.checkpoint()
        assert (await client.receive_response(b"POST")).status == 200
        assert (await client.receive_response()).status == 200

    assert [request.body for request in upstream.requests] == [b"hello", b""]
    assert upstream.requests[0].trailers == [(b"x-t", b"1")]
    await require_sound(proxy, logged=2)


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_client_vanishes_at_every_byte(
    proxy: Embedded, upstream: Upstream, leave: str
) -> None:
    await proxy.deploy(upstream.options())
    data = post(b"Content-Length: 5\r\n")
    for sent in range(len(data)):
        async with open_client(proxy.port) as client:
            if sent:
                await client.send(data[:sent])
                await proxy.wait_streams_at_least(1)
            getattr(client, leave)()
    lines = await proxy.lines.wait_requests(len(data) - 1)

    assert [line["status"] for line in lines] == [499] * len(lines)
    assert upstream.requests == []
    await require_sound(proxy, logged=len(data) - 1)


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_client_vanishes_at_every_byte_of_chunks(
    proxy: Embedded, upstream: Upstream, leave: str
) -> None:
    await proxy.deploy(upstream.options())
    head = post(CHUNKED, b"")
    body = b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"
    for sent in range(len(body)):
        async with open_client(proxy.port) as client:
            await client.send(head + body[:sent])
            await upstream.wait_peers(sent + 1)
            getattr(client, leave)()
        await proxy.lines.wait_requests(sent + 1)

    assert {line["status"] for line in proxy.lines.requests} == {499}
    assert upstream.requests == []
    await require_sound(proxy, logged=len(body))


async def test_slow_head(upstream: Upstream) -> None:
    async with open_embedded(head_timeout=0.3) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as client:
            await client.get()
            await client.send(b"GET / HTTP/1.1\r\nHo")
            response = await client.receive_response()

            assert response.status == 408
            assert await client.receive_eof() == b""
        lines = await proxy.lines.wait_requests(2)
        assert [line["status"] for line in lines] == [200, 408]
        await require_sound(proxy, logged=2)


async def test_a_trickling_head_gains_no_time(upstream: Upstream) -> None:
    async with open_embedded(head_timeout=0.3) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as client, trio.open_nursery() as nursery:

            async def trickle() -> None:
                await client.send(b"GET / HTTP/1.1\r\n")
                while True:
                    await client.send(b"X: y\r\n")
                    await trio.sleep(0.02)

            nursery.start_soon(trickle)
            response = await client.receive_response()
            nursery.cancel_scope.cancel()

        assert response.status == 408
        await require_sound(proxy, logged=1)


async def test_pipelined_requests_are_answered_in_order(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client:
        await client.send(
            get(b"GET /1 HTTP/1.1")
            + b"POST /2 HTTP/1.1\r\n"
            + HOST
            + b"Content-Length: 5\r\n\r\nhello"
            + b"HEAD /3 HTTP/1.1\r\n"
            + HOST
            + b"\r\n"
            + b"POST /4 HTTP/1.1\r\n"
            + HOST
            + CHUNKED
            + b"\r\n2\r\nhi\r\n0\r\n\r\n"
            + get(b"GET /5 HTTP/1.1")
            + get(b"BAD")
            + get(b"GET /never HTTP/1.1")
        )
        methods = [b"GET", b"POST", b"HEAD", b"POST", b"GET", b"GET"]
        responses = [await client.receive_response(method) for method in methods]
        assert [response.status for response in responses] == [200] * 5 + [400]
        assert await client.receive_eof() == b""

    assert [(r.target, r.body) for r in upstream.requests] == [
        (b"/1", b""), (b"/2", b"hello"), (b"/3", b""), (b"/4", b"hi"), (b"/5", b""),
    ]  # fmt: skip
    await require_sound(proxy, logged=6)


async def test_huge_pipelining(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    count = 2000
    async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send, get() * count)
        for _ in range(count):
            assert (await client.receive_response()).status == 200

    assert len(upstream.requests) == count
    await require_sound(proxy, logged=count)


async def test_pipelined_requests_do_not_keep_others_waiting(
    proxy: Embedded, upstream: Upstream
) -> None:
    """The proxy answers them itself, so nothing else makes it wait between them."""
    await proxy.deploy(upstream.options(hosts=["a.example"]))
    count = 2000
    async with open_client(proxy.port) as flood, open_client(proxy.port) as other:
        await other.get()
        await flood.send(b"HEAD /flood HTTP/1.1\r\nHost:\r\n\r\n" * count)
        await proxy.lines.wait_requests(2)
        await other.get("/other", host="nobody.example")
        lines = await proxy.lines.wait_requests(count + 2)
    assert lines[-1]["path"] == "/flood", "the other one was served last of all"
    await require_sound(proxy, logged=count + 2)


async def test_tiny_chunks_do_not_keep_others_waiting(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options(hosts=["a.example"]))
    arriving = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await peer.receive_some()
        arriving.set()
        await peer.receive_until(b"\r\n0\r\n\r\n")
        await peer.send(ok(b"hello"))

    upstream.script(serve)
    async with open_client(proxy.port) as flood, open_client(proxy.port) as other:
        await other.get(host="nobody.example")
        await flood.send(post(CHUNKED, b""))
        await upstream.wait_peers(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood.send, TINY_CHUNK * 12_000 + b"0\r\n\r\n")
            await arriving.wait()
            await other.get(host="nobody.example")
            assert flood.unacknowledged > 0, "the flood was taken in first"
        assert (await flood.receive_response(b"POST")).status == 200
    await require_sound(proxy, logged=3)


async def test_request_after_an_upload_that_was_refused_early(
    proxy: Embedded, upstream: Upstream
) -> None:
    """The body of a request without a service must not be read as the next request."""
    await proxy.deploy(upstream.options(hosts=["a.example"]))
    async with open_client(proxy.port) as client:
        await client.send(
            b"POST / HTTP/1.1\r\nHost: nobody.example\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
        )
        response = await client.receive_response(b"POST")
        await send_all(client, SMUGGLED)

        assert (response.status, response.get(b"connection")) == (404, [b"close"])
        assert await client.receive_eof() == b""
    assert upstream.requests == []
    await require_sound(proxy, logged=1)


@pytest.mark.parametrize("stopped", [False, True], ids=["404", "503"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_refused_request_that_was_here_whole_keeps_the_connection(
    proxy: Embedded, upstream: Upstream, framing: str, stopped: bool
) -> None:
    """What came of its body is of no use, but the requests behind it are."""
    status, host = (503, b"stopped.example") if stopped else (404, b"nobody.example")
    await proxy.deploy(upstream.options(hosts=["a.example"]))
    async with open_upstream() as other, open_client(proxy.port) as client:
        await proxy.deploy(other.options("other", hosts=["stopped.example"]))
        await proxy.proxy.stop_service("other", StopOptions())
        refused = b"POST / HTTP/1.1\r\nHost: " + host + b"\r\n"
        if framing == "length":
            refused += b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
        else:
            refused += CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)

        await client.send((refused + get()) * 2)
        for _ in range(2):
            response = await client.receive_response(b"POST")
            assert (response.status, response.get(b"connection")) == (status, [])
            assert (await client.receive_response()).status == 200

        assert [request.target for request in upstream.requests] == [b"/", b"/"]
        assert other.peers == []
        await proxy.proxy.remove("other")
    await require_sound(proxy, logged=4)


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_malformed_chunks_of_a_refused_request(
    proxy: Embedded, upstream: Upstream, name: str
) -> None:
    """Where it ends can't be known, so that nothing behind it may be served."""
    await proxy.deploy(upstream.options(hosts=["a.example"]))
    async with open_client(proxy.port) as client:
        head = b"POST / HTTP/1.1\r\nHost: nobody.example\r\n" + CHUNKED + b"\r\n"
        await send_all(client, head + BAD_BODIES[name] + get())
        response = await client.receive_response(b"POST")

        assert (response.status, response.get(b"connection")) == (404, [b"close"])
        assert await client.receive_eof() == b""
    assert upstream.peers == []
    await require_sound(proxy, logged=1)


async def test_error_page_arrives_though_the_client_is_still_sending(
    proxy: Embedded, upstream: Upstream
) -> None:
    """Closing with unread bytes would reset the connection and could lose the page."""
    await proxy.deploy(upstream.options(hosts=["a.example"]))
    body = bytes(2 * 1024 * KIB)
    async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
        nursery.start_soon(
            send_all,
            client,
            b"POST / HTTP/1.1\r\nHost: nobody.example\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body,
        )
        try:
            response = await client.receive_response(b"POST")
            end = await client.receive_eof()
        except ConnectionCut as cut:
            pytest.fail(f"the page was cut: {cut}")
        client.close()

    assert (response.status, end) == (404, b"")
    await require_sound(proxy, logged=1)
