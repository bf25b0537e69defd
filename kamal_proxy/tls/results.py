"""What the outcome of an attempt means for its host: the next attempt, the log, the numbers."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

from kamal_proxy.errors import AcmeError, CertificateStoreError
from kamal_proxy.tls.hosts import moment
from kamal_proxy.tls.schedule import Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.logs import Log
    from kamal_proxy.tls.attempt import Outcome
    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.hosts import Host
    from kamal_proxy.tls.schedule import Permit

BUSY_ELSEWHERE = 2.0  # seconds until it is seen whether another process is done


class CertificateMetrics(Protocol):
    """What is counted of certificates."""

    def certificate_expiry(self, host: str, timestamp: float | None) -> None:
        """Tell when the certificate of a host expires; None if there is none any more."""

    def certificate_attempt(self, ok: bool) -> None:
        """Count an attempt."""


class Results:
    """Takes note of outcomes.

    Args:
        take: Has a host use a certificate.
        log: Where it is told what became of an attempt.
        metrics: Where it is counted.
        clock: Returns Unix time.
    """

    def __init__(
        self,
        take: Callable[[Host, Certificate], object],
        log: Log,
        metrics: CertificateMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._take = take
        self._log = log
        self._metrics = metrics
        self._clock = clock

    def record(self, host: Host, outcome: Outcome) -> None:
        """Take note of what became of an attempt for a host."""
        if outcome.busy:
            spread = random.uniform(0.5, 1.0)  # noqa: S311
            host.next_at = self._clock() + BUSY_ELSEWHERE * spread
            return
        host.attempts += 1
        host.forced = host.fresh = False
        if outcome.error is not None:
            self._fail(host, outcome.permit, outcome.error)
        elif outcome.certificate is None:
            assert outcome.permit is not None
            self._postpone(host, outcome.permit)
        else:
            self._succeed(host, outcome.certificate, obtained=outcome.obtained)

    def _succeed(self, host: Host, certificate: Certificate, *, obtained: bool) -> None:
        renewed = host.has_own
        host.authority.back_off.reset()
        self._take(host, certificate)
        if obtained:
            self._metrics.certificate_attempt(True)
            self._log.info(
                "Certificate renewed" if renewed else "Certificate obtained",
                host=host.name,
                issuer=certificate.issuer,
                not_after=moment(certificate.not_after),
                directory=host.authority.source.directory,
            )

    def _postpone(self, host: Host, permit: Permit) -> None:
        """Wait until an attempt is within the limits."""
        live = host.authority
        is_news = not permit.everyone or live.hold_until <= self._clock()
        _heed(host, permit)
        host.error = AcmeError(
            f"the next attempt is made at {moment(permit.at)}: {permit.why}",
            kind=Failure.WAITING if permit.everyone else Failure.REFUSED,
        )
        if is_news:
            self._log.info(
                "Certificate has to wait",
                host=host.name,
                error=permit.why,
                next_attempt=moment(permit.at),
                directory=live.source.directory,
            )

    def _fail(
        self, host: Host, permit: Permit | None, error: AcmeError | CertificateStoreError
    ) -> None:
        live = host.authority
        if permit is not None:
            _heed(host, permit)
        else:
            # It concerns all hosts of the authority.
            retry_after = error.retry_after if isinstance(error, AcmeError) else None
            wait = live.back_off.fail(retry_after, random.random())  # noqa: S311
            live.hold_until = max(live.hold_until, self._clock() + wait)
            # When they are tried again, this one is not the first.
            host.next_at = live.hold_until + 1.0
        host.error = error
        self._metrics.certificate_attempt(False)
        self._log.error(
            "Certificate can't be renewed" if host.has_own else "Certificate can't be obtained",
            host=host.name,
            error=str(error),
            next_attempt=moment(host.due_at),
            directory=live.source.directory,
        )


def _heed(host: Host, permit: Permit) -> None:
    if permit.everyone:
        host.authority.hold_until = permit.at
    else:
        host.next_at = permit.at
