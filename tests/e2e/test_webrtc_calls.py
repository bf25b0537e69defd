"""Calls through deploys of a media server's signalling and media: none is lost, none is disturbed.

Both servers have the same media ports, and take the first one that is free: a call of the old one
and a call of the new one are on one port of the proxy.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e.media_room import MediaRoom, counts_of, open_callers, open_media_room
from tests.e2e.udp_room import rows
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.media_room import Call, Callers
    from tests.running import Result

OLD, NEW = "127.0.0.2", "127.0.0.3"
NOBODY = "0 sessions completed, 0 cut, 0 got a BYE\n"
PATIENT = ("--zero-downtime", "--drain-strategy=timeout", "--force-kill-timeout=10m")


@pytest.fixture
async def meet(directory: Path) -> AsyncIterator[MediaRoom]:
    """Provide a proxy for an application of signalling and media."""
    async with open_media_room(directory) as room:
        yield room


@pytest.fixture
async def callers() -> AsyncIterator[Callers]:
    """Provide who calls it."""
    async with open_callers() as callers:
        yield callers


@asynccontextmanager
async def two_servers(meet: MediaRoom) -> AsyncIterator[tuple[str, str]]:
    """Run an old and a new media server; the old one is deployed."""
    async with meet.server("v1", OLD) as old, meet.server("v2", NEW) as new:
        result = await meet.deploy_media(old)
        assert (result.code, result.out, result.err) == (0, NOBODY, "")
        await meet.deploy_signalling(old)
        yield old, new


def parts(calls: list[Call]) -> list[tuple[str, str, int]]:
    """Return who took each call, and where the media goes."""
    return [(call.server, call.host, call.port) for call in calls]


async def test_no_call_is_lost_in_the_documented_order(meet: MediaRoom, callers: Callers) -> None:
    results: list[Result] = []
    first, second, *_ = meet.ports
    async with two_servers(meet) as (old, new), trio.open_nursery() as nursery:
        a, b = [await callers.begin(who, meet.url) for who in "ab"]
        assert parts([a, b]) == [("v1", LOCALHOST, first), ("v1", LOCALHOST, second)]
        await callers.listen(a, b)

        both = await meet.deploy_media(old, new)  # the new server takes media, too
        assert (both.code, both.out, both.err) == (0, NOBODY, "")
        c = await callers.begin("c", meet.url)
        assert c.server == "v1", "the signalling is still the old one's"
        await meet.deploy_signalling(new)
        d = await callers.begin("d", meet.url)
        await callers.listen(a, b, c, d)

        async def deploy() -> None:
            results.append(await meet.deploy_media(new, flags=PATIENT))

        nursery.start_soon(deploy)
        await meet.wait_switched(new)
        e = await callers.begin("e", meet.url)
        assert parts([d, e]) == [("v2", LOCALHOST, first), ("v2", LOCALHOST, second)]
        await callers.listen(a, b, c, d, e)

        await callers.move(a)  # its new port: a client that the proxy has never seen
        await callers.move(d)
        await callers.listen(a, b, c, d, e)
        for target, calls in ((old, (a, b, c)), (new, (d, e))):
            counts = await counts_of(target)
            assert sorted(counts) == sorted(call.number for call in calls)
            assert all(received > 25 and not lost for received, lost in counts.values())
        await callers.hang_up(b)  # on the port beside a's, from the same address
        await callers.listen(a, c, d, e)
        for call in (a, c, d, e):
            received, lost = await callers.counts(call)
            assert received > 50
            assert lost == 0
        assert not results, "the old server's calls go on"
        for call in (a, c):
            await callers.hang_up(call)
        await callers.listen(d, e)
    assert [(result.code, result.err) for result in results] == [(0, "")]
    assert results[0].out == "4 sessions completed, 0 cut, 0 got a BYE\n"  # a had two
    assert await rows(meet.command) == [
        f"meet * / {new} running no",
        f"meet * {meet.listed} {new} running no",
    ]


async def test_a_draining_server_takes_the_calls_that_it_answers(
    meet: MediaRoom, callers: Callers
) -> None:
    results: list[Result] = []
    async with two_servers(meet) as (_, new), trio.open_nursery() as nursery:
        a = await callers.begin("a", meet.url)
        await callers.listen(a)

        async def deploy() -> None:
            results.append(await meet.deploy_media(new, flags=PATIENT))

        nursery.start_soon(deploy)
        await meet.wait_switched(new)
        b = await callers.begin("b", meet.url)
        assert b.server == "v1"
        await callers.listen(a, b)
        await callers.hang_up(a)
        await callers.listen(b)
        assert not results
        await callers.hang_up(b)
    assert [result.out for result in results] == ["2 sessions completed, 0 cut, 0 got a BYE\n"]


async def test_a_call_goes_on_from_a_port_that_media_came_from_first(
    meet: MediaRoom, callers: Callers
) -> None:
    """A router that forgets a translation gives the next packet another port, and that is media."""
    results: list[Result] = []
    async with two_servers(meet) as (old, new), trio.open_nursery() as nursery:
        a = await callers.begin("a", meet.url)
        await callers.listen(a)
        await meet.deploy_media(old, new)
        await meet.deploy_signalling(new)

        async def deploy() -> None:
            results.append(await meet.deploy_media(new, flags=PATIENT))

        nursery.start_soon(deploy)
        await meet.wait_switched(new)
        b = await callers.begin("b", meet.url)
        await callers.move(a, packets=5)  # which nothing tells from a newcomer's
        await callers.move(b, packets=5)
        await callers.listen(a, b)
        assert (await counts_of(old))[a.number][0] > 25
        for call in (a, b):
            await callers.hang_up(call)


async def test_calls_that_do_not_end_are_cut_and_told_of(meet: MediaRoom, callers: Callers) -> None:
    async with two_servers(meet) as (old, new):
        a, b = [await callers.begin(who, meet.url) for who in "ab"]
        await callers.listen(a, b)
        await meet.deploy_media(old, new)
        await meet.deploy_signalling(new)
        c = await callers.begin("c", meet.url)
        flags = ("--zero-downtime", "--drain-timeout=500ms", "--force-kill-timeout=1s")

        result = await meet.deploy_media(new, flags=flags)

        assert (result.code, result.err) == (0, "")
        cut = "2 cut, 0 got a BYE; 2 SRTP sessions cut without goodbye"
        assert result.out == f"0 sessions completed, {cut}\n"
        await callers.listen(c)
        assert await callers.counts(c) != (0, 0)
