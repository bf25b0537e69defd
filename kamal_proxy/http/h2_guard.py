"""What a client of HTTP/2 may send, looked at frame by frame before the h2 library sees it. Pure.

The library answers whatever is legal, at some 50 us for each frame, however many there are. Here
frames are told apart, and those that only cost are paid for from a budget that useful ones fill up
again: floods of PING, SETTINGS, PRIORITY, WINDOW_UPDATE, CONTINUATION, RST_STREAM, empty DATA and
frames that nobody knows (RFC 9113 10.5), and requests that are cancelled as soon as they are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD: Final = 9  # bytes before the payload of each frame (RFC 9113 4.1)
MAX_FRAME: Final = 16 * 1024  # bytes of payload; the smallest that may be allowed

_DATA = 0x0
_HEADERS = 0x1
_SETTINGS = 0x4
_CONTINUATION = 0x9
_END_STREAM = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8

# Points. A connection may use up a burst of them, and gets more with time and for what is useful.
_BURST = 2000.0
_PER_SECOND = 200.0
_PER_REQUEST = 20.0
_PER_DATA_SENT = 4.0  # WINDOW_UPDATE and PING frames answer them: three, with gRPC's clients
_PER_DRIBBLE = 0.5  # more than that, and a window that is opened by bytes would pay for itself
_PER_DATA_RECEIVED = 1.0
_TINY = 1024  # bytes
_COST_CHEAP = 1.0
_COST_SETTINGS = 20.0  # changes every stream, and is answered
_COST_CONTINUATION = 10.0
_COST_EMPTY_DATA = 5.0
_COST_RESET = 1.0

# Requests that the client cancels, or makes the proxy cancel, before they are answered (rapid
# reset: each costs a request to the target). Browsers cancel many when a page is left.
_RESET_BURST = 200.0
_RESETS_PER_SECOND = 20.0


#: What there was too much of, for the metrics.
CANCELLED: Final = "cancelled"
FRAMES: Final = "frames"
HEAD: Final = "head"
MEMORY: Final = "memory"
WORK: Final = "work"


class FloodError(Exception):
    """The client sends too much of what is of no use; the text says what.

    Attributes:
        kind: One of ``CANCELLED``, ``FRAMES`` and ``HEAD``.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class FrameError(Exception):
    """The client does not speak HTTP/2; ``code`` is what to tell it (RFC 9113 7).

    Attributes:
        code: Error code for the GOAWAY frame.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


_PROTOCOL_ERROR = 0x1
_FRAME_SIZE_ERROR = 0x6


class Budget:
    """Points that are used up and come back with time.

    Args:
        burst: Most that there can be, and what there is at first.
        rate: How many come back in a second.
        now: Seconds on any clock.
    """

    __slots__ = ("_burst", "_left", "_rate", "_since")

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self._burst = self._left = burst
        self._rate = rate
        self._since = now

    def take(self, points: float, now: float) -> bool:
        """Use points up; return whether there were so many."""
        self.give((now - self._since) * self._rate)
        self._since = now
        self._left -= points
        return self._left >= 0

    def give(self, points: float) -> None:
        """Add points, up to the most that there can be."""
        self._left = min(self._burst, self._left + points)


def reset_budget(now: float) -> Budget:
    """Return what a client may cancel of its requests, of any version of HTTP with streams.

    Args:
        now: Seconds on any clock.
    """
    return Budget(_RESET_BURST, _RESETS_PER_SECOND, now)


class FrameGuard:
    """Splits what a client sends into frames, and counts them.

    Args:
        max_block: Most bytes that the head of a request may have as it is sent, compressed.
        now: Seconds on a clock that only goes forward.

    Attributes:
        in_block: Whether a head has begun to arrive and is not whole yet.
        blocks: How many have come in more than one frame.
        begun: Whether the preface was right.
    """

    __slots__ = (
        "_block",
        "_budget",
        "_buffer",
        "_max_block",
        "_resets",
        "begun",
        "blocks",
        "in_block",
    )

    def __init__(self, max_block: int, now: float) -> None:
        self._max_block = max_block
        self._buffer = bytearray()
        self._block = 0  # bytes of the head that is arriving
        self._budget = Budget(_BURST, _PER_SECOND, now)
        self._resets = reset_budget(now)
        self.begun = False
        self.in_block = False
        self.blocks = 0

    def feed(self, data: bytes) -> None:
        """Take what was received; :meth:`frames` gives it back."""
        self._buffer += data

    def frames(self, now: float) -> Iterator[bytes]:
        """Give each frame that is here whole, the preface as one of them.

        Raises:
            FrameError: what came is no HTTP/2.
            FloodError: a budget is used up.
        """
        buffer = self._buffer
        if not self.begun:
            if not PREFACE.startswith(bytes(buffer[: len(PREFACE)])):
                raise FrameError("no HTTP/2 preface", _PROTOCOL_ERROR)
            if len(buffer) < len(PREFACE) + 5:
                return
            # RFC 9113 3.4: the first frame is SETTINGS, no answer to ours.
            if buffer[len(PREFACE) + 3] != _SETTINGS or buffer[len(PREFACE) + 4] & 1:
                raise FrameError("the first frame is not SETTINGS", _PROTOCOL_ERROR)
            del buffer[: len(PREFACE)]
            self.begun = True
            yield PREFACE
        while len(buffer) >= FRAME_HEAD:
            length = int.from_bytes(buffer[:3], "big")
            if length > MAX_FRAME:
                raise FrameError(f"a frame of {length} bytes", _FRAME_SIZE_ERROR)
            end = FRAME_HEAD + length
            if len(buffer) < end:
                return
            frame = bytes(buffer[:end])
            del buffer[:end]
            self._count(frame, length, now)
            yield frame

    def sent_data(self, window: int, *, cut: bool) -> None:
        """Note that a DATA frame was sent: the client will answer with window updates.

        Args:
            window: Bytes that the client allowed it to have.
            cut: Whether there was more to send.
        """
        self._budget.give(_PER_DRIBBLE if cut and window < _TINY else _PER_DATA_SENT)

    def answered(self) -> None:
        """Note that a request was answered."""
        self._resets.give(1.0)

    def reset(self, now: float) -> None:
        """Note that a request was cancelled before it was answered.

        Raises:
            FloodError: too many were.
        """
        if not self._resets.take(1.0, now):
            raise FloodError("too many requests were cancelled", CANCELLED)

    def _count(self, frame: bytes, length: int, now: float) -> None:
        kind, flags = frame[3], frame[4]
        if self.in_block and kind != _CONTINUATION:
            raise FrameError("another frame in the middle of a head", _PROTOCOL_ERROR)
        cost = _COST_CHEAP
        if kind == _HEADERS or (kind == _CONTINUATION and self.in_block):
            self._block = length if kind == _HEADERS else self._block + length
            if self._block > self._max_block:
                raise FloodError(f"a head of more than {self._max_block} bytes", HEAD)
            self.in_block = not flags & _END_HEADERS
            if kind == _HEADERS:
                self.blocks += self.in_block
                self._budget.give(_PER_REQUEST)
                return
            cost = _COST_CONTINUATION
        elif kind == _DATA:
            padding = frame[FRAME_HEAD] + 1 if flags & _PADDED and length else 0
            if length > padding:
                if length >= _TINY:
                    self._budget.give(_PER_DATA_RECEIVED)
                return
            if flags & _END_STREAM:
                return
            cost = _COST_EMPTY_DATA
        elif kind == _SETTINGS:
            cost = _COST_SETTINGS
        if not self._budget.take(cost, now):
            raise FloodError(f"too many frames of kind {kind}", FRAMES)
