"""Turns what was measured into tables."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from benchmarks.udp.shapes import FEW_IN_FLIGHT, MANY_IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.udp.load import Report
    from benchmarks.udp.measuring import Sample, Standing
    from benchmarks.udp.shapes import Shape

KAMAL, NGINX, BARE = "kamal", "nginx", "bare"
BASES = (BARE, NGINX)
ABSENT = "-"


class Results:
    """The samples of all relays at all shapes.

    Attributes:
        relays: Their names in the order of the columns.
        samples: By shape and name, one for each round.
        direct: By shape, the way without a relay, one for each round.
    """

    def __init__(self, relays: Sequence[str], shapes: Sequence[Shape]) -> None:
        self.relays = list(relays)
        self.samples: dict[Shape, dict[str, list[Sample]]] = {
            shape: {name: [] for name in relays} for shape in shapes
        }
        self.direct: dict[Shape, list[Report]] = {shape: [] for shape in shapes}

    def wrong(self) -> int:
        """Return how many answers were not what a session had asked for."""
        return sum(report.wrong for report in self._reports())

    def _reports(self) -> Iterable[Report]:
        for samples in self.samples.values():
            for measured in samples.values():
                for one in measured:
                    yield one.full
                    yield one.lone


def machine() -> str:
    """Return what the figures belong to: processor, cores, kernel, date."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return (
        f"{processor}, {os.cpu_count()} cores, Linux {platform.release()},"
        f" {time.strftime('%Y-%m-%d')}"
    )


def cpu_table(results: Results, rounds: int, requests: int) -> Table:
    """Return the CPU time for a datagram at every shape: medians, ratios, what went missing."""
    title = (
        f"CPU for a relayed datagram, median of {rounds} x {requests:,} requests and answers\n"
        f"({FEW_IN_FLIGHT} in flight, from many sessions {MANY_IN_FLIGHT};"
        f" of each means {', '.join(results.relays)})"
    )
    table = empty_table(title, "bytes", "sessions")
    for heading in (
        *(f"{name}\nus" for name in results.relays),
        *(f"{KAMAL}\n/{base}" for base in BASES),
        "spread %\nof each",
        "lost\nof each",
        "out of order\nof each",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for shape, samples in results.samples.items():
        cpu = {name: [one.cpu for one in all_] for name, all_ in samples.items()}
        table.add_row(
            *_shape_cells(shape),
            *(f"{statistics.median(values) * 1e6:.2f}" for values in cpu.values()),
            *(_ratio(cpu, base) for base in BASES),
            each(spread(values) for values in cpu.values()),
            each(sum(one.full.lost + one.lone.lost for one in all_) for all_ in samples.values()),
            each(
                sum(one.full.out_of_order + one.lone.out_of_order for one in all_)
                for all_ in samples.values()
            ),
        )
    return table


def latency_table(results: Results) -> Table:
    """Return what a relay adds to the way to the echo server and back while it has little to do."""
    table = empty_table(
        "Added latency and CPU for a datagram, one request in flight",
        "bytes",
        "sessions",
        "direct\nus p50  p99",
    )
    for name in results.relays:
        table.add_column(f"{name} adds\nus p50  p99", justify="right", no_wrap=True)
    for name in results.relays:
        table.add_column(f"{name}\nCPU us", justify="right", no_wrap=True)
    for shape, samples in results.samples.items():
        base = _latency(results.direct[shape])
        added = {
            name: [
                through - straight for through, straight in zip(_latency(lone), base, strict=True)
            ]
            for name, lone in ((name, [one.lone for one in all_]) for name, all_ in samples.items())
        }
        table.add_row(
            *_shape_cells(shape),
            _microseconds(base),
            *(_microseconds(values) for values in added.values()),
            *(
                f"{statistics.median(one.lone_cpu for one in all_) * 1e6:.1f}"
                for all_ in samples.values()
            ),
        )
    return table


def standing_table(measured: Standing) -> Table:
    """Return what many sessions cost kamal-proxy, and what a flood does to it."""
    title = f"kamal-proxy with {measured.sessions:,} sessions, which is its limit"
    table = empty_table(title)
    table.add_column()
    table.add_column(justify="right")
    flood = measured.flood
    for name, value in (
        ("memory of the process for a session", f"{measured.bytes_each:,.0f} bytes"),
        ("CPU to open a session", f"{measured.opening * 1e6:.1f} us"),
        ("CPU while all are quiet", f"{measured.quiet * 1e3:.2f} ms in a second"),
        ("CPU while quiet, before there were many", f"{measured.empty * 1e3:.2f} ms in a second"),
        ("flood: datagrams from as many new sources", f"{measured.newcomers:,}"),
        ("flood: newcomers that got an answer", f"{measured.admitted:,}"),
        ("flood: CPU to refuse a newcomer", f"{measured.refusing * 1e6:.1f} us"),
        ("flood: requests of those who talk", f"{flood.answered + flood.lost:,}"),
        ("flood: of these lost", f"{flood.lost:,}"),
        ("flood: of these answered out of order", f"{flood.out_of_order:,}"),
    ):
        table.add_row(name, value)
    return table


def empty_table(title: str, *headings: str) -> Table:
    """Return a table with columns of numbers, or without columns if no headings are given."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=bool(headings),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _shape_cells(shape: Shape) -> list[str]:
    return [f"{shape.payload}", f"{shape.sessions:,}"]


def _ratio(cpu: Mapping[str, list[float]], base: str) -> str:
    """Return kamal-proxy's part of another's time: of each round, as those are not all alike."""
    if KAMAL not in cpu or base not in cpu:
        return ABSENT
    return ratio(cpu[KAMAL], cpu[base])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the median of the ratios of all rounds."""
    return f"{statistics.median(one / base for one, base in zip(ours, theirs, strict=True)):.2f}"


def spread(values: Sequence[float]) -> int:
    """Return how far the lowest and the highest are apart, as a percentage of the median."""
    return round((max(values) - min(values)) / statistics.median(values) * 100)


def _latency(reports: Iterable[Report]) -> tuple[float, float]:
    """Return the median and the 99th percentile in microseconds, each the median of the rounds."""
    pairs = [(report.median * 1e6, report.p99 * 1e6) for report in reports]
    return statistics.median(pair[0] for pair in pairs), statistics.median(
        pair[1] for pair in pairs
    )


def _microseconds(values: Sequence[float]) -> str:
    return " ".join(f"{value:4.0f}" for value in values)


def each(values: Iterable[int]) -> str:
    """Return the values in one cell."""
    return " ".join(str(value) for value in values)
