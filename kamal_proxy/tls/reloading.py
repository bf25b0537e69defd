"""What is said of the files of services' certificates, and when they are read again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from kamal_proxy.errors import CertificateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kamal_proxy.logs import Log
    from kamal_proxy.tls.files import TlsFiles
    from kamal_proxy.tls.selection import Served

INTERVAL = 5.0  # seconds between two looks at the files

_MAX_THREADS = 4


async def watch_files(secured: Callable[[], Iterable[Served]], log: Log) -> None:
    """Notice files that were replaced, until cancelled.

    Args:
        secured: Returns the services with TLS settings of their own.
        log: Where is said what became of them.
    """
    # Threads of their own: a slow directory must not hold anything else up.
    limiter = trio.CapacityLimiter(_MAX_THREADS)
    while True:
        await trio.sleep(INTERVAL)
        for service in secured():
            files = service.tls
            if files is None or not files.names_files:
                continue
            try:
                changed = await trio.to_thread.run_sync(
                    files.refresh, abandon_on_cancel=True, limiter=limiter
                )
            except CertificateError as error:
                tell_unusable(service.name, files, error, log)
            except Exception as error:  # such as no thread; must not cost the others
                log.error("Certificate can't be looked at", service=service.name, error=repr(error))
            else:
                if changed:
                    log.info("Certificate reloaded", service=service.name)
                    tell_doubts(service.name, files, log)


def tell_unusable(service: str, files: TlsFiles, error: CertificateError, log: Log) -> None:
    """Log that a service's files can't be used, and what that means for it."""
    log.error(
        "Certificate can't be used; what was read before still is"
        if files.is_usable
        else "Service is not served over HTTPS until its files can be used",
        service=service,
        error=str(error),
        details=error.details,
    )


def tell_doubts(service: str, files: TlsFiles, log: Log) -> None:
    """Log what a service's clients may not like about its certificate."""
    if doubts := files.doubts(time.time()):
        log.warning("Certificate may be refused by clients", service=service, details=doubts)
