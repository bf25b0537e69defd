"""The compiled scanners say what their slow twins say, whole or in pieces, for any bytes."""

from __future__ import annotations

import importlib.machinery
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy import _fastpath
from kamal_proxy._fastpath import ChunkScanner, scan_head
from tests.fuzzing import at_least
from tests.reference import chunks
from tests.reference import head as reference

# Mostly the bytes on which something depends, in the pairs in which they occur.
PIECES = st.one_of(
    st.sampled_from([b"\r\n", b"\r\n\r\n", b"\r", b"\n", b" ", b"\t", b"\0", b"\x7f", b"\x1f"]),
    st.sampled_from([b"GET / HTTP/1.1", b"Host: a", b"x", b"\x80", b"\xff", b"\x0b"]),
    st.binary(max_size=3),
)
HEADS = st.lists(PIECES, max_size=12).map(b"".join)
# Without defects, so that long scans and their ends are tried too.
CLEAN = st.lists(st.sampled_from([b"\r\n", b"a", b"b: c"]), max_size=16).map(b"".join)


def verdict(data: bytes | bytearray, start: int = 0) -> int | str:
    try:
        return scan_head(data, start)
    except ValueError as error:
        return str(error)


def expected(data: bytes) -> int | str:
    try:
        return reference.scan_head(data)
    except ValueError as error:
        return str(error)


def test_is_the_extension() -> None:
    assert _fastpath.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", -1),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", -1),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r", -1),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 27),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody\n\0", 27),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", "line ends in LF without CR"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\n", "line ends in LF without CR"),
        (b"\n", "line ends in LF without CR"),
        (b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", "CR without LF"),
        (b"GET / HTTP/1.1\r\r\n", "CR without LF"),
        (b"GET /\0 HTTP/1.1\r\n\r\n", "control character"),
        (b"GET /\x7f HTTP/1.1\r\n\r\n", "control character"),
        (b"A: b\r\n c\r\n\r\n", "folded header line"),
        (b"A: b\r\n\tc\r\n\r\n", "folded header line"),
        (b"A:\tb\r\n\r\n", 8),
        (b"A: \xe4\xff\r\n\r\n", 9),
    ],
)
def test_verdicts(data: bytes, result: int | str) -> None:
    assert verdict(data) == result
    assert expected(data) == result


@pytest.mark.fuzz
@at_least(400)
@given(st.one_of(HEADS, CLEAN))
def test_agrees_with_its_twin(data: bytes) -> None:
    assert verdict(data) == expected(data)


@pytest.mark.fuzz
@at_least(150)
@given(st.one_of(HEADS, CLEAN))
def test_resumed_after_any_prefix_says_the_same(data: bytes) -> None:
    for size in range(len(data) + 1):
        if verdict(data[:size]) == -1:
            assert verdict(data, max(0, size - 3)) == verdict(data), size


@pytest.mark.fuzz
@at_least(150)
@given(st.one_of(HEADS, CLEAN), st.data())
def test_fed_in_pieces_says_the_same_as_whole(data: bytes, draws: st.DataObject) -> None:
    buffer = bytearray()
    start = 0
    result: int | str = -1
    while len(buffer) < len(data):
        size = draws.draw(st.integers(1, 4))
        buffer += data[len(buffer) : len(buffer) + size]
        result = verdict(buffer, start)
        if result != -1:
            break
        start = max(0, len(buffer) - 3)
    assert result == expected(bytes(buffer))
    if isinstance(result, int):
        assert result == verdict(data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffer_kinds(kind: type[bytes]) -> None:
    assert scan_head(kind(b"A: b\r\n\r\nrest")) == 8


def test_a_part_of_a_buffer_ends_where_it_ends() -> None:
    assert scan_head(memoryview(b"xA: b\r\n\r\n")[1:-1]) == -1


def test_refuses_a_buffer_with_gaps() -> None:
    with pytest.raises(BufferError):
        scan_head(memoryview(b"A: b\r\n\r\n")[::2])


@pytest.mark.parametrize("data", ["text", None, 7, [13, 10]])
def test_refuses_what_is_not_bytes(data: object) -> None:
    with pytest.raises(TypeError):
        scan_head(data)  # type: ignore[arg-type]  # the wrong type is the test


def test_a_buffer_can_grow_after_the_scan() -> None:
    data = bytearray(b"A")
    scan_head(data)
    with pytest.raises(ValueError, match="control character"):
        scan_head(bytearray(b"\0"))
    data += b"b"  # a bytearray that is still exported can't


@pytest.mark.parametrize("start", [-1, 3, 2**62, -(2**62)])
def test_start_outside_the_data(start: int) -> None:
    with pytest.raises(IndexError):
        scan_head(b"ab", start)


def test_start_at_the_end() -> None:
    assert scan_head(b"ab", 2) == -1


# Chunked bodies

CHUNK_LIMIT = 6
CHUNKS = st.lists(
    st.one_of(
        st.sampled_from(
            [b"3\r\nabc\r\n", b"0\r\n\r\n", b"0\r\n", b"2;a=b\r\n\r\n\r\n", b"1\r\nx\r\n"]
        ),
        st.sampled_from(
            [b"A:b\r\n", b"\r\n", b"\r", b"\n", b" ", b"\t", b";", b"\0", b"\x7f", b"a", b"F"]
        ),
        st.sampled_from([b"0" * 14, b"0" * 15, b"x" * 5, b"g", b"-1", b"\xff"]),
        st.binary(max_size=2),
    ),
    max_size=10,
).map(b"".join)


def followed(data: bytes, cuts: list[int]) -> tuple[int, bool] | str:
    """Scan a body in pieces."""
    scanner = ChunkScanner(CHUNK_LIMIT)
    used = 0
    try:
        for begin, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
            used += scanner.scan(data[begin:end])
    except ValueError as error:
        return str(error)
    return used, scanner.done


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", (0, False)),
        (b"3\r\nabc\r\n0\r\n\r\nnext", (13, True)),
        (b"3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\n", (23, True)),
        (b"\r\n", "malformed chunk size"),
        (b"0x1\r\n", "malformed chunk size"),
        (b"1 \r\n", "malformed chunk size"),
        (b"1\n", "malformed chunk size"),
        (b"0" * 16, "chunk size of more than 15 digits"),
        (b"1;1234567", "chunk extension or trailers too long"),
        (b"1;\n", "control character in chunked framing"),
        (b"1\rx", "CR without LF in chunked framing"),
        (b"1\r\nab", "chunk longer than its size"),
        (b"1\r\na\rb", "CR without LF in chunked framing"),
        (b"0\r\n A", "folded trailer line"),
        (b"0\r\nA:b\r\nC:d\r\nE", "chunk extension or trailers too long"),
        (b"0\r\n\rx", "CR without LF in chunked framing"),
    ],
)
def test_chunk_verdicts(data: bytes, result: tuple[int, bool] | str) -> None:
    assert followed(data, []) == result
    assert followed(data, list(range(len(data)))) == result


@pytest.mark.fuzz
@at_least(400)
@given(CHUNKS, st.data())
def test_chunks_agree_with_their_twin(data: bytes, draws: st.DataObject) -> None:
    cuts = draws.draw(st.lists(st.integers(0, len(data)), max_size=5))
    try:
        expected: tuple[int, bool] | str = chunks.scan(data, CHUNK_LIMIT)
    except ValueError as error:
        expected = str(error)
    assert followed(data, cuts) == expected
