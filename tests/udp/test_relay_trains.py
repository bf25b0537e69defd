"""Equal datagrams travel as trains (UDP_GRO, UDP_SEGMENT), and every one of them arrives as it was.

A peer with UDP_GRO receives a train as one, which shows that the relay sent one; a peer without it
receives the datagrams.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import pytest

from kamal_proxy.proxy_protocol import encode_v2
from tests.udp.relaying import (
    IPV6_MTU,
    LARGEST,
    SO_NO_CHECK,
    Client,
    Driver,
    Peer,
    Target,
    driving,
    echo,
    end_of,
    needs_ipv6,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = encode_v2(("127.0.0.1", 1), ("127.0.0.1", 2), datagram=True)


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def numbered(count: int, size: int) -> bytes:
    """Return datagrams of equal size that all differ."""
    return b"".join(b"%05d" % number + bytes(size - 5) for number in range(count))


def numbered_parts(count: int, size: int) -> list[bytes]:
    return split(numbered(count, size), size)


@contextmanager
def session(
    address: str = "127.0.0.1", *, trains: bool = False, header: bytes = b""
) -> Iterator[tuple[Driver, Client, Target, tuple[str, int]]]:
    """Begin a session; yield it, its ends, and where the target sends to."""
    with driving() as driver:
        driver.header = header
        target = driver.target(address, trains=trains)
        client = driver.client(address, trains=trains)
        client.say(b"begin")
        driver.pump(lambda: target.received)
        where = target.received[0].source
        target.send(b"begin", where)
        driver.pump(lambda: client.received)
        target.received.clear()
        client.received.clear()
        yield driver, client, target, where


# Whole trains


@pytest.mark.parametrize("size", [900, 1000, 1050])
def test_a_train_of_a_client_arrives(size: int) -> None:
    data = numbered(10, 100)[:size] + bytes(max(0, size - 1000))
    with session() as (driver, client, target, _):
        client.say(data, segment=100)
        driver.pump(lambda: sum(map(len, target.data)) == size)
        assert target.data == split(data, 100)
    with session(trains=True) as (driver, client, target, _):
        client.say(data, segment=100)
        driver.pump(lambda: target.received)
        assert [(each.data, each.segment) for each in target.received] == [(data, 100)]


@pytest.mark.parametrize("size", [900, 1000, 1050])
def test_a_train_of_a_target_arrives(size: int) -> None:
    data = numbered(10, 100)[:size] + bytes(max(0, size - 1000))
    with session() as (driver, client, target, where):
        target.send(data, where, segment=100)
        driver.pump(lambda: sum(map(len, client.data)) == size)
        assert client.data == split(data, 100)
        assert driver.relay.counters()["datagrams_out"] == 1 + len(split(data, 100))
    with session(trains=True) as (driver, client, target, where):
        target.send(data, where, segment=100)
        driver.pump(lambda: client.received)
        assert [(each.data, each.segment) for each in client.received] == [(data, 100)]


def test_a_train_begins_a_session() -> None:
    with driving() as driver:
        target, client = driver.target(), driver.client()
        client.say(numbered(5, 100)[:450], segment=100)
        client.say(b"last")
        driver.pump(lambda: b"last" in target.data)
        assert target.data == [*split(numbered(5, 100)[:450], 100), b"last"]
        assert driver.relay.counters()["datagrams_in"] == 6


def test_a_train_keeps_its_mark() -> None:
    with session() as (driver, client, target, where):
        client.say(numbered(3, 50), segment=50, tos=0xB9)
        target.send(numbered(3, 50), where, segment=50, tos=0x2E)
        driver.pump(lambda: len(target.received) == len(client.received) == 3)
        assert [each.tos for each in target.received] == [0xB9] * 3
        assert [each.tos for each in client.received] == [0x2E] * 3


@needs_ipv6
def test_trains_over_ipv6() -> None:
    with session("::1", trains=True) as (driver, client, target, where):
        client.say(numbered(20, 1200), segment=1200)
        target.send(numbered(30, 1000), where, segment=1000)
        driver.pump(lambda: target.received and client.received)
        assert [each.segment for each in target.received] == [1200]
        assert [each.segment for each in client.received] == [1000]
        assert b"".join(target.data) == numbered(20, 1200)
        assert b"".join(client.data) == numbered(30, 1000)


@needs_ipv6
def test_a_train_of_ipv6_that_is_too_long_for_ipv4_is_taken_apart() -> None:
    with driving() as driver:
        target, client = driver.target(), driver.client("::1")
        data = numbered(13, 5040)[:65527]
        client.say(b"begin")
        client.say(data, segment=5040)
        driver.pump(lambda: len(target.received) == 14)
        assert target.data == [b"begin", *split(data, 5040)]
        assert driver.dropped() == {}


# Trains that the relay makes


@pytest.mark.parametrize("reply", [False, True])
def test_equal_datagrams_become_a_train(reply: bool) -> None:
    with session(trains=True) as (driver, client, target, where):
        sender: Peer = target if reply else client
        receiver: Peer = client if reply else target
        to = where if reply else client.to
        for data in split(numbered(9, 200)[:1700], 200):
            sender.send(data, to)
        driver.pump(lambda: sum(map(len, receiver.data)) == 1700)
        # The last, shorter one is the end of it.
        assert [(each.segment, len(each.data)) for each in receiver.received] == [(200, 1700)]
        receiver.received.clear()
        for size in (200, 200, 150, 200, 200, 201, 201, 0, 0, 7):
            sender.send(bytes(size), to)
        driver.pump(lambda: len(receiver.received) >= 6)
        driver.settle()
        assert [(each.segment, len(each.data)) for each in receiver.received] == [
            (200, 550),
            (200, 400),
            (201, 402),
            (0, 0),
            (0, 0),
            (0, 7),
        ]


def test_datagrams_with_different_marks_are_no_train() -> None:
    with session(trains=True) as (driver, client, target, _):
        for mark in (1, 1, 2, 2, 2, 0, 0):
            client.say(b"equal", tos=mark)
        driver.pump(lambda: sum(map(len, target.data)) == 35)
        got = [(each.tos, len(each.data) // 5) for each in target.received]
        assert got == [(1, 2), (2, 3), (0, 2)]


def test_a_train_has_at_most_64_datagrams_and_the_largest_payload() -> None:
    with session(trains=True) as (driver, client, target, where):
        # Two trains of 40 join into one of 64 at most.
        for _ in range(2):
            client.say(numbered(40, 100), segment=100)
        for _ in range(3):
            target.send(numbered(20, 1400), where, segment=1400)
        driver.pump(lambda: sum(map(len, target.data)) == 8000)
        driver.pump(lambda: sum(map(len, client.data)) == 84000)
        assert b"".join(target.data) == numbered(40, 100) * 2
        assert b"".join(client.data) == numbered(20, 1400) * 3
        assert max(len(each.data) for each in target.received) <= 6400
        assert max(len(each.data) for each in client.received) <= LARGEST
        # They were sent as such: none had to be taken apart.
        assert {each.segment for each in target.received} == {100}
        assert {each.segment for each in client.received} == {1400}
        assert driver.dropped() == {}


def test_more_datagrams_at_once_than_one_call_takes() -> None:
    with session() as (driver, client, target, where):
        for number in range(150):
            client.say(numbered(7, 10 + number % 3), segment=10 + number % 3)
            target.send(numbered(9, 10 + number % 2), where, segment=10 + number % 2)
        driver.pump(lambda: len(target.received) == 1050 and len(client.received) == 1350)
        asked, answered = (
            [part for each in range(150) for part in numbered_parts(count, 10 + each % sizes)]
            for count, sizes in ((7, 3), (9, 2))
        )
        assert target.data == asked
        assert client.data == answered


# The header of each datagram


def test_each_datagram_has_the_header() -> None:
    with session(header=HEADER) as (driver, client, target, _):
        assert driver.relay.counters()["bytes_in"] == len(HEADER) + 5
        said = [b"", b"one", *split(numbered(6, 500)[:2900], 500), b"again", b"again"]
        for data in said:
            client.say(data)
        client.say(numbered(4, 300)[:1100], segment=300)
        client.say(b"marked", tos=0xB9)
        said += [*split(numbered(4, 300)[:1100], 300), b"marked"]
        driver.pump(lambda: len(target.received) == len(said))
        assert target.data == [HEADER + data for data in said]
        assert target.received[-1].tos == 0xB9
        target.answer = echo
        client.say(b"echo")
        driver.pump(lambda: client.received)
        assert client.data == [HEADER + b"echo"]  # the answer is passed as it is


def test_datagrams_with_a_header_become_a_train() -> None:
    with session(header=HEADER, trains=True) as (driver, client, target, _):
        client.say(numbered(4, 300)[:1100], segment=300)
        driver.pump(lambda: target.received)
        expected = b"".join(HEADER + data for data in split(numbered(4, 300)[:1100], 300))
        assert target.data == [expected]
        assert target.received[0].segment == 300 + len(HEADER)


def test_what_came_before_the_session_has_the_header() -> None:
    with driving() as driver:
        driver.header = bytes(range(52))
        target, client = driver.target(), driver.client()
        client.say(b"1")
        client.say(numbered(3, 100), segment=100)
        driver.pump(lambda: len(target.received) == 4)
        assert target.data == [
            driver.header + data for data in (b"1", *split(numbered(3, 100), 100))
        ]


def test_a_header_may_leave_no_room() -> None:
    with session(header=HEADER) as (driver, client, target, _):
        client.say(bytes(LARGEST - len(HEADER) + 1))
        client.say(bytes(LARGEST - len(HEADER)))
        driver.pump(lambda: target.received)
        assert target.data == [HEADER + bytes(LARGEST - len(HEADER))]
        assert driver.dropped() == {"too_long": 1}


def test_a_header_that_is_too_long() -> None:
    with driving() as driver:
        target, client = driver.target(), driver.client()
        client.say(b"hi")
        driver.header = bytes(53)
        with pytest.raises(ValueError, match="more than 52 bytes"):
            driver.settle()
        with pytest.raises(ValueError, match="wrong size"):
            driver.relay.restore(
                driver.numbers[0],
                end_of(client.where),
                0,
                end_of(client.to)[:16],
                driver.generation,
                target.number,
                0,
                False,
                0.0,
                bytes(53),
            )
        assert driver.relay.live == 0


# Ways that take no trains


@pytest.mark.parametrize("family", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("header", [b"", HEADER])
@pytest.mark.parametrize("tos", [0, 0xB9])
@needs_ipv6
def test_a_way_without_trains(family: str, header: bytes, tos: int) -> None:
    """Without checksums the kernel makes no trains, as over a device that can't make them."""
    with session(family, header=header) as (driver, client, target, where), ExitStack() as stack:
        (upstream,) = driver.upstreams(target.where)
        stack.callback(upstream.close)
        for sock in (upstream, *driver.listeners):
            sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        said = [(numbered(5, 100)[:450], 100), (numbered(70, 20)[:1395], 20)]
        for _ in range(2):  # the first refused train, and when it is known
            for data, segment in said:
                client.say(data, segment=segment, tos=tos)
                target.send(data, where, segment=segment, tos=tos)
            client.say(b"last")
            target.send(b"last", where)
            driver.settle()
        expected = [*(part for data, size in said for part in split(data, size)), b"last"]
        driver.pump(lambda: len(target.data) == len(client.data) == 2 * len(expected))
        driver.settle()
        assert [data.removeprefix(header) for data in target.data] == expected * 2
        assert client.data == expected * 2
        assert {each.tos for each in (*target.received, *client.received)} == {tos, 0}
        counters = driver.relay.counters()
        assert driver.dropped() == {}
        assert counters["datagrams_in"] == counters["datagrams_out"] == 1 + 2 * len(expected)
        total = 5 + 2 * sum(map(len, expected))
        assert counters["bytes_out"] == total
        assert counters["bytes_in"] == total + len(header) * (1 + 2 * len(expected))


