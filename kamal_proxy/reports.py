"""What is told about a change while it happens: events with the time they came, and why it failed.

Knows what a probe said and what commonly causes that; decides nothing.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from kamal_proxy.control.messages import Event
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import DeployFailedError
from kamal_proxy.health import TargetState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kamal_proxy.health import ProbeResult
    from kamal_proxy.logs import Log
    from kamal_proxy.probing import Watched

_DRAIN_INTERVAL = 1.0  # seconds


class Drained(Protocol):
    """How a drain ended."""

    @property
    def completed(self) -> int:
        """How many requests or sessions ended by themselves."""

    @property
    def cancelled(self) -> int:
        """How many were cut."""

    @property
    def goodbyes(self) -> int:
        """How many sessions' peers were told that they end."""

    @property
    def cut_unsaid(self) -> int:
        """How many SRTP sessions were cut without that."""


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

    def done(self, result: Drained) -> None:
        """Tell how it ended."""
        self._tell(
            Event(
                event="done",
                elapsed=self.elapsed,
                completed=result.completed,
                cancelled=result.cancelled,
                goodbyes=result.goodbyes,
                cut_unsaid=result.cut_unsaid,
            )
        )

    def relay(self, event: Event) -> None:
        """Tell a step of another report, with the time of this one."""
        self._tell(attrs.evolve(event, elapsed=self.elapsed))

    def probe(self, target: Watched, result: ProbeResult) -> None:
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

    async def tell_draining(self, in_flight: Callable[[], int]) -> None:
        """Tell again and again what is in flight while it drains, until cancelled.

        Args:
            in_flight: Counts it.
        """
        while True:
            self("draining", in_flight=in_flight())
            await trio.sleep(_DRAIN_INTERVAL)

    def _tell(self, event: Event) -> None:
        if self._progress is None:
            return
        try:
            self._progress(event)
        except Exception as error:  # a report must not harm what it reports on
            self._progress = None
            self._log.error("Progress callback failed", error=repr(error))


class JointReport:
    """Tells changes that run side by side as one: their counts added up, and no end of any.

    Args:
        report: Tells it, and the end of all of them.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._in_flight: dict[object, int] = {}

    @contextmanager
    def part(self) -> Iterator[Callable[[Event], None]]:
        """Yield what takes the events of one of the changes, while it lasts."""
        part = object()

        def tell(event: Event) -> None:
            if event.event == "done":
                return
            if event.event == "draining":
                first = part not in self._in_flight
                self._in_flight[part] = event.in_flight
                if not first and part is not next(iter(self._in_flight)):
                    return  # the oldest sets the pace, or all would be told twice as often
                event = attrs.evolve(event, in_flight=sum(self._in_flight.values()))
            self._report.relay(event)

        try:
            yield tell
        finally:
            self._in_flight.pop(part, None)


def not_healthy(targets: Iterable[Watched], deploy_timeout: float) -> DeployFailedError:
    """Return the error that names each target which did not become healthy, and why.

    Args:
        targets: The new targets.
        deploy_timeout: Seconds that they had.
    """
    return DeployFailedError(
        "target failed to become healthy within configured timeout "
        f"({format_duration(deploy_timeout)})",
        [
            f"target {target.name}: {_last_probe(target)} (after {format_duration(deploy_timeout)})"
            for target in targets
            if target.health.state is not TargetState.HEALTHY
        ],
    )


def _last_probe(target: Watched) -> str:
    result = target.health.last
    if result is None:
        return "no probe finished; is --deploy-timeout long enough?"
    return f"{result.reason} at {result.url}{_hint(result)}"


def _hint(result: ProbeResult) -> str:
    """Say what commonly causes a failing probe."""
    # Only UDP services are probed like this.
    if result.url.startswith("tcp://") and re.search("refused|no answer", result.reason):
        return (
            "; does the app listen on this TCP port? --health-check-port names another one, "
            "--health-check none checks nothing"
        )
    for sign, hint in (
        ("refused", "is the app running, and listening on this port on all interfaces?"),
        ("can't resolve", "is the container running, in the network of the proxy?"),
        ("status 404", "does the app answer at this path? see --health-check-path"),
        ("status 400", "does the app accept this Host? see --health-check-host"),
        ("status 403", "does the app accept this Host? see --health-check-host"),
        ("status 401", "does the app exempt this path from authentication?"),
        ("no answer", "is the app still starting? see --health-check-timeout"),
    ):
        if sign in result.reason:
            return f"; {hint}"
    return ""
