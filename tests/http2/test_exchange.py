"""Requests over HTTP/2, one after another and many at once, to a target of HTTP/1.1."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.http.exchange import Exchange
from kamal_proxy.http.h2_connection import H2Connection
from kamal_proxy.http.h2_stream import H2Stream
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state import SavedPause
from kamal_proxy.target_options import TargetOptions
from tests.http.streams import HELLO, open_world, read_head, silent_after
from tests.http2.clients import open_h2

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.http.streams import World

    Open = Callable[..., AbstractAsyncContextManager[World]]

CANCEL = 8
MEGABYTE = 1024 * 1024


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return what opens a server with one target."""
    return partial(open_world, tmp_path, monkeypatch)


def answering(response: bytes, seen: list[bytes]) -> Callable[[trio.SocketStream], Any]:
    """Make a target that answers every request, and notes its head and a chunked body."""

    async def answer(stream: trio.SocketStream) -> None:
        while head := await read_head(stream):
            while b"chunked" in head and b"\r\n0\r\n" not in head:
                part = await stream.receive_some()
                if not part:
                    break
                head += part
            seen.append(head)
            await stream.send_all(response)

    return answer


async def test_requests_are_answered_and_logged(world: Open) -> None:
    seen: list[bytes] = []
    async with world(answering(HELLO, seen)) as running:
        client = await open_h2(running)
        answer = await client.get(b"/path?q=1", headers=[(b"user-agent", b"x")])
        assert (answer.status, bytes(answer.body)) == (200, b"hello")
        assert answer.get(b"content-length") == [b"5"]
        assert (await client.get(b"/2")).status == 200
        assert len(running.targets) == 1
    line = running.logged[0]
    assert line["proto"] == "HTTP/2.0"
    assert (line["status"], line["path"], line["query"]) == (200, "/path", "q=1")
    assert (line["host"], line["method"], line["resp_content_length"]) == ("app.test", "GET", 5)
    head = seen[0].split(b"\r\n")
    assert head[0] == b"GET /path?q=1 HTTP/1.1"
    assert b"Host: app.test" in head
    assert b"user-agent: x" in head
    assert b"X-Forwarded-Proto: http" in head
    assert not any(line.lower().startswith((b"transfer-encoding", b"connection")) for line in head)


async def test_the_target_gets_one_cookie_field_and_no_hop_by_hop_fields(world: Open) -> None:
    seen: list[bytes] = []
    async with world(answering(HELLO, seen)) as running:
        client = await open_h2(running)
        fields = [(b"cookie", b"a=1"), (b"te", b"trailers"), (b"cookie", b"b=2")]
        await client.get(headers=fields)
    assert b"\r\ncookie: a=1; b=2\r\n" in seen[0]
    assert b"\r\nTE: trailers\r\n" in seen[0]


async def test_many_requests_share_a_connection(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        while head := await read_head(stream):
            path = head.split()[1]
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path)
            )

    async with world(answer) as running:
        client = await open_h2(running)
        streams = {await client.request(b"/%d" % n): n for n in range(100)}
        for stream, n in streams.items():
            assert bytes((await client.answer(stream)).body) == b"/%d" % n
    assert len(running.logged) == 100


async def test_a_large_response_waits_for_the_window(world: Open) -> None:
    body = bytes(range(256)) * 4096

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with world(answer) as running:
        client = await open_h2(running)
        answer_ = await client.get()
        assert bytes(answer_.body) == body
    assert running.logged[0]["resp_content_length"] == len(body)


async def test_two_large_responses_come_in_turns(world: Open) -> None:
    body = bytes(MEGABYTE)
    waiting = 0
    both = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal waiting
        await read_head(stream)
        waiting += 1
        if waiting == 2:
            both.set()
        await both.wait()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with world(answer) as running:
        # Neither can end before the client opens the windows.
        client = await open_h2(running)
        client.taking = False
        client.codec.increment_flow_control_window(4 * MEGABYTE)
        first, second = await client.request(), await client.request()
        one, two = client.answers[first], client.answers[second]
        await client.wait(lambda: len(one.body) == len(two.body) == 65535)
        client.order.clear()
        for stream in (first, second):
            client.codec.increment_flow_control_window(MEGABYTE, stream)
        await client.flush()
        await client.answer(first)
        await client.answer(second)
        assert client.order[:4] in ([first, second] * 2, [second, first] * 2)


