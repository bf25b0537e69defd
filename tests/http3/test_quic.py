"""What the proxy relies on in aioquic beyond its documented interface; see ``h3_quic``."""

from __future__ import annotations

import inspect
import logging

from aioquic import tls
from aioquic.quic.connection import QuicConnection
from aioquic.quic.stream import QuicStream

from kamal_proxy.http import h3_packets
from kamal_proxy.http.h3_quic import ServerQuic, server_configuration
from tests.http3.quic import configuration
from tests.http3.serving import certificate


def opened() -> tuple[QuicConnection, ServerQuic]:
    """Return both sides of a connection whose handshake is complete."""
    client = QuicConnection(configuration=configuration())
    client.connect(("192.0.2.1", 443), now=0.0)
    first = client.datagrams_to_send(now=0.0)
    initial = h3_packets.parse_initial_untrusted(first[0][0])
    assert initial is not None
    server = ServerQuic(
        server_configuration(60.0),
        lambda _: certificate("example.com"),
        original_destination_connection_id=initial.destination,
    )
    for data, _ in first:
        server.receive_datagram(data, ("192.0.2.2", 1), now=0.0)
    for _ in range(5):
        pass_on(client, server)
    assert client._handshake_complete
    assert server._handshake_complete
    return client, server


def pass_on(client: QuicConnection, server: ServerQuic, now: float = 0.1) -> None:
    for data, _ in server.datagrams_to_send(now=now):
        client.receive_datagram(data, ("192.0.2.1", 443), now=now)
    for data, _ in client.datagrams_to_send(now=now):
        server.receive_datagram(data, ("192.0.2.2", 1), now=now)


def test_the_methods_that_are_replaced() -> None:
    assert list(inspect.signature(tls.Context._server_handle_hello).parameters) == [
        "self", "input_buf", "initial_buf", "handshake_buf",
    ]  # fmt: skip
    for name in (
        "_initialize", "_handle_crypto_frame", "_write_stream_limits", "_write_connection_limits",
    ):  # fmt: skip
        ours = inspect.signature(getattr(ServerQuic, name))
        theirs = inspect.signature(getattr(QuicConnection, name))
        assert list(ours.parameters) == list(theirs.parameters)


def test_a_stream_counts_what_is_not_acknowledged() -> None:
    client, server = opened()
    client.send_stream_data(0, b"x")
    pass_on(client, server)
    server.send_stream_data(0, b"y" * 1000)
    assert server.unacknowledged(0) == 1000
    for _ in range(3):
        pass_on(client, server, now=1.0)
    assert server.unacknowledged(0) == 0
    assert not server.is_over(0)
    server.reset_stream(0, 1)
    assert server.is_over(0)
    assert server.unacknowledged(400) == 0
    assert isinstance(server._streams[0], QuicStream)


def test_the_end_is_known_before_it_is_told() -> None:
    client, server = opened()
    before = server.is_ending
    client.close()
    pass_on(client, server)
    assert (before, server.is_ending, server.is_deaf) == (False, True, True)


def test_what_clients_do_wrong_is_not_printed() -> None:
    assert any(isinstance(each, logging.NullHandler) for each in logging.getLogger("quic").handlers)
