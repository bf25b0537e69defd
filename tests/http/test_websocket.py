"""The frames that the proxy itself sends, judged by an independent WebSocket implementation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection

from kamal_proxy._fastpath import FrameTracker
from kamal_proxy.http.websocket import GOING_AWAY, close_frame, is_websocket, masked_close_frame
from tests.fuzzing import at_least

MASK = b"\x37\xfa\x21\x3d"
# Those that wsproto takes for assigned, and those that are free for libraries and applications.
CODES = st.one_of(
    st.sampled_from([1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011]),
    st.integers(3000, 4999),
)
REASONS = st.text(max_size=30).map(str.encode)  # at most four bytes each


def received(kind: ConnectionType, data: bytes) -> list[tuple[int, str | None]]:
    """Return the codes and reasons with which that end says the connection was closed."""
    connection = Connection(kind)
    connection.receive_data(data)
    events = list(connection.events())
    assert all(isinstance(event, CloseConnection) for event in events)
    return [
        (int(event.code), event.reason) for event in events if isinstance(event, CloseConnection)
    ]


@pytest.mark.parametrize(
    "value",
    [
        b"websocket",
        b"WebSocket",
        b"WEBSOCKET",
        b" websocket\t",
        b"h2c, websocket",
        b"WebSocket,h2c",
        b"h2c,\tWebsocket ,foo",
    ],
)
def test_is_websocket(value: bytes) -> None:
    assert is_websocket(value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b",",
        b"h2c",
        b"websockets",
        b"web socket",
        b"websocket/13",
        b"xwebsocket",
        b"h2c websocket",
        b"websocket;q=1",
        b"websocket\0",
        b"websocket\x0b",
        "web\u017focket".encode(),  # a long s: a letter only Unicode takes for an s
    ],
)
def test_is_not_websocket(value: bytes) -> None:
    assert not is_websocket(value)


@pytest.mark.fuzz
@at_least(100)
@given(st.binary(max_size=40))
def test_is_websocket_takes_any_bytes(value: bytes) -> None:
    tokens = [token.strip(b" \t").upper() for token in value.split(b",")]
    assert is_websocket(value) == (b"WEBSOCKET" in tokens)


def test_the_bytes_of_a_close_frame() -> None:
    assert GOING_AWAY == 1001
    assert close_frame(GOING_AWAY) == b"\x88\x02\x03\xe9"
    assert close_frame(1000, b"bye") == b"\x88\x05\x03\xe8bye"
    assert masked_close_frame(1000, bytes(4), b"bye") == b"\x88\x85\0\0\0\0\x03\xe8bye"
    assert masked_close_frame(GOING_AWAY, MASK) == b"\x88\x82" + MASK + b"\x34\x13"


@at_least(100)
@given(CODES, REASONS)
def test_a_client_understands_the_close_frame(code: int, reason: bytes) -> None:
    expected = [(code, reason.decode())]
    assert received(ConnectionType.CLIENT, close_frame(code, reason)) == expected


@at_least(100)
@given(CODES, REASONS, st.binary(min_size=4, max_size=4))
def test_a_server_understands_the_masked_close_frame(code: int, reason: bytes, mask: bytes) -> None:
    data = masked_close_frame(code, mask, reason)
    assert received(ConnectionType.SERVER, data) == [(code, reason.decode())]


@at_least(100)
@given(CODES, st.binary(max_size=123))
def test_the_tracker_sees_one_close_frame(code: int, reason: bytes) -> None:
    for data in (close_frame(code, reason), masked_close_frame(code, MASK, reason)):
        tracker = FrameTracker()
        tracker.scan(data)
        assert (tracker.frames, tracker.at_boundary, tracker.closed) == (1, True, True)


def test_the_longest_reason() -> None:
    assert len(close_frame(GOING_AWAY, b"x" * 123)) == 2 + 125
    assert len(masked_close_frame(GOING_AWAY, MASK, b"x" * 123)) == 2 + 4 + 125
    with pytest.raises(ValueError, match=r"close reason of 124 bytes.* at most 125"):
        close_frame(GOING_AWAY, b"x" * 124)
    with pytest.raises(ValueError, match=r"close reason of 124 bytes.* at most 125"):
        masked_close_frame(GOING_AWAY, MASK, b"x" * 124)


@pytest.mark.parametrize("code", [-1, 0, 999, 1005, 1006, 1015, 5000, 65535, 65536])
def test_codes_that_must_not_be_sent(code: int) -> None:
    with pytest.raises(ValueError, match=f"close code {code} must not be sent"):
        close_frame(code)
    with pytest.raises(ValueError, match=f"close code {code} must not be sent"):
        masked_close_frame(code, MASK)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_mask_has_four_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"masking key of {size} bytes"):
        masked_close_frame(GOING_AWAY, bytes(size))
