"""WebSockets to HTTP/2 targets: one stream each (RFC 8441), for a client that speaks HTTP/1.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from h2.settings import SettingCodes

from tests.http2.targets import Asked, H2Peer, answer, h2, h2c
from tests.running import Embedded, open_embedded
from tests.scripted import open_client, open_upstream
from tests.websockets import CLOSE, GOING_AWAY, TEXT, UPGRADE, accept, frame, read_frames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OFFERED = {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
HELLO = frame(TEXT, b"hello", masked=True)


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded() as running:
        yield running


async def accepted(peer: H2Peer, number: int = 1) -> Asked:
    """Accept a WebSocket."""
    asked = await peer.wait_request(number, whole=False)
    peer.head(asked, 200, (b"sec-websocket-protocol", b"chat"))
    await peer.flush()
    return asked


async def say(peer: H2Peer, asked: Asked, data: bytes, *, last: bool = False) -> None:
    peer.h2.send_data(asked.stream_id, data, end_stream=last)
    await peer.flush()


async def test_a_websocket_and_a_request_on_one_connection(proxy: Embedded) -> None:
    seen: list[Asked] = []

    async def serve(peer: H2Peer) -> None:
        asked = await accepted(peer)
        seen.append(asked)
        await peer.wait(lambda: asked.body == HELLO)
        await say(peer, asked, frame(TEXT, b"hello back"))
        await peer.respond(await peer.wait_request(2))
        await peer.wait(lambda: asked.body.endswith(frame(CLOSE, b"\x03\xe8", masked=True)))
        await say(peer, asked, frame(CLOSE, b"\x03\xe8"), last=True)
        await peer.wait_closed()

    async with open_upstream(h2(serve, OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client, open_client(proxy.port) as other:
            await client.send(UPGRADE)
            head = await client.receive_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            lines = head.lower().split(b"\r\n")
            proof = accept().split(b"Sec-WebSocket-Accept: ")[1].split(b"\r\n")[0]
            assert b"sec-websocket-accept: " + proof.lower() in lines
            assert b"sec-websocket-protocol: chat" in lines
            assert b"upgrade: websocket" in lines
            await client.send(HELLO)
            (echo,) = read_frames(await client.receive_exactly(len(frame(TEXT, b"hello back"))))
            assert echo.payload == b"hello back"
            assert (await other.get()).status == 200
            await client.send(frame(CLOSE, b"\x03\xe8", masked=True))
            assert await client.receive_eof() == frame(CLOSE, b"\x03\xe8")
        assert len(upstream.peers) == 1
    (asked,) = seen
    assert asked.fields[:5] == [
        (b":method", b"CONNECT"),
        (b":scheme", b"http"),
        (b":authority", b"a.example"),
        (b":path", b"/ws"),
        (b":protocol", b"websocket"),
    ]
    assert asked.get(b"sec-websocket-version") == b"13"
    for name in (b"sec-websocket-key", b"connection", b"upgrade"):
        assert asked.get(name) is None


async def test_a_lot_through_a_websocket_both_ways(proxy: Embedded) -> None:
    """More than the windows take at once."""
    message = frame(TEXT, b"x" * 300_000, masked=True)

    async def serve(peer: H2Peer) -> None:
        asked = await accepted(peer)
        await peer.wait(lambda: len(asked.body) == len(message))
        rest = asked.body
        while rest:
            window = min(peer.h2.local_flow_control_window(asked.stream_id), 16_384)
            if window:
                await say(peer, asked, rest[:window])
                rest = rest[window:]
            else:
                assert await peer.receive()
        await peer.wait_closed()

    async with open_upstream(h2(serve, OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(UPGRADE)
            await client.receive_until(b"\r\n\r\n")
            await client.send(message)
            assert await client.receive_exactly(len(message)) == message


async def test_a_target_that_takes_no_websockets(proxy: Embedded) -> None:
    async with open_upstream(h2(answer())) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.request(UPGRADE)).status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == (
            "the target takes no WebSockets over HTTP/2 (RFC 8441); without h2c:// they reach it "
            "over HTTP/1.1"
        )
        (peer,) = upstream.peers
        assert b":protocol" not in peer.received


async def test_a_target_that_refuses_a_websocket(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        await peer.respond(asked, b"no", 403)
        await peer.wait_closed()

    async with open_upstream(h2(serve, OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            response = await client.request(UPGRADE)
            assert (response.status, response.body) == (403, b"no")


async def test_a_websocket_with_a_body_is_refused(proxy: Embedded) -> None:
    """Its bytes would be the first that the target takes for frames."""
    async with open_upstream(h2(answer(), OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            request = UPGRADE.replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\nbody")
            assert (await client.request(request)).status == 400


async def test_another_protocol_is_not_asked_for(proxy: Embedded) -> None:
    """A server may go on without the switch (RFC 9110 7.8), and so may the proxy."""
    seen: list[Asked] = []
    async with open_upstream(h2(answer(seen=seen), OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            fields = "Connection: Upgrade\r\nUpgrade: x-raw\r\n"
            assert (await client.get(headers=fields)).status == 200
    assert seen[0].get(b":method") == b"GET"
    assert seen[0].get(b"upgrade") is None


async def test_a_drain_says_goodbye(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await accepted(peer)
        await say(peer, asked, frame(TEXT, b"up"))
        await peer.wait(lambda: bool(asked.body))
        (last,) = read_frames(asked.body)
        assert (last.opcode, last.payload) == (CLOSE, b"\x03\xe9")
        await say(peer, asked, frame(CLOSE, b"\x03\xe9"), last=True)
        await peer.wait_closed()

    async with open_upstream(h2(serve, OFFERED)) as old, open_upstream(h2(answer())) as new:
        await proxy.deploy(h2c(old))
        async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
            await client.send(UPGRADE)
            await client.receive_until(frame(TEXT, b"up"))
            nursery.start_soon(proxy.deploy, h2c(new, drain_timeout=1.0))
            assert await client.receive_exactly(len(GOING_AWAY)) == GOING_AWAY
            await client.send(frame(CLOSE, b"\x03\xe9", masked=True))
            await client.receive_eof()


@pytest.mark.parametrize("how", ["reset", "connection"])
async def test_a_target_that_breaks_off(proxy: Embedded, how: str) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await accepted(peer)
        await say(peer, asked, frame(TEXT, b"up"))
        if how == "reset":
            peer.h2.reset_stream(asked.stream_id, 8)
            await peer.flush()
            await peer.wait_closed()

    async with open_upstream(h2(serve, OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(UPGRADE)
            await client.receive_until(frame(TEXT, b"up"))
            await client.wait_closed()


async def test_a_client_that_breaks_off(proxy: Embedded) -> None:
    told = trio.Event()

    async def serve(peer: H2Peer) -> None:
        asked = await accepted(peer)
        await peer.wait(lambda: asked.reset is not None)
        assert asked.reset == 8
        told.set()
        await peer.wait_closed()

    async with open_upstream(h2(serve, OFFERED)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(UPGRADE)
            await client.receive_until(b"\r\n\r\n")
            client.reset()
            await told.wait()
