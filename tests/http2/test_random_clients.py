"""Clients that send anything: the server neither raises, nor hangs, nor leaves anything behind."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest
import trio
from h2.exceptions import ProtocolError
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from kamal_proxy.http.h2_codec import ServerCodec
from kamal_proxy.http.h2_guard import PREFACE, FloodError, FrameError, FrameGuard
from tests.fuzzing import at_least
from tests.http.streams import HELLO, open_world, read_head
from tests.http2.clients import PriorKnowledge

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":authority", b"app.test"),
    (b":path", b"/"),
]
BLOCKS = [
    Encoder().encode(REQUEST),
    Encoder().encode([*REQUEST, (b"content-length", b"3")]),
    Encoder().encode([*REQUEST, (b"X", b"1\r\n")]),
    Encoder().encode([(b"trailer", b"1")]),
    Encoder().encode([(b":method", b"CONNECT"), (b":protocol", b"websocket"), *REQUEST[1:]]),
    b"",
    b"\x82\x86\xff",
    b"\x3f\xe1\xff\x03",
]
STREAMS = [0, 1, 1, 1, 3, 3, 5, 7, 2]


def frame(kind: int, payload: bytes, flags: int, stream: int) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


def some_frames(chance: random.Random, count: int) -> bytes:
    """Return frames that are mostly legal one by one, and seldom together."""
    data = b""
    for _ in range(count):
        kind = chance.choice([0, 0, 1, 1, 1, 1, 2, 3, 4, 6, 7, 8, 8, 9, 0x10])
        flags = chance.choice([0, 1, 4, 5, 5, 8, 0x20, 0x25, 0xFF])
        if kind in (1, 9):
            payload = chance.choice(BLOCKS)
            flags = chance.choice([1, 4, 4, 5, 5, 0x24])
        elif kind == 8:
            payload = chance.choice([b"\x00\x00\x00\x01", b"\x7f\xff\xff\xff", bytes(4)])
        else:
            size = {2: 5, 3: 4, 4: 6, 6: 8, 7: 8}.get(kind, chance.choice([0, 1, 3, 100]))
            size += chance.random() < 0.03
            payload = chance.randbytes(size)
        data += frame(kind, payload, flags, chance.choice(STREAMS) if kind not in (4, 6, 7) else 0)
    return data


class LegalClient:
    """Sends what is legal, in any order; now and then something that is not."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._next = 1
        self._open: list[int] = []

    def frames(self, count: int) -> bytes:
        return b"".join(self._one() for _ in range(count))

    def _one(self) -> bytes:
        chance = self._chance
        act = chance.random()
        if act < 0.01:
            return some_frames(chance, 1)
        if act < 0.35 or not self._open:
            stream, self._next = self._next, self._next + 2
            block = chance.choice([0, 0, 0, 0, 2, 4])
            ended = chance.random() < 0.4
            if not ended:
                self._open.append(stream)
            return frame(1, BLOCKS[block], 4 | ended, stream)
        stream = chance.choice(self._open)
        if act < 0.6:
            return frame(0, chance.randbytes(chance.choice([1, 5, 500])), 0, stream)
        if act < 0.75:
            self._open.remove(stream)
            return frame(0, b"end", 1, stream)
        if act < 0.8:
            self._open.remove(stream)
            return frame(1, BLOCKS[3], 5, stream)
        if act < 0.88:
            self._open.remove(stream)
            return frame(3, (8).to_bytes(4, "big"), 0, stream)
        if act < 0.93:
            return frame(8, (1000).to_bytes(4, "big"), 0, chance.choice([0, stream]))
        if act < 0.96:
            window = chance.choice([0, 1, 3, 65535, 2**20])
            return frame(4, b"\x00\x04" + window.to_bytes(4, "big"), 0, 0)
        return frame(6, bytes(8), 0, 0)


async def answer(stream: trio.SocketStream) -> None:
    """Answer at random moments, and not always well."""
    chance = random.Random(1)
    while await read_head(stream):
        if chance.random() < 0.1:
            return
        await stream.send_all(
            chance.choice([HELLO, HELLO, b"HTTP/1.1 200 OK\r\n\r\nx", b"nonsense"])
        )


async def attack(directory: Path, monkeypatch: pytest.MonkeyPatch, seed: int, rounds: int) -> None:
    print(f"{seed=}")  # for a failure to be repeated
    chance = random.Random(seed)
    async with open_world(directory, monkeypatch, answer, stall_timeout=1.0) as world:
        for _ in range(rounds):
            stream, far = world.pair()
            stream.__class__ = PriorKnowledge
            world.nursery.start_soon(world.serve, stream)
            try:
                await far.send_all(PREFACE + frame(4, b"", 0, 0))
                legal = LegalClient(chance)
                for _ in range(chance.randrange(12)):
                    await far.send_all(legal.frames(chance.randrange(1, 30)))
                    for _ in range(chance.randrange(3)):
                        await trio.lowlevel.checkpoint()
            except trio.BrokenResourceError:
                pass  # it has had enough
            await far.aclose()
        with trio.fail_after(20):
            while world.server.connections:
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert world.server.streams == 0
        assert not world.lines.of("Connection failed")


async def test_random_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await attack(tmp_path, monkeypatch, 1, 30)


@pytest.mark.fuzz
async def test_many_random_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await attack(tmp_path, monkeypatch, random.randrange(2**32), settings().max_examples // 2)


@at_least(200)
@given(st.binary(max_size=200), st.integers(0, 2**32))
def test_the_library_raises_its_own_errors_only(noise: bytes, seed: int) -> None:
    codec, guard = ServerCodec(65536), FrameGuard(100_000, 0.0)
    codec.initiate_connection()
    guard.feed(PREFACE + frame(4, b"", 0, 0) + some_frames(random.Random(seed), 20) + noise)
    with contextlib.suppress(ProtocolError, FloodError, FrameError):
        for each in guard.frames(0.0):
            codec.receive_data(each)
