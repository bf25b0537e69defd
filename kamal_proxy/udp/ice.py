"""What is remembered of ICE: whose a user name fragment is, and how many clients may be asked for.

Pure. Strangers can send any fragment; only those that a server has answered to are learned.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import attrs

T = TypeVar("T")


class UfragMap(Generic[T]):
    """Remembers what belongs to a user name fragment; the least recently used is forgotten first.

    Args:
        limit: How many are remembered.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[int, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def learn(self, key: int, value: T) -> None:
        """Remember a value, instead of what was known by the key."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit:
            self._values.popitem(last=False)

    def find(self, key: int) -> T | None:
        """Return the value of a key, or None."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]


@attrs.frozen(kw_only=True)
class AskLimits:
    """How many clients' requests may go to all targets at a time.

    Attributes:
        total: Clients in all.
        each: Clients of one network: an address, of IPv6 a /64.
    """

    total: int = 1024
    each: int = 64

    def may_ask(self, undecided: int, of_network: int) -> bool:
        """Return whether one more may be asked for.

        Args:
            undecided: Clients that are asked for now.
            of_network: How many of these are of the same network.
        """
        return undecided < self.total and of_network < self.each
