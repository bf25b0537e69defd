"""HTTP/3 beside an HTTPS server: its sockets, what is announced about it, and its one dependency.

The rest of HTTP/3 is in the modules ``h3_*``, which need aioquic and are loaded only when it is
served. Connections and requests are those of the HTTPS server, as those of HTTP/1.1 and HTTP/2 are.
"""

from __future__ import annotations

import contextlib
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import trio

from kamal_proxy.errors import InvalidOptionsError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from kamal_proxy.http.h3_connection import H3Connection
    from kamal_proxy.http.h3_link import Link
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.tls.certificates import Certificate

#: Seconds that clients may remember that HTTP/3 is served, as other servers' do.
ALT_SVC_AGE = 24 * 3600
_HANDSHAKE_TIMEOUT = 10.0  # seconds


def alt_svc(port: int) -> bytes:
    """Return the value of the Alt-Svc field that tells HTTPS clients of HTTP/3 (RFC 7838 3).

    Args:
        port: UDP port.
    """
    return b'h3=":%d"; ma=%d' % (port, ALT_SVC_AGE)


def require_http3() -> None:
    """Raise InvalidOptionsError if aioquic is missing, or is not one that will do."""
    if find_spec("aioquic") is None:
        raise InvalidOptionsError(
            "http3 needs the package aioquic; install it with: pip install 'kamal-proxy[http3]'"
        )
    try:
        from kamal_proxy.http import h3_connection, h3_endpoint  # noqa: F401
    except ImportError as error:
        raise InvalidOptionsError(
            f"http3 can't use the aioquic that is installed ({error}); install one that it can use "
            "with: pip install 'kamal-proxy[http3]'"
        ) from error


def listen(binds: Sequence[str], port: int) -> list[socket.socket]:
    """Bind the UDP sockets of HTTP/3, all or none.

    Args:
        binds: IP addresses; none means all, IPv4 and IPv6.
        port: The port of HTTPS.

    Raises:
        InvalidOptionsError: aioquic is missing.
        ListenError: naming the address and what to do.
    """
    require_http3()
    from kamal_proxy.http.h3_socket import listen_quic

    with contextlib.ExitStack() as bound:
        sockets = [bound.enter_context(listen_quic(bind, port)) for bind in binds or ("",)]
        bound.pop_all()
    return sockets


class Http3Server:
    """Serves HTTP/3 for an HTTPS server.

    Its connections are among those of ``server``, whose ``close_idle``, ``wait_closed`` and
    ``abort`` concern them as well; :meth:`close` comes before these. With the last connection of
    ``server``, whatever it speaks, :meth:`run` ends: before that, clients could not be answered.

    Args:
        server: The HTTPS server.
        sockets: From :func:`listen`; the caller closes them.
        select: Returns the certificate for a server name (lower case, without final dot; empty if
            the client named none), or None: such a client has to come over TCP.
        max_connections: Connections that may be open at once.
    """

    def __init__(
        self,
        server: HttpServer,
        sockets: Sequence[socket.socket],
        select: Callable[[str], Certificate | None],
        max_connections: int,
    ) -> None:
        require_http3()
        from kamal_proxy.http.h3_endpoint import QuicEndpoint
        from kamal_proxy.http.h3_link import Limits

        self._server = server
        self._select = select
        self._nursery: trio.Nursery | None = None
        self._closing = trio.Event()
        self._limits = Limits(max_connections)
        options = server.options
        self._endpoints = [
            QuicEndpoint(
                sock,
                self._limits,
                self._certificate,
                self._open,
                server.log,
                idle_timeout=options.idle_timeout,
                handshake_timeout=min(options.head_timeout, _HANDSHAKE_TIMEOUT),
                count_flood=partial(server.metrics.flood, "HTTP/3"),
            )
            for sock in sockets
        ]

    @property
    def connections(self) -> int:
        """How many QUIC connections are open, those whose handshake goes on included."""
        return self._limits.connections

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until the last connection has ended after :meth:`close`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for endpoint in self._endpoints:
                nursery.start_soon(endpoint.run)
            task_status.started()
            await self._closing.wait()
            await self._server.wait_closed()
            nursery.cancel_scope.cancel(reason="the last connection has ended")

    def close(self) -> None:
        """Take no new connections any more; ``close_idle`` of the server follows."""
        self._limits.closing = True
        self._closing.set()

    def _certificate(self, name: str) -> Certificate | None:
        found = self._select(name)
        if found is None:
            self._server.metrics.handshake("unknown name")
        return found

    def _open(self, link: Link) -> H3Connection:
        from kamal_proxy.http.h3_connection import H3Connection

        connection = H3Connection(link, self._server)
        self._server.metrics.handshake("ok")
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, connection)
        return connection

    async def _serve(self, connection: H3Connection) -> None:
        await self._server.serve(connection, connection.address)
        connection.close()
