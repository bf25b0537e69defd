"""HTTP/1.1 syntax, the seam behind which the parser can change.

Everything above speaks in heads and body parts; everything below is h11. A faster scanner for
ordinary heads will sit beside it here. No IO. Heads of requests pass ``scan_head`` first, which
refuses what servers are known to read in different ways; what h11 then accepts is written anew, so
no target ever sees a client's own framing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeAlias
from urllib.parse import quote_from_bytes

import h11

from kamal_proxy._fastpath import ChunkScanner, scan_head

if TYPE_CHECKING:
    from collections.abc import Iterator

# Trailers are merged into the header by many servers; these may only come in the head itself
# (RFC 9110 6.5.1).
_NOT_IN_TRAILERS = frozenset(
    {
        b"authorization",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"forwarded",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"set-cookie",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-kamal-target",
        b"x-request-id",
        b"x-request-start",
    }
)

# (lower-case name, name as received, value)
Header: TypeAlias = tuple[bytes, bytes, bytes]
HeaderPairs: TypeAlias = list[tuple[bytes, bytes]]

CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2

MAX_HEADERS: Final = 200

_CRLF = b"\r\n"
_MANY_PARTS = 64
_ASCII = bytes(range(128))
_RESUME = 3  # bytes of a blank line that an earlier read may have brought


class ProtocolError(Exception):
    """A peer broke HTTP/1.1. ``status`` is what a client deserves to hear about its request."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status
        self.body = b""  # what came of a body before its framing was broken


class _Head:
    __slots__ = ("headers",)

    headers: list[Header]

    def get(self, name: bytes) -> bytes:
        """Return the first value of a header (lower-case name), or nothing."""
        for lower, _, value in self.headers:
            if lower == name:
                return value
        return b""


class RequestHead(_Head):
    """The head of a request.

    Attributes:
        method: Method, as received.
        target: Request target, as received.
        version: ``b"1.1"`` or ``b"1.0"``, or ``b"2.0"`` or ``b"3.0"`` of a multiplexed stream.
        headers: Header fields in order.
        length: Bytes of body, or ``CHUNKED``.
        protocol: What a stream wants to speak from now on (RFC 8441 4), if not HTTP.
    """

    __slots__ = ("length", "method", "protocol", "target", "version")

    def __init__(
        self,
        method: bytes,
        target: bytes,
        version: bytes,
        headers: list[Header],
        length: int,
        protocol: bytes = b"",
    ) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.headers = headers
        self.length = length
        self.protocol = protocol


class ResponseHead(_Head):
    """The head of a response; ``length`` is the body's, ``CHUNKED`` or ``UNTIL_CLOSE``."""

    __slots__ = ("length", "reason", "status")

    def __init__(self, status: int, reason: bytes, headers: list[Header], length: int) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        self.length = length


class _Messages:
    """What both roles share: the body of the message that is being received."""

    _parser: h11.Connection

    def __init__(self) -> None:
        self.received = False  # the message has arrived whole
        self.trailers: HeaderPairs = []
        self.is_costly = False  # the body came in very many parts lately

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer; ``b""`` says that it closed its side."""
        self._parser.receive_data(data)

    def next_body(self) -> bytes | None:
        """Return the next part of the body, or None: ``received`` tells the end from need of data.

        Raises:
            ProtocolError: the peer broke the framing, or closed before the end of the body.
        """
        if self.received:
            return None
        event = self._next_event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, h11.EndOfMessage):
            self.received = True
            self.trailers = [
                (raw, value)
                for lower, raw, value in _headers(event.headers)
                if may_be_trailer(lower)
            ]
        return None

    def take_body(self) -> bytes:
        """Return all that is here of the body, joined; ``received`` tells whether that was the end.

        Raises:
            ProtocolError: the peer broke the framing, or closed before the end of the body; its
                ``body`` is what came before that.
        """
        parts = []
        try:
            while (data := self.next_body()) is not None:
                parts.append(data)
        except ProtocolError as error:
            error.body = b"".join(parts)
            raise
        self.is_costly = len(parts) > _MANY_PARTS
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def switched(self) -> bytes:
        """Return what has arrived of another protocol, after a 101 response."""
        return bytes(self._parser.trailing_data[0])

    def _next_event(self) -> object:
        try:
            event = self._parser.next_event()
        except h11.RemoteProtocolError as error:
            raise ProtocolError(str(error), error.error_status_hint) from error
        if event is h11.PAUSED:
            raise ProtocolError("data where no message can be")
        return event

    def _write(self, event: type[h11.Event], **fields: object) -> bytes:
        """Render what is to be sent; what came from one peer may be impossible to tell another."""
        try:
            return self._parser.send(event(**fields)) or b""
        except h11.LocalProtocolError as error:
            raise ProtocolError(str(error)) from error

    def body(self, data: bytes) -> bytes:
        """Frame a part of the body to send."""
        return self._write(h11.Data, data=data)

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Frame the end of the body to send."""
        return self._write(h11.EndOfMessage, headers=trailers or [])


