"""The front of the HTTPS port: from an accepted connection to one that speaks HTTP inside TLS.

Reads what comes before the handshake, has the certificate chosen, and hands the connection on. What
strangers and scanners send is counted, and told of in one line now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.codec import whole_response
from kamal_proxy.http.endpoint import TEXT
from kamal_proxy.http.introduction import introduced
from kamal_proxy.sockets import READ_SIZE, drop
from kamal_proxy.tls import hello
from kamal_proxy.tls.selection import NoCertificateError
from kamal_proxy.tls.stream import HandshakeError, alert, handshake

if TYPE_CHECKING:
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address
    from kamal_proxy.sockets import SocketStream
    from kamal_proxy.tls.hello import ClientHello
    from kamal_proxy.tls.selection import Selection
    from kamal_proxy.tls.stream import TlsStream

REPORT_INTERVAL = 60.0  # seconds between two lines about failed handshakes
_MAX_ADDRESSES = 1000  # that are told apart between two lines
_PLAIN_HTTP = whole_response(
    400,
    pages.reason(400),
    [(b"Content-Type", TEXT)],
    b"Client sent an HTTP request to an HTTPS server.\n",
)


class HttpsFront:
    """Makes TLS connections of plain ones, for a server of HTTP.

    Args:
        server: What serves them.
        selection: Chooses the certificates.
    """

    def __init__(self, server: HttpServer, selection: Selection) -> None:
        self._server = server
        self._selection = selection
        self._opening: set[trio.CancelScope] = set()
        self._failures = _Failures()

    async def handle(self, stream: SocketStream, address: Address) -> None:
        """Serve one connection. Whatever a client does ends here."""
        secured: tuple[TlsStream, Address] | None = None
        scope = trio.CancelScope(deadline=trio.current_time() + self._server.options.head_timeout)
        self._opening.add(scope)
        try:
            with scope:
                secured = await self._secure(stream, address)
            if scope.cancelled_caught and not self._server.closing:
                self._fail("timeout", address)
        except Exception as error:  # a bug must cost one connection, not the proxy
            self._server.log.error("Connection failed", client_addr=address[0], error=repr(error))
        finally:
            self._opening.discard(scope)
        if secured is None:
            return
        tls, address = secured
        try:
            await self._server.handle(tls, address)
        finally:
            tls.close()

    def close(self) -> None:
        """End the handshakes that are under way: the proxy stops."""
        for scope in self._opening:
            scope.cancel(reason="the proxy stops")

    async def report(self) -> None:
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
            self._server.log.info(
                "TLS handshakes failed",
                count=sum(failures.by_reason.values()),
                reasons=[f"{count} {reason}" for reason, count in failures.by_reason.items()],
                clients=len(failures.clients),
                client_addr=failures.latest,
            )

    def _fail(self, reason: str, address: Address) -> None:
        self._failures.add(reason, address[0])
        self._server.metrics.handshake(reason)

    async def _secure(
        self, stream: SocketStream, address: Address
    ) -> tuple[TlsStream, Address] | None:
        """Go through the handshake; None if that failed."""
        data = b""
        try:
            if address[0] in self._server.proxy_protocol_from:
                introduction = await introduced(stream, address, self._server.log)
                if introduction is None:
                    return None
                address, data = introduction
            read = await self._read_hello(stream, data)
            if read is None:
                self._fail("closed", address)
                return None
            client_hello, data = read
            context, client_ca = await self._selection.context_for(client_hello)
            tls = await handshake(stream, context, data, server_name=client_hello.server_name)
        except hello.HelloError as error:
            self._fail("plain HTTP" if error.is_http else "not TLS", address)
            if error.is_http:
                await self._say(stream, _PLAIN_HTTP)
        except NoCertificateError as error:
            self._fail(error.reason, address)
            await self._say(stream, alert(error.alert))
        except HandshakeError as error:
            self._fail(error.reason, address)
        except trio.BrokenResourceError:
            self._fail("closed", address)
        else:
            self._server.metrics.handshake("ok")
            tls.client_ca = client_ca
            return tls, address
        return None

    async def _read_hello(
        self, stream: SocketStream, data: bytes
    ) -> tuple[ClientHello, bytes] | None:
        while (found := hello.parse_untrusted(data)) is None:
            more = await stream.receive(READ_SIZE)
            if not more:
                return None
            data += more
        return found, data

    async def _say(self, stream: SocketStream, data: bytes) -> None:
        """Send the last words to a client that gets no connection."""
        try:
            await stream.send(data)
        except trio.BrokenResourceError:
            return
        await drop(stream)


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
