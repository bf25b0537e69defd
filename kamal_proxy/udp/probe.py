"""How the targets of UDP services are probed: a TCP connection, a GET, or nothing at all.

No probe is ever a datagram: the service would take it for a client's. What a result means for a
target is decided elsewhere.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import attrs
import trio

from kamal_proxy import lookups
from kamal_proxy.durations import format_duration
from kamal_proxy.health import ProbeResult
from kamal_proxy.probing import Probed
from kamal_proxy.target_options import HealthCheckOptions
from kamal_proxy.udp.names import why_not_resolved
from kamal_proxy.udp.options import UdpHealthCheckOptions

UdpProbe: TypeAlias = Callable[[Probed, UdpHealthCheckOptions], Awaitable[ProbeResult]]
HttpProbe: TypeAlias = Callable[[Probed, HealthCheckOptions], Awaitable[ProbeResult]]


def probe_for(
    options: UdpHealthCheckOptions, *, lookups: trio.CapacityLimiter, http: HttpProbe
) -> UdpProbe:
    """Return what probes the targets of a service.

    Args:
        options: How they are probed.
        lookups: Bounds the threads that wait for the name service.
        http: Probes over HTTP; it has its own time limit and never raises.
    """
    if options.method == "none":
        return NoProbe()
    return HttpCheck(http) if options.method == "http" else TcpProbe(lookups)


class TcpProbe:
    """Probes targets by opening a TCP connection, which is closed at once.

    Args:
        lookups: Bounds the threads that wait for the name service.
    """

    def __init__(self, lookups: trio.CapacityLimiter) -> None:
        self._lookups = lookups

    async def __call__(self, target: Probed, options: UdpHealthCheckOptions) -> ProbeResult:
        """Probe a target once; takes no longer than ``options.timeout`` and never raises."""
        port = options.port or target.port
        url = f"tcp://{_url_host(target.host)}:{port}"
        late = f"no answer within {format_duration(options.timeout)}"
        reason = late
        with trio.move_on_after(options.timeout) as scope:
            reason = await self._connect_any(target.host, port, scope.deadline, late)
        return ProbeResult(not reason, reason or "connected", url)

    async def _connect_any(self, host: str, port: int, deadline: float, late: str) -> str:
        """Connect to one of the addresses; return why none can be, or nothing."""
        try:
            addresses = await lookups.resolve(host, port, self._lookups)
        except (OSError, UnicodeError) as error:
            return why_not_resolved(host, error)
        reason = "no address"
        for tried, (family, address) in enumerate(addresses):
            # One that swallows packets must leave time for the others.
            now = trio.current_time()
            reason = late
            with trio.move_on_at(now + (deadline - now) / (len(addresses) - tried)):
                reason = await _connect(family, address)
            if not reason:
                break
        return reason


class HttpCheck:
    """Probes targets of a UDP service over HTTP.

    Args:
        probe: Does so; it has its own time limit and never raises.
    """

    def __init__(self, probe: HttpProbe) -> None:
        self._probe = probe

    async def __call__(self, target: Probed, options: UdpHealthCheckOptions) -> ProbeResult:
        """Probe a target once."""
        return await self._probe(
            _Named(target.name, _url_host(target.host), target.port),
            HealthCheckOptions(
                path=options.path,
                port=options.port,
                interval=options.interval,
                timeout=options.timeout,
            ),
        )


class NoProbe:
    """Takes every target for healthy; for servers that have no TCP port."""

    async def __call__(self, _target: Probed, _options: UdpHealthCheckOptions) -> ProbeResult:
        """Probe nothing."""
        await trio.lowlevel.checkpoint()
        return ProbeResult(True, "not checked", "")


@attrs.frozen
class _Named:
    name: str
    host: str
    port: int


async def _connect(family: socket.AddressFamily, address: tuple[object, ...]) -> str:
    """Connect to an address; return why it can't be, or nothing."""
    try:
        with trio.socket.socket(family, socket.SOCK_STREAM) as sock:
            await sock.connect(address)
            # Where nobody listens, a port of this host may be the one that the kernel chose for us.
            met_itself = sock.getsockname()[:2] == address[:2]
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)
    return "connection refused" if met_itself else ""


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
