"""Client connections: every deadline, drains, shutdown, and cancellation at every step."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import sockets
from kamal_proxy.http import pages
from kamal_proxy.http.downstream import GONE_GRACE, Http1Downstream
from kamal_proxy.http.relay import Relay
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state import SavedPause
from kamal_proxy.target_options import TargetOptions
from tests.http.stepping import attempt_every_step, serve_until, visit_and_leave
from tests.http.streams import (
    GET,
    HELLO,
    World,
    open_world,
    read_all,
    read_head,
    say_hello,
    stay_silent,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kamal_proxy.http.codec import ResponseHead

POST = b"POST /path HTTP/1.1\r\nHost: app.test\r\nContent-Length: %d\r\n\r\n"
Opener = Callable[..., AbstractAsyncContextManager[World]]
MEGABYTE = b"x" * 1_000_000


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> Opener:
    """Return :func:`open_world` for this test."""
    return partial(open_world, tmp_path, monkeypatch)


async def send_megabyte(stream: trio.SocketStream) -> None:
    await read_head(stream)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(MEGABYTE))
    await stream.send_all(MEGABYTE)


async def begin_and_hang(stream: trio.SocketStream) -> None:
    await read_head(stream)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await trio.sleep_forever()


# Keeping alive


async def test_requests_one_after_another(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as here:
        client = here.connect()
        for _ in range(3):
            await client.send_all(GET)
            response = await read_head(client)
            assert response.startswith(b"HTTP/1.1 200 ")
            assert response.endswith(b"hello")
        await client.aclose()
        assert here.statuses == [200] * 3
        assert len(here.targets) == 1, "the connection to the target is used again"


async def test_pipelined_requests(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as here:
        client = here.connect()
        await client.send_all(GET * 3 + GET.replace(b"Host", b"Connection: close\r\nHost"))
        response = await read_all(client)
        assert response.count(b"HTTP/1.1 200 ") == response.count(b"hello") == 4
        assert here.statuses == [200] * 4
        await client.aclose()


async def test_a_pooled_connection_that_died_is_not_used(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def once(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(HELLO)

    async with world(once) as here:
        client = here.connect()
        for _ in range(3):
            await client.send_all(GET)
            assert (await read_head(client)).endswith(b"hello")
            await wait_all_tasks_blocked()
        assert len(here.targets) == 3
        assert here.statuses == [200] * 3
        await client.aclose()


# Deadlines


async def test_a_connection_without_a_request_is_closed_silently(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(head_timeout=30, idle_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        assert await read_all(client) == b""
        assert trio.current_time() - start == pytest.approx(30)
        assert here.lines.messages == []
        await client.aclose()


async def test_an_idle_connection_is_closed_silently(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(head_timeout=30, idle_timeout=60) as here:
        client = here.connect()
        await client.send_all(GET)
        await read_head(client)
        start = trio.current_time()
        assert await read_all(client) == b""
        assert trio.current_time() - start == pytest.approx(60)
        assert here.statuses == [200]
        await client.aclose()


async def test_an_empty_line_is_no_request(world: Opener, autojump_clock: MockClock) -> None:
    async with world(head_timeout=30, idle_timeout=60) as here:
        client = here.connect()
        for line in (b"\r\n", b"\r\n\r\n"):
            await client.send_all(GET)
            await read_head(client)
            await client.send_all(line)
            await trio.sleep(40)
        await client.send_all(GET)
        assert (await read_head(client)).endswith(b"hello")
        start = trio.current_time()
        await client.send_all(b"\r\n")
        assert await read_all(client) == b""
        assert trio.current_time() - start == pytest.approx(60)
        assert here.statuses == [200] * 3
        await client.aclose()


@pytest.mark.parametrize("after", [b"", GET])
async def test_a_slow_head(world: Opener, after: bytes, autojump_clock: MockClock) -> None:
    async with world(head_timeout=30) as here:
        client = here.connect()
        if after:
            await client.send_all(after)
            await read_head(client)
        got = b""

        async def drip() -> None:
            for byte in GET:
                await client.send_all(bytes([byte]))
                await trio.sleep(7)

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            got = await read_head(client)
            assert trio.current_time() - start == pytest.approx(30)
            nursery.cancel_scope.cancel()
        await client.aclose()
        await wait_all_tasks_blocked()
        assert got.startswith(b"HTTP/1.1 408 ")
        assert here.statuses == [*([200] if after else []), 408]


async def test_a_client_that_leaves_in_the_middle_of_a_head(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world() as here:
        client = here.connect()
        await client.send_all(GET[:20])
        await wait_all_tasks_blocked()
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [499]


async def test_a_body_that_stalls(world: Opener, autojump_clock: MockClock) -> None:
    async with world(stay_silent, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 100 + b"some of it")
        await trio.sleep(50)
        await client.send_all(b"more of it")
        response = await read_head(client)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(110)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [408]


async def test_a_body_that_stalls_after_the_response_has_begun(
    world: Opener, autojump_clock: MockClock
) -> None:
    ended: list[float] = []

    async def begin(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await read_all(stream)
        ended.append(trio.current_time() - start)

    async with world(begin, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 100 + b"some of it")
        assert (await read_head(client)).startswith(b"HTTP/1.1 200 ")
        await trio.sleep(50)
        await client.send_all(b"more of it")
        with trio.fail_after(1000):
            await read_all(client)
        assert trio.current_time() - start == pytest.approx(110)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [200]
        assert here.logged[0]["reason"] == "body_timeout"
        assert ended == [pytest.approx(110)], "the target's connection is closed"


async def test_a_body_that_had_stalled_when_the_response_began(
    world: Opener, autojump_clock: MockClock
) -> None:
    """The read that waits for it goes on, and so does its time."""

    async def begin(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(10)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await read_all(stream)

    async with world(begin, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 100 + b"some of it")
        with trio.fail_after(1000):
            assert (await read_all(client)).endswith(b"half")
        assert trio.current_time() - start == pytest.approx(60)
        assert [(line["status"], line["reason"]) for line in here.logged] == [(200, "body_timeout")]


EXPECTING = POST.replace(b"Host", b"Expect: 100-continue\r\nHost")


async def test_a_client_that_rightly_waits_for_100_continue(
    world: Opener, autojump_clock: MockClock
) -> None:
    options = TargetOptions(response_timeout=90)
    async with world(stay_silent, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(EXPECTING % 100)
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(90)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [504]


@pytest.mark.parametrize("parts", [[b"some of it"], [b"", b"some of it"]])
async def test_a_client_that_did_not_wait_for_100_continue(
    world: Opener, parts: list[bytes], autojump_clock: MockClock
) -> None:
    options = TargetOptions(response_timeout=90)
    async with world(stay_silent, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        head = EXPECTING % 100
        for part in parts:
            await client.send_all(head + part)
            await wait_all_tasks_blocked()
            head = b""
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(60)
        await client.aclose()


@pytest.mark.parametrize("body", [b"", b"body"])
async def test_100_continue_for_a_body_that_is_there(
    world: Opener, body: bytes, autojump_clock: MockClock
) -> None:
    async def go_on(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await trio.sleep(80)
        await stream.send_all(HELLO)

    options = TargetOptions(response_timeout=90)
    async with world(go_on, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        await client.send_all(EXPECTING % len(body) + body)
        assert await read_head(client) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await read_head(client)).endswith(b"hello")
        await client.aclose()


async def test_another_1xx_does_not_say_continue(world: Opener, autojump_clock: MockClock) -> None:
    async def hint(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await read_all(stream)

    options = TargetOptions(response_timeout=90)
    async with world(hint, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(EXPECTING % 100)
        assert await read_head(client) == b"HTTP/1.1 103 Early Hints\r\n\r\n"
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(90)
        await client.aclose()


async def test_a_client_that_was_told_to_continue_and_does_not(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def go_on(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(10)
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await read_all(stream)

    options = TargetOptions(response_timeout=90)
    async with world(go_on, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(EXPECTING % 100)
        assert await read_head(client) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await read_head(client)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - start == pytest.approx(70)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [408]


async def test_a_client_that_does_not_read(world: Opener, autojump_clock: MockClock) -> None:
    async with world(send_megabyte, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET)
        await trio.sleep(59)
        assert here.server.connections == 1
        await trio.sleep(2)
        assert here.server.connections == 0
        assert trio.current_time() - start < 70
        assert len(await read_all(client)) < len(MEGABYTE)
        await client.aclose()
        assert here.statuses == [499]


async def test_a_client_that_reads_slowly_is_served(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(send_megabyte, stall_timeout=60) as here:
        client = here.connect()
        await client.send_all(GET)
        await read_head(client)
        got = 0
        while got < len(MEGABYTE) - 70_000:
            await trio.sleep(50)
            # Much at a time: a kernel wakes a writer only when a good part is free again.
            part = await client.receive_some(300_000)
            assert part, "it was cut off"
            got += len(part)
        await client.aclose()


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_a_target_that_does_not_answer(
    world: Opener, method: bytes, autojump_clock: MockClock
) -> None:
    options = TargetOptions(response_timeout=7)
    async with world(stay_silent, target_options=options) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET if method == b"GET" else POST % 4 + b"body")
        response = await read_head(client)
        assert response.startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(7)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [504]


async def test_the_target_timeout_begins_when_the_body_has_been_sent(
    world: Opener, autojump_clock: MockClock
) -> None:
    options = TargetOptions(response_timeout=7)
    async with world(stay_silent, target_options=options) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(POST % 20 + b"some of it")
        await trio.sleep(30)
        await client.send_all(b"the others")
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(37)
        await client.aclose()


async def test_a_client_that_does_not_read_the_answer_of_an_interruption(
    world: Opener, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(pages, "render", lambda *_: MEGABYTE)
    options = TargetOptions(response_timeout=7)
    async with world(stay_silent, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        await client.send_all(GET)
        await trio.sleep(7 + 4.9)
        assert here.server.connections == 1
        await trio.sleep(0.2)
        assert here.server.connections == 0
        got = await read_all(client)
        assert got.startswith(b"HTTP/1.1 504 ")
        assert len(got) < len(MEGABYTE)
        await client.aclose()
        assert len(here.logged) == 1


async def test_no_target_timeout(world: Opener, autojump_clock: MockClock) -> None:
    async def answer_late(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(10_000)
        await stream.send_all(HELLO)

    async with world(answer_late, target_options=TargetOptions(response_timeout=0)) as here:
        client = here.connect()
        await client.send_all(GET)
        assert (await read_head(client)).endswith(b"hello")
        await client.aclose()


async def test_no_target_timeout_and_a_target_that_takes_nothing(
    world: Opener, autojump_clock: MockClock
) -> None:
    """What is sent to it is bounded like all that is sent."""

    async def take_nothing(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    options = TargetOptions(response_timeout=0)
    size = len(MEGABYTE)  # more than the kernel keeps
    async with world(
        take_nothing, target_options=options, stall_timeout=60, max_head_size=2 * size
    ) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET[:-2] + b"X: " + MEGABYTE + b"\r\n\r\n")
        with trio.fail_after(1000):
            assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(60)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.logged[0]["reason"] == "target_timeout"


async def test_a_body_may_pause_for_ever(world: Opener, autojump_clock: MockClock) -> None:
    async def answer_slowly(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(HELLO[:-3])
        await trio.sleep(80_000)
        await stream.send_all(HELLO[-3:])

    async with world(answer_slowly) as here:
        client = here.connect()
        await client.send_all(GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert (await read_all(client)).endswith(b"hello")
        await client.aclose()
        assert here.statuses == [200]


# Paused and stopped


async def test_a_paused_service(world: Opener, autojump_clock: MockClock) -> None:
    async with world(pause=SavedPause(state="paused", fail_after=100), head_timeout=30) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET)
        response = await read_head(client)
        assert response.startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(100)
        await client.aclose()
        assert here.targets == []


@pytest.mark.parametrize(
    ("host", "written"), [(b"Web.Test:8080", b"Web.Test"), (b"[::1]:80", b"[::1]"), (b"a", b"a")]
)
async def test_a_restored_tls_service_redirects_also_while_it_is_stopped(
    world: Opener, host: bytes, written: bytes, autojump_clock: MockClock
) -> None:
    tls = ServiceOptions(tls_enabled=True)
    async with world(pause=SavedPause(state="stopped"), service_options=tls) as here:
        client = here.connect()
        await client.send_all(b"GET /a%20b?c=d HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 301 ")
        assert b"\r\nLocation: https://" + written + b"/a%20b?c=d\r\n" in response
        assert b"\r\nConnection: close\r\n" in response


async def test_a_stopped_service(world: Opener, autojump_clock: MockClock) -> None:
    pause = SavedPause(state="stopped", stop_message="back <soon>")
    async with world(pause=pause) as here:
        client = here.connect()
        await client.send_all(GET)
        response = await read_head(client)
        assert response.startswith(b"HTTP/1.1 503 ")
        assert b"back &lt;soon&gt;" in response
        await client.send_all(GET.replace(b"/path", b"/up"))
        response = await read_head(client)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"Content-Length: 0\r\n" in response
        await client.aclose()
        assert here.statuses == [503, 200]


# Clients that go away


async def test_a_client_that_goes_away_ends_its_request(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(stay_silent) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        await client.aclose()
        await trio.sleep(GONE_GRACE / 2)
        assert here.deployment.in_flight == 1
        await trio.sleep(GONE_GRACE)
        assert here.deployment.in_flight == 0
        assert here.statuses == [499]


async def test_a_client_that_only_ended_its_side_gets_a_quick_answer(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(GONE_GRACE / 2)
        await stream.send_all(HELLO)

    async with world(answer) as here:
        client = here.connect()
        await client.send_all(GET)
        await client.send_eof()
        assert (await read_all(client)).endswith(b"hello")
        await client.aclose()
        assert here.statuses == [200]


async def test_a_client_that_leaves_in_the_middle_of_a_body(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(stay_silent) as here:
        client = here.connect()
        await client.send_all(POST % 100 + b"some of it")
        await wait_all_tasks_blocked()
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [499]


async def test_a_client_that_left_before_the_answer_of_an_interruption(
    world: Opener, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Nobody looks at the client while its target is being connected to."""

    async def connect(*_: object) -> None:
        await trio.sleep_forever()

    options = TargetOptions(response_timeout=3)
    async with world(target_options=options) as here:
        monkeypatch.setattr(sockets, "connect", connect)
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        await client.aclose()
        await trio.sleep(3.1)
        (line,) = here.logged
        assert (line["status"], line["reason"]) == (499, "client_gone")
        assert line["resp_content_length"] == 0, "it was not sent"
        assert here.lines.of("Connection failed") == []


