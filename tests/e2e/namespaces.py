"""Network namespaces for tests: machines that are none, joined by cables that are none.

They need no privileges where a user may make user namespaces. Sockets are opened by a short-lived
process in there and handed over, so that the test's own process stays where it is.
"""

from __future__ import annotations

import socket
import sys
from contextlib import asynccontextmanager
from subprocess import DEVNULL, PIPE, run
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_OPEN_SOCKET = """\
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[1], 0))
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"."], [sock.fileno()])
"""


def can_make_namespaces() -> bool:
    """Tell whether this user may make network namespaces, and has the programs for that."""
    try:
        command = ["unshare", "--map-root-user", "--net", "ip", "link", "add", "type", "veth"]
        return run(command, stdin=DEVNULL, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@attrs.define(eq=False)
class Namespace:
    """A network namespace; it lives as long as its process."""

    process: trio.Process

    @property
    def enter(self) -> list[str]:
        """What a command begins with that runs in there."""
        flags = ["--user", "--preserve-credentials", "--net"]
        return ["nsenter", "--target", str(self.process.pid), *flags]

    async def ip(self, arguments: str) -> None:
        """Run ``ip`` in there; it must succeed."""
        await trio.run_process([*self.enter, "ip", *arguments.split()])

    async def connect(self, other: Namespace, mine: str, theirs: str, mtu: int) -> None:
        """Join both by a cable, with an address at each end, of networks of 24 bits.

        The interfaces have the same name, the beginning of the address with ``-`` for dots.
        """
        name = "net-" + "-".join(mine.split(".")[:3])
        await self.ip(f"link add {name} mtu {mtu} type veth peer name peer mtu {mtu}")
        await self.ip(f"link set peer netns {other.process.pid} name {name}")
        for namespace, address in ((self, mine), (other, theirs)):
            await namespace.ip(f"address add {address}/24 dev {name}")
            await namespace.ip(f"link set {name} up")

    async def open_socket(self, host: str) -> trio.socket.SocketType:
        """Return a UDP socket in there, bound to an address."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await trio.run_process(
                [*self.enter, sys.executable, "-c", _OPEN_SOCKET, host, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
            _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        return trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor))


@asynccontextmanager
async def open_namespace(inside: Namespace | None = None) -> AsyncIterator[Namespace]:
    """Make a namespace, with its loopback interface up, for the length of a block.

    Args:
        inside: A namespace whose powers it shares; two can be joined only if they do.
    """
    begin = [*inside.enter, "unshare"] if inside else ["unshare", "--map-root-user"]
    process = await trio.lowlevel.open_process(
        [*begin, "--net", "sh", "-c", "echo && exec cat"], stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        try:
            assert await process.stdout.receive_some() == b"\n"
            namespace = Namespace(process)
            await namespace.ip("link set lo up")
            yield namespace
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
