"""What strangers can send to the QUIC endpoint: garbage, floods, wrong tokens, too many clients."""

from __future__ import annotations

import math
import os
import socket
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trio
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import StreamDataReceived
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.tls import Epoch
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http import h3_endpoint, h3_packets
from kamal_proxy.http.h2_guard import Budget
from tests.http3.quic import Quic, configuration, open_quic
from tests.http3.serving import Served, open_endpoint
from tests.http3.test_endpoint import EXCESSIVE_LOAD, echo

if TYPE_CHECKING:
    from aioquic.quic.packet_builder import QuicPacketBuilder

CONNECTION_REFUSED = 0x2
INVALID_TOKEN = 0xB
RETRY = 0xF0  # first byte of a long header, without its random bits


def first_packet(length: int = 8) -> bytes:
    """Return what a client sends first, with a connection id of its own."""
    quic = QuicConnection(configuration=configuration(connection_id_length=length))
    quic.connect(("127.0.0.1", 1), now=0.0)
    return quic.datagrams_to_send(now=0.0)[0][0]


def garbage() -> list[bytes]:
    """Return datagrams that no connection can come of."""
    initial = first_packet()
    found = [b"", b"\x00", b"\xc0", b"GET / HTTP/1.1\r\n\r\n", bytes(1200), os.urandom(9000)]
    found += [bytes([first]) + os.urandom(1400) for first in range(256)]
    found += [initial[:length] for length in range(0, 1200, 7)]
    for position in range(40):
        changed = bytearray(initial)
        changed[position] ^= 0xFF
        found.append(bytes(changed))
    found += [initial[:30] + os.urandom(1170)]  # not to be decrypted
    found += [b"\xc0" + bytes(4) + initial[5:]]  # version negotiation
    found += [b"\xf0" + initial[1:], b"\xe0" + initial[1:], b"\xd0" + initial[1:]]
    return found


async def flood(served: Served, datagrams: list[bytes]) -> list[bytes]:
    """Send datagrams from one socket; return the answers up to that to a last, good one."""
    answers = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(served.server)
        for count, datagram in enumerate(datagrams):
            sock.send(datagram)
            if count % 8 == 7:
                await trio.lowlevel.checkpoint()
        async with open_quic(served.server) as client:
            await echo(client, b"still here")
        try:
            while True:
                answers.append(sock.recv(65535))
        except BlockingIOError:
            return answers


async def test_garbage_opens_no_connection() -> None:
    async with open_endpoint() as served:
        await flood(served, garbage())
        assert served.limits.handshakes == served.limits.unproven == 0
        await served.wait_connections(0)
        assert len(served.applications) == 1


async def test_small_datagrams_get_no_answer() -> None:
    async with open_endpoint() as served:
        unknown = b"\xc0\x1a\x2a\x3a\x4a" + first_packet()[5:]
        answers = await flood(served, [unknown[:1199], first_packet()[:1199]])
        assert answers == []
        answers = await flood(served, [unknown])
        assert [answer[1:5] for answer in answers] == [bytes(4)]
        assert len(answers[0]) < 100


async def test_in_a_flood_clients_prove_their_address() -> None:
    async with open_endpoint() as served:
        packets = [first_packet() for _ in range(h3_endpoint.MAX_UNPROVEN + 50)]
        await flood(served, packets[: h3_endpoint.MAX_UNPROVEN])
        assert served.limits.unproven == h3_endpoint.MAX_UNPROVEN
        answers = await flood(served, packets[h3_endpoint.MAX_UNPROVEN :])
        assert served.limits.unproven == h3_endpoint.MAX_UNPROVEN
        assert sum(answer[0] & 0xF0 == RETRY for answer in answers) == 50
        async with open_quic(served.server) as client:
            assert client.received[0][0] & 0xF0 == RETRY
            await echo(client, b"hello")
            assert served.limits.proven == {}


async def test_a_proven_address_opens_a_few_handshakes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h3_endpoint, "MAX_UNPROVEN", 0)
    monkeypatch.setattr(h3_endpoint, "MAX_HANDSHAKES_PER_ADDRESS", 3)
    async with open_endpoint() as served, AsyncExitStack() as stack:
        for count in (1, 2, 3):
            await stack.enter_async_context(open_stopped(served))
            while served.limits.proven != {"127.0.0.1": count}:
                await trio.lowlevel.checkpoint()
        async with open_quic(served.server, wait=False) as client:
            assert await client.wait_closing() == CONNECTION_REFUSED
        assert served.limits.handshakes == 3


def open_stopped(served: Served) -> AbstractAsyncContextManager[Quic]:
    """Connect a client that proves its address and then says no more."""
    sent = [0]

    def after_the_second(way: str, _: bytes) -> bool:
        sent[0] += way == "out"
        return sent[0] > 2

    return open_quic(served.server, drop=after_the_second, wait=False)


