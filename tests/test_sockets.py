"""Streams, the poller, connecting: on real sockets, without real time."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy import sockets
from kamal_proxy.listeners import listen_tcp
from kamal_proxy.sockets import Poller, SocketStream
from tests.pairs import running_poller, stream_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from trio.testing import MockClock

Pair = tuple[SocketStream, socket.socket]


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    async with running_poller() as poller:
        yield poller


@pytest.fixture
def pair(poller: Poller) -> Iterator[Pair]:
    with stream_pair(poller) as pair:
        yield pair


def drain(far: socket.socket) -> bytes:
    """Read what has arrived at the far end."""
    data = b""
    while True:
        try:
            part = far.recv(1 << 20)
        except BlockingIOError:
            return data
        if not part:
            return data
        data += part


def fill(stream: SocketStream) -> bytes:
    """Send until the socket is full; return what was sent."""
    sent = b""
    while count := stream.send_nowait(b"x" * 65536):
        sent += b"x" * count
    return sent


# Reading


async def test_receive_takes_what_is_there(pair: Pair) -> None:
    stream, far = pair
    far.send(b"hello")
    assert await stream.receive(3) == b"hel"
    assert await stream.receive() == b"lo"
    assert stream.receive_nowait() is None


async def test_receive_waits_for_data(pair: Pair, nursery: trio.Nursery) -> None:
    stream, far = pair
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stream.receive())

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    assert got == []
    far.send(b"late")
    await wait_all_tasks_blocked()
    assert got == [b"late"]


async def test_every_wait_gets_its_own_wake_up(pair: Pair, nursery: trio.Nursery) -> None:
    stream, far = pair
    got = b""

    async def read() -> None:
        nonlocal got
        while data := await stream.receive(2):
            got += data

    nursery.start_soon(read)
    for part in (b"a", b"bcd", b"efghi"):
        await wait_all_tasks_blocked()
        far.send(part)
    await wait_all_tasks_blocked()
    assert got == b"abcdefghi"
    far.close()


async def test_end_of_stream_after_the_data(pair: Pair) -> None:
    stream, far = pair
    far.send(b"last")
    far.close()
    assert await stream.receive() == b"last"
    assert await stream.receive() == b""
    assert await stream.receive() == b""


async def test_end_of_stream_wakes_a_reader(pair: Pair, nursery: trio.Nursery) -> None:
    stream, far = pair
    nursery.start_soon(_expect_end, stream)
    await wait_all_tasks_blocked()
    far.close()


async def _expect_end(stream: SocketStream) -> None:
    assert await stream.receive() == b""


async def test_a_reset_breaks_reading_and_writing(pair: Pair) -> None:
    stream, far = pair
    await stream.send(b"never read")
    far.close()  # with unread data, which is a reset
    with pytest.raises(trio.BrokenResourceError, match=os.strerror(errno.ECONNRESET)):
        await stream.receive()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send(b"more")


async def test_a_reset_wakes_a_reader_and_a_writer(pair: Pair) -> None:
    stream, far = pair
    fill(stream)
    broken = 0

    async def expect_broken(wait: Any) -> None:
        nonlocal broken
        with pytest.raises(trio.BrokenResourceError):
            await wait
        broken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_broken, stream.receive())
        nursery.start_soon(expect_broken, stream.send(b"more"))
        await wait_all_tasks_blocked()
        far.close()
    assert broken == 2


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


# Writing


async def test_send_waits_while_the_peer_does_not_read(pair: Pair) -> None:
    stream, far = pair
    payload = os.urandom(3_000_000)
    done = False
    got = b""

    async def write() -> None:
        nonlocal done
        await stream.send(payload)
        done = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        waited = not done
        while not done:
            part = drain(far)
            assert part, "the writer was not woken"
            got += part
            await wait_all_tasks_blocked()
    assert waited
    assert got + drain(far) == payload


async def test_send_nowait_says_how_much_it_took(pair: Pair) -> None:
    stream, far = pair
    sent = fill(stream)
    assert stream.send_nowait(b"more") == 0
    assert drain(far) == sent
    assert stream.send_nowait(b"more") == 4


async def test_sending_to_a_closed_peer(pair: Pair) -> None:
    stream, far = pair
    far.close()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send(b"x")


async def test_shutdown_write_ends_one_direction(pair: Pair) -> None:
    stream, far = pair
    stream.shutdown_write()
    assert far.recv(1) == b""
    far.send(b"still here")
    assert await stream.receive() == b"still here"
    with pytest.raises(trio.BrokenResourceError):
        stream.send_nowait(b"x")


async def test_shutdown_write_of_an_unconnected_socket(poller: Poller) -> None:
    stream = poller.open_stream(socket.socket())
    with pytest.raises(trio.BrokenResourceError):
        stream.shutdown_write()
    stream.close()


# Closing, and two tasks at once


async def test_close_wakes_reader_and_writer(pair: Pair) -> None:
    stream, _ = pair
    fill(stream)
    woken = 0

    async def expect_closed(wait: Any) -> None:
        nonlocal woken
        with pytest.raises(trio.ClosedResourceError):
            await wait
        woken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed, stream.receive())
        nursery.start_soon(expect_closed, stream.send(b"more"))
        await wait_all_tasks_blocked()
        stream.close()
    assert woken == 2


async def test_everything_is_refused_after_close(pair: Pair, poller: Poller) -> None:
    stream, far = pair
    assert len(poller) == 1
    stream.close()
    stream.close()
    assert len(poller) == 0
    assert far.recv(1) == b""
    for call in (
        stream.receive_nowait,
        lambda: stream.send_nowait(b"x"),
        stream.shutdown_write,
        stream.connect_error_nowait,
    ):
        with pytest.raises(trio.ClosedResourceError):
            call()
    for wait in (
        stream.receive(),
        stream.send(b"x"),
        stream.wait_readable(),
        stream.wait_writable(),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await wait


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
    assert drain(far) == sent


# Cancellation


async def test_a_cancelled_read_loses_nothing(pair: Pair, autojump_clock: MockClock) -> None:
    stream, far = pair
    with trio.move_on_after(1) as scope:
        await stream.receive()
    assert scope.cancelled_caught
    far.send(b"abc")
    assert await stream.receive() == b"abc"


async def test_data_that_arrives_with_the_cancellation_is_not_lost(pair: Pair) -> None:
    stream, far = pair
    got = b""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                nonlocal got
                got += await stream.receive()

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            far.send(b"abc")
            scope.cancel()
    assert got + (stream.receive_nowait() or b"") == b"abc"


async def test_a_cancelled_write_leaves_the_stream_usable(
    pair: Pair, autojump_clock: MockClock
) -> None:
    stream, far = pair
    payload = bytes(range(256)) * 8192
    with trio.move_on_after(1) as scope:
        await stream.send(payload)
    assert scope.cancelled_caught
    got = drain(far)
    assert payload.startswith(got)
    await stream.send(b"next")
    assert drain(far) == b"next"


async def test_a_stream_that_never_blocks_notices_its_cancellation(pair: Pair) -> None:
    stream, far = pair
    far.send(b"x" * 1000)
    got = 0
    with trio.CancelScope() as scope:
        scope.cancel()
        for _ in range(1000):
            got += len(await stream.receive(1))
    assert scope.cancelled_caught
    assert got + len(stream.receive_nowait() or b"") == 1000


@pytest.mark.parametrize("direction", ["receive", "send", "receive_watching"])
async def test_a_stream_that_never_blocks_lets_others_run(
    pair: Pair, poller: Poller, nursery: trio.Nursery, direction: str
) -> None:
    stream, far = pair
    far.send(b"x" * 1000)
    ran = False

    async def other() -> None:
        nonlocal ran
        ran = True

    nursery.start_soon(other)
    calls = 0
    with stream_pair(poller) as (client, _):
        while not ran:
            if direction == "receive":
                await stream.receive(1)
            elif direction == "send":
                await stream.send(b"x")
            else:
                await stream.receive_watching(client, 1)
            calls += 1
            assert calls < 100


# Hang-ups


async def test_a_quiet_stream_is_not_hung_up(pair: Pair) -> None:
    stream, far = pair
    assert not stream.hung_up
    assert stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    far.send(b"x")
    await wait_all_tasks_blocked()
    assert not stream.hung_up
    assert not stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    assert await stream.receive() == b"x", "looking takes nothing"


async def test_an_end_behind_unread_data_is_no_hang_up_yet(pair: Pair) -> None:
    stream, far = pair
    far.send(b"request")
    far.shutdown(socket.SHUT_WR)
    await wait_all_tasks_blocked()
    assert (stream.hung_up, stream.at_eof_nowait()) == (False, False)
    assert await stream.receive() == b"request"
    assert (stream.hung_up, stream.at_eof_nowait()) == (True, True)
    assert not stream.is_quiet_nowait()


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


async def test_a_reset_is_a_hang_up(pair: Pair) -> None:
    stream, far = pair
    await stream.send(b"unread")
    far.close()
    await wait_all_tasks_blocked()
    assert stream.hung_up


async def watching(upstream: SocketStream, client: SocketStream, into: list[object]) -> None:
    into.append(await upstream.receive_watching(client, 100))


async def test_watching_ends_when_the_watched_stream_hangs_up(pair: Pair, poller: Poller) -> None:
    upstream, target = pair
    got: list[object] = []
    with stream_pair(poller) as (client, browser):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            browser.close()
        assert got == [None]
        # The same stream can still be read.
        target.send(b"answer")
        assert await upstream.receive() == b"answer"


async def test_watching_gets_data_first(pair: Pair, poller: Poller) -> None:
    upstream, target = pair
    with stream_pair(poller) as (client, browser):
        browser.close()
        await wait_all_tasks_blocked()
        target.send(b"answer")
        assert await upstream.receive_watching(client, 100) == b"answer"
        assert await upstream.receive_watching(client, 100) is None


async def test_watching_is_not_ended_by_a_half_close_behind_unread_data(
    pair: Pair, poller: Poller
) -> None:
    upstream, target = pair
    got: list[object] = []
    with stream_pair(poller) as (client, browser):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            browser.send(b"next request")
            browser.close()
            await wait_all_tasks_blocked()
            assert got == []
            target.send(b"answer")
        assert got == [b"answer"]
        assert await client.receive() == b"next request"
        assert await upstream.receive_watching(client, 100) is None


async def test_data_and_hang_up_at_once_lose_nothing(pair: Pair, poller: Poller) -> None:
    upstream, target = pair
    got: list[object] = []
    with stream_pair(poller) as (client, browser):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            browser.close()
            target.send(b"answer")
        rest = upstream.receive_nowait() or b""
        assert (got[0] or b"") in (b"answer", b"")
        assert cast("bytes", got[0] or b"") + rest == b"answer"


async def test_closing_the_watched_stream_leaves_its_watcher_waiting(
    pair: Pair, poller: Poller
) -> None:
    upstream, target = pair
    got: list[object] = []
    with stream_pair(poller) as (client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            client.close()
            await wait_all_tasks_blocked()
            assert got == []
            target.send(b"answer")
        assert got == [b"answer"]


async def test_closing_the_watching_stream(pair: Pair, poller: Poller) -> None:
    upstream, _ = pair
    with stream_pair(poller) as (client, browser):
        async with trio.open_nursery() as nursery:

            async def expect_closed() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await upstream.receive_watching(client, 100)

            nursery.start_soon(expect_closed)
            await wait_all_tasks_blocked()
            upstream.close()
        browser.send(b"x")
        browser.close()
        assert await client.receive() == b"x"
        await wait_all_tasks_blocked()
        assert client.hung_up


async def test_a_cancelled_watch_is_forgotten(
    pair: Pair, poller: Poller, autojump_clock: MockClock
) -> None:
    upstream, target = pair
    with stream_pair(poller) as (client, browser):
        with trio.move_on_after(1) as scope:
            await upstream.receive_watching(client, 100)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            got: list[bytes] = []

            async def read() -> None:
                got.append(await upstream.receive())

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            browser.close()  # nobody watches any more
            await wait_all_tasks_blocked()
            assert got == []
            target.send(b"answer")
        assert got == [b"answer"]


async def test_a_stream_can_be_watched_and_read(pair: Pair, poller: Poller) -> None:
    upstream, _target = pair
    got: list[object] = []
    with stream_pair(poller) as (client, browser):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            nursery.start_soon(_expect_end, client)
            await wait_all_tasks_blocked()
            browser.close()
        assert got == [None]


# The poller


async def test_more_streams_than_one_poll_returns(poller: Poller) -> None:
    count = sockets._EVENTS_PER_POLL + 88
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


async def test_no_thread_for_a_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    limiter = trio.CapacityLimiter(1)
    with pytest.raises(OSError, match="can't start new thread") as caught:
        await sockets.resolve("web.test", 80, limiter)
    assert caught.value.errno == errno.EAGAIN
    assert await sockets.resolve("127.0.0.1", 80, limiter), "an address needs none"


async def test_resolves_addresses() -> None:
    limiter = trio.CapacityLimiter(1)
    assert await sockets.resolve("127.0.0.1", 80, limiter) == [(socket.AF_INET, ("127.0.0.1", 80))]
    assert await sockets.resolve("::1", 81, limiter) == [(socket.AF_INET6, ("::1", 81, 0, 0))]
