"""Sessions without affinity: each datagram goes to the next target, all answers to its client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ports import free_port
from tests.udp.relaying import Driver, Target, driving, echo, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A relay whose newcomers are spread over all targets."""
    with driving() as driver:
        driver.generation = driver.relay.add_generation(60.0, 60.0, affinity=False)
        driver.decide = driver.spread
        yield driver


def shares(targets: list[Target]) -> list[list[bytes]]:
    return [target.data for target in targets]


def test_each_datagram_goes_to_the_next_target(driver: Driver) -> None:
    targets = [driver.target() for _ in range(3)]
    one, two = driver.client(), driver.client()
    for number in range(7):
        one.say(b"1.%d" % number)
        two.say(b"2.%d" % number)
        if number in (2, 3):  # several before there is a session, one alone, several in one
            driver.settle()
    driver.settle()
    for place, data in enumerate(shares(targets)):
        for who in (b"1.", b"2."):
            mine = [each for each in data if each.startswith(who)]
            # The second session begins with the second target.
            first = place if who == b"1." else (place - 1) % 3
            assert mine == [who + b"%d" % number for number in range(first, 7, 3)]
    assert driver.relay.live == 2
    assert driver.relay.sessions(driver.generation) == 2


def test_each_datagram_of_a_train_goes_to_the_next_target(driver: Driver) -> None:
    targets = [driver.target() for _ in range(3)]
    client = driver.client()
    client.say(b"111222333444", segment=3)
    driver.settle()
    client.say(b"555666777", segment=3)
    driver.settle()
    assert shares(targets) == [[b"111", b"444", b"777"], [b"222", b"555"], [b"333", b"666"]]


def test_all_answers_reach_the_client(driver: Driver) -> None:
    targets = [driver.target("127.0.0.1") for _ in range(3)]
    clients = [driver.client(to="127.0.0.2") for _ in range(4)]
    for place, target in enumerate(targets):
        target.answer = lambda datagram, place=place: [b"%d:" % place + datagram.data]
    for number in range(6):
        for client in clients:
            client.say(b"%d %d" % (client.where[1], number))
        driver.settle()
    for first, client in enumerate(clients):
        asked = [b"%d %d" % (client.where[1], number) for number in range(6)]
        expected = [b"%d:" % (place % 3) + data for place, data in enumerate(asked, first)]
        assert client.data == expected
        assert {datagram.source for datagram in client.received} == {("127.0.0.2", driver.port)}
    # Any of them may speak on.
    targets[1].send(b"more", targets[1].received[0].source)
    driver.settle()
    assert [client.data[-1] for client in clients].count(b"more") == 1


def test_not_all_sessions_begin_with_the_same_target(driver: Driver) -> None:
    """Many clients send a single datagram, each from another port."""
    targets = [driver.target() for _ in range(3)]
    for number in range(30):
        driver.client().say(b"%d" % number)
    driver.settle()
    assert [len(target.received) for target in targets] == [10, 10, 10]


