"""One HTTP/1.1 connection of a client: one request after another, in one scope of moving deadline.

Owns the stream, the codec and the deadline. What happens to a request is the exchange's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.http import pages
from kamal_proxy.http.access_log import log_request
from kamal_proxy.http.codec import ProtocolError, RequestHead, ServerCodec, whole_response
from kamal_proxy.http.downstream import Http1Downstream
from kamal_proxy.http.exchange import Exchange
from kamal_proxy.http.introduction import introduced
from kamal_proxy.http.reasons import CLIENT_CLOSED_REQUEST, Reason
from kamal_proxy.sockets import drop

if TYPE_CHECKING:
    from kamal_proxy.deployment import Drain
    from kamal_proxy.http.begun import Begun
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address
    from kamal_proxy.sockets import SocketStream

_HEAD_READ_SIZE = 16 * 1024
_ANSWER_TIMEOUT = 5.0  # seconds for an error response after an interruption


class ClientConnection:
    """One HTTP/1.1 connection of a client: a ``client_side.ServedConnection`` and ``ClientSide``.

    Args:
        stream: Its stream.
        address: The client's.
        server: Whose connection it is.
        has_lane: Whether it shall end, and not be closed, as soon as it is quiet.
        is_first: Whether nothing was asked on it yet.

    Attributes:
        is_quiet: Whether it has ended for that reason.
        stream: Its stream.
        address: The client's, or what a PROXY protocol header said that it is.
        server: Whose connection it is.
        codec: What reads and writes HTTP on it.
        scope: What everything on it happens in.
        reason: Why ``scope`` ends at its deadline, or was cancelled.
        drain: The drain of the whole proxy, once that has begun.
        client_ca: PEM certificates by which the client's own was verified, if it was.
        ending: Whether it ends with the response that is being made.
        vouched: Whether the client is one of the trusted proxies.
        believed: Whether what it says about the hops before it is believed: of those proxies, or of
            everybody if there are none.
    """

    __slots__ = (
        "_exchange",
        "_first",
        "_has_lane",
        "_introduced",
        "address",
        "believed",
        "client_ca",
        "codec",
        "drain",
        "ending",
        "is_quiet",
        "reason",
        "scope",
        "server",
        "stream",
        "vouched",
    )

    def __init__(
        self,
        stream: SocketStream,
        address: Address,
        server: HttpServer,
        *,
        has_lane: bool = False,
        is_first: bool = True,
    ) -> None:
        self.stream = stream
        self.server = server
        self._has_lane = has_lane
        self.is_quiet = False
        self.codec = ServerCodec(server.options.max_head_size, server.options.max_headers)
        self._set_address(address)
        self.scope = trio.CancelScope()
        self.reason = Reason.IDLE
        self.ending = False
        self.drain: Drain | None = None
        self.client_ca = stream.client_ca
        self._exchange: Exchange | None = None
        self._first = is_first
        # Inside TLS, or in the lane, nobody introduces anybody: that came before.
        self._introduced = (
            stream.secured or not is_first or address[0] not in server.proxy_protocol_from
        )

    def _set_address(self, address: Address) -> None:
        self.address = address
        self.vouched = self.server.trusts(address)
        self.believed = self.vouched or not self.server.trusted_proxies

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or served, and none lies in the socket."""
        return (
            self._exchange is None
            and not self.codec.has_partial_head
            and self.stream.is_quiet_nowait()
        )

    def downstream(self, head: RequestHead) -> Http1Downstream:
        """Return the client during this request."""
        return Http1Downstream(self, head)

    def move_deadline(self, seconds: float, reason: Reason) -> None:
        """Give what happens next that many seconds from now; ``reason`` says what their end means.

        Once the client is gone, or a cancellation is under way, nothing changes that any more.
        """
        if self.reason is Reason.CLIENT_GONE or self.scope.cancel_called:
            return
        self.scope.deadline = trio.current_time() + seconds
        self.reason = reason

    def begin_drain(self, drain: Drain) -> None:
        """Let what would not end by itself, now or after what is arriving, end before the proxy."""
        self.drain = drain
        if self._exchange is not None:
            self._exchange.begin_drain(drain)

    def cancel(self, reason: Reason) -> None:
        """Interrupt what the connection is doing now."""
        self.reason = reason
        self.scope.cancel(reason=reason.name)

    def go_on(self, request: bytes, begun: Begun) -> None:
        """Go on with an exchange when the connection is served.

        Args:
            request: The whole request.
            begun: What has become of it.
        """
        self.codec.receive_head_data(request)
        head = self.codec.next_request()
        assert head is not None, "what was whole in the lane is whole"
        self._exchange = Exchange(self, head, begun)

    async def run(self) -> None:
        """Serve the connection until it ends. The caller closes the stream."""
        try:
            linger = await self._serve()
        finally:
            if self._exchange is not None:
                self._exchange.finish()
                self._exchange = None
        if linger:
            await drop(self.stream)

    async def _serve(self) -> bool:
        """Serve requests; return whether the client may still be sending."""
        while True:
            with self.scope:
                if not self._introduced and not await self._read_introduction():
                    return False
                # An exchange that ended while being cancelled must not take the next one with it.
                while self._exchange is not None or not self.scope.cancel_called:
                    if self._exchange is None:
                        try:
                            head = await self._next_head()
                        except ProtocolError as error:
                            large = error.status == Reason.HEAD_TOO_LARGE.status
                            reason = Reason.HEAD_TOO_LARGE if large else Reason.BAD_REQUEST
                            return await self._reject(reason, error.status)
                        except trio.BrokenResourceError:
                            head = None
                        if head is None:
                            if self.codec.has_partial_head:
                                self._log_headless(Reason.CLIENT_GONE, CLIENT_CLOSED_REQUEST, 0)
                            return False
                        self._exchange = Exchange(self, head)
                        if self.drain is not None:
                            self._exchange.begin_drain(self.drain)
                    if not await self._run_exchange(self._exchange) or self.server.closing:
                        return self._must_linger()
                    if self._has_lane and self.is_idle and not self.scope.cancel_called:
                        self.is_quiet = True
                        return False
            if self.scope.cancelled_caught or self.reason is Reason.SHUTDOWN:
                return await self._interrupted()
            # Its client was told that the connection goes on.
            self.scope = trio.CancelScope()

    async def _run_exchange(self, exchange: Exchange) -> bool:
        """Serve a request; return whether the connection can be used for another."""
        usable = await exchange.run()
        usable = usable and self.codec.next_cycle()
        exchange.finish()
        self._exchange = None
        if self.reason is Reason.CLIENT_GONE:
            self.reason = Reason.IDLE  # each pipelined request has its own grace
        return usable

    def _must_linger(self) -> bool:
        """Return whether there may be unread bytes: only these make closing dangerous."""
        return not (self.codec.received and self.stream.is_quiet_nowait())

    async def _read_introduction(self) -> bool:
        """Read the PROXY protocol header that this peer owes; return whether it was one."""
        self.move_deadline(self.server.options.head_timeout, Reason.IDLE)
        found = await introduced(self.stream, self.address, self.server.log)
        if found is None:
            return False
        address, data = found
        self._set_address(address)
        self._introduced = True
        self.codec.receive_head_data(data)
        return True

    async def _interrupted(self) -> bool:
        reason = self.reason
        self.ending = True
        with trio.move_on_after(_ANSWER_TIMEOUT), trio.CancelScope() as self.scope:
            if self._exchange is not None:
                self.reason = Reason.IDLE
                try:
                    await self._exchange.interrupted(reason)
                except (ProtocolError, trio.BrokenResourceError):
                    return False
                return reason is not Reason.CLIENT_GONE and self._must_linger()
            if reason is Reason.HEAD_TIMEOUT:
                return await self._reject(reason, reason.status)
            if reason is Reason.SHUTDOWN and self.codec.has_partial_head:
                return await self._reject(reason, reason.status)
        return False

    async def _next_head(self) -> RequestHead | None:
        """Wait for the next request; None when the client closed."""
        if self.codec.has_partial_head:
            # Pipelined requests must not keep the others waiting.
            await trio.lowlevel.checkpoint()
        head = self.codec.next_request()
        if head is not None:
            return head
        options = self.server.options
        if self.codec.has_partial_head:
            self.move_deadline(options.head_timeout, Reason.HEAD_TIMEOUT)
        else:
            # A new connection owes a request sooner than one that has served some.
            patience = options.head_timeout if self._first else options.idle_timeout
            self.move_deadline(patience, Reason.IDLE)
        self._first = False
        latest = self.scope.deadline
        while True:
            data = await self.stream.receive(_HEAD_READ_SIZE)
            if not data:
                return None
            begun = self.codec.has_partial_head
            self.codec.receive_head_data(data)
            head = self.codec.next_request()
            if head is not None:
                return head
            if not begun and self.codec.has_partial_head:
                self.move_deadline(options.head_timeout, Reason.HEAD_TIMEOUT)
            elif begun and not self.codec.has_partial_head:
                # It was only an empty line. Any number of them must not keep the connection open.
                self.move_deadline(latest - trio.current_time(), Reason.IDLE)

    async def _reject(self, reason: Reason, status: int) -> bool:
        """Answer a head that can't be understood; the connection ends."""
        body = pages.render(status)
        headers = [(b"Date", self.server.date()), (b"Content-Type", pages.CONTENT_TYPE)]
        response = whole_response(status, pages.reason(status), headers, body)
        self.move_deadline(_ANSWER_TIMEOUT, Reason.CLIENT_STALLED)
        told = False
        try:
            await self.stream.send(response)
            told = True
        except trio.BrokenResourceError:
            return False
        finally:
            if told:
                self._log_headless(reason, status, len(body))
            else:
                self._log_headless(Reason.CLIENT_GONE, CLIENT_CLOSED_REQUEST, 0)
        return True

    def _log_headless(self, reason: Reason, status: int, sent: int) -> None:
        """Log and count a request whose head was never understood."""
        headers = [(b"Content-Type", pages.CONTENT_TYPE)] if sent else []
        self.server.metrics.request("", b"", status, 0.0)
        self.server.metrics.failure("", reason)
        log_request(
            self.server,
            self.address,
            None,
            status=status,
            sent=sent,
            response=headers,
            remote=self.address[0].encode(),
            reason=reason,
        )
