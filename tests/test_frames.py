"""The compiled tracker of WebSocket frames says what its slow twin says, for any bytes and cuts."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate

from kamal_proxy._fastpath import FrameTracker, fnv1a_32
from tests.fuzzing import at_least
from tests.reference import fnv, frames
from tests.reference.frames import State

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
FIN = 0x80
MASK = b"\x81\x7e\x88\xff"


def frame(
    opcode: int, payload: bytes = b"", *, first: int = FIN, masked: bool = False, long: int = 0
) -> bytes:
    """Build a frame.

    Args:
        opcode: Its opcode.
        payload: What it carries; a mask is written but not applied: no tracker can tell.
        first: FIN and the reserved bits.
        masked: Whether it has a mask.
        long: How many bytes the extended length has at least: 0, 2 or 8.
    """
    size = len(payload)
    long = max(long, 0 if size < 126 else 2 if size < 1 << 16 else 8)
    code = {0: size, 2: 126, 8: 127}[long]
    header = bytes([first | opcode, masked << 7 | code])
    return header + size.to_bytes(8, "big")[8 - long :] + MASK * masked + payload


def state(tracker: FrameTracker) -> State:
    return State(tracker.at_boundary, tracker.closing, tracker.closed, tracker.frames)


def scanned(data: bytes) -> State:
    tracker = FrameTracker()
    assert tracker.scan(data) == len(data)
    return state(tracker)


SIZES = st.sampled_from([0, 1, 2, 4, 5, 124, 125, 126, 127, 200])
FRAMES = st.builds(
    frame,
    st.sampled_from([TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG, 3, 15]),
    SIZES.map(bytes),
    first=st.integers(0, 15).map(lambda bits: bits << 4),
    masked=st.booleans(),
    long=st.sampled_from([0, 0, 2, 8]),
)
STREAMS = st.lists(
    st.one_of(
        FRAMES,
        FRAMES,
        st.sampled_from([b"\x82\x7f\x80" + bytes(7), b"\x82\xff" + b"\xff" * 8]),  # endless
        st.just(b"\x82\x7f\x7f" + b"\xff" * 7),  # the longest that ends
        st.sampled_from([b"\x88", b"\x7e", b"\xfe", b"\x7f", b"\xff", b"\0", b"\x80"]),
        st.binary(max_size=4),
    ),
    max_size=8,
).map(b"".join)
# Sizes of pieces, and whether each scan stops at the first boundary.
STEPS = st.lists(
    st.tuples(st.one_of(st.integers(0, 6), st.integers(0, 400)), st.booleans()), max_size=12
)


@pytest.mark.fuzz
@at_least(400)
@given(STREAMS, STEPS)
def test_agrees_with_its_twin(data: bytes, steps: list[tuple[int, bool]]) -> None:
    tracker = FrameTracker()
    at = 0
    for size, stop in [*steps, (len(data), False)]:
        piece = data[at : at + size]
        expected = frames.first_boundary(data[:at], piece) if stop else len(piece)
        assert tracker.scan(piece, stop_at_boundary=stop) == expected
        at += expected
        assert state(tracker) == frames.follow(data[:at])
    assert at == len(data)


@pytest.mark.fuzz
@at_least(200)
@given(st.binary(max_size=64), STEPS)
def test_agrees_with_its_twin_on_noise(data: bytes, steps: list[tuple[int, bool]]) -> None:
    tracker = FrameTracker()
    at = 0
    for size, stop in steps:
        piece = data[at : at + size]
        expected = frames.first_boundary(data[:at], piece) if stop else len(piece)
        assert tracker.scan(piece, stop_at_boundary=stop) == expected
        at += expected
        assert state(tracker) == frames.follow(data[:at])


def test_begins_at_a_boundary() -> None:
    assert scanned(b"") == State(at_boundary=True, closing=False, closed=False, frames=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("long", [0, 2, 8])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_every_encoding_of_a_length(size: int, long: int, masked: bool) -> None:
    data = frame(BINARY, bytes(size), masked=masked, long=long)
    whole = State(at_boundary=True, closing=False, closed=False, frames=1)
    part = State(at_boundary=False, closing=False, closed=False, frames=0)
    assert scanned(data) == whole
    assert scanned(data[:-1]) == part
    assert scanned(data + data[:1]) == part._replace(frames=1)
    for cut in {*range(1, min(len(data), 20)), len(data) - 1}:
        tracker = FrameTracker()
        tracker.scan(data[:cut])
        assert state(tracker) == part
        assert tracker.scan(data[cut:] + data, stop_at_boundary=True) == len(data) - cut
        assert state(tracker) == whole


def test_headers_one_byte_at_a_time() -> None:
    parts = [
        frame(TEXT, b"a" * 126),
        frame(BINARY, b"b" * 300, masked=True),
        frame(PING),
        frame(BINARY, b"c", masked=True, long=8),
        frame(CONTINUATION, masked=True),
    ]
    tracker = FrameTracker()
    boundaries = []
    for at, byte in enumerate(b"".join(parts), 1):
        assert tracker.scan(bytes([byte])) == 1
        if tracker.at_boundary:
            boundaries.append(at)
    assert boundaries == list(itertools.accumulate(len(part) for part in parts))
    assert tracker.frames == len(parts)


def test_control_frames_between_fragments() -> None:
    parts = [
        frame(TEXT, b"one", first=0),
        frame(PING, b"?"),
        frame(CONTINUATION, b"two", first=0),
        frame(PONG, b"!", masked=True),
        frame(CONTINUATION, b"three"),
    ]
    data = b"".join(parts)
    tracker = FrameTracker()
    at = 0
    for number, part in enumerate(parts, 1):
        assert tracker.scan(data[at:], stop_at_boundary=True) == 0
        assert tracker.scan(data[at : at + 1]) == 1
        assert tracker.scan(data[at + 1 :], stop_at_boundary=True) == len(part) - 1
        assert tracker.frames == number
        at += len(part)
    assert not tracker.closing


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x03\xe9going away"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_close_frame_begins_and_ends(payload: bytes, masked: bool) -> None:
    before = frame(TEXT, b"\x88\x00", first=0)
    data = frame(CLOSE, payload, masked=masked)
    tracker = FrameTracker()
    tracker.scan(before)
    assert not tracker.closing
    for byte in data[:-1]:
        tracker.scan(bytes([byte]))
        assert state(tracker) == State(False, closing=True, closed=False, frames=1)
    tracker.scan(data[-1:])
    assert state(tracker) == State(True, closing=True, closed=True, frames=2)
    # What follows is against the RFC, but makes nothing undone.
    tracker.scan(frame(CONTINUATION, b"late") + b"\x81")
    assert state(tracker) == State(False, closing=True, closed=True, frames=3)


@pytest.mark.parametrize("bits", range(16))
def test_reserved_bits_change_nothing(bits: int) -> None:
    data = frame(BINARY, b"abc", first=bits << 4) + frame(CLOSE, first=bits << 4)
    assert scanned(data) == State(True, closing=True, closed=True, frames=2)


@pytest.mark.parametrize("opcode", [number for number in range(16) if number != CLOSE])
def test_no_other_opcode_closes(opcode: int) -> None:
    assert scanned(frame(opcode, b"\x88\x00")) == State(True, closing=False, closed=False, frames=1)


@pytest.mark.parametrize("masked", [0, 0x80])
@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 4, (1 << 64) - 1])
def test_a_length_with_the_top_bit_never_ends(length: int, masked: int) -> None:
    for opcode in (BINARY, CLOSE):
        tracker = FrameTracker()
        data = bytes([FIN | opcode, masked | 127]) + length.to_bytes(8, "big")
        assert tracker.scan(data) == len(data)
        for _ in range(3):
            assert tracker.scan(bytes(1000), stop_at_boundary=True) == 1000
        assert state(tracker) == State(False, closing=opcode == CLOSE, closed=False, frames=0)


def test_the_longest_length_that_ends() -> None:
    tracker = FrameTracker()
    tracker.scan(b"\x82\xff\x7f" + b"\xff" * 7 + MASK)
    assert tracker.scan(bytes(1 << 20), stop_at_boundary=True) == 1 << 20
    assert not tracker.at_boundary


def test_stops_only_when_asked() -> None:
    data = frame(TEXT, b"a") + frame(TEXT, b"b")
    tracker = FrameTracker()
    assert tracker.scan(data, stop_at_boundary=True) == 0
    assert tracker.scan(data[:2], stop_at_boundary=True) == 0
    assert tracker.scan(data[:2]) == 2
    assert tracker.scan(b"", stop_at_boundary=True) == 0
    assert not tracker.at_boundary
    assert tracker.scan(data[2:], stop_at_boundary=True) == 1
    assert tracker.scan(data[3:], stop_at_boundary=False) == 3
    assert tracker.frames == 2


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffer_kinds(kind: type[bytes]) -> None:
    tracker = FrameTracker()
    assert tracker.scan(kind(frame(TEXT, b"abc"))) == 5
    assert tracker.frames == 1


def test_a_part_of_a_buffer_ends_where_it_ends() -> None:
    tracker = FrameTracker()
    assert tracker.scan(memoryview(b"x" + frame(TEXT, b"abc"))[1:-1]) == 4
    assert not tracker.at_boundary


def test_a_buffer_can_grow_after_the_scan() -> None:
    data = bytearray(frame(TEXT, b"abc"))
    tracker = FrameTracker()
    tracker.scan(data)
    data += b"more"  # a bytearray that is still exported can't
    assert tracker.scan(data[5:]) == 4


@pytest.mark.parametrize("data", ["text", None, 7, [13, 10]])
def test_refuses_what_is_not_bytes(data: object) -> None:
    with pytest.raises(TypeError):
        FrameTracker().scan(data)  # type: ignore[arg-type]  # the wrong type is the test


@pytest.mark.parametrize("name", ["at_boundary", "closing", "closed", "frames"])
def test_its_attributes_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(FrameTracker(), name, 1)


# Frames that an independent implementation builds


def peer(kind: ConnectionType, *, compressed: bool) -> Connection:
    """Open one end of a WebSocket connection after its handshake."""
    if not compressed:
        return Connection(kind)
    deflate = PerMessageDeflate()
    deflate.finalize("permessage-deflate")
    return Connection(kind, extensions=[deflate])


EVENTS: list[Event] = [
    TextMessage(data="hello"),
    BytesMessage(data=b"", message_finished=False),
    Ping(payload=b"are you there"),
    BytesMessage(data=bytes(126), message_finished=False),
    Pong(payload=b""),
    BytesMessage(data=os.urandom(70_000), message_finished=False),
    Ping(payload=bytes(125)),
    BytesMessage(data=b"end"),
    TextMessage(data="x" * 65_535),
    TextMessage(data=""),
]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [ConnectionType.CLIENT, ConnectionType.SERVER])
def test_follows_another_implementation(kind: ConnectionType, compressed: bool) -> None:
    sender = peer(kind, compressed=compressed)
    tracker = FrameTracker()
    for number, event in enumerate(EVENTS, 1):
        data = sender.send(event)
        assert bool(data[0] & 0x40) == (compressed and number in (1, 2, 9, 10))  # RSV1
        assert tracker.scan(data[:1]) == 1
        assert tracker.scan(data[1:] + b"next", stop_at_boundary=True) == len(data) - 1
        assert state(tracker) == State(True, closing=False, closed=False, frames=number)
    close = sender.send(CloseConnection(code=1000, reason="bye"))
    tracker.scan(close[:1])
    assert state(tracker) == State(False, closing=True, closed=False, frames=len(EVENTS))
    tracker.scan(close[1:])
    assert state(tracker) == State(True, closing=True, closed=True, frames=len(EVENTS) + 1)


MESSAGES = st.lists(
    st.one_of(
        st.builds(
            BytesMessage,
            data=st.one_of(st.binary(max_size=300), st.integers(125, 70_000).map(bytes)),
            message_finished=st.booleans(),
        ),
        st.builds(Ping, payload=st.binary(max_size=125)),
        st.builds(Pong, payload=st.binary(max_size=125)),
    ),
    max_size=8,
)


@at_least(100)
@given(
    MESSAGES,
    st.sampled_from(ConnectionType),
    st.booleans(),
    st.lists(st.integers(1, 2000), min_size=1, max_size=20),
)
def test_follows_another_implementation_in_pieces(
    events: list[Event], kind: ConnectionType, compressed: bool, sizes: list[int]
) -> None:
    sender = peer(kind, compressed=compressed)
    ends = {0: 0}
    data = b""
    for number, event in enumerate(events, 1):
        data += sender.send(event)
        ends[len(data)] = number
    tracker = FrameTracker()
    at = 0
    for size in [*sizes, len(data)]:
        at += tracker.scan(data[at : at + size])
        assert tracker.at_boundary == (at in ends)
        assert tracker.frames == max(number for end, number in ends.items() if end <= at)
    assert at == len(data)


# FNV-1a


@pytest.mark.parametrize(
    ("data", "value"),
    [
        # From the test vectors of the FNV authors.
        (b"", 0x811C9DC5),
        (b"a", 0xE40C292C),
        (b"b", 0xE70C2DE5),
        (b"foobar", 0xBF9CF968),
        (b"chongo was here!\n", 0xD49930D5),
    ],
)
def test_known_hashes(data: bytes, value: int) -> None:
    assert fnv1a_32(data) == value
    assert fnv.fnv1a_32(data) == value


@pytest.mark.fuzz
@at_least(200)
@given(st.binary(max_size=100))
def test_the_hash_agrees_with_its_twin(data: bytes) -> None:
    assert fnv1a_32(data) == fnv.fnv1a_32(data)
    assert fnv1a_32(memoryview(bytearray(data))) == fnv.fnv1a_32(data)


@pytest.mark.parametrize("data", ["text", None, 7])
def test_hashes_only_bytes(data: object) -> None:
    with pytest.raises(TypeError):
        fnv1a_32(data)  # type: ignore[arg-type]  # the wrong type is the test
