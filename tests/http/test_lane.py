"""The lane: what clients, targets, the log and the metrics see is the same as without it.

Each exchange here happens three times with the lane and three times without: the first time the
connection to the target is a new one.
"""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from kamal_proxy.options import ServiceOptions
from tests.certificates import make_ca
from tests.http.lanes import GET, counted, spy_on_lanes
from tests.running import open_embedded
from tests.scripted import ConnectionCut, Peer, ok, open_client, open_upstream

if TYPE_CHECKING:
    from tests.running import Line
    from tests.scripted import Client, Request, Script, Upstream

TIMES = 3
AUTHORITY = make_ca()
_CHANGING = {"time", "duration", "port", "client_port"}
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_START = re.compile(rb"(X-Request-Start: t=)[0-9]{13}\r")
_DATE = re.compile(rb"(Date: )[^\r]*\r")


@attrs.frozen(kw_only=True)
class Case:
    """One exchange.

    Attributes:
        request: What the client sends.
        answer: What the target answers.
        closes: Whether the target closes after that.
        target: Target options of the service.
        service: Other options of it.
        run: Options of the proxy.
        more: Options of another service with the same target, called ``more``.
        served: Whether the lane serves it when there is a connection to the target.
    """

    request: bytes = GET
    answer: bytes = ok(b"hello")
    closes: bool = False
    target: dict[str, Any] = attrs.field(factory=dict)
    service: dict[str, Any] = attrs.field(factory=dict)
    run: dict[str, Any] = attrs.field(factory=dict)
    more: dict[str, Any] | None = None
    served: bool = True

    @property
    def method(self) -> bytes:
        """The method of the request."""
        return self.request.lstrip().partition(b" ")[0]


@attrs.frozen
class Seen:
    """What was seen of an exchange, without what is never the same twice."""

    client: list[object]
    target: list[tuple[bytes, bytes]]
    log: list[list[tuple[str, object]]]
    counted: dict[str, float]


