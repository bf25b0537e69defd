"""The admin API's server: HTTP/1.1 with JSON on the Unix socket, described in docs/admin-api.md.

Reads requests with the project's own HTTP codec and turns them into calls of whatever it controls.
A deploy runs in the operations nursery, not in the connection's task: a client that goes away loses
its report and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import trio

from kamal_proxy import __version__
from kamal_proxy.control.messages import (
    API_PREFIX,
    EVENT_STREAM,
    Event,
    ServiceDescription,
    from_json,
    to_json,
)
from kamal_proxy.errors import InvalidOptionsError, KamalProxyError, ShuttingDownError
from kamal_proxy.http import pages
from kamal_proxy.http.codec import (
    HeaderPairs,
    ProtocolError,
    RequestHead,
    ServerCodec,
    whole_response,
)
from kamal_proxy.options import DeployOptions
from kamal_proxy.sockets import drop

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.listeners import Address
    from kamal_proxy.logs import Log
    from kamal_proxy.sockets import SocketStream

MAX_HEAD = 16 * 1024
MAX_BODY = 1024 * 1024
REQUEST_TIMEOUT = 30.0  # seconds for a whole request to arrive, and for each part of an answer
_MAX_EVENTS = 1000  # kept for a client that reads slowly; it misses what is over
_LAST = ("done", "failed")  # the events that end a report
_SERVICES = API_PREFIX + "/services"

_STATUS = {
    "service_not_found": 404,
    "host_conflict": 409,
    "invalid_options": 422,
    "invalid_duration": 422,
    "not_supported_yet": 422,
    "shutting_down": 503,
}


class Controlled(Protocol):
    """What the API controls: the services of a proxy."""

    def describe(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""

    async def deploy(self, options: DeployOptions, progress: Callable[[Event], None]) -> object:
        """Deploy a service."""

    async def remove(self, name: str) -> None:
        """Remove a service."""


class _BadRequest(KamalProxyError):
    """A request that means nothing to the API; ``headers`` go with the answer."""

    code = "bad_request"

    def __init__(self, status: int, message: str, headers: HeaderPairs | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or []


class ControlServer:
    """Serves the admin API.

    Args:
        services: What is controlled.
        operations: Nursery in which deploys run, whoever asked for them.
        log: Where bugs are reported.
    """

    def __init__(self, services: Controlled, operations: trio.Nursery, log: Log) -> None:
        self._services = services
        self._operations = operations
        self._log = log

    async def handle(self, stream: SocketStream, _: Address) -> None:
        """Serve one connection; never raises."""
        codec = ServerCodec(MAX_HEAD)
        try:
            while await _Call(self._services, self._operations, self._log, stream, codec).serve():
                pass
        except (trio.BrokenResourceError, trio.TooSlowError):
            return  # the client is gone
        except Exception as error:  # a bug must cost one call, not the proxy
            self._log.error("Admin API call failed", error=repr(error))


class _Call:
    """One request to the API and its answer."""

    def __init__(
        self,
        services: Controlled,
        operations: trio.Nursery,
        log: Log,
        stream: SocketStream,
        codec: ServerCodec,
    ) -> None:
        self._services = services
        self._operations = operations
        self._log = log
        self._stream = stream
        self._codec = codec
        self._method = ""

    async def serve(self) -> bool:
        """Answer one request; return whether the connection can be used for another."""
        try:
            head = await self._head()
            if head is None:
                return False
            with trio.fail_after(REQUEST_TIMEOUT):
                body = await self._body(head)
        except ProtocolError as error:
            await self._reject(error)
            return False
        except _BadRequest as error:
            await self._fail(error)
            await drop(self._stream)
            return False
        try:
            await self._dispatch(head, body)
        except KamalProxyError as error:
            await self._fail(error)
        return self._codec.next_cycle()

    async def _head(self) -> RequestHead | None:
        deadline = math.inf
        while (head := self._codec.next_request()) is None:
            if self._codec.has_partial_head and deadline == math.inf:
                deadline = trio.current_time() + REQUEST_TIMEOUT
            with trio.fail_at(deadline):
                data = await self._stream.receive()
            if not data:
                return None
            self._codec.receive_head_data(data)
        self._method = head.method.decode("ascii")
        return head

    async def _body(self, head: RequestHead) -> bytes:
        body = b""
        while not self._codec.received:
            if len(body) > MAX_BODY or head.length > MAX_BODY:
                raise _BadRequest(
                    413,
                    f"a request body can have at most {MAX_BODY} bytes",
                    [(b"Connection", b"close")],
                )
            part = self._codec.next_body()
            if part is not None:
                body += part
            elif not self._codec.received:
                data = await self._stream.receive()
                if not data:
                    raise trio.BrokenResourceError("the client left in the middle of a request")
                self._codec.receive_data(data)
        return body

    async def _dispatch(self, head: RequestHead, body: bytes) -> None:
        path = head.target.decode("ascii").partition("?")[0]
        if path == API_PREFIX:
            self._require_method("GET")
            await self._answer(200, {"version": __version__, "api": 1})
        elif path == _SERVICES:
            self._require_method("GET")
            await self._answer(
                200, {"services": [to_json(service) for service in self._services.describe()]}
            )
        elif path.startswith(_SERVICES + "/") and (name := unquote(path[len(_SERVICES) + 1 :])):
            self._require_method("PUT", "DELETE")
            if self._method == "DELETE":
                await self._services.remove(name)
                await self._send_response(204, [], b"")
            else:
                await self._deploy(name, _parse(body))
        else:
            raise _BadRequest(404, f"no such resource: {path} (the API begins at {API_PREFIX})")

    def _require_method(self, *allowed: str) -> None:
        if self._method not in allowed:
            raise _BadRequest(
                405,
                f"{self._method} is not possible here; use {' or '.join(allowed)}",
                [(b"Allow", ", ".join(allowed).encode())],
            )

    async def _deploy(self, name: str, document: dict[str, Any]) -> None:
        """Start a deploy and report its events until it ends."""
        if document.setdefault("service", name) != name:
            raise InvalidOptionsError(
                f"the document names service '{document['service']}', the URL '{name}'"
            )
        options = from_json(DeployOptions, document)
        options.validate()
        report = _Report()
        self._operations.start_soon(self._run_deploy, options, report)
        async with report.events:
            first = await report.next()
            if first.event == "failed" and first.code in _STATUS:
                # It failed before anything happened: that deserves a status of its own.
                raise _Failed(first)
            await self._begin_stream()
            event = first
            while True:
                await self._send(self._codec.body(json.dumps(to_json(event)).encode() + b"\n"))
                if event.event in _LAST:
                    break
                event = await report.next()
        await self._send(self._codec.end())

    async def _run_deploy(self, options: DeployOptions, report: _Report) -> None:
        try:
            await self._services.deploy(options, report.add)
        except KamalProxyError as error:
            report.add(_failed_event(error))
        except trio.Cancelled:
            report.add(_failed_event(ShuttingDownError("the proxy is shutting down")))
            raise
        except Exception as error:  # a bug must cost one deploy, not the proxy
            self._log.error("Deploy failed", service=options.service, error=repr(error))
            report.add(_failed_event(KamalProxyError("internal error; the proxy's log says more")))

    async def _begin_stream(self) -> None:
        await self._send(
            self._codec.response(200, b"OK", [(b"Content-Type", EVENT_STREAM.encode())])
        )

    async def _fail(self, error: KamalProxyError) -> None:
        code = error.event.code if isinstance(error, _Failed) else error.code
        status, headers = _STATUS.get(code, 500), []
        if isinstance(error, _BadRequest):
            status, headers = error.status, error.headers
        document = {"code": code, "message": error.message, "details": list(error.details)}
        await self._answer(status, {"error": document}, headers)

    async def _reject(self, error: ProtocolError) -> None:
        """Answer what is not HTTP; the connection ends."""
        reason = pages.reason(error.status)
        await self._send(whole_response(error.status, reason, [], reason.encode() + b"\n"))

    async def _answer(
        self, status: int, document: object, headers: HeaderPairs | None = None
    ) -> None:
        body = json.dumps(document).encode() + b"\n"
        headers = [(b"Content-Type", b"application/json"), *(headers or [])]
        await self._send_response(status, headers, body)

    async def _send_response(self, status: int, headers: HeaderPairs, body: bytes) -> None:
        if status != 204:
            headers = [*headers, (b"Content-Length", b"%d" % len(body))]
        data = self._codec.response(status, pages.reason(status).encode(), headers)
        if body and self._method != "HEAD":
            data += self._codec.body(body)
        await self._send(data + self._codec.end())

    async def _send(self, data: bytes) -> None:
        with trio.fail_after(REQUEST_TIMEOUT):
            await self._stream.send(data)


class _Report:
    """The events of a deploy on their way to whoever asked for it, who may be slow or gone.

    A slow reader misses what is over the limit, but never the last event.
    """

    def __init__(self) -> None:
        self._send, self.events = trio.open_memory_channel[Event](_MAX_EVENTS)
        self._last: Event | None = None

    def add(self, event: Event) -> None:
        """Take an event; never blocks, and does not mind when nobody listens."""
        if event.event in _LAST:
            self._last = event
            self._send.close()
            return
        with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
            self._send.send_nowait(event)

    async def next(self) -> Event:
        """Wait for the next event; after the last one there is none."""
        try:
            return await self.events.receive()
        except trio.EndOfChannel:
            assert self._last is not None
            return self._last


class _Failed(KamalProxyError):
    """A deploy that failed before its first step."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.message, event.details)
        self.event = event


def _failed_event(error: KamalProxyError) -> Event:
    return Event(event="failed", code=error.code, message=error.message, details=error.details)


def _parse(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _BadRequest(400, f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _BadRequest(400, "the body must be a JSON object")
    return document
