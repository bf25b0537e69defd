"""Proxies that follow each other on one data directory: services and sessions go on."""

from __future__ import annotations

import shutil
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy import lookups
from kamal_proxy.errors import PortConflictError, StateError
from kamal_proxy.proxy_protocol import encode_v2
from kamal_proxy.udp import saved_sessions, services, session_saving
from kamal_proxy.udp.saved_sessions import RECORD, ServiceSessions
from tests.ports import free_port, is_free
from tests.scripted import LOCALHOST
from tests.udp.serving import (
    Room,
    World,
    held_port,
    open_services,
    open_whole,
    open_world,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SESSIONS = "kamal-proxy-udp.sessions"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as opened:
        yield opened


def restored(room: Room, service: str = "game") -> dict[str, Any]:
    """Return what the log says of the sessions of a service that go on."""
    (line,) = (
        each for each in room.lines.of("UDP sessions restored") if each["service"] == service
    )
    return line


def edit_sessions(
    path: Path, age: float = 0.0, change: Callable[[list[list[Any]]], None] | None = None
) -> None:
    """Change saved sessions.

    Args:
        path: The data directory.
        age: Seconds by which they are to be older.
        change: Changes the records of all services.
    """
    file = path / SESSIONS
    document = saved_sessions.decode(file.read_bytes())
    changed: list[ServiceSessions] = []
    for service in document.services:
        records = [list(record) for record in RECORD.iter_unpack(service.records)]
        if change is not None:
            change(records)
        packed = b"".join(RECORD.pack(*record) for record in records)
        changed.append(attrs.evolve(service, records=packed))
    file.write_bytes(saved_sessions.encode(document.saved_at - age, changed))


# Sessions that go on


async def test_a_client_talks_on_across_restarts(tmp_path: Path, world: World) -> None:
    targets = [world.target("v1"), world.target("v2")]
    clients = [world.client() for _ in range(10)]
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", *targets)
        served = [await client.ask() for client in clients]
        assert set(served) == {"v1", "v2"}
    for _ in range(2):
        assert is_free(world.port)
        async with open_whole(tmp_path, world) as room:
            assert restored(room) == {"service": "game", "count": 10, "lost": 0}
            assert room.row("game").in_flight == 10
            # A server may be the first to speak.
            source = targets[0].received[-1].source
            await targets[0].send(b"still there?", source)
            greeted = clients[len(served) - 1 - served[::-1].index("v1")]
            assert await greeted.receive() == b"still there?"
            assert [await client.ask() for client in clients] == served
            # The targets see the same peers as before.
            for target in targets:
                assert len(target.sources) == served.count(target.name)
            # And the proxy has the same sessions.
            assert room.sessions() == 10


async def test_what_a_restarted_proxy_knows_of_a_service(tmp_path: Path, world: World) -> None:
    v1 = world.target("v1")
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", v1, strategy="source-ip", timeout=33, limit=77)
        before = room.row("game")
        state = (tmp_path / "kamal-proxy-udp.state").read_bytes()
    async with open_whole(tmp_path, world) as room:
        assert room.row("game") == before
        assert room.lines.of("Restored saved state") == [
            {"path": str(tmp_path / "kamal-proxy-udp.state")}
        ]
        assert await room.client().ask() == "v1"
        assert (tmp_path / "kamal-proxy-udp.state").read_bytes() == state


async def test_a_restored_session_is_as_old_as_it_was(tmp_path: Path, world: World) -> None:
    """It ends when it would have ended without the restart."""
    v1, client = world.target("v1"), world.client()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1, timeout=9.9)
        await client.ask()
    edit_sessions(tmp_path, age=9.5)
    async with open_services(tmp_path, world) as room:
        assert restored(room)["count"] == 1
        await until(lambda: room.sessions() == 0)
        assert room.number("sessions_ended_total", reason="idle") == 1


@pytest.mark.parametrize("age", [60.5, 10_000_000])
async def test_sessions_that_are_over_are_not_restored(
    tmp_path: Path, world: World, age: float
) -> None:
    v1, client = world.target("v1"), world.client()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.ask()
    edit_sessions(tmp_path, age)
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 0, "lost": 0}
        assert room.sessions() == 0
        assert await client.ask() == "v1"


