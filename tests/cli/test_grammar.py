"""Every row of the contract's table on the grammar, told apart as the Go original does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from cyclopts import Parameter
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.cli import arguments, commands
from kamal_proxy.cli.arguments import Bool, Duration, Int, Strings, Text, read_grammar, scan
from kamal_proxy.errors import KamalProxyError, UsageError

Command = Callable[..., tuple[int, str, str]]


def sample(
    service: str,
    /,
    *,
    message: Annotated[Text, Parameter(help="A text")] = "",
    host: Strings = (),
    tls: Bool = False,
    forward_headers: Bool | None = None,
    drain_timeout: Duration = 30.0,
    buffer_memory: Int = 1,
) -> None:
    """Do nothing."""


GRAMMAR = read_grammar("kamal-proxy sample", sample)


def values(*argv: str) -> dict[str, Any]:
    found = scan(GRAMMAR, argv)
    read = {}
    for name, texts in found.given.items():
        kind = GRAMMAR.flags[name].kind
        parsed = [kind.parse(text) for text in texts]
        read[name] = tuple(v for many in parsed for v in many) if kind.many else parsed[-1]
    return read


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        scan(GRAMMAR, argv)
    return str(caught.value)


@pytest.mark.parametrize("word", ["1", "t", "T", "TRUE", "true", "True"])
def test_words_for_true(word: str) -> None:
    assert values(f"--tls={word}") == {"tls": True}


@pytest.mark.parametrize("word", ["0", "f", "F", "FALSE", "false", "False"])
def test_words_for_false(word: str) -> None:
    assert values(f"--tls={word}") == {"tls": False}


@pytest.mark.parametrize("word", ["", "yes", "no", "y", "n", "on", "off", "tRUE", "2", " true"])
def test_other_words_are_not_bools(word: str) -> None:
    assert refusal(f"--tls={word}") == (
        f'invalid argument "{word}" for "--tls" flag: '
        f'strconv.ParseBool: parsing "{word}": invalid syntax'
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--tls"], {"tls": True}),
        (["--tls", "--tls"], {"tls": True}),
        (["--tls", "--tls=false"], {"tls": False}),
        (["--forward-headers=false"], {"forward-headers": False}),
        ([], {}),
        (["--message=a", "--message=b"], {"message": "b"}),
        (["--message", "a"], {"message": "a"}),
        (["--message=a=b"], {"message": "a=b"}),
        (["--message="], {"message": ""}),
        (["--message", ""], {"message": ""}),
        (["--message", "-x"], {"message": "-x"}),
        (["--message", "--tls"], {"message": "--tls"}),
        (["--message", "--"], {"message": "--"}),
        (["--host", "-x"], {"host": ("-x",)}),
        (["--host=a:1,b:2"], {"host": ("a:1", "b:2")}),
        (["--host=a", "--host", "b,c", "--host=d"], {"host": ("a", "b", "c", "d")}),
        (["--host="], {"host": ()}),
        (["--host=a", "--host="], {"host": ("a",)}),
        (["--host=a,"], {"host": ("a", "")}),
        (["--host=,"], {"host": ("", "")}),
        (['--host=a,"b,c"'], {"host": ("a", "b,c")}),
        (['--host="a ""b"""'], {"host": ('a "b"',)}),
        (['--host=""'], {"host": ("",)}),
        (["--host=a\nb"], {"host": ("a",)}),
        (["--host=\n\na,b\r\nc"], {"host": ("a", "b")}),
        (['--host="a\r\nb",c\r'], {"host": ("a\nb", "c")}),
        (["--host= a , b"], {"host": (" a ", " b")}),
        (["--host=é,日"], {"host": ("é", "日")}),
        (["--drain-timeout=1m30s"], {"drain-timeout": 90.0}),
        (["--drain-timeout=1.5s"], {"drain-timeout": 1.5}),
        (["--drain-timeout=1h2m3.5s"], {"drain-timeout": 3723.5}),
        (["--drain-timeout=500ms"], {"drain-timeout": 0.5}),
        (["--drain-timeout=1us"], {"drain-timeout": 1e-6}),
        (["--drain-timeout=0"], {"drain-timeout": 0.0}),
        (["--drain-timeout=-1s"], {"drain-timeout": -1.0}),
        (["--drain-timeout", "-1s"], {"drain-timeout": -1.0}),
        (["--buffer-memory=1_000"], {"buffer-memory": 1000}),
        (["--buffer-memory=0x10"], {"buffer-memory": 16}),
        (["--buffer-memory=0X_1F"], {"buffer-memory": 31}),
        (["--buffer-memory=010"], {"buffer-memory": 8}),
        (["--buffer-memory=0_10"], {"buffer-memory": 8}),
        (["--buffer-memory=0o17"], {"buffer-memory": 15}),
        (["--buffer-memory=0b101"], {"buffer-memory": 5}),
        (["--buffer-memory=+7"], {"buffer-memory": 7}),
        (["--buffer-memory=-7"], {"buffer-memory": -7}),
        (["--buffer-memory=00"], {"buffer-memory": 0}),
        (["--buffer-memory=9223372036854775807"], {"buffer-memory": 2**63 - 1}),
        (["--buffer-memory=-9223372036854775808"], {"buffer-memory": -(2**63)}),
        (["-h"], {"help": True}),
        (["-hh"], {"help": True}),
        (["-h=false"], {"help": False}),
        (["--help", "--help=0"], {"help": False}),
    ],
)
def test_values(argv: list[str], expected: dict[str, Any]) -> None:
    assert values(*argv) == expected


