"""What a stranger can do to a server of HTTP/2, and what ends it."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from hpack import Encoder
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.http.h2_connection import H2Connection
from kamal_proxy.http.h2_guard import PREFACE
from tests.http.streams import HELLO, hello_after, open_world, read_all, read_head
from tests.http2.clients import H2Client, PriorKnowledge, open_h2

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.http.answers import Answer
    from tests.http.streams import World

    Open = Callable[..., AbstractAsyncContextManager[World]]

NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, CALM = 0, 1, 3, 11
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PING, WINDOW_UPDATE, CONTINUATION = 6, 8, 9
REQUEST = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"app.test"),
    (b":path", b"/"),
]


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return what opens a server with one target."""
    return partial(open_world, tmp_path, monkeypatch)


async def never(stream: trio.SocketStream) -> None:
    """Read a request and never answer; note nothing."""
    await read_head(stream)
    await trio.sleep_forever()


def has(answer: Answer, count: int) -> bool:
    """Return whether so many bytes of body have come."""
    return len(answer.body) == count


_FLOOD = b'kamal_proxy_http_floods_total{protocol="HTTP/2",reason="%b"} 1'


async def flood(client: H2Client, data: bytes, times: int = 40) -> None:
    """Send again and again, reading what comes, until the server has had enough."""

    client.answering = False

    async def send(nursery: trio.Nursery) -> None:
        try:
            for _ in range(times):
                await client.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        nursery.cancel_scope.deadline = trio.current_time() + 5

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, nursery)
        await client.wait_closed()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "unit",
    [
        frame(PING, bytes(8)),
        frame(SETTINGS),
        frame(SETTINGS, b"\x00\x04\x00\x00\xff\xff"),
        frame(PRIORITY, bytes(4) + b"\x10", stream=1),
        frame(WINDOW_UPDATE, b"\x00\x00\x00\x01"),
        frame(RST_STREAM, bytes(4), stream=1),
        frame(DATA, stream=1),
        frame(0x77, b"grease"),
    ],
    ids=["ping", "settings", "window", "priority", "update", "reset", "data", "unknown"],
)
async def test_a_flood_ends_the_connection(world: Open, unit: bytes) -> None:
    async with world(never) as running:
        client = await open_h2(running)
        await client.request(method=b"POST", end=False)
        await flood(client, unit * 500)
        assert client.goaways[-1][1] == CALM
        (warning,) = running.lines.of("HTTP/2 connection closed")
        assert "too many" in warning["error"]
        assert _FLOOD % b"frames" in running.server.metrics.render("")[0]
        await client.stream.aclose()
        while running.server.connections:
            await wait_all_tasks_blocked()


async def test_rapid_resets_end_the_connection_and_do_not_reach_the_target(world: Open) -> None:
    async with world(never) as running:
        client = await open_h2(running)
        await client.ping()

        async def attack() -> None:
            for _ in range(30):
                for _ in range(20):
                    stream = client.codec.get_next_available_stream_id()
                    client.codec.send_headers(stream, REQUEST, end_stream=True)
                    client.codec.reset_stream(stream, 8)
                await client.ping()

        with pytest.raises(EOFError):
            await attack()
        assert client.goaways[-1][1] == CALM
        # They came together with their end, so that none had begun.
        assert len(running.targets) == 0
        assert 200 <= len(running.logged) <= 240
    assert set(running.statuses) == {499}


async def test_resets_that_the_client_makes_the_server_do_count_as_well(world: Open) -> None:
    async with world(never) as running:
        client = await open_h2(running)
        await client.ping()
        increment = (2**31 - 1).to_bytes(4, "big")

        async def attack() -> None:
            for _ in range(30):
                for _ in range(20):
                    stream = client.codec.get_next_available_stream_id()
                    client.codec.send_headers(stream, REQUEST, end_stream=True)
                    data = client.codec.data_to_send() + frame(WINDOW_UPDATE, increment, 0, stream)
                    await client.stream.send_all(data)
                await client.ping()

        with pytest.raises(EOFError):
            await attack()
        assert client.goaways[-1][1] == CALM


