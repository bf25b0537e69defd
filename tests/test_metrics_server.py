"""Metrics over HTTP: what scrapers get, and what all others get, on real sockets."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kamal_proxy.http.endpoint import MAX_HEAD
from kamal_proxy.listeners import Clients, listen_tcp, serve
from kamal_proxy.logs import Log
from kamal_proxy.metrics import Metrics
from kamal_proxy.metrics_server import (
    IDLE_TIMEOUT,
    MAX_BODY,
    REQUEST_TIMEOUT,
    MetricsServer,
)
from tests.fuzzing import at_least
from tests.pairs import running_poller, stream_pair
from tests.scripted import Client, ConnectionCut, open_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

HOST = b"Host: proxy.test\r\n"
SCRAPE = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"


def counted() -> Metrics:
    metrics = Metrics()
    metrics.request("web", b"GET", 200, 0.3)
    return metrics


class Served(Client):
    """A client of a metrics server, and what the server logged."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        super().__init__(sock)
        self.lines: list[str] = []
        self.ended = trio.Event()  # the server is done with the connection


@asynccontextmanager
async def open_served(metrics: Metrics) -> AsyncIterator[Served]:
    """Serve one connection; what it logs must be looked at, so that nothing goes unnoticed."""
    async with running_poller() as poller, trio.open_nursery() as nursery:
        with stream_pair(poller) as (stream, far):
            client = Served(trio.socket.from_stdlib_socket(far))
            server = MetricsServer(metrics, Log(client.lines.append))

            async def listen() -> None:
                await server.handle(stream, ("", 0))
                stream.close()
                client.ended.set()

            nursery.start_soon(listen)
            yield client
            nursery.cancel_scope.cancel()
    assert client.lines == []


@pytest.fixture
async def client() -> AsyncIterator[Served]:
    async with open_served(counted()) as client:
        yield client


# --- what scrapers get ---------------------------------------------------------------------------


async def test_a_scrape_on_a_port() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        async with running_poller() as poller, trio.open_nursery() as nursery:
            lines: list[str] = []
            server = MetricsServer(counted(), Log(lines.append))

            async def listen() -> None:
                await serve(
                    listener,
                    poller,
                    server.handle,
                    clients=Clients(nursery, trio.Semaphore(10)),
                    on_error=lambda error: None,
                )

            nursery.start_soon(listen)
            async with open_client(listener.getsockname()[1]) as client:
                response = await client.get("/metrics")
            nursery.cancel_scope.cancel()

    assert response.status == 200
    assert response.get(b"content-type") == [b"text/plain; version=0.0.4; charset=utf-8"]
    parsed = text_string_to_metric_families(response.body.decode())
    names = {family.name for family in parsed}
    assert {"kamal_proxy_http_requests", "process_open_fds", "python_info"} <= names
    assert lines == []


@pytest.mark.parametrize(
    "headers",
    [
        "Accept: application/openmetrics-text; version=1.0.0\r\n",
        "accept: text/html\r\nACCEPT: application/openmetrics-text;version=1.0.0;q=0.5\r\n",
    ],
)
async def test_openmetrics_for_who_accepts_it(client: Served, headers: str) -> None:
    response = await client.get("/metrics", headers=headers)

    assert response.status == 200
    (content_type,) = response.get(b"content-type")
    assert content_type.startswith(b"application/openmetrics-text; version=1.0.0")
    parse = openmetrics.text_string_to_metric_families
    parsed = parse(response.body.decode())  # type: ignore[no-untyped-call]  # the library's
    assert "kamal_proxy_http_requests" in {family.name for family in parsed}


async def test_the_query_does_not_matter(client: Served) -> None:
    assert (await client.get("/metrics?name[]=up")).status == 200


async def test_head_tells_the_same_without_the_body(client: Served) -> None:
    got = await client.request(SCRAPE)
    head = await client.request(SCRAPE.replace(b"GET", b"HEAD"))
    again = await client.request(SCRAPE)

    assert (head.status, head.body) == (200, b"")
    assert head.get(b"content-type") == got.get(b"content-type")
    assert len(head.get(b"content-length")) == 1
    assert (again.status, again.get(b"content-length")) == (200, [b"%d" % len(again.body)])


