"""One connection to the HTTPS port before it speaks HTTP: from its first byte to its first request.

Most of the many steps are a few lines of Python and some hundred microseconds of OpenSSL, done as
soon as the client has sent what they need; so they are done in the poller's task, and a connection
gets a task of its own when it has something to wait for besides its client, or has begun to speak.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.codec import whole_response
from kamal_proxy.http.endpoint import TEXT
from kamal_proxy.http.introduction import introduced
from kamal_proxy.sockets import drop
from kamal_proxy.tls import hello
from kamal_proxy.tls.selection import NoCertificateError
from kamal_proxy.tls.stream import Handshake, HandshakeError, alert

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kamal_proxy.http.https import HttpsFront
    from kamal_proxy.listeners import Address, Begin, Clients
    from kamal_proxy.sockets import SocketStream
    from kamal_proxy.tls.hello import ClientHello
    from kamal_proxy.tls.selection import Chosen
    from kamal_proxy.tls.stream import TlsStream

_PLAIN_HTTP = whole_response(
    400,
    pages.reason(400),
    [(b"Content-Type", TEXT)],
    b"Client sent an HTTP request to an HTTPS server.\n",
)


class Opening:
    """A connection that is being opened; :meth:`begin` is called first.

    Args:
        front: Where connections are opened; is told what becomes of this one.
        clients: Those to which it belongs.
        serve: Takes it when it is open.
        stream: The connection.
        address: The client's.

    Attributes:
        deadline: When :meth:`expire` is called, on Trio's clock; the front sets it.
    """

    __slots__ = (
        "_address",
        "_client_ca",
        "_clients",
        "_failed",
        "_front",
        "_handshake",
        "_is_over",
        "_received",
        "_scope",
        "_serve",
        "_stream",
        "_tls",
        "deadline",
    )

    def __init__(
        self,
        front: HttpsFront,
        clients: Clients,
        serve: Begin,
        stream: SocketStream,
        address: Address,
    ) -> None:
        self.deadline = 0.0
        self._front = front
        self._clients = clients
        self._serve = serve
        self._stream = stream
        self._address = address
        self._received = b""  # of the hello
        self._handshake: Handshake | None = None
        self._client_ca: bytes | None = None
        self._tls: TlsStream | None = None
        self._scope: trio.CancelScope | None = None  # of the task that has it now
        self._failed = False
        self._is_over = False  # it is somebody else's, or closed

    def begin(self) -> None:
        """Begin to read, and go on by itself from then on."""
        self._stream.tell(self)
        self._guard(self._start)

    def ready(self, events: int) -> None:
        """Go on (called by the poller)."""
        if self._tls is not None:
            self._tls.ready(events)
            self._guard(self._await_speech)
        else:
            self._stream.ready(events)
            if self._scope is None:
                self._guard(self._read)

    def expire(self) -> None:
        """End it: it takes too long."""
        if self._tls is None and not self._failed:
            self._front.fail("timeout", self._address)
        self.end()

    def stop(self) -> None:
        """End it because the proxy stops, unless the client has said what only is to be read."""
        if self._tls is not None:
            self._guard(self._await_speech)
        self.end()

    def end(self) -> None:
        """Close the connection."""
        if self._scope is not None:
            self._scope.cancel(reason="the connection is to be closed")
        elif not self._is_over:
            self._is_over = True
            self._front.forget(self)
            self._clients.leave(self._tls or self._stream)

    # In the poller's task

    def _guard(self, step: Callable[[], None]) -> None:
        """Take a step. Whatever goes wrong in it ends this connection only."""
        try:
            step()
        except Exception as error:
            if last_words := self._blame(error):
                self._in_task(self._say, last_words)
            else:
                self.end()

    def _start(self) -> None:
        if self._front.is_owed_introduction(self._address):
            self._in_task(self._read_introduction)
        else:
            self._read()

    def _resume(self) -> None:
        """Go on after a task: what has come meanwhile is no event any more."""
        if self._received:
            self._read_hello()
        self._read()

    def _read(self) -> None:
        """Read what has come, go on with that, and wait for more."""
        if self._handshake is not None and self._handshake.stalled:
            self._secured(self._handshake.flush())
        while not self._is_waiting():
            data = self._stream.receive_nowait()
            if data is None:
                break
            if self._handshake is not None:
                self._secured(self._handshake.proceed(data))
            elif data:
                self._received += data
                self._read_hello()
            else:
                raise HandshakeError("closed")
            if self._stream.is_drained_by(len(data)):
                break
        if not self._is_over and self._tls is None:
            self._stream.watch()

    def _is_waiting(self) -> bool:
        """Whether there is something to wait for besides what the client sends in its handshake."""
        stalled = self._handshake is not None and self._handshake.stalled
        return stalled or self._tls is not None or self._scope is not None or self._is_over

    def _read_hello(self) -> None:
        client_hello = hello.parse_untrusted(self._received)
        if client_hello is not None:
            chosen = self._front.selection.at_hand(client_hello)
            if chosen is None:
                self._in_task(self._wait_for_certificate, client_hello)
            else:
                self._shake(client_hello, chosen)

    def _shake(self, client_hello: ClientHello, chosen: Chosen) -> None:
        """Begin the handshake."""
        context, self._client_ca = chosen
        self._handshake = Handshake(self._stream, context, server_name=client_hello.server_name)
        received, self._received = self._received, b""
        self._secured(self._handshake.proceed(received))

    def _secured(self, tls: TlsStream | None) -> None:
        """Go on after the handshake, if it is done."""
        if tls is None:
            return
        self._front.server.metrics.handshake("ok")
        tls.client_ca = self._client_ca
        self._tls = tls
        if tls.alpn == "h2":  # whose server speaks first
            self._hand_over()
        else:
            tls.tell(self)
            self._front.allow_time(self)
            self._await_speech()

    def _await_speech(self) -> None:
        """Have the connection served, if its client has sent something."""
        assert self._tls is not None
        if self._tls.is_quiet_nowait():
            return
        if self._tls.at_eof_nowait():
            self.end()
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        """Let it be served: it is open."""
        assert self._tls is not None
        self._tls.tell(self._tls)
        self._front.forget(self)
        self._is_over = True
        self._serve(self._tls, self._address)

    def _blame(self, error: Exception) -> bytes:
        """Take note of what ends the connection; return what the client is told."""
        self._failed = True
        fail = functools.partial(self._front.fail, address=self._address)
        match error:
            case hello.HelloError():
                fail("plain HTTP" if error.is_http else "not TLS")
                return _PLAIN_HTTP if error.is_http else b""
            case NoCertificateError():
                fail(error.reason)
                return alert(error.alert)
            case HandshakeError():
                fail(error.reason)
            case trio.BrokenResourceError():
                fail("closed" if self._handshake is None else "the client broke the connection")
            case _:  # a bug must cost one connection, not the proxy
                self._front.server.log.error(
                    "Connection failed", client_addr=self._address[0], error=repr(error)
                )
        return b""

    # In a task of its own

    def _in_task(self, step: Callable[..., Awaitable[bool]], *args: object) -> None:
        """Take a step that has to wait."""
        self._scope = trio.CancelScope()
        self._clients.nursery.start_soon(self._run, self._scope, step, *args)

    async def _run(
        self, scope: trio.CancelScope, step: Callable[..., Awaitable[bool]], *args: object
    ) -> None:
        """Take a step that says whether to go on after it."""
        goes_on = False
        try:
            with scope:
                try:
                    goes_on = await step(*args)
                except Exception as error:
                    await self._say(self._blame(error))
        finally:
            self._scope = None
            if not goes_on or scope.cancel_called:
                self.end()
        if not self._is_over:
            self._guard(self._resume)

    async def _read_introduction(self) -> bool:
        found = await introduced(self._stream, self._address, self._front.server.log)
        if found is None:
            return False
        self._address, self._received = found
        return True

    async def _wait_for_certificate(self, client_hello: ClientHello) -> bool:
        chosen = await self._front.selection.wait_for(client_hello)
        self._shake(client_hello, chosen)
        return True

    async def _say(self, last_words: bytes) -> bool:
        """Send the last words, if there are any, to a client that gets no connection."""
        if last_words:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._stream.send(last_words)
                await drop(self._stream)
        return False
