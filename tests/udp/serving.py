"""UDP services under test with real sockets: targets that answer with their name, and clients.

A room is either ``UdpServices`` alone or a whole embedded proxy; it closes its targets and clients
itself. Each client numbers what it sends and insists on the answer to just that, so that a datagram
that should have been dropped, or a reply to another client, is found by asking for something else.

    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        assert await room.client().ask() == "v1"
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from kamal_proxy.control.messages import Event
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import KamalProxyError, StateError
from kamal_proxy.http.probe import HttpProbe
from kamal_proxy.metrics import Metrics
from kamal_proxy.proxy import Proxy, open_proxy
from kamal_proxy.run_options import RunOptions
from kamal_proxy.state import StateFile
from kamal_proxy.udp import state_format
from kamal_proxy.udp.options import (
    SessionOptions,
    UdpDeploymentOptions,
    UdpDeployOptions,
    UdpHealthCheckOptions,
    UdpOptions,
)
from kamal_proxy.udp.services import UdpServices
from kamal_proxy.udp.session_store import SessionStore
from kamal_proxy.udp.state_format import SavedUdpService
from tests.deploying import Lines
from tests.pairs import running_poller
from tests.ports import free_port
from tests.scripted import LOCALHOST, fail_hanging_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence

    from kamal_proxy.control.messages import ServiceDescription
    from kamal_proxy.udp.service import UdpService

# No drain takes as long: nothing is cut, and what the test does ends it.
PATIENT: dict[str, Any] = {
    "zero_downtime": True,
    "drain_strategy": "timeout",
    "drain_timeout": 0.0,
    "force_kill_timeout": 600.0,
}
UNANSWERED = b"?"  # what targets get from such a client they take without a word
_SESSION_FIELDS = {field.name for field in attrs.fields(SessionOptions)}
_MEDIA_FIELDS = {"protocol", "port_ranges", "rtcp_policy"}
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@contextmanager
def held_port(port: int) -> Iterator[int]:
    """Let another process have a UDP port; yield its process id."""
    code = (
        "import socket, sys; sock = socket.socket(type=socket.SOCK_DGRAM); "
        f"sock.bind(({LOCALHOST!r}, {port})); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.communicate()


def descriptors() -> list[str]:
    """Return what each open descriptor of this process is, without numbers of its own."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listed them
            found.append(os.readlink(f"/proc/self/fd/{number}").partition(":[")[0])
    return sorted(found)


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is true that nobody tells of: the relay works without a word."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.005)


def request(service: str, *targets: Target | str, port: int, **options: Any) -> UdpDeployOptions:
    """Build the options of a deploy.

    Args:
        service: Its name.
        targets: Its targets.
        port: Its port.
        options: Those of sessions, of media and of the deploy, by their names; ``check`` has those
            of the health check, which by default is none.
    """
    media = {name: options.pop(name) for name in _MEDIA_FIELDS & options.keys()}
    sessions = {name: options.pop(name) for name in _SESSION_FIELDS & options.keys()}
    check: dict[str, Any] = {"method": "none", "interval": 0.05} | options.pop("check", {})
    return UdpDeployOptions(
        service=service,
        targets=tuple(str(target) for target in targets),
        udp_options=UdpOptions(
            port=port,
            **media,
            sessions=SessionOptions(**sessions),
            health_check=UdpHealthCheckOptions(**check),
        ),
        deployment_options=UdpDeploymentOptions(**options),
    )


@attrs.frozen
class Received:
    """A datagram as a target received it.

    Attributes:
        payload: What was in it.
        source: The port that it came from.
    """

    payload: bytes
    source: int


