"""What encrypted streams tell without being read: an end, a hang-up, quiet; and who is woken."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.tls.stream import TlsStream
from tests.pairs import running_poller, stream_pair
from tests.tls.peers import VERSIONS, Peer, calling, secured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kamal_proxy.sockets import Poller, SocketStream

Pair = tuple[TlsStream, Peer]


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    async with running_poller() as poller:
        yield poller


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
async def pair(poller: Poller, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with secured(poller, calling(request.param)) as pair:
        yield pair


@pytest.fixture
async def newest(poller: Poller) -> AsyncIterator[Pair]:
    async with secured(poller, calling()) as pair:
        yield pair


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


async def test_half_a_record_is_nothing_yet(pair: Pair) -> None:
    stream, peer = pair
    record = peer.encrypt(b"x")
    peer.far.sendall(record[:-1])
    assert stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    peer.far.sendall(record[-1:])
    assert not stream.is_quiet_nowait()
    assert await stream.receive() == b"x"


@pytest.mark.parametrize("closed", [False, True])
async def test_an_end_behind_unread_data_is_no_hang_up_yet(pair: Pair, closed: bool) -> None:
    stream, peer = pair
    peer.far.sendall(peer.encrypt(b"request") + peer.goodbye())
    if closed:
        peer.far.shutdown(socket.SHUT_WR)
    await wait_all_tasks_blocked()
    assert (stream.hung_up, stream.at_eof_nowait()) == (False, False)
    assert await stream.receive() == b"request"
    assert (stream.hung_up, stream.at_eof_nowait()) == (True, True)
    assert not stream.is_quiet_nowait()


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


async def watching(upstream: SocketStream, client: TlsStream, into: list[object]) -> None:
    into.append(await upstream.receive_watching(client, 100))


@pytest.mark.parametrize("how", ["goodbye", "close", "goodbye and close", "reset", "garbage"])
async def test_watching_ends_when_the_watched_stream_hangs_up(
    pair: Pair, poller: Poller, how: str
) -> None:
    client, browser = pair
    got: list[object] = []
    if how == "reset":
        await client.send(b"unread")
    with stream_pair(poller) as (upstream, target):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            assert got == []
            if "goodbye" in how:
                browser.far.sendall(browser.goodbye())
            elif how == "garbage":
                browser.far.sendall(b"garbage")
            if "close" in how or how == "reset":
                browser.far.close()
        assert got == [None]
        target.send(b"answer")
        assert await upstream.receive() == b"answer"


async def test_watching_ends_with_half_a_record(pair: Pair, poller: Poller) -> None:
    """One look finds nothing, and the next one the end."""
    client, browser = pair
    got: list[object] = []
    browser.receive()
    with stream_pair(poller) as (upstream, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            browser.far.sendall(browser.encrypt(b"never whole")[:-1])
            browser.far.close()
        assert got == [None]


async def test_closing_the_watched_stream_leaves_its_watcher_waiting(
    pair: Pair, poller: Poller
) -> None:
    client, _ = pair
    got: list[object] = []
    with stream_pair(poller) as (upstream, target):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
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


@pytest.mark.parametrize("shutdown", [False, True])
async def test_watching_is_not_ended_by_a_goodbye_behind_unread_data(
    pair: Pair, poller: Poller, shutdown: bool
) -> None:
    client, browser = pair
    got: list[object] = []
    with stream_pair(poller) as (upstream, target):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            browser.far.sendall(browser.encrypt(b"next request") + browser.goodbye())
            if shutdown:
                browser.far.shutdown(socket.SHUT_WR)
            await wait_all_tasks_blocked()
            assert got == []
            target.send(b"answer")
        assert got == [b"answer"]
        assert await client.receive() == b"next request"
        assert await upstream.receive_watching(client, 100) is None


async def test_a_goodbye_that_came_before_the_watching(pair: Pair, poller: Poller) -> None:
    client, browser = pair
    browser.far.sendall(browser.goodbye())
    await wait_all_tasks_blocked()
    with stream_pair(poller) as (upstream, target):
        target.send(b"answer")
        assert await upstream.receive_watching(client, 100) == b"answer"
        assert await upstream.receive_watching(client, 100) is None


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
    peer.far.sendall(peer.goodbye())
    assert stream.at_eof_nowait()
    await wait_all_tasks_blocked()
    assert got == [b"request", b""]


async def test_looking_does_not_take_the_event_from_a_watcher(pair: Pair, poller: Poller) -> None:
    client, browser = pair
    got: list[object] = []
    with stream_pair(poller) as (upstream, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching, upstream, client, got)
            await wait_all_tasks_blocked()
            browser.far.sendall(browser.goodbye())
            assert client.at_eof_nowait()
        assert got == [None]


async def test_waiting_for_a_hang_up(pair: Pair, nursery: trio.Nursery) -> None:
    stream, peer = pair
    gone = False

    async def wait() -> None:
        nonlocal gone
        await stream.wait_hung_up()
        gone = True

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert not gone
    peer.far.sendall(peer.goodbye())
    await wait_all_tasks_blocked()
    assert gone
