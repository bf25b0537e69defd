"""The saved state as JSON, exactly as the Go proxy has it: either program reads the other's.

Pure: bytes to records and back, no files (``state.py`` has those). Keys that this version does not
know are carried along; docs/state.md has the whole format and what a missing key means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from kamal_proxy.durations import from_nanoseconds, to_nanoseconds
from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.options import (
    HealthCheckOptions,
    PathTimeout,
    ServiceOptions,
    TargetOptions,
    split_target,
)

MAX_SIZE = 64 * 1024 * 1024

PauseState = Literal["running", "paused", "stopped"]
_PAUSE_STATES: tuple[PauseState, ...] = ("running", "paused", "stopped")  # Go's 0, 1, 2

# What Go's encoder escapes beyond JSON's own rules; none of these occurs outside a string.
_GO_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class StateFormatError(Exception):
    """A document is not a saved state; the text says where and why, without a file name."""


@attrs.frozen(kw_only=True)
class SavedPause:
    """Whether a service takes requests.

    Attributes:
        state: ``running``, ``paused`` or ``stopped``.
        stop_message: What visitors of a stopped service are told.
        fail_after: Seconds that a request to a paused service waits.
    """

    state: PauseState = "running"
    stop_message: str = ""
    fail_after: float = 0.0


@attrs.frozen(kw_only=True)
class SavedRollout:
    """Which requests go to the rollout targets.

    Attributes:
        percentage: Share of the clients, 0 to 100.
        percentage_split_point: Largest 32-bit hash that belongs to that share.
        allowlist: Values that always belong to it.
    """

    percentage: int = 0
    percentage_split_point: float = 0.0
    allowlist: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class SavedService:
    """One service as it is saved.

    Attributes:
        active_targets: ``host:port`` of each target; likewise the other three lists.
        extra: What a newer version wrote that this one does not know, in the document's own
            nesting. A deploy states every option anew, so it should drop this.
    """

    name: str
    service_options: ServiceOptions = attrs.field(factory=ServiceOptions)
    target_options: TargetOptions = attrs.field(factory=TargetOptions)
    active_targets: tuple[str, ...] = ()
    active_readers: tuple[str, ...] = ()
    rollout_targets: tuple[str, ...] = ()
    rollout_readers: tuple[str, ...] = ()
    pause: SavedPause = attrs.field(factory=SavedPause)
    rollout: SavedRollout | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict, hash=False)


def decode(content: bytes) -> tuple[SavedService, ...]:
    """Read a saved state, in the order of the document.

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
    services = tuple(_decode_service(item, number) for number, item in enumerate(document, 1))
    names: set[str] = set()
    for service in services:
        if service.name in names:
            raise StateFormatError(f"service '{service.name}' occurs twice")
        names.add(service.name)
    return services


