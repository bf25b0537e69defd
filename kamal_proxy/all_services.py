"""HTTP and UDP services behind one face, because a name may have both.

What only one kind can do goes to that kind. What both can do is done to every kind that has the
name, side by side; whoever asked is told one story, and if that has two ends, both of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import KamalProxyError, ResumedError, ServiceNotFoundError
from kamal_proxy.reports import JointReport, Report

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from kamal_proxy.control.messages import Event, ServiceDescription
    from kamal_proxy.logs import Log
    from kamal_proxy.options import (
        DeployOptions,
        PauseOptions,
        RolloutOptions,
        RolloutSplit,
        StopOptions,
    )
    from kamal_proxy.udp.options import UdpDeployOptions

R = TypeVar("R")


class Kind(Protocol):
    """All services of one kind, as far as both kinds are alike.

    What the methods raise is told in ``services.Services``, which is one.
    """

    def has(self, name: str) -> bool:
        """Whether there is a service of that name."""

    async def remove(self, name: str) -> None:
        """Remove a service."""

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        """Pause a service and wait until what was in flight has ended."""

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        """Stop a service and wait until what was in flight has ended."""

    async def resume(self, name: str) -> None:
        """End the pause or stop of a service."""

    def describe(self) -> list[ServiceDescription]:
        """Describe all services."""

    def close(self) -> None:
        """Take no further changes; deploys that have not switched yet fail."""


class HttpKind(Kind, Protocol):
    """The HTTP services."""

    async def deploy(
        self, options: DeployOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        """Deploy a service."""

    async def deploy_rollout(
        self, name: str, options: RolloutOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        """Deploy the rollout targets of a service."""

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        """Choose which clients the rollout targets serve."""

    async def stop_rollout(self, name: str) -> None:
        """Serve all clients from the service's own targets."""


