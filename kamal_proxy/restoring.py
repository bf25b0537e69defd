"""Making a service of what was saved of it. Whatever is missing by now must not stop the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kamal_proxy.errors import CertificateError, ErrorPagesError
from kamal_proxy.service import Pages, Service
from kamal_proxy.tls.files import TlsFiles
from kamal_proxy.tls.reloading import tell_doubts, tell_unusable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.deployment import Deployment
    from kamal_proxy.logs import Log
    from kamal_proxy.state import SavedService
    from kamal_proxy.switching import Switching


def restored(
    saved: SavedService,
    switching: Switching,
    load_pages: Callable[[str], Pages],
    log: Log,
) -> Service:
    """Return the service; its deployments have still to be run.

    Args:
        saved: What was saved.
        switching: Makes its deployments.
        load_pages: Reads its error pages from a directory; without them it gets the built-in ones.
        log: Where is said what it has to do without.
    """

    def deployment(targets: tuple[str, ...], readers: tuple[str, ...]) -> Deployment:
        health_check = saved.target_options.health_check
        return switching.new_deployment(saved.name, targets, readers, health_check, trusted=True)

    has_rollout = bool(saved.rollout_targets or saved.rollout_readers)
    return Service(
        name=saved.name,
        options=saved.service_options,
        target_options=saved.target_options,
        active=deployment(saved.active_targets, saved.active_readers),
        rollout=deployment(saved.rollout_targets, saved.rollout_readers) if has_rollout else None,
        split=saved.rollout,
        pause=saved.pause,
        pages=_pages(saved, load_pages, log),
        tls=_tls(saved, log),
        extra=saved.extra,
    )


def _pages(saved: SavedService, load_pages: Callable[[str], Pages], log: Log) -> Pages | None:
    if not saved.service_options.error_page_path:
        return None
    try:
        return load_pages(saved.service_options.error_page_path)
    except ErrorPagesError as error:
        # The application matters more than how its errors look.
        log.error(
            "Service is served with the built-in error pages",
            service=saved.name,
            error=str(error),
            details=error.details,
        )
        return None


def _tls(saved: SavedService, log: Log) -> TlsFiles | None:
    if not saved.service_options.tls_enabled:
        return None
    files = TlsFiles(saved.service_options)
    try:
        files.load()
    except CertificateError as error:
        # The others must not suffer; this one is served again once the files can be used.
        tell_unusable(saved.name, files, error, log)
    tell_doubts(saved.name, files, log)
    return files
