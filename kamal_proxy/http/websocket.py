"""What of WebSocket the proxy itself says: Close frames, and the answer to a key. Pure.

Frames that only pass by are followed by ``_fastpath.FrameTracker``; messages are never read.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha1

GOING_AWAY = 1001  # RFC 6455 7.4.1: a server that goes down

_FIN_CLOSE = 0x88
_MASKED = 0x80
_LONGEST_CONTROL = 125
_LONGEST_REASON = _LONGEST_CONTROL - 2
# RFC 6455 7.4.1: for programs to say among themselves, never in a frame.
_NEVER_SENT = frozenset({1005, 1006, 1015})
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3


def is_websocket(upgrade: bytes) -> bool:
    """Return whether an Upgrade field value names WebSocket, in any case (RFC 6455 4.2.1).

    A request may offer several protocols in a list; it is the field of the 101 response that says
    what a connection has become (RFC 9110 7.8).
    """
    return any(token.strip(b" \t").lower() == b"websocket" for token in upgrade.split(b","))


def accept_of(key: bytes) -> bytes:
    """Return the Sec-WebSocket-Accept that a Sec-WebSocket-Key wants (RFC 6455 4.2.2)."""
    return b64encode(sha1(key + _GUID, usedforsecurity=False).digest())


def close_frame(code: int, reason: bytes = b"") -> bytes:
    """Build a Close frame as a server sends it, unmasked (RFC 6455 5.5.1).

    Args:
        code: Status code, from 1000 to 4999 (RFC 6455 7.4.2).
        reason: UTF-8 text, at most 123 bytes.

    Raises:
        ValueError: the code is none that may be sent, or the payload would exceed the 125 bytes of
            a control frame (RFC 6455 5.5).
    """
    payload = _close_payload(code, reason)
    return bytes((_FIN_CLOSE, len(payload))) + payload


def masked_close_frame(code: int, mask: bytes, reason: bytes = b"") -> bytes:
    """Build a Close frame as a client sends it, masked (RFC 6455 5.3, 5.5.1).

    Args:
        code: Status code, from 1000 to 4999 (RFC 6455 7.4.2).
        mask: Masking key: four bytes that nobody can predict, new for each frame.
        reason: UTF-8 text, at most 123 bytes.

    Raises:
        ValueError: the mask has not four bytes, the code is none that may be sent, or the payload
            would exceed the 125 bytes of a control frame (RFC 6455 5.5).
    """
    if len(mask) != 4:
        raise ValueError(f"masking key of {len(mask)} bytes, must be 4 (RFC 6455 5.3)")
    payload = _close_payload(code, reason)
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((_FIN_CLOSE, _MASKED | len(payload))) + mask + masked


def _close_payload(code: int, reason: bytes) -> bytes:
    if not 1000 <= code <= 4999 or code in _NEVER_SENT:
        raise ValueError(f"close code {code} must not be sent (RFC 6455 7.4)")
    if len(reason) > _LONGEST_REASON:
        raise ValueError(
            f"close reason of {len(reason)} bytes: the payload of a control frame has at most "
            f"{_LONGEST_CONTROL}, two of them the code (RFC 6455 5.5)"
        )
    return code.to_bytes(2, "big") + reason
