"""The example UDP server, and above all that the UDP demo's measuring tools can report failure."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from example.load import Request
from example.sessions import Sessions, judge_sessions
from example.udpserver import MAX_PLAYERS, SIGNATURE, Players, unwrapped
from example.verdict import Deploy, Switch, judge
from kamal_proxy.proxy_protocol import encode_v2
from tests.running import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVER = ROOT / "example" / "udpserver.py"
LOCALHOST = "127.0.0.1"


# --- the server ----------------------------------------------------------------------------------


@contextmanager
def server(*flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, str(SERVER), "--port=0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rpartition(":")[2]), process
        finally:
            process.kill()


@contextmanager
def client(port: int) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(20)
        sock.connect((LOCALHOST, port))
        yield sock


def ask(sock: socket.socket, packet: bytes) -> bytes:
    sock.send(packet)
    return sock.recv(65536)


def test_the_server_names_itself_and_counts_each_client() -> None:
    with server("--version=v7") as (port, _), client(port) as one, client(port) as two:
        assert ask(one, b"hello") == b"v7 1 hello"
        assert ask(two, b"") == b"v7 1 "
        assert ask(one, b"again\n") == b"v7 2 again\n"
        assert ask(two, bytes(60_000)) == b"v7 2 " + bytes(1200)
        socket.create_connection((LOCALHOST, port)).close()
        socket.create_connection((LOCALHOST, port)).close()


def test_the_server_is_not_up_while_it_boots() -> None:
    with server("--boot-seconds=3600", "--name=blue") as (port, _), client(port) as sock:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOCALHOST, port))
        assert ask(sock, b"hello") == b"blue 1 hello"


def test_the_server_reads_who_the_client_is() -> None:
    ends = ("192.0.2.7", 5000), ("192.0.2.1", 9999)
    with server("--proxy-protocol") as (port, _), client(port) as sock, client(port) as other:
        assert ask(sock, encode_v2(*ends, datagram=True) + b"one") == b"v1 1 192.0.2.7 one"
        sock.send(b"without a header")  # not answered: the next answer is the next packet's
        assert ask(sock, encode_v2(*ends, datagram=True) + b"two") == b"v1 2 192.0.2.7 two"
        assert ask(other, encode_v2(*ends, datagram=True) + b"on") == b"v1 3 192.0.2.7 on"


def test_a_header_of_either_version_of_ip() -> None:
    four = encode_v2((LOCALHOST, 5000), ("127.0.0.2", 9999), datagram=True)
    six = encode_v2(("2001:db8::7", 5000), ("::1", 9999), datagram=True)
    assert unwrapped(four + b"rest") == ((LOCALHOST, 5000), b"rest")
    assert unwrapped(six) == (("2001:db8::7", 5000), b"")
    for data in (b"", b"hello", SIGNATURE, four[:-1], four[:13] + b"\x11" + four[14:]):
        with pytest.raises(ValueError, match="PROXY protocol header"):
            unwrapped(data)


def test_the_player_who_was_silent_for_longest_is_forgotten() -> None:
    players = Players(60)
    for port in range(MAX_PLAYERS):
        assert players.count((LOCALHOST, port), 0) == 1
    assert players.count((LOCALHOST, 0), 0) == 2
    assert players.count((LOCALHOST, MAX_PLAYERS), 0) == 1
    assert players.count((LOCALHOST, 0), 0) == 3
    assert players.count((LOCALHOST, 1), 0) == 1, "somebody had to go"


def test_who_comes_back_to_a_port_much_later_is_another_player() -> None:
    players = Players(2)
    assert [players.count((LOCALHOST, 1), now) for now in (0, 2, 3.5, 5.6, 6)] == [1, 2, 3, 1, 2]


# --- the load ------------------------------------------------------------------------------------


@contextmanager
def load(port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "example.udp_load", f"--port={port}", "--players=2", *flags]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def records(process: subprocess.Popen[str]) -> Iterator[Request]:
    assert process.stdout is not None
    for line in process.stdout:
        yield Request(*json.loads(line))


def test_the_load_leaves_a_good_server_unblamed() -> None:
    with server() as (port, _), load(port, "--match-seconds=0.2") as process:
        seen = []
        for record in records(process):
            seen.append(record)
            if len({record.connection for record in seen}) == 6:
                break
        assert process.stdin is not None
        process.stdin.close()
        seen += records(process)

        assert process.wait() == 0
    verdict = judge(seen, [Deploy("v1", -math.inf, -math.inf)])
    assert verdict.clean
    assert verdict.requests == len(seen)
    sessions = judge_sessions(seen, verdict.switches)
    assert sessions == Sessions(verdict.connections, moved=0, late=0, kept=())
    assert sessions.clean
    assert sessions.count >= 6


def test_the_load_counts_what_a_killed_server_did_not_answer() -> None:
    with server() as (port, process), load(port, "--match-seconds=60") as players:
        seen = []
        for record in records(players):
            seen.append(record)
            if len(seen) == 20:
                process.kill()
                process.wait()
            if record.error:
                break
        assert players.stdin is not None
        players.stdin.close()
        seen += records(players)

        assert players.wait() == 0
    verdict = judge(seen, [Deploy("v1", -math.inf, -math.inf)])
    assert not verdict.clean
    assert verdict.failures > 0
    assert {record.error for record in seen if record.error} == {"no answer"}


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([b"v1 1 %b"], ""),
        ([b"v1 2 %b"], "v1 counts 2 packets, not 1"),
        ([b"v1 0 %b"], "v1 counts 0 packets, not 1"),
        ([b"v1 1 %b", b"v1 1 %b"], "an answer that nobody waits for"),
        ([b"v1 1 player9.9 1"], "an answer that nobody waits for"),
        ([b"v1 1 hello"], "it is no answer of the server"),
        ([b"v1 one %b"], "it is no answer of the server"),
        ([b"\xff\xfe"], "it is no answer of the server"),
        ([b""], "it is no answer of the server"),
    ],
)
def test_the_load_sees_through_a_bad_answer(answers: list[bytes], error: str) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.bind((LOCALHOST, 0))
        answering = threading.Thread(target=answer_once, args=(sock, answers))
        answering.start()
        port = sock.getsockname()[1]
        with load(port, "--players=1", "--rate=1", "--match-seconds=60") as process:
            found = [record for _, record in zip(answers, records(process), strict=False)]
        answering.join()

    assert found[-1].error == error
    assert found[-1].instance == ("" if error else "v1")


def answer_once(sock: socket.socket, answers: list[bytes]) -> None:
    packet, source = sock.recvfrom(65536)
    for answer in answers:
        sock.sendto(answer.replace(b"%b", packet), source)


# --- the verdict ---------------------------------------------------------------------------------

SWITCH = Switch("blue", "green", 10.0, 0)


def packet(session: str, ended: float, instance: str, error: str = "") -> Request:
    return Request(ended - 0.5, ended, False, instance, error, session)


@pytest.mark.parametrize(
    ("packets", "sessions"),
    [
        ([], Sessions(0, moved=0, late=0, kept=(0,))),
        ([packet("a", 9, "blue")], Sessions(1, moved=0, late=0, kept=(0,))),
        ([packet("a", 9, "blue"), packet("a", 11, "blue"), packet("b", 10, "green")],
         Sessions(2, moved=0, late=0, kept=(1,))),
        ([packet("a", 9, "blue"), packet("a", 11, "green")],
         Sessions(1, moved=1, late=0, kept=(0,))),
        ([packet("a", 9, "blue"), packet("a", 11, "", "no answer")],
         Sessions(1, moved=0, late=0, kept=(0,))),
        ([packet("a", 11, "blue")], Sessions(1, moved=0, late=1, kept=(0,))),
        ([packet("a", 10.2, "blue")], Sessions(1, moved=0, late=0, kept=(1,))),
    ],
)  # fmt: skip
def test_sessions_are_judged_by_who_answered_them(
    packets: list[Request], sessions: Sessions
) -> None:
    assert judge_sessions(packets, [SWITCH]) == sessions


@pytest.mark.parametrize(
    ("sessions", "clean"),
    [
        (Sessions(5, moved=0, late=0, kept=(2, 1)), True),
        (Sessions(5, moved=0, late=0, kept=()), True),
        (Sessions(5, moved=1, late=0, kept=(2, 1)), False),
        (Sessions(5, moved=0, late=1, kept=(2, 1)), False),
        (Sessions(5, moved=0, late=0, kept=(2, 0)), False),
    ],
)
def test_clean_sessions(sessions: Sessions, clean: bool) -> None:
    assert sessions.clean is clean


def test_a_switch_that_nobody_saw_has_kept_nobody() -> None:
    unseen = Switch("blue", "green", None, 0)
    assert judge_sessions([packet("a", 11, "blue")], [unseen]).kept == (0,)


# --- the demonstration ---------------------------------------------------------------------------

# Deploys at once, waits for nothing, drains nothing: all clients go to the new target.
CARELESS_PROXY = """\
import os, pathlib, select, socket, sys, threading, time
target = pathlib.Path(os.environ["HOME"], "target")
options = dict(argument.split("=") for argument in sys.argv if "=" in argument)

