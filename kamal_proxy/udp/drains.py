"""When the sessions of a deployment that was replaced end, for each drain strategy. Pure.

A plan is made at the swap and its times count from there. Sessions also end by themselves
meanwhile, and a drain is done as soon as none is left; who watches them is not this module's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from kamal_proxy.udp.options import UdpDeploymentOptions


@attrs.frozen(kw_only=True)
class DrainPlan:
    """What is done to the sessions that are left, in seconds after the swap.

    Attributes:
        goodbye_after: When each is told goodbye; None means never.
        end_silent_after: From when on one is ended that was silent for two seconds; None means
            never.
        cut_after: When all others are cut.
    """

    goodbye_after: float | None = None
    end_silent_after: float | None = None
    cut_after: float


def plan_drain(options: UdpDeploymentOptions, *, has_goodbyes: bool) -> DrainPlan:
    """Return the plan for the sessions of the deployment that a deploy replaces.

    Args:
        options: Those of the deploy; nothing happens later than its ``force_kill_timeout``.
        has_goodbyes: Whether the protocol can tell a peer that a session ends. Plain UDP can't.
    """
    latest = options.force_kill_timeout
    if not options.zero_downtime or options.drain_strategy == "immediate":
        return DrainPlan(goodbye_after=0.0 if has_goodbyes else None, cut_after=0.0)
    if options.drain_strategy == "timeout":
        return DrainPlan(cut_after=latest)
    patience = min(options.drain_timeout, latest)
    if not has_goodbyes:
        # Nothing tells the peers, so that waiting longer would change nothing.
        return DrainPlan(cut_after=patience)
    return DrainPlan(goodbye_after=patience, end_silent_after=patience, cut_after=latest)