def get(path: str = "/", host: str = "a.example", fields: str = "") -> bytes:
    """Return a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n".encode()


def send(method: str, body: bytes = b"", fields: str = "") -> bytes:
    """Return a request with a body."""
    head = f"{method} / HTTP/1.1\r\nHost: a.example\r\nContent-Length: {len(body)}\r\n{fields}\r\n"
    return head.encode() + body


def answer(status: str, fields: str = "", body: bytes = b"") -> bytes:
    """Return a response."""
    return f"HTTP/1.1 {status}\r\n{fields}\r\n".encode() + body


CHUNKED = "Transfer-Encoding: chunked\r\n"
CHUNKS = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
FIELDS = "Content-Type: text/plain\r\nX-A: 1\r\nx-b: two \r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
FORWARDED = (
    "X-Forwarded-For: 192.0.2.1, 192.0.2.2\r\nX-Forwarded-Proto: https\r\n"
    "X-Forwarded-Host: b.example\r\n"
)
WANTED = {
    "log_request_headers": ("X-A", "Cookie", "Missing"),
    "log_response_headers": ("Set-Cookie", "x-b", "Content-Length", "Cache-Control"),
}

CASES = {
    "plain": Case(),
    "head": Case(request=b"HEAD" + GET[3:], answer=ok(b"", 5)),
    "options": Case(request=b"OPTIONS" + GET[3:]),
    "delete": Case(request=b"DELETE" + GET[3:], answer=answer("204 No Content")),
    "delete-body": Case(request=send("DELETE", b"abc")),
    "post": Case(request=send("POST", b"abc", "Content-Type: a/b\r\n")),
    "post-nothing": Case(request=send("POST")),
    "post-without-length": Case(request=b"POST" + GET[3:]),
    "put": Case(request=send("PUT", b"x" * 20_000)),
    "put-large": Case(request=send("PUT", b"x" * 200_000), served=False),
    "patch": Case(request=send("PATCH", b"abc")),
    "trace": Case(request=b"TRACE" + GET[3:], served=False),
    "chunked-request": Case(
        request=b"POST" + GET[3:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS, served=False
    ),
    "201": Case(answer=answer("201 Created", "Content-Length: 2\r\nLocation: /x\r\n", b"ok")),
    "204": Case(answer=answer("204 No Content", FIELDS)),
    "204-length": Case(
        answer=answer("204 No Content", "Content-Length: 0\r\n"),
        target={"log_response_headers": ("Content-Length",)},
    ),
    "304": Case(answer=answer("304 Not Modified", 'ETag: "x"\r\n')),
    "304-length": Case(answer=answer("304 Not Modified", "Content-Length: 5\r\n"), served=False),
    "404": Case(answer=answer("404 Not Found", "Content-Length: 4\r\n", b"none")),
    "500": Case(answer=answer("500 Oh  No", "Content-Length: 0\r\n")),
    "no-reason": Case(answer=answer("200 ", "Content-Length: 0\r\n")),
    "no-reason-nor-space": Case(answer=answer("200", "Content-Length: 0\r\n"), served=False),
    "100-first": Case(answer=b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"hello"), served=False),
    "103-first": Case(answer=b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + ok(b"hello"), served=False),
    "fields": Case(answer=answer("200 OK", FIELDS + "Content-Length: 3\r\n", b"abc")),
    "kept-alive": Case(
        request=get(fields="Connection: keep-alive\r\n"),
        answer=answer("200 OK", "Connection: keep-alive\r\nKeep-Alive: 5\r\nContent-Length: 0\r\n"),
    ),
    "client-closes": Case(request=get(fields="Connection: close\r\n")),
    "target-closes": Case(
        answer=answer("200 OK", "Connection: close\r\nContent-Length: 5\r\n", b"hello"),
        closes=True,
    ),
    "target-closes-unsaid": Case(closes=True),
    "until-close": Case(answer=answer("200 OK", "", b"hello"), closes=True, served=False),
    "http-1.0": Case(answer=b"HTTP/1.0" + ok(b"hello")[8:], closes=True, served=False),
    "chunked": Case(answer=answer("200 OK", CHUNKED + FIELDS, CHUNKS)),
    "chunked-empty": Case(answer=answer("200 OK", CHUNKED, b"0\r\n\r\n")),
    "chunked-close": Case(
        request=get(fields="Connection: close\r\n"), answer=answer("200 OK", CHUNKED, CHUNKS)
    ),
    "chunked-trailers": Case(
        answer=answer("200 OK", CHUNKED, CHUNKS[:-2] + b"X-T: 1\r\n\r\n"), served=False
    ),
    "chunked-extension": Case(
        answer=answer("200 OK", CHUNKED, b"5;a=b\r\nhello\r\n0\r\n\r\n"), served=False
    ),
    "chunked-bad": Case(
        answer=answer("200 OK", CHUNKED, b"5\r\nhelloXX0\r\n\r\n"), closes=True, served=False
    ),
    "too-much": Case(answer=ok(b"hello") + b"more", served=False),
    "too-much-chunked": Case(answer=answer("200 OK", CHUNKED, CHUNKS + b"more")),
    "too-little": Case(answer=ok(b"hello", 9), closes=True),
    "too-little-chunked": Case(answer=answer("200 OK", CHUNKED, CHUNKS[:-9]), closes=True),
    "no-answer": Case(answer=b"", closes=True, served=False),
    "garbage": Case(answer=b"\0\1\2\r\n\r\n", closes=True, served=False),
    "large": Case(answer=ok(b"x" * 300_000)),
    "path": Case(request=get("/a/b//c/../d;x=y?q=1&r=%zz?#".replace("#", ""))),
    "escapes": Case(request=get("/%41%2fb%20%22%5c%0a%ff%c3%a9?x=%22")),
    "escapes-broken": Case(request=get("/%4"), served=False),
    "utf8-path": Case(request="GET /é HTTP/1.1\r\nHost: a.example\r\n\r\n".encode(), served=False),
    "quotes": Case(
        request=get('/"\\\'<>|{}?"', fields='User-Agent: "x\\y"\r\nX-Request-Id: a"b\r\n')
    ),
    "agent": Case(
        request=b"GET / HTTP/1.1\r\nHost: a.example\r\nUser-Agent: \xc3\xa9\xff\x80~\r\n\r\n"
    ),
    "type": Case(answer=answer("200 OK", 'Content-Type: text/"é"\r\nContent-Length: 0\r\n')),
    "ids": Case(request=get(fields="X-Request-ID: mine\r\nX-Request-Start: t=1\r\n")),
    "forwarded-for": Case(request=get(fields=FORWARDED)),
    "forwarded-for-not-believed": Case(
        request=get(fields=FORWARDED), target={"forward_headers": False}
    ),
    "forwarded-for-not-trusted": Case(
        request=get(fields=FORWARDED), run={"trusted_proxies": ("192.0.2.9",)}
    ),
    "forwarded-for-trusted": Case(
        request=get(fields=FORWARDED), run={"trusted_proxies": ("127.0.0.1",)}
    ),
    "forwarded": Case(request=get(fields="Forwarded: for=192.0.2.1\r\n"), served=False),
    "hop-by-hop": Case(request=get(fields="TE: trailers\r\nConnection: TE\r\n"), served=False),
    "expects": Case(request=send("POST", b"abc", "Expect: 100-continue\r\n"), served=False),
    "empty-fields": Case(request=get(fields="X-A:\r\nX-B:   \r\nAccept:x\r\n")),
    "tabs": Case(request=get(fields="X-A:\tb\t\r\n"), served=False),
    "underscore": Case(request=get(fields="X_A: b\r\n"), served=False),
    "bad-field": Case(request=get(fields="X A: b\r\n"), served=False),
    "no-host": Case(request=b"GET / HTTP/1.1\r\n\r\n", served=False),
    "empty-line-first": Case(request=b"\r\n" + GET, served=False),
    "logged-fields": Case(
        request=get(fields="X-A: 1\r\nCookie: é\r\nx-a: 2\r\n"),
        answer=answer("200 OK", FIELDS + "Content-Length: 3\r\n", b"abc"),
        target=WANTED,
    ),
    "logged-twice": Case(
        request=get(fields="X-A: 1\r\n"),
        target={"log_request_headers": ("X-A", "x-a")},
        served=False,
    ),
    "logged-connection": Case(
        answer=answer("200 OK", "Connection: keep-alive\r\nContent-Length: 0\r\n"),
        target={"log_response_headers": ("Connection", "Transfer-Encoding")},
        served=False,
    ),
    "many-fields": Case(request=get(fields="".join(f"X-{n}: {n}\r\n" for n in range(99)))),
    "more-fields": Case(
        request=get(fields="".join(f"X-{n}: {n}\r\n" for n in range(100))), served=False
    ),
    "too-many-fields": Case(
        request=get(fields="".join(f"X-{n}: {n}\r\n" for n in range(50))),
        run={"max_headers": 50},
        served=False,
    ),
    "large-head": Case(request=get("/" + "x" * 8_000)),
    "larger-head": Case(request=get("/" + "x" * 9_000), served=False),
    "too-large-head": Case(
        request=get("/" + "x" * 2_000), run={"max_head_size": 1500}, served=False
    ),
    "too-large-answer": Case(
        answer=answer("200 OK", f"X-A: {'x' * 2000}\r\nContent-Length: 0\r\n"),
        run={"max_head_size": 1500},
        served=False,
    ),
    "other-host": Case(
        request=get(host="b.example"), service={"hosts": ("a.example",)}, served=False
    ),
    "host": Case(service={"hosts": ("b.example", "a.example")}),
    "host-port": Case(request=get(host="a.example:99"), service={"hosts": ("a.example",)}),
    "host-in-capitals": Case(request=get(host="A.eXample"), service={"hosts": ("a.example",)}),
    "host-in-capitals-of-two": Case(
        request=get(host="A.eXample"), service={"hosts": ("a.example",)}, more={}
    ),
    "host-with-dot-of-two": Case(
        request=get(host="a.example."), service={"hosts": ("a.example",)}, more={}
    ),
    "host-with-dot-and-port-of-two": Case(
        request=get(host="a.example.:80"), service={"hosts": ("a.example",)}, more={}
    ),
    "host-is-a-dot": Case(request=get(host=".")),
    "host-is-dots": Case(
        request=get(host="..-._:"), service={"hosts": ("a.example",)}, served=False
    ),
    "host-is-an-address": Case(request=get(host="[::1]:80"), served=False),
    "wildcard": Case(request=get(host="x.example"), service={"hosts": ("*.example",)}, more={}),
    "wildcard-too-deep": Case(
        request=get(host="y.x.example"), service={"hosts": ("*.example",)}, more={}
    ),
    "canonical": Case(service={"hosts": ("a.example", "b.example"), "canonical_host": "a.example"}),
    "canonical-in-capitals": Case(
        request=get(host="A.Example."),
        service={"hosts": ("a.example", "b.example"), "canonical_host": "a.example"},
    ),
    "not-canonical": Case(
        service={"hosts": ("a.example", "b.example"), "canonical_host": "b.example"}, served=False
    ),
    "prefix": Case(request=get("/app/x?y"), service={"path_prefixes": ("/app",)}),
    "prefix-only": Case(request=get("/app?y"), service={"path_prefixes": ("/app",)}),
    "prefix-kept": Case(
        request=get("/app/x"), service={"path_prefixes": ("/app",), "strip_prefix": False}
    ),
    "prefix-of-a-word": Case(
        request=get("/apple"), service={"path_prefixes": ("/app",)}, served=False
    ),
    "prefix-escaped": Case(
        request=get("/%61pp/%78"), service={"path_prefixes": ("/app",)}, served=False
    ),
    "prefix-of-two": Case(request=get("/app/x"), service={"path_prefixes": ("/app",)}, more={}),
    "no-prefix-of-two": Case(request=get("/x"), service={"path_prefixes": ("/app",)}, more={}),
    "escaped-of-two": Case(
        request=get("/%78"), service={"path_prefixes": ("/app",)}, more={}, served=False
    ),
    "buffered": Case(
        request=send("POST", b"abc"), target={"buffer_requests": True, "buffer_responses": True}
    ),
    "buffered-request-too-large": Case(
        request=send("POST", b"x" * 11),
        target={"buffer_requests": True, "max_request_body_size": 10},
        served=False,
    ),
    "buffered-request-as-large": Case(
        request=send("POST", b"x" * 10),
        target={"buffer_requests": True, "max_request_body_size": 10},
    ),
    "buffered-response-too-large": Case(
        answer=ok(b"x" * 11),
        target={"buffer_responses": True, "max_response_body_size": 10},
        served=False,
    ),
    "buffered-response-to-head": Case(
        request=b"HEAD" + GET[3:],
        answer=ok(b"", 99),
        target={"buffer_responses": True, "max_response_body_size": 10},
    ),
    "buffered-large": Case(
        answer=ok(b"x" * 300_000), target={"buffer_responses": True}, served=False
    ),
    "buffered-chunked": Case(
        answer=answer("200 OK", CHUNKED, CHUNKS), target={"buffer_responses": True}
    ),
    "buffered-stream": Case(
        answer=answer(
            "200 OK", "Content-Type: text/event-stream; x\r\nContent-Length: 3\r\n", b"abc"
        ),
        target={"buffer_responses": True, "max_response_body_size": 1},
    ),
    "not-buffering": Case(
        answer=answer("200 OK", "X-Accel-Buffering: NO\r\nContent-Length: 3\r\n", b"abc"),
        target={"buffer_responses": True, "max_response_body_size": 1},
    ),
    "client-ip-header": Case(
        request=get(fields="X-Client: 192.0.2.1\r\n"),
        service={"client_ip_header": "X-Client"},
        served=False,
    ),
    "cookie-paths": Case(
        request=get("/app/x"),
        answer=answer("200 OK", "Set-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n"),
        service={"path_prefixes": ("/app",)},
        target={"scope_cookie_paths": True},
        served=False,
    ),
    "no-metrics": Case(service={"exclude_metrics_paths": ("/",)}, served=False),
    "no-limit": Case(target={"response_timeout": 0.0}),
}


def answering(upstream: Upstream, case: Case) -> Script:
    """Return a script that gives each request the case's answer."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            upstream.record(request)
            await peer.send(case.answer)
            if case.closes:
                return

    return serve


