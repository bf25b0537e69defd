"""Requests over HTTP/3, one after another and many at once, to a target of HTTP/1.1."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import h11
import pytest
import trio

from kamal_proxy.http import h3_connection
from kamal_proxy.target_options import TargetOptions
from tests.http.streams import HELLO, open_world, read_all, read_head, stay_silent
from tests.http3.clients import open_front
from tests.http3.quic import losing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

NO_ERROR = 0x100
INTERNAL_ERROR = 0x102
REQUEST_CANCELLED = 0x10C


async def echo(stream: trio.SocketStream) -> None:
    """Answer every request with its own body, head and trailers."""
    codec = h11.Connection(h11.SERVER)
    while True:
        body = head = trailers = b""
        while True:
            try:
                event = codec.next_event()
            except h11.RemoteProtocolError:
                return  # the request was given up
            if event is h11.NEED_DATA:
                codec.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                head = b"; ".join(name + b"=" + value for name, value in event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                trailers = b"; ".join(name + b"=" + value for name, value in event.headers)
                break
            else:
                return
        fields = [
            (b"Content-Length", b"%d" % len(body)),
            (b"X-Head", head),
            (b"X-Trailers", trailers),
        ]
        for reply in (
            h11.Response(status_code=200, headers=fields),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            await stream.send_all(codec.send(reply) or b"")
        codec.start_next_cycle()


def always(answer: bytes) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def run(stream: trio.SocketStream) -> None:
        while await read_head(stream):
            await stream.send_all(answer)

    return run


async def test_a_request_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        client = await front.connect()
        answer = await client.get(b"/path?q=1")
        assert (answer.status, bytes(answer.body)) == (200, b"hello")
        assert answer.get(b"content-length") == [b"5"]
        assert (await client.get(b"/2")).status == 200
    first = world.logged[0]
    assert (first["proto"], first["status"], first["path"], first["host"]) == (
        "HTTP/3.0", 200, "/path", "app.test",
    )  # fmt: skip
    assert first["client_addr"] == "127.0.0.1"
    assert first["client_port"] != "0"


async def test_many_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = trio.Event()

    async def hold(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        await held.wait()
        path = head.split()[1]
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(path) + path)

    async with open_world(tmp_path, monkeypatch, hold) as world, open_front(world) as front:
        client = await front.connect()
        streams = [client.request(b"/%d" % number) for number in range(100)]
        while len(world.targets) < 100:
            await trio.lowlevel.checkpoint()
        held.set()
        bodies = [bytes((await client.answer(stream)).body) for stream in streams]
        assert bodies == [b"/%d" % number for number in range(100)]
    assert world.statuses == [200] * 100


async def test_connections_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch) as world, open_front(world) as front:
        clients = [await front.connect() for _ in range(5)]
        for client in clients:
            assert (await client.get()).status == 200
        assert world.server.connections == 5


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_arrives(
    announced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = os.urandom(2_000_000)
    headers = [(b"content-length", b"%d" % len(body))] if announced else []
    async with open_world(tmp_path, monkeypatch, echo) as world, open_front(world) as front:
        client = await front.connect()
        answer = await client.get(method=b"POST", body=body, headers=headers)
        assert answer.body == body
        [head] = answer.get(b"x-head")
        framing = b"content-length=2000000" if announced else b"transfer-encoding=chunked"
        assert framing in head.lower()
        assert world.logged[0]["req_content_length"] == (len(body) if announced else -1)
        # Once more: what was taken was given back to the windows.
        assert (await client.get(method=b"POST", body=body, headers=headers)).body == body


async def test_buffered_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TargetOptions(
        buffer_requests=True, buffer_responses=True, max_memory_buffer_size=1000
    )
    body = os.urandom(700_000)
    async with (
        open_world(tmp_path, monkeypatch, echo, target_options=options) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        assert (await client.get(method=b"POST", body=body)).body == body


async def test_lost_packets_cost_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = os.urandom(50_000)
    async with open_world(tmp_path, monkeypatch, echo) as world, open_front(world) as front:
        client = await front.connect()
        client.drop = losing(0.1)
        assert (await client.get(method=b"POST", body=body)).body == body
        client.drop = lambda _way, _data: False  # its farewell is sent once only


async def test_the_target_sees_what_http1_would_have_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, monkeypatch, echo) as world, open_front(world) as front:
        client = await front.connect()
        headers = [(b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"te", b"trailers")]
        answer = await client.get(headers=headers)
    fields = answer.get(b"x-head")[0].lower().split(b"; ")
    assert fields[0] == b"host=app.test"
    assert b"cookie=a=1" in fields  # one field: a=1; b=2
    assert b"b=2" in fields
    assert b"x-forwarded-for=127.0.0.1" in fields
    assert not [field for field in fields if field.startswith(b":")]


async def test_trailers_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, echo) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request(method=b"POST", body=b"abc", end=False)
        client.http.send_headers(stream, [(b"x-sum", b"7"), (b"host", b"no")], end_stream=True)
        client.flush()
        answer = await client.answer(stream)
    assert answer.body == b"abc"
    assert answer.get(b"x-trailers") == [b"x-sum=7"]


async def test_trailers_of_the_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = always(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 7\r\n\r\n"
    )
    async with open_world(tmp_path, monkeypatch, target) as world, open_front(world) as front:
        client = await front.connect()
        answer = await client.get()
    assert (answer.content, answer.trailers) == (b"abc", [(b"x-sum", b"7")])
    assert answer.get(b"transfer-encoding") == []


@pytest.mark.parametrize(
    ("method", "target", "status", "body"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, b""),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, b""),
        (b"GET", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HELLO, 200, b"hello"),
    ],
)
async def test_kinds_of_responses(
    method: bytes,
    target: bytes,
    status: int,
    body: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        open_world(tmp_path, monkeypatch, always(target)) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        answer = await client.get(method=method)
    assert (answer.status, answer.content) == (status, body)
    assert answer.informational == ([103] if b"103" in target else [])


async def test_a_client_that_waits_for_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TargetOptions(buffer_requests=True)
    async with (
        open_world(tmp_path, monkeypatch, echo, target_options=options) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        stream = client.request(
            method=b"POST", headers=[(b"expect", b"100-continue")], body=None, end=False
        )
        await client.wait(lambda: client.answers[stream].informational == [100])
        client.send_data(stream, b"abc", end=True)
        assert (await client.answer(stream)).body == b"abc"


async def test_no_target_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await read_head(stream)

    async with open_world(tmp_path, monkeypatch, hang_up) as world, open_front(world) as front:
        client = await front.connect()
        assert (await client.get()).status == 502
        world.remove()
        assert (await client.get()).status == 404


async def test_a_response_that_is_cut_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")

    async with open_world(tmp_path, monkeypatch, cut) as world, open_front(world) as front:
        client = await front.connect()
        assert (await client.get()).reset == INTERNAL_ERROR
        assert (await client.get()).reset == INTERNAL_ERROR
    assert [line["reason"] for line in world.logged] == ["target_failed"] * 2


async def test_an_answer_before_the_end_of_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_world(tmp_path, monkeypatch, always(HELLO)) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        stream = client.request(method=b"POST", body=b"some", end=False)
        answer = await client.answer(stream)
        assert answer.body == b"hello"
        await client.wait(lambda: answer.stopped == NO_ERROR)
        client.cancel(stream)
        assert (await client.get()).status == 200


async def test_a_large_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = os.urandom(3_000_000)

    async def give(stream: trio.SocketStream) -> None:
        while await read_head(stream):
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            await stream.send_all(head + body)

    async with open_world(tmp_path, monkeypatch, give) as world, open_front(world) as front:
        client = await front.connect()
        streams = [client.request(), client.request()]
        for stream in streams:
            assert (await client.answer(stream)).body == body


# Clients that do not stay to the end


async def test_a_cancelled_request_leaves_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = trio.Event()

    async def wait(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await read_all(stream)
        ended.set()

    async with open_world(tmp_path, monkeypatch, wait) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request(end=False)
        while not world.targets:
            await trio.lowlevel.checkpoint()
        client.cancel(stream)
        await ended.wait()
        answer = client.answers[stream]
        await client.wait(lambda: answer.reset == REQUEST_CANCELLED)
        assert client.closing_code is None
    assert [(line["status"], line["reason"]) for line in world.logged] == [(499, "client_gone")]


async def test_a_response_that_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = trio.Event()

    async def give(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                await stream.send_all(bytes(65536))
        except trio.BrokenResourceError:
            ended.set()

    async with open_world(tmp_path, monkeypatch, give) as world, open_front(world) as front:
        client = await front.connect()
        stream = client.request()
        await client.wait(lambda: len(client.answers[stream].body) > 100_000)
        client.quic.stop_stream(stream, REQUEST_CANCELLED)
        client.flush()
        await ended.wait()
    assert [line["reason"] for line in world.logged] == ["client_gone"]


async def test_a_client_that_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(tmp_path, monkeypatch, stay_silent) as world, open_front(world) as front:
        client = await front.connect()
        client.request()
        while not world.targets:
            await trio.lowlevel.checkpoint()
        client.quic.close()
        client.flush()
        while world.server.connections:
            await trio.lowlevel.checkpoint()
        assert world.server.streams == 0
        assert [line["reason"] for line in world.logged] == ["client_gone"]


async def test_a_client_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        open_world(tmp_path, monkeypatch, stay_silent, idle_timeout=0.6) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        client.request()
        while not world.targets:
            await trio.lowlevel.checkpoint()
        client.vanish()
        while world.server.connections:
            await trio.lowlevel.checkpoint()
        assert [line["reason"] for line in world.logged] == ["client_gone"]


async def test_a_quiet_request_is_not_an_idle_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client says nothing for longer than the idle timeout, but it answers."""

    async def late(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(1.2)
        await stream.send_all(HELLO)

    async with (
        open_world(tmp_path, monkeypatch, late, idle_timeout=0.6) as world,
        open_front(world) as front,
    ):
        client = await front.connect()
        assert (await client.get()).status == 200


async def test_a_client_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [0]

    async def give(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(bytes(65536))
            sent[0] += 65536

    async with (
        open_world(tmp_path, monkeypatch, give, stall_timeout=0.5) as world,
        open_front(world) as front,
    ):
        client = await front.connect(max_stream_data=50_000)
        client.quic._write_stream_limits = lambda *_, **__: None  # type: ignore[method-assign]
        stream = client.request()
        answer = await client.answer(stream)
        assert answer.reset == INTERNAL_ERROR
        assert len(answer.body) < 50_000
        # What the kernel's buffers hold of it is not much.
        assert sent[0] < h3_connection.MAX_OUTPUT + 2_000_000
        assert client.closing_code is None
    assert [line["reason"] for line in world.logged] == ["client_stalled"]


async def test_a_client_that_takes_not_even_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = always(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
    async with (
        open_world(tmp_path, monkeypatch, target, stall_timeout=0.5) as world,
        open_front(world) as front,
    ):
        client = await front.connect(max_stream_data=50_000)
        client.quic._write_stream_limits = lambda *_, **__: None  # type: ignore[method-assign]
        assert (await client.get()).reset == REQUEST_CANCELLED
    assert world.statuses == [200]
