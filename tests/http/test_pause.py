"""What clients of a paused or stopped service see: waiting, release, expiry, health checks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import PauseOptions, StopOptions
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import ResumedError
from kamal_proxy.http.downstream import GONE_GRACE
from kamal_proxy.options import ServiceOptions
from kamal_proxy.router import RoutingTable
from kamal_proxy.state import SavedPause
from kamal_proxy.target_options import HealthCheckOptions, TargetOptions
from tests.http.stepping import attempt_every_step
from tests.http.streams import GET, World, open_world, read_all, read_head, stay_silent
from tests.pairs import Steps
from tests.running import open_embedded
from tests.scripted import Held, open_client, open_upstream, respond

if TYPE_CHECKING:
    from pathlib import Path

    from kamal_proxy.control.messages import Event
    from tests.running import Embedded
    from tests.scripted import Client, Upstream

Opener = Callable[..., AbstractAsyncContextManager[World]]
HEAD = GET.replace(b"GET", b"HEAD")
RUNNING = SavedPause()
STOPPED = SavedPause(state="stopped", stop_message="back <soon>")


def paused(seconds: float) -> SavedPause:
    return SavedPause(state="paused", fail_after=seconds)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> Opener:
    """Return :func:`open_world` for this test."""
    return partial(open_world, tmp_path, monkeypatch)


# Waiting


@pytest.mark.parametrize("seconds", [0, 7])
@pytest.mark.parametrize("request_", [GET, HEAD])
async def test_a_request_waits_no_longer_than_it_may(
    world: Opener, autojump_clock: MockClock, seconds: float, request_: bytes
) -> None:
    async with world(pause=paused(seconds), head_timeout=3, idle_timeout=3) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(request_)
        response = await read_head(client)
        assert trio.current_time() - start == pytest.approx(seconds)
        assert response.startswith(b"HTTP/1.1 504 ")
        assert response.endswith(b"\r\n\r\n") == (request_ is HEAD)
        assert here.targets == []
        assert here.lines.of("Rejecting request due to expired pause") == [
            {"service": "app", "path": "/path"}
        ]
        here.change(pause=RUNNING)
        await client.send_all(GET)
        assert (await read_head(client)).endswith(b"hello"), "the connection goes on"
        await client.aclose()
        assert here.statuses == [504, 200]
        assert [line.get("reason") for line in here.logged] == ["pause_expired", None]


async def test_resuming_lets_all_who_wait_go(world: Opener, autojump_clock: MockClock) -> None:
    async with world(pause=paused(30)) as here:
        clients = [here.connect() for _ in range(50)]
        for client in clients:
            await client.send_all(GET)
        await trio.sleep(20)
        assert here.targets == []
        assert here.deployment.in_flight == 0, "they are nobody's yet"
        start = trio.current_time()
        here.change(pause=RUNNING)
        for client in clients:
            assert (await read_head(client)).endswith(b"hello")
            await client.aclose()
        assert trio.current_time() == start
        assert here.statuses == [200] * 50


@pytest.mark.parametrize(("again", "expected"), [(20, 20), (7, 7), (3, 5), (5, 5)])
async def test_another_pause_moves_the_end_of_the_wait(
    world: Opener, autojump_clock: MockClock, again: float, expected: float
) -> None:
    """The limit is that of the pause that is in force, from when the request came."""
    async with world(pause=paused(10)) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET)
        await trio.sleep(5)
        here.change(pause=paused(again))
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(expected)
        await client.aclose()


async def test_a_pause_after_a_body_was_read_has_all_its_time(
    world: Opener, autojump_clock: MockClock
) -> None:
    """Between the two pauses the service ran; it was the client that took its time."""
    options = TargetOptions(buffer_requests=True)
    async with world(pause=paused(10), target_options=options) as here:
        client = here.connect()
        await client.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbo")
        await trio.sleep(6)
        here.change(pause=RUNNING)
        await trio.sleep(6)
        here.change(pause=paused(10))
        start = trio.current_time()
        await client.send_all(b"dy")
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(10)
        await client.aclose()
        assert here.targets == []


async def test_paused_again_and_resumed(world: Opener, autojump_clock: MockClock) -> None:
    async with world(pause=paused(10)) as here:
        client = here.connect()
        await client.send_all(GET)
        for _ in range(5):
            await trio.sleep(1)
            here.change(pause=RUNNING)
            here.change(pause=paused(10))
        await wait_all_tasks_blocked()
        assert here.targets == [], "what was not seen to run did not run"
        here.change(pause=RUNNING)
        assert (await read_head(client)).endswith(b"hello")
        await client.aclose()


async def test_those_who_wait_leave_room_for_others(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(pause=paused(100), max_connections=10) as here:
        service = here.routes.get("app")
        assert service is not None
        hosts = ServiceOptions(hosts=("other.test",))
        other = attrs.evolve(service, name="other", options=hosts, pause=RUNNING)
        here.routes = RoutingTable({"app": service, "other": other})
        waiting = [here.connect() for _ in range(5)]
        for client in waiting:
            await client.send_all(GET)
        await wait_all_tasks_blocked()
        refused, served = here.connect(), here.connect()
        await refused.send_all(GET)
        response = await read_all(refused)
        assert response.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nConnection: close\r\n" in response, "its place is wanted, too"
        await served.send_all(GET.replace(b"app.test", b"other.test"))
        assert (await read_head(served)).endswith(b"hello")
        assert [line.get("reason") for line in here.logged] == ["pause_full", None]

        await waiting.pop().aclose()
        await trio.sleep(2 * GONE_GRACE)
        waiting.append(here.connect())
        await waiting[-1].send_all(GET)
        await wait_all_tasks_blocked()
        assert here.statuses == [503, 200, 499], "there is a place to wait in again"
        here.change(pause=RUNNING)
        for client in waiting:
            assert (await read_head(client)).endswith(b"hello")
            await client.aclose()


async def test_stopped_while_requests_wait(world: Opener, autojump_clock: MockClock) -> None:
    async with world(pause=paused(10)) as here:
        client = here.connect()
        await client.send_all(GET)
        await trio.sleep(1)
        here.change(pause=STOPPED)
        response = await read_head(client)
        assert response.startswith(b"HTTP/1.1 503 ")
        assert b"back &lt;soon&gt;" in response
        await client.aclose()
        assert [line["reason"] for line in here.logged] == ["stopped"]
        assert here.targets == []


async def test_removed_while_requests_wait(world: Opener, autojump_clock: MockClock) -> None:
    async with world(pause=paused(10)) as here:
        client = here.connect()
        await client.send_all(GET)
        await trio.sleep(1)
        here.remove()
        assert (await read_head(client)).startswith(b"HTTP/1.1 404 ")
        await client.aclose()
        assert [(line["status"], line["reason"]) for line in here.logged] == [(404, "no_service")]


async def test_a_client_that_hangs_up_never_reaches_the_target(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(pause=paused(100)) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        await client.aclose()
        await trio.sleep(GONE_GRACE / 2)
        assert here.statuses == []
        await trio.sleep(GONE_GRACE)
        assert [(line["status"], line["reason"]) for line in here.logged] == [(499, "client_gone")]
        here.change(pause=RUNNING)
        await trio.sleep(10)
        assert here.targets == []


async def test_a_client_that_only_ended_its_side_may_still_be_answered(
    world: Opener, autojump_clock: MockClock
) -> None:
    async with world(pause=paused(100)) as here:
        client = here.connect()
        await client.send_all(GET)
        await client.send_eof()
        await trio.sleep(GONE_GRACE / 2)
        here.change(pause=RUNNING)
        assert (await read_all(client)).endswith(b"hello")
        await client.aclose()
        assert here.statuses == [200]


async def test_a_body_is_not_asked_for_while_its_request_waits(
    world: Opener, autojump_clock: MockClock
) -> None:
    bodies = []

    async def read_body(stream: trio.SocketStream) -> None:
        data = await read_head(stream)
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = data.partition(b"\r\n\r\n")[2]
        while len(data) < 10:
            data += await stream.receive_some()
        bodies.append(data)
        await stream.send_all(b"HTTP/1.1 204 OK\r\n\r\n")

    async with world(read_body, pause=paused(100)) as here:
        client = here.connect()
        post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n"
        await client.send_all(post)
        with trio.move_on_after(50) as silence:
            await client.receive_some()
        assert silence.cancelled_caught
        here.change(pause=RUNNING)
        assert (await read_head(client)).startswith(b"HTTP/1.1 100 ")
        await client.send_all(b"0123456789")
        assert (await read_head(client)).startswith(b"HTTP/1.1 204 ")
        await client.aclose()
        assert bodies == [b"0123456789"]


async def test_a_shutdown_ends_the_wait(world: Opener, autojump_clock: MockClock) -> None:
    async with world(pause=paused(100)) as here:
        client = here.connect()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.server.abort()
        assert (await read_all(client)).startswith(b"HTTP/1.1 503 ")
        await client.aclose()
        assert [line["reason"] for line in here.logged] == ["shutdown"]


# The drain


async def test_what_a_pause_cuts_is_answered(world: Opener, autojump_clock: MockClock) -> None:
    async with world(stay_silent) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        here.change(pause=paused(100))
        assert await here.deployment.drain(5) == DrainResult(cancelled=1)
        assert (await read_head(client)).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - start == pytest.approx(5)
        await client.aclose()
        assert [(line["status"], line["reason"]) for line in here.logged] == [(504, "drained")]
        (line,) = here.lines.of("Request cancelled due to draining")
        assert line == {"target": "target:80", "path": "/path"}


def test_cut_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is not told that its connection ends may send another request on it."""
    seen = set()

    async def attempt(here: World, step: int) -> bool:
        def cut() -> None:
            for request in tuple(here.deployment._in_flight):
                request.abort_drained()

        client = here.connect()
        steps = Steps(step, cut)
        trio.lowlevel.add_instrument(steps)
        await client.send_all(GET)
        response = await read_head(client)
        trio.lowlevel.remove_instrument(steps)
        status, closing = response[9:12], b"\r\nConnection: close\r\n" in response
        seen.add((status, closing))
        if not closing:
            await client.send_all(GET)
            assert (await read_head(client)).endswith(b"hello")
        await client.aclose()
        return steps.count >= step

    assert attempt_every_step(tmp_path, monkeypatch, attempt) > 5
    assert seen == {(b"200", False), (b"504", True)}