class UdpKind(Kind, Protocol):
    """The UDP services."""

    async def deploy(
        self, options: UdpDeployOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        """Deploy a service."""


class AllServices:
    """All services of a proxy.

    Args:
        http: The HTTP services.
        udp: The UDP services.
        log: Where is said what nobody can be told any more.
    """

    def __init__(self, http: HttpKind, udp: UdpKind, log: Log) -> None:
        self._http = http
        self._udp = udp
        self._log = log

    def close(self) -> None:
        """Take no further changes; deploys that have not switched yet fail."""
        self._http.close()
        self._udp.close()

    # What one kind can do

    async def deploy(
        self, options: DeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy an HTTP service; see :meth:`kamal_proxy.services.Services.deploy`."""
        return await self._http.deploy(options, progress)

    async def deploy_udp(
        self, options: UdpDeployOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy a UDP service; see ``UdpServices.deploy``."""
        return await self._udp.deploy(options, progress)

    async def deploy_rollout(
        self, name: str, options: RolloutOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Deploy rollout targets; see :meth:`kamal_proxy.services.Services.deploy_rollout`."""
        return await self._http.deploy_rollout(name, options, progress)

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        """Choose whom they serve; see :meth:`kamal_proxy.services.Services.set_rollout`."""
        await self._http.set_rollout(name, split)

    async def stop_rollout(self, name: str) -> None:
        """Let them serve nobody; see :meth:`kamal_proxy.services.Services.stop_rollout`."""
        await self._http.stop_rollout(name)

    # What both can do

    async def remove(self, name: str) -> None:
        """Take the services of a name out of use at once; what is in flight ends by itself.

        Raises:
            ServiceNotFoundError: there is none.
            KamalProxyError: what one kind raised; if the other kind was removed, it says so.
        """
        await self._each(name, "removed", lambda kind: kind.remove(name))

    async def resume(self, name: str) -> None:
        """Serve the paused or stopped services of a name again.

        Raises:
            ServiceNotFoundError: there is none.
            KamalProxyError: what one kind raised; if the other kind was resumed, it says so.
        """
        await self._each(name, "resumed", lambda kind: kind.resume(name))

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Pause the services of a name, and wait until what was in flight has ended.

        If one kind fails, the other is paused all the same.

        Args:
            name: The service.
            options: For how long.
            progress: Told each step of both kinds as one change, with their counts added up; see
                :meth:`kamal_proxy.services.Services.deploy`.

        Returns:
            How the drains ended, added up.

        Raises:
            ServiceNotFoundError: there is none.
            ResumedError: they were resumed before the drains were over.
            KamalProxyError: what one kind raised; if the other kind was paused, it says so.
        """

        def pause(kind: Kind, tell: Callable[[Event], None] | None) -> Awaitable[DrainResult]:
            return kind.pause(name, options, tell)

        return await self._hold(name, "paused", pause, progress)

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None = None
    ) -> DrainResult:
        """Stop the services of a name, and wait until what was in flight has ended.

        Arguments, result and errors are those of :meth:`pause`.
        """

        def stop(kind: Kind, tell: Callable[[Event], None] | None) -> Awaitable[DrainResult]:
            return kind.stop_service(name, options, tell)

        return await self._hold(name, "stopped", stop, progress)

    def describe(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name; of one name, HTTP comes first."""
        both = [*self._http.describe(), *self._udp.describe()]
        return sorted(both, key=lambda service: service.name)

    async def _hold(
        self,
        name: str,
        done: str,
        hold: Callable[[Kind, Callable[[Event], None] | None], Awaitable[DrainResult]],
        progress: Callable[[Event], None] | None,
    ) -> DrainResult:
        """Pause or stop all kinds of a name, telling it as one change."""
        kinds = self._kinds(name)
        if len(kinds) == 1:
            (only,) = kinds.values()
            return await hold(only, progress)
        report = Report(progress, self._log)
        joint = JointReport(report)

        async def hold_one(kind: Kind) -> DrainResult:
            with joint.part() as tell:
                return await hold(kind, tell)

        result = sum(await self._side_by_side(name, done, kinds, hold_one), DrainResult())
        report.done(result)
        return result

    async def _each(self, name: str, done: str, change: Callable[[Kind], Awaitable[None]]) -> None:
        await self._side_by_side(name, done, self._kinds(name), change)

    def _kinds(self, name: str) -> dict[str, Kind]:
        """Return the kinds that have a name, by what they are called in sentences.

        When none has it, the first one does: it knows what to say then.
        """
        kinds: dict[str, Kind] = {"HTTP": self._http, "UDP": self._udp}
        having = {called: kind for called, kind in kinds.items() if kind.has(name)}
        return having or {"HTTP": self._http}

    async def _side_by_side(
        self,
        name: str,
        done: str,
        kinds: Mapping[str, Kind],
        change: Callable[[Kind], Awaitable[R]],
    ) -> Sequence[R]:
        """Change some kinds at the same time; none is cancelled because another one failed.

        Args:
            name: The service.
            done: What it is after the change, for error sentences.
            kinds: Who is changed.
            change: Changes one.
        """
        if len(kinds) == 1:
            (only,) = kinds.values()
            return [await change(only)]
        results: dict[str, R] = {}
        errors: dict[str, Exception] = {}

        async def run(called: str, kind: Kind) -> None:
            try:
                results[called] = await change(kind)
            except Exception as error:
                errors[called] = error

        try:
            async with trio.open_nursery() as nursery:
                for called, kind in kinds.items():
                    nursery.start_soon(run, called, kind)
        except BaseException:
            # Cancelled: this is no longer told to whoever asked for it.
            for called, error in errors.items():
                self._log.error(f"{called} service not {done}", service=name, error=repr(error))
            raise
        gone = [
            called for called, error in errors.items() if isinstance(error, ServiceNotFoundError)
        ]
        if len(gone) < len(kinds):
            for called in gone:  # removed since it was looked for: then it has not the name
                del errors[called]
        if errors:
            in_order = {called: errors[called] for called in kinds if called in errors}
            raise _together(name, done, results, in_order)
        return list(results.values())


def _together(
    name: str, done: str, results: Mapping[str, object], errors: Mapping[str, Exception]
) -> Exception:
    """Return the one error that says what became of each kind.

    Args:
        name: The service.
        done: What it should be now.
        results: What the kinds returned that are.
        errors: What those raised that are not.
    """
    first, *others = errors.values()
    if all(isinstance(error, ResumedError) for error in errors.values()):
        return first  # a resume concerns both kinds, so nothing is held any more
    if not results and all((type(e), str(e)) == (type(first), str(first)) for e in others):
        return first
    texts = {
        called: str(error) if isinstance(error, KamalProxyError) else repr(error)
        for called, error in errors.items()
    }
    if results:
        ((changed,), ((failed, text),)) = results, texts.items()
        message = f"service {name} is {done} for {changed}, but not for {failed}: {text}"
    else:
        why = "; ".join(f"{called}: {text}" for called, text in texts.items())
        message = f"service {name} is not {done}: {why}"
    details = [
        f"{called}: {result.completed} finished, {result.cancelled} cut off"
        for called, result in results.items()
        if isinstance(result, DrainResult) and result != DrainResult()
    ]
    # A bug weighs most, and that it was resumed least.
    worst = min(
        errors.values(),
        key=lambda error: (isinstance(error, KamalProxyError), isinstance(error, ResumedError)),
    )
    together: Exception
    if isinstance(worst, KamalProxyError):
        for error in errors.values():
            details += error.details if isinstance(error, KamalProxyError) else ()
        together = type(worst)(message, details)
    else:
        together = RuntimeError("; ".join([message, *details]))
    together.__cause__ = worst
    return together
