"""Deploys of UDP services with real sockets: what changes when, and what a failure leaves."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy import DeploymentOptions, DeployOptions, PauseOptions, StopOptions, lookups
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import (
    DeployFailedError,
    InvalidOptionsError,
    ListenError,
    PortConflictError,
    ServiceNotFoundError,
    ShuttingDownError,
    StateError,
)
from tests.deploying import run_with_every_cancellation, save_in_this_thread
from tests.pairs import Steps
from tests.ports import free_port, is_free
from tests.scripted import LOCALHOST, open_client, open_upstream
from tests.udp.serving import (
    PATIENT,
    Room,
    held_port,
    open_services,
    open_whole,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

TCP = {"method": "tcp", "interval": 0.05}


# What a deploy does


async def test_a_first_deploy(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        v1 = room.target("v1")
        assert await room.deploy("game", v1) == DrainResult()
        client = room.client()
        assert [await client.ask() for _ in range(3)] == ["v1"] * 3
        assert len(v1.sources) == 1, "a session has one upstream socket for life"
        assert room.saved == {"game": [str(v1)]}
        assert not is_free(room.port)
        fields = {"service": "game", "targets": [str(v1)], "port": room.port}
        assert room.lines.of("Deploying UDP") == [fields]
        assert room.lines.of("Deployed UDP") == [fields]
        row = room.row("game")
        assert (row.udp_ports, row.protocol) == ((f"udp/{room.port}",), "udp")
        assert (row.targets, row.healthy) == ((str(v1),), (str(v1),))
        assert (row.state, row.in_flight, row.draining) == ("running", 1, 0)
    assert [event.event for event in room.events] == ["probe", "healthy", "switched", "done"]
    assert room.events[0].target == str(v1)
    assert room.events[0].ok


async def test_a_deploy_without_a_port_has_the_proxys(tmp_path: Path) -> None:
    port = free_port()
    async with open_whole(tmp_path, udp_port=port) as room:
        await room.deploy("game", room.target("v1"), port=0)
        assert room.row("game").udp_ports == (f"udp/{port}",)
        assert await room.client(to=(LOCALHOST, port)).ask() == "v1"
    # Where it listens is saved, so that another --udp-port does not move it.
    async with open_whole(tmp_path, udp_port=free_port()) as room:
        assert room.row("game").udp_ports == (f"udp/{port}",)


async def test_live_sessions_stay_on_their_target(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1)
        old = [room.client() for _ in range(5)]
        assert [await client.ask() for client in old] == ["v1"] * 5
        deploying = await room.begin("game", v2)
        new = [room.client() for _ in range(5)]
        for _ in range(3):
            assert [await client.ask() for client in old] == ["v1"] * 5
            assert [await client.ask() for client in new] == ["v2"] * 5
        assert len(v1.sources) == len(v2.sources) == 5
        assert (room.row("game").in_flight, room.row("game").draining) == (5, 5)
        assert room.saved == {"game": [str(v2)]}
        assert not deploying.ended.is_set()
        # A server may speak at any time, also to a session that drains.
        await v1.send(b"unasked", v1.received[-1].source)
        assert await old[-1].receive() == b"unasked"


async def test_a_client_that_was_idle_goes_to_the_new_targets() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"), timeout=0.2)
        client = room.client()
        assert await client.ask() == "v1"
        deploying = await room.begin("game", room.target("v2"), timeout=0.2)
        assert await deploying.wait() == DrainResult(completed=1)
        assert await client.ask() == "v2"


async def test_without_zero_downtime_the_switch_ends_the_sessions() -> None:
    async with open_services() as room:
        await room.deploy("game", room.target("v1"))
        clients = [room.client() for _ in range(4)]
        for client in clients:
            await client.ask()
        room.events.clear()
        assert await room.deploy("game", room.target("v2")) == DrainResult(cancelled=4)
        assert room.events[-1].event == "done"
        assert (room.events[-1].completed, room.events[-1].cancelled) == (0, 4)
        assert [await client.ask() for client in clients] == ["v2"] * 4


@pytest.mark.parametrize("zero_downtime", [True, False])
async def test_a_target_in_both_sets_is_not_drained(zero_downtime: bool) -> None:
    async with open_services() as room:
        v1, both, v3 = room.target("v1"), room.target("both"), room.target("v3")
        await room.deploy("game", v1, both)
        clients = [room.client() for _ in range(40)]
        served = [await client.ask() for client in clients]
        assert set(served) == {"v1", "both"}
        sources = both.sources
        result = await room.deploy(
            "game", both, v3, zero_downtime=zero_downtime, drain_timeout=0.2, force_kill_timeout=0.2
        )
        assert result == DrainResult(cancelled=served.count("v1"))
        for client, name in zip(clients, served, strict=True):
            answered = await client.ask()
            if name == "both":
                assert answered == "both"
            else:
                assert answered in ("both", "v3")
        kept = [each.source for each in both.received[-40:] if each.source in sources]
        assert len(set(kept)) == served.count("both"), "their sessions went on"


async def test_a_session_is_kept_by_one_deploy_after_the_other() -> None:
    async with open_services() as room:
        v1, v2, v3 = (room.target(name) for name in ("v1", "v2", "v3"))
        await room.deploy("game", v1)
        client = room.client()
        assert await client.ask() == "v1"
        for targets in ((v1, v2), (v3, v1), (v1,), (v2, v3, v1)):
            assert await room.deploy("game", *targets) == DrainResult()
            assert await client.ask() == "v1"
        assert len(v1.sources) == 1
        # Once it drains, no later deploy takes it back.
        await room.begin("game", v2)
        await room.begin("game", v1)
        assert (room.row("game").in_flight, room.row("game").draining) == (0, 1)
        assert await client.ask() == "v1"
        assert len(v1.sources) == 1


async def test_a_session_that_is_kept_lives_by_the_new_options() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, timeout=0.3)
        client = room.client()
        assert await client.ask() == "v1"
        await room.deploy("game", v1, timeout=600)
        await trio.sleep(0.6)
        assert await client.ask() == "v1"
        assert len(v1.sources) == 1
        await room.deploy("game", v1, timeout=0.3)
        await until(lambda: room.sessions() == 0)
        assert room.number("sessions_ended_total", reason="idle") == 1


@pytest.mark.parametrize("option", ["proxy_protocol", "affinity"])
async def test_a_session_that_the_new_options_treat_otherwise_is_drained(option: str) -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        await room.deploy("game", v1, **{option: False})
        client = room.client()
        assert await client.ask() == "v1"
        result = await room.deploy("game", v1, **{option: True})
        assert result.completed + result.cancelled == 1
        await client.send()
        assert (await client.receive()).startswith(b"v1:")
        assert len(v1.sources) == 2


async def test_without_affinity_a_redeploy_of_the_same_targets_loses_nothing() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2, affinity=False)
        client = room.client()
        assert {await client.ask(), await client.ask()} == {"v1", "v2"}
        await room.begin("game", v1, v2, affinity=False)
        for _ in range(3):
            assert {await client.ask(), await client.ask()} == {"v1", "v2"}


# Health


async def test_a_target_serves_when_its_tcp_port_is_open() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1)
        deploying = room.start("game", v2, check=TCP)
        await until(lambda: deploying.events)
        assert deploying.events[0].result == "connection refused"
        assert await room.client().ask() == "v1"
        assert room.row("game").targets == (str(v1),)
        v2.open_tcp()
        await deploying.wait()
        assert await room.client().ask() == "v2"
    told = [event.event for event in deploying.events if event.event != "probe"]
    assert told == ["healthy", "switched", "draining", "done"]
    probes = [event.ok for event in deploying.events if event.event == "probe"]
    assert probes == [False] * (len(probes) - 1) + [True]


async def test_a_target_that_is_unhealthy_gets_no_new_sessions() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        v1.open_tcp()
        v2.open_tcp()
        await room.deploy("game", v1, v2, check=TCP)
        old = [room.client() for _ in range(20)]
        served = [await client.ask() for client in old]
        assert set(served) == {"v1", "v2"}
        assert v1.tcp is not None
        v1.tcp.close()
        await until(lambda: room.row("game").healthy == (str(v2),))
        assert {await room.client().ask() for _ in range(20)} == {"v2"}
        assert [await client.ask() for client in old] == served, "live sessions never move"
        v1.open_tcp()
        await until(lambda: room.row("game").healthy == (str(v1), str(v2)))
        assert {await room.client().ask() for _ in range(20)} == {"v1", "v2"}


async def test_a_failing_deploy_changes_nothing(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        v1, v2, v3 = room.target("v1"), room.target("v2"), room.target("v3")
        await room.deploy("game", v1)
        client = room.client()
        await client.ask()
        v3.open_tcp()
        room.events.clear()
        with pytest.raises(DeployFailedError) as caught:
            await room.deploy("game", v2, v3, check=TCP, deploy_timeout=0.3, limit=1)
        assert str(caught.value) == (
            "target failed to become healthy within configured timeout (300ms)"
        )
        (detail,) = caught.value.details
        assert detail.startswith(f"target {v2}: connection refused at tcp://{v2}")
        # What a server without a TCP port needs is said.
        assert "--health-check-port" in detail
        assert "--health-check none" in detail
        assert {event.event for event in room.events} == {"probe"}
        assert await client.ask() == "v1"
        assert {await room.client().ask() for _ in range(5)} == {"v1"}
        assert room.saved == {"game": [str(v1)]}
        assert room.row("game").targets == (str(v1),)
        assert room.row("game").max_sessions == 10_000
        assert not v2.received
        assert not v3.received, "no probe is ever a datagram"


async def test_a_first_deploy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        with pytest.raises(DeployFailedError):
            await room.deploy("game", room.target("v1"), check=TCP, deploy_timeout=0.1)
        assert is_free(room.port)
        assert room.rows == []
        assert room.saved == {}
        assert room.numbers("sessions") == {}
        # And nothing is in the way of another one.
        await room.deploy("other", room.target("v1"))
        assert await room.client().ask() == "v1"


async def test_http_health_checks() -> None:
    async with open_services() as room, open_upstream() as upstream:
        v1 = room.target("v1")
        check = {"method": "http", "port": upstream.health_port, "path": "/live", "interval": 0.05}
        upstream.health = 503
        deploying = room.start("game", v1, check=check)
        await upstream.wait_probes(2)
        assert not deploying.switched.is_set()
        assert not deploying.events[0].ok
        assert deploying.events[0].result == "status 503"
        upstream.health = 200
        await deploying.wait()
        assert await room.client().ask() == "v1"


async def test_a_probe_on_a_port_of_its_own() -> None:
    async with open_services() as room, open_upstream() as upstream:
        check = {"method": "tcp", "port": upstream.health_port}
        await room.deploy("game", room.target("v1"), check=check)
        assert await room.client().ask() == "v1"


async def test_a_name_that_can_not_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(lookups, "resolve", resolve)
    async with open_services() as room:
        with pytest.raises(DeployFailedError) as caught:
            await room.deploy("game", "game-1:9999", deploy_timeout=0.1)
        (detail,) = caught.value.details
        reason = "can't resolve game-1: Name or service not known"
        assert detail.startswith(f"target game-1:9999: {reason}")
        assert is_free(room.port)


async def test_force_waits_for_no_health() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        await room.deploy("game", v1, v2, check=TCP, force=True)
        assert {await room.client().ask() for _ in range(20)} == {"v1", "v2"}


async def test_force_waits_for_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the name can be resolved there is nobody to serve new sessions."""
    knows = False

    async def resolve(host: str, port: int, *_: object) -> list[tuple[int, tuple[str, int]]]:
        if not knows:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, (LOCALHOST, port))]

    monkeypatch.setattr(lookups, "resolve", resolve)
    async with open_services() as room:
        v1, client = room.target("v1"), room.client()
        await room.deploy("game", f"game-1:{v1.port}", force=True)
        await client.send()
        await until(lambda: room.number("dropped_datagrams_total", reason="no_target") == 1)
        assert room.row("game").healthy == ()
        knows = True
        await until(lambda: room.row("game").healthy)
        assert await client.ask() == "v1"


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ((), "at least one target is required"),
        (("game-1",), "target game-1 must have a port, such as game-1:9999"),
    ],
)
async def test_options_that_can_not_be_used(targets: tuple[str, ...], sentence: str) -> None:
    async with open_services() as room:
        with pytest.raises(InvalidOptionsError) as caught:
            await room.deploy("game", *targets)
        assert str(caught.value) == sentence
        assert is_free(room.port)


