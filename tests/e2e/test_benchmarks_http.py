"""The benchmark of HTTP: that it runs, and the parts that turn what was observed into numbers."""

from __future__ import annotations

import argparse
import socket
import threading
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from benchmarks.http import contenders, scenarios, sockets, wrk
from benchmarks.http.__main__ import names, other_program
from benchmarks.http.contenders import HOST, Site
from benchmarks.http.idle import answers, complete
from benchmarks.http.scenarios import SCENARIOS, Outcome
from benchmarks.http.tables import Measured, Round, plot
from benchmarks.processes import BenchmarkError, Running
from tests.e2e.smoke import smoke

if TYPE_CHECKING:
    from collections.abc import Callable
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


@pytest.mark.parametrize("load", [scenarios._handshakes, scenarios._http2])
def test_a_load_without_one_success_stops_the_benchmark(
    load: Callable[[Running, int], Outcome], tmp_path: Path
) -> None:
    with socket.socket() as unheard:  # bound, but nobody listens
        unheard.bind(("127.0.0.1", 0))
        program = Running("it", 0, 0, tmp_path, tls_port=unheard.getsockname()[1])

        with pytest.raises(BenchmarkError, match=r"(openssl|h2load) failed: ."):
            load(program, 1)


def test_messages_are_echoed(tmp_path: Path) -> None:
    opened: list[bool] = []
    with (
        sockets.target(tmp_path) as target,
        contenders.bare(tmp_path / "bare", Site(0, target.port, tmp_path, tmp_path)) as relay,
    ):
        echoes = sockets.load(relay.port, HOST, 0.3, 5, lambda: opened.append(True))

    assert opened
    assert echoes.messages >= 200
    assert 0 < echoes.median <= echoes.p99
    assert echoes.lost == 0


def test_what_is_no_web_socket_stops_the_benchmark() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(BenchmarkError, match=r"no WebSocket: b'HTTP/1\.1 404"):
            sockets.load(listener.getsockname()[1], HOST, 1, 1, pytest.fail)
        thread.join()


def test_options_name_what_is_wrong() -> None:
    assert names(["get", "tls"], "tls, get") == ["tls", "get"]
    with pytest.raises(argparse.ArgumentTypeError, match="there is no 'post', but get, tls"):
        names(["get", "tls"], "get,post")
    assert other_program("one=prog --flag") == ("one", ["prog", "--flag"])
    for text in ("one", "=prog", "one=", "a b=prog"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not name=command"):
            other_program(text)


def test_the_plot_shows_every_load_and_program() -> None:
    def measured(number: int, program: str, micros: float) -> Measured:
        return Measured(SCENARIOS[number], program, [Round(Outcome(1, 1), micros / 1e6, 0)])

    picture = plot(
        [measured(0, "nginx", 20.0), measured(0, "us & them", 1234.5), measured(1, "nginx", 30.0)],
        "CPU <time>",
    )

    texts = [element.text for element in ElementTree.fromstring(picture).iter() if element.text]
    for part in ("CPU <time>", "us & them", "20.0 us", "1,234 us", "30.0 us", "10 us", "10,000 us"):
        assert part in texts
    assert sum(SCENARIOS[0].text in text for text in texts) == 1


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """With most kinds of loads once, but without what only more packages have."""
    picture = tmp_path / "plot.svg"
    loads = "get,post,tls,http2,handshake,websocket,idle"
    rest = ("--without", "haproxy,caddy", "--plot", str(picture))
    shown = smoke("benchmarks.http", "--only", loads, *rest)

    for part in ("nginx", "kamal_proxy", "POST, 10 KiB, per request", "GET in TLS, per request"):
        assert part in shown
    for part in ("handshake, per handshake", "per message", "Memory of 200 idle"):
        assert part in shown
    assert picture.read_text().startswith("<svg ")