async def test_malformed_requests_are_reset_and_counted(world: Open) -> None:
    async with world() as running:
        client = await open_h2(running)
        bad = await client.answer(await client.send_fields([*REQUEST, (b"X-Upper", b"1")]))
        assert (bad.reset, bad.status) == (PROTOCOL_ERROR, 0)
        assert (await client.get()).status == 200
        line = running.logged[0]
        assert (line["status"], line["reason"], line["proto"]) == (400, "bad_request", "HTTP/2.0")

        async def attack() -> None:
            for _ in range(300):
                await client.send_fields([*REQUEST, (b"connection", b"close")])
                await client.ping()

        with pytest.raises(EOFError):
            await attack()
        assert client.goaways[-1][1] == CALM


async def test_a_head_that_is_too_large_is_answered(world: Open) -> None:
    async with world(max_head_size=4096) as running:
        client = await open_h2(running)
        await client.ping()
        assert client.codec.remote_settings.max_header_list_size == 4096
        large = await client.get(headers=[(b"x-%d" % n, bytes([97]) * 100) for n in range(40)])
        assert large.status == 431
        many = await client.get(headers=[(b"x", b"")] * 201)
        assert many.status == 431
        assert (await client.get()).status == 200
    assert [line["reason"] for line in running.logged[:2]] == ["head_too_large"] * 2


async def test_a_small_block_that_stands_for_a_large_head_ends_the_connection(world: Open) -> None:
    """An HPACK bomb: one entry of the table, referred to again and again."""
    encoder = Encoder()
    block = encoder.encode([*REQUEST, (b"x-bomb", b"b" * 3000)])
    bomb = block + encoder.encode([(b"x-bomb", b"b" * 3000)]) * 8000
    async with world() as running:
        client = await open_h2(running)
        await client.stream.send_all(frame(HEADERS, bomb, 5, 1))
        await client.wait_closed()
        assert client.goaways[-1][1] == CALM
        assert len(running.lines.of("HTTP/2 connection closed")) == 1
        assert _FLOOD % b"head" in running.server.metrics.render("")[0]
        assert running.targets == []


@pytest.mark.parametrize("size", [0, 1, 16000])
async def test_a_head_that_never_ends(world: Open, size: int) -> None:
    async with world() as running:
        client = await open_h2(running)
        await client.stream.send_all(frame(HEADERS, Encoder().encode(REQUEST), 1, 1))
        await flood(client, frame(CONTINUATION, bytes(size), 0, 1) * 10)
        assert client.goaways[-1][1] in (CALM, PROTOCOL_ERROR)


async def test_a_head_that_comes_too_slowly(world: Open, autojump_clock: MockClock) -> None:
    async with world(head_timeout=3.0, idle_timeout=50.0) as running:
        client = await open_h2(running)
        await client.get()
        began = trio.current_time()
        await client.stream.send_all(frame(HEADERS, Encoder().encode(REQUEST), 1, 3))
        await client.wait_closed()
        assert trio.current_time() - began < 6
    assert running.statuses == [200, 408]


async def test_a_client_that_says_nothing(world: Open, autojump_clock: MockClock) -> None:
    async with world(head_timeout=3.0, idle_timeout=50.0) as running:
        for data in (b"", PREFACE[:7], PREFACE + frame(SETTINGS), PREFACE + frame(SETTINGS)[:4]):
            stream, far = running.pair()
            stream.__class__ = PriorKnowledge
            running.nursery.start_soon(running.serve, stream)
            began = trio.current_time()
            await far.send_all(data or b"P")
            assert b"\x07" in await read_all(far)  # a GOAWAY frame
            assert 2.9 < trio.current_time() - began < 6


async def test_an_idle_connection_is_told_and_closed(
    world: Open, autojump_clock: MockClock
) -> None:
    async with world(head_timeout=3.0, idle_timeout=50.0) as running:
        client = await open_h2(running)
        await client.get()
        began = trio.current_time()
        for _ in range(4):
            await trio.sleep(10)
            await client.ping()  # is no request
        await client.wait_closed()
        assert 49 < trio.current_time() - began < 54
        assert client.goaways == [(1, NO_ERROR)]


async def test_a_window_that_stays_closed(world: Open, autojump_clock: MockClock) -> None:
    async with world(stall_timeout=20.0) as running:
        client = await open_h2(running, initial_window_size=0)
        stream = await client.request()
        result = client.answers[stream]
        began = trio.current_time()
        await client.wait(lambda: result.reset is not None)
        assert 19 < trio.current_time() - began < 22
        assert (result.status, bytes(result.body)) == (200, b"")
    line = running.logged[0]
    assert (line["status"], line["reason"]) == (499, "client_stalled")


