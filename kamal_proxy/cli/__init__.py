"""The command line. ``main`` runs one command and turns errors into a sentence and an exit code.

Nothing of the serving side is imported here, except by ``run``: a command should start fast.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import TYPE_CHECKING

from kamal_proxy.errors import KamalProxyError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
PIPE_CLOSED = 141  # likewise for SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: What follows the program's name; by default that of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        # In containers the locale is usually C, and a text may hold bytes that are not UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # Collecting while modules load costs a tenth of the start-up; ``run`` switches it on again.
    gc.disable()
    try:
        return _run(_own_arguments() if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.stderr.write("Error: interrupted; what the proxy has begun, it finishes\n")
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    finally:
        gc.enable()


def _run(arguments: Sequence[str]) -> int:
    from kamal_proxy.cli.commands import execute
    from kamal_proxy.cli.output import print_error

    try:
        execute(arguments)
    except KamalProxyError as error:
        print_error(error)
        return 1
    if sys.stdout is not None:
        sys.stdout.flush()
    return 0


def _own_arguments() -> list[str]:
    # The locale's encoding may not be UTF-8, but Kamal always sends UTF-8.
    return [os.fsencode(text).decode("utf-8", "surrogateescape") for text in sys.argv[1:]]


def _discard_output() -> None:
    """Point the standard streams at nothing, so that the flush at exit can't fail too."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            os.dup2(nothing, stream.fileno())
    os.close(nothing)
