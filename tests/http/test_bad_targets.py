"""What targets can do wrong: clients get a correct status, a whole response, or a cut connection.

Every test ends by checking that an ordinary request still works and that no connection is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.running import open_embedded
from tests.scripted import (
    ConnectionCut,
    Peer,
    deploy_options,
    ok,
    open_client,
    open_upstream,
    reply,
    respond,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy import Event
    from tests.running import Embedded
    from tests.scripted import Client, Script, Upstream

MEGABYTE = 1024 * 1024
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"


async def require_sound(proxy: Embedded, logged: int) -> None:
    """Require that the proxy serves, logged so many requests, and holds no connection."""
    async with open_client(proxy.port) as client:
        assert (await client.get("/sound")).body == b"hello"
    lines = await proxy.lines.wait_requests(logged + 1)
    await proxy.proxy.remove("web")
    await proxy.wait_streams(0)
    assert len(lines) == logged + 1
    assert lines[-1]["path"] == "/sound"
    assert not [line for line in proxy.lines.all if line["msg"] == "Connection failed"]


BROKEN = {
    "closes without a word": b"",
    "half a status line": b"HTTP/1.1 20",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Len",
    "head without its end": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "text": b"Hello Ruby\n\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 What\r\n\r\n",
    "name with a space": b"HTTP/1.1 200 OK\r\nA B: c\r\nContent-Length: 0\r\n\r\n",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nA: b\0c\r\nContent-Length: 0\r\n\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nhello",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
    "101 nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "100 and then nothing": b"HTTP/1.1 100 Continue\r\n\r\n",
    "1xx without end": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 101 + ok(b"hello"),
    "huge head": b"HTTP/1.1 200 OK\r\nX: " + b"a" * MEGABYTE + b"\r\nContent-Length: 0\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\nX: " + b"a" * MEGABYTE,
}


@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["close", "reset"])
@pytest.mark.parametrize("name", BROKEN)
async def test_no_usable_response(
    proxy: Embedded, upstream: Upstream, name: str, end: Callable[[Peer], None]
) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(reply(BROKEN[name], then=end))
    async with open_client(proxy.port) as client:
        response = await client.get()

        assert response.status == 502
        assert b"502" in response.body
        assert response.get(b"content-type") == [b"text/html; charset=utf-8"]
        assert (await client.get()).body == b"hello"
    lines = await proxy.lines.wait_requests(2)
    assert (lines[0]["status"], lines[0]["target"]) == (502, upstream.target)
    errors = [line for line in proxy.lines.all if line["level"] == "ERROR"]
    assert [(line["msg"], line["target"]) for line in errors] == [
        ("Error while proxying", upstream.target)
    ]
    assert errors[0]["error"]
    await require_sound(proxy, logged=2)


async def test_as_many_1xx_as_are_relayed(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(reply(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100 + ok(b"hello")))
    async with open_client(proxy.port) as client:
        response = await client.get()
        assert (response.status, response.informational) == (200, [103] * 100)
    await require_sound(proxy, logged=1)


CUT = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\npart",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\npart",
    "between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
    "before the last line": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n0\r\n"
    ),
}


@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["close", "reset"])
@pytest.mark.parametrize("name", CUT)
async def test_response_that_is_cut_is_cut_for_the_client(
    proxy: Embedded, upstream: Upstream, name: str, end: Callable[[Peer], None]
) -> None:
    await proxy.deploy(upstream.options())
    arrived = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(CUT[name])
        await arrived.wait()
        end(peer)

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(GET)
        client.unread(await client.receive_until(b"part"))
        arrived.set()
        with pytest.raises(ConnectionCut) as cut:
            await client.receive_response()
        assert cut.value.status == 200
    (line,) = await proxy.lines.wait_requests(1)
    assert line["target"] == upstream.target
    await proxy.lines.wait_for_message("Error while proxying")
    await require_sound(proxy, logged=1)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
async def test_malformed_chunk(proxy: Embedded, upstream: Upstream, apart: bool) -> None:
    """What came before it is relayed, or nothing was and the client hears of it; never silence."""
    await proxy.deploy(upstream.options())
    arrived = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"
        if apart:
            await peer.send(start)
            await arrived.wait()
            start = b""
        await peer.send(start + b"xyz\r\n")
        await peer.wait_closed()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(GET)
        if apart:
            client.unread(await client.receive_until(b"part"))
            arrived.set()
        try:
            status = (await client.receive_response()).status
            assert status == 502
        except ConnectionCut as cut:
            status = cut.status
            assert status == 200
    (line,) = await proxy.lines.wait_requests(1)
    assert line["status"] == status
    await proxy.lines.wait_for_message("Error while proxying")
    await require_sound(proxy, logged=1)


async def test_tiny_chunks_do_not_keep_others_waiting(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options(hosts=["a", "a.example"]))

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        # Padded: what counts is how much is read at a time.
        chunk = b"1;" + b"x" * 120 + b"\r\nx\r\n"
        await peer.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 12_000 + b"0\r\n\r\n"
        )
        await respond(b"hello")(peer)

    upstream.script(serve)
    async with open_client(proxy.port) as client, open_client(proxy.port) as other:
        assert (await other.get(host="nobody")).status == 404
        await client.send(GET)
        begun = await client.receive_some()
        assert (await other.get(host="nobody")).status == 404
        assert upstream.peers[0].unacknowledged > 0, "the flood was taken in first"
        client.unread(begun)
        response = await client.receive_response()
        assert response.body == b"x" * 12_000
    await require_sound(proxy, logged=3)


async def test_close_delimited_response_that_is_reset_is_cut(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options())
    arrived = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\npart")
        await arrived.wait()
        peer.reset()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        await client.send(GET)
        client.unread(await client.receive_until(b"part"))
        arrived.set()
        with pytest.raises(ConnectionCut):
            await client.receive_response()
    await require_sound(proxy, logged=1)


COMPLETE = {
    "length": ok(b"x" * 100_000),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n186A0\r\n"
    + b"x" * 100_000
    + b"\r\n0\r\n\r\n",
    "empty": ok(b""),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.mark.parametrize("request_data", [GET, POST], ids=["GET", "POST"])
@pytest.mark.parametrize("name", COMPLETE)
async def test_complete_response_followed_by_a_reset_arrives_whole(
    proxy: Embedded, upstream: Upstream, name: str, request_data: bytes
) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(*[reply(COMPLETE[name], then=Peer.reset)] * 20)
    async with open_client(proxy.port) as client:
        for _ in range(20):
            response = await client.request(request_data)
            assert response.status in (200, 204)
            assert len(response.body) == (100_000 if name in ("length", "chunked") else 0)
    await require_sound(proxy, logged=20)


async def upload(client: Client, size: int) -> None:
    """Send a request with a body as long as the proxy takes it."""
    try:
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(0, size, 65536):
            await client.send(bytes(65536))
    except OSError:
        return


@pytest.mark.parametrize("end", [Peer.close, Peer.reset, Peer.wait_closed])
@pytest.mark.parametrize("read", [0, 100_000])
async def test_early_answer_to_a_large_upload(
    proxy: Embedded, upstream: Upstream, end: Callable[[Peer], object], read: int
) -> None:
    """Closing with unread data resets the connection; the answer must arrive all the same."""
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await peer.receive_exactly(read)
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\n\r\ntoo much")
        if end is Peer.wait_closed:
            await peer.wait_closed()
        else:
            end(peer)

    upstream.script(serve)
    async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
        nursery.start_soon(upload, client, 16 * MEGABYTE)
        response = await client.receive_response(b"POST")

        assert (response.status, response.body) == (413, b"too much")
        nursery.cancel_scope.cancel()
    (line,) = await proxy.lines.wait_requests(1)
    assert line["status"] == 413
    await require_sound(proxy, logged=1)


async def test_answer_before_the_request_is_read(proxy: Embedded, upstream: Upstream) -> None:
    async def blurt(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nHello Ruby\n")

    await proxy.deploy(upstream.options())
    for data in (GET, POST) * 20:
        upstream.script(blurt)
        async with open_client(proxy.port) as client:
            response = await client.request(data)
            assert (response.status, response.body) == (200, b"Hello Ruby\n")
    await require_sound(proxy, logged=40)


async def test_surplus_bytes_never_reach_the_next_client(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(ok(b"mine") + ok(b"stolen"))
        await peer.wait_closed()

    upstream.script(serve)
    async with open_client(proxy.port) as one, open_client(proxy.port) as other:
        assert (await one.get()).body == b"mine"
        assert (await other.get()).body == b"hello"
        assert (await one.get()).body == b"hello"
    await require_sound(proxy, logged=3)


async def test_bytes_on_an_idle_connection_never_reach_a_client(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options())
    served, sent = trio.Event(), trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(ok(b"mine"))
        await served.wait()
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        sent.set()

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        assert (await client.get()).body == b"mine"
        served.set()
        await sent.wait()
        assert (await client.request(POST)).body == b"hello"
    await require_sound(proxy, logged=2)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_204_that_announces_a_body(proxy: Embedded, upstream: Upstream, head: bytes) -> None:
    """It has none all the same, and the client must stay in step (RFC 9112 6.3)."""
    await proxy.deploy(upstream.options())
    upstream.script(reply(head + b"5\r\nwrong\r\n0\r\n\r\n"))
    async with open_client(proxy.port) as client:
        await client.send(GET)
        head = await client.receive_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 204 ")
        assert b"content-length" not in head.lower()  # RFC 9110 8.6
        assert b"transfer-encoding" not in head.lower()
        assert (await client.get()).body == b"hello"
    await require_sound(proxy, logged=2)


async def test_length_and_chunked_in_a_response(proxy: Embedded, upstream: Upstream) -> None:
    """Transfer-Encoding wins and the length goes (RFC 9112 6.3)."""
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"5\r\nwhole\r\n0\r\n\r\n"
        )
        await respond(b"hello")(peer)

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        response = await client.get()
        assert response.body == b"whole"
        assert response.get(b"content-length") == []
        assert (await client.get()).body == b"hello"
    await require_sound(proxy, logged=2)


async def test_http_1_0_target(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(
        reply(b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold"),
        reply(b"HTTP/1.0 200 OK\r\n\r\nolder"),
    )
    async with open_client(proxy.port) as client:
        assert (await client.get()).body == b"old"
        assert (await client.get()).body == b"older"
        assert (await client.get()).body == b"hello"
    await require_sound(proxy, logged=3)


async def test_hanging_target(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options(response_timeout=0.2))
    released = trio.Event()

    async def hang(peer: Peer) -> None:
        await peer.receive_request()
        await peer.wait_closed()
        released.set()

    upstream.script(hang)
    async with open_client(proxy.port) as client:
        response = await client.request(POST)

        assert response.status == 504
        assert response.get(b"content-type") == [b"text/html; charset=utf-8"]
        await released.wait()
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["target"]) == (504, upstream.target)
    await require_sound(proxy, logged=1)


async def test_half_a_head_does_not_stop_the_target_timeout(
    proxy: Embedded, upstream: Upstream
) -> None:
    await proxy.deploy(upstream.options(response_timeout=0.2))

    async def hang(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-")
        await peer.wait_closed()

    upstream.script(hang)
    async with open_client(proxy.port) as client:
        assert (await client.get()).status == 504
    await require_sound(proxy, logged=1)


async def test_target_timeout_ends_with_the_head(proxy: Embedded, upstream: Upstream) -> None:
    """A body may take as long as it likes."""
    await proxy.deploy(upstream.options(response_timeout=0.2))

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        await trio.sleep(0.5)
        await peer.send(b"cd")

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        assert (await client.get()).body == b"abcd"
    await require_sound(proxy, logged=1)


async def test_a_long_upload_is_not_a_hanging_target(proxy: Embedded, upstream: Upstream) -> None:
    """The target's time begins when it has the whole request."""
    await proxy.deploy(upstream.options(response_timeout=0.2))
    async with open_client(proxy.port) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        for byte in b"hello":
            await trio.sleep(0.1)
            await client.send(bytes([byte]))
        assert (await client.receive_response(b"POST")).status == 200
    await require_sound(proxy, logged=1)


