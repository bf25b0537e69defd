"""Options of ``run`` at work in the real command: each set by a flag, and by its variable.

What is not limited as it was set hangs for longer than a test may take, as the defaults do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy.proxy_protocol import encode_v2
from tests.running import kp, open_command
from tests.scripted import LOCALHOST, Held, ok, open_client, reply

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Command
    from tests.scripted import Upstream

OTHER = "127.0.0.2"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
Check = Callable[["Command", "Upstream"], Awaitable[None]]


def has_ipv6() -> bool:
    """Tell whether the machine has ``::1``."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no ::1 here")


# Limits


async def head_timeout(command: Command, _: Upstream) -> None:
    async with open_client(command.port) as silent, open_client(command.port) as client:
        await client.send(GET[:-1])
        assert (await client.receive_response()).status == 408
        assert await silent.receive_eof() == b""


async def idle_timeout(command: Command, _: Upstream) -> None:
    async with open_client(command.port) as client:
        assert (await client.get()).status == 200
        assert await client.receive_eof() == b""


async def stall_timeout(command: Command, upstream: Upstream) -> None:
    async with open_client(command.port) as client:
        await client.send(POST % 10 + b"half")
        assert (await client.receive_response(b"POST")).status == 408
    upstream.script(reply(ok(bytes(20_000_000))))
    async with open_client(command.port, receive_buffer=4096) as client:
        await client.send(GET)
        line = await command.lines.wait_for(lambda line: line.get("reason") == "client_stalled")
    assert line["status"] == 499


async def shutdown_timeout(command: Command, upstream: Upstream) -> None:
    held = Held(upstream)
    upstream.script(held)
    async with open_client(command.port) as client:
        await client.send(GET)
        await upstream.wait_requests(1)
        with trio.fail_after(8):  # by default it waits for longer
            assert await command.stop() == 0


async def max_head_size(command: Command, _: Upstream) -> None:
    for size, status in ((1500, 200), (1501, 431)):
        padding = size - len(GET) - len(b"X: \r\n")
        async with open_client(command.port) as client:
            response = await client.request(GET[:-2] + b"X: " + b"y" * padding + b"\r\n\r\n")
            assert response.status == status


async def max_headers(command: Command, _: Upstream) -> None:
    for count, status in ((3, 200), (4, 431)):
        async with open_client(command.port) as client:
            response = await client.request(GET[:-2] + b"X: y\r\n" * (count - 1) + b"\r\n")
            assert response.status == status


async def max_connections(command: Command, upstream: Upstream) -> None:
    held = Held(upstream)
    upstream.script(held, held)
    async with (
        open_client(command.port) as one,
        open_client(command.port) as two,
        open_client(command.port) as three,
    ):
        for client in (one, two):
            await client.send(GET)
        await upstream.wait_requests(2)
        await three.send(GET)
        assert (await command.kp("list")).code == 0, "it is not too busy to accept"
        assert len(upstream.requests) == 2
        held.release.set()
        assert (await one.receive_response()).body == b"held"
        one.close()
        assert (await three.receive_response()).body == b"hello"


async def max_spill(command: Command, upstream: Upstream) -> None:
    await command.deploy("web", *upstream.flags(), "--buffer-requests", "--buffer-memory=0")
    for size, status in ((1_000_000, 200), (1_000_001, 507)):
        async with open_client(command.port) as client:
            assert (await client.request(POST % size + bytes(size))).status == status


async def max_buffer_memory(command: Command, upstream: Upstream) -> None:
    """With no memory at all, every body needs a file, and so a quota of one byte is too small."""
    await command.deploy("web", *upstream.flags(), "--buffer-requests")
    for size, status in ((1, 200), (2, 507)):
        async with open_client(command.port) as client:
            assert (await client.request(POST % size + bytes(size))).status == status


