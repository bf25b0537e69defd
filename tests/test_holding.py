"""Pause, stop and resume: drains, what is saved, who is released, and that it is all or nothing."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import state_format
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import (
    InvalidOptionsError,
    ResumedError,
    ServiceNotFoundError,
    ShuttingDownError,
    StateError,
)
from kamal_proxy.options import PauseOptions, StopOptions
from kamal_proxy.state import SavedPause, SavedService, StateFile
from tests.deploying import (
    Request,
    open_room,
    run_with_every_cancellation,
    save_in_this_thread,
)
from tests.pairs import Steps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from kamal_proxy.control.messages import Event
    from tests.deploying import Room

HOLDS = ["paused", "stopped"]


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save in this thread."""
    save_in_this_thread(monkeypatch)


async def hold(room: Room, state: str, name: str = "app", drain: float = 10) -> DrainResult:
    """Pause or stop a service, whichever ``state`` it is to come to."""
    if state == "paused":
        options = PauseOptions(drain_timeout=drain, max_pause=7)
        return await room.services.pause(name, options, room.events.append)
    stop = StopOptions(drain_timeout=drain, message="back soon")
    return await room.services.stop_service(name, stop, room.events.append)


def pauses(room: Room) -> list[dict[str, Any]]:
    """Return what the state file says of each service's pause."""
    return [entry["pause_controller"] for entry in json.loads(room.state.path.read_bytes())]


# What a hold does


