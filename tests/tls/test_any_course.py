"""Encrypted streams under any course of reads, writes, looks and pieces: nothing lost, nothing new.

Each step is a call that does not wait. What was sent so far is compared with what has arrived.
"""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING

import pytest
from trio.testing import wait_all_tasks_blocked

from tests.fuzzing import PROFILE
from tests.pairs import running_poller
from tests.tls.peers import VERSIONS, Peer, calling, secured

if TYPE_CHECKING:
    import ssl

    from kamal_proxy.tls.stream import TlsStream

BOTH = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
SIZES = (1, 5, 100, 1000, 16_383, 16_384, 16_385, 40_000, 65_536, 70_000, 200_000)


class Course:
    """A random course of a connection.

    Args:
        stream: The server's side.
        peer: The client's.
        seed: Of the course.
    """

    def __init__(self, stream: TlsStream, peer: Peer, seed: int) -> None:
        self._stream = stream
        self._peer = peer
        self._random = random.Random(seed)
        self._records = b""  # of the peer, on their way to its socket
        self._up, self._got_up = b"", b""
        self._rest = b""  # of our write
        self._down, self._got_down = b"", b""

    def step(self) -> None:
        """Do one thing."""
        self._random.choice(
            (self._encrypt, self._pass_on, self._receive, self._look, self._send, self._fetch)
        )()

    def _encrypt(self) -> None:
        data = self._random.randbytes(self._random.choice(SIZES))
        if len(self._records) < 300_000:
            self._up += data
            self._records += self._peer.encrypt(data)

    def _pass_on(self) -> None:
        size = self._random.choice(SIZES)
        try:
            count = self._peer.far.send(self._records[:size])
        except BlockingIOError:
            return
        self._records = self._records[count:]

    def _receive(self) -> None:
        size = self._random.choice(SIZES)
        data = self._stream.receive_nowait(size)
        assert data is None or 0 < len(data) <= size
        self._got_up += data or b""
        assert self._up.startswith(self._got_up)

    def _look(self) -> None:
        assert not self._stream.at_eof_nowait()
        assert not self._stream.hung_up
        quiet = self._stream.is_quiet_nowait()
        data = self._stream.receive_nowait(1)
        assert quiet == (data is None)
        self._got_up += data or b""

    def _send(self) -> None:
        if not self._rest:
            self._rest = self._random.randbytes(self._random.choice(SIZES))
            self._down += self._rest
        size = self._random.choice((*SIZES, len(self._rest)))
        part = memoryview(self._rest)[:size]
        self._rest = self._rest[self._stream.send_nowait(part) :]

    def _fetch(self) -> None:
        if self._random.random() < 0.5:
            self._got_down += self._peer.receive()
            assert self._down.startswith(self._got_down)

    async def finish(self) -> None:
        """Pass on what is on its way; nothing may be missing."""
        while self._records or self._rest or self._got_up != self._up:
            self._pass_on()
            self._got_up += self._stream.receive_nowait() or b""
            if self._rest:
                self._rest = self._rest[self._stream.send_nowait(self._rest) :]
            self._got_down += self._peer.receive()
        self._got_down += self._peer.receive()
        assert self._got_down == self._down
        self._peer.far.sendall(self._peer.goodbye())
        await wait_all_tasks_blocked()
        assert self._stream.hung_up
        assert self._stream.receive_nowait() == b""


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for each in pair:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    return pair


@pytest.mark.fuzz
@BOTH
async def test_any_course(version: ssl.TLSVersion, request: pytest.FixtureRequest) -> None:
    many = request.config.getoption("--hypothesis-profile") == PROFILE
    async with running_poller() as poller:
        for seed in range(500 if many else 15):
            async with secured(poller, calling(version), pair=narrow_pair) as (stream, peer):
                course = Course(stream, peer, seed)
                for _ in range(300):
                    course.step()
                await course.finish()
