"""The slow, obvious twin of ``_fastpath.fnv1a_32``."""

from __future__ import annotations


def fnv1a_32(data: bytes) -> int:
    """Return the hash with the offset basis and the prime of the FNV authors."""
    value = 2166136261
    for byte in data:
        value ^= byte
        value = value * 16777619 % 2**32
    return value
