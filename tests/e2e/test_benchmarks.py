"""The parts of the benchmarks that turn what was observed into numbers."""

from __future__ import annotations

import argparse
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from benchmarks.processes import BenchmarkError, Running, compiled, family, need, running
from benchmarks.udp.calls import FEW, OTHER_PORTS, ways_of
from benchmarks.udp.load import SOURCES, Load, running_load
from benchmarks.udp.media import Media, running_media
from benchmarks.udp.network import free_port, free_range
from benchmarks.udp.shapes import RTP_BYTES, Shape, shape
from benchmarks.udp.weighing import weigh
from tests.e2e.smoke import smoke

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Address = tuple[str, int]
    Answers = list[tuple[bytes, Address]]


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


# --- datagrams -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    program = compiled(SOURCES / "load.c", tmp_path_factory.mktemp("load"))
    with running_load(program, free_port(), free_port(), spin=False) as started:
        yield started


class ScriptedRelay:
    """A relay and echo server in one, whose answers a test decides.

    Attributes:
        sources: How many datagrams came from each address.
        latest: The last datagram.
    """

    def __init__(self, answer: Callable[[int, bytes, Address], Answers], port: int) -> None:
        self.sources: Counter[str] = Counter()
        self.latest = b""
        self._answer = answer
        self._socket = socket.socket(type=socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]

    def serve(self) -> None:
        with self._socket:
            number = 0
            while datagram := self._receive():
                for answer, to in self._answer(number, *datagram):
                    self._socket.sendto(answer, to)
                number += 1

    def _receive(self) -> tuple[bytes, Address] | None:
        data, peer = self._socket.recvfrom(65536)
        if not data:
            return None
        self.sources[peer[0]] += 1
        self.latest = data
        return data, peer


