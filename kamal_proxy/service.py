"""A service at one moment: a name, its options, the deployments that serve it, its pause state.

A value: a change makes another one and a new routing table that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kamal_proxy.deployment import Deployment
from kamal_proxy.options import ServiceOptions, TargetOptions
from kamal_proxy.state import SavedPause, SavedRollout


@attrs.frozen(kw_only=True, eq=False)
class Service:
    """One service.

    Attributes:
        name: Its name.
        options: What it answers to.
        target_options: How requests travel to its targets.
        active: The deployment that serves it.
        pause: Whether it is running, paused or stopped.
        rollout, rollout_targets, rollout_readers, active_readers, extra: What the saved state said
            of features this version does not have, kept so that another version finds it again.
    """

    name: str
    options: ServiceOptions
    target_options: TargetOptions
    active: Deployment
    pause: SavedPause = attrs.field(factory=SavedPause)
    rollout: SavedRollout | None = None
    rollout_targets: tuple[str, ...] = ()
    rollout_readers: tuple[str, ...] = ()
    active_readers: tuple[str, ...] = ()
    extra: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def forwards_headers(self) -> bool:
        """Whether incoming X-Forwarded-* headers are believed."""
        forward = self.target_options.forward_headers
        return not self.options.tls_enabled if forward is None else forward