class ServerCodec(_Messages):
    """The proxy's side of a client connection."""

    def __init__(self, max_head_size: int, max_headers: int = MAX_HEADERS) -> None:
        super().__init__()
        self._parser = h11.Connection(h11.SERVER, max_head_size)
        self._max_head_size = max_head_size
        self._max_headers = max_headers
        self._head = bytearray()  # bytes of a head that is still incomplete
        self._scanned = 0
        self._chunks: ChunkScanner | None = None
        self._unscanned = b""  # bytes of a chunked body that came with the head
        self._malformed = ""  # what was wrong with the chunks

    @property
    def has_partial_head(self) -> bool:
        """Whether a request has begun to arrive."""
        return bool(self._head)

    def receive_head_data(self, data: bytes) -> None:
        """Take bytes that arrived while waiting for a request."""
        self._head += data

    def next_request(self) -> RequestHead | None:
        """Return the head of the next request, or None when more data is needed.

        Raises:
            ProtocolError: the head is malformed, ambiguous (400), too large (431), or asks for
                what a proxy can't do (501, 505).
        """
        head = self._head
        while head.startswith(_CRLF):  # RFC 9112 2.2: empty lines before a request are ignored
            del head[:2]
            self._scanned = 0
        if not head:
            return None
        try:
            end = scan_head(head, max(0, self._scanned - _RESUME))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if end > self._max_head_size or (end < 0 and len(head) > self._max_head_size):
            raise ProtocolError(f"request head over {self._max_head_size} bytes", 431)
        if end < 0:
            self._scanned = len(head)
            if head[0] < 0x21 and head != b"\r":
                raise ProtocolError("illegal request line")
            return None
        # The request line and the blank line are lines too.
        if head.count(_CRLF, 0, end) - 2 > self._max_headers:
            raise ProtocolError(f"more than {self._max_headers} header fields", 431)
        lengths = head.lower().count(b"\r\ncontent-length:", 0, end)
        data = bytes(head)
        self._parser.receive_data(_ascii_target(data))
        head.clear()
        self._scanned = 0
        event = self._next_event()
        assert isinstance(event, h11.Request)
        request = self._checked(event, lengths)
        self._chunks = None
        if request.length == CHUNKED:
            self._chunks = ChunkScanner(self._max_head_size)
            self._unscanned = data[end:]
        return request

    def receive_data(self, data: bytes) -> None:
        """Take bytes of the request's body.

        Raises:
            ProtocolError: the chunked framing is malformed or ambiguous.
        """
        self._scan_chunks(data)
        super().receive_data(data)

    def next_body(self) -> bytes | None:
        """Return the next part of the body; see :meth:`_Messages.next_body`."""
        unscanned, self._unscanned = self._unscanned, b""
        self._scan_chunks(unscanned)
        return super().next_body()

    def _scan_chunks(self, data: bytes) -> None:
        if self._malformed:
            # h11 may find nothing wrong with it, and would go on.
            raise ProtocolError(self._malformed)
        if self._chunks is not None and not self._chunks.done:
            try:
                self._chunks.scan(data)
            except ValueError as error:
                self._malformed = str(error)
                raise ProtocolError(self._malformed) from error

    def _checked(self, request: h11.Request, lengths: int) -> RequestHead:
        if request.http_version not in (b"1.1", b"1.0"):
            raise ProtocolError("HTTP version not supported", 505)
        if lengths > 1:
            raise ProtocolError("more than one Content-Length")
        headers = _headers(request.headers)
        length = 0
        chunked = False
        for name, _, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
        if chunked:
            if lengths:
                raise ProtocolError("both Content-Length and Transfer-Encoding")
            if request.http_version == b"1.0":
                raise ProtocolError("Transfer-Encoding in an HTTP/1.0 request")
            length = CHUNKED
        self.received = False
        self.trailers = []
        return RequestHead(request.method, request.target, request.http_version, headers, length)

    def informational(self, status: int, reason: bytes, headers: HeaderPairs) -> bytes:
        """Write a 1xx response; an HTTP/1.0 client gets none (RFC 9110 15.2).

        After 101 the connection is no longer HTTP; see :meth:`switched`.
        """
        if self._parser.their_http_version == b"1.0":
            return b""
        return self._write(
            h11.InformationalResponse, status_code=status, reason=reason, headers=headers
        )

    def response(self, status: int, reason: bytes, headers: HeaderPairs) -> bytes:
        """Write the head of the final response.

        ``headers`` carry at most a Content-Length as framing: without one, a body is sent
        chunked, or until close to an HTTP/1.0 client. ``Connection: close`` is added when the
        connection can't be used again.
        """
        return self._write(h11.Response, status_code=status, reason=reason, headers=headers)

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Frame the end of the body to send; an HTTP/1.0 client gets no trailers."""
        return super().end(None if self._parser.their_http_version == b"1.0" else trailers)

    def next_cycle(self) -> bool:
        """Get ready for the client's next request; False if the connection can't be used again."""
        parser = self._parser
        if parser.our_state is not h11.DONE or parser.their_state is not h11.DONE:
            return False
        self._head += parser.trailing_data[0]
        if self._head:
            # h11 can't give bytes back, and the next head must pass the scan first.
            self._parser = h11.Connection(h11.SERVER, self._max_head_size)
        else:
            parser.start_next_cycle()
        return True


class ClientCodec(_Messages):
    """The proxy's side of a connection to a target."""

    def __init__(self, max_head_size: int) -> None:
        super().__init__()
        self._parser = h11.Connection(h11.CLIENT, max_head_size)
        self._closed = False  # by the target
        self.heard = False  # something of it since the request
        self._sent: HeaderPairs = []  # the fields of the request

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the target; ``b""`` says that it closed its side."""
        self._closed = self._closed or not data
        self.heard = self.heard or bool(data)
        super().receive_data(data)

    def request(
        self,
        method: bytes,
        target: bytes,
        headers: HeaderPairs,
        upgrade: bytes = b"",  # noqa: ARG002 - the headers say it
    ) -> bytes:
        """Write the head of a request; ``headers`` carry its framing, and what it switches to."""
        self.received = self.heard = False
        self.trailers = []
        self._sent = headers
        return self._write(h11.Request, method=method, target=target, headers=headers)

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Frame the end of the body to send; a body of a length has no trailers."""
        if trailers and any(name.lower() == b"content-length" for name, _ in self._sent):
            trailers = None  # from a client that speaks a version in which it may have both
        return self._write(h11.EndOfMessage, headers=trailers or [])

    def next_response(self) -> ResponseHead | None:
        """Return the head of the next response, 1xx or final, or None when more data is needed.

        Raises:
            ProtocolError: the target sent garbage, too large a head, or closed, or it switched
                protocols although the request asked for no such thing.
        """
        try:
            event = self._next_event()
        except ProtocolError as error:
            if not self._closed:
                raise
            where = "in the middle of" if self.heard else "without"
            raise ProtocolError(f"closed {where} a response") from error
        if isinstance(event, h11.InformationalResponse | h11.Response) and (
            event.http_version not in (b"1.1", b"1.0")
        ):
            raise ProtocolError("HTTP version not supported")
        if isinstance(event, h11.InformationalResponse):
            return ResponseHead(event.status_code, event.reason, _headers(event.headers), 0)
        if isinstance(event, h11.Response):
            headers = _headers(event.headers)
            length = UNTIL_CLOSE
            for name, _, value in headers:
                if name == b"transfer-encoding":
                    length = CHUNKED
                    break
                if name == b"content-length":
                    length = int(value)
            return ResponseHead(event.status_code, event.reason, headers, length)
        if isinstance(event, h11.ConnectionClosed):
            raise ProtocolError("closed without a response")
        return None

    def next_cycle(self) -> bool:
        """Get ready for another request; False if the connection can't be used again."""
        parser = self._parser
        if parser.our_state is not h11.DONE or parser.their_state is not h11.DONE:
            return False
        if self._closed or parser.trailing_data[0]:
            return False  # bytes that nobody asked for make the next answer doubtful
        parser.start_next_cycle()
        return True


