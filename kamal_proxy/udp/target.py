"""One target of a UDP service: its health, its addresses, and what the relay knows them by."""

from __future__ import annotations

import attrs
import trio

from kamal_proxy.health import Health, TargetState
from kamal_proxy.udp.names import SocketAddress, TargetName

#: Seconds for which a target that refused is the last choice.
AVOIDED = 1.0


@attrs.define(eq=False)
class UdpTarget:
    """One instance of a UDP service.

    Attributes:
        text: ``host:port`` as it was given.
        host: Host to connect to.
        port: Port to send to.
        health: Its health.
        address: Its name and what that stands for.
        alone: Whether it is the only target; such a one is never taken out of rotation.
        forced: Whether it may serve before its first probe succeeded.
        seed: What it is hashed by.
        current: The address that new sessions go to; None until one is known.
        number: What the relay knows this address by.
        numbers: The same for all its addresses that are used, or still have sessions.
        place: Which of its name's addresses is used; the next one after a refusal.
        switched_at: When that was last changed, on Trio's clock.
        refused_at: When its port was last found closed, on Trio's clock.
    """

    text: str
    host: str
    port: int
    health: Health
    address: TargetName
    alone: bool
    forced: bool
    seed: int
    current: SocketAddress | None = None
    number: int | None = None
    numbers: dict[SocketAddress, int] = attrs.field(factory=dict)
    place: int = 0
    switched_at: float | None = None
    refused_at: float | None = None

    @property
    def name(self) -> str:
        """``host:port`` as it was given."""
        return self.text

    @property
    def in_rotation(self) -> bool:
        """Whether it may be given sessions."""
        state = self.health.state
        return self.number is not None and (
            self.alone
            or state is TargetState.HEALTHY
            or (self.forced and state is TargetState.ADDING)
        )

    @property
    def refused_lately(self) -> bool:
        """Whether its port was found closed a moment ago."""
        return self.refused_at is not None and trio.current_time() - self.refused_at < AVOIDED
