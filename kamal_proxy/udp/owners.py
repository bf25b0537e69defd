"""Who has a UDP port that is taken, as far as the kernel lets this process see it.

For error messages: looks at no more than some thousand descriptors, and never raises.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SESSION = "a session of this proxy, as its port towards its target"
# Looking for an owner holds up everything else; this many take about 0.2 s.
_MAX_SOCKETS = 100_000
_MAX_DESCRIPTORS = 30_000
_MAX_DESCRIPTORS_EACH = 1_000  # a listener is among the first that a process opens

# The address and the inode of a socket.
_Row: TypeAlias = tuple[IPv4Address | IPv6Address, int]


def owner_of(port: int, address: str = "") -> str | None:
    """Return who has a UDP port, such as ``nginx (process 1234)``, or None if it can't be told.

    Never raises; looks at no more than some thousand descriptors, and only at those of processes
    that this one may look into. For error messages: it blocks for a moment.

    Args:
        port: The port.
        address: The address that can't be bound on it; empty for all.
    """
    rows = tuple(_sockets_on(port))
    inodes = _in_the_way(rows, address)
    return _holder(inodes) if inodes else None


def _sockets_on(port: int) -> Iterator[_Row]:
    """Yield the address and the inode of every UDP socket on a port (proc(5), /proc/net/udp)."""
    wanted = f"{port:04X}"
    for name in ("udp", "udp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{name}", errors="replace") as file:
            for line in islice(file, _MAX_SOCKETS):
                if f":{wanted} " not in line:
                    continue
                with contextlib.suppress(IndexError, ValueError):
                    fields = line.split()
                    address, found = fields[1].split(":")
                    if found == wanted:
                        yield _address(address), int(fields[9])


def _address(text: str) -> IPv4Address | IPv6Address:
    """Read an address as the kernel writes it: words of 32 bits in the machine's byte order."""
    data = b"".join(
        int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)
    )
    address = ip_address(data)
    return getattr(address, "ipv4_mapped", None) or address


def _in_the_way(rows: Sequence[_Row], text: str) -> set[int]:
    """Return the inodes of the sockets that leave no room for an address."""
    try:
        wanted = ip_address(text.partition("%")[0])
    except ValueError:  # none was named
        return {inode for _, inode in rows}
    wanted = getattr(wanted, "ipv4_mapped", None) or wanted
    same = {
        inode
        for address, inode in rows
        if address.version == wanted.version
        and (address == wanted or address.is_unspecified or wanted.is_unspecified)
    }
    if same:
        return same
    # A socket on all of IPv6 has all of IPv4 too, or has not: the kernel does not tell which.
    return {inode for address, inode in rows if address.is_unspecified}


def _holder(inodes: set[int]) -> str | None:
    """Return the first process that has one of the sockets open."""
    links = {f"socket:[{inode}]" for inode in inodes}
    left = _MAX_DESCRIPTORS
    for process in _numbers("/proc"):
        for descriptor in _numbers(f"/proc/{process}/fd")[:_MAX_DESCRIPTORS_EACH]:
            if not left:
                return None
            left -= 1
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(f"/proc/{process}/fd/{descriptor}") in links:
                    if process == os.getpid() and _is_connected(descriptor):
                        return f"{_SESSION} (process {process})"
                    return _process_name(process)
    return None


def _is_connected(descriptor: int) -> bool:
    """Return whether a socket of this process is connected, as those of sessions are."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        try:
            sock.getpeername()
        except OSError:
            return False
    return True


def _numbers(directory: str) -> list[int]:
    """Return the names in a directory that are numbers, in order; none if it can't be read."""
    try:
        return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())
    except OSError:
        return []


def _process_name(process: int) -> str:
    try:
        with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read(100).removesuffix("\n")
    except OSError:
        return f"process {process}"
    # A process may call itself anything, and this goes to a terminal.
    return f"{''.join(c if c.isprintable() else '?' for c in name)} (process {process})"
