"""QUIC connections as their endpoint counts them, and as those see them who speak on them."""

from __future__ import annotations

import math
from ipaddress import ip_network
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from kamal_proxy.http.h2_guard import Budget

if TYPE_CHECKING:
    from aioquic.quic.events import QuicEvent

    from kamal_proxy.http.h3_endpoint import QuicEndpoint
    from kamal_proxy.http.h3_quic import ServerQuic
    from kamal_proxy.http.h3_socket import Path

# Seconds of processor time that a connection may cost beside what is of use: a datagram full of
# PING frames takes 3 ms, ten times what one with a request or a body does. As with HTTP/2, a burst,
# what comes back in a second, and what useful things earn.
WORK_BURST = 1.0
WORK_PER_SECOND = 0.1

#: Bytes of responses that clients have not acknowledged, of all connections together.
MAX_OUTPUT = 256 * 1024 * 1024


class Application(Protocol):
    """What is spoken on one connection."""

    def handle(self, event: QuicEvent) -> None:
        """Take an event of the connection: data, a reset, STOP_SENDING. It must not block."""

    def progress(self) -> None:
        """Note that the client may have acknowledged something, or raised a limit."""

    def lost(self) -> None:
        """Note that the connection has ended, whoever closed it; called once."""


@attrs.define(eq=False)
class Limits:
    """What all endpoints of a server count together.

    Attributes:
        max_connections: Connections that may be open at once.
        connections: How many are.
        unproven: Open handshakes of addresses that are not proven.
        proven: Those of the others, by address.
        handshakes: Both together.
        held: Bytes that the connections hold of what clients have sent.
        output: Bytes that they hold of what clients have not acknowledged.
        closing: Whether new connections are refused.
    """

    max_connections: int
    connections: int = 0
    unproven: int = 0
    proven: dict[str, int] = attrs.field(factory=dict)
    handshakes: int = 0
    held: int = 0
    output: int = 0
    closing: bool = False


class Link:
    """One connection, as its endpoint knows it.

    Args:
        endpoint: The endpoint.
        quic: The connection.
        path: Where it was opened from.
        give_up_at: When its handshake must be complete, on Trio's clock.
        proven: Whether the client had proven its address before.
    """

    __slots__ = (
        "_endpoint",
        "address_key",
        "application",
        "dirty",
        "farewell",
        "farewells",
        "give_up_at",
        "held",
        "ids",
        "number",
        "output",
        "path",
        "proven",
        "quic",
        "scheduled",
        "told",
        "work",
    )

    def __init__(
        self,
        endpoint: QuicEndpoint,
        quic: ServerQuic,
        path: Path,
        give_up_at: float,
        *,
        proven: bool,
    ) -> None:
        self._endpoint = endpoint
        self.quic = quic
        self.path = path
        self.proven = proven
        self.address_key = network_of(path)
        self.give_up_at = give_up_at  # when a handshake must be complete
        self.application: Application | None = None
        self.ids: set[bytes] = set()
        self.dirty = False  # something may be to be sent
        self.scheduled = math.inf  # when the endpoint will look at its timer
        self.number = -1  # among the timers
        self.farewell: tuple[bytes, Path] | None = None  # the packet that closed it
        self.farewells = 0  # datagrams that came after it
        self.held = 0
        self.output = 0
        self.told = False  # the application knows that it has ended
        self.work = Budget(WORK_BURST, WORK_PER_SECOND, trio.current_time())

    @property
    def server_name(self) -> str:
        """The name that the client asked for in its handshake; empty if none."""
        return self.quic.server_name

    @property
    def is_crowded(self) -> bool:
        """Whether all connections together hold all that they may of what was not acknowledged."""
        return self._endpoint.limits.output > MAX_OUTPUT

    def count_output(self, size: int) -> None:
        """Take note of how many bytes the connection holds that were not acknowledged."""
        if self.ids:
            self._endpoint.limits.output += size - self.output
            self.output = size

    def earn(self, work: float) -> None:
        """Take note of something useful, which is worth so many seconds of work."""
        self.work.give(work)

    def touch(self) -> None:
        """Have what was given to ``quic`` sent, soon."""
        self._endpoint.touch(self)

    def send_now(self) -> None:
        """Send what was given to ``quic`` before something else is done with it."""
        self._endpoint.send_now(self)

    def close(self, error: int, words: str = "") -> None:
        """Close the connection.

        Args:
            error: Code of the application (RFC 9114 8.1).
            words: For people who debug.
        """
        self.quic.close(error_code=error, reason_phrase=words)
        self.touch()


def network_of(path: Path) -> str:
    """Return whom a limit per address counts: an IPv4 address, or an IPv6 network of 64 bits."""
    host, _ = path.address
    return str(ip_network(f"{host}/64", strict=False)) if ":" in host else host
