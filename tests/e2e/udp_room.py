"""A UDP service that the real command runs, with its targets and clients in the test's process."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from tests.ports import free_port
from tests.scripted import LOCALHOST
from tests.udp.serving import Client, Target

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.running import Command, Result

NOTHING = "0 sessions completed, 0 cut\n"
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@attrs.define(eq=False)
class Room:
    """Targets and clients of a service that the real command runs.

    Attributes:
        nursery: Where its targets live.
        port: The port of the service.
    """

    nursery: trio.Nursery
    port: int = attrs.field(factory=free_port)
    _stack: ExitStack = attrs.field(factory=ExitStack)

    def target(self, name: str, *, healthy: bool = True) -> Target:
        """Return a new target, which answers; a healthy one takes connections to be checked."""
        target = Target(name)
        self._stack.callback(target.close)
        target.live(self.nursery)
        if healthy:
            target.open_tcp()
        return target

    def client(self) -> Client:
        """Return a new client; its port stays its own until the end of the test."""
        sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._stack.enter_context(sock)
        return Client(sock, (LOCALHOST, self.port))

    async def deploy(self, command: Command, target: object, *flags: str) -> Result:
        """Deploy to a target as the service ``game``; flags that come last count."""
        return await command.kp(
            "deploy-udp", "game", f"--target={target}", f"--port={self.port}", *flags
        )

    def close(self) -> None:
        """Close all of them."""
        self._stack.close()


@asynccontextmanager
async def open_room() -> AsyncIterator[Room]:
    """Provide a room for the length of a block."""
    async with trio.open_nursery() as nursery:
        room = Room(nursery)
        try:
            yield room
        finally:
            room.close()
        nursery.cancel_scope.cancel()


def udp_state_path(command: Command) -> Path:
    """Return where the UDP services of a proxy are saved."""
    return command.state_path.with_name("kamal-proxy-udp.state")


async def rows(command: Command) -> list[str]:
    """Return what ``list`` prints, without its header, colours and padding."""
    listed = await command.kp("list")
    assert (listed.code, listed.err) == (0, "")
    lines = _COLOURS.sub("", listed.out).splitlines()
    return [re.sub(" +", " ", line).rstrip() for line in lines[1:]]


async def wait_switched(command: Command, target: object) -> None:
    """Wait until a target serves new sessions; a deploy need not have returned by then."""
    while not any(str(target) in row.split() for row in await rows(command)):
        pass  # it takes its time


def has_ipv6() -> bool:
    """Tell whether this machine has the address ::1."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            return False
    return True
