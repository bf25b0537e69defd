"""The story of the example: that it is told to its end, what Prometheus sees of it, what it costs.

Above all that it fails when something is lost, and leaves nothing behind.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from example.audience import Audience, Losses, judge_losses
from example.load import Request
from example.verdict import Deploy
from tests.e2e.programs import needs, processes_of
from tests.running import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DASHBOARD = ROOT / "example" / "grafana" / "dashboards" / "kamal-proxy.json"
PORTS = ("--port=0", "--metrics-port=0", "--prometheus-port=0", "--udp-port=0")
SHORT = ("--steady=0.5", "--boot-seconds=0")
LIMIT = 60.0  # seconds until Prometheus must have seen what it is asked for

# What a replica is working on when it is killed may be lost with it, and is counted apart.
NOTHING = re.compile(r"^Nothing (else )?was lost\.$", re.MULTILINE)

# Gives requests and sessions that are under way no time, whatever it is told.
CARELESS_PROXY = """\
#!/bin/sh
for argument; do
  shift
  case $argument in
    --drain-timeout=*) argument=--drain-timeout=1ms ;;
    --zero-downtime) argument=--zero-downtime=false ;;
  esac
  set -- "$@" "$argument"
done
exec PYTHON -m kamal_proxy "$@"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Provide a directory with a short path, as the proxy's socket needs it."""
    with tempfile.TemporaryDirectory(prefix="kp-") as name:
        yield Path(name)


