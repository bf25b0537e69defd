"""Types of the compiled hot paths; see _fastpath.pyx for the design."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from kamal_proxy.deployment import Deployment, Drain
from kamal_proxy.http.begun import Begun
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.server import HttpServer
from kamal_proxy.service import Service
from kamal_proxy.sockets import SocketStream

def scan_head(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Find the end of an HTTP/1.1 message head and refuse what is ambiguous (RFC 9112 2.2, 5.2).

    Args:
        data: The bytes received so far, beginning with the first byte of the start line.
        start: Offset from which to scan, when a shorter prefix was found incomplete before: three
            bytes before the end of that prefix (so that a blank line split over two reads is
            seen), or 0. At most ``len(data)``.

    Returns:
        The offset just after the blank line, or -1 when more data is needed.

    Raises:
        ValueError: LF without CR, CR without LF, a control character (NUL, DEL, ...) or a folded
            header line; the text says which.
    """

class ChunkScanner:
    """Follows the framing of a chunked body and refuses what is ambiguous (RFC 9112 7.1).

    Args:
        limit: Longest extension of one chunk, and longest trailers in all, in bytes.
    """

    def __init__(self, limit: int) -> None: ...
    @property
    def done(self) -> bool:
        """Whether the body has ended."""

    def scan(self, data: bytes | bytearray | memoryview) -> int:
        """Walk over the next bytes of the body.

        Returns:
            How many of them belong to it: all, unless it has ended.

        Raises:
            ValueError: the framing is malformed, or over a limit; the text says how.
        """

class Actor:
    """What is told of events without a detour through Python; a base class of the extension."""

    def ready(self, events: int) -> None:
        """Do what these epoll events allow."""

class Readiness:
    """One epoll, and who is told of its events: a pollable for each descriptor.

    An ``Actor`` does its work when it is told; any other pollable has a method ``ready`` that takes
    the events, and wakes tasks.
    """

    #: By descriptor; closing one must be preceded by its removal.
    pollables: dict[int, Any]

    def close(self) -> None:
        """Close the epoll; again does nothing."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to tell."""

    @property
    def has_line(self) -> bool:
        """Whether :meth:`tell` has something to do without any event."""

    def watch(self, fd: int, edges: int, former: int) -> None:
        """Tell of these edges of a descriptor; at once, of what has come to pass already.

        Args:
            fd: The descriptor.
            edges: What is told from now on.
            former: What was told until now, 0 for nothing.

        Raises:
            OSError: the kernel has no room for it.
        """

    def ignore(self, fd: int) -> None:
        """Tell nothing of a descriptor any more.

        Raises:
            OSError: it was not watched.
        """

    def tell(self) -> int:
        """Tell of one batch of events, without waiting for any.

        Returns:
            How many were told, or were in line, if it is worth repeating at once: they were only
            Actors, and none of them is in line again. Otherwise 0.
        """

def is_quiet(fd: int) -> bool:
    """Return whether a connected socket is open with nothing to read."""

class Plan:
    """What the lane knows of a service that a host and a path prefix lead to.

    Args:
        service: The service.
        prefix: The prefix.
        is_open: Whether nothing but forwarding becomes of its requests.
        strips: Whether its targets see the path without the prefix.
        forwards: Whether incoming X-Forwarded-* headers are believed.
        timeout: Seconds that a target has for the head of its response.
        max_request: Largest body of a request in bytes; what is larger is for a task.
        buffers_responses: Whether a response of known length is read whole first.
        max_response: Largest body of such a response in bytes, likewise.
        added: Lines that the head of each response gets.
        quoted: Name of the service as the log has it, in quotation marks.
        request_names: Fields of requests that the log wants: lower-case name, and what comes before
            the value in the line.
        response_names: Fields of responses, likewise.

    Attributes:
        service: As given.
        deployment: The one that is active.
        name: Name of the service.
        stripped: What is removed from the beginning of the path.
    """

    service: Service
    deployment: Deployment
    name: str
    stripped: bytes

    def __init__(
        self,
        service: Service,
        prefix: bytes,
        *,
        is_open: bool,
        strips: bool = False,
        forwards: bool = False,
        timeout: float = 0.0,
        max_request: float = ...,
        buffers_responses: bool = False,
        max_response: float = ...,
        added: bytes = b"",
        quoted: bytes = b"",
        request_names: Sequence[tuple[bytes, bytes]] = (),
        response_names: Sequence[tuple[bytes, bytes]] = (),
    ) -> None: ...

