"""One HTTP server over socket pairs: real connections, exchanges, pools, a scripted target.

Clients are socket pairs, the target is a Unix socket, so everything arrives within the system call
and a mock clock works. At the end nothing may be left open, in flight or unlogged.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from kamal_proxy import lookups
from kamal_proxy.deployment import Deployment
from kamal_proxy.http.bodies import Spill
from kamal_proxy.http.h2_pool import new_pool
from kamal_proxy.http.lane import Lane
from kamal_proxy.http.server import HttpServer
from kamal_proxy.listeners import Clients
from kamal_proxy.metrics import Metrics
from kamal_proxy.options import ServiceOptions
from kamal_proxy.router import RoutingTable
from kamal_proxy.run_options import RunOptions
from kamal_proxy.service import Service
from kamal_proxy.sockets import Poller
from kamal_proxy.state import SavedPause
from kamal_proxy.target_options import HealthCheckOptions, TargetOptions
from tests.deploying import Lines
from tests.pairs import running_poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import pytest

    from kamal_proxy.health import ProbeResult
    from kamal_proxy.sockets import SocketStream

_PLACES = 100  # for connections in the lane
CLIENT = ("192.0.2.7", 4711)
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GET = b"GET /path HTTP/1.1\r\nHost: app.test\r\n\r\n"


async def read_head(stream: trio.SocketStream) -> bytes:
    """Read up to the end of a head; more only if it came in the same packet."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = await stream.receive_some()
        if not part:
            return data
        data += part
    return data


async def read_all(stream: trio.SocketStream) -> bytes:
    """Read to the end of the stream; a reset counts as one."""
    data = b""
    try:
        async for part in stream:
            data += part
    except trio.BrokenResourceError:
        pass
    return data


async def say_hello(stream: trio.SocketStream) -> None:
    """Answer every request on a connection."""
    while await read_head(stream):
        await stream.send_all(HELLO)


async def stay_silent(stream: trio.SocketStream) -> None:
    """Read a request and never answer."""
    await read_head(stream)
    await trio.sleep_forever()


def hello_after(release: trio.Event) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Answer a request once something has happened."""

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await release.wait()
        await stream.send_all(HELLO)

    return answer


def silent_after(reached: trio.Event) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Read a request, tell of it, and never answer."""

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        reached.set()
        await trio.sleep_forever()

    return answer


async def _never(*_: object) -> ProbeResult:
    await trio.sleep_forever()
    raise AssertionError


@attrs.define(eq=False)
class World:
    """A server with one service ``app`` that has one target."""

    poller: Poller
    server: HttpServer
    deployment: Deployment
    nursery: trio.Nursery
    lines: Lines
    targets: list[trio.SocketStream]
    routes: RoutingTable
    clients: list[trio.SocketStream] = attrs.field(factory=list)
    lane: Lane | None = None

    async def serve(self, stream: SocketStream) -> None:
        try:
            await self.server.handle(stream, CLIENT)
        finally:
            stream.close()

    def pair(self) -> tuple[SocketStream, trio.SocketStream]:
        near, far = socket.socketpair()
        client = trio.SocketStream(trio.socket.from_stdlib_socket(far))
        self.clients.append(client)
        return self.poller.open_stream(near), client

    def connect(self) -> trio.SocketStream:
        """Open a client connection that is being served."""
        stream, client = self.pair()
        if self.lane is None:
            self.nursery.start_soon(self.serve, stream)
        else:
            self.enter(stream)
        return client

    def enter(self, stream: SocketStream) -> None:
        """Let the lane have a connection, as if it had been accepted."""
        assert self.lane is not None
        self.lane._clients.limiter.acquire_nowait()
        self.lane.begin(stream, CLIENT)

    async def open_deployment(self, target: str) -> Deployment:
        """Run another deployment, whose target is reached where that of the first one is."""
        deployment = _new_deployment(target, self.poller, self.lines)
        await self.nursery.start(deployment.run)
        return deployment

    def change(self, **changes: Any) -> None:
        """Replace the service by another one, and let those look again who wait for that."""
        before = self.routes.get("app")
        assert before is not None
        service = attrs.evolve(before, released=trio.Event(), **changes)
        self.routes = RoutingTable({"app": service})
        before.released.set()

    def remove(self) -> None:
        """Remove the service, and tell those who wait for it."""
        before = self.routes.get("app")
        assert before is not None
        self.routes = RoutingTable()
        before.released.set()

    @property
    def logged(self) -> list[dict[str, Any]]:
        return self.lines.of("Request")

    @property
    def statuses(self) -> list[int]:
        return [line["status"] for line in self.logged]


def _new_deployment(target: str, poller: Poller, lines: Lines) -> Deployment:
    return Deployment(
        (target,),
        health_check=HealthCheckOptions(),
        probe=_never,
        connect=lambda host, port, scheme: new_pool(poller, host, port, scheme, 64 * 1024),
        log=lines.log(),
        trusted=True,
    )


@asynccontextmanager
async def open_world(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[trio.SocketStream], Awaitable[None]] = say_hello,
    *,
    pause: SavedPause | None = None,
    service_options: ServiceOptions | None = None,
    target_options: TargetOptions | None = None,
    in_lane: bool = False,
    **options: Any,
) -> AsyncIterator[World]:
    path = str(directory / "t.sock")

    async def resolve(
        host: str, port: int, limiter: trio.CapacityLimiter
    ) -> list[tuple[socket.AddressFamily, Any]]:
        return [(socket.AF_UNIX, path)]

    monkeypatch.setattr(lookups, "resolve", resolve)
    lines, accepted = Lines(), list[trio.SocketStream]()

    async def serve_target(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        try:
            async with stream:
                await answer(stream)
        except trio.BrokenResourceError:
            pass  # the proxy may hang up at any time

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        async with running_poller() as poller:
            deployment = _new_deployment("target:80", poller, lines)
            service = Service(
                name="app",
                options=service_options or ServiceOptions(),
                target_options=target_options or TargetOptions(),
                active=deployment,
                pause=pause or SavedPause(),
            )
            routes = RoutingTable({"app": service})
            run_options = RunOptions(**options)
            spill = Spill(directory, run_options.max_spill, run_options.max_buffer_memory)
            metrics = Metrics()
            server = HttpServer(run_options, lambda: world.routes, lines.log(), metrics, spill, 80)
            async with trio.open_nursery() as nursery:
                await nursery.start(deployment.run)
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                nursery.start_soon(trio.serve_listeners, serve_target, [listener])
                world = World(poller, server, deployment, nursery, lines, accepted, routes)
                clients = Clients(nursery, trio.Semaphore(_PLACES))
                if in_lane:
                    world.lane = Lane(server, poller, clients)
                    nursery.start_soon(world.lane.run)
                try:
                    yield world
                finally:
                    for client in world.clients:
                        client.socket.close()
                nursery.cancel_scope.cancel()
            assert clients.limiter.value == _PLACES
            assert server.connections == 0
            assert (spill.memory, spill.spilled) == (0, 0)
            assert deployment.in_flight == 0
            assert deployment.targets[0].in_flight == 0
