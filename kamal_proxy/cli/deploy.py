"""``kamal-proxy deploy``: the flags of a deploy, and how they become ``DeployOptions``.

Only rules that ask whether a flag was *given* are here; rules about values are in ``options``.
"""

import sys
from typing import Annotated

from cyclopts import Parameter

from kamal_proxy.cli.arguments import (
    Bool,
    Directory,
    Duration,
    File,
    Group,
    HttpService,
    Int,
    Kind,
    Strings,
    Text,
    parse_strings,
    quote,
)
from kamal_proxy.cli.output import Progress
from kamal_proxy.durations import parse_duration
from kamal_proxy.errors import InvalidDurationError, UsageError
from kamal_proxy.options import DeploymentOptions, DeployOptions, ServiceOptions
from kamal_proxy.run_options import default_data_directory
from kamal_proxy.target_options import HealthCheckOptions, PathTimeout, TargetOptions

ACME_STAGING_DIRECTORY = "https://acme-staging-v02.api.letsencrypt.org/directory"

_SERVICE = ServiceOptions()
_TARGET = TargetOptions()
_HEALTH = HealthCheckOptions()
_DEPLOYMENT = DeploymentOptions()

# The groups of flags in help.
_ROUTES = Group("Where requests go")
_TLS = Group("TLS")
_SWITCH = Group("Switching over")
_CHECKS = Group("Health checks")
_EXCHANGE = Group("Requests and responses")
_BUFFERS = Group("Buffering")
_LOG = Group("Log and metrics")


def _parse_path_timeouts(text: str) -> tuple[PathTimeout, ...]:
    return tuple(map(_parse_path_timeout, parse_strings(text)))


def _parse_path_timeout(text: str) -> PathTimeout:
    path, _, duration = text.rpartition("=")
    if not path:
        raise ValueError(f"{quote(text)} must be a path and a duration, such as /reports=5m")
    try:
        return PathTimeout(path=path, timeout=parse_duration(duration))
    except InvalidDurationError as error:
        raise ValueError(
            f"{error}; it must be a path and a duration, such as /reports=5m"
        ) from None


PATH_TIMEOUTS = Kind("path=duration", _parse_path_timeouts, many=True)
PathTimeouts = Annotated[tuple[PathTimeout, ...], PATH_TIMEOUTS, PATH_TIMEOUTS.parameter()]


