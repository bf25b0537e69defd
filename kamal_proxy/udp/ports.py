"""The UDP listeners of a service: binding them all or none, and saying why that can't be.

Knows which process owns a port that is taken, and how many file descriptors can be had. What
arrives on a listener is the relay's business, and which service has which port the caller's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice
from typing import TYPE_CHECKING

from kamal_proxy.errors import ListenError
from kamal_proxy.listeners import privilege_hint, reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kamal_proxy.udp.names import SocketAddress

BUFFER_SIZE = 4 * 1024 * 1024  # bytes asked for, in each direction
_MOST_RESERVED = 20_000
RESERVED_DESCRIPTORS = 100  # for listeners, probes, the admin API, the saved state

# Linux has these, and Python 3.11 no names for them (asm-generic/socket.h, in.h, in6.h, udp.h).
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SO_RXQ_OVFL = 40
_IP_PKTINFO = 8
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_UDP_GRO = 104

_MAPPED = "::ffff:"
# Looking for an owner holds up everything else; this many take about 0.2 s.
_MAX_SOCKETS = 100_000
_MAX_DESCRIPTORS = 30_000
_MAX_DESCRIPTORS_EACH = 1_000  # a listener is among the first that a process opens


def listen_udp(
    addresses: Sequence[str], port: int, *, tell_owner: bool = True
) -> list[socket.socket]:
    """Bind a UDP listener on each address; after a failure none is bound.

    The sockets are IPv6 ones where the host has IPv6; IPv4 addresses are bound, and told by the
    kernel, as IPv4-mapped ones. They do not block, and tell of a datagram which address it was sent
    to, its DSCP and ECN bits, how many the kernel has dropped, and the size of its parts if the
    kernel joined several (UDP_GRO). That a client refuses is told on the error queue (IP_RECVERR).

    Args:
        addresses: IP addresses; none means all, IPv4 and IPv6. ``::`` means all of IPv6 only, as
            for :func:`kamal_proxy.listeners.listen_tcp`.
        port: Port; for 0 the kernel chooses one for the first address, and the others follow.
        tell_owner: Whether to look for the owner of a port that is taken, which blocks for up to
            0.2 s.

    Raises:
        ListenError: naming the address, and the owner of a port that is taken.
    """
    with contextlib.ExitStack() as stack:
        bound = []
        for address in addresses or ("",):
            sock = stack.enter_context(_listen(address, port, tell_owner=tell_owner))
            bound.append(sock)
            port = sock.getsockname()[1]
        stack.pop_all()
    return bound


def _listen(address: str, port: int, *, tell_owner: bool) -> socket.socket:
    name = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        family, where = _listen_address(address, port)
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        raise ListenError(f"listen udp {name}: {reason(error)}") from error
    try:
        if family == socket.AF_INET6:
            only = bool(address) and not str(where[0]).startswith(_MAPPED)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        _set_options(sock)
        sock.bind(where)
    except OSError as error:
        sock.close()
        hint = privilege_hint(error, port)
        host = str(where[0]) if address else ""
        if tell_owner and error.errno == errno.EADDRINUSE and (owner := owner_of(port, host)):
            hint = f" by {owner}"
        raise ListenError(f"listen udp {name}: bind: {reason(error)}{hint}") from error
    return sock


def _listen_address(address: str, port: int) -> tuple[int, tuple[object, ...]]:
    dual = socket.has_dualstack_ipv6()
    if not address and dual:
        return socket.AF_INET6, ("::", port)
    if not address:
        return socket.AF_INET, ("0.0.0.0", port)  # noqa: S104  # all is what was asked for
    family, _, _, _, where = socket.getaddrinfo(
        address, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
    )[0]
    if family == socket.AF_INET and dual:
        return socket.AF_INET6, (f"{_MAPPED}{where[0]}", port)
    return family, where


def _set_options(sock: socket.socket) -> None:
    sock.setblocking(False)
    ip, ipv6 = socket.IPPROTO_IP, socket.IPPROTO_IPV6
    wanted = [(ip, socket.IP_RECVTOS), (ip, _IP_RECVERR)]
    if sock.family == socket.AF_INET6:
        sock.setsockopt(ipv6, socket.IPV6_RECVPKTINFO, 1)
        wanted += [(ipv6, socket.IPV6_RECVTCLASS), (ipv6, _IPV6_RECVERR)]
    else:
        sock.setsockopt(ip, _IP_PKTINFO, 1)
    wanted += [(socket.SOL_SOCKET, _SO_RXQ_OVFL), (socket.IPPROTO_UDP, _UDP_GRO)]
    for level, option in wanted:
        # A kernel that does not know one of these serves as well, and tells less.
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, 1)
    _raise_buffer(sock, socket.SO_RCVBUF, _SO_RCVBUFFORCE)
    _raise_buffer(sock, socket.SO_SNDBUF, _SO_SNDBUFFORCE)


def _raise_buffer(sock: socket.socket, option: int, force: int) -> None:
    """Ask for a larger buffer: beyond the system's limit if we may, else up to that."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, BUFFER_SIZE)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)


def is_own(address: SocketAddress, listening: Sequence[str]) -> bool:
    """Return whether what is sent to an address of that port arrives at our own listeners.

    Args:
        address: Where it is sent to.
        listening: The addresses of the listeners; none means all.
    """
    wanted = ip_address(address[0].partition("%")[0])
    bound = [ip_address(text.partition("%")[0]) for text in listening]
    if bound and not any(
        each == wanted or (each.is_unspecified and each.version == wanted.version) for each in bound
    ):
        return False
    if wanted.is_loopback:
        return True
    # Whoever sends to an address of this host does so from the same address.
    family = socket.AF_INET6 if wanted.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return bool(sock.getsockname()[0] == address[0])
    return False


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


_Row = tuple[IPv4Address | IPv6Address, int]


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
                    return _process_name(process)
    return None


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


def available_descriptors(wanted: int, *, keep: int = RESERVED_DESCRIPTORS) -> int:
    """Return how many file descriptors of ``wanted`` can be had, after asking the system for them.

    The soft limit of open files is raised as far as that takes and the hard limit lets it. No
    failure: the caller decides whether fewer will do.

    Args:
        wanted: Descriptors that all services together may want at a time.
        keep: Descriptors that the rest of the process needs.

    Returns:
        From 0 to ``wanted``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + keep
    if _is_less(soft, needed):
        raised = hard if _is_less(hard, needed) else needed
        # Refused if the system's own limit was lowered meanwhile: the soft limit holds then.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return max(0, soft - keep) if _is_less(soft, needed) else wanted


def kept_descriptors() -> int:
    """Return how many file descriptors are kept from UDP sessions, which strangers can open.

    HTTP connections, their targets and the admin API need some too: a quarter of what the process
    may have, but not more than all of them together are likely to.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return _MOST_RESERVED
    return max(RESERVED_DESCRIPTORS, min(hard // 4, _MOST_RESERVED))


def _is_less(limit: int, needed: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < needed
