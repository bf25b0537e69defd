"""The UDP sockets of HTTP/3: binding them, and one datagram in or out with both its addresses.

An answer must leave from the address that the client wrote to, or the client discards it; on a
socket bound to all addresses only the packet information of the kernel tells which that was. What
is in the datagrams is the endpoint's business.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from kamal_proxy.errors import ListenError
from kamal_proxy.listeners import Address, privilege_hint, reason

if TYPE_CHECKING:
    from collections.abc import Iterable

BUFFER_SIZE = 4 * 1024 * 1024  # bytes asked for, in each direction
MAX_DATAGRAM = 65535

# Linux has these, and Python 3.11 no names for them (in.h, asm-generic/socket.h).
_IP_PKTINFO = 8
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_IP_MTU_DISCOVER = 10
_IP_PMTUDISC_PROBE = 3
_IPV6_MTU_DISCOVER = 23

_PKTINFO4 = struct.Struct("=i4s4s")  # interface, local address, destination of the header
_PKTINFO6 = struct.Struct("=16si")  # destination, interface
_SPACE = socket.CMSG_SPACE(max(_PKTINFO4.size, _PKTINFO6.size))
_LINK_LOCAL = b"\xfe\x80"
_MAPPED = "::ffff:"


class Path(NamedTuple):
    """Between which two addresses datagrams pass; a QUIC connection may move to another.

    Attributes:
        peer: The client's address, as the socket tells it.
        local: Packet information that makes an answer leave from where the client wrote to; empty
            if the kernel told none.
    """

    peer: tuple[str | int, ...]
    local: bytes

    @property
    def address(self) -> Address:
        """The client's address for the log and the targets; IPv4 in IPv6 becomes IPv4."""
        host, port = self.peer[:2]
        return str(host).partition("%")[0].removeprefix(_MAPPED), int(port)


def listen_quic(bind: str, port: int) -> socket.socket:
    """Bind a UDP socket for HTTP/3; ``bind`` means what it means for ``listeners.listen_tcp``.

    Args:
        bind: An IP address; empty means all, IPv4 and IPv6.
        port: The HTTPS port; 0 lets the kernel choose.

    Raises:
        ListenError: naming the address and what to do.
    """
    name = f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
    dual = not bind and socket.has_dualstack_ipv6()
    host = bind or ("::" if dual else "0.0.0.0")  # noqa: S104  # all addresses was asked for
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise ListenError(f"listen udp {name}: {reason(error)}") from error
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            # QUIC forbids fragments (RFC 9000 14).
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        if family == socket.AF_INET or dual:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        _raise_buffer(sock, socket.SO_RCVBUF, _SO_RCVBUFFORCE)
        _raise_buffer(sock, socket.SO_SNDBUF, _SO_SNDBUFFORCE)
        sock.bind(address)
    except OSError as error:
        sock.close()
        hint = privilege_hint(error, port)
        raise ListenError(f"listen udp {name}: bind: {reason(error)}{hint}") from error
    return sock


def _raise_buffer(sock: socket.socket, option: int, force: int) -> None:
    """Ask for a larger buffer: beyond the system's limit if we may, else up to that."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, BUFFER_SIZE)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)


def receive_nowait(sock: socket.socket) -> tuple[bytes, Path] | None:
    """Return the next datagram and its path, or None if none waits.

    Raises:
        OSError: the kernel could not give one, for want of memory say.
    """
    try:
        data, ancillary, _, peer = sock.recvmsg(MAX_DATAGRAM, _SPACE)
    except BlockingIOError:
        return None
    return data, Path(peer, _local(ancillary))


def _local(ancillary: Iterable[tuple[int, int, bytes]]) -> bytes:
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            address, interface = _PKTINFO6.unpack_from(data)
            # The way back is the routing table's to find, where the address leaves a choice.
            return _PKTINFO6.pack(address, interface if address.startswith(_LINK_LOCAL) else 0)
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            _, address, _ = _PKTINFO4.unpack_from(data)
            return _PKTINFO4.pack(0, address, bytes(4))
    return b""


def send_nowait(sock: socket.socket, data: bytes, path: Path) -> bool:
    """Send a datagram; return whether the kernel took it.

    What it did not take is lost, as on the network, and QUIC sends it again.
    """
    ancillary = []
    if len(path.local) == _PKTINFO6.size:
        ancillary.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, path.local))
    elif path.local:
        ancillary.append((socket.IPPROTO_IP, _IP_PKTINFO, path.local))
    try:
        sock.sendmsg((data,), ancillary, 0, path.peer)
    except OSError:
        return False
    return True
