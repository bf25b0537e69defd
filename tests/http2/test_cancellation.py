"""A connection of HTTP/2 that is cancelled at every step of the scheduler leaves nothing behind."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import trio
from h2.exceptions import StreamClosedError

from tests.http.stepping import attempt_every_step, serve_until
from tests.http.streams import HELLO, read_head, say_hello
from tests.http2.clients import H2Client, PriorKnowledge
from tests.http2.test_websocket import CONNECT, echo
from tests.http2.test_websocket import HELLO as MESSAGE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.http.answers import Answer
    from tests.http.streams import World

BODY = bytes(200_000)


async def send_much(stream: trio.SocketStream) -> None:
    while await read_head(stream):
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)


async def swallow(stream: trio.SocketStream) -> None:
    got = b""
    async for part in stream:
        got += part
        if got.endswith(b"\r\n0\r\n\r\n"):
            await stream.send_all(HELLO)
            got = b""


def check(answer: Answer) -> None:
    """Raise EOFError if the server, which may be cancelled, has cut the answer."""
    if answer.reset is not None and not answer.ended:
        raise EOFError
    assert answer.status == 200


async def two_requests(client: H2Client) -> None:
    first, second = await client.request(), await client.request()
    check(await client.answer(first))
    check(await client.answer(second))


async def download(client: H2Client) -> None:
    answer = await client.get()
    check(answer)
    assert bytes(answer.body) == BODY


async def upload(client: H2Client) -> None:
    stream = await client.request(method=b"POST", body=bytes(40_000), end=False)
    await client.ping()
    await client.send_data(stream, b"x", end=True)
    check(await client.answer(stream))


async def cancel_one(client: H2Client) -> None:
    first = await client.request()
    second = await client.request(method=b"POST", end=False)
    await client.ping()
    await client.reset(second)
    check(await client.answer(first))


async def websocket(client: H2Client) -> None:
    stream = await client.send_fields(CONNECT, end=False)
    answer = client.answers[stream]
    await client.wait(lambda: answer.fields)
    await client.send_data(stream, MESSAGE)
    await client.wait(lambda: bytes(answer.body) == MESSAGE)
    await client.send_data(stream, b"", end=True)
    await client.answer(stream)


@pytest.mark.parametrize(
    ("answer", "visit", "requests"),
    [
        (say_hello, two_requests, 2),
        (send_much, download, 1),
        (swallow, upload, 1),
        (say_hello, cancel_one, 2),
        (echo, websocket, 1),
    ],
)
def test_cancelled_at_every_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[trio.SocketStream], Awaitable[None]],
    visit: Callable[[H2Client], Awaitable[None]],
    requests: int,
) -> None:
    async def attempt(here: World, step: int) -> bool:
        stream, far = here.pair()
        stream.__class__ = PriorKnowledge
        ended = False

        async def go() -> None:
            nonlocal ended
            client = H2Client(far)
            with contextlib.suppress(trio.BrokenResourceError, EOFError, StreamClosedError):
                await client.open()
                await visit(client)
                ended = True
            await far.aclose()

        cancelled = await serve_until(
            here, stream, go, step, requests=requests, statuses={200, 499}
        )
        assert here.server.streams == 0
        assert len(here.poller) <= 2, "at most idle connections to the target are left"
        assert ended or cancelled
        return cancelled

    assert attempt_every_step(tmp_path, monkeypatch, attempt, answer=answer) > 10
