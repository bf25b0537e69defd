"""What names stand for: asking the name service, in threads that a caller's limiter bounds."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TypeAlias

import trio

ResolvedAddress: TypeAlias = tuple[socket.AddressFamily, tuple[object, ...]]


def resolve_nowait(
    host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM
) -> list[ResolvedAddress]:
    """Return what an IP address stands for, or nothing if the host is a name.

    Args:
        host: Name or address.
        port: Port.
        kind: ``SOCK_DGRAM`` for UDP.

    Raises:
        UnicodeError: the name is malformed.
    """
    with contextlib.suppress(socket.gaierror):
        return _look_up(host, port, kind, socket.AI_NUMERICHOST)
    return []


async def resolve(
    host: str,
    port: int,
    limiter: trio.CapacityLimiter,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> list[ResolvedAddress]:
    """Return the addresses of a TCP or UDP service, in the resolver's order.

    Args:
        host: Name or address.
        port: Port.
        limiter: Of the threads that wait for the name service. One that was cancelled goes on
            until the name service answers.
        kind: ``SOCK_DGRAM`` for UDP.

    Raises:
        OSError: the name can't be resolved, or no thread can be had for it.
        UnicodeError: the name is malformed.
    """
    if found := resolve_nowait(host, port, kind):
        return found
    try:
        return await trio.to_thread.run_sync(
            _look_up, host, port, kind, 0, abandon_on_cancel=True, limiter=limiter
        )
    except RuntimeError as error:  # the process may start no more threads
        raise OSError(errno.EAGAIN, str(error)) from error


def _look_up(host: str, port: int, kind: socket.SocketKind, flags: int) -> list[ResolvedAddress]:
    found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    return [(family, address) for family, _, _, _, address in found]
