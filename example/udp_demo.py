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
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import attrs
import trio
from rich.console import Console
from rich.table import Table

from example.demo import CROSSINGS_SHOWN, Demo, Settings
from example.sessions import Sessions, judge_sessions
from example.stage import DemoError, free_port, leaves, milliseconds

if TYPE_CHECKING:
    from example.footprint import Growth
    from example.verdict import Verdict


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

    service: ClassVar = "game"
    script: ClassVar = "udpserver.py"

    settings: UdpSettings
    udp_port: int
    completed: int = 0
    cut: int = 0

    @property
    def _server_flags(self) -> tuple[str, ...]:
        return (forget_flag(self.settings.session_seconds),)

    async def _deploy_target(self, target: str) -> None:
        printed = await self.command(
            "deploy-udp",
            self.service,
            f"--target={target}",
            f"--port={self.udp_port}",
            "--zero-downtime",
            f"--session-timeout={self.settings.session_seconds:g}s",
        )
        self.say(printed.rstrip())
        completed, cut = sessions_in(printed)
        self.completed += completed
        self.cut += cut

    async def _start_load(self) -> trio.Process:
        settings = self.settings
        load = await self.start_load(
            "example.udp_load",
            f"--port={self.udp_port}",
            f"--rate={settings.rate}",
            f"--players={settings.connections}",
            f"--match-seconds={settings.match_seconds}",
            f"--keep-seconds={settings.session_seconds + 2}",
        )
        self.say(
            f"load: {settings.connections} players send {settings.rate:g} packets/s, in matches of "
            f"{settings.match_seconds:g} s at most"
        )
        return load


def forget_flag(session_seconds: float) -> str:
    """Return what lets a server forget a client just before the proxy ends its session.

    From then on another session may come from the same port of the proxy.
    """
    return f"--forget-seconds={0.9 * session_seconds:g}"


def sessions_in(printed: str) -> tuple[int, int]:
    """Return how many sessions were completed, and cut, by what ``deploy-udp`` printed.

    Raises:
        DemoError: it does not say.
    """
    found = re.match(r"(\d+) sessions? completed, (\d+) cut", printed)
    if found is None:
        raise DemoError(f"the deploy does not say what became of its sessions: {printed!r}")
    return int(found[1]), int(found[2])


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
        ("median answer", milliseconds(verdict.median)),
        ("99th percentile", milliseconds(verdict.p99)),
        ("slowest answer", milliseconds(verdict.slowest)),
        ("slowest answer during a redeploy", milliseconds(verdict.slowest_switching)),
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


def _joined(counts: tuple[int, ...]) -> str:
    return " + ".join(map(str, counts)) if len(counts) <= CROSSINGS_SHOWN else f"{sum(counts):,}"


def _longest(seconds: list[float]) -> str:
    return f"{max(seconds):.2f} s at most" if seconds else "never"


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
                program=settings.proxy,
                folder=Path(folder),
                console=Console(),
                settings=settings,
                port=free_port(settings.port),
                udp_port=free_port(settings.udp_port, socket.SOCK_DGRAM),
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
