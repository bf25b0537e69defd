"""The services of one proxy, and every change of them: deploy, remove, pause, rollout, restore.

The one face of ``saved_routes``, ``switching`` and ``holding``. Deployments run in the nursery that
the proxy gives; those that drain are remembered here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeVar

import attrs
import trio

from kamal_proxy.balancer import split_point
from kamal_proxy.deployment import Deployment, DrainResult
from kamal_proxy.errors import RolloutNotSetError, ServiceNotFoundError
from kamal_proxy.holding import Holding
from kamal_proxy.reports import Report
from kamal_proxy.restoring import restored
from kamal_proxy.router import RoutingTable
from kamal_proxy.saved_routes import SavedRoutes
from kamal_proxy.service import Pages, Service
from kamal_proxy.state import SavedPause, SavedRollout
from kamal_proxy.switching import Switching
from kamal_proxy.tls.files import TlsFiles
from kamal_proxy.tls.reloading import tell_doubts

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.control.messages import Event, ServiceDescription
    from kamal_proxy.deployment import Connect, Probe
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.options import (
        DeploymentOptions,
        DeployOptions,
        PauseOptions,
        RolloutOptions,
        RolloutSplit,
        ServiceOptions,
        StopOptions,
    )
    from kamal_proxy.state import SavedService, StateFile

A = TypeVar("A")
R = TypeVar("R")

_MAX_LOADS = 4  # directories of error pages and certificates that are read at once


class ObtainedCertificates(Protocol):
    """What obtains certificates, as far as services need it."""

    def require_possible(self, options: ServiceOptions) -> None:
        """Raise InvalidOptionsError if a service with these options could not use TLS."""

    def want(self, routes: RoutingTable) -> None:
        """Take note of a new routing table: obtain what it needs, and no more than that."""

    def try_again(self, service: str) -> None:
        """Try at once what could not be obtained for a service that was just deployed."""


class Services:
    """All services of a proxy.

    Args:
        state: Where they are saved; ``None`` saves nothing.
        log: Where changes are logged.
        probe: Probes a target.
        connect: Makes the connections of a target from its host and port, and what is spoken.
        load_pages: Reads a service's own error pages from a directory, blocking.
        certificates: Obtains certificates for services with TLS.
        metrics: Counts probes and deploys.
    """

    def __init__(
        self,
        state: StateFile[SavedService] | None,
        log: Log,
        *,
        probe: Probe,
        connect: Connect,
        load_pages: Callable[[str], Pages],
        certificates: ObtainedCertificates,
        metrics: Metrics,
    ) -> None:
        self._state = state
        self._log = log
        self._load_pages = load_pages
        self._certificates = certificates
        self._metrics = metrics
        # Threads of their own: a slow directory may hold up nothing else.
        self._loading = trio.CapacityLimiter(_MAX_LOADS)
        self._draining: list[tuple[str, Deployment]] = []
        self._routes = SavedRoutes(state, certificates.want)
        self._switching = Switching(
            self._routes, log, probe=probe, connect=connect, metrics=metrics
        )
        self._holding = Holding(self._routes, log)

    @property
    def routes(self) -> RoutingTable:
        """The routing table of this moment; never changed, only replaced."""
        return self._routes.table

    async def start(self, nursery: trio.Nursery, restored: list[Service]) -> None:
        """Start to take changes; deployments run in ``nursery``, restored ones first."""
        for service in restored:
            for deployment in service.deployments:
                await nursery.start(deployment.run)
        self._routes.show(RoutingTable({service.name: service for service in restored}))
        self._switching.start(nursery)

    def close(self) -> None:
        """Take no further changes; deploys that have not switched yet fail."""
        self._switching.close()

    # Deploying

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
            ErrorPagesError: the error pages can't be used.
            CertificateError: the service's certificate can't be used.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        options.validate()
        report = Report(progress, self._log)
        self._switching.require_nursery()
        pages = tls = None
        if options.service_options.error_page_path:
            pages = await self._load(self._load_pages, options.service_options.error_page_path)
        if options.service_options.tls_enabled:
            self._certificates.require_possible(options.service_options)
            tls = TlsFiles(options.service_options)
            await self._load(TlsFiles.load, tls)
            tell_doubts(options.service, tls, self._log)
        deployment = self._switching.new_deployment(
            options.service,
            options.targets,
            options.read_targets,
            options.target_options.health_check,
            forced=options.deployment_options.force,
        )

        target_options = options.target_options
        if target_options.forward_headers is None:
            # By what this deploy says of TLS, not by what its host's root does, as the original.
            believed = not options.service_options.tls_enabled
            target_options = attrs.evolve(target_options, forward_headers=believed)

        def install(current: Service | None) -> Service:
            """Make the deployed service; pause state and rollout outlive a deploy."""
            if current is None:
                return Service(
                    name=options.service,
                    options=options.service_options,
                    target_options=target_options,
                    active=deployment,
                    pages=pages,
                    tls=tls,
                )
            return attrs.evolve(
                current,
                options=options.service_options,
                target_options=target_options,
                active=deployment,
                pages=pages,
                tls=tls,
                extra={},
            )

        self.routes.require_available(install(None))
        fields = {
            "service": options.service,
            "targets": options.targets,
            "hosts": options.service_options.hosts or ("",),
            "paths": options.service_options.path_prefixes,
            "tls": options.service_options.tls_enabled,
        }
        self._log.info("Deploying", **fields)
        result = await self._replace(
            options.service, deployment, options.deployment_options, install, report
        )
        self._log.info("Deployed", **fields)
        report.done(result)
        return result

    async def deploy_rollout(
        self,
        name: str,
        options: RolloutOptions,
        progress: Callable[[Event], None] | None = None,
    ) -> DrainResult:
        """Deploy the rollout targets of a service, as :meth:`deploy` does its active ones.

        They get requests only while a split is set, see :meth:`set_rollout`.

        Raises:
            ServiceNotFoundError: there is no such service, or no longer.
            DeployFailedError: the targets did not become healthy in time; nothing has changed.
            InvalidOptionsError: an option has a value that can't be used.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        options.validate()
        report = Report(progress, self._log)
        self._switching.require_nursery()
        deployment = self._switching.new_deployment(
            name,
            options.targets,
            options.read_targets,
            self._routes.service(name).target_options.health_check,
            forced=options.deployment_options.force,
        )

        def install(current: Service | None) -> Service:
            if current is None:
                raise ServiceNotFoundError("service not found")
            return attrs.evolve(current, rollout=deployment)

        self._log.info("Deploying for rollout", service=name, targets=options.targets)
        result = await self._replace(name, deployment, options.deployment_options, install, report)
        self._log.info("Deployed for rollout", service=name, targets=options.targets)
        report.done(result)
        return result

    async def _replace(
        self,
        name: str,
        deployment: Deployment,
        options: DeploymentOptions,
        install: Callable[[Service | None], Service],
        report: Report,
    ) -> DrainResult:
        """Bring a deployment into service and drain the one that it replaces."""
        deployment.watch.on_probe = report.probe
        switched = False
        try:
            replaced = await self._switching.switch(name, deployment, options, install, report)
            switched = True
        finally:
            self._metrics.deploy(name, "ok" if switched else "failed", report.elapsed)
        self._certificates.try_again(name)
        report("switched")
        if replaced is None:
            return DrainResult()
        self._retire(name, replaced, options.drain_timeout)
        async with trio.open_nursery() as watchers:
            watchers.start_soon(report.tell_draining, lambda: replaced.in_flight)
            result = await replaced.wait_drained()
            watchers.cancel_scope.cancel(reason="drained")
        return result

    # Other changes

    async def remove(self, name: str) -> None:
        """Take a service out of routing at once; its requests in flight end by themselves.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        self._switching.require_nursery()
        async with self._routes.lock:
            service = self._routes.service(name)
            await self._routes.replace(self.routes.without_service(name))
        service.released.set()
        for deployment in service.deployments:
            self._retire(name, deployment, math.inf)

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Let new requests of a service wait, and those in flight end.

        Cancelled during the drain, the service stays paused and no request is cut.

        Args:
            name: The service.
            options: For how long.
            progress: Told each step; see :meth:`deploy`.

        Returns:
            How the drain ended.

        Raises:
            ServiceNotFoundError: there is no such service.
            InvalidOptionsError: an option has a value that can't be used.
            ResumedError: the service was resumed before the drain was over; nothing was cut.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        options.validate()
        pause = SavedPause(state="paused", fail_after=options.max_pause)
        self._switching.require_nursery()
        return await self._holding.hold(name, pause, options.drain_timeout, progress)

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Answer new requests of a service with a message, and let those in flight end.

        Arguments, result and errors are those of :meth:`pause`.
        """
        options.validate()
        pause = SavedPause(state="stopped", stop_message=options.message)
        self._switching.require_nursery()
        return await self._holding.hold(name, pause, options.drain_timeout, progress)

    async def resume(self, name: str) -> None:
        """Serve a paused or stopped service again; requests that wait go on.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        self._switching.require_nursery()
        await self._holding.change(name, SavedPause())
        self._log.info("Service resumed", service=name)

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        """Choose whose requests go to the rollout targets of a service.

        Raises:
            ServiceNotFoundError: there is no such service.
            RolloutNotSetError: it has no rollout targets.
            InvalidOptionsError: the percentage is none.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        split.validate()
        self._switching.require_nursery()
        saved = SavedRollout(
            percentage=split.percentage,
            percentage_split_point=split_point(split.percentage),
            allowlist=split.allowlist,
        )
        async with self._routes.lock:
            service = self._routes.service(name)
            if service.rollout is None:
                raise RolloutNotSetError("rollout target not set")
            await self._routes.replace(self.routes.with_service(attrs.evolve(service, split=saved)))
        self._log.info(
            "Set rollout split",
            service=name,
            percentage=split.percentage,
            allowlist=split.allowlist,
        )

    async def stop_rollout(self, name: str) -> None:
        """Send all requests of a service to its active targets; the rollout targets stay deployed.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        self._switching.require_nursery()
        async with self._routes.lock:
            service = attrs.evolve(self._routes.service(name), split=None)
            await self._routes.replace(self.routes.with_service(service))
        self._log.info("Stopped rollout", service=name)

    # What they have in common

    def _retire(self, name: str, deployment: Deployment, drain_timeout: float) -> None:
        """Begin to drain what was taken out of routing, and remember it for :meth:`describe`."""
        self._draining = [entry for entry in self._draining if not entry[1].drained]
        self._draining.append((name, deployment))
        deployment.retire(drain_timeout)

    async def _load(self, load: Callable[[A], R], what: A) -> R:
        """Read files in a thread, which is left alone if nobody waits for it any more."""
        return await trio.to_thread.run_sync(
            load, what, abandon_on_cancel=True, limiter=self._loading
        )

    # Describing and restoring

    def has(self, name: str) -> bool:
        """Whether there is a service of that name."""
        return self.routes.get(name) is not None

    def describe(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""
        return [
            service.describe(
                sum(old.in_flight for name, old in self._draining if name == service.name)
            )
            for service in sorted(self.routes, key=lambda service: service.name)
        ]

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
        services = [
            restored(entry, self._switching, self._load_pages, self._log) for entry in saved
        ]
        self._log.info("Restored saved state", path=self._state.path)
        return services
