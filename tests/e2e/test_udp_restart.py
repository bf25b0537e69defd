"""The clients and targets of a UDP service do not notice that the proxy was restarted."""

from __future__ import annotations

import signal
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e.udp_room import rows, udp_state_path
from tests.ports import is_free
from tests.running import open_command
from tests.udp.serving import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.udp_room import Room
    from tests.udp.serving import Client


@asynccontextmanager
async def talking(clients: list[Client]) -> AsyncIterator[None]:
    """Let clients send as fast as they can, whether anybody listens or not."""

    async def talk(client: Client) -> None:
        while True:
            await client.send()

    async def throw_away(client: Client) -> None:
        while True:
            await client.receive()

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(talk, client)
            nursery.start_soon(throw_away, client)
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_the_target_does_not_notice_a_restart(
    directory: Path, room: Room, how: signal.Signals
) -> None:
    # Few: whatever else runs on this machine may get a port while there is no proxy to hold it.
    target, clients = room.target("v1"), [room.client() for _ in range(3)]
    async with open_command(directory, stop=False) as first:
        await room.deploy(first, target)
        for client in clients:
            assert await client.ask() == "v1"
        listed = await rows(first)
        sources = target.sources
        assert len(sources) == len(clients)
        if how == signal.SIGKILL:
            saved = udp_state_path(first).with_suffix(".sessions")
            await until(saved.exists)
        # They go on while there is no proxy: the first that it hears must find their sessions.
        async with talking(clients):
            assert await first.stop(how) == (0 if how == signal.SIGTERM else -9)
            async with open_command(directory) as second:
                restored = await second.lines.wait_for_message("UDP sessions restored")
                assert (restored["count"], restored["lost"]) == (len(clients), 0)
                count = len(target.received)
                await target.wait_received(count + 10 * len(clients))
                assert target.sources == sources
                assert await rows(second) == listed


async def test_a_session_that_was_not_saved_begins_anew(directory: Path, room: Room) -> None:
    target, client = room.target("v1"), room.client()
    async with open_command(directory, stop=False) as first:
        await room.deploy(first, target)
        assert await client.ask() == "v1"
        await first.stop(signal.SIGKILL)  # in the seconds before it saves
    async with open_command(directory) as second:
        assert await client.ask() == "v1"
        assert (await second.kp("remove", "game")).code == 0
    async with open_command(directory) as third:
        assert await rows(third) == []
        assert is_free(room.port)


async def test_a_port_that_is_taken_at_the_start_is_tried_again(
    directory: Path, room: Room
) -> None:
    target = room.target("v1")
    async with open_command(directory) as first:
        await room.deploy(first, target)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", room.port))
        async with open_command(directory) as second:
            line = await second.lines.wait_for_message("UDP service can't listen yet")
            assert f"listen udp :{room.port}: bind: address already in use" in line["error"]
            taken.close()
            await second.lines.wait_for_message("UDP service listens")
            assert await room.client().ask() == "v1"
