"""The proxy: what ``kamal-proxy run`` and embedders start.

Owns the nurseries and the listeners, and the order in which everything starts and stops.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy import listeners, state_format
from kamal_proxy.all_services import AllServices
from kamal_proxy.certificates import Certificates
from kamal_proxy.control.api import ControlServer
from kamal_proxy.errors import ShuttingDownError
from kamal_proxy.http.asking import ApplicationAsker
from kamal_proxy.http.error_pages import load_error_pages
from kamal_proxy.http.h2_pool import new_pool
from kamal_proxy.http.probe import HttpProbe
from kamal_proxy.http.web import Web, listen
from kamal_proxy.logs import Log
from kamal_proxy.metrics import Metrics
from kamal_proxy.metrics_server import MetricsServer
from kamal_proxy.services import Services
from kamal_proxy.sockets import Poller
from kamal_proxy.state import StateFile
from kamal_proxy.udp import state_format as udp_state_format
from kamal_proxy.udp.services import UdpServices
from kamal_proxy.udp.session_store import SessionStore

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable

    from kamal_proxy.control.messages import CertificateDescription, Event, ServiceDescription
    from kamal_proxy.deployment import DrainResult, Target
    from kamal_proxy.health import ProbeResult
    from kamal_proxy.http.target_side import Pool
    from kamal_proxy.listeners import Address
    from kamal_proxy.options import (
        DeployOptions,
        PauseOptions,
        RolloutOptions,
        RolloutSplit,
        StopOptions,
    )
    from kamal_proxy.run_options import RunOptions
    from kamal_proxy.sockets import SocketStream
    from kamal_proxy.target_options import HealthCheckOptions, TargetScheme
    from kamal_proxy.udp.options import UdpDeployOptions

# Of the time for shutting down, this much is kept for telling those who did not finish, and this
# much for ending the process: who sent SIGTERM often sends SIGKILL when the time is over.
_ABORT_TIME = 1.0  # seconds
_EXIT_TIME = 0.5
_MAX_OTHER_CONNECTIONS = 1000


@attrs.frozen
class _Parts:
    """What a proxy consists of, once it runs."""

    services: AllServices
    web: Web
    certificates: Certificates


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
        self._metrics = Metrics()
        self._parts: _Parts | None = None

    def __repr__(self) -> str:
        if self._parts is None:
            return "<Proxy not running>"
        return f"<Proxy http_port={self.http_port} services={len(self.services())}>"

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
            state = udp_state = sessions = None
            if options.state_path is not None:
                state = stack.enter_context(StateFile(options.state_path, state_format))
            if options.udp_state_path is not None and options.udp_sessions_path is not None:
                path = options.udp_state_path
                udp_state = stack.enter_context(StateFile(path, udp_state_format))
                sessions = SessionStore(options.udp_sessions_path)
            poller = Poller()
            stack.callback(poller.close)

            http_probe = HttpProbe(poller)

            async def probe(target: Target, check: HealthCheckOptions) -> ProbeResult:
                return await http_probe(target, check, target.scheme)

            def connect(host: str, port: int, scheme: TargetScheme) -> Pool:
                return new_pool(poller, host, port, scheme, options.max_head_size)

            certificates = Certificates(
                options,
                lambda: services.routes,
                ApplicationAsker(lambda: services.routes),
                self._log,
                self._metrics,
            )
            services = Services(
                state,
                self._log,
                probe=probe,
                connect=connect,
                load_pages=load_error_pages,
                certificates=certificates,
                metrics=self._metrics,
            )
            udp = UdpServices(
                udp_state,
                sessions,
                self._log,
                bind=options.bind,
                default_port=options.udp_port,
                http_probe=http_probe,
                interrupt=poller.fileno(),
                metrics=self._metrics,
            )
            restored, udp_restored = services.restore(), udp.restore()
            web = Web(
                options, lambda: services.routes, certificates, self._log, self._metrics, stack
            )
            scraped = []
            if options.metrics_port:
                scraped = listen(options, options.metrics_port, stack)
            control = None
            if options.socket_path is not None:
                control = stack.enter_context(listeners.listen_unix(options.socket_path))
            async with trio.open_nursery() as base:
                await base.start(poller.run)
                await base.start(certificates.run)
                async with trio.open_nursery() as deployments:
                    await services.start(deployments, restored)
                    await udp.start(deployments, udp_restored)
                    everything = AllServices(services, udp, self._log)
                    self._parts = parts = _Parts(everything, web, certificates)
                    try:
                        await self._serve(parts, scraped, control, poller, task_status)
                    finally:
                        everything.close()
                        udp.save_sessions()
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
        return self._running().web.http_port

    @property
    def https_port(self) -> int:
        """The port that HTTPS is served on, also when the kernel chose it; 0 if it is not."""
        return self._running().web.https_port

    async def _serve(
        self,
        parts: _Parts,
        scraped: list[socket.socket],
        control: socket.socket | None,
        poller: Poller,
        task_status: trio.TaskStatus[Proxy],
    ) -> None:
        options, services, web = self.options, parts.services, parts.web
        # Each nursery's deadline also holds for those inside it, hence this order.
        async with trio.open_nursery() as clients:
            async with trio.open_nursery() as callers, trio.open_nursery() as operations:
                async with trio.open_nursery() as acceptors:
                    acceptors.start_soon(web.accept, poller, clients)
                    if control is not None:
                        server = ControlServer(services, parts.certificates, operations, self._log)
                        acceptors.start_soon(
                            self._accept_some, server.handle, "Admin API", control, poller, callers
                        )
                    metrics = MetricsServer(self._metrics, self._log)
                    for listener in scraped:
                        acceptors.start_soon(
                            self._accept_some, metrics.handle, "Metrics", listener, poller, callers
                        )
                    self._log.info("Server started", http=web.http_port, https=web.https_port)
                    if options.metrics_port:
                        self._log.info("Metrics enabled", address=f":{options.metrics_port}")
                    task_status.started(self)
                    await self._stop.wait()
                    acceptors.cancel_scope.cancel(reason="the proxy stops")
                deadline = trio.current_time() + max(0.0, options.shutdown_timeout - _EXIT_TIME)
                services.close()
                operations.cancel_scope.cancel(reason="the proxy stops")
                callers.cancel_scope.deadline = trio.current_time() + _ABORT_TIME
                web.close_idle(deadline - _ABORT_TIME)
            with trio.move_on_at(deadline - _ABORT_TIME):
                await web.wait_closed()
            web.abort()
            clients.cancel_scope.deadline = deadline

    async def _accept_some(
        self,
        handle: Callable[[SocketStream, Address], Awaitable[None]],
        name: str,
        listener: socket.socket,
        poller: Poller,
        nursery: trio.Nursery,
    ) -> None:
        """Accept connections that are none of clients, and so have a limit of their own."""
        others = listeners.Clients(nursery, trio.Semaphore(_MAX_OTHER_CONNECTIONS))
        await listeners.serve(
            listener,
            poller,
            handle,
            clients=others,
            on_error=lambda error: self._log.error(f"{name} is paused", error=str(error)),
        )

    # Services

    async def deploy(
        self, options: DeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a service; see :meth:`kamal_proxy.services.Services.deploy`."""
        return await self._running().services.deploy(options, progress)

    async def deploy_udp(
        self, options: UdpDeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a UDP service; see :meth:`kamal_proxy.udp.services.UdpServices.deploy`."""
        return await self._running().services.deploy_udp(options, progress)

    async def remove(self, name: str) -> None:
        """Remove a service; see :meth:`kamal_proxy.all_services.AllServices.remove`."""
        await self._running().services.remove(name)

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Pause a service; see :meth:`kamal_proxy.all_services.AllServices.pause`."""
        return await self._running().services.pause(name, options, progress)

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Stop a service; see :meth:`kamal_proxy.all_services.AllServices.stop_service`."""
        return await self._running().services.stop_service(name, options, progress)

    async def resume(self, name: str) -> None:
        """Resume a service; see :meth:`kamal_proxy.all_services.AllServices.resume`."""
        await self._running().services.resume(name)

    async def deploy_rollout(
        self, name: str, options: RolloutOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy rollout targets; see :meth:`kamal_proxy.services.Services.deploy_rollout`."""
        return await self._running().services.deploy_rollout(name, options, progress)

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        """Choose whom they serve; see :meth:`kamal_proxy.services.Services.set_rollout`."""
        await self._running().services.set_rollout(name, split)

    async def stop_rollout(self, name: str) -> None:
        """Let them serve nobody; see :meth:`kamal_proxy.services.Services.stop_rollout`."""
        await self._running().services.stop_rollout(name)

    def certificates(self) -> list[CertificateDescription]:
        """Describe the certificates of services with TLS, sorted by host."""
        return self._running().certificates.describe()

    async def renew_certificate(self, host: str) -> None:
        """Obtain a new certificate for a host now; see ``Certificates.renew``."""
        await self._running().certificates.renew(host)

    def metrics(self, accept: str = "") -> tuple[bytes, bytes]:
        """Return the metrics and their content type, as ``/metrics`` would for this Accept."""
        return self._metrics.render(accept)

    def services(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""
        return self._running().services.describe()

    def _running(self) -> _Parts:
        if self._parts is None:
            raise ShuttingDownError("the proxy is not running")
        return self._parts


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
