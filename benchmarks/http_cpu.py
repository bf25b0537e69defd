"""CPU time per small keep-alive request, and memory per idle connection, beside nginx.

All programs run at once on one machine against one target; rounds alternate between them, so
that what disturbs the machine disturbs all. What counts is CPU time and the ratio in one run:
absolute numbers differ from machine to machine, and requests a second depend on what wrk and the
target leave of the cores.

    python3 -m benchmarks.http_cpu --other 'name=/path/to/kamal-proxy'
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import contenders, wrk
from benchmarks.idle import IdleMemory, measure_idle, raise_descriptor_limit
from benchmarks.processes import BenchmarkError, Running, need

if TYPE_CHECKING:
    from collections.abc import Sequence

BASE = "nginx"


@attrs.frozen
class Round:
    """One run of wrk on one program.

    Attributes:
        load: What wrk reports.
        cpu: Seconds of CPU that the program used for a request.
        rss: Bytes of resident memory right after it.
    """

    load: wrk.Load
    cpu: float
    rss: int


def measure_round(program: Running, seconds: int, connections: int) -> Round:
    before = program.cpu_seconds()
    load = wrk.run(program.port, seconds, connections)
    used = program.cpu_seconds() - before
    rss = program.rss_bytes()
    os.truncate(program.log, 0)
    return Round(load, used / load.requests, rss)


def cpu_table(rounds: dict[str, list[Round]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("program", no_wrap=True)
    for heading in (
        "CPU us\nper GET",
        "lowest-\nhighest",
        "times\nnginx",
        "GETs\nper s",
        "p50\nms",
        "p99\nms",
        "RSS\nMiB",
        "errors",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    base = statistics.median(one.cpu for one in rounds[BASE])
    for name, measured in rounds.items():
        cpu = [one.cpu * 1e6 for one in measured]
        loads = [one.load for one in measured]
        table.add_row(
            name,
            f"{statistics.median(cpu):.1f}",
            f"{min(cpu):.1f}-{max(cpu):.1f}",
            f"{statistics.median(cpu) / (base * 1e6):.2f}",
            f"{statistics.median(load.per_second for load in loads):,.0f}",
            f"{statistics.median(load.median for load in loads) * 1e3:.2f}",
            f"{statistics.median(load.p99 for load in loads) * 1e3:.2f}",
            f"{measured[-1].rss / 2**20:.1f}",
            f"{sum(load.errors for load in loads)}",
        )
    return table


def idle_table(measured: dict[str, IdleMemory], connections: int) -> Table:
    table = Table(
        title=f"Memory of {connections:,} idle keep-alive connections",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("program")
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


def other_program(text: str) -> tuple[str, list[str]]:
    """Read ``name=command``; the type of an option."""
    name, separator, command = text.partition("=")
    if not (name.isidentifier() and separator and command.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not name=command")
    return name, shlex.split(command)


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU per request and memory beside nginx.")
    add = parser.add_argument
    installed = Path(sys.executable).with_name("kamal-proxy")
    add("--proxy", default=str(installed), help="the kamal-proxy command (%(default)s)")
    add("--seconds", type=int, default=5, help="of each round (%(default)s)")
    add("--connections", type=int, default=64, help="keep-alive clients (%(default)s)")
    add("--rounds", type=int, default=5, help="for each program (%(default)s)")
    add("--payload", type=int, default=13, help="bytes of each answer's body (%(default)s)")
    add("--idle-connections", type=int, default=2000, help="0 leaves that part out (%(default)s)")
    add(
        "--other",
        type=other_program,
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more program with kamal-proxy's command line; repeatable",
    )
    add("--smoke", action="store_true", help="one round of 2 s, 200 idle connections: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        options.seconds, options.rounds, options.idle_connections = 2, 1, 200
    return options


def benchmark(options: argparse.Namespace, folder: Path, console: Console) -> bool:
    """Run it and print the tables; tell whether there were no errors."""
    with ExitStack() as stack:
        target = stack.enter_context(contenders.upstream(folder / "upstream", options.payload))
        programs = [stack.enter_context(contenders.nginx(folder / BASE, target.port))]
        for name, command in [("kamal_proxy", shlex.split(options.proxy)), *options.other]:
            started = contenders.kamal_proxy(name, command, folder / name, target.port)
            programs.append(stack.enter_context(started))
        for program in programs:
            measure_round(program, 1, options.connections)
        rounds: dict[str, list[Round]] = {program.name: [] for program in programs}
        for number in range(options.rounds):
            for program in programs:
                one = measure_round(program, options.seconds, options.connections)
                rounds[program.name].append(one)
                console.print(
                    f"round {number + 1}/{options.rounds}  {program.name:12}"
                    f"  {one.cpu * 1e6:6.1f} us CPU per GET  {one.load.per_second:8,.0f} GETs/s",
                    highlight=False,
                )
        idle = {}
        if options.idle_connections:
            for program in programs:
                idle[program.name] = measure_idle(
                    program, options.idle_connections, beside=max(options.connections, 100)
                )
    title = (
        f"GETs of {options.payload} bytes, {options.connections} connections,"
        f" median of {options.rounds} x {options.seconds} s, {os.cpu_count()} cores"
    )
    console.print(cpu_table(rounds, title))
    if idle:
        console.print(idle_table(idle, options.idle_connections))
    errors = sum(one.load.errors for measured in rounds.values() for one in measured)
    return not errors and not any(memory.lost for memory in idle.values())


def main(argv: Sequence[str] | None = None) -> int:
    options = options_from(argv)
    # So that the programs it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        need("wrk", "wrk")
        need("nginx", "nginx")
        raise_descriptor_limit(options.idle_connections + options.connections)
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-bench-") as folder:
            clean = benchmark(options, Path(folder), Console())
    except BenchmarkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
