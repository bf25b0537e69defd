"""Clients that do anything, over a network that loses packets: what is answered is right, and
nothing is left over.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from tests.http.streams import open_world
from tests.http3.clients import Front, H3Client, open_front
from tests.http3.test_exchange import echo

if TYPE_CHECKING:
    from pathlib import Path

REQUESTS = 12


async def use(front: Front, seed: int) -> None:
    """Open a connection and do this and that on it."""
    rng = random.Random(seed)
    client = await front.connect()
    client.drop = lambda _way, _data: rng.random() < 0.05
    expected: dict[int, bytes] = {}
    for _ in range(REQUESTS):
        body = rng.randbytes(rng.choice([0, 1, 1000, 30_000, 100_000]))
        stream = client.request(method=b"POST", body=body, end=rng.random() < 0.9)
        if rng.random() < 0.5:
            await trio.sleep(rng.random() * 0.01)
        if not client.quic._streams[stream].sender._buffer_fin or rng.random() < 0.3:
            await give_up(client, stream, rng)
        else:
            expected[stream] = body
        if rng.random() < 0.1:
            client.move()
            client.flush()
    if seed % 3 == 0:
        client.vanish()
        return
    for stream, body in expected.items():
        answer = await client.answer(stream)
        assert (answer.status, answer.content) == (200, body)
    client.quic.close()
    client.flush()


async def give_up(client: H3Client, stream: int, rng: random.Random) -> None:
    """End a request in one of the ways that there are."""
    way = rng.randrange(4)
    if way in (0, 2):
        client.quic.reset_stream(stream, 0x10C)
    if way in (0, 1) and stream in client.quic._streams:
        client.quic.stop_stream(stream, 0x10C)
    if way == 3 and not client.quic._streams[stream].sender._buffer_fin:
        client.send_bytes(b"\x00\x05abc", stream_id=stream)
        client.quic.reset_stream(stream, 0x10C)
    client.flush()


@pytest.mark.parametrize("seed", range(2))
async def test_any_course(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        open_world(tmp_path, monkeypatch, echo, idle_timeout=2.0, stall_timeout=2.0) as world,
        open_front(world) as front,
    ):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(use, front, 100 * seed + number)
        # Those that are closed are remembered for a while, in case the last packet was lost.
        while world.server.connections or front.server.connections:
            await trio.lowlevel.checkpoint()
        limits = front.server._limits
        assert world.server.streams == limits.handshakes == limits.unproven == 0
        assert (limits.held, limits.output) == (0, 0)
    assert {line["status"] for line in world.logged} <= {200, 400, 408, 499}
