"""Round robin: fair, only over targets in rotation, never one that has just failed. Rollout."""

from __future__ import annotations

import itertools
from collections import Counter

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamal_proxy.balancer import RoundRobin, is_chosen, split_point
from tests.fuzzing import at_least
from tests.reference.fnv import fnv1a_32 as reference


@attrs.define(eq=False)
class Instance:
    name: str
    in_rotation: bool = True


def instances(healthy: str) -> list[Instance]:
    """Make one instance per letter; capital letters are out of rotation."""
    return [Instance(letter, letter.islower()) for letter in healthy]


def names(chosen: list[Instance | None]) -> str:
    return "".join(instance.name if instance else "-" for instance in chosen)


@pytest.mark.parametrize(
    ("targets", "avoided", "turns"),
    [
        ("", "", "--"),
        ("a", "", "aaa"),
        ("A", "", "--"),
        ("a", "a", "--"),
        ("ab", "", "baba"),
        ("abc", "", "bcabca"),
        ("aBc", "", "caca"),
        ("ABc", "", "ccc"),
        ("ABC", "", "--"),
        ("abc", "b", "caca"),
        ("abc", "abc", "--"),
        ("aBc", "a", "ccc"),
        ("aBC", "a", "--"),
    ],
)
def test_turns(targets: str, avoided: str, turns: str) -> None:
    balancer = RoundRobin()
    all_targets = instances(targets)
    avoid = {target for target in all_targets if target.name in avoided}
    assert names([balancer.choose(all_targets, avoid) for _ in turns]) == turns


def test_balancers_take_turns_of_their_own() -> None:
    targets = instances("ab")
    first, second = RoundRobin(), RoundRobin()
    assert names([first.choose(targets), second.choose(targets)]) == "bb"


def test_a_target_that_comes_back_gets_its_turn() -> None:
    balancer = RoundRobin()
    targets = instances("aB")
    before = names([balancer.choose(targets) for _ in range(3)])
    targets[1].in_rotation = True
    assert before == "aaa"
    assert sorted(names([balancer.choose(targets) for _ in range(4)])) == ["B", "B", "a", "a"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 5))
def test_every_target_in_rotation_gets_the_same(rotation: list[bool], rounds: int) -> None:
    targets = [Instance(str(i), healthy) for i, healthy in enumerate(rotation)]
    healthy = [target for target in targets if target.in_rotation]
    balancer = RoundRobin()
    chosen = [balancer.choose(targets) for _ in range(rounds * max(1, len(healthy)))]
    assert Counter(chosen) == (
        Counter(dict.fromkeys(healthy, rounds)) if healthy else Counter({None: rounds})
    )
    if len(healthy) > 1:
        assert all(first is not second for first, second in itertools.pairwise(chosen))


# Rollout: the values and points are what the Go proxy computes


@pytest.mark.parametrize(
    ("percentage", "point"),
    [(0, 0), (1, 42949672.95), (33, 1417339207.3500001), (50, 2147483647.5), (100, 4294967295)],
)
def test_split_points(percentage: int, point: float) -> None:
    assert split_point(percentage) == point


@pytest.mark.parametrize(
    ("value", "share"),
    [
        (b"a", 0xE40C292C),
        (b"b", 0xE70C2DE5),
        (b"foo", 0xA9F37ED7),
        (b"foobar", 0xBF9CF968),
    ],
)
def test_a_client_belongs_from_its_hash_on(value: bytes, share: int) -> None:
    assert is_chosen(value, share, ())
    assert not is_chosen(value, share - 1, ())
    assert not is_chosen(value, 0, ())
    assert is_chosen(value, split_point(100), ())


@pytest.mark.parametrize("point", [split_point(0), split_point(100)])
def test_who_has_no_cookie_does_not_belong(point: float) -> None:
    assert not is_chosen(b"", point, ("",))


def test_the_allow_list_is_exact() -> None:
    allowed = ("alice", "jörg", "y&z")
    assert is_chosen(b"alice", 0, allowed)
    assert is_chosen("jörg".encode(), 0, allowed)
    assert is_chosen(b"y&z", 0, allowed)
    for value in (b"Alice", b"alice ", b"ali", "jörg".encode("latin-1"), b"\xff"):
        assert not is_chosen(value, 0, allowed)


@pytest.mark.fuzz
@given(st.binary(), st.integers(0, 100))
@at_least(100)
def test_the_share_is_that_of_the_hash(value: bytes, percentage: int) -> None:
    chosen = is_chosen(value, split_point(percentage), ())
    assert chosen == (value != b"" and reference(value) <= 0xFFFFFFFF * percentage / 100)


@given(st.binary(min_size=1), st.integers(0, 99))
@at_least(50)
def test_a_larger_share_keeps_its_clients(value: bytes, percentage: int) -> None:
    if is_chosen(value, split_point(percentage), ()):
        assert is_chosen(value, split_point(percentage + 1), ())


def test_shares_are_about_as_large_as_they_say() -> None:
    clients = [b"%d" % number for number in range(10_000)]
    for percentage in (1, 10, 50, 90):
        count = sum(is_chosen(client, split_point(percentage), ()) for client in clients)
        assert abs(count - 100 * percentage) < 300
