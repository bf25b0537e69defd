"""What the handshakes of one service need from files: its own certificate, the CA of its clients.

Read in a thread. A file that was replaced is read again while the proxy runs; until what is there
can be used, what was read before goes on being used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from kamal_proxy.errors import CertificateError
from kamal_proxy.tls.certificates import load_certificate
from kamal_proxy.tls.contexts import load_client_ca, server_context

if TYPE_CHECKING:
    from kamal_proxy.options import ServiceOptions
    from kamal_proxy.tls.certificates import Certificate

_Signature: TypeAlias = tuple[tuple[int, int, int, int] | None, ...]


class TlsFiles:
    """The files that a service's options name.

    Args:
        options: The service's.

    Attributes:
        certificate: Its own certificate; None if it has none, or none that can be used.
        client_ca: PEM certificates of which one must have signed each client's; None if clients
            need none, or the file can't be used.
    """

    def __init__(self, options: ServiceOptions) -> None:
        self._certificate_path = options.tls_certificate_path
        self._private_key_path = options.tls_private_key_path
        self._client_ca_path = options.tls_client_ca_path
        self._hosts = options.hosts
        self._used: _Signature = ()  # what the files were like when they could be used
        self._suspect: _Signature = ()  # the same when they could not
        self._unusable: _Signature = ()  # and could still not the next time
        self.certificate: Certificate | None = None
        self.client_ca: bytes | None = None

    @property
    def has_own_certificate(self) -> bool:
        """Whether the service brings its certificate itself."""
        return bool(self._certificate_path)

    @property
    def asks_clients(self) -> bool:
        """Whether clients need certificates, also while nothing can tell which are good."""
        return bool(self._client_ca_path)

    @property
    def names_files(self) -> bool:
        """Whether there is any file to be read."""
        return self.has_own_certificate or self.asks_clients

    @property
    def is_usable(self) -> bool:
        """Whether all that the options name could be read, now or before."""
        return not (
            (self.has_own_certificate and self.certificate is None)
            or (self.asks_clients and self.client_ca is None)
        )

    def load(self) -> None:
        """Read the files; blocks.

        Raises:
            CertificateError: they can't be used; what was read before stays.
        """
        # Before they are read: a change while they are read is seen the next time.
        signature = self._signature()
        certificate, client_ca = self.certificate, self.client_ca
        if self._certificate_path:
            certificate = load_certificate(self._certificate_path, self._private_key_path)
        if self._client_ca_path:
            client_ca = load_client_ca(self._client_ca_path)
        if certificate is not None:
            # OpenSSL has rules of its own, such as for the signatures in a chain.
            server_context(certificate, client_ca=client_ca)
        self.certificate, self.client_ca = certificate, client_ca
        self._used = signature

    def refresh(self) -> bool:
        """Read the files again if they have changed; blocks. Return whether there is something new.

        Two files are seldom replaced at one moment. So what can't be used is an error only if it is
        still there the next time, and then once.

        Raises:
            CertificateError: the files can't be used; what was read before stays.
        """
        signature = self._signature()
        if signature in (self._used, self._unusable):
            return False
        try:
            self.load()
        except CertificateError:
            if signature != self._suspect:
                self._suspect = signature
                return False
            self._unusable = signature
            raise
        return True

    def doubts(self, now: float) -> tuple[str, ...]:
        """Say what clients may not like about the certificate, though it can be used.

        Args:
            now: The time in Unix seconds.
        """
        if self.certificate is None:
            return ()
        uncovered = [host for host in self._hosts if not self.certificate.matches(host)]
        names = (f"it is not for {', '.join(uncovered)}",) if uncovered else ()
        return (*names, *self.certificate.warnings(now))

    def _signature(self) -> _Signature:
        return tuple(
            _look_at(path)
            for path in (self._certificate_path, self._private_key_path, self._client_ca_path)
        )


def _look_at(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # no file, or no path
        return None
    # The time of the last change, not of the last writing: permissions may have been mended.
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns
