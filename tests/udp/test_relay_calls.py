"""What the relay learns of calls, how they end by themselves, and whom it says goodbye to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ports import free_port
from tests.udp.calling import (
    ALERT,
    HANDSHAKE,
    answering,
    bye,
    described,
    error,
    garbled,
    packet,
    receiver_report,
    record,
    request,
    rtp,
    sender_report,
    success,
)
from tests.udp.relaying import Client, Driver, Target, driving, end_of, packed

if TYPE_CHECKING:
    from collections.abc import Iterator

RTP, RTCP = 0, 1
NAME = b"someone@example.com"
REASON = packet(203, 1, bytes(4) + b"\6please\0")


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving("127.0.0.1") as driver:
        driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
        driver.decide = driver.pair_up
        yield driver


class Call:
    """A session of one port, and its two ends."""

    def __init__(self, driver: Driver) -> None:
        self.target: Target = driver.target()
        self.client: Client = driver.client()
        driver.targets = [self.target.number]
        self.client.say(b"begin")
        driver.settle()
        self.way = self.target.received.pop().source
        self.number = known(driver)[0][0]
        self._driver = driver

    def client_says(self, *said: bytes) -> None:
        for data in said:
            self.client.say(data)
        self._driver.settle()

    def target_says(self, *said: bytes) -> None:
        for data in said:
            self.target.send(data, self.way)
        self._driver.settle()


Goodbye = tuple[int, bool, tuple[int, ...], bytes, tuple[int, ...], bytes]


def known(driver: Driver, generation: int | None = None) -> list[Goodbye]:
    """Return all that is known of all calls, the last one first."""
    chosen = driver.generation if generation is None else generation
    driver.relay.begin_goodbye(chosen)
    return driver.relay.goodbyes(chosen, 999)


# Sources and names


def test_each_side_has_its_sources(driver: Driver) -> None:
    call = Call(driver)
    assert known(driver) == [(call.number, False, (), b"", (), b"")]
    call.client_says(rtp(5), rtp(5), rtp(0), rtp(5), rtp(0xFFFF_FFFF))
    call.target_says(sender_report(9) + described(9, NAME), rtp(8))
    call.client_says(receiver_report(6) + described(6, b"x"), described(6, b"later"))
    ((_, encrypted, ours, name, theirs, their_name),) = known(driver)
    assert (ours, name) == ((5, 0, 0xFFFF_FFFF, 6), b"x")
    assert (theirs, their_name) == ((9, 8), NAME)
    assert not encrypted


def test_both_ports_of_a_pair_tell_of_one_call(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair("127.0.0.2")
    legs = driver.caller()
    legs[RTP].say(rtp(1))
    driver.settle()
    legs[RTCP].say(sender_report(2) + described(2, b"client"))
    driver.settle()
    targets[RTCP].send(receiver_report(3), targets[RTCP].received[0].source)
    targets[RTP].send(rtp(4), targets[RTP].received[0].source)
    driver.settle()
    ((_, _, ours, name, theirs, their_name),) = known(driver)
    assert (ours, name, sorted(theirs), their_name) == ((1, 2), b"client", [3, 4], b"")


@pytest.mark.parametrize("segment", [0, len(rtp(1))])
def test_what_begins_a_session_is_learned_from(driver: Driver, segment: int) -> None:
    driver.target()
    client = driver.client()
    said = [rtp(number) for number in (7, 8, 9)]
    for data in [b"".join(said)] if segment else said:
        client.say(data, segment=segment)
    driver.settle()
    assert known(driver)[0][2] == (7, 8, 9)


def test_so_many_sources_are_remembered(driver: Driver) -> None:
    """As many as one BYE can name; each once, in the order they were heard."""
    call = Call(driver)
    call.client_says(*[rtp(1000 + number) for number in range(100)], rtp(1000))
    call.target_says(b"".join(receiver_report(2000 + number) for number in range(50)))
    ((_, _, ours, _, theirs, _),) = known(driver)
    assert ours == tuple(range(1000, 1031))
    assert theirs == tuple(range(2000, 2031))


def test_long_and_empty_names(driver: Driver) -> None:
    call = Call(driver)
    call.client_says(receiver_report(1) + described(1, b""))
    call.client_says(receiver_report(1) + described(1, b"n" * 255))
    call.target_says(receiver_report(1) + packet(202, 1, b"\0\0\0\1\2\1x\1\xffshort\0\0"))
    ((_, _, _, name, _, their_name),) = known(driver)
    assert (name, their_name) == (b"n" * 255, b"")


def test_plain_sessions_are_not_looked_at(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(60.0, 60.0)
    driver.target()
    client = driver.client()
    client.say(sender_report(1) + described(1, NAME))
    client.say(sender_report(1) + bye(1))
    driver.settle()
    assert known(driver) == []
    assert driver.relay.live == 1


# What is encrypted


@pytest.mark.parametrize(
    ("ours", "theirs", "encrypted"),
    [
        ((), (), False),
        ((rtp(1), sender_report(1)), (rtp(2),), False),
        ((garbled(1),), (), True),
        ((), (garbled(1),), True),
        ((sender_report(1), garbled(1)), (), False),  # somebody's fault, or a stranger's
        ((sender_report(1), garbled(1)), (garbled(2),), True),
        ((record(HANDSHAKE, 0),), (), False),  # a stranger's, as long as the target does not answer
        ((record(HANDSHAKE, 0),), (record(HANDSHAKE, 0),), True),
        ((request(),), (), False),
        ((request(),), (error(401),), False),
        ((request(),), (success(),), True),
        ((success(),), (), False),
    ],
)
def test_what_counts_as_encrypted(
    driver: Driver, ours: tuple[bytes, ...], theirs: tuple[bytes, ...], encrypted: bool
) -> None:
    call = Call(driver)
    call.client_says(*ours)
    call.target_says(*theirs)
    assert known(driver)[0][1] is encrypted


# Calls that end by themselves


def test_hints_that_silence_confirms(driver: Driver) -> None:
    """And hints that it does not: the other side goes on, or not all of a side have left."""
    calls = {
        reason: Call(driver)
        for reason in (
            *("all left", "their side left", "closed", "closed by them", "gone"),
            *("talks on", "listens on", "some left", "came back", "too early", "nothing said"),
            *("nobody known", "no DTLS"),
        )
    }
    both = receiver_report(1) + bye(1, 2)
    calls.pop("nobody known").client_says(bye(1))
    calls.pop("no DTLS").client_says(receiver_report(1), record(ALERT))
    for call in calls.values():
        call.client_says(rtp(1), rtp(2))
        call.target_says(rtp(3))
    for reason in ("all left", "talks on", "listens on"):
        calls[reason].client_says(both)
    calls["came back"].client_says(receiver_report(1) + bye(1), rtp(1), receiver_report(2) + bye(2))
    calls["some left"].client_says(receiver_report(1) + bye(1, 3))
    calls["their side left"].target_says(receiver_report(3) + bye(3, 99))
    calls["closed"].client_says(record(HANDSHAKE) + record(ALERT))
    calls["closed by them"].target_says(record(ALERT))
    calls["too early"].target_says(record(ALERT, 0), record(HANDSHAKE), garbled(3) + bye(3))
    driver.shut(calls["gone"].client)
    calls["gone"].target_says(rtp(3))
    for _ in range(4):
        driver.wait_for(0.55)
        calls["talks on"].client_says(rtp(7))
        calls["listens on"].target_says(rtp(3))
        calls["gone"].target_says(rtp(3))
    driver.wait_for(0.1)
    left = {reason for reason, call in calls.items() if driver.relay.assign(call.number, 0)}
    assert left == {
        *("talks on", "listens on", "some left", "came back", "too early", "nothing said")
    }
    assert driver.ended(driver.generation) == {"bye": 2, "dtls_closed": 2, "client_gone": 1}


def test_a_hint_that_was_wrong_is_not_in_the_way(driver: Driver) -> None:
    """The client's port is open again, and then it hangs up."""
    call = Call(driver)
    driver.shut(call.client)
    call.target_says(rtp(3))
    driver.wait_for(0.1)
    call.client = driver.client(*call.client.where)
    call.client_says(rtp(1))
    call.client_says(receiver_report(1) + bye(1))
    driver.pump(lambda: driver.relay.live == 0)
    assert driver.ended(driver.generation) == {"bye": 1}


