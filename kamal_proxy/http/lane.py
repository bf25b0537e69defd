"""The lane: ordinary HTTP/1.1 exchanges, served by the poller's task in ``_fastpath.Lane``.

This is where the lane ends: what services it is open to, what becomes of an exchange that it gives
away, who looks at the clock. A connection is in the lane, or it has a task, or the one after the
other many times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from kamal_proxy import _fastpath
from kamal_proxy.http.access_log import wanted_key
from kamal_proxy.http.admission import VALIDATION
from kamal_proxy.http.begun import Begun
from kamal_proxy.http.connection import ClientConnection
from kamal_proxy.http.downstream import GONE_GRACE
from kamal_proxy.http.forwarded import nearest_untrusted
from kamal_proxy.http.headers import STREAMED_TYPES, hops_of
from kamal_proxy.http.reasons import CLIENT_CLOSED_REQUEST, Reason
from kamal_proxy.http.upstream import CONNECT_TIMEOUT, FRESH_AGE, MAX_IDLE_AGE
from kamal_proxy.logs import second_text, text
from kamal_proxy.matching import host_name
from kamal_proxy.sockets import drop

if TYPE_CHECKING:
    from kamal_proxy._fastpath import Plan, Visit
    from kamal_proxy.deployment import Target
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address, Clients
    from kamal_proxy.router import RoutingTable
    from kamal_proxy.service import Service
    from kamal_proxy.sockets import Poller, SocketStream

# Between two looks at the clock, as each goes through all connections.
_SWEEP_INTERVAL = 0.05  # seconds
# Fields of a response that the lane writes by itself, so that they are not those of the target.
_WRITTEN = frozenset({"alt-svc", "connection", "keep-alive", "transfer-encoding"})


class Lane(_fastpath.Lane):
    """The lane of one server; :meth:`run` must run meanwhile.

    Args:
        server: Whose connections they are.
        poller: Poller of the streams.
        clients: The connections as those that accept them count them.
    """

    def __init__(self, server: HttpServer, poller: Poller, clients: Clients) -> None:
        super().__init__(
            poller,
            server=server,
            clock=trio.current_time,
            make_begun=Begun,
            validation=b"" if server.validation is None else VALIDATION,
            streamed=tuple(STREAMED_TYPES),
            idle_age=MAX_IDLE_AGE,
            fresh_age=FRESH_AGE,
            gone_grace=GONE_GRACE,
            connect_timeout=CONNECT_TIMEOUT,
            drained=Reason.DRAINED,
            client_gone=Reason.CLIENT_GONE,
            client_stalled=Reason.CLIENT_STALLED,
            target_failed=Reason.TARGET_FAILED,
            client_closed=CLIENT_CLOSED_REQUEST,
            broken=trio.BrokenResourceError,
            second_text=second_text,
        )
        self._server = server
        self._clients = clients
        self._visits: set[Visit] = set()
        self._clock = trio.CancelScope()
        self._is_over = False

    def begin(self, stream: SocketStream, address: Address) -> None:
        """Take a connection that was accepted."""
        if self._is_over:
            self._clients.leave(stream)
            return
        server = self._server
        if stream.alpn == "h2":
            self._clients.serve(server.handle, stream, address)
            return
        visit = _fastpath.Visit(self, stream, address, server.trusts(address))
        if not stream.secured and address[0] in server.proxy_protocol_from:
            connection = ClientConnection(stream, address, server, has_lane=True)
            self._attend(visit, connection)
        else:
            self._enter(visit)
            visit.begin(server.options.head_timeout)

    def _enter(self, visit: Visit) -> None:
        self._visits.add(visit)
        self._server.add(visit)

    async def run(self) -> None:
        """Look after the connections until the server has closed, or until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expire)
                await self._server.wait_closed()
                nursery.cancel_scope.cancel(reason="no connection is left")
        finally:
            self._is_over = True
            for visit in tuple(self._visits):
                visit.cancel(Reason.SHUTDOWN)

    async def _expire(self) -> None:
        """End what takes too long."""
        while True:
            self.sweep(tuple(self._visits))
            await trio.sleep(_SWEEP_INTERVAL)
            with trio.CancelScope(deadline=self.next_deadline) as self._clock:
                await trio.sleep_forever()

    def look_at(self, deadline: float) -> None:
        """Look at the clock then: somebody has begun to wait for less than all others."""
        self._clock.deadline = min(self._clock.deadline, deadline)

    # Where the lane is open

    def plans(self, table: RoutingTable, host: str) -> tuple[Plan, ...]:
        """Return what is to be known of each service that a host leads to, in the order of choice.

        Args:
            table: The routing table of the moment.
            host: Host as the client wrote it, without port.
        """
        name = host_name(host)
        return tuple(self._plan(service, prefix, name) for prefix, service in table.bound(name))

    def _plan(self, service: Service, prefix: bytes, host: str) -> Plan:
        target_options = service.target_options
        requested, answered = (
            [
                (name.lower().encode(), f",{text(wanted_key(kind, name).encode())}:".encode())
                for name in names
            ]
            for kind, names in (
                ("req", target_options.log_request_headers),
                ("resp", target_options.log_response_headers),
            )
        )
        alt_svc = self._server.alt_svc
        in_memory = min(
            target_options.max_memory_buffer_size, self._server.options.max_buffer_memory
        )
        return _fastpath.Plan(
            service,
            prefix,
            is_open=self._is_ordinary(service, prefix, host),
            strips=service.options.strip_prefix,
            forwards=service.forwards_headers,
            timeout=service.response_timeout(b"/"),
            # What is kept in memory anyway need not be buffered.
            max_request=_lower(in_memory, target_options.max_request_body_size)
            if target_options.buffer_requests
            else math.inf,
            buffers_responses=target_options.buffer_responses,
            max_response=_lower(in_memory, target_options.max_response_body_size),
            added=b"Alt-Svc: %b\r\n" % alt_svc if alt_svc else b"",
            quoted=text(service.name.encode()).encode(),
            request_names=requested,
            response_names=answered,
        )

    def _is_ordinary(self, service: Service, prefix: bytes, host: str) -> bool:
        """Return whether nothing but forwarding becomes of the requests to a service."""
        options, target_options = service.options, service.target_options
        secure = self._server.scheme == "https"
        logged = (target_options.log_request_headers, target_options.log_response_headers)
        return (
            service.pause.state == "running"
            and (service.canonical_name or host) == host
            and (options.tls_enabled if secure else not service.redirects_to_https)
            and not (service.tls is not None and service.tls.asks_clients)
            and (service.rollout is None or service.split is None)
            and not service.active.has_readers
            and all(target.scheme == "http" for target in service.active.targets)
            and not options.exclude_metrics_paths
            and not service.client_ip_header
            and not target_options.path_timeouts
            and not (target_options.scope_cookie_paths and options.strip_prefix and prefix != b"/")
            and _WRITTEN.isdisjoint(map(str.lower, logged[1]))
            and all(len(names) == len(set(map(str.lower, names))) for names in logged)
        )

    # Where it ends

    def leave(self, visit: Visit, data: bytes) -> None:
        """Let a task serve what is not ordinary.

        Args:
            visit: The connection.
            data: What was read of it.
        """
        connection = self._connection(visit)
        connection.codec.receive_head_data(data)
        self._attend(visit, connection)

    def give_away(self, visit: Visit, request: bytes, begun: Begun, reason: Reason | None) -> None:
        """Let a task go on with an exchange.

        Args:
            visit: The connection.
            request: The whole request.
            begun: What has become of it.
            reason: Why the exchange ends here, if it does.
        """
        connection = self._connection(visit)
        connection.go_on(request, begun)
        if reason is not None:
            connection.cancel(reason)
        self._attend(visit, connection)

    def _connection(self, visit: Visit) -> ClientConnection:
        return ClientConnection(
            visit.stream,
            visit.address,
            self._server,
            has_lane=True,
            is_first=not visit.was_served,
        )

    def _attend(self, visit: Visit, connection: ClientConnection) -> None:
        """Let a connection have a task, until it is quiet again."""
        self._clients.nursery.start_soon(self._serve, visit, connection)
        self._server.add(connection)
        self._forget(visit)

    async def _serve(self, visit: Visit, connection: ClientConnection) -> None:
        try:
            await self._server.serve(connection, connection.address)
        finally:
            if connection.is_quiet and not self._is_over:
                self._enter(visit)
                visit.come_back(connection.address, connection.vouched)
            else:
                self._clients.leave(visit.stream)

    def _forget(self, visit: Visit) -> None:
        self._visits.discard(visit)
        self._server.discard(visit)

    def close(self, visit: Visit, *, linger: bool) -> None:
        """Close a connection.

        Args:
            visit: The connection.
            linger: Whether its client may still be sending, and needs time to read.
        """
        if linger:
            self._clients.nursery.start_soon(self._drop, visit)
        else:
            self._clients.leave(visit.stream)
            self._forget(visit)

    async def _drop(self, visit: Visit) -> None:
        try:
            await drop(visit.stream)
        finally:
            self._clients.leave(visit.stream)
            self._forget(visit)

    # What is told

    def tell_drained(self, target: Target, path: bytes) -> None:
        """Tell that a drain has ended a request."""
        self._server.log.info("Request cancelled due to draining", target=target.name, path=path)

    def tell_failure(self, target: Target, path: bytes, error: str) -> None:
        """Tell that a target failed in the middle of a response."""
        self._server.log.error("Error while proxying", target=target.name, path=path, error=error)

    def tell_bug(self, visit: Visit, error: Exception) -> None:
        """Tell of what must cost one connection, not the proxy."""
        self._server.log.error("Connection failed", client_addr=visit.address[0], error=repr(error))

    def remote(self, visit: Visit, hops: bytes) -> bytes:
        """Return whom a request comes from, as far as it can be known.

        Args:
            visit: The connection of a trusted proxy.
            hops: What that says about those before it.
        """
        trusted = self._server.trusted_proxies
        return nearest_untrusted(hops_of(hops), trusted, visit.address[0]).encode("latin-1")

    def quoted(self, value: bytes) -> bytes:
        """Write a text as the log does."""
        return text(value).encode()


def _lower(limit: int, other: int) -> int:
    """Return the lower limit, where 0 is none for the second one."""
    return min(limit, other) if other else limit
