"""What is said to QUIC clients without keeping anything about them (RFC 9000 5.2.2, 6, 8.1).

The parts of a long header that all versions share, version negotiation, Retry with a token that
proves an address, and the refusal of a connection. No IO.
"""

from __future__ import annotations

import os

import attrs
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler

from kamal_proxy.http.h3_quic import CONNECTION_ID_LENGTH, VERSIONS

#: A datagram with a client's first packet is at least this long (RFC 9000 14.1), in bytes.
SMALLEST_INITIAL = 1200
_SMALLEST_CLIENT_CHOICE = 8  # bytes of the first destination connection id (RFC 9000 7.2)
_MAX_CONNECTION_ID = 20
_LONG = 0x80


@attrs.frozen
class LongHeader:
    """What all versions of QUIC have in common (RFC 8999 5.1).

    Attributes:
        version: 0 in version negotiation, which is a server's to send.
        destination: Connection id that it was sent to.
        source: The client's own.
    """

    version: int
    destination: bytes
    source: bytes


@attrs.frozen
class Initial:
    """A client's first packet.

    Attributes:
        destination: Connection id that it was sent to.
        source: The client's own.
        token: What a Retry gave it; empty if it had none.
    """

    destination: bytes
    source: bytes
    token: bytes


def destination_of(data: bytes) -> bytes:
    """Return the connection id that a packet with a short header was sent to; it may be cut."""
    return data[1 : 1 + CONNECTION_ID_LENGTH]


def is_long(data: bytes) -> bool:
    """Return whether a datagram begins with a long header."""
    return bool(data) and data[0] & _LONG != 0


def parse_long_untrusted(data: bytes) -> LongHeader | None:
    """Return the head of a datagram with a long header, or None if it is cut or malformed."""
    if len(data) < 7:
        return None
    end = 6 + data[5]
    if end >= len(data):
        return None
    source_end = end + 1 + data[end]
    if data[5] > _MAX_CONNECTION_ID or data[end] > _MAX_CONNECTION_ID or source_end > len(data):
        return None
    version = int.from_bytes(data[1:5], "big")
    return LongHeader(version, data[6:end], data[end + 1 : source_end])


def parse_initial_untrusted(data: bytes) -> Initial | None:
    """Return the first packet of a client, or None if a datagram does not begin with one."""
    if len(data) < SMALLEST_INITIAL:
        return None
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID_LENGTH)
    except ValueError:
        return None
    if header.packet_type != QuicPacketType.INITIAL or (
        len(header.destination_cid) < _SMALLEST_CLIENT_CHOICE
    ):
        return None
    return Initial(header.destination_cid, header.source_cid, header.token)


def version_negotiation(header: LongHeader) -> bytes:
    """Return the packet that says which versions are spoken (RFC 9000 6)."""
    return encode_quic_version_negotiation(
        source_cid=header.destination,
        destination_cid=header.source,
        supported_versions=VERSIONS,
    )


def refusal(initial: Initial, error: QuicErrorCode) -> bytes:
    """Return the packet that closes a connection that never was (RFC 9000 5.2.2).

    Args:
        initial: The client's first packet.
        error: Why: ``CONNECTION_REFUSED`` or ``INVALID_TOKEN``.
    """
    crypto = CryptoPair()
    crypto.setup_initial(cid=initial.destination, is_client=False, version=VERSIONS[0])
    builder = QuicPacketBuilder(
        host_cid=initial.destination,
        is_client=False,
        max_datagram_size=SMALLEST_INITIAL,
        peer_cid=initial.source,
        version=VERSIONS[0],
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    frame = builder.start_frame(
        QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY
    )
    frame.push_uint_var(error)
    frame.push_uint_var(QuicFrameType.PADDING)  # no frame in particular
    frame.push_uint_var(0)  # no words
    datagrams, _ = builder.flush()
    return datagrams[0]


class Retries:
    """Asks clients to come again with a token, which proves that they get what is sent to them.

    A token is good for the address, the connection id and the half minute that it was made for.
    """

    def __init__(self) -> None:
        self._tokens = QuicRetryTokenHandler()

    def retry(self, initial: Initial, peer: tuple[str | int, ...], now: float) -> bytes:
        """Return the packet that asks.

        Args:
            initial: The client's first packet.
            peer: Its address, as the socket tells it.
            now: The time in seconds, on the clock that :meth:`redeem` is told.
        """
        source = os.urandom(CONNECTION_ID_LENGTH)
        return encode_quic_retry(
            version=VERSIONS[0],
            source_cid=source,
            destination_cid=initial.source,
            original_destination_cid=initial.destination,
            retry_token=self._tokens.create_token(
                address=_plain(peer),
                original_destination_connection_id=initial.destination,
                retry_source_connection_id=source,
                now=now,
            ),
        )

    def redeem(self, initial: Initial, peer: tuple[str | int, ...], now: float) -> bytes | None:
        """Return what the client's packet before the Retry was sent to; None for a wrong token."""
        try:
            return self._tokens.validate_token(
                address=_plain(peer),
                destination_cid=initial.destination,
                token=initial.token,
                now=now,
            )
        except ValueError:
            return None


def _plain(peer: tuple[str | int, ...]) -> tuple[str, int]:
    """Return an address without the zone that only this host knows."""
    return str(peer[0]).partition("%")[0], int(peer[1])
