"""The fields of a request to an HTTP/2 target, and of its response, beside those of HTTP/1.1. Pure.

What is malformed in a response costs its stream only (RFC 9113 8.1.1), so it is looked for here and
not by the h2 library, which would end the whole connection.
"""

from __future__ import annotations

import re

from hpack import NeverIndexedHeaderTuple

from kamal_proxy.http.codec import (
    CHUNKED,
    Header,
    HeaderPairs,
    ProtocolError,
    ResponseHead,
    may_be_trailer,
)
from kamal_proxy.http.pages import reason
from kamal_proxy.http.stream_heads import CONNECTION_SPECIFIC, NAME

_VALUE = re.compile(rb"(?:[^\x00\r\n \t](?:[^\x00\r\n]*[^\x00\r\n \t])?)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"[1-9][0-9][0-9]")
_NOT_SENT = CONNECTION_SPECIFIC | {b"host"}
# RFC 8441 5.1: the handshake of a WebSocket has no use for it on a stream.
_NOT_IN_CONNECT = _NOT_SENT | {b"sec-websocket-key"}
_NOT_IN_SWITCH = frozenset({b"content-length", b"sec-websocket-accept", b"upgrade"})
# Other with each request, so that they would only drive the rest out of the table; or secret.
_NOT_INDEXED = frozenset(
    {b"authorization", b"content-length", b"cookie", b"x-request-id", b"x-request-start"}
)


def request_fields(
    method: bytes, target: bytes, headers: HeaderPairs, protocol: bytes = b""
) -> HeaderPairs:
    """Return the fields of a request (RFC 9113 8.3.1).

    Args:
        method: Its method.
        target: Its path and query.
        headers: The fields of the same request over HTTP/1.1, Host among them.
        protocol: What is to be spoken on the stream instead of HTTP (RFC 8441 4), if anything.
    """
    authority = b""
    fields: HeaderPairs = []
    dropped = _NOT_IN_CONNECT if protocol else _NOT_SENT
    for raw, value in headers:
        name = raw.lower()
        if name in _NOT_INDEXED:
            fields.append(NeverIndexedHeaderTuple(name, value))
        elif name not in dropped:
            fields.append((name, value))
        elif name == b"host":
            authority = value
    pseudo = [
        (b":method", b"CONNECT" if protocol else method),
        (b":scheme", b"http"),
        (b":authority", authority),
        (b":path", target),
    ]
    if protocol:
        pseudo.append((b":protocol", protocol))
    return pseudo + fields


def response_head(fields: HeaderPairs, *, ended: bool) -> ResponseHead:
    """Return the head of a response, 1xx or final.

    Args:
        fields: Its fields as they were received.
        ended: Whether nothing follows it.

    Raises:
        ProtocolError: it is malformed.
    """
    if not fields or fields[0][0] != b":status" or not _STATUS.fullmatch(fields[0][1]):
        raise ProtocolError("response without a status")
    status = int(fields[0][1])
    if status == 101:
        raise ProtocolError("status 101 in HTTP/2")  # RFC 9113 8.6
    headers = _headers(fields[1:])
    length = 0 if ended else CHUNKED
    lengths = 0
    for name, _, value in headers:
        if name == b"content-length":
            lengths += 1
            if lengths > 1 or not _LENGTH.fullmatch(value):
                raise ProtocolError("malformed or repeated content-length")
            if not ended:
                length = int(value)
    return ResponseHead(status, reason(status).encode(), headers, length)


def switching_head(head: ResponseHead, accept: bytes) -> ResponseHead:
    """Return the 101 response that HTTP/1.1 has for a WebSocket that was accepted on a stream."""
    headers = [header for header in head.headers if header[0] not in _NOT_IN_SWITCH]
    headers += [
        (b"upgrade", b"Upgrade", b"websocket"),
        (b"sec-websocket-accept", b"Sec-WebSocket-Accept", accept),
    ]
    return ResponseHead(101, b"Switching Protocols", headers, 0)


def trailers(fields: HeaderPairs) -> HeaderPairs:
    """Return the trailers of a response that a client may see.

    Raises:
        ProtocolError: they are malformed.
    """
    return [(name, value) for name, _, value in _headers(fields) if may_be_trailer(name)]


def _headers(fields: HeaderPairs) -> list[Header]:
    headers: list[Header] = []
    for name, value in fields:
        if not NAME.fullmatch(name):
            raise ProtocolError(f"malformed field name {name[:100]!r}")
        if not _VALUE.fullmatch(value):
            raise ProtocolError(f"malformed value of {name[:100]!r}")
        if name in CONNECTION_SPECIFIC:
            raise ProtocolError(f"field {name.decode()!r} in HTTP/2")
        headers.append((name, name, value))
    return headers
