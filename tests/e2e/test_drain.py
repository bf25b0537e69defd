"""Drains: requests in flight finish or are cut, and nobody else waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.running import command_line, environment
from tests.scripted import ConnectionCut, ok, open_client, open_upstream, respond

if TYPE_CHECKING:
    from tests.running import Command
    from tests.scripted import Peer, Script, Upstream


def held(release: trio.Event, answer: bytes, begin: bytes = b"") -> Script:
    """Return a script that sends ``begin`` after the request, and ``answer`` when released."""

    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(begin)
        await release.wait()
        await peer.send(answer)

    return serve


async def wait_until_served_by(command: Command, body: bytes, host: str = "a.example") -> None:
    """Send requests until one is answered with this body."""
    async with open_client(command.port) as client:
        while (await client.get(host=host)).body != body:
            pass


async def test_request_in_flight_completes_while_new_ones_go_elsewhere(
    command: Command, upstream: Upstream
) -> None:
    release = trio.Event()
    await command.deploy("web", *upstream.flags())
    upstream.script(held(release, ok(b"old")))
    async with (
        open_upstream(respond(b"new")) as new,
        open_client(command.port) as client,
        trio.open_nursery() as nursery,
    ):
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_peers(1)
        nursery.start_soon(command.deploy, "web", *new.flags())
        await wait_until_served_by(command, b"new")
        release.set()

        assert (await client.receive_response()).body == b"old"
        assert (await client.get()).body == b"new"  # on the same connection


async def test_drain_deadline(command: Command, upstream: Upstream) -> None:
    never = trio.Event()
    await command.deploy("web", *upstream.flags())
    upstream.script(
        held(never, b""),
        held(never, b"", begin=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"),
    )
    async with (
        open_upstream(respond(b"new")) as new,
        open_client(command.port) as silent,
        open_client(command.port) as begun,
    ):
        await silent.send(b"GET /silent HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_peers(1)
        await begun.send(b"GET /begun HTTP/1.1\r\nHost: a\r\n\r\n")
        begun.unread(await begun.receive_until(b"part"))

        await command.deploy("web", *new.flags(), "--drain-timeout=300ms")

        assert (await silent.receive_response()).status == 504
        with pytest.raises(ConnectionCut) as cut:
            await begun.receive_response()
        assert (cut.value.status, cut.value.body) == (200, b"part")
        lines = await command.lines.wait_requests(2)
        assert {line["path"]: line["status"] for line in lines} == {"/silent": 504, "/begun": 200}
        cancelled = [
            line for line in command.lines.all if line["msg"] == "Request cancelled due to draining"
        ]
        assert len(cancelled) == 2
        async with open_client(command.port) as client:
            assert (await client.get()).body == b"new"


async def test_a_long_drain_delays_no_other_service(command: Command, upstream: Upstream) -> None:
    release = trio.Event()
    await command.deploy("web", *upstream.flags(), "--host=a.example")
    upstream.script(held(release, ok(b"old")))
    async with (
        open_upstream(respond(b"new")) as new,
        open_client(command.port) as client,
        trio.open_nursery() as nursery,
    ):
        await client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        await upstream.wait_peers(1)
        nursery.start_soon(command.deploy, "web", *new.flags(), "--host=a.example")
        await wait_until_served_by(command, b"new")

        # All of this happens while the first deploy is still draining.
        await command.deploy("api", *new.flags(), "--host=b.example")
        await command.deploy("api", *new.flags(), "--host=c.example")
        listed = await command.kp("list")
        assert "c.example" in listed.out
        assert (await command.kp("remove", "api")).code == 0
        await command.deploy("web", *new.flags(), "--host=a.example")  # even itself, again
        assert not client.received

        release.set()
        assert (await client.receive_response()).body == b"old"


async def test_remove_does_not_wait(command: Command, upstream: Upstream) -> None:
    release = trio.Event()
    await command.deploy("web", *upstream.flags())
    upstream.script(held(release, ok(b"old")))
    async with open_client(command.port) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_peers(1)

        assert (await command.kp("rm", "web")).code == 0

        async with open_client(command.port) as another:
            assert (await another.get()).status == 404
        release.set()
        assert (await client.receive_response()).body == b"old"


async def test_concurrent_deploys_of_many_services(command: Command, upstream: Upstream) -> None:
    names = [f"app{number}" for number in range(6)]
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(command.deploy, name, *upstream.flags(), f"--host={name}.example")

    async with open_client(command.port) as client:
        for name in names:
            assert (await client.get(host=f"{name}.example")).body == b"hello"
    listed = (await command.kp("list")).out
    assert [name for name in names if name in listed] == names


async def test_concurrent_deploys_of_one_service(command: Command) -> None:
    """The last switch wins; nothing is lost on the way, and nothing stays behind."""
    async with (
        open_upstream(respond(b"0")) as first,
        open_upstream(respond(b"1")) as second,
        open_client(command.port) as client,
    ):
        async with trio.open_nursery() as nursery:
            for target in (first, second) * 3:
                nursery.start_soon(command.deploy, "web", *target.flags())
        bodies = {(await client.get()).body for _ in range(5)}
        assert len(bodies) == 1


async def test_killing_the_deploy_command_does_not_cancel_the_deploy(
    command: Command, upstream: Upstream
) -> None:
    await command.deploy("web", *upstream.flags())
    async with open_upstream(respond(b"new")) as new:
        new.health = 503
        process = await trio.lowlevel.open_process(
            command_line("deploy", "web", *new.flags(), "--health-check-interval=50ms"),
            env=environment(command.directory),
        )
        await new.wait_probes(2)
        process.kill()
        await process.wait()
        new.health = 200

        await wait_until_served_by(command, b"new")
        deployed = await command.lines.wait_for(
            lambda line: line["msg"] == "Deployed" and line["targets"] == [new.target]
        )
        assert deployed["service"] == "web"
