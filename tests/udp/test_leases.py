"""Services with ranges of ports, with real sockets: all ports are bound or none, and given back."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
import threading
import weakref
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.errors import (
    DeployFailedError,
    ListenError,
    PortConflictError,
    ShuttingDownError,
)
from kamal_proxy.udp import descriptors, leases, ports, running, services
from tests.deploying import run_with_every_cancellation, save_in_this_thread
from tests.pairs import Steps
from tests.ports import free_port, is_free
from tests.scripted import LOCALHOST
from tests.udp.serving import (
    PATIENT,
    Room,
    World,
    held_port,
    open_services,
    open_world,
    until,
)
from tests.udp.test_limits import descriptors_left

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

TCP = {"method": "tcp", "interval": 0.05}
SERVER = "127.0.0.2"  # a media server has the proxy's ports, so it needs an address of its own


def free_range(count: int) -> range:
    """Return so many ports in a row, from an even one on, that are free on all addresses."""
    while True:
        first = random.randrange(10_000, 30_000, 2)
        if all(map(is_free, range(first, first + count))):
            return range(first, first + count)


def text(span: range) -> str:
    return f"{span[0]}-{span[-1]}"


def media(*spans: range, **options: Any) -> dict[str, Any]:
    """Return the options of a deploy with these ranges."""
    return {
        "protocol": "webrtc",
        "port": 0,
        "port_ranges": tuple(map(text, spans)),
    } | options


def server(world: World | Room, name: str, port: int) -> str:
    """Let a media server live, which answers on one of the ports.

    Returns:
        It as a target, whose own port carries nothing.
    """
    world.target(name, host=SERVER, port=port)
    return f"{SERVER}:{free_port()}"


def free(ports: Iterable[int]) -> list[int]:
    """Return the ports that nobody has on the proxy's address."""
    found = []
    for port in ports:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((LOCALHOST, port))
            found.append(port)
    return found