# Drains and shutdown


async def test_a_drain_deadline_before_the_answer(world: Opener, autojump_clock: MockClock) -> None:
    async with world(stay_silent) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        start = trio.current_time()
        here.deployment.retire(10)
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(10)
        result = await here.deployment.wait_drained()
        assert (result.completed, result.cancelled) == (0, 1)
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [504]
        assert here.lines.of("Request cancelled due to draining") == [
            {"target": "target:80", "path": "/path"}
        ]


async def test_a_drain_deadline_in_the_middle_of_the_answer(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(begin_and_hang) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.deployment.retire(10)
        response = await read_all(client)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert response.endswith(b"\r\n\r\nhalf"), "cut, and nothing else"
        assert (await here.deployment.wait_drained()).cancelled == 1
        await client.aclose()
        await wait_all_tasks_blocked()
        assert here.statuses == [200]


async def test_a_drain_deadline_in_the_middle_of_an_informational_response(
    world: Opener, autojump_clock: MockClock
) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 60_000 + b"\r\n\r\n"

    async def hint(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(hints * 50)
        await trio.sleep_forever()

    async with world(hint, stall_timeout=60) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.deployment.retire(10)
        await trio.sleep(11)
        # Reading makes room for whatever the proxy may still want to say.
        received = await read_all(client)
        assert received == (hints * 50)[: len(received)], "cut, and nothing else"
        assert len(received) % len(hints) > 0
        await wait_all_tasks_blocked()
        assert [(line["status"], line["reason"]) for line in here.logged] == [(499, "drained")]


async def test_a_drain_waits_for_a_request(world: Opener, autojump_clock: MockClock) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(5)
        await stream.send_all(HELLO)

    async with world(answer) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.deployment.retire(10)
        result = await here.deployment.wait_drained()
        assert (result.completed, result.cancelled) == (1, 0)
        assert (await read_head(client)).endswith(b"hello")
        await client.aclose()
        await wait_all_tasks_blocked()
        assert len(here.poller) == 0, "its upstream connection is closed, too"


async def test_shutdown_closes_idle_connections(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as here:
        fresh, used = here.connect(), here.connect()
        await used.send_all(GET)
        await read_head(used)
        await wait_all_tasks_blocked()
        start = trio.current_time()
        here.server.close_idle(math.inf)
        await here.server.wait_closed()
        assert trio.current_time() == start
        for client in (fresh, used):
            assert await read_all(client) == b""
            await client.aclose()
        assert here.statuses == [200]


async def test_shutdown_without_connections(world: Opener, autojump_clock: MockClock) -> None:
    async with world() as here:
        here.server.close_idle(math.inf)
        await here.server.wait_closed()
        late = here.connect()
        assert await read_all(late) == b""
        await late.aclose()


async def test_shutdown_lets_a_request_finish(world: Opener, autojump_clock: MockClock) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await trio.sleep(5)
        await stream.send_all(HELLO)

    async with world(answer) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.server.close_idle(math.inf)
        response = await read_all(client)
        assert response.endswith(b"hello")
        assert b"connection: close\r\n" in response.lower()
        await here.server.wait_closed()
        await client.aclose()
        assert here.statuses == [200]


async def test_shutdown_aborts_what_does_not_finish(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(stay_silent) as here:
        waiting, halfway = here.connect(), here.connect()
        await waiting.send_all(GET)
        await halfway.send_all(GET[:-2])
        await wait_all_tasks_blocked()
        here.server.close_idle(math.inf)
        await wait_all_tasks_blocked()
        assert here.server.connections == 2
        here.server.abort()
        for client in (waiting, halfway):
            assert (await read_all(client)).startswith(b"HTTP/1.1 503 ")
            await client.aclose()
        await here.server.wait_closed()
        assert here.statuses == [503, 503]


# Cancellation at every step


async def one_get(client: trio.SocketStream) -> None:
    await client.send_all(GET)
    await read_head(client)


async def two_gets(client: trio.SocketStream) -> None:
    await one_get(client)
    await one_get(client)


async def one_upload(client: trio.SocketStream) -> None:
    await client.send_all(POST % 600_000)
    for _ in range(6):
        await client.send_all(b"x" * 100_000)
    await read_head(client)


async def swallow_upload(stream: trio.SocketStream) -> None:
    got = (await read_head(stream)).partition(b"\r\n\r\n")[2]
    size = len(got)
    while size < 600_000:
        size += len(await stream.receive_some() or b"x" * 600_000)
    await stream.send_all(HELLO)


async def answer_early(stream: trio.SocketStream) -> None:
    await read_head(stream)
    await stream.send_all(HELLO)
    await read_all(stream)


async def one_download(client: trio.SocketStream) -> None:
    await client.send_all(GET)
    size = 0
    while size < len(MEGABYTE):
        size += len(await client.receive_some(100_000) or MEGABYTE)


async def leave_early(client: trio.SocketStream) -> None:
    await client.send_all(GET)


@pytest.mark.parametrize(
    ("answer", "visit", "requests"),
    [
        (say_hello, one_get, 1),
        (say_hello, two_gets, 2),
        (swallow_upload, one_upload, 1),
        (answer_early, one_upload, 1),
        (send_megabyte, one_download, 1),
        (stay_silent, leave_early, 1),
    ],
)
def test_cancelled_at_every_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[trio.SocketStream], Awaitable[None]],
    visit: Callable[[trio.SocketStream], Awaitable[None]],
    requests: int,
) -> None:
    async def attempt(here: World, step: int) -> bool:
        stream, client = here.pair()
        go = partial(visit_and_leave, visit, client)
        cancelled = await serve_until(
            here, stream, go, step, requests=requests, statuses={200, 499}
        )
        assert len(here.poller) <= 1, "at most the idle upstream connection is left"
        # The service goes on.
        after = here.connect()
        await after.send_all(GET.replace(b"/path", b"/after"))
        await after.aclose()
        await trio.sleep(1000)
        assert here.deployment.in_flight == 0
        return cancelled

    assert attempt_every_step(tmp_path, monkeypatch, attempt, answer=answer) > 10


# Answers before the request was whole


async def test_an_early_answer_says_that_the_connection_ends(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(say_hello) as here:
        client = here.connect()
        await client.send_all(POST % 5)
        await wait_all_tasks_blocked()
        response = await read_head(client)
        assert b"\r\nConnection: close\r\n" in response
        await client.send_all(b"12345" + GET)
        assert await read_all(client) in (b"", b"hello")
        await wait_all_tasks_blocked()
        assert here.statuses == [200]


async def test_a_client_that_leaves_with_the_whole_answer_was_served(
    world: Opener, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is sent before the body is first looked for, and the client's end found."""
    send_head, download = Relay._send_head, Relay._download
    answered = trio.Event()

    async def wait_for_the_answer(self: Relay, request: bytes) -> None:
        await send_head(self, request)
        await answered.wait()

    async def then_leave(self: Relay) -> ResponseHead | None:
        head = await download(self)
        client.socket.shutdown(socket.SHUT_WR)
        return head

    monkeypatch.setattr(Relay, "_send_head", wait_for_the_answer)
    monkeypatch.setattr(Relay, "_download", then_leave)

    async def answer_unasked(stream: trio.SocketStream) -> None:
        await stream.send_all(HELLO)
        answered.set()
        await read_all(stream)

    async with world(answer_unasked) as here:
        client = here.connect()
        await client.send_all(POST % 5)
        assert (await read_all(client)).endswith(b"hello")
        await wait_all_tasks_blocked()
        assert here.statuses == [200]
        assert "reason" not in here.logged[0]


async def test_each_pipelined_request_of_a_half_closed_client_has_its_grace(
    world: Opener, autojump_clock: MockClock
) -> None:
    async def slowly(stream: trio.SocketStream) -> None:
        while await read_head(stream):
            await trio.sleep(0.6 * GONE_GRACE)
            await stream.send_all(HELLO)

    async with world(slowly) as here:
        client = here.connect()
        await client.send_all(GET * 3)
        client.socket.shutdown(socket.SHUT_WR)
        assert (await read_all(client)).count(b"hello") == 3
        await wait_all_tasks_blocked()
        assert here.statuses == [200] * 3


async def test_the_continue_that_came_too_late(
    world: Opener, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends its body while it is being told to; the target's time goes on."""
    told = Http1Downstream.inform

    async def slowly(self: Http1Downstream, *args: Any) -> bool:
        await trio.sleep(1)
        return await told(self, *args)

    monkeypatch.setattr(Http1Downstream, "inform", slowly)

    async def only_continue(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await read_all(stream)

    options = TargetOptions(response_timeout=10)
    async with world(only_continue, target_options=options, stall_timeout=60) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all((POST % 5).replace(b"Host", b"Expect: 100-continue\r\nHost", 1))
        await trio.sleep(0.5)
        await client.send_all(b"12345")
        with trio.fail_after(100):
            assert b" 504 " in await read_all(client)
        assert trio.current_time() - start < 15
