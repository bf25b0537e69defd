"""The example application, and above all that the demo's measuring tools can report failure."""

from __future__ import annotations

import http.client
import json
import math
import mmap
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from example.certificate import write_certificate
from example.footprint import MIB, Growth, descriptors_of, memory_of
from example.load import HOST, Request, instance_in, transport
from example.verdict import Deploy, Switch, judge, percentile
from tests.e2e.programs import processes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
WEBAPP = ROOT / "example" / "webapp.py"
LOAD = ROOT / "example" / "load.py"


# --- the application -----------------------------------------------------------------------------


@contextmanager
def webapp(*flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, str(WEBAPP), "--port=0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rpartition(":")[2]), process
        finally:
            process.kill()


@contextmanager
def client(port: int) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        yield connection


def get(
    connection: http.client.HTTPConnection, path: str, method: str = "GET"
) -> tuple[int, bytes]:
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read()


def test_webapp_names_itself_on_one_kept_connection() -> None:
    with webapp("--version=v7", "--name=blue") as (port, _), client(port) as connection:
        status, body = get(connection, "/")
        kept = connection.sock

        assert status == 200
        assert json.loads(body) == {"version": "v7", "instance": "blue", "path": "/"}
        assert get(connection, "/up")[0] == 200
        assert get(connection, "/", "HEAD") == (200, b"")
        assert get(connection, "/slow?ms=1")[0] == 200
        assert get(connection, "/slow?ms=soon")[0] == 400
        assert connection.sock is kept is not None


def test_webapp_streams() -> None:
    with webapp("--version=v7") as (port, _), client(port) as connection:
        status, body = get(connection, "/stream")

    assert status == 200
    assert body.splitlines()[-1] == b"v7 v7 5/5"


def test_webapp_is_not_healthy_while_it_boots() -> None:
    with webapp("--boot-seconds=3600") as (port, _), client(port) as connection:
        assert get(connection, "/up")[0] == 503
        assert get(connection, "/")[0] == 503


def test_webapp_loses_a_running_request_on_sigterm() -> None:
    with webapp() as (port, process), client(port) as connection:
        assert get(connection, "/")[0] == 200
        connection.request("GET", "/slow?ms=60000")
        process.send_signal(signal.SIGTERM)

        with pytest.raises(ConnectionError):
            connection.getresponse()
        assert process.wait() == -signal.SIGTERM


# --- the load ------------------------------------------------------------------------------------


@contextmanager
def load(port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(LOAD), f"--port={port}", "--connections=2", *flags]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def records(process: subprocess.Popen[str]) -> Iterator[Request]:
    assert process.stdout is not None
    for line in process.stdout:
        yield Request(*json.loads(line))


def test_load_counts_a_killed_application_as_failures() -> None:
    with webapp("--name=blue") as (port, app), load(port) as process:
        seen = []
        for record in records(process):
            seen.append(record)
            if len(seen) == 20:
                app.kill()
                app.wait()
            if record.error:
                break
        assert process.stdin is not None
        process.stdin.close()
        seen += records(process)

        assert process.wait() == 0
    verdict = judge(seen, [Deploy("blue", -math.inf, -math.inf)])
    assert verdict.requests == len(seen) > 20
    assert verdict.failures > 0
    assert verdict.wrong == 0
    assert not verdict.clean


def test_load_keeps_its_connections_and_leaves_a_good_application_unblamed() -> None:
    with webapp("--name=blue") as (port, _), load(port, "--slow-seconds=0.1") as process:
        seen = []
        for record in records(process):
            seen.append(record)
            if sum(r.slow for r in seen) == 4 and len(seen) > 20:
                break
        assert process.stdin is not None
        process.stdin.close()
        seen += records(process)

        assert process.wait() == 0
    verdict = judge(seen, [Deploy("blue", -math.inf, -math.inf)])
    assert verdict.clean
    assert verdict.connections == 4


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "status 503"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "names no instance"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbad!", "JSONDecodeError"),
        (b"nonsense\r\n\r\n", "BadStatusLine"),
        (b"", "RemoteDisconnected"),
    ],
)
def test_load_sees_through_a_bad_answer(answer: bytes, error: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = threading.Thread(target=answer_once, args=(listener, answer))
        served.start()
        with load(listener.getsockname()[1], "--connections=1", "--slow-connections=0") as process:
            record = next(records(process))
        served.join()

    assert error in record.error
    assert not record.instance


def answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


# How an HTTP/2 server ends a stream, and a connection (RFC 9113 6.4, 6.8), after its settings.
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
RESET = b"\0\0\x04\x03\0\0\0\0\x01" + bytes(4)
GOAWAY = b"\0\0\x08\x07\0\0\0\0\0" + bytes(8)


@pytest.mark.parametrize(
    ("protocol", "said", "error"),
    [
        ("http/1.1", b"", "does not speak HTTP/2"),
        ("h2", b"", "closed the connection"),
        ("h2", SETTINGS + RESET, "sent StreamReset"),
        ("h2", SETTINGS + GOAWAY, "sent ConnectionTerminated"),
        ("h2", bytes(9), "ProtocolError"),  # DATA on stream 0
    ],
)
def test_load_over_http_2_sees_through_a_bad_answer(
    tmp_path: Path, protocol: str, said: bytes, error: str
) -> None:
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    write_certificate(HOST, *files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    context.set_alpn_protocols([protocol])

    def serve(listener: socket.socket) -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            if protocol == "h2":
                connection.recv(65536)
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):  # a client that leaves need not read to the end
                connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = threading.Thread(target=serve, args=(listener,))
        served.start()
        client = transport(listener.getsockname()[1], 1, str(files[0]))
        with closing(client), pytest.raises(OSError, match=error):
            client.get("/")
        served.join()


def test_a_body_without_an_instance_is_no_answer() -> None:
    assert instance_in(b'{"instance": "blue"}') == "blue"
    with pytest.raises(ValueError, match="names no instance"):
        instance_in(b'["instance"]')


# --- the verdict ---------------------------------------------------------------------------------

BLUE_THEN_GREEN = [Deploy("blue", 0, 1), Deploy("green", 10, 12)]


def request(
    began: float, ended: float, instance: str = "", *, slow: bool = False, error: str = ""
) -> Request:
    return Request(began, ended, slow, instance, error, "client0.1")


@pytest.mark.parametrize(
    ("one", "wrong"),
    [
        (request(5, 6, "blue"), 0),
        (request(11, 11.5, "blue"), 0),  # the old one may answer until the deploy returned
        (request(11.9, 15, "blue"), 0),  # began while it was still allowed
        (request(12.1, 12.2, "blue"), 1),  # it was dead by then
        (request(10.1, 10.2, "green"), 0),
        (request(9, 9.9, "green"), 1),  # answered before it was deployed
        (request(5, 6, "red"), 1),  # nobody deployed it
    ],
)
def test_an_answer_counts_by_who_was_allowed_to_give_it(one: Request, wrong: int) -> None:
    verdict = judge([one, request(20, 21, "green")], BLUE_THEN_GREEN)

    assert verdict.wrong == wrong
    assert verdict.clean == (not wrong)


def test_a_failure_is_not_clean() -> None:
    verdict = judge([request(5, 6, error="refused"), request(20, 21, "green")], BLUE_THEN_GREEN)

    assert (verdict.failures, verdict.wrong, verdict.clean) == (1, 0, False)


def test_no_load_and_an_unseen_switch_are_not_clean() -> None:
    assert not judge([], BLUE_THEN_GREEN[:1]).clean
    unseen = judge([request(5, 6, "blue")], BLUE_THEN_GREEN)
    assert unseen.switches == (Switch("blue", "green", None, 0),)
    assert not unseen.clean


def test_requests_that_cross_the_switch_are_counted() -> None:
    verdict = judge(
        [
            request(10, 11.2, "blue", slow=True),
            request(10, 10.6, "blue", slow=True),
            request(10.9, 11.0, "green"),
            request(11.5, 11.6, "green"),
        ],
        BLUE_THEN_GREEN,
    )

    assert verdict.switches == (Switch("blue", "green", 11.0, 1),)
    assert verdict.slow_requests == 2


def test_durations_leave_out_slow_requests_and_look_at_the_switch() -> None:
    verdict = judge(
        [
            request(3, 7, "blue"),
            request(9.5, 10.5, "blue"),
            request(11, 13, "green"),
            request(10, 11.9, "blue", slow=True),
            request(13, 13.5, "green"),
        ],
        BLUE_THEN_GREEN,
    )

    assert verdict.slowest == 4
    assert verdict.slowest_switching == 2
    assert verdict.median == 1


def test_percentile_is_by_nearest_rank() -> None:
    hundred = [float(n) for n in range(1, 101)]

    assert percentile(hundred, 50) == 50
    assert percentile(hundred, 99) == 99
    assert percentile([3.0], 99) == 3
    assert math.isnan(percentile([], 50))


# --- what the proxy occupies ---------------------------------------------------------------------


def test_what_a_process_occupies_is_seen() -> None:
    memory, descriptors = memory_of(os.getpid()), descriptors_of(os.getpid())
    kept = mmap.mmap(-1, 32 * MIB)
    for page in range(0, len(kept), mmap.PAGESIZE):
        kept[page] = 1
    with socket.socket():
        assert descriptors_of(os.getpid()) == descriptors + 1
    assert descriptors_of(os.getpid()) == descriptors
    assert memory_of(os.getpid()) - memory > 16 * MIB
    kept.close()


@pytest.mark.parametrize(
    ("growth", "leaks"),
    [
        (Growth(30 * MIB, 31 * MIB, MIB, 12, 12), ()),
        (Growth(30 * MIB, 28 * MIB, 0, 12, 11), ()),
        (
            Growth(30 * MIB, 33 * MIB, 2 * MIB, 12, 12),
            ("The proxy's memory grew by 3.0 MiB; 2 MiB are allowed.",),
        ),
        (Growth(30 * MIB, 30 * MIB, MIB, 12, 15), ("The proxy left 3 descriptors open.",)),
    ],
)
def test_what_grew_is_named(growth: Growth, leaks: tuple[str, ...]) -> None:
    assert growth.leaks == leaks


# --- the demonstration ---------------------------------------------------------------------------

# Deploys at once, waits for nothing, drains nothing: connections stay with the old instance.
# KEPT and HOARDED are what it never gives back: descriptors of each connection, and memory.
CARELESS_PROXY = """\
import os, pathlib, select, socket, socketserver, sys
hoard, KEPT, HOARDED = [], 0, 0
target = pathlib.Path(os.environ["HOME"], "target")

class Relay(socketserver.BaseRequestHandler):
    def handle(self):
        if not target.exists():
            return
        with socket.create_connection(("127.0.0.1", int(target.read_text()))) as upstream:
            hoard.append([os.dup(upstream.fileno()) for _ in range(KEPT)])
            other = {self.request: upstream, upstream: self.request}
            while True:
                for one in select.select(list(other), [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    other[one].sendall(data)
                    hoard.append(b"x" * HOARDED)

class Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    def handle_error(self, *_):
        pass

if sys.argv[1] == "deploy":
    target.write_text(sys.argv[3].rpartition(":")[2])
elif sys.argv[1] == "run":
    Server(("127.0.0.1", int(sys.argv[3])), Relay).serve_forever()
"""


def run_demo(proxy: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "example.demo", f"--proxy={proxy}", *flags]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=100
    )


