"""The metrics over HTTP/1.1: GET and HEAD of one path. Counts nothing and formats nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.endpoint import TEXT, Endpoint, Request

if TYPE_CHECKING:
    from kamal_proxy.listeners import Address
    from kamal_proxy.logs import Log
    from kamal_proxy.metrics import Metrics
    from kamal_proxy.sockets import SocketStream

PATH = "/metrics"
MAX_BODY = 16 * 1024  # of a request: there is no use for any
REQUEST_TIMEOUT = 10.0  # seconds for a whole request to arrive, and for the answer to be taken
IDLE_TIMEOUT = 180.0  # seconds between two requests; longer than people let pass between scrapes


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
        endpoint = Endpoint(stream, max_body=MAX_BODY, patience=REQUEST_TIMEOUT)
        idle = REQUEST_TIMEOUT
        try:
            while (request := await endpoint.receive(idle)) is not None:
                await self._answer(endpoint, request)
                if not await endpoint.next_cycle():
                    return
                idle = IDLE_TIMEOUT
        except ProtocolError as error:
            await self._refuse(endpoint, error)
        except (trio.BrokenResourceError, trio.TooSlowError):
            return  # the client is gone
        except Exception as error:  # a bug must cost one scrape, not the proxy
            self._log.error("Metrics request failed", error=repr(error))

    async def _refuse(self, endpoint: Endpoint, error: ProtocolError) -> None:
        try:
            await endpoint.refuse(error)
        except (trio.BrokenResourceError, trio.TooSlowError):
            return  # it does not even listen

    async def _answer(self, endpoint: Endpoint, request: Request) -> None:
        if request.path != PATH:
            text = f"Nothing is here; the metrics are at {PATH}\n".encode()
            await endpoint.respond(404, [(b"Content-Type", TEXT)], text)
        elif request.method not in ("GET", "HEAD"):
            allowed = [(b"Content-Type", TEXT), (b"Allow", b"GET, HEAD")]
            await endpoint.respond(405, allowed, b"Metrics can only be read\n")
        else:
            content_type, body = await self._render(request)
            await endpoint.respond(200, [(b"Content-Type", content_type)], body)

    async def _render(self, request: Request) -> tuple[bytes, bytes]:
        """Render all metrics, but let the proxy's requests have their turns meanwhile."""
        accept = b",".join(value for name, _, value in request.head.headers if name == b"accept")
        content_type, parts = self._metrics.render_parts(accept.decode("latin-1"))
        rendered = []
        for part in parts:
            rendered.append(part)
            await trio.lowlevel.checkpoint()
        return content_type, b"".join(rendered)
