"""Plain streams, the poller, connecting: on real sockets, without real time.

What encrypted streams do just as well is in ``test_streams``.
"""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy import sockets
from kamal_proxy.listeners import listen_tcp
from kamal_proxy.sockets import Poller, SocketStream
from tests.pairs import SocketPeer, stream_pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio.testing import MockClock

Pair = tuple[SocketStream, socket.socket]


@pytest.fixture
def pair(poller: Poller) -> Iterator[Pair]:
    with stream_pair(poller) as pair:
        yield pair


def fill(stream: SocketStream) -> bytes:
    """Send until the socket is full; return what was sent."""
    sent = b""
    while count := stream.send_nowait(b"x" * 65536):
        sent += b"x" * count
    return sent


# Reading and writing


async def test_tcp_reset(poller: Poller) -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        stream = await sockets.connect(poller, socket.AF_INET, listener.getsockname())
        listener.setblocking(True)
        far, _ = listener.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive()
        stream.close()


async def test_send_nowait_says_how_much_it_took(pair: Pair) -> None:
    stream, far = pair
    sent = fill(stream)
    assert stream.send_nowait(b"more") == 0
    assert SocketPeer(far).receive() == sent
    assert stream.send_nowait(b"more") == 4


async def test_shutdown_write_of_an_unconnected_socket(poller: Poller) -> None:
    stream = poller.open_stream(socket.socket())
    with pytest.raises(trio.BrokenResourceError):
        stream.shutdown_write()
    stream.close()


# Two tasks at once


async def test_a_second_task_in_one_direction_is_a_mistake(
    pair: Pair, nursery: trio.Nursery
) -> None:
    stream, far = pair
    sent = fill(stream)
    nursery.start_soon(stream.wait_readable)
    nursery.start_soon(stream.wait_writable)
    await wait_all_tasks_blocked()
    with pytest.raises(trio.BusyResourceError):
        await stream.wait_readable()
    with pytest.raises(trio.BusyResourceError):
        await stream.wait_writable()
    # The first ones still wait, and are woken.
    far.send(b"x")
    assert SocketPeer(far).receive() == sent


# Cancellation


async def test_a_cancelled_write_leaves_the_stream_usable(
    pair: Pair, autojump_clock: MockClock
) -> None:
    stream, far = pair
    payload = bytes(range(256)) * 8192
    with trio.move_on_after(1) as scope:
        await stream.send(payload)
    assert scope.cancelled_caught
    got = SocketPeer(far).receive()
    assert payload.startswith(got)
    await stream.send(b"next")
    assert SocketPeer(far).receive() == b"next"


# Hang-ups, and events


async def test_an_end_is_a_hang_up_before_anybody_has_waited(pair: Pair) -> None:
    """No event can tell of it yet."""
    stream, far = pair
    assert not stream.hung_up
    far.send(b"x")
    far.close()
    assert not stream.hung_up
    assert await stream.receive() == b"x"
    assert stream.hung_up


async def test_no_room_for_events_of_a_stream(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, far = pair

    def fail(self: Poller, fd: int, edges: int, former: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Poller, "watch", fail)
        with pytest.raises(trio.BrokenResourceError, match="No space left"):
            await stream.receive()
        while stream.send_nowait(bytes(1 << 16)):
            pass
        with pytest.raises(trio.BrokenResourceError, match="No space left"):
            await stream.send(b"x")
    far.send(b"x")
    assert await stream.receive() == b"x"


async def test_a_stream_that_has_waited_for_data_waits_for_room(
    pair: Pair, nursery: trio.Nursery
) -> None:
    """The poller tells of room only once somebody has asked for it."""
    stream, far = pair
    far.send(b"x")
    assert await stream.receive() == b"x"
    with trio.move_on_after(0):
        await stream.receive()
    filled = 0
    while taken := stream.send_nowait(bytes(1 << 16)):
        filled += taken
    nursery.start_soon(stream.send, b"late")
    await wait_all_tasks_blocked()
    got = b""
    while not got.endswith(b"late"):
        got = got[-4:] + far.recv(1 << 16)
        await wait_all_tasks_blocked()


# The poller


async def test_more_streams_than_one_poll_returns(poller: Poller) -> None:
    count = 64 + 88
    got = 0
    with ExitStack() as stack:
        pairs = [stack.enter_context(stream_pair(poller)) for _ in range(200)]
        rounds = -(-count // len(pairs))

        async def read(stream: SocketStream) -> None:
            nonlocal got
            for _ in range(rounds):
                data = await stream.receive(1)
                got += len(data)

        async with trio.open_nursery() as nursery:
            for stream, _ in pairs:
                nursery.start_soon(read, stream)
            await wait_all_tasks_blocked()
            for _, far in pairs:
                far.send(b"x" * rounds)
        assert len(poller) == len(pairs)
        assert got == rounds * len(pairs)
    assert len(poller) == 0


# Connecting


async def test_connects(poller: Poller) -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        stream = await sockets.connect(poller, socket.AF_INET, listener.getsockname())
        listener.setblocking(True)
        far, _ = listener.accept()
        with far:
            await stream.send(b"hi")
            assert far.recv(10) == b"hi"
        stream.close()


async def test_connection_refused(poller: Poller, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await sockets.connect(poller, socket.AF_INET, silent.getsockname())
    with pytest.raises(FileNotFoundError):
        await sockets.connect(poller, socket.AF_UNIX, str(tmp_path / "nobody.sock"))
    assert len(poller) == 0


async def test_no_room_for_another_connection(
    poller: Poller, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A Unix socket answers EAGAIN when its backlog is full; nothing is under way then."""
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        waiting = 0
        while True:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            if sock.connect_ex(path):
                break
            waiting += 1
        assert waiting
        with pytest.raises(BlockingIOError), trio.fail_after(5):
            (await sockets.connect(poller, socket.AF_UNIX, path)).close()


async def test_a_cancelled_connect_leaves_nothing(
    poller: Poller, autojump_clock: MockClock
) -> None:
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # the kernel ignores whom it has no room for
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        with trio.move_on_after(5) as scope:
            await sockets.connect(poller, socket.AF_INET, listener.getsockname())
        assert scope.cancelled_caught
        assert len(poller) == 0
