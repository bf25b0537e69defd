"""What the relay makes of a datagram: known ones, and any bytes against the slow twin."""

from __future__ import annotations

import struct

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kamal_proxy._fastpath import look_at
from tests.fuzzing import at_least
from tests.reference import media
from tests.reference.media import ALERT, BYE, ERROR_CODE, RR, SDES, SR, Looked

COOKIE = 0x2112A442
HANDSHAKE, DATA = 22, 23
CNAME, NAME = 1, 2
OTHER = Looked("other")

# RFC 5769 2.2, the sample answer over IPv4.
PUBLISHED_SUCCESS = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220"
    "002000080001a147e112a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)


# What datagrams are made of


def attribute(kind: int, value: bytes, *, more: int = 0) -> bytes:
    """Return an attribute that says to have ``more`` bytes than it has."""
    return struct.pack("!HH", kind, len(value) + more) + value + bytes(-len(value) % 4)


def stun(kind: int, body: bytes = b"", *, cookie: int = COOKIE, more: int = 0) -> bytes:
    return struct.pack("!HHI", kind, len(body) + more, cookie) + bytes(12) + body


def code(hundreds: int, rest: int, reason: bytes = b"") -> bytes:
    return attribute(ERROR_CODE, bytes([0, 0, hundreds, rest]) + reason)


def record(
    kind: int, epoch: int = 0, body: bytes = bytes(4), *, version: int = 0xFEFD, more: int = 0
) -> bytes:
    header = struct.pack("!BHHHI", kind, version, epoch, 0, 1)
    return header + struct.pack("!H", len(body) + more) + body


