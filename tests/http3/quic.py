"""A QUIC client in Trio: aioquic's client over a real UDP socket, through a network that may fail.

``drop`` of :class:`Quic` is asked about every datagram in either direction; ``move`` gives the
client another socket, as a telephone that changes its network gets.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aioquic.quic.events import QuicEvent


class Quic:
    """One client connection.

    Attributes:
        quic: aioquic's connection.
        events: What has happened on it, oldest first; ``HandshakeCompleted`` included.
        ended: How it ended, once it has.
        received: Datagrams that have arrived, and ``sent`` those that were sent.
    """

    def __init__(self, configuration: QuicConfiguration, server: tuple[str, int]) -> None:
        self.quic = QuicConnection(configuration=configuration)
        self.server = server
        self.events: list[QuicEvent] = []
        self.ended: ConnectionTerminated | None = None
        self.received: list[bytes] = []
        self.sent: list[bytes] = []
        self.drop: Callable[[str, bytes], bool] = lambda _way, _data: False
        self.handle: Callable[[QuicEvent], None] = self.events.append
        self._closed = False
        self._news = trio.Event()
        self._socket = self._open_socket()
        self._scope: trio.CancelScope | None = None

    def _open_socket(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.server[0] else socket.AF_INET
        return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def move(self) -> None:
        """Go on from another address."""
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        self._socket = self._open_socket()

    def close(self) -> None:
        """Close the socket; nothing is received any more."""
        self._closed = True
        self._wake()
        self._socket.close()

    def vanish(self) -> None:
        """Send and hear nothing any more."""
        self.drop = lambda _way, _data: True

    def flush(self) -> None:
        """Send what is to be sent."""
        for data, address in self.quic.datagrams_to_send(now=trio.current_time()):
            self.sent.append(data)
            if not self.drop("out", data):
                self.send_raw(data, address)
        self._wake()

    def send_raw(self, data: bytes, address: tuple[str, int] | None = None) -> None:
        """Send a datagram of any kind."""
        self._socket.sendto(data, address or self.server)

    def _wake(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def run(self) -> None:
        """Receive, and keep the timers."""
        while self.ended is None and not self._closed:
            timer = self.quic.get_timer()
            with trio.CancelScope(deadline=math.inf if timer is None else timer) as self._scope:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    continue
            for data in self._arrived():
                if not self.drop("in", data):
                    self.received.append(data)
                    self.quic.receive_datagram(data, self.server, now=trio.current_time())
            if timer is not None and timer <= trio.current_time():
                self.quic.handle_timer(now=trio.current_time())
            while (event := self.quic.next_event()) is not None:
                if isinstance(event, ConnectionTerminated):
                    self.ended = event
                self.handle(event)
            self.flush()
            self.tell()

    def _arrived(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while not self._closed:
                data, address = self._socket.recvfrom(65535)
                # A client discards what comes from elsewhere (RFC 9000 9).
                if address[:2] == self.server:
                    yield data

    def tell(self) -> None:
        """Wake everyone who waits."""
        self._news.set()
        self._news = trio.Event()

    async def wait(self, wanted: Callable[[], object]) -> None:
        """Wait until something holds."""
        while not wanted():
            await self._news.wait()

    async def wait_open(self) -> None:
        """Wait until the handshake is complete."""
        await self.wait(
            lambda: self.ended or any(isinstance(e, HandshakeCompleted) for e in self.events)
        )
        assert self.ended is None, self.ended

    async def wait_ended(self) -> ConnectionTerminated:
        """Wait for the end and return it."""
        await self.wait(lambda: self.ended)
        assert self.ended is not None
        return self.ended

    @property
    def closing_code(self) -> int | None:
        """Why either side has closed the connection, known before it has ended."""
        event = self.quic._close_event
        return None if event is None else event.error_code

    async def wait_closing(self) -> int:
        """Wait until either side has closed the connection; return the error code."""
        await self.wait(lambda: self.closing_code is not None)
        assert self.closing_code is not None
        return self.closing_code


def losing(share: float) -> Callable[[str, bytes], bool]:
    """Return a ``drop`` that loses a share of the datagrams.

    Never more than two in a row in one direction: each that is lost in a row doubles what a peer
    waits before it tries again, and bad luck would last longer than a test may.
    """
    rng = random.Random(1)
    row = {"in": 0, "out": 0}

    def drop(way: str, _data: bytes) -> bool:
        lost = row[way] < 2 and rng.random() < share
        row[way] = row[way] + 1 if lost else 0
        return lost

    return drop


def configuration(name: str = "example.com", ca: bytes = b"", **options: Any) -> QuicConfiguration:
    """Return what a client is like that trusts ``ca``, or anybody."""
    made = QuicConfiguration(
        is_client=True,
        alpn_protocols=["h3"],
        server_name=name,
        verify_mode=ssl.CERT_REQUIRED if ca else ssl.CERT_NONE,
        **options,
    )
    if ca:
        made.load_verify_locations(cadata=ca)
    return made


@asynccontextmanager
async def open_quic(
    server: tuple[str, int],
    made: QuicConfiguration | None = None,
    drop: Callable[[str, bytes], bool] | None = None,
    *,
    wait: bool = True,
) -> AsyncIterator[Quic]:
    """Connect; the connection is closed at the end."""
    client = Quic(made or configuration(), server)
    if drop is not None:
        client.drop = drop
    client.quic.connect(server, now=trio.current_time())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            client.flush()
            if wait:
                await client.wait_open()
            yield client
            client.quic.close()
            client.flush()
            nursery.cancel_scope.cancel()
    finally:
        client.close()
