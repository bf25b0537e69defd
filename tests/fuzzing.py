"""How many examples a test of what comes from outside gets: ``make fuzz`` asks for many more."""

from __future__ import annotations

import os

from hypothesis import settings

PROFILE = "fuzz"


def register_profile() -> None:
    """Define the profile of ``make fuzz``: FUZZ_EXAMPLES for each test that is marked ``fuzz``."""
    settings.register_profile(
        PROFILE,
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000")),
        deadline=None,
        derandomize=False,  # the default wherever CI is set, which tries the same every time
    )


def at_least(examples: int) -> settings:
    """Return settings for a number of examples, or for the profile's if that is larger."""
    return settings(deadline=None, max_examples=max(examples, settings().max_examples))
