"""The slow, obvious twin of ``_fastpath.ChunkScanner``: reads a body from its beginning."""

from __future__ import annotations

import re


class _More(Exception):
    """The data ends here, and nothing is wrong so far."""


def scan(data: bytes, limit: int) -> tuple[int, bool]:
    """Return how many bytes belong to the body, and whether it has ended."""
    try:
        return _body(data, limit), True
    except _More:
        return len(data), False


def _body(data: bytes, limit: int) -> int:
    at = 0
    while True:
        digits = re.match(rb"[0-9A-Fa-f]*", data[at:])[0]  # type: ignore[index]  # always matches
        if len(digits) > 15:
            raise ValueError("chunk size of more than 15 digits")
        at += len(digits)
        sign = _byte(data, at)
        if not digits or sign not in b";\r":
            raise ValueError("malformed chunk size")
        if sign == b";":
            at += 1
            at += _line(data[at:], limit)
        at = _line_end(data, at)
        size = int(digits, 16)
        if size == 0:
            return _trailers(data, at, limit)
        at += size
        if _byte(data, at) != b"\r":
            raise ValueError("chunk longer than its size")
        at = _line_end(data, at)


def _trailers(data: bytes, at: int, limit: int) -> int:
    while _byte(data, at) != b"\r":
        if _byte(data, at) in b" \t":
            raise ValueError("folded trailer line")
        size = _line(data[at:], limit)
        limit -= size
        at = _line_end(data, at + size)
    return _line_end(data, at)


def _byte(data: bytes, at: int) -> bytes:
    if at >= len(data):
        raise _More
    return data[at : at + 1]


def _line(data: bytes, limit: int) -> int:
    """Return how long the text before the next CR is."""
    text = data.partition(b"\r")[0]
    for number, byte in enumerate(text, 1):
        if byte == 0x7F or (byte < 0x20 and byte != 0x09):
            raise ValueError("control character in chunked framing")
        if number > limit:
            raise ValueError("chunk extension or trailers too long")
    if len(text) == len(data):
        raise _More
    return len(text)


def _line_end(data: bytes, at: int) -> int:
    """Return the offset after the CR LF that begins at ``at``."""
    if _byte(data, at + 1) != b"\n":
        raise ValueError("CR without LF in chunked framing")
    return at + 2
