"""Go's duration grammar, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.durations import (
    format_duration,
    from_nanoseconds,
    parse_duration,
    parse_nanoseconds,
    to_nanoseconds,
)
from kamal_proxy.errors import InvalidDurationError


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("+0", 0),
        ("-0", 0),
        ("0s", 0),
        ("30s", 30 * 10**9),
        ("1m30s", 90 * 10**9),
        ("1.5s", 1_500_000_000),
        ("1h2m3.5s", 3723_500_000_000),
        (".5s", 500_000_000),
        ("5.s", 5 * 10**9),
        ("500ms", 500_000_000),
        ("1us", 1000),
        ("1µs", 1000),
        ("1μs", 1000),
        ("1ns", 1),
        ("0.1ns", 0),
        ("1.0000000019s", 1_000_000_001),
        ("-1s", -(10**9)),
        ("+1s", 10**9),
        ("1s1s", 2 * 10**9),
        ("00001s", 10**9),
        ("9223372036854775807ns", 2**63 - 1),
        ("-9223372036854775808ns", -(2**63)),
        ("2562047h47m16.854775807s", 2**63 - 1),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert parse_nanoseconds(text) == nanoseconds
    assert parse_duration(text) == nanoseconds / 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'time: invalid duration ""'),
        ("+", 'time: invalid duration "+"'),
        ("+-1s", 'time: invalid duration "+-1s"'),
        (".s", 'time: invalid duration ".s"'),
        ("s", 'time: invalid duration "s"'),
        (" 1s", 'time: invalid duration " 1s"'),
        ("1s ", 'time: unknown unit "s " in duration "1s "'),
        ("30", 'time: missing unit in duration "30"'),
        ("1.5.5s", 'time: missing unit in duration "1.5.5s"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("1S", 'time: unknown unit "S" in duration "1S"'),
        ("1M", 'time: unknown unit "M" in duration "1M"'),
        ("1e3s", 'time: unknown unit "e" in duration "1e3s"'),
        ("1\u0661s", r'time: unknown unit "\xd9\xa1s" in duration "1\xd9\xa1s"'),
        ('1"\\\n\udcff', r'time: unknown unit "\"\\\x0a\xff" in duration "1\"\\\x0a\xff"'),
        ("9999999h", 'time: invalid duration "9999999h"'),
        ("9223372036854775808ns", 'time: invalid duration "9223372036854775808ns"'),
        ("-9223372036854775809ns", 'time: invalid duration "-9223372036854775809ns"'),
        ("9223372036s1h", 'time: invalid duration "9223372036s1h"'),
    ],
)
def test_texts_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InvalidDurationError) as caught:
        parse_duration(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (30, "30s"),
        (60, "1m0s"),
        (90, "1m30s"),
        (3600, "1h0m0s"),
        (3723.5, "1h2m3.5s"),
        (0.001, "1ms"),
        (0.0015, "1.5ms"),
        (1e-6, "1µs"),
        (1e-9, "1ns"),
        (-0.25, "-250ms"),
        (1e30, "2562047h47m16.854775807s"),
        (-1e30, "-2562047h47m16.854775808s"),
    ],
)
def test_format(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.fuzz
@given(st.integers(-(10**15), 10**15))
def test_formatting_and_parsing_are_inverse(nanoseconds: int) -> None:
    text = format_duration(from_nanoseconds(nanoseconds))
    assert parse_nanoseconds(text) == nanoseconds
    assert to_nanoseconds(parse_duration(text)) == nanoseconds


@pytest.mark.fuzz
@given(st.floats(-1e9, 1e9))
def test_seconds_are_kept_to_the_nanosecond(seconds: float) -> None:
    again = parse_duration(format_duration(seconds))
    assert abs(again - seconds) <= max(1e-9, abs(seconds) * 1e-15)


@pytest.mark.fuzz
@given(st.text("0123456789.+-nuµmsh \n\udcff", max_size=12) | st.text(max_size=6))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    try:
        nanoseconds = parse_nanoseconds(text)
    except InvalidDurationError as error:
        assert str(error).startswith("time: ")  # noqa: PT017  both outcomes are right here
    else:
        assert -(2**63) <= nanoseconds < 2**63
