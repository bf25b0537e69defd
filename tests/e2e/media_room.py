"""WebRTC services that the real command runs: media servers on one range of ports, and callers.

Proxy, servers and callers have each an address of the loopback interface, as the proxy's port P is
port P of each server. Nobody knows more than what the signalling says, which goes through the proxy
as the media does. Servers and callers are processes of their own, and use aiortc.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import attrs
import trio

from tests.e2e.programs import open_program
from tests.e2e.udp_room import rows
from tests.ports import is_free
from tests.running import ROOT, START_LIMIT, Command, open_command
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from tests.running import Result

SERVER = ROOT / "example" / "mediaserver.py"
CLIENT = Path(__file__).with_name("media_client.py")


def free_range(size: int) -> range:
    """Return as many ports in a row that are free, an even one first, as ``free_port`` does."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        lowest = int(file.read().split()[0])
    while True:
        first = random.randrange(10_000, max(lowest, 20_000) - size, 2)
        if all(is_free(port) for port in range(first, first + size)):
            return range(first, first + size)


@attrs.frozen
class Call:
    """A call, as its caller knows it.

    Attributes:
        who: The caller's name for it.
        server: The name of the server that took it.
        number: The server's name for it.
        host: Where its media goes to.
        port: The port there.
    """

    who: str
    server: str
    number: int
    host: str
    port: int


class CallFailedError(Exception):
    """What a caller was told to do did not work."""


class Callers:
    """A process that makes calls; what a method says is done when it returns."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = b""

    async def begin(self, who: str, url: str) -> Call:
        """Call; the media need not flow yet."""
        told = await self._tell("begin", who=who, url=url)
        return Call(who, told["name"], told["call"], told["host"], told["port"])

    async def listen(self, *calls: Call, frames: int = 25) -> None:
        """Wait until each of the calls has got that many frames of sound more."""
        await self._tell("listen", who=[call.who for call in calls], frames=frames)

    async def move(self, call: Call, *, packets: int = 0) -> None:
        """Go on from another port; ``packets`` of media go there first."""
        await self._tell("move", who=call.who, packets=packets)

    async def counts(self, call: Call) -> tuple[int, int]:
        """Return how many packets came back, and how many were missing between them."""
        told = await self._tell("counts", who=call.who)
        return told["received"], told["lost"]

    async def hang_up(self, call: Call) -> None:
        """End a call."""
        await self._tell("hang_up", who=call.who)

    async def read(self) -> Any:
        """Read one line."""
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            data = await self._process.stdout.receive_some()
            assert data, "the process of the callers has ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    async def _tell(self, do: str, **told: Any) -> Any:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps({"do": do} | told).encode() + b"\n")
        answer = await self.read()
        if "error" in answer:
            raise CallFailedError(f"{do} {told}: {answer['error']}")
        return answer["answer"]


@asynccontextmanager
async def open_callers(
    host: str = LOCALHOST, wrapper: Sequence[str] = ()
) -> AsyncIterator[Callers]:
    """Run a process that makes calls; it is killed at the end.

    Args:
        host: The address that it calls from.
        wrapper: A command that it is started through.
    """
    process = await trio.lowlevel.open_process(
        [*wrapper, sys.executable, "-P", str(CLIENT), host], stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        try:
            callers = Callers(process)
            with trio.fail_after(START_LIMIT):
                assert await callers.read() == "ready"
            yield callers
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@asynccontextmanager
async def open_server(directory: Path, name: str, host: str, ports: range) -> AsyncIterator[str]:
    """Run the example's media server for the length of a block; yield its ``host:port``."""
    flags = [f"--host={host}", "--port=0", f"--advertise={LOCALHOST}", f"--version={name}"]
    flags.append(f"--media-ports={ports[0]}-{ports[-1]}")
    async with open_program(directory, sys.executable, str(SERVER), *flags) as server:
        with trio.fail_after(START_LIMIT):
            await server.wait_for("\n")
        yield server.output.split()[-1]


@attrs.define(eq=False)
class MediaRoom:
    """A proxy, and an application ``meet`` of two services: of signalling, and of media.

    Attributes:
        command: The proxy.
        ports: The media ports.
        host: Where callers reach the proxy.
        path: The path of the signalling.
    """

    command: Command
    ports: range = attrs.field(factory=lambda: free_range(8))
    host: str = LOCALHOST
    path: str = "/calls"

    @property
    def url(self) -> str:
        """Where callers post their offers."""
        return f"http://{self.host}:{self.command.port}{self.path}"

    @property
    def listed(self) -> str:
        """The media ports as ``list`` has them."""
        return f"udp/{self.ports[0]}-{self.ports[-1]}"

    def server(self, name: str, host: str) -> AbstractAsyncContextManager[str]:
        """Run a media server for both services; see :func:`open_server`."""
        return open_server(self.command.directory, name, host, self.ports)

    async def deploy_signalling(self, target: str, *flags: str) -> None:
        """Deploy the signalling."""
        await self.command.deploy("meet", f"--target={target}", *flags)

    async def deploy_media(self, *targets: str, flags: Sequence[str] = ()) -> Result:
        """Deploy the media."""
        return await self.command.kp(
            "deploy-udp",
            "meet",
            "--protocol=webrtc",
            f"--port-ranges={self.ports[0]}-{self.ports[-1]}",
            "--session-timeout=2s",  # of what a caller leaves behind that moves
            *[f"--target={target}" for target in targets],
            *flags,
        )

    async def wait_switched(self, *targets: str) -> None:
        """Wait until these are what the media's new sessions go to."""
        wanted = f"meet * {self.listed} {','.join(targets)} "
        while not any(row.startswith(wanted) for row in await rows(self.command)):
            pass  # it takes its time


@asynccontextmanager
async def open_media_room(directory: Path) -> AsyncIterator[MediaRoom]:
    """Provide a proxy, on one address alone, for the length of a block."""
    async with open_command(directory, f"--bind={LOCALHOST}") as command:
        yield MediaRoom(command)


async def counts_of(target: str) -> dict[int, tuple[int, int]]:
    """Ask a media server itself what each of its calls has received, and what it missed."""

    def ask() -> Any:
        with urlopen(f"http://{target}/calls", timeout=START_LIMIT) as response:
            return json.load(response)

    told = await trio.to_thread.run_sync(ask)
    return {call["call"]: (call["received"], call["lost"]) for call in told}
