"""One generation of targets: its probes, its requests in flight, its drains.

A deployment is one task. It probes its targets until it is retired, then waits for its requests,
cuts what is left at the deadline, and closes its idle upstream connections. A paused service drains
its deployment too, and goes on with it later. It knows neither HTTP nor UDP: how to probe a target
and what connections to it are is given to it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from operator import add
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from kamal_proxy.balancer import RoundRobin
from kamal_proxy.health import Health, ProbeResult, TargetState
from kamal_proxy.probing import Watch
from kamal_proxy.target_options import HealthCheckOptions, TargetScheme, split_scheme, split_target

if TYPE_CHECKING:
    from kamal_proxy.logs import Log

# A request that was told to end only has to unwind; one that can't within this is left behind.
_UNWIND = 5.0  # seconds


@attrs.define(eq=False)
class Drain:
    """One drain, as those see it whom it waits for.

    Attributes:
        deadline: When what is left is cut, on Trio's clock; may be infinite.
        called_off: Whether nothing has to end any more.
    """

    deadline: float
    called_off: bool = False
    _left: set[InFlight] = attrs.field(factory=set)
    _cut: set[InFlight] = attrs.field(factory=set)
    _over: trio.Event = attrs.field(factory=trio.Event)


class InFlight(Protocol):
    """A request, or a session, that a deployment is serving."""

    def begin_drain(self, drain: Drain) -> None:
        """Take note of a drain; whatever would not end by itself should end before its deadline."""

    def abort_drained(self) -> None:
        """End now: the drain deadline has passed."""


class Connections(Protocol):
    """The connections to one target."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Let them live: what they need tasks for happens in here, until :meth:`close`."""

    def trim(self) -> None:
        """Close those that have waited for too long; called every now and then."""

    def close(self) -> None:
        """Close those that wait to be used again; connections returned later are closed too."""


@attrs.define(eq=False)
class Target:
    """One instance of a service.

    Attributes:
        given: The target as it was given: ``host:port``, maybe after a scheme.
        name: ``host:port`` of that.
        host: Host to connect to.
        port: Port to connect to.
        scheme: What is spoken with it.
        health: Its health.
        connections: Its pooled connections.
        alone: Whether it is the only target that takes writes; such a one is never taken out of
            rotation.
        forced: Whether it may serve before its first probe succeeded.
        read_only: Whether it only takes requests that read.
        in_flight: Requests it is serving.
    """

    given: str
    name: str
    host: str
    port: int
    scheme: TargetScheme
    health: Health
    connections: Connections
    alone: bool
    forced: bool
    read_only: bool = False
    in_flight: int = 0

    @property
    def in_rotation(self) -> bool:
        """Whether it may be given requests."""
        state = self.health.state
        return (
            self.alone
            or state is TargetState.HEALTHY
            or (self.forced and state is TargetState.ADDING)
        )


Probe = Callable[[Target, HealthCheckOptions], Awaitable[ProbeResult]]
Connect = Callable[[str, int, TargetScheme], Connections]


@attrs.frozen
class DrainResult:
    """How a drain ended.

    Attributes:
        completed: Requests, or sessions, that ended by themselves.
        cancelled: Those that were cut.
        goodbyes: Sessions whose peers were told, by RTCP, that they end.
        cut_unsaid: SRTP sessions that were cut without that.
    """

    completed: int = 0
    cancelled: int = 0
    goodbyes: int = 0
    cut_unsaid: int = 0

    def __add__(self, other: DrainResult) -> DrainResult:
        """Return how both ended together."""
        return DrainResult(*map(add, attrs.astuple(self), attrs.astuple(other)))


