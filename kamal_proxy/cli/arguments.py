"""The grammar of the command line: Go's pflag and cobra, down to which error is told first.

Turns arguments into values by kind and finds the command's word; what a command has for flags is
read from its annotated signature, so that each flag is declared once. The canonical tokens made
here are what cyclopts binds. Knows no command; does no IO.

Texts are the bytes of the command line decoded as UTF-8 with ``surrogateescape``.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import attrs
from cyclopts import Parameter, Token

from kamal_proxy.durations import parse_duration
from kamal_proxy.errors import InvalidDurationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROGRAM = "kamal-proxy"

_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
# Go's strconv.ParseInt with base 0: underscores only between digits or after the base's prefix.
_INTEGER = re.compile(
    r"(?P<sign>[+-]?)(?:0[xX](?P<hex>(?:_?[0-9a-fA-F])+)|0[bB](?P<bin>(?:_?[01])+)"
    r"|0[oO]?(?P<oct>(?:_?[0-7])+)|(?P<dec>0|[1-9](?:_?[0-9])*))",
    re.ASCII,
)
_BASES = {"hex": 16, "bin": 2, "oct": 8, "dec": 10}
_MAX_DIGITS = 64 + 63  # of a 64-bit number in base 2, with an underscore between all digits
_ESCAPES = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}


def quote(text: str) -> str:
    """Quote a text for an error sentence as Go's ``%q`` does."""
    return '"' + "".join(map(_quoted_character, text)) + '"'


