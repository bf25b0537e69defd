"""The scanner of ordinary heads: what it takes means to h11 what it means to it, byte for byte."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy._fastpath import rewrite_response
from kamal_proxy.http.codec import ServerCodec
from tests.fuzzing import at_least
from tests.http.fuzz_heads import METHODS, try_heads
from tests.http.head_edits import EDITS, NAMES, VALUES, edited
from tests.http.head_samples import (
    ODD_REQUESTS,
    ODD_RESPONSES,
    ORDINARY_REQUESTS,
    ORDINARY_RESPONSES,
    head,
)
from tests.http.slow_heads import (
    ALT_SVC,
    LIMIT,
    Given,
    compare_request,
    compare_response,
    ordinary_request,
)
from tests.reference.ordinary import is_ordinary_request, is_ordinary_response

REQUESTS = ORDINARY_REQUESTS | ODD_REQUESTS
RESPONSES = ORDINARY_RESPONSES | ODD_RESPONSES
GIVEN = st.builds(
    Given,
    believed=st.booleans(),
    prefix=st.integers(0, 12),
    closes=st.booleans(),
    added=st.sampled_from([(), (ALT_SVC,)]),
)

# Heads by the grammar, most of them ordinary

NAME = st.one_of(
    st.text("abcXYZ019-", min_size=1, max_size=20).map(str.encode),
    st.sampled_from([name for name in NAMES if name.strip() == name and b"_" not in name]),
)
TEXT = st.binary(max_size=20).map(
    lambda data: bytes(byte for byte in data if byte >= 0x20 and byte != 0x7F)
)
COLON = st.sampled_from([b":", b": ", b":   "])
FIELD = st.tuples(NAME, COLON, st.one_of(TEXT, TEXT, st.sampled_from(VALUES))).map(b"".join)
FIELDS = st.lists(FIELD, max_size=4)
KNOWN_FIELDS = st.sets(
    st.sampled_from(
        [
            *(b"Connection: close", b"connection:Keep-Alive ", b"Content-Type: text/html"),
            *(b"User-Agent: x y", b"X-Request-ID: abc", b"X-Request-Start: t=5", b"Accept:*/*"),
            *(b"X-Forwarded-For: 192.0.2.1, b", b"X-Forwarded-Host: b", b"X-Accel-Buffering: No"),
            *(b"X-Forwarded-Proto: HTTPS", b"Cookie: a=b; c", b"Set-Cookie: a=b"),
        ]
    ),
    max_size=6,
).map(list)
FRAMING: st.SearchStrategy[list[bytes]] = st.one_of(
    st.just([]),
    st.integers(0, 10**15 - 1).map(lambda length: [b"Content-Length: %d" % length]),
    st.sampled_from(
        [[b"content-length:3 "], [b"Transfer-Encoding: chunked"], [b"TRANSFER-encoding:Chunked"]]
    ),
)
SEGMENTS = st.lists(
    st.sampled_from(
        [b"/", b"a", b"%61", b"%2F", b"%2f", b"%25", b"%00", b"*", b"[]", b"~", b"..", b"+", b"\\"]
    ),
    max_size=6,
).map(b"".join)
QUERY = st.sampled_from([b"", b"?", b"?a=b&c", b"?%zz", b"??/", b"?[]{}|"])
HOSTS = st.sampled_from([b"Host: a", b"HOST:A.b-c_d.:80", b"host: a:  ", b"Host: 192.0.2.1:8080"])
REST = st.one_of(st.just(b""), st.binary(max_size=8), st.just(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))


def _whole(first: list[bytes], lines: list[bytes], rest: bytes) -> bytes:
    return b"\r\n".join([b"".join(first), *lines, b"", rest])


def _mixed(*parts: st.SearchStrategy[list[bytes]]) -> st.SearchStrategy[list[bytes]]:
    return (
        st.tuples(*parts).map(lambda lists: list(itertools.chain(*lists))).flatmap(st.permutations)
    )


GRAMMATICAL_REQUESTS = st.builds(
    _whole,
    st.tuples(st.sampled_from(METHODS), st.just(b" /"), SEGMENTS, QUERY, st.just(b" HTTP/1.1")).map(
        list
    ),
    _mixed(HOSTS.map(lambda line: [line]), KNOWN_FIELDS, FRAMING, FIELDS),
    REST,
)
GRAMMATICAL_RESPONSES = st.builds(
    _whole,
    st.tuples(
        st.just(b"HTTP/1.1 "),
        st.sampled_from([b"200", b"201", b"204", b"205", b"302", b"304", b"404", b"599"]),
        st.sampled_from([b" OK", b" ", b"  a  b ", b" Not Found"]),
    ).map(list),
    _mixed(KNOWN_FIELDS, FRAMING, FIELDS),
    REST,
)

# Ordinary and odd ones, changed

EDIT = st.tuples(st.integers(0, len(EDITS) - 1), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))


def _edited(data: bytes, edits: list[tuple[int, int, int]]) -> bytes:
    for kind, a, b in edits:
        data = edited(data, kind, a, b)
    return data


def _changed(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(_edited, whole, st.lists(EDIT, min_size=1, max_size=4))


ANY_REQUESTS = st.one_of(
    GRAMMATICAL_REQUESTS,
    _changed(st.sampled_from(list(REQUESTS.values()))),
    _changed(GRAMMATICAL_REQUESTS),
    st.binary(max_size=60),
)
ANY_RESPONSES = st.one_of(
    GRAMMATICAL_RESPONSES,
    _changed(st.sampled_from([data for _, data in RESPONSES.values()])),
    _changed(GRAMMATICAL_RESPONSES),
    st.binary(max_size=60),
)


def is_taken(data: bytes, method: bytes) -> bool:
    """Return whether the scanner takes a response."""
    return rewrite_response(data, method) is not None


# Known heads


@pytest.mark.parametrize("name", REQUESTS)
def test_known_requests(name: str) -> None:
    data = REQUESTS[name]
    assert is_ordinary_request(data) == (name in ORDINARY_REQUESTS)
    for believed in (False, True):
        for prefix in (0, 1, 3):
            given = Given(believed=believed, prefix=prefix)
            assert compare_request(data, given) == (name in ORDINARY_REQUESTS)


@pytest.mark.parametrize("name", RESPONSES)
def test_known_responses(name: str) -> None:
    method, data = RESPONSES[name]
    assert is_ordinary_response(data, method) == (name in ORDINARY_RESPONSES)
    for closes in (False, True):
        for added in ((), (ALT_SVC,)):
            given = Given(closes=closes, added=added)
            assert compare_response(data, method, given) == (name in ORDINARY_RESPONSES)


def test_a_request_as_its_target_gets_it() -> None:
    data = head(
        *("POST /app/%61?b HTTP/1.1", "Accept:  x  y ", "Content-Length: 5", "HOST: A.test:80"),
        *("connection: Close", "X-forwarded-FOR: 192.0.2.1", "X-Forwarded-Proto: http"),
        *("X-Forwarded-Host: b", "X-Request-Start: t=1", "X-Request-ID: abc", "cookie: e"),
    )
    kept = ["Host: A.test:80", "Accept: x  y", "cookie: e"]
    following = ["X-Request-ID: abc", "X-Request-Start: t=1", "X-Kamal-Target: web-1:3000"]
    believed = head(
        *("POST /%61?b HTTP/1.1", *kept, "X-Forwarded-For: 192.0.2.1, 192.0.2.7"),
        *("X-Forwarded-Host: b", "X-Forwarded-Proto: http", *following, "Content-Length: 5"),
    )
    doubted = head(
        *("POST /%61?b HTTP/1.1", *kept, "X-Forwarded-For: 192.0.2.7"),
        *("X-Forwarded-Host: A.test:80", "X-Forwarded-Proto: https", *following),
        "Content-Length: 5",
    )
    for told, written in ((Given(believed=True), believed), (Given(), doubted)):
        taken = ordinary_request(data + b"hello", told, len("/app"))
        assert taken == (written, len(data), 5, True)


def test_a_response_as_the_client_gets_it() -> None:
    data = head(
        *("HTTP/1.1 200 Fine", "Connection: close", "content-TYPE:a", "Transfer-Encoding: chunked"),
        *("Keep-Alive: timeout=5", "Set-Cookie: a=b", "X-Accel-Buffering: no", "Set-Cookie: c=d"),
    )
    written = head(
        *("HTTP/1.1 200 Fine", "content-TYPE: a", "Set-Cookie: a=b", "X-Accel-Buffering: no"),
        *("Set-Cookie: c=d", "Alt-Svc: h", "Transfer-Encoding: chunked", "Connection: close"),
    )
    taken = rewrite_response(data + b"0", b"GET", added=b"Alt-Svc: h\r\n", closes=True)
    assert taken == (written, len(data), 200, -1, True)


def test_a_connection_that_the_proxy_ends_is_said_in_another_order() -> None:
    """Only of chunked responses, whose last two lines mean the same either way."""
    data = head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked")
    codec = ServerCodec(LIMIT)
    codec.receive_head_data(head("GET / HTTP/1.1", "Host: a"))
    codec.next_request()
    slow = codec.response(200, b"OK", [(b"Connection", b"close")])
    taken = rewrite_response(data, b"GET", closes=True)
    assert taken is not None
    assert sorted(taken[0].split(b"\r\n")) == sorted(slow.split(b"\r\n"))
    assert taken[0] != slow


@pytest.mark.parametrize("stripped", [-1, 3, 2**40])
def test_no_more_than_the_path_can_be_stripped(stripped: int) -> None:
    with pytest.raises(ValueError, match="more than the path"):
        ordinary_request(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n", stripped=stripped)


@pytest.mark.parametrize("data", ["text", None, 7])
def test_refuses_what_is_not_bytes(data: object) -> None:
    with pytest.raises(TypeError):
        ordinary_request(data)  # type: ignore[arg-type]  # the wrong type is the test
    with pytest.raises(TypeError):
        rewrite_response(data, b"GET")  # type: ignore[arg-type]  # the wrong type is the test
    with pytest.raises(TypeError):
        rewrite_response(b"", data)  # type: ignore[arg-type]  # the wrong type is the test


def test_a_head_grows_within_its_room() -> None:
    """With all that makes it longer: the host written twice, spaces after colons, a length."""
    fields = [f"Host:{'h' * 260}", *(["a:"] * 99)]
    assert compare_request(head("POST / HTTP/1.1", *fields))
    fields = ["Transfer-Encoding:chunked", *(["a:"] * 99)]
    assert compare_response(head("HTTP/1.1 200 ", *fields), b"GET", Given(closes=True))


# Every condition: one thing is changed about what is ordinary otherwise.


def a_request(line: str, method: str = "GET", target: str = "/", host: str = "Host: a") -> bytes:
    return head(f"{method} {target} HTTP/1.1", host, *([line] if line else []))


@pytest.mark.parametrize("byte", range(256))
def test_which_bytes_may_be_where(byte: int) -> None:
    letter = chr(byte)
    is_alphanumeric = byte < 0x80 and letter.isalnum()
    is_visible = 0x21 <= byte <= 0x7E
    in_value = byte >= 0x20 and byte != 0x7F
    for data, is_ordinary in (
        (a_request(f"A{letter}B: c"), is_alphanumeric or letter in "-:"),
        (a_request(f"A: b{letter}c"), in_value),
        (a_request(f"A:{letter}c"), in_value),
        (a_request(f"A: b{letter}"), in_value),
        (a_request("", target=f"/a{letter}b"), is_visible and letter not in "#%"),
        (a_request("", target=f"/?a{letter}b"), is_visible and letter != "#"),
        (a_request("", target=f"/%a{letter}"), letter in "0123456789abcdefABCDEF"),
        (a_request("", host=f"Host: a{letter}b"), is_alphanumeric or letter in "._-"),
        (a_request("", host=f"Host: a:{letter}"), letter in "0123456789 "),
        (a_request(f"Content-Length: {letter}"), letter in "0123456789"),
        (a_request(f"Content-Length: 1{letter}"), letter in "0123456789 "),
        (a_request(f"Connection: clos{letter}"), letter in "eE"),
        (a_request(f"Connection: keep{letter}alive"), letter == "-"),
        (a_request(f"Transfer-Encoding: {letter}hunked"), letter in "cC"),
    ):
        assert compare_request(data) == is_ordinary, data
    for data, is_ordinary in (
        (head(f"HTTP/1.1 200 a{letter}b", "Content-Length: 0"), 0x20 <= byte <= 0x7E),
        (head(f"HTTP/1.1 2{letter}1 OK", "Content-Length: 0"), letter in "0123456789"),
        (head(f"HTTP/1.1 {letter}00 OK", "Content-Length: 0"), letter in "2345"),
        (head("HTTP/1.1 200 OK", "Content-Length: 0", f"A: b{letter}c"), in_value),
    ):
        assert compare_response(data, b"GET") == is_ordinary, data


@pytest.mark.parametrize(
    "name",
    [
        "Expect",
        "TE",
        "Upgrade",
        "Forwarded",
        "Keep-Alive",
        "X-Kamal-Target",
        "Proxy-Connection",
        "Proxy-Authenticate",
        "Proxy-Authorization",
        "Host",
    ],
)
def test_fields_that_no_ordinary_request_has(name: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        assert not compare_request(a_request(f"{spelled}: a"))
        assert compare_request(a_request(f"{spelled}-: a"))


@pytest.mark.parametrize(
    "name",
    ["Host", "TE", "Upgrade", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization"],
)
def test_fields_that_no_ordinary_response_has(name: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        assert not compare_response(
            head("HTTP/1.1 200 OK", "Content-Length: 0", f"{spelled}: a"), b"GET"
        )
        assert compare_response(
            head("HTTP/1.1 200 OK", "Content-Length: 0", f"{spelled}-: a"), b"GET"
        )


ONCE = {
    "Connection": "close",
    "Content-Length": "5",
    "Content-Type": "a",
    "Transfer-Encoding": "chunked",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *ONCE.items(),
        *[("User-Agent", "a"), ("X-Request-ID", "a"), ("X-Request-Start", "t=1")],
        *[("X-Forwarded-For", "a"), ("X-Forwarded-Host", "a"), ("X-Forwarded-Proto", "http")],
    ],
)
def test_fields_that_an_ordinary_request_has_once_and_with_a_value(name: str, value: str) -> None:
    line = f"{name}: {value}"
    assert compare_request(a_request(line), Given(believed=True))
    assert not compare_request(a_request(f"{line}\r\nA: b\r\n{line}"))
    assert not compare_request(a_request(f"{line}\r\n{line.lower()}"))
    assert not compare_request(a_request(f"{name}:"))
    assert not compare_request(a_request(f"{name}:  "))


@pytest.mark.parametrize(("name", "value"), [*ONCE.items(), ("X-Accel-Buffering", "no")])
def test_fields_that_an_ordinary_response_has_once_and_with_a_value(name: str, value: str) -> None:
    framing = [] if name in ("Content-Length", "Transfer-Encoding") else ["Content-Length: 0"]
    line = f"{name}: {value}"
    assert compare_response(head("HTTP/1.1 200 OK", line, *framing), b"GET")
    for lines in ([line, line.lower()], [line, "A: b", line], [f"{name}:"], [f"{name}:  "]):
        assert not compare_response(head("HTTP/1.1 200 OK", *lines, *framing), b"GET")


# Any heads


@pytest.mark.fuzz
@at_least(400)
@given(ANY_REQUESTS, GIVEN)
@example(head("GET / HTTP/1.1", f"Host: {'h' * 2000}"), Given())
def test_h11_agrees_on_every_request_that_is_taken(data: bytes, given: Given) -> None:
    compare_request(data, given)


@pytest.mark.fuzz
@at_least(400)
@given(ANY_RESPONSES, st.sampled_from(METHODS), GIVEN)
@example(head("HTTP/1.1 200 OK", "A: b", "Host: a", "Content-Length: 0"), b"GET", Given())
def test_h11_agrees_on_every_response_that_is_taken(
    data: bytes, method: bytes, given: Given
) -> None:
    compare_response(data, method, given)


@pytest.mark.fuzz
@at_least(400)
@given(ANY_REQUESTS)
def test_the_twin_agrees_on_requests(data: bytes) -> None:
    assert (ordinary_request(data) is not None) == is_ordinary_request(data)


@pytest.mark.fuzz
@at_least(400)
@given(ANY_RESPONSES, st.sampled_from([*METHODS, b"get", b"TRACE"]))
def test_the_twin_agrees_on_responses(data: bytes, method: bytes) -> None:
    assert is_taken(data, method) == is_ordinary_response(data, method)


@pytest.mark.fuzz
@at_least(60)
@given(ANY_REQUESTS, st.binary(max_size=20))
@example(ORDINARY_REQUESTS["Chrome"], b"\r\n")
def test_only_a_whole_request_is_taken_whatever_follows_it(data: bytes, more: bytes) -> None:
    taken = ordinary_request(data)
    if taken is not None:
        size = taken[1]
        assert ordinary_request(data[:size]) == ordinary_request(data + more) == taken
        assert all(ordinary_request(data[:end]) is None for end in range(size))


@pytest.mark.fuzz
@at_least(60)
@given(ANY_RESPONSES, st.sampled_from(METHODS), st.binary(max_size=20))
@example(ORDINARY_RESPONSES["Puma"][1], b"GET", b"\r\n")
def test_only_a_whole_response_is_taken_whatever_follows_it(
    data: bytes, method: bytes, more: bytes
) -> None:
    taken = rewrite_response(data, method)
    if taken is not None:
        size = taken[1]
        assert rewrite_response(data[:size], method) == taken
        assert rewrite_response(data + more, method) == taken
        assert not any(is_taken(data[:end], method) for end in range(size))


def test_many_heads() -> None:
    """As ``make fuzz-heads`` tries them by the million; enough of them are ordinary."""
    tally = try_heads(seed=20, count=4000)
    assert tally.tried == 4000
    assert tally.ordinary > 600
