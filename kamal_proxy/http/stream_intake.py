"""Heads that come on streams of HTTP/2 or HTTP/3: read within the server's limits, or refused.

What is refused here never becomes an exchange: it is answered, or its stream reset, by the
connection, and logged and counted here.
"""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

from kamal_proxy.http.access_log import log_request
from kamal_proxy.http.codec import RequestHead
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.stream_heads import (
    request_head_untrusted,
    response_fields,
    trailers_untrusted,
)

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs, ProtocolError
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address


def read_head(
    server: HttpServer, fields: HeaderPairs, *, version: bytes, ended: bool
) -> RequestHead:
    """Make the head of a request of the fields that came.

    Args:
        server: Whose limits hold.
        fields: Names and values in the order they came.
        version: ``b"2.0"`` or ``b"3.0"``.
        ended: Whether the request has no body.

    Raises:
        MalformedError: the stream must end without an answer.
        ProtocolError: it may be answered; see :func:`refusal_fields`.
    """
    options = server.options
    return request_head_untrusted(
        fields,
        version=version,
        ended=ended,
        max_size=options.max_head_size,
        max_fields=options.max_headers,
        # New each time (RFC 6455 4.1); few requests have a use for it, and it costs a microsecond.
        websocket_key=base64.b64encode(os.urandom(16)),
    )


def read_trailers(server: HttpServer, fields: HeaderPairs) -> HeaderPairs:
    """Return the trailers of a request that may be passed on.

    Args:
        server: Whose limits hold.
        fields: Names and values in the order they came.

    Raises:
        MalformedError: the stream must end.
    """
    options = server.options
    return trailers_untrusted(
        fields, max_size=options.max_head_size, max_fields=options.max_headers
    )


def refusal_fields(server: HttpServer, error: ProtocolError) -> HeaderPairs:
    """Return the fields of the answer to a head that could be read, but not served."""
    headers = [(b"Date", server.date()), (b"Content-Length", b"0")]
    return response_fields(error.status, headers)


def log_headless(
    server: HttpServer, address: Address, version: bytes, status: int, why: str
) -> None:
    """Log and count a request whose head can't be used.

    Args:
        server: Whose request it was.
        address: The client's.
        version: ``b"2.0"`` or ``b"3.0"``.
        status: What it was answered, or would have been.
        why: What was wrong with it.
    """
    reason = _REASONS.get(status, Reason.BAD_REQUEST)
    server.metrics.request("", b"", status, 0.0)
    server.metrics.failure("", reason)
    server.log.debug("Malformed request", client_addr=address[0], error=why)
    log_request(
        server,
        address,
        RequestHead(b"", b"", version, [], 0),
        status=status,
        remote=address[0].encode(),
        reason=reason,
    )


_REASONS = {reason.status: reason for reason in (Reason.HEAD_TIMEOUT, Reason.HEAD_TOO_LARGE)}