@attrs.define(eq=False)
class Target:
    """A server that answers each datagram with its name, a colon, and the datagram.

    Those that begin with ``UNANSWERED`` it takes without a word.

    Attributes:
        name: Its name.
        port: Its port, also while it is dead.
        silent: Whether it answers nothing.
        received: All it ever received.
    """

    name: str
    port: int = attrs.field(factory=free_port)
    host: str = LOCALHOST
    silent: bool = False
    received: list[Received] = attrs.field(factory=list)
    _sock: trio.socket.SocketType | None = None
    tcp: socket.socket | None = None
    _news: trio.Event = attrs.field(factory=trio.Event)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def sources(self) -> set[int]:
        """The ports that it has received datagrams from."""
        return {each.source for each in self.received}

    def live(self, nursery: trio.Nursery) -> None:
        """Begin to answer, on the same port as ever."""
        assert self._sock is None
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        bound.bind((self.host, self.port))
        self._sock = trio.socket.from_stdlib_socket(bound)
        nursery.start_soon(self._answer, self._sock)

    def die(self) -> None:
        """Close its port: what arrives from now on is refused."""
        assert self._sock is not None
        self._sock.close()
        self._sock = None

    def open_tcp(self) -> None:
        """Take TCP connections on the port of the same number, which is what probes look for."""
        self.tcp = socket.create_server((self.host, self.port), backlog=256)

    def close(self) -> None:
        """Close whatever is open."""
        if self._sock is not None:
            self.die()
        if self.tcp is not None:
            self.tcp.close()
            self.tcp = None

    async def send(self, payload: bytes, source: int) -> None:
        """Send something unasked to who sent from a port."""
        assert self._sock is not None
        await self._sock.sendto(payload, (LOCALHOST, source))

    async def wait_received(self, count: int) -> Received:
        """Wait until it has received that many datagrams; return the last of them."""
        while len(self.received) < count:
            await self._news.wait()
        return self.received[count - 1]

    async def _answer(self, sock: trio.socket.SocketType) -> None:
        with suppress(trio.ClosedResourceError, OSError):
            while True:
                payload, (_, source) = await sock.recvfrom(65536)
                self.received.append(Received(payload, source))
                self._news.set()
                self._news = trio.Event()
                if not self.silent and not payload.startswith(UNANSWERED):
                    await sock.sendto(self.name.encode() + b":" + payload, (LOCALHOST, source))


@attrs.define(eq=False)
class Client:
    """A client with a port of its own.

    Attributes:
        to: Where it sends to: the service's address and port.
    """

    sock: trio.socket.SocketType
    to: tuple[str, int]
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count)

    @property
    def port(self) -> int:
        """Its port."""
        port: int = self.sock.getsockname()[1]
        return port

    async def send(self) -> bytes:
        """Send a datagram that is like no other; return it."""
        payload = f"{self.port}.{next(self._numbers)}".encode()
        await self.sock.sendto(payload, self.to)
        return payload

    async def receive(self) -> bytes:
        """Return the next datagram; it comes from where this client sends to.

        What comes from another port is meant for somebody who had this client's port before.
        """
        while True:
            payload, source = await self.sock.recvfrom(65536)
            if source[1] == self.to[1]:
                assert source == self.to, "the reply comes from where the client did not ask"
                return payload

    async def ask(self) -> str:
        """Send a datagram and return the name of who answered just this one, and first."""
        payload = await self.send()
        name, _, answered = (await self.receive()).partition(b":")
        assert answered == payload, "an answer that nobody should have got"
        return name.decode()


@attrs.define(eq=False)
class Deploying:
    """A deploy that goes on in the background.

    Attributes:
        events: What it told so far.
        scope: Cancelled, whoever asked for it hangs up.
        ended: Whether it has ended, with a result, an error, or neither if it was cancelled.
    """

    events: list[Event] = attrs.field(factory=list)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    switched: trio.Event = attrs.field(factory=trio.Event)
    ended: trio.Event = attrs.field(factory=trio.Event)
    result: DrainResult | None = None
    error: KamalProxyError | None = None

    async def wait(self) -> DrainResult:
        """Wait until its drain is over; return how that ended."""
        await self.ended.wait()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def told(self, event: Event) -> None:
        self.events.append(event)
        if event.event == "switched":
            self.switched.set()


class BrokenState(StateFile[SavedUdpService]):
    """A state file that can be read, but not written once ``broken`` is set."""

    broken = False

    def save(self, services: Iterable[SavedUdpService]) -> None:
        if self.broken:
            raise StateError("no space left")
        super().save(services)