def sockets_on(ports: Iterable[int]) -> dict[int, list[str]]:
    """Return what the kernel knows the sockets by that are bound to some ports of localhost."""
    wanted = {f":{port:04X}": port for port in ports}
    found: dict[int, list[str]] = {port: [] for port in wanted.values()}
    for name in ("udp", "udp6"):
        with open(f"/proc/net/{name}", encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                port = wanted.get(fields[1][-5:])
                if port is not None:
                    found[port].append(fields[9])
    return found


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as opened:
        yield opened


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let others run after every second port, so that there is a between."""
    monkeypatch.setattr(leases, "_AT_ONCE", 2)


# What is bound


async def test_each_port_of_a_range_leads_to_the_one_of_the_same_number(tmp_path: Path) -> None:
    span, single = free_range(6), free_port()
    async with open_services(tmp_path) as room:
        target = server(room, "v1", span[3])
        server(room, "mux", single)
        await room.deploy("calls", target, **media(span, port=single))
        assert free([*span, single]) == []
        for port, name in ((span[3], "v1"), (single, "mux")):
            client = room.client(to=(LOCALHOST, port))
            assert [await client.ask() for _ in range(3)] == [name] * 3
        row = room.row("calls")
        assert row.udp_ports == (f"udp/{single}", f"udp/{text(span)}")
        assert (row.protocol, row.in_flight, row.targets) == ("webrtc", 2, (target,))
        fields = {"service": "calls", "targets": [target], "port": single}
        assert room.lines.of("Deployed UDP") == [fields | {"port_ranges": [text(span)]}]
        await room.services.remove("calls")
        assert free([*span, single]) == [*span, single]
        assert room.saved == {}


async def test_two_ranges_and_no_single_port() -> None:
    some, others = free_range(3), free_range(5)
    async with open_services() as room:
        target = server(room, "v1", others[4])
        await room.deploy("calls", target, **media(some, others))
        assert await room.client(to=(LOCALHOST, others[4])).ask() == "v1"
        assert room.row("calls").udp_ports == (f"udp/{text(some)}", f"udp/{text(others)}")
        assert free([*some, *others]) == []
        assert is_free(8080), "the default is for plain UDP only"
        assert room.lines.of("Deployed UDP")[0].keys() == {"service", "targets", "port_ranges"}


async def test_all_addresses_have_all_ports() -> None:
    span, second = free_range(4), "127.0.0.3"
    async with open_services(bind=(LOCALHOST, second)) as room:
        await room.deploy("calls", server(room, "v1", span[1]), **media(span))
        for address in (LOCALHOST, second):
            assert await room.client(to=(address, span[1])).ask() == "v1"
        await room.services.remove("calls")
        assert free(span) == [*span]


@pytest.mark.parametrize("policy", ["adjacent", "separate-range"])
async def test_a_pair_in_use_is_shown(policy: str) -> None:
    some, others = free_range(2), free_range(2)
    rtp, rtcp = (some[0], some[1]) if policy == "adjacent" else (some[1], others[1])
    async with open_services() as room:
        target = server(room, "v1", rtp)
        server(room, "v1", rtcp)
        await room.deploy("calls", target, **media(some, others, rtcp_policy=policy))
        assert await room.client(to=(LOCALHOST, rtp)).ask() == "v1"
        assert (room.row("calls").pairs_in_use, room.row("calls").in_flight) == (0, 1)
        assert await room.client(to=(LOCALHOST, rtcp)).ask() == "v1"
        assert (room.row("calls").pairs_in_use, room.row("calls").in_flight) == (1, 1)


async def test_everything_else_runs_while_many_are_bound_and_closed() -> None:
    span, turns = free_range(1000), 0
    async with open_services() as room, trio.open_nursery() as nursery:
        target = server(room, "v1", span[0])

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(count_turns)
        await room.deploy("calls", target, **media(span))
        assert turns >= len(span) / leases._AT_ONCE
        turns = 0
        await room.services.remove("calls")
        assert turns >= len(span) / leases._AT_ONCE - 1
        nursery.cancel_scope.cancel()


# What can't be bound


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("redeploy", [False, True])
async def test_a_taken_port_in_the_middle_leaves_none_bound(tmp_path: Path, redeploy: bool) -> None:
    span = free_range(9)
    async with open_services(tmp_path) as room:
        target = server(room, "v1", span[7])
        before: dict[str, list[str]] = {}
        if redeploy:
            await room.deploy("calls", target, **media(span[:3]))
            before = {"calls": [target]}
        with held_port(span[5]) as process:
            with pytest.raises(ListenError) as caught:
                await room.deploy("calls", target, **media(span))
            assert free(span) == [*(span[3:5] if redeploy else span[:5]), *span[6:]]
        message = f"listen udp {LOCALHOST}:{span[5]}: bind: address already in use by "
        assert str(caught.value).startswith(message)
        assert str(caught.value).endswith(f"(process {process})")
        assert room.saved == before
        assert [row.udp_ports for row in room.rows] == [(f"udp/{text(span[:3])}",)] * redeploy
        await room.deploy("calls", target, **media(span))
        assert await room.client(to=(LOCALHOST, span[7])).ask() == "v1"


async def test_a_session_of_this_proxy_may_be_in_the_way() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        await room.client().ask()
        (source,) = v1.sources
        with pytest.raises(ListenError) as caught:
            await room.deploy("calls", f"{SERVER}:7880", **media(range(source, source + 1)))
        assert str(caught.value).endswith(
            "address already in use by a session of this proxy, as its port towards its target "
            f"(process {os.getpid()})"
        )
        assert [row.name for row in room.rows] == ["game"]


@pytest.mark.usefixtures("few_at_once")
async def test_no_descriptor_is_left_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others had some that the limit promised."""
    monkeypatch.setattr(ports, "available_descriptors", lambda wanted, *, keep: wanted)
    span = free_range(9)
    async with open_services() as room:
        target = server(room, "v1", span[0])
        with descriptors_left(8), pytest.raises(ListenError) as caught:
            await room.deploy("calls", target, **media(span))
        assert os.strerror(errno.EMFILE).lower() in str(caught.value)
        assert str(caught.value).endswith("; raise the limit of open files (ulimit -n)")
        assert free(span[1:]) == [*span[1:]]
        await room.deploy("calls", target, **media(span))
        assert await room.client(to=(LOCALHOST, span[0])).ask() == "v1"


async def test_ranges_that_are_too_large_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def available(wanted: int, *, keep: int) -> int:
        asked.append((wanted, keep))
        return 10

    monkeypatch.setattr(ports, "available_descriptors", available)
    monkeypatch.setattr(ports, "kept_descriptors", lambda: 500)
    some, others = free_range(5), free_range(8)
    async with open_services(bind=(LOCALHOST, "127.0.0.3")) as room:
        await room.deploy("calls", f"{SERVER}:7880", **media(some))
        with pytest.raises(ListenError) as caught:
            await room.deploy("more", f"{SERVER}:7880", **media(others))
        assert asked == [(10, 600), (26, 600)], "with those that are bound"
        assert str(caught.value).startswith(
            f"port-ranges {text(others)} need a limit of 626 open files, and it is "
        )
        assert free(others) == [*others]
        assert [row.name for row in room.rows] == ["calls"]


async def test_listeners_leave_less_room_for_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "available_descriptors", lambda wanted, *, keep: 6)
    span = free_range(4)
    async with open_services() as room:
        await room.deploy("calls", server(room, "v1", span[0]), **media(span, limit=7))
        clients = [room.client(to=(LOCALHOST, span[0])) for _ in range(3)]
        assert [await client.ask() for client in clients[:2]] == ["v1", "v1"]
        await clients[2].send()
        shed = {"service": "calls", "reason": "no_socket"}
        await until(lambda: room.number("dropped_datagrams_total", **shed) == 1)
        message = "The limit of open files allows fewer UDP sessions than --max-sessions"
        assert room.lines.of(message) == [{"service": "calls", "wanted": 14, "available": 2}]


