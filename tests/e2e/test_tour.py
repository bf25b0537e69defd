"""docs/tour.md is true: its commands run one after the other in one shell, and print what it says.

Ports of the page stand for free ones with as many digits. What differs from run to run is compared
by ``VARYING`` only. A command that reads the log or the metrics is repeated until it prints what
the page says, because a request is logged and counted just after its client got the answer.
"""

from __future__ import annotations

import random
import re
import socket
from typing import TYPE_CHECKING

import trio

from tests.e2e.programs import needs
from tests.e2e.shell import LIMIT, Shell, comparable, open_shell, replace_words
from tests.pages import examples_in
from tests.running import ROOT, open_directory
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from tests.pages import Example

PAGE = ROOT / "docs" / "tour.md"
PORTS = ("8080", "8443", "9090", "3001", "3002", "3003", "3009", "7001", "7002", "7003", "9999")


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


async def outcome(shell: Shell, example: Example, ports: dict[str, str]) -> tuple[list[str], int]:
    """Run an example and return the lines that it printed, comparable, and its exit code."""
    text, code = await shell.run(replace_words(example.command, ports))
    return comparable(replace_words(text, {real: shown for shown, real in ports.items()})), code


@needs("curl", package="curl")
async def test_the_tour_is_true() -> None:
    ports = free_ports()
    async with open_directory() as directory, open_shell(directory) as shell:
        for example in examples_in(PAGE):
            assert example.output is not None
            code = int(example.comment.removeprefix("exit ") or 0)
            wanted = (comparable("\n".join(example.output)), code)
            got = await outcome(shell, example, ports)
            deadline = trio.current_time() + LIMIT
            while got != wanted and is_repeatable(example) and trio.current_time() < deadline:
                got = await outcome(shell, example, ports)
            assert got == wanted, f"{PAGE.name}:{example.line}: {example.command}"


def is_repeatable(example: Example) -> bool:
    return bool(re.search(r"\.demo/tour/log|/metrics", example.command))
