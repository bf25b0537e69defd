"""A shell that types what pages of the documentation show; what it prints, made comparable."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from contextlib import asynccontextmanager
from subprocess import PIPE, STDOUT
from typing import TYPE_CHECKING

import trio

from tests.running import ROOT, environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

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
async def open_shell(directory: Path, wrapper: Sequence[str] = ()) -> AsyncIterator[Shell]:
    """Start a shell in a directory that looks like the repository after ``make build``.

    All that it started, in the background too, is killed at the end.

    Args:
        directory: Where.
        wrapper: A command that the shell is started through.
    """
    (directory / "example").symlink_to(ROOT / "example")
    commands = directory / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, arguments in (("kamal-proxy", "-m kamal_proxy "), ("python3", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        script.chmod(0o755)
    process = await trio.lowlevel.open_process(
        [*wrapper, "bash", "--norc"],
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


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """Put other words in the place of some."""
    pattern = "|".join(map(re.escape, words))
    return re.sub(rf"(?<!\w)({pattern})\b", lambda found: words[found[0]], text)


def comparable(text: str) -> list[str]:
    """Leave out what differs from run to run."""
    for pattern, shown in VARYING:
        text = re.sub(pattern, shown, text, flags=re.MULTILINE)
    return [line for line in text.splitlines() if not _JOB_NOTICE.match(line)]
