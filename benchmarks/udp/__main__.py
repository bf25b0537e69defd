"""CPU time per relayed datagram of kamal-proxy, of nginx and of a bare relay in C.

All relays run at once on one core against one echo server; rounds alternate between them, so that
what disturbs the machine disturbs all. The load and the echo server have the other core. What
counts is CPU time and the ratio in one run: absolute numbers differ from machine to machine. Every
relay pays for the same work of the kernel, which on the loopback includes the receiver's part.

Then come what kamal-proxy alone can tell: many sessions that stand and are flooded, and calls (RTP)
through ranges of ports beside plain UDP.

    python3 -m benchmarks.udp
    python3 -m benchmarks.udp --parts calls --ports 1000
    python3 -m benchmarks.udp --only kamal --shape 64x1000 --seconds 10 --perf perf.data
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from rich.console import Console

from benchmarks.processes import BenchmarkError, Running, compiled, family, need
from benchmarks.udp import calls, contenders, network, shapes
from benchmarks.udp.call_tables import calls_table, weight_table
from benchmarks.udp.load import SOURCES, Load, running_load
from benchmarks.udp.measuring import DATAGRAMS, TALKERS, cpu_seconds, direct, sample, stand
from benchmarks.udp.media import RELAY, running_media
from benchmarks.udp.network import Network, on_core
from benchmarks.udp.tables import (
    BARE,
    KAMAL,
    NGINX,
    Results,
    cpu_table,
    latency_table,
    machine,
    standing_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from benchmarks.udp.shapes import Shape

MAX_SESSIONS = 20_000
COMPARE, STAND, CALLS = "compare", "stand", "calls"
PRINTED_WIDTH = 100


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.udp",
        description="CPU per relayed datagram beside nginx and a bare relay in C.",
    )
    add = parser.add_argument
    installed = Path(sys.executable).with_name("kamal-proxy")
    add("--proxy", default=str(installed), help="the kamal-proxy command (%(default)s)")
    add(
        "--shapes",
        "--shape",
        type=shapes.shape,
        nargs="+",
        metavar="BYTESxSESSIONS",
        help="64, 200 and 1200 bytes by 1, 64, 1000 and 10000 sessions, if not given",
    )
    add(
        "--only",
        choices=(KAMAL, NGINX, BARE),
        nargs="+",
        default=[KAMAL, NGINX, BARE],
        help="which relays; all, if not given",
    )
    add("--rounds", type=int, default=7, help="for each relay and shape (%(default)s)")
    add("--requests", type=int, default=50_000, help="of each round (%(default)s)")
    add("--lone-requests", type=int, default=1_000, help="of each, one at a time (%(default)s)")
    add("--sessions", type=int, default=10_000, help="that stand and are flooded (%(default)s)")
    add("--newcomers", type=int, default=50_000, help="in the flood; 0: no flood (%(default)s)")
    add("--quiet-seconds", type=float, default=5, help="of standing sessions (%(default)s)")
    add("--ports", type=int, default=10_000, help="that calls are spread over (%(default)s)")
    add(
        "--parts",
        choices=(COMPARE, STAND, CALLS),
        nargs="+",
        default=[COMPARE, STAND, CALLS],
        help="relays in turns; kamal-proxy with standing sessions; with calls: all, if not given",
    )
    add("--smoke", action="store_true", help="some thousand datagrams: does it run?")
    add("--seconds", type=int, help="no tables: a steady load for so long, to look at a relay")
    add("--perf", metavar="FILE", help="with --seconds: record the relay with perf record -g")
    options = parser.parse_args(argv)
    if options.perf and not (
        options.seconds and len(options.only) == 1 and options.shapes and len(options.shapes) == 1
    ):
        parser.error("--perf needs --seconds, and --only and --shape with one of each")
    if options.sessions <= TALKERS.sessions:
        parser.error(f"--sessions must be more than the {TALKERS.sessions} that talk in the flood")
    if options.smoke:
        options.rounds, options.requests, options.lone_requests = 1, 2_000, 100
        options.sessions, options.newcomers, options.quiet_seconds = 300, 1_500, 0.5
        options.ports = 1_000
    if options.shapes is None:
        options.shapes = shapes.SMOKE if options.smoke else shapes.DEFAULT
    if KAMAL not in options.only:
        options.parts = [COMPARE]
    options.calls = shapes.SMOKE_CALLS if options.smoke else shapes.CALLS
    return options


@attrs.frozen
class Stage:
    """What every measurement needs.

    Attributes:
        place: What the machine gives.
        load: The other side of every relay.
        folder: Room for files.
        proxy: The kamal-proxy command.
    """

    place: Network
    load: Load
    folder: Path
    proxy: Sequence[str]

    def relay(self, name: str) -> AbstractContextManager[Running]:
        """Return what runs a relay with room for all sessions."""
        most = min(MAX_SESSIONS, self.place.most_sessions(1))
        if name == KAMAL:
            return self.kamal_proxy(name, most)
        folder, target = self.folder / name, self.load.port
        if name == NGINX:
            started = contenders.nginx(folder, target, most, self.place.descriptors)
        else:
            started = contenders.bare(compiled(SOURCES / f"{BARE}.c", self.folder), folder, target)
        return on_core(self.place.relay_cpu, started)

    def kamal_proxy(self, name: str, sessions: int) -> AbstractContextManager[Running]:
        """Return what runs a kamal-proxy that takes so many sessions and no more."""
        started = contenders.kamal_proxy(self.proxy, self.folder / name, self.load.port, sessions)
        return on_core(self.place.relay_cpu, started)


def benchmark(options: argparse.Namespace, console: Console, folder: Path) -> bool:
    """Run it and print the tables; tell whether every answer was the right one."""
    place = network.prepare(MAX_SESSIONS + options.ports + network.SPARE_DESCRIPTORS)
    console.print(f"{machine()}; in {place.namespace}", highlight=False)
    proxy = shlex.split(options.proxy)
    wrong = 0
    if options.seconds or COMPARE in options.parts or STAND in options.parts:
        ports = network.free_port(), network.free_port()
        program = compiled(SOURCES / "load.c", folder)
        with on_core(place.load_cpu, running_load(program, *ports, spin=place.may_spin)) as load:
            stage = Stage(place, load, folder, proxy)
            if options.seconds:
                watch(stage, options, _possible_shapes(options, place, console), console)
                return True
            wrong = against_echo(stage, options, console)
    if CALLS in options.parts:
        wrong += through_ranges(place, options, folder, proxy, console)
    if drops := network.kernel_drops():
        console.print(f"the kernel dropped {drops:,} datagrams for want of room in a buffer")
    if wrong:
        console.print(f"Error: {wrong:,} answers were wrong: another session's, or not whole")
    return not wrong


def against_echo(stage: Stage, options: argparse.Namespace, console: Console) -> int:
    """Measure what needs the echo server, print it, and return how many answers were wrong."""
    wrong = 0
    if COMPARE in options.parts:
        chosen = _possible_shapes(options, stage.place, console)
        results = compare(stage, options, chosen, console)
        console.print(cpu_table(results, options.rounds, options.requests))
        console.print(latency_table(results))
        wrong = results.wrong()
    if STAND in options.parts and options.newcomers:
        sessions = min(options.sessions, stage.place.most_sessions(1))
        with stage.kamal_proxy("full", sessions) as program:
            seconds = options.quiet_seconds
            standing = stand(program, stage.load, sessions, options.newcomers, seconds)
        console.print(standing_table(standing))
        wrong += standing.flood.wrong
    return wrong


def through_ranges(
    place: Network,
    options: argparse.Namespace,
    folder: Path,
    proxy: Sequence[str],
    console: Console,
) -> int:
    """Measure calls, print what they cost, and return how many packets were wrong."""
    many = min(options.ports, place.most_ports)
    if many < options.ports:
        console.print(f"{many:,} ports, as {place.descriptors:,} open files allow no more.")
    if many < 1:
        raise BenchmarkError("no descriptor is left for a port")
    count = many + calls.OTHER_PORTS
    first = network.free_range(count)
    ports = range(first, first + count)
    with ExitStack() as stack:
        server = running_media(
            compiled(SOURCES / "media.c", folder), ports, network.free_port(), spin=place.may_spin
        )
        media = stack.enter_context(on_core(place.load_cpu, server))
        relay = contenders.empty_proxy(proxy, folder / CALLS, f"--bind={RELAY}")
        started = stack.enter_context(on_core(place.relay_cpu, relay))
        rounds, packets = options.rounds, options.requests
        ways = calls.ways_of(ports)
        measured = calls.measure_calls(started, media, ways, options.calls, rounds, packets)
    console.print(weight_table(measured))
    console.print(calls_table(measured, rounds, packets))
    return measured.wrong()


def compare(
    stage: Stage, options: argparse.Namespace, chosen: Sequence[Shape], console: Console
) -> Results:
    """Measure all relays at all shapes, in turns."""
    results = Results(options.only, chosen)
    load = stage.load
    with ExitStack() as stack:
        relays = [stack.enter_context(stage.relay(name)) for name in options.only]
        for shape in chosen:
            for number in range(options.rounds):
                results.direct[shape].append(direct(load, shape, options.lone_requests))
                line = f"{shape!s:>10}  round {number + 1}/{options.rounds}"
                for program in relays:
                    one = sample(program, load, shape, options.requests, options.lone_requests)
                    results.samples[shape][program.name].append(one)
                    line += f"  {program.name} {one.cpu * 1e6:6.2f} us"
                console.print(line, highlight=False)
    return results


def watch(
    stage: Stage, options: argparse.Namespace, chosen: Sequence[Shape], console: Console
) -> None:
    """Keep one relay after the other under a steady load, for a look at it from outside."""
    for name in options.only:
        with stage.relay(name) as program, ExitStack() as stack:
            # nginx does its work in a child.
            pid = family(program.pid)[-1]
            for shape in chosen:
                stage.load.run(program.port, shape, max(shape.sessions, 1000))
                if options.perf:
                    stack.enter_context(_recording(pid, options.perf))
                console.print(f"{name} is process {pid}: {shape} for {options.seconds} s")
                before = cpu_seconds(program)
                report = stage.load.run(program.port, shape, seconds=options.seconds)
                used = cpu_seconds(program) - before
                stack.close()
                datagrams = DATAGRAMS * (report.answered + report.lost)
                console.print(
                    f"{used / datagrams * 1e6:.2f} us of CPU per datagram,"
                    f" {datagrams / report.seconds:,.0f} datagrams/s,"
                    f" {used / report.seconds:.0%} of a core, {report.lost} requests lost,"
                    f" latency {report.median * 1e6:.0f} us, p99 {report.p99 * 1e6:.0f} us",
                    highlight=False,
                )


@contextmanager
def _recording(pid: int, output: str) -> Iterator[None]:
    """Record where a process spends its time."""
    command = [need("perf", "linux-perf"), "record", "-g", "-p", str(pid), "-o", output]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)


def _possible_shapes(options: argparse.Namespace, place: Network, console: Console) -> list[Shape]:
    """Return the shapes for which this machine has ports and files enough."""
    together = 1 if options.seconds else len(options.only)
    most = min(MAX_SESSIONS, place.most_sessions(together))
    chosen = [shape for shape in options.shapes if shape.sessions <= most]
    if len(chosen) < len(options.shapes):
        console.print(
            f"Shapes of more than {most:,} sessions are left out: for {together} relays,"
            f" {place.source_ports:,} source ports and {place.descriptors:,} open files each"
            " allow no more.",
            highlight=False,
        )
    if not chosen:
        raise BenchmarkError("no shape is left")
    # From few sessions to many: those of a larger shape would end within a smaller one's rounds.
    return sorted(chosen, key=lambda shape: shape.sessions)


def main(argv: Sequence[str] | None = None) -> int:
    options = options_from(argv)
    console = Console(width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    # So that the programs it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if NGINX in options.only:
            try:
                console.print(f"beside {contenders.nginx_version()}", highlight=False)
            except BenchmarkError as error:
                if not options.smoke:
                    raise
                console.print(f"{NGINX} is left out: {error}", highlight=False)
                options.only.remove(NGINX)
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-bench-") as folder:
            clean = benchmark(options, console, Path(folder))
    except BenchmarkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
