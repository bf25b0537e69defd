"""Help texts, rendered from the same signatures that the flags are read from. Plain text.

cyclopts could render them, but its panels need Rich, which takes longer to import than all the
rest of a command.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

from kamal_proxy.cli.arguments import PROGRAM, Flag
from kamal_proxy.cli.commands import COMMANDS, Command, find_command
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import UsageError
from kamal_proxy.options import NOT_SUPPORTED_YET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SHORT = "Switches web services to new versions without losing a request"
_USUAL_WIDTH = 110  # where there is no terminal
_MIN_TEXT = 30


def help_command(*words: str) -> None:
    """Show help for a command.

    Give the name of a command, or nothing for the list of commands.
    """
    if not words:
        show_help(None)
        return
    try:
        command = find_command(words[0])
    except UsageError:
        # The original's exit code for this is 0 as well.
        sys.stderr.write(f"There is no help for '{' '.join(words)}'.\n\n")
        _write(_program_lines(), sys.stderr)
        return
    show_help(command)


def show_help(command: Command | None) -> None:
    """Print the help text of a command, or of the program, to stdout."""
    if command is None:
        _write([_SHORT, "", *_program_lines()], sys.stdout)
    else:
        _write(_command_lines(command), sys.stdout)


def _write(lines: Iterable[str], stream: TextIO) -> None:
    stream.writelines(line + "\n" for line in lines)


def _width() -> int:
    return shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns


def _program_lines() -> Iterator[str]:
    yield from ("Usage:", f"  {PROGRAM} [command]", "", "Commands:")
    for command in sorted(COMMANDS, key=lambda command: command.name):
        yield f"  {command.name:<10}{command.short_description}"
    yield from ("", "Flags:", f"  -h, --help   Show this help for {PROGRAM}", "")
    yield f"'{PROGRAM} help [command]' says more about a command."


def _command_lines(command: Command) -> Iterator[str]:
    yield command.short_description
    for paragraph in command.description.partition("\n")[2].strip().split("\n\n"):
        if paragraph:
            yield ""
            yield from textwrap.wrap(" ".join(paragraph.split()), _width())
    usage = " ".join(word for word in (PROGRAM, command.name, command.usage) if word)
    yield from ("", "Usage:", f"  {usage} [flags]", "")
    if command.aliases:
        yield from ("Aliases:", f"  {', '.join((command.name, *command.aliases))}", "")
    yield "Flags:"
    yield from _flag_lines(command.grammar.flags.values())


def _flag_lines(flags: Iterable[Flag]) -> Iterator[str]:
    ordered = sorted(flags, key=lambda flag: flag.name)
    heads = [
        f"{'  ' if flag.shorthand else '      '}{flag.title} {flag.kind.word}".rstrip()
        for flag in ordered
    ]
    column = max(map(len, heads)) + 3
    for head, flag in zip(heads, ordered, strict=True):
        lines = textwrap.wrap(_flag_text(flag), max(_MIN_TEXT, _width() - column))
        yield head.ljust(column) + lines[0]
        yield from (" " * column + line for line in lines[1:])


def _flag_text(flag: Flag) -> str:
    text = flag.help
    if default := _default(flag):
        text += f" (default {default})"
    if flag.name in NOT_SUPPORTED_YET:
        text += " [not supported yet]"
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
