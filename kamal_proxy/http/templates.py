"""The part of Go's html/template that error pages use: one value, the message, and conditions.

Pure, total and linear. A page asks for nothing but whether there is a message, so a template is
resolved while it is parsed: into the page without a message, and the pieces of the page around
one. There is no tree to walk, and nesting costs no recursion.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import attrs

from kamal_proxy.http import pages
from kamal_proxy.http.markup import Place, Scanner

_SUPPORTED = "{{ .Message }}, {{ if .Message }}, {{ with .Message }}, {{ else }} and {{ end }}"
_MAX_SHOWN = 60  # characters of an action

# What Go takes for a space, in actions and where it trims.
_SPACES = " \t\r\n"
_S = r"[ \t\r\n]"
_LEFT = re.compile(rf"\{{\{{(-{_S})?(/\*)?")
_COMMENT_END = re.compile(rf"({_S}-)?\}}\}}")
_MESSAGE = r"\$?\.Message|\."
_VALUE = re.compile(_MESSAGE)
_BLOCK = re.compile(
    rf"(?P<chained>else{_S}+)?"
    rf"(?P<word>if|with)(?:{_S}+(?P<negated>not){_S}+|{_S}+|(?=\.))(?P<value>{_MESSAGE})"
)


class TemplateError(Exception):
    """A template uses what is not supported, or is malformed.

    ``str(error)`` says in which line (from 1), what was found, and what is supported.
    """

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line = line


@attrs.frozen
class Template:
    """A parsed page; made by ``parse``.

    Attributes:
        plain: The page without a message.
        pieces: What stands around the places of the message in the page with one.
    """

    plain: str
    pieces: tuple[str, ...]

    def render(self, message: str) -> str:
        """Return the page for a message, which is escaped here; empty means that there is none."""
        return pages.escape(message).join(self.pieces) if message else self.plain


class _Worlds(NamedTuple):
    """Something that holds with a message, and without one."""

    told: bool
    plain: bool


@attrs.define(eq=False)
class _Block:
    """An ``if`` or ``with`` that is still open."""

    word: str
    line: int
    outside: _Worlds  # what is shown around it
    in_with: bool  # whether the dot was the message around it
    taken: _Worlds
    complete: bool = False  # has had its {{ else }}


def parse(text: str) -> Template:
    """Return the template in a text; lone surrogates in it are kept as they are.

    Raises:
        TemplateError: there is anything in ``{{ }}`` but what this module supports, a block is
            not closed, or a message would stand where escaping it as text does not make it safe.
    """
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._line = 1
        self._counted = 0  # how far the lines are counted
        self._shown = _Worlds(told=True, plain=True)
        self._in_with = False
        self._blocks: list[_Block] = []
        self._plain: list[str] = []
        self._told: list[str] = []  # of the piece that is being collected
        self._pieces: list[tuple[str, int]] = []  # with the line of the message after it

    def parse(self) -> Template:
        text, at, trim = self._text, 0, False
        while (left := _LEFT.search(text, at)) is not None:
            self._markup(text[at : left.start()], trim, trim_end=left[1] is not None)
            self._count_lines(left.start())
            if left[2] is None:
                at, trim = self._take_action(left)
            else:
                at, trim = self._take_comment(left)
        self._markup(text[at:], trim, trim_end=False)
        if self._blocks:
            block = self._blocks[-1]
            raise TemplateError(block.line, f"{{{{ {block.word} }}}} without {{{{ end }}}}")
        return Template("".join(self._plain), self._placed())

    def _markup(self, markup: str, trim_start: bool, *, trim_end: bool) -> None:
        if trim_start:
            markup = markup.lstrip(_SPACES)
        if trim_end:
            markup = markup.rstrip(_SPACES)
        if self._shown.told:
            self._told.append(markup)
        if self._shown.plain:
            self._plain.append(markup)

    def _count_lines(self, until: int) -> None:
        self._line += self._text.count("\n", self._counted, until)
        self._counted = until

    def _take_comment(self, left: re.Match[str]) -> tuple[int, bool]:
        close = self._text.find("*/", left.end())
        end = None if close < 0 else _COMMENT_END.match(self._text, close + 2)
        if end is None:
            raise TemplateError(self._line, "a comment does not end with */}}")
        return end.end(), end[1] is not None

    def _take_action(self, left: re.Match[str]) -> tuple[int, bool]:
        close = self._text.find("}}", left.end())
        if close < 0:
            raise TemplateError(self._line, "an action does not end with }}")
        trim = self._text[close - 1] == "-" and close - 2 >= left.end()
        trim = trim and self._text[close - 2] in _SPACES
        action = self._text[left.end() : close - 1 if trim else close].strip(_SPACES)
        if action == "end":
            self._end()
        elif action == "else":
            self._else()
        elif _VALUE.fullmatch(action):
            self._value(action)
        elif (block := _BLOCK.fullmatch(action)) is not None:
            self._condition(action, block)
        else:
            raise self._unsupported(action)
        return close + 2, trim

    def _unsupported(self, action: str) -> TemplateError:
        return TemplateError(
            self._line, f"{_shown(action)} is not supported here; what is: {_SUPPORTED}"
        )

    def _check_dot(self, value: str, action: str) -> None:
        # Inside ``with`` the dot is the message itself, which has no field of that name.
        if value != "$.Message" and (value == ".") is not self._in_with:
            raise self._unsupported(action)

    def _value(self, action: str) -> None:
        self._check_dot(action, action)
        if self._shown.told:
            self._pieces.append(("".join(self._told), self._line))
            self._told.clear()

    def _condition(self, action: str, found: re.Match[str]) -> None:
        word, negated = found["word"], found["negated"] is not None
        if word == "with" and negated:
            raise self._unsupported(action)
        holds = _Worlds(told=not negated, plain=negated)
        if found["chained"]:
            block = self._otherwise(action, word)
            self._check_dot(found["value"], action)
            self._shown = _both(self._shown, holds)
            block.taken = _either(block.taken, holds)
        else:
            self._check_dot(found["value"], action)
            self._blocks.append(_Block(word, self._line, self._shown, self._in_with, holds))
            self._shown = _both(self._shown, holds)
        self._in_with = self._in_with or word == "with"

    def _otherwise(self, action: str, word: str) -> _Block:
        """Begin the other branch of the innermost block, which must be one of that word."""
        block = self._blocks[-1] if self._blocks else None
        if block is None or block.complete or block.word != word:
            raise TemplateError(self._line, f"{_shown(action)} without {{{{ {word} }}}}")
        self._in_with = block.in_with
        self._shown = _Worlds(
            told=block.outside.told and not block.taken.told,
            plain=block.outside.plain and not block.taken.plain,
        )
        return block

    def _else(self) -> None:
        word = self._blocks[-1].word if self._blocks else "if"
        self._otherwise("else", word).complete = True

    def _end(self) -> None:
        if not self._blocks:
            raise TemplateError(self._line, "{{ end }} without {{ if }} or {{ with }}")
        block = self._blocks.pop()
        self._shown, self._in_with = block.outside, block.in_with

    def _placed(self) -> tuple[str, ...]:
        """Return the pieces around the message, having looked where it would stand."""
        scanner = Scanner()
        placed: list[str] = []
        piece: list[str] = []
        for markup, line in self._pieces:
            piece.append(markup)
            place = scanner.feed(markup)
            if place is Place.COMMENT:
                continue  # Go leaves comments out
            if place in (Place.TAG, Place.VALUE, Place.CODE):
                raise TemplateError(line, f"a message can't stand in {place.value}")
            placed.append("".join(piece))
            piece.clear()
        return (*placed, "".join((*piece, *self._told)))


def _shown(action: str) -> str:
    """Return an action as it can be printed, cut if it is long."""
    cut = "..." if len(action) > _MAX_SHOWN else ""
    printable = "".join(c if c.isprintable() else " " for c in action[:_MAX_SHOWN])
    return f"{{{{ {printable}{cut} }}}}" if action else "{{ }}"


def _both(one: _Worlds, other: _Worlds) -> _Worlds:
    return _Worlds(one.told and other.told, one.plain and other.plain)


def _either(one: _Worlds, other: _Worlds) -> _Worlds:
    return _Worlds(one.told or other.told, one.plain or other.plain)
