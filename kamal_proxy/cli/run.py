"""``kamal-proxy run``: serves until it is told to stop. The only command that loads the server.

Its options come from flags, else from the environment, because Kamal can pass only two of them.
"""

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import attrs
from cyclopts import Parameter

from kamal_proxy.cli.arguments import (
    BOOL,
    DURATION,
    INT,
    STRINGS,
    TEXT,
    Bool,
    Directory,
    Duration,
    File,
    Group,
    Int,
    Kind,
    Strings,
    Text,
    parse_bool,
    quote,
)
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import InvalidOptionsError, KamalProxyError
from kamal_proxy.run_options import (
    HTTPS_PORT,
    AcmeOptions,
    RunOptions,
    default_data_directory,
    default_socket_path,
)

T = TypeVar("T")

_DEFAULTS = RunOptions(https_port=HTTPS_PORT)
_ACME = AcmeOptions()

# The groups of flags in help.
_PORTS = Group("Ports and addresses")
_FRONT = Group("Proxies in front")
_TIMEOUTS = Group("Timeouts")
_LIMITS = Group("Limits")
_AUTHORITY = Group("Certificate authority")


def run(
    *_ignored: str,
    debug: Annotated[
        Bool | None, Parameter(help="Log what happens inside, too; from $DEBUG if not given")
    ] = None,
    http_port: Annotated[
        Int | None,
        _PORTS,
        Parameter(help="Port for HTTP; from $HTTP_PORT if not given, and 80 without that"),
    ] = None,
    https_port: Annotated[
        Int | None,
        _PORTS,
        Parameter(
            help=f"Port for HTTPS; from $HTTPS_PORT if not given, and {HTTPS_PORT} without that"
        ),
    ] = None,
    metrics_port: Annotated[
        Int | None,
        _PORTS,
        Parameter(help="Port for metrics, 0 for none; from $METRICS_PORT if not given"),
    ] = None,
    udp_port: Annotated[
        Int | None,
        _PORTS,
        Parameter(
            help="Port of UDP services deployed without --port; from $UDP_PORT if not given, and "
            f"{_DEFAULTS.udp_port} without that"
        ),
    ] = None,
    http3: Annotated[
        Bool | None,
        _PORTS,
        Parameter(help="Serve HTTP/3 too, on the UDP port of the same number as HTTPS"),
    ] = None,
    lane: Annotated[
        Bool | None,
        Parameter(
            help="Serve ordinary HTTP/1.1 requests without a task for each; =false is the same, "
            "but at many times the cost"
        ),
    ] = None,
    bind: Annotated[
        Strings | None,
        _PORTS,
        Parameter(help="Address to listen on; all if none (repeatable)"),
    ] = None,
    trusted_proxy: Annotated[
        Strings | None,
        _FRONT,
        Parameter(
            help="Network of proxies whose X-Forwarded-* and Forwarded headers are believed, such "
            "as 192.0.2.0/24; without any, everybody's are (repeatable)"
        ),
    ] = None,
    proxy_protocol_from: Annotated[
        Strings | None,
        _FRONT,
        Parameter(help="Network whose connections begin with the PROXY protocol (repeatable)"),
    ] = None,
    head_timeout: Annotated[
        Duration | None,
        _TIMEOUTS,
        Parameter(
            help="How long the head of a request may take to arrive "
            f"(default {format_duration(_DEFAULTS.head_timeout)})",
        ),
    ] = None,
    idle_timeout: Annotated[
        Duration | None,
        _TIMEOUTS,
        Parameter(
            help="How long a connection may stay open between requests "
            f"(default {format_duration(_DEFAULTS.idle_timeout)})",
        ),
    ] = None,
    stall_timeout: Annotated[
        Duration | None,
        _TIMEOUTS,
        Parameter(
            help="How long a client may neither send nor take anything in the middle of a body "
            f"(default {format_duration(_DEFAULTS.stall_timeout)})",
        ),
    ] = None,
    shutdown_timeout: Annotated[
        Duration | None,
        _TIMEOUTS,
        Parameter(
            help="How long stopping may take, with the requests in flight "
            f"(default {format_duration(_DEFAULTS.shutdown_timeout)})",
        ),
    ] = None,
    max_head_size: Annotated[
        Int | None,
        _LIMITS,
        Parameter(
            help="Largest head of a request or response in bytes "
            f"(default {_DEFAULTS.max_head_size})"
        ),
    ] = None,
    max_headers: Annotated[
        Int | None,
        _LIMITS,
        Parameter(help=f"Most header fields of a request (default {_DEFAULTS.max_headers})"),
    ] = None,
    max_connections: Annotated[
        Int | None,
        _LIMITS,
        Parameter(
            help=f"Client connections open at once; more wait (default {_DEFAULTS.max_connections})"
        ),
    ] = None,
    max_spill: Annotated[
        Int | None,
        _LIMITS,
        Parameter(
            help="Bytes of buffered bodies on disk at once, 0 for no limit "
            f"(default {_DEFAULTS.max_spill})"
        ),
    ] = None,
    max_buffer_memory: Annotated[
        Int | None,
        _LIMITS,
        Parameter(
            help="Bytes of buffered bodies in memory at once; the rest goes to disk "
            f"(default {_DEFAULTS.max_buffer_memory})"
        ),
    ] = None,
    spill_directory: Annotated[
        Directory | None,
        _LIMITS,
        Parameter(help="Directory for buffered bodies (default: the system's for temporary files)"),
    ] = None,
    acme_directory: Annotated[
        Text | None,
        _AUTHORITY,
        Parameter(
            help="URL of the certificate authority's ACME directory (default: Let's Encrypt's)"
        ),
    ] = None,
    acme_email: Annotated[
        Text | None,
        _AUTHORITY,
        Parameter(help="Address that the certificate authority may write to"),
    ] = None,
    acme_eab_kid: Annotated[
        Text | None,
        _AUTHORITY,
        Parameter(help="Key identifier of your account outside of ACME, if the authority wants it"),
    ] = None,
    acme_eab_hmac_key: Annotated[
        Text | None,
        _AUTHORITY,
        Parameter(help="The secret that belongs to it; better in the environment than here"),
    ] = None,
    acme_ca_file: Annotated[
        File | None,
        _AUTHORITY,
        Parameter(help="File with CA certificates (PEM) for an authority of your own"),
    ] = None,
) -> None:
    """Run the proxy.

    It serves until it gets SIGTERM or SIGINT, then lets requests in flight finish, for as long as
    the shutdown timeout says; a second signal ends it at once. The services are those of the last
    run. It fails if a port is in use, or if what was saved of the services can't be read. It logs
    to stdout, a line of JSON for each request.

    Each flag can also be set by a variable of the environment, such as KAMAL_PROXY_HEAD_TIMEOUT for
    --head-timeout; the flag is preferred. Lists are separated by commas there. $DEBUG and the ports
    also have their names without KAMAL_PROXY_.
    """

    def acme(field: str, given: str | None, variable: str = "") -> str:
        text: str = _setting(field, TEXT, given, variable or f"ACME_{field.upper()}", _ACME)
        return text

    directory = _setting("spill_directory", TEXT, spill_directory)
    options = RunOptions(
        debug=_environment("DEBUG", parse_bool, _DEFAULTS.debug) if debug is None else debug,
        http_port=_port("HTTP_PORT", http_port, _DEFAULTS.http_port),
        https_port=_port("HTTPS_PORT", https_port, HTTPS_PORT),
        metrics_port=_port("METRICS_PORT", metrics_port, _DEFAULTS.metrics_port),
        udp_port=_port("UDP_PORT", udp_port, _DEFAULTS.udp_port),
        http3=_setting("http3", BOOL, http3),
        lane=_setting("lane", BOOL, lane),
        data_directory=default_data_directory(),
        socket_path=default_socket_path(),
        bind=_setting("bind", STRINGS, bind),
        trusted_proxies=_setting("trusted_proxies", STRINGS, trusted_proxy, "TRUSTED_PROXY"),
        proxy_protocol_from=_setting("proxy_protocol_from", STRINGS, proxy_protocol_from),
        head_timeout=_setting("head_timeout", DURATION, head_timeout),
        idle_timeout=_setting("idle_timeout", DURATION, idle_timeout),
        stall_timeout=_setting("stall_timeout", DURATION, stall_timeout),
        shutdown_timeout=_setting("shutdown_timeout", DURATION, shutdown_timeout),
        max_head_size=_setting("max_head_size", INT, max_head_size),
        max_headers=_setting("max_headers", INT, max_headers),
        max_connections=_setting("max_connections", INT, max_connections),
        max_spill=_setting("max_spill", INT, max_spill),
        max_buffer_memory=_setting("max_buffer_memory", INT, max_buffer_memory),
        spill_directory=Path(directory) if directory else None,
        acme=AcmeOptions(
            directory=acme("directory", acme_directory),
            email=acme("email", acme_email),
            eab_key_id=acme("eab_key_id", acme_eab_kid, "ACME_EAB_KID"),
            eab_hmac_key=acme("eab_hmac_key", acme_eab_hmac_key),
            ca_file=acme("ca_file", acme_ca_file),
        ),
    )
    options.validate()
    from kamal_proxy.process import serve

    gc.enable()
    serve(options)