class Link(Actor):
    """A connection to a target, as the poller knows it from its first request in the lane on."""

class Visit(Actor):
    """A client's connection, in the lane or away: ``OpenConnection`` and ``InFlight`` in the lane.

    Args:
        lane: Its lane.
        stream: Its stream.
        address: The client's host and port.
        vouched: Whether the client is one of the trusted proxies.

    Attributes:
        stream: As given.
        address: The client's.
        was_served: Whether a request was served on it.
    """

    stream: SocketStream
    address: tuple[str, int]
    was_served: bool

    def __init__(
        self, lane: Lane, stream: SocketStream, address: tuple[str, int], vouched: bool
    ) -> None: ...
    @property
    def is_idle(self) -> bool:
        """Whether no request is being served, and none lies in the socket."""

    def begin(self, patience: float) -> None:
        """Begin to read; the first request has to come within so many seconds."""

    def come_back(self, address: tuple[str, int], vouched: bool) -> None:
        """Be in the lane again; nothing of the connection lies unread.

        Args:
            address: The client's, which may have become known.
            vouched: Whether that is one of the trusted proxies.
        """

    def begin_drain(self, drain: Drain) -> None:
        """Do nothing: whatever is in the lane ends by itself."""

    def abort_drained(self) -> None:
        """End the request: the drain deadline has passed."""

    def cancel(self, reason: Reason) -> None:
        """End the connection, and what is served on it."""

class Lane:
    """The connections of one server that are in the lane, and what they have in common.

    A subclass says what happens where the lane ends: ``plans``, ``leave``, ``give_away``,
    ``close``, ``look_at``, ``quoted`` and what is told.

    Args:
        readiness: Tells of its sockets.
        server: Its server, whose options and limits hold here, too.
        clock: Returns the time on Trio's clock.
        make_begun: Makes what a task is told of an exchange.
        validation: How paths begin that certificate authorities may look at; empty if none may.
        streamed: Types of responses that are made to be read as they come, in lower case.
        idle_age: Seconds until a kept connection to a target is too old.
        fresh_age: Likewise, for a request that must not be sent twice.
        gone_grace: Seconds that a client has which seems to have left.
        connect_timeout: Seconds in which a connection to a target has to be open.
        drained: The reason of a request that a drain ends.
        client_gone: That of one whose client has left.
        client_stalled: That of one whose client takes nothing.
        target_failed: That of one whose target failed in the middle.
        client_closed: The status of the two before that in the log.
        broken: What streams raise when their connection is broken.
        second_text: Writes a second since 1970 as the log does.
    """

    def __init__(
        self,
        readiness: Readiness,
        *,
        server: HttpServer,
        clock: Callable[[], float],
        make_begun: Callable[..., Begun],
        validation: bytes,
        streamed: tuple[bytes, ...],
        idle_age: float,
        fresh_age: float,
        gone_grace: float,
        connect_timeout: float,
        drained: Reason,
        client_gone: Reason,
        client_stalled: Reason,
        target_failed: Reason,
        client_closed: int,
        broken: type[Exception],
        second_text: Callable[[int], str],
    ) -> None: ...
    @property
    def next_deadline(self) -> float:
        """When :meth:`sweep` may have something to do, on Trio's clock."""

    def sweep(self, visits: tuple[Visit, ...]) -> None:
        """End what takes too long of all that is in the lane."""

