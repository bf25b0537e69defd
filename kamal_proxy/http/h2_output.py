"""What is to be written on one connection: many tasks add to it, one writes.

Written at once by whoever has something to say, as long as the socket takes it; a task of its own
writes the rest, and what many say at the same time, which costs one system call then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.sockets import SocketStream

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Output:
    """The bytes that wait for one socket.

    Args:
        stream: The connection's stream.
        stall_timeout: Seconds that the client may take nothing.
        lost: Called once when nothing can be written any more, with the reason.
        more: Called when there is room again after the socket was full.

    Attributes:
        broken: Whether that is so; what is added then is dropped.
    """

    __slots__ = (
        "_chunk",
        "_lost",
        "_more",
        "_parts",
        "_room",
        "_size",
        "_stall",
        "_stream",
        "_wake",
        "broken",
    )

    def __init__(
        self,
        stream: SocketStream,
        stall_timeout: float,
        lost: Callable[[Reason], None],
        more: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._stall = stall_timeout
        self._lost = lost
        self._more = more
        self._parts: list[bytes] = []
        self._size = 0  # bytes in them
        # What the socket has not taken of what it was given: it must get the same again.
        self._chunk = memoryview(b"")
        self._wake = trio.Event()
        self._room: trio.Event | None = None
        self.broken = False

    def forget(self) -> None:
        """Call nobody any more, at the end.

        Else the connection and this would keep each other, and all that TLS has in memory for them,
        until the garbage collector comes by.
        """
        self._lost = self._more = _nobody

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return self._size + len(self._chunk)

    @property
    def is_stuck(self) -> bool:
        """Whether the socket is full."""
        return bool(self._chunk)

    def add(self, data: bytes) -> None:
        """Add what is to be written; :meth:`write_nowait` or :meth:`write_soon` has to follow."""
        if data and not self.broken:
            self._parts.append(data)
            self._size += len(data)

    def write_nowait(self) -> None:
        """Write as much as the socket takes; the task writes the rest."""
        if self._chunk or not self._parts:
            return
        self._next_chunk()
        if self._send() is not None and self._chunk:
            self._wake.set()

    def write_soon(self) -> None:
        """Have the task write, with what others add until it is its turn."""
        self._wake.set()

    def give_up(self, reason: Reason = Reason.CLIENT_GONE) -> None:
        """Drop everything: nothing will be written any more."""
        if not self.broken:
            self.broken = True
            self._parts.clear()
            self._size = 0
            self._chunk = memoryview(b"")
            self._tell_room()
            self._lost(reason)

    async def run(self) -> None:
        """Write what was not written at once, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while (self._chunk or self._parts) and not self.broken:
                if not self._chunk:
                    self._next_chunk()
                if self._send() == 0:
                    await self._wait_writable()
                self._tell_room()
            self._more()

    async def wait_written(self, limit: int = 0) -> None:
        """Wait until no more than ``limit`` bytes wait any more."""
        while self.size > limit:
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()

    def _next_chunk(self) -> None:
        parts = self._parts
        self._chunk = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
        parts.clear()
        self._size = 0

    def _send(self) -> int | None:
        """Send of the chunk; return how many bytes, or None if the connection is broken."""
        try:
            sent = self._stream.send_nowait(self._chunk)
        except _GONE:
            self.give_up()
            return None
        self._chunk = self._chunk[sent:]
        return sent

    async def _wait_writable(self) -> None:
        with trio.move_on_after(self._stall) as scope:
            try:
                await self._stream.wait_writable()
            except _GONE:
                self.give_up()
        if scope.cancelled_caught:
            self.give_up(Reason.CLIENT_STALLED)

    def _tell_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None


def _nobody(_: object = None) -> None:
    """Take a call that is for nobody."""
