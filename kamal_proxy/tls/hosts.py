"""The hosts of a proxy as ``issuer`` keeps them: their certificates, and when what is due.

Times are Unix time. No IO, and nothing here decides to make an attempt.
"""

from __future__ import annotations

import math
import time

import attrs
import trio

from kamal_proxy.control.messages import CertificateDescription
from kamal_proxy.errors import AcmeError, CertificateStoreError
from kamal_proxy.tls.attempt import Attempt, Source, natural_renewal
from kamal_proxy.tls.certificates import Certificate
from kamal_proxy.tls.schedule import BackOff, Failure, suggested_time


@attrs.frozen
class Authority:
    """From which certificate authority certificates come, and where they are kept.

    Attributes:
        directory: URL of its ACME directory; empty means that of the proxy's options.
        cache_path: The directory of all stores.
    """

    directory: str
    cache_path: str


@attrs.define(eq=False)
class LiveAuthority:
    """A certificate authority while the proxy runs.

    Attributes:
        source: Whence its certificates come.
        hold_until: When it may be asked for something again.
        back_off: How that grows while it does not answer.
    """

    source: Source
    hold_until: float = 0.0
    back_off: BackOff = attrs.field(factory=BackOff)


@attrs.define(eq=False)
class Host:
    """A host, and what becomes of its certificate.

    Attributes:
        name: The host.
        authority: From where its certificate comes.
        wanted: Whether a deploy has named it.
        certificate: What it has; also one that has expired, or is another authority's.
        foreign: Whether it is another authority's.
        loaded: Whether it is known what the store holds.
        next_at: When the next attempt may be made.
        suggested_at: When the authority wants the certificate to be renewed.
        ask_at: When the authority is asked that again.
        used_at: When somebody last asked for the certificate.
        attempt: The attempt that is under way.
        attempts: How many were made.
        fresh: Whether somebody may have mended what was wrong since the last attempt.
        forced: Whether the next attempt is to replace a certificate that is still good.
        error: Why the last attempt failed.
        changed: Set, and replaced, with every change that somebody may wait for.
    """

    name: str
    authority: LiveAuthority
    wanted: bool
    certificate: Certificate | None = None
    foreign: bool = False
    loaded: bool = False
    next_at: float = 0.0
    suggested_at: float | None = None
    ask_at: float = math.inf
    used_at: float = 0.0
    attempt: Attempt | None = None
    attempts: int = 0
    fresh: bool = True
    forced: bool = False
    error: AcmeError | CertificateStoreError | None = None
    changed: trio.Event = attrs.field(factory=trio.Event)

    def tell(self) -> None:
        """Wake everyone who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    @property
    def has_own(self) -> bool:
        """Whether it has a certificate of its authority."""
        return self.certificate is not None and not self.foreign

    @property
    def renew_at(self) -> float:
        """When its certificate is to be renewed; long ago without one."""
        certificate = self.certificate
        if certificate is None or self.foreign:
            return 0.0
        if self.suggested_at is None:
            return natural_renewal(certificate)
        return suggested_time(certificate.not_before, certificate.not_after, self.suggested_at)

    @property
    def due_at(self) -> float:
        """When the next attempt is to be made."""
        if not self.loaded or self.attempt is not None:
            return math.inf
        if self.forced:
            return self.next_at
        return max(self.renew_at, self.next_at, self.authority.hold_until)

    @property
    def urgency(self) -> tuple[bool, bool, float]:
        """Orders attempts that are due: asked for, without certificate, by expiry."""
        certificate = self.certificate
        return (
            not self.forced,
            certificate is not None,
            0.0 if certificate is None else certificate.not_after,
        )

    def is_good(self, now: float) -> bool:
        """Return whether it has a certificate that has not expired."""
        return self.certificate is not None and self.certificate.not_after > now

    def describe(self, now: float) -> CertificateDescription:
        """Describe what it has."""
        certificate = self.certificate
        is_waiting = getattr(self.error, "kind", "") == Failure.WAITING
        if certificate is not None and certificate.not_after <= now:
            state = "expired"
        elif self.error is not None and not is_waiting:
            state = "failing"
        else:
            state = "obtaining" if certificate is None else "valid"
        return CertificateDescription(
            host=self.name,
            state=state,
            names=certificate.names if certificate else (),
            issuer=certificate.issuer if certificate else "",
            key_type=certificate.key_type if certificate else "",
            not_after=certificate.not_after if certificate else 0.0,
            renew_at=self.renew_at,
            next_attempt=0.0 if self.error is None or math.isinf(self.due_at) else self.due_at,
            last_error=str(self.error or ""),
            directory=self.authority.source.directory,
        )


def moment(timestamp: float) -> str:
    """Return a time as the log has it: RFC 3339, without fractions."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))
