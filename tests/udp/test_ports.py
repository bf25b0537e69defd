"""Binding UDP listeners: real sockets on loopback, and what is said when a port can't be had."""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar

import attrs
import pytest

from kamal_proxy.errors import ListenError
from kamal_proxy.udp import ports
from kamal_proxy.udp.ports import (
    BUFFER_SIZE,
    RANGE_BUFFER_SIZE,
    RESERVED_DESCRIPTORS,
    Binder,
    available_descriptors,
    listen_udp,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARK = 0xB9  # DSCP EF, ECN 01
ME = re.compile(rf".+ \(process {os.getpid()}\)")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


@contextmanager
def listening(*addresses: str, port: int = 0) -> Iterator[list[socket.socket]]:
    bound = listen_udp(addresses, port)
    with ExitStack() as stack:
        for sock in bound:
            stack.enter_context(sock)
        yield bound


@contextmanager
def taken(address: str, port: int = 0) -> Iterator[int]:
    """Let this process have a port of an address; yield the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        yield sock.getsockname()[1]


def port_of(sock: socket.socket) -> int:
    port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port


@attrs.frozen
class Datagram:
    """What a listener told of a datagram."""

    data: bytes
    client: tuple[str, int]
    local: str
    mark: int
    pktinfo: bytes


def receive(listener: socket.socket) -> Datagram:
    """Read the datagram that is there: loopback delivers within the system call."""
    data, ancillary, flags, client = listener.recvmsg(100, 1000)
    assert not flags & socket.MSG_CTRUNC
    local, mark, pktinfo = "", -1, b""
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            pktinfo, local = value, socket.inet_ntop(socket.AF_INET6, value[:16])
        elif (level, kind) == (socket.IPPROTO_IP, 8):  # IP_PKTINFO: index, local, destination
            pktinfo, local = value, socket.inet_ntop(socket.AF_INET, value[8:12])
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_TCLASS):
            (mark,) = struct.unpack("i", value)
        elif (level, kind) == (socket.IPPROTO_IP, socket.IP_TOS):
            mark = value[0]
    return Datagram(data, client[:2], local, mark, pktinfo)


@contextmanager
def client_of(family: socket.AddressFamily = socket.AF_INET) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        if family == socket.AF_INET:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, MARK)
            client.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            client.bind(("127.0.0.9", 0))
        else:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, MARK)
        yield client


# What is bound


def test_listens_on_all_addresses_of_both_families() -> None:
    with listening() as (listener,), client_of() as client:
        assert not listener.getblocking()
        assert listener.family == (
            socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        )
        client.sendto(b"hi", ("127.0.0.2", port_of(listener)))
        datagram = receive(listener)
    assert datagram.data == b"hi"


@needs_ipv6
def test_one_listener_has_both_families() -> None:
    with listening() as (listener,), client_of(socket.AF_INET6) as six, client_of() as four:
        six.sendto(b"six", ("::1", port_of(listener)))
        datagram = receive(listener)
        assert (datagram.data, datagram.local, datagram.mark) == (b"six", "::1", MARK)
        four.sendto(b"four", ("127.0.0.3", port_of(listener)))
        datagram = receive(listener)
        assert (datagram.data, datagram.local) == (b"four", "::ffff:127.0.0.3")
        assert datagram.client == ("::ffff:127.0.0.9", port_of(four))


@needs_ipv6
@pytest.mark.parametrize("address", ["", "0.0.0.0", "127.0.0.2", "::ffff:127.0.0.2"])
def test_ipv4_looks_alike_however_it_is_bound(address: str) -> None:
    with listening(*filter(None, [address])) as (listener,), client_of() as client:
        client.sendto(b"hi", ("127.0.0.2", port_of(listener)))
        datagram = receive(listener)
        assert listener.family == socket.AF_INET6
        assert (datagram.local, datagram.mark) == ("::ffff:127.0.0.2", MARK)
        assert datagram.client == ("::ffff:127.0.0.9", port_of(client))
        # The reply leaves from where the client sent to, and carries what it is told to.
        listener.sendmsg(
            [b"answer"],
            [
                (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, datagram.pktinfo[:16] + bytes(4)),
                (socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", datagram.mark)),
            ],
            0,
            datagram.client,
        )
        data, ancillary, _, source = client.recvmsg(100, 100)
        assert (data, source) == (b"answer", ("127.0.0.2", port_of(listener)))
        assert [value[0] for _, _, value in ancillary] == [MARK]


@pytest.mark.parametrize("address", ["", "127.0.0.2"])
def test_a_host_without_ipv6(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listening(*filter(None, [address])) as (listener,), client_of() as client:
        assert listener.family == socket.AF_INET
        client.sendto(b"hi", ("127.0.0.2", port_of(listener)))
        datagram = receive(listener)
    assert (datagram.local, datagram.mark) == ("127.0.0.2", MARK)


def test_each_address_has_a_listener_on_the_same_port() -> None:
    with listening("127.0.0.2", "127.0.0.3") as bound, client_of() as client:
        (port,) = {port_of(sock) for sock in bound}
        for number, sock in zip((2, 3), bound, strict=True):
            client.sendto(b"%d" % number, (f"127.0.0.{number}", port))
            assert receive(sock).data == b"%d" % number


@needs_ipv6
def test_all_of_ipv6_leaves_room_for_all_of_ipv4() -> None:
    with listening("::", "0.0.0.0") as (six, four), client_of() as client:
        assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        client.sendto(b"hi", ("127.0.0.1", port_of(four)))
        assert receive(four).data == b"hi"
        with pytest.raises(BlockingIOError):
            six.recv(1)


def test_a_binder_binds_port_after_port(refused: set[tuple[int, int]]) -> None:
    binder = Binder(["127.0.0.2", "127.0.0.3"])
    assert binder.sockets_each == 2
    with ExitStack() as stack:
        found = [stack.enter_context(sock) for _ in range(3) for sock in binder.bind(0)]
        hosts = [sock.getsockname()[0].removeprefix("::ffff:") for sock in found]
        assert hosts == ["127.0.0.2", "127.0.0.3"] * 3
        bound = [port_of(sock) for sock in found]
        assert bound[::2] == bound[1::2]
        assert len(set(bound)) == 3
        with pytest.raises(ListenError, match=rf"^listen udp 127\.0\.0\.2:{bound[2]}: bind: "):
            binder.bind(bound[2])
        assert {sock.fileno() for sock in Refusing.made} - {sock.fileno() for sock in found} == {-1}


def test_an_address_that_comes_later_can_be_bound_then() -> None:
    """As that of an interface that is not up yet when the proxy starts."""
    binder = Binder(["2001:db8::77"])
    for _ in range(2):
        with pytest.raises(ListenError, match=r"^listen udp \[2001:db8::77\]:9: "):
            binder.bind(9)


# Options


def test_the_buffer_of_a_port_of_a_range_is_smaller() -> None:
    binder = Binder(["127.0.0.2"])
    (small,), (large,) = binder.bind(0, buffer=RANGE_BUFFER_SIZE), binder.bind(0)
    with small, large, socket.socket(type=socket.SOCK_DGRAM) as plain:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            plain.setsockopt(socket.SOL_SOCKET, option, RANGE_BUFFER_SIZE)
            possible = plain.getsockopt(socket.SOL_SOCKET, option)
            size = small.getsockopt(socket.SOL_SOCKET, option)
            assert possible <= size <= 2 * RANGE_BUFFER_SIZE
            assert size <= large.getsockopt(socket.SOL_SOCKET, option)


def test_the_buffers_are_raised() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain, listening() as (listener,):
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            usual = plain.getsockopt(socket.SOL_SOCKET, option)
            plain.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)
            possible = plain.getsockopt(socket.SOL_SOCKET, option)
            assert listener.getsockopt(socket.SOL_SOCKET, option) >= max(usual, possible)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (ports._UDP_GRO, (socket.IPPROTO_UDP, ports._UDP_GRO)),
        (ports._SO_RXQ_OVFL, (socket.SOL_SOCKET, ports._SO_RXQ_OVFL)),
        (ports._IP_RECVERR, (socket.IPPROTO_IP, ports._IP_RECVERR)),
        (ports._IPV6_RECVERR, (socket.IPPROTO_IPV6, ports._IPV6_RECVERR)),
    ],
)
def test_options_are_set(option: int, name: tuple[int, int]) -> None:
    if name[0] == socket.IPPROTO_IPV6 and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    with listening() as (listener,):
        assert listener.getsockopt(*name) == 1


def test_a_client_that_refuses_is_told_of() -> None:
    with listening("127.0.0.2") as (listener,):
        with client_of() as client:
            client.sendto(b"hi", ("127.0.0.2", port_of(listener)))
            gone = receive(listener).client
        listener.sendto(b"answer", gone)
        data, _, flags, whom = listener.recvmsg(100, 1000, socket.MSG_ERRQUEUE)
    assert flags & socket.MSG_ERRQUEUE
    assert (data, whom[:2]) == (b"answer", gone)


class Refusing(socket.socket):
    """A socket of a kernel that knows, or allows, fewer options."""

    refused: ClassVar[set[tuple[int, int]]] = set()
    made: ClassVar[list[socket.socket]] = []

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)

    def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]  # the only overload used here
        if (level, option) in self.refused:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        super().setsockopt(level, option, value)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Return the (level, option) that sockets made from now on refuse; empty at first."""
    monkeypatch.setattr(Refusing, "refused", set())
    monkeypatch.setattr(Refusing, "made", [])
    monkeypatch.setattr(socket, "socket", Refusing)
    return Refusing.refused


def test_a_kernel_that_tells_less_serves_as_well(refused: set[tuple[int, int]]) -> None:
    refused |= {
        (socket.IPPROTO_UDP, ports._UDP_GRO),
        (socket.SOL_SOCKET, ports._SO_RXQ_OVFL),
        (socket.SOL_SOCKET, ports._SO_RCVBUFFORCE),
        (socket.SOL_SOCKET, ports._SO_SNDBUFFORCE),
    }
    with listening("127.0.0.1") as (listener,), socket.socket(type=socket.SOCK_DGRAM) as plain:
        assert not listener.getsockopt(socket.IPPROTO_UDP, ports._UDP_GRO)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            plain.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)
            possible = plain.getsockopt(socket.SOL_SOCKET, option)
            assert listener.getsockopt(socket.SOL_SOCKET, option) == possible


