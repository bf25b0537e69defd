"""The other ends of a proxy's connections, byte by byte: scripted targets, and a raw client.

A test says what a target does on each connection as a coroutine that gets the :class:`Peer`; the
upstream's probes go to a port of their own, so a script only ever sees real traffic. Everything is
Trio on 127.0.0.1, and everything that was received is kept. Nothing here waits for time to pass.

    async with open_upstream(respond(b"hello")) as upstream:       # every connection, every request
        upstream.script(close_after_reading)                       # the next connection does this
        await proxy.deploy(upstream.options("web"))
        async with open_client(proxy.http_port) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            response = await client.receive_response()
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h11
import trio

from kamal_proxy import (
    DeploymentOptions,
    DeployOptions,
    HealthCheckOptions,
    ServiceOptions,
    TargetOptions,
)

LOCALHOST = "127.0.0.1"
TIME_LIMIT = 25.0  # seconds; a test that hangs must fail, not stop the run
MAX_HEAD = 1024 * 1024  # what the tests' own parsers accept


class ConnectionCut(Exception):
    """The connection ended in the middle of a message; holds what had arrived of it.

    Attributes:
        status: Status of the response, 0 if its head had not arrived whole.
        body: The part of the body that had arrived.
        reset: Whether it ended with a reset.
    """

    def __init__(self, status: int, body: bytes, *, reset: bool) -> None:
        super().__init__(status, body, reset)
        self.status = status
        self.body = body
        self.reset = reset


@attrs.frozen
class Request:
    """A request as a target received it: parsed, and its head as raw bytes."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]
    head: bytes

    def get(self, name: bytes) -> list[bytes]:
        """Return the values of a header (lower-case name)."""
        return [value for key, value in self.headers if key == name]


@attrs.frozen
class Response:
    """A response as a client received it; ``informational`` are the 1xx before it."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]
    informational: list[int]

    def get(self, name: bytes) -> list[bytes]:
        """Return the values of a header (lower-case name)."""
        return [value for key, value in self.headers if key == name]


class Wire:
    """One end of a TCP connection, with what it has received so far."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.received = bytearray()  # every byte, also those that were consumed
        self._unread = bytearray()

    async def send(self, data: bytes) -> None:
        """Send all of ``data``."""
        view = memoryview(data)
        while view:
            view = view[await self.sock.send(view) :]

    async def receive_some(self) -> bytes:
        """Return the next bytes, ``b""`` at the end of the stream. Raises OSError on a reset."""
        if self._unread:
            data = bytes(self._unread)
            self._unread.clear()
            return data
        data = await self._receive()
        self.received += data
        return data

    async def _receive(self) -> bytes:
        return await self.sock.recv(65536)

    async def receive_until(self, end: bytes) -> bytes:
        """Return everything up to and including ``end``."""
        data = b""
        while end not in data:
            more = await self.receive_some()
            if not more:
                raise ConnectionCut(0, data, reset=False)
            data += more
        cut = data.index(end) + len(end)
        self._unread += data[cut:]
        return data[:cut]

    async def receive_exactly(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        data = b""
        while len(data) < count:
            more = await self.receive_some()
            if not more:
                raise ConnectionCut(0, data, reset=False)
            data += more
        self._unread += data[count:]
        return data[:count]

    async def receive_eof(self) -> bytes:
        """Return everything up to the end of the stream. Raises ConnectionCut on a reset."""
        data = b""
        try:
            while more := await self.receive_some():
                data += more
        except OSError as error:
            raise ConnectionCut(0, data, reset=True) from error
        return data

    async def wait_closed(self) -> None:
        """Wait until the other side has closed, one way or the other."""
        try:
            while await self.receive_some():
                pass
        except OSError:
            return

    @property
    def unacknowledged(self) -> int:
        """How many bytes the other side's kernel has not taken yet: it has no room for them."""
        (count,) = struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))
        assert isinstance(count, int)
        return count

    def shutdown_write(self) -> None:
        """Send the end of the stream; reading goes on."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close so that the other side gets a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close."""
        self.sock.close()

    def unread(self, data: bytes) -> None:
        """Give back bytes that belong to the next message."""
        self._unread[:0] = data


class Peer(Wire):
    """A connection that the proxy opened to a scripted upstream."""

    async def receive_request(self) -> Request | None:
        """Read a whole request; None when the proxy closed before it had sent one."""
        parser = h11.Connection(h11.SERVER, MAX_HEAD)
        start = len(self.received) - len(self._unread)
        body = b""
        head: h11.Request | None = None
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await self.receive_some()
                if not data:
                    return None
                parser.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self.unread(parser.trailing_data[0])
                raw = bytes(self.received[start:])
                return Request(
                    head.method,
                    head.target,
                    list(head.headers),
                    body,
                    list(event.headers),
                    raw[: raw.index(b"\r\n\r\n") + 4],
                )
            else:
                raise AssertionError(f"unexpected {event!r}")