async def spill_directory(command: Command, upstream: Upstream) -> None:
    await command.deploy("web", *upstream.flags(), "--buffer-requests", "--buffer-memory=0")
    async with open_client(command.port) as client:
        await client.send(POST % 600_000 + bytes(500_000))
        while not (files := spilled(command)):
            assert (await command.kp("list")).code == 0
        assert all(name.startswith(str(command.directory / "spill") + "/") for name in files)
        await client.send(bytes(100_000))
        assert (await client.receive_response()).status == 200


def spilled(command: Command) -> list[str]:
    """Return the names that open files had before they were unlinked."""
    descriptors = f"/proc/{command.pid}/fd"
    names = [os.readlink(f"{descriptors}/{each}") for each in os.listdir(descriptors)]
    return [name for name in names if name.endswith(" (deleted)") and not name.startswith("/mem")]


# Addresses


async def bind(command: Command, _: Upstream) -> None:
    for host in (LOCALHOST, OTHER):
        async with open_client(command.port, host=host) as client:
            assert (await client.get()).status == 200
    with pytest.raises(OSError, match="refused"):
        async with open_client(command.port, host="127.0.0.3"):
            pass


async def trusted_proxy(command: Command, upstream: Upstream) -> None:
    for source in (LOCALHOST, OTHER, "127.0.0.3"):
        async with open_client(command.port, source=source) as client:
            await client.get(headers="X-Forwarded-For: 198.51.100.1\r\n")
    assert [request.get(b"x-forwarded-for")[0] for request in upstream.requests] == [
        b"127.0.0.1",
        b"198.51.100.1, 127.0.0.2",
        b"198.51.100.1, 127.0.0.3",
    ]


async def proxy_protocol_from(command: Command, _: Upstream) -> None:
    for source in (OTHER, "127.0.0.3"):
        async with open_client(command.port, source=source) as client:
            await client.send(encode_v2(("198.51.100.1", 4711), ("203.0.113.1", 80)))
            assert (await client.get()).status == 200
    async with open_client(command.port) as client:
        assert (await client.get()).status == 200
    lines = await command.lines.wait_requests(3)
    addresses = [line["client_addr"] for line in lines]
    assert addresses == ["198.51.100.1", "198.51.100.1", LOCALHOST]


OPTIONS: list[tuple[Check, dict[str, str]]] = [
    (head_timeout, {"head-timeout": "500ms"}),
    (idle_timeout, {"idle-timeout": "100ms"}),
    (stall_timeout, {"stall-timeout": "100ms"}),
    (shutdown_timeout, {"shutdown-timeout": "0s"}),
    (max_head_size, {"max-head-size": "1500"}),
    (max_headers, {"max-headers": "3"}),
    (max_connections, {"max-connections": "2"}),
    (max_spill, {"max-spill": "1000000"}),
    (max_buffer_memory, {"max-buffer-memory": "0", "max-spill": "1"}),
    (spill_directory, {"spill-directory": "spill"}),
    (bind, {"bind": f"{LOCALHOST},{OTHER}"}),
    (trusted_proxy, {"trusted-proxy": f"{OTHER},127.0.0.3/32"}),
    (proxy_protocol_from, {"proxy-protocol-from": f"{OTHER},127.0.0.3/32"}),
]


def variable_of(flag: str) -> str:
    return "KAMAL_PROXY_" + flag.upper().replace("-", "_")


