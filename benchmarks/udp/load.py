"""Drives ``load.c``, which is the clients and the echo server, and reads what it reports."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.udp.shapes import Shape

SOURCES = Path(__file__).parent


@attrs.frozen
class Report:
    """What became of the requests of one run.

    Attributes:
        answered: Requests whose answer came in time.
        lost: Requests that had no answer after a second.
        late: Answers that came after that, or a second time.
        out_of_order: Answers that came after one to a later request of the same session.
        wrong: Answers that are not what this session had asked, or not all of it.
        newcomers_answered: Sources beside the sessions that got their datagram back.
        seconds: What the run took.
        median: Median time from a request to its answer, in seconds.
        p99: 99th percentile of it.
    """

    answered: int
    lost: int
    late: int
    out_of_order: int
    wrong: int
    newcomers_answered: int
    seconds: float
    median: float
    p99: float


@attrs.define(eq=False)
class Load:
    """A running ``load``.

    Attributes:
        port: The echo server's, on 127.0.0.1.
    """

    port: int
    _process: subprocess.Popen[str]

    def run(
        self,
        port: int,
        shape: Shape,
        requests: int = 0,
        *,
        seconds: int = 0,
        window: int = 0,
        newcomers: int = 0,
    ) -> Report:
        """Make requests to a relay, or straight to the echo server, and wait for the answers.

        Args:
            port: Where to, on 127.0.0.1.
            shape: Which requests.
            requests: How many.
            seconds: For how long, if no number of requests is given.
            window: How many in flight; 0 is what the shape says.
            newcomers: How many further sources send a datagram each meanwhile.

        Raises:
            BenchmarkError: the load ended, or nothing was answered for some seconds.
        """
        window = window or shape.window
        assert self._process.stdin is not None
        self._process.stdin.write(
            f"{port} {shape.sessions} {shape.payload} {window} {requests} {seconds} {newcomers}\n"
        )
        self._process.stdin.flush()
        return _report(port, self.line())

    def line(self) -> str:
        """Return the next line that it prints.

        Raises:
            BenchmarkError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the load generator ended with status {self._process.wait()}")
        return line


def _report(port: int, line: str) -> Report:
    read: dict[str, Any] = json.loads(line)
    if read["stalled"] or not read["answered"]:
        raise BenchmarkError(
            f"port {port} has stopped answering: {read['answered']} answers to"
            f" {read['requests']} requests"
        )
    return Report(**{field.name: read[field.name] for field in attrs.fields(Report)})


@contextmanager
def running_load(program: Path, echo_port: int, client_port: int, *, spin: bool) -> Iterator[Load]:
    """Run the compiled ``load`` for as long as the context lasts.

    Args:
        program: Its path.
        echo_port: UDP port for the echo server.
        client_port: UDP port of all clients, at addresses of their own.
        spin: Whether it may keep its core busy during a run.
    """
    command = [str(program), str(echo_port), str(client_port), str(int(spin))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            load = Load(echo_port, process)
            load.line()  # it is ready
            yield load
        finally:
            process.kill()
