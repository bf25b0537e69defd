"""The machinery of the contract's tests: a row is a statement, its steps show that it holds.

A step is a coroutine function of the :class:`World`: a proxy, three scripted targets a, b and c,
and the real commands, which run in a thread and use the proxy's admin API as any other. Modules add
steps of their own. Texts may hold ``{a}`` for the target's ``host:port``, also ``{refused}`` for
one that refuses connections and ``{directory}`` for the proxy's data.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import select
import shlex
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import pytest
import trio

from kamal_proxy.cli.commands import execute
from kamal_proxy.errors import KamalProxyError
from kamal_proxy.run_options import AcmeOptions
from tests.running import Embedded, Result, open_directory, open_embedded
from tests.scripted import (
    LOCALHOST,
    Client,
    ConnectionCut,
    Peer,
    Request,
    Response,
    Script,
    Upstream,
    ok,
    open_client,
    open_upstream,
)
from tests.secure import client_context, open_secure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

Step = Callable[["World"], Awaitable[None]]
Wanted = Mapping[str, Any]  # name -> value, pattern, type, or None for what must not be there

# Where no certificate authority is: whatever a row deploys must not leave this machine.
NO_AUTHORITY = "https://127.0.0.1:1/directory"

_numbers = itertools.count(1)


@attrs.frozen
class Row:
    """A statement of the contract.

    Attributes:
        statement: In a few words.
        steps: What shows it.
        run: Options of the proxy's run.
    """

    statement: str
    steps: tuple[Step, ...]
    run: Mapping[str, Any]

    def __str__(self) -> str:
        return self.statement


def row(statement: str, *steps: Step, **run: Any) -> Row:
    """Make a row."""
    return Row(statement, steps, run)


async def play(shown: Row) -> None:
    """Run a row in a world of its own."""
    failure = None
    async with open_world(**shown.run) as world:
        try:
            for step in shown.steps:
                await step(world)
        except AssertionError as error:
            failure = error  # of which pytest shows more outside of all the nurseries
    if failure is not None:
        raise failure


@attrs.define(eq=False)
class World:
    """What the steps of one row share.

    Attributes:
        directory: Where the proxy's data is.
        options: Options of the proxy's run.
        targets: The scripted targets by name.
        refused: A target that refuses connections.
        nursery: For what runs beside the steps.
        pending: Requests that were begun, by name.
        held: Events that let held requests go, by the target's name.
        running: Commands that run beside the steps, by name.
        notes: What a step remembers for a later one.
    """

    directory: Path
    options: Mapping[str, Any]
    targets: dict[str, Upstream]
    refused: str
    nursery: trio.Nursery
    pending: dict[str, tuple[Client, Ask, int]] = attrs.field(factory=dict)
    held: dict[str, trio.Event] = attrs.field(factory=dict)
    running: dict[str, trio.Event] = attrs.field(factory=dict)
    notes: dict[str, Any] = attrs.field(factory=dict)
    _proxies: AsyncExitStack = attrs.field(factory=AsyncExitStack)
    _proxy: Embedded | None = None

    @property
    def proxy(self) -> Embedded:
        """The proxy."""
        assert self._proxy is not None
        return self._proxy

    @property
    def state(self) -> Path:
        """The saved state."""
        return self.directory / "kamal-proxy.state"

    async def start(self) -> None:
        """Start the proxy."""
        settings = {
            "data_directory": self.directory,
            "socket_path": self.directory / "sock",
            "spill_directory": self.directory,
            "acme": AcmeOptions(directory=NO_AUTHORITY),
        }
        running = open_embedded(**(settings | dict(self.options)))
        self._proxy = await self._proxies.enter_async_context(running)

    async def stop(self) -> None:
        """Close the clients and stop the proxy."""
        await self._proxies.aclose()

    async def connect(self, tls: str | None = None) -> Client:
        """Open a connection; it is closed before the proxy stops.

        Args:
            tls: The name to ask for in a TLS handshake, none for ``""``; None for no TLS.
        """
        if tls is None:
            return await self._proxies.enter_async_context(open_client(self.proxy.port))
        secure = open_secure(self.proxy.https_port, tls or None, client_context(None))
        return await self._proxies.enter_async_context(secure)

    def fill(self, text: str) -> str:
        """Replace the names in a text."""
        for name, upstream in self.targets.items():
            text = text.replace(f"{{{name}}}", upstream.target)
        text = text.replace("{refused}", self.refused)
        return text.replace("{directory}", str(self.directory))

    async def kp(self, line: str) -> Result:
        """Run a command; deploys probe healthy targets only once a minute unless they say more."""
        words = [self.fill(word) for word in shlex.split(line)]
        if words[0] == "deploy" and "--health-check-interval" not in line:
            words.append("--health-check-interval=60s")
        return await self.execute(words)

    async def execute(self, words: list[str]) -> Result:
        """Run a command exactly as it is."""
        return await trio.to_thread.run_sync(_execute, words, abandon_on_cancel=True)

    def in_flight(self) -> float:
        """Return how many requests the metrics say are in flight."""
        text = self.proxy.proxy.metrics()[0].decode()
        values = re.findall(r"^kamal_proxy_http_in_flight_requests{[^}]*} (.*)$", text, re.M)
        return sum(map(float, values))

    def requests(self, number: int) -> list[tuple[str, Request]]:
        """Return what targets received of the request with a number, each with its name."""
        own = [b"%d" % number]
        return [
            (name, request)
            for name, upstream in self.targets.items()
            for request in upstream.requests
            if request.get(b"x-number") == own
        ]


def _execute(words: list[str]) -> Result:
    out = io.StringIO()
    try:
        if words[0] == "list":  # the only one that writes, and it never runs beside another
            with redirect_stdout(out):
                execute(words)
        else:
            execute(words)
    except KamalProxyError as error:
        return Result(1, out.getvalue(), "\n".join([*error.details, f"Error: {error}"]))
    return Result(0, out.getvalue(), "")


@asynccontextmanager
async def open_world(**options: Any) -> AsyncIterator[World]:
    """Open a world."""
    async with open_directory() as directory, AsyncExitStack() as stack:
        targets: dict[str, Upstream] = {}
        for name in "abc":
            serve = _default_script(targets, name)
            targets[name] = await stack.enter_async_context(open_upstream(serve))
        closed = stack.enter_context(socket.socket())
        closed.bind((LOCALHOST, 0))  # but it does not listen
        variables = {"KAMAL_PROXY_SOCKET": str(directory / "sock")}
        stack.enter_context(patch.dict(os.environ, variables))
        refused = f"{LOCALHOST}:{closed.getsockname()[1]}"
        nursery = await stack.enter_async_context(trio.open_nursery())
        world = World(directory, options, targets, refused, nursery)
        await world.start()
        try:
            yield world
        finally:
            await world.stop()
        nursery.cancel_scope.cancel()


def _default_script(targets: dict[str, Upstream], name: str) -> Script:
    """Return a script that answers probes with the target's health, all else with its name."""

    async def serve(peer: Peer) -> None:
        upstream = targets[name]
        while (request := await peer.receive_request()) is not None:
            if request.get(b"user-agent") == [b"kamal-proxy"]:
                if not upstream.health:
                    await trio.sleep_forever()
                await peer.send(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % upstream.health)
                upstream.probes += 1
                upstream.record(request)
                continue
            upstream.record(request)
            await peer.send(ok(b"" if request.method == b"HEAD" else name.encode(), 1))

    return serve