async def test_a_window_that_opens_slowly_is_no_stall(
    world: Open, autojump_clock: MockClock
) -> None:
    async with world(stall_timeout=20.0) as running:
        client = await open_h2(running, initial_window_size=0)
        client.taking = False
        stream = await client.request()
        result = client.answers[stream]
        for count in range(1, 6):
            await trio.sleep(15)
            client.codec.increment_flow_control_window(1, stream)
            await client.flush()
            await client.wait(partial(has, result, count))
        assert (await client.answer(stream)).ended
        assert bytes(result.body) == b"hello"


async def test_a_client_that_does_not_read(world: Open, autojump_clock: MockClock) -> None:
    body = bytes(300_000)

    async def answer(stream: trio.SocketStream) -> None:
        while await read_head(stream):
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )

    async with world(answer, stall_timeout=20.0) as running:
        client = await open_h2(running, initial_window_size=2**30)
        client.codec.increment_flow_control_window(2**30)
        for _ in range(50):
            await client.request()
        await wait_all_tasks_blocked()
        (connection,) = running.server._connections
        assert isinstance(connection, H2Connection)
        assert connection.output.size < 256 * 1024
        await trio.sleep(25)
        assert not running.server.connections
    reasons = [line.get("reason") for line in running.logged]
    assert set(reasons) <= {"client_stalled", None}
    assert "client_stalled" in reasons


