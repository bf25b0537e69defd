"""The saved state as JSON, exactly as the Go proxy has it: either program reads the other's.

Pure: bytes to records and back, no files (``state.py`` has those). Keys that this version does not
know are carried along; docs/state.md has the whole format and what a missing key means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from kamal_proxy.durations import to_nanoseconds
from kamal_proxy.json_format import (
    DURATION,
    FLAG,
    TEXT,
    WHOLE,
    Kind,
    Section,
    StateFormatError,
    add_unknown,
    decode_duration,
    decode_services,
    decode_text,
    decode_texts,
    decode_whole,
    encode_all,
    encode_services,
    open_service,
    targets,
    unchanged,
)
from kamal_proxy.options import ServiceOptions
from kamal_proxy.target_options import HealthCheckOptions, PathTimeout, TargetOptions, split_target

PauseState = Literal["running", "paused", "stopped"]
_PAUSE_STATES: tuple[PauseState, ...] = ("running", "paused", "stopped")  # Go's 0, 1, 2


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
    return decode_services(content, _decode_service)


def encode(services: Iterable[SavedService]) -> bytes:
    """Write services as the Go proxy does: one line of UTF-8 JSON and a newline.

    Raises:
        StateFormatError: the result could not be read again; it must not be saved.
    """
    return encode_services((_encode_service(service) for service in services), decode)


# The kinds of values that only this format has.


def _decode_size(value: object, where: str) -> int:
    # The Go proxy takes anything below zero for what zero means.
    return max(0, decode_whole(value, where))


def _decode_number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise StateFormatError(f"{where} must be a number")
    return float(value)


def _decode_positive_duration(value: object, where: str) -> float | None:
    # Go reads a key that an older version did not write as zero, and writes that zero.
    duration = decode_duration(value, where)
    return duration if duration > 0 else None


def _decode_limit(value: object, where: str) -> float | None:
    duration = decode_duration(value, where)
    return duration if duration >= 0 else None


def _decode_path_timeouts(value: object, where: str) -> tuple[PathTimeout, ...]:
    if not isinstance(value, dict):
        raise StateFormatError(f"{where} must be an object")
    return tuple(
        PathTimeout(
            path=decode_text(path, where),
            timeout=max(0.0, decode_duration(item, f"{where}.{path}")),
        )
        for path, item in value.items()
    )


def _encode_path_timeouts(limits: Sequence[PathTimeout]) -> dict[str, int]:
    return {limit.path: to_nanoseconds(limit.timeout) for limit in limits}


def _encode_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _list_or_null(value: Sequence[str]) -> list[str] | None:
    return list(value) or None


_TEXTS = Kind(decode_texts, _list_or_null)
_HOSTS = Kind(decode_texts, lambda hosts: list(hosts) or [""])
_TARGETS = targets(split_target)
_SIZE = Kind(_decode_size, unchanged)
_NUMBER = Kind(_decode_number, _encode_number)
_POSITIVE = Kind(_decode_positive_duration, to_nanoseconds)
_LIMIT = Kind(_decode_limit, to_nanoseconds)
_PATH_TIMEOUTS = Kind(_decode_path_timeouts, _encode_path_timeouts)

# The keys in Go's order; each is also the name of the attribute.
_SERVICE_OPTIONS = {
    "hosts": _HOSTS,
    "path_prefixes": _TEXTS,
    "tls_enabled": FLAG,
    "tls_certificate_path": TEXT,
    "tls_private_key_path": TEXT,
    "tls_on_demand_url": TEXT,
    "tls_redirect": FLAG,
    "canonical_host": TEXT,
    "acme_directory": TEXT,
    "acme_cache_path": TEXT,
    "error_page_path": TEXT,
    "strip_prefix": FLAG,
    "writer_affinity_timeout": DURATION,
    "read_targets_accept_websockets": FLAG,
    "exclude_metrics_paths": _TEXTS,
    "client_ip_header": TEXT,
}
_HEALTH_CHECK = {
    "path": TEXT,
    "port": WHOLE,
    "interval": _POSITIVE,
    "timeout": _POSITIVE,
    "host": TEXT,
}
_TARGET_OPTIONS = {
    "response_timeout": _LIMIT,
    "buffer_requests": FLAG,
    "buffer_responses": FLAG,
    "max_memory_buffer_size": _SIZE,
    "max_request_body_size": _SIZE,
    "max_response_body_size": _SIZE,
    "log_request_headers": _TEXTS,
    "log_response_headers": _TEXTS,
    "forward_headers": FLAG,
    "scope_cookie_paths": FLAG,
}
# The Go proxy has none of these and drops them when it writes; at their default they are left out.
_OWN_SERVICE_OPTIONS = {"tls_client_ca_path": TEXT}
_OWN_TARGET_OPTIONS = {"path_timeouts": _PATH_TIMEOUTS, "websocket_idle_timeout": _LIMIT}
_PAUSE = {"state": WHOLE, "stop_message": TEXT, "fail_after": DURATION}
_ROLLOUT = {"percentage": WHOLE, "percentage_split_point": _NUMBER, "allowlist": _TEXTS}


def _decode_service(data: object, number: int) -> SavedService:
    name, section = open_service(data, number)
    options = section.child("options")
    option_values = options.take_all(_SERVICE_OPTIONS | _OWN_SERVICE_OPTIONS) if options else {}
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
        pause=decode_pause(section.child("pause_controller")),
        rollout=_decode_rollout(section.child("rollout_controller")),
        extra=section.unknown(),
    )


def _take_legacy(
    section: Section,
    options: Section | None,
    option_values: dict[str, Any],
    pools: dict[str, tuple[str, ...]],
) -> None:
    """Take what versions before 0.9 wrote instead of today's keys, which win."""
    for key, legacy in (("active_targets", "active_target"), ("rollout_targets", "rollout_target")):
        target = section.take(legacy, TEXT)
        if target and not pools[key]:
            pools[key] = _TARGETS.decode([target], section.prefix + legacy)
    for key in ("hosts", "path_prefixes"):
        values = section.take(key, _TEXTS)
        if values and not option_values.get(key):
            option_values[key] = values
    host = section.take("host", TEXT)  # before 0.6
    if host and not option_values.get("hosts"):
        option_values["hosts"] = (host,)
    if options is not None:
        if options.take("tls_hostname", TEXT):  # before 0.6
            option_values.setdefault("tls_enabled", True)
        disable_redirect = options.take("tls_disable_redirect", FLAG)  # 0.8.5 and 0.8.6
        if disable_redirect is not None:
            option_values.setdefault("tls_redirect", not disable_redirect)


