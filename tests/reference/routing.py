"""The slow, obvious twin of ``RoutingTable.find``: look at every binding and keep the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kamal_proxy.service import Service


def host_rank(pattern: str, host: str) -> int:
    """Return 3 for the host itself, 2 for its wildcard, 1 for every host, 0 for no match."""
    if pattern == host:
        return 3
    label, dot, rest = host.partition(".")
    if label and dot and pattern == f"*.{rest}":
        return 2
    return 1 if pattern == "" else 0


def segments(path: str) -> list[str]:
    """Split a path into its segments; the root has none."""
    return path.split("/")[1:] if path != "/" else []


def find(services: Iterable[Service], host: str, path: str) -> tuple[str, str] | None:
    """Return the name of the service for a request, and the prefix that matched."""
    bindings = [
        (host_rank(pattern, host), prefix, service.name)
        for service in services
        for pattern in (service.options.hosts or ("",))
        for prefix in service.options.path_prefixes
    ]
    # A host that is claimed at all answers alone, also for paths that nobody serves there.
    best = max((rank for rank, _, _ in bindings), default=0)
    matching = [
        (len(prefix), name, prefix)
        for rank, prefix, name in bindings
        if rank == best and rank and segments(path)[: len(segments(prefix))] == segments(prefix)
    ]
    return max(matching)[1:] if matching else None
