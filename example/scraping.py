"""Prometheus for the story, with the configuration of prometheus/ but for addresses and times."""

from __future__ import annotations

import http.client
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import trio

from example.stage import HERE, START_SECONDS, DemoError, accepts

if TYPE_CHECKING:
    from example.stage import Stage

FILES = HERE / "prometheus"
UP = urlencode({"query": 'up{job="kamal-proxy"} == 1'})


async def start_prometheus(stage: Stage, metrics_port: int, port: int) -> str:
    """Start Prometheus, if it is installed, and wait until it has read the proxy's metrics.

    Args:
        stage: Whose process it is.
        metrics_port: Where the proxy serves metrics.
        port: Where Prometheus serves its page.

    Returns:
        The address of its page; nothing if it is not installed.

    Raises:
        DemoError: it can't be started, or does not read anything.
    """
    program = shutil.which("prometheus")
    if program is None:
        stage.say("Prometheus is not installed, so nobody reads the metrics", "yellow")
        return ""
    config = stage.folder / "prometheus.yml"
    config.write_text(configuration(metrics_port))
    log_path = stage.folder / "prometheus.log"
    with log_path.open("ab") as log:
        await stage.open(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={stage.folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    with trio.move_on_after(START_SECONDS):
        # Another process offers no event to wait for.
        while not await accepts(port):  # noqa: ASYNC110
            await trio.sleep(0.02)
        stage.say(f"Prometheus on http://127.0.0.1:{port}; it reads metrics in a few seconds")
        while not await has_read(port):  # noqa: ASYNC110
            await trio.sleep(0.1)
        stage.say("it has read the proxy's for the first time, and does so every second")
        return f"http://127.0.0.1:{port}"
    raise DemoError(
        f"Prometheus read nothing in {START_SECONDS:g} s\n{log_path.read_text()[-1000:]}"
    )


def configuration(metrics_port: int) -> str:
    """Return prometheus.yml as it must be here.

    Raises:
        DemoError: it is not the file that this was written for.
    """
    text = (FILES / "prometheus.yml").read_text()
    for shown, here in (
        ("proxy:9090", f"127.0.0.1:{metrics_port}"),
        ("- alerts.yml", f"- {FILES / 'alerts.yml'}"),
        ("scrape_interval: 5s", "scrape_interval: 1s"),
    ):
        if text.count(shown) != 1:
            raise DemoError(f"prometheus.yml does not have {shown!r} once")
        text = text.replace(shown, here)
    return text


async def has_read(port: int) -> bool:
    """Tell whether Prometheus could read the metrics of the proxy."""
    _, text = await trio.to_thread.run_sync(get, port, f"/api/v1/query?{UP}")
    return '"value":[' in text


def get(port: int, path: str) -> tuple[int, str]:
    """Send one request to this machine, and return the status and the body of its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
