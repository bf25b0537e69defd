"""HTTP/1.1 connections to one target: opened on demand, kept while idle, used again if still alive.

Names are resolved for a few seconds at a time and again after a failed connect, because an instance
that was replaced under the same name has another address.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from kamal_proxy import lookups, sockets
from kamal_proxy.http.codec import ClientCodec
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy._fastpath import Link
    from kamal_proxy.sockets import Poller, SocketStream

MAX_IDLE = 100  # connections per target that were busy more than FRESH_AGE ago
MAX_IDLE_AGE = 30.0  # seconds; application servers commonly close theirs after 5 to 75
# A target may close an idle connection just as a request is sent on it. A request that must not be
# sent twice only uses connections that were busy this many seconds ago.
FRESH_AGE = 1.0
CONNECT_TIMEOUT = 5.0  # seconds for each address
_RESOLVE_AGE = 5.0  # seconds
_FAILURE_AGE = 1.0  # seconds

_Address = tuple[socket.AddressFamily, tuple[object, ...]]


class ConnectError(Exception):
    """No connection to the target could be opened; the text says why."""


class Dialer:
    """Opens connections to one target.

    Args:
        poller: Poller of the streams.
        host: Host name or address of the target.
        port: Its port.
    """

    def __init__(self, poller: Poller, host: str, port: int) -> None:
        self._poller = poller
        self._host = host
        self._port = port
        self._addresses: list[_Address] = []
        self._resolved_at = -math.inf
        self._lookup: trio.Event | None = None  # set when it is over: one serves all that wait
        self._failed_at = -math.inf
        self._failure = ""

    def __str__(self) -> str:
        return f"{self._host}:{self._port}"

    async def connect(self) -> SocketStream:
        """Open a connection.

        Raises:
            ConnectError: the name can't be resolved, or every address refused or timed out.
        """
        fresh = await self._resolve()
        stream, reason = await self._connect_any()
        if stream is None and not fresh:
            self._resolved_at = -math.inf
            await self._resolve()
            stream, reason = await self._connect_any()
        if stream is None:
            self._resolved_at = -math.inf
            raise ConnectError(reason)
        return stream

    async def _resolve(self) -> bool:
        """Look the name up unless that was done just now; return whether it was looked up."""
        while True:
            now = trio.current_time()
            if now - self._resolved_at < _RESOLVE_AGE:
                return False
            if now - self._failed_at < _FAILURE_AGE:
                raise ConnectError(self._failure)
            if self._lookup is None:
                break
            # All that wait go on at once; after a lock, one would with each turn of the scheduler.
            await self._lookup.wait()
        lookup = self._lookup = trio.Event()
        try:
            self._addresses = await lookups.resolve(self._host, self._port, self._poller.lookups)
        except (OSError, UnicodeError) as error:  # a label can be too long for a name service
            reason = error.strerror if isinstance(error, OSError) else "malformed name"
            # The name service may be down for a moment: the last known addresses still serve.
            if not self._addresses:
                self._failed_at = trio.current_time()
                self._failure = f"can't resolve {self._host}: {reason}"
                raise ConnectError(self._failure) from error
        finally:
            self._lookup = None
            lookup.set()
        self._resolved_at = trio.current_time()
        return True

    def begin_nowait(self) -> SocketStream | None:
        """Begin to open a connection to the first address, if that is known.

        Returns:
            A stream that is open once it can be written to; None if that was not possible, which
            :meth:`connect` may know a way round.
        """
        # Whatever goes wrong, connect() meets it again and says so.
        with contextlib.suppress(OSError, UnicodeError):
            now = trio.current_time()
            if now - self._resolved_at >= _RESOLVE_AGE:
                found = lookups.resolve_nowait(self._host, self._port)
                if not found:
                    return None
                self._addresses, self._resolved_at = found, now
            return sockets.begin_nowait(self._poller, *self._addresses[0])[0]
        return None

    async def _connect_any(self) -> tuple[SocketStream | None, str]:
        reason = "no address"
        for family, address in self._addresses:
            try:
                with trio.move_on_after(CONNECT_TIMEOUT):
                    return await sockets.connect(self._poller, family, address), ""
                reason = f"connect timed out after {CONNECT_TIMEOUT:g}s"
            except OSError as error:
                reason = describe(error)
        return None, reason


class UpstreamConnection:
    """One connection to a target; a :class:`kamal_proxy.http.target_side.Upstream` while in use.

    ``reused`` says whether it has carried a request before. Whoever got it from the pool must
    :meth:`release` it.
    """

    __slots__ = ("_pool", "_sending", "codec", "idle_since", "link", "reused", "stream")

    opened: Final = True  # or taken from the idle ones, which is known then
    refused: Final = False
    may_refuse: Final = False

    def __init__(self, stream: SocketStream, codec: ClientCodec, pool: UpstreamPool) -> None:
        self.stream = stream
        self.codec = codec
        self._pool = pool
        self.reused = False
        self.idle_since = 0.0
        self.link: Link | None = None  # what the lane knows it as
        self._sending = False

    async def send(self, data: bytes, progress: Callable[[], None] | None = None) -> None:
        """Send what the codec has framed; see :meth:`SocketStream.send`.

        Nothing may wait between the framing and this call: only from here on is it known that the
        target still lacks what the codec believes it has.
        """
        self._sending = True
        await self.stream.send(data, progress)
        self._sending = False

    async def receive(self, watch: SocketStream | None) -> bool:
        """Read more of the response; see :class:`kamal_proxy.http.target_side.Upstream`."""
        data = await self.stream.receive_watching(watch, READ_SIZE)
        if data is None:
            return False
        self.codec.receive_data(data)
        return True

    def watch_from_now(self, watch: SocketStream) -> None:
        """Let a hang-up of ``watch`` also end the wait in which :meth:`receive` may be already."""
        self.stream.watch_from_now(watch)

    def tunnel_end(self) -> SocketStream:
        """Return the target's end of a tunnel, after a 101 response: the whole connection."""
        return self.stream

    def release(self) -> None:
        """Give the connection back after its exchange: once, for another may have it then."""
        self._pool.take_back(self)

    def keep(self) -> None:
        """Give it back after an exchange that ended well, and that its codec had no part in."""
        self._pool.keep(self)

    def next_cycle(self) -> bool:
        """Get ready for another request; False if the connection can't be used again."""
        # The codec believes that everything it framed was sent. What was left out by a broken or
        # cancelled send, the target would take from the next request.
        return not self._sending and self.codec.next_cycle()


