"""The certificates of a proxy's hosts: obtained, kept, renewed in the background.

Decides when an attempt is made, and for which host; the attempts themselves are threads' work
(``attempt``). Wall-clock times are compared anew every few minutes, because clocks jump.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

import trio

from kamal_proxy.errors import AcmeError, CertificateNotFoundError, CertificateStoreError
from kamal_proxy.matching import host_name
from kamal_proxy.tls.attempt import Attempt, Outcome, Source
from kamal_proxy.tls.challenges import Answers
from kamal_proxy.tls.hosts import Authority, Host, LiveAuthority
from kamal_proxy.tls.results import BUSY_ELSEWHERE, Results
from kamal_proxy.tls.schedule import DAY, MINUTE, Failure, refusal
from kamal_proxy.tls.store import LETS_ENCRYPT, CertificateStore
from kamal_proxy.tls.suggestions import Suggestions
from kamal_proxy.tls.validations import Validations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kamal_proxy.control.messages import CertificateDescription
    from kamal_proxy.logs import Log
    from kamal_proxy.run_options import AcmeOptions
    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.results import CertificateMetrics

THREADS = 4  # attempts at once
MAX_ON_DEMAND = 10_000  # hosts that no deploy has named
ATTEMPT_LIMIT = 5 * MINUTE

_LOOK_AGAIN = 5 * MINUTE  # at the latest, whatever the clock says
_SET_BACK = MINUTE  # by which a clock is corrected without anything being wrong
_BATCH = 20  # certificates that are loaded in one go
_NO_THREAD = 1.0  # seconds until a thread may be there again
_FORGOTTEN = 30 * DAY  # after which a host that no deploy has named is not renewed any more


class Issuer:
    """Obtains certificates, keeps them at hand, and renews them.

    Args:
        options: From which authority, if a host's says nothing else, and as whom.
        log: Where it is told what becomes of certificates.
        metrics: Where it is counted.
        clock: Returns Unix time.
    """

    def __init__(
        self,
        options: AcmeOptions,
        log: Log,
        metrics: CertificateMetrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._log = log
        self._metrics = metrics
        self._clock = clock
        self._authorities: dict[Authority, LiveAuthority] = {}
        self._hosts: dict[str, Host] = {}
        self._unloaded: list[Host] = []
        self._running = 0
        self._news = trio.Event()
        self._attempting = trio.CapacityLimiter(THREADS)
        self._loading = trio.CapacityLimiter(2)
        self._answers = Answers()
        self._validations = Validations(self._answers, self._stores)
        self._results = Results(self._take, log, metrics, clock)
        self._suggestions = Suggestions(self._hosts.values, self._wake, log, clock)

    # --- what is wanted --------------------------------------------------------------------------

    def set_wanted(self, wanted: Mapping[str, Authority]) -> None:
        """Take note of the hosts of all services; those that are gone are forgotten.

        Args:
            wanted: From where the certificate of each host is obtained.
        """
        hosts = {host_name(host): authority for host, authority in wanted.items()}
        for name, host in tuple(self._hosts.items()):
            if host.wanted and name not in hosts:
                self._forget(host)
        for name, authority in hosts.items():
            self._want(name, authority, wanted=True)

    def request(self, host: str, authority: Authority) -> None:
        """Obtain the certificate of a host that no deploy has named, and that may have one.

        A host that a deploy has named, or that was requested before, is attempted when it is due.
        """
        self._want(host_name(host), authority, wanted=False)

    def try_again(self, hosts: Iterable[str]) -> None:
        """Try soon again for hosts whose last attempts failed: somebody may have mended that.

        The limits that the authorities set are kept nevertheless.
        """
        for name in map(host_name, hosts):
            host = self._hosts.get(name)
            if host is not None and host.error is not None and not refusal(name):
                host.fresh, host.next_at = True, 0.0
        self._wake()

    async def renew(self, host: str) -> Certificate:
        """Replace the certificate of a host now, though it need not be.

        Raises:
            CertificateNotFoundError: no certificate is obtained for that host.
            AcmeError: there is no new one; the sentence says why, or until when to wait.
            CertificateStoreError: it can't be kept.
        """
        name = host_name(host)
        found = self._hosts.get(name)
        if found is None:
            raise CertificateNotFoundError(f"no certificate is obtained for {name}")
        if why := refusal(name):
            raise AcmeError(why, kind=Failure.REFUSED)
        attempts = found.attempts
        found.forced, found.next_at = True, 0.0
        self._wake()
        while found.attempts == attempts:
            await found.changed.wait()
            if self._hosts.get(name) is not found:
                raise AcmeError(f"{name} is not wanted any more", kind=Failure.ENDED)
        if found.error is not None:
            raise found.error
        assert found.certificate is not None
        return found.certificate

    def _want(self, name: str, authority: Authority, *, wanted: bool) -> None:
        live = self._live(authority)
        before = self._hosts.get(name)
        if before is not None:
            before.used_at = self._clock()
            if before.authority is live or (before.wanted and not wanted):
                before.wanted = before.wanted or wanted
                return
            self._forget(before)
        elif not wanted:
            self._make_room()
        host = self._hosts[name] = Host(name, live, wanted, used_at=self._clock())
        if before is not None and before.certificate is not None:
            # Better than nothing, until the other authority has issued one.
            host.certificate, host.foreign = before.certificate, True
        if why := refusal(name):
            host.loaded, host.next_at = True, math.inf
            host.error = AcmeError(why, kind=Failure.REFUSED)
            self._log.warning("Certificate can't be obtained", host=name, error=why)
            return
        self._unloaded.append(host)
        self._wake()

    def _live(self, authority: Authority) -> LiveAuthority:
        default = self._options.directory or LETS_ENCRYPT
        directory = authority.directory or default
        key = Authority(directory, authority.cache_path)
        found = self._authorities.get(key)
        if found is None:
            source = Source(
                directory,
                CertificateStore(authority.cache_path, directory),
                self._options,
                is_default=directory == default,
                answers=self._answers,
                clock=self._clock,
            )
            found = self._authorities[key] = LiveAuthority(source)
        return found

    def _stores(self) -> list[CertificateStore]:
        return [live.source.store for live in self._authorities.values()]

    def _forget(self, host: Host) -> None:
        if self._hosts.get(host.name) is host:
            del self._hosts[host.name]
            self._metrics.certificate_expiry(host.name, None)
        if host.attempt is not None:
            host.attempt.end()
        host.tell()

    def _make_room(self) -> None:
        """Forget the host that nobody has asked for the longest, if there are too many."""
        others = [host for host in self._hosts.values() if not host.wanted]
        if len(others) >= MAX_ON_DEMAND:
            self._forget(min(others, key=lambda host: host.used_at))

    # --- what handshakes and validations need ----------------------------------------------------

    def find(self, host: str) -> Certificate | None:
        """Return the certificate of a host if it is at hand and has not expired."""
        found = self._hosts.get(host)
        if found is None:
            return None
        found.used_at = now = self._clock()
        return found.certificate if found.is_good(now) else None

    async def load(self, host: str, authority: Authority) -> Certificate | None:
        """Return the certificate of a host, from the store if need be; None if there is none.

        Nothing is ordered, and of a host that has none nothing is remembered.
        """
        name = host_name(host)
        if name in self._hosts:
            return await self.wait(name)
        if refusal(name):
            return None
        source = self._live(authority).source
        certificate = await trio.to_thread.run_sync(
            self._read, source, name, limiter=self._loading, abandon_on_cancel=True
        )
        if isinstance(certificate, CertificateStoreError):
            self._log.warning("Certificate can't be loaded", host=name, error=str(certificate))
            return None
        if certificate is None or certificate.not_after <= self._clock():
            return None
        if name not in self._hosts:
            self._want(name, authority, wanted=False)
            self._take(self._hosts[name], certificate)
        return certificate

    async def wait(self, host: str) -> Certificate | None:
        """Return the certificate of a host; wait for it while it is being obtained.

        Returns:
            None if there is none. One that has expired, if all attempts to renew it fail: there
            are clients to whom that is better than nothing.
        """
        while (found := self._hosts.get(host)) is not None:
            found.used_at = now = self._clock()
            if found.is_good(now):
                return found.certificate
            if found.loaded and found.attempt is None and found.due_at > now + BUSY_ELSEWHERE:
                return found.certificate
            await found.changed.wait()
        return None

    def http_answer(self, token: str) -> bytes | None:
        """Return the answer to an HTTP-01 challenge of this process."""
        return self._answers.token(token)

    def challenge_certificate(self, host: str) -> Certificate | None:
        """Return the certificate that answers a TLS-ALPN-01 challenge of this process."""
        return self._answers.certificate(host)

    async def validate(self, token: str) -> bytes | None:
        """Return the answer to an HTTP-01 challenge, of this process or one that shares a store.

        Args:
            token: The last segment of the path that was asked for; may be anything.
        """
        return await self._validations.http(token)

    async def validate_tls(self, host: str) -> Certificate | None:
        """Return what answers a TLS-ALPN-01 challenge, of this process or one that shares a store.

        Args:
            host: The name of the handshake; may be anything.
        """
        return await self._validations.tls(host)

    def describe(self) -> list[CertificateDescription]:
        """Describe the certificates of all hosts, by their names."""
        now = self._clock()
        return [host.describe(now) for _, host in sorted(self._hosts.items())]

    # --- the background --------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Obtain and renew until cancelled. What threads are still busy with is broken off."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._load_all)
            nursery.start_soon(self._suggestions.run)
            task_status.started()
            ahead = self._clock() - trio.current_time()
            while True:
                news = self._news
                before, ahead = ahead, self._clock() - trio.current_time()
                if ahead < before - _SET_BACK:
                    self._distrust_times()
                due_at = self._start_due(nursery)
                patience = min(max(due_at - self._clock(), 0.0), _LOOK_AGAIN)
                with trio.move_on_after(patience):
                    await news.wait()

    def _distrust_times(self) -> None:
        """Wait for nothing that was to be waited for by a clock that was set back.

        What the limits demand is in the ledger, which distrusts its times too.
        """
        for host in self._hosts.values():
            host.authority.hold_until = 0.0
            if not math.isinf(host.next_at):
                host.next_at = 0.0
        self._suggestions.distrust_times()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _start_due(self, nursery: trio.Nursery) -> float:
        """Start the attempts that are due; return when the next one is."""
        now = self._clock()
        due: list[Host] = []
        next_at = math.inf
        for host in tuple(self._hosts.values()):
            due_at = host.due_at
            if due_at > now:
                next_at = min(next_at, due_at)
            elif not host.wanted and host.certificate and host.used_at < now - _FORGOTTEN:
                self._forget(host)
            else:
                due.append(host)
        due.sort(key=lambda host: host.urgency)
        for host in due[: max(THREADS - self._running, 0)]:
            self._running += 1
            host.attempt = Attempt(
                host.name,
                host.authority.source,
                current=None if host.foreign else host.certificate,
                forced=host.forced,
                fresh=host.fresh,
            )
            nursery.start_soon(self._attempt, host, host.attempt)
        return next_at

    async def _attempt(self, host: Host, attempt: Attempt) -> None:
        outcome: Outcome | None = None
        try:
            with trio.move_on_after(ATTEMPT_LIMIT):
                outcome = await trio.to_thread.run_sync(
                    attempt.run, limiter=self._attempting, abandon_on_cancel=True
                )
            if outcome is None:
                minutes = f"{ATTEMPT_LIMIT / MINUTE:.0f} minutes"
                error = AcmeError(f"it was not done in {minutes}", kind=Failure.UNREACHABLE)
                outcome = Outcome(error=error)
        except Exception as error:  # a bug must cost one attempt, not all certificates
            self._log.error("Certificate attempt failed", host=host.name, error=repr(error))
            outcome = Outcome(error=AcmeError(repr(error), kind=Failure.UNREACHABLE))
        finally:
            attempt.end()
            self._running -= 1
            host.attempt = None
            self._wake()
        for note in host.authority.source.take_notes():
            self._log.warning("Certificate attempts are counted anew", error=note)
        if self._hosts.get(host.name) is host:
            self._results.record(host, outcome)
            host.tell()

    def _take(self, host: Host, certificate: Certificate) -> None:
        """Use a certificate."""
        host.certificate, host.foreign, host.loaded = certificate, False, True
        host.error, host.next_at = None, 0.0
        self._suggestions.expect(host)
        self._metrics.certificate_expiry(host.name, certificate.not_after)
        host.tell()
        self._wake()

    # --- the store -------------------------------------------------------------------------------

    async def _load_all(self) -> None:
        """Load what the stores hold of the hosts that are wanted, as they are wanted."""
        while True:
            news = self._news
            batch, self._unloaded = self._unloaded[:_BATCH], self._unloaded[_BATCH:]
            if batch:
                await self._load([host for host in batch if not host.loaded])
            else:
                await news.wait()

    async def _load(self, hosts: list[Host]) -> None:
        def load() -> list[Certificate | CertificateStoreError | None]:
            return [self._read(host.authority.source, host.name) for host in hosts]

        try:
            found = await trio.to_thread.run_sync(
                load, limiter=self._loading, abandon_on_cancel=True
            )
        except RuntimeError as error:  # no thread can be started
            self._log.error("Certificates can't be loaded", error=str(error))
            self._unloaded += hosts
            await trio.sleep(_NO_THREAD)
            return
        for host, certificate in zip(hosts, found, strict=True):
            host.loaded = True
            if self._hosts.get(host.name) is not host:
                continue
            if isinstance(certificate, CertificateStoreError):
                self._log.warning(
                    "Certificate can't be loaded", host=host.name, error=str(certificate)
                )
            elif certificate is not None:
                self._take(host, certificate)
            host.tell()
        self._wake()

    def _read(self, source: Source, name: str) -> Certificate | CertificateStoreError | None:
        """Read a certificate; blocks."""
        with contextlib.suppress(CertificateStoreError):
            source.tidy()  # what stays does no harm
        try:
            return source.store.load(name, self._clock())
        except CertificateStoreError as error:
            return error
