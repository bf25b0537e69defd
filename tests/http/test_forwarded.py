"""Forwarded (RFC 7239) read and written, and which address of a chain is the client's."""

from __future__ import annotations

import re
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.forwarded import (
    MAX_ELEMENTS,
    Element,
    element,
    nearest_untrusted,
    node_address,
    parse_untrusted,
)
from kamal_proxy.networks import Networks, parse_address
from tests.fuzzing import at_least


@pytest.mark.parametrize(
    ("value", "elements"),
    [
        # RFC 7239 4, 6.3, 7.1 and 7.4
        (b'for="_gazonk"', [Element("_gazonk")]),
        (b'For="[2001:db8:cafe::17]:4711"', [Element("[2001:db8:cafe::17]:4711")]),
        (
            b"for=192.0.2.60;proto=http;by=203.0.113.43",
            [Element("192.0.2.60", by="203.0.113.43", proto="http")],
        ),
        (b"for=192.0.2.43, for=198.51.100.17", [Element("192.0.2.43"), Element("198.51.100.17")]),
        (b"for=_hidden, for=_SEVKISEK", [Element("_hidden"), Element("_SEVKISEK")]),
        (
            b'for=192.0.2.43, for="[2001:db8:cafe::17]"',
            [Element("192.0.2.43"), Element("[2001:db8:cafe::17]")],
        ),
        (
            b'for=192.0.2.43,for="[2001:db8:cafe::17]",for=unknown',
            [Element("192.0.2.43"), Element("[2001:db8:cafe::17]"), Element("unknown")],
        ),
        (
            b"for=192.0.2.43, for=198.51.100.17;by=203.0.113.60;proto=http;host=example.com",
            [
                Element("192.0.2.43"),
                Element("198.51.100.17", "203.0.113.60", "example.com", "http"),
            ],
        ),
        # Case of the names, quoting, order, unknown parameters.
        (
            b'HOST="app.test:8080";Proto=HTTPS;secret="a,b;c=\\"d\\"";FOR="1.2.3.4:_x"',
            [Element("1.2.3.4:_x", "", "app.test:8080", "HTTPS")],
        ),
        (b'host="a\\\\b\\"c\\d"', [Element(host='a\\b"cd')]),
        (b'host="\t\xe9~";for=""', [Element(host="\t\xe9~")]),
        # Nothing, and what lists may have.
        (b"", []),
        (b" \t", []),
        (b",, ,", []),
        (b" , for=_a ,\t,for=_b,", [Element("_a"), Element("_b")]),
        (b";", [Element()]),
        (b";;for=_a; ;proto=http ; , ;", [Element("_a", proto="http"), Element()]),
        (b"for=_a" + b"," * 5000, [Element("_a")]),
    ],
)
def test_forwarded_fields(value: bytes, elements: list[Element]) -> None:
    assert parse_untrusted(value) == elements


@pytest.mark.parametrize(
    "value",
    [
        b"for",
        b"for=",
        b"=1",
        b"for =_a",
        b"for= _a",
        b"for=_a proto=http",
        b'for="_a"proto=http',
        b'for="_a',
        b'for="_a\\"',
        b'for="_a\\',
        b'for=_a"',
        b'for="a\r\nb"',
        b'for="a\\\x00b"',
        b"for='192.0.2.1:80'",
        b"for=[::1]",
        b"for=192.0.2.1:80",
        b"for=_a;for=_b",
        b"for=_a;FOR=_a",
        b"x=1;x=2",
        b"for=_a, for",
        b"for=_a\x00",
        b"for=\xe9",
        b"f\xf6r=_a",
        b"for=_a\n",
    ],
)
def test_malformed_fields(value: bytes) -> None:
    assert parse_untrusted(value) is None
    assert parse_untrusted(b"for=_z, " + value) is None


def test_elements_are_bounded() -> None:
    most = b",".join([b"for=_a"] * MAX_ELEMENTS)
    assert parse_untrusted(most) == [Element("_a")] * MAX_ELEMENTS
    assert parse_untrusted(most + b", ,") == [Element("_a")] * MAX_ELEMENTS
    assert parse_untrusted(most + b",for=_a") is None
    assert parse_untrusted(most + b",;") is None


