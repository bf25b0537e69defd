"""What the peers of a plain RTP call are told when it ends: an RTCP compound with BYE. Pure."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_VERSION = 0x80
_RR, _SDES, _BYE = 201, 202, 203
_CNAME = 1
_MAX_SOURCES = 31
_MAX_TEXT = 255  # bytes


def goodbye(ssrcs: Sequence[int], cname: bytes, reason: str) -> bytes:
    """Return what a translator sends in the name of the sources that it stops forwarding.

    An empty receiver report, a source description and BYE (RFC 3550 6.1, 6.4.2, 6.5, 6.6, 7.2).

    Args:
        ssrcs: The sources, from 1 to 31 numbers of 32 bits; the first one sends the report.
        cname: Its canonical name, from 1 to 255 bytes.
        reason: Why, in at most 255 bytes of UTF-8.

    Raises:
        ValueError: one of these does not fit.
    """
    text = reason.encode()
    if not 1 <= len(ssrcs) <= _MAX_SOURCES:
        raise ValueError(f"a BYE names from 1 to {_MAX_SOURCES} sources, not {len(ssrcs)}")
    if not 1 <= len(cname) <= _MAX_TEXT or len(text) > _MAX_TEXT:
        raise ValueError(f"name and reason have at most {_MAX_TEXT} bytes, the name at least one")
    try:
        sources = struct.pack(f">{len(ssrcs)}I", *ssrcs)
    except struct.error:
        raise ValueError("a source is a number of 32 bits") from None
    first = sources[:4]
    item = bytes([_CNAME, len(cname)]) + cname
    # A chunk ends with at least one zero byte, and a packet on 32 bits.
    chunk = first + item + bytes(4 - len(item) % 4)
    said = bytes([len(text)]) + text if text else b""
    return (
        _packet(0, _RR, first)
        + _packet(1, _SDES, chunk)
        + _packet(len(ssrcs), _BYE, sources + said + bytes(-len(said) % 4))
    )


def _packet(count: int, kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", _VERSION | count, kind, len(body) // 4) + body