class Deployment:
    """The targets of one deploy.

    Args:
        targets: ``host:port`` of each target, maybe after a scheme.
        health_check: How they are probed.
        probe: Probes one target; it has its own time limit and never raises.
        connect: Makes the connections of a target from its host and port, and what is spoken.
        log: Where health changes are logged.
        readers: The same as ``targets`` of each that only takes requests that read.
        trusted: Whether the targets count as healthy at once (restored after a restart).
        forced: Whether the targets may serve before they were found healthy.
    """

    def __init__(
        self,
        targets: Iterable[str],
        *,
        health_check: HealthCheckOptions,
        probe: Probe,
        connect: Connect,
        log: Log,
        readers: Iterable[str] = (),
        trusted: bool = False,
        forced: bool = False,
    ) -> None:
        names = tuple(targets)

        def target(given: str, *, read_only: bool) -> Target:
            scheme, name = split_scheme(given)
            host, port = split_target(given)
            return Target(
                given,
                name,
                host,
                port,
                scheme,
                health=Health(
                    health_check.interval,
                    TargetState.HEALTHY if trusted else TargetState.ADDING,
                ),
                connections=connect(host, port, scheme),
                alone=len(names) == 1 and not read_only,
                forced=forced,
                read_only=read_only,
            )

        self._writers = tuple(target(name, read_only=False) for name in names)
        self._readers = tuple(target(name, read_only=True) for name in readers)
        self.targets: Sequence[Target] = self._writers + self._readers
        self._writer_turn = RoundRobin()
        self._reader_turn = RoundRobin()
        self._in_flight: set[InFlight] = set()
        self._drains: list[Drain] = []
        self._drained = trio.Event()
        self._drain_timeout = math.inf
        self._result = DrainResult()
        self.retired = False
        #: The probes of its targets.
        self.watch = Watch(
            self.targets,
            health_check,
            probe,
            log,
            on_result=lambda target: target.connections.trim(),
        )

    def __repr__(self) -> str:
        names = ",".join(target.name for target in self.targets)
        state = "drained" if self.drained else "draining" if self.retired else "active"
        return f"<Deployment {names} {state} in_flight={len(self._in_flight)}>"

    @property
    def in_flight(self) -> int:
        """How many requests it is serving."""
        return len(self._in_flight)

    @property
    def writer_names(self) -> tuple[str, ...]:
        """Each target that takes all requests, as it was given."""
        return tuple(target.given for target in self._writers)

    @property
    def reader_names(self) -> tuple[str, ...]:
        """Each target that only takes requests that read, as it was given."""
        return tuple(target.given for target in self._readers)

    @property
    def has_readers(self) -> bool:
        """Whether some of its targets only take requests that read."""
        return bool(self._readers)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until drained: probe, then drain once retired."""
        async with trio.open_nursery() as connections:
            for target in self.targets:
                await connections.start(target.connections.run)
            try:
                await self.watch.run(task_status=task_status)
                self._result = await self.drain(self._drain_timeout)
            finally:
                for target in self.targets:
                    target.connections.close()
                self._drained.set()

    def choose(self, avoid: set[Target], *, reading: bool = False) -> Target | None:
        """Return the target for a request, or None when none is in rotation.

        Args:
            avoid: Targets that have just failed this request.
            reading: Whether a read-only target may have it, and should if there is one.
        """
        if reading and self._readers:
            target = self._reader_turn.choose(self._readers, avoid)
            if target is not None:
                return target
        return self._writer_turn.choose(self._writers, avoid)

    def begin(self, request: InFlight) -> None:
        """Count a request as in flight until :meth:`end`."""
        assert not self.retired, "a retired deployment is in no routing table"
        self._in_flight.add(request)

    def replace(self, request: InFlight, by: InFlight) -> None:
        """Let somebody else stand for a request that is in flight, also in drains."""
        self._in_flight.add(by)
        for drain in self._drains:
            if request in drain._left:
                drain._left.add(by)
                by.begin_drain(drain)
            if request in drain._cut:
                drain._cut.remove(request)
                drain._cut.add(by)
        self.end(request)

    def end(self, request: InFlight) -> None:
        """Forget a request that has ended."""
        self._in_flight.discard(request)
        for drain in self._drains:
            drain._left.discard(request)
            if not drain._left:
                drain._over.set()

    def retire(self, drain_timeout: float) -> None:
        """Stop probing and begin to drain; the caller has taken it out of routing.

        Args:
            drain_timeout: Seconds until requests still in flight are cut.
        """
        self.retired = True
        self._drain_timeout = drain_timeout
        self.watch.stop()

    @property
    def drained(self) -> bool:
        """Whether its drain is over."""
        return self._drained.is_set()

    async def wait_drained(self) -> DrainResult:
        """Wait until the drain of a retired deployment is over."""
        await self._drained.wait()
        return self._result

    async def drain(self, within: float) -> DrainResult:
        """Wait for the requests that are in flight now, and cut what is left of them in the end.

        Requests that begin meanwhile are not concerned. Cancelled, the drain is called off: nothing
        is cut.

        Args:
            within: Seconds until requests are cut; may be infinite.
        """
        drain = Drain(trio.current_time() + within)
        drain._left.update(self._in_flight)
        if not drain._left:
            return DrainResult()
        concerned = len(drain._left)
        self._drains.append(drain)
        try:
            for request in tuple(drain._left):
                request.begin_drain(drain)
            with trio.move_on_after(within):
                await drain._over.wait()
            cut = tuple(drain._left)
            for other in self._drains:
                other._cut.update(other._left.intersection(cut))
            for request in cut:
                request.abort_drained()
            if cut:
                with trio.move_on_after(_UNWIND):
                    await drain._over.wait()
        finally:
            drain.called_off = True
            self._drains.remove(drain)
        return DrainResult(concerned - len(drain._cut), len(drain._cut))