Script = Callable[[Peer], Awaitable[None]]


class Upstream:
    """A listening target. See :func:`open_upstream`.

    Attributes:
        target: Its ``host:port``, for a deploy.
        port: Its port.
        health_port: The port that answers probes.
        health: Status that probes get; may be changed at any time.
        probes: How many probes it has answered.
        peers: Every connection it accepted, oldest first.
        requests: Every request read by :func:`respond` or :meth:`Peer.receive_request` scripts
            that record it with :meth:`record`.
    """

    def __init__(
        self, listener: trio.socket.SocketType, health: trio.socket.SocketType, default: Script
    ) -> None:
        self._listener = listener
        self._health_listener = health
        self._default = default
        self._next: deque[Script] = deque()
        self._news = trio.Event()
        self.port: int = listener.getsockname()[1]
        self.health_port: int = health.getsockname()[1]
        self.target = f"{LOCALHOST}:{self.port}"
        self.health = 200
        self.probes = 0
        self.peers: list[Peer] = []
        self.requests: list[Request] = []

    def script(self, *scripts: Script) -> None:
        """Say what the next connections do, one script each; later ones do the default again."""
        self._next.extend(scripts)

    def record(self, request: Request) -> None:
        """Keep a request and wake those who wait for it."""
        self.requests.append(request)
        self._tell()

    async def wait_peers(self, count: int) -> Peer:
        """Wait until that many connections were accepted; return the last of them."""
        while len(self.peers) < count:
            await self._news.wait()
        return self.peers[count - 1]

    async def wait_requests(self, count: int) -> Request:
        """Wait until that many requests were recorded; return the last of them."""
        while len(self.requests) < count:
            await self._news.wait()
        return self.requests[count - 1]

    async def wait_probes(self, count: int) -> None:
        """Wait until that many probes were answered."""
        while self.probes < count:
            await self._news.wait()

    def options(self, service: str = "web", **options: Any) -> DeployOptions:
        """Build the options of a deploy to this upstream; see :func:`deploy_options`."""
        return deploy_options(service, [self], **options)

    def flags(self) -> tuple[str, str]:
        """Return the flags of the deploy command for this upstream."""
        return f"--target={self.target}", f"--health-check-port={self.health_port}"

    def stop_listening(self) -> None:
        """Refuse connections from now on."""
        self._listener.close()

    async def _accept(self, listener: trio.socket.SocketType, serve: Script) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except (trio.ClosedResourceError, OSError):
                    return
                # As servers do; or the second of two sends would wait for an acknowledgement.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                nursery.start_soon(self._serve, Peer(sock), serve)

    async def _serve(self, peer: Peer, serve: Script) -> None:
        with peer.sock:
            try:
                await serve(peer)
            except OSError:
                return  # the proxy broke the connection; the test sees that at its own end

    async def _play(self, peer: Peer) -> None:
        script = self._next.popleft() if self._next else self._default
        self.peers.append(peer)
        self._tell()
        await script(peer)

    async def _answer_probes(self, peer: Peer) -> None:
        while await peer.receive_request() is not None:
            await peer.send(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % self.health)
            self.probes += 1
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


@attrs.define
class Held:
    """A script that answers a request when it is told to."""

    upstream: Upstream
    release: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, peer: Peer) -> None:
        received = await peer.receive_request()
        assert received is not None
        self.upstream.record(received)
        await self.release.wait()
        await peer.send(ok(b"held"))


@asynccontextmanager
async def open_upstream(default: Script | None = None, *, port: int = 0) -> AsyncIterator[Upstream]:
    """Listen as a target for the length of a block.

    Args:
        default: What connections do that have no script of their own; by default they answer
            every request with 200 and the body ``hello``.
        port: Port to listen on; 0 lets the kernel choose.
    """
    with listen(port) as listener, listen() as health:
        upstream = Upstream(listener, health, default or _hold)
        if default is None:
            upstream._default = upstream_responder(upstream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_hanging_test)
            nursery.start_soon(upstream._accept, listener, upstream._play)
            nursery.start_soon(upstream._accept, health, upstream._answer_probes)
            yield upstream
            nursery.cancel_scope.cancel()


async def fail_hanging_test() -> None:
    """Fail after the time limit; runs in the background of what tests open."""
    await trio.sleep(TIME_LIMIT)
    raise AssertionError(f"the test has not ended after {TIME_LIMIT:g} seconds")


