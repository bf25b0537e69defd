"""What only encrypted streams tell without being read; the rest is in ``tests/test_streams.py``."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from trio.testing import wait_all_tasks_blocked

from tests.pairs import stream_pair, watching

if TYPE_CHECKING:
    import trio

    from kamal_proxy.sockets import Poller
    from tests.tls.peers import Pair


async def test_half_a_record_is_nothing_yet(pair: Pair) -> None:
    stream, peer = pair
    record = peer.encrypt(b"x")
    peer.far.sendall(record[:-1])
    assert stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    peer.far.sendall(record[-1:])
    assert not stream.is_quiet_nowait()
    assert await stream.receive() == b"x"


async def test_looking_reads_only_once(newest: Pair) -> None:
    stream, peer = newest
    payload = os.urandom(150_000)
    peer.far.sendall(peer.encrypt(payload) + peer.goodbye())
    peer.far.shutdown(socket.SHUT_WR)
    await wait_all_tasks_blocked()
    for _ in range(10):
        assert not stream.hung_up
        assert not stream.is_quiet_nowait()
    assert stream._sock is not None
    assert len(stream._sock.recv(1 << 20, socket.MSG_PEEK)) > 80_000, "the rest is not ours yet"
    got = b""
    while part := await stream.receive():
        got += part
    assert got == payload


async def test_watching_ends_with_garbage(pair: Pair, poller: Poller) -> None:
    client, browser = pair
    with stream_pair(poller) as (upstream, target):
        async with watching(upstream, client) as got:
            assert got == []
            browser.far.sendall(b"garbage")
        assert got == [None]
        target.send(b"answer")
        assert await upstream.receive() == b"answer"


async def test_watching_ends_with_half_a_record(pair: Pair, poller: Poller) -> None:
    """One look finds nothing, and the next one the end."""
    client, browser = pair
    browser.receive()
    with stream_pair(poller) as (upstream, _):
        async with watching(upstream, client) as got:
            browser.far.sendall(browser.encrypt(b"never whole")[:-1])
            browser.far.close()
        assert got == [None]


async def test_looking_does_not_take_the_event_from_a_reader(
    pair: Pair, nursery: trio.Nursery
) -> None:
    """What arrives is read by the look before the poller has seen the event of it."""
    stream, peer = pair
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stream.receive())
        got.append(await stream.receive())

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    peer.send(b"request")
    assert not stream.is_quiet_nowait()
    await wait_all_tasks_blocked()
    assert got == [b"request"]
    peer.end()
    assert stream.at_eof_nowait()
    await wait_all_tasks_blocked()
    assert got == [b"request", b""]


async def test_looking_does_not_take_the_event_from_a_watcher(pair: Pair, poller: Poller) -> None:
    client, browser = pair
    with stream_pair(poller) as (upstream, _):
        async with watching(upstream, client) as got:
            browser.end()
            assert client.at_eof_nowait()
        assert got == [None]
