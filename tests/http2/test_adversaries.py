"""Clients and targets that want more than their share, or to be taken for something else."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from kamal_proxy.http.h2_codec import CONNECTION_WINDOW, STREAM_WINDOW, TARGET_WINDOW
from kamal_proxy.http.h2_stream import H2Stream
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state import SavedPause
from kamal_proxy.target_options import TargetOptions
from tests.http.streams import GET, HELLO, open_world, read_all, read_head, say_hello
from tests.http2.clients import open_h2
from tests.http2.targets import H2Peer, on_stream, use_h2c
from tests.http2.test_exchange import answering, send_megabyte

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.http.streams import World
    from tests.http2.clients import H2Client

    Open = Callable[..., AbstractAsyncContextManager[World]]

PROTOCOL_ERROR, INTERNAL_ERROR, REFUSED = 1, 2, 7


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return what opens a server with one target."""
    return partial(open_world, tmp_path, monkeypatch)


# What a target of HTTP/1.1 gets


async def ask(client: H2Client, *, authority: bytes, path: bytes, method: bytes) -> int:
    fields = [(b":method", method), (b":scheme", b"https"), (b":path", path)]
    return await client.send_fields([*fields, (b":authority", authority)])


@pytest.mark.parametrize(
    ("method", "authority", "path", "line", "host"),
    [
        (b"GET", b"App.Test.:8443", b"/x?y#z", b"GET /x?y%23z", b"App.Test.:8443"),
        (b"GET", b"app.test", b"//other.test/x", b"GET //other.test/x", b"app.test"),
        (b"GET", b"app.test", b"/\xc3\xa4", b"GET /%C3%A4", b"app.test"),
        (b"OPTIONS", b"app.test", b"*", b"OPTIONS *", b"app.test"),
        (b"connect", b"app.test", b"/x", b"connect /x", b"app.test"),
    ],
)
async def test_what_passes_says_the_same_there(
    world: Open, method: bytes, authority: bytes, path: bytes, line: bytes, host: bytes
) -> None:
    seen: list[bytes] = []
    async with world(answering(HELLO, seen)) as running:
        client = await open_h2(running)
        stream = await ask(client, authority=authority, path=path, method=method)
        assert (await client.answer(stream)).status == 200
    assert seen[0].startswith(line + b" HTTP/1.1\r\nHost: " + host + b"\r\n")
    assert seen[0].lower().count(b"\r\nhost:") == 1


@pytest.mark.parametrize(
    ("authority", "path"),
    [
        (b"a b", b"/"),
        (b"user@app.test", b"/"),
        (b"app.test/x", b"/"),
        (b"app.test#x", b"/"),
        (b"app.test:80:90", b"/"),
        (b"[::1", b"/"),
        (b"\xe4.test", b"/"),
        (b"app.test", b"/%zz"),
        (b"app.test", b""),
        (b"app.test", b"*"),
        (b"app.test", b"x"),
        (b"app.test", b"?x"),
        (b"app.test", b"#x"),
        (b"app.test", b"/ HTTP/1.1"),
        (b"app.test", b"https://other.test/"),
        (b"app.test", b"other.test:443"),
    ],
)
async def test_what_does_not_pass_never_gets_there(
    world: Open, authority: bytes, path: bytes
) -> None:
    async with world() as running:
        client = await open_h2(running)
        answer = await client.answer(
            await ask(client, authority=authority, path=path, method=b"GET")
        )
        assert answer.reset == PROTOCOL_ERROR or answer.status == 400
        assert (await client.get()).status == 200
        assert len(running.targets) == 1
    assert running.statuses == [400, 200]
    assert running.logged[0]["reason"] == "bad_request"


async def test_a_handshake_that_is_refused_leaves_nothing_behind(world: Open) -> None:
    """What the client sends as if it had a tunnel is no request to the target."""
    seen: list[bytes] = []
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"
    async with world(answering(refusal, seen)) as running:
        client = await open_h2(running)
        fields = [
            (b":method", b"CONNECT"),
            (b":protocol", b"websocket"),
            (b":scheme", b"https"),
            (b":authority", b"app.test"),
            (b":path", b"/ws"),
            (b"content-length", str(len(GET)).encode()),
        ]
        stream = await client.send_fields(fields, end=False, body=GET, last=False)
        assert (await client.answer(stream)).status == 403
        assert (await client.get(b"/next")).status == 403
    assert [head.split(b" HTTP")[0] for head in seen] == [b"GET /ws", b"GET /next"]
    assert b"content-length" not in seen[0].lower()


