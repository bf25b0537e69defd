"""The contract's section "Balancing", statement by statement.

Not covered: UDP affinity. ``tests/http/test_choosing.py`` and ``tests/test_rollout.py`` have the
cookies in depth.
"""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import answered, health, kp, logged, scripts
from tests.contract.tables import Row, World, ask, play, row
from tests.reference.fnv import fnv1a_32
from tests.scripted import Peer, ok

if TYPE_CHECKING:
    from tests.contract.tables import Step

FAST = "--health-check-interval=10ms"
READERS = "deploy web --target={a} --read-target={b},{c}"
COOKIE = re.compile(r"kamal-writer=([0-9]+); Path=/; Expires=([^;]+ GMT); HttpOnly")
WEBSOCKET = ("Connection: Upgrade", "Upgrade: websocket")
LATER, BEFORE = 4102444800000, 946684800000  # unix milliseconds, in 2100 and 2000

# Values of the cookie and the share of all values that hash no higher than they.
SHARES = {value: fnv1a_32(value.encode()) / 0xFFFFFFFF * 100 for value in ["alice", "bob", "carol"]}


def turns(count: int, *names: str, method: str = "GET") -> Step:
    """Make a step that sends requests, each of these targets must get equally many, in turn."""

    async def step(world: World) -> None:
        order = []
        for _ in range(count):
            client = await world.connect()
            response = await client.request(
                f"{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode()
            )
            order.append(response.body.decode())
        assert set(order) == set(names)
        assert all(order[at] == order[at % len(names)] for at in range(count))

    return step


