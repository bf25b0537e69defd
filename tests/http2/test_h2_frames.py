"""Frames told apart: any cut of the bytes, any bytes, and every limit."""

from __future__ import annotations

import itertools

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    SettingsFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.h2_frames import FrameError, FrameReader, GoAway
from tests.fuzzing import at_least

SETTINGS = SettingsFrame(0).serialize()


def reader(max_frame: int = 100, max_head: int = 50) -> FrameReader:
    return FrameReader(max_frame, max_head)


def read(frames: FrameReader, *parts: bytes) -> list[bytes | GoAway]:
    return [piece for part in parts for piece in frames.feed(part)]


def data(size: int, **more: object) -> bytes:
    made = DataFrame(1, data=bytes(size), **more)
    return made.serialize()


def headers(size: int, *, end: bool = True) -> bytes:
    made = HeadersFrame(1, data=bytes(size))
    if end:
        made.flags.add("END_HEADERS")
    return made.serialize()


def continuation(size: int, *, end: bool = False) -> bytes:
    made = ContinuationFrame(1, data=bytes(size))
    if end:
        made.flags.add("END_HEADERS")
    return made.serialize()


FRAMES = [
    SETTINGS,
    headers(20),
    data(100),
    GoAwayFrame(0, last_stream_id=7, error_code=11, additional_data=b"why").serialize(),
    data(0),
    headers(20, end=False),
    continuation(30, end=True),
    GoAwayFrame(0).serialize(),
    PingFrame(0, opaque_data=b"12345678").serialize(),
]
READ = [
    frame
    if frame[3] != 7
    else (GoAway(7, 11, b"why") if frame.endswith(b"why") else GoAway(0, 0, b""))
    for frame in FRAMES
]


@given(st.lists(st.integers(0, sum(map(len, FRAMES))), max_size=20))
def test_any_cut_of_the_bytes(cuts: list[int]) -> None:
    whole = b"".join(FRAMES)
    places = [0, *sorted(cuts), len(whole)]
    parts = [whole[a:b] for a, b in itertools.pairwise(places)]
    frames = reader()
    assert read(frames, *parts) == READ
    assert (frames.carrying, frames.idle) == (3, 6)


def test_what_carries_nothing() -> None:
    frames = reader()
    padded = DataFrame(1, data=b"", pad_length=5, flags={"PADDED"}).serialize()
    read(frames, SETTINGS, data(0), padded, DataFrame(1, flags={"END_STREAM"}).serialize())
    assert (frames.carrying, frames.idle) == (0, 4)
    read(frames, DataFrame(1, data=b"x", pad_length=5, flags={"PADDED"}).serialize())
    assert (frames.carrying, frames.idle) == (1, 4)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([data(101)], "a frame of 101 bytes, more than 100"),
        ([headers(51)], "a head of more than 50 bytes"),
        ([headers(30, end=False), continuation(21)], "a head of more than 50 bytes"),
        ([headers(1, end=False), data(1)], "another frame in the middle of a head"),
        ([headers(1, end=False), headers(1)], "another frame in the middle of a head"),
        ([Frame.serialize(GoAwayFrame(0))[:3] + b"\7\0\0\0\0\0"], None),
        ([b"\0\0\7\7\0\0\0\0\0" + bytes(7)], "a GOAWAY frame of 7 bytes"),
    ],
)
def test_limits(parts: list[bytes], error: str | None) -> None:
    frames = reader()
    read(frames, SETTINGS)
    if error is None:
        assert read(frames, *parts) == []
        return
    with pytest.raises(FrameError) as caught:
        read(frames, *parts)
    assert str(caught.value) == error


def test_what_came_before_an_error_counts() -> None:
    pieces = reader().feed(SETTINGS + data(1) + data(101))
    assert (next(pieces), next(pieces)) == (SETTINGS, data(1))
    with pytest.raises(FrameError):
        next(pieces)


@pytest.mark.parametrize(
    ("begin", "error"),
    [
        (b"HTTP/1.1 400 Bad", "it speaks HTTP/1 here; leave out h2c:// to reach it so"),
        (b"SSH-2.0-OpenSSH_9", "it does not speak HTTP/2 here"),
        (data(1), "it does not speak HTTP/2 here"),
    ],
)
def test_what_is_no_http2(begin: bytes, error: str) -> None:
    with pytest.raises(FrameError, match=error):
        read(reader(), begin)


@pytest.mark.fuzz
@at_least(500)
@given(st.lists(st.binary(max_size=200)), st.booleans())
def test_any_bytes(parts: list[bytes], begun: bool) -> None:
    """They are read or refused, and nothing is kept beyond a frame."""
    frames = reader()
    try:
        read(frames, *([SETTINGS] if begun else []), *parts)
    except FrameError:
        return
    assert len(frames._buffer) <= 9 + 100
