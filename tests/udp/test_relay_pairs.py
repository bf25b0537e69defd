"""Ports that targets have too, and pairs of them: RTP and RTCP of one client are one session."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import SourcePorts
from kamal_proxy.udp.saved_sessions import ANSWERED, RECORD, SECOND
from tests.udp.calling import rtp, sender_report
from tests.udp.relaying import (
    Client,
    Driver,
    Newcomer,
    Target,
    driving,
    echo,
    end_of,
    free_range,
    open_descriptors,
    packed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET, OTHER = "127.0.0.2", "127.0.0.3"
RTP, RTCP = 0, 1


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving("127.0.0.1") as driver:
        use_media(driver)
        driver.decide = driver.pair_up
        yield driver


def use_media(driver: Driver, seconds: float = 60.0) -> None:
    driver.generation = driver.relay.add_generation(seconds, seconds, media=True)


def begin(driver: Driver, legs: tuple[Client, Client], targets: tuple[Target, Target]) -> None:
    """Begin a session with both halves, which the target answers."""
    for leg, target in zip(legs, targets, strict=True):
        target.answer = echo
        leg.say(b"begin")
        driver.settle()
        target.answer = None
        assert leg.data == [b"begin"]
        leg.received.clear()


def sources(targets: tuple[Target, Target]) -> list[tuple[str, int]]:
    """Return where the last datagrams of each half came from."""
    return [target.received[-1].source for target in targets]


def sessions(driver: Driver) -> list[int]:
    """Return the numbers of all sessions, the last one first."""
    driver.relay.begin_goodbye(driver.generation)
    return [session for session, *_ in driver.relay.goodbyes(driver.generation, 99)]


# One port each


def test_each_port_leads_to_the_same_port() -> None:
    with driving("127.0.0.1") as driver:
        low, high = free_range(3)
        targets = [driver.reopened(TARGET, port) for port in range(low, high + 1)]
        for target in targets:
            target.answer = echo
            driver.listen(target.where[1])
        driver.targets = [driver.relay.add_target(TARGET, 0)]
        clients = [driver.client() for _ in targets]
        for client, target in zip(clients, targets, strict=True):
            client.to = ("127.0.0.1", target.where[1])
            client.say(b"to %d" % target.where[1])
        driver.settle()
        for client, target in zip(clients, targets, strict=True):
            assert target.data == client.data == [b"to %d" % target.where[1]]
            assert client.received[0].source == client.to
        # The same client has a session on each port.
        clients[0].to = clients[1].to
        clients[0].say(b"and to another")
        driver.settle()
        assert targets[1].data[1:] == [b"and to another"]
        assert driver.relay.live == driver.relay.sockets == 4
        assert driver.relay.flows_to(driver.targets[0]) == 4
        assert driver.relay.pairs == 0


def test_a_record_has_the_port_of_the_listener(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    begin(driver, driver.caller(), targets)
    records = driver.relay.export(driver.generation, {driver.targets[0]: 0})
    found = sorted((record[4], record[5]) for record in RECORD.iter_unpack(records))
    assert found == [(port, port) for port in driver.pair]


@pytest.mark.parametrize("same_first", [True, False])
def test_the_same_address_by_another_name_has_other_source_ports(same_first: bool) -> None:
    """One service leads to a port by its number, another one by that of its listener."""
    ports = SourcePorts(*free_range(4))
    with driving("127.0.0.1") as one, driving("127.0.0.1") as other:
        target = one.reopened(TARGET, one.port)
        one.targets = [one.relay.add_target(TARGET, 0)]
        other.targets = [other.relay.add_target(*target.where)]
        clients = []
        for driver in (one, other) if same_first else (other, one):
            driver.relay.use_ports(ports)
            clients += [driver.client() for _ in range(2)]
            for client in clients[-2:]:
                client.say(b"%d" % client.where[1])
            driver.settle()
        target.read()
        assert len({each.source for each in target.received}) == 4
        for each in target.received:
            target.send(each.data, each.source)
        one.settle()
        other.settle()
        assert [client.data for client in clients] == [[b"%d" % c.where[1]] for c in clients]
        for driver in (one, other):
            driver.client().say(b"no port is left")
            with pytest.raises(OSError, match="annot assign requested address"):
                driver.settle()
        other.relay.end_some(other.generation, 9)
        one.client().say(b"now there are")
        one.settle()


# Who joins whom


@pytest.mark.parametrize("first", [RTP, RTCP])
def test_both_ports_of_a_client_are_one_session(driver: Driver, first: int) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    legs = driver.caller("127.0.0.7")
    driver.header = b"header "
    for half in (first, 1 - first):
        targets[half].answer = echo
        legs[half].say(b"hello", tos=0x88)
        legs[half].say(b"again")
        driver.settle()
    for half in (RTP, RTCP):
        assert targets[half].data == legs[half].data == [b"header hello", b"header again"]
        assert targets[half].received[0].tos == 0x88
        assert {each.source for each in legs[half].received} == {("127.0.0.1", driver.pair[half])}
    assert driver.relay.live == driver.relay.pairs == 1
    assert driver.relay.sessions(driver.generation) == 1
    assert driver.relay.sockets == driver.relay.flows_to(driver.targets[0]) == 2
    assert driver.relay.counters()["created"] == 1
    assert driver.relay.changes == 2  # there is more to save of it


@pytest.mark.parametrize("first", [RTP, RTCP])
def test_the_port_beside_is_preferred(driver: Driver, first: int) -> None:
    """Though another session of the address began later, and one earlier."""
    (targets,) = driver.listen_to_pair(TARGET)
    beside = free_range(2)
    callers = [driver.caller(), driver.caller("127.0.0.1", *beside), driver.caller()]
    for caller in callers:
        caller[first].say(b"begin")
        driver.settle()
    wanted = sessions(driver)[1]
    joined: list[object] = []

    def join(newcomer: Newcomer) -> None:
        joined.append(driver.relay.partner(newcomer.number))
        driver.relay.join(newcomer.number, wanted)

    driver.decide = join
    callers[1][1 - first].say(b"begin")
    driver.settle()
    assert joined == [(wanted, driver.generation, targets[0].number)]
    assert (driver.relay.live, driver.relay.pairs) == (3, 1)


@pytest.mark.parametrize("first", [RTP, RTCP])
def test_any_port_of_the_address_will_do(driver: Driver, first: int) -> None:
    """Address translation leaves no port beside the other; each session takes one half."""
    driver.listen_to_pair(TARGET)
    callers = [driver.caller() for _ in range(3)]
    for caller in callers:
        caller[first].say(b"begin")
    driver.settle()
    for caller in callers:
        caller[1 - first].say(b"begin")
        driver.settle()
    assert (driver.relay.live, driver.relay.pairs, driver.relay.sockets) == (3, 3, 6)
    driver.caller()[1 - first].say(b"begin")  # all are whole
    driver.settle()
    assert (driver.relay.live, driver.relay.pairs) == (4, 3)


def asked(driver: Driver) -> list[tuple[int, int, int] | None]:
    """Collect the partners of newcomers, and decide nothing."""
    told: list[tuple[int, int, int] | None] = []
    driver.decide = lambda newcomer: told.append(driver.relay.partner(newcomer.number))
    return told


def test_who_does_not_join(driver: Driver) -> None:
    driver.listen_to_pair(TARGET)
    first, other = driver.caller(), driver.caller("127.0.0.8")
    alone = driver.client()  # of a port that is not of a pair
    beside = driver.caller()
    for client in (first[RTP], alone):
        client.say(b"begin")
    driver.settle()
    told = asked(driver)
    for client in (other[RTCP], beside[RTP], driver.client()):
        client.say(b"hi")
        driver.settle()
    assert told == [None] * 3
    first[RTCP].say(b"hi")
    driver.settle()
    assert [each and each[0] for each in told[3:]] == [sessions(driver)[1]]


def test_sessions_of_no_media_and_of_no_target_have_one_port(driver: Driver) -> None:
    driver.listen_to_pair(TARGET, OTHER)
    plain, undecided = driver.caller("127.0.0.7"), driver.caller("127.0.0.8")
    media = driver.generation
    driver.generation = driver.relay.add_generation(60.0, 60.0)
    plain[RTP].say(b"begin")
    driver.settle()
    driver.generation = media
    driver.decide = driver.ask
    undecided[RTP].say(b"begin")
    driver.settle()
    assert driver.relay.pairs == 0
    told = asked(driver)
    for caller in (plain, undecided):
        caller[RTCP].say(b"hi")
    driver.settle()
    assert told == [None, None]


def test_what_is_restored_beside_another_session(driver: Driver) -> None:
    """A second half is that of the session before, if it may be; alone it is a session."""
    driver.listen_to_pair(TARGET, OTHER)
    first, other = driver.targets

    def restore(half: int, host: str, port: int, target: int, second: bool) -> tuple[int, int]:
        driver.relay.restore(
            driver.numbers[half], end_of((host, port)), 0, packed("127.0.0.1"), driver.generation,
            target, 0, True, 0.0, second=second,
        )  # fmt: skip
        return driver.relay.live, driver.relay.pairs

    assert restore(1 + RTP, "10.0.0.1", 6, first, True) == (1, 0)  # there is none before
    assert restore(1 + RTCP, "10.0.0.2", 7, first, True) == (2, 0)  # of another address
    assert restore(1 + RTCP, "10.0.0.2", 9, first, True) == (3, 0)  # of the same port
    assert restore(1 + RTP, "10.0.0.2", 8, other, True) == (4, 0)  # with another target
    assert restore(1 + RTCP, "10.0.0.2", 5, other, False) == (5, 0)  # it says so
    assert restore(0, "10.0.0.2", 4, other, True) == (6, 0)  # of no pair
    assert restore(1 + RTP, "10.0.0.3", 40, first, False) == (7, 0)
    assert restore(1 + RTCP, "10.0.0.3", 99, first, True) == (7, 1)
    assert restore(1 + RTCP, "10.0.0.3", 98, first, True) == (8, 1)  # it is whole


def test_the_other_half_of_what_could_not_be_restored(driver: Driver) -> None:
    """It joins no other session of its address."""
    driver.listen_to_pair(TARGET)

    def restore(half: int, port: int, second: bool) -> None:
        driver.relay.restore(
            driver.numbers[1 + half], end_of(("10.0.0.2", port)), 0, packed("127.0.0.1"),
            driver.generation, driver.targets[0], 0, True, 0.0, second=second,
        )  # fmt: skip

    restore(RTP, 6, False)
    with pytest.raises(ValueError, match="already"):
        restore(RTP, 6, False)
    restore(RTCP, 9, True)
    assert (driver.relay.live, driver.relay.pairs) == (2, 0)


def test_what_can_not_be_joined(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    begin(driver, driver.caller(), targets)
    (whole,) = sessions(driver)
    half = driver.caller("127.0.0.7")
    half[RTP].say(b"begin")
    driver.settle()
    session = sessions(driver)[0]
    assert session != whole
    told: list[Newcomer] = []
    driver.decide = told.append
    half[RTCP].say(b"hi")
    driver.turn()
    (newcomer,) = told
    for wrong in (whole, session + 1, session ^ 1 << 32):
        with pytest.raises(ValueError, match="or it is whole"):
            driver.relay.join(newcomer.number, wrong)
    with pytest.raises(ValueError, match="more than 52 bytes"):
        driver.relay.join(newcomer.number, session, bytes(53))
    used, (_, hard) = open_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            driver.relay.join(newcomer.number, session)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (open_descriptors(), driver.relay.pairs) == (used, 1)
    driver.relay.join(newcomer.number, session, b"header ")
    driver.settle()
    assert targets[RTCP].data[1:] == [b"header hi"]
    assert driver.relay.pairs == 2


def test_ports_may_be_paired_anew(driver: Driver) -> None:
    """A session that has both halves keeps them; the next one has the ports of the new pair."""
    (targets,) = driver.listen_to_pair(TARGET)
    alone, low, high = driver.numbers
    with pytest.raises(ValueError, match="has two listeners"):
        driver.relay.pair(alone, alone)
    with pytest.raises(ValueError, match="no such listener"):
        driver.relay.pair(alone, high + 1)
    old, new = driver.caller(), driver.caller("127.0.0.7")
    begin(driver, old, targets)
    driver.relay.pair(low, high)
    driver.relay.pair(high, alone)
    single = driver.client("127.0.0.7")
    for client in (new[RTP], new[RTCP], single, *old):
        client.say(b"hi")
        driver.settle()
    assert (driver.relay.live, driver.relay.pairs, driver.relay.sockets) == (3, 2, 5)
    assert len(targets[RTP].data) == len(targets[RTCP].data) == 3
    driver.relay.unlisten(high)
    assert (driver.relay.live, driver.relay.pairs) == (1, 0)
    driver.relay.pair(alone, low)
    driver.client("127.0.0.7").say(b"hi")
    driver.settle()
    assert (driver.relay.live, driver.relay.pairs) == (1, 1)


@pytest.mark.parametrize("reason", ["session_limit", "paused"])
def test_the_other_half_is_no_further_session(driver: Driver, reason: str) -> None:
    """It joins though there may be no further one; a newcomer does not."""
    (targets,) = driver.listen_to_pair(TARGET)
    for target in targets:
        target.answer = echo
    legs = driver.caller()
    legs[RTP].say(b"begin")
    driver.settle()
    if reason == "paused":
        driver.relay.mode = 1
    else:
        driver.relay.limit = 1
    for client in (driver.caller("127.0.0.7")[RTCP], driver.client(), legs[RTCP]):
        client.say(b"hi")
        driver.settle()
    assert (driver.relay.live, driver.relay.pairs) == (1, 1)
    assert legs[RTCP].data == [b"hi"]
    assert driver.dropped() == {reason: 2}


def test_two_for_one_half_in_a_pause(driver: Driver) -> None:
    """One joins; the other one would be a further session."""
    driver.listen_to_pair(TARGET)
    driver.caller()[RTP].say(b"begin")
    driver.settle()
    driver.relay.mode = 1
    for leg in (driver.caller()[RTCP], driver.caller()[RTCP]):
        leg.say(b"hi")
        leg.say(b"hi")
    driver.settle()
    assert (driver.relay.live, driver.relay.pairs) == (1, 1)
    assert driver.dropped() == {"paused": 2}


def test_few_are_looked_at_while_there_is_no_room(driver: Driver) -> None:
    """For each datagram of a flood; the half from the port beside is found at once."""
    driver.listen_to_pair(TARGET)
    one, _ = free_range(2)
    halves = [(driver.numbers[1 + RTP], port) for port in (one, one - 2)]
    others = [(driver.numbers[0], 100 + place) for place in range(40)]
    for listener, port in (*halves, *others):
        driver.relay.restore(
            listener, end_of(("127.0.0.7", port)), 0, packed("127.0.0.1"), driver.generation,
            driver.targets[0], 0, True, 0.0,
        )  # fmt: skip
    driver.relay.limit = driver.relay.live
    anywhere, beside = (
        driver.caller("127.0.0.7")[RTCP],
        driver.caller("127.0.0.7", 0, one + 1)[RTCP],
    )
    for leg in (anywhere, beside):
        leg.say(b"hi")
        driver.settle()
    assert driver.dropped() == {"session_limit": 1}
    assert driver.relay.pairs == 1
    driver.relay.limit += 1
    anywhere.say(b"hi")
    driver.settle()
    assert driver.relay.pairs == 2


def test_pairs_are_found_among_many() -> None:
    """Also after the table has grown; each client has two sessions."""
    with driving("127.0.0.1", sockets=False) as driver:
        use_media(driver)
        driver.listen_to_pair(TARGET)
        ends = [(f"10.1.{each >> 8}.{each & 255}", port) for each in range(700) for port in (7, 9)]

        def restore(half: int, end: tuple[str, int], *, second: bool = False) -> None:
            driver.relay.restore(
                driver.numbers[1 + half], end_of(end), 0, packed("127.0.0.1"), driver.generation,
                driver.targets[0], 0, True, 0.0, second=second,
            )  # fmt: skip

        for host, port in ends:
            restore(RTP, (host, port))
            restore(RTCP, (host, port + 1), second=True)
        assert driver.relay.live == driver.relay.pairs == len(ends) == 1400
        assert driver.relay.sockets == 2800
        for host, port in ends:
            for half in (RTP, RTCP):
                with pytest.raises(ValueError, match="already"):
                    restore(half, (host, port + half))
        assert driver.relay.end_some(driver.generation, 700) == driver.relay.pairs == 700
        assert driver.relay.sockets == 1400


# One life


def test_either_half_keeps_both_alive(driver: Driver) -> None:
    use_media(driver, 1.0)
    (targets,) = driver.listen_to_pair(TARGET)
    callers = [driver.caller(f"127.0.0.{number}") for number in (7, 8, 9, 10)]
    ways = []
    for caller in callers:
        begin(driver, caller, targets)
        ways.append(sources(targets))
    for _ in range(3):
        driver.wait_for(0.5)
        callers[0][RTP].say(b"still here")
        callers[1][RTCP].say(b"still here")
        targets[RTCP].send(b"so am I", ways[2][RTCP])
        driver.settle()
    assert driver.ended(driver.generation) == {"idle": 1}
    assert (driver.relay.pairs, driver.relay.sockets) == (3, 6)
    for target in targets:
        target.received.clear()
    for caller in callers[:3]:
        for leg in caller:
            leg.say(b"both are left")
    driver.settle()
    assert [sorted(target.data) for target in targets] == [[b"both are left"] * 3] * 2
    # The fourth is new to the relay.
    told = asked(driver)
    for leg in callers[3]:
        leg.say(b"and I?")
        driver.settle()
    assert told == [None, None]


def test_closed_ports_for_rtcp_end_nothing(driver: Driver) -> None:
    """Many do not listen there; a closed port for RTP ends the session, as without a pair."""
    (targets,) = driver.listen_to_pair(TARGET)
    deaf, gone, there = (driver.caller(f"127.0.0.{number}") for number in (7, 8, 9))
    ways = []
    for caller in (deaf, gone, there):
        begin(driver, caller, targets)
        ways.append(sources(targets))
    driver.shut(deaf[RTCP])
    driver.shut(gone[RTP])
    targets[RTCP].send(sender_report(1), ways[0][RTCP])
    targets[RTP].send(rtp(1), ways[1][RTP])
    driver.shut(targets[RTCP])
    for _ in range(3):
        there[RTCP].say(sender_report(2))
        driver.settle()
    driver.pump(lambda: driver.relay.live < 3)
    driver.wait_for(0.3)
    assert driver.ended(driver.generation) == {"client_gone": 1}
    assert driver.refusals == []
    targets[RTP].send(b"is anybody there?", ways[0][RTP])
    there[RTP].say(b"I am")
    driver.settle()
    assert deaf[RTP].data == [b"is anybody there?"]
    assert targets[RTP].data[-1] == b"I am"
    driver.shut(targets[RTP])
    there[RTP].say(b"refused")
    driver.settle()
    assert [refusal.target for refusal in driver.refusals] == [targets[RTP].number]


@pytest.mark.parametrize("half", [RTP, RTCP])
@pytest.mark.parametrize("first", [RTP, RTCP])
def test_both_end_with_the_port_of_either(driver: Driver, half: int, first: int) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    caller, alone = driver.caller(), driver.caller("127.0.0.7")
    for leg in (caller[first], caller[1 - first], alone[1 - half]):
        leg.say(b"begin")
        driver.settle()
    driver.relay.unlisten(driver.numbers[1 + half])
    assert driver.ended(driver.generation) == {"removed": 1}
    assert (driver.relay.live, driver.relay.pairs, driver.relay.sockets) == (1, 0, 1)
    # What is left of the pair has sessions of its own.
    caller[1 - half].say(b"hello?")
    driver.settle()
    assert targets[1 - half].data[-1] == b"hello?"
    assert (driver.relay.live, driver.relay.pairs) == (2, 0)


def test_both_are_cut_together(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    caller = driver.caller()
    begin(driver, caller, targets)
    (session,) = sessions(driver)
    assert driver.relay.end(session) is True
    assert driver.relay.end(session) is False
    assert driver.ended() == {"cut": 1}
    assert (driver.relay.live, driver.relay.sockets) == (0, 0)
    assert driver.relay.assign(session, driver.generation) is False
    targets[RTP].send(b"to nobody", sources(targets)[RTP])
    driver.settle()
    assert caller[RTP].data == []
    begin(driver, caller, targets)
    assert driver.relay.pairs == 1


def test_a_session_is_assigned_with_both_halves(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    caller = driver.caller()
    begin(driver, caller, targets)
    former = driver.generation
    use_media(driver)
    driver.relay.begin_goodbye(former)
    ((session, *_),) = driver.relay.goodbyes(former, 9)
    assert driver.relay.assign(session, driver.generation) is True
    assert driver.relay.assign(session, driver.generation) is True
    assert (driver.relay.sessions(former), driver.relay.sessions(driver.generation)) == (0, 1)
    assert driver.relay.pairs == 1
    caller[RTCP].say(b"still here")
    driver.settle()
    assert targets[RTCP].data[-1] == b"still here"
    driver.relay.drop_generation(former)
    driver.relay.end_some(driver.generation, 9)
    assert driver.relay.sockets == 0


def test_both_are_adopted(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    caller = driver.caller()
    begin(driver, caller, targets)
    former, number = driver.generation, driver.targets.pop()
    use_media(driver)
    again = driver.relay.add_target(TARGET, 0)
    driver.relay.adopt(former, driver.generation, {number: again})
    driver.relay.drop_target(number)
    driver.relay.drop_generation(former)
    assert driver.relay.flows_to(again) == 2
    with pytest.raises(ValueError, match="no such target"):
        driver.relay.flows_to(number)
    for leg in caller:
        leg.say(b"still here")
    driver.settle()
    assert [target.data[-1] for target in targets] == [b"still here"] * 2


# Moving


def test_both_halves_move(driver: Driver) -> None:
    old, new = driver.listen_to_pair(TARGET, OTHER)
    caller = driver.caller()
    begin(driver, caller, old)
    (session,) = sessions(driver)
    for target in new:
        target.answer = echo
    assert driver.relay.move(session, driver.generation, new[RTP].number) is True
    ways = sources(old)
    for half in (RTP, RTCP):
        old[half].send(b"late", ways[half])
        caller[half].say(b"%d" % half)
    driver.settle()
    for half in (RTP, RTCP):
        assert caller[half].data == new[half].data == [b"%d" % half]
        assert old[half].data == [b"begin"]
    assert (driver.relay.live, driver.relay.pairs, driver.relay.sockets) == (1, 1, 2)
    assert driver.relay.flows_to(old[RTP].number) == 0
    assert driver.relay.counters()["moved"] == 1


def test_no_half_moves_alone(driver: Driver) -> None:
    """With one descriptor left the second half has no new socket; the first keeps its old one."""
    old, new = driver.listen_to_pair(TARGET, OTHER)
    caller = driver.caller()
    begin(driver, caller, old)
    ways = sources(old)
    (session,) = sessions(driver)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = open_descriptors()
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            driver.relay.move(session, driver.generation, new[RTP].number)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == used
    assert driver.relay.flows_to(new[RTP].number) == 0
    for half in (RTP, RTCP):
        caller[half].say(b"still here")
        old[half].send(b"me too", ways[half])
    driver.settle()
    for half in (RTP, RTCP):
        assert old[half].data[-1] == b"still here"
        assert caller[half].data == [b"me too"]
    assert sources(old) == ways
    assert driver.relay.move(session, driver.generation, new[RTP].number) is True


def test_a_pair_that_is_refused_is_told_once(driver: Driver) -> None:
    """Though its RTCP had been refused before RTP came, which was too: it moves as a whole."""
    old, new = driver.listen_to_pair(TARGET, OTHER)
    for target in (*old, *new):
        driver.shut(target)
    voice, control = driver.caller("127.0.0.1", *free_range(2))
    control.say(sender_report(1))
    driver.turn()  # admitted, and refused meanwhile
    for _ in range(2):
        voice.say(rtp(1))
    driver.turn()  # what RTP sends second is told of the first
    assert driver.relay.pairs == 1
    (refusal,) = driver.refusals
    (session,) = sessions(driver)
    assert (refusal.session, refusal.moves) == (session, 0)
    assert (refusal.client, refusal.local) == (end_of(control.where), end_of(control.to))
    # Whichever half is refused next, the session is told by its first one.
    assert driver.relay.move(session, driver.generation, new[RTP].number)
    driver.refusals.clear()
    driver.settle()
    for count in (1, 2):
        driver.refusals.clear()
        voice.say(rtp(1))
        driver.pump(lambda: driver.refusals)
        (again,) = driver.refusals
        assert again._replace(span=0.0) == refusal._replace(
            target=new[RTP].number, moves=1, refusals=count
        )


# Sessions that outlive the process


def test_pairs_are_saved_and_restored(driver: Driver) -> None:
    """Two clients of one address, and a third one: each half finds its own session again."""
    (targets,) = driver.listen_to_pair(TARGET)
    callers = [driver.caller(), driver.caller(), driver.caller("127.0.0.7")]
    ways = []
    for caller in callers:
        begin(driver, caller, targets)
        ways.append(sources(targets))
    alone = driver.caller("127.0.0.8")
    alone[RTCP].say(b"begin")
    driver.settle()
    records = driver.relay.export(driver.generation, {driver.targets[0]: 3})
    assert len(records) == 7 * RECORD.size
    driver.relay.end_some(driver.generation, 9)
    use_media(driver)
    for record in RECORD.iter_unpack(records):
        client, local, _, client_port, port, _, source_port, *_ = record
        driver.relay.restore(
            driver.numbers[1 + driver.pair.index(port)], client + client_port.to_bytes(2), 0,
            local, driver.generation, driver.targets[0], source_port, bool(record[11] & ANSWERED),
            0.0, second=bool(record[11] & SECOND),
        )  # fmt: skip
    assert (driver.relay.live, driver.relay.pairs, driver.relay.sockets) == (4, 3, 7)
    for half in (RTP, RTCP):
        targets[half].received.clear()
        for caller, way in zip(callers, ways, strict=True):
            caller[half].say(b"%d" % way[half][1])
            targets[half].send(b"%d" % caller[half].where[1], way[half])
    driver.settle()
    for half in (RTP, RTCP):
        assert sorted(targets[half].data) == sorted(b"%d" % way[half][1] for way in ways)
        assert [caller[half].data for caller in callers] == [
            [b"%d" % caller[half].where[1]] for caller in callers
        ]


# Many listeners end at once


def test_many_ports_are_given_up_at_once(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair(TARGET)
    alone, rtp_number, rtcp_number = driver.numbers
    caller, waits, stays = driver.caller(), driver.caller("127.0.0.7"), driver.client()
    begin(driver, caller, targets)
    stays.say(b"begin")
    driver.settle()
    told = asked(driver)
    waits[RTP].say(b"hi")
    waits[RTP].say(b"hi")
    driver.turn()
    assert told == [None]
    with pytest.raises(ValueError, match="no such listener"):
        driver.relay.unlisten_all([rtp_number, rtcp_number + 9])
    assert driver.relay.live == 2
    driver.relay.unlisten_all([])
    driver.relay.unlisten_all([rtcp_number, rtp_number, rtcp_number])
    assert driver.ended(driver.generation) == {"removed": 1}
    assert (driver.relay.live, driver.relay.pairs, driver.relay.sockets) == (1, 0, 1)
    # What the newcomer said is dropped, even if its listener's number is used again at once.
    again = driver.relay.listen(driver.listeners[1].fileno())
    assert again == rtp_number
    assert driver.relay.newcomers() == []
    with pytest.raises(ValueError, match="no such newcomer"):
        driver.relay.admit(0, driver.generation, driver.targets)
    assert driver.dropped() == {"newcomer_backlog": 2}
    driver.relay.pair(again, alone)
