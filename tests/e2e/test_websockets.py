"""WebSockets through the real command: independent clients and servers, and a real browser."""

from __future__ import annotations

import json
import signal
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    WebSocketRequest,
    serve_websocket,
    wrap_client_stream,
)
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, TextMessage
from wsproto.extensions import PerMessageDeflate

from tests.e2e.browser import needs_browser, open_browser
from tests.running import open_command
from tests.scripted import open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.running import Command
    from tests.scripted import Peer, Upstream

CLIENTS = 8
MEGABYTE = 1024 * 1024


@asynccontextmanager
async def open_echo(name: str) -> AsyncIterator[str]:
    """Run a WebSocket server that answers each message with its name and the message.

    Yields:
        Its ``host:port``.
    """

    async def serve(request: WebSocketRequest) -> None:
        protocols = request.proposed_subprotocols
        connection = await request.accept(
            subprotocol=protocols[0] if protocols else None, extra_headers=[(b"Set-Cookie", b"a=1")]
        )
        try:
            while True:
                message = await connection.get_message()
                if isinstance(message, str):
                    await connection.send_message(f"{name} {message}")
                else:
                    await connection.send_message(name.encode() + b" " + message)
        except ConnectionClosed:
            return

    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            partial(serve_websocket, serve, "127.0.0.1", 0, None, max_message_size=4 * MEGABYTE)
        )
        yield f"127.0.0.1:{server.port}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connect(
    command: Command, protocols: list[str] | None = None
) -> AsyncIterator[WebSocketConnection]:
    """Open a WebSocket through the proxy; the library leaves the socket open after some ends."""
    stream = await trio.open_tcp_stream("127.0.0.1", command.port)
    async with stream, trio.open_nursery() as nursery:
        connection = await wrap_client_stream(
            nursery,
            stream,
            f"127.0.0.1:{command.port}",
            "/cable",
            subprotocols=protocols,
            max_message_size=4 * MEGABYTE,
        )
        async with connection:
            yield connection
        nursery.cancel_scope.cancel()


def flags(target: str, upstream: Upstream) -> tuple[str, str]:
    """Return the flags of a deploy whose probes another port answers."""
    return f"--target={target}", f"--health-check-port={upstream.health_port}"


async def receive_end(connection: WebSocketConnection) -> int:
    """Wait for the end of a connection and return its code."""
    with pytest.raises(ConnectionClosed) as closed:
        await connection.get_message()
    assert closed.value.reason is not None
    code: int = closed.value.reason.code
    return code


async def in_flight(command: Command) -> int:
    """Return what ``list`` says is in flight on the only service."""
    (service,) = json.loads((await command.kp("list", "--json")).out)
    count: int = service["in_flight"]
    return count