@contextmanager
def scripted_relay(
    answer: Callable[[int, bytes, Address], Answers], port: int = 0
) -> Iterator[ScriptedRelay]:
    """Serve until the end of the context, and then what has arrived by then."""
    relay = ScriptedRelay(answer, port)
    thread = threading.Thread(target=relay.serve)
    thread.start()
    try:
        yield relay
    finally:
        with socket.socket(type=socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", relay.port))
        thread.join()


def echo(_number: int, data: bytes, peer: Address) -> Answers:
    return [(data, peer)]


def lose_the_third(number: int, data: bytes, peer: Address) -> Answers:
    return [] if number == 2 else [(data, peer)]


def double_the_third(number: int, data: bytes, peer: Address) -> Answers:
    return [(data, peer)] * (2 if number == 2 else 1)


def cut_the_third(number: int, data: bytes, peer: Address) -> Answers:
    short = data[:-16] + data[-8:]
    return [(short, peer), (data, peer)] if number == 2 else [(data, peer)]


def spoil_the_third(number: int, data: bytes, peer: Address) -> Answers:
    return [(data[:-1] + b"!", peer), (data, peer)] if number == 2 else [(data, peer)]


def tell_another_the_third(number: int, data: bytes, peer: Address) -> Answers:
    another = ("127.16.0.1" if peer[0] == "127.16.0.0" else "127.16.0.0", peer[1])
    return [(data, another), (data, peer)] if number == 2 else [(data, peer)]


def swap_pairs() -> Callable[[int, bytes, Address], Answers]:
    held: Answers = []

    def answer(_number: int, data: bytes, peer: Address) -> Answers:
        held.insert(0, (data, peer))
        if len(held) < 2:
            return []
        swapped = list(held)
        held.clear()
        return swapped

    return answer


whatever_goes_wrong = pytest.mark.parametrize(
    ("script", "counted"),
    [
        (echo, {}),
        (lose_the_third, {"answered": 19, "lost": 1}),
        (double_the_third, {"late": 1}),
        (cut_the_third, {"wrong": 1}),
        (spoil_the_third, {"wrong": 1}),
        (tell_another_the_third, {"wrong": 1}),
    ],
)


def require_counts(report: object, counted: dict[str, int], *names: str) -> None:
    """Check what a load that sent 20 datagrams has counted, where it is not what is usual."""
    usual = dict.fromkeys(names, 0) | {"answered": 20}
    assert {name: getattr(report, name) for name in usual} == usual | counted


@whatever_goes_wrong
def test_the_udp_load_counts_what_goes_wrong(
    load: Load, script: Callable[[int, bytes, Address], Answers], counted: dict[str, int]
) -> None:
    with scripted_relay(script) as relay:
        report = load.run(relay.port, Shape(64, 2), 20, window=1)

    require_counts(report, counted, "lost", "late", "out_of_order", "wrong")


def test_the_udp_load_counts_answers_out_of_order(load: Load) -> None:
    with scripted_relay(swap_pairs()) as relay:
        report = load.run(relay.port, Shape(64, 1), 20, window=2)

    assert (report.answered, report.out_of_order, report.wrong) == (20, 10, 0)


def test_the_udp_load_takes_all_sessions_in_turn_and_newcomers_once(load: Load) -> None:
    with scripted_relay(echo) as relay:
        load.run(relay.port, Shape(1200, 300), 900, window=7, newcomers=500)

    assert Counter(relay.sources.values()) == {3: 300, 1: 500}


def test_a_relay_that_answers_nothing_stops_the_benchmark(load: Load) -> None:
    with (
        scripted_relay(lambda *_: []) as relay,
        pytest.raises(BenchmarkError, match=f"port {relay.port} has stopped answering: 0 answers"),
    ):
        load.run(relay.port, Shape(64, 1), 20)


def test_a_udp_shape_is_read() -> None:
    assert shape("200x10000") == Shape(200, 10_000)
    assert str(Shape(200, 10_000)) == "200x10000"


@pytest.mark.parametrize("text", ["64", "x", "64x", "ax1", "39x1", "1473x1", "64x0", "64x65537"])
def test_a_udp_shape_that_cannot_be_measured_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
        shape(text)


# --- calls ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Media]:
    program = compiled(SOURCES / "media.c", tmp_path_factory.mktemp("media"))
    served = free_port()
    with running_media(program, range(served, served + 1), free_port(), spin=False) as started:
        yield started


@whatever_goes_wrong
def test_the_media_load_counts_what_goes_wrong(
    media: Media, script: Callable[[int, bytes, Address], Answers], counted: dict[str, int]
) -> None:
    with scripted_relay(script) as relay:
        report = media.run(range(relay.port, relay.port + 1), Shape(RTP_BYTES, 2), 20)

    require_counts(report, counted, "lost", "late", "wrong")


def test_the_media_load_sends_rtp(media: Media) -> None:
    with scripted_relay(echo) as relay:
        media.run(range(relay.port, relay.port + 1), Shape(RTP_BYTES, 1), 5)
        first = relay.latest
        media.run(range(relay.port, relay.port + 1), Shape(RTP_BYTES, 1), 1)

    assert (len(first), first[:2]) == (172, b"\x80\x00")
    sequence, time, source = struct.unpack("!HII", first[2:12])
    following = (sequence + 1, time + 160, source)
    assert struct.unpack("!HII", relay.latest[2:12]) == following


@pytest.mark.parametrize(
    ("calls", "each"), [(2, (1, 0, 1, 0)), (4, (1, 1, 1, 1)), (6, (2, 2, 1, 1))]
)
def test_the_media_load_spreads_calls_over_the_ports(
    media: Media, calls: int, each: tuple[int, ...]
) -> None:
    first = free_range(4)
    ports = range(first, first + 4)
    with ExitStack() as stack:
        relays = [stack.enter_context(scripted_relay(echo, port)) for port in ports]
        report = media.run(ports, Shape(RTP_BYTES, calls), 3 * calls)

    assert (report.answered, report.wrong) == (3 * calls, 0)
    assert tuple(len(relay.sources) for relay in relays) == each


def test_a_relay_of_calls_that_answers_nothing_stops_the_benchmark(media: Media) -> None:
    with (
        scripted_relay(lambda *_: []) as relay,
        pytest.raises(BenchmarkError, match=f"{relay.port} have stopped answering: 0 answers"),
    ):
        media.run(range(relay.port, relay.port + 1), Shape(RTP_BYTES, 1), 20)


def test_a_range_of_free_ports_has_none_that_is_taken() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        first = free_range(10)
        taken.bind(("127.0.0.1", first + 4))

        assert free_range(10) > first + 4


def test_no_two_services_share_a_port() -> None:
    ports = range(1000, 1000 + OTHER_PORTS + 20)

    ways = ways_of(ports)

    assert [port for way in ways for port in way.ports] == list(ports)
    assert [(way.webrtc, len(way.ports)) for way in ways] == [
        (False, 1),
        (True, 1),
        (False, FEW),
        (True, FEW),
        (True, 20),
    ]


def test_the_weight_of_a_deploy_is_what_it_adds(tmp_path: Path) -> None:
    grower = (
        "import socket, sys\nprint(flush=True)\nsys.stdin.readline()\nblob = b'x' * 50_000_000\n"
        "kept = [socket.socket() for n in range(100)]\nprint(flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", grower], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # it has started

        def deploy() -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()

        weight = weigh(Running("it", process.pid, 0, tmp_path), 100, deploy)
        process.stdin.close()

    assert (weight.ports, weight.descriptors) == (100, 100)
    assert weight.memory > 40_000_000
    assert weight.seconds > 0
    assert weight.cpu > 0


def test_the_udp_benchmark_runs() -> None:
    shown = smoke("benchmarks.udp")

    for part in ("kamal", "bare", "CPU for a relayed datagram", "Added latency", "flood"):
        assert part in shown
    for part in ("What a service of calls weighs", "1,000", "CPU for a relayed RTP datagram"):
        assert part in shown
