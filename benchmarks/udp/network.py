"""Where the benchmark runs: a network namespace of its own, its ports, descriptors and cores.

What the machine does not allow is done without, and said.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import struct
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs

from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

T = TypeVar("T")

# linux/sched.h, linux/sockios.h, linux/if.h
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
WIDE_RANGE = (10000, 65535)
# Below what systems usually give to those who ask for any port.
LOWEST_OF_RANGE = 12_000
UDP_COUNTERS = Path("/proc/net/snmp")
# A relay holds more than its sessions' sockets, and other programs need source ports too.
SPARE_DESCRIPTORS = 300
SPARE_PORTS = 500


@attrs.frozen
class Network:
    """The place that was found.

    Attributes:
        namespace: What kind of network it is, for the reader.
        source_ports: How many sockets may have a source port at once, for all programs together.
        descriptors: How many files a program may have open.
        relay_cpu: The core that the relays run on.
        load_cpu: The core that the load and the echo server run on.
    """

    namespace: str
    source_ports: int
    descriptors: int
    relay_cpu: int
    load_cpu: int

    @property
    def may_spin(self) -> bool:
        """Whether the load may keep its core busy without keeping the relay from running."""
        return self.relay_cpu != self.load_cpu

    @property
    def most_ports(self) -> int:
        """How many ports a kamal-proxy can listen on.

        The other half of the descriptors is for sessions, and for what it keeps for HTTP.
        """
        return self.descriptors // 2 - SPARE_DESCRIPTORS

    def most_sessions(self, relays: int) -> int:
        """Return how many sessions each of several relays can have at the same time."""
        return min(
            (self.source_ports - SPARE_PORTS) // relays, self.descriptors - SPARE_DESCRIPTORS
        )


def prepare(descriptors: int) -> Network:
    """Enter a namespace, widen the range of source ports and raise the limit of open files.

    Args:
        descriptors: How many open files are wanted.
    """
    cpus = sorted(os.sched_getaffinity(0))
    return Network(
        namespace=_enter_namespace(),
        source_ports=_source_ports(),
        descriptors=_raise_descriptor_limit(descriptors),
        relay_cpu=cpus[-1],
        load_cpu=cpus[0],
    )


@contextmanager
def on_core(cpu: int, starting: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a context that starts programs, so that they run on one core only."""
    usual = os.sched_getaffinity(0)
    with ExitStack() as stack:
        os.sched_setaffinity(0, {cpu})
        try:
            started = stack.enter_context(starting)
        finally:
            os.sched_setaffinity(0, usual)
        yield started


def free_port() -> int:
    """Return a port of 127.0.0.1 that neither TCP nor UDP uses.

    Raises:
        BenchmarkError: none was found.
    """
    for _ in range(100):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            # On every address, as the load's clients have theirs all over 127.0.0.0/8.
            udp.bind(("0.0.0.0", 0))
            port = int(udp.getsockname()[1])
            try:
                tcp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BenchmarkError("no port is free for both TCP and UDP")


def free_range(ports: int) -> int:
    """Return the first of so many ports in a row that UDP uses on no address.

    Raises:
        BenchmarkError: there are none.
    """
    first = LOWEST_OF_RANGE
    while first + ports <= WIDE_RANGE[1]:
        taken = _last_taken(range(first, first + ports))
        if taken is None:
            return first
        first = taken + 1
    raise BenchmarkError(f"no {ports:,} ports in a row are free for UDP")


def kernel_drops() -> int:
    """Return how many datagrams the kernel has dropped in this namespace for full buffers."""
    names, values = (
        line.split() for line in UDP_COUNTERS.read_text().splitlines() if line.startswith("Udp: ")
    )
    return int(values[names.index("RcvbufErrors")])


def _last_taken(ports: range) -> int | None:
    """Return the last port that is not free, or None if all are."""
    for port in reversed(ports):
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(("0.0.0.0", port))
            except OSError:
                return port
    return None


def _enter_namespace() -> str:
    """Give this process a network namespace, as root or through a user namespace."""
    user = os.geteuid()
    group = os.getegid()
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(CLONE_NEWNET if user == 0 else CLONE_NEWNET | CLONE_NEWUSER) != 0:
        why = os.strerror(ctypes.get_errno())
        return f"the machine's own loopback, as a network namespace was refused ({why})"
    if user != 0:
        # The same numbers outside and inside: no program that is started takes itself for root.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(type=socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
    try:
        PORT_RANGE.write_text("{} {}".format(*WIDE_RANGE))
    except OSError as error:
        return f"a network namespace with the usual range of ports ({error.strerror})"
    return "a network namespace of its own"


def _source_ports() -> int:
    lowest, highest = (int(word) for word in PORT_RANGE.read_text().split())
    return highest - lowest + 1


def _raise_descriptor_limit(wanted: int) -> int:
    """Allow ``wanted`` open files here and in programs started later, or as many as possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (ValueError, OSError):  # needs a privilege
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return wanted
