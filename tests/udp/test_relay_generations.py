"""Generations, listeners and targets come and go, and the relay itself: who ends with whom."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import END_REASONS, RUN_EMPTIED, Relay
from tests.ports import free_port
from tests.udp.relaying import Driver, driving, echo, needs_ipv6, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = bytes(16)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving("127.0.0.1", "127.0.0.2") as driver:
        yield driver


def begin(driver: Driver, count: int) -> None:
    """Begin some sessions."""
    before = driver.relay.live
    for _ in range(count):
        driver.client().say(b"hi")
    driver.pump(lambda: driver.relay.live == before + count)


# Generations


def test_sessions_are_those_of_their_generation(driver: Driver) -> None:
    old = driver.generation
    target = driver.target()
    begin(driver, 5)
    driver.generation = new = driver.relay.add_generation(60.0, 60.0)
    begin(driver, 3)
    assert (driver.relay.sessions(old), driver.relay.sessions(new)) == (5, 3)
    assert driver.relay.end_some(old, 2) == 3
    assert driver.relay.end_some(new, 1, removed=True) == 2
    assert driver.relay.end_some(old, 0) == 3
    assert driver.relay.live == 5
    assert driver.ended(old) == {"cut": 2}
    assert driver.ended(new) == {"removed": 1}
    assert driver.ended() == {"cut": 2, "removed": 1}
    assert set(driver.relay.ended(old)) == set(END_REASONS)
    for each in (left := driver.upstreams(target.where)):
        each.close()
    assert len(left) == 5


def test_a_generation_that_becomes_empty_is_told_once(driver: Driver) -> None:
    driver.target()
    begin(driver, 2)
    assert driver.relay.end_some(driver.generation, 1) == 1
    assert driver.relay.run(0) & RUN_EMPTIED == 0
    assert driver.relay.end_some(driver.generation, 1) == 0
    assert driver.relay.run(0) & RUN_EMPTIED
    assert driver.relay.run(0) & RUN_EMPTIED == 0


def test_a_generation_with_sessions_is_not_dropped(driver: Driver) -> None:
    driver.target()
    begin(driver, 1)
    with pytest.raises(ValueError, match="has sessions"):
        driver.relay.drop_generation(driver.generation)
    driver.relay.end_some(driver.generation, 1)
    driver.relay.drop_generation(driver.generation)
    with pytest.raises(ValueError, match="no such generation"):
        driver.relay.drop_generation(driver.generation)


def test_numbers_are_used_again_and_begin_anew(driver: Driver) -> None:
    first = driver.target()
    begin(driver, 1)
    driver.relay.end_some(driver.generation, 1)
    driver.relay.drop_generation(driver.generation)
    driver.relay.drop_target(first.number)
    numbers = [driver.relay.add_generation(60.0, 60.0) for _ in range(9)]
    assert sorted(numbers) == list(range(9))
    assert driver.ended(driver.generation) == {}
    driver.relay.set_down(driver.target().number, True)
    assert driver.targets[-1] == first.number
    targets = [driver.target().number for _ in range(9)]
    assert sorted(targets) == list(range(1, 10))


def test_a_dropped_target_keeps_its_sessions(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    target.answer = echo
    client.say(b"one")
    driver.settle()
    driver.relay.drop_target(target.number)
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.drop_target(target.number)
    client.say(b"two")
    driver.settle()
    assert client.data == [b"one", b"two"]
    driver.client().say(b"newcomer")
    with pytest.raises(ValueError, match="no such target"):
        driver.settle()
    # Its number is free only when its last session is over.
    assert driver.relay.flows_to(target.number) == 1
    other = driver.relay.add_target("127.0.0.1", 9)
    assert other != target.number
    driver.relay.end_some(driver.generation, 9)
    assert driver.relay.add_target("127.0.0.1", 9) == target.number


def test_a_session_that_ended_is_not_heard(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    client.say(b"one")
    driver.settle()
    source = target.received[0].source
    target.send(b"too late", source)  # it is in the session's socket already
    driver.relay.end_some(driver.generation, 9)
    driver.settle()
    target.send(b"much too late", source)
    client.say(b"two")
    driver.settle()
    assert client.received == []
    assert target.data == [b"one", b"two"]
    assert target.received[1].source != source


def test_changes_differ_when_anything_has_changed(driver: Driver) -> None:
    target = driver.target()
    seen = {driver.relay.changes}

    def differs() -> bool:
        before = len(seen)
        seen.add(driver.relay.changes)
        return len(seen) == before + 1

    begin(driver, 2)
    assert differs()
    begin(driver, 1)
    driver.relay.end_some(driver.generation, 2)
    assert differs()
    driver.client().say(b"hi")
    driver.relay.end_some(driver.generation, 1)
    driver.settle()
    assert differs()
    driver.shut(target)
    driver.targets = [driver.relay.add_target("127.0.0.1", free_port())]
    begin(driver, 1)
    assert differs()
    driver.pump(lambda: driver.refusals)
    assert not differs()
    other = driver.target()
    assert driver.relay.move(driver.refusals[0].session, driver.generation, other.number)
    assert differs()


# Adopting


def test_another_generation_adopts_the_sessions_of_some_targets(driver: Driver) -> None:
    kept, left = driver.target(), driver.target()
    clients = [driver.client() for _ in range(4)]
    for place, client in enumerate(clients):
        driver.targets = [(kept, left)[place % 2].number]
        client.say(b"one")
        driver.settle()
    sources = [each.source for each in kept.received]
    old = driver.generation
    new = driver.relay.add_generation(60.0, 60.0)
    number = driver.relay.add_target(*kept.where)
    driver.relay.adopt(old, new, {kept.number: number})
    assert (driver.relay.sessions(old), driver.relay.sessions(new)) == (2, 2)
    driver.relay.drop_target(kept.number)
    for client in clients:
        client.say(b"two")
    driver.settle()
    assert [each.source for each in kept.received] == sources * 2
    kept.send(b"answer", sources[0])
    driver.settle()
    assert clients[0].data == [b"answer"]
    assert driver.relay.counters()["moved"] == 0
    # The old number is free, the new one is not.
    assert driver.relay.add_target("127.0.0.1", 9) == kept.number
    assert driver.relay.end_some(old, 9) == 0
    driver.relay.drop_generation(old)
    driver.relay.drop_target(number)
    # They live by the rules of those who have them.
    short = driver.relay.add_generation(0.3, 0.2)
    other = driver.relay.add_target(*kept.where)
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.adopt(new, short, {number: number})
    driver.relay.adopt(new, short, {number: other})
    assert driver.relay.sessions(new) == 0
    driver.pump(lambda: driver.relay.live == 0)
    assert driver.ended(short) == {"idle": 1, "unanswered": 1}


def test_what_adopting_refuses(driver: Driver) -> None:
    target = driver.target()
    begin(driver, 1)
    new = driver.relay.add_generation(60.0, 60.0)
    for former, generation in ((driver.generation, 9), (9, new)):
        with pytest.raises(ValueError, match="no such generation"):
            driver.relay.adopt(former, generation, {})
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.adopt(driver.generation, new, {target.number: 9})
    driver.relay.adopt(driver.generation, new, {})
    assert driver.relay.sessions(driver.generation) == 1


def test_sessions_without_affinity_are_not_adopted(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(60.0, 60.0, affinity=False)
    driver.decide = driver.spread
    target = driver.target()
    begin(driver, 1)
    new = driver.relay.add_generation(60.0, 60.0, affinity=False)
    driver.relay.adopt(driver.generation, new, {target.number: target.number})
    assert driver.relay.sessions(driver.generation) == 1


# Listeners


def test_a_listener_that_goes_ends_its_sessions(driver: Driver) -> None:
    target = driver.target()
    target.answer = echo
    stays, goes = driver.client(), driver.client(to="127.0.0.2")
    for client in (stays, goes):
        client.say(b"one")
    driver.settle()
    driver.relay.unlisten(driver.numbers[1])
    assert driver.ended() == {"removed": 1}
    with pytest.raises(ValueError, match="no such listener"):
        driver.relay.unlisten(driver.numbers[1])
    for client in (stays, goes):
        client.say(b"two")
    driver.settle()
    assert (stays.data, goes.data) == ([b"one", b"two"], [b"one"])
    # The number is used again, and what had come meanwhile is read.
    assert driver.relay.listen(driver.listeners[1].fileno()) == driver.numbers[1]
    driver.pump(lambda: len(goes.received) == 2)
    assert goes.data == [b"one", b"two"]


def test_many_listeners() -> None:
    addresses = [f"127.0.0.{number}" for number in range(1, 30)]
    with driving(*addresses) as driver:
        assert driver.numbers == list(range(29))
        driver.target().answer = echo
        client = driver.client()
        for address in addresses:
            client.send(address.encode(), (address, driver.port))
        driver.pump(lambda: len(client.received) == 29)
        assert all(each.data.decode() == each.source[0] for each in client.received)


def test_what_is_no_listener(driver: Driver) -> None:
    with socket.socket() as stream, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        for sock in (stream, local):
            with pytest.raises(OSError, match="no UDP socket"):
                driver.relay.listen(sock.fileno())
    with open(os.devnull) as file, pytest.raises(OSError, match="ocket operation on non-socket"):
        driver.relay.listen(file.fileno())
    for fd in (0xFFFFF, -1):
        with pytest.raises(OSError, match="Bad file descriptor"):
            driver.relay.listen(fd)
    with pytest.raises(FileExistsError):
        driver.relay.listen(driver.listeners[0].fileno())
    driver.relay.unlisten(driver.numbers[1])
    assert driver.relay.listen(driver.listeners[1].fileno()) == driver.numbers[1]


# Targets


@pytest.mark.parametrize("host", ["localhost", "", "1.2.3", "127.0.0.1:80", "::g", "é", "[::1]"])
def test_what_is_no_address(driver: Driver, host: str) -> None:
    with pytest.raises(ValueError, match="is not an IP address"):
        driver.relay.add_target(host, 80)


@needs_ipv6
def test_a_target_with_a_scope(driver: Driver) -> None:
    number = driver.relay.add_target("fe80::1", 9, 0xFFFF)
    driver.targets = [number]
    client = driver.client()
    client.say(b"hi")
    with pytest.raises(OSError, match=r"(No such device|Invalid argument|unreachable)"):
        driver.settle()  # there is no such interface
    assert driver.relay.live == 0


# The end


def test_a_relay_that_is_closed_ends_its_sessions() -> None:
    with driving() as driver:
        target, client = driver.target(), driver.client()
        client.say(b"hi")
        driver.settle()
        driver.decide = lambda newcomer: None
        newcomer = driver.client()
        newcomer.say(b"hi")
        driver.settle()
        assert len(driver.newcomers()) == 1
        before = open_descriptors()
        driver.relay.close()
        driver.relay.close()
        # The socket of the session, the epoll and the timer.
        assert open_descriptors() == before - 3
        assert driver.relay.closed
        assert target.data == [b"hi"]
        client.send(b"still open", client.to)
        assert driver.listeners[0].recv(100) in (b"still open", b"hi")


def test_a_relay_that_is_forgotten_leaves_nothing() -> None:
    before = open_descriptors()
    with driving("127.0.0.1") as driver:
        driver.target()
        begin(driver, 3)
        listener = driver.listeners[0].fileno()
        relay = Relay(SEED)
        relay.listen(listener)
        target = relay.add_target("127.0.0.1", 9)
        generation = relay.add_generation(1.0, 1.0)
        relay.restore(0, bytes(18), 0, bytes(16), generation, target, 0, False, 0.0, b"header")
        now = open_descriptors()
        del relay
        assert open_descriptors() == now - 3
    assert open_descriptors() == before


def test_a_closed_relay_still_counts() -> None:
    with driving() as driver:
        driver.target()
        begin(driver, 2)
        driver.relay.close()
        assert driver.ended() == {"removed": 2}
        assert driver.relay.live == 0


def test_a_socket_that_another_process_still_holds(driver: Driver) -> None:
    """A fork keeps the session's socket open: its events must not be taken for a session's."""
    target, client = driver.target(), driver.client()
    client.say(b"hi")
    driver.settle()
    (held,) = driver.upstreams(target.where)
    with held:
        driver.relay.end_some(driver.generation, 1)
        target.send(b"to nobody", target.received[0].source)
        assert not driver.has_work()
        driver.settle()
        assert held.recv(100) == b"to nobody"
    assert client.received == []


def test_two_relays_do_not_know_of_each_other() -> None:
    with driving() as one, driving() as two:
        first, second = one.target(), two.target()
        client = one.client()
        for driver, target in ((one, first), (two, second)):
            target.answer = echo
            client.send(b"%d" % driver.port, ("127.0.0.1", driver.port))
            driver.settle()
        one.pump(lambda: len(client.received) == 2)
        assert {each.source[1]: each.data for each in client.received} == {
            one.port: b"%d" % one.port,
            two.port: b"%d" % two.port,
        }
