"""Peers of encrypted streams that make OpenSSL work, or answer, without sending any data."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.tls.stream import BLOCK_SIZE, TlsStream
from tests.tls.hellos import message
from tests.tls.peers import Peer, calling, secured
from tests.tls.records import HANDSHAKE, Writer12, Writer13, logged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from kamal_proxy.sockets import Poller

V = ssl.TLSVersion


@pytest.fixture
async def pair13(poller: Poller, tmp_path: Path) -> AsyncIterator[tuple[TlsStream, Peer, Writer13]]:
    context = calling(V.TLSv1_3)
    context.keylog_filename = str(tmp_path / "keys")
    async with secured(poller, context) as (stream, peer):
        cipher = peer.tls.cipher()
        assert cipher is not None
        assert cipher[0] == "TLS_AES_256_GCM_SHA384"
        _, secret = logged(tmp_path / "keys", "CLIENT_TRAFFIC_SECRET_0")
        yield stream, peer, Writer13(secret)


@pytest.fixture
async def pair12(poller: Poller, tmp_path: Path) -> AsyncIterator[tuple[TlsStream, Peer, Writer12]]:
    context = calling(V.TLSv1_2)
    context.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
    context.keylog_filename = str(tmp_path / "keys")
    async with secured(poller, context) as (stream, peer):
        client_random, secret = logged(tmp_path / "keys", "CLIENT_RANDOM")
        yield stream, peer, Writer12(secret, client_random, peer.server_random)


def fill(stream: TlsStream) -> None:
    """Send until the socket is full."""
    while stream.send_nowait(b"x" * BLOCK_SIZE) == BLOCK_SIZE:
        pass


def flood(peer: Peer, data: bytes) -> None:
    """Send as much as the socket takes."""
    view = memoryview(data)
    while view:
        try:
            view = view[peer.far.send(view) :]
        except BlockingIOError:
            return


async def answered_until_broken(
    stream: TlsStream, peer: Peer, writer: Writer12 | Writer13, questions: Callable[[], bytes]
) -> int:
    """Return how often a peer that reads nothing may ask; it sends data as well each time."""
    for number in range(100):
        flood(peer, questions() + writer.record(b"x"))
        try:
            assert await stream.receive() == b"x"
        except trio.BrokenResourceError as error:
            if str(error) != "the peer does not read the answers it asks for":
                raise
            return number
        assert stream._outgoing.pending < 20_000
    raise AssertionError("any number of answers is kept")


# Changes of keys (TLS 1.3)


async def test_records_by_hand(pair13: tuple[TlsStream, Peer, Writer13]) -> None:
    stream, peer, writer = pair13
    for number in range(3):
        peer.far.sendall(writer.record(b"%d" % number))
        assert await stream.receive() == b"%d" % number


@pytest.mark.parametrize("requested", [False, True])
async def test_a_change_of_keys(pair13: tuple[TlsStream, Peer, Writer13], requested: bool) -> None:
    stream, peer, writer = pair13
    peer.far.sendall(writer.record(b"before") + writer.key_update(requested=requested))
    peer.far.sendall(writer.record(b"after"))
    assert await stream.receive() == b"beforeafter"
    await stream.send(b"answer")
    assert peer.receive() == b"answer"
    peer.far.sendall(writer.key_update(requested=requested))
    assert stream.is_quiet_nowait()
    assert not stream.at_eof_nowait()
    peer.far.sendall(writer.record(b"more"))
    assert await stream.receive() == b"more"
    await stream.send(b"answer")
    assert peer.receive() == b"answer"


async def test_changes_of_keys_without_end(pair13: tuple[TlsStream, Peer, Writer13]) -> None:
    stream, peer, writer = pair13
    updates = b"".join(writer.key_update(requested=True) for _ in range(12_000))
    assert len(updates) > 300_000
    broken = ""

    async def read() -> None:
        nonlocal broken
        try:
            await stream.receive()
        except trio.BrokenResourceError as error:
            broken = str(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        while not broken:
            assert updates
            part, updates = updates[:20_000], updates[20_000:]
            flood(peer, part)
            await wait_all_tasks_blocked()
            peer.receive()
    assert broken == "the peer sends records without data"


async def test_changes_of_keys_between_data(pair13: tuple[TlsStream, Peer, Writer13]) -> None:
    stream, peer, writer = pair13
    got = b""
    for _ in range(30):
        updates = [writer.key_update(requested=True) for _ in range(500)]
        flood(peer, b"".join(updates) + writer.record(b"x"))
        got += await stream.receive()
        await stream.send(b"y")
        assert peer.receive() == b"y"
    assert got == b"x" * 30


async def test_little_is_read_at_once_after_changes_of_keys(
    pair13: tuple[TlsStream, Peer, Writer13],
) -> None:
    stream, peer, writer = pair13
    updates = b"".join(writer.key_update(requested=False) for _ in range(600))
    flood(peer, updates + writer.record(b"x"))
    assert await stream.receive() == b"x"
    flood(peer, b"".join(writer.record(b"x" * 16_000) for _ in range(8)))
    assert len(await stream.receive()) < 20_000
    assert len(await stream.receive()) > 50_000


async def test_changes_of_keys_by_a_peer_that_does_not_read(
    pair13: tuple[TlsStream, Peer, Writer13],
) -> None:
    stream, peer, writer = pair13
    fill(stream)

    def updates() -> bytes:
        return b"".join(writer.key_update(requested=True) for _ in range(100))

    assert await answered_until_broken(stream, peer, writer, updates) in range(3, 10)


# Renegotiations (TLS 1.2)


async def test_a_renegotiation_is_refused(pair12: tuple[TlsStream, Peer, Writer12]) -> None:
    stream, peer, writer = pair12
    peer.far.sendall(writer.record(b"before") + writer.record(message(), HANDSHAKE))
    peer.far.sendall(writer.record(b"after"))
    assert await stream.receive() == b"beforeafter"
    await stream.send(b"answer")
    with pytest.raises(ssl.SSLError, match="no renegotiation"):
        peer.receive()


async def test_renegotiations_by_a_peer_that_does_not_read(
    pair12: tuple[TlsStream, Peer, Writer12],
) -> None:
    stream, peer, writer = pair12
    fill(stream)

    def renegotiations() -> bytes:
        return b"".join(writer.record(message(), HANDSHAKE) for _ in range(100))

    assert await answered_until_broken(stream, peer, writer, renegotiations) in range(3, 10)


async def test_empty_records_without_end(pair12: tuple[TlsStream, Peer, Writer12]) -> None:
    stream, peer, writer = pair12
    flood(peer, b"".join(writer.record(b"") for _ in range(2000)))
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive()
