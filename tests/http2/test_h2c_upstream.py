"""Requests to HTTP/2 targets through a whole proxy: heads, bodies, trailers, ends of all kinds."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.http2.targets import Asked, H2Peer, answer, h2, h2c
from tests.running import Embedded, open_embedded
from tests.scripted import ConnectionCut, open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded() as running:
        yield running


async def test_a_request_and_its_response(proxy: Embedded) -> None:
    seen: list[Asked] = []
    async with open_upstream(h2(answer(b"hello", seen))) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            response = await client.get("/a/b?c=%2F", headers="Cookie: a=b\r\nX-One: 1\r\n")
            assert (response.status, response.reason, response.body) == (200, b"OK", b"hello")
            assert response.get(b"content-length") == [b"5"]
    (asked,) = seen
    assert asked.fields[:4] == [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b"a.example"),
        (b":path", b"/a/b?c=%2F"),
    ]
    assert asked.get(b"cookie") == b"a=b"
    assert asked.get(b"x-one") == b"1"
    assert asked.get(b"x-kamal-target") == upstream.target.encode()
    for name in (b"host", b"connection", b"transfer-encoding", b"upgrade"):
        assert asked.get(name) is None
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["target"]) == (200, upstream.target)


async def test_a_body_in_both_directions_beyond_all_windows(proxy: Embedded) -> None:
    """More than the windows of streams and connections, and of one read, both ways."""
    body = bytes(range(256)) * 4096  # 1 MiB

    async def echo(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked, 200, (b"content-length", b"%d" % len(asked.body)))
        rest = memoryview(asked.body)
        while rest:
            window = peer.h2.local_flow_control_window(asked.stream_id)
            size = min(len(rest), window, peer.h2.max_outbound_frame_size)
            if size:
                peer.h2.send_data(asked.stream_id, bytes(rest[:size]), end_stream=size == len(rest))
                rest = rest[size:]
                await peer.flush()
            else:
                assert await peer.receive()
        await peer.wait_closed()

    async with open_upstream(h2(echo)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
            response = await client.request(head + body)
            assert response.body == body


@pytest.mark.parametrize("buffered", [False, True])
async def test_trailers_in_both_directions(proxy: Embedded, buffered: bool) -> None:
    seen: list[Asked] = []

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        seen.append(asked)
        peer.head(asked)
        peer.h2.send_data(asked.stream_id, b"part")
        trailers = [(b"grpc-status", b"0"), (b"content-length", b"4"), (b"set-cookie", b"a=b")]
        peer.h2.send_headers(asked.stream_id, trailers, end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream, buffer_requests=buffered))
        async with open_client(proxy.port) as client:
            response = await client.request(
                b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n"
                b"Connection: TE\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 7\r\n\r\n"
            )
            assert (response.body, response.trailers) == (b"part", [(b"grpc-status", b"0")])
            assert response.get(b"transfer-encoding") == [b"chunked"]
    (asked,) = seen
    assert (asked.body, asked.trailers) == (b"hello", [(b"x-sum", b"7")])
    assert asked.get(b"te") == b"trailers"
    assert asked.get(b"content-length") is None


@pytest.mark.parametrize(
    ("method", "status", "fields", "length"),
    [
        ("HEAD", 200, [(b"content-length", b"1234")], [b"1234"]),
        ("GET", 204, [], []),
        ("GET", 304, [(b"content-length", b"7")], [b"7"]),
        ("GET", 200, [(b"content-length", b"0")], [b"0"]),
        ("GET", 200, [], []),
        ("GET", 599, [], []),
    ],
)
@pytest.mark.parametrize("buffered", [False, True])
async def test_responses_without_a_body(
    proxy: Embedded,
    method: str,
    status: int,
    fields: list[tuple[bytes, bytes]],
    length: list[bytes],
    buffered: bool,
) -> None:
    async def serve(peer: H2Peer) -> None:
        for number in (1, 2):
            asked = await peer.wait_request(number)
            peer.head(asked, status, *fields, end_stream=True)
            await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream, buffer_responses=buffered))
        async with open_client(proxy.port) as client:
            for _ in range(2):
                response = await client.request(f"{method} / HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                assert (response.status, response.body) == (status, b"")
                assert response.get(b"content-length") == length
    assert len(upstream.peers) == 1


@pytest.mark.parametrize("buffered", [False, True])
async def test_a_buffered_response(proxy: Embedded, buffered: bool) -> None:
    async with open_upstream(h2(answer(b"x" * 100_000))) as upstream:
        await proxy.deploy(h2c(upstream, buffer_responses=buffered, max_response_body_size=100_000))
        async with open_client(proxy.port) as client:
            assert (await client.get()).body == b"x" * 100_000
        if buffered:
            await proxy.deploy(h2c(upstream, buffer_responses=True, max_response_body_size=99_999))
            async with open_client(proxy.port) as client:
                assert (await client.get()).status == 500


async def test_informational_responses_and_a_body_that_waits_for_one(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        assert asked.get(b"expect") == b"100-continue"
        peer.head(asked, 103, (b"link", b"</a.css>"))
        peer.head(asked, 100)
        await peer.flush()
        await peer.wait_request()
        await peer.respond(asked, asked.body)
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
            )
            hints = await client.receive_until(b"\r\n\r\n")
            assert hints.startswith(b"HTTP/1.1 103 Early Hints\r\n")
            assert b"link: </a.css>\r\n" in hints
            assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
            await client.send(b"hello")
            response = await client.receive_response(b"POST")
            assert response.body == b"hello"


async def test_both_directions_go_on_at_once(proxy: Embedded) -> None:
    """Each side says something only after it has heard the other: neither may be held back."""

    async def converse(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        peer.head(asked)
        for number in range(3):
            said = b"question %d" % number
            peer.h2.send_data(asked.stream_id, said)
            await peer.flush()
            await peer.wait(partial(asked.has_said, b"answer %d" % number))
        await peer.wait_request()
        peer.h2.end_stream(asked.stream_id)
        await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(converse)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            for number in range(3):
                await client.receive_until(b"question %d" % number)
                await client.send(b"8\r\nanswer %d\r\n" % number)
            await client.send(b"0\r\n\r\n")
            await client.receive_until(b"0\r\n\r\n")


async def test_a_client_that_leaves_cancels_its_stream_only(proxy: Embedded) -> None:
    began, left = trio.Event(), trio.Event()

    async def serve(peer: H2Peer) -> None:
        gone = await peer.wait_request(1)
        began.set()
        stays = await peer.wait_request(2)
        peer.head(gone)
        peer.h2.send_data(gone.stream_id, b"begun")
        await peer.flush()
        await peer.wait(lambda: gone.reset is not None)
        assert gone.reset == 8  # CANCEL
        left.set()
        await peer.respond(stays)
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as stays, trio.open_nursery() as nursery:
            async with open_client(proxy.port) as leaves:
                await leaves.send(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n")
                await began.wait()
                await stays.send(b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
                await leaves.receive_until(b"begun")
            nursery.start_soon(left.wait)
            assert (await stays.receive_response()).body == b"hello"
    assert len(upstream.peers) == 1


async def test_no_answer_in_time(proxy: Embedded) -> None:
    """The limit ends the one request; what else is on the connection goes on."""

    async def serve(peer: H2Peer) -> None:
        late = await peer.wait_request(1)
        await peer.wait(lambda: late.reset is not None)
        assert late.reset == 8
        await peer.respond(await peer.wait_request(2))
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream, response_timeout=0.2))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 504
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
    assert len(upstream.peers) == 1


async def test_a_response_cut_short_by_a_reset(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked, 200, (b"content-length", b"10"))
        peer.h2.send_data(asked.stream_id, b"begun")
        peer.h2.reset_stream(asked.stream_id, 2)
        await peer.flush()
        await peer.respond(await peer.wait_request(2))
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            with pytest.raises(ConnectionCut) as cut:
                await client.get()
            assert cut.value.body == b"begun"
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == "response cut short: reset by the target: INTERNAL_ERROR"
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
    assert len(upstream.peers) == 1


async def test_a_response_cut_short_by_the_end_of_the_connection(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked)
        peer.h2.send_data(asked.stream_id, b"begun")
        await peer.flush()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            with pytest.raises(ConnectionCut) as cut:
                await client.get()
            assert cut.value.body == b"begun"
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == "response cut short: closed by the target"


async def test_a_complete_response_counts_whatever_comes_after_it(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        peer.head(asked, 200, (b"content-length", b"5"))
        peer.h2.send_data(asked.stream_id, b"hello", end_stream=True)
        # No error: the rest of the request is not wanted (RFC 9113 8.1). Then nonsense.
        peer.h2.reset_stream(asked.stream_id, 0)
        await peer.wire.send(peer.h2.data_to_send() + b"\xff" * 100)
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
            assert (await client.receive_response(b"POST")).body == b"hello"


async def test_a_redeploy_lets_streams_end_on_the_old_target(proxy: Embedded) -> None:
    release = trio.Event()
    goodbye = trio.Event()

    async def slow(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked)
        peer.h2.send_data(asked.stream_id, b"old")
        await peer.flush()
        await release.wait()
        peer.h2.send_data(asked.stream_id, b" target", end_stream=True)
        await peer.flush()
        await peer.wait_closed()
        if peer.said_goodbye:
            goodbye.set()

    async with open_upstream(h2(slow)) as old, open_upstream(h2(answer(b"new"))) as new:
        await proxy.deploy(h2c(old))
        async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await client.receive_until(b"old")
            nursery.start_soon(proxy.deploy, h2c(new))
            target = f"h2c://{new.target}"
            while proxy.proxy.services()[0].targets != (target,):
                await trio.lowlevel.checkpoint()
            async with open_client(proxy.port) as other:
                assert (await other.get()).body == b"new"
            release.set()
            await client.receive_until(b" target\r\n0\r\n\r\n")
        await goodbye.wait()


async def test_what_a_drain_cuts_is_cancelled(proxy: Embedded) -> None:
    began, cancelled = trio.Event(), trio.Event()

    async def slow(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        began.set()
        await peer.wait(lambda: asked.reset is not None)
        assert asked.reset == 8
        cancelled.set()

    async with open_upstream(h2(slow)) as old, open_upstream(h2(answer())) as new:
        await proxy.deploy(h2c(old))
        async with open_client(proxy.port) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await began.wait()
            await proxy.deploy(h2c(new, drain_timeout=0.1))
            assert (await client.receive_response()).status == 504
        await cancelled.wait()


async def test_nothing_outlives_a_removed_service(proxy: Embedded) -> None:
    async with open_upstream(h2(answer())) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
        await proxy.wait_streams(1)
        await proxy.proxy.remove("web")
        await proxy.wait_streams(0)


async def test_targets_of_both_kinds_side_by_side(proxy: Embedded) -> None:
    """The one that speaks HTTP/2 is gone: its requests go to its sibling over HTTP/1.1."""
    async with open_upstream() as plain, open_upstream(h2(answer(b"h2"))) as other:
        built = h2c(other)
        both = attrs.evolve(built, targets=(*built.targets, plain.target))
        await proxy.deploy(both)
        async with open_client(proxy.port) as client:
            assert {(await client.get()).body for _ in range(4)} == {b"hello", b"h2"}
            other.stop_listening()
            for peer in other.peers:
                peer.reset()
            assert {(await client.get()).body for _ in range(4)} == {b"hello"}


@pytest.mark.parametrize(
    ("method", "status", "fields"),
    [
        ("GET", 200, [(b"content-length", b"4")]),
        ("HEAD", 200, []),
        ("HEAD", 200, [(b"content-length", b"4")]),
        ("GET", 204, []),
        ("GET", 304, []),
    ],
)
async def test_trailers_for_which_http1_has_no_room(
    proxy: Embedded, method: str, status: int, fields: list[tuple[bytes, bytes]]
) -> None:
    """They are left out, and the response is whole."""

    async def serve(peer: H2Peer) -> None:
        for number in (1, 2):
            asked = await peer.wait_request(number)
            peer.head(asked, status, *fields)
            if method == "GET" and status == 200:
                peer.h2.send_data(asked.stream_id, b"body")
            peer.h2.send_headers(asked.stream_id, [(b"x-sum", b"1")], end_stream=True)
            await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            for _ in range(2):
                response = await client.request(f"{method} / HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                assert (response.status, response.trailers) == (status, [])
                assert response.body == (b"body" if method == "GET" and status == 200 else b"")