def listen(port: int = 0) -> trio.socket.SocketType:
    """Return a listening socket."""
    sock = socket.create_server((LOCALHOST, port), backlog=256)
    return trio.socket.from_stdlib_socket(sock)


async def _hold(peer: Peer) -> None:
    await peer.wait_closed()


def upstream_responder(upstream: Upstream, body: bytes = b"hello") -> Script:
    """Return a script that records each request and answers it with 200."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            upstream.record(request)
            await peer.send(ok(b"" if request.method == b"HEAD" else body, len(body)))

    return serve


def respond(body: bytes) -> Script:
    """Return a script that answers each request of a connection with 200 and ``body``."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            await peer.send(ok(b"" if request.method == b"HEAD" else body, len(body)))

    return serve


def reply(data: bytes, *, then: Callable[[Peer], object] | None = None) -> Script:
    """Return a script that reads one whole request, sends ``data`` as it is, and closes.

    Args:
        data: Raw bytes to send.
        then: How the connection ends: ``Peer.close`` (the default) or ``Peer.reset``.
    """

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(data)
        (then or Peer.close)(peer)

    return serve


def ok(body: bytes, length: int | None = None) -> bytes:
    """Return a raw 200 response with a length."""
    length = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (length, body)


def deploy_options(
    service: str,
    upstreams: Iterable[Upstream],
    *,
    hosts: Iterable[str] = (),
    path_prefixes: Iterable[str] = (),
    strip_prefix: bool = True,
    response_timeout: float = 30.0,
    deploy_timeout: float = 10.0,
    drain_timeout: float = 10.0,
    force: bool = False,
    forward_headers: bool | None = None,
    interval: float = 60.0,
    **target_options: Any,
) -> DeployOptions:
    """Build deploy options whose probes go to the health port of the first upstream.

    Healthy targets are hardly ever probed again, so that probes are not among the open streams.
    What is not named here is a field of ``TargetOptions``.
    """
    upstreams = list(upstreams)
    return DeployOptions(
        service=service,
        targets=tuple(upstream.target for upstream in upstreams),
        service_options=ServiceOptions(
            hosts=tuple(hosts), path_prefixes=tuple(path_prefixes), strip_prefix=strip_prefix
        ),
        target_options=TargetOptions(
            health_check=HealthCheckOptions(port=upstreams[0].health_port, interval=interval),
            response_timeout=response_timeout,
            forward_headers=forward_headers,
            **target_options,
        ),
        deployment_options=DeploymentOptions(
            deploy_timeout=deploy_timeout, drain_timeout=drain_timeout, force=force
        ),
    )


class Client(Wire):
    """A client that sends raw bytes and reads whole responses."""

    async def request(self, data: bytes) -> Response:
        """Send a whole request and return its response."""
        await self.send(data)
        return await self.receive_response(data.split(b" ", 1)[0])

    async def get(self, path: str = "/", host: str = "a.example", headers: str = "") -> Response:
        """Send a GET request and return its response."""
        return await self.request(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode())

    async def receive_response(self, method: bytes = b"GET") -> Response:
        """Read one whole response to a request with ``method``.

        Raises:
            ConnectionCut: the connection ended before the response did.
        """
        parser = h11.Connection(h11.CLIENT, MAX_HEAD)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        informational: list[int] = []
        status, body = 0, b""
        head: h11.Response | None = None
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as error:
                raise ConnectionCut(status, body, reset=False) from error
            if event is h11.NEED_DATA:
                try:
                    data = await self.receive_some()
                except OSError as error:
                    raise ConnectionCut(status, body, reset=True) from error
                parser.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                informational.append(event.status_code)
            elif isinstance(event, h11.Response):
                head, status = event, event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self.unread(parser.trailing_data[0])
                return Response(
                    status,
                    bytes(head.reason),
                    list(head.headers),
                    body,
                    list(event.headers),
                    informational,
                )
            else:
                raise ConnectionCut(status, body, reset=False)


@asynccontextmanager
async def open_client(
    port: int, *, host: str = LOCALHOST, source: str = "", receive_buffer: int = 0
) -> AsyncIterator[Client]:
    """Connect to a port for the length of a block.

    Args:
        port: Where the proxy listens.
        host: The address that it listens on.
        source: The address to connect from; by default the kernel chooses.
        receive_buffer: Size of the socket's receive buffer in bytes, for a client that reads
            slowly; 0 leaves it to the kernel.
    """
    sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with sock:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source:
            await sock.bind((source, 0))
        await sock.connect((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Client(sock)
