"""CPU time of HTTPS beside nginx: small keep-alive requests, full handshakes, HTTP/2.

All programs run at once on one machine, with one certificate and key, against one target; rounds
alternate between them. What counts is the ratio in one run.

    python3 -m benchmarks.https_cpu --smoke
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import contenders, wrk
from benchmarks.processes import BenchmarkError, Running, need

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST = "bench.test"
BASE = "nginx"
# One alone would measure how programs fall asleep and wake up between two handshakes.
_HANDSHAKERS = 4


@attrs.frozen
class Scenario:
    """One kind of load.

    Attributes:
        name: What the table calls it.
        unit: What is counted.
        run: Puts it on a program for some seconds; returns how many of the unit there were.
    """

    name: str
    unit: str
    run: Callable[[Running, int, int], int]


def plain(program: Running, seconds: int, connections: int) -> int:
    """Send keep-alive requests over plain HTTP."""
    return wrk.run(program.port, seconds, connections, host=HOST).requests


def keep_alive(program: Running, seconds: int, connections: int) -> int:
    """Send keep-alive requests over HTTPS (HTTP/1.1)."""
    return wrk.run(program.tls_port, seconds, connections, host=HOST, scheme="https").requests


def handshakes(program: Running, seconds: int, _connections: int) -> int:
    """Connect again and again, four at a time, without resuming a session, and send nothing."""
    command = [need("openssl", "openssl"), "s_time", "-new", "-time", str(seconds)]
    command += ["-connect", f"127.0.0.1:{program.tls_port}"]
    with ThreadPoolExecutor(_HANDSHAKERS) as clients:
        commands = [command] * _HANDSHAKERS
        return sum(clients.map(_count, commands, [r"(\d+) connections in [\d.]+s;"] * _HANDSHAKERS))


def http2(program: Running, seconds: int, connections: int) -> int:
    """Send requests over HTTP/2, ten at a time on each connection."""
    command = [
        need("h2load", "nghttp2-client"),
        f"--duration={seconds}",
        f"--clients={connections}",
    ]
    command += ["--max-concurrent-streams=10", f"--connect-to=127.0.0.1:{program.tls_port}"]
    command.append(f"https://{HOST}/")
    return _count(command, r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx")


SCENARIOS = (
    Scenario("HTTP/1.1, plain", "request", plain),
    Scenario("HTTP/1.1, TLS", "request", keep_alive),
    Scenario("full handshake", "handshake", handshakes),
    Scenario("HTTP/2, TLS", "request", http2),
)


def _count(command: list[str], pattern: str) -> int:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(pattern, done.stdout)
    if done.returncode or found is None or not int(found[1]):
        report = done.stderr.strip() or done.stdout.strip()
        raise BenchmarkError(f"{command[0]} failed: {report[-500:]}")
    return int(found[1])


def measure(scenario: Scenario, program: Running, seconds: int, connections: int) -> float:
    """Return the CPU seconds that a program used for one unit of a scenario."""
    before = program.cpu_seconds()
    count = scenario.run(program, seconds, connections)
    return (program.cpu_seconds() - before) / count


def table(measured: dict[tuple[str, str], list[float]], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("load", no_wrap=True)
    names = sorted({name for _, name in measured}, key=lambda name: name != BASE)
    for name in names:
        made.add_column(f"{name}\nCPU us", justify="right")
        if name != BASE:
            made.add_column("times\nnginx", justify="right")
            made.add_column("times its\nplain", justify="right")
    for scenario in SCENARIOS:
        row = [f"{scenario.name}, per {scenario.unit}"]
        for name in names:
            cost = statistics.median(measured[scenario.name, name])
            row.append(f"{cost * 1e6:.1f}")
            if name != BASE:
                row.append(f"{cost / statistics.median(measured[scenario.name, BASE]):.2f}")
                row.append(f"{cost / statistics.median(measured[SCENARIOS[0].name, name]):.2f}")
        made.add_row(*row)
    return made


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time of HTTPS beside nginx.")
    add = parser.add_argument
    installed = Path(sys.executable).with_name("kamal-proxy")
    add("--proxy", default=str(installed), help="the kamal-proxy command (%(default)s)")
    add("--seconds", type=int, default=4, help="of each round (%(default)s)")
    add("--connections", type=int, default=64, help="clients at once (%(default)s)")
    add("--rounds", type=int, default=5, help="for each program and load (%(default)s)")
    add("--key", choices=("ec", "rsa"), default="ec", help="of the certificate (%(default)s)")
    add("--smoke", action="store_true", help="one round of 1 s: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        options.seconds, options.rounds = 1, 1
    return options


def benchmark(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Run it and print the table."""
    files = contenders.certificate(folder, HOST, options.key)
    with ExitStack() as stack:
        target = stack.enter_context(contenders.upstream(folder / "upstream", 13))
        programs = [
            stack.enter_context(contenders.nginx(folder / BASE, target.port, files)),
            stack.enter_context(
                contenders.kamal_proxy(
                    "kamal_proxy",
                    shlex.split(options.proxy),
                    folder / "kamal_proxy",
                    target.port,
                    (HOST, *files),
                )
            ),
        ]
        measured: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for scenario in SCENARIOS:
                for program in programs:
                    cost = measure(scenario, program, options.seconds, options.connections)
                    measured.setdefault((scenario.name, program.name), []).append(cost)
                    console.print(
                        f"{scenario.name:18} {program.name:12} {cost * 1e6:8.1f} us CPU",
                        highlight=False,
                    )
    title = (
        f"{options.connections} connections, {options.key} key, "
        f"median of {options.rounds} x {options.seconds} s"
    )
    console.print(table(measured, title))


def main(argv: Sequence[str] | None = None) -> int:
    options = options_from(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-bench-") as folder:
            benchmark(options, Path(folder), Console())
    except BenchmarkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
