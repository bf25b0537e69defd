"""The pool of HTTP/2 connections to one target by itself: cancelled at any point, and its end."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy.http.h2_pool import H2Pool
from kamal_proxy.http.upstream import MAX_IDLE_AGE, ConnectError
from tests.http2.targets import answer, h2
from tests.pairs import Steps, running_poller
from tests.scripted import LOCALHOST, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.scripted import Upstream


@asynccontextmanager
async def open_pool(upstream: Upstream) -> AsyncIterator[H2Pool]:
    """Let a pool run; at its end no connection may be left."""
    async with running_poller() as poller:
        pool = H2Pool(poller, LOCALHOST, upstream.port, 64 * 1024)
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            yield pool
            pool.close()


async def ask(pool: H2Pool) -> int:
    """Send a request and return the status of its response."""
    upstream = pool.take_idle(MAX_IDLE_AGE) or await pool.connect()
    try:
        upstream.request(b"POST", b"/", [(b"Host", b"a")])
        upstream.body(b"body")
        upstream.end()
        await upstream.send(b"")
        while (head := upstream.next_response()) is None:
            await upstream.receive(None)
        while not upstream.received:
            await upstream.receive(None)
            upstream.take_body()
        return head.status
    finally:
        upstream.release()


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_request_cancelled_at_any_step_leaves_nothing_behind(fresh: bool) -> None:
    """Neither a place on a connection nor an attempt that others would wait for."""
    async with open_upstream(h2(answer())) as upstream, open_pool(upstream) as pool:
        step, ended = 0, False
        while not ended:
            step += 1
            if fresh:
                for connection in tuple(pool._connections):
                    connection.close()
            with trio.CancelScope() as scope:
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                try:
                    ended = await ask(pool) == 200 and steps.count < step
                finally:
                    trio.lowlevel.remove_instrument(steps)
            assert [
                connection.in_use for connection in pool._connections if connection.in_use
            ] == []
            assert await ask(pool) == 200
        assert step > 3


async def test_a_pool_that_is_closed_opens_nothing() -> None:
    async with open_upstream(h2(answer())) as upstream:
        async with open_pool(upstream) as pool:
            left = await pool.connect()
            assert repr(pool) == f"<H2Pool {upstream.target} connections=1>"
        assert left.failure == "the proxy has closed the connection"
        left.release()
        with pytest.raises(ConnectError, match=r"^the targets were replaced$"):
            await pool.connect()


async def test_a_pool_that_ends_while_a_connection_is_opened() -> None:
    begun = trio.Event()

    async def silent(peer: object) -> None:
        begun.set()
        await trio.sleep_forever()

    failures: list[str] = []

    async def connect(pool: H2Pool) -> None:
        with pytest.raises(ConnectError) as caught:
            await pool.connect()
        failures.append(str(caught.value))

    async with (
        open_upstream(silent) as upstream,
        trio.open_nursery() as nursery,
        open_pool(upstream) as pool,
    ):
        nursery.start_soon(connect, pool)
        nursery.start_soon(connect, pool)
        await begun.wait()
    assert failures == ["the targets were replaced"] * 2