async def test_nothing_is_read_of_a_client_that_does_not_read(
    world: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamal_proxy.http.h2_guard._BURST", math.inf)
    async with world() as running:
        client = await open_h2(running)
        await client.ping()
        (connection,) = running.server._connections
        assert isinstance(connection, H2Connection)

        async def send() -> None:
            while True:
                await client.stream.send_all(frame(PING, bytes(8)) * 1000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked(0.05)
            assert 128 * 1024 < connection.output.size < 256 * 1024
            nursery.cancel_scope.cancel()


async def test_a_client_s_table_size_is_not_believed(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        count = 0
        while await read_head(stream):
            count += 1
            value = b"%d" % count * 300
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-A: %b\r\n\r\n" % value
            )

    async with world(answer) as running:
        client = await open_h2(running, header_table_size=2**20)
        client.codec.decoder.max_allowed_table_size = 2**20
        for _ in range(60):
            assert (await client.get()).status == 200
        (connection,) = running.server._connections
        assert isinstance(connection, H2Connection)
        assert connection.codec.encoder.header_table_size == 4096


async def test_an_upload_nobody_takes_stays_within_the_window(world: Open) -> None:
    async with world(never) as running:
        client = await open_h2(running)
        await client.ping()
        stream = await client.request(method=b"POST", end=False)
        sent = 0
        with trio.move_on_after(1):
            while True:
                await client.ping()
                window = client.codec.local_flow_control_window(stream)
                if not window:
                    break
                await client.send_data(stream, bytes(min(window, 16384)))
                sent += min(window, 16384)
        other = await client.request(b"/other")
        await client.ping()
        assert client.answers[other].reset is None
        # More than the window: what the kernel holds for the target.
        assert sent < 2 * 1024 * 1024


@pytest.mark.parametrize(
    ("length", "data", "end", "trailers"),
    [
        (3, b"four", False, False),
        (5, b"four", True, False),
        (3, b"four", True, False),
        (5, b"four", True, True),
    ],
    ids=["more", "less", "more at the end", "less before trailers"],
)
async def test_a_body_of_another_length_than_announced(
    world: Open, length: int, data: bytes, end: bool, trailers: bool
) -> None:
    got = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        while part := await stream.receive_some():
            got.extend(part)

    async with world(answer) as running:
        client = await open_h2(running)
        announced = [(b"content-length", b"%d" % length)]
        stream = await client.request(method=b"POST", headers=announced, end=False)
        await client.ping()
        if trailers:
            await client.stream.send_all(frame(DATA, data, 0, 1))
            client.codec.send_headers(stream, [(b"a", b"b")], end_stream=True)
            await client.flush()
        else:
            await client.stream.send_all(frame(DATA, data, int(end), 1))
        assert (await client.answer(stream)).reset == PROTOCOL_ERROR
        await client.ping()  # the others go on
    assert b"four" not in got or trailers
    assert not got.endswith(b"0\r\n\r\n")
    assert running.statuses == [499]


async def test_bodies_of_another_length_take_neither_the_window_nor_forever(world: Open) -> None:
    async with world(never) as running:
        client = await open_h2(running)
        announced = [(b"content-length", b"1")]
        for _ in range(40):
            stream = await client.request(method=b"POST", headers=announced, end=False)
            await client.send_data(stream, bytes(16000))
            assert (await client.answer(stream)).reset == PROTOCOL_ERROR
        await client.ping()
        assert client.codec.outbound_flow_control_window > 200_000

        async def attack() -> None:
            for _ in range(250):
                stream = await client.request(method=b"POST", headers=announced, end=False)
                client.codec.send_headers(stream, [(b"a", b"b")], end_stream=True)
                await client.flush()
                await client.ping()

        with pytest.raises(EOFError):
            await attack()
        assert client.goaways[-1][1] == CALM


async def test_a_request_that_is_cancelled_at_once_is_not_sent(world: Open) -> None:
    heads: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        while head := await read_head(stream):
            heads.append(head)
            await stream.send_all(HELLO)

    async with world(answer) as running:
        client = await open_h2(running)
        await client.get()  # from now on, a connection to the target is there
        for _ in range(20):
            stream = client.codec.get_next_available_stream_id()
            client.codec.send_headers(stream, REQUEST, end_stream=True)
            client.codec.reset_stream(stream, 8)
        await client.ping()
        await client.get(b"/last")
    assert len(heads) == 2
    assert sorted(running.statuses) == [200] * 2 + [499] * 20


async def test_data_after_the_end_of_a_request(world: Open) -> None:
    async with world(never) as running:
        client = await open_h2(running)
        await client.request()
        await client.ping()
        await client.stream.send_all(frame(DATA, b"x", 0, 1))
        result = client.answers[1]
        await client.wait(lambda: result.reset is not None)
        assert result.reset == 5  # STREAM_CLOSED
        await client.ping()
    assert running.statuses == [499]


async def test_malformed_trailers_cancel_the_request(world: Open) -> None:
    got = bytearray()
    closed = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        while part := await stream.receive_some():
            got.extend(part)
        closed.set()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"POST", end=False)
        await client.ping()
        client.codec.send_headers(stream, [(b"a", b"b\r\nc: d")], end_stream=True)
        await client.flush()
        assert (await client.answer(stream)).reset == PROTOCOL_ERROR
        await closed.wait()
    assert b"c: d" not in got
    assert not got.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n", PROTOCOL_ERROR),
        (PREFACE + frame(PING, bytes(8)), PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS) + frame(SETTINGS, bytes(5)), 6),
        (PREFACE + frame(SETTINGS) + b"\xff\xff\xff", 6),
        (PREFACE + frame(SETTINGS) + frame(HEADERS, b"\xff\xff\xff\xff", 5, 1), None),
        (PREFACE + frame(SETTINGS) + frame(HEADERS, b"", 5, 2), PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, bytes(4)), PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, b"\x7f\xff\xff\xff"), FLOW_CONTROL_ERROR),
    ],
)
async def test_what_is_no_http_2(world: Open, data: bytes, code: int | None) -> None:
    async with world() as running:
        stream, far = running.pair()
        stream.__class__ = PriorKnowledge
        running.nursery.start_soon(running.serve, stream)
        await far.send_all(data + b"\x00" * 3)
        client = H2Client(far)
        client.codec.initiate_connection()
        await client.wait_closed()
        assert len(client.goaways) == 1
        if code is not None:
            assert client.goaways[0][1] == code
    assert not running.lines.of("Connection failed")


async def test_the_other_streams_go_on_after_a_goaway_of_the_client(world: Open) -> None:
    release = trio.Event()
    async with world(hello_after(release)) as running:
        client = await open_h2(running)
        stream = await client.request()
        await client.stream.send_all(frame(7, bytes(8)) + frame(PING, bytes(8)))
        await client.wait(lambda: client.pongs)
        release.set()
        assert (await client.answer(stream)).status == 200
