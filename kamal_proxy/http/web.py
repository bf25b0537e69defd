"""All that serves the clients of one proxy's web services: HTTP, HTTPS and HTTP/3, as one.

Owns their listeners and the order in which they begin and end.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import trio

from kamal_proxy import listeners
from kamal_proxy.http import http3
from kamal_proxy.http.bodies import Spill
from kamal_proxy.http.https import HttpsFront
from kamal_proxy.http.lane import Lane
from kamal_proxy.http.server import HttpServer, connection_limit

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kamal_proxy.certificates import Certificates
    from kamal_proxy.listeners import Begin
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.router import RoutingTable
    from kamal_proxy.run_options import RunOptions
    from kamal_proxy.sockets import Poller


class Web:
    """The web servers of a proxy.

    Args:
        options: Ports, timeouts and limits.
        routes: Returns the routing table of this moment.
        certificates: Those of the services.
        log: Where requests are logged.
        metrics: Where they are counted.
        stack: Their ports are bound at once, until it is closed.

    Raises:
        ListenError: a port can't be bound.
        InvalidOptionsError: HTTP/3 is wanted, and its package is missing.
    """

    def __init__(
        self,
        options: RunOptions,
        routes: Callable[[], RoutingTable],
        certificates: Certificates,
        log: Log,
        metrics: Metrics,
        stack: contextlib.ExitStack,
    ) -> None:
        self._options = options
        self._routes = routes
        self._certificates = certificates
        self._log = log
        self._metrics = metrics
        self._spill = Spill(options.spill_directory, options.max_spill, options.max_buffer_memory)
        self._bound: list[tuple[HttpServer, list[socket.socket]]] = []
        self._front: HttpsFront | None = None
        self._http3: http3.Http3Server | None = None
        self._bind("http", options.http_port, stack)
        if options.https_port is not None:
            https = self._bind("https", options.https_port, stack)
            self._front = HttpsFront(https, certificates.selection)
            if options.http3:
                self._bind_quic(https, stack)
        self._register_gauges()

    @property
    def http_port(self) -> int:
        """The port that HTTP is served on."""
        return self._bound[0][0].port

    @property
    def https_port(self) -> int:
        """The port that HTTPS is served on; 0 if it is not."""
        return self._bound[1][0].port if len(self._bound) > 1 else 0

    def _bind(self, scheme: str, port: int, stack: contextlib.ExitStack) -> HttpServer:
        sockets = listen(self._options, port, stack)
        server = HttpServer(
            self._options,
            self._routes,
            self._log,
            self._metrics,
            self._spill,
            sockets[0].getsockname()[1],
            scheme,
            self._certificates.validate,
        )
        self._bound.append((server, sockets))
        return server

    def _bind_quic(self, https: HttpServer, stack: contextlib.ExitStack) -> None:
        sockets = http3.listen(self._options.bind, https.port)
        for sock in sockets:
            stack.enter_context(contextlib.closing(sock))
        https.alt_svc = http3.alt_svc(https.port)
        self._http3 = http3.Http3Server(
            https,
            sockets,
            self._certificates.selection.certificate_for,
            connection_limit(self._options.max_connections),
        )

    async def accept(self, poller: Poller, nursery: trio.Nursery) -> None:
        """Take connections into ``nursery`` until cancelled, of HTTP/3 until they have ended."""
        limiter = trio.Semaphore(connection_limit(self._options.max_connections, self._log))
        clients = listeners.Clients(nursery, limiter)
        if self._http3 is not None:
            await nursery.start(self._http3.run)
        async with trio.open_nursery() as acceptors:
            for server, sockets in self._bound:
                serve: Begin = functools.partial(clients.serve, server.handle)
                if self._options.lane:
                    lane = Lane(server, poller, clients)
                    nursery.start_soon(lane.run)
                    serve = lane.begin
                begin = serve
                if server.scheme == "https" and self._front is not None:
                    begin = functools.partial(self._front.begin, clients, serve)
                    acceptors.start_soon(self._front.run)
                acceptors.start_soon(server.accept, sockets, poller, clients, begin)

    def close_idle(self, deadline: float) -> None:
        """Begin to shut down: listeners and idle connections close now, others after their request.

        Args:
            deadline: When those that are left are aborted, on Trio's clock.
        """
        for server, sockets in self._bound:
            for sock in sockets:
                sock.close()
            if server.scheme == "https" and self._http3 is not None:
                self._http3.close()
            server.close_idle(deadline)

    async def wait_closed(self) -> None:
        """Wait until the last connection has ended after :meth:`close_idle`."""
        for server, _ in self._bound:
            await server.wait_closed()

    def abort(self) -> None:
        """Interrupt the requests that are still being served."""
        for server, _ in self._bound:
            server.abort()

    def _register_gauges(self) -> None:
        counted: list[HttpServer | HttpsFront] = [server for server, _ in self._bound]
        if self._front is not None:
            counted.append(self._front)
        for name, text, read in (
            (
                "kamal_proxy_http_open_connections",
                "Client connections that are open now.",
                lambda: sum(each.connections for each in counted),
            ),
            (
                "kamal_proxy_spill_bytes",
                "Bytes of buffered bodies on disk, or on their way there.",
                lambda: self._spill.spilled,
            ),
            (
                "kamal_proxy_buffer_memory_bytes",
                "Bytes of buffered bodies in memory now.",
                lambda: self._spill.memory,
            ),
        ):
            self._metrics.gauge(name, text, read)


def listen(options: RunOptions, port: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Bind one port on the proxy's addresses, or on all if it has none, until the stack is closed.

    Raises:
        ListenError: naming the address and what to do.
    """
    bound: list[socket.socket] = []
    for address in options.bind or ("",):
        # A port that the kernel chooses is chosen once.
        sock = listeners.listen_tcp(address, port or (bound[0].getsockname()[1] if bound else 0))
        bound.append(stack.enter_context(contextlib.closing(sock)))
    return bound
