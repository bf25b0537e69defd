"""One UDP service while it runs: its relay, its listeners, and the deployments that serve it.

Owns the task that moves datagrams. Which target a session gets is ``admission``'s business; what is
deployed, saved and told is ``services``'.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy._fastpath import (
    RUN_EMPTIED,
    RUN_MORE,
    RUN_NEWCOMERS,
    RUN_PINNED,
    RUN_REFUSED,
    Relay,
)
from kamal_proxy.control.messages import ServiceDescription
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import ShuttingDownError
from kamal_proxy.health import TargetState
from kamal_proxy.state_format import SavedPause
from kamal_proxy.udp.admission import Admission, proxy_header
from kamal_proxy.udp.affinity import seed_of
from kamal_proxy.udp.deployment import UNANSWERED, UdpDeployment
from kamal_proxy.udp.ranges import names_of, spans_of
from kamal_proxy.udp.saved_sessions import RECORD, SECOND, ServiceSessions, parse
from kamal_proxy.udp.state_format import SavedUdpService

if TYPE_CHECKING:
    from kamal_proxy._fastpath import SourcePorts
    from kamal_proxy.logs import Log
    from kamal_proxy.udp.options import UdpOptions

# How long datagrams are moved before other tasks have their turn. Long turns save the way through
# the event loop with cold caches, some 5 % of all work under load. They end when a stream of the
# proxy becomes ready; the relay of another UDP service can't end them.
_LONG_TURN = 8  # milliseconds
_SHORT_TURN = 1
# The kernel chooses a source port once per host, not once per target: some 28,000 in all. Above
# half of that the relay chooses them itself.
_MANY_SESSIONS = 14_000
_RESTORED_AT_ONCE = 100
_MODES = ("running", "paused", "stopped")  # as the relay counts them


@attrs.define(eq=False)
class Listening:
    """The listeners of one port.

    Attributes:
        port: The port.
        sockets: The bound sockets, one for each address.
        numbers: What the relay knows them by; empty until datagrams are read from them.
    """

    port: int
    sockets: Sequence[socket.socket]
    numbers: list[int] = attrs.field(factory=list)


class UdpService:
    """One UDP service.

    Args:
        name: Its name.
        seed: 16 random bytes; they keep strangers from filling one bucket of the table of sessions.
        on_drained: Called with itself and each deployment whose drain is over.
        source_ports: Upstream source ports for services with many sessions.
        interrupt: A descriptor that is readable when something else in the process is to be done.
        is_alone: Whether it is the only UDP service.
        has_room: Whether so many more upstream sockets may be opened.
        log: Where is said what was shed.
    """

    def __init__(
        self,
        name: str,
        seed: bytes,
        *,
        on_drained: Callable[[UdpService, UdpDeployment], None],
        source_ports: SourcePorts,
        interrupt: int,
        is_alone: Callable[[], bool],
        has_room: Callable[[int], bool],
        log: Log,
    ) -> None:
        self.name = name
        self.relay = Relay(seed)
        self.relay.interrupt_by(interrupt)
        self._is_alone = is_alone
        self._has_room = has_room
        #: 64 bits that all choices of targets share; the same again after a restart.
        self.secret = seed_of(name)
        self._on_drained = on_drained
        self._source_ports = source_ports
        self._ports: dict[int, Listening] = {}
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._started = trio.Event()
        self._moving = trio.Event()
        self._last_sessions: ServiceSessions | None = None
        #: Sessions of an earlier process that can't be restored yet.
        self.waiting_sessions: ServiceSessions | None = None
        #: Its deployments that were not drained yet, by the relay's number of their generation.
        self.deployments: dict[int, UdpDeployment] = {}
        #: The deployment that serves new sessions; None until the first deploy has switched.
        self.active: UdpDeployment | None = None
        self.pause = SavedPause()
        self.options: UdpOptions | None = None
        #: How all drains so far have ended.
        self.drained = DrainResult()
        #: Whether it has ever served anybody.
        self.served = False
        self.extra: Mapping[str, object] = {}
        self._admission = Admission(
            name,
            self.relay,
            self.deployments,
            active=lambda: self.active,
            has_room=has_room,
            log=log,
        )

    def __repr__(self) -> str:
        return f"<UdpService {self.name} ports={[*self._ports]} sessions={self.relay.live}>"

    async def run(self) -> None:
        """Hold the deployments, and move datagrams, until :meth:`close`. It can't be run again."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._started.set()
                    await self._moving.wait()
                    await self._move_datagrams()
        finally:
            self._nursery = None
            self._started.set()
            if self.active is not None:
                self._last_sessions = self.sessions()
            self.relay.close()

    async def wait_started(self) -> None:
        """Wait until it runs, or has ended."""
        await self._started.wait()

    def start_moving(self) -> None:
        """Move datagrams from now on; until then they wait in the listeners' buffers."""
        self.waiting_sessions = None
        self._moving.set()

    def close(self) -> None:
        """End all sessions and everything that runs for it."""
        self._scope.cancel(reason="the service was removed")

    # Listening

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports it listens on; more than one while sessions of a former port drain."""
        return tuple(self._ports)

    def listen(self, listening: Listening) -> None:
        """Take datagrams from the listeners of a port."""
        if listening.port not in self._ports:
            self._ports[listening.port] = listening
            listening.numbers[:] = [self.relay.listen(sock.fileno()) for sock in listening.sockets]

    def pair(self, rtp: Listening, rtcp: Listening) -> None:
        """Let the sessions of two ports, which are listened on, be one for each client."""
        for numbers in zip(rtp.numbers, rtcp.numbers, strict=True):
            self.relay.pair(*numbers)

    def unlisten(self, ports: Iterable[int]) -> None:
        """Take no more datagrams from some ports; the sessions on them end. The caller closes them.

        Ports that are not listened on are passed over.
        """
        leaving = [self._ports.pop(port) for port in tuple(ports) if port in self._ports]
        self.relay.unlisten_all([number for each in leaving for number in each.numbers])
        for each in leaving:
            each.numbers.clear()

    # Deployments

    def start(self, deployment: UdpDeployment) -> None:
        """Run a deployment, which serves nobody yet.

        Raises:
            ShuttingDownError: the service has ended.
        """
        if self._nursery is None:
            raise ShuttingDownError("the proxy is shutting down")
        self.deployments[deployment.generation] = deployment
        self._nursery.start_soon(self._run_deployment, deployment)

    async def _run_deployment(self, deployment: UdpDeployment) -> None:
        try:
            await deployment.run()
        finally:
            del self.deployments[deployment.generation]
            self.drained += deployment.result
        self._on_drained(self, deployment)

    def install(self, deployment: UdpDeployment, options: UdpOptions) -> UdpDeployment | None:
        """Let a deployment serve new sessions; return the one that did."""
        replaced, self.active, self.options = self.active, deployment, options
        self.relay.ask_again()
        self.served = deployment.served = True
        if replaced is not None:
            replaced.hand_over(deployment)
        self.relay.limit = options.sessions.limit
        # Those of ranges of ports must not get a source port in such a range.
        if options.sessions.limit > _MANY_SESSIONS or options.protocol == "webrtc":
            self.relay.use_ports(self._source_ports)
        return replaced

    def uninstall(self) -> None:
        """Serve nobody any more: all sessions end. A deployment that waits for health may stay."""
        self.relay.mode = _MODES.index("stopped")
        self.active = self.options = None
        for deployment in self.deployments.values():
            if deployment.served:
                deployment.end_now()

    def end_sessions(self) -> None:
        """End all sessions at once; the service is closed next."""
        for generation in self.deployments:
            self.relay.end_some(generation, self.relay.live, removed=True)

    def hold(self, pause: SavedPause) -> None:
        """Pause, stop or resume it."""
        self.pause = pause
        self.relay.mode = _MODES.index(pause.state)

    # Moving datagrams

    async def _move_datagrams(self) -> None:
        relay, admission = self.relay, self._admission
        while True:
            await trio.lowlevel.wait_readable(relay.fileno())
            while True:
                result = relay.run(_LONG_TURN if self._is_alone() else _SHORT_TURN)
                if result & RUN_PINNED:
                    admission.look_at_pins()
                if result & RUN_NEWCOMERS:
                    admission.admit_newcomers()
                if result & RUN_REFUSED:
                    admission.look_at_refusals()
                admission.tell_shed()
                if result & RUN_EMPTIED or (result and len(self.deployments) > 1):
                    for deployment in self.deployments.values():
                        deployment.notice_empty()
                if not result & RUN_MORE:
                    break
                await trio.lowlevel.checkpoint()

    # What is known of it

    def saved(
        self, options: UdpOptions, targets: Sequence[str], pause: SavedPause
    ) -> SavedUdpService:
        """Return what is to be saved of it."""
        return SavedUdpService(
            name=self.name,
            options=options,
            targets=tuple(targets),
            pause=pause,
            extra=self.extra,
        )

    def describe(self) -> ServiceDescription:
        """Describe it; it was installed."""
        assert self.active is not None
        assert self.options is not None
        paused, stopped = self.pause.state == "paused", self.pause.state == "stopped"
        return ServiceDescription(
            name=self.name,
            udp_ports=names_of(spans_of(self.options)),
            pairs_in_use=self.relay.pairs,
            protocol=self.options.protocol,
            max_sessions=self.options.sessions.limit,
            targets=self.active.target_names,
            healthy=tuple(
                target.text
                for target in self.active.targets
                if target.health.state is TargetState.HEALTHY
            ),
            state=self.pause.state,
            stop_message=self.pause.stop_message if stopped else "",
            max_pause=self.pause.fail_after if paused else 0.0,
            in_flight=self.active.in_flight,
            draining=self.relay.live - self.active.in_flight,
        )

    def sessions(self) -> ServiceSessions:
        """Return the sessions that a restarted proxy goes on with: those of the active targets.

        Once the service has ended, those that it had then; as long as it has no port after a
        restart, those that wait for it.
        """
        if self._last_sessions is not None:
            return self._last_sessions
        if self.waiting_sessions is not None:
            return self.waiting_sessions
        assert self.active is not None
        names = self.active.target_names
        numbers = {
            target.number: place
            for place, target in enumerate(self.active.targets)
            if target.number is not None
        }
        records = self.relay.export(self.active.generation, numbers)
        return ServiceSessions(name=self.name, targets=names, records=records)

    async def restore(self, sessions: ServiceSessions, away: float) -> tuple[int, int]:
        """Go on with the sessions of an earlier process.

        Args:
            sessions: What :meth:`sessions` returned there.
            away: Seconds since then.

        Returns:
            How many go on, and how many could not: they have no target any more, or their source
            port is taken. Those that are over by now are neither. A pair is one, which goes on if a
            half of it does.
        """
        active = self.active
        assert active is not None
        listeners = {
            sock.getsockname()[1]: dict(
                zip(map(_bound_to, each.sockets), each.numbers, strict=True)
            )
            for each in self._ports.values()
            for sock in each.sockets[:1]
        }
        if not active.options.sessions.affinity:  # it had some when they were saved
            flags = (record[-2] for record in RECORD.iter_unpack(sessions.records))
            return 0, sum(not flag & SECOND for flag in flags)
        timeout = active.options.sessions.timeout
        unanswered = min(timeout, UNANSWERED)
        begun: list[int] = []  # for each session that there was, how many there are
        for place, session in enumerate(parse(sessions)):
            if place % _RESTORED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            idle = session.idle + away
            if idle >= (timeout if session.answered else unanswered):
                continue
            if not session.second or not begun:
                begun.append(0)
            is_half = session.second and begun[-1] > 0  # of one that goes on
            bound = listeners.get(session.listener_port, {})
            listener = bound.get(session.local, bound.get(_ANY))
            address = (*session.target_address, 0, session.target_scope)
            number = active.number_of(session.target, address)
            is_full = self.relay.full and not is_half
            if listener is None or number is None or is_full or not self._has_room(1):
                continue
            client = session.client + session.client_port.to_bytes(2)
            local = session.local + session.listener_port.to_bytes(2)
            header = proxy_header(client, local) if active.options.sessions.proxy_protocol else b""
            # Its source port may be taken, or its client was faster and has a new one.
            with contextlib.suppress(OSError, ValueError):
                begun[-1] += self.relay.restore(
                    listener,
                    client,
                    session.client_scope,
                    session.local,
                    active.generation,
                    number,
                    session.source_port,
                    session.answered,
                    idle,
                    header,
                    second=is_half,
                )
        return sum(begun), begun.count(0)


assert RECORD.size == Relay.RECORD_SIZE
_ANY = bytes(16)


def _bound_to(sock: socket.socket) -> bytes:
    """Return the address of a listener as sessions have it; all addresses are zeros."""
    text = sock.getsockname()[0].partition("%")[0]
    if ":" not in text:
        return _ANY if text == "0.0.0.0" else _mapped(text)  # noqa: S104
    return IPv6Address(text).packed


def _mapped(text: str) -> bytes:
    return IPv6Address(f"::ffff:{text}").packed
