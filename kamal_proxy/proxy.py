"""The proxy: what ``kamal-proxy run`` and embedders start.

Owns the nurseries and the listeners, and the order in which everything starts and stops.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from kamal_proxy import listeners
from kamal_proxy.control.api import ControlServer
from kamal_proxy.errors import ShuttingDownError
from kamal_proxy.http.probe import HttpProbe
from kamal_proxy.http.server import HttpServer
from kamal_proxy.http.upstream import UpstreamPool
from kamal_proxy.logs import Log
from kamal_proxy.options import DeployOptions, RunOptions
from kamal_proxy.services import Services
from kamal_proxy.sockets import Poller
from kamal_proxy.state import StateFile

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable

    from kamal_proxy.control.messages import Event, ServiceDescription
    from kamal_proxy.deployment import DrainResult

# Of the time for shutting down, this much is kept for telling those who did not finish.
_ABORT_TIME = 1.0  # seconds
_MAX_CONTROL_CONNECTIONS = 1000


class Proxy:
    """A zero-downtime proxy.

    Args:
        options: How it runs.
        log: Takes each log line (JSON, without newline). By default lines go to the standard
            library's logger ``kamal_proxy``.

    Start it with ``await nursery.start(proxy.run)`` or, simpler, with :func:`open_proxy`.
    """

    def __init__(self, options: RunOptions, *, log: Callable[[str], object] | None = None) -> None:
        self.options = options
        self._log = Log(log or logging.getLogger("kamal_proxy").info, debug=options.debug)
        self._started = False
        self._stop = trio.Event()
        self._services: Services | None = None
        self._http: HttpServer | None = None

    def __repr__(self) -> str:
        if self._services is None or self._http is None:
            return "<Proxy not running>"
        return f"<Proxy http_port={self._http.port} services={len(self.services())}>"

    # Running

    async def run(self, *, task_status: trio.TaskStatus[Proxy] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop` is called, or until cancelled. A proxy runs once.

        Raises:
            ListenError: a port can't be bound.
            ControlSocketError: the admin API's socket can't be bound.
            StateError: the saved state can't be used.
            InvalidOptionsError: an option has a value that can't be used.
            RuntimeError: it has run before.
        """
        if self._started:
            raise RuntimeError("a proxy runs once; make another one")
        self._started = True
        options = self.options
        options.validate()
        with contextlib.ExitStack() as stack:
            state = None
            if options.state_path is not None:
                state = stack.enter_context(StateFile(options.state_path))
            poller = Poller()
            stack.callback(poller.close)

            def connect(host: str, port: int) -> UpstreamPool:
                return UpstreamPool(poller, host, port, options.max_head_size)

            services = Services(state, self._log, probe=HttpProbe(poller), connect=connect)
            restored = services.restore()
            listener = stack.enter_context(
                contextlib.closing(listeners.listen_tcp(options.bind, options.http_port))
            )
            control = None
            if options.socket_path is not None:
                control = stack.enter_context(listeners.listen_unix(options.socket_path))
            async with trio.open_nursery() as base:
                await base.start(poller.run)
                async with trio.open_nursery() as deployments:
                    await services.start(deployments, restored)
                    self._services = services
                    try:
                        await self._serve(services, listener, control, poller, task_status)
                    finally:
                        services.stop()
                        deployments.cancel_scope.cancel(reason="the proxy stops")
                base.cancel_scope.cancel(reason="the proxy stops")
            self._log.info("Server stopped")

    def stop(self) -> None:
        """Shut down: accept nothing more, let requests finish, then end :meth:`run`."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

    @property
    def http_port(self) -> int:
        """The port that HTTP is served on, also when the kernel chose it."""
        if self._http is None:
            raise ShuttingDownError("the proxy is not running")
        return self._http.port

    async def _serve(
        self,
        services: Services,
        listener: socket.socket,
        control: socket.socket | None,
        poller: Poller,
        task_status: trio.TaskStatus[Proxy],
    ) -> None:
        options = self.options
        http = self._http = HttpServer(
            options, lambda: services.routes, self._log, listener.getsockname()[1]
        )
        # Each nursery's deadline also holds for those inside it, hence this order.
        async with trio.open_nursery() as clients:
            async with trio.open_nursery() as callers, trio.open_nursery() as operations:
                async with trio.open_nursery() as acceptors:
                    acceptors.start_soon(http.accept, listener, poller, clients)
                    if control is not None:
                        server = ControlServer(services, operations, self._log)
                        acceptors.start_soon(self._accept_control, server, control, poller, callers)
                    self._log_started(http)
                    task_status.started(self)
                    await self._stop.wait()
                    acceptors.cancel_scope.cancel(reason="the proxy stops")
                deadline = trio.current_time() + options.shutdown_timeout
                listener.close()
                services.stop()
                operations.cancel_scope.cancel(reason="the proxy stops")
                callers.cancel_scope.deadline = trio.current_time() + _ABORT_TIME
                http.close_idle()
            with trio.move_on_at(deadline - _ABORT_TIME):
                await http.wait_closed()
            http.abort()
            clients.cancel_scope.deadline = deadline

    def _log_started(self, http: HttpServer) -> None:
        if self.options.https_port != RunOptions().https_port:
            self._log.warning(
                "HTTPS is not served yet by this version", https=self.options.https_port
            )
        self._log.info("Server started", http=http.port, https=0)

    async def _accept_control(
        self,
        server: ControlServer,
        listener: socket.socket,
        poller: Poller,
        connections: trio.Nursery,
    ) -> None:
        await listeners.accept(
            listener,
            poller,
            server.handle,
            nursery=connections,
            limiter=trio.Semaphore(_MAX_CONTROL_CONNECTIONS),
            on_error=lambda error: self._log.error("Admin API is paused", error=str(error)),
        )

    # Services

    async def deploy(
        self, options: DeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a service; see :meth:`kamal_proxy.services.Services.deploy`."""
        return await self._running().deploy(options, progress)

    async def remove(self, name: str) -> None:
        """Remove a service; see :meth:`kamal_proxy.services.Services.remove`."""
        await self._running().remove(name)

    def services(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""
        return self._running().describe()

    def _running(self) -> Services:
        if self._services is None:
            raise ShuttingDownError("the proxy is not running")
        return self._services


@asynccontextmanager
async def open_proxy(
    options: RunOptions, *, log: Callable[[str], object] | None = None
) -> AsyncIterator[Proxy]:
    """Run a proxy for the length of an ``async with`` block, and shut it down gracefully after.

    Args:
        options: How it runs.
        log: Takes each log line; see :class:`Proxy`.
    """
    proxy = Proxy(options, log=log)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        yield proxy
        proxy.stop()
