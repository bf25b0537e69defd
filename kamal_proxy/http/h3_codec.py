"""HTTP/3 syntax (RFC 9114): frames on request streams and on the client's control stream, QPACK.

Reads without keeping: of what a client sends, only the head of a request is collected, up to its
limit. There is no dynamic table in either direction (RFC 9204 3.2.3), so that no bytes stand for
many others that came before. No IO; of the library, only the QPACK coder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pylsqpack

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs

# RFC 9114 8.1 and RFC 9204 6
NO_ERROR: Final = 0x100
GENERAL_PROTOCOL_ERROR: Final = 0x101
INTERNAL_ERROR: Final = 0x102
STREAM_CREATION_ERROR: Final = 0x103
CLOSED_CRITICAL_STREAM: Final = 0x104
FRAME_UNEXPECTED: Final = 0x105
FRAME_ERROR: Final = 0x106
EXCESSIVE_LOAD: Final = 0x107
ID_ERROR: Final = 0x108
SETTINGS_ERROR: Final = 0x109
MISSING_SETTINGS: Final = 0x10A
REQUEST_REJECTED: Final = 0x10B
REQUEST_CANCELLED: Final = 0x10C
REQUEST_INCOMPLETE: Final = 0x10D
MESSAGE_ERROR: Final = 0x10E
QPACK_DECOMPRESSION_FAILED: Final = 0x200
QPACK_ENCODER_STREAM_ERROR: Final = 0x201
QPACK_DECODER_STREAM_ERROR: Final = 0x202

_DATA = 0x0
_HEADERS = 0x1
_CANCEL_PUSH = 0x3
_SETTINGS = 0x4
_PUSH_PROMISE = 0x5
_GOAWAY = 0x7
_MAX_PUSH_ID = 0xD
_OF_HTTP2 = frozenset({0x2, 0x6, 0x8, 0x9})  # RFC 9114 7.2.8
_NOT_IN_REQUESTS = _OF_HTTP2 | {_CANCEL_PUSH, _SETTINGS, _PUSH_PROMISE, _GOAWAY, _MAX_PUSH_ID}
_NOT_IN_CONTROL = _OF_HTTP2 | {_DATA, _HEADERS, _PUSH_PROMISE}
_SETTINGS_OF_HTTP2 = frozenset({0x0, 0x2, 0x3, 0x4, 0x5})  # RFC 9114 7.2.4.1

_QPACK_MAX_TABLE_CAPACITY = 0x1
_MAX_FIELD_SECTION_SIZE = 0x6
_QPACK_BLOCKED_STREAMS = 0x7
_ENABLE_CONNECT_PROTOCOL = 0x8  # RFC 9220 5

_CONTROL = 0x0
_PUSH = 0x1
_QPACK_ENCODER = 0x2
_QPACK_DECODER = 0x3
_CRITICAL = frozenset({_CONTROL, _QPACK_ENCODER, _QPACK_DECODER})

_MAX_VARINT = 8
_MAX_SETTINGS = 4096  # bytes


class H3Error(Exception):
    """The client broke HTTP/3: its connection ends.

    Attributes:
        code: Error code (RFC 9114 8.1).
    """

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


@attrs.frozen
class Section:
    """A field section, still compressed: the head of a request, or its trailers.

    Attributes:
        block: Its bytes; None if they are more than is allowed, and were not kept.
    """

    block: bytes | None


class _Frames:
    """Frames, one after another; what is in them is told as it comes."""

    __slots__ = ("_begin", "_kept", "_kind", "_left")

    def __init__(self) -> None:
        self._begin = b""  # of a frame, its type and length not yet whole
        self._kind = -1  # of the frame that is arriving; -1 between frames
        self._left = 0  # bytes that it still lacks
        self._kept = bytearray()

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun to arrive and is not whole."""
        return bool(self._begin) or self._kind >= 0

    def _read(self, data: bytes, position: int) -> int:
        """Read on to the end of a frame's type and length; return the position after them."""
        known = len(self._begin)
        head = self._begin + data[position : position + 2 * _MAX_VARINT]
        kind, after_kind = read_varint(head, 0)
        length, end = read_varint(head, after_kind) if after_kind else (0, 0)
        if not end:
            self._begin = head
            return len(data)
        self._begin = b""
        self._kind, self._left = kind, length
        return position + end - known