def test_a_target_that_takes_over_leaves_alone(driver: Driver) -> None:
    """The sources of the former one say BYE no more, and nobody says it for them."""
    call, other = Call(driver), driver.target()
    call.target_says(rtp(3), sender_report(4) + described(4, NAME))
    assert driver.relay.move(call.number, driver.generation, other.number)
    call.client_says(rtp(1))
    call.way = other.received[-1].source
    call.target = other
    call.target_says(rtp(5))
    assert known(driver) == [(call.number, False, (1,), b"", (5,), b"")]
    call.target_says(receiver_report(5) + bye(5))
    driver.pump(driver.ended)
    assert driver.ended(driver.generation) == {"bye": 1}


def test_who_has_nobody_any_more_is_gone_once(driver: Driver) -> None:
    """A BYE in a train of reports, the sources known from reports only, on both ports of a pair."""
    (targets,) = driver.listen_to_pair("127.0.0.2")
    legs = driver.caller()
    for leg in legs:
        leg.say(b"begin")
        driver.settle()
    legs[RTCP].say(sender_report(1) + receiver_report(2))
    legs[RTCP].say(receiver_report(1) + receiver_report(2) + bye(1) + bye(2))
    driver.settle()
    assert driver.relay.live == 1
    driver.pump(lambda: driver.relay.live == 0)
    assert driver.ended(driver.generation) == {"bye": 1}
    assert driver.relay.sockets == 0
    assert len(targets[RTCP].received) == 3