async def test_a_session_without_an_answer_is_over_sooner(tmp_path: Path, world: World) -> None:
    v1, client = world.target("v1", silent=True), world.client()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.send()
        await v1.wait_received(1)
    edit_sessions(tmp_path, age=29)
    async with open_services(tmp_path, world) as room:
        assert restored(room)["count"] == 1
    edit_sessions(tmp_path, age=2)
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 0, "lost": 0}
        assert room.sessions() == 0


async def test_a_clock_that_was_set_back(tmp_path: Path, world: World) -> None:
    v1, client = world.target("v1"), world.client()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.ask()
    edit_sessions(tmp_path, age=-100_000)
    async with open_services(tmp_path, world) as room:
        assert restored(room)["count"] == 1
        assert await client.ask() == "v1"
    assert len(v1.sources) == 1


async def test_sessions_on_replaced_targets_end_with_the_proxy(
    tmp_path: Path, world: World
) -> None:
    v1, v2, old, new = world.target("v1"), world.target("v2"), world.client(), world.client()
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", v1)
        assert await old.ask() == "v1"
        await room.begin("game", v2)
        assert [await old.ask(), await new.ask()] == ["v1", "v2"]
    async with open_whole(tmp_path, world) as room:
        assert restored(room)["count"] == 1
        assert [await old.ask(), await new.ask()] == ["v2", "v2"]


async def test_each_datagram_keeps_its_header(tmp_path: Path, world: World) -> None:
    v1, client = world.target("v1", silent=True), world.client("127.0.0.3")
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1, proxy_protocol=True)
        await client.send()
        await v1.wait_received(1)
    async with open_services(tmp_path, world):
        await client.send()
        await v1.wait_received(2)
    header = encode_v2(("127.0.0.3", client.port), (LOCALHOST, world.port), datagram=True)
    assert [received.payload.startswith(header) for received in v1.received] == [True, True]
    assert len(v1.sources) == 1


async def test_ports_that_the_relay_chooses_itself(tmp_path: Path, world: World) -> None:
    """With many sessions it does so, and a restored session has its own all the same."""
    v1, clients = world.target("v1"), [world.client() for _ in range(20)]
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1, limit=20_000)
        for client in clients:
            await client.ask()
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 20, "lost": 0}
        for client in clients:
            await client.ask()
        newcomers = [world.client() for _ in range(20)]
        for client in newcomers:
            await client.ask()
    assert len(v1.sources) == 40


async def test_several_services(tmp_path: Path, world: World) -> None:
    ports = [free_port() for _ in range(3)]
    clients = [world.client(to=(LOCALHOST, port)) for port in ports]
    names = ["one", "two", "three"]
    targets = [world.target(name) for name in names]
    async with open_services(tmp_path, world) as room:
        for name, port, target in zip(names, ports, targets, strict=True):
            await room.deploy(name, target, port=port)
        assert [await client.ask() for client in clients] == names
    async with open_services(tmp_path, world) as room:
        assert [restored(room, name)["count"] for name in names] == [1, 1, 1]
        assert [await client.ask() for client in clients] == names
        await room.services.remove("two")
    async with open_services(tmp_path, world) as room:
        assert [row.name for row in room.rows] == ["one", "three"]
        assert {line["service"] for line in room.lines.of("UDP sessions restored")} == {
            "one",
            "three",
        }
    assert [len(target.sources) for target in targets] == [1, 1, 1]


