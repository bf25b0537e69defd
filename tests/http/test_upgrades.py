"""Switches of protocol through a whole proxy: who may switch, what passes, what a drain does."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy import PauseOptions, RolloutOptions, RolloutSplit
from kamal_proxy.errors import ResumedError
from tests.http.stepping import attempt_every_step, serve_until, visit_and_leave
from tests.http.streams import read_head
from tests.pairs import Steps
from tests.running import open_embedded
from tests.scripted import ConnectionCut, ok, open_client, open_upstream
from tests.websockets import CLOSE, GOING_AWAY, TEXT, UPGRADE, accept, frame, read_frames

if TYPE_CHECKING:
    from pathlib import Path

    from kamal_proxy import DeployOptions
    from tests.http.streams import World
    from tests.running import Embedded, Line
    from tests.scripted import Client, Peer, Script, Upstream

RAW = b"GET /raw HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: x-raw\r\n\r\n"
RAW_ANSWER = b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: x-raw\r\n\r\n"
ANSWER = frame(CLOSE, b"\x03\xe9", masked=True)
MEGABYTE = 1024 * 1024


def answering(upstream: Upstream, answer: bytes) -> Script:
    """Return a script that reads a request, answers, and leaves the connection to the test."""

    async def serve(peer: Peer) -> None:
        request = await peer.receive_request()
        assert request is not None
        upstream.record(request)
        await peer.send(answer)
        await trio.sleep_forever()

    return serve


async def switch(
    client: Client, upstream: Upstream, request: bytes = UPGRADE, answer: bytes = b""
) -> Peer:
    """Have a connection switched to the protocol of the request; return the target's end."""
    count = len(upstream.peers)
    default = accept() if b"websocket" in request else RAW_ANSWER
    upstream.script(answering(upstream, answer or default))
    await client.send(request)
    head = await client.receive_until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    return await upstream.wait_peers(count + 1)


def changed(options: DeployOptions, **target: Any) -> DeployOptions:
    """Return deploy options with others for the targets."""
    return attrs.evolve(options, target_options=attrs.evolve(options.target_options, **target))


def upgraded(proxy: Embedded) -> dict[str, float]:
    """Return how many upgraded connections the metrics say are open, by protocol."""
    text = proxy.proxy.metrics()[0].decode()
    lines = r'^kamal_proxy_upgraded_connections{.*?protocol="(.*?)".*?} (.*)$'
    found = re.findall(lines, text, re.MULTILINE)
    return {protocol: float(value) for protocol, value in found}


async def line_of(proxy: Embedded, path: str) -> Line:
    return await proxy.lines.wait_for(lambda line: line.get("path") == path and "status" in line)


# --- the switch ----------------------------------------------------------------------------------


