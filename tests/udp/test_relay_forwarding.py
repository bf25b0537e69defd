"""The relay passes datagrams on: whole, in order, to the right peer, from the right address."""

from __future__ import annotations

import os
import random
import socket
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import RUN_MORE
from kamal_proxy.udp.ports import listen_udp
from tests.udp.relaying import (
    LARGEST,
    Datagram,
    Driver,
    Newcomer,
    driving,
    echo,
    needs_ipv6,
    packed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERYWHERE, ONE, TWO, OLD = "all addresses", "one address", "two addresses", "a host without IPv6"


@pytest.fixture(params=[EVERYWHERE, ONE, TWO, OLD])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A relay behind each kind of listener; all can be reached at 127.0.0.1."""
    if request.param == OLD:
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    addresses = {ONE: ["127.0.0.1"], TWO: ["127.0.0.1", "127.0.0.2"]}
    with driving(*addresses.get(request.param, [])) as driver:
        yield driver


def test_both_directions(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    client.say(b"question")
    driver.pump(lambda: target.received)
    (question,) = target.received
    assert question.data == b"question"
    assert question.source[1] not in (client.where[1], driver.port)
    target.send(b"answer", question.source)
    driver.pump(lambda: client.received)
    assert client.received == [Datagram(b"answer", ("127.0.0.1", driver.port))]
    # Nobody has to ask for the next.
    target.send(b"more", question.source)
    driver.pump(lambda: len(client.received) == 2)
    assert client.data == [b"answer", b"more"]
    assert driver.relay.live == 1
    assert driver.dropped() == {}


def test_no_client_gets_what_is_for_another(driver: Driver) -> None:
    target = driver.target()
    target.answer = lambda datagram: [b"to " + datagram.data, b"again to " + datagram.data]
    clients = [driver.client(f"127.0.0.{1 + number % 9}") for number in range(60)]
    for turn in range(5):
        for number, client in enumerate(clients):
            client.say(b"%d/%d" % (number, turn))
    driver.pump(lambda: sum(len(client.received) for client in clients) == 600)
    for number, client in enumerate(clients):
        asked = [b"%d/%d" % (number, turn) for turn in range(5)]
        expected = [start + question for question in asked for start in (b"to ", b"again to ")]
        assert client.data == expected
        assert {datagram.source for datagram in client.received} == {("127.0.0.1", driver.port)}
    assert driver.relay.live == 60
    assert len({datagram.source for datagram in target.received}) == 60


def test_order_is_kept_in_each_session(driver: Driver) -> None:
    target = driver.target()
    target.answer = echo
    clients = [driver.client() for _ in range(5)]
    choice = random.Random(1)
    said: list[list[bytes]] = [[] for _ in clients]
    for number in range(400):
        who = choice.randrange(len(clients))
        said[who].append(b"%d." % number + bytes(choice.choice([0, 20, 20, 900])))
        clients[who].say(said[who][-1])
        if number < 40 or not number % 50:  # at first they are newcomers, of whom little is kept
            driver.settle()
    driver.pump(lambda: sum(len(client.received) for client in clients) == 400)
    assert [client.data for client in clients] == said
    heard: dict[tuple[str, int], list[bytes]] = {}
    for datagram in target.received:
        heard.setdefault(datagram.source, []).append(datagram.data)
    assert sorted(heard.values()) == sorted(said)


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 9000, 65000, LARGEST])
def test_any_size(driver: Driver, size: int) -> None:
    target, client = driver.target(), driver.client()
    target.answer = echo
    data = random.Random(size).randbytes(size)
    client.say(data)  # before there is a session, and in it
    driver.pump(lambda: client.received)
    client.say(data)
    driver.pump(lambda: len(client.received) == 2)
    assert target.data == client.data == [data, data]
    counters = driver.relay.counters()
    assert (counters["datagrams_in"], counters["bytes_in"]) == (2, 2 * size)
    assert (counters["datagrams_out"], counters["bytes_out"]) == (2, 2 * size)


@needs_ipv6
def test_the_largest_of_ipv6_passes_and_is_too_long_for_ipv4() -> None:
    with driving() as driver:
        target, client = driver.target("::1"), driver.client("::1")
        target.answer = echo
        client.say(bytes(65527))
        driver.pump(lambda: client.received)
        assert client.data == [bytes(65527)]
        target.answer = lambda _: [b"next"]
        four = driver.client()
        four.say(b"first")
        driver.pump(lambda: four.received)
        source = target.received[-1].source
        target.send(bytes(65527), source)
        target.send(b"last", source)
        driver.pump(lambda: len(four.received) == 2)
        assert four.data == [b"next", b"last"]
        assert driver.dropped() == {"too_long": 1}


def test_what_came_before_the_session_arrives_once_and_in_order(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    first = [b"1", b"", b"three", b"4", bytes(3000)]
    for data in first:
        client.say(data)
    driver.settle()
    assert driver.relay.counters()["created"] == 1
    client.say(b"last")
    driver.pump(lambda: len(target.received) == 6)
    assert target.data == [*first, b"last"]


def test_a_newcomer_that_is_not_admitted_is_forgotten() -> None:
    with driving("127.0.0.1") as driver:
        target, client = driver.target(), driver.client()
        driver.decide = lambda newcomer: None
        client.say(b"forgotten")
        driver.settle()
        driver.decide = driver.admit
        client.say(b"kept")
        driver.pump(lambda: target.received)
        assert target.data == [b"kept"]
        assert driver.dropped() == {"newcomer_backlog": 1}


def test_newcomers_are_told_by_both_ends(driver: Driver) -> None:
    driver.target()
    first, second = driver.client("127.0.0.7"), driver.client("127.0.0.8")
    told: list[Newcomer] = []
    driver.decide = told.append
    first.say(b"x")
    first.say(b"x")
    second.say(b"x")
    driver.settle()
    local = packed("127.0.0.1") + driver.port.to_bytes(2)
    ends = [packed(client.where[0]) + client.where[1].to_bytes(2) for client in (first, second)]
    assert [(each.client, each.local) for each in told] == [(end, local) for end in ends]
    assert {each.listener for each in told} == {driver.numbers[0]}


def test_the_source_port_stays_the_same_in_a_session(driver: Driver) -> None:
    target, clients = driver.target(), [driver.client() for _ in range(20)]
    target.answer = echo
    for turn in range(10):
        for client in clients:
            client.say(b"%d %d" % (client.where[1], turn))
        driver.settle()
    driver.pump(lambda: len(target.received) == 200)
    ports: dict[bytes, set[int]] = {}
    for datagram in target.received:
        ports.setdefault(datagram.data.split()[0], set()).add(datagram.source[1])
    assert [len(seen) for seen in ports.values()] == [1] * 20
    assert len(set.union(*ports.values())) == 20


def test_what_strangers_send_to_a_session_reaches_nobody(driver: Driver) -> None:
    target, client, stranger = driver.target(), driver.client(), driver.reopened("127.0.0.1", 0)
    client.say(b"hi")
    driver.pump(lambda: target.received)
    stranger.send(b"forged", target.received[0].source)
    driver.settle()
    target.send(b"true", target.received[0].source)
    driver.pump(lambda: client.received)
    assert client.data == [b"true"]


# Addresses


@needs_ipv6
@pytest.mark.parametrize(
    ("client", "to"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.2"),
        ("127.0.0.9", "127.1.2.3"),
        ("::1", "::1"),
    ],
)
@pytest.mark.parametrize("target", ["127.0.0.1", "::1"])
def test_replies_leave_from_the_address_that_the_client_used(
    client: str, to: str, target: str
) -> None:
    with driving() as driver:
        upstream, sender = driver.target(target), driver.client(client, to=to)
        upstream.answer = echo
        sender.say(b"hi")
        driver.pump(lambda: sender.received)
        assert sender.received == [Datagram(b"hi", (to, driver.port))]


def test_two_addresses_of_the_service_are_two_sessions(driver: Driver) -> None:
    target, client = driver.target(), driver.client()
    target.answer = echo
    if len(driver.listeners) == 1 and driver.listeners[0].getsockname()[0].endswith("127.0.0.1"):
        pytest.skip("there is one address")
    for _ in range(2):  # before there are sessions, and in them
        for to in ("127.0.0.1", "127.0.0.2"):
            client.send(to.encode(), (to, driver.port))
        driver.settle()
    assert len(client.received) == 4
    assert all(each.data.decode() == each.source[0] for each in client.received)
    assert driver.relay.live == 2
    by_source = {each.source: each.data for each in target.received}
    assert sorted(by_source.values()) == [b"127.0.0.1", b"127.0.0.2"]


def test_two_ports_of_the_service_are_two_sessions() -> None:
    with driving("127.0.0.1") as driver, listening() as other:
        number = driver.relay.listen(other.fileno())
        target, client = driver.target(), driver.client()
        target.answer = echo
        places = [("127.0.0.1", driver.port), other.getsockname()[:2]]
        places[1] = ("127.0.0.1", places[1][1])
        for place in places * 2:
            client.send(str(place).encode(), place)
        driver.pump(lambda: len(client.received) == 4)
        assert all(str(each.source).encode() == each.data for each in client.received)
        assert driver.relay.live == 2
        assert number != driver.numbers[0]


def listening() -> socket.socket:
    """Bind one more listener."""
    (sock,) = listen_udp(["127.0.0.1"], 0)
    return sock


def test_a_listener_that_tells_no_local_address() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain, driving("127.0.0.1") as driver:
        plain.setblocking(False)
        plain.bind(("127.0.0.1", 0))
        driver.relay.listen(plain.fileno())
        driver.target().answer = echo
        client = driver.client()
        client.send(b"hi", plain.getsockname())
        driver.pump(lambda: client.received)
        assert client.received == [Datagram(b"hi", plain.getsockname())]


@pytest.mark.parametrize("dual", [pytest.param(True, marks=needs_ipv6), False])
def test_a_broadcast_is_answered(dual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As game servers are found on a network; no answer can leave from the broadcast address."""
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: dual)
    with driving() as driver:
        # Alone, as a train, and several at once.
        driver.target().answer = lambda _: [b"I am", *[b"here"] * 3, b"and here"]
        client = driver.client(to="127.255.255.255")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for turn in range(1, 4):
            client.say(b"who is there?")
            driver.settle()
            assert client.data == [b"I am", *[b"here"] * 3, b"and here"] * turn
        assert {each.source[1] for each in client.received} == {driver.port}
        assert driver.dropped() == {}


