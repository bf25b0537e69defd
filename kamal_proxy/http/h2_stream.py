"""One stream of an HTTP/2 connection of a client: the framing of one request's response.

What the request is, and what becomes of it, is in ``multiplexed``; windows are the h2 library's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from kamal_proxy.http.h2_guard import MAX_FRAME
from kamal_proxy.http.multiplexed import Ending, MultiplexedStream

if TYPE_CHECKING:
    from kamal_proxy.http.codec import RequestHead
    from kamal_proxy.http.h2_connection import H2Connection

ERROR_CODES = {
    Ending.DONE: ErrorCodes.NO_ERROR,  # RFC 9113 8.1
    Ending.CANCELLED: ErrorCodes.CANCEL,
    Ending.FAILED: ErrorCodes.INTERNAL_ERROR,
    Ending.MALFORMED: ErrorCodes.PROTOCOL_ERROR,
    Ending.REFUSED: ErrorCodes.REFUSED_STREAM,
}


class H2Stream(MultiplexedStream):
    """A request on an HTTP/2 connection.

    Args:
        connection: The connection.
        stream_id: Its number there.
        head: The head of the request.
        ended: Whether it has no body.

    Attributes:
        stream_id: Its number.
        in_queue: Whether it is in the connection's queue of those that may send.
    """

    __slots__ = ("_connection", "in_queue", "stream_id")

    def __init__(
        self, connection: H2Connection, stream_id: int, head: RequestHead, *, ended: bool
    ) -> None:
        super().__init__(connection, head, ended=ended)
        self._connection = connection
        self.stream_id = stream_id
        self.in_queue = False

    def submit(self) -> None:
        """Send what is queued, as far as the windows and the socket allow it."""
        self._connection.submit(self)

    def consumed(self, count: int) -> None:
        """Open the windows again for what was taken."""
        self._connection.consumed(self.stream_id, count)

    def abort(self, ending: Ending) -> None:
        """End the stream with RST_STREAM unless the client did."""
        if not self.gone:
            self._connection.reset(self.stream_id, ERROR_CODES[ending])
        if ending is Ending.MALFORMED:
            self._connection.count_reset()

    def keep_alive(self) -> None:
        """Find out when a silent client has vanished."""
        self._connection.stream.keep_alive()

    def frame_one(self) -> bool:
        """Frame the next of what is queued; return whether anything could be."""
        codec, out = self._connection.codec, self.out
        if out.size and not out.heads:
            limit = min(codec.local_flow_control_window(self.stream_id), MAX_FRAME)
            if limit <= 0:
                return False
            data = out.take_body(limit)
            codec.send_data(self.stream_id, data, end_stream=out.is_done)
            self._connection.guard.sent_data(limit, cut=out.size > 0)
        elif out:
            fields = out.take_fields()
            codec.send_headers(self.stream_id, fields, end_stream=out.is_done)
        else:
            codec.end_stream(self.stream_id)
        self.complete = out.is_done
        out.tell()
        return True