def test_a_kernel_that_does_not_tell_the_address_can_not_serve(
    refused: set[tuple[int, int]],
) -> None:
    refused |= {(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO), (socket.IPPROTO_IP, 8)}
    with pytest.raises(ListenError, match=r"^listen udp 127\.0\.0\.1:0: bind: operation not"):
        listen_udp(["127.0.0.1"], 0)
    assert [sock.fileno() for sock in Refusing.made if sock.type == socket.SOCK_DGRAM] == [-1]


# What can't be bound


def test_a_taken_port_is_named_with_its_owner() -> None:
    with taken("127.0.0.2") as port, pytest.raises(ListenError) as caught:
        listen_udp(["127.0.0.2"], port)
    text = str(caught.value)
    start = f"listen udp 127.0.0.2:{port}: bind: address already in use by "
    assert text.startswith(start)
    assert ME.fullmatch(text.removeprefix(start))


@pytest.mark.parametrize(
    ("has", "wants"),
    [
        ("127.0.0.2", ""),
        ("0.0.0.0", ""),
        ("0.0.0.0", "127.0.0.2"),
        pytest.param("::1", "", marks=needs_ipv6),
        pytest.param("::", "::1", marks=needs_ipv6),
    ],
)
def test_a_wider_or_narrower_owner_is_found(has: str, wants: str) -> None:
    name = f"[{wants}]" if ":" in wants else wants
    with taken(has) as port:
        with pytest.raises(ListenError) as caught:
            listen_udp([wants] if wants else [], port)
        start = f"listen udp {name}:{port}: bind: address already in use by "
        assert str(caught.value).startswith(start)


