"""What becomes of header fields on their way through, and where a request wants to go. Pure.

RFC 9110 7.6 says what an intermediary must drop; ``docs/http.md`` lists what the proxy adds.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from kamal_proxy.http.codec import (
    CHUNKED,
    Header,
    HeaderPairs,
    ProtocolError,
    RequestHead,
    ResponseHead,
)
from kamal_proxy.http.forwarded import believable_untrusted, element, parse_untrusted
from kamal_proxy.matching import decoded_path

if TYPE_CHECKING:
    from collections.abc import Callable

# RFC 9110 7.6.1, and the two that only concern the proxy itself.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# A client must not remove these by naming them in Connection.
_NEVER_DROPPED = frozenset({b"host", b"content-length", b"transfer-encoding"})
# Set anew, or joined with what came in.
_REWRITTEN = frozenset(
    {
        b"forwarded",
        b"host",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-kamal-target",
        b"x-request-id",
        b"x-request-start",
    }
)
# With an underscore for any hyphen, too: servers that turn names into variables (CGI, WSGI, Rack)
# take the one for the other, and so would believe these.
_REQUEST_DROPPED = frozenset(
    "".join(pair).encode()
    for name in _HOP_BY_HOP | _REWRITTEN | _FRAMING
    for pair in itertools.product(*(("-", "_") if c == "-" else c for c in name.decode()))
)

# RFC 9110 8.6: of these, servers may insist on a length even without a body.
_LENGTH_EXPECTED = frozenset({b"PATCH", b"POST", b"PUT"})

# Of a type that is made to be read as it comes.
STREAMED_TYPES = frozenset(
    {
        b"application/json-seq",
        b"application/jsonl",
        b"application/stream+json",
        b"application/x-json-stream",
        b"application/x-ndjson",
        b"multipart/x-mixed-replace",
        b"text/event-stream",
    }
)

_HOST = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=%]*(?::[0-9]*)?|\[[0-9A-Fa-f:.]+\](?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]*)([^#]*)")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Destination:
    """Where a request wants to go.

    Attributes:
        host: The Host as the client sent it, port included; empty for HTTP/1.0 without one.
        name: The host's name for routing: lower case, without port, brackets and final dot.
        path: Raw path, percent-encoding kept; ``*`` of an OPTIONS request counts as the root.
        query: Raw query without the question mark.
        route: Decoded path for routing. An encoded slash stays encoded: it separates nothing.
    """

    __slots__ = ("host", "name", "path", "query", "raw", "route")

    def __init__(self, head: RequestHead) -> None:
        target = head.target
        host = head.get(b"host")
        if head.method == b"CONNECT":
            raise ProtocolError("CONNECT is not supported", 405)
        if not target.startswith(b"/"):
            target, host = _proxy_form(head, host)
        if not _HOST.fullmatch(host):
            raise ProtocolError("malformed Host header")
        if b"#" in target:
            # No fragment belongs into a request; what it would end is not for us to decide.
            target = target.replace(b"#", b"%23")
        self.raw = target
        path, _, query = target.partition(b"?")
        self.host = host
        self.name = _host_name(host)
        self.query = query
        self.path = path
        if path == b"*":
            self.route = b"/"
        else:
            if b"%" in path and _BAD_ESCAPE.search(path):
                raise ProtocolError("malformed percent-encoding in the path")
            self.route = decoded_path(path)

    @property
    def host_without_port(self) -> bytes:
        """The host as the client wrote it, IPv6 brackets included."""
        if self.host.startswith(b"["):
            return self.host[: self.host.index(b"]") + 1]
        return self.host.partition(b":")[0]

    def without_prefix(self, prefix: bytes) -> bytes:
        """Return the raw target without a (decoded) path prefix that :attr:`route` begins with."""
        path = self.path
        if path == b"*":
            return self.raw
        if b"%" in path[: 3 * len(prefix)]:
            rest = path[_raw_length(path, len(prefix)) :]
        else:
            rest = path[len(prefix) :]
        return (rest or b"/") + self.raw[len(path) :]


def _proxy_form(head: RequestHead, host: bytes) -> tuple[bytes, bytes]:
    """Handle the target forms other than a path (RFC 9112 3.2); return target and host."""
    if head.target == b"*":
        if head.method != b"OPTIONS":
            raise ProtocolError("the target * belongs to OPTIONS")
        return head.target, host
    absolute = _ABSOLUTE.fullmatch(head.target)
    if absolute is None:
        raise ProtocolError("malformed request target")
    authority, rest = absolute.groups()
    if not authority:
        raise ProtocolError("request target without a host")
    # The absolute form overrides the Host header (RFC 9112 3.2.2).
    if not rest and head.method == b"OPTIONS":
        return b"*", authority
    return (rest if rest.startswith(b"/") else b"/" + rest), authority


def _host_name(host: bytes) -> str:
    text = host.decode("ascii").lower()
    if text.startswith("["):
        return text[1 : text.index("]")]
    return text.partition(":")[0].removesuffix(".")


def _raw_length(path: bytes, decoded: int) -> int:
    """Return how many raw bytes of a path decode to the first ``decoded`` bytes of its route."""
    position = 0
    while decoded > 0:
        if path[position] == 0x25 and path[position : position + 3].upper() != b"%2F":
            position += 3
        else:
            position += 1
        decoded -= 1
    return position


def _named_by_connection(headers: list[Header]) -> set[bytes]:
    """Return the lower-case names that Connection fields declare to be for this hop only."""
    named: set[bytes] = set()
    for name, _, value in headers:
        if name == b"connection":
            named.update(_tokens(value))
    return named - _NEVER_DROPPED


def upgrade_of(head: RequestHead) -> bytes:
    """Return the protocol that a request wants to switch to, or nothing (RFC 9110 7.8, RFC 8441).

    ``h2c`` is not passed on: behind it, requests would reach the target that the proxy never saw
    (and RFC 9113 3.1 has given it up).
    """
    if head.protocol:
        return head.protocol
    upgrade = head.get(b"upgrade")
    if not upgrade or head.version != b"1.1" or not _names_upgrade(head.headers):
        return b""
    return b"" if b"h2c" in upgrade.lower() else upgrade


def _names_upgrade(headers: list[Header]) -> bool:
    return any(name == b"connection" and b"upgrade" in _tokens(value) for name, _, value in headers)


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip().lower() for token in value.split(b",")]


def request_headers(
    head: RequestHead,
    *,
    host: bytes,
    client: bytes,
    scheme: bytes,
    target: bytes,
    request_id: bytes,
    new_start: Callable[[], bytes],
    forward: bool,
    vouched: bool = False,
    client_ip_header: bytes = b"",
    upgrade: bytes = b"",
    length: int | None = None,
    hidden: frozenset[bytes] = frozenset(),
) -> HeaderPairs:
    """Build the header fields of the request that the target gets.

    Args:
        head: The client's request.
        host: Host to send; the target's own name when the client named none.
        client: The client's address.
        scheme: ``http`` or ``https``.
        target: ``host:port`` of the target.
        request_id: The request's id.
        new_start: Makes the value of X-Request-Start when the client sent none.
        forward: Whether incoming X-Forwarded-* headers are believed.
        vouched: Whether the client is one of the few that are believed; then Forwarded is, too.
        client_ip_header: Lower-case name of the header whose value, if believed, stands for the
            incoming X-Forwarded-For.
        upgrade: The protocol that it wants to switch to, if any.
        length: Bytes of its body, or ``CHUNKED``, where that differs from what the client said
            because the body was read whole.
        hidden: Lower-case names of further fields that are not passed on.
    """
    headers = head.headers
    rewritten = _REQUEST_DROPPED | hidden if hidden else _REQUEST_DROPPED
    if length is None:
        length = head.length
    chain: list[bytes] = []
    kamal_targets: list[bytes] = []
    forwarded: list[bytes] = []
    proto = forwarded_host = start = b""
    trailers = named = False
    pairs: HeaderPairs = [(b"Host", host or target)]
    for name, raw, value in headers:
        if name not in rewritten:
            pairs.append((raw, value))
        elif name == b"connection":
            named = named or value.lower() not in (b"close", b"keep-alive")
        elif name == b"te":
            trailers = trailers or b"trailers" in value.lower()
        elif name == b"x-request-start":
            start = start or value
        elif forward:
            if name == b"x-forwarded-for":
                if value:
                    chain.append(value)
            elif name == b"x-forwarded-proto":
                proto = proto or value
            elif name == b"x-forwarded-host":
                forwarded_host = forwarded_host or value
            elif name == b"x-kamal-target":
                kamal_targets.append(value)
            elif name == b"forwarded" and vouched:
                forwarded.append(value)
    if client_ip_header and forward and (value := head.get(client_ip_header)):
        chain = [value]
    if forwarded and (believable := believable_untrusted(forwarded)):
        elements = parse_untrusted(b", ".join(believable))
        if elements:
            # A hop without an address separates those before it from those that are vouched for.
            chain = chain or [(hop.address or "unknown").encode() for hop in elements]
            proto = proto or elements[0].proto.lower().encode()
            forwarded_host = forwarded_host or elements[0].host.encode()
            believable.append(element(client, host, scheme.decode()))
            pairs.append((b"Forwarded", b", ".join(believable)))
    if named:
        dropped = _named_by_connection(headers)
        pairs = [pair for pair in pairs if pair[0] == b"Host" or pair[0].lower() not in dropped]
    chain.append(client)
    kamal_targets.append(target)
    pairs += [
        (b"X-Forwarded-For", b", ".join(chain)),
        (b"X-Forwarded-Host", forwarded_host or host),
        (b"X-Forwarded-Proto", proto or scheme),
        (b"X-Request-ID", request_id),
        (b"X-Request-Start", start or new_start()),
        (b"X-Kamal-Target", b", ".join(kamal_targets)),
    ]
    if trailers:
        pairs.append((b"TE", b"trailers"))
    if upgrade:
        pairs += [(b"Connection", b"Upgrade"), (b"Upgrade", upgrade)]
    if length == CHUNKED:
        pairs.append((b"Transfer-Encoding", b"chunked"))
    elif length or head.method in _LENGTH_EXPECTED or head.get(b"content-length"):
        pairs.append((b"Content-Length", b"%d" % length))
    return pairs


def is_lookalike(name: bytes, other: bytes) -> bool:
    """Return whether two lower-case names are one to a server that turns them into variables."""
    return name.replace(b"_", b"-") == other.replace(b"_", b"-")


def forwarded_chain(head: RequestHead, client_ip_header: bytes) -> list[str]:
    """Return what a believed request names as the hops before it, oldest first.

    They are entries for :func:`kamal_proxy.http.forwarded.nearest_untrusted`; one that is no
    address stays, because whoever it was is not to be believed.
    """
    if client_ip_header and (value := head.get(client_ip_header)):
        return [value.decode("latin-1").strip()]
    fields = [value for name, _, value in head.headers if name == b"x-forwarded-for"]
    if hops := hops_of(b",".join(fields)):
        return hops
    forwarded = [value for name, _, value in head.headers if name == b"forwarded"]
    elements = parse_untrusted(b", ".join(believable_untrusted(forwarded))) or []
    return [hop.for_ for hop in elements]


def hops_of(value: bytes) -> list[str]:
    """Return the entries of an X-Forwarded-For field, oldest first."""
    hops = (hop.strip() for hop in value.decode("latin-1").split(","))
    return [hop for hop in hops if hop]


def is_streamed(head: ResponseHead) -> bool:
    """Return whether a response is made to be read as it comes, so that it can't be buffered."""
    if head.length < 0 or head.get(b"x-accel-buffering").lower() == b"no":
        return True
    content_type = head.get(b"content-type")
    return content_type.partition(b";")[0].strip().lower() in STREAMED_TYPES or is_grpc(
        content_type
    )


def is_grpc(content_type: bytes) -> bool:
    """Return whether that is the type of a gRPC call, in which both sides speak when they like."""
    return content_type.lower().startswith(b"application/grpc")


def upgrade_response_headers(head: ResponseHead) -> HeaderPairs:
    """Build the header fields of a 101 response that the client gets."""
    switched = head.get(b"upgrade")
    return [*response_headers(head), (b"Connection", b"Upgrade"), (b"Upgrade", switched)]


def response_headers(head: ResponseHead) -> HeaderPairs:
    """Build the header fields of the response that the client gets, Content-Length included."""
    chunked = named = False
    pairs: HeaderPairs = []
    for name, raw, value in head.headers:
        if name not in _HOP_BY_HOP:
            pairs.append((raw, value))
        elif name == b"transfer-encoding":
            chunked = True
        elif name == b"connection":
            named = named or value.lower() not in (b"close", b"keep-alive")
    dropped = _named_by_connection(head.headers) if named else set()
    if chunked or head.status < 200 or head.status == 204:  # RFC 9110 8.6
        dropped.add(b"content-length")
    if dropped:
        pairs = [pair for pair in pairs if pair[0].lower() not in dropped]
    return pairs
