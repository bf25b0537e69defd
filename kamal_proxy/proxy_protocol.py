"""The header of HAProxy's PROXY protocol, versions 1 and 2: whom a connection is really from. Pure.

Source: ``doc/proxy-protocol.txt`` of HAProxy. This module reads a header at the beginning of what
a peer sent, and writes one; who may send headers, and how long to wait for one, is not its
concern. Bytes that can't become a header are refused as soon as they show it.
"""

from __future__ import annotations

import re
import struct
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from typing import Final, TypeAlias

import attrs

Address: TypeAlias = tuple[str, int]  # address and port

# The size of the longest line that the protocol's source calculates.
MAX_LINE: Final = 107
# Version 2 could announce 64 KiB, all to be kept before anything is known of the sender. What
# senders add (host name, ids, a client certificate's names) fits well into this, nginx's bound too.
MAX_SIZE: Final = 4096

_OPENINGS = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN ", b"PROXY UNKNOWN\r\n")
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = 16  # bytes before the addresses of version 2
# By address family: IPv4, IPv6, Unix. Both addresses, then both ports, which Unix has none of.
_BLOCKS = {
    1: struct.Struct("!4s4sHH"),
    2: struct.Struct("!16s16sHH"),
    3: struct.Struct("!108s108s"),
}
_UNIX = 3
_STREAM, _DATAGRAM = 1, 2
_MAPPED = bytes(10) + b"\xff\xff"  # what makes an IPv6 address of an IPv4 address
_CRC32C = 3  # type of the checksum among the optional fields

_OCTET = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_PORT = (
    rb"(?:6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}"
    rb"|[1-5][0-9]{4}|[1-9][0-9]{0,3}|0)"
)


class ProxyHeaderError(Exception):
    """What a peer sent is not, and can't become, a PROXY protocol header."""


@attrs.frozen
class Header:
    """A PROXY protocol header.

    Attributes:
        size: Bytes that the header took; what follows belongs to the connection.
        source: Address and port of the client, or None if the connection's own peer counts.
        destination: Address and port that the client connected to, or None likewise.
    """

    size: int
    source: Address | None
    destination: Address | None


def parse_untrusted(data: bytes | bytearray) -> Header | None:
    """Parse the header at the beginning of a connection.

    Args:
        data: All that was received so far, of which at most ``MAX_SIZE`` bytes are looked at.

    Returns:
        The header, or None if more bytes are needed.

    Raises:
        ProxyHeaderError: the bytes can't become a header; the sentence says why.
    """
    if _SIGNATURE.startswith(bytes(data[: len(_SIGNATURE)])):
        return _parse_v2(data) if len(data) >= len(_SIGNATURE) else None
    line = bytes(data[:MAX_LINE])
    for opening in _OPENINGS:
        if opening.startswith(line[: len(opening)]):
            return _parse_v1(line, opening) if len(line) >= len(opening) else None
    raise ProxyHeaderError("the connection does not begin with a PROXY protocol header")


# --- version 1 -----------------------------------------------------------------------------------


class _Family:
    """The lines of one address family: how a whole one looks, and what may still become one."""

    def __init__(self, kind: type[IPv4Address | IPv6Address], address: bytes, begun: bytes) -> None:
        self.kind = kind
        self.whole = re.compile(rb"(%b) (%b) (%b) (%b)" % (address, address, _PORT, _PORT))
        # The beginning of a port is a port, if it is not empty.
        begin = rb"%b|%b (?:%b|%b (?:%b?|%b (?:%b\r?)?))"
        parts = (begun, address, begun, address, _PORT, _PORT, _PORT)
        self.begun = re.compile(begin % parts)


_FAMILIES = {
    b"PROXY TCP4 ": _Family(
        IPv4Address,
        rb"(?:%b\.){3}%b" % (_OCTET, _OCTET),
        rb"(?:%b\.){0,3}%b?" % (_OCTET, _OCTET),
    ),
    # Whether such a text is an address is asked of ``ipaddress`` once the line is whole.
    b"PROXY TCP6 ": _Family(IPv6Address, rb"[0-9A-Fa-f:.]{2,45}", rb"[0-9A-Fa-f:.]{0,45}"),
}


def _parse_v1(line: bytes, opening: bytes) -> Header | None:
    end = line.find(b"\r\n")
    if end < 0 and len(line) >= MAX_LINE - (not line.endswith(b"\r")):
        raise ProxyHeaderError(f"the PROXY protocol line has more than {MAX_LINE} bytes")
    family = _FAMILIES.get(opening)
    if family is None:  # UNKNOWN: what follows in the line means nothing
        ignored = line[:end] if end >= 0 else line.removesuffix(b"\r")
        # A line that ends otherwise would take the next one with it.
        if b"\r" in ignored or b"\n" in ignored:
            raise ProxyHeaderError("the PROXY protocol line does not end with CRLF")
        return Header(end + 2, None, None) if end >= 0 else None
    start = len(opening)
    if end < 0 and family.begun.fullmatch(line, start):
        return None
    found = family.whole.fullmatch(line, start, end) if end >= 0 else None
    if found is None:
        raise ProxyHeaderError(
            f"the PROXY protocol line is not two {opening[6:10].decode()} addresses and two ports"
        )
    try:
        source, destination = (str(_plain(family.kind(found[i].decode()))) for i in (1, 2))
    except AddressValueError:
        raise ProxyHeaderError("the PROXY protocol line has a malformed IPv6 address") from None
    return Header(end + 2, (source, int(found[3])), (destination, int(found[4])))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Make IPv4 in IPv6 IPv4, as the listeners do."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


