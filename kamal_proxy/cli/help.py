"""Help texts, rendered from the same signatures that the flags are read from. Plain text.

cyclopts could render them, but its panels need Rich, which takes longer to import than all the
rest of a command.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

from kamal_proxy.cli.arguments import PROGRAM, CommandWord, Flag
from kamal_proxy.cli.commands import ROOT, Command, find_command
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_USUAL_WIDTH = 110  # where there is no terminal
_MIN_TEXT = 30
_MIN_NAME = 10  # columns of a command's name and the gap after it


def help_command(*words: CommandWord) -> None:
    """Show help for a command.

    Give the name of a command, or nothing for the list of commands.
    """
    try:
        command, _ = find_command(words)
    except UsageError:
        # The original's exit code for this is 0 as well.
        sys.stderr.write(f"There is no help for '{' '.join(words)}'.\n\n")
        _write(_usage_lines(ROOT), sys.stderr)
        return
    show_help(command)


def show_help(command: Command) -> None:
    """Print the help text of a command to stdout."""
    _write(_description_lines(command), sys.stdout)
    _write(_usage_lines(command), sys.stdout)


def _write(lines: Iterable[str], stream: TextIO) -> None:
    stream.writelines(line + "\n" for line in lines)


def _width() -> int:
    return shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns


def _description_lines(command: Command) -> Iterator[str]:
    yield command.short_description
    for paragraph in command.description.partition("\n")[2].strip().split("\n\n"):
        if paragraph:
            yield ""
            yield from textwrap.wrap(" ".join(paragraph.split()), _width(), break_on_hyphens=False)
    yield ""


def _usage_lines(command: Command) -> Iterator[str]:
    ending = "" if command.members else "[flags]"
    usage = " ".join(filter(None, (command.path, command.usage, ending)))
    yield from ("Usage:", f"  {usage}", "")
    if command.aliases:
        yield from ("Aliases:", f"  {', '.join((command.name, *command.aliases))}", "")
    if command.members:
        yield "Commands:"
        column = max(_MIN_NAME, *(len(member.name) + 2 for member in command.members))
        for member in sorted(command.members, key=lambda member: member.name):
            yield f"  {member.name:<{column}}{member.short_description}"
        yield ""
    yield "Flags:"
    yield from _flag_lines(command.grammar.flags.values())
    if command.members:
        more = " ".join(filter(None, (PROGRAM, "help", command.words, "[command]")))
        yield from ("", f"'{more}' says more about a command.")


def _flag_lines(flags: Iterable[Flag]) -> Iterator[str]:
    ordered = sorted(flags, key=lambda flag: flag.name)
    heads = [
        f"{'  ' if flag.shorthand else '      '}{flag.title} {flag.kind.word}".rstrip()
        for flag in ordered
    ]
    column = max(map(len, heads)) + 3
    for head, flag in zip(heads, ordered, strict=True):
        width = max(_MIN_TEXT, _width() - column)
        lines = textwrap.wrap(_flag_text(flag), width, break_on_hyphens=False)
        yield head.ljust(column) + lines[0]
        yield from (" " * column + line for line in lines[1:])


def _flag_text(flag: Flag) -> str:
    text = flag.help
    if default := _default(flag):
        text += f" (default {default})"
    return text


def _default(flag: Flag) -> str:
    """Return the default to show; one that means nothing, such as false or 0, is not shown."""
    if not flag.default:
        return ""
    if isinstance(flag.default, bool):
        return "true"
    if isinstance(flag.default, float):
        return format_duration(flag.default)
    return f'"{flag.default}"' if isinstance(flag.default, str) else str(flag.default)
