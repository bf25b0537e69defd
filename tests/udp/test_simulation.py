"""A simulation from a seed: clients, targets and deploys at random, and a model of what must hold.

The sockets, the relay and the time are real; timeouts are short. After every step each reply has
come to who asked, live sessions are where they were, new ones are on the active targets, and the
counts add up. What the model can't know for certain, because a deadline was just passing, it does
not judge. A failure names its seed: ``UDP_SIMULATION_SEED=... pytest tests/udp/test_simulation.py``
does all choices again (but not the timing).
"""

from __future__ import annotations

import math
import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy import PauseOptions, StopOptions
from tests.ports import is_free
from tests.reference.expiry import Seen, ends_at
from tests.udp.serving import (
    Client,
    Deploying,
    Target,
    World,
    open_services,
    open_world,
    until,
)
from tests.udp.simulating import simulate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TIMEOUT = 0.5  # seconds of silence after which a session is over
TICK = 0.1  # the relay looks at them so often
CLOSE = 0.02  # seconds by which what the model measures may be off
NAMES = ("v1", "v2", "v3", "v4", "v5")
CLIENTS = 12
RUNS = 2
ACTIONS = {
    "talk": 50,
    "burst": 8,
    "wait": 14,
    "deploy": 7,
    "hold": 5,
    "die": 4,
    "live": 6,
    "hush": 4,
    "release": 6,
    "restart": 2,
    "remove": 1,
}


@attrs.define(eq=False)
class Session:
    """What the model knows of a client's session.

    Attributes:
        target: Where it was seen last; None if nothing has arrived yet.
        source: The port that this target knows it by.
        heard: Earliest and latest time at which its last datagram may have passed.
        cut: Earliest and latest time at which its drain cuts it.
        answered: Whether a target has answered it.
        shaky: Whether it may have left its target, which did not live when it was needed.
        elsewhere: Where it may have gone then, without anything having arrived.
    """

    target: Target | None
    source: int
    heard: tuple[float, float]
    cut: tuple[float, float] = (math.inf, math.inf)
    answered: bool = False
    shaky: bool = False
    elsewhere: set[Target] = attrs.field(factory=set)

    def ends(self, heard: float, cut: float) -> float:
        return min(ends_at(Seen(heard, self.answered), idle=TIMEOUT, unanswered=30.0), cut)

    def is_certain(self, now: float) -> bool:
        """Return whether it can't have ended."""
        return now < self.ends(self.heard[0], self.cut[0]) - CLOSE

    def is_possible(self, now: float) -> bool:
        """Return whether it may not have ended."""
        return now <= self.ends(self.heard[1] + TICK, self.cut[1]) + CLOSE


@attrs.define(eq=False)
class Speaker:
    """A client, and all that has come to it."""

    client: Client
    got: list[bytes] = attrs.field(factory=list)

    @property
    def prefix(self) -> bytes:
        return b"%d." % self.client.port

    async def receive(self) -> None:
        while True:
            self.got.append(await self.client.receive())

    async def wait_got(self, answer: bytes) -> None:
        await until(lambda: answer in self.got)


@attrs.define(eq=False)
class Arrival:
    """A datagram that has reached a target."""

    target: Target
    source: int
    payload: bytes


