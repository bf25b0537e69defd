"""When the next attempt to obtain a certificate may be made; pure.

Certificate authorities limit what one account may ask for. The ledger remembers what was asked of
one of them and how it went; it is kept on disk, shared by all processes that use the account, and
says when the next order is within the limits. The defaults stay below Let's Encrypt's
(https://letsencrypt.org/docs/rate-limits/): 300 orders in 3 hours for an account, 5 failed
validations of a name in an hour, 5 certificates for one name in a week.
"""

from __future__ import annotations

import enum
import ipaddress
import json
import math
import re
from typing import Any

import attrs

MINUTE, HOUR, DAY, WEEK = 60.0, 3600.0, 86_400.0, 604_800.0

MAX_LEDGER = 8 * 1024 * 1024  # bytes
MAX_HOST = 240  # characters; a file of that name must have room for an ending
MAX_REASON = 500  # characters of a certificate authority's words that are kept

_ORDERS, _ORDERS_WITHIN = 280, 3 * HOUR
_FAILURES, _FAILURES_WITHIN = 4, HOUR
_DUPLICATES, _DUPLICATES_WITHIN = 4, WEEK
_FORCED_DUPLICATES = 5  # somebody who asks for it may use all that the authority gives
_REMEMBERED = 2000  # names of which nothing but the kind of challenge is known
_RENEWED_AT = 2 / 3  # of the lifetime
_SPREAD = 1 / 30  # of the lifetime; a server full of new hosts must not renew them all at once
_AT_THE_LATEST = 0.9  # of the lifetime, whatever the authority suggests
_AT_THE_EARLIEST = 0.1  # likewise
_BACK_OFF = (2 * MINUTE, 10 * MINUTE, 30 * MINUTE, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, 12 * HOUR)
_RESTARTED = 15 * MINUTE  # a proxy that was started anew need not wait longer after a failure
_LIMITED = HOUR  # how long a limit lasts if the authority does not say
_MAX_RETRY_AFTER = WEEK

# What data of another shape raises.
_NO_LEDGER = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_NAME = re.compile(r"(?=.*[a-z_-])[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_][a-z0-9_-]{0,62})*")


class Failure(enum.StrEnum):
    """What a failed attempt means for the next one."""

    REFUSED = "refused"  # the authority can't validate the name, or will not have it
    LIMITED = "limited"  # the authority has had enough of this name
    ALL_LIMITED = "all_limited"  # the same of this account
    ACCOUNT = "account"  # there is no account that could order anything
    UNREACHABLE = "unreachable"  # the authority does not answer, or nothing that makes sense
    WAITING = "waiting"  # nothing is wrong, but the limits of the account are reached
    STORE = "store"  # what would be obtained could not be kept
    ENDED = "ended"  # nobody wants the certificate any more


class LedgerError(ValueError):
    """A document is not a ledger."""


@attrs.frozen
class Permit:
    """When an order is within the limits.

    Attributes:
        at: Unix time; what is not later than now is a permit.
        why: What has to be waited for.
        everyone: Whether that holds for all hosts of the account.
    """

    at: float
    why: str = ""
    everyone: bool = False


@attrs.define(eq=False)
class _Host:
    """What is known of one name. Times are Unix time, ascending."""

    failed: list[float] = attrs.field(factory=list)  # validations, or not known to be done
    issued: list[float] = attrs.field(factory=list)  # certificates, or not known to be refused
    failures: int = 0  # attempts in a row
    failed_at: float = 0.0  # the last of them
    next_at: float = 0.0  # the back-off ends
    limited_until: float = 0.0  # by the authority
    reason: str = ""
    challenge: str = ""  # the kind by which it was validated the last time

    @property
    def matters(self) -> bool:
        """Whether it says more than by which kind of challenge the name was validated."""
        return bool(self.failed or self.issued or self.failures)


