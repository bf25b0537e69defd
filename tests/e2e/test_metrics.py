"""The metrics of the real command after known traffic: names, labels and exact counts.

``docs/metrics.md`` lists them. What is in flight is read while it is.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.running import Command, open_command
from tests.scripted import LOCALHOST, Held, Peer, open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from prometheus_client.core import Metric

    from tests.scripted import Client, Upstream

PREFIX = "kamal_proxy_"
OPENMETRICS = "Accept: application/openmetrics-text; version=1.0.0\r\n"
WEBSOCKET = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
CLOSE = b"\x88\x02\x03\xe9"  # 1001
Samples = dict[tuple[str, ...], float]


@contextmanager
def reserved_port() -> Iterator[int]:
    """Keep a port from everybody but who listens on it: 0 means no metrics to the command."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOCALHOST, 0))
        yield sock.getsockname()[1]


@attrs.define
class Scraped:
    """The real command with metrics."""

    command: Command
    metrics_port: int

    async def families(self, headers: str = "") -> dict[str, Metric]:
        """Return what a scrape tells, by name; each name is told once."""
        async with open_client(self.metrics_port) as client:
            response = await client.get("/metrics", headers=headers)
        assert response.status == 200
        parse = parse_openmetrics if headers else parse_text
        families = list(parse(response.body.decode()))
        assert len({family.name for family in families}) == len(families)
        return {family.name: family for family in families}

    async def samples(self, name: str, *labels: str) -> Samples:
        """Return the values of a metric by the values of its labels, of which there are no more."""
        found = {}
        for family in (await self.families()).values():
            for sample in family.samples:
                if sample.name == PREFIX + name:
                    assert sample.labels.keys() == set(labels)
                    found[tuple(sample.labels[label] for label in labels)] = sample.value
        return found

    async def requests(self) -> Samples:
        return await self.samples("http_requests_total", "service", "method", "status")

    async def in_flight(self) -> Samples:
        return await self.samples("http_in_flight_requests", "service")

    async def wait_for(self, wanted: Samples, name: str, *labels: str) -> None:
        """Scrape until the metric has these values: what it counts ends on its own."""
        while await self.samples(name, *labels) != wanted:
            pass  # a scrape takes its time


@asynccontextmanager
async def open_scraped(directory: Path, *arguments: str) -> AsyncIterator[Scraped]:
    with reserved_port() as port:
        options = ("--bind", LOCALHOST, "--metrics-port", str(port))
        async with open_command(directory, *options, *arguments) as command:
            yield Scraped(command, port)


@pytest.fixture
async def scraped(directory: Path) -> AsyncIterator[Scraped]:
    async with open_scraped(directory) as running:
        yield running


async def send_requests(client: Client, requests: Sequence[tuple[str, str, int]]) -> None:
    """Send requests with (method, path, expected status)."""
    for method, path, status in requests:
        head = f"{method} {path} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0\r\n\r\n"
        assert (await client.request(head.encode())).status == status


# Requests