@pytest.mark.parametrize("by", ["flag", "variable"])
@pytest.mark.parametrize(
    ("check", "settings"), OPTIONS, ids=[check.__name__ for check, _ in OPTIONS]
)
async def test_an_option(
    directory: Path, upstream: Upstream, check: Check, settings: dict[str, str], by: str
) -> None:
    if "spill-directory" in settings:
        settings = {"spill-directory": str(directory / "spill")}
        await trio.Path(directory, "spill").mkdir()
    arguments, variables = [], {}
    for flag, value in settings.items():
        if by == "flag":
            arguments.append(f"--{flag}={value}")
        else:
            variables[variable_of(flag)] = value
    stop = check is not shutdown_timeout
    async with open_command(directory, *arguments, variables=variables, stop=stop) as command:
        await command.deploy("web", *upstream.flags())
        await check(command, upstream)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("HEAD_TIMEOUT", "soon", 'time: invalid duration "soon"'),
        ("STALL_TIMEOUT", "0s", "stall-timeout must be more than zero"),
        ("MAX_CONNECTIONS", "many", 'strconv.ParseInt: parsing "many": invalid syntax'),
        ("TRUSTED_PROXY", "10.0.0.1/8", "clear the bits after the prefix"),
        ("BIND", "localhost", "bind 'localhost' is not an IP address"),
    ],
)
async def test_a_bad_variable_is_named(
    directory: Path, variable: str, value: str, reason: str
) -> None:
    variables = {f"KAMAL_PROXY_{variable}": value}
    result = await kp(directory, "run", "--http-port=0", variables=variables)
    assert (result.code, result.out) == (1, "")
    start = f'Error: invalid value "{value}" for KAMAL_PROXY_{variable}: '
    assert result.err.startswith(start)
    assert reason in result.err
    assert result.err.count("\n") == 1


# Listening


async def test_one_port_on_several_addresses(directory: Path, upstream: Upstream) -> None:
    """Port 0 is chosen once, and all connections are of one proxy."""
    async with open_command(directory, "--bind", LOCALHOST, "--bind", OTHER) as command:
        await command.deploy("web", *upstream.flags())
        for host in (LOCALHOST, OTHER):
            async with open_client(command.port, host=host) as client:
                assert (await client.get()).status == 200
        lines = await command.lines.wait_requests(2)
    assert [line["port"] for line in lines] == [command.port] * 2


@needs_ipv6
async def test_ipv6(directory: Path, upstream: Upstream) -> None:
    async with open_command(directory, "--bind=::1", "--bind=127.0.0.1") as command:
        await command.deploy("web", *upstream.flags())
        for host in ("::1", LOCALHOST):
            async with open_client(command.port, host=host) as client:
                assert (await client.get()).status == 200
        lines = await command.lines.wait_requests(2)
    assert [line["client_addr"] for line in lines] == ["::1", LOCALHOST]
    assert [request.get(b"x-forwarded-for") for request in upstream.requests] == [
        [b"::1"],
        [b"127.0.0.1"],
    ]


@needs_ipv6
async def test_all_addresses_of_both_families(directory: Path, upstream: Upstream) -> None:
    """Named, they are as good as none: ``::`` leaves room for ``0.0.0.0``."""
    for arguments in (["--bind=0.0.0.0", "--bind=::"], []):
        async with open_command(directory, *arguments) as command:
            await command.deploy("web", *upstream.flags())
            for host in ("::1", LOCALHOST):
                async with open_client(command.port, host=host) as client:
                    assert (await client.get()).status == 200


@pytest.mark.parametrize(
    ("taken", "arguments", "named"),
    [
        (OTHER, ["--bind=127.0.0.1,127.0.0.2"], "127.0.0.2:{}"),
        (LOCALHOST, ["--bind=127.0.0.1,127.0.0.2"], "127.0.0.1:{}"),
        pytest.param("::1", ["--bind=::1"], "[::1]:{}", marks=needs_ipv6),
    ],
)
async def test_a_taken_port_is_named(
    directory: Path, taken: str, arguments: list[str], named: str
) -> None:
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as server:
        port = server.getsockname()[1]
        result = await kp(directory, "run", f"--http-port={port}", *arguments)
    name = named.format(port)
    assert result.code == 1
    assert result.err == f"Error: listen tcp {name}: bind: address already in use\n"


async def test_a_taken_port_for_metrics_is_named(directory: Path) -> None:
    with socket.create_server((LOCALHOST, 0)) as server:
        port = server.getsockname()[1]
        arguments = ["--http-port=0", f"--bind={LOCALHOST}", f"--metrics-port={port}"]
        result = await kp(directory, "run", *arguments)
    assert result.code == 1
    assert result.err == f"Error: listen tcp 127.0.0.1:{port}: bind: address already in use\n"
