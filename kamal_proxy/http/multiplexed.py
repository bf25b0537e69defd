"""One request on a stream of a multiplexed connection, HTTP/2 or HTTP/3.

Owns the scope and the deadline of the request, what has arrived of its body and was not taken, and
what is to be sent and was not framed. Framing and flow control are the subclass's business.
"""

from __future__ import annotations

import contextlib
import enum
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.exchange import Exchange
from kamal_proxy.http.headers import is_lookalike
from kamal_proxy.http.reasons import ClientGone, Reason, TargetFailed
from kamal_proxy.http.stream_bodies import Incoming, Outgoing
from kamal_proxy.http.stream_heads import plain_fields, response_fields
from kamal_proxy.http.stream_tunnel import StreamTunnelEnd
from kamal_proxy.http.websocket import accept_of

if TYPE_CHECKING:
    from kamal_proxy.deployment import Drain
    from kamal_proxy.http.codec import HeaderPairs, RequestHead
    from kamal_proxy.http.multiplexed_connection import MultiplexedConnection
    from kamal_proxy.http.target_side import Upstream

_ANSWER_TIMEOUT = 5.0  # seconds for an error response after an interruption


class Ending(enum.Enum):
    """How a stream ends other than by the last byte in either direction."""

    DONE = enum.auto()  # answered; nobody will read the rest of the request
    CANCELLED = enum.auto()
    FAILED = enum.auto()
    MALFORMED = enum.auto()
    REFUSED = enum.auto()  # nothing was done: the client may ask again


