"""How long who waits for whom, between a client and an HTTP/2 target; on a clock that jumps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.http.streams import open_world, read_all, read_head
from tests.http2.targets import H2Peer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from trio.testing import MockClock

    from tests.http.streams import World

HOUR = 3600.0


@attrs.define(eq=False)
class Wire:
    """What an ``H2Peer`` needs of a connection."""

    stream: trio.SocketStream

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive_some(self) -> bytes:
        return bytes(await self.stream.receive_some())


def h2(
    script: Callable[[H2Peer], Awaitable[None]],
) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def serve(stream: trio.SocketStream) -> None:
        peer = H2Peer(Wire(stream), {})  # type: ignore[arg-type]
        peer.h2.initiate_connection()
        await peer.flush()
        await script(peer)

    return serve


async def use_h2c(world: World) -> None:
    """Let the service's target be one that speaks HTTP/2."""
    world.change(active=await world.open_deployment("h2c://target:80"))


def post(content_type: str) -> bytes:
    return (
        "POST /path HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n"
        f"Content-Type: {content_type}\r\n\r\n1\r\na\r\n"
    ).encode()


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("content_type", ["application/grpc", "Application/gRPC+proto"])
async def test_a_grpc_call_may_be_silent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    content_type: str,
    answered: bool,
) -> None:
    """On both sides, for as long as they like, whether or not the response has begun."""

    async def talk(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        if answered:
            peer.head(asked)
            await peer.flush()
        await peer.wait_request()
        if not answered:
            peer.head(asked)
        peer.h2.send_data(asked.stream_id, asked.body, end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with open_world(tmp_path, monkeypatch, h2(talk), stall_timeout=5.0) as world:
        await use_h2c(world)
        client = world.connect()
        await client.send_all(post(content_type))
        await trio.sleep(HOUR)
        await client.send_all(b"1\r\nb\r\n0\r\n\r\n")
        assert (await read_head(client)).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_any_other_client_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    cancelled = trio.Event()

    async def wait(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        await peer.wait(lambda: asked.reset is not None)
        cancelled.set()
        await peer.wait_closed()

    async with open_world(tmp_path, monkeypatch, h2(wait), stall_timeout=5.0) as world:
        await use_h2c(world)
        client = world.connect()
        started = trio.current_time()
        await client.send_all(post("text/plain"))
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - started == pytest.approx(5.0)
        await cancelled.wait()


async def test_a_client_that_hangs_up_has_its_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """An answer within a second still reaches it; after that its stream is cancelled."""
    cancelled = trio.Event()

    async def serve(peer: H2Peer) -> None:
        first = await peer.wait_request(1)
        await trio.sleep(0.9)
        await peer.respond(first)
        second = await peer.wait_request(2)
        await peer.wait(lambda: second.reset is not None)
        assert second.reset == 8
        cancelled.set()
        await peer.wait_closed()

    async with open_world(tmp_path, monkeypatch, h2(serve)) as world:
        await use_h2c(world)
        for _ in range(2):
            client = world.connect()
            await client.send_all(b"GET /path HTTP/1.1\r\nHost: app.test\r\n\r\n")
            await client.send_eof()
            if not cancelled.is_set() and not world.logged:
                assert (await read_all(client)).endswith(b"hello")
        await cancelled.wait()
        while len(world.logged) < 2:
            await trio.lowlevel.checkpoint()
        assert world.statuses == [200, 499]