ADDRESSES = [
    ("192.0.2.1", "192.0.2.1"),
    ("192.0.2.1:80", "192.0.2.1"),
    ("192.0.2.1:_port", "192.0.2.1"),
    ("255.255.255.255:65535", "255.255.255.255"),
    ("2001:DB8:0:0::1", "2001:db8::1"),
    ("[2001:db8::1]", "2001:db8::1"),
    ("[2001:db8::1]:80", "2001:db8::1"),
    ("[::1]:_a.b-c_d", "::1"),
    ("::", "::"),
    ("::ffff:192.0.2.1", "192.0.2.1"),
    ("[::ffff:c000:201]:80", "192.0.2.1"),
    ("1111:2222:3333:4444:5555:6666:7777:8888", "1111:2222:3333:4444:5555:6666:7777:8888"),
]
NOT_ADDRESSES = [
    "",
    "unknown",
    "unknown:80",
    "_hidden",
    "localhost",
    "-",
    "192.0.2",
    "192.0.2.1.5",
    "192.0.2.01",
    "192.0.2.256",
    " 192.0.2.1",
    "192.0.2.1\n",
    "192.0.2.1:",
    "192.0.2.1:123456",
    "192.0.2.1:http",
    "192.0.2.1:-1",
    "192.0.2.1:80:80",
    "[192.0.2.1]",
    "[::1",
    "::1]",
    "[::1]80",
    "[::1]:",
    "[[::1]]",
    "[]",
    "fe80::1%eth0",
    "[fe80::1%25eth0]:80",
    "1::2::3",
    "12345::1",
    "2001:db8::1, 192.0.2.1",
    "١٩٢.0.2.1",
    "192.0.2.1:٨٠",
    "9" * 10_000,
    ":" * 10_000,
]


@pytest.mark.parametrize(("node", "address"), ADDRESSES)
def test_addresses_of_nodes(node: str, address: str) -> None:
    assert node_address(node) == address
    assert Element(for_=node, by="203.0.113.9").address == address


@pytest.mark.parametrize("node", NOT_ADDRESSES)
def test_nodes_without_an_address(node: str) -> None:
    assert node_address(node) == ""
    assert Element(for_=node, by="203.0.113.9").address == ""


@pytest.mark.parametrize(
    ("client", "host", "proto", "written"),
    [
        ("192.0.2.1", b"app.test", "http", b"for=192.0.2.1;host=app.test;proto=http"),
        (b"192.0.2.1", b"app.test:80", "https", b'for=192.0.2.1;host="app.test:80";proto=https'),
        ("2001:DB8::1", b"[::1]:80", "http", b'for="[2001:db8::1]";host="[::1]:80";proto=http'),
        (b"::ffff:192.0.2.1", b"", "", b"for=192.0.2.1"),
        ("fe80::1%eth0", b"", "http", b'for="[fe80::1]";proto=http'),
        ("", b"", "", b"for=unknown"),
        ("_hidden", b"a", "", b"for=_hidden;host=a"),
        ("app.test", b"a", "", b"for=unknown;host=a"),
        ("_a;by=_b", b'a"\\;by=_b', "a b", b'for=unknown;host="a\\"\\\\;by=_b";proto="a b"'),
        ("192.0.2.1:80", b"\xe9", "\xe9", b'for=unknown;host="\xe9";proto="\xe9"'),
        ("192.0.2.1", b"a\r\nb", "a\0", b"for=192.0.2.1"),
        ("192.0.2.1", b"a\n", "", b"for=192.0.2.1"),
        ("192.0.2.1", b"a\x7f", "\u0661", b'for=192.0.2.1;proto="?"'),
    ],
)
def test_writing(client: bytes | str, host: bytes, proto: str, written: bytes) -> None:
    assert element(client, host, proto) == written


TRUSTED = Networks(["10.0.0.0/8", "fd00::/8"])


