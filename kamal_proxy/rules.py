"""Rules about single values that options of several kinds share, and their sentences.

The modules of options say which value must keep which rule. Each rule names the option as
the command line writes it, without the dashes. Knows no option class; pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kamal_proxy.errors import InvalidOptionsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_NAME = 255

_SERVICE_NAME = re.compile(r"[!-.0-~]+")  # printable ASCII without space and slash
_PATH = re.compile(r"/[^\x00-\x20\x7f?#]*")


def texts(values: Iterable[str] | None) -> tuple[str, ...]:
    """Normalise a list of texts; the Go proxy writes null for some empty lists."""
    return () if values is None else tuple(values)


def target_port(target: str, digits: str) -> int:
    """Return the port of a target.

    Args:
        target: The target, for the sentence.
        digits: ASCII digits, any number of them.

    Raises:
        InvalidOptionsError: it is not from 1 to 65535.
    """
    number = int(digits.lstrip("0")[:6] or 0)
    if not 1 <= number <= 65535:
        raise InvalidOptionsError(f"target {target}: port must be from 1 to 65535")
    return number


def require_service_name(name: str) -> None:
    """Raise InvalidOptionsError unless a service can have the name."""
    if not _SERVICE_NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InvalidOptionsError(
            f"service name '{name}' must be 1 to {MAX_NAME} printable ASCII characters "
            "without spaces or slashes"
        )


def is_path(text: str) -> bool:
    """Tell whether a text is the path of a URL, without query and fragment."""
    return _PATH.fullmatch(text) is not None


def require_path(option: str, text: str) -> None:
    """Raise InvalidOptionsError unless the text is a path; a leading slash may be left out."""
    if not is_path(text if text.startswith("/") else "/" + text):
        raise InvalidOptionsError(f"{option} '{text}' must be a path without spaces, ? or #")


def require_word(option: str, text: str, words: Sequence[str]) -> None:
    """Raise InvalidOptionsError unless the text is one of the words."""
    if text not in words:
        raise InvalidOptionsError(f"{option} '{text}' must be one of {', '.join(words)}")


def require_address(option: str, text: str) -> None:
    """Raise InvalidOptionsError unless the text is an IP address; it may have a zone."""
    from ipaddress import ip_address  # seldom needed, and a command should start fast

    try:
        ip_address(text.partition("%")[0])
    except ValueError:
        raise InvalidOptionsError(
            f"{option} '{text}' is not an IP address (such as 192.0.2.1 or 2001:db8::1)"
        ) from None


def require_network(option: str, text: str) -> None:
    """Raise InvalidOptionsError unless the text is an IP network, or an address."""
    from ipaddress import ip_network  # see above

    try:
        ip_network(text)
    except ValueError as error:
        hint = "; clear the bits after the prefix" if "host bits" in str(error) else ""
        raise InvalidOptionsError(
            f"{option} '{text}' is not a network (such as 192.0.2.0/24 or 2001:db8::/32){hint}"
        ) from None


def require_port(option: str, value: int, *, lowest: int) -> None:
    """Raise InvalidOptionsError unless the number is a port, from ``lowest`` on."""
    require_between(option, value, lowest, 65535)


def require_between(option: str, value: int, lowest: int, highest: int) -> None:
    """Raise InvalidOptionsError unless the number is in the range, both ends included."""
    if not lowest <= value <= highest:
        raise InvalidOptionsError(f"{option} {value} must be from {lowest} to {highest}")


def require_positive(option: str, value: float) -> None:
    """Raise InvalidOptionsError for zero, less, and what is no number."""
    if not value > 0:
        raise InvalidOptionsError(f"{option} must be more than zero")


def require_not_negative(option: str, value: float) -> None:
    """Raise InvalidOptionsError for less than zero, and what is no number."""
    if not value >= 0:
        raise InvalidOptionsError(f"{option} must not be negative")