def rewrite_request(
    data: bytes | bytearray | memoryview,
    *,
    client: bytes,
    scheme: bytes,
    target: bytes,
    request_id: bytes,
    start: int,
    believed: bool = False,
    stripped: int = 0,
) -> tuple[bytes, int, int, bool] | None:
    """Write the head of an ordinary request as its target gets it.

    Args:
        data: What has come of the request.
        client: Address of the client.
        scheme: ``http`` or ``https``.
        target: ``host:port`` of the target.
        request_id: The request's id, unless it has one.
        start: When it began, in milliseconds since 1970, unless it says so.
        believed: Whether its X-Forwarded-* fields are believed.
        stripped: Bytes of its path that the target does not see.

    Returns:
        The head that the target gets, the bytes of the original head, the bytes of the body (-1 for
        a chunked one), and whether the client wants the connection to end. None if the head is not
        whole, or not ordinary.

    Raises:
        ValueError: the path is shorter than what is to be stripped.
    """

def rewrite_response(
    data: bytes | bytearray | memoryview,
    method: bytes,
    *,
    added: bytes = b"",
    closes: bool = False,
) -> tuple[bytes, int, int, int, bool] | None:
    """Write the head of an ordinary final response as the client gets it.

    Args:
        data: What has come of the response.
        method: Method of the request.
        added: Further lines.
        closes: Whether the connection to the client ends with it.

    Returns:
        The head that the client gets, the bytes of the original head, the status, the bytes of the
        body (-1 for a chunked one), and whether the target ends its connection. None if the head is
        not whole, or not ordinary: also if the body would end with the connection.
    """

class Passage(Actor):
    """Bytes that pass from one socket to another; see _passage.pxi for the design.

    It has the events of the source, and passes on what the source itself needs of them. While it
    carries, nobody else may read from the source or write to the sink.

    Args:
        readiness: Who tells of events of both.
        source: Where the bytes come from, and who is woken when something is left over: a
            ``sockets.SocketStream``.
        sink: Where they go, another one.
        frames: What follows the bytes that were sent, if they are a WebSocket's.
        clock: What says when, if that is wanted; called for each portion.

    Raises:
        trio.ClosedResourceError: one of the two was closed.

    Attributes:
        source: The source.
        carries: Whether bytes pass. It does not any more once something was left over, until the
            next :meth:`begin`, and once one of the two was closed.
        sent: How many bytes have passed.
        last: When the latest have, in the clock's terms; 0 if none have, or there is no clock.
    """

    source: Any
    carries: bool
    sent: int
    last: float

    def __init__(
        self,
        readiness: Readiness,
        source: Any,
        sink: Any,
        frames: FrameTracker | None,
        clock: Callable[[], float] | None,
    ) -> None: ...
    def begin(self) -> bool:
        """Have the events from now on, and carry what they tell of; False once it was stopped.

        What came before has no event: :meth:`carry` has to be called next.

        Raises:
            trio.ClosedResourceError: the source was closed.
        """

    def carry(self) -> bool:
        """Carry what has come already, up to a limit.

        Returns:
            Whether there may be more; otherwise the events tell.
        """

    def take(self) -> bytes | None:
        """Return what was left over and is to be passed on first: bytes, or ``b""`` at the end.

        None if nothing was.

        Raises:
            OSError: reading from the source failed.
        """

    def stop(self) -> None:
        """Give the events back to the source and carry nothing any more; wake who waits for it."""

class FrameTracker:
    """Follows the frames of one direction of a WebSocket connection (RFC 6455 5.2).

    It judges nothing: whatever the bytes are, they are read as masked or unmasked frames with any
    opcode and reserved bits. What it says depends only on all bytes so far, not on how they came.
    A 64-bit length with the top bit set, which the RFC forbids, is a frame that never ends.
    """

    def __init__(self) -> None: ...
    @property
    def at_boundary(self) -> bool:
        """Whether no frame is half gone by. A message of several frames may be."""

    @property
    def closing(self) -> bool:
        """Whether a Close frame has begun: its first byte has gone by. It stays so."""

    @property
    def closed(self) -> bool:
        """Whether a whole Close frame has gone by. It stays so."""

    @property
    def frames(self) -> int:
        """How many whole frames have gone by, control frames included."""

    def scan(self, data: bytes | bytearray | memoryview, stop_at_boundary: bool = False) -> int:
        """Walk over the next bytes of the direction.

        Args:
            data: The bytes that follow those scanned so far.
            stop_at_boundary: Whether to stop at the first frame boundary, which may be where the
                data begins.

        Returns:
            How many bytes were walked over: all, unless stopped; scan the others next.
        """

