"""WebRTC clients whose target nobody knows: all are asked; who knows the client is its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import RUN_MORE
from tests.ports import free_port
from tests.udp.calling import (
    ALERT,
    HANDSHAKE,
    answering,
    bye,
    described,
    error,
    receiver_report,
    record,
    request,
    rtp,
    sender_report,
    stun,
    success,
)
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
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_IN_A_SECOND = 50  # Binding requests of a session that are sent to all


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving("127.0.0.1") as driver:
        driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
        driver.decide = driver.ask
        yield driver


def knows(target: Target, *clients: Client) -> None:
    """Let a target be the server of some clients, of whose requests each has its own name."""
    names = [name_of(client) for client in clients]
    target.answer = lambda datagram: [
        success() if any(name in datagram.data for name in names) else error(401)
    ]


def name_of(client: Client) -> bytes:
    return b"user-%05d" % client.where[1]


def ask(driver: Driver, client: Client) -> None:
    client.say(request(name_of(client)))
    driver.settle()


def pinned(driver: Driver, *others: str) -> tuple[Client, Target, tuple[str, int]]:
    """Let a client find its target; return them and where the target sends to."""
    target, client = driver.target(), driver.client()
    knows(target, client)
    ask(driver, client)
    assert driver.pins[-1].target == target.number
    target.answer = None
    client.received.clear()
    return client, target, target.received.pop().source


# Who is asked, and who it is


@pytest.mark.parametrize("answer", [success(), error(487)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_target_that_knows_the_client_is_its_own(
    driver: Driver, place: int, answer: bytes
) -> None:
    targets = [driver.target() for _ in range(3)]
    for target, refusal in zip(targets, (error(400), error(401), b"what?"), strict=True):
        target.answer = answering(refusal)
    targets[place].answer = answering(answer)
    client, before = driver.client(), open_descriptors()
    client.say(request())
    driver.settle()
    assert [target.data for target in targets] == [[request()]] * 3
    assert client.data == [answer]
    assert client.received[0].source == client.to
    (pin,) = driver.pins
    assert pin[1:] == (1, targets[place].number, driver.generation)
    assert driver.relay.undecided == 0
    # The others' sockets are closed; those of them that answered first were held back.
    assert (driver.relay.live, driver.relay.sockets) == (1, 1)
    assert open_descriptors() == before + 1
    flows = [driver.relay.flows_to(target.number) for target in targets]
    assert flows == [int(target is targets[place]) for target in targets]
    assert set(driver.dropped()) <= {"held_back"}
    # From now on everything passes, in both directions, on the socket that was asked with.
    targets[place].answer = echo
    said = [request(), rtp(1), record(HANDSHAKE, 0), b"\x40turn", b"anything", b""]
    client.received.clear()
    for data in said:
        client.say(data)
    driver.settle()
    assert targets[place].data[1:] == client.data == said
    assert len({each.source for each in targets[place].received}) == 1
    assert [len(target.received) for target in targets if target is not targets[place]] == [1, 1]
    assert driver.relay.end(pin.session)
    assert (driver.relay.live, driver.relay.sockets) == (0, 0)


def test_what_does_not_decide_is_held_back(driver: Driver) -> None:
    targets = [driver.target(), driver.target()]
    answers = [
        error(400),
        error(401),
        error(438),
        stun(0x0111),  # without a code
        stun(0x0111, 9, b"\0\0\4"),  # with half a code
        stun(0x0111, 9, bytes([0, 0, 3, 187])),  # 3 hundreds and 187
        stun(0x0103),  # of another method
        stun(0x0011),  # an indication
        success()[:19],
        success() + b"more",
        b"\0" + success(),
        record(HANDSHAKE, 0),
        rtp(1),
        b"",
    ]
    for target in targets:
        target.answer = answering(*answers)
    client = driver.client()
    client.say(request())
    driver.settle()
    assert (client.data, driver.pins) == ([], [])
    assert driver.dropped() == {"held_back": 2 * len(answers)}
    assert (driver.relay.undecided, driver.relay.sockets) == (1, 2)
    targets[1].send(success(), targets[1].received[0].source)
    driver.settle()
    assert client.data == [success()]
    assert driver.relay.undecided == 0


def test_one_answer_goes_back(driver: Driver) -> None:
    """Though two targets say that they know the client; the slower one speaks to nobody."""
    targets = [driver.target() for _ in range(4)]
    for target in targets:
        target.answer = answering(success())
    client = driver.client()
    client.say(request())
    driver.turn()
    driver.turn()
    for target in targets:
        target.read()
    while driver.turn() & RUN_MORE:  # all answers are there by now
        pass
    driver.settle()
    assert client.data == [success()]
    assert (len(driver.pins), driver.relay.sockets) == (1, 1)
    winner = driver.pins[0].target
    for target in targets:
        assert len(target.received) == 1
        target.send(b"late", target.received[0].source)
    driver.settle()
    assert client.data == [success(), b"late"]
    assert driver.relay.flows_to(winner) == 1
    assert driver.relay.counters()["datagrams_out"] == 2


def test_only_requests_are_asked_with(driver: Driver) -> None:
    targets = [driver.target(), driver.target()]
    client = driver.client()
    client.say(request())
    for data in (rtp(1), record(HANDSHAKE, 0), success(), error(487), stun(0x0011), b"", request()):
        client.say(data)
    driver.settle()
    client.say(b"x" * 12, segment=5)
    client.say(request() * 3, segment=len(request()))
    client.say(rtp(2))
    driver.settle()
    assert [target.data for target in targets] == [[request()] * 5] * 2
    assert driver.dropped() == {"undecided": 10}
    assert client.data == []


def test_a_target_that_refuses_is_not_the_one(driver: Driver) -> None:
    ports = [free_port() for _ in range(2)]
    gone = [driver.relay.add_target("127.0.0.1", port) for port in ports]
    targets = [driver.target(), driver.target()]
    driver.targets = [gone[0], targets[0].number, gone[1], targets[1].number]
    client = driver.client()
    for _ in range(3):
        client.say(request())
        driver.settle()
    assert driver.refusals == []
    assert driver.relay.sockets == 4
    back = driver.reopened("127.0.0.1", ports[0])
    client.say(request())
    driver.settle()
    assert back.data == []
    targets[1].send(success(), targets[1].received[-1].source)
    driver.settle()
    assert client.data == [success()]
    assert [pin.target for pin in driver.pins] == [targets[1].number]
    assert driver.relay.sockets == 1
    assert [len(target.received) for target in targets] == [4, 4]
    assert driver.dropped() == {}


def test_the_only_one_that_is_left_is_told_everything(driver: Driver) -> None:
    """And it is heard, though it may not know the client: nobody else can be meant."""
    target = driver.target()
    driver.targets.append(driver.relay.add_target("127.0.0.1", free_port()))
    target.answer = answering(error(401))
    client = driver.client()
    client.say(request())
    driver.settle()
    client.say(record(HANDSHAKE, 0))
    client.say(request())
    driver.settle()
    assert target.data == [request(), record(HANDSHAKE, 0), request()]
    assert error(401) in client.data


def test_all_are_asked_again_when_all_have_refused(driver: Driver) -> None:
    ports = [free_port() for _ in range(2)]
    driver.targets = [driver.relay.add_target("127.0.0.1", port) for port in ports]
    client = driver.client()
    for _ in range(2):
        client.say(request())
        driver.settle()
    assert driver.refusals == []
    late = driver.reopened("127.0.0.1", ports[1])
    late.answer = answering(success())
    client.say(request())
    driver.settle()
    assert client.data == [success()]
    assert driver.pins[0].target == driver.targets[1]


def test_several_clients_find_their_targets_at_once(driver: Driver) -> None:
    """Their requests come in one batch, and so do the answers; old clients talk meanwhile."""
    targets = [driver.target() for _ in range(3)]
    clients = [driver.client(f"127.0.0.{2 + number % 5}") for number in range(36)]
    for place, target in enumerate(targets):
        knows(target, *clients[place::3])
    for client in clients[:6]:
        ask(driver, client)
    for client in clients:
        client.say(request(name_of(client)))
        client.say(rtp(client.where[1]))
    driver.settle()
    for client in clients:
        client.say(request(name_of(client)))
        client.say(rtp(client.where[1]))
    driver.settle()
    assert driver.relay.undecided == 0
    assert len(driver.pins) == driver.relay.live == driver.relay.sockets == 36
    assert sorted(pin.key for pin in driver.pins) == list(range(1, 37))
    for place, target in enumerate(targets):
        mine = {rtp(client.where[1]) for client in clients[place::3]}
        assert {data for data in target.data if data[0] == 0x80} == mine
        assert driver.relay.flows_to(target.number) == 12
    for client in clients:
        assert client.data.count(success()) == (3 if client in clients[:6] else 2)


def test_many_answers_in_one_batch(driver: Driver) -> None:
    """Each target says several things before the relay looks; the first asked is rarely the one."""
    targets = [driver.target() for _ in range(3)]
    clients = [driver.client() for _ in range(100)]
    for client in clients:
        client.say(request(name_of(client)))
    driver.settle()
    answers = [error(401), b"noise", error(401), success(), b"first", b"second"]
    for place, client in enumerate(clients):
        for target in targets:
            (where,) = [each.source for each in target.received if name_of(client) in each.data]
            if target is targets[place % 3]:
                for answer in answers:
                    target.send(answer, where)
            else:
                target.send(error(401), where)
    driver.settle()
    assert [client.data for client in clients] == [[success(), b"first", b"second"]] * 100
    assert (driver.relay.undecided, driver.relay.sockets) == (0, 100)
    assert {pin.target for pin in driver.pins} == {target.number for target in targets}
    for client in clients:
        client.say(b"to my own")
    driver.settle()
    assert [target.data.count(b"to my own") for target in targets] == [34, 33, 33]


def test_answers_in_trains(driver: Driver) -> None:
    targets = [driver.target(), driver.target()]
    client = driver.client()
    client.say(request())
    driver.settle()
    where = targets[1].received[0].source
    targets[1].send(error(401) * 3, where, segment=len(error(401)))
    driver.settle()
    assert driver.dropped() == {"held_back": 3}
    targets[1].send(success() * 3, where, segment=len(success()))
    driver.settle()
    assert client.data == [success()] * 3
    assert driver.relay.undecided == 0


@pytest.mark.parametrize("header", [b"", b"header "])
@pytest.mark.parametrize("tos", [0, 0xB8])
def test_headers_and_marks_are_kept(driver: Driver, header: bytes, tos: int) -> None:
    driver.header = header
    targets = [driver.target() for _ in range(3)]
    client = driver.client()
    client.say(request(), tos=tos)
    client.say(rtp(1), tos=tos)
    driver.settle()
    assert [target.data for target in targets] == [[header + request()]] * 3
    assert [target.received[0].tos for target in targets] == [tos] * 3
    targets[2].send(success(), targets[2].received[0].source, tos=tos)
    driver.settle()
    assert client.received[0].tos == tos
    client.say(rtp(2), tos=tos)
    client.say(rtp(3))
    driver.settle()
    assert targets[2].data[1:] == [header + rtp(2), header + rtp(3)]
    assert [each.tos for each in targets[2].received[1:]] == [tos, 0]


def test_targets_on_the_ports_of_a_pair_are_asked(driver: Driver) -> None:
    """Of the port that the client sends to; then the port beside joins, and no other one.

    ICE agrees on the second port by itself (a component of its own), or needs none.
    """
    one, other = driver.listen_to_pair("127.0.0.2", "127.0.0.3")
    rtp_leg, rtcp_leg = driver.caller("127.0.0.1", *free_range(2))
    other[0].answer = answering(success())
    rtp_leg.say(request())
    driver.settle()
    assert (one[0].data, one[1].data) == ([request()], [])
    told: list[bool] = []
    driver.decide = lambda newcomer: told.append(driver.relay.partner(newcomer.number) is None)
    driver.caller()[1].say(receiver_report(1))
    driver.settle()
    assert told == [True]
    driver.decide = driver.pair_up
    rtcp_leg.say(receiver_report(1))
    driver.settle()
    assert other[1].data == [receiver_report(1)]
    assert (driver.relay.live, driver.relay.pairs) == (1, 1)


# How many, how often, how long


def within_a_second(driver: Driver, *clients: Client, count: int) -> int:
    """Let clients send so many requests each within one second of the relay's clock.

    Return:
        How many more were dropped for being too many.
    """
    train = request() * count
    while True:
        before = driver.dropped().get("ask_limit", 0)
        second = int(time.monotonic())
        for client in clients:
            client.say(train, segment=len(request()))
        driver.settle()
        if int(time.monotonic()) == second:
            return driver.dropped().get("ask_limit", 0) - before
        driver.wait_for(1.0 - time.monotonic() % 1.0)


def test_a_client_asks_so_often(driver: Driver) -> None:
    targets = [driver.target(), driver.target()]
    client, other = driver.client(), driver.client()
    for each in (client, other):
        each.say(rtp(1))
    driver.settle()
    driver.wait_for(1.0 - time.monotonic() % 1.0)
    dropped = within_a_second(driver, client, count=60)
    assert dropped == 60 - MOST_IN_A_SECOND
    received = len(targets[0].received)
    assert received == len(targets[1].received)
    assert received % MOST_IN_A_SECOND == 0
    # Another client has not asked yet, and with the next second this one may again.
    driver.wait_for(1.0 - time.monotonic() % 1.0)
    assert within_a_second(driver, client, other, count=MOST_IN_A_SECOND) == 0
    assert client.data == other.data == []


def test_all_clients_ask_so_often() -> None:
    """But for one request of each in a second: no flood of the others keeps that out."""
    with driving("127.0.0.1", sockets=False) as driver:
        driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
        driver.decide = driver.ask
        driver.target()
        driver.target()
        clients = [driver.client(f"127.0.{number % 7}.9") for number in range(110)]
        for client in clients:
            client.say(rtp(1))
            driver.settle()
        driver.wait_for(1.0 - time.monotonic() % 1.0)
        dropped = within_a_second(driver, *clients, count=MOST_IN_A_SECOND)
        assert dropped == 110 * MOST_IN_A_SECOND - 5000 - 10


def test_who_has_no_target_yet_is_counted(driver: Driver) -> None:
    """In all, and of the newcomer's address."""
    target = driver.target()
    driver.target()
    told: list[tuple[int, int]] = []

    def decide(newcomer: Newcomer) -> None:
        told.append((driver.relay.undecided, driver.relay.undecided_from(newcomer.number)))
        driver.ask(newcomer)

    driver.decide = decide
    clients = [driver.client(f"127.0.0.{2 + number % 2}") for number in range(6)]
    for client in clients[:5]:
        client.say(request())
        driver.settle()
    target.send(success(), target.received[2].source)
    driver.settle()
    clients[5].say(request())
    driver.settle()
    assert told == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (4, 2)]
    assert driver.relay.undecided == 5
    # Who is undecided has no say in where a newcomer goes.
    found: list[tuple[int, int] | None] = []
    driver.decide = lambda newcomer: found.append(driver.relay.following(newcomer.number))
    for address in ("127.0.0.2", "127.0.0.3"):
        driver.client(address).say(rtp(1))
    driver.settle()
    assert found == [(driver.generation, target.number), None]
    assert len(driver.relay.export(driver.generation, dict.fromkeys(driver.targets, 0))) == 72
    assert driver.relay.goodbyes(driver.generation, 9) == []
    driver.relay.begin_goodbye(driver.generation)
    assert len(driver.relay.goodbyes(driver.generation, 9)) == 1
    driver.relay.end_some(driver.generation, 9)
    assert (driver.relay.undecided, driver.relay.sockets) == (0, 0)