def deploy_options(case: Case, upstream: Upstream, name: str = "web") -> Any:
    """Return what deploys the case's service."""
    options = upstream.options(name, **case.target)
    changes = case.service if name == "web" else case.more
    return attrs.evolve(options, service_options=ServiceOptions(**(changes or {})))


def received(request: Request) -> tuple[bytes, bytes]:
    """Return what a target got, without what is never the same."""
    head = _ID.sub("ID", _START.sub(rb"\1T\r", request.head).decode("latin-1"))
    return head.encode("latin-1"), request.body


def told(line: Line) -> list[tuple[str, object]]:
    """Return a line of the log, without what is never the same."""
    values = {key: "-" if key in _CHANGING else value for key, value in line.items()}
    if "request_id" in values:
        values["request_id"] = _ID.sub("ID", str(values["request_id"]))
    if "error" in values:
        # Whose words they are depends on who reads the response.
        values["error"] = str(values["error"]).partition(":")[0]
    return list(values.items())


async def response_of(client: Client, method: bytes) -> tuple[object, bool]:
    """Read a response; return it, and whether the connection goes on."""
    start = len(client.received) - len(client._unread)
    try:
        response = await client.receive_response(method)
    except ConnectionCut as cut:
        return (cut.status, cut.body, cut.reset), False
    raw = bytes(client.received[start : len(client.received) - len(client._unread)])
    raw = _DATE.sub(rb"\1D\r", raw)
    closes = response.get(b"connection") == [b"close"]
    if closes:
        assert await client.receive_eof() == b""
    if response.get(b"transfer-encoding"):
        # The lane passes chunks as they are.
        return (raw[: raw.index(b"\r\n\r\n")], response.body, response.trailers), not closes
    return raw, not closes