async def test_what_was_begun_is_never_sent_twice(world: Open) -> None:
    """Nor is anything of it, on whatever connection."""
    seen: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        while head := await read_head(stream):
            seen.append(head)
            if head.startswith(b"POST"):
                return
            await stream.send_all(HELLO)

    async with world(answer) as running:
        client = await open_h2(running)
        assert (await client.get()).status == 200
        answer_ = await client.get(method=b"POST", body=b"pay")
        assert answer_.status == 502
    assert [head[:4] for head in seen] == [b"GET ", b"POST"]


async def test_who_has_begun_to_answer_does_not_get_it_again(world: Open) -> None:
    """Whatever it says: 103 is a sign that it has worked."""
    asked = 0

    async def serve(peer: H2Peer) -> None:
        nonlocal asked
        while True:
            request = await peer.wait_request(asked + 1)
            asked += 1
            peer.head(request, 103, (b"link", b"</x>"))
            await peer.flush()
            peer.h2.reset_stream(request.stream_id, REFUSED)
            await peer.flush()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        assert (await client.get(method=b"POST", body=b"pay")).status == 502
    assert asked == 1


# What a target does


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbegun",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\nx\r\n",
    ],
)
async def test_a_response_that_breaks_off_is_no_whole_one(world: Open, response: bytes) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(response)

    async with world(answer) as running:
        client = await open_h2(running)
        result = await client.get()
        assert (result.status, bytes(result.body), result.ended) == (200, b"begun", False)
        assert result.reset == INTERNAL_ERROR
    assert (running.logged[0]["status"], running.logged[0]["reason"]) == (200, "target_failed")


async def test_a_body_of_a_wrong_length_costs_its_stream_only(world: Open) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.wait_request(2)
        asked = {each.get(b":path"): each for each in peer.requests.values()}
        bad, good = asked[b"/bad"], asked[b"/good"]
        peer.head(bad, 200, (b"content-length", b"1"))
        await peer.flush()
        peer.h2.send_data(bad.stream_id, b"xy")
        await peer.flush()
        await peer.wait(lambda: bad.reset is not None)
        assert bad.reset == PROTOCOL_ERROR
        await peer.respond(good)
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        bad, good = await client.request(b"/bad"), await client.request(b"/good")
        assert (await client.answer(good)).status == 200
        result = await client.answer(bad)
        assert (result.ended, result.reset) == (False, INTERNAL_ERROR)
        assert len(running.targets) == 1
    line = running.lines.of("Error while proxying")[0]
    assert "malformed response: 1 bytes announced, 2 received" in line["error"]


@pytest.mark.parametrize("status", [204, 304])
async def test_a_body_where_there_is_none(world: Open, status: int) -> None:
    """It could pass for the next response on a connection of HTTP/1.1."""

    async def serve(peer: H2Peer) -> None:
        for number in (1, 2):
            asked = await peer.wait_request(number)
            peer.head(asked, status)
            peer.h2.send_data(asked.stream_id, HELLO, end_stream=True)
            await peer.flush()
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        result = await client.get()
        assert (bytes(result.body), result.ended) == (b"", False) or result.status == 502
        plain = running.connect()
        await plain.send_all(GET)
        assert b"hello" not in await read_all(plain)


# More than one's share


async def test_a_small_window_of_the_connection_is_shared(world: Open) -> None:
    """However little it opens: nobody has to wait until another has got everything."""
    async with world(send_megabyte) as running:
        client = await open_h2(running, initial_window_size=2**30)
        client.taking = False
        streams = [await client.request() for _ in range(3)]
        answers = [client.answers[stream] for stream in streams]
        await client.wait(lambda: all(answer.fields for answer in answers))
        await client.wait(lambda: len(client.order) >= 4)
        client.order.clear()
        for count in range(1, 13):
            client.codec.increment_flow_control_window(1000)
            await client.flush()
            while len(client.order) < count:
                await client.read()
        assert sorted(client.order) == sorted(streams * 4)
        for stream in streams:
            await client.reset(stream)


