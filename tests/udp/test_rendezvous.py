"""Which target a new session gets: the compiled choice, its twin, and how even and steady it is."""

from __future__ import annotations

import struct
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy._fastpath import rendezvous, target_seed
from tests.fuzzing import at_least
from tests.reference import rendezvous as twin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Spread = Callable[[int], list[bytes]]

SECRET = 0x243F6A8885A308D3
TARGETS = (b"game-1:9999", b"game-2:9999", b"game-3:9999", b"game-4:9999")
KEYS = 20_000

numbers = st.integers(0, 2**64 - 1)


def choices(targets: Sequence[bytes], keys: Sequence[bytes], secret: int = SECRET) -> list[int]:
    seeds = [target_seed(target) for target in targets]
    return [rendezvous(key, seeds, secret) for key in keys]


def packed(address: str, port: int) -> bytes:
    """Return an address and port, both as a datagram has them, IPv4 as ``::ffff:a.b.c.d``."""
    parsed = ip_address(address)
    number = int(parsed) if parsed.version == 6 else 0xFFFF_0000_0000 | int(parsed)
    return struct.pack("!16sH", number.to_bytes(16, "big"), port)


@cache
def sequential_ports(count: int) -> list[bytes]:
    return [packed("192.0.2.7", 40_000 + number) for number in range(count)]


@cache
def sequential_addresses(count: int) -> list[bytes]:
    first = int(ip_address("10.0.0.0"))
    return [packed(str(ip_address(first + number)), 5060) for number in range(count)]


@cache
def sequential_ipv6_networks(count: int) -> list[bytes]:
    """One client in each of many neighbouring /64."""
    return [packed(f"2001:db8:{number:x}::1", 5060) for number in range(count)]


@cache
def last_octets(count: int) -> list[bytes]:
    """The key of source-ip: an address without a port, little changing in it."""
    return [packed(f"10.{number >> 8}.{number & 255}.9", 0)[:16] for number in range(count)]


SPREADS = (sequential_ports, sequential_addresses, sequential_ipv6_networks, last_octets)


# Agreement and known values


def test_the_twin_is_the_published_fnv() -> None:
    """From the test vectors of the FNV authors."""
    assert twin.fnv1a_64(b"") == 0xCBF29CE484222325
    assert twin.fnv1a_64(b"a") == 0xAF63DC4C8601EC8C
    assert twin.fnv1a_64(b"foobar") == 0x85944171F73967E8
    assert twin.fnv1a_64(b"bar", twin.fnv1a_64(b"foo")) == twin.fnv1a_64(b"foobar")


def test_the_twin_is_the_published_splitmix() -> None:
    """The first outputs for the seeds 0 and 1234567."""
    assert twin.splitmix64(0) == 0xE220A8397B1DCDAF
    assert twin.splitmix64(1234567) == 6457827717110365317


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        (b"", 0xC3817C016BA4FF30),
        (b"game-1:9999", 0x91BB4ABE175AB38C),
        (b"game-2:9999", 0x90179C3A489DC39B),
    ],
)
def test_known_seeds(text: bytes, seed: int) -> None:
    assert twin.target_seed(text) == seed
    assert target_seed(text) == seed


def test_known_choices() -> None:
    """A proxy that is restarted, or a newer one, must choose as before."""
    keys = sequential_ports(16)
    with_secret = [3, 1, 2, 3, 2, 3, 0, 2, 1, 0, 1, 2, 0, 1, 2, 3]
    without = [1, 1, 3, 1, 2, 1, 2, 1, 2, 1, 3, 3, 3, 1, 1, 2]
    assert choices(TARGETS, keys) == with_secret
    assert choices(TARGETS, keys, 0) == without
    assert [twin.choose(TARGETS, key, SECRET) for key in keys] == with_secret
    assert [twin.choose(TARGETS, key, 0) for key in keys] == without


@pytest.mark.fuzz
@at_least(300)
@given(
    st.binary(max_size=60),
    st.lists(st.binary(max_size=30), min_size=1, max_size=9),
    numbers,
)
def test_the_choice_agrees_with_its_twin(key: bytes, targets: list[bytes], secret: int) -> None:
    seeds = [target_seed(target) for target in targets]
    assert seeds == [twin.target_seed(target) for target in targets]
    assert rendezvous(key, seeds, secret) == twin.choose(targets, key, secret)


