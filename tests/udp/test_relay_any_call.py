"""Any order of what clients, targets and the owner of a relay do with calls keeps its books right.

Nothing is modelled but what must always hold: what is counted adds up, and nobody hears what was
meant for another. ``make sanitize`` watches the memory meanwhile.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy._fastpath import SourcePorts
from tests.fuzzing import at_least
from tests.udp.calling import (
    ALERT,
    bye,
    described,
    garbled,
    receiver_report,
    record,
    request,
    rtp,
    sender_report,
    stun,
    success,
)
from tests.udp.relaying import Driver, driving, packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.udp.relaying import Client, Newcomer, Target

HOSTS = ("127.0.0.2", "127.0.0.3")
CALLERS = 4  # two of each address

# Who does what, with which of several things.
STEPS = st.lists(
    st.tuples(st.integers(0, 33), st.integers(0, 255), st.integers(0, 255)),
    min_size=40,
    max_size=200,
)


def said(kind: int, who: int) -> tuple[bytes, int]:
    """Return something that names its owner, with the size of its parts if it is a train."""
    whole = [
        request(transaction=who),
        request(transaction=who),
        success(transaction=who),
        rtp(who),
        sender_report(who) + described(who, b"name"),
        receiver_report(who) + bye(who),
        garbled(who),
        rtp(who) + record(ALERT),
    ][kind % 8]
    return (whole * 3, len(whole)) if kind % 16 == 15 else (whole, 0)


def owner(data: bytes) -> int:
    """Return whom something is of."""
    if data[0] < 2:
        return int.from_bytes(data[8:20])
    return int.from_bytes(data[8:12] if data[1] == 96 else data[4:8])


class Calls:
    """A relay with a pair of ports and a port alone, four callers and two targets."""

    def __init__(self, driver: Driver, keeper: Driver) -> None:
        self.driver, self.relay = driver, driver.relay
        # A port that is used again would let what is said to its former user pass. They are used
        # in order for as long as somebody has sessions with a host.
        ports = SourcePorts(34_000, 60_000)
        for each in (driver, keeper):
            each.relay.use_ports(ports)
        for host in HOSTS:
            number = keeper.relay.add_target(host, 0)
            keeper.relay.restore(
                keeper.numbers[0], packed(host) + b"\0\1", 0, packed(HOSTS[0]), keeper.generation,
                number, 0, True, 0.0,
            )  # fmt: skip
        self.targets: list[Target] = [
            target for both in driver.listen_to_pair(*HOSTS) for target in both
        ]
        self.clients: list[Client] = []
        for place in range(CALLERS):
            self.clients += driver.caller(f"127.0.0.{7 + place % 2}")
        # Where each target has heard whom from.
        self.heard: list[dict[tuple[str, int], int]] = [{} for _ in self.targets]
        self.generations = [driver.generation]
        self.known = set(driver.targets)
        self.choice = 0
        driver.decide = self.decide
        self.new_generation()

    def new_generation(self) -> None:
        self.driver.generation = self.relay.add_generation(60.0, 60.0, media=True)
        self.generations.append(self.driver.generation)

    def decide(self, newcomer: Newcomer) -> None:
        driver, choice = self.driver, self.choice
        self.relay.opening(newcomer.number)
        assert self.relay.undecided_from(newcomer.number) <= self.relay.undecided
        if choice % 8 < 3 or self.relay.has_session(newcomer.number):
            with suppress(ValueError):  # the other half has come before
                driver.ask(newcomer)
        elif choice % 8 < 6:
            driver.pair_up(newcomer)
        elif choice % 8 < 7:
            self.relay.refuse(newcomer.number, "no_target")

    def sessions(self, generation: int, count: int = 99) -> list[int]:
        self.relay.begin_goodbye(generation)
        return [session for session, *_ in self.relay.goodbyes(generation, count)]

    # What may happen

    def step(self, what: int, which: int, more: int) -> None:
        if what < 12:
            client = self.clients[which % len(self.clients)]
            data, segment = said(more, which % len(self.clients))
            client.say(data, segment=segment)
        elif what < 20:
            self.answer(which, more)
        elif what < 22:
            self.choice = which
            self.driver.turn()
        elif what < 25:
            self.choice = which
            self.driver.settle()
        else:
            self.own(which, more)

    def answer(self, which: int, more: int) -> None:
        place = which % len(self.targets)
        ways = list(self.heard[place].items())
        if ways and self.targets[place].sock.fileno() >= 0:
            way, who = ways[more % len(ways)]
            kinds = [success(transaction=who), stun(0x0111, transaction=who)]
            data, segment = said(which, who)
            self.targets[place].send(kinds[more % 2] if which & 64 else data, way, segment=segment)

    def own(self, which: int, more: int) -> None:
        """Do what only the owner of a relay can."""
        relay, generation = self.relay, self.generations[more % len(self.generations)]
        target = self.driver.targets[more % len(self.driver.targets)]
        actions: list[Callable[[], object]] = [
            lambda: [relay.end(each) for each in self.sessions(generation, more % 3)],
            lambda: [
                relay.assign(each, self.driver.generation) for each in self.sessions(generation)
            ],
            lambda: self.move(generation, target),
            lambda: [
                relay.say_goodbye(each, bye(99), b"") for each in self.sessions(generation, 3)
            ],
            lambda: relay.goodbyes(generation, 1 + more % 3),
            lambda: relay.begin_goodbye(generation),
            lambda: relay.end_some(generation, more % 4),
            lambda: relay.hurry(generation),
            lambda: relay.export(generation, {target: 0}),
            lambda: relay.pair(*self.driver.numbers[1:]),
            lambda: relay.pair(*self.driver.numbers[more % 2 : more % 2 + 2]),
            self.new_generation,
            lambda: self.adopt(generation),
            lambda: self.unlisten(more),
            relay.ask_again,
            lambda: setattr(relay, "mode", more % 6 == 5),
            lambda: self.shut(more),
            lambda: setattr(relay, "limit", more % 4 or 100),
        ]
        actions[which % len(actions)]()

    def move(self, generation: int, target: int) -> None:
        for session in self.sessions(generation, 2):
            with suppress(ValueError):  # it asks other targets just now
                self.relay.move(session, generation, target)

    def adopt(self, generation: int) -> None:
        driver = self.driver
        again = {
            number: self.relay.add_target(host, 0)
            for number, host in zip(driver.targets, HOSTS, strict=True)
        }
        self.relay.adopt(generation, driver.generation, again)
        for number in again:
            self.relay.drop_target(number)
        driver.targets = list(again.values())
        self.known.update(driver.targets)

    def unlisten(self, more: int) -> None:
        numbers = [number for place, number in enumerate(self.driver.numbers) if more >> place & 1]
        self.relay.unlisten_all(numbers)
        for number in sorted(numbers):
            assert self.relay.listen(self.driver.listeners[number].fileno()) == number

    def shut(self, more: int) -> None:
        """Close a target's port, or open it again."""
        place = more % len(self.targets)
        if self.targets[place].sock.fileno() >= 0:
            self.driver.shut(self.targets[place])
        else:
            self.targets[place] = self.driver.reopened(*self.targets[place].where)

    # What must hold

    def check(self) -> None:
        relay = self.relay
        assert sum(relay.sessions(each) for each in self.generations) == relay.live
        flows = 0
        for number in self.known:
            with suppress(ValueError):  # no session has it any more
                flows += relay.flows_to(number)
        assert flows == relay.sockets
        assert relay.live + relay.pairs <= relay.sockets
        assert relay.undecided + relay.pairs <= relay.live
        counters = relay.counters()
        assert counters["created"] == relay.live + sum(counters["ended"].values())
        for place, target in enumerate(self.targets):
            for datagram in target.received:
                self.heard[place][datagram.source] = owner(datagram.data)
            target.received.clear()
        for who, client in enumerate(self.clients):
            assert {owner(data) for data in client.data if data != bye(99)} <= {who}
            client.received.clear()


@pytest.mark.fuzz
@at_least(100)
@given(STEPS)
def test_any_calls_add_up(steps: list[tuple[int, int, int]]) -> None:
    with driving("127.0.0.1") as driver, driving("127.0.0.1") as keeper:
        calls = Calls(driver, keeper)
        for what, which, more in steps:
            calls.step(what, which, more)
            calls.check()
        driver.settle()
        for generation in calls.generations:
            driver.relay.end_some(generation, 99)
            driver.relay.drop_generation(generation)
        assert (driver.relay.live, driver.relay.undecided, driver.relay.sockets) == (0, 0, 0)
