"""Which target a request goes to. Pure: health is passed in, and no clock is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


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
