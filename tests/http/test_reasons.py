"""Every reason for which a request can fail, provoked: one word in its log line and in the metrics.

Each row of the table is a way to fail over real sockets. An answer that had begun keeps its status.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from kamal_proxy import PauseOptions, StopOptions
from kamal_proxy.http.reasons import Reason
from kamal_proxy.options import ServiceOptions
from tests.certificates import make_ca
from tests.running import Embedded, open_embedded
from tests.scripted import (
    Client,
    ConnectionCut,
    Held,
    Peer,
    Upstream,
    deploy_options,
    ok,
    open_client,
    open_upstream,
    reply,
)
from tests.secure import client_context, open_secure

GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\n" + UPGRADE + b"\r\n"
SHORT = 0.25  # seconds; all other limits are longer than a test may take
LONG = 1000.0


@attrs.define
class Scene:
    """What a row works with: a proxy with the service ``web``, and its target."""

    proxy: Embedded
    upstream: Upstream
    stack: AsyncExitStack

    async def client(self, **options: Any) -> Client:
        """Open a connection that lasts as long as the scene, unless it is closed."""
        return await self.stack.enter_async_context(open_client(self.proxy.port, **options))

    async def send(self, data: bytes, **options: Any) -> Client:
        client = await self.client(**options)
        await client.send(data)
        return client

    async def status_of(self, data: bytes) -> int:
        """Send something on a new connection and return the status of the answer."""
        client = await self.send(data)
        return (await client.receive_response(data.split(b" ", 1)[0])).status

    async def held(self, data: bytes = GET) -> Client:
        """Send a request that its target holds."""
        self.upstream.script(Held(self.upstream))
        client = await self.send(data)
        await self.upstream.wait_requests(1)
        return client

    async def begun(self, rest: Callable[[Peer], Awaitable[None]]) -> Client:
        """Send a request; once the client has the head of the response, the target goes on."""
        go_on = trio.Event()

        async def begin(peer: Peer) -> None:
            await peer.receive_request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            await go_on.wait()
            await rest(peer)

        self.upstream.script(begin)
        client = await self.send(GET)
        client.unread(await client.receive_until(b"half"))
        go_on.set()
        return client


Provoke = Callable[[Scene], Awaitable[int]]


@attrs.frozen(kw_only=True)
class Row:
    """One way to fail.

    Attributes:
        reason: The reason that must be told.
        status: The status of the log line.
        provoke: Makes the request; returns the status that the client got, 0 for none.
        service: Whose request it was.
        run: Options of the proxy.
        target: Target options of the service.
    """

    reason: Reason
    status: int
    provoke: Provoke
    service: str = "web"
    run: dict[str, Any] = attrs.field(factory=dict)
    target: dict[str, Any] = attrs.field(factory=dict)


ROWS: dict[str, Row] = {}


def row(
    reason: Reason,
    *,
    status: int = 0,
    service: str = "web",
    run: dict[str, Any] | None = None,
    **target: Any,
) -> Callable[[Provoke], Provoke]:
    """Add a row; without a status, it is that of the reason."""

    def add(provoke: Provoke) -> Provoke:
        ROWS[provoke.__name__] = Row(
            reason=reason,
            status=status or reason.status,
            provoke=provoke,
            service=service,
            run=run or {},
            target=target,
        )
        return provoke

    return add


# The client's doing


@row(Reason.BAD_REQUEST, service="")
async def a_malformed_head(scene: Scene) -> int:
    return await scene.status_of(b"GET / HTTP/1.1\r\nHost: a\r\nA B: c\r\n\r\n")


@row(Reason.BAD_REQUEST, service="", status=505)
async def an_unknown_version(scene: Scene) -> int:
    return await scene.status_of(b"GET / HTTP/1.7\r\nHost: a\r\n\r\n")


@row(Reason.BAD_REQUEST, service="", status=405)
async def a_method_for_other_proxies(scene: Scene) -> int:
    return await scene.status_of(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")


@row(Reason.BAD_REQUEST, service="")
async def a_malformed_host(scene: Scene) -> int:
    return await scene.status_of(b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n")


@row(Reason.BAD_REQUEST)
async def a_malformed_chunk(scene: Scene) -> int:
    return await scene.status_of(CHUNKED + b"xyz\r\n")


@row(Reason.BAD_REQUEST, buffer_requests=True)
async def a_malformed_chunk_that_was_to_be_buffered(scene: Scene) -> int:
    return await scene.status_of(CHUNKED + b"xyz\r\n")


@row(Reason.HEAD_TIMEOUT, service="", run={"head_timeout": SHORT})
async def half_a_head(scene: Scene) -> int:
    return await scene.status_of(GET[:-2])


@row(Reason.BODY_TIMEOUT, run={"stall_timeout": SHORT})
async def half_a_body(scene: Scene) -> int:
    return await scene.status_of(POST % 10 + b"half")


@row(Reason.BODY_TIMEOUT, run={"stall_timeout": SHORT}, buffer_requests=True)
async def half_a_body_that_was_to_be_buffered(scene: Scene) -> int:
    return await scene.status_of(POST % 10 + b"half")


@row(Reason.CLIENT_GONE)
async def who_does_not_wait_for_the_answer(scene: Scene) -> int:
    (await scene.held()).close()
    return 0


@row(Reason.CLIENT_GONE)
async def who_resets(scene: Scene) -> int:
    (await scene.held()).reset()
    return 0


@row(Reason.CLIENT_GONE, service="")
async def who_leaves_in_the_middle_of_a_head(scene: Scene) -> int:
    (await scene.send(GET[:-2])).close()
    return 0


@row(Reason.CLIENT_GONE)
async def who_leaves_in_the_middle_of_a_body(scene: Scene) -> int:
    (await scene.send(POST % 10 + b"half")).close()
    return 0


@row(Reason.CLIENT_GONE, buffer_requests=True)
async def who_leaves_in_the_middle_of_a_body_that_was_to_be_buffered(scene: Scene) -> int:
    (await scene.send(POST % 10 + b"half")).close()
    return 0


@row(Reason.CLIENT_GONE)
async def who_leaves_in_the_middle_of_the_answer(scene: Scene) -> int:
    (await scene.begun(Peer.wait_closed)).reset()
    return 0


@row(Reason.CLIENT_GONE)
async def who_leaves_during_a_pause(scene: Scene) -> int:
    await scene.proxy.proxy.pause("web", PauseOptions(max_pause=LONG))
    (await scene.send(GET)).close()
    return 0


@row(Reason.CLIENT_STALLED, run={"stall_timeout": SHORT})
async def who_takes_nothing(scene: Scene) -> int:
    scene.upstream.script(reply(ok(bytes(20_000_000))))
    await scene.send(GET, receive_buffer=4096)
    return 0


# Limits


@row(Reason.HEAD_TOO_LARGE, service="", run={"max_head_size": 1024})
async def a_large_head(scene: Scene) -> int:
    return await scene.status_of(GET[:-2] + b"X: " + b"y" * 1024)


@row(Reason.HEAD_TOO_LARGE, service="", run={"max_headers": 2})
async def many_fields(scene: Scene) -> int:
    return await scene.status_of(GET[:-2] + b"X: y\r\n" * 2 + b"\r\n")


@row(Reason.REQUEST_TOO_LARGE, buffer_requests=True, max_request_body_size=4)
async def a_large_body(scene: Scene) -> int:
    return await scene.status_of(POST % 5 + b"hello")


@row(Reason.REQUEST_TOO_LARGE, buffer_requests=True, max_request_body_size=4)
async def a_large_body_of_unknown_length(scene: Scene) -> int:
    return await scene.status_of(CHUNKED + b"5\r\nhello\r\n0\r\n\r\n")


@row(Reason.RESPONSE_TOO_LARGE, buffer_responses=True, max_response_body_size=4)
async def a_large_response(scene: Scene) -> int:
    return await scene.status_of(GET)


@row(Reason.SPILL_FULL, run={"max_spill": 1000}, buffer_requests=True, max_memory_buffer_size=0)
async def a_request_over_the_quota(scene: Scene) -> int:
    return await scene.status_of(POST % 5000 + bytes(5000))


@row(Reason.SPILL_FULL, run={"max_spill": 1000}, buffer_responses=True, max_memory_buffer_size=0)
async def a_response_over_the_quota(scene: Scene) -> int:
    scene.upstream.script(reply(ok(bytes(500_000))))
    return await scene.status_of(GET)


@row(
    Reason.SPILL_FAILED,
    run={"spill_directory": "missing"},
    buffer_requests=True,
    max_memory_buffer_size=0,
)
async def no_place_for_a_request(scene: Scene) -> int:
    return await scene.status_of(POST % 5000 + bytes(5000))


@row(Reason.SPILL_FAILED, run={"spill_directory": "missing"}, buffer_responses=True,
     max_memory_buffer_size=0)  # fmt: skip
async def no_place_for_a_response(scene: Scene) -> int:
    scene.upstream.script(reply(ok(bytes(500_000))))
    return await scene.status_of(GET)


# The target's doing


@row(Reason.TARGET_REFUSED)
async def nobody_listens(scene: Scene) -> int:
    scene.upstream.stop_listening()
    return await scene.status_of(GET)


@row(Reason.TARGET_FAILED)
async def no_answer(scene: Scene) -> int:
    scene.upstream.script(reply(b""))
    return await scene.status_of(GET)


@row(Reason.TARGET_FAILED)
async def not_http(scene: Scene) -> int:
    scene.upstream.script(reply(b"hello\r\n\r\n"))
    return await scene.status_of(GET)


@row(Reason.TARGET_FAILED, status=200)
async def half_an_answer(scene: Scene) -> int:
    client = await scene.begun(close)
    return await status_until_cut(client)


@row(Reason.TARGET_FAILED, buffer_responses=True)
async def half_an_answer_that_was_buffered(scene: Scene) -> int:
    scene.upstream.script(reply(ok(b"half", 10)))
    return await scene.status_of(GET)


@row(Reason.TARGET_TIMEOUT, response_timeout=SHORT)
async def silence(scene: Scene) -> int:
    client = await scene.held()
    return (await client.receive_response()).status


@row(Reason.WEBSOCKET_IDLE, status=101, websocket_idle_timeout=SHORT)
async def a_websocket_that_carries_nothing(scene: Scene) -> int:
    async def switch(peer: Peer) -> None:
        await peer.receive_until(b"\r\n\r\n")
        await peer.send(SWITCHED)
        await peer.wait_closed()

    scene.upstream.script(switch)
    client = await scene.send(GET[:-2] + UPGRADE + b"\r\n")
    await client.receive_until(b"\r\n\r\n")
    assert await client.receive_exactly(4) == b"\x88\x02\x03\xe9"  # a Close frame, 1001
    client.close()
    return 101


async def close(peer: Peer) -> None:
    peer.close()


async def status_until_cut(client: Client) -> int:
    with pytest.raises(ConnectionCut) as cut:
        await client.receive_response()
    return cut.value.status


# The proxy's state


@row(Reason.NO_SERVICE, service="")
async def nobody_serves_it(scene: Scene) -> int:
    await scene.proxy.proxy.remove("web")
    return await scene.status_of(GET)


@row(Reason.NOT_SECURE, run={"https_port": 0})
async def a_host_without_tls_inside_tls(scene: Scene) -> int:
    return await inside_tls(scene, "a")


@row(Reason.MISDIRECTED, run={"https_port": 0}, service="closed")
async def a_connection_for_another_name(scene: Scene) -> int:
    return await inside_tls(scene, "closed.test")


async def inside_tls(scene: Scene, host: str) -> int:
    """Ask for a host on a connection for ``open.test``."""
    directory = Path(scene.stack.enter_context(tempfile.TemporaryDirectory()))
    authority = make_ca()
    (directory / "ca.pem").write_bytes(authority.pem)
    certificate, key = authority.issue("open.test", "closed.test").write(directory)
    for name, client_ca in (("open", ""), ("closed", str(directory / "ca.pem"))):
        service = ServiceOptions(
            hosts=(f"{name}.test",),
            tls_enabled=True,
            tls_certificate_path=certificate,
            tls_private_key_path=key,
            tls_client_ca_path=client_ca,
        )
        options = deploy_options(name, [scene.upstream])
        await scene.proxy.deploy(attrs.evolve(options, service_options=service))
    port = scene.proxy.https_port
    client = await scene.stack.enter_async_context(
        open_secure(port, "open.test", client_context(authority))
    )
    return (await client.get("/", host)).status


@row(Reason.NO_TARGET)
async def all_targets_are_down(scene: Scene) -> int:
    async with open_upstream() as other:
        options = deploy_options("web", [scene.upstream, other], interval=0.02)
        await scene.proxy.deploy(options)
        scene.upstream.health = 500
        for target in options.targets:
            await scene.proxy.lines.wait_for(
                lambda line, target=target: (  # type: ignore[misc]  # mypy knows no such default
                    line["msg"] == "Target health updated"
                    and (line["target"], line["state"]) == (target, "unhealthy")
                )
            )
        return await scene.status_of(GET)


@row(Reason.STOPPED)
async def a_stopped_service(scene: Scene) -> int:
    await scene.proxy.proxy.stop_service("web", StopOptions())
    return await scene.status_of(GET)


@row(Reason.PAUSE_EXPIRED)
async def a_pause_that_is_too_long(scene: Scene) -> int:
    await scene.proxy.proxy.pause("web", PauseOptions(max_pause=SHORT))
    return await scene.status_of(GET)


@row(Reason.PAUSE_FULL, run={"max_connections": 2})
async def a_pause_with_too_many_waiting(scene: Scene) -> int:
    await scene.proxy.proxy.pause("web", PauseOptions())
    await scene.send(GET)
    metrics = scene.proxy.proxy.metrics
    while b'http_in_flight_requests{service="web"} 1.0' not in metrics()[0]:
        await trio.lowlevel.checkpoint()
    return await scene.status_of(GET)


@row(Reason.DRAINED)
async def a_drain_that_is_over(scene: Scene) -> int:
    client = await scene.held()
    await scene.proxy.deploy(scene.upstream.options(drain_timeout=SHORT))
    return (await client.receive_response()).status


@row(Reason.DRAINED, status=200)
async def a_drain_in_the_middle_of_an_answer(scene: Scene) -> int:
    client = await scene.begun(Peer.wait_closed)
    await scene.proxy.deploy(scene.upstream.options(drain_timeout=SHORT))
    return await status_until_cut(client)


@row(Reason.SHUTDOWN, run={"shutdown_timeout": 1.0})
async def a_proxy_that_stops(scene: Scene) -> int:
    client = await scene.held()
    scene.proxy.proxy.stop()
    return (await client.receive_response()).status


@row(Reason.SHUTDOWN, service="", run={"shutdown_timeout": 1.0})
async def half_a_head_when_the_proxy_stops(scene: Scene) -> int:
    await scene.proxy.proxy.remove("web")
    client = await scene.send(GET + GET[:-2])
    assert (await client.receive_response()).status == 404
    scene.proxy.lines.all.clear()
    scene.proxy.proxy.stop()
    return (await client.receive_response()).status


# The table


def failures(proxy: Embedded) -> dict[tuple[str, str], float]:
    """Return what is counted, by service and reason."""
    text = proxy.proxy.metrics()[0].decode()
    return {
        (sample.labels["service"], sample.labels["reason"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "kamal_proxy_http_failures_total"
    }


@pytest.mark.parametrize("name", ROWS)
async def test_a_failure_has_its_reason(name: str, tmp_path: Path) -> None:
    wanted = ROWS[name]
    run = dict(wanted.run)
    if "spill_directory" in run:
        run["spill_directory"] = tmp_path / run["spill_directory"]
    limits = {"head_timeout": LONG, "idle_timeout": LONG, "stall_timeout": LONG}
    async with (
        open_upstream() as upstream,
        open_embedded(**(limits | run)) as proxy,
        AsyncExitStack() as stack,
    ):
        options = upstream.options()
        target = attrs.evolve(
            options.target_options, **({"response_timeout": LONG} | wanted.target)
        )
        await proxy.deploy(attrs.evolve(options, target_options=target))
        status = await wanted.provoke(Scene(proxy, upstream, stack))
        (line,) = await proxy.lines.wait_requests(1)
        counted = failures(proxy)
        assert len(proxy.lines.requests) == 1
    assert list(line)[-1] == "reason"
    assert (line["reason"], line["status"]) == (wanted.reason, wanted.status)
    assert line["service"] == wanted.service
    assert status == (0 if wanted.status == 499 else wanted.status)
    assert counted.pop((wanted.service, wanted.reason)) == 1
    assert set(counted) <= {("", Reason.NO_SERVICE)}, "what the scene needed besides"


def test_every_reason_is_in_the_table() -> None:
    assert {row.reason for row in ROWS.values()} == set(Reason) - {Reason.IDLE}


def test_a_reason_is_one_word() -> None:
    assert all(reason.replace("_", "").isalpha() and reason.islower() for reason in Reason)
    assert len(set(map(str, Reason))) == len(Reason)


@pytest.mark.parametrize("status", [200, 404, 500, 502, 503, 504])
async def test_what_went_well_has_none(proxy: Embedded, upstream: Upstream, status: int) -> None:
    """Also if the target says that something failed: that is what it meant to say."""
    await proxy.deploy(upstream.options())
    upstream.script(reply(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status))
    async with open_client(proxy.port) as client:
        assert (await client.get()).status == status
    (line,) = await proxy.lines.wait_requests(1)
    assert list(line)[-1] == "query"
    assert failures(proxy) == {}
