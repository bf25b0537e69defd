"""What clients of HTTP/3 may not do: malformed requests, floods, and too much of anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pylsqpack
import pytest
import trio
from aioquic.h3.connection import encode_frame

from kamal_proxy.http import h2_guard, h3_connection, h3_link, h3_quic
from tests.http.streams import open_world, read_head, stay_silent
from tests.http3.clients import open_front

if TYPE_CHECKING:
    from pathlib import Path

NO_ERROR = 0x100
STREAM_CREATION_ERROR = 0x103
CLOSED_CRITICAL_STREAM = 0x104
FRAME_UNEXPECTED = 0x105
FRAME_ERROR = 0x106
EXCESSIVE_LOAD = 0x107
SETTINGS_ERROR = 0x109
MISSING_SETTINGS = 0x10A
REQUEST_REJECTED = 0x10B
REQUEST_INCOMPLETE = 0x10D
MESSAGE_ERROR = 0x10E
QPACK_DECOMPRESSION_FAILED = 0x200
ENCODER_STREAM_ERROR = 0x201
DECODER_STREAM_ERROR = 0x202

GET = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"app.test"),
    (b":path", b"/"),
]


def block(fields: list[tuple[bytes, bytes]]) -> bytes:
    return pylsqpack.Encoder().encode(0, fields)[1]


# Heads


@pytest.mark.parametrize(
    "fields",
    [
        GET[1:],
        [*GET[:2], *GET[3:]],
        [*GET, (b":method", b"GET")],
        [*GET, (b"Upper", b"1")],
        [*GET, (b"a b", b"1")],
        [*GET, (b"a", b"1\r\nb: 2")],
        [*GET, (b"connection", b"close")],
        [*GET, (b"transfer-encoding", b"chunked")],
        [*GET, (b"content-length", b"+1")],
        [*GET, (b"content-length", b"5")],  # and no body
        [(b"a", b"1"), *GET],
        [*GET[:3], (b":path", b"http://other/")],
        [*GET, (b":status", b"200")],
    ],
)
async def test_malformed_heads(
    fields: list[tuple[bytes, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        answer = await client.answer(client.send_fields(fields))
        assert answer.reset == MESSAGE_ERROR
        assert (await client.get()).status == 200
    assert [line["status"] for line in world.logged] == [400, 200]
    assert len(world.targets) == 1


@pytest.mark.parametrize(
    "more",
    [
        [(b"x", b"a" * 3000)],
        [(b"x%d" % number, b"") for number in range(120)],
        [(b"x", b"\x01" * 60_000)],  # more than is kept of a head
        [(b"content-security-policy", b"script-src 'none'; object-src 'none'; base-uri 'none'")]
        * 30,
    ],
)
async def test_heads_that_are_too_large(
    more: list[tuple[bytes, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_world(tmp_path, monkeypatch, max_head_size=2000, max_headers=100) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        for end in (True, False):
            answer = await client.answer(client.send_fields([*GET, *more], end=end))
            assert answer.status == 431
        await client.wait(lambda: answer.stopped == NO_ERROR)
        assert (await client.get()).status == 200
    assert [line.get("reason") for line in world.logged] == ["head_too_large"] * 2 + [None]


async def test_a_protocol_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        fields = [(b":method", b"CONNECT"), (b":protocol", b"webtransport"), *GET[1:]]
        answer = await client.answer(client.send_fields(fields, end=False))
        assert answer.status == 501
        plain = [(b":method", b"CONNECT"), (b":authority", b"app.test:443")]
        assert (await client.answer(client.send_fields(plain, end=False))).status == 405


async def test_a_head_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        open_world(tmp_path, monkeypatch, stay_silent, head_timeout=0.3) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        client.request()  # so that it is not the connection that is given up
        stream = client.send_bytes(encode_frame(1, block(GET))[:-3])
        assert (await client.answer(stream)).reset == REQUEST_INCOMPLETE
        # Opening a stream opens those before it as well.
        client.quic._local_next_stream_id_bidi += 4
        client.request()
        while len(world.logged) < 2:
            await trio.lowlevel.checkpoint()
    assert [line["reason"] for line in world.logged[:2]] == ["head_timeout"] * 2


@pytest.mark.parametrize(
    ("served", "limits"), [(False, {"head_timeout": 0.4}), (True, {"idle_timeout": 0.4})]
)
async def test_an_idle_connection_ends(
    served: bool, limits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_world(tmp_path, monkeypatch, **limits) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        if served:
            await client.get()

        # The client says that it is there, but wants nothing.
        async def ping() -> None:
            while client.closing_code is None:
                client.quic.send_ping(3)
                client.flush()
                await trio.sleep(0.05)

        front.nursery.start_soon(ping)
        assert await client.wait_closing() == NO_ERROR


# Bodies


@pytest.mark.parametrize(("body", "end"), [(b"abc", True), (b"abcdefg", False)])
async def test_a_body_of_another_length(
    body: bytes, end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        fields = [(b":method", b"POST"), *GET[1:], (b"content-length", b"5")]
        stream = client.send_fields(fields, end=False)
        while not world.targets:
            await trio.lowlevel.checkpoint()
        client.send_data(stream, body, end=end)
        assert (await client.answer(stream)).reset == MESSAGE_ERROR
        assert client.closing_code is None


async def test_what_the_target_does_not_take_stays_with_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request(method=b"POST", body=bytes(8_000_000), end=False)
        while front.server._limits.held < h3_quic.STREAM_WINDOW * 3 // 4:
            await trio.lowlevel.checkpoint()
        await client.ping()
        assert front.server._limits.held <= h3_quic.STREAM_WINDOW
        client.cancel(stream)
        while not world.logged:
            await trio.lowlevel.checkpoint()
        await client.ping()
        assert front.server._limits.held < h3_quic.STREAM_WINDOW // 4


async def test_what_clients_do_not_acknowledge_is_limited_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def give(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(bytes(65536))

    monkeypatch.setattr(h3_link, "MAX_OUTPUT", 500_000)
    async with open_world(tmp_path, monkeypatch, give) as world, open_front(world) as front:
        limits = front.server._limits
        clients = [await front.connect(max_stream_data=50_000) for _ in range(5)]
        for client in clients:
            client.quic._write_stream_limits = lambda *_, **__: None  # type: ignore[method-assign]
            client.request()
            before = limits.output
            while limits.output == before:
                await trio.lowlevel.checkpoint()
            await client.ping()
        assert limits.output < 500_000 + h3_connection.MAX_OUTPUT + 200_000
        for client in clients:
            client.vanish()
        front.running.cancel()
        await front.ended.wait()
        assert limits.output == 0


# What is no HTTP/3


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (encode_frame(0, b"data"), FRAME_UNEXPECTED),
        (encode_frame(4, b""), FRAME_UNEXPECTED),
        (encode_frame(5, b"\x00"), FRAME_UNEXPECTED),
        (encode_frame(7, b"\x00"), FRAME_UNEXPECTED),
        (encode_frame(2, b""), FRAME_UNEXPECTED),
        (encode_frame(1, block(GET)) + encode_frame(9, b""), FRAME_UNEXPECTED),
        (encode_frame(1, block(GET)) + encode_frame(1, block([])) * 2, FRAME_UNEXPECTED),
        (encode_frame(1, b"\x02\x80\x10"), QPACK_DECOMPRESSION_FAILED),  # a dynamic table
        (encode_frame(1, b"\xff\xff"), QPACK_DECOMPRESSION_FAILED),
        (encode_frame(1, b""), QPACK_DECOMPRESSION_FAILED),
        (encode_frame(1, block(GET))[:-1], FRAME_ERROR),
        (encode_frame(1, block(GET)) + b"\x00", FRAME_ERROR),
    ],
)
async def test_request_streams_that_end_the_connection(
    sent: bytes, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        client.send_bytes(sent, end=True)
        assert await client.wait_closing() == code
        while world.server.connections:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("sent", "end", "code"),
    [
        (b"\x00" + encode_frame(7, b"\x00"), False, MISSING_SETTINGS),
        (b"\x00" + encode_frame(0x21, b"\x00"), False, MISSING_SETTINGS),
        (b"\x00" + encode_frame(4, b"") * 2, False, FRAME_UNEXPECTED),
        (b"\x00" + encode_frame(4, b"") + encode_frame(0, b""), False, FRAME_UNEXPECTED),
        (b"\x00" + encode_frame(4, b"\x02\x00"), False, SETTINGS_ERROR),
        (b"\x00" + encode_frame(4, b"\x08\x02"), False, SETTINGS_ERROR),
        (b"\x00" + encode_frame(4, b"\x21\x00\x21\x00"), False, SETTINGS_ERROR),
        (b"\x00" + encode_frame(4, b"\x21"), False, FRAME_ERROR),
        (b"\x00" + encode_frame(4, bytes(5000)), False, EXCESSIVE_LOAD),
        (b"\x00" + encode_frame(4, b""), True, CLOSED_CRITICAL_STREAM),
        (b"\x01\x00", False, STREAM_CREATION_ERROR),
        (b"\x02\x3f\xe1\x1f", False, ENCODER_STREAM_ERROR),  # a table of 4096 bytes
        (b"\x03\x80", False, DECODER_STREAM_ERROR),
    ],
)
async def test_other_streams_that_end_the_connection(
    sent: bytes, end: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect(start=False)
        client.open_unidirectional(sent, end=end)
        assert await client.wait_closing() == code


async def test_a_second_control_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        client.open_unidirectional(b"\x00")
        assert await client.wait_closing() == STREAM_CREATION_ERROR


@pytest.mark.parametrize("stop", [True, False])
async def test_a_control_stream_that_is_given_up(
    stop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        await client.get()
        if stop:
            client.quic.stop_stream(3, 0)
        else:
            client.quic.reset_stream(client.http._local_control_stream_id, 0)
        client.flush()
        assert await client.wait_closing() == CLOSED_CRITICAL_STREAM


async def test_what_nobody_knows_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        for number in range(300):
            stream = client.open_unidirectional(b"\x40\x54" + bytes(20_000))
            if number % 3 == 0:
                await client.ping()
                client.quic.reset_stream(stream, 0)
                client.flush()
            if number % 3:
                await client.wait_stopped(stream)
        greased = encode_frame(0x21, b"x" * 5000) + encode_frame(1, block(GET))
        stream = client.send_bytes(greased + encode_frame(0x40, b"y"), end=True)
        assert (await client.answer(stream)).status == 200


# Floods


async def test_rapid_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        asked = 0
        while client.closing_code is None:
            client.cancel(client.request())
            asked += 1
            if asked % 20 == 0:
                await client.ping()
        assert client.closing_code == EXCESSIVE_LOAD
        assert asked < 2 * h2_guard._RESET_BURST
        counted = b'kamal_proxy_http_floods_total{protocol="HTTP/3",reason="cancelled"} 1'
        assert counted in world.server.metrics.render("")[0]
        while world.server.connections:
            await trio.lowlevel.checkpoint()
        # The rest was cancelled before a target was asked.
        assert len(world.targets) <= asked


async def test_cancelled_requests_of_a_busy_client_are_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        for _ in range(250):
            stream = client.request(end=False)
            client.cancel(stream)
            assert (await client.get()).status == 200


async def test_requests_are_limited_over_all_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        world.server.max_streams = 2
        client, other = await front.connect(), await front.connect()
        client.request()
        other.request()
        while world.server.streams < 2:
            await trio.lowlevel.checkpoint()
        assert (await client.get()).reset == REQUEST_REJECTED


async def test_more_streams_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        client.quic._remote_max_streams_bidi = 1000
        for _ in range(200):
            client.request()
        assert await client.wait_closing() == 0x4  # STREAM_LIMIT_ERROR
        while world.server.connections:
            await trio.lowlevel.checkpoint()
        assert world.server.streams == 0


async def test_tiny_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def count(stream: trio.SocketStream) -> None:
        data = await read_head(stream)
        while not data.endswith(b"0\r\n\r\n"):
            data += await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with open_world(tmp_path, monkeypatch, count) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request(method=b"POST", end=False)
        client.send_bytes(encode_frame(0, b"x") * 30_000, stream_id=stream)
        client.send_bytes(encode_frame(0, b"") * 30_000, stream_id=stream, end=True)
        assert (await client.answer(stream)).status == 200
