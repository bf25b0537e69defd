"""SIGTERM and SIGINT: idle connections end, requests finish, and the exit code is 0."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.running import open_command
from tests.scripted import ok, open_client

if TYPE_CHECKING:
    from tests.scripted import Peer, Script, Upstream

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def held(release: trio.Event) -> Script:
    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await release.wait()
        await peer.send(ok(b"late"))

    return serve


@pytest.mark.parametrize("number", SIGNALS)
async def test_requests_finish(directory: Path, upstream: Upstream, number: signal.Signals) -> None:
    release = trio.Event()
    async with open_command(directory, stop=False) as command:
        await command.deploy("web", *upstream.flags())
        async with (
            open_client(command.port) as idle,
            open_client(command.port) as fresh,
            open_client(command.port) as busy,
        ):
            upstream.script(held(release))
            await busy.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
            await upstream.wait_peers(1)
            await idle.get()

            command.process.send_signal(number)
            assert await idle.receive_eof() == b""
            assert await fresh.receive_eof() == b""
            with pytest.raises(OSError, match="refused"):
                async with open_client(command.port):
                    pass
            release.set()
            response = await busy.receive_response(b"POST")

            assert (response.status, response.body) == (200, b"late")
            assert response.get(b"connection") == [b"close"]
            assert await busy.receive_eof() == b""
        assert await command.wait() == 0
        assert command.errors == b""
        assert not (directory / "kamal-proxy.sock").exists()
        await command.lines.wait_ended()
        messages = [line["msg"] for line in command.lines.all]
        assert messages[-1] == "Server stopped"
        assert messages.count("Request") == 2


async def test_stuck_request_is_cut(directory: Path, upstream: Upstream) -> None:
    async with open_command(directory, stop=False) as command:
        await command.deploy("web", *upstream.flags())
        async with open_client(command.port) as stuck:
            upstream.script(held(trio.Event()))
            await stuck.send(GET)
            await upstream.wait_peers(1)
            command.process.send_signal(signal.SIGTERM)

            assert (await stuck.receive_response()).status == 503
            assert await command.wait() == 0


async def test_deploy_that_is_waiting_fails(directory: Path, upstream: Upstream) -> None:
    async with open_command(directory, stop=False) as command:
        upstream.health = 503
        async with trio.open_nursery() as nursery:

            async def deploy() -> None:
                result = await command.kp("deploy", "web", *upstream.flags())
                assert (result.code, result.out) == (1, "")
                assert result.err.splitlines()[-1].startswith("Error: ")
                assert "Traceback" not in result.err

            nursery.start_soon(deploy)
            await upstream.wait_probes(1)
            assert await command.stop() == 0


@pytest.mark.parametrize("number", SIGNALS)
async def test_second_signal_ends_at_once(
    directory: Path, upstream: Upstream, number: signal.Signals
) -> None:
    async with open_command(directory, stop=False) as command:
        await command.deploy("web", *upstream.flags())
        async with open_client(command.port) as idle, open_client(command.port) as stuck:
            upstream.script(held(trio.Event()))
            await stuck.send(GET)
            await upstream.wait_peers(1)
            await idle.get()
            command.process.send_signal(signal.SIGTERM)
            assert await idle.receive_eof() == b""  # the first signal was seen

            command.process.send_signal(number)
            with trio.fail_after(5):
                code = await command.process.wait()
            assert code == 0
            assert command.errors == b""


def can_make_pid_namespace() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False)
    return tried.returncode == 0


def only_child(pid: int) -> tuple[int, int]:
    """Return the id of a process's child, and the id that the child has in its own namespace."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{child}/status").read_text()
    return int(child), int(status.split("NSpid:")[1].splitlines()[0].split()[-1])


@pytest.mark.skipif(not can_make_pid_namespace(), reason="needs unshare and the right to use it")
@pytest.mark.parametrize("number", SIGNALS)
async def test_as_process_1(directory: Path, upstream: Upstream, number: signal.Signals) -> None:
    """The kernel drops signals without a handler for process 1, as in a container."""
    async with open_command(
        directory, wrapper=["unshare", "--pid", "--fork"], stop=False
    ) as command:
        await command.deploy("web", *upstream.flags())
        async with open_client(command.port) as client:
            assert (await client.get()).body == b"hello"
            child, inner = only_child(command.pid)
            assert inner == 1
            os.kill(child, number)
            assert await client.receive_eof() == b""
        assert await command.wait() == 0
