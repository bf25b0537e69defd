"""Starting: from saved state, after a crash, beside another proxy, and when something is wrong."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import pytest

from tests.running import kp, open_command, open_directory, state_path
from tests.scripted import open_client, open_upstream, respond

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Command
    from tests.scripted import Upstream


async def require_served(command: Command, host: str, body: bytes) -> None:
    async with open_client(command.port) as client:
        assert (await client.get("/api/x", host=host)).body == body


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_services_serve_at_once_after_a_restart(
    directory: Path, upstream: Upstream, how: signal.Signals
) -> None:
    async with open_upstream(respond(b"api")) as api:
        async with open_command(directory, stop=False) as first:
            await first.deploy("web", *upstream.flags(), "--host=a.example,*.a.example")
            await first.deploy(
                "api", *api.flags(), "--host=a.example", "--path-prefix=/api", "--force"
            )
            listed = await first.kp("list")
            state = first.state_path.read_bytes()
            assert await first.stop(how) == (0 if how == signal.SIGTERM else -9)
        assert state_path(directory).read_bytes() == state

        upstream.health = api.health = 503  # they serve without a probe
        async with open_command(directory) as second:
            await require_served(second, "a.example", b"api")
            await require_served(second, "b.a.example", b"hello")
            await require_served(second, "c.example", (await not_found(second)))
            assert await second.kp("list") == listed
            assert second.state_path.read_bytes() == state
            assert next(line["msg"] for line in second.lines.all) == "Restored saved state"


async def not_found(command: Command) -> bytes:
    async with open_client(command.port) as client:
        response = await client.get(host="c.example")
        assert response.status == 404
        return response.body


async def test_first_start_says_so_and_writes_nothing(command: Command) -> None:
    first = command.lines.all[0]
    assert (first["msg"], first["path"]) == (
        "No previous state to restore",
        str(command.state_path),
    )
    assert not command.state_path.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"null", b'[{"name": 1}]', b"\xff\xfe", b"[" * 100_000, b'[{"name":"web"'],
)
async def test_corrupt_state_stops_the_start(directory: Path, content: bytes) -> None:
    path = state_path(directory)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)

    result = await kp(directory, "run", "--http-port", "0")

    assert result.code == 1
    assert str(path) in result.err
    assert result.err.startswith("Error: ")
    assert len(result.err.splitlines()) == 1
    assert "Server started" not in result.out
    assert path.read_bytes() == content


async def test_second_proxy_on_the_same_state_is_refused(
    command: Command, upstream: Upstream
) -> None:
    await command.deploy("web", *upstream.flags())
    result = await kp(command.directory, "run", "--http-port", "0")

    assert result.code == 1
    assert result.err.startswith("Error: ")
    assert len(result.err.splitlines()) == 1
    assert "another" in result.err
    assert str(command.directory) in result.err
    await require_served(command, "a.example", b"hello")
    assert (await command.kp("list")).code == 0


async def test_second_proxy_on_the_same_socket_is_refused(command: Command) -> None:
    path = command.directory / "kamal-proxy.sock"
    async with open_directory() as other:
        result = await kp(
            other, "run", "--http-port", "0", variables={"KAMAL_PROXY_SOCKET": str(path)}
        )

    assert (result.code, result.err) == (
        1,
        f"Error: listen unix {path}: another kamal-proxy is running; stop it first, or set "
        "KAMAL_PROXY_SOCKET to another path\n",
    )
    assert (await command.kp("list")).code == 0


async def test_stale_socket_is_replaced(directory: Path, upstream: Upstream) -> None:
    async with open_command(directory, stop=False) as killed:
        killed.process.kill()
        await killed.wait()
    assert (directory / "kamal-proxy.sock").is_socket()

    async with open_command(directory) as command:
        assert (directory / "kamal-proxy.sock").stat().st_mode & 0o777 == 0o600
        await command.deploy("web", *upstream.flags())
        await require_served(command, "a.example", b"hello")
    assert not (directory / "kamal-proxy.sock").exists()


async def test_file_in_the_way_of_the_socket_is_kept(directory: Path) -> None:
    path = directory / "kamal-proxy.sock"
    path.write_text("precious")

    result = await kp(directory, "run", "--http-port", "0")

    assert result.code == 1
    assert str(path) in result.err
    assert path.read_text() == "precious"


async def test_port_in_use(directory: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        result = await kp(directory, "run", "--http-port", str(port))

    assert (result.code, result.err) == (
        1,
        f"Error: listen tcp :{port}: bind: address already in use\n",
    )


async def test_port_from_the_environment(directory: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        result = await kp(directory, "run", variables={"KAMAL_PROXY_HTTP_PORT": str(port)})

    assert result.err == f"Error: listen tcp :{port}: bind: address already in use\n"


async def test_command_without_a_proxy(directory: Path) -> None:
    result = await kp(directory, "list")

    assert (result.code, result.out) == (1, "")
    assert result.err == (
        f"Error: dial unix {directory}/kamal-proxy.sock: connect: no such file or directory\n"
    )
