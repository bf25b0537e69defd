"""Everything about certificates that one proxy has: obtained, asked for, chosen.

Puts the parts of ``tls`` together with the services that need them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from kamal_proxy.control.messages import CertificateDescription
from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.matching import host_name
from kamal_proxy.tls.contexts import load_client_ca
from kamal_proxy.tls.hosts import Authority
from kamal_proxy.tls.issuer import Issuer
from kamal_proxy.tls.on_demand import OnDemand
from kamal_proxy.tls.reloading import watch_files
from kamal_proxy.tls.schedule import refusal
from kamal_proxy.tls.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.options import ServiceOptions
    from kamal_proxy.router import RoutingTable
    from kamal_proxy.run_options import RunOptions
    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.on_demand import Ask


class Certificates:
    """The certificates of a proxy's services.

    Args:
        options: How the proxy runs.
        routes: Returns the routing table of this moment.
        ask: Asks a service whether a host may have a certificate.
        log: Where is said what becomes of them.
        metrics: Where they are counted.

    Raises CertificateError if the file that verifies the certificate authority can't be used.

    Attributes:
        selection: Chooses one for a handshake.
    """

    def __init__(
        self,
        options: RunOptions,
        routes: Callable[[], RoutingTable],
        ask: Ask,
        log: Log,
        metrics: Metrics,
    ) -> None:
        if options.acme.ca_file:
            # Otherwise only the log of each attempt would tell.
            load_client_ca(options.acme.ca_file)
        path = options.certificates_path
        self._path = "" if path is None else str(path)
        self._routes = routes
        self._log = log
        self._needed = options.https_port is not None
        self._issuer = Issuer(options.acme, log, metrics)
        self.selection = Selection(routes, self._issuer, OnDemand(ask, log), self._authority)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Obtain and renew certificates, and reload those in files, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_files, lambda: self._routes().secured, self._log)
            await self._issuer.run(task_status=task_status)

    def require_possible(self, options: ServiceOptions) -> None:
        """Raise InvalidOptionsError if a service with these options could not use TLS."""
        if not self._needed:
            raise InvalidOptionsError("TLS needs HTTPS, which this proxy does not serve")
        if options.tls_certificate_path:
            return
        for host in options.hosts:
            if why := refusal(host_name(host)):
                raise InvalidOptionsError(f"automatic TLS: {why}")
        if not self._authority(options).cache_path:
            raise InvalidOptionsError(
                "automatic TLS needs a directory for certificates: acme_cache_path of the service, "
                "or data_directory of the proxy"
            )

    def want(self, routes: RoutingTable) -> None:
        """Take note of a new routing table: obtain what it needs, and no more than that."""
        if not self._needed:
            return
        self._issuer.set_wanted(
            {
                host_name(host): self._authority(service.options)
                for service in routes.secured
                if not service.options.tls_certificate_path
                for host in service.options.hosts
            }
        )

    def try_again(self, service: str) -> None:
        """Try at once what could not be obtained for a service that was just deployed."""
        deployed = self._routes().get(service)
        if deployed is not None:
            self._issuer.try_again([host_name(host) for host in deployed.options.hosts])

    async def validate(self, token: str) -> bytes | None:
        """Answer a certificate authority that asks for a token, if it is known here."""
        return await self._issuer.validate(token)

    def describe(self) -> list[CertificateDescription]:
        """Describe all certificates, sorted by host."""
        own = (
            _describe(service.tls.certificate, service.options.hosts)
            for service in self._routes().secured
            if service.tls is not None and service.tls.has_own_certificate
        )
        return sorted((*own, *self._issuer.describe()), key=lambda each: each.host)

    async def renew(self, host: str) -> None:
        """Obtain a new certificate for a host now.

        Raises:
            CertificateNotFoundError: none is obtained for that host.
            AcmeError: the certificate authority does not give one.
            CertificateStoreError: it can't be kept.
        """
        await self._issuer.renew(host)

    def _authority(self, options: ServiceOptions) -> Authority:
        return Authority(options.acme_directory, options.acme_cache_path or self._path)


def _describe(certificate: Certificate | None, hosts: tuple[str, ...]) -> CertificateDescription:
    if certificate is None:
        return CertificateDescription(
            host=",".join(hosts),
            source="file",
            state="failing",
            last_error="its files can't be used; the log says why",
        )
    return CertificateDescription(
        host=",".join(hosts),
        names=certificate.names,
        source="file",
        state="expired" if certificate.not_after <= time.time() else "valid",
        issuer=certificate.issuer,
        key_type=certificate.key_type,
        not_after=certificate.not_after,
    )
