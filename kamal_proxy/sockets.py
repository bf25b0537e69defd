"""The one room for stream IO: sockets, readiness, connecting.

Every operation tries the system call first and waits only on EAGAIN. Readiness does not go through
``trio.lowlevel.wait_readable``: at its first wait each socket is registered, edge-triggered, in an
epoll of the poller's own, and stays there (``_fastpath.Readiness``). One task waits for that
epoll's descriptor and reschedules the tasks whose sockets became ready. That saves two
``epoll_ctl`` calls per wait, and lets one task wait for its upstream while it watches its client
for a hang-up. Deadlines are the caller's cancel scope. What is too short for a task of its own,
such as accepting a connection, is done by the poller's.

A wait must follow an EAGAIN with no checkpoint in between: an edge that arrives after the EAGAIN
wakes the waiter, and an edge before it is seen by the next attempt.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from typing import TYPE_CHECKING, Protocol

import outcome
import trio

from kamal_proxy._fastpath import Readiness, is_quiet

if TYPE_CHECKING:
    from collections.abc import Callable

READ_SIZE = 64 * 1024

# A stream whose calls never block must still let other tasks run, and notice its cancellation.
_CALLS_PER_TURN = 32
_EVENTS_PER_TURN = 64  # of those that wake no task; others are told in batches as large

# Most streams never find their socket full: the edge with which a new one tells that it can be
# written to would wake the poller for nothing.
_READ_EDGES = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_ALL_EDGES = _READ_EDGES | select.EPOLLOUT
_HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_READABLE = select.EPOLLIN | _HUNG_UP
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR

_KEEPALIVE_IDLE = 60  # seconds until the first question
_KEEPALIVE_INTERVAL = 15  # seconds between questions
_KEEPALIVE_COUNT = 4  # unanswered ones that break the connection
_MAX_LOOKUPS = 20
_DROP_TIMEOUT = 2.0  # seconds
_DROP_BYTES = 4 * 1024 * 1024


class Pollable(Protocol):
    """What a poller tells of events."""

    def ready(self, events: int) -> None:
        """Take these epoll events, in the poller's task: it must neither raise nor take long."""


