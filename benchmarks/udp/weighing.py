"""What a kamal-proxy with a range of ports weighs: the time to deploy it, memory, descriptors."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from benchmarks.udp.measuring import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.processes import Running

MEMORY = Path("/proc/meminfo")
KIB = 1024


@attrs.frozen
class Weight:
    """What a deploy took, and what it left behind.

    Attributes:
        ports: How many were bound.
        seconds: How long the command took, its own start included.
        cpu: Seconds of CPU of the proxy in that time.
        memory: Bytes by which the proxy's resident memory grew.
        kernel: Bytes by which the slabs of the kernel grew, where sockets, files and what epoll
            knows of them are; those of the whole machine, as no others are counted.
        descriptors: By how many files more are open.
    """

    ports: int
    seconds: float
    cpu: float
    memory: int
    kernel: int
    descriptors: int


def weigh(program: Running, ports: int, deploy: Callable[[], None]) -> Weight:
    """Deploy a service and tell what that made of the proxy.

    Args:
        program: The proxy.
        ports: How many ports the service has.
        deploy: Deploys it.
    """
    cpu, memory = cpu_seconds(program), program.rss_bytes()
    kernel, descriptors = _slab_bytes(), _descriptors(program.pid)
    began = time.monotonic()
    deploy()
    seconds = time.monotonic() - began
    return Weight(
        ports=ports,
        seconds=seconds,
        cpu=cpu_seconds(program) - cpu,
        memory=program.rss_bytes() - memory,
        kernel=_slab_bytes() - kernel,
        descriptors=_descriptors(program.pid) - descriptors,
    )


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _slab_bytes() -> int:
    """Return the kernel's memory in slabs (proc_meminfo(5)); it is counted for all programs."""
    for line in MEMORY.read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("every Linux counts its slabs")
