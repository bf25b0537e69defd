"""A simulation of calls from a seed: ICE clients and pairs of RTP and RTCP, servers and deploys.

As in ``test_simulation``: sockets, relay and time are real, timeouts are short, and what the model
can't know for certain it does not judge. After every step nobody has heard what was another's, an
ICE client only its own server, live calls are where they were, a pair has one server, and the
counts add up. With ``UDP_SIMULATION_SEED=...`` all choices of a failed run are made again.
"""

from __future__ import annotations

import math
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.udp.callers import Calls, MediaServer, Phone, open_calls
from tests.udp.calling import ALERT, record
from tests.udp.serving import Deploying, until
from tests.udp.simulating import simulate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TIMEOUT = 0.6  # seconds of silence after which a session is over
TICK = 0.1  # the relay looks at them so often
CLOSE = 0.1  # seconds by which what the model measures may be off on a busy machine
NAMES = ("v1", "v2", "v3", "v4")
CALLERS = 10  # of each kind
RUNS = 1
ACTIONS = {
    "check": 30,
    "data": 15,
    "voice": 35,
    "roam": 6,
    "wait": 10,
    "deploy": 8,
    "die": 3,
    "live": 6,
    "hush": 3,
    "restart": 2,
    "remove": 1,
}


@attrs.define(eq=False)
class Session:
    """What the model knows of a caller's session.

    Attributes:
        server: Where it was seen last; None while nobody has recognised its client.
        sources: The port that this server knows it by, for each of the server's ports.
        heard: Earliest and latest time at which its last datagram may have passed.
        cut: Earliest and latest time at which its drain cuts it.
        shaky: Whether it may have left its server, which did not live when it was needed.
    """

    server: MediaServer | None
    heard: tuple[float, float]
    sources: dict[int, int] = attrs.field(factory=dict)
    cut: tuple[float, float] = (math.inf, math.inf)
    shaky: bool = False

    def is_certain(self, now: float) -> bool:
        """Return whether it can't have ended, and is where it was."""
        ends = min(self.heard[0] + TIMEOUT, self.cut[0])
        return self.server is not None and not self.shaky and now < ends - CLOSE

    def is_possible(self, now: float) -> bool:
        """Return whether it may not have ended."""
        return now <= min(self.heard[1] + TIMEOUT + TICK, self.cut[1]) + CLOSE


@attrs.define(eq=False)
class Caller:
    """A client of ICE with one phone, or of plain RTP with two.

    Attributes:
        phones: Its phones; the second one is for RTCP.
        server: Whom its signalling chose, if it is a client of ICE and no stranger.
        ufrag: What that has told it; nothing if it is of plain RTP.
        session: What is known of its session.
    """

    phones: tuple[Phone, ...]
    server: MediaServer | None = None
    ufrag: bytes = b""
    session: Session | None = None


@attrs.define(eq=False)
class Seen:
    """A datagram that has reached a server."""

    server: MediaServer
    port: int
    source: int
    payload: bytes


