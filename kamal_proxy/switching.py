"""Bringing a deployment into service: made, started, waited for, installed; or nothing has changed.

Owns the nursery that deployments run in. What is installed where, and what becomes of the
deployment that is replaced, is the caller's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.deployment import Deployment, Target
from kamal_proxy.errors import ShuttingDownError
from kamal_proxy.reports import Report, not_healthy

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.deployment import Connect, Probe
    from kamal_proxy.health import ProbeResult
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.options import DeploymentOptions
    from kamal_proxy.saved_routes import SavedRoutes
    from kamal_proxy.service import Service
    from kamal_proxy.target_options import HealthCheckOptions


class Switching:
    """The deployments of a proxy until they serve.

    Args:
        routes: Where they are installed.
        log: Where changes of health are logged.
        probe: Probes a target.
        connect: Makes the connections of a target from its host and port, and what is spoken.
        metrics: Counts probes.
    """

    def __init__(
        self,
        routes: SavedRoutes,
        log: Log,
        *,
        probe: Probe,
        connect: Connect,
        metrics: Metrics,
    ) -> None:
        self._routes = routes
        self._log = log
        self._probe = probe
        self._connect = connect
        self._metrics = metrics
        self._nursery: trio.Nursery | None = None
        self._pending: set[trio.CancelScope] = set()  # of deploys that have not switched yet

    def start(self, nursery: trio.Nursery) -> None:
        """Let deployments run in a nursery."""
        self._nursery = nursery

    def close(self) -> None:
        """Let no further deployment run; deploys that have not switched yet fail."""
        self._nursery = None
        for pending in self._pending:
            pending.cancel(reason="the proxy stops")

    def require_nursery(self) -> trio.Nursery:
        """Return where deployments run.

        Raises:
            ShuttingDownError: the proxy is not running.
        """
        if self._nursery is None:
            raise ShuttingDownError("the proxy is not running")
        return self._nursery

    def new_deployment(
        self,
        name: str,
        targets: tuple[str, ...],
        readers: tuple[str, ...],
        health_check: HealthCheckOptions,
        *,
        trusted: bool = False,
        forced: bool = False,
    ) -> Deployment:
        """Make a deployment, which has still to be run.

        Args:
            name: The service that it is for.
            targets: ``host:port`` of each target.
            readers: ``host:port`` of each read-only target.
            health_check: How they are probed.
            trusted: Whether they count as healthy at once.
            forced: Whether they may serve before they were found healthy.
        """

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

    async def switch(
        self,
        name: str,
        deployment: Deployment,
        options: DeploymentOptions,
        install: Callable[[Service | None], Service],
        report: Report,
    ) -> Deployment | None:
        """Start a deployment, wait for its health and install it; return the one it replaces.

        Whatever comes between, the new deployment is retired again and nothing has changed.

        Args:
            name: The service.
            deployment: What was made by :meth:`new_deployment`.
            options: How long its health is waited for, if at all.
            install: Makes the service with it of the service as it is then.
            report: Told that it is healthy.

        Raises:
            DeployFailedError: the targets did not become healthy in time.
            StateError: the state could not be saved.
            ShuttingDownError: the proxy is not running, or stops.
        """
        await self.require_nursery().start(deployment.run)
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
                async with self._routes.lock:
                    current = self._routes.table.get(name)
                    service = install(current)
                    await self._routes.replace(self._routes.table.with_service(service))
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
