"""The h2 library's two sides, with a few of its habits changed. No IO.

What is wrong with one message costs its stream, not the connection, and a GOAWAY ends neither.
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
SPACE_FOR_ERRORS: Final = 2  # times the largest head: what is not larger is answered
TARGET_WINDOW: Final = 256 * 1024  # bytes of a response that wait for its client
MAX_TARGET_FRAME: Final = 64 * 1024
TABLE_SIZE: Final = 4096  # bytes of the table of fields that were sent
_STREAM_ID = 0x7FFFFFFF


class BodyLengthWrong(StreamReset):
    """The proxy has reset a stream: its body has another length than was announced.

    Attributes:
        why: The two lengths, in words.
    """

    why = ""


class _StateMachine(H2ConnectionStateMachine):
    """The library's, without its belief that nothing follows a GOAWAY (RFC 9113 6.8)."""

    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        if input_ in (ConnectionInputs.SEND_GOAWAY, ConnectionInputs.RECV_GOAWAY):
            return []
        return super().process_input(input_)


class _Codec(H2Connection):
    # Enough for frames that were under way when a stream ended; each takes memory.
    MAX_CLOSED_STREAMS = 10 * MAX_STREAMS

    def __init__(self, settings: dict[SettingCodes, int], *, client: bool) -> None:
        # Fields are checked, strictly, where heads are made of them: what is wrong there concerns
        # one stream, not the connection.
        super().__init__(
            H2Configuration(
                client_side=client,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.state_machine = _StateMachine()
        self.local_settings = Settings(client=client, initial_values=settings)

    def receive_frame(self, frame: bytes) -> list[Event]:
        """Take one frame, or the preface; return what happened.

        Raises:
            h2.exceptions.ProtocolError: the connection has to end; the GOAWAY frame is framed.
        """
        framed = len(self._data_to_send)
        try:
            return self.receive_data(frame)
        except InvalidBodyLengthError as error:
            # A malformed message is the end of its stream only (RFC 9113 8.1.1).
            del self._data_to_send[framed:]
            stream_id = int.from_bytes(frame[5:FRAME_HEAD], "big") & _STREAM_ID
            self.acknowledge_received_data(len(frame) - FRAME_HEAD, stream_id)
            self.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
            reset = BodyLengthWrong(
                stream_id=stream_id, error_code=ErrorCodes.PROTOCOL_ERROR, remote_reset=False
            )
            reset.why = f"{error.expected_length} bytes announced, {error.actual_length} received"
            return [reset]

    def limit_table(self) -> None:
        """Keep the table of sent fields small, whatever the peer allows: it is searched often."""
        if self.encoder.header_table_size > TABLE_SIZE:
            self.encoder.header_table_size = TABLE_SIZE


class ServerCodec(_Codec):
    """What is spoken with a client.

    Args:
        max_head_size: Largest head of a request, in bytes.
    """

    def __init__(self, max_head_size: int) -> None:
        super().__init__(
            {
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_head_size,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            },
            client=False,
        )
        self.decoder.max_header_list_size = SPACE_FOR_ERRORS * max_head_size

    @property
    def open_inbound_streams(self) -> int:
        """Pretend that there are none: one too many costs its stream, not the connection."""
        _ = super().open_inbound_streams  # forgets those that are closed
        return 0


class TargetCodec(_Codec):
    """What is spoken with a target.

    Args:
        max_head_size: Largest head of a response, in bytes.
    """

    def __init__(self, max_head_size: int) -> None:
        super().__init__(
            {
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: TARGET_WINDOW,
                SettingCodes.MAX_FRAME_SIZE: MAX_TARGET_FRAME,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_head_size,
            },
            client=True,
        )
        self.max_inbound_frame_size = MAX_TARGET_FRAME
        self.decoder.max_header_list_size = max_head_size