def consenting(driver: Driver, idle: float) -> tuple[int, Client, Target]:
    """Begin an ICE session whose client was last heard so many seconds ago."""
    target, client = driver.target(), driver.client()
    port = free_port()
    driver.relay.restore(
        driver.numbers[0], end_of(client.where), 0, packed("127.0.0.1"), driver.generation,
        target.number, port, True, idle,
    )  # fmt: skip
    target.send(success(), ("127.0.0.1", port))
    driver.settle()
    assert client.data == [success()]
    return known(driver)[0][0], client, target


def test_consent_lapses(driver: Driver) -> None:
    """A client of ICE that has been silent for 30 seconds is gone, though its target goes on."""
    generation = driver.relay.add_generation(60.0, 60.0, media=True)
    gone, _, target = consenting(driver, 29.6)
    asks, client, _ = consenting(driver, 29.6)
    plain = Call(driver).number
    for session in (gone, asks, plain):
        # Deadlines are looked at when they come, or when something changes.
        assert driver.relay.assign(session, generation)
    client.say(request())
    driver.settle()
    driver.pump(driver.ended)
    assert driver.ended(generation) == {"consent_lapsed": 1}
    assert driver.relay.flows_to(target.number) == 0
    assert driver.relay.live == 2
    driver.wait_for(0.3)
    assert driver.relay.live == 2


def test_no_consent_is_asked_of_others(driver: Driver) -> None:
    """A session that is no ICE's may be one-sided for as long as it likes."""
    generation = driver.relay.add_generation(60.0, 60.0, media=True)
    target, port = driver.target(), free_port()
    client = driver.client()
    driver.relay.restore(
        driver.numbers[0], end_of(client.where), 0, packed("127.0.0.1"), driver.generation,
        target.number, port, True, 35.0,
    )  # fmt: skip
    target.send(rtp(1), ("127.0.0.1", port))
    driver.settle()
    assert driver.relay.assign(known(driver)[0][0], generation)
    driver.wait_for(0.3)
    assert client.data == [rtp(1)]
    assert driver.relay.live == 1


# Goodbyes


def test_goodbyes_go_through_all_sessions(driver: Driver) -> None:
    """A few at a time; who comes meanwhile is left out, who has ended is not told of."""
    calls = [Call(driver) for _ in range(7)]
    driver.relay.begin_goodbye(driver.generation)
    numbers = [call.number for call in reversed(calls)]
    found = [session for session, *_ in driver.relay.goodbyes(driver.generation, 2)]
    assert found == numbers[:2]
    meanwhile = driver.client()
    meanwhile.say(b"begin")
    driver.settle()
    # The next one ends, and one that was told of, and one further on goes elsewhere.
    other = driver.relay.add_generation(60.0, 60.0)
    assert driver.relay.end(numbers[2])
    assert driver.relay.end(numbers[0])
    assert driver.relay.assign(numbers[4], other)
    found = [session for session, *_ in driver.relay.goodbyes(driver.generation, 9)]
    assert found == [numbers[3], numbers[5], numbers[6]]
    assert driver.relay.goodbyes(driver.generation, 9) == []
    assert driver.relay.goodbyes(driver.generation, 0) == []
    assert len(known(driver)) == 5
    driver.relay.begin_goodbye(driver.generation)
    driver.relay.end_some(driver.generation, 9)
    assert driver.relay.goodbyes(driver.generation, 9) == []


