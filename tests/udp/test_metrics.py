"""What metrics show of UDP services, after real traffic: every metric, every label."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy import PauseOptions, StopOptions
from kamal_proxy.proxy_protocol import encode_v2
from tests.ports import free_port
from tests.scripted import LOCALHOST
from tests.udp.serving import UNANSWERED, Room, open_services, open_whole, until

if TYPE_CHECKING:
    from pathlib import Path


def series(room: Room, name: str) -> dict[tuple[str, ...], int]:
    """Return all series of a metric by the values of their labels but the service's, sorted."""
    return {
        tuple(value for label, value in sorted(labels) if label != "service"): number
        for labels, number in room.numbers(name).items()
    }


def dropped(room: Room) -> dict[tuple[str, ...], int]:
    return series(room, "dropped_datagrams_total")


def ended(room: Room) -> dict[tuple[str, ...], int]:
    return series(room, "sessions_ended_total")


async def test_a_service_at_work() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1)
        old, new = room.client(), room.client()
        for _ in range(3):
            await old.ask()
        await room.begin("game", v2)
        await new.ask()
        assert series(room, "sessions") == {("active",): 1, ("draining",): 1}
        assert series(room, "target_healthy") == {(str(v2),): 1}
        assert series(room, "sessions_created_total") == {(): 2}
        assert series(room, "sessions_moved_total") == {(): 0}
        assert series(room, "kernel_dropped_datagrams_total") == {(): 0}
        assert series(room, "datagrams_total") == {("to_target",): 4, ("to_client",): 4}
        sent = sum(len(each.payload) for target in (v1, v2) for each in target.received)
        assert series(room, "bytes_total") == {
            ("to_target",): sent,
            ("to_client",): sent + 4 * len("v1:"),
        }
        assert ended(room) == {}
        assert dropped(room) == {}


async def test_each_service_has_its_own() -> None:
    async with open_services() as room:
        port = free_port()
        await room.deploy("game", room.target("v1"))
        await room.deploy("other", room.target("v2"), port=port)
        await room.client(to=(LOCALHOST, port)).ask()
        for service, count in (("game", 0), ("other", 1)):
            assert room.number("sessions_created_total", service=service) == count
            assert room.number("sessions", service=service, state="active") == count
            for direction in ("to_target", "to_client"):
                number = room.number("datagrams_total", service=service, direction=direction)
                assert number == count


async def test_the_header_before_a_datagram_counts() -> None:
    async with open_services() as room:
        v1 = room.target("v1", silent=True)
        await room.deploy("game", v1, proxy_protocol=True)
        client = room.client()
        payload = await client.send()
        await v1.wait_received(1)
        header = encode_v2((LOCALHOST, client.port), (LOCALHOST, room.port), datagram=True)
        number = room.number("bytes_total", direction="to_target")
        assert number == len(header) + len(payload) == len(v1.received[0].payload)


async def test_empty_datagrams_count() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        client = room.client()
        await client.sock.sendto(b"", client.to)
        assert await client.receive() == b"v1:"
        assert series(room, "datagrams_total") == {("to_target",): 1, ("to_client",): 1}
        assert series(room, "bytes_total") == {("to_target",): 0, ("to_client",): 3}


async def test_health_of_targets() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        v1.open_tcp()
        await room.deploy("game", v1, v2, check={"method": "tcp", "interval": 0.05}, force=True)
        await until(lambda: room.number("target_healthy", target=str(v1)) == 1)
        assert room.number("target_healthy", target=str(v2)) == 0
        v2.open_tcp()
        await until(lambda: room.number("target_healthy", target=str(v2)) == 1)
        assert b'kamal_proxy_probes_total{result="failed",service="game"}' in room.metrics()
        assert b'kamal_proxy_probes_total{result="ok",service="game"}' in room.metrics()


async def test_deploys() -> None:
    async with open_services() as room:
        for _ in range(2):
            await room.deploy("game", room.target("v1"))
        failing = room.start("game", room.target("v2"), check={"method": "tcp"}, deploy_timeout=0)
        await failing.ended.wait()
        name = b"kamal_proxy_deploy_duration_seconds_count"
        assert name + b'{result="ok",service="game"} 2.0' in room.metrics()
        assert name + b'{result="failed",service="game"} 1.0' in room.metrics()


# Why sessions end


async def test_ends_by_silence() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, timeout=0.2)
        client = room.client()
        await client.sock.sendto(UNANSWERED, client.to)
        await room.client().ask()
        await until(lambda: room.sessions() == 0)
        assert ended(room) == {("idle",): 1, ("unanswered",): 1}


async def test_ends_by_others() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, limit=1)
        client = room.client()
        await client.sock.sendto(UNANSWERED, client.to)
        await v1.wait_received(1)
        await trio.sleep(1.05)  # in which the target could have answered
        await room.client().ask()
        assert ended(room) == {("evicted",): 1}
        await room.deploy("game", v2)
        assert ended(room) == {("evicted",): 1, ("cut",): 1}
        await room.client().ask()
        await room.services.remove("game")
        assert ended(room) == {("evicted",): 1, ("cut",): 1, ("removed",): 1}
        assert series(room, "sessions_created_total") == {(): 3}


