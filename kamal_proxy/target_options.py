"""How targets are named, reached and probed: options that a deploy states and that are remembered.

As in ``options``: constructors only normalise, ``validate`` holds the rules. Knows nothing of the
service that the targets belong to. Pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.rules import (
    is_path,
    require_not_negative,
    require_path,
    require_port,
    require_positive,
    target_port,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

TargetScheme: TypeAlias = Literal["http", "h2c"]

# The original's pattern, ASCII only: a name or IPv4 address of two characters or more.
_TARGET = re.compile(r"([A-Za-z0-9_][-_.A-Za-z0-9+]+)(?::([0-9]+))?", re.ASCII)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_HOST = re.compile(r"[^\x00-\x20\x7f/?#@]+")


def path_prefix(value: str) -> str:
    """Normalise a path prefix to a slash and the trimmed rest."""
    return "/" + value.strip("/")


def header_names(values: Iterable[str] | None) -> tuple[str, ...]:
    """Write names of header fields as the Go proxy does and saves them, such as ``X-Request-Id``.

    What is no name stays as it is, for the sentence that refuses it.
    """
    return tuple(
        "-".join(map(str.capitalize, name.split("-"))) if _HEADER_NAME.fullmatch(name) else name
        for name in texts(values)
    )


def require_header_name(option: str, name: str) -> None:
    """Raise InvalidOptionsError unless a header field can have the name (RFC 9110 5.1)."""
    if not _HEADER_NAME.fullmatch(name):
        raise InvalidOptionsError(f"{option} '{name}' is not a valid header name")


def require_targets(targets: tuple[str, ...], read_targets: tuple[str, ...]) -> None:
    """Raise InvalidOptionsError unless there is a target, and all are written as targets are."""
    if not targets:
        raise InvalidOptionsError("at least one target is required")
    for target in (*targets, *read_targets):
        split_target(target)


def split_target(target: str) -> tuple[str, int]:
    """Split ``host`` or ``host:port`` of a target into host and port (80 when not given).

    What is before it, if anything, is :func:`split_scheme`'s.

    Raises:
        InvalidOptionsError: the text is not a target; the sentence names it.
    """
    _, address = split_scheme(target)
    match = _TARGET.fullmatch(address)
    if match is None:
        raise InvalidOptionsError(f"{target} :invalid host pattern")
    host, port = match.groups()
    return host, 80 if port is None else target_port(target, port)


def split_scheme(target: str) -> tuple[TargetScheme, str]:
    """Split a target into what is spoken with it, and its ``host`` or ``host:port``.

    Returns:
        ``http`` (HTTP/1.1) of a target without a scheme, or ``h2c``: HTTP/2 without TLS.

    Raises:
        InvalidOptionsError: it has another scheme; the sentence says what would be right.
    """
    scheme, separator, address = target.partition("://")
    if not separator:
        return "http", target
    if scheme == "h2c":
        return "h2c", address
    raise InvalidOptionsError(f"target {target}: {_wrong_scheme(scheme.lower(), address)}")


def _wrong_scheme(scheme: str, address: str) -> str:
    if scheme in ("https", "h2"):
        return (
            "targets are reached without TLS; "
            f"give {address} for HTTP/1.1, or h2c://{address} for HTTP/2"
        )
    if scheme == "http":
        return f"give {address} without a scheme, or h2c://{address} for HTTP/2"
    if scheme in ("grpc", "h2c"):
        return f"give h2c://{address} for gRPC and HTTP/2"
    return f"no scheme but h2c:// is known; give {address} for HTTP/1.1"


@attrs.frozen(kw_only=True)
class HealthCheckOptions:
    """How a target is probed.

    Attributes:
        path: Path of the probe's GET request.
        port: Port to probe; 0 means the target's own.
        interval: Seconds between two probes.
        timeout: Seconds in which each probe must finish.
        host: Host header of the probe; empty means the target's ``host:port``.
    """

    path: str = "/up"
    port: int = 0
    interval: float = 1.0
    timeout: float = 5.0
    host: str = ""

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_path("health-check-path", self.path)
        require_port("health-check-port", self.port, lowest=0)
        require_positive("health-check-interval", self.interval)
        require_positive("health-check-timeout", self.timeout)
        if self.host and not _HEADER_HOST.fullmatch(self.host):
            raise InvalidOptionsError(f"health-check-host '{self.host}' is not a valid host")


@attrs.frozen(kw_only=True)
class PathTimeout:
    """Another limit for the head of a response, for one part of a service.

    Attributes:
        path: Path prefix as the target sees it; it matches whole segments.
        timeout: Seconds; 0 means no limit.
    """

    path: str = attrs.field(converter=path_prefix)
    timeout: float

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        if not is_path(self.path):
            raise InvalidOptionsError(
                f"path-timeout '{self.path}' must begin with a path without spaces, ? or #, "
                "such as /reports=5m"
            )
        require_not_negative(f"path-timeout of {self.path}", self.timeout)


@attrs.frozen(kw_only=True)
class TargetOptions:
    """How requests travel to a service's targets.

    Attributes:
        health_check: How targets are probed.
        response_timeout: Seconds to wait for the head of a response (``--target-timeout``); 0 means
            no limit.
        forward_headers: Whether incoming X-Forwarded-* headers are believed; ``None`` means
            yes unless the service uses TLS.
        log_request_headers: Names of request headers added to each log line.
        log_response_headers: Names of response headers added to each log line.
        buffer_requests: Whether a request is read whole before a target is asked.
        buffer_responses: Whether a response of known length is read whole before the client gets
            any of it.
        max_memory_buffer_size: Bytes of one buffered body that are kept in memory; the rest is
            written to a file.
        max_request_body_size: Largest buffered request body in bytes; 0 means no limit.
        max_response_body_size: Largest buffered response body in bytes; 0 means no limit.
        scope_cookie_paths: Whether the path prefix is put in front of the paths of cookies.
        path_timeouts: Other values of ``response_timeout``; the longest matching path wins.
        websocket_idle_timeout: Seconds after which a WebSocket that carries nothing in either
            direction is closed; 0 means never.
    """

    health_check: HealthCheckOptions = attrs.field(factory=HealthCheckOptions)
    response_timeout: float = 30.0
    buffer_requests: bool = False
    buffer_responses: bool = False
    max_memory_buffer_size: int = 1024 * 1024
    max_request_body_size: int = 0
    max_response_body_size: int = 0
    log_request_headers: tuple[str, ...] = attrs.field(default=(), converter=header_names)
    log_response_headers: tuple[str, ...] = attrs.field(default=(), converter=header_names)
    forward_headers: bool | None = None
    scope_cookie_paths: bool = False
    path_timeouts: tuple[PathTimeout, ...] = ()
    websocket_idle_timeout: float = 0.0

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        self.health_check.validate()
        require_not_negative("websocket-idle-timeout", self.websocket_idle_timeout)
        for limit in self.path_timeouts:
            limit.validate()
        require_not_negative("target-timeout", self.response_timeout)
        require_not_negative("buffer-memory", self.max_memory_buffer_size)
        require_not_negative("max-request-body", self.max_request_body_size)
        require_not_negative("max-response-body", self.max_response_body_size)
        for option, names in (
            ("log-request-header", self.log_request_headers),
            ("log-response-header", self.log_response_headers),
        ):
            for name in names:
                require_header_name(option, name)
