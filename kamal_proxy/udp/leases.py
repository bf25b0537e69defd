"""Which service has which UDP ports: all that a deploy needs are bound, or none.

Owns the sockets of the listeners. A lease is the claim of a service on some ports. They are bound
as long as a lease has them, so that those which two deploys have in common stay bound between them.
There may be thousands: what is done to many lets everything else run every millisecond or two.
Moves no datagram, and knows no deployment.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.errors import PortConflictError, ShuttingDownError
from kamal_proxy.udp.options import UdpOptions
from kamal_proxy.udp.ports import (
    BUFFER_SIZE,
    RANGE_BUFFER_SIZE,
    Binder,
    make_room,
    require_descriptors,
)
from kamal_proxy.udp.ranges import common_port, names_of, pairs_of, ports_of, spans_of, without
from kamal_proxy.udp.service import Listening, UdpService

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from kamal_proxy._fastpath import SourcePorts

_AT_ONCE = 100  # ports; binding them takes a millisecond or two
_OTHER_DESCRIPTORS = 1000  # that a proxy usually has open


@attrs.define(eq=False)
class Lease:
    """Ports that a service has, for as long as somebody needs them.

    Attributes:
        service: The service.
        options: What its ports are for.
        spans: Its ports.
        closed: Set when those of its ports are closed that nobody else needs.
    """

    service: UdpService
    options: UdpOptions
    spans: tuple[range, ...]
    closed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def ports(self) -> Iterator[int]:
        """Its ports, one by one."""
        return chain.from_iterable(self.spans)


class Leases:
    """The leases of all UDP services of a proxy.

    Args:
        bind: Addresses to listen on; none means all.
        source_ports: Told which ports no session may have towards its target.
        installed: Returns the services that are installed: their ports are nobody else's, also if
            they could not be bound when the proxy started.
    """

    def __init__(
        self,
        bind: Sequence[str],
        source_ports: SourcePorts,
        installed: Callable[[], Iterable[UdpService]],
    ) -> None:
        self._binder = Binder(bind)
        self._source_ports = source_ports
        self._installed = installed
        self._threads = trio.CapacityLimiter(1)
        self._leases: list[Lease] = []
        self._closing: list[Lease] = []
        self._bound: dict[int, Listening] = {}

    @property
    def sockets(self) -> int:
        """How many sockets are bound."""
        return len(self._bound) * self._binder.sockets_each

    def sockets_with(self, options: UdpOptions) -> int:
        """Return how many sockets would be bound if a service of these options were too."""
        new = sum(port not in self._bound for port in ports_of(options))
        return self.sockets + new * self._binder.sockets_each

    async def take(
        self, service: UdpService, options: UdpOptions, *, tell_owner: bool = True
    ) -> Lease:
        """Bind the ports of a service that are not bound yet; after a failure none of them is.

        Nobody reads from them before :meth:`listen`.

        Args:
            service: Whose they are.
            options: Which they are.
            tell_owner: Whether to look for the owner of a port that is taken; see
                :class:`kamal_proxy.udp.ports.Binder`.

        Raises:
            PortConflictError: another service has one of them.
            ListenError: one can't be bound, or they are more than there are file descriptors.
            ShuttingDownError: the service ended meanwhile.
        """
        spans, wanted = spans_of(options), self.sockets_with(options)
        if options.port_ranges:
            require_descriptors(",".join(options.port_ranges), wanted)
        if wanted - self.sockets > _AT_ONCE:
            descriptors = wanted + _OTHER_DESCRIPTORS
            await trio.to_thread.run_sync(make_room, descriptors, limiter=self._threads)
        while closing := next(
            (each for each in self._closing if common_port(spans, each.spans) is not None), None
        ):
            await closing.closed.wait()
        if service.relay.closed:
            raise ShuttingDownError("the proxy is shutting down")
        self._require_no_other(service, spans)
        lease = Lease(service, options, spans)
        for span in self._only_in(lease):
            # First of all: a session that begins now must not get what is about to be bound.
            self._source_ports.avoid(span[0], span[-1])
        self._leases.append(lease)
        try:
            for place, port in enumerate(lease.ports):
                if place and place % _AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                    if lease not in self._leases:
                        raise ShuttingDownError("the proxy is shutting down")
                if port not in self._bound:
                    buffer = BUFFER_SIZE if port == options.port else RANGE_BUFFER_SIZE
                    sockets = self._binder.bind(port, buffer=buffer, tell_owner=tell_owner)
                    self._bound[port] = Listening(port, sockets)
        except BaseException:
            await self.give_back(lease)
            raise
        return lease

    async def listen(self, lease: Lease) -> None:
        """Let a service take datagrams from the ports of a lease, from one after the other.

        It is not interrupted. What arrives before a port's turn waits in its buffer.
        """
        service, bound = lease.service, self._bound
        with trio.CancelScope(shield=True):
            for place, (rtp, rtcp) in enumerate(pairs_of(lease.options)):
                if place and place % _AT_ONCE == 0 and not await self._is_going_on(lease):
                    return
                # At once, so that no session begins on one of them before they are a pair.
                service.listen(bound[rtp])
                service.listen(bound[rtcp])
                service.pair(bound[rtp], bound[rtcp])
            for place, port in enumerate(lease.ports):
                if place and place % _AT_ONCE == 0 and not await self._is_going_on(lease):
                    return
                service.listen(bound[port])

    async def leave(self, service: UdpService) -> None:
        """Let a service take no more datagrams; its ports stay bound. It is not interrupted."""
        await _run(_unlisten(service, service.ports))

    async def _is_going_on(self, lease: Lease) -> bool:
        """Let everything else run; return whether the service has not ended meanwhile."""
        await trio.lowlevel.checkpoint()
        return lease in self._leases and not lease.service.relay.closed

    async def give_back(self, lease: Lease) -> None:
        """Close the ports that no other lease has; it is not interrupted.

        Harmless when the lease was given back before.
        """
        await _run(self._close(lease))

    async def give_back_all(self, service: UdpService) -> None:
        """Close all ports of a service; it is not interrupted."""
        for lease in self._of(service):
            await self.give_back(lease)

    def give_back_soon(self, lease: Lease, nursery: trio.Nursery | None) -> None:
        """Begin to close the ports that no other lease has; many are closed in the background.

        Args:
            lease: The lease; nothing happens if it was given back before.
            nursery: Where that is done; without one all are closed at once.
        """
        steps = self._close(lease)
        for _ in steps:
            if nursery is not None:
                nursery.start_soon(_run, steps)
                return

    def close_all(self, service: UdpService) -> None:
        """Close all ports of a service at once: its relay is closed, it reads from them no more."""
        for lease in self._of(service):
            self.give_back_soon(lease, None)

    def _of(self, service: UdpService) -> list[Lease]:
        return [lease for lease in self._leases if lease.service is service]

    def _require_no_other(self, service: UdpService, spans: Sequence[range]) -> None:
        """Raise PortConflictError if another service has one of the ports."""
        claims = [(lease.service, lease.spans) for lease in self._leases]
        claims += [
            (other, spans_of(other.options))
            for other in self._installed()
            if other.options is not None
        ]
        for other, theirs in claims:
            port = common_port(spans, theirs)
            if other is not service and port is not None:
                (name,) = names_of(span for span in theirs if port in span)
                raise PortConflictError(
                    f"port {port} is used by another service",
                    [f"service {other.name} already listens on {name}"],
                )

    def _only_in(self, lease: Lease) -> tuple[range, ...]:
        """Return the ports of a lease that no other one has."""
        others = (other.spans for other in self._leases if other is not lease)
        return without(lease.spans, chain.from_iterable(others))

    def _close(self, lease: Lease) -> Generator[None]:
        """Close what only this lease has; yield where everything else may run.

        From the first step on nobody has the lease any more, and who wants its ports waits.
        """
        if lease not in self._leases:
            return
        spans, service = self._only_in(lease), lease.service
        self._leases.remove(lease)
        self._closing.append(lease)
        lease.spans = spans
        ports = list(lease.ports)
        try:
            for start in range(0, len(ports), _AT_ONCE):
                if start:
                    yield
                self._close_ports(service, ports[start : start + _AT_ONCE])
        finally:
            for span in spans:
                self._source_ports.allow(span[0], span[-1])
            self._closing.remove(lease)
            lease.closed.set()

    def _close_ports(self, service: UdpService, ports: Iterable[int]) -> None:
        """Close those of the ports that are bound."""
        bound = [listening for port in ports if (listening := self._bound.pop(port, None))]
        if not service.relay.closed:
            service.unlisten(listening.port for listening in bound)
        for listening in bound:
            for sock in listening.sockets:
                sock.close()


def _unlisten(service: UdpService, ports: Sequence[int]) -> Generator[None]:
    for start in range(0, len(ports), _AT_ONCE):
        service.unlisten(ports[start : start + _AT_ONCE])
        yield


async def _run(steps: Iterable[None]) -> None:
    """Go through all steps, letting everything else run in between; not interrupted."""
    with trio.CancelScope(shield=True):
        for _ in steps:
            await trio.lowlevel.checkpoint()
