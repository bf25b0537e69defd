"""What is not passed on: limits, modes, refused newcomers; and the counters that say so."""

from __future__ import annotations

import resource
import socket
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import DROP_REASONS, Relay
from tests.udp.relaying import (
    Client,
    Driver,
    Newcomer,
    Target,
    driving,
    echo,
    end_of,
    open_descriptors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNNING, PAUSED, STOPPED = 0, 1, 2


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        yield driver


def asked(driver: Driver) -> list[bytes]:
    """Collect the newcomers that are asked about, and decide nothing."""
    told: list[bytes] = []
    driver.decide = lambda newcomer: told.append(newcomer.client)
    return told


# How many sessions there may be


def test_newcomers_are_dropped_while_all_sessions_are_two_way(driver: Driver) -> None:
    driver.target().answer = echo
    clients = [driver.client() for _ in range(3)]
    for client in clients:
        client.say(b"begin")
    driver.settle()
    was_full = driver.relay.full
    driver.relay.limit = 3
    assert (was_full, driver.relay.full) == (False, True)
    told = asked(driver)
    newcomer = driver.client()
    for _ in range(5):
        newcomer.say(b"hi")
    newcomer.say(b"a" * 30, segment=10)
    driver.settle()
    assert told == []
    assert driver.dropped() == {"session_limit": 8}
    assert driver.relay.shed == 8
    assert not driver.relay.evict()
    for client in clients:
        client.say(b"goes on")
    driver.settle()
    assert [client.data for client in clients] == [[b"begin", b"goes on"]] * 3
    driver.relay.limit = 4
    newcomer.say(b"hi")
    driver.settle()
    assert told == [end_of(newcomer.where)]


def test_the_oldest_unanswered_session_makes_room(driver: Driver) -> None:
    """Once it has had a chance to be answered; a two-way session never does."""
    target = driver.target()
    clients = [driver.client() for _ in range(6)]
    for client in clients:
        client.say(b"begin")
        driver.settle()
    sources = [each.source for each in target.received]
    for place in (0, 3):
        target.send(b"answer", sources[place])
    driver.settle()
    driver.relay.limit = 6
    told = asked(driver)
    newcomer = driver.client()
    newcomer.say(b"too early")
    driver.settle()
    assert not driver.relay.evict()
    assert told == []
    driver.wait_for(1.1)
    newcomer.say(b"hi")
    driver.settle()
    assert told == [end_of(newcomer.where)]
    driver.relay.limit = 9
    order = []
    while driver.relay.evict():
        for client in clients:
            client.say(b"are you known?")
        told.clear()
        driver.settle()
        order.append({place for place, each in enumerate(clients) if end_of(each.where) in told})
    assert order == [{1}, {1, 2}, {1, 2, 4}, {1, 2, 4, 5}]
    assert driver.ended(driver.generation) == {"evicted": 4}
    assert driver.relay.live == 2
    assert driver.dropped()["session_limit"] == 1


def test_a_limit_below_what_there_is_ends_nothing(driver: Driver) -> None:
    target = driver.target()
    target.answer = echo
    clients = [driver.client() for _ in range(3)]
    for client in clients:
        client.say(b"begin")
    driver.settle()
    driver.relay.limit = 0
    for client in (*clients, driver.client()):
        client.say(b"again")
    driver.settle()
    assert len(target.received) == 6
    assert driver.relay.live == 3
    assert driver.dropped() == {"session_limit": 1}


def test_no_descriptor_is_left(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    told: list[Newcomer] = []
    driver.decide = told.append
    client.say(b"hi")
    driver.turn()
    used = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (target.sock.fileno(), hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            driver.admit(told[0])
        with pytest.raises(OSError, match="Too many open files"):
            Relay(bytes(16))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == used
    assert driver.relay.live == 0
    driver.admit(told[0])
    driver.settle()
    assert target.data == [b"hi"]


# How much is kept of newcomers


def test_what_a_newcomer_begins_with_is_kept(driver: Driver) -> None:
    """In order, and what is too much is counted."""
    target, client = driver.target(), driver.client()
    said = [b"%d" % number for number in range(200)]
    for data in said:
        client.say(data)
    driver.settle()
    assert target.data[:16] == said[:16]
    places = [said.index(data) for data in target.data]
    assert places == sorted(set(places))
    assert len(places) + driver.dropped().get("newcomer_backlog", 0) == 200


MANY = [f"127.0.0.{number}" for number in range(1, 13)]


def test_little_is_kept_of_all_newcomers() -> None:
    """One turn reads from all listeners, and keeps no more of all of them."""
    with driving(*MANY) as driver:
        target = driver.target()
        said = set()
        for address in MANY:
            for _ in range(4):
                client = driver.client(to=address)
                for number in range(16):
                    said.add(b"%d %d" % (client.where[1], number))
                    client.say(b"%d %d" % (client.where[1], number))
        driver.settle()
        assert len(target.received) == len(set(target.data)) == 512
        assert said.issuperset(target.data)
        assert driver.dropped() == {"newcomer_backlog": len(MANY) * 64 - 512}


def test_few_newcomers_are_asked_about_at_a_time() -> None:
    with driving(*MANY) as driver:
        target, known = driver.target(), driver.client()
        known.say(b"begin")
        driver.settle()
        for number in range(60 * len(MANY)):
            speaker = driver.client(to=MANY[number % len(MANY)])
            speaker.say(b"%d" % number)
            driver.shut(speaker)
        known.say(b"known")
        told: list[Newcomer] = []
        driver.decide = told.append
        driver.turn()
        assert len(told) == len({each.client + each.local for each in told}) == 256
        driver.turn()  # those that nothing was decided about are forgotten, and counted
        driver.settle()
        assert target.data == [b"begin", b"known"]
        assert driver.dropped() == {"newcomer_backlog": 60 * len(MANY)}


def test_what_came_by_a_listener_that_goes_is_counted() -> None:
    with driving("127.0.0.1", "127.0.0.2") as driver:
        target, stays, goes = driver.target(), driver.client(), driver.client(to="127.0.0.2")
        stays.say(b"hi")
        goes.say(b"h" * 20, segment=5)
        driver.decide = lambda newcomer: None
        driver.turn()
        (kept, lost) = sorted(driver.newcomers(), key=lambda each: each.local)
        driver.relay.unlisten(driver.numbers[1])
        assert driver.newcomers() == [kept]
        with pytest.raises(ValueError, match="no such newcomer"):
            driver.relay.refuse(lost.number, "failed")
        driver.admit(kept)
        driver.settle()
        assert target.data == [b"hi"]
        assert driver.dropped() == {"newcomer_backlog": 4}


# Modes


def test_a_paused_service_goes_on_for_those_who_are_known(driver: Driver) -> None:
    target, client, newcomer = driver.target(), driver.client(), driver.client()
    target.answer = echo
    client.say(b"begin")
    driver.settle()
    driver.relay.mode = PAUSED
    told = asked(driver)
    newcomer.say(b"no")
    newcomer.say(b"n" * 20, segment=5)
    client.say(b"goes on")
    driver.settle()
    assert client.data == [b"begin", b"goes on"]
    assert told == []
    assert driver.dropped() == {"paused": 5}
    driver.relay.mode = RUNNING
    newcomer.say(b"yes")
    driver.settle()
    assert told == [end_of(newcomer.where)]


def test_a_stopped_service_passes_nothing(driver: Driver) -> None:
    target, client, newcomer = driver.target(), driver.client(), driver.client()
    client.say(b"begin")
    driver.settle()
    source = target.received[0].source
    driver.relay.mode = STOPPED
    client.say(b"no")
    client.say(b"n" * 20, segment=5)
    newcomer.say(b"no")
    target.send(b"no", source)
    target.send(b"n" * 30, source, segment=10)
    driver.settle()
    assert (target.data, client.data, driver.relay.live) == ([b"begin"], [], 1)
    assert driver.dropped() == {"stopped": 1 + 4 + 1 + 1 + 3}
    driver.relay.mode = RUNNING
    client.say(b"again")
    target.send(b"answer", source)
    driver.settle()
    assert (target.data, client.data) == ([b"begin", b"again"], [b"answer"])


# Newcomers that are refused


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_a_refused_newcomer_is_counted(driver: Driver, reason: str) -> None:
    target, client = driver.target(), driver.client()
    driver.decide = lambda newcomer: driver.relay.refuse(newcomer.number, reason)
    client.say(b"one")
    client.say(b"n" * 20, segment=5)
    driver.settle()
    assert driver.dropped() == {reason: 5}
    assert target.received == []
    assert driver.relay.live == 0


def test_a_newcomer_is_decided_about_once(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    driver.decide = lambda newcomer: None
    client.say(b"hi")
    driver.turn()
    with pytest.raises(ValueError, match="not in tuple"):
        driver.relay.refuse(0, "boredom")
    driver.relay.refuse(0, "failed")
    with pytest.raises(ValueError, match="no such newcomer"):
        driver.relay.refuse(0, "failed")
    with pytest.raises(ValueError, match="no such newcomer"):
        driver.relay.admit(0, driver.generation, [target.number])
    with pytest.raises(ValueError, match="no such newcomer"):
        driver.relay.following(0)
    client.say(b"hi")
    driver.turn()
    driver.relay.admit(0, driver.generation, [target.number])
    with pytest.raises(ValueError, match="no such newcomer"):
        driver.relay.admit(0, driver.generation, [target.number])
    assert driver.relay.live == 1


def test_following_finds_a_session_of_the_same_address(driver: Driver) -> None:
    one, two = driver.target(), driver.target()
    first, other = driver.client("127.0.0.7"), driver.client("127.0.0.8")
    later = driver.relay.add_generation(60.0, 60.0)
    found = []

    def follow(newcomer: Newcomer) -> None:
        found.append(driver.relay.following(newcomer.number))
        driver.relay.admit(newcomer.number, later, [two.number])

    driver.decide = follow
    first.say(b"hi")
    driver.settle()
    assert found == [None]
    other.say(b"hi")
    driver.settle()
    assert found == [None, None]
    again = driver.client("127.0.0.7")
    again.say(b"hi")
    driver.settle()
    assert found[2:] == [(later, two.number)]
    driver.relay.end_some(later, 9)
    first.say(b"hi")
    driver.settle()
    assert found[3:] == [None]
    assert one.received == []


# Counters


def flood(listener: socket.socket, client: Client, count: int) -> None:
    """Send more than the listener's buffer holds."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
    for number in range(count):
        client.say(b"%d" % number)


def test_what_the_kernel_drops_is_counted(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    client.say(b"begin")
    driver.settle()
    for turn in range(2):
        target.received.clear()
        flood(driver.listeners[0], client, 500)
        driver.settle()
        arrived = len(target.received)
        assert 0 < arrived < 500
        # The kernel tells of it beside the next datagram.
        client.say(b"next")
        driver.pump(lambda: b"next" in target.data)
        counters = driver.relay.counters()
        if not turn:
            first = counters["kernel_drops"]
            assert first == 500 - arrived
        else:
            assert counters["kernel_drops"] - first == 500 - arrived
    assert driver.dropped() == {}


def test_what_the_kernel_drops_of_answers_is_counted(driver: Driver) -> None:
    target, other, client = driver.target(), driver.target(), driver.client()
    client.say(b"begin")
    driver.settle()
    lost = drops_of(driver, target, client)
    assert lost > 0
    assert driver.relay.counters()["kernel_drops"] == lost
    # The socket of another target counts from 0.
    driver.shut(target)
    client.say(b"refused")
    driver.pump(lambda: driver.refusals)
    assert driver.relay.move(driver.refusals[0].session, driver.generation, other.number)
    client.say(b"begin")
    driver.pump(lambda: other.received)
    lost += drops_of(driver, other, client)
    assert driver.relay.counters()["kernel_drops"] == lost


def drops_of(driver: Driver, target: Target, client: Client) -> int:
    """Let a target send more than the session's socket holds; return how many are lost."""
    client.received.clear()
    for _ in range(5000):
        target.send(bytes(1000), target.received[0].source)
    driver.settle()
    arrived = len(client.received)
    assert arrived > 0
    target.send(b"next", target.received[0].source)
    driver.pump(lambda: b"next" in client.data)
    return 5000 - arrived


def test_the_counters_add_up(driver: Driver) -> None:
    target, clients = driver.target(), [driver.client() for _ in range(20)]
    target.answer = lambda datagram: [datagram.data] * 2
    driver.relay.limit = 10
    said = 0
    for turn in range(6):
        for place, client in enumerate(clients):
            driver.relay.mode = {4: PAUSED, 5: STOPPED}.get(turn, RUNNING)
            for number in range(place):
                client.say(b"%d" % number)
                said += 1
            client.say(bytes(place * 100 + 1), segment=100)
            said += place + 1
            driver.settle()
    counters = driver.relay.counters()
    assert counters["datagrams_in"] == len(target.received)
    assert counters["bytes_in"] == sum(map(len, target.data))
    got = [data for client in clients for data in client.data]
    assert counters["datagrams_out"] == len(got) == 2 * len(target.received)
    assert counters["bytes_out"] == sum(map(len, got))
    assert counters["datagrams_in"] + sum(driver.dropped().values()) == said
    assert driver.relay.traffic == counters["datagrams_in"] + counters["datagrams_out"]
    assert set(driver.dropped()) == {"session_limit", "paused", "stopped"}
    assert counters["created"] == driver.relay.live == 10
    assert counters["kernel_drops"] == counters["moved"] == 0
    assert set(counters["dropped"]) == set(DROP_REASONS)