# --- version 2 -----------------------------------------------------------------------------------


def _parse_v2(data: bytes | bytearray) -> Header | None:
    """Parse what begins with the signature. Each byte is judged as soon as it is there."""
    version, command, family, transport = 2, 0, 0, 0
    if len(data) > 12:
        version, command = divmod(data[12], 16)
    if version != 2:
        raise ProxyHeaderError(f"PROXY protocol version {version} is not known")
    if command > 1:
        raise ProxyHeaderError(f"PROXY protocol command {command} is not known")
    if len(data) > 13 and command:  # LOCAL: nothing but the size counts
        family, transport = divmod(data[13], 16)
    if family > _UNIX or transport > _DATAGRAM:
        raise ProxyHeaderError(f"PROXY protocol family 0x{data[13]:02x} is not known")
    size = _FIXED + int.from_bytes(data[14:_FIXED].ljust(2, b"\0"), "big")
    if size > MAX_SIZE:
        raise ProxyHeaderError(f"the PROXY protocol header has more than {MAX_SIZE} bytes")
    if len(data) < _FIXED:
        return None
    block = _BLOCKS.get(family)
    if block is not None and size < _FIXED + block.size:
        raise ProxyHeaderError("the PROXY protocol header is too short for its addresses")
    if len(data) < size:
        return None
    if block is not None:
        _check_fields(bytes(data[:size]), _FIXED + block.size)
    if block is None or family == _UNIX or not transport:
        return Header(size, None, None)
    source, destination, source_port, destination_port = block.unpack_from(data, _FIXED)
    return Header(
        size, (_unpacked(source), source_port), (_unpacked(destination), destination_port)
    )


def _unpacked(address: bytes) -> str:
    return str(_plain(IPv4Address(address) if len(address) == 4 else IPv6Address(address)))


def _check_fields(header: bytes, position: int) -> None:
    """Check the optional fields (type, length, value) of a header, and its checksum if it has one.

    Nothing but the checksum is of interest, and a receiver that can verify it must. Where no
    address is taken over, in LOCAL headers and unspecified families, nobody calls this.
    """
    checksum = -1
    while position < len(header):
        value = position + 3
        end = value + int.from_bytes(header[position + 1 : value], "big")
        if end > len(header):
            raise ProxyHeaderError("a field of the PROXY protocol header exceeds it")
        if header[position] == _CRC32C:
            # More than one could not be right, and would make this quadratic.
            if checksum >= 0 or end - value != 4:
                raise ProxyHeaderError("the PROXY protocol header has a malformed checksum")
            checksum = value
        position = end
    if checksum >= 0:
        zeroed = header[:checksum] + bytes(4) + header[checksum + 4 :]
        if crc32c(zeroed) != int.from_bytes(header[checksum : checksum + 4], "big"):
            raise ProxyHeaderError("the PROXY protocol header's checksum is wrong")


def _crc32c_table() -> tuple[int, ...]:
    table = list(range(256))
    for _ in range(8):
        # The polynomial's bits are reversed, as the bits of the data are.
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return tuple(table)


_CRC32C_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes, as RFC 4960 appendix B describes it."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = checksum >> 8 ^ _CRC32C_TABLE[(checksum ^ byte) & 0xFF]
    return checksum ^ 0xFFFFFFFF


def encode_v2(source: Address, destination: Address, *, datagram: bool = False) -> bytes:
    """Write a version 2 header, without optional fields.

    Args:
        source: Address and port of the client; a scope (``fe80::1%eth0``) is left out.
        destination: Address and port that the client sent to.
        datagram: Whether UDP is forwarded, not TCP.

    Returns:
        28 bytes for IPv4, 52 for IPv6. Where only one address is IPv4 it is written in IPv6.

    Raises:
        ValueError: an address or a port is none.
    """
    packed = [_plain(ip_address(text)).packed for text, _ in (source, destination)]
    family = 1 if all(len(each) == 4 for each in packed) else 2
    if family == 2:
        packed = [_MAPPED + each if len(each) == 4 else each for each in packed]
    try:
        block = _BLOCKS[family].pack(*packed, source[1], destination[1])
    except struct.error:
        raise ValueError(f"{source[1]} or {destination[1]} is no port") from None
    kind = family << 4 | (_DATAGRAM if datagram else _STREAM)
    return _SIGNATURE + struct.pack("!BBH", 0x21, kind, len(block)) + block
