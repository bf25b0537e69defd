"""Whose turn it is to send a frame on an HTTP/2 connection: each stream in turn, one frame each.

When it is the connection's window that is closed, the turns are kept: were the streams asked anew
whenever it opens a little, always in the same order, the first would take all of it, and the others
would pass for clients that take nothing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kamal_proxy.http.h2_codec import ServerCodec
    from kamal_proxy.http.h2_stream import H2Stream


class Turns:
    """The streams of one connection that have something to send.

    Args:
        codec: What frames it, and knows the windows.
    """

    __slots__ = ("_codec", "_queue", "_waiting")

    def __init__(self, codec: ServerCodec) -> None:
        self._codec = codec
        self._queue: deque[H2Stream] = deque()
        self._waiting: deque[H2Stream] = deque()  # for the connection's window

    def __bool__(self) -> bool:
        """Return whether a stream may have something to send now."""
        return bool(self._queue)

    def add(self, stream: H2Stream) -> None:
        """Give a stream its turn after the others, if it has something to send."""
        if not stream.in_queue and stream.has_output:
            stream.in_queue = True
            self._queue.append(stream)

    def forget(self, stream: H2Stream) -> None:
        """Be done with a stream that has ended: the window may never open again."""
        if stream.in_queue:
            stream.in_queue = False
            turns = self._waiting if stream in self._waiting else self._queue
            turns.remove(stream)

    def window_opened(self) -> None:
        """Take note that the client has opened the connection's window."""
        self._queue.extend(self._waiting)
        self._waiting.clear()

    def frame_one(self) -> bool:
        """Frame something of the next stream; return whether there was something."""
        stream = self._queue.popleft()
        if stream.gone or not stream.has_output:
            stream.in_queue = False
            return False
        if not stream.frame_one():
            if self._codec.outbound_flow_control_window <= 0:
                self._waiting.append(stream)
            else:
                stream.in_queue = False  # until its own window opens
            return False
        stream.in_queue = False
        self.add(stream)
        return True
