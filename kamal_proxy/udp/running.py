"""The UDP services that run, and their ports: also those that do not serve yet, or no longer.

Owns their leases. A service runs from its first deploy on, whether that comes to anything or not,
until nobody needs it any more. Which of them serve, and with which targets, is ``services``'.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from kamal_proxy._fastpath import SourcePorts
from kamal_proxy.errors import ListenError, ShuttingDownError
from kamal_proxy.listeners import reason
from kamal_proxy.udp.descriptors import Descriptors
from kamal_proxy.udp.leases import Lease, Leases
from kamal_proxy.udp.metrics import UdpMetrics
from kamal_proxy.udp.service import UdpService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    import trio

    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.udp.deployment import UdpDeployment
    from kamal_proxy.udp.options import UdpOptions


class RunningServices:
    """The UDP services of a proxy that run.

    Args:
        installed: Those of them that serve, by name; the caller's, who changes it.
        log: Where is said what they have shed, and how they have drained.
        bind: Addresses to listen on; none means all.
        interrupt: A descriptor that is readable when something else than UDP is to be done.
        metrics: Shows their sessions.

    Attributes:
        descriptors: What they may have of the process's file descriptors.
    """

    def __init__(
        self,
        installed: Mapping[str, UdpService],
        log: Log,
        *,
        bind: Sequence[str],
        interrupt: int,
        metrics: Metrics,
    ) -> None:
        self._installed = installed
        self._log = log
        self._interrupt = interrupt
        self._running: dict[str, UdpService] = {}
        self._users: dict[str, int] = {}  # how many deploys go on
        self._source_ports = SourcePorts(*_port_range())
        self._leases = Leases(bind, self._source_ports, installed.values)
        self._held: dict[UdpDeployment, Lease] = {}
        self._counters = UdpMetrics(metrics, self._running.values)
        self._nursery: trio.Nursery | None = None
        self.descriptors = Descriptors(
            self._leases, running=self._running, installed=installed, log=log
        )

    def start(self, nursery: trio.Nursery) -> None:
        """Let services run in a nursery."""
        self._nursery = nursery

    def close(self) -> None:
        """Let no further service run; those that do go on."""
        self._nursery = None

    def require_nursery(self) -> trio.Nursery:
        """Return where they run.

        Raises:
            ShuttingDownError: the proxy is not running.
        """
        if self._nursery is None:
            raise ShuttingDownError("the proxy is not running")
        return self._nursery

    # Services

    async def get(self, name: str) -> UdpService:
        """Return the service of that name, which runs; a new one serves nobody yet.

        Raises:
            ListenError: it can't be run: there are too few file descriptors.
            ShuttingDownError: the proxy is not running.
        """
        service = self._running.get(name)
        if service is None:
            nursery = self.require_nursery()
            try:
                service = UdpService(
                    name,
                    os.urandom(16),
                    on_drained=self._drained,
                    source_ports=self._source_ports,
                    interrupt=self._interrupt,
                    is_alone=lambda: len(self._running) == 1,
                    has_room=self.descriptors.has_room,
                    log=self._log,
                )
            except OSError as error:
                raise ListenError(
                    f"service {name} can't be run: {reason(error)}; "
                    "raise the limit of open files (ulimit -n)"
                ) from error
            self._running[name] = service
            nursery.start_soon(self._run_service, service)
        await service.wait_started()
        return service

    async def _run_service(self, service: UdpService) -> None:
        try:
            await service.run()
        finally:
            self._leases.close_all(service)
            # Those of its deployments that were not drained by now never will be.
            held = self._held.items()
            self._held = {each: lease for each, lease in held if lease.service is not service}

    @contextlib.asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        """Keep a service while a deploy needs it; one that was never installed ends after that."""
        self._users[name] = self._users.get(name, 0) + 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                if name not in self._installed and name in self._running:
                    await self._end_service(self._running[name])

    async def let_go(self, service: UdpService) -> None:
        """End a service that is not installed any more, unless a deploy of it goes on."""
        if service.name not in self._users:
            await self._end_service(service)
        else:  # that deploy keeps its ports bound
            await self._leases.leave(service)

    async def _end_service(self, service: UdpService) -> None:
        """End a service that is not installed, and free its ports; it is not interrupted."""
        service.end_sessions()
        if service.served:
            self._counters.keep(service)
        del self._running[service.name]
        await self._leases.give_back_all(service)
        service.close()

    # Ports

    @contextlib.asynccontextmanager
    async def leasing(self, service: UdpService, options: UdpOptions) -> AsyncIterator[Lease]:
        """Bind the ports of a deploy, and leave them again unless a deployment has them by then."""
        lease = await self._leases.take(service, options)
        try:
            yield lease
        finally:
            if lease not in self._held.values():
                await self._leases.give_back(lease)

    def hold(self, lease: Lease, deployment: UdpDeployment) -> None:
        """Keep the ports of a lease for a deployment until its drain is over."""
        self._held[deployment] = lease

    async def listen(self, lease: Lease) -> None:
        """Let a service take datagrams from the ports of a lease; it is not interrupted."""
        await self._leases.listen(lease)

    async def listen_installed(self, service: UdpService, *, tell_owner: bool = True) -> None:
        """Bind the ports of a service that is installed, and read from them.

        Args:
            service: The service.
            tell_owner: Whether to look for the owner of a port that is taken.

        Raises:
            PortConflictError: another service has one of the ports.
            ListenError: one of the ports can't be bound.
        """
        assert service.active is not None
        assert service.options is not None
        lease = await self._leases.take(service, service.options, tell_owner=tell_owner)
        self.hold(lease, service.active)
        await self.listen(lease)

    def _drained(self, service: UdpService, deployment: UdpDeployment) -> None:
        """Leave the ports of a deployment that is over, and say how its sessions ended."""
        if (lease := self._held.pop(deployment, None)) is not None:
            self._leases.give_back_soon(lease, self._nursery)
        if deployment.served:
            self._log.info(
                "UDP service drained",
                service=service.name,
                completed=deployment.result.completed,
                cut=deployment.result.cancelled,
                **_goodbyes(deployment),
            )


def _goodbyes(deployment: UdpDeployment) -> dict[str, int]:
    """Return what the log says of goodbyes, which only calls have."""
    if not deployment.carries_calls:
        return {}
    result = deployment.result
    return {"goodbyes": result.goodbyes, "cut_unsaid": result.cut_unsaid}


def _port_range() -> tuple[int, int]:
    """Return the range that the kernel itself takes source ports from (ip(7))."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        low, high = map(int, file.read().split())
    return low, high
