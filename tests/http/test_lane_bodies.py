"""Bodies in the lane, however their bytes arrive, and what comes of many exchanges at random.

Segments are kept apart by letting all tasks block in between; sockets are Unix sockets, so that
what was sent has arrived.
"""

from __future__ import annotations

import os
import random
import re
from typing import TYPE_CHECKING

import h11
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.http.lanes import spy_on_lanes
from tests.http.streams import GET, HELLO, open_world, read_all, read_head

if TYPE_CHECKING:
    from pathlib import Path

    from tests.http.streams import World

EXCHANGES = int(os.environ.get("LANE_EXCHANGES", "2000"))
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# What is sent, and whether h11 takes it all.
CHUNKS = {
    "plain": b"5\r\nhello\r\n1A\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n",
    "capitals": b"A\r\n0123456789\r\n0\r\n\r\n",
    "zeros": b"0000000000005\r\nhello\r\n000\r\n\r\n",
    "many-zeros": b"00000000000000000005\r\nhello\r\n0\r\n\r\n",
    "padding": b"5  \r\nhello\r\n0 \r\n\r\n",
    "extension": b'5;a="b\r"\r\nhello\r\n0;x\r\n\r\n',
    "later-extension": b"5\r\nhello\r\n5;a=b\r\nworld\r\n1\r\n!\r\n0\r\n\r\n",
    "trailers": b"5\r\nhello\r\n0\r\nX-T: 1\r\nX-U: 2\r\n\r\n",
    "crlf-inside": b"4\r\n\r\n\r\n\r\n2\r\n0\r\r\n0\r\n\r\n",
    "huge": b"FFFFFFFFFFFFF\r\nhello",
    "too-huge": b"5\r\nhello\r\nFFFFFFFFFFFFFFFFFFFFFFFFF\r\nhello",
    "no-size": b"5\r\nhello\r\n\r\nhello\r\n0\r\n\r\n",
    "letters": b"5\r\nhello\r\nxyz\r\nhello\r\n0\r\n\r\n",
    "sign": b"5\r\nhello\r\n+5\r\nhello\r\n0\r\n\r\n",
    "line-feed": b"5\r\nhello\r\n5\nhello\r\n0\r\n\r\n",
    "long": b"3\r\nhello\r\n0\r\n\r\n",
    "short": b"7\r\nhello\r\n0\r\n\r\n",
    "no-end": b"5\r\nhello\r\n0\r\n",
    "bad-end": b"5\r\nhello\r\n0\r\nX\r\n\r\n",
    "more": b"5\r\nhello\r\n0\r\n\r\nmore",
}


def read(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]] | None]:
    """Return the body of a response, and its trailers if it is whole: as h11 has it."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    parser.receive_data(b"")
    body = b""
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                body += bytes(event.data)
    except h11.RemoteProtocolError:
        return body, None
    return body, list(event.headers)


class Script:
    """A target that answers with the next of the given segments, or with hello."""

    def __init__(self) -> None:
        self.segments: list[bytes] | None = None
        self.done = trio.Event()
        self.closes = True

    async def __call__(self, stream: trio.SocketStream) -> None:
        while await read_head(stream):
            segments, self.segments = self.segments, None
            try:
                for segment in segments or [HELLO]:
                    await stream.send_all(segment)
                    await wait_all_tasks_blocked()
                if segments is not None and self.closes:
                    return
            finally:
                if segments is not None:
                    if self.closes:
                        await stream.aclose()
                    self.done.set()


async def ask(here: World, script: Script, segments: list[bytes]) -> bytes:
    """Return what a client gets of a response in segments, after which its target closes."""
    client = here.connect()
    # Now there is a connection to the target.
    await client.send_all(GET)
    assert await read_head(client) == HELLO
    await wait_all_tasks_blocked()
    script.segments, script.done = segments, trio.Event()
    await client.send_all(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    data = await read_all(client)
    await client.aclose()
    await script.done.wait()
    return data


def splits(data: bytes, seed: int) -> list[list[bytes]]:
    """Return a message in one piece, in two at every byte, and in many."""
    many = random.Random(seed)
    cuts = [sorted(many.sample(range(len(data)), min(9, len(data)))) for _ in range(5)]
    return [
        [data],
        *([data[:cut], data[cut:]] for cut in range(1, len(data))),
        *(
            [data[a:b] for a, b in zip([0, *cut], [*cut, len(data)], strict=True) if a < b]
            for cut in cuts
        ),
        [data[at : at + 1] for at in range(len(data))],
    ]


@pytest.mark.parametrize("name", CHUNKS)
async def test_chunks_in_any_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = HEAD + CHUNKS[name]
    script = Script()
    expected = read(data)
    spy = spy_on_lanes(monkeypatch)
    async with open_world(tmp_path, monkeypatch, script, in_lane=True) as here:
        for segments in splits(data, 1):
            got = await ask(here, script, segments)
            assert read(got) == expected, segments
        await wait_all_tasks_blocked()
        sizes = {line["resp_content_length"] for line in here.logged[1::2]}
        assert sizes == {len(expected[0])}
        reasons = {line.get("reason", "") for line in here.logged[1::2]}
        assert reasons == {"" if expected[1] is not None else "target_failed"}
    assert spy.tasks > 0


@pytest.mark.parametrize("length", [0, 4, 5, 6, 9])
async def test_lengths_in_any_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Less than was promised, as much, and more."""
    data = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nhello" % length
    script = Script()
    expected = read(data)
    async with open_world(tmp_path, monkeypatch, script, in_lane=True) as here:
        for segments in splits(data, 2):
            assert read(await ask(here, script, segments)) == expected, segments
        await wait_all_tasks_blocked()
        reasons = {line.get("reason", "") for line in here.logged[1::2]}
        assert reasons == {"target_failed" if length > 5 else ""}


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
async def test_other_responses_in_any_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    script = Script()
    expected = read(data)
    assert expected[1] is not None
    async with open_world(tmp_path, monkeypatch, script, in_lane=True) as here:
        for segments in splits(data, 3):
            assert read(await ask(here, script, segments)) == expected, segments


