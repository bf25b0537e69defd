"""Which service a request belongs to: an immutable snapshot, swapped whole by each change. Pure.

Host match order: exact host, then ``*.rest`` for exactly one leading label, then every host. Within
a host the longest path prefix wins, and it matches whole segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from kamal_proxy.errors import HostConflictError
from kamal_proxy.matching import has_prefix, host_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kamal_proxy.service import Service

EVERY_HOST = ""


class RoutingTable:
    """All services at one moment. Never changed: :meth:`with_service` makes another."""

    __slots__ = ("_bindings", "_roots", "_services", "secured")

    def __init__(self, services: Mapping[str, Service] | None = None) -> None:
        services = dict(services or {})
        bindings: dict[str, list[tuple[bytes, Service]]] = {}
        roots = self._roots = {
            host: service
            for service in services.values()
            if "/" in service.options.path_prefixes
            for host in _host_keys(service)
        }
        #: Those that have TLS settings, which others may inherit.
        self.secured = tuple(
            service
            for service in services.values()
            if service.options.tls_enabled and "/" in service.options.path_prefixes
        )
        resolved = {}
        for service in services.values():
            hosts = _host_keys(service)
            # Its hosts may have different settings; what is told of it is that of the first.
            resolved[service.name] = first = _inheriting_tls(service, hosts[0], roots)
            for host in hosts:
                bound = first if host == hosts[0] else _inheriting_tls(first, host, roots)
                for prefix in service.options.path_prefixes:
                    bindings.setdefault(host, []).append((prefix.encode(), bound))
        self._services = resolved
        self._bindings = {
            host: tuple(sorted(bound, key=lambda binding: -len(binding[0])))
            for host, bound in bindings.items()
        }

    def __iter__(self) -> Iterator[Service]:
        return iter(self._services.values())

    def get(self, name: str) -> Service | None:
        """Return the service of that name."""
        return self._services.get(name)

    def with_service(self, service: Service) -> RoutingTable:
        """Return a table in which ``service`` replaces the one of its name.

        Raises:
            HostConflictError: another service claims one of its host and prefix pairs.
        """
        self.require_available(service)
        return RoutingTable({**self._services, service.name: service})

    def without_service(self, name: str) -> RoutingTable:
        """Return a table without the service of that name."""
        return RoutingTable({key: kept for key, kept in self._services.items() if key != name})

    def require_available(self, service: Service) -> None:
        """Raise HostConflictError if another service claims one of its host and prefix pairs."""
        wanted = {prefix.encode() for prefix in service.options.path_prefixes}
        for host in _host_keys(service):
            for prefix, owner in self._bindings.get(host, ()):
                if owner.name != service.name and prefix in wanted:
                    raise HostConflictError(
                        "host settings conflict with another service",
                        [
                            f"service {owner.name} already serves "
                            f"{host or 'every host'} with path prefix {prefix.decode()}"
                        ],
                    )

    def secure(self, host: str) -> Service | None:
        """Return the service that has the TLS settings of a host, if it has any: at its root.

        Args:
            host: Host name in lower case; empty for a client that names none, which gets the first
                service with TLS.
        """
        if not host:
            # One that takes every host has no certificate before somebody asks for a name.
            named = (service for service in self.secured if service.options.hosts)
            return next(named, self.secured[0] if self.secured else None)
        root = _root_for(host, self._roots)
        return root if root is not None and root.options.tls_enabled else None

    def find(self, host: str, path: bytes) -> tuple[Service, bytes] | None:
        """Find the service for a request.

        Args:
            host: Host name in lower case, without port.
            path: Decoded path.

        Returns:
            The service and the prefix that matched, or None.
        """
        for prefix, service in self.bound(host):
            if has_prefix(path, prefix):
                return service, prefix
        return None

    def bound(self, host: str) -> Sequence[tuple[bytes, Service]]:
        """Return the path prefixes that a host has, with their services: the first match wins.

        Args:
            host: Host name in lower case, without port.
        """
        bound = self._bindings.get(host)
        if bound is None:
            dot = host.find(".")
            if dot > 0:
                bound = self._bindings.get("*" + host[dot:])
            if bound is None:
                bound = self._bindings.get(EVERY_HOST, ())
        return bound


def _host_keys(service: Service) -> tuple[str, ...]:
    hosts = service.options.hosts or (EVERY_HOST,)
    return tuple(map(host_name, hosts))


def _inheriting_tls(service: Service, host: str, roots: Mapping[str, Service]) -> Service:
    """Give a service without a root prefix the TLS settings of the root service of a host."""
    if "/" in service.options.path_prefixes:
        return service
    root = _root_for(host, roots)
    options = attrs.evolve(
        service.options,
        tls_enabled=root is not None and root.options.tls_enabled,
        tls_redirect=root is None or root.options.tls_redirect,
    )
    tls = None if root is None else root.tls
    if options == service.options and tls is service.tls:
        return service
    return attrs.evolve(service, options=options, tls=tls)


def _root_for(host: str, roots: Mapping[str, Service]) -> Service | None:
    wildcard = "*" + host[host.find(".") :] if host.find(".") > 0 else EVERY_HOST
    return roots.get(host) or roots.get(wildcard) or roots.get(EVERY_HOST)
