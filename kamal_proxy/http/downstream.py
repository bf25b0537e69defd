"""The client's side of one HTTP/1.1 exchange: the body of its request, and what it is sent.

Knows the client connection's codec, stream and deadline, and nothing of services or targets.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.headers import is_lookalike
from kamal_proxy.http.reasons import ClientGone, Reason
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs, RequestHead
    from kamal_proxy.http.connection import ClientConnection
    from kamal_proxy.http.target_side import Upstream
    from kamal_proxy.sockets import SocketStream

# A client that closes its sending side usually went away, but it may still be reading (RFC 9112
# 9.6 leaves that open); an answer that comes within this many seconds is still sent.
GONE_GRACE = 1.0


class Http1Downstream:
    """The client during one request on an HTTP/1.1 connection: a ``client_side.Downstream``.

    Attributes:
        awaits_continue: Whether the client rightly waits for 100 Continue; it owes no body yet.
        status: Status of the response, once it has begun.
        response: Its header fields, once they were sent.
        sent: Bytes of response body.
        hidden: Lower-case name of a field that no target must see among the trailers, if any.
        is_cut: Whether something was sent in part only: nothing else can be said any more.
    """

    __slots__ = (
        "_codec",
        "_connection",
        "_gone",
        "_head",
        "_server",
        "_stream",
        "awaits_continue",
        "hidden",
        "is_cut",
        "response",
        "sent",
        "status",
    )

    def __init__(self, connection: ClientConnection, head: RequestHead) -> None:
        self._connection = connection
        self._stream = connection.stream
        self._codec = connection.codec
        self._server = connection.server
        self._head = head
        self._gone = False
        self.awaits_continue = head.get(b"expect").lower() == b"100-continue"
        self.status = 0
        self.response: HeaderPairs | None = None
        self.sent = 0
        self.hidden = b""
        self.is_cut = False

    # The request's body

    @property
    def received(self) -> bool:
        """Whether the request has arrived whole."""
        return self._codec.received

    @property
    def trailers(self) -> HeaderPairs:
        """The request's trailers that a target may see, once it has arrived whole."""
        trailers = self._codec.trailers
        if trailers and self.hidden:
            return [pair for pair in trailers if not is_lookalike(pair[0].lower(), self.hidden)]
        return trailers

    def take_body(self) -> bytes:
        """Return what was read of the body and not taken yet.

        Raises:
            ProtocolError: the client broke the framing.
        """
        data = self._codec.take_body()
        if data or self._codec.received:
            self.awaits_continue = False
        return data

    def take_body_nowait(self) -> bytes:
        """Like :meth:`take_body`, with what has arrived but was not read."""
        body = self.take_body()
        if not self._codec.received:
            data = self._stream.receive_nowait()
            if data == b"":
                raise ClientGone
            if data is not None:
                self._codec.receive_data(data)
                body += self.take_body()
        return body

    async def receive_body(self) -> None:
        """Read more of the body; how long that may take is the caller's business.

        Raises:
            ClientGone: the client closed.
            ProtocolError: the client broke the framing.
        """
        try:
            data = await self._stream.receive(READ_SIZE)
        except trio.BrokenResourceError as error:
            raise ClientGone from error
        if not data:
            raise ClientGone
        self._codec.receive_data(data)
        # Tiny chunks cost far more than their bytes: let the others have their turn.
        await trio.lowlevel.checkpoint()

    async def ask_for_body(self) -> None:
        """Send 100 Continue to a client that waits for it (RFC 9110 10.1.1)."""
        if self.awaits_continue:
            self.awaits_continue = False
            await self.send(self._codec.informational(100, b"Continue", []))

    # The response

    async def inform(self, status: int, reason: bytes, headers: HeaderPairs) -> bool:
        """Send a 1xx response; return whether it was the 100 that the client waited for."""
        await self.send(self._codec.informational(status, reason, headers))
        if status != 100 or not self.awaits_continue:
            return False  # it may have sent its body meanwhile
        self.awaits_continue = False
        return True

    async def switch(self, reason: bytes, headers: HeaderPairs) -> bytes:
        """Send a 101 response; return what the client has sent of the other protocol."""
        data = self._codec.informational(101, reason, headers)
        self._begun(101, headers)
        await self.send(data)
        return self._codec.switched()

    def begin(
        self, status: int, reason: bytes, headers: HeaderPairs, *, close: bool = False
    ) -> bytes:
        """Frame the head of the final response, which is to be sent.

        Args:
            status: Its status.
            reason: Its reason phrase.
            headers: Its header fields; at most a Content-Length as framing.
            close: Whether the connection must end with it.

        Raises:
            ProtocolError: it can't be written.
        """
        # Of a request that has not arrived whole, nobody will read the rest.
        if close or not self._codec.received or self._server.closing or self._connection.ending:
            headers = [*headers, (b"Connection", b"close")]
        data = self._codec.response(status, reason, headers)
        self._begun(status, headers)
        return data

    def _begun(self, status: int, headers: HeaderPairs) -> None:
        self.status = status
        self.response = headers
        self._connection.move_deadline(math.inf, Reason.IDLE)

    def body(self, data: bytes) -> bytes:
        """Frame a part of the response's body."""
        self.sent += len(data)
        return self._codec.body(data)

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Frame the end of the response; where HTTP/1.1 has no room for trailers, it gets none."""
        if trailers and not self._is_chunked():
            trailers = None
        return self._codec.end(trailers)

    def _is_chunked(self) -> bool:
        """Return whether the body of the response that was begun is sent in chunks."""
        if self._head.method == b"HEAD" or self.status in (204, 304):
            return False
        return not any(name.lower() == b"content-length" for name, _ in self.response or ())

    async def send(self, data: bytes) -> None:
        """Send to the client, giving up when it takes nothing for too long.

        Raises:
            ClientGone: the client closed or broke the connection, or did not take it.
        """
        try:
            sent = self._stream.send_nowait(data)
            if sent < len(data):
                self.is_cut = True
                stall = self._server.options.stall_timeout
                with trio.CancelScope() as scope:

                    def progress() -> None:
                        # Anew each time: a client that takes a little at a time has not stalled.
                        scope.deadline = trio.current_time() + stall

                    await self._stream.send(memoryview(data)[sent:], progress)
                if scope.cancelled_caught:
                    raise ClientGone(Reason.CLIENT_STALLED)
                self.is_cut = False
        except trio.BrokenResourceError as error:
            raise ClientGone from error

    async def answer(
        self, status: int, body: bytes, headers: HeaderPairs, *, close: bool = False
    ) -> bool:
        """Send a whole response; return whether the connection can be used again.

        Args:
            status: Its status.
            body: Its body.
            headers: Header fields besides Date, Content-Length and Connection.
            close: Whether the connection must end with it.
        """
        # What is here of a body is of no use, but its end decides about the connection.
        with contextlib.suppress(ProtocolError):
            self._codec.take_body()
        headers = [
            (b"Date", self._server.date()),
            *headers,
            (b"Content-Length", b"%d" % len(body)),
        ]
        data = self.begin(status, pages.reason(status).encode(), headers, close=close)
        if self._head.method == b"HEAD":
            body = b""
        if body:
            data += self._codec.body(body)
        await self.send(data + self.end())
        self.sent = len(body)
        return self._codec.received

    # The client's leaving

    async def receive_from(self, upstream: Upstream, *, watching: bool) -> None:
        """Wait for more from a target; a client that goes away meanwhile shortens the wait.

        Args:
            upstream: The request to the target; its codec has then what has come.
            watching: Whether to watch the client; not while somebody reads from it, who notices.
        """
        if not self._gone:
            if await upstream.receive(self._stream if watching else None):
                return
            self._connection.move_deadline(GONE_GRACE, Reason.CLIENT_GONE)
            self._gone = True
        await upstream.receive(None)

    def watch_from_now(self, upstream: Upstream) -> None:
        """Let the client's leaving also shorten a :meth:`receive_from` that waits already."""
        upstream.watch_from_now(self._stream)

    async def wait_gone(self) -> None:
        """Wait until the client has closed its side, and has had its grace."""
        await self._stream.wait_hung_up()
        await trio.sleep(GONE_GRACE)

    # Another protocol

    def tunnel_end(self) -> SocketStream:
        """Return the client's end of the tunnel, after :meth:`switch`: the whole connection."""
        return self._stream
