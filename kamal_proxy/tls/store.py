"""Certificates, account keys and challenges on disk, in the layout of the original kamal-proxy.

That is the layout of Go's autocert, in one directory for each certificate authority, so that a
volume of the original can be taken over. Processes that share the directory exclude each other by
locks, and every file is replaced as a whole. Synchronous file IO for threads; imports no trio.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kamal_proxy.errors import CertificateError, CertificateStoreError
from kamal_proxy.tls.certificates import parse_certificate
from kamal_proxy.tls.schedule import MAX_LEDGER, refusal

if TYPE_CHECKING:
    from types import TracebackType

    from kamal_proxy.tls.certificates import Certificate

LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"

_MAX_FILE = 512 * 1024  # bytes of a certificate with its chain
_LOCK_INTERVAL = 0.02  # seconds between two looks at a lock that another process holds
_LEFT_OVER = 86_400.0  # seconds after which nobody can still want a challenge's answer
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ADVICE = {
    errno.EACCES: "check owner and permissions",
    errno.EPERM: "check owner and permissions",
    errno.EROFS: "mount it writable",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or raise the quota",
}


class CertificateStore:
    """What is kept of one certificate authority.

    Args:
        base: The directory above; the store's own is made in it when something is written.
        directory: URL of the authority's ACME directory; empty means Let's Encrypt's, as it did
            for the original.
    """

    def __init__(self, base: Path | str, directory: str) -> None:
        directory = "" if directory == LETS_ENCRYPT else directory
        self.path = Path(base, hashlib.sha256(directory.encode()).hexdigest())

    # --- certificates ----------------------------------------------------------------------------

    def load(self, host: str, now: float) -> Certificate | None:
        """Return the certificate of a host; None if there is none.

        The original may have left one with an RSA key, which is as good until it has expired.

        Args:
            host: The name.
            now: Unix time.

        Raises:
            CertificateStoreError: there is one that can't be read, and none that can.
        """
        _require_name(host)
        found: list[Certificate] = []
        problem: CertificateStoreError | None = None
        for name in (host, f"{host}+rsa"):
            try:
                certificate = self._load(name)
                if certificate is not None and not certificate.matches(host):
                    raise self._unusable(name, f"it is not for {host}")
            except CertificateStoreError as error:
                problem = problem or error
                continue
            if certificate is not None:
                if certificate.not_after > now:
                    return certificate
                found.append(certificate)
        if problem is not None and not found:
            raise problem
        return max(found, key=lambda certificate: certificate.not_after, default=None)

    def save(self, host: str, chain_pem: bytes, key_pem: bytes) -> None:
        """Replace the certificate of a host, durably. The caller holds its lock.

        Raises:
            CertificateStoreError: nothing was saved.
        """
        _require_name(host)
        self._write(host, key_pem + chain_pem)

    def _load(self, name: str) -> Certificate | None:
        content = self._read(name)
        if content is None:
            return None
        path = str(self.path / name)
        try:
            return parse_certificate(content, content, certificate_name=path, key_name=path)
        except CertificateError as error:
            raise CertificateStoreError("; ".join(error.details)) from error
        except Exception as error:
            # What x509 raises for oddities has no base of its own, and costs one certificate.
            raise self._unusable(name, repr(error)) from error

    # --- the account -----------------------------------------------------------------------------

    def account_key(self) -> bytes | None:
        """Return the private key of the account, as PEM; None if there is none yet.

        Raises:
            CertificateStoreError: it can't be read.
        """
        return self._read("acme_account+key")

    def save_account_key(self, key_pem: bytes) -> None:
        """Save the private key of the account, durably. The caller holds the account's lock.

        Raises:
            CertificateStoreError: nothing was saved.
        """
        self._write("acme_account+key", key_pem)

    def ledger(self) -> bytes | None:
        """Return what :meth:`save_ledger` has saved; None if there is nothing.

        Raises:
            CertificateStoreError: it can't be read.
        """
        return self._read("acme_attempts+json", MAX_LEDGER)

    def save_ledger(self, content: bytes) -> None:
        """Replace the ledger, durably. The caller holds its lock.

        Raises:
            CertificateStoreError: nothing was saved.
        """
        self._write("acme_attempts+json", content)

    # --- answers to challenges -------------------------------------------------------------------

    def save_token(self, token: str, answer: bytes) -> None:
        """Save the answer to an HTTP-01 challenge, for all processes that share the store.

        Raises:
            CertificateStoreError: nothing was saved, or the token is none.
        """
        if not _TOKEN.fullmatch(token):
            raise CertificateStoreError(f"{token!r} can't be the token of a challenge")
        self._write(f"{token}+http-01", answer, durably=False)

    def token(self, token: str) -> bytes | None:
        """Return the answer to an HTTP-01 challenge; ``token`` may be any text.

        Raises:
            CertificateStoreError: it can't be read.
        """
        return self._read(f"{token}+http-01", 1024) if _TOKEN.fullmatch(token) else None

    def remove_token(self, token: str) -> None:
        """Remove the answer to an HTTP-01 challenge, if it is there."""
        self._remove(f"{token}+http-01")

    def save_challenge(self, host: str, chain_pem: bytes, key_pem: bytes) -> None:
        """Save the certificate that answers a TLS-ALPN-01 challenge.

        Raises:
            CertificateStoreError: nothing was saved.
        """
        _require_name(host)
        self._write(f"{host}+token", key_pem + chain_pem, durably=False)

    def challenge(self, host: str) -> Certificate | None:
        """Return the certificate that answers a TLS-ALPN-01 challenge; ``host`` may be any text.

        Raises:
            CertificateStoreError: it can't be read.
        """
        return None if refusal(host) else self._load(f"{host}+token")

    def remove_challenge(self, host: str) -> None:
        """Remove the certificate that answers a TLS-ALPN-01 challenge, if it is there."""
        self._remove(f"{host}+token")

    def tidy(self) -> None:
        """Remove what crashed processes have left behind.

        Raises:
            CertificateStoreError: it can't be removed.
        """
        before = time.time() - _LEFT_OVER
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(("+http-01", "+token", ".tmp")):
                        with contextlib.suppress(FileNotFoundError):  # another process tidies too
                            if entry.stat().st_mtime < before:
                                os.unlink(entry)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._os_error("can't tidy", "", error) from error

    # --- locks -----------------------------------------------------------------------------------

    def lock(self, name: str, within: float = 0.0) -> Lock | None:
        """Take a lock; None if another process, or thread, still holds it.

        Args:
            name: What is locked: a host, ``acme_account`` or ``acme_attempts``.
            within: Seconds to wait for it.

        Raises:
            CertificateStoreError: there can be no lock.
        """
        path = self.path / f"{name}+lock"
        deadline = time.monotonic() + within
        try:
            self._make()
            while (lock := _lock(path)) is None and time.monotonic() < deadline:
                time.sleep(_LOCK_INTERVAL)
        except OSError as error:
            raise self._os_error("can't lock", path.name, error) from error
        return lock

    # --- files -----------------------------------------------------------------------------------

    def _make(self) -> None:
        # ``mkdir`` gives the mode only to the last one.
        for directory in (*reversed(self.path.parents), self.path):
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)

    def _read(self, name: str, limit: int = _MAX_FILE) -> bytes | None:
        """Return a file's bytes, None without a file; never waits, whatever lies there."""
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise self._unusable(name, "it is not a regular file")
                with open(descriptor, "rb", closefd=False) as file:
                    content = file.read(limit + 1)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._os_error("can't read", name, error) from error
        if len(content) > limit:
            raise self._unusable(name, f"it is larger than {limit} bytes")
        return content

    def _write(self, name: str, content: bytes, *, durably: bool = True) -> None:
        # Always the same name: crashes leave one of them at most, which the next writing replaces.
        # Nobody else writes the same file at the same time: what is written has a lock, or a name
        # that the authority has made up for one attempt.
        temporary = self.path / f".{name}.tmp"
        try:
            self._make()
            temporary.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600)
            try:
                try:
                    rest = memoryview(content)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
                    if durably:
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.replace(temporary, self.path / name)
            except BaseException:
                # The first error is the one to report.
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            if durably:
                self._synchronise()
        except OSError as error:
            raise self._os_error("can't save", name, error) from error

    def _synchronise(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems can't synchronise a directory, and say so like this.
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(descriptor)

    def _remove(self, name: str) -> None:
        # What can't be removed does no harm: nobody asks for it again.
        with contextlib.suppress(OSError):
            os.unlink(self.path / name)

    def _unusable(self, name: str, why: str) -> CertificateStoreError:
        return CertificateStoreError(f"{self.path / name} can't be used: {why}")

    def _os_error(self, what: str, name: str, error: OSError) -> CertificateStoreError:
        sentence = f"{what} {self.path / name}: {error.strerror or error}"
        advice = _ADVICE.get(error.errno or 0)
        return CertificateStoreError(
            f"{sentence}; {advice} (this process is user {os.geteuid()})" if advice else sentence
        )


class Lock:
    """A lock that is held until it is closed, or its process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Release the lock. Closing twice is harmless."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # While it is held: who waits for this file finds that it is not the one at the path.
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _lock(path: Path) -> Lock | None:
    """Take a lock if nobody holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(descriptor)
            with contextlib.suppress(FileNotFoundError):
                current = os.stat(path)
                if (mine.st_dev, mine.st_ino) == (current.st_dev, current.st_ino):
                    return Lock(path, descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        # Whoever held it has removed the file since it was opened.
        os.close(descriptor)


def _require_name(host: str) -> None:
    if why := refusal(host):
        raise CertificateStoreError(f"no certificate is kept for {host!r}: {why}")
