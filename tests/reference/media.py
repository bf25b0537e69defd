"""The slow, obvious twin of ``_fastpath.look_at``: what a relay makes of one datagram.

Tests of what writes RTCP take it apart with :func:`packets`, :func:`ssrcs` and :func:`items`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

COOKIE = 0x2112A442
BINDING_ERROR = 0x0111
ERROR_CODE = 9
ALERT = 21
SR, RR, SDES, BYE = 200, 201, 202, 203
CNAME = 1


@attrs.frozen
class Looked:
    """What a datagram is.

    Attributes:
        kind: ``stun``, ``dtls``, ``turn``, ``rtp``, ``rtcp`` or ``other``.
        stun_type: The message type of STUN, 0 of anything else.
        error_code: What a Binding error response says first, 0 if that is no code of STUN.
        alert: Whether an alert under keys (epoch 1 or later) is among the DTLS records.
        ssrc: Who sent the RTP.
        plain: Whether the RTCP can be read; SRTCP can't.
        senders: The SSRCs of sender and receiver reports, in order.
        byes: The SSRCs that say goodbye, in order.
        cname: The first CNAME, empty if there is none.
    """

    kind: str
    stun_type: int = 0
    error_code: int = 0
    alert: bool = False
    ssrc: int = 0
    plain: bool = False
    senders: tuple[int, ...] = ()
    byes: tuple[int, ...] = ()
    cname: bytes = b""


def look_at(data: bytes) -> Looked:
    """Return what a datagram is: RFC 7983 section 7, and RFC 5761 section 4 for RTCP beside RTP."""
    first = data[0] if data else 255
    if first in range(4) and is_stun(data):
        kind = number(data[:2])
        code = error_code(data[20:]) if kind == BINDING_ERROR else 0
        return Looked("stun", stun_type=kind, error_code=code)
    if first in range(20, 64):
        return Looked("dtls", alert=any(map(is_alert, records(data))))
    if first in range(64, 80):
        return Looked("turn")
    if first in range(128, 192):
        if len(data) >= 2 and data[1] in range(192, 224):
            return look_at_rtcp(data) if len(data) >= 8 else Looked("other")
        return Looked("rtp", ssrc=number(data[8:12])) if len(data) >= 12 else Looked("other")
    return Looked("other")


def number(data: bytes) -> int:
    """Return what some bytes stand for in network order."""
    return int.from_bytes(data, "big")


# STUN


def is_stun(data: bytes) -> bool:
    """Return whether the header is right (RFC 8489 section 5); attributes fill 32 bits each."""
    if len(data) < 20 or len(data) % 4:
        return False
    return number(data[2:4]) == len(data) - 20 and number(data[4:8]) == COOKIE


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of what follows the header (section 14), until something is broken."""
    while len(data) >= 4:
        kind, size = struct.unpack("!HH", data[:4])
        if 4 + size > len(data):
            return
        yield kind, data[4 : 4 + size]
        data = data[4 + size + -size % 4 :]


def error_code(data: bytes) -> int:
    """Return the code of the first ERROR-CODE attribute: hundreds, then the rest (14.8)."""
    for kind, value in attributes(data):
        if kind == ERROR_CODE:
            hundreds, rest = (value[2] % 8, value[3]) if len(value) >= 4 else (0, 0)
            return hundreds * 100 + rest if hundreds in range(3, 7) and rest in range(100) else 0
    return 0


# DTLS


def records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a datagram (RFC 6347 section 4.1), until one is not whole."""
    while len(data) >= 13:
        size = 13 + number(data[11:13])
        if size > len(data):
            return
        yield data[:size]
        data = data[size:]


def is_alert(record: bytes) -> bool:
    """Return whether a record is an alert that was sent under keys, so not one of a handshake."""
    return record[0] == ALERT and record[1] == 0xFE and number(record[3:5]) >= 1


# RTCP


def look_at_rtcp(data: bytes) -> Looked:
    """Return what RTCP says, if its lengths add up."""
    try:
        compound = packets(data)
    except ValueError:
        return Looked("rtcp")
    senders: list[int] = []
    byes: list[int] = []
    cnames: list[bytes] = []
    for packet in compound:
        kind, count, body = packet[1], packet[0] % 32, packet[4:]
        if kind in (SR, RR):
            senders += ssrcs(body, 1)
        elif kind == BYE:
            byes += ssrcs(body, count)
        elif kind == SDES:
            cnames += [value for _, item, value in items(body, count) if item == CNAME]
    return Looked(
        "rtcp",
        plain=True,
        senders=tuple(senders),
        byes=tuple(byes),
        cname=cnames[0] if cnames else b"",
    )


def packets(data: bytes) -> list[bytes]:
    """Return the packets of a compound (RFC 3550 section 6.4.1: the length, minus one, in words).

    Raises:
        ValueError: it is none: the lengths do not add up, or not version 2, or padding but in the
            last packet, or no SSRC in the first one.
    """
    found: list[bytes] = []
    while data:
        size = 4 * number(data[2:4]) + 4
        if data[0] // 64 != 2 or len(data) < size or size < (4 if found else 8):
            raise ValueError("not an RTCP compound")
        if data[0] & 32 and len(data) > size:
            raise ValueError("padding in the middle")
        found.append(data[:size])
        data = data[size:]
    return found


def ssrcs(body: bytes, count: int) -> list[int]:
    """Return as many SSRCs as there should be, or as there is room for."""
    return [number(body[at : at + 4]) for at in range(0, 4 * count, 4) if at + 4 <= len(body)]


def items(body: bytes, count: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield SSRC, type and value of what an SDES packet says (section 6.5), until it is broken.

    Args:
        body: What follows the packet's first 32 bits.
        count: How many chunks there should be.
    """
    at = 0
    for _ in range(count):
        ssrc = body[at : at + 4]
        at += 4
        while at < len(body) and body[at]:
            value = at + 2
            end = value + number(body[at + 1 : value])
            if end > len(body):
                return
            yield number(ssrc), body[at], body[value:end]
            at = end
        at += 4 - at % 4  # one zero at least, and as many as make 32 bits
