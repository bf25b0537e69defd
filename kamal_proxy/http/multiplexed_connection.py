"""What connections of clients over HTTP/2 and HTTP/3 have in common: their streams, and their end.

In a drain the client is first told to go elsewhere, then which of its requests was the last, when
those that were under way must have arrived. How that is said is the subclass's business, as is
everything else of the protocol: frames, flow control, what a client may do how often.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import trio

from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.stream_heads import MalformedError
from kamal_proxy.http.stream_intake import log_headless, read_head, refusal_fields

if TYPE_CHECKING:
    from kamal_proxy.deployment import Drain
    from kamal_proxy.http.codec import HeaderPairs, RequestHead
    from kamal_proxy.http.multiplexed import MultiplexedStream
    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address

S = TypeVar("S", bound="MultiplexedStream")

_LAST_CALL = 1.0  # seconds for requests that were sent before the client heard of a drain


class MultiplexedConnection(ABC, Generic[S]):
    """One connection that carries many requests at once: a ``client_side.ServedConnection``.

    Args:
        server: Whose connection it is.
        address: The client's, or what a PROXY protocol header said that it is.
        client_ca: PEM certificates by which the client's own was verified, if it was.

    Attributes:
        VERSION: The version of HTTP, as a request's head has it.
        server: Whose connection it is.
        address: The client's, or what a PROXY protocol header said that it is.
        client_ca: PEM certificates by which the client's own was verified, if it was.
        vouched: Whether the client is one of the trusted proxies.
        believed: Whether what it says about the hops before it is believed.
        drain: The drain of the whole proxy, once that has begun.
    """

    __slots__ = (
        "_idle_since",
        "_leaving",
        "_nursery",
        "_ponged",
        "_refusing",
        "_served",
        "_streams",
        "address",
        "believed",
        "client_ca",
        "drain",
        "server",
        "vouched",
    )

    VERSION: ClassVar[bytes]

    def __init__(self, server: HttpServer, address: Address, client_ca: bytes | None) -> None:
        self.server = server
        self.address = address
        self.client_ca = client_ca
        trusted = server.trusted_proxies
        self.vouched = bool(trusted) and address[0] in trusted
        self.believed = self.vouched or not trusted
        self.drain: Drain | None = None
        self._streams: dict[int, S] = {}
        self._served = False  # a request has come
        self._idle_since = trio.current_time()
        self._nursery: trio.Nursery | None = None  # while requests are taken
        # The end
        self._leaving = False  # the client was told that new requests are not welcome
        self._refusing = False  # it was told which were the last
        self._ponged = trio.Event()  # it has answered the PING of a drain

    # What the subclass has to do

    @abstractmethod
    def count_reset(self) -> None:
        """Note that a request ended without its answer, and that it was the client's doing."""

    @abstractmethod
    def _reset_malformed(self, stream_id: int) -> None:
        """End a stream whose request can't be read."""

    @abstractmethod
    def _answer_refused(self, stream_id: int, fields: HeaderPairs, *, ended: bool) -> None:
        """Send the fields of an answer without a body; read no more of the request."""

    @abstractmethod
    def _ask_to_leave(self) -> None:
        """Tell the client to go elsewhere, and send the PING whose answer sets ``_ponged``."""

    @abstractmethod
    def _tell_last(self) -> None:
        """Tell the client which of its requests is the last that is answered."""

    @abstractmethod
    def _end(self) -> None:
        """End the connection: nothing is left to be done on it."""

    # A client_side.ServedConnection

    @property
    def is_idle(self) -> bool:
        """Never: also a connection without requests is left only after the client was told."""
        return False

    def begin_drain(self, drain: Drain) -> None:
        """Tell the client to go elsewhere; what it has asked for, or is asking for, is answered."""
        self.drain = drain
        for stream in self._streams.values():
            stream.begin_drain(drain)
        if self._nursery is not None and not self._leaving:
            self._leaving = True
            # Requests may be under way: which is the last is said when they must have arrived.
            self._ask_to_leave()
            self._nursery.start_soon(self._last_call)

    def cancel(self, reason: Reason) -> None:
        """Interrupt what the connection is doing now; nothing new begins."""
        for stream in list(self._streams.values()):
            stream.cancel(reason)
        self._refuse_more()

    # What arrives

    @property
    def _patience(self) -> float:
        """Seconds without a request; as over HTTP/1.1, a new connection owes one sooner."""
        options = self.server.options
        return options.idle_timeout if self._served else options.head_timeout

    def _read_head(self, stream_id: int, fields: HeaderPairs, *, ended: bool) -> RequestHead | None:
        """Return the head of a request, or None if it was refused."""
        try:
            return read_head(self.server, fields, version=self.VERSION, ended=ended)
        except MalformedError as error:
            self._reset_malformed(stream_id)
            self._log_headless(Reason.BAD_REQUEST.status, str(error))
            self.count_reset()
        except ProtocolError as error:
            self._refuse_head(stream_id, error, ended=ended)
        return None

    def _refuse_head(self, stream_id: int, error: ProtocolError, *, ended: bool) -> None:
        """Answer a request that can't be served, but could be read."""
        self._answer_refused(stream_id, refusal_fields(self.server, error), ended=ended)
        self._log_headless(error.status, str(error))
        self.count_reset()

    def _log_headless(self, status: int, why: str) -> None:
        log_headless(self.server, self.address, self.VERSION, status, why)

    # The end

    async def _last_call(self) -> None:
        """Wait for requests that were under way when the drain began, then say which was the last.

        The client's answer to a PING comes after whatever it has sent before it knew.
        """
        with trio.move_on_after(_LAST_CALL):
            await self._ponged.wait()
        self._refuse_more()

    def _refuse_more(self) -> None:
        if not self._refusing:
            self._refusing = True
            self._tell_last()
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._refusing and not self._streams:
            self._end()
