"""What is remembered of ICE: which fragments are forgotten, how many clients may be asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.udp.ice import AskLimits, UfragMap
from tests.fuzzing import at_least


def remembering(limit: int, *keys: int) -> UfragMap[str]:
    """Return a map that has learned keys in that order, each with its number as a text."""
    learned: UfragMap[str] = UfragMap(limit)
    for key in keys:
        learned.learn(key, str(key))
    return learned


def test_what_was_learned_is_found() -> None:
    learned = remembering(3, 1, 2)
    assert [learned.find(key) for key in (1, 2, 3)] == ["1", "2", None]
    assert len(learned) == 2


def test_the_last_value_counts() -> None:
    learned = remembering(3, 1, 2)
    learned.learn(1, "elsewhere")
    assert learned.find(1) == "elsewhere"
    assert len(learned) == 2


def test_the_oldest_is_forgotten() -> None:
    learned = remembering(3, 1, 2, 3, 4)
    assert [learned.find(key) for key in (1, 2, 3, 4)] == [None, "2", "3", "4"]
    assert len(learned) == 3


def test_what_is_asked_for_is_kept() -> None:
    learned = remembering(3, 1, 2, 3)
    assert learned.find(1) == "1"
    learned.learn(4, "4")
    assert [learned.find(key) for key in (1, 2, 3, 4)] == ["1", None, "3", "4"]


def test_what_is_learned_again_is_kept() -> None:
    learned = remembering(3, 1, 2, 3, 1, 4)
    assert [learned.find(key) for key in (1, 2, 3, 4)] == ["1", None, "3", "4"]


def test_asking_for_the_unknown_changes_nothing() -> None:
    """Strangers ask as often as they like."""
    learned = remembering(3, 1, 2, 3)
    for key in range(100, 200):
        assert learned.find(key) is None
    assert [learned.find(key) for key in (1, 2, 3)] == ["1", "2", "3"]


def test_a_map_of_nothing() -> None:
    learned = remembering(0, 1, 2)
    assert learned.find(1) is None
    assert learned.find(2) is None
    assert len(learned) == 0


@pytest.mark.fuzz
@at_least(300)
@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 7))))
def test_any_sequence(limit: int, steps: list[tuple[bool, int]]) -> None:
    """Against a list of keys, the least recently used first."""
    learned: UfragMap[int] = UfragMap(limit)
    order: list[int] = []
    values: dict[int, int] = {}
    for number, (learns, key) in enumerate(steps):
        if learns:
            learned.learn(key, number)
            values[key] = number
        else:
            assert learned.find(key) == (values[key] if key in order else None)
        if learns or key in order:
            order = [*(each for each in order if each != key), key][-limit:]
        assert len(learned) == len(order)
    assert [learned.find(key) for key in order] == [values[key] for key in order]


@pytest.mark.parametrize(
    ("undecided", "of_address", "may"),
    [
        (0, 0, True),
        (63, 63, True),
        (64, 64, False),
        (64, 63, True),
        (1023, 0, True),
        (1023, 63, True),
        (1023, 64, False),
        (1024, 0, False),
        (5000, 0, False),
        (5000, 5000, False),
    ],
)
def test_how_many_may_be_asked_for(undecided: int, of_address: int, may: bool) -> None:
    assert AskLimits().may_ask(undecided, of_address) is may


def test_other_limits() -> None:
    """One address fills its own share, all addresses fill that of all, and no more."""
    limits = AskLimits(total=10, each=4)
    waiting: list[str] = []
    for address in ["greedy"] * 9 + ["second"] * 9 + ["third"] * 9 + ["fourth"]:
        if limits.may_ask(len(waiting), waiting.count(address)):
            waiting.append(address)
    assert waiting == ["greedy"] * 4 + ["second"] * 4 + ["third"] * 2
