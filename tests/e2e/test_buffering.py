"""Buffering by the real command: memory stays small, and disks and signals do no harm."""

from __future__ import annotations

import hashlib
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.running import open_command
from tests.scripted import ok, open_client

if TYPE_CHECKING:
    from tests.running import Command
    from tests.scripted import Client, Peer, Upstream

MEGABYTE = 1024 * 1024
PIECE = random.Random(4).randbytes(MEGABYTE)
LENGTH = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
BUFFERING = ("--buffer-requests", "--buffer-responses", "--buffer-memory=1048576")


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    """Provide a directory for buffered bodies; it must never have an entry."""
    directory = tmp_path / "spill"
    directory.mkdir()
    return directory


def names(directory: Path) -> list[str]:
    """Return what a directory shows."""
    return [path.name for path in directory.iterdir()]


def spilled(command: Command, spill: Path) -> list[int]:
    """Return the sizes of the files without a name that the command has open in a directory."""
    sizes = []
    for entry in Path(f"/proc/{command.pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith(f"{spill}/"):
                sizes.append(entry.stat().st_size)
        except FileNotFoundError:
            continue  # closed meanwhile
    return sizes


def resident(command: Command, kind: str) -> int:
    """Return the command's memory in bytes: VmRSS for now, VmHWM for the most it ever was."""
    for line in Path(f"/proc/{command.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == kind:
            return int(value.split()[0]) * 1024
    raise AssertionError(kind)


async def send_pieces(client: Client, count: int) -> None:
    for _ in range(count):
        await client.send(PIECE)


async def wait_spilled(command: Command, spill: Path, least: int) -> None:
    """Wait until bodies of at least so many bytes are on disk; 0 waits until none is."""
    while (sum(spilled(command, spill)) < least) if least else spilled(command, spill):
        await wait_all_tasks_blocked()


async def test_large_bodies_take_disk_and_no_memory(
    directory: Path, upstream: Upstream, spill: Path
) -> None:
    size = 64
    whole = hashlib.sha256(PIECE * size).digest()
    sums = []

    async def serve(peer: Peer) -> None:
        head = await peer.receive_until(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % (size * MEGABYTE) in head
        checksum, left = hashlib.sha256(), size * MEGABYTE
        while left:
            data = await peer.receive_some()
            checksum.update(data)
            left -= len(data)
        sums.append(checksum.digest())
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size * MEGABYTE))
        for _ in range(size):
            await peer.send(PIECE)
        await peer.wait_closed()

    async with (
        open_command(directory, f"--spill-directory={spill}") as command,
        open_client(command.port) as client,
    ):
        await command.deploy("web", *upstream.flags(), *BUFFERING)
        await client.get()
        before = resident(command, "VmRSS")
        upstream.script(serve)
        upstream.peers[0].shutdown_write()  # it would be used again

        await client.send(LENGTH % (size * MEGABYTE))
        await send_pieces(client, size // 2)
        await wait_spilled(command, spill, (size // 2 - 2) * MEGABYTE)
        assert (len(upstream.peers), names(spill)) == (1, [])
        await send_pieces(client, size // 2)
        await client.receive_until(b"\r\n\r\n")
        received, left = hashlib.sha256(), size * MEGABYTE
        while left:
            data = await client.receive_some()
            received.update(data)
            left -= len(data)

        assert (sums, received.digest()) == ([whole], whole)
        assert resident(command, "VmHWM") - before < 24 * MEGABYTE
        await wait_spilled(command, spill, 0)
        assert not names(spill)


async def test_limits_outlive_a_restart(directory: Path, upstream: Upstream) -> None:
    async with open_command(directory) as command:
        await command.deploy(
            "web",
            *upstream.flags(),
            *BUFFERING,
            "--max-request-body=1000",
            "--max-response-body=2000",
        )
    async with open_command(directory) as command, open_client(command.port) as client:
        await client.send(LENGTH % 1000 + bytes(1000))
        assert (await client.receive_response()).status == 200
        upstream.peers[-1].shutdown_write()

        async def serve(peer: Peer) -> None:
            await peer.receive_request()
            await peer.send(ok(bytes(2001)))

        upstream.script(serve)
        assert (await client.get()).status == 500
        await client.send(LENGTH % 1001)
        assert (await client.receive_response()).status == 413
        lines = await command.lines.wait_requests(3)
    assert [line.get("reason") for line in lines[1:]] == ["response_too_large", "request_too_large"]


async def test_a_disk_without_room(directory: Path, upstream: Upstream, spill: Path) -> None:
    """A limit on the size of files stands for it."""
    limit = ("sh", "-c", 'ulimit -f 4096; exec "$@"', "sh")  # 2 or 4 MiB, as shells count
    async with (
        open_command(directory, f"--spill-directory={spill}", wrapper=limit) as command,
        open_client(command.port) as client,
        open_client(command.port) as another,
    ):
        await command.deploy("web", *upstream.flags(), *BUFFERING)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_refused, client, 16)
            assert (await client.receive_response()).status == 507
            nursery.cancel_scope.cancel()
        await another.send(LENGTH % (2 * MEGABYTE) + PIECE * 2)
        assert (await another.receive_response()).status == 200

        error = await command.lines.wait_for_message("Body can't be buffered")
        assert str(spill) in error["error"]
        (refused, _) = await command.lines.wait_requests(2)
        assert (refused["status"], refused["reason"]) == (507, "spill_full")
        await wait_spilled(command, spill, 0)
    assert not names(spill)


async def send_refused(client: Client, count: int) -> None:
    """Send a body that the proxy may stop reading."""
    try:
        await client.send(LENGTH % (count * MEGABYTE))
        await send_pieces(client, count)
    except OSError:
        return


async def test_shutdown_waits_for_a_body(directory: Path, upstream: Upstream, spill: Path) -> None:
    async with (
        open_command(directory, f"--spill-directory={spill}", stop=False) as command,
        open_client(command.port) as client,
        open_client(command.port) as idle,
    ):
        await command.deploy("web", *upstream.flags(), *BUFFERING)
        await idle.get()
        await client.send(LENGTH % (4 * MEGABYTE))
        await send_pieces(client, 3)
        await wait_spilled(command, spill, MEGABYTE)

        command.process.send_signal(signal.SIGTERM)
        assert await idle.receive_eof() == b""
        await send_pieces(client, 1)
        response = await client.receive_response()

        assert response.status == 200
        assert response.get(b"connection") == [b"close"]
        assert await command.wait() == 0
    assert upstream.requests[-1].body == PIECE * 4
    assert command.errors == b""


async def test_a_kill_leaves_nothing_on_disk(
    directory: Path, upstream: Upstream, spill: Path
) -> None:
    async with (
        open_command(directory, f"--spill-directory={spill}", stop=False) as command,
        open_client(command.port) as client,
    ):
        await command.deploy("web", *upstream.flags(), *BUFFERING)
        await client.send(LENGTH % (9 * MEGABYTE))
        await send_pieces(client, 8)
        await wait_spilled(command, spill, 4 * MEGABYTE)

        assert await command.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not names(spill)
    assert upstream.peers == []
