"""The front of the HTTPS port: from an accepted connection to one that speaks HTTP inside TLS.

Knows all connections that are being opened, and ends those that take too long. What strangers and
scanners send is counted, and told of in one line now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.opening import Opening

if TYPE_CHECKING:
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address, Begin, Clients
    from kamal_proxy.sockets import SocketStream
    from kamal_proxy.tls.selection import Selection

REPORT_INTERVAL = 60.0  # seconds between two lines about failed handshakes
_MAX_ADDRESSES = 1000  # that are told apart between two lines


class HttpsFront:
    """Makes TLS connections of plain ones, for a server of HTTP. :meth:`run` must run meanwhile.

    Args:
        server: What serves them.
        selection: Chooses the certificates.
    """

    def __init__(self, server: HttpServer, selection: Selection) -> None:
        self.server = server
        self.selection = selection
        self._closed = False
        # In the order of their deadlines: all have the same patience.
        self._openings: dict[Opening, None] = {}
        self._any = trio.Event()
        self._failures = _Failures()

    @property
    def connections(self) -> int:
        """How many connections are being opened, or have said nothing yet."""
        return len(self._openings)

    def begin(self, clients: Clients, serve: Begin, stream: SocketStream, address: Address) -> None:
        """Take a connection that was accepted. Whatever its client does ends there.

        Args:
            clients: Those to which it belongs.
            serve: Takes it when it is open.
            stream: The connection.
            address: The client's.
        """
        if self._closed:
            clients.leave(stream)
            return
        opening = Opening(self, clients, serve, stream, address)
        self.allow_time(opening)
        opening.begin()

    def allow_time(self, opening: Opening) -> None:
        """Let the next steps of a connection take some time from now on."""
        self._openings.pop(opening, None)
        self._openings[opening] = None
        opening.deadline = trio.current_time() + self.server.options.head_timeout
        self._any.set()

    def forget(self, opening: Opening) -> None:
        """Let go of a connection that is open now, or that ends."""
        self._openings.pop(opening, None)

    def is_owed_introduction(self, address: Address) -> bool:
        """Return whether a connection from there has to begin with a PROXY protocol header."""
        return address[0] in self.server.proxy_protocol_from

    def fail(self, reason: str, address: Address) -> None:
        """Take note of a handshake that came to nothing."""
        self._failures.add(reason, address[0])
        self.server.metrics.handshake(reason)

    async def run(self) -> None:
        """Look after the connections until cancelled, which ends those that are being opened."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report)
                nursery.start_soon(self._expire)
        finally:
            self._closed = True
            for opening in tuple(self._openings):
                opening.stop()
            # What is served from now on is among the server's connections when this has ended.
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()

    async def _expire(self) -> None:
        """End the connections whose time is over."""
        while True:
            first = next(iter(self._openings), None)
            if first is None:
                self._any = trio.Event()
                await self._any.wait()
            elif first.deadline > trio.current_time():
                await trio.sleep_until(first.deadline)
            else:
                self.forget(first)
                first.expire()

    async def _report(self) -> None:
        """Tell of failed handshakes until cancelled: in one line a minute, if there were any."""
        try:
            while True:
                await self._failures.any.wait()
                await trio.sleep(REPORT_INTERVAL)
                self._tell()
        finally:
            self._tell()

    def _tell(self) -> None:
        failures, self._failures = self._failures, _Failures()
        if failures.by_reason:
            self.server.log.info(
                "TLS handshakes failed",
                count=sum(failures.by_reason.values()),
                reasons=[f"{count} {reason}" for reason, count in failures.by_reason.items()],
                clients=len(failures.clients),
                client_addr=failures.latest,
            )


class _Failures:
    """The handshakes that failed since the last line about them."""

    def __init__(self) -> None:
        self.any = trio.Event()
        self.by_reason: dict[str, int] = {}
        self.clients: set[str] = set()
        self.latest = ""

    def add(self, reason: str, client: str) -> None:
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        if len(self.clients) < _MAX_ADDRESSES:
            self.clients.add(client)
        self.latest = client
        self.any.set()
