"""The saved state of the UDP services as JSON; a sibling of the HTTP services' document.

Pure: bytes to records and back, no files (``state.py`` has those). No other program writes this
document, so values that no deploy could have stated are errors, and not corrected. Keys that this
version does not know are carried along; docs/state.md has the whole format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.json_format import (
    DURATION,
    FLAG,
    TEXT,
    WHOLE,
    Kind,
    StateFormatError,
    add_unknown,
    decode_services,
    decode_texts,
    encode_all,
    encode_services,
    open_service,
)
from kamal_proxy.state_format import SavedPause, decode_pause, encode_pause
from kamal_proxy.udp.options import (
    SessionOptions,
    UdpHealthCheckOptions,
    UdpOptions,
    split_udp_target,
)


@attrs.frozen(kw_only=True)
class SavedUdpService:
    """One UDP service as it is saved.

    Attributes:
        options: What it listens on, and how. Plain UDP has the port that it really has, never 0:
            a restart with another ``--udp-port`` must not move it.
        targets: ``host:port`` of each target.
        extra: What a newer version wrote that this one does not know, in the document's own
            nesting. A deploy states every option anew, so it should drop this.
    """

    name: str
    options: UdpOptions
    targets: tuple[str, ...] = ()
    pause: SavedPause = attrs.field(factory=SavedPause)
    extra: Mapping[str, Any] = attrs.field(factory=dict, hash=False)


def decode(content: bytes) -> tuple[SavedUdpService, ...]:
    """Read a saved state, in the order of the document.

    Raises:
        StateFormatError: it is not one, or not a complete one.
    """
    return decode_services(content, _decode_service)


def encode(services: Iterable[SavedUdpService]) -> bytes:
    """Write services: one line of UTF-8 JSON and a newline.

    Raises:
        StateFormatError: the result could not be read again; it must not be saved.
    """
    return encode_services(map(_encode_service, services), decode)


def _decode_targets(value: object, where: str) -> tuple[str, ...]:
    targets = decode_texts(value, where)
    for index, target in enumerate(targets):
        try:
            split_udp_target(target)
        except InvalidOptionsError as error:
            raise StateFormatError(f"{where}[{index}]: {error}") from error
    return targets


_TEXTS = Kind(decode_texts, list)
_TARGETS = Kind(_decode_targets, list)

# The keys in the order in which they are written; each is also the name of the attribute, except
# those of the sessions, which are named as the flags are.
_OPTIONS = {"port": WHOLE, "protocol": TEXT, "port_ranges": _TEXTS, "rtcp_policy": TEXT}
_SESSIONS = {
    "session_affinity": ("affinity", FLAG),
    "affinity_strategy": ("strategy", TEXT),
    "session_timeout": ("timeout", DURATION),
    "max_sessions": ("limit", WHOLE),
    "proxy_protocol": ("proxy_protocol", FLAG),
}
_HEALTH_CHECK = {
    "method": TEXT,
    "path": TEXT,
    "port": WHOLE,
    "interval": DURATION,
    "timeout": DURATION,
}


def _decode_service(data: object, number: int) -> SavedUdpService:
    name, section = open_service(data, number)
    options = section.child("options")
    health_check = options.child("health_check") if options else None
    values = options.take_all(_OPTIONS) if options else {}
    sessions = {
        attribute: value
        for key, (attribute, kind) in _SESSIONS.items()
        if options and (value := options.take(key, kind)) is not None
    }
    decoded = UdpOptions(
        **values,
        sessions=SessionOptions(**sessions),
        health_check=UdpHealthCheckOptions(
            **(health_check.take_all(_HEALTH_CHECK) if health_check else {})
        ),
    )
    try:
        decoded.validate()
    except InvalidOptionsError as error:
        raise StateFormatError(f"{section.prefix}{error}") from error
    if decoded.protocol == "udp" and not decoded.port:
        raise StateFormatError(f"{section.prefix}options.port is missing")
    return SavedUdpService(
        name=name,
        options=decoded,
        targets=section.take("active_targets", _TARGETS) or (),
        pause=decode_pause(section.child("pause_controller")),
        extra=section.unknown(),
    )


def _encode_service(service: SavedUdpService) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": service.name,
        "options": {
            **encode_all(service.options, _OPTIONS),
            **{
                key: kind.encode(getattr(service.options.sessions, attribute))
                for key, (attribute, kind) in _SESSIONS.items()
            },
            "health_check": encode_all(service.options.health_check, _HEALTH_CHECK),
        },
        "active_targets": _TARGETS.encode(service.targets),
        "pause_controller": encode_pause(service.pause),
    }
    add_unknown(document, service.extra)
    return document
