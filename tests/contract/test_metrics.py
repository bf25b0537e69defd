"""The contract's section "Metrics", statement by statement.

``tests/e2e/test_metrics.py`` has these and the further metrics in depth.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.steps import answered, begin, finish, holds, kp, release
from tests.contract.tables import Row, World, ask, play, row
from tests.scripted import LOCALHOST, open_client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.contract.tables import Step

REQUESTS = "kamal_proxy_http_requests_total"
DURATION = "kamal_proxy_http_request_duration_seconds"
IN_FLIGHT = "kamal_proxy_http_in_flight_requests"
BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, float("inf")]  # seconds
LABELS = {
    REQUESTS: {"service", "method", "status"},
    f"{DURATION}_count": {"service", "method", "status"},
    IN_FLIGHT: {"service"},
}
WEB = kp("deploy web --target={a} --host=web.test")


@contextmanager
def reserved_port() -> Iterator[int]:
    """Keep a port from everybody but who listens on it: 0 means no metrics."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOCALHOST, 0))
        yield sock.getsockname()[1]


async def scrape(world: World) -> dict[str, list[tuple[dict[str, str], float]]]:
    async with open_client(world.options["metrics_port"]) as client:
        response = await client.get("/metrics")
    assert response.status == 200
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(response.body.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def counted(name: str, **wanted: float) -> Step:
    """Make a step that compares all values of a metric; labels are joined with ``_``."""

    async def step(world: World) -> None:
        found = (await scrape(world)).get(name, [])
        assert all(labels.keys() == LABELS[name] for labels, _ in found)
        order = [label for label in ("service", "method", "status") if label in LABELS[name]]
        values = {"_".join(labels[label] for label in order): value for labels, value in found}
        assert {key: value for key, value in values.items() if value} == wanted

    return step


async def has_default_buckets(world: World) -> None:
    buckets = (await scrape(world))[f"{DURATION}_bucket"]
    assert [float(labels["le"]) for labels, _ in buckets] == BUCKETS
    ((_, seconds),) = (await scrape(world))[f"{DURATION}_sum"]
    assert seconds > 0


async def not_on_the_http_port(world: World) -> None:
    async with open_client(world.proxy.port) as client:
        assert (await client.get("/metrics", host="nobody.test")).status == 404


ROWS = [
    row(
        "served on --metrics-port at /metrics, not to clients",
        counted(REQUESTS),
        not_on_the_http_port,
    ),
    row(
        "requests by service, method and status",
        WEB,
        ask(),
        ask("/x"),
        ask(method="POST"),
        answered(404, host="nobody.test", reason="no_service"),
        kp("stop web"),
        answered(503, reason="stopped"),
        counted(REQUESTS, web_GET_200=2, web_POST_200=1, _GET_404=1, web_GET_503=1),
    ),
    row(
        "their durations, with the default buckets",
        WEB,
        ask(),
        ask(),
        counted(f"{DURATION}_count", web_GET_200=2),
        has_default_buckets,
    ),
    row(
        "those in flight",
        WEB,
        holds("a"),
        begin("one", ask()),
        counted(IN_FLIGHT, web=1),
        release("a"),
        finish("one"),
        counted(IN_FLIGHT),
    ),
    row(
        "unknown methods count as OTHER",
        WEB,
        *(ask(method=method) for method in ("BREW", "PROPFIND", "get")),
        *(ask(method=method) for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")),
        counted(
            REQUESTS,
            web_OTHER_200=3,
            **{
                f"web_{method}_200": 1
                for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")
            },
        ),
    ),
    row(
        "--exclude-metrics-path leaves a path out of all three; it is still logged",
        kp("deploy web --target={a} --exclude-metrics-path=/ping,/live"),
        holds("a"),
        begin("one", ask("/ping?x", logs={"path": "/ping", "service": "web"})),
        counted(IN_FLIGHT),
        release("a"),
        finish("one"),
        ask("/live", logs={"path": "/live"}),
        counted(REQUESTS),
        counted(f"{DURATION}_count"),
    ),
    row(
        "exactly that path",
        kp("deploy web --target={a} --exclude-metrics-path=/ping"),
        ask("/ping/"),
        ask("/ping/x"),
        ask("/pin"),
        counted(REQUESTS, web_GET_200=3),
    ),
    row(
        "as the target sees it",
        kp("deploy web --target={a} --path-prefix=/app --exclude-metrics-path=/ping"),
        ask("/app/ping", sees={":path": "/ping"}),
        counted(REQUESTS),
        kp(
            "deploy web --target={a} --path-prefix=/app --strip-path-prefix=false "
            "--exclude-metrics-path=/ping"
        ),
        ask("/app/ping", sees={":path": "/app/ping"}),
        counted(REQUESTS, web_GET_200=1),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_metrics(shown: Row) -> None:
    with reserved_port() as port:
        await play(row(shown.statement, *shown.steps, metrics_port=port))
