"""HTTP/1.1 syntax: messages whole, byte by byte, with more behind them; never laxer than h11."""

from __future__ import annotations

from typing import TYPE_CHECKING

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.codec import (
    CHUNKED,
    UNTIL_CLOSE,
    ClientCodec,
    ProtocolError,
    RequestHead,
    ServerCodec,
)
from tests.fuzzing import at_least

if TYPE_CHECKING:
    from collections.abc import Iterable

HOST = b"Host: a\r\n"
LIMIT = 4096


def pieces(data: bytes, size: int) -> Iterable[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


def receive(codec: ServerCodec, data: bytes, size: int) -> tuple[RequestHead | None, bytes]:
    """Feed a message in pieces; return its head and body."""
    head, body = None, b""
    for piece in pieces(data, size):
        if head is None:
            codec.receive_head_data(piece)
            head = codec.next_request()
        else:
            codec.receive_data(piece)
        while head is not None and (part := codec.next_body()) is not None:
            body += part
    return head, body


SIZES = pytest.mark.parametrize("size", [1, 2, 7, 10_000])


@SIZES
@pytest.mark.parametrize("more", [b"", b"GET /next HTTP/1.1\r\nHost: b\r\n\r\n"])
@pytest.mark.parametrize(
    ("data", "length", "body", "trailers"),
    [
        (b"GET /x?y HTTP/1.1\r\n" + HOST + b"\r\n", 0, b"", []),
        (b"\r\n\r\nGET /x?y HTTP/1.1\r\n" + HOST + b"\r\n", 0, b"", []),
        (b"PUT /x?y HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n", 0, b"", []),
        (b"PUT /x?y HTTP/1.1\r\n" + HOST + b"content-LENGTH: 4\r\n\r\nbody", 4, b"body", []),
        (
            b"PUT /x?y HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: Chunked\r\n\r\n2\r\nbo\r\n2;x=y\r\ndy\r\n0\r\n\r\n",
            CHUNKED,
            b"body",
            [],
        ),
        (
            b"PUT /x?y HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nX-Sum: 1\r\nHost: evil\r\n"
            + b"Content-Length: 3\r\nX-Forwarded-For: 1.2.3.4\r\nAuthorization: x\r\n"
            + b"X-Kamal-Target: a:1\r\nX-Request-ID: x\r\nX-Request-Start: t=1\r\n"
            + b"X_Forwarded-For: 1.2.3.4\r\nx-request_id: x\r\nX_Kamal_Target: a:1\r\n\r\n",
            CHUNKED,
            b"body",
            [(b"X-Sum", b"1")],
        ),
    ],
)
def test_requests(
    data: bytes, length: int, body: bytes, trailers: list[object], more: bytes, size: int
) -> None:
    codec = ServerCodec(LIMIT)
    head, got = receive(codec, data + more, size)
    assert head is not None
    assert (head.target, head.version, head.length) == (b"/x?y", b"1.1", length)
    assert head.get(b"host") == b"a"
    assert (got, codec.received, codec.trailers) == (body, True, trailers)
    codec.response(204, b"", [])
    codec.end()
    assert codec.next_cycle()
    following = codec.next_request()
    assert (following.target if following else b"") == (b"/next" if more else b"")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\rc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\0c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b": b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET / x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /\r\n" + HOST + b"\r\n", 400),
        (b" GET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
        (b"GET / HTTP/0.9\r\n" + HOST + b"\r\n", 505),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: +1\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 0x1\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 3000 + b"\r\n\r\n", 400),
        (
            b"PUT / HTTP/1.1\r\n"
            + HOST
            + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (b"PUT / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (
            b"PUT / HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            501,
        ),
        (b"PUT / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /" + b"x" * LIMIT + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * LIMIT, 431),
    ],
)
@SIZES
def test_refused_heads(head: bytes, status: int, size: int) -> None:
    codec = ServerCodec(LIMIT)
    with pytest.raises(ProtocolError) as caught:
        receive(codec, head, size)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"1\r\nxy\r\n",
        b" 1\r\nx\r\n",
        b"1" * 30 + b"\r\n",
        b"\r\n",
    ],
)
@SIZES
def test_refused_chunks(body: bytes, size: int) -> None:
    codec = ServerCodec(LIMIT)
    with pytest.raises(ProtocolError):
        receive(
            codec,
            b"PUT / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + body,
            size,
        )


