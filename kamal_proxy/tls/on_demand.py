"""Whether a host that nobody has named in a deploy may have a certificate: its application says.

Every stranger can make a handshake for any name. So each name is asked about once at a time, a
denial is remembered for a while, and the questions have a rate that no flood exceeds.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from kamal_proxy.matching import is_dns_name

if TYPE_CHECKING:
    from kamal_proxy.logs import Log
    from kamal_proxy.tls.selection import Served

ALLOWED = 200  # the only status that means yes
TIMEOUT = 2.0  # seconds for an answer
SHOWN = 256  # bytes of a denial's body in the log
DENIAL_LASTS = 60.0  # seconds
RATE = 10.0  # questions a second, in the long run
BURST = 100.0  # questions at once

_MAX_DENIALS = 10_000
_MAX_THREADS = 10


@attrs.frozen
class Answer:
    """What an application answered: the status, and the beginning of the body."""

    status: int
    body: bytes


class Ask(Protocol):
    """Asks a service itself; raises OSError if it can't be asked."""

    async def __call__(self, service: str, path: str, host: str) -> Answer:
        """Send ``GET path`` with this Host to one of its targets."""


class OnDemand:
    """Asks, and remembers.

    Args:
        ask_service: Asks a path of a service.
        log: Where denials are told.
    """

    def __init__(self, ask_service: Ask, log: Log) -> None:
        self._ask_service = ask_service
        self._log = log
        self._limiter = trio.CapacityLimiter(_MAX_THREADS)
        self._denied: OrderedDict[tuple[str, str], float] = OrderedDict()  # until when
        self._asking: dict[tuple[str, str], _Question] = {}
        self._allowance = BURST
        self._counted_at = trio.current_time()
        self._refused_at = float("-inf")

    async def allows(self, service: Served, host: str) -> bool:
        """Return whether the application of a service wants a certificate for a host."""
        if not is_dns_name(host):
            return False
        # A deploy with another URL is to be asked anew.
        key = (service.options.tls_on_demand_url, host)
        while (question := self._asking.get(key)) is not None:
            await question.over.wait()
            if question.allowed is not None:
                return question.allowed
            # Whose question it was is gone.
        if self._denied.get(key, 0.0) > trio.current_time() or not self._spend():
            return False
        question = self._asking[key] = _Question()
        try:
            question.allowed = await self._ask(service, host)
            if not question.allowed:
                self._deny(key)
        finally:
            del self._asking[key]
            question.over.set()
        return question.allowed

    def _spend(self) -> bool:
        now = trio.current_time()
        self._allowance = min(BURST, self._allowance + (now - self._counted_at) * RATE)
        self._counted_at = now
        if self._allowance >= 1:
            self._allowance -= 1
            return True
        if now - self._refused_at > DENIAL_LASTS:
            self._refused_at = now
            self._log.warning(
                "TLS on-demand: too many names are asked for; some handshakes are refused",
                per_second=RATE,
            )
        return False

    def _deny(self, key: tuple[str, str]) -> None:
        self._denied[key] = trio.current_time() + DENIAL_LASTS
        self._denied.move_to_end(key)
        if len(self._denied) > _MAX_DENIALS:
            self._denied.popitem(last=False)

    async def _ask(self, service: Served, host: str) -> bool:
        url = service.options.tls_on_demand_url
        fields = {"service": service.name, "host": host, "url": url}
        try:
            with trio.fail_after(TIMEOUT):
                if url.startswith("/"):
                    answer = await self._ask_service(service.name, with_host(url, host), host)
                else:
                    answer = await trio.to_thread.run_sync(
                        _get, url, host, abandon_on_cancel=True, limiter=self._limiter
                    )
        except trio.TooSlowError:
            self._log.error("TLS on-demand: no answer", **fields, error=f"none in {TIMEOUT:g}s")
            return False
        except (OSError, RuntimeError) as error:  # no connection, or no thread
            self._log.error("TLS on-demand: no answer", **fields, error=str(error))
            return False
        if answer.status == ALLOWED:
            return True
        self._log.warning(
            "TLS on-demand: denied",
            **fields,
            status=answer.status,
            body=answer.body[:SHOWN].decode("utf-8", "replace"),
        )
        return False


class _Question:
    """One that is being asked, and those who wait for its answer."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.allowed: bool | None = None


def with_host(url: str, host: str) -> str:
    """Return a URL, or the path of one, with the host in its query."""
    base, mark, query = url.partition("#")[0].partition("?")
    return f"{base}?{query}&host={host}" if mark and query else f"{base}?host={host}"


def _get(url: str, host: str) -> Answer:
    """Ask over the network; blocks. What is wrong with it is an OSError."""
    # Here, because they take 8 MiB that most proxies do not need.
    import requests
    from urllib3.exceptions import HTTPError

    with requests.Session() as session:
        # The application is asked itself, with nobody's passwords.
        session.trust_env = False
        with session.get(
            with_host(url, host),
            headers={
                "Host": host,
                "User-Agent": "kamal-proxy",
                "Accept": "*/*",
                "Accept-Encoding": "identity",  # people read it in the log
            },
            timeout=TIMEOUT,
            allow_redirects=False,
            stream=True,
        ) as response:
            body = b""
            if response.status_code != ALLOWED:
                # That it is incomplete changes nothing.
                with contextlib.suppress(OSError, HTTPError):
                    body = response.raw.read(SHOWN)
            return Answer(response.status_code, body)
