"""WebSockets over HTTP/3 (RFC 9220): a tunnel on one stream."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.websocket import GOING_AWAY, close_frame
from tests.http.streams import open_world, read_head
from tests.http3.clients import H3Client, open_front

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
FRAME_UNEXPECTED = 0x105
FRAME = b"\x82\x85\x00\x00\x00\x00hello"


async def websocket(stream: trio.SocketStream) -> None:
    """Accept a WebSocket, and send everything back."""
    head = await read_head(stream)
    if b"upgrade: websocket" not in head.lower():
        await stream.send_all(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")
        return
    [key] = [
        line.partition(b":")[2].strip()
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"sec-websocket-key:")
    ]
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    await stream.send_all(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
    )
    async for data in stream:
        await stream.send_all(data)


def open_websocket(client: H3Client) -> int:
    return client.send_fields(
        [
            (b":method", b"CONNECT"),
            (b":protocol", b"websocket"),
            (b":scheme", b"https"),
            (b":authority", b"app.test"),
            (b":path", b"/cable"),
            (b"sec-websocket-version", b"13"),
        ],
        end=False,
    )


async def test_a_websocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, websocket) as world, open_front(world) as front:
        client = await front.connect()
        stream = open_websocket(client)
        answer = client.answers[stream]
        await client.wait(lambda: answer.status)
        assert answer.status == 200
        for _ in range(20):
            answer.body.clear()
            client.send_data(stream, FRAME * 100)
            await client.wait(lambda: len(answer.body) == 100 * len(FRAME))
        client.send_data(stream, b"\x88\x80\x00\x00\x00\x00", end=True)
        await client.wait(lambda: answer.ended)
        assert (await client.get(b"/no")).status == 426
    first = world.logged[0]
    assert (first["status"], first["proto"], first["method"]) == (200, "HTTP/3.0", "GET")


async def test_a_websocket_in_a_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, websocket) as world, open_front(world) as front:
        client = await front.connect()
        stream = open_websocket(client)
        answer = client.answers[stream]
        await client.wait(lambda: answer.status)
        client.send_data(stream, FRAME)
        await client.wait(lambda: answer.body == FRAME)
        world.server.close_idle(trio.current_time() + 1.0)
        await client.wait(lambda: answer.body.endswith(close_frame(GOING_AWAY)))
        client.send_data(stream, b"\x88\x80\x00\x00\x00\x00", end=True)
        await world.server.wait_closed()


async def test_trailers_of_a_websocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, websocket) as world, open_front(world) as front:
        client = await front.connect()
        stream = open_websocket(client)
        await client.wait(lambda: client.answers[stream].status)
        client.send_frame(1, b"\x00\x00", stream_id=stream)
        assert await client.wait_closing() == FRAME_UNEXPECTED
        while not world.logged:
            await trio.lowlevel.checkpoint()


async def test_a_cancelled_websocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, websocket) as world, open_front(world) as front:
        client = await front.connect()
        stream = open_websocket(client)
        answer = client.answers[stream]
        await client.wait(lambda: answer.status)
        client.cancel(stream)
        while not world.logged:
            await trio.lowlevel.checkpoint()
