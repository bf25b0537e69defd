"""What the tests of the admin API share: a caller in raw bytes, and scripted services."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from kamal_proxy.control.api import ControlServer
from kamal_proxy.control.messages import CertificateDescription, Event, ServiceDescription, to_json
from kamal_proxy.errors import CertificateNotFoundError, KamalProxyError
from kamal_proxy.listeners import Clients, listen_unix, serve
from kamal_proxy.logs import Log
from kamal_proxy.sockets import Poller
from tests.scripted import Client, Response

if TYPE_CHECKING:
    from kamal_proxy.options import (
        DeployOptions,
        PauseOptions,
        RolloutOptions,
        RolloutSplit,
        StopOptions,
    )
    from kamal_proxy.udp.options import UdpDeployOptions
    from tests.running import Lines

Document = dict[str, Any]
T = TypeVar("T")


def request(method: str, path: str, body: object = None, headers: str = "") -> bytes:
    """Render a call; a ``bytes`` body is sent as it is."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}"
    if body is not None:
        head += f"Content-Length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


class Caller(Client):
    """A client of the API on one connection."""

    async def call(self, method: str, path: str, body: object = None) -> Response:
        return await self.request(request(method, path, body))

    async def begin_stream(self) -> None:
        """Read the head of a stream of events."""
        head = await self.receive_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"content-type: application/x-ndjson\r\n" in head.lower()
        assert b"transfer-encoding: chunked\r\n" in head.lower()

    async def next_event(self) -> Document | None:
        """Return the next event, or None at the end of the stream."""
        size = int((await self.receive_until(b"\r\n")).strip(), 16)
        data = await self.receive_exactly(size)
        assert await self.receive_exactly(2) == b"\r\n"
        if not size:
            return None
        assert data.endswith(b"\n"), "an event comes whole"
        event: Document = json.loads(data)
        return event

    async def find_event(self, name: str) -> Document:
        """Return the next event of that name."""
        while (event := await self.next_event()) is not None:
            if event["event"] == name:
                return event
        raise AssertionError(f"the stream ended before {name!r}")


@attrs.frozen
class Api:
    """A served admin API, reached at its path."""

    path: Path

    @asynccontextmanager
    async def caller(self) -> AsyncIterator[Caller]:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        with sock:
            await sock.connect(str(self.path))
            yield Caller(sock)

    async def call(self, method: str, path: str, body: object = None) -> Response:
        async with self.caller() as caller:
            return await caller.call(method, path, body)

    async def services(self) -> list[Document]:
        response = await self.call("GET", "/v1/services")
        assert response.status == 200
        services: list[Document] = json.loads(response.body)["services"]
        return services

    async def deploy(self, options: DeployOptions) -> list[Document]:
        """Deploy and return the events."""
        response = await self.call("PUT", f"/v1/services/{options.service}", document(options))
        return events_in(response)


def document(options: DeployOptions) -> Document:
    """Return the body of a deploy."""
    body: Document = to_json(options)
    del body["service"]
    return body


def events_in(response: Response) -> list[Document]:
    assert response.status == 200, response.body
    return [json.loads(line) for line in response.body.splitlines()]


def error_in(response: Response) -> Document:
    assert response.get(b"content-type") == [b"application/json"]
    error: Document = json.loads(response.body)["error"]
    assert set(error) == {"code", "message", "details"}
    return error


Progress = Callable[[Event], None]


async def finish(progress: Progress) -> None:
    """Be done at once."""
    progress(Event(event="done"))


@attrs.define(eq=False)
class ScriptedServices:
    """Services that note what is asked of them and do what a test says.

    Attributes:
        play: What everything does that takes long.
        order: What everything does that is short.
        begun: Each call with its arguments, in order.
        ended: The names of the calls that came to their end.
    """

    play: Callable[[Progress], Awaitable[object]] = finish
    order: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    begun: list[tuple[object, ...]] = attrs.Factory(list)
    ended: list[str] = attrs.Factory(list)
    _news: trio.Event = attrs.Factory(trio.Event)

    def describe(self) -> list[ServiceDescription]:
        return []

    async def deploy(self, options: DeployOptions, progress: Progress) -> None:
        await self._operate(progress, "deploy", options)

    async def deploy_udp(self, options: UdpDeployOptions, progress: Progress) -> None:
        await self._operate(progress, "deploy_udp", options)

    async def pause(self, name: str, options: PauseOptions, progress: Progress) -> None:
        await self._operate(progress, "pause", name, options)

    async def stop_service(self, name: str, options: StopOptions, progress: Progress) -> None:
        await self._operate(progress, "stop_service", name, options)

    async def deploy_rollout(self, name: str, options: RolloutOptions, progress: Progress) -> None:
        await self._operate(progress, "deploy_rollout", name, options)

    async def remove(self, name: str) -> None:
        await self._order("remove", name)

    async def resume(self, name: str) -> None:
        await self._order("resume", name)

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        await self._order("set_rollout", name, split)

    async def stop_rollout(self, name: str) -> None:
        await self._order("stop_rollout", name)

    async def wait_begun(self, count: int) -> None:
        """Wait until that many calls have begun."""
        while len(self.begun) < count:
            await self._news.wait()

    async def wait_ended(self, count: int) -> None:
        """Wait until that many calls have ended."""
        while len(self.ended) < count:
            await self._news.wait()

    async def _operate(self, progress: Progress, name: str, *arguments: object) -> None:
        await trio.lowlevel.checkpoint()
        self._tell(self.begun, (name, *arguments))
        await self.play(progress)
        self._tell(self.ended, name)

    async def _order(self, name: str, *arguments: object) -> None:
        self._tell(self.begun, (name, *arguments))
        await self.order()
        self._tell(self.ended, name)

    def _tell(self, calls: list[T], call: T) -> None:
        calls.append(call)
        self._news.set()
        self._news = trio.Event()


@attrs.define(eq=False)
class ScriptedCertificates:
    """Certificates that are only described, and renewed by saying so.

    Attributes:
        described: What there is.
        renewed: The hosts that were renewed.
        error: What a renewal raises.
    """

    described: list[CertificateDescription] = attrs.field(factory=list)
    renewed: list[str] = attrs.field(factory=list)
    error: KamalProxyError | None = None

    def describe(self) -> list[CertificateDescription]:
        return self.described

    async def renew(self, host: str) -> None:
        if all(each.host != host for each in self.described):
            raise CertificateNotFoundError(f"no certificate is obtained for {host}")
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.renewed.append(host)


@attrs.frozen
class ScriptedApi(Api):
    """The admin API before scripted services.

    Attributes:
        operations: Nursery in which what takes long runs; a test may cancel it.
    """

    operations: trio.Nursery


@asynccontextmanager
async def open_scripted(
    path: Path,
    services: ScriptedServices,
    lines: Lines,
    certificates: ScriptedCertificates | None = None,
) -> AsyncIterator[ScriptedApi]:
    """Serve the API before scripted services."""
    poller = Poller()
    with listen_unix(path) as listener:
        async with trio.open_nursery() as base:
            await base.start(poller.run)
            operations = await base.start(_hold_nursery)
            server = ControlServer(
                services, certificates or ScriptedCertificates(), operations, Log(lines.add)
            )

            async def listen() -> None:
                await serve(
                    listener,
                    poller,
                    server.handle,
                    clients=Clients(base, trio.Semaphore(10)),
                    on_error=lambda error: None,
                )

            base.start_soon(listen)
            yield ScriptedApi(path, operations)
            base.cancel_scope.cancel()
    poller.close()


async def _hold_nursery(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """Keep a nursery open whose cancellation ends nothing else."""
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()
