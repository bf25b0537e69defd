"""One connection to something that the proxy itself serves: the admin API, the metrics.

Reads whole requests and sends answers, with limits for both. Proxied requests are no business of
it: they are ``connection``'s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.http import pages
from kamal_proxy.http.codec import (
    HeaderPairs,
    ProtocolError,
    RequestHead,
    ServerCodec,
    whole_response,
)
from kamal_proxy.sockets import drop

if TYPE_CHECKING:
    from kamal_proxy.sockets import SocketStream

MAX_HEAD = 16 * 1024
TEXT = b"text/plain; charset=utf-8"


@attrs.frozen
class Request:
    """A whole request: ``path`` is without the query."""

    head: RequestHead
    body: bytes

    @property
    def method(self) -> str:
        """Its method."""
        return self.head.method.decode("ascii")

    @property
    def path(self) -> str:
        """Its path, as it came."""
        return self.head.target.decode("ascii").partition("?")[0]


class Endpoint:
    """The proxy's side of such a connection.

    All methods raise ``trio.TooSlowError`` if the client takes too long, and
    ``trio.BrokenResourceError`` if it leaves in the middle.

    Args:
        stream: The connection; the caller closes it.
        max_body: Largest body of a request, in bytes.
        patience: Seconds for a request to arrive once it has begun, and for each part of an answer
            to be taken.
    """

    def __init__(self, stream: SocketStream, *, max_body: int, patience: float) -> None:
        self._stream = stream
        self._max_body = max_body
        self._patience = patience
        self._codec = ServerCodec(MAX_HEAD)
        self._is_head = False

    async def receive(self, idle: float = math.inf) -> Request | None:
        """Wait for the next request; None if the client closed instead.

        Args:
            idle: Seconds until it must have begun.

        Raises:
            ProtocolError: it is not HTTP, or its body is too large (413).
        """
        head = await self._receive_head(idle)
        if head is None:
            return None
        self._is_head = head.method == b"HEAD"
        with trio.fail_after(self._patience):
            return Request(head, await self._receive_body(head))

    async def _receive_head(self, idle: float) -> RequestHead | None:
        deadline = trio.current_time() + idle
        began = False
        while (head := self._codec.next_request()) is None:
            if self._codec.has_partial_head and not began:
                began = True
                deadline = trio.current_time() + self._patience
            with trio.fail_at(deadline):
                data = await self._stream.receive()
            if not data:
                return None
            self._codec.receive_head_data(data)
        return head

    async def _receive_body(self, head: RequestHead) -> bytes:
        parts: list[bytes] = []
        size = 0
        while not self._codec.received:
            if max(size, head.length) > self._max_body:
                raise ProtocolError(f"a request body can have at most {self._max_body} bytes", 413)
            part = self._codec.next_body()
            if part is not None:
                parts.append(part)
                size += len(part)
            elif not self._codec.received:
                data = await self._stream.receive()
                if not data:
                    raise trio.BrokenResourceError("the client left in the middle of a request")
                self._codec.receive_data(data)
        return b"".join(parts)

    async def respond(self, status: int, headers: HeaderPairs, body: bytes) -> None:
        """Send a whole answer."""
        if status != 204:
            headers = [*headers, (b"Content-Length", b"%d" % len(body))]
        data = self._codec.response(status, pages.reason(status).encode(), headers)
        if body and not self._is_head:
            data += self._codec.body(body)
        await self._send(data + self._codec.end())

    async def begin(self, headers: HeaderPairs) -> None:
        """Begin an answer with status 200 whose length is not known."""
        await self._send(self._codec.response(200, b"OK", headers))

    async def send_part(self, data: bytes) -> None:
        """Send a part of its body."""
        await self._send(self._codec.body(data))

    async def end(self) -> None:
        """End it."""
        await self._send(self._codec.end())

    async def refuse(self, error: ProtocolError) -> None:
        """Answer what could not be read; the connection can't be used again."""
        reason = pages.reason(error.status)
        headers = [(b"Content-Type", TEXT)]
        await self._send(whole_response(error.status, reason, headers, reason.encode() + b"\n"))
        await self.drop()

    async def drop(self) -> None:
        """End the connection after an answer; what the client still sends is not used."""
        await drop(self._stream)

    async def next_cycle(self) -> bool:
        """Get ready for the next request; False if the connection can't be used again."""
        if self._codec.next_cycle():
            return True
        await self.drop()
        return False

    async def _send(self, data: bytes) -> None:
        with trio.fail_after(self._patience):
            await self._stream.send(data)
