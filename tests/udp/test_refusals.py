"""Targets that die, restart or move: which sessions leave them, when, and which stay."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import pytest
import trio

from kamal_proxy import lookups
from kamal_proxy.deployment import DrainResult
from kamal_proxy.proxy_protocol import encode_v2
from kamal_proxy.udp import deployment
from tests.scripted import LOCALHOST
from tests.udp.serving import UNANSWERED, Client, Room, Target, open_services, until

TCP = {"method": "tcp", "interval": 0.05}
MANY = 30


def moved(room: Room) -> int:
    return room.number("sessions_moved_total")


async def relayed(room: Room, count: int) -> None:
    """Wait until the relay has sent on, or dropped, so many datagrams of clients."""

    def number() -> int:
        sent = room.number("datagrams_total", direction="to_target")
        return sent + sum(room.numbers("dropped_datagrams_total").values())

    await until(lambda: number() == count)


async def talk(client: Client, pause: float = 0.05) -> str:
    """Send again and again until somebody answers; return who."""

    async def send() -> None:
        while True:
            await client.send()
            await trio.sleep(pause)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        answer = await client.receive()
        nursery.cancel_scope.cancel()
    last = await client.send()  # with its answer, nothing more is to come
    while not answer.endswith(b":" + last):
        answer = await client.receive()
    return answer.partition(b":")[0].decode()


async def begun(room: Room, *targets: Target) -> tuple[Client, Target, Target]:
    """Return a client whom a target has answered, that target, and the other one."""
    client = room.client()
    name = await client.ask()
    (its,) = (target for target in targets if target.name == name)
    (other,) = (target for target in targets if target.name != name)
    return client, its, other


# Sessions that were never answered


async def test_a_first_datagram_goes_on_to_the_next_target() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2)
        v1.die()
        for _ in range(MANY):
            # Sent once, and answered all the same.
            assert await room.client().ask() == "v2"
        assert moved(room) >= 1
        assert room.sessions() == MANY
        assert not v1.received


async def test_all_datagrams_before_the_first_answer_do_not() -> None:
    """Only the first one is kept; the others are lost, as on any way."""
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2)
        v1.die()
        clients = [room.client() for _ in range(MANY)]
        first = {client.port: await client.send() for client in clients}
        for client in clients:
            assert await client.receive() == b"v2:" + first[client.port]


async def test_a_first_datagram_that_is_too_large_to_be_kept() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2)
        v1.die()
        large = UNANSWERED * 3000
        while not moved(room):
            client, count = room.client(), len(v2.received) + 1
            await client.sock.sendto(large, client.to)
            await until(partial(has_arrived, room, v2, count))
        assert await client.ask() == "v2", "the session is on the other target"
        assert v2.received[-1].payload != large
        assert room.sessions() == len(v2.sources)


def has_arrived(room: Room, target: Target, count: int) -> bool:
    return len(target.received) == count or moved(room) > 0


async def test_past_several_targets_that_are_dead() -> None:
    async with open_services() as room:
        targets = [room.target(f"v{number}") for number in range(5)]
        await room.deploy("game", *targets)
        for target in targets[:-1]:
            target.die()
        for _ in range(MANY):
            assert await room.client().ask() == "v4"


async def test_new_clients_avoid_a_target_that_has_refused_a_moment_ago() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2)
        v1.die()
        for _ in range(MANY):
            assert await room.client().ask() == "v2"
        assert moved(room) < MANY / 4
        # It is the last choice, but a choice.
        v2.die()
        v1.live(room.world.nursery)
        assert await talk(room.client()) == "v1"


async def test_when_all_targets_are_dead_each_is_asked_once() -> None:
    async with open_services() as room:
        targets = [room.target(f"v{number}") for number in range(3)]
        await room.deploy("game", *targets)
        for target in targets:
            target.die()
        client = room.client()
        await client.send()
        await until(lambda: moved(room) >= 2)
        for _ in range(5):
            await client.send()
            await trio.sleep(0.02)
        assert moved(room) <= 3
        assert room.sessions() == 1


@pytest.mark.parametrize("back", [0, 1])
async def test_a_client_that_found_all_targets_dead_reaches_the_first_that_is_back(
    back: int,
) -> None:
    async with open_services() as room:
        targets = [room.target("v0"), room.target("v1")]
        await room.deploy("game", *targets)
        for target in targets:
            target.die()
        client = room.client()
        for _ in range(10):
            await client.send()
            await trio.sleep(0.02)
        targets[back].live(room.world.nursery)
        assert await talk(client) == f"v{back}"


# Sessions that were answered


async def test_an_answered_session_leaves_after_three_refusals_in_a_second() -> None:
    async with open_services() as room:
        client, its, other = await begun(room, *await deployed(room))
        its.die()
        started = trio.current_time()
        assert await talk(client, 0.02) == other.name
        assert trio.current_time() - started >= 0.99
        assert moved(room) == 1
        assert await client.ask() == other.name, "and stays there"
        its.live(room.world.nursery)
        assert await client.ask() == other.name


async def deployed(room: Room, **options: Any) -> tuple[Target, Target]:
    v1, v2 = room.target("v1"), room.target("v2")
    if "check" in options:
        v1.open_tcp()
        v2.open_tcp()
    await room.deploy("game", v1, v2, **options)
    return v1, v2


async def test_few_refusals_in_a_long_time_move_nothing() -> None:
    """A client that says something every now and then can't tell a restart from an end."""
    async with open_services() as room:
        client, its, _ = await begun(room, *await deployed(room))
        its.die()
        for _ in range(2):
            await client.send()
            await trio.sleep(0.55)
        assert moved(room) == 0
        its.live(room.world.nursery)
        assert await client.ask() == its.name
        assert len(its.sources) == 1


