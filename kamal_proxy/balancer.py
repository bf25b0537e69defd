"""Which target a request goes to. Pure: health is passed in, and no clock is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from kamal_proxy._fastpath import fnv1a_32

if TYPE_CHECKING:
    from collections.abc import Container, Sequence


class Candidate(Protocol):
    """What a choice needs to know of a target."""

    @property
    def in_rotation(self) -> bool:
        """Whether the target may be given requests."""


T = TypeVar("T", bound=Candidate)


class RoundRobin:
    """Give each target in rotation its turn."""

    __slots__ = ("_turn",)

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, targets: Sequence[T], avoid: frozenset[T] | set[T] = frozenset()) -> T | None:
        """Return the next target in rotation.

        Args:
            targets: All targets, always in the same order.
            avoid: Targets that have just failed this request.

        Returns:
            A target, or None if there is none left.
        """
        if len(targets) == 1:
            only = targets[0]
            return None if only in avoid or not only.in_rotation else only
        for _ in targets:
            self._turn = (self._turn + 1) % len(targets)
            target = targets[self._turn]
            if target.in_rotation and target not in avoid:
                return target
        return None


_MAX_HASH = 0xFFFFFFFF


def split_point(percentage: int) -> float:
    """Return the largest 32-bit hash that belongs to a share of all clients, 0 to 100."""
    return _MAX_HASH * (percentage / 100)


def is_chosen(value: bytes, point: float, allowlist: Container[str]) -> bool:
    """Return whether a client belongs to a rollout.

    Args:
        value: Value of the client's cookie.
        point: The share, as :func:`split_point` returned it.
        allowlist: Values that always belong to it.
    """
    if not value:
        return False
    return value.decode("utf-8", "surrogateescape") in allowlist or fnv1a_32(value) <= point
