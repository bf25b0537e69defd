"""WebSockets over HTTP/2 (RFC 8441) to a target that speaks HTTP/1.1."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio

from kamal_proxy.http.h2_connection import H2Connection
from tests.http.streams import open_world, read_head
from tests.http2.clients import H2Client, open_h2
from tests.websockets import CLOSE, GOING_AWAY, TEXT, accept, frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.http.streams import World

    Open = Callable[..., AbstractAsyncContextManager[World]]

CONNECT = [
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"https"),
    (b":authority", b"app.test"),
    (b":path", b"/ws"),
    (b"sec-websocket-version", b"13"),
    (b"sec-websocket-protocol", b"chat"),
]
HELLO = frame(TEXT, b"hello", masked=True)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return what opens a server with one target."""
    return partial(open_world, tmp_path, monkeypatch)


def key_of(head: bytes) -> bytes:
    found = re.search(rb"(?i)sec-websocket-key: (\S+)", head)
    assert found is not None
    return found[1]


async def echo(stream: trio.SocketStream) -> None:
    """Accept a WebSocket and send back, unmasked bytes or not, what comes; close when it closes."""
    head = await read_head(stream)
    assert head.startswith(b"GET /ws HTTP/1.1\r\n")
    assert b"Connection: Upgrade\r\nUpgrade: websocket\r\n" in head
    await stream.send_all(accept(key_of(head), b"Sec-WebSocket-Protocol: chat\r\n"))
    async for part in stream:
        await stream.send_all(part)
    await stream.send_eof()


async def open_tunnel(client: H2Client) -> int:
    stream = await client.send_fields(CONNECT, end=False)
    answer = client.answers[stream]
    await client.wait(lambda: answer.fields or answer.reset is not None)
    return stream


async def test_the_settings_offer_it(world: Open) -> None:
    async with world(echo) as running:
        client = await open_h2(running)
        await client.ping()
        assert client.codec.remote_settings.enable_connect_protocol == 1


async def test_bytes_pass_both_ways_until_both_sides_have_ended(world: Open) -> None:
    async with world(echo) as running:
        client = await open_h2(running)
        stream = await open_tunnel(client)
        answer = client.answers[stream]
        assert answer.status == 200
        assert answer.get(b"sec-websocket-protocol") == [b"chat"]
        for name in (b"sec-websocket-accept", b"connection", b"upgrade", b"content-length"):
            assert answer.get(name) == []
        await client.send_data(stream, HELLO)
        await client.wait(lambda: bytes(answer.body) == HELLO)
        await client.send_data(stream, b"", end=True)
        assert (await client.answer(stream)).reset is None
        assert answer.ended
    line = running.logged[0]
    assert (line["status"], line["method"], line["path"]) == (200, "GET", "/ws")
    assert line["resp_content_length"] == len(HELLO)
    assert "reason" not in line


async def test_much_passes_under_flow_control(world: Open) -> None:
    data = frame(TEXT, bytes(500_000), masked=True)
    async with world(echo) as running:
        client = await open_h2(running)
        stream = await open_tunnel(client)
        answer = client.answers[stream]
        sent = 0
        while sent < len(data):
            await client.wait(lambda: client.codec.local_flow_control_window(stream) > 0)
            size = min(16384, client.codec.local_flow_control_window(stream))
            await client.send_data(stream, data[sent : sent + size])
            sent += size
        await client.wait(lambda: len(answer.body) == len(data))
        assert bytes(answer.body) == data


async def test_what_waits_for_the_window_at_the_end_is_sent(world: Open) -> None:
    data = frame(TEXT, bytes(30_000))

    async def answer(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        await stream.send_all(accept(key_of(head)) + data)
        await stream.send_eof()
        while await stream.receive_some():
            pass

    async with world(answer) as running:
        client = await open_h2(running, initial_window_size=0)
        stream = await open_tunnel(client)
        result = client.answers[stream]
        await client.send_data(stream, b"", end=True)
        await client.ping()
        await trio.testing.wait_all_tasks_blocked()
        client.codec.increment_flow_control_window(100_000, stream)
        await client.flush()
        await client.answer(stream)
        assert (bytes(result.body), result.ended, result.reset) == (data, True, None)


async def test_a_closed_window_holds_the_target_up(world: Open) -> None:
    data = bytes(5_000_000)

    async def answer(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        await stream.send_all(accept(key_of(head)) + data)

    async with world(answer) as running:
        client = await open_h2(running, initial_window_size=0)
        stream = await open_tunnel(client)
        await trio.testing.wait_all_tasks_blocked(0.05)
        (connection,) = running.server._connections
        assert isinstance(connection, H2Connection)
        assert 0 < connection._streams[stream].out.size <= 64 * 1024
        await client.reset(stream)


async def test_a_reset_of_the_client_closes_the_target_s_connection(world: Open) -> None:
    closed = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await echo(stream)
        closed.set()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await open_tunnel(client)
        await client.reset(stream)
        await closed.wait()
        await client.ping()
    assert running.logged[0]["status"] == 200


async def test_a_target_that_breaks_resets_the_stream(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        await stream.send_all(accept(key_of(head)))
        await stream.receive_some()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await open_tunnel(client)
        await client.send_data(stream, HELLO)
        result = await client.answer(stream)
        assert result.ended or result.reset == 8


async def test_the_target_must_prove_that_it_has_read_the_handshake(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(accept(b"another key"))
        await trio.sleep_forever()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await open_tunnel(client)
        assert client.answers[stream].status == 502


async def test_a_plain_answer_of_the_target_is_no_tunnel(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        while head:
            status = b"200 OK" if b"/ok" in head else b"403 Forbidden"
            await stream.send_all(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nno" % status)
            head = await read_head(stream)

    async with world(answer) as running:
        client = await open_h2(running)
        refused = client.answers[await open_tunnel(client)]
        await client.wait(lambda: refused.reset is not None)
        assert (refused.status, bytes(refused.body), refused.reset) == (403, b"no", 0)
        fields = [(n, b"/ok" if n == b":path" else v) for n, v in CONNECT]
        stream = await client.send_fields(fields, end=False)
        result = client.answers[stream]
        await client.wait(lambda: result.reset is not None)
        # 2xx would mean that the tunnel is open.
        assert result.status == 502


async def test_a_drain_ends_it_with_a_close_frame(
    world: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with world(echo) as running:
        client = await open_h2(running)
        stream = await open_tunnel(client)
        answer = client.answers[stream]
        await client.send_data(stream, HELLO)
        await client.wait(lambda: answer.body)
        with patch("random.uniform", return_value=0.0):
            running.deployment.retire(30.0)
        await client.wait(lambda: answer.body.endswith(GOING_AWAY))
        await client.send_data(stream, frame(CLOSE, b"\x03\xe9", masked=True), end=True)
        assert (await client.answer(stream)).ended
    assert running.logged[0]["reason"] == "drained"


async def test_the_client_s_key_is_not_the_target_s(world: Open) -> None:
    heads: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        heads.append(await read_head(stream))
        await stream.send_all(accept(key_of(heads[-1])))
        await trio.sleep_forever()

    async with world(answer) as running:
        client = await open_h2(running)
        fields = [*CONNECT, (b"sec-websocket-key", b"mine"), (b"content-length", b"3")]
        await client.send_fields(fields, end=False)
        await client.wait(lambda: heads and client.answers[1].fields)
    assert b"mine" not in heads[0]
    assert b"content-length" not in heads[0].lower()
