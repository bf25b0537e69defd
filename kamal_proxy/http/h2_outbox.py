"""What is on its way to a target over HTTP/2: sent at once, as far as the socket takes it.

The rest is sent by a task of its own. The counterpart of ``h2_output``, which is for clients: who
waits is told when there is room, and a target that takes nothing any more may still answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.sockets import SocketStream

MAX_BACKLOG = 64 * 1024  # bytes that wait to be sent before requests have to wait
MAX_UNREAD = 1024 * 1024  # bytes that may wait, answers to the target's frames included


class Outbox:
    """The bytes that wait for one socket.

    Args:
        stream: The connection.
        changed: Called when there is more room, or when nothing is taken any more.
        overfull: Called when more waits than the target can be excused for.

    Attributes:
        is_deaf: Whether the target takes nothing any more; it may have sent something before.
    """

    __slots__ = ("_changed", "_overfull", "_stream", "_unsent", "_work", "is_deaf")

    def __init__(
        self,
        stream: SocketStream,
        changed: Callable[[], object],
        overfull: Callable[[], object],
    ) -> None:
        self._stream = stream
        self._changed = changed
        self._overfull = overfull
        self._unsent = bytearray()
        self._work = trio.Event()  # there is something unsent
        self.is_deaf = False

    def __len__(self) -> int:
        """Return how many bytes wait."""
        return len(self._unsent)

    @property
    def is_congested(self) -> bool:
        """Whether enough waits."""
        return len(self._unsent) >= MAX_BACKLOG

    def send(self, data: bytes) -> None:
        """Send, now or soon; what can't be sent any more is dropped."""
        if self.is_deaf:
            return
        if not self._unsent:
            try:
                sent = self._stream.send_nowait(data)
            except trio.BrokenResourceError:
                self._deafen()
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._unsent += data
        if len(self._unsent) > MAX_UNREAD:
            self._overfull()
        else:
            self._work.set()

    async def run(self) -> None:
        """Send what was not sent at once, until the target takes no more, or until cancelled.

        Raises:
            trio.ClosedResourceError: the stream was closed.
        """
        try:
            while True:
                await self._work.wait()
                while self._unsent:
                    await self._stream.wait_writable()
                    part = bytes(self._unsent[:READ_SIZE])
                    del self._unsent[: self._stream.send_nowait(part)]
                    self._changed()
                self._work = trio.Event()
        except trio.BrokenResourceError:
            self._deafen()

    def _deafen(self) -> None:
        self.is_deaf = True
        self._unsent.clear()
        self._changed()