@pytest.mark.parametrize("dual", [pytest.param(True, marks=needs_ipv6), False])
def test_a_way_without_trains_keeps_the_source(dual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers still leave from the address that the client sent to."""
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: dual)
    with driving() as driver:
        target, client = driver.target(), driver.client(to="127.0.0.2")
        client.say(b"begin")
        driver.settle()
        where = target.received[0].source
        driver.listeners[0].setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        target.send(numbered(5, 100), where, segment=100)
        driver.settle()
        target.send(b"last", where)
        driver.pump(lambda: len(client.received) == 6)
        assert client.data == [*numbered_parts(5, 100), b"last"]
        assert {each.source for each in client.received} == {("127.0.0.2", driver.port)}


@needs_ipv6
def test_a_way_for_smaller_datagrams_takes_them_in_fragments() -> None:
    with session("::1") as (driver, client, target, where), ExitStack() as stack:
        (upstream,) = driver.upstreams(target.where)
        stack.callback(upstream.close)
        for sock in (upstream, *driver.listeners):
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU, 1280)
        client.say(numbered(10, 1400), segment=1400)
        target.send(numbered(11, 1500), where, segment=1500)
        driver.pump(lambda: len(target.data) == 10 and len(client.data) == 11)
        assert target.data == split(numbered(10, 1400), 1400)
        assert client.data == split(numbered(11, 1500), 1500)
        assert driver.dropped() == {}


def test_a_way_without_trains_is_one_sessions_way() -> None:
    with session(trains=True) as (driver, client, target, _), ExitStack() as stack:
        (upstream,) = driver.upstreams(target.where)
        stack.callback(upstream.close)
        upstream.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        wide = driver.target(trains=True)
        driver.targets = [wide.number]
        other = driver.client()
        other.say(b"begin")
        driver.pump(lambda: wide.received)
        client.say(numbered(5, 100), segment=100)
        other.say(numbered(5, 100), segment=100)
        driver.pump(lambda: len(target.received) == 5 and len(wide.received) == 2)
        assert wide.received[1].segment == 100
        # It is not tried again with each train.
        upstream.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 0)
        client.say(numbered(5, 100), segment=100)
        driver.pump(lambda: len(target.received) == 10)
        assert {each.segment for each in target.received} == {0}


def test_groups_of_equal_datagrams_survive_interleaving() -> None:
    """Two clients' runs that alternate still become one train each: each run is gathered."""
    with driving() as driver:
        target, one, two = driver.target(trains=True), driver.client(), driver.client()
        for client in (one, two):
            client.say(b"begin")
        driver.settle()
        target.received.clear()
        for number in range(10):
            one.say(b"1%03d" % number)
            two.say(b"2%03d" % number)
        driver.settle()
        trains = [(each.data[:1], len(each.data)) for each in target.received]
        assert [first for first, _ in groupby(trains)] == [(b"1", 40), (b"2", 40)]