def has_news(client: Client) -> bool:
    """Return whether there is something to read for a client."""
    return bool(select.select([client.sock], [], [], 0)[0])


def check(what: str, got: Callable[[str], Any], wanted: Wanted, world: World) -> None:
    """Compare values with those that are wanted."""
    for name, value in wanted.items():
        found = got(name)
        where = f"{what} {name}: {found!r}"
        if isinstance(value, re.Pattern):
            assert isinstance(found, str), where
            assert value.fullmatch(found), where
        elif isinstance(value, type):
            assert isinstance(found, value), where
        else:
            assert found == (world.fill(value) if isinstance(value, str) else value), where


@attrs.frozen(kw_only=True)
class Ask:
    """A request, and what must be seen of it everywhere. See :func:`ask`."""

    path: str
    host: str
    method: str
    headers: tuple[str, ...]
    body: bytes
    status: int
    reaches: str
    sees: Wanted
    gets: Wanted
    logs: Wanted
    cut: bytes | None
    tls: str | None

    async def __call__(self, world: World) -> None:
        client, number = await self.send(world)
        await self.receive(world, client, number)

    async def send(self, world: World) -> tuple[Client, int]:
        """Send it; return the connection, and the number that it bears."""
        number = next(_numbers)
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {self.host}", f"X-Number: {number}"]
        lines += [world.fill(header) for header in self.headers]
        chunked = any(header.startswith("Transfer-Encoding") for header in self.headers)
        if self.body and not chunked:
            lines.append(f"Content-Length: {len(self.body)}")
        client = await world.connect(self.tls)
        await client.send("\r\n".join([*lines, "", ""]).encode() + self.body)
        return client, number

    async def receive(self, world: World, client: Client, number: int) -> None:
        """Check the response, what the target saw, and the log."""
        if self.cut is not None:
            with pytest.raises(ConnectionCut) as caught:
                await client.receive_response(self.method.encode())
            assert (caught.value.status, caught.value.body) == (self.status, self.cut)
        else:
            if self.status == 101:
                response = await _receive_switch(client)
            else:
                response = await client.receive_response(self.method.encode())
            assert response.status == self.status, response
            check("the client got", partial(part_of, response), self.gets, world)
        await self.check_elsewhere(world, client, number)

    async def check_elsewhere(self, world: World, client: Client, number: int) -> None:
        """Check what the target saw, and the log."""
        seen = world.requests(number)
        assert "".join(name for name, _ in seen) == self.reaches
        for _, request in seen:
            check("the target saw", partial(part_of, request), self.sees, world)
        port = str(client.sock.getsockname()[1])
        line = await world.proxy.lines.wait_for(lambda line: line.get("client_port") == port)
        check("the log has", line.get, {"status": self.status} | dict(self.logs), world)


