"""What becomes of header fields, and where a request wants to go: tables and any bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.codec import CHUNKED, Header, ProtocolError, RequestHead, ResponseHead
from kamal_proxy.http.headers import Destination, request_headers, response_headers
from tests.fuzzing import at_least

if TYPE_CHECKING:
    from collections.abc import Iterator

Pairs = list[tuple[str, str]]


def fields(pairs: Pairs) -> list[Header]:
    return [(name.lower().encode(), name.encode(), value.encode()) for name, value in pairs]


def head(
    *pairs: tuple[str, str], method: str = "GET", target: str = "/", length: int = 0
) -> RequestHead:
    return RequestHead(method.encode(), target.encode(), b"1.1", fields(list(pairs)), length)


def passed_on(
    *pairs: tuple[str, str], forward: bool = True, length: int = 0, method: str = "GET"
) -> Pairs:
    made = request_headers(
        head(*pairs, length=length, method=method),
        host=b"app.test:8080",
        client=b"192.0.2.7",
        scheme=b"http",
        forward=forward,
        target=b"web-1:3000",
        request_id=b"id-1",
        new_start=lambda: b"t=1",
    )
    return [(name.decode(), value.decode()) for name, value in made]


ADDED = {
    "Host": "app.test:8080",
    "X-Forwarded-For": "192.0.2.7",
    "X-Forwarded-Host": "app.test:8080",
    "X-Forwarded-Proto": "http",
    "X-Request-ID": "id-1",
    "X-Request-Start": "t=1",
    "X-Kamal-Target": "web-1:3000",
}


def test_what_every_target_sees() -> None:
    assert passed_on(("Host", "app.test:8080")) == list(ADDED.items())


@pytest.mark.parametrize(
    ("came", "goes"),
    [
        ([("Accept", "a"), ("aCCept", "b"), ("Cookie", "c")], None),
        ([("Keep-Alive", "x"), ("Proxy-Connection", "x"), ("Proxy-Authorization", "x")], []),
        ([("Upgrade", "websocket"), ("Connection", "Upgrade")], []),
        ([("Proxy-Authenticate", "x"), ("Forwarded", "for=1.2.3.4"), ("Connection", "close")], []),
        ([("X-A", "1"), ("Connection", "x-a , X-B"), ("X-B", "2"), ("X-C", "3")], [("X-C", "3")]),
        ([("Connection", "close, x-a"), ("X-A", "1")], []),
        ([("Connection", "close"), ("Connection", "x-a"), ("X-A", "1")], []),
        ([("TE", "gzip, Trailers")], [("TE", "trailers")]),
        ([("TE", "gzip")], []),
    ],
)
def test_hop_by_hop(came: Pairs, goes: Pairs | None) -> None:
    expected = came if goes is None else goes
    assert [pair for pair in passed_on(*came) if pair[0] not in ADDED] == expected


@pytest.mark.parametrize("name", ["Host", "Content-Length", "X-Forwarded-For", "X-Request-ID"])
def test_connection_can_not_remove_what_the_proxy_says(name: str) -> None:
    made = dict(passed_on(("Connection", name), ("Content-Length", "4"), length=4))
    assert made == {**ADDED, "Content-Length": "4"}


@pytest.mark.parametrize("forward", [True, False])
def test_what_looks_like_a_field_of_the_proxy_never_passes(forward: bool) -> None:
    """To a server that turns names into variables, an underscore is a hyphen."""
    came = [
        ("X_Forwarded_For", "6.6.6.6"),
        ("X-Forwarded_For", "6.6.6.6"),
        ("x_forwarded-host", "evil"),
        ("X_FORWARDED_PROTO", "https"),
        ("X-Request_ID", "evil"),
        ("X_Request_Start", "t=6"),
        ("X_Kamal-Target", "evil:1"),
        ("Content_Length", "6"),
        ("Transfer_Encoding", "chunked"),
        ("Proxy_Authorization", "Basic x"),
        ("X_Own", "1"),
    ]
    assert dict(passed_on(*came, forward=forward)) == {**ADDED, "X_Own": "1"}


@pytest.mark.parametrize(
    ("forward", "came", "expected"),
    [
        (True, [("X-Forwarded-For", "1.1.1.1")], {"X-Forwarded-For": "1.1.1.1, 192.0.2.7"}),
        (
            True,
            [("X-Forwarded-For", "1.1.1.1, 2.2.2.2"), ("x-forwarded-for", "3.3.3.3")],
            {"X-Forwarded-For": "1.1.1.1, 2.2.2.2, 3.3.3.3, 192.0.2.7"},
        ),
        (True, [("X-Forwarded-For", "")], {}),
        (True, [("X-Forwarded-Proto", "https")], {"X-Forwarded-Proto": "https"}),
        (True, [("X-Forwarded-Host", "front")], {"X-Forwarded-Host": "front"}),
        (True, [("X-Kamal-Target", "a:1")], {"X-Kamal-Target": "a:1, web-1:3000"}),
        (
            True,
            [("X-Kamal-Target", "a:1, b:2"), ("X-A", ""), ("x-kamal-target", "c:3")],
            {"X-A": "", "X-Kamal-Target": "a:1, b:2, c:3, web-1:3000"},
        ),
        (
            False,
            [
                ("X-Forwarded-For", "1.1.1.1"),
                ("X-Forwarded-Proto", "https"),
                ("X-Forwarded-Host", "front"),
                ("X-Kamal-Target", "a:1"),
            ],
            {},
        ),
        (False, [("X-Request-Start", "t=5"), ("X-Request-ID", "x")], {"X-Request-Start": "t=5"}),
    ],
)
def test_forwarded_fields(forward: bool, came: Pairs, expected: dict[str, str]) -> None:
    made = passed_on(*came, forward=forward)
    assert len(dict(made)) == len(made), "no field twice"
    assert dict(made) == {**ADDED, **expected}


@pytest.mark.parametrize(
    ("length", "came", "framing"),
    [
        (0, [], {}),
        (0, [("Content-Length", "0")], {"Content-Length": "0"}),
        (7, [("Content-Length", "07")], {"Content-Length": "7"}),
        (CHUNKED, [("Transfer-Encoding", "Chunked")], {"Transfer-Encoding": "chunked"}),
    ],
)
def test_framing(length: int, came: Pairs, framing: dict[str, str]) -> None:
    assert dict(passed_on(*came, length=length)) == {**ADDED, **framing}


@pytest.mark.parametrize(
    ("method", "length", "framing"),
    [
        ("POST", 0, {"Content-Length": "0"}),
        ("PUT", 0, {"Content-Length": "0"}),
        ("PATCH", 0, {"Content-Length": "0"}),
        ("POST", 3, {"Content-Length": "3"}),
        ("POST", CHUNKED, {"Transfer-Encoding": "chunked"}),
        ("DELETE", 0, {}),
        ("OPTIONS", 0, {}),
        ("M-SEARCH", 0, {}),
    ],
)
def test_methods_that_are_expected_to_have_a_length(
    method: str, length: int, framing: dict[str, str]
) -> None:
    assert dict(passed_on(method=method, length=length)) == {**ADDED, **framing}


@pytest.mark.parametrize(
    ("came", "goes"),
    [
        ([("Server", "x"), ("Set-Cookie", "a"), ("Set-Cookie", "b"), ("Date", "d")], None),
        ([("Content-Length", "4"), ("Connection", "keep-alive"), ("Keep-Alive", "5")], 1),
        ([("Content-Length", "4"), ("Transfer-Encoding", "chunked")], 0),
        ([("Content-Length", "4"), ("Connection", "content-length, x-a"), ("X-A", "b")], 1),
        ([("X-Kept", "1"), ("Upgrade", "h2c"), ("Proxy-Authenticate", "x")], 1),
    ],
)
def test_responses(came: Pairs, goes: int | None) -> None:
    expected = [(name.encode(), value.encode()) for name, value in came[:goes]]
    assert response_headers(ResponseHead(200, b"OK", fields(came), 0)) == expected


@pytest.mark.parametrize("status", [101, 103, 204])
def test_responses_without_a_body_have_no_length(status: int) -> None:
    head = ResponseHead(status, b"", fields([("Content-Length", "4"), ("Link", "x")]), 0)
    assert response_headers(head) == [(b"Link", b"x")]


class Walked(list[Header]):
    """Header fields that may be gone through a few times, but not once for each of them."""

    walks = 0

    def __iter__(self) -> Iterator[Header]:
        self.walks += 1
        assert self.walks < 10
        return super().__iter__()


def test_thousands_of_connection_fields() -> None:
    count = 16_000
    named = [("Connection", f"x-{number}") for number in range(count)]
    came = [("X-Kept", "1"), *named, (f"X-{count - 1}", "2"), ("X-Kept", "3")]
    request = head(*came)
    request.headers = Walked(request.headers)
    made = request_headers(
        request,
        host=b"app.test:8080",
        client=b"192.0.2.7",
        scheme=b"http",
        forward=True,
        target=b"web-1:3000",
        request_id=b"id-1",
        new_start=lambda: b"t=1",
    )
    kept = [(b"X-Kept", b"1"), (b"X-Kept", b"3")]
    assert [pair for pair in made if pair[0].decode() not in ADDED] == kept

    response = ResponseHead(200, b"OK", Walked(fields(came)), 0)
    assert response_headers(response) == kept


@pytest.mark.parametrize(
    ("method", "target", "host", "expected"),
    [
        ("GET", "/a?b?c", "App.Test:80", ("App.Test:80", "app.test", "/a", "b?c", "/a")),
        ("GET", "/", "app.test.", ("app.test.", "app.test", "/", "", "/")),
        ("GET", "/", "", ("", "", "/", "", "/")),
        ("GET", "/", "[::1]:8080", ("[::1]:8080", "::1", "/", "", "/")),
        ("GET", "/%61%2fb%2F", "a", ("a", "a", "/%61%2fb%2F", "", "/a%2fb%2F")),
        ("GET", "/a%20b", "a", ("a", "a", "/a%20b", "", "/a b")),
        ("OPTIONS", "*", "a", ("a", "a", "*", "", "/")),
        ("GET", "http://B:81/c?d", "a", ("B:81", "b", "/c", "d", "/c")),
        ("GET", "HTTPS://b", "a", ("b", "b", "/", "", "/")),
        ("GET", "http://b?c", "a", ("b", "b", "/", "c", "/")),
        ("OPTIONS", "http://b", "a", ("b", "b", "*", "", "/")),
        ("GET", "/a#b?c#d", "a", ("a", "a", "/a%23b", "c%23d", "/a#b")),
    ],
)
def test_destinations(method: str, target: str, host: str, expected: tuple[str, ...]) -> None:
    found = Destination(head(("Host", host), method=method, target=target))
    assert expected == (
        found.host.decode(),
        found.name,
        found.path.decode(),
        found.query.decode(),
        found.route.decode(),
    )


@pytest.mark.parametrize(
    ("method", "target", "host", "status"),
    [
        ("CONNECT", "a:443", "a:443", 405),
        ("CONNECT", "/x", "a", 405),
        ("GET", "*", "a", 400),
        ("GET", "a/b", "a", 400),
        ("GET", "ftp://a/", "a", 400),
        ("GET", "http:///x", "a", 400),
        ("GET", "http://u@a/", "a", 400),
        ("GET", "/", "a b", 400),
        ("GET", "/", "a/b", 400),
        ("GET", "/", "u@a", 400),
        ("GET", "/", "a:b", 400),
        ("GET", "/", "[::1", 400),
        ("GET", "/%", "a", 400),
        ("GET", "/%2", "a", 400),
        ("GET", "/%zz", "a", 400),
    ],
)
def test_refused_destinations(method: str, target: str, host: str, status: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        Destination(head(("Host", host), method=method, target=target))
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("target", "prefix", "stripped"),
    [
        ("/api/x?y=%20", "/api", "/x?y=%20"),
        ("/api", "/api", "/"),
        ("/api?x", "/api", "/?x"),
        ("/api/", "/api", "/"),
        ("/api//x", "/api", "//x"),
        ("/%61pi/%78%2Fy?%61", "/api", "/%78%2Fy?%61"),
        ("/a%20b/c", "/a b", "/c"),
        ("/%c3%a9/x", "/é", "/x"),
        ("/a%2Fb/c", "/a%2Fb", "/c"),
    ],
)
def test_stripping_a_prefix(target: str, prefix: str, stripped: str) -> None:
    found = Destination(head(("Host", "a"), target=target))
    assert found.without_prefix(prefix.encode()) == stripped.encode()


ENCODED = st.lists(
    st.sampled_from(["/", "a", "b", "%61", "%2F", "%2f", "%25", "%20", "%C3%A9"]), max_size=8
).map("".join)


@pytest.mark.fuzz
@at_least(300)
@given(ENCODED, ENCODED)
def test_stripping_is_the_same_raw_and_decoded(front: str, rest: str) -> None:
    prefix = Destination(head(target="/" + front.strip("/"))).route
    found = Destination(head(target="/" + front.strip("/") + "/" + rest + "?q=%61"))
    path, _, query = found.without_prefix(prefix).partition(b"?")
    assert query == b"q=%61"
    again = Destination(RequestHead(b"GET", path, b"1.1", [], 0))
    assert again.route == found.route[len(prefix) :]
    assert found.path.endswith(path), "the raw bytes are kept"
    assert unquote_to_bytes(found.path).endswith(unquote_to_bytes(path))