class MultiplexedStream(ABC):
    """A request: its ``client_side.ClientSide`` and its ``client_side.Downstream`` in one.

    The connection tells it what has arrived (:meth:`receive_data`, :meth:`receive_trailers`,
    :meth:`receive_end`, :meth:`client_gone`) and that some of its output was sent
    (:meth:`sent_some`); it tells the connection by the abstract methods.

    Args:
        connection: The connection; what it knows of its client is taken over.
        head: The head of the request.
        ended: Whether it has no body.

    Attributes:
        incoming: What has arrived of the request and was not taken.
        out: What is to be sent.
        complete: Whether the last of the response was sent; the subclass sets it.
        gone: Whether the client has given the stream up, or is gone itself.
    """

    __slots__ = (
        "_exchange",
        "_head",
        "_reason",
        "_scope",
        "_tunnelled",
        "_why_gone",
        "address",
        "awaits_continue",
        "believed",
        "client_ca",
        "complete",
        "drain",
        "gone",
        "hidden",
        "incoming",
        "is_cut",
        "out",
        "received",
        "response",
        "sent",
        "server",
        "status",
        "vouched",
    )

    def __init__(
        self, connection: MultiplexedConnection[Any], head: RequestHead, *, ended: bool
    ) -> None:
        self.server = connection.server
        self.address = connection.address
        self.vouched = connection.vouched
        self.believed = connection.believed
        self.client_ca = connection.client_ca
        self.drain = connection.drain
        self._head = head
        self._scope = trio.CancelScope()
        self._reason = Reason.IDLE
        self._exchange: Exchange | None = None
        # The request
        self.incoming = Incoming(ended=ended)
        self.received = False
        self.gone = False
        self._why_gone = Reason.CLIENT_GONE
        self.awaits_continue = not ended and head.get(b"expect").lower() == b"100-continue"
        self.hidden = b""
        # The response
        self.out = Outgoing()
        self.complete = False
        self._tunnelled = False
        self.status = 0
        self.response: HeaderPairs | None = None
        self.sent = 0
        self.is_cut = False

    # What the connection has to do

    @abstractmethod
    def submit(self) -> None:
        """Send what is queued, as far as it is possible now; the rest later, by itself."""

    @abstractmethod
    def consumed(self, count: int) -> None:
        """Let the client send so many more bytes of body: they were taken."""

    @abstractmethod
    def abort(self, ending: Ending) -> None:
        """End the stream now, dropping what is queued."""

    @abstractmethod
    def keep_alive(self) -> None:
        """Find out when a silent client has vanished: the stream may be quiet for long."""

    # What the connection tells

    def receive_data(self, data: bytes) -> None:
        """Take a part of the request's body. Flow control limits what is kept here."""
        if not data or self.gone:
            return
        if 0 <= self._head.length < self.incoming.size + len(data) and not self._head.protocol:
            self._fail()
            return
        self.incoming.add(data)

    def receive_trailers(self, trailers: HeaderPairs) -> None:
        """Take the trailers that a target may see; :meth:`receive_end` follows."""
        self.incoming.trailers = trailers

    def receive_end(self) -> None:
        """Take note that the request has arrived whole."""
        if self.gone:
            return
        if self._head.length > self.incoming.size:
            self._fail()
            return
        self.incoming.ended = True
        self.incoming.tell()

    def _fail(self) -> None:
        """End the stream: its body has another length than was announced (RFC 9113 8.1.1)."""
        self.abort(Ending.MALFORMED)
        self.client_gone()

    def client_gone(self) -> None:
        """Take note that nobody wants the response any more: it is not made any further."""
        self.lose(Reason.CLIENT_GONE)

    def lose(self, reason: Reason) -> None:
        """Like :meth:`client_gone`, for another reason than that the client has left."""
        if self.gone:
            return
        self.gone = True
        self._why_gone = reason
        self.out.drop()
        self._take_arrived()
        self.incoming.tell()
        self.out.tell()
        if not self._tunnelled:  # a tunnel ends by itself, as with any broken connection
            self.cancel(reason)

    @property
    def has_output(self) -> bool:
        """Whether something is queued, be it only the end."""
        return bool(self.out) or (self.out.ending and not self.complete)

    # Serving it

    async def run(self) -> None:
        """Serve the request. The subclass forgets the stream afterwards."""
        exchange = self._exchange = Exchange(self, self._head)
        try:
            # Of a request that was cancelled at once, no target shall hear.
            stillborn = self._scope.cancel_called
            if not stillborn:
                with self._scope:
                    if self.drain is not None:
                        exchange.begin_drain(self.drain)
                    await exchange.run()
                    if self._tunnelled:
                        with contextlib.suppress(ClientGone):
                            await self.send(b"")
            if stillborn or (self._scope.cancelled_caught and not self.complete):
                await self._interrupted(exchange)
        finally:
            exchange.finish()
            self._exchange = None  # else the two keep each other, and the connection
            self._take_arrived()  # what nobody wants must not hold up the other streams
            self.out.drop()
            if not self.complete:
                self.abort(Ending.CANCELLED if self._tunnelled else Ending.FAILED)
            elif not self.incoming.ended:
                self.abort(Ending.DONE)

    async def _interrupted(self, exchange: Exchange) -> None:
        reason = self._reason
        with trio.move_on_after(_ANSWER_TIMEOUT), trio.CancelScope() as self._scope:
            self._reason = Reason.IDLE
            # What can't be said any more ends with the stream.
            with contextlib.suppress(ProtocolError, trio.BrokenResourceError):
                await exchange.interrupted(reason)

    def begin_drain(self, drain: Drain) -> None:
        """Take note that the proxy is about to end."""
        self.drain = drain
        if self._exchange is not None:
            self._exchange.begin_drain(drain)

    # A client_side.ClientSide

    def downstream(self, head: RequestHead) -> MultiplexedStream:
        """Return the client during this request, which is the stream itself."""
        assert head is self._head
        return self

    def move_deadline(self, seconds: float, reason: Reason) -> None:
        """Give what happens next that many seconds from now; see ``client_side.ClientSide``."""
        if self._reason is Reason.CLIENT_GONE or self._scope.cancel_called:
            return
        self._scope.deadline = trio.current_time() + seconds
        self._reason = reason

    def cancel(self, reason: Reason) -> None:
        """Interrupt what serves the request."""
        self._reason = reason
        self._scope.cancel(reason=reason.name)

    # A client_side.Downstream: the request's body

    @property
    def trailers(self) -> HeaderPairs:
        """The request's trailers that a target may see, once it has arrived whole."""
        trailers = self.incoming.trailers
        if trailers and self.hidden:
            return [pair for pair in trailers if not is_lookalike(pair[0], self.hidden)]
        return trailers

    def take_body(self) -> bytes:
        """Return what has arrived of the body and was not taken yet.

        Raises:
            ClientGone: the client has given the stream up; what is left of the body must not pass
                for the whole of it.
        """
        if self.gone:
            raise ClientGone(self._why_gone)
        if self._head.protocol:
            self.received = True  # what arrives is for the tunnel
            return b""
        data = self._take_arrived()
        if data or self.incoming.ended:
            self.awaits_continue = False
        self.received = self.incoming.ended
        return data

    def take_body_nowait(self) -> bytes:
        """Like :meth:`take_body`: nothing lies elsewhere."""
        return self.take_body()

    def _take_arrived(self) -> bytes:
        if not self.incoming:
            return b""
        data = self.incoming.take()
        self.consumed(len(data))
        return data

    async def receive_body(self) -> None:
        """Wait for more of the body; how long that may take is the caller's business.

        Raises:
            ClientGone: the client has given the stream up.
        """
        if self.incoming or self.incoming.ended:
            await trio.lowlevel.checkpoint()
        elif not self.gone:
            await self.incoming.wait()
        if self.gone:
            raise ClientGone(self._why_gone)

    async def ask_for_body(self) -> None:
        """Send 100 Continue to a client that waits for it (RFC 9110 10.1.1)."""
        if self.awaits_continue:
            self.awaits_continue = False
            await self._inform(100, [])

    # The response

    async def inform(self, status: int, reason: bytes, headers: HeaderPairs) -> bool:  # noqa: ARG002
        """Send a 1xx response; return whether it was the 100 that the client waited for."""
        await self._inform(status, headers)
        if status != 100 or not self.awaits_continue:
            return False  # it may have sent its body meanwhile
        self.awaits_continue = False
        return True

    async def _inform(self, status: int, headers: HeaderPairs) -> None:
        self.out.heads.append(response_fields(status, headers))
        await self.send(b"")

    async def switch(self, reason: bytes, headers: HeaderPairs) -> bytes:  # noqa: ARG002
        """Accept a WebSocket (RFC 8441 5); what the client sends comes from its tunnel end.

        Raises:
            TargetFailed: the target did not read the handshake.
        """
        key = self._head.get(b"sec-websocket-key")
        accepted = [value for name, value in headers if name.lower() == b"sec-websocket-accept"]
        if accepted != [accept_of(key)]:
            raise TargetFailed("WebSocket handshake with a wrong Sec-WebSocket-Accept")
        fields = [pair for pair in headers if pair[0].lower() != b"sec-websocket-accept"]
        self._tunnelled = True
        self._begun(200, fields)
        self.out.heads.append(response_fields(200, fields))
        await self.send(b"")
        return b""

    def begin(
        self,
        status: int,
        reason: bytes,  # noqa: ARG002
        headers: HeaderPairs,
        *,
        close: bool = False,  # noqa: ARG002
    ) -> bytes:
        """Queue the head of the final response.

        Args:
            status: Its status.
            reason: Its reason phrase, which no stream carries.
            headers: Its header fields.
            close: Nothing to a stream, which ends anyway.

        Raises:
            ProtocolError: the client would take it for a WebSocket that was accepted.
        """
        if self._head.protocol and 200 <= status < 300:
            raise ProtocolError(f"status {status} in answer to a WebSocket handshake")
        self._begun(status, headers)
        self.out.heads.append(response_fields(status, headers))
        return b""

    def _begun(self, status: int, headers: HeaderPairs) -> None:
        self.status = status
        self.response = headers
        self.move_deadline(math.inf, Reason.IDLE)

    def body(self, data: bytes) -> bytes:
        """Queue a part of the response's body."""
        if data:
            self.out.add(data)
            self.sent += len(data)
        return b""

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Queue the end of the response."""
        self.out.ending = True
        self.out.trailers = plain_fields(trailers) if trailers else []
        return b""

    async def send(self, data: bytes) -> None:
        """Send what is queued, giving up when the client takes nothing for too long.

        Raises:
            ClientGone: the client has given the stream up, or did not take it.
        """
        assert not data
        if self.gone:
            raise ClientGone(self._why_gone)
        self.submit()
        if not self.has_output:
            return
        stall = self.server.options.stall_timeout
        with trio.CancelScope() as scope:
            while self.has_output and not self.gone:
                # Anew each time: a client that takes a little at a time has not stalled.
                scope.deadline = trio.current_time() + stall
                await self.out.wait()
        if self.gone:
            raise ClientGone(self._why_gone)
        if scope.cancelled_caught:
            raise ClientGone(Reason.CLIENT_STALLED)

    async def answer(
        self, status: int, body: bytes, headers: HeaderPairs, *, close: bool = False
    ) -> bool:
        """Send a whole response; return whether the request had arrived whole.

        Args:
            status: Its status.
            body: Its body.
            headers: Header fields besides Date and Content-Length.
            close: Nothing to a stream, which ends anyway.
        """
        headers = [
            (b"Date", self.server.date()),
            *headers,
            (b"Content-Length", b"%d" % len(body)),
        ]
        self.begin(status, pages.reason(status).encode(), headers, close=close)
        if self._head.method != b"HEAD":
            self.body(body)
        self.end()
        await self.send(b"")
        return self.received

    # The client's leaving: the connection tells, and that ends every wait.

    async def receive_from(self, upstream: Upstream, *, watching: bool) -> None:  # noqa: ARG002
        """Wait for more from a target."""
        await upstream.receive(None)

    def watch_from_now(self, upstream: Upstream) -> None:  # noqa: B027
        """Do nothing: whoever waits for the target is cancelled when the client leaves."""

    async def wait_gone(self) -> None:
        """Wait for ever: whoever waits is cancelled when the client leaves."""
        await trio.sleep_forever()

    # Another protocol

    def tunnel_end(self) -> StreamTunnelEnd:
        """Return the client's end of the tunnel, after :meth:`switch`."""
        return StreamTunnelEnd(self)

    def take_tunnelled(self) -> bytes:
        """Return what has arrived of another protocol."""
        return self._take_arrived()
