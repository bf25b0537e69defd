"""HTTPS for the ``acme`` library: what a certificate authority may cost is bounded.

An authority is trusted with certificates, not with this process: its answers have a size, a
redirect is not followed, and whoever waits for a thread can end its requests from outside.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

MAX_ANSWER = 256 * 1024  # bytes
TIMEOUT = 20  # seconds without a single byte from the authority

_CHUNK = 16 * 1024


class RefusedAnswerError(requests.RequestException):
    """An answer is not one that a certificate authority may give."""


class EndedError(requests.RequestException):
    """Nobody waits for the answer any more."""


class Transport(HTTPAdapter):
    """Carries the requests of one conversation.

    Attributes:
        ended: Set once it carries no more requests; its ``wait`` is a sleep that can be ended.
        retry_after: The Retry-After field of the last answer, if it had one.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.retry_after: str | None = None
        self._guard = threading.Lock()
        # Descriptors of its own: when those of the library are closed is not known.
        self._sockets: list[socket.socket] = []
        super().__init__()

    def end(self) -> None:
        """Break off what is under way; from any thread. No request is sent afterwards."""
        self.ended.set()
        with self._guard:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):  # the authority has closed it already
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def send(  # type: ignore[override]  # the library passes them all by name
        self, request: PreparedRequest, **options: Any
    ) -> Response:
        """Send a request and read the whole answer."""
        if self.ended.is_set():
            raise EndedError("ended", request=request)
        self.retry_after = None
        try:
            response = super().send(request, **(options | {"stream": True}))
            with response:
                self._read(response)
        except (requests.RequestException, OSError) as error:
            if self.ended.is_set():
                raise EndedError("ended", request=request) from error
            raise
        if self.ended.is_set():  # an answer may look complete that was cut
            raise EndedError("ended", request=request)
        self.retry_after = response.headers.get("Retry-After")
        return response

    def _read(self, response: Response) -> None:
        if response.is_redirect:
            raise RefusedAnswerError(
                f"it redirects to {response.headers.get('Location', '')[:200]}, which is not "
                "followed",
                response=response,
            )
        parts: list[bytes] = []
        size = 0
        for part in response.iter_content(_CHUNK):
            size += len(part)
            if size > MAX_ANSWER:
                raise RefusedAnswerError(
                    f"its answer is longer than {MAX_ANSWER} bytes", response=response
                )
            if self.ended.is_set():
                raise EndedError("ended", response=response)
            parts.append(part)
        # The library reads it from there, as often as it likes.
        response._content = b"".join(parts)
        response.raw = io.BytesIO()

    # --- connections that can be broken off ------------------------------------------------------

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pool of connections; called by the base."""
        super().init_poolmanager(*args, **kwargs)
        self._adopt(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Make the pool of connections through a proxy; called by the base."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        self._adopt(manager)
        return manager

    def _adopt(self, manager: Any) -> None:
        manager.pool_classes_by_scheme = {
            **manager.pool_classes_by_scheme,
            "https": self._make_pool,
        }

    def _make_pool(self, *args: Any, **kwargs: Any) -> HTTPSConnectionPool:
        pool = HTTPSConnectionPool(*args, **kwargs)
        pool.ConnectionCls = partial(_Connection, self)  # type: ignore[assignment]  # made by it
        return pool

    def opened(self, descriptor: int) -> None:
        """Take note of a connection that has been made."""
        with self._guard:
            if self.ended.is_set():
                raise EndedError("ended")
            self._sockets.append(socket.socket(fileno=os.dup(descriptor)))


class _Connection(HTTPSConnection):
    """A connection that its transport can break off."""

    def __init__(self, transport: Transport, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._transport = transport

    def connect(self) -> None:
        super().connect()
        self._transport.opened(self.sock.fileno())