@contextmanager
def story(folder: Path, *flags: str, path: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Let the story be told; its processes have ``folder`` as TMPDIR."""
    process = subprocess.Popen(
        [sys.executable, "-m", "example.story", *PORTS, *SHORT, *flags],
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "PATH": path or os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Return the lines up to one that has a text in it."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"it ended without {text!r}: {''.join(lines)}")


def rest_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


# --- the judgement -------------------------------------------------------------------------------

KILLED = (20.0, 20.1)


def packet(began: float, instance: str, session: str) -> Request:
    return Request(began, began + 0.1, False, instance, "", session)


def losses_of(*requests: Request, cut: int = 0) -> Losses:
    """Judge requests to two replicas of which v2-a was killed, beside players who lost nothing."""
    good = [Request(1, 2, False, "v1-b", "", "ann.1"), Request(15, 16, False, "v2-a", "", "ann.1")]
    packets = [
        packet(1, "v1-game", "ann"),
        packet(13, "v1-game", "ann"),
        packet(12, "v2-game", "bob"),
    ]
    audiences = [
        Audience("visitors", "requests", [Deploy("v1", 0, 1), Deploy("v2", 10, 14)]),
        Audience("players", "packets", [Deploy("v1", 0, 1), Deploy("v2", 10, 14)]),
    ]
    audiences[0].records = [*good, *requests]
    audiences[1].records = packets
    return judge_losses(audiences, KILLED, cut)


def failed(began: float, ended: float) -> Request:
    return Request(began, ended, False, "", "status 502", "ann.1")


def test_both_replicas_are_the_version_that_was_deployed() -> None:
    losses = losses_of()
    assert losses.nothing
    assert losses.died == 0
    assert losses.sessions.kept == (1,)


def test_what_dies_with_a_replica_is_counted_apart() -> None:
    losses = losses_of(failed(19.5, 20.05), failed(20.05, 21))
    assert losses.nothing
    assert losses.died == 2


@pytest.mark.parametrize("loss", [failed(18, 19), failed(20.2, 21)])
def test_what_fails_before_or_later_is_lost(loss: Request) -> None:
    losses = losses_of(loss)
    assert not losses.nothing
    assert (losses.died, losses.verdicts[0].failures) == (0, 1)


def test_an_answer_of_a_version_that_was_replaced_is_wrong() -> None:
    assert not losses_of(Request(15, 16, False, "v1-a", "", "ann.1")).nothing


def test_a_session_that_was_cut_is_lost() -> None:
    assert not losses_of(cut=1).nothing


# --- how it ends ---------------------------------------------------------------------------------


def test_the_story_loses_nothing(folder: Path) -> None:
    with story(folder, path=str(folder)) as process:
        told = rest_of(process)

    assert process.returncode == 0, told
    assert "Prometheus is not installed" in told
    steps = re.findall(r"^(\d+)\. ", told, re.MULTILINE)
    assert steps == [str(number) for number in range(1, 10)]
    assert "connection refused at http://127.0.0.1:" in told, "what does not start is told"
    assert 'deploy_duration_seconds_count{result="failed",service="web"} 1.0' in told
    assert 'udp_dropped_datagrams_total{reason="paused",service="game"} 1.0' in told
    assert NOTHING.search(told)
    assert not processes_of(folder)


def test_the_story_tells_what_a_careless_proxy_loses(folder: Path) -> None:
    proxy = folder / "careless-proxy"
    proxy.write_text(CARELESS_PROXY.replace("PYTHON", sys.executable))
    proxy.chmod(0o755)

    with story(folder, f"--proxy={proxy}", path=str(folder)) as process:
        told = rest_of(process)

    assert process.returncode == 1, told
    assert "visitors lost one of their requests: " in told
    assert "players lost one of their packets: v2-game counts 1 packets, not " in told
    assert re.search(r"had to change the server, or were cut: [1-9]", told)
    assert told.endswith("Something was lost: see above.\n")


def test_ctrl_c_ends_all_of_the_story(folder: Path) -> None:
    with story(folder, path=str(folder)) as process:
        read_until(process, "packets answered")
        assert len(processes_of(folder)) > 9, "the proxy, six servers, three loads"
        process.send_signal(signal.SIGINT)
        rest = rest_of(process)

    assert process.returncode == 1
    assert rest.endswith("Error: stopped by Ctrl-C\n")
    assert not processes_of(folder)
    assert not list(folder.iterdir())


# --- what Prometheus sees ------------------------------------------------------------------------


class Prometheus:
    """A running Prometheus, asked by its HTTP API."""

    def __init__(self, url: str, since: float) -> None:
        self._url = url
        self._since = since

    def get(self, path: str, **parameters: str | float) -> Any:
        """Ask for something, and return what the answer holds."""
        url = f"{self._url}/api/v1/{path}?{urlencode(parameters)}"
        with urlopen(url, timeout=20) as response:
            return json.load(response)["data"]

    def series(self, expression: str) -> list[dict[str, str]]:
        """Evaluate an expression as a graph does; return the labels of series with a number."""
        expression = expression.replace("$service", ".*").replace("$__rate_interval", "20s")
        found = self.get(
            "query_range", query=expression, start=self._since, end=time.time(), step=1
        )
        return [
            one["metric"]
            for one in found["result"]
            if any(math.isfinite(float(value)) for _, value in one["values"])
        ]


def eventually(what: Callable[[], bool]) -> bool:
    """Tell whether something is so, or comes to be so in time."""
    deadline = time.monotonic() + LIMIT
    while not (true := what()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return true


def labels_in(legend: str) -> set[str]:
    return set(re.findall(r"{{(\w+)}}", legend))


@needs("prometheus", package="prometheus")
def test_prometheus_sees_all_that_the_dashboard_shows(folder: Path) -> None:
    began = time.time()
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    shown += [(a["name"], a["expr"], a["titleFormat"]) for a in dashboard["annotations"]["list"]]
    assert len(shown) > 20

    with story(folder, "--stay") as process:
        told = "".join(read_until(process, "commands   "))
        (url,) = re.findall(r"^ *[\d.]+s  Prometheus (http\S+)/graph$", told, re.MULTILINE)
        prometheus = Prometheus(url, began)
        for title, expression, legend in shown:

            def is_there(expression: str = expression, legend: str = legend) -> bool:
                named = set().union(*prometheus.series(expression))
                return bool(prometheus.series(expression)) and labels_in(legend) <= named

            assert eventually(is_there), f"{title}: {expression}"
        for variable in dashboard["templating"]["list"]:
            metric, label = re.findall(r"label_values\((\w+), (\w+)\)", variable["definition"])[0]
            values = prometheus.get(f"label/{label}/values", **{"match[]": metric})
            assert set(values) == {"web", "game"}

        def alerts() -> dict[str, str]:
            groups = prometheus.get("rules")["groups"]
            return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

        assert eventually(lambda: set(alerts().values()) == {"ok"}), alerts()
        process.send_signal(signal.SIGINT)
        rest_of(process)

    assert process.returncode == 0, told
    assert NOTHING.search(told)
    assert not processes_of(folder)
