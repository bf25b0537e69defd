"""What a process occupies, by what Linux tells, and whether it grew: so the demo finds leaks."""

from __future__ import annotations

import resource
from pathlib import Path

import attrs

MIB = 1 << 20


def memory_of(pid: int) -> int:
    """Return how many bytes of a process are in memory."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def descriptors_of(pid: int) -> int:
    """Return how many files and sockets a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@attrs.frozen
class Growth:
    """How a process changed: memory in bytes, descriptors counted when it had nothing to do.

    Attributes:
        memory_before: Once it had done everything a first time.
        memory_after: At the end.
        memory_bound: How many bytes more are no leak.
        descriptors_before: When it had just started.
        descriptors_after: At the end.
    """

    memory_before: int
    memory_after: int
    memory_bound: int
    descriptors_before: int
    descriptors_after: int

    @property
    def memory_text(self) -> str:
        """Both sizes in MiB."""
        return f"{self.memory_before / MIB:.1f} MiB, {self.memory_after / MIB:.1f} MiB"

    @property
    def descriptors_text(self) -> str:
        """Both counts."""
        return f"{self.descriptors_before}, {self.descriptors_after}"

    @property
    def leaks(self) -> tuple[str, ...]:
        """A sentence for everything that grew and should not have."""
        found = []
        grown = self.memory_after - self.memory_before
        if grown > self.memory_bound:
            found.append(
                f"The proxy's memory grew by {grown / MIB:.1f} MiB; "
                f"{self.memory_bound / MIB:g} MiB are allowed."
            )
        if self.descriptors_after > self.descriptors_before:
            left = self.descriptors_after - self.descriptors_before
            found.append(f"The proxy left {left} descriptors open.")
        return tuple(found)