async def test_the_metrics_of_the_original(scraped: Scraped, upstream: Upstream) -> None:
    await scraped.command.deploy("web", *upstream.flags(), "--host=a.example")
    async with open_client(scraped.command.port) as client:
        methods = ["GET", "GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        traffic = [(method, "/", 200) for method in [*methods, "TRACE", "BREW", "PROPFIND"]]
        await send_requests(client, traffic)
        assert (await client.get(host="nobody")).status == 404
        assert (await client.get(host="nobody")).status == 404
    async with open_client(scraped.command.port) as client:
        await client.send(b"\0")
        await client.wait_closed()
    await scraped.command.lines.wait_requests(len(traffic) + 3)
    once = ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
    counts: Samples = {("web", method, "200"): 1 for method in once}
    counts |= {
        ("web", "GET", "200"): 3,
        ("web", "OTHER", "200"): 2,
        ("", "GET", "404"): 2,
        ("", "OTHER", "400"): 1,
    }
    labels = ("service", "method", "status")
    assert await scraped.requests() == counts
    name = "http_request_duration_seconds"
    assert await scraped.samples(f"{name}_count", *labels) == counts
    sums = await scraped.samples(f"{name}_sum", *labels)
    assert sums.keys() == counts.keys()
    assert all(seconds >= 0 for seconds in sums.values())
    buckets = await scraped.samples(f"{name}_bucket", *labels, "le")
    bounds = [".005", ".01", ".025", ".05", ".1", ".25", ".5", "1", "2.5", "5", "10"]
    expected = {("0" + bound) if bound[0] == "." else bound for bound in bounds} | {"+Inf"}
    assert {bound for *_, bound in buckets} == expected
    assert buckets["web", "GET", "200", "+Inf"] == 3
    assert await scraped.in_flight() == {("web",): 0}
    assert await scraped.samples("http_failures_total", "service", "reason") == {
        ("", "no_service"): 2,
        ("", "bad_request"): 1,
    }


@pytest.mark.parametrize("headers", ["", OPENMETRICS], ids=["text", "openmetrics"])
async def test_both_formats_tell_the_same_metrics(
    scraped: Scraped, upstream: Upstream, headers: str
) -> None:
    await scraped.command.deploy("web", *upstream.flags())
    async with open_client(scraped.command.port) as client:
        await client.get()
        await client.get(headers=WEBSOCKET)  # answered without a switch
    await scraped.command.lines.wait_requests(2)
    families = await scraped.families(headers)
    own = {name for name in families if name.startswith(PREFIX)}
    # The parser of the text format leaves _total to the names of counters only in samples.
    assert {name.removesuffix("_total") for name in own} == {
        PREFIX + name
        for name in (
            "http_in_flight_requests",
            "http_requests",
            "http_request_duration_seconds",
            "http_open_connections",
            "upstream_connects",
            "upstream_reuses",
            "probes",
            "deploy_duration_seconds",
            "spill_bytes",
            "buffer_memory_bytes",
        )
    }
    assert families["process_open_fds"].samples[0].value > 0


async def test_excluded_paths(scraped: Scraped, upstream: Upstream) -> None:
    """They are those that the target sees, exactly; the log has them all the same."""
    await scraped.command.deploy(
        "web",
        *upstream.flags(),
        "--path-prefix=/app",
        "--exclude-metrics-path=/ping",
        "--exclude-metrics-path=/a b",
    )
    held = Held(upstream)
    upstream.script(held)
    async with open_client(scraped.command.port) as client:
        await client.send(b"GET /app/ping?now HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_requests(1)
        assert await scraped.in_flight() == {}
        held.release.set()
        await client.receive_response()
        for path in ("/app/ping", "/app/%70ing", "/app/a%20b"):
            assert (await client.get(path)).status == 200
        assert await scraped.requests() == {}
        for path in ("/app/pings", "/app/ping/", "/app", "/ping"):
            await client.get(path)
    lines = await scraped.command.lines.wait_requests(8)
    assert [line["path"] for line in lines[:4]] == ["/app/ping"] * 3 + ["/app/a b"]
    assert await scraped.requests() == {("web", "GET", "200"): 3, ("", "GET", "404"): 1}


async def test_failures_of_excluded_paths(scraped: Scraped, upstream: Upstream) -> None:
    await scraped.command.deploy("web", *upstream.flags(), "--exclude-metrics-path=/ping")
    upstream.stop_listening()
    async with open_client(scraped.command.port) as client:
        assert (await client.get("/ping")).status == 502
        assert (await client.get("/")).status == 502
    lines = await scraped.command.lines.wait_requests(2)
    assert [line["reason"] for line in lines] == ["target_refused"] * 2
    assert await scraped.requests() == {("web", "GET", "502"): 1}
    assert await scraped.samples("http_failures_total", "service", "reason") == {
        ("web", "target_refused"): 1
    }


async def test_in_flight_while_held_and_while_paused(scraped: Scraped, upstream: Upstream) -> None:
    command = scraped.command
    await command.deploy("web", *upstream.flags())
    held = Held(upstream)
    upstream.script(held, held)
    async with (
        open_client(command.port) as one,
        open_client(command.port) as two,
        open_client(command.port) as waiting,
    ):
        for client in (one, two):
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_requests(2)
        assert await scraped.in_flight() == {("web",): 2}
        held.release.set()
        for client in (one, two):
            await client.receive_response()
        await command.lines.wait_requests(2)
        assert await scraped.in_flight() == {("web",): 0}

        assert (await command.kp("pause", "web", "--max-pause=1h")).code == 0
        await waiting.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await scraped.wait_for({("web",): 1}, "http_in_flight_requests", "service")
        assert await scraped.requests() == {("web", "GET", "200"): 2}
        assert (await command.kp("resume", "web")).code == 0
        assert (await waiting.receive_response()).status == 200
        await command.lines.wait_requests(3)
        assert await scraped.in_flight() == {("web",): 0}


async def test_open_connections(scraped: Scraped) -> None:
    name = "http_open_connections"
    await scraped.wait_for({(): 0}, name)
    async with open_client(scraped.command.port), open_client(scraped.command.port):
        await scraped.wait_for({(): 2}, name)
    await scraped.wait_for({(): 0}, name)


# Targets


async def test_connects_reuses_and_retries(scraped: Scraped, upstream: Upstream) -> None:
    command = scraped.command
    result = ("service", "result")

    async def counted() -> tuple[Samples, Samples, Samples]:
        return (
            await scraped.samples("upstream_connects_total", *result),
            await scraped.samples("upstream_reuses_total", "service"),
            await scraped.samples("upstream_retries_total", "service"),
        )

    async with open_upstream() as gone:
        await command.deploy("web", *upstream.flags(), f"--target={gone.target}")
        async with open_client(command.port) as client:
            await send_requests(client, [("GET", "/", 200)] * 4)
            assert await counted() == ({("web", "ok"): 2}, {("web",): 2}, {})
            gone.stop_listening()
            for peer in gone.peers:
                peer.shutdown_write()
            # It is its turn each time, because the other one has had the request before.
            await send_requests(client, [("GET", "/", 200)] * 4)
    connects, reuses, retries = await counted()
    assert connects == {("web", "ok"): 2, ("web", "failed"): 4}
    assert reuses == {("web",): 6}
    assert retries == {("web",): 4}


async def test_a_stale_connection_is_a_retry(scraped: Scraped, upstream: Upstream) -> None:
    await scraped.command.deploy("web", *upstream.flags())

    async def answer_once(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await peer.receive_request()
        peer.close()

    upstream.script(answer_once)
    async with open_client(scraped.command.port) as client:
        await send_requests(client, [("GET", "/", 200)] * 2)
    result = ("service", "result")
    assert await scraped.samples("upstream_connects_total", *result) == {("web", "ok"): 2}
    assert await scraped.samples("upstream_reuses_total", "service") == {("web",): 1}
    assert await scraped.samples("upstream_retries_total", "service") == {("web",): 1}


async def test_probes_and_deploys(scraped: Scraped, upstream: Upstream) -> None:
    """The second deploy fails; its probes count too, and nothing tells of how many there were."""
    command = scraped.command
    await command.deploy("web", *upstream.flags(), "--health-check-interval=1h")
    probes, result = "probes_total", ("service", "result")
    deploys = "deploy_duration_seconds_count"
    assert await scraped.samples(probes, *result) == {("web", "ok"): 1}
    assert await scraped.samples(deploys, *result) == {("web", "ok"): 1}
    upstream.health = 500
    failed = await command.kp("deploy", "web", *upstream.flags(), "--deploy-timeout=100ms")
    assert failed.code == 1
    counted = await scraped.samples(probes, *result)
    assert counted.pop(("web", "ok")) == 1
    assert counted.pop(("web", "failed")) >= 1
    assert counted == {}
    assert await scraped.samples(deploys, *result) == {("web", "ok"): 1, ("web", "failed"): 1}
    sums = await scraped.samples("deploy_duration_seconds_sum", *result)
    assert sums["web", "failed"] >= 0.1


# Upgrades


async def switch(peer: Peer) -> None:
    """Switch to what was asked for, and end when the other side does, after a Close frame."""
    head = await peer.receive_until(b"\r\n\r\n")
    protocol = b"websocket" if b"websocket" in head else b"chat"
    await peer.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n")
    if protocol == b"websocket":
        await peer.receive_exactly(8)
        await peer.send(CLOSE)
    await peer.wait_closed()


async def test_upgraded_connections(scraped: Scraped, upstream: Upstream) -> None:
    command = scraped.command
    now, ever = "upgraded_connections", "upgrades_total"
    labels = ("service", "protocol")
    await command.deploy("web", *upstream.flags())
    async with open_client(command.port) as one, open_client(command.port) as two:
        for client, protocol in ((one, "websocket"), (two, "chat")):
            upstream.script(switch)
            head = f"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n"
            await client.send(head.encode() + b"\r\n")
            await client.receive_until(b"\r\n\r\n")
        both: Samples = {("web", "websocket"): 1, ("web", "other"): 1}
        await scraped.wait_for(both, now, *labels)
        assert await scraped.samples(ever, *labels) == both
        assert await scraped.in_flight() == {("web",): 2}
        assert await scraped.requests() == {}

        # The drain of a deploy ends the one with a Close frame, and the other by force.
        async def close_when_told(client: Client) -> None:
            assert await client.receive_exactly(4) == CLOSE
            await client.send(b"\x88\x82\0\0\0\0\x03\xe9")
            client.shutdown_write()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_when_told, one)
            await command.deploy("web", *upstream.flags(), "--drain-timeout=500ms")
        await two.wait_closed()
        await command.lines.wait_requests(2)
    assert await scraped.samples(now, *labels) == {("web", "websocket"): 0, ("web", "other"): 0}
    assert await scraped.samples(ever, *labels) == both
    assert await scraped.samples("websocket_drain_closes_total", "service", "result") == {
        ("web", "clean"): 1
    }
    assert await scraped.requests() == {("web", "GET", "101"): 2}
    assert await scraped.in_flight() == {("web",): 0}
    failed = await scraped.samples("http_failures_total", "service", "reason")
    assert failed == {("web", "drained"): 2}


# Buffered bodies


async def test_what_buffered_bodies_take(scraped: Scraped, upstream: Upstream) -> None:
    await scraped.command.deploy(
        "web", *upstream.flags(), "--buffer-requests", "--buffer-memory=100000"
    )
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    memory, disk = "buffer_memory_bytes", "spill_bytes"
    async with open_client(scraped.command.port) as small, open_client(scraped.command.port) as big:
        await small.send(head % 60_000 + bytes(50_000))
        await scraped.wait_for({(): 50_000}, memory)
        assert await scraped.samples(disk) == {(): 0}
        await big.send(head % 3_000_000 + bytes(2_000_000))
        while (await scraped.samples(disk))[()] < 1_000_000:
            pass
        await small.send(bytes(10_000))
        await big.send(bytes(1_000_000))
        for client in (small, big):
            assert (await client.receive_response()).status == 200
    await scraped.wait_for({(): 0}, memory)
    await scraped.wait_for({(): 0}, disk)
    assert [len(request.body) for request in upstream.requests] == [60_000, 3_000_000]


# The port


async def test_the_port_is_said_and_serves_only_metrics(scraped: Scraped) -> None:
    line = await scraped.command.lines.wait_for_message("Metrics enabled")
    assert line["address"] == f":{scraped.metrics_port}"
    async with open_client(scraped.metrics_port) as client:
        assert (await client.get("/")).status == 404
    async with open_client(scraped.command.port) as client:
        assert (await client.get("/metrics")).status == 404


async def test_scrapes_are_no_requests(scraped: Scraped) -> None:
    await scraped.families()
    assert await scraped.requests() == {}
    assert await scraped.samples("http_open_connections") == {(): 0}
    assert scraped.command.lines.requests == []


async def test_without_a_port_there_are_none(command: Command) -> None:
    async with open_client(command.port) as client:
        assert (await client.get("/metrics")).status == 404
    assert not [line for line in command.lines.all if line["msg"] == "Metrics enabled"]
