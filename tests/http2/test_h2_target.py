"""One HTTP/2 connection to a target by itself: what waits in it, and what ends it."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.http import h2_target
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.h2_codec import MAX_TARGET_FRAME as MAX_FRAME
from kamal_proxy.http.h2_outbox import MAX_BACKLOG
from kamal_proxy.http.h2_target import H2TargetConnection
from tests.pairs import running_poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kamal_proxy.http.h2_upstream import H2Upstream

HUGE = 2**30
PART = bytes(64 * 1024)


@attrs.define(eq=False)
class Far:
    """The target's end, which reads only when it is told to."""

    sock: socket.socket
    stream: trio.SocketStream
    h2: H2Connection

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def read(self) -> bool:
        """Read something; False at the end."""
        data = await self.stream.receive_some(65536)
        if data:
            self.h2.receive_data(data)
        return bool(data)


@asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[H2TargetConnection, Far]]:
    """Open a connection whose target has windows of a gigabyte."""
    async with running_poller() as poller:
        near, far_socket = socket.socketpair()
        connection = H2TargetConnection(poller.open_stream(near), 64 * 1024)
        h2 = H2Connection(H2Configuration(client_side=False))
        h2.local_settings = Settings(
            client=False, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: HUGE}
        )
        h2.initiate_connection()
        h2.increment_flow_control_window(HUGE)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(far_socket))
        async with stream, trio.open_nursery() as nursery:
            far = Far(far_socket, stream, h2)
            nursery.start_soon(connection.run)
            await far.flush()
            await connection.ready.wait()
            yield connection, far
            connection.close()


async def upload(upstream: H2Upstream, count: int) -> None:
    """Send parts of a body."""
    for _ in range(count):
        upstream.body(PART)
        await upstream.send(b"")


def begin(upstream: H2Upstream) -> None:
    upstream.request(b"POST", b"/", [(b"Host", b"a")])


async def test_what_waits_for_a_target_that_reads_nothing() -> None:
    """However large its windows: whoever has more to send waits, and goes on later."""
    sent = 0

    async def send(upstream: H2Upstream) -> None:
        nonlocal sent
        begin(upstream)
        for _ in range(64):
            await upload(upstream, 1)
            sent += len(PART)
        upstream.end()
        await upstream.send(b"")

    async with open_pair() as (connection, far):
        upstreams = [connection.take(reused=False) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for upstream in upstreams:
                nursery.start_soon(send, upstream)
            await wait_all_tasks_blocked()
            assert len(connection._outbox) <= MAX_BACKLOG + MAX_FRAME + 1000
            assert sent < 3 * 1024 * 1024  # the rest is what the kernel holds
            while sent < 3 * 64 * len(PART) or len(connection._outbox):
                assert await far.read()
        for upstream in upstreams:
            upstream.release()


async def test_answers_to_a_target_that_does_not_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It only asks. What it is owed does not grow without end."""
    monkeypatch.setattr(h2_target, "MAX_IDLE_FRAMES", 10**9)  # not what is to end it
    pings = (b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)) * 1000

    async def ask(far: Far) -> None:
        while True:
            await far.stream.send_all(pings)

    async with open_pair() as (connection, far):
        with pytest.raises(trio.BrokenResourceError):
            await ask(far)
        assert connection.failure == "the target reads nothing"


async def test_a_target_that_has_closed_its_reading_side_may_still_answer() -> None:
    async with open_pair() as (connection, far):
        upstream = connection.take(reused=False)
        begin(upstream)
        upstream.end()
        await upstream.send(b"")
        while not far.h2.highest_inbound_stream_id:
            await far.read()
        far.h2.send_headers(1, [(":status", "200")])
        far.h2.send_data(1, b"hello", end_stream=True)
        late = connection.take(reused=False)
        begin(late)
        # Nothing waits here: the answer is not read before the connection can't be written to.
        far.sock.send(far.h2.data_to_send())
        far.sock.shutdown(socket.SHUT_RD)
        late.send_some()
        with pytest.raises(trio.BrokenResourceError):
            late.send_some()
        assert await upstream.receive(None)
        head = upstream.next_response()
        assert head is not None
        while not upstream.received:
            await upstream.receive(None)
        assert (head.status, upstream.take_body()) == (200, b"hello")
        await far.stream.aclose()
        await late.receive(None)
        with pytest.raises(ProtocolError):
            late.next_response()
        for each in (upstream, late):
            each.release()
