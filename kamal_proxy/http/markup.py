"""Where in an HTML page a value would stand: only some places make an escaped text harmless.

Pure, total and linear. A scanner that follows the tokenizer of the HTML standard (13.2.5) as far
as that takes; it changes and checks nothing. What a place is good for is its caller's business.
"""

from __future__ import annotations

import enum
import re


class Place(enum.Enum):
    """What surrounds the end of the markup that was read so far."""

    TEXT = "text"
    COMMENT = "a comment"
    TAG = "a tag"
    PLAIN_VALUE = "a quoted attribute that is plain text"
    VALUE = "a quoted attribute that may hold an address, a script or a style"
    TITLE = "a title or a textarea"
    CODE = "a script or a style"


# Attributes in quotes that nothing but people read.
_PLAIN_ATTRIBUTES = frozenset({"alt", "label", "placeholder", "title", "value"})
_PLAIN_PREFIX = "aria-"
_ELEMENTS = {
    "script": Place.CODE,
    "style": Place.CODE,
    "textarea": Place.TITLE,
    "title": Place.TITLE,
}

_SPACE = r"[\t\n\f\r ]"
_COMMENT_OR_TAG = re.compile(r"<(?:(!--)|(/?)([A-Za-z][^\t\n\f\r />]*))")
_COMMENT_END = re.compile(r"--!?>")
_SHORT_COMMENT = re.compile(r"-?>")
# The end of the tag, or an attribute with its value up to the opening quote.
_TAG_PART = re.compile(
    rf"[\t\n\f\r /]*(?:(>)|(=?[^\t\n\f\r />=]+|=)"
    rf"(?:{_SPACE}*={_SPACE}*(?:([\"'])|[^\t\n\f\r >]*))?)"
)
# Leaves the end tag to be read as any other tag.
_ELEMENT_END = {
    name: re.compile(rf"(?=</{name}[\t\n\f\r />])", re.IGNORECASE | re.ASCII) for name in _ELEMENTS
}
_QUOTE = {quote: re.compile(quote) for quote in "\"'"}
# What follows would become part of a tag.
_OPEN_END = re.compile(r"<[/!]?[A-Za-z-]*\Z")
_LONGEST_OPEN_END = len("</textarea") + 1


class Scanner:
    """Reads markup piece by piece and knows the place at its end."""

    __slots__ = ("_element", "_inside", "_quote", "place")

    def __init__(self) -> None:
        self.place = Place.TEXT
        self._inside = Place.TEXT  # where the end of the tag leads, while in one
        self._element = ""
        self._quote = ""

    def feed(self, markup: str) -> Place:
        """Read a piece of markup that follows what was read before; return the place at its end.

        What stands between two pieces counts for nothing, as an escaped value does in all places
        but TAG and CODE.
        """
        at = 0
        while at < len(markup):
            if self.place is Place.TEXT:
                at = self._text(markup, at)
            elif self.place is Place.TAG:
                at = self._tag(markup, at)
            elif self.place is Place.COMMENT:
                at = self._until(_COMMENT_END, markup, at, Place.TEXT)
            elif self.place in (Place.TITLE, Place.CODE):
                at = self._until(_ELEMENT_END[self._element], markup, at, Place.TEXT)
            else:
                at = self._until(_QUOTE[self._quote], markup, at, Place.TAG)
        if self.place in (Place.TEXT, Place.TITLE) and _OPEN_END.search(
            markup, max(0, len(markup) - _LONGEST_OPEN_END)
        ):
            return Place.TAG
        return self.place

    def _text(self, markup: str, at: int) -> int:
        found = _COMMENT_OR_TAG.search(markup, at)
        if found is None:
            return len(markup)
        comment, end, name = found.groups()
        if comment:
            short = _SHORT_COMMENT.match(markup, found.end())
            if short is not None:
                return short.end()
            self.place = Place.COMMENT
        else:
            self.place = Place.TAG
            self._element = "" if end else name.lower()
            self._inside = _ELEMENTS.get(self._element, Place.TEXT)
        return found.end()

    def _tag(self, markup: str, at: int) -> int:
        found = _TAG_PART.match(markup, at)
        if found is None:
            return len(markup)
        end, name, quote = found.groups()
        if end:
            self.place = self._inside
        elif quote:
            self._quote = quote
            name = name.lower()
            plain = name in _PLAIN_ATTRIBUTES or name.startswith(_PLAIN_PREFIX)
            self.place = Place.PLAIN_VALUE if plain else Place.VALUE
        return found.end()

    def _until(self, end: re.Pattern[str], markup: str, at: int, then: Place) -> int:
        found = end.search(markup, at)
        if found is None:
            return len(markup)
        self.place = then
        return found.end()
