"""The loads that are put on each program, and what is counted of them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs

from benchmarks.http import sockets, wrk
from benchmarks.http.contenders import HOST
from benchmarks.processes import BenchmarkError, Running, need

MIB = 1 << 20
# One alone would measure how programs fall asleep and wake up between two handshakes.
_HANDSHAKERS = 4
_POSTED = 10 * 1024


@attrs.frozen
class Outcome:
    """What a load has brought about.

    Attributes:
        units: How many of the scenario's unit.
        per_second: Of these.
        median: Of the seconds that one takes, if that is measured.
        p99: 99th percentile of the same.
        errors: What went wrong; such as a response that did not come.
        began: CPU seconds that the program had used when the load began, if that was not at once.
    """

    units: float
    per_second: float
    median: float | None = None
    p99: float | None = None
    errors: int = 0
    began: float | None = None


@attrs.frozen
class Scenario:
    """One kind of load.

    Attributes:
        name: What options and tables call it.
        text: What it is.
        unit: What is counted.
        run: Puts it on a program for some seconds.
        is_bare: Whether a program can do it that only passes bytes on.
    """

    name: str
    text: str
    unit: str
    run: Callable[[Running, int], Outcome]
    is_bare: bool = False


def _wrk(
    program: Running,
    seconds: int,
    *,
    connections: int = 64,
    path: str = "/",
    secure: bool = False,
    kept: bool = True,
    posted: int = 0,
) -> Outcome:
    origin = (
        f"https://127.0.0.1:{program.tls_port}" if secure else f"http://127.0.0.1:{program.port}"
    )
    headers = {"Host": HOST} if kept else {"Host": HOST, "Connection": "close"}
    load = wrk.run(origin + path, seconds, connections, headers, body=posted)
    return Outcome(load.requests, load.per_second, load.median, load.p99, load.errors)


def _handshakes(program: Running, seconds: int) -> Outcome:
    """Connect again and again, four at a time, without resuming a session, and send nothing."""
    command = [need("openssl", "openssl"), "s_time", "-new", "-time", str(seconds)]
    command += ["-connect", f"127.0.0.1:{program.tls_port}"]
    with ThreadPoolExecutor(_HANDSHAKERS) as clients:
        counts = list(
            clients.map(
                partial(_count, pattern=r"(\d+) connections in [\d.]+s;"),
                [command] * _HANDSHAKERS,
            )
        )
    return Outcome(sum(counts), sum(counts) / seconds)


def _http2(program: Running, seconds: int) -> Outcome:
    """Send requests over HTTP/2, ten at a time on each of 64 connections."""
    command = [need("h2load", "nghttp2-client"), f"--duration={seconds}", "--clients=64"]
    command += ["--max-concurrent-streams=10", f"--connect-to=127.0.0.1:{program.tls_port}"]
    command.append(f"https://{HOST}/")
    count = _count(command, r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx")
    return Outcome(count, count / seconds)


def _download(program: Running, _: int, *, path: str = "/1g") -> Outcome:
    """Read one large response, however long that takes."""
    command = [need("curl", "curl"), "--silent", "--fail", "--output", "/dev/null"]
    command += ["--write-out", "%{size_download} bytes", "--header", f"Host: {HOST}"]
    begun = time.perf_counter()
    size = _count([*command, f"http://127.0.0.1:{program.port}{path}"], r"(\d+) bytes")
    took = time.perf_counter() - begun
    return Outcome(size / MIB, size / MIB / took)


def _web_sockets(program: Running, seconds: int) -> Outcome:
    """Keep one message on its way on each of many WebSockets, which are open already."""
    began: list[float] = []
    echoes = sockets.load(
        program.port, HOST, seconds, 1000, lambda: began.append(program.cpu_seconds())
    )
    return Outcome(
        echoes.messages, echoes.per_second, echoes.median, echoes.p99, echoes.lost, began[0]
    )


def _count(command: list[str], pattern: str) -> int:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(pattern, done.stdout)
    if done.returncode or found is None or not int(found[1]):
        report = done.stderr.strip() or done.stdout.strip()
        raise BenchmarkError(f"{command[0]} failed: {report[-500:]}")
    return int(found[1])


SCENARIOS = (
    Scenario("get-16", "GET, 13 bytes, 16 clients", "request", partial(_wrk, connections=16)),
    Scenario("get", "GET, 13 bytes, 64 clients", "request", _wrk),
    Scenario("get-256", "GET, 13 bytes, 256 clients", "request", partial(_wrk, connections=256)),
    Scenario("get-4k", "GET, 4 KiB", "request", partial(_wrk, path="/4k")),
    Scenario("get-64k", "GET, 64 KiB", "request", partial(_wrk, path="/64k")),
    Scenario(
        "get-1m", "GET, 1 MiB, 16 clients", "request", partial(_wrk, path="/1m", connections=16)
    ),
    Scenario("post", "POST, 10 KiB", "request", partial(_wrk, posted=_POSTED)),
    Scenario("connect", "GET, a new connection each", "request", partial(_wrk, kept=False)),
    Scenario("tls", "GET in TLS", "request", partial(_wrk, secure=True)),
    Scenario("http2", "GET in HTTP/2, 10 at a time", "request", _http2),
    Scenario("handshake", "full TLS handshake", "handshake", _handshakes),
    Scenario("download", "response of 1 GiB", "MiB", _download),
    Scenario("websocket", "1,000 WebSockets, 64 bytes", "message", _web_sockets, is_bare=True),
)
