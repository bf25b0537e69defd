"""The one STUN message that says whose a client is: an ICE client's Binding request. Pure.

Reads bytes of strangers and trusts none; checks no integrity, because only the server that the
client belongs to has the key. What follows a request is looked at by the relay.
"""

from __future__ import annotations

import struct

import attrs

_HEADER = struct.Struct(">HHI")  # type, bytes after the header, magic cookie (RFC 8489 5)
_ATTRIBUTE = struct.Struct(">HH")  # type, length
_HEADER_SIZE = 20  # with the transaction's number
_BINDING_REQUEST = 0x0001
_COOKIE = 0x2112A442
_USERNAME = 0x0006
# Two fragments of 256 characters (RFC 8839 5.4) and the colon: more than the 508 bytes that others
# may send (RFC 8489 14.3).
_MAX_USERNAME = 513  # bytes


@attrs.frozen
class BindingRequest:
    """A Binding request of ICE.

    Attributes:
        ufrag: The user name fragment of the server that the client wants (RFC 8445 7.2.2).
    """

    ufrag: bytes


def parse_binding_request_untrusted(data: bytes) -> BindingRequest | None:
    """Read a Binding request; never raises.

    Args:
        data: Any datagram.

    Returns:
        None if it is no Binding request, is malformed up to its user name, or has none with a
        server's part; the first user name counts.
    """
    if len(data) < _HEADER_SIZE or len(data) % 4:
        return None
    kind, length, cookie = _HEADER.unpack_from(data)
    if kind != _BINDING_REQUEST or cookie != _COOKIE or length != len(data) - _HEADER_SIZE:
        return None
    at = _HEADER_SIZE
    while at + _ATTRIBUTE.size <= len(data):
        kind, size = _ATTRIBUTE.unpack_from(data, at)
        at += _ATTRIBUTE.size
        if at + size > len(data):
            return None
        if kind == _USERNAME:
            ufrag, colon, _ = data[at : at + size].partition(b":")
            return BindingRequest(ufrag) if ufrag and colon and size <= _MAX_USERNAME else None
        at += (size + 3) // 4 * 4
    return None
