"""Drives ``media.c``, which is the callers and their media server, and reads what it reports."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.udp.shapes import Shape

# Of media.c. A media server has the ports of its relay, so it needs another address.
SERVER, RELAY = "127.0.0.2", "127.0.0.1"


@attrs.frozen
class Packets:
    """What became of the packets of one run.

    Attributes:
        answered: Packets that came back.
        lost: Packets that had not when nothing came any more for a second.
        late: Packets that came after that, or a second time.
        wrong: Packets that are not what this call had sent, from where it had sent it.
    """

    answered: int
    lost: int
    late: int
    wrong: int


@attrs.define(eq=False)
class Media:
    """A running ``media``."""

    _process: subprocess.Popen[str]

    def run(self, ports: range, shape: Shape, packets: int) -> Packets:
        """Let calls send packets to a relay, and wait until they have come back.

        Args:
            ports: The relay's, in a row; those of the server are the same.
            shape: How many calls, which are spread over the ports, and how many packets are on
                their way at once, each of another call. The size is always ``RTP_BYTES``.
            packets: How many of all calls together.

        Raises:
            BenchmarkError: the load ended, or nothing came back for some seconds.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(
            f"{ports.start} {len(ports)} {shape.sessions} {shape.window} {packets}\n"
        )
        self._process.stdin.flush()
        read: dict[str, Any] = json.loads(self.line())
        if read["stalled"] or not read["answered"]:
            raise BenchmarkError(
                f"ports {ports.start}-{ports.stop - 1} have stopped answering:"
                f" {read['answered']} answers to {read['sent']} packets"
            )
        return Packets(**{field.name: read[field.name] for field in attrs.fields(Packets)})

    def line(self) -> str:
        """Return the next line that it prints.

        Raises:
            BenchmarkError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the media load ended with status {self._process.wait()}")
        return line


@contextmanager
def running_media(program: Path, ports: range, client_port: int, *, spin: bool) -> Iterator[Media]:
    """Run the compiled ``media`` for as long as the context lasts.

    Args:
        program: Its path.
        ports: The ports of the media server, in a row.
        client_port: UDP port of all callers, at addresses of their own.
        spin: Whether it may keep its core busy during a run.
    """
    command = [str(program), str(ports.start), str(len(ports)), str(client_port), str(int(spin))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            media = Media(process)
            media.line()  # it is ready
            yield media
        finally:
            process.kill()
