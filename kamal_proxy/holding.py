"""Pausing and stopping services, which drains them, and resuming them, which ends such a drain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.deployment import Deployment, DrainResult
from kamal_proxy.errors import ResumedError
from kamal_proxy.reports import Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.control.messages import Event
    from kamal_proxy.logs import Log
    from kamal_proxy.saved_routes import SavedRoutes
    from kamal_proxy.service import Service
    from kamal_proxy.state import SavedPause


class Holding:
    """Whether the services of a proxy are running, paused or stopped.

    Args:
        routes: The services; what becomes of them is saved.
        log: Where it is logged.
    """

    def __init__(self, routes: SavedRoutes, log: Log) -> None:
        self._routes = routes
        self._log = log

    async def hold(
        self,
        name: str,
        pause: SavedPause,
        drain_timeout: float,
        progress: Callable[[Event], None] | None,
    ) -> DrainResult:
        """Pause or stop a service, and drain what it is serving.

        Args:
            name: The service.
            pause: What it does from now on.
            drain_timeout: Seconds that requests in flight may take to finish.
            progress: Told each step; must not block.

        Raises:
            ServiceNotFoundError: there is no such service.
            ResumedError: the service was resumed before the drain was over; nothing was cut.
            StateError: the state could not be saved; nothing has changed.
        """
        report = Report(progress, self._log)
        service = await self.change(name, pause)
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
            current = self._routes.table.get(service.name)
        if current is not None:
            scope.cancel(reason="resumed")

    async def change(self, name: str, pause: SavedPause) -> Service:
        """Pause, stop or resume a service without draining it; return what it is now.

        The errors are those of :meth:`hold`, without ResumedError.
        """
        async with self._routes.lock:
            before = self._routes.service(name)
            if pause.state != "paused":
                # The Go proxy goes on saving how long the last pause was.
                pause = attrs.evolve(pause, fail_after=before.pause.fail_after)
            service = attrs.evolve(before, pause=pause, released=trio.Event())
            await self._routes.replace(self._routes.table.with_service(service))
        before.released.set()
        return service
