"""Serves the metrics to Prometheus over HTTP/1.1, at ``/metrics``.

Knows nothing of what is counted. Anyone who reaches the port may read; it changes nothing, and what
a client sends is bounded in size and time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from kamal_proxy.listeners import Address
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.sockets import SocketStream

PATH = b"/metrics"
MAX_HEAD = 16 * 1024
MAX_BODY = 16 * 1024  # of a request: there is no use for any
REQUEST_TIMEOUT = 10.0  # seconds for a whole request to arrive, and for the answer to be taken
IDLE_TIMEOUT = 180.0  # seconds between two requests; longer than people let pass between scrapes

_TEXT = b"text/plain; charset=utf-8"


class MetricsServer:
    """Serves metrics.

    Args:
        metrics: What is served.
        log: Where bugs are reported.
    """

    def __init__(self, metrics: Metrics, log: Log) -> None:
        self._metrics = metrics
        self._log = log

    async def handle(self, stream: SocketStream, _: Address) -> None:
        """Serve one connection; never raises."""
        connection = _Connection(self._metrics, stream)
        try:
            patience = REQUEST_TIMEOUT
            while await connection.serve(patience):
                patience = IDLE_TIMEOUT
        except (trio.BrokenResourceError, trio.TooSlowError):
            return  # the client is gone
        except Exception as error:  # a bug must cost one scrape, not the proxy
            self._log.error("Metrics request failed", error=repr(error))


class _Connection:
    """One client and its requests."""

    def __init__(self, metrics: Metrics, stream: SocketStream) -> None:
        self._metrics = metrics
        self._stream = stream
        self._codec = ServerCodec(MAX_HEAD)

    async def serve(self, patience: float) -> bool:
        """Answer one request; return whether the connection can be used for another.

        Args:
            patience: Seconds until its first byte must have arrived.
        """
        try:
            head = await self._head(patience)
            if head is None:
                return False
            with trio.fail_after(REQUEST_TIMEOUT):
                await self._skip_body(head)
        except ProtocolError as error:
            reason = pages.reason(error.status)
            text = reason.encode() + b"\n"
            await self._send(whole_response(error.status, reason, [(b"Content-Type", _TEXT)], text))
            await drop(self._stream)
            return False
        await self._dispatch(head)
        return self._codec.next_cycle()

    async def _head(self, patience: float) -> RequestHead | None:
        deadline = trio.current_time() + patience
        began = False
        while (head := self._codec.next_request()) is None:
            if self._codec.has_partial_head and not began:
                began = True
                deadline = trio.current_time() + REQUEST_TIMEOUT
            with trio.fail_at(deadline):
                data = await self._stream.receive()
            if not data:
                return None
            self._codec.receive_head_data(data)
        return head

    async def _skip_body(self, head: RequestHead) -> None:
        size = 0
        while not self._codec.received:
            if max(size, head.length) > MAX_BODY:
                raise ProtocolError("a body that is of no use", 413)
            part = self._codec.next_body()
            if part is not None:
                size += len(part)
            elif not self._codec.received:
                data = await self._stream.receive()
                if not data:
                    raise trio.BrokenResourceError("the client left in the middle of a request")
                self._codec.receive_data(data)

    async def _dispatch(self, head: RequestHead) -> None:
        is_head = head.method == b"HEAD"
        if head.target.partition(b"?")[0] != PATH:
            text = b"Nothing is here; the metrics are at " + PATH + b"\n"
            await self._answer(404, [(b"Content-Type", _TEXT)], text, is_head)
        elif head.method != b"GET" and not is_head:
            allowed = [(b"Content-Type", _TEXT), (b"Allow", b"GET, HEAD")]
            await self._answer(405, allowed, b"Metrics can only be read\n", is_head)
        else:
            content_type, body = await self._render(head)
            await self._answer(200, [(b"Content-Type", content_type)], body, is_head)

    async def _render(self, head: RequestHead) -> tuple[bytes, bytes]:
        """Render all metrics, but let the proxy's requests have their turns meanwhile."""
        accept = b",".join(value for name, _, value in head.headers if name == b"accept")
        content_type, parts = self._metrics.render_parts(accept.decode("latin-1"))
        rendered = []
        for part in parts:
            rendered.append(part)
            await trio.lowlevel.checkpoint()
        return content_type, b"".join(rendered)

    async def _answer(self, status: int, headers: HeaderPairs, body: bytes, is_head: bool) -> None:
        headers = [*headers, (b"Content-Length", b"%d" % len(body))]
        data = self._codec.response(status, pages.reason(status).encode(), headers)
        if not is_head:
            data += self._codec.body(body)
        await self._send(data + self._codec.end())

    async def _send(self, data: bytes) -> None:
        with trio.fail_after(REQUEST_TIMEOUT):
            await self._stream.send(data)
