"""The end of a proxy that has clients of HTTP/2: nothing that was asked for is lost."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.http.streams import HELLO, hello_after, open_world, read_all, read_head, silent_after
from tests.http2.clients import open_h2
from tests.http2.test_websocket import CONNECT, key_of
from tests.websockets import accept

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.http.streams import World

    Open = Callable[..., AbstractAsyncContextManager[World]]

LAST = 2**31 - 1
REFUSED_STREAM = 7


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return what opens a server with one target."""
    return partial(open_world, tmp_path, monkeypatch)


async def test_an_idle_connection_is_told_and_closed(
    world: Open, autojump_clock: MockClock
) -> None:
    async with world() as running:
        client = await open_h2(running)
        await client.get()
        await trio.sleep(10)
        running.server.close_idle(trio.current_time() + 10)
        client.answering = False
        await client.wait(lambda: client.goaways)
        await client.flush()
        await client.wait_closed()
        # That it should go, and after its answer to the PING, which request was the last.
        assert client.goaways == [(LAST, 0), (1, 0)]
        await running.server.wait_closed()
        assert trio.current_time() < 10.5


async def test_a_client_that_answers_no_ping_is_given_a_second(
    world: Open, autojump_clock: MockClock
) -> None:
    async with world() as running:
        client = await open_h2(running)
        await client.get()
        running.server.close_idle(trio.current_time() + 10)
        client.answering = False
        await client.wait_closed()
        assert client.goaways == [(LAST, 0), (1, 0)]
        assert trio.current_time() == 1


async def test_requests_in_flight_and_on_their_way_are_answered(world: Open) -> None:
    reached, release = trio.Event(), trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        reached.set()
        await release.wait()
        await stream.send_all(HELLO)

    async with world(answer) as running:
        client = await open_h2(running)
        first = await client.request(b"/first")
        await reached.wait()
        running.server.close_idle(trio.current_time() + 10)
        # The client has not heard of it yet.
        second = await client.request(b"/second")
        await wait_all_tasks_blocked()
        client.answering = False
        await client.wait(lambda: client.goaways)
        await client.flush()  # the answer to the PING
        await client.wait(lambda: len(client.goaways) == 2)
        assert client.goaways == [(LAST, 0), (second, 0)]
        release.set()
        assert (await client.answer(first)).status == 200
        assert (await client.answer(second)).status == 200
        await client.wait_closed()
        await client.stream.aclose()
        await running.server.wait_closed()
    assert running.statuses == [200, 200]


async def test_what_comes_after_the_last_call_is_refused(world: Open) -> None:
    release = trio.Event()
    async with world(hello_after(release)) as running:
        client = await open_h2(running)
        first = await client.request()
        await client.ping()
        running.server.close_idle(trio.current_time() + 10)
        client.answering = False
        await client.wait(lambda: client.goaways)
        await client.flush()
        await client.wait(lambda: len(client.goaways) == 2)
        # The library of the client would not.
        late = bytes.fromhex("00000a010500000003") + bytes.fromhex("828786") + b"\x41\x05a.com"
        await client.stream.send_all(late)
        data = await client.stream.receive_some()
        assert data == bytes.fromhex("000004030000000003") + REFUSED_STREAM.to_bytes(4, "big")
        release.set()
        assert (await client.answer(first)).status == 200
        await client.wait_closed()
        await client.stream.aclose()
    assert running.statuses == [200]


async def test_what_takes_too_long_is_answered_with_503(world: Open) -> None:
    reached = trio.Event()
    async with world(silent_after(reached)) as running:
        client = await open_h2(running)
        stream = await client.request()
        await reached.wait()
        running.server.close_idle(trio.current_time() + 10)
        running.server.abort()
        result = await client.answer(stream)
        assert result.status == 503
        await client.wait_closed()
        await client.stream.aclose()
        await running.server.wait_closed()
    assert running.logged[0]["reason"] == "shutdown"


@pytest.mark.parametrize("what", ["request", "upload", "websocket"])
async def test_what_is_cancelled_meanwhile_is_not_waited_for(world: Open, what: str) -> None:
    reached, left = trio.Event(), trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        if what == "websocket":
            await stream.send_all(accept(key_of(head)))
        reached.set()
        await read_all(stream)
        left.set()

    async with world(answer) as running:
        client = await open_h2(running)
        if what == "websocket":
            stream = await client.send_fields(CONNECT, end=False)
            await client.wait(lambda: client.answers[stream].fields)
        else:
            stream = await client.request(method=b"PUT", body=b"x", end=what == "request")
        await reached.wait()
        running.server.close_idle(trio.current_time() + 3600)
        await client.wait(lambda: client.goaways)
        await client.reset(stream)
        await client.wait_closed()
        await left.wait()
        await running.server.wait_closed()
    status, reason = (200, None) if what == "websocket" else (499, "client_gone")
    assert [(line["status"], line.get("reason")) for line in running.logged] == [(status, reason)]
