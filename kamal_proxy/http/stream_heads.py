"""Heads of requests and responses on a multiplexed stream, HTTP/2 or HTTP/3. Pure.

Those of requests become what HTTP/1.1 would have said, so that everything behind sees one form. It
is stricter than what the targets read: nothing passes that could end a line or mean two things
there (RFC 9113 8.2, 8.3 and 10.3; RFC 9114 4.2 and 4.3).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote_from_bytes

from kamal_proxy.http.codec import CHUNKED, Header, ProtocolError, RequestHead, may_be_trailer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kamal_proxy.http.codec import HeaderPairs

#: What each field counts beside its name and value (RFC 9113 6.5.2, RFC 9114 4.2.2).
FIELD_OVERHEAD: Final = 32

#: What a field's name may be (RFC 9113 8.2).
NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# A control character in a value ends it, or a line, for some reader; white space around it is no
# part of it (RFC 9113 8.2.1).
_VALUE = re.compile(rb"(?![ \t])[^\x00-\x08\x0a-\x1f\x7f]*(?<![ \t])")
_TARGET = re.compile(rb"[!-~]+")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_ASCII = bytes(range(128))

_PSEUDO = frozenset({b":authority", b":method", b":path", b":protocol", b":scheme"})
#: What no stream carries (RFC 9113 8.2.2, RFC 9114 4.2).
CONNECTION_SPECIFIC: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_WEBSOCKET = b"websocket"
# The key has no meaning on a stream (RFC 8441 5.1); the one that the target gets is the proxy's.
_KEYS = frozenset({b"sec-websocket-accept", b"sec-websocket-key"})


class MalformedError(Exception):
    """A message that must not be read (RFC 9113 8.1.1): its stream ends; the text says why."""


def request_head_untrusted(
    fields: Iterable[tuple[bytes, bytes]],
    *,
    version: bytes,
    ended: bool,
    max_size: int,
    max_fields: int,
    websocket_key: bytes = b"",
) -> RequestHead:
    """Make the head of a request of the fields that came on a stream.

    Args:
        fields: Names and values in the order they came.
        version: ``b"2.0"`` or ``b"3.0"``.
        ended: Whether the stream ended with them: the request has no body.
        max_size: Most bytes of names and values, each field counted with ``FIELD_OVERHEAD``.
        max_fields: Most fields besides the pseudo-header fields.
        websocket_key: What the target is given as Sec-WebSocket-Key if this is to be a WebSocket.

    Raises:
        MalformedError: the stream must end without an answer.
        ProtocolError: it may be answered: too large (431), a protocol that is not known (501).
    """
    pseudo: dict[bytes, bytes] = {}
    headers: list[Header] = []
    cookies: list[bytes] = []
    host: bytes | None = None
    length = -1
    size = 0
    for name, value in fields:
        size += len(name) + len(value) + FIELD_OVERHEAD
        if name.startswith(b":"):
            if name not in _PSEUDO or name in pseudo or headers or cookies or host is not None:
                raise MalformedError(f"{_shown(name)} is unknown, repeated or late")
            _check_value(name, value)
            pseudo[name] = value
            continue
        _check_field(name, value)
        if name == b"cookie":
            cookies.append(value)  # RFC 9113 8.2.3: crumbs of one field
        elif name == b"host":
            if host is not None:
                raise MalformedError("more than one host field")
            host = value
        else:
            if name == b"content-length":
                if length >= 0 or not _DIGITS.fullmatch(value):
                    raise MalformedError("content-length is malformed or repeated")
                length = int(value)
            headers.append((name, name, value))
    if size > max_size:
        raise ProtocolError(f"request head over {max_size} bytes", 431)
    if len(headers) + len(cookies) > max_fields:
        raise ProtocolError(f"more than {max_fields} header fields", 431)
    if ended and length > 0:
        raise MalformedError("a body was announced, and none came")
    if cookies:
        headers.append((b"cookie", b"cookie", b"; ".join(cookies)))
    method = pseudo.get(b":method", b"")
    if not _METHOD.fullmatch(method):
        raise MalformedError(":method is missing or no token")
    authority = _authority(pseudo.get(b":authority"), host)
    headers.insert(0, (b"host", b"host", authority))
    protocol = pseudo.get(b":protocol")
    if method == b"CONNECT" and protocol is None:
        # A tunnel to anywhere, which is refused in words.
        if b":scheme" in pseudo or b":path" in pseudo:
            raise MalformedError("CONNECT with :scheme or :path")
        return RequestHead(method, authority, version, headers, CHUNKED)
    target = _target(method, pseudo)
    if protocol is None:
        body = 0 if ended else CHUNKED if length < 0 else length
        return RequestHead(method, target, version, headers, body)
    if method != b"CONNECT":
        raise MalformedError(":protocol without CONNECT")
    if ended:
        raise MalformedError("a tunnel that has ended before it began")
    if protocol.lower() != _WEBSOCKET:
        raise ProtocolError("extended CONNECT is for websocket only", 501)
    headers = [each for each in headers if each[0] not in _KEYS and each[0] != b"content-length"]
    headers.append((b"sec-websocket-key", b"sec-websocket-key", websocket_key))
    # As HTTP/1.1 would say it (RFC 8441 5.1).
    return RequestHead(b"GET", target, version, headers, 0, _WEBSOCKET)


def trailers_untrusted(
    fields: Iterable[tuple[bytes, bytes]], *, max_size: int, max_fields: int
) -> HeaderPairs:
    """Return the trailers of a request that may be passed on.

    Args:
        fields: Names and values in the order they came.
        max_size: Most bytes of names and values, each field counted with ``FIELD_OVERHEAD``.
        max_fields: Most fields.

    Raises:
        MalformedError: the stream must end.
    """
    trailers: HeaderPairs = []
    size = count = 0
    for name, value in fields:
        if name.startswith(b":"):
            raise MalformedError(f"{_shown(name)} among the trailers")
        _check_field(name, value)
        size += len(name) + len(value) + FIELD_OVERHEAD
        count += 1
        if may_be_trailer(name):
            trailers.append((name, value))
    if size > max_size or count > max_fields:
        raise MalformedError("too many trailers")
    return trailers


def response_fields(status: int, headers: HeaderPairs) -> HeaderPairs:
    """Return the fields of a response: lower-case names, and nothing that is for HTTP/1.1 only.

    Args:
        status: Its status.
        headers: Its header fields.
    """
    return [(b":status", b"%d" % status), *plain_fields(headers)]


def plain_fields(headers: HeaderPairs) -> HeaderPairs:
    """Return header fields, or trailers, as a stream carries them; see :func:`response_fields`."""
    fields = [(name.lower(), value) for name, value in headers]
    return [field for field in fields if field[0] not in CONNECTION_SPECIFIC]


def _check_field(name: bytes, value: bytes) -> None:
    if not NAME.fullmatch(name):
        raise MalformedError(f"{_shown(name)} is no lower-case field name")
    _check_value(name, value)
    if name in CONNECTION_SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
        raise MalformedError(f"{_shown(name)} belongs to a connection of HTTP/1.1")


def _check_value(name: bytes, value: bytes) -> None:
    if not _VALUE.fullmatch(value):
        raise MalformedError(
            f"control character, or white space around the value, in {_shown(name)}"
        )


def _authority(authority: bytes | None, host: bytes | None) -> bytes:
    if authority is None:
        authority = host
    elif host is not None and host.lower() != authority.lower():
        raise MalformedError(":authority and host differ")
    if not authority:
        raise MalformedError(":authority is missing")
    return authority


def _target(method: bytes, pseudo: dict[bytes, bytes]) -> bytes:
    if pseudo.get(b":scheme", b"").lower() not in (b"http", b"https"):
        raise MalformedError(":scheme is missing or not http or https")
    target = pseudo.get(b":path", b"")
    if not target.isascii():
        # As over HTTP/1.1, where some clients send plain UTF-8, too.
        target = quote_from_bytes(target, safe=_ASCII).encode()
    if not _TARGET.fullmatch(target):
        raise MalformedError(":path is missing or has white space")
    # An absolute form would be read by the proxy and its targets in two ways.
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        raise MalformedError(":path is no path")
    return target


def _shown(name: bytes) -> str:
    return repr(name[:64].decode("latin-1"))
