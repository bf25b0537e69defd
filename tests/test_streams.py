"""What plain and encrypted streams have in common: on real sockets, without real time.

What is particular to plain ones is in ``test_sockets``, to encrypted ones in ``tls``.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.sockets import Poller, SocketStream
from tests.pairs import SocketPeer, stream_pair, watching
from tests.tls.peers import calling, secured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from trio.testing import MockClock

Pair = tuple[SocketStream, SocketPeer]
Act: TypeAlias = "Callable[[SocketPeer], None]"


@asynccontextmanager
async def open_plain(poller: Poller) -> AsyncIterator[Pair]:
    with stream_pair(poller) as (stream, far):
        yield stream, SocketPeer(far)


def open_tls_1_2(poller: Poller) -> AbstractAsyncContextManager[Pair]:
    return secured(poller, calling(ssl.TLSVersion.TLSv1_2))


def open_tls_1_3(poller: Poller) -> AbstractAsyncContextManager[Pair]:
    return secured(poller, calling(ssl.TLSVersion.TLSv1_3))


@pytest.fixture(params=[open_plain, open_tls_1_2, open_tls_1_3])
async def pair(poller: Poller, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with request.param(poller) as pair:
        yield pair


# How a peer leaves


def end(peer: SocketPeer) -> None:
    peer.end()


def end_and_shut_down(peer: SocketPeer) -> None:
    peer.end()
    peer.far.shutdown(socket.SHUT_WR)


def close(peer: SocketPeer) -> None:
    peer.close()


def end_and_close(peer: SocketPeer) -> None:
    peer.end()
    peer.close()


any_leave = pytest.mark.parametrize("leave", [end, end_and_shut_down, close, end_and_close])


async def fail_both(
    stream: SocketStream, act: Callable[[], object], error: type[Exception]
) -> None:
    """Have a task wait for data and one for room; both must fail when something is done."""
    failed = []

    async def expect_error(call: Awaitable[object]) -> None:
        with pytest.raises(error) as caught:
            await call
        failed.append(caught.value)

    while stream.send_nowait(b"x" * 65536):
        pass
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_error, stream.receive())
        nursery.start_soon(expect_error, stream.send(b"more"))
        await wait_all_tasks_blocked()
        assert failed == []
        act()
        await wait_all_tasks_blocked()
        assert len(failed) == 2


# Reading


async def test_receive_takes_what_is_there(pair: Pair) -> None:
    stream, peer = pair
    peer.send(b"hello")
    assert await stream.receive(3) == b"hel"
    assert await stream.receive() == b"lo"
    assert stream.receive_nowait() is None


async def test_receive_waits_for_data(pair: Pair, nursery: trio.Nursery) -> None:
    stream, peer = pair
    got: list[bytes] = []

    async def read() -> None:
        while data := await stream.receive():
            got.append(data)

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    assert got == []
    for part in (b"late", b"later"):
        peer.send(part)
        await wait_all_tasks_blocked()
    assert got == [b"late", b"later"]


async def test_every_wait_gets_its_own_wake_up(pair: Pair, nursery: trio.Nursery) -> None:
    stream, peer = pair
    got = b""

    async def read() -> None:
        nonlocal got
        while data := await stream.receive(2):
            got += data

    nursery.start_soon(read)
    for part in (b"a", b"bcd", b"efghi"):
        await wait_all_tasks_blocked()
        peer.send(part)
    await wait_all_tasks_blocked()
    assert got == b"abcdefghi"


# The end


@any_leave
async def test_the_end_comes_after_the_data(pair: Pair, leave: Act) -> None:
    stream, peer = pair
    peer.send(b"last")
    leave(peer)
    assert await stream.receive() == b"last"
    assert await stream.receive() == b""
    assert await stream.receive() == b""


@any_leave
async def test_the_end_wakes_a_reader(pair: Pair, nursery: trio.Nursery, leave: Act) -> None:
    stream, peer = pair
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stream.receive())

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    leave(peer)
    await wait_all_tasks_blocked()
    assert got == [b""]


async def test_shutdown_write_ends_one_direction(pair: Pair) -> None:
    stream, peer = pair
    await stream.send(b"last")
    stream.shutdown_write()
    assert peer.receive() == b"last"
    assert (peer.ended, peer.closed) == (True, True)
    with pytest.raises(trio.BrokenResourceError):
        stream.send_nowait(b"more")
    stream.shutdown_write()
    # The peer's side goes on.
    peer.send(b"still here")
    assert await stream.receive() == b"still here"
    peer.end()
    assert await stream.receive() == b""


async def test_close_ends_both_directions(pair: Pair) -> None:
    stream, peer = pair
    await stream.send(b"last")
    stream.close()
    stream.close()
    assert peer.receive() == b"last"
    assert (peer.ended, peer.closed) == (True, True)


# Writing


async def test_send_waits_while_the_peer_does_not_read(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(3_000_000)
    done = False
    waits = 0

    def progress() -> None:
        nonlocal waits
        waits += 1

    async def write() -> None:
        nonlocal done
        await stream.send(payload, progress)
        done = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        assert not done
        assert waits == 1
        assert await peer.drain() == payload, "the writer was not woken"
    assert waits > 1


async def test_sending_to_a_closed_peer(pair: Pair) -> None:
    stream, peer = pair
    peer.close()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send(b"x")


# Broken connections


async def test_a_reset_breaks_reading_and_writing(pair: Pair) -> None:
    stream, peer = pair
    await stream.send(b"never read")
    peer.far.close()  # with unread data, which is a reset
    with pytest.raises(trio.BrokenResourceError, match=os.strerror(errno.ECONNRESET)):
        await stream.receive()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send(b"more")
    assert stream.hung_up


async def test_a_reset_wakes_a_reader_and_a_writer(pair: Pair) -> None:
    stream, peer = pair
    await fail_both(stream, peer.far.close, trio.BrokenResourceError)


async def test_a_reset_is_a_hang_up(pair: Pair) -> None:
    stream, peer = pair
    await stream.send(b"unread")
    peer.far.close()
    await wait_all_tasks_blocked()
    assert stream.hung_up


# Closing


async def test_close_wakes_reader_and_writer(pair: Pair) -> None:
    stream, _ = pair
    await fail_both(stream, stream.close, trio.ClosedResourceError)


def stay(_: SocketPeer) -> None:
    pass


def send(peer: SocketPeer) -> None:
    peer.send(b"unread")


def send_garbage(peer: SocketPeer) -> None:
    peer.far.sendall(b"garbage")


@pytest.mark.parametrize("act", [stay, send, end, send_garbage])
async def test_everything_is_refused_after_close(pair: Pair, poller: Poller, act: Act) -> None:
    stream, peer = pair
    act(peer)
    stream.at_eof_nowait()
    assert len(poller) == 1
    stream.close()
    stream.close()
    assert len(poller) == 0
    for call in (
        stream.receive_nowait,
        lambda: stream.send_nowait(b"x"),
        stream.shutdown_write,
        stream.at_eof_nowait,
        stream.is_quiet_nowait,
        stream.connect_error_nowait,
        stream.fileno,
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


# Cancellation


async def test_a_cancelled_read_loses_nothing(pair: Pair, autojump_clock: MockClock) -> None:
    stream, peer = pair
    with trio.move_on_after(1) as scope:
        await stream.receive()
    assert scope.cancelled_caught
    peer.send(b"abc")
    assert await stream.receive() == b"abc"


async def test_data_that_arrives_with_the_cancellation_is_not_lost(pair: Pair) -> None:
    stream, peer = pair
    got = b""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                nonlocal got
                got += await stream.receive()

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            peer.send(b"abc")
            scope.cancel()
    assert got + (stream.receive_nowait() or b"") == b"abc"


async def test_a_stream_that_never_blocks_notices_its_cancellation(pair: Pair) -> None:
    stream, peer = pair
    peer.send(b"x" * 1000)
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
    stream, peer = pair
    peer.send(b"x" * 1000)
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
    stream, peer = pair
    assert not stream.hung_up
    assert stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    peer.send(b"x")
    await wait_all_tasks_blocked()
    assert not stream.hung_up
    assert not stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    assert await stream.receive() == b"x", "looking takes nothing"
    assert stream.is_quiet_nowait()


@any_leave
async def test_an_end_behind_unread_data_is_no_hang_up_yet(pair: Pair, leave: Act) -> None:
    stream, peer = pair
    peer.send(b"request")
    leave(peer)
    await wait_all_tasks_blocked()
    assert (stream.hung_up, stream.at_eof_nowait()) == (False, False)
    assert await stream.receive() == b"request"
    assert (stream.hung_up, stream.at_eof_nowait()) == (True, True)
    assert not stream.is_quiet_nowait()


@any_leave
async def test_waiting_for_a_hang_up(pair: Pair, nursery: trio.Nursery, leave: Act) -> None:
    stream, peer = pair
    gone = False

    async def wait() -> None:
        nonlocal gone
        await stream.wait_hung_up()
        gone = True

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert not gone
    leave(peer)
    await wait_all_tasks_blocked()
    assert gone


# Watching another stream while reading


@any_leave
async def test_watching_ends_when_the_watched_stream_hangs_up(
    pair: Pair, poller: Poller, leave: Act
) -> None:
    client, browser = pair
    with stream_pair(poller) as (upstream, target):
        async with watching(upstream, client) as got:
            assert got == []
            leave(browser)
        assert got == [None]
        # The same stream can still be read.
        target.send(b"answer")
        assert await upstream.receive() == b"answer"


async def test_watching_ends_when_the_watched_stream_is_reset(pair: Pair, poller: Poller) -> None:
    client, browser = pair
    await client.send(b"unread")
    with stream_pair(poller) as (upstream, target):
        async with watching(upstream, client) as got:
            assert got == []
            browser.far.close()
        assert got == [None]
        target.send(b"answer")
        assert await upstream.receive() == b"answer"


@any_leave
async def test_watching_gets_data_first(pair: Pair, poller: Poller, leave: Act) -> None:
    client, browser = pair
    leave(browser)
    await wait_all_tasks_blocked()
    with stream_pair(poller) as (upstream, target):
        target.send(b"answer")
        assert await upstream.receive_watching(client, 100) == b"answer"
        assert await upstream.receive_watching(client, 100) is None


@any_leave
async def test_watching_is_not_ended_by_an_end_behind_unread_data(
    pair: Pair, poller: Poller, leave: Act
) -> None:
    client, browser = pair
    with stream_pair(poller) as (upstream, target):
        async with watching(upstream, client) as got:
            browser.send(b"next request")
            leave(browser)
            await wait_all_tasks_blocked()
            assert got == []
            target.send(b"answer")
        assert got == [b"answer"]
        assert await client.receive() == b"next request"
        assert await upstream.receive_watching(client, 100) is None


@any_leave
async def test_data_and_hang_up_at_once_lose_nothing(
    pair: Pair, poller: Poller, leave: Act
) -> None:
    client, browser = pair
    with stream_pair(poller) as (upstream, target):
        async with watching(upstream, client) as got:
            leave(browser)
            target.send(b"answer")
        first, rest = got[0] or b"", upstream.receive_nowait() or b""
        assert first in (b"answer", b"")
        assert first + rest == b"answer"


async def test_closing_the_watched_stream_leaves_its_watcher_waiting(
    pair: Pair, poller: Poller
) -> None:
    client, _ = pair
    with stream_pair(poller) as (upstream, target):
        async with watching(upstream, client) as got:
            client.close()
            await wait_all_tasks_blocked()
            assert got == []
            target.send(b"answer")
        assert got == [b"answer"]
        target.send(b"more")
        assert await upstream.receive_watching(client, 100) == b"more"
        with pytest.raises(trio.ClosedResourceError):
            client.at_eof_nowait()
        assert not client.hung_up


async def test_closing_the_watching_stream(pair: Pair, poller: Poller) -> None:
    client, browser = pair
    with stream_pair(poller) as (upstream, _):
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
    client, browser = pair
    with stream_pair(poller) as (upstream, target):
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


@any_leave
async def test_a_stream_can_be_watched_and_read(
    pair: Pair, poller: Poller, nursery: trio.Nursery, leave: Act
) -> None:
    client, browser = pair
    read: list[bytes] = []

    async def read_client() -> None:
        read.append(await client.receive())

    with stream_pair(poller) as (upstream, _):
        async with watching(upstream, client) as got:
            nursery.start_soon(read_client)
            await wait_all_tasks_blocked()
            leave(browser)
        assert got == [None]
        assert read == [b""]