def test_demo_fails_with_a_careless_proxy(tmp_path: Path) -> None:
    proxy = tmp_path / "careless-proxy"
    proxy.write_text(f"#!{sys.executable}\n{CARELESS_PROXY}")
    proxy.chmod(0o755)

    done = run_demo(proxy, "--switches=1", "--steady=0.5", "--boot-seconds=0", "--port=0")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "failure: " in done.stdout
    assert "The deploys were noticed" in done.stdout
    assert "The proxy" not in done.stdout, "it gave back what it took"
    assert done.stderr == ""


def test_demo_fails_with_a_leaking_proxy(tmp_path: Path) -> None:
    proxy = tmp_path / "leaking-proxy"
    leaking = CARELESS_PROXY.replace("KEPT, HOARDED = [], 0, 0", "KEPT, HOARDED = [], 1, 50_000")
    assert leaking != CARELESS_PROXY
    proxy.write_text(f"#!{sys.executable}\n{leaking}")
    proxy.chmod(0o755)

    flags = ["--switches=1", "--steady=0.5", "--boot-seconds=0", "--port=0", "--settle-seconds=1"]
    done = run_demo(proxy, *flags)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "The proxy's memory grew by " in done.stdout
    assert re.search(r"The proxy left \d+ descriptors open", done.stdout)