@attrs.define(eq=False)
class World:
    """Targets and clients, which may outlive a proxy.

    Attributes:
        nursery: Where targets live.
        port: Where services listen that are deployed without saying where.
    """

    nursery: trio.Nursery
    port: int = attrs.field(factory=free_port)
    _stack: ExitStack = attrs.field(factory=ExitStack)

    def target(
        self, name: str, *, host: str = LOCALHOST, port: int = 0, silent: bool = False
    ) -> Target:
        """Return a new target, which answers."""
        target = Target(name, port or free_port(), host, silent)
        target.live(self.nursery)
        self._stack.callback(target.close)
        return target

    def client(
        self, host: str = LOCALHOST, port: int = 0, to: tuple[str, int] | None = None
    ) -> Client:
        """Return a new client of a service, by default of the one on this world's port."""
        return Client(self.open_socket(host, port), to or (LOCALHOST, self.port))

    def open_socket(self, host: str = LOCALHOST, port: int = 0) -> trio.socket.SocketType:
        """Return a new socket, which is closed with this world."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((host, port))
        return trio.socket.from_stdlib_socket(sock)

    def close(self) -> None:
        """Close all of them."""
        self._stack.close()


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    """Provide a world for the length of a block; a test that hangs in it fails."""
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_hanging_test)
            world = World(nursery)
            stack.callback(world.close)
            yield world
            nursery.cancel_scope.cancel()


@attrs.define(eq=False)
class Room:
    """UDP services, with their targets and their clients.

    Attributes:
        services: Takes the changes.
        world: Its targets and clients.
        lines: The log.
        metrics: Renders the metrics.
        path: Directory of state and sessions, if they are saved.
        state: The state file of services that run alone.
        events: What was told about deploys that were made through it.
    """

    services: UdpServices | Proxy
    world: World
    lines: Lines
    metrics: Callable[[], bytes]
    path: Path | None = None
    state: BrokenState | None = None
    events: list[Event] = attrs.field(factory=list)

    @property
    def port(self) -> int:
        """Where services listen that are deployed without saying where."""
        return self.world.port

    @property
    def proxy(self) -> Proxy:
        """The whole proxy, if it is one."""
        assert isinstance(self.services, Proxy)
        return self.services

    def target(
        self, name: str, *, host: str = LOCALHOST, port: int = 0, silent: bool = False
    ) -> Target:
        """Return a new target, which answers."""
        return self.world.target(name, host=host, port=port, silent=silent)

    def client(
        self, host: str = LOCALHOST, port: int = 0, to: tuple[str, int] | None = None
    ) -> Client:
        """Return a new client of a service, by default of the one on the room's port."""
        return self.world.client(host, port, to)

    # Changes

    async def deploy(self, service: str, *targets: Target | str, **options: Any) -> DrainResult:
        """Deploy, and wait until the drain is over; see :func:`request`."""
        return await self._deploy(self.request(service, *targets, **options), self.events.append)

    async def begin(self, service: str, *targets: Target | str, **options: Any) -> Deploying:
        """Begin a deploy, and wait until it has switched; a patient one if nothing else is said."""
        deploying = self.start(service, *targets, **(PATIENT | options))
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                await deploying.ended.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            await deploying.switched.wait()
            nursery.cancel_scope.cancel()
        if deploying.error is not None:
            raise deploying.error
        return deploying

    def start(self, service: str, *targets: Target | str, **options: Any) -> Deploying:
        """Start a deploy in the background."""
        deploying = Deploying()
        self.world.nursery.start_soon(
            self._run_deploy, deploying, self.request(service, *targets, **options)
        )
        return deploying

    def request(self, service: str, *targets: Target | str, **options: Any) -> UdpDeployOptions:
        """Build the options of a deploy; see :func:`request`."""
        return request(service, *targets, **({"port": self.port} | options))

    @property
    def _deploy(
        self,
    ) -> Callable[[UdpDeployOptions, Callable[[Event], None]], Awaitable[DrainResult]]:
        services = self.services
        return services.deploy_udp if isinstance(services, Proxy) else services.deploy

    async def _run_deploy(self, deploying: Deploying, options: UdpDeployOptions) -> None:
        try:
            with deploying.scope:
                deploying.result = await self._deploy(options, deploying.told)
        except KamalProxyError as error:
            deploying.error = error
        finally:
            deploying.ended.set()

    # What is seen from outside, and one look inside

    def installed(self, name: str = "game") -> UdpService:
        """Return a service itself; not of a whole proxy."""
        assert isinstance(self.services, UdpServices)
        return self.services._installed[name]

    @property
    def rows(self) -> list[ServiceDescription]:
        """What ``list`` shows of UDP services."""
        services = self.services
        rows = services.services() if isinstance(services, Proxy) else services.describe()
        return [row for row in rows if row.udp_ports]

    def row(self, name: str) -> ServiceDescription:
        """Return what ``list`` shows of a service."""
        (row,) = (row for row in self.rows if row.name == name)
        return row

    def sessions(self, name: str = "game") -> int:
        """Return how many sessions a service has, also those that drain."""
        return self.row(name).in_flight + self.row(name).draining

    def number(self, name: str, **labels: str) -> int:
        """Return a metric of UDP, by its name without ``kamal_proxy_udp_`` and its labels.

        The service is "game" unless it is said; 0 if there is no such series.
        """
        return self.numbers(name).get(frozenset(({"service": "game"} | labels).items()), 0)

    def numbers(self, name: str) -> dict[frozenset[tuple[str, str]], int]:
        """Return all series of a metric, by their labels."""
        return {
            frozenset(_LABEL.findall(labels)): int(float(value))
            for each, labels, value in _SAMPLE.findall(self.metrics().decode())
            if each == f"kamal_proxy_udp_{name}"
        }

    @property
    def saved(self) -> dict[str, list[str]]:
        """The targets of each service on disk."""
        assert self.path is not None
        path = self.path / "kamal-proxy-udp.state"
        if not path.exists():
            return {}
        return {entry["name"]: entry["active_targets"] for entry in json.loads(path.read_bytes())}


