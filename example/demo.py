"""The demonstration: redeploy a web application under load and measure what its clients notice.

Starts the installed command, instances of webapp.py and the load of load.py as processes, and
drives the proxy as a user would, through ``kamal-proxy deploy``. As soon as a deploy returns, the
instance it replaced is killed without warning. Exits with 1 unless every request was answered by
an instance that was allowed to, and the proxy gave back the memory and the descriptors it took.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import attrs
import trio
from rich.console import Console
from rich.table import Table

from example.certificate import write_certificate
from example.footprint import MIB, Growth, descriptors_of, memory_of
from example.load import HOST, Request
from example.stage import DemoError, Instance, Stage, free_port, leaves, milliseconds
from example.verdict import Deploy, Verdict, judge

FAILURES_SHOWN = 5
CROSSINGS_SHOWN = 10


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


@attrs.define(eq=False, kw_only=True)
class Demo(Stage):
    """One run: what the processes were told, and what the load recorded.

    Attributes:
        settings: What to do.
        port: Where the proxy serves HTTP or HTTPS.
    """

    service: ClassVar = "web"
    script: ClassVar = "webapp.py"

    settings: Settings
    port: int
    requests: list[Request] = attrs.field(factory=list)
    deploys: list[Deploy] = attrs.field(factory=list)
    failures: int = 0
    _expected: str = ""

    @property
    def _server_flags(self) -> tuple[str, ...]:
        return ()

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
        async with self.opened() as nursery:
            proxy = await self.start_proxy(nursery, self.port, tls=self.settings.tls)
            growth = await self._drive(proxy.pid, nursery)
        return judge(self.requests, self.deploys), growth

    async def _drive(self, proxy: int, nursery: trio.Nursery) -> Growth:
        settings = self.settings
        if settings.tls:
            write_certificate(HOST, self._certificate, self._key)
        current = await self._start_instance(1)
        descriptors = descriptors_of(proxy)
        await self._deploy(current)
        load = await self._start_load()
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
        await self.command("remove", self.service)
        with trio.move_on_after(settings.settle_seconds):
            # It notices by and by that the clients are gone; that offers no event either.
            while descriptors_of(proxy) > descriptors:  # noqa: ASYNC110
                await trio.sleep(0.05)
        return attrs.evolve(growth, descriptors_after=descriptors_of(proxy))

    async def _switch(self, old: Instance, number: int) -> Instance:
        new = await self._start_instance(number)
        await self._deploy(new)
        await old.kill()
        self.say(f"{old.name} killed")
        return new

    async def _start_instance(self, number: int) -> Instance:
        version = "v1" if number % 2 else "v2"
        boot_seconds = self.settings.boot_seconds
        name = f"{version}#{number}"
        return await self.start_server(
            self.script, version, name, boot_seconds, *self._server_flags
        )

    async def _deploy(self, instance: Instance) -> None:
        self._expected = instance.name
        began = time.monotonic()
        await self._deploy_target(instance.target)
        deploy = Deploy(instance.name, began, time.monotonic())
        self.deploys.append(deploy)
        self.say(f"deploy returned after {deploy.returned - deploy.began:.2f} s")

    async def _deploy_target(self, target: str) -> None:
        secure = []
        if self.settings.tls:
            secure = [f"--host={HOST}", "--tls", f"--tls-certificate-path={self._certificate}"]
            secure += [f"--tls-private-key-path={self._key}"]
        await self.command("deploy", self.service, f"--target={target}", *secure)

    async def _start_load(self) -> trio.Process:
        settings = self.settings
        load = await self.start_load(
            "example.load",
            f"--port={self.port}",
            f"--rate={settings.rate}",
            f"--connections={settings.connections}",
            f"--slow-connections={settings.slow_connections}",
            f"--slow-seconds={settings.slow_seconds}",
            *([f"--ca={self._certificate}"] if settings.tls else []),
        )
        self.say(
            f"load: {settings.connections} keep-alive clients send {settings.rate:g} requests/s"
            f"{', every other one with HTTP/2' if settings.tls else ''}, "
            f"{settings.slow_connections} more always have a slow one in flight"
        )
        return load

    async def _read_load(self, load: trio.Process, done: trio.Event) -> None:
        await self.read_load(load, self._note)
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
        ("median request", milliseconds(verdict.median)),
        ("99th percentile", milliseconds(verdict.p99)),
        ("slowest request", milliseconds(verdict.slowest)),
        ("slowest request during a switch", milliseconds(verdict.slowest_switching)),
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
            demo = Demo(
                program=settings.proxy,
                folder=Path(folder),
                console=console,
                settings=settings,
                port=free_port(settings.port),
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
    show(verdict, growth, console)
    return 0 if verdict.clean and not growth.leaks else 1


if __name__ == "__main__":
    sys.exit(main())
