"""The admin API's server: HTTP/1.1 with JSON on the Unix socket, described in docs/admin-api.md.

Reads requests with the project's own HTTP codec and turns them into calls of whatever it controls.
What takes long runs in the operations nursery, not in the connection's task: a client that goes
away loses its report and nothing else. What is short runs in the connection's task, which does not
look at the client meanwhile.
"""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import unquote

import trio

from kamal_proxy import __version__
from kamal_proxy.control.messages import (
    API_PREFIX,
    EVENT_STREAM,
    CertificateDescription,
    Event,
    ServiceDescription,
    from_json,
    to_json,
)
from kamal_proxy.errors import InvalidOptionsError, KamalProxyError, ShuttingDownError
from kamal_proxy.http.codec import HeaderPairs, ProtocolError
from kamal_proxy.http.endpoint import Endpoint, Request
from kamal_proxy.options import (
    DeployOptions,
    PauseOptions,
    RolloutOptions,
    RolloutSplit,
    StopOptions,
)
from kamal_proxy.udp.options import UdpDeployOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from kamal_proxy.listeners import Address
    from kamal_proxy.logs import Log
    from kamal_proxy.sockets import SocketStream

MAX_BODY = 1024 * 1024
REQUEST_TIMEOUT = 30.0  # seconds for a whole request to arrive, and for each part of an answer
_MAX_EVENTS = 1000  # kept for a client that reads slowly; it misses what is over
_LAST = ("done", "failed")  # the events that end a report

_STATUS = {
    "service_not_found": 404,
    "host_conflict": 409,
    "port_conflict": 409,
    "resumed": 409,
    "rollout_not_set": 409,
    "certificate": 422,
    "certificate_not_found": 404,
    "acme": 502,
    "error_pages": 422,
    "invalid_options": 422,
    "invalid_duration": 422,
    "not_supported_yet": 422,
    "listen": 500,
    "state": 500,
    "shutting_down": 503,
}


_Operation: TypeAlias = "Callable[[Callable[[Event], None]], Awaitable[object]]"


class Controlled(Protocol):
    """What the API controls: the services of a proxy."""

    def describe(self) -> list[ServiceDescription]:
        """Describe all services, sorted by name."""

    async def deploy(self, options: DeployOptions, progress: Callable[[Event], None]) -> object:
        """Deploy a service."""

    async def deploy_udp(
        self, options: UdpDeployOptions, progress: Callable[[Event], None]
    ) -> object:
        """Deploy a UDP service."""

    async def remove(self, name: str) -> None:
        """Remove a service."""

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None]
    ) -> object:
        """Pause a service and wait until what was in flight has ended."""

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None]
    ) -> object:
        """Stop a service and wait until what was in flight has ended."""

    async def resume(self, name: str) -> None:
        """End the pause or stop of a service."""

    async def deploy_rollout(
        self, name: str, options: RolloutOptions, progress: Callable[[Event], None]
    ) -> object:
        """Deploy the rollout targets of a service."""

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        """Choose which clients the rollout targets serve."""

    async def stop_rollout(self, name: str) -> None:
        """Serve all clients from the service's own targets."""


