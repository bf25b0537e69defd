"""Which ports a service has and which of them are pairs, against slow sets of single ports."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.udp.options import UdpOptions
from kamal_proxy.udp.ranges import common_port, names_of, pairs_of, ports_of, spans_of, without


def options(*ranges: str, **fields: Any) -> UdpOptions:
    return UdpOptions(protocol="webrtc", port_ranges=ranges, **fields)


@pytest.mark.parametrize(
    ("given_options", "ports", "names"),
    [
        (UdpOptions(port=9999), (9999,), ("udp/9999",)),
        (options("10-13"), (10, 11, 12, 13), ("udp/10-13",)),
        (options("7-7"), (7,), ("udp/7",)),
        (options("30-31", "10-11"), (30, 31, 10, 11), ("udp/30-31", "udp/10-11")),
        (options("10-11", port=5), (5, 10, 11), ("udp/5", "udp/10-11")),
        (options("10-11", port=12), (12, 10, 11), ("udp/12", "udp/10-11")),
        (options("10-11", "20-21", port=20), (10, 11, 20, 21), ("udp/10-11", "udp/20-21")),
        (options(port=20), (20,), ("udp/20",)),
    ],
)
def test_ports(given_options: UdpOptions, ports: tuple[int, ...], names: tuple[str, ...]) -> None:
    given_options.validate()
    assert ports_of(given_options) == ports
    assert names_of(spans_of(given_options)) == names


@pytest.mark.parametrize(
    ("given_options", "pairs"),
    [
        (options("10-13"), ((10, 11), (12, 13))),
        (options("11-14"), ((12, 13),)),
        (options("10-10"), ()),
        (options("11-12"), ()),
        (options("10-13", rtcp_policy="adjacent"), ((10, 11), (12, 13))),
        # Whatever range the next port is in.
        (options("10-10", "11-12", rtcp_policy="adjacent"), ((10, 11),)),
        (options("12-13", "10-11", rtcp_policy="adjacent"), ((12, 13), (10, 11))),
        # What is left over has no partner, and the order is the one that was given.
        (options("10-12", "20-21"), ((10, 20), (11, 21))),
        (options("20-21", "10-12"), ((20, 10), (21, 11))),
        (options("10-12", "20-21", rtcp_policy="separate-range"), ((10, 20), (11, 21))),
        # The single port is no half of a pair, unless it is in a range.
        (options("11-13", port=10), ((12, 13),)),
        (options("10-13", port=12), ((10, 11), (12, 13))),
        (options(port=10), ()),
        (UdpOptions(port=10), ()),
    ],
)
def test_pairs(given_options: UdpOptions, pairs: tuple[tuple[int, int], ...]) -> None:
    given_options.validate()
    assert pairs_of(given_options) == pairs


def test_all_ports_there_are() -> None:
    everything = options("1-65535")
    assert len(ports_of(everything)) == 65_535
    pairs = pairs_of(everything)
    assert (pairs[0], pairs[-1], len(pairs)) == ((2, 3), (65_534, 65_535), 32_767)


spans = st.builds(
    lambda start, size: range(start, start + size), st.integers(1, 30), st.integers(1, 12)
)


def as_set(found: list[range] | tuple[range, ...]) -> set[int]:
    return {port for span in found for port in span}


@pytest.mark.fuzz
@given(st.lists(spans, max_size=4), st.lists(spans, max_size=4))
def test_common_ports(some: list[range], others: list[range]) -> None:
    assert common_port(some, others) == min(as_set(some) & as_set(others), default=None)


@pytest.mark.fuzz
@given(st.lists(spans, max_size=4), st.lists(spans, max_size=4))
def test_what_is_left_of_spans(some: list[range], others: list[range]) -> None:
    left = without(some, others)
    assert as_set(left) == as_set(some) - as_set(others)
    assert all(left), "none is empty"


@pytest.mark.fuzz
@given(
    st.lists(st.integers(1, 40), min_size=4, max_size=4, unique=True).map(sorted),
    st.sampled_from(["auto", "adjacent", "separate-range"]),
    st.integers(0, 41),
    st.booleans(),
)
def test_pairs_are_of_ports_of_the_service(
    ends: list[int], policy: str, port: int, swapped: bool
) -> None:
    ranges = [f"{first}-{last}" for first, last in (ends[:2], ends[2:])]
    found = options(*(ranges[::-1] if swapped else ranges), port=port, rtcp_policy=policy)
    found.validate()
    ports, pairs = ports_of(found), pairs_of(found)
    assert len(set(ports)) == len(ports)
    halves = [half for pair in pairs for half in pair]
    assert len(set(halves)) == len(halves), "each port is of one pair at most"
    assert set(halves) <= set(ports)
    if policy == "adjacent":
        assert all(rtp % 2 == 0 and rtcp == rtp + 1 for rtp, rtcp in pairs)
    else:
        assert all(after[0] - before[0] == 1 for before, after in pairwise(pairs))
