"""When certificate authorities want certificates to be renewed (RFC 9773): asked now and then.

One certificate after another, in a thread. An authority that suggests nothing, or does not answer,
changes nothing: then the age of the certificate decides.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import trio
from cryptography.hazmat.primitives.serialization import Encoding

from kamal_proxy.errors import AcmeError
from kamal_proxy.tls.schedule import DAY, HOUR, MINUTE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kamal_proxy.logs import Log
    from kamal_proxy.tls.hosts import Host

FIRST = 30.0  # seconds from a new certificate to the first question

_LEAST, _MOST = HOUR, DAY  # until the next question, whatever the authority says
_UNKNOWN = 6 * HOUR  # if it says nothing
_LOOK_AGAIN = 5 * MINUTE  # at the latest, whatever the clock says
_LIMIT = MINUTE  # for one question


class Suggestions:
    """Asks for the certificates of hosts.

    Args:
        hosts: Returns the hosts.
        on_answer: Called when the time for a host may have changed.
        log: Where it is told, at level debug, that an authority could not be asked.
        clock: Returns Unix time.
    """

    def __init__(
        self,
        hosts: Callable[[], Iterable[Host]],
        on_answer: Callable[[], object],
        log: Log,
        clock: Callable[[], float],
    ) -> None:
        self._hosts = hosts
        self._on_answer = on_answer
        self._log = log
        self._clock = clock
        self._limiter = trio.CapacityLimiter(1)
        self._news = trio.Event()

    def expect(self, host: Host) -> None:
        """Ask for a host soon: it has a new certificate."""
        host.suggested_at = None
        host.ask_at = self._clock() + FIRST
        self._news.set()

    def distrust_times(self) -> None:
        """Ask soon for all hosts: the clock was set back."""
        soon = self._clock() + FIRST
        for host in self._hosts():
            host.ask_at = min(host.ask_at, soon)
        self._news.set()

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            self._news = trio.Event()
            host = min(self._hosts(), key=lambda each: each.ask_at, default=None)
            wait = math.inf if host is None else host.ask_at - self._clock()
            if host is not None and wait <= 0:
                await self._ask(host)
            else:
                with trio.move_on_after(min(wait, _LOOK_AGAIN)):
                    await self._news.wait()

    async def _ask(self, host: Host) -> None:
        certificate = host.certificate
        if certificate is None or host.foreign:
            host.ask_at = math.inf
            return
        client = None
        wait = _UNKNOWN
        try:
            # In a thread, because the first time a library is loaded.
            client = await trio.to_thread.run_sync(
                host.authority.source.client, limiter=self._limiter
            )
            pem = certificate.chain[0].public_bytes(Encoding.PEM)
            with trio.move_on_after(_LIMIT):
                at, wait = await trio.to_thread.run_sync(
                    client.renewal_time, pem, limiter=self._limiter, abandon_on_cancel=True
                )
                if host.certificate is certificate:
                    host.suggested_at = at
        except AcmeError as error:
            self._log.debug("Renewal can't be asked for", host=host.name, error=str(error))
        except Exception as error:  # a bug must cost one answer, not all certificates
            self._log.error("Renewal can't be asked for", host=host.name, error=repr(error))
        finally:
            if client is not None:
                client.end()
        if host.certificate is certificate:
            spread = random.uniform(0.9, 1.1)  # noqa: S311
            host.ask_at = self._clock() + min(max(wait, _LEAST), _MOST) * spread
        self._on_answer()
