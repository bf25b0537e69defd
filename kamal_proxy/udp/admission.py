"""Decides which target a client's session gets, and when it gets another one.

The relay asks when a client has no session, when a target refuses, and when a target has recognised
a client as its own; it tells lists of these after each run. Owns what was learned of ICE; owns no
deployment, and moves no datagram.
"""

from __future__ import annotations

import errno
import math
from functools import partial
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

import trio

from kamal_proxy.proxy_protocol import encode_v2
from kamal_proxy.udp.affinity import affinity_key
from kamal_proxy.udp.ice import AskLimits, UfragMap
from kamal_proxy.udp.stun import BindingRequest, parse_binding_request_untrusted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kamal_proxy._fastpath import Relay
    from kamal_proxy.logs import Log
    from kamal_proxy.udp.deployment import UdpDeployment
    from kamal_proxy.udp.names import SocketAddress

_TELL_INTERVAL = 10.0  # seconds
_MAX_UFRAGS = 65_536
MAX_CANDIDATES = 16  # targets that one Binding request goes to
_KEY_MASK = (1 << 64) - 1

# No socket could be had: ending a session that nobody has answered makes room for one.
_NO_ROOM = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EADDRNOTAVAIL,
    errno.EADDRINUSE,
}


class Admission:
    """What one UDP service decides about sessions.

    Args:
        service: Its name, for the log.
        relay: Its relay.
        deployments: Its deployments that are not drained, by the number of their generation; looked
            at again and again.
        active: Returns the one that serves new sessions, or None.
        has_room: Whether so many more upstream sockets may be opened.
        log: Where is said what was shed.
    """

    def __init__(
        self,
        service: str,
        relay: Relay,
        deployments: Mapping[int, UdpDeployment],
        *,
        active: Callable[[], UdpDeployment | None],
        has_room: Callable[[int], bool],
        log: Log,
    ) -> None:
        self._service = service
        self._relay = relay
        self._deployments = deployments
        self._active = active
        self._has_room = has_room
        self._log = log
        self._told: dict[str, float] = {}
        self._shed = 0
        # ICE: whose a client is, by the key of the user name fragment that its server gave it.
        self._ufrags: UfragMap[tuple[str, SocketAddress]] = UfragMap(_MAX_UFRAGS)
        self._limits = AskLimits()

    # Clients without a session

    def admit_newcomers(self) -> None:
        """Begin the sessions of the clients that the relay has found in its last run."""
        for number, _, client, local in self._relay.newcomers():
            try:
                self._admit(number, client, local)
            except Exception as error:  # a bug must cost one newcomer, not the proxy
                self._tell("UDP session failed", error=repr(error))

    def _admit(self, number: int, client: bytes, local: bytes) -> None:
        """Begin a session, or drop what its client has sent, for a reason that is counted."""
        relay, active = self._relay, self._active()
        if active is None:
            relay.refuse(number, "no_target")
            return
        header = self._header(client, local)
        request = None
        if active.carries_calls:
            request = parse_binding_request_untrusted(relay.opening(number))
        if relay.has_session(number):
            self._ask_others(active, number, request, header)
            return
        if active.carries_calls:
            partner = relay.partner(number) if request is None else None
            if partner is not None:
                session, _, target = partner
                its = b"" if self._bare((target,), header) else header
                self._open(number, 1, lambda: relay.join(number, session, its))
                return
        if request is not None:
            asking, generation, targets = self._find_server(active, request)
            if asking and not self._may_ask(number):
                return
        if relay.full and not relay.evict():
            relay.refuse(number, "session_limit")
            return
        if request is None:
            asking = 0
            generation, targets = self._choose(active, number, client, local)
        if not targets:
            relay.refuse(number, "no_target")
            self._tell("UDP sessions shed", reason="no_target")
            return
        begun = self._open(
            number,
            len(targets),
            lambda: relay.admit(
                number, generation, targets, header, asking=asking, bare=self._bare(targets, header)
            ),
        )
        if begun:
            self._count_joined(generation, 1)
        if begun and self._log.debug_enabled:
            self._log.debug("UDP session begins", service=self._service, client=_text(client))

    def _header(self, client: bytes, local: bytes) -> bytes:
        """Return the PROXY protocol header of a session, nothing if no deployment wants one."""
        for deployment in self._deployments.values():
            if _wants_header(deployment):
                return proxy_header(client, local)
        return b""

    def _bare(self, targets: Iterable[int], header: bytes) -> frozenset[int]:
        """Return those of some targets whose own deployment does not want a header, if any does."""
        return frozenset(
            number
            for deployment in self._deployments.values()
            if header and not _wants_header(deployment)
            for number in targets
            if deployment.whose(number) is not None
        )

    def _open(self, number: int, sockets: int, begin: Callable[[], object]) -> bool:
        """Begin a session that needs sockets, which may not be had."""
        relay = self._relay
        if not self._has_room(sockets) and not relay.evict():
            relay.refuse(number, "no_socket")
            self._tell("UDP sessions shed", reason="no_socket", error="too many open files")
            return False
        for attempt in range(2):
            try:
                begin()
                return True
            except OSError as error:
                if error.errno in _NO_ROOM and not attempt and relay.evict():
                    continue
                reason = "no_socket" if error.errno in _NO_ROOM else "unreachable"
                relay.refuse(number, reason)
                self._tell("UDP sessions shed", reason=reason, error=str(error))
                break
        return False

    def _choose(
        self, active: UdpDeployment, number: int, client: bytes, local: bytes
    ) -> tuple[int, tuple[int, ...]]:
        """Return generation and targets of a new session; no target if there is none."""
        if not active.options.sessions.affinity:
            return active.generation, active.all_numbers()
        strategy = active.options.sessions.strategy
        if strategy == "source-ip":
            followed = self._relay.following(number)
            if followed is not None:
                generation, target = followed
                deployment = self._deployments.get(generation)
                if deployment is not None and deployment.may_follow(target):
                    return generation, (target,)
        chosen = active.choose(affinity_key(strategy, client, local))
        numbers = () if chosen is None or chosen.number is None else (chosen.number,)
        return active.generation, numbers

    # ICE: the signalling has chosen a server already, which is to be found

    def _serving(self, active: UdpDeployment) -> Iterator[UdpDeployment]:
        """Yield the deployments that may have sessions: the active one, then those that drain."""
        yield active
        for deployment in tuple(self._deployments.values())[::-1]:
            if deployment is not active and deployment.served and not deployment.drained:
                yield deployment

    def _find_server(
        self, active: UdpDeployment, request: BindingRequest
    ) -> tuple[int, int, tuple[int, ...]]:
        """Return where a request's server may be: the key to ask by, generation and targets.

        The key is 0 where it is known that the only target is the one.
        """
        key = _key_of(request)
        known = self._ufrags.find(key)
        if known is not None:
            for deployment in self._serving(active):
                if (number := deployment.number_at(*known)) is not None:
                    return 0, deployment.generation, (number,)
        return key, active.generation, self._candidates(active)

    def _ask_others(
        self, active: UdpDeployment, number: int, request: BindingRequest | None, header: bytes
    ) -> None:
        """Ask other targets about the client of a session that its own one seems not to know."""
        relay = self._relay
        if request is None:
            relay.refuse(number, "undecided")
            return
        _, _, targets = self._find_server(active, request)
        key = _key_of(request)
        if self._may_ask(number):
            asks = partial(
                relay.ask, number, targets, key, header, bare=self._bare(targets, header)
            )
            self._open(number, len(targets), asks)

    def _may_ask(self, number: int) -> bool:
        """Return whether several targets may be asked about a newcomer; if not, it is refused.

        Who has been asked about for a second and was not recognised makes room: otherwise a
        stranger could keep all others out for ten seconds with a few requests.
        """
        relay, limits = self._relay, self._limits
        of_network = relay.undecided_from(number)
        if limits.may_ask(relay.undecided, of_network):
            return True
        if relay.cease_asking(number if of_network >= limits.each else None):
            return True
        relay.refuse(number, "ask_limit")
        self._tell("UDP sessions shed", reason="ask_limit")
        return False

    def _candidates(self, active: UdpDeployment) -> tuple[int, ...]:
        """Return the targets that may have given a client its name, each address once."""
        found: dict[SocketAddress, int] = {}
        for deployment in self._serving(active):
            for address, number in deployment.addresses():
                found.setdefault(address, number)
        return tuple(found.values())[:MAX_CANDIDATES]

    def look_at_pins(self) -> None:
        """Let sessions belong to the deployments whose targets have recognised their clients."""
        for session, key, target, generation in self._relay.pins():
            try:
                self._pin(session, key, target, generation)
            except Exception as error:  # a bug must cost one session, not the proxy
                self._tell("UDP session failed", error=repr(error))

    def _pin(self, session: int, key: int, target: int, generation: int) -> None:
        for deployment in self._deployments.values():
            if deployment.drained or (where := deployment.whose(target)) is None:
                continue
            self._ufrags.learn(key, where)
            if self._relay.assign(session, deployment.generation):
                self._count_joined(generation, -1)
                self._count_joined(deployment.generation, 1)
            return
        self._relay.end(session)  # its target was let go meanwhile

    def _count_joined(self, generation: int, number: int) -> None:
        """Count sessions that come to a deployment, or leave it, while it drains."""
        deployment = self._deployments.get(generation)
        if deployment is not None and deployment.retired:
            deployment.joined += number

    # Targets that refuse

    def look_at_refusals(self) -> None:
        """Move sessions away from targets whose port is closed, where that may help."""
        try:
            self._look_at_refusals()
        except Exception as error:  # a bug must cost a move, not the proxy
            self._tell("UDP session not moved", error=repr(error))

    def _look_at_refusals(self) -> None:
        for refusal in self._relay.refusals():
            session, generation, number, movable, answered, moves, count, span, *ends = refusal
            deployment, active = self._deployments.get(generation), self._active()
            if deployment is None or active is None:
                continue
            deployment.refused(number, answered=answered)
            # One that was never answered asks each address once before it becomes patient.
            patient = answered or moves >= deployment.address_count
            if not movable or not deployment.gives_up(
                number, patient=patient, refusals=count, span=span
            ):
                continue
            key = affinity_key(active.options.sessions.strategy, *ends)
            other = active if deployment.retired else deployment
            chosen = other.choose(key, without=number)
            if chosen is None or chosen.number is None:
                continue
            if _wants_header(other) != _wants_header(deployment):
                self._relay.end(session)  # its client's next datagram begins one as it must be
                continue
            try:
                self._relay.move(session, other.generation, chosen.number)
            except OSError as error:
                self._tell("UDP session not moved", error=str(error))

    # Telling

    def tell_shed(self) -> None:
        """Say that clients were refused because there are too many sessions, if any were."""
        if self._relay.shed != self._shed:
            self._shed = self._relay.shed
            self._tell("UDP sessions shed", reason="session_limit", limit=self._relay.limit)

    def _tell(self, message: str, **fields: object) -> None:
        """Log what strangers can cause as often as they like, but not as often as they do."""
        now = trio.current_time()
        key = f"{message} {fields.get('reason', '')}"
        if now - self._told.get(key, -math.inf) >= _TELL_INTERVAL:
            self._told[key] = now
            self._log.info(message, service=self._service, **fields)


def _wants_header(deployment: UdpDeployment) -> bool:
    """Return whether what a deployment's targets get begins with a PROXY protocol header."""
    return deployment.options.sessions.proxy_protocol


def _key_of(request: BindingRequest) -> int:
    """Return what the relay tells a request's name by: 64 bits that are not all 0."""
    return hash(request.ufrag) & _KEY_MASK or 1


def proxy_header(client: bytes, local: bytes) -> bytes:
    """Return the PROXY protocol header of a session from its two ends."""
    return encode_v2(_address(client), _address(local), datagram=True)


def _address(packed: bytes) -> tuple[str, int]:
    """Return the text and port of an address (16 bytes) and port (2 bytes)."""
    address = IPv6Address(packed[:16])
    return str(address.ipv4_mapped or address), int.from_bytes(packed[16:])


def _text(packed: bytes) -> str:
    host, port = _address(packed)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
