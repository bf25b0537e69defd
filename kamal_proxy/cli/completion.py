"""What a shell may put in the place of the word before the cursor: cobra's protocol.

``kamal-proxy __complete WORD... CURRENT`` prints a line for each candidate, a tab between it and
its description, and last a colon and a number that says what else may stand there. Scripts that the
Go proxy has made use the same, so those that are installed go on working. But they evaluate what
they get (bash's ``compgen -W`` does), so they get nothing that a shell could read as anything else.

All that is offered comes from the table of commands and their signatures, and from the proxy if one
runs. Whatever goes wrong, nothing is offered and nothing is said: someone is typing.
"""

from __future__ import annotations

import enum
import re
import sys
from typing import TYPE_CHECKING

import attrs

from kamal_proxy.cli.arguments import Flag, Grammar, Scan, Source, scan
from kamal_proxy.cli.commands import Command, find_command
from kamal_proxy.cli.output import printable
from kamal_proxy.errors import KamalProxyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kamal_proxy.control.client import ControlClient

REPLY_TIMEOUT = 1.0  # seconds that the proxy may be silent while someone waits for a Tab
_PLAIN = re.compile(r"-{0,2}\w[\w.:@%+-]*", re.ASCII)
_CURSOR = "\0"  # stands for the word before the cursor; no argument can hold it


class Others(enum.IntEnum):
    """What may stand there besides the candidates, in the numbers of cobra's directives."""

    FILES = 0
    NOTHING = 4
    DIRECTORIES = 16


@attrs.frozen
class Candidate:
    """A text that may stand in the place of the word, or after the ``=`` in it."""

    text: str
    description: str = ""


@attrs.frozen
class Completion:
    """All that may stand there."""

    candidates: tuple[Candidate, ...] = ()
    others: Others = Others.NOTHING


def print_completion(arguments: Sequence[str], *, descriptions: bool, quoting: bool) -> None:
    """Print what may stand in the place of the last argument.

    Args:
        arguments: As for :func:`complete`.
        descriptions: Whether candidates are printed with what they mean.
        quoting: Whether who reads it quotes candidates; otherwise only plain ones are printed.
    """
    found = complete(arguments)
    for candidate in found.candidates:
        if not quoting and not _PLAIN.fullmatch(candidate.text):
            continue
        description = printable(candidate.description) if descriptions else ""
        sys.stdout.write("\t".join(filter(None, (candidate.text, description))) + "\n")
    sys.stdout.write(f":{found.others:d}\n")


def complete(arguments: Sequence[str]) -> Completion:
    """Find what may stand in the place of the last argument.

    Args:
        arguments: What follows the program's name, up to the cursor; the last one may be empty.
    """
    *before, current = arguments or ("",)
    try:
        return _complete(before, current)
    except UsageError:
        return Completion()  # after what is wrong nothing can be right


def _complete(before: Sequence[str], current: str) -> Completion:
    command, rest = find_command(before)
    found = scan(command.grammar, [*rest, _CURSOR], checked=False)
    flag, typed = _flag_of_value(command.grammar, found, current)
    if flag is not None:
        values = flag.kind.values
        if isinstance(values, Source):
            return _from_source(values, typed)
        return _matching(map(Candidate, values), typed)
    if current.startswith("-") and not found.only_words:
        return _matching(_flags(command.grammar, found), current)
    return _matching_words(command, found, current)


def _flag_of_value(grammar: Grammar, found: Scan, current: str) -> tuple[Flag | None, str]:
    """Return the flag whose value is being typed, if one is, and how it begins."""
    for name, texts in found.given.items():
        if texts[-1] == _CURSOR:
            return grammar.flags[name], current
    name, equals, value = current.removeprefix("--").partition("=")
    if equals and current.startswith("--") and not found.only_words:
        return grammar.flags.get(name), value
    return None, ""


def _matching(candidates: Iterable[Candidate], typed: str) -> Completion:
    return Completion(tuple(c for c in candidates if c.text.startswith(typed)))


def _matching_words(command: Command, found: Scan, current: str) -> Completion:
    place = len(found.words) - 1  # the cursor's is the last
    sources, any_number = command.grammar.sources, command.grammar.words is None
    if command.members:
        return _matching(_commands(command, current) if place == 0 else (), current)
    if place >= len(sources) and not (sources and any_number):
        # There is no more to say but flags.
        return (
            Completion()
            if found.only_words
            else _matching(
                (flag for flag in _flags(command.grammar, found) if flag.text.startswith("--")),
                current,
            )
        )
    source = sources[min(place, len(sources) - 1)]
    if source is Source.COMMANDS:
        group, others = find_command(found.words[:-1])
        return _matching(() if others else _commands(group, current), current)
    completion = _from_source(source, current)
    if found.only_words:
        return completion
    # What begins with a hyphen would be read as a flag, not as a name.
    words = tuple(c for c in completion.candidates if not c.text.startswith("-"))
    return attrs.evolve(completion, candidates=words)


def _commands(group: Command, current: str) -> Iterable[Candidate]:
    for command in group.members:
        yield Candidate(command.name, command.short_description)
        # Nobody needs to see the short forms who has typed nothing.
        for alias in command.aliases if current else ():
            yield Candidate(alias, f"The same as {command.name}")


def _flags(grammar: Grammar, found: Scan) -> Iterable[Candidate]:
    for flag in grammar.flags.values():
        if flag.name not in found.given or flag.kind.many:
            yield Candidate(f"--{flag.name}", flag.help)
            if flag.shorthand:
                yield Candidate(f"-{flag.shorthand}", flag.help)


def _from_source(source: Source, typed: str) -> Completion:
    match source:
        case Source.FILES:
            return Completion(others=Others.FILES)
        case Source.DIRECTORIES:
            return Completion(others=Others.DIRECTORIES)
        case Source.SERVICES | Source.HTTP_SERVICES | Source.UDP_SERVICES | Source.HOSTS:
            # What can't be printed can't be typed either, and would end a line or a candidate.
            names = (name for name in _from_proxy(source) if name.text.isprintable())
            return _matching(names, typed)
        case _:
            return Completion()


def _from_proxy(source: Source) -> Iterable[Candidate]:
    from kamal_proxy.control.client import ControlClient  # which most completions do without

    client = ControlClient(start_wait=0.0, reply_timeout=REPLY_TIMEOUT)
    try:
        return _hosts(client) if source is Source.HOSTS else _services(client, source)
    except KamalProxyError:
        return ()  # no proxy runs, or it can't be asked by this user


def _hosts(client: ControlClient) -> list[Candidate]:
    return [
        Candidate(certificate.host, certificate.state)
        for certificate in client.certificates()
        if certificate.source == "acme"
    ]


def _services(client: ControlClient, source: Source) -> list[Candidate]:
    found = {}
    for service in client.services():
        wanted = source is Source.SERVICES or bool(service.udp_ports) is (
            source is Source.UDP_SERVICES
        )
        if wanted and service.name not in found:
            places = ", ".join(service.udp_ports or service.hosts or ("all hosts",))
            found[service.name] = Candidate(service.name, f"{service.state}, {places}")
    return list(found.values())