def test_a_goodbye_goes_by_the_second_port(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair("127.0.0.2")
    legs = driver.caller()
    driver.header = b"header "
    for leg in legs:
        leg.say(b"begin")
        driver.settle()
    ((session, *_),) = known(driver)
    assert driver.relay.say_goodbye(session, bye(1), REASON) is True
    driver.settle()
    assert [leg.data for leg in legs] == [[], [bye(1)]]
    assert legs[RTCP].received[0].source == ("127.0.0.1", driver.pair[RTCP])
    assert [target.data[1:] for target in targets] == [[], [b"header " + REASON]]
    assert targets[RTCP].received[1].source == targets[RTCP].received[0].source
    # Either side may be spared.
    assert driver.relay.say_goodbye(session, b"", bye(2)) is True
    assert driver.relay.say_goodbye(session, bye(3), b"") is True
    driver.settle()
    assert targets[RTCP].data[2:] == [b"header " + bye(2)]
    assert legs[RTCP].data[1:] == [bye(3)]


@pytest.mark.parametrize("side", ["client", "target"])
def test_a_goodbye_goes_by_the_port_that_carries_both(driver: Driver, side: str) -> None:
    """RTCP was seen there (RFC 5761)."""
    call = Call(driver)
    assert driver.relay.say_goodbye(call.number, bye(1), bye(2)) is False
    call.client_says(rtp(1))
    assert driver.relay.say_goodbye(call.number, bye(1), bye(2)) is False
    if side == "client":
        call.client_says(receiver_report(1))
    else:
        call.target_says(receiver_report(1))
    call.client.received.clear()
    assert driver.relay.say_goodbye(call.number, bye(1), bye(2)) is True
    driver.settle()
    assert (call.client.data, call.target.data[-1]) == ([bye(1)], bye(2))
    assert call.target.received[-1].source == call.way
    assert driver.relay.end(call.number)
    assert driver.relay.say_goodbye(call.number, bye(1), bye(2)) is False


def test_a_pair_that_carries_both_on_one_port(driver: Driver) -> None:
    """The second port is open, and RTCP still goes by the first."""
    (targets,) = driver.listen_to_pair("127.0.0.2")
    legs = driver.caller()
    for leg in legs:
        leg.say(b"begin")
        driver.settle()
    legs[RTP].say(receiver_report(1))
    driver.settle()
    assert driver.relay.say_goodbye(known(driver)[0][0], bye(1), bye(2)) is True
    driver.settle()
    assert [leg.data for leg in legs] == [[bye(1)], []]
    assert [target.data[-1] for target in targets] == [bye(2), b"begin"]


def test_a_call_of_the_second_port_alone(driver: Driver) -> None:
    (targets,) = driver.listen_to_pair("127.0.0.2")
    legs = driver.caller()
    legs[RTCP].say(b"begin")
    driver.settle()
    assert driver.relay.say_goodbye(known(driver)[0][0], bye(1), bye(2)) is True
    driver.settle()
    assert (legs[RTCP].data, targets[RTCP].data[1:]) == ([bye(1)], [bye(2)])


def test_where_a_goodbye_went_by_before_its_target_was_found(driver: Driver) -> None:
    """What a client said to nobody says nothing of its call."""
    targets = [driver.target(), driver.target()]
    targets[1].answer = answering(success())
    client = driver.client()
    driver.decide = driver.ask
    client.say(rtp(1))
    client.say(receiver_report(1))
    driver.settle()
    client.say(request())
    driver.settle()
    ((session, encrypted, *_),) = known(driver)
    assert encrypted
    assert driver.relay.say_goodbye(session, bye(1), bye(1)) is False
    client.say(receiver_report(1))
    driver.settle()
    assert driver.relay.say_goodbye(session, bye(1), bye(1)) is True


def test_long_goodbyes(driver: Driver) -> None:
    call = Call(driver)
    call.client_says(receiver_report(1))
    for wrong in ((bytes(1473), b""), (b"", bytes(1473))):
        with pytest.raises(ValueError, match="at most 1472 bytes"):
            driver.relay.say_goodbye(call.number, *wrong)
    assert driver.relay.say_goodbye(call.number, bytes(1472), bytes(1472)) is True
    driver.settle()
    assert call.client.data == [bytes(1472)]
    assert call.target.data[-1] == bytes(1472)


def test_nobody_is_there_for_a_goodbye(driver: Driver) -> None:
    """Closed ports at both ends: it was said all the same, and the sockets tell of it later."""
    call, other = Call(driver), Call(driver)
    call.client_says(receiver_report(1))
    driver.shut(call.client)
    driver.shut(call.target)
    for _ in range(3):
        assert driver.relay.say_goodbye(call.number, bye(1), bye(2)) is True
        driver.settle()
    other.client_says(rtp(1))
    other.target_says(rtp(2))
    assert (other.client.data, other.target.data) == ([rtp(2)], [rtp(1)])


def test_a_hurried_session_ends_when_it_is_silent(driver: Driver) -> None:
    """Also one that begins in a hurry, or comes from another generation; others have time."""
    talks, listens, silent = (Call(driver) for _ in range(3))
    calm = driver.generation
    other = Call(driver)
    driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
    elsewhere = Call(driver)
    driver.relay.hurry(calm)
    driver.relay.hurry(calm)
    assert driver.relay.assign(elsewhere.number, calm)
    assert driver.relay.assign(other.number, driver.generation)
    driver.generation, later = calm, driver.generation
    late = Call(driver)
    for _ in range(4):
        driver.wait_for(0.6)
        talks.client_says(rtp(1))
        listens.target_says(rtp(2))
    left = [
        call
        for call in (talks, listens, silent, elsewhere, late)
        if driver.relay.assign(call.number, later)
    ]
    assert left == [talks, listens]
    assert driver.ended(calm) == {"unanswered": 3}
    assert driver.relay.live == 3
