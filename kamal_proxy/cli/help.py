"""Help texts: a page for each command, as man pages have it. Plain text, as wide as the terminal.

Descriptions and flags come from the same signatures that flags are read from, the rest from
``manual``. cyclopts could render them, but its panels need Rich, which takes longer to import than
all the rest of a command.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

from kamal_proxy.cli.arguments import PROGRAM, CommandWord, Flag
from kamal_proxy.cli.commands import ROOT, Command, find_command
from kamal_proxy.cli.manual import PAGES
from kamal_proxy.durations import format_duration
from kamal_proxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_USUAL_WIDTH = 110  # where there is no terminal
_MIN_TEXT = 30  # columns; where fewer are left beside a name, the text goes below
_BELOW = 10  # columns that it is indented there
_MIN_NAME = 12  # columns of a command's name and the gaps around it


def help_command(*words: CommandWord) -> None:
    """Show help for a command.

    Give the name of a command, or nothing for the list of commands. The same is shown by -h or
    --help with any command.
    """
    try:
        command, _ = find_command(words)
    except UsageError:
        # The original's exit code for this is 0 as well.
        sys.stderr.write(f"There is no help for '{' '.join(words)}'.\n\n")
        _write(_sections(_usage(ROOT)), sys.stderr)
        return
    show_help(command)


def show_help(command: Command) -> None:
    """Print the help text of a command to stdout."""
    _write(_description(command), sys.stdout)
    _write(_sections({**_usage(command), **_reference(command)}), sys.stdout)
    if command.members:
        more = " ".join(filter(None, (PROGRAM, "help", command.words, "[command]")))
        _write(("", *_wrapped(f"'{more}' says more about a command.", _width())), sys.stdout)


def _write(lines: Iterable[str], stream: TextIO) -> None:
    stream.writelines(line + "\n" for line in lines)


def _width() -> int:
    return shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(_MIN_TEXT, width), break_on_hyphens=False)


def _description(command: Command) -> Iterator[str]:
    yield from _wrapped(command.short_description, _width())
    for paragraph in command.description.partition("\n")[2].strip().split("\n\n"):
        if paragraph:
            yield ""
            yield from _wrapped(" ".join(paragraph.split()), _width())
    yield ""


def _sections(sections: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yield the lines of sections with their titles; those without a line are left out."""
    shown = {title: lines for title, each in sections.items() if (lines := list(each))}
    for number, (title, lines) in enumerate(shown.items()):
        yield from ("", f"{title}:") if number else (f"{title}:",)
        yield from lines


def _usage(command: Command) -> dict[str, Iterable[str]]:
    """Return what is typed: title -> lines."""
    ending = "" if command.members else "[flags]"
    usage = " ".join(filter(None, (command.path, command.usage, ending)))
    aliases = ", ".join((command.name, *command.aliases)) if command.aliases else ""
    members = sorted(command.members, key=lambda member: member.name)
    rows = {f"  {member.name}": member.short_description for member in members}
    return {
        "Usage": [f"  {usage}"],
        "Aliases": [f"  {aliases}"] if aliases else [],
        "Commands": _definitions(rows, max(_MIN_NAME, _column(rows, 2))),
        **_flag_groups(command.grammar.flags.values()),
    }


def _reference(command: Command) -> dict[str, Iterable[str]]:
    """Return what there is to know besides: title -> lines."""
    page = PAGES[command.words]
    return {
        "Examples": _examples(page.examples),
        "Environment": _table(page.environment),
        "Files": _table(page.files),
        "Exit status": _table(page.codes),
        "See also": [f"  {PROGRAM} help {words}" for words in page.see_also],
    }


def _examples(examples: Mapping[str, str]) -> Iterator[str]:
    for number, (aim, line) in enumerate(examples.items()):
        if number:
            yield ""
        yield from (f"  # {part}" for part in _wrapped(aim, _width() - 4))
        first, *more = _broken(line, _width() - 4)
        yield f"  {first}"
        yield from (f"    {part}" for part in more)


def _broken(line: str, width: int) -> list[str]:
    """Break a command line as it may be typed: between words, with backslashes."""
    parts = [""]
    for word in re.findall(r"(?:'[^']*'|[^\s'])+", line):
        if parts[-1] and len(parts[-1]) + len(word) + 3 > width:
            parts[-1] += " \\"
            parts.append("")
        parts[-1] += f" {word}" if parts[-1] else word
    return parts


def _table(rows: Mapping[str, str]) -> Iterable[str]:
    indented = {f"  {name}": text for name, text in rows.items()}
    return _definitions(indented, _column(indented, 3))


def _column(heads: Iterable[str], gap: int) -> int:
    return max(map(len, heads), default=0) + gap


def _definitions(rows: Mapping[str, str], column: int) -> Iterator[str]:
    """Yield names, each with its text beside it, or below where there is little room."""
    beside = _width() - column >= _MIN_TEXT
    indent = column if beside else _BELOW
    for name, text in rows.items():
        lines = _wrapped(text, _width() - indent)
        if beside:
            yield name.ljust(column) + lines.pop(0)
        else:
            yield name
        yield from (" " * indent + line for line in lines)


def _flag_groups(flags: Iterable[Flag]) -> dict[str, Iterable[str]]:
    """Return the flags by group, in the order of the signature; without a group they come last."""
    rows = {_flag_head(flag): flag for flag in sorted(flags, key=lambda flag: flag.name == "help")}
    groups = [group for group in dict.fromkeys(flag.group for flag in rows.values()) if group]
    column = _column(rows, 3)
    titles = {group: group for group in groups} | {"": "Other flags" if groups else "Flags"}
    return {
        title: _definitions(
            {head: _flag_text(flag) for head, flag in rows.items() if flag.group == group}, column
        )
        for group, title in titles.items()
    }


def _flag_head(flag: Flag) -> str:
    indent = "  " if flag.shorthand else "      "
    return f"{indent}{flag.title} {flag.kind.word}".rstrip()


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
