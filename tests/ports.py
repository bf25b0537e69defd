"""Ports for what a test starts, and for what nobody shall answer on."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from tests.scripted import LOCALHOST


def free_port() -> int:
    """Return a port that is free, for UDP and TCP, where the kernel gives none by itself.

    A port that it chose could be given to another socket before the test binds it.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        lowest = int(file.read().split()[0])
    while True:
        port = random.randrange(10_000, max(lowest, 20_000))
        if is_free(port):
            with suppress(OSError), socket.create_server((LOCALHOST, port)):
                return port


def is_free(port: int) -> bool:
    """Tell whether nobody has a UDP port, on any address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True
