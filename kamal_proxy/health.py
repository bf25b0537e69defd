"""What probes mean: the result of one, the state of a target, and when to probe next. Pure."""

from __future__ import annotations

import enum

import attrs

FIRST_RETRY = 0.05  # seconds; doubled up to the interval until a target first answers


class TargetState(enum.StrEnum):
    """Health of a target, in the words of the log."""

    ADDING = "adding"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


@attrs.frozen
class ProbeResult:
    """Outcome of one probe.

    Attributes:
        ok: Whether the target is healthy.
        reason: What was found, in words: ``status 200``, ``connection refused`` ...
        url: What was asked for.
    """

    ok: bool
    reason: str
    url: str


@attrs.define(eq=False)
class Health:
    """State of one target, moved by probe results.

    Attributes:
        state: The state.
        interval: Seconds between probes.
        last: The last probe's result.
    """

    interval: float
    state: TargetState = TargetState.ADDING
    last: ProbeResult | None = None
    _retry: float = FIRST_RETRY

    def record(self, result: ProbeResult) -> TargetState | None:
        """Take a result; return the previous state if it changed."""
        self.last = result
        before = self.state
        if result.ok:
            self.state = TargetState.HEALTHY
        elif before is TargetState.HEALTHY:
            self.state = TargetState.UNHEALTHY
        return before if before is not self.state else None

    def delay(self) -> float:
        """Return the seconds until the next probe."""
        if self.state is not TargetState.ADDING:
            return self.interval
        delay = min(self._retry, self.interval)
        self._retry *= 2
        return delay
