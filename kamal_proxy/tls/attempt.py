"""One attempt to get the certificate of one host: from another process, or from its authority.

It blocks, in a thread of its own, and can be ended from outside at any moment. Before anything is
ordered it is written down, so that no crash, and no crash loop, loses count. When the next attempt
is made is the business of ``issuer``. The ``acme`` library, and what it needs, takes 20 MiB and a
moment to load: that is done where a thread begins to talk, for proxies that never do.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from kamal_proxy.errors import AcmeError, CertificateStoreError
from kamal_proxy.tls.certificates import Certificate, parse_certificate
from kamal_proxy.tls.challenges import KINDS, key_pem
from kamal_proxy.tls.schedule import Failure, Ledger, LedgerError, Permit, renewal_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kamal_proxy.run_options import AcmeOptions
    from kamal_proxy.tls.acme_client import Account, AcmeClient, Obtained
    from kamal_proxy.tls.challenges import Answers
    from kamal_proxy.tls.store import CertificateStore

_LOCK_PATIENCE = 10.0  # seconds; these locks are held for single writes only
_ACCOUNT_PATIENCE = 60.0  # while another thread looks the account up
_LOOK_UP = 0.2  # seconds between two looks whether that is still wanted


class Source:
    """A certificate authority, as far as attempts share what they know of it.

    Args:
        directory: URL of its ACME directory.
        store: What is kept of it.
        options: How accounts are made.
        is_default: Whether it is the authority that the options are about.
        answers: Where answers to challenges are shown.
        clock: Returns Unix time.
    """

    def __init__(
        self,
        directory: str,
        store: CertificateStore,
        options: AcmeOptions,
        *,
        is_default: bool,
        answers: Answers,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.store = store
        self.answers = answers
        self.clock = clock
        self._options = options
        self._is_default = is_default
        self._notes: deque[str] = deque(maxlen=10)
        self._is_tidy = False
        self._account: Account | None = None
        self._account_lock = threading.Lock()

    def tidy(self) -> None:
        """Remove, once, what crashed processes have left in the store.

        Raises:
            CertificateStoreError: it can't be removed.
        """
        if not self._is_tidy:
            self._is_tidy = True
            self.store.tidy()

    def client(self) -> AcmeClient:
        """Begin a conversation with the authority; the first time, this blocks."""
        from kamal_proxy.tls.acme_client import AcmeClient

        ca_file = self._options.ca_file if self._is_default else ""
        return AcmeClient(self.directory, ca_file=ca_file, known=self._account)

    def open_account(self, client: AcmeClient) -> None:
        """Have a client use the account, which is made if need be.

        Raises:
            AcmeError: there is no account.
            CertificateStoreError: its key can't be kept.
        """
        deadline = time.monotonic() + _ACCOUNT_PATIENCE
        while not self._account_lock.acquire(timeout=_LOOK_UP):
            if client.is_ended or time.monotonic() > deadline:
                raise AcmeError(
                    f"the account at {self.directory} is not looked up in time",
                    kind=Failure.ENDED if client.is_ended else Failure.UNREACHABLE,
                )
        try:
            if self._account is None:
                options = self._options
                bound = self._is_default
                self._account = client.open_account(
                    self._account_key(),
                    contact=options.email,
                    eab_key_id=options.eab_key_id if bound else "",
                    eab_hmac_key=options.eab_hmac_key if bound else "",
                )
            else:
                client.use(self._account)
        finally:
            self._account_lock.release()

    def forget_account(self) -> None:
        """Look the account up again the next time."""
        self._account = None

    def take_notes(self) -> list[str]:
        """Return why the ledger could not be read, if that has happened since the last time."""
        notes: list[str] = []
        while self._notes:
            notes.append(self._notes.popleft())
        return notes

    def _account_key(self) -> bytes:
        with self._locked("acme_account"):
            key = self.store.account_key()
            if key is None:
                key = key_pem(ec.generate_private_key(ec.SECP256R1()))
                self.store.save_account_key(key)
            return key

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Change the ledger; it is on disk before this ends.

        Raises:
            CertificateStoreError: it can't be read, or not be written.
        """
        with self._locked("acme_attempts"):
            content = self.store.ledger()
            try:
                ledger = Ledger() if content is None else Ledger.decode(content)
            except LedgerError as error:
                self._notes.append(str(error))
                ledger = Ledger()
            ledger.prune(self.clock())
            yield ledger
            changed = ledger.encode()
            if changed != content:
                self.store.save_ledger(changed)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = self.store.lock(name, _LOCK_PATIENCE)
        if lock is None:
            raise CertificateStoreError(
                f"{self.store.path / name}+lock has been held for {_LOCK_PATIENCE:.0f} seconds by "
                "another process"
            )
        with lock:
            yield


@attrs.frozen
class Outcome:
    """What became of an attempt.

    Attributes:
        certificate: The certificate to use from now on; None if there is none.
        obtained: Whether the authority has issued it now; else another process had it already.
        busy: Whether another process is just obtaining it.
        permit: When an order will be within the limits, if none is now, or not after the error.
        error: What went wrong.
    """

    certificate: Certificate | None = None
    obtained: bool = False
    busy: bool = False
    permit: Permit | None = None
    error: AcmeError | CertificateStoreError | None = None