async def test_a_connection_is_kept(client: Served) -> None:
    for _ in range(3):
        response = await client.request(SCRAPE)
        assert (response.status, response.get(b"connection")) == (200, [])


async def test_requests_in_a_row_are_answered_in_order(client: Served) -> None:
    await client.send(SCRAPE + SCRAPE.replace(b"/metrics", b"/") + SCRAPE)

    answers = [await client.receive_response() for _ in range(3)]

    assert [answer.status for answer in answers] == [200, 404, 200]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /metrics HTTP/1.0\r\n\r\n",
        SCRAPE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    ],
)
async def test_a_connection_ends_when_the_client_wants_it(client: Served, request_: bytes) -> None:
    response = await client.request(request_)
    await client.wait_closed()

    assert response.status == 200
    assert b"kamal_proxy_http_requests_total" in response.body


async def test_a_scrape_of_many_series_lets_others_have_their_turn() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.request(f"service-{number}", b"GET", 200, 0.3)
    _, parts = metrics.render_parts("")
    count = len(list(parts))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with open_served(metrics) as client, trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        response = await client.request(SCRAPE)
        nursery.cancel_scope.cancel()

    assert response.body.count(b"kamal_proxy_http_requests_total{") == 1000
    assert turns >= count > 100


# --- other requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metrics2", "/METRICS", "/%6detrics", "/x?/metrics"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_other_paths_name_the_right_one(client: Served, path: str, method: str) -> None:
    response = await client.request(f"{method} {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n")

    assert response.status == 404
    assert response.body == b"Nothing is here; the metrics are at /metrics\n"
    assert response.get(b"content-type") == [b"text/plain; charset=utf-8"]
    assert (await client.request(SCRAPE)).status == 200


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"BREW", b"get"])
async def test_other_methods(client: Served, method: bytes) -> None:
    response = await client.request(SCRAPE.replace(b"GET", method))

    assert (response.status, response.get(b"allow")) == (405, [b"GET, HEAD"])
    assert (await client.request(SCRAPE)).status == 200


