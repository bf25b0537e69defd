"""One request and its response: routed, given to a target, relayed both ways, logged.

Straight on, no step revisited: route, choose a target, connect, send, relay, finish. The exchange
runs in its client connection's task, under that connection's one cancel scope, whose deadline moves
with each wait and carries the cause that its passing would have. Only a request whose body is still
arriving when its head has been forwarded gets a second task.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NoReturn
from uuid import uuid4

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.access_log import log_request
from kamal_proxy.http.causes import CLIENT_CLOSED_REQUEST, INTERRUPT_STATUS, Cause
from kamal_proxy.http.codec import HeaderPairs, ProtocolError, RequestHead, ResponseHead
from kamal_proxy.http.headers import Destination, request_headers, response_headers
from kamal_proxy.http.upstream import (
    FRESH_AGE,
    MAX_IDLE_AGE,
    ConnectError,
    UpstreamConnection,
    UpstreamPool,
)
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from kamal_proxy.deployment import Deployment, Target
    from kamal_proxy.http.connection import ClientConnection
    from kamal_proxy.service import Service

# A client that closes its sending side usually went away, but it may still be reading (RFC 9112
# 9.6 leaves that open); an answer that comes within this many seconds is still sent.
GONE_GRACE = 1.0

_MAX_INFORMATIONAL = 100  # 1xx responses before the final one
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})


class _Refusal(Exception):
    """The proxy answers by itself."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


class _TargetFailed(Exception):
    """The target broke the connection or the protocol."""


class _StaleConnection(Exception):
    """A connection used before was closed by the target before it answered anything."""


class _ClientGone(Exception):
    """The client closed or broke its connection."""


