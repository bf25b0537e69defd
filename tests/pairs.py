"""Real streams for tests: a running poller, and socket pairs whose far end the test holds.

Unix sockets deliver within the system call, so a mock clock that jumps when all tasks are blocked
never jumps over data on its way.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import trio

from kamal_proxy.sockets import Poller, SocketStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@asynccontextmanager
async def running_poller() -> AsyncIterator[Poller]:
    """Run a poller; at the end no stream may be left open."""
    poller = Poller()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(poller.run)
            yield poller
            nursery.cancel_scope.cancel()
    finally:
        poller.close()
    assert len(poller) == 0, "a stream was not closed"


@contextmanager
def stream_pair(poller: Poller) -> Iterator[tuple[SocketStream, socket.socket]]:
    """Yield a stream and the non-blocking socket at its far end; close both."""
    near, far = socket.socketpair()
    far.setblocking(False)
    stream = poller.open_stream(near)
    with far:
        try:
            yield stream, far
        finally:
            stream.close()


class Steps(trio.abc.Instrument):
    """Counts the scheduler's steps, and calls ``act`` after one of them.

    Cancelling at each step in turn finds every await, whatever the code under test looks like.
    """

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        self.count = 0
        self._at = at
        self._act = act

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1
        if self.count == self._at:
            self._act()
