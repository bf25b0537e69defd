"""Which target a request in the lane goes to, how it is connected to, and that nothing is kept."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy.proxy_protocol import encode_v2
from tests.http.lanes import GET, counted, spy_on_lanes
from tests.http.streams import GET as GET_APP
from tests.http.streams import HELLO, open_world
from tests.running import open_embedded
from tests.scripted import deploy_options, listen, ok, open_client, open_upstream
from tests.test_fastpath_memory import SANITIZED, occupied

if TYPE_CHECKING:
    from pathlib import Path

    from tests.scripted import Upstream

EXCHANGES = min(100_000, int(os.environ.get("LEAK_ROUNDS", "4000")))


@pytest.mark.parametrize("count", [2, 3])
async def test_targets_take_turns(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Also with the first requests, for which connections have to be opened."""
    spy = spy_on_lanes(monkeypatch)
    async with AsyncExitStack() as stack:
        upstreams = [await stack.enter_async_context(open_upstream()) for _ in range(count)]
        proxy = await stack.enter_async_context(open_embedded(lane=True))
        await proxy.deploy(deploy_options("web", upstreams))
        client = await stack.enter_async_context(open_client(proxy.port))
        for number in range(1, 5):
            for _ in upstreams:
                assert (await client.request(GET)).status == 200
            assert [len(upstream.requests) for upstream in upstreams] == [number] * count
        assert [len(upstream.peers) for upstream in upstreams] == [1] * count
        turns = [line["target"] for line in await proxy.lines.wait_requests(4 * count)]
        assert turns == turns[:count] * 4
        assert counted(proxy) == {
            'requests{method="GET",service="web",status="200"}': 4 * count,
            'in_flight_requests{service="web"}': 0,
            'connects{result="ok",service="web"}': count,
            'reuses{service="web"}': 3 * count,
        }
        assert (spy.tasks, spy.exchanges) == (0, 0), "all were served in the lane"


async def test_a_connection_comes_back_after_a_request_for_a_task(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    spy = spy_on_lanes(monkeypatch)
    async with open_embedded(lane=True) as proxy, open_client(proxy.port) as client:
        await proxy.deploy(upstream.options())
        for number in range(1, 4):
            assert (await client.request(b"TRACE" + GET[3:])).status == 200
            assert (await client.request(GET)).status == 200
            assert (spy.tasks, spy.entered) == (number, 1 + number)


async def test_a_connection_is_in_the_lane_after_the_proxy_protocol(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    spy = spy_on_lanes(monkeypatch)
    async with (
        open_embedded(lane=True, proxy_protocol_from=("127.0.0.1",)) as proxy,
        open_client(proxy.port) as client,
    ):
        await proxy.deploy(upstream.options())
        await client.send(encode_v2(("192.0.2.1", 4711), ("192.0.2.2", 80)))
        for _ in range(3):
            assert (await client.request(GET)).status == 200
        assert (spy.tasks, spy.exchanges) == (1, 1)
        lines = await proxy.lines.wait_requests(3)
        assert {(line["client_addr"], line["client_port"]) for line in lines} == {
            ("192.0.2.1", "4711")
        }


async def test_a_target_that_can_not_be_connected_to_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its backlog is full until the first connection was accepted."""
    spy = spy_on_lanes(monkeypatch)
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream())
        proxy = await stack.enter_async_context(open_embedded(lane=True))
        with listen() as busy:
            busy.listen(0)
            port = busy.getsockname()[1]
            upstream.target = f"127.0.0.1:{port}"
            await proxy.deploy(upstream.options())
            fillers = trio.socket.socket()
            stack.enter_context(fillers)
            await fillers.connect(("127.0.0.1", port))
            client = await stack.enter_async_context(open_client(proxy.port))
            await client.send(GET)
            await proxy.wait_streams(2)
            with (await busy.accept())[0]:
                sock, _ = await busy.accept()
                with sock:
                    assert b"GET / HTTP/1.1" in await sock.recv(9999)
                    await sock.send(ok(b"hello"))
                    assert (await client.receive_response()).body == b"hello"
        assert (spy.tasks, spy.exchanges) == (0, 0)
        assert counted(proxy)['connects{result="ok",service="web"}'] == 1


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
async def test_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of exchanges, and of connections: bytes, blocks, descriptors."""
    async with open_world(tmp_path, monkeypatch, in_lane=True) as here:

        async def ask(times: int) -> tuple[int, int]:
            for number in range(times):
                if number % 10 == 0:
                    client = here.connect()
                await client.send_all(GET_APP)
                assert await client.receive_some() == HELLO
                if number % 10 == 9:
                    await client.aclose()
                    here.clients.clear()
                    here.lines.texts.clear()
            return occupied()

        blocks, memory = await ask(500)
        blocks_after, memory_after = await ask(EXCHANGES)
        assert blocks_after - blocks < EXCHANGES // 20
        assert memory_after - memory < 1 << 21
