"""The server's side of handshakes: on real sockets, with clients of every kind of misbehaviour."""

from __future__ import annotations

import os
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.sockets import Poller, SocketStream
from kamal_proxy.tls.stream import HandshakeError, TlsStream, alert
from tests.certificates import Issued, make_ca, self_signed
from tests.pairs import stream_pair
from tests.tls.hellos import message, real_hello, records, sized
from tests.tls.peers import CA, VERSIONS, Peer, Result, calling, handshake, secured, serve, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Ends = tuple[SocketStream, socket.socket]
BOTH = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)


@pytest.fixture
def ends(poller: Poller) -> Iterator[Ends]:
    """Provide a plain stream, and the socket of its client; the stream is closed in the end."""
    with stream_pair(poller) as pair:
        yield pair


async def shaken(
    stream: SocketStream, peer: Peer, server: ssl.SSLContext, received: bytes = b""
) -> Result:
    """Let both sides do their handshake until the server's is over."""
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, server, result, received)
        while not (result.stream and peer.shaken) and not result.error:
            peer.shake()
            await wait_all_tasks_blocked()
    return result


async def failed(stream: SocketStream, far: socket.socket, sent: bytes) -> str:
    """Return why a handshake fails whose client sends this, and reads what it is told."""
    far.sendall(sent)
    with pytest.raises(HandshakeError) as caught:
        await handshake(stream, serving())
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


def told(far: socket.socket) -> bytes:
    """Return what a client was sent."""
    try:
        return far.recv(1 << 16)
    except BlockingIOError:
        return b""


# What works


@BOTH
async def test_a_hello_that_comes_byte_by_byte(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    peer = Peer(far, calling(version))
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, serving(), result)
        while not (result.stream and peer.shaken):
            for byte in peer.shake_hand():
                far.send(bytes([byte]))
                await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
    result.stream.close()


@BOTH
async def test_what_was_read_before_the_handshake(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    peer = Peer(far, calling(version))
    hello = peer.shake_hand()
    result = await shaken(stream, peer, serving(), hello)
    tls = result.stream
    assert isinstance(tls, TlsStream)
    peer.send(b"hello")
    assert await tls.receive() == b"hello"
    tls.close()


async def test_the_plain_stream_is_closed_but_not_its_socket(ends: Ends, poller: Poller) -> None:
    stream, far = ends
    peer = Peer(far, calling())
    result = await shaken(stream, peer, serving())
    with pytest.raises(trio.ClosedResourceError):
        stream.receive_nowait()
    stream.close()
    assert len(poller) == 1
    assert result.stream is not None
    peer.send(b"hello")
    assert await result.stream.receive() == b"hello"
    result.stream.close()
    assert len(poller) == 0


@BOTH
async def test_an_end_that_the_plain_stream_noticed(ends: Ends, version: ssl.TLSVersion) -> None:
    """What it has read is not all, and there is no further event of the rest, or of the end."""
    stream, far = ends
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    peer = Peer(far, calling(version))
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, serving(), result)
        peer.shake()
        await wait_all_tasks_blocked()
        last = peer.shake_hand()
        if version == ssl.TLSVersion.TLSv1_3:
            last += peer.encrypt(b"x" * 80_000)
            far.sendall(last)
            far.shutdown(socket.SHUT_WR)
        else:  # a client of TLS 1.2 waits for the server's last message
            far.sendall(last)
            await wait_all_tasks_blocked()
            peer.shake()
            far.sendall(peer.encrypt(b"x" * 80_000))
            far.shutdown(socket.SHUT_WR)
    tls = result.stream
    assert tls is not None
    got = 0
    while got < 80_000:
        assert not tls.hung_up
        got += len(await tls.receive())
    assert tls.hung_up
    tls.close()


async def test_tickets_go_with_the_first_answer(ends: Ends) -> None:
    stream, far = ends
    peer = Peer(far, calling(ssl.TLSVersion.TLSv1_3))
    result = await shaken(stream, peer, serving())
    assert result.stream is not None
    assert told(far) == b""
    await result.stream.send(b"answer")
    assert peer.receive() == b"answer"
    assert peer.tls.session is not None
    assert peer.tls.session.has_ticket
    result.stream.close()


async def test_a_client_whose_first_guess_is_wrong(ends: Ends) -> None:
    """It has no share for the group that the server wants, and is asked again."""
    stream, far = ends
    context = calling(ssl.TLSVersion.TLSv1_3)
    context.set_ecdh_curve("secp521r1")
    result = await shaken(stream, Peer(far, context), serving())
    assert result.stream is not None
    result.stream.close()


async def test_a_session_for_another_server_is_no_obstacle(poller: Poller) -> None:
    for version in VERSIONS:
        client = calling(version)
        async with secured(poller, client) as (stream, peer):
            await stream.send(b"x")
            peer.receive()
            session = peer.tls.session
        async with secured(poller, client, session=session) as (stream, _):
            assert not stream.resumed


# What a client gets wrong


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: app.test\r\n\r\n",
        b"\0" * 100,
        b"\xff" * 100,
        b"\x16\x03\x01\x00\x00" * 50,
        b"\x16\x03\x01\xff\xff" + bytes(100),
        b"\x17\x03\x03\x00\x05hello",
        b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10" + bytes(40),
        records(b"\x02" + sized(bytes(40), 3)),
        records(b"\x01" + sized(bytes(40), 3)),
        records(b"\x01\xff\xff\xff" + bytes(100)),
        records(message(version=0x0300)),
        records(message(version=0x0200)),
    ],
)
async def test_garbage(ends: Ends, garbage: bytes) -> None:
    stream, far = ends
    assert await failed(stream, far, garbage)
    assert not far.getblocking()
    answer = told(far)
    assert answer == b"" or answer[0] == 21, "an alert, if anything"
    # It is still the caller's.
    far.sendall(b"more")
    assert await stream.receive() == b"more"


