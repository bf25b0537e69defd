"""Which ports a UDP service listens on, and which of them are a pair for RTP and RTCP. Pure.

Ports are kept as spans, which are ``range`` objects, because a service may have thousands of them.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from kamal_proxy.udp.options import split_port_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kamal_proxy.udp.options import UdpOptions


def spans_of(options: UdpOptions) -> tuple[range, ...]:
    """Return the ports of a service as spans that have none in common; ``port`` comes first."""
    spans = _ranges(options)
    if options.port and not any(options.port in span for span in spans):
        spans = (range(options.port, options.port + 1), *spans)
    return spans


def ports_of(options: UdpOptions) -> tuple[int, ...]:
    """Return the ports of a service, each once."""
    return tuple(chain.from_iterable(spans_of(options)))


def pairs_of(options: UdpOptions) -> tuple[tuple[int, int], ...]:
    """Return the pairs of ports of a service: that for RTP, then that for RTCP (RFC 3550 11).

    A port that the policy leaves without a partner is in none, nor is ``port`` outside the ranges.
    """
    ranges = _ranges(options)
    is_separate = options.rtcp_policy == "separate-range" or (
        options.rtcp_policy == "auto" and len(ranges) > 1
    )
    if is_separate:
        rtp, rtcp = ranges
        return tuple(zip(rtp, rtcp, strict=False))
    pairs: list[tuple[int, int]] = []
    for span in ranges:
        first, last = span.start + span.start % 2, span[-1]
        pairs += zip(range(first, last, 2), range(first + 1, last + 1, 2), strict=True)
        if last % 2 == 0 and any(last + 1 in other for other in ranges):
            pairs.append((last, last + 1))
    return tuple(pairs)


def names_of(spans: Iterable[range]) -> tuple[str, ...]:
    """Return spans as users see them, such as ``udp/9999`` and ``udp/10000-20000``."""
    return tuple(
        f"udp/{span[0]}" if len(span) == 1 else f"udp/{span[0]}-{span[-1]}" for span in spans
    )


def common_port(spans: Iterable[range], others: Sequence[range]) -> int | None:
    """Return the lowest port that is in both, or None if there is none."""
    common = [
        max(span.start, other.start)
        for span in spans
        for other in others
        if max(span.start, other.start) < min(span.stop, other.stop)
    ]
    return min(common, default=None)


def without(spans: Iterable[range], others: Iterable[range]) -> tuple[range, ...]:
    """Return the ports of the first spans that are in none of the others."""
    left = list(spans)
    for other in others:
        parts = [
            (range(span.start, min(span.stop, other.start)), range(other.stop, span.stop))
            if span.start < other.stop
            else (span,)
            for span in left
        ]
        left = [part for both in parts for part in both if part]
    return tuple(left)


def _ranges(options: UdpOptions) -> tuple[range, ...]:
    ends = map(split_port_range, options.port_ranges)
    return tuple(range(first, last + 1) for first, last in ends)
