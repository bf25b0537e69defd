"""One exception tree: every sentence a user of the command, the API or the library can be told.

Nothing here knows about sockets or HTTP. ``code`` is the stable name that the admin API reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class KamalProxyError(Exception):
    """Base of all errors that this package raises on purpose.

    ``str(error)`` is one complete sentence for the user; ``details`` are further lines that
    belong before it, such as the last probe result of each unhealthy target.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)


class UsageError(KamalProxyError):
    """The command line does not follow the grammar."""

    code = "usage"


class InvalidDurationError(KamalProxyError):
    """A text is not a Go duration."""

    code = "invalid_duration"


class InvalidOptionsError(KamalProxyError):
    """An option has a value that can't be used; the sentence names the option and what is right."""

    code = "invalid_options"


class NotSupportedYetError(InvalidOptionsError):
    """An option of the original whose behaviour this version does not have."""

    code = "not_supported_yet"


class ServiceNotFoundError(KamalProxyError):
    """No service has that name."""

    code = "service_not_found"


class HostConflictError(KamalProxyError):
    """Another service already claims one of the host and path prefix pairs."""

    code = "host_conflict"


class PortConflictError(KamalProxyError):
    """Another service already has the UDP port; the sentence names it."""

    code = "port_conflict"


class DeployFailedError(KamalProxyError):
    """The new targets never became healthy; nothing changed. ``details`` has a line per target."""

    code = "deploy_failed"


class ErrorPagesError(KamalProxyError):
    """A service's own error pages can't be used; ``details`` has a line per file or directory."""

    code = "error_pages"


class CertificateError(KamalProxyError):
    """A certificate, its key or a client CA can't be used; ``details`` says which file and why."""

    code = "certificate"


class AcmeError(KamalProxyError):
    """A certificate can't be obtained; the sentence has the words of the certificate authority.

    Attributes:
        kind: What that means for the next attempt (``tls.schedule.Failure``).
        retry_after: Seconds for which the authority asked to be left alone; None if it did not.
    """

    code = "acme"

    def __init__(
        self,
        message: str,
        details: Sequence[str] = (),
        *,
        kind: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, details)
        self.kind = kind
        self.retry_after = retry_after


class CertificateStoreError(KamalProxyError):
    """What is kept of certificates can't be read or written; the sentence names the file."""

    code = "certificate_store"


class CertificateNotFoundError(KamalProxyError):
    """No certificate is obtained for that host; the sentence names it."""

    code = "certificate_not_found"


class RolloutNotSetError(KamalProxyError):
    """The service has no rollout targets."""

    code = "rollout_not_set"


class ResumedError(KamalProxyError):
    """A pause or stop came to nothing, because the service was resumed before its drain ended."""

    code = "resumed"


class StateError(KamalProxyError):
    """The saved state can't be read or written; the sentence names the file."""

    code = "state"


class ListenError(KamalProxyError):
    """A listener can't be bound; the sentence names the address."""

    code = "listen"


class ControlSocketError(KamalProxyError):
    """The admin API can't be served or reached; the sentence names the socket."""

    code = "control_socket"


class ShuttingDownError(KamalProxyError):
    """The proxy is stopping and takes no further work."""

    code = "shutting_down"
