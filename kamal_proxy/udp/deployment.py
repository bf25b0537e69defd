"""One generation of a UDP service's targets: probes, look-ups, and which one a session goes to.

The sessions themselves live in the service's relay, where they carry this generation's number,
because the listeners and the table of sessions outlive a deploy. How they end is ``draining``'s
business. Moves no datagram.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from kamal_proxy.health import Health, ProbeResult, TargetState
from kamal_proxy.probing import Watch
from kamal_proxy.udp.affinity import affinity_key, choose, seed_of
from kamal_proxy.udp.draining import SessionDrain
from kamal_proxy.udp.drains import DrainPlan
from kamal_proxy.udp.names import LookupFailedError, TargetName
from kamal_proxy.udp.options import split_udp_target
from kamal_proxy.udp.target import AVOIDED, UdpTarget

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from kamal_proxy._fastpath import Relay
    from kamal_proxy.deployment import DrainResult
    from kamal_proxy.logs import Log
    from kamal_proxy.udp.names import SocketAddress
    from kamal_proxy.udp.options import UdpHealthCheckOptions, UdpOptions

_LOOK_INTERVAL = 1.0  # seconds
_SILENCE = 5.0  # seconds that a target does not answer somebody who goes on talking
_MOVED_AT_ONCE = 200
_MANY_REFUSALS = 3
_REFUSAL_SPAN = 1.0  # seconds
UNANSWERED = 30.0  # seconds at most for which a session lives that no target has answered
_ENDING = DrainPlan(cut_after=0.0)


class UdpDeployment:
    """The targets of one deploy of a UDP service.

    Args:
        targets: ``host:port`` of each target.
        options: How sessions live, and how targets are probed.
        relay: The service's relay.
        probe: Probes one target; it has its own time limit and never raises.
        lookups: Bounds the threads that wait for the name service.
        is_own: Whether an address is where the service itself listens.
        secret: 64 bits that all choices of the service share.
        log: Where changes of health and address are logged.
        trusted: Whether the targets count as healthy at once (restored after a restart).
        forced: Whether the targets may serve before they were found healthy.
    """

    def __init__(
        self,
        targets: Iterable[str],
        options: UdpOptions,
        relay: Relay,
        *,
        probe: Callable[[UdpTarget, UdpHealthCheckOptions], Awaitable[ProbeResult]],
        lookups: trio.CapacityLimiter,
        is_own: Callable[[SocketAddress], bool],
        secret: int,
        log: Log,
        trusted: bool = False,
        forced: bool = False,
    ) -> None:
        names = tuple(targets)
        self._relay = relay
        self._probe_target = probe
        self._is_own = is_own
        self._secret = secret
        self._log = log
        self._plan = _ENDING
        self._retired = trio.Event()
        self._drained = trio.Event()
        #: Sessions that have come while it drained, without those that have left it.
        self.joined = 0
        #: Whether its sessions may be calls, which go to the ports of a target that their clients
        #: send to here.
        self.carries_calls = options.protocol == "webrtc"
        #: Whether it has ever served new sessions.
        self.served = False
        sessions = options.sessions
        self.options = options
        #: What the relay knows it by, while it runs.
        self.generation = relay.add_generation(
            sessions.timeout,
            min(sessions.timeout, UNANSWERED),
            affinity=sessions.affinity,
            media=options.protocol == "webrtc",
        )
        self._session_drain = SessionDrain(relay, self.generation)
        self.targets = tuple(
            UdpTarget(
                text,
                *split_udp_target(text),
                health=Health(
                    options.health_check.interval,
                    TargetState.HEALTHY if trusted else TargetState.ADDING,
                ),
                address=TargetName(*split_udp_target(text), lookups),
                alone=len(names) == 1,
                forced=forced,
                seed=seed_of(text),
            )
            for text in names
        )
        for target in self.targets:
            self._use_address(target)
        #: The probes of its targets.
        self.watch: Watch[UdpTarget, UdpHealthCheckOptions] = Watch(
            self.targets, options.health_check, self._probe, log
        )

    def __repr__(self) -> str:
        names = ",".join(target.text for target in self.targets)
        state = "drained" if self.drained else "draining" if self.retired else "active"
        return f"<UdpDeployment {names} {state}>"

    @property
    def target_names(self) -> tuple[str, ...]:
        """``host:port`` of each target."""
        return tuple(target.text for target in self.targets)

    @property
    def in_flight(self) -> int:
        """How many sessions it has."""
        gone = self.drained or self._relay.closed
        return 0 if gone else self._relay.sessions(self.generation)

    @property
    def retired(self) -> bool:
        """Whether it was taken out of use; it may still drain."""
        return self._retired.is_set()

    @property
    def drained(self) -> bool:
        """Whether its drain is over."""
        return self._drained.is_set()

    async def run(self) -> None:
        """Live until drained: probe and look up, then drain once retired.

        Cancelled, it leaves its sessions as they are: that happens only when the relay is about to
        be closed, and they may have to be saved.
        """
        try:
            async with trio.open_nursery() as nursery:
                for target in self.targets:
                    refresh = partial(self._use_address, target)
                    nursery.start_soon(target.address.keep_fresh, self._log, refresh)
                nursery.start_soon(self.watch.run)
                nursery.start_soon(self._look_after_stuck)
                await self._retired.wait()
                nursery.cancel_scope.cancel(reason="retired")
            await self._drain()
        finally:
            self._drained.set()

    def retire(self, plan: DrainPlan = _ENDING) -> None:
        """Begin to drain; the caller has put another deployment in its place.

        Args:
            plan: When which sessions end; without one, all end at once.
        """
        self._plan = plan
        self.watch.stop()
        self._retired.set()

    @property
    def result(self) -> DrainResult:
        """How its drain ended, once that is over."""
        return self._session_drain.result

    def end_now(self) -> None:
        """End all sessions, because the service was removed."""
        self.retire()
        self._session_drain.end_now()

    async def wait_drained(self) -> DrainResult:
        """Wait until the drain of a retired deployment is over."""
        await self._drained.wait()
        return self.result

    def notice_empty(self) -> None:
        """Look whether a drain has no session left to wait for."""
        if self.retired and not self.drained:
            self._session_drain.notice_empty()

    def hand_over(self, successor: UdpDeployment) -> None:
        """Give the sessions of targets that a successor has too to it; they are not drained.

        Not if it treats sessions in another way, or listens on another port.
        """
        if _ways(self.options) != _ways(successor.options):
            return
        common: dict[int, int] = {}
        for target in self.targets:
            for other in successor.targets:
                if (
                    other.text == target.text
                    and other.current == target.current
                    and target.number is not None
                    and other.number is not None
                ):
                    common[target.number] = other.number
        self._relay.adopt(self.generation, successor.generation, common)

    # Choosing

    def choose(self, key: bytes, without: int | None = None) -> UdpTarget | None:
        """Return the target for a session, or None if there is none.

        Args:
            key: What chooses it.
            without: The relay's number of an address that must not be chosen.
        """
        return choose(self.targets, key, self._secret, lambda target: target.number != without)

    def all_numbers(self) -> tuple[int, ...]:
        """Return what the relay knows all targets by whose address is known."""
        return tuple(target.number for target in self.targets if target.number is not None)

    @property
    def address_count(self) -> int:
        """How many addresses all targets have together."""
        return sum(max(1, len(target.address.addresses)) for target in self.targets)

    def refused(self, number: int, *, answered: bool) -> None:
        """Take note that the port of an address is closed.

        Args:
            number: What the relay knows the address by.
            answered: Whether the session that was refused has ever been answered.
        """
        now = trio.current_time()
        for target in self.targets:
            if target.number == number:
                target.address.poke()
                may_switch = target.switched_at is None or now - target.switched_at >= AVOIDED
                if not answered and len(target.address.addresses) > 1 and may_switch:
                    # A server may listen on one of its addresses only, as on 127.0.0.1 and not ::1.
                    target.switched_at = now
                    target.place += 1
                    self._use_address(target)
                else:
                    target.refused_at = now

    def may_follow(self, number: int) -> bool:
        """Return whether a new session may go where another one of its client is."""
        return any(
            target.number == number and target.in_rotation and not target.refused_lately
            for target in self.targets
        )

    def gives_up(self, number: int, *, patient: bool, refusals: int, span: float) -> bool:
        """Return whether a session leaves an address whose port is closed.

        Args:
            number: What the relay knows the address by.
            patient: Whether the session waits for a target that may be restarting.
            refusals: How often the port was closed since the target was last heard.
            span: Seconds between the first and the last of these.
        """
        if not patient:
            return True
        return (refusals >= _MANY_REFUSALS and span >= _REFUSAL_SPAN) or any(
            target.health.state is TargetState.UNHEALTHY
            for target in self.targets
            if number in target.numbers.values()
        )

    # Addresses

    def _use_address(self, target: UdpTarget) -> None:
        """Let new sessions go to the target's present address; live ones stay where they are."""
        found = target.address.addresses
        address = found[target.place % len(found)] if found else None
        if address == target.current:
            return
        if address is not None and self._is_own(address):
            # Each datagram would come back as that of a new client, without end.
            address = None
        had = target.number is not None
        target.current, target.number = address, None
        if address is not None:
            target.number = self._number(target, address)
        if had:
            # Sessions without affinity know all addresses from their begin.
            self._relay.let_go(self.generation)

    def _number(self, target: UdpTarget, address: SocketAddress) -> int:
        """Return what the relay knows an address of a target by; it keeps that while it is used."""
        number = target.numbers.get(address)
        if number is None:
            host, port, *rest = address
            scope = rest[1] if rest else 0
            if self.carries_calls:
                port = 0  # that which the client sends to; the target's own is for its health
            number = self._relay.add_target(host.partition("%")[0], port, scope)
            target.numbers[address] = number
        return number

    def number_of(self, name: str, address: SocketAddress) -> int | None:
        """Return the relay's number for a target if this is its present address.

        A target whose name stands for nothing yet has this address until it does.
        """
        for target in self.targets:
            if target.text == name:
                if self.carries_calls:  # the port is that of the session
                    address = (address[0], target.port, *address[2:])
                if target.current is None:
                    target.current, target.number = address, self._number(target, address)
                return target.number if target.current[:2] == address[:2] else None
        return None

    # Addresses as those who look for a client's server know them

    def addresses(self) -> Iterator[tuple[SocketAddress, int]]:
        """Yield each target's present address, if it is known, and the relay's number for it."""
        for target in self.targets:
            if target.current is not None and target.number is not None:
                yield target.current, target.number

    def whose(self, number: int) -> tuple[str, SocketAddress] | None:
        """Return target and address of a number of the relay's, None if it is of no target here."""
        for target in self.targets:
            for address, known in target.numbers.items():
                if known == number:
                    return target.text, address
        return None

    def number_at(self, name: str, address: SocketAddress) -> int | None:
        """Return the relay's number for an address of a target, None if it has no such address."""
        for target in self.targets:
            if target.text == name and address in target.numbers:
                return target.numbers[address]
        return None

    async def _look_after_stuck(self) -> None:
        """Move sessions away from where nobody answers any more, without being told so by ICMP.

        Only from targets that are unhealthy and from addresses that a name no longer stands for:
        elsewhere a client may talk to a silent server for as long as it likes.
        """
        while True:
            await trio.sleep(_LOOK_INTERVAL)
            for target in self.targets:
                is_unhealthy = target.health.state is TargetState.UNHEALTHY
                for address, number in tuple(target.numbers.items()):
                    if number != target.number and not self._relay.flows_to(number):
                        del target.numbers[address]
                        self._relay.drop_target(number)
                    elif number != target.number or is_unhealthy:
                        self._move_stuck(number)

    def _move_stuck(self, number: int) -> None:
        stuck = self._relay.stuck(self.generation, number, _SILENCE, _MOVED_AT_ONCE)
        for session, client, local in stuck:
            key = affinity_key(self.options.sessions.strategy, client, local)
            chosen = self.choose(key, without=number)
            if chosen is None or chosen.number is None:
                return
            try:
                self._relay.move(session, self.generation, chosen.number)
            except OSError as error:
                self._log.debug("UDP session not moved", target=chosen.text, error=str(error))
                return

    async def _probe(self, target: UdpTarget, options: UdpHealthCheckOptions) -> ProbeResult:
        """Probe a target; one whose name stands for nothing can't be healthy."""
        if target.number is None:
            result = None
            with trio.move_on_after(options.timeout):
                result = await self._resolve(target)
            if target.address.addresses and target.number is None:
                return ProbeResult(False, "this is the service's own port", f"udp://{target.text}")
            if target.number is None:
                return result or ProbeResult(False, f"can't resolve {target.host} in time", "")
        result = await self._probe_target(target, options)
        if not self.retired and target.number is not None:
            self._relay.set_down(target.number, not result.ok)
        return result

    async def _resolve(self, target: UdpTarget) -> ProbeResult | None:
        try:
            await target.address.resolve()
        except LookupFailedError as error:
            return ProbeResult(False, str(error), target.text)
        self._use_address(target)
        return None

    # Draining

    async def _drain(self) -> None:
        self.joined = 0
        await self._session_drain.run(self._plan, lambda: self.joined)
        self._drained.set()
        self._relay.drop_generation(self.generation)
        for target in self.targets:
            for number in target.numbers.values():
                self._relay.drop_target(number)


def _ways(options: UdpOptions) -> tuple[object, ...]:
    """Return what must be the same for a session to belong to another deployment's target."""
    sessions = options.sessions
    return (
        options.port,
        options.protocol,
        options.port_ranges,
        options.rtcp_policy,
        sessions.affinity,
        sessions.proxy_protocol,
    )
