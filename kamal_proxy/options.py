"""Every option of the proxy and of a deployment, and every rule about their values.

The command, the admin API, the saved state and embedders all use these classes. Constructors only
normalise (so that a state file written by any program can be read); ``validate`` holds the rules
and is called once, by the proxy, before anything is changed. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.rules import (
    MAX_NAME,
    is_path,
    require_address,
    require_between,
    require_network,
    require_not_negative,
    require_path,
    require_port,
    require_positive,
    require_service_name,
    target_port,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

TargetScheme: TypeAlias = Literal["http", "h2c"]

MAX_HOSTS = 1000
HTTPS_PORT = 443  # of the command, when it is not told another one

# The original's pattern, ASCII only: a name or IPv4 address of two characters or more.
_TARGET = re.compile(r"([A-Za-z0-9_][-_.A-Za-z0-9+]+)(?::([0-9]+))?", re.ASCII)
_HOST = re.compile(
    r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*\.?",
    re.IGNORECASE,
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Fields that frame a request or say where it goes.
_NO_CLIENT_IP = frozenset(
    {"connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "x-forwarded-host", "x-forwarded-proto", "x-request-id", "x-request-start"}
)
_ACME_DIRECTORY = re.compile(r"https://[^\x00-\x20\x7f/?#@]+(?:/[^\x00-\x20\x7f#]*)?")
_EMAIL = re.compile(r"[^\x00-\x20\x7f@,;<>]+@[^\x00-\x20\x7f@,;<>]+")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]{16,}={0,2}")
_HEADER_HOST = re.compile(r"[^\x00-\x20\x7f/?#@]+")


def _hosts(values: Iterable[str] | None) -> tuple[str, ...]:
    """Normalise hosts: none, or the original's single empty host, means every host."""
    hosts = texts(values)
    return () if hosts == ("",) else hosts


def _addresses(values: Iterable[str] | str | None) -> tuple[str, ...]:
    """Normalise addresses; a single one may be given as it is, and none means all."""
    return tuple(filter(None, (values,) if isinstance(values, str) else texts(values)))


def _path_prefixes(values: Iterable[str] | None) -> tuple[str, ...]:
    """Normalise prefixes to a slash and the trimmed rest; none means the root."""
    return tuple(map(_path_prefix, texts(values))) or ("/",)


def _path_prefix(value: str) -> str:
    return "/" + value.strip("/")


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

    path: str = attrs.field(converter=_path_prefix)
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
    log_request_headers: tuple[str, ...] = attrs.field(default=(), converter=texts)
    log_response_headers: tuple[str, ...] = attrs.field(default=(), converter=texts)
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
                if not _HEADER_NAME.fullmatch(name):
                    raise InvalidOptionsError(f"{option} '{name}' is not a valid header name")