async def test_many_refusals_in_a_short_time_move_nothing() -> None:
    async with open_services() as room:
        client, its, _ = await begun(room, *await deployed(room))
        its.die()
        for _ in range(20):
            await client.send()
        await relayed(room, 21)
        its.live(room.world.nursery)
        assert await client.ask() == its.name
        assert len(its.sources) == 1
        assert moved(room) == 0
        # What was refused before does not count against it later.
        its.die()
        for _ in range(2):
            await client.send()
        await relayed(room, 24)
        its.live(room.world.nursery)
        assert await client.ask() == its.name


async def test_a_session_leaves_an_unhealthy_target_at_the_first_refusal() -> None:
    async with open_services() as room:
        client, its, other = await begun(room, *await deployed(room, check=TCP))
        assert its.tcp is not None
        its.tcp.close()
        await until(lambda: room.row("game").healthy == (str(other),))
        assert await client.ask() == its.name, "unhealthy or not, it answers"
        its.die()
        await client.send()
        await until(lambda: moved(room) == 1)
        assert await client.ask() == other.name


async def test_a_session_leaves_an_unhealthy_target_that_swallows_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host that is gone refuses nothing; its probes find that out."""
    monkeypatch.setattr(deployment, "_LOOK_INTERVAL", 0.05)
    monkeypatch.setattr(deployment, "_SILENCE", 0.3)
    async with open_services() as room:
        client, its, other = await begun(room, *await deployed(room, check=TCP))
        its.silent = True
        for _ in range(10):
            await client.send()
            await trio.sleep(0.05)
        assert moved(room) == 0, "a healthy target may be silent for as long as it likes"
        assert its.tcp is not None
        its.tcp.close()
        assert await talk(client) == other.name
        assert moved(room) == 1
        # Nobody else has to move: this one was answered by the other target all along.
        assert other.sources != its.sources


async def test_the_only_target_keeps_its_sessions() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, check={"method": "none"})
        client = room.client()
        assert await client.ask() == "v1"
        v1.die()
        with trio.move_on_after(1.2):
            await talk(client, 0.05)
        v1.live(room.world.nursery)
        assert await talk(client) == "v1"
        assert len(v1.sources) == 1
        assert room.sessions() == 1


async def test_a_target_that_was_restarted_sees_the_same_peers() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        clients = [room.client() for _ in range(10)]
        for client in clients:
            await client.ask()
        sources = v1.sources
        v1.die()
        for client in clients:
            await client.send()
        await relayed(room, 20)
        v1.live(room.world.nursery)
        for client in clients:
            assert await client.ask() == "v1"
        assert v1.sources == sources


async def test_what_was_refused_is_counted() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        client = room.client()
        assert await client.ask() == "v1"
        v1.die()
        for _ in range(5):
            await client.send()
            await trio.sleep(0.01)
        # Each is sent, or dropped, once: what the kernel told of one is not held against the next.
        await relayed(room, 6)
        assert room.numbers("dropped_datagrams_total").keys() <= {
            frozenset({("service", "game"), ("reason", "refused")})
        }
        v1.live(room.world.nursery)
        assert await client.ask() == "v1"


# Drains


async def test_a_session_of_a_replaced_target_that_dies_goes_to_the_new_one() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        client = room.client()
        assert await client.ask() == "v1"
        deploying = await room.begin("game", room.target("v2"))
        assert await client.ask() == "v1"
        v1.die()
        assert await talk(client) == "v2"
        assert (room.row("game").in_flight, room.row("game").draining) == (1, 0)
        # With that the drain is over, without another datagram.
        assert await deploying.wait() == DrainResult(completed=1)


async def test_a_session_whose_replaced_target_dies_begins_anew_where_headers_differ() -> None:
    """It can't be moved: its datagrams begin as the replaced target wanted."""
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1)
        client = room.client()
        assert await client.ask() == "v1"
        deploying = await room.begin("game", v2, proxy_protocol=True)
        assert await client.ask() == "v1"
        v1.die()
        payload = b""
        while not v2.received:
            payload = await client.send()
            await trio.sleep(0.05)
        header = encode_v2((LOCALHOST, client.port), (LOCALHOST, room.port), datagram=True)
        assert v2.received[0].payload == header + payload
        assert await deploying.wait() == DrainResult(cancelled=1)


