"""Two connections whose bytes pass both ways after a switch of protocols (RFC 9110 7.8).

Of a WebSocket, frames are followed, not read: a drain ends it with a Close frame 1001 where one
frame has ended and the next has not begun, which compression and fragments do not mind. Any other
protocol is passed on blindly and lives until the deadline of the drain.

Between two plain sockets the bytes pass in compiled code (``passage``), and a direction's task
sleeps until there is something to decide.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from typing import TYPE_CHECKING, Protocol

import trio

from kamal_proxy._fastpath import FrameTracker
from kamal_proxy.http.passage import open_passage
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.websocket import GOING_AWAY, close_frame, masked_close_frame
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from kamal_proxy.deployment import Drain

# Seconds for the other side's Close frame after ours, and for its end of the connection after the
# last frame. RFC 6455 7.1.1 leaves the time open.
CLOSE_TIMEOUT = 5.0
# Seconds before the deadline of a drain when a target is told whose client has not answered.
_LAST_WORD = 1.0


class TunnelEnd(Protocol):
    """What a tunnel asks of either side: of :class:`kamal_proxy.sockets.SocketStream`, or a stream.

    All methods raise ``trio.BrokenResourceError`` when the peer or the network broke it.
    """

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` at the end."""

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what is taken now and return how many bytes that was."""

    async def wait_writable(self) -> None:
        """Wait until a send that took too little is worth another try."""

    async def wait_readable(self) -> bool:
        """Wait until something has happened that a read, or ``connect_error_nowait``, can tell."""

    def shutdown_write(self) -> None:
        """Send the end; reading goes on."""

    def keep_alive(self) -> None:
        """Find out when a silent peer has vanished, and break the connection."""

    def connect_error_nowait(self) -> int:
        """Return an errno once the peer is gone altogether, else 0."""


class _Direction:
    """What comes from one side and goes to the other."""

    __slots__ = (
        "_frame",
        "_last",
        "_over",
        "_passage",
        "_said",
        "_sending",
        "_sent",
        "_sink",
        "_stall_timeout",
        "source",
        "tracker",
    )

    def __init__(
        self,
        source: TunnelEnd,
        sink: TunnelEnd,
        stall_timeout: float,
        *,
        framed: bool,
        timed: bool,
    ) -> None:
        self.source = source
        self._sink = sink
        self._stall_timeout = stall_timeout
        self.tracker = FrameTracker() if framed else None
        clock = trio.current_time if timed else None
        self._passage = open_passage(source, sink, self.tracker, clock)
        self._frame = b""  # to be sent at the next boundary
        self._over = False  # it was: nothing may follow it (RFC 6455 5.5.1)
        self._said = trio.Event()
        self._sending = False
        self._sent = 0  # besides what has passed by itself
        self._last = trio.current_time()

    @property
    def sent(self) -> int:
        """Bytes that the sink has taken."""
        return self._sent + (self._passage.sent if self._passage else 0)

    @property
    def last(self) -> float:
        """When it carried something, on Trio's clock; only known for one that is ``timed``."""
        return max(self._last, self._passage.last if self._passage else 0.0)

    async def run(self, data: bytes) -> None:
        """Pass everything on, beginning with ``data``, until an end.

        It ends with the source's end, which the sink is told, or when the sink is gone: then the
        other direction still reads what that one had sent, and meets its end as well.

        Raises:
            trio.BrokenResourceError: the source broke its connection.
            trio.TooSlowError: the sink took nothing for too long.
        """
        try:
            while True:
                if data:
                    self._last = trio.current_time()
                    try:
                        await self._pass_on(data)
                    except trio.BrokenResourceError:
                        return
                data = await (self._passage or self.source).receive(READ_SIZE)
                if not data:
                    with contextlib.suppress(trio.BrokenResourceError):
                        self._sink.shutdown_write()
                    return
        finally:
            if self._passage is not None:
                self._passage.stop()

    async def say_last(self, frame: bytes) -> None:
        """Send a frame at the next boundary, and nothing after it.

        Returns once it is sent, or need not be because the source closes by itself.

        Raises:
            trio.BrokenResourceError: the sink broke its connection.
            trio.TooSlowError: the sink took nothing for too long.
        """
        assert self.tracker is not None
        if self.tracker.closing:
            return
        self._frame = frame
        if self._passage is not None:
            self._passage.stop()
        if not self._sending:
            await self._say_if_possible()
        await self._said.wait()

    async def _pass_on(self, data: bytes) -> None:
        tracker = self.tracker
        if tracker is not None:
            if self._over:
                return
            if self._frame:
                data = data[: tracker.scan(data, stop_at_boundary=True)]
            else:
                tracker.scan(data)
        self._sending = True
        await self._send(data)
        self._sending = False
        if self._frame:
            await self._say_if_possible()

    async def _say_if_possible(self) -> None:
        tracker = self.tracker
        assert tracker is not None
        if not tracker.at_boundary:
            return
        self._over = True
        await self._send(self._frame)
        self._said.set()

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            count = self._sink.send_nowait(rest)
            self._sent += count
            rest = rest[count:]
            if not rest:
                return
            # Anew each time: who takes a little at a time has not stalled.
            with trio.fail_after(self._stall_timeout):
                await self._sink.wait_writable()


