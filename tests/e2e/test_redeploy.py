"""The main job: redeploys under load, with real processes, lose nothing and mix up nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.certificates import make_ca
from tests.running import open_instance
from tests.scripted import Client, Response, open_client
from tests.secure import client_context, open_secure

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

    from tests.running import Command, Instance

UPLOAD = bytes(range(256)) * 1024


@attrs.define
class Load:
    """Clients that send request after request, and judge each answer as it comes."""

    connect: Callable[[], AbstractAsyncContextManager[Client]]
    #: Instances that may answer at each moment; a deploy appends a new moment.
    moments: list[frozenset[str]]
    requests: int = 0
    failures: list[str] = attrs.field(factory=list)
    in_flight: dict[str, int] = attrs.field(factory=dict)  # client -> moment it asked at
    carried: set[tuple[str, int]] = attrs.field(factory=set)  # client, moment answered after it
    stopping: bool = False
    _news: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, name: str, ask: Callable[[Client], Awaitable[Response]]) -> None:
        """Be one client on one connection until told to stop."""
        async with self.connect() as client:
            while not self.stopping:
                await self.ask(name, client, ask)

    async def run_fresh(self, name: str, ask: Callable[[Client], Awaitable[Response]]) -> None:
        """Be a client that opens a connection for each request."""
        while not self.stopping:
            async with self.connect() as client:
                await self.ask(name, client, ask)

    async def ask(
        self, name: str, client: Client, ask: Callable[[Client], Awaitable[Response]]
    ) -> None:
        asked = len(self.moments) - 1
        self.in_flight[name] = asked
        self._tell()
        response = await ask(client)
        answered = len(self.moments) - 1
        self.requests += 1
        del self.in_flight[name]
        instance = response.body.split(b" ", 1)[0].decode()
        allowed = frozenset().union(*self.moments[asked : answered + 1])
        if response.status != 200:
            self.failures.append(f"{name}: status {response.status}")
        elif instance not in allowed:
            self.failures.append(f"{name}: answered by {instance} instead of {sorted(allowed)}")
        if answered > asked:
            self.carried.add((name, answered))

    async def wait_in_flight(self, *names: str) -> None:
        """Wait until each of these clients has a request in flight."""
        while not self.in_flight.keys() >= set(names):
            await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


async def small(client: Client) -> Response:
    return await client.get("/small", "a")


async def slow(client: Client) -> Response:
    return await client.get("/slow?ms=700", "a")


async def stream(client: Client) -> Response:
    response = await client.get("/stream?parts=7&ms=100", "a")
    lines = response.body.splitlines()
    name = lines[0].split()[0]
    assert lines == [name + b" %d" % part for part in range(7)]  # by one instance, and whole
    return response


async def post(client: Client) -> Response:
    response = await client.request(
        b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(UPLOAD) + UPLOAD
    )
    require_received(response)
    return response


async def upload(client: Client) -> Response:
    """Send chunks over more than half a second."""
    await client.send(b"POST /u HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    size = len(UPLOAD) // 8
    for offset in range(0, len(UPLOAD), size):
        await client.send(b"%x\r\n%b\r\n" % (size, UPLOAD[offset : offset + size]))
        await trio.sleep(0.08)  # the pace of this client; nothing waits for it
    await client.send(b"0\r\n\r\n")
    response = await client.receive_response(b"POST")
    require_received(response)
    return response


def require_received(response: Response) -> None:
    digest = hashlib.sha256(UPLOAD).hexdigest().encode()
    assert response.body.split(b" ")[1:] == [b"%d" % len(UPLOAD), digest]


LONG = {"slow": slow, "stream": stream, "upload": upload}


@pytest.mark.parametrize(("secure", "switches"), [(False, 6), (True, 3)], ids=["http", "https"])
async def test_redeploys_under_load(
    command: Command, tmp_path: Path, secure: bool, switches: int
) -> None:
    def connect() -> AbstractAsyncContextManager[Client]:
        if secure:
            return open_secure(command.https_port, "a", context)
        return open_client(command.port)

    flags: list[str] = []
    if secure:
        authority = make_ca()
        context = client_context(authority)
        certificate, key = authority.issue("a").write(tmp_path)
        flags = ["--host=a", "--tls", f"--tls-certificate-path={certificate}"]
        flags += [f"--tls-private-key-path={key}"]
    async with trio.open_nursery() as instances:
        load = Load(connect, [frozenset({"v0"})])
        current = await instances.start(live, "v0")
        await command.deploy("web", f"--target={current.target}", *flags)
        async with trio.open_nursery() as clients:
            for number in range(3):
                clients.start_soon(load.run, f"small {number}", small)
            clients.start_soon(load.run_fresh, "fresh", small)
            clients.start_soon(load.run, "post", post)
            for name, ask in LONG.items():
                clients.start_soon(load.run, name, ask)
            for switch in range(1, switches + 1):
                following = await instances.start(live, f"v{switch}")
                await load.wait_in_flight(*LONG)
                load.moments.append(frozenset({current.name, following.name}))
                await command.deploy("web", f"--target={following.target}", *flags)
                load.moments.append(frozenset({following.name}))
                await current.kill()
                current = following
            load.stopping = True
        instances.cancel_scope.cancel()

    assert load.failures == []
    for switch in range(switches):
        # The drain means something only if requests were in flight when it began.
        during, after = 2 * switch + 1, 2 * switch + 2
        carried = {name for name, moment in load.carried if moment in (during, after)}
        assert carried >= set(LONG), f"switch {switch + 1} was too quiet"
    lines = await command.lines.wait_requests(load.requests)
    assert len(lines) == load.requests
    assert {line["status"] for line in lines} == {200}


async def live(name: str, *, task_status: trio.TaskStatus[Instance]) -> None:
    """Run an instance for as long as the nursery."""
    async with open_instance(name) as instance:
        task_status.started(instance)
        await trio.sleep_forever()