async def test_both_heads(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(upstream.options())
    answer = accept(
        headers=b"Sec-WebSocket-Protocol: chat\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
        b"Keep-Alive: max=5\r\nConnection: X-Private\r\nX-Private: 1\r\nContent-Length: 0\r\n"
    )
    upstream.script(answering(upstream, answer))

    await client.send(
        UPGRADE.replace(
            b"Connection: Upgrade",
            b"Connection: keep-alive, upgrade, X-Own\r\nX-Own: 1\r\nKeep-Alive: 5\r\n"
            b"Sec-WebSocket-Protocol: chat",
        )
    )
    head = (await client.receive_until(b"\r\n\r\n")).decode().split("\r\n")

    assert head[0] == "HTTP/1.1 101 Switching Protocols"
    assert sorted(head[1:-2]) == [
        "Connection: Upgrade",
        "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
        "Sec-WebSocket-Protocol: chat",
        "Set-Cookie: a=1",
        "Set-Cookie: b=2",
        "Upgrade: websocket",
    ]
    (request,) = upstream.requests
    assert request.get(b"connection") == [b"Upgrade"]
    assert request.get(b"upgrade") == [b"websocket"]
    assert request.get(b"sec-websocket-protocol") == [b"chat"]
    assert request.get(b"sec-websocket-key") == [b"dGhlIHNhbXBsZSBub25jZQ=="]
    assert request.get(b"x-forwarded-for") == [b"127.0.0.1"]
    assert (request.get(b"x-own"), request.get(b"keep-alive")) == ([], [])


@pytest.mark.parametrize("websocket", [True, False])
async def test_bytes_that_come_with_the_heads(
    proxy: Embedded, upstream: Upstream, client: Client, websocket: bool
) -> None:
    await proxy.deploy(upstream.options())
    request, answer = (UPGRADE, accept()) if websocket else (RAW, RAW_ANSWER)
    upstream.script(answering(upstream, answer + b"GET / from the target\0\xff"))

    await client.send(request + b"HTTP/1.1 from the client\0\xff")
    await client.receive_until(b"\r\n\r\n")

    assert await client.receive_exactly(23) == b"GET / from the target\0\xff"
    peer = await upstream.wait_peers(1)
    assert await peer.receive_exactly(26) == b"HTTP/1.1 from the client\0\xff"
    everything = bytes(range(256)) * 1000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, everything)
        nursery.start_soon(peer.send, everything[::-1])
        assert await client.receive_exactly(256_000) == everything[::-1]
        assert await peer.receive_exactly(256_000) == everything


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_request_with_a_body(
    proxy: Embedded, upstream: Upstream, client: Client, chunked: bool
) -> None:
    """It belongs to HTTP to its end, what follows to the new protocol; it is never buffered."""
    await proxy.deploy(changed(upstream.options(), buffer_requests=True, buffer_responses=True))
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 4"
    body = b"4\r\nbody\r\n0\r\n\r\n" if chunked else b"body"
    head = RAW.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\n" + framing + b"\r\n\r\n")

    peer = await switch(client, upstream, head + body + b"raw")

    assert await peer.receive_exactly(3) == b"raw"
    assert upstream.requests[0].body == b"body"
    await peer.send(b"back")
    assert await client.receive_exactly(4) == b"back"


