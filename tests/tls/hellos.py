"""Hellos for tests: those of real clients, and any that can be put together by hand."""

from __future__ import annotations

import ssl
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TLS_1_2 = 0x0303
TLS_1_3 = 0x0304


def real_hello(
    name: str | None = "app.test",
    alpn: Sequence[str] = ("h2", "http/1.1"),
    oldest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> bytes:
    """Return what OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = oldest
    context.maximum_version = newest
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server")


def sized(data: bytes, size: int) -> bytes:
    """Put a length of so many bytes before some bytes."""
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, content: bytes = b"") -> bytes:
    """Write one extension."""
    return struct.pack("!H", kind) + sized(content, 2)


def server_name(name: bytes, kind: int = 0) -> bytes:
    """Write the extension that names the server."""
    return extension(0, sized(bytes([kind]) + sized(name, 2), 2))


def alpn(*protocols: bytes) -> bytes:
    """Write the extension that names protocols."""
    return extension(16, sized(b"".join(sized(each, 1) for each in protocols), 2))


def supported_versions(*versions: int) -> bytes:
    """Write the extension that tells the versions."""
    return extension(43, sized(b"".join(struct.pack("!H", each) for each in versions), 1))


def message(*extensions: bytes, version: int = TLS_1_2, session: bytes = bytes(32)) -> bytes:
    """Write a hello message; without any extension it has not even the list of them."""
    body = struct.pack("!H", version) + bytes(range(32)) + sized(session, 1)
    body += sized(b"\x13\x01\xc0\x2b", 2) + sized(b"\0", 1)
    if extensions:
        body += sized(b"".join(extensions), 2)
    return b"\x01" + sized(body, 3)


def records(content: bytes, size: int = 16384, kind: int = 22) -> bytes:
    """Put a message into records of at most ``size`` bytes."""
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(bytes([kind, 3, 1]) + sized(part, 2) for part in parts)
