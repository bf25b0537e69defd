"""Runs simulations from seeds, and names the seed of one that fails; what happens is theirs."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Protocol

from hypothesis import settings

from tests.udp.serving import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

SEED = "UDP_SIMULATION_SEED"
STEPS = 100
SHOWN_STEPS = 60


class Simulated(Protocol):
    """A simulation.

    Attributes:
        steps: What it has done.
        setting: What else tells one failure from another; may be empty.
    """

    steps: list[str]
    setting: str

    async def run(self, steps: int) -> None:
        """Do so many steps, and check after each."""


async def simulate(
    opened: Callable[[int, Path], AbstractAsyncContextManager[Simulated]], path: Path, runs: int
) -> None:
    """Run simulations: the one of UDP_SIMULATION_SEED, or a few; with ``make fuzz`` a hundred.

    Args:
        opened: Makes one from a seed and a directory of its own, and closes it.
        path: Directory for all of them.
        runs: How many are a few.
    """
    if given := os.environ.get(SEED):
        seeds = [int(given)]
    else:
        count = max(runs, settings().max_examples // 200)
        seeds = [random.SystemRandom().randrange(2**32) for _ in range(count)]
    for number, seed in enumerate(seeds):
        before = descriptors()
        async with opened(seed, path / str(number)) as simulation:
            try:
                await simulation.run(STEPS)
            except BaseException as error:
                error.add_note(f"{SEED}={seed} {simulation.setting}".rstrip())
                error.add_note("\n".join(simulation.steps[-SHOWN_STEPS:]))
                raise
        assert descriptors() == before, "a descriptor was left open"
