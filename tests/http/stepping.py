"""The world of ``streams`` again and again, with something happening one scheduler step later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from trio.testing import MockClock

from tests.deploying import run_with_every_cancellation
from tests.http.streams import open_world
from tests.pairs import Steps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import pytest

    from kamal_proxy.sockets import SocketStream
    from tests.http.streams import World


def attempt_every_step(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempt: Callable[[World, int], Awaitable[bool]],
    **options: Any,
) -> int:
    """Call ``attempt`` with a new world and 1, 2, ... until it says that there was no such step.

    Args:
        directory: Where each world gets a directory of its own.
        monkeypatch: As for :func:`open_world`.
        attempt: Lets something happen after that step.
        options: As for :func:`open_world`.

    Returns:
        That step.
    """

    def run(step: int) -> bool:
        async def main() -> bool:
            own = directory / str(step)
            own.mkdir()
            async with open_world(own, monkeypatch, **options) as here:
                return await attempt(here, step)

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    return run_with_every_cancellation(run)


async def visit_and_leave(
    visit: Callable[[trio.SocketStream], Awaitable[None]], client: trio.SocketStream
) -> None:
    """Do what a client does, as far as its connection lasts, and close it."""
    try:
        async with client:
            await visit(client)
    except trio.BrokenResourceError:
        pass


async def serve_until(
    here: World,
    stream: SocketStream,
    visit: Callable[[], Awaitable[None]],
    step: int,
    *,
    requests: int,
    statuses: set[int],
) -> bool:
    """Serve a connection until a step, at which that is cancelled; nothing may be left in flight.

    Args:
        here: The world.
        stream: The server's end of the connection.
        visit: What goes on at the client's end, which bears its loss.
        step: The step.
        requests: How many requests may have been logged.
        statuses: With which statuses.

    Returns:
        Whether there was such a step.
    """
    scope = trio.CancelScope()
    steps = Steps(step, scope.cancel)
    async with trio.open_nursery() as visitors:
        visitors.start_soon(visit)
        trio.lowlevel.add_instrument(steps)
        with scope:
            await here.serve(stream)
        trio.lowlevel.remove_instrument(steps)
    assert here.server.connections == 0
    assert here.deployment.in_flight == 0
    assert here.deployment.targets[0].in_flight == 0
    # The head may not have been read, or may not have been understood, yet.
    assert len(here.logged) <= requests
    assert set(here.statuses) <= statuses
    if here.targets:
        assert here.logged, "a request that reached the target is logged"
    return scope.cancel_called
