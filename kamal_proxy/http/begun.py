"""What is known of an exchange that was begun in the lane, and that a task goes on with."""

from __future__ import annotations

import attrs

from kamal_proxy.deployment import Deployment, InFlight, Target
from kamal_proxy.http.upstream import UpstreamConnection
from kamal_proxy.service import Service


@attrs.frozen
class Begun:
    """An exchange with which a task goes on.

    Attributes:
        former: What the deployment knows it as until now.
        service: Its service; the request counts as in flight there already.
        deployment: The deployment that serves it.
        target: The target that was chosen for it.
        upstream: The connection on which the request was sent; None if there was none.
        prefix: What is removed from its path, if anything.
        request_id: Its id.
        started: When its head had arrived, in nanoseconds of ``time.perf_counter_ns``.
        remaining: Seconds that are left for the head of the response.
        unsent: What the target has not got of the request yet.
        response: Head of the response, if the client has got it already.
        sent: Bytes of body that the client has got.
        received: What else has come from the target.
    """

    former: InFlight
    service: Service
    deployment: Deployment
    target: Target
    upstream: UpstreamConnection | None
    prefix: bytes
    request_id: bytes
    started: int
    remaining: float
    unsent: bytes
    response: bytes
    sent: int
    received: bytes
