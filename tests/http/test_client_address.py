"""Whose request it is: trusted proxies, the client-ip header, and the PROXY protocol.

Over real sockets: what the target is told, and what the log says. A connection comes from 127.0.0.1
unless it is bound to another address.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy.proxy_protocol import encode_v2
from tests.e2e.programs import needs
from tests.http.streams import CLIENT, GET, World, open_world, read_all, read_head
from tests.running import open_embedded
from tests.scripted import LOCALHOST, open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

    from tests.running import Embedded, Line
    from tests.scripted import Request, Upstream

OTHER = "127.0.0.2"  # another peer
SHOWN = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "X-Client")
REFUSED = "Connection refused: no PROXY protocol header"
Opener = Callable[..., AbstractAsyncContextManager[World]]


@asynccontextmanager
async def serving(
    *, forward_headers: bool | None = None, **run: Any
) -> AsyncIterator[tuple[Embedded, Upstream]]:
    """Run a proxy with a service whose clients may say who they are in ``X-Client``."""
    async with open_embedded(**run) as proxy, open_upstream() as upstream:
        options = upstream.options(forward_headers=forward_headers)
        service = attrs.evolve(options.service_options, client_ip_header="X-Client")
        await proxy.deploy(attrs.evolve(options, service_options=service))
        yield proxy, upstream


def shown(request: Request) -> dict[str, str]:
    """Return what a target is told of the client."""
    values = {name: request.get(name.lower().encode()) for name in SHOWN}
    assert all(len(each) <= 1 for each in values.values()), "each is there once"
    return {name: each[0].decode() for name, each in values.items() if each}


# Trusted proxies

PEERS: dict[str, tuple[str, ...]] = {
    "everybody": (),
    "trusted": ("127.0.0.0/8", "10.0.0.0/8"),
    "untrusted": ("10.0.0.0/8",),
}
FORWARD = {"default": None, "on": True, "off": False}
CAME = {
    "fields": (
        "X-Forwarded-For: 198.51.100.9, 10.1.2.3\r\nX-Forwarded-Proto: https\r\n"
        "X-Forwarded-Host: front.example\r\n"
    ),
    "forwarded": "Forwarded: for=198.51.100.9;proto=https;host=front.example\r\n",
    "header": "X-Client: 198.51.100.9\r\nX-Forwarded-For: 203.0.113.5\r\n",
}
OURS = {
    "X-Forwarded-For": LOCALHOST,
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Host": "a.example",
}
THEIRS = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "front.example"}
NAMED = {"X-Client": "198.51.100.9"}

# By what came and who sent it: what the target sees while forward-headers is on, and while it is
# off, and the remote_addr of the log, which does not depend on it.
SEEN: dict[tuple[str, str], tuple[dict[str, str], dict[str, str], str]] = {
    ("fields", "everybody"): (
        THEIRS | {"X-Forwarded-For": "198.51.100.9, 10.1.2.3, 127.0.0.1"},
        OURS,
        "198.51.100.9, 10.1.2.3",  # as the original has it
    ),
    ("fields", "trusted"): (
        THEIRS | {"X-Forwarded-For": "198.51.100.9, 10.1.2.3, 127.0.0.1"},
        OURS,
        "198.51.100.9",
    ),
    ("fields", "untrusted"): (OURS, OURS, LOCALHOST),
    ("forwarded", "everybody"): (OURS, OURS, LOCALHOST),
    ("forwarded", "trusted"): (
        THEIRS
        | {
            "X-Forwarded-For": "198.51.100.9, 127.0.0.1",
            "Forwarded": "for=198.51.100.9;proto=https;host=front.example, "
            "for=127.0.0.1;host=a.example;proto=http",
        },
        OURS,
        "198.51.100.9",
    ),
    ("forwarded", "untrusted"): (OURS, OURS, LOCALHOST),
    ("header", "everybody"): (
        OURS | NAMED | {"X-Forwarded-For": "198.51.100.9, 127.0.0.1"},
        OURS | NAMED,
        "198.51.100.9",
    ),
    ("header", "trusted"): (
        OURS | NAMED | {"X-Forwarded-For": "198.51.100.9, 127.0.0.1"},
        OURS | NAMED,
        "198.51.100.9",
    ),
    ("header", "untrusted"): (OURS, OURS, LOCALHOST),
}


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("peer", PEERS)
async def test_what_a_peer_is_believed(peer: str, forward: str) -> None:
    async with (
        serving(trusted_proxies=PEERS[peer], forward_headers=FORWARD[forward]) as (
            proxy,
            upstream,
        ),
        open_client(proxy.port) as client,
    ):
        for headers in CAME.values():
            assert (await client.get(headers=headers)).status == 200
    expected = [SEEN[came, peer] for came in CAME]
    assert [shown(request) for request in upstream.requests] == [
        off if forward == "off" else on for on, off, _ in expected
    ]
    assert [line["remote_addr"] for line in proxy.lines.requests] == [
        remote for _, _, remote in expected
    ]
    assert {line["client_addr"] for line in proxy.lines.requests} == {LOCALHOST}


OWN = "for=127.0.0.1;host=a.example;proto=http"
BELIEVED: list[tuple[str, str, str | None, str]] = [
    # What came, X-Forwarded-For and Forwarded that the target sees, remote_addr.
    ("", "127.0.0.1", None, "127.0.0.1"),
    # X-Forwarded-For is preferred, and Forwarded goes on all the same.
    ("X-Forwarded-For: 198.51.100.1\r\nForwarded: for=198.51.100.2\r\n",
     "198.51.100.1, 127.0.0.1", f"for=198.51.100.2, {OWN}", "198.51.100.1"),
    ("X-Forwarded-For: \r\nForwarded: for=198.51.100.2\r\n",
     "198.51.100.2, 127.0.0.1", f"for=198.51.100.2, {OWN}", "198.51.100.2"),
    # Several fields are one list.
    ("X-Forwarded-For: 198.51.100.1\r\nX-Forwarded-For: 10.0.0.1, 10.0.0.2\r\n",
     "198.51.100.1, 10.0.0.1, 10.0.0.2, 127.0.0.1", None, "198.51.100.1"),
    ('Forwarded: for="[2001:db8::1]:80"\r\nForwarded: for=10.0.0.1\r\n',
     "2001:db8::1, 10.0.0.1, 127.0.0.1",
     f'for="[2001:db8::1]:80", for=10.0.0.1, {OWN}', "2001:db8::1"),
    # Ports and brackets.
    ("X-Forwarded-For: [2001:db8::1]:443\r\n", "[2001:db8::1]:443, 127.0.0.1", None, "2001:db8::1"),
    ("X-Forwarded-For: 198.51.100.1:443, ::ffff:10.0.0.1\r\n",
     "198.51.100.1:443, ::ffff:10.0.0.1, 127.0.0.1", None, "198.51.100.1"),
    # The nearest that is not trusted, whatever it says of those before it.
    ("X-Forwarded-For: 192.0.2.1, 198.51.100.1, 10.0.0.1\r\n",
     "192.0.2.1, 198.51.100.1, 10.0.0.1, 127.0.0.1", None, "198.51.100.1"),
    ("X-Forwarded-For: 10.0.0.9, 10.0.0.1\r\n", "10.0.0.9, 10.0.0.1, 127.0.0.1", None, "10.0.0.9"),
    # One that names no address is not trusted either.
    ("X-Forwarded-For: 198.51.100.1, unknown, 10.0.0.1\r\n",
     "198.51.100.1, unknown, 10.0.0.1, 127.0.0.1", None, "10.0.0.1"),
    ("X-Forwarded-For: nonsense\r\n", "nonsense, 127.0.0.1", None, "127.0.0.1"),
    ("Forwarded: for=198.51.100.1, for=_hidden, for=10.0.0.1\r\n",
     "198.51.100.1, unknown, 10.0.0.1, 127.0.0.1",
     f"for=198.51.100.1, for=_hidden, for=10.0.0.1, {OWN}", "10.0.0.1"),
    ("Forwarded: for=198.51.100.1, proto=http, for=10.0.0.1\r\n",
     "198.51.100.1, unknown, 10.0.0.1, 127.0.0.1",
     f"for=198.51.100.1, proto=http, for=10.0.0.1, {OWN}", "10.0.0.1"),
    ("Forwarded: for=unknown\r\n", "unknown, 127.0.0.1", f"for=unknown, {OWN}", "127.0.0.1"),
    # Malformed fields go nowhere, and hide those before them.
    ("Forwarded: for=198.51.100.1;;=\r\n", "127.0.0.1", None, "127.0.0.1"),
    ("Forwarded: for=198.51.100.1;for=198.51.100.2\r\n", "127.0.0.1", None, "127.0.0.1"),
    ('Forwarded: for="198.51.100.1\r\nForwarded: for=10.0.0.1\r\n',
     "10.0.0.1, 127.0.0.1", f"for=10.0.0.1, {OWN}", "10.0.0.1"),
    ("Forwarded: for=10.0.0.1\r\nForwarded: ((\r\n", "127.0.0.1", None, "127.0.0.1"),
    ("Forwarded: ,\r\n", "127.0.0.1", None, "127.0.0.1"),
    # The client-ip header is preferred to all; an empty one is none.
    ("X-Client: 198.51.100.1\r\nX-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.2\r\n",
     "198.51.100.1, 127.0.0.1", f"for=10.0.0.2, {OWN}", "198.51.100.1"),
    ("X-Client: \r\nX-Forwarded-For: 198.51.100.1\r\n",
     "198.51.100.1, 127.0.0.1", None, "198.51.100.1"),
    ("X-Client: nobody\r\n", "nobody, 127.0.0.1", None, "127.0.0.1"),
]  # fmt: skip


async def test_what_a_trusted_proxy_tells() -> None:
    async with (
        serving(trusted_proxies=("127.0.0.1", "10.0.0.0/8")) as (proxy, upstream),
        open_client(proxy.port) as client,
    ):
        for headers, *_ in BELIEVED:
            assert (await client.get(headers=headers)).status == 200
    told = [shown(request) for request in upstream.requests]
    for (headers, *expected), seen, line in zip(BELIEVED, told, proxy.lines.requests, strict=True):
        found = [seen["X-Forwarded-For"], seen.get("Forwarded"), line["remote_addr"]]
        assert found == expected, headers


async def test_trust_is_a_matter_of_the_connection() -> None:
    async with serving(trusted_proxies=(OTHER,)) as (proxy, upstream):
        for source in (LOCALHOST, OTHER):
            async with open_client(proxy.port, source=source) as client:
                await client.get(headers="X-Forwarded-For: 198.51.100.1\r\nX-Kamal-Target: a:1\r\n")
    assert [
        (request.get(b"x-forwarded-for"), request.get(b"x-kamal-target"))
        for request in upstream.requests
    ] == [
        ([b"127.0.0.1"], [upstream.target.encode()]),
        ([b"198.51.100.1, 127.0.0.2"], [b"a:1, " + upstream.target.encode()]),
    ]
    assert [line["remote_addr"] for line in proxy.lines.requests] == [LOCALHOST, "198.51.100.1"]


@pytest.mark.parametrize("buffered", [False, True], ids=["streamed", "buffered"])
async def test_there_is_no_way_around_it(buffered: bool) -> None:
    """Servers may merge trailers into the head, and take an underscore for a hyphen."""
    own = ["X-Real-Client", "x_real_client", "X-Real_Client", "X_Real-Client"]
    spoofed = "".join(f"{name}: 198.51.100.1\r\n" for name in own)
    request = (
        f"POST / HTTP/1.1\r\nHost: a\r\n{spoofed}X-Other: 1\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n{spoofed}X-Sum: 1\r\n\r\n"
    ).encode()
    passed = {b"x-real-client", b"x_real_client", b"x-real_client", b"x_real-client"}
    async with open_embedded(trusted_proxies=(OTHER,)) as proxy, open_upstream() as upstream:
        options = upstream.options(buffer_requests=buffered)
        service = attrs.evolve(options.service_options, client_ip_header="X-Real-Client")
        await proxy.deploy(attrs.evolve(options, service_options=service))
        for source in (LOCALHOST, OTHER):
            async with open_client(proxy.port, source=source) as client:
                assert (await client.request(request)).status == 200
    unbelieved, believed = upstream.requests
    assert passed.isdisjoint(name for name, _ in unbelieved.headers)
    assert (unbelieved.get(b"x-other"), unbelieved.body) == ([b"1"], b"hi")
    assert unbelieved.trailers == [(b"x-sum", b"1")]
    # Its own client can't say it in another spelling, or later.
    assert passed & {name for name, _ in believed.headers} == {b"x-real-client"}
    assert believed.get(b"x-real-client") == [b"198.51.100.1"]
    assert believed.trailers == [(b"x-sum", b"1")]


async def test_the_line_of_a_request_without_a_service() -> None:
    async with open_embedded(trusted_proxies=(LOCALHOST,)) as proxy:
        async with open_client(proxy.port) as client:
            await client.get(headers="X-Forwarded-For: 198.51.100.1\r\n")
            await client.send(b"\0")
            await client.wait_closed()
        lines = await proxy.lines.wait_requests(2)
    assert [(line["status"], line["remote_addr"]) for line in lines] == [
        (404, "198.51.100.1"),
        (400, LOCALHOST),
    ]


# The PROXY protocol

SOURCE, DESTINATION = ("198.51.100.7", 4711), ("203.0.113.1", 80)
# Written by hand, with a field that is of no interest (PP2_TYPE_UNIQUE_ID).
BY_HAND = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x11"
    b"\xc6\x33\x64\x07\xcb\x00\x71\x01\x12\x67\x00\x50"
    b"\x05\x00\x02id"
)
NAMING = {
    "v1": b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 80\r\n",
    "v1 in IPv6": b"PROXY TCP6 ::ffff:198.51.100.7 2001:db8::1 4711 80\r\n",
    "v2": encode_v2(SOURCE, DESTINATION),
    "v2 by hand": BY_HAND,
}
SILENT = {
    "v1": b"PROXY UNKNOWN\r\n",
    "v1 with addresses": b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n",
    "v2 local": b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00",
    "v2 local with addresses": BY_HAND.replace(b"\x21", b"\x20"),
    "v2 unspecified": b"\r\n\r\n\0\r\nQUIT\n\x21\x00\x00\x00",
}
NOT_HEADERS = {
    "a request": b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "garbage": b"\xff" * 20,
    "a line of another family": b"PROXY TCP9 198.51.100.7 203.0.113.1 4711 80\r\n",
    "a bad address": b"PROXY TCP4 198.51.100.777 203.0.113.1 4711 80\r\n",
    "a line without end": b"PROXY UNKNOWN " + b"x" * 100,
    "version 3": BY_HAND.replace(b"\x21", b"\x31"),
    "too long": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff",
    "a field too long": BY_HAND.replace(b"\x05\x00\x02", b"\x05\x00\x09"),
}
REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


def clients(lines: list[Line]) -> list[tuple[str, str, str]]:
    return [(line["client_addr"], line["client_port"], line["remote_addr"]) for line in lines]


@pytest.mark.parametrize("pace", ["together", "apart", "byte by byte"])
@pytest.mark.parametrize("name", NAMING)
async def test_a_header_says_who_the_client_is(name: str, pace: str) -> None:
    async with (
        serving(proxy_protocol_from=(LOCALHOST,)) as (proxy, upstream),
        open_client(proxy.port) as client,
    ):
        sent = NAMING[name] + REQUEST
        pieces = {
            "together": [sent],
            "apart": [NAMING[name], REQUEST],
            "byte by byte": [bytes([byte]) for byte in sent],
        }[pace]
        for piece in pieces:
            await client.send(piece)
            await trio.lowlevel.checkpoint()
        assert (await client.receive_response()).status == 200
        assert (await client.get()).status == 200, "it holds for the whole connection"
    assert clients(proxy.lines.requests) == [("198.51.100.7", "4711", "198.51.100.7")] * 2
    assert [request.get(b"x-forwarded-for") for request in upstream.requests] == [
        [b"198.51.100.7"]
    ] * 2


async def test_an_ipv6_client() -> None:
    async with (
        serving(proxy_protocol_from=(LOCALHOST,)) as (proxy, upstream),
        open_client(proxy.port) as client,
    ):
        await client.send(encode_v2(("2001:db8::7", 4711), ("2001:db8::1", 80)))
        assert (await client.get()).status == 200
    assert clients(proxy.lines.requests) == [("2001:db8::7", "4711", "2001:db8::7")]
    assert upstream.requests[0].get(b"x-forwarded-for") == [b"2001:db8::7"]


@pytest.mark.parametrize("name", SILENT)
async def test_a_header_may_leave_the_peer_as_it_is(name: str) -> None:
    async with (
        serving(proxy_protocol_from=(LOCALHOST,)) as (proxy, upstream),
        open_client(proxy.port) as client,
    ):
        port = client.sock.getsockname()[1]
        await client.send(SILENT[name])
        assert (await client.get()).status == 200
    assert clients(proxy.lines.requests) == [(LOCALHOST, str(port), LOCALHOST)]
    assert upstream.requests[0].get(b"x-forwarded-for") == [b"127.0.0.1"]


@pytest.mark.parametrize("name", NOT_HEADERS)
async def test_who_owes_a_header_is_not_served_without(name: str) -> None:
    async with serving(proxy_protocol_from=(LOCALHOST,)) as (proxy, upstream):
        async with open_client(proxy.port) as client:
            await client.send(NOT_HEADERS[name] + REQUEST)
            await client.wait_closed()
            assert client.received == b""
        told = await proxy.lines.wait_for_message(REFUSED)
        await proxy.wait_streams(0)
    assert (told["level"], told["client_addr"]) == ("WARN", LOCALHOST)
    assert told["error"]
    assert [line["msg"] for line in proxy.lines.all].count(REFUSED) == 1
    assert proxy.lines.requests == []
    assert upstream.requests == []


@pytest.mark.parametrize("sent", [b"", BY_HAND[:-1], b"PROXY TCP4 198.51"])
async def test_who_leaves_before_the_header_is_whole(sent: bytes) -> None:
    """Load balancers do that all the time, to see whether somebody listens."""
    async with serving(proxy_protocol_from=(LOCALHOST,)) as (proxy, _):
        before = len(proxy.lines.all)
        async with open_client(proxy.port) as client:
            await client.send(sent)
            client.shutdown_write()
            assert await client.receive_eof() == b""
        await proxy.wait_streams(0)
        assert len(proxy.lines.all) == before


@pytest.mark.parametrize("name", NAMING)
async def test_who_is_not_listed_can_not_say_it(name: str) -> None:
    async with serving(proxy_protocol_from=(OTHER,)) as (proxy, upstream):
        async with open_client(proxy.port) as client:
            await client.send(NAMING[name] + REQUEST)
            assert (await client.receive_response()).status == 400
            await client.wait_closed()
        (line,) = await proxy.lines.wait_requests(1)
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200, "it owes none"
    assert (line["status"], line["reason"]) == (400, "bad_request")
    assert clients([line])[0][::2] == (LOCALHOST, LOCALHOST)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("trusted", "client", "vouched"),
    [
        ("192.0.2.0/24", "192.0.2.1", True),
        ("192.0.2.0/24", "198.51.100.1", False),
        (LOCALHOST, "198.51.100.1", False),  # that the connection's peer is trusted says nothing
    ],
)
async def test_trust_is_for_the_address_in_the_header(
    trusted: str, client: str, vouched: bool
) -> None:
    async with serving(proxy_protocol_from=(LOCALHOST,), trusted_proxies=(trusted,)) as served:
        proxy, upstream = served
        async with open_client(proxy.port) as connection:
            await connection.send(encode_v2((client, 1), DESTINATION))
            await connection.get(headers="X-Forwarded-For: 203.0.113.9\r\n")
    chain = f"203.0.113.9, {client}" if vouched else client
    assert upstream.requests[0].get(b"x-forwarded-for") == [chain.encode()]
    assert proxy.lines.requests[0]["remote_addr"] == ("203.0.113.9" if vouched else client)


@needs("curl", package="curl")
async def test_the_header_of_curl() -> None:
    async with serving(proxy_protocol_from=(LOCALHOST,)) as (proxy, _):
        done = await trio.run_process(
            ["curl", "-q", "-sS", "--noproxy", "*", "--haproxy-protocol",
             "-w", " %{http_code} %{local_port}", f"http://{LOCALHOST}:{proxy.port}/"],
            capture_stdout=True,
        )  # fmt: skip
    body, status, port = done.stdout.decode().split(" ")
    assert (body, status) == ("hello", "200")
    assert clients(proxy.lines.requests) == [(LOCALHOST, port, LOCALHOST)]


@pytest.mark.parametrize("sent", [b"", b"PROXY UNKNOWN xxxxxx", BY_HAND[:20]])
async def test_a_header_must_arrive_in_time(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    world: Opener = partial(open_world, tmp_path, monkeypatch)
    async with world(proxy_protocol_from=(CLIENT[0],), head_timeout=30.0) as here:
        client = here.connect()
        start = trio.current_time()

        async def send_slowly() -> None:
            for byte in sent:
                await client.send_all(bytes([byte]))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_slowly)
            assert await read_all(client) == b""
            assert trio.current_time() - start == pytest.approx(30)
            nursery.cancel_scope.cancel()
        assert here.logged == []


async def test_a_request_has_its_own_time_after_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    world: Opener = partial(open_world, tmp_path, monkeypatch)
    async with world(proxy_protocol_from=(CLIENT[0],), head_timeout=30.0) as here:
        client = here.connect()
        await trio.sleep(29)
        await client.send_all(BY_HAND)
        await trio.sleep(29)
        await client.send_all(GET)
        assert (await read_head(client)).endswith(b"hello")
        assert here.logged[0]["client_addr"] == "198.51.100.7"
