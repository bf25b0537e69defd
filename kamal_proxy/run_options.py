"""The options of a whole proxy, as ``run`` and embedders state them; none belongs to a service.

As in ``options``: constructors only normalise, ``validate`` holds the rules and is called once.
Also where state and socket are when nothing is said, which is all that is asked of the environment.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.rules import (
    require_address,
    require_network,
    require_not_negative,
    require_port,
    require_positive,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

HTTPS_PORT = 443  # of the command, when it is not told another one

_ACME_DIRECTORY = re.compile(r"https://[^\x00-\x20\x7f/?#@]+(?:/[^\x00-\x20\x7f#]*)?")
_EMAIL = re.compile(r"[^\x00-\x20\x7f@,;<>]+@[^\x00-\x20\x7f@,;<>]+")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]{16,}={0,2}")


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


def _addresses(values: Iterable[str] | str | None) -> tuple[str, ...]:
    """Normalise addresses; a single one may be given as it is, and none means all."""
    return tuple(filter(None, (values,) if isinstance(values, str) else texts(values)))


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
        lane: Whether ordinary HTTP/1.1 requests are served in the extension, without a task for
            each. Without it everything goes through h11: the same, but at many times the cost.
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
    lane: bool = True
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