@pytest.mark.parametrize(
    "body",
    [b"0\r\n\n", b"0\r\nX: a\n\n", b"5\r\nhelloXX0\r\n\r\n", b"5;a\nb\r\nhello\r\n0\r\n\r\n"],
)
@pytest.mark.parametrize("together", [True, False])
def test_malformed_chunks_never_become_a_message(body: bytes, together: bool) -> None:
    """Whoever asks again, to see whether the connection can go on, hears the same."""
    codec = ServerCodec(LIMIT)
    more = b"\r\n\r\nGET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
    head = b"PUT / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    codec.receive_head_data(head + body + more if together else head)
    assert codec.next_request() is not None
    if not together:
        with pytest.raises(ProtocolError):
            codec.receive_data(body + more)
    for _ in range(3):
        with pytest.raises(ProtocolError):
            codec.take_body()
    assert not codec.received


def test_a_body_that_ends_early() -> None:
    codec = ServerCodec(LIMIT)
    receive(codec, b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\nab", 1000)
    codec.receive_data(b"")
    with pytest.raises(ProtocolError):
        codec.next_body()


def test_partial_heads() -> None:
    codec = ServerCodec(LIMIT)
    assert codec.next_request() is None
    codec.receive_head_data(b"\r\n")
    assert (codec.next_request(), codec.has_partial_head) == (None, False)
    codec.receive_head_data(b"GET")
    assert (codec.next_request(), codec.has_partial_head) == (None, True)
    codec.receive_head_data(b" / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert codec.next_request() is not None
    assert not codec.has_partial_head


def test_a_connection_in_the_middle_of_a_message_can_not_go_on() -> None:
    codec = ServerCodec(LIMIT)
    receive(codec, b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\nab", 1000)
    codec.response(204, b"", [])
    codec.end()
    assert not codec.next_cycle()


@pytest.mark.parametrize(
    ("head", "usable"),
    [
        (b"GET / HTTP/1.1\r\n" + HOST + b"\r\n", True),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
    ],
)
def test_what_a_client_asks_of_the_connection(head: bytes, usable: bool) -> None:
    codec = ServerCodec(LIMIT)
    receive(codec, head, 1000)
    written = codec.response(200, b"OK", [(b"Content-Length", b"0")])
    assert (b"connection: close" in written.lower()) is not usable
    codec.end()
    assert codec.next_cycle() is usable


def test_an_old_client_gets_neither_interim_responses_nor_chunks() -> None:
    codec = ServerCodec(LIMIT)
    receive(codec, b"GET / HTTP/1.0\r\n\r\n", 1000)
    peer = ClientCodec(LIMIT)
    peer.request(b"GET", b"/", [(b"Host", b"a")])
    peer.receive_data(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
    hints = peer.next_response()
    assert hints is not None
    assert codec.informational(hints.status, hints.reason, []) == b""
    written = codec.response(200, b"OK", []) + codec.body(b"x") + codec.end([(b"A", b"b")])
    assert written.partition(b"\r\n\r\n")[2] == b"x"
    assert b"transfer-encoding" not in written.lower()


def test_what_can_not_be_written_is_a_protocol_error() -> None:
    bad = [(b"Location", b"a\r\nSet-Cookie: b")]
    codec = ServerCodec(LIMIT)
    receive(codec, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n", 1000)
    with pytest.raises(ProtocolError):
        codec.informational(103, b"", bad)
    with pytest.raises(ProtocolError):
        codec.response(301, b"Moved Permanently", bad)
    codec.response(200, b"OK", [])
    with pytest.raises(ProtocolError):
        codec.end(bad)
    with pytest.raises(ProtocolError):
        ClientCodec(LIMIT).request(b"GET", b"/", [(b"Host", b"a\r\nb")])


def test_trailers_are_sent() -> None:
    codec = ServerCodec(LIMIT)
    receive(codec, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n", 1000)
    written = codec.response(200, b"OK", []) + codec.body(b"x") + codec.end([(b"A", b"b")])
    assert written.endswith(b"\r\n\r\n1\r\nx\r\n0\r\nA: b\r\n\r\n")


# The side of the target


@pytest.mark.parametrize(
    ("framing", "end"),
    [
        ((b"Transfer-Encoding", b"chunked"), b"1\r\nx\r\n0\r\nA: b\r\n\r\n"),
        ((b"content-length", b"1"), b"x"),
    ],
)
def test_trailers_of_a_request(framing: tuple[bytes, bytes], end: bytes) -> None:
    """A body of a length has none, which a client of HTTP/2 may not care about."""
    codec = ClientCodec(LIMIT)
    codec.request(b"POST", b"/", [(b"Host", b"a"), framing])
    assert codec.body(b"x") + codec.end([(b"A", b"b")]) == end


RESPONSES = [
    (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", 200, 4, b"body", True),
    (b"GET", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", 200, 0, b"", True),
    (b"GET", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, 0, b"", True),
    (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", 200, 4, b"", True),
    (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\n", 304, 4, b"", True),
    (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, UNTIL_CLOSE, b"", True),
    (
        b"GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        200,
        CHUNKED,
        b"body",
        True,
    ),
    (
        b"GET",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody",
        200,
        4,
        b"body",
        False,
    ),
    (b"GET", b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody", 200, 4, b"body", False),
    (
        b"GET",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 \r\nLink: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        200,
        4,
        b"body",
        True,
    ),
]


@SIZES
@pytest.mark.parametrize(("method", "data", "status", "length", "body", "usable"), RESPONSES)
def test_responses(
    method: bytes, data: bytes, status: int, length: int, body: bytes, usable: bool, size: int
) -> None:
    codec = ClientCodec(LIMIT)
    assert codec.request(method, b"/x", [(b"Host", b"a")]).startswith(method + b" /x HTTP/1.1\r\n")
    codec.end()
    head, got, interim = None, b"", 0
    for piece in pieces(data, size):
        codec.receive_data(piece)
        while head is None and (found := codec.next_response()) is not None:
            interim += found.status < 200
            head = found if found.status >= 200 else None
        while head is not None and (part := codec.next_body()) is not None:
            got += part
    assert head is not None
    assert (head.status, head.length, got, codec.received) == (status, length, body, True)
    assert interim == data.count(b"HTTP/1.1 10")
    assert codec.next_cycle() is usable


def test_a_response_until_close() -> None:
    codec = ClientCodec(LIMIT)
    codec.request(b"GET", b"/", [(b"Host", b"a")])
    codec.end()
    codec.receive_data(b"HTTP/1.1 200 OK\r\n\r\nsome")
    head = codec.next_response()
    assert head is not None
    assert head.length == UNTIL_CLOSE
    assert codec.next_body() == b"some"
    assert (codec.next_body(), codec.received) == (None, False)
    codec.receive_data(b"")
    assert (codec.next_body(), codec.received) == (None, True)
    assert not codec.next_cycle()


def test_a_tunnel_is_no_body() -> None:
    """After an answer to CONNECT the parser waits for ever; nobody may wait for it."""
    codec = ClientCodec(LIMIT)
    codec.request(b"CONNECT", b"/x", [(b"Host", b"a")])
    codec.end()
    codec.receive_data(b"HTTP/1.1 200 OK\r\n\r\nhello")
    assert codec.next_response() is not None
    with pytest.raises(ProtocolError):
        codec.next_body()


def test_a_target_that_says_more_than_it_was_asked() -> None:
    codec = ClientCodec(LIMIT)
    codec.request(b"GET", b"/", [(b"Host", b"a")])
    codec.end()
    codec.receive_data(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert codec.next_response() is not None
    assert codec.next_body() is None
    assert codec.received
    assert not codec.next_cycle()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 99 x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2 * LIMIT,
    ],
)
def test_refused_responses(data: bytes) -> None:
    codec = ClientCodec(LIMIT)
    codec.request(b"GET", b"/", [(b"Host", b"a")])
    codec.end()
    codec.receive_data(data)
    with pytest.raises(ProtocolError):
        codec.next_response()


# Any bytes

WORDS = st.sampled_from(
    [
        *[b"GET / HTTP/1.1\r\n", b"PUT /x HTTP/1.0\r\n", HOST, b"\r\n", b"\n", b"\r", b" ", b"\t"],
        *[b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b":"],
        *[b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 103 x\r\n", b"Connection: close\r\n", b"abc"],
        *[b"0\r\n\r\n", b"X: y\r\n"],
    ]
)
MESSAGES = st.lists(st.one_of(WORDS, WORDS, st.binary(max_size=3)), max_size=12).map(b"".join)


@pytest.mark.fuzz
@at_least(300)
@given(MESSAGES, st.integers(1, 40))
def test_a_client_can_only_cause_protocol_errors(data: bytes, size: int) -> None:
    codec = ServerCodec(LIMIT)
    status = 0
    try:
        receive(codec, data, size)
        if codec.next_request() is not None:
            codec.receive_data(b"")
            codec.next_body()
    except ProtocolError as error:
        status = error.status
    assert status in (0, 400, 431, 501, 505)


@pytest.mark.fuzz
@at_least(300)
@given(MESSAGES, st.integers(1, 40))
def test_a_target_can_only_cause_protocol_errors(data: bytes, size: int) -> None:
    codec = ClientCodec(LIMIT)
    codec.request(b"GET", b"/", [(b"Host", b"a")])
    codec.end()
    head = None
    try:
        for piece in [*pieces(data, size), b""]:
            codec.receive_data(piece)
            if head is None or head.status < 200:
                head = codec.next_response() or head
            elif not codec.received:
                codec.next_body()
    except ProtocolError:
        return


@pytest.mark.fuzz
@at_least(300)
@given(MESSAGES)
def test_is_never_laxer_than_h11(data: bytes) -> None:
    """But for empty lines before a request, and a target in plain UTF-8, which it encodes."""
    codec = ServerCodec(LIMIT)
    codec.receive_head_data(data)
    try:
        head = codec.next_request()
    except ProtocolError:
        return
    if head is None:
        return
    while data.startswith(b"\r\n"):
        data = data[2:]
    method, _, rest = data.partition(b" ")
    target, _, rest = rest.partition(b" ")
    encoded = b"".join(b"%c" % byte if byte < 128 else b"%%%02X" % byte for byte in target)
    parser = h11.Connection(h11.SERVER, LIMIT)
    parser.receive_data(method + b" " + encoded + b" " + rest)
    request = parser.next_event()
    assert isinstance(request, h11.Request)
    assert (head.method, head.target, head.version) == (
        request.method,
        request.target,
        request.http_version,
    )
    assert [(name, value) for name, _, value in head.headers] == list(request.headers)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "closed without a response"),
        (b"HTTP/1.1 200 OK\r\nContent-", "closed in the middle of a response"),
        (b"nonsense\r\n\r\n", "illegal status line"),
    ],
)
def test_a_target_that_closes_is_described_in_words(said: bytes, reason: str) -> None:
    codec = ClientCodec(LIMIT)
    codec.request(b"GET", b"/", [(b"Host", b"a")])
    codec.end()
    codec.receive_data(said or b"")
    if said and not said.startswith(b"nonsense"):
        assert codec.next_response() is None
        codec.receive_data(b"")
    with pytest.raises(ProtocolError, match=reason):
        codec.next_response()
