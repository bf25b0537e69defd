"""The services of one proxy, and every change of them: deploy, remove, pause, rollout, restore.

Owns the routing table and the saved state. The table is replaced whole, in one assignment, under a
lock that is held while the state is written and never while a drain is waited for. Deployments run
in the nursery that the proxy gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeVar

import attrs
import trio

from kamal_proxy.balancer import split_point
from kamal_proxy.deployment import Deployment, DrainResult, Target
from kamal_proxy.errors import (
    ResumedError,
    RolloutNotSetError,
    ServiceNotFoundError,
    ShuttingDownError,
)
from kamal_proxy.reports import Report, not_healthy
from kamal_proxy.restoring import restored
from kamal_proxy.router import RoutingTable
from kamal_proxy.service import Pages, Service
from kamal_proxy.state import SavedPause, SavedRollout
from kamal_proxy.tls.files import TlsFiles
from kamal_proxy.tls.reloading import tell_doubts

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.control.messages import Event, ServiceDescription
    from kamal_proxy.deployment import Connect, Probe
    from kamal_proxy.health import ProbeResult
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.options import (
        DeploymentOptions,
        DeployOptions,
        HealthCheckOptions,
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
        self._probe = probe
        self._connect = connect
        self._load_pages = load_pages
        self._certificates = certificates
        self._metrics = metrics
        self._commit = trio.Lock()
        # Threads of their own: neither a slow name service nor a slow directory may hold up
        # the state.
        self._saving = trio.CapacityLimiter(1)
        self._loading = trio.CapacityLimiter(_MAX_LOADS)
        self._draining: list[tuple[str, Deployment]] = []
        self._nursery: trio.Nursery | None = None
        self._pending: set[trio.CancelScope] = set()  # of deploys that have not switched yet
        #: The routing table of this moment; never changed, only replaced.
        self.routes = RoutingTable()

    async def start(self, nursery: trio.Nursery, restored: list[Service]) -> None:
        """Start to take changes; deployments run in ``nursery``, restored ones first."""
        for service in restored:
            for deployment in service.deployments:
                await nursery.start(deployment.run)
        self._show(RoutingTable({service.name: service for service in restored}))
        self._nursery = nursery

    def close(self) -> None:
        """Take no further changes; deploys that have not switched yet fail."""
        self._nursery = None
        for pending in self._pending:
            pending.cancel(reason="the proxy stops")

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
        self._running()
        pages = tls = None
        if options.service_options.error_page_path:
            pages = await self._load(self._load_pages, options.service_options.error_page_path)
        if options.service_options.tls_enabled:
            self._certificates.require_possible(options.service_options)
            tls = TlsFiles(options.service_options)
            await self._load(TlsFiles.load, tls)
            tell_doubts(options.service, tls, self._log)
        deployment = self._new_deployment(
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
        self._running()
        deployment = self._new_deployment(
            name,
            options.targets,
            options.read_targets,
            self._service(name).target_options.health_check,
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
            replaced = await self._switch(name, deployment, options, install, report)
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

    async def _switch(
        self,
        name: str,
        deployment: Deployment,
        options: DeploymentOptions,
        install: Callable[[Service | None], Service],
        report: Report,
    ) -> Deployment | None:
        """Start a deployment, wait for its health and install it; return the one it replaces.

        Whatever comes between, the new deployment is retired again and nothing has changed.
        """
        await self._running().start(deployment.run)
        installed = False
        try:
            with trio.CancelScope() as pending:
                self._pending.add(pending)
                if not options.force:
                    with trio.move_on_after(options.deploy_timeout) as waiting:
                        await deployment.watch.wait_until_healthy()
                    if waiting.cancelled_caught:
                        raise not_healthy(deployment.targets, options.deploy_timeout)
                    report("healthy")
                async with self._commit:
                    current = self.routes.get(name)
                    service = install(current)
                    await self._replace_routes(self.routes.with_service(service))
                installed = True
        finally:
            self._pending.discard(pending)
            deployment.watch.on_probe = None
            if not installed:
                deployment.retire(0)
        if not installed:
            raise ShuttingDownError("the proxy is shutting down")
        if current is None:
            return None
        kept = tuple(service.deployments)
        return next((old for old in current.deployments if old not in kept), None)

    # Other changes

    async def remove(self, name: str) -> None:
        """Take a service out of routing at once; its requests in flight end by themselves.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        self._running()
        async with self._commit:
            service = self._service(name)
            await self._replace_routes(self.routes.without_service(name))
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
        return await self._hold(name, pause, options.drain_timeout, progress)

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Answer new requests of a service with a message, and let those in flight end.

        Arguments, result and errors are those of :meth:`pause`.
        """
        options.validate()
        pause = SavedPause(state="stopped", stop_message=options.message)
        return await self._hold(name, pause, options.drain_timeout, progress)

    async def resume(self, name: str) -> None:
        """Serve a paused or stopped service again; requests that wait go on.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        await self._change_pause(name, SavedPause())
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
        self._running()
        saved = SavedRollout(
            percentage=split.percentage,
            percentage_split_point=split_point(split.percentage),
            allowlist=split.allowlist,
        )
        async with self._commit:
            service = self._service(name)
            if service.rollout is None:
                raise RolloutNotSetError("rollout target not set")
            await self._replace_routes(self.routes.with_service(attrs.evolve(service, split=saved)))
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
        self._running()
        async with self._commit:
            service = attrs.evolve(self._service(name), split=None)
            await self._replace_routes(self.routes.with_service(service))
        self._log.info("Stopped rollout", service=name)

    async def _hold(
        self,
        name: str,
        pause: SavedPause,
        drain_timeout: float,
        progress: Callable[[Event], None] | None,
    ) -> DrainResult:
        """Pause or stop a service, and drain what it is serving."""
        report = Report(progress, self._log)
        service = await self._change_pause(name, pause)
        self._log.info(f"Service {pause.state}", service=name)
        results: list[DrainResult] = []
        drained = False

        async def drain(deployment: Deployment) -> None:
            results.append(await deployment.drain(drain_timeout))

        async with trio.open_nursery() as watchers:
            watchers.start_soon(
                report.tell_draining,
                lambda: sum(deployment.in_flight for deployment in service.deployments),
            )
            watchers.start_soon(self._watch_resumed, service, watchers.cancel_scope)
            async with trio.open_nursery() as drains:
                for deployment in service.deployments:
                    drains.start_soon(drain, deployment)
            drained = True
            watchers.cancel_scope.cancel(reason="drained")
        if not drained:
            raise ResumedError(f"service {name} was resumed while it drained")
        self._log.info("Service drained", service=name)
        result = sum(results, DrainResult())
        report.done(result)
        return result

    async def _watch_resumed(self, service: Service, scope: trio.CancelScope) -> None:
        """Call a drain off once the service runs again: then nothing has to end any more."""
        current: Service | None = service
        while current is not None and current.pause.state != "running":
            await current.released.wait()
            current = self.routes.get(service.name)
        if current is not None:
            scope.cancel(reason="resumed")

    async def _change_pause(self, name: str, pause: SavedPause) -> Service:
        self._running()
        async with self._commit:
            before = self._service(name)
            if pause.state != "paused":
                # The Go proxy goes on saving how long the last pause was.
                pause = attrs.evolve(pause, fail_after=before.pause.fail_after)
            service = attrs.evolve(before, pause=pause, released=trio.Event())
            await self._replace_routes(self.routes.with_service(service))
        before.released.set()
        return service

    # What they have in common

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise ShuttingDownError("the proxy is not running")
        return self._nursery

    def _service(self, name: str) -> Service:
        service = self.routes.get(name)
        if service is None:
            raise ServiceNotFoundError("service not found")
        return service

    def _new_deployment(
        self,
        name: str,
        targets: tuple[str, ...],
        readers: tuple[str, ...],
        health_check: HealthCheckOptions,
        *,
        trusted: bool = False,
        forced: bool = False,
    ) -> Deployment:
        async def probe(target: Target, options: HealthCheckOptions) -> ProbeResult:
            result = await self._probe(target, options)
            self._metrics.probe(name, result.ok)
            return result

        return Deployment(
            targets,
            readers=readers,
            health_check=health_check,
            probe=probe,
            connect=self._connect,
            log=self._log,
            trusted=trusted,
            forced=forced,
        )

    def _retire(self, name: str, deployment: Deployment, drain_timeout: float) -> None:
        """Begin to drain what was taken out of routing, and remember it for :meth:`describe`."""
        self._draining = [entry for entry in self._draining if not entry[1].drained]
        self._draining.append((name, deployment))
        deployment.retire(drain_timeout)

    async def _replace_routes(self, routes: RoutingTable) -> None:
        """Save the state, then switch to the new table; if it can't be saved, nothing changes.

        The write is not abandoned when cancelled, so that file and table never disagree.
        """
        if self._state is not None:
            saved = [service.saved() for service in routes]
            await trio.to_thread.run_sync(self._state.save, saved, limiter=self._saving)
        self._show(routes)

    def _show(self, routes: RoutingTable) -> None:
        self.routes = routes
        self._certificates.want(routes)

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
            restored(entry, self._new_deployment, self._load_pages, self._log) for entry in saved
        ]
        self._log.info("Restored saved state", path=self._state.path)
        return services
