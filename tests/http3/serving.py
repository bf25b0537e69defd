"""A QUIC endpoint whose application sends every stream back, and what its tests need."""

from __future__ import annotations

import functools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio
from aioquic.quic.events import StreamDataReceived, StreamReset

from kamal_proxy.http.h3_endpoint import QuicEndpoint
from kamal_proxy.http.h3_link import Limits, Link
from kamal_proxy.http.h3_socket import listen_quic
from kamal_proxy.logs import Log
from kamal_proxy.tls.certificates import Certificate, parse_certificate
from tests.certificates import make_ca
from tests.running import Lines
from tests.scripted import fail_hanging_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioquic.quic.events import QuicEvent


@functools.cache
def authority() -> Any:
    """Return the authority of all tests here."""
    return make_ca()


@functools.cache
def certificate(*names: str, key: Any = "ec") -> Certificate:
    """Return a certificate for some names."""
    issued = authority().issue(*names, key=key)
    return parse_certificate(issued.chain_pem, issued.key_pem)


class Echo:
    """Sends back what arrives, as it arrives, and takes it from the window."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ended = 0
        self.over = trio.Event()
        self.broken = False
        self.takes = True
        self.stalled = 0

    def handle(self, event: QuicEvent) -> None:
        quic = self.link.quic
        if self.broken:
            raise RuntimeError("a bug of the application")
        if isinstance(event, StreamDataReceived):
            if not self.takes:
                self.stalled += len(event.data)
                return
            quic.give_credit(event.stream_id, len(event.data))
            if event.stream_id % 4 == 0:
                quic.send_stream_data(event.stream_id, event.data, event.end_stream)
        elif isinstance(event, StreamReset):
            quic.settle_reset(event.stream_id)
            quic.reset_stream(event.stream_id, 7)

    def progress(self) -> None:
        pass

    def lost(self) -> None:
        self.ended += 1
        self.over.set()


@attrs.define(eq=False)
class Served:
    """An endpoint and its applications."""

    endpoint: QuicEndpoint
    limits: Limits
    port: int
    lines: Lines
    applications: list[Echo]
    scope: trio.CancelScope

    async def application(self, number: int = 0) -> Echo:
        """Return the application of a connection, once the handshake is complete here, too."""
        while len(self.applications) <= number:
            await trio.lowlevel.checkpoint()
        return self.applications[number]

    async def wait_connections(self, count: int) -> None:
        """Wait until that many connections are open."""
        while self.limits.connections != count:
            await trio.lowlevel.checkpoint()

    @property
    def server(self) -> tuple[str, int]:
        return "127.0.0.1", self.port


@asynccontextmanager
async def open_endpoint(
    select: Callable[[str], Certificate | None] | None = None,
    *,
    bind: str = "127.0.0.1",
    max_connections: int = 1000,
    idle_timeout: float = 30.0,
    handshake_timeout: float = 10.0,
    may_log: bool = False,
) -> AsyncIterator[Served]:
    """Run an endpoint; an error in its log fails the test."""
    sock = listen_quic(bind, 0)
    lines = Lines()
    limits = Limits(max_connections)
    applications: list[Echo] = []

    def open_application(link: Link) -> Echo:
        applications.append(Echo(link))
        return applications[-1]

    endpoint = QuicEndpoint(
        sock,
        limits,
        select or (lambda _name: certificate("example.com")),
        open_application,
        Log(lines.add),
        idle_timeout=idle_timeout,
        handshake_timeout=handshake_timeout,
    )
    with sock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_hanging_test)
            running = trio.CancelScope()

            async def run() -> None:
                with running:
                    await endpoint.run()

            nursery.start_soon(run)
            yield Served(endpoint, limits, sock.getsockname()[1], lines, applications, running)
            nursery.cancel_scope.cancel()
    if not may_log:
        assert lines.all == []
