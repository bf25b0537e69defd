"""The QUIC endpoint over real sockets: certificates, windows, lost packets, moves, ends."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
from aioquic.quic.events import StreamDataReceived
from aioquic.quic.packet import QuicProtocolVersion
from cryptography.hazmat.primitives.asymmetric import ec

from kamal_proxy.http import h3_endpoint, h3_packets, h3_quic
from tests.http3.quic import Quic, configuration, losing, open_quic
from tests.http3.serving import authority, certificate, open_endpoint

if TYPE_CHECKING:
    from kamal_proxy.tls.certificates import Certificate

UNRECOGNIZED_NAME = 0x100 + 112  # CRYPTO_ERROR and the alert (RFC 9001 4.8)
CRYPTO_BUFFER_EXCEEDED = 0xD
EXCESSIVE_LOAD = 0x107


async def echo(client: Quic, data: bytes) -> None:
    """Send data on a new stream and require it back."""
    stream = client.quic.get_next_available_stream_id()
    client.quic.send_stream_data(stream, data, end_stream=True)
    client.flush()

    def back() -> list[StreamDataReceived]:
        return [
            event
            for event in client.events
            if isinstance(event, StreamDataReceived) and event.stream_id == stream
        ]

    await client.wait(lambda: client.ended or any(event.end_stream for event in back()))
    assert b"".join(event.data for event in back()) == data


async def test_echo() -> None:
    async with open_endpoint() as served, open_quic(served.server) as client:
        await echo(client, b"hello")
        await echo(client, os.urandom(3_000_000))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1"])
async def test_answers_come_from_the_address_that_was_asked(host: str) -> None:
    async with open_endpoint(bind="") as served, open_quic((host, served.port)) as client:
        await echo(client, b"hello")
        assert served.applications[0].link.path.address[0] in ("127.0.0.1", "::1")


# Certificates


async def test_the_certificate_is_chosen_by_name() -> None:
    asked = []

    def select(name: str) -> Certificate:
        asked.append(name)
        return certificate(name or "nameless.example.com")

    async with open_endpoint(select) as served:
        for name in ("one.example.com", "two.example.com"):
            made = configuration(name, authority().pem)
            async with open_quic(served.server, made) as client:
                await echo(client, name.encode())
        async with open_quic(served.server, configuration("ThREE.example.com")):
            pass
        nameless = configuration()
        nameless.server_name = None
        async with open_quic(served.server, nameless):
            pass
        names = [application.link.server_name for application in served.applications]
    assert asked == names == ["one.example.com", "two.example.com", "three.example.com", ""]


@pytest.mark.parametrize("key", ["ec", "rsa", "ed25519", ec.generate_private_key(ec.SECP384R1())])
async def test_kinds_of_keys(key: Any) -> None:
    made = configuration("example.com", authority().pem)
    async with (
        open_endpoint(lambda _: certificate("example.com", key=key)) as served,
        open_quic(served.server, made) as client,
    ):
        await echo(client, b"hello")


async def test_a_name_without_a_certificate_is_refused() -> None:
    async with open_endpoint(lambda _: None) as served:
        async with open_quic(served.server, wait=False) as client:
            assert await client.wait_closing() == UNRECOGNIZED_NAME
        assert served.applications == []
        await served.wait_connections(0)
        assert served.limits.handshakes == served.limits.unproven == 0


async def test_a_hello_in_two_datagrams() -> None:
    made = configuration(quantum_readiness_test=True)
    async with open_endpoint() as served, open_quic(served.server, made) as client:
        await echo(client, b"hello")


async def test_a_hello_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h3_quic, "MAX_CRYPTO", 1000)
    made = configuration(quantum_readiness_test=True)
    async with (
        open_endpoint() as served,
        open_quic(served.server, made, wait=False) as client,
    ):
        assert await client.wait_closing() == CRYPTO_BUFFER_EXCEEDED


async def test_another_version_is_answered_with_ours() -> None:
    made = configuration(
        original_version=0x1A2A3A4A,
        supported_versions=[0x1A2A3A4A, QuicProtocolVersion.VERSION_1],
    )
    async with open_endpoint() as served, open_quic(served.server, made) as client:
        await echo(client, b"hello")
        assert client.received[0][1:5] == bytes(4)


async def test_no_early_data_is_offered() -> None:
    tickets: list[object] = []
    async with open_endpoint() as served, open_quic(served.server) as client:
        client.quic.tls.new_session_ticket_cb = tickets.append
        await echo(client, b"hello")
    assert tickets == []


# The network


@pytest.mark.parametrize("share", [0.05, 0.3])
async def test_lost_packets_are_sent_again(share: float) -> None:
    drop = losing(share)
    async with open_endpoint() as served, open_quic(served.server, drop=drop) as client:
        await echo(client, os.urandom(30_000))


async def test_a_client_that_moves_is_followed() -> None:
    async with open_endpoint() as served, open_quic(served.server) as client:
        await echo(client, b"here")
        client.move()
        await echo(client, b"there")
        client.move()
        client.quic.change_connection_id()
        await echo(client, os.urandom(50_000))
        assert served.limits.connections == 1


async def test_an_address_that_is_not_proven_gets_little() -> None:
    async with open_endpoint(lambda _: certificate("example.com", key="rsa")) as served:
        client_sends = [0]

        def only_the_first(way: str, data: bytes) -> bool:
            if way == "out":
                client_sends[0] += 1
                return client_sends[0] > 1
            return False

        async with open_quic(served.server, drop=only_the_first, wait=False) as client:
            await client.wait(lambda: len(client.received) > 2)
            # Time for what the server's loss recovery would like to add.
            await client.wait(lambda: len(client.sent) > 3)
            assert sum(map(len, client.received)) <= 3 * len(client.sent[0])


# What is not read


async def test_what_is_not_read_is_not_taken() -> None:
    async with open_endpoint() as served, open_quic(served.server) as client:
        echoing = await served.application()
        echoing.takes = False
        for _ in range(3):
            stream = client.quic.get_next_available_stream_id()
            client.quic.send_stream_data(stream, bytes(2 * h3_quic.STREAM_WINDOW))
        client.flush()
        while served.limits.held < 3 * h3_quic.STREAM_WINDOW:
            await trio.lowlevel.checkpoint()
        for _ in range(10):
            stream = client.quic.get_next_available_stream_id()
            client.quic.send_stream_data(stream, bytes(2 * h3_quic.STREAM_WINDOW))
        client.flush()
        while served.limits.held < h3_quic.CONNECTION_WINDOW:
            await trio.lowlevel.checkpoint()
        assert echoing.stalled == h3_quic.CONNECTION_WINDOW
        # As much as is taken may be sent again.
        echoing.link.quic.give_credit(0, h3_quic.STREAM_WINDOW)
        echoing.link.touch()
        while echoing.stalled < h3_quic.CONNECTION_WINDOW + h3_quic.STREAM_WINDOW:
            await trio.lowlevel.checkpoint()
        assert echoing.stalled == h3_quic.CONNECTION_WINDOW + h3_quic.STREAM_WINDOW


async def test_what_was_reset_is_given_back() -> None:
    async with open_endpoint() as served, open_quic(served.server) as client:
        await echo(client, b"hello")
        for drop in (lambda way, _: bool(way == "out"), lambda *_: False):
            stream = client.quic.get_next_available_stream_id()
            client.quic.send_stream_data(stream, bytes(100_000))
            # What was lost counts as sent all the same (RFC 9000 4.5).
            client.drop = drop
            client.flush()
            client.drop = lambda *_: False
            client.quic.reset_stream(stream, 5)
            client.flush()
            await echo(client, b"still here")
        application = await served.application()
        assert application.link.quic._local_max_data.used > 2000
        assert served.limits.held == 0


async def test_all_connections_together_hold_no_more_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h3_endpoint, "MAX_HELD", 300_000)
    async with (
        open_endpoint() as served,
        open_quic(served.server) as first,
        open_quic(served.server) as second,
    ):
        for number in range(2):
            (await served.application(number)).takes = False
        for client in (first, second):
            client.quic.send_stream_data(0, bytes(h3_quic.STREAM_WINDOW))
            client.flush()
        while not any(application.ended for application in served.applications):
            await trio.lowlevel.checkpoint()
        await served.wait_connections(1)
        assert served.limits.held <= 300_000
        assert sorted([first.closing_code or 0, second.closing_code or 0]) == [0, EXCESSIVE_LOAD]


# Ends


async def test_the_clients_goodbye_is_noticed_at_once() -> None:
    async with open_endpoint() as served:
        async with open_quic(served.server):
            pass
        await (await served.application()).over.wait()
        assert served.limits.connections == 1  # until nothing can be under way any more
        await served.wait_connections(0)
        assert served.applications[0].ended == 1


async def test_a_client_that_vanishes_is_given_up() -> None:
    async with (
        open_endpoint(idle_timeout=0.3) as served,
        open_quic(served.server) as client,
    ):
        client.vanish()
        await (await served.application()).over.wait()
        assert served.limits.connections == served.limits.held == 0


async def test_a_handshake_that_stops_is_given_up() -> None:
    sent = [0]

    def first_only(way: str, _: bytes) -> bool:
        sent[0] += way == "out"
        return way == "in" or sent[0] > 1

    async with (
        open_endpoint(handshake_timeout=0.2) as served,
        open_quic(served.server, drop=first_only, wait=False),
    ):
        await served.wait_connections(1)
        assert served.limits.unproven == served.limits.handshakes == 1
        await served.wait_connections(0)
        assert served.limits.unproven == served.limits.handshakes == 0


async def test_the_end_of_the_endpoint_is_told() -> None:
    async with open_endpoint() as served, open_quic(served.server) as client:
        await served.application()
        served.scope.cancel()
        assert await client.wait_closing() == 0
        assert served.applications[0].ended == 1


async def test_a_lost_goodbye_is_said_again() -> None:
    async with open_endpoint() as served, open_quic(served.server) as client:
        application = await served.application()
        lost: list[bytes] = []

        def lose(way: str, data: bytes) -> bool:
            if way == "in":
                lost.append(data)
            return way == "in"

        client.drop = lose
        application.link.close(EXCESSIVE_LOAD)
        await application.over.wait()
        assert application.link.farewell is not None
        while application.link.farewell[0] not in lost:
            await trio.lowlevel.checkpoint()
        client.drop = lambda *_: False
        client.quic.send_ping(1)
        client.flush()
        assert await client.wait_closing() == EXCESSIVE_LOAD


async def test_a_certificate_that_can_not_be_chosen() -> None:
    names = ["broken"]

    def select(name: str) -> Certificate:
        if name in names:
            raise RuntimeError("a bug of the selection")
        return certificate("example.com")

    async with (
        open_endpoint(select, may_log=True) as served,
        open_quic(served.server, configuration("broken"), wait=False),
    ):
        line = await served.lines.wait_for_message("Connection failed")
        assert "a bug of the selection" in line["error"]
        async with open_quic(served.server) as client:
            await echo(client, b"hello")


async def test_a_bug_costs_one_datagram(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_endpoint(may_log=True) as served, open_quic(served.server) as client:
        with monkeypatch.context() as patched:
            patched.setattr(h3_packets, "is_long", None)
            client.send_raw(b"x")
            await served.lines.wait_for_message("Datagram failed")
        await echo(client, b"hello")


async def test_a_bug_costs_one_connection() -> None:
    async with (
        open_endpoint(may_log=True) as served,
        open_quic(served.server) as first,
        open_quic(served.server) as second,
    ):
        (await served.application()).broken = True
        first.quic.send_stream_data(0, b"x")
        first.flush()
        await (await served.application()).over.wait()
        await echo(second, b"hello")
        assert served.limits.connections == 1
        assert [line["msg"] for line in served.lines.all] == ["Connection failed"]
