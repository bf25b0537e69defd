"""Rollout: its targets, the split, what survives which change, and that it is all or nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import state_format
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import (
    DeployFailedError,
    InvalidOptionsError,
    RolloutNotSetError,
    ServiceNotFoundError,
    ShuttingDownError,
    StateError,
)
from kamal_proxy.options import PauseOptions, RolloutOptions, RolloutSplit
from kamal_proxy.state import SavedPause, SavedRollout, SavedService, StateFile
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

    from tests.deploying import Room

HALF = RolloutSplit(percentage=50, allowlist=("alice",))


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save in this thread."""
    save_in_this_thread(monkeypatch)


def saved_rollout(room: Room) -> str:
    """Return what the state file says of the only service from its active targets on."""
    return room.state.path.read_text().partition('"active_targets":')[2]


# Deploying


async def test_rollout_targets_wait_for_a_split(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v2=["refused", True]) as room:
        await room.deploy("app", "v1")
        active = room.active("app")
        room.events.clear()
        assert await room.deploy_rollout("app", "v2", readers=("r2",)) == DrainResult()
        service = room.service("app")
        assert service.active is active
        assert service.split is None
        assert room.rollout("app").writer_names == ("v2",)
        assert room.rollout("app").reader_names == ("r2",)
        assert room.agrees
        kinds = [event.event for event in room.events]
        assert sorted(kinds[:-3]) == ["probe"] * 3
        assert kinds[-3:] == ["healthy", "switched", "done"]
        fields = {"service": "app", "targets": ["v2"]}
        assert room.lines.of("Deploying for rollout") == [fields]
        assert room.lines.of("Deployed for rollout") == [fields]
        # Both are probed from now on, as the service says.
        room.probes.times.clear()
        await trio.sleep(1.5)
        assert set(room.probes.times) == {"v1", "v2", "r2"}


