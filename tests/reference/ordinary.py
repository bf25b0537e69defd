"""The slow, obvious twin of the scanner of ordinary heads: what a head must be, line by line."""

from __future__ import annotations

import re
from collections import Counter

_REQUEST_LINE = re.compile(
    rb"(GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS) "
    rb"/([!\"$&->@-~]|%[0-9A-Fa-f]{2})*"  # no space, control character, number sign, question mark
    rb"(\?[!\"$-~]*)? "
    rb"HTTP/1\.1"
)
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) [ -~]*")
_FIELD = re.compile(rb"([A-Za-z0-9-]+):([ -~\x80-\xff]*)")
_HOST = re.compile(rb"[A-Za-z0-9._-]+(:[0-9]*)?")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,14}")

_HOP = {"connection", "content-length", "content-type", "transfer-encoding"}
_NEVER = {"te", "upgrade", "proxy-connection", "proxy-authenticate", "proxy-authorization"}
_ONCE_IN_REQUESTS = _HOP | {
    *("host", "user-agent", "x-request-id", "x-request-start"),
    *("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"),
}
_NEVER_IN_REQUESTS = _NEVER | {"expect", "forwarded", "keep-alive", "x-kamal-target"}
_ONCE_IN_RESPONSES = _HOP | {"x-accel-buffering"}
_NEVER_IN_RESPONSES = _NEVER | {"host"}


def is_ordinary_request(data: bytes) -> bool:
    """Return whether the data begin with the whole head of an ordinary request."""
    lines = _lines(data)
    if not lines or not _REQUEST_LINE.fullmatch(lines[0]):
        return False
    fields = _fields(lines[1:], _ONCE_IN_REQUESTS, _NEVER_IN_REQUESTS)
    if fields is None:
        return False
    host = fields.get("host", b"")
    return len(host) <= 260 and _HOST.fullmatch(host) is not None


def is_ordinary_response(data: bytes, method: bytes) -> bool:
    """Return whether the data begin with the whole head of an ordinary response to a method."""
    lines = _lines(data)
    line = _STATUS_LINE.fullmatch(lines[0]) if lines else None
    fields = _fields(lines[1:], _ONCE_IN_RESPONSES, _NEVER_IN_RESPONSES)
    if not line or fields is None:
        return False
    has_length = "content-length" in fields
    is_chunked = "transfer-encoding" in fields
    if line[1] == b"204":
        return fields.get("content-length", b"0") == b"0" and not is_chunked
    if line[1] == b"304":
        return not has_length and not is_chunked
    return has_length or (is_chunked and method != b"HEAD")


def _lines(data: bytes) -> list[bytes]:
    """Return the lines of a head, or none if it is not whole."""
    head, blank, _ = data.partition(b"\r\n\r\n")
    return head.split(b"\r\n") if blank else []


def _fields(lines: list[bytes], once: set[str], never: set[str]) -> dict[str, bytes] | None:
    """Return the fields by their names in lower case, if they are ordinary."""
    matches = [_FIELD.fullmatch(line) for line in lines]
    pairs = [(match[1].decode().lower(), match[2].strip(b" ")) for match in matches if match]
    counts = Counter(name for name, _ in pairs)
    fields = dict(pairs)
    if (
        len(pairs) < len(lines)
        or len(pairs) > 100
        or counts.keys() & never
        or any(counts[name] > 1 or fields.get(name) == b"" for name in once)
        or fields.get("connection", b"close").lower() not in (b"close", b"keep-alive")
        or fields.get("transfer-encoding", b"chunked").lower() != b"chunked"
        or not _LENGTH.fullmatch(fields.get("content-length", b"0"))
        or {"content-length", "transfer-encoding"} <= fields.keys()
    ):
        return None
    return fields
