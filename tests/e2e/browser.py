"""A real browser for tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import asynccontextmanager
from subprocess import DEVNULL
from typing import TYPE_CHECKING

import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")


@asynccontextmanager
async def open_browser(url: str, *flags: str) -> AsyncIterator[None]:
    """Show a page in Chromium, without a window, for the length of a block."""
    assert BROWSER is not None
    # Its helper processes may still write when it has ended.
    with tempfile.TemporaryDirectory(prefix="kp-", ignore_cleanup_errors=True) as home:
        browser = await trio.lowlevel.open_process(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                *flags,
                f"--user-data-dir={home}",
                url,
            ],
            env={**os.environ, "HOME": home},
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        try:
            yield
        finally:
            browser.terminate()
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await browser.wait()
            if browser.returncode is None:
                browser.kill()
