"""Datagrams of every size, on every address, through the real command; networks with small MTUs."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.e2e.namespaces import can_make_namespaces, open_namespace
from tests.e2e.udp_room import NOTHING, has_ipv6, rows
from tests.ports import free_port, is_free
from tests.running import open_command
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.running import Command

BUFFER = 4 * 1024 * 1024
LARGEST = 65_507  # bytes of payload that an IPv4 datagram can have; IPv6 has room for 20 more
SOL_UDP, UDP_SEGMENT = 17, 103  # udp(7); Python 3.11 has no names for them
HOSTS = [LOCALHOST, "127.0.0.2", "127.0.0.3"]

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@attrs.define(eq=False)
class Echo:
    """A server that sends back every datagram as it is, and keeps a copy."""

    sock: trio.socket.SocketType
    received: list[bytes] = attrs.field(factory=list)
    sources: set[object] = attrs.field(factory=set)

    def __str__(self) -> str:
        host, port, *_ = self.sock.getsockname()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def run(self) -> None:
        """Answer, for ever."""
        while True:
            data, source = await self.sock.recvfrom(65_536)
            self.received.append(data)
            self.sources.add(source)
            await self.sock.sendto(data, source)


@asynccontextmanager
async def open_echo(sock: trio.socket.SocketType) -> AsyncIterator[Echo]:
    """Let a bound socket be an echo for the length of a block."""
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        async with trio.open_nursery() as nursery:
            echo = Echo(sock)
            nursery.start_soon(echo.run)
            yield echo
            nursery.cancel_scope.cancel()


async def bound(host: str = LOCALHOST) -> trio.socket.SocketType:
    """Return a UDP socket that is bound to an address."""
    sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    await sock.bind((host, 0))
    return sock


async def deploy(command: Command, target: object, port: int, *flags: str) -> None:
    """Deploy to a target that has no TCP port."""
    result = await command.kp(
        "deploy-udp", "game", f"--target={target}", f"--port={port}", "--health-check=none", *flags
    )
    assert (result.code, result.out, result.err) == (0, NOTHING, "")


async def exchange(sock: trio.socket.SocketType, host: str, port: int, data: bytes) -> None:
    """Send a datagram, and require it back from where it was sent."""
    await sock.sendto(data, (host, port))
    answer, source = await sock.recvfrom(65_536)
    assert (answer, *source[:2]) == (data, host, port)


# --- addresses -----------------------------------------------------------------------------------


async def test_answers_come_from_the_address_that_was_asked(command: Command) -> None:
    port = free_port()
    async with open_echo(await bound()) as echo:
        await deploy(command, echo, port)
        with await bound("0.0.0.0") as client, await bound() as another:
            for host in [*HOSTS, *HOSTS]:
                await exchange(client, host, port, f"to {host}".encode())
                await exchange(another, host, port, f"also to {host}".encode())

        assert len(echo.sources) == 2 * len(HOSTS), "the address that was asked is of the session"


@needs_ipv6
async def test_both_versions_of_ip_on_either_side(command: Command) -> None:
    port = free_port()
    async with open_echo(await bound()) as four, open_echo(await bound("::1")) as six:
        for echo in (four, six):
            await deploy(command, echo, port)
            with await bound() as client, await bound("::1") as another:
                await exchange(client, LOCALHOST, port, f"4 to {echo}".encode())
                await exchange(another, "::1", port, f"6 to {echo}".encode())
            assert await rows(command) == [f"game * udp/{port} {echo} running no"]
            assert (await command.kp("remove", "game")).code == 0


async def test_only_addresses_that_were_named_are_served(directory: Path) -> None:
    port = free_port()
    async with (
        open_command(directory, "--bind=127.0.0.2", "--bind=127.0.0.3") as command,
        open_echo(await bound()) as echo,
    ):
        await deploy(command, echo, port)
        with await bound() as client:
            await exchange(client, "127.0.0.3", port, b"three")
            await exchange(client, "127.0.0.2", port, b"two")
        with await bound() as stranger:
            await stranger.connect((LOCALHOST, port))
            await stranger.send(b"one")
            with pytest.raises(ConnectionRefusedError):
                await stranger.recv(1)
        assert (await command.kp("remove", "game")).code == 0
        assert is_free(port)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "largest"),
    [(LOCALHOST, LARGEST), pytest.param("::1", LARGEST + 20, marks=needs_ipv6)],
)
async def test_datagrams_of_any_size_pass_whole(command: Command, host: str, largest: int) -> None:
    port = free_port()
    async with open_echo(await bound(host)) as echo:
        await deploy(command, echo, port)
        with await bound(host) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            for size in (0, 1, 1472, 1473, 16_385, largest, 0):
                await exchange(client, host, port, bytes(index % 251 for index in range(size)))


async def test_one_that_leaves_no_room_for_the_header_is_dropped(command: Command) -> None:
    port = free_port()
    async with open_echo(await bound()) as echo:
        await deploy(command, echo, port, "--proxy-protocol")
        with await bound() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            header = 28  # bytes, for IPv4
            for data in (bytes(LARGEST), bytes(LARGEST - header), bytes(LARGEST), b""):
                await client.sendto(data, (LOCALHOST, port))
            for size in (LARGEST, header):
                assert len(await client.recv(65_536)) == size

        assert [len(data) for data in echo.received] == [LARGEST, header]
        assert len(echo.sources) == 1


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not can_make_namespaces(), reason="network namespaces can't be made here (unshare, ip)"
)
async def test_trains_on_a_path_that_is_too_small_for_them(directory: Path) -> None:
    """The client's network takes 1500 bytes, the target's only 1280.

    The kernel refuses to send a train of datagrams (UDP_SEGMENT) that a path is too small for, and
    would cut each of them into fragments one by one.
    """
    port = free_port()
    async with (
        open_namespace() as proxy,
        open_namespace(proxy) as outside,
        open_command(directory, wrapper=proxy.enter) as command,
    ):
        await proxy.connect(outside, "10.9.0.1", "10.9.0.2", mtu=1500)
        await proxy.connect(outside, "10.9.1.1", "10.9.1.2", mtu=1280)
        # An address of the second interface that is asked by way of the first.
        await proxy.ip("address add 10.9.2.1/32 dev net-10-9-1")
        await outside.ip("route add 10.9.2.1 via 10.9.0.1")
        async with open_echo(await outside.open_socket("10.9.1.2")) as echo:
            await deploy(command, echo, port)
            with await outside.open_socket("10.9.0.2") as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                for host in ("10.9.0.1", "10.9.2.1"):
                    await exchange(client, host, port, f"to {host}".encode())
                    for size, count, rest in ((1200, 40, 0), (1472, 44, 7), (1200, 54, 0)):
                        sent = [
                            bytes([number]) * (size if number < count else rest)
                            for number in range(count + bool(rest))
                        ]
                        client.setsockopt(SOL_UDP, UDP_SEGMENT, size)
                        echo.received.clear()
                        await client.sendto(b"".join(sent), (host, port))
                        client.setsockopt(SOL_UDP, UDP_SEGMENT, 0)
                        answers = [await client.recvfrom(65_536) for _ in sent]
                        assert echo.received == sent
                        assert [data for data, _ in answers] == sent
                        assert {source for _, source in answers} == {(host, port)}
            assert len(echo.sources) == 2
