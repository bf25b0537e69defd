"""A QUIC connection of aioquic's that chooses its certificate late and keeps what it buffers small.

All that the proxy relies on beyond aioquic's documented interface is in this module, and in the
reading and writing of packets in ``h3_packets``. It is written against aioquic 1.7 and meant for
``>=1.7,<1.8``; ``tests/http3/test_quic.py`` fails if it changes:

* ``QuicConnection._initialize`` makes ``self.tls`` at the first datagram, and the context's
  ``_server_handle_hello(input, initial, handshake)`` reads ``certificate``, ``certificate_chain``
  and ``certificate_private_key`` only after it was called with the whole ClientHello;
* ``_write_stream_limits`` and ``_write_connection_limits`` are the only places that raise the
  limits of what a client may send; aioquic's own double them whether anybody reads or not;
* ``_handle_crypto_frame`` is what every CRYPTO frame passes, and may raise QuicConnectionError;
* ``QuicStream``'s ``sender`` and ``receiver`` count bytes as those of 1.7 do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aioquic import tls
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    CONNECTION_LIMIT_FRAME_CAPACITY,
    END_STATES,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
)
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicProtocolVersion

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioquic.quic.connection import QuicReceiveContext
    from aioquic.quic.packet_builder import QuicPacketBuilder
    from aioquic.quic.recovery import QuicPacketSpace
    from aioquic.quic.stream import QuicStream

    from kamal_proxy.tls.certificates import Certificate

VERSIONS = [int(QuicProtocolVersion.VERSION_1)]
CONNECTION_ID_LENGTH = 8

#: Bytes of one stream, and of all streams of a connection, that a client may send before they are
#: read here. Also the most that lies in aioquic's own buffers for want of an earlier packet.
STREAM_WINDOW = 256 * 1024
CONNECTION_WINDOW = 1024 * 1024

# Bytes of TLS messages from a client. aioquic would keep half a megabyte for one packet that has an
# offset of as much, and join a hello of 16 megabytes.
MAX_CRYPTO = 32 * 1024

# What aioquic says of each client that breaks a rule would go to the standard error output, where
# the embedding program has not asked for it.
logging.getLogger("quic").addHandler(logging.NullHandler())

_NOT_CHOSEN = object()  # aioquic insists on a certificate before there is a ClientHello


class _UnrecognizedNameError(tls.Alert):
    description = tls.AlertDescription.unrecognized_name


def server_configuration(idle_timeout: float) -> QuicConfiguration:
    """Return how the proxy speaks QUIC; shared by all connections.

    Args:
        idle_timeout: Seconds after which a connection on which nothing arrives is given up.
    """
    return QuicConfiguration(
        is_client=False,
        alpn_protocols=["h3"],
        certificate=_NOT_CHOSEN,
        private_key=_NOT_CHOSEN,
        connection_id_length=CONNECTION_ID_LENGTH,
        idle_timeout=idle_timeout,
        max_data=CONNECTION_WINDOW,
        max_stream_data=STREAM_WINDOW,
        # Version 2 says the same in other words, and each version costs keys for each connection.
        supported_versions=VERSIONS,
    )


class ServerQuic(QuicConnection):
    """The server's side of one QUIC connection.

    There are no session tickets, and so no early data (0-RTT): a request in it could be replayed.

    Args:
        configuration: From :func:`server_configuration`.
        select: Returns the certificate for a server name (lower case, without final dot; empty if
            the client named none); None refuses the handshake with ``unrecognized_name``.
        original_destination_connection_id: What the client's first packet was sent to.
        retry_source_connection_id: What it was told to send to instead, after a Retry.

    Attributes:
        server_name: The name that the client asked for, once its ClientHello has arrived.
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        select: Callable[[str], Certificate | None],
        *,
        original_destination_connection_id: bytes,
        retry_source_connection_id: bytes | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._select = select
        self.server_name = ""

    # The certificate

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        handle_hello = self.tls._server_handle_hello

        def choose_first(input_buf: Buffer, initial_buf: Buffer, handshake_buf: Buffer) -> None:
            hello = Buffer(data=input_buf.data_slice(0, input_buf.capacity))
            self._choose(tls.pull_client_hello(hello).server_name or "")
            handle_hello(input_buf, initial_buf, handshake_buf)

        # The one step between the arrival of the hello and the use of the certificate.
        self.tls._server_handle_hello = choose_first  # type: ignore[method-assign]

    def _choose(self, server_name: str) -> None:
        self.server_name = server_name.lower().removesuffix(".")
        certificate = self._select(self.server_name)
        if certificate is None:
            raise _UnrecognizedNameError("no certificate for this name")
        context: Any = self.tls
        context.certificate, *context.certificate_chain = certificate.chain
        context.certificate_private_key = certificate.key

    def _handle_crypto_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        start = buf.tell()
        end = buf.pull_uint_var() + buf.pull_uint_var()
        buf.seek(start)
        if end > MAX_CRYPTO:
            raise QuicConnectionError(
                error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
                frame_type=frame_type,
                reason_phrase="TLS messages too long",
            )
        super()._handle_crypto_frame(context, frame_type, buf)

    # Its state

    @property
    def is_begun(self) -> bool:
        """Whether a packet of the client's was understood."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    @property
    def is_ending(self) -> bool:
        """Whether either side has closed the connection; aioquic tells of it only later."""
        return self._close_event is not None or self._state in END_STATES

    @property
    def is_deaf(self) -> bool:
        """Whether what arrives is not looked at any more."""
        return self._state in END_STATES

    # What the client may send

    @property
    def held(self) -> int:
        """How many bytes are here, or were announced by later ones, that nobody has taken yet."""
        data = self._local_max_data
        return data.used + CONNECTION_WINDOW - data.value

    def give_credit(self, stream_id: int, size: int) -> None:
        """Let the client send as much again as was taken from a stream.

        Args:
            stream_id: The stream; it may be over already.
            size: Bytes that were delivered on it and are not kept any more.
        """
        self._local_max_data.value += size
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.max_stream_data_local += size

    def settle_reset(self, stream_id: int) -> None:
        """Give credit for what never will be delivered, after a StreamReset event."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            receiver = stream.receiver
            self._local_max_data.value += receiver.highest_offset - receiver.starting_offset()

    def _write_stream_limits(
        self,
        builder: QuicPacketBuilder,
        space: QuicPacketSpace,  # noqa: ARG002  # aioquic's signature
        stream: QuicStream,
    ) -> None:
        sent = stream.max_stream_data_local_sent
        # 0 after a loss; otherwise small steps would cost a frame each.
        if stream.receiver.is_finished or (
            sent and stream.max_stream_data_local - sent < STREAM_WINDOW // 4
        ):
            return
        # A stream of our own is only written to.
        if stream.max_stream_data_local == 0:
            return
        frame = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        assert stream.stream_id is not None
        frame.push_uint_var(stream.stream_id)
        frame.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        data = self._local_max_data
        if not data.sent or data.value - data.sent >= CONNECTION_WINDOW // 4:
            frame = builder.start_frame(
                data.frame_type,
                capacity=CONNECTION_LIMIT_FRAME_CAPACITY,
                handler=self._on_connection_limit_delivery,
                handler_args=(data,),
            )
            frame.push_uint_var(data.value)
            data.sent = data.value
        # The numbers of streams are aioquic's business; what it would do with the data is not.
        used, value, sent = data.used, data.value, data.sent
        data.used, data.value = 0, sent
        try:
            super()._write_connection_limits(builder, space)
        finally:
            data.used, data.value = used, value

    def refuse(self, stream_id: int, code: int) -> None:
        """Ask the client to send no more on a stream, unless it has done.

        Args:
            stream_id: The stream; it may be over already.
            code: Error code of the application.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.receiver.is_finished:
            return
        if stream.receiver._stop_error_code is None:
            self.stop_stream(stream_id, code)

    # What is on its way to the client

    def unacknowledged(self, stream_id: int) -> int:
        """Return how many bytes of a stream are kept until the client has acknowledged them."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return 0
        sender = stream.sender
        # After a reset nothing of it is sent again, though aioquic keeps it until the end.
        return 0 if sender._reset_error_code is not None else len(sender._buffer)

    def is_over(self, stream_id: int) -> bool:
        """Return whether the client has acknowledged the end of a stream, or it was reset."""
        stream = self._streams.get(stream_id)
        return (
            stream is None
            or stream.sender.is_finished
            or stream.sender._reset_error_code is not None
        )
