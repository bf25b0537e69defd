"""What calls are made of, for tests of the relay: datagrams of STUN, DTLS, RTP and RTCP.

Only as much of each as the relay looks at. Encrypted parts are zeros.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.udp.relaying import Datagram

REQUEST, SUCCESS, ERROR = 0x0001, 0x0101, 0x0111
USERNAME, ERROR_CODE = 0x0006, 0x0009
SR, RR, SDES, BYE = 200, 201, 202, 203
HANDSHAKE, ALERT = 22, 21


# STUN (RFC 8489)


def stun(kind: int, attribute: int = 0, value: bytes = b"", *, transaction: int = 0) -> bytes:
    """Return a message with at most one attribute."""
    body = b""
    if attribute:
        body = struct.pack("!HH", attribute, len(value)) + value + bytes(-len(value) % 4)
    header = struct.pack("!HHI", kind, len(body), 0x2112A442)
    return header + transaction.to_bytes(12) + body


def request(ufrag: bytes = b"theirs", *, transaction: int = 0) -> bytes:
    """Return a Binding request of ICE."""
    return stun(REQUEST, USERNAME, ufrag + b":ours", transaction=transaction)


def success(*, transaction: int = 0) -> bytes:
    """Return what answers a Binding request."""
    return stun(SUCCESS, transaction=transaction)


def error(code: int) -> bytes:
    """Return what refuses a Binding request."""
    return stun(ERROR, ERROR_CODE, bytes([0, 0, code // 100, code % 100]) + b"why")


def is_request(data: bytes) -> bool:
    return data[:2] == REQUEST.to_bytes(2) and len(data) >= 20


def answering(*answers: bytes) -> Callable[[Datagram], Iterable[bytes]]:
    """Answer Binding requests, and nothing else."""
    return lambda datagram: answers if is_request(datagram.data) else ()


# DTLS (RFC 6347)


def record(kind: int, epoch: int = 1, size: int = 16) -> bytes:
    """Return a record of DTLS 1.2."""
    return struct.pack("!BHHHIH", kind, 0xFEFD, epoch, 0, 7, size) + bytes(size)


# RTP and RTCP (RFC 3550)


def rtp(ssrc: int, payload: bytes = b"voice") -> bytes:
    return struct.pack("!BBHII", 0x80, 96, 1, 2, ssrc) + payload


def packet(kind: int, count: int, body: bytes) -> bytes:
    return struct.pack("!BBH", 0x80 | count, kind, len(body) // 4) + body


def sender_report(ssrc: int) -> bytes:
    return packet(SR, 0, ssrc.to_bytes(4) + bytes(20))


def receiver_report(ssrc: int) -> bytes:
    return packet(RR, 0, ssrc.to_bytes(4))


def described(ssrc: int, cname: bytes) -> bytes:
    """Return the packet that tells a source's CNAME."""
    items = bytes([1, len(cname)]) + cname
    return packet(SDES, 1, ssrc.to_bytes(4) + items + bytes(4 - len(items) % 4))


def bye(*ssrcs: int) -> bytes:
    return packet(BYE, len(ssrcs), b"".join(ssrc.to_bytes(4) for ssrc in ssrcs))


def garbled(ssrc: int) -> bytes:
    """Return what SRTCP looks like (RFC 3711 3.4): a report, then what no length accounts for."""
    return receiver_report(ssrc) + bytes(14)
