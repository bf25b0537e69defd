"""The HTTP side of a proxy: its connections, from accepting the first to draining the last."""

from __future__ import annotations

import resource
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, TypeAlias

import trio

from kamal_proxy import listeners
from kamal_proxy.deployment import Drain
from kamal_proxy.http.connection import ClientConnection
from kamal_proxy.http.h2_connection import H2Connection
from kamal_proxy.http.reasons import Reason
from kamal_proxy.networks import Networks

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from kamal_proxy.http.bodies import Spill
    from kamal_proxy.http.client_side import OpenConnection, ServedConnection
    from kamal_proxy.listeners import Address, Begin, Clients
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.router import RoutingTable
    from kamal_proxy.run_options import RunOptions
    from kamal_proxy.sockets import Poller, SocketStream

Validation: TypeAlias = "Callable[[str], Awaitable[bytes | None]]"

_RESERVED_DESCRIPTORS = 100  # for listeners, probes, the admin API, the saved state


class HttpServer:
    """Serves client connections of one scheme on one port.

    Args:
        options: Timeouts and limits.
        routes: Returns the routing table of this moment.
        log: Where requests are logged.
        metrics: Where they are counted.
        spill: Where buffered bodies are.
        port: Port for the log, and for embedders.
        scheme: ``http`` or ``https``.
        validation: Answers a certificate authority that asks for a token, with None for what it
            does not know; ``None`` if no certificates are obtained.
    """

    def __init__(
        self,
        options: RunOptions,
        routes: Callable[[], RoutingTable],
        log: Log,
        metrics: Metrics,
        spill: Spill,
        port: int,
        scheme: str = "http",
        validation: Validation | None = None,
    ) -> None:
        self.options = options
        self.routes = routes
        self.log = log
        self.metrics = metrics
        self.spill = spill
        self.port = port
        self.scheme = scheme
        self.validation = validation
        self.trusted_proxies = Networks(options.trusted_proxies)
        self.proxy_protocol_from = Networks(options.proxy_protocol_from)
        #: Whether connections end with what they are doing.
        self.closing = False
        self._drain: Drain | None = None
        #: What tells clients where HTTP/3 is served (RFC 7838); empty if it is not.
        self.alt_svc = b""
        #: Requests that wait for the end of a pause, and how many may.
        self.waiting = 0
        self.max_waiting = max(1, connection_limit(options.max_connections) // 2)
        #: Requests on streams of multiplexed connections, and how many may be at once: a connection
        #: counts as one client, but each of its requests may need a descriptor for its target.
        self.streams = 0
        self.max_streams = connection_limit(options.max_connections)
        self._connections: set[OpenConnection] = set()
        self._closed = trio.Event()
        self._date = b""
        self._date_second = -1

    @property
    def connections(self) -> int:
        """How many client connections are open."""
        return len(self._connections)

    def trusts(self, address: Address) -> bool:
        """Return whether a client is one of the trusted proxies."""
        return bool(self.trusted_proxies) and address[0] in self.trusted_proxies

    def date(self) -> bytes:
        """Return the value of a Date header field (RFC 9110 6.6.1)."""
        second = int(time.time())
        if second != self._date_second:
            self._date_second = second
            self._date = formatdate(second, usegmt=True).encode()
        return self._date

    async def handle(self, stream: SocketStream, address: Address) -> None:
        """Serve one connection. Whatever a client or a target does ends here."""
        kind = H2Connection if stream.alpn == "h2" else ClientConnection
        await self.serve(kind(stream, address, self), address)

    async def serve(self, connection: ServedConnection, address: Address) -> None:
        """Serve one connection, of whatever version; it is among those that are open meanwhile."""
        self.add(connection)
        try:
            if self._drain is not None:
                if connection.is_idle:
                    return
                connection.begin_drain(self._drain)
            await connection.run()
        except Exception as error:  # a bug must cost one connection, not the proxy
            self.log.error("Connection failed", client_addr=address[0], error=repr(error))
        finally:
            self.discard(connection)

    def add(self, connection: OpenConnection) -> None:
        """Count a connection among those that are open."""
        self._connections.add(connection)

    def discard(self, connection: OpenConnection) -> None:
        """Count it no more."""
        self._connections.discard(connection)
        if self.closing and not self._connections:
            self._closed.set()

    def close_idle(self, deadline: float) -> None:
        """Begin to shut down: idle connections end now, the others after their request.

        Args:
            deadline: When those that are left are aborted, on Trio's clock.
        """
        self.closing = True
        drain = self._drain = Drain(deadline)
        for connection in tuple(self._connections):
            if connection.is_idle:
                connection.cancel(Reason.SHUTDOWN)
            else:
                connection.begin_drain(drain)
        if not self._connections:
            self._closed.set()

    async def wait_closed(self) -> None:
        """Wait until the last connection has ended after :meth:`close_idle`."""
        await self._closed.wait()

    def abort(self) -> None:
        """Interrupt the requests that are still being served."""
        for connection in tuple(self._connections):
            connection.cancel(Reason.SHUTDOWN)

    async def accept(
        self, bound: Sequence[socket.socket], poller: Poller, clients: Clients, begin: Begin
    ) -> None:
        """Accept connections on all listeners until cancelled.

        Args:
            bound: The listeners.
            poller: Poller of the streams.
            clients: The connections of this and other servers.
            begin: What takes each of ours.
        """

        def paused(error: OSError) -> None:
            self.log.error("Accepting connections is paused", port=self.port, error=str(error))

        async def accept_on(listener: socket.socket) -> None:
            await listeners.accept(listener, poller, begin, clients=clients, on_error=paused)

        async with trio.open_nursery() as acceptors:
            for listener in bound:
                acceptors.start_soon(accept_on, listener)


def connection_limit(wanted: int, log: Log | None = None) -> int:
    """Return how many clients may be connected: each may need a descriptor for its target.

    Args:
        wanted: How many the options allow.
        log: Where is said that it must be fewer.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = min(wanted, max(1, (descriptors - _RESERVED_DESCRIPTORS) // 2))
    if possible < wanted and log is not None:
        log.warning(
            "Fewer client connections than configured: raise the limit of open files",
            max_connections=wanted,
            possible=possible,
            open_files=descriptors,
        )
    return possible
