"""Which target a new session goes to: rendezvous hashing over what may be chosen. Pure.

One target added to n, or taken away, moves one session in n + 1; a plain ``hash % n`` would move
most of them. Live sessions are not this module's: they stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from kamal_proxy._fastpath import rendezvous, target_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ADDRESS_SIZE = 16  # bytes of an address before its port


class Candidate(Protocol):
    """What a choice needs to know of a target."""

    @property
    def seed(self) -> int:
        """What :func:`seed_of` makes of its ``host:port``."""

    @property
    def in_rotation(self) -> bool:
        """Whether it may be given sessions."""

    @property
    def refused_lately(self) -> bool:
        """Whether its port was closed a moment ago: it is the last choice."""


C = TypeVar("C", bound=Candidate)


def seed_of(text: str) -> int:
    """Return the 64-bit seed of a target, by its configured ``host:port`` or a service's name."""
    return target_seed(text.encode())


def affinity_key(strategy: str, client: bytes, local: bytes) -> bytes:
    """Return what chooses the target of a new session: equal keys, equal targets.

    Args:
        strategy: ``5-tuple``, ``source-port`` or ``source-ip``.
        client: Address (16 bytes) and port (2 bytes) of the client.
        local: Address and port that it sends to, likewise.
    """
    if strategy == "source-ip":
        return client[:_ADDRESS_SIZE]
    return client if strategy == "source-port" else client + local


def choose(
    targets: Iterable[C],
    key: bytes,
    secret: int,
    may: Callable[[C], bool] = lambda _: True,
) -> C | None:
    """Return the target for a new session, or None if there is none.

    Args:
        targets: All targets.
        key: As :func:`affinity_key` returned it.
        secret: 64 bits that all choices of a service share.
        may: Whether a target is to be considered at all.
    """
    rotation = [target for target in targets if target.in_rotation and may(target)]
    if not rotation:
        return None
    # A target whose port was closed a moment ago is probably restarting; its probe is not as fast.
    rotation = [target for target in rotation if not target.refused_lately] or rotation
    if len(rotation) == 1:
        return rotation[0]
    return rotation[rendezvous(key, [target.seed for target in rotation], secret)]
