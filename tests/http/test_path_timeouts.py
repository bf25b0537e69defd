"""``--path-timeout``: another limit for the head of a response in some parts of a service."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from kamal_proxy.options import ServiceOptions
from kamal_proxy.target_options import PathTimeout, TargetOptions
from tests.http.streams import HELLO, World, open_world, read_head, stay_silent
from tests.running import open_command
from tests.scripted import open_client

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

    from tests.running import Embedded
    from tests.scripted import Peer, Upstream

Opener = Callable[..., AbstractAsyncContextManager[World]]
LIMITS = (
    PathTimeout(path="/reports", timeout=300),
    PathTimeout(path="/reports/quick/", timeout=2),
    PathTimeout(path="/api/v1", timeout=5),
    PathTimeout(path="/caf\u00e9", timeout=9),
)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> Opener:
    """Return :func:`open_world` for this test."""
    return partial(open_world, tmp_path, monkeypatch)


async def seconds_until_504(here: World, path: str) -> float:
    client = here.connect()
    start = trio.current_time()
    await client.send_all(f"GET {path} HTTP/1.1\r\nHost: app.test\r\n\r\n".encode())
    assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
    await client.aclose()
    return trio.current_time() - start


@pytest.mark.parametrize(
    ("path", "seconds"),
    [
        ("/", 30),
        ("/reports", 300),
        ("/reports/", 300),
        ("/reports?quick", 300),
        ("/reports/quickly", 300),
        ("/reports/quick", 2),
        ("/reports/quick?", 2),
        ("/reports/quick/and/more", 2),
        ("/reportsx", 30),
        ("/x/reports", 30),
        ("/?/reports", 30),
        ("/Reports", 30),
        ("/api", 30),
        ("/api/v1/x", 5),
        ("/api/v2", 30),
        # As routes are, they are compared with the decoded path, in which %2F stays encoded.
        ("/%72eports/quick", 2),
        ("/caf%C3%A9/x", 9),
        ("/api%2Fv1", 30),
    ],
)
async def test_the_longest_prefix_wins(
    world: Opener, path: str, seconds: float, autojump_clock: MockClock
) -> None:
    options = TargetOptions(response_timeout=30, path_timeouts=LIMITS)
    async with world(stay_silent, target_options=options) as here:
        assert await seconds_until_504(here, path) == pytest.approx(seconds)
    assert [(line["status"], line["reason"]) for line in here.logged] == [(504, "target_timeout")]


@pytest.mark.parametrize(
    ("limits", "path", "seconds"),
    [
        ((PathTimeout(path="/", timeout=7),), "/any", 7),
        ((PathTimeout(path="/", timeout=7), PathTimeout(path="/a", timeout=8)), "/a", 8),
        ((PathTimeout(path="a/", timeout=8),), "/a/b", 8),
    ],
)
async def test_how_a_path_may_be_given(
    world: Opener,
    limits: tuple[PathTimeout, ...],
    path: str,
    seconds: float,
    autojump_clock: MockClock,
) -> None:
    async with world(stay_silent, target_options=TargetOptions(path_timeouts=limits)) as here:
        assert await seconds_until_504(here, path) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("strip", "path", "seconds"),
    [(True, "/app/slow", 3), (True, "/app/app/slow", 30), (False, "/app/slow", 30)],
)
async def test_the_path_is_the_one_that_the_target_sees(
    world: Opener, strip: bool, path: str, seconds: float, autojump_clock: MockClock
) -> None:
    async with world(
        stay_silent,
        service_options=ServiceOptions(path_prefixes=("/app",), strip_prefix=strip),
        target_options=TargetOptions(path_timeouts=(PathTimeout(path="/slow", timeout=3),)),
    ) as here:
        assert await seconds_until_504(here, path) == pytest.approx(seconds)


async def test_zero_means_no_limit(world: Opener, autojump_clock: MockClock) -> None:
    async def think(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(80_000)
        await stream.send_all(HELLO)

    limits = (PathTimeout(path="/path", timeout=0),)
    options = TargetOptions(response_timeout=1, path_timeouts=limits)
    async with world(think, target_options=options) as here:
        client = here.connect()
        await client.send_all(b"GET /path HTTP/1.1\r\nHost: app.test\r\n\r\n")
        assert (await read_head(client)).endswith(b"hello")
        assert await seconds_until_504(here, "/other") == pytest.approx(1)
        await client.aclose()


async def hang(peer: Peer) -> None:
    await peer.receive_request()
    await peer.wait_closed()


async def test_over_real_sockets(proxy: Embedded, upstream: Upstream) -> None:
    options = upstream.options(response_timeout=0)
    limits = (PathTimeout(path="/short", timeout=0.05),)
    target = attrs.evolve(options.target_options, path_timeouts=limits)
    await proxy.deploy(attrs.evolve(options, target_options=target))
    upstream.script(hang)
    async with open_client(proxy.port) as client:
        response = await client.get("/short")
        assert (response.status, response.get(b"connection")) == (504, [b"close"])
        await client.wait_closed()
    async with open_client(proxy.port) as client:
        assert (await client.get("/long")).body == b"hello"
    short, long = await proxy.lines.wait_requests(2)
    assert (short["status"], short["reason"]) == (504, "target_timeout")
    assert (long["status"], "reason" in long) == (200, False)


async def test_deployed_saved_and_restored(directory: Path, upstream: Upstream) -> None:
    """Whatever is not 504 at once hangs for longer than a test may take."""
    async with open_command(directory) as command:
        await command.deploy(
            "web", *upstream.flags(), "--target-timeout=1h",
            "--path-timeout=/short=50ms", "--path-timeout", "/short/long=0,/api=50ms",
        )  # fmt: skip
        await require_limits(command.port, upstream)
        saved = json.loads(command.state_path.read_text())
        assert "/short/long" in json.dumps(saved)
    async with open_command(directory) as command:
        await require_limits(command.port, upstream)
        refused = await command.kp("deploy", "web", *upstream.flags(), "--path-timeout=/x=soon")
        assert refused.code == 1
        assert "/x=soon" in refused.err
        await command.deploy("web", *upstream.flags())
        async with open_client(command.port) as client:
            assert (await client.get("/short")).body == b"hello", "it is not sticky"


async def require_limits(port: int, upstream: Upstream) -> None:
    for path in ("/short", "/short/x", "/api"):
        upstream.script(hang)
        async with open_client(port) as client:
            assert (await client.get(path)).status == 504
    async with open_client(port) as client:
        for path in ("/", "/short/long", "/short/long/x", "/apis"):
            assert (await client.get(path)).body == b"hello"