class Simulation:
    """One run.

    Args:
        seed: Chooses everything.
        world: Whose targets and clients take part.
        path: Directory of the state.
    """

    def __init__(self, seed: int, world: World, path: Path) -> None:
        self.chance = random.Random(seed)
        self.world = world
        self.path = path
        self.steps: list[str] = []
        self.strategy = self.chance.choice(("5-tuple", "source-ip", "source-port", "none"))
        self.setting = f"affinity {self.strategy}"
        self.targets = [world.target(name) for name in NAMES]
        self.alive = set(self.targets)
        self.speakers: list[Speaker] = []
        self.sessions: dict[Speaker, Session] = {}
        self.active: list[Target] = []
        self.mode = "running"
        self.deploys: list[Deploying] = []
        self.seen = dict.fromkeys(self.targets, 0)
        self.owed: list[Arrival] = []  # which silent targets have not answered
        self.forget_counts()

    def forget_counts(self) -> None:
        """Begin to count anew, as a proxy does that begins."""
        self.sent = self.arrived = 0
        self.exact = len(self.alive) == len(self.targets)  # no datagram can be lost
        self.deploys.clear()

    @property
    def affinity(self) -> bool:
        return self.strategy != "none"

    @property
    def counters(self) -> dict[str, Any]:
        return self.room.installed().relay.counters()

    # Running

    async def run(self, steps: int) -> None:
        async with AsyncExitStack() as self.stack:
            self.room = await self.stack.enter_async_context(open_services(self.path, self.world))
            await self.deploy()
            names, weights = list(ACTIONS), list(ACTIONS.values())
            for _ in range(steps):
                (name,) = self.chance.choices(names, weights)
                self.steps.append(name)
                await getattr(self, name)()
                await self.settle()
                self.check()
            await self.finish()

    def note(self, text: str) -> None:
        self.steps[-1:] = [text]

    async def settle(self) -> None:
        """Wait until nothing can happen any more but by time: loopback takes none."""
        await wait_all_tasks_blocked(0.001)

    # Clients

    def speaker(self) -> Speaker:
        if len(self.speakers) < CLIENTS and self.chance.random() < 0.3:
            client = self.world.client(f"127.0.0.{self.chance.randint(11, 14)}")
            speaker = Speaker(client)
            self.speakers.append(speaker)
            self.world.nursery.start_soon(speaker.receive)
            return speaker
        return self.chance.choice(self.speakers) if self.speakers else self.speaker()

    async def talk(self) -> None:
        await self.say(self.speaker(), 1)

    async def burst(self) -> None:
        await self.say(self.speaker(), self.chance.randint(2, 8))

    async def say(self, speaker: Speaker, count: int) -> None:
        """Send some datagrams; look where they arrive, and whether they should."""
        before, created = trio.current_time(), self.counters["created"]
        sent = [await speaker.client.send() for _ in range(count)]
        self.sent += count
        await until(lambda: self.passed() >= self.sent)
        await self.settle()
        after = trio.current_time()
        arrivals = [each for each in self.arrivals() if each.payload.startswith(speaker.prefix)]
        self.note(f"{speaker.client.port} says {count}: {[str(a.target.name) for a in arrivals]}")
        began = self.counters["created"] - created
        if self.mode == "stopped":
            assert not arrivals, "a stop lets nothing pass"
            assert not began
        elif not self.affinity:
            self.judge_spread(arrivals, sent, began)
        else:
            self.judge(speaker, arrivals, sent, began, before, after)
        for each in arrivals:
            if each.target in self.alive and not each.target.silent:
                answer = each.target.name.encode() + b":" + each.payload
                await speaker.wait_got(answer)
                if speaker in self.sessions:
                    self.sessions[speaker].answered = True

    def judge_spread(self, arrivals: list[Arrival], sent: list[bytes], began: int) -> None:
        """Look where datagrams without affinity have arrived."""
        assert {each.target for each in arrivals} <= set(self.active)
        assert began <= (self.mode == "running")
        if self.exact and self.mode == "running":
            assert sorted(each.payload for each in arrivals) == sorted(sent)

    def judge(
        self,
        speaker: Speaker,
        arrivals: list[Arrival],
        sent: list[bytes],
        began: int,
        before: float,
        after: float,
    ) -> None:
        """Look where datagrams of one client have arrived, and take note."""
        ends = {(each.target, each.source) for each in arrivals}
        session = self.sessions.get(speaker)
        certain = session is not None and session.is_certain(after)
        if certain and session is not None and not session.shaky and session.target in self.alive:
            # A live session, whose target lives: nothing may move it, and nothing is lost.
            assert ends == {(session.target, session.source)}, "a live session has moved"
            assert [each.payload for each in arrivals] == sent, "in order, and all of them"
            assert not began
            session.heard = (before, after)
            return
        assert began <= 1
        if began or (session is not None and not session.is_possible(before)):
            session = None
        if not ends:
            self.judge_silence(speaker, session, began, before, after)
            return
        assert len(ends) == 1, "one step of one session is one way"
        ((target, source),) = ends
        assert target in self.alive
        if session is not None and source == session.source:
            assert target is session.target
            session.heard, session.shaky = (before, after), False
            return
        # It is a new session, or one that has left a target that did not live.
        assert began or session is None or session.shaky or session.target not in self.alive
        allowed = self.followed(speaker, before)
        if session is not None and session.shaky:
            # It may have left at any time since, and for what has been replaced again meanwhile.
            allowed |= dict.fromkeys(session.elsewhere, session.cut[0])
        assert target in {*self.active, *allowed}, "new sessions go to the active targets"
        cut = (allowed.get(target, math.inf), math.inf)
        self.sessions[speaker] = Session(target, source, (before, after), cut)

    def judge_silence(
        self, speaker: Speaker, session: Session | None, began: int, before: float, after: float
    ) -> None:
        """Look whether there was a reason that nothing has arrived."""
        if session is not None:
            # On a target that does not live, or dropped because of a pause after it had ended.
            was_dead = session.shaky or session.target not in self.alive
            assert was_dead or self.mode == "paused", "a datagram is lost"
            session.shaky = True
            session.elsewhere.update(self.active)
            session.heard = (session.heard[0], after)
        elif began:
            assert self.mode == "running", "no session begins in a pause"
            followed = self.followed(speaker, before)
            # The first datagram goes on until it finds a target that lives.
            assert followed or self.alive.isdisjoint(self.active), "a first datagram is lost"
            self.sessions[speaker] = Session(
                None,
                0,
                (before, after),
                (min(followed.values(), default=math.inf), math.inf),
                shaky=True,
                elsewhere={*self.active, *followed},
            )
        else:
            assert self.mode == "paused", "a datagram of a newcomer is lost"
            self.sessions.pop(speaker, None)

    def followed(self, speaker: Speaker, now: float) -> dict[Target, float]:
        """Return where live sessions of the same address may be, and when these are cut."""
        if self.strategy != "source-ip":
            return {}
        address = speaker.client.sock.getsockname()[0]
        return {
            session.target: session.cut[0]
            for other, session in self.sessions.items()
            if other.client.sock.getsockname()[0] == address
            and session.is_possible(now)
            and session.target is not None
        }

    def passed(self) -> int:
        """Return how many datagrams of clients the relay has done something with."""
        counters = self.counters
        dropped: int = sum(counters["dropped"].values())
        return dropped + int(counters["datagrams_in"])

    # Targets

    def arrivals(self) -> list[Arrival]:
        """Return what has arrived since the last call."""
        found = []
        for target in self.targets:
            new = target.received[self.seen[target] :]
            self.seen[target] += len(new)
            found += [Arrival(target, each.source, each.payload) for each in new]
        self.arrived += len(found)
        self.owed += [each for each in found if each.target.silent]
        return found

    async def die(self) -> None:
        # One is left, most of the time.
        if len(self.alive) > 1 or (self.alive and self.chance.random() < 0.2):
            target = self.chance.choice([each for each in self.targets if each in self.alive])
            self.note(f"{target.name} dies")
            target.die()
            self.alive.remove(target)
            self.owed = [each for each in self.owed if each.target is not target]
            self.exact = False

    async def live(self) -> None:
        for target in self.targets:
            if target not in self.alive and self.chance.random() < 0.7:
                self.note(f"{target.name} lives")
                target.live(self.world.nursery)
                self.alive.add(target)

    async def hush(self) -> None:
        target = self.chance.choice(self.targets)
        target.silent = not target.silent
        self.note(f"{target.name} is {'silent' if target.silent else 'talkative'}")

    async def release(self) -> None:
        """Let silent targets answer late, or not at all."""
        self.chance.shuffle(self.owed)
        for each in self.owed[: self.chance.randint(0, len(self.owed))]:
            before = trio.current_time()
            (speaker,) = (s for s in self.speakers if each.payload.startswith(s.prefix))
            answer = b"late " + each.target.name.encode() + b":" + each.payload
            await each.target.send(answer, each.source)
            await self.settle()
            after = trio.current_time()
            session = self.sessions.get(speaker)
            if session is None or not self.affinity or session.source != each.source:
                continue
            if session.is_certain(after):
                session.answered = True
                session.heard = (before, after)
                if self.mode != "stopped":
                    await speaker.wait_got(answer)
            else:
                session.heard = (session.heard[0], after)
        self.owed.clear()

    # Time, and changes of the service

    async def wait(self) -> None:
        (seconds,) = self.chance.choices((0.01, 0.05, 0.15, TIMEOUT + TICK), (5, 5, 3, 1))
        self.note(f"wait {seconds}")
        await trio.sleep(seconds)

    async def deploy(self) -> None:
        """Deploy some of the targets, dead or alive."""
        drain = self.chance.choice((0.0, 0.2, 0.6))
        options: dict[str, Any] = {
            "zero_downtime": self.chance.random() < 0.7,
            "drain_strategy": self.chance.choice(("graceful", "timeout", "immediate")),
            "drain_timeout": drain,
            "force_kill_timeout": drain + self.chance.choice((0.0, 0.3)),
        }
        patience = 0.0
        if options["zero_downtime"] and options["drain_strategy"] != "immediate":
            is_graceful = options["drain_strategy"] == "graceful"
            patience = drain if is_graceful else options["force_kill_timeout"]
        options |= {"timeout": TIMEOUT, "affinity": self.affinity}
        if self.affinity:
            options["strategy"] = self.strategy
        chosen = self.chance.sample(self.targets, self.chance.randint(1, 3))
        before = trio.current_time()
        self.deploys.append(await self.room.begin("game", *chosen, **options))
        await self.settle()
        after = trio.current_time()
        self.steps.append(f"deployed {[target.name for target in chosen]} {options}")
        for session in self.sessions.values():
            low, high = session.cut
            if session.target in chosen and not session.shaky:
                continue  # a target in both sets is not drained
            if math.isinf(low):
                high = math.inf if session.shaky else after + patience
                session.cut = (before + patience, high)
            else:
                session.cut = (min(low, before + patience), high)
        self.active = chosen

    async def hold(self) -> None:
        services = self.room.services
        mode = self.chance.choice(("running", "running", "paused", "stopped"))
        self.note(mode)
        if mode == "paused":
            await services.pause("game", PauseOptions())
        elif mode == "stopped":
            await services.stop_service("game", StopOptions())
        else:
            await services.resume("game")
        self.mode = mode

    async def restart(self) -> None:
        """Let another proxy go on with state and sessions."""
        await self.stack.aclose()
        self.room = await self.stack.enter_async_context(open_services(self.path, self.world))
        for speaker, session in tuple(self.sessions.items()):
            low, high = session.cut
            if not math.isinf(low) and not math.isinf(high):
                del self.sessions[speaker]  # those that drained have ended
            elif session.shaky or not math.isinf(low) or session.target not in self.active:
                session.heard = (-math.inf, session.heard[1])
        if not self.affinity:
            self.sessions.clear()
        self.forget_counts()

    async def remove(self) -> None:
        await self.room.services.remove("game")
        await self.settle()
        assert is_free(self.room.port)
        assert self.room.rows == []
        for deploying in self.deploys:
            await deploying.ended.wait()
        self.sessions.clear()
        self.mode = "running"
        self.forget_counts()
        await self.deploy()

    # What must hold

    def check(self) -> None:
        """Check what holds after every step."""
        self.arrivals()
        for speaker in self.speakers:
            assert len(speaker.got) == len(set(speaker.got)), "a reply has come twice"
            for answer in speaker.got:
                assert answer.partition(b":")[2].startswith(speaker.prefix), "another one's reply"
        counters, now = self.counters, trio.current_time()
        live = self.room.installed().relay.live
        assert counters["created"] == live + sum(counters["ended"].values())
        row = self.room.row("game")
        assert row.in_flight + row.draining == live
        assert row.state == self.mode
        assert self.room.saved == {"game": [str(target) for target in self.active]}
        assert self.arrived <= counters["datagrams_in"]
        if self.exact:
            assert self.arrived == counters["datagrams_in"]
            assert self.passed() >= self.sent
        if self.affinity:
            certain = sum(each.is_certain(now) for each in self.sessions.values())
            possible = sum(each.is_possible(now) for each in self.sessions.values())
            assert certain <= live <= possible, "a session has ended too early, or too late"

    async def finish(self) -> None:
        """Let everything end; nothing may be left."""
        self.steps.append("finish")
        await self.room.services.resume("game")
        for deploying in self.deploys:
            await deploying.ended.wait()
            assert deploying.error is None
        service = self.room.installed()
        await until(lambda: service.relay.live == 0)
        assert list(service.deployments.values()) == [service.active]
        results = [each.result for each in self.deploys if each.result is not None]
        assert len(results) == len(self.deploys)
        assert sum(each.cancelled for each in results) == self.counters["ended"]["cut"]
        ended = sum(self.counters["ended"].values()) + self.counters["moved"]
        assert sum(each.completed + each.cancelled for each in results) <= ended


@asynccontextmanager
async def open_simulation(seed: int, path: Path) -> AsyncIterator[Simulation]:
    async with open_world() as world:
        yield Simulation(seed, world, path)


@pytest.mark.fuzz
async def test_any_course_of_events(tmp_path: Path) -> None:
    await simulate(open_simulation, tmp_path, RUNS)
