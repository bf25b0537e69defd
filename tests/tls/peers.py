"""A TLS client at the far end of a socket: OpenSSL in memory, moved by hand, one step at a time."""

from __future__ import annotations

import contextlib
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.tls.certificates import parse_certificate
from kamal_proxy.tls.contexts import server_context
from kamal_proxy.tls.stream import Handshake, HandshakeError, TlsStream
from tests.certificates import make_ca
from tests.pairs import SocketPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kamal_proxy.sockets import Poller, SocketStream

CA = make_ca()
_ISSUED = CA.issue("app.test")
CERTIFICATE = parse_certificate(_ISSUED.chain_pem, _ISSUED.key_pem)
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


def serving(alpn: Sequence[str] = ("h2", "http/1.1"), **options: bytes) -> ssl.SSLContext:
    """Make the context of a server for ``app.test``."""
    return server_context(CERTIFICATE, alpn=alpn, **options)


def calling(
    version: ssl.TLSVersion | None = None, alpn: Sequence[str] = ("http/1.1",)
) -> ssl.SSLContext:
    """Make the context of a client that trusts it."""
    context = ssl.create_default_context(cadata=CA.pem.decode())
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


class Peer(SocketPeer):
    """The client. It has ended when the server has said goodbye.

    Attributes:
        tls: OpenSSL's side of it.
        shaken: Whether its handshake is done.
        server_random: What the server's first message has made up.
    """

    def __init__(
        self,
        far: socket.socket,
        context: ssl.SSLContext,
        *,
        name: str = "app.test",
        session: ssl.SSLSession | None = None,
    ) -> None:
        super().__init__(far)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=name, session=session
        )
        self.shaken = False
        self.server_random = b""

    def shake(self) -> None:
        """Go on with the handshake; send what that takes."""
        self.far.sendall(self.shake_hand())

    def shake_hand(self) -> bytes:
        """Go on with the handshake; return what is to be sent."""
        self._collect()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
            self.shaken = True
        return self._outgoing.read()

    def pending(self) -> bytes:
        """Return what OpenSSL wants to send."""
        return self._outgoing.read()

    def encrypt(self, data: bytes) -> bytes:
        """Return the records of some data."""
        assert self.tls.write(data) == len(data)
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        """Send some data."""
        self.far.sendall(self.encrypt(data))

    def goodbye(self) -> bytes:
        """Return the record that says goodbye."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self._outgoing.read()

    def end(self) -> None:
        """Say goodbye; the connection stays."""
        self.far.sendall(self.goodbye())

    def receive(self) -> bytes:
        """Return what has arrived."""
        self._collect()
        data = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while part := self._part():
                data += part
        return data

    def _part(self) -> bytes:
        try:
            part = self.tls.read(1 << 16)
        except ssl.SSLZeroReturnError:
            part = b""
        self.ended = self.ended or not part
        return part

    def _collect(self) -> None:
        for part in self._parts():
            self.server_random = self.server_random or part[11:43]
            self._incoming.write(part)


Pair = tuple[TlsStream, Peer]


@attrs.define
class Result:
    """What became of a handshake."""

    stream: TlsStream | None = None
    error: BaseException | None = None


async def handshake(
    stream: SocketStream, context: ssl.SSLContext, received: bytes = b""
) -> TlsStream:
    """Do the server's side of a handshake, waiting in this task."""
    shaking = Handshake(stream, context, server_name="app.test")
    tls = shaking.proceed(received) if received else None
    while tls is None:
        if shaking.stalled:
            await stream.wait_writable()
            tls = shaking.flush()
        else:
            try:
                data = await stream.receive()
            except trio.BrokenResourceError as error:
                raise HandshakeError("the client broke the connection") from error
            tls = shaking.proceed(data)
    return tls


async def serve(
    stream: SocketStream, context: ssl.SSLContext, result: Result, received: bytes = b""
) -> None:
    """Do the server's side of a handshake, and keep what comes of it."""
    try:
        result.stream = await handshake(stream, context, received)
    except Exception as error:
        result.error = error


@asynccontextmanager
async def secured(
    poller: Poller,
    client: ssl.SSLContext,
    server: ssl.SSLContext | None = None,
    *,
    session: ssl.SSLSession | None = None,
    pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
) -> AsyncIterator[Pair]:
    """Yield both ends of a connection whose handshake is done; close both."""
    near, far = pair()
    far.setblocking(False)
    stream = poller.open_stream(near)
    result = Result()
    with far:
        peer = Peer(far, client, session=session)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, stream, server or serving(), result)
            while not (peer.shaken or result.error):
                peer.shake()
                await wait_all_tasks_blocked()
        if result.error is not None:
            raise result.error
        assert result.stream is not None
        try:
            yield result.stream, peer
        finally:
            result.stream.close()
