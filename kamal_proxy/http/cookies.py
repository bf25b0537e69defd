"""The cookies that the proxy reads, sets and rewrites (RFC 6265). Pure."""

from __future__ import annotations

import re
from email.utils import formatdate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kamal_proxy.http.codec import Header, HeaderPairs

ROLLOUT = b"kamal-rollout"
WRITER = b"kamal-writer"

_OPT_OUT = b"x-writer-affinity"
_SPACE = b" \t"
_LONGEST = 2**63 / 10**9  # seconds, as the saved state has it; dates beyond can't be written
_MILLISECONDS = re.compile(rb"[+-]?[0-9]{1,18}")


def find_cookie(headers: list[Header], wanted: bytes) -> bytes:
    """Return the value of the first cookie of that name, or nothing."""
    for name, _, value in headers:
        if name == b"cookie" and wanted in value:
            for pair in value.split(b";"):
                key, equals, text = pair.strip(_SPACE).partition(b"=")
                if equals and key.rstrip(_SPACE) == wanted:
                    return text[1:-1] if len(text) > 1 and text[:1] == text[-1:] == b'"' else text
    return b""


def is_recent_writer(headers: list[Header], now: float) -> bool:
    """Return whether a client has written so recently that it must not read stale data.

    Args:
        headers: The request's.
        now: Seconds since 1970.
    """
    value = find_cookie(headers, WRITER)
    return bool(_MILLISECONDS.fullmatch(value)) and now * 1000 < int(value)


def with_writer_cookie(headers: HeaderPairs, now: float, lasting: float) -> HeaderPairs:
    """Tell a client that wrote to keep off the read targets, unless the target opts out of that.

    Args:
        headers: Header fields of the response.
        now: Seconds since 1970.
        lasting: Seconds for which it should.
    """
    kept = [pair for pair in headers if pair[0].lower() != _OPT_OUT]
    if any(raw.lower() == _OPT_OUT and value == b"false" for raw, value in headers):
        return kept
    return [*kept, (b"Set-Cookie", writer_cookie(now, lasting))]


def writer_cookie(now: float, lasting: float) -> bytes:
    """Return the Set-Cookie value for a client that has just written.

    Args:
        now: Seconds since 1970.
        lasting: Seconds for which it counts as having done so.
    """
    expiry = now + min(lasting, _LONGEST)
    # A second later, so that the cookie is still sent when it is compared with the clock.
    expires = formatdate(expiry + 1, usegmt=True).encode()
    return b"kamal-writer=%d; Path=/; Expires=%b; HttpOnly" % (expiry * 1000, expires)


def scope_cookies(headers: HeaderPairs, prefix: bytes, host: bytes) -> HeaderPairs:
    """Apply :func:`scope_cookie` to the header fields of a response."""
    return [
        (raw, scope_cookie(value, prefix, host)) if raw.lower() == b"set-cookie" else (raw, value)
        for raw, value in headers
    ]


def scope_cookie(value: bytes, prefix: bytes, host: bytes) -> bytes:
    """Put a service's path prefix in front of the path of a cookie that its target sets.

    Everything else stays as it is. A cookie for another domain is not touched.

    Args:
        value: Value of a Set-Cookie field.
        prefix: The prefix that was removed from the request's path.
        host: The request's host, without port.
    """
    pair, *attributes = value.split(b";")
    if b"=" not in pair:
        return value
    path = b""
    kept = [pair]
    place = 0
    for attribute in attributes:
        key, _, text = attribute.partition(b"=")
        name = key.strip(_SPACE).lower()
        if name == b"domain" and text.strip(_SPACE).lower() not in (b"", host.lower()):
            return value
        if name == b"path":
            path = text.strip(_SPACE).strip(b'"')  # the last one counts (RFC 6265 5.2.4)
            place = place or len(kept)
        else:
            kept.append(attribute)
    rest = path.strip(b"/")
    scoped = b" Path=" + prefix + (b"/" + rest if rest else b"")
    kept.insert(place or len(kept), scoped)
    return b";".join(kept)
