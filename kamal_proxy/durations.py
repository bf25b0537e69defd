"""Go's duration grammar, which is what the command line and the log speak.

Durations are ``float`` seconds everywhere in this package; the saved state and Go's text forms
count whole nanoseconds. This module is the only place that converts between them. Pure.
"""

from __future__ import annotations

import re

from kamal_proxy.errors import InvalidDurationError

NANOSECONDS = 1_000_000_000
_INT64_MAX = 2**63 - 1
_MAX_TERM = 40  # digits; more can only be a mistake or an attack on big-number arithmetic

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, micro sign
    "μs": 1_000,  # U+03BC, Greek mu
    "ms": 1_000_000,
    "s": NANOSECONDS,
    "m": 60 * NANOSECONDS,
    "h": 3600 * NANOSECONDS,
}
_TERM = re.compile(r"(?P<number>[0-9]*\.?[0-9]*)(?P<unit>[^0-9.]*)")


def _quoted(text: str) -> str:
    r"""Quote ``text`` as Go's time package does: bytes that are not plain ASCII as ``\xNN``."""
    return '"' + "".join(map(_quoted_byte, text.encode("utf-8", "surrogateescape"))) + '"'


def _quoted_byte(byte: int) -> str:
    if byte < 0x20 or byte >= 0x80:
        return f"\\x{byte:02x}"
    return "\\" + chr(byte) if chr(byte) in '"\\' else chr(byte)


def parse_duration(text: str) -> float:
    """Parse a Go duration such as ``30s``, ``1m30s``, ``500ms`` or ``0`` (Go: time.ParseDuration).

    Returns:
        Seconds, with nanosecond resolution.

    Raises:
        InvalidDurationError: with Go's own sentence, e.g. ``time: missing unit in duration "30"``.
    """
    return parse_nanoseconds(text) / NANOSECONDS


def parse_nanoseconds(text: str) -> int:
    """Parse a Go duration to whole nanoseconds; see :func:`parse_duration`."""
    rest = text
    sign = 1
    if rest[:1] in ("+", "-"):
        sign = -1 if rest[0] == "-" else 1
        rest = rest[1:]
    if rest == "0":
        return 0
    if not rest:
        raise InvalidDurationError(f"time: invalid duration {_quoted(text)}")
    total = 0
    while rest:
        term = _TERM.match(rest)
        number, unit = (term["number"], term["unit"]) if term else ("", "")
        if number in ("", ".") or len(number) > _MAX_TERM:
            raise InvalidDurationError(f"time: invalid duration {_quoted(text)}")
        if not unit:
            raise InvalidDurationError(f"time: missing unit in duration {_quoted(text)}")
        if unit not in _UNITS:
            raise InvalidDurationError(
                f"time: unknown unit {_quoted(unit)} in duration {_quoted(text)}"
            )
        whole, _, fraction = number.partition(".")
        total += int(whole or 0) * _UNITS[unit]
        total += int(fraction or 0) * _UNITS[unit] // 10 ** len(fraction)
        # Go accepts the one value whose magnitude only fits when negative.
        if total > _INT64_MAX + (sign < 0):
            raise InvalidDurationError(f"time: invalid duration {_quoted(text)}")
        rest = rest[len(number) + len(unit) :]
    return sign * total


def to_nanoseconds(seconds: float) -> int:
    """Convert seconds to whole nanoseconds, kept inside the int64 that Go can read."""
    return round(max(-_INT64_MAX - 1, min(_INT64_MAX, seconds * NANOSECONDS)))


def from_nanoseconds(nanoseconds: int) -> float:
    """Convert whole nanoseconds to seconds."""
    return nanoseconds / NANOSECONDS


def format_duration(seconds: float) -> str:
    """Format seconds as Go prints a duration: ``30s``, ``1m30s``, ``1.5s``, ``500ms``, ``0s``."""
    nanoseconds = to_nanoseconds(seconds)
    sign = "-" if nanoseconds < 0 else ""
    nanoseconds = abs(nanoseconds)
    if nanoseconds == 0:
        return "0s"
    for unit in ("ns", "µs", "ms"):
        if nanoseconds < 1000 * _UNITS[unit]:
            return sign + _decimal(nanoseconds, _UNITS[unit]) + unit
    minutes, rest = divmod(nanoseconds, _UNITS["m"])
    hours, minutes = divmod(minutes, 60)
    text = _decimal(rest, NANOSECONDS) + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    if hours:
        text = f"{hours}h{text}"
    return sign + text


def _decimal(value: int, unit: int) -> str:
    whole, fraction = divmod(value, unit)
    if not fraction:
        return str(whole)
    digits = len(str(unit)) - 1
    return f"{whole}.{fraction:0{digits}d}".rstrip("0")
