"""The h2 library's server side, with a few of its habits changed. No IO.

What is wrong with one request costs its stream, not the connection, and a GOAWAY ends neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.errors import ErrorCodes
from h2.events import StreamReset
from h2.exceptions import InvalidBodyLengthError
from h2.settings import SettingCodes, Settings

from kamal_proxy.http.h2_guard import FRAME_HEAD

if TYPE_CHECKING:
    from h2.events import Event

MAX_STREAMS: Final = 100  # requests at once on one connection
STREAM_WINDOW: Final = 128 * 1024  # bytes of a request's body that wait to be taken
CONNECTION_WINDOW: Final = 512 * 1024  # bytes of all requests' bodies that do
_STREAM_ID = 0x7FFFFFFF
SPACE_FOR_ERRORS: Final = 2  # times the largest head: what is not larger is answered


class _StateMachine(H2ConnectionStateMachine):
    """The library's, without its belief that nothing follows a GOAWAY (RFC 9113 6.8)."""

    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        if input_ in (ConnectionInputs.SEND_GOAWAY, ConnectionInputs.RECV_GOAWAY):
            return []
        return super().process_input(input_)


class ServerCodec(H2Connection):
    """The library's connection, with a few of its habits changed."""

    # Enough for frames that were under way when a stream ended; each takes memory.
    MAX_CLOSED_STREAMS = 10 * MAX_STREAMS

    def __init__(self, max_head_size: int) -> None:
        # Fields are checked, strictly, where heads are made of them: what is wrong there concerns
        # one stream, not the connection.
        super().__init__(
            H2Configuration(
                client_side=False,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.state_machine = _StateMachine()
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_head_size,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            },
        )
        self.decoder.max_header_list_size = SPACE_FOR_ERRORS * max_head_size

    @property
    def open_inbound_streams(self) -> int:
        """Pretend that there are none: one too many costs its stream, not the connection."""
        _ = super().open_inbound_streams  # forgets those that are closed
        return 0

    def receive_frame(self, frame: bytes) -> list[Event]:
        """Take one frame, or the preface; return what happened.

        What waits to be sent must have been taken before.

        Raises:
            h2.exceptions.ProtocolError: the connection has to end; the GOAWAY frame is framed.
        """
        try:
            return self.receive_data(frame)
        except InvalidBodyLengthError:
            # A malformed request is the end of its stream only (RFC 9113 8.1.1).
            self.data_to_send()
            stream_id = int.from_bytes(frame[5:FRAME_HEAD], "big") & _STREAM_ID
            self.acknowledge_received_data(len(frame) - FRAME_HEAD, stream_id)
            self.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
            return [StreamReset(stream_id=stream_id, remote_reset=False)]
