"""Encrypted streams: on real sockets, against OpenSSL's own client, without real time.

What plain streams do just as well is in ``tests/test_streams.py``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from typing import TYPE_CHECKING, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.sockets import Poller, drop
from kamal_proxy.tls.stream import BLOCK_SIZE, HandshakeError
from tests.certificates import make_ca
from tests.pairs import stream_pair
from tests.tls.peers import VERSIONS, Peer, Result, calling, secured, serve, serving

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.tls.peers import Pair

MIB = 1024 * 1024
# What OpenSSL says of a record that is none; since 3.2 the last word is that of the record layer.
NO_RECORD = "wrong version|bad record|record layer failure"


# Reading


async def test_a_record_that_comes_in_pieces(pair: Pair, nursery: trio.Nursery) -> None:
    stream, peer = pair
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stream.receive())

    nursery.start_soon(read)
    record = peer.encrypt(b"hello")
    for position in range(len(record) - 1):
        peer.far.sendall(record[position : position + 1])
        await wait_all_tasks_blocked()
    assert got == []
    peer.far.sendall(record[-1:])
    await wait_all_tasks_blocked()
    assert got == [b"hello"]


async def test_a_read_gets_several_records(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(40_000)
    records = [peer.encrypt(payload[i : i + 1000]) for i in range(0, len(payload), 1000)]
    peer.far.sendall(b"".join(records[:10]))
    assert await stream.receive() == payload[:10_000]
    whole = b"".join(records[10:])
    peer.far.sendall(whole[:-1])
    assert await stream.receive() == payload[10_000:-1000]
    peer.far.sendall(whole[-1:])
    assert await stream.receive() == payload[-1000:]


async def test_a_read_returns_no_more_than_asked_for(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(50_000)
    peer.send(payload)
    got = b""
    while len(got) < len(payload):
        part = await stream.receive(777)
        assert 0 < len(part) <= 777
        got += part
    assert got == payload


async def test_much_data_in_both_directions(pair: Pair) -> None:
    stream, peer = pair
    up, down = os.urandom(3 * MIB), os.urandom(3 * MIB)
    records = peer.encrypt(up)
    got_up, got_down, done = b"", b"", 0

    async def read() -> None:
        nonlocal got_up, done
        while len(got_up) < len(up):
            got_up += await stream.receive()
        done += 1

    async def write() -> None:
        nonlocal done
        await stream.send(down)
        done += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(write)
        while done < 2 or records:
            with contextlib.suppress(BlockingIOError):
                records = records[peer.far.send(records[:100_000]) :]
            await wait_all_tasks_blocked()
            got_down += peer.receive()
    assert got_up == up
    assert got_down + await peer.drain() == down


async def test_data_that_came_with_the_handshake(poller: Poller) -> None:
    """In TLS 1.3 a request follows the client's last message at once, and so may its end."""
    near, far = socket.socketpair()
    far.setblocking(False)
    result = Result()
    with far:
        peer = Peer(far, calling())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, poller.open_stream(near), serving(), result)
            peer.shake()
            await wait_all_tasks_blocked()
            last = peer.shake_hand()
            assert peer.shaken
            far.sendall(last + peer.encrypt(b"request") + peer.goodbye())
            far.shutdown(socket.SHUT_WR)
        stream = result.stream
        assert stream is not None
        assert (stream.hung_up, await stream.receive()) == (False, b"request")
        assert (stream.hung_up, await stream.receive()) == (True, b"")
        await stream.send(b"answer")
        assert peer.receive() == b"answer"
        stream.close()


# The end


async def test_an_end_without_a_goodbye_is_an_end_as_well(pair: Pair) -> None:
    stream, peer = pair
    peer.far.sendall(peer.encrypt(b"last") + peer.encrypt(b"never whole")[:-1])
    assert peer.receive() == b"", "only tickets, and closing with these unread would be a reset"
    peer.far.close()
    assert await stream.receive() == b"last"
    assert await stream.receive() == b""
    assert stream.hung_up


async def test_what_follows_a_goodbye_is_ignored(pair: Pair) -> None:
    stream, peer = pair
    peer.far.sendall(peer.goodbye() + b"garbage")
    assert await stream.receive() == b""
    assert await stream.receive() == b""


async def test_a_peer_that_said_goodbye_can_still_be_answered(pair: Pair) -> None:
    stream, peer = pair
    peer.far.sendall(peer.encrypt(b"request") + peer.goodbye())
    assert await stream.receive() == b"request"
    assert await stream.receive() == b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, b"answer" * 100_000)
        await wait_all_tasks_blocked()
        assert await peer.drain() == b"answer" * 100_000