def relay():
    while not target.exists():
        time.sleep(0.01)
    front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    front.bind(("127.0.0.1", int(target.read_text().split()[0])))
    clients = {}
    while True:
        for ready in select.select([front, *clients.values()], [], [])[0]:
            if ready is front:
                packet, client = front.recvfrom(65536)
                port = int(target.read_text().split()[1])
                key = client, port
                if key not in clients:
                    clients[key] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    clients[key].connect(("127.0.0.1", port))
                clients[key].send(packet)
            else:
                client = next(key[0] for key, sock in clients.items() if sock is ready)
                front.sendto(ready.recv(65536), client)

if sys.argv[1] == "deploy-udp":
    written = target.with_name("new")
    written.write_text(options["--port"] + " " + options["--target"].rpartition(":")[2])
    written.replace(target)
    print("0 sessions completed, 0 cut")
elif sys.argv[1] == "run":
    threading.Thread(target=relay, daemon=True).start()
    listener = socket.create_server(("127.0.0.1", int(sys.argv[3])))
    while True:
        listener.accept()[0].close()
"""


def run_demo(proxy: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    ports = ["--port=0", "--udp-port=0"]
    command = [sys.executable, "-m", "example.udp_demo", f"--proxy={proxy}", *ports, *flags]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=100
    )


def test_the_demo_fails_with_a_careless_proxy(tmp_path: Path) -> None:
    proxy = tmp_path / "careless-proxy"
    proxy.write_text(f"#!{sys.executable}\n{CARELESS_PROXY}")
    proxy.chmod(0o755)

    done = run_demo(proxy, "--switches=1", "--steady=0.5", "--boot-seconds=0", "--settle-seconds=0")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "failure: v2#2 counts 1 packets, not " in done.stdout
    assert "The deploys were noticed" in done.stdout
    assert "The proxy left " in done.stdout, "it did not give back what it took"
    assert done.stderr == ""


def test_the_demo_says_why_a_proxy_does_not_start(tmp_path: Path) -> None:
    proxy = tmp_path / "broken-proxy"
    proxy.write_text("#!/bin/sh\necho 'no room for a proxy'\nexit 3\n")
    proxy.chmod(0o755)

    done = run_demo(proxy)

    assert done.returncode == 1
    assert "Error: the proxy ended with status 3\nno room for a proxy" in done.stderr


def test_the_demo_shows_a_proxy_that_nobody_notices(tmp_path: Path) -> None:
    proxy = tmp_path / "kamal-proxy"
    proxy.write_text(f'#!/bin/sh\nexec {sys.executable} -m kamal_proxy "$@"\n')
    proxy.chmod(0o755)

    done = run_demo(proxy, "--switches=1", "--steady=0.5", "--match-seconds=2")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nobody lost a packet" in done.stdout
    assert done.stderr == ""
