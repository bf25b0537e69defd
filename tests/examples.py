"""The examples that pages of the documentation show: commands, and what they print.

A block of the language ``console`` holds them. A command begins with ``$ ``, goes on where a line
ends with a backslash or a quote is open, and may end with a comment after two spaces, whose meaning
is the page's. The lines up to the next command are its output.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from pathlib import Path

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@attrs.frozen
class Example:
    """One command of a page.

    Attributes:
        command: Without the comment; may have several lines.
        comment: What follows ``#``, or nothing.
        output: The lines that it must print.
        line: Its line in the page, from 1.
    """

    command: str
    comment: str
    output: list[str]
    line: int


def examples_in(page: Path) -> list[Example]:
    """Return the examples of a page, in order; at least one."""
    text = page.read_text()
    found = []
    for block in FENCED.finditer(text):
        if block[1] != "console":
            continue
        first = text.count("\n", 0, block.start(2)) + 1
        lines = block[2].splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
        assert starts[:1] == [0], f"{page.name}:{first}: a block begins with a command"
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            found.append(_example(lines[start:end], first + start))
    assert found, f"{page.name} has no examples"
    return found


def _example(lines: list[str], number: int) -> Example:
    size = next(n for n in range(1, len(lines) + 1) if _is_whole("\n".join(lines[:n])))
    command, _, comment = "\n".join(lines[:size]).removeprefix("$ ").partition("  # ")
    return Example(command, comment, lines[size:], number)


def _is_whole(command: str) -> bool:
    if command.endswith("\\"):
        return False
    try:
        shlex.split(command, comments=True)
    except ValueError:  # an open quote
        return False
    return True