class Tunnel:
    """A client and a target that speak another protocol than HTTP with each other.

    Args:
        client: The client's end.
        target: The target's.
        websocket: Whether that protocol is WebSocket.
        stall_timeout: Seconds that a write may wait for either side.
        idle_timeout: Seconds without a byte in either direction after which a WebSocket is closed;
            0 means never.

    Attributes:
        reason: Why the proxy ended it, if it did.
        clean: Whether both sides were told and have closed.
    """

    __slots__ = (
        "_client",
        "_from_client",
        "_idle_timeout",
        "_nursery",
        "_target",
        "_to_client",
        "clean",
        "reason",
    )

    def __init__(
        self,
        client: TunnelEnd,
        target: TunnelEnd,
        *,
        websocket: bool,
        stall_timeout: float,
        idle_timeout: float,
    ) -> None:
        self._client = client
        self._target = target
        self._idle_timeout = idle_timeout if websocket else 0.0
        timed = self._idle_timeout > 0
        self._from_client = _Direction(client, target, stall_timeout, framed=websocket, timed=timed)
        self._to_client = _Direction(target, client, stall_timeout, framed=websocket, timed=timed)
        self._nursery: trio.Nursery | None = None
        self.reason: Reason | None = None
        self.clean = False

    @property
    def sent(self) -> int:
        """Bytes that the client was sent."""
        return self._to_client.sent

    async def run(self, from_client: bytes, from_target: bytes, drain: Drain | None) -> None:
        """Pass bytes on until both sides have closed, or one has broken its connection.

        Args:
            from_client: What the client has sent already.
            from_target: What the target has sent already.
            drain: The drain that has begun meanwhile, if one has.
        """
        for stream in (self._client, self._target):
            stream.keep_alive()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                if self._idle_timeout:
                    nursery.start_soon(self._watch_idle)
                if drain is not None:
                    self.begin_drain(drain)
                async with trio.open_nursery() as directions:
                    directions.start_soon(self._run, self._from_client, from_client)
                    directions.start_soon(self._run, self._to_client, from_target)
                self.clean = True
            finally:
                # A nursery that is about to close takes no more tasks.
                self._nursery = None
            nursery.cancel_scope.cancel(reason="both sides have closed")

    async def _run(self, direction: _Direction, data: bytes) -> None:
        try:
            await direction.run(data)
        except trio.BrokenResourceError:
            self._end()
        except trio.TooSlowError:
            stalled = direction is self._to_client
            self.reason = self.reason or (
                Reason.CLIENT_STALLED if stalled else Reason.TARGET_TIMEOUT
            )
            self._end()
        else:
            assert self._nursery is not None
            frames = self._from_client.tracker
            if frames is not None and frames.closed and direction is self._to_client:
                # The closing handshake is over, and it is the target's to close first (RFC 6455
                # 7.1.1). Some clients never do.
                self.clean = True
                self._end()
                return
            self._nursery.start_soon(self._end_with, direction.source)
            # Half a connection is no WebSocket (RFC 6455 7.1.1); other protocols may go on.
            if frames is not None:
                self._nursery.start_soon(self._end_after, CLOSE_TIMEOUT)

    def _end(self) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel(reason="a side is gone")

    async def _end_after(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._end()

    async def _end_with(self, stream: TunnelEnd) -> None:
        """End when a side that has sent its last byte is gone altogether.

        Nobody reads from it any more, and after its end a read would not tell.
        """
        while not stream.connect_error_nowait():
            await stream.wait_readable()
        self._end()

    def begin_drain(self, drain: Drain) -> None:
        """Close a WebSocket at a random moment before the deadline of a drain.

        All at once, the clients would come back all at once as well. A drain that is called off
        before the moment closes nothing.
        """
        if self._nursery is None or self._from_client.tracker is None:
            return
        window = drain.deadline - trio.current_time()
        if window < math.inf:
            # Time is left for the closing handshake.
            latest = max(0.0, window / 2, window - CLOSE_TIMEOUT - _LAST_WORD)
            moment = random.uniform(0, latest)  # noqa: S311
            self._nursery.start_soon(self._close_in, moment, drain)

    async def _close_in(self, seconds: float, drain: Drain) -> None:
        await trio.sleep(seconds)
        if not drain.called_off:
            await self._close(Reason.DRAINED, drain.deadline)

    async def _watch_idle(self) -> None:
        while True:
            last = max(self._from_client.last, self._to_client.last)
            if trio.current_time() >= last + self._idle_timeout:
                break
            await trio.sleep_until(last + self._idle_timeout)
        await self._close(Reason.WEBSOCKET_IDLE, trio.current_time() + 2 * CLOSE_TIMEOUT)

    async def _close(self, reason: Reason, deadline: float) -> None:
        """Say goodbye to the client; its own Close frame says it to the target.

        Args:
            reason: Why.
            deadline: When the connections are to be cut, on Trio's clock.
        """
        if self.reason is not None:
            return
        self.reason = reason
        last_word = max(0.0, min(_LAST_WORD, (deadline - trio.current_time()) / 2))
        # Whom it was for may be gone, or deaf.
        with contextlib.suppress(trio.BrokenResourceError, trio.TooSlowError):
            with trio.move_on_at(deadline - last_word):
                await self._to_client.say_last(close_frame(GOING_AWAY))
                await trio.sleep(CLOSE_TIMEOUT)
            # The client has not answered. The target shall hear of it all the same.
            with trio.move_on_after(last_word / 2):
                await self._from_client.say_last(masked_close_frame(GOING_AWAY, os.urandom(4)))
        self._end()
