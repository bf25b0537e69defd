"""Running proxies: one embedded in the test, and the real command as a process.

Both collect their log lines in a :class:`Lines`, which a test can wait on; nothing here sleeps.
The command gets a short temporary directory as HOME and XDG_RUNTIME_DIR (the path of a Unix socket
must be short) and port 0, so that tests never meet each other or a proxy of the machine. With the
path of an installed kamal-proxy in TEST_PROGRAM, that one is run instead of this source tree's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import trio

from kamal_proxy import DeployOptions, Proxy, RunOptions, open_proxy
from kamal_proxy.run_options import AcmeOptions
from kamal_proxy.sockets import Poller, SocketStream
from tests.scripted import fail_hanging_test

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

ROOT = Path(__file__).parents[1]
INSTANCE = Path(__file__).with_name("instance.py")
# With KAMAL_PROXY_LANE=false all HTTP tests are about the tasks and h11: make test-h11.
LANE = os.environ.get("KAMAL_PROXY_LANE") != "false"
# No test may ask a real certificate authority for anything.
NO_AUTHORITY = "https://127.0.0.1:1/dir"
START_LIMIT = 30.0  # seconds; a hang must fail a test, not the whole run
STOP_LIMIT = 15.0

Line = dict[str, Any]

# What the line of a request that ended well holds after time, level and message, in this order.
REQUEST_FIELDS = [
    "host",
    "port",
    "path",
    "request_id",
    "status",
    "service",
    "target",
    "duration",
    "method",
    "req_content_length",
    "req_content_type",
    "resp_content_length",
    "resp_content_type",
    "client_addr",
    "client_port",
    "remote_addr",
    "user_agent",
    "proto",
    "scheme",
    "query",
]


class Lines:
    """JSON log lines in the order they were written."""

    def __init__(self) -> None:
        self.all: list[Line] = []
        self._news = trio.Event()
        self.ended = False

    def add(self, text: str) -> None:
        """Take one line."""
        self.all.append(json.loads(text))
        self.tell()

    def tell(self) -> None:
        """Wake everyone who waits."""
        self._news.set()
        self._news = trio.Event()

    @property
    def requests(self) -> list[Line]:
        """The access log."""
        return [line for line in self.all if line["msg"] == "Request"]

    async def wait_for(self, wanted: Callable[[Line], bool]) -> Line:
        """Wait for a line and return it; the first one that matches, also if it is there."""
        seen = 0
        while True:
            for line in self.all[seen:]:
                seen += 1
                if wanted(line):
                    return line
            assert not self.ended, "the log ended without the line"
            await self._news.wait()

    async def wait_for_message(self, message: str) -> Line:
        """Wait for a line with this ``msg`` and return it."""
        return await self.wait_for(lambda line: line["msg"] == message)

    async def wait_ended(self) -> None:
        """Wait until no more lines can come."""
        while not self.ended:
            await self._news.wait()

    async def wait_requests(self, count: int) -> list[Line]:
        """Wait until that many requests were logged and return them all."""
        while len(self.requests) < count:
            assert not self.ended, "the log ended before that many requests"
            await self._news.wait()
        return self.requests


@attrs.define(eq=False)
class Embedded:
    """An embedded proxy and its log.

    Attributes:
        proxy: The proxy itself.
        lines: Its log.
    """

    proxy: Proxy
    lines: Lines
    _poller: _CountingPoller

    @property
    def port(self) -> int:
        """Where it serves HTTP."""
        return self.proxy.http_port

    @property
    def https_port(self) -> int:
        """Where it serves HTTPS."""
        return self.proxy.https_port

    @property
    def open_streams(self) -> int:
        """How many connections, to clients and to targets, it has open now."""
        return len(self._poller)

    async def deploy(self, options: DeployOptions) -> None:
        """Deploy."""
        await self.proxy.deploy(options)

    async def wait_streams(self, count: int) -> None:
        """Wait until exactly that many streams are open."""
        while self.open_streams != count:
            await self._poller.changed.wait()

    async def wait_streams_at_least(self, count: int) -> None:
        """Wait until at least that many streams are open."""
        while self.open_streams < count:
            await self._poller.changed.wait()


class _CountingPoller(Poller):
    """A poller that tells when it has got or lost a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = trio.Event()

    def open_stream(self, sock: socket.socket) -> SocketStream:
        stream = super().open_stream(sock)
        self._tell()
        return stream

    def forget(self, fd: int) -> None:
        super().forget(fd)
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@asynccontextmanager
async def open_embedded(**options: Any) -> AsyncIterator[Embedded]:
    """Run a proxy on port 0 without state and admin API, unless ``options`` of run say otherwise.

    It is stopped gracefully at the end, in a second at most.
    """
    poller = _CountingPoller()
    lines = Lines()
    settings: dict[str, Any] = {
        "http_port": 0,
        "bind": "127.0.0.1",
        "shutdown_timeout": 2.0,
        "lane": LANE,
        "acme": AcmeOptions(directory=NO_AUTHORITY),
    }
    with ExitStack() as patched:
        patched.enter_context(patch("kamal_proxy.proxy.Poller", return_value=poller))
        async with (
            open_proxy(RunOptions(**(settings | options)), log=lines.add) as running,
            trio.open_nursery() as nursery,
        ):
            patched.close()
            nursery.start_soon(fail_hanging_test)
            yield Embedded(running, lines, poller)
            nursery.cancel_scope.cancel()