async def test_a_goodbye_while_a_write_waits(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(2 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, payload)
        await wait_all_tasks_blocked()
        peer.end()
        assert await stream.receive() == b""
        assert await peer.drain() == payload


async def test_our_goodbye_does_not_lose_what_has_arrived(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(60_000)
    records = peer.encrypt(payload)
    peer.far.sendall(records[:-1])
    got = await stream.receive(10)
    stream.shutdown_write()
    peer.far.sendall(records[-1:])
    while len(got) < len(payload):
        got += await stream.receive()
    assert got == payload


async def test_drop_ends_a_connection_with_a_goodbye(pair: Pair) -> None:
    stream, peer = pair
    peer.send(b"x" * 50_000)
    await stream.send(b"answer")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drop, stream)
        await wait_all_tasks_blocked()
        assert peer.receive() == b"answer"
        assert peer.ended
        peer.far.sendall(peer.encrypt(b"more") + peer.goodbye())
        peer.far.close()


async def test_close_in_the_middle_of_a_write_says_nothing(pair: Pair) -> None:
    stream, peer = pair
    assert 0 < stream.send_nowait(b"x" * MIB) < MIB
    stream.close()
    await peer.drain()
    assert (peer.ended, peer.closed) == (False, True)


async def test_a_cancelled_write_is_not_passed_off_as_whole(
    pair: Pair, autojump_clock: MockClock
) -> None:
    stream, peer = pair
    with trio.move_on_after(1) as scope:
        await stream.send(b"x" * 2 * MIB)
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drop, stream)
        await wait_all_tasks_blocked()
        got = await peer.drain()
        peer.far.shutdown(socket.SHUT_WR)
    assert b"x" * len(got) == got
    assert (peer.ended, peer.closed) == (False, True)


# Writing


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 65535, 65536, 65537, 200_000])
async def test_writes_of_all_sizes(newest: Pair, size: int) -> None:
    stream, peer = newest
    payload = os.urandom(size)
    for data in (payload, memoryview(payload)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, data)
            await wait_all_tasks_blocked()
            assert await peer.drain() == payload


