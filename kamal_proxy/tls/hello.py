"""The first message of a TLS client: the name, protocols and versions that it asks for. Pure.

Reads bytes of strangers and trusts none. It is read before TLS itself does it, because the
certificate, the trusted clients and the protocols to offer depend on it, and because most of what
scanners send can be refused without a context. Nothing of it is consumed.
"""

from __future__ import annotations

import re
import struct
from typing import Final

import attrs

#: The longest beginning of a connection that is searched for a hello, in bytes. Those of browsers
#: have about 2 KB (with post-quantum key shares).
MAX_HELLO: Final = 32 * 1024
#: The records over which a hello may be spread. Without this, one byte per record and packet would
#: make a stranger's 32 KiB very expensive.
MAX_RECORDS: Final = 64

_HANDSHAKE = 22  # type of a record (RFC 8446 5.1)
_CLIENT_HELLO = 1  # type of a handshake message (RFC 8446 4)
_RECORD_HEADER = 5  # bytes: type, version, length
_MESSAGE_HEADER = 4  # bytes: type, length
_MAX_RECORD = 16 * 1024
_BEFORE_SESSION = 2 + 32  # bytes: version, random

# Types of extensions: RFC 6066 3, RFC 7301 3.1, RFC 8446 4.2.1.
_SERVER_NAME = 0
_ALPN = 16
_SUPPORTED_VERSIONS = 43
_OF_INTEREST = {_SERVER_NAME, _ALPN, _SUPPORTED_VERSIONS}
_EXTENSION = struct.Struct("!HH")  # type, length
_HOST_NAME = 0  # the one type of server names

# What a certificate can be for. Anything else is no name that could be looked up.
_NAME = re.compile(rb"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_MAX_NAME = 253
# The beginning of a request line: what browsers send that were told http:// and the wrong port.
_HTTP = re.compile(rb"[A-Z]{1,20}(?:\Z| (?:\Z|[/*a-zA-Z0-9]))")


class HelloError(Exception):
    """A connection does not begin with a TLS hello that can be understood.

    Attributes:
        reason: Why, in a few words that do not depend on what was sent.
        is_http: Whether it looks like HTTP without TLS.
    """

    def __init__(self, reason: str, *, is_http: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_http = is_http


@attrs.frozen
class ClientHello:
    """What a client asks for (RFC 8446 4.1.2).

    Attributes:
        server_name: The name in lower case, without a final dot; empty if there is none, or none
            that a certificate could be for.
        alpn: The protocols it would speak, in its order.
        versions: The TLS versions it knows, in its order: 0x0303 is 1.2, 0x0304 is 1.3.
    """

    server_name: str = ""
    alpn: tuple[bytes, ...] = ()
    versions: tuple[int, ...] = ()


def parse_untrusted(data: bytes | bytearray) -> ClientHello | None:
    """Parse the hello at the beginning of a connection.

    Args:
        data: All that was received so far.

    Returns:
        The hello, or None if more bytes are needed.

    Raises:
        HelloError: the bytes can't become a hello, or not within MAX_HELLO bytes and MAX_RECORDS
            records.
    """
    message = _message(data)
    if message is None:
        return None
    try:
        return _parse(message)
    except _TruncatedError:
        raise HelloError("the hello is malformed") from None


def _message(data: bytes | bytearray) -> bytes | None:
    """Return what the hello message holds, put together from its records, once all is there."""
    message = b""
    needed = _MESSAGE_HEADER
    position = 0
    for _ in range(MAX_RECORDS):
        header = data[position : position + _RECORD_HEADER]
        _check_record(data, header)
        if len(header) < _RECORD_HEADER:
            break
        position += _RECORD_HEADER
        length = header[3] << 8 | header[4]
        message += data[position : position + length]
        if message and message[0] != _CLIENT_HELLO:
            raise HelloError("the first message is no hello")
        if len(message) >= _MESSAGE_HEADER:
            needed = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER], "big")
            if needed > MAX_HELLO:
                raise HelloError("the hello is too long")
            if len(message) >= needed:
                return message[_MESSAGE_HEADER:needed]
        position += length
        if position > len(data):
            break
    else:
        raise HelloError("the hello is spread over too many records")
    if len(data) >= MAX_HELLO:
        raise HelloError("the hello is too long")
    return None


def _check_record(data: bytes | bytearray, header: bytes | bytearray) -> None:
    """Check what is there of a record's header; each byte is judged as soon as it is there."""
    if header and header[0] != _HANDSHAKE:
        if _HTTP.match(data):
            raise HelloError("HTTP without TLS", is_http=True)
        raise HelloError("not TLS")
    if len(header) > 1 and header[1] != 3:
        raise HelloError("not TLS")
    if len(header) == _RECORD_HEADER and not 0 < header[3] << 8 | header[4] <= _MAX_RECORD:
        raise HelloError("a record has an impossible length")


class _TruncatedError(Exception):
    """A field is longer than what it is in."""


def _vector(data: bytes, position: int, size: int) -> tuple[int, int]:
    """Return where the bytes begin and end that a length, a number of ``size`` bytes, tells of."""
    begin = position + size
    end = begin + int.from_bytes(data[position:begin], "big")
    if begin > len(data) or end > len(data):
        raise _TruncatedError
    return begin, end


def _parse(hello: bytes) -> ClientHello:
    # Without a class for fields: this is done for each connection, and that would cost five times
    # as much.
    _, position = _vector(hello, _BEFORE_SESSION, 1)
    _, position = _vector(hello, position, 2)  # cipher suites
    _, position = _vector(hello, position, 1)  # compression methods
    found: dict[int, bytes] = {}
    end = position
    if position < len(hello):
        position, end = _vector(hello, position, 2)
    while position < end:
        if position + _EXTENSION.size > end:
            raise _TruncatedError
        kind, size = _EXTENSION.unpack_from(hello, position)
        position += _EXTENSION.size
        if position + size > end:
            raise _TruncatedError
        if kind in _OF_INTEREST:
            if kind in found:
                raise HelloError("the hello has an extension twice")
            found[kind] = hello[position : position + size]
        position += size
    versions: tuple[int, ...] = (int.from_bytes(hello[:2], "big"),)
    if _SUPPORTED_VERSIONS in found:
        versions = _versions(found[_SUPPORTED_VERSIONS])
    return ClientHello(
        _server_name(found[_SERVER_NAME]) if _SERVER_NAME in found else "",
        _protocols(found[_ALPN]) if _ALPN in found else (),
        versions,
    )


def _server_name(extension: bytes) -> str:
    position, end = _vector(extension, 0, 2)
    while position < end:
        kind = extension[position]
        begin, position = _vector(extension[:end], position + 1, 2)
        if kind == _HOST_NAME:
            name = extension[begin:position].lower().removesuffix(b".")
            usable = len(name) <= _MAX_NAME and _NAME.fullmatch(name)
            return name.decode("ascii") if usable else ""
    return ""


def _protocols(extension: bytes) -> tuple[bytes, ...]:
    position, end = _vector(extension, 0, 2)
    names = extension[:end]
    protocols = []
    while position < end:
        begin, position = _vector(names, position, 1)
        protocols.append(names[begin:position])
    return tuple(protocols)


def _versions(extension: bytes) -> tuple[int, ...]:
    begin, end = _vector(extension, 0, 1)
    if (end - begin) % 2:
        raise _TruncatedError
    versions = struct.unpack_from(f"!{(end - begin) // 2}H", extension, begin)
    # Reserved values, which some clients send so that servers learn to ignore them (RFC 8701).
    return tuple(version for version in versions if version & 0x0F0F != 0x0A0A)
