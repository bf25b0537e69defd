"""How long who waits for whom, between a client and an HTTP/2 target; on a clock that jumps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from h2.settings import SettingCodes

from kamal_proxy.target_options import TargetOptions
from tests.http.streams import GET, open_world, read_all, read_head
from tests.http2.targets import H2Peer, on_stream, use_h2c

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

HOUR = 3600.0
WINDOW = 5


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

    async with open_world(tmp_path, monkeypatch, on_stream(talk), stall_timeout=5.0) as world:
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

    async with open_world(tmp_path, monkeypatch, on_stream(wait), stall_timeout=5.0) as world:
        await use_h2c(world)
        client = world.connect()
        started = trio.current_time()
        await client.send_all(post("text/plain"))
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - started == pytest.approx(5.0)
        await cancelled.wait()


async def test_a_target_that_takes_nothing_of_one_body_but_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """On one connection: what moves there does not count for what does not."""
    full = trio.Event()

    async def serve(peer: H2Peer) -> None:
        peer.takes = False
        await peer.wait(lambda: len(peer.requests) == 2)
        asked = {request.get(b":path"): request for request in peer.requests.values()}
        slow, stuck = asked[b"/slow"], asked[b"/stuck"]
        await peer.wait(lambda: len(slow.body) == len(stuck.body) == WINDOW)
        full.set()
        async with trio.open_nursery() as nursery:

            async def open_window() -> None:
                while not slow.ended:
                    await trio.sleep(1)
                    peer.h2.increment_flow_control_window(1, slow.stream_id)
                    await peer.flush()

            nursery.start_soon(open_window)
            await peer.wait(lambda: slow.ended)
            await peer.respond(slow)
            assert stuck.reset == 8
            await peer.wait_closed()

    script = on_stream(serve, {SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
    options = TargetOptions(response_timeout=5.0)
    async with open_world(tmp_path, monkeypatch, script, target_options=options) as world:
        await use_h2c(world)
        slow, stuck = world.connect(), world.connect()
        for client, path in ((slow, b"slow"), (stuck, b"stuck")):
            await client.send_all(
                b"POST /%b HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n" % path
                + b"5\r\nhello\r\n"
            )
        await full.wait()
        started = trio.current_time()
        await slow.send_all(b"f\r\n%b\r\n0\r\n\r\n" % bytes(15))
        await stuck.send_all(b"1\r\nx\r\n")
        assert (await read_head(stuck)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - started == pytest.approx(5.0)
        assert (await read_head(slow)).startswith(b"HTTP/1.1 200 ")
        assert trio.current_time() - started == pytest.approx(15.0)


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

    async with open_world(tmp_path, monkeypatch, on_stream(serve)) as world:
        await use_h2c(world)
        first, second = world.connect(), world.connect()
        await first.send_all(GET)
        await first.send_eof()
        assert (await read_all(first)).endswith(b"hello")
        await second.send_all(GET)
        await second.send_eof()
        await cancelled.wait()
        while len(world.logged) < 2:
            await trio.lowlevel.checkpoint()
        assert world.statuses == [200, 499]