@needs_ipv6
@pytest.mark.parametrize("addresses", [(), ("0.0.0.0",), ("127.0.0.2",)])
def test_the_owner_may_have_an_ipv6_socket(addresses: tuple[str, ...]) -> None:
    with listening(*addresses) as (listener,):
        port = port_of(listener)
        with pytest.raises(ListenError, match=rf"in use by .+ \(process {os.getpid()}\)$"):
            listen_udp(["127.0.0.2"], port)


def test_after_a_failure_nothing_is_bound(refused: set[tuple[int, int]]) -> None:
    with taken("127.0.0.3") as port, pytest.raises(ListenError, match=r"127\.0\.0\.3"):
        listen_udp(["127.0.0.2", "127.0.0.3", "127.0.0.4"], port)
    assert {sock.fileno() for sock in Refusing.made} == {-1}
    with listening("127.0.0.2", "127.0.0.3", "127.0.0.4", port=port) as bound:
        assert len(bound) == 3


@pytest.mark.parametrize("address", ["127.0.0.1.5", "localhost", "192.0.2.77", "2001:db8::77"])
def test_an_address_that_can_not_be_bound_is_named(address: str) -> None:
    name = f"[{address}]" if ":" in address else address
    with pytest.raises(ListenError) as caught:
        listen_udp(["127.0.0.2", address], 0)
    assert re.match(rf"listen udp {re.escape(name)}:[1-9]\d*: ", str(caught.value))


