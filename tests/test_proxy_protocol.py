"""The PROXY protocol's headers: what its source gives as examples, every prefix, and any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.proxy_protocol import (
    MAX_LINE,
    MAX_SIZE,
    Address,
    Header,
    ProxyHeaderError,
    crc32c,
    encode_v2,
    parse_untrusted,
)
from tests.fuzzing import at_least

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
IPV4 = bytes.fromhex("c0000201 cb007105 d431 01bb")  # 192.0.2.1:54321 to 203.0.113.5:443
IPV4_SIDES = (("192.0.2.1", 54321), ("203.0.113.5", 443))
IPV6 = bytes.fromhex("20010db8000000000000000000000001 20010db80000000000000000000000ff 1000 0050")
IPV6_SIDES = (("2001:db8::1", 4096), ("2001:db8::ff", 80))
MAPPED = bytes.fromhex(
    "00000000000000000000ffffc0000201 00000000000000000000ffffcb007105 d431 01bb"
)
NEITHER = (None, None)
LONGEST6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

# What a load balancer of a cloud sends: checksum, an id of its own, padding.
OF_A_CLOUD = SIGNATURE + bytes.fromhex(
    "21110054 ac1f0771 ac1f0a1f c8f20050 030004 e8d6892d"
    "ea0017 01 767063652d30386432626631356661633530303163390400 24" + 36 * "00"
)


def v2(command: int, family: int, block: bytes = b"") -> bytes:
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, family, len(block)) + block


def field(kind: int, value: bytes = b"") -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def with_checksum(block: bytes, *, after: bytes = b"", wrong: int = 0) -> bytes:
    zeroed = v2(1, 0x11, block + field(3, bytes(4)) + after)
    checksum = struct.pack("!I", crc32c(zeroed) ^ wrong)
    return v2(1, 0x11, block + field(3, checksum) + after)


VALID: list[tuple[bytes, tuple[Address | None, Address | None]]] = [
    (
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        (("192.168.0.1", 56324), ("192.168.0.11", 443)),
    ),
    (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        (("255.255.255.255", 65535), ("255.255.255.255", 65535)),
    ),
    (b"PROXY TCP4 0.0.0.0 10.99.100.249 0 6553\r\n", (("0.0.0.0", 0), ("10.99.100.249", 6553))),
    (
        f"PROXY TCP6 {LONGEST6} {LONGEST6} 65535 65535\r\n".encode(),
        ((LONGEST6, 65535), (LONGEST6, 65535)),
    ),
    (b"PROXY TCP6 2001:DB8::1 :: 1 2\r\n", (("2001:db8::1", 1), ("::", 2))),
    (
        b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:cb00:7105 54321 443\r\n",
        IPV4_SIDES,
    ),
    (b"PROXY UNKNOWN\r\n", NEITHER),
    (f"PROXY UNKNOWN {LONGEST6} {LONGEST6} 65535 65535\r\n".encode(), NEITHER),
    (b"PROXY UNKNOWN \r\n", NEITHER),
    (b"PROXY UNKNOWN \xff\0 TCP4\r\n", NEITHER),
    (v2(1, 0x11, IPV4), IPV4_SIDES),
    (v2(1, 0x12, IPV4), IPV4_SIDES),
    (v2(1, 0x21, IPV6), IPV6_SIDES),
    (v2(1, 0x22, IPV6), IPV6_SIDES),
    (v2(1, 0x21, MAPPED), IPV4_SIDES),
    (v2(1, 0x11, IPV4 + field(1, b"h2") + field(0xE0) + field(4, bytes(300))), IPV4_SIDES),
    (v2(1, 0x11, IPV4 + field(4, bytes(MAX_SIZE - 16 - 12 - 3))), IPV4_SIDES),
    (with_checksum(IPV4), IPV4_SIDES),
    (with_checksum(IPV4 + field(2, b"app.test"), after=field(4)), IPV4_SIDES),
    (OF_A_CLOUD, (("172.31.7.113", 51442), ("172.31.10.31", 80))),
    # The connection's own addresses count.
    (v2(0, 0x00), NEITHER),
    (v2(0, 0x11, IPV4), NEITHER),
    (v2(0, 0xFF, b"\x03"), NEITHER),
    (v2(1, 0x00), NEITHER),
    (v2(1, 0x00, b"any bytes"), NEITHER),
    (v2(1, 0x31, bytes(216)), NEITHER),
    (v2(1, 0x32, bytes(216) + field(4)), NEITHER),
    (v2(1, 0x10, IPV4), NEITHER),
    (v2(1, 0x20, IPV6), NEITHER),
    (v2(1, 0x01), NEITHER),
]


@pytest.mark.parametrize(("raw", "sides"), VALID)
def test_headers(raw: bytes, sides: tuple[Address | None, Address | None]) -> None:
    expected = Header(len(raw), *sides)
    for rest in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", raw, bytes(MAX_SIZE)):
        assert parse_untrusted(raw + rest) == expected
        assert parse_untrusted(bytearray(raw + rest)) == expected


@pytest.mark.parametrize(("raw", "sides"), VALID)
def test_each_beginning_of_a_header_needs_more(raw: bytes, sides: object) -> None:
    for end in range(len(raw)):
        assert parse_untrusted(raw[:end]) is None
        assert parse_untrusted(bytearray(raw[:end])) is None


# What was refused, where the mark says: before that byte it could still become a header.
REFUSED = [
    "¦GET / HTTP/1.1\r\n",
    "P¦OST / HTTP/1.1\r\n",
    "PRO¦PFIND / HTTP/1.1\r\n",
    "PROXY ¦/ HTTP/1.1\r\n",
    "PROXY¦\r\n",
    "¦proxy TCP4",
    "¦ PROXY",
    "¦\x16\x03\x01",
    "\r\n¦GET",
    "\r\n\r\n\0\r\nQUIT¦\r",
    "PROXY ¦ TCP4",
    "PROXY TCP¦5",
    "PROXY TCP4¦\t",
    "PROXY TCP4 ¦ 1.2.3.4",
    "PROXY TCP4 1.2.3.25¦6 ",
    "PROXY TCP4 0¦1.2.3.4",
    "PROXY TCP4 1.2.3¦ ",
    "PROXY TCP4 1.2.3.4¦.5",
    "PROXY TCP4 1.¦.",
    "PROXY TCP4 ¦::1",
    "PROXY TCP4 1.2.3.4 ¦ ",
    "PROXY TCP4 1.2.3.4 ¦a",
    "PROXY TCP4 1.2.3.4 5.6.7.8¦\r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 6553¦6 1\r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 0¦1 1\r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 ¦+1 1\r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 1¦\r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 1 ¦\r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 1 2¦\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 1 2¦ \r\n",
    "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r¦GET",
    "PROXY TCP6 ¦g",
    "PROXY TCP6 ¦ ",
    "PROXY TCP6 fe80::1¦%eth0 ",
    "PROXY TCP6 ::1 ::2 1 2¦\n",
    "PROXY UNKNOWN¦X\r\n",
    "PROXY UNKNOWN¦\n",
    "PROXY UNKNOWN\r¦X",
    "PROXY UNKNOWN ¦\nGET / HTTP/1.1\r\n",
    "PROXY UNKNOWN a\r¦ b\r\n",
    "PROXY UNKNOWN a\r¦\r\n",
]


@pytest.mark.parametrize("text", REFUSED)
def test_a_line_is_refused_at_its_first_wrong_byte(text: str) -> None:
    right, _, rest = text.encode("latin-1").partition(b"\xa6")
    raw = right + rest
    for end in range(len(right) + 1):
        assert parse_untrusted(raw[:end]) is None
    for end in range(len(right) + 1, len(raw) + 1):
        with pytest.raises(ProxyHeaderError):
            parse_untrusted(raw[:end])


@pytest.mark.parametrize(
    "address", ["1::2::3", ":::", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "12345::", ":1", "1.2.3.4"]
)
def test_what_is_no_ipv6_address_is_refused_with_the_line(address: str) -> None:
    for sides in (f"{address} ::1", f"::1 {address}"):
        with pytest.raises(ProxyHeaderError, match="malformed IPv6 address"):
            parse_untrusted(f"PROXY TCP6 {sides} 1 2\r\n".encode())


def test_the_longest_line() -> None:
    longest = b"PROXY UNKNOWN " + b"x" * (MAX_LINE - 16) + b"\r\n"
    assert parse_untrusted(longest) == Header(107, None, None)
    over = longest.replace(b"\r\n", b"x\r\n")
    assert parse_untrusted(over[:105]) is None
    for end in range(106, 109):
        with pytest.raises(ProxyHeaderError, match="more than 107 bytes"):
            parse_untrusted(over[:end])


@pytest.mark.parametrize(
    ("raw", "size", "message"),
    [
        (SIGNATURE + b"\x11\x11", 13, "version 1 is not known"),
        (SIGNATURE + b"\x31\x11", 13, "version 3 is not known"),
        (SIGNATURE + b"\x22\x11", 13, "command 2 is not known"),
        (SIGNATURE + b"GET / HTTP", 13, "version 4 is not known"),
        (v2(1, 0x41), 14, "family 0x41 is not known"),
        (v2(1, 0x13), 14, "family 0x13 is not known"),
        (v2(1, 0x11, bytes(MAX_SIZE - 15)), 16, "more than 4096 bytes"),
        (v2(0, 0x00, bytes(MAX_SIZE - 15)), 16, "more than 4096 bytes"),
        (v2(1, 0x11, b"x" * 0x1100), 15, "more than 4096 bytes"),
        (v2(1, 0x11, IPV4[:11]), 16, "too short for its addresses"),
        (v2(1, 0x21, IPV6[:35]), 16, "too short for its addresses"),
        (v2(1, 0x31, bytes(215)), 16, "too short for its addresses"),
        (v2(1, 0x11, IPV4 + b"\x04"), 29, "a field of the PROXY protocol header exceeds it"),
        (v2(1, 0x11, IPV4 + b"\x04\x00"), 30, "a field of the PROXY protocol header exceeds it"),
        (v2(1, 0x11, IPV4 + b"\x04\x00\x01"), 31, "a field of the PROXY protocol header exceeds"),
        (v2(1, 0x31, bytes(216) + b"\x04"), 233, "a field of the PROXY protocol header exceeds it"),
        (v2(1, 0x11, IPV4 + field(3, bytes(3))), 34, "malformed checksum"),
        (with_checksum(IPV4, after=field(3, bytes(4))), 42, "malformed checksum"),
        (with_checksum(IPV4, wrong=1), 35, "checksum is wrong"),
        (with_checksum(IPV4, wrong=1 << 31), 35, "checksum is wrong"),
        (OF_A_CLOUD.replace(b"vpce", b"vpcf"), 100, "checksum is wrong"),
    ],
)
def test_a_binary_header_is_refused_as_soon_as_it_is_wrong(
    raw: bytes, size: int, message: str
) -> None:
    assert parse_untrusted(raw[: size - 1]) is None
    for end in (size, len(raw)):
        with pytest.raises(ProxyHeaderError, match=message):
            parse_untrusted(raw[:end])


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        # RFC 3720 B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_checksums(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


def test_writing() -> None:
    assert encode_v2(*IPV4_SIDES) == v2(1, 0x11, IPV4)
    assert encode_v2(*IPV6_SIDES, datagram=True) == v2(1, 0x22, IPV6)
    both = encode_v2(IPV4_SIDES[0], IPV6_SIDES[1], datagram=False)
    assert both == v2(1, 0x21, MAPPED[:16] + IPV6[16:32] + IPV4[8:10] + IPV6[34:])
    assert encode_v2(("fe80::1%eth0", 1), ("::1", 2)) == encode_v2(("fe80::1", 1), ("::1", 2))
    assert encode_v2(("::ffff:192.0.2.1", 54321), IPV4_SIDES[1]) == v2(1, 0x11, IPV4)


@pytest.mark.parametrize("source", [("", 1), ("app.test", 1), ("192.0.2.1", -1), ("::1", 65536)])
def test_what_can_not_be_written(source: Address) -> None:
    for sides in ((source, ("192.0.2.1", 1)), (("192.0.2.1", 1), source)):
        with pytest.raises(ValueError, match=f"'{source[0]}'|{source[1]}"):
            encode_v2(*sides)


PORTS = st.integers(0, 65535)
ADDRESSES = st.tuples(st.ip_addresses(v=4) | st.ip_addresses(v=6), PORTS)


def mapped(address: object) -> str:
    return str(getattr(address, "ipv4_mapped", None) or address)


@pytest.mark.fuzz
@at_least(300)
@given(ADDRESSES, ADDRESSES, st.booleans(), st.binary(max_size=30))
def test_what_is_written_is_read(
    source: tuple[object, int], destination: tuple[object, int], datagram: bool, rest: bytes
) -> None:
    sides = [(str(address), port) for address, port in (source, destination)]
    raw = encode_v2(*sides, datagram=datagram)
    expected = [(mapped(address), port) for address, port in (source, destination)]
    assert parse_untrusted(raw + rest) == Header(len(raw), *expected)
    line = b"PROXY TCP%d %b %b %d %d\r\n"
    versions = {"." if ":" not in text else ":" for text, _ in sides}
    if len(versions) == 1:
        (source_text, source_port), (destination_text, destination_port) = sides
        raw = line % (
            4 if versions == {"."} else 6,
            source_text.encode(),
            destination_text.encode(),
            source_port,
            destination_port,
        )
        assert parse_untrusted(raw + rest) == Header(len(raw), *expected)
        for end in range(len(raw)):
            assert parse_untrusted(raw[:end]) is None


BINARY = st.builds(
    lambda command, family, block, size, rest: (
        SIGNATURE + struct.pack("!BBH", command, family, size or len(block)) + block + rest
    ),
    st.sampled_from([0x20, 0x21]) | st.integers(0, 255),
    st.sampled_from([0, 0x11, 0x12, 0x21, 0x22, 0x31, 0x10]) | st.integers(0, 255),
    st.binary(max_size=60)
    | st.lists(st.builds(field, st.integers(0, 6), st.binary(max_size=5)), max_size=8).map(
        lambda fields: IPV4 + b"".join(fields)
    ),
    st.just(0) | st.integers(0, 65535),
    st.binary(max_size=5),
)
LINES = st.lists(
    st.sampled_from(
        [b"PROXY ", b"TCP4 ", b"TCP6 ", b"UNKNOWN", b"1.2.3.4", b"::1", b" ", b"80", b"\r", b"\n"]
    )
    | st.binary(max_size=3),
    max_size=14,
).map(b"".join)


def outcome(data: bytes) -> Header | ProxyHeaderError | None:
    try:
        return parse_untrusted(data)
    except ProxyHeaderError as error:
        return error


@pytest.mark.fuzz
@at_least(500)
@given(st.binary() | BINARY | LINES | LINES.map(lambda line: b"PROXY " + line + b"\r\n"))
def test_any_bytes(data: bytes) -> None:
    found = [outcome(data[:end]) for end in range(len(data) + 1)]
    # More bytes are needed for a while, and then the verdict does not change any more.
    settled = [each for each in found if each is not None]
    assert found[: len(found) - len(settled)] == [None] * (len(found) - len(settled))
    if settled and isinstance(settled[0], Header):
        assert settled[0].size == len(found) - len(settled), "known with its last byte"
        assert all(each == settled[0] for each in settled)
        assert settled[0].size <= MAX_SIZE
    else:
        assert all(isinstance(each, ProxyHeaderError) for each in settled)
