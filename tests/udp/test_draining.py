"""How the sessions of replaced targets end: every strategy, in real time, with short timeouts."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from kamal_proxy import PauseOptions
from kamal_proxy.deployment import DrainResult
from tests.udp.serving import PATIENT, Client, Deploying, Room, open_services, until

SHORT = 0.5  # seconds; a session that is silent for so long is over
LONGER = 1.0
NEVER = 600.0  # a drain that waits for this is one that hangs
FIRST = {"timeout": SHORT}


async def keep_talking(clients: list[Client], name: str) -> None:
    """Ask in turn, until somebody else answers."""
    while True:
        for client in clients:
            if await client.ask() != name:
                return
        await trio.sleep(SHORT / 10)


async def drain(room: Room, **options: Any) -> tuple[DrainResult, float]:
    """Redeploy with one client that falls silent and two that never do.

    Returns:
        The result, and the seconds from the switch to the end.
    """
    await room.deploy("game", room.target("v1"), **FIRST)
    talking, quiet = [room.client(), room.client()], room.client()
    assert [await client.ask() for client in (*talking, quiet)] == ["v1"] * 3
    room.events.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_talking, talking, "v1")
        options = FIRST | {"drain_timeout": NEVER, "force_kill_timeout": NEVER} | options
        result = await room.deploy("game", room.target("v2"), **options)
        # What the client of a session that was cut says next reaches the new target.
        assert [await client.ask() for client in (talking[1], quiet)] == ["v2"] * 2
        nursery.cancel_scope.cancel()
    (switched,) = (event for event in room.events if event.event == "switched")
    done = room.events[-1]
    assert done.event == "done"
    assert (done.completed, done.cancelled) == (result.completed, result.cancelled)
    (line,) = room.lines.of("UDP service drained")
    assert (line["service"], line["completed"], line["cut"]) == (
        "game",
        result.completed,
        result.cancelled,
    )
    assert room.row("game").draining == 0
    return result, done.elapsed - switched.elapsed


@pytest.mark.parametrize("strategy", ["graceful", "timeout", "immediate"])
async def test_without_zero_downtime_all_are_cut_at_the_switch(strategy: str) -> None:
    async with open_services() as room:
        result, _ = await drain(room, drain_strategy=strategy)
        assert result == DrainResult(cancelled=3)
        assert room.number("sessions_ended_total", reason="cut") == 3


async def test_immediate_cuts_all_at_the_switch() -> None:
    async with open_services() as room:
        result, _ = await drain(room, zero_downtime=True, drain_strategy="immediate")
        assert result == DrainResult(cancelled=3)
        assert room.number("sessions_ended_total", reason="cut") == 3


async def test_graceful_cuts_who_is_left_at_the_drain_timeout() -> None:
    """Plain UDP has no goodbye, so that nobody would leave between that and the kill timeout."""
    async with open_services() as room:
        result, seconds = await drain(room, zero_downtime=True, drain_timeout=LONGER)
        assert result == DrainResult(completed=1, cancelled=2)
        assert seconds >= LONGER
        assert room.number("sessions_ended_total", reason="cut") == 2
        assert room.number("sessions_ended_total", reason="idle") == 1


async def test_timeout_lets_all_run_until_the_kill_timeout() -> None:
    async with open_services() as room:
        result, seconds = await drain(
            room,
            zero_downtime=True,
            drain_strategy="timeout",
            drain_timeout=0,
            force_kill_timeout=LONGER,
        )
        assert result == DrainResult(completed=1, cancelled=2)
        assert seconds >= LONGER


@pytest.mark.parametrize("strategy", ["graceful", "timeout"])
async def test_a_drain_is_over_with_its_last_session(strategy: str) -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), **FIRST)
        clients = [room.client() for _ in range(3)]
        for client in clients:
            await client.ask()
        room.events.clear()
        result = await room.deploy(
            "game",
            room.target("v2"),
            zero_downtime=True,
            drain_strategy=strategy,
            drain_timeout=NEVER,
            force_kill_timeout=NEVER,
        )
        assert result == DrainResult(completed=3)
        told = [event.in_flight for event in room.events if event.event == "draining"]
        assert told[0] == 3
        assert room.number("sessions_ended_total", reason="idle") == 3


async def test_without_sessions_there_is_nothing_to_wait_for() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        assert await room.deploy("game", room.target("v2"), **PATIENT) == DrainResult()


async def test_a_session_that_was_never_answered_ends_too() -> None:
    async with open_services() as room:
        v1 = room.target("v1", silent=True)
        await room.deploy("game", v1, **FIRST)
        await room.client().send()
        await v1.wait_received(1)
        result = await room.deploy("game", room.target("v2"), **PATIENT)
        assert result == DrainResult(completed=1)
        assert room.number("sessions_ended_total", reason="unanswered") == 1


async def test_each_generation_has_its_own_deadline() -> None:
    async with open_services() as room:
        names = ["v1", "v2", "v3", "v4"]
        clients: list[Client] = []
        deploys: list[Deploying] = []
        patience = {"v2": 1.2, "v3": 0.3, "v4": 0.6}
        async with trio.open_nursery() as nursery:
            for name in names:
                if name == "v1":
                    await room.deploy("game", room.target(name))
                else:
                    kill = {"force_kill_timeout": patience[name]}
                    deploys.append(await room.begin("game", room.target(name), **kill))
                clients.append(room.client())
                assert await clients[-1].ask() == name
            assert [await client.ask() for client in clients] == names
            assert (room.row("game").in_flight, room.row("game").draining) == (1, 3)
            order: list[str] = []

            async def wait(name: str, deploying: Deploying) -> None:
                assert await deploying.wait() == DrainResult(cancelled=1)
                order.append(name)

            for name, deploying in zip(names[1:], deploys, strict=True):
                nursery.start_soon(wait, name, deploying)
            await until(lambda: order == ["v3"])
            # Only who was on v2, which v3 has replaced, has lost its session.
            assert [await client.ask() for client in clients] == ["v1", "v4", "v3", "v4"]
        assert order == ["v3", "v4", "v2"]
        assert [await client.ask() for client in clients] == ["v4"] * 4


async def test_hundreds_are_cut_without_a_pause_for_the_others() -> None:
    """They end some at a time: nobody else waits for the sockets of all to be closed."""
    count = 800
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        for number in range(count // 100):
            # Their ports may be used again, so that each hundred has an address of its own.
            clients = [room.client(f"127.0.1.{number}") for _ in range(100)]
            for client in clients:
                await client.send()
            for client in clients:
                await client.receive()
                client.sock.close()
        assert room.sessions() == count
        turns = 0

        async def take_turns(task_status: trio.TaskStatus[None]) -> None:
            nonlocal turns
            task_status.started()
            while True:
                turns += room.row("game").draining not in (0, count)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            await nursery.start(take_turns)
            result = await room.deploy("game", room.target("v2"))
            nursery.cancel_scope.cancel()
        assert result == DrainResult(cancelled=count)
        assert turns >= 2


async def test_a_caller_that_leaves_does_not_stop_the_drain() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        client = room.client()
        assert await client.ask() == "v1"
        deploying = await room.begin("game", room.target("v2"), force_kill_timeout=SHORT)
        deploying.scope.cancel()
        await deploying.ended.wait()
        assert deploying.result is None
        assert await client.ask() == "v1"
        await until(lambda: room.row("game").draining == 0)
        assert room.number("sessions_ended_total", reason="cut") == 1
        assert await client.ask() == "v2"
        # That is also in the log, now that nobody else can be told.
        await until(lambda: room.lines.of("UDP service drained"))
        (line,) = room.lines.of("UDP service drained")
        assert (line["completed"], line["cut"]) == (0, 1)


async def test_a_client_that_is_gone_ends_its_session() -> None:
    """Its port is closed, which the kernel tells; two seconds of silence confirm that."""
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        client, other = room.client(), room.client()
        assert [await client.ask(), await other.ask()] == ["v1", "v1"]
        source = v1.received[0].source
        deploying = await room.begin("game", room.target("v2"), force_kill_timeout=20)
        client.sock.close()
        await v1.send(b"anybody there?", source)
        await until(lambda: room.row("game").draining == 1)
        assert room.number("sessions_ended_total", reason="client_gone") == 1
        assert await other.ask() == "v1"
        assert not deploying.ended.is_set()


async def test_sessions_without_affinity_are_let_go_at_the_switch() -> None:
    """They live on for answers that are on their way, and no longer."""
    async with open_services() as room:
        v1 = room.target("v1", silent=True)
        await room.deploy("game", v1, affinity=False)
        client = room.client()
        payload = await client.send()
        source = (await v1.wait_received(1)).source
        deploying = await room.begin("game", room.target("v2"), affinity=False)
        assert await client.ask() == "v2", "its next datagram goes to the new targets"
        await v1.send(b"late:" + payload, source)
        assert await client.receive() == b"late:" + payload
        assert await deploying.wait() == DrainResult(completed=1)
        assert await client.ask() == "v2"


async def test_pausing_during_a_drain_leaves_it_alone() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), **FIRST)
        client = room.client()
        assert await client.ask() == "v1"
        deploying = await room.begin("game", room.target("v2"))
        await room.services.pause("game", PauseOptions())
        assert await client.ask() == "v1"
        assert await deploying.wait() == DrainResult(completed=1)
        await client.send()
        await until(lambda: room.number("dropped_datagrams_total", reason="paused") == 1)
        await room.services.resume("game")
        assert await client.ask() == "v2"


async def test_removing_during_a_drain_ends_it() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        await room.client().ask()
        deploying = await room.begin("game", room.target("v2"))
        await room.services.remove("game")
        assert await deploying.wait() == DrainResult(cancelled=1)
        assert room.rows == []