def test_with_one_target(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    target.answer = echo
    for number in range(3):
        client.say(b"%d" % number)
        driver.settle()
    assert client.data == [b"0", b"1", b"2"]
    assert len({each.source for each in target.received}) == 1


def test_each_datagram_has_the_header(driver: Driver) -> None:
    driver.header = b"header "
    targets = [driver.target() for _ in range(2)]
    client = driver.client()
    for number in range(4):
        client.say(b"%d" % number)
        if number < 2:
            driver.settle()
    driver.settle()
    assert shares(targets) == [[b"header 0", b"header 2"], [b"header 1", b"header 3"]]


def test_targets_that_are_down_are_passed_over(driver: Driver) -> None:
    targets = [driver.target() for _ in range(3)]
    client = driver.client()
    client.say(b"0")
    driver.settle()
    driver.relay.set_down(targets[1].number, True)
    for number in range(1, 5):
        client.say(b"%d" % number)
    driver.settle()
    assert shares(targets) == [[b"0", b"2", b"4"], [], [b"1", b"3"]]
    driver.relay.set_down(targets[1].number, False)
    for number in range(5, 8):
        client.say(b"%d" % number)
    driver.settle()
    assert shares(targets) == [[b"0", b"2", b"4", b"7"], [b"5"], [b"1", b"3", b"6"]]


def test_a_session_that_begins_passes_over_what_is_down(driver: Driver) -> None:
    targets = [driver.target() for _ in range(3)]
    driver.relay.set_down(targets[0].number, True)
    client = driver.client()
    for number in range(4):
        client.say(b"%d" % number)
    driver.settle()
    assert shares(targets) == [[], [b"0", b"2"], [b"1", b"3"]]


def test_one_is_tried_when_all_are_down(driver: Driver) -> None:
    targets = [driver.target() for _ in range(2)]
    for target in targets:
        driver.relay.set_down(target.number, True)
    client = driver.client()
    for number in range(4):
        client.say(b"%d" % number)
        driver.settle()
    assert sorted(targets[0].data + targets[1].data) == [b"0", b"1", b"2", b"3"]


def test_a_target_that_refuses_is_passed_over_for_a_moment(driver: Driver) -> None:
    targets = [driver.target() for _ in range(3)]
    client = driver.client()
    for number in range(3):
        client.say(b"%d" % number)
    driver.settle()
    driver.shut(targets[1])
    for number in range(3, 12):
        client.say(b"%d" % number)
        driver.settle()
    # One datagram is lost to find out.
    assert targets[0].data == [b"0", b"3", b"6", b"8", b"10"]
    assert targets[2].data == [b"2", b"5", b"7", b"9", b"11"]
    assert [refusal.target for refusal in driver.refusals] == [targets[1].number]
    refusal = driver.refusals[0]
    assert not refusal.affinity
    assert (refusal.generation, refusal.refusals) == (driver.generation, 1)
    with pytest.raises(ValueError, match="without affinity, stays"):
        driver.relay.move(refusal.session, driver.generation, targets[0].number)
    reopened = driver.reopened(*targets[1].where)
    driver.wait_for(1.1)
    for number in range(12, 15):
        client.say(b"%d" % number)
    driver.settle()
    assert reopened.data == [b"13"]


def test_one_is_tried_when_all_refuse(driver: Driver) -> None:
    for _ in range(2):
        driver.targets.append(driver.relay.add_target("127.0.0.1", free_port()))
    client = driver.client()
    for _ in range(6):
        client.say(b"hi")
        driver.settle()
    assert driver.relay.counters()["datagrams_in"] == 6
    assert {refusal.target for refusal in driver.refusals} == set(driver.targets)


def test_a_session_that_can_not_have_all_targets_does_not_begin(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    unreachable = driver.relay.add_target("255.255.255.255", 9)
    driver.targets = [target.number, unreachable]
    before = open_descriptors()
    client.say(b"hi")
    with pytest.raises(PermissionError):
        driver.settle()
    assert open_descriptors() == before
    assert driver.relay.live == driver.relay.sessions(driver.generation) == 0
    with pytest.raises(ValueError, match="needs a target"):
        driver.relay.admit(0, driver.generation, [])
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.admit(0, driver.generation, [target.number, 99])
    driver.relay.admit(0, driver.generation, [target.number])
    driver.settle()
    assert target.data == [b"hi"]


def test_a_session_is_answered_by_any_target(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(60.0, 0.3, affinity=False)
    targets = [driver.target() for _ in range(2)]
    heard, unheard = driver.client(), driver.client()
    for client in (heard, unheard):
        for _ in range(2):
            client.say(b"%d" % client.where[1])
            driver.settle()
    sources = [
        next(each.source for each in target.received if each.data == b"%d" % heard.where[1])
        for target in targets
    ]
    targets[1].send(b"answer", sources[1])
    driver.pump(lambda: driver.relay.live == 1)
    assert driver.ended() == {"unanswered": 1}
    targets[0].send(b"another", sources[0])
    driver.settle()
    assert heard.data == [b"answer", b"another"]


def test_sessions_are_let_go_of(driver: Driver) -> None:
    old = [driver.target() for _ in range(2)]
    clients = [driver.client(), driver.client()]
    for client in clients:
        client.say(b"old")
    driver.settle()
    former = driver.generation
    driver.generation = driver.relay.add_generation(60.0, 60.0, affinity=False)
    driver.relay.let_go(former)
    driver.targets.clear()
    new = [driver.target() for _ in range(2)]
    driver.targets = [target.number for target in new]
    for client in clients:
        client.say(b"new")
    driver.settle()
    assert shares(old) == [[b"old"], [b"old"]]
    assert shares(new) == [[b"new"], [b"new"]]
    assert (driver.relay.sessions(former), driver.relay.live) == (2, 4)
    # When the table of sessions has grown they are still let go of, even by those who begin anew.
    for number in range(1100):
        driver.relay.restore(
            driver.numbers[0],
            bytes(16) + number.to_bytes(2),
            0,
            bytes(15) + b"\1",
            driver.generation,
            new[0].number,
            0,
            True,
            0.0,
        )
    assert driver.relay.end_some(driver.generation, 2000) == 0
    for client in clients:
        client.say(b"newer")
    driver.settle()
    assert shares(old) == [[b"old"], [b"old"]]
    # Answers that were on their way still arrive, and prolong it.
    sources = [each.source for each in old[0].received]
    old[0].send(b"late", sources[0])
    driver.settle()
    assert clients[0].data == [b"late"]
    driver.pump(lambda: not driver.relay.sessions(former))
    assert driver.ended(former) == {"idle": 1, "unanswered": 1}
    assert driver.relay.live == 2
    driver.relay.drop_generation(former)


def test_sessions_with_affinity_are_not_let_go_of(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(60.0, 60.0)
    target, client = driver.target(), driver.client()
    client.say(b"one")
    driver.settle()
    driver.relay.let_go(driver.generation)
    client.say(b"two")
    driver.settle()
    assert target.data == [b"one", b"two"]
    assert driver.relay.live == 1
