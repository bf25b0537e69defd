"""Runs the load generator wrk and reads its report."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import TYPE_CHECKING

import attrs

from benchmarks.processes import BenchmarkError, need

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@attrs.frozen
class Load:
    """What wrk reports about one run.

    Attributes:
        requests: Answers that arrived.
        per_second: Answers a second.
        median: Median latency in seconds.
        p99: 99th percentile of the latency in seconds.
        errors: Socket errors, time-outs and answers that were neither 2xx nor 3xx.
    """

    requests: int
    per_second: float
    median: float
    p99: float
    errors: int


def run(
    url: str, seconds: int, connections: int, headers: Mapping[str, str], *, body: int = 0
) -> Load:
    """Send requests as fast as answers come, from one thread.

    Args:
        url: Whence.
        seconds: For how long.
        connections: How many at once; they are kept, unless a header says otherwise.
        headers: Sent with each request.
        body: Bytes that are posted; GET without any.

    Raises:
        BenchmarkError: wrk is not installed, or fails.
    """
    command = [need("wrk", "wrk"), "--threads=1", f"--connections={connections}"]
    command += [f"--duration={seconds}s", "--latency", "--timeout=10s"]
    command += [f"--header={name}: {value}" for name, value in headers.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        if body:
            script.write(f'wrk.method, wrk.body = "POST", string.rep("x", {body})')
            script.flush()
            command.append(f"--script={script.name}")
        done = subprocess.run([*command, url], check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")
    return parse(done.stdout)


def parse(report: str) -> Load:
    """Read wrk's report.

    Raises:
        BenchmarkError: it is not one, or no request succeeded.
    """
    errors = 0
    if found := re.search(r"Socket errors: (.*)", report):
        errors += sum(int(number) for number in re.findall(r"\d+", found[1]))
    if found := re.search(r"Non-2xx or 3xx responses: (\d+)", report):
        errors += int(found[1])
    requests = int(_find(r"(\d+) requests in ", report)[1])
    if not requests:
        raise BenchmarkError(f"no request was answered:\n{report}")
    return Load(
        requests=requests,
        per_second=float(_find(r"Requests/sec:\s+([\d.]+)", report)[1]),
        median=_duration(_find(r"50%\s+([\d.]+)(us|ms|s|m|h)\b", report)),
        p99=_duration(_find(r"99%\s+([\d.]+)(us|ms|s|m|h)\b", report)),
        errors=errors,
    )


def _find(pattern: str, report: str) -> re.Match[str]:
    found = re.search(pattern, report)
    if found is None:
        raise BenchmarkError(f"this is not a report of wrk:\n{report}")
    return found


def _duration(found: re.Match[str]) -> float:
    return float(found[1]) * _SECONDS[found[2]]
