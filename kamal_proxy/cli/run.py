"""``kamal-proxy run``: serves until it is told to stop. The only command that loads the server."""

import gc
import os
import re
from collections.abc import Callable
from typing import Annotated, TypeVar

from cyclopts import Parameter

from kamal_proxy.cli.arguments import Bool, Int, parse_bool
from kamal_proxy.options import RunOptions, default_data_directory, default_socket_path

T = TypeVar("T")

_DEFAULTS = RunOptions()


def run(
    *_ignored: str,
    debug: Annotated[
        Bool | None, Parameter(help="Log what happens inside, too; from $DEBUG if not given")
    ] = None,
    http_port: Annotated[
        Int | None,
        Parameter(help="Port for HTTP; from $HTTP_PORT if not given, and 80 without that"),
    ] = None,
    https_port: Annotated[
        Int | None,
        Parameter(help="Port for HTTPS; from $HTTPS_PORT if not given, and 443 without that"),
    ] = None,
    metrics_port: Annotated[
        Int | None,
        Parameter(help="Port for metrics, 0 for none; from $METRICS_PORT if not given"),
    ] = None,
    http3: Annotated[Bool, Parameter(help="Serve HTTP/3 on the HTTPS port")] = False,
) -> None:
    """Run the proxy.

    It serves until it gets SIGTERM or SIGINT, then lets requests in flight finish. Each variable
    of the environment may also be written with KAMAL_PROXY_ in front, such as
    KAMAL_PROXY_HTTP_PORT, and that one is preferred.
    """
    options = RunOptions(
        debug=_environment("DEBUG", parse_bool, _DEFAULTS.debug) if debug is None else debug,
        http_port=_port("HTTP_PORT", http_port, _DEFAULTS.http_port),
        https_port=_port("HTTPS_PORT", https_port, _DEFAULTS.https_port),
        metrics_port=_port("METRICS_PORT", metrics_port, _DEFAULTS.metrics_port),
        http3=http3,
        data_directory=default_data_directory(),
        socket_path=default_socket_path(),
    )
    options.validate()
    from kamal_proxy.process import serve

    gc.enable()
    serve(options)


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