async def send_megabyte(stream: trio.SocketStream) -> None:
    """Answer with a megabyte."""
    while await read_head(stream):
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MEGABYTE + bytes(MEGABYTE)
        )


async def test_what_the_windows_allow_comes_without_a_word_of_the_client(world: Open) -> None:
    async with world(send_megabyte) as running:
        client = await open_h2(running, initial_window_size=2**30)
        client.taking = False
        client.codec.increment_flow_control_window(2**30)
        await client.ping()
        stream = await client.request()
        client.answering = False
        assert len((await client.answer(stream)).body) == MEGABYTE


async def test_each_window_is_waited_for_alone(world: Open) -> None:
    async with world(send_megabyte) as running:
        # That of the connection,
        client = await open_h2(running, initial_window_size=2**30)
        client.taking = False
        stream = await client.request()
        answer = client.answers[stream]
        await client.wait(lambda: len(answer.body) == 65535)
        client.codec.increment_flow_control_window(MEGABYTE)
        await client.flush()
        assert len((await client.answer(stream)).body) == MEGABYTE
        # that of the stream,
        client = await open_h2(running)
        client.taking = False
        client.codec.increment_flow_control_window(2**30)
        stream = await client.request()
        other = client.answers[stream]
        await client.wait(lambda: len(other.body) == 65535)
        client.codec.increment_flow_control_window(65535, stream)
        await client.flush()
        await client.wait(lambda: len(other.body) == 2 * 65535)
        # and that of all streams.
        client.codec.update_settings({4: 2 * MEGABYTE})
        await client.flush()
        assert len((await client.answer(stream)).body) == MEGABYTE


async def test_the_body_of_a_request_is_passed_on_chunked_or_as_long_as_announced(
    world: Open,
) -> None:
    seen: list[bytes] = []
    async with world(answering(HELLO, seen)) as running:
        client = await open_h2(running)
        answer = await client.get(method=b"POST", body=b"some words")
        assert answer.status == 200
        await client.get(method=b"POST", body=b"four", headers=[(b"content-length", b"4")])
    assert b"Transfer-Encoding: chunked\r\n" in seen[0]
    assert seen[0].endswith(b"\r\n\r\na\r\nsome words\r\n0\r\n\r\n")
    assert b"\r\nContent-Length: 4\r\n" in seen[1]
    assert b"chunked" not in seen[1]


async def test_a_large_upload_opens_the_windows_again(world: Open) -> None:
    received = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        received.extend((await read_head(stream)).partition(b"\r\n\r\n")[2])
        while len(received) < 3 * MEGABYTE:
            received.extend(await stream.receive_some())
        await stream.send_all(HELLO)

    async with world(answer) as running:
        client = await open_h2(running)
        length = [(b"content-length", b"%d" % (3 * MEGABYTE))]
        stream = await client.request(method=b"PUT", headers=length, end=False)
        left = 3 * MEGABYTE
        while left:
            await client.wait(lambda: client.codec.local_flow_control_window(stream) > 0)
            size = min(left, 16384, client.codec.local_flow_control_window(stream))
            left -= size
            await client.send_data(stream, b"x" * size, end=not left)
        assert (await client.answer(stream)).status == 200
    assert received == b"x" * (3 * MEGABYTE)


async def test_padding_does_not_use_up_the_windows(world: Open) -> None:
    received = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        received.extend((await read_head(stream)).partition(b"\r\n\r\n")[2])
        while not received.endswith(b"0\r\n\r\n"):
            received.extend(await stream.receive_some())
        await stream.send_all(HELLO)

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"PUT", end=False)
        for _ in range(3000):
            await client.wait(lambda: client.codec.local_flow_control_window(stream) > 300)
            client.codec.send_data(stream, b"x", pad_length=255)
            await client.flush()
        await client.send_data(stream, b"", end=True)
        assert (await client.answer(stream)).status == 200
    assert received.count(b"x") == 3000


