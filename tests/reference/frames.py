"""The slow, obvious twin of ``_fastpath.FrameTracker``: reads all frames from the first one."""

from __future__ import annotations

from typing import NamedTuple


class State(NamedTuple):
    """What a tracker says after some bytes."""

    at_boundary: bool
    closing: bool
    closed: bool
    frames: int


def follow(data: bytes) -> State:
    """Return what is known after all the bytes of one direction."""
    opcodes, whole, end = _frames(data)
    return State(
        at_boundary=end == len(data),
        closing=8 in opcodes,
        closed=8 in opcodes[:whole],
        frames=whole,
    )


def first_boundary(before: bytes, data: bytes) -> int:
    """Return how many bytes of the data it takes to be at a boundary, or all of them."""
    for size in range(len(data)):
        if follow(before + data[:size]).at_boundary:
            return size
    return len(data)


def _frames(data: bytes) -> tuple[list[int], int, int]:
    """Return the opcodes seen, how many of their frames are whole, and where the last such ends."""
    opcodes: list[int] = []
    end = 0
    while end < len(data):
        opcodes.append(data[end] % 16)
        size = _frame_size(data[end:])
        if size is None or end + size > len(data):
            return opcodes, len(opcodes) - 1, end
        end += size
    return opcodes, len(opcodes), end


def _frame_size(frame: bytes) -> int | None:
    """Return the size of the frame in bytes; None if that is not known yet, or endless."""
    if len(frame) < 2:
        return None
    masked, length = divmod(frame[1], 128)
    header = 2
    if length >= 126:
        header += 2 if length == 126 else 8
        if len(frame) < header:
            return None
        length = int.from_bytes(frame[2:header], "big")
        if length >= 2**63:
            return None
    return header + 4 * masked + length
