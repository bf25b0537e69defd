"""The slow, obvious twin of ``_fastpath.rendezvous``: which target a new session gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BASIS = 0xCBF29CE484222325


def fnv1a_64(data: bytes, basis: int = BASIS) -> int:
    """Return the hash with the prime of the FNV authors, and their basis unless another is given.

    Hashing ``b`` with the hash of ``a`` as the basis gives the hash of ``a + b``.
    """
    value = basis
    for byte in data:
        value ^= byte
        value = value * 0x100000001B3 % 2**64
    return value


def splitmix64(number: int) -> int:
    """Return the first output of Vigna's SplitMix64 for that state: one bit changes half of all."""
    value = (number + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def target_seed(text: bytes) -> int:
    """Return what of a target's ``host:port`` takes part in its scores."""
    return splitmix64(fnv1a_64(text))


def score(target: bytes, key: bytes, secret: int) -> int:
    """Return how much a key wants a target.

    Args:
        target: ``host:port`` as configured.
        key: What sessions that belong together have in common.
        secret: 64 bits that clients do not know, so that none can aim at one target.
    """
    return splitmix64(fnv1a_64(key, BASIS ^ secret) ^ target_seed(target))


def choose(targets: Sequence[bytes], key: bytes, secret: int) -> int:
    """Return the number of the target with the highest score, the first of equal ones."""
    scores = [score(target, key, secret) for target in targets]
    return scores.index(max(scores))
