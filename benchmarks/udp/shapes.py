"""The loads that are measured: how large the datagrams are and how many sessions take turns."""

from __future__ import annotations

import argparse

import attrs

# What load.c writes into every datagram, and what an Ethernet frame carries.
SMALLEST_PAYLOAD = 40
LARGEST_PAYLOAD = 1472
MOST_SESSIONS = 65536

# So many that a relay always finds a full batch, so few that no default buffer overflows.
FEW_IN_FLIGHT = 64
MANY_IN_FLIGHT = 128


@attrs.frozen
class Shape:
    """A load.

    Attributes:
        payload: Bytes in each datagram.
        sessions: Clients, each with an address of its own.
    """

    payload: int
    sessions: int

    @property
    def window(self) -> int:
        """How many requests are in flight at once, all by one session if there is just one."""
        return FEW_IN_FLIGHT if self.sessions <= FEW_IN_FLIGHT else MANY_IN_FLIGHT

    def __str__(self) -> str:
        return f"{self.payload}x{self.sessions}"


DEFAULT = [
    Shape(payload, sessions) for sessions in (1, 64, 1_000, 10_000) for payload in (64, 200, 1200)
]
SMOKE = [Shape(64, 1), Shape(1200, 64), Shape(200, 300)]

# What media.c sends: an RTP header and 160 bytes, which is 20 ms of G.711.
RTP_BYTES = 12 + 160
CALLS = [Shape(RTP_BYTES, 64), Shape(RTP_BYTES, 1_000)]
SMOKE_CALLS = CALLS[:1]


def shape(text: str) -> Shape:
    """Read ``64x1000``, which is 64 bytes and 1,000 sessions; the type of an option."""
    payload, separator, sessions = text.partition("x")
    if not (separator and payload.isdecimal() and sessions.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not BYTESxSESSIONS, such as 64x1000")
    read = Shape(int(payload), int(sessions))
    if not SMALLEST_PAYLOAD <= read.payload <= LARGEST_PAYLOAD:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a datagram has {SMALLEST_PAYLOAD} to {LARGEST_PAYLOAD} bytes here"
        )
    if not 1 <= read.sessions <= MOST_SESSIONS:
        raise argparse.ArgumentTypeError(f"{text!r}: 1 to {MOST_SESSIONS} sessions are possible")
    return read