def test_demo_over_https() -> None:
    proxy = Path(sys.executable).with_name("kamal-proxy")
    flags = ["--switches=1", "--steady=0.5", "--boot-seconds=0", "--port=0", "--max-growth=99"]
    done = run_demo(proxy, *flags, "--tls")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "proxy on https://localhost:" in done.stdout
    assert "Every request was answered by an instance that was allowed to." in done.stdout


def test_demo_says_why_a_proxy_does_not_start(tmp_path: Path) -> None:
    proxy = tmp_path / "broken-proxy"
    proxy.write_text("#!/bin/sh\necho 'no room for a proxy'\nexit 3\n")
    proxy.chmod(0o755)

    done = run_demo(proxy, "--port=0")

    assert done.returncode == 1
    assert "Error: the proxy ended with status 3\nno room for a proxy" in done.stderr


def test_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    proxy = tmp_path / "proxy"
    proxy.write_text(f"#!{sys.executable}\n{CARELESS_PROXY}")
    proxy.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-m", "example.demo", f"--proxy={proxy}", "--boot-seconds=0", "--port=0"],
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as demo:
        assert demo.stdout is not None
        assert any("requests, " in line for line in demo.stdout)
        started = processes_of(tmp_path)
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()

    assert demo.returncode == 1
    assert "Error: stopped by Ctrl-C" in rest
    assert len(started) == 4, "the demonstration, the proxy, one instance, the load"
    assert not processes_of(tmp_path)
