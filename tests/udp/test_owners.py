"""Who has a UDP port that is taken: real sockets and processes, and tables that make no sense."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from kamal_proxy.errors import ListenError
from kamal_proxy.udp import owners
from kamal_proxy.udp.owners import owner_of
from kamal_proxy.udp.ports import listen_udp
from tests.udp.test_ports import taken

if TYPE_CHECKING:
    from pathlib import Path


def test_a_free_port_has_no_owner() -> None:
    with taken("127.0.0.2") as port:
        assert owner_of(port, "127.0.0.3") is None
    assert owner_of(port) is None
    assert owner_of(port, "127.0.0.2") is None


def test_the_owner_of_one_address_is_not_blamed_for_another() -> None:
    """The resolver of a machine often has 127.0.0.53, beside a name server on another address."""
    script = (
        "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM);"
        "s.bind(('127.0.0.3', int(sys.argv[1]))); print(flush=True); sys.stdin.read()"
    )
    with (
        taken("127.0.0.2") as port,
        subprocess.Popen(
            [sys.executable, "-c", script, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        for address, process in (("127.0.0.2", os.getpid()), ("127.0.0.3", other.pid)):
            owner = owner_of(port, address)
            assert owner is not None
            assert owner.endswith(f" (process {process})")
        assert other.stdin is not None
        other.stdin.close()


def test_the_name_of_an_owner_can_not_harm_a_terminal() -> None:
    script = (
        "import socket; open('/proc/self/comm', 'wb').write(b'a\\x1b[2J\\n\\xffb\\xc3\\xb6');"
        "s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.2', 0));"
        "print(s.getsockname()[1], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        owner = owner_of(int(other.stdout.readline()))
        other.communicate(b"\n")
    assert owner == f"a?[2J?\ufffdbö (process {other.pid})"


@pytest.mark.parametrize(
    ("wanted", "inodes"),
    [
        ("", {1, 2, 3, 4, 5}),
        ("127.0.0.2", {1, 3}),
        ("::ffff:127.0.0.2", {1, 3}),
        ("0.0.0.0", {1, 2, 3}),
        ("::1", {4, 5}),
        ("::", {4, 5}),
    ],
)
def test_who_is_in_the_way_of_an_address(wanted: str, inodes: set[int]) -> None:
    has = ("127.0.0.2", "127.0.0.3", "0.0.0.0", "::1", "::")
    rows = [(ip_address(address), inode) for inode, address in enumerate(has, 1)]
    assert owners._in_the_way(rows, wanted) == inodes


def test_who_may_be_in_the_way_of_an_address() -> None:
    """A socket on all of IPv6 may have all of IPv4 too; only then nobody else is to blame."""
    rows = [(ip_address("127.0.0.3"), 1), (ip_address("::"), 2), (ip_address("::1"), 3)]
    assert owners._in_the_way(rows, "127.0.0.2") == {2}
    assert owners._in_the_way(rows, "127.0.0.3") == {1}


@pytest.mark.parametrize("failing", ["open", "listdir", "readlink"])
def test_an_owner_that_can_not_be_read_is_left_out(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with taken("127.0.0.2") as port:
        assert owner_of(port) is not None
        if failing == "open":
            monkeypatch.setattr(owners, "open", refuse, raising=False)
        else:
            monkeypatch.setattr(os, failing, refuse)
        assert owner_of(port) is None
        with pytest.raises(ListenError) as caught:
            listen_udp(["127.0.0.2"], port)
    assert str(caught.value) == f"listen udp 127.0.0.2:{port}: bind: address already in use"


def test_an_owner_without_a_name() -> None:
    assert owners._process_name(2**30) == f"process {2**30}"


def test_lines_of_the_kernel_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port, table = 53, tmp_path / "udp"
    good = "0200007F" if sys.byteorder == "little" else "7F000002"
    rest = "00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0"
    table.write_bytes(
        b"  sl  local_address\n"
        b" 1: :0035 \n"
        b" 2: 0:0:0035 " + rest.encode() + b" 6 2 0 0\n"
        b" 3: XY:0035 " + rest.encode() + b" 7 2 0 0\n"
        b" 4: 010000000:0035 " + rest.encode() + b" 8 2 0 0\n"
        b" 5: \xff\xff:0035 " + rest.encode() + b" 9 2 0 0\n"
        b" 6: " + good.encode() + b":0035 " + rest.encode() + b" ten 2 0 0\n"
        b" 7: " + good.encode() + b":00350 " + rest.encode() + b" 11 2 0 0\n"
        b" 7: " + good.encode() + b":0035 00000000:0000\n"
        b" 7: " + good.encode() + b":1234 " + rest.replace("0000 ", "0035 ").encode() + b" 13\n"
        b" 8: " + good.encode() + b":0035 " + rest.encode() + b" 12 2 0 0\n"
    )

    def opened(path: str, **options: str) -> object:
        if path == "/proc/net/udp":
            return table.open(**options)  # type: ignore[call-overload]  # as it was asked for
        raise FileNotFoundError

    monkeypatch.setattr(owners, "open", opened, raising=False)
    assert list(owners._sockets_on(port)) == [(ip_address("127.0.0.2"), 12)]


def test_looking_for_an_owner_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()

    def readlink(path: str) -> str:
        asked[os.path.dirname(path)] += 1
        return "socket:[1]"

    # Some processes with many descriptors each.
    monkeypatch.setattr(os, "listdir", lambda path: [str(n) for n in range(5000)])
    monkeypatch.setattr(os, "readlink", readlink)
    assert owners._holder({2}) is None
    assert asked.total() == owners._MAX_DESCRIPTORS
    assert set(asked.values()) == {owners._MAX_DESCRIPTORS_EACH}