@pytest.mark.parametrize(
    "text",
    ["", "5.7", "abc", "08", "1__0", "_1", "1_", "0x", "0b12", " 1", "1e3", "+", "--1", "\u0661"],
)
def test_texts_that_are_no_integers(text: str) -> None:
    assert refusal(f"--buffer-memory={text}") == (
        f'invalid argument "{text}" for "--buffer-memory" flag: '
        f'strconv.ParseInt: parsing "{text}": invalid syntax'
    )


@pytest.mark.parametrize(
    "text", ["9223372036854775808", "-9223372036854775809", "0x8000000000000000", "9" * 5000]
)
def test_integers_outside_64_bits(text: str) -> None:
    assert refusal(f"--buffer-memory={text}") == (
        f'invalid argument "{text}" for "--buffer-memory" flag: '
        f'strconv.ParseInt: parsing "{text}": value out of range'
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", 'time: invalid duration ""'),
        ("30", 'time: missing unit in duration "30"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("1S", 'time: unknown unit "S" in duration "1S"'),
        (" 1s", 'time: invalid duration " 1s"'),
        ("1e3s", 'time: unknown unit "e" in duration "1e3s"'),
        ("9999999h", 'time: invalid duration "9999999h"'),
    ],
)
def test_texts_that_are_no_durations(text: str, reason: str) -> None:
    assert refusal(f"--drain-timeout={text}") == (
        f'invalid argument "{text}" for "--drain-timeout" flag: {reason}'
    )


@pytest.mark.parametrize(
    ("text", "shown", "reason"),
    [
        ('a"b', r"a\"b", 'parse error on line 1, column 2: bare " in non-quoted-field'),
        ('é,b"', r"é,b\"", 'parse error on line 1, column 5: bare " in non-quoted-field'),
        ('a,"b', r"a,\"b", 'parse error on line 1, column 5: extraneous or missing " in '
         "quoted-field"),
        ('"b"c', r"\"b\"c", 'parse error on line 1, column 3: extraneous or missing " in '
         "quoted-field"),
        ('"a\nb', r"\"a\nb", "record on line 1; parse error on line 2, column 2: extraneous or "
         'missing " in quoted-field'),
        ('"a\n', r"\"a\n", 'parse error on line 1, column 4: extraneous or missing " in '
         "quoted-field"),
        ('\n\n"a\nb"c', r"\n\n\"a\nb\"c", "record on line 3; parse error on line 4, column 2: "
         'extraneous or missing " in quoted-field'),
        ("\n", r"\n", "EOF"),
        ("\r", r"\r", "EOF"),
    ],
)  # fmt: skip
def test_texts_that_are_no_comma_separated_values(text: str, shown: str, reason: str) -> None:
    assert refusal(f"--host={text}") == f'invalid argument "{shown}" for "--host" flag: {reason}'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nope"], "unknown flag: --nope"),
        (["--nope=1"], "unknown flag: --nope"),
        (["--no-tls"], "unknown flag: --no-tls"),
        (["--empty-host"], "unknown flag: --empty-host"),
        (["--forward_headers"], "unknown flag: --forward_headers"),
        (["--service", "s"], "unknown flag: --service"),
        (["--version"], "unknown flag: --version"),
        (["--message"], "flag needs an argument: --message"),
        (["a", "--host"], "flag needs an argument: --host"),
        (["-x"], "unknown shorthand flag: 'x' in -x"),
        (["-xyz"], "unknown shorthand flag: 'x' in -xyz"),
        (["-t=4"], "unknown shorthand flag: 't' in -t=4"),
        (["-help"], "unknown shorthand flag: 'e' in -elp"),
        (["-h="], "unknown shorthand flag: '=' in -="),
        (["-'"], "unknown shorthand flag: '\\'' in -'"),
        (["-é"], "unknown shorthand flag: 'Ã' in -é"),
        (["--=x"], "bad flag syntax: --=x"),
        (["---x"], "bad flag syntax: ---x"),
        (
            ["-h=x"],
            'invalid argument "x" for "-h, --help" flag: '
            'strconv.ParseBool: parsing "x": invalid syntax',
        ),
        (
            ["--buffer-memory=\udcff\x7f\u200b\U000e0001"],
            r'invalid argument "\xff\x7f\u200b\U000e0001" for "--buffer-memory" flag: '
            r'strconv.ParseInt: parsing "\xff\x7f\u200b\U000e0001": invalid syntax',
        ),
        (["--tls=x", "--nope"], 'invalid argument "x" for "--tls" flag: '
         'strconv.ParseBool: parsing "x": invalid syntax'),
        (["--nope", "--tls=x"], "unknown flag: --nope"),
    ],
)  # fmt: skip
def test_errors_of_flags(argv: list[str], message: str) -> None:
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a", "--tls", "false"], ["a", "false"]),
        (["--", "a", "--tls"], ["a", "--tls"]),
        (["-", "a"], ["-", "a"]),
        (["a", "--", "--", "-h"], ["a", "--", "-h"]),
        ([""], [""]),
    ],
)
def test_words(argv: list[str], words: list[str]) -> None:
    assert scan(GRAMMAR, argv).words == words


