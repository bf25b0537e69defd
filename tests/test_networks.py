"""Networks: which addresses are in them, however they are written."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.networks import Networks, parse_address
from tests.fuzzing import at_least

NETWORKS = Networks(["192.0.2.0/24", "10.1.2.3", "2001:db8::/32", "fe80::/10", "::1"])


@pytest.mark.parametrize(
    "address",
    [
        "192.0.2.0",
        "192.0.2.255",
        "::ffff:192.0.2.7",
        "::FFFF:c000:0207",
        "0:0:0:0:0:ffff:192.0.2.7",
        "10.1.2.3",
        "2001:db8::",
        "2001:0DB8:ffff::1",
        "fe80::1",
        "fe80::1%eth0",
        "::1",
        "0::0:1",
    ],
)
def test_addresses_inside(address: str) -> None:
    assert address in NETWORKS
    assert address in NETWORKS, "the answer that was kept"


@pytest.mark.parametrize(
    "address",
    [
        "192.0.3.0",
        "192.0.1.255",
        "10.1.2.4",
        "2001:db9::",
        "::2",
        "::192.0.2.7",
        "::ffff:10.1.2.4",
        "",
        "unknown",
        "localhost",
        "192.0.2.7:80",
        "[::1]",
        " 192.0.2.7",
        "192.0.2.7\n",
        "192.0.2.007",
        "192.0.2",
        "192.0.2.0/24",
        "192.0.2.7%eth0",
        "fe80::1%",
        "fe80::1%a%b",
        "fe80::1%" + "a" * 100,
        "١٩٢.0.2.7",
        "\udcff",
    ],
)
def test_addresses_outside_and_what_is_none(address: str) -> None:
    assert address not in NETWORKS
    assert address not in NETWORKS, "the answer that was kept"


def test_no_networks() -> None:
    assert not Networks([])
    assert "127.0.0.1" not in Networks([])
    assert NETWORKS


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("0.0.0.0/0", ["1.2.3.4", "::ffff:1.2.3.4"], ["::1", "::"]),
        # Unlike all of IPv6, which has no IPv4 address in it.
        ("::/0", ["::1", "2001:db8::1"], ["1.2.3.4", "::ffff:1.2.3.4"]),
        ("::ffff:10.0.0.0/104", ["10.9.9.9", "::ffff:10.0.0.1"], ["11.0.0.0", "::10.0.0.1"]),
        ("::ffff:0:0/96", ["1.2.3.4"], ["::1"]),
        ("::ffff:192.0.2.1", ["192.0.2.1"], ["192.0.2.2"]),
        ("fe80::1%eth0", ["fe80::1", "fe80::1%eth1"], ["fe80::2"]),
    ],
)
def test_networks_of_either_version(network: str, inside: list[str], outside: list[str]) -> None:
    networks = Networks([network])
    assert [address for address in inside + outside if address in networks] == inside


def test_what_is_no_network_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.300"):
        Networks(["10.0.0.300"])


def test_answers_are_bounded_and_stay_right() -> None:
    networks = Networks(["10.0.0.0/8"])
    for number in range(5000):
        address = IPv4Address(number * 1_000_003 % 2**32)
        assert (str(address) in networks) == (int(address) >> 24 == 10)
        assert "x" * (number % 100 + 1) not in networks
    answers = networks._answers
    assert 0 < len(answers) <= 1024
    assert max(map(len, answers)) <= 64


def test_parsing() -> None:
    assert parse_address("::ffff:192.0.2.1") == IPv4Address("192.0.2.1")
    assert parse_address("2001:DB8::1") == IPv6Address("2001:db8::1")
    assert str(parse_address("fe80::1%eth0")) == "fe80::1%eth0"
    assert parse_address("nothing") is None


ADDRESSES = st.ip_addresses()
SOME_NETWORKS = st.one_of(
    st.builds(
        lambda number, length: IPv4Network((number, length), strict=False),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        # Those around IPv4 in IPv6 have a table of their own above.
        lambda number, length: IPv6Network((number | 1 << 127, length), strict=False),
        st.integers(0, 2**128 - 1),
        st.integers(1, 128),
    ),
)


@pytest.mark.fuzz
@at_least(300)
@given(st.lists(SOME_NETWORKS, max_size=5), ADDRESSES, st.integers(0, 128))
def test_as_the_standard_library_says(
    known: list[IPv4Network | IPv6Network], address: IPv4Address | IPv6Address, near: int
) -> None:
    networks = Networks(map(str, known))
    asked = [address]
    for network in known:
        asked.append(network.network_address)
        asked.append(network.broadcast_address)
        number = int(network.network_address) ^ 1 << near % network.max_prefixlen
        asked.append(type(network.network_address)(number))
    for each in asked:
        mapped = each.ipv4_mapped if isinstance(each, IPv6Address) else None
        plain = mapped or each
        expected = any(plain in network for network in known if network.version == plain.version)
        assert (str(each) in networks) == expected


@pytest.mark.fuzz
@at_least(300)
@given(st.text() | st.text("0123456789abcdef:.%/[] "))
def test_any_text(text: str) -> None:
    everything = Networks(["0.0.0.0/0", "::/0"])
    address = parse_address(text)
    assert (text in everything) == (address is not None)
    if address is not None:
        assert ip_network(str(address).partition("%")[0]).prefixlen == address.max_prefixlen
        assert ip_address(text)
