"""Records that no ordinary client sends, protected by hand with the keys of a real connection.

OpenSSL's client floods neither with changes of keys (TLS 1.3) nor with renegotiations (TLS 1.2).
Its secrets come from a key log, and the rest from RFC 8446 5.2, 7.1 and RFC 5246 5, 6.3, RFC 5288.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

if TYPE_CHECKING:
    from pathlib import Path

HANDSHAKE = 22
APPLICATION_DATA = 23
_DIGEST = "sha384"  # of the suites with AES-256
_KEY_SIZE = 32
_VERSION = 0x0303


def logged(path: Path, label: str) -> tuple[bytes, bytes]:
    """Return the client's random bytes and the secret of the latest entry with this label."""
    found = [line.split() for line in path.read_text().splitlines() if line.startswith(label)]
    _, random, secret = found[-1]
    return bytes.fromhex(random), bytes.fromhex(secret)


class Writer13:
    """The client's side of TLS 1.3 after its handshake: what it sends from its first record on."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._sequence = 0

    def record(self, content: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """Protect some content."""
        iv = int.from_bytes(self._expand(b"iv", 12), "big")
        nonce = (iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        inner = content + bytes([kind])
        header = struct.pack("!BHH", APPLICATION_DATA, _VERSION, len(inner) + 16)
        return header + AESGCM(self._expand(b"key", _KEY_SIZE)).encrypt(nonce, inner, header)

    def key_update(self, *, requested: bool) -> bytes:
        """Change our key, and ask for the other side's to be changed (RFC 8446 4.6.3)."""
        record = self.record(bytes([24, 0, 0, 1, requested]), HANDSHAKE)
        self._secret = self._expand(b"traffic upd", hashlib.new(_DIGEST).digest_size)
        self._sequence = 0
        return record

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack("!HB", size, len(label)) + label + b"\0"
        return hmac.digest(self._secret, info + b"\1", _DIGEST)[:size]


class Writer12:
    """The client's side of TLS 1.2, after its Finished."""

    def __init__(self, secret: bytes, client_random: bytes, server_random: bytes) -> None:
        keys = _prf(secret, b"key expansion", server_random + client_random, 2 * _KEY_SIZE + 8)
        self._key = AESGCM(keys[:_KEY_SIZE])
        self._salt = keys[2 * _KEY_SIZE : 2 * _KEY_SIZE + 4]
        self._sequence = 1

    def record(self, content: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """Protect some content."""
        explicit = struct.pack("!Q", self._sequence)
        self._sequence += 1
        covered = explicit + struct.pack("!BHH", kind, _VERSION, len(content))
        sealed = explicit + self._key.encrypt(self._salt + explicit, content, covered)
        return struct.pack("!BHH", kind, _VERSION, len(sealed)) + sealed


def _prf(secret: bytes, label: bytes, seed: bytes, size: int) -> bytes:
    seed = label + seed
    part, found = seed, b""
    while len(found) < size:
        part = hmac.digest(secret, part, _DIGEST)
        found += hmac.digest(secret, part + seed, _DIGEST)
    return found[:size]
