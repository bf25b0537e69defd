"""Any order of what an owner of a relay may do, beside a simple model of what must come of it.

Real sockets on loopback; no time passes that would end a session. ``make fuzz`` tries many more.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kamal_proxy._fastpath import SourcePorts
from kamal_proxy.udp.saved_sessions import RECORD, ServiceSessions, parse
from tests.udp.relaying import (
    Client,
    Driver,
    Newcomer,
    Refusal,
    Target,
    end_of,
    free_range,
    packed,
)

ADDRESSES = ("127.0.0.1", "127.0.0.2")
CLIENTS = 4
TARGETS = 3
RUNNING, PAUSED, STOPPED = 0, 1, 2
SIZE = 12  # bytes of each datagram


@attrs.define(eq=False)
class Session:
    """What the model knows of a session.

    Attributes:
        client: Number of the client.
        listener: Number of the address that it sends to.
        generation: Number of its generation.
        targets: The relay's numbers of its targets: one with affinity.
        spread: Whether it has no affinity.
        first: What it sends again when it moves before it was answered.
        answered: Whether a target has spoken.
        listed: Whether datagrams of the client still find it.
        moves: How often it was moved.
        session: What refusals call it, once one did.
        sources: Where each target, by its place, knows it from: one source for each number.
    """

    client: int
    listener: int
    generation: int
    targets: tuple[int, ...]
    spread: bool
    first: bytes | None = None
    answered: bool = False
    listed: bool = True
    moves: int = 0
    session: int | None = None
    sources: dict[int, list[tuple[str, int]]] = attrs.field(factory=dict)


class RelayMachine(RuleBasedStateMachine):
    """Drives a relay and the model."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(*ADDRESSES)
        self.clients: list[Client] = [self.driver.client() for _ in range(CLIENTS)]
        self.places: list[Target | None] = [
            self.driver.reopened("127.0.0.1", 0) for _ in range(TARGETS)
        ]
        self.where = [peer.where for peer in self.places if peer is not None]
        self.listening = [True] * len(ADDRESSES)
        self.held: dict[int, int] = {}  # the relay's numbers of targets that it may choose: places
        self.numbers: dict[int, int] = {}  # of all targets that it has ever had
        self.generations: dict[int, bool] = {}  # whether they have affinity
        self.sessions: list[Session] = []  # in the order in which they began
        self.limit = 10_000
        self.mode = RUNNING
        self.serial = 0
        self.sent = 0  # datagrams, by clients and by targets
        self.created = self.ended = self.moved = 0
        self.choice: tuple[str, int] = ("admit", 0)
        self.seen = 0
        self.driver.decide = self.decide

    def teardown(self) -> None:
        self.driver.close()

    # The model

    def active(self) -> list[Session]:
        return [session for session in self.sessions if session.listed]

    def find(self, client: int, listener: int) -> Session | None:
        found = [
            each for each in self.active() if (each.client, each.listener) == (client, listener)
        ]
        assert len(found) <= 1
        return found[0] if found else None

    def end(self, sessions: list[Session]) -> None:
        for session in sessions:
            self.sessions.remove(session)
            self.ended += 1

    def of(self, generation: int) -> list[Session]:
        return [session for session in self.sessions if session.generation == generation]

    def client_at(self, end: bytes) -> int:
        (client,) = (place for place, each in enumerate(self.clients) if end_of(each.where) == end)
        return client

    def decide(self, newcomer: Newcomer) -> None:
        """Do with a newcomer what this step chose."""
        what, which = self.choice
        (client,) = (
            place
            for place, each in enumerate(self.clients)
            if end_of(each.where) == newcomer.client
        )
        listener = self.driver.numbers.index(newcomer.listener)
        assert newcomer.local == packed(ADDRESSES[listener]) + self.driver.port.to_bytes(2)
        assert self.mode == RUNNING
        assert self.find(client, listener) is None
        follows = self.driver.relay.following(newcomer.number)
        same = {
            (each.generation, target) for each in self.active() for target in each.targets
        }  # all clients have one address
        assert follows in same if same else follows is None
        if what == "forget":
            return
        generations, held = sorted(self.generations), sorted(self.held)
        if what == "refuse" or not generations or not held:
            self.driver.relay.refuse(newcomer.number, "no_target")
            return
        generation = generations[which % len(generations)]
        start = which % len(held)
        targets = tuple(held[start:] + held[:start])
        spread = not self.generations[generation]
        if not spread:
            targets = targets[:1]
        self.driver.relay.admit(newcomer.number, generation, targets)
        session = Session(client, listener, generation, targets, spread)
        session.first = None if spread else self.first
        self.sessions.append(session)
        self.created += 1

    def learn(self, place: int) -> list[bytes]:
        """Look at what a target received: each from the source that its session has."""
        peer = self.places[place]
        assert peer is not None
        received, peer.received = peer.received, []
        for datagram in received:
            assert len(datagram.data) == SIZE
            client, listener = int(datagram.data[1:2]), int(datagram.data[3:4])
            found = self.find(client, listener)
            assert found is not None, "a session that has ended still sends"
            places = [self.numbers[number] for number in found.targets]
            known = found.sources.setdefault(place, [])
            if datagram.source not in known:
                known.append(datagram.source)
            assert len(known) <= places.count(place)
        return [datagram.data for datagram in received]

    def settle(self) -> None:
        self.driver.settle()
        self.driver.turn()  # those that nothing was decided about are counted now
        self.driver.settle()
        for refusal in self.driver.refusals[self.seen :]:
            self.note(refusal)
        self.seen = len(self.driver.refusals)

    def note(self, refusal: Refusal) -> None:
        client = self.client_at(refusal.client)
        (listener,) = (
            place for place, address in enumerate(ADDRESSES) if packed(address) in refusal.local
        )
        assert self.places[self.numbers[refusal.target]] is None
        # One that ended meanwhile is not told, so a live one has this number.
        candidates = [
            each for each in self.sessions if (each.client, each.listener) == (client, listener)
        ]
        candidates = [each for each in candidates if each.generation == refusal.generation]
        candidates = [each for each in candidates if refusal.target in each.targets]
        assert candidates
        if refusal.affinity:
            (session,) = (each for each in candidates if not each.spread)
            assert session.session in (None, refusal.session)
            session.session = refusal.session
            assert (refusal.answered, refusal.moves) == (session.answered, session.moves)

    # What may happen

    @initialize(own_ports=st.booleans(), limit=st.sampled_from([3, 10_000]))
    def begin(self, own_ports: bool, limit: int) -> None:
        if own_ports:
            self.driver.relay.use_ports(SourcePorts(*free_range(40)))
        self.limit = self.driver.relay.limit = limit
        self.driver.relay.drop_generation(self.driver.generation)
        self.add_target(0)
        self.add_generation(True)

    @precondition(lambda self: len(self.held) < 6)
    @rule(place=st.integers(0, TARGETS - 1))
    def add_target(self, place: int) -> None:
        number = self.driver.relay.add_target(*self.where[place])
        assert number not in self.held
        assert all(number not in session.targets for session in self.sessions)
        self.held[number] = self.numbers[number] = place

    @precondition(lambda self: len(self.held) > 1)
    @rule(which=st.integers(0, 99))
    def drop_target(self, which: int) -> None:
        number = sorted(self.held)[which % len(self.held)]
        self.driver.relay.drop_target(number)
        del self.held[number]

    @precondition(lambda self: len(self.generations) < 5)
    @rule(affinity=st.booleans())
    def add_generation(self, affinity: bool) -> None:
        number = self.driver.relay.add_generation(60.0, 60.0, affinity=affinity)
        assert number not in self.generations
        self.generations[number] = affinity

    @precondition(lambda self: len(self.generations) > 1)
    @rule(which=st.integers(0, 99))
    def drop_generation(self, which: int) -> None:
        number = self.one_generation(which)
        if self.of(number):
            with pytest.raises(ValueError, match="has sessions"):
                self.driver.relay.drop_generation(number)
        else:
            self.driver.relay.drop_generation(number)
            del self.generations[number]

    def one_generation(self, which: int) -> int:
        return sorted(self.generations)[which % len(self.generations)]

    @rule(
        client=st.integers(0, CLIENTS - 1),
        listener=st.integers(0, len(ADDRESSES) - 1),
        count=st.integers(1, 5),
        train=st.booleans(),
        what=st.sampled_from(["admit", "admit", "admit", "refuse", "forget"]),
        which=st.integers(0, 99),
    )
    def say(
        self, client: int, listener: int, count: int, train: bool, what: str, which: int
    ) -> None:
        """A client sends, with a session or without."""
        if not self.listening[listener]:
            return
        said = []
        for _ in range(count):
            self.serial += 1
            said.append(b"c%dl%d %07d" % (client, listener, self.serial))
        self.first, self.choice = said[0], (what, which)
        session = self.find(client, listener)
        dropped = sum(self.driver.dropped().values())
        to = (ADDRESSES[listener], self.driver.port)
        if train:
            self.clients[client].send(b"".join(said), to, segment=SIZE if count > 1 else 0)
        else:
            for data in said:
                self.clients[client].send(data, to)
        self.sent += count
        full = len(self.sessions) >= self.limit
        self.settle()
        known = session is not None
        session = self.find(client, listener)
        got = {place: self.learn(place) for place in range(TARGETS) if self.places[place]}
        arrived = sorted(data for each in got.values() for data in each)
        lost = sum(self.driver.dropped().values()) - dropped
        if self.mode == STOPPED or (self.mode == PAUSED and not known) or session is None:
            assert arrived == []
            assert lost == count
            return
        assert known or not full
        assert lost == 0
        if all(self.places[self.numbers[number]] for number in session.targets):
            assert arrived == said
        if not session.spread:
            assert all(each in ([], said) for each in got.values())

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 99), count=st.integers(1, 60), train=st.booleans())
    def say_more(self, which: int, count: int, train: bool) -> None:
        """A client with a session sends."""
        session = self.sessions[which % len(self.sessions)]
        self.say(session.client, session.listener, count, train, "forget", 0)

    @rule(first=st.integers(0, CLIENTS * 2), count=st.integers(1, 3), which=st.integers(0, 99))
    def say_all(self, first: int, count: int, which: int) -> None:
        """Every client sends."""
        for place in range(first, first + CLIENTS * 2):
            client, listener = place // 2 % CLIENTS, place % 2
            self.say(client, listener, count, False, "admit", which + place)

    @precondition(lambda self: any(session.sources for session in self.sessions))
    @rule(which=st.integers(0, 99), count=st.integers(1, 4), train=st.booleans())
    def answer(self, which: int, count: int, train: bool) -> None:
        """A target sends to a session that it knows; only its client may get that."""
        able = [
            (session, place, source)
            for session in self.sessions
            for place in sorted(session.sources)
            if self.places[place]
            for source in session.sources[place]
        ]
        if not able:
            return
        session, place, source = able[which % len(able)]
        peer = self.places[place]
        assert peer is not None
        said = []
        for _ in range(count):
            self.serial += 1
            said.append(b"c%dl%d %07d" % (session.client, session.listener, self.serial))
        if train:
            segment = SIZE if count > 1 else 0
            peer.send(b"".join(said), source, segment=segment)
        else:
            for data in said:
                peer.send(data, source)
        self.sent += count
        self.settle()
        session.answered = True
        client = self.clients[session.client]
        if self.mode == STOPPED:
            assert client.received == []
        else:
            service = (ADDRESSES[session.listener], self.driver.port)
            got = [(each.data, each.source) for each in client.received]
            assert got == [(data, service) for data in said]
        client.received.clear()

    @rule(place=st.integers(0, TARGETS - 1))
    def shut_target(self, place: int) -> None:
        """A target stops, or starts again on its port."""
        peer = self.places[place]
        if peer is not None:
            self.driver.shut(peer)
            self.places[place] = None
            return
        try:
            self.places[place] = self.driver.reopened(*self.where[place])
        except OSError:  # the kernel gave the port to somebody else
            self.places[place] = None

    @precondition(lambda self: self.driver.refusals and self.held and self.generations)
    @rule(which=st.integers(0, 999), where=st.integers(0, 99), generation=st.integers(0, 99))
    def move(self, which: int, where: int, generation: int) -> None:
        """Answer a refusal, however old, by a move."""
        refusal = self.driver.refusals[which % len(self.driver.refusals)]
        number = sorted(self.held)[where % len(self.held)]
        to = self.one_generation(generation)
        session = next((each for each in self.sessions if each.session == refusal.session), None)
        relay = self.driver.relay
        if not refusal.affinity:
            # While it lives it may not move.
            with suppress(ValueError):
                assert relay.move(refusal.session, to, number) is False
            return
        if session is None:
            assert relay.move(refusal.session, to, number) is False
            return
        assert relay.move(refusal.session, to, number) is True
        self.moved += 1
        session.moves += 1
        session.generation, session.targets = to, (number,)
        session.sources.clear()
        self.settle()
        place = self.numbers[number]
        peer = self.places[place]
        if peer is not None:
            again = self.learn(place)
            assert again == ([] if session.answered or session.first is None else [session.first])

    @precondition(lambda self: self.generations)
    @rule(which=st.integers(0, 99), count=st.integers(0, 3), removed=st.booleans())
    def end_some(self, which: int, count: int, removed: bool) -> None:
        number = self.one_generation(which)
        mine = self.of(number)
        if any(session.spread for session in mine):
            count = 9999  # it could not be told which of them live on
        left = self.driver.relay.end_some(number, count, removed=removed)
        assert left == max(0, len(mine) - count)
        names = {target: 0 for session in mine for target in session.targets}
        alive = {
            (record[0] + record[3].to_bytes(2), record[1])
            for record in RECORD.iter_unpack(self.driver.relay.export(number, names))
        }
        over = [each for each in mine if self.ends_of(each) not in alive]
        assert len(mine) - len(over) == left
        self.end(over)

    def ends_of(self, session: Session) -> tuple[bytes, bytes]:
        return end_of(self.clients[session.client].where), packed(ADDRESSES[session.listener])

    @precondition(lambda self: self.generations)
    @rule(which=st.integers(0, 99))
    def let_go(self, which: int) -> None:
        number = self.one_generation(which)
        if self.generations[number] or not self.of(number):
            self.driver.relay.let_go(number)
            return
        # Those that are let go of end after two seconds, which no example has: end them.
        self.driver.relay.let_go(number)
        for session in self.of(number):
            session.listed = False
            session.sources.clear()
        mine = self.of(number)
        for session in mine:
            self.choice = ("forget", 0)
            if self.listening[session.listener]:
                self.clients[session.client].send(
                    b"c%dl%d %07d" % (session.client, session.listener, 0),
                    (ADDRESSES[session.listener], self.driver.port),
                )
                self.sent += 1
        self.settle()
        for place in range(TARGETS):
            if self.places[place]:
                assert self.learn(place) == []
        assert self.driver.relay.end_some(number, 9999) == 0
        self.end(mine)

    @precondition(lambda self: len(self.generations) > 1)
    @rule(which=st.integers(0, 99), other=st.integers(0, 99))
    def adopt(self, which: int, other: int) -> None:
        """A redeploy: another generation takes over, each target with another number."""
        former, later = self.one_generation(which), self.one_generation(other)
        numbers = {
            old: new
            for old in self.numbers
            for new in self.held
            if self.numbers[old] == self.held[new]
        }
        self.driver.relay.adopt(former, later, numbers)
        for session in self.of(former):
            if not session.spread and session.targets[0] in numbers:
                session.targets = (numbers[session.targets[0]],)
                session.generation = later

    @precondition(lambda self: self.generations)
    @rule(which=st.integers(0, 99))
    def restart(self, which: int) -> None:
        """Sessions are exported, ended and restored, as by a restart of the proxy."""
        number = self.one_generation(which)
        mine = self.of(number)
        places = {target: place for target, place in self.numbers.items() if target in self.held}
        names = tuple(f"target-{place}:1" for place in range(TARGETS))
        records = self.driver.relay.export(number, places)
        service = ServiceSessions(name="game", targets=names, records=records)
        assert self.driver.relay.end_some(number, 9999) == 0
        self.end(mine)
        for saved in parse(service):
            ends = (saved.client + saved.client_port.to_bytes(2), saved.local)
            (former,) = (each for each in mine if self.ends_of(each) == ends)
            assert not former.spread
            assert saved.answered == former.answered
            assert saved.target_address == self.where[self.numbers[former.targets[0]]]
            known = {source[1] for sources in former.sources.values() for source in sources}
            assert known <= {saved.source_port}
            self.driver.relay.restore(
                self.driver.numbers[former.listener],
                saved.client + saved.client_port.to_bytes(2),
                0,
                saved.local,
                number,
                former.targets[0],
                saved.source_port,
                saved.answered,
                saved.idle,
            )
            session = attrs.evolve(former, first=None, moves=0, session=None)
            session.spread = not self.generations[number]
            self.sessions.append(session)
            self.created += 1

    @rule(place=st.integers(0, len(ADDRESSES) - 1))
    def unlisten(self, place: int) -> None:
        """A listener goes with its sessions, or comes back."""
        relay, driver = self.driver.relay, self.driver
        if not self.listening[place]:
            driver.numbers[place] = relay.listen(driver.listeners[place].fileno())
            self.listening[place] = True
            return
        relay.unlisten(driver.numbers[place])
        driver.numbers[place] = -1
        self.listening[place] = False
        self.end([session for session in self.sessions if session.listener == place])

    @precondition(lambda self: self.mode == RUNNING)
    @rule(mode=st.sampled_from([PAUSED, STOPPED]))
    def hold(self, mode: int) -> None:
        self.driver.relay.mode = self.mode = mode

    @precondition(lambda self: self.mode != RUNNING)
    @rule()
    def resume(self) -> None:
        self.driver.relay.mode = self.mode = RUNNING

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), down=st.booleans())
    def set_down(self, which: int, down: bool) -> None:
        self.driver.relay.set_down(sorted(self.held)[which % len(self.held)], down)

    # What must be true

    @invariant()
    def the_relay_is_as_the_model(self) -> None:
        self.settle()
        relay = self.driver.relay
        counters = relay.counters()
        assert relay.live == len(self.sessions)
        assert {number: relay.sessions(number) for number in self.generations} == {
            number: len(self.of(number)) for number in self.generations
        }
        assert counters["created"] == self.created
        assert sum(counters["ended"].values()) == self.ended
        assert counters["moved"] == self.moved
        assert self.created == self.ended + len(self.sessions)
        flows = Counter(number for session in self.sessions for number in session.targets)
        assert relay.sockets == flows.total()
        known = self.held.keys() | flows.keys()
        assert {number: relay.flows_to(number) for number in known} == {
            number: flows[number] for number in known
        }

    @invariant()
    def every_datagram_is_accounted_for(self) -> None:
        counters = self.driver.relay.counters()
        passed: int = counters["datagrams_in"] + counters["datagrams_out"]
        resent = passed + sum(counters["dropped"].values()) - self.sent
        assert 0 <= resent <= self.moved
        assert counters["kernel_drops"] == 0

    @invariant()
    def nobody_got_what_was_for_another(self) -> None:
        assert [client.received for client in self.clients] == [[]] * CLIENTS


TestAnyOrder = pytest.mark.fuzz(RelayMachine.TestCase)
TestAnyOrder.settings = settings(
    deadline=None, max_examples=max(25, settings().max_examples // 10), stateful_step_count=40
)
