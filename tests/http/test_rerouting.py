"""A request that no target has taken when a deploy replaces them all."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import trio

from kamal_proxy import sockets
from tests.scripted import open_client, open_upstream

if TYPE_CHECKING:
    import pytest

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
