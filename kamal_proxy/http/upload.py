"""The rest of a request's body on its way to a target that may already be answering.

A task of its own, under a scope of its own: what the response waits for is the deadline of the
client's side, and the two must not touch each other's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.bodies import SpillFailedError
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.reasons import ClientGone, Reason, Refusal, body_refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.http.bodies import Body
    from kamal_proxy.http.client_side import ClientSide, Downstream
    from kamal_proxy.http.target_side import Upstream

MAX_GIVEN = 64 * 1024  # bytes of a request's body that are kept until its target has answered


class Given:
    """What targets were given of a body that is passed on as it comes.

    Attributes:
        data: All of it, for a target that is asked after one that has refused the request.
        lost: Whether it was too much to remember: no other target can be asked.
    """

    __slots__ = ("data", "lost")

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = False

    def add(self, data: bytes) -> None:
        """Remember a part."""
        if self.lost:
            return
        self.data += data
        if len(self.data) > MAX_GIVEN:
            self.lost = True
            self.data.clear()

    def forget(self) -> None:
        """Be done with remembering: the target has answered."""
        self.lost = True
        self.data.clear()


class Upload:
    """The body of one request, from what is not sent yet.

    Args:
        client: Where the request came from.
        downstream: The client's side of the exchange.
        upstream: The connection to the target.
        body: The body, if it was read whole; otherwise it is passed on as it comes.
        response_timeout: Seconds that the target may take nothing before its response begins.
        given: Remembers what the target is given, in case it refuses the request.
        patient: Whether the client may be silent for as long as it likes: both sides speak when
            they have something to say.

    Attributes:
        running: Whether something is still to be sent.
        failure: Why the request can't be completed.
    """

    __slots__ = (
        "_body",
        "_client",
        "_downstream",
        "_given",
        "_patient",
        "_reason",
        "_response_timeout",
        "_scope",
        "_stall_timeout",
        "_upstream",
        "failure",
        "running",
    )

    def __init__(
        self,
        client: ClientSide,
        downstream: Downstream,
        upstream: Upstream,
        body: Body | None,
        response_timeout: float,
        given: Given | None = None,
        *,
        patient: bool = False,
    ) -> None:
        self._client = client
        self._downstream = downstream
        self._upstream = upstream
        self._body = body
        self._response_timeout = response_timeout
        self._given = given
        self._patient = patient
        self._stall_timeout = client.server.options.stall_timeout
        self._scope = trio.CancelScope()
        self._reason = Reason.BODY_TIMEOUT
        self.running = True
        self.failure: Refusal | ClientGone | None = None

    @property
    def reads_client(self) -> bool:
        """Whether it is this task that would notice the client's leaving."""
        return self.running and self._body is None

    async def run(self, done: Callable[[], None], whole: trio.CancelScope) -> None:
        """Send the body.

        Args:
            done: Called once all is sent, or the target takes no more.
            whole: Cancelled if the request can't be completed.
        """
        with self._scope:
            try:
                if self._body is None:
                    await self._send_arriving()
                else:
                    await self._send_buffered(self._body)
            except ProtocolError as error:
                self.failure = Refusal(Reason.BAD_REQUEST, status=error.status)
            except SpillFailedError as error:
                log = self._client.server.log
                self.failure = body_refusal(log, error, Reason.SPILL_FAILED)
            except ClientGone as error:
                self.failure = error
        if self._scope.cancelled_caught:
            self.failure = Refusal(self._reason)
        self.running = False
        if self.failure is None:
            done()
        else:
            whole.cancel(reason="the request can't be completed")

    def await_client(self) -> None:
        """Note that the client owes the next part."""
        patience = math.inf if self._patient else self._stall_timeout
        self._limit(patience, Reason.BODY_TIMEOUT)

    async def _send_arriving(self) -> None:
        downstream = self._downstream
        while True:
            data = downstream.take_body()
            if self._given is not None:
                self._given.add(data)
            if (data or downstream.received) and not await self._send(data):
                return
            if downstream.received:
                return
            if downstream.awaits_continue:
                self._scope.deadline = math.inf  # it is the target's turn, or the client's in time
            else:
                self.await_client()
            await downstream.receive_body()

    async def _send_buffered(self, body: Body) -> None:
        async for part in body.parts():
            if not await self._send(part, last=False):
                return
        await self._send(b"")

    async def _send(self, data: bytes, *, last: bool = True) -> bool:
        """Send a part to the target; return whether it still listens."""
        # Also for what comes without a wait: the limit of an earlier one must not still hold.
        self._await_target()
        try:
            # Nothing may wait between framing and sending: see UpstreamConnection.send.
            part = framed(self._downstream, self._upstream, data, last=last)
            await self._upstream.send(part, self._await_target)
        except trio.BrokenResourceError:
            return False  # its response may still come
        return True

    def _await_target(self) -> None:
        """Note that the target has to take something: anew each time, for a slow one goes on."""
        begun = self._downstream.response is not None or math.isinf(self._response_timeout)
        patience = self._stall_timeout if begun else self._response_timeout
        self._limit(patience, Reason.TARGET_TIMEOUT)

    def _limit(self, seconds: float, reason: Reason) -> None:
        # Until all is sent, the target need not answer, however long that takes as a whole.
        self._client.move_deadline(math.inf, Reason.IDLE)
        self._scope.deadline = trio.current_time() + seconds
        self._reason = reason


def framed(downstream: Downstream, upstream: Upstream, data: bytes, *, last: bool = True) -> bytes:
    """Frame a part of a request's body for a target.

    Args:
        downstream: The client's side, which knows whether the request has arrived whole.
        upstream: The connection to the target.
        data: The part.
        last: Whether nothing comes after it if the request has arrived whole.
    """
    codec = upstream.codec
    part = codec.body(data) if data else b""
    if last and downstream.received:
        part += codec.end(downstream.trailers)
    return part
