"""Whether a request gets to a target, and when: its service, redirects, pauses, buffering.

Ends with the service of a routing table that is still the current one: nothing waits between the
last look at the table and the return. Chooses no target and speaks to none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.headers import Destination, upgrade_of
from kamal_proxy.http.reasons import BODY_ERRORS, ClientGone, Reason, Refusal, body_refusal
from kamal_proxy.matching import decoded_path

if TYPE_CHECKING:
    from kamal_proxy.http.bodies import Body
    from kamal_proxy.http.client_side import ClientSide, Downstream
    from kamal_proxy.http.codec import RequestHead
    from kamal_proxy.service import Service

VALIDATION = b"/.well-known/acme-challenge/"
_PROBING = frozenset({b"GET", b"HEAD"})


class Admission:
    """The way of one request to its service.

    Raises ProtocolError if where it wants to go can't be understood.

    Attributes:
        destination: Where the request wants to go.
        upgrade: The protocol that it wants to switch to, if any.
        service: The service that it belongs to, once that is known.
        prefix: What was removed from the beginning of its path, if anything.
        path: The request target that the service's target sees.
        body: Its body, if that was read whole.
    """

    __slots__ = (
        "_client",
        "_counted",
        "_downstream",
        "_head",
        "_server",
        "body",
        "destination",
        "path",
        "prefix",
        "service",
        "upgrade",
    )

    def __init__(self, client: ClientSide, downstream: Downstream, head: RequestHead) -> None:
        self._client = client
        self._downstream = downstream
        self._head = head
        self._server = client.server
        self._counted = ""  # name of the service among whose requests in flight it is
        self.destination = Destination(head)
        self.upgrade = upgrade_of(head)
        self.service: Service | None = None
        self.prefix = b""
        self.path = self.destination.raw
        self.body: Body | None = None

    @property
    def is_counted(self) -> bool:
        """Whether the request belongs into the metrics."""
        return bool(self._counted) or self.service is None

    def go_on(self, service: Service, prefix: bytes) -> None:
        """Belong to a service among whose requests in flight this one is counted already.

        Args:
            service: The service.
            prefix: What is removed from the beginning of the path, if anything.
        """
        self.service = service
        self._counted = service.name
        self._set_prefix(prefix)

    def _set_prefix(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.path = self.destination.without_prefix(prefix) if prefix else self.destination.raw

    def close(self) -> None:
        """Free what it holds; called at the end of the exchange."""
        if self.body is not None:
            self.body.close()
        if self._counted:
            self._server.metrics.leave(self._counted)

    async def admit(self) -> Service | None:
        """Wait until the request may go to a target of its service; return that service.

        Returns:
            The service, of the routing table of this moment; None if the request was answered.

        Raises:
            Refusal: no service takes it, or it can't be buffered.
            ClientGone: the client closed or broke its connection meanwhile.
            ProtocolError: the client broke the framing of its body.
        """
        if await self._is_validation():
            return None
        pause_began = math.inf
        while True:
            service = self._find()
            if location := self._redirect(service):
                headers = [(b"Location", location)]
                await self._downstream.answer(301, b"", headers, close=True)
                return None
            self._require_secure(service)
            if service.pause.state != "running":
                if self._is_health_check(service):
                    await self._downstream.answer(200, b"", [])
                    return None
                if service.pause.state == "stopped":
                    raise Refusal(Reason.STOPPED, service.pause.stop_message)
                pause_began = min(pause_began, trio.current_time())
                await self._wait_released(service, pause_began)
            elif self._must_buffer(service):
                # It may take a while, and the table may be another one then.
                pause_began = math.inf
                await self._buffer(service)
            else:
                return service

    async def _is_validation(self) -> bool:
        """Answer a certificate authority that asks for what only its client knows (RFC 8555 8.3).

        Whatever else begins with that path is the service's business.
        """
        if self._server.validation is None or not self.destination.path.startswith(VALIDATION):
            return False
        token = self.destination.path.removeprefix(VALIDATION).decode("ascii", "replace")
        answer = await self._server.validation(token)
        if answer is None:
            return False
        await self._downstream.answer(200, answer, [(b"Content-Type", b"text/plain")])
        return True

    def _require_secure(self, service: Service) -> None:
        """Refuse what came by TLS to a service that must not be reached like this."""
        if self._server.scheme != "https":
            return
        if not service.options.tls_enabled:
            raise Refusal(Reason.NOT_SECURE)
        # The handshake may have been for another name (RFC 9110 7.4), where nobody was asked.
        tls = service.tls
        if (
            tls is not None
            and tls.asks_clients
            and (tls.client_ca is None or self._client.client_ca != tls.client_ca)
        ):
            raise Refusal(Reason.MISDIRECTED)

    def _find(self) -> Service:
        """Look the service up in the routing table of this moment, and belong to it."""
        destination = self.destination
        found = self._server.routes().find(destination.name, destination.route)
        if found is None:
            self.service = None
            raise Refusal(Reason.NO_SERVICE)
        service, prefix = found
        self.service = service
        self._set_prefix(prefix if service.options.strip_prefix and prefix != b"/" else b"")
        if self._counted != service.name:
            self._count(service)
        return service

    def _count(self, service: Service) -> None:
        """Count as one of its requests in flight, unless it wants this path left out."""
        if self._counted:
            self._server.metrics.leave(self._counted)
            self._counted = ""
        excluded = service.options.exclude_metrics_paths
        if not excluded or self._shown_path() not in excluded:
            self._counted = service.name
            self._server.metrics.enter(service.name)

    def _shown_path(self) -> str:
        path = decoded_path(self.path.partition(b"?")[0])
        return path.decode("utf-8", "surrogateescape")

    def _redirect(self, service: Service) -> bytes:
        """Return where the request has to go instead: in one hop, to HTTPS and to the host."""
        destination = self.destination
        scheme, host = self._server.scheme, destination.host_without_port
        canonical = service.canonical_name
        moves = bool(canonical) and canonical != destination.name
        if moves:
            host = f"[{canonical}]".encode() if ":" in canonical else canonical.encode()
        if service.redirects_to_https and scheme == "http":
            scheme, moves = "https", True
        if not moves:
            return b""
        path = b"" if destination.path == b"*" else destination.raw
        return scheme.encode() + b"://" + host + path

    def _is_health_check(self, service: Service) -> bool:
        wanted = b"/" + service.target_options.health_check.path.encode().removeprefix(b"/")
        return self._head.method in _PROBING and self.path.partition(b"?")[0] == wanted

    async def _wait_released(self, service: Service, since: float) -> None:
        """Wait for the end of a pause, but no longer than it may be waited for."""
        server = self._server
        if server.waiting >= server.max_waiting:
            # The others need the rest of the connections: for services that are not paused.
            raise Refusal(Reason.PAUSE_FULL)
        self._client.move_deadline(math.inf, Reason.IDLE)
        gone = False

        async def watch_client(scope: trio.CancelScope) -> None:
            nonlocal gone
            await self._downstream.wait_gone()
            gone = True
            scope.cancel(reason="the client is gone")

        server.waiting += 1
        try:
            with trio.move_on_at(since + service.pause.fail_after):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch_client, nursery.cancel_scope)
                    await service.released.wait()
                    nursery.cancel_scope.cancel(reason="released")
        finally:
            server.waiting -= 1
        if gone:
            raise ClientGone
        if not service.released.is_set():
            self._server.log.warning(
                "Rejecting request due to expired pause",
                service=service.name,
                path=self.destination.path,
            )
            raise Refusal(Reason.PAUSE_EXPIRED)

    def _must_buffer(self, service: Service) -> bool:
        return (
            service.target_options.buffer_requests and self._head.length != 0 and self.body is None
        )

    async def _buffer(self, service: Service) -> None:
        """Read the request's body whole, before any target is asked."""
        options, downstream = service.target_options, self._downstream
        limit = options.max_request_body_size
        if limit and self._head.length > limit:
            raise Refusal(Reason.REQUEST_TOO_LARGE)
        patience = self._server.options.stall_timeout
        self._client.move_deadline(patience, Reason.BODY_TIMEOUT)
        body = self.body = self._server.spill.open(options.max_memory_buffer_size, limit)
        try:
            await body.write(downstream.take_body_nowait())
            if not downstream.received:
                await downstream.ask_for_body()
            while not downstream.received:
                self._client.move_deadline(patience, Reason.BODY_TIMEOUT)
                await downstream.receive_body()
                await body.write(downstream.take_body())
            await body.finish()
        except BODY_ERRORS as error:
            raise body_refusal(self._server.log, error, Reason.REQUEST_TOO_LARGE) from error