class ControlledCertificates(Protocol):
    """The certificates of a proxy, which the API controls too."""

    def describe(self) -> list[CertificateDescription]:
        """Describe all certificates, sorted by host."""

    async def renew(self, host: str) -> None:
        """Obtain a new certificate for a host now."""


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
        certificates: Likewise.
        operations: Nursery in which what takes long runs, whoever asked for it.
        log: Where bugs are reported.
    """

    def __init__(
        self,
        services: Controlled,
        certificates: ControlledCertificates,
        operations: trio.Nursery,
        log: Log,
    ) -> None:
        self._services = services
        self._certificates = certificates
        self._operations = operations
        self._log = log

    async def handle(self, stream: SocketStream, _: Address) -> None:
        """Serve one connection; never raises."""
        endpoint = Endpoint(stream, max_body=MAX_BODY, patience=REQUEST_TIMEOUT)
        try:
            call = _Call(self._services, self._certificates, self._operations, self._log, endpoint)
            while await call.serve():
                pass
        except (trio.BrokenResourceError, trio.TooSlowError):
            return  # the client is gone
        except Exception as error:  # a bug must cost one call, not the proxy
            self._log.error("Admin API call failed", error=repr(error))


class _Call:
    """One request to the API and its answer, and then the next."""

    def __init__(
        self,
        services: Controlled,
        certificates: ControlledCertificates,
        operations: trio.Nursery,
        log: Log,
        endpoint: Endpoint,
    ) -> None:
        self._services = services
        self._certificates = certificates
        self._operations = operations
        self._log = log
        self._endpoint = endpoint

    async def serve(self) -> bool:
        """Answer one request; return whether the connection can be used for another."""
        try:
            request = await self._endpoint.receive()
        except ProtocolError as error:
            await self._reject(error)
            return False
        if request is None:
            return False
        try:
            await self._dispatch(request)
        except KamalProxyError as error:
            await self._fail(error)
        return await self._endpoint.next_cycle()

    async def _dispatch(self, request: Request) -> None:
        methods, name = _find_resource(request.path)
        if request.method not in methods:
            raise _BadRequest(
                405,
                f"{request.method} is not possible here; use {' or '.join(methods)}",
                [(b"Allow", ", ".join(methods).encode())],
            )
        await methods[request.method](self, name, request.body)

    async def version(self, _name: str, _body: bytes) -> None:
        await self._answer(200, {"version": __version__, "api": 1})

    async def list_services(self, _name: str, _body: bytes) -> None:
        services = [to_json(service) for service in self._services.describe()]
        await self._answer(200, {"services": services})

    async def list_certificates(self, _name: str, _body: bytes) -> None:
        certificates = [to_json(each) for each in self._certificates.describe()]
        await self._answer(200, {"certificates": certificates})

    async def renew_certificate(self, host: str, _body: bytes) -> None:
        await self._certificates.renew(host)
        await self._endpoint.respond(204, [], b"")

    async def deploy(self, name: str, body: bytes) -> None:
        options = from_json(DeployOptions, _parse_named(name, body))
        options.validate()
        await self._operate("Deploy", name, partial(self._services.deploy, options))

    async def deploy_udp(self, name: str, body: bytes) -> None:
        options = from_json(UdpDeployOptions, _parse_named(name, body))
        options.validate()
        await self._operate("UDP deploy", name, partial(self._services.deploy_udp, options))

    async def remove(self, name: str, _body: bytes) -> None:
        await self._services.remove(name)
        await self._endpoint.respond(204, [], b"")

    async def pause(self, name: str, body: bytes) -> None:
        options = from_json(PauseOptions, _parse(body))
        options.validate()
        await self._operate("Pause", name, partial(self._services.pause, name, options))

    async def stop(self, name: str, body: bytes) -> None:
        options = from_json(StopOptions, _parse(body))
        options.validate()
        await self._operate("Stop", name, partial(self._services.stop_service, name, options))

    async def resume(self, name: str, _body: bytes) -> None:
        await self._services.resume(name)
        await self._endpoint.respond(204, [], b"")

    async def deploy_rollout(self, name: str, body: bytes) -> None:
        options = from_json(RolloutOptions, _parse(body))
        options.validate()
        operation = partial(self._services.deploy_rollout, name, options)
        await self._operate("Rollout deploy", name, operation)

    async def set_rollout(self, name: str, body: bytes) -> None:
        split = from_json(RolloutSplit, _parse(body))
        split.validate()
        await self._services.set_rollout(name, split)
        await self._endpoint.respond(204, [], b"")

    async def stop_rollout(self, name: str, _body: bytes) -> None:
        await self._services.stop_rollout(name)
        await self._endpoint.respond(204, [], b"")

    async def _operate(self, what: str, name: str, operation: _Operation) -> None:
        """Start what takes long and report its events until it ends.

        Args:
            what: What it is, for the log.
            name: The service concerned, for the log.
            operation: Called with what takes its events.
        """
        report = _Report()
        self._operations.start_soon(self._run, what, name, operation, report)
        async with report.events:
            first = await report.next()
            if first.event == "failed" and first.code in _STATUS:
                # It failed before anything happened: that deserves a status of its own.
                raise _Failed(first)
            await self._endpoint.begin([(b"Content-Type", EVENT_STREAM.encode())])
            event = first
            while True:
                await self._endpoint.send_part(json.dumps(to_json(event)).encode() + b"\n")
                if event.event in _LAST:
                    break
                event = await report.next()
        await self._endpoint.end()

    async def _run(
        self,
        what: str,
        name: str,
        operation: _Operation,
        report: _Report,
    ) -> None:
        try:
            await operation(report.add)
        except KamalProxyError as error:
            report.add(_failed_event(error))
        except Exception as error:  # a bug must cost one operation, not the proxy
            self._log.error(f"{what} failed", service=name, error=repr(error))
            report.add(_failed_event(KamalProxyError("internal error; the proxy's log says more")))
        except BaseException:  # cancelled; out of a nursery that is a group
            report.add(_failed_event(ShuttingDownError("the proxy is shutting down")))
            raise

    async def _fail(self, error: KamalProxyError) -> None:
        code = error.event.code if isinstance(error, _Failed) else error.code
        status, headers = _STATUS.get(code, 500), []
        if isinstance(error, _BadRequest):
            status, headers = error.status, error.headers
        document = {"code": code, "message": error.message, "details": list(error.details)}
        await self._answer(status, {"error": document}, headers)

    async def _reject(self, error: ProtocolError) -> None:
        """Answer what could not be read; the connection ends."""
        if error.status == 413:
            await self._fail(_BadRequest(413, str(error), [(b"Connection", b"close")]))
            await self._endpoint.drop()
        else:
            await self._endpoint.refuse(error)

    async def _answer(
        self, status: int, document: object, headers: HeaderPairs | None = None
    ) -> None:
        body = json.dumps(document).encode() + b"\n"
        headers = [(b"Content-Type", b"application/json"), *(headers or [])]
        await self._endpoint.respond(status, headers, body)


_Methods: TypeAlias = "Mapping[str, Callable[[_Call, str, bytes], Awaitable[None]]]"

# Segments of a path after the prefix, with None for a service's name.
_RESOURCES: Mapping[tuple[str | None, ...], _Methods] = {
    (): {"GET": _Call.version},
    ("services",): {"GET": _Call.list_services},
    ("services", None): {"PUT": _Call.deploy, "DELETE": _Call.remove},
    ("udp-services", None): {"PUT": _Call.deploy_udp},
    ("certificates",): {"GET": _Call.list_certificates},
    ("certificates", None, "renew"): {"POST": _Call.renew_certificate},
    ("services", None, "pause"): {"POST": _Call.pause},
    ("services", None, "stop"): {"POST": _Call.stop},
    ("services", None, "resume"): {"POST": _Call.resume},
    ("services", None, "rollout"): {"PUT": _Call.deploy_rollout},
    ("services", None, "rollout", "split"): {
        "PUT": _Call.set_rollout,
        "DELETE": _Call.stop_rollout,
    },
}


def _find_resource(path: str) -> tuple[_Methods, str]:
    """Return what the resource at a path can do, and the name of the service in the path."""
    if path == API_PREFIX or path.startswith(API_PREFIX + "/"):
        segments = path[len(API_PREFIX) :].split("/")[1:]
        name = unquote(segments[1]) if len(segments) > 1 else ""
        methods = _RESOURCES.get((segments[0], None, *segments[2:]) if name else tuple(segments))
        if methods is not None:
            return methods, name
    raise _BadRequest(404, f"no such resource: {path} (the API begins at {API_PREFIX})")


class _Report:
    """The events of an operation on their way to whoever asked for it, who may be slow or gone.

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
    """An operation that failed before its first step."""

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


def _parse_named(name: str, body: bytes) -> dict[str, Any]:
    """Parse a document that may repeat the service's name, which the URL has given."""
    document = _parse(body)
    if document.setdefault("service", name) != name:
        raise InvalidOptionsError(
            f"the document names service '{document['service']}', the URL '{name}'"
        )
    return document
