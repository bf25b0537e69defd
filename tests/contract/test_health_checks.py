"""The contract's section "Health checks", statement by statement.

``tests/test_health.py`` and ``tests/test_deployment.py`` have the timing in depth, on a clock of
their own; here it is short and real.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import health, kp, listed, logged, restarted, scripts
from tests.contract.tables import Row, World, ask, part_of, play, row

if TYPE_CHECKING:
    from tests.contract.tables import Step

FAST = "--health-check-interval=10ms"
NOT_HEALTHY = "target failed to become healthy within configured timeout (150ms)"


def probed(name: str, **wanted: str | None) -> Step:
    """Make a step that compares the last probe of a target; ``_`` in a name stands for ``-``."""

    async def step(world: World) -> None:
        probe = world.targets[name].requests[-1]
        for key, value in ({"method": "GET", "user_agent": "kamal-proxy"} | wanted).items():
            part = f":{key}" if key in ("method", "path") else key.replace("_", "-")
            expected = None if value is None else world.fill(value)
            assert part_of(probe, part) == expected, key

    return step


def probes(name: str, count: int) -> Step:
    """Make a step that waits for that many more probes of a target."""

    async def step(world: World) -> None:
        upstream = world.targets[name]
        await upstream.wait_probes(upstream.probes + count)

    return step


async def exactly_one_probe(world: World) -> None:
    assert world.targets["a"].probes == 1


async def times_of_retries(world: World) -> None:
    """Three failures, and the fourth probe came long before the interval of an hour."""
    assert len(world.targets["a"].requests) == 4


async def defaults_are_saved(world: World) -> None:
    result = await world.execute(["deploy", "web", f"--target={world.targets['a'].target}"])
    assert result.code == 0
    (saved,) = json.loads(world.state.read_text())
    check = saved["target_options"]["health_check_config"]
    second = 10**9  # in nanoseconds, as the original saves them
    assert check == {
        "path": "/up",
        "port": 0,
        "interval": second,
        "timeout": 5 * second,
        "host": "",
    }


def answer(status: int, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n{headers}\r\n".encode()


def becomes_healthy(status: int) -> Row:
    return row(
        f"2xx is healthy: {status}",
        scripts("a", answer(status)),
        kp("deploy web --target={a} --deploy-timeout=10s"),
        listed(name="web", healthy=["{a}"]),
    )


def stays_unhealthy(status: int) -> Row:
    return row(
        f"only 2xx is: {status}",
        health("a", status),
        kp(
            "deploy web --target={a} --deploy-timeout=150ms",
            error=NOT_HEALTHY,
            details=[f"target {{a}}: status {status} at http://{{a}}/up"],
        ),
    )


ROWS = [
    row(
        "GET of /up at the target, with User-Agent kamal-proxy",
        kp("deploy web --target={a}"),
        probed("a", path="/up", host="{a}"),
    ),
    row(
        "--health-check-path",
        kp("deploy web --target={a} --health-check-path=/health/live"),
        probed("a", path="/health/live"),
        kp("deploy web --target={b} --health-check-path=no-slash"),
        probed("b", path="/no-slash"),
    ),
    row(
        "optional Host header",
        kp("deploy web --target={a} --health-check-host=app.test"),
        probed("a", host="app.test"),
    ),
    row(
        "optional port",
        # The probe of b comes to a, which is not healthy: so would b be.
        health("a", 503),
        lambda world: kp(
            f"deploy web --target={{b}} --health-check-port={world.targets['a'].port} "
            "--deploy-timeout=150ms",
            error=NOT_HEALTHY,
            details=["target {b}: status 503 at http://{a}/up"],
        )(world),
        probed("a", host="{a}"),
        health("a", 200),
        lambda world: kp(
            f"deploy web --target={{b}} --health-check-port={world.targets['a'].port}"
        )(world),
        ask(reaches="b"),
    ),
    row("unless said: /up, every 1s, to finish in 5s", defaults_are_saved),
    *map(becomes_healthy, (200, 204, 299)),
    *map(stays_unhealthy, (304, 400, 401, 404, 500, 503)),
    row(
        "redirects are followed",
        scripts("a", answer(302, "Location: /ready?x\r\n"), answer(301, "Location: next\r\n")),
        kp("deploy web --target={a}"),
        probed("a", path="/next"),
        lambda world: scripts("a", answer(307, world.fill("Location: http://{b}/there\r\n")))(
            world
        ),
        kp("deploy web --target={a}"),
        probed("b", path="/there", host="{b}"),
    ),
    row(
        "each must finish in --health-check-timeout",
        health("a", 0),
        kp(
            "deploy web --target={a} --health-check-timeout=20ms --deploy-timeout=150ms",
            error=NOT_HEALTHY,
            details=["target {a}: no answer within 20ms at http://{a}/up"],
        ),
        # Which it did, or there would have been no second one.
        logged("Healthcheck failed", url="http://{a}/up", error="no answer within 20ms"),
    ),
    row(
        "the first probe comes at once",
        kp("deploy web --target={a} --health-check-interval=1h --deploy-timeout=20s"),
        exactly_one_probe,
    ),
    row(
        "then one every --health-check-interval",
        kp(f"deploy web --target={{a}} {FAST}"),
        probes("a", 5),
    ),
    row(
        "until a target first answers, retries begin at 50 ms",
        scripts("a", *[answer(503)] * 3),
        kp("deploy web --target={a} --health-check-interval=1h --deploy-timeout=20s"),
        times_of_retries,
    ),
    row(
        "a dead single target is noticed, but stays in rotation",
        kp(f"deploy web --target={{a}} {FAST}"),
        listed(name="web", healthy=["{a}"]),
        health("a", 503),
        logged("Target health updated", target="{a}", state="unhealthy", was="healthy"),
        listed(name="web", healthy=[]),
        ask(reaches="a"),
        health("a", 200),
        logged("Target health updated", target="{a}", state="healthy", was="unhealthy"),
        listed(name="web", healthy=["{a}"]),
    ),
    row(
        "of several, an unhealthy one is taken out of rotation",
        kp(f"deploy web --target={{a}},{{b}} {FAST}"),
        health("a", 503),
        logged("Target health updated", target="{a}", state="unhealthy", was="healthy"),
        *[ask(reaches="b")] * 4,
        health("a", 200),
        health("b", 503),
        logged("Target health updated", target="{a}", state="healthy", was="unhealthy"),
        logged("Target health updated", target="{b}", state="unhealthy", was="healthy"),
        *[ask(reaches="a")] * 4,
    ),
    row(
        "restored services count as healthy at once",
        kp("deploy web --target={a},{b}"),
        health("a", 0),
        health("b", 0),
        restarted(),
        listed(name="web", healthy=["{a}", "{b}"]),
        ask(reaches="b", logs={"service": "web"}),
        ask(reaches="a"),
    ),
    row(
        "and are probed",
        kp(f"deploy web --target={{a}} {FAST}"),
        restarted(),
        probes("a", 2),
        health("a", 503),
        logged("Target health updated", target="{a}", state="unhealthy", was="healthy"),
        ask(reaches="a"),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_health_checks(shown: Row) -> None:
    await play(shown)
