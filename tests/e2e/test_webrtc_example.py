"""The example media server by itself, without a proxy."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import trio

from example.mediaserver import MAX_OFFER, ports_of
from tests.e2e.media_room import CallFailedError, counts_of, free_range, open_callers, open_server
from tests.scripted import LOCALHOST, fail_hanging_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def example(directory: Path, ports: range) -> AsyncIterator[str]:
    async with open_server(directory, "v1", LOCALHOST, ports) as target, trio.open_nursery() as n:
        n.start_soon(fail_hanging_test)
        yield target
        n.cancel_scope.cancel()


def answer(url: str, body: bytes | None = None) -> tuple[int, str]:
    try:
        with urlopen(Request(url, body), timeout=20) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_a_port_is_free_again_after_its_call(directory: Path) -> None:
    ports = free_range(1)
    async with example(directory, ports) as target, open_callers() as callers:
        url = f"http://{target}/calls"
        first = await callers.begin("first", url)
        assert (first.server, first.host, first.port) == ("v1", LOCALHOST, ports[0])
        await callers.listen(first, frames=5)
        assert list(await counts_of(target)) == [first.number]

        with pytest.raises(CallFailedError, match="400"):
            await callers.begin("second", url)

        await callers.listen(first, frames=5)
        await callers.hang_up(first)
        while await counts_of(target):
            pass  # it hears of it soon
        third = await callers.begin("third", url)
        assert (third.number, third.port) == (3, ports[0])
        await callers.listen(third, frames=5)


async def test_what_it_serves(directory: Path) -> None:
    async def ask(url: str, body: bytes | None = None) -> tuple[int, str]:
        return await trio.to_thread.run_sync(answer, url, body)

    async with example(directory, free_range(1)) as target:
        url = f"http://{target}"
        assert await ask(f"{url}/up") == (200, "ok\n")
        assert await ask(f"{url}/calls") == (200, "[]\n")
        status, page = await ask(f"{url}/")
        assert (status, page.startswith("<!doctype html>")) == (200, True)
        assert (await ask(f"{url}/other"))[0] == 404
        assert (await ask(f"{url}/other", b"{}"))[0] == 404
        assert (await ask(f"{url}/calls", bytes(MAX_OFFER + 1)))[0] == 404
        for offer in (b"", b"[]", b"{}", json.dumps({"sdp": "v=0\r\n", "type": "no"}).encode()):
            status, text = await ask(f"{url}/calls", offer)
            assert status == 400, offer
            assert text.startswith("No call: "), offer
        assert await ask(f"{url}/calls") == (200, "[]\n")


@pytest.mark.parametrize("text", ["1", "0-1", "2-1", "1-65536", "a-b", "1-2-3", ""])
def test_what_is_no_range_of_ports(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        ports_of(text)


def test_a_range_has_both_ends() -> None:
    assert ports_of("50000-50001") == range(50000, 50002)
    assert ports_of("1-65535") == range(1, 65536)
