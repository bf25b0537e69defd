"""When the sessions of all UDP services are saved, and what a new process finds of them.

Only what differs is worth a write. What is inside the file is ``saved_sessions``' business, how it
is written ``session_store``'s, and what becomes of what was found each service's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from kamal_proxy.errors import StateError
from kamal_proxy.udp.deployment import UNANSWERED
from kamal_proxy.udp.saved_sessions import SessionsFormatError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kamal_proxy.logs import Log
    from kamal_proxy.udp.saved_sessions import ServiceSessions
    from kamal_proxy.udp.service import UdpService
    from kamal_proxy.udp.session_store import SessionStore

_SAVE_INTERVAL = 5.0  # seconds between two looks whether the sessions have changed
_SAVED_PER_SECOND = 4_000  # sessions; encoding so many takes less than a millisecond


class SessionSaving:
    """The sessions of a proxy, from one process to the next.

    Args:
        store: Where they are saved.
        services: Those whose sessions are saved, by name, as they are at each moment.
        log: Where is said what could not be saved or read.
        thread: Bounds the threads that write.
    """

    def __init__(
        self,
        store: SessionStore,
        services: Mapping[str, UdpService],
        log: Log,
        *,
        thread: trio.CapacityLimiter,
    ) -> None:
        self._store = store
        self._services = services
        self._log = log
        self._thread = thread
        self._saved_mark: tuple[object, object] = ([], [])  # nothing is saved of no service

    async def load(self) -> dict[str, tuple[ServiceSessions, float]]:
        """Return the saved sessions by service, with the time when they were saved."""
        try:
            content = await trio.to_thread.run_sync(self._store.load, limiter=self._thread)
            if content is None:
                return {}
            document = decode(content)
        except (StateError, SessionsFormatError) as error:
            self._log.warning(
                "UDP sessions can't be restored", path=self._store.path, error=str(error)
            )
            return {}
        return {sessions.name: (sessions, document.saved_at) for sessions in document.services}

    async def run(self) -> None:
        """Save the sessions every few seconds if there are others than before.

        Those that only go on are saved more seldom, but often enough that the time since their last
        datagram, which is saved too, does not make a restarted proxy take them for over.
        """
        told, saved_at = "", trio.current_time()
        while True:
            live = sum(service.relay.live for service in self._services.values())
            await trio.sleep(max(_SAVE_INTERVAL, live / _SAVED_PER_SECOND))
            mark = self._mark()
            age = trio.current_time() - saved_at
            is_same = mark[0] == self._saved_mark[0]
            if mark == self._saved_mark or (is_same and age < self._shortest_patience() / 4):
                continue
            try:
                content = self._encode()
                await trio.to_thread.run_sync(self._store.save, content, limiter=self._thread)
                self._saved_mark, told, saved_at = mark, "", trio.current_time()
            except Exception as error:  # a full disk, no thread to be had: never worth the proxy
                if str(error) != told:
                    told = str(error)
                    self._log.warning("UDP sessions not saved", error=told)

    def save_now(self) -> None:
        """Save the sessions now, blocking: nothing is moved any more, the process ends."""
        if self._mark() == self._saved_mark == ([], []):
            return
        try:
            self._store.save(self._encode())
        except (StateError, SessionsFormatError) as error:
            self._log.warning("UDP sessions not saved", error=str(error))

    def _encode(self) -> bytes:
        return encode(time.time(), [service.sessions() for service in self._services.values()])

    def _mark(self) -> tuple[object, object]:
        """Return what differs when sessions begin, end or move, and when they only go on."""
        relays = [(service.name, service.relay) for service in self._services.values()]
        return (
            [(name, relay.changes) for name, relay in relays],
            [(name, relay.traffic) for name, relay in relays],
        )

    def _shortest_patience(self) -> float:
        """Return the seconds after which the first of the sessions that are quiet may be over."""
        timeouts = (
            service.options.sessions.timeout
            for service in self._services.values()
            if service.options is not None
        )
        return min(UNANSWERED, *timeouts, UNANSWERED)
