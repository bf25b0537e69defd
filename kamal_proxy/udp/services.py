"""The UDP services of one proxy, and every change of them: deploy, remove, pause, stop, resume.

Owns the saved state of UDP services, and which of those that run are installed. As in ``services``
for HTTP, the state is written before a change takes effect, under a lock that is not held while a
drain is waited for. Services run in the nursery that the proxy gives.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import (
    ListenError,
    PortConflictError,
    ServiceNotFoundError,
    ShuttingDownError,
)
from kamal_proxy.reports import Report, not_healthy
from kamal_proxy.state_format import SavedPause
from kamal_proxy.udp.deployment import UdpDeployment
from kamal_proxy.udp.drains import plan_drain
from kamal_proxy.udp.ports import is_own
from kamal_proxy.udp.probe import probe_for
from kamal_proxy.udp.running import RunningServices
from kamal_proxy.udp.session_saving import SessionSaving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kamal_proxy.control.messages import Event, ServiceDescription
    from kamal_proxy.health import ProbeResult
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.options import PauseOptions, StopOptions
    from kamal_proxy.state import StateFile
    from kamal_proxy.udp.options import (
        UdpDeploymentOptions,
        UdpDeployOptions,
        UdpHealthCheckOptions,
        UdpOptions,
    )
    from kamal_proxy.udp.probe import HttpProbe
    from kamal_proxy.udp.saved_sessions import ServiceSessions
    from kamal_proxy.udp.service import UdpService
    from kamal_proxy.udp.session_store import SessionStore
    from kamal_proxy.udp.state_format import SavedUdpService
    from kamal_proxy.udp.target import UdpTarget

_LISTEN_AGAIN = 5.0  # seconds until a port is tried again that was taken at the start
_MAX_LOOKUPS = 20
_UNWIND = 5.0  # seconds; what was cancelled takes no longer, and if it does nobody waits for it


class UdpServices:
    """All UDP services of a proxy.

    Args:
        state: Where they are saved; ``None`` saves nothing.
        sessions: Where their sessions are saved; ``None`` saves none.
        log: Where changes are logged.
        bind: Addresses to listen on; none means all.
        default_port: Port of a service that states none.
        http_probe: Probes a target over HTTP.
        interrupt: A descriptor that is readable when something else than UDP is to be done.
        metrics: Counts probes and deploys, and shows the sessions.
    """

    def __init__(
        self,
        state: StateFile[SavedUdpService] | None,
        sessions: SessionStore | None,
        log: Log,
        *,
        bind: Sequence[str],
        default_port: int,
        http_probe: HttpProbe,
        interrupt: int,
        metrics: Metrics,
    ) -> None:
        self._state = state
        self._log = log
        self._bind = bind
        self._default_port = default_port
        self._http_probe = http_probe
        self._metrics = metrics
        self._commit = trio.Lock()
        # A thread of their own, as the HTTP services' state has one.
        self._saving = trio.CapacityLimiter(1)
        self._lookups = trio.CapacityLimiter(_MAX_LOOKUPS)
        self._installed: dict[str, UdpService] = {}
        self._running = RunningServices(
            self._installed, log, bind=bind, interrupt=interrupt, metrics=metrics
        )
        self._sessions: SessionSaving | None = None
        if sessions is not None:
            self._sessions = SessionSaving(sessions, self._installed, log, thread=self._saving)
        self._pending: set[trio.CancelScope] = set()  # of deploys that have not switched yet

    # Starting and stopping

    def restore(self) -> tuple[SavedUdpService, ...]:
        """Read the saved state; the services serve once :meth:`start` was called with them.

        Raises:
            StateError: the saved state can't be used.
        """
        if self._state is None:
            return ()
        saved = self._state.load()
        if saved is None:
            return ()
        self._log.info("Restored saved state", path=self._state.path)
        return saved

    async def start(self, nursery: trio.Nursery, restored: Sequence[SavedUdpService]) -> None:
        """Start to take changes; services run in ``nursery``, restored ones first."""
        self._running.start(nursery)
        sessions = await self._sessions.load() if restored and self._sessions is not None else {}
        for saved in restored:
            await self._restore_service(saved, sessions)
        if self._sessions is not None:
            nursery.start_soon(self._sessions.run)

    def close(self) -> None:
        """Take no further changes; deploys that have not switched yet fail."""
        self._running.close()
        for pending in self._pending:
            pending.cancel(reason="the proxy stops")

    async def _restore_service(
        self, saved: SavedUdpService, sessions: dict[str, tuple[ServiceSessions, float]]
    ) -> None:
        try:
            service = await self._running.get(saved.name)
        except ListenError as error:
            self._log.error("UDP service not restored", service=saved.name, error=str(error))
            return
        service.extra = saved.extra
        service.hold(saved.pause)
        self._running.descriptors.check(saved.name, saved.options, len(saved.targets))
        deployment = self._new_deployment(service, saved.targets, saved.options, trusted=True)
        service.start(deployment)
        service.install(deployment, saved.options)
        self._installed[saved.name] = service
        try:
            await self._running.listen_installed(service)
        except (ListenError, PortConflictError) as error:
            # A port that is taken must not keep the other services, and HTTP, from serving.
            self._log.error("UDP service can't listen yet", service=saved.name, error=str(error))
            if saved.name in sessions:
                service.waiting_sessions, _ = sessions[saved.name]
            self._running.require_nursery().start_soon(self._listen_later, service, sessions)
        else:
            await self._begin_restored(service, sessions)

    async def _begin_restored(
        self, service: UdpService, sessions: dict[str, tuple[ServiceSessions, float]]
    ) -> None:
        """Go on with the sessions of an earlier process, then with everything else.

        Before the first datagram: its client would get a new session, from a new port.
        """
        if service.name in sessions:
            found, saved_at = sessions[service.name]
            count, lost = await service.restore(found, max(0.0, time.time() - saved_at))
            self._log.info("UDP sessions restored", service=service.name, count=count, lost=lost)
        service.start_moving()

    async def _listen_later(
        self, service: UdpService, sessions: dict[str, tuple[ServiceSessions, float]]
    ) -> None:
        while True:
            await trio.sleep(_LISTEN_AGAIN)
            async with self._commit:
                # It may have been removed, or deployed anew, meanwhile.
                if self._installed.get(service.name) is not service or service.ports:
                    return
                assert service.options is not None
                with contextlib.suppress(ListenError, PortConflictError):
                    await self._running.listen_installed(service, tell_owner=False)
                    fields = _port_fields(service.options)
                    self._log.info("UDP service listens", service=service.name, **fields)
                    await self._begin_restored(service, sessions)
                    return

    # Deploying

    async def deploy(
        self, options: UdpDeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a service: probe its targets, give them all new sessions, drain the old ones.

        Cancelled before the switch, nothing has changed; cancelled after it, the drain goes on.

        Args:
            options: The service and everything about it.
            progress: Told each step as it happens; must not block. One that raises is told
                nothing more.

        Returns:
            How many sessions of the replaced targets ended by themselves, and how many were cut.

        Raises:
            DeployFailedError: the targets did not become healthy in time; nothing has changed.
            PortConflictError: another service has one of the ports.
            ListenError: one of the ports can't be bound.
            InvalidOptionsError: an option has a value that can't be used.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        options.validate()
        udp = options.udp_options
        if not udp.port and udp.protocol == "udp":
            udp = attrs.evolve(udp, port=self._default_port)
        report = Report(progress, self._log)
        self._running.require_nursery()
        fields = {"service": options.service, "targets": options.targets, **_port_fields(udp)}
        self._log.info("Deploying UDP", **fields)
        switched = False
        try:
            replaced = await self._bring_in(options, udp, report)
            switched = True
        finally:
            self._metrics.deploy(options.service, "ok" if switched else "failed", report.elapsed)
        report("switched")
        result = DrainResult()
        if replaced is not None:
            async with trio.open_nursery() as watchers:
                watchers.start_soon(report.tell_draining, lambda: replaced.in_flight)
                result = await replaced.wait_drained()
                watchers.cancel_scope.cancel(reason="drained")
        self._log.info("Deployed UDP", **fields)
        report.done(result)
        return result

    async def _bring_in(
        self, options: UdpDeployOptions, udp: UdpOptions, report: Report
    ) -> UdpDeployment | None:
        """Bind, probe, save and switch; return what was replaced, which drains.

        Whatever comes between, nothing has changed.
        """
        name, deploying = options.service, options.deployment_options
        async with self._running.using(name):
            service = await self._running.get(name)
            service.start_moving()
            async with self._running.leasing(service, udp) as lease:
                self._running.descriptors.check(name, udp, len(options.targets))
                deployment = self._new_deployment(
                    service, options.targets, udp, forced=deploying.force
                )
                deployment.watch.on_probe = report.probe
                service.start(deployment)
                installed = False
                try:
                    with trio.CancelScope() as pending:
                        self._pending.add(pending)
                        await self._wait_healthy(deployment, deploying, report)
                        async with self._commit:
                            entry = service.saved(udp, options.targets, SavedPause())
                            if name in self._installed:
                                entry = attrs.evolve(entry, pause=service.pause)
                            await self._save(attrs.evolve(entry, extra={}))
                            if name not in self._installed:  # also if it was removed meanwhile
                                service.hold(SavedPause())
                            service.extra = {}
                            replaced = service.install(deployment, udp)
                            self._installed[name] = service
                            self._running.hold(lease, deployment)
                            installed = True
                            if replaced is not None:
                                calls = replaced.carries_calls
                                replaced.retire(plan_drain(deploying, has_goodbyes=calls))
                            await self._running.listen(lease)
                finally:
                    self._pending.discard(pending)
                    deployment.watch.on_probe = None
                    if not installed:
                        deployment.retire()
                        await self._ended(deployment)
                if not installed:
                    raise ShuttingDownError("the proxy is shutting down")
        return replaced

    async def _wait_healthy(
        self, deployment: UdpDeployment, options: UdpDeploymentOptions, report: Report
    ) -> None:
        if options.force:
            return
        with trio.move_on_after(options.deploy_timeout) as waiting:
            await deployment.watch.wait_until_healthy()
        if waiting.cancelled_caught:
            raise not_healthy(deployment.targets, options.deploy_timeout)
        report("healthy")

    async def _ended(self, deployment: UdpDeployment) -> None:
        """Wait until a deployment that never served has given back what it had."""
        with trio.move_on_after(_UNWIND, shield=True):
            await deployment.wait_drained()

    # Other changes

    async def remove(self, name: str) -> None:
        """Remove a service: its ports are free again, and its sessions end.

        Raises:
            ServiceNotFoundError: there is no such service.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        self._running.require_nursery()
        async with self._commit:
            service = self._service(name)
            await self._save(removed=name)
            del self._installed[name]
            service.uninstall()
            await self._running.let_go(service)
        self._log.info("UDP service removed", service=name)

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Drop the datagrams of clients without a session; sessions go on.

        Args:
            name: The service.
            options: Times that mean something to HTTP services only.
            progress: Told when it is done.

        Raises:
            ServiceNotFoundError: there is no such service.
            InvalidOptionsError: an option has a value that can't be used.
            StateError: the state could not be saved; nothing has changed.
            ShuttingDownError: the proxy is not running.
        """
        options.validate()
        pause = SavedPause(state="paused", fail_after=options.max_pause)
        return await self._hold(name, pause, progress)

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Drop all datagrams of a service. Arguments, result and errors are those of pause."""
        options.validate()
        pause = SavedPause(state="stopped", stop_message=options.message)
        return await self._hold(name, pause, progress)

    async def resume(self, name: str) -> None:
        """Serve a paused or stopped service again. The errors are those of :meth:`pause`."""
        await self._change_pause(name, SavedPause())
        self._log.info("UDP service resumed", service=name)

    async def _hold(
        self, name: str, pause: SavedPause, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        report = Report(progress, self._log)
        await self._change_pause(name, pause)
        self._log.info(f"UDP service {pause.state}", service=name)
        result = DrainResult()
        report.done(result)
        return result

    async def _change_pause(self, name: str, pause: SavedPause) -> None:
        self._running.require_nursery()
        async with self._commit:
            service = self._service(name)
            assert service.active is not None
            assert service.options is not None
            await self._save(service.saved(service.options, service.active.target_names, pause))
            service.hold(pause)

    # Describing

    def has(self, name: str) -> bool:
        """Whether there is a service of that name."""
        return name in self._installed

    def describe(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""
        return [self._installed[name].describe() for name in sorted(self._installed)]

    # What they have in common

    def _service(self, name: str) -> UdpService:
        service = self._installed.get(name)
        if service is None:
            raise ServiceNotFoundError("service not found")
        return service

    def _new_deployment(
        self,
        service: UdpService,
        targets: Sequence[str],
        options: UdpOptions,
        *,
        trusted: bool = False,
        forced: bool = False,
    ) -> UdpDeployment:
        probe_target = probe_for(options.health_check, lookups=self._lookups, http=self._http_probe)

        async def probe(target: UdpTarget, check: UdpHealthCheckOptions) -> ProbeResult:
            result = await probe_target(target, check)
            self._metrics.probe(service.name, result.ok)
            return result

        return UdpDeployment(
            targets,
            options,
            service.relay,
            probe=probe,
            lookups=self._lookups,
            is_own=lambda address: (
                (address[1] == options.port or options.protocol == "webrtc")
                and is_own(address, self._bind)
            ),
            secret=service.secret,
            log=self._log,
            trusted=trusted,
            forced=forced,
        )

    # Saving

    async def _save(self, entry: SavedUdpService | None = None, removed: str = "") -> None:
        """Save the state with one entry changed, added or removed; the lock is held.

        The write is not abandoned when cancelled, so that file and services never disagree.
        """
        if self._state is None:
            return
        entries = {
            name: service.saved(service.options, service.active.target_names, service.pause)
            for name, service in self._installed.items()
            if service.options is not None and service.active is not None
        }
        if entry is not None:
            entries[entry.name] = entry
        entries.pop(removed, None)
        await trio.to_thread.run_sync(
            self._state.save, list(entries.values()), limiter=self._saving
        )

    def save_sessions(self) -> None:
        """Save the sessions now, blocking: nothing is moved any more, the process ends."""
        if self._sessions is not None:
            self._sessions.save_now()


def _port_fields(options: UdpOptions) -> dict[str, object]:
    """Return where a service listens, for the log."""
    port = {"port": options.port} if options.port else {}
    return port | ({"port_ranges": options.port_ranges} if options.port_ranges else {})