class Ledger:
    """What was asked of one certificate authority, and how it went."""

    def __init__(self) -> None:
        self._orders: list[float] = []
        self._limited_until = 0.0
        self._limited_why = ""
        self._hosts: dict[str, _Host] = {}

    def __len__(self) -> int:
        return len(self._hosts)

    def permit(
        self,
        host: str,
        now: float,
        *,
        lifetime: float = math.inf,
        forced: bool = False,
        fresh: bool = False,
    ) -> Permit:
        """Return when an order for a host is within the limits.

        Args:
            host: The name.
            now: Unix time.
            lifetime: Seconds that the certificate at hand was made for; those that last for a day
                must be renewed more often than a week's limit allows.
            forced: Whether somebody asks for it, who need not wait for the end of a back-off.
            fresh: Whether the proxy was started since the last attempt; somebody may have mended
                what was wrong.
        """
        permit = Permit(now)

        def not_before(at: float, why: str, *, everyone: bool = False) -> None:
            nonlocal permit
            if at > permit.at:
                permit = Permit(at, why, everyone)

        not_before(self._limited_until, self._limited_why, everyone=True)
        not_before(
            _room(self._orders, _ORDERS, _ORDERS_WITHIN),
            f"{_ORDERS} orders in 3 hours are enough for one account",
            everyone=True,
        )
        known = self._hosts.get(host)
        if known is None:
            return permit
        not_before(known.limited_until, known.reason)
        not_before(
            _room(known.failed, _FAILURES, _FAILURES_WITHIN),
            f"{_FAILURES} failed validations in an hour are enough for one name",
        )
        allowed = _FORCED_DUPLICATES if forced else _DUPLICATES
        # Three times as often as the lifetime demands.
        allowed = max(allowed, math.ceil(min(3 * WEEK / max(lifetime, 1.0), 1e9)))
        not_before(
            _room(known.issued, allowed, _DUPLICATES_WITHIN),
            f"{allowed} certificates in a week are enough for one name",
        )
        if not forced:
            back_off_ends = known.next_at
            if fresh:
                back_off_ends = min(back_off_ends, known.failed_at + _RESTARTED)
            not_before(back_off_ends, known.reason)
        return permit

    def challenge(self, host: str) -> str:
        """Return the kind of challenge by which a host was validated the last time, or nothing."""
        known = self._hosts.get(host)
        return known.challenge if known else ""

    def reason(self, host: str) -> str:
        """Return why the last attempt for a host failed; empty if it did not."""
        known = self._hosts.get(host)
        return known.reason if known else ""

    def order(self, now: float) -> None:
        """Note that an order is about to be made."""
        self._orders.append(now)

    def validating(self, host: str, now: float) -> None:
        """Note that the authority is about to look at a host: until it is done, it has failed."""
        self._known(host).failed.append(now)

    def validated(self, host: str, begun_at: float) -> None:
        """Note that what began then did not fail."""
        _remove(self._known(host).failed, begun_at)

    def issuing(self, host: str, now: float) -> None:
        """Note that a certificate is about to be issued: until it is refused, it counts."""
        self._known(host).issued.append(now)

    def not_issued(self, host: str, begun_at: float) -> None:
        """Note that what was asked for then was refused."""
        _remove(self._known(host).issued, begun_at)

    def succeed(self, host: str, challenge: str) -> None:
        """Note that a certificate was issued; ``challenge`` is what was validated, if anything."""
        known = self._known(host)
        known.failures, known.next_at, known.reason = 0, 0.0, ""
        known.challenge = challenge or known.challenge

    def fail(
        self,
        host: str,
        now: float,
        kind: str,
        reason: str,
        *,
        retry_after: float | None = None,
        spread: float = 0.0,
    ) -> None:
        """Note that an attempt failed.

        Args:
            host: The name.
            now: Unix time.
            kind: A :class:`Failure`.
            reason: Why, in the authority's words.
            retry_after: Seconds for which the authority asked to be left alone.
            spread: From 0 to 1, by chance: how much longer than needed to wait.
        """
        if kind == Failure.ALL_LIMITED:
            self._limited_until = now + _limit(retry_after)
            self._limited_why = reason[:MAX_REASON]
            return
        known = self._known(host)
        known.reason = reason[:MAX_REASON]
        if kind == Failure.LIMITED:
            known.limited_until = now + _limit(retry_after)
            return
        step = min(known.failures, len(_BACK_OFF) - 1)
        known.failures += 1
        known.failed_at = now
        wait = max(_BACK_OFF[step], _limit(retry_after) if retry_after else 0.0)
        known.next_at = now + wait * (1 + spread / 10)

    def prune(self, now: float) -> None:
        """Forget what no longer matters, and distrust times that have not come yet.

        A clock that was ahead must not keep anything waiting for years.
        """
        self._orders = _recent(self._orders, now, _ORDERS_WITHIN)
        self._limited_until = min(self._limited_until, now + _MAX_RETRY_AFTER)
        for host, known in tuple(self._hosts.items()):
            known.failed = _recent(known.failed, now, _FAILURES_WITHIN)
            known.issued = _recent(known.issued, now, _DUPLICATES_WITHIN)
            known.failed_at = min(known.failed_at, now)
            known.next_at = min(known.next_at, now + _MAX_RETRY_AFTER)
            known.limited_until = min(known.limited_until, now + _MAX_RETRY_AFTER)
            long_ago = max(known.next_at, known.limited_until) < now - DAY
            if long_ago and not known.failed:
                known.failures, known.reason = 0, ""
            if long_ago and not known.matters and not known.challenge:
                del self._hosts[host]
        kept = [host for host, known in self._hosts.items() if not known.matters]
        for host in kept[: max(len(kept) - _REMEMBERED, 0)]:
            del self._hosts[host]

    def _known(self, host: str) -> _Host:
        return self._hosts.setdefault(host, _Host())

    # --- on disk ---------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """Write the ledger so that :meth:`decode` reads it."""
        document = {
            "version": 1,
            "orders": self._orders,
            "limited_until": self._limited_until,
            "limited_why": self._limited_why,
            "hosts": {host: attrs.asdict(known) for host, known in self._hosts.items()},
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, content: bytes) -> Ledger:
        """Read a ledger.

        Raises:
            LedgerError: the document is none.
        """
        try:
            document = json.loads(content)
            if document["version"] != 1:
                raise LedgerError(f"its version is {document['version']}, not 1")
            ledger = cls()
            ledger._orders = _times(document["orders"])
            ledger._limited_until = _time(document["limited_until"])
            ledger._limited_why = str(document["limited_why"])
            for host, fields in document["hosts"].items():
                ledger._hosts[host] = _Host(
                    failed=_times(fields["failed"]),
                    issued=_times(fields["issued"]),
                    failures=max(int(fields["failures"]), 0),
                    failed_at=_time(fields["failed_at"]),
                    next_at=_time(fields["next_at"]),
                    limited_until=_time(fields["limited_until"]),
                    reason=str(fields["reason"]),
                    challenge=str(fields["challenge"]),
                )
        except LedgerError:
            raise
        except _NO_LEDGER as error:
            raise LedgerError(f"it is not a complete ledger: {error!r}") from error
        return ledger


