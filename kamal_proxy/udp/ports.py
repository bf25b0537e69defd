"""The UDP listeners of a service: binding them all or none, and saying why that can't be.

Knows how many file descriptors can be had. What arrives on a listener is the relay's business, and
which service has which port the caller's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

import attrs

from kamal_proxy.errors import ListenError
from kamal_proxy.listeners import privilege_hint, reason
from kamal_proxy.udp.owners import owner_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kamal_proxy.udp.names import SocketAddress

BUFFER_SIZE = 4 * 1024 * 1024  # bytes asked for, in each direction
# The same for a port of a range, which carries one call: strangers can fill thousands of them.
RANGE_BUFFER_SIZE = 512 * 1024
_MOST_RESERVED = 20_000
_LEAST_SESSIONS = 100
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


def listen_udp(
    addresses: Sequence[str], port: int, *, tell_owner: bool = True
) -> list[socket.socket]:
    """Bind a UDP listener on each address; see :class:`Binder`."""
    return Binder(addresses).bind(port, tell_owner=tell_owner)


class Binder:
    """Binds UDP listeners on some addresses, port by port.

    The sockets are IPv6 ones where the host has IPv6; IPv4 addresses are bound, and told by the
    kernel, as IPv4-mapped ones. They do not block, and tell of a datagram which address it was sent
    to, its DSCP and ECN bits, how many the kernel has dropped, and the size of its parts if the
    kernel joined several (UDP_GRO). That a client refuses is told on the error queue (IP_RECVERR).

    Args:
        addresses: IP addresses; none means all, IPv4 and IPv6. ``::`` means all of IPv6 only, as
            for :func:`kamal_proxy.listeners.listen_tcp`.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._texts = tuple(addresses) or ("",)
        # Looked up when the first port is bound: it is an error of that what can't be.
        self._addresses: list[_Address] = []

    @property
    def sockets_each(self) -> int:
        """How many sockets each port takes."""
        return len(self._texts)

    def bind(
        self, port: int, *, buffer: int = BUFFER_SIZE, tell_owner: bool = True
    ) -> list[socket.socket]:
        """Bind a listener on each address; after a failure none is bound.

        Args:
            port: Port; for 0 the kernel chooses one for the first address, and the others follow.
            buffer: Bytes that each may hold of what it receives, and of what it sends.
            tell_owner: Whether to look for the owner of a port that is taken, which blocks for up
                to 0.2 s.

        Raises:
            ListenError: naming the address, and the owner of a port that is taken.
        """
        bound: list[socket.socket] = []
        try:
            for place in range(len(self._texts)):
                bound.append(self._bind(place, port, buffer, tell_owner=tell_owner))
                port = port or bound[0].getsockname()[1]
        except BaseException:
            for sock in bound:
                sock.close()
            raise
        return bound

    def _bind(self, place: int, port: int, buffer: int, *, tell_owner: bool) -> socket.socket:
        sock = None
        try:
            if place == len(self._addresses):
                self._addresses.append(_find_address(self._texts[place]))
            address = self._addresses[place]
            sock = socket.socket(address.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise ListenError(
                f"listen udp {self._name(place, port)}: {reason(error)}{_descriptor_hint(error)}"
            ) from error
        try:
            _set_options(sock, address.options)
            _raise_buffer(sock, socket.SO_RCVBUF, _SO_RCVBUFFORCE, buffer)
            _raise_buffer(sock, socket.SO_SNDBUF, _SO_SNDBUFFORCE, buffer)
            sock.bind((address.host, port, *address.rest))
        except OSError as error:
            sock.close()
            hint = privilege_hint(error, port)
            host = address.host if self._texts[place] else ""
            if tell_owner and error.errno == errno.EADDRINUSE and (owner := owner_of(port, host)):
                hint = f" by {owner}"
            raise ListenError(
                f"listen udp {self._name(place, port)}: bind: {reason(error)}{hint}"
            ) from error
        return sock

    def _name(self, place: int, port: int) -> str:
        text = self._texts[place]
        return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


@attrs.frozen
class _Address:
    """Where a listener is bound, whatever its port is.

    Attributes:
        family: Family of its socket.
        host: Its address, as ``bind`` takes it.
        rest: What follows the port there.
        options: The options of its socket: level, name, value, and whether it can do without.
    """

    family: int
    host: str
    rest: tuple[int, ...]
    options: tuple[tuple[int, int, int, bool], ...]


def _find_address(text: str) -> _Address:
    dual = socket.has_dualstack_ipv6()
    family: int = socket.AF_INET6 if dual else socket.AF_INET
    host = "::" if dual else "0.0.0.0"  # noqa: S104  # all is what was asked for
    rest: tuple[int, ...] = ()
    if text:
        family, _, _, _, where = socket.getaddrinfo(
            text, 0, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
        )[0]
        host, rest = str(where[0]), tuple(map(int, where[2:]))
        if family == socket.AF_INET and dual:
            family, host = socket.AF_INET6, f"{_MAPPED}{host}"
    only_six = bool(text) and not host.startswith(_MAPPED)
    return _Address(family, host, rest, _options(family, only_six=only_six))


def _options(family: int, *, only_six: bool) -> tuple[tuple[int, int, int, bool], ...]:
    ip, ipv6 = socket.IPPROTO_IP, socket.IPPROTO_IPV6
    if family == socket.AF_INET6:
        needed = [
            (ipv6, socket.IPV6_V6ONLY, int(only_six), False),
            (ipv6, socket.IPV6_RECVPKTINFO, 1, False),
        ]
        wanted = [(ipv6, socket.IPV6_RECVTCLASS), (ipv6, _IPV6_RECVERR)]
    else:
        needed, wanted = [(ip, _IP_PKTINFO, 1, False)], []
    wanted += [(ip, socket.IP_RECVTOS), (ip, _IP_RECVERR)]
    wanted += [(socket.SOL_SOCKET, _SO_RXQ_OVFL), (socket.IPPROTO_UDP, _UDP_GRO)]
    return (*needed, *((level, name, 1, True) for level, name in wanted))


def _set_options(sock: socket.socket, options: Iterable[tuple[int, int, int, bool]]) -> None:
    for level, name, value, can_do_without in options:
        try:
            sock.setsockopt(level, name, value)
        except OSError:
            # A kernel that does not know one of these serves as well, and tells less.
            if not can_do_without:
                raise


def _descriptor_hint(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "; raise the limit of open files (ulimit -n)"
    return ""


def _raise_buffer(sock: socket.socket, option: int, force: int, size: int) -> None:
    """Ask for a larger buffer: beyond the system's limit if we may, else up to that."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, option, size)


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


def require_descriptors(ranges: str, sockets: int) -> None:
    """Raise ListenError if there are too few file descriptors for the ports of some ranges.

    What is kept from sessions is kept from listeners too, and some sessions should find room.

    Args:
        ranges: The ranges, for the sentence.
        sockets: Listeners of all services together.
    """
    keep = kept_descriptors() + _LEAST_SESSIONS
    if available_descriptors(sockets, keep=keep) < sockets:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ListenError(
            f"port-ranges {ranges} need a limit of {sockets + keep} open files, and it is {limit}; "
            "raise it (ulimit -n, LimitNOFILE of systemd, --ulimit nofile of docker)"
        )


def make_room(descriptors: int) -> None:
    """Let the kernel's table of this process's descriptors grow once, for many that will be opened.

    Otherwise it grows again and again while they are, and each time that takes some 10 ms. This
    blocks for as long, and is meant for a thread. Without room nothing happens.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = min(descriptors, soft - 1) if soft != resource.RLIM_INFINITY else descriptors
    with contextlib.suppress(OSError), open(os.devnull, "rb") as file:
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, highest))


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
