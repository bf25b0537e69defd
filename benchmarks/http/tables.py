"""What was measured, as tables and as a plot."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import attrs
from rich import box
from rich.table import Table

from benchmarks.http.scenarios import Outcome, Scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benchmarks.http.idle import IdleMemory

#: What others are compared with.
BASES = ("nginx", "caddy")

_BAR = 11  # height of a bar of the plot, in pixels
_LEFT, _WIDTH = 230, 560  # where bars begin, and how long the longest is
_COLOURS = ("#6b7280", "#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#a16207")


@attrs.frozen
class Round:
    """One load on one program.

    Attributes:
        outcome: What the load has brought about.
        cpu: Seconds of CPU that the program used for a unit.
        rss: Bytes of its resident memory right after it.
    """

    outcome: Outcome
    cpu: float
    rss: int


@attrs.frozen
class Measured:
    """All rounds of one scenario on one program."""

    scenario: Scenario
    program: str
    rounds: list[Round]

    @property
    def cpu(self) -> float:
        """Median of the CPU seconds for a unit."""
        return statistics.median(each.cpu for each in self.rounds)

    def median(self, value: Callable[[Outcome], float | None]) -> float | None:
        """Return the median of a number that each outcome has, if all have it."""
        found = [number for each in self.rounds if (number := value(each.outcome)) is not None]
        return statistics.median(found) if len(found) == len(self.rounds) else None


def load_table(measured: Sequence[Measured], title: str) -> Table:
    """Return the table of all loads on all programs."""
    table = _table(title, "load", "program")
    for heading in (
        "CPU us",
        "lowest-\nhighest",
        *(f"times\n{base}" for base in BASES),
        "per s",
        "p50\nms",
        "p99\nms",
        "RSS\nMiB",
        "errors",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in _by_scenario(measured):
        cpu = {each.program: each.cpu for each in group}
        for number, each in enumerate(group):
            costs = [one.cpu * 1e6 for one in each.rounds]
            table.add_row(
                f"{each.scenario.text}, per {each.scenario.unit}" if not number else "",
                each.program,
                f"{each.cpu * 1e6:,.1f}",
                f"{min(costs):,.0f}-{max(costs):,.0f}",
                *(f"{each.cpu / cpu[base]:.2f}" if base in cpu else "" for base in BASES),
                f"{each.median(lambda one: one.per_second) or 0:,.0f}",
                _milliseconds(each.median(lambda one: one.median)),
                _milliseconds(each.median(lambda one: one.p99)),
                f"{each.rounds[-1].rss / 2**20:.0f}",
                f"{sum(one.outcome.errors for one in each.rounds)}",
                end_section=number == len(group) - 1,
            )
    return table


def idle_table(measured: dict[str, IdleMemory], connections: int) -> Table:
    """Return the table of what idle connections cost."""
    table = _table(f"Memory of {connections:,} idle keep-alive connections", "program")
    for heading in ("KiB/connection", "RSS MiB before", "RSS MiB with them", "lost"):
        table.add_column(heading, justify="right")
    for name, memory in measured.items():
        table.add_row(
            name,
            f"{(memory.after - memory.before) / connections / 1024:.1f}",
            f"{memory.before / 2**20:.1f}",
            f"{memory.after / 2**20:.1f}",
            f"{memory.lost}",
        )
    return table


def plot(measured: Sequence[Measured], title: str) -> str:
    """Return an SVG picture of CPU time per unit: bars on a logarithmic axis, a group per load."""
    programs = list(dict.fromkeys(each.program for each in measured))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(programs)}
    costs = [each.cpu * 1e6 for each in measured]
    low = math.floor(math.log10(min(costs)))
    high = math.ceil(math.log10(max(costs)))

    def x(cost: float) -> float:
        return _LEFT + _WIDTH * (math.log10(cost) - low) / max(1, high - low)

    parts, y = [_text(10, 20, title, size=14)], 44.0
    for index, name in enumerate(programs):
        parts.append(_bar(_LEFT + 110 * index, y - 9, 10, colours[name]))
        parts.append(_text(_LEFT + 110 * index + 15, y, name))
    y += 14
    top = y
    for group in _by_scenario(measured):
        middle = y + _BAR * len(group) / 2 + 4
        parts.append(_text(10, middle, f"{group[0].scenario.text}, per {group[0].scenario.unit}"))
        for each in group:
            end = x(each.cpu * 1e6)
            parts.append(_bar(_LEFT, y, end - _LEFT, colours[each.program]))
            parts.append(_text(end + 4, y + _BAR - 2, f"{_short(each.cpu * 1e6)} us", size=9))
            y += _BAR
        y += 8
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.insert(1, f'<path d="M{at:.0f} {top:.0f} V{y:.0f}" stroke="#d1d5db"/>')
        parts.append(_text(at - 10, y + 14, f"{10.0**power:,.15g} us", size=10))
    size = f'width="{_LEFT + _WIDTH + 80}" height="{y + 24:.0f}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _by_scenario(measured: Iterable[Measured]) -> list[list[Measured]]:
    groups: dict[str, list[Measured]] = {}
    for each in measured:
        groups.setdefault(each.scenario.name, []).append(each)
    return list(groups.values())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _short(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.1f}"


def _text(x: float, y: float, text: str, *, size: int = 11) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{max(1.0, width):.0f}" height="{_BAR - 1}"'
        f' fill="{colour}"/>'
    )