@attrs.define(eq=False)
class BackOff:
    """How long something that concerns all hosts of an account is left alone; not remembered."""

    first: float = 15.0
    last: float = 15 * MINUTE
    failures: int = 0

    def fail(self, retry_after: float | None = None, spread: float = 0.0) -> float:
        """Return the seconds until the next attempt; ``spread`` as in :meth:`Ledger.fail`."""
        wait = min(self.first * 2.0 ** min(self.failures, 30), self.last)
        self.failures += 1
        if retry_after is not None:
            wait = max(wait, min(retry_after, HOUR))
        return wait * (1 + spread / 10)

    def reset(self) -> None:
        """Begin anew."""
        self.failures = 0


def renewal_time(not_before: float, not_after: float, spread: float) -> float:
    """Return when a certificate is to be renewed.

    Args:
        not_before: Unix time.
        not_after: Unix time.
        spread: From 0 to 1, different for each certificate and always the same for one.
    """
    lifetime = not_after - not_before
    return not_before + lifetime * (_RENEWED_AT - spread * _SPREAD)


def suggested_time(not_before: float, not_after: float, suggested: float) -> float:
    """Return when to renew a certificate whose authority suggests a time (RFC 9773).

    A suggestion that all certificates are to be renewed at once must not become an endless loop,
    nor one that none is to be renewed an outage.
    """
    lifetime = not_after - not_before
    earliest = not_before + min(lifetime * _AT_THE_EARLIEST, DAY)
    return min(max(suggested, earliest), not_before + lifetime * _AT_THE_LATEST)


def refusal(host: str) -> str:
    """Return why no certificate can be obtained for a host; empty if one can.

    Args:
        host: In lower case, without brackets and final dot.
    """
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    else:
        return (
            f"{host} is an address; certificates are obtained for names only: use a name, or a "
            "certificate of your own (--tls-certificate-path)"
        )
    if "*" in host:
        return (
            f"{host} is a wildcard; certificates are obtained for single names only: use a "
            "certificate of your own (--tls-certificate-path)"
        )
    if len(host) > MAX_HOST:
        return f"{host} is longer than {MAX_HOST} characters"
    if not _NAME.fullmatch(host):
        return f"{host!r} is not a name that a certificate can have"
    return ""


def _room(times: list[float], limit: int, within: float) -> float:
    """Return when there are fewer than ``limit`` of the times within the last seconds."""
    return times[-limit] + within if len(times) >= limit else 0.0


def _recent(times: list[float], now: float, within: float) -> list[float]:
    return sorted(min(time, now) for time in times if time > now - within)


def _remove(times: list[float], time: float) -> None:
    # It may have been pruned, by a clock that has jumped.
    if time in times:
        times.remove(time)


def _limit(retry_after: float | None) -> float:
    return _LIMITED if retry_after is None else min(max(retry_after, 1.0), _MAX_RETRY_AFTER)


def _times(data: Any) -> list[float]:
    return sorted(map(_time, data))


def _time(data: Any) -> float:
    time = float(data)
    if not math.isfinite(time):
        raise LedgerError(f"{time} is no time")
    return time
