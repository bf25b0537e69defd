"""One request stream of an HTTP/3 connection: its body as it comes, and the response's frames.

What the request is, and what becomes of it, is in ``multiplexed``. aioquic keeps whatever it is
given until the client has acknowledged it, so that it is given no more than a little at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http import h3_codec
from kamal_proxy.http.h3_codec import data_frame
from kamal_proxy.http.multiplexed import Ending, MultiplexedStream

if TYPE_CHECKING:
    from kamal_proxy.http.codec import RequestHead
    from kamal_proxy.http.h3_connection import H3Connection

_MAX_FRAME = 64 * 1024

ERROR_CODES = {
    Ending.DONE: h3_codec.NO_ERROR,
    Ending.CANCELLED: h3_codec.REQUEST_CANCELLED,
    Ending.FAILED: h3_codec.INTERNAL_ERROR,
    Ending.MALFORMED: h3_codec.MESSAGE_ERROR,
    Ending.REFUSED: h3_codec.REQUEST_REJECTED,
}


class H3Stream(MultiplexedStream):
    """A request on an HTTP/3 connection.

    Args:
        connection: The connection.
        stream_id: Its number there.
        head: The head of the request.
        ended: Whether it has no body.

    Attributes:
        stream_id: Its number.
    """

    __slots__ = ("_connection", "_left", "_moved", "stream_id")

    def __init__(
        self, connection: H3Connection, stream_id: int, head: RequestHead, *, ended: bool
    ) -> None:
        super().__init__(connection, head, ended=ended)
        self._connection = connection
        self.stream_id = stream_id
        self._left = 0  # bytes with aioquic when it was last asked
        self._moved: trio.Event | None = None  # what waits for an acknowledgement

    # The request

    def receive_data(self, data: bytes) -> None:
        """Take a part of the request's body. What nobody wants is given back at once."""
        super().receive_data(data)
        if self.gone:
            self._connection.give_credit(self.stream_id, len(data))

    def malformed(self) -> None:
        """End a request that must not be read any further (RFC 9114 4.1.2)."""
        self.abort(Ending.MALFORMED)
        self.client_gone()

    def consumed(self, count: int) -> None:
        """Let the client send so many more bytes of body: they were taken."""
        self._connection.give_credit(self.stream_id, count)

    # The response

    def submit(self) -> None:
        """Send what is queued, as far as there is room for it."""
        if self._write():
            self._connection.touch()

    def _write(self) -> bool:
        """Give aioquic what there is room for; return whether that was something."""
        wrote, out = False, self.out
        while self.has_output and not self.gone:
            room = self._connection.room(self.stream_id)
            if room <= 0:
                break
            data = b""
            if out.size and not out.heads:
                data = data_frame(out.take_body(min(room, _MAX_FRAME)))
            elif out:
                data = self._connection.codec.section(self.stream_id, out.take_fields())
            # The end goes along with what comes last, and needs no packet of its own.
            self.complete = out.is_done
            self._connection.quic.send_stream_data(self.stream_id, data, end_stream=self.complete)
            wrote = True
        return wrote

    def progress(self) -> int:
        """Take note that the client may have acknowledged something.

        Returns:
            How many bytes it has not acknowledged.
        """
        left = self._connection.quic.unacknowledged(self.stream_id)
        moved = left < self._left
        self._left = left
        if self.has_output and self._write():
            self._connection.touch()
            self._left = self._connection.quic.unacknowledged(self.stream_id)
            moved = True
        if moved:
            self.out.tell()
        if self._moved is not None and (moved or self.is_delivered):
            self._moved.set()
            self._moved = None
        return self._left

    @property
    def is_delivered(self) -> bool:
        """Whether the client has acknowledged the response, or will not get it."""
        return self.gone or self._connection.quic.is_over(self.stream_id)

    async def linger(self) -> None:
        """Wait until the client has the response; reset the stream if it takes too long over it."""
        stall = self.server.options.stall_timeout
        with trio.CancelScope() as scope:
            while not self.is_delivered:
                scope.deadline = trio.current_time() + stall
                if self._moved is None:
                    self._moved = trio.Event()
                await self._moved.wait()
        if scope.cancelled_caught:
            self.abort(Ending.CANCELLED)

    def client_gone(self) -> None:
        """Take note that nobody wants the response any more."""
        super().client_gone()
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    def abort(self, ending: Ending) -> None:
        """End the stream, unless the client did: what it carries is neither sent nor read."""
        if self.gone:
            return
        if ending is Ending.MALFORMED:
            self._connection.count_reset()
        code = ERROR_CODES[ending]
        quic = self._connection.quic
        if ending is not Ending.DONE:
            quic.reset_stream(self.stream_id, code)
        quic.refuse(self.stream_id, code)
        self._connection.touch()

    def keep_alive(self) -> None:
        """Do nothing: the connection asks silent clients while it has requests."""
