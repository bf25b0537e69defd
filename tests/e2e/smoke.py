"""Runs a benchmark as shortly as it can be run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def smoke(module: str, *flags: str) -> str:
    """Run ``module --smoke``, which must end well and say so only; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--smoke", *flags],
        check=False,
        capture_output=True,
        text=True,
        cwd=_ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