def cookie_lasts(seconds: int) -> Step:
    """Make a step that compares the cookie's expiry, and its date, with a time from now."""

    async def step(world: World) -> None:
        client = await world.connect()
        before = time.time()
        response = await client.request(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        after = time.time()
        (cookie,) = response.get(b"set-cookie")
        match = COOKIE.fullmatch(cookie.decode())
        assert match is not None
        expiry, date = match.groups()
        assert before + seconds - 0.001 <= int(expiry) / 1000 <= after + seconds
        assert parsedate_to_datetime(date).timestamp() == int(expiry) // 1000 + 1

    return step


def rollout_row(statement: str, split: str, **reached: str) -> Row:
    return row(
        statement,
        kp("deploy web --target={a}"),
        kp("rollout deploy web --target={b}"),
        kp(f"rollout set web {split}"),
        *(
            ask(headers=[f"Cookie: x=y; kamal-rollout={value}"], reaches=name)
            for value, name in reached.items()
        ),
        ask(reaches="a"),
        ask(headers=["Cookie: kamal-rollout="], reaches="a"),
    )


def stays_open(name: str) -> Step:
    """Make a step that lets a target answer one request and close when the next one has come."""

    async def step(world: World) -> None:
        upstream = world.targets[name]

        async def serve(peer: Peer) -> None:
            for _ in range(2):
                received = await peer.receive_request()
                assert received is not None
                upstream.record(received)
                if len(upstream.requests) > 2:
                    break
                await peer.send(ok(b"first"))

        upstream.script(serve)

    return step


ROWS = [
    row(
        "round robin over healthy targets",
        kp("deploy web --target={a},{b},{c}"),
        turns(6, "a", "b", "c"),
        turns(6, "a", "b", "c", method="POST"),
    ),
    row(
        "unhealthy ones are left out",
        kp(f"deploy web --target={{a}},{{b}},{{c}} {FAST}"),
        health("b", 503),
        logged("Target health updated", target="{b}", state="unhealthy"),
        turns(4, "a", "c"),
    ),
    row(
        "no healthy target: 503 page",
        kp(f"deploy web --target={{a}},{{b}} {FAST}"),
        health("a", 503),
        health("b", 503),
        logged("Target health updated", target="{a}", state="unhealthy"),
        logged("Target health updated", target="{b}", state="unhealthy"),
        answered(
            503,
            gets={"content-type": "text/html; charset=utf-8"},
            reason="no_healthy_target",
            logs={"service": "web"},
        ),
    ),
    row(
        "GET and HEAD go to readers in round robin",
        kp(READERS),
        turns(4, "b", "c"),
        ask(method="HEAD", reaches="c", gets={"set-cookie": None}),
        ask(method="HEAD", reaches="b"),
    ),
    row(
        "when there are any",
        kp("deploy web --target={a}"),
        ask(),
        ask(method="POST", gets={"set-cookie": None}),
        kp(f"{READERS} {FAST}"),
        health("b", 503),
        health("c", 503),
        logged("Target health updated", target="{b}", state="unhealthy"),
        logged("Target health updated", target="{c}", state="unhealthy"),
        ask(reaches="a", gets={"set-cookie": None}),
    ),
    row(
        "WebSockets only with --read-target-websockets",
        kp(READERS),
        ask(headers=WEBSOCKET, reaches="a"),
        kp(f"{READERS} --read-target-websockets"),
        ask(headers=WEBSOCKET, reaches="c"),
        ask(headers=WEBSOCKET, reaches="b"),
    ),
    row(
        "unless the client holds an unexpired kamal-writer cookie",
        kp(READERS),
        ask(headers=[f"Cookie: x=y; kamal-writer={LATER}"], reaches="a", gets={"set-cookie": None}),
        ask(headers=[f"Cookie: x=y; kamal-writer={BEFORE}"], reaches="c"),
        ask(headers=["Cookie: kamal-writer=nonsense"], reaches="b"),
    ),
    row(
        "any other request goes to a writer and its response sets the cookie",
        kp(READERS),
        *(
            ask(method=method, gets={"set-cookie": COOKIE})
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND")
        ),
    ),
    row(
        "for --writer-affinity-timeout, Expires a second later",
        kp(f"{READERS} --writer-affinity-timeout=1m"),
        cookie_lasts(60),
    ),
    row(
        "which is 1s unless said",
        kp(READERS),
        cookie_lasts(1),
    ),
    row(
        "0 = never",
        kp(f"{READERS} --writer-affinity-timeout=0"),
        ask(method="POST", gets={"set-cookie": None}),
    ),
    row(
        "not if the response carries X-Writer-Affinity: false, which is removed",
        kp(READERS),
        scripts("a", b"HTTP/1.1 200 OK\r\nX-Writer-Affinity: false\r\nContent-Length: 0\r\n\r\n"),
        ask(method="POST", gets={"set-cookie": None, "x-writer-affinity": None}),
    ),
    rollout_row("rollout: the allow list", "--list=alice,bob", alice="b", bob="b", carol="a"),
    rollout_row("rollout: 0 percent", "--percent=0", alice="a", bob="a", carol="a"),
    rollout_row("rollout: 100 percent", "--percent=100", alice="b", bob="b", carol="b"),
    *(
        rollout_row(
            f"rollout: FNV-1a-32 at {percent} percent",
            f"--percent={percent}",
            **{value: "b" if share <= percent else "a" for value, share in SHARES.items()},
        )
        for percent in sorted({int(share) + more for share in SHARES.values() for more in (0, 1)})
    ),
    row(
        "a connect failure moves to a healthy sibling",
        kp("deploy web --target={a},{refused} --force"),
        ask(reaches="a", logs={"target": "{a}"}),
        ask(reaches="a", logs={"target": "{a}"}, method="POST", body=b"body"),
    ),
    row(
        "or ends with 502 when there is none",
        kp("deploy web --target={refused} --force"),
        answered(502, target="{refused}", reason="target_refused"),
    ),
    row(
        "a dead pooled connection moves to another connection",
        kp("deploy web --target={a}"),
        scripts("a", ok(b"first")),  # and then it closes
        ask(),
        ask(method="POST", body=b"once", sees={":body": b"once"}),
    ),
    row(
        "a request without body and of an idempotent method may be retried once after that",
        kp("deploy web --target={a}"),
        stays_open("a"),
        ask(),
        ask(reaches="aa"),
    ),
    row(
        "no other is",
        kp("deploy web --target={a}"),
        stays_open("a"),
        ask(),
        answered(502, reaches="a", target="{a}", reason="target_failed", method="POST"),
    ),
    row(
        "and not when the connection was new",
        kp("deploy web --target={a}"),
        scripts("a", b""),
        answered(502, reaches="a", target="{a}", reason="target_failed"),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_balancing(shown: Row) -> None:
    await play(shown)
