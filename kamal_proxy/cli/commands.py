"""Which commands there are: names, aliases, where their functions live, and the cyclopts app.

A command's module is imported when it is asked for, not before. Also finds near misses for a
mistyped name. Prints nothing.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs
from cyclopts import App, CycloptsError

from kamal_proxy.cli.arguments import (
    PROGRAM,
    Grammar,
    find_word,
    help_flag,
    quote,
    read_grammar,
    require_words,
    scan,
)
from kamal_proxy.errors import NotSupportedYetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NEAR = 2  # edits between a mistyped name and one worth suggesting


@attrs.frozen
class Command:
    """One command.

    Attributes:
        name: Its word on the command line.
        place: ``module:function``, imported on demand.
        usage: What follows the name in the usage line.
        aliases: Other words for it.
    """

    name: str
    place: str
    usage: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        """The typed function that carries the command out."""
        function = app()[self.name].default_command
        assert function is not None
        return function

    @property
    def grammar(self) -> Grammar:
        """What may follow the command's word."""
        return read_grammar(f"{PROGRAM} {self.name}", self.function)

    @property
    def description(self) -> str:
        """The function's docstring: one sentence, then paragraphs."""
        return inspect.getdoc(self.function) or ""

    @property
    def short_description(self) -> str:
        """The first line of the description, without its full stop."""
        return self.description.partition("\n")[0].removesuffix(".")


COMMANDS = (
    Command("run", "kamal_proxy.cli.run:run"),
    Command("deploy", "kamal_proxy.cli.deploy:deploy", "<service>"),
    Command("remove", "kamal_proxy.cli.remove:remove", "<service>", ("rm",)),
    Command("list", "kamal_proxy.cli.list:list_services", aliases=("ls",)),
    Command("help", "kamal_proxy.cli.help:help_command", "[command]"),
)

# Commands of the original that arrive with a later version.
NOT_YET = ("pause", "stop", "resume", "rollout", "completion")


@cache
def app() -> App:
    """Return the cyclopts app, which binds values to the commands' functions and calls them."""
    root = App(
        name=PROGRAM,
        help_flags=(),
        version_flags=(),
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for command in COMMANDS:
        root.command(
            command.place,
            name=command.name,
            alias=command.aliases,
            help_flags=(),
            version_flags=(),
        )
    return root


def find_command(name: str) -> Command:
    """Return the command with that name or alias.

    Raises:
        NotSupportedYetError: the original has it and this version does not.
        UsageError: there is none; near misses are suggested.
    """
    for command in COMMANDS:
        if name == command.name or name in command.aliases:
            return command
    if name in NOT_YET:
        raise NotSupportedYetError(f"{name} is not supported yet by this version of {PROGRAM}")
    near = "".join(f"\t{command.name}\n" for command in COMMANDS if _is_near(name, command))
    suggestion = f"\nDid you mean this?\n{near}\n" if near else ""
    raise UsageError(
        f"unknown command {quote(name)} for {quote(PROGRAM)}\n"
        f"{suggestion}Run '{PROGRAM} --help' for usage."
    )


def _is_near(name: str, command: Command) -> bool:
    typed = name.lower()
    # A word that holds help's place is not what someone meant to run.
    return command.name != "help" and (
        command.name.startswith(typed) or _distance(typed[:64], command.name) <= _NEAR
    )


def _distance(left: str, right: str) -> int:
    """Return how many single-character edits turn one text into the other (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def execute(arguments: Sequence[str]) -> None:
    """Carry out one command line: what follows the program's name.

    Raises:
        KamalProxyError: it can't be carried out.
    """
    index = find_word(arguments)
    if index is None:
        scan(Grammar(PROGRAM, {"help": help_flag(PROGRAM)}), arguments)
        _show_help(None)
        return
    command = find_command(arguments[index])
    grammar = command.grammar
    found = scan(grammar, [*arguments[:index], *arguments[index + 1 :]])
    if found.help:
        _show_help(command)
        return
    require_words(grammar, found.words)
    try:
        app()([command.name, *found.tokens()])
    except CycloptsError as error:
        raise UsageError(str(error)) from error


def _show_help(command: Command | None) -> None:
    from kamal_proxy.cli.help import show_help  # which needs this module

    show_help(command)
