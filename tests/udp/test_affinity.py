"""Which target a client gets: every strategy from end to end, and spreading without affinity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.scripted import LOCALHOST
from tests.udp.serving import Client, Room, Target, open_services, open_world, until

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("v1", "v2", "v3")
# With so many clients, chance leaves out a target once in a billion runs.
MANY = 60


def targets_of(room: Room) -> list[Target]:
    return [room.target(name) for name in NAMES]


async def ask_all(clients: list[Client]) -> list[str]:
    return [await client.ask() for client in clients]


# 5-tuple


async def test_clients_are_spread_and_stay(tmp_path: Path) -> None:
    async with open_services() as room:
        await room.deploy("game", *targets_of(room), timeout=0.3)
        clients = [room.client() for _ in range(MANY)]
        served = await ask_all(clients)
        assert set(served) == set(NAMES)
        assert await ask_all(clients) == served
        # Those who come back with the same port get the same target, in a new session.
        await until(lambda: room.sessions() == 0)
        assert await ask_all(clients) == served
        assert room.number("sessions_created_total") == 2 * MANY


async def test_a_restarted_proxy_chooses_the_same(tmp_path: Path) -> None:
    async with open_world() as world:
        targets = [world.target(name) for name in NAMES]
        clients = [world.client() for _ in range(MANY)]
        async with open_services(tmp_path, world) as room:
            await room.deploy("game", *targets)
            served = await ask_all(clients)
        (tmp_path / "kamal-proxy-udp.sessions").unlink()
        async with open_services(tmp_path, world) as room:
            assert room.sessions() == 0
            assert await ask_all(clients) == served


async def test_the_order_in_which_targets_are_given_means_nothing() -> None:
    async with open_services() as room:
        targets = targets_of(room)
        clients = [room.client() for _ in range(MANY)]
        await room.deploy("game", *targets)
        served = await ask_all(clients)
        await room.services.remove("game")
        await room.deploy("game", *reversed(targets))
        assert await ask_all(clients) == served


async def test_a_further_target_takes_from_all_and_moves_nobody_else() -> None:
    async with open_services() as room:
        targets = targets_of(room)
        clients = [room.client() for _ in range(MANY)]
        await room.deploy("game", *targets)
        before = await ask_all(clients)
        await room.services.remove("game")
        await room.deploy("game", *targets, room.target("v4"))
        after = await ask_all(clients)
        moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert {new for _, new in moved} == {"v4"}
        assert len(moved) < MANY / 2


async def test_the_address_that_was_asked_is_a_part_of_a_5_tuple() -> None:
    async with open_services(bind=()) as room:
        await room.deploy("game", *targets_of(room), strategy="5-tuple")
        assert set(await ask_two_ways(room)) == {True, False}


@pytest.mark.parametrize("strategy", ["source-port", "source-ip"])
async def test_the_address_that_was_asked_means_nothing_otherwise(strategy: str) -> None:
    async with open_services(bind=()) as room:
        await room.deploy("game", *targets_of(room), strategy=strategy)
        assert set(await ask_two_ways(room)) == {True}


async def ask_two_ways(room: Room) -> list[bool]:
    """Ask by two addresses of the proxy; return of each client whether that made no difference."""
    same = []
    for number in range(MANY):
        client = room.client(f"127.0.1.{number}")
        first = await client.ask()
        client.to = ("127.0.0.2", room.port)
        same.append(await client.ask() == first)
    assert room.sessions() == 2 * MANY, "these are two sessions all the same"
    return same


# source-port and source-ip


async def test_source_port_tells_ports_of_one_address_apart() -> None:
    async with open_services() as room:
        await room.deploy("game", *targets_of(room), strategy="source-port")
        assert set(await ask_all([room.client() for _ in range(MANY)])) == set(NAMES)


async def test_source_ip_does_not() -> None:
    async with open_services() as room:
        await room.deploy("game", *targets_of(room), strategy="source-ip", timeout=0.3)
        found = set()
        for number in range(MANY):
            clients = [room.client(f"127.0.1.{number}") for _ in range(3)]
            (served,) = set(await ask_all(clients))
            found.add(served)
        assert found == set(NAMES)


async def test_source_ip_follows_a_live_session() -> None:
    """Where the address has a session, the hash is not asked, nor whether that target drains."""
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), strategy="source-ip")
        first = room.client("127.0.0.3")
        assert await first.ask() == "v1"
        deploying = await room.begin(
            "game", room.target("v2"), strategy="source-ip", force_kill_timeout=0.5
        )
        second, stranger = room.client("127.0.0.3"), room.client("127.0.0.4")
        assert [await second.ask(), await stranger.ask()] == ["v1", "v2"]
        assert (room.row("game").in_flight, room.row("game").draining) == (1, 2)
        # The one that followed counts as one that had to end.
        assert (await deploying.wait()).cancelled == 2
        assert [await second.ask(), await first.ask()] == ["v2", "v2"]


async def test_source_ip_follows_a_session_whatever_the_hash_says() -> None:
    async with open_services() as room:
        targets = targets_of(room)
        await room.deploy("game", targets[0], strategy="source-ip")
        addresses = [f"127.0.1.{number}" for number in range(MANY)]
        old = [room.client(address) for address in addresses]
        assert set(await ask_all(old)) == {"v1"}
        await room.begin("game", *targets, strategy="source-ip")
        assert set(await ask_all([room.client(address) for address in addresses])) == {"v1"}
        others = [room.client(f"127.0.2.{number}") for number in range(MANY)]
        assert set(await ask_all(others)) == set(NAMES)


async def test_source_ip_does_not_follow_what_has_ended() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), strategy="source-ip", timeout=0.2)
        assert await room.client("127.0.0.3").ask() == "v1"
        await room.begin("game", room.target("v2"), strategy="source-ip")
        await until(lambda: room.row("game").draining == 0)
        assert await room.client("127.0.0.3").ask() == "v2"


async def test_other_strategies_follow_nobody() -> None:
    for strategy in ("5-tuple", "source-port"):
        async with open_services() as room:
            await room.deploy("game", room.target("v1"), strategy=strategy)
            assert await room.client("127.0.0.3").ask() == "v1"
            await room.begin("game", room.target("v2"), strategy=strategy)
            assert await room.client("127.0.0.3").ask() == "v2"


# No affinity


async def test_without_affinity_each_datagram_goes_to_the_next_target() -> None:
    async with open_services() as room:
        targets = targets_of(room)
        await room.deploy("game", *targets, affinity=False)
        clients = [room.client() for _ in range(3)]
        for client in clients:
            served = [await client.ask() for _ in range(9)]
            assert sorted(served[:3]) == sorted(NAMES)
            assert served == served[:3] * 3, "in turn"
        assert [len(target.received) for target in targets] == [9, 9, 9]
        # Each target knows a client by one port.
        assert [len(target.sources) for target in targets] == [3, 3, 3]
        assert room.sessions() == 3


async def test_without_affinity_a_burst_is_spread_too() -> None:
    async with open_services() as room:
        targets = targets_of(room)
        await room.deploy("game", *targets, affinity=False)
        client = room.client()
        sent = {await client.send() for _ in range(9)}
        answers = [(await client.receive()).partition(b":") for _ in range(9)]
        assert {payload for _, _, payload in answers} == sent
        assert [len(target.received) for target in targets] == [3, 3, 3]


async def test_without_affinity_an_unhealthy_target_is_passed_over() -> None:
    async with open_services() as room:
        v1, v2, v3 = targets_of(room)
        for target in (v1, v2, v3):
            target.open_tcp()
        await room.deploy("game", v1, v2, v3, affinity=False, check={"method": "tcp"})
        client = room.client()
        assert {await client.ask() for _ in range(3)} == set(NAMES)
        assert v2.tcp is not None
        v2.tcp.close()
        await until(lambda: len(room.row("game").healthy) == 2)
        assert {await client.ask() for _ in range(6)} == {"v1", "v3"}
        assert {await room.client().ask() for _ in range(6)} <= {"v1", "v3"}
        v2.open_tcp()
        await until(lambda: len(room.row("game").healthy) == 3)
        assert {await client.ask() for _ in range(6)} == set(NAMES)


async def test_without_affinity_a_target_that_refuses_is_passed_over() -> None:
    async with open_services() as room:
        v1, v2, v3 = targets_of(room)
        await room.deploy("game", v1, v2, v3, affinity=False)
        client = room.client()
        order = [await client.ask() for _ in range(3)]
        v2.die()
        assert [await client.ask() for _ in range(order.index("v2"))] == order[: order.index("v2")]
        await client.send()  # finds out, and is lost as on any way
        assert {await client.ask() for _ in range(4)} == {"v1", "v3"}


@pytest.mark.parametrize("affinity", [True, False])
async def test_no_reply_ever_goes_to_another_client(affinity: bool) -> None:
    async with open_services() as room:
        await room.deploy("game", *targets_of(room), affinity=affinity)
        clients = [room.client(f"127.0.0.{3 + number % 5}") for number in range(MANY)]
        # By the whole address: the same port may be that of several addresses.
        sent: dict[object, set[bytes]] = {client.sock.getsockname(): set() for client in clients}
        for _ in range(5):
            for client in clients:
                sent[client.sock.getsockname()].add(await client.send())
        for client in clients:
            for _ in range(5):
                _, _, payload = (await client.receive()).partition(b":")
                sent[client.sock.getsockname()].remove(payload)
        assert not any(sent.values())
        assert LOCALHOST not in {client.sock.getsockname()[0] for client in clients}
