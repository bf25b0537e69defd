"""The frames of a client, told apart and counted before the library sees them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http.h2_guard import (
    MAX_FRAME,
    PREFACE,
    Budget,
    FloodError,
    FrameError,
    FrameGuard,
)

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    9,
)
END_STREAM, END_HEADERS, PADDED = 1, 4, 8


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


FIRST = PREFACE + frame(SETTINGS)


def begun(max_block: int = 1000, now: float = 0.0) -> FrameGuard:
    guard = FrameGuard(max_block, now)
    guard.feed(FIRST)
    assert list(guard.frames(now)) == [PREFACE, frame(SETTINGS)]
    return guard


def feed(guard: FrameGuard, data: bytes, now: float = 0.0) -> list[bytes]:
    guard.feed(data)
    return list(guard.frames(now))


@pytest.mark.fuzz
@given(st.lists(st.integers(0, 40), max_size=9))
def test_frames_come_out_whole_however_they_arrive(cuts: list[int]) -> None:
    frames = [frame(PING, b"12345678"), frame(DATA, b"abc", stream=1), frame(0x77, bytes(20))]
    data = FIRST + b"".join(frames)
    guard = FrameGuard(1000, 0.0)
    out: list[bytes] = []
    for cut in cuts:
        out += feed(guard, data[:cut])
        data = data[cut:]
    out += feed(guard, data)
    assert out == [PREFACE, frame(SETTINGS), *frames]


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"PRI * HTTP/1.1\r\n\r\n", b"\x16\x03\x01"]
)
def test_another_protocol(data: bytes) -> None:
    with pytest.raises(FrameError, match="preface"):
        feed(FrameGuard(1000, 0.0), data)


@pytest.mark.parametrize("first", [frame(PING, bytes(8)), frame(SETTINGS, flags=1)])
def test_the_first_frame_must_be_settings(first: bytes) -> None:
    with pytest.raises(FrameError, match="SETTINGS"):
        feed(FrameGuard(1000, 0.0), PREFACE + first)


def test_nothing_is_said_before_the_preface_is_whole() -> None:
    guard = FrameGuard(1000, 0.0)
    assert feed(guard, PREFACE) == []
    assert not guard.begun


def test_a_frame_that_is_too_long() -> None:
    guard = begun()
    with pytest.raises(FrameError, match="16385") as raised:
        feed(guard, frame(DATA, bytes(MAX_FRAME + 1), stream=1)[:9])
    assert raised.value.code == 6  # FRAME_SIZE_ERROR


def test_a_head_in_several_frames() -> None:
    guard = begun()
    feed(guard, frame(HEADERS, bytes(400), stream=1))
    feed(guard, frame(CONTINUATION, bytes(400), stream=1))
    assert (guard.in_block, guard.blocks) == (True, 1)
    feed(guard, frame(CONTINUATION, bytes(200), END_HEADERS, 1))
    feed(guard, frame(HEADERS, bytes(1000), END_HEADERS, 3))
    assert (guard.in_block, guard.blocks) == (False, 1)


def test_a_head_that_is_too_long() -> None:
    guard = begun()
    feed(guard, frame(HEADERS, bytes(600), stream=1))
    with pytest.raises(FloodError, match="head"):
        feed(guard, frame(CONTINUATION, bytes(401), stream=1))


def test_nothing_may_come_in_the_middle_of_a_head() -> None:
    guard = begun()
    feed(guard, frame(HEADERS, b"x", stream=1))
    with pytest.raises(FrameError, match="middle"):
        feed(guard, frame(PING, bytes(8)))


@pytest.mark.parametrize(
    ("flood", "least"),
    [
        (frame(PING, bytes(8)), 1500),
        (frame(SETTINGS), 50),
        (frame(SETTINGS, flags=1), 50),
        (frame(PRIORITY, bytes(5), stream=1), 1500),
        (frame(WINDOW_UPDATE, bytes(4)), 1500),
        (frame(RST_STREAM, bytes(4), stream=1), 1500),
        (frame(DATA, stream=1), 200),
        (frame(DATA, b"\x03" + bytes(3), PADDED, 1), 200),
        (frame(0x77, bytes(100)), 1500),
    ],
    ids=["ping", "settings", "ack", "priority", "window", "reset", "data", "padding", "unknown"],
)
def test_floods_are_cut_off_and_bursts_are_not(flood: bytes, least: int) -> None:
    guard = begun()
    assert len(feed(guard, flood * least)) == least
    with pytest.raises(FloodError):
        feed(guard, flood * 2 * 2000)
    patient = begun()
    for second in range(1, 500):
        feed(patient, flood * 10, float(second))


def test_continuations_are_cut_off() -> None:
    guard = begun()
    feed(guard, frame(HEADERS, b"", stream=1))
    with pytest.raises(FloodError):
        feed(guard, frame(CONTINUATION, b"", stream=1) * 1000)


def test_data_and_requests_are_no_floods() -> None:
    guard = begun()
    feed(guard, (frame(HEADERS, b"x", END_HEADERS, 1) + frame(DATA, b"", END_STREAM, 1)) * 5000)
    feed(guard, frame(DATA, b"x", stream=1) * 5000)
    for _ in range(5000):
        guard.sent_data(16384, cut=True)
        feed(guard, frame(WINDOW_UPDATE, bytes(4)) * 2)


def test_short_messages_that_are_answered_are_no_flood() -> None:
    guard = begun()
    for _ in range(5000):
        guard.sent_data(16384, cut=False)
        feed(guard, frame(WINDOW_UPDATE, bytes(4)) * 2 + frame(PING, bytes(8)))


def test_a_window_opened_by_bytes_is_a_flood() -> None:
    guard = begun()

    def dribble() -> None:
        for _ in range(5000):
            guard.sent_data(1, cut=True)
            feed(guard, frame(WINDOW_UPDATE, bytes(4)))

    with pytest.raises(FloodError):
        dribble()


def test_rapid_resets() -> None:
    guard = begun()
    for _ in range(200):
        guard.reset(0.0)
    with pytest.raises(FloodError):
        guard.reset(0.0)
    fair = begun()
    for _ in range(2000):
        fair.reset(0.0)
        fair.answered()


def test_a_budget_comes_back_with_time_up_to_its_burst() -> None:
    budget = Budget(10.0, 2.0, 100.0)
    assert budget.take(10, 100.0)
    assert not budget.take(1, 100.0)
    assert budget.take(1, 101.5)
    assert budget.take(10, 200.0)
    assert not budget.take(1, 200.0)


@pytest.mark.fuzz
@given(st.binary(max_size=300))
def test_totality(data: bytes) -> None:
    for guard in (FrameGuard(100, 0.0), begun()):
        with contextlib.suppress(FrameError, FloodError):
            feed(guard, data)