def fnv1a_32(data: bytes | bytearray | memoryview) -> int:
    """Return the 32-bit FNV-1a hash of the data, which rollouts split requests by."""

RUN_MORE: int
"""Bits of what :meth:`Relay.run` returns: call it again, something is left."""
RUN_NEWCOMERS: int
"""There are newcomers."""
RUN_REFUSED: int
"""There are refusals."""
RUN_EMPTIED: int
"""The last session of a generation has ended."""
RUN_PINNED: int
"""Sessions have found their target."""
DROP_REASONS: tuple[str, ...]
"""Why datagrams are dropped; the labels of metrics."""
END_REASONS: tuple[str, ...]
"""Why sessions end; the labels of metrics."""

def target_seed(text: bytes) -> int:
    """Return what a target is known by in :func:`rendezvous`: splitmix64 of its 64-bit FNV-1a."""

def rendezvous(key: bytes, seeds: Iterable[int], secret: int) -> int:
    """Choose a target for a key by rendezvous hashing (highest random weight).

    Args:
        key: What is chosen for; equal keys choose the same target.
        seeds: What :func:`target_seed` returned for each target.
        secret: 64 bits that all choices share.

    Returns:
        The place of the target whose splitmix64(FNV-1a(key, basis xor secret) xor seed) is highest.

    Raises:
        ValueError: there is no target.
    """

def look_at(
    data: bytes | bytearray | memoryview,
) -> tuple[str, int, int, bool, int, bool, tuple[int, ...], tuple[int, ...], bytes]:
    """Return what a relay makes of a datagram of a call; for tests.

    Returns:
        The kind (``other``, ``stun``, ``dtls``, ``turn``, ``rtp`` or ``rtcp``; RFC 7983, RFC 5761);
        of STUN the message type, and the code of an error response; of DTLS whether there is an
        alert from after the handshake; of RTP the source (SSRC); of RTCP whether it is a plain
        compound, and of such a one the senders of its reports, whom its BYE packets name, and the
        first CNAME.
    """

class SourcePorts:
    """Which source ports lead to which target address, for all relays of a proxy.

    The same port may lead to several addresses at once, but to each only once. Ports that other
    processes have are passed over, also those that another proxy chose like this.

    Args:
        low: The first port of the range.
        high: The last one.

    Raises:
        ValueError: these are no ports.
    """

    def __init__(self, low: int, high: int) -> None: ...
    def avoid(self, low: int, high: int) -> None:
        """Take no port from ``low`` to ``high`` from now on.

        Raises:
            ValueError: these are no ports.
        """

    def allow(self, low: int, high: int) -> None:
        """Take the ports from ``low`` to ``high`` again.

        Raises:
            ValueError: these are no ports.
        """

