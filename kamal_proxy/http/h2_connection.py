"""One HTTP/2 connection of a client: many requests at once, each on a stream of its own.

One task reads and tells the streams what has arrived; each stream is served in its own task. What
they send is framed in turns, one frame each, as far as the windows and the output buffer allow, and
is written by ``h2_output``. Nothing is read while much is waiting to be written, so that a client
that reads nothing gets nothing done.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import trio
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import DenialOfServiceError
from h2.exceptions import ProtocolError as Http2Error

from kamal_proxy.http.h2_codec import CONNECTION_WINDOW, MAX_STREAMS, SPACE_FOR_ERRORS, ServerCodec
from kamal_proxy.http.h2_guard import HEAD, FloodError, FrameError, FrameGuard
from kamal_proxy.http.h2_output import Output
from kamal_proxy.http.h2_stream import H2Stream
from kamal_proxy.http.h2_turns import Turns
from kamal_proxy.http.multiplexed_connection import MultiplexedConnection
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.stream_heads import MalformedError
from kamal_proxy.http.stream_intake import read_trailers
from kamal_proxy.sockets import READ_SIZE, drop

if TYPE_CHECKING:
    from kamal_proxy.http.codec import HeaderPairs
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address
    from kamal_proxy.sockets import SocketStream

_MAX_OUTPUT = 64 * 1024  # bytes of responses that wait for the socket
# With them come answers to what the client sends; when they are many, it is not read any further.
_TOO_MUCH_OUTPUT = 2 * _MAX_OUTPUT
_LITTLE = 8 * 1024  # bytes that may wait for a moment
_FEW = 2  # requests at once that are hardly answered at the same moment
_FRAMES_PER_TURN = 64  # until the other tasks have theirs
_MAX_STREAM_ID = 2**31 - 1
_LAST_CALL_PING = b"lastcall"
_LINGER = 5.0  # seconds after which a client has read the last response
_END_TIMEOUT = 5.0  # seconds for what is left to be said at the end


class H2Connection(MultiplexedConnection[H2Stream]):
    """One HTTP/2 connection of a client.

    Args:
        stream: Its stream; the preface comes next on it.
        address: The client's.
        server: Whose connection it is.

    Attributes:
        stream: Its stream.
        codec: What reads and writes HTTP/2 on it.
        guard: What limits what the client may send.
        output: What waits to be written.
    """

    __slots__ = (
        "_block",
        "_reading",
        "_turns",
        "codec",
        "guard",
        "output",
        "stream",
    )

    VERSION: ClassVar[bytes] = b"2.0"

    def __init__(self, stream: SocketStream, address: Address, server: HttpServer) -> None:
        super().__init__(server, address, stream.client_ca)
        self.stream = stream
        limit = server.options.max_head_size
        self.codec = ServerCodec(limit)
        self.guard = FrameGuard(SPACE_FOR_ERRORS * limit, trio.current_time())
        self._reading = trio.CancelScope()
        self._block = 0  # which of the heads in several frames the deadline is for
        self._turns = Turns(self.codec)
        self.output = Output(stream, server.options.stall_timeout, self._lose, self.pump)

    async def run(self) -> None:
        """Serve the connection until it ends. The caller closes the stream."""
        async with trio.open_nursery() as writer:
            writer.start_soon(self.output.run)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._serve_streams()
                nursery.cancel_scope.deadline = trio.current_time() + _END_TIMEOUT
                self._nursery = None
            with trio.move_on_after(_END_TIMEOUT):
                await self.output.wait_written()
            writer.cancel_scope.cancel(reason="everything is said")
        if not self.output.broken and not self.output.size and self._must_linger():
            await drop(self.stream)
        self.output.forget()

    def _must_linger(self) -> bool:
        """Return whether the client may still be reading a response, or be told of an error.

        Whatever it sends after the end, if only WINDOW_UPDATE frames, would make the kernel reset
        the connection, and so drop what it has not read.
        """
        recent = trio.current_time() - self._idle_since < _LINGER
        return recent or bool(self._streams) or not self.stream.is_quiet_nowait()

    async def _serve_streams(self) -> None:
        codec = self.codec
        codec.initiate_connection()
        codec.increment_flow_control_window(CONNECTION_WINDOW - codec.inbound_flow_control_window)
        self.flush()
        try:
            await self._read()
        except (FloodError, FrameError, Http2Error) as error:
            self._fail(error)
        except trio.BrokenResourceError:
            self.output.give_up()
        if self._reading.cancelled_caught and not self._refusing and not self.output.broken:
            if self.guard.in_block:
                self._log_headless(Reason.HEAD_TIMEOUT.status, "the head did not come whole")
            self._close(ErrorCodes.NO_ERROR)
        # Whoever is still served is served in vain.
        for stream in list(self._streams.values()):
            stream.client_gone()

    # What arrives

    async def _read(self) -> None:
        guard = self.guard
        with self._reading:
            self._move_deadline()
            while not self.output.broken:
                if self.output.size > _TOO_MUCH_OUTPUT:
                    await self.output.wait_written(_MAX_OUTPUT)
                    continue
                data = await self.stream.receive(READ_SIZE)
                if not data:
                    return
                guard.feed(data)
                for count, frame in enumerate(guard.frames(trio.current_time()), 1):
                    for event in self.codec.receive_frame(frame):
                        self._handle(event)
                    self.output.add(self.codec.data_to_send())
                    if count % _FRAMES_PER_TURN == 0:
                        # Tiny frames cost far more than their bytes.
                        self.flush()
                        await trio.lowlevel.checkpoint()
                self._move_deadline()
                self.pump()

    def _move_deadline(self) -> None:
        """Limit how long the client may say nothing, where it owes something."""
        if self.guard.in_block:
            if self._block != self.guard.blocks:
                self._block = self.guard.blocks
                head_timeout = self.server.options.head_timeout
                self._reading.deadline = trio.current_time() + head_timeout
        elif self._streams:
            self._reading.deadline = math.inf
        else:
            self._reading.deadline = self._idle_since + self._patience

    def _handle(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._receive_data(event)
        elif isinstance(event, RequestReceived):
            self._receive_request(event)
        elif isinstance(event, StreamEnded):
            if (stream := self._streams.get(event.stream_id or 0)) is not None:
                stream.receive_end()
        elif isinstance(event, TrailersReceived):
            self._receive_trailers(event)
        elif isinstance(event, StreamReset):
            self._receive_reset(event)
        elif isinstance(event, WindowUpdated):
            if not event.stream_id:
                self._turns.window_opened()
            elif (stream := self._streams.get(event.stream_id)) is not None:
                self._turns.add(stream)
        elif isinstance(event, RemoteSettingsChanged):
            self.codec.limit_table()
            for each in self._streams.values():
                self._turns.add(each)  # its window may have grown
        elif isinstance(event, PingAckReceived) and event.ping_data == _LAST_CALL_PING:
            self._ponged.set()

    def _receive_request(self, event: RequestReceived) -> None:
        stream_id, server = event.stream_id, self.server
        assert stream_id is not None
        ended = event.stream_ended is not None
        self._served = True
        self._idle_since = trio.current_time()
        if self._refusing:
            self.reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        if self._is_full():
            self.reset(stream_id, ErrorCodes.REFUSED_STREAM)
            self.count_reset()
            return
        if server.streams >= server.max_streams:
            self.reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        head = self._read_head(stream_id, _fields(event.headers), ended=ended)
        if head is None:
            return
        stream = H2Stream(self, stream_id, head, ended=ended)
        self._streams[stream_id] = stream
        server.streams += 1
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, stream)

    def _is_full(self) -> bool:
        """Return whether the client has as many requests open as it may have.

        It does not count those that have ended for it, and that only their tasks have not left.
        """
        if len(self._streams) < MAX_STREAMS:
            return False
        open_now = sum(not (each.complete or each.gone) for each in self._streams.values())
        return open_now >= MAX_STREAMS or len(self._streams) >= 2 * MAX_STREAMS

    async def _serve(self, stream: H2Stream) -> None:
        try:
            await stream.run()
        finally:
            self.server.streams -= 1
            del self._streams[stream.stream_id]
            self._turns.forget(stream)
            if stream.complete:
                self.guard.answered()
            if not self._streams:
                self._idle_since = trio.current_time()
                self._end_if_done()
                if not self._reading.cancel_called:
                    self._move_deadline()

    def _receive_data(self, event: DataReceived) -> None:
        assert event.stream_id is not None
        stream = self._streams.get(event.stream_id)
        wanted = stream is not None and not stream.gone
        padding = event.flow_controlled_length - (len(event.data) if wanted else 0)
        if padding:
            self.codec.acknowledge_received_data(padding, event.stream_id)
        if stream is not None and wanted:
            stream.receive_data(event.data)

    def _receive_trailers(self, event: TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id or 0)
        if stream is None:
            return
        try:
            trailers = read_trailers(self.server, _fields(event.headers))
        except MalformedError:
            self.reset(stream.stream_id, ErrorCodes.PROTOCOL_ERROR)
            self.count_reset()
            stream.client_gone()
        else:
            stream.receive_trailers(trailers)

    def _receive_reset(self, event: StreamReset) -> None:
        """Stop to serve a request: the client has cancelled it, or made the library do so."""
        stream = self._streams.get(event.stream_id or 0)
        if stream is not None and not stream.complete:
            stream.client_gone()
            self.count_reset()

    def count_reset(self) -> None:
        """Note that a request ended without its answer, and that it was the client's doing.

        Raises:
            FloodError: that happens too often.
        """
        self.guard.reset(trio.current_time())

    def _reset_malformed(self, stream_id: int) -> None:
        self.reset(stream_id, ErrorCodes.PROTOCOL_ERROR)

    def _answer_refused(self, stream_id: int, fields: HeaderPairs, *, ended: bool) -> None:
        self.codec.send_headers(stream_id, fields, end_stream=True)
        if not ended:
            self.reset(stream_id, ErrorCodes.NO_ERROR)

    # What is sent

    def submit(self, stream: H2Stream) -> None:
        """Let a stream send what it has queued, when it is its turn."""
        self._turns.add(stream)
        self.pump()

    def consumed(self, stream_id: int, count: int) -> None:
        """Let the client send so many more bytes of body."""
        self.codec.acknowledge_received_data(count, stream_id)
        self.flush()

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        """End a stream, unless it has ended."""
        stream = self.codec.streams.get(stream_id)
        if stream is not None and not stream.closed:
            self.codec.reset_stream(stream_id, code)
            self.flush()

    def pump(self) -> None:
        """Frame what the streams have queued, a frame of each in turn, and write it."""
        turns, output = self._turns, self.output
        output.add(self.codec.data_to_send())
        while True:
            while turns and output.size < _MAX_OUTPUT:
                if turns.frame_one():
                    output.add(self.codec.data_to_send())
            if not turns and output.size < _LITTLE and len(self._streams) > _FEW:
                output.write_soon()  # the others will say something, too
                return
            output.write_nowait()
            if not turns or output.is_stuck or output.broken:
                return

    def flush(self) -> None:
        """Write what the library wants to say."""
        self.output.add(self.codec.data_to_send())
        self.output.write_nowait()

    # The end

    def _lose(self, reason: Reason) -> None:
        """End everything: the connection is broken, or as good as that."""
        for stream in list(self._streams.values()):
            stream.lose(reason)
        self._reading.cancel(reason="the connection is broken")

    def _fail(self, error: Exception) -> None:
        """Tell the client what it has done, and end."""
        flood = ""
        if isinstance(error, FloodError):
            flood = error.kind
            self._close(ErrorCodes.ENHANCE_YOUR_CALM)
        elif isinstance(error, FrameError):
            self._close(ErrorCodes(error.code))
        else:
            if isinstance(error, DenialOfServiceError):
                flood = HEAD  # one that unpacks to far more than it took
            self.flush()  # the library has said it
        if flood:
            self.server.metrics.flood("HTTP/2", flood)
        log = self.server.log.warning if flood else self.server.log.debug
        log("HTTP/2 connection closed", client_addr=self.address[0], error=str(error))

    def _close(self, code: ErrorCodes) -> None:
        self._refusing = True
        self.codec.close_connection(code)
        self.flush()

    def _ask_to_leave(self) -> None:
        self.codec.close_connection(last_stream_id=_MAX_STREAM_ID)
        self.codec.ping(_LAST_CALL_PING)
        self.flush()

    def _tell_last(self) -> None:
        self._close(ErrorCodes.NO_ERROR)

    def _end(self) -> None:
        self._ponged.set()  # nothing can be under way any more that matters
        self._reading.cancel(reason="there is nothing more to do")


def _fields(headers: Any) -> HeaderPairs:
    """Return received fields as what they are: the library's types allow text as well."""
    return headers or []