async def test_another_rollout_replaces_and_drains_the_old_one(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        await room.services.set_rollout("app", HALF)
        old = room.rollout("app")
        spared, flying = Request(room.active("app")), Request(old)
        start = trio.current_time()
        assert await room.deploy_rollout("app", "v3", drain=4) == DrainResult(0, 1)
        assert trio.current_time() - start == pytest.approx(4)
        assert flying.aborted
        assert old.drained
        assert spared.drains == []
        assert not room.active("app").retired
        assert room.rollout("app").writer_names == ("v3",)
        split = room.service("app").split
        assert split is not None
        assert (split.percentage, split.allowlist) == (50, ("alice",))
        assert room.agrees
        spared.end()


async def test_a_deploy_keeps_the_rollout(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        await room.services.set_rollout("app", HALF)
        before = room.service("app")
        flying = Request(room.rollout("app"))
        assert await room.deploy("app", "v3", drain=5) == DrainResult()
        after = room.service("app")
        assert before.active.drained
        assert after.active is not before.active
        assert after.rollout is before.rollout
        assert after.split == before.split
        assert flying.drains == []
        assert room.agrees
        flying.end()


async def test_a_failed_rollout_changes_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v3=["refused"]) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        table, old = room.services.routes, room.rollout("app")
        with pytest.raises(DeployFailedError) as caught:
            await room.deploy_rollout("app", "v3", timeout=3)
        assert caught.value.details[0].startswith("target v3: refused at http://v3/up")
        assert room.services.routes is table
        assert not old.retired
        assert room.agrees
        room.probes.times.clear()
        await trio.sleep(5)
        assert set(room.probes.times) == {"v1", "v2"}


async def test_a_forced_rollout_does_not_wait(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v2=["refused"]) as room:
        await room.deploy("app", "v1")
        start = trio.current_time()
        await room.deploy_rollout("app", "v2", force=True)
        assert trio.current_time() == start
        assert room.rollout("app").choose(set()) is not None


async def test_a_service_removed_meanwhile(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v2=["x", "x", "x", True]) as room:
        await room.deploy("app", "v1")
        async with trio.open_nursery() as nursery:

            async def too_late() -> None:
                with pytest.raises(ServiceNotFoundError):
                    await room.deploy_rollout("app", "v2")

            nursery.start_soon(too_late)
            await wait_all_tasks_blocked()
            await room.services.remove("app")
        assert room.serving == {}
        room.probes.times.clear()
        await trio.sleep(5)
        assert room.probes.times == {}, "the rollout targets are still probed"


async def test_a_service_held_or_redeployed_meanwhile(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path, v2=["x", "x", "x", True]) as room:
        await room.deploy("app", "v1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(room.deploy_rollout, "app", "v2")
            await wait_all_tasks_blocked()
            await room.deploy("app", "v3", hosts=("new.test",))
            await room.services.pause("app", PauseOptions())
        service = room.service("app")
        assert service.pause.state == "paused"
        assert service.options.hosts == ("new.test",)
        assert (service.active.writer_names, room.rollout("app").writer_names) == (
            ("v3",),
            ("v2",),
        )
        assert room.agrees


# The split


async def test_a_split_needs_targets(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        table = room.services.routes
        with pytest.raises(RolloutNotSetError, match=r"^rollout target not set$"):
            await room.services.set_rollout("app", HALF)
        assert room.services.routes is table
        await room.services.stop_rollout("app")  # there is nothing to stop, which is fine
        assert room.service("app").split is None


async def test_stopping_keeps_the_targets(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        rollout = room.rollout("app")
        await room.services.set_rollout("app", HALF)
        flying = Request(rollout)
        await room.services.stop_rollout("app")
        assert room.service("app").split is None
        assert room.rollout("app") is rollout
        assert not rollout.retired
        assert flying.drains == [], "what is in flight goes on"
        await room.services.set_rollout("app", RolloutSplit(percentage=1))
        split = room.service("app").split
        assert split is not None
        assert (split.percentage, split.allowlist) == (1, ())
        assert room.lines.of("Set rollout split") == [
            {"service": "app", "percentage": 50, "allowlist": ["alice"]},
            {"service": "app", "percentage": 1, "allowlist": []},
        ]
        assert room.lines.of("Stopped rollout") == [{"service": "app"}]
        flying.end()


async def test_removing_drains_both(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        made = [room.active("app"), room.rollout("app")]
        flying = [Request(deployment) for deployment in made]
        await room.services.remove("app")
        assert all(deployment.retired for deployment in made)
        await trio.sleep(3600)
        assert not any(request.aborted for request in flying)
        for request in flying:
            request.end()
        for deployment in made:
            assert await deployment.wait_drained() == DrainResult(completed=1)


async def test_describes_a_rollout(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1", readers=("r1",))
        await room.deploy_rollout("app", "v2", readers=("r2",))
        flying = [Request(room.active("app")), Request(room.rollout("app"))]
        (entry,) = room.services.describe()
        assert (entry.targets, entry.read_targets) == (("v1",), ("r1",))
        assert (entry.rollout_targets, entry.rollout_read_targets) == (("v2",), ("r2",))
        assert set(entry.healthy) == {"v1", "r1", "v2", "r2"}
        assert (entry.rollout_active, entry.rollout_percentage) == (False, 0)
        assert entry.in_flight == 2
        await room.services.set_rollout("app", HALF)
        (entry,) = room.services.describe()
        assert (entry.rollout_active, entry.rollout_percentage) == (True, 50)
        assert entry.rollout_allowlist == ("alice",)
        for request in flying:
            request.end()


# Failures


CHANGES: dict[str, Callable[[Room, str], Awaitable[object]]] = {
    "deploy": lambda room, name: room.deploy_rollout(name, "v3", drain=3),
    "set": lambda room, name: room.services.set_rollout(name, HALF),
    "stop": lambda room, name: room.services.stop_rollout(name),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_unknown_services_and_a_proxy_that_stops(
    tmp_path: Path, autojump_clock: MockClock, change: str
) -> None:
    async with open_room(tmp_path) as room:
        with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
            await CHANGES[change](room, "app")
        assert room.probes.times == {}
        assert not room.state.path.exists()
        await room.deploy("app", "v1")
        room.services.close()
        table = room.services.routes
        with pytest.raises(ShuttingDownError):
            await CHANGES[change](room, "app")
        assert room.services.routes is table


async def test_bad_options_change_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        table, services = room.services.routes, room.services
        for change in (
            partial(services.set_rollout, "app", RolloutSplit(percentage=101)),
            partial(services.set_rollout, "app", RolloutSplit(percentage=-1)),
            partial(services.deploy_rollout, "app", RolloutOptions(targets=())),
            partial(services.deploy_rollout, "app", RolloutOptions(targets=("!",))),
            partial(room.deploy_rollout, "app", "v3", drain=-1),
        ):
            with pytest.raises(InvalidOptionsError):
                await change()
        assert room.services.routes is table
        assert set(room.probes.times) == {"v1", "v2"}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_state_that_can_not_be_saved_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock, change: str
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy_rollout("app", "v2")
        await room.services.set_rollout("app", RolloutSplit(percentage=7))
        flying = Request(room.rollout("app"))
        table, before = room.services.routes, room.state.path.read_bytes()
        room.state.broken = True
        with pytest.raises(StateError):
            await CHANGES[change](room, "app")
        assert room.services.routes is table
        assert room.state.path.read_bytes() == before
        assert not room.rollout("app").retired
        assert flying.drains == []
        room.probes.times.clear()
        await trio.sleep(5)
        assert set(room.probes.times) == {"v1", "v2"}
        flying.end()


def test_cancelled_at_every_await(tmp_path: Path) -> None:
    seen = set()

    def attempt(change: str, step: int) -> bool:
        directory = tmp_path / change / str(step)

        async def main() -> bool:
            async with open_room(directory, v3=["refused", True]) as room:
                await room.deploy("app", "v1")
                await room.deploy_rollout("app", "v2")
                await room.services.set_rollout("app", RolloutSplit(percentage=7))
                before = room.service("app")
                old = room.rollout("app")
                flying = Request(old)
                with trio.CancelScope() as scope:
                    steps = Steps(step, scope.cancel)
                    trio.lowlevel.add_instrument(steps)
                    await CHANGES[change](room, "app")
                trio.lowlevel.remove_instrument(steps)
                now = room.service("app")
                assert room.agrees
                changed = now.rollout is not old or now.split != before.split
                assert changed or scope.cancelled_caught
                assert now.active is before.active
                assert not now.active.retired
                replaced = now.rollout is not old
                assert old.retired == replaced
                seen.add((change, scope.cancelled_caught, changed))
                if replaced:
                    await old.wait_drained()
                    assert flying.aborted, "the drain goes on"
                else:
                    assert flying.drains == []
                    flying.end()
                room.probes.times.clear()
                await trio.sleep(10)
                assert set(room.probes.times) == {"v1", "v3" if replaced else "v2"}
                return scope.cancel_called

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    for change in CHANGES:
        assert run_with_every_cancellation(partial(attempt, change)) > 2
    assert seen == {
        ("deploy", True, False),
        ("deploy", True, True),
        ("deploy", False, True),
        ("set", True, False),
        ("set", False, True),
        ("stop", True, False),
        ("stop", False, True),
    }


# The saved state


async def test_the_file_says_what_the_original_would(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the Go proxy wrote after each of these commands."""
    commands: dict[str, Callable[[Room], Awaitable[object]]] = {
        "deploy v1": lambda room: room.deploy("app", "v1"),
        "rollout deploy v2": lambda room: room.deploy_rollout("app", "v2"),
        "rollout set --percent 33 --list x,y&z": lambda room: room.services.set_rollout(
            "app", RolloutSplit(percentage=33, allowlist=("x", "y&z"))
        ),
        "rollout set --percent 0": lambda room: room.services.set_rollout("app", RolloutSplit()),
        "rollout set --percent 100": lambda room: room.services.set_rollout(
            "app", RolloutSplit(percentage=100)
        ),
        "rollout deploy v2 r2": lambda room: room.deploy_rollout("app", "v2", readers=("r2",)),
        "deploy v3": lambda room: room.deploy("app", "v3"),
        "rollout stop": lambda room: room.services.stop_rollout("app"),
    }
    written = []
    async with open_room(tmp_path) as room:
        for command in commands.values():
            await command(room)
            written.append(saved_rollout(room))
    pause = '"pause_controller":{"state":0,"stop_message":"","fail_after":0}'
    pools = '["v1"],"active_readers":[],"rollout_targets":["v2"],"rollout_readers":[],'
    both = '"active_readers":[],"rollout_targets":["v2"],"rollout_readers":["r2"],'
    names = '["x","y\\u0026z"]'
    split = f'{{"percentage":33,"percentage_split_point":1417339207.3500001,"allowlist":{names}}}'
    none = '{"percentage":0,"percentage_split_point":0,"allowlist":null}'
    everyone = '{"percentage":100,"percentage_split_point":4294967295,"allowlist":null}'
    assert written == [
        '["v1"],"active_readers":[],"rollout_targets":null,"rollout_readers":null,'
        f'{pause},"rollout_controller":null}}]\n',
        f'{pools}{pause},"rollout_controller":null}}]\n',
        f'{pools}{pause},"rollout_controller":{split}}}]\n',
        f'{pools}{pause},"rollout_controller":{none}}}]\n',
        f'{pools}{pause},"rollout_controller":{everyone}}}]\n',
        f'["v1"],{both}{pause},"rollout_controller":{everyone}}}]\n',
        f'["v3"],{both}{pause},"rollout_controller":{everyone}}}]\n',
        f'["v3"],{both}{pause},"rollout_controller":null}}]\n',
    ]


async def test_a_restored_rollout_serves_and_can_be_changed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    split = SavedRollout(percentage=10, percentage_split_point=429496729.5, allowlist=("x",))
    with StateFile(tmp_path / "kamal-proxy.state", state_format) as file:
        saved = SavedService(
            name="app",
            active_targets=("v1",),
            rollout_targets=("v2",),
            rollout_readers=("r2",),
            pause=SavedPause(state="paused", fail_after=5),
            rollout=split,
        )
        file.save([saved])
    before = (tmp_path / "kamal-proxy.state").read_bytes()
    async with open_room(tmp_path, v2=["refused"]) as room:
        service, rollout = room.service("app"), room.rollout("app")
        assert service.split == split
        assert rollout.choose(set()) is not None, "restored targets count as healthy"
        assert (rollout.writer_names, rollout.reader_names) == (("v2",), ("r2",))
        assert room.state.path.read_bytes() == before
        await room.services.resume("app")
        await room.services.stop_rollout("app")
        await room.deploy_rollout("app", "v3")
        assert rollout.drained
        assert room.agrees


async def test_a_restored_split_without_targets_chooses_nobody(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    with StateFile(tmp_path / "kamal-proxy.state", state_format) as file:
        split = SavedRollout(percentage=100, percentage_split_point=4294967295)
        file.save([SavedService(name="app", active_targets=("v1",), rollout=split)])
    async with open_room(tmp_path) as room:
        service = room.service("app")
        assert service.rollout is None
        assert not room.services.describe()[0].rollout_active
        with pytest.raises(RolloutNotSetError):
            await room.services.set_rollout("app", HALF)
        assert room.service("app") is service