# Ports


async def test_a_port_belongs_to_one_service(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        with pytest.raises(PortConflictError) as caught:
            await room.deploy("other", room.target("v2"))
        assert str(caught.value) == f"port {room.port} is used by another service"
        assert caught.value.details == (f"service game already listens on udp/{room.port}",)
        assert [row.name for row in room.rows] == ["game"]
        assert room.saved == {"game": [str(v1)]}
        assert await room.client().ask() == "v1"
        await room.services.remove("game")
        await room.deploy("other", room.target("v2"))
        assert await room.client().ask() == "v2"


async def test_a_port_of_a_service_that_is_still_deployed() -> None:
    async with open_services() as room:
        deploying = room.start("game", room.target("v1"), check=TCP)
        await until(lambda: deploying.events)
        with pytest.raises(PortConflictError):
            await room.deploy("other", room.target("v2"))
        deploying.scope.cancel()
        await deploying.ended.wait()
        await room.deploy("other", room.target("v2"))
        assert await room.client().ask() == "v2"


async def test_a_port_that_another_process_has() -> None:
    async with open_services() as room:
        v1 = room.target("v1")
        with held_port(room.port) as process, pytest.raises(ListenError) as caught:
            await room.deploy("game", v1)
        assert str(caught.value).startswith(
            f"listen udp {LOCALHOST}:{room.port}: bind: address already in use by "
        )
        assert str(caught.value).endswith(f"(process {process})")
        assert room.rows == []
        await room.deploy("game", v1)
        assert await room.client().ask() == "v1"


async def test_nothing_is_half_bound() -> None:
    second = "127.0.0.2"
    async with open_services(bind=(LOCALHOST, second)) as room:
        v1 = room.target("v1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind((second, room.port))
            with pytest.raises(ListenError, match=f"listen udp {second}:{room.port}: bind: "):
                await room.deploy("game", v1)
        assert is_free(room.port)
        await room.deploy("game", v1)
        for address in (LOCALHOST, second):
            assert await room.client(to=(address, room.port)).ask() == "v1"


async def test_a_wildcard_answers_from_the_address_that_was_asked() -> None:
    async with open_services(bind=()) as room:
        await room.deploy("game", room.target("v1"))
        for address in (LOCALHOST, "127.0.0.2"):
            client = room.client(to=(address, room.port))
            assert await client.ask() == "v1"  # and from there, see Client.receive
        assert room.sessions() == 2


async def test_a_redeploy_on_another_port(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        old, port = room.client(), free_port()
        await room.deploy("game", room.target("v1"), timeout=0.5)
        assert await old.ask() == "v1"
        deploying = await room.begin("game", room.target("v2"), port=port)
        assert await old.ask() == "v1", "the old port serves the sessions that drain"
        assert await room.client(to=(LOCALHOST, port)).ask() == "v2"
        assert room.row("game").udp_ports == (f"udp/{port}",)
        assert not is_free(room.port)
        with pytest.raises(PortConflictError):
            await room.deploy("other", room.target("v3"))
        assert await deploying.wait() == DrainResult(completed=1)
        await until(lambda: is_free(room.port))
        await room.deploy("other", room.target("v3"))
        assert await old.ask() == "v3"
        assert await room.client(to=(LOCALHOST, port)).ask() == "v2"


async def test_a_target_that_stays_is_drained_all_the_same_when_the_port_changes() -> None:
    """Its sessions came by the old port, which has to become free."""
    async with open_services() as room:
        v1, old, port = room.target("v1"), room.client(), free_port()
        await room.deploy("game", v1)
        assert await old.ask() == "v1"
        deploying = await room.begin("game", v1, port=port, force_kill_timeout=0.3)
        assert await old.ask() == "v1"
        assert await room.client(to=(LOCALHOST, port)).ask() == "v1"
        assert (room.row("game").in_flight, room.row("game").draining) == (1, 1)
        assert await deploying.wait() == DrainResult(cancelled=1)
        await until(lambda: is_free(room.port))
        assert room.sessions() == 1


async def test_a_service_is_not_its_own_target() -> None:
    """Each datagram would come back as that of another client, without end."""
    async with open_services() as room:
        with pytest.raises(DeployFailedError) as caught:
            await room.deploy("game", f"{LOCALHOST}:{room.port}", deploy_timeout=0.1)
        assert "this is the service's own port" in caught.value.details[0]
        await room.deploy("game", room.target("v1"), f"{LOCALHOST}:{room.port}", force=True)
        assert {await room.client().ask() for _ in range(20)} == {"v1"}
        assert room.sessions() == 20


async def test_there_and_back_to_the_old_port() -> None:
    async with open_services() as room:
        port = free_port()
        await room.deploy("game", room.target("v1"))
        client = room.client()
        assert await client.ask() == "v1"
        to_other = await room.begin("game", room.target("v2"), port=port)
        other = room.client(to=(LOCALHOST, port))
        assert await other.ask() == "v2"
        back = await room.begin("game", room.target("v3"), zero_downtime=False)
        assert await back.wait() == DrainResult(cancelled=1)
        await until(lambda: is_free(port))
        assert await client.ask() == "v1", "it drains on the port that is in use again"
        assert await room.client().ask() == "v3"
        assert not to_other.ended.is_set()


# Several at a time


async def test_two_first_deploys_of_one_name(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        targets = {name: room.target(name) for name in ("v1", "v2")}
        deploys = [room.start("game", target) for target in targets.values()]
        for deploying in deploys:
            await deploying.wait()
        # Whichever was the last to switch serves.
        served = await room.client().ask()
        assert room.saved == {"game": [str(targets[served])]}
        assert room.row("game").targets == (str(targets[served]),)


async def test_a_first_deploy_that_fails_beside_one_that_does_not() -> None:
    async with open_services() as room:
        v1, v2 = room.target("v1"), room.target("v2")
        failing = room.start("game", v1, check=TCP, deploy_timeout=0.2)
        good = room.start("game", v2, check=TCP, deploy_timeout=20)
        with pytest.raises(DeployFailedError):
            await failing.wait()
        assert not is_free(room.port), "the other one needs it"
        v2.open_tcp()
        await good.wait()
        assert await room.client().ask() == "v2"


async def test_two_redeploys_at_once(tmp_path: Path) -> None:
    async with open_services(tmp_path) as room:
        v1, v2, v3 = (room.target(name) for name in ("v1", "v2", "v3"))
        await room.deploy("game", v1)
        first = room.client()
        assert await first.ask() == "v1"
        slow = room.start("game", v2, check=TCP, **PATIENT)
        await until(lambda: slow.events)
        quick = await room.begin("game", v3)
        second = room.client()
        assert await second.ask() == "v3"
        v2.open_tcp()
        await slow.switched.wait()
        third = room.client()
        assert [await client.ask() for client in (first, second, third)] == ["v1", "v3", "v2"]
        assert room.saved == {"game": [str(v2)]}, "the last one to become healthy serves"
        # Each waits for the sessions of those whom it has replaced.
        assert [event.in_flight for event in quick.events if event.event == "draining"][:1] == [1]
        assert [event.in_flight for event in slow.events if event.event == "draining"][:1] == [1]
        await room.services.remove("game")
        assert (await quick.wait()).cancelled + (await slow.wait()).cancelled <= 2


async def test_a_deploy_overtaken_by_a_removal(tmp_path: Path) -> None:
    """The deploy makes the service anew, as it does for HTTP."""
    async with open_services(tmp_path) as room:
        v2 = room.target("v2")
        await room.deploy("game", room.target("v1"))
        deploying = room.start("game", v2, check=TCP)
        await until(lambda: deploying.events)
        await room.services.remove("game")
        assert room.saved == {}
        v2.open_tcp()
        assert await deploying.wait() == DrainResult()
        assert room.saved == {"game": [str(v2)]}
        assert await room.client().ask() == "v2"


# What comes between


@pytest.mark.parametrize("redeploy", [True, False])
def test_a_deploy_cancelled_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redeploy: bool
) -> None:
    """Before the switch nothing has changed; after it the drain goes on without the caller."""
    save_in_this_thread(monkeypatch)
    seen = set()

    def attempt(step: int) -> bool:
        path = tmp_path / str(step)

        async def main() -> bool:
            async with open_services(path) as room:
                v1, v2 = room.target("v1"), room.target("v2")
                old = room.client()
                if redeploy:
                    await room.deploy("game", v1)
                    assert await old.ask() == "v1"
                scope = trio.CancelScope()
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                with scope:
                    await room.deploy("game", v2, **PATIENT | {"force_kill_timeout": 0.02})
                trio.lowlevel.remove_instrument(steps)
                await check(room, old, str(v1), str(v2))
                return scope.cancelled_caught

        async def check(room: Room, old: object, first: str, second: str) -> None:
            saved = room.saved.get("game", [])
            rows = [list(row.targets) for row in room.rows]
            assert rows == ([saved] if saved else []), "what is saved is what is served"
            seen.add("".join(saved).replace(first, "v1").replace(second, "v2"))
            if not saved:
                assert is_free(room.port)
                await room.deploy("other", room.target("v3"))
                assert await room.client().ask() == "v3"
                return
            assert await room.client().ask() == ("v2" if saved == [second] else "v1")
            await until(lambda: room.row("game").draining == 0)
            await room.deploy("game", room.target("v3"))
            assert await room.client().ask() == "v3"

        return trio.run(main)

    assert run_with_every_cancellation(attempt) > 10
    assert seen == {"v1" if redeploy else "", "v2"}


@pytest.mark.parametrize("first", [True, False])
async def test_a_state_that_can_not_be_saved_changes_nothing(tmp_path: Path, first: bool) -> None:
    async with open_services(tmp_path) as room:
        v1, v2 = room.target("v1"), room.target("v2")
        assert room.state is not None
        if not first:
            await room.deploy("game", v1)
            client = room.client()
            assert await client.ask() == "v1"
        room.state.broken = True
        with pytest.raises(StateError):
            await room.deploy("game", v2)
        if first:
            assert is_free(room.port)
            assert room.rows == []
        else:
            with pytest.raises(StateError):
                await room.services.remove("game")
            with pytest.raises(StateError):
                await room.services.pause("game", PauseOptions())
            assert room.row("game").state == "running"
            assert await client.ask() == "v1"
            assert await room.client().ask() == "v1"
            assert room.saved == {"game": [str(v1)]}
        room.state.broken = False
        await room.deploy("game", v2)
        assert await room.client().ask() == "v2"
        assert room.saved == {"game": [str(v2)]}


async def test_shutting_down_during_a_deploy(tmp_path: Path) -> None:
    async with open_whole(tmp_path) as room:
        v1 = room.target("v1")
        await room.deploy("game", v1)
        deploying = room.start("game", room.target("v2"), check=TCP)
        first = room.start("other", room.target("v3"), check=TCP, port=free_port())
        await until(lambda: deploying.events and first.events)
        room.proxy.stop()
        for each in (deploying, first):
            with pytest.raises(ShuttingDownError, match="the proxy is shutting down"):
                await each.wait()
    assert room.saved == {"game": [str(v1)]}


async def test_shutting_down_during_a_drain(tmp_path: Path) -> None:
    async with open_whole(tmp_path) as room:
        v2 = room.target("v2")
        await room.deploy("game", room.target("v1"))
        assert await room.client().ask() == "v1"
        deploying = await room.begin("game", v2)
        room.proxy.stop()
        await deploying.ended.wait()
    assert room.saved == {"game": [str(v2)]}
    assert is_free(room.port)


async def test_a_proxy_that_is_not_running_takes_no_deploy() -> None:
    async with open_services() as room:
        room.services.close()  # type: ignore[union-attr]  # UdpServices, alone
        with pytest.raises(ShuttingDownError):
            await room.deploy("game", room.target("v1"))
        assert is_free(room.port)


async def test_a_proxy_that_is_cancelled_leaves_its_ports(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery, open_whole(tmp_path) as room:
        await room.deploy("game", room.target("v1"))
        assert await room.client().ask() == "v1"
        nursery.cancel_scope.cancel()
        await trio.lowlevel.checkpoint()
    assert is_free(room.port)
    async with open_whole(tmp_path) as again:
        assert again.row("game").udp_ports == (f"udp/{room.port}",)


# A name of HTTP and UDP


async def test_one_name_for_http_and_udp(tmp_path: Path) -> None:
    async with open_whole(tmp_path) as room, open_upstream() as upstream:
        proxy, v1 = room.proxy, room.target("v1")
        await proxy.deploy(
            DeployOptions(
                service="game",
                targets=(upstream.target,),
                target_options=upstream.options().target_options,
                deployment_options=DeploymentOptions(drain_timeout=1),
            )
        )
        await room.deploy("game", v1)
        client = room.client()
        assert await client.ask() == "v1"

        async def status() -> int:
            async with open_client(proxy.http_port) as web:
                return (await web.get("/")).status

        def states() -> list[tuple[str, tuple[str, ...], str]]:
            return [(row.name, row.udp_ports, row.state) for row in proxy.services()]

        ports = (f"udp/{room.port}",)
        assert await status() == 200
        assert states() == [("game", (), "running"), ("game", ports, "running")]
        await proxy.stop_service("game", StopOptions(drain_timeout=1, message="later"))
        assert states() == [("game", (), "stopped"), ("game", ports, "stopped")]
        assert await status() == 503
        await client.send()
        await until(lambda: room.number("dropped_datagrams_total", reason="stopped") == 1)
        await proxy.pause("game", PauseOptions(drain_timeout=1))
        assert states() == [("game", (), "paused"), ("game", ports, "paused")]
        assert await client.ask() == "v1"
        await proxy.resume("game")
        assert states() == [("game", (), "running"), ("game", ports, "running")]
        assert await status() == 200
        # A deploy of one kind leaves the other alone.
        await room.deploy("game", room.target("v2"))
        assert await status() == 200
        await proxy.remove("game")
        assert proxy.services() == []
        assert is_free(room.port)
        assert room.saved == {}
        with pytest.raises(ServiceNotFoundError):
            await proxy.remove("game")