class Simulation:
    """One run.

    Args:
        seed: Chooses everything.
        calls: Where it takes place.
    """

    setting = ""

    def __init__(self, seed: int, calls: Calls) -> None:
        self.chance = random.Random(seed)
        self.calls = calls
        self.steps: list[str] = []
        self.servers = [calls.server(name) for name in NAMES]
        for server in self.servers:
            server.stranger = self.chance.choice((401, 400, 0))
        self.ice: list[Caller] = []
        self.pairs: list[Caller] = []
        self.left: list[Session] = []  # whose callers have others by now
        self.active: list[MediaServer] = []
        self.deploys: list[Deploying] = []
        self.seen = dict.fromkeys(self.servers, 0)

    @property
    def counters(self) -> dict[str, Any]:
        return self.calls.relay.counters()

    @property
    def callers(self) -> list[Caller]:
        return [*self.ice, *self.pairs]

    @property
    def sessions(self) -> list[Session]:
        return [*(each.session for each in self.callers if each.session), *self.left]

    async def run(self, steps: int) -> None:
        await self.deploy()
        names, weights = list(ACTIONS), list(ACTIONS.values())
        for _ in range(steps):
            (name,) = self.chance.choices(names, weights)
            self.steps.append(name)
            await getattr(self, name)()
            await self.calls.settle()
            self.check_all()
        await self.finish()

    def note(self, text: str) -> None:
        self.steps[-1:] = [text]

    # Clients of ICE

    def ice_caller(self) -> Caller:
        if len(self.ice) < CALLERS and self.chance.random() < 0.3:
            # One in ten asks for what nobody has given it.
            server = self.chance.choice(self.servers) if self.chance.random() < 0.9 else None
            ufrag = server.invite() if server else b"nobody"
            self.ice.append(Caller((self.ice_phone(),), server, ufrag))
            return self.ice[-1]
        return self.chance.choice(self.ice) if self.ice else self.ice_caller()

    def ice_phone(self) -> Phone:
        host = f"127.0.0.{self.chance.randint(11, 14)}"
        return self.calls.phone(host, to=self.chance.choice(self.calls.ports))

    async def roam(self) -> None:
        """Let a client go on from another address, perhaps one that forges it."""
        caller = self.ice_caller()
        self.note(f"{caller.phones[0].address} roams")
        if caller.session is not None:
            self.left.append(caller.session)
        caller.phones, caller.session = (self.ice_phone(),), None
        await self.ask(caller)

    async def check(self) -> None:
        await self.ask(self.ice_caller())

    async def ask(self, caller: Caller) -> None:
        """Send Binding requests, and look who has got them and who has answered."""
        (phone,) = caller.phones
        session, server = caller.session, caller.server
        limited, created = self.counters["dropped"]["ask_limit"], self.counters["created"]
        before = trio.current_time()
        asked = [await phone.say_request(caller.ufrag) for _ in range(self.chance.randint(1, 3))]
        await self.calls.settle()
        after = trio.current_time()
        arrived = self.arrivals()
        self.note(f"{phone.address} asks {caller.ufrag!r}: {names_of(arrived)}")
        began = self.counters["created"] - created
        answered = [each for each in phone.heard if each.question in asked]
        got = [each for each in answered if each.kind == "success"]
        assert {each.name for each in got} <= {caller.server.name if caller.server else ""}
        assert len(answered) <= len(asked), "one answer for each request"
        is_clear = (
            session is None
            or not session.is_possible(before)
            or (session.server is None and not session.shaky)
        )
        if session is not None and session.is_certain(after):
            is_clear = True
            assert not began
            self.require_same(session, arrived)
            session.heard = (before, after)
        else:
            assert began <= 1
            self.take_note(caller, before, after, arrived if got else [], began)
        is_ready = server is not None and server.lives and not server.silent
        is_limited = self.counters["dropped"]["ask_limit"] > limited
        if is_ready and server in self.active and not is_limited and is_clear:
            assert len(got) == len(asked), "its server is there, and does not get its requests"

    def take_note(
        self, caller: Caller, before: float, after: float, arrived: list[Seen], began: int
    ) -> None:
        """Remember the session of a client of ICE, which may be another one than before."""
        session, server = caller.session, caller.server
        mine = [each for each in arrived if each.server is server]
        if began and session is not None:
            self.left.append(session)
        if began or session is None:
            caller.session = session = Session(None, (before, after))
        session.heard = (before if mine else session.heard[0], after)
        if not mine or server is None:
            return
        session.server, session.shaky = server, False
        session.sources = {mine[-1].port: mine[-1].source}
        if server not in self.active:
            # It is one of a deployment that drains: when that ends is not said here.
            session.cut = (-math.inf, session.cut[1])

    async def data(self) -> None:
        """Send DTLS, or what looks like its end; without a session it comes to nothing."""
        caller = self.ice_caller()
        (phone,) = caller.phones
        session, created = caller.session, self.counters["created"]
        before = trio.current_time()
        question = b""
        if self.chance.random() < 0.2:
            await phone.say(record(ALERT))
        else:
            question = await phone.say_data()
        await self.calls.settle()
        after, arrived = trio.current_time(), self.arrivals()
        self.note(f"{phone.address} sends data: {names_of(arrived)}")
        began = self.counters["created"] - created
        if session is None or began or not session.is_certain(after):
            assert began <= 1
            if session is not None and began:
                self.left.append(session)
            if session is None or began:
                session = caller.session = Session(None, (before, after))
            # It may be with a server that does not know it.
            session.heard, session.shaky = (session.heard[0], after), True
            return
        assert not began
        self.require_same(session, arrived)
        session.heard = (before, after)
        assert session.server is not None
        if question and session.server.lives and not session.server.silent:
            heard = [each.name for each in phone.heard if each.question == question]
            assert heard in ([session.server.name], []), "nobody else answers"

    # Plain RTP

    def pair_caller(self) -> Caller:
        if len(self.pairs) < CALLERS and self.chance.random() < 0.3:
            # Each has an address of its own: from one, anybody's halves would be a pair.
            host = f"127.0.0.{20 + len(self.pairs)}"
            first = self.chance.choice(self.calls.ports[::2])
            voice, control = (self.calls.phone(host, to=port) for port in (first, first + 1))
            control.ssrc = voice.ssrc
            self.pairs.append(Caller((voice, control)))
            return self.pairs[-1]
        return self.chance.choice(self.pairs) if self.pairs else self.pair_caller()

    async def voice(self) -> None:
        """Say something on one port or both; look where it arrives."""
        caller = self.pair_caller()
        session, created = caller.session, self.counters["created"]
        before = trio.current_time()
        kinds = self.chance.choices(("voice", "report", "bye"), (6, 3, 1), k=3)
        kinds = kinds[: self.chance.randint(1, 3)]
        voice, control = caller.phones
        for kind in kinds:
            if kind == "voice":
                await voice.say_voice()
            elif kind == "report":
                await control.say_report()
            else:
                await control.say_bye()
        await self.calls.settle()
        after = trio.current_time()
        arrived = self.arrivals()
        self.note(f"{voice.address} says {kinds}: {names_of(arrived)}")
        began = self.counters["created"] - created
        reached = {each.server for each in arrived}
        if session is not None and session.is_certain(after):
            assert not began, "both ports of a caller are one session"
            assert len(arrived) == len(kinds)
            self.require_same(session, arrived)
            session.heard = (before, after)
            return
        may_have_gone = session is not None and session.is_possible(before)
        if not may_have_gone:  # or it has ended between two of these
            assert began <= 1, "both ports of a caller are one session"
            assert len(reached) <= 1, "a pair has one server"
            assert reached <= set(self.active), "new sessions go to the active servers"
        if session is not None and began:
            self.left.append(session)
        if session is None or began:
            session = caller.session = Session(None, (before, after))
        session.heard = (before if arrived else session.heard[0], after)
        if len(reached) != 1 or began > 1 or (may_have_gone and began):
            session.shaky = True
            return
        if session.server not in reached:
            session.sources.clear()
        (session.server,) = reached
        session.sources |= {each.port: each.source for each in arrived}
        session.shaky = False
        if session.server not in self.active:
            session.cut = (-math.inf, session.cut[1])

    # Where something arrives

    def arrivals(self) -> list[Seen]:
        """Return what callers have sent that has arrived since the last call."""
        found = []
        for server in self.servers:
            new = server.received[self.seen[server] :]
            self.seen[server] += len(new)
            found += [Seen(server, each.port, each.source, each.payload) for each in new]
        # What the proxy itself says is nobody's.
        return [each for each in found if b"server is being replaced" not in each.payload]

    def require_same(self, session: Session, arrived: list[Seen]) -> None:
        """Check that a live session has not moved; learn the source of its second half."""
        assert {each.server for each in arrived} <= {session.server}, "a live session has moved"
        for each in arrived:
            known = session.sources.setdefault(each.port, each.source)
            assert known == each.source, "a live session has another source"
        if session.server is not None and session.server.lives:
            assert arrived, "a datagram is lost"

    # Servers

    async def die(self) -> None:
        alive = [each for each in self.servers if each.lives]
        if len(alive) > 1 or (alive and self.chance.random() < 0.2):
            server = self.chance.choice(alive)
            self.note(f"{server.name} dies")
            server.die()
            for session in self.sessions:
                session.shaky = session.shaky or session.server in (server, None)

    async def live(self) -> None:
        for server in self.servers:
            if not server.lives and self.chance.random() < 0.7:
                self.note(f"{server.name} lives")
                server.live(self.calls.world)
                for session in self.sessions:
                    session.shaky = session.shaky or session.server is None

    async def hush(self) -> None:
        server = self.chance.choice(self.servers)
        server.silent = not server.silent
        self.note(f"{server.name} is {'silent' if server.silent else 'talkative'}")

    # Time, and changes of the service

    async def wait(self) -> None:
        (seconds,) = self.chance.choices((0.01, 0.05, 0.15, TIMEOUT + TICK), (5, 5, 3, 1))
        self.note(f"wait {seconds}")
        await trio.sleep(seconds)

    async def deploy(self) -> None:
        """Deploy some of the servers, dead or alive."""
        drain = self.chance.choice((0.0, 0.2, 0.5))
        options: dict[str, Any] = {
            "zero_downtime": self.chance.random() < 0.8,
            "drain_strategy": self.chance.choice(("graceful", "timeout", "immediate")),
            "drain_timeout": drain,
            "force_kill_timeout": drain + self.chance.choice((0.0, 0.3)),
        }
        patience = 0.0
        if options["zero_downtime"] and options["drain_strategy"] != "immediate":
            patience = options["force_kill_timeout"]
        chosen = self.chance.sample(self.servers, self.chance.randint(1, 3))
        before = trio.current_time()
        self.deploys.append(await self.calls.begin(*chosen, timeout=TIMEOUT, **options))
        await self.calls.settle()
        after = trio.current_time()
        self.steps.append(f"deployed {[server.name for server in chosen]} {options}")
        for session in self.sessions:
            low, high = session.cut
            if session.server in chosen and not session.shaky and low > before:
                continue  # a server in both sets is not drained
            if low == math.inf and session.server is not None and not session.shaky:
                high = after + patience  # any other may be with a server that stays
            session.cut = (min(low, before + patience), high)
        self.active = chosen

    async def restart(self) -> None:
        """Let another proxy go on with state and sessions."""
        await self.calls.restart()
        self.deploys.clear()
        self.left = [each for each in self.left if self.outlives(each)]
        for caller in self.callers:
            if caller.session is not None and not self.outlives(caller.session):
                caller.session = None

    def outlives(self, session: Session) -> bool:
        """Return whether a session may go on after a restart; those that drained do not."""
        if session.cut[1] < math.inf and not session.shaky:
            return False
        if session.cut[0] < math.inf or session.server not in self.active:
            session.shaky = True  # also of a client whose server is not known yet
        return True

    async def remove(self) -> None:
        await self.calls.room.services.remove("game")
        await self.calls.settle()
        assert self.calls.room.rows == []
        for deploying in self.deploys:
            await deploying.ended.wait()
        self.deploys.clear()
        self.left.clear()
        for caller in self.callers:
            caller.session = None
        await self.deploy()

    # What must hold

    def check_all(self) -> None:
        """Check what holds after every step."""
        self.arrivals()
        counters, now = self.counters, trio.current_time()
        live = self.calls.relay.live
        assert counters["created"] == live + sum(counters["ended"].values())
        row = self.calls.room.row("game")
        assert row.in_flight + row.draining == live
        assert row.pairs_in_use <= live
        assert self.calls.room.saved == {"game": [str(server) for server in self.active]}
        self.left = [each for each in self.left if each.is_possible(now)]
        certain = sum(each.is_certain(now) for each in self.sessions)
        possible = sum(each.is_possible(now) for each in self.sessions)
        assert certain <= live <= possible, "a session has ended too early, or too late"
        for caller in self.ice:
            (phone,) = caller.phones
            names = {each.name for each in phone.heard if each.kind != "error"}
            assert names <= {caller.server.name if caller.server else ""}
            assert not phone.byes, "nobody can say goodbye to these"
        ssrcs = {server.name: server.ssrc for server in self.servers}
        for phone in self.calls.phones:
            assert not phone.strange
            for heard in phone.heard:
                if heard.byes:
                    # The name is made up if its own was never heard.
                    expected = {ssrcs.get(heard.name, *heard.byes)}
                    assert set(heard.byes) == expected <= set(ssrcs.values())
                    assert heard.port == phone.to

    async def finish(self) -> None:
        """Let everything end; nothing may be left."""
        self.steps.append("finish")
        for deploying in self.deploys:
            await deploying.ended.wait()
            assert deploying.error is None
        service = self.calls.room.installed()
        await until(lambda: service.relay.live == 0)
        assert (service.relay.sockets, service.relay.undecided, service.relay.pairs) == (0, 0, 0)
        assert list(service.deployments.values()) == [service.active]
        results = [each.result for each in self.deploys if each.result is not None]
        assert len(results) == len(self.deploys)
        ended = self.counters["ended"]
        assert sum(each.cancelled for each in results) <= ended["cut"]
        most = sum(ended.values()) + self.counters["moved"]
        assert sum(each.completed + each.cancelled for each in results) <= most
        assert all(each.cut_unsaid <= each.cancelled for each in results)


def names_of(arrived: list[Seen]) -> list[str]:
    return [each.server.name for each in arrived]


@asynccontextmanager
async def open_simulation(seed: int, path: Path) -> AsyncIterator[Simulation]:
    async with open_calls(path) as calls:
        yield Simulation(seed, calls)


@pytest.mark.fuzz
async def test_any_course_of_calls(tmp_path: Path) -> None:
    await simulate(open_simulation, tmp_path, RUNS)