# Health checks


@pytest.mark.parametrize("pause", [paused(0), STOPPED])
@pytest.mark.parametrize(
    ("method", "path", "options", "healthy"),
    [
        (b"GET", b"/up", {}, True),
        (b"HEAD", b"/up", {}, True),
        (b"GET", b"/up?from=lb", {}, True),
        (b"POST", b"/up", {}, False),
        (b"OPTIONS", b"/up", {}, False),
        (b"GET", b"/up/", {}, False),
        (b"GET", b"/UP", {}, False),
        (b"GET", b"/", {}, False),
        (b"GET", b"/upper", {}, False),
        (b"GET", b"/app/up", {"path_prefixes": ("/app",)}, True),
        (b"GET", b"/app/up", {"path_prefixes": ("/app",), "strip_prefix": False}, False),
        (b"GET", b"/health/z", {"path": "/health/z"}, True),
        (b"GET", b"/health/z", {"path": "health/z"}, True),
        (b"GET", b"/up", {"path": "/health/z"}, False),
    ],
)
async def test_health_checks_of_others_succeed(
    world: Opener,
    autojump_clock: MockClock,
    pause: SavedPause,
    method: bytes,
    path: bytes,
    options: dict[str, Any],
    healthy: bool,
) -> None:
    routing = {name: value for name, value in options.items() if name != "path"}
    probe = HealthCheckOptions(path=options.get("path", "/up"))
    async with world(
        pause=pause,
        service_options=ServiceOptions(**routing),
        target_options=TargetOptions(health_check=probe),
    ) as here:
        client = here.connect()
        await client.send_all(
            b"%b %b HTTP/1.1\r\nHost: app.test\r\nContent-Length: 0\r\n\r\n" % (method, path)
        )
        response = await read_head(client)
        refused = 503 if pause is STOPPED else 504
        assert response.startswith(b"HTTP/1.1 %d " % (200 if healthy else refused))
        assert response.endswith(b"\r\n\r\n") == (healthy or method == b"HEAD")
        assert (b"\r\nContent-Length: 0\r\n" in response) == healthy
        await client.aclose()
        assert here.targets == []
        assert here.logged[0].get("reason") == (
            None if healthy else "stopped" if pause is STOPPED else "pause_expired"
        )


