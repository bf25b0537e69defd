"""A real browser for tests."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING

import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@asynccontextmanager
async def open_browser(url: str, *flags: str) -> AsyncIterator[Path]:
    """Show a page in Chromium, without a window, for the length of a block; provide its home."""
    with _home() as home:
        browser = await trio.lowlevel.open_process(
            _command(home, url, "--disable-quic", "--remote-debugging-port=0", *flags),
            env={**os.environ, "HOME": home},
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        try:
            yield Path(home)
        finally:
            browser.terminate()
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await browser.wait()
            if browser.returncode is None:
                browser.kill()


async def wait_title(home: Path, wanted: Callable[[str], bool]) -> str:
    """Wait until the page of an open browser has a title that is wanted, and return it."""
    while True:
        for title in await trio.to_thread.run_sync(_titles, home):
            if wanted(title):
                return title
        await trio.sleep(0.05)


def _titles(home: Path) -> list[str]:
    place = home / "DevToolsActivePort"
    if not place.exists():
        return []
    port, *_ = place.read_text().split()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as response:
        return [tab["title"] for tab in json.load(response) if tab["type"] == "page"]


async def dump_page(url: str, *flags: str) -> str:
    """Show a page in Chromium, which may use QUIC, and return what has become of its HTML."""
    with _home() as home:
        done = await trio.run_process(
            _command(home, url, "--dump-dom", *flags),
            env={**os.environ, "HOME": home},
            capture_stdout=True,
            stderr=DEVNULL,
            check=False,
        )
    return done.stdout.decode()


def _home() -> tempfile.TemporaryDirectory[str]:
    # Its helper processes may still write when it has ended.
    return tempfile.TemporaryDirectory(prefix="kp-", ignore_cleanup_errors=True)


def _command(home: str, url: str, *flags: str) -> list[str]:
    assert BROWSER is not None
    return [BROWSER, *FLAGS, *flags, f"--user-data-dir={home}", url]