def test_a_low_port_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unprivileged(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "socket", Unprivileged)
    with pytest.raises(ListenError) as caught:
        listen_udp([], 53)
    assert str(caught.value).startswith("listen udp :53: bind: permission denied (")
    assert "CAP_NET_BIND_SERVICE" in str(caught.value)


# Descriptors


@pytest.fixture
def limits() -> Iterator[Callable[[int], None]]:
    """Return what sets the soft limit of open files; it is put back in the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def set_soft(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    yield set_soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def soft_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_descriptors_that_are_there(limits: Callable[[int], None]) -> None:
    limits(512)
    assert available_descriptors(412) == 412
    assert available_descriptors(502, keep=10) == 502
    assert soft_limit() == 512


def test_the_soft_limit_is_raised_as_far_as_needed(limits: Callable[[int], None]) -> None:
    limits(512)
    assert available_descriptors(500) == 500
    assert soft_limit() == 500 + RESERVED_DESCRIPTORS


def test_the_hard_limit_holds() -> None:
    script = (
        "import resource as r; from kamal_proxy.udp.ports import available_descriptors as a;"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, 1024));"
        "print(a(10_000), r.getrlimit(r.RLIMIT_NOFILE), a(10, keep=5000))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == f"{1024 - RESERVED_DESCRIPTORS} (1024, 1024) 0\n".encode()


def test_too_few_descriptors_for_ranges() -> None:
    script = (
        "import resource as r; from kamal_proxy.udp.ports import require_descriptors as need;"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, 1024));"
        "need('1-668', 668); print(r.getrlimit(r.RLIMIT_NOFILE)); need('1-669', 669)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.stdout == b"(1024, 1024)\n", "a quarter is kept, and something for sessions"
    assert done.stderr.decode().splitlines()[-1] == (
        "kamal_proxy.errors.ListenError: port-ranges 1-669 need a limit of 1025 open files, and it "
        "is 1024; raise it (ulimit -n, LimitNOFILE of systemd, --ulimit nofile of docker)"
    )


def test_room_for_many_descriptors_takes_none() -> None:
    script = (
        "import os, resource as r; from kamal_proxy.udp.ports import make_room;"
        "r.setrlimit(r.RLIMIT_NOFILE, (900, 1024)); before = len(os.listdir('/proc/self/fd'));"
        "make_room(700); make_room(1_000_000); print(len(os.listdir('/proc/self/fd')) - before);"
        "print(*[line.split()[1] for line in open('/proc/self/status') if 'FDSize' in line])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"0\n1024\n"


def test_a_limit_that_can_not_be_raised(
    limits: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    limits(512)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert available_descriptors(10_000) == 512 - RESERVED_DESCRIPTORS
    monkeypatch.undo()


def test_no_limit_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: infinite)
    assert available_descriptors(10_000_000) == 10_000_000