async def test_send_nowait_says_how_much_it_took(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(MIB)
    taken = stream.send_nowait(payload)
    assert taken % BLOCK_SIZE == 0
    assert stream.send_nowait(payload[taken:]) == 0, "it is full"
    got = await peer.drain()
    assert taken <= len(got) < taken + BLOCK_SIZE, "some of what was not taken is on its way"
    assert stream.send_nowait(payload[taken : taken + BLOCK_SIZE]) == BLOCK_SIZE
    got += await peer.drain()
    assert got == payload[: taken + BLOCK_SIZE]


async def test_a_write_is_repeated(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(MIB)
    rest, got = memoryview(payload), b""
    while rest:
        rest = rest[stream.send_nowait(rest) :]
        got += await peer.drain()
        assert payload.startswith(got)
    assert got + await peer.drain() == payload


async def test_a_write_is_repeated_in_pieces(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(MIB)
    rest, got = memoryview(payload), b""
    while rest:
        size = stream.send_nowait(rest)
        if size < len(rest):
            got += await peer.drain()
            rest = rest[size:]
            for _ in range(3):
                rest = rest[stream.send_nowait(rest[:1000]) :]
        else:
            rest = rest[size:]
    assert got + await peer.drain() == payload


async def test_a_write_that_was_given_up_is_sent_before_the_next(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(MIB)
    taken = stream.send_nowait(payload)
    assert taken < len(payload)
    got = await peer.drain()
    await stream.send(b"next")
    got += await peer.drain()
    assert got.endswith(b"next")
    assert payload.startswith(got[:-4])
    assert len(got) - 4 == taken + BLOCK_SIZE
    stream.close()
    peer.receive()
    assert not peer.ended


async def test_a_cancelled_write_leaves_the_stream_usable(
    pair: Pair, autojump_clock: MockClock
) -> None:
    stream, peer = pair
    payload = bytes(range(256)) * 8192
    with trio.move_on_after(1) as scope:
        await stream.send(payload)
    assert scope.cancelled_caught
    got = await peer.drain()
    assert payload.startswith(got)
    # The same bytes again are new bytes.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, payload)
        await wait_all_tasks_blocked()
        got += await peer.drain()
    assert got.endswith(payload)
    assert payload.startswith(got[: -len(payload)])


async def test_a_write_cancelled_before_it_began_sends_nothing(pair: Pair) -> None:
    stream, peer = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        for _ in range(100):
            await stream.send(b"x")
    assert scope.cancelled_caught
    sent = peer.receive()
    assert len(sent) < 100
    stream.close()
    peer.receive()
    assert peer.ended, "each write was whole"


# Broken connections


async def test_a_reset_is_told_again(pair: Pair) -> None:
    stream, peer = pair
    await stream.send(b"never read")
    peer.far.close()
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x17\x03\x03\x00\x20" + bytes(32)]
)
async def test_garbage_breaks_the_connection(pair: Pair, garbage: bytes) -> None:
    stream, peer = pair
    peer.far.sendall(peer.encrypt(b"right") + garbage)
    assert await stream.receive() == b"right"
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match=NO_RECORD):
            await stream.receive()
    assert stream.hung_up
    assert not stream.is_quiet_nowait()
    # The peer is told.
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        peer.receive()
    with pytest.raises(trio.BrokenResourceError):
        stream.send_nowait(b"x")


async def test_a_changed_record_is_found_out(pair: Pair) -> None:
    stream, peer = pair
    record = bytearray(peer.encrypt(b"pay 1"))
    record[-20] ^= 1
    peer.far.sendall(record)
    with pytest.raises(trio.BrokenResourceError, match=NO_RECORD):
        await stream.receive()


async def test_an_alert_of_the_peer_breaks_the_connection(poller: Poller) -> None:
    """A client of TLS 1.3 that refuses the certificate says so after the server is done."""
    distrustful = ssl.create_default_context(cadata=make_ca().pem.decode())
    near, far = socket.socketpair()
    far.setblocking(False)
    result = Result()
    stream = poller.open_stream(near)
    with far:
        peer = Peer(far, distrustful)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, stream, serving(), result)
            peer.shake()
            await wait_all_tasks_blocked()
            with pytest.raises(ssl.SSLCertVerificationError):
                peer.shake_hand()
            far.sendall(peer._outgoing.read())
    assert isinstance(result.error, HandshakeError)
    assert "alert" in result.error.reason
    stream.close()


async def test_a_peer_that_is_gone_while_closing(pair: Pair) -> None:
    stream, peer = pair
    peer.far.close()
    stream.close()


# Two tasks at once


async def test_reading_while_writing(pair: Pair) -> None:
    stream, peer = pair
    payload = os.urandom(MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, payload)
        await wait_all_tasks_blocked()
        for number in range(20):
            peer.send(b"%d" % number)
            assert await stream.receive() == b"%d" % number
        assert await peer.drain() == payload


# Cancellation


async def test_a_read_cancelled_within_a_record_loses_nothing(
    pair: Pair, autojump_clock: MockClock
) -> None:
    stream, peer = pair
    record = peer.encrypt(b"abc")
    peer.far.sendall(record[:-1])
    with trio.move_on_after(1) as scope:
        await stream.receive()
    assert scope.cancelled_caught
    peer.far.sendall(record[-1:])
    assert await stream.receive() == b"abc"


async def test_many_small_records_let_others_run(newest: Pair, nursery: trio.Nursery) -> None:
    stream, peer = newest
    records = b"".join(peer.encrypt(b"x") for _ in range(8000))
    peer.far.sendall(records)
    ran = False

    async def other() -> None:
        nonlocal ran
        ran = True

    nursery.start_soon(other)
    got = reads = 0
    while got < 8000:
        got += len(await stream.receive())
        reads += 1
    assert reads < 20
    assert ran, "though no read had to wait"


# What it is


async def test_what_was_agreed_on(poller: Poller) -> None:
    for version, name in zip(VERSIONS, ("TLSv1.2", "TLSv1.3"), strict=True):
        async with secured(poller, calling(version)) as (stream, _):
            assert (stream.alpn, stream.version) == ("http/1.1", name)
            assert (stream.server_name, stream.resumed, stream.secured) == ("app.test", False, True)
        async with secured(poller, calling(version, alpn=())) as (stream, _):
            assert stream.alpn == ""


async def test_resumption(poller: Poller) -> None:
    server = serving()
    for version in VERSIONS:
        client = calling(version)
        async with secured(poller, client, server) as (stream, peer):
            assert not stream.resumed
            await stream.send(b"x")
            peer.receive()
            session = peer.tls.session
        async with secured(poller, client, server, session=session) as (stream, peer):
            assert stream.resumed
            peer.send(b"again")
            assert await stream.receive() == b"again"


async def test_over_tcp(poller: Poller) -> None:
    def pair() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            return near, listener.accept()[0]

    async with secured(poller, calling(), pair=pair) as (stream, peer):
        peer.send(b"hello")
        assert await stream.receive() == b"hello"
        payload = os.urandom(8 * MIB)
        got = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, payload)
            while len(got) < len(payload):
                await trio.lowlevel.wait_readable(peer.far)
                got += peer.receive()
        assert got == payload
        # A reset, with nothing unread.
        peer.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.far.close()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive()


async def test_a_released_stream_is_closed(poller: Poller) -> None:
    with stream_pair(poller) as (stream, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.wait_readable)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                stream.release()
            nursery.cancel_scope.cancel()
        sock, of = stream.release()
        assert of is poller
        for call in (stream.receive_nowait, stream.release):
            with pytest.raises(trio.ClosedResourceError):
                cast("object", call())
        poller.forget(sock.fileno())
        sock.close()