def _quoted_character(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character.isprintable():
        return character
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def parse_bool(text: str) -> bool:
    """Parse one of Go's twelve words for true and false; ValueError has Go's reason."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"strconv.ParseBool: parsing {quote(text)}: invalid syntax")


def parse_int(text: str) -> int:
    """Parse a 64-bit integer as Go does with base 0: ``0x10``, ``1_000``, and 8 for ``010``."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        raise ValueError(f"strconv.ParseInt: parsing {quote(text)}: invalid syntax")
    base = next(base for base in _BASES if match[base] is not None)
    digits = match[base].lstrip("0_")
    value = int(match["sign"] + (digits or "0"), _BASES[base]) if len(digits) <= _MAX_DIGITS else 0
    if len(digits) > _MAX_DIGITS or not -(2**63) <= value < 2**63:
        raise ValueError(f"strconv.ParseInt: parsing {quote(text)}: value out of range")
    return value


def parse_strings(text: str) -> tuple[str, ...]:
    """Parse the first record of comma-separated values (RFC 4180); an empty text has none.

    ValueError has the reason in Go's words, with line and column counted in bytes.
    """
    if not text:
        return ()
    data = text.encode("utf-8", "surrogateescape").replace(b"\r\n", b"\n")
    data = data[:-1] if data.endswith(b"\r") else data
    start = len(data) - len(data.lstrip(b"\n"))  # blank lines are no record
    if start == len(data):
        raise ValueError("EOF")
    fields = []
    position, more = start, True
    while more:
        read = _quoted_field if data[position : position + 1] == b'"' else _plain_field
        field, position = read(data, start, position)
        fields.append(field.decode("utf-8", "surrogateescape"))
        more = data[position : position + 1] == b","
        position += 1
    return tuple(fields)


def _plain_field(data: bytes, start: int, position: int) -> tuple[bytes, int]:
    end = next((i for i in range(position, len(data)) if data[i] in b",\n"), len(data))
    field = data[position:end]
    if b'"' in field:
        bare = position + field.index(b'"')
        raise ValueError(_csv_error(data, start, bare, 'bare " in non-quoted-field'))
    return field, end


def _quoted_field(data: bytes, start: int, position: int) -> tuple[bytes, int]:
    reason = 'extraneous or missing " in quoted-field'
    field = b""
    position += 1
    while (end := data.find(b'"', position)) >= 0:
        field += data[position:end]
        position = end + 1
        following = data[position : position + 1]
        if following in (b"", b",", b"\n"):
            return field, position
        if following != b'"':
            raise ValueError(_csv_error(data, start, end, reason))
        field += b'"'
        position += 1
    raise ValueError(_csv_error(data, start, len(data), reason))


def _csv_error(data: bytes, start: int, position: int, reason: str) -> str:
    # A newline that ends the text begins no new line: the end belongs to the line before.
    newlines = data[: position - 1 if position == len(data) else position]
    first, line = data.count(b"\n", 0, start) + 1, newlines.count(b"\n") + 1
    column = position - newlines.rfind(b"\n")
    record = f"record on line {first}; " if first != line else ""
    return f"{record}parse error on line {line}, column {column}: {reason}"


class Source(enum.Enum):
    """Where a shell that completes a command line finds values for a flag or an argument."""

    NOTHING = enum.auto()
    FILES = enum.auto()
    DIRECTORIES = enum.auto()
    COMMANDS = enum.auto()
    # What the running proxy has; services of the kind that the command is about.
    SERVICES = enum.auto()
    HTTP_SERVICES = enum.auto()
    UDP_SERVICES = enum.auto()
    HOSTS = enum.auto()


@attrs.frozen(eq=False)
class Kind:
    """What a flag takes for a value.

    Attributes:
        word: The name of the value in help texts; empty if the flag needs none.
        parse: Turns a text into the value; raises ValueError or InvalidDurationError.
        bare: The text that the flag stands for when it has no value; ``None`` if it needs one.
        many: Whether the values of a repeated flag add up; otherwise the last one wins.
        values: What a shell may complete: a source, or the values themselves.
    """

    word: str
    parse: Callable[[str], Any]
    bare: str | None = None
    many: bool = False
    values: Source | tuple[str, ...] = Source.NOTHING

    def parameter(self) -> Parameter:
        """Return cyclopts's view of the kind, with nothing of its own grammar left on."""

        def convert(_hint: object, tokens: Sequence[Token]) -> Any:
            if self.many:
                return tuple(value for token in tokens for value in self.parse(token.value))
            return self.parse(tokens[-1].value)

        # A function, because cyclopts takes a bound method for a classmethod of the hint.
        return Parameter(
            converter=convert,
            n_tokens=1,
            negative=(),
            requires_equals=True,
            allow_leading_hyphen=True,
            accepts_keys=False,
            json_dict=False,
            json_list=False,
        )


TEXT = Kind("string", str)
STRINGS = Kind("strings", parse_strings, many=True)
BOOL = Kind("", parse_bool, bare="true", values=("true", "false"))
DURATION = Kind("duration", parse_duration)
INT = Kind("int", parse_int)
FILE = Kind("string", str, values=Source.FILES)
DIRECTORY = Kind("string", str, values=Source.DIRECTORIES)


def choice(words: tuple[str, ...]) -> Kind:
    """Return the kind of a flag whose values are known; what they mean is the command's."""
    return Kind("string", str, values=words)


Text = Annotated[str, TEXT, TEXT.parameter()]
Strings = Annotated[tuple[str, ...], STRINGS, STRINGS.parameter()]
Bool = Annotated[bool, BOOL, BOOL.parameter()]
Duration = Annotated[float, DURATION, DURATION.parameter()]
Int = Annotated[int, INT, INT.parameter()]
File = Annotated[str, FILE, FILE.parameter()]
Directory = Annotated[str, DIRECTORY, DIRECTORY.parameter()]

# Words that are not flags.
Service = Annotated[str, Source.SERVICES]
HttpService = Annotated[str, Source.HTTP_SERVICES]
UdpService = Annotated[str, Source.UDP_SERVICES]
Host = Annotated[str, Source.HOSTS]
CommandWord = Annotated[str, Source.COMMANDS]


@attrs.frozen
class Group:
    """Flags that a long help text lists together, under a title."""

    title: str


@attrs.frozen
class Flag:
    """One flag of a command; ``default`` is ``None`` where the command asks if it was given."""

    name: str
    kind: Kind
    help: str = ""
    default: object = None
    shorthand: str = ""
    group: str = ""

    @property
    def title(self) -> str:
        """The flag as error sentences and help texts write it."""
        return f"-{self.shorthand}, --{self.name}" if self.shorthand else f"--{self.name}"


@attrs.frozen
class Grammar:
    """What may follow one command's word.

    Attributes:
        path: The command as error sentences name it, such as ``kamal-proxy list``.
        flags: Flags by name, with ``help``.
        words: How many arguments it takes that are not flags; ``None`` means any number.
        sources: Where a shell finds values for these, in order; for any number the same one.
    """

    path: str
    flags: Mapping[str, Flag]
    words: int | None = None
    sources: tuple[Source, ...] = ()


@attrs.define
class Scan:
    """The arguments of one command.

    Attributes:
        given: Flag name -> the texts it was given, in order.
        words: Arguments that are not flags.
        checked: Whether each value is one of its flag's kind.
        only_words: Whether ``--`` was among them, after which nothing is a flag.
    """

    given: dict[str, list[str]] = attrs.Factory(dict)
    words: list[str] = attrs.Factory(list)
    checked: bool = True
    only_words: bool = False

    @property
    def help(self) -> bool:
        """Whether the help text is wanted."""
        return "help" in self.given and parse_bool(self.given["help"][-1])

    def tokens(self) -> list[str]:
        """Return the arguments as cyclopts takes them: ``--flag=text`` first, words after ``--``.

        Of a scalar that was given repeatedly only the last text is left.
        """
        flags = [
            f"--{name}={text}"
            for name, texts in self.given.items()
            if name != "help"
            for text in texts
        ]
        return [*flags, "--", *self.words]


def help_flag(path: str) -> Flag:
    """Return the flag that every command has."""
    return Flag("help", BOOL, f"Show this help for {path.rpartition(' ')[2]}", None, "h")


def read_grammar(path: str, function: Callable[..., Any]) -> Grammar:
    """Derive the grammar of a command from its function's annotated signature.

    Keyword-only parameters are flags, positional ones words, ``*rest`` any number of words.
    """
    hints = get_type_hints(function, include_extras=True)
    flags = {"help": help_flag(path)}
    words: int | None = 0
    sources: list[Source] = []
    for name, parameter in inspect.signature(function).parameters.items():
        metadata = list(_metadata(hints[name]))
        if parameter.kind is parameter.KEYWORD_ONLY:
            flag = _flag(name.replace("_", "-"), metadata, parameter.default)
            flags[flag.name] = flag
            continue
        found = (item for item in metadata if isinstance(item, Source))
        sources.append(next(found, Source.NOTHING))
        if parameter.kind is parameter.VAR_POSITIONAL:
            words = None
        elif words is not None:
            words += 1
    return Grammar(path, flags, words, tuple(sources))


def _flag(name: str, metadata: Sequence[object], default: object) -> Flag:
    kind = next(item for item in metadata if isinstance(item, Kind))
    texts = (item.help for item in metadata if isinstance(item, Parameter) and item.help)
    group = next((item.title for item in metadata if isinstance(item, Group)), "")
    return Flag(name, kind, next(texts, ""), default, group=group)


def _metadata(hint: Any) -> Iterable[Any]:
    origin = get_origin(hint)
    if origin is Annotated:
        yield from hint.__metadata__
        yield from _metadata(hint.__origin__)
    elif origin in (Union, UnionType):
        for arg in get_args(hint):
            yield from _metadata(arg)


def find_word(arguments: Sequence[str]) -> int | None:
    """Return the index of the command's word; a flag before it without ``=`` hides the next text.

    The rule is cobra's, which knows no flag yet at that point, ``-h`` included.
    """
    position = 0
    while position < len(arguments):
        text = arguments[position]
        position += 1
        if text == "--":
            return None
        short = len(text.encode("utf-8", "surrogateescape")) == 2
        if text.startswith("-") and "=" not in text and (text.startswith("--") or short):
            if len(arguments) - position <= 1:
                return None
            position += 1
        elif text and not text.startswith("-"):
            return position - 1
    return None


def scan(grammar: Grammar, arguments: Sequence[str], *, checked: bool = True) -> Scan:
    """Read the arguments that belong to one command, in order, up to the first error.

    Args:
        grammar: What the command takes.
        arguments: What follows its words.
        checked: Whether a value must be of its flag's kind.

    Raises:
        UsageError: an unknown flag, a missing value, or a value that is not of the flag's kind.
    """
    result = Scan(checked=checked)
    rest = list(reversed(arguments))
    while rest:
        text = rest.pop()
        if text == "--":
            result.only_words = True
            result.words.extend(reversed(rest))
            break
        if text.startswith("--"):
            _scan_long(grammar, text, rest, result)
        elif text.startswith("-") and len(text) > 1:
            _scan_short(grammar, text[1:], rest, result)
        else:
            result.words.append(text)
    return result


def _scan_long(grammar: Grammar, text: str, rest: list[str], result: Scan) -> None:
    name, equals, value = text[2:].partition("=")
    if not name or name.startswith("-"):
        raise UsageError(f"bad flag syntax: {text}")
    flag = grammar.flags.get(name)
    if flag is None:
        raise UsageError(f"unknown flag: --{name}")
    if not equals:
        value = _value_without_equals(flag, rest, f"flag needs an argument: --{name}")
    _store(flag, value, result)


def _scan_short(grammar: Grammar, letters: str, rest: list[str], result: Scan) -> None:
    shorthands = {flag.shorthand: flag for flag in grammar.flags.values() if flag.shorthand}
    while letters:
        letter = letters[0]
        flag = shorthands.get(letter)
        if flag is None:
            # Go reads a shorthand as one byte.
            byte = chr(letter.encode("utf-8", "surrogateescape")[0])
            shown = "'\\''" if byte == "'" else "'" + quote(byte)[1:-1].replace('\\"', '"') + "'"
            raise UsageError(f"unknown shorthand flag: {shown} in -{letters}")
        if len(letters) > 2 and letters[1] == "=":
            _store(flag, letters[2:], result)
            return
        if flag.kind.bare is None:
            message = f"flag needs an argument: '{letter}' in -{letters}"
            _store(flag, letters[1:] or _value_without_equals(flag, rest, message), result)
            return
        _store(flag, flag.kind.bare, result)
        letters = letters[1:]


def _value_without_equals(flag: Flag, rest: list[str], message: str) -> str:
    if flag.kind.bare is not None:
        return flag.kind.bare
    if not rest:
        raise UsageError(message)
    return rest.pop()


def _store(flag: Flag, text: str, result: Scan) -> None:
    if result.checked:
        try:
            flag.kind.parse(text)
        except (ValueError, InvalidDurationError) as error:
            raise UsageError(
                f"invalid argument {quote(text)} for {quote(flag.title)} flag: {error}"
            ) from None
    if flag.kind.many:
        result.given.setdefault(flag.name, []).append(text)
    else:
        result.given[flag.name] = [text]


def require_words(grammar: Grammar, words: Sequence[str]) -> None:
    """Raise UsageError unless the number of words is what the command takes."""
    if grammar.words is None or len(words) == grammar.words:
        return
    if grammar.words == 0:
        raise UsageError(f"unknown command {quote(words[0])} for {quote(grammar.path)}")
    raise UsageError(f"accepts {grammar.words} arg(s), received {len(words)}")
