"""Turns what was measured of calls into tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.udp.calls import FEW
from benchmarks.udp.shapes import FEW_IN_FLIGHT, MANY_IN_FLIGHT
from benchmarks.udp.tables import each, empty_table, ratio, spread

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.udp.calls import Calls

MIB = 1024 * 1024


def weight_table(calls: Calls) -> Table:
    """Return what a range of ports weighs, beside one of few ports."""
    weights = (calls.few, calls.many)
    table = empty_table(
        "What a service of calls weighs", "ports", *(f"{one.ports:,}" for one in weights)
    )
    for name, values in (
        ("deploy, with the start of the command", [f"{one.seconds:.2f} s" for one in weights]),
        ("CPU of the proxy for it", [f"{one.cpu:.2f} s" for one in weights]),
        ("memory of the proxy", [f"{one.memory / MIB:.1f} MiB" for one in weights]),
        ("slabs of the kernel", [f"{one.kernel / MIB:.1f} MiB" for one in weights]),
        ("descriptors", [f"{one.descriptors:,}" for one in weights]),
    ):
        table.add_row(name, *values)
    return table


def calls_table(calls: Calls, rounds: int, packets: int) -> Table:
    """Return the CPU time for a datagram of RTP by every way: medians, and ratios to plain UDP."""
    plain, looked, plain_few, looked_few, many = calls.ways
    table = empty_table(
        f"CPU for a relayed RTP datagram, median of {rounds} x {packets:,} there and back\n"
        f"({FEW_IN_FLIGHT} in flight, of many calls {MANY_IN_FLIGHT};"
        f" plain, {FEW}: a service for each port)",
        "calls",
        *(f"{'webrtc' if way.webrtc else 'plain'}\n{len(way.ports):,}\nus" for way in calls.ways),
        "webrtc\n/plain\n1",
        f"webrtc\n/plain\n{FEW}",
        f"{len(many.ports):,}\n/plain\n1",
        "spread %\nof each",
        "lost",
    )
    for shape, turns in calls.turns.items():
        cpu = {way: [turn.cpu for turn in turns[way]] for way in calls.ways}
        table.add_row(
            f"{shape.sessions:,}",
            *(f"{statistics.median(values) * 1e6:.2f}" for values in cpu.values()),
            *(
                ratio(cpu[way], cpu[base])
                for way, base in ((looked, plain), (looked_few, plain_few), (many, plain))
            ),
            each(spread(values) for values in cpu.values()),
            str(sum(turn.packets.lost for of_way in turns.values() for turn in of_way)),
        )
    return table