async def test_target_that_stops_reading_is_cut(upstream: Upstream) -> None:
    released = trio.Event()

    async def stuff(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await released.wait()

    upstream.script(stuff)
    async with open_embedded(stall_timeout=0.3) as proxy:
        await proxy.deploy(upstream.options(response_timeout=0.3))
        async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
            nursery.start_soon(upload, client, 64 * MEGABYTE)
            response = await client.receive_response(b"POST")
            nursery.cancel_scope.cancel()
        released.set()

        assert response.status == 504  # it is the target that failed, not the client
        await require_sound(proxy, logged=1)


@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["close", "reset"])
@pytest.mark.parametrize("data", [GET, POST], ids=["GET", "POST"])
async def test_pooled_connection_that_was_closed_while_idle(
    proxy: Embedded, upstream: Upstream, data: bytes, end: Callable[[Peer], None]
) -> None:
    await proxy.deploy(upstream.options())
    close = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(ok(b"first"))
        await close.wait()
        end(peer)

    upstream.script(serve)
    async with open_client(proxy.port) as client:
        assert (await client.get()).body == b"first"
        close.set()
        await wait_all_tasks_blocked()
        assert (await client.request(data)).body == b"hello"
    assert len(upstream.requests) == 1
    await require_sound(proxy, logged=2)