def test_who_finds_no_target_makes_room(driver: Driver) -> None:
    """As unanswered sessions do, though targets have said something."""
    for _ in range(2):
        driver.target().answer = answering(error(401))
    client, other = driver.client(), driver.client("127.0.0.9")
    client.say(request())
    driver.settle()
    assert not driver.relay.evict()
    driver.wait_for(1.1)
    driver.relay.limit = 1
    other.say(request())
    driver.turn()  # is asked about, since somebody may make room
    assert driver.relay.live == 2
    assert driver.relay.evict()
    driver.settle()
    assert driver.ended(driver.generation) == {"evicted": 1}
    assert (driver.relay.live, driver.relay.undecided, driver.relay.sockets) == (1, 1, 2)


def test_who_finds_no_target_is_over_as_unanswered(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(60.0, 0.3, media=True)
    for _ in range(2):
        driver.target().answer = answering(error(401))
    client = driver.client()
    client.say(request())
    driver.pump(driver.ended)
    assert driver.ended(driver.generation) == {"unanswered": 1}
    assert (driver.relay.undecided, driver.relay.sockets, driver.emptied) == (0, 0, 1)
    # It may ask again.
    client.say(request())
    driver.settle()
    assert driver.relay.undecided == 1


def test_only_sessions_of_media_ask(driver: Driver) -> None:
    driver.target()
    driver.generation = driver.relay.add_generation(60.0, 60.0)
    driver.client().say(request())
    with pytest.raises(ValueError, match="only sessions of media"):
        driver.settle()
    assert (driver.relay.undecided, driver.relay.live) == (0, 0)


def test_who_does_not_ask_has_one_target(driver: Driver) -> None:
    driver.target()
    driver.target()
    driver.decide = driver.spread
    driver.client().say(request())
    with pytest.raises(ValueError, match="has one target"):
        driver.settle()
    assert (driver.relay.live, driver.relay.sockets) == (0, 0)


def test_a_session_that_asks_is_neither_moved_nor_paired(driver: Driver) -> None:
    targets = [driver.target(), driver.target()]
    client = driver.client()
    client.say(request())
    driver.settle()
    session = next(
        number
        for stamp in range(9)
        for place in range(512)
        if (number := stamp << 32 | place)
        if driver.relay.assign(number, driver.generation)
    )
    with pytest.raises(ValueError, match="asks several targets"):
        driver.relay.move(session, driver.generation, targets[0].number)
    assert driver.relay.say_goodbye(session, b"to one", b"to the other") is False
    assert driver.relay.stuck(driver.generation, targets[0].number, 0.0, 9) == []
    assert driver.relay.undecided == 1


def test_who_asks_goes_along_with_its_targets(driver: Driver) -> None:
    """All sessions of a target become another generation's while one of them is still asking."""
    one, other = driver.target(), driver.target()
    client = driver.client()
    client.say(request())
    driver.settle()
    former = driver.generation
    later = driver.relay.add_generation(60.0, 60.0, media=True)
    again = {target.number: driver.relay.add_target(*target.where) for target in (one, other)}
    driver.relay.adopt(former, later, again)
    for number in again:
        driver.relay.drop_target(number)
    assert (driver.relay.sessions(former), driver.relay.sessions(later)) == (0, 1)
    assert [driver.relay.flows_to(number) for number in again.values()] == [1, 1]
    other.send(success(), other.received[0].source)
    driver.settle()
    assert [pin[2:] for pin in driver.pins] == [(again[other.number], later)]
    assert client.data == [success()]


def test_no_socket_for_one_of_the_targets(driver: Driver) -> None:
    one, other = driver.target(), driver.target()
    unreachable = driver.relay.add_target("255.255.255.255", 9)  # needs SO_BROADCAST
    driver.targets = [one.number, unreachable, other.number]
    before = open_descriptors()
    client = driver.client()
    client.say(request())
    with pytest.raises(OSError, match="ermission denied"):
        driver.settle()
    assert (driver.relay.live, driver.relay.undecided, driver.relay.sockets) == (0, 0, 0)
    assert open_descriptors() == before + 1  # the client's
    driver.targets = [one.number, other.number]
    client.say(request())
    driver.settle()
    assert driver.relay.sockets == 2


# Clients that their target does not know, or no more: others are asked while the session goes on

WHILE = 2.1  # seconds until a session may ask (again)


def begin(driver: Driver, target: Target, *said: bytes) -> Client:
    """Begin a session with a target that was chosen for it."""
    driver.decide = lambda newcomer: driver.relay.admit(
        newcomer.number, driver.generation, [target.number], driver.header
    )
    client = driver.client()
    for data in said:
        client.say(data)
    driver.settle()
    driver.decide = driver.ask
    target.received.clear()
    return client


def way_of(driver: Driver, client: Client, target: Target) -> tuple[str, int]:
    """Return where a target sends to for a client."""
    target.received.clear()
    client.say(rtp(1))
    driver.settle()
    return target.received.pop().source


def test_lost_clients_find_their_targets(driver: Driver) -> None:
    """Of a target that is gone; that was chosen for media alone and is silent; or that refuses."""
    gone, own, wrong = driver.target(), driver.target(), driver.target()
    before = begin(driver, gone, request())
    gone.answer = answering(success())
    before.say(request())
    driver.settle()
    hashed, unknown = begin(driver, own, rtp(1)), begin(driver, wrong, rtp(2))
    clients = (before, hashed, unknown)
    right = driver.target()
    driver.shut(gone)
    for client in clients:
        client.received.clear()
        if client is before:
            for _ in range(4):
                ask(driver, client)
    assert driver.asked == 0  # too early: its own may be back in a moment
    driver.wait_for(WHILE)
    wrong.answer = answering(error(400))
    for target in (own, wrong):
        target.received.clear()
    right.answer = answering(success())
    for client in clients:
        client.say(rtp(3))
        ask(driver, client)
        client.say(rtp(4))
        driver.settle()
    assert [client.data for client in clients] == [[success()]] * 3
    assert driver.asked == 3
    assert [pin[1:3] for pin in driver.pins] == [(key, right.number) for key in (1, 2, 3)]
    assert (driver.ended(driver.generation), driver.relay.undecided) == ({}, 0)
    assert driver.relay.sockets == driver.relay.flows_to(right.number) == 3
    # What is no request goes to whoever is the target at the moment, and to nobody else.
    expected = [request(name_of(client)) for client in clients]
    assert right.data == [data for request_ in expected for data in (request_, rtp(4))]
    for target, client in ((own, hashed), (wrong, unknown)):
        mine = [data for data in target.data if data[0] == 0x80 or name_of(client) in data]
        assert mine == [rtp(3), request(name_of(client))]
    assert set(driver.dropped()) <= {"held_back"}
    records = driver.relay.export(driver.generation, {right.number: 0})
    assert len(records) == 3 * driver.relay.RECORD_SIZE
    right.answer = echo
    for client in clients:
        ask(driver, client)
        client.say(rtp(5))
    driver.settle()
    assert [client.data[1:] for client in clients] == [[data, rtp(5)] for data in expected]


def test_a_session_goes_on_while_others_are_asked(driver: Driver) -> None:
    own, other = driver.target(), driver.target()
    client = begin(driver, own, rtp(1))
    told: list[Newcomer] = []
    driver.wait_for(WHILE)
    driver.decide = told.append
    client.say(request())
    client.say(rtp(2))
    driver.turn()
    (newcomer,) = told
    relay = driver.relay
    assert relay.has_session(newcomer.number)
    assert relay.opening(newcomer.number) == request()
    unreachable = relay.add_target("255.255.255.255", 9)  # needs SO_BROADCAST
    with pytest.raises(OSError, match="ermission denied"):
        relay.ask(newcomer.number, [other.number, unreachable], 1)
    for targets, key, header in (([99], 1, b""), ([other.number], 0, b""), ([], 1, bytes(53))):
        with pytest.raises(ValueError, match=r"no such|a key|more than 52"):
            relay.ask(newcomer.number, targets, key, header)
    assert (relay.sockets, relay.undecided) == (1, 0)
    relay.ask(newcomer.number, driver.targets, 7, b"header ")
    assert (relay.live, relay.sockets, relay.undecided, relay.pairs) == (1, 2, 1, 0)
    driver.settle()
    assert (own.data, other.data) == ([request(), rtp(2)], [b"header " + request()])
    where, to_other = own.received[0].source, other.received[0].source
    for answer in (error(401), b"noise", rtp(9)):
        other.send(answer, to_other)
    own.send(rtp(3), where)
    client.say(rtp(4))
    client.say(request())
    driver.settle()
    assert client.data == [rtp(3)]
    assert own.data[2:] == [rtp(4), request()]
    assert other.data[1:] == [b"header " + request()]
    assert driver.dropped() == {"held_back": 3}
    ((session, *_),) = known_to(driver)
    with pytest.raises(ValueError, match="asks several targets"):
        relay.move(session, driver.generation, other.number)
    assert len(relay.export(driver.generation, dict.fromkeys(driver.targets, 0))) == 72
    relay.ask_again()
    assert (relay.live, relay.sockets, relay.undecided) == (1, 1, 0)
    other.send(success(), to_other)
    own.send(success(), where)
    client.say(rtp(5))
    driver.settle()
    assert client.data == [rtp(3), success()]
    assert own.data[4:] == [rtp(5)]
    assert driver.pins == []


def known_to(driver: Driver) -> list[tuple[int, ...]]:
    driver.relay.begin_goodbye(driver.generation)
    return [(session,) for session, *_ in driver.relay.goodbyes(driver.generation, 99)]


def test_who_is_not_lost(driver: Driver) -> None:
    """Nobody whose target talks to it: anybody can send a request in its name."""
    call_target, ice_target, other = driver.target(), driver.target(), driver.target()
    call, ice = begin(driver, call_target, rtp(1)), begin(driver, ice_target, request())
    to_call, to_ice = (
        way_of(driver, client, target)
        for client, target in ((call, call_target), (ice, ice_target))
    )
    ice_target.send(success(), to_ice)
    call_target.send(rtp(2), to_call)
    driver.settle()
    driver.wait_for(WHILE)
    other.answer = answering(success())
    call_target.send(rtp(2), to_call)
    driver.settle()
    for client in (call, ice):
        for _ in range(3):
            client.say(request(b"forged"))
            driver.settle()
    for client, target in ((call, call_target), (ice, ice_target)):
        target.received.clear()
        client.say(rtp(3))
        driver.settle()
        assert target.data == [rtp(3)]
    assert (driver.asked, driver.pins, other.received) == (0, [], [])


def test_who_asks_may_ask_others(driver: Driver) -> None:
    """New targets are asked from the next request on, and answers to earlier ones are too late."""
    one, client, other = driver.target(), driver.client(), driver.client("127.0.0.9")
    driver.target()
    ask(driver, client)
    ask(driver, other)
    driver.relay.ask_again()
    driver.relay.ask_again()
    late = driver.target()
    knows(late, client)
    ask(driver, client)
    assert client.data == [success()]
    assert driver.pins[0].target == late.number
    assert driver.ended(driver.generation) == {"unanswered": 2}
    one.send(success(), one.received[1].source)  # to the other's first request
    driver.settle()
    assert (other.data, driver.relay.live) == ([], 1)
    ask(driver, other)
    assert driver.asked == 4


def test_the_only_one_from_the_outset_need_not_speak_ice(driver: Driver) -> None:
    target, client, other = driver.target(), driver.client(), driver.client()
    for each in (client, other):
        ask(driver, each)
    ways = [each.source for each in target.received]
    driver.target()
    for answer in (error(401), b"anything"):
        target.send(answer, ways[0])
    target.send(error(487), ways[1])
    driver.settle()
    assert client.data == [error(401), b"anything"]
    assert driver.relay.undecided == 0
    assert [pin.key for pin in driver.pins] == [2]  # the first has said nothing to learn from


def test_the_new_target_is_told_as_it_was_asked(driver: Driver) -> None:
    """With the header of its own deployment, not with that of the former target's."""
    driver.header = b"old "
    own, other = driver.target(), driver.target()
    client = begin(driver, own, rtp(1))
    driver.header = b"new "
    driver.wait_for(WHILE)
    ask(driver, client)
    client.say(rtp(2))
    driver.settle()
    other.send(success(), other.received[0].source)
    driver.settle()
    client.say(rtp(3))
    driver.settle()
    assert own.data == [b"old " + request(name_of(client)), b"old " + rtp(2)]
    assert other.data == [b"new " + request(name_of(client)), b"new " + rtp(3)]


def test_nothing_of_the_former_target_is_known(driver: Driver) -> None:
    own, other = driver.target(), driver.target()
    client = begin(driver, own, rtp(1))
    where = way_of(driver, client, own)
    for said in (sender_report(7) + described(7, b"former"), rtp(8), record(HANDSHAKE, 0)):
        own.send(said, where)
    driver.settle()
    driver.shut(own)
    for _ in range(4):
        ask(driver, client)
    driver.wait_for(WHILE)
    ask(driver, client)
    other.send(error(487), other.received[0].source)
    driver.settle()
    other.send(rtp(9), other.received[0].source)
    driver.settle()
    driver.relay.begin_goodbye(driver.generation)
    ((_, encrypted, ours, _, theirs, name),) = driver.relay.goodbyes(driver.generation, 9)
    assert (encrypted, ours, theirs, name) == (False, (1,), (9,), b"")


def test_a_request_for_which_there_is_no_room_is_not_lost(driver: Driver) -> None:
    """Its target gets it all the same; others are asked as soon as there is room."""
    own, other = driver.target(), driver.target()
    client = begin(driver, own, rtp(1))
    driver.wait_for(WHILE)
    driver.decide = lambda _: None
    ports = [driver.listeners[driver.listen(0)].getsockname()[1] for _ in range(4)]
    for stranger in [driver.client() for _ in range(64)]:
        for port in ports:
            stranger.send(rtp(2), (stranger.to[0], port))
    client.say(request())
    driver.turn()
    assert len(driver.relay.newcomers()) == 256
    driver.decide = driver.ask
    client.say(request())
    driver.settle()
    assert own.data == [request()] * 2
    assert other.data == [request()]
    assert driver.dropped() == {"newcomer_backlog": 256}


def test_who_finds_a_target_has_changed(driver: Driver) -> None:
    """What is saved of sessions is so again."""
    own, other = driver.target(), driver.target()
    client, newcomer = begin(driver, own, rtp(1)), driver.client()
    driver.wait_for(WHILE)
    ask(driver, client)
    ask(driver, newcomer)
    for each in other.received[:2]:
        before = driver.relay.changes
        other.send(success(), each.source)
        driver.settle()
        assert driver.relay.changes != before


def test_nobody_is_asked_for_ever(driver: Driver) -> None:
    """Who has no target after ten seconds is over, though it goes on; who has one keeps it."""
    driver.targets = [driver.target().number for _ in range(2)]
    own = driver.target()
    lost, undecided = begin(driver, own, rtp(1)), driver.client()
    driver.wait_for(WHILE)
    driver.targets = driver.targets[:2]
    for client in (lost, undecided):
        ask(driver, client)
    assert (driver.relay.undecided, driver.relay.sockets) == (2, 5)
    driver.decide = lambda _: None
    for _ in range(11):
        for client in (lost, undecided):
            client.say(rtp(2))
        driver.wait_for(1.0)
    assert driver.relay.undecided == 0
    assert driver.ended(driver.generation) == {"unanswered": 1}
    assert (driver.relay.live, driver.relay.sockets) == (1, 1)
    own.received.clear()
    lost.say(rtp(3))
    driver.settle()
    assert own.data[-1] == rtp(3)
    # Both may ask again.
    driver.decide = driver.ask
    for client in (lost, undecided):
        ask(driver, client)
    assert driver.relay.undecided == 2


def test_addresses_are_not_mixed_up(driver: Driver) -> None:
    """Though many share a bucket of the table of addresses, which has 1,024."""
    driver.targets = [driver.target().number for _ in range(2)]
    askers = [driver.client(f"127.1.{number}.1") for number in range(100)]
    strangers = [driver.client(f"127.2.{number}.2") for number in range(100)]
    beside = driver.listen(0)
    driver.relay.pair(driver.numbers[0], beside)
    for client in strangers:
        client.to = (client.to[0], driver.listeners[beside].getsockname()[1])
    for client in askers:
        client.say(request())
    driver.settle()
    told: list[tuple[int, object, object]] = []

    def look(newcomer: Newcomer) -> None:
        number, relay = newcomer.number, driver.relay
        told.append((relay.undecided_from(number), relay.following(number), relay.partner(number)))

    driver.decide = look
    for client in strangers:
        client.say(rtp(1))
        driver.settle()
    driver.relay.ask_again()
    assert told == [(0, None, None)] * 100
    driver.decide = driver.admit
    for client in askers:
        client.say(rtp(1))
    driver.settle()
    driver.decide = look
    for client in strangers:
        client.say(rtp(1))
        driver.settle()
    assert told == [(0, None, None)] * 200


# Forged datagrams


def test_forged_datagrams_cut_nobody(driver: Driver) -> None:
    """Who knows a client's address and port can send in its name, but ends no call that goes on."""
    client, target, where = pinned(driver)
    client.say(rtp(7))
    driver.settle()
    forged = [
        request(b"unknown"),
        success(),
        error(487),
        error(401),
        record(ALERT),
        record(ALERT, 0),
        record(HANDSHAKE),
        bye(7),
        receiver_report(7) + bye(7),
        stun(0x0011),
    ]
    for data in forged:
        client.say(data)
    driver.settle()
    for _ in range(4):
        driver.wait_for(0.6)
        target.send(rtp(8), where)  # one side that goes on is enough
        driver.settle()
    assert driver.ended(driver.generation) == {}
    assert client.data == [rtp(8)] * 4
    assert target.data == [rtp(7), *forged]
    assert (driver.relay.live, driver.relay.sockets, driver.asked) == (1, 1, 1)


def test_a_quiet_call_outlives_what_is_forged(driver: Driver) -> None:
    """Between the checks of ICE, as with data channels, seconds pass without a datagram.

    An alert, and a client whose port is closed, are believed after a longer silence then.
    """
    (alerted, _, _), (gone, target, where) = pinned(driver), pinned(driver)
    alerted.say(record(ALERT))
    driver.shut(gone)
    target.send(rtp(1), where)
    driver.settle()
    driver.wait_for(3.0)
    assert driver.ended(driver.generation) == {}
    driver.pump(lambda: driver.relay.live == 0)
    assert driver.ended(driver.generation) == {"dtls_closed": 1, "client_gone": 1}


def test_a_call_that_was_heard_ends_soon_after_a_hint(driver: Driver) -> None:
    """Who sent media until just now, and is silent for two seconds, is gone."""
    (alerted, _, _), (gone, target, where) = pinned(driver), pinned(driver)
    for client in (alerted, gone):
        client.say(rtp(1))
    alerted.say(record(ALERT))
    driver.settle()
    driver.shut(gone)
    target.send(rtp(1), where)
    driver.settle()
    driver.wait_for(3.0)
    assert driver.ended(driver.generation) == {"dtls_closed": 1, "client_gone": 1}


def test_what_strangers_send_comes_back_to_nobody(driver: Driver) -> None:
    """A request goes to each target once, and answers only to a client that a target knows."""
    targets = [driver.target() for _ in range(3)]
    for target in targets:
        target.answer = answering(error(401), error(400), b"x" * 1200)
    strangers = [driver.client(f"127.0.1.{number}") for number in range(1, 30)]
    for stranger in strangers:
        stranger.say(request())
        for data in (success(), record(ALERT), bye(1), rtp(1), b"\0\1"):
            stranger.say(data)
    driver.settle()
    assert [len(target.received) for target in targets] == [29] * 3
    assert [stranger.data for stranger in strangers] == [[]] * 29
    counters = driver.relay.counters()
    assert (counters["datagrams_in"], counters["datagrams_out"]) == (3 * 29, 0)
    assert driver.dropped() == {"undecided": 5 * 29, "held_back": 3 * 3 * 29}


def test_a_stranger_is_no_candidate(driver: Driver) -> None:
    """The sockets that ask hear nobody but their targets."""
    target = driver.target()
    driver.target()
    client, stranger = driver.client(), driver.reopened("127.0.0.1", 0)
    client.say(request())
    driver.settle()
    stranger.send(success(), target.received[0].source)
    driver.settle()
    assert (client.data, driver.pins, driver.relay.undecided) == ([], [], 1)


def test_newcomers_are_known_by_what_they_say_first(driver: Driver) -> None:
    driver.target()
    told: list[tuple[bytes, bytes]] = []
    driver.decide = lambda newcomer: told.append(
        (newcomer.client, driver.relay.opening(newcomer.number))
    )
    said = [request(), b"", rtp(1), bytes(60000)]
    clients = [driver.client() for _ in said]
    for client, data in zip(clients, said, strict=True):
        client.say(data)
        client.say(b"more")
    train = driver.client()
    train.say(b"aaaabbbbcc", segment=4)
    driver.turn()
    ends = [end_of(client.where) for client in (*clients, train)]
    assert told == list(zip(ends, [*said, b"aaaa"], strict=True))
