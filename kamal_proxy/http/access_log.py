"""The log line of a request, whoever answered it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from kamal_proxy.http.codec import RequestHead

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs
    from kamal_proxy.http.headers import Destination
    from kamal_proxy.http.reasons import Reason
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address
    from kamal_proxy.target_options import TargetOptions

_NO_HEAD = RequestHead(b"", b"", b"", [], 0)


def log_request(
    server: HttpServer,
    address: Address,
    head: RequestHead | None,
    *,
    status: int,
    duration: int = 0,
    sent: int = 0,
    response: HeaderPairs | None = None,
    destination: Destination | None = None,
    request_id: bytes = b"",
    remote: bytes = b"",
    service: str = "",
    target: str = "",
    options: TargetOptions | None = None,
    reason: Reason | None = None,
) -> None:
    """Write one line.

    Args:
        server: Whose request it was.
        address: The client's.
        head: The request; None if its head was never understood.
        status: Status of the response; 499 if the client did not wait for one.
        duration: Nanoseconds from the head's arrival to the end.
        sent: Bytes of response body.
        response: Header fields of the response, once they were sent.
        destination: Where the request wanted to go, if that was understood.
        request_id: Its id.
        remote: Whom it comes from, as far as that can be known.
        service: Name of the service that it belonged to.
        target: The target that it was given to.
        options: Options of that service, if it was given to a target: they may ask for more fields.
        reason: Why it did not end well.
    """
    head = head or _NO_HEAD
    client, port = address
    path = destination.path if destination else head.target
    response = response or []
    server.log.request(
        host=destination.host if destination else head.get(b"host"),
        port=server.port,
        path=unquote_to_bytes(path) if b"%" in path else path,
        request_id=request_id,
        status=status,
        service=service,
        target=target,
        duration=duration,
        method=head.method,
        req_content_length=head.length,
        req_content_type=head.get(b"content-type"),
        resp_content_length=sent,
        resp_content_type=_value(response, b"content-type"),
        client_addr=client,
        client_port=port,
        remote_addr=remote,
        user_agent=head.get(b"user-agent"),
        proto="HTTP/" + head.version.decode() if head.version else "",
        scheme=server.scheme,
        query=destination.query if destination else b"",
        headers=_wanted_headers(head, response, options) if options else [],
        reason=reason or "",
    )


def _value(headers: HeaderPairs, name: bytes) -> bytes:
    for raw, value in headers:
        if raw.lower() == name:
            return value
    return b""


def wanted_key(prefix: str, name: str) -> str:
    """Return the key of a field that an option asks for.

    Args:
        prefix: ``req`` or ``resp``.
        name: Name of the field.
    """
    return f"{prefix}_{name.lower().replace('-', '_')}"


def _wanted_headers(
    head: RequestHead, response: HeaderPairs, options: TargetOptions
) -> list[tuple[str, bytes]]:
    """Return the fields that ``--log-request-header`` and ``--log-response-header`` ask for."""
    request = [(raw, value) for _, raw, value in head.headers]
    return [
        (
            wanted_key(prefix, name),
            b",".join(value for raw, value in headers if raw.lower() == name.lower().encode()),
        )
        for prefix, names, headers in (
            ("req", options.log_request_headers, request),
            ("resp", options.log_response_headers, response),
        )
        for name in names
    ]