@attrs.frozen(kw_only=True)
class ServiceOptions:
    """What a service answers to, and how.

    Attributes:
        hosts: Host names, ``*.rest`` for exactly one leading label; empty means every host.
        path_prefixes: Normalised path prefixes; ``("/",)`` by default.
        strip_prefix: Whether the target sees the path without the prefix.
        canonical_host: Host to which requests for any other are redirected; empty means none.
        error_page_path: Directory with the service's own error pages; empty means none.
        writer_affinity_timeout: Seconds for which a client that wrote keeps off the read targets;
            0 means not at all.
        read_targets_accept_websockets: Whether WebSockets may go to read targets.
        exclude_metrics_paths: Paths, as the target sees them, that are left out of the metrics.
        client_ip_header: Request header whose value becomes the incoming X-Forwarded-For.
        tls_enabled: Whether it is served over HTTPS.
        tls_certificate_path: File with its own certificate chain (PEM); empty means that
            certificates are obtained from a certificate authority.
        tls_private_key_path: File with the private key of that certificate (PEM).
        tls_on_demand_url: URL, or path on the service, that is asked whether a host may have a
            certificate; empty means that the hosts are those in ``hosts``.
        tls_redirect: Whether plain HTTP requests are redirected to HTTPS.
        tls_client_ca_path: File with the certificates (PEM) of which one must have signed each
            client's; empty means that clients need none.
        acme_directory: URL of the certificate authority's ACME directory; empty means the proxy's.
        acme_cache_path: Directory for what comes from there; empty means in the data directory.
    """

    hosts: tuple[str, ...] = attrs.field(default=(), converter=_hosts)
    path_prefixes: tuple[str, ...] = attrs.field(default=("/",), converter=_path_prefixes)
    strip_prefix: bool = True
    tls_enabled: bool = False
    tls_certificate_path: str = ""
    tls_private_key_path: str = ""
    tls_on_demand_url: str = ""
    tls_redirect: bool = True
    canonical_host: str = ""
    acme_directory: str = ""
    acme_cache_path: str = ""
    error_page_path: str = ""
    writer_affinity_timeout: float = 1.0
    read_targets_accept_websockets: bool = False
    exclude_metrics_paths: tuple[str, ...] = attrs.field(default=(), converter=texts)
    client_ip_header: str = ""
    tls_client_ca_path: str = ""

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work or a contradiction."""
        if len(self.hosts) > MAX_HOSTS:
            raise InvalidOptionsError(f"a service can have at most {MAX_HOSTS} hosts")
        for host in self.hosts:
            _require_host(host)
        for prefix in self.path_prefixes:
            require_path("path-prefix", prefix)
        require_not_negative("writer-affinity-timeout", self.writer_affinity_timeout)
        if self.client_ip_header and not _HEADER_NAME.fullmatch(self.client_ip_header):
            raise InvalidOptionsError(
                f"client-ip-header '{self.client_ip_header}' is not a valid header name"
            )
        if self.client_ip_header.lower() in _NO_CLIENT_IP:
            raise InvalidOptionsError(
                f"client-ip-header '{self.client_ip_header}' has another meaning; name the header "
                "in which your CDN or balancer tells the client's address"
            )
        self._validate_tls()
        if self.canonical_host:
            _require_host(self.canonical_host, "canonical-host")
            if "*" in self.canonical_host:
                raise InvalidOptionsError(
                    f"canonical-host '{self.canonical_host}' must be one host, not a wildcard"
                )
        if self.canonical_host and self.hosts and self.canonical_host not in self.hosts:
            raise InvalidOptionsError(
                f"service options invalid: canonical-host '{self.canonical_host}' "
                f"must be present in the hosts list: [{' '.join(self.hosts)}]"
            )

    def require_pair(self) -> None:
        """Raise InvalidOptionsError if a certificate or its key is given without the other.

        Not part of :meth:`validate`, because the command has another sentence for it, which the
        original tells later.
        """
        if bool(self.tls_certificate_path) != bool(self.tls_private_key_path):
            missing = "private-key" if self.tls_certificate_path else "certificate"
            raise InvalidOptionsError(
                "tls-certificate-path and tls-private-key-path go together; "
                f"tls-{missing}-path is missing"
            )

    def _validate_tls(self) -> None:
        def refuse(why: str) -> InvalidOptionsError:
            return InvalidOptionsError(f"service options invalid: {why}")

        own_certificate = self.tls_certificate_path or self.tls_private_key_path
        if not self.tls_enabled:
            if self.tls_on_demand_url:
                raise refuse("TLS must be enabled to use a TLS on-demand URL")
            if self.tls_client_ca_path:
                raise refuse("TLS must be enabled to ask clients for certificates")
            return
        if self.tls_on_demand_url:
            if self.hosts:
                raise refuse("cannot set hosts when using a TLS on-demand URL")
            if own_certificate:
                raise refuse("cannot use a custom TLS certificate with a TLS on-demand URL")
            if self.canonical_host:
                raise refuse("cannot set a canonical host when using a TLS on-demand URL")
            if not re.fullmatch(r"(https?://[^/\s]+\S*|/\S*)", self.tls_on_demand_url):
                raise refuse(
                    f"TLS on-demand URL '{self.tls_on_demand_url}' must be an absolute http(s) URL "
                    "or a path"
                )
        elif not self.hosts:
            raise refuse("host must be set when using TLS")
        if self.tls_client_ca_path and not self.tls_redirect:
            raise refuse(
                "clients could avoid their certificates over plain HTTP; leave out "
                "--tls-redirect=false or --tls-client-ca"
            )
        if "/" not in self.path_prefixes:
            raise refuse("TLS settings must be specified on the root path service")
        if not own_certificate and any("*" in host for host in self.hosts):
            raise InvalidOptionsError("automatic TLS does not support wildcards")


@attrs.frozen(kw_only=True)
class DeploymentOptions:
    """How one deploy is carried out; not remembered.

    Attributes:
        deploy_timeout: Seconds in which every new target must become healthy.
        drain_timeout: Seconds that requests in flight on the old targets may take to finish.
        force: Switch at once, without waiting for health.
    """

    deploy_timeout: float = 30.0
    drain_timeout: float = 30.0
    force: bool = False

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_not_negative("deploy-timeout", self.deploy_timeout)
        require_not_negative("drain-timeout", self.drain_timeout)


@attrs.frozen(kw_only=True)
class DeployOptions:
    """Everything that one deploy of a service states. Options are not sticky between deploys.

    Attributes:
        service: Name of the service.
        targets: ``host:port`` of each target, or ``h2c://host:port`` of one that is spoken with
            over HTTP/2.
        read_targets: The same of each read-only target.
    """

    service: str
    targets: tuple[str, ...] = attrs.field(converter=texts)
    read_targets: tuple[str, ...] = attrs.field(default=(), converter=texts)
    service_options: ServiceOptions = attrs.field(factory=ServiceOptions)
    target_options: TargetOptions = attrs.field(factory=TargetOptions)
    deployment_options: DeploymentOptions = attrs.field(factory=DeploymentOptions)

    def validate(self) -> None:
        """Check everything that can be checked without the running proxy.

        Raises:
            InvalidOptionsError: a value can't work; the sentence names the option and the value.
        """
        require_service_name(self.service)
        _require_targets(self.targets, self.read_targets)
        self.service_options.validate()
        self.service_options.require_pair()
        self.target_options.validate()
        self.deployment_options.validate()


@attrs.frozen(kw_only=True)
class PauseOptions:
    """How a service is paused.

    Attributes:
        drain_timeout: Seconds that requests in flight may take to finish.
        max_pause: Seconds that a request waits for the end of the pause before it fails.
    """

    drain_timeout: float = 30.0
    max_pause: float = 30.0

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_not_negative("drain-timeout", self.drain_timeout)
        require_not_negative("max-pause", self.max_pause)


@attrs.frozen(kw_only=True)
class StopOptions:
    """How a service is stopped.

    Attributes:
        drain_timeout: Seconds that requests in flight may take to finish.
        message: What visitors are told meanwhile.
    """

    drain_timeout: float = 30.0
    message: str = ""

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_not_negative("drain-timeout", self.drain_timeout)


@attrs.frozen(kw_only=True)
class RolloutOptions:
    """What one deploy of a service's rollout targets states.

    Attributes:
        targets: ``host:port`` of each target.
        read_targets: ``host:port`` of each read-only target.
    """

    targets: tuple[str, ...] = attrs.field(converter=texts)
    read_targets: tuple[str, ...] = attrs.field(default=(), converter=texts)
    deployment_options: DeploymentOptions = attrs.field(factory=DeploymentOptions)

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        _require_targets(self.targets, self.read_targets)
        self.deployment_options.validate()


@attrs.frozen(kw_only=True)
class RolloutSplit:
    """Which clients are served by the rollout targets, by the value of their cookie.

    Attributes:
        percentage: Share of the cookie's values, 0 to 100.
        allowlist: Values that always belong to it.
    """

    percentage: int = 0
    allowlist: tuple[str, ...] = attrs.field(default=(), converter=texts)

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_between("percent", self.percentage, 0, 100)


def default_data_directory() -> Path:
    """Return ``~/.config/kamal-proxy``, the original's place for state and certificates."""
    home = os.environ.get("HOME") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    return Path(home, ".config", "kamal-proxy")