def decode_pause(section: Section | None) -> SavedPause:
    """Read the pause of a service; without any it is running."""
    if section is None:
        return SavedPause()
    values = section.take_all(_PAUSE)
    number = values.pop("state", 0)
    if not 0 <= number < len(_PAUSE_STATES):
        raise StateFormatError(f"{section.prefix}state must be 0, 1 or 2")
    return SavedPause(state=_PAUSE_STATES[number], **values)


def encode_pause(pause: SavedPause) -> dict[str, Any]:
    """Return the pause of a service as the document has it."""
    return {
        "state": _PAUSE_STATES.index(pause.state),
        "stop_message": pause.stop_message,
        "fail_after": to_nanoseconds(pause.fail_after),
    }


def _decode_rollout(section: Section | None) -> SavedRollout | None:
    return None if section is None else SavedRollout(**section.take_all(_ROLLOUT))


def _encode_own(options: object, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return what the document says of options that only this program has."""
    return {key: value for key, value in encode_all(options, kinds).items() if value}


def _encode_service(service: SavedService) -> dict[str, Any]:
    target_options = service.target_options
    if target_options.forward_headers is None:
        target_options = attrs.evolve(
            target_options, forward_headers=not service.service_options.tls_enabled
        )
    rollout = None if service.rollout is None else encode_all(service.rollout, _ROLLOUT)
    has_rollout = bool(service.rollout_targets or service.rollout_readers)
    document: dict[str, Any] = {
        "name": service.name,
        "options": {
            **encode_all(service.service_options, _SERVICE_OPTIONS),
            **_encode_own(service.service_options, _OWN_SERVICE_OPTIONS),
        },
        "target_options": {
            "health_check_config": encode_all(target_options.health_check, _HEALTH_CHECK),
            **encode_all(target_options, _TARGET_OPTIONS),
            **_encode_own(target_options, _OWN_TARGET_OPTIONS),
        },
        "active_targets": list(service.active_targets),
        "active_readers": list(service.active_readers),
        "rollout_targets": list(service.rollout_targets) if has_rollout else None,
        "rollout_readers": list(service.rollout_readers) if has_rollout else None,
        "pause_controller": encode_pause(service.pause),
        "rollout_controller": rollout,
    }
    add_unknown(document, service.extra)
    return document
