"""The addresses of a target: looking its name up, and again every now and then.

A look-up that fails takes nothing away: the last known addresses stay. What new addresses mean for
sessions is the caller's business.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
from typing import TYPE_CHECKING, ClassVar, TypeAlias, cast

import trio

from kamal_proxy import lookups
from kamal_proxy.errors import KamalProxyError
from kamal_proxy.lookups import resolve_nowait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kamal_proxy.logs import Log
    from kamal_proxy.lookups import ResolvedAddress

#: Host and port of IPv4; host, port, flow label and scope of IPv6. Hosts are numeric.
SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

LOOKUP_INTERVAL = 30.0  # seconds
_SHORTEST_INTERVAL = 1.0  # seconds; however often a target refuses
_JITTER = 0.1  # of the interval, so that many targets do not ask at the same moment
_TELL_INTERVAL = 60.0  # seconds


class LookupFailedError(KamalProxyError):
    """A target's name can't be resolved; the sentence names it."""

    code: ClassVar[str] = "lookup_failed"


class TargetName:
    """The host and port of a UDP target, and what they stand for.

    Args:
        host: Name or IP address.
        port: Port.
        lookups: Bounds the threads that wait for the name service.

    Attributes:
        addresses: What the name stands for, in the resolver's order; IPv4 in IPv6 is told as IPv4.
            Empty until a name was first resolved; known at once for an IP address.
    """

    def __init__(self, host: str, port: int, lookups: trio.CapacityLimiter) -> None:
        self._host = host
        self._port = port
        self._lookups = lookups
        self._looked_up_at = -math.inf
        self._poked = trio.Event()
        self.addresses: tuple[SocketAddress, ...] = ()
        with contextlib.suppress(UnicodeError):  # which resolve() reports
            self.addresses = _numeric(resolve_nowait(host, port, socket.SOCK_DGRAM))
        self._is_name = not self.addresses

    def __repr__(self) -> str:
        return f"<TargetName {self._host}:{self._port} addresses={self.addresses}>"

    def poke(self) -> None:
        """Have the name looked up soon: an address refused, so the target may have moved."""
        self._poked.set()

    async def resolve(self) -> bool:
        """Look the name up once; tell whether it stands for other addresses than before.

        The resolver may tell the same addresses in any order; the order of before is kept then.

        Raises:
            LookupFailedError: it can't be resolved; the addresses stay as they were.
        """
        if not self._is_name:
            await trio.lowlevel.checkpoint()
            return False
        try:
            found = _numeric(
                await lookups.resolve(self._host, self._port, self._lookups, socket.SOCK_DGRAM)
            )
        except (OSError, UnicodeError) as error:
            raise LookupFailedError(why_not_resolved(self._host, error)) from error
        finally:
            self._looked_up_at = trio.current_time()
        if set(found) == set(self.addresses):
            return False
        self.addresses = found
        return True

    async def keep_fresh(
        self,
        log: Log,
        on_change: Callable[[], None],
        interval: float = LOOKUP_INTERVAL,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Look the name up again and again, until cancelled; return at once for an IP address.

        A name that was never resolved is looked up once a second until it is.

        Args:
            log: Where failures are logged: once for each new reason, and not more than one a
                minute.
            on_change: Called after ``addresses`` has changed.
            interval: Seconds between two look-ups, give or take a tenth; after a :meth:`poke` it is
                one second.
            task_status: Told at once.
        """
        target = f"{self._host}:{self._port}"
        told, told_at = "", -math.inf
        task_status.started()
        while self._is_name:
            await self._wait_due(interval)
            was = self.addresses
            try:
                changed = await self.resolve()
            except LookupFailedError as error:
                is_news = error.message != told and trio.current_time() - told_at >= _TELL_INTERVAL
                if is_news:
                    told, told_at = error.message, trio.current_time()
                say = log.warning if is_news else log.debug
                say("Target lookup failed", target=target, error=error.message)
                continue
            told = ""
            if changed:
                log.debug("Target address changed", target=target, to=self.addresses, was=was)
                on_change()
        await trio.lowlevel.checkpoint()

    async def _wait_due(self, interval: float) -> None:
        """Wait until the name has to be looked up."""
        wait = 0.0
        if self.addresses:
            wait = interval * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311
        with trio.move_on_at(self._looked_up_at + wait):
            await self._poked.wait()
        await trio.sleep_until(self._looked_up_at + _SHORTEST_INTERVAL)
        self._poked = trio.Event()  # a poke from now on may be about what is found now


def why_not_resolved(host: str, error: OSError | UnicodeError) -> str:
    """Return the sentence about a name for which :func:`kamal_proxy.lookups.resolve` raised."""
    # A label can be too long for a name service.
    reason = error.strerror if isinstance(error, OSError) else "malformed name"
    return f"can't resolve {host}: {reason}"


def _numeric(found: Iterable[ResolvedAddress]) -> tuple[SocketAddress, ...]:
    """Return each address once; IPv4 in IPv6 becomes IPv4."""
    addresses = (cast("SocketAddress", address) for _, address in found)
    return tuple(
        dict.fromkeys(
            (address[0].removeprefix("::ffff:"), address[1])
            if address[0].startswith("::ffff:")
            else address
            for address in addresses
        )
    )
