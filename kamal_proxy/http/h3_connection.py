"""One HTTP/3 connection of a client: many requests at once, each on a stream of its own.

The endpoint's task tells it what has arrived, and it tells the streams; each is served in its own
task. What they send lies with aioquic until the client has acknowledged it, within the limits here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import trio
from aioquic.quic.events import (
    PingAcknowledged,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)

from kamal_proxy.http import h3_codec
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.h2_guard import CANCELLED, reset_budget
from kamal_proxy.http.h3_codec import H3Error, RequestReader, Section, ServerCodec, goaway
from kamal_proxy.http.h3_stream import H3Stream
from kamal_proxy.http.multiplexed_connection import MultiplexedConnection
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.stream_heads import MalformedError
from kamal_proxy.http.stream_intake import read_trailers

if TYPE_CHECKING:
    from aioquic.quic.events import QuicEvent

    from kamal_proxy.http.codec import HeaderPairs
    from kamal_proxy.http.h3_link import Link
    from kamal_proxy.http.server import HttpServer

#: Bytes of responses that are with aioquic, on their way or not acknowledged: of all together, but
#: of each at least the second.
MAX_OUTPUT = 1024 * 1024
_LEAST_OUTPUT = 32 * 1024

_WORK_PER_ANSWER = 5e-3  # seconds; see ``h3_link.WORK_BURST``
_MAX_STREAM_ID = 2**62 - 4
_LAST_CALL_PING = 1  # aioquic's number for a PING
_ASKING_PING = 2
_END_TIMEOUT = 5.0  # seconds for what is left to be done at the end
_ASK_INTERVAL = 15.0  # seconds between two questions whether a client is still there
_SPACE_FOR_ERRORS = 2  # a head that is too large is answered if it is not larger by this factor


class H3Connection(MultiplexedConnection[H3Stream]):
    """One HTTP/3 connection of a client: a ``h3_link.Application``.

    Args:
        link: The QUIC connection; its handshake is complete.
        server: Whose connection it is.

    Attributes:
        quic: aioquic's connection.
        codec: What reads and writes HTTP/3 beside the request streams.
    """

    VERSION: ClassVar[bytes] = b"3.0"

    def __init__(self, link: Link, server: HttpServer) -> None:
        # The address when it connected; clients are not asked for certificates over QUIC.
        super().__init__(server, link.path.address, None)
        self._link = link
        self.quic = link.quic
        limit = server.options.max_head_size
        self.codec = ServerCodec(limit)
        self._max_block = _SPACE_FOR_ERRORS * limit
        self._readers: dict[int, RequestReader] = {}  # of requests that have not arrived whole
        self._opened: dict[int, float] = {}  # when; of those whose head has not
        self._next_id = 0  # the lowest that was never used
        self._resets = reset_budget(trio.current_time())
        self._asked = trio.current_time()
        self._waiting: list[H3Stream] = []  # for the nursery
        self._lost = trio.Event()
        self._control_id = self.quic.get_next_available_stream_id(is_unidirectional=True)
        self.quic.send_stream_data(self._control_id, self.codec.preface())

    async def run(self) -> None:
        """Serve the connection until it ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for stream in self._waiting:
                nursery.start_soon(self._serve, stream)
            self._waiting.clear()
            try:
                while not self._lost.is_set():
                    with trio.move_on_at(self._next_duty()):
                        await self._lost.wait()
                    self._do_duties()
            finally:
                self._nursery = None
            # Whoever is still served is served in vain, and is logged.
            nursery.cancel_scope.deadline = trio.current_time() + _END_TIMEOUT

    def close(self, code: int = h3_codec.NO_ERROR, words: str = "") -> None:
        """Close the connection, whatever is on it."""
        self._link.close(code, words)

    def _next_duty(self) -> float:
        """Return when to look after the connection, on Trio's clock."""
        options = self.server.options
        # What begins meanwhile is looked after no later than that.
        when = trio.current_time() + min(self._ask_interval, options.head_timeout)
        if self._opened:
            when = min(when, next(iter(self._opened.values())) + options.head_timeout)
        if self._streams:
            return min(when, self._asked + self._ask_interval)
        return min(when, self._idle_since + self._patience)

    @property
    def _ask_interval(self) -> float:
        return min(_ASK_INTERVAL, self.server.options.idle_timeout / 3)

    def _do_duties(self) -> None:
        now = trio.current_time()
        while self._opened:
            stream_id, opened = next(iter(self._opened.items()))
            if now < opened + self.server.options.head_timeout:
                break
            self._forget_reader(stream_id)
            self._reset(stream_id, h3_codec.REQUEST_INCOMPLETE)
            self._log_headless(Reason.HEAD_TIMEOUT.status, "the head did not come whole")
        if self._streams and now >= self._asked + self._ask_interval:
            # A silent client is found out by QUIC's own timeout, if it has to answer something.
            self._asked = now
            self.quic.send_ping(_ASKING_PING)
            self.touch()
        if not (self._streams or self._opened) and now >= self._idle_since + self._patience:
            self.close()

    # A h3_link.Application

    def handle(self, event: QuicEvent) -> None:
        """Take an event of the QUIC connection."""
        try:
            if isinstance(event, StreamDataReceived):
                self._receive(event)
            elif isinstance(event, StreamReset):
                self._receive_reset(event.stream_id)
            elif isinstance(event, StopSendingReceived):
                self._receive_stop(event.stream_id)
            elif isinstance(event, PingAcknowledged) and event.uid == _LAST_CALL_PING:
                self._ponged.set()
        except H3Error as error:
            self.server.log.debug(
                "HTTP/3 connection closed", client_addr=self.address[0], error=str(error)
            )
            self.close(error.code, str(error))

    def progress(self) -> None:
        """Take note that the client may have acknowledged something, or raised a limit."""
        self._link.count_output(sum(stream.progress() for stream in list(self._streams.values())))

    def lost(self) -> None:
        """Take note that the connection has ended."""
        self._refusing = True
        self._readers.clear()
        self._opened.clear()
        for stream in list(self._streams.values()):
            stream.client_gone()
        self._ponged.set()
        self._lost.set()

    # What arrives

    def _receive(self, event: StreamDataReceived) -> None:
        stream_id, data = event.stream_id, event.data
        if stream_id & 2:
            self.give_credit(stream_id, len(data))
            if not self.codec.receive(stream_id, data, ended=event.end_stream):
                self.quic.refuse(stream_id, h3_codec.STREAM_CREATION_ERROR)
            return
        reader = self._readers.get(stream_id)
        if reader is None:
            if stream_id < self._next_id:
                self.give_credit(stream_id, len(data))  # of a request that is over
                return
            reader = self._open(stream_id)
        parts = reader.feed(data)
        if event.end_stream:
            reader.end()
        self.give_credit(stream_id, len(data) - sum(len(p) for p in parts if isinstance(p, bytes)))
        for count, part in enumerate(parts, 1):
            self._receive_part(stream_id, part, last=event.end_stream and count == len(parts))
        if event.end_stream:
            had_head = reader.has_head
            self._forget_reader(stream_id)
            stream = self._streams.get(stream_id)
            if stream is not None and not stream.incoming.ended:
                stream.receive_end()
            elif not had_head:
                self._reset(stream_id, h3_codec.REQUEST_INCOMPLETE)

    def _open(self, stream_id: int) -> RequestReader:
        reader = self._readers[stream_id] = RequestReader(self._max_block)
        # Those between were opened, too, and their data is still to come (RFC 9000 2.1).
        now = trio.current_time()
        for lower in range(self._next_id, stream_id, 4):
            self._readers[lower] = RequestReader(self._max_block)
            self._opened[lower] = now
        self._opened[stream_id] = now
        self._next_id = stream_id + 4
        return reader

    def _forget_reader(self, stream_id: int) -> None:
        self._readers.pop(stream_id, None)
        self._opened.pop(stream_id, None)

    def _receive_part(self, stream_id: int, part: Section | bytes, *, last: bool) -> None:
        stream = self._streams.get(stream_id)
        if isinstance(part, bytes):
            if stream is None:
                self.give_credit(stream_id, len(part))
            else:
                stream.receive_data(part)
        elif stream_id in self._opened:
            del self._opened[stream_id]
            self._receive_head(stream_id, part, ended=last)
        elif stream is not None and not stream.gone:
            self._receive_trailers(stream, part)

    def _receive_head(self, stream_id: int, section: Section, *, ended: bool) -> None:
        server = self.server
        self._served = True
        self._idle_since = trio.current_time()
        if section.block is None:
            self._refuse_head(stream_id, ProtocolError("request head too large", 431), ended=ended)
            return
        fields = self.codec.decode(stream_id, section.block)
        if self._refusing:
            self._reset(stream_id, h3_codec.REQUEST_REJECTED)
            return
        if server.streams >= server.max_streams:
            self._reset(stream_id, h3_codec.REQUEST_REJECTED)
            return
        head = self._read_head(stream_id, fields, ended=ended)
        if head is None:
            return
        self._readers[stream_id].tunnelled = bool(head.protocol)
        stream = self._streams[stream_id] = H3Stream(self, stream_id, head, ended=ended)
        server.streams += 1
        if self._nursery is None:
            self._waiting.append(stream)
        else:
            self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: H3Stream) -> None:
        try:
            try:
                await stream.run()
            finally:
                self.server.streams -= 1
                if stream.complete:
                    self._resets.give(1.0)
                    self._link.earn(_WORK_PER_ANSWER)
            await stream.linger()
        finally:
            del self._streams[stream.stream_id]
            if not self._streams:
                self._idle_since = trio.current_time()
                self._end_if_done()

    def _receive_trailers(self, stream: H3Stream, section: Section) -> None:
        if section.block is None:
            stream.malformed()
            return
        fields = self.codec.decode(stream.stream_id, section.block)
        try:
            trailers = read_trailers(self.server, fields)
        except MalformedError:
            stream.malformed()
        else:
            stream.receive_trailers(trailers)

    def _receive_reset(self, stream_id: int) -> None:
        """Stop to serve a request of which nothing more will come."""
        self.quic.settle_reset(stream_id)
        if stream_id & 2:
            self.codec.reset(stream_id)
            return
        if stream_id >= self._next_id:
            self._open(stream_id)
        unserved = stream_id in self._opened
        self._forget_reader(stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:
            if not (stream.complete or stream.gone):
                self._reset(stream_id, h3_codec.REQUEST_CANCELLED)
                stream.client_gone()
                self.count_reset()
        elif unserved:
            self._reset(stream_id, h3_codec.REQUEST_CANCELLED)
            self.count_reset()

    def _receive_stop(self, stream_id: int) -> None:
        """Stop to serve a request whose response is not wanted; aioquic has reset the stream."""
        if stream_id & 1:
            if stream_id == self._control_id:
                raise H3Error(h3_codec.CLOSED_CRITICAL_STREAM, "the control stream is not wanted")
            return
        stream = self._streams.get(stream_id)
        if stream is not None:
            known = stream.complete or stream.gone
            stream.client_gone()
            if known:
                return
        elif stream_id >= self._next_id:
            self._open(stream_id)
        if stream is not None or stream_id in self._opened:
            self._forget_reader(stream_id)
            self.quic.refuse(stream_id, h3_codec.REQUEST_CANCELLED)
            self.touch()
            self.count_reset()

    def count_reset(self) -> None:
        """Take note that a request was cancelled before it was answered; too many end all."""
        if not self._resets.take(1.0, trio.current_time()):
            words = "too many requests were cancelled"
            if not self.quic.is_ending:
                self.server.log.warning(
                    "HTTP/3 connection closed", client_addr=self.address[0], error=words
                )
                self.server.metrics.flood("HTTP/3", CANCELLED)
            self.close(h3_codec.EXCESSIVE_LOAD, words)

    def _reset_malformed(self, stream_id: int) -> None:
        self._reset(stream_id, h3_codec.MESSAGE_ERROR)

    def _answer_refused(self, stream_id: int, fields: HeaderPairs, *, ended: bool) -> None:
        self.quic.send_stream_data(
            stream_id, self.codec.section(stream_id, fields), end_stream=True
        )
        if not ended:
            self.quic.refuse(stream_id, h3_codec.NO_ERROR)
        self.touch()

    # What is sent

    def touch(self) -> None:
        """Have what was given to ``quic`` sent, soon."""
        self._link.touch()

    def give_credit(self, stream_id: int, size: int) -> None:
        """Let the client send so many more bytes of a stream."""
        if size:
            self.quic.give_credit(stream_id, size)
            self._link.touch()

    def room(self, stream_id: int) -> int:
        """Return how many more bytes of a response may be given to aioquic."""
        share = max(_LEAST_OUTPUT, MAX_OUTPUT // max(1, len(self._streams)))
        if self._link.is_crowded:
            share = _LEAST_OUTPUT // 4
        return share - self.quic.unacknowledged(stream_id)

    def _say(self, data: bytes) -> None:
        self.quic.send_stream_data(self._control_id, data)
        self.touch()

    def _reset(self, stream_id: int, code: int) -> None:
        self._forget_reader(stream_id)
        self.quic.reset_stream(stream_id, code)
        self.quic.refuse(stream_id, code)
        self.touch()

    # The end

    def _ask_to_leave(self) -> None:
        self._say(goaway(_MAX_STREAM_ID))
        self.quic.send_ping(_LAST_CALL_PING)

    def _tell_last(self) -> None:
        self._say(goaway(self._next_id))

    def _end(self) -> None:
        self._link.send_now()  # closing would leave out what is not sent yet
        self.close()
