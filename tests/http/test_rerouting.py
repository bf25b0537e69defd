"""A request that no target has taken when a deploy replaces them all."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy import sockets
from kamal_proxy.http.upstream import Dialer
from kamal_proxy.target_options import TargetOptions
from tests.http.streams import GET, open_world, read_head
from tests.scripted import open_client, open_upstream
from tests.websockets import TEXT, UPGRADE, accept, frame

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from trio.testing import MockClock

    from tests.running import Embedded
    from tests.scripted import Upstream


async def test_goes_to_the_new_targets(
    proxy: Embedded, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    connecting, refuse, switched = trio.Event(), trio.Event(), trio.Event()
    connect = sockets.connect

    async def connect_slowly(poller: Any, family: Any, address: Any) -> sockets.SocketStream:
        if address[1] == upstream.port:
            connecting.set()
            await refuse.wait()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        return await connect(poller, family, address)

    monkeypatch.setattr(sockets, "connect", connect_slowly)
    # That the lane connects by itself would only come before it.
    monkeypatch.setattr(Dialer, "begin_nowait", lambda _: None)
    await proxy.deploy(upstream.options())
    async with (
        open_upstream() as new,
        open_client(proxy.port) as client,
        trio.open_nursery() as nursery,
    ):
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        await connecting.wait()
        nursery.start_soon(
            proxy.proxy.deploy,
            new.options(),
            lambda event: switched.set() if event.event == "switched" else None,
        )
        await switched.wait()
        refuse.set()

        assert (await client.receive_response(b"POST")).status == 200
    assert [request.body for request in new.requests] == [b"hi"]
    (line,) = await proxy.lines.wait_requests(1)
    assert (line["status"], line["target"]) == (200, new.target)
    assert proxy.proxy.services()[0].draining == 0


async def test_is_none_of_the_drains_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """What the old targets are given to end does not end a WebSocket of the new ones."""
    connecting, refuse = trio.Event(), trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        if b"pgrade" not in await read_head(stream):
            await trio.sleep_forever()  # so that the drain goes on
        await stream.send_all(accept())
        await trio.sleep(1000)
        await stream.send_all(frame(TEXT, b"still here"))
        await trio.sleep_forever()

    patient = TargetOptions(response_timeout=0)
    async with open_world(tmp_path, monkeypatch, serve, target_options=patient) as here:
        other = here.connect()
        await other.send_all(GET)
        await wait_all_tasks_blocked()
        connect = sockets.connect

        async def refuse_slowly(*address: Any) -> sockets.SocketStream:
            if here.deployment.in_flight == 2:  # it is the old target
                connecting.set()
                await refuse.wait()
                raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            return await connect(*address)

        monkeypatch.setattr(sockets, "connect", refuse_slowly)
        client = here.connect()
        await client.send_all(UPGRADE)
        await connecting.wait()
        here.change(active=await here.open_deployment("new:80"))
        here.deployment.retire(100)
        await wait_all_tasks_blocked()  # the drain has begun
        refuse.set()
        assert (await read_head(client)).startswith(b"HTTP/1.1 101 ")
        assert await client.receive_some() == frame(TEXT, b"still here")
        assert (await here.deployment.wait_drained()).cancelled == 1