@pytest.mark.parametrize(
    ("state", "saved"),
    [
        ("paused", {"state": 1, "stop_message": "", "fail_after": 7_000_000_000}),
        ("stopped", {"state": 2, "stop_message": "back soon", "fail_after": 0}),
    ],
)
async def test_a_hold_is_saved_and_serves_on_afterwards(
    tmp_path: Path, autojump_clock: MockClock, state: str, saved: dict[str, Any]
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        before = room.service("app")
        start = trio.current_time()
        assert await hold(room, state) == DrainResult()
        assert trio.current_time() == start, "nothing was in flight"
        assert room.service("app").pause.state == state
        assert before.released.is_set(), "those who wait must look again"
        assert not room.service("app").released.is_set()
        assert pauses(room) == [saved]
        assert room.lines.of(f"Service {state}") == [{"service": "app"}]
        assert room.lines.of("Service drained") == [{"service": "app"}]
        # The deployment goes on: it is probed, and takes requests that begin later.
        room.probes.times.clear()
        await trio.sleep(5.5)
        assert len(room.probes.times["v1"]) == 5
        held = room.service("app")
        assert not held.active.retired
        await room.services.resume("app")
        assert held.released.is_set()
        assert room.service("app").active is held.active
        assert room.service("app").pause.state == "running"
        assert room.lines.of("Service resumed") == [{"service": "app"}]
        Request(room.active("app")).end()


@pytest.mark.parametrize("state", HOLDS)
async def test_requests_in_flight_end_or_are_cut(
    tmp_path: Path, autojump_clock: MockClock, state: str
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        quick, slow, slower = (Request(room.active("app")) for _ in range(3))
        room.events.clear()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def drained() -> None:
                assert await hold(room, state, drain=9.5) == DrainResult(completed=1, cancelled=2)

            nursery.start_soon(drained)
            await trio.sleep(2.5)
            assert room.service("app").pause.state == state, "the drain comes after the change"
            assert pauses(room)[0]["state"] == HOLDS.index(state) + 1
            quick.end()
        assert trio.current_time() - start == pytest.approx(9.5)
        assert [request.aborted for request in (quick, slow, slower)] == [False, True, True]
        assert [drain.deadline - start for drain in slow.drains] == pytest.approx([9.5])
        assert [(event.event, event.in_flight) for event in room.events] == [
            *[("draining", 3)] * 3,
            *[("draining", 2)] * 7,
            ("done", 0),
        ]
        assert (room.events[-1].completed, room.events[-1].cancelled) == (1, 2)
        assert room.events[-1].elapsed == pytest.approx(9.5)
        assert not room.active("app").retired


async def test_active_and_rollout_targets_drain_side_by_side(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        await room.deploy("other", "v1")
        concerned = [Request(room.active("app")), Request(room.rollout("app"))]
        spared = Request(room.active("other"))
        start = trio.current_time()
        assert await hold(room, "paused", drain=10) == DrainResult(0, 2)
        assert trio.current_time() - start == pytest.approx(10)
        assert all(request.aborted for request in concerned)
        assert spared.drains == []
        spared.end()


async def test_only_what_was_in_flight_is_drained(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        old = Request(room.active("app"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, room, "paused")
            await trio.sleep(1)
            new = Request(room.active("app"))
        assert (old.aborted, new.aborted) == (True, False)
        assert new.drains == []
        new.end()


async def test_no_time_to_drain(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        request = Request(room.active("app"))
        assert await hold(room, "stopped", drain=0) == DrainResult(0, 1)
        assert request.aborted


async def test_a_hold_delays_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy("other", "v1")
        flying = Request(room.active("app"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, room, "paused", "app", math.inf)
            await trio.sleep(1)
            start = trio.current_time()
            await room.deploy("third", "v1")
            await hold(room, "paused", "other")
            await room.services.resume("other")
            await room.services.remove("other")
            assert trio.current_time() == start
            flying.end()


async def test_a_callback_that_raises_harms_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    told: list[Event] = []

    def progress(event: Event) -> None:
        told.append(event)
        raise ValueError("bad callback")

    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        Request(room.active("app"))
        options = PauseOptions(drain_timeout=3)
        assert await room.services.pause("app", options, progress) == DrainResult(0, 1)
        assert len(told) == 1
        assert room.lines.of("Progress callback failed") == [
            {"error": "ValueError('bad callback')"}
        ]


# Changes while a service drains


@pytest.mark.parametrize("state", HOLDS)
async def test_resumed_during_the_drain_nothing_is_cut(
    tmp_path: Path, autojump_clock: MockClock, state: str
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        flying = [Request(room.active("app")), Request(room.rollout("app"))]
        start = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def too_late() -> None:
                with pytest.raises(ResumedError, match="app was resumed"):
                    await hold(room, state)
                assert trio.current_time() - start == pytest.approx(4)

            nursery.start_soon(too_late)
            await trio.sleep(4)
            await room.services.resume("app")
        await trio.sleep(3600)
        assert not any(request.aborted for request in flying)
        assert all(drain.called_off for request in flying for drain in request.drains)
        assert room.lines.of("Service drained") == []
        assert [event.event for event in room.events][-1] == "draining"
        for request in flying:
            request.end()


async def test_resumed_and_held_again_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The first hold was resumed, whatever the table says by the time that it notices."""
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        async with trio.open_nursery() as nursery:

            async def first() -> None:
                with pytest.raises(ResumedError):
                    await hold(room, "paused", drain=10)

            async def second() -> None:
                await room.services.resume("app")
                assert await hold(room, "stopped", drain=100) == DrainResult(1, 0)

            nursery.start_soon(first)
            await trio.sleep(1)
            nursery.start_soon(second)
            await trio.sleep(50)
            assert not flying.aborted, "the first drain was called off"
            flying.end()
        assert room.service("app").pause.state == "stopped"
        assert len(room.lines.of("Service drained")) == 1


async def test_stopped_while_a_pause_drains(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        results: list[DrainResult] = []

        async def held(state: str) -> None:
            results.append(await hold(room, state, drain=100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(held, "paused")
            await trio.sleep(1)
            paused = room.service("app")
            nursery.start_soon(held, "stopped")
            await trio.sleep(1)
            assert paused.released.is_set(), "those who wait are told that it has stopped"
            flying.end()
        assert results == [DrainResult(1, 0)] * 2
        assert room.service("app").pause == SavedPause(
            state="stopped", stop_message="back soon", fail_after=7
        )


@pytest.mark.parametrize("count", [2, 5])
async def test_concurrent_pauses(tmp_path: Path, autojump_clock: MockClock, count: int) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        start = trio.current_time()
        results = []

        async def pause(seconds: float) -> None:
            options = PauseOptions(drain_timeout=seconds, max_pause=seconds)
            results.append(await room.services.pause("app", options))

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(pause, 10 + number)
        assert trio.current_time() - start == pytest.approx(10), "the shortest drain cuts"
        assert flying.aborted
        assert results == [DrainResult(0, 1)] * count, "it was cut, whoever did it"
        assert room.agrees


async def test_all_concurrent_pauses_are_called_off(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))

        async def too_late(state: str) -> None:
            with pytest.raises(ResumedError):
                await hold(room, state)

        async with trio.open_nursery() as nursery:
            for state in (*HOLDS, *HOLDS):
                nursery.start_soon(too_late, state)
            await trio.sleep(1)
            await room.services.resume("app")
        await trio.sleep(100)
        assert not flying.aborted
        assert len(flying.drains) == 4
        flying.end()


async def test_removed_during_the_drain(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        async with trio.open_nursery() as nursery:

            async def held() -> None:
                assert await hold(room, "paused", drain=10) == DrainResult(0, 1)

            nursery.start_soon(held)
            await trio.sleep(1)
            paused = room.service("app")
            await room.services.remove("app")
            assert paused.released.is_set(), "those who wait are told that it is gone"
            assert room.saved == {}
        assert flying.aborted, "the pause still has its say"


async def test_deployed_during_the_drain(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        async with trio.open_nursery() as nursery:

            async def held() -> None:
                assert await hold(room, "stopped", drain=10) == DrainResult(0, 1)

            async def deployed() -> None:
                assert await room.deploy("app", "v2", drain=5) == DrainResult(0, 1)

            nursery.start_soon(held)
            await trio.sleep(1)
            nursery.start_soon(deployed)
            await trio.sleep(1)
            assert room.serving == {"app": ["v2"]}
            assert room.service("app").pause.state == "stopped"
        assert flying.aborted


async def test_a_deploy_releases_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await hold(room, "paused")
        paused = room.service("app")
        await room.deploy("app", "v2")
        await room.deploy_rollout("app", "v3")
        assert not paused.released.is_set()
        await room.services.resume("app")
        assert paused.released.is_set()
        assert room.serving == {"app": ["v2"]}


# Failures


CHANGES: dict[str, Callable[[Room, str], Awaitable[object]]] = {
    "pause": lambda room, name: hold(room, "paused", name),
    "stop": lambda room, name: hold(room, "stopped", name),
    "resume": lambda room, name: room.services.resume(name),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_unknown_services_and_a_proxy_that_stops(
    tmp_path: Path, autojump_clock: MockClock, change: str
) -> None:
    async with open_room(tmp_path) as room:
        with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
            await CHANGES[change](room, "app")
        assert not room.state.path.exists()
        await room.deploy("app", "v1")
        room.services.close()
        table = room.services.routes
        with pytest.raises(ShuttingDownError):
            await CHANGES[change](room, "app")
        assert room.services.routes is table


@pytest.mark.parametrize("seconds", [-1, math.nan])
async def test_bad_options_change_nothing(
    tmp_path: Path, autojump_clock: MockClock, seconds: float
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        table, services = room.services.routes, room.services
        for change in (
            partial(services.pause, "app", PauseOptions(drain_timeout=seconds)),
            partial(services.pause, "app", PauseOptions(max_pause=seconds)),
            partial(services.stop_service, "app", StopOptions(drain_timeout=seconds)),
        ):
            with pytest.raises(InvalidOptionsError, match="must not be negative"):
                await change()
        assert room.services.routes is table


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", ["running", *HOLDS])
async def test_a_state_that_can_not_be_saved_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock, change: str, state: str
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        if state != "running":
            await hold(room, state)
        flying = Request(room.active("app"))
        table, before = room.services.routes, room.state.path.read_bytes()
        room.state.broken = True
        with pytest.raises(StateError):
            await CHANGES[change](room, "app")
        assert room.services.routes is table
        assert room.state.path.read_bytes() == before
        assert not room.service("app").released.is_set()
        assert flying.drains == []
        room.state.broken = False
        flying.end()
        await CHANGES[change](room, "app")
        assert room.agrees


def test_cancelled_at_every_await(tmp_path: Path) -> None:
    seen = set()

    def attempt(change: str, step: int) -> bool:
        directory = tmp_path / change / str(step)

        async def main() -> bool:
            async with open_room(directory) as room:
                await room.deploy("app", "v1")
                if change == "resume":
                    await hold(room, "paused")
                before = room.service("app")
                flying = Request(before.active)
                with trio.CancelScope() as scope:
                    steps = Steps(step, scope.cancel)
                    trio.lowlevel.add_instrument(steps)
                    await CHANGES[change](room, "app")
                trio.lowlevel.remove_instrument(steps)
                now = room.service("app")
                assert room.agrees
                # Those who wait are released if and only if there is something new to see.
                assert before.released.is_set() == (now.pause.state != before.pause.state)
                seen.add((change, scope.cancelled_caught, now.pause.state))
                aborted = flying.aborted
                await trio.sleep(100)
                assert flying.aborted == aborted, "a drain that was called off goes on"
                assert aborted or change == "resume" or scope.cancelled_caught
                assert not (aborted and change == "resume")
                flying.end()
                # Whatever came of it, the next change finds everything in order.
                await hold(room, "stopped")
                await room.services.resume("app")
                assert room.service("app").pause.state == "running"
                assert room.agrees
                return scope.cancel_called

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    for change in CHANGES:
        assert run_with_every_cancellation(partial(attempt, change)) > 2
    assert seen == {
        ("pause", True, "running"),
        ("pause", True, "paused"),
        ("pause", False, "paused"),
        ("stop", True, "running"),
        ("stop", True, "stopped"),
        ("stop", False, "stopped"),
        ("resume", True, "paused"),
        ("resume", False, "running"),
    }


# The saved state


async def test_the_file_says_what_the_original_would(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the Go proxy wrote after each of these commands."""
    commands: dict[str, Callable[[Room], Awaitable[object]]] = {
        "pause --max-pause 7s": lambda room: room.services.pause("app", PauseOptions(max_pause=7)),
        "stop": lambda room: room.services.stop_service("app", StopOptions(message="back <soon>")),
        "pause": lambda room: room.services.pause("app", PauseOptions()),
        "resume": lambda room: room.services.resume("app"),
        "stop without message": lambda room: room.services.stop_service("app", StopOptions()),
        "deploy": lambda room: room.deploy("app", "v2"),
        "resume again": lambda room: room.services.resume("app"),
    }
    written = []
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        for change in commands.values():
            await change(room)
            text = room.state.path.read_text()
            written.append(text.partition('"pause_controller":')[2].partition(',"rollout_')[0])
    assert written == [
        r'{"state":1,"stop_message":"","fail_after":7000000000}',
        r'{"state":2,"stop_message":"back \u003csoon\u003e","fail_after":7000000000}',
        r'{"state":1,"stop_message":"","fail_after":30000000000}',
        r'{"state":0,"stop_message":"","fail_after":30000000000}',
        r'{"state":2,"stop_message":"","fail_after":30000000000}',
        r'{"state":2,"stop_message":"","fail_after":30000000000}',
        r'{"state":0,"stop_message":"","fail_after":30000000000}',
    ]


@pytest.mark.parametrize("state", ["running", *HOLDS])
async def test_a_restored_service_can_be_changed(
    tmp_path: Path, autojump_clock: MockClock, state: Any
) -> None:
    pause = SavedPause(state=state, stop_message="soon", fail_after=5)
    with StateFile(tmp_path / "kamal-proxy.state", state_format) as file:
        file.save([SavedService(name="app", active_targets=("v1",), pause=pause)])
    for change in ("", "resume", "pause", "stop", "resume"):
        async with open_room(tmp_path) as room:
            if not change:
                assert room.service("app").pause == pause
                continue
            waiting = room.service("app").released
            await CHANGES[change](room, "app")
            assert waiting.is_set()
            expected = {"resume": "running", "pause": "paused", "stop": "stopped"}[change]
            assert room.service("app").pause.state == expected
            assert room.agrees


# What is described


async def test_describes_holds(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))

        def described() -> tuple[object, ...]:
            (entry,) = room.services.describe()
            return entry.state, entry.stop_message, entry.max_pause, entry.in_flight

        assert described() == ("running", "", 0, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, room, "paused")
            await wait_all_tasks_blocked()
            assert described() == ("paused", "", 7, 1)
            flying.end()
        await hold(room, "stopped")
        assert described() == ("stopped", "back soon", 0, 0)
        await room.services.resume("app")
        assert described() == ("running", "", 0, 0)
