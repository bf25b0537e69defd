"""CPU time per request of HTTP proxies beside each other, their latency, and their memory.

All programs run at once on one machine against one target; rounds alternate between them, so
that what disturbs the machine disturbs all. What counts is CPU time and the ratio in one run:
absolute numbers differ from machine to machine, and requests a second depend on what the load and
the target leave of the cores.

    python3 -m benchmarks.http --only get,handshake --without caddy
    python3 -m benchmarks.http --other 'original=/path/to/kamal-proxy' --plot plot.svg
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.http import contenders, sockets
from benchmarks.http.idle import IdleMemory, measure_idle, raise_descriptor_limit
from benchmarks.http.scenarios import SCENARIOS, Scenario
from benchmarks.http.tables import Measured, Round, idle_table, load_table, plot
from benchmarks.processes import BenchmarkError, Running

if TYPE_CHECKING:
    from collections.abc import Sequence

OURS = "kamal_proxy"
IDLE = "idle"
_WIDTH = 130  # columns of a table that no terminal shows
BARE = "bare"
PROGRAMS = ("nginx", "haproxy", "caddy", BARE, OURS)


def measure(scenario: Scenario, program: Running, seconds: int) -> Round:
    """Put one load on one program."""
    before = program.cpu_seconds()
    outcome = scenario.run(program, seconds)
    used = program.cpu_seconds() - (before if outcome.began is None else outcome.began)
    rss = program.rss_bytes()
    os.truncate(program.log, 0)
    return Round(outcome, used / outcome.units, rss)


def names(known: Sequence[str], text: str) -> list[str]:
    """Read a list of names; the type of an option."""
    found = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(found) - set(known)):
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}, but {', '.join(known)}")
    return found


def other_program(text: str) -> tuple[str, list[str]]:
    """Read ``name=command``; the type of an option."""
    name, separator, command = text.partition("=")
    if not (name.isidentifier() and separator and command.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not name=command")
    return name, shlex.split(command)


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU per request and memory of HTTP proxies.")
    add = parser.add_argument
    installed = Path(sys.executable).with_name("kamal-proxy")
    loads = [each.name for each in SCENARIOS] + [IDLE]
    add("--proxy", default=str(installed), help="the kamal-proxy command (%(default)s)")
    add("--only", type=partial(names, loads), default=loads, metavar="LOAD,...")
    add("--without", type=partial(names, PROGRAMS), default=[], metavar="PROGRAM,...")
    add("--seconds", type=int, default=4, help="of each round (%(default)s)")
    add("--rounds", type=int, default=5, help="for each program and load (%(default)s)")
    add("--key", choices=("ec", "rsa"), default="ec", help="of the certificate (%(default)s)")
    add("--idle-connections", type=int, default=5000, help="for that load (%(default)s)")
    add("--plot", type=Path, metavar="FILE.svg", help="draw what was measured")
    add(
        "--other",
        type=other_program,
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more program with kamal-proxy's command line; repeatable",
    )
    add("--smoke", action="store_true", help="one round of 1 s, 200 idle connections: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        options.seconds, options.rounds, options.idle_connections = 1, 1, 200
    return options


def start(options: argparse.Namespace, folder: Path, stack: ExitStack) -> list[Running]:
    """Start the targets and all programs."""
    target = stack.enter_context(contenders.upstream(folder / "upstream"))
    echo = stack.enter_context(sockets.target(folder))
    site = contenders.Site(target.port, echo.port, *contenders.certificate(folder, options.key))
    known: dict[str, Any] = {
        "nginx": contenders.nginx,
        "haproxy": contenders.haproxy,
        "caddy": contenders.caddy,
        BARE: contenders.bare,
    }
    for name, command in [(OURS, shlex.split(options.proxy)), *options.other]:
        known[name] = partial(contenders.kamal_proxy, name, command)
    return [
        stack.enter_context(begin(folder / name, site))
        for name, begin in known.items()
        if name not in options.without
    ]


def benchmark(options: argparse.Namespace, folder: Path, console: Console) -> bool:
    """Run it, print the tables, draw the plot; tell whether there were no errors."""
    measured: list[Measured] = []
    idle: dict[str, IdleMemory] = {}
    with ExitStack() as stack:
        programs = start(options, folder, stack)
        if IDLE in options.only:  # first, so that no memory that loads have left is used again
            for program in programs:
                if program.name == BARE:
                    continue
                idle[program.name] = measure_idle(program, options.idle_connections, beside=100)
        for scenario in SCENARIOS:
            if scenario.name not in options.only:
                continue
            able = [each for each in programs if scenario.is_bare or each.name != BARE]
            found = [Measured(scenario, program.name, []) for program in able]
            for number in range(options.rounds):
                for program, each in zip(able, found, strict=True):
                    one = measure(scenario, program, options.seconds)
                    each.rounds.append(one)
                    console.print(
                        f"{scenario.name:10} round {number + 1}/{options.rounds}"
                        f"  {program.name:12} {one.cpu * 1e6:9,.1f} us CPU per {scenario.unit}"
                        f"  {one.outcome.per_second:9,.0f} per s",
                        highlight=False,
                        soft_wrap=True,
                    )
            measured += found
    title = (
        f"median of {options.rounds} x {options.seconds} s, {options.key} key, {os.cpu_count()}"
        f" cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
    if measured:
        console.print(load_table(measured, title))
        if options.plot is not None:
            options.plot.write_text(plot(measured, f"CPU time, {title}"))
    if idle:
        console.print(idle_table(idle, options.idle_connections))
    failed = any(one.outcome.errors for each in measured for one in each.rounds)
    return not failed and not any(memory.lost for memory in idle.values())


def main(argv: Sequence[str] | None = None) -> int:
    options = options_from(argv)
    # So that the programs it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        raise_descriptor_limit(max(options.idle_connections + 300, 1000))
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-bench-") as folder:
            width = None if sys.stdout.isatty() else _WIDTH
            clean = benchmark(options, Path(folder), Console(width=width))
    except BenchmarkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
