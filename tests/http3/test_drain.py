"""The end of HTTP/3 connections when the proxy stops: told first, answered, then closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tests.http.streams import HELLO, open_world, read_head, stay_silent
from tests.http3.clients import H3Client, open_front

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

NO_ERROR = 0x100
REQUEST_REJECTED = 0x10B
CONNECTION_REFUSED = 0x2
LAST = 2**62 - 4  # no stream can be later


async def test_a_connection_without_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        await client.get()
        world.server.close_idle(trio.current_time() + 5)
        assert await client.wait_closing() == NO_ERROR
        assert client.goaways == [LAST, 4]
        await world.server.wait_closed()


async def test_requests_are_answered_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = trio.Event()

    async def late(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await go_on.wait()
        await stream.send_all(HELLO)

    async with open_world(tmp_path, monkeypatch, late) as world, open_front(world) as front:
        client = await front.connect()
        first = client.request()
        while not world.targets:
            await trio.lowlevel.checkpoint()
        world.server.close_idle(trio.current_time() + 5)
        # Asked for before the client can have heard of it.
        second = client.request()
        await client.wait(lambda: client.goaways == [LAST, 8])
        third = client.request()
        assert (await client.answer(third)).reset == REQUEST_REJECTED
        go_on.set()
        for stream in (first, second):
            assert (await client.answer(stream)).body == b"hello"
        assert await client.wait_closing() == NO_ERROR
        await world.server.wait_closed()
    assert world.statuses == [200, 200]


async def test_what_is_left_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request()
        while not world.targets:
            await trio.lowlevel.checkpoint()
        world.server.close_idle(trio.current_time() + 5)
        world.server.abort()
        assert (await client.answer(stream)).status == 503
        assert await client.wait_closing() == NO_ERROR
        await world.server.wait_closed()
    assert [line["reason"] for line in world.logged] == ["shutdown"]


async def test_no_new_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        front.server.close()
        late = H3Client(front.address)
        front.clients.append(late)
        late.quic.connect(front.address, now=trio.current_time())
        front.nursery.start_soon(late.run)
        late.flush()
        assert await late.wait_closing() == CONNECTION_REFUSED
        assert (await client.get()).status == 200


async def test_it_ends_with_the_last_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request()
        while not world.targets:
            await trio.lowlevel.checkpoint()
        front.server.close()
        world.server.close_idle(trio.current_time() + 5)
        world.server.abort()
        await front.ended.wait()
        assert (await client.answer(stream)).status == 503
        assert await client.wait_closing() == NO_ERROR


async def test_the_end_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        client.request()
        while not world.targets:
            await trio.lowlevel.checkpoint()
        front.running.cancel()
        assert await client.wait_closing() == 0
        # It is told before the tasks that served it have ended.
        while world.server.connections:
            await trio.lowlevel.checkpoint()
        assert front.server.connections == 0
    assert world.statuses == [499]
