"""Starts programs for a benchmark and reads what they use from ``/proc`` (Linux only).

A program is measured together with its child processes, as nginx does its work in one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_SECONDS = 10.0


class BenchmarkError(Exception):
    """The benchmark cannot be run; the text says why."""


@attrs.frozen
class Running:
    """A program that accepts connections on ``port`` of 127.0.0.1, by TLS on ``tls_port``."""

    name: str
    pid: int
    port: int
    log: Path
    tls_port: int = 0

    def cpu_seconds(self) -> float:
        """Return the user and system time that the program and its children have used."""
        return sum(_stat(pid).cpu_ticks for pid in family(self.pid)) / TICKS_PER_SECOND

    def rss_bytes(self) -> int:
        """Return the resident memory of the program and its children; shared pages count twice."""
        return sum(_stat(pid).rss_pages for pid in family(self.pid)) * PAGE_BYTES


@attrs.frozen
class _Stat:
    parent: int
    cpu_ticks: int
    rss_pages: int


def _stat(pid: int) -> _Stat:
    # The name, in parentheses, may hold anything; proc(5) numbers the fields after it from 3.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    # utime, stime and those of children that have ended
    ticks = sum(int(fields[number - 3]) for number in (14, 15, 16, 17))
    return _Stat(int(fields[4 - 3]), ticks, int(fields[24 - 3]))


def family(pid: int) -> list[int]:
    """Return ``pid`` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = _stat(int(entry.name)).parent
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def need(program: str, package: str) -> str:
    """Return the path of a program.

    Raises:
        BenchmarkError: it is not installed; names the package to install.
    """
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        raise BenchmarkError(f"{program} is not installed: apt-get install {package}")
    return path


def compiled(source: Path, folder: Path) -> Path:
    """Compile a C program and return its path.

    Args:
        source: Its only file.
        folder: Where it is put.

    Raises:
        BenchmarkError: there is no compiler, or it failed.
    """
    program = folder / f"compiled-{source.stem}"
    command = [need("gcc", "gcc libc6-dev"), "-O2", "-Wall", "-Wextra", "-o", str(program)]
    done = subprocess.run([*command, str(source)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{source.name} does not compile:\n{done.stderr.strip()}")
    return program


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run a program that listens on ``port`` for as long as the context lasts.

    Its output is appended to a file in ``folder``.

    Raises:
        BenchmarkError: it does not exist, ended, or did not listen in time.
    """
    log = folder / f"{name}.log"
    if shutil.which(command[0]) is None:
        raise BenchmarkError(f"{name}: there is no program {command[0]}")
    with (
        log.open("ab") as out,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process,
    ):
        try:
            _wait_until_it_listens(name, process, port, log)
            yield Running(name, process.pid, port, log)
        finally:
            process.terminate()
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_it_listens(
    name: str, process: subprocess.Popen[bytes], port: int, log: Path
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    end = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
    raise BenchmarkError(f"{name} does not listen on port {port}:\n{end}")