class RequestReader(_Frames):
    """What a client sends on one request stream.

    Args:
        max_block: Most bytes of a field section, compressed.

    Attributes:
        tunnelled: Whether only DATA frames may come any more (RFC 9114 4.4).
    """

    __slots__ = ("_max_block", "_sections", "tunnelled")

    def __init__(self, max_block: int) -> None:
        super().__init__()
        self._max_block = max_block
        self._sections = 0  # 1 after the head, 2 after the trailers
        self.tunnelled = False

    @property
    def has_head(self) -> bool:
        """Whether the head of the request has arrived, or was too large."""
        return self._sections > 0

    def feed(self, data: bytes) -> list[Section | bytes]:
        """Take what arrived; return field sections, and parts of the body, in order.

        Raises:
            H3Error: it is no HTTP/3, or no request.
        """
        found: list[Section | bytes] = []
        position = 0
        while position < len(data):
            if self._kind < 0:
                position = self._read(data, position)
                if self._kind < 0:
                    break
                self._check(found)
            part = data[position : position + self._left]
            position += len(part)
            self._left -= len(part)
            if self._kind == _DATA:
                if part:
                    found.append(part)
            elif self._kind == _HEADERS:
                self._kept += part
                if not self._left:
                    found.append(Section(bytes(self._kept)))
                    self._kept.clear()
            if not self._left:
                self._kind = -1
        return found

    def end(self) -> None:
        """Take note of the end of the stream.

        Raises:
            H3Error: it is in the middle of a frame.
        """
        if self.in_frame:
            raise H3Error(FRAME_ERROR, "the stream ends in the middle of a frame")

    def _check(self, found: list[Section | bytes]) -> None:
        kind = self._kind
        if kind in _NOT_IN_REQUESTS or (kind == _DATA and self._sections != 1):
            raise H3Error(FRAME_UNEXPECTED, f"a frame of type {kind:#x} in a request")
        if kind == _HEADERS:
            if self._sections == 2 or self.tunnelled:
                raise H3Error(FRAME_UNEXPECTED, "one field section too many in a request")
            self._sections += 1
            if self._left > self._max_block:
                found.append(Section(None))
                self._kind = 0x21  # reserved to mean nothing (RFC 9114 7.2.8)


