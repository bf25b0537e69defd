"""What the saved states of all kinds of services have in common: JSON as the Go proxy writes it.

A state is a list of services, each an object with a name of its own. A format describes the keys
with kinds of values; keys that it does not know are kept. Pure: no files (``state.py`` has those).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import attrs

from kamal_proxy.durations import from_nanoseconds, to_nanoseconds
from kamal_proxy.errors import InvalidOptionsError

MAX_SIZE = 64 * 1024 * 1024  # bytes of a whole state

# What Go's encoder escapes beyond JSON's own rules; none of these occurs outside a string.
_GO_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class StateFormatError(Exception):
    """A document is not a saved state; the text says where and why, without a file name."""


class Named(Protocol):
    """One saved service, of any kind."""

    @property
    def name(self) -> str:
        """Its name; no two services of a state have the same."""


S = TypeVar("S", bound=Named)


def decode_services(content: bytes, decode_service: Callable[[object, int], S]) -> tuple[S, ...]:
    """Read a saved state, in the order of the document.

    Args:
        content: The whole document.
        decode_service: Makes a service of one item of the list, and of its number from 1 for error
            sentences; see :func:`open_service`.

    Raises:
        StateFormatError: it is not one, or not a complete one.
    """
    if len(content) > MAX_SIZE:
        raise StateFormatError(f"it is larger than {MAX_SIZE} bytes")
    if not content.strip():
        raise StateFormatError("it is empty")
    try:
        document = json.loads(
            content.decode(), parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        raise StateFormatError(f"line {error.lineno} column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise StateFormatError(f"byte {error.start + 1} is not UTF-8") from error
    except RecursionError as error:
        raise StateFormatError("it is nested too deeply") from error
    except ValueError as error:  # a number with thousands of digits, NaN
        raise StateFormatError(str(error)) from error
    if not isinstance(document, list):
        raise StateFormatError("it must be a list of services")
    services = tuple(decode_service(item, number) for number, item in enumerate(document, 1))
    names: set[str] = set()
    for service in services:
        if service.name in names:
            raise StateFormatError(f"service '{service.name}' occurs twice")
        names.add(service.name)
    return services


def encode_services(
    documents: Iterable[Mapping[str, Any]], decode: Callable[[bytes], object]
) -> bytes:
    """Write services as the Go proxy does: one line of UTF-8 JSON and a newline.

    Args:
        documents: One object per service.
        decode: Reads the result again before it is returned.

    Raises:
        StateFormatError: the result could not be read again; it must not be saved.
    """
    document = list(documents)
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise StateFormatError(f"it can't be written as JSON: {error}") from error
    text = _LONE_SURROGATE.sub("\ufffd", text.translate(_GO_ESCAPES))
    content = text.encode() + b"\n"
    decode(content)
    return content


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number that JSON has")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


# Kinds of values


@attrs.frozen
class Kind:
    """One type of value.

    Attributes:
        decode: Gets a value that is not null, and its place for error sentences; returns ``None``
            when the option's default is to be used instead. Raises :class:`StateFormatError`.
        encode: Makes plain JSON data of it.
    """

    decode: Callable[[object, str], Any]
    encode: Callable[[Any], Any]


def decode_text(value: object, where: str) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise StateFormatError(f"{where} must be a string")
    # Half a surrogate pair, which JSON can hold, fits into no header, log line or answer.
    return _LONE_SURROGATE.sub("\ufffd", value)


def decode_texts(value: object, where: str) -> tuple[str, ...]:
    """Read a list of strings."""
    if not isinstance(value, list):
        raise StateFormatError(f"{where} must be a list")
    return tuple(decode_text(item, f"{where}[{index}]") for index, item in enumerate(value))


def decode_flag(value: object, where: str) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise StateFormatError(f"{where} must be true or false")
    return value


def decode_whole(value: object, where: str) -> int:
    """Read a whole number of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise StateFormatError(f"{where} must be a whole number")
    if not -(2**63) <= value < 2**63:
        raise StateFormatError(f"{where} does not fit into 64 bits")
    return value


def decode_duration(value: object, where: str) -> float:
    """Read nanoseconds as seconds."""
    return from_nanoseconds(decode_whole(value, where))


def unchanged(value: Any) -> Any:
    """Encode what JSON has as it is."""
    return value


TEXT = Kind(decode_text, unchanged)
FLAG = Kind(decode_flag, unchanged)
WHOLE = Kind(decode_whole, unchanged)
DURATION = Kind(decode_duration, to_nanoseconds)


def targets(split: Callable[[str], object]) -> Kind:
    """Return the kind of a list of ``host:port``.

    Args:
        split: Takes a target apart, or raises ``InvalidOptionsError``.
    """

    def decode(value: object, where: str) -> tuple[str, ...]:
        texts = decode_texts(value, where)
        for index, text in enumerate(texts):
            try:
                split(text)
            except InvalidOptionsError as error:
                raise StateFormatError(f"{where}[{index}]: {error}") from error
        return texts

    return Kind(decode, list)


# Objects


class Section:
    """A JSON object being taken apart; what nobody took is unknown to this version.

    Args:
        data: The object.
        where: Its place, for error sentences.
        separator: What stands between the place and a key.

    Attributes:
        prefix: What error sentences put before a key.

    Raises:
        StateFormatError: it is not an object.
    """

    def __init__(self, data: object, where: str, separator: str = ".") -> None:
        if not isinstance(data, dict):
            raise StateFormatError(f"{where} must be an object")
        self._rest = dict(data)
        self._children: dict[str, Section] = {}
        self.prefix = where + separator

    def take(self, key: str, kind: Kind) -> Any:
        """Return a value, or ``None`` when it is missing, null or stands for the default.

        Raises:
            StateFormatError: it is not of that kind.
        """
        value = self._rest.pop(key, None)
        return None if value is None else kind.decode(value, self.prefix + key)

    def take_all(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """Return the values that are there, as keyword arguments."""
        values = {key: self.take(key, kind) for key, kind in kinds.items()}
        return {key: value for key, value in values.items() if value is not None}

    def child(self, key: str) -> Section | None:
        """Return an object within it, or ``None`` when there is none."""
        value = self._rest.pop(key, None)
        if value is None:
            return None
        section = self._children[key] = Section(value, self.prefix + key)
        return section

    def unknown(self) -> dict[str, Any]:
        """Return what was not taken, in the document's own nesting; see :func:`add_unknown`."""
        nested = {key: child.unknown() for key, child in self._children.items()}
        return self._rest | {key: rest for key, rest in nested.items() if rest}


def open_service(data: object, number: int) -> tuple[str, Section]:
    """Return the name of a service and the rest of it, whose error sentences name it.

    Args:
        data: One item of the list of services.
        number: Which one, from 1.

    Raises:
        StateFormatError: it is not an object, or has no name.
    """
    section = Section(data, f"service number {number}", ": ")
    name = section.take("name", TEXT)
    if not name:
        raise StateFormatError(f"{section.prefix}name is missing")
    section.prefix = f"service '{name}': "
    return name, section


def encode_all(values: object, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the attributes of an object that are named as the kinds are, as JSON data."""
    return {key: kind.encode(getattr(values, key)) for key, kind in kinds.items()}


def add_unknown(document: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Add the keys of ``extra`` that the document does not have, at every level."""
    for key, value in extra.items():
        if key not in document:
            document[key] = value
        elif isinstance(document[key], dict) and isinstance(value, Mapping):
            add_unknown(document[key], value)
