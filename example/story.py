"""The story of README.md without Docker: deploys on one machine, while they are used and watched.

The installed command, four replicas of webapp.py, two servers of udpserver.py, their clients and,
if it is installed, Prometheus with the rules of prometheus/ are processes that listen on 127.0.0.1
only. It is told step by step what is done to them. Exits with 1 if anything was lost: a request, a
message on a WebSocket, a packet of a player or a session.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio
from rich.console import Console

from example.audience import Audience, judge_losses, table_of, version_of
from example.scraping import get, start_prometheus
from example.stage import (
    START_SECONDS,
    DemoError,
    Instance,
    Stage,
    free_port,
    leaves,
)
from example.udp_demo import forget_flag, sessions_in
from example.verdict import Deploy

if TYPE_CHECKING:
    from example.load import Request

LOST_SHOWN = 5  # failures of one audience that are printed
DRAIN = "3s"  # what WebSockets may take to go away
SESSION_SECONDS = 2  # how long a player may be silent
MATCH_SECONDS = 3.0


@attrs.frozen
class Settings:
    """What the story does.

    Attributes:
        proxy: The kamal-proxy command.
        port: The proxy's port for HTTP, or the first free one after it; 0 means any.
        metrics_port: The same for its metrics.
        prometheus_port: The same for Prometheus.
        udp_port: The same for the game.
        rate: Requests and packets a second, of each.
        steady: Seconds between two steps.
        boot_seconds: How long a server takes to start.
        stay: Whether to leave everything running at the end.
    """

    proxy: Path
    port: int
    metrics_port: int
    prometheus_port: int
    udp_port: int
    rate: float
    steady: float
    boot_seconds: float
    stay: bool


@attrs.define(eq=False)
class Crowd(Audience):
    """An audience that is there now.

    Attributes:
        load: The process that plays it.
        ended: Set when the last of its records has come.
    """

    load: trio.Process | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False, kw_only=True)
class Story(Stage):
    """One telling of it.

    Attributes:
        settings: What to do.
        port: Where the proxy serves HTTP.
        metrics_port: Where it serves metrics.
        udp_port: Where it serves the game.
    """

    settings: Settings
    port: int
    metrics_port: int
    udp_port: int
    visitors: Crowd = attrs.field(init=False)
    chatters: Crowd = attrs.field(init=False)
    players: Crowd = attrs.field(init=False)
    killed: tuple[float, float] = (0.0, 0.0)
    cut: int = 0
    _prometheus: str = ""
    _step: int = 0

    async def run(self) -> bool:
        """Tell it; return whether nothing was lost.

        Raises:
            DemoError: a process or a command failed, inside an exception group.
        """
        async with self.opened() as nursery:
            web, game = await self._start(nursery)
            await self._deploy_first(web, game)
            self._title("Use it", "From now on somebody always waits for an answer.")
            await self._open_doors(nursery)
            await self._watch(self.settings.steady)
            await self._redeploy_web(web)
            await self._redeploy_game(game)
            await self._deploy_what_fails()
            await self._kill_one(web)
            for audience in self._audiences:
                await self._close_doors(audience)
            await self._show_counters()
            kept = self._show_losses()
            if self.settings.stay:
                await self._stay(nursery)
        return kept

    def __attrs_post_init__(self) -> None:
        web: list[Deploy] = []
        self.visitors = Crowd("visitors", "requests", web)
        self.chatters = Crowd("WebSockets", "messages", web)
        self.players = Crowd("players", "packets", [])

    @property
    def _audiences(self) -> tuple[Crowd, ...]:
        return self.visitors, self.chatters, self.players

    # --- the steps -------------------------------------------------------------------------------

    async def _start(self, nursery: trio.Nursery) -> tuple[dict[str, Instance], list[Instance]]:
        """Start everything but the clients; return the replicas and the game servers."""
        self._title("Start", "The proxy, two replicas of each version, and two game servers.")
        flags = ["--bind=127.0.0.1", f"--metrics-port={self.metrics_port}"]
        await self.start_proxy(nursery, self.port, *flags)
        boot = self.settings.boot_seconds
        web = {
            f"{version}-{letter}": await self.start_server(
                "webapp.py", version, f"{version}-{letter}", boot
            )
            for version in ("v1", "v2")
            for letter in "ab"
        }
        forget = forget_flag(SESSION_SECONDS)
        game = [
            await self.start_server("udpserver.py", version, f"{version}-game", boot, forget)
            for version in ("v1", "v2")
        ]
        port = free_port(self.settings.prometheus_port)
        self._prometheus = await start_prometheus(self, self.metrics_port, port)
        await self._ask("nothing is deployed yet", 404)
        return web, game

    async def _deploy_first(self, web: dict[str, Instance], game: list[Instance]) -> None:
        self._title("Deploy", "A deploy returns when all its targets have answered a health check.")
        await self._deploy_web("v1", web["v1-a"], web["v1-b"])
        for _ in range(2):
            await self._ask("the replicas take turns", 200)
        await self._deploy_game(game[0])
        await self._knock_while_paused()

    async def _knock_while_paused(self) -> None:
        """Send what must be dropped, so that the counters of drops have something to show."""
        await self.command("pause", "game")
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
            await sock.connect(("127.0.0.1", self.udp_port))
            await sock.send(b"is anybody there")
            await self._wait_counted("kamal_proxy_udp_dropped_datagrams_total", "paused")
        self.say("a stranger's packet was dropped, because the game is paused, and counted")
        await self.command("resume", "game")

    async def _open_doors(self, nursery: trio.Nursery) -> None:
        rate = self.settings.rate
        await self._let_in(nursery, self.visitors, "example.load", f"--rate={rate}")
        await self._let_in(nursery, self.chatters, "example.ws_load")
        await self._let_in(
            nursery,
            self.players,
            "example.udp_load",
            f"--rate={rate}",
            f"--match-seconds={MATCH_SECONDS}",
            f"--keep-seconds={SESSION_SECONDS + 2}",
        )

    async def _redeploy_web(self, web: dict[str, Instance]) -> None:
        self._title(
            "Redeploy the web application",
            "New requests get the new version; what runs on the old one may finish. WebSockets are",
            f"asked to go away within {DRAIN}, and come back to the new one. Then the old one is "
            "killed.",
        )
        began = time.monotonic()
        await self._deploy_web("v2", web["v2-a"], web["v2-b"])
        for name in ("v1-a", "v1-b"):
            await web[name].kill()
        self.say("v1-a and v1-b killed")
        await self._watch(self.settings.steady, began)

    async def _redeploy_game(self, game: list[Instance]) -> None:
        self._title(
            "Redeploy the game server",
            "New matches begin on the new one. The deploy returns when all old matches are over.",
        )
        began = time.monotonic()
        await self._deploy_game(game[1])
        await game[0].kill()
        self.say(f"{game[0].name} killed")
        await self._watch(self.settings.steady, began)

    async def _deploy_what_fails(self) -> None:
        self._title("Deploy what does not start", "Nobody listens there. The old version goes on.")
        nowhere = f"--target=127.0.0.1:{free_port(0)}"
        printed = await self.command(
            "deploy", "web", nowhere, "--deploy-timeout=1s", f"--drain-timeout={DRAIN}", fails=True
        )
        for line in printed.splitlines():
            self.say(line, "yellow")
        await self._watch(self.settings.steady)

    async def _kill_one(self, web: dict[str, Instance]) -> None:
        self._title(
            "Kill a replica",
            "It is not replaced, and nobody says so to the proxy: the other one has to do it all.",
        )
        before = time.monotonic()
        await web["v2-a"].kill()
        self.killed = before, time.monotonic()
        self.say("v2-a killed")
        await self._watch(self.settings.steady, self.killed[1])

    async def _show_counters(self) -> None:
        self._title(
            "What the proxy counted", "Some of its metrics, which docs/metrics.md explains."
        )
        for line in (await self._metrics()).splitlines():
            if re.match(
                r"kamal_proxy_(http_(requests|failures)_total|upstream_retries|upgrades_total|"
                r"websocket_drain|deploy_duration_seconds_count|udp_(sessions_created|dropped))",
                line,
            ):
                self.say(line, "dim")

    async def _stay(self, nursery: trio.Nursery) -> None:
        """Go on, with new clients whose losses do not count, until Ctrl-C or SIGTERM."""
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            self._title("Look around", "New clients come; everything goes on until Ctrl-C.")
            # Till then the proxy may take a new player for an old one that had the same port.
            await trio.sleep(SESSION_SECONDS + 1)
            for audience in self._audiences:
                audience.records, audience.ended = [], trio.Event()
            await self._open_doors(nursery)
            self.say(f"the page   http://127.0.0.1:{self.port}/page")
            self.say(f"metrics    http://127.0.0.1:{self.metrics_port}/metrics")
            if self._prometheus:
                self.say(f"Prometheus {self._prometheus}/graph")
            socket_path = self.environment()["KAMAL_PROXY_SOCKET"]
            self.say(f"commands   KAMAL_PROXY_SOCKET={socket_path} {self.settings.proxy} list")
            async for _ in signals:
                return

    # --- deploying -------------------------------------------------------------------------------

    async def _deploy_web(self, version: str, *replicas: Instance) -> None:
        targets = [f"--target={replica.target}" for replica in replicas]
        began = time.monotonic()
        await self.command("deploy", "web", *targets, f"--drain-timeout={DRAIN}")
        self._note_deploy("web", self.visitors.deploys, Deploy(version, began, time.monotonic()))

    async def _deploy_game(self, server: Instance) -> None:
        began = time.monotonic()
        printed = await self.command(
            "deploy-udp",
            "game",
            f"--target={server.target}",
            f"--port={self.udp_port}",
            "--zero-downtime",
            f"--session-timeout={SESSION_SECONDS}s",
        )
        self.say(printed.rstrip())
        self.cut += sessions_in(printed)[1]
        deploy = Deploy(version_of(server.name), began, time.monotonic())
        self._note_deploy("game", self.players.deploys, deploy)

    def _note_deploy(self, service: str, deploys: list[Deploy], deploy: Deploy) -> None:
        deploys.append(deploy)
        took = deploy.returned - deploy.began
        self.say(f"{service} {deploy.instance} is deployed, after {took:.2f} s")

    # --- the clients -----------------------------------------------------------------------------

    async def _let_in(
        self, nursery: trio.Nursery, audience: Crowd, module: str, *flags: str
    ) -> None:
        port = self.udp_port if audience is self.players else self.port
        audience.load = await self.start_load(module, f"--port={port}", *flags)
        nursery.start_soon(self._read, audience, audience.load, audience.ended)

    async def _read(self, audience: Crowd, load: trio.Process, ended: trio.Event) -> None:
        await self.read_load(load, partial(self._note, audience))
        ended.set()

    def _note(self, audience: Crowd, record: Request) -> None:
        audience.records.append(record)
        if record.error and len(audience.lost) <= LOST_SHOWN:
            self.say(f"{audience.name} lost one of their {audience.sends}: {record.error}", "red")

    async def _close_doors(self, audience: Crowd) -> None:
        """Let clients wait for their last answers, and go."""
        assert audience.load is not None
        assert audience.load.stdin is not None
        await audience.load.stdin.aclose()
        await audience.ended.wait()

    async def _watch(self, seconds: float, since: float | None = None) -> None:
        """Let clients go on, and say who answered them, since then or since now."""
        since = time.monotonic() if since is None else since
        await trio.sleep(seconds)
        for audience in self._audiences:
            who = ", ".join(f"{count} by {name}" for name, count in audience.answers(since).items())
            lost = len(audience.lost)
            answered = f"{audience.sends} answered: {who or 'none'}"
            self.say(
                f"{audience.name:10} {answered}; lost so far: {lost}", "red" if lost else "dim"
            )

    async def _ask(self, why: str, wanted: int) -> None:
        """Send one request, and say who answers."""
        status, body = await trio.to_thread.run_sync(get, self.port, "/")
        if status != wanted:
            raise DemoError(f"the proxy answers with {status}, not {wanted}: {why}")
        said = f"200: {body.strip()}" if status == 200 else str(status)
        self.say(f"GET / -> {said}  ({why})")

    # --- what is counted -------------------------------------------------------------------------

    async def _metrics(self) -> str:
        _, text = await trio.to_thread.run_sync(get, self.metrics_port, "/metrics")
        return text

    async def _wait_counted(self, metric: str, label: str) -> None:
        with trio.move_on_after(START_SECONDS):
            wanted = re.compile(rf'^{metric}{{.*"{label}".*}} [1-9]', re.MULTILINE)
            # Another process offers no event to wait for.
            while not wanted.search(await self._metrics()):  # noqa: ASYNC110
                await trio.sleep(0.05)
            return
        raise DemoError(f"the proxy does not count {label} in {metric}")

    # --- what was lost ---------------------------------------------------------------------------

    def _show_losses(self) -> bool:
        """Print what was lost, and return whether that was nothing."""
        self._title("What was lost")
        losses = judge_losses(self._audiences, self.killed, self.cut)
        self.console.print(table_of(self._audiences, losses))
        sessions = losses.sessions
        self._line(f"Matches that went on with the old game server: {sum(sessions.kept)}.")
        self._line(
            f"Matches that had to change the server, or were cut: {sessions.moved + self.cut}."
        )
        if losses.died:
            self._line(f"Died with v2-a, which was working on them: {losses.died}.", "yellow")
        if losses.nothing:
            self._line(f"Nothing{' else' if losses.died else ''} was lost.", "bold green")
        else:
            self._line("Something was lost: see above.", "bold red")
        return losses.nothing

    # --- telling ---------------------------------------------------------------------------------

    def _title(self, title: str, *explanation: str) -> None:
        self._step += 1
        self.console.print()
        self._line(f"{self._step}. {title}", "bold")
        for line in explanation:
            self._line(line)

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def settings_from(argv: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description="Deploys on one machine, step by step.")
    installed = Path(sys.executable).with_name("kamal-proxy")
    parser.add_argument("--proxy", type=Path, default=installed, help="the command to show")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--metrics-port", type=int, default=9100)
    parser.add_argument("--prometheus-port", type=int, default=9090)
    parser.add_argument("--udp-port", type=int, default=9999)
    parser.add_argument("--rate", type=float, default=100.0, help="a second, of each kind")
    parser.add_argument("--steady", type=float, default=2.0, help="seconds between two steps")
    parser.add_argument("--boot-seconds", type=float, default=0.5)
    parser.add_argument("--stay", action="store_true", help="leave it running at the end")
    return Settings(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    settings = settings_from(argv)
    errors: list[str] = []
    kept = False
    try:
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-story-") as folder:
            story = Story(
                program=settings.proxy,
                folder=Path(folder),
                console=Console(),
                settings=settings,
                port=free_port(settings.port),
                metrics_port=free_port(settings.metrics_port),
                udp_port=free_port(settings.udp_port, socket.SOCK_DGRAM),
            )
            kept = trio.run(story.run)
    except* (DemoError, OSError) as group:
        errors.extend(str(error) for error in leaves(group))
    except* KeyboardInterrupt:
        errors.append("stopped by Ctrl-C")
    for error in errors:
        print(f"Error: {error}", file=sys.stderr)
    return 0 if kept and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
