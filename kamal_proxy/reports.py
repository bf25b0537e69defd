"""What is told about a change while it happens: events with the time they came, and why it failed.

Knows what a probe said and what commonly causes that; decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.control.messages import Event
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import DeployFailedError
from kamal_proxy.health import TargetState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kamal_proxy.deployment import Deployment, DrainResult, Target
    from kamal_proxy.health import ProbeResult
    from kamal_proxy.logs import Log

_DRAIN_INTERVAL = 1.0  # seconds


class Report:
    """Tells whoever asked for a change what happens, with the time since it began.

    Args:
        progress: Told each step; must not block. One that raises is told nothing more.
        log: Where that is said.
    """

    def __init__(self, progress: Callable[[Event], None] | None, log: Log) -> None:
        self._progress = progress
        self._log = log
        self._started = trio.current_time()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return round(trio.current_time() - self._started, 6)

    def __call__(self, event: str, *, in_flight: int = 0) -> None:
        """Tell a step."""
        self._tell(Event(event=event, elapsed=self.elapsed, in_flight=in_flight))

    def done(self, result: DrainResult) -> None:
        """Tell how it ended."""
        self._tell(
            Event(
                event="done",
                elapsed=self.elapsed,
                completed=result.completed,
                cancelled=result.cancelled,
            )
        )

    def probe(self, target: Target, result: ProbeResult) -> None:
        """Tell what a probe found."""
        self._tell(
            Event(
                event="probe",
                elapsed=self.elapsed,
                target=target.name,
                ok=result.ok,
                result=result.reason,
            )
        )

    async def tell_draining(self, deployments: Sequence[Deployment]) -> None:
        """Tell again and again what is in flight on deployments that drain, until cancelled."""
        while True:
            self("draining", in_flight=sum(deployment.in_flight for deployment in deployments))
            await trio.sleep(_DRAIN_INTERVAL)

    def _tell(self, event: Event) -> None:
        if self._progress is None:
            return
        try:
            self._progress(event)
        except Exception as error:  # a report must not harm what it reports on
            self._progress = None
            self._log.error("Progress callback failed", error=repr(error))


def not_healthy(deployment: Deployment, deploy_timeout: float) -> DeployFailedError:
    """Return the error that names each target which did not become healthy, and why.

    Args:
        deployment: The new targets.
        deploy_timeout: Seconds that they had.
    """
    return DeployFailedError(
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