class Attempt:
    """An attempt; :meth:`run` blocks.

    Args:
        host: The name.
        source: Where the certificate comes from.
        current: The certificate that is in use.
        forced: Whether it is to be replaced though it need not be.
        fresh: Whether it is the first attempt of this process.
    """

    def __init__(
        self,
        host: str,
        source: Source,
        *,
        current: Certificate | None = None,
        forced: bool = False,
        fresh: bool = False,
    ) -> None:
        self._host = host
        self._source = source
        self._current = current
        self._forced = forced
        self._fresh = fresh
        self._client: AcmeClient | None = None
        self._guard = threading.Lock()
        self._ended = False
        self._validating_at: float | None = None
        self._issuing_at: float | None = None

    def end(self) -> None:
        """Break it off, from any thread; a no-op once it is over."""
        with self._guard:
            self._ended = True
            client = self._client
        if client is not None:
            client.end()

    def run(self) -> Outcome:
        """Try."""
        store = self._source.store
        try:
            lock = store.lock(self._host)
            if lock is None:
                return Outcome(busy=True)
            with lock:
                found = self._look()
                if found is not None:
                    return Outcome(found)
                return self._order()
        except (AcmeError, CertificateStoreError) as error:
            return Outcome(error=error)

    def _look(self) -> Certificate | None:
        """Return what another process may have put into the store."""
        try:
            found = self._source.store.load(self._host, self._source.clock())
        except CertificateStoreError:
            return None  # it was told when the certificate was to be loaded, and is replaced now
        if found is None or is_due(found, self._source.clock()):
            return None
        same = self._current is not None and found.fingerprint == self._current.fingerprint
        return None if same else found

    def _order(self) -> Outcome:
        from kamal_proxy.tls.acme_errors import ValidationError, one_line

        source, host = self._source, self._host
        reasons: list[str] = []
        kinds = list(KINDS)
        while True:
            with source.ledger() as ledger:
                now = source.clock()
                permit = ledger.permit(
                    host,
                    now,
                    lifetime=_lifetime(self._current),
                    forced=self._forced,
                    fresh=self._fresh,
                )
                if permit.at <= now:
                    ledger.order(now)
                    if not reasons and ledger.challenge(host) in kinds:
                        kinds.sort(key=lambda kind: kind != ledger.challenge(host))
            if permit.at > now:
                if not reasons:
                    return Outcome(permit=permit)
                return self._failed(AcmeError("; ".join(reasons), kind=Failure.REFUSED))
            try:
                obtained = self._obtain(kinds)
            except ValidationError as error:
                reasons.append(error.message)
                if error.challenge in kinds:
                    kinds.remove(error.challenge)
                if error.hopeless or not kinds:
                    return self._failed(AcmeError("; ".join(reasons), kind=Failure.REFUSED))
            except AcmeError as error:
                reasons.append(error.message)
                told = AcmeError(
                    one_line("; ".join(reasons)), kind=error.kind, retry_after=error.retry_after
                )
                return self._failed(told)
            else:
                return self._succeeded(obtained)

    def _obtain(self, kinds: list[str]) -> Obtained:
        """Talk to the authority, and once more if it has forgotten the account."""
        from kamal_proxy.tls.acme_errors import UnknownAccountError

        source = self._source
        replaces = None
        if self._current is not None:
            replaces = self._current.chain[0].public_bytes(Encoding.PEM)
        for last in (False, True):
            client = self._begin()
            try:
                source.open_account(client)
                return client.obtain(
                    self._host, source.answers, source.store, self, kinds=kinds, replaces=replaces
                )
            except UnknownAccountError:
                source.forget_account()
                if last:
                    raise
            finally:
                client.close()
        raise AssertionError("the second time returns or raises")

    def _begin(self) -> AcmeClient:
        client = self._source.client()  # not under the guard, for which the event loop waits
        with self._guard:
            if not self._ended:
                self._client = client
                return client
        client.close()
        raise AcmeError("ended before it was done", kind=Failure.ENDED)

    def validating(self) -> None:
        """Write down that the authority will look at the host now."""
        with self._source.ledger() as ledger:
            self._validating_at = self._source.clock()
            ledger.validating(self._host, self._validating_at)

    def issuing(self) -> None:
        """Write down that the authority will issue the certificate now."""
        with self._source.ledger() as ledger:
            if self._validating_at is not None:
                ledger.validated(self._host, self._validating_at)
            self._issuing_at = self._source.clock()
            ledger.issuing(self._host, self._issuing_at)

    def _succeeded(self, obtained: Obtained) -> Outcome:
        source = self._source
        source.store.save(self._host, obtained.chain_pem, obtained.key_pem)
        with source.ledger() as ledger:
            ledger.succeed(self._host, obtained.challenge)
        return Outcome(parse_certificate(obtained.chain_pem, obtained.key_pem), obtained=True)

    def _failed(self, error: AcmeError) -> Outcome:
        """Write down what concerns the host, or the account, also after a restart."""
        if error.kind not in (Failure.REFUSED, Failure.LIMITED, Failure.ALL_LIMITED):
            return Outcome(error=error)
        with self._source.ledger() as ledger:
            now = self._source.clock()
            if self._issuing_at is not None:
                ledger.not_issued(self._host, self._issuing_at)
            ledger.fail(
                self._host,
                now,
                error.kind,
                error.message,
                retry_after=error.retry_after,
                spread=random.random(),  # noqa: S311
            )
            permit = ledger.permit(self._host, now, lifetime=_lifetime(self._current))
        return Outcome(error=error, permit=permit)


def is_due(certificate: Certificate, now: float) -> bool:
    """Return whether a certificate is to be renewed by its age."""
    return natural_renewal(certificate) <= now


def natural_renewal(certificate: Certificate) -> float:
    """Return when a certificate is to be renewed by its age, in Unix time."""
    spread = int(certificate.fingerprint[:8], 16) / 0x1_0000_0000
    return renewal_time(certificate.not_before, certificate.not_after, spread)


def _lifetime(certificate: Certificate | None) -> float:
    return float("inf") if certificate is None else certificate.not_after - certificate.not_before
