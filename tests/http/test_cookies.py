"""Cookies that are read, set and rewritten: exact values, and nothing that bytes could break."""

from __future__ import annotations

import math
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy.http.cookies import (
    ROLLOUT,
    find_cookie,
    is_recent_writer,
    scope_cookie,
    scope_cookies,
    with_writer_cookie,
    writer_cookie,
)
from tests.fuzzing import at_least

NOW = 1795410089.241


def request(*values: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Return the headers of a request with these Cookie fields."""
    return [(b"host", b"Host", b"a"), *((b"cookie", b"Cookie", value) for value in values)]


# Reading


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ([], b""),
        ([b""], b""),
        ([b"kamal-rollout=x"], b"x"),
        ([b"a=b; kamal-rollout=x; c=d"], b"x"),
        ([b"a=b;kamal-rollout=x;c=d"], b"x"),
        ([b"  kamal-rollout=x  "], b"x"),
        ([b"\tkamal-rollout\t=x"], b"x"),
        ([b'kamal-rollout="x"'], b"x"),
        ([b'kamal-rollout=""'], b""),
        ([b'kamal-rollout="'], b'"'),
        ([b'kamal-rollout="x'], b'"x'),
        ([b"kamal-rollout=x=y"], b"x=y"),
        ([b"kamal-rollout="], b""),
        ([b"kamal-rollout"], b""),
        ([b"kamal-rollout=x; kamal-rollout=y"], b"x"),
        ([b"a=b", b"kamal-rollout=x", b"kamal-rollout=y"], b"x"),
        ([b"Kamal-Rollout=x"], b""),
        ([b"xkamal-rollout=x; kamal-rollout2=y; a=kamal-rollout=z"], b""),
        ([b"kamal-rollout=\xff\x00"], b"\xff\x00"),
    ],
)
def test_the_first_cookie_of_a_name_is_found(fields: list[bytes], found: bytes) -> None:
    assert find_cookie(request(*fields), ROLLOUT) == found


def test_other_fields_hold_no_cookies() -> None:
    assert find_cookie([(b"x-cookie", b"X-Cookie", b"kamal-rollout=x")], ROLLOUT) == b""


@pytest.mark.fuzz
@given(st.lists(st.binary(), max_size=5))
@at_least(100)
def test_anything_can_be_searched(fields: list[bytes]) -> None:
    found = find_cookie(request(*fields), b"k")
    assert found == b"" or any(b"k" in field and found in field for field in fields)
    assert is_recent_writer(request(*fields), NOW) in (True, False)


_TOKENS = st.binary(min_size=1).filter(lambda text: not set(text) & set(b' \t;="'))


@given(st.lists(st.tuples(_TOKENS, _TOKENS), max_size=6), _TOKENS)
@at_least(100)
def test_any_cookie_can_be_found(pairs: list[tuple[bytes, bytes]], wanted: bytes) -> None:
    field = b"; ".join(b"%b=%b" % pair for pair in pairs)
    expected = next((value for name, value in pairs if name == wanted), b"")
    assert find_cookie(request(field), wanted) == expected


@pytest.mark.parametrize(
    ("value", "recent"),
    [
        (b"1795410089242", True),
        (b"1795410089241", False),
        (b"1795410089240", False),
        (b"+1795410089242", True),
        (b"-1795410089242", False),
        (b'"1795410089242"', True),
        (b"01795410089242", True),
        (b"1795410089242.5", False),
        (b"1_795410089242", False),
        (b" 1795410089242x", False),
        (b"0x7fffffffffffffff", False),
        ("\u0669".encode() * 13, False),
        (b"9" * 18, True),
        (b"9" * 5000, False),
        (b"", False),
        (b"+", False),
    ],
)
def test_who_has_written_recently(value: bytes, recent: bool) -> None:
    assert is_recent_writer(request(b"kamal-writer=" + value), 1795410089.241) == recent


# Setting


def test_the_writer_cookie_is_that_of_the_original() -> None:
    """What the Go proxy sent at 05:01:29 with its default of one second."""
    assert writer_cookie(1795410089.241, 1) == (
        b"kamal-writer=1795410090241; Path=/; Expires=Mon, 23 Nov 2026 05:01:31 GMT; HttpOnly"
    )


@pytest.mark.parametrize("lasting", [0.01, 1, 86400 * 365 * 100, 2**63 / 10**9, math.inf])
def test_any_affinity_can_be_written(lasting: float) -> None:
    cookie = writer_cookie(NOW, lasting).decode()
    value = cookie.removeprefix("kamal-writer=").partition(";")[0]
    expires = parsedate_to_datetime(cookie.partition("Expires=")[2].partition(";")[0])
    assert expires.timestamp() == pytest.approx(int(value) / 1000 + 1, abs=1)
    assert is_recent_writer(request(f"kamal-writer={value}".encode()), NOW)


@given(st.floats(1e9, 1e10), st.floats(0, 1e9))
@at_least(50)
def test_a_writer_is_recent_as_long_as_its_cookie_says(now: float, lasting: float) -> None:
    pair = writer_cookie(now, lasting).partition(b";")[0]
    assert not is_recent_writer(request(pair), now + lasting + 0.002)
    if lasting > 0.002:
        assert is_recent_writer(request(pair), now + lasting - 0.002)


@pytest.mark.parametrize(
    ("fields", "kept", "told"),
    [
        ([], [], True),
        ([(b"X-Writer-Affinity", b"false")], [], False),
        ([(b"x-writer-affinity", b"false"), (b"A", b"b")], [(b"A", b"b")], False),
        ([(b"X-Writer-Affinity", b"true")], [], True),
        ([(b"X-Writer-Affinity", b"False")], [], True),
        ([(b"Set-Cookie", b"a=b")], [(b"Set-Cookie", b"a=b")], True),
    ],
)
def test_a_target_may_opt_out(
    fields: list[tuple[bytes, bytes]], kept: list[tuple[bytes, bytes]], told: bool
) -> None:
    before = list(fields)
    result = with_writer_cookie(fields, NOW, 1)
    assert result == [*kept, (b"Set-Cookie", writer_cookie(NOW, 1))] if told else result == kept
    assert fields == before


# Scoping


@pytest.mark.parametrize(
    ("value", "scoped"),
    [
        (b"a=b", b"a=b; Path=/app"),
        (b"a=b; Path=/", b"a=b; Path=/app"),
        (b"a=b; path=/", b"a=b; Path=/app"),
        (b"a=b; Path=/x", b"a=b; Path=/app/x"),
        (b"a=b; Path=/x/y/", b"a=b; Path=/app/x/y"),
        (b"a=b; Path=x", b"a=b; Path=/app/x"),
        (b"a=b; Path=", b"a=b; Path=/app"),
        (b"a=b; Path", b"a=b; Path=/app"),
        (b'a=b; Path="/x"; Secure', b"a=b; Path=/app/x; Secure"),
        (b'a=b; Path="/"', b"a=b; Path=/app"),
        (b"a=b;Path=/x;Secure", b"a=b; Path=/app/x;Secure"),
        (b"a=b; Path=/x; Path=/y; Secure", b"a=b; Path=/app/y; Secure"),
        (b"a=b; Secure; HttpOnly", b"a=b; Secure; HttpOnly; Path=/app"),
        (b"a=b; Max-Age=5; Path=/x; Partitioned", b"a=b; Max-Age=5; Path=/app/x; Partitioned"),
        (b"a=; Path=/x", b"a=; Path=/app/x"),
        (b"a=b; Domain=web.test; Path=/x", b"a=b; Domain=web.test; Path=/app/x"),
        (b"a=b; Domain=WEB.test; Path=/x", b"a=b; Domain=WEB.test; Path=/app/x"),
        (b"a=b; Domain=; Path=/x", b"a=b; Domain=; Path=/app/x"),
        # Other cookies are none of this service's.
        (b"a=b; Domain=test; Path=/x", b"a=b; Domain=test; Path=/x"),
        (b"a=b; Path=/x; domain=.web.test", b"a=b; Path=/x; domain=.web.test"),
        (b"a=b; Path=/x; Domain=other.test", b"a=b; Path=/x; Domain=other.test"),
        (b"", b""),
        (b"ab; Path=/x", b"ab; Path=/x"),
    ],
)
def test_the_prefix_comes_before_the_path(value: bytes, scoped: bytes) -> None:
    assert scope_cookie(value, b"/app", b"web.test") == scoped


def test_only_cookies_are_scoped() -> None:
    fields = [(b"set-COOKIE", b"a=b"), (b"Cookie", b"a=b"), (b"Set-Cookie", b"c=d; Path=/x")]
    assert scope_cookies(fields, b"/app", b"web.test") == [
        (b"set-COOKIE", b"a=b; Path=/app"),
        (b"Cookie", b"a=b"),
        (b"Set-Cookie", b"c=d; Path=/app/x"),
    ]


def attributes(value: bytes) -> tuple[bytes, ...]:
    """Return all parts of a cookie but its paths."""
    pair, *rest = value.split(b";")
    return pair, *(
        part for part in rest if part.partition(b"=")[0].strip(b" \t").lower() != b"path"
    )


@pytest.mark.fuzz
@given(
    st.binary()
    | st.lists(
        st.sampled_from([b"a=b", b" Path=/x", b" path", b"Domain=h", b" Domain=o", b"=", b" ", b""])
    ).map(b";".join)
)
@example(b"=;" * 1000 + b"path=")
@at_least(100)
def test_everything_but_the_path_is_kept(value: bytes) -> None:
    scoped = scope_cookie(value, b"/app", b"h")
    assert attributes(scoped) == attributes(value)
    if scoped != value:
        paths = [part for part in scoped.split(b";")[1:] if part.startswith(b" Path=")]
        assert len(paths) == 1
        assert paths[0] == b" Path=/app" or paths[0].startswith(b" Path=/app/")
