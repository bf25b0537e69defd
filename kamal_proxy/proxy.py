"""The proxy: what ``kamal-proxy run`` and embedders start.

Owns the nurseries, the listeners, the routing table and the saved state, and performs changes of
services. The table is replaced whole, in one assignment, under a lock that is held while the state
is written and never while a drain is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from kamal_proxy import sockets
from kamal_proxy.control.api import ControlServer
from kamal_proxy.control.messages import Event, ServiceDescription
from kamal_proxy.deployment import Deployment, DrainResult, Target
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import (
    DeployFailedError,
    KamalProxyError,
    ServiceNotFoundError,
    ShuttingDownError,
    StateError,
)
from kamal_proxy.health import ProbeResult, TargetState
from kamal_proxy.http.probe import HttpProbe
from kamal_proxy.http.server import HttpServer
from kamal_proxy.http.upstream import UpstreamPool
from kamal_proxy.logs import LineWriter, Log
from kamal_proxy.options import DeployOptions, RunOptions, unsupported_flags
from kamal_proxy.router import RoutingTable
from kamal_proxy.service import Service
from kamal_proxy.sockets import Poller
from kamal_proxy.state import SavedService, StateFile

# Of the time for shutting down, this much is kept for telling those who did not finish.
_ABORT_TIME = 1.0  # seconds
_DRAIN_REPORT_INTERVAL = 1.0  # seconds
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
        self._routes = RoutingTable()
        self._commit = trio.Lock()
        self._draining: list[tuple[str, Deployment]] = []
        self._stop = trio.Event()
        self._state: StateFile | None = None
        self._poller: Poller | None = None
        self._deployments: trio.Nursery | None = None
        self._http: HttpServer | None = None

    def __repr__(self) -> str:
        state = "running" if self._deployments is not None else "not running"
        return f"<Proxy {state} services={len(list(self._routes))}>"

    # Running

    async def run(self, *, task_status: trio.TaskStatus[Proxy] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop` is called, or until cancelled.

        Raises:
            ListenError: a port can't be bound.
            ControlSocketError: the admin API's socket can't be bound.
            StateError: the saved state can't be used.
            InvalidOptionsError: an option has a value that can't be used.
        """
        self.options.validate()
        with contextlib.ExitStack() as stack:
            saved = self._open_state(stack)
            listener = stack.enter_context(
                contextlib.closing(sockets.listen_tcp(self.options.bind, self.options.http_port))
            )
            control = None
            if self.options.socket_path is not None:
                control = stack.enter_context(sockets.listen_unix(self.options.socket_path))
            poller = self._poller = Poller()
            restored = self._restored(saved)
            async with trio.open_nursery() as base:
                await base.start(poller.run)
                async with trio.open_nursery() as deployments:
                    for service in restored:
                        await deployments.start(service.active.run)
                    self._routes = RoutingTable({s.name: s for s in restored})
                    self._deployments = deployments
                    try:
                        await self._serve(listener, control, poller, task_status)
                    finally:
                        self._deployments = None
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
            raise RuntimeError("the proxy is not running")
        return self._http.port

    async def _serve(
        self,
        listener: socket.socket,
        control: socket.socket | None,
        poller: Poller,
        task_status: trio.TaskStatus[Proxy],
    ) -> None:
        http = self._http = HttpServer(
            self.options, lambda: self._routes, self._log, listener.getsockname()[1]
        )
        async with (
            trio.open_nursery() as control_connections,
            trio.open_nursery() as operations,
            trio.open_nursery() as clients,
        ):
            async with trio.open_nursery() as acceptors:
                acceptors.start_soon(http.accept, listener, poller, clients)
                if control is not None:
                    acceptors.start_soon(
                        self._accept_control, control, poller, control_connections, operations
                    )
                self._log_started(http)
                task_status.started(self)
                await self._stop.wait()
                acceptors.cancel_scope.cancel(reason="the proxy stops")
            listener.close()
            operations.cancel_scope.cancel(reason="the proxy stops")
            control_connections.cancel_scope.deadline = trio.current_time() + _ABORT_TIME
            http.close_idle()
            clients.cancel_scope.deadline = trio.current_time() + self.options.shutdown_timeout
            with trio.move_on_after(max(0, self.options.shutdown_timeout - _ABORT_TIME)):
                await http.wait_closed()
            http.abort()

    def _log_started(self, http: HttpServer) -> None:
        if self.options.https_port != RunOptions().https_port:
            self._log.warning(
                "HTTPS is not served yet by this version", https=self.options.https_port
            )
        self._log.info("Server started", http=http.port, https=0)

    async def _accept_control(
        self,
        listener: socket.socket,
        poller: Poller,
        connections: trio.Nursery,
        operations: trio.Nursery,
    ) -> None:
        server = ControlServer(self, operations, self._log)
        await sockets.accept(
            listener,
            poller,
            server.handle,
            nursery=connections,
            limiter=trio.Semaphore(_MAX_CONTROL_CONNECTIONS),
            on_error=lambda error: self._log.error("Admin API is paused", error=str(error)),
        )

    # Changing services

    async def deploy(
        self, options: DeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a service: probe its targets, switch to them, drain the old ones.

        Cancelled before the switch, nothing has changed; cancelled after it, the drain goes on.

        Args:
            options: The service and everything about it.
            progress: Told each step as it happens; must not block.

        Returns:
            How the drain of the replaced targets ended.

        Raises:
            DeployFailedError: the targets did not become healthy in time; nothing has changed.
            HostConflictError: another service has one of the hosts and prefixes.
            InvalidOptionsError: an option has a value that can't be used.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        options.validate()
        report = _Report(progress)
        deployment = self._new_deployment(options)
        self._routes.require_available(_service(options, deployment, None))
        fields = {
            "service": options.service,
            "targets": options.targets,
            "hosts": options.service_options.hosts or ("",),
            "paths": options.service_options.path_prefixes,
            "tls": options.service_options.tls_enabled,
        }
        self._log.info("Deploying", **fields)
        deployment.on_probe = report.probe
        await self._running().start(deployment.run)
        try:
            if not options.deployment_options.force:
                await _wait_until_healthy(deployment, options.deployment_options.deploy_timeout)
                report("healthy")
            replaced = await self._install(options, deployment)
        except BaseException:
            deployment.retire(0)
            raise
        deployment.on_probe = None
        report("switched")
        result = DrainResult()
        if replaced is not None:
            replaced.retire(options.deployment_options.drain_timeout)
            self._draining.append((options.service, replaced))
            result = await self._wait_drained(replaced, report)
        self._log.info("Deployed", **fields)
        report("done", completed=result.completed, cancelled=result.cancelled)
        return result

    async def remove(self, name: str) -> None:
        """Take a service out of routing at once; its requests in flight end by themselves.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
        """
        self._running()
        async with self._commit:
            service = self._routes.get(name)
            if service is None:
                raise ServiceNotFoundError("service not found")
            await self._replace_routes(self._routes.without_service(name))
        service.active.retire(math.inf)
        self._draining.append((name, service.active))

    def services(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""
        self._draining = [entry for entry in self._draining if entry[1].in_flight]
        return [
            ServiceDescription(
                name=service.name,
                hosts=service.options.hosts,
                path_prefixes=service.options.path_prefixes,
                targets=tuple(target.name for target in service.active.targets),
                healthy=tuple(
                    target.name
                    for target in service.active.targets
                    if target.health.state is TargetState.HEALTHY
                ),
                state=service.pause.state,
                tls=service.options.tls_enabled,
                in_flight=service.active.in_flight,
                draining=sum(d.in_flight for name, d in self._draining if name == service.name),
            )
            for service in sorted(self._routes, key=lambda service: service.name)
        ]

    def _running(self) -> trio.Nursery:
        if self._deployments is None or self._stop.is_set():
            raise ShuttingDownError("the proxy is not running")
        return self._deployments

    def _new_deployment(self, options: DeployOptions, *, trusted: bool = False) -> Deployment:
        poller = self._poller
        if poller is None:
            raise ShuttingDownError("the proxy is not running")

        def connect(host: str, port: int) -> UpstreamPool:
            return UpstreamPool(poller, host, port, self.options.max_head_size)

        return Deployment(
            options.targets,
            health_check=options.target_options.health_check,
            probe=HttpProbe(poller),
            connect=connect,
            log=self._log,
            trusted=trusted,
            forced=options.deployment_options.force,
        )

    async def _install(self, options: DeployOptions, deployment: Deployment) -> Deployment | None:
        """Give a service its new deployment; return the one it replaces."""
        async with self._commit:
            current = self._routes.get(options.service)
            service = _service(options, deployment, current)
            await self._replace_routes(self._routes.with_service(service))
        return None if current is None else current.active

    async def _replace_routes(self, routes: RoutingTable) -> None:
        """Save the state, then switch to the new table. A state that can't be saved changes nothing.

        The write is not abandoned when cancelled, so that file and table never disagree.
        """
        if self._state is not None:
            saved = [_saved(service) for service in routes]
            await trio.to_thread.run_sync(self._state.save, saved)
        self._routes = routes

    async def _wait_drained(self, deployment: Deployment, report: _Report) -> DrainResult:
        while True:
            report("draining", in_flight=deployment.in_flight)
            with trio.move_on_after(_DRAIN_REPORT_INTERVAL):
                return await deployment.wait_drained()

    # Restoring services

    def _open_state(self, stack: contextlib.ExitStack) -> tuple[SavedService, ...]:
        path = self.options.state_path
        if path is None:
            return ()
        self._state = stack.enter_context(StateFile(path))
        saved = self._state.load()
        if saved is None:
            self._log.info("No previous state to restore", path=path)
            return ()
        self._log.info("Restored saved state", path=path)
        return saved

    def _restored(self, saved: tuple[SavedService, ...]) -> list[Service]:
        services = []
        for entry in saved:
            options = DeployOptions(
                service=entry.name,
                targets=entry.active_targets,
                service_options=entry.service_options,
                target_options=entry.target_options,
            )
            try:
                deployment = self._new_deployment(options, trusted=True)
            except KamalProxyError as error:
                raise StateError(
                    f"saved state {self.options.state_path}: service '{entry.name}': {error}"
                ) from error
            for flag in unsupported_flags(
                entry.service_options, entry.target_options, entry.active_readers
            ):
                self._log.warning(
                    f"Service is served without --{flag}: not supported yet by this version",
                    service=entry.name,
                )
            services.append(_restored_service(entry, deployment))
        return services


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


def serve(options: RunOptions) -> None:
    """Run a proxy that logs to standard output until SIGTERM or SIGINT, then shut it down.

    A second signal ends it at once.

    Raises:
        KamalProxyError: it can't start.
    """
    options.validate()
    _raise_descriptor_limit()
    writer = LineWriter(1)
    try:
        trio.run(_serve_until_signal, options, writer)
    except BaseExceptionGroup as group:
        told = group.subgroup(KamalProxyError)
        if told is None or told.exceptions != group.exceptions:
            raise
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        writer.close()


async def _serve_until_signal(options: RunOptions, writer: LineWriter) -> None:
    proxy = Proxy(options, log=writer.write)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch_signals() -> None:
                async for _ in signals:
                    if proxy.stopping:
                        nursery.cancel_scope.cancel(reason="a second signal")
                    proxy.stop()

            nursery.start_soon(watch_signals)
            nursery.start_soon(writer.run)
            await proxy.run()
            nursery.cancel_scope.cancel(reason="the proxy has stopped")


def _raise_descriptor_limit() -> None:
    """Use all file descriptors that the process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # the soft limit serves as well, with less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Report:
    """Tells whoever deploys what happens, with the time since the deploy began."""

    def __init__(self, progress: Callable[[Event], None] | None) -> None:
        self._progress = progress
        self._started = trio.current_time()

    def __call__(
        self, event: str, *, in_flight: int = 0, completed: int = 0, cancelled: int = 0
    ) -> None:
        self._tell(
            Event(
                event=event,
                elapsed=self._elapsed(),
                in_flight=in_flight,
                completed=completed,
                cancelled=cancelled,
            )
        )

    def probe(self, target: Target, result: ProbeResult) -> None:
        self._tell(
            Event(
                event="probe",
                elapsed=self._elapsed(),
                target=target.name,
                ok=result.ok,
                result=result.reason,
            )
        )

    def _elapsed(self) -> float:
        return round(trio.current_time() - self._started, 6)

    def _tell(self, event: Event) -> None:
        if self._progress is not None:
            self._progress(event)


async def _wait_until_healthy(deployment: Deployment, deploy_timeout: float) -> None:
    with trio.move_on_after(deploy_timeout):
        await deployment.wait_until_healthy()
        return
    raise DeployFailedError(
        "target failed to become healthy within configured timeout "
        f"({format_duration(deploy_timeout)})",
        [
            f"target {target.name}: {_last_probe(target)} (after {format_duration(deploy_timeout)})"
            for target in deployment.targets
            if target.health.state is not TargetState.HEALTHY
        ],
    )


def _last_probe(target: Target) -> str:
    result = target.health.last
    if result is None:
        return "no probe finished; is --deploy-timeout long enough?"
    return f"{result.reason} at {result.url}{_hint(result.reason)}"


def _hint(reason: str) -> str:
    """Say what commonly causes a failing probe."""
    for sign, hint in (
        ("refused", "is the app running, and listening on this port on all interfaces?"),
        ("can't resolve", "is the container running, in the network of the proxy?"),
        ("status 404", "does the app answer at this path? see --health-check-path"),
        ("status 400", "does the app accept this Host? see --health-check-host"),
        ("status 403", "does the app accept this Host? see --health-check-host"),
        ("status 401", "does the app exempt this path from authentication?"),
        ("no answer", "is the app still starting? see --health-check-timeout"),
    ):
        if sign in reason:
            return f"; {hint}"
    return ""


def _service(options: DeployOptions, deployment: Deployment, current: Service | None) -> Service:
    """Build the service that a deploy makes; pause state and rollout outlive a deploy."""
    if current is None:
        return Service(
            name=options.service,
            options=options.service_options,
            target_options=options.target_options,
            active=deployment,
        )
    return attrs.evolve(
        current,
        options=options.service_options,
        target_options=options.target_options,
        active=deployment,
        active_readers=(),
        extra={},
    )


def _restored_service(entry: SavedService, deployment: Deployment) -> Service:
    return Service(
        name=entry.name,
        options=entry.service_options,
        target_options=entry.target_options,
        active=deployment,
        active_readers=entry.active_readers,
        rollout=entry.rollout,
        rollout_targets=entry.rollout_targets,
        rollout_readers=entry.rollout_readers,
        pause=entry.pause,
        extra=entry.extra,
    )


def _saved(service: Service) -> SavedService:
    return SavedService(
        name=service.name,
        service_options=service.options,
        target_options=service.target_options,
        active_targets=tuple(target.name for target in service.active.targets),
        active_readers=service.active_readers,
        rollout_targets=service.rollout_targets,
        rollout_readers=service.rollout_readers,
        pause=service.pause,
        rollout=service.rollout,
        extra=service.extra,
    )