async def test_what_comes_behind_a_response_reaches_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the reads end, the next request is sent on another connection."""
    more = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    data = HEAD + b"5\r\nhello\r\n0\r\n\r\n" + more
    script = Script()
    script.closes = False
    async with open_world(tmp_path, monkeypatch, script, in_lane=True) as here:
        client = here.connect()
        for cut in range(1, len(data)):
            await client.send_all(GET)
            assert await read_head(client) == HELLO
            await wait_all_tasks_blocked()
            script.segments, script.done = [data[:cut], data[cut:]], trio.Event()
            await client.send_all(GET)
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                got += await client.receive_some()
            assert b"poison" not in got
            await script.done.wait()


# Requests


async def test_a_request_in_any_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = spy_on_lanes(monkeypatch)
    async with open_world(tmp_path, monkeypatch, in_lane=True) as here:
        client = here.connect()
        for cut in range(1, len(GET)):
            for part in (GET[:cut], GET[cut:], GET):
                await client.send_all(part)
                await wait_all_tasks_blocked()
            assert await client.receive_some() == HELLO + HELLO
    assert spy.entered == 1 + len(GET) - 1, "again after each of those that came in two"


async def test_pipelined_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one segment, one behind the other while that is served, and the last one in part."""

    async def answer(stream: trio.SocketStream) -> None:
        while head := await read_head(stream):
            path = head.split(b" ", 2)[1]
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(path))
            await wait_all_tasks_blocked()
            await stream.send_all(path)

    def get(number: int) -> bytes:
        return b"GET /%d HTTP/1.1\r\nHost: app.test\r\n\r\n" % number

    async with open_world(tmp_path, monkeypatch, answer, in_lane=True) as here:
        for group in (1, 2, 5):
            client = here.connect()
            requests = b"".join(get(100 + number) for number in range(20))
            size = len(get(100)) * group - (group > 2) * 7
            for at in range(0, len(requests), size):
                await client.send_all(requests[at : at + size])
                await trio.lowlevel.checkpoint()
            got = b""
            while got.count(b"/") < 40:
                got += await client.receive_some()
            bodies = [part[:4] for part in got.split(b"\r\n\r\n")[1:]]
            assert bodies == [b"/%d" % (100 + number) for number in range(20)]


async def test_many_connections_that_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch, in_lane=True) as here:
        for number in range(10_000):
            stream, client = here.pair()
            if number % 2:
                client.socket.close()
            here.enter(stream)
            client.socket.close()
            here.clients.clear()
            if number % 50 == 0:
                await wait_all_tasks_blocked()
                assert here.server.connections == 0
                assert not here.lane or not here.lane._visits
        await wait_all_tasks_blocked()
        assert here.logged == []


# All at random


