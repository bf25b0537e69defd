"""What travels over the admin API: option classes as JSON, progress events, descriptions.

Pure data. Both sides use it, so it imports neither trio nor anything of the server. Decoding is
strict: an unknown or ill-typed field is an error that names it, because a client that believes it
set an option must not be ignored.
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from kamal_proxy.errors import InvalidOptionsError

API_PREFIX = "/v1"
EVENT_STREAM = "application/x-ndjson"

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class ServiceDescription:
    """One row of ``list``. An HTTP and a UDP service of one name are two.

    Attributes:
        name: Service name.
        hosts: Hosts; empty means every host.
        path_prefixes: Path prefixes.
        udp_ports: Ports of a UDP service, such as ``udp/9999`` and ``udp/10000-20000``; an HTTP
            service has none.
        protocol: What a UDP service's clients speak, such as ``udp``; empty for HTTP.
        max_sessions: Most sessions of a UDP service at once; 0 for HTTP.
        pairs_in_use: Pairs of ports for RTP and RTCP on which there are sessions.
        targets: ``host:port`` of each active target that may be written to.
        read_targets: ``host:port`` of each active target for reading only.
        rollout_targets: Like ``targets``, of the rollout.
        rollout_read_targets: Like ``read_targets``, of the rollout.
        rollout_active: Whether it is set which visitors go to the rollout.
        rollout_percentage: Share of the values of the visitors' cookie that go to the rollout.
        rollout_allowlist: Values of the cookie that always go there.
        healthy: The targets, of all four kinds, that answered their last probe.
        state: ``running``, ``paused`` or ``stopped``.
        stop_message: What visitors of a stopped service are told.
        max_pause: Seconds that requests to a paused service wait; 0 unless it is paused.
        tls: Whether the service uses TLS.
        in_flight: Requests, or sessions, being served by the service's targets.
        draining: Requests, or sessions, still being served by replaced targets.
    """

    name: str
    hosts: tuple[str, ...] = ()
    path_prefixes: tuple[str, ...] = ()
    udp_ports: tuple[str, ...] = ()
    protocol: str = ""
    max_sessions: int = 0
    pairs_in_use: int = 0
    targets: tuple[str, ...] = ()
    read_targets: tuple[str, ...] = ()
    rollout_targets: tuple[str, ...] = ()
    rollout_read_targets: tuple[str, ...] = ()
    rollout_active: bool = False
    rollout_percentage: int = 0
    rollout_allowlist: tuple[str, ...] = ()
    healthy: tuple[str, ...] = ()
    state: str = "running"
    stop_message: str = ""
    max_pause: float = 0.0
    tls: bool = False
    in_flight: int = 0
    draining: int = 0


@attrs.frozen(kw_only=True)
class CertificateDescription:
    """One row of ``certs list``.

    Attributes:
        host: The host that it is for; of a service's own, all of its hosts, with commas.
        names: The names in it; none if there is no certificate yet.
        source: ``file`` for a service's own, else ``acme``.
        state: ``valid``, ``obtaining`` (the first one), ``failing`` (the last attempt did, but the
            certificate, if there is one, has not expired) or ``expired``.
        issuer: Who issued it.
        key_type: Such as ``ECDSA P-256``.
        not_after: When it expires; like the next two in Unix seconds, and 0 for never.
        renew_at: When it will be renewed.
        next_attempt: When the next attempt will be made, after one that failed.
        last_error: Why that failed, in the certificate authority's words.
        directory: URL of the ACME directory; empty for a service's own.
    """

    host: str
    names: tuple[str, ...] = ()
    source: str = "acme"
    state: str = "valid"
    issuer: str = ""
    key_type: str = ""
    not_after: float = 0.0
    renew_at: float = 0.0
    next_attempt: float = 0.0
    last_error: str = ""
    directory: str = ""


@attrs.frozen(kw_only=True)
class Event:
    """One step of a deploy, a pause or a stop, as it happens.

    Attributes:
        event: ``probe``, ``healthy``, ``switched``, ``draining``, ``done`` or ``failed``.
        elapsed: Seconds since it began.
        target: The target concerned (``probe``).
        result: What the probe found, in words (``probe``).
        ok: Whether the probe succeeded (``probe``).
        in_flight: Requests, or sessions, whose end is waited for (``draining``).
        completed: Requests, or sessions, that finished during the drain (``done``).
        cancelled: Requests cut by the drain deadline, or sessions that were cut (``done``).
        goodbyes: Sessions whose peers were told, by RTCP, that they end (``done``).
        cut_unsaid: SRTP sessions that were cut without that, because only the peers have the keys
            (``done``).
        code: Stable name of the error (``failed``).
        message: The error's sentence (``failed``).
        details: Further lines about the error (``failed``).
    """

    event: str
    elapsed: float = 0.0
    target: str = ""
    result: str = ""
    ok: bool = False
    in_flight: int = 0
    completed: int = 0
    cancelled: int = 0
    goodbyes: int = 0
    cut_unsaid: int = 0
    code: str = ""
    message: str = ""
    details: tuple[str, ...] = ()


def to_json(value: object) -> Any:
    """Turn an attrs object into plain JSON data; fields at their default are left out."""
    cls: type[Any] = type(value)
    if attrs.has(cls):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in attrs.fields(cls)
            if getattr(value, field.name) != _default(field)
        }
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def from_json(cls: type[T], data: object, where: str = "") -> T:
    """Build an attrs object from plain JSON data.

    Args:
        cls: The attrs class to build.
        data: Decoded JSON.
        where: Path of the value inside the document, for error sentences.

    Raises:
        InvalidOptionsError: a field is unknown, missing or of the wrong type; it is named.
    """
    return cls(**_fields(cls, data, where))


def _fields(cls: type[Any], data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidOptionsError(f"{where or 'the document'} must be a JSON object")
    hints = get_type_hints(cls)
    fields = attrs.fields_dict(cls)
    for name in data:
        if name not in fields:
            raise InvalidOptionsError(f"unknown field {_join(where, str(name))}")
    for name, field in fields.items():
        if field.default is attrs.NOTHING and name not in data:
            raise InvalidOptionsError(f"missing field {_join(where, name)}")
    return {name: _value(hints[name], item, _join(where, name)) for name, item in data.items()}


def _value(hint: Any, data: object, where: str) -> Any:
    if attrs.has(hint):
        return from_json(hint, data, where)
    if get_origin(hint) in (Union, UnionType):
        if data is None and type(None) in get_args(hint):
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        if data is None:
            return ()
        if not isinstance(data, list):
            raise InvalidOptionsError(f"{where} must be a list")
        item_hint = get_args(hint)[0]
        return tuple(_value(item_hint, item, f"{where}[{i}]") for i, item in enumerate(data))
    if type(data) is int and not -(2**63) <= data < 2**63:
        raise InvalidOptionsError(f"{where} must fit 64 bits")
    if hint is float and type(data) is int:
        return float(data)
    if type(data) is not hint:
        raise InvalidOptionsError(f"{where} must be {_KINDS[hint]}")
    if isinstance(data, str) and any("\ud800" <= character <= "\udfff" for character in data):
        # JSON can hold half a surrogate pair; neither the log nor the saved state can.
        raise InvalidOptionsError(f"{where} must be Unicode text")
    return data


_KINDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def _default(field: attrs.Attribute[Any]) -> object:
    default: Any = field.default
    return default.factory() if hasattr(default, "factory") else default


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
