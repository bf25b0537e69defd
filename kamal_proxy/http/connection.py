"""One client connection: requests one after another, under one cancel scope whose deadline moves.

Owns the stream, the codec and the deadline. What happens to a request is the exchange's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.access_log import log_request
from kamal_proxy.http.causes import CLIENT_CLOSED_REQUEST, Cause
from kamal_proxy.http.codec import ProtocolError, RequestHead, ServerCodec, whole_response
from kamal_proxy.http.exchange import Exchange
from kamal_proxy.sockets import drop

if TYPE_CHECKING:
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address
    from kamal_proxy.sockets import SocketStream

_HEAD_READ_SIZE = 16 * 1024
_ANSWER_TIMEOUT = 5.0  # seconds for an error response after an interruption


class ClientConnection:
    """One connection of a client."""

    __slots__ = ("_exchange", "_first", "address", "cause", "codec", "scope", "server", "stream")

    def __init__(self, stream: SocketStream, address: Address, server: HttpServer) -> None:
        self.stream = stream
        self.address = address
        self.server = server
        self.codec = ServerCodec(server.options.max_head_size)
        self.scope = trio.CancelScope()
        self.cause = Cause.IDLE
        self._exchange: Exchange | None = None
        self._first = True

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or served, and none lies in the socket."""
        return (
            self._exchange is None
            and not self.codec.has_partial_head
            and self.stream.is_quiet_nowait()
        )

    def move_deadline(self, seconds: float, cause: Cause) -> None:
        """Give what happens next that many seconds from now; ``cause`` says what their end means.

        Once the client is gone, or a cancellation is under way, nothing changes that any more.
        """
        if self.cause is Cause.CLIENT_GONE or self.scope.cancel_called:
            return
        self.scope.deadline = trio.current_time() + seconds
        self.cause = cause

    def cancel(self, cause: Cause) -> None:
        """Interrupt what the connection is doing now."""
        self.cause = cause
        self.scope.cancel(reason=cause.name)

    async def run(self) -> None:
        """Serve the connection until it ends. The caller closes the stream."""
        try:
            linger = await self._serve()
        finally:
            if self._exchange is not None:
                self._exchange.finish()
                self._exchange = None
        if linger:
            await drop(self.stream)

    async def _serve(self) -> bool:
        """Serve requests; return whether the client may still be sending."""
        with self.scope:
            # An exchange that ended while being cancelled must not take the next one with it.
            while not self.scope.cancel_called:
                try:
                    head = await self._next_head()
                except ProtocolError as error:
                    return await self._reject(error.status)
                except trio.BrokenResourceError:
                    head = None
                if head is None:
                    if self.codec.has_partial_head:
                        self._log_headless(CLIENT_CLOSED_REQUEST, 0)
                    return False
                exchange = self._exchange = Exchange(self, head)
                usable = await exchange.run()
                usable = usable and self.codec.next_cycle()
                exchange.finish()
                self._exchange = None
                if not usable or self.server.closing:
                    # Only unread bytes make closing dangerous.
                    return not (self.codec.received and self.stream.is_quiet_nowait())
        return await self._interrupted()

    async def _interrupted(self) -> bool:
        cause = self.cause
        with trio.move_on_after(_ANSWER_TIMEOUT), trio.CancelScope() as self.scope:
            if self._exchange is not None:
                self.cause = Cause.IDLE
                try:
                    await self._exchange.interrupted(cause)
                except (ProtocolError, trio.BrokenResourceError):
                    return False
                return cause not in (Cause.CLIENT_GONE, Cause.CLIENT_STALLED)
            if cause is Cause.HEAD_TIMEOUT:
                return await self._reject(408)
            if cause is Cause.SHUTDOWN and self.codec.has_partial_head:
                return await self._reject(503)
        return False

    async def _next_head(self) -> RequestHead | None:
        """Wait for the next request; None when the client closed."""
        if self.codec.has_partial_head:
            # Pipelined requests must not keep the others waiting.
            await trio.lowlevel.checkpoint()
        head = self.codec.next_request()
        if head is not None:
            return head
        options = self.server.options
        if self.codec.has_partial_head:
            self.move_deadline(options.head_timeout, Cause.HEAD_TIMEOUT)
        else:
            # A new connection owes a request sooner than one that has served some.
            patience = options.head_timeout if self._first else options.idle_timeout
            self.move_deadline(patience, Cause.IDLE)
        self._first = False
        while True:
            data = await self.stream.receive(_HEAD_READ_SIZE)
            if not data:
                return None
            begun = self.codec.has_partial_head
            self.codec.receive_head_data(data)
            head = self.codec.next_request()
            if head is not None:
                return head
            if not begun and self.codec.has_partial_head:
                self.move_deadline(options.head_timeout, Cause.HEAD_TIMEOUT)

    async def _reject(self, status: int) -> bool:
        """Answer a head that can't be understood; the connection ends."""
        body = pages.render(status)
        headers = [(b"Date", self.server.date()), (b"Content-Type", pages.CONTENT_TYPE)]
        response = whole_response(status, pages.reason(status), headers, body)
        self.move_deadline(_ANSWER_TIMEOUT, Cause.CLIENT_STALLED)
        told = False
        try:
            await self.stream.send(response)
            told = True
        except trio.BrokenResourceError:
            return False
        finally:
            self._log_headless(status if told else CLIENT_CLOSED_REQUEST, len(body) if told else 0)
        return True

    def _log_headless(self, status: int, sent: int) -> None:
        """Write the log line of a request whose head was never understood."""
        headers = [(b"Content-Type", pages.CONTENT_TYPE)] if sent else []
        log_request(self.server, self.address, None, status=status, sent=sent, response=headers)
