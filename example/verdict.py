"""Judges a recorded load: failures, answers from an instance that should not have given them.

Pure: takes the records of load.py and the times of the deploys, all on the machine's monotonic
clock, and returns numbers. An instance may answer from the moment its deploy began until the
moment the deploy that replaced it returned; after that it is killed.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from example.load import Request


@attrs.frozen
class Deploy:
    """One deploy of one instance.

    Attributes:
        instance: The instance that was deployed.
        began: When the deploy command was started, seconds.
        returned: When it had returned, seconds.
    """

    instance: str
    began: float
    returned: float


@attrs.frozen
class Switch:
    """What the clients saw of one switch from an instance to the next.

    Attributes:
        old: The instance that was replaced.
        new: The instance that replaced it.
        moment: When the first answer of the new instance arrived; None if there was none.
        crossing: Requests of the old instance that were running then.
    """

    old: str
    new: str
    moment: float | None
    crossing: int


@attrs.frozen
class Verdict:
    """The numbers. Times are seconds; they leave out the requests that asked to be slow.

    Attributes:
        requests: All requests.
        failures: Those with no complete answer of status 200.
        wrong: Those answered by an instance that was not allowed to.
        slow_requests: Those that asked the application to take its time.
        connections: TCP connections that the clients opened.
        median: Half of the requests were at least as fast.
        p99: 99 of 100 requests were at least as fast.
        slowest: The slowest one.
        slowest_switching: The slowest that overlapped a deploy which replaced an instance.
        switches: One for each deploy but the first.
    """

    requests: int
    failures: int
    wrong: int
    slow_requests: int
    connections: int
    median: float
    p99: float
    slowest: float
    slowest_switching: float
    switches: tuple[Switch, ...]

    @property
    def clean(self) -> bool:
        """Whether there was load, nothing went wrong, and every switch was seen to happen."""
        seen = all(switch.moment is not None for switch in self.switches)
        return self.requests > 0 and not self.failures and not self.wrong and seen


def judge(requests: Sequence[Request], deploys: Sequence[Deploy]) -> Verdict:
    """Return the verdict on a load that ran while ``deploys``, in order, took place."""
    allowed = serving_windows(deploys)
    quick = sorted(r.ended - r.began for r in requests if not r.slow)
    replacing = [(d.began, d.returned) for d in deploys[1:]]
    switching = [
        r.ended - r.began
        for r in requests
        if not r.slow and any(_overlap(r, began, until) for began, until in replacing)
    ]
    return Verdict(
        requests=len(requests),
        failures=sum(1 for r in requests if r.error),
        wrong=sum(1 for r in requests if not r.error and is_wrong(r, allowed)),
        slow_requests=sum(1 for r in requests if r.slow),
        connections=len({r.connection for r in requests}),
        median=percentile(quick, 50),
        p99=percentile(quick, 99),
        slowest=quick[-1] if quick else math.nan,
        slowest_switching=max(switching, default=math.nan),
        switches=tuple(
            seen_switch(requests, old.instance, new.instance) for old, new in pairwise(deploys)
        ),
    )


def serving_windows(deploys: Sequence[Deploy]) -> dict[str, tuple[float, float]]:
    """Return, by instance, from when until when it may answer."""
    ends = [d.returned for d in deploys[1:]] + [math.inf]
    return {d.instance: (d.began, end) for d, end in zip(deploys, ends, strict=False)}


def is_wrong(request: Request, allowed: dict[str, tuple[float, float]]) -> bool:
    """Tell whether no part of the request fell into the time its instance was allowed to serve."""
    window = allowed.get(request.instance)
    return window is None or not _overlap(request, *window)


def seen_switch(requests: Iterable[Request], old: str, new: str) -> Switch:
    """Return what the clients saw of the switch from ``old`` to ``new``."""
    mine = [r for r in requests if r.instance in (old, new)]
    moment = min((r.ended for r in mine if r.instance == new), default=None)
    if moment is None:
        return Switch(old, new, None, 0)
    crossing = sum(1 for r in mine if r.instance == old and r.began < moment < r.ended)
    return Switch(old, new, moment, crossing)


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted values; not a number if there are none."""
    if not ascending:
        return math.nan
    rank = math.ceil(len(ascending) * percent / 100)
    return ascending[max(rank, 1) - 1]


def _overlap(request: Request, began: float, until: float) -> bool:
    return request.began <= until and request.ended >= began
