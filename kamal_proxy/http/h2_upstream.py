"""One request on an HTTP/2 connection to a target: an ``Upstream`` and its codec in one.

What is said of the request is kept until the target's windows take it, and what came of the
response until the relay takes it; the window of the stream bounds that.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import trio
from h2.errors import ErrorCodes

from kamal_proxy.http import h2_fields
from kamal_proxy.http.codec import HeaderPairs, ProtocolError, ResponseHead
from kamal_proxy.http.h2_tunnel import H2TunnelEnd
from kamal_proxy.http.reasons import TargetFailed
from kamal_proxy.http.websocket import accept_of, is_websocket
from kamal_proxy.sockets import Reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.http.h2_target import H2TargetConnection
    from kamal_proxy.sockets import SocketStream

_MAX_HEADS = 100  # 1xx responses that wait for the relay
_MANY_PARTS = 64


class H2Upstream(Reader):
    """One request on a connection; :meth:`release` ends it.

    Attributes:
        reused: Whether it is not certain that the connection was still alive.
        opened: Whether the connection was opened for it.
        received: Whether the response has arrived whole.
        trailers: Its trailers.
        heard: Whether something of the response has arrived.
        refused: Whether the target has said that it did nothing with the request.
        is_costly: Whether the body came in very many parts lately.
        may_have_body: Whether the response may have one (RFC 9110 6.4.1).
    """

    __slots__ = (
        "_accept",
        "_body",
        "_connection",
        "_end",
        "_ended",
        "_failure",
        "_fields",
        "_heads",
        "_held",
        "_out",
        "_out_trailers",
        "_stream_id",
        "_tunnel",
        "heard",
        "is_costly",
        "may_have_body",
        "opened",
        "received",
        "refused",
        "reused",
        "trailers",
    )

    may_refuse: Final = True

    def __init__(
        self, connection: H2TargetConnection, *, reused: bool, opened: bool = False
    ) -> None:
        super().__init__()
        self._connection = connection
        self._stream_id = 0
        self._fields: HeaderPairs | None = None  # of the request, until they are sent
        self._out: deque[memoryview] = deque()  # its body that is still to be sent
        self._out_trailers: HeaderPairs = []
        self._end = False  # the request is whole
        self._ended = False  # its end was sent
        self._heads: deque[ResponseHead] = deque()
        self._body: list[bytes] = []
        self._held = 0  # bytes of the window that they take
        self._failure = ""
        self._tunnel = False  # it is to become a WebSocket
        self._accept = b""
        self.reused = reused
        self.opened = opened
        self.received = False
        self.trailers: HeaderPairs = []
        self.heard = False
        self.refused = False
        self.is_costly = False
        self.may_have_body = True

    def __repr__(self) -> str:
        return f"<H2Upstream stream={self._stream_id} {self._failure}>"

    @property
    def codec(self) -> H2Upstream:
        """What reads and writes the messages."""
        return self

    @property
    def failure(self) -> str:
        """Why the response will not become whole; empty while it may."""
        return self._failure

    # The request

    def request(
        self, method: bytes, target: bytes, headers: HeaderPairs, upgrade: bytes = b""
    ) -> bytes:
        """Say what the head of the request is; :meth:`send` sends it.

        A switch to WebSocket is asked for as RFC 8441 has it; any other is not asked for, which a
        server may do as well (RFC 9110 7.8).

        Raises:
            ProtocolError: a WebSocket is to begin with a body.
            TargetFailed: the target takes no WebSockets.
        """
        if is_websocket(upgrade):
            if any(_frames_body(name.lower(), value) for name, value in headers):
                raise ProtocolError("a request with a body can't become a WebSocket")
            if not self._connection.offers_tunnels:
                raise TargetFailed(
                    "the target takes no WebSockets over HTTP/2 (RFC 8441); without h2c:// they "
                    "reach it over HTTP/1.1"
                )
            self._tunnel = True
            self._accept = accept_of(_key(headers))
            self._fields = h2_fields.request_fields(method, target, headers, b"websocket")
        else:
            self._fields = h2_fields.request_fields(method, target, headers)
        return b""

    def body(self, data: bytes) -> bytes:
        """Say what comes next of the request's body."""
        if data:
            self._out.append(memoryview(data))
        return b""

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Say that the request is whole; a WebSocket only begins then."""
        if not self._tunnel:
            self._end = True
            self._out_trailers = trailers or []
        return b""

    def send_through(self, data: memoryview) -> int:
        """Send through a tunnel what the target takes now; return how many bytes that was.

        Raises:
            trio.BrokenResourceError: it takes no more.
        """
        self._require_taker()
        sent = 0
        while sent < len(data):
            size = self._connection.send_body(self._stream_id, data[sent:], end=False)
            if not size:
                break
            sent += size
        self._connection.flush()
        return sent

    def end_tunnel(self) -> None:
        """Say that nothing more is sent through a tunnel.

        Raises:
            trio.BrokenResourceError: the target takes no more.
        """
        self._require_taker()
        if not self._ended:
            self._ended = True
            self._connection.send_end(self._stream_id, [])
            self._connection.flush()

    async def send(self, data: bytes, progress: Callable[[], None] | None = None) -> None:
        """Send what was said of the request, as fast as the target takes it.

        Args:
            data: Nothing: what is to be sent is known here.
            progress: Called before each wait; the target has taken something since the last.

        Raises:
            trio.BrokenResourceError: the target takes no more of it; it may have answered.
        """
        assert not data
        while not self.send_some():
            if progress is not None:
                progress()
            await self.wait_sendable()

    def send_some(self) -> bool:
        """Send what the target takes now; return whether that was all.

        Raises:
            trio.BrokenResourceError: it takes no more.
        """
        connection = self._connection
        self._require_taker()
        if self._fields is not None:
            if connection.is_congested:
                return False
            self._ended = self._end and not self._out and not self._out_trailers
            self._stream_id = connection.open(self, self._fields, end=self._ended)
            if not self._stream_id:
                self.lose("the target takes no further requests", refused=True)
                raise trio.BrokenResourceError(self._failure)
            self._fields = None
        while self._out:
            data = self._out[0]
            last = self._end and len(self._out) == 1 and not self._out_trailers
            size = connection.send_body(self._stream_id, data, end=last)
            if size == len(data):
                self._out.popleft()
                self._ended = last
            elif size:
                self._out[0] = data[size:]
            else:
                connection.flush()
                return False
        if self._end and not self._ended:
            connection.send_end(self._stream_id, self._out_trailers)
            self._ended = True
        connection.flush()
        return True

    @property
    def _is_over(self) -> bool:
        """Whether the target takes nothing more of the request."""
        return bool(self._failure) or self.received or self._connection.is_deaf

    def _require_taker(self) -> None:
        if self._is_over:
            raise trio.BrokenResourceError(self._failure or "the target takes no more")

    def release(self) -> None:
        """Leave the connection; what is unfinished is cancelled."""
        connection = self._connection
        if self._stream_id and not self._failure and not (self.received and self._ended):
            connection.reset(self._stream_id, ErrorCodes.CANCEL)
        if self._stream_id:
            connection.acknowledge(self._stream_id, self._held)
        self._held = 0
        self._body.clear()
        connection.flush()
        connection.leave(self, self._stream_id)

    # The response, as the relay takes it

    async def receive(self, watch: SocketStream | None) -> bool:
        """Wait for more of the response; see ``Upstream``."""
        while not (self._heads or self._body or self.received or self._failure):
            if not await self.wait_readable(watch):
                return False
        return True

    def next_response(self) -> ResponseHead | None:
        """Return the head of the next response, 1xx or final, or None when it is still to come.

        Raises:
            ProtocolError: it will not come.
        """
        if self._heads:
            head = self._heads.popleft()
            if self._tunnel and 200 <= head.status <= 299 and not self.received:
                return h2_fields.switching_head(head, self._accept)
            return head
        if self._failure:
            raise ProtocolError(self._failure)
        return None

    def take_body(self) -> bytes:
        """Return all that is here of the body; ``received`` tells whether that was the end.

        Raises:
            ProtocolError: the rest will not come; its ``body`` is what came before that.
        """
        parts, self._body = self._body, []
        self.is_costly = len(parts) > _MANY_PARTS
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._held:
            self._connection.acknowledge(self._stream_id, self._held)
            self._connection.flush()
            self._held = 0
        if self._failure:
            error = ProtocolError(self._failure)
            error.body = data
            raise error
        return data

    def switched(self) -> bytes:
        """Return nothing: what has arrived of another protocol is still to be taken."""
        return b""

    def tunnel_end(self) -> H2TunnelEnd:
        """Return the target's end of a tunnel, after it has accepted that."""
        return H2TunnelEnd(self)

    async def wait_sendable(self) -> None:
        """Wait until more can be sent, or it is certain that it can't be.

        What becomes of other requests on the connection does not end the wait: who waits here
        takes its end for a sign that the target has taken something.
        """
        connection = self._connection
        while True:
            await connection.wait_changed()
            if self._is_over or connection.takes(self._stream_id):
                return

    # The response, as the connection brings it

    def add_head(self, head: ResponseHead) -> None:
        """Take a head.

        Raises:
            ProtocolError: there are too many.
        """
        if len(self._heads) >= _MAX_HEADS:
            raise ProtocolError(f"more than {_MAX_HEADS} heads")
        self.heard = True
        self.may_have_body = head.status not in (204, 304)  # the library knows HEAD
        self._heads.append(head)
        self.wake_reader()

    def add_body(self, data: bytes, size: int) -> None:
        """Take a part of the body, which takes ``size`` bytes of the window."""
        self._body.append(data)
        self._held += size
        self.wake_reader()

    def end_response(self) -> None:
        """Take note of the end of the response."""
        if not self._failure:
            self.received = True
            self.wake_reader()

    def lose(self, reason: str, *, refused: bool = False) -> None:
        """Take note that nothing more will come, and that nothing is taken."""
        self._out.clear()
        if not self.received and not self._failure:
            self._failure = reason
            # Who has begun to answer has begun to work: it must not get the request again.
            self.refused = refused and not self.heard
        self.wake_reader()


def _key(headers: HeaderPairs) -> bytes:
    return next((value for name, value in headers if name.lower() == b"sec-websocket-key"), b"")


def _frames_body(name: bytes, value: bytes) -> bool:
    return name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