async def test_how_many_sockets_calls_may_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two each where there are pairs of ports, and more while servers are asked for."""
    asked = []

    def available(wanted: int, *, keep: int) -> int:
        asked.append(wanted)
        return wanted

    monkeypatch.setattr(descriptors, "available_descriptors", available)
    span = free_range(4)
    async with open_services() as room:
        await room.deploy("calls", f"{SERVER}:7880", **media(span, limit=100))
        await room.deploy("calls", f"{SERVER}:7880", **media(port=span[0], limit=100))
        assert asked == [4 + 2 * 100 + 116, 4 + 100 + 116]


async def test_a_port_of_another_service_in_the_range() -> None:
    span = free_range(6)
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), port=span[4])
        with pytest.raises(PortConflictError) as caught:
            await room.deploy("calls", f"{SERVER}:7880", **media(span))
        assert str(caught.value) == f"port {span[4]} is used by another service"
        assert caught.value.details == (f"service game already listens on udp/{span[4]}",)
        assert free(span) == [*span[:4], span[5]]
        await room.deploy("calls", f"{SERVER}:7880", **media(span[:4]))
        with pytest.raises(PortConflictError) as caught:
            await room.deploy("game", room.target("v2"), port=span[2])
        assert str(caught.value) == f"port {span[2]} is used by another service"
        assert caught.value.details == (f"service calls already listens on udp/{text(span[:4])}",)
        assert await room.client(to=(LOCALHOST, span[4])).ask() == "v1"


@pytest.mark.usefixtures("few_at_once")
async def test_a_range_is_claimed_before_it_is_bound() -> None:
    span = free_range(60)
    async with open_services() as room:
        deploying = room.start("calls", f"{SERVER}:7880", **media(span))
        while free(span[:1]):
            await trio.lowlevel.checkpoint()
        assert free(span[-1:]), "it is not bound yet"
        with pytest.raises(PortConflictError):
            await room.deploy("game", room.target("v1"), port=span[-1])
        await deploying.wait()
        assert [row.name for row in room.rows] == ["calls"]


# Giving back


async def test_a_redeploy_keeps_the_ports_that_both_have() -> None:
    span = free_range(12)
    old, new = span[:8], span[4:]
    async with open_services() as room:
        target = server(room, "v1", span[2])
        await room.deploy("calls", target, **media(old))
        client = room.client(to=(LOCALHOST, span[2]))
        assert await client.ask() == "v1"
        before = sockets_on(span[4:8])
        deploying = await room.begin("calls", target, **media(new))
        assert room.row("calls").udp_ports == (f"udp/{text(new)}",)
        assert await client.ask() == "v1", "its port serves it until it has drained"
        assert free(span) == []
        with pytest.raises(PortConflictError):
            await room.deploy("game", room.target("v2"), port=span[2])
        deploying.scope.cancel()
        await room.deploy("calls", target, **media(new))
        assert sockets_on(span[4:8]) == before, "these were never closed"
        await room.services.remove("calls")
        assert free(span) == [*span]


@pytest.mark.usefixtures("few_at_once")
async def test_ports_that_are_being_closed_can_be_had_by_others() -> None:
    """Whoever wants one waits for that, instead of being told that another service has it."""
    span = free_range(60)
    async with open_services() as room:
        v2 = room.target("v2")
        await room.deploy("calls", f"{SERVER}:7880", **media(span))
        await room.deploy("calls", f"{SERVER}:7880", **media(span[:2]))
        assert not free(span[-1:]), "they are closed in the background"
        await room.deploy("game", v2, port=span[-1])
        assert await room.client(to=(LOCALHOST, span[-1])).ask() == "v2"
        assert free(span) == [*span[2:-1]]
        # And by the service itself.
        await room.deploy("game", v2, port=free_port())
        await room.deploy("calls", f"{SERVER}:7880", **media(span))
        await room.deploy("calls", f"{SERVER}:7880", **media(span[:2]))
        await room.deploy("calls", f"{SERVER}:7880", **media(span))
        assert free(span) == []


@pytest.mark.usefixtures("few_at_once")
async def test_a_failed_deploy_gives_its_ports_back() -> None:
    span = free_range(9)
    async with open_services() as room:
        target = server(room, "v1", span[0])
        await room.deploy("calls", target, **media(span[:3]))
        with pytest.raises(DeployFailedError):
            await room.deploy("calls", target, **media(span), check=TCP, deploy_timeout=0.1)
        assert free(span) == [*span[3:]]
        assert await room.client(to=(LOCALHOST, span[0])).ask() == "v1"


@pytest.mark.usefixtures("few_at_once")
async def test_two_deploys_of_one_service_at_a_time() -> None:
    """One fails while both have ports in common; the other one keeps these."""
    span = free_range(40)
    async with open_services() as room:
        target = server(room, "v1", span[20])
        with held_port(span[-1]):
            failing = room.start("calls", target, **media(span))
            good = room.start("calls", target, **media(span[:-1]))
            with pytest.raises(ListenError):
                await failing.wait()
            await good.wait()
        assert free(span) == [span[-1]]
        assert await room.client(to=(LOCALHOST, span[20])).ask() == "v1"


@pytest.mark.usefixtures("few_at_once")
async def test_a_removal_during_a_deploy_keeps_what_that_needs() -> None:
    span = free_range(9)
    async with open_services() as room:
        target = server(room, "v1", span[1])
        await room.deploy("calls", target, **media(span))
        host, _, port = target.rpartition(":")
        deploying = room.start("calls", target, **media(span[:4]), check=TCP)
        await until(lambda: deploying.events)
        await room.services.remove("calls")
        await until(lambda: free(span) == [*span[4:]])
        client = room.client(to=(LOCALHOST, span[1]))
        waiting = await client.send()
        with socket.create_server((host, int(port))):
            await deploying.wait()
        assert room.row("calls").udp_ports == (f"udp/{text(span[:4])}",)
        assert await client.receive() == b"v1:" + waiting, "it waited in the buffer"
        await room.services.remove("calls")
        assert free(span) == [*span]


async def test_everything_else_runs_during_such_a_removal() -> None:
    span, turns = free_range(1000), 0
    async with open_services() as room, trio.open_nursery() as nursery:
        target = server(room, "v1", span[0])
        await room.deploy("calls", target, **media(span))
        host, _, port = target.rpartition(":")
        deploying = room.start("calls", target, **media(span), check=TCP)
        await until(lambda: deploying.events)

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(count_turns)
        await room.services.remove("calls")
        assert turns > len(span) / leases._AT_ONCE / 2
        nursery.cancel_scope.cancel()
        client = room.client(to=(LOCALHOST, span[0]))
        waiting = await client.send()
        with socket.create_server((host, int(port))):
            await deploying.wait()
        assert await client.receive() == b"v1:" + waiting


async def test_a_service_changes_between_a_range_and_a_port() -> None:
    span = free_range(4)
    async with open_services() as room:
        v1, target = room.target("v1"), server(room, "media", span[2])
        await room.deploy("game", v1, port=span[2])
        assert await room.client(to=(LOCALHOST, span[2])).ask() == "v1"
        await room.deploy("game", target, **media(span))
        assert await room.client(to=(LOCALHOST, span[2])).ask() == "media"
        await room.deploy("game", v1, port=span[2])
        assert await room.client(to=(LOCALHOST, span[2])).ask() == "v1"
        assert free(span) == [span[0], span[1], span[3]]


async def test_pairs_may_be_others_after_a_redeploy() -> None:
    some = free_range(4)
    ranges = (range(some[0], some[2]), range(some[2], some[3] + 1))
    async with open_services() as room:
        target = server(room, "v1", some[0])
        for port in some[1:]:
            server(room, "v1", port)
        for policy, rtcp in (("adjacent", 1), ("separate-range", 2), ("adjacent", 1)):
            for _ in range(2):  # the second deploy has the same pairs
                await room.deploy("calls", target, **media(*ranges, rtcp_policy=policy))
                for port in (some[0], some[rtcp]):
                    assert await room.client("127.0.0.9", to=(LOCALHOST, port)).ask() == "v1"
            assert (room.row("calls").pairs_in_use, room.row("calls").in_flight) == (2, 2)


# What comes between


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("redeploy", [False, True])
def test_a_deploy_cancelled_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redeploy: bool
) -> None:
    """Before the switch nothing is bound that was not; after it everything is."""
    save_in_this_thread(monkeypatch)
    seen = set()

    def attempt(step: int) -> bool:
        path = tmp_path / str(step)

        async def main() -> bool:
            span = free_range(7)
            old, new = span[:4], span[2:]
            async with open_services(path) as room:
                target = server(room, "v1", span[3])
                server(room, "v1", span[6])
                if redeploy:
                    await room.deploy("calls", target, **media(old))
                scope = trio.CancelScope()
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                with scope:
                    await room.deploy("calls", target, **media(new), **PATIENT)
                trio.lowlevel.remove_instrument(steps)
                has: list[range] = [
                    range(*(int(end) + place for place, end in enumerate(ends.split("-"))))
                    for row in room.rows
                    for ends in (row.udp_ports[0].removeprefix("udp/"),)
                ]
                seen.add("new" if has == [new] else "old" if has == [old] else "none")
                expected = [port for port in span if not any(port in each for each in has)]
                await until(lambda: free(span) == expected)
                assert bool(room.saved) == bool(has)
                if has:
                    last = has[0][-1]
                    assert await room.client(to=(LOCALHOST, last)).ask() == "v1", "all are read"
                    await room.services.remove("calls")
                assert free(span) == [*span]
                return scope.cancelled_caught

        return trio.run(main)

    assert run_with_every_cancellation(attempt) > 10
    assert seen == {"old" if redeploy else "none", "new"}


async def test_a_service_that_is_removed_leaves_nothing_behind() -> None:
    span = free_range(4)
    gone: list[weakref.ref[object]] = []
    async with open_services() as room:
        target = server(room, "v1", span[1])
        for options in ({}, {"drain_strategy": "graceful", "drain_timeout": 60.0}):
            await room.deploy("calls", target, **media(span))
            assert await room.client(to=(LOCALHOST, span[1])).ask() == "v1"
            await room.begin("calls", f"{SERVER}:7880", **media(span), **options)
            gone += map(weakref.ref, room.installed("calls").deployments.values())
            await room.services.remove("calls")
        await wait_all_tasks_blocked()
        gc.collect()
        assert [each() for each in gone] == [None] * 4


@pytest.mark.usefixtures("few_at_once")
async def test_a_proxy_that_ends_while_room_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    span, began, may_end = free_range(9), threading.Event(), threading.Event()

    def make_room(descriptors: int) -> None:
        began.set()
        may_end.wait()

    monkeypatch.setattr(leases, "make_room", make_room)
    async with open_world() as world:
        async with open_services(None, world) as room:
            deploying = room.start("calls", f"{SERVER}:7880", **media(span))
            await until(began.is_set)
        may_end.set()
        with pytest.raises(ShuttingDownError):
            await deploying.wait()
        assert free(span) == [*span]


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("moment", ["binding", "bound", "listening", "closing"])
async def test_a_proxy_that_ends_meanwhile_leaves_no_port(tmp_path: Path, moment: str) -> None:
    span = free_range(60)
    async with open_world() as world:
        async with open_services(tmp_path, world) as room:
            target = server(room, "v1", span[0])
            if moment == "closing":
                await room.deploy("calls", target, **media(span))
                deploying = await room.begin("calls", target, **media(span[:2]))
                assert not free(span[-1:])
            else:
                deploying = room.start("calls", target, **media(span))
                has_come: dict[str, Callable[[], object]] = {
                    "binding": lambda: not free(span[:1]),
                    "bound": lambda: not free(span[-1:]),
                    "listening": lambda: room.rows,
                }
                while not has_come[moment]():
                    await trio.lowlevel.checkpoint()
        await deploying.ended.wait()
        assert isinstance(deploying.error, ShuttingDownError) == (moment in ("binding", "bound"))
        assert free(span) == [*span]


# Restarting


async def test_a_restart_binds_the_ranges_again(tmp_path: Path, world: World) -> None:
    some, others = free_range(4), free_range(4)
    target = server(world, "v1", others[3])
    client = world.client(to=(LOCALHOST, others[3]))
    async with open_services(tmp_path, world) as room:
        await room.deploy("calls", target, **media(some, others))
        assert await client.ask() == "v1"
        before = room.row("calls")
    assert free([*some, *others[:3]]) == [*some, *others[:3]]
    async with open_services(tmp_path, world) as room:
        assert room.row("calls") == before
        assert free([*some, *others]) == []
        assert await client.ask() == "v1"
        assert room.sessions("calls") == 1, "the session goes on"


@pytest.mark.usefixtures("few_at_once")
async def test_a_port_of_a_range_that_is_taken_at_the_start(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_LISTEN_AGAIN", 0.05)
    span, v2 = free_range(8), world.target("v2")
    target = server(world, "v1", span[6])
    async with open_services(tmp_path, world) as room:
        await room.deploy("calls", target, **media(span))
        await room.deploy("game", v2)
    with ExitStack() as stack:
        process = stack.enter_context(held_port(span[3]))
        async with open_services(tmp_path, world) as room:
            (line,) = room.lines.of("UDP service can't listen yet")
            assert line["service"] == "calls"
            assert f":{span[3]}: bind: address already in use" in line["error"]
            assert f"(process {process})" in line["error"]
            assert free(span) == [*span[:3], *span[4:]]
            assert await world.client().ask() == "v2"
            with pytest.raises(PortConflictError):  # nobody else may have it meanwhile
                await room.deploy("game", v2, port=span[0])
            stack.close()
            await until(lambda: room.lines.of("UDP service listens"))
            fields = {"service": "calls", "port_ranges": [text(span)]}
            assert room.lines.of("UDP service listens") == [fields]
            assert await world.client(to=(LOCALHOST, span[6])).ask() == "v1"
            assert free(span) == []


# Source ports


async def test_no_session_has_a_port_of_a_range_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    span = free_range(10)
    monkeypatch.setattr(running, "_port_range", lambda: (span[0], span[-1]))
    async with open_services() as room:
        target = server(room, "v1", span[8])
        await room.deploy("calls", target, **media(span[2:9]))
        clients = [room.client(to=(LOCALHOST, span[8])) for _ in range(3)]
        assert [await client.ask() for client in clients] == ["v1"] * 3
        own = {port for port, found in sockets_on(span).items() if len(found) > (port == span[8])}
        assert own - set(span[2:9]) == {span[0], span[1], span[9]}
        await room.client(to=(LOCALHOST, span[8])).send()
        shed = {"service": "calls", "reason": "no_socket"}
        await until(lambda: room.number("dropped_datagrams_total", **shed))
        # What is closed is there for sessions again.
        await room.deploy("calls", target, **media(span[8:9]))
        more = [room.client(to=(LOCALHOST, span[8])) for _ in range(6)]
        assert [await client.ask() for client in more] == ["v1"] * 6


@pytest.mark.usefixtures("few_at_once")
async def test_a_session_that_begins_meanwhile_gets_no_port_of_the_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    span = free_range(80)
    monkeypatch.setattr(running, "_port_range", lambda: (span[0], span[-1]))
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, limit=20_000)
        deploying = room.start("calls", f"{SERVER}:7880", **media(span[:-1]))
        while free(span[:1]):
            await trio.lowlevel.checkpoint()
        assert free(span[-2:-1]), "it is not bound yet"
        assert await room.client().ask() == "v1"
        await deploying.wait()
        assert v1.sources == {span[-1]}