async def test_messages_of_every_kind(command: Command, upstream: Upstream) -> None:
    async with open_echo("one") as target:
        await command.deploy("web", *flags(target, upstream))
        async with connect(command, ["chat", "other"]) as connection:
            assert connection.subprotocol == "chat"
            assert (b"set-cookie", b"a=1") in connection.handshake_headers
            await connection.send_message("hello")
            assert await connection.get_message() == "one hello"
            large = bytes(range(256)) * (2 * MEGABYTE // 256)
            await connection.send_message(large)
            assert await connection.get_message() == b"one " + large
            await connection.ping(b"still there?")  # returns with the pong
            await connection.send_message("")
            assert await connection.get_message() == "one "
        line = (await command.lines.wait_requests(1))[0]

    assert (line["status"], line["path"], line["target"]) == (101, "/cable", target)
    assert line["resp_content_length"] > 2 * MEGABYTE
    assert "reason" not in line


async def test_a_server_that_refuses(command: Command, upstream: Upstream) -> None:
    """What is no WebSocket server answers as it likes."""
    await command.deploy("web", *upstream.flags())

    rejected = pytest.RaisesExc(
        ConnectionRejected, check=lambda error: (error.status_code, error.body) == (200, b"hello")
    )
    async with await trio.open_tcp_stream("127.0.0.1", command.port) as stream:
        with pytest.RaisesGroup(rejected):
            async with trio.open_nursery() as nursery:
                await wrap_client_stream(nursery, stream, "a.example", "/")

    assert (await command.lines.wait_requests(1))[0]["status"] == 200


async def test_a_redeploy_moves_every_client(command: Command, upstream: Upstream) -> None:
    """Each is told 1001 in the drain, and finds the new target when it comes back."""
    async with open_echo("old") as old, open_echo("new") as new:
        await command.deploy("web", *flags(old, upstream))
        codes: list[int] = []
        ready = 0
        all_ready = trio.Event()

        async def be_client(number: int) -> None:
            nonlocal ready
            async with connect(command) as connection:
                await connection.send_message(f"{number}")
                assert await connection.get_message() == f"old {number}"
                ready += 1
                if ready == CLIENTS:
                    all_ready.set()
                codes.append(await receive_end(connection))
            async with connect(command) as connection:
                await connection.send_message(f"{number}")
                assert await connection.get_message() == f"new {number}"

        async with trio.open_nursery() as nursery:
            for number in range(CLIENTS):
                nursery.start_soon(be_client, number)
            await all_ready.wait()
            assert await in_flight(command) == CLIENTS
            await command.deploy("web", *flags(new, upstream), "--drain-timeout=2s")
        lines = await command.lines.wait_requests(2 * CLIENTS)

    assert codes == [1001] * CLIENTS
    assert (
        sorted(line.get("reason", "") for line in lines) == [""] * CLIENTS + ["drained"] * CLIENTS
    )
    assert {line["status"] for line in lines} == {101}


async def test_an_idle_websocket_is_closed(command: Command, upstream: Upstream) -> None:
    async with open_echo("one") as target:
        await command.deploy("web", *flags(target, upstream), "--websocket-idle-timeout=100ms")
        async with connect(command) as connection:
            assert await receive_end(connection) == 1001
        assert (await command.lines.wait_requests(1))[0]["reason"] == "websocket_idle"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_closes_websockets(
    directory: Path, upstream: Upstream, number: signal.Signals
) -> None:
    async with (
        open_echo("one") as target,
        open_command(directory, "--shutdown-timeout=3s", stop=False) as command,
    ):
        await command.deploy("web", *flags(target, upstream))
        async with connect(command) as connection:
            command.process.send_signal(number)
            assert await receive_end(connection) == 1001
        assert await command.wait() == 0
        assert command.errors == b""


# --- a browser -----------------------------------------------------------------------------------

PAGE = b"""<!doctype html><title>Talk</title><script>
function talk(before) {
  const socket = new WebSocket(`ws://${location.host}/cable`);
  socket.onopen = () => socket.send(before);
  socket.onmessage = (event) => socket.send(`heard ${event.data}`.slice(0, 100));
  socket.onclose = (event) => talk(`${event.code} ${event.wasClean}`);
}
talk("first");
</script>"""


@attrs.define(eq=False)
class Application:
    """A target with a page and a WebSocket that echoes, compressed as browsers like it.

    Attributes:
        name: What its answers begin with.
        heard: Every message it got.
        extensions: What each handshake agreed on.
    """

    name: str
    heard: list[str] = attrs.field(factory=list)
    extensions: list[str] = attrs.field(factory=list)
    _news: trio.Event = attrs.field(factory=trio.Event)

    async def wait_heard(self, count: int) -> None:
        while len(self.heard) < count:
            await self._news.wait()

    async def __call__(self, peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            if request.get(b"upgrade"):
                await self._talk(peer, request.head)
                return
            body = PAGE if request.target == b"/" else b""
            await peer.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )

    async def _talk(self, peer: Peer, head: bytes) -> None:
        connection = WSConnection(ConnectionType.SERVER)
        connection.receive_data(head)
        next(connection.events())
        deflate = PerMessageDeflate()
        await peer.send(connection.send(AcceptConnection(extensions=[deflate])))
        self.extensions.append("deflate" if deflate.enabled() else "none")
        while data := await peer.receive_some():
            connection.receive_data(data)
            for event in connection.events():
                if isinstance(event, TextMessage):
                    self.heard.append(event.data)
                    self._news.set()
                    self._news = trio.Event()
                    # Three rounds are enough; then the connection is silent.
                    if len(self.heard) <= 3:
                        answer = TextMessage(f"{self.name} {event.data}")
                        await peer.send(connection.send(answer))
                elif isinstance(event, CloseConnection):
                    await peer.send(connection.send(event.response()))
                    return


@needs_browser
async def test_a_browser_reconnects_to_the_new_target(command: Command) -> None:
    old, new = Application("old"), Application("new")
    async with open_upstream(old) as first, open_upstream(new) as second:
        await command.deploy("web", *first.flags())
        async with open_browser(f"http://127.0.0.1:{command.port}/"):
            await old.wait_heard(4)

            await command.deploy("web", *second.flags(), "--drain-timeout=3s")

            await new.wait_heard(4)
        line = await command.lines.wait_for(lambda line: line.get("reason") == "drained")

    assert old.heard[:2] == ["first", "heard old first"]
    assert new.heard[:2] == ["1001 true", "heard new 1001 true"]
    assert old.extensions == new.extensions == ["deflate"]
    assert (line["status"], line["path"]) == (101, "/cable")