def default_socket_path() -> Path:
    """Return where the admin API listens, by the original's rules for the environment."""
    environ = os.environ
    if path := environ.get("KAMAL_PROXY_SOCKET"):
        return Path(path)
    directory = environ.get("XDG_RUNTIME_DIR") or environ.get("TMPDIR") or "/tmp"  # noqa: S108
    return Path(directory, "kamal-proxy.sock")


@attrs.frozen(kw_only=True)
class AcmeOptions:
    """From which certificate authority certificates are obtained, and as whom.

    Attributes:
        directory: URL of its ACME directory; empty means Let's Encrypt's.
        email: Address that the authority may write to; empty means none.
        eab_key_id: Identifier of the account outside to which the ACME account is bound; empty
            means that it is bound to none.
        eab_hmac_key: Secret that belongs to it, in base64url, as the authority shows it.
        ca_file: File with the certificates (PEM) by which the authority's own server is verified;
            empty means those of well-known authorities.
    """

    directory: str = ""
    email: str = ""
    eab_key_id: str = ""
    eab_hmac_key: str = attrs.field(default="", repr=False)
    ca_file: str = ""

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work or a contradiction."""
        if self.directory and not _ACME_DIRECTORY.fullmatch(self.directory):
            raise InvalidOptionsError(
                f"acme-directory '{self.directory}' must be an https URL, such as "
                "https://ca.example.com/acme/directory"
            )
        if self.email and not _EMAIL.fullmatch(self.email):
            raise InvalidOptionsError(
                f"acme-email '{self.email}' must be one address, such as ops@example.com"
            )
        if bool(self.eab_key_id) != bool(self.eab_hmac_key):
            missing = "acme-eab-hmac-key" if self.eab_key_id else "acme-eab-kid"
            raise InvalidOptionsError(
                f"acme-eab-kid and acme-eab-hmac-key go together; {missing} is missing"
            )
        if self.eab_hmac_key and not _BASE64URL.fullmatch(self.eab_hmac_key):
            raise InvalidOptionsError(
                "acme-eab-hmac-key must be base64url, as the certificate authority shows it"
            )
        if self.ca_file and not self.directory:
            raise InvalidOptionsError(
                "acme-ca-file is of no use without acme-directory: Let's Encrypt is verified as "
                "any web site is"
            )


@attrs.frozen(kw_only=True)
class RunOptions:
    """How a proxy runs.

    Attributes:
        http_port: TCP port for plain HTTP; 0 lets the kernel choose (see ``Proxy.http_port``).
        https_port: TCP port for HTTPS; 0 lets the kernel choose (see ``Proxy.https_port``), and
            ``None`` means that HTTPS is not served: services can't use TLS then. The command's
            default is 443.
        metrics_port: TCP port for metrics; 0 means none.
        udp_port: UDP port of services that were deployed without one of their own.
        http3: Whether HTTP/3 is served too, on the UDP port of the same number as HTTPS.
        debug: Whether debug lines are logged.
        bind: Addresses to listen on; none means all, IPv4 and IPv6.
        trusted_proxies: Networks (``192.0.2.0/24``, or an address) whose X-Forwarded-* headers,
            Forwarded and client-ip-header are believed. Without any, everybody's are.
        proxy_protocol_from: Networks whose connections begin with a PROXY protocol header.
        data_directory: Where the saved state lives; ``None`` means state is not saved.
        socket_path: Unix socket of the admin API; ``None`` means there is none.
        head_timeout: Seconds in which the head of a request must arrive once it has begun.
        idle_timeout: Seconds that a client connection may stay open between requests.
        stall_timeout: Seconds that a client may send nothing in the middle of a request body, or
            take nothing of a response; likewise either side of an upgraded connection, and a target
            of a request body once its response timeout does not count.
        shutdown_timeout: Seconds from :meth:`Proxy.stop` to the end; requests in flight have a
            second and a half less to finish.
        max_head_size: Largest head of a request, and of a response, in bytes.
        max_headers: Most header fields of a request.
        max_connections: Client connections that may be open at once; more wait to be accepted.
        spill_directory: Where buffered bodies are written that do not fit into memory; ``None``
            means the system's directory for temporary files.
        max_spill: Bytes that may lie there at once; 0 means no limit.
        max_buffer_memory: Bytes of buffered bodies in memory at once; what is over is written to
            the spill directory.
        acme: From whom certificates are obtained.
    """

    http_port: int = 80
    https_port: int | None = None
    metrics_port: int = 0
    udp_port: int = 8080
    http3: bool = False
    debug: bool = False
    bind: tuple[str, ...] = attrs.field(default=(), converter=_addresses)
    trusted_proxies: tuple[str, ...] = attrs.field(default=(), converter=texts)
    proxy_protocol_from: tuple[str, ...] = attrs.field(default=(), converter=texts)
    data_directory: Path | None = None
    socket_path: Path | None = None
    head_timeout: float = 30.0
    idle_timeout: float = 60.0
    stall_timeout: float = 60.0
    shutdown_timeout: float = 10.0
    max_head_size: int = 64 * 1024
    max_headers: int = 200
    max_connections: int = 10_000
    spill_directory: Path | None = None
    max_spill: int = 10 * 1024**3
    max_buffer_memory: int = 256 * 1024**2
    acme: AcmeOptions = attrs.field(factory=AcmeOptions)

    @property
    def certificates_path(self) -> Path | None:
        """What is obtained from certificate authorities."""
        return self._in_data_directory("certs")

    @property
    def state_path(self) -> Path | None:
        """The saved state of the HTTP services."""
        return self._in_data_directory("kamal-proxy.state")

    @property
    def udp_state_path(self) -> Path | None:
        """The saved state of the UDP services."""
        return self._in_data_directory("kamal-proxy-udp.state")

    @property
    def udp_sessions_path(self) -> Path | None:
        """The sessions of the UDP services, saved from one run to the next."""
        return self._in_data_directory("kamal-proxy-udp.sessions")

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't be used."""
        for option in ("http-port", "https-port", "metrics-port"):
            require_port(option, getattr(self, option.replace("-", "_")) or 0, lowest=0)
        require_port("udp-port", self.udp_port, lowest=1)
        for option in ("head-timeout", "idle-timeout", "stall-timeout"):
            require_positive(option, getattr(self, option.replace("-", "_")))
        require_not_negative("shutdown-timeout", self.shutdown_timeout)
        if self.max_head_size < 1024:
            raise InvalidOptionsError("max-head-size must be at least 1024 bytes")
        for option in ("max-headers", "max-connections"):
            require_positive(option, getattr(self, option.replace("-", "_")))
        for option in ("max-spill", "max-buffer-memory"):
            require_not_negative(option, getattr(self, option.replace("-", "_")))
        for address in self.bind:
            require_address("bind", address)
        for option, networks in (
            ("trusted-proxy", self.trusted_proxies),
            ("proxy-protocol-from", self.proxy_protocol_from),
        ):
            for network in networks:
                require_network(option, network)
        self.acme.validate()
        if self.http3 and self.https_port is None:
            raise InvalidOptionsError("http3 needs an https-port")

    def _in_data_directory(self, name: str) -> Path | None:
        return None if self.data_directory is None else self.data_directory / name


def _require_targets(targets: tuple[str, ...], read_targets: tuple[str, ...]) -> None:
    if not targets:
        raise InvalidOptionsError("at least one target is required")
    for target in (*targets, *read_targets):
        split_target(target)


def _require_host(host: str, option: str = "host") -> None:
    if "," in host:
        raise InvalidOptionsError(
            f"{option} '{host}' is not a host name; give each host on its own"
        )
    if host == "*":
        raise InvalidOptionsError(
            "host '*' is not a host name; leave --host out to serve all hosts"
        )
    if _is_ipv6(host):
        return
    if ":" in host or "/" in host:
        raise InvalidOptionsError(
            f"{option} '{host}' must be a bare host name, without scheme or port"
        )
    if len(host) > MAX_NAME or not _HOST.fullmatch(host):
        raise InvalidOptionsError(
            f"{option} '{host}' is not a valid host name (such as app.example.com or *.example.com)"
        )


def _is_ipv6(host: str) -> bool:
    if ":" not in host or "%" in host:
        return False
    from ipaddress import IPv6Address  # seldom needed, and a command should start fast

    try:
        IPv6Address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True