@pytest.mark.parametrize(
    ("chain", "peer", "client"),
    [
        ([], "192.0.2.1", "192.0.2.1"),
        ([], "10.0.0.1", "10.0.0.1"),
        ([], "", ""),
        # Nobody but the trusted is believed.
        (["203.0.113.7"], "192.0.2.1", "192.0.2.1"),
        (["203.0.113.7"], "", ""),
        (["203.0.113.7"], "10.0.0.1", "203.0.113.7"),
        (["203.0.113.7"], "::ffff:10.0.0.1", "203.0.113.7"),
        (["198.51.100.1", "203.0.113.7"], "10.0.0.1", "203.0.113.7"),
        (["198.51.100.1", "203.0.113.7", "10.0.0.2"], "10.0.0.1", "203.0.113.7"),
        (["203.0.113.7", "fd00::1", "[fd00::2]:80"], "10.0.0.1", "203.0.113.7"),
        (["10.9.9.9", "203.0.113.7:56", "10.0.0.2:57"], "fd00::9", "203.0.113.7"),
        (["[2001:DB8::1]:56", "::ffff:10.0.0.2"], "10.0.0.1", "2001:db8::1"),
        # All are trusted: the farthest.
        (["10.0.0.3", "10.0.0.2"], "10.0.0.1", "10.0.0.3"),
        # Nothing behind what is no address.
        (["203.0.113.7", "unknown"], "10.0.0.1", "10.0.0.1"),
        (["203.0.113.7", "", "10.0.0.2"], "10.0.0.1", "10.0.0.2"),
        (["unknown", "10.0.0.2"], "10.0.0.1", "10.0.0.2"),
        (["203.0.113.7", "10.0.0.2 "], "10.0.0.1", "10.0.0.1"),
        (["fe80::1%\x1b[31m", "10.0.0.2"], "10.0.0.1", "10.0.0.2"),
        (["nonsense", "203.0.113.7", "10.0.0.2"], "10.0.0.1", "203.0.113.7"),
    ],
)
def test_the_nearest_untrusted(chain: list[str], peer: str, client: str) -> None:
    assert nearest_untrusted(chain, TRUSTED, peer) == client
    assert nearest_untrusted(tuple(chain), TRUSTED, peer) == client


def test_without_trusted_networks_the_peer_is_the_client() -> None:
    assert nearest_untrusted(["203.0.113.7"], Networks([]), "10.0.0.1") == "10.0.0.1"


def test_the_walk_is_bounded() -> None:
    chain = ["203.0.113.7", *(f"10.1.0.{number}" for number in range(MAX_ELEMENTS))]
    assert nearest_untrusted(chain, TRUSTED, "10.0.0.1") == "10.1.0.0"
    assert nearest_untrusted(chain[:-1], TRUSTED, "10.0.0.1") == "203.0.113.7"


CONTROLS = bytes([*range(9), *range(10, 32), 127])
TEXTS = st.binary(max_size=12).map(lambda raw: raw.translate(None, CONTROLS))
NODES = (
    st.ip_addresses().map(str)
    | st.sampled_from(["unknown", "_hidden", "", "10.1.2.3", "fd00::5"])
    | st.text("0123456789abcdef:.[]_%", max_size=20)
    | st.text(max_size=10)
)


@pytest.mark.fuzz
@at_least(300)
@given(st.lists(st.tuples(NODES, TEXTS, st.sampled_from(["http", "https"])), max_size=4))
def test_what_is_written_is_read(told: list[tuple[str, bytes, str]]) -> None:
    value = b", ".join(element(client, host, proto) for client, host, proto in told)
    found = parse_untrusted(value)
    assert found is not None
    assert len(found) == len(told)
    for each, (client, host, proto) in zip(found, told, strict=True):
        assert each == Element(each.for_, "", host.decode("latin-1"), proto)
        address = parse_address(client)
        if address is not None:
            assert each.address == str(address).partition("%")[0]
        else:
            assert each.for_ == (client if re.fullmatch(r"_[A-Za-z0-9._-]+", client) else "unknown")


FIELD = st.lists(
    st.sampled_from(
        [b"for=", b"By=", b"host=", b"x=", b"1.2.3.4", b'"[::1]:80"', b'"', b"\\", b",", b";", b" "]
    )
    | st.binary(max_size=3),
    max_size=20,
).map(b"".join)


@pytest.mark.fuzz
@at_least(500)
@given(st.binary() | FIELD)
def test_any_bytes(value: bytes) -> None:
    found = parse_untrusted(value)
    assert found is None or len(found) <= MAX_ELEMENTS
    for each in found or ():
        assert each.address == "" or node_address(each.address) == each.address
    # What is understood means the same before and behind another one.
    other = Element("_z", proto="http")
    both = None if found is None else [*found, other]
    assert parse_untrusted(value + b",for=_z;proto=http") == both
    both = None if found is None else [other, *found]
    assert parse_untrusted(b"for=_z;proto=http," + value) == both


@pytest.mark.fuzz
@at_least(300)
@given(st.lists(NODES, max_size=6), NODES)
def test_any_chain(chain: list[str], peer: str) -> None:
    told = takewhile(bool, map(node_address, reversed(chain)))
    path = [peer, *told]
    expected = next((each for each in path if each not in TRUSTED), path[-1])
    assert nearest_untrusted(chain, TRUSTED, peer) == expected