async def test_connections_are_limited() -> None:
    async with (
        open_endpoint(max_connections=1) as served,
        open_quic(served.server) as first,
    ):
        async with open_quic(served.server, wait=False) as second:
            assert await second.wait_closing() == CONNECTION_REFUSED
        await echo(first, b"hello")


async def test_no_new_connections_while_closing() -> None:
    async with open_endpoint() as served, open_quic(served.server) as first:
        served.limits.closing = True
        async with open_quic(served.server, wait=False) as second:
            assert await second.wait_closing() == CONNECTION_REFUSED
        await echo(first, b"hello")


async def test_a_token_of_others_is_refused() -> None:
    made = configuration(token=os.urandom(80))
    async with (
        open_endpoint() as served,
        open_quic(served.server, made, wait=False) as client,
    ):
        assert await client.wait_closing() == INVALID_TOKEN
        assert served.limits.connections == 0


async def test_a_token_is_for_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h3_endpoint, "MAX_UNPROVEN", 0)
    async with open_endpoint() as served:
        moved: list[Quic] = []

        def move_after_retry(way: str, data: bytes) -> bool:
            if way == "in" and data[0] & 0xF0 == RETRY:
                moved[0].move()
            return False

        async with open_quic(served.server, wait=False) as client:
            moved.append(client)
            client.drop = move_after_retry
            assert await client.wait_closing() == INVALID_TOKEN


class Ledger(Budget):
    """A budget that nothing uses up, and that remembers what was earned."""

    earned = 0.0

    def give(self, points: float) -> None:
        self.earned += points
        super().give(points)


async def test_datagrams_full_of_frames_that_say_nothing() -> None:
    async with (
        open_endpoint(may_log=True) as served,
        open_quic(served.server) as first,
        open_quic(served.server) as second,
    ):
        # Nothing comes back with time: it is closed however slowly its datagrams come.
        (await served.application(0)).link.work = Budget(0.03, 0.0, trio.current_time())
        quic: Any = first.quic

        def write_pings(builder: QuicPacketBuilder, *_: Any, **__: Any) -> None:
            builder.start_packet(QuicPacketType.ONE_RTT, quic._cryptos[Epoch.ONE_RTT])
            for _count in range(1000):
                builder.start_frame(QuicFrameType.PING, capacity=1)

        quic._write_application = write_pings
        while first.closing_code is None:
            first.flush()
            await trio.lowlevel.checkpoint()
        assert first.closing_code == EXCESSIVE_LOAD
        # Useful work is paid for, in either direction.
        link = (await served.application(1)).link
        # The time itself is not looked at: what else takes some here, such as garbage, counts, too.
        link.work = ledger = Ledger(math.inf, 0.0, trio.current_time())
        taken = link.quic._local_max_data
        begun = taken.used
        upload = second.quic.get_next_available_stream_id(is_unidirectional=True)
        second.quic.send_stream_data(upload, bytes(3_000_000))
        second.flush()
        while taken.used < begun + 3_000_000:
            await trio.lowlevel.checkpoint()
        assert ledger.earned >= 2_900_000 * h3_endpoint._WORK_PER_BYTE
        ledger.earned = 0.0
        await echo(second, b"x")
        link.quic.send_stream_data(1, bytes(3_000_000), end_stream=True)
        link.touch()
        await second.wait(
            lambda: any(
                isinstance(event, StreamDataReceived) and event.stream_id == 1 and event.end_stream
                for event in second.events
            )
        )
        assert ledger.earned >= 2_000 * h3_endpoint._WORK_PER_FULL_DATAGRAM
        assert second.closing_code is None
        assert [line["error"] for line in served.lines.all] == ["too much work for nothing"]


@pytest.mark.parametrize(("length", "good"), [(0, False), (7, False), (8, True), (20, True)])
def test_the_first_connection_id_is_hard_to_guess(length: int, good: bool) -> None:
    assert (h3_packets.parse_initial_untrusted(first_packet(length)) is not None) is good


@pytest.mark.fuzz
@given(st.binary(max_size=100))
def test_any_long_header(data: bytes) -> None:
    header = h3_packets.parse_long_untrusted(data)
    if header is not None:
        assert header.destination in data
        assert header.source in data
        assert len(header.destination) <= 20


@pytest.mark.fuzz
@given(st.binary(max_size=60), st.sampled_from([b"", b"\xc3\x00\x00\x00\x01\x08"]))
def test_any_first_packet(data: bytes, begin: bytes) -> None:
    initial = h3_packets.parse_initial_untrusted((begin + data).ljust(1200, b"\x00"))
    if initial is not None:
        assert len(initial.destination) >= 8
