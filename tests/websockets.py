"""WebSocket bytes for tests: frames to send, what was received read as frames, the handshake.

Deliberately slow and plain; ``wsproto`` and ``trio-websocket`` are the independent judges.
"""

from __future__ import annotations

import base64
import hashlib

import attrs

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"
GOING_AWAY = b"\x88\x02\x03\xe9"  # Close, unmasked, 1001
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 1.3
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY + b"\r\n\r\n"
)


@attrs.frozen
class Frame:
    """A frame as it was received; its payload without the mask."""

    opcode: int
    payload: bytes
    fin: bool
    masked: bool


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = False) -> bytes:
    """Build a frame."""
    size = len(payload)
    long, code = (0, size) if size < 126 else (2, 126) if size < 1 << 16 else (8, 127)
    if masked:
        payload = _masked(payload, MASK)
    return (
        bytes([fin << 7 | opcode, masked << 7 | code])
        + size.to_bytes(8, "big")[8 - long :]
        + MASK * masked
        + payload
    )


def read_frames(data: bytes) -> list[Frame]:
    """Read bytes as frames; the last one must be whole."""
    frames = []
    while data:
        first, second = data[:2]
        size, at = second & 0x7F, 2
        if size >= 126:
            at = 4 if size == 126 else 10
            size = int.from_bytes(data[2:at], "big")
        mask = b""
        if second & 0x80:
            mask = data[at : at + 4]
            at += 4
        payload = data[at : at + size]
        assert len(payload) == size, "cut within a frame"
        frames.append(
            Frame(first & 15, _masked(payload, mask), bool(first & 0x80), bool(second & 0x80))
        )
        data = data[at + size :]
    return frames


def _masked(payload: bytes, mask: bytes) -> bytes:
    return bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)) if mask else payload


def accept(key: bytes = KEY, headers: bytes = b"") -> bytes:
    """Return the 101 response to a handshake with this key."""
    digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n" + headers + b"\r\n"
    )
