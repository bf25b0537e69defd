"""Scripted HTTP/2 targets: what happens on each connection is a coroutine that gets an ``H2Peer``.

async with open_upstream(h2(answer(b"hello"))) as upstream:
    await proxy.deploy(h2c(upstream))
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from kamal_proxy import DeployOptions
    from tests.http.streams import World
    from tests.scripted import Peer, Script, Upstream

    class Wire(Protocol):
        """A connection, as far as an ``H2Peer`` needs one."""

        async def send(self, data: bytes) -> None: ...

        async def receive_some(self) -> bytes: ...


E = TypeVar("E", bound=Event)

Headers = list[tuple[bytes, bytes]]


@attrs.define(eq=False)
class Asked:
    """A request as an HTTP/2 target received it.

    Attributes:
        stream_id: Its stream.
        fields: Its fields, pseudo-fields included.
        body: What has come of its body.
        trailers: Its trailers.
        ended: Whether it is whole.
        reset: The code with which it was reset, if it was.
    """

    stream_id: int
    fields: Headers
    body: bytes = b""
    trailers: Headers = attrs.field(factory=list)
    ended: bool = False
    reset: int | None = None

    def get(self, name: bytes) -> bytes | None:
        """Return the value of a field."""
        return dict(self.fields).get(name)

    def has_at_least(self, count: int) -> bool:
        """Return whether so many bytes of the body have come."""
        return len(self.body) >= count

    def has_said(self, end: bytes) -> bool:
        """Return whether the body ends with something."""
        return self.body.endswith(end)


class H2Peer:
    """A connection that the proxy opened to a scripted HTTP/2 target.

    Attributes:
        wire: The bytes.
        h2: The target's side of HTTP/2; what it has to send is sent by :meth:`flush`.
        requests: Every request by its stream, in order.
        events: Everything that came in, in order.
        takes: Whether windows are opened again for what has come.
    """

    def __init__(self, wire: Wire, settings: Mapping[SettingCodes, int]) -> None:
        self.wire = wire
        self.h2 = H2Connection(H2Configuration(client_side=False, validate_outbound_headers=False))
        self.h2.local_settings = Settings(client=False, initial_values=dict(settings))
        self.h2.decoder.max_allowed_table_size = self.h2.local_settings.header_table_size
        self.requests: dict[int, Asked] = {}
        self.events: list[Event] = []
        self.takes = True

    async def flush(self) -> None:
        """Send what is to be sent."""
        await self.wire.send(self.h2.data_to_send())

    async def receive(self) -> bool:
        """Read something, answer what the protocol wants answered; False at the end."""
        data = await self.wire.receive_some()
        if not data:
            return False
        for event in self.h2.receive_data(data):
            self.events.append(event)
            self._note(event)
        await self.flush()
        return True

    def _note(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            self.requests[event.stream_id] = Asked(event.stream_id, list(event.headers))
        elif isinstance(event, DataReceived):
            asked = self.requests[event.stream_id]
            asked.body += event.data
            if self.takes:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, TrailersReceived):
            self.requests[event.stream_id].trailers = list(event.headers)
        elif isinstance(event, StreamEnded):
            self.requests[event.stream_id].ended = True
        elif isinstance(event, StreamReset):
            self.requests[event.stream_id].reset = int(event.error_code)

    async def wait(self, what: Callable[[], object]) -> None:
        """Read until something is true.

        Raises:
            AssertionError: the proxy closed before that.
        """
        while not what():
            assert await self.receive(), "the proxy closed"

    async def wait_request(self, number: int = 1, *, whole: bool = True) -> Asked:
        """Wait for the so-manieth request of the connection."""
        await self.wait(lambda: len(self.requests) >= number)
        asked = list(self.requests.values())[number - 1]
        if whole:
            await self.wait(lambda: asked.ended or asked.reset is not None)
        return asked

    async def wait_event(self, kind: type[E]) -> E:
        """Wait for an event of a kind; the first one."""
        await self.wait(lambda: any(isinstance(event, kind) for event in self.events))
        return next(event for event in self.events if isinstance(event, kind))

    async def wait_closed(self) -> None:
        """Read until the proxy has closed the connection."""
        try:
            while await self.receive():
                pass
        except OSError:
            return

    @property
    def said_goodbye(self) -> bool:
        """Whether the proxy has sent GOAWAY."""
        return any(isinstance(event, ConnectionTerminated) for event in self.events)

    def head(
        self, asked: Asked, status: int = 200, *fields: tuple[bytes, bytes], **more: Any
    ) -> None:
        """Say the head of a response."""
        self.h2.send_headers(asked.stream_id, [(b":status", b"%d" % status), *fields], **more)

    async def respond(self, asked: Asked, body: bytes = b"hello", status: int = 200) -> None:
        """Send a whole response with a length."""
        self.head(asked, status, (b"content-length", b"%d" % len(body)), end_stream=not body)
        for start in range(0, len(body), 16384):
            part = body[start : start + 16384]
            last = start + len(part) == len(body)
            self.h2.send_data(asked.stream_id, part, end_stream=last)
        await self.flush()


def h2(
    script: Callable[[H2Peer], Awaitable[None]], settings: Mapping[SettingCodes, int] | None = None
) -> Script:
    """Return a script of a connection whose proxy speaks HTTP/2."""

    async def serve(wire: Peer) -> None:
        peer = H2Peer(wire, settings or {})
        peer.h2.initiate_connection()
        await peer.flush()
        with contextlib.suppress(trio.ClosedResourceError):  # the test has closed it
            await script(peer)

    return serve


def answer(
    body: bytes = b"hello", seen: list[Asked] | None = None
) -> Callable[[H2Peer], Awaitable[None]]:
    """Return a script that answers every request once it is whole, until the proxy closes."""

    async def serve(peer: H2Peer) -> None:
        answered = set[int]()
        while await peer.receive():
            for asked in list(peer.requests.values()):
                if asked.ended and asked.reset is None and asked.stream_id not in answered:
                    answered.add(asked.stream_id)
                    if seen is not None:
                        seen.append(asked)
                    await peer.respond(asked, b"" if asked.get(b":method") == b"HEAD" else body)

    return serve


async def stay(peer: H2Peer) -> None:
    """Go on with a connection until the proxy closes it."""
    await peer.wait_closed()


def h2c(upstream: Upstream, **options: Any) -> DeployOptions:
    """Build the options of a deploy to an upstream that speaks HTTP/2; its probes are HTTP/1.1."""
    options.setdefault("interval", 60.0)
    built = upstream.options(**options)
    return attrs.evolve(built, targets=tuple(f"h2c://{target}" for target in built.targets))


@attrs.define(eq=False)
class _StreamWire:
    """What an ``H2Peer`` needs of a connection."""

    stream: trio.SocketStream
    _sending: trio.Lock = attrs.field(factory=trio.Lock)

    async def send(self, data: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(data)

    async def receive_some(self) -> bytes:
        return bytes(await self.stream.receive_some())


def on_stream(
    script: Callable[[H2Peer], Awaitable[None]], settings: Mapping[SettingCodes, int] | None = None
) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Return a script for the target of a :class:`tests.http.streams.World`."""

    async def serve(stream: trio.SocketStream) -> None:
        peer = H2Peer(_StreamWire(stream), settings or {})
        peer.h2.initiate_connection()
        await peer.flush()
        await script(peer)

    return serve


async def use_h2c(world: World) -> None:
    """Let the target of a world's service be one that speaks HTTP/2."""
    world.change(active=await world.open_deployment("h2c://target:80"))