async def test_a_crash_costs_what_came_since_the_last_save(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_saving, "_SAVE_INTERVAL", 0.02)
    v1, clients = world.target("v1"), [world.client() for _ in range(3)]
    path, crashed = tmp_path / "path", tmp_path / "crashed"
    path.mkdir()

    def has_saved(count: int) -> bool:
        try:
            content = (path / SESSIONS).read_bytes()
        except FileNotFoundError:
            return False
        found = saved_sessions.decode(content).services
        return sum(len(service.records) for service in found) == count * RECORD.size

    async with open_services(path, world) as room:
        await room.deploy("game", v1)
        for number, client in enumerate(clients, 1):
            await client.ask()
            await until(partial(has_saved, number))
        shutil.copytree(path, crashed)
        await room.services.remove("game")
        await until(partial(has_saved, 0))
    sources = v1.sources
    async with open_services(crashed, world) as room:
        assert restored(room) == {"service": "game", "count": 3, "lost": 0}
        for client in clients:
            assert await client.ask() == "v1"
    assert v1.sources == sources


async def test_a_change_is_saved_also_if_the_numbers_are_as_before(
    world: World,
) -> None:
    """Two sessions end and one begins, between two saves."""
    v1 = world.target("v1")
    async with open_services(world=world) as room:
        await room.deploy("game", v1, timeout=0.3)
        gone = [world.client(), world.client()]
        for client in gone:
            await client.ask()
        relay = room.installed().relay
        before = relay.changes
        await until(lambda: room.sessions() == 0)
        await world.client().ask()
        assert relay.changes != before


# Sessions that can't go on


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "flipped"])
async def test_a_damaged_file_of_sessions(tmp_path: Path, world: World, damage: str) -> None:
    v1, client = world.target("v1"), world.client()
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.ask()
    file = tmp_path / SESSIONS
    content = file.read_bytes()
    damaged = {
        "cut": content[:-10],
        "empty": b"",
        "other": b"something else entirely",
        "flipped": content[:40] + bytes([content[40] ^ 1]) + content[41:],
    }
    file.write_bytes(damaged[damage])
    async with open_whole(tmp_path, world) as room:
        (line,) = room.lines.of("UDP sessions can't be restored")
        assert str(file) in str(line), "whose file that is"
        assert "damaged" in line["error"] or "does not begin" in line["error"]
        assert room.sessions() == 0
        assert await client.ask() == "v1"
    async with open_whole(tmp_path, world) as room:
        assert restored(room)["count"] == 1


async def test_a_file_of_sessions_that_can_not_be_read(tmp_path: Path, world: World) -> None:
    v1 = world.target("v1")
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", v1)
    (tmp_path / SESSIONS).unlink()
    (tmp_path / SESSIONS).mkdir()
    async with open_whole(tmp_path, world) as room:
        (line,) = room.lines.of("UDP sessions can't be restored")
        assert "it is not a regular file" in line["error"]
        assert await room.client().ask() == "v1"
    # Nor could they be saved, which did not keep the proxy from stopping.
    assert len(room.lines.of("UDP sessions not saved")) == 1


async def test_a_damaged_state_is_not_ignored(tmp_path: Path, world: World) -> None:
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", world.target("v1"))
    (tmp_path / "kamal-proxy-udp.state").write_bytes(b"[{")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_whole(tmp_path, world):
            pass
    assert caught.group_contains(StateError, match=r"the saved state .*/kamal-proxy-udp\.state")


async def test_a_source_port_that_is_taken(tmp_path: Path, world: World) -> None:
    v1, clients = world.target("v1"), [world.client() for _ in range(2)]
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        for client in clients:
            await client.ask()
    lost, kept = (each.source for each in v1.received)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", lost))
        async with open_services(tmp_path, world) as room:
            assert restored(room) == {"service": "game", "count": 1, "lost": 1}
            assert [await client.ask() for client in clients] == ["v1", "v1"]
    assert v1.received[2].source not in (lost, kept), "a new session"
    assert v1.received[3].source == kept


async def test_more_sessions_than_there_may_be(tmp_path: Path, world: World) -> None:
    v1, clients = world.target("v1"), [world.client() for _ in range(5)]
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        for client in clients:
            await client.ask()
    state = tmp_path / "kamal-proxy-udp.state"
    state.write_bytes(state.read_bytes().replace(b'"max_sessions":10000', b'"max_sessions":3'))
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 3, "lost": 2}
        assert room.sessions() == 3