async def test_trailers_pass_in_both_directions(world: Open) -> None:
    seen: list[bytes] = []
    response = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Grpc-Status\r\n\r\n"
        b"2\r\nhi\r\n0\r\nGrpc-Status: 0\r\n\r\n"
    )
    async with world(answering(response, seen)) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"POST", end=False)
        client.codec.send_data(stream, b"abc")
        client.codec.send_headers(
            stream, [(b"checksum", b"9"), (b"host", b"evil")], end_stream=True
        )
        await client.flush()
        answer = await client.answer(stream)
        assert bytes(answer.body) == b"hi"
        assert answer.trailers == [(b"grpc-status", b"0")]
        assert not answer.get(b"transfer-encoding")
    assert seen[0].endswith(b"0\r\nchecksum: 9\r\n\r\n")


async def test_trailers_after_an_announced_length_are_dropped(world: Open) -> None:
    seen: list[bytes] = []
    async with world(answering(HELLO, seen)) as running:
        client = await open_h2(running)
        length = [(b"content-length", b"3")]
        stream = await client.request(method=b"POST", headers=length, end=False)
        client.codec.send_data(stream, b"abc")
        client.codec.send_headers(stream, [(b"checksum", b"9")], end_stream=True)
        await client.flush()
        assert (await client.answer(stream)).status == 200
    assert b"checksum" not in seen[0]


@pytest.mark.parametrize(
    ("method", "response", "status"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", 304),
    ],
)
async def test_a_response_without_a_body_ends_with_its_head(
    world: Open, method: bytes, response: bytes, status: int
) -> None:
    async with world(answering(response, [])) as running:
        client = await open_h2(running)
        answer = await client.get(method=method)
        assert (answer.status, bytes(answer.body), answer.ended) == (status, b"", True)
        assert (await client.get(method=method)).status == status
        assert len(running.targets) == 1


async def test_informational_responses_come_before_the_final_one(world: Open) -> None:
    response = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 103 Again\r\n\r\n" + HELLO
    )
    async with world(answering(response, [])) as running:
        answer = await (await open_h2(running)).get()
        assert (answer.informational, answer.status) == ([103, 103], 200)


async def test_a_client_that_waits_for_100_continue_gets_it_when_its_body_is_wanted(
    world: Open,
) -> None:
    options = TargetOptions(buffer_requests=True)
    seen: list[bytes] = []
    async with world(answering(HELLO, seen), target_options=options) as running:
        client = await open_h2(running)
        expecting = [(b"expect", b"100-continue"), (b"content-length", b"4")]
        stream = await client.request(method=b"POST", headers=expecting, end=False)
        answer = client.answers[stream]
        await client.wait(lambda: answer.informational)
        assert answer.informational == [100]
        assert not running.targets
        await client.send_data(stream, b"body", end=True)
        assert (await client.answer(stream)).status == 200
    assert b"expect" not in seen[0].lower()
    assert seen[0].endswith(b"\r\n\r\nbody")


async def test_an_answer_that_comes_early_ends_the_stream_without_an_error(world: Open) -> None:
    response = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(response)
        await trio.sleep_forever()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"POST", end=False)
        result = client.answers[stream]
        await client.wait(lambda: result.reset is not None)
        assert (result.status, result.ended, result.reset) == (403, True, 0)
        assert result.get(b"connection") == []
        # The connection goes on.
        assert (await client.get()).status == 403


async def test_a_cancelled_request_is_cancelled_at_the_target(world: Open) -> None:
    reached, closed = trio.Event(), trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        reached.set()
        assert await stream.receive_some() == b""
        closed.set()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await client.request()
        await reached.wait()
        await client.reset(stream)
        await closed.wait()
        await client.ping()
    line = running.logged[0]
    assert (line["status"], line["reason"]) == (499, "client_gone")


