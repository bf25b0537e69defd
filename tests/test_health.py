"""The state machine of a target's health and its back-off, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamal_proxy.health import FIRST_RETRY, Health, ProbeResult, TargetState

GOOD = ProbeResult(True, "status 200", "http://a:80/up")
BAD = ProbeResult(False, "connection refused", "http://a:80/up")
ADDING, HEALTHY, UNHEALTHY = TargetState


@pytest.mark.parametrize(
    ("before", "result", "after"),
    [
        (ADDING, GOOD, HEALTHY),
        (ADDING, BAD, ADDING),
        (HEALTHY, GOOD, HEALTHY),
        (HEALTHY, BAD, UNHEALTHY),
        (UNHEALTHY, GOOD, HEALTHY),
        (UNHEALTHY, BAD, UNHEALTHY),
    ],
)
def test_transitions(before: TargetState, result: ProbeResult, after: TargetState) -> None:
    health = Health(1.0, before)
    assert health.record(result) is (before if before is not after else None)
    assert health.state is after
    assert health.last is result


@pytest.mark.parametrize(
    ("interval", "delays"),
    [
        (1.0, [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]),
        (0.3, [0.05, 0.1, 0.2, 0.3, 0.3]),
        (0.05, [0.05, 0.05, 0.05]),
        (0.01, [0.01, 0.01]),
    ],
)
def test_backs_off_until_a_target_first_answers(interval: float, delays: list[float]) -> None:
    health = Health(interval)
    seen = []
    for _ in delays:
        health.record(BAD)
        seen.append(health.delay())
    assert seen == pytest.approx(delays)


def test_the_interval_holds_from_the_first_answer_on() -> None:
    health = Health(2.0)
    health.record(BAD)
    assert health.delay() == FIRST_RETRY
    health.record(GOOD)
    assert health.delay() == 2.0
    health.record(BAD)
    assert health.delay() == 2.0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_any_history(results: list[bool]) -> None:
    health = Health(1.0)
    states = [health.state]
    for ok in results:
        before = health.record(GOOD if ok else BAD)
        assert before is (states[-1] if states[-1] is not health.state else None)
        states.append(health.state)
    assert (health.state is HEALTHY) == results[-1]
    assert (health.state is ADDING) == (True not in results)
    assert health.delay() <= 1.0


def test_the_retry_never_overflows() -> None:
    health = Health(1.0)
    assert [health.delay() for _ in range(2000)][-1] == 1.0
