"""What of the fields on a stream becomes a request, and what is refused before anybody reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.codec import CHUNKED, ClientCodec, ProtocolError, RequestHead, ServerCodec
from kamal_proxy.http.headers import Destination
from kamal_proxy.http.stream_heads import (
    FIELD_OVERHEAD,
    MalformedError,
    plain_fields,
    request_head_untrusted,
    response_fields,
    trailers_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

GET = {":method": "GET", ":scheme": "https", ":authority": "a.test", ":path": "/"}
CONNECT = {**GET, ":method": "CONNECT", ":protocol": "websocket"}

Fields = list[tuple[bytes, bytes]]


def fields(pseudo: Mapping[str, str | None], *more: tuple[str, str]) -> Fields:
    pairs = [(name, value) for name, value in pseudo.items() if value is not None]
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*pairs, *more)]


def parse(
    given: Fields, *, ended: bool = True, max_size: int = 65536, max_fields: int = 200
) -> RequestHead:
    return request_head_untrusted(
        given,
        version=b"2.0",
        ended=ended,
        max_size=max_size,
        max_fields=max_fields,
        websocket_key=b"KEY",
    )


def with_(*more: tuple[str, str], **pseudo: str | None) -> Fields:
    """Return the fields of a GET request, changed: ``_path`` is ``:path``."""
    changed = {name.replace("_", ":"): value for name, value in pseudo.items()}
    return fields({**GET, **changed}, *more)


def test_a_request() -> None:
    head = parse(with_(("accept", "*/*"), ("x-a", ""), _path="/a?b"))
    assert (head.method, head.target, head.version, head.length) == (b"GET", b"/a?b", b"2.0", 0)
    assert head.headers == [
        (b"host", b"host", b"a.test"),
        (b"accept", b"accept", b"*/*"),
        (b"x-a", b"x-a", b""),
    ]
    assert head.protocol == b""


def test_the_length_of_the_body() -> None:
    length = with_(("content-length", "12"))
    assert parse(length, ended=False).length == 12
    assert parse(with_(), ended=False).length == CHUNKED
    assert parse(with_(), ended=True).length == 0
    assert parse(with_(("content-length", "0")), ended=True).length == 0


def test_crumbs_of_a_cookie_are_joined() -> None:
    head = parse(with_(("cookie", "a=1"), ("x", "y"), ("cookie", "b=2"), ("cookie", "c=3")))
    assert head.get(b"cookie") == b"a=1; b=2; c=3"
    assert len([each for each in head.headers if each[0] == b"cookie"]) == 1


def test_host_stands_in_for_the_authority() -> None:
    assert parse(with_(("host", "b.test"), _authority=None)).get(b"host") == b"b.test"
    assert parse(with_(("host", "A.test"))).get(b"host") == b"a.test"


@pytest.mark.parametrize("path", ["/", "/a//b", "/%2e%2e/", "/?", "/a#b", "/\\", "/a?b=/../"])
def test_paths_that_pass(path: str) -> None:
    assert parse(with_(_path=path)).target == path.encode()


def test_text_in_a_path_is_encoded() -> None:
    given = [(n, "/süß".encode() if n == b":path" else v) for n, v in with_()]
    assert parse(given).target == b"/s%C3%BC%C3%9F"


def test_the_target_of_options() -> None:
    assert parse(with_(_method="OPTIONS", _path="*")).target == b"*"
    with pytest.raises(MalformedError):
        parse(with_(_path="*"))


@pytest.mark.parametrize(
    "given",
    [
        # Pseudo-header fields (RFC 9113 8.3)
        with_(_method=None),
        with_(_method=""),
        with_(_method="GE T"),
        with_(_method="GET\r\nX: y"),
        with_(_scheme=None),
        with_(_scheme="ftp"),
        with_(_path=None),
        with_(_path=""),
        with_(_path="a"),
        with_(_path="http://b.test/"),
        with_(_path="//b.test/ HTTP/1.1"),
        with_(_path="/a b"),
        with_(_path="/a\tb"),
        with_(_path="/a\r\nX: y"),
        with_(_path="/a\x00"),
        with_(_path="/\x7f"),
        with_(_authority=None),
        with_(_authority=""),
        with_(("host", ""), _authority=None),
        with_(("host", "b.test")),
        with_(("host", "a.test"), ("host", "a.test")),
        with_(_protocol="websocket"),
        fields(GET, (":method", "GET")),
        fields(GET, ("x", "y"), (":path", "/")),
        fields({**GET, ":path": None}, ("x", "y"), (":path", "/")),
        fields({":method": "GET"}, ("cookie", "a=1"), (":scheme", "https"), (":path", "/")),
        fields({**GET, ":status": "200"}),
        fields({**GET, ":unknown": "x"}),
        fields({**GET, ":": "x"}),
        fields({**GET, ":Path": "/"}),
        # Names
        with_(("", "x")),
        with_(("X-Upper", "x")),
        with_(("x y", "x")),
        with_(("x:y", "x")),
        with_(("x\r\ny", "x")),
        with_(("x\x00", "x")),
        with_(("x\xe4", "x")),
        # Values
        with_(("x", "a\r\nb: c")),
        with_(("x", "a\nb")),
        with_(("x", "a\rb")),
        with_(("x", "a\x00b")),
        with_(("x", "a\x1fb")),
        with_(("x", "a\x7fb")),
        with_(("x", " a")),
        with_(("x", "a\t")),
        with_(("x", " ")),
        with_(("cookie", "a=1\r\n")),
        with_(("host", "a.test\r\nx: y"), _authority=None),
        # Fields that belong to a connection (RFC 9113 8.2.2)
        with_(("connection", "close")),
        with_(("connection", "upgrade"), ("upgrade", "websocket")),
        with_(("keep-alive", "x")),
        with_(("proxy-connection", "x")),
        with_(("transfer-encoding", "chunked")),
        with_(("upgrade", "h2c")),
        with_(("te", "gzip")),
        with_(("te", "trailers, gzip")),
        # Lengths
        with_(("content-length", "5")),
        with_(("content-length", "0"), ("content-length", "0")),
        with_(("content-length", "+0")),
        with_(("content-length", "0x0")),
        with_(("content-length", "")),
        with_(("content-length", "0, 0")),
        with_(("content-length", "-1")),
        with_(("content-length", "9" * 19)),
        # CONNECT
        with_(_method="CONNECT"),
        fields({**CONNECT, ":path": None}),
        fields({**CONNECT, ":scheme": None}),
        fields(CONNECT),  # it ends with its head
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_malformed(given: Fields) -> None:
    with pytest.raises(MalformedError):
        parse(given)


def test_connect_is_answered() -> None:
    head = parse(fields({":method": "CONNECT", ":authority": "a.test:443"}), ended=False)
    with pytest.raises(ProtocolError, match="CONNECT") as refused:
        Destination(head)
    assert refused.value.status == 405


def test_a_websocket() -> None:
    given = fields(
        CONNECT,
        ("sec-websocket-key", "x"),
        ("sec-websocket-version", "13"),
        ("content-length", "1"),
    )
    head = parse(given, ended=False)
    assert (head.method, head.protocol, head.length) == (b"GET", b"websocket", 0)
    assert head.headers == [
        (b"host", b"host", b"a.test"),
        (b"sec-websocket-version", b"sec-websocket-version", b"13"),
        (b"sec-websocket-key", b"sec-websocket-key", b"KEY"),
    ]


def test_other_protocols_are_answered() -> None:
    with pytest.raises(ProtocolError) as refused:
        parse(fields({**CONNECT, ":protocol": "connect-udp"}), ended=False)
    assert refused.value.status == 501


def test_limits() -> None:
    size = sum(len(name) + len(value) + FIELD_OVERHEAD for name, value in with_())
    assert parse(with_(), max_size=size).target == b"/"
    cases: list[tuple[Fields, dict[str, Any]]] = [
        (with_(), {"max_size": size - 1}),
        (with_(("a", ""), ("b", ""), ("c", "")), {"max_fields": 2}),
        (with_(("cookie", "a"), ("cookie", "b"), ("cookie", "c")), {"max_fields": 2}),
    ]
    for fields_, limits in cases:
        with pytest.raises(ProtocolError) as refused:
            parse(fields_, **limits)
        assert refused.value.status == 431


def test_trailers() -> None:
    given = fields({}, ("a", "1"), ("content-length", "5"), ("host", "x"), ("x-forwarded-for", "1"))
    assert trailers_untrusted(given, max_size=1000, max_fields=9) == [(b"a", b"1")]
    for bad in (
        fields({":path": "/"}),
        fields({}, ("A", "1")),
        fields({}, ("a", "1\r\n")),
        fields({}, ("transfer-encoding", "chunked")),
    ):
        with pytest.raises(MalformedError):
            trailers_untrusted(bad, max_size=1000, max_fields=9)
    with pytest.raises(MalformedError):
        trailers_untrusted(given, max_size=100, max_fields=9)
    with pytest.raises(MalformedError):
        trailers_untrusted(given, max_size=1000, max_fields=3)


def test_responses() -> None:
    headers = [(b"Content-Type", b"a"), (b"Connection", b"close"), (b"Upgrade", b"x")]
    assert response_fields(200, headers) == [(b":status", b"200"), (b"content-type", b"a")]
    assert plain_fields([(b"Grpc-Status", b"0")]) == [(b"grpc-status", b"0")]


NAMES = st.sampled_from(
    [
        *(*GET, ":protocol", ":status", "host", "cookie", "te", "x", "X", "x_y", "upgrade"),
        *("content-length", "transfer_encoding", ""),
    ]
)
VALUES = st.sampled_from(
    [
        *("GET", "CONNECT", "https", "a.test", "/", "*", "websocket", "0", "7", "trailers"),
        *("x\r\ny", "\x00", " x", ""),
    ]
)
ANY = st.tuples(
    NAMES.map(str.encode) | st.binary(max_size=5), VALUES.map(str.encode) | st.binary(max_size=9)
)


@pytest.mark.fuzz
@given(st.lists(ANY, max_size=9), st.booleans(), st.booleans())
def test_what_passes_is_one_request_to_http_1(given: Fields, ended: bool, complete: bool) -> None:
    """Whatever comes, a head that is accepted says to the target exactly what was read."""
    try:
        head = parse((with_() if complete else []) + given, ended=ended)
        Destination(head)
    except (MalformedError, ProtocolError):
        return
    framing = [(b"Content-Length", b"%d" % head.length)] if head.length > 0 else []
    headers = [(raw, value) for name, raw, value in head.headers if name != b"content-length"]
    try:
        written = ClientCodec(65536).request(head.method, head.target, headers + framing)
    except ProtocolError:
        return  # what h11 does not write, no target reads
    server = ServerCodec(1_000_000)
    server.receive_head_data(written)
    read = server.next_request()
    assert read is not None
    assert (read.method, read.target) == (head.method, head.target)
    assert [(name, value) for name, _, value in read.headers] == [
        (name.lower(), value) for name, value in headers + framing
    ]
    assert not server.has_partial_head