async def test_connect(client: Served) -> None:
    response = await client.request(b"CONNECT proxy.test:80 HTTP/1.1\r\n" + HOST + b"\r\n")

    assert response.status == 404


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: %d\r\n\r\n" % MAX_BODY + b"x" * MAX_BODY,
        b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n3\r\nyyy\r\n0\r\nA: b\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_a_small_body_is_skipped(client: Served, rest: bytes) -> None:
    response = await client.request(b"GET /metrics HTTP/1.1\r\n" + HOST + rest)

    assert response.status == 200
    assert (await client.request(SCRAPE)).status == 200


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BODY + 1) + b"x" * (MAX_BODY + 1),
    ],
    ids=["announced", "sent"],
)
async def test_too_large_a_body(client: Served, rest: bytes) -> None:
    response = await client.request(b"POST /metrics HTTP/1.1\r\n" + HOST + rest)
    client.shutdown_write()
    await client.ended.wait()

    assert (response.status, response.get(b"connection")) == (413, [b"close"])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00\xff\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nz\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + HOST + b"X: " + b"x" * MAX_HEAD, 431),
        (b"x" * (MAX_HEAD + 1), 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
async def test_what_is_not_http(client: Served, sent: bytes, status: int) -> None:
    await client.send(sent)
    response = await client.receive_response()
    client.shutdown_write()
    await client.ended.wait()

    assert (response.status, response.get(b"connection")) == (status, [b"close"])


async def test_who_sends_more_than_is_of_interest_is_not_reset(client: Served) -> None:
    await client.send(b"hello\r\n\r\n" + b"x" * 100_000)
    client.shutdown_write()
    await client.ended.wait()

    assert (await client.receive_eof()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.fuzz
@at_least(100)
@given(
    st.lists(
        st.binary()
        | st.sampled_from(
            [
                SCRAPE,
                b"GET /metrics HTTP/1.1\r\n",
                b"HEAD /metrics HTTP/1.0\r\n",
                HOST,
                b"Accept: application/openmetrics-text;version=1\r\n",
                b"Accept: \xff;version=\xff\r\n",
                b"Content-Length: 3\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"Expect: 100-continue\r\n",
                b"\r\n",
                b"3\r\nabc\r\n0\r\n\r\n",
            ]
        )
    )
)
def test_any_bytes_are_survived(sent: list[bytes]) -> None:
    async def main() -> None:
        async with open_served(counted()) as client:
            with trio.fail_after(10):
                for data in sent:
                    try:
                        await client.send(data)
                    except OSError:
                        break  # it has heard enough
                else:
                    client.shutdown_write()
                answer = await client.receive_eof()
                await client.ended.wait()
            assert not answer or answer.startswith(b"HTTP/1.1 ")

    trio.run(main)


# --- clients that take their time ----------------------------------------------------------------


async def test_a_client_that_says_nothing(client: Served, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    await client.ended.wait()

    assert trio.current_time() == pytest.approx(began + REQUEST_TIMEOUT)


async def test_an_idle_connection_is_kept_for_a_while(
    client: Served, autojump_clock: MockClock
) -> None:
    for _ in range(3):
        assert (await client.request(SCRAPE)).status == 200
        await trio.sleep(IDLE_TIMEOUT - 1)
    await client.request(SCRAPE)
    began = trio.current_time()
    await client.ended.wait()

    assert trio.current_time() == pytest.approx(began + IDLE_TIMEOUT)


@pytest.mark.parametrize("before", [b"", SCRAPE], ids=["first", "later"])
@pytest.mark.parametrize(
    "begin",
    [b"GET /metrics HTTP/1.1\r\nX: ", SCRAPE[:-2] + b"Content-Length: 999\r\n\r\n"],
    ids=["head", "body"],
)
async def test_a_request_must_arrive_in_time(
    client: Served, autojump_clock: MockClock, before: bytes, begin: bytes
) -> None:
    if before:
        await client.request(before)
    await client.send(begin)
    began = trio.current_time()

    async with trio.open_nursery() as nursery:

        async def drip() -> None:
            while True:
                await trio.sleep(0.3 * REQUEST_TIMEOUT)
                await client.send(b" ")

        nursery.start_soon(drip)
        await client.ended.wait()
        nursery.cancel_scope.cancel()

    assert trio.current_time() == pytest.approx(began + REQUEST_TIMEOUT)


async def test_a_client_that_never_reads_is_given_up(autojump_clock: MockClock) -> None:
    metrics = Metrics()
    for number in range(1000):  # more than a socket takes
        metrics.request(f"service-{number}", b"GET", 200, 0.3)
    async with open_served(metrics) as client:
        await client.send(SCRAPE)
        began = trio.current_time()
        await client.ended.wait()

        assert trio.current_time() == pytest.approx(began + REQUEST_TIMEOUT)
        with pytest.raises(ConnectionCut):
            await client.receive_response()


@pytest.mark.parametrize("sent", [b"", SCRAPE[:9], SCRAPE[:-2] + b"Content-Length: 5\r\n\r\nx"])
async def test_a_client_that_leaves(client: Served, sent: bytes) -> None:
    await client.send(sent)
    client.close()

    await client.ended.wait()


async def test_an_answer_is_not_lost_by_what_comes_after_it(client: Served) -> None:
    """Unread bytes would reset the connection, and the reset may overtake the answer."""
    await client.send(b"GET /metrics HTTP/1.0\r\n\r\n")
    answer = await client.receive_until(b"\r\n\r\n")
    await client.send(SCRAPE * 10)
    client.shutdown_write()

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"kamal_proxy_" in await client.receive_eof()


# --- bugs ----------------------------------------------------------------------------------------


async def test_a_gauge_that_fails_costs_one_scrape() -> None:
    metrics = counted()
    values = iter([1.0])
    metrics.gauge("kamal_proxy_broken", "Has one value.", lambda: next(values))
    async with open_served(metrics) as client:
        assert (await client.request(SCRAPE)).status == 200
        with pytest.raises(ConnectionCut):
            await client.request(SCRAPE)
        (line,) = client.lines
        client.lines.clear()

    logged = json.loads(line)
    assert (logged["level"], logged["msg"]) == ("ERROR", "Metrics request failed")
    assert "StopIteration" in logged["error"]
