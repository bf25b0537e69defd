"""Any datagrams and trains, in both directions and over ways that take no trains, arrive whole."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzzing import at_least
from tests.udp.relaying import LARGEST, SO_NO_CHECK, driving
from tests.udp.test_relay_trains import HEADER, split

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = st.one_of(st.sampled_from([0, 1, 2, 40, 40, 40, 1200, 1200, LARGEST]), st.integers(0, 3000))
MARKS = st.sampled_from([0, 0, 0, 1, 0xB8])
# Who sends, how large, how many as a train, how much shorter the last is, and the mark.
SENDINGS = st.lists(
    st.tuples(st.integers(0, 3), SIZES, st.integers(1, 20), st.integers(0, 50), MARKS), max_size=40
)
Sending = tuple[int, int, int, int, int]


def make(place: int, sending: Sending) -> tuple[bytes, int]:
    """Return what a sending sends, and its segment size."""
    _, size, count, less, _ = sending
    count = max(1, min(count, LARGEST // max(size, 1))) if size else 1
    whole = b"".join((b"%d.%d " % (place, each)).ljust(size, b".")[:size] for each in range(count))
    data = whole[: len(whole) - min(less, size - 1)] if count > 1 else whole
    return data, size if count > 1 and len(data) > size else 0


def expected_of(sendings: Sequence[Sending], who: int) -> list[tuple[bytes, int]]:
    """Return the datagrams, with their marks, that one sender sent."""
    found = []
    for place, sending in enumerate(sendings):
        if sending[0] == who:
            data, segment = make(place, sending)
            parts = split(data, segment) if segment else [data]
            found += [(part, sending[4]) for part in parts]
    return found


@pytest.mark.fuzz
@at_least(60)
@given(SENDINGS, st.booleans(), st.booleans(), st.booleans())
@example([(0, 40, 20, 0, 0)] * 10, True, False, False)
def test_any_datagrams_arrive_whole_and_in_order(
    sendings: list[Sending], with_header: bool, refusing: bool, replies: bool
) -> None:
    """Three clients, or the target in their sessions, send trains and single datagrams."""
    header = HEADER if with_header else b""
    with driving() as driver, ExitStack() as stack:
        driver.header = header
        target = driver.target()
        clients = [driver.client() for _ in range(4)]
        ways = []
        for client in clients:
            client.say(b"begin")
            driver.settle()
            ways.append(target.received[-1].source)
        assert len(set(ways)) == 4
        target.received.clear()
        if refusing:
            for upstream in driver.upstreams(target.where):
                stack.callback(upstream.close)
                upstream.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
            driver.listeners[0].setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        for place, sending in enumerate(sendings):
            data, segment = make(place, sending)
            if replies:
                target.send(data, ways[sending[0]], segment=segment, tos=sending[4])
            else:
                clients[sending[0]].say(data, segment=segment, tos=sending[4])
        driver.settle()
        room = LARGEST - (0 if replies else len(header))
        for who, client in enumerate(clients):
            expected = expected_of(sendings, who)
            fitting = [each for each in expected if len(each[0]) <= room]
            if replies:
                assert [(each.data, each.tos) for each in client.received] == fitting
            else:
                got = [each for each in target.received if each.source == ways[who]]
                assert all(each.data.startswith(header) for each in got)
                assert [(each.data[len(header) :], each.tos) for each in got] == fitting
        counters = driver.relay.counters()
        passed = sum(len(client.received) for client in clients)
        assert counters["datagrams_out"] == passed
        assert counters["datagrams_in"] == 4 + len(target.received)
        total = sum(len(expected_of(sendings, who)) for who in range(4))
        lost = sum(driver.dropped().values())
        assert total == passed + len(target.received) + lost
        assert set(driver.dropped()) <= {"too_long"}
