"""Bytes that pass from one socket to another with no task between: the short way of a tunnel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy import _fastpath
from kamal_proxy.sockets import READ_SIZE, SocketStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy._fastpath import FrameTracker


class Passage(_fastpath.Passage):
    """The source of one direction of a tunnel, which passes on by itself what the sink takes.

    See :class:`kamal_proxy._fastpath.Passage` for what it is made of.
    """

    __slots__ = ()

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        """Return bytes that have not passed by themselves, or ``b""`` at the end.

        That is the rest where the sink has taken too little, or any bytes once it was stopped.

        Raises:
            trio.BrokenResourceError: the source broke its connection.
        """
        more = self.begin()
        try:
            while self.carries:
                if more:
                    # Before anything is read, so that a cancellation loses nothing.
                    await trio.lowlevel.checkpoint()
                    more = self.carry()
                else:
                    await self.source.wait_readable()
            data = self.take()
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error
        return await self.source.receive(max_bytes) if data is None else data


def open_passage(
    source: object,
    sink: object,
    frames: FrameTracker | None,
    clock: Callable[[], float] | None,
) -> Passage | None:
    """Return the short way between two ends of a tunnel, or None if they are no plain sockets."""
    # Others, such as TLS, are more than their descriptors.
    if isinstance(source, SocketStream) and type(source) is type(sink) is SocketStream:
        return Passage(source.poller, source, sink, frames, clock)
    return None
