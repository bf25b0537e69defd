"""The contract's section "Buffering, bodies", statement by statement.

``tests/http/test_buffering.py``, ``test_bodies.py`` and ``test_streaming.py`` have them in depth.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.contract.steps import answered, holds, kp, release, scripts
from tests.contract.tables import Row, World, ask, has_news, play, row
from tests.scripted import Peer, ok

if TYPE_CHECKING:
    from tests.contract.tables import Step

MODES = {
    "streaming": "",
    "buffered requests": "--buffer-requests",
    "buffered responses": "--buffer-responses",
    "both buffered": "--buffer-requests --buffer-responses",
}
CHUNKED = "Transfer-Encoding: chunked"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\n"
EVENTS = b"Content-Type: text/event-stream\r\nContent-Length: 8\r\n"
BODILESS = {"HEAD": 200, "204": 204, "304": 304}


def deploy(flags: str) -> Step:
    return kp(f"deploy web --target={{a}} {flags}")


def held_bytes(world: World) -> tuple[int, int]:
    """Return how many bytes of bodies the metrics say are in memory, and in files."""
    values = dict(
        line.split(" ")
        for line in world.proxy.proxy.metrics()[0].decode().splitlines()
        if line.startswith("kamal_proxy_")
    )
    memory = values["kamal_proxy_buffer_memory_bytes"]
    return int(float(memory)), int(float(values["kamal_proxy_spill_bytes"]))


async def target_is_contacted_last(world: World) -> None:
    upstream, client = world.targets["a"], await world.connect()
    before = len(upstream.peers)
    await client.send(POST + b"Content-Length: 8\r\n\r\nhalf")
    await wait_all_tasks_blocked()
    assert len(upstream.peers) == before
    await client.send(b"full")
    assert (await client.receive_response()).status == 200
    assert upstream.requests[-1].body == b"halffull"


def files_without_name(world: World) -> int:
    """Return how many files of the spill directory this process has open that have no name."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(
        link.startswith(f"{world.directory}/") and link.endswith(" (deleted)") for link in links
    )


def kept(size: int, memory: int, file: int) -> Step:
    """Make a step that sends a body but for its last byte; so many bytes must be where.

    What is on its way to the file is counted for both.
    """

    async def step(world: World) -> None:
        names = sorted(world.directory.iterdir())
        client = await world.connect()
        await client.send(POST + b"Content-Length: %d\r\n\r\n" % size + b"x" * (size - 1))
        in_memory, in_file = held_bytes(world)
        while in_memory < memory or in_file < file:
            await trio.lowlevel.checkpoint()
            in_memory, in_file = held_bytes(world)
        assert in_file == file
        assert files_without_name(world) == bool(file)
        assert sorted(world.directory.iterdir()) == names
        await client.send(b"y")
        assert (await client.receive_response()).status == 200
        assert world.targets["a"].requests[-1].body == b"x" * (size - 1) + b"y"
        while held_bytes(world) != (0, 0):
            await trio.lowlevel.checkpoint()

    return step


def arrives_at_once(name: str, head: bytes, first: bytes, rest: bytes) -> Step:
    """Make a step: the client gets the first bytes before the target has sent the rest."""

    async def step(world: World) -> None:
        await holds(name, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + first, rest)(world)
        client = await world.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        await client.receive_until(b"1234")
        await release(name)(world)
        await client.receive_until(b"5678")

    return step


def arrives_whole(head: bytes, first: bytes, rest: bytes) -> Step:
    """Make a step: the client gets nothing before the target has sent all."""

    async def step(world: World) -> None:
        await holds("a", b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + first, rest)(world)
        client = await world.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        await world.targets["a"].wait_requests(len(world.targets["a"].requests) + 1)
        await wait_all_tasks_blocked()
        assert not has_news(client)
        await release("a")(world)
        assert (await client.receive_response()).body == b"12345678"

    return step


