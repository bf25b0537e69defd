"""Programs that others wrote, for tests to talk to: run in a directory, and read as they print."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.running import environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Servers and games are not where everybody's shell looks for programs.
PROGRAMS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/games"


def needs(*programs: str, package: str) -> pytest.MarkDecorator:
    """Skip a test where a program is not installed."""
    missing = [program for program in programs if shutil.which(program, path=PROGRAMS) is None]
    reason = f"{', '.join(missing)} is not installed (apt-get install {package})"
    return pytest.mark.skipif(bool(missing), reason=reason)


@attrs.define(eq=False)
class Program:
    """A running program and what it prints, to either stream."""

    process: trio.Process
    output: str = ""
    _ended: bool = False
    _news: trio.Event = attrs.field(factory=trio.Event)

    async def read(self) -> None:
        """Read all that it prints."""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self.output += data.decode(errors="replace")
            self._tell()
        self._ended = True
        self._tell()

    async def wait_for(self, text: str) -> None:
        """Wait until it has printed a text."""
        while text not in self.output:
            assert not self._ended, f"it ended without {text!r}: {self.output}"
            await self._news.wait()

    def count(self, pattern: str) -> int:
        """Return how many lines of a kind it has printed."""
        return len(re.findall(pattern, self.output, re.MULTILINE))

    async def wait_count(self, pattern: str, count: int) -> None:
        """Wait until it has printed that many lines of a kind."""
        while self.count(pattern) < count:
            assert not self._ended, f"it ended too soon: {self.output}"
            await self._news.wait()

    async def wait(self) -> str:
        """Wait for its end, which must be a good one; return what it printed."""
        while not self._ended:
            await self._news.wait()
        assert await self.process.wait() == 0, self.output
        return self.output

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


@asynccontextmanager
async def open_program(directory: Path, *command: str) -> AsyncIterator[Program]:
    """Run a program in a directory, which is its home too; it is killed at the end."""
    process = await trio.lowlevel.open_process(
        command,
        cwd=directory,
        env=environment(directory, {"PATH": PROGRAMS}),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
    )
    assert process.stdout is not None
    program = Program(process)
    async with process.stdout, trio.open_nursery() as nursery:
        nursery.start_soon(program.read)
        try:
            yield program
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        nursery.cancel_scope.cancel()


def processes_of(folder: Path) -> list[str]:
    """Return the processes that have ``folder`` in their environment's TMPDIR."""
    mark = f"TMPDIR={folder}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = entry.read_bytes()
        except OSError:
            continue  # ended meanwhile, or another user's
        if mark in environment + b"\0":
            found.append(entry.parent.name)
    return found


async def output_of(directory: Path, *command: str) -> str:
    """Run a program to its end and return what it printed."""
    async with open_program(directory, *command) as program:
        return await program.wait()
