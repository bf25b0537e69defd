"""One request and its response: admitted, given to a target, relayed, logged.

Straight on: no step is revisited unless no target has taken the request. From the last look at the
routing table, in ``admission``, to the registration with a deployment nothing waits, so that no
request reaches a retired one.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING
from uuid import uuid4

import trio

from kamal_proxy.balancer import is_chosen
from kamal_proxy.http import cookies, pages
from kamal_proxy.http.access_log import log_request
from kamal_proxy.http.admission import Admission
from kamal_proxy.http.codec import CHUNKED, HeaderPairs, ProtocolError, RequestHead, ResponseHead
from kamal_proxy.http.forwarded import nearest_untrusted
from kamal_proxy.http.h2_pool import H2Pool
from kamal_proxy.http.headers import (
    forwarded_chain,
    is_grpc,
    is_lookalike,
    request_headers,
    response_headers,
    upgrade_response_headers,
)
from kamal_proxy.http.reasons import (
    CLIENT_CLOSED_REQUEST,
    ClientGone,
    Reason,
    Refusal,
    StaleConnection,
    TargetFailed,
    Unprocessed,
)
from kamal_proxy.http.relay import Relay
from kamal_proxy.http.tunnel import Tunnel
from kamal_proxy.http.upload import Given
from kamal_proxy.http.upstream import FRESH_AGE, MAX_IDLE_AGE, ConnectError, UpstreamPool
from kamal_proxy.http.websocket import is_websocket

if TYPE_CHECKING:
    from kamal_proxy.deployment import Deployment, Drain, Target
    from kamal_proxy.http.begun import Begun
    from kamal_proxy.http.client_side import ClientSide
    from kamal_proxy.http.target_side import Upstream
    from kamal_proxy.service import Service

_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
_READING = frozenset({b"GET", b"HEAD"})
_MAX_REFUSALS = 5  # of one request by one target
_NOTHING: frozenset[bytes] = frozenset()


class Exchange:
    """One request on a client connection; a :class:`kamal_proxy.deployment.InFlight`."""

    __slots__ = (
        "_admission",
        "_begun",
        "_client",
        "_deployment",
        "_downstream",
        "_drain",
        "_given",
        "_head",
        "_reason",
        "_request_id",
        "_server",
        "_started",
        "_target",
        "_target_name",
        "_tunnel",
        "_upstream",
        "_wrote",
    )

    def __init__(self, client: ClientSide, head: RequestHead, begun: Begun | None = None) -> None:
        self._started = time.perf_counter_ns()
        self._client = client
        self._server = client.server
        self._head = head
        self._downstream = client.downstream(head)
        self._request_id = head.get(b"x-request-id") or str(uuid4()).encode()
        self._admission: Admission | None = None
        self._deployment: Deployment | None = None
        self._target: Target | None = None
        self._target_name = ""
        self._wrote = False  # the client is to keep off the read targets for a while
        self._upstream: Upstream | None = None
        self._given: Given | None = None  # what targets got of the body that may refuse it
        self._tunnel: Tunnel | None = None
        self._drain: Drain | None = None
        self._reason: Reason | None = None
        self._begun = begun
        if begun is not None:
            self._go_on(begun)

    def _go_on(self, begun: Begun) -> None:
        """Take over what somebody else has begun."""
        self._started = begun.started
        self._request_id = begun.request_id
        self._admission = Admission(self._client, self._downstream, self._head)
        self._admission.go_on(begun.service, begun.prefix)
        self._deployment = begun.deployment
        self._target = begun.target
        self._target_name = begun.target.name
        self._upstream = begun.upstream
        begun.deployment.replace(begun.former, by=self)

    async def run(self) -> bool:
        """Serve the request; return whether the connection can be used for another."""
        try:
            try:
                if self._begun is not None:
                    return await self._resume(self._begun)
                self._admission = Admission(self._client, self._downstream, self._head)
                return await self._serve(self._admission)
            except TargetFailed as error:
                self._server.log.error(
                    "Error while proxying",
                    target=self._target_name,
                    path=self._path,
                    error=str(error),
                )
                return await self._refuse(error.reason)
            except Refusal as refusal:
                return await self._refuse(refusal.reason, refusal.status, refusal.message)
            except ProtocolError as error:
                return await self._refuse(Reason.BAD_REQUEST, error.status)
        except ClientGone as error:
            self._give_up(error.reason)
            return False
        except trio.BrokenResourceError:
            self._give_up(Reason.CLIENT_GONE)
            return False
        except ProtocolError:
            # Not even a refusal can be told to this client any more.
            self._downstream.status = 502
            return False

    def begin_drain(self, drain: Drain) -> None:
        """Take note of a drain: what is behind an upgrade would not end by itself."""
        self._drain = drain
        if self._tunnel is not None:
            self._tunnel.begin_drain(drain)

    def abort_drained(self) -> None:
        """End now: the drain deadline of the deployment has passed."""
        self._client.cancel(Reason.DRAINED)

    async def interrupted(self, reason: Reason) -> None:
        """Answer after the connection's scope was cancelled, if nothing was answered yet."""
        if reason is Reason.DRAINED:
            self._server.log.info(
                "Request cancelled due to draining", target=self._target_name, path=self._path
            )
        if reason.status == CLIENT_CLOSED_REQUEST:
            self._give_up(reason)
            return
        try:
            await self._refuse(reason)
        except ClientGone as error:
            self._give_up(error.reason)

    def _give_up(self, reason: Reason) -> None:
        """Note that nobody is there to be answered."""
        self._reason = reason
        self._downstream.status = CLIENT_CLOSED_REQUEST

    def finish(self) -> None:
        """Leave the deployment, be logged and counted; called exactly once."""
        downstream, admission = self._downstream, self._admission
        service = admission.service if admission else None
        name = service.name if service else ""
        self._let_go()
        status = downstream.status or CLIENT_CLOSED_REQUEST
        duration = time.perf_counter_ns() - self._started
        if admission:
            admission.close()
        if admission is None or admission.is_counted:
            self._server.metrics.request(name, self._head.method, status, duration / 1e9)
            if self._reason is not None:
                self._server.metrics.failure(name, self._reason)
        log_request(
            self._server,
            self._client.address,
            self._head,
            status=status,
            duration=duration,
            sent=downstream.sent,
            response=downstream.response,
            destination=admission.destination if admission else None,
            request_id=self._request_id,
            remote=self._remote_address(service),
            service=name,
            target=self._target_name,
            options=service.target_options if service and self._target_name else None,
            reason=self._reason,
        )

    def _remote_address(self, service: Service | None) -> bytes:
        """Return whom the request comes from, as far as it can be known."""
        header = service.client_ip_header if service else b""
        trusted = self._server.trusted_proxies
        client = self._client.address[0]
        if trusted:
            chain = forwarded_chain(self._head, header) if self._client.vouched else []
            return nearest_untrusted(chain, trusted, client).encode("latin-1")
        return (
            (header and self._head.get(header))
            or self._head.get(b"x-forwarded-for")
            or client.encode()
        )

    @property
    def _path(self) -> bytes:
        return self._admission.destination.path if self._admission else b""

    async def _serve(self, admission: Admission) -> bool:
        """Get the request admitted by a service, and forwarded."""
        service = await admission.admit()
        if service is None:
            return self._downstream.received
        deployment = self._deployment = self._choose_deployment(service)
        deployment.begin(self)
        return await self._forward(admission, service, deployment)

    async def _resume(self, begun: Begun) -> bool:
        """Have the request answered by the target that was chosen, or by others if that fails."""
        assert self._admission is not None
        return await self._forward(self._admission, begun.service, begun.deployment, begun)

    # Which target

    def _choose_deployment(self, service: Service) -> Deployment:
        split = service.split
        if service.rollout is not None and split is not None:
            value = cookies.find_cookie(self._head.headers, cookies.ROLLOUT)
            if is_chosen(value, split.percentage_split_point, split.allowlist):
                return service.rollout
        return service.active

    def _may_read(self, service: Service, deployment: Deployment, upgrade: bytes) -> bool:
        """Return whether a read-only target may serve the request; note if the client wrote."""
        self._wrote = False
        if not deployment.has_readers:
            return False
        options = service.options
        reads = self._head.method in _READING and (
            options.read_targets_accept_websockets or not is_websocket(upgrade)
        )
        if not reads:
            self._wrote = options.writer_affinity_timeout > 0
            return False
        return not cookies.is_recent_writer(self._head.headers, time.time())

    async def _forward(
        self,
        admission: Admission,
        service: Service,
        deployment: Deployment,
        begun: Begun | None = None,
    ) -> bool:
        """Give the request to targets until one has taken it; relay its response."""
        metrics = self._server.metrics
        reading = self._may_read(service, deployment, admission.upgrade)
        repeatable = self._head.length == 0 and self._head.method in _IDEMPOTENT
        response_timeout = service.response_timeout(admission.path.partition(b"?")[0])
        max_age = MAX_IDLE_AGE if repeatable else FRESH_AGE
        failed: set[Target] = set()
        refusals = 0
        cause = ""
        while True:
            target = begun.target if begun else deployment.choose(failed, reading=reading)
            if target is None:
                if not failed:
                    raise Refusal(Reason.NO_TARGET)
                if not deployment.retired:
                    raise TargetFailed(cause, Reason.TARGET_REFUSED)
                # A deploy has replaced these targets, and none has taken the request yet.
                self._let_go()
                self._target_name = ""
                return await self._serve(admission)
            if failed:
                metrics.retry(service.name)
            self._assign(target)
            pool = target.connections
            assert isinstance(pool, (UpstreamPool, H2Pool))
            attempt, begun = begun, None
            remaining = response_timeout if attempt is None else attempt.remaining
            self._client.move_deadline(remaining, Reason.TARGET_TIMEOUT)
            upstream: Upstream | None = None if attempt is None else attempt.upstream
            if upstream is None:
                attempt = None
                upstream = self._upstream = pool.take_idle(max_age)
                if upstream is not None:
                    metrics.reuse(service.name)
            if upstream is None:
                try:
                    upstream = self._upstream = await pool.connect()
                except ConnectError as error:
                    cause = str(error)
                    failed.add(target)
                    metrics.connect(service.name, ok=False)
                    continue
                if upstream.opened:
                    metrics.connect(service.name, ok=True)
                else:
                    metrics.reuse(service.name)
            try:
                return await self._converse(
                    admission, upstream, service, target, response_timeout, attempt
                )
            except StaleConnection as error:
                if not repeatable:
                    raise TargetFailed(str(error)) from error
                metrics.retry(service.name)
                # Once: a connection that was never used before can't be stale.
                max_age = -math.inf
            except Unprocessed as error:
                cause = str(error)
                if self._given is not None and self._given.lost:
                    raise TargetFailed(cause) from error
                # Its connection may just have come to its end, and that of the next attempt, too;
                # but it may refuse whatever it is asked.
                refusals += 1
                if refusals % _MAX_REFUSALS:
                    metrics.retry(service.name)
                else:
                    failed.add(target)
            finally:
                self._release_upstream()

    def _release_upstream(self) -> None:
        """Give the connection to the target back; it is closed unless both sides ended well."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.release()

    def _let_go(self) -> None:
        """Be done with the target and its deployment, and with their drains."""
        self._release_upstream()
        if self._target is not None:
            self._target.in_flight -= 1
            self._target = None
        if self._deployment is not None:
            self._deployment.end(self)
            self._deployment = None
            self._drain = self._client.drain

    def _assign(self, target: Target) -> None:
        if self._target is not None:
            self._target.in_flight -= 1
        self._target = target
        self._target_name = target.name
        target.in_flight += 1

    # Talking to the target

    async def _converse(
        self,
        admission: Admission,
        upstream: Upstream,
        service: Service,
        target: Target,
        response_timeout: float,
        begun: Begun | None,
    ) -> bool:
        """Send the request on one upstream connection and relay what comes back."""
        if upstream.may_refuse and self._given is None:
            self._given = Given()

        def adapt(head: ResponseHead) -> HeaderPairs:
            return self._with_cookies(admission, service, response_headers(head))

        relay = Relay(
            self._client,
            self._downstream,
            upstream,
            service.target_options,
            response_timeout,
            adapt,
            # A slow client must not hold up a drain for what the target has already given.
            self._let_go,
            admission.upgrade,
            self._given,
            patient=upstream.may_refuse and is_grpc(self._head.get(b"content-type")),
        )
        request = self._request(admission, upstream, service, target)
        switched = await relay.run(request, admission.body, begun)
        if switched is None:
            return self._downstream.received
        headers = self._with_cookies(admission, service, upgrade_response_headers(switched))
        await self._run_tunnel(upstream, service, switched, headers)
        return False

    def _request(
        self,
        admission: Admission,
        upstream: Upstream,
        service: Service,
        target: Target,
    ) -> bytes:
        """Write the head of the request."""
        client, head, body = self._client, self._head, admission.body
        client_ip = self._downstream.hidden = service.client_ip_header
        hidden = _NOTHING
        if client_ip:
            # What a proxy that is believed adds, its client must not be able to say beside it.
            told = client_ip if client.believed else b""
            names = (name for name, _, _ in head.headers)
            hidden = frozenset(n for n in names if n != told and is_lookalike(n, client_ip))
        length = None
        if body is not None:
            length = CHUNKED if self._downstream.trailers else body.size
            hidden |= {b"expect"}  # the proxy has answered it
        headers = request_headers(
            head,
            host=admission.destination.host,
            client=client.address[0].encode(),
            scheme=self._server.scheme.encode(),
            target=target.name.encode(),
            request_id=self._request_id,
            new_start=_now_milliseconds,
            forward=service.forwards_headers and client.believed,
            vouched=client.vouched,
            client_ip_header=client_ip,
            upgrade=admission.upgrade,
            length=length,
            hidden=hidden,
        )
        return upstream.codec.request(head.method, admission.path, headers, admission.upgrade)

    def _with_cookies(
        self, admission: Admission, service: Service, headers: HeaderPairs
    ) -> HeaderPairs:
        """Change the header fields of a response as the service's options want them."""
        if admission.prefix and service.target_options.scope_cookie_paths:
            host = admission.destination.host_without_port
            headers = cookies.scope_cookies(headers, admission.prefix, host)
        if self._wrote:
            lasting = service.options.writer_affinity_timeout
            headers = cookies.with_writer_cookie(headers, time.time(), lasting)
        if self._server.alt_svc and not (service.tls and service.tls.asks_clients):
            headers = [*headers, (b"Alt-Svc", self._server.alt_svc)]
        return headers

    async def _run_tunnel(
        self,
        upstream: Upstream,
        service: Service,
        head: ResponseHead,
        headers: HeaderPairs,
    ) -> None:
        """Relay another protocol until it ends."""
        early = await self._downstream.switch(head.reason, headers)
        websocket = is_websocket(head.get(b"upgrade"))
        protocol = "websocket" if websocket else "other"
        metrics = self._server.metrics
        tunnel = self._tunnel = Tunnel(
            self._downstream.tunnel_end(),
            upstream.tunnel_end(),
            websocket=websocket,
            stall_timeout=self._server.options.stall_timeout,
            idle_timeout=service.target_options.websocket_idle_timeout,
        )
        metrics.upgraded(service.name, protocol, 1)
        try:
            await tunnel.run(early, upstream.codec.switched(), self._drain)
        finally:
            self._tunnel = None
            self._downstream.sent = tunnel.sent
            self._reason = tunnel.reason
            metrics.upgraded(service.name, protocol, -1)
            if websocket and self._drain is not None and not self._drain.called_off:
                metrics.websocket_close(service.name, "clean" if tunnel.clean else "cut")

    # Answers of the proxy itself

    async def _refuse(self, reason: Reason, status: int = 0, message: str = "") -> bool:
        self._reason = reason
        if self._downstream.response is not None or self._downstream.is_cut:
            return False  # something has begun: a cut connection is the only way to say so
        status = status or reason.status
        service = self._admission.service if self._admission else None
        body = service.pages.render(status, message) if service and service.pages else None
        if body is None:
            body = pages.render(status, message)
        headers = [(b"Content-Type", pages.CONTENT_TYPE)]
        # Where the pause is full, its place among the connections is wanted for others.
        close = reason is Reason.PAUSE_FULL
        if reason is Reason.MISDIRECTED and self._client.client_ca is not None:
            # Verified by authorities that are not the service's any more: only a new one helps.
            close = True
        return await self._downstream.answer(status, body, headers, close=close)


def _now_milliseconds() -> bytes:
    """Return now as the value of X-Request-Start."""
    return b"t=%d" % (time.time_ns() // 1_000_000)