def closes_on_second(end: Callable[[Peer], None], seen: list[bytes]) -> Script:
    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(ok(b"first"))
        request = await peer.receive_request()
        assert request is not None
        seen.append(request.method)
        end(peer)

    return serve


@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["close", "reset"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"])
async def test_pooled_connection_closed_just_as_it_is_used_is_replaced(
    proxy: Embedded, upstream: Upstream, method: bytes, end: Callable[[Peer], None]
) -> None:
    await proxy.deploy(upstream.options())
    seen: list[bytes] = []
    upstream.script(closes_on_second(end, seen))
    async with open_client(proxy.port) as client:
        assert (await client.get()).body == b"first"
        assert (await client.request(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")).status == 200
    assert seen == [method]
    assert [request.method for request in upstream.requests] == [method]
    await require_sound(proxy, logged=2)


@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["close", "reset"])
@pytest.mark.parametrize(
    "data",
    [POST, b"POST / HTTP/1.1\r\nHost: a\r\n\r\n", POST.replace(b"POST", b"PUT", 1)],
    ids=["POST", "POST without a body", "PUT with a body"],
)
async def test_a_request_that_must_not_be_repeated_is_sent_once(
    proxy: Embedded, upstream: Upstream, data: bytes, end: Callable[[Peer], None]
) -> None:
    await proxy.deploy(upstream.options())
    seen: list[bytes] = []
    upstream.script(closes_on_second(end, seen))
    async with open_client(proxy.port) as client:
        assert (await client.get()).body == b"first"
        assert (await client.request(data)).status == 502
    assert seen == [data.split(b" ")[0]]
    assert upstream.requests == []
    await require_sound(proxy, logged=2)


async def test_a_request_is_repeated_only_once(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    seen: list[bytes] = []

    async def close_at_once(peer: Peer) -> None:
        request = await peer.receive_request()
        assert request is not None
        seen.append(request.method)

    upstream.script(
        closes_on_second(Peer.close, seen),
        close_at_once,
        close_at_once,
    )
    async with open_client(proxy.port) as client:
        await client.get()
        assert (await client.get()).status == 502
    assert seen == [b"GET", b"GET"]
    upstream.script(respond(b"hello"))  # replaces the script that was not used
    upstream._next.clear()
    await require_sound(proxy, logged=2)


async def test_stale_connections_are_replaced_while_their_deployment_drains(
    proxy: Embedded, upstream: Upstream
) -> None:
    """Whoever was in flight at the switch still belongs to the old targets."""
    second, close = trio.Event(), trio.Event()
    waiting = 2

    async def serve(peer: Peer) -> None:
        nonlocal waiting
        await peer.receive_request()
        await peer.send(ok(b"first"))
        await peer.receive_request()
        waiting -= 1
        if not waiting:
            second.set()
        await close.wait()

    bodies = []

    async def get(client: Client) -> None:
        bodies.append((await client.get()).body)

    async with open_upstream() as one, open_upstream() as two, open_client(proxy.port) as client:
        await proxy.deploy(deploy_options("web", [one, two]))
        one.script(serve)
        two.script(serve)
        for _ in range(2):
            assert (await client.get()).body == b"first"
        async with open_client(proxy.port) as another, trio.open_nursery() as nursery:

            def progress(event: Event) -> None:
                if event.event == "draining":
                    close.set()

            nursery.start_soon(get, client)
            nursery.start_soon(get, another)
            await second.wait()
            result = await proxy.proxy.deploy(upstream.options(), progress)
        assert bodies == [b"hello"] * 2
        assert (result.completed, result.cancelled) == (2, 0)
        assert len(one.requests) + len(two.requests) == 2
    await require_sound(proxy, logged=4)


@pytest.mark.parametrize("data", [GET, POST], ids=["GET", "POST"])
async def test_sibling_serves_when_a_target_refuses(
    proxy: Embedded, upstream: Upstream, data: bytes
) -> None:
    async with open_upstream() as gone, open_client(proxy.port) as client:
        await proxy.deploy(deploy_options("web", [upstream, gone]))
        gone.stop_listening()
        for _ in range(6):
            assert (await client.request(data)).body == b"hello"
        lines = await proxy.lines.wait_requests(6)
        assert {line["target"] for line in lines} == {upstream.target}
    await require_sound(proxy, logged=6)


async def test_no_target_accepts(proxy: Embedded) -> None:
    async with open_upstream() as one, open_upstream() as two, open_client(proxy.port) as client:
        await proxy.deploy(deploy_options("web", [one, two]))
        one.stop_listening()
        two.stop_listening()
        assert (await client.request(POST)).status == 502
        (line,) = await proxy.lines.wait_requests(1)
        assert line["target"] in (one.target, two.target)
        (error,) = [line for line in proxy.lines.all if line["level"] == "ERROR"]
        assert "refused" in error["error"]


async def test_a_single_dead_target_recovers(proxy: Embedded) -> None:
    async def statuses() -> list[int]:
        async with open_client(proxy.port) as client:
            return [(await client.get()).status, (await client.request(POST)).status]

    async with open_upstream() as first:
        await proxy.deploy(first.options())
        assert await statuses() == [200, 200]
    assert await statuses() == [502, 502]
    async with open_upstream(port=first.port):
        assert await statuses() == [200, 200]


async def test_responses_come_back_to_their_own_clients(
    proxy: Embedded, upstream: Upstream
) -> None:
    """Many clients and reused connections: nobody gets another's answer."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            await trio.lowlevel.checkpoint()
            await peer.send(ok(request.target + request.body))

    async def check(number: int) -> None:
        async with open_client(proxy.port) as client:
            for turn in range(20):
                body = b"%d/%d" % (number, turn)
                response = await client.request(
                    b"POST /%b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
                    % (body, len(body), body)
                )
                assert response.body == b"/" + body + body

    await proxy.deploy(upstream.options())
    upstream.script(*[serve] * 200)
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(check, number)
    # Of 400 requests: connections are used again, as long as they were busy a second ago.
    assert len(upstream.peers) <= 100
    upstream._next.clear()
    await proxy.proxy.remove("web")
    await proxy.wait_streams(0)
