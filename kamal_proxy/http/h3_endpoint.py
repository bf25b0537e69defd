"""One UDP socket that speaks QUIC: many connections, one task, no trust in what arrives.

Routes datagrams by connection id, so that a client may change its address; keeps the timers of all
connections; asks clients to prove their address when many handshakes are open. What is said on a
connection once its handshake is complete is the business of the :class:`Application` that is made
for it. Nothing that arrives raises past its connection.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from typing import TYPE_CHECKING

import trio
from aioquic.quic.events import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionTerminated,
    HandshakeCompleted,
    StreamDataReceived,
)
from aioquic.quic.packet import QuicErrorCode

from kamal_proxy.http import h3_packets
from kamal_proxy.http.h2_guard import MEMORY, WORK
from kamal_proxy.http.h3_link import Limits, Link, network_of
from kamal_proxy.http.h3_quic import VERSIONS, ServerQuic, server_configuration
from kamal_proxy.http.h3_socket import Path, receive_nowait, send_nowait

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kamal_proxy.http.h3_link import Application
    from kamal_proxy.logs import Log
    from kamal_proxy.tls.certificates import Certificate

#: Handshakes from addresses that are not proven, from all that is open at once; with more, clients
#: are asked to prove theirs (a round trip more), so that nobody needs to believe a flood.
MAX_UNPROVEN = 64
#: Handshakes that may be open at once, and those of one address (of one IPv6 network of 64 bits).
MAX_HANDSHAKES = 1024
MAX_HANDSHAKES_PER_ADDRESS = 64
#: Bytes that all connections together may hold of what clients sent and nobody has taken.
MAX_HELD = 256 * 1024 * 1024
#: A single connection that holds no more is never closed because of the others.
_SMALL_HOLD = 64 * 1024

_BATCH = 32  # datagrams, until other tasks have their turn
_TURN = 0.01  # seconds, likewise: a datagram may hold a thousand frames

# What useful things earn; see ``h3_link.WORK_BURST``. In seconds.
_WORK_PER_BYTE = 0.5e-6  # of a stream
_WORK_PER_FULL_DATAGRAM = 0.6e-3  # that was sent: the client acknowledges it
_FULL = 1000  # bytes
_PAUSE = 0.1  # seconds after the kernel could not give a datagram
_FAREWELLS = {1, 2, 4, 8, 16, 32, 64}  # datagrams after the end of a connection that are answered
_EXCESSIVE_LOAD = 0x107  # RFC 9114 8.1


class QuicEndpoint:
    """The QUIC server on one UDP socket.

    Args:
        sock: From :func:`kamal_proxy.http.h3_socket.listen_quic`; the caller closes it.
        limits: What it counts together with the other endpoints.
        select: See :class:`kamal_proxy.http.h3_quic.ServerQuic`.
        open_application: Makes what is spoken on a connection whose handshake is complete.
        log: For what is wrong with this host or this program; not for what clients do.
        idle_timeout: Seconds without a sign of the client after which a connection is given up.
        handshake_timeout: Seconds that a handshake may take.
        count_flood: Counts a connection that is closed for making work, with the reason.
    """

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        select: Callable[[str], Certificate | None],
        open_application: Callable[[Link], Application],
        log: Log,
        *,
        idle_timeout: float,
        handshake_timeout: float,
        count_flood: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._sock = sock
        self.limits = limits
        self._select = select
        self._open_application = open_application
        self._log = log
        self._count_flood = count_flood
        self._handshake_timeout = handshake_timeout
        self._configuration = server_configuration(idle_timeout)
        self._retries = h3_packets.Retries()
        self._links: dict[bytes, Link] = {}
        self._dirty: list[Link] = []
        # The heap knows connections by number only: what is long over leaves little in it.
        self._timers: list[tuple[float, int]] = []
        self._timed: dict[int, Link] = {}
        self._numbers = itertools.count()
        self._waiting: trio.CancelScope | None = None

    async def run(self) -> None:
        """Serve until cancelled; connections that are open then are closed without a wait."""
        try:
            while True:
                await self._wait()
                try:
                    self._receive()
                except OSError as error:
                    self._log.error("Receiving datagrams is paused", error=str(error))
                    await trio.sleep(_PAUSE)
                self._fire()
                self._flush()
                # What was received woke other tasks; they have their turn, whatever waits here.
                await trio.lowlevel.checkpoint()
        finally:
            self._abandon()

    def touch(self, link: Link) -> None:
        """Have what a connection wants to send sent at the end of this turn."""
        if not link.dirty:
            link.dirty = True
            self._dirty.append(link)
            if self._waiting is not None:
                self._waiting.cancel(reason="something is to be sent")

    def send_now(self, link: Link) -> None:
        """Send what a connection wants to send, as far as it may be sent now."""
        if not link.ids:
            return  # it has ended
        try:
            self._send(link)
        except Exception as error:
            self._break(link, error)

    async def _wait(self) -> None:
        """Wait until a datagram arrives, a timer is due, or something is to be sent."""
        if self._dirty:
            return
        with trio.CancelScope(deadline=self._timers[0][0] if self._timers else math.inf) as scope:
            self._waiting = scope
            try:
                await trio.lowlevel.wait_readable(self._sock)
            finally:
                self._waiting = None

    # Datagrams in

    def _receive(self) -> None:
        end = time.thread_time() + _TURN
        for _ in range(_BATCH):
            received = receive_nowait(self._sock)
            if received is None:
                return
            data, path = received
            try:
                link = self._find(data, path)
            except Exception as error:  # a bug must cost one datagram
                self._log.error(
                    "Datagram failed", client_addr=path.address[0], error=repr(error), proto="quic"
                )
                continue
            if link is not None:
                self._hand_over(link, data, path)
            if time.thread_time() > end:
                return

    def _find(self, data: bytes, path: Path) -> Link | None:
        """Return the connection of a datagram; make one for a client's first packet."""
        if not h3_packets.is_long(data):
            return self._links.get(h3_packets.destination_of(data))
        header = h3_packets.parse_long_untrusted(data)
        if header is None or header.version == 0:
            return None
        if header.version not in VERSIONS:
            # Not to a small datagram: the answer must not be longer (RFC 9000 6.1).
            if len(data) >= h3_packets.SMALLEST_INITIAL:
                send_nowait(self._sock, h3_packets.version_negotiation(header), path)
            return None
        link = self._links.get(header.destination)
        if link is None and (initial := h3_packets.parse_initial_untrusted(data)) is not None:
            return self._admit(initial, path)
        return link

    def _admit(self, initial: h3_packets.Initial, path: Path) -> Link | None:
        """Open a connection, or answer without one: with a Retry, or a refusal."""
        limits = self.limits
        now = trio.current_time()
        original: bytes | None = initial.destination
        if initial.token:
            original = self._retries.redeem(initial, path.peer, now)
        if original is None:
            self._refuse(initial, path, QuicErrorCode.INVALID_TOKEN)
            return None
        if limits.closing or limits.connections >= limits.max_connections:
            self._refuse(initial, path, QuicErrorCode.CONNECTION_REFUSED)
            return None
        proven = bool(initial.token)
        if not proven and limits.unproven >= MAX_UNPROVEN:
            send_nowait(self._sock, self._retries.retry(initial, path.peer, now), path)
            return None
        if proven and (
            limits.handshakes >= MAX_HANDSHAKES
            or limits.proven.get(network_of(path), 0) >= MAX_HANDSHAKES_PER_ADDRESS
        ):
            self._refuse(initial, path, QuicErrorCode.CONNECTION_REFUSED)
            return None
        quic = ServerQuic(
            self._configuration,
            self._select,
            original_destination_connection_id=original,
            retry_source_connection_id=initial.destination if proven else None,
        )
        link = Link(self, quic, path, now + self._handshake_timeout, proven=proven)
        self._count_handshake(link, 1)
        limits.connections += 1
        for connection_id in (initial.destination, quic.host_cid):
            self._route(connection_id, link)
        return link

    def _refuse(self, initial: h3_packets.Initial, path: Path, error: QuicErrorCode) -> None:
        send_nowait(self._sock, h3_packets.refusal(initial, error), path)

    def _count_handshake(self, link: Link, change: int) -> None:
        limits = self.limits
        limits.handshakes += change
        if not link.proven:
            limits.unproven += change
            return
        count = limits.proven.get(link.address_key, 0) + change
        if count:
            limits.proven[link.address_key] = count
        else:
            del limits.proven[link.address_key]

    def _hand_over(self, link: Link, data: bytes, path: Path) -> None:
        if link.quic.is_ending:
            if link.quic.is_deaf:
                self._repeat_farewell(link)
            return
        began = time.thread_time()
        try:
            link.quic.receive_datagram(data, path, now=trio.current_time())
            if not link.quic.is_begun:
                self._forget(link)  # it was no first packet after all
                return
            self._pump(link)
        except Exception as error:  # a bug, of aioquic's say, must cost one connection
            self._break(link, error)
            return
        self.touch(link)
        if not link.work.take(time.thread_time() - began, trio.current_time()):
            self._tire(link)

    def _tire(self, link: Link) -> None:
        """Close a connection that costs too much for what is done on it."""
        if not link.quic.is_ending:
            words = "too much work for nothing"
            self._log.warning(
                "HTTP/3 connection closed", client_addr=link.path.address[0], error=words
            )
            self._count_flood(WORK)
            link.close(_EXCESSIVE_LOAD, words)

    def _repeat_farewell(self, link: Link) -> None:
        """Say again that a connection is closed, ever more rarely (RFC 9000 10.2.1)."""
        link.farewells += 1
        if link.farewell is not None and link.farewells in _FAREWELLS:
            send_nowait(self._sock, *link.farewell)

    def _pump(self, link: Link) -> None:
        """Pass on what has happened on a connection."""
        while (event := link.quic.next_event()) is not None:
            if isinstance(event, ConnectionIdIssued):
                self._route(event.connection_id, link)
            elif isinstance(event, ConnectionIdRetired):
                self._unroute(event.connection_id, link)
            elif isinstance(event, ConnectionTerminated):
                self._forget(link)
                return
            elif isinstance(event, HandshakeCompleted):
                link.application = self._open_application(link)
                link.give_up_at = math.inf
                self._count_handshake(link, -1)
            elif link.application is not None:
                if isinstance(event, StreamDataReceived):
                    link.earn(len(event.data) * _WORK_PER_BYTE)
                link.application.handle(event)
        if link.quic.is_ending:
            self._tell(link)
        elif link.application is not None:
            link.application.progress()
        self._count_held(link)

    def _count_held(self, link: Link) -> None:
        limits, quic = self.limits, link.quic
        # What is ending is as good as gone: the others must not have to go for it as well.
        held = 0 if quic.is_ending else quic.held
        if held > _SMALL_HOLD and limits.held + held - link.held > MAX_HELD:
            self._count_flood(MEMORY)
            link.close(_EXCESSIVE_LOAD, "too much data that nobody reads")
            self._tell(link)
            held = 0
        limits.held += held - link.held
        link.held = held

    # Time, and datagrams out

    def _fire(self) -> None:
        now = trio.current_time()
        timers = self._timers
        while timers and timers[0][0] <= now:
            _, number = heapq.heappop(timers)
            link = self._timed.pop(number, None)
            if link is None:
                continue  # it has ended, or was looked at earlier
            link.scheduled = math.inf
            try:
                if now >= link.give_up_at:
                    link.give_up_at = math.inf
                    link.quic.close(error_code=QuicErrorCode.CONNECTION_REFUSED)
                timer = link.quic.get_timer()
                if timer is not None and timer <= now:
                    link.quic.handle_timer(now=now)
                self._pump(link)
            except Exception as error:
                self._break(link, error)
                continue
            self.touch(link)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for link in dirty:
            link.dirty = False
            if not link.ids:
                continue  # it has ended
            try:
                self._send(link)
                # Sending tells of new connection ids.
                self._pump(link)
            except Exception as error:
                self._break(link, error)

    def _send(self, link: Link) -> None:
        quic = link.quic
        was_deaf = quic.is_deaf
        now = trio.current_time()
        for data, path in quic.datagrams_to_send(now=now):
            send_nowait(self._sock, data, path)
            if len(data) >= _FULL:
                link.earn(_WORK_PER_FULL_DATAGRAM)
            if quic.is_deaf and not was_deaf:
                link.farewell = data, path
        timer = quic.get_timer()
        when = min(math.inf if timer is None else timer, link.give_up_at)
        if when < link.scheduled:
            self._timed.pop(link.number, None)
            link.scheduled = when
            link.number = next(self._numbers)
            self._timed[link.number] = link
            heapq.heappush(self._timers, (when, link.number))

    # Beginning and end

    def _route(self, connection_id: bytes, link: Link) -> None:
        self._links[connection_id] = link
        link.ids.add(connection_id)

    def _unroute(self, connection_id: bytes, link: Link) -> None:
        if connection_id in link.ids:
            link.ids.discard(connection_id)
            del self._links[connection_id]

    def _tell(self, link: Link) -> None:
        """Tell whoever served a connection that it has ended."""
        if not link.told:
            link.told = True
            if link.application is not None:
                link.application.lost()

    def _break(self, link: Link, error: Exception) -> None:
        self._log.error(
            "Connection failed", client_addr=link.path.address[0], error=repr(error), proto="quic"
        )
        self._forget(link)

    def _forget(self, link: Link) -> None:
        if not link.ids:
            return
        for connection_id in link.ids:
            del self._links[connection_id]
        link.ids.clear()
        self._timed.pop(link.number, None)
        self.limits.connections -= 1
        self.limits.held -= link.held
        self.limits.output -= link.output
        if link.application is None:
            self._count_handshake(link, -1)
        self._tell(link)

    def _abandon(self) -> None:
        """Close what is still open: nobody waits for the answer any more."""
        for link in set(self._links.values()):
            link.quic.close()
            try:
                for data, path in link.quic.datagrams_to_send(now=trio.current_time()):
                    send_nowait(self._sock, data, path)
            except Exception as error:
                self._break(link, error)
            else:
                self._forget(link)