def test_canonical_tokens_keep_the_last_scalar_and_all_lists() -> None:
    found = scan(
        GRAMMAR,
        ["--message=a", "--host", "x,y", "-h=false", "--message", "-b", "svc", "--host=", "--tls"],
    )
    assert found.tokens() == [
        "--message=-b", "--host=x,y", "--host=", "--tls=true", "--", "svc",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "index"),
    [
        ([], None),
        (["list"], 0),
        (["--x=1", "list"], 1),
        (["--x", "1", "list"], 2),
        (["--x", "list"], None),
        (["-h", "list"], None),
        (["-h", "bogus", "list"], 2),
        (["-hx", "list"], 1),
        (["--", "list"], None),
        (["", "-", "list"], 2),
    ],
)
def test_the_command_word_is_found_as_cobra_does(argv: list[str], index: int | None) -> None:
    assert arguments.find_word(argv) == index


@pytest.mark.parametrize(
    ("argv", "words", "rest"),
    [
        ([], "", []),
        (["-x"], "", ["-x"]),
        (["rm", "a"], "remove", ["a"]),
        (["rollout"], "rollout", []),
        (["rollout", "bogus", "set"], "rollout", ["bogus", "set"]),
        (["rollout", "set", "set"], "rollout set", ["set"]),
        (["rollout", "deploy", "deploy", "list"], "rollout deploy", ["deploy", "list"]),
        (["--x=1", "rollout", "-yz", "set", "-a"], "rollout set", ["--x=1", "-yz", "-a"]),
        (["rollout", "--x", "set", "stop"], "rollout stop", ["--x", "set"]),
        (["rollout", "--x", "set"], "rollout", ["--x", "set"]),
        (["rollout", "--", "set"], "rollout", ["--", "set"]),
        (["stop", "rollout"], "stop", ["rollout"]),
        (["", "rollout", "", "stop", ""], "rollout stop", ["", "", ""]),
    ],
)
def test_commands_are_found_in_groups(argv: list[str], words: str, rest: list[str]) -> None:
    command, left = commands.find_command(argv)
    assert (command.words, left) == (words, rest)
    assert command.path == f"kamal-proxy {words}".rstrip()


def test_every_command_can_be_bound_and_described() -> None:
    for command in commands.COMMANDS:
        assert command.short_description
        assert "help" in command.grammar.flags
        assert bool(command.place) != bool(command.members)


def test_a_grammar_is_read_from_the_signature() -> None:
    assert GRAMMAR.words == 1
    assert {name: flag.kind.word for name, flag in GRAMMAR.flags.items()} == {
        "help": "", "message": "string", "host": "strings", "tls": "", "forward-headers": "",
        "drain-timeout": "duration", "buffer-memory": "int",
    }  # fmt: skip
    assert GRAMMAR.flags["message"].help == "A text"
    assert GRAMMAR.flags["drain-timeout"].default == 30.0


TEXTS = st.one_of(
    st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.sampled_from(
        ["deploy", "list", "rm", "help", "run", "rollout", "set", "stop", "--", "-h",
         "--tls", "--tls=", "--host", "--host=", "--target=a,b", "--drain-timeout",
         "--deploy-timeout=1", "--health-check-port=0x", "--percent=1", "--list"]
    ),
    st.builds("--{}={}".format, st.sampled_from(["host", "message", "tls", "buffer-memory"]),
              st.text('",\n\r a0_x\udcff', max_size=8)),
)  # fmt: skip


@pytest.mark.fuzz
@given(st.lists(TEXTS, max_size=6))
def test_any_arguments_are_read_or_refused_with_a_sentence(argv: list[str]) -> None:
    try:
        found = scan(GRAMMAR, argv)
    except UsageError as error:
        assert str(error)  # noqa: PT017  both outcomes are right here
    else:
        assert found.tokens()[-len(found.words) - 1] == "--"
        again = scan(GRAMMAR, found.tokens())
        assert again.tokens() == found.tokens()


@pytest.mark.fuzz
@given(st.lists(TEXTS, max_size=6))
def test_any_command_line_names_a_command_or_is_refused(argv: list[str]) -> None:
    try:
        command, rest = commands.find_command(argv)
        scan(command.grammar, rest)
    except KamalProxyError as error:
        assert str(error)  # noqa: PT017
    else:
        assert len(argv) - len(rest) == len(command.words.split())


@pytest.mark.fuzz
@given(st.text(max_size=20))
def test_quoted_texts_are_printable(text: str) -> None:
    assert arguments.quote(text).isprintable()