class Relay:
    """Moves the datagrams of one UDP service; see _relay.pxi for the design.

    It waits for nothing: whoever owns it waits for :meth:`fileno` to become readable and calls
    :meth:`run`. Listeners, targets, generations and sessions are known by numbers, which are used
    again once what they named is gone. Addresses are 16 bytes, IPv4 mapped into IPv6; the bytes of
    an end are an address followed by its port in network order. Every method but :meth:`close`
    raises ValueError once the relay is closed, and for numbers that name nothing.

    Args:
        seed: 16 random bytes for the hashes of the table of sessions.
        sockets: False for a relay that opens no upstream sockets and sends nothing to targets; for
            tests of its memory.

    Raises:
        OSError: there is no descriptor left.

    Attributes:
        RECORD_SIZE: Bytes of one session in what :meth:`export` returns.
        mode: 0: all datagrams pass; 1: newcomers' are dropped; 2: all are dropped.
        limit: Sessions that there may be; above it newcomers are dropped without asking, unless
            some session was never answered.
    """

    RECORD_SIZE: ClassVar[int]
    mode: int
    limit: int

    def __init__(self, seed: bytes, *, sockets: bool = True) -> None: ...
    def fileno(self) -> int:
        """Return the descriptor that is readable when :meth:`run` has something to do."""

    def close(self) -> None:
        """End all sessions and close all descriptors but the listeners'; harmless when repeated."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""

    @property
    def live(self) -> int:
        """How many sessions there are."""

    @property
    def full(self) -> bool:
        """Whether there are as many sessions as may be, without those that were let go."""

    @property
    def sockets(self) -> int:
        """How many upstream sockets are open."""

    @property
    def shed(self) -> int:
        """How many datagrams were dropped because there may be no further session."""

    @property
    def traffic(self) -> int:
        """How many datagrams were sent on."""

    @property
    def changes(self) -> int:
        """A number that differs when sessions have begun, ended, moved, joined or been pinned."""

    def listen(self, fd: int) -> int:
        """Read from a bound UDP socket of AF_INET6 or AF_INET, which must not block.

        Args:
            fd: Its descriptor; the caller closes it after :meth:`unlisten` or :meth:`close`.

        Returns:
            The listener's number.

        Raises:
            OSError: it is no such socket.
        """

    def unlisten(self, number: int) -> None:
        """Forget a listener; its sessions end."""

    def unlisten_all(self, numbers: Iterable[int]) -> None:
        """Forget many listeners at once; their sessions end."""

    def pair(self, rtp: int, rtcp: int) -> None:
        """Say that two listeners carry RTP and RTCP of the same sessions.

        Pairs that one of them was of are no more; sessions that have both halves go on.

        Raises:
            ValueError: it is the same one twice.
        """

    def add_target(self, host: str, port: int, scope: int = 0) -> int:
        """Return the number of a new target.

        Args:
            host: Numeric IP address.
            port: Port; 0 lets each session have the number of the port that its client sends to.
            scope: Number of the interface of a link-local address (RFC 4007).

        Raises:
            ValueError: the host is no IP address.
        """

    def drop_target(self, number: int) -> None:
        """Open no further session to a target; those that it has go on."""

    def set_down(self, target: int, down: bool) -> None:
        """Say whether a target is unhealthy: sessions without affinity pass it over."""

    def add_generation(
        self, idle: float, unanswered: float, *, affinity: bool = True, media: bool = False
    ) -> int:
        """Return the number of a new generation of sessions.

        Args:
            idle: Seconds without a datagram in either direction after which a session is over.
            unanswered: The same for one that no target has ever answered.
            affinity: Whether a session has one target; otherwise each datagram goes to the next.
            media: Whether its sessions may carry calls, WebRTC or RTP.

        Raises:
            ValueError: media without affinity.
        """

    def hurry(self, generation: int) -> None:
        """From now on, let sessions end that carry nothing for two seconds, with ICE for eight."""

    def let_go(self, generation: int) -> None:
        """Take the sessions of a generation without affinity from their clients.

        A client's next datagram begins another session. The old ones live on for answers that are
        on their way, until these cease for two seconds. Sessions with affinity go on as before.
        """

    def stuck(
        self, generation: int, target: int, seconds: float, count: int
    ) -> list[tuple[int, bytes, bytes]]:
        """Return sessions whose client goes on talking to a target that is silent.

        Args:
            generation: Whose sessions.
            target: Which target.
            seconds: For how long the client has waited for an answer; it was not silent itself for
                as long.
            count: How many at most.

        Returns:
            Each with its number, the client's and the local end.
        """

    def flows_to(self, target: int) -> int:
        """Return how many upstream sockets are connected to a target."""

    def adopt(self, former: int, generation: int, targets: Mapping[int, int]) -> None:
        """Make the sessions of some targets those of another generation; they notice nothing.

        Sessions without affinity stay.

        Args:
            former: The generation that they belong to.
            generation: The generation that they will belong to.
            targets: For each of their targets another number of the same address.
        """

    def drop_generation(self, number: int) -> None:
        """Forget a generation; it must have no session left."""

    def sessions(self, generation: int) -> int:
        """Return how many sessions a generation has."""

    def ended(self, generation: int) -> dict[str, int]:
        """Return how many sessions of a generation have ended, by reason."""

    def end_some(self, generation: int, count: int, *, removed: bool = False) -> int:
        """Cut some sessions of a generation.

        Args:
            generation: The generation.
            count: How many at most.
            removed: Whether the reason is that the service was removed, not a drain.

        Returns:
            How many sessions it still has.
        """

    def use_ports(self, ports: SourcePorts) -> None:
        """Choose upstream source ports from these, from now on, each once per target address.

        Otherwise the kernel chooses them, each once per host.

        Raises:
            ValueError: it uses others already.
        """

    def counters(self) -> dict[str, Any]:
        """Return all counters; those under ``dropped`` and ``ended`` are dicts by reason."""

    def run(self, milliseconds: int) -> int:
        """Move what waits; what newcomers sent before the last call is dropped.

        While much is moved, it waits a moment for more: up to 1 ms at a time where
        :meth:`interrupt_by` was called, otherwise 0.1 ms.

        Args:
            milliseconds: Time after which it returns, give or take a few hundred datagrams.

        Returns:
            The sum of ``RUN_*``.
        """

    def interrupt_by(self, fd: int) -> None:
        """Let a run that waits for more end when somebody else has something to do.

        Args:
            fd: What is readable then. It must stay open as long as the relay is.

        Raises:
            OSError: it can't be waited for.
        """

    def newcomers(self) -> list[tuple[int, int, bytes, bytes]]:
        """Return the clients without a session: number, listener, client's end, local end."""

    def opening(self, number: int) -> bytes:
        """Return the first Binding request that a newcomer sent, else its first datagram."""

    def partner(self, number: int) -> tuple[int, int, int] | None:
        """Return the session that a newcomer is the other half of, with its generation and target.

        That is one of the same client address on the other port of the pair, preferably from the
        port beside the newcomer's, which has no second half yet. The last 1,024 sessions of the
        address are looked at, and the last 32 for what would be dropped in a pause or a full table.
        """

    def has_session(self, number: int) -> bool:
        """Return whether a newcomer has a session whose target does not seem to know it.

        What it sends goes there nevertheless; other targets may be asked with :meth:`ask`.
        """

    def ask(
        self,
        number: int,
        targets: Sequence[int],
        key: int,
        header: bytes = b"",
        *,
        bare: Container[int] = (),
    ) -> bool:
        """Ask targets whether the client of a session is their own; it goes on meanwhile.

        Its Binding requests go to them too for ten seconds. The first that answers as only the
        client's own would becomes the session's, which :meth:`pins` tells.

        Args:
            number: The newcomer.
            targets: The targets; the session's own is passed over.
            key: 64 bits that are not all 0, as for :meth:`admit`.
            header: As for :meth:`admit`.
            bare: As for :meth:`admit`.

        Returns:
            False if there is no such session any more, others are asked already, or it is a pair.

        Raises:
            OSError: no socket can be had, or a target can't be reached; nobody is asked.
        """

    def join(self, number: int, session: int, header: bytes = b"") -> None:
        """Make a newcomer the second half of a session, as :meth:`partner` returned it.

        Raises:
            OSError: no socket can be had, or the target can't be reached.
            ValueError: the session has ended, or is whole.
        """

    @property
    def undecided(self) -> int:
        """How many sessions others are asked for: they have no target yet, or seem to be lost."""

    @property
    def pairs(self) -> int:
        """How many sessions have both ports of a pair; it looks at all sessions."""

    def undecided_from(self, number: int) -> int:
        """Return how many of :attr:`undecided` are of a newcomer's network.

        That is its address, of IPv6 its /64: what one host has.
        """

    def cease_asking(self, number: int | None = None) -> bool:
        """Ask no more for the client that others are asked for longest, if that has been a second.

        A session that has no target yet ends; any other one goes on with its own.

        Args:
            number: A newcomer whose network alone is looked at; without one all are.

        Returns:
            False if there is none.
        """

    def pins(self) -> list[tuple[int, int, int, int]]:
        """Return the sessions that found their target in the last run.

        Each with its number, its key, the target, and the generation that it has begun in.
        """

    def ask_again(self) -> None:
        """Ask nobody any more: with their next request, clients are newcomers again.

        Sessions that have no target yet end.
        """

    def assign(self, session: int, generation: int) -> bool:
        """Make a session one of another generation; False if it has ended."""

    def end(self, session: int) -> bool:
        """Cut a session; False if it has ended."""

    def begin_goodbye(self, generation: int) -> None:
        """Let :meth:`goodbyes` begin anew."""

    def goodbyes(
        self, generation: int, count: int
    ) -> list[tuple[int, bool, tuple[int, ...], bytes, tuple[int, ...], bytes]]:
        """Return the next sessions of a generation that a goodbye is due to.

        Sessions that begin meanwhile are left out, and those without media or a target.

        Args:
            generation: The generation.
            count: How many at most.

        Returns:
            Each with its number, whether it is encrypted, and the sources (SSRC) and the CNAME that
            its client, then its target, has shown.
        """

    def say_goodbye(self, session: int, to_client: bytes, to_target: bytes) -> bool:
        """Send RTCP to both sides of a session; nothing where there are no bytes.

        Returns:
            False if the session has ended, or it is not known where its RTCP goes: no second half
            of a pair, and no RTCP was seen on the first.

        Raises:
            ValueError: more than 1,472 bytes.
        """

    def following(self, number: int) -> tuple[int, int] | None:
        """Return generation and target of a live session of a newcomer's address, if any."""

    def admit(
        self,
        number: int,
        generation: int,
        targets: Sequence[int],
        header: bytes = b"",
        *,
        asking: int = 0,
        bare: Container[int] = (),
    ) -> None:
        """Begin the session of a newcomer and send on what it has sent so far.

        In a pause that is dropped instead: who was asked about then seemed to be half of a session.

        Args:
            number: The newcomer.
            generation: The generation that the session belongs to.
            targets: Its target; without affinity, all of them.
            header: What each datagram to the target begins with, at most 52 bytes.
            asking: Where it is not known whose client it is, 64 bits for :meth:`pins` to tell it
                by. Its Binding requests go to all targets until one answers as only the client's
                own would; all else of the client is dropped, and what the others say held back.
            bare: Those of the targets whose datagrams begin with no header nevertheless.

        Raises:
            OSError: no socket can be had, or the target can't be reached.
        """

    def refuse(self, number: int, reason: str) -> None:
        """Drop what a newcomer has sent, for one of ``DROP_REASONS``."""

    def evict(self) -> bool:
        """End the oldest session that was never answered, if it has lived for a second.

        Returns:
            False if there is none.
        """

    def refusals(
        self,
    ) -> list[tuple[int, int, int, bool, bool, int, int, float, bytes, bytes]]:
        """Return the sessions whose target's port was found closed during the last run.

        Each once; those without affinity once for each such target. Each with its number,
        generation and target; whether it has affinity and was ever answered;
        how often it has moved; how often it was refused since it last heard from the target, and
        the seconds between the first and the last of these; the client's and the local end.
        """

    def move(self, session: int, generation: int, target: int) -> bool:
        """Move a session to another target, from another source port.

        One that was never answered sends its first datagram again, if that was small.

        Returns:
            False if the session has ended.

        Raises:
            OSError: no socket can be had, or the target can't be reached; nothing has changed.
        """

    def export(self, generation: int, numbers: Mapping[int, int]) -> bytes:
        """Return the sessions of a generation as records of ``udp.saved_sessions.RECORD``.

        Sessions without affinity, and those of other targets, are left out.

        Args:
            generation: The generation.
            numbers: What records have for each target.
        """

    def restore(
        self,
        listener: int,
        client: bytes,
        scope: int,
        local: bytes,
        generation: int,
        target: int,
        port: int,
        answered: bool,
        idle: float,
        header: bytes = b"",
        *,
        second: bool = False,
    ) -> bool:
        """Begin a session that an earlier process had, or give one its other half.

        Args:
            listener: Its listener.
            client: The client's end.
            scope: Number of the interface of a link-local client, otherwise 0.
            local: Address that the client sends to, 16 bytes.
            generation: The generation that it belongs to.
            target: Its target.
            port: The source port that the target knows it by.
            answered: Whether the target has ever answered it.
            idle: Seconds since its last datagram.
            header: As for :meth:`admit`.
            second: Whether it is the other half, of a pair of ports, of the one restored before.

        Returns:
            False if it has become that half; otherwise it is a session.

        Raises:
            OSError: the source port is taken, or no socket can be had.
            ValueError: there is such a session already.
        """