class UpstreamPool:
    """The HTTP/1.1 connections to one target; a :class:`kamal_proxy.http.target_side.Pool`.

    Args:
        poller: Poller of the streams.
        host: Host name or address of the target.
        port: Its port.
        max_head_size: Largest head of a response, in bytes.
    """

    def __init__(self, poller: Poller, host: str, port: int, max_head_size: int) -> None:
        self._dialer = Dialer(poller, host, port)
        self._max_head_size = max_head_size
        self._idle: deque[UpstreamConnection] = deque()  # the most recently used one is last
        self._closed = False

    def __repr__(self) -> str:
        return f"<UpstreamPool {self._dialer} idle={len(self._idle)}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Return at once: these connections need no task of their own."""
        task_status.started()

    def take_idle(self, max_age: float) -> UpstreamConnection | None:
        """Return a living connection that was busy in the last ``max_age`` seconds, if any."""
        now = trio.current_time()
        while self._idle:
            connection = self._idle.pop()
            age = now - connection.idle_since
            if age > max_age:
                if age <= MAX_IDLE_AGE:
                    self._idle.append(connection)  # still good for requests that may be repeated
                else:
                    connection.stream.close()
                    self._close_idle(len(self._idle))  # all others are older still
                return None
            if connection.stream.is_quiet_nowait():
                connection.reused = True
                return connection
            connection.stream.close()
        return None

    async def connect(self) -> UpstreamConnection:
        """Open a new connection.

        Raises:
            ConnectError: the name can't be resolved, or every address refused or timed out.
        """
        return self._new(await self._dialer.connect())

    def connect_nowait(self) -> UpstreamConnection | None:
        """Begin to open a new connection; see :meth:`Dialer.begin_nowait`."""
        stream = self._dialer.begin_nowait()
        return None if stream is None else self._new(stream)

    def _new(self, stream: SocketStream) -> UpstreamConnection:
        return UpstreamConnection(stream, ClientCodec(self._max_head_size), self)

    def take_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose exchange has ended, if it can be used again; or close it."""
        if connection.next_cycle():
            self.keep(connection)
        else:
            connection.stream.close()

    def keep(self, connection: UpstreamConnection) -> None:
        """Keep a connection that can be used again."""
        if self._closed:
            connection.stream.close()
            return
        connection.idle_since = trio.current_time()
        self._idle.append(connection)
        self.trim()

    def trim(self) -> None:
        """Close the idle connections that are too old, or too many for longer than a moment.

        When many requests end at once, their connections are wanted again at once.
        """
        now = trio.current_time()
        while self._idle:
            age = now - self._idle[0].idle_since
            if age <= (MAX_IDLE_AGE if len(self._idle) <= MAX_IDLE else FRESH_AGE):
                break
            self._idle.popleft().stream.close()

    def close(self) -> None:
        """Close the idle connections; those released later are closed too."""
        self._closed = True
        self._close_idle(len(self._idle))

    def _close_idle(self, count: int) -> None:
        for _ in range(count):
            self._idle.popleft().stream.close()


def describe(error: OSError) -> str:
    """Say what went wrong in words: ``connection refused``."""
    if error.errno is None:
        return str(error)
    return os.strerror(error.errno).lower() if error.errno in errno.errorcode else str(error)
