"""The demonstration for UDP: redeploy a game server while it is played, and see who notices.

Like demo.py, whose parts it uses: the installed command, instances of udpserver.py and the players
of udp_load.py are processes, and each instance is killed as soon as the deploy that replaced it has
returned. Players keep the server that they play on until their match is over; new matches are on
the new one. Exits with 1 unless that is so, no packet was lost, and the proxy gave back the memory
and the descriptors it took.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE

import attrs
import trio
from rich.console import Console
from rich.table import Table

from example.demo import (
    CROSSINGS_SHOWN,
    HERE,
    START_SECONDS,
    Demo,
    DemoError,
    Instance,
    Settings,
    as_typed,
    free_port,
    leaves,
)
from example.footprint import MIB, Growth, descriptors_of, memory_of
from example.sessions import Sessions, judge_sessions
from example.verdict import Deploy, Verdict

SERVICE = "game"


@attrs.frozen(kw_only=True)
class UdpSettings(Settings):
    """What the demonstration does; ``connections`` are its players.

    Attributes:
        udp_port: The port of the game, or the first free one after it.
        match_seconds: How long a match lasts at most.
        session_seconds: How long a session may carry nothing until it is over.
    """

    udp_port: int
    match_seconds: float
    session_seconds: float
    slow_connections: int = attrs.field(default=0, init=False)
    slow_seconds: float = attrs.field(default=0.0, init=False)
    tls: bool = attrs.field(default=False, init=False)


@attrs.define(eq=False, kw_only=True)
class UdpDemo(Demo):
    """One run with a UDP service instead of a web application."""

    settings: UdpSettings
    udp_port: int
    completed: int = 0
    cut: int = 0

    async def _drive(self, proxy: int, nursery: trio.Nursery) -> Growth:
        settings = self.settings
        current = await self._start_instance(1)
        descriptors = descriptors_of(proxy)
        await self._deploy(current)
        load = await self._start_load()
        self.say(
            f"load: {settings.connections} players send {settings.rate:g} packets/s, in matches of "
            f"{settings.match_seconds:g} s at most"
        )
        reader_done = trio.Event()
        nursery.start_soon(self._read_load, load, reader_done)
        nursery.start_soon(self._report_progress)
        for number in range(1, settings.switches + 1):
            await trio.sleep(settings.steady)
            if number == min(2, settings.switches):  # what a first switch loads is no leak
                memory = memory_of(proxy)
            self.say(f"switch {number} of {settings.switches}", "bold")
            current = await self._switch(current, number + 1)
        await trio.sleep(settings.steady)
        growth = Growth(
            memory, memory_of(proxy), round(settings.max_growth * MIB), descriptors, descriptors
        )
        assert load.stdin is not None
        await load.stdin.aclose()
        await reader_done.wait()
        await self._command("remove", SERVICE)
        with trio.move_on_after(settings.settle_seconds):
            # Another process offers no event to wait for.
            while descriptors_of(proxy) > descriptors:  # noqa: ASYNC110
                await trio.sleep(0.05)
        return attrs.evolve(growth, descriptors_after=descriptors_of(proxy))

    async def _start_instance(self, number: int) -> Instance:
        version = "v1" if number % 2 else "v2"
        name = f"{version}#{number}"
        process = await self._open(
            [
                sys.executable,
                str(HERE / "udpserver.py"),
                "--port=0",
                f"--version={version}",
                f"--name={name}",
                f"--boot-seconds={self.settings.boot_seconds}",
            ],
            stdout=PIPE,
        )
        assert process.stdout is not None
        with trio.move_on_after(START_SECONDS):
            line = (await process.stdout.receive_some()).decode()
            if found := re.search(r"listening on (\S+)", line):
                self.say(f"{name} started, needs {self.settings.boot_seconds:g} s to boot")
                return Instance(name, found[1], process)
        raise DemoError(f"{name} did not start")

    async def _deploy(self, instance: Instance) -> None:
        self._expected = instance.name
        began = time.monotonic()
        await self._command(
            "deploy-udp",
            SERVICE,
            f"--target={instance.target}",
            f"--port={self.udp_port}",
            "--zero-downtime",
            f"--session-timeout={self.settings.session_seconds:g}s",
        )
        deploy = Deploy(instance.name, began, time.monotonic())
        self.deploys.append(deploy)
        self.say(f"deploy returned after {deploy.returned - deploy.began:.2f} s")

    async def _command(self, *arguments: str) -> None:
        command = [str(self.settings.proxy), *arguments]
        self.say(f"$ {as_typed(command)}", "cyan")
        done = await trio.run_process(
            command,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=self._environment(),
            start_new_session=True,
        )
        if done.returncode:
            raise DemoError(f"{as_typed(command)} failed:\n{done.stderr.decode()}")
        for line in done.stdout.decode().splitlines():
            self.say(line)
            if found := re.fullmatch(r"(\d+) sessions? completed, (\d+) cut", line):
                self.completed += int(found[1])
                self.cut += int(found[2])

    async def _start_load(self) -> trio.Process:
        settings = self.settings
        return await self._open(
            [
                sys.executable,
                "-m",
                "example.udp_load",
                f"--port={self.udp_port}",
                f"--rate={settings.rate}",
                f"--players={settings.connections}",
                f"--match-seconds={settings.match_seconds}",
                f"--keep-seconds={settings.session_seconds + 2}",
            ],
            stdin=PIPE,
            stdout=PIPE,
            cwd=HERE.parent,
        )


def show(demo: UdpDemo, verdict: Verdict, sessions: Sessions, growth: Growth) -> None:
    """Print the table of what was measured, and what it means."""
    table = Table(
        title="What the players noticed", title_justify="left", show_header=False, safe_box=True
    )
    table.add_column()
    table.add_column(justify="right")
    redeploys = list(zip(demo.deploys[1:], verdict.switches, strict=True))
    for name, value in (
        ("packets", f"{verdict.requests:,}"),
        ("packets lost, or answered wrongly", f"{verdict.failures:,}"),
        ("answers by a server that was not allowed to", f"{verdict.wrong:,}"),
        ("sessions", f"{sessions.count:,}"),
        ("sessions moved to another server", f"{sessions.moved:,}"),
        ("sessions that began on the old server after a switch", f"{sessions.late:,}"),
        ("sessions that went on with the old server after it", _joined(sessions.kept)),
        ("sessions that the deploys waited for", f"{demo.completed:,}"),
        ("sessions that they cut", f"{demo.cut:,}"),
        ("redeploys", f"{len(redeploys)}"),
        ("switches seen by the players", f"{sum(s.moment is not None for _, s in redeploys)}"),
        (
            "from the command to the first answer of the new server",
            _longest([s.moment - d.began for d, s in redeploys if s.moment is not None]),
        ),
        (
            "from the command to the end of the last old session",
            _longest([d.returned - d.began for d, _ in redeploys]),
        ),
        ("median answer", _milliseconds(verdict.median)),
        ("99th percentile", _milliseconds(verdict.p99)),
        ("slowest answer", _milliseconds(verdict.slowest)),
        ("slowest answer during a redeploy", _milliseconds(verdict.slowest_switching)),
        ("memory of the proxy, before and after", growth.memory_text),
        ("its descriptors, before the first deploy and after all", growth.descriptors_text),
    ):
        table.add_row(name, value)
    demo.console.print(table)
    if is_clean(demo, verdict, sessions):
        demo.console.print("Nobody lost a packet, and everybody kept the server they played on.")
    else:
        demo.console.print("The deploys were noticed: see the failures above.", style="bold red")
    for leak in growth.leaks:
        demo.console.print(leak, style="bold red")


def is_clean(demo: UdpDemo, verdict: Verdict, sessions: Sessions) -> bool:
    """Tell whether nobody noticed anything, though there was something to notice."""
    return verdict.clean and sessions.clean and not demo.cut


def free_udp_port(preferred: int) -> int:
    """Return the first free UDP port from ``preferred`` on; any free one if that is 0.

    Raises:
        DemoError: the next hundred are all taken.
    """
    for port in range(preferred, preferred + 100):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError(f"no free UDP port from {preferred} on")


def _joined(counts: tuple[int, ...]) -> str:
    return " + ".join(map(str, counts)) if len(counts) <= CROSSINGS_SHOWN else f"{sum(counts):,}"


def _longest(seconds: list[float]) -> str:
    return f"{max(seconds):.2f} s at most" if seconds else "never"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def settings_from(argv: list[str] | None) -> UdpSettings:
    parser = argparse.ArgumentParser(description="Redeploy a UDP server while it is used.")
    installed = Path(sys.executable).with_name("kamal-proxy")
    parser.add_argument("--proxy", type=Path, default=installed, help="the command to show")
    parser.add_argument("--port", type=int, default=8080, help="for HTTP")
    parser.add_argument("--udp-port", type=int, default=9999)
    parser.add_argument("--switches", type=int, default=5, help="at least one")
    parser.add_argument("--steady", type=float, default=1.0, help="seconds between switches")
    parser.add_argument("--rate", type=float, default=200.0, help="packets a second, in all")
    parser.add_argument("--connections", "--players", type=int, default=20)
    parser.add_argument("--match-seconds", type=float, default=3.0, help="longest match")
    parser.add_argument("--session-seconds", type=float, default=2.0)
    parser.add_argument("--boot-seconds", type=float, default=0.5)
    parser.add_argument("--max-growth", type=float, default=2.0, help="MiB of the proxy's memory")
    parser.add_argument("--settle-seconds", type=float, default=10.0)
    settings = UdpSettings(**vars(parser.parse_args(argv)))
    if settings.switches < 1:
        parser.error("--switches must be at least 1")
    return settings


def main(argv: list[str] | None = None) -> int:
    settings = settings_from(argv)
    errors: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-demo-") as folder:
            demo = UdpDemo(
                settings=settings,
                port=free_port(settings.port),
                udp_port=free_udp_port(settings.udp_port),
                folder=Path(folder),
                console=Console(),
            )
            verdict, growth = trio.run(demo.run)
    except* (DemoError, OSError) as group:
        errors.extend(str(error) for error in leaves(group))
    except* KeyboardInterrupt:
        errors.append("stopped by Ctrl-C")
    if errors:
        for error in errors:
            print(f"Error: {error}", file=sys.stderr)
        return 1
    sessions = judge_sessions(demo.requests, verdict.switches)
    show(demo, verdict, sessions, growth)
    return 0 if is_clean(demo, verdict, sessions) and not growth.leaks else 1


if __name__ == "__main__":
    sys.exit(main())