async def test_sessions_of_a_target_that_is_none_any_more(tmp_path: Path, world: World) -> None:
    v1, v2, client = world.target("v1"), world.target("v2"), world.client()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.ask()
    state = tmp_path / "kamal-proxy-udp.state"
    state.write_bytes(state.read_bytes().replace(str(v1).encode(), str(v2).encode()))
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 0, "lost": 1}
        assert await client.ask() == "v2"


async def test_records_that_contradict_each_other(tmp_path: Path, world: World) -> None:
    """Two of one client; one that came by an address on which nobody listens."""
    v1, client = world.target("v1"), world.client()

    def change(records: list[list[Any]]) -> None:
        (record,) = records
        source = 6
        twin, stray = list(record), list(record)
        twin[source] = stray[source] = free_port()
        stray[1] = socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.77")
        records += [twin, stray]

    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.ask()
    edit_sessions(tmp_path, change=change)
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 1, "lost": 2}
        assert await client.ask() == "v1"
        assert room.sessions() == 1


async def test_a_name_that_can_not_be_resolved_yet(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sessions know the address; new ones wait until the name service does."""
    v1, client = world.target("v1"), world.client()
    port, knows = v1.port, True

    async def resolve(host: str, *_: object) -> list[tuple[socket.AddressFamily, Any]]:
        assert host == "game-1"
        if not knows:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, (LOCALHOST, port))]

    monkeypatch.setattr(lookups, "resolve", resolve)
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", f"game-1:{port}")
        assert await client.ask() == "v1"
    knows = False
    async with open_services(tmp_path, world) as room:
        assert restored(room) == {"service": "game", "count": 1, "lost": 0}
        assert await client.ask() == "v1"
        knows = True
        assert await world.client().ask() == "v1"
    assert len(v1.sources) == 2


# Health, ports


async def test_restored_targets_serve_at_once_and_are_probed(tmp_path: Path, world: World) -> None:
    v1, v2 = world.target("v1"), world.target("v2")
    for target in (v1, v2):
        target.open_tcp()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1, v2, check={"method": "tcp"})
    assert v1.tcp is not None
    v1.tcp.close()
    async with open_services(tmp_path, world) as room:
        assert room.row("game").healthy == (str(v1), str(v2))
        await until(lambda: room.row("game").healthy == (str(v2),))
        assert {await world.client().ask() for _ in range(10)} == {"v2"}


async def test_a_port_that_is_taken_at_the_start(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other services serve; this one does as soon as it can."""
    monkeypatch.setattr(services, "_LISTEN_AGAIN", 0.05)
    v1, v2, port = world.target("v1"), world.target("v2"), free_port()
    async with open_whole(tmp_path, world) as room:
        await room.deploy("game", v1)
        await room.deploy("other", v2, port=port)
    with held_port(world.port) as process:
        async with open_whole(tmp_path, world) as room:
            (line,) = room.lines.of("UDP service can't listen yet")
            assert line["service"] == "game"
            assert f"(process {process})" in line["error"]
            assert await world.client(to=(LOCALHOST, port)).ask() == "v2"
            assert [row.name for row in room.rows] == ["game", "other"]
    assert not room.lines.of("UDP service listens")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((LOCALHOST, world.port))
        async with open_whole(tmp_path, world) as room:
            assert room.lines.of("UDP service can't listen yet")
            holder.close()
            await until(lambda: room.lines.of("UDP service listens"))
            assert room.lines.of("UDP service listens") == [{"service": "game", "port": world.port}]
            assert await world.client().ask() == "v1"
            await room.deploy("game", v2)
            assert await world.client().ask() == "v2"


async def test_sessions_wait_until_their_port_is_free(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a further restart."""
    v1, client = world.target("v1"), world.client()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await client.ask()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((LOCALHOST, world.port))
        async with open_services(tmp_path, world) as room:
            assert room.lines.of("UDP service can't listen yet")
        monkeypatch.setattr(services, "_LISTEN_AGAIN", 0.05)
        async with open_services(tmp_path, world) as room:
            holder.close()
            await until(lambda: room.lines.of("UDP sessions restored"))
            assert restored(room) == {"service": "game", "count": 1, "lost": 0}
            assert await client.ask() == "v1"
    assert len(v1.sources) == 1


async def test_what_comes_during_the_start_waits_for_the_sessions(
    tmp_path: Path, world: World
) -> None:
    """Its client would get a new session, from a port that the target does not know."""
    v1, clients = world.target("v1"), [world.client() for _ in range(150)]
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        for client in clients:
            await client.ask()
    sources = v1.sources
    async with trio.open_nursery() as nursery:
        sending = trio.CancelScope()

        async def send() -> None:
            with sending:
                while True:
                    await clients[-1].send()

        nursery.start_soon(send)
        async with open_services(tmp_path, world) as room:
            sending.cancel()
            assert restored(room) == {"service": "game", "count": 150, "lost": 0}
            last = await clients[-1].send()
            while not (await clients[-1].receive()).endswith(last):
                pass
    assert v1.sources == sources


async def test_a_deploy_takes_the_port_as_soon_as_it_is_free(tmp_path: Path, world: World) -> None:
    v1, v2 = world.target("v1"), world.target("v2")
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((LOCALHOST, world.port))
        async with open_services(tmp_path, world) as room:
            holder.close()
            await room.deploy("game", v2)
            assert await world.client().ask() == "v2"
            await room.deploy("game", v1)
            assert await world.client().ask() == "v1"
            await room.services.remove("game")
            assert is_free(world.port)


async def test_a_service_that_does_not_listen_can_be_moved_and_removed(
    tmp_path: Path, world: World
) -> None:
    v1, port = world.target("v1"), free_port()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((LOCALHOST, world.port))
        async with open_services(tmp_path, world) as room:
            await room.deploy("game", v1, port=port)
            assert await world.client(to=(LOCALHOST, port)).ask() == "v1"
        async with open_services(tmp_path, world) as room:
            assert await world.client(to=(LOCALHOST, port)).ask() == "v1"
            await room.deploy("other", v1, port=free_port())
            await room.services.remove("game")
            assert [row.name for row in room.rows] == ["other"]


async def test_the_port_of_a_service_that_does_not_listen_is_no_other_services(
    tmp_path: Path, world: World
) -> None:
    v1, v2 = world.target("v1"), world.target("v2")
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((LOCALHOST, world.port))
        async with open_services(tmp_path, world) as room:
            holder.close()
            with pytest.raises(PortConflictError, match=f"port {world.port} is used by another"):
                await room.deploy("other", v2)
            assert is_free(world.port)


async def test_a_state_with_one_port_for_two_services(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No deploy makes that, but nobody else must be kept from serving by it."""
    monkeypatch.setattr(services, "_LISTEN_AGAIN", 0.05)
    v1, v2, port = world.target("v1"), world.target("v2"), free_port()
    async with open_services(tmp_path, world) as room:
        await room.deploy("game", v1)
        await room.deploy("other", v2, port=port)
    state = tmp_path / "kamal-proxy-udp.state"
    state.write_bytes(state.read_bytes().replace(b":%d," % port, b":%d," % world.port))
    async with open_services(tmp_path, world) as room:
        (line,) = room.lines.of("UDP service can't listen yet")
        assert line == {
            "service": "other",
            "error": f"port {world.port} is used by another service",
        }
        assert await world.client().ask() == "v1"
        await room.services.remove("game")
        await until(lambda: room.lines.of("UDP service listens"))
        assert await world.client().ask() == "v2"


# The log


@pytest.mark.parametrize("debug", [True, False])
async def test_sessions_are_logged_at_debug_level_only(world: World, debug: bool) -> None:
    async with open_services(world=world, debug=debug) as room:
        await room.deploy("game", world.target("v1"))
        client = world.client("127.0.0.5")
        await client.ask()
        await client.ask()
        lines = room.lines.of("UDP session begins")
        address = f"127.0.0.5:{client.port}"
        assert lines == ([{"service": "game", "client": address}] if debug else [])
