"""Closed ports: a client's ends its session, a target's is told and may be answered by a move."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import RUN_REFUSED
from tests.ports import free_port
from tests.udp.relaying import (
    SO_NO_CHECK,
    Client,
    Driver,
    Target,
    driving,
    echo,
    end_of,
    needs_ipv6,
    open_descriptors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESSES = ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)]


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        yield driver


def begin(driver: Driver, client: Client, target: Target) -> tuple[str, int]:
    """Begin a session that is answered; return where the target sends to."""
    client.say(b"begin")
    driver.pump(lambda: target.received)
    where = target.received.pop().source
    target.send(b"begun", where)
    driver.pump(lambda: client.received)
    client.received.clear()
    return where


# A client's port is closed


def test_a_client_that_is_gone_and_one_that_comes_back(driver: Driver) -> None:
    target, back, gone = driver.target(), driver.client(), driver.client()
    to_back, to_gone = begin(driver, back, target), begin(driver, gone, target)
    begin(driver, driver.client(), target)
    for client, where in ((back, to_back), (gone, to_gone)):
        driver.shut(client)
        target.send(b"refused", where)
        driver.settle()
    driver.wait_for(0.2)
    again = driver.client(port=back.where[1])
    again.say(b"I am back")
    driver.settle()
    # What the target sends does not prolong what its silent client had.
    driver.wait_for(1.0)
    target.send(b"refused too", to_gone)
    driver.pump(lambda: driver.relay.live == 2)
    assert driver.ended(driver.generation) == {"client_gone": 1}
    target.send(b"welcome", to_back)
    driver.pump(lambda: again.received)
    assert again.data == [b"welcome"]
    # It may be gone later all the same.
    driver.shut(again)
    target.send(b"refused again", to_back)
    driver.pump(lambda: driver.relay.live == 1)
    assert driver.ended(driver.generation) == {"client_gone": 2}


@needs_ipv6
def test_any_listener_tells_that_a_client_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        drivers = [stack.enter_context(driving())]
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
        drivers.append(stack.enter_context(driving()))
        for driver, address in zip(drivers, ("::1", "127.0.0.1"), strict=True):
            target, client = driver.target(address), driver.client(address)
            where = begin(driver, client, target)
            driver.shut(client)
            target.send(b"refused", where)
            driver.settle()
        for driver in drivers:
            driver.pump(lambda relay=driver.relay: relay.live == 0)  # type: ignore[misc]
            assert driver.ended() == {"client_gone": 1}


def test_clients_that_are_gone_cost_the_others_nothing(driver: Driver) -> None:
    target = driver.target()
    clients = [driver.client() for _ in range(150)]
    ways = [begin(driver, client, target) for client in clients]
    for client in clients[::2]:
        driver.shut(client)
    for turn in range(10):
        for way in ways:
            target.send(b"%d" % turn, way)
        driver.settle()
    expected = [b"%d" % turn for turn in range(10)]
    assert [client.data for client in clients[1::2]] == [expected] * 75
    assert driver.relay.live == 150


# A target's port is closed


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_refusal_is_told(driver: Driver, address: str) -> None:
    number = driver.relay.add_target(address, free_port())
    driver.targets = [number]
    client = driver.client(address)
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    (refusal,) = driver.refusals
    assert (refusal.generation, refusal.target) == (driver.generation, number)
    assert (refusal.affinity, refusal.answered) == (True, False)
    assert (refusal.moves, refusal.refusals, refusal.span) == (0, 1, 0.0)
    assert (refusal.client, refusal.local) == (end_of(client.where), end_of(client.to))
    # It is told once, and again only when it happens again.
    assert [tuple(each) for each in driver.relay.refusals()] == [tuple(refusal)]
    assert driver.turn() == 0
    assert driver.relay.refusals() == []
    driver.wait_for(0.2)
    driver.refusals.clear()
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    (again,) = driver.refusals
    assert again.session == refusal.session
    assert again.refusals == 2
    assert again.span >= 0.1
    assert driver.relay.live == 1


def test_an_answer_makes_a_refusal_forgotten(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    begin(driver, client, target)
    driver.shut(target)
    for _ in range(3):
        client.say(b"hi")
        driver.settle()
    assert [refusal.refusals for refusal in driver.refusals] == [1, 2, 3]
    assert {refusal.answered for refusal in driver.refusals} == {True}
    reopened = driver.reopened(*target.where)
    reopened.answer = echo
    client.say(b"hi again")
    driver.pump(lambda: client.received)
    driver.shut(reopened)
    driver.refusals.clear()
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    assert [(refusal.refusals, refusal.span) for refusal in driver.refusals] == [(1, 0.0)]


def test_refusals_of_many_sessions_are_told(driver: Driver) -> None:
    driver.targets = [driver.relay.add_target("127.0.0.1", free_port())]
    clients = [driver.client(f"127.0.0.{number % 5 + 1}") for number in range(300)]
    for place, client in enumerate(clients):
        client.say(b"hi")
        if place % 50 == 49:
            driver.settle()
    driver.pump(lambda: len({refusal.client for refusal in driver.refusals}) == 300)
    assert len({refusal.session for refusal in driver.refusals}) == 300


def test_an_ended_session_is_not_told(driver: Driver) -> None:
    driver.targets = [driver.relay.add_target("127.0.0.1", free_port())]
    client = driver.client()
    client.say(b"hi")
    driver.turn()  # admitted, and refused meanwhile
    assert driver.relay.run(1) & RUN_REFUSED
    ((session, *_),) = driver.relay.refusals()
    driver.relay.end_some(driver.generation, 1)
    assert driver.relay.refusals() == []
    target = driver.target()
    assert driver.relay.move(session, driver.generation, target.number) is False


@pytest.mark.parametrize("kind", ["one", "several", "marked", "header", "train", "split train"])
def test_what_a_refusal_held_up_is_sent(driver: Driver, kind: str) -> None:
    """A send that tells of an earlier refusal has sent nothing: it is done again."""
    driver.header = b"header " if kind == "header" else b""
    target, client = driver.target(), driver.client()
    begin(driver, client, target)
    if kind == "split train":
        (upstream,) = driver.upstreams(target.where)
        with upstream:
            upstream.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    driver.shut(target)
    client.say(b"lost")
    driver.turn()  # the listener stays in front of the session's socket, which has an error now
    reopened = driver.reopened(*target.where)
    said = {"several": [b"two", b"three"], "train": [b"four", b"five"]}
    said["split train"] = said["train"]
    for data in said.get(kind, [b"one"]):
        client.say(data, tos=1 if kind == "marked" else None)
    driver.turn()
    driver.settle()
    assert reopened.data == [driver.header + data for data in said.get(kind, [b"one"])]
    assert [refusal.refusals for refusal in driver.refusals] == [1]
    assert driver.dropped() == {}


def test_what_came_before_the_session_survives_a_refusal(driver: Driver) -> None:
    driver.targets = [driver.relay.add_target("127.0.0.1", free_port())]
    client = driver.client()
    for data in (b"1", b"2", b"3"):
        client.say(data)
    driver.pump(lambda: driver.refusals)
    assert driver.refusals[-1].refusals == 3
    assert driver.relay.counters()["datagrams_in"] == 3
    assert driver.dropped() == {}


# Moving a session


def refused(driver: Driver, *first: bytes, segment: int = 0) -> tuple[Client, int]:
    """Let a closed port refuse a newcomer; return it and its session."""
    driver.targets = [driver.relay.add_target("127.0.0.1", free_port())]
    client = driver.client()
    for data in first:
        client.say(data, segment=segment)
    driver.pump(lambda: driver.refusals)
    return client, driver.refusals.pop().session


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("first", [b"", b"first", bytes(range(256)) * 5])
@pytest.mark.parametrize("header", [b"", b"header "])
def test_a_moved_session_sends_its_first_datagram_again(
    driver: Driver, address: str, first: bytes, header: bytes
) -> None:
    driver.header = header
    client, session = refused(driver, first, b"second")
    target = driver.target(address)
    target.answer = echo
    assert driver.relay.move(session, driver.generation, target.number) is True
    driver.pump(lambda: client.received)
    assert target.data == [header + first]
    assert client.data == [header + first]
    client.say(b"third")
    driver.pump(lambda: len(target.received) == 2)
    assert target.data[1] == header + b"third"
    assert len({each.source for each in target.received}) == 1
    counters = driver.relay.counters()
    assert (counters["moved"], counters["created"], driver.relay.live) == (1, 1, 1)


def test_a_moved_session_has_another_source_port(driver: Driver) -> None:
    target, other, client = driver.target(), driver.target(), driver.client()
    client.say(b"hi")
    driver.pump(lambda: target.received)
    (upstream,) = driver.upstreams(target.where)
    upstream.close()
    driver.shut(target)
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    assert driver.relay.move(driver.refusals[0].session, driver.generation, other.number)
    driver.pump(lambda: other.received)
    assert other.received[0].source != target.received[0].source
    # The old target is not heard any more.
    reopened = driver.reopened(*target.where)
    reopened.send(b"late", target.received[0].source)
    other.send(b"answer", other.received[0].source)
    driver.pump(lambda: client.received)
    driver.settle()
    assert client.data == [b"answer"]
    assert driver.upstreams(target.where) == []


def test_a_large_first_datagram_is_not_kept(driver: Driver) -> None:
    client, session = refused(driver, bytes(1473))
    target = driver.target()
    assert driver.relay.move(session, driver.generation, target.number)
    client.say(b"next")
    driver.pump(lambda: target.received)
    assert target.data == [b"next"]


def test_only_the_first_datagram_of_a_train_is_sent_again(driver: Driver) -> None:
    _, session = refused(driver, b"111222333", segment=3)
    target = driver.target()
    assert driver.relay.move(session, driver.generation, target.number)
    driver.pump(lambda: target.received)
    driver.settle()
    assert target.data == [b"111"]


def test_an_answered_session_sends_nothing_again(driver: Driver) -> None:
    target, other, client = driver.target(), driver.target(), driver.client()
    begin(driver, client, target)
    driver.shut(target)
    client.say(b"refused")
    driver.pump(lambda: driver.refusals)
    assert driver.refusals[0].answered
    assert driver.relay.move(driver.refusals[0].session, driver.generation, other.number)
    client.say(b"next")
    driver.pump(lambda: other.received)
    assert other.data == [b"next"]


def test_a_session_may_move_again(driver: Driver) -> None:
    _, session = refused(driver, b"first")
    for moves in range(1, 4):
        closed = driver.relay.add_target("127.0.0.1", free_port())
        assert driver.relay.move(session, driver.generation, closed)
        driver.pump(lambda: driver.refusals)
        refusal = driver.refusals.pop()
        assert (refusal.session, refusal.moves, refusal.refusals) == (session, moves, 1)
        assert refusal.target == closed
        driver.relay.drop_target(closed)
    target = driver.target()
    assert driver.relay.move(session, driver.generation, target.number)
    driver.pump(lambda: target.received)
    assert target.data == [b"first"]


def test_a_session_moves_to_another_generation(driver: Driver) -> None:
    client, session = refused(driver, b"first")
    target = driver.target()
    later = driver.relay.add_generation(60.0, 60.0)
    assert driver.relay.move(session, later, target.number)
    client.say(b"second")
    driver.pump(lambda: len(target.received) == 2)
    assert driver.emptied == 1
    assert (driver.relay.sessions(driver.generation), driver.relay.sessions(later)) == (0, 1)
    assert driver.relay.end_some(driver.generation, 9) == 0
    assert driver.relay.live == 1
    driver.relay.drop_generation(driver.generation)
    assert driver.relay.end_some(later, 9) == 0
    assert driver.relay.live == 0
    assert driver.ended(later) == {"cut": 1}


def test_a_session_that_can_not_move_stays(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    begin(driver, client, target)
    driver.shut(target)
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    session = driver.refusals[0].session
    unreachable = driver.relay.add_target("255.255.255.255", 9)  # needs SO_BROADCAST
    before = open_descriptors()
    with pytest.raises(OSError, match="ermission denied"):
        driver.relay.move(session, driver.generation, unreachable)
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.move(session, driver.generation, unreachable + 1)
    with pytest.raises(ValueError, match="no such generation"):
        driver.relay.move(session, driver.generation + 1, target.number)
    gone = driver.target()
    driver.relay.drop_target(gone.number)
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.move(session, driver.generation, gone.number)
    assert open_descriptors() == before + 1  # that of the target which is gone
    reopened = driver.reopened(*target.where)
    client.say(b"again")
    driver.pump(lambda: reopened.received)
    assert reopened.received[0].source == source_to(driver, target)
    assert driver.relay.counters()["moved"] == 0


def source_to(driver: Driver, target: Target) -> tuple[str, int]:
    """Return where the only session of a target sends from."""
    (upstream,) = driver.upstreams(target.where)
    with upstream:
        host, port = upstream.getsockname()
    return host, port


# Targets that say nothing, not even that they refuse


def test_clients_that_talk_to_a_silent_target_are_stuck(driver: Driver) -> None:
    target, other = driver.target(), driver.target()
    talks, rests, answered = (driver.client() for _ in range(3))
    where = [begin(driver, client, target) for client in (talks, rests, answered)]
    driver.targets = [other.number]
    begin(driver, driver.client(), other)
    driver.wait_for(0.01)  # times are told apart by the millisecond
    for client in (talks, answered):
        client.say(b"are you there?")
    driver.settle()
    target.send(b"yes", where[2])
    driver.wait_for(1.0)
    for client in (talks, answered):
        client.say(b"still there?")
    driver.settle()
    target.send(b"yes", where[2])
    driver.settle()

    def stuck(seconds: float, number: int = target.number, count: int = 9) -> list[bytes]:
        found = driver.relay.stuck(driver.generation, number, seconds, count)
        assert all(local == end_of(talks.to) for _, _, local in found)
        return [client for _, client, _ in found]

    assert stuck(0.9) == [end_of(talks.where)]
    # Those who say nothing are not stuck, those who were answered are not, and patience counts.
    assert stuck(30.0) == []
    assert stuck(0.9, other.number) == []
    assert stuck(0.9, count=0) == []
    ((session, _, _),) = driver.relay.stuck(driver.generation, target.number, 0.9, 9)
    assert driver.relay.move(session, driver.generation, other.number)
    assert stuck(0.9) == []
    talks.say(b"and you?")
    driver.pump(lambda: other.received)
    assert other.data == [b"and you?"]


def test_numbers_of_no_session(driver: Driver) -> None:
    _, session = refused(driver, b"first")
    target = driver.target()
    for other in (session + 1, session + (1 << 32), session ^ (1 << 63), 0, (1 << 64) - 1):
        assert driver.relay.move(other, driver.generation, target.number) is False
    assert driver.relay.counters()["moved"] == 0
