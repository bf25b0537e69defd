"""The goodbye of a call: its bytes, how it is read by the relay and its twin, and its limits."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy._fastpath import look_at
from kamal_proxy.udp.rtcp import goodbye
from tests.fuzzing import at_least
from tests.reference import media

if TYPE_CHECKING:
    from collections.abc import Sequence

CNAME = b"cam@media-1"
ROOM = 1472  # bytes of a datagram that Ethernet need not cut, over IPv4; Relay.say_goodbye's limit


def test_a_goodbye_byte_by_byte() -> None:
    assert goodbye([0x01020304, 0xFFFFFFFE], b"ab@c", "moved") == bytes.fromhex(
        "80c90001 01020304"  # an empty receiver report of the first source
        "81ca0003 01020304 01046162 40630000"  # one chunk: CNAME, and the zeros that end it
        "82cb0004 01020304 fffffffe 056d6f76 65640000"  # two sources, and why
    )


def test_without_a_reason() -> None:
    assert goodbye([7], b"ab", "")[-8:] == bytes.fromhex("81cb0001 00000007")


@pytest.mark.parametrize("length", range(1, 10))
def test_the_end_of_a_chunk_is_zeros(length: int) -> None:
    """At least one, also where the name ends on 32 bits (RFC 3550 6.5)."""
    _, description, _ = media.packets(goodbye([7], b"n" * length, ""))
    rest = description[8 + 2 + length :]
    assert rest == bytes(len(rest))
    assert 1 <= len(rest) <= 4


@pytest.mark.parametrize("length", range(1, 10))
def test_the_end_of_a_reason_is_zeros(length: int) -> None:
    """As many as it takes, none where it ends on 32 bits (RFC 3550 6.6)."""
    *_, bye = media.packets(goodbye([7], CNAME, "r" * length))
    rest = bye[8 + 1 + length :]
    assert rest == bytes(-(1 + length) % 4)


@pytest.mark.parametrize(
    ("ssrcs", "cname", "reason", "message"),
    [
        ([], CNAME, "", "from 1 to 31 sources, not 0"),
        (range(32), CNAME, "", "from 1 to 31 sources, not 32"),
        ([1], b"", "", "the name at least one"),
        ([1], b"n" * 256, "", "at most 255 bytes"),
        ([1], CNAME, "r" * 256, "at most 255 bytes"),
        ([1], CNAME, "ü" * 128, "at most 255 bytes"),
        ([-1], CNAME, "", "32 bits"),
        ([1, 2**32], CNAME, "", "32 bits"),
    ],
)
def test_what_does_not_fit(ssrcs: Sequence[int], cname: bytes, reason: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        goodbye(ssrcs, cname, reason)


def test_the_largest_goodbye_fits_into_a_datagram() -> None:
    largest = goodbye(range(31), b"n" * 255, "r" * 255)
    assert len(media.packets(largest)) == 3
    assert len(largest) < ROOM


SSRCS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=31)
CNAMES = st.binary(min_size=1, max_size=255)
REASONS = st.text(st.characters(codec="utf-8"), max_size=63)  # at most 252 bytes


@pytest.mark.fuzz
@at_least(300)
@given(SSRCS, CNAMES, REASONS)
def test_what_is_written_is_read(ssrcs: list[int], cname: bytes, reason: str) -> None:
    said = goodbye(ssrcs, cname, reason)
    report, description, bye = media.packets(said)

    assert struct.unpack("!BBHI", report) == (0x80, media.RR, 1, ssrcs[0])

    assert (description[0], description[1]) == (0x81, media.SDES)
    assert list(media.items(description[4:], 1)) == [(ssrcs[0], media.CNAME, cname)]

    assert (bye[0], bye[1]) == (0x80 | len(ssrcs), media.BYE)
    assert media.ssrcs(bye[4:], len(ssrcs)) == ssrcs
    why = bye[4 + 4 * len(ssrcs) :]
    text = reason.encode()
    assert why == (bytes([len(text)]) + text + bytes(-(1 + len(text)) % 4) if text else b"")


@pytest.mark.fuzz
@at_least(300)
@given(SSRCS, CNAMES, REASONS)
def test_a_relay_recognises_a_goodbye(ssrcs: list[int], cname: bytes, reason: str) -> None:
    """As another proxy on the way would."""
    said = goodbye(ssrcs, cname, reason)
    expected = ("rtcp", 0, 0, False, 0, True, (ssrcs[0],), tuple(ssrcs), cname)
    assert look_at(said) == expected