@asynccontextmanager
async def open_services(
    path: Path | None = None,
    world: World | None = None,
    *,
    bind: Sequence[str] = (LOCALHOST,),
    debug: bool = False,
) -> AsyncIterator[Room]:
    """Run UDP services alone; they save their sessions when they end.

    Args:
        path: Directory where they are saved; None saves nothing.
        world: Whom they serve; None makes a world that ends with them.
        bind: Addresses to listen on.
        debug: Whether debug lines are logged.
    """
    metrics, lines = Metrics(), Lines()
    async with AsyncExitStack() as stack:
        if world is None:
            world = await stack.enter_async_context(open_world())
        state = store = None
        if path is not None:
            state = stack.enter_context(BrokenState(path / "kamal-proxy-udp.state", state_format))
            store = SessionStore(path / "kamal-proxy-udp.sessions")
        poller = await stack.enter_async_context(running_poller())
        services = UdpServices(
            state,
            store,
            lines.log(debug=debug),
            bind=bind,
            default_port=8080,
            http_probe=HttpProbe(poller),
            interrupt=poller.fileno(),
            metrics=metrics,
        )
        async with trio.open_nursery() as running:
            await services.start(running, services.restore())
            yield Room(services, world, lines, lambda: metrics.render("")[0], path, state)
            services.close()
            services.save_sessions()
            running.cancel_scope.cancel()


@asynccontextmanager
async def open_whole(
    path: Path | None = None, world: World | None = None, **options: Any
) -> AsyncIterator[Room]:
    """Run an embedded proxy; it is stopped gracefully at the end.

    Args:
        path: Its data directory; None saves nothing.
        world: Whom it serves; None makes a world that ends with it.
        options: Further options of run.
    """
    lines = Lines()
    run: dict[str, Any] = {
        "http_port": 0,
        "bind": LOCALHOST,
        "shutdown_timeout": 2.0,
        "data_directory": path,
    }
    async with AsyncExitStack() as stack:
        if world is None:
            world = await stack.enter_async_context(open_world())
        async with open_proxy(RunOptions(**(run | options)), log=lines.texts.append) as proxy:
            yield Room(proxy, world, lines, lambda: proxy.metrics()[0], path)