# Through a whole proxy


async def wait(client: Client, proxy: Embedded, path: str = "/") -> None:
    """Send a request and let it come to where it waits."""
    await client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    await wait_all_tasks_blocked()


async def test_a_deploy_during_a_pause(proxy: Embedded, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options())
    await proxy.proxy.pause("web", PauseOptions())
    async with open_upstream(respond(b"new")) as new, open_client(proxy.port) as client:
        await wait(client, proxy)
        await proxy.deploy(new.options())
        await wait_all_tasks_blocked()
        assert proxy.lines.requests == [], "it still waits"
        await proxy.proxy.resume("web")
        assert (await client.receive_response()).body == b"new"
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        (
            lambda proxy: proxy.stop_service("web", StopOptions(message="<back> & soon")),
            503,
            b"&lt;back&gt; &amp; soon",
        ),
        (lambda proxy: proxy.remove("web"), 404, b"404"),
        (lambda proxy: proxy.pause("web", PauseOptions(max_pause=0)), 504, b"504"),
    ],
)
async def test_a_change_while_requests_wait(
    proxy: Embedded,
    upstream: Upstream,
    client: Client,
    change: Callable[[Any], Awaitable[object]],
    status: int,
    text: bytes,
) -> None:
    await proxy.deploy(upstream.options())
    await proxy.proxy.pause("web", PauseOptions())
    await wait(client, proxy)
    await change(proxy.proxy)
    response = await client.receive_response()
    assert response.status == status
    assert text in response.body
    assert upstream.requests == []