class _Control(_Frames):
    """The client's control stream."""

    __slots__ = ("_settled",)

    def __init__(self) -> None:
        super().__init__()
        self._settled = False

    def feed(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            if self._kind < 0:
                position = self._read(data, position)
                if self._kind < 0:
                    break
                self._check()
            part = data[position : position + self._left]
            position += len(part)
            self._left -= len(part)
            if self._kind == _SETTINGS:
                self._kept += part
            if not self._left:
                if self._kind == _SETTINGS:
                    _check_settings(bytes(self._kept))
                    self._kept.clear()
                self._kind = -1

    def _check(self) -> None:
        kind = self._kind
        if not self._settled:
            if kind != _SETTINGS:
                raise H3Error(MISSING_SETTINGS, "the control stream begins without SETTINGS")
            if self._left > _MAX_SETTINGS:
                raise H3Error(EXCESSIVE_LOAD, "a SETTINGS frame that is too long")
            self._settled = True
        elif kind == _SETTINGS or kind in _NOT_IN_CONTROL:
            raise H3Error(FRAME_UNEXPECTED, f"a frame of type {kind:#x} on the control stream")
        # Of GOAWAY, MAX_PUSH_ID and CANCEL_PUSH nothing follows: the proxy never pushes.


def _check_settings(payload: bytes) -> None:
    seen = set()
    position = 0
    while position < len(payload):
        name, position = read_varint(payload, position)
        value, position = read_varint(payload, position) if position else (0, 0)
        if not position:
            raise H3Error(FRAME_ERROR, "a SETTINGS frame that is cut")
        if name in _SETTINGS_OF_HTTP2 or name in seen:
            raise H3Error(SETTINGS_ERROR, f"setting {name:#x} is reserved or repeated")
        if name == _ENABLE_CONNECT_PROTOCOL and value > 1:
            raise H3Error(SETTINGS_ERROR, f"setting {name:#x} is {value}")
        seen.add(name)


class ServerCodec:
    """What a connection has beside its request streams, and what is said on those.

    Args:
        max_head_size: Most bytes of a request's head; a client is told, and may ignore it.
    """

    def __init__(self, max_head_size: int) -> None:
        self._max_head_size = max_head_size
        self._decoder = pylsqpack.Decoder(0, 0)
        self._encoder = pylsqpack.Encoder()
        self._types: dict[int, int] = {}  # of the client's unidirectional streams
        self._begins: dict[int, bytes] = {}  # of those whose type is not whole yet
        self._control = _Control()

    # What the client sends beside requests

    def receive(self, stream_id: int, data: bytes, *, ended: bool) -> bool:
        """Take what arrived on a unidirectional stream; return whether the stream is of any use.

        Raises:
            H3Error: it is no HTTP/3.
        """
        kind = self._types.get(stream_id)
        if kind is None:
            data = self._begins.pop(stream_id, b"") + data
            kind, position = read_varint(data, 0)
            if not position:
                if not ended:
                    self._begins[stream_id] = data
                return True
            data = data[position:]
            if kind == _PUSH:
                raise H3Error(STREAM_CREATION_ERROR, "a push stream of a client")
            if kind in _CRITICAL and kind in self._types.values():
                raise H3Error(STREAM_CREATION_ERROR, f"a second stream of type {kind:#x}")
            self._types[stream_id] = kind
        if kind not in _CRITICAL:
            if ended:
                del self._types[stream_id]
            return False
        if ended:
            raise H3Error(CLOSED_CRITICAL_STREAM, f"the stream of type {kind:#x} ends")
        if kind == _CONTROL:
            self._control.feed(data)
        elif kind == _QPACK_ENCODER:
            try:
                self._decoder.feed_encoder(data)
            except pylsqpack.EncoderStreamError as error:
                raise H3Error(QPACK_ENCODER_STREAM_ERROR, "a dynamic table") from error
        else:
            try:
                self._encoder.feed_decoder(data)
            except pylsqpack.DecoderStreamError as error:
                raise H3Error(QPACK_DECODER_STREAM_ERROR, "unknown field sections") from error
        return True

    def reset(self, stream_id: int) -> None:
        """Take note that the client has broken off a unidirectional stream.

        Raises:
            H3Error: it is one that must not end.
        """
        self._begins.pop(stream_id, None)
        if self._types.pop(stream_id, -1) in _CRITICAL:
            raise H3Error(CLOSED_CRITICAL_STREAM, "a stream that must not end was reset")

    def decode(self, stream_id: int, block: bytes) -> HeaderPairs:
        """Return the fields of a section.

        Raises:
            H3Error: it can't be decompressed.
        """
        try:
            _, fields = self._decoder.feed_header(stream_id, block)
        except (pylsqpack.DecompressionFailed, pylsqpack.StreamBlocked, ValueError) as error:
            raise H3Error(QPACK_DECOMPRESSION_FAILED, "a malformed field section") from error
        return fields

    # What the proxy sends

    def preface(self) -> bytes:
        """Return the beginning of the proxy's control stream."""
        settings = b"".join(
            varint(name) + varint(value)
            for name, value in (
                (_QPACK_MAX_TABLE_CAPACITY, 0),
                (_MAX_FIELD_SECTION_SIZE, self._max_head_size),
                (_QPACK_BLOCKED_STREAMS, 0),
                (_ENABLE_CONNECT_PROTOCOL, 1),
            )
        )
        return varint(_CONTROL) + frame(_SETTINGS, settings)

    def section(self, stream_id: int, fields: HeaderPairs) -> bytes:
        """Return the HEADERS frame of some fields."""
        _, block = self._encoder.encode(stream_id, fields)
        return frame(_HEADERS, block)


def goaway(stream_id: int) -> bytes:
    """Return the frame that says that requests from this stream on are not served."""
    return frame(_GOAWAY, varint(stream_id))


def data_frame(data: bytes | memoryview) -> bytes:
    """Return the frame of a part of a response's body."""
    return frame(_DATA, data)


def frame(kind: int, payload: bytes | memoryview) -> bytes:
    """Return a frame (RFC 9114 7.1)."""
    return b"".join((varint(kind), varint(len(payload)), payload))


def varint(value: int) -> bytes:
    """Return a number as QUIC writes it (RFC 9000 16)."""
    for power, size in enumerate((1, 2, 4, 8)):
        if value < 1 << (8 * size - 2):
            return (value | power << (8 * size - 2)).to_bytes(size, "big")
    raise ValueError(f"{value} is too large")


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at a position and the position after it, which is 0 if it is cut."""
    if position >= len(data):
        return 0, 0
    size = 1 << (data[position] >> 6)
    end = position + size
    if end > len(data):
        return 0, 0
    return int.from_bytes(data[position:end], "big") & (1 << (8 * size - 2)) - 1, end