# Why datagrams are dropped


async def test_drops_of_a_held_service() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        client = room.client()
        await room.services.pause("game", PauseOptions())
        await client.send()
        await until(lambda: dropped(room) == {("paused",): 1})
        await room.services.stop_service("game", StopOptions())
        await client.send()
        await client.send()
        await until(lambda: dropped(room) == {("paused",): 1, ("stopped",): 2})


async def test_drops_without_a_target() -> None:
    async with open_services() as room:
        targets = [room.target("v1"), room.target("v2")]
        await room.deploy("game", *targets, check={"method": "tcp"}, force=True)
        await until(lambda: room.lines.of("Healthcheck failed"))
        for target in targets:
            target.open_tcp()
        await until(lambda: len(room.row("game").healthy) == 2)
        for target in targets:
            assert target.tcp is not None
            target.tcp.close()
        await until(lambda: room.row("game").healthy == ())
        await room.client().send()
        await until(lambda: dropped(room) == {("no_target",): 1})
        (line,) = room.lines.of("UDP sessions shed")
        assert line["reason"] == "no_target"


async def test_drops_at_limits() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, limit=1)
        await room.client().ask()
        await room.client().send()
        await until(lambda: dropped(room) == {("session_limit",): 1})


async def test_drops_of_what_becomes_too_long_with_a_header() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, proxy_protocol=True)
        client = room.client()
        await client.sock.sendto(bytes(65_507), client.to)
        await until(lambda: dropped(room) == {("too_long",): 1})
        await client.send()
        assert (await client.receive()).startswith(b"v1:")


async def test_sessions_that_have_moved() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2)
        v1.die()
        while not room.number("sessions_moved_total"):
            await room.client().ask()
        assert series(room, "sessions_moved_total") == {(): 1}
        assert ended(room) == {}, "a session that moves goes on"
        assert room.sessions() == room.number("sessions_created_total")


async def test_drops_of_the_kernel() -> None:
    """While nobody reads, the listener's buffer overflows; the kernel tells how often."""
    size, count = 60_000, 600
    async with open_services() as room:
        v1 = room.target("v1", silent=True)
        await room.deploy("game", v1)
        client = room.client()
        await client.send()
        await v1.wait_received(1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(count):  # without letting the relay have a turn
                sender.sendto(bytes(size), (LOCALHOST, room.port))

        def kernel_drops() -> int:
            return room.number("kernel_dropped_datagrams_total")

        # What came after the last that was read is told with the next one.
        while not kernel_drops():
            await client.send()
        assert kernel_drops() < count


# Services that are gone


async def test_counters_outlive_their_service(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        await room.services.pause("game", PauseOptions())
        await room.client().send()
        await until(lambda: dropped(room))
        await room.services.resume("game")
        await room.client().ask()
        await room.services.remove("game")
        # A gauge of what is no more would be wrong; a counter that vanishes would lose something.
        assert series(room, "sessions") == {}
        assert series(room, "target_healthy") == {}
        counted = {
            name: series(room, name)
            for name in (
                "sessions_created_total",
                "sessions_ended_total",
                "datagrams_total",
                "dropped_datagrams_total",
            )
        }
        assert counted == {
            "sessions_created_total": {(): 1},
            "sessions_ended_total": {("removed",): 1},
            "datagrams_total": {("to_target",): 1, ("to_client",): 1},
            "dropped_datagrams_total": {("paused",): 1},
        }
        await room.deploy("game", v1)
        assert series(room, "sessions_created_total") == {(): 1}
        await room.client().ask()
        assert series(room, "sessions_created_total") == {(): 2}
        assert series(room, "sessions") == {("active",): 1, ("draining",): 0}
        assert series(room, "datagrams_total") == {("to_target",): 2, ("to_client",): 2}


async def test_a_first_deploy_that_failed_left_no_series() -> None:
    async with open_services() as room:
        failing = room.start("game", room.target("v1"), check={"method": "tcp"}, deploy_timeout=0)
        await failing.ended.wait()
        assert b"kamal_proxy_udp" not in room.metrics()


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_a_whole_proxy_shows_them(accept: str) -> None:
    async with open_whole() as room:
        await room.deploy("game", room.target("v1"))
        await room.client().ask()
        text = room.proxy.metrics(accept)[0].decode()
        names = {
            "sessions": "gauge",
            "target_healthy": "gauge",
            "sessions_created": "counter",
            "sessions_moved": "counter",
            "goodbyes": "counter",
            "cut_unsaid": "counter",
            "datagrams": "counter",
            "bytes": "counter",
            "kernel_dropped_datagrams": "counter",
        }
        for name, kind in names.items():
            suffix = "_total" if kind == "counter" and not accept else ""
            assert f"# TYPE kamal_proxy_udp_{name}{suffix} {kind}\n" in text
            assert f"# HELP kamal_proxy_udp_{name}{suffix} " in text