@pytest.mark.parametrize("size", [0, 1, 5, 100, -1])
async def test_a_client_that_closes_early(ends: Ends, size: int) -> None:
    stream, far = ends
    hello = real_hello()
    far.sendall(hello[:size] if size else b"")
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(HandshakeError, match=r"^the client closed the connection$"):
        await handshake(stream, serving())


async def test_a_client_that_closes_after_its_hello(ends: Ends) -> None:
    stream, far = ends
    far.sendall(real_hello())
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(HandshakeError, match=r"^the client closed the connection$"):
        await handshake(stream, serving())


@BOTH
async def test_a_reset_in_the_middle(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, serving(), result)
        far.sendall(real_hello(newest=version))
        await wait_all_tasks_blocked()
        far.close()  # with unread data, which is a reset
    assert isinstance(result.error, HandshakeError)
    assert result.error.reason == "the client broke the connection"


async def test_a_client_that_never_reads(ends: Ends, autojump_clock: object) -> None:
    """The deadline is the caller's, and the stream as well after it."""
    stream, far = ends
    while stream.send_nowait(bytes(65536)):
        pass
    far.sendall(real_hello())
    with trio.move_on_after(10) as scope:
        await handshake(stream, serving())
    assert scope.cancelled_caught
    assert stream.receive_nowait() is None


@BOTH
async def test_a_hello_followed_by_garbage(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    reason = await failed(stream, far, real_hello(newest=version) + b"garbage" * 10)
    assert reason


async def test_records_without_end(ends: Ends) -> None:
    """Changes of ciphers are ignored for the sake of old boxes on the way, but not any number."""
    stream, far = ends
    far.sendall(real_hello() + b"\x14\x03\x03\x00\x01\x01" * 5000)
    with pytest.raises(HandshakeError):
        await handshake(stream, serving())
    told(far)


@BOTH
async def test_no_common_suite(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    context = calling(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA:AES128-SHA")
    peer = Peer(far, context)
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, serving(), result)
        peer.shake()
    assert isinstance(result.error, HandshakeError)
    assert result.error.reason == "no shared cipher"
    with pytest.raises(ssl.SSLError, match="handshake failure"):
        peer.shake()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
async def test_an_old_version(ends: Ends) -> None:
    stream, far = ends
    context = calling()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    peer = Peer(far, context)
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, serving(), result)
        peer.shake()
    assert isinstance(result.error, HandshakeError)
    assert result.error.reason == "unsupported protocol"
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        peer.shake()


async def test_a_client_that_does_not_trust_the_certificate(ends: Ends) -> None:
    stream, far = ends
    peer = Peer(far, ssl.create_default_context(cadata=make_ca("other").pem.decode()))
    result = Result()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, stream, serving(), result)
        peer.shake()
        await wait_all_tasks_blocked()
        with pytest.raises(ssl.SSLCertVerificationError):
            peer.shake()
        far.sendall(peer.pending())
    assert isinstance(result.error, HandshakeError)
    assert result.error.reason == "tlsv1 alert unknown ca"


@BOTH
async def test_our_own_alert(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    for code, reason in ((112, "unrecognized name"), (80, "internal error")):
        peer = Peer(far, calling(version))
        peer.shake()
        assert await stream.receive()
        await stream.send(alert(code))
        with pytest.raises(ssl.SSLError, match=reason):
            peer.shake()


# Clients' certificates


def with_certificate(version: ssl.TLSVersion, issued: Issued, directory: Path) -> ssl.SSLContext:
    context = calling(version)
    context.load_cert_chain(*issued.write(directory, "client"))
    return context


@BOTH
async def test_a_clients_certificate(ends: Ends, version: ssl.TLSVersion, tmp_path: Path) -> None:
    stream, far = ends
    client = with_certificate(version, CA.issue("alice", client=True), tmp_path)
    result = await shaken(stream, Peer(far, client), serving(client_ca=CA.pem))
    assert result.stream is not None
    result.stream.close()


@BOTH
async def test_no_certificate_of_a_client(ends: Ends, version: ssl.TLSVersion) -> None:
    stream, far = ends
    result = await shaken(stream, Peer(far, calling(version)), serving(client_ca=CA.pem))
    assert isinstance(result.error, HandshakeError)
    assert result.error.reason == "peer did not return a certificate"


@BOTH
async def test_a_clients_certificate_is_refused(
    ends: Ends, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    stream, far = ends
    client = with_certificate(version, self_signed("eve"), tmp_path)
    peer = Peer(far, client)
    result = await shaken(stream, peer, serving(client_ca=CA.pem))
    assert isinstance(result.error, HandshakeError)
    assert result.error.reason == "the client's certificate is refused: self-signed certificate"
    with pytest.raises(ssl.SSLError, match="unknown ca"):
        peer.receive()


async def test_nothing_is_left_open(poller: Poller) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for sent in (b"garbage", real_hello()):
        with stream_pair(poller) as (stream, far):
            far.sendall(sent)
            far.shutdown(socket.SHUT_WR)
            with pytest.raises(HandshakeError):
                await handshake(stream, serving())
    assert len(os.listdir("/proc/self/fd")) == before
