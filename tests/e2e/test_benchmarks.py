"""The parts of the benchmarks that turn what was observed into numbers."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from benchmarks import wrk
from benchmarks.idle import answers, complete
from benchmarks.processes import BenchmarkError, Running, family, need, running

if TYPE_CHECKING:
    from pathlib import Path

REPORT = """\
Running 2s test @ http://127.0.0.1:8000/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.55ms  421.11us  13.94ms   92.51%
    Req/Sec    40.91k     2.79k   44.33k    85.00%
  Latency Distribution
     50%  950.00us
     75%    1.66ms
     90%    1.84ms
     99%    2.61ms
  81515 requests in 2.02s, 14.15MB read
Requests/sec:  40262.25
Transfer/sec:      6.99MB
"""


def test_wrk_report_is_read() -> None:
    load = wrk.parse(REPORT)

    assert (load.requests, load.per_second, load.errors) == (81515, 40262.25, 0)
    assert load.median == pytest.approx(0.00095)
    assert load.p99 == pytest.approx(0.00261)


def test_wrk_errors_of_every_kind_are_added_up() -> None:
    errors = (
        "  Socket errors: connect 1, read 20, write 300, timeout 4000\n"
        "  Non-2xx or 3xx responses: 50000\n"
    )

    assert wrk.parse(REPORT.replace("Requests/sec", errors + "Requests/sec")).errors == 54321


@pytest.mark.parametrize("report", ["", REPORT.replace("81515", "0"), REPORT.replace("99%", "98%")])
def test_a_report_without_results_is_refused(report: str) -> None:
    with pytest.raises(BenchmarkError):
        wrk.parse(report)


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(BenchmarkError, match=r"no-such-program is .*: apt-get install thing"):
        need("no-such-program", "thing")


def test_a_program_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no port for me')"]

    with pytest.raises(BenchmarkError, match="no port for me"), running("it", command, 1, tmp_path):
        pytest.fail("it did not start")


def test_cpu_and_memory_count_the_children_too(tmp_path: Path) -> None:
    child = (
        "import sys\nblob = b'x' * 50_000_000\nfor n in range(10**7): pass\n"
        "print(flush=True)\nsys.stdin.read()"
    )
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", parent]

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        program = Running("it", process.pid, 0, tmp_path)
        cpu, rss, members = program.cpu_seconds(), program.rss_bytes(), family(process.pid)
        assert process.stdin is not None
        process.stdin.close()

    assert len(members) == 2
    assert cpu > 0.05
    assert rss > 50_000_000


@pytest.mark.parametrize(
    ("parts", "good"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 2\r\n\r\no", b"k"], True),
        ([b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"], False),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no"], False),
        ([], False),
    ],
)
def test_an_idle_client_knows_a_good_answer(parts: list[bytes], good: bool) -> None:
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            theirs.recv(65536)
            for part in parts:
                theirs.sendall(part)

    thread = threading.Thread(target=serve)
    with ours:
        thread.start()
        assert answers(ours) is good
        thread.join()


def test_an_answer_of_unknown_length_stops_the_benchmark() -> None:
    with pytest.raises(BenchmarkError, match="without Content-Length"):
        complete(b"HTTP/1.1 200 OK\r\n\r\n")
