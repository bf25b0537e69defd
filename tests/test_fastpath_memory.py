"""The compiled scanners read no byte that is not theirs and keep none: ``make sanitize``.

Under AddressSanitizer a read outside a buffer ends the process. bytes and bytearray have a spare
byte at the end that hides one; the arrays here have none.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamal_proxy import _fastpath
from kamal_proxy._fastpath import (
    ChunkScanner,
    FrameTracker,
    fnv1a_32,
    rewrite_request,
    rewrite_response,
    scan_head,
)
from tests.http.head_samples import (
    ODD_REQUESTS,
    ODD_RESPONSES,
    ORDINARY_REQUESTS,
    ORDINARY_RESPONSES,
)

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
ROUNDS = int(os.environ.get("LEAK_ROUNDS", "50000"))
LIMIT = 6

HEADS = [
    *ORDINARY_REQUESTS.values(),
    *ODD_REQUESTS.values(),
    *(data for _, data in (*ORDINARY_RESPONSES.values(), *ODD_RESPONSES.values())),
]
LONG = 1500  # bytes
HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BODY = b"3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\n"
FRAMES = (
    b"\x81\x03abc"  # unmasked
    b"\x09\x80mask"  # masked, empty
    b"\x82\xfe\x00\x02maskab"  # 16-bit length
    b"\x88\x7f\0\0\0\0\0\0\0\x01x"  # 64-bit length
)
ENDS = [b"\r", b"\n", b" ", b"\t", b"\0", b"\x7f", b"\xff", b"0", b"a", b";", b":"]
NOISE = st.lists(
    st.one_of(
        st.sampled_from([b"\r\n", b"\r\n\r\n", b"A: b", b"3\r\nabc\r\n", b"0\r\n", *ENDS]),
        st.sampled_from([b"\x81\x03abc", b"\x88\xfe\0\x02", b"\x82\x7f", b"\0" * 7, b"\x80"]),
        st.binary(max_size=3),
    ),
    max_size=12,
).map(b"".join)


def exact(data: bytes) -> memoryview:
    """Return the data in a buffer that ends where the data ends."""
    return memoryview(array("B", data)[:])


def head_verdict(data: bytes | memoryview, start: int) -> int | str:
    try:
        return scan_head(data, start)
    except ValueError as error:
        return str(error)


def rewritten(data: bytes | memoryview) -> tuple[object, object]:
    """Return what becomes of a head, be it of a request or of a response."""
    request = rewrite_request(
        data, client=b"c", scheme=b"http", target=b"t", request_id=b"i", start=1, believed=True
    )
    return request, rewrite_response(data, b"GET", added=b"A: b\r\n", closes=True)


def chunk_verdict(pieces: list[memoryview] | list[bytes]) -> tuple[int, bool] | str:
    scanner = ChunkScanner(LIMIT)
    try:
        return sum([scanner.scan(piece) for piece in pieces]), scanner.done
    except ValueError as error:
        return str(error)


def frame_verdict(
    pieces: list[memoryview] | list[bytes],
) -> tuple[list[int], bool, bool, bool, int]:
    """Scan the pieces, each of them to its first boundary and then to its end."""
    tracker = FrameTracker()
    used: list[int] = []
    for piece in pieces:
        used.append(tracker.scan(piece, stop_at_boundary=True))
        used.append(tracker.scan(piece[used[-1] :]))
    return used, tracker.at_boundary, tracker.closing, tracker.closed, tracker.frames


def test_the_build_under_test_is_the_one_that_was_asked_for() -> None:
    """In particular, the instrumented build has not replaced the normal one."""
    assert (b"__asan_init" in Path(_fastpath.__file__).read_bytes()) == SANITIZED


@pytest.mark.parametrize("end", [b"", *ENDS])
def test_every_prefix_of_a_message_ends_where_its_buffer_ends(end: bytes) -> None:
    for size in range(len(HEAD) + 1):
        data = HEAD[:size] + end
        for start in range(len(data) + 1):
            assert head_verdict(exact(data), start) == head_verdict(data, start)
    for size in range(len(BODY) + 1):
        data = BODY[:size] + end
        assert chunk_verdict([exact(data)]) == chunk_verdict([data])
    for size in range(len(FRAMES) + 1):
        data = FRAMES[:size] + end
        assert frame_verdict([exact(data)]) == frame_verdict([data])
        assert fnv1a_32(exact(data)) == fnv1a_32(data)


def test_every_prefix_of_a_head_ends_where_its_buffer_ends() -> None:
    for data in HEADS:
        for size in (*range(min(len(data), LONG)), *range(max(0, len(data) - LONG), len(data))):
            assert rewritten(exact(data[:size])) == rewritten(data[:size])
        assert rewritten(exact(data)) == rewritten(data)
        for end in ENDS:
            for size in range(min(len(data), 120)):
                assert rewritten(exact(data[:size] + end)) == rewritten(data[:size] + end)


@pytest.mark.fuzz
@settings(deadline=None)
@given(NOISE, st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_end_where_their_buffer_ends(data: bytes, start: int, cut: int) -> None:
    start = min(start, len(data))
    assert head_verdict(exact(data), start) == head_verdict(data, start)
    assert rewritten(exact(data)) == rewritten(data)
    pieces = [data[:cut], data[cut:]]
    assert chunk_verdict([exact(piece) for piece in pieces]) == chunk_verdict(pieces)
    assert frame_verdict([exact(piece) for piece in pieces]) == frame_verdict(pieces)
    assert fnv1a_32(exact(data)) == fnv1a_32(data)


def exercise(rounds: int) -> None:
    """Take every way out of every call, errors included."""
    data = bytearray(HEAD)
    for number in range(rounds):
        scan_head(data)
        head_verdict(b"a\n", 0)
        rewritten(HEAD)
        rewritten(RESPONSE)
        scanner = ChunkScanner(LIMIT)
        scanner.scan(BODY)
        chunk_verdict([b"3\r\nabcd"])
        frame_verdict([FRAMES])
        fnv1a_32(data)
        if number % 16 == 0:
            with pytest.raises(IndexError):
                scan_head(data, -1)
            with pytest.raises(TypeError):
                rewritten("")  # type: ignore[arg-type]  # the wrong type is the test
            with pytest.raises(ValueError, match="more than the path"):
                rewrite_request(
                    HEAD,
                    client=b"c",
                    scheme=b"s",
                    target=b"t",
                    request_id=b"i",
                    start=1,
                    stripped=2,
                )
            with pytest.raises(TypeError):
                scanner.scan("")  # type: ignore[arg-type]  # the wrong type is the test
            with pytest.raises(TypeError):
                FrameTracker().scan("")  # type: ignore[arg-type]  # the wrong type is the test
            with pytest.raises(TypeError):
                fnv1a_32("")  # type: ignore[arg-type]  # the wrong type is the test


def occupied() -> tuple[int, int]:
    """Return Python's allocated blocks and the bytes of this process in memory."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return sys.getallocatedblocks(), int(pages) * resource.getpagesize()


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
def test_nothing_is_kept() -> None:
    exercise(2_000)
    blocks, memory = occupied()
    exercise(ROUNDS)
    blocks_after, memory_after = occupied()
    assert blocks_after - blocks < ROUNDS // 100
    assert memory_after - memory < 1 << 20
