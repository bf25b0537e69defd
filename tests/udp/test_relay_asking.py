"""Clients that others are asked for: who of many makes room, what is one network, and headers."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.udp.calling import answering, error, request, rtp, success
from tests.udp.relaying import Client, Driver, Newcomer, driving, needs_ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

FAIR_CHANCE = 1.1  # seconds, and a bit: for so long nobody makes room
WHILE = 2.1  # seconds after which others may be asked for the client of a session
IPV6_FREEBIND = 78  # Linux has it, and Python 3.11 no name for it (in6.h)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        use_media(driver)
        yield driver


def use_media(driver: Driver) -> None:
    driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
    driver.decide = driver.ask


def say(driver: Driver, *clients: Client, data: bytes = b"") -> None:
    """Let clients say something, by default a request, one after the other."""
    for client in clients:
        client.say(data or request())
        driver.settle()


# Who makes room


def test_who_was_asked_for_longest_makes_room(driver: Driver) -> None:
    """Of all, or of one network; but not within a second."""
    targets = [driver.target(), driver.target()]
    relay = driver.relay
    assert not relay.cease_asking()
    clients = [driver.client(f"127.0.0.{host}") for host in (2, 3, 2, 3, 4)]
    say(driver, *clients)
    assert not relay.cease_asking()
    driver.wait_for(FAIR_CHANCE)
    late = driver.client("127.0.0.4")
    say(driver, late)
    ceased: list[tuple[int, bool]] = []

    def cease(newcomer: Newcomer) -> None:
        for number in (newcomer.number, newcomer.number, newcomer.number, None, None, None):
            done = relay.cease_asking(number)
            ceased.append((relay.undecided_from(newcomer.number), done))

    driver.decide = cease
    driver.client("127.0.0.3").say(request())
    driver.turn()
    assert ceased == [(1, True), (0, True), (0, False), (0, True), (0, True), (0, True)]
    assert driver.ended(driver.generation) == {"evicted": 5}
    assert (relay.live, relay.undecided, relay.sockets) == (1, 1, 2)
    # The one that is left has been asked for since a moment ago.
    assert not relay.cease_asking()
    targets[1].send(success(), targets[1].received[5].source)
    driver.settle()
    assert late.data == [success()]
    assert (relay.undecided, relay.cease_asking()) == (0, False)


def test_it_is_the_first_of_its_network(driver: Driver) -> None:
    """And who found its target is none of them any more, wherever it stood."""
    target = driver.target()
    driver.target()
    clients = [driver.client("127.0.0.2") for _ in range(5)]
    say(driver, *clients)
    for place in (0, 2, 4):  # the ends and the middle
        target.send(success(), target.received[place].source)
        driver.settle()
    driver.wait_for(FAIR_CHANCE)
    told: list[bool] = []
    driver.decide = lambda newcomer: told.append(driver.relay.cease_asking(newcomer.number))
    for _ in range(2):
        driver.client("127.0.0.2").say(rtp(1))
        driver.turn()
    assert (told, driver.relay.live) == ([True, True], 3)
    assert [client.data for client in clients] == [[success()], [], [success()], [], [success()]]
    assert driver.ended(driver.generation) == {"evicted": 2}
    driver.client("127.0.0.2").say(rtp(1))
    driver.turn()
    assert told == [True, True, False]


@pytest.mark.parametrize("of_network", [False, True])
def test_the_second_one_stays(driver: Driver, of_network: bool) -> None:
    """The one that was asked for first makes room, and the other one is found yet."""
    target = driver.target()
    driver.target()
    first, second = driver.client(), driver.client()
    say(driver, first)
    driver.wait_for(FAIR_CHANCE)
    say(driver, second)
    told: list[bool] = []
    driver.decide = lambda newcomer: told.append(
        driver.relay.cease_asking(newcomer.number if of_network else None)
    )
    driver.client().say(rtp(1))
    driver.turn()
    assert told == [True]
    for received in tuple(target.received):
        target.send(success(), received.source)
    driver.settle()
    assert (first.data, second.data) == ([], [success()])


def test_a_session_that_has_a_target_goes_on(driver: Driver) -> None:
    """Nobody else is asked for its client; that is all."""
    own = driver.target()
    client = driver.client()
    own.answer = answering(error(400))
    driver.decide = driver.admit
    say(driver, client)
    driver.decide = driver.ask
    other = driver.target()
    driver.wait_for(WHILE)
    say(driver, client)
    relay = driver.relay
    assert (relay.undecided, relay.sockets, len(other.data)) == (1, 2, 1)
    assert not relay.cease_asking()
    driver.wait_for(FAIR_CHANCE)
    assert relay.cease_asking()
    assert (relay.undecided, relay.sockets, relay.live) == (0, 1, 1)
    own.received.clear()
    say(driver, client, data=rtp(1))
    assert own.data == [rtp(1)]
    assert driver.ended(driver.generation) == {}
    # It may ask again, and is the youngest then.
    driver.wait_for(WHILE)
    say(driver, client)
    assert (relay.undecided, len(other.data)) == (1, 2)


# What is one network


def free_bound(driver: Driver, address: str) -> Client:
    """Return a client from an address that this host does not have."""
    client = driver.client("::1")
    client.sock.close()
    client.sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    client.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    client.sock.bind((address, 0))
    return client


@needs_ipv6
def test_networks(driver: Driver) -> None:
    """A host of IPv6 has a /64 of addresses, one of IPv4 has one."""
    driver.target()
    driver.target()
    told: list[int] = []

    def decide(newcomer: Newcomer) -> None:
        told.append(driver.relay.undecided_from(newcomer.number))
        driver.ask(newcomer)

    driver.decide = decide
    networks = [
        ["fd00:1:2:3::1", "fd00:1:2:3::2", "fd00:1:2:3:ffff:ffff:ffff:ffff"],
        ["fd00:1:2:4::1", "fd00:1:2:4:1::"],
        ["::1", "::2:1"],
        ["127.0.0.1", "127.0.0.1"],
        ["127.0.0.2"],
        ["127.1.0.1"],
    ]
    for network in networks:
        for address in network:
            six = ":" in address
            say(driver, free_bound(driver, address) if six else driver.client(address))
    assert told == [place for network in networks for place in range(len(network))]
    assert driver.relay.undecided == len(told)


# Headers


def test_some_targets_get_no_header(driver: Driver) -> None:
    """From the begin of a session, or when others are asked for its client later."""
    targets = [driver.target() for _ in range(3)]
    plain = {targets[1].number}
    relay = driver.relay

    def decide(newcomer: Newcomer) -> None:
        number, numbers = newcomer.number, driver.targets
        if relay.has_session(number):
            relay.ask(number, numbers, 1, b"header ", bare=plain)
        elif relay.opening(number) == request(b"known"):
            relay.admit(number, driver.generation, numbers[:1], b"header ", bare=plain)
        else:
            relay.admit(number, driver.generation, numbers, b"header ", asking=2, bare=plain)

    driver.decide = decide
    unknown, known = driver.client(), driver.client()
    say(driver, unknown)
    expected = [b"header " + request(), request(), b"header " + request()]
    assert [target.data for target in targets] == [[data] for data in expected]
    targets[1].send(success(), targets[1].received[0].source)
    driver.settle()
    say(driver, unknown, data=rtp(1))
    assert targets[1].data[1:] == [rtp(1)], "it is the header's lack that is kept"
    say(driver, known, data=request(b"known"))
    assert targets[0].data[1:] == [b"header " + request(b"known")]
    for target in targets:
        target.received.clear()
    driver.wait_for(WHILE)
    say(driver, known)
    assert [target.data for target in targets] == [[data] for data in expected]