def _size(data: bytes) -> int:
    """Return the size of a request; -1 if its head is not here."""
    end = data.find(b"\r\n\r\n")
    length = re.search(rb"Content-Length: ([0-9]+)\r", data)
    return -1 if end < 0 else end + 4 + (int(length[1]) if length else 0)


class Crowd:
    """Clients and a target that do as they like; whoever stays gets what is theirs."""

    def __init__(self, seed: int, count: int) -> None:
        self.random = random.Random(seed)
        self.left = count
        self.whole = 0

    async def pause(self) -> None:
        """Let others run for a while."""
        for _ in range(self.random.choice([0, 0, 1, 2, 5])):
            await trio.lowlevel.checkpoint()

    async def send(self, stream: trio.SocketStream, data: bytes) -> None:
        """Send in some parts."""
        while data:
            size = self.random.choice([1, 5, 40, len(data), len(data), len(data)])
            await stream.send_all(data[:size])
            data = data[size:]
            if data:
                await self.pause()

    async def target(self, stream: trio.SocketStream) -> None:
        """Answer each request with its own number, in one way or another."""
        try:
            data = b""
            while True:
                while (size := _size(data)) < 0 or len(data) < size:
                    part = await stream.receive_some()
                    if not part:
                        return
                    data += part
                number = data.split(b" ", 2)[1][1:]
                data = data[size:]
                await self.pause()
                text = b"<%b>" % number * self.random.choice([1, 1, 1, 1000, 40_000])
                fields = b"HTTP/1.1 200 OK\r\nX-Number: %b\r\n" % number
                kind = self.random.random()
                if kind < 0.4:
                    whole = fields + b"Content-Length: %d\r\n\r\n%b" % (len(text), text)
                elif kind < 0.9:
                    cut = self.random.randrange(1, len(text))
                    line = self.random.choice([b"%x\r\n", b"%X\r\n", b"%x\r\n", b"%x;a=b\r\n"])
                    chunks = b"".join(
                        line % len(part) + part + b"\r\n" for part in (text[:cut], text[cut:])
                    )
                    whole = fields + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
                else:
                    whole = fields + b"\r\n" + text
                if self.random.random() < 0.05:
                    whole = whole[: self.random.randrange(len(whole))]
                    kind = 1.0
                await self.send(stream, whole)
                if kind >= 0.9:
                    return
        except trio.BrokenResourceError:
            return

    async def client(self, here: World) -> None:
        """Ask, and leave at times."""
        while self.left > 0:
            client = here.connect()
            here.clients.remove(client)
            try:
                async with client:
                    while self.left > 0 and await self.exchange(client):
                        await self.pause()
            except trio.BrokenResourceError:
                continue

    async def exchange(self, client: trio.SocketStream) -> bool:
        """Ask once; return whether the connection goes on."""
        number, self.left = self.left, self.left - 1
        stays = self.random.random() > 0.05
        body = b"body %d end" % number if self.random.random() < 0.2 else b""
        request = b"PUT /%d HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n%b" % (
            number,
            len(body),
            body,
        )
        size = len(request) if stays else self.random.randrange(2 * len(request))
        await self.send(client, request[:size])
        if size < len(request):
            return False
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        parser.send(h11.EndOfMessage())
        got = b""
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                return False  # it was cut short
            if event is h11.NEED_DATA:
                if not stays and self.random.random() < 0.5:
                    return False
                parser.receive_data(
                    await client.receive_some(self.random.choice([99, 9_999, 1 << 18]))
                )
            elif isinstance(event, h11.Response):
                if event.status_code == 502:
                    return False
                assert (event.status_code, dict(event.headers)[b"x-number"]) == (
                    200,
                    b"%d" % number,
                )
            elif isinstance(event, h11.Data):
                got += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False  # it ended
        own = b"<%d>" % number
        # A response without a length may have ended early.
        assert (own * 40_000).startswith(got)
        self.whole += 1
        return parser.their_state is h11.DONE


@pytest.mark.parametrize("seed", range(2))
async def test_everybody_gets_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    crowd = Crowd(seed, EXCHANGES // 2)
    async with open_world(tmp_path, monkeypatch, crowd.target, in_lane=True) as here:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(crowd.client, here)
        await wait_all_tasks_blocked(0.1)
        assert here.server.connections == 0
        assert crowd.whole > EXCHANGES * 0.3
        assert here.deployment.in_flight == 0
        assert here.deployment.targets[0].in_flight == 0
        assert not here.lines.of("Connection failed")
