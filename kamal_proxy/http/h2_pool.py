"""The HTTP/2 connections to one target: few, for each carries many requests.

They are opened one at a time: whoever wants one while that happens waits for its outcome. All tasks
of the connections live in :meth:`H2Pool.run`, and end with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.http.h2_target import H2TargetConnection
from kamal_proxy.http.upstream import (
    CONNECT_TIMEOUT,
    MAX_IDLE_AGE,
    ConnectError,
    Dialer,
    UpstreamPool,
)

if TYPE_CHECKING:
    from kamal_proxy.http.h2_upstream import H2Upstream
    from kamal_proxy.http.target_side import Pool
    from kamal_proxy.sockets import Poller
    from kamal_proxy.target_options import TargetScheme


def new_pool(
    poller: Poller, host: str, port: int, scheme: TargetScheme, max_head_size: int
) -> Pool:
    """Return the pool of a target.

    Args:
        poller: Poller of the streams.
        host: Host name or address of the target.
        port: Its port.
        scheme: What is spoken with it.
        max_head_size: Largest head of a response, in bytes.
    """
    kind = H2Pool if scheme == "h2c" else UpstreamPool
    return kind(poller, host, port, max_head_size)


@attrs.define(eq=False)
class _Attempt:
    """A connection that is being opened, for all that wait for one."""

    over: trio.Event = attrs.field(factory=trio.Event)
    failure: str = ""


class H2Pool:
    """The HTTP/2 connections to one target, without TLS (prior knowledge, RFC 9113 3.3).

    A :class:`kamal_proxy.http.target_side.Pool`. Connections can be opened while :meth:`run` runs.

    Args:
        poller: Poller of the streams.
        host: Host name or address of the target.
        port: Its port.
        max_head_size: Largest head of a response, in bytes.
    """

    def __init__(self, poller: Poller, host: str, port: int, max_head_size: int) -> None:
        self._dialer = Dialer(poller, host, port)
        self._max_head_size = max_head_size
        self._connections: list[H2TargetConnection] = []
        self._attempt: _Attempt | None = None
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()

    def __repr__(self) -> str:
        return f"<H2Pool {self._dialer} connections={len(self._connections)}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Let connections live, until :meth:`close`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._closed.wait()
                nursery.cancel_scope.cancel(reason="the pool is closed")
        finally:
            self._nursery = None
            self.close()

    def take_idle(self, max_age: float) -> H2Upstream | None:
        """Begin a request on a connection that was heard of in the last ``max_age`` seconds."""
        oldest = trio.current_time() - max_age
        for connection in self._connections:
            if connection.room > 0 and connection.heard_at >= oldest:
                return connection.take(reused=True)
        return None

    async def connect(self) -> H2Upstream:
        """Begin a request on a connection that is new, or has just answered a PING.

        Raises:
            ConnectError: the name can't be resolved, every address refused or timed out, or what
                was reached does not speak HTTP/2.
        """
        for connection in tuple(self._connections):
            if connection.room > 0 and await connection.answers() and connection.room > 0:
                return connection.take(reused=False)
        while True:
            attempt = self._attempt
            opened = attempt is None
            if attempt is None:
                if self._nursery is None:
                    raise ConnectError("the targets were replaced")
                attempt = self._attempt = _Attempt()
                self._nursery.start_soon(self._open, attempt)
            await attempt.over.wait()
            if attempt.failure:
                raise ConnectError(attempt.failure)
            # The one that was opened comes last; others who waited may have taken all of it.
            for connection in reversed(self._connections):
                if connection.room > 0:
                    return connection.take(reused=False, opened=opened)

    def trim(self) -> None:
        """Close the connections that have carried no request for too long."""
        oldest = trio.current_time() - MAX_IDLE_AGE
        for connection in tuple(self._connections):
            if not connection.in_use and connection.idle_since < oldest:
                connection.close()

    def close(self) -> None:
        """Close all connections, also those that are in use."""
        self._closed.set()
        for connection in tuple(self._connections):
            connection.close()

    async def _open(self, attempt: _Attempt) -> None:
        """Open a connection and let it live."""
        try:
            stream = await self._dialer.connect()
            connection = H2TargetConnection(stream, self._max_head_size)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                with trio.move_on_after(CONNECT_TIMEOUT):
                    await connection.ready.wait()
                failure = _unusable(connection)
                if failure:
                    connection.close()
                else:
                    self._connections.append(connection)
                self._finish(attempt, failure)
            if connection in self._connections:
                self._connections.remove(connection)
        except ConnectError as error:
            self._finish(attempt, str(error))
        except Exception as error:  # a bug must cost one connection, not the deployment
            self._finish(attempt, f"internal error: {error!r}")
        finally:
            self._finish(attempt, "the targets were replaced")

    def _finish(self, attempt: _Attempt, failure: str) -> None:
        """Tell those who wait how it went; the first time counts."""
        if self._attempt is attempt:
            self._attempt = None
            attempt.failure = failure
            attempt.over.set()


def _unusable(connection: H2TargetConnection) -> str:
    """Return why a connection that was just opened can't be used; empty if it can."""
    if connection.failure:
        return f"no HTTP/2 connection: {connection.failure}"
    if not connection.ready.is_set():
        return f"no HTTP/2 settings within {CONNECT_TIMEOUT:g}s; does the target speak h2c?"
    if connection.room <= 0:
        return "the target takes no requests on an HTTP/2 connection"
    return ""