@attrs.frozen
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


class Command:
    """A running ``kamal-proxy run`` and the client commands that talk to it.

    Attributes:
        process: The process.
        lines: What it logged to standard output.
        errors: What it wrote to standard error.
        directory: Its HOME and XDG_RUNTIME_DIR.
        port: Where it serves HTTP.
        https_port: Where it serves HTTPS.
    """

    def __init__(self, process: trio.Process, directory: Path) -> None:
        self.process = process
        self.lines = Lines()
        self.directory = directory
        self.errors = b""
        self.errors_ended = trio.Event()
        self.port = 0
        self.https_port = 0

    @property
    def pid(self) -> int:
        """The proxy's process id."""
        return self.process.pid

    @property
    def state_path(self) -> Path:
        """Its saved state."""
        return state_path(self.directory)

    async def kp(self, *arguments: str) -> Result:
        """Run a client command against this proxy."""
        return await kp(self.directory, *arguments)

    async def deploy(self, *arguments: str) -> None:
        """Deploy; must succeed silently."""
        result = await self.kp("deploy", *arguments)
        assert (result.code, result.out, result.err) == (0, "", "")

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code (negative: killed by a signal)."""
        self.process.send_signal(number)
        return await self.wait()

    async def wait(self) -> int:
        """Wait for its end and return the exit code."""
        with trio.fail_after(STOP_LIMIT):
            return await self.process.wait()


def command_line(*arguments: str) -> list[str]:
    """Return the command line that runs the command from this source tree, or ``TEST_PROGRAM``."""
    program = os.environ.get("TEST_PROGRAM")
    return [*([program] if program else [sys.executable, "-m", "kamal_proxy"]), *arguments]


def environment(directory: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command that lives in ``directory``."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KAMAL_PROXY_")
        and name not in ("DEBUG", "HTTP_PORT", "HTTPS_PORT", "METRICS_PORT", "UDP_PORT", "TMPDIR")
    }
    own = {
        "HOME": str(directory),
        "XDG_RUNTIME_DIR": str(directory),
        "KAMAL_PROXY_ACME_DIRECTORY": NO_AUTHORITY,
        "KAMAL_PROXY_LANE": str(LANE).lower(),
    }
    if "TEST_PROGRAM" not in os.environ:  # another program must not find this package
        own["PYTHONPATH"] = str(ROOT)
    return clean | own | dict(extra or {})


def state_path(directory: Path) -> Path:
    """Return where the state of a proxy with this HOME is saved."""
    return directory / ".config" / "kamal-proxy" / "kamal-proxy.state"


async def kp(
    directory: Path, *arguments: str, variables: Mapping[str, str] | None = None
) -> Result:
    """Run a command with the environment of ``directory`` to its end."""
    with trio.fail_after(60):
        done = await trio.run_process(
            command_line(*arguments),
            env=environment(directory, variables),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def open_directory() -> AsyncIterator[Path]:
    """Provide a temporary directory with a short path."""
    with tempfile.TemporaryDirectory(prefix="kp-") as name:
        yield Path(name)


@asynccontextmanager
async def open_command(
    directory: Path,
    *arguments: str,
    wrapper: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    read_output: bool = True,
    stop: bool = True,
) -> AsyncIterator[Command]:
    """Start the real command, wait until it serves, and stop it at the end.

    Args:
        directory: Its HOME and XDG_RUNTIME_DIR.
        arguments: Further arguments of ``run``; ``--http-port 0`` and ``--https-port 0`` are there
            already.
        wrapper: A command that the proxy is started through.
        variables: Further variables of its environment.
        read_output: Whether to go on reading its log once it has started.
        stop: Whether to send SIGTERM at the end and require exit code 0; a test that ends the
            process itself says no.
    """
    process = await trio.lowlevel.open_process(
        [*wrapper, *command_line("run", "--http-port", "0", "--https-port", "0", *arguments)],
        env=environment(directory, variables),
        stdout=PIPE,
        stderr=PIPE,
    )
    command = Command(process, directory)
    assert process.stdout is not None
    assert process.stderr is not None
    async with process.stdout, process.stderr, trio.open_nursery() as nursery:
        try:
            nursery.start_soon(fail_hanging_test)
            nursery.start_soon(_read_errors, process.stderr, command)
            reading = trio.CancelScope()
            nursery.start_soon(_read_lines, process.stdout, command.lines, reading)
            with trio.fail_after(START_LIMIT):
                command.port = await _wait_started(command)
            if not read_output:
                reading.cancel()
            yield command
            if stop:
                assert await command.stop() == 0, command.errors.decode()
                assert command.errors == b""
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
            nursery.cancel_scope.cancel()


async def _wait_started(command: Command) -> int:
    try:
        started = await command.lines.wait_for_message("Server started")
    except AssertionError as error:
        await command.errors_ended.wait()
        raise AssertionError(f"the command did not start: {command.errors.decode()}") from error
    command.https_port = started["https"]
    port: int = started["http"]
    return port


async def _read_lines(
    stream: trio.abc.ReceiveStream, lines: Lines, reading: trio.CancelScope
) -> None:
    with reading:
        rest = b""
        async for data in stream:
            *complete, rest = (rest + data).split(b"\n")
            for line in complete:
                lines.add(line.decode())
        lines.ended = True
        lines.tell()


async def _read_errors(stream: trio.abc.ReceiveStream, command: Command) -> None:
    async for data in stream:
        command.errors += data
    command.errors_ended.set()


@attrs.define(eq=False)
class Instance:
    """A process that is one instance of an application (``tests/instance.py``)."""

    name: str
    process: trio.Process
    port: int

    @property
    def target(self) -> str:
        """Its ``host:port``, for a deploy."""
        return f"127.0.0.1:{self.port}"

    async def kill(self) -> None:
        """End it at once, as SIGKILL does."""
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def open_instance(name: str, port: int = 0) -> AsyncIterator[Instance]:
    """Start an instance and wait until it listens; it is killed at the end."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", str(INSTANCE), name, str(port)], stdout=PIPE
    )
    assert process.stdout is not None
    try:
        text = b""
        with trio.fail_after(START_LIMIT):
            while not text.endswith(b"\n"):
                more = await process.stdout.receive_some()
                assert more, "the instance ended before it listened"
                text += more
        yield Instance(name, process, int(text))
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdout.aclose()
