"""The contract's section "Deploy", statement by statement.

Not covered: UDP flows and HTTP/2 streams in a drain, which come with them. Drains and WebSockets
are tested in depth in ``tests/test_deployment.py`` and ``tests/http/test_upgrades.py``.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.contract.steps import (
    answered,
    begin,
    finish,
    finished,
    health,
    holds,
    kp,
    listed,
    logged,
    meanwhile,
    release,
    scripts,
    table,
    unfinished,
)
from tests.contract.tables import Row, World, ask, play, row
from tests.running import command_line, environment
from tests.websockets import GOING_AWAY, UPGRADE, accept

if TYPE_CHECKING:
    from tests.contract.tables import Step
    from tests.running import Command
    from tests.scripted import Peer, Script, Upstream

NOT_HEALTHY = "target failed to become healthy within configured timeout (300ms)"
MOVED = b"HTTP/1.1 301 X\r\nLocation: https://a.test/up\r\nContent-Length: 0\r\n\r\n"
PARTIAL = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"


def switched_to(name: str) -> Step:
    """Make a step that waits until new requests go to a target."""

    async def step(world: World) -> None:
        while world.fill(name) not in world.proxy.proxy.services()[0].targets:
            await trio.lowlevel.checkpoint()

    return step


async def saved_targets_are_b(world: World) -> None:
    (service,) = json.loads(world.state.read_text())
    assert service["active_targets"] == [world.targets["b"].target]


async def note_state(world: World) -> None:
    world.notes["state"] = world.state.read_bytes()


async def state_is_as_noted(world: World) -> None:
    assert world.state.read_bytes() == world.notes["state"]


async def only_b_is_probed(world: World) -> None:
    probed = world.targets["a"].probes
    await world.targets["b"].wait_probes(world.targets["b"].probes + 5)
    assert world.targets["a"].probes == probed


async def all_were_healthy_first(world: World) -> None:
    messages = [line["msg"] for line in world.proxy.lines.all]
    assert messages.count("Target health updated") == 2
    assert messages[-1] == "Deployed"


async def one_connection_is_rerouted(world: World) -> None:
    """Requests of a client that stays connected follow a deploy."""
    client = await world.connect()
    assert (await client.get()).body == b"a"
    await kp("deploy web --target={b}")(world)
    assert (await client.get()).body == b"b"


async def open_websocket(world: World) -> None:
    world.targets["a"].script(_switch(accept(), b""))
    client = world.notes["client"] = await world.connect()
    await client.send(UPGRADE)
    await client.receive_until(b"\r\n\r\n")


async def open_other_upgrade(world: World) -> None:
    head = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"
    world.targets["a"].script(_switch(head, b"still here"))
    client = world.notes["client"] = await world.connect()
    await client.send(
        b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"
    )
    await client.receive_until(b"\r\n\r\n")


def _switch(head: bytes, answer: bytes) -> Script:
    async def serve(peer: Peer) -> None:
        await peer.receive_request()
        await peer.send(head)
        while await peer.receive_some():
            await peer.send(answer)

    return serve


async def client_is_told_to_go(world: World) -> None:
    client = world.notes["client"]
    assert await client.receive_exactly(4) == GOING_AWAY
    await client.send(b"\x88\x80\0\0\0\0")
    assert await client.receive_eof() == b""


async def tunnel_still_works(world: World) -> None:
    client = world.notes["client"]
    await client.send(b"?")
    assert await client.receive_until(b"here") == b"still here"


async def client_is_cut(world: World) -> None:
    await world.notes["client"].wait_closed()


ROWS = [
    row(
        "deploy probes every target and waits until all are healthy",
        health("b", 503),
        meanwhile("deploy", kp("deploy web --target={a},{b}")),
        logged("Target health updated", target="{a}", state="healthy", was="adding"),
        logged("Healthcheck failed", url="http://{b}/up"),
        unfinished("deploy"),
        answered(404, reason="no_service"),
        health("b", 200),
        finished("deploy"),
        all_were_healthy_first,
        listed(name="web", targets=["{a}", "{b}"], healthy=["{a}", "{b}"]),
    ),
    row(
        "or --deploy-timeout passes: the old pool keeps serving, nothing changes, it fails",
        kp("deploy web --target={a} --host=web.test"),
        note_state,
        kp("deploy web --target={b},{refused} --deploy-timeout=300ms", error=NOT_HEALTHY),
        state_is_as_noted,
        table("web web.test / {a} running no"),
        ask("/"),
        answered(404, host="other.test", reason="no_service"),
    ),
    row(
        "it installs the pool in one step: requests wait for nothing and go to the new one",
        kp("deploy web --target={a}"),
        one_connection_is_rerouted,
        ask(reaches="b"),
    ),
    row(
        "saves the state",
        kp("deploy web --target={a}"),
        kp("deploy web --target={b}"),
        saved_targets_are_b,
    ),
    row(
        "stops the old pool's probes",
        kp("deploy web --target={a} --health-check-interval=5ms"),
        kp("deploy web --target={b} --health-check-interval=5ms"),
        only_b_is_probed,
    ),
    row(
        "drains the old pool, then returns",
        kp("deploy web --target={a}"),
        holds("a"),
        begin("old", ask()),
        meanwhile("deploy", kp("deploy web --target={b}")),
        logged("Target health updated", target="{b}"),
        switched_to("{b}"),
        ask(reaches="b"),
        unfinished("deploy"),
        release("a"),
        finish("old"),
        finished("deploy"),
    ),
    row(
        "--force skips the wait",
        kp("deploy web --target={a}"),
        health("b", 503),
        kp("deploy web --target={b} --force"),
        ask(reaches="b"),
    ),
    row(
        "options are not sticky",
        kp("deploy web --target={a} --host=web.test --path-prefix=/x --log-request-header=X-One"),
        ask("/x", sees={":path": "/"}, logs={"req_x_one": ""}),
        kp("deploy web --target={a}"),
        table("web * / {a} running no"),
        ask("/x", host="any.test", sees={":path": "/x"}, logs={"req_x_one": None}),
    ),
    row(
        "redeploying while stopped keeps that state",
        kp("deploy web --target={a}"),
        kp("stop web --message=later"),
        kp("deploy web --target={b}"),
        listed(name="web", state="stopped", stop_message="later", targets=["{b}"]),
        answered(503, reason="stopped"),
    ),
    row(
        "redeploying while paused keeps that state",
        kp("deploy web --target={a}"),
        kp("pause web"),
        begin("waiting", ask(reaches="b"), waits=True),
        kp("deploy web --target={b}"),
        listed(name="web", state="paused", targets=["{b}"]),
        unfinished("waiting"),
        kp("resume web"),
        finish("waiting"),
    ),
    row(
        "drain: requests in flight run on until done",
        kp("deploy web --target={a}"),
        holds("a", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\non", b"ly"),
        begin("old", ask(gets={":body": b"only"})),
        meanwhile("deploy", kp("deploy web --target={b}")),
        switched_to("{b}"),
        release("a"),
        finish("old"),
        finished("deploy"),
    ),
    row(
        "or --drain-timeout: 504 if no response byte was sent",
        kp("deploy web --target={a}"),
        holds("a"),
        begin("old", answered(504, reaches="a", target="{a}", reason="drained")),
        kp("deploy web --target={b} --drain-timeout=50ms"),
        finish("old"),
        logged("Request cancelled due to draining", target="{a}", path="/"),
        ask(reaches="b"),
    ),
    row(
        "a cut connection if one was",
        kp("deploy web --target={a}"),
        holds("a", PARTIAL),
        begin("old", ask(cut=b"part", logs={"reason": "drained"})),
        kp("deploy web --target={b} --drain-timeout=50ms"),
        finish("old"),
    ),
    row(
        "WebSockets get a Close frame 1001 within the drain window",
        kp("deploy web --target={a}"),
        open_websocket,
        meanwhile("deploy", kp("deploy web --target={b} --drain-timeout=500ms")),
        client_is_told_to_go,
        finished("deploy"),
    ),
    row(
        "any other upgraded connection lives until the drain deadline",
        kp("deploy web --target={a}"),
        open_other_upgrade,
        meanwhile("deploy", kp("deploy web --target={b} --drain-timeout=500ms")),
        switched_to("{b}"),
        tunnel_still_works,
        unfinished("deploy"),
        client_is_cut,
        finished("deploy"),
    ),
    row(
        "the drain covers a target's requests from every route to it",
        kp("deploy web --target={a} --host=web.test,b.test --path-prefix=/,/x"),
        holds("a"),
        begin("first", ask("/", host="web.test")),
        release("a"),
        finish("first"),
        holds("a"),
        begin(
            "second",
            answered(504, "/x/y", host="b.test", reaches="a", target="{a}", reason="drained"),
        ),
        kp("deploy web --target={b} --drain-timeout=50ms"),
        finish("second"),
    ),
    row(
        "new requests never reach a draining pool",
        kp("deploy web --target={a}"),
        holds("a"),
        begin("old", ask()),
        meanwhile("deploy", kp("deploy web --target={b}")),
        switched_to("{b}"),
        *[ask(reaches="b")] * 10,
        release("a"),
        finish("old"),
        finished("deploy"),
    ),
    row(
        "not even when the new one fails",
        kp("deploy web --target={a}"),
        holds("a"),
        begin("old", ask()),
        meanwhile("deploy", kp("deploy web --target={refused} --force")),
        switched_to("{refused}"),
        answered(502, target="{refused}", reason="target_refused"),
        release("a"),
        finish("old"),
        finished("deploy"),
    ),
    row(
        "no lock is held while draining: commands for other services are not delayed",
        kp("deploy web --target={a} --host=web.test"),
        holds("a"),
        begin("old", ask()),
        meanwhile("deploy", kp("deploy web --target={b} --host=web.test")),
        switched_to("{b}"),
        kp("deploy other --target={c} --host=other.test"),
        kp("pause other"),
        kp("resume other"),
        kp("stop other"),
        kp("remove other"),
        unfinished("deploy"),
        release("a"),
        finish("old"),
        finished("deploy"),
    ),
    row(
        "remove takes the service out of routing at once (404) and does not wait",
        kp("deploy web --target={a}"),
        holds("a"),
        begin("old", ask()),
        kp("remove web"),
        answered(404, reason="no_service"),
        table(),
        unfinished("old"),
        release("a"),
        finish("old"),
    ),
    row(
        "a failed deploy names each unhealthy target, its last probe result and the time spent",
        health("b", 503),
        health("c", 0),
        kp(
            "deploy web --target={a},{b},{c},{refused},no-such-host.invalid:80 "
            "--deploy-timeout=300ms --health-check-timeout=50ms",
            error=NOT_HEALTHY,
            details=[
                "target {b}: status 503 at http://{b}/up (after 300ms)",
                "target {c}: no answer within 50ms at http://{c}/up",
                "target {refused}: connection refused at http://{refused}/up",
                "target no-such-host.invalid:80: can't resolve",
            ],
        ),
        scripts("a", *[MOVED] * 20),
        kp(
            "deploy web --target={a} --deploy-timeout=300ms",
            error=NOT_HEALTHY,
            details=["target {a}: status 301, redirect to https://a.test/up"],
        ),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_deploy(shown: Row) -> None:
    await play(shown)


# The command itself, as a process


@attrs.frozen
class Shown:
    """What a deploy shows: its statement, flags, exit code and standard error."""

    statement: str
    flags: tuple[str, ...]
    terminal: bool
    code: int
    err: str

    def __str__(self) -> str:
        return self.statement


SHOWN = [
    Shown("success is silent", (), False, 0, ""),
    Shown(
        "failure is one Error line after any detail, exit 1",
        ("--deploy-timeout=100ms",),
        False,
        1,
        r"target [^\n]+: status 503 at [^\n]+ \(after 100ms\)[^\n]*\n"
        r"Error: target failed to become healthy within configured timeout \(100ms\)\n",
    ),
    Shown(
        "progress on a terminal",
        (),
        True,
        0,
        r"(?s).*healthy   all targets answer.*switched  .*done      after [^\n]*\r\n",
    ),
]


@pytest.mark.parametrize("shown", SHOWN, ids=str)
async def test_what_a_deploy_shows(command: Command, upstream: Upstream, shown: Shown) -> None:
    upstream.health = 503 if shown.code else 200
    reader, writer = os.openpty() if shown.terminal else os.pipe()
    try:
        with trio.fail_after(20):
            done = await trio.run_process(
                command_line("deploy", "web", *upstream.flags(), *shown.flags),
                env=environment(command.directory, {"TERM": "xterm"}),
                capture_stdout=True,
                stderr=writer,
                check=False,
            )
        os.write(writer, b"\0")  # a pseudo-terminal that is closed may lose what it holds
        err = b""
        while not err.endswith(b"\0"):
            err += os.read(reader, 65536)
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, done.stdout) == (shown.code, b"")
    assert re.fullmatch(shown.err, err[:-1].decode()), err
