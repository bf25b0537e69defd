"""docs/tour.md is true: its commands run one after the other in one shell, and print what it says.

Ports of the page stand for free ones with as many digits. What differs from run to run is compared
by ``VARYING`` only. A command that reads the log or the metrics is repeated until it prints what
the page says, because a request is logged and counted just after its client got the answer.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import socket
import sys
from contextlib import asynccontextmanager
from subprocess import PIPE, STDOUT
from typing import TYPE_CHECKING

import trio

from tests.e2e.programs import needs
from tests.examples import examples_in
from tests.running import ROOT, environment, open_directory
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.examples import Example

PAGE = ROOT / "docs" / "tour.md"
PORTS = ("8080", "8443", "9090", "3001", "3002", "3003", "3009", "7001", "7002", "7003", "9999")
LIMIT = 30.0  # seconds for one command
VARYING = (
    (r'"(time|request_id|client_port)":"[^"]*"', r'"\1":…'),
    (r'"duration":\d+', '"duration":…'),
    (r"kamal-writer=\d+; (.*)Expires=[^;]*", r"kamal-writer=…; \1Expires=…"),
    (r"(X-Request-ID: |X-Request-Start: t=)\S+", r"\1…"),
    (r"curl/[\d.]+", "curl/…"),
    (r"\x1b\[[\d;]*m| +$", ""),  # colours of the table, and the padding after its last column
)
# What bash says about a job that was killed. A reader's shell says more about jobs, and elsewhere.
_JOB_NOTICE = re.compile(r"bash: line \d+: +\d+ (Terminated|Killed)")
_END = "\x01"  # printed after each command, with its exit code


class Shell:
    """One bash that runs command after command, as a reader types them."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input = process.stdin
        self._output = process.stdout

    async def run(self, command: str) -> tuple[str, int]:
        """Run a command and return what it printed, and its exit code."""
        # In braces, not in a subshell: variables and jobs must outlive the command.
        script = f"{{ {command}\n}} </dev/null 2>&1; printf '{_END}%d{_END}' $?\n"
        printed = b""
        with trio.fail_after(LIMIT):
            await self._input.send_all(script.encode())
            while printed.count(_END.encode()) < 2:
                data = await self._output.receive_some()
                assert data, f"the shell has ended: {printed.decode()}"
                printed += data
        text, code, _ = printed.decode().replace("\r\n", "\n").split(_END)
        return text, int(code)


@asynccontextmanager
async def open_shell(directory: Path) -> AsyncIterator[Shell]:
    """Start a shell in a directory that looks like the repository after ``make build``.

    All that it started, in the background too, is killed at the end.
    """
    (directory / "example").symlink_to(ROOT / "example")
    commands = directory / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, arguments in (("kamal-proxy", "-m kamal_proxy "), ("python3", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        script.chmod(0o755)
    process = await trio.lowlevel.open_process(
        ["bash", "--norc"],
        cwd=directory,
        env=environment(directory),
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdin, process.stdout:
            yield Shell(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()


def free_ports() -> dict[str, str]:
    """Return a free port for each of the page's, with four digits as these have.

    They are below those that the system gives to connections, so that they stay free.
    """
    found: dict[str, str] = {}
    # A number of the page must not be taken for a port in its output.
    candidates = [port for port in range(5000, 10000) if str(port) not in PAGE.read_text()]
    random.shuffle(candidates)
    while len(found) < len(PORTS):
        port = candidates.pop()
        with socket.socket() as sock, socket.socket(type=socket.SOCK_DGRAM) as udp:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((LOCALHOST, port))
                udp.bind((LOCALHOST, port))
            except OSError:
                continue
        found[PORTS[len(found)]] = str(port)
    return found


def replace_words(text: str, words: dict[str, str]) -> str:
    return re.sub(r"\b(" + "|".join(words) + r")\b", lambda found: words[found[0]], text)


def comparable(text: str) -> list[str]:
    """Leave out what differs from run to run."""
    for pattern, shown in VARYING:
        text = re.sub(pattern, shown, text, flags=re.MULTILINE)
    return [line for line in text.splitlines() if not _JOB_NOTICE.match(line)]


async def outcome(shell: Shell, example: Example, ports: dict[str, str]) -> tuple[list[str], int]:
    """Run an example and return the lines that it printed, comparable, and its exit code."""
    text, code = await shell.run(replace_words(example.command, ports))
    return comparable(replace_words(text, {real: shown for shown, real in ports.items()})), code


@needs("curl", package="curl")
async def test_the_tour_is_true() -> None:
    ports = free_ports()
    async with open_directory() as directory, open_shell(directory) as shell:
        for example in examples_in(PAGE):
            code = int(example.comment.removeprefix("exit ") or 0)
            wanted = (comparable("\n".join(example.output)), code)
            got = await outcome(shell, example, ports)
            deadline = trio.current_time() + LIMIT
            while got != wanted and is_repeatable(example) and trio.current_time() < deadline:
                got = await outcome(shell, example, ports)
            assert got == wanted, f"{PAGE.name}:{example.line}: {example.command}"


def is_repeatable(example: Example) -> bool:
    return bool(re.search(r"\.demo/tour/log|/metrics", example.command))
