"""A deploy that fails changes nothing and says why."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio

from tests.running import open_instance
from tests.scripted import open_client, open_upstream, respond

if TYPE_CHECKING:
    from tests.running import Command
    from tests.scripted import Upstream


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error:")]


async def test_failed_deploy_changes_nothing(command: Command, upstream: Upstream) -> None:
    await command.deploy("web", *upstream.flags(), "--host=a.example")
    state = command.state_path.read_bytes()
    listed = await command.kp("list")
    stop = trio.Event()
    served = 0

    async def ask() -> None:
        nonlocal served
        async with open_client(command.port) as client:
            while not stop.is_set():
                assert (await client.get()).body == b"hello"
                served += 1

    async with open_upstream(respond(b"bad")) as bad, trio.open_nursery() as nursery:
        bad.health = 500
        nursery.start_soon(ask)
        result = await command.kp("deploy", "web", *bad.flags(), "--deploy-timeout=1s")
        stop.set()

        assert (result.code, result.out) == (1, "")
        lines = result.err.splitlines()
        assert len(error_lines(result.err)) == 1
        assert lines[-1] == (
            "Error: target failed to become healthy within configured timeout (1s)"
        )
        assert f"target {bad.target}: status 500" in result.err
        assert f":{bad.health_port}/up" in result.err
        assert bad.peers == []
    assert served
    assert command.state_path.read_bytes() == state
    assert await command.kp("list") == listed
    async with open_client(command.port) as client:
        assert (await client.get()).body == b"hello"
        assert (await client.get(host="b.example")).status == 404


async def test_failed_first_deploy_leaves_nothing(command: Command) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        target = f"127.0.0.1:{closed.getsockname()[1]}"
        result = await command.kp("deploy", "web", f"--target={target}", "--deploy-timeout=300ms")

    assert result.code == 1
    assert f"target {target}: connection refused" in result.err
    assert result.err.splitlines()[-1].endswith("(300ms)")
    assert not command.state_path.exists()
    async with open_client(command.port) as client:
        assert (await client.get()).status == 404


async def test_only_the_unhealthy_target_is_named(command: Command, upstream: Upstream) -> None:
    await command.deploy("web", *upstream.flags())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        bad = f"127.0.0.1:{closed.getsockname()[1]}"
        async with open_instance("good") as good:
            result = await command.kp(
                "deploy", "web", f"--target={good.target},{bad}", "--deploy-timeout=500ms"
            )

    assert result.code == 1
    assert f"target {bad}: " in result.err
    assert good.target not in result.err
    async with open_client(command.port) as client:
        assert (await client.get()).body == b"hello"


async def test_force_switches_at_once(command: Command, upstream: Upstream) -> None:
    await command.deploy("web", *upstream.flags())
    async with open_upstream(respond(b"forced")) as unhealthy:
        unhealthy.health = 500
        await command.deploy("web", *unhealthy.flags(), "--force")
        async with open_client(command.port) as client:
            assert (await client.get()).body == b"forced"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host=b.example"], "host settings conflict with another service"),
        (["--host=a.example,b.example"], "host settings conflict with another service"),
        (["--host=c.example", "--path-prefix=/api"], "host settings conflict with another service"),
        (["--host=*.d.example"], "host settings conflict with another service"),
        (["--host=B.EXAMPLE"], "host settings conflict with another service"),
    ],
)
async def test_conflicting_service(
    command: Command, upstream: Upstream, arguments: list[str], message: str
) -> None:
    await command.deploy("web", *upstream.flags(), "--host=b.example,*.d.example")
    await command.deploy(
        "api", *upstream.flags(), "--host=c.example", "--path-prefix=/api", "--path-prefix=/v2"
    )
    state = command.state_path.read_bytes()
    listed = await command.kp("list")

    result = await command.kp("deploy", "other", *upstream.flags(), *arguments)

    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == f"Error: {message}"
    assert len(error_lines(result.err)) == 1
    assert command.state_path.read_bytes() == state
    assert await command.kp("list") == listed


async def test_removing_an_unknown_service(command: Command) -> None:
    result = await command.kp("remove", "nobody")

    assert (result.code, result.out, result.err) == (1, "", "Error: service not found\n")
