"""Which certificate a handshake gets: by the name that the client asks for, and who serves it."""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from kamal_proxy.errors import CertificateError
from kamal_proxy.matching import host_name
from kamal_proxy.tls.contexts import ACME_ALPN, challenge_context, server_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from kamal_proxy.options import ServiceOptions
    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.files import TlsFiles
    from kamal_proxy.tls.hello import ClientHello
    from kamal_proxy.tls.hosts import Authority
    from kamal_proxy.tls.issuer import Issuer
    from kamal_proxy.tls.on_demand import OnDemand

PROTOCOLS = ("h2", "http/1.1")
ISSUE_PATIENCE = 10.0  # seconds that a handshake waits for a certificate that is being obtained

_MAX_CONTEXTS = 2000
# Of clients of TLS 1.2 that take no tickets, for which OpenSSL keeps 1 KiB each. It would keep
# 20,480 in each context, and Python offers no way to tell it otherwise.
_MAX_SESSIONS = 1000
_TLS_1_3 = 0x0304
_VALIDATION = ACME_ALPN.encode()
_OFFERED = frozenset(name.encode() for name in PROTOCOLS)


class Alert(enum.IntEnum):
    """What a client is told that gets no certificate (RFC 8446 6.2)."""

    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120


class NoCertificateError(Exception):
    """There is no certificate for a handshake.

    Attributes:
        reason: Why, in words that are few enough to count by.
        alert: What the client is told.
    """

    def __init__(self, reason: str, alert: Alert = Alert.UNRECOGNIZED_NAME) -> None:
        super().__init__(reason)
        self.reason = reason
        self.alert = alert


class Chosen(NamedTuple):
    """What a handshake needs.

    Attributes:
        context: What to offer.
        client_ca: The CA by which the client is verified, if it is.
    """

    context: ssl.SSLContext
    client_ca: bytes | None = None


class Served(Protocol):
    """A service, as far as handshakes need it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def options(self) -> ServiceOptions:
        """What it answers to."""

    @property
    def tls(self) -> TlsFiles | None:
        """What its handshakes need from files."""


class Routes(Protocol):
    """A routing table, as far as handshakes need it."""

    def secure(self, host: str) -> Served | None:
        """Return the service that has the TLS settings of a host; of the first one for no host."""


class Selection:
    """Chooses certificates, and keeps what handshakes need to use them.

    Args:
        routes: Returns the routing table of this moment.
        issuer: Obtains certificates.
        on_demand: Says whether a host may have one.
        authority: Returns from whom a service's certificates are obtained.
    """

    def __init__(
        self,
        routes: Callable[[], Routes],
        issuer: Issuer,
        on_demand: OnDemand,
        authority: Callable[[ServiceOptions], Authority],
    ) -> None:
        self._routes = routes
        self._issuer = issuer
        self._on_demand = on_demand
        self._authority = authority
        # By what is in the files: a redeploy must not cost clients their sessions.
        self._contexts: OrderedDict[tuple[bytes, bytes | None], ssl.SSLContext] = OrderedDict()

    def at_hand(self, hello: ClientHello) -> Chosen | None:
        """Return what a handshake needs, or None if :meth:`wait_for` has to be asked.

        Raises:
            NoCertificateError: there is no certificate for it.
        """
        if _VALIDATION in hello.alpn:
            return None
        if hello.alpn and _OFFERED.isdisjoint(hello.alpn):
            raise NoCertificateError("no common protocol", Alert.NO_APPLICATION_PROTOCOL)
        host, _, files = self._asked_for(hello.server_name)
        certificate = self._find(host, files)
        return None if certificate is None else self._chosen(hello, certificate, files)

    async def wait_for(self, hello: ClientHello) -> Chosen:
        """Return what a handshake needs; wait a while for a certificate that is being obtained.

        Raises:
            NoCertificateError: there is none.
        """
        if _VALIDATION in hello.alpn:
            answer = await self._issuer.validate_tls(self._named(hello.server_name))
            if answer is None:
                raise NoCertificateError("unexpected ACME validation")
            return Chosen(challenge_context(answer))
        host, service, files = self._asked_for(hello.server_name)
        return self._chosen(hello, await self._obtain(host, service), files)

    def certificate_for(self, name: str) -> Certificate | None:
        """Return the certificate for a name if it is at hand and clients need none themselves."""
        try:
            host, _, files = self._asked_for(name)
            return None if files.asks_clients else self._find(host, files)
        except NoCertificateError:
            return None

    def _named(self, name: str) -> str:
        """Return the name that a client asks for; the address in a URL is none (RFC 6066 3)."""
        if not name or name.strip("0123456789."):
            return name
        service = self._routes().secure(name)
        return name if service is not None and service.options.hosts else ""

    def _asked_for(self, name: str) -> tuple[str, Served, TlsFiles]:
        """Return the host that a client wants, who serves it, and with which files."""
        name = self._named(name)
        service = self._routes().secure(name)
        files = None if service is None else service.tls
        if service is None or files is None:
            raise NoCertificateError("unknown name" if name else "no name")
        if files.asks_clients and files.client_ca is None:
            raise NoCertificateError("unusable file", Alert.INTERNAL_ERROR)
        return name or next(iter(service.options.hosts), ""), service, files

    def _find(self, host: str, files: TlsFiles) -> Certificate | None:
        if not files.has_own_certificate:
            return self._issuer.find(host)
        if files.certificate is None:
            raise NoCertificateError("unusable file", Alert.INTERNAL_ERROR)
        return files.certificate

    async def _obtain(self, host: str, service: Served) -> Certificate:
        """Wait for the certificate of a host that is served, or that may be."""
        authority = self._authority(service.options)
        certificate = None
        with trio.move_on_after(ISSUE_PATIENCE):
            if service.options.tls_on_demand_url:
                certificate = await self._issuer.load(host, authority)
                if certificate is None and not await self._on_demand.allows(service, host):
                    raise NoCertificateError("not allowed")
            elif host not in map(host_name, service.options.hosts):
                # Saved by a program that took this for every host: strangers would choose names.
                raise NoCertificateError("not allowed")
            if certificate is None:
                self._issuer.request(host, authority)
                certificate = await self._issuer.wait(host)
        if certificate is None:
            raise NoCertificateError("no certificate yet", Alert.INTERNAL_ERROR)
        return certificate

    def _chosen(self, hello: ClientHello, certificate: Certificate, files: TlsFiles) -> Chosen:
        try:
            return Chosen(self._context(hello, certificate, files.client_ca), files.client_ca)
        except CertificateError as error:
            raise NoCertificateError("unusable certificate", Alert.INTERNAL_ERROR) from error

    def _context(
        self, hello: ClientHello, certificate: Certificate, client_ca: bytes | None
    ) -> ssl.SSLContext:
        key = (certificate.pem, client_ca)
        context = self._contexts.get(key)
        may_grow = _TLS_1_3 not in hello.versions
        if context is None or (may_grow and context.session_stats()["number"] > _MAX_SESSIONS):
            context = server_context(certificate, client_ca=client_ca, alpn=PROTOCOLS)
            self._contexts[key] = context
            if len(self._contexts) > _MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(key)
        return context