class Poller(Readiness):
    """Readiness for all streams of one proxy. :meth:`run` must run while any stream is in use."""

    def __init__(self) -> None:
        #: Bounds the threads that wait for a name service.
        self.lookups = trio.CapacityLimiter(_MAX_LOOKUPS)
        self._listeners = 0

    def __len__(self) -> int:
        """Return how many streams are open."""
        return len(self.pollables) - self._listeners

    def open_stream(self, sock: socket.socket) -> SocketStream:
        """Take over a connected, or connecting, socket."""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = self.pollables[sock.fileno()] = SocketStream(sock, self)
        return stream

    def hand_over(self, fd: int, to: Pollable) -> None:
        """Let somebody else have the events of a stream's socket from now on."""
        self.pollables[fd] = to

    def watch_listener(self, fd: int, pollable: Pollable) -> None:
        """Tell again and again that there are connections to accept, until they are."""
        self.watch(fd, select.EPOLLIN, 0)
        self.pollables[fd] = pollable
        self._listeners += 1

    def forget_listener(self, fd: int) -> None:
        """Tell nothing of a listener any more."""
        self.ignore(fd)
        del self.pollables[fd]
        self._listeners -= 1

    def forget(self, fd: int) -> None:
        """Drop a stream that is about to be closed; closing it takes it out of the epoll."""
        del self.pollables[fd]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wake the tasks whose sockets became ready, until cancelled."""
        task_status.started()
        while True:
            if self.has_line:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self.fileno())
            # A turn of the scheduler costs as much as some events: while no task is to run, there
            # is another batch.
            told = 0
            while told < _EVENTS_PER_TURN and (count := self.tell()):
                told += count


class Reader:
    """One task that waits for something to read, and may watch a stream for its hang-up meanwhile.

    What there is to read, and when it is, is the subclass's to say.
    """

    __slots__ = ("_reader", "_watched")

    def __init__(self) -> None:
        self._reader: trio.lowlevel.Task | None = None
        self._watched: SocketStream | None = None  # whose hang-up also wakes our reader

    async def wait_readable(self, watch: SocketStream | None = None) -> bool:
        """Wait until a read that found nothing is worth another try.

        Args:
            watch: A stream whose hang-up ends the wait as well.

        Returns:
            False if it was ``watch`` that hung up; it may have sent data before it did.
        """
        self._require_events()
        if self._reader is not None:
            raise trio.BusyResourceError("another task is reading from this stream")
        if watch is not None:
            if watch.hung_up:
                await trio.lowlevel.checkpoint()
                return False
            watch.watch()
            watch._watcher = self
            self._watched = watch
        self._reader = trio.lowlevel.current_task()

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._take_reader()
            return trio.lowlevel.Abort.SUCCEEDED

        readable = await trio.lowlevel.wait_task_rescheduled(abort)
        return bool(readable)

    def watch_from_now(self, watch: SocketStream) -> None:
        """Let a hang-up of ``watch`` end also the wait in which a reader may be already."""
        if self._reader is None:
            return
        if watch.hung_up:
            trio.lowlevel.reschedule(self._take_reader(), outcome.Value(False))
        else:
            watch.watch()
            watch._watcher = self
            self._watched = watch

    def wake_reader(self, *, readable: bool = True) -> None:
        """End the wait of the reader, if there is one.

        Args:
            readable: Whether there is something to read; otherwise what is watched has hung up.
        """
        if self._reader is not None:
            trio.lowlevel.reschedule(self._take_reader(), outcome.Value(readable))

    def _require_events(self) -> None:
        """See to it that what can be read is told of, or raise if nothing ever will be."""

    def _take_reader(self) -> trio.lowlevel.Task:
        task, self._reader = self._reader, None
        assert task is not None
        if self._watched is not None:
            self._watched._watcher = None
            self._watched = None
        return task


class SocketStream(Reader):
    """A connected stream socket. One task may read, and one task may write, at a time.

    All methods raise ``trio.BrokenResourceError`` when the peer or the network broke the
    connection, ``trio.ClosedResourceError`` after :meth:`close` and ``trio.BusyResourceError``
    when a second task uses the same direction.

    Attributes:
        secured: Whether it is inside TLS; the others say what its handshake has agreed on.
        alpn: The protocol, such as ``h2``; empty if none was named.
        client_ca: PEM certificates by which the client's own was verified, if it was.
    """

    secured: bool = False
    alpn: str = ""
    client_ca: bytes | None = None

    __slots__ = (
        "_calls",
        "_edges",
        "_hung_up",
        "_poller",
        "_sock",
        "_watcher",
        "_writer",
    )

    def __init__(self, sock: socket.socket, poller: Poller) -> None:
        super().__init__()
        self._sock: socket.socket | None = sock
        self._poller = poller
        self._writer: trio.lowlevel.Task | None = None
        self._edges = 0  # what the poller tells of
        self._watcher: Reader | None = None  # whom our hang-up wakes
        self._hung_up = False
        self._calls = 0

    def receive_nowait(self, max_bytes: int = READ_SIZE) -> bytes | None:
        """Return what has arrived, ``b""`` at the end of the stream, or None if nothing has yet."""
        try:
            return self._socket().recv(max_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` at the end of the stream."""
        await self._take_turn()
        while True:
            data = self.receive_nowait(max_bytes)
            if data is not None:
                return data
            await self.wait_readable()

    async def receive_watching(self, watch: SocketStream | None, max_bytes: int) -> bytes | None:
        """Like :meth:`receive`, but return None once ``watch`` has hung up and nothing is here."""
        await self._take_turn()
        while True:
            data = self.receive_nowait(max_bytes)
            if data is not None:
                return data
            if not await self.wait_readable(watch):
                return None

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what the socket takes and return how many bytes that was (0 when it is full)."""
        try:
            return self._socket().send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send(
        self, data: bytes | memoryview, progress: Callable[[], None] | None = None
    ) -> None:
        """Send all of ``data``, waiting while the socket is full.

        Args:
            data: What to send.
            progress: Called before each wait; the peer has taken something since the last.
        """
        await self._take_turn()
        sent = self.send_nowait(data)
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        while rest:
            if progress is not None:
                progress()
            await self.wait_writable()
            rest = rest[self.send_nowait(rest) :]

    async def wait_writable(self) -> None:
        """Wait until a write that found the socket full is worth another try."""
        self._socket()
        if self._writer is not None:
            raise trio.BusyResourceError("another task is writing to this stream")
        self.watch(writes=True)
        self._writer = trio.lowlevel.current_task()

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def watch(self, *, writes: bool = False) -> None:
        """Have the poller tell of events from now on, as any wait does.

        Args:
            writes: Whether also that the socket can be written to.
        """
        if not self._edges or (writes and self._edges != _ALL_EDGES):
            edges = _ALL_EDGES if writes else _READ_EDGES
            try:
                self._poller.watch(self.fileno(), edges, self._edges)
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            self._edges = edges

    def is_drained_by(self, size: int) -> bool:
        """Return whether a read of up to READ_SIZE bytes that brought so many has left nothing.

        Then an event tells of what comes next.
        """
        # Between the end of a connection and what came before it there is no event.
        return size < READ_SIZE and not self._hung_up

    @property
    def poller(self) -> Poller:
        """Who tells it of events."""
        return self._poller

    def tell(self, pollable: Pollable) -> None:
        """Let somebody else have the events, who passes them on to :meth:`ready`."""
        self._poller.hand_over(self.fileno(), pollable)

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its side, or both, and nothing it sent is left to read.

        An ordinary half-close looks like this too.
        """
        return (self._hung_up or not self._edges) and self.at_eof_nowait()

    async def wait_hung_up(self) -> None:
        """Wait until the peer has closed its side and nothing it sent is left to read."""
        while not self.hung_up:
            await self.wait_readable()

    def keep_alive(self) -> None:
        """Let the kernel find out when a silent peer has vanished, and break the connection."""
        sock = self._socket()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)

    def at_eof_nowait(self) -> bool:
        """Return whether the next read would find the end of the stream, or an error, at once."""
        try:
            return not self._socket().recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_quiet_nowait(self) -> bool:
        """Return whether the stream is open with nothing to read: a pooled connection is usable."""
        return is_quiet(self._socket().fileno())

    def shutdown_write(self) -> None:
        """Send the end of the stream; reading goes on."""
        try:
            self._socket().shutdown(socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def connect_error_nowait(self) -> int:
        """Return the errno of a connect(), 0 for success, EINPROGRESS while it goes on."""
        sock = self._socket()
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            # The wake-up may have been meant for an earlier socket with this descriptor.
            try:
                sock.getpeername()
            except OSError as error:
                return errno.EINPROGRESS if error.errno == errno.ENOTCONN else error.errno or 0
        return code

    def close(self) -> None:
        """Close at once, waking any task that waits. Closing again does nothing."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._poller.forget(sock.fileno())
        sock.close()
        if self._watcher is not None:
            self._watcher._watched = None
            self._watcher = None
        if self._reader is not None:
            trio.lowlevel.reschedule(self._take_reader(), _closed())
        if self._writer is not None:
            task, self._writer = self._writer, None
            trio.lowlevel.reschedule(task, _closed())

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._socket().fileno()

    def release(self) -> tuple[socket.socket, Poller]:
        """Give the socket to another stream, for which :meth:`Poller.hand_over` is called next.

        Nobody may be waiting for this one, which counts as closed from now on.
        """
        sock = self._socket()
        if self._reader is not None or self._writer is not None or self._watcher is not None:
            raise trio.BusyResourceError("another task is using this stream")
        self._sock = None
        return sock, self._poller

    def ready(self, events: int) -> None:
        """Wake the tasks that wait for these epoll events (called by the poller)."""
        if events & _HUNG_UP:
            self._hung_up = True
            if self._watcher is not None and self.at_eof_nowait():
                self.wake_watcher()
        if events & _READABLE and self._reader is not None:
            trio.lowlevel.reschedule(self._take_reader(), outcome.Value(True))
        if events & _WRITABLE and self._writer is not None:
            task, self._writer = self._writer, None
            trio.lowlevel.reschedule(task)

    def wake_watcher(self) -> None:
        """End the wait of whoever watches this stream, if anybody does: it has hung up."""
        if self._watcher is not None:
            self._watcher.wake_reader(readable=False)

    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise trio.ClosedResourceError("this stream was closed")
        return self._sock

    def _require_events(self) -> None:
        self._socket()
        self.watch()

    async def _take_turn(self) -> None:
        # Before the system call, so that a cancellation never loses what it has done.
        self._calls += 1
        if self._calls >= _CALLS_PER_TURN:
            self._calls = 0
            await trio.lowlevel.checkpoint()


def _closed() -> outcome.Error:
    """Make what a waiter gets when its stream is closed; an outcome serves one task only."""
    return outcome.Error(trio.ClosedResourceError("this stream was closed"))


async def drop(stream: SocketStream) -> None:
    """End a connection whose peer may still be sending, without losing what was sent to it.

    Closing with unread bytes makes the kernel reset the connection, and the reset may overtake the
    response (RFC 9112 9.6). So the peer's bytes are read for a moment. The caller closes.
    """
    with trio.move_on_after(_DROP_TIMEOUT), contextlib.suppress(trio.BrokenResourceError):
        stream.shutdown_write()
        received = 0
        while received < _DROP_BYTES and (data := await stream.receive()):
            received += len(data)


async def connect(
    poller: Poller, family: socket.AddressFamily, address: tuple[object, ...] | str
) -> SocketStream:
    """Open a connection to one address.

    Raises:
        OSError: the connection was refused, or the network failed.
    """
    stream, code = begin_nowait(poller, family, address)
    try:
        while code == errno.EINPROGRESS:
            await stream.wait_writable()
            code = stream.connect_error_nowait()
        if code:
            raise OSError(code, errno.errorcode.get(code, str(code)))
    except BaseException:
        stream.close()
        raise
    return stream


def begin_nowait(
    poller: Poller, family: socket.AddressFamily, address: tuple[object, ...] | str
) -> tuple[SocketStream, int]:
    """Begin to open a connection to one address.

    Returns:
        The stream, and the errno of connect(): 0 if it is open, EINPROGRESS if it is once it can be
        written to.

    Raises:
        OSError: there is no room for another socket.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Before that the socket would count as hung up.
        code = sock.connect_ex(address)
        return poller.open_stream(sock), code
    except BaseException:
        sock.close()
        raise