async def upload_flows(world: World) -> None:
    got: list[bytes] = []
    arrived = trio.Event()

    async def serve(peer: Peer) -> None:
        got.append(await peer.receive_until(b"1234"))
        arrived.set()
        got.append(await peer.receive_until(b"\r\n0\r\nX-Sum: 7\r\n\r\n"))
        await peer.send(ok(b"done"))

    world.targets["a"].script(serve)
    client = await world.connect()
    await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n4\r\n1234\r\n")
    await arrived.wait()
    await client.send(b"4\r\n5678\r\n0\r\nX-Sum: 7\r\n\r\n")
    assert (await client.receive_response()).body == b"done"
    assert b"5678" in got[1]


async def trailers_reach_the_client(world: World) -> None:
    data = b"Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 7\r\n\r\n"
    await scripts("a", b"HTTP/1.1 200 OK\r\n" + data)(world)
    client = await world.connect()
    response = await client.get(headers="TE: trailers\r\n")
    assert (response.body, response.trailers) == (b"hi", [(b"x-sum", b"7")])


async def continue_is_relayed(world: World) -> None:
    asked = trio.Event()

    async def serve(peer: Peer) -> None:
        head = await peer.receive_until(b"\r\n\r\n")
        assert b"\r\nexpect: 100-continue\r\n" in head.lower()
        await asked.wait()
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await peer.receive_until(b"body")
        await peer.send(ok(b"done"))

    world.targets["a"].script(serve)
    client = await world.connect()
    await client.send(POST + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    await world.targets["a"].wait_peers(len(world.targets["a"].peers))
    await wait_all_tasks_blocked()
    assert not has_news(client), "it is the target that decides"
    asked.set()
    assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    await client.send(b"body")
    assert (await client.receive_response()).body == b"done"


async def continue_is_answered(world: World) -> None:
    client, upstream = await world.connect(), world.targets["a"]
    before = len(upstream.peers)
    await client.send(POST + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    assert len(upstream.peers) == before
    await client.send(b"body")
    assert (await client.receive_response()).status == 200
    assert upstream.requests[-1].get(b"expect") == []


def tunnels(flags: str) -> Row:
    async def step(world: World) -> None:
        async def serve(peer: Peer) -> None:
            await peer.receive_until(b"\r\n\r\n")
            await peer.send(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
            await peer.receive_until(b"ping")
            await peer.send(b"pong")

        world.targets["a"].script(serve)
        client = await world.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await client.receive_until(b"\r\n\r\n")
        await client.send(b"ping")
        assert await client.receive_until(b"pong") == b"pong"

    return row("and for upgrades", deploy(flags), step)


def keeps_status(mode: str, status: int) -> Row:
    """Make a row: this status and its header fields reach the client in this mode."""
    bodiless = status in (204, 304)
    framing = b"" if bodiless else b"Content-Length: 4\r\n"
    return row(
        f"status {status}, {mode}: status, headers and body are kept",
        deploy(MODES[mode]),
        scripts(
            "a",
            b"HTTP/1.1 %d Some Reason\r\nX-One: 1\r\nSet-Cookie: a=b\r\n%b\r\n%b"
            % (status, framing, b"" if bodiless else b"body"),
        ),
        ask(
            method="POST",
            body=b"sent",
            status=status,
            sees={":body": b"sent"},
            gets={"x-one": "1", "set-cookie": "a=b", ":body": b"" if bodiless else b"body"},
            logs={"reason": None},
        ),
    )


def bodiless(mode: str, what: str) -> Row:
    """Make a row: there is no body, and the connection goes on after it."""

    async def step(world: World) -> None:
        status = BODILESS[what]
        length = b"" if status == 204 else b"Content-Length: 5\r\n"
        await scripts("a", b"HTTP/1.1 %d X\r\n%b\r\n" % (status, length))(world)
        client = await world.connect()
        method = b"HEAD" if what == "HEAD" else b"GET"
        response = await client.request(method + b" / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert (response.status, response.body) == (status, b"")
        assert response.get(b"content-length") == ([] if status == 204 else [b"5"])
        assert (await client.get()).body == b"a", "nothing is left of a body"

    return row(f"{what} has no body, {mode}", deploy(MODES[mode]), step)


STREAMED = [
    ("text/event-stream", EVENTS, b"1234", b"5678"),
    ("chunked responses", b"Transfer-Encoding: chunked\r\n", b"4\r\n1234\r\n",
     b"4\r\n5678\r\n0\r\n\r\n"),
    ("X-Accel-Buffering: no", b"X-Accel-Buffering: no\r\nContent-Length: 8\r\n", b"1234", b"5678"),
]  # fmt: skip
FIXED = (b"Content-Length: 8\r\n", b"1234", b"5678")

ROWS = [
    row(
        "--buffer-requests: the body is read in full before the target is contacted",
        deploy("--buffer-requests"),
        target_is_contacted_last,
    ),
    row(
        "--buffer-memory of it in memory, 1 MiB unless said, then a temporary file",
        deploy("--buffer-requests"),
        kept((1 << 20) + 1, 1 << 20, 0),
        deploy("--buffer-requests --buffer-memory=10"),
        kept(11, 10, 0),
        kept(1 << 20, 10, (1 << 20) - 11),
    ),
    row(
        "over --max-request-body: 413",
        deploy("--buffer-requests --max-request-body=4"),
        ask(method="POST", body=b"1234", sees={":body": b"1234"}),
        answered(413, method="POST", body=b"12345", reason="request_too_large"),
    ),
    row(
        "0 = no limit",
        deploy("--buffer-requests --max-request-body=0 --buffer-responses --max-response-body=0"),
        scripts("a", ok(b"y" * 100_000)),
        ask(
            method="POST",
            body=b"x" * 100_000,
            sees={":body": b"x" * 100_000},
            gets={":body": b"y" * 100_000},
        ),
    ),
    row(
        "--buffer-responses likewise: the client gets nothing before it is whole",
        deploy("--buffer-responses"),
        arrives_whole(*FIXED),
        deploy("--buffer-responses --buffer-memory=3"),
        arrives_whole(*FIXED),
    ),
    row(
        "over --max-response-body: 500",
        deploy("--buffer-responses --max-response-body=4"),
        scripts("a", ok(b"1234"), ok(b"12345")),
        ask(gets={":body": b"1234"}),
        answered(500, reaches="a", target="{a}", reason="response_too_large"),
    ),
    *(
        row(
            f"response buffering switches itself off for {what}",
            deploy("--buffer-responses --max-response-body=4"),
            arrives_at_once("a", head, first, rest),
        )
        for what, head, first, rest in STREAMED
    ),
    tunnels("--buffer-requests --buffer-responses"),
    row(
        "without buffering, bytes flow as they arrive to the client",
        deploy(""),
        arrives_at_once("a", *FIXED),
        *(arrives_at_once("a", head, first, rest) for _, head, first, rest in STREAMED),
    ),
    row("and to the target, trailers included", deploy(""), upload_flows),
    row("trailers of a response, too", deploy(""), trailers_reach_the_client),
    row(
        "a close-delimited response streams too",
        deploy(""),
        arrives_at_once("a", b"", b"1234", b"5678"),
        deploy("--buffer-responses"),
        arrives_at_once("a", b"", b"1234", b"5678"),
    ),
    *(
        row(
            f"a complete response followed by a reset reaches the client whole, {mode}",
            deploy(flags),
            scripts("a", ok(b"z" * 10_000), then=Peer.reset),
            ask(gets={":body": b"z" * 10_000}, logs={"reason": None}),
        )
        for mode, flags in MODES.items()
    ),
    row("Expect: 100-continue is relayed when streaming", deploy(""), continue_is_relayed),
    row(
        "and answered by the proxy when buffering",
        deploy("--buffer-requests"),
        continue_is_answered,
    ),
    *itertools.starmap(bodiless, itertools.product(MODES, BODILESS)),
    *(
        row(
            f"1xx have no body and reach the client, {mode}",
            deploy(flags),
            scripts("a", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok(b"after")),
            ask(gets={":1xx": [103], ":body": b"after"}),
        )
        for mode, flags in MODES.items()
    ),
    *itertools.starmap(
        keeps_status, itertools.product(MODES, (200, 204, 206, 301, 304, 404, 422, 500, 503))
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_buffering(shown: Row) -> None:
    await play(shown)
