"""What an exchange needs of its target: the wall between it and the version of HTTP spoken there.

``Pool`` is what a target's connections are kept in, ``Upstream`` one request on one of them. Of
HTTP/1.1 that is the whole connection, of HTTP/2 one stream of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from kamal_proxy.http.codec import HeaderPairs, ResponseHead
    from kamal_proxy.http.tunnel import TunnelEnd
    from kamal_proxy.sockets import SocketStream


class TargetCodec(Protocol):
    """Reads and writes the messages of one request.

    ``request``, ``body`` and ``end`` say what is to be sent next and may return its bytes, or keep
    it to themselves and return nothing; ``Upstream.send`` of what they returned sends it.

    Attributes:
        received: Whether the response has arrived whole.
        trailers: Its trailers that a client may see.
        heard: Whether anything of it has arrived.
        is_costly: Whether its body came in very many parts lately.
    """

    received: bool
    trailers: HeaderPairs
    heard: bool
    is_costly: bool

    def request(
        self, method: bytes, target: bytes, headers: HeaderPairs, upgrade: bytes = b""
    ) -> bytes:
        """Frame the head of a request.

        Args:
            method: Its method.
            target: Its path and query.
            headers: Its fields as HTTP/1.1 has them, framing included.
            upgrade: The protocol that it wants to switch to, if any.

        Raises:
            ProtocolError: it can't be written.
            TargetFailed: the target can't switch to that protocol.
        """

    def body(self, data: bytes) -> bytes:
        """Frame a part of the request's body."""

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Frame the end of the request."""

    def next_response(self) -> ResponseHead | None:
        """Return the head of the next response, 1xx or final, or None when it is still to come.

        Raises:
            ProtocolError: it will not come, or is malformed.
        """

    def take_body(self) -> bytes:
        """Return all that is here of the body; ``received`` tells whether that was the end.

        Raises:
            ProtocolError: the rest will not come; its ``body`` is what came before that.
        """

    def switched(self) -> bytes:
        """Return what has arrived of another protocol, after a 101 response."""


class Upstream(Protocol):
    """One request to a target. Whoever got it from a pool must :meth:`release` it."""

    @property
    def codec(self) -> TargetCodec:
        """What reads and writes its messages."""

    @property
    def reused(self) -> bool:
        """Whether its connection may have been closed by the target without anybody's knowing."""

    @property
    def opened(self) -> bool:
        """Whether its connection was opened for it."""

    @property
    def refused(self) -> bool:
        """Whether the target has said that it did nothing with the request."""

    @property
    def may_refuse(self) -> bool:
        """Whether a target can say that at all."""

    async def send(self, data: bytes, progress: Callable[[], None] | None = None) -> None:
        """Send what the codec has framed.

        Args:
            data: What the codec returned.
            progress: Called before each wait; the target has taken something since the last.

        Raises:
            trio.BrokenResourceError: the target takes no more; it may have answered.
        """

    async def receive(self, watch: SocketStream | None) -> bool:
        """Wait for more of the response, and let the codec have it.

        Args:
            watch: The client's connection, whose end shortens the wait; None means not to watch.

        Returns:
            False if that is what ended the wait.

        Raises:
            trio.BrokenResourceError: the connection broke.
        """

    def watch_from_now(self, watch: SocketStream) -> None:
        """Let the end of the client's connection also shorten a wait that has begun."""

    def release(self) -> None:
        """Give it back after its exchange: once, for another may have it then."""

    def tunnel_end(self) -> TunnelEnd:
        """Return the target's end of a tunnel, after a 101 response."""


class Pool(Protocol):
    """The connections to one target; a :class:`kamal_proxy.deployment.Connections`."""

    def take_idle(self, max_age: float) -> Upstream | None:
        """Begin a request on a connection that was alive ``max_age`` seconds ago, if any was."""

    async def connect(self) -> Upstream:
        """Begin a request on a connection that is new, or was found alive just now.

        Raises:
            ConnectError: none could be opened.
        """

    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> None:
        """Let the connections live, until :meth:`close`."""

    def trim(self) -> None:
        """Close the connections that have waited for too long."""

    def close(self) -> None:
        """Close the connections that wait; those released later are closed too."""