@given(st.binary(max_size=20), st.binary(max_size=10), st.integers(1, 20), numbers)
def test_of_equal_targets_the_first_is_chosen(
    key: bytes, target: bytes, count: int, secret: int
) -> None:
    assert rendezvous(key, [target_seed(target)] * count, secret) == 0
    assert twin.choose([target] * count, key, secret) == 0


@pytest.mark.parametrize("number", [0, 2**63, 2**64 - 1])
def test_all_64_bits_are_taken(number: int) -> None:
    seeds = [number, number ^ 1]
    scores = [twin.splitmix64(twin.fnv1a_64(b"key", twin.BASIS ^ number) ^ s) for s in seeds]
    assert rendezvous(b"key", seeds, number) == scores.index(max(scores))


def test_a_choice_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no target"):
        rendezvous(b"key", [], SECRET)
    with pytest.raises(ValueError, match="empty"):
        twin.choose([], b"key", SECRET)


@pytest.mark.parametrize("wrong", ["text", None, 7])
def test_only_bytes_are_hashed(wrong: Any) -> None:
    with pytest.raises(TypeError):
        rendezvous(wrong, [1], SECRET)
    with pytest.raises(TypeError):
        target_seed(wrong)


# How few sessions move


@pytest.mark.parametrize("spread", SPREADS)
def test_a_fourth_target_takes_a_quarter(spread: Spread) -> None:
    keys = spread(KEYS)
    before = choices(TARGETS[:3], keys)
    after = choices(TARGETS, keys)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert 0.22 < len(moved) / KEYS < 0.28
    assert set(moved) == {3}


@pytest.mark.parametrize("gone", range(4))
def test_a_target_that_goes_moves_only_its_own(gone: int) -> None:
    keys = sequential_ports(KEYS)
    left = [target for number, target in enumerate(TARGETS) if number != gone]
    before = [TARGETS[number] for number in choices(TARGETS, keys)]
    after = [left[number] for number in choices(left, keys)]
    moved = {old for old, new in zip(before, after, strict=True) if old != new}
    assert moved == {TARGETS[gone]}
    # Its sessions spread over all that are left, and do not crush its neighbour.
    heirs = [new for old, new in zip(before, after, strict=True) if old == TARGETS[gone]]
    assert uneven([heirs.count(target) for target in left]) < 20


def test_the_order_of_the_targets_does_not_matter() -> None:
    keys = sequential_ports(2000)
    backwards = TARGETS[::-1]
    assert [TARGETS[number] for number in choices(TARGETS, keys)] == [
        backwards[number] for number in choices(backwards, keys)
    ]


# How even it is


def uneven(counts: list[int]) -> float:
    """Return Pearson's chi-square of counts that should be equal; its mean is one less than them.

    The bounds below are those that a fair choice exceeds in one of 1,000 trials or fewer. Keys and
    secrets are fixed, so that the outcome is too.
    """
    mean = sum(counts) / len(counts)
    return sum((count - mean) ** 2 / mean for count in counts)


@pytest.mark.parametrize("secret", [0, 1, SECRET, 2**64 - 1])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_clients_that_are_alike_spread_evenly(spread: Spread, secret: int, count: int) -> None:
    targets = [b"10.0.0.%d:9999" % number for number in range(1, count + 1)]
    chosen = choices(targets, spread(KEYS), secret)
    assert uneven([chosen.count(number) for number in range(count)]) < 25


@pytest.mark.parametrize("spread", SPREADS)
def test_the_secret_changes_every_choice(spread: Spread) -> None:
    """Who knows the targets but not the secret can't aim at one of them."""
    keys = spread(KEYS)
    one = choices(TARGETS, keys)
    other = choices(TARGETS, keys, SECRET ^ 1)
    pairs = list(zip(one, other, strict=True))
    assert uneven([pairs.count((a, b)) for a in range(4) for b in range(4)]) < 45
