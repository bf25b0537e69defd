"""What is read of Binding requests: the published one, each defect, and any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.udp.stun import BindingRequest, parse_binding_request_untrusted
from tests.fuzzing import at_least
from tests.reference import media

USERNAME = 0x0006
OTHERS = [0x0024, 0x8022, 0x8028, 0x8029]
MAX_USERNAME = 513

# RFC 5769 2.1, the sample request of a client whose fragment is h6vY.
PUBLISHED = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff"
    "80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)


def attribute(kind: int, value: bytes, *, size: int | None = None) -> bytes:
    """Return an attribute, which may lie about its size."""
    length = len(value) if size is None else size
    return struct.pack("!HH", kind, length) + value + bytes(-len(value) % 4)


def message(*attributes: bytes, kind: int = 1, cookie: int = 0x2112A442, more: int = 0) -> bytes:
    """Return a message that says to have ``more`` bytes than it has."""
    body = b"".join(attributes)
    return struct.pack("!HHI", kind, len(body) + more, cookie) + bytes(range(12)) + body


def named(username: bytes) -> bytes:
    return message(attribute(USERNAME, username))


def test_the_published_request() -> None:
    assert parse_binding_request_untrusted(PUBLISHED) == BindingRequest(b"evtj")


@pytest.mark.parametrize(
    ("data", "ufrag"),
    [
        (named(b"a:b"), b"a"),
        (named(b"a:"), b"a"),  # whether the client's part is right is the server's question
        (named(b"a:b:c"), b"a"),
        (named(b"theirs+/1:ours"), b"theirs+/1"),
        (named(b"\xff\x00:b"), b"\xff\x00"),
        (named(b"a" * 256 + b":" + b"b" * 256), b"a" * 256),
        (message(attribute(0x8022, b"odd"), attribute(USERNAME, b"a:b")), b"a"),
        (message(attribute(0x8022, b""), attribute(USERNAME, b"a:b")), b"a"),
        (message(attribute(USERNAME, b"first:b"), attribute(USERNAME, b"last:b")), b"first"),
        # What comes after the name is the server's to judge.
        (message(attribute(USERNAME, b"a:b"), attribute(0x8022, b"", size=4)), b"a"),
    ],
)
def test_whose_a_request_is(data: bytes, ufrag: bytes) -> None:
    assert parse_binding_request_untrusted(data) == BindingRequest(ufrag)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(20), id="zeros"),
        pytest.param(message(), id="without attributes"),
        pytest.param(message(attribute(0x8022, b"a:b")), id="another attribute"),
        pytest.param(named(b""), id="empty name"),
        pytest.param(named(b":b"), id="without a server's part"),
        pytest.param(named(b"ab"), id="without a colon"),
        pytest.param(named(b"a" * 256 + b":" + b"b" * 257), id="long name"),
        pytest.param(
            message(attribute(USERNAME, b"ab"), attribute(USERNAME, b"a:b")), id="second name"
        ),
        pytest.param(message(attribute(USERNAME, b"a:b", size=5)), id="name of more than there is"),
        pytest.param(message(attribute(USERNAME, b"a:b", size=65535)), id="name of 64 KiB"),
        pytest.param(
            message(attribute(0x8022, b"abcd", size=13), attribute(USERNAME, b"a:b")),
            id="broken before the name",
        ),
        pytest.param(message(attribute(USERNAME, b"a:b"), kind=0x0101), id="a success"),
        pytest.param(message(attribute(USERNAME, b"a:b"), kind=0x0111), id="an error"),
        pytest.param(message(attribute(USERNAME, b"a:b"), kind=0x0011), id="an indication"),
        pytest.param(message(attribute(USERNAME, b"a:b"), kind=0x0003), id="an allocation"),
        pytest.param(message(attribute(USERNAME, b"a:b"), kind=0x8001), id="not STUN"),
        pytest.param(message(attribute(USERNAME, b"a:b"), cookie=0x2112A443), id="another cookie"),
        pytest.param(message(attribute(USERNAME, b"a:b"), more=4), id="cut"),
        pytest.param(message(attribute(USERNAME, b"a:b"), more=-4), id="with a tail"),
        pytest.param(message(attribute(USERNAME, b"a:b"), b"\0"), id="not of whole words"),
    ],
)
def test_what_is_nobodys_request(data: bytes) -> None:
    assert parse_binding_request_untrusted(data) is None


def test_no_part_of_a_request_is_one() -> None:
    for end in range(len(PUBLISHED)):
        assert parse_binding_request_untrusted(PUBLISHED[:end]) is None
        assert parse_binding_request_untrusted(PUBLISHED[end + 1 :]) is None


def test_a_request_is_looked_at_as_long_as_a_datagram_can_be() -> None:
    empty = attribute(0x8022, b"") * 16_000
    request = message(empty, attribute(USERNAME, b"a:b"))
    assert 64_000 < len(request) < 65_507
    assert parse_binding_request_untrusted(request) == BindingRequest(b"a")


def obvious(data: bytes) -> BindingRequest | None:
    """Return what a request says, by the twin of the relay's parser."""
    if media.look_at(data).stun_type != 0x0001:
        return None
    found = [value for kind, value in media.attributes(data[20:]) if kind == USERNAME]
    if not found or len(found[0]) > MAX_USERNAME or b":" not in found[0]:
        return None
    ufrag = found[0].split(b":")[0]
    return BindingRequest(ufrag) if ufrag else None


NAMES = st.binary(max_size=9) | st.from_regex(rb"[a-d]{0,5}:[a-d]{0,5}", fullmatch=True)
ATTRIBUTES = st.lists(
    st.builds(
        attribute,
        st.sampled_from([USERNAME, *OTHERS]),
        NAMES,
        size=st.none() | st.none() | st.integers(0, 20) | st.integers(0, 65535),
    ),
    max_size=5,
)
MESSAGES = st.builds(
    lambda attributes, kind, more: message(*attributes, kind=kind, more=more),
    ATTRIBUTES,
    st.just(1) | st.just(1) | st.sampled_from([0x0011, 0x0101, 0x0111]) | st.integers(0, 65535),
    st.just(0) | st.just(0) | st.integers(0, 8),
)


@pytest.mark.fuzz
@at_least(500)
@given(st.binary() | MESSAGES | st.binary().map(lambda data: PUBLISHED[:20] + data))
def test_any_bytes(data: bytes) -> None:
    assert parse_binding_request_untrusted(data) == obvious(data)


@pytest.mark.fuzz
@at_least(300)
@given(st.integers(0, len(PUBLISHED) - 1), st.integers(1, 255))
def test_a_request_with_one_wrong_byte(at: int, change: int) -> None:
    wrong = bytearray(PUBLISHED)
    wrong[at] ^= change
    assert parse_binding_request_untrusted(bytes(wrong)) == obvious(bytes(wrong))


@pytest.mark.fuzz
@at_least(100)
@given(ATTRIBUTES, st.from_regex(rb"[a-zA-Z0-9+/]{4,256}", fullmatch=True), st.binary(max_size=9))
def test_every_fragment_is_found(before: list[bytes], ufrag: bytes, rest: bytes) -> None:
    """Whatever precedes it, if that is well-formed and no name."""
    harmless = [each for each in before if each[:2] != b"\0\6" and len(each) == whole(each)]
    request = message(*harmless, attribute(USERNAME, ufrag + b":" + rest))
    assert parse_binding_request_untrusted(request) == BindingRequest(ufrag)


def whole(data: bytes) -> int:
    """Return how many bytes an attribute should have."""
    size = int.from_bytes(data[2:4], "big")
    return 4 + size + -size % 4
