"""One request on one upstream connection: sent, answered, both bodies relayed.

Runs in the task that serves the client, under its one cancel scope, whose deadline moves
with each wait and carries the reason that its passing would have. Only a request whose body is
still being sent when the target may already answer gets a second task.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.bodies import Body, SpillFailedError
from kamal_proxy.http.codec import HeaderPairs, ProtocolError, ResponseHead
from kamal_proxy.http.headers import is_streamed, response_headers
from kamal_proxy.http.reasons import (
    BODY_ERRORS,
    ClientGone,
    Reason,
    Refusal,
    StaleConnection,
    TargetFailed,
    Unprocessed,
    body_refusal,
)
from kamal_proxy.http.upload import Given, Upload, framed
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.http.begun import Begun
    from kamal_proxy.http.client_side import ClientSide, Downstream
    from kamal_proxy.http.target_side import Upstream
    from kamal_proxy.target_options import TargetOptions

_MAX_INFORMATIONAL = 100  # 1xx responses before the final one


class Relay:
    """One attempt to have a request answered.

    Args:
        client: Where the request came from.
        downstream: The client's side of the exchange.
        upstream: The request to the target.
        options: How requests travel to the service's targets.
        response_timeout: Seconds that the target has for the head of its response.
        adapt: Makes the header fields that the client gets.
        spare: Called when the target has done its part and a buffered response has still to be
            sent.
        upgrade: The protocol that the request wants to switch to, if any.
        given: What an earlier target was given of a body that is relayed as it comes, and where
            that is remembered of this one; None if this target can't refuse the request.
        patient: Whether the client may be silent in the middle of the body.
    """

    __slots__ = (
        "_adapt",
        "_answered",
        "_client",
        "_downstream",
        "_given",
        "_options",
        "_patient",
        "_response_timeout",
        "_spare",
        "_upgrade",
        "_upload",
        "_upstream",
    )

    def __init__(
        self,
        client: ClientSide,
        downstream: Downstream,
        upstream: Upstream,
        options: TargetOptions,
        response_timeout: float,
        adapt: Callable[[ResponseHead], HeaderPairs],
        spare: Callable[[], None],
        upgrade: bytes,
        given: Given | None = None,
        *,
        patient: bool = False,
    ) -> None:
        self._client = client
        self._downstream = downstream
        self._upstream = upstream
        self._options = options
        self._response_timeout = response_timeout
        self._adapt = adapt
        self._spare = spare
        self._upgrade = upgrade
        self._given = given
        self._patient = patient
        self._answered = False  # the head of the final response is here
        self._upload: Upload | None = None

    async def run(
        self, request: bytes, body: Body | None, begun: Begun | None = None
    ) -> ResponseHead | None:
        """Send the request and relay the response.

        Args:
            request: Its head, framed.
            body: Its body, if that was read whole; otherwise it is relayed as it comes.
            begun: What somebody else has done of this already: the request has arrived whole.

        Returns:
            The head of a 101 response, after which the caller has to go on; otherwise None.

        Raises:
            StaleConnection: a connection used before was closed before it answered anything.
            Unprocessed: the target has done nothing with the request.
            TargetFailed: the target broke the connection or the protocol.
            Refusal: a limit was passed, or the client broke the framing of its body.
            ClientGone: the client closed or broke its connection.
        """
        if body is None:
            # What has arrived of the body travels along; most requests are whole now.
            data = self._downstream.take_body_nowait()
            if self._given is not None:
                self._given.add(data)
                data = bytes(self._given.data) or data
            request += framed(self._downstream, self._upstream, data)
            complete = self._downstream.received
        else:
            # More than the target's kernel takes at once must not keep its answer waiting.
            whole = body.whole_nowait() if body.size <= READ_SIZE else None
            complete = whole is not None
            if whole is not None:
                request += framed(self._downstream, self._upstream, whole)
        broken = False
        if begun is not None:
            request = begun.unsent
        try:
            await self._send_head(request)
        except trio.BrokenResourceError:
            broken = True  # but it may have answered before it closed
        if begun is not None and begun.upstream is not None and (begun.response or begun.received):
            begun.upstream.codec.receive_data(begun.response + begun.received)
        if complete or broken:
            return await self._download(begun)
        return await self._relay_both_ways(body)

    # The request

    async def _send_head(self, request: bytes) -> None:
        """Send the head and what goes with it; it is never waited for without a limit."""
        if not math.isinf(self._response_timeout):
            await self._upstream.send(request)
            return
        stall = self._client.server.options.stall_timeout
        self._client.move_deadline(stall, Reason.TARGET_TIMEOUT)
        await self._upstream.send(request)
        self._client.move_deadline(math.inf, Reason.IDLE)

    async def _relay_both_ways(self, body: Body | None) -> ResponseHead | None:
        """Send the rest of the request body while the response may already be coming."""
        head: ResponseHead | None = None
        failure: Exception | None = None
        complete = False
        upload = self._upload = Upload(
            self._client,
            self._downstream,
            self._upstream,
            body,
            self._response_timeout,
            self._given,
            patient=self._patient,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.run, self._uploaded, nursery.cancel_scope)
            try:
                head = await self._download()
                complete = True
            except (
                TargetFailed,
                StaleConnection,
                Unprocessed,
                ClientGone,
                Refusal,
                ProtocolError,
            ) as error:
                # A nursery would wrap it in a group.
                failure = error
            nursery.cancel_scope.cancel(reason="the response is complete")
        if upload.failure is not None and not complete:
            raise upload.failure
        if failure is not None:
            raise failure
        return head

    def _uploaded(self) -> None:
        """Note that the target has got all that it will get: now it owes the response."""
        if not self._answered:
            self._client.move_deadline(self._response_timeout, Reason.TARGET_TIMEOUT)
        self._downstream.watch_from_now(self._upstream)

    # The response

    async def _download(self, begun: Begun | None = None) -> ResponseHead | None:
        """Relay the response, or return the head of one that switches protocols."""
        head = await self._response_head()
        if head.status == 101:
            return head
        headers = self._adapt(head)
        codec = self._upstream.codec
        first = b""
        if self._options.buffer_responses and not is_streamed(head):
            first = self._taken_body()
            limit = self._options.max_response_body_size
            # A response to HEAD has a length, but no body.
            if limit and (len(first) if codec.received else head.length) > limit:
                raise Refusal(Reason.RESPONSE_TOO_LARGE)
            if not codec.received:
                await self._relay_buffered(head, headers, first)
                return None
        downstream = self._downstream
        parts = [self._begin(head, headers)]
        if begun is not None and begun.response:
            parts.clear()
            downstream.sent = begun.sent
        if first:
            parts.append(downstream.body(first))
        try:
            while True:
                if data := codec.take_body():
                    parts.append(downstream.body(data))
                if codec.received:
                    break
                if parts:
                    await downstream.send(b"".join(parts))
                    parts.clear()
                await self._receive_body()
        except (ProtocolError, trio.BrokenResourceError) as error:
            if isinstance(error, ProtocolError) and error.body:
                parts.append(downstream.body(error.body))
            if parts:
                await downstream.send(b"".join(parts))  # what did come is the client's
            raise TargetFailed(f"response cut short: {error}") from error
        parts.append(downstream.end(codec.trailers))
        await downstream.send(b"".join(parts))
        return None

    def _begin(self, head: ResponseHead, headers: HeaderPairs) -> bytes:
        try:
            return self._downstream.begin(head.status, head.reason, headers)
        except ProtocolError as error:
            raise TargetFailed(f"malformed response: {error}") from error

    async def _receive_body(self) -> None:
        await self._receive()
        if self._upstream.codec.is_costly:
            await trio.lowlevel.checkpoint()

    async def _receive(self) -> None:
        # While a body is still coming, it is its reader that notices the client's leaving.
        watching = self._upload is None or not self._upload.reads_client
        await self._downstream.receive_from(self._upstream, watching=watching)

    def _taken_body(self) -> bytes:
        try:
            return self._upstream.codec.take_body()
        except ProtocolError as error:
            raise TargetFailed(f"response cut short: {error}") from error

    async def _relay_buffered(self, head: ResponseHead, headers: HeaderPairs, first: bytes) -> None:
        """Read the response whole, let the target go, then send it to the client."""
        # The timeout is for the head; a buffered body may take its time as any other.
        self._client.move_deadline(math.inf, Reason.IDLE)
        options = self._options
        body = self._client.server.spill.open(
            options.max_memory_buffer_size, options.max_response_body_size
        )
        codec = self._upstream.codec
        try:
            try:
                await body.write(first)
                while not codec.received:
                    await self._receive_body()
                    await body.write(codec.take_body())
                await body.finish()
            except (ProtocolError, trio.BrokenResourceError) as error:
                raise TargetFailed(f"response cut short: {error}") from error
            except BODY_ERRORS as error:
                raise body_refusal(
                    self._client.server.log, error, Reason.RESPONSE_TOO_LARGE
                ) from error
            if self._upload is None or not self._upload.running:
                self._spare()
            await self._send_buffered(self._begin(head, headers), body)
        finally:
            body.close()

    async def _send_buffered(self, begin: bytes, body: Body) -> None:
        downstream = self._downstream
        await downstream.send(begin)
        try:
            async for part in body.parts():
                await downstream.send(downstream.body(part))
        except SpillFailedError as error:
            raise body_refusal(self._client.server.log, error, Reason.SPILL_FAILED) from error
        await downstream.send(downstream.end())

    async def _response_head(self) -> ResponseHead:
        """Wait for the final response or a switch of protocols, passing on 1xx responses."""
        codec = self._upstream.codec
        informational = 0
        try:
            while True:
                head = codec.next_response()
                if head is None:
                    await self._receive()
                elif head.status >= 200:
                    self._answered = True
                    if self._given is not None:
                        self._given.forget()
                    return head
                elif head.status == 101:
                    self._check_switch(head)
                    return head
                elif (informational := informational + 1) > _MAX_INFORMATIONAL:
                    raise TargetFailed(f"more than {_MAX_INFORMATIONAL} 1xx responses")
                else:
                    told = await self._downstream.inform(
                        head.status, head.reason, response_headers(head)
                    )
                    if told and self._upload is not None:
                        self._upload.await_client()
        except (ProtocolError, trio.BrokenResourceError) as error:
            if self._upstream.refused:
                raise Unprocessed(str(error)) from error
            if self._upstream.reused and not codec.heard:
                raise StaleConnection(str(error)) from error
            raise TargetFailed(str(error)) from error

    def _check_switch(self, head: ResponseHead) -> None:
        switched = head.get(b"upgrade")
        offered = [offer.strip().lower() for offer in self._upgrade.split(b",")]
        if not switched or switched.lower() not in offered:
            raise TargetFailed(
                f"switched to {switched.decode('latin-1')!r}, "
                f"asked for was {self._upgrade.decode('latin-1')!r}"
            )
        if self._upload is not None and self._upload.running:
            raise TargetFailed("switched protocols before the request was complete")
