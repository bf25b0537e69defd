"""What deploys and the other changes of a service state, and every rule about their values.

The command, the admin API, the saved state and embedders all use these classes, and those of
``target_options``. Constructors only normalise (so that a state file written by any program can be
read); ``validate`` holds the rules and is called once, by the proxy, before anything is changed.
Durations are seconds, sizes bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import attrs

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.rules import (
    MAX_NAME,
    require_between,
    require_not_negative,
    require_path,
    require_service_name,
    texts,
)
from kamal_proxy.target_options import (
    TargetOptions,
    path_prefix,
    require_header_name,
    require_targets,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_HOSTS = 1000

_HOST = re.compile(
    r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*\.?",
    re.IGNORECASE,
)
# Fields that frame a request or say where it goes.
_NO_CLIENT_IP = frozenset(
    {"connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "x-forwarded-host", "x-forwarded-proto", "x-request-id", "x-request-start"}
)


def _hosts(values: Iterable[str] | None) -> tuple[str, ...]:
    """Normalise hosts: none, or the original's single empty host, means every host."""
    hosts = texts(values)
    return () if hosts == ("",) else hosts


def _path_prefixes(values: Iterable[str] | None) -> tuple[str, ...]:
    """Normalise prefixes to a slash and the trimmed rest; none means the root."""
    return tuple(map(path_prefix, texts(values))) or ("/",)


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
        if self.client_ip_header:
            require_header_name("client-ip-header", self.client_ip_header)
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
        require_targets(self.targets, self.read_targets)
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
        require_targets(self.targets, self.read_targets)
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
