"""Probing targets again and again, and waiting until all of them are healthy.

Owns the tasks that probe, and moves the targets' health. How a target is probed is given to it;
what its health means for what it serves is not decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import trio

from kamal_proxy.health import Health, ProbeResult, TargetState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from kamal_proxy.logs import Log


class Watched(Protocol):
    """A target, as those see it who probe it."""

    @property
    def name(self) -> str:
        """``host:port`` as it was given."""

    @property
    def health(self) -> Health:
        """Its health; it also knows how often to probe."""


class Probed(Protocol):
    """A target, as its probe sees it."""

    @property
    def name(self) -> str:
        """``host:port`` as it was given."""

    @property
    def host(self) -> str:
        """Name or IP address to connect to."""

    @property
    def port(self) -> int:
        """Its own port."""


T = TypeVar("T", bound=Watched)
H = TypeVar("H")


class Watch(Generic[T, H]):
    """The probes of some targets.

    Args:
        targets: What is probed.
        health_check: How they are probed.
        probe: Probes one target; it has its own time limit and never raises.
        log: Where health changes are logged.
        on_result: Called with the target after each of its probes, before its health is moved.

    Attributes:
        on_probe: Told about each probe while somebody waits for health.
    """

    def __init__(
        self,
        targets: Sequence[T],
        health_check: H,
        probe: Callable[[T, H], Awaitable[ProbeResult]],
        log: Log,
        on_result: Callable[[T], None] | None = None,
    ) -> None:
        self._targets = targets
        self._health_check = health_check
        self._probe = probe
        self._log = log
        self._on_result = on_result
        self._probing = trio.CancelScope()
        self._healthy = trio.Event()
        self._stopped = False
        self.on_probe: Callable[[T, ProbeResult], None] | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe all targets until :meth:`stop`; where there are none, return at once."""
        with self._probing:
            async with trio.open_nursery() as nursery:
                for target in self._targets:
                    nursery.start_soon(self._watch, target)
                task_status.started()

    async def wait_until_healthy(self) -> None:
        """Wait until every target has answered a probe."""
        await self._healthy.wait()

    def stop(self) -> None:
        """Probe no more; a result that still comes is ignored."""
        self._stopped = True
        self._probing.cancel(reason="stopped")

    async def _watch(self, target: T) -> None:
        while True:
            started = trio.current_time()
            last = target.health.last
            try:
                result = await self._probe(target, self._health_check)
            except Exception as error:  # a bug must cost one probe, not the proxy
                self._log.error("Probe failed", target=target.name, error=repr(error))
                result = ProbeResult(False, f"internal error: {error!r}", "")
            if self._stopped:
                return
            if self._on_result is not None:
                self._on_result(target)
            was = target.health.record(result)
            if was is not None:
                self._log.info(
                    "Target health updated",
                    target=target.name,
                    state=target.health.state,
                    was=was,
                )
            if not result.ok:
                # Said once, not once a second for as long as a target is down.
                changed = last is None or last.ok or last.reason != result.reason
                say = self._log.info if changed else self._log.debug
                say("Healthcheck failed", url=result.url, error=result.reason)
            if self.on_probe is not None:
                self.on_probe(target, result)
            if all(each.health.state is TargetState.HEALTHY for each in self._targets):
                self._healthy.set()
            await trio.sleep_until(started + target.health.delay())
