"""A relay under test, and the clients and targets that talk through it.

Everything is a real socket on loopback and one thread drives it all: `Driver.pump` waits for the
relay's descriptor and the peers' sockets until something is true, `Driver.settle` until nothing is
under way any more. No timing is asserted; the limit only ends a test that would hang.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from contextlib import ExitStack, contextmanager
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, NamedTuple

import attrs
import pytest

from kamal_proxy._fastpath import (
    RUN_EMPTIED,
    RUN_MORE,
    RUN_NEWCOMERS,
    RUN_PINNED,
    RUN_REFUSED,
    Relay,
)
from kamal_proxy.errors import ListenError
from kamal_proxy.udp.ports import listen_udp
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

LIMIT = 30.0  # seconds after which what is waited for has failed
AT_ONCE = 2  # milliseconds for which one call moves datagrams
LARGEST = 65507  # bytes of payload over IPv4

# Linux has these, and Python 3.11 no names for them (asm-generic/socket.h, in6.h, udp.h).
SO_NO_CHECK = 11
IPV6_MTU = 24
UDP_SEGMENT = 103
UDP_GRO = 104

needs_ipv6 = pytest.mark.skipif(
    not socket.has_dualstack_ipv6() or not os.path.exists("/proc/net/if_inet6"),
    reason="this host has no IPv6",
)


class Newcomer(NamedTuple):
    """What `Relay.newcomers` tells of one."""

    number: int
    listener: int
    client: bytes
    local: bytes


class Refusal(NamedTuple):
    """What `Relay.refusals` tells of one."""

    session: int
    generation: int
    target: int
    affinity: bool
    answered: bool
    moves: int
    refusals: int
    span: float
    client: bytes
    local: bytes


class Pin(NamedTuple):
    """What `Relay.pins` tells of one."""

    session: int
    key: int
    target: int
    generation: int


@attrs.frozen
class Datagram:
    """What a peer received: one datagram, or with UDP_GRO a train of them.

    Attributes:
        data: The payload.
        source: Whom it is from.
        tos: Type of service or traffic class: DSCP and ECN.
        segment: Bytes of each datagram of a train but the last; 0 for a single one.
    """

    data: bytes
    source: tuple[str, int]
    tos: int = 0
    segment: int = 0


def packed(address: str) -> bytes:
    """Return the 16 bytes of an address as the relay has it."""
    ip = ip_address(address)
    return (ip if ip.version == 6 else IPv6Address(f"::ffff:{ip}")).packed


def end_of(where: tuple[str, int]) -> bytes:
    """Return the 18 bytes of an end as the relay has it."""
    return packed(where[0]) + where[1].to_bytes(2)


def _listen(addresses: Sequence[str]) -> list[socket.socket]:
    while True:
        try:
            return listen_udp(addresses, 0)
        except ListenError:
            # The port that was chosen for the first address is taken on another.
            if len(addresses) < 2:
                raise


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


class Peer:
    """A client or a target: a UDP socket that keeps what it receives.

    Args:
        address: Address to bind; its family is the socket's.
        port: Port to bind; 0 lets the kernel choose.
        trains: Whether to receive trains whole (UDP_GRO).

    Attributes:
        received: What it received, in order.
        answer: Makes answers of a datagram, which go where it came from.
    """

    def __init__(self, address: str = "127.0.0.1", port: int = 0, *, trains: bool = False) -> None:
        self.six = ":" in address
        family = socket.AF_INET6 if self.six else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        if self.six:
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        else:
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        if trains:
            self.sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        try:
            self.sock.bind((address, port))
        except OSError:
            self.sock.close()
            raise
        host, port = self.sock.getsockname()[:2]
        self.where: tuple[str, int] = (host, port)
        self.received: list[Datagram] = []
        self.answer: Callable[[Datagram], Iterable[bytes]] | None = None

    @property
    def data(self) -> list[bytes]:
        """The payloads that it received."""
        return [datagram.data for datagram in self.received]

    def send(
        self, data: bytes, to: tuple[str, int], *, tos: int | None = None, segment: int = 0
    ) -> None:
        """Send a datagram, or with ``segment`` a train of datagrams of so many bytes."""
        control: list[tuple[int, int, bytes]] = []
        if tos is not None and self.six:
            control.append((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", tos)))
        elif tos is not None:
            control.append((socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", tos)))
        if segment:
            control.append((socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", segment)))
        assert self.sock.sendmsg([data], control, 0, to) == len(data)

    def read(self) -> None:
        """Take what is there, and answer it."""
        while True:
            try:
                data, control, flags, source = self.sock.recvmsg(1 << 17, 256)
            except BlockingIOError:
                return
            assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            tos = segment = 0
            for level, kind, value in control:
                if (level, kind) == (socket.IPPROTO_IP, socket.IP_TOS):
                    tos = value[0]
                elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_TCLASS):
                    (tos,) = struct.unpack("i", value)
                elif (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
                    (segment,) = struct.unpack("i", value)
            datagram = Datagram(data, (source[0], source[1]), tos, segment)
            self.received.append(datagram)
            for answer in self.answer(datagram) if self.answer else ():
                self.send(answer, datagram.source)


def free_range(count: int) -> tuple[int, int]:
    """Return so many ports in a row that nobody uses, below those that the kernel chooses from."""
    choice = random.Random()
    while True:
        low = choice.randrange(20_000, 32_000)
        with ExitStack() as stack:
            try:
                for port in range(low, low + count):
                    stack.enter_context(Peer("127.0.0.1", port).sock)
            except OSError:
                continue
        return low, low + count - 1


class Client(Peer):
    """A peer that sends to the relay."""

    to: tuple[str, int]

    def say(self, data: bytes, *, tos: int | None = None, segment: int = 0) -> None:
        """Send to the listener."""
        self.send(data, self.to, tos=tos, segment=segment)


class Target(Peer):
    """A peer that the relay sends to; ``number`` is what the relay knows it by."""

    number: int


def echo(datagram: Datagram) -> Iterable[bytes]:
    """Answer with the same."""
    return [datagram.data]


class Driver:
    """Owns a relay with its listeners and peers, and drives them.

    Args:
        addresses: Where to listen; none means all addresses.
        sockets: As for `Relay`.

    Attributes:
        generation: What newcomers are admitted to.
        targets: Their targets; only the first counts with affinity.
        header: What each datagram to a target begins with.
        decide: What becomes of a newcomer; by default it is admitted.
        refusals: All refusals that the relay told, in order.
        pins: All sessions that found their target, in order.
        emptied: How often the relay told that a generation had become empty.
        turns: How often it ran.
        pair: The last pair of ports that it listens on.
        asked: How often targets were asked whose client somebody is; the last key.
    """

    def __init__(self, *addresses: str, sockets: bool = True) -> None:
        self.relay = Relay(bytes(range(16)), sockets=sockets)
        self._addresses = addresses
        self.listeners = _listen(addresses)
        self.port: int = self.listeners[0].getsockname()[1]
        self.numbers = [self.relay.listen(sock.fileno()) for sock in self.listeners]
        self.generation = self.relay.add_generation(60.0, 60.0)
        self.targets: list[int] = []
        self.header = b""
        self.decide: Callable[[Newcomer], None] = self.admit
        self.refusals: list[Refusal] = []
        self.pins: list[Pin] = []
        self.emptied = 0
        self.turns = 0
        self.pair = (0, 0)
        self.asked = 0
        self._peers: dict[int, Peer] = {}
        self._epoll = select.epoll()
        self._epoll.register(self.relay.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Close everything."""
        self.relay.close()
        self._epoll.close()
        for sock in self.listeners:
            sock.close()
        for peer in self._peers.values():
            peer.sock.close()

    def listen(self, port: int) -> int:
        """Listen on a further port of the first address; return the listener's number."""
        sock = listen_udp(self._addresses[:1], port)[0]
        self.listeners.append(sock)
        self.numbers.append(self.relay.listen(sock.fileno()))
        return self.numbers[-1]

    def listen_to_pair(self, *addresses: str) -> list[tuple[Target, Target]]:
        """Listen on a pair of ports, ``pair``; return targets that have the same ports."""
        while True:
            self.pair = free_range(2)
            opened: list[Target] = []
            try:
                for address in addresses:
                    opened += [Target(address, port) for port in self.pair]
                break
            except OSError:  # the ports are free on the first address only
                for target in opened:
                    target.sock.close()
        self.relay.pair(*[self.listen(port) for port in self.pair])
        for rtp, rtcp in zip(opened[::2], opened[1::2], strict=True):
            rtp.number = rtcp.number = self.relay.add_target(rtp.where[0], 0)
            self.targets.append(rtp.number)
            self._watch(rtp)
            self._watch(rtcp)
        return list(zip(opened[::2], opened[1::2], strict=True))

    # Peers

    def client(
        self, address: str = "127.0.0.1", port: int = 0, *, to: str = "", trains: bool = False
    ) -> Client:
        """Open a client, which sends to ``to`` (the loopback address of its family)."""
        client = Client(address, port, trains=trains)
        client.to = (to or ("::1" if client.six else "127.0.0.1"), self.port)
        self._watch(client)
        return client

    def caller(self, address: str = "127.0.0.1", *ports: int) -> tuple[Client, Client]:
        """Open the two clients of a call, which send to ``pair``."""
        clients = [self.client(address, port) for port in ports or (0, 0)]
        for client, port in zip(clients, self.pair, strict=True):
            client.to = (client.to[0], port)
        rtp, rtcp = clients
        return rtp, rtcp

    def target(self, address: str = "127.0.0.1", port: int = 0, *, trains: bool = False) -> Target:
        """Open a target and make it known to the relay; newcomers may be admitted to it."""
        target = self.reopened(address, port, trains=trains)
        target.number = self.relay.add_target(*target.where)
        self.targets.append(target.number)
        return target

    def reopened(self, address: str, port: int, *, trains: bool = False) -> Target:
        """Open a target that the relay may know already."""
        target = Target(address, port, trains=trains)
        self._watch(target)
        return target

    def _watch(self, peer: Peer) -> None:
        self._peers[peer.sock.fileno()] = peer
        self._epoll.register(peer.sock.fileno(), select.EPOLLIN)

    def shut(self, peer: Peer) -> None:
        """Close a peer: what is sent to it is refused from now on."""
        del self._peers[peer.sock.fileno()]
        peer.sock.close()

    # Driving

    def admit(self, newcomer: Newcomer) -> None:
        """Begin the session of a newcomer as its generation has them."""
        self.relay.admit(newcomer.number, self.generation, self.targets[:1], self.header)

    def spread(self, newcomer: Newcomer) -> None:
        """Begin the session of a newcomer with all targets."""
        self.relay.admit(newcomer.number, self.generation, self.targets, self.header)

    def ask(self, newcomer: Newcomer) -> None:
        """Ask all targets whose client a newcomer is, or somebody whose own does not know it."""
        self.asked += 1
        number, key = newcomer.number, self.asked
        if self.relay.has_session(number):
            self.relay.ask(number, self.targets, key, self.header)
        else:
            self.relay.admit(number, self.generation, self.targets, self.header, asking=key)

    def pair_up(self, newcomer: Newcomer) -> None:
        """Let a newcomer be the other half of a session, or begin one; nobody else is asked."""
        if self.relay.has_session(newcomer.number):
            return
        partner = self.relay.partner(newcomer.number)
        if partner is None:
            self.admit(newcomer)
        else:
            self.relay.join(newcomer.number, partner[0], self.header)

    def newcomers(self) -> list[Newcomer]:
        """Return those of the last turn."""
        return [Newcomer(*each) for each in self.relay.newcomers()]

    def turn(self, milliseconds: int = AT_ONCE) -> int:
        """Do what the owner of a relay does when its descriptor is readable, once."""
        result = self.relay.run(milliseconds)
        if result & RUN_NEWCOMERS:
            for newcomer in self.newcomers():
                self.decide(newcomer)
        if result & RUN_REFUSED:
            self.refusals += [Refusal(*each) for each in self.relay.refusals()]
        if result & RUN_PINNED:
            self.pins += [Pin(*each) for each in self.relay.pins()]
        if result & RUN_EMPTIED:
            self.emptied += 1
        self.turns += 1
        return result

    def has_work(self) -> bool:
        """Return whether the relay's descriptor is readable."""
        with select.epoll() as epoll:
            epoll.register(self.relay.fileno(), select.EPOLLIN)
            return bool(epoll.poll(0))

    def _work(self, patience: float) -> bool:
        """Wait for something to do and do it; return whether there was something."""
        ready = self._epoll.poll(patience)
        for fd, _ in ready:
            peer = self._peers.get(fd)
            if peer is not None:
                peer.read()
            elif fd == self.relay.fileno():
                while self.turn() & RUN_MORE:
                    pass
        return bool(ready)

    def pump(self, until: Callable[[], object]) -> None:
        """Move datagrams until something is true."""
        end = time.monotonic() + LIMIT
        while not until():
            left = end - time.monotonic()
            assert left > 0, f"it did not happen: {self.relay.counters()}"
            self._work(left)

    def settle(self) -> None:
        """Move datagrams until none is under way: loopback delivers within the system call."""
        end = time.monotonic() + LIMIT
        while self._work(0):
            assert time.monotonic() < end, "it does not come to rest"

    def wait_for(self, seconds: float) -> None:
        """Let time pass while datagrams move: until a session that nobody answers is over."""
        generation = self.relay.add_generation(seconds, seconds)
        target = self.relay.add_target("127.0.0.1", free_port())
        client = end_of(("127.255.255.254", 1 + generation))
        listener = self.numbers[0]
        self.relay.restore(
            listener, client, 0, packed("127.0.0.1"), generation, target, 0, False, 0.0
        )
        self.pump(lambda: not self.relay.sessions(generation))
        self.relay.drop_generation(generation)
        self.relay.drop_target(target)

    # What is known of it

    def dropped(self) -> dict[str, int]:
        """Return the counters of dropped datagrams that are not 0."""
        counted: dict[str, int] = self.relay.counters()["dropped"]
        return {reason: count for reason, count in counted.items() if count}

    def ended(self, generation: int | None = None) -> dict[str, int]:
        """Return the counters of ended sessions that are not 0: a generation's, or all."""
        if generation is None:
            counted: dict[str, int] = self.relay.counters()["ended"]
        else:
            counted = self.relay.ended(generation)
        return {reason: count for reason, count in counted.items() if count}

    def upstreams(self, target: tuple[str, int]) -> list[socket.socket]:
        """Return the relay's own sockets that are connected to a target, for mischief.

        They are duplicates, which the caller closes.
        """
        names = [name for name in os.listdir("/proc/self/fd") if _is_socket(name)]
        found = [socket.socket(fileno=os.dup(int(name))) for name in names]
        for sock in [each for each in found if _peer_of(each) != target]:
            found.remove(sock)
            sock.close()
        return found


def _is_socket(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except OSError:  # that of the directory which was listed
        return False


def _peer_of(sock: socket.socket) -> tuple[str, int] | None:
    """Return the address of a connected UDP socket's peer."""
    if sock.type != socket.SOCK_DGRAM:
        return None
    try:
        host, port, *_ = sock.getpeername()
    except OSError:  # it is not connected
        return None
    return host, port


@contextmanager
def driving(*addresses: str, sockets: bool = True) -> Iterator[Driver]:
    """Drive a relay that listens on some addresses, or all."""
    driver = Driver(*addresses, sockets=sockets)
    try:
        yield driver
    finally:
        driver.close()
