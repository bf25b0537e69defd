"""Real streams for tests: a running poller, and socket pairs whose far end the test holds.

Unix sockets deliver within the system call, so a mock clock that jumps when all tasks are blocked
never jumps over data on its way.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.sockets import Poller, SocketStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

READ_SIZE = 1 << 20


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


class SocketPeer:
    """The far end of a plain stream, moved by hand; TLS has its own (tests/tls/peers.py).

    Attributes:
        far: Its socket, which does not block.
        ended: Whether the stream has said that nothing follows.
        closed: Whether the connection has ended, whatever was said before.
    """

    def __init__(self, far: socket.socket) -> None:
        self.far = far
        self.ended = False
        self.closed = False

    def send(self, data: bytes) -> None:
        """Send some data."""
        self.far.sendall(data)

    def receive(self) -> bytes:
        """Return what has arrived."""
        data = b"".join(self._parts())
        self.ended = self.closed
        return data

    async def drain(self) -> bytes:
        """Read, and let the stream go on, until nothing comes any more; return what came."""
        data = b""
        while part := self.receive():
            data += part
            await wait_all_tasks_blocked()
        return data

    def end(self) -> None:
        """Say that nothing follows; reading goes on."""
        self.far.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection, having read what was sent: with that unread it is a reset."""
        self.receive()
        self.far.close()

    def _parts(self) -> Iterator[bytes]:
        """Read what the socket has."""
        with suppress(BlockingIOError):
            while part := self.far.recv(READ_SIZE):
                yield part
            self.closed = True


@asynccontextmanager
async def watching(
    reader: SocketStream, watched: SocketStream
) -> AsyncIterator[list[bytes | None]]:
    """Have a stream read while it watches another one, which must end with the block.

    Yields:
        Where its result comes.
    """
    got: list[bytes | None] = []

    async def read() -> None:
        got.append(await reader.receive_watching(watched, 100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        yield got
        await wait_all_tasks_blocked()
        assert got, "it still reads, and watches"


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
