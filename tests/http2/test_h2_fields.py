"""Fields of requests to HTTP/2 targets and of their responses."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.codec import CHUNKED, HeaderPairs, ProtocolError
from kamal_proxy.http.h2_fields import (
    request_fields,
    response_head,
    switching_head,
    trailers,
)
from kamal_proxy.http.websocket import accept_of
from tests.fuzzing import at_least


def test_a_request() -> None:
    fields = request_fields(
        b"POST",
        b"/a?b",
        [
            (b"Host", b"app.example"),
            (b"X-Two", b"1"),
            (b"x-two", b"2"),
            (b"Cookie", b"a=b"),
            (b"Connection", b"Upgrade"),
            (b"Upgrade", b"x"),
            (b"Keep-Alive", b"1"),
            (b"Proxy-Connection", b"x"),
            (b"Transfer-Encoding", b"chunked"),
            (b"TE", b"trailers"),
            (b"Content-Length", b"4"),
        ],
    )
    assert fields == [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":authority", b"app.example"),
        (b":path", b"/a?b"),
        (b"x-two", b"1"),
        (b"x-two", b"2"),
        (b"cookie", b"a=b"),
        (b"te", b"trailers"),
        (b"content-length", b"4"),
    ]
    never = [field[0] for field in fields if isinstance(field, NeverIndexedHeaderTuple)]
    assert never == [b"cookie", b"content-length"]


def test_fields_of_their_own_in_each_request_leave_the_table_alone() -> None:
    encoder, decoder = Encoder(), Decoder()
    sizes = []
    for number in range(3):
        headers = [
            (b"Host", b"app.example"),
            (b"X-Always", b"the same, and quite long"),
            (b"X-Request-ID", b"%032d" % number),
        ]
        encoded = encoder.encode(request_fields(b"GET", b"/", headers))
        sizes.append(len(encoded))
        assert dict(decoder.decode(encoded, raw=True))[b"x-request-id"] == b"%032d" % number
    assert sizes[0] > sizes[1] == sizes[2]


def test_a_websocket() -> None:
    headers = [
        (b"Host", b"a"),
        (b"Connection", b"Upgrade"),
        (b"Upgrade", b"websocket"),
        (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
        (b"Sec-WebSocket-Version", b"13"),
    ]
    assert request_fields(b"GET", b"/ws", headers, b"websocket") == [
        (b":method", b"CONNECT"),
        (b":scheme", b"http"),
        (b":authority", b"a"),
        (b":path", b"/ws"),
        (b":protocol", b"websocket"),
        (b"sec-websocket-version", b"13"),
    ]
    accept = accept_of(dict(headers)[b"Sec-WebSocket-Key"])
    assert accept == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3
    fields = [(b":status", b"200"), (b"sec-websocket-protocol", b"chat"), (b"upgrade-x", b"1")]
    head = switching_head(response_head(fields, ended=False), accept)
    assert (head.status, head.get(b"upgrade"), head.get(b"sec-websocket-accept")) == (
        101,
        b"websocket",
        accept,
    )
    assert head.get(b"sec-websocket-protocol") == b"chat"


@pytest.mark.parametrize(
    ("fields", "ended", "status", "length"),
    [
        ([(b":status", b"200"), (b"content-length", b"12")], False, 200, 12),
        ([(b":status", b"200")], False, 200, CHUNKED),
        ([(b":status", b"200"), (b"content-length", b"12")], True, 200, 0),
        ([(b":status", b"204")], True, 204, 0),
        ([(b":status", b"103")], False, 103, CHUNKED),
    ],
)
def test_a_response(fields: HeaderPairs, ended: bool, status: int, length: int) -> None:
    head = response_head(fields, ended=ended)
    assert (head.status, head.length) == (status, length)
    assert [(name, value) for name, _, value in head.headers] == fields[1:]


def test_trailers_that_may_pass() -> None:
    fields = [(b"grpc-status", b"0"), (b"content-length", b"1"), (b"x-forwarded-for", b"1")]
    assert trailers(fields) == [(b"grpc-status", b"0")]
    with pytest.raises(ProtocolError, match="malformed field name b':status'"):
        trailers([(b":status", b"200")])


BYTES = st.binary(max_size=5) | st.sampled_from([b":status", b"200", b"content-length", b"te"])


@pytest.mark.fuzz
@at_least(500)
@given(st.lists(st.tuples(BYTES, BYTES)), st.booleans())
def test_any_fields(fields: HeaderPairs, ended: bool) -> None:
    """A head that is let through can be written in HTTP/1.1 without ending early."""
    try:
        head = response_head([(b":status", b"200"), *fields], ended=ended)
    except ProtocolError:
        return
    for name, raw, value in head.headers:
        assert name == raw
        assert name
        assert not set(name) & set(b" :\r\n\0\t")
        assert not set(value) & set(b"\r\n\0")