# Names


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what the name ``game-1`` stands for; the test changes it."""
    found: list[str] = []

    async def resolve(host: str, port: int, *_: object) -> list[tuple[socket.AddressFamily, Any]]:
        assert host == "game-1"
        await trio.lowlevel.checkpoint()
        if not found:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, (address, port)) for address in found]

    monkeypatch.setattr(lookups, "resolve", resolve)
    return found


def moved_to(target: Target, host: str, name: str, room: Room) -> Target:
    """Return a target on the same port of another address."""
    other = Target(name, port=target.port, host=host)
    other.live(room.world.nursery)
    return other


async def test_a_target_that_has_moved_is_found_again(addresses: list[str]) -> None:
    async with open_services() as room:
        addresses[:] = ["127.0.0.2"]
        old = room.target("old", host="127.0.0.2")
        await room.deploy("game", f"game-1:{old.port}")
        client = room.client()
        assert await client.ask() == "old"
        new = moved_to(old, "127.0.0.3", "new", room)
        try:
            addresses[:] = ["127.0.0.3"]
            old.die()
            assert await talk(client) == "new"
            assert await room.client().ask() == "new"
            assert room.row("game").targets == (f"game-1:{old.port}",)
        finally:
            new.close()


async def test_live_sessions_keep_an_address_that_the_name_has_no_more(
    addresses: list[str],
) -> None:
    async with open_services() as room:
        addresses[:] = ["127.0.0.2"]
        old = room.target("old", host="127.0.0.2")
        await room.deploy("game", f"game-1:{old.port}")
        client = room.client()
        assert await client.ask() == "old"
        new = moved_to(old, "127.0.0.3", "new", room)
        try:
            addresses[:] = ["127.0.0.3"]
            active = room.installed().active
            assert active is not None
            active.targets[0].address.poke()
            await until(lambda: active.targets[0].address.addresses[0][0] == "127.0.0.3")
            assert [await client.ask(), await room.client().ask()] == ["old", "new"]
            # Until that refuses.
            old.die()
            assert await talk(client) == "new"
            assert room.sessions() == 2
        finally:
            new.close()


async def test_a_name_that_can_not_be_resolved_any_more_keeps_its_address(
    addresses: list[str],
) -> None:
    async with open_services() as room:
        addresses[:] = [LOCALHOST]
        v1 = room.target("v1")
        await room.deploy("game", f"game-1:{v1.port}")
        addresses.clear()
        active = room.installed().active
        assert active is not None
        active.targets[0].address.poke()
        await until(lambda: room.lines.of("Target lookup failed"))
        assert await room.client().ask() == "v1"
        (line,) = room.lines.of("Target lookup failed")
        assert line["target"] == f"game-1:{v1.port}"
