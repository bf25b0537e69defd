"""The log lines that section 6 of the contract with Kamal names, one by one, in its order.

The port of HTTPS in "Server started" is 0 until there is TLS. A state that can't be read stops the
start here (``docs/state.md``), so the original's line about that is never written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.contract.steps import health, kp, logged, restarted, scripts
from tests.contract.tables import Row, World, ask, play, row
from tests.contract.test_metrics import reserved_port
from tests.running import REQUEST_FIELDS

if TYPE_CHECKING:
    from tests.contract.tables import Step

TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z")
STATE = "{directory}/kamal-proxy.state"
DEPLOYED: dict[str, Any] = {
    "service": "web",
    "targets": ["{a}", "{b}"],
    "hosts": ["web.test", "*.b.test"],
    "paths": ["/x", "/y"],
    "tls": False,
}
WEB = kp("deploy web --target={a}")
FULL = kp("deploy web --target={a},{b} --host=web.test,*.b.test --path-prefix=/x,/y")


def wrote(message: str, *, level: str = "INFO", **fields: Any) -> Step:
    """Make a step that waits for a line that holds exactly these fields, in this order."""

    async def step(world: World) -> None:
        filled = {key: fill(world, value) for key, value in fields.items()}
        line = await world.proxy.lines.wait_for(lambda line: line["msg"] == message)
        assert list(line) == ["time", "level", "msg", *filled]
        assert TIME.fullmatch(line["time"])
        assert line["level"] == level
        assert {key: line[key] for key in filled} == filled

    return step


def fill(world: World, value: Any) -> Any:
    if isinstance(value, list):
        return [fill(world, one) for one in value]
    return world.fill(value) if isinstance(value, str) else value


async def started(world: World) -> None:
    await wrote("Server started", http=world.proxy.port, https=0)(world)


async def metrics_enabled(world: World) -> None:
    await wrote("Metrics enabled", address=f":{world.options['metrics_port']}")(world)


async def stopped(world: World) -> None:
    lines = world.proxy.lines
    await world.stop()
    assert lines.all[-1]["msg"] == "Server stopped"
    assert list(lines.all[-1]) == ["time", "level", "msg"]
    await world.start()


async def request_line(world: World) -> None:
    (line,) = await world.proxy.lines.wait_requests(1)
    asked = ["req_cache_control", "req_x_one", "resp_x_two"]
    assert list(line) == ["time", "level", "msg", *REQUEST_FIELDS, *asked]
    assert TIME.fullmatch(line["time"])
    assert line["port"] == world.proxy.port
    assert 0 < line["duration"] < 60e9


ROWS = [
    row(
        "No previous state to restore {path}",
        wrote("No previous state to restore", path=STATE),
    ),
    row("Restored saved state {path}", WEB, restarted(), wrote("Restored saved state", path=STATE)),
    row("Server started {http, https}", started),
    row("Server stopped", stopped),
    row(
        "Deploying, Deployed {service, targets, hosts, paths, tls}",
        FULL,
        wrote("Deploying", **DEPLOYED),
        wrote("Deployed", **DEPLOYED),
    ),
    row(
        "Target health updated {target, state, was}",
        kp("deploy web --target={a} --health-check-interval=10ms"),
        wrote("Target health updated", target="{a}", state="healthy", was="adding"),
        health("a", 503),
        logged("Target health updated", target="{a}", state="unhealthy", was="healthy"),
    ),
    row(
        "Healthcheck failed {url, error}",
        scripts("a", b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"),
        WEB,
        wrote("Healthcheck failed", url="http://{a}/up", error="status 503"),
    ),
    row("Service stopped {service}", WEB, kp("stop web"), wrote("Service stopped", service="web")),
    row("Service paused {service}", WEB, kp("pause web"), wrote("Service paused", service="web")),
    row(
        "Service resumed {service}",
        WEB,
        kp("pause web"),
        kp("resume web"),
        wrote("Service resumed", service="web"),
    ),
    row("Service drained {service}", WEB, kp("stop web"), wrote("Service drained", service="web")),
    row(
        "Set rollout split",
        WEB,
        kp("rollout deploy web --target={b}"),
        wrote("Deploying for rollout", service="web", targets=["{b}"]),
        wrote("Deployed for rollout", service="web", targets=["{b}"]),
        kp("rollout set web --percent=20 --list=alice,bob"),
        wrote("Set rollout split", service="web", percentage=20, allowlist=["alice", "bob"]),
    ),
    row(
        "Stopped rollout",
        WEB,
        kp("rollout deploy web --target={b}"),
        kp("rollout set web --percent=20"),
        kp("rollout stop web"),
        wrote("Stopped rollout", service="web"),
    ),
    row("Metrics enabled {address}", metrics_enabled),
    row(
        "Request {host ... query}, then req_ and resp_ headers",
        kp(
            "deploy web --target={a} --log-request-header=Cache-Control,X-One "
            "--log-response-header=X-Two"
        ),
        scripts(
            "a",
            b"HTTP/1.1 201 X\r\nContent-Type: text/x\r\nX-Two: 3\r\nContent-Length: 2\r\n\r\nhi",
        ),
        ask(
            "/a%20b?q=%20&r",
            host="Web.test:81",
            method="POST",
            body=b"body",
            headers=[
                "X-One: 1",
                "X-One: 2",
                "Content-Type: text/y",
                "User-Agent: me",
                "X-Request-ID: id",
                "X-Forwarded-For: 192.0.2.1",
            ],
            status=201,
            logs={
                "level": "INFO",
                "host": "Web.test:81",
                "path": "/a b",
                "request_id": "id",
                "service": "web",
                "target": "{a}",
                "method": "POST",
                "req_content_length": 4,
                "req_content_type": "text/y",
                "resp_content_length": 2,
                "resp_content_type": "text/x",
                "client_addr": "127.0.0.1",
                "client_port": str,
                "remote_addr": "192.0.2.1",
                "user_agent": "me",
                "proto": "HTTP/1.1",
                "scheme": "http",
                "query": "q=%20&r",
                "req_cache_control": "",
                "req_x_one": "1,2",
                "resp_x_two": "3",
            },
        ),
        request_line,
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_log(shown: Row) -> None:
    with reserved_port() as port:
        metrics = {"metrics_port": port} if metrics_enabled in shown.steps else {}
        await play(attrs.evolve(shown, run=metrics))