def _setting(
    field: str, kind: Kind, given: object, variable: str = "", options: Any = _DEFAULTS
) -> Any:
    """Return the value for a field: the one given, or its variable's, or the default.

    Args:
        field: A field of ``options``.
        kind: What it is for a value.
        given: The value of the flag; None if it was not given.
        variable: The variable, without KAMAL_PROXY_; by default it has the field's name.
        options: The options at their defaults: of the proxy, or a part of them.

    Raises:
        InvalidOptionsError: the variable has a value that can't be used.
    """
    if given is not None:
        return given
    variable = f"KAMAL_PROXY_{variable or field.upper()}"
    text = os.environ.get(variable)
    if text is None:
        return getattr(options, field)
    try:
        value = kind.parse(text)
        if options is _DEFAULTS:
            # On its own, so that the error can name the variable. Those of ACME depend on others.
            attrs.evolve(_DEFAULTS, **{field: value}).validate()
    except (ValueError, KamalProxyError) as error:
        raise InvalidOptionsError(f"invalid value {quote(text)} for {variable}: {error}") from None
    return value


def _port(variable: str, given: int | None, default: int) -> int:
    return _environment(variable, _parse_decimal, default) if given is None else given


def _environment(variable: str, parse: Callable[[str], T], default: T) -> T:
    """Read a variable, with prefix or plain; as in the original, a bad value means the default."""
    text = os.environ.get("KAMAL_PROXY_" + variable, os.environ.get(variable))
    if text is None:
        return default
    try:
        return parse(text)
    except ValueError:
        return default


def _parse_decimal(text: str) -> int:
    # Unlike a flag's value, Go reads this one with base 10 only.
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a decimal number")
    return int(text)
