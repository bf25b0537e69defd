"""When the sessions of a replaced deployment end, for every combination of a deploy's options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.udp.drains import DrainPlan, plan_drain
from kamal_proxy.udp.options import DRAIN_STRATEGIES, UdpDeploymentOptions

AT_ONCE = DrainPlan(cut_after=0)
GOODBYE_AT_ONCE = DrainPlan(goodbye_after=0, cut_after=0)


def plan(strategy: str, *, has_goodbyes: bool = False, zero_downtime: bool = True) -> DrainPlan:
    options = UdpDeploymentOptions(
        zero_downtime=zero_downtime,
        drain_strategy=strategy,
        drain_timeout=30,
        force_kill_timeout=120,
    )
    options.validate()
    return plan_drain(options, has_goodbyes=has_goodbyes)


@pytest.mark.parametrize("strategy", DRAIN_STRATEGIES)
def test_without_zero_downtime_all_end_at_the_swap(strategy: str) -> None:
    assert plan(strategy, zero_downtime=False) == AT_ONCE
    assert plan(strategy, zero_downtime=False, has_goodbyes=True) == GOODBYE_AT_ONCE


def test_immediate_ends_all_at_the_swap() -> None:
    assert plan("immediate") == AT_ONCE
    assert plan("immediate", has_goodbyes=True) == GOODBYE_AT_ONCE


def test_graceful_without_goodbyes_ends_at_the_drain_timeout() -> None:
    assert plan("graceful") == DrainPlan(cut_after=30)


def test_graceful_says_goodbye_and_waits_for_silence() -> None:
    assert plan("graceful", has_goodbyes=True) == DrainPlan(
        goodbye_after=30, end_silent_after=30, cut_after=120
    )


@pytest.mark.parametrize("has_goodbyes", [False, True])
def test_timeout_lets_all_run_without_goodbyes(has_goodbyes: bool) -> None:
    assert plan("timeout", has_goodbyes=has_goodbyes) == DrainPlan(cut_after=120)


def test_the_defaults_of_a_deploy_end_all_at_the_swap() -> None:
    assert plan_drain(UdpDeploymentOptions(), has_goodbyes=False) == AT_ONCE


seconds = st.floats(0, 1e9) | st.sampled_from([0.0, 2.0, 30.0, 120.0])


@given(
    # Also what validate() refuses: no combination may keep a session for longer.
    st.builds(
        UdpDeploymentOptions,
        zero_downtime=st.booleans(),
        drain_strategy=st.sampled_from(DRAIN_STRATEGIES),
        drain_timeout=seconds,
        force_kill_timeout=seconds,
    ),
    st.booleans(),
)
def test_what_every_plan_keeps(options: UdpDeploymentOptions, has_goodbyes: bool) -> None:
    made = plan_drain(options, has_goodbyes=has_goodbyes)
    assert 0 <= made.cut_after <= options.force_kill_timeout
    for time in (made.goodbye_after, made.end_silent_after):
        assert time is None or 0 <= time <= made.cut_after
    # Nobody is told goodbye where there is none to tell.
    assert has_goodbyes or made.goodbye_after is None
    # Silence ends only a session that was told goodbye.
    if made.end_silent_after is not None:
        assert made.goodbye_after is not None
        assert made.goodbye_after <= made.end_silent_after
    if not options.zero_downtime:
        assert made.cut_after == 0
    elif options.drain_strategy == "timeout":
        assert made.goodbye_after is None
    elif options.drain_strategy == "graceful":
        patience = min(options.drain_timeout, options.force_kill_timeout)
        # Until then, no session is disturbed.
        assert min(made.cut_after, made.goodbye_after or made.cut_after) >= patience