async def test_an_upload_that_is_cancelled_never_ends_at_the_target(world: Open) -> None:
    got = bytearray()
    closed = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        while part := await stream.receive_some():
            got.extend(part)
        closed.set()

    async with world(answer) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"POST", end=False)
        await client.send_data(stream, b"half")
        await client.ping()
        await client.reset(stream)
        await closed.wait()
    assert got.endswith(b"half\r\n")
    assert running.statuses == [499]


async def test_a_response_that_is_cut_resets_its_stream_only(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        if b"whole" in head:
            await stream.send_all(b" more")

    async with world(answer) as running:
        client = await open_h2(running)
        result = await client.get(b"/cut")
        assert (result.status, bytes(result.body), result.ended) == (200, b"half", False)
        assert result.reset == 2  # INTERNAL_ERROR
        assert bytes((await client.get(b"/whole")).body) == b"half more"
    assert running.logged[0]["reason"] == "target_failed"


async def test_a_target_that_fails_is_answered_with_502(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"nonsense\r\n\r\n")

    async with world(answer) as running:
        result = await (await open_h2(running)).get()
        assert result.status == 502
        assert result.get(b"content-type")[0].startswith(b"text/html")


async def test_a_slow_target_is_answered_for_with_504(
    world: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep_forever()

    options = TargetOptions(response_timeout=7.0)
    async with world(answer, target_options=options) as running:
        result = await (await open_h2(running)).get()
        assert result.status == 504


async def test_an_upload_that_stops_is_answered_with_408(
    world: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep_forever()

    async with world(answer, stall_timeout=9.0) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"POST", end=False)
        await client.send_data(stream, b"half")
        result = client.answers[stream]
        await client.wait(lambda: result.reset is not None)
        assert (result.status, result.reset) == (408, 0)
    assert running.logged[0]["reason"] == "body_timeout"


async def test_bodies_nobody_took_do_not_use_up_the_connection_s_window(world: Open) -> None:
    async with world(pause=SavedPause(state="paused", fail_after=30.0)) as running:
        client = await open_h2(running)
        for _ in range(12):
            await client.ping()
            stream = await client.request(method=b"POST", body=bytes(65000), end=False)
            await client.ping()
            await client.reset(stream)
        await client.ping()
        assert client.codec.outbound_flow_control_window > 200_000
        running.change(pause=SavedPause())
        assert (await client.get(method=b"POST", body=bytes(60_000))).status == 200


async def test_neither_do_those_of_requests_that_are_answered_without_them(world: Open) -> None:
    async with world() as running:
        client = await open_h2(running)
        running.remove()
        for _ in range(12):
            await client.ping()
            stream = await client.request(method=b"POST", body=bytes(65000), end=False)
            assert (await client.answer(stream)).status == 404
        await client.ping()
        assert client.codec.outbound_flow_control_window > 200_000


async def test_buffered_responses_and_requests(world: Open) -> None:
    body = b"z" * 300_000
    response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    options = TargetOptions(
        buffer_requests=True, buffer_responses=True, max_memory_buffer_size=1000
    )
    seen: list[bytes] = []
    async with world(answering(response, seen), target_options=options) as running:
        client = await open_h2(running)
        result = await client.get(method=b"POST", body=b"y" * 60_000)
        assert bytes(result.body) == body
    assert b"Content-Length: 60000" in seen[0]


async def test_a_body_that_is_too_large_is_answered_with_413(world: Open) -> None:
    options = TargetOptions(buffer_requests=True, max_request_body_size=1000)
    async with world(target_options=options) as running:
        client = await open_h2(running)
        stream = await client.request(method=b"POST", body=b"y" * 2000, end=False)
        result = client.answers[stream]
        await client.wait(lambda: result.reset is not None)
        assert (result.status, result.reset) == (413, 0)
        assert not running.targets


async def test_redirects_and_error_pages(world: Open) -> None:
    options = ServiceOptions(canonical_host="www.app.test")
    async with world(service_options=options) as running:
        client = await open_h2(running)
        result = await client.get(b"/a?b=c")
        assert result.status == 301
        assert result.get(b"location") == [b"http://www.app.test/a?b=c"]
        assert result.get(b"connection") == []
        running.remove()
        result = await client.get()
        assert (result.status, result.get(b"content-length")) == (404, [b"%d" % len(result.body)])
        head = await client.get(method=b"HEAD")
        assert (head.status, bytes(head.body)) == (404, b"")


async def test_a_paused_service_answers_when_it_goes_on(world: Open) -> None:
    pause = SavedPause(state="paused", fail_after=30.0)
    async with world(pause=pause) as running:
        client = await open_h2(running)
        stream, gone = await client.request(), await client.request()
        await client.reset(gone)
        await client.ping()
        assert running.server.waiting <= 2
        running.change(pause=SavedPause())
        assert (await client.answer(stream)).status == 200
    assert sorted(running.statuses) == [200, 499]


async def test_a_stopped_service_answers_503(world: Open) -> None:
    pause = SavedPause(state="stopped", stop_message="back soon")
    async with world(pause=pause) as running:
        result = await (await open_h2(running)).get()
        assert result.status == 503
        assert b"back soon" in result.body


async def test_the_end_of_a_drain_is_answered_with_504(
    world: Open, autojump_clock: trio.testing.MockClock
) -> None:
    reached = trio.Event()
    async with world(silent_after(reached)) as running:
        client = await open_h2(running)
        stream = await client.request()
        await reached.wait()
        running.deployment.retire(5.0)
        assert (await client.answer(stream)).status == 504
    assert running.logged[0]["reason"] == "drained"


async def test_a_connection_that_breaks_cancels_its_requests(world: Open) -> None:
    reached = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        reached.set()
        await stream.receive_some()

    async with world(answer) as running:
        client = await open_h2(running)
        await client.request()
        await client.request(method=b"POST", end=False)
        await reached.wait()
        await client.stream.aclose()
        while running.server.connections:
            await trio.testing.wait_all_tasks_blocked()
    assert running.statuses == [499, 499]


async def test_100_streams_at_most(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep_forever()

    async with world(answer) as running:
        client = await open_h2(running)
        await client.ping()
        streams = [await client.request() for _ in range(100)]
        client.codec.remote_settings.update({3: 1000})
        client.codec.remote_settings.acknowledge()
        refused = await client.answer(await client.request())
        assert (refused.reset, refused.status) == (7, 0)  # REFUSED_STREAM
        await client.reset(streams[0])
        extra = await client.request()
        await client.ping()
        assert client.answers[extra].reset is None


async def test_the_server_takes_no_more_streams_than_it_may_have(world: Open) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep_forever()

    async with world(answer, max_connections=3) as running:
        client, other = await open_h2(running), await open_h2(running)
        for _ in range(3):
            await client.request()
        await client.ping()
        assert (await other.get()).reset == 7
        await client.stream.aclose()
        while running.server.streams:
            await trio.testing.wait_all_tasks_blocked()
        stream = await other.request()
        await other.ping()
        assert other.answers[stream].reset is None


async def test_nothing_of_a_connection_waits_for_the_garbage_collector(world: Open) -> None:
    """What TLS has in memory for it is large, and the collector does not know that."""
    async with world() as running:
        gc.collect()
        gc.disable()
        try:
            client = await open_h2(running)
            await client.get()
            assert (kept(H2Connection), kept(Exchange)) == (1, 0)
            running.server.close_idle(trio.current_time() + 10)
            await running.server.wait_closed()
            await wait_all_tasks_blocked()
            assert (kept(H2Connection), kept(H2Stream), kept(Exchange)) == (0, 0, 0)
        finally:
            gc.enable()


def kept(kind: type) -> int:
    return sum(isinstance(each, kind) for each in gc.get_objects())
