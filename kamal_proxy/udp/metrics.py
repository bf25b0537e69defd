"""What metrics show of UDP services: the counters of their relays, read when somebody asks.

Counts nothing itself. What a service counted until it was removed is kept, because a counter that
vanishes would lose what was not yet read.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from kamal_proxy.health import TargetState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kamal_proxy.metrics import Metrics
    from kamal_proxy.udp.service import UdpService

# A series: the kind of counter, the service, and the value of the other label, if there is one.
_Series: TypeAlias = tuple[str, ...]
_Rows: TypeAlias = list[tuple[tuple[str, ...], int]]

# Kind of counter -> metric, its help, its label beside the service.
_COUNTERS = {
    "created": ("sessions_created_total", "Sessions that have begun.", ()),
    "ended": ("sessions_ended_total", "Sessions that have ended, by reason.", ("reason",)),
    "moved": (
        "sessions_moved_total",
        "Sessions that went to another target because theirs refused them.",
        (),
    ),
    "goodbyes": (
        "goodbyes_total",
        "Calls whose peers were told, by RTCP, that they end, because their target was replaced.",
        (),
    ),
    "cut_unsaid": (
        "cut_unsaid_total",
        "SRTP calls that were cut without that, because only their peers have the keys.",
        (),
    ),
    "datagrams": ("datagrams_total", "Datagrams that were sent on.", ("direction",)),
    "bytes": ("bytes_total", "Bytes of the datagrams that were sent on.", ("direction",)),
    "dropped": (
        "dropped_datagrams_total",
        "Datagrams that were not sent on, by reason.",
        ("reason",),
    ),
    "kernel_drops": (
        "kernel_dropped_datagrams_total",
        "Datagrams that the kernel dropped because a listener's buffer was full.",
        (),
    ),
}


class UdpMetrics:
    """Shows what UDP services count.

    Args:
        metrics: Where to show it.
        services: Returns the services there are.
    """

    def __init__(self, metrics: Metrics, services: Callable[[], Iterable[UdpService]]) -> None:
        self._services = services
        self._kept: Counter[_Series] = Counter()
        metrics.table(
            "kamal_proxy_udp_sessions",
            "Sessions that are live now.",
            ("service", "state"),
            self._sessions,
            falls=True,
        )
        metrics.table(
            "kamal_proxy_udp_target_healthy",
            "Whether an active target answered its last health check.",
            ("service", "target"),
            self._health,
            falls=True,
        )
        for kind, (name, text, labels) in _COUNTERS.items():
            metrics.table(
                f"kamal_proxy_udp_{name}",
                text,
                ("service", *labels),
                partial(self._counters, kind),
            )

    def keep(self, service: UdpService) -> None:
        """Keep the counters of a service that is about to end."""
        self._kept.update(dict(_read(service)))

    def _counters(self, kind: str) -> _Rows:
        totals = self._kept.copy()
        for service in self._serving():
            totals.update(dict(_read(service)))
        return [(series[1:], count) for series, count in totals.items() if series[0] == kind]

    def _serving(self) -> Iterator[UdpService]:
        return (service for service in self._services() if service.served)

    def _sessions(self) -> _Rows:
        rows: _Rows = []
        for service in self._serving():
            active = service.active.in_flight if service.active is not None else 0
            rows.append(((service.name, "active"), active))
            rows.append(((service.name, "draining"), service.relay.live - active))
        return rows

    def _health(self) -> _Rows:
        return [
            ((service.name, target.text), int(target.health.state is TargetState.HEALTHY))
            for service in self._serving()
            if service.active is not None
            for target in service.active.targets
        ]


def _read(service: UdpService) -> Iterator[tuple[_Series, int]]:
    """Yield the counters of a service; reasons that never occurred are left out."""
    counters, name = service.relay.counters(), service.name
    for kind in ("created", "moved", "kernel_drops"):
        yield (kind, name), counters[kind]
    yield ("goodbyes", name), service.drained.goodbyes
    yield ("cut_unsaid", name), service.drained.cut_unsaid
    for kind in ("ended", "dropped"):
        for reason, count in counters[kind].items():
            if count:
                yield (kind, name, reason), count
    for kind in ("datagrams", "bytes"):
        yield (kind, name, "to_target"), counters[f"{kind}_in"]
        yield (kind, name, "to_client"), counters[f"{kind}_out"]