def encode(services: Iterable[SavedService]) -> bytes:
    """Write services as the Go proxy does: one line of UTF-8 JSON and a newline.

    Raises:
        StateFormatError: the result could not be read again; it must not be saved.
    """
    documents = [_encode_service(service) for service in services]
    try:
        text = json.dumps(documents, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
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


# One Kind per type of value. A decoder gets a value that is not null; it returns None when the
# option's default is to be used instead.


@attrs.frozen
class _Kind:
    decode: Callable[[object, str], Any]
    encode: Callable[[Any], Any]


def _decode_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise StateFormatError(f"{where} must be a string")
    # Half a surrogate pair, which JSON can hold, fits into no header, log line or answer.
    return _LONE_SURROGATE.sub("\ufffd", value)


def _decode_texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise StateFormatError(f"{where} must be a list")
    return tuple(_decode_text(item, f"{where}[{index}]") for index, item in enumerate(value))


def _decode_targets(value: object, where: str) -> tuple[str, ...]:
    targets = _decode_texts(value, where)
    for index, target in enumerate(targets):
        try:
            split_target(target)
        except InvalidOptionsError as error:
            raise StateFormatError(f"{where}[{index}]: {error}") from error
    return targets


def _decode_flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise StateFormatError(f"{where} must be true or false")
    return value


def _decode_whole(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise StateFormatError(f"{where} must be a whole number")
    if not -(2**63) <= value < 2**63:
        raise StateFormatError(f"{where} does not fit into 64 bits")
    return value


def _decode_size(value: object, where: str) -> int:
    # The Go proxy takes anything below zero for what zero means.
    return max(0, _decode_whole(value, where))


def _decode_number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise StateFormatError(f"{where} must be a number")
    return float(value)


def _decode_duration(value: object, where: str) -> float:
    return from_nanoseconds(_decode_whole(value, where))


def _decode_positive_duration(value: object, where: str) -> float | None:
    # Go reads a key that an older version did not write as zero, and writes that zero.
    duration = _decode_duration(value, where)
    return duration if duration > 0 else None


def _decode_limit(value: object, where: str) -> float | None:
    duration = _decode_duration(value, where)
    return duration if duration >= 0 else None


def _decode_path_timeouts(value: object, where: str) -> tuple[PathTimeout, ...]:
    if not isinstance(value, dict):
        raise StateFormatError(f"{where} must be an object")
    return tuple(
        PathTimeout(
            path=_decode_text(path, where),
            timeout=max(0.0, _decode_duration(item, f"{where}.{path}")),
        )
        for path, item in value.items()
    )


def _encode_path_timeouts(limits: Sequence[PathTimeout]) -> dict[str, int]:
    return {limit.path: to_nanoseconds(limit.timeout) for limit in limits}


def _same(value: Any) -> Any:
    return value


def _encode_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _list_or_null(value: Sequence[str]) -> list[str] | None:
    return list(value) or None


_TEXT = _Kind(_decode_text, _same)
_TEXTS = _Kind(_decode_texts, _list_or_null)
_HOSTS = _Kind(_decode_texts, lambda hosts: list(hosts) or [""])
_TARGETS = _Kind(_decode_targets, list)
_FLAG = _Kind(_decode_flag, _same)
_WHOLE = _Kind(_decode_whole, _same)
_SIZE = _Kind(_decode_size, _same)
_NUMBER = _Kind(_decode_number, _encode_number)
_DURATION = _Kind(_decode_duration, to_nanoseconds)
_POSITIVE = _Kind(_decode_positive_duration, to_nanoseconds)
_LIMIT = _Kind(_decode_limit, to_nanoseconds)
_PATH_TIMEOUTS = _Kind(_decode_path_timeouts, _encode_path_timeouts)

# The keys in Go's order; each is also the name of the attribute.
_SERVICE_OPTIONS = {
    "hosts": _HOSTS,
    "path_prefixes": _TEXTS,
    "tls_enabled": _FLAG,
    "tls_certificate_path": _TEXT,
    "tls_private_key_path": _TEXT,
    "tls_on_demand_url": _TEXT,
    "tls_redirect": _FLAG,
    "canonical_host": _TEXT,
    "acme_directory": _TEXT,
    "acme_cache_path": _TEXT,
    "error_page_path": _TEXT,
    "strip_prefix": _FLAG,
    "writer_affinity_timeout": _DURATION,
    "read_targets_accept_websockets": _FLAG,
    "exclude_metrics_paths": _TEXTS,
    "client_ip_header": _TEXT,
}
_HEALTH_CHECK = {
    "path": _TEXT,
    "port": _WHOLE,
    "interval": _POSITIVE,
    "timeout": _POSITIVE,
    "host": _TEXT,
}
_TARGET_OPTIONS = {
    "response_timeout": _LIMIT,
    "buffer_requests": _FLAG,
    "buffer_responses": _FLAG,
    "max_memory_buffer_size": _SIZE,
    "max_request_body_size": _SIZE,
    "max_response_body_size": _SIZE,
    "log_request_headers": _TEXTS,
    "log_response_headers": _TEXTS,
    "forward_headers": _FLAG,
    "scope_cookie_paths": _FLAG,
}
# The Go proxy has none of these and drops them when it writes; at their default they are left out.
_OWN_TARGET_OPTIONS = {"path_timeouts": _PATH_TIMEOUTS, "websocket_idle_timeout": _LIMIT}
_PAUSE = {"state": _WHOLE, "stop_message": _TEXT, "fail_after": _DURATION}
_ROLLOUT = {"percentage": _WHOLE, "percentage_split_point": _NUMBER, "allowlist": _TEXTS}


class _Section:
    """A JSON object being taken apart; what nobody took is unknown to this version."""

    def __init__(self, data: object, where: str, separator: str = ".") -> None:
        if not isinstance(data, dict):
            raise StateFormatError(f"{where} must be an object")
        self._rest = dict(data)
        self._children: dict[str, _Section] = {}
        self.prefix = where + separator

    def take(self, key: str, kind: _Kind) -> Any:
        value = self._rest.pop(key, None)
        return None if value is None else kind.decode(value, self.prefix + key)

    def take_all(self, kinds: Mapping[str, _Kind]) -> dict[str, Any]:
        """Return the values that are there, as keyword arguments."""
        values = {key: self.take(key, kind) for key, kind in kinds.items()}
        return {key: value for key, value in values.items() if value is not None}

    def child(self, key: str) -> _Section | None:
        value = self._rest.pop(key, None)
        if value is None:
            return None
        section = self._children[key] = _Section(value, self.prefix + key)
        return section

    def unknown(self) -> dict[str, Any]:
        nested = {key: child.unknown() for key, child in self._children.items()}
        return self._rest | {key: rest for key, rest in nested.items() if rest}


def _decode_service(data: object, number: int) -> SavedService:
    section = _Section(data, f"service number {number}", ": ")
    name = section.take("name", _TEXT)
    if not name:
        raise StateFormatError(f"{section.prefix}name is missing")
    section.prefix = f"service '{name}': "
    options = section.child("options")
    option_values = options.take_all(_SERVICE_OPTIONS) if options else {}
    target_options = section.child("target_options")
    health_check = target_options.child("health_check_config") if target_options else None
    pools = {
        key: section.take(key, _TARGETS) or ()
        for key in ("active_targets", "active_readers", "rollout_targets", "rollout_readers")
    }
    _take_legacy(section, options, option_values, pools)
    return SavedService(
        name=name,
        service_options=ServiceOptions(**option_values),
        target_options=TargetOptions(
            health_check=HealthCheckOptions(
                **(health_check.take_all(_HEALTH_CHECK) if health_check else {})
            ),
            **(
                target_options.take_all(_TARGET_OPTIONS | _OWN_TARGET_OPTIONS)
                if target_options
                else {}
            ),
        ),
        **pools,
        pause=_decode_pause(section.child("pause_controller")),
        rollout=_decode_rollout(section.child("rollout_controller")),
        extra=section.unknown(),
    )


def _take_legacy(
    section: _Section,
    options: _Section | None,
    option_values: dict[str, Any],
    pools: dict[str, tuple[str, ...]],
) -> None:
    """Take what versions before 0.9 wrote instead of today's keys, which win."""
    for key, legacy in (("active_targets", "active_target"), ("rollout_targets", "rollout_target")):
        target = section.take(legacy, _TEXT)
        if target and not pools[key]:
            pools[key] = _decode_targets([target], section.prefix + legacy)
    for key in ("hosts", "path_prefixes"):
        values = section.take(key, _TEXTS)
        if values and not option_values.get(key):
            option_values[key] = values
    host = section.take("host", _TEXT)  # before 0.6
    if host and not option_values.get("hosts"):
        option_values["hosts"] = (host,)
    if options is not None:
        if options.take("tls_hostname", _TEXT):  # before 0.6
            option_values.setdefault("tls_enabled", True)
        disable_redirect = options.take("tls_disable_redirect", _FLAG)  # 0.8.5 and 0.8.6
        if disable_redirect is not None:
            option_values.setdefault("tls_redirect", not disable_redirect)


def _decode_pause(section: _Section | None) -> SavedPause:
    if section is None:
        return SavedPause()
    values = section.take_all(_PAUSE)
    number = values.pop("state", 0)
    if not 0 <= number < len(_PAUSE_STATES):
        raise StateFormatError(f"{section.prefix}state must be 0, 1 or 2")
    return SavedPause(state=_PAUSE_STATES[number], **values)


def _decode_rollout(section: _Section | None) -> SavedRollout | None:
    return None if section is None else SavedRollout(**section.take_all(_ROLLOUT))


def _encode_all(values: object, kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    return {key: kind.encode(getattr(values, key)) for key, kind in kinds.items()}


def _encode_service(service: SavedService) -> dict[str, Any]:
    target_options = service.target_options
    if target_options.forward_headers is None:
        target_options = attrs.evolve(
            target_options, forward_headers=not service.service_options.tls_enabled
        )
    pause = {
        "state": _PAUSE_STATES.index(service.pause.state),
        "stop_message": service.pause.stop_message,
        "fail_after": to_nanoseconds(service.pause.fail_after),
    }
    rollout = None if service.rollout is None else _encode_all(service.rollout, _ROLLOUT)
    has_rollout = bool(service.rollout_targets or service.rollout_readers)
    document: dict[str, Any] = {
        "name": service.name,
        "options": _encode_all(service.service_options, _SERVICE_OPTIONS),
        "target_options": {
            "health_check_config": _encode_all(target_options.health_check, _HEALTH_CHECK),
            **_encode_all(target_options, _TARGET_OPTIONS),
            **{
                key: value
                for key, value in _encode_all(target_options, _OWN_TARGET_OPTIONS).items()
                if value
            },
        },
        "active_targets": list(service.active_targets),
        "active_readers": list(service.active_readers),
        "rollout_targets": list(service.rollout_targets) if has_rollout else None,
        "rollout_readers": list(service.rollout_readers) if has_rollout else None,
        "pause_controller": pause,
        "rollout_controller": rollout,
    }
    _add(document, service.extra)
    return document


def _add(document: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Add the keys of ``extra`` that the document does not have, at every level."""
    for key, value in extra.items():
        if key not in document:
            document[key] = value
        elif isinstance(document[key], dict) and isinstance(value, Mapping):
            _add(document[key], value)