async def test_requests_in_flight_end_and_new_ones_wait(
    proxy: Embedded, upstream: Upstream
) -> None:
    held = Held(upstream)
    upstream.script(held)
    await proxy.deploy(upstream.options())
    async with (
        open_client(proxy.port) as early,
        open_client(proxy.port) as late,
        trio.open_nursery() as nursery,
    ):
        await early.send(b"GET /early HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_requests(1)
        draining = trio.Event()

        async def pause() -> None:
            def progress(event: Event) -> None:
                if event.event == "draining":
                    draining.set()

            result = await proxy.proxy.pause("web", PauseOptions(), progress)
            assert result == DrainResult(completed=1)
            await proxy.proxy.resume("web")

        nursery.start_soon(pause)
        await draining.wait()
        await wait(late, proxy, "/late")
        held.release.set()
        assert (await early.receive_response()).body == b"held"
        assert (await late.receive_response()).body == b"hello"
    assert [request.target for request in upstream.requests] == [b"/early", b"/late"]


async def test_resumed_during_the_drain(proxy: Embedded, upstream: Upstream) -> None:
    held = Held(upstream)
    upstream.script(held)
    await proxy.deploy(upstream.options())
    async with open_client(proxy.port) as client, trio.open_nursery() as nursery:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_requests(1)
        draining, failed = trio.Event(), trio.Event()

        async def pause() -> None:
            with pytest.raises(ResumedError, match="service web was resumed while it drained"):
                await proxy.proxy.pause("web", PauseOptions(), lambda _: draining.set())
            failed.set()

        nursery.start_soon(pause)
        await draining.wait()
        await proxy.proxy.resume("web")
        await failed.wait()
        held.release.set()
        response = await client.receive_response()
        assert (response.status, response.body) == (200, b"held")


async def test_what_does_not_end_in_time_is_cut(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    upstream.script(Held(upstream))
    await proxy.deploy(upstream.options())
    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await upstream.wait_requests(1)
    result = await proxy.proxy.stop_service("web", StopOptions(drain_timeout=0))
    assert result == DrainResult(cancelled=1)
    response = await client.receive_response()
    assert (response.status, response.get(b"connection")) == (504, [b"close"])
    assert await client.receive_eof() == b""
    (line,) = await proxy.lines.wait_requests(1)
    assert line["reason"] == "drained"


@pytest.mark.parametrize("state", ["running", "paused", "stopped"])
async def test_a_state_survives_a_restart_and_can_be_resumed(
    tmp_path: Path, upstream: Upstream, state: str
) -> None:
    async with open_embedded(data_directory=tmp_path) as first:
        await first.deploy(upstream.options())
        if state == "paused":
            await first.proxy.pause("web", PauseOptions(max_pause=20))
        elif state == "stopped":
            await first.proxy.stop_service("web", StopOptions(message="later"))
    async with (
        open_embedded(data_directory=tmp_path) as second,
        open_client(second.port) as client,
    ):
        (described,) = second.proxy.services()
        assert described.state == state
        await wait(client, second)
        if state == "stopped":
            response = await client.receive_response()
            assert (response.status, b"later" in response.body) == (503, True)
        await second.proxy.resume("web")
        if state == "stopped":
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.receive_response()).body == b"hello"
