"""What demonstrations share: the proxy, the servers and the load as processes, and a timeline.

All processes live in a folder of their own and in sessions of their own, so that they meet no other
proxy of the machine and Ctrl-C reaches only the demonstration, which ends them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Any

import attrs
import trio
from rich.console import Console

from example.load import HOST, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

HERE = Path(__file__).resolve().parent
START_SECONDS = 10.0


class DemoError(Exception):
    """The demonstration could not be carried out; the text says why."""


@attrs.frozen
class Instance:
    """A running copy of a server."""

    name: str
    target: str
    process: trio.Process

    async def kill(self) -> None:
        """End it without warning."""
        self.process.kill()
        await self.process.wait()


@attrs.define(eq=False, kw_only=True)
class Stage:
    """The processes of a demonstration.

    Attributes:
        program: The kamal-proxy command.
        folder: HOME of all of them, where the admin socket and the proxy's log are too.
        console: Where the timeline is printed.
    """

    program: Path
    folder: Path
    console: Console
    started: float = attrs.field(factory=time.monotonic)
    processes: list[trio.Process] = attrs.field(factory=list)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[trio.Nursery]:
        """Provide a nursery for what goes on besides; end it and all processes at the end.

        Raises:
            DemoError: a process or a command failed, or a signal came, inside an exception group.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                yield nursery
                nursery.cancel_scope.cancel(reason="the demonstration is complete")
        finally:
            await self._end_processes()

    async def start_proxy(
        self, nursery: trio.Nursery, port: int, *flags: str, tls: bool = False
    ) -> trio.Process:
        """Start the proxy and return its process as soon as it takes connections.

        Args:
            nursery: Where somebody waits for it to end, which is an error.
            port: Where it serves HTTP, or HTTPS with ``tls``.
            flags: Further flags of ``run``.
            tls: Whether the load comes over HTTPS.
        """
        ports = ("0", str(port)) if tls else (str(port), "0")  # 0: any
        command = [str(self.program), "run"]
        command += ["--http-port", ports[0], "--https-port", ports[1], *flags]
        with self._log.open("ab") as log:
            process = await self.open(command, stdout=log, stderr=log)
        nursery.start_soon(self._watch_proxy, process)
        with trio.move_on_after(START_SECONDS):
            # Another process offers no event to wait for.
            while not await accepts(port):  # noqa: ASYNC110
                await trio.sleep(0.02)
            where = f"https://{HOST}" if tls else "http://127.0.0.1"
            self.say(f"proxy on {where}:{port} ({as_typed(command)})")
            return process
        raise DemoError(f"the proxy did not listen within {START_SECONDS:g} s\n{self._log_end()}")

    async def start_server(
        self, script: str, version: str, name: str, boot_seconds: float, *flags: str
    ) -> Instance:
        """Start webapp.py or udpserver.py on any free port, with further flags of its own."""
        process = await self.open(
            [
                sys.executable,
                str(HERE / script),
                "--port=0",
                f"--version={version}",
                f"--name={name}",
                f"--boot-seconds={boot_seconds}",
                *flags,
            ],
            stdout=PIPE,
        )
        assert process.stdout is not None
        with trio.move_on_after(START_SECONDS):
            line = (await process.stdout.receive_some()).decode()
            if found := re.search(r"listening on (\S+)", line):
                boots = f", needs {boot_seconds:g} s to boot" if boot_seconds else ""
                self.say(f"{name} started{boots}")
                return Instance(name, found[1], process)
        raise DemoError(f"{name} did not start")

    async def start_load(self, module: str, *flags: str) -> trio.Process:
        """Start load.py or one of its kind, which writes records until its input ends."""
        return await self.open(
            [sys.executable, "-m", module, *flags], stdin=PIPE, stdout=PIPE, cwd=HERE.parent
        )

    async def read_load(self, load: trio.Process, note: Callable[[Request], None]) -> None:
        """Read the records of a load to their end, and hand each to ``note``."""
        assert load.stdout is not None
        rest = b""
        async for data in load.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                note(Request(*json.loads(line)))
        if status := await load.wait():
            raise DemoError(f"the load generator ended with status {status}")

    async def command(self, *arguments: str, fails: bool = False) -> str:
        """Run a client command, which must succeed unless it ``fails``; return what it printed.

        Raises:
            DemoError: it ended otherwise than it had to.
        """
        command = [str(self.program), *arguments]
        self.say(f"$ {as_typed(command)}", "cyan")
        done = await trio.run_process(
            command,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=self.environment(),
            start_new_session=True,
        )
        if fails:
            if not done.returncode:
                raise DemoError(f"{as_typed(command)} should have failed")
            return done.stderr.decode()
        if done.returncode:
            raise DemoError(f"{as_typed(command)} failed:\n{done.stderr.decode()}")
        return done.stdout.decode()

    async def open(self, command: list[str], **options: Any) -> trio.Process:
        """Start a process that is killed at the end."""
        process = await trio.lowlevel.open_process(
            command,
            **{"stdin": DEVNULL, **options},
            env=self.environment(),
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def environment(self) -> Mapping[str, str]:
        """Return the environment of all processes."""
        private = {
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder),
            "KAMAL_PROXY_SOCKET": str(self.folder / "kamal-proxy.sock"),
        }
        return {**os.environ, **private}

    def say(self, text: str, style: str = "") -> None:
        """Print one line of the timeline."""
        line = f"{time.monotonic() - self.started:6.2f}s  {text}"
        self.console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)

    @property
    def _log(self) -> Path:
        return self.folder / "proxy.log"

    def _log_end(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-10:])

    async def _watch_proxy(self, process: trio.Process) -> None:
        status = await process.wait()
        raise DemoError(f"the proxy ended with status {status}\n{self._log_end()}")

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                raise DemoError(f"stopped by {signal.Signals(number).name}")

    async def _end_processes(self) -> None:
        with trio.CancelScope(shield=True):
            for process in self.processes:
                process.kill()
            for process in self.processes:
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()


def free_port(preferred: int, kind: int = socket.SOCK_STREAM) -> int:
    """Return the first free port from ``preferred`` on; any free one if that is 0.

    Args:
        preferred: The port that would be best.
        kind: ``socket.SOCK_STREAM`` for a TCP port, ``socket.SOCK_DGRAM`` for a UDP port.

    Raises:
        DemoError: the next hundred are all taken.
    """
    for port in range(preferred, preferred + 100):
        with socket.socket(type=kind) as probe:
            if kind == socket.SOCK_STREAM:
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


async def accepts(port: int) -> bool:
    """Tell whether somebody takes connections to a port of this machine."""
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True


def milliseconds(seconds: float) -> str:
    """Return a time as tables show it."""
    return f"{seconds * 1000:.1f} ms"


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Return the exceptions that a group holds, however deep."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
