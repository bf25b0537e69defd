"""Measures what metrics cost: each call that requests make, and rendering them for a scrape.

Run as ``python -m benchmarks.metrics_cost``. Figures are of the fastest of several rounds.
"""

from __future__ import annotations

import time
import timeit
from typing import TYPE_CHECKING

from kamal_proxy.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

SERVICES = 50
METHODS = (b"GET", b"POST")
STATUSES = (200, 302, 404, 422, 500)
FORMATS = {
    "text": "text/plain;version=0.0.4",
    "OpenMetrics": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8",
}
CALLS = 200_000
ROUNDS = 5


def main() -> None:
    calls = calls_of(Metrics())
    for name, call in calls.items():
        print(f"{name:32}{nanoseconds(call):8.0f} ns")
    metrics = filled()
    for name, accept in FORMATS.items():
        total, longest, size = min(scrape(metrics, accept) for _ in range(ROUNDS))
        print(
            f"scrape, {SERVICES} services, {name:12}{total * 1e3:8.1f} ms "
            f"(longest part {longest * 1e3:.1f} ms, {size / 1024:.0f} KiB)"
        )


def calls_of(metrics: Metrics) -> dict[str, Callable[[], object]]:
    """Return what is measured by name."""

    def whole_request() -> None:
        metrics.enter("web")
        metrics.reuse("web")
        metrics.request("web", b"GET", 200, 0.03)
        metrics.leave("web")

    return {
        "enter": lambda: metrics.enter("web"),
        "leave": lambda: metrics.leave("web"),
        "request": lambda: metrics.request("web", b"GET", 200, 0.03),
        "reuse": lambda: metrics.reuse("web"),
        "connect": lambda: metrics.connect("web", True),
        "failure": lambda: metrics.failure("web", "target refused"),
        "all of a request": whole_request,
    }


def nanoseconds(call: Callable[[], object]) -> float:
    """Return what a call costs, without the call of the function around it."""

    def nothing() -> None:
        pass

    empty, full = (min(timeit.repeat(f, number=CALLS, repeat=ROUNDS)) for f in (nothing, call))
    return (full - empty) / CALLS * 1e9


def filled() -> Metrics:
    """Return the metrics of a busy proxy."""
    metrics = Metrics()
    for number in range(SERVICES):
        service = f"service-{number}"
        metrics.enter(service)
        metrics.connect(service, True)
        metrics.reuse(service)
        metrics.probe(service, True)
        metrics.deploy(service, "ok", 3.0)
        for method in METHODS:
            for status in STATUSES:
                metrics.request(service, method, status, 0.03)
    return metrics


def scrape(metrics: Metrics, accept: str) -> tuple[float, float, int]:
    """Return the seconds of a scrape and of its longest part, and the size in bytes."""
    began = time.perf_counter()
    _, parts = metrics.render_parts(accept)
    size, longest, last = 0, 0.0, began
    for part in parts:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        size += len(part)
    return time.perf_counter() - began, longest, size


if __name__ == "__main__":
    main()