class Exchange:
    """One request on a client connection; a :class:`kamal_proxy.deployment.InFlight`."""

    __slots__ = (
        "_awaits_continue",
        "_client",
        "_codec",
        "_connection",
        "_deployment",
        "_destination",
        "_gone",
        "_head",
        "_request_id",
        "_response",
        "_sent",
        "_server",
        "_service",
        "_started",
        "_status",
        "_target",
        "_upload_failure",
        "_uploading",
    )

    def __init__(self, connection: ClientConnection, head: RequestHead) -> None:
        self._started = time.perf_counter_ns()
        self._connection = connection
        self._client = connection.stream
        self._codec = connection.codec
        self._server = connection.server
        self._head = head
        self._request_id = head.get(b"x-request-id") or str(uuid4()).encode()
        self._destination: Destination | None = None
        self._service: Service | None = None
        self._deployment: Deployment | None = None
        self._target: Target | None = None
        self._status = 0
        self._sent = 0  # bytes of response body
        self._response: HeaderPairs | None = None  # header fields, once they were sent
        self._uploading = False
        self._upload_failure: _Refusal | _ClientGone | None = None
        self._gone = False
        # A client that rightly waits for 100 Continue owes no body yet.
        self._awaits_continue = head.get(b"expect").lower() == b"100-continue"

    async def run(self) -> bool:
        """Serve the request; return whether the connection can be used for another."""
        try:
            try:
                return await self._route()
            except _TargetFailed as error:
                self._server.log.error(
                    "Error while proxying",
                    target=self._target.name if self._target else "",
                    path=self._destination.path if self._destination else b"",
                    error=str(error),
                )
                return await self._refuse(502)
            except _Refusal as refusal:
                return await self._refuse(refusal.status, refusal.message)
            except ProtocolError as error:
                return await self._refuse(error.status)
        except (_ClientGone, trio.BrokenResourceError):
            self._status = CLIENT_CLOSED_REQUEST
            return False
        except ProtocolError:
            # Not even a refusal can be told to this client any more.
            self._status = 502
            return False

    def abort_drained(self) -> None:
        """End now: the drain deadline of the deployment has passed."""
        self._connection.cancel(Cause.DRAINED)

    async def interrupted(self, cause: Cause) -> None:
        """Answer after the connection's scope was cancelled, if nothing was answered yet."""
        if cause is Cause.DRAINED:
            self._server.log.info(
                "Request cancelled due to draining",
                target=self._target.name if self._target else "",
                path=self._destination.path if self._destination else b"",
            )
        status = INTERRUPT_STATUS.get(cause, 503)
        if status == CLIENT_CLOSED_REQUEST:
            self._status = status
        elif self._response is None:
            await self._refuse(status)

    def finish(self) -> None:
        """Leave the deployment and write the log line; called exactly once."""
        service, target = self._service, self._target
        self._leave_deployment()
        log_request(
            self._server,
            self._connection.address,
            self._head,
            status=self._status or CLIENT_CLOSED_REQUEST,
            duration=time.perf_counter_ns() - self._started,
            sent=self._sent,
            response=self._response,
            destination=self._destination,
            request_id=self._request_id,
            service=service.name if service else "",
            target=target.name if target else "",
            options=service.target_options if service and target else None,
        )

    # Routing

    async def _route(self) -> bool:
        destination = self._destination = Destination(self._head)
        while True:
            found = self._server.routes().find(destination.name, destination.route)
            if found is None:
                raise _Refusal(404)
            service, prefix = found
            self._service = service
            if self._wants_tls(service):
                location = b"https://" + destination.host_without_port + destination.raw
                return await self._redirect(location)
            target = destination.raw
            if service.options.strip_prefix and prefix != b"/":
                target = destination.without_prefix(prefix)
            if service.pause.state == "running":
                break
            if self._is_health_check(service, target):
                return await self._answer(200, b"", [])
            if service.pause.state == "stopped":
                raise _Refusal(503, service.pause.stop_message)
            self._connection.move_deadline(math.inf, Cause.IDLE)
            await trio.sleep(service.pause.fail_after)
            if self._server.routes().get(service.name) is service:
                raise _Refusal(504)
        deployment = self._deployment = service.active
        deployment.begin(self)
        return await self._forward(service, deployment, target)

    def _wants_tls(self, service: Service) -> bool:
        options = service.options
        return options.tls_enabled and options.tls_redirect and self._server.scheme == "http"

    def _is_health_check(self, service: Service, target: bytes) -> bool:
        path = service.target_options.health_check.path.encode()
        return self._head.method in (b"GET", b"HEAD") and target.partition(b"?")[0] == path

    async def _forward(self, service: Service, deployment: Deployment, path: bytes) -> bool:
        """Give the request to targets until one has taken it; relay its response."""
        repeatable = self._head.length == 0 and self._head.method in _IDEMPOTENT
        response_timeout = service.target_options.response_timeout or math.inf
        max_age = MAX_IDLE_AGE if repeatable else FRESH_AGE
        failed: set[Target] = set()
        reason = ""
        while True:
            target = deployment.choose(failed)
            if target is None:
                if not failed:
                    raise _Refusal(503)
                if not deployment.retired:
                    raise _TargetFailed(reason)
                # A deploy has replaced these targets, and none has taken the request yet.
                self._leave_deployment()
                return await self._route()
            self._assign(target)
            pool = target.connections
            assert isinstance(pool, UpstreamPool)
            self._connection.move_deadline(response_timeout, Cause.TARGET_TIMEOUT)
            upstream = pool.take_idle(max_age)
            try:
                if upstream is None:
                    upstream = await pool.connect()
            except ConnectError as error:
                reason = str(error)
                failed.add(target)
                continue
            try:
                usable = await self._converse(upstream, service, target, path)
            except _StaleConnection as error:
                if not repeatable:
                    raise _TargetFailed(str(error)) from error
                # Once: a connection that was never used before can't be stale.
                max_age = -math.inf
                continue
            finally:
                # Releasing closes whatever has not ended well on both sides.
                pool.release(upstream)
            return usable

    def _leave_deployment(self) -> None:
        if self._target is not None:
            self._target.in_flight -= 1
            self._target = None
        if self._deployment is not None:
            self._deployment.end(self)
            self._deployment = None

    def _assign(self, target: Target) -> None:
        if self._target is not None:
            self._target.in_flight -= 1
        self._target = target
        target.in_flight += 1

    # Talking to the target

    async def _converse(
        self, upstream: UpstreamConnection, service: Service, target: Target, path: bytes
    ) -> bool:
        """Send the request on one upstream connection and relay the response."""
        head = self._head
        destination = self._destination
        assert destination is not None
        request = upstream.codec.request(
            head.method,
            path,
            request_headers(
                head,
                host=destination.host,
                client=self._connection.address[0].encode(),
                scheme=self._server.scheme.encode(),
                forward=service.forwards_headers,
                target=target.name.encode(),
                request_id=self._request_id,
                new_start=_now_milliseconds,
            ),
        )
        # What has arrived of the body travels along; most requests are whole now.
        request += self._body_nowait(upstream)
        complete = self._codec.received
        broken = False
        try:
            await upstream.send(request)
        except trio.BrokenResourceError:
            broken = True  # but it may have answered before it closed
        if complete or broken:
            return await self._download(upstream)
        return await self._relay_both_ways(
            upstream, service.target_options.response_timeout or math.inf
        )

    def _body_nowait(self, upstream: UpstreamConnection) -> bytes:
        framed = self._parsed_body(upstream)
        if not self._codec.received:
            data = self._client.receive_nowait()
            if data == b"":
                raise _ClientGone
            if data is not None:
                self._codec.receive_data(data)
                framed += self._parsed_body(upstream)
        return framed

    def _parsed_body(self, upstream: UpstreamConnection) -> bytes:
        """Take what the client's codec holds of the body, framed for the target as one part."""
        data = self._codec.take_body()
        framed = upstream.codec.body(data) if data else b""
        if self._codec.received:
            framed += upstream.codec.end(self._codec.trailers)
        if framed or self._codec.received:
            self._awaits_continue = False
        return framed

    async def _relay_both_ways(self, upstream: UpstreamConnection, response_timeout: float) -> bool:
        """Relay the rest of the request body while the response may already be coming."""
        usable = False
        failure: Exception | None = None
        self._uploading = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upload, upstream, response_timeout, nursery.cancel_scope)
            try:
                usable = await self._download(upstream)
            except (_TargetFailed, _StaleConnection, _ClientGone, ProtocolError) as error:
                # A nursery would wrap it in a group.
                failure = error
            nursery.cancel_scope.cancel(reason="the response is complete")
        self._uploading = False
        if self._upload_failure is not None:
            raise self._upload_failure
        if failure is not None:
            raise failure
        return usable

    async def _upload(
        self, upstream: UpstreamConnection, response_timeout: float, scope: trio.CancelScope
    ) -> None:
        try:
            await self._upload_body(upstream, response_timeout)
            if self._response is None:
                self._connection.move_deadline(response_timeout, Cause.TARGET_TIMEOUT)
            self._uploading = False
            upstream.stream.watch_from_now(self._client)
            return
        except ProtocolError as error:
            self._upload_failure = _Refusal(error.status)
        except _ClientGone as error:
            self._upload_failure = error
        scope.cancel(reason="the client failed")

    async def _upload_body(self, upstream: UpstreamConnection, response_timeout: float) -> None:
        while True:
            framed = self._parsed_body(upstream)
            if framed:
                if self._response is None:
                    self._connection.move_deadline(response_timeout, Cause.TARGET_TIMEOUT)
                try:
                    # Nothing may wait between framing and this: see UpstreamConnection.send.
                    await upstream.send(framed)
                except trio.BrokenResourceError:
                    return  # the target stopped listening; its response may still come
            if self._codec.received:
                return
            self._codec.receive_data(await self._more_body())
            # Tiny chunks cost far more than their bytes: let the others have their turn.
            await trio.lowlevel.checkpoint()

    async def _more_body(self) -> bytes:
        """Read more of the request's body, giving up when the client sends nothing for too long."""
        patience = self._server.options.stall_timeout
        try:
            if self._response is not None:
                # The connection's deadline belongs to the response now.
                with trio.move_on_after(patience):
                    return await self._client.receive(READ_SIZE) or self._leave()
                self._leave()
            if not self._awaits_continue:
                self._connection.move_deadline(patience, Cause.BODY_TIMEOUT)
            return await self._client.receive(READ_SIZE) or self._leave()
        except trio.BrokenResourceError as error:
            raise _ClientGone from error

    @staticmethod
    def _leave() -> NoReturn:
        raise _ClientGone

    async def _download(self, upstream: UpstreamConnection) -> bool:
        """Relay the response; return whether the client connection can be used again."""
        head = await self._response_head(upstream)
        headers = response_headers(head)
        if self._server.closing:
            headers.append((b"Connection", b"close"))
        try:
            parts = [self._codec.response(head.status, head.reason, headers)]
        except ProtocolError as error:
            raise _TargetFailed(f"malformed response: {error}") from error
        self._status = head.status
        self._response = headers
        self._connection.move_deadline(math.inf, Cause.IDLE)
        codec = upstream.codec
        try:
            while True:
                if data := codec.take_body():
                    parts.append(self._codec.body(data))
                    self._sent += len(data)
                if codec.received:
                    break
                if parts:
                    await self._send(b"".join(parts))
                    parts.clear()
                codec.receive_data(await self._receive(upstream))
                if codec.is_costly:
                    await trio.lowlevel.checkpoint()
        except (ProtocolError, trio.BrokenResourceError) as error:
            if isinstance(error, ProtocolError) and error.body:
                parts.append(self._codec.body(error.body))
                self._sent += len(error.body)
            if parts:
                await self._send(b"".join(parts))  # what did come is the client's
            raise _TargetFailed(f"response cut short: {error}") from error
        parts.append(self._codec.end(codec.trailers))
        await self._send(b"".join(parts))
        return self._codec.received

    async def _response_head(self, upstream: UpstreamConnection) -> ResponseHead:
        """Wait for the final response, passing on 1xx responses."""
        silent = True
        informational = 0
        try:
            while True:
                head = upstream.codec.next_response()
                if head is None:
                    data = await self._receive(upstream)
                    silent = silent and not data
                    upstream.codec.receive_data(data)
                elif head.status >= 200:
                    return head
                elif (informational := informational + 1) > _MAX_INFORMATIONAL:
                    raise _TargetFailed(f"more than {_MAX_INFORMATIONAL} 1xx responses")
                else:
                    await self._send(self._codec.informational(head))
                    if head.status == 100 and self._awaits_continue:
                        self._awaits_continue = False
                        self._connection.move_deadline(
                            self._server.options.stall_timeout, Cause.BODY_TIMEOUT
                        )
        except (ProtocolError, trio.BrokenResourceError) as error:
            if silent and upstream.reused:
                raise _StaleConnection(str(error)) from error
            raise _TargetFailed(str(error)) from error

    async def _receive(self, upstream: UpstreamConnection) -> bytes:
        """Read from the target; a client that goes away meanwhile shortens the wait."""
        if self._gone:
            return await upstream.stream.receive(READ_SIZE)
        # While the body is still coming, it is its reader that notices.
        watch = None if self._uploading else self._client
        data = await upstream.stream.receive_watching(watch, READ_SIZE)
        if data is not None:
            return data
        self._connection.move_deadline(GONE_GRACE, Cause.CLIENT_GONE)
        self._gone = True
        return await upstream.stream.receive(READ_SIZE)

    async def _send(self, data: bytes) -> None:
        """Send to the client, giving up when it takes nothing for too long."""
        try:
            sent = self._client.send_nowait(data)
            if sent < len(data):
                connection = self._connection
                deadline, cause = connection.scope.deadline, connection.cause
                connection.move_deadline(self._server.options.stall_timeout, Cause.CLIENT_STALLED)
                await self._client.send(data[sent:])
                connection.scope.deadline, connection.cause = deadline, cause
        except trio.BrokenResourceError as error:
            raise _ClientGone from error

    # Answers of the proxy itself

    async def _refuse(self, status: int, message: str = "") -> bool:
        if self._response is not None:
            return False  # the response has begun: a cut connection is the only way to say so
        body = pages.render(status, message)
        return await self._answer(status, body, [(b"Content-Type", pages.CONTENT_TYPE)])

    async def _redirect(self, location: bytes) -> bool:
        return await self._answer(
            301,
            b"",
            [(b"Location", location), (b"Connection", b"close")],
        )

    async def _answer(self, status: int, body: bytes, headers: HeaderPairs) -> bool:
        """Send a whole response; return whether the connection can be used again."""
        if not self._head.length and not self._codec.received:
            self._codec.next_body()  # a request without a body ends here
        if not self._codec.received or self._server.closing:
            headers = [*headers, (b"Connection", b"close")]
        headers = [
            (b"Date", self._server.date()),
            *headers,
            (b"Content-Length", b"%d" % len(body)),
        ]
        self._status = status
        self._response = headers
        data = self._codec.response(status, pages.reason(status).encode(), headers)
        if self._head.method != b"HEAD" and body:
            data += self._codec.body(body)
            self._sent = len(body)
        self._connection.move_deadline(math.inf, Cause.IDLE)
        await self._send(data + self._codec.end())
        return self._codec.received


def _now_milliseconds() -> bytes:
    """Return now as the value of X-Request-Start."""
    return b"t=%d" % (time.time_ns() // 1_000_000)
