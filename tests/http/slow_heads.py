"""What becomes of a head on the path of h11: what the scanner of ordinary heads must agree with.

``compare_request`` and ``compare_response`` give a head to both. They fail if the scanner took what
h11 refuses, or read or wrote anything otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kamal_proxy._fastpath import rewrite_request, rewrite_response
from kamal_proxy.http.codec import CHUNKED, ClientCodec, ServerCodec
from kamal_proxy.http.headers import Destination, request_headers, response_headers

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs, RequestHead

# How long heads may be is asked after the scan.
LIMIT = 1 << 20
# So much of a body is read to see what becomes of the connection after it.
SMALL = 4096
ALT_SVC = (b"Alt-Svc", b'h3=":443"; ma=86400')


class Given(NamedTuple):
    """What the writer of a request is told, or of a response.

    Attributes:
        believed: Whether the request's X-Forwarded-* fields are believed.
        prefix: Bytes of the decoded path that the target does not see, as far as there are any.
        closes: Whether the client has asked for the end of the connection.
        added: Fields that the response gets.
    """

    believed: bool = False
    prefix: int = 0
    closes: bool = False
    added: tuple[tuple[bytes, bytes], ...] = ()


NOTHING = Given()
CLIENT, SCHEME, TARGET = b"192.0.2.7", b"https", b"web-1:3000"
REQUEST_ID, START = b"id-1", 1_720_000_000_000


def ordinary_request(
    data: bytes, given: Given = NOTHING, stripped: int = 0
) -> tuple[bytes, int, int, bool] | None:
    """Return what the scanner makes of a request."""
    return rewrite_request(
        data,
        client=CLIENT,
        scheme=SCHEME,
        target=TARGET,
        request_id=REQUEST_ID,
        start=START,
        believed=given.believed,
        stripped=stripped,
    )


def compare_request(data: bytes, given: Given = NOTHING) -> bool:
    """Return whether a request is ordinary; if so, h11 must agree with all that is said of it."""
    if ordinary_request(data, given) is None:
        return False
    head, size = _request_head(data)
    destination = Destination(head)
    prefix = destination.route[: given.prefix]
    path = destination.without_prefix(prefix) if prefix else destination.raw
    headers = request_headers(
        head,
        host=destination.host,
        client=CLIENT,
        scheme=SCHEME,
        target=TARGET,
        request_id=head.get(b"x-request-id") or REQUEST_ID,
        new_start=lambda: b"t=%d" % START,
        forward=given.believed,
    )
    written = ClientCodec(LIMIT).request(head.method, path, headers)
    expected = written, size, head.length, _request_closes(data[:size], head)
    assert ordinary_request(data, given, _stripped(destination, path)) == expected
    return True


def _request_head(data: bytes) -> tuple[RequestHead, int]:
    """Return the head and how many bytes it takes."""
    codec = ServerCodec(LIMIT)
    codec.receive_head_data(data)
    head = codec.next_request()
    assert head is not None
    return head, len(data) - len(codec.switched())


def _stripped(destination: Destination, path: bytes) -> int:
    """Return how many bytes of the raw path are gone."""
    kept = path[: len(path) - (len(destination.raw) - len(destination.path))]
    # A slash may also stand for nothing that was left.
    gone = len(destination.path) - len(kept)
    return gone if destination.path.endswith(kept) else len(destination.path)


def _request_closes(head_data: bytes, head: RequestHead) -> bool:
    """Return whether the connection ends after the request, as all of h11 sees it."""
    codec = ServerCodec(LIMIT)
    codec.receive_head_data(head_data)
    codec.next_request()
    is_small = head.length <= SMALL
    if is_small:
        _feed(codec, head.length)
    closes = b"\r\nConnection: close\r\n" in codec.response(204, b"", [])
    if is_small:
        codec.end()
        assert codec.next_cycle() is not closes
    return closes


def _feed(codec: ServerCodec | ClientCodec, length: int) -> None:
    """Let a body of a length arrive, which must be all of the message."""
    if body := b"3\r\nabc\r\n0\r\n\r\n" if length == CHUNKED else bytes(length):
        assert not codec.received
        codec.receive_data(body)
    assert len(codec.take_body()) == (3 if length == CHUNKED else length)
    assert codec.received


def compare_response(data: bytes, method: bytes, given: Given = NOTHING) -> bool:
    """Return whether a response is ordinary; if so, h11 must agree with all that is said of it."""
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in given.added)
    ordinary = rewrite_response(data, method, added=lines, closes=given.closes)
    if ordinary is None:
        return False
    codec = _asking(method)
    codec.receive_data(data)
    head = codec.next_response()
    assert head is not None
    size = len(data) - len(codec.switched())
    headers: HeaderPairs = [*response_headers(head), *given.added]
    written = _answering(method, given.closes).response(head.status, head.reason, headers)
    codec = _asking(method)
    codec.receive_data(data[:size])
    codec.next_response()
    codec.take_body()
    length = 0 if codec.received else head.length
    closes = ordinary[4]
    if length <= SMALL:
        _feed(codec, length)
        closes = not codec.next_cycle()
    assert ordinary == (written, size, head.status, length, closes)
    return True


def _asking(method: bytes) -> ClientCodec:
    """Return a codec that has sent a whole request."""
    codec = ClientCodec(LIMIT)
    codec.request(method, b"/", [(b"Host", b"a")])
    codec.end()
    return codec


def _answering(method: bytes, closes: bool) -> ServerCodec:
    """Return a codec that has received a whole request."""
    codec = ServerCodec(LIMIT)
    codec.receive_head_data(
        method + b" / HTTP/1.1\r\nHost: a\r\n" + b"Connection: close\r\n" * closes + b"\r\n"
    )
    codec.next_request()
    codec.take_body()
    return codec
