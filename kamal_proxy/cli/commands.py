"""Which commands there are: their words, where their functions live, and the cyclopts app.

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
from kamal_proxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NEAR = 2  # edits between a mistyped name and one worth suggesting


@attrs.frozen
class Command:
    """One command, or a group of commands, which only has a help text.

    Attributes:
        words: What calls it, after the program's name; nothing calls the program's own group.
        place: ``module:function``, imported on demand; a group has none.
        usage: What follows the words in the usage line.
        aliases: Other forms of the last word.
        about: The description of a group; a command's is its function's docstring.
        strict: Whether a word that is none of a group's commands is an error; the original shows
            the group's help for most.
    """

    words: str
    place: str = ""
    usage: str = ""
    aliases: tuple[str, ...] = ()
    about: str = ""
    strict: bool = False

    @property
    def name(self) -> str:
        """The last of its words."""
        return self.words.rpartition(" ")[2]

    @property
    def path(self) -> str:
        """The command as error sentences and usage lines name it."""
        return f"{PROGRAM} {self.words}".rstrip()

    @property
    def members(self) -> tuple[Command, ...]:
        """The commands of a group."""
        return tuple(c for c in COMMANDS if c != self and c.words.rpartition(" ")[0] == self.words)

    @property
    def function(self) -> Callable[..., Any]:
        """The typed function that carries the command out."""
        assert self.place, "a group is not carried out"
        function = _bound(self).default_command
        assert function is not None
        return function

    @property
    def grammar(self) -> Grammar:
        """What may follow the command's words."""
        if not self.place:
            return Grammar(self.path, {"help": help_flag(self.path)})
        return read_grammar(self.path, self.function)

    @property
    def description(self) -> str:
        """One sentence, then paragraphs."""
        return inspect.cleandoc(self.about) if self.about else inspect.getdoc(self.function) or ""

    @property
    def short_description(self) -> str:
        """The first line of the description, without its full stop."""
        return self.description.partition("\n")[0].removesuffix(".")


ROOT = Command(
    "",
    usage="[command]",
    about="""Switches web and UDP services to new versions without losing a request.

    'kamal-proxy run' serves. The other commands tell the proxy that runs what to do, over a Unix
    socket that only its own user and root can use; they wait three seconds for one that is just
    starting.""",
    strict=True,
)
COMMANDS = (
    ROOT,
    Command("run", "kamal_proxy.cli.run:run"),
    Command("deploy", "kamal_proxy.cli.deploy:deploy", "<service>"),
    Command("deploy-udp", "kamal_proxy.cli.deploy_udp:deploy_udp", "<service>"),
    Command("remove", "kamal_proxy.cli.remove:remove", "<service>", ("rm",)),
    Command("pause", "kamal_proxy.cli.pause:pause", "<service>"),
    Command("stop", "kamal_proxy.cli.pause:stop", "<service>"),
    Command("resume", "kamal_proxy.cli.pause:resume", "<service>"),
    Command("list", "kamal_proxy.cli.list:list_services", aliases=("ls",)),
    Command(
        "rollout",
        usage="[command]",
        about="""Serve some visitors from new targets first.

        Deploy the new targets beside the old ones with 'rollout deploy', choose with 'rollout set'
        which visitors go there, and deploy for all when you have seen enough. Visitors are told
        apart by the cookie kamal-rollout, which your application sets, for example to the number
        of their account.""",
    ),
    Command("rollout deploy", "kamal_proxy.cli.rollout:deploy", "<service>"),
    Command("rollout set", "kamal_proxy.cli.rollout:set_split", "<service>"),
    Command("rollout stop", "kamal_proxy.cli.rollout:stop", "<service>"),
    Command(
        "certs",
        usage="[command]",
        about="""Look after the certificates of services with TLS.

        Those that are obtained from a certificate authority are renewed in time by themselves;
        'certs list' says when, and what stands in the way.""",
    ),
    Command("certs list", "kamal_proxy.cli.certs:list_certificates", aliases=("ls",)),
    Command("certs renew", "kamal_proxy.cli.certs:renew", "<host>"),
    Command(
        "completion",
        usage="[command]",
        about="""Print a script with which a shell completes this program's command lines.

        With it the Tab key offers commands, flags, values of flags, files, and the names of the
        services that the proxy has. The script asks the program itself, so it goes on being right
        when that is upgraded. How to install it: see the help for your shell.""",
        # Of a script that is not there, help would be installed in its place.
        strict=True,
    ),
    Command("completion bash", "kamal_proxy.cli.completion_scripts:bash"),
    Command("completion fish", "kamal_proxy.cli.completion_scripts:fish"),
    Command("completion zsh", "kamal_proxy.cli.completion_scripts:zsh"),
    Command("help", "kamal_proxy.cli.help:help_command", "[command]"),
)

