"""The demonstration: redeploy a web application under load and measure what its clients notice.

Starts the installed command, instances of webapp.py and the load of load.py as processes, and
drives the proxy as a user would, through ``kamal-proxy deploy``. As soon as a deploy returns, the
instance it replaced is killed without warning. Exits with 1 unless every request was answered by
an instance that was allowed to, and the proxy gave back the memory and the descriptors it took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, TYPE_CHECKING, Any

import attrs
import trio
from rich.console import Console
from rich.table import Table

from example.certificate import write_certificate
from example.footprint import MIB, Growth, descriptors_of, memory_of
from example.load import HOST, Request
from example.verdict import Deploy, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).resolve().parent
SERVICE = "web"
START_SECONDS = 10.0
FAILURES_SHOWN = 5
CROSSINGS_SHOWN = 10


class DemoError(Exception):
    """The demonstration could not be carried out; the text says why."""


@attrs.frozen
class Settings:
    """What the demonstration does.

    Attributes:
        proxy: The kamal-proxy command.
        port: The proxy's port, or the first free one after it.
        switches: How often a new instance replaces the one before.
        steady: Seconds of load before each switch and after the last.
        rate: Small requests a second, in all.
        connections: Clients that send them, each on one keep-alive connection.
        slow_connections: Clients that always have one slow request in flight.
        slow_seconds: How long a slow request takes at most.
        boot_seconds: How long a new instance answers 503.
        max_growth: MiB by which the memory of the proxy may grow once it has seen a switch.
        settle_seconds: How long it may take to close the descriptors of clients that are gone.
        tls: Whether clients come over HTTPS, half of them with HTTP/2.
    """

    proxy: Path
    port: int
    switches: int
    steady: float
    rate: float
    connections: int
    slow_connections: int
    slow_seconds: float
    boot_seconds: float
    max_growth: float
    settle_seconds: float
    tls: bool


@attrs.frozen
class Instance:
    """A running copy of the web application."""

    name: str
    target: str
    process: trio.Process


@attrs.define(eq=False)
class Demo:
    """One run: the processes, what they were told, and what the load recorded."""

    settings: Settings
    port: int
    folder: Path
    console: Console
    started: float = attrs.field(factory=time.monotonic)
    requests: list[Request] = attrs.field(factory=list)
    deploys: list[Deploy] = attrs.field(factory=list)
    processes: list[trio.Process] = attrs.field(factory=list)
    failures: int = 0
    _expected: str = ""

    @property
    def _certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def _key(self) -> Path:
        return self.folder / "key.pem"

    async def run(self) -> tuple[Verdict, Growth]:
        """Carry it out and return what was measured, of the clients and of the proxy.

        Raises:
            DemoError: a process or a deploy failed, inside an exception group.
        """
        with (self.folder / "proxy.log").open("ab") as log:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_signals)
                    proxy = await self._start_proxy(log, nursery)
                    growth = await self._drive(proxy.pid, nursery)
                    nursery.cancel_scope.cancel(reason="the demonstration is complete")
            finally:
                await self._end_processes()
        return judge(self.requests, self.deploys), growth

    async def _drive(self, proxy: int, nursery: trio.Nursery) -> Growth:
        settings = self.settings
        if settings.tls:
            write_certificate(HOST, self._certificate, self._key)
        current = await self._start_instance(1)
        descriptors = descriptors_of(proxy)
        await self._deploy(current)
        load = await self._start_load()
        self.say(
            f"load: {settings.connections} keep-alive clients send {settings.rate:g} requests/s"
            f"{', every other one with HTTP/2' if settings.tls else ''}, "
            f"{settings.slow_connections} more always have a slow one in flight"
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
            # It notices by and by that the clients are gone; that offers no event either.
            while descriptors_of(proxy) > descriptors:  # noqa: ASYNC110
                await trio.sleep(0.05)
        return attrs.evolve(growth, descriptors_after=descriptors_of(proxy))

    async def _switch(self, old: Instance, number: int) -> Instance:
        new = await self._start_instance(number)
        await self._deploy(new)
        old.process.kill()
        await old.process.wait()
        self.say(f"{old.name} killed")
        return new

    async def _start_proxy(self, log: IO[bytes], nursery: trio.Nursery) -> trio.Process:
        ports = ("0", str(self.port)) if self.settings.tls else (str(self.port), "0")  # 0: any
        command = [str(self.settings.proxy), "run"]
        command += ["--http-port", ports[0], "--https-port", ports[1]]
        process = await self._open(command, stdout=log, stderr=log)
        nursery.start_soon(self._watch_proxy, process)
        with trio.move_on_after(START_SECONDS):
            # Another process offers no event to wait for.
            while not await _accepts(self.port):  # noqa: ASYNC110
                await trio.sleep(0.02)
            where = f"https://{HOST}" if self.settings.tls else "http://127.0.0.1"
            self.say(f"proxy on {where}:{self.port} ({as_typed(command)})")
            return process
        raise DemoError(f"the proxy did not listen within {START_SECONDS:g} s\n{self._log_end()}")

    async def _watch_proxy(self, process: trio.Process) -> None:
        status = await process.wait()
        raise DemoError(f"the proxy ended with status {status}\n{self._log_end()}")

    async def _start_instance(self, number: int) -> Instance:
        version = "v1" if number % 2 else "v2"
        name = f"{version}#{number}"
        process = await self._open(
            [
                sys.executable,
                str(HERE / "webapp.py"),
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
        secure = []
        if self.settings.tls:
            secure = [f"--host={HOST}", "--tls", f"--tls-certificate-path={self._certificate}"]
            secure += [f"--tls-private-key-path={self._key}"]
        await self._command("deploy", SERVICE, f"--target={instance.target}", *secure)
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

    async def _start_load(self) -> trio.Process:
        settings = self.settings
        secure = [f"--ca={self._certificate}"] if settings.tls else []
        return await self._open(
            [
                sys.executable,
                *("-m", "example.load"),
                f"--port={self.port}",
                f"--rate={settings.rate}",
                f"--connections={settings.connections}",
                f"--slow-connections={settings.slow_connections}",
                f"--slow-seconds={settings.slow_seconds}",
                *secure,
            ],
            stdin=PIPE,
            stdout=PIPE,
        )

    async def _read_load(self, load: trio.Process, done: trio.Event) -> None:
        assert load.stdout is not None
        assert load.stdin is not None
        rest = b""
        async for data in load.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._note(Request(*json.loads(line)))
        if status := await load.wait():
            raise DemoError(f"the load generator ended with status {status}")
        done.set()

    def _note(self, request: Request) -> None:
        self.requests.append(request)
        if request.instance and request.instance == self._expected:
            self._expected = ""
            self.say(f"first answer from {request.instance}", "green")
        if request.error:
            self.failures += 1
            if self.failures <= FAILURES_SHOWN:
                self.say(f"failure: {request.error}", "red")

    async def _report_progress(self) -> None:
        seen = 0
        while True:
            await trio.sleep(1)
            by = Counter(r.instance or "nobody" for r in self.requests[seen:])
            seen = len(self.requests)
            who = ", ".join(f"{count} by {name}" for name, count in by.items()) or "no answers"
            self.say(f"{seen:6,} requests, {self.failures} failures; last second: {who}", "dim")

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                raise DemoError(f"stopped by {signal.Signals(number).name}")

    async def _open(self, command: list[str], **options: Any) -> trio.Process:
        # A session of its own: Ctrl-C reaches only the demonstration, which ends the others.
        process = await trio.lowlevel.open_process(
            command,
            **{"stdin": DEVNULL, **options},
            env=self._environment(),
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    async def _end_processes(self) -> None:
        with trio.CancelScope(shield=True):
            for process in self.processes:
                process.kill()
            for process in self.processes:
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()

    def _environment(self) -> Mapping[str, str]:
        private = {
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder),
            "KAMAL_PROXY_SOCKET": str(self.folder / "kamal-proxy.sock"),
        }
        return {**os.environ, **private}

    def _log_end(self) -> str:
        return "\n".join((self.folder / "proxy.log").read_text().splitlines()[-10:])

    def say(self, text: str, style: str = "") -> None:
        """Print one line of the timeline."""
        line = f"{time.monotonic() - self.started:6.2f}s  {text}"
        self.console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)


def show(verdict: Verdict, growth: Growth, console: Console) -> None:
    """Print the table of what was measured, and what it means."""
    table = Table(
        title="What the clients noticed", title_justify="left", show_header=False, safe_box=True
    )
    table.add_column()
    table.add_column(justify="right")
    crossing = [switch.crossing for switch in verdict.switches]
    if len(crossing) > CROSSINGS_SHOWN:
        crossing = [sum(crossing)]
    for name, value in (
        ("requests", f"{verdict.requests:,}"),
        ("of these slow on purpose", f"{verdict.slow_requests:,}"),
        ("failures", f"{verdict.failures:,}"),
        ("answers by an instance that was not allowed to", f"{verdict.wrong:,}"),
        ("TCP connections the clients opened", f"{verdict.connections:,}"),
        ("deploys", f"{len(verdict.switches) + 1}"),
        ("switches seen by the clients", f"{sum(s.moment is not None for s in verdict.switches)}"),
        ("requests running on the old instance at a switch", " + ".join(map(str, crossing))),
        ("median request", _milliseconds(verdict.median)),
        ("99th percentile", _milliseconds(verdict.p99)),
        ("slowest request", _milliseconds(verdict.slowest)),
        ("slowest request during a switch", _milliseconds(verdict.slowest_switching)),
        ("memory of the proxy, before and after", growth.memory_text),
        ("its descriptors, before the first deploy and after all", growth.descriptors_text),
    ):
        table.add_row(name, value)
    console.print(table)
    if verdict.clean:
        console.print("Every request was answered by an instance that was allowed to.")
    else:
        console.print("The deploys were noticed: see the failures above.", style="bold red")
    for leak in growth.leaks:
        console.print(leak, style="bold red")


def free_port(preferred: int) -> int:
    """Return the first free TCP port from ``preferred`` on; any free one if that is 0.

    Raises:
        DemoError: the next hundred are all taken.
    """
    for port in range(preferred, preferred + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError(f"no free port from {preferred} on")


def as_typed(command: list[str]) -> str:
    """Return a command as a user in this directory would type it."""
    program = Path(command[0])
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), *command[1:]])


async def _accepts(port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def settings_from(argv: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description="Redeploy an application under load.")
    installed = Path(sys.executable).with_name("kamal-proxy")
    parser.add_argument("--proxy", type=Path, default=installed, help="the command to show")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--switches", type=int, default=5, help="at least one")
    parser.add_argument("--steady", type=float, default=2.0, help="seconds between switches")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second, in all")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--slow-connections", type=int, default=2)
    parser.add_argument("--slow-seconds", type=float, default=1.5)
    parser.add_argument("--boot-seconds", type=float, default=0.5)
    parser.add_argument("--max-growth", type=float, default=2.0, help="MiB of the proxy's memory")
    parser.add_argument("--settle-seconds", type=float, default=10.0)
    parser.add_argument("--tls", action="store_true", help="over HTTPS, with HTTP/1.1 and HTTP/2")
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.switches < 1:
        parser.error("--switches must be at least 1")
    return settings


def main(argv: list[str] | None = None) -> int:
    settings = settings_from(argv)
    console = Console()
    errors: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="kamal-proxy-demo-") as folder:
            demo = Demo(settings, free_port(settings.port), Path(folder), console)
            verdict, growth = trio.run(demo.run)
    except* (DemoError, OSError) as group:
        errors.extend(str(error) for error in leaves(group))
    except* KeyboardInterrupt:
        errors.append("stopped by Ctrl-C")
    if errors:
        for error in errors:
            print(f"Error: {error}", file=sys.stderr)
        return 1
    show(verdict, growth, console)
    return 0 if verdict.clean and not growth.leaks else 1


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Return the exceptions that a group holds, however deep."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


if __name__ == "__main__":
    sys.exit(main())