def whole_response(status: int, reason: str, headers: HeaderPairs, body: bytes) -> bytes:
    """Write a response to what could not be understood, after which no codec can speak."""
    lines = [b"HTTP/1.1 %d %b" % (status, reason.encode())]
    lines += [
        name + b": " + value
        for name, value in (
            *headers,
            (b"Content-Length", b"%d" % len(body)),
            (b"Connection", b"close"),
        )
    ]
    return b"\r\n".join((*lines, b"", body))


def _ascii_target(data: bytes) -> bytes:
    """Percent-encode a request target that is not ASCII: some clients send plain UTF-8."""
    end = data.index(_CRLF)
    if data[:end].isascii():
        return data
    method, space, target = data[:end].partition(b" ")
    return method + space + quote_from_bytes(target, safe=_ASCII).encode() + data[end:]


def may_be_trailer(name: bytes) -> bool:
    """Return whether a field of this lower-case name may come after a body."""
    # Servers that turn names into variables take an underscore for a hyphen.
    name = name.replace(b"_", b"-")
    return name not in _NOT_IN_TRAILERS and not name.startswith(b"x-forwarded-")


class _Fields(Protocol):
    """What h11's header collection offers; it is not exported by name."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...

    def raw_items(self) -> HeaderPairs: ...


def _headers(headers: _Fields) -> list[Header]:
    return [
        (lower, raw, value)
        for (lower, value), (raw, _) in zip(headers, headers.raw_items(), strict=True)
    ]
