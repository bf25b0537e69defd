"""The target's end of a tunnel that is one HTTP/2 stream (RFC 8441): a ``TunnelEnd``."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from kamal_proxy.http.h2_upstream import H2Upstream


class H2TunnelEnd:
    """One stream, as a tunnel uses a socket.

    Args:
        upstream: The request that the target has answered with 200.
    """

    def __init__(self, upstream: H2Upstream) -> None:
        self._upstream = upstream
        self._read = b""  # what was taken from the stream, but not from here

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` at the end."""
        upstream = self._upstream
        while not self._read:
            try:
                self._read = upstream.take_body()
            except ProtocolError as error:
                if not error.body:
                    raise trio.BrokenResourceError(str(error)) from error
                self._read = error.body
            if not self._read:
                if upstream.received:
                    return b""
                await upstream.receive(None)
        data, self._read = self._read[:max_bytes], self._read[max_bytes:]
        return data

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what is taken now and return how many bytes that was."""
        return self._upstream.send_through(memoryview(data))

    async def wait_writable(self) -> None:
        """Wait until a send that took too little is worth another try."""
        await self._upstream.wait_sendable()

    async def wait_readable(self) -> bool:
        """Wait until something has happened that a read, or ``connect_error_nowait``, can tell."""
        return await self._upstream.wait_readable()

    def shutdown_write(self) -> None:
        """Send the end; reading goes on."""
        self._upstream.end_tunnel()

    def keep_alive(self) -> None:
        """Find out when a silent peer has vanished: the connection below does that already."""

    def connect_error_nowait(self) -> int:
        """Return an errno once the peer is gone altogether, else 0."""
        return errno.ECONNRESET if self._upstream.failure else 0