async def test_informational_responses_before_the_switch(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n"
    upstream.script(answering(upstream, hints + RAW_ANSWER + b"x"))

    await client.send(RAW)

    seen = await client.receive_until(b"\r\n\r\n")
    assert seen == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    assert await client.receive_exactly(1) == b"x"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelined", [True, False])
async def test_a_target_that_refuses_answers_as_usual(
    proxy: Embedded, upstream: Upstream, client: Client, pipelined: bool
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 403 No\r\nX-Why: 1\r\nContent-Length: 2\r\n\r\nno")
        later = await peer.receive_request()
        assert later is not None
        upstream.record(later)
        await peer.send(ok(b"later"))

    upstream.script(serve)
    later = b"GET /later HTTP/1.1\r\nHost: a.example\r\n\r\n"

    await client.send(UPGRADE + later * pipelined)
    refused = await client.receive_response()
    await client.send(later * (not pipelined))

    assert (refused.status, refused.body, refused.get(b"x-why")) == (403, b"no", [b"1"])
    assert (await client.receive_response()).body == b"later"
    assert upstream.requests[0].target == b"/later"
    assert len(upstream.peers) == 1


@pytest.mark.parametrize(
    ("request_head", "answer"),
    [
        pytest.param(UPGRADE.replace(b"Upgrade: websocket\r\n", b""), accept(), id="not asked"),
        pytest.param(UPGRADE.replace(b"Connection: Upgrade\r\n", b""), accept(), id="field only"),
        pytest.param(UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"), accept(), id="HTTP/1.0"),
        pytest.param(UPGRADE, RAW_ANSWER, id="another protocol"),
        pytest.param(UPGRADE, b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\n\r\n", id="no protocol"),
        pytest.param(
            UPGRADE.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
            b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
            id="h2c",
        ),
    ],
)
async def test_a_switch_that_nobody_wanted(
    proxy: Embedded, upstream: Upstream, client: Client, request_head: bytes, answer: bytes
) -> None:
    await proxy.deploy(upstream.options())
    upstream.script(answering(upstream, answer))

    await client.send(request_head)

    assert (await client.receive_response()).status == 502
    line = await line_of(proxy, "/ws")
    assert (line["status"], line["reason"]) == (502, "target_failed")
    await upstream.peers[0].wait_closed()
    assert upgraded(proxy) == {}
    if b"HTTP/1.1" in request_head:
        assert (await client.get()).body == b"hello"  # the client's connection goes on


async def test_a_switch_before_the_request_was_complete(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def serve(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await peer.send(RAW_ANSWER)
        await trio.sleep_forever()

    upstream.script(serve)

    await client.send(RAW.replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\npart"))

    assert (await client.receive_response()).status == 502
    assert (await line_of(proxy, "/raw"))["reason"] == "target_failed"


@pytest.mark.parametrize(
    "change",
    [
        (b"Upgrade: websocket", b"Upgrade: h2c"),
        (b"Upgrade: websocket", b"Upgrade: websocket, H2C"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"Connection: Upgrade", b"Connection: keep-alive"),
    ],
)
async def test_what_is_no_wish_to_switch_is_not_passed_on(
    proxy: Embedded, upstream: Upstream, client: Client, change: tuple[bytes, bytes]
) -> None:
    await proxy.deploy(upstream.options())

    response = await client.request(UPGRADE.replace(*change))

    assert (response.status, response.body) == (200, b"hello")
    assert upstream.requests[0].get(b"upgrade") == []
    assert upstream.requests[0].get(b"connection") == []
    assert upstream.requests[0].get(b"sec-websocket-version") == [b"13"]  # like any other field


async def test_a_stale_connection_is_replaced(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    read = trio.Event()

    async def answer_once(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(ok(b"first"))
        await peer.receive_request()
        read.set()  # and closes, as one does whose idle timeout passes at that moment

    upstream.script(answer_once, answering(upstream, accept() + b"\x81\x00"))
    assert (await client.get()).body == b"first"

    await client.send(UPGRADE)
    assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")

    assert read.is_set()
    assert await client.receive_exactly(2) == b"\x81\x00"
    assert len(upstream.peers) == 2


# --- while it lasts ------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["client", "target"])
async def test_back_pressure(proxy: Embedded, upstream: Upstream, slow: str) -> None:
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port, receive_buffer=65536) as client:
        peer = await switch(client, upstream, RAW)
        reader, writer = (client, peer) if slow == "client" else (peer, client)
        total = 64 * MEGABYTE
        async with trio.open_nursery() as nursery:
            sending = trio.CancelScope()

            async def send() -> None:
                with sending:
                    await writer.send(bytes(total))

            nursery.start_soon(send)
            # The other direction shows that the proxy had its turns meanwhile.
            for _ in range(200):
                await reader.send(b"x")
                await writer.receive_exactly(1)
            sending.cancel()
            writer.shutdown_write()
            got = len(await reader.receive_eof())
        # At most what kernels hold: two send and two receive buffers.
        assert 0 < got < total / 2


@pytest.mark.parametrize("first", ["client", "target"])
async def test_half_close(proxy: Embedded, upstream: Upstream, client: Client, first: str) -> None:
    await proxy.deploy(upstream.options())
    peer = await switch(client, upstream, RAW)
    early, late = (client, peer) if first == "client" else (peer, client)

    await early.send(b"a question")
    early.shutdown_write()
    assert await late.receive_eof() == b"a question"
    await late.send(b"an answer " * 10_000)
    late.shutdown_write()
    assert await early.receive_eof() == b"an answer " * 10_000

    line = await line_of(proxy, "/raw")
    assert line["resp_content_length"] == (100_000 if first == "client" else 10)
    assert "reason" not in line
    assert upgraded(proxy) == {"other": 0}


@pytest.mark.parametrize("half_closed", [True, False])
@pytest.mark.parametrize("request_head", [UPGRADE, RAW])
@pytest.mark.parametrize("first", ["client", "target"])
async def test_a_reset_ends_the_other_side(
    proxy: Embedded, upstream: Upstream, first: str, request_head: bytes, half_closed: bool
) -> None:
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client:
        peer = await switch(client, upstream, request_head)
        early, late = (client, peer) if first == "client" else (peer, client)
        if half_closed:
            early.shutdown_write()
            assert await late.receive_eof() == b""

        early.reset()

        await late.wait_closed()
        line = await line_of(proxy, "/raw" if request_head == RAW else "/ws")
        assert (line["status"], line["resp_content_length"]) == (101, 0)
        await proxy.wait_streams(0)


async def test_log_line_and_metrics(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(upstream.options())
    peer = await switch(client, upstream, answer=accept() + frame(TEXT, b"early"))
    await peer.send(frame(TEXT, b"late"))
    await client.receive_exactly(len(frame(TEXT, b"early") + frame(TEXT, b"late")))

    assert upgraded(proxy) == {"websocket": 1}
    assert proxy.proxy.services()[0].in_flight == 1
    assert proxy.lines.requests == []
    client.shutdown_write()
    peer.close()
    line = await line_of(proxy, "/ws")

    assert (line["status"], line["resp_content_length"]) == (101, 13)
    assert (line["service"], line["target"]) == ("web", upstream.target)
    assert "reason" not in line
    assert upgraded(proxy) == {"websocket": 0}
    assert proxy.proxy.services()[0].in_flight == 0
    assert "websocket_drain_closes_total{" not in proxy.proxy.metrics()[0].decode()


async def test_websocket_idle_timeout(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(changed(upstream.options(), websocket_idle_timeout=0.05))
    peer = await switch(client, upstream)

    assert await client.receive_exactly(4) == GOING_AWAY
    await client.send(ANSWER)
    assert await peer.receive_exactly(len(ANSWER)) == ANSWER
    peer.close()

    assert await client.receive_eof() == b""
    client.close()
    line = await line_of(proxy, "/ws")
    assert (line["status"], line["reason"]) == (101, "websocket_idle")


@pytest.mark.parametrize(
    ("slow", "reason"), [("client", "client_stalled"), ("target", "target_timeout")]
)
async def test_stall(upstream: Upstream, slow: str, reason: str) -> None:
    async with open_embedded(stall_timeout=0.2) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as client:
            peer = await switch(client, upstream, RAW)
            with pytest.raises(OSError):  # noqa: PT011 - a reset, or a broken pipe
                await (peer if slow == "client" else client).send(bytes(64 * MEGABYTE))
            line = await line_of(proxy, "/raw")
            assert (line["status"], line["reason"]) == (101, reason)
            assert upgraded(proxy) == {"other": 0}


# --- drains --------------------------------------------------------------------------------------


async def test_a_redeploy_closes_websockets_politely(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    peer = await switch(client, upstream)
    async with open_upstream() as new, trio.open_nursery() as nursery:
        deployed = trio.Event()

        async def deploy() -> None:
            await proxy.deploy(new.options(drain_timeout=1.0))
            deployed.set()

        nursery.start_soon(deploy)
        assert await client.receive_exactly(4) == GOING_AWAY
        assert not deployed.is_set()  # it is in flight to its end
        await client.send(ANSWER)
        assert await peer.receive_exactly(len(ANSWER)) == ANSWER
        await peer.send(frame(CLOSE, b"\x03\xe9"))
        peer.close()
        assert await client.receive_eof() == b""
        client.close()
        await deployed.wait()

    line = await line_of(proxy, "/ws")
    assert (line["status"], line["reason"], line["resp_content_length"]) == (101, "drained", 4)
    text = proxy.proxy.metrics()[0].decode()
    assert 'drain_closes_total{result="clean",service="web"} 1' in text


async def test_a_client_that_does_not_answer_is_cut_at_the_deadline_at_last(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    peer = await switch(client, upstream)
    async with open_upstream() as new:
        await proxy.deploy(new.options(drain_timeout=0.3))
    (told,) = read_frames(await peer.receive_eof())

    assert await client.receive_eof() == GOING_AWAY
    assert (told.opcode, told.masked, told.payload) == (CLOSE, True, b"\x03\xe9")
    assert (await line_of(proxy, "/ws"))["reason"] == "drained"
    text = proxy.proxy.metrics()[0].decode()
    assert 'drain_closes_total{result="cut",service="web"} 1' in text


async def test_another_protocol_lives_until_the_deadline(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    peer = await switch(client, upstream, RAW)
    async with open_upstream() as new, trio.open_nursery() as nursery:
        nursery.start_soon(proxy.deploy, new.options(drain_timeout=0.5))
        await proxy.lines.wait_for(lambda line: line.get("targets") == [new.target])
        await peer.send(b"still here")
        assert await client.receive_exactly(10) == b"still here"
        assert await client.receive_eof() == b""

    line = await line_of(proxy, "/raw")
    assert (line["status"], line["reason"], line["resp_content_length"]) == (101, "drained", 10)


async def test_a_drain_that_begins_before_the_101(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    release = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await release.wait()
        await peer.send(accept())
        await peer.wait_closed()

    upstream.script(serve)
    await client.send(UPGRADE)
    await upstream.wait_peers(1)
    async with open_upstream() as new, trio.open_nursery() as nursery:
        nursery.start_soon(proxy.deploy, new.options(drain_timeout=1.0))
        await proxy.lines.wait_for(lambda line: line.get("targets") == [new.target])
        release.set()
        assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await client.receive_exactly(4) == GOING_AWAY
        await client.send(ANSWER)
        client.shutdown_write()
        assert await client.receive_eof() == b""

    assert (await line_of(proxy, "/ws"))["reason"] == "drained"


async def test_a_drain_called_off_leaves_websockets_alone(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    """And one that begins before the 101, and is over and forgotten by then, as well."""
    await proxy.deploy(upstream.options())
    release = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await release.wait()
        await peer.send(accept())
        await trio.sleep_forever()

    async with open_client(proxy.port) as early, trio.open_nursery() as nursery:
        peer = await switch(early, upstream)
        upstream.script(serve)
        await client.send(UPGRADE)
        await upstream.wait_peers(2)

        async def pause() -> None:
            with pytest.raises(ResumedError):
                await proxy.proxy.pause("web", PauseOptions(drain_timeout=1000))

        nursery.start_soon(pause)
        await proxy.lines.wait_for_message("Service paused")
        await proxy.proxy.resume("web")
        release.set()
        assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        for wire, other in ((early, peer), (client, upstream.peers[1])):
            await other.send(frame(TEXT, b"still here"))
            assert await wire.receive_exactly(12) == frame(TEXT, b"still here")
            other.close()
            assert await wire.receive_eof() == b""
            wire.shutdown_write()
    assert all("reason" not in line for line in await proxy.lines.wait_requests(2))
    assert b"drain_closes_total{" not in proxy.proxy.metrics()[0]


async def test_remove_leaves_them(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(upstream.options())
    peer = await switch(client, upstream)

    await proxy.proxy.remove("web")

    await client.send(b"\x81\x80" + bytes(4))
    assert await peer.receive_exactly(6) == b"\x81\x80" + bytes(4)


async def test_shutdown_closes_websockets(upstream: Upstream) -> None:
    async with open_embedded(shutdown_timeout=3.0) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as client:
            peer = await switch(client, upstream)
            proxy.proxy.stop()
            assert await client.receive_exactly(4) == GOING_AWAY
            await client.send(ANSWER)
            await peer.receive_exactly(len(ANSWER))
            peer.close()
            assert await client.receive_eof() == b""
            client.close()
            assert (await line_of(proxy, "/ws"))["reason"] == "drained"


async def test_shutdown_closes_a_websocket_whose_request_was_still_arriving(
    upstream: Upstream,
) -> None:
    async with open_embedded(shutdown_timeout=3.0) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.port) as client:
            await client.send(UPGRADE[:-2])
            await proxy.wait_streams(1)
            proxy.proxy.stop()
            await wait_all_tasks_blocked()  # it has looked for what is idle
            await switch(client, upstream, UPGRADE[-2:], accept())
            assert await client.receive_exactly(4) == GOING_AWAY
            client.close()
            assert (await line_of(proxy, "/ws"))["reason"] == "drained"


# --- together with other features ----------------------------------------------------------------


async def test_a_rollout_takes_websockets_too(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    async with open_upstream() as new:
        await proxy.proxy.deploy_rollout("web", RolloutOptions(targets=(new.target,)))
        await proxy.proxy.set_rollout("web", RolloutSplit(percentage=0, allowlist=("me",)))
        request = UPGRADE.replace(b"Upgrade: w", b"Cookie: kamal-rollout=me\r\nUpgrade: w")
        peer = await switch(client, new, request)
        await peer.send(b"\x81\x00")
        assert await client.receive_exactly(2) == b"\x81\x00"
        peer.close()


async def test_a_target_that_ends_instead_of_switching(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def leave(peer: Peer) -> None:
        await peer.receive_request()

    upstream.script(leave)
    await client.send(UPGRADE)

    assert (await client.receive_response()).status == 502


async def test_a_target_that_ends_within_the_head_of_its_switch(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())

    async def leave(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(accept()[:-2])

    upstream.script(leave)
    await client.send(UPGRADE)

    try:
        status = (await client.receive_response()).status
    except ConnectionCut as cut:
        status = cut.status
    assert status == 502


# --- cancellation --------------------------------------------------------------------------------


async def switch_and_speak(stream: trio.SocketStream) -> None:
    """Be a target that switches, answers, and closes after the client did."""
    await read_head(stream)
    await stream.send_all(accept() + frame(TEXT, b"early"))
    async for data in stream:
        await stream.send_all(frame(TEXT, bytes(data)))


async def speak(client: trio.SocketStream) -> None:
    """Be a client that asks for a switch, and speaks before and after it."""
    await client.send_all(UPGRADE + frame(TEXT, b"one", masked=True))
    await read_head(client)
    await client.send_all(frame(TEXT, b"two", masked=True))
    await client.receive_some()


def test_cancelled_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays open, in flight or unlogged, and no drain fails for it."""

    async def attempt(here: World, step: int) -> bool:
        stream, client = here.pair()
        visit = partial(visit_and_leave, speak, client)
        cancelled = await serve_until(here, stream, visit, step, requests=1, statuses={101, 499})
        assert len(here.poller) == 0
        assert b"_upgraded_connections{" not in _open(here.server.metrics.render("")[0])
        return cancelled

    assert attempt_every_step(tmp_path, monkeypatch, attempt, answer=switch_and_speak) > 10


def _open(metrics: bytes) -> bytes:
    """Return the lines of metrics that are not zero."""
    return b"\n".join(line for line in metrics.splitlines() if not line.endswith((b" 0", b" 0.0")))


@pytest.mark.parametrize("act", ["drain", "abort"])
def test_a_drain_or_an_end_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """From the head of the request to the last byte of the tunnel."""

    async def attempt(here: World, step: int) -> bool:
        client = here.connect()
        reached = False

        def interfere() -> None:
            nonlocal reached
            reached = True
            if act == "abort":
                here.server.abort()
            else:
                here.nursery.start_soon(here.deployment.drain, 60)

        steps = Steps(step, interfere)
        trio.lowlevel.add_instrument(steps)
        await visit_and_leave(speak, client)
        await trio.sleep(100)
        trio.lowlevel.remove_instrument(steps)
        assert here.server.connections == 0
        assert "Connection failed" not in here.lines.messages
        assert len(here.logged) <= 1
        return reached

    assert attempt_every_step(tmp_path, monkeypatch, attempt, answer=switch_and_speak) > 10