async def _receive_switch(client: Client) -> Response:
    """Read the head of a response that switches protocols, and end the tunnel."""
    head = await client.receive_until(b"\r\n\r\n")
    start, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    _, status, reason = start.split(b" ", 2)
    pairs = [line.partition(b": ") for line in lines]
    client.shutdown_write()
    headers = [(name.lower(), value) for name, _, value in pairs]
    return Response(int(status), reason, headers, b"", [], [])


def part_of(message: Request | Response, name: str) -> Any:
    """Return a header of a message as text, or a part: ``:path``, ``:body``, ``:trailers`` ..."""
    match name, message:
        case ":body", _:
            return message.body
        case ":trailers", _:
            return message.trailers
        case ":method", Request():
            return message.method.decode()
        case ":path", Request():
            return message.target.decode()
        case ":1xx", Response():
            return message.informational
    values = message.get(name.lower().encode())
    return ", ".join(value.decode() for value in values) if values else None


def ask(
    path: str = "/",
    *,
    host: str = "web.test",
    method: str = "GET",
    headers: Iterable[str] = (),
    body: bytes = b"",
    status: int = 200,
    reaches: str = "a",
    sees: Wanted | None = None,
    gets: Wanted | None = None,
    logs: Wanted | None = None,
    cut: bytes | None = None,
    tls: str | None = None,
) -> Ask:
    """Make a step that sends a request on a connection of its own.

    Args:
        path: Its request target.
        host: Its Host.
        method: Its method.
        headers: Further lines of its head.
        body: Its body, chunks and all if ``headers`` say so.
        status: The status that the client must get and the log must have.
        reaches: The names of the targets that must have received it, none for ``""``.
        sees: What those must have seen; see :func:`part_of`.
        gets: What the client must get.
        logs: What the line in the log must hold.
        cut: What there must be of the body if the connection must be cut.
        tls: The name to ask for in a TLS handshake, none for ``""``; None for no TLS.
    """
    return Ask(
        path=path,
        host=host,
        method=method,
        headers=tuple(headers),
        body=body,
        status=status,
        reaches=reaches,
        sees=sees or {},
        gets=gets or {},
        logs=logs or {},
        cut=cut,
        tls=tls,
    )
