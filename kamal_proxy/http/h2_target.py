"""One HTTP/2 connection to a target, which carries many requests.

Two tasks belong to it, one that reads and one that sends what the socket did not take at once; both
end with it. The h2 library has the protocol, this module the limit to what a target may send
without being asked for it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError as H2Error
from h2.exceptions import StreamClosedError

from kamal_proxy.http import h2_fields
from kamal_proxy.http.codec import HeaderPairs, ProtocolError
from kamal_proxy.http.h2_codec import (
    MAX_STREAMS,
    MAX_TARGET_FRAME,
    TARGET_WINDOW,
    BodyLengthWrong,
    TargetCodec,
)
from kamal_proxy.http.h2_frames import FrameError, FrameReader, GoAway
from kamal_proxy.http.h2_outbox import Outbox
from kamal_proxy.http.h2_upstream import H2Upstream
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.sockets import SocketStream

PING_TIMEOUT = 1.0  # seconds
# Frames that carry nothing, as far as they come faster than what they are about, and this many in a
# second besides.
MAX_IDLE_FRAMES = 1000
_IDLE_FRAMES_PER_SECOND = 10
_IDLE_FRAMES_PER_USEFUL = 4
_MANY_FRAMES = 64
_PING = b"kp-alive"


class H2TargetConnection:
    """One connection to a target. :meth:`run` must run while it is used.

    Args:
        stream: The connection; closed when :meth:`run` ends, or before.
        max_head_size: Largest head of a response, in bytes.

    Attributes:
        ready: Set once the target has said how it wants to be spoken to, or there is a failure.
        failure: Why nothing can be sent and received any more; empty while it can.
        draining: Whether it takes no further requests.
        heard_at: When the target last sent something, on Trio's clock.
        idle_since: When the last request ended.
    """

    def __init__(self, stream: SocketStream, max_head_size: int) -> None:
        self._stream = stream
        self._h2 = TargetCodec(max_head_size)
        self._frames = FrameReader(MAX_TARGET_FRAME, max_head_size)
        self._users: set[H2Upstream] = set()
        self._opened: dict[int, H2Upstream] = {}
        self._changed = trio.lowlevel.ParkingLot()  # those that could not send
        self._outbox = Outbox(
            stream, self._changed.unpark_all, lambda: self.fail("the target reads nothing")
        )
        self._pong: trio.Event | None = None
        self._idle_frames = float(MAX_IDLE_FRAMES)  # that the target may still send
        self.ready = trio.Event()
        self.failure = ""
        self.draining = False
        self.heard_at = self.idle_since = trio.current_time()

    def __repr__(self) -> str:
        state = self.failure or ("draining" if self.draining else "open")
        return f"<H2TargetConnection {state} requests={len(self._users)}>"

    @property
    def room(self) -> int:
        """How many more requests it takes now."""
        if self.failure or self.draining:
            return 0
        return min(self._h2.remote_settings.max_concurrent_streams, MAX_STREAMS) - len(self._users)

    @property
    def in_use(self) -> int:
        """How many requests are on it."""
        return len(self._users)

    @property
    def offers_tunnels(self) -> bool:
        """Whether the target takes other protocols on its streams (RFC 8441 3)."""
        return bool(self._h2.remote_settings.enable_connect_protocol)

    def take(self, *, reused: bool, opened: bool = False) -> H2Upstream:
        """Begin a request, for which there must be room; it must be released.

        Args:
            reused: Whether it is not certain that the connection is still alive.
            opened: Whether it was opened for this request.
        """
        upstream = H2Upstream(self, reused=reused, opened=opened)
        self._users.add(upstream)
        return upstream

    async def run(self) -> None:
        """Speak with the target until the connection is over; it is closed then."""
        try:
            self._stream.keep_alive()
            self._h2.initiate_connection()
            room = MAX_STREAMS * TARGET_WINDOW - self._h2.inbound_flow_control_window
            self._h2.increment_flow_control_window(room)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                self.flush()
                await self._read()
                nursery.cancel_scope.cancel(reason="the connection is over")
        except Exception as error:  # a bug must cost one connection, not the deployment
            self.fail(f"internal error: {error!r}")
        finally:
            self.fail("the proxy has closed the connection")

    async def answers(self) -> bool:
        """Return whether the target answers a PING at once: whether it is still there."""
        if self.failure:
            return False
        if self._pong is None:
            self._pong = trio.Event()
            self._h2.ping(_PING)
            self.flush()
        with trio.move_on_after(PING_TIMEOUT):
            await self._pong.wait()
            return not self.failure
        return False

    def close(self) -> None:
        """Say goodbye and close; requests that are still on it are cut."""
        if not self.failure:
            self._end(ErrorCodes.NO_ERROR)
            self.fail("the proxy has closed the connection")

    def fail(self, reason: str) -> None:
        """Close at once, and let all that wait know why; the first reason is the one."""
        if self.failure:
            return
        self.failure = reason
        self._stream.close()
        for upstream in tuple(self._users):
            upstream.lose(reason)
        self.ready.set()
        if self._pong is not None:
            self._pong.set()
        self._changed.unpark_all()

    # Reading

    async def _read(self) -> None:
        try:
            while not self.failure:
                data = await self._stream.receive(READ_SIZE)
                if not data:
                    self.fail("closed by the target")
                elif self._receive(data) > _MANY_FRAMES:
                    # Tiny frames cost far more than their bytes: let the others have their turn.
                    await trio.lowlevel.checkpoint()
        except trio.BrokenResourceError as error:
            self.fail(str(error))
        except trio.ClosedResourceError:
            assert self.failure, "only a failure closes it"
        except FrameError as error:
            self._end(ErrorCodes.PROTOCOL_ERROR)
            self.fail(f"not HTTP/2 as it should be: {error}")
        except H2Error as error:
            self.flush()  # the library has told the target
            self.fail(f"not HTTP/2 as it should be: {error}")

    def _receive(self, data: bytes) -> int:
        """Take what was received; return how many frames that was."""
        now = trio.current_time()
        passed, self.heard_at = now - self.heard_at, now
        before = self._frames.carrying, self._frames.idle
        for piece in self._frames.feed(data):
            if isinstance(piece, GoAway):
                self._go_away(piece)
                continue
            for event in self._h2.receive_frame(piece):
                handle = _HANDLERS.get(type(event))
                if handle is not None:
                    handle(self, event)
        useful, idle = self._frames.carrying - before[0], self._frames.idle - before[1]
        self._allow(useful, passed)
        self._idle_frames -= idle
        if self._idle_frames < 0:
            self._end(ErrorCodes.ENHANCE_YOUR_CALM)
            self.fail("too many frames that carry nothing")
        self.flush()
        return useful + idle

    def _allow(self, useful: int, seconds: float = 0.0) -> None:
        """Let the target send more frames that carry nothing: they are about those that do."""
        more = useful * _IDLE_FRAMES_PER_USEFUL + seconds * _IDLE_FRAMES_PER_SECOND
        self._idle_frames = min(MAX_IDLE_FRAMES, self._idle_frames + more)

    def _go_away(self, goaway: GoAway) -> None:
        self.draining = True
        code = _name(goaway.error_code)
        debug = goaway.debug[:200].decode("ascii", "replace")
        why = f"GOAWAY {code} {debug}".rstrip()
        for stream_id, upstream in tuple(self._opened.items()):
            if stream_id > goaway.last_stream_id:
                del self._opened[stream_id]
                upstream.lose(f"not processed by the target: {why}", refused=True)
        if not self._users:
            self.close()

    def _settings(self, _: Event) -> None:
        self._h2.limit_table()
        self.ready.set()
        self._changed.unpark_all()

    def _window(self, _: Event) -> None:
        self._changed.unpark_all()

    def _pinged(self, event: Event) -> None:
        assert isinstance(event, PingAckReceived)
        if self._pong is not None and event.ping_data == _PING:
            self._pong.set()
            self._pong = None

    def _head(self, event: Event) -> None:
        assert isinstance(event, ResponseReceived | InformationalResponseReceived)
        upstream = self._of(event.stream_id)
        if upstream is None:
            return
        ended = isinstance(event, ResponseReceived) and event.stream_ended is not None
        try:
            upstream.add_head(h2_fields.response_head(list(event.headers), ended=ended))
        except ProtocolError as error:
            self._malformed(event.stream_id, upstream, error)

    def _trailers(self, event: Event) -> None:
        assert isinstance(event, TrailersReceived)
        upstream = self._of(event.stream_id)
        if upstream is None:
            return
        try:
            upstream.trailers = h2_fields.trailers(list(event.headers))
        except ProtocolError as error:
            self._malformed(event.stream_id, upstream, error)

    def _malformed(self, stream_id: int, upstream: H2Upstream, error: ProtocolError) -> None:
        self.reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
        upstream.lose(f"malformed response: {error}")

    def _data(self, event: Event) -> None:
        assert isinstance(event, DataReceived)
        upstream = self._of(event.stream_id)
        if upstream is None or not event.data:
            self.acknowledge(event.stream_id, event.flow_controlled_length)
        elif upstream.may_have_body:
            upstream.add_body(event.data, event.flow_controlled_length)
        else:
            self.acknowledge(event.stream_id, event.flow_controlled_length)
            error = ProtocolError("a body where there is none")
            self._malformed(event.stream_id, upstream, error)

    def _ended(self, event: Event) -> None:
        assert isinstance(event, StreamEnded)
        upstream = self._of(event.stream_id)
        if upstream is not None:
            upstream.end_response()
            self._changed.unpark_all()

    def _reset(self, event: Event) -> None:
        assert isinstance(event, StreamReset)
        upstream = self._opened.pop(event.stream_id, None)
        if upstream is not None:
            refused = event.error_code == ErrorCodes.REFUSED_STREAM
            by = "target" if event.remote_reset else "proxy"
            upstream.lose(f"reset by the {by}: {_name(event.error_code)}", refused=refused)
            self._changed.unpark_all()

    def _wrong_length(self, event: Event) -> None:
        assert isinstance(event, BodyLengthWrong)
        upstream = self._opened.pop(event.stream_id, None)
        if upstream is not None:
            upstream.lose(f"malformed response: {event.why}")
            self._changed.unpark_all()

    def _uninvited(self, _: Event) -> None:
        raise FrameError("a stream that the target began")

    def _of(self, stream_id: int) -> H2Upstream | None:
        return self._opened.get(stream_id)

    # Sending

    def open(self, upstream: H2Upstream, fields: HeaderPairs, *, end: bool) -> int:
        """Send the head of a request; return the number of its stream, or 0 if it takes none."""
        if self.draining or self.is_deaf:
            return 0
        try:
            stream_id = self._h2.get_next_available_stream_id()
        except H2Error:  # there are no more numbers
            self.draining = True
            return 0
        try:
            self._h2.send_headers(stream_id, fields, end_stream=end)
        except H2Error:  # the target has lowered its limit
            return 0
        self._allow(1)
        self._opened[stream_id] = upstream
        return stream_id

    def send_body(self, stream_id: int, data: memoryview, *, end: bool) -> int:
        """Send what the target's windows take of a body; return how many bytes that was."""
        window = self._h2.local_flow_control_window(stream_id)
        size = min(len(data), window, self._h2.max_outbound_frame_size)
        if size <= 0 or self.is_congested:
            return 0
        self._h2.send_data(stream_id, data[:size], end_stream=end and size == len(data))
        self._allow(1 + size // 1024)  # some targets open their windows in small steps
        return size

    def send_end(self, stream_id: int, trailers: HeaderPairs) -> None:
        """Send the end of a body."""
        if trailers:
            fields = [(name.lower(), value) for name, value in trailers]
            self._h2.send_headers(stream_id, fields, end_stream=True)
        else:
            self._h2.end_stream(stream_id)

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Let the target send as much as was taken of what it had sent."""
        if size and not self.failure:
            self._h2.acknowledge_received_data(size, stream_id)

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        """Tell the target that a stream is of no use any more."""
        self._opened.pop(stream_id, None)
        if not self.failure:
            with contextlib.suppress(StreamClosedError):
                self._h2.reset_stream(stream_id, code)
            # Counting makes the library forget the stream. Of one that it still knows, it takes a
            # 1xx response that was under way for an error of the whole connection.
            _ = self._h2.open_outbound_streams

    def leave(self, upstream: H2Upstream, stream_id: int) -> None:
        """Forget a request that has ended."""
        self._users.discard(upstream)
        self._opened.pop(stream_id, None)
        if not self._users:
            self.idle_since = trio.current_time()
            if self.draining:
                self.close()

    @property
    def is_congested(self) -> bool:
        """Whether enough waits to be sent."""
        return self._outbox.is_congested

    def takes(self, stream_id: int) -> bool:
        """Return whether something can be sent on a stream, or a new one opened (0)."""
        if self.is_congested:
            return False
        return not stream_id or self._h2.local_flow_control_window(stream_id) > 0

    async def wait_changed(self) -> None:
        """Wait until something that could not be sent is worth another try."""
        await self._changed.park()

    @property
    def is_deaf(self) -> bool:
        """Whether the target takes nothing any more."""
        return self._outbox.is_deaf or bool(self.failure)

    def flush(self) -> None:
        """Send what is framed; what the socket does not take now is sent by a task."""
        data = self._h2.data_to_send()
        if data and not self.failure:
            self._outbox.send(data)

    async def _write(self) -> None:
        try:
            await self._outbox.run()
        except trio.ClosedResourceError:
            assert self.failure, "only a failure closes it"

    def _end(self, code: ErrorCodes) -> None:
        """Tell the target that this is the end, if it takes that at once."""
        self._h2.close_connection(code)
        self.flush()


_HANDLERS: dict[type[Event], Callable[[H2TargetConnection, Event], None]] = {
    BodyLengthWrong: H2TargetConnection._wrong_length,
    DataReceived: H2TargetConnection._data,
    InformationalResponseReceived: H2TargetConnection._head,
    PingAckReceived: H2TargetConnection._pinged,
    RemoteSettingsChanged: H2TargetConnection._settings,
    RequestReceived: H2TargetConnection._uninvited,
    ResponseReceived: H2TargetConnection._head,
    StreamEnded: H2TargetConnection._ended,
    StreamReset: H2TargetConnection._reset,
    TrailersReceived: H2TargetConnection._trailers,
    WindowUpdated: H2TargetConnection._window,
}


def _name(code: ErrorCodes | int) -> str:
    """Return the name of an error code, or its number."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return str(int(code))
