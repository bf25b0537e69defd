"""Sessions end when nothing is heard, in real time; no test asks how long that took."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import RUN_MORE
from tests.ports import free_port
from tests.udp.relaying import Client, Driver, Target, driving, echo, end_of, packed

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        yield driver


def begin(driver: Driver, target: Target) -> tuple[Client, tuple[str, int]]:
    """Begin a session that is answered; return its client and where the target sends to."""
    client = driver.client()
    client.say(b"begin")
    driver.pump(lambda: target.received)
    where = target.received.pop().source
    target.send(b"begun", where)
    driver.pump(lambda: client.received)
    return client, where


def quiet(driver: Driver, number: int, generation: int, idle: float, answered: bool = True) -> None:
    """Begin a session of which nothing was heard for some seconds."""
    driver.relay.restore(
        driver.numbers[0],
        end_of((f"127.1.{number // 250}.{1 + number % 250}", 1)),
        0,
        packed("127.0.0.1"),
        generation,
        driver.targets[0],
        0,
        answered,
        idle,
    )


def test_each_session_has_the_patience_of_its_state(driver: Driver) -> None:
    """An answered one is idle later than one that nobody answers."""
    driver.generation = driver.relay.add_generation(0.9, 0.3)
    target = driver.target()
    begin(driver, target)
    unheard = driver.client()
    unheard.say(b"hi")
    driver.pump(driver.ended)
    assert driver.ended() == {"unanswered": 1}
    driver.pump(lambda: driver.emptied)
    assert driver.ended() == driver.ended(driver.generation) == {"unanswered": 1, "idle": 1}
    assert driver.relay.live == 0
    assert driver.upstreams(target.where) == []
    # The client may begin again, and has another session.
    target.received.clear()
    unheard.say(b"again")
    driver.pump(lambda: target.received)
    assert target.data == [b"again"]
    assert driver.relay.counters()["created"] == 3


def test_datagrams_in_either_direction_prolong_a_session(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(2.0, 2.0)
    target = driver.target()
    talker, _ = begin(driver, target)
    listener, where = begin(driver, target)
    begin(driver, target)  # the third says nothing more
    silent = driver.client()  # this one is never answered, but does not give up
    silent.say(b"hi")
    for _ in range(4):
        driver.wait_for(0.6)
        talker.say(b"")
        silent.say(b"hi")
        target.send(b"", where)
        driver.settle()
    assert driver.ended(driver.generation) == {"idle": 1}
    assert driver.relay.live == 3
    assert listener.data == [b"begun", *[b""] * 4]
    assert target.data.count(b"") == 4


def test_what_is_refused_prolongs_nothing(driver: Driver) -> None:
    """A target that refuses has said nothing; only the client prolongs the session."""
    driver.generation = driver.relay.add_generation(0.5, 0.3)
    driver.targets = [driver.relay.add_target("127.0.0.1", free_port())]
    client = driver.client()
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    driver.pump(lambda: driver.emptied)
    assert driver.ended() == {"unanswered": 1}


def test_long_patience_ends_on_whole_seconds(driver: Driver) -> None:
    """So that many quiet sessions wake nobody more than once a second."""
    driver.target()
    fine = driver.relay.add_generation(9.9, 9.9)
    coarse = driver.relay.add_generation(10.0, 10.0)
    endings: dict[int, list[int]] = {fine: [], coarse: []}
    for number in range(10):
        quiet(driver, number, fine, 9.9 - 0.1 * number - 0.05)
        quiet(driver, number + 10, coarse, 10.0 - 0.1 * number - 0.05)
    left = {fine: 10, coarse: 10}
    while any(left.values()):
        turns = driver.turns
        driver.pump(lambda turns=turns: driver.turns > turns)  # type: ignore[misc]
        for generation in left:
            now = driver.relay.sessions(generation)
            if now != left[generation]:
                endings[generation].append(left[generation] - now)
                left[generation] = now
    # A second later at the latest, for a second's worth of sessions: at most twice.
    assert len(endings[coarse]) <= 2
    assert len(endings[fine]) > 2
    assert driver.ended() == {"idle": 20}


def test_a_session_that_was_quiet_for_too_long_ends_at_once(driver: Driver) -> None:
    driver.target()
    generation = driver.relay.add_generation(20.0, 20.0)
    for number, idle in enumerate((19.9, 20.0, 25.0, 1e12)):
        quiet(driver, number, generation, idle)
    quiet(driver, 9, generation, 0.0)
    driver.pump(lambda: driver.relay.live == 1)
    assert driver.ended() == {"idle": 4}


def test_each_generation_has_its_patience(driver: Driver) -> None:
    """Deadlines from a moment to days ahead: each session ends by its own."""
    driver.target()
    # A session can't have been quiet since before the machine was started.
    patience = [float(4**each) for each in range(11) if 4**each < time.monotonic()]
    generations = [driver.relay.add_generation(each, each) for each in patience]
    for number, generation in enumerate(generations):
        quiet(driver, number, generation, patience[number] - 0.5)
        quiet(driver, number + 100, generation, 0.0)
    driver.pump(lambda: driver.relay.live == len(generations) - 1)
    driver.settle()
    expected = [0] + [1] * (len(generations) - 1)
    assert [driver.relay.sessions(generation) for generation in generations] == expected


def test_many_sessions_end_together() -> None:
    """More than one turn ends; the relay stays readable until all are gone."""
    with driving("127.0.0.1", sockets=False) as driver:
        driver.target()
        generation = driver.relay.add_generation(0.3, 0.2)
        for number in range(5000):
            quiet(driver, number, generation, 0.0, answered=bool(number % 2))
        later = driver.relay.add_generation(60.0, 60.0)
        for number in range(5000, 6000):
            quiet(driver, number, later, 0.0)
        driver.pump(lambda: driver.relay.sessions(generation) == 0)
        assert driver.ended() == {"idle": 2500, "unanswered": 2500}
        assert driver.emptied == 1
        assert driver.relay.live == driver.relay.sessions(later) == 1000


def test_no_patience_at_all(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(0.0, 0.0)
    target, client = driver.target(), driver.client()
    target.answer = echo
    for number in range(3):
        client.say(b"%d" % number)
        driver.pump(lambda number=number: sum(driver.ended().values()) > number)  # type: ignore[misc]
    assert target.data == [b"0", b"1", b"2"]
    assert set(driver.ended()) <= {"idle", "unanswered"}
    assert sum(driver.ended().values()) == 3


@pytest.mark.parametrize("seconds", [-1.0, math.inf, -math.inf, math.nan, 1e300])
def test_odd_patience(driver: Driver, seconds: float) -> None:
    """No number of seconds does harm; less than none is none."""
    driver.target()
    generation = driver.relay.add_generation(seconds, seconds)
    quiet(driver, 1, generation, 0.0)
    quiet(driver, 2, driver.generation, seconds)
    driver.settle()
    assert driver.relay.live in (1, 2)
    driver.relay.end_some(generation, 1)
    driver.relay.end_some(driver.generation, 1)


def test_a_relay_without_sessions_is_not_readable(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(0.2, 0.2)
    driver.target()
    client = driver.client()
    client.say(b"hi")
    driver.pump(lambda: driver.emptied)
    turns = driver.turns
    driver.settle()
    assert driver.turns == turns
    assert not driver.turn() & RUN_MORE
