"""Round robin: fair, only over targets in rotation, never one that has just failed."""

from __future__ import annotations

import itertools
from collections import Counter

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamal_proxy.balancer import RoundRobin


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