async def seen(case: Case, upstream: Upstream, *, lane: bool) -> Seen:
    """Let the exchange happen some times, and return what was seen of it."""
    before = len(upstream.requests)
    client_saw = []
    async with open_embedded(lane=lane, **case.run) as proxy, AsyncExitStack() as clients:
        await proxy.deploy(deploy_options(case, upstream))
        if case.more is not None:
            await proxy.deploy(deploy_options(case, upstream, "more"))
        told_before = len(proxy.lines.all)
        client: Client | None = None
        for _ in range(TIMES):
            if client is None:
                client = await clients.enter_async_context(open_client(proxy.port))
            await client.send(case.request)
            saw, goes_on = await response_of(client, case.method)
            client_saw.append(saw)
            if not goes_on:
                client = None
            await proxy.lines.wait_requests(len(client_saw))
        target_saw = [received(request) for request in upstream.requests[before:]]
        log = [told(line) for line in proxy.lines.all[told_before:]]
        return Seen(client_saw, target_saw, log, counted(proxy))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_the_same_with_and_without(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_upstream() as upstream:
        upstream._default = answering(upstream, case)
        with monkeypatch.context() as patch:
            spy = spy_on_lanes(patch)
            with_lane = await seen(case, upstream, lane=True)
        without = await seen(case, upstream, lane=False)
    for field in attrs.fields_dict(Seen):
        assert getattr(with_lane, field) == getattr(without, field)
    assert without.log[-1][2] == ("msg", "Request")
    # For the first the target's name is looked up.
    assert (max(spy.tasks, spy.exchanges) < TIMES) == case.served
