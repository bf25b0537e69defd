"""A stream of a multiplexed connection as one end of a tunnel (RFC 8441, RFC 9220)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from kamal_proxy.http.multiplexed import MultiplexedStream


_MAX_QUEUED = 64 * 1024  # bytes that wait for the client to open its window


class StreamTunnelEnd:
    """A stream that carries another protocol: a ``tunnel.TunnelEnd``."""

    __slots__ = ("_stream",)

    def __init__(self, stream: MultiplexedStream) -> None:
        self._stream = stream

    def _check(self) -> None:
        if self._stream.gone:
            raise trio.BrokenResourceError("the client has cancelled the stream")

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:  # noqa: ARG002
        """Return what has arrived, or ``b""`` at the end; flow control limits how much it is."""
        while True:
            self._check()
            if data := self._stream.take_tunnelled():
                return data
            if self._stream.incoming.ended:
                return b""
            await self._stream.incoming.wait()

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what there is room for and return how many bytes that was."""
        self._check()
        out = self._stream.out
        part = bytes(data[: max(0, _MAX_QUEUED - out.size)])
        if part:
            out.add(part)
            self._stream.submit()
        return len(part)

    async def wait_writable(self) -> None:
        """Wait until there is room again."""
        self._check()
        if self._stream.out.size >= _MAX_QUEUED:
            await self._stream.out.wait()
        else:
            await trio.lowlevel.checkpoint()

    async def wait_readable(self) -> bool:
        """Wait until something has arrived, or the client is gone."""
        if self._stream.gone:
            await trio.lowlevel.checkpoint()
        else:
            await self._stream.incoming.wait()
        return True

    def shutdown_write(self) -> None:
        """Send the end of the stream; reading goes on."""
        self._check()
        self._stream.end()
        self._stream.submit()

    def keep_alive(self) -> None:
        """Find out when a silent client has vanished."""
        self._stream.keep_alive()

    def connect_error_nowait(self) -> int:
        """Return an errno once the client is gone."""
        return errno.ECONNRESET if self._stream.gone else 0
