"""HTTP/2 frames told apart in what a peer sends, before the h2 library gets them. Pure.

The library takes a GOAWAY for the end of a connection, although streams go on after it (RFC 9113
6.8): here it is taken out. Frames are counted, too, by whether they carry anything, so that their
receiver can put a limit to those that only cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD_SIZE = 9  # bytes before the payload of each frame (RFC 9113 4.1)

_DATA = 0x0
_HEADERS = 0x1
_SETTINGS = 0x4
_PUSH_PROMISE = 0x5
_GOAWAY = 0x7
_CONTINUATION = 0x9
_END_HEADERS = 0x4
_PADDED = 0x8
_STREAM_ID = 0x7FFFFFFF


class FrameError(Exception):
    """The peer sent what is no HTTP/2, or a frame beyond a limit; the text says which."""


@attrs.frozen
class GoAway:
    """What a GOAWAY frame says.

    Attributes:
        last_stream_id: Streams above it were not looked at, and will not be.
        error_code: Why.
        debug: What else the peer says about it.
    """

    last_stream_id: int
    error_code: int
    debug: bytes


class FrameReader:
    """Splits what one peer sends into frames.

    Args:
        max_frame: Largest payload of a frame, in bytes.
        max_head: Largest head of a message as it is sent: its HEADERS and CONTINUATION frames
            together, in bytes.

    Attributes:
        carrying: Frames that carried something, since the connection began.
        idle: Frames that did not.
    """

    __slots__ = ("_begun", "_buffer", "_head_size", "_max_frame", "_max_head", "carrying", "idle")

    def __init__(self, max_frame: int, max_head: int) -> None:
        self._max_frame = max_frame
        self._max_head = max_head
        self._buffer = b""
        self._begun = False
        self._head_size = -1  # of the head that is arriving; -1 between heads
        self.carrying = 0
        self.idle = 0

    def feed(self, data: bytes) -> Iterator[bytes | GoAway]:
        """Take what was received; yield the frames that are whole now, one by one.

        All of them have to be taken. Where one breaks the protocol, those before it still count.

        Raises:
            FrameError: it is no HTTP/2, or breaks a limit.
        """
        data = self._buffer + data if self._buffer else data
        position = 0
        size = len(data)
        while size - position >= HEAD_SIZE:
            length = int.from_bytes(data[position : position + 3], "big")
            kind, flags = data[position + 3], data[position + 4]
            if not self._begun:
                _check_first(data, kind)
                self._begun = True
            if length > self._max_frame:
                raise FrameError(f"a frame of {length} bytes, more than {self._max_frame}")
            end = position + HEAD_SIZE + length
            if end > size:
                break
            self._count(kind, flags, data, position + HEAD_SIZE, length)
            if kind == _GOAWAY:
                yield _go_away(data[position + HEAD_SIZE : end])
            else:
                yield data[position:end]
            position = end
        self._buffer = data[position:]

    def _count(self, kind: int, flags: int, data: bytes, payload: int, length: int) -> None:
        if self._head_size >= 0 and kind != _CONTINUATION:
            raise FrameError("another frame in the middle of a head")
        if kind in (_HEADERS, _PUSH_PROMISE) or (kind == _CONTINUATION and self._head_size >= 0):
            self._head_size = max(self._head_size, 0) + length
            if self._head_size > self._max_head:
                raise FrameError(f"a head of more than {self._max_head} bytes")
            if flags & _END_HEADERS:
                self._head_size = -1
        padding = data[payload] + 1 if kind == _DATA and flags & _PADDED and length else 0
        if kind == _HEADERS or (kind == _DATA and length > padding):
            self.carrying += 1
        else:
            self.idle += 1


def _check_first(data: bytes, kind: int) -> None:
    if data.startswith(b"HTTP/"):
        raise FrameError("it speaks HTTP/1 here; leave out h2c:// to reach it so")
    if kind != _SETTINGS:  # RFC 9113 3.4
        raise FrameError("it does not speak HTTP/2 here")


def _go_away(payload: bytes) -> GoAway:
    if len(payload) < 8:
        raise FrameError(f"a GOAWAY frame of {len(payload)} bytes")
    return GoAway(
        int.from_bytes(payload[:4], "big") & _STREAM_ID,
        int.from_bytes(payload[4:8], "big"),
        payload[8:],
    )