# Hidden commands that scripts for completion run -> whether they want descriptions, and whether
# they quote what they get. The first two are those of the original's scripts, which do not.
_COMPLETE = {
    "__complete": (True, False),
    "__completeNoDesc": (False, False),
    "__completeQuoting": (True, True),
    "__completeQuotingNoDesc": (False, True),
}


@cache
def app() -> App:
    """Return the cyclopts app, which binds values to the commands' functions and calls them."""
    apps: dict[str, App] = {}
    for command in COMMANDS:
        group = apps.get(command.words.rpartition(" ")[0])
        if not command.place:
            apps[command.words] = App(
                name=command.name or PROGRAM,
                help_flags=(),
                version_flags=(),
                print_error=False,
                exit_on_error=False,
                suppress_keyboard_interrupt=False,
                result_action="return_value",
            )
            if group is not None:
                group.command(apps[command.words])
        else:
            assert group is not None, "a group stands before its commands"
            group.command(
                command.place,
                name=command.name,
                alias=command.aliases,
                help_flags=(),
                version_flags=(),
            )
    return apps[ROOT.words]


def _bound(command: Command) -> App:
    bound = app()
    for word in command.words.split():
        bound = bound[word]
    return bound


def find_command(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Find the command that a command line names.

    A word that is no command of a group that is not strict is left to that group, which shows its
    help, as in the original.

    Args:
        arguments: What follows the program's name; flags may stand between the words.

    Returns:
        The command, and the arguments without its words.

    Raises:
        UsageError: there is none; near misses are suggested.
    """
    command, rest = ROOT, list(arguments)
    while (index := find_word(rest)) is not None:
        word = rest[index]
        inner = next((c for c in command.members if word in (c.name, *c.aliases)), None)
        if inner is None:
            if command.strict:
                raise _unknown(command, word)
            break
        command = inner
        del rest[index]
    return command, rest


def _unknown(group: Command, name: str) -> UsageError:
    near = [command.name for command in group.members if _is_near(name, command)]
    title = "Did you mean this?"
    if not near and group is not ROOT:
        near, title = [command.name for command in group.members], "There are:"
    suggestion = "".join(f"\t{each}\n" for each in near)
    return UsageError(
        f"unknown command {quote(name)} for {quote(group.path)}\n"
        + (f"\n{title}\n{suggestion}\n" if near else "")
        + f"Run '{group.path} --help' for usage."
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
    if arguments and arguments[0] in _COMPLETE:
        from kamal_proxy.cli.completion import print_completion  # which needs this module

        descriptions, quoting = _COMPLETE[arguments[0]]
        print_completion(arguments[1:], descriptions=descriptions, quoting=quoting)
        return
    command, rest = find_command(arguments)
    grammar = command.grammar
    found = scan(grammar, rest)
    if found.help or not command.place:
        from kamal_proxy.cli.help import show_help  # which needs this module

        show_help(command)
        return
    require_words(grammar, found.words)
    try:
        app()([*command.words.split(), *found.tokens()])
    except CycloptsError as error:
        raise UsageError(str(error)) from error
