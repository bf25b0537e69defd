"""What an exchange needs of its client: the wall between it and the version of HTTP spoken there.

``ClientSide`` is where a request came from and the deadline of serving it; ``Downstream`` is the
request's body and what the client is sent. HTTP/1.1 has one object for each; of a multiplexed
connection, one stream is both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kamal_proxy.deployment import Drain
    from kamal_proxy.http.codec import HeaderPairs, RequestHead
    from kamal_proxy.http.reasons import Reason
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.http.target_side import Upstream
    from kamal_proxy.http.tunnel import TunnelEnd
    from kamal_proxy.listeners import Address


class OpenConnection(Protocol):
    """A client connection as the server that accepted it knows it."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or served, and none has arrived unread."""

    def begin_drain(self, drain: Drain) -> None:
        """Take note that the proxy is about to end; what would not end by itself has to."""

    def cancel(self, reason: Reason) -> None:
        """Interrupt everything on the connection."""


class ServedConnection(OpenConnection, Protocol):
    """One that has a task."""

    async def run(self) -> None:
        """Serve the connection until it ends. The caller closes the stream."""


class ClientSide(Protocol):
    """Where one request came from, and the one cancel scope in which it is served.

    Attributes:
        server: Whose request it is.
        address: The client's, or what a PROXY protocol header said that it is.
        vouched: Whether the client is one of the trusted proxies.
        believed: Whether what it says about the hops before it is believed.
        drain: The drain of the whole proxy, once that has begun.
        client_ca: PEM certificates by which the client's own was verified, if it was.
    """

    server: HttpServer
    address: Address
    vouched: bool
    believed: bool
    drain: Drain | None
    client_ca: bytes | None

    def downstream(self, head: RequestHead) -> Downstream:
        """Return the client during this request; called once for each."""

    def move_deadline(self, seconds: float, reason: Reason) -> None:
        """Give what happens next that many seconds from now; ``reason`` says what their end means.

        Once the client is gone, or a cancellation is under way, nothing changes that any more.
        """

    def cancel(self, reason: Reason) -> None:
        """Interrupt what serves the request."""


class Downstream(Protocol):
    """The client during one request.

    ``begin``, ``body`` and ``end`` say what is to be sent next and may return its bytes, or keep
    it to themselves and return nothing; ``send`` of all that they returned sends it.

    Attributes:
        awaits_continue: Whether the client rightly waits for 100 Continue; it owes no body yet.
        status: Status of the response, once it has begun.
        response: Its header fields, once they were sent.
        sent: Bytes of response body.
        hidden: Lower-case name of a field that no target must see among the trailers, if any.
        is_cut: Whether something was sent in part only: nothing else can be said any more.
    """

    awaits_continue: bool
    status: int
    response: HeaderPairs | None
    sent: int
    hidden: bytes
    is_cut: bool

    @property
    def received(self) -> bool:
        """Whether the request has arrived whole."""

    @property
    def trailers(self) -> HeaderPairs:
        """The request's trailers that a target may see, once it has arrived whole."""

    def take_body(self) -> bytes:
        """Return what was read of the body and not taken yet.

        Raises:
            ClientGone: the client has given the request up.
            ProtocolError: the client broke the framing.
        """

    def take_body_nowait(self) -> bytes:
        """Like :meth:`take_body`, with what has arrived but was not read.

        Raises:
            ClientGone: the client closed.
            ProtocolError: the client broke the framing.
        """

    async def receive_body(self) -> None:
        """Read more of the body; how long that may take is the caller's business.

        Raises:
            ClientGone: the client closed.
            ProtocolError: the client broke the framing.
        """

    async def ask_for_body(self) -> None:
        """Send 100 Continue to a client that waits for it (RFC 9110 10.1.1)."""

    async def inform(self, status: int, reason: bytes, headers: HeaderPairs) -> bool:
        """Send a 1xx response; return whether it was the 100 that the client waited for."""

    async def switch(self, reason: bytes, headers: HeaderPairs) -> bytes:
        """Accept another protocol; return what the client has sent of it already.

        Raises:
            TargetFailed: the target did not prove that it speaks it.
        """

    def begin(
        self, status: int, reason: bytes, headers: HeaderPairs, *, close: bool = False
    ) -> bytes:
        """Frame the head of the final response, which is to be sent.

        Args:
            status: Its status.
            reason: Its reason phrase.
            headers: Its header fields; at most a Content-Length as framing.
            close: Whether the client must make way for others: its connection ends with it.

        Raises:
            ProtocolError: it can't be written.
        """

    def body(self, data: bytes) -> bytes:
        """Frame a part of the response's body."""

    def end(self, trailers: HeaderPairs | None = None) -> bytes:
        """Frame the end of the response."""

    async def send(self, data: bytes) -> None:
        """Send to the client, giving up when it takes nothing for too long.

        Raises:
            ClientGone: the client closed or broke the connection, or did not take it.
        """

    async def answer(
        self, status: int, body: bytes, headers: HeaderPairs, *, close: bool = False
    ) -> bool:
        """Send a whole response; return whether the connection can be used again.

        Args:
            status: Its status.
            body: Its body.
            headers: Header fields besides Date, Content-Length and Connection.
            close: Whether the connection must end with it.
        """

    async def receive_from(self, upstream: Upstream, *, watching: bool) -> None:
        """Wait for more from a target; a client that goes away meanwhile shortens the wait.

        Args:
            upstream: The request to the target; its codec has then what has come.
            watching: Whether to watch the client; not while somebody reads from it, who notices.
        """

    def watch_from_now(self, upstream: Upstream) -> None:
        """Let the client's leaving also shorten a :meth:`receive_from` that waits already."""

    async def wait_gone(self) -> None:
        """Wait until the client has closed its side, and has had its grace."""

    def tunnel_end(self) -> TunnelEnd:
        """Return the client's end of the tunnel, after :meth:`switch`."""
