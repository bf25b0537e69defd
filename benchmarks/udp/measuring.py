"""Measures relays under load: CPU time for a datagram, latency, memory, and a flood of sources."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING

import attrs

from benchmarks.processes import BenchmarkError, Running, family
from benchmarks.udp.load import Report
from benchmarks.udp.shapes import Shape

if TYPE_CHECKING:
    from benchmarks.udp.load import Load

# A request goes through a relay, and so does its answer.
DATAGRAMS = 2

# Of the sessions of a full relay, so many go on talking in the flood. What they send makes the
# place for what floods in: so the listener's queue stays short, and what is lost the relay lost.
TALKERS = Shape(64, 100)
NEWCOMERS_PER_REQUEST = 3


@attrs.frozen
class Sample:
    """One turn of one relay at one load.

    Attributes:
        cpu: Seconds of CPU for a datagram with the shape's window in flight.
        lone_cpu: Seconds of CPU for a datagram with one request in flight at a time.
        full: What the load reports with the window.
        lone: What it reports with one request in flight.
    """

    cpu: float
    lone_cpu: float
    full: Report
    lone: Report


@attrs.frozen
class Standing:
    """What many quiet sessions cost, and what a flood does to those who talk.

    Attributes:
        sessions: How many there are; it is also the limit.
        bytes_each: Resident memory of the process for one.
        opening: Seconds of CPU to open one.
        quiet: CPU time as a part of the time while all are quiet.
        empty: The same before there were many.
        newcomers: Sources in the flood.
        admitted: Newcomers that were answered.
        flood: What became of the requests of those who talked.
        refusing: Seconds of CPU for a newcomer's datagram.
    """

    sessions: int
    bytes_each: float
    opening: float
    quiet: float
    empty: float
    newcomers: int
    admitted: int
    flood: Report
    refusing: float


def cpu_seconds(program: Running) -> float:
    """Return the user and system time of a program and its children, to the nanosecond."""
    return sum(time.clock_gettime(_cpu_clock(pid)) for pid in family(program.pid))


def sample(program: Running, load: Load, shape: Shape, requests: int, lone: int) -> Sample:
    """Measure a relay once.

    Args:
        program: The relay.
        load: What talks to it.
        shape: The load.
        requests: How many with the shape's window.
        lone: How many with one in flight.
    """
    warm_up = max(shape.sessions, requests // 10)
    load.run(program.port, shape, warm_up)
    before = cpu_seconds(program)
    full = load.run(program.port, shape, requests)
    between = cpu_seconds(program)
    slow = load.run(program.port, shape, lone, window=1)
    after = cpu_seconds(program)
    return Sample(
        cpu=(between - before) / (DATAGRAMS * requests),
        lone_cpu=(after - between) / (DATAGRAMS * lone),
        full=full,
        lone=slow,
    )


def direct(load: Load, shape: Shape, lone: int) -> Report:
    """Measure the way to the echo server without a relay, with one request in flight."""
    return load.run(load.port, shape, lone, window=1)


def stand(program: Running, load: Load, sessions: int, newcomers: int, seconds: float) -> Standing:
    """Fill a new relay with sessions up to its limit, let them rest, and then flood it.

    Args:
        program: The relay; its limit is ``sessions``.
        load: What talks to it.
        sessions: How many.
        newcomers: Sources in the flood.
        seconds: How long all are quiet.

    Raises:
        BenchmarkError: the sessions could not be opened.
    """
    load.run(program.port, TALKERS, 20 * TALKERS.sessions)
    empty = _quiet(program, seconds)
    memory, cpu = program.rss_bytes(), cpu_seconds(program)
    everyone = attrs.evolve(TALKERS, sessions=sessions)
    opened = load.run(program.port, everyone, sessions)
    opening = cpu_seconds(program) - cpu
    memory = program.rss_bytes() - memory
    again = load.run(program.port, everyone, sessions)
    if opened.lost or again.lost:
        raise BenchmarkError(
            f"{program.name} lost {opened.lost + again.lost} requests of {sessions} new sessions"
        )
    time.sleep(seconds + 1)  # with 5: kamal-proxy saves new sessions within 5 seconds
    quiet = _quiet(program, seconds)
    requests = newcomers // NEWCOMERS_PER_REQUEST
    cpu = cpu_seconds(program)
    load.run(program.port, TALKERS, requests, window=TALKERS.sessions)
    undisturbed = cpu_seconds(program) - cpu
    cpu = cpu_seconds(program)
    flood = load.run(program.port, TALKERS, requests, window=TALKERS.sessions, newcomers=newcomers)
    flooded = cpu_seconds(program) - cpu
    new = sessions - TALKERS.sessions
    return Standing(
        sessions=sessions,
        bytes_each=memory / new,
        opening=opening / new,
        quiet=quiet,
        empty=empty,
        newcomers=newcomers,
        admitted=flood.newcomers_answered,
        flood=flood,
        refusing=(flooded - undisturbed) / newcomers,
    )


def _quiet(program: Running, seconds: float) -> float:
    before = cpu_seconds(program)
    time.sleep(seconds)
    return (cpu_seconds(program) - before) / seconds


def _cpu_clock(pid: int) -> int:
    """Return the clock of all CPU time of a process; see clock_getcpuclockid(3)."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise BenchmarkError(f"process {pid} has no CPU clock: error {error}")
    return clock.value
