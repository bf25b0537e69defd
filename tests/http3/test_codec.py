"""HTTP/3 frames, in any pieces, and whatever else clients may send as such."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from aioquic.buffer import Buffer, encode_uint_var  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http import h3_codec
from kamal_proxy.http.h3_codec import H3Error, RequestReader, Section, ServerCodec

NUMBERS = st.integers(0, 2**62 - 1)


@pytest.mark.fuzz
@given(NUMBERS)
def test_numbers(value: int) -> None:
    written = h3_codec.varint(value)
    assert written == encode_uint_var(value)
    assert h3_codec.read_varint(b"ab" + written + b"c", 2) == (value, 2 + len(written))
    for cut in range(len(written)):
        assert h3_codec.read_varint(written[:cut], 0) == (0, 0)


def test_a_number_that_is_too_large() -> None:
    with pytest.raises(ValueError, match="too large"):
        h3_codec.varint(2**62)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.fuzz
@given(
    st.binary(max_size=100),
    st.lists(st.binary(max_size=50), max_size=5),
    st.booleans(),
    st.lists(st.integers(0, 1000), max_size=10),
    st.sampled_from([0x21, 0x40, 0xF0700, 2**40]),
)
def test_a_request_in_any_pieces(
    head: bytes, body: list[bytes], trailers: bool, cuts: list[int], unknown: int
) -> None:
    sent = h3_codec.frame(unknown, b"ignored") + h3_codec.frame(1, head)
    for part in body:
        sent += h3_codec.data_frame(part) + h3_codec.frame(unknown, b"")
    if trailers:
        sent += h3_codec.frame(1, b"trailers")
    reader = RequestReader(1000)
    found: list[Section | bytes] = []
    for piece in pieces(sent, cuts):
        found += reader.feed(piece)
    reader.end()
    assert found[0] == Section(head)
    if trailers:
        assert found.pop() == Section(b"trailers")
    assert b"".join(part for part in found[1:] if isinstance(part, bytes)) == b"".join(body)


@pytest.mark.fuzz
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_request_stream(parts: list[bytes]) -> None:
    reader = RequestReader(20)
    with contextlib.suppress(H3Error):
        for part in parts:
            reader.feed(part)
            assert len(reader._kept) <= 20
            assert len(reader._begin) < 16
        reader.end()


def test_a_large_section_is_not_kept() -> None:
    reader = RequestReader(10)
    sent = h3_codec.frame(1, bytes(11)) + h3_codec.data_frame(b"body")
    assert [part for byte in sent for part in reader.feed(bytes([byte]))] == [
        Section(None), b"b", b"o", b"d", b"y",
    ]  # fmt: skip
    assert reader._kept == b""


def test_no_trailers_behind_a_tunnel() -> None:
    reader = RequestReader(10)
    reader.feed(h3_codec.frame(1, b"head"))
    reader.tunnelled = True
    assert reader.feed(h3_codec.data_frame(b"x")) == [b"x"]
    with pytest.raises(H3Error) as caught:
        reader.feed(h3_codec.frame(1, b"more"))
    assert caught.value.code == h3_codec.FRAME_UNEXPECTED


@pytest.mark.fuzz
@given(st.lists(st.tuples(st.sampled_from([2, 6, 10]), st.binary(max_size=30), st.booleans())))
def test_any_other_streams(received: list[tuple[int, bytes, bool]]) -> None:
    codec = ServerCodec(1000)
    ended = set()
    with contextlib.suppress(H3Error):
        for stream_id, data, end in received:
            if stream_id in ended:
                continue
            codec.receive(stream_id, data, ended=end)
            if end:
                ended.add(stream_id)
                assert stream_id not in codec._types
                assert stream_id not in codec._begins


@pytest.mark.fuzz
@given(st.binary(max_size=60))
def test_any_field_section(block: bytes) -> None:
    with contextlib.suppress(H3Error):
        for name, value in ServerCodec(1000).decode(0, block):
            assert isinstance(name, bytes)
            assert isinstance(value, bytes)


def test_the_control_stream_in_single_bytes() -> None:
    codec = ServerCodec(1000)
    sent = h3_codec.varint(0) + h3_codec.frame(4, b"\x06\x10") + h3_codec.frame(0x21, b"grease")
    for byte in sent + h3_codec.goaway(0) + h3_codec.frame(0xD, b"\x00"):
        assert codec.receive(2, bytes([byte]), ended=False)


def test_what_a_client_is_told() -> None:
    buffer = Buffer(data=ServerCodec(5000).preface())
    assert [buffer.pull_uint_var() for _ in range(2)] == [0, 4]
    length = buffer.pull_uint_var()
    assert length == len(buffer.data_slice(buffer.tell(), buffer.capacity))
    settings = {}
    while not buffer.eof():
        name = buffer.pull_uint_var()
        settings[name] = buffer.pull_uint_var()
    assert settings == {1: 0, 6: 5000, 7: 0, 8: 1}