def deploy(
    service: HttpService,
    /,
    *,
    target: Annotated[
        Strings | None,
        _ROUTES,
        Parameter(help="Where the service runs, as host or host:port (required; repeatable)"),
    ] = None,
    read_target: Annotated[
        Strings,
        _ROUTES,
        Parameter(help="Where read-only requests may go, as host:port (repeatable)"),
    ] = (),
    host: Annotated[
        Strings,
        _ROUTES,
        Parameter(
            help="Host name to serve, or *.name for its subdomains; all if none (repeatable)"
        ),
    ] = (),
    path_prefix: Annotated[
        Strings,
        _ROUTES,
        Parameter(help="Path under which to serve; all if none (repeatable)"),
    ] = (),
    strip_path_prefix: Annotated[
        Bool,
        _ROUTES,
        Parameter(help="Remove the path prefix before the request goes to the target"),
    ] = _SERVICE.strip_prefix,
    tls: Annotated[
        Bool,
        _TLS,
        Parameter(help="Serve over HTTPS, with automatic certificates or your own (needs --host)"),
    ] = _SERVICE.tls_enabled,
    tls_on_demand_url: Annotated[
        Text,
        _TLS,
        Parameter(help="URL or path that is asked whether a host may have a certificate"),
    ] = _SERVICE.tls_on_demand_url,
    tls_staging: Annotated[
        Bool,
        _TLS,
        Parameter(help="Get certificates from Let's Encrypt's staging environment"),
    ] = False,
    tls_certificate_path: Annotated[
        File | None, _TLS, Parameter(help="File with your own certificate chain (PEM)")
    ] = None,
    tls_private_key_path: Annotated[
        File | None,
        _TLS,
        Parameter(help="File with the private key of your own certificate (PEM)"),
    ] = None,
    tls_acme_cache_path: Annotated[
        Directory | None,
        _TLS,
        Parameter(help="Directory for automatic certificates (default: in the data directory)"),
    ] = None,
    tls_client_ca: Annotated[
        File,
        _TLS,
        Parameter(help="File with the CA certificates (PEM) that clients' must be signed by"),
    ] = _SERVICE.tls_client_ca_path,
    tls_redirect: Annotated[
        Bool, _TLS, Parameter(help="Redirect HTTP requests of a TLS service to HTTPS")
    ] = _SERVICE.tls_redirect,
    canonical_host: Annotated[
        Text, _ROUTES, Parameter(help="Redirect requests for any other host to this one")
    ] = _SERVICE.canonical_host,
    deploy_timeout: Annotated[
        Duration,
        _SWITCH,
        Parameter(help="How long the new targets may take to become healthy"),
    ] = _DEPLOYMENT.deploy_timeout,
    drain_timeout: Annotated[
        Duration,
        _SWITCH,
        Parameter(help="How long requests on the old targets may take to finish"),
    ] = _DEPLOYMENT.drain_timeout,
    force: Annotated[
        Bool,
        _SWITCH,
        Parameter(help="Switch at once, without waiting for the targets to be healthy"),
    ] = _DEPLOYMENT.force,
    health_check_interval: Annotated[
        Duration, _CHECKS, Parameter(help="Time between two health checks of a target")
    ] = _HEALTH.interval,
    health_check_timeout: Annotated[
        Duration, _CHECKS, Parameter(help="Time in which each health check must finish")
    ] = _HEALTH.timeout,
    health_check_path: Annotated[
        Text, _CHECKS, Parameter(help="Path to request; any 2xx answer means healthy")
    ] = _HEALTH.path,
    health_check_port: Annotated[
        Int, _CHECKS, Parameter(help="Port to check; 0 means the target's own port")
    ] = _HEALTH.port,
    health_check_host: Annotated[
        Text,
        _CHECKS,
        Parameter(help="Host header of health checks; the target's host if not given"),
    ] = _HEALTH.host,
    writer_affinity_timeout: Annotated[
        Duration,
        _ROUTES,
        Parameter(help="How long a client that wrote keeps off the read targets"),
    ] = _SERVICE.writer_affinity_timeout,
    read_target_websockets: Annotated[
        Bool, _ROUTES, Parameter(help="Let WebSockets go to read targets")
    ] = _SERVICE.read_targets_accept_websockets,
    target_timeout: Annotated[
        Duration,
        _EXCHANGE,
        Parameter(help="How long a target may take to begin its response"),
    ] = _TARGET.response_timeout,
    path_timeout: Annotated[
        PathTimeouts,
        _EXCHANGE,
        Parameter(help="The same for one path and what is under it, as /reports=5m (repeatable)"),
    ] = _TARGET.path_timeouts,
    websocket_idle_timeout: Annotated[
        Duration,
        _EXCHANGE,
        Parameter(help="How long a WebSocket may carry nothing; 0 for no limit"),
    ] = _TARGET.websocket_idle_timeout,
    buffer_requests: Annotated[
        Bool | None,
        _BUFFERS,
        Parameter(help="Read a whole request before it goes to the target"),
    ] = None,
    buffer_responses: Annotated[
        Bool | None,
        _BUFFERS,
        Parameter(help="Read a whole response before it goes to the client"),
    ] = None,
    buffer_memory: Annotated[
        Int,
        _BUFFERS,
        Parameter(help="Bytes of a buffered body kept in memory; the rest goes to disk"),
    ] = _TARGET.max_memory_buffer_size,
    max_request_body: Annotated[
        Int | None,
        _BUFFERS,
        Parameter(help="Largest request body in bytes, 0 for no limit; with --buffer-requests"),
    ] = None,
    max_response_body: Annotated[
        Int | None,
        _BUFFERS,
        Parameter(help="Largest response body in bytes, 0 for no limit; with --buffer-responses"),
    ] = None,
    error_pages: Annotated[
        Directory,
        _EXCHANGE,
        Parameter(help="Directory with your own error pages, such as 503.html"),
    ] = _SERVICE.error_page_path,
    log_request_header: Annotated[
        Strings, _LOG, Parameter(help="Request header to add to the log (repeatable)")
    ] = (),
    log_response_header: Annotated[
        Strings, _LOG, Parameter(help="Response header to add to the log (repeatable)")
    ] = (),
    exclude_metrics_path: Annotated[
        Strings, _LOG, Parameter(help="Path to leave out of the metrics (repeatable)")
    ] = (),
    forward_headers: Annotated[
        Bool | None,
        _EXCHANGE,
        Parameter(
            help="Believe X-Forwarded-* headers of clients; if not given, only without --tls"
        ),
    ] = None,
    client_ip_header: Annotated[
        Text, _EXCHANGE, Parameter(help="Request header that holds the client's address")
    ] = _SERVICE.client_ip_header,
    scope_cookie_paths: Annotated[
        Bool,
        _EXCHANGE,
        Parameter(help="Put the path prefix in front of the paths of cookies"),
    ] = _TARGET.scope_cookie_paths,
) -> None:
    """Deploy a service, or a new version of one, without losing a request.

    Waits until every target is healthy, sends new requests there, lets the requests on the old
    targets finish, and returns. Those that are not finished at the drain timeout are cut.

    If a target is not healthy at the deploy timeout, the command fails and says what was wrong with
    each; nothing has changed then, and the old targets serve on. So it is with options that can't
    work, and with hosts and paths that another service has.

    Options are not remembered from one deploy to the next. A repeatable flag also takes several
    values at once, separated by commas.
    """
    if max_request_body is not None and buffer_requests is None:
        raise UsageError("max-request-body can only be set when request buffering is enabled")
    if max_response_body is not None and buffer_responses is None:
        raise UsageError("max-response-body can only be set when response buffering is enabled")
    service_options = ServiceOptions(
        hosts=host,
        path_prefixes=path_prefix,
        strip_prefix=strip_path_prefix,
        tls_enabled=tls,
        tls_certificate_path=tls_certificate_path or "",
        tls_private_key_path=tls_private_key_path or "",
        tls_on_demand_url=tls_on_demand_url,
        tls_redirect=tls_redirect,
        tls_client_ca_path=tls_client_ca,
        canonical_host=canonical_host,
        acme_directory=ACME_STAGING_DIRECTORY if tls_staging else _SERVICE.acme_directory,
        acme_cache_path=_cache_path() if tls_acme_cache_path is None else tls_acme_cache_path,
        error_page_path=error_pages,
        writer_affinity_timeout=writer_affinity_timeout,
        read_targets_accept_websockets=read_target_websockets,
        exclude_metrics_paths=exclude_metrics_path,
        client_ip_header=client_ip_header,
    )
    service_options.validate()  # the original tells these errors before the next two
    if target is None:
        raise UsageError('required flag(s) "target" not set')
    _require_together(
        {
            "tls-certificate-path": tls_certificate_path is not None,
            "tls-private-key-path": tls_private_key_path is not None,
        }
    )
    options = DeployOptions(
        service=service,
        targets=target,
        read_targets=read_target,
        service_options=service_options,
        target_options=TargetOptions(
            health_check=HealthCheckOptions(
                path=health_check_path,
                port=health_check_port,
                interval=health_check_interval,
                timeout=health_check_timeout,
                host=health_check_host,
            ),
            response_timeout=target_timeout,
            buffer_requests=bool(buffer_requests),
            buffer_responses=bool(buffer_responses),
            max_memory_buffer_size=buffer_memory,
            max_request_body_size=max_request_body or 0,
            max_response_body_size=max_response_body or 0,
            log_request_headers=log_request_header,
            log_response_headers=log_response_header,
            forward_headers=forward_headers,
            scope_cookie_paths=scope_cookie_paths,
            path_timeouts=path_timeout,
            websocket_idle_timeout=websocket_idle_timeout,
        ),
        deployment_options=DeploymentOptions(
            deploy_timeout=deploy_timeout, drain_timeout=drain_timeout, force=force
        ),
    )
    options.validate()
    from kamal_proxy.control.client import ControlClient

    with Progress(sys.stderr, draining="on the old targets") as progress:
        ControlClient().deploy(options, progress.show)


def _cache_path() -> str:
    return str(default_data_directory() / "certs")


def _require_together(given: dict[str, bool]) -> None:
    missing = [name for name, is_given in given.items() if not is_given]
    if missing and len(missing) < len(given):
        raise UsageError(
            f"if any flags in the group [{' '.join(given)}] are set they must all be set; "
            f"missing [{' '.join(missing)}]"
        )
