"""A service at one moment: a name, its options, the deployments that serve it, its pause state.

A value: a change makes another one and a new routing table that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import trio

from kamal_proxy.control.messages import ServiceDescription
from kamal_proxy.deployment import Deployment
from kamal_proxy.health import TargetState
from kamal_proxy.matching import decoded_path, has_prefix, host_name
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state import SavedPause, SavedRollout, SavedService
from kamal_proxy.target_options import TargetOptions
from kamal_proxy.tls.files import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pages(Protocol):
    """A service's own error pages."""

    def render(self, status: int, message: str = "") -> bytes | None:
        """Return the page for a status, or None if there is none of its own."""


@attrs.frozen(kw_only=True, eq=False)
class Service:
    """One service.

    Attributes:
        name: Its name.
        options: What it answers to.
        target_options: How requests travel to its targets.
        active: The deployment that serves it.
        rollout: The deployment that serves those whom ``split`` chooses, if there is one.
        split: Whom it serves; without one, nobody.
        pause: Whether it is running, paused or stopped.
        released: Set when ``pause`` was changed or the service removed: whoever waits should look
            at the routing table again. It outlives a deploy.
        pages: Its own error pages.
        tls: What its TLS handshakes need from files; None without TLS.
        canonical_name: Host to which requests for any other are redirected, as hosts are compared;
            empty means none.
        client_ip_header: Lower-case name of the header that holds the client's address, if any.
        extra: What the saved state said that this version does not know, kept so that another
            version finds it again.
    """

    name: str
    options: ServiceOptions
    target_options: TargetOptions
    active: Deployment
    rollout: Deployment | None = None
    split: SavedRollout | None = None
    pause: SavedPause = attrs.field(factory=SavedPause)
    released: trio.Event = attrs.field(factory=trio.Event)
    pages: Pages | None = None
    tls: TlsFiles | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    canonical_name: str = attrs.field(init=False)
    client_ip_header: bytes = attrs.field(init=False)
    _timeouts: tuple[tuple[bytes, float], ...] = attrs.field(init=False)

    @canonical_name.default
    def _comparable_canonical_host(self) -> str:
        return host_name(self.options.canonical_host)

    @client_ip_header.default
    def _lower_client_ip_header(self) -> bytes:
        return self.options.client_ip_header.lower().encode()

    @_timeouts.default
    def _sorted_timeouts(self) -> tuple[tuple[bytes, float], ...]:
        """Sort the limits of paths: the longest prefix wins."""
        limits = (
            (limit.path.encode(), limit.timeout) for limit in self.target_options.path_timeouts
        )
        return tuple(sorted(limits, key=lambda limit: -len(limit[0])))

    @property
    def deployments(self) -> Iterator[Deployment]:
        """All deployments that serve it."""
        yield self.active
        if self.rollout is not None:
            yield self.rollout

    @property
    def forwards_headers(self) -> bool:
        """Whether incoming X-Forwarded-* headers are believed."""
        forward = self.target_options.forward_headers
        return not self.options.tls_enabled if forward is None else forward

    @property
    def redirects_to_https(self) -> bool:
        """Whether requests without TLS have to come again with it."""
        return self.options.tls_enabled and self.options.tls_redirect

    def response_timeout(self, path: bytes) -> float:
        """Return the seconds that a target has for the head of its response.

        Args:
            path: Path as the target sees it, without query. It is compared decoded but for its
                slashes, as paths are when they are routed.
        """
        seconds = self.target_options.response_timeout
        if self._timeouts:
            path = decoded_path(path)
            seconds = next((t for prefix, t in self._timeouts if has_prefix(path, prefix)), seconds)
        return seconds or math.inf

    def saved(self) -> SavedService:
        """Return what is to be saved of it."""
        return SavedService(
            name=self.name,
            service_options=self.options,
            target_options=self.target_options,
            active_targets=self.active.writer_names,
            active_readers=self.active.reader_names,
            rollout_targets=() if self.rollout is None else self.rollout.writer_names,
            rollout_readers=() if self.rollout is None else self.rollout.reader_names,
            pause=self.pause,
            rollout=self.split,
            extra=self.extra,
        )

    def describe(self, draining: int) -> ServiceDescription:
        """Describe it.

        Args:
            draining: Requests still being served by targets that were replaced.
        """
        rollout, split = self.rollout, self.split
        paused, stopped = self.pause.state == "paused", self.pause.state == "stopped"
        return ServiceDescription(
            name=self.name,
            hosts=self.options.hosts,
            path_prefixes=self.options.path_prefixes,
            targets=self.active.writer_names,
            read_targets=self.active.reader_names,
            rollout_targets=() if rollout is None else rollout.writer_names,
            rollout_read_targets=() if rollout is None else rollout.reader_names,
            rollout_active=rollout is not None and split is not None,
            rollout_percentage=0 if split is None else split.percentage,
            rollout_allowlist=() if split is None else split.allowlist,
            healthy=tuple(
                target.given
                for deployment in self.deployments
                for target in deployment.targets
                if target.health.state is TargetState.HEALTHY
            ),
            state=self.pause.state,
            stop_message=self.pause.stop_message if stopped else "",
            max_pause=self.pause.fail_after if paused else 0.0,
            tls=self.options.tls_enabled,
            in_flight=sum(deployment.in_flight for deployment in self.deployments),
            draining=draining,
        )
