"""The services of one proxy, and every change of them: deploy, remove, restore, describe.

Owns the routing table and the saved state. The table is replaced whole, in one assignment, under a
lock that is held while the state is written and never while a drain is waited for. Deployments run
in the nursery that the proxy gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.control.messages import Event, ServiceDescription
from kamal_proxy.deployment import Connections, Deployment, DrainResult, Probe, Target
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import (
    DeployFailedError,
    ServiceNotFoundError,
    ShuttingDownError,
)
from kamal_proxy.health import ProbeResult, TargetState
from kamal_proxy.options import DeployOptions, unsupported_flags
from kamal_proxy.router import RoutingTable
from kamal_proxy.service import Service
from kamal_proxy.state import SavedService, StateFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.logs import Log

_DRAIN_REPORT_INTERVAL = 1.0  # seconds


class Services:
    """All services of a proxy.

    Args:
        state: Where they are saved; ``None`` saves nothing.
        log: Where changes are logged.
        probe: Probes a target.
        connect: Makes the connections of a target from its host and port.
    """

    def __init__(
        self,
        state: StateFile | None,
        log: Log,
        *,
        probe: Probe,
        connect: Callable[[str, int], Connections],
    ) -> None:
        self._state = state
        self._log = log
        self._probe = probe
        self._connect = connect
        self._commit = trio.Lock()
        self._saving = trio.CapacityLimiter(1)
        self._draining: list[tuple[str, Deployment]] = []
        self._nursery: trio.Nursery | None = None
        self._pending: set[trio.CancelScope] = set()  # of deploys that have not switched yet
        #: The routing table of this moment; never changed, only replaced.
        self.routes = RoutingTable()

    async def start(self, nursery: trio.Nursery, restored: list[Service]) -> None:
        """Start to take changes; deployments run in ``nursery``, restored ones first."""
        for service in restored:
            await nursery.start(service.active.run)
        self.routes = RoutingTable({service.name: service for service in restored})
        self._nursery = nursery

    def stop(self) -> None:
        """Take no further changes; deploys that have not switched yet fail."""
        self._nursery = None
        for pending in self._pending:
            pending.cancel(reason="the proxy stops")

    async def deploy(
        self, options: DeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a service: probe its targets, switch to them, drain the old ones.

        Cancelled before the switch, nothing has changed; cancelled after it, the drain goes on.

        Args:
            options: The service and everything about it.
            progress: Told each step as it happens; must not block. One that raises is told
                nothing more.

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
        report = _Report(progress, self._log)
        deployment = self._new_deployment(options)
        self.routes.require_available(_service(options, deployment, None))
        fields = {
            "service": options.service,
            "targets": options.targets,
            "hosts": options.service_options.hosts or ("",),
            "paths": options.service_options.path_prefixes,
            "tls": options.service_options.tls_enabled,
        }
        self._log.info("Deploying", **fields)
        deployment.on_probe = report.probe
        replaced = await self._switch(options, deployment, report)
        report("switched")
        result = DrainResult()
        if replaced is not None:
            self._retire(options.service, replaced, options.deployment_options.drain_timeout)
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
            service = self.routes.get(name)
            if service is None:
                raise ServiceNotFoundError("service not found")
            await self._replace_routes(self.routes.without_service(name))
        self._retire(name, service.active, math.inf)

    def describe(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""
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
            for service in sorted(self.routes, key=lambda service: service.name)
        ]

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise ShuttingDownError("the proxy is not running")
        return self._nursery

    def _new_deployment(self, options: DeployOptions, *, trusted: bool = False) -> Deployment:
        return Deployment(
            options.targets,
            health_check=options.target_options.health_check,
            probe=self._probe,
            connect=self._connect,
            log=self._log,
            trusted=trusted,
            forced=options.deployment_options.force,
        )

    async def _switch(
        self, options: DeployOptions, deployment: Deployment, report: _Report
    ) -> Deployment | None:
        """Start a deployment, wait for its health and install it; return the one it replaces.

        Whatever comes between, the new deployment is retired again and nothing has changed.
        """
        await self._running().start(deployment.run)
        installed = False
        try:
            with trio.CancelScope() as pending:
                self._pending.add(pending)
                if not options.deployment_options.force:
                    await _wait_until_healthy(deployment, options.deployment_options.deploy_timeout)
                    report("healthy")
                replaced = await self._install(options, deployment)
                installed = True
        finally:
            self._pending.discard(pending)
            deployment.on_probe = None
            if not installed:
                deployment.retire(0)
        if not installed:
            raise ShuttingDownError("the proxy is shutting down")
        return replaced

    def _retire(self, name: str, deployment: Deployment, drain_timeout: float) -> None:
        """Begin to drain what was taken out of routing, and remember it for :meth:`describe`."""
        self._draining = [entry for entry in self._draining if not entry[1].drained]
        self._draining.append((name, deployment))
        deployment.retire(drain_timeout)

    async def _install(self, options: DeployOptions, deployment: Deployment) -> Deployment | None:
        """Give a service its new deployment; return the one it replaces."""
        async with self._commit:
            current = self.routes.get(options.service)
            service = _service(options, deployment, current)
            await self._replace_routes(self.routes.with_service(service))
        return None if current is None else current.active

    async def _replace_routes(self, routes: RoutingTable) -> None:
        """Save the state, then switch to the new table; if it can't be saved, nothing changes.

        The write is not abandoned when cancelled, so that file and table never disagree.
        """
        if self._state is not None:
            saved = [_saved(service) for service in routes]
            # A limiter of its own: no slow name service may hold this up.
            await trio.to_thread.run_sync(self._state.save, saved, limiter=self._saving)
        self.routes = routes

    async def _wait_drained(self, deployment: Deployment, report: _Report) -> DrainResult:
        while True:
            report("draining", in_flight=deployment.in_flight)
            with trio.move_on_after(_DRAIN_REPORT_INTERVAL):
                return await deployment.wait_drained()

    # Restoring services

    def restore(self) -> list[Service]:
        """Read the saved state; the services serve once :meth:`start` was called with them.

        Raises:
            StateError: the saved state can't be used.
        """
        if self._state is None:
            return []
        saved = self._state.load()
        if saved is None:
            self._log.info("No previous state to restore", path=self._state.path)
            return []
        services = [self._restored(entry) for entry in saved]
        self._log.info("Restored saved state", path=self._state.path)
        return services

    def _restored(self, entry: SavedService) -> Service:
        options = DeployOptions(
            service=entry.name,
            targets=entry.active_targets,
            service_options=entry.service_options,
            target_options=entry.target_options,
        )
        for flag in unsupported_flags(
            entry.service_options, entry.target_options, entry.active_readers
        ):
            self._log.warning(
                f"Service is served without --{flag}: not supported yet by this version",
                service=entry.name,
            )
        if entry.rollout_targets:
            self._log.warning(
                "Service is served without its rollout: not supported yet by this version",
                service=entry.name,
            )
        return Service(
            name=entry.name,
            options=entry.service_options,
            target_options=entry.target_options,
            active=self._new_deployment(options, trusted=True),
            active_readers=entry.active_readers,
            rollout=entry.rollout,
            rollout_targets=entry.rollout_targets,
            rollout_readers=entry.rollout_readers,
            pause=entry.pause,
            extra=entry.extra,
        )


class _Report:
    """Tells whoever deploys what happens, with the time since the deploy began."""

    def __init__(self, progress: Callable[[Event], None] | None, log: Log) -> None:
        self._progress = progress
        self._log = log
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
        if self._progress is None:
            return
        try:
            self._progress(event)
        except Exception as error:  # a report must not harm what it reports on
            self._progress = None
            self._log.error("Progress callback failed", error=repr(error))


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
