"""HTTP/2 on both sides: streams of clients beside streams of a target."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from h2.settings import SettingCodes

from kamal_proxy.http.h2_codec import TARGET_WINDOW as WINDOW
from tests.http.streams import open_world
from tests.http2.clients import open_h2
from tests.http2.targets import Asked, H2Peer, answer, on_stream, use_h2c
from tests.websockets import CLOSE, TEXT, frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.http.streams import World

    Open = Callable[..., AbstractAsyncContextManager[World]]

HELLO = frame(TEXT, b"hello", masked=True)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return what opens a server with one target."""
    return partial(open_world, tmp_path, monkeypatch)


async def test_a_request_with_trailers_of_both_sides(world: Open) -> None:
    """A response of a known length may have them here."""
    seen: list[Asked] = []

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        seen.append(asked)
        peer.head(asked, 200, (b"content-length", b"4"))
        peer.h2.send_data(asked.stream_id, b"back")
        peer.h2.send_headers(asked.stream_id, [(b"x-sum", b"2")], end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        fields = [(b"te", b"trailers")]
        stream = await client.request(method=b"POST", headers=fields, end=False)
        await client.send_data(stream, b"body")
        client.codec.send_headers(stream, [(b"x-sum", b"1")], end_stream=True)
        await client.flush()
        result = await client.answer(stream)
        assert (result.status, bytes(result.body), result.trailers) == (
            200,
            b"back",
            [(b"x-sum", b"2")],
        )
    assert (seen[0].body, seen[0].trailers) == (b"body", [(b"x-sum", b"1")])
    assert seen[0].get(b"te") == b"trailers"


async def test_a_response_that_is_all_head_ends_with_it(world: Open) -> None:
    """Clients of gRPC insist on that (Trailers-Only)."""

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        fields = [(b"content-type", b"application/grpc"), (b"grpc-status", b"5")]
        peer.head(asked, 200, *fields, end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        result = await client.get()
        assert result.get(b"grpc-status") == [b"5"]
        assert (result.ended, bytes(result.body), result.trailers) == (True, b"", [])


async def test_a_cancelled_stream_is_cancelled_at_the_target(world: Open) -> None:
    """And it alone, on both connections."""
    begun, cancelled = trio.Event(), trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.wait(lambda: len(peer.requests) == 2)
        asked = {request.get(b":path"): request for request in peer.requests.values()}
        begun.set()
        await peer.wait(lambda: asked[b"/1"].reset is not None)
        assert asked[b"/1"].reset == 8
        cancelled.set()
        await peer.wait(lambda: asked[b"/2"].ended)
        await peer.respond(asked[b"/2"])
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        first = await client.request(b"/1")
        second = await client.request(b"/2", end=False)
        await begun.wait()
        await client.reset(first)
        await cancelled.wait()
        await client.send_data(second, b"", end=True)
        assert (await client.answer(second)).status == 200
        assert len(running.targets) == 1


@pytest.mark.parametrize("code", [2, 8, 0])
async def test_a_reset_of_the_target_in_the_middle_resets_the_stream(
    world: Open, code: int
) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked)
        peer.h2.send_data(asked.stream_id, b"begun")
        peer.h2.reset_stream(asked.stream_id, code)
        await peer.flush()
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        result = await client.get()
        assert (bytes(result.body), result.ended) == (b"begun", False)
        assert result.reset not in (None, 0)


async def test_the_windows_of_a_client_reach_the_target(world: Open) -> None:
    """What the client does not take waits at the target, beyond a window of the proxy's."""
    total = 2_000_000
    sent = 0

    async def serve(peer: H2Peer) -> None:
        nonlocal sent
        asked = await peer.wait_request()
        peer.head(asked)
        while sent < total:
            size = min(16_384, total - sent, peer.h2.local_flow_control_window(asked.stream_id))
            if size:
                sent += size
                peer.h2.send_data(asked.stream_id, bytes(size), end_stream=sent == total)
                await peer.flush()
            else:
                assert await peer.receive()
        await peer.wait_closed()

    async with world(on_stream(serve)) as running:
        await use_h2c(running)
        client = await open_h2(running, initial_window_size=10_000)
        client.taking = False
        stream = await client.request()
        await client.wait(lambda: len(client.answers[stream].body) == 10_000)
        await trio.testing.wait_all_tasks_blocked()
        assert sent <= 10_000 + 2 * WINDOW + 128 * 1024
        client.taking = True
        client.codec.acknowledge_received_data(10_000, stream)
        await client.flush()
        assert len((await client.answer(stream)).body) == total


async def test_a_websocket_on_streams_of_both_sides(world: Open) -> None:
    seen: list[Asked] = []

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        seen.append(asked)
        peer.head(asked, 200, (b"sec-websocket-protocol", b"chat"))
        await peer.flush()
        await peer.wait(lambda: asked.body == HELLO)
        peer.h2.send_data(asked.stream_id, frame(TEXT, b"back"))
        await peer.flush()
        await peer.wait(lambda: asked.body != HELLO)
        peer.h2.send_data(asked.stream_id, frame(CLOSE, b"\x03\xe8"), end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    settings = {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
    async with world(on_stream(serve, settings)) as running:
        await use_h2c(running)
        client = await open_h2(running)
        stream = await client.send_fields(
            [
                (b":method", b"CONNECT"),
                (b":protocol", b"websocket"),
                (b":scheme", b"https"),
                (b":authority", b"app.test"),
                (b":path", b"/ws"),
                (b"sec-websocket-version", b"13"),
            ],
            end=False,
        )
        result = client.answers[stream]
        await client.wait(lambda: result.fields or result.reset is not None)
        assert (result.status, result.get(b"sec-websocket-protocol")) == (200, [b"chat"])
        await client.send_data(stream, HELLO)
        await client.wait(lambda: bytes(result.body) == frame(TEXT, b"back"))
        await client.send_data(stream, frame(CLOSE, b"\x03\xe8", masked=True))
        await client.answer(stream)
        assert result.body.endswith(frame(CLOSE, b"\x03\xe8"))
    assert seen[0].get(b":protocol") == b"websocket"
    assert seen[0].get(b":path") == b"/ws"


async def test_many_streams_of_one_client_on_one_connection(world: Open) -> None:
    async with world(on_stream(answer(b"x" * 5000))) as running:
        await use_h2c(running)
        client = await open_h2(running)
        streams = [await client.request(b"/%d" % number) for number in range(90)]
        for stream in streams:
            assert len((await client.answer(stream)).body) == 5000
        assert len(running.targets) == 1
