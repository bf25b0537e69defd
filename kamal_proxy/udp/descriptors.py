"""How many of the process's file descriptors the UDP services may have, all together.

Listeners are few or known; what can grow are the upstream sockets, of which a service may have as
many as sessions. Raises the process's limit through ``ports``, opens nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kamal_proxy.udp.admission import MAX_CANDIDATES
from kamal_proxy.udp.ports import available_descriptors, kept_descriptors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kamal_proxy.logs import Log
    from kamal_proxy.udp.leases import Leases
    from kamal_proxy.udp.options import UdpOptions
    from kamal_proxy.udp.service import UdpService


class Descriptors:
    """The descriptors of all UDP services of a proxy.

    Args:
        leases: Their ports.
        running: All that run, by name, as they are at each moment.
        installed: Those of them that serve.
        log: Where is said that there are too few.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        running: Mapping[str, UdpService],
        installed: Mapping[str, UdpService],
        log: Log,
    ) -> None:
        self._leases = leases
        self._running = running
        self._installed = installed
        self._log = log
        self._room = 0  # listeners and upstream sockets that all services may have
        self._told_wanted = 0  # upstream sockets that it was said there are too few for

    def check(self, name: str, options: UdpOptions, targets: int) -> None:
        """Share the file descriptors with everything else; warn if they are too few.

        Only if more are wanted than when that was said last.

        Args:
            name: The service that is about to be installed.
            options: Its options.
            targets: How many targets it has.
        """
        known = {
            service.name: (service.options, len(service.active.targets))
            for service in self._installed.values()
            if service.options is not None and service.active is not None
        }
        known[name] = options, targets
        wanted = sum(_sockets(each, count) for each, count in known.values())
        spare = sum(_spare_sockets(each) for each, _ in known.values())
        listeners = self._leases.sockets_with(options)
        room = available_descriptors(listeners + wanted + spare, keep=kept_descriptors())
        self._room = max(self._room, room)  # also where this deploy comes to nothing
        available = max(0, room - listeners)
        if available >= wanted:
            self._told_wanted = 0
        elif wanted > self._told_wanted:  # the same again would tell the operator nothing new
            self._told_wanted = wanted
            self._log.warning(
                "The limit of open files allows fewer UDP sessions than --max-sessions",
                service=name,
                wanted=wanted,
                available=available,
            )

    def has_room(self, sockets: int) -> bool:
        """Return whether so many more upstream sockets leave enough descriptors to all others."""
        used = sum(service.relay.sockets for service in self._running.values())
        return self._leases.sockets + used + sockets <= self._room


def _sockets(options: UdpOptions, targets: int) -> int:
    """Return how many upstream sockets a service may have.

    One for each session; without affinity one for each target, and two for a call on a pair of
    ports.
    """
    if options.port_ranges:
        return 2 * options.sessions.limit
    return options.sessions.limit * (1 if options.sessions.affinity else targets)


def _spare_sockets(options: UdpOptions) -> int:
    """Return how many more it may have for a moment, while targets of calls are asked for."""
    return options.sessions.limit + MAX_CANDIDATES if options.protocol == "webrtc" else 0
