"""The steps that rows of several sections take: commands, answers of targets, waiting.

Every function here makes a step; see ``tables``. Modules add steps of their own.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import trio

from tests.contract.tables import Ask, Step, World, ask, check, has_news
from tests.scripted import Peer, Script, Upstream, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.running import Line


def answered(status: int, path: str = "/", *, reason: str | None = None, **rest: Any) -> Ask:
    """Make a step like :func:`ask` for a request that the proxy answers by itself."""
    logs = {"target": rest.pop("target", ""), "reason": reason} | rest.pop("logs", {})
    return ask(path, status=status, logs=logs, **{"reaches": "", **rest})


def begin(name: str, request: Ask, *, waits: bool = False) -> Step:
    """Make a step that sends a request, and waits until it has come to where it stays for now.

    Args:
        name: For :func:`finish`.
        request: The request.
        waits: Whether it stays in the proxy; else it must have reached its target.
    """

    async def step(world: World) -> None:
        client, number = await request.send(world)
        world.pending[name] = client, request, number
        while not (world.in_flight() == len(world.pending) if waits else world.requests(number)):
            await trio.lowlevel.checkpoint()
        assert not waits or not world.requests(number)

    return step


def finish(name: str) -> Step:
    """Make a step that waits for the response to a request that was begun."""

    async def step(world: World) -> None:
        client, request, number = world.pending.pop(name)
        await request.receive(world, client, number)

    return step


def kp(line: str, *, error: str = "", details: Iterable[str] = ()) -> Step:
    """Make a step that runs a command, which must succeed silently or fail with this sentence."""

    async def step(world: World) -> None:
        result = await world.kp(line)
        if not error:
            assert (result.code, result.out, result.err) == (0, "", "")
            return
        *before, last = result.err.split("\n")
        assert (result.code, result.out, last) == (1, "", f"Error: {world.fill(error)}")
        for detail in details:
            assert world.fill(detail) in "\n".join(before)

    return step


def meanwhile(name: str, command: Step) -> Step:
    """Make a step that lets a command run beside the steps that follow."""

    async def step(world: World) -> None:
        done = world.running[name] = trio.Event()

        async def run() -> None:
            await command(world)
            done.set()

        world.nursery.start_soon(run)

    return step


def unfinished(name: str) -> Step:
    """Make a step that requires a command, or a request, to be under way still."""

    async def step(world: World) -> None:
        if name in world.running:
            assert not world.running[name].is_set()
        else:
            assert not has_news(world.pending[name][0])

    return step


def finished(name: str) -> Step:
    """Make a step that waits for a command that runs beside."""
    return lambda world: world.running[name].wait()


def listed(**wanted: Any) -> Step:
    """Make a step that compares what ``list --json`` tells of the service with that name."""

    async def step(world: World) -> None:
        services = json.loads((await world.kp("list --json")).out)
        (service,) = [one for one in services if one["name"] == wanted["name"]]
        for key, value in wanted.items():
            expected = [world.fill(one) for one in value] if isinstance(value, list) else value
            assert service[key] == expected, key

    return step


def table(*lines: str) -> Step:
    """Make a step that compares the table of ``list``, without colours, spaces squeezed."""

    async def step(world: World) -> None:
        text = re.sub(r"\x1b\[[0-9;]*m", "", (await world.kp("list")).out)
        shown = [" ".join(line.split()) for line in text.splitlines()[1:]]
        assert shown == [world.fill(line) for line in lines]

    return step


def logged(message: str, **fields: Any) -> Step:
    """Make a step that waits for a line of the log with these fields."""

    def matches(world: World, line: Line) -> bool:
        try:
            check("", line.get, fields, world)
        except AssertionError:
            return False
        return bool(line["msg"] == message)

    async def step(world: World) -> None:
        await world.proxy.lines.wait_for(lambda line: matches(world, line))

    return step


def scripts(name: str, *answers: bytes, then: Callable[[Peer], object] = Peer.close) -> Step:
    """Make a step that lets a target's next connections read a request, send this, and close."""

    async def step(world: World) -> None:
        upstream = world.targets[name]
        upstream.script(*(_recording(upstream, data, then) for data in answers))

    return step


def _recording(upstream: Upstream, data: bytes, then: Callable[[Peer], object]) -> Script:
    async def serve(peer: Peer) -> None:
        received = await peer.receive_request()
        assert received is not None
        upstream.record(received)
        await peer.send(data)
        then(peer)

    return serve


def holds(name: str, before: bytes = b"", after: bytes = b"") -> Step:
    """Make a step that lets a target's next connection wait for :func:`release` within its answer.

    Args:
        name: The target's name.
        before: What it sends first.
        after: What it sends when it is released; a whole response with its name by default.
    """

    async def step(world: World) -> None:
        upstream, released = world.targets[name], trio.Event()
        world.held[name] = released

        async def serve(peer: Peer) -> None:
            received = await peer.receive_request()
            assert received is not None
            upstream.record(received)
            await peer.send(before)
            await released.wait()
            await peer.send(after or ok(name.encode()))

        upstream.script(serve)

    return step


def release(name: str) -> Step:
    """Make a step that lets what a target holds go."""

    async def step(world: World) -> None:
        world.held.pop(name).set()

    return step


def health(name: str, status: int) -> Step:
    """Make a step that sets the status of a target's answers to probes; 0 for none at all."""

    async def step(world: World) -> None:
        world.targets[name].health = status

    return step


def refuses(name: str) -> Step:
    """Make a step that lets a target refuse connections from now on."""

    async def step(world: World) -> None:
        world.targets[name].stop_listening()

    return step


def restarted(service: str = "", **changes: Any) -> Step:
    """Make a step that restarts the proxy, perhaps with other saved options of a service."""

    async def step(world: World) -> None:
        await world.stop()
        saved = json.loads(world.state.read_text())
        for one in saved:
            if one["name"] == service:
                one["options"].update(changes)
        world.state.write_text(json.dumps(saved))
        await world.start()

    return step
