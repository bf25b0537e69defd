"""Whatever a target sends, a request ends: with an answer or a reason. Nothing else breaks."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from hpack import Encoder
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.h2_target import H2TargetConnection
from tests.fuzzing import at_least
from tests.pairs import running_poller

if TYPE_CHECKING:
    from kamal_proxy.http.h2_upstream import H2Upstream

SETTINGS = b"\0\0\0\4\0\0\0\0\0"
FIELDS = [
    [(b":status", b"200")],
    [(b":status", b"200"), (b"content-length", b"3")],
    [(b":status", b"103")],
    [(b":status", b"100"), (b"x", b"y")],
    [(b"grpc-status", b"0")],
    [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"a")],
    [],
]
BLOCKS = [Encoder().encode([(name, value, True) for name, value in each]) for each in FIELDS]


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")
    return head + payload


FRAMES = st.builds(
    frame,
    st.integers(0, 10),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0xFF]),
    st.sampled_from([0, 1, 1, 1, 2, 3]),
    st.sampled_from(BLOCKS)
    | st.sampled_from([b"", b"abc", bytes(4), bytes(5), bytes(8), bytes(6)])
    | st.binary(max_size=20),
)


async def ask(upstream: H2Upstream) -> None:
    """Have a request answered, or find out why it is not."""
    upstream.request(b"GET", b"/", [(b"Host", b"a")])
    upstream.end()
    with contextlib.suppress(trio.BrokenResourceError):
        await upstream.send(b"")
    while True:
        head = upstream.next_response()
        if head is not None and head.status >= 200:
            break
        if head is None:
            await upstream.receive(None)
    while not upstream.received:
        await upstream.receive(None)
        upstream.take_body()


@pytest.mark.fuzz
@at_least(300)
@given(st.lists(FRAMES | st.binary(max_size=20), max_size=20))
@example([frame(1, 4, 1, BLOCKS[0]), frame(3, 0, 1, bytes(4)), frame(1, 4, 1, BLOCKS[2])])
@example([frame(1, 5, 1, BLOCKS[0]), frame(1, 5, 1, BLOCKS[0])])
@example([frame(7, 0, 0, bytes(8)), frame(1, 5, 1, BLOCKS[0])])
def test_any_frames(parts: list[bytes]) -> None:
    async def main() -> None:
        async with running_poller() as poller:
            near, far = socket.socketpair()
            connection = H2TargetConnection(poller.open_stream(near), 4096)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.run)
                    far.sendall(SETTINGS)
                    await connection.ready.wait()
                    one, two = connection.take(reused=False), connection.take(reused=False)
                    for part in parts:
                        far.sendall(part)
                    far.shutdown(socket.SHUT_WR)
                    for upstream in (one, two):
                        with contextlib.suppress(ProtocolError):
                            await ask(upstream)
                        upstream.release()
                    connection.close()
            far.close()
            assert connection.failure
            assert "internal error" not in connection.failure

    trio.run(main)
