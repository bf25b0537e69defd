"""What is shed at a limit, and that live sessions are not: of sessions, sockets and ports."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy.errors import KamalProxyError
from kamal_proxy.udp import descriptors, running
from tests.ports import free_port, is_free
from tests.scripted import LOCALHOST
from tests.udp.serving import (
    UNANSWERED,
    Client,
    Received,
    Room,
    open_services,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


FAIR_CHANCE = 1.05  # seconds; a target has so long to answer before a session can be evicted


def dropped(room: Room, reason: str) -> int:
    return room.number("dropped_datagrams_total", reason=reason)


def adds_up(room: Room) -> bool:
    """Return whether each session that ever began is live or has ended for a reason."""
    ended = sum(room.numbers("sessions_ended_total").values())
    return room.number("sessions_created_total") == room.sessions() + ended


async def established(room: Room, count: int) -> list[Client]:
    """Return clients whose sessions go both ways."""
    clients = [room.client() for _ in range(count)]
    for client in clients:
        await client.ask()
    return clients


@contextmanager
def strangers(count: int) -> Iterator[list[socket.socket]]:
    """Open sockets that nobody knows."""
    with ExitStack() as stack:
        found = []
        for number in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((f"127.0.{2 + number // 200}.1", 0))
            found.append(sock)
        yield found


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open so many files more, and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 0
    while count or is_open(limit):
        count -= not is_open(limit)
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Sessions


async def test_a_flood_of_strangers_costs_no_established_session_a_datagram() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, limit=60)
        clients = await established(room, 40)
        sources = v1.sources
        flood = 0

        def unanswered() -> list[Received]:
            return [each for each in v1.received if each.payload == UNANSWERED]

        with strangers(400) as socks:
            for turn in range(5):
                for number, sock in enumerate(socks):
                    sock.sendto(UNANSWERED, (LOCALHOST, room.port))
                    flood += 1
                    if number % 20 == turn:
                        # None is lost: this asks each client once, and waits for its answer.
                        await clients[number // 20].ask()
                        await clients[20 + number // 20].ask()
            await until(
                lambda: (
                    len(unanswered())
                    + dropped(room, "newcomer_backlog")
                    + dropped(room, "session_limit")
                    == flood
                )
            )
        for client in clients:
            assert await client.ask() == "v1"
        assert len({each.source for each in v1.received[-40:]} & sources) == 40
        assert room.sessions() == 60
        assert adds_up(room)
        # Who has had no answer for a second makes room for those who come later.
        await trio.sleep(FAIR_CHANCE)
        for _ in range(20):
            assert await room.client().ask() == "v1"
        assert room.number("sessions_ended_total", reason="evicted") >= 20
        for client in clients:
            assert await client.ask() == "v1"
        assert len({each.source for each in v1.received[-40:]} & sources) == 40
        assert adds_up(room)


async def test_strangers_are_turned_away_when_all_sessions_go_both_ways() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, limit=10)
        clients = await established(room, 10)
        with strangers(300) as socks:
            for sock in socks:
                sock.sendto(b"hello", (LOCALHOST, room.port))
            await until(lambda: dropped(room, "session_limit") == 300)
        for client in clients:
            assert await client.ask() == "v1"
        assert len(v1.sources) == 10
        assert room.number("sessions_ended_total", reason="evicted") == 0
        assert room.sessions() == 10
        # Said, but not as often as strangers like.
        (line,) = room.lines.of("UDP sessions shed")
        assert line["reason"] == "session_limit"


async def test_who_was_evicted_comes_back_with_the_next_datagram() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, limit=2)
        first, second, third = (room.client() for _ in range(3))
        for client in (first, second, third):
            await client.sock.sendto(UNANSWERED, client.to)
        await until(lambda: len(v1.received) + dropped(room, "session_limit") == 3)
        assert room.number("sessions_ended_total", reason="evicted") == 0, "too early"
        await trio.sleep(FAIR_CHANCE)
        await third.sock.sendto(UNANSWERED, third.to)
        await v1.wait_received(3)
        assert room.number("sessions_ended_total", reason="evicted") == 1
        assert await second.ask() == "v1", "the oldest was evicted, and that was not this one"
        assert len(v1.sources) == 3
        # The oldest now is the third, which has had no second yet.
        shed = dropped(room, "session_limit")
        await first.send()
        await until(lambda: dropped(room, "session_limit") == shed + 1)
        assert room.sessions() == 2


async def test_a_lower_limit_ends_no_session() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        clients = await established(room, 5)
        await room.begin("game", v1, limit=2)
        for client in clients:
            assert await client.ask() == "v1"
        await room.client().send()
        await until(lambda: dropped(room, "session_limit") == 1)
        assert room.row("game").max_sessions == 2
        await room.begin("game", v1, limit=6)
        assert await room.client().ask() == "v1"


async def test_room_that_sessions_leave_is_used_again() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), limit=3, timeout=0.2)
        for _ in range(2):
            await established(room, 3)
            await until(lambda: room.sessions() == 0)
        assert room.number("sessions_created_total") == 6
        assert room.number("sessions_ended_total", reason="idle") == 6


async def test_many_newcomers_at_once() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        with strangers(300) as socks:
            for sock in socks:
                sock.sendto(b"hello", (LOCALHOST, room.port))
            await v1.wait_received(300)
            await until(lambda: room.number("datagrams_total", direction="to_client") == 300)
            assert [sock.recv(100) for sock in socks] == [b"v1:hello"] * 300
        assert room.numbers("dropped_datagrams_total") == {}


async def test_a_newcomer_that_sends_much_at_once() -> None:
    """What it sends before it has a session is kept up to a limit, and in order."""
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        with strangers(1) as (sock,):
            sent = [b"%d" % number * (1 + number % 3) for number in range(40)]
            for payload in sent:
                sock.sendto(payload, (LOCALHOST, room.port))
            await until(lambda: len(v1.received) + dropped(room, "newcomer_backlog") == 40)
        received = [each.payload for each in v1.received]
        assert len(received) >= 16
        assert received == sent[: len(received)]


# Sockets


async def test_without_a_descriptor_newcomers_are_turned_away() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        clients = await established(room, 5)
        more = [room.client() for _ in range(10)]
        with descriptors_left(3):
            for client in more[:3]:
                assert await client.ask() == "v1"
            for client in more[3:]:
                await client.send()
            await until(lambda: dropped(room, "no_socket") == 7)
            for client in (*clients, *more[:3]):
                assert await client.ask() == "v1"
        (line,) = room.lines.of("UDP sessions shed")
        assert line["reason"] == "no_socket"
        assert os.strerror(errno.EMFILE) in line["error"]
        assert await more[3].ask() == "v1"
        assert room.sessions() == 9
        assert adds_up(room)


async def test_without_a_descriptor_the_oldest_unanswered_session_makes_room() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        clients = await established(room, 5)
        unanswered, newcomers = [room.client() for _ in range(3)], [room.client() for _ in range(4)]
        with descriptors_left(3):
            for client in unanswered:
                await client.sock.sendto(UNANSWERED, client.to)
            await v1.wait_received(8)
            await trio.sleep(FAIR_CHANCE)
            for client in newcomers[:3]:
                assert await client.ask() == "v1"
            assert room.number("sessions_ended_total", reason="evicted") == 3
            await newcomers[3].send()
            await until(lambda: dropped(room, "no_socket") == 1)
            for client in (*clients, *newcomers[:3]):
                assert await client.ask() == "v1"
        assert adds_up(room)


async def test_a_session_without_affinity_needs_a_descriptor_for_each_target() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), room.target("v2"), affinity=False)
        clients = [room.client() for _ in range(3)]
        with descriptors_left(5):
            for client in clients[:2]:
                assert {await client.ask(), await client.ask()} == {"v1", "v2"}
            await clients[2].send()
            await until(lambda: dropped(room, "no_socket") == 1)
            assert {await clients[0].ask(), await clients[0].ask()} == {"v1", "v2"}
        assert {await clients[2].ask(), await clients[2].ask()} == {"v1", "v2"}


async def test_a_deploy_without_a_descriptor_changes_nothing() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        client, port = room.client(), free_port()
        assert await client.ask() == "v1"
        v2 = room.target("v2")
        with descriptors_left(0), pytest.raises(KamalProxyError, match="too many"):
            await room.deploy("other", v2, port=port, limit=1)
        assert [row.name for row in room.rows] == ["game"]
        assert is_free(port)
        assert await client.ask() == "v1"
        await room.deploy("other", v2, port=port)
        assert await room.client(to=(LOCALHOST, port)).ask() == "v2"


async def test_too_few_descriptors_for_all_sessions_are_told_at_the_deploy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def available(wanted: int, *, keep: int) -> int:
        asked.append(wanted)
        return min(wanted, 500)

    monkeypatch.setattr(descriptors, "available_descriptors", available)
    async with open_services() as room:
        message = "The limit of open files allows fewer UDP sessions than --max-sessions"
        targets = [room.target("v1"), room.target("v2")]
        await room.deploy("game", *targets, limit=300)
        assert not room.lines.of(message)
        port = free_port()
        await room.deploy("other", *targets, limit=100, affinity=False, port=port)
        await room.deploy("other", *targets, limit=200, affinity=False, port=port)
        await room.deploy("other", *targets, limit=200, affinity=False, port=port)
        await room.deploy("other", *targets, limit=150, affinity=False, port=port)
        sessions = [300, 300 + 2 * 100, 300 + 2 * 200, 300 + 2 * 200, 300 + 2 * 150]
        listeners = [1, 2, 2, 2, 2]
        assert asked == [sum(both) for both in zip(sessions, listeners, strict=True)], (
            "all services share them"
        )
        assert room.lines.of(message) == [
            {"service": "other", "wanted": 500, "available": 498},
            {"service": "other", "wanted": 700, "available": 498},
        ], "once, and again if it becomes worse"
        # When there were enough in between, it is news again.
        await room.deploy("other", *targets, limit=10, affinity=False, port=port)
        await room.deploy("other", *targets, limit=100, affinity=False, port=port)
        assert [line["wanted"] for line in room.lines.of(message)] == [500, 700, 500]


# Source ports


async def test_source_ports_are_used_once_for_each_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above many sessions the relay chooses them, from the kernel's range: here a small one."""
    low = free_port()
    while not all(is_free(low + number) for number in range(10)):
        low = free_port()
    monkeypatch.setattr(running, "_port_range", lambda: (low, low + 9))
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2, limit=20_000)
        served: list[Client] = []
        for _ in range(60):
            client = room.client()
            shed = dropped(room, "no_socket")
            payload = await client.send()
            await until(partial(is_settled, room, len(served) + shed + 1))
            if dropped(room, "no_socket") == shed:
                assert (await client.receive()).endswith(payload)
                served.append(client)
        assert v1.sources == v2.sources == set(range(low, low + 10))
        assert len(served) == room.sessions() == 20
        (line,) = room.lines.of("UDP sessions shed")
        assert line["reason"] == "no_socket"
        assert {await client.ask() for client in served} == {"v1", "v2"}


def is_settled(room: Room, count: int) -> bool:
    """Return whether so many datagrams were answered, or dropped for want of a socket."""
    answered = room.number("datagrams_total", direction="to_client")
    return answered + dropped(room, "no_socket") == count