def packet(kind: int, count: int, body: bytes, *, first: int = 0x80, more: int = 0) -> bytes:
    """Return an RTCP packet; ``more`` are 32-bit words."""
    return struct.pack("!BBH", first | count, kind, len(body) // 4 + more) + body


def numbers(*ssrcs: int) -> bytes:
    return struct.pack(f"!{len(ssrcs)}I", *ssrcs)


def chunk(ssrc: int, *items: tuple[int, bytes]) -> bytes:
    text = b"".join(bytes([kind, len(value)]) + value for kind, value in items)
    return numbers(ssrc) + text + bytes(4 - len(text) % 4)


def rtcp(*packets: bytes) -> bytes:
    return b"".join((packet(RR, 0, numbers(7)), *packets))


def plain(
    senders: tuple[int, ...] = (7,), byes: tuple[int, ...] = (), cname: bytes = b""
) -> Looked:
    """Return what RTCP is, by default of the sender that ``rtcp`` begins with."""
    return Looked("rtcp", plain=True, senders=senders, byes=byes, cname=cname)


def look(data: bytes | bytearray | memoryview) -> Looked:
    return Looked(*look_at(data))


# Known datagrams

FIRST_BYTES = {
    "stun": range(4),
    "dtls": range(20, 64),
    "turn": range(64, 80),
    "rtp": range(128, 192),
}


@pytest.mark.parametrize("second", [0, 96, 191, 192, 200, 223, 224, 255])
def test_the_first_bytes_tell_the_protocol(second: int) -> None:
    """RFC 7983 section 7, RFC 5761 section 4."""
    for first in range(256):
        data = bytes([first, second]) + struct.pack("!HI", 20, COOKIE) + bytes(32)
        kinds = [kind for kind, of in FIRST_BYTES.items() if first in of] or ["other"]
        if kinds == ["rtp"] and second in range(192, 224):
            kinds = ["rtcp"]
        if kinds == ["stun"]:
            data = data[:40]
        assert look(data).kind == kinds[0]
        assert media.look_at(data).kind == kinds[0]


STUN = [
    (PUBLISHED_SUCCESS, Looked("stun", 0x0101)),
    (stun(0x0001), Looked("stun", 0x0001)),
    (stun(0x03FF), Looked("stun", 0x03FF)),
    (stun(0x0111), Looked("stun", 0x0111)),
    (stun(0x0111, code(4, 87)), Looked("stun", 0x0111, 487)),
    (stun(0x0111, code(4, 1, b"Unauthorized")), Looked("stun", 0x0111, 401)),
    (stun(0x0111, code(0xFC, 0)), Looked("stun", 0x0111, 400)),
    (stun(0x0111, attribute(0x8022, b"odd") + code(4, 87)), Looked("stun", 0x0111, 487)),
    (stun(0x0111, code(4, 0) + code(4, 87)), Looked("stun", 0x0111, 400)),
    (stun(0x0111, code(3, 0)), Looked("stun", 0x0111, 300)),
    (stun(0x0111, code(6, 99)), Looked("stun", 0x0111, 699)),
    (stun(0x0111, code(2, 99)), Looked("stun", 0x0111)),
    (stun(0x0111, code(7, 0)), Looked("stun", 0x0111)),
    (stun(0x0111, code(4, 100)), Looked("stun", 0x0111)),
    (stun(0x0111, code(3, 187) + code(4, 87)), Looked("stun", 0x0111)),
    (stun(0x0111, code(4, 87) + attribute(0x8022, b"", more=4)), Looked("stun", 0x0111, 487)),
    (stun(0x0111, attribute(ERROR_CODE, b"abc") + code(4, 87)), Looked("stun", 0x0111)),
    (stun(0x0111, attribute(ERROR_CODE, b"\0\0\4\x57", more=1)), Looked("stun", 0x0111)),
    (stun(0x0111, attribute(0x8022, b"", more=9) + code(4, 87)), Looked("stun", 0x0111)),
    (stun(0x0001, code(4, 87)), Looked("stun", 0x0001)),
    (stun(0x0101, code(4, 87)), Looked("stun", 0x0101)),
    (stun(0x0001, cookie=COOKIE ^ 1), OTHER),
    (stun(0x0001, cookie=COOKIE ^ 1 << 31), OTHER),
    (stun(0x0001, more=4), OTHER),
    (stun(0x0001, bytes(4), more=-4), OTHER),
    (stun(0x0001, bytes(2)), OTHER),
    (stun(0x0401), OTHER),  # a first byte of 4
    (stun(0x0001)[:19], OTHER),
    (b"\0", OTHER),
    (b"", OTHER),
]
DTLS = [
    (record(HANDSHAKE), Looked("dtls")),
    (record(ALERT), Looked("dtls")),  # in the clear, so anybody's
    (record(ALERT, 1), Looked("dtls", alert=True)),
    (record(ALERT, 65535), Looked("dtls", alert=True)),
    (record(ALERT, 256), Looked("dtls", alert=True)),
    (record(ALERT, 1, b""), Looked("dtls", alert=True)),
    (record(ALERT, 1, version=0xFEFF), Looked("dtls", alert=True)),
    (record(ALERT, 1, version=0x0303), Looked("dtls")),
    (record(DATA, 1), Looked("dtls")),
    (record(DATA, 1) + record(ALERT, 1), Looked("dtls", alert=True)),
    (record(ALERT, 1) + b"rest", Looked("dtls", alert=True)),
    (record(HANDSHAKE) * 30 + record(ALERT, 2), Looked("dtls", alert=True)),
    (record(ALERT) + record(ALERT, 1), Looked("dtls", alert=True)),
    (record(DATA, more=1) + record(ALERT, 1), Looked("dtls")),
    (record(DATA, more=65531) + record(ALERT, 1), Looked("dtls")),
    (record(ALERT, 1, more=1), Looked("dtls")),
    (record(ALERT, 1)[:-1], Looked("dtls")),
    (record(ALERT, 1, b"")[:12], Looked("dtls")),
    (b"\x14", Looked("dtls")),
    (b"\x3f" * 40, Looked("dtls")),
]
RTP = [
    (b"\x80\x60" + bytes(6) + b"\x89\xab\xcd\xef" + b"voice", Looked("rtp", ssrc=0x89ABCDEF)),
    (b"\xbf\xff" + bytes(6) + b"\x00\x00\x00\x01", Looked("rtp", ssrc=1)),
    (b"\x80\xbf" + bytes(10), Looked("rtp")),
    (b"\x80\xe0" + bytes(10), Looked("rtp")),
    (b"\x80\x60" + bytes(9), OTHER),
    (b"\x80", OTHER),
    (b"\x40\x01voice", Looked("turn")),
    (b"\x4f", Looked("turn")),
]
RTCP = [
    (rtcp(), plain()),
    (packet(SR, 0, numbers(9, 1, 2, 3, 4, 5)), plain(senders=(9,))),
    (rtcp(packet(SR, 0, numbers(9, 1, 2, 3, 4, 5))), plain(senders=(7, 9))),
    (rtcp(packet(RR, 1, b"")), plain()),  # no room for who sends it
    (packet(RR, 1, numbers(9, 1, 2, 3, 4, 5, 6)), plain(senders=(9,))),
    (packet(206, 1, numbers(1, 2)), plain(senders=())),
    (rtcp(packet(BYE, 2, numbers(8, 9))), plain(byes=(8, 9))),
    (rtcp(packet(BYE, 1, numbers(8, 9))), plain(byes=(8,))),
    (rtcp(packet(BYE, 3, numbers(8, 9))), plain(byes=(8, 9))),
    (rtcp(packet(BYE, 0, b"")), plain()),
    (rtcp(packet(BYE, 31, b"")), plain()),
    (rtcp(packet(BYE, 31, numbers(*range(31)))), plain(byes=tuple(range(31)))),
    (rtcp(packet(BYE, 1, numbers(8)), packet(BYE, 1, numbers(6))), plain(byes=(8, 6))),
    (rtcp(packet(BYE, 1, numbers(8) + b"\3bye")), plain(byes=(8,))),
    (rtcp(packet(BYE, 1, numbers(8), first=0xA0)), plain(byes=(8,))),  # padding
    (packet(BYE, 1, numbers(8)), plain(senders=(), byes=(8,))),  # RFC 5506
    (rtcp(packet(SDES, 1, chunk(7, (CNAME, b"a@b")))), plain(cname=b"a@b")),
    (rtcp(packet(SDES, 1, chunk(7, (CNAME, b"n" * 255)))), plain(cname=b"n" * 255)),
    (rtcp(packet(SDES, 1, chunk(7, (NAME, b"you"), (CNAME, b"a@b")))), plain(cname=b"a@b")),
    (rtcp(packet(SDES, 1, chunk(7, (CNAME, b""), (CNAME, b"a@b")))), plain()),
    (
        rtcp(packet(SDES, 2, chunk(7, (NAME, b"12")) + chunk(8, (CNAME, b"second")))),
        plain(cname=b"second"),
    ),
    (rtcp(packet(SDES, 3, chunk(7) + chunk(8) + chunk(9, (CNAME, b"c")))), plain(cname=b"c")),
    (rtcp(packet(SDES, 1, chunk(7) + chunk(8, (CNAME, b"uncounted")))), plain()),
    (rtcp(packet(SDES, 0, chunk(7, (CNAME, b"uncounted")))), plain()),
    (rtcp(packet(SDES, 0, b"")), plain()),
    (rtcp(packet(SDES, 9, b"")), plain()),
    (rtcp(packet(SDES, 9, numbers(7))), plain()),
    (
        rtcp(
            packet(SDES, 1, chunk(7, (NAME, b"x"))),
            packet(SDES, 1, chunk(7, (CNAME, b"a"))),
            packet(SDES, 1, chunk(8, (CNAME, b"b"))),
        ),
        plain(cname=b"a"),
    ),
    # Without the zeros that should end a chunk, and with an item that exceeds its packet.
    (rtcp(packet(SDES, 1, numbers(7) + b"\1\2ab")), plain(cname=b"ab")),
    (rtcp(packet(SDES, 2, numbers(7) + b"\2\2ab" + chunk(8, (CNAME, b"c")))), plain()),
    (rtcp(packet(SDES, 1, numbers(7) + b"\1\3ab")), plain()),
    (rtcp(packet(SDES, 1, numbers(7) + b"\2\1a\1")), plain()),
    (rtcp(packet(SDES, 2, numbers(7) + b"\2\xffab" + chunk(8, (CNAME, b"c")))), plain()),
    (
        rtcp(packet(SDES, 1, numbers(7) + b"\1\3ab"), packet(SDES, 1, chunk(7, (CNAME, b"c")))),
        plain(cname=b"c"),
    ),
    # Lengths that do not add up, as those of SRTCP, whose first header is in the clear.
    (rtcp() + bytes(14), Looked("rtcp")),
    (rtcp(bytes(4)), Looked("rtcp")),
    (rtcp() + b"\x80", Looked("rtcp")),
    (rtcp() + b"\x80\xc9\0", Looked("rtcp")),
    (packet(RR, 0, numbers(7), more=1), Looked("rtcp")),
    (packet(RR, 0, numbers(7), more=65534), Looked("rtcp")),
    (packet(RR, 0, b"") + packet(BYE, 1, numbers(8)), Looked("rtcp")),
    (rtcp(packet(BYE, 1, numbers(8), first=0x40)), Looked("rtcp")),
    (rtcp(packet(BYE, 1, numbers(8), first=0xC0)), Looked("rtcp")),
    (rtcp(packet(BYE, 1, numbers(8), more=1)), Looked("rtcp")),
    (rtcp(packet(BYE, 1, numbers(8), first=0xA0), packet(RR, 0, numbers(7))), Looked("rtcp")),
    (packet(RR, 0, numbers(7), first=0xA0), plain()),
    (packet(RR, 0, numbers(7), first=0xA0) + packet(BYE, 1, numbers(8)), Looked("rtcp")),
    (packet(RR, 0, numbers(7))[:7], OTHER),
    (b"\x80\xc9", OTHER),
]


@pytest.mark.parametrize(("data", "looked"), [*STUN, *DTLS, *RTP, *RTCP])
def test_known_datagrams(data: bytes, looked: Looked) -> None:
    assert media.look_at(data) == looked
    assert look(data) == looked
    assert look(bytearray(data)) == look(memoryview(data)) == looked


def test_the_largest_datagrams() -> None:
    """What takes longest to walk over; none may be read beyond its end."""
    words = 16_376
    large = [
        stun(0x0111, attribute(0x8022, b"") * 16_300 + code(4, 87)),
        record(DATA, 1, b"") * 5_000 + record(ALERT, 1),
        rtcp(*[packet(RR, 0, b"")] * words),
        rtcp(*[packet(BYE, 31, numbers(*range(31)))] * 500),
        rtcp(packet(SDES, 31, bytes(4 * words))),
        rtcp(packet(SDES, 31, numbers(7) + b"\2\0" * 2 * (words - 1))),
    ]
    for data in large:
        assert 60_000 < len(data) < 65_536
        assert look(data) == media.look_at(data)
        for end in range(len(data) - 40, len(data)):
            assert look(data[:end]) == media.look_at(data[:end])


def test_only_bytes_are_looked_at() -> None:
    for wrong in ("text", None):
        with pytest.raises(TypeError):
            look_at(wrong)  # type: ignore[arg-type]


# Any datagrams

# Most lengths are right, for otherwise next to nothing would be read to its end.
LIES = st.sampled_from([0] * 30 + [-4, -3, -2, -1, 1, 2, 3, 4, 1000, 65535])


def lying(data: bytes, at: int, lie: int) -> bytes:
    """Return the bytes with a length of 16 bits changed."""
    size = int.from_bytes(data[at : at + 2], "big") + lie
    return data[:at] + (size % 65536).to_bytes(2, "big") + data[at + 2 :]


ANY_ATTRIBUTE = st.builds(
    lambda kind, value, lie: lying(attribute(kind, value), 2, lie),
    st.sampled_from([ERROR_CODE, ERROR_CODE, 0x0006, 0x8022]),
    st.binary(max_size=7),
    LIES,
)
ANY_STUN = st.builds(
    lambda kind, body, lie: lying(stun(kind, body), 2, lie),
    st.sampled_from([0x0111, 0x0111, 0x0111, 0x0001, 0x0101, 0x03FF]),
    st.lists(ANY_ATTRIBUTE, max_size=5).map(b"".join) | st.binary(max_size=30),
    LIES,
)
ANY_RECORD = st.builds(
    lambda kind, epoch, body, version, lie: lying(
        record(kind, epoch, body, version=version), 11, lie
    ),
    st.sampled_from([ALERT, HANDSHAKE, DATA, 63]),
    st.integers(0, 2) | st.integers(0, 65535),
    st.binary(max_size=20),
    st.sampled_from([0xFEFF, 0xFEFD, 0xFEFC, 0x0303]),
    LIES,
)
ANY_DTLS = st.lists(ANY_RECORD, min_size=1, max_size=6).map(b"".join)
SSRCS = st.integers(0, 2**32 - 1)
ITEM = st.tuples(st.integers(0, 3), st.binary(max_size=9))
ANY_CHUNK = st.builds(lambda ssrc, items: chunk(ssrc, *items), SSRCS, st.lists(ITEM, max_size=4))
ANY_BODY = (
    st.lists(SSRCS, max_size=5).map(lambda ssrcs: numbers(*ssrcs))
    | st.lists(ANY_CHUNK, max_size=4).map(b"".join)
    | st.lists(ITEM, max_size=5).map(lambda items: chunk(7, *items)[: len(items) * 4])
    | st.binary(max_size=24)
)
ANY_PACKET = st.builds(
    lambda kind, count, body, first, lie: lying(
        packet(kind, count, body + bytes(-len(body) % 4), first=first), 2, lie
    ),
    st.sampled_from([SR, RR, SDES, SDES, SDES, BYE, BYE, 192, 223]),
    st.integers(0, 4) | st.integers(0, 31),
    ANY_BODY,
    st.sampled_from([0x80] * 20 + [0xA0, 0x40]),
    LIES,
)
ANY_RTCP = st.builds(
    lambda packets, tail: b"".join(packets) + tail,
    st.lists(ANY_PACKET, min_size=1, max_size=5),
    st.sampled_from([b""] * 9 + [bytes(4), bytes(14)]),
)
ANY_RTP = st.binary(max_size=20).map(lambda data: b"\x80" + data)
STRUCTURED = ANY_STUN | ANY_DTLS | ANY_RTCP | ANY_RTP


@pytest.mark.fuzz
@at_least(500)
@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    assert look(data) == media.look_at(data)


@pytest.mark.fuzz
@at_least(1500)
@given(STRUCTURED)
def test_any_datagram(data: bytes) -> None:
    looked = media.look_at(data)
    event(looked.kind)
    for found in ("error_code", "alert", "plain", "senders", "byes", "cname"):
        if getattr(looked, found):
            event(found)
    assert look(data) == looked


@pytest.mark.fuzz
@at_least(500)
@given(
    st.sampled_from([data for data, _ in (*STUN, *DTLS, *RTP, *RTCP) if data]),
    st.data(),
    st.integers(0, 255),
)
def test_a_known_datagram_with_one_other_byte(known: bytes, data: st.DataObject, byte: int) -> None:
    at = data.draw(st.integers(0, len(known) - 1))
    changed = known[:at] + bytes([byte]) + known[at + 1 :]
    assert look(changed) == media.look_at(changed)


@pytest.mark.parametrize("data", [data for data, _ in (*STUN, *DTLS, *RTP, *RTCP)])
def test_a_known_datagram_that_is_cut(data: bytes) -> None:
    for end in range(len(data)):
        assert look(data[:end]) == media.look_at(data[:end])