async def test_who_waited_for_the_window_is_forgotten(world: Open) -> None:
    """Also if the client never opens it again, and goes on asking."""
    async with world(send_megabyte) as running:
        client = await open_h2(running, initial_window_size=2**30)
        client.taking = False
        for count in range(1, 21):
            stream = await client.request()
            await client.wait(lambda: client.answers[stream].fields)  # noqa: B023
            await client.reset(stream)
            while len(running.logged) < count:
                await client.ping()
        assert sum(len(client.answers[each].body) for each in client.answers) == 65535
        gc.collect()
        assert [each for each in gc.get_objects() if isinstance(each, H2Stream)] == []


async def test_who_reads_nothing_does_not_hold_up_the_other_streams(world: Open) -> None:
    async with world(send_megabyte) as running:
        client = await open_h2(running, initial_window_size=0)
        slow = [await client.request() for _ in range(20)]
        await client.wait(lambda: all(client.answers[each].fields for each in slow))
        quick = await client.request()
        client.codec.increment_flow_control_window(2**21, quick)
        client.codec.increment_flow_control_window(2**21)
        await client.flush()
        assert len((await client.answer(quick)).body) == 2**20
        assert not any(client.answers[each].body for each in slow)
        for each in slow:
            await client.reset(each)


async def test_clients_share_a_connection_to_a_target(world: Open) -> None:
    """One that reads nothing holds a window of its own there, and no more."""
    size = TARGET_WINDOW + 100_000

    async def serve(peer: H2Peer) -> None:
        left: dict[int, int] = {}
        while await peer.receive():
            for asked in peer.requests.values():
                if asked.ended and asked.stream_id not in left:
                    left[asked.stream_id] = size
                    peer.head(asked)
            for stream in left:
                while left[stream] and peer.requests[stream].reset is None:
                    window = peer.h2.local_flow_control_window(stream)
                    count = min(16_384, left[stream], window)
                    if count <= 0:
                        break
                    left[stream] -= count
                    peer.h2.send_data(stream, bytes(count), end_stream=not left[stream])
            await peer.flush()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        slow = await open_h2(running, initial_window_size=0)
        streams = [await slow.request() for _ in range(50)]
        await slow.wait(lambda: all(slow.answers[each].fields for each in streams))
        quick = await open_h2(running)
        for _ in range(3):
            assert len((await quick.get()).body) == size
        assert len(running.targets) == 1
        for each in streams:
            await slow.reset(each)
        await slow.ping()


async def test_uploads_that_nobody_takes_hold_a_window_of_the_connection(world: Open) -> None:
    """Four of a paused service fill it; it opens again as soon as they are cancelled."""
    async with world(pause=SavedPause(state="paused", fail_after=30.0)) as running:
        client = await open_h2(running)
        await client.ping()
        full = client.codec.outbound_flow_control_window
        assert full == CONNECTION_WINDOW == 4 * STREAM_WINDOW
        held = [
            await client.request(method=b"PUT", body=bytes(STREAM_WINDOW), end=False)
            for _ in range(4)
        ]
        await client.ping()
        assert client.codec.outbound_flow_control_window == 0
        for stream in held:
            await client.reset(stream)
        await client.wait(lambda: client.codec.outbound_flow_control_window > full // 2)
        running.change(pause=SavedPause())
        assert (await client.get(method=b"PUT", body=bytes(STREAM_WINDOW))).status == 200
    assert running.statuses[:4] == [499] * 4


@pytest.mark.parametrize("way", ["paused", "buffering"])
async def test_a_request_that_is_cancelled_before_it_was_sent(world: Open, way: str) -> None:
    paused = SavedPause(state="paused", fail_after=30.0) if way == "paused" else SavedPause()
    options = TargetOptions(buffer_requests=way == "buffering")
    async with world(pause=paused, target_options=options) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"PUT", body=b"part", end=False)
        await client.ping()
        await client.reset(stream)
        await client.ping()
        await trio.testing.wait_all_tasks_blocked()
        assert running.targets == []
        line = running.logged[0]
        assert (line["status"], line["reason"], line["service"]) == (499, "client_gone", "app")
        assert running.server.waiting == 0


async def test_nobody_is_answered_with_a_body_to_a_head(world: Open) -> None:
    async with world(say_hello, service_options=ServiceOptions(hosts=("app.test",))) as running:
        client = await open_h2(running)
        answer = await client.get(method=b"HEAD", host=b"nobody.test")
        assert (answer.status, bytes(answer.body), answer.ended) == (404, b"", True)
        assert int(answer.get(b"content-length")[0]) > 0
    assert running.logged[0]["resp_content_length"] == 0
