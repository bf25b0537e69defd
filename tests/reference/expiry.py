"""The slow, obvious twin of the relay's expiry: look at every session and say which are over."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

Name = TypeVar("Name")

UNANSWERED = 30.0
"""Seconds that a session without an answer lives, unless every session lives shorter."""


@attrs.frozen
class Seen:
    """What is known of a session.

    Attributes:
        last: When its last datagram passed, in either direction; an empty one counts.
        answered: Whether its target has ever sent one.
    """

    last: float
    answered: bool


def ends_at(session: Seen, *, idle: float, unanswered: float) -> float:
    """Return when a session is over if no further datagram passes.

    Args:
        idle: Seconds of silence after which any session is over (``--session-timeout``).
        unanswered: The same for a session without an answer, if it is less than ``idle``.
    """
    return session.last + (idle if session.answered else min(unanswered, idle))


def over(
    sessions: Mapping[Name, Seen], now: float, *, idle: float, unanswered: float = UNANSWERED
) -> list[Name]:
    """Return the sessions that are over, in the order in which they ended."""
    ends = {
        name: ends_at(session, idle=idle, unanswered=unanswered)
        for name, session in sessions.items()
    }
    return sorted((name for name in ends if ends[name] <= now), key=lambda name: ends[name])
