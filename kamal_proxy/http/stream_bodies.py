"""What a stream of HTTP/2 or HTTP/3 holds of its request and of its response. No IO.

Of the one, what nobody took yet: flow control bounds that. Of the other, what is not framed yet:
those who add to it wait until it is.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs


class Incoming:
    """What has arrived of a request's body.

    Attributes:
        size: Bytes of it so far, taken ones included.
        ended: Whether the last of the request has arrived.
        trailers: What came after it.
    """

    __slots__ = ("_arrival", "_data", "ended", "size", "trailers")

    def __init__(self, *, ended: bool) -> None:
        # Not a list of parts: those of one byte would take forty times the memory of the window.
        self._data = bytearray()
        self._arrival: trio.Event | None = None  # what waits for more
        self.size = 0
        self.ended = ended
        self.trailers: HeaderPairs = []

    def __bool__(self) -> bool:
        """Return whether something is here that nobody took."""
        return bool(self._data)

    def add(self, data: bytes) -> None:
        """Take what has arrived, and wake who waits for it."""
        self.size += len(data)
        self._data += data
        self.tell()

    def take(self) -> bytes:
        """Return all that is here."""
        data = bytes(self._data)
        self._data.clear()
        return data

    async def wait(self) -> None:
        """Wait until something arrives, be it the end."""
        if self._arrival is None:
            self._arrival = trio.Event()
        await self._arrival.wait()

    def tell(self) -> None:
        """Wake who waits."""
        if self._arrival is not None:
            self._arrival.set()
            self._arrival = None


class Outgoing:
    """What is to be sent: heads, then the body, then trailers.

    Attributes:
        heads: Field sections to be sent before anything else, in order.
        size: Bytes of body.
        trailers: What comes after it.
        ending: Whether nothing is added any more.
    """

    __slots__ = ("_parts", "_progress", "ending", "heads", "size", "trailers")

    def __init__(self) -> None:
        self._parts: deque[memoryview] = deque()
        self._progress: trio.Event | None = None  # what waits for some to be sent
        self.heads: deque[HeaderPairs] = deque()
        self.size = 0
        self.trailers: HeaderPairs = []
        self.ending = False

    def __bool__(self) -> bool:
        """Return whether something is queued, beside the mere end."""
        return bool(self.heads or self._parts or self.trailers)

    @property
    def is_done(self) -> bool:
        """Whether what was taken was the last."""
        return self.ending and not self

    def add(self, data: bytes) -> None:
        """Queue a part of the body."""
        self._parts.append(memoryview(data))
        self.size += len(data)

    def take_fields(self) -> HeaderPairs:
        """Return the next field section: a head, or the trailers once the body is sent."""
        if self.heads:
            return self.heads.popleft()
        fields, self.trailers = self.trailers, []
        return fields

    def take_body(self, limit: int) -> memoryview:
        """Return up to ``limit`` bytes of the body, of which there are some."""
        first = self._parts[0]
        if len(first) <= limit:
            self._parts.popleft()
            data = first
        else:
            data = first[:limit]
            self._parts[0] = first[limit:]
        self.size -= len(data)
        return data

    def drop(self) -> None:
        """Forget what is queued."""
        self.heads.clear()
        self._parts.clear()
        self.trailers = []
        self.size = 0

    async def wait(self) -> None:
        """Wait until some was sent, or nothing will be."""
        if self._progress is None:
            self._progress = trio.Event()
        await self._progress.wait()

    def tell(self) -> None:
        """Wake who waits."""
        if self._progress is not None:
            self._progress.set()
            self._progress = None
