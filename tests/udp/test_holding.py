"""Pause, stop and resume of UDP services: what passes, what is dropped, what is saved."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy import PauseOptions, StopOptions
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import InvalidOptionsError, ServiceNotFoundError
from kamal_proxy.udp.services import UdpServices
from tests.deploying import run_with_every_cancellation, save_in_this_thread
from tests.pairs import Steps
from tests.ports import free_port
from tests.scripted import LOCALHOST
from tests.udp.serving import Room, open_services, open_world, until

if TYPE_CHECKING:
    from pathlib import Path


def dropped(room: Room, reason: str) -> int:
    return room.number("dropped_datagrams_total", reason=reason)


async def hold(room: Room, state: str, name: str = "game") -> DrainResult:
    """Pause or stop a service, whichever ``state`` it is to come to."""
    assert isinstance(room.services, UdpServices)
    if state == "paused":
        return await room.services.pause(name, PauseOptions(max_pause=7), room.events.append)
    options = StopOptions(message="back soon")
    return await room.services.stop_service(name, options, room.events.append)


# What passes


async def test_a_pause_keeps_newcomers_out() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        old, new = room.client(), room.client()
        assert await old.ask() == "v1"
        assert await hold(room, "paused") == DrainResult()
        for _ in range(3):
            await new.send()
        assert await old.ask() == "v1", "sessions go on"
        await until(lambda: dropped(room, "paused") == 3)
        assert (room.row("game").state, room.row("game").max_pause) == ("paused", 7)
        assert room.sessions() == 1
        await room.services.resume("game")
        # What was dropped does not come later: the first answer is that to the next datagram.
        assert await new.ask() == "v1"
        assert len(v1.received) == 3
        assert room.row("game").state == "running"
        assert dropped(room, "paused") == 3


async def test_a_stop_lets_nothing_pass_either_way() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        old, new = room.client(), room.client()
        assert await old.ask() == "v1"
        assert await hold(room, "stopped") == DrainResult()
        await old.send()
        await new.send()
        await v1.send(b"unasked", v1.received[0].source)
        await until(lambda: dropped(room, "stopped") == 3)
        assert (room.row("game").state, room.row("game").stop_message) == ("stopped", "back soon")
        assert len(v1.received) == 1
        await room.services.resume("game")
        assert [await old.ask(), await new.ask()] == ["v1", "v1"]
        assert room.sessions() == 2
        assert len(v1.sources) == 2, "the session is the one of before the stop"
        assert dropped(room, "stopped") == 3


async def test_sessions_of_a_paused_service_that_end_do_not_come_back() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), timeout=0.2)
        client = room.client()
        assert await client.ask() == "v1"
        await hold(room, "paused")
        await until(lambda: room.sessions() == 0)
        await client.send()
        await until(lambda: dropped(room, "paused") == 1)
        await room.services.resume("game")
        assert await client.ask() == "v1"


async def test_what_a_target_says_to_a_stopped_session_keeps_it_alive() -> None:
    """Nothing passes, but nobody can know how long the stop is: activity counts as ever."""
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, timeout=0.4)
        client = room.client()
        assert await client.ask() == "v1"
        await hold(room, "stopped")

        def has_dropped(count: int) -> bool:
            return dropped(room, "stopped") >= count

        for number in range(7):
            await v1.send(b"unasked", v1.received[0].source)
            await until(partial(has_dropped, number + 1))
            await trio.sleep(0.1)
        assert room.sessions() == 1


@pytest.mark.parametrize("state", ["paused", "stopped"])
async def test_a_deploy_does_not_end_a_hold(state: str) -> None:
    async with open_services() as room:
        v2 = room.target("v2")
        await room.deploy("game", room.target("v1"))
        await hold(room, state)
        await room.deploy("game", v2)
        assert room.row("game").state == state
        client = room.client()
        await client.send()
        await until(lambda: dropped(room, state) == 1)
        assert not v2.received
        await room.services.resume("game")
        assert await client.ask() == "v2"


async def test_from_one_hold_to_the_other() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        old, new = room.client(), room.client()
        assert await old.ask() == "v1"
        await hold(room, "paused")
        await hold(room, "stopped")
        await old.send()
        await until(lambda: dropped(room, "stopped") == 1)
        await hold(room, "paused")
        assert await old.ask() == "v1"
        await new.send()
        await until(lambda: dropped(room, "paused") == 1)
        await room.services.resume("game")
        await room.services.resume("game")
        assert await new.ask() == "v1"


async def test_other_services_go_on() -> None:
    async with open_services() as room:
        port = free_port()
        await room.deploy("game", room.target("v1"))
        await room.deploy("other", room.target("other"), port=port)
        await hold(room, "stopped")
        assert await room.client(to=(LOCALHOST, port)).ask() == "other"
        assert [row.state for row in room.rows] == ["stopped", "running"]


# What is told, and what can't be done


@pytest.mark.parametrize("state", ["paused", "stopped"])
async def test_what_is_told_and_logged(state: str) -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        room.events.clear()
        await hold(room, state)
        assert [(each.event, each.completed, each.cancelled) for each in room.events] == [
            ("done", 0, 0)
        ]
        await room.services.resume("game")
        assert room.lines.of(f"UDP service {state}") == [{"service": "game"}]
        assert room.lines.of("UDP service resumed") == [{"service": "game"}]


async def test_a_service_that_is_not_there() -> None:
    async with open_services() as room:
        for state in ("paused", "stopped"):
            with pytest.raises(ServiceNotFoundError):
                await hold(room, state)
        with pytest.raises(ServiceNotFoundError):
            await room.services.resume("game")


async def test_options_that_can_not_be_used() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        with pytest.raises(InvalidOptionsError):
            await room.services.pause("game", PauseOptions(max_pause=-1))
        assert room.row("game").state == "running"


# What is saved


async def test_a_pause_outlives_a_restart(tmp_path: Path) -> None:
    async with open_world() as world:
        v1, old, new = world.target("v1"), world.client(), world.client()
        async with open_services(tmp_path, world) as room:
            await room.deploy("game", v1)
            assert await old.ask() == "v1"
            await hold(room, "paused")
        async with open_services(tmp_path, world) as room:
            assert (room.row("game").state, room.row("game").max_pause) == ("paused", 7)
            assert await old.ask() == "v1", "its session is one of before the pause"
            await new.send()
            await until(lambda: dropped(room, "paused") == 1)
            await room.services.resume("game")
            assert await new.ask() == "v1"
        async with open_services(tmp_path, world) as room:
            assert room.row("game").state == "running"
            assert [await old.ask(), await new.ask()] == ["v1", "v1"]
        assert len(v1.sources) == 2


async def test_a_stop_outlives_a_restart(tmp_path: Path) -> None:
    async with open_world() as world:
        v1, client = world.target("v1"), world.client()
        async with open_services(tmp_path, world) as room:
            await room.deploy("game", v1)
            assert await client.ask() == "v1"
            await hold(room, "stopped")
        async with open_services(tmp_path, world) as room:
            row = room.row("game")
            assert (row.state, row.stop_message, row.in_flight) == ("stopped", "back soon", 1)
            await client.send()
            await until(lambda: dropped(room, "stopped") == 1)
            await room.services.resume("game")
            assert await client.ask() == "v1"
        assert len(v1.sources) == 1


def test_a_hold_cancelled_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Service and file agree, whatever comes between."""
    save_in_this_thread(monkeypatch)
    seen = set()

    def attempt(step: int) -> bool:
        async def main() -> bool:
            async with open_services(tmp_path / str(step)) as room:
                await room.deploy("game", room.target("v1"))
                scope = trio.CancelScope()
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                with scope:
                    await hold(room, "stopped")
                trio.lowlevel.remove_instrument(steps)
                state = room.row("game").state
                seen.add(state)
                assert room.state is not None
                assert f'"state":{2 if state == "stopped" else 0},' in room.state.path.read_text()
                client = room.client()
                if state == "stopped":
                    await client.send()
                    await until(lambda: dropped(room, "stopped") == 1)
                    await room.services.resume("game")
                assert await client.ask() == "v1"
                return scope.cancelled_caught

        return trio.run(main)

    run_with_every_cancellation(attempt)
    assert seen == {"running", "stopped"}