# DSCP and ECN


@needs_ipv6
@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("target", ["127.0.0.1", "::1"])
def test_marks_pass_both_ways(client: str, target: str) -> None:
    with driving() as driver:
        upstream, sender = driver.target(target), driver.client(client)
        # The first before there is a session; alone, and several at once.
        marks = [0xB9, 0, 0xB8, 1, 2, 3, 0xFF, 0xFF, 0, 0]
        sender.say(b"0", tos=marks[0])
        driver.pump(lambda: upstream.received)
        for number, mark in enumerate(marks[1:], 1):
            sender.say(b"%d" % number, tos=mark)
        driver.pump(lambda: len(upstream.received) == len(marks))
        assert [each.tos for each in upstream.received] == marks
        assert upstream.data == [b"%d" % number for number in range(len(marks))]
        for number, mark in enumerate(marks):
            upstream.send(b"%d" % number, upstream.received[0].source, tos=mark)
        driver.pump(lambda: len(sender.received) == len(marks))
        assert [each.tos for each in sender.received] == marks
        assert sender.data == upstream.data


def test_marks_pass_a_host_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with driving() as driver:
        upstream, sender = driver.target(), driver.client()
        sender.say(b"hi", tos=0xB9)
        driver.pump(lambda: upstream.received)
        upstream.send(b"hi", upstream.received[0].source, tos=0x2E)
        driver.pump(lambda: sender.received)
        assert [upstream.received[0].tos, sender.received[0].tos] == [0xB9, 0x2E]


