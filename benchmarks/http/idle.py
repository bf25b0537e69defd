"""Measures what an idle keep-alive client connection costs a proxy in memory.

Resident memory of the processes only; what the kernel keeps for the sockets is the same for all.
"""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import attrs

from benchmarks.http.contenders import HOST
from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from benchmarks.processes import Running

REQUEST = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
SPARE_DESCRIPTORS = 300
TIMEOUT = 10.0


@attrs.frozen
class IdleMemory:
    """Resident memory in bytes without and with the connections, and how many did not last."""

    before: int
    after: int
    lost: int


def measure_idle(program: Running, connections: int, beside: int) -> IdleMemory:
    """Open connections that each make one request and stay; then see that they still serve.

    Args:
        program: The proxy.
        connections: How many to measure.
        beside: How many more to hold from before the first look at the memory: at least as many as
            the program has held before, so that no memory left over from them is used again.
    """
    with ExitStack() as stack:
        clients = [_open(program.port, stack) for _ in range(beside)]
        lost = {client for client in clients if not answers(client)}
        before = program.rss_bytes()
        for _ in range(connections):
            client = _open(program.port, stack)
            clients.append(client)
            if not answers(client):
                lost.add(client)
        after = program.rss_bytes()
        lost |= {client for client in clients if client not in lost and not answers(client)}
    return IdleMemory(before, after, len(lost))


def answers(client: socket.socket) -> bool:
    """Make one request; tell whether a complete answer of status 200 came."""
    try:
        client.sendall(REQUEST)
        received = b""
        while not complete(received):
            data = client.recv(65536)
            if not data:
                return False
            received += data
    except OSError:
        return False
    return received.startswith(b"HTTP/1.1 200 ")


def complete(answer: bytes) -> bool:
    """Tell whether an answer with a ``Content-Length`` is all there."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    raise BenchmarkError(f"an answer without Content-Length: {head!r}")


def raise_descriptor_limit(connections: int) -> None:
    """Allow this process and those it starts enough open files.

    Raises:
        BenchmarkError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A proxy may hold two for a connection.
    wanted = 2 * connections + SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BenchmarkError(
            f"{connections} idle connections need {wanted} open files, the limit is {hard}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open(port: int, stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT))