# What is left to do


def test_little_time_leaves_the_rest_for_the_next_run() -> None:
    with driving("127.0.0.1") as driver:
        target, client = driver.target(), driver.client()
        client.say(b"begin")
        driver.settle()
        for number in range(300):
            client.say(b"%d" % number)
        assert driver.turn(0) & RUN_MORE
        target.read()
        assert 1 < len(target.received) < 301
        while driver.turn(0) & RUN_MORE:
            pass
        driver.settle()
        assert target.data == [b"begin", *(b"%d" % number for number in range(300))]
        assert driver.turn() == 0


def test_a_run_ends_when_somebody_else_has_something_to_do() -> None:
    with driving("127.0.0.1") as driver:
        target, client = driver.target(), driver.client()
        other = os.eventfd(0, os.EFD_NONBLOCK)
        driver.relay.interrupt_by(other)
        client.say(b"begin")
        driver.settle()
        for _ in range(300):
            client.say(b"undisturbed")
        assert not driver.turn(600_000) & RUN_MORE  # ten minutes, but nothing is left to do
        target.read()
        assert target.data.count(b"undisturbed") == 300
        os.eventfd_write(other, 1)
        for _ in range(300):
            client.say(b"disturbed")
        assert driver.turn(600_000) & RUN_MORE
        target.read()
        assert 0 < target.data.count(b"disturbed") < 300
        # It is none of the relay's own readiness, and keeps nothing from being moved.
        driver.settle()
        assert target.data.count(b"disturbed") == 300
        assert not driver.has_work()
        driver.relay.close()
        os.close(other)


def test_what_can_not_interrupt() -> None:
    with driving("127.0.0.1") as driver, open("/proc/self/statm") as file:
        for fd in (file.fileno(), 0xFFFFF, -1):
            with pytest.raises(OSError, match=r"(not permitted|ad file descriptor)"):
                driver.relay.interrupt_by(fd)
