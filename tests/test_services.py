"""Changes of services: what a deploy does in which order, and that a failure changes nothing."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import state_format
from kamal_proxy.control.messages import Event, ServiceDescription
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import (
    CertificateError,
    DeployFailedError,
    HostConflictError,
    InvalidOptionsError,
    ServiceNotFoundError,
    ShuttingDownError,
    StateError,
)
from kamal_proxy.http.error_pages import load_error_pages
from kamal_proxy.metrics import Metrics
from kamal_proxy.options import ServiceOptions
from kamal_proxy.services import Services
from kamal_proxy.state import SavedPause, SavedService, StateFile
from kamal_proxy.target_options import TargetOptions
from tests.deploying import (
    HANG,
    Connections,
    Lines,
    NoCertificates,
    Probes,
    Request,
    open_room,
    request,
    run_with_every_cancellation,
    save_in_this_thread,
)
from tests.pairs import Steps

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save in this thread."""
    save_in_this_thread(monkeypatch)


# Deploying


async def test_a_first_deploy(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v1=["refused", True]) as room:
        assert await room.deploy("app", "v1") == DrainResult()
        assert room.serving == {"app": ["v1"]}
        assert room.saved == {"app": "v1"}
    assert [event.event for event in room.events] == [
        "probe",
        "probe",
        "healthy",
        "switched",
        "done",
    ]
    failed, passed = room.events[:2]
    assert (failed.target, failed.ok, failed.result) == ("v1", False, "refused")
    assert (passed.target, passed.ok, passed.result) == ("v1", True, "status 200")
    assert passed.elapsed == pytest.approx(0.05)
    fields = {"service": "app", "targets": ["v1"], "hosts": ["app"], "paths": ["/"], "tls": False}
    assert room.lines.of("Deploying") == [fields]
    assert room.lines.of("Deployed") == [fields]


async def test_a_redeploy_switches_saves_and_then_drains(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        old = room.active("app")
        flying, lost = Request(old), Request(old)
        seen: list[tuple[str, dict[str, list[str]], dict[str, str], bool]] = []

        def progress(event: Event) -> None:
            seen.append((event.event, room.serving, room.saved, old.retired))
            if event.event == "draining" and event.elapsed > 2:
                flying.end()

        result = await room.services.deploy(request("app", "v2", drain=10), progress)
        assert result == DrainResult(completed=1, cancelled=1)
        assert lost.aborted
        assert not flying.aborted
        after = ({"app": ["v2"]}, {"app": "v2"})
        before = ({"app": ["v1"]}, {"app": "v1"})
        assert seen[:3] == [
            ("probe", *before, False),
            ("healthy", *before, False),
            ("switched", *after, False),
        ]
        assert {entry[0] for entry in seen[3:-1]} == {"draining"}
        assert len(seen) > 10, "the drain is reported as it goes on"
        assert seen[-1] == ("done", *after, True)
        assert old.in_flight == 0


async def test_the_switch_comes_before_the_drain(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(room.deploy, "app", "v2")
            await trio.sleep(1)
            assert room.active("app").targets[0].name == "v2"
            Request(room.active("app")).end()
            assert not flying.aborted
            flying.end()


@pytest.mark.parametrize("outcome", ["refused", HANG])
async def test_a_failed_deploy_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock, outcome: str
) -> None:
    async with open_room(tmp_path, v2=[outcome]) as room:
        await room.deploy("app", "v1")
        table, old = room.services.routes, room.active("app")
        start = trio.current_time()
        with pytest.raises(DeployFailedError) as caught:
            await room.deploy("app", "v2", "v3", timeout=5)
        assert trio.current_time() - start == pytest.approx(5)
        assert room.services.routes is table
        assert not old.retired
        assert room.saved == {"app": "v1"}
        assert str(caught.value) == (
            "target failed to become healthy within configured timeout (5s)"
        )
        (detail,) = caught.value.details
        assert detail.startswith("target v2: ")
        assert ("refused at http://v2/up" in detail) == (outcome == "refused")
        probed = len(room.probes.times["v2"])
        await trio.sleep(20)
        assert len(room.probes.times["v2"]) == probed, "the new targets are still probed"
        assert [event.event for event in room.events].count("switched") == 1


async def test_force_does_not_wait_for_health(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v1=[HANG]) as room:
        start = trio.current_time()
        await room.deploy("app", "v1", "v2", force=True)
        assert trio.current_time() == start
        chosen = {room.active("app").choose(set()) for _ in range(4)}
        assert {target and target.name for target in chosen} == {"v1", "v2"}


@pytest.mark.parametrize("name", ["app", "other"])
async def test_a_state_that_can_not_be_saved_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock, name: str
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        table, old = room.services.routes, room.active("app")
        room.state.broken = True
        with pytest.raises(StateError):
            await room.deploy(name, "v2")
        with pytest.raises(StateError):
            await room.services.remove("app")
        assert room.services.routes is table
        assert not old.retired
        assert room.saved == {"app": "v1"}
        probed = len(room.probes.times["v2"])
        await trio.sleep(20)
        assert len(room.probes.times["v2"]) == probed, "the new targets are still probed"
        room.state.broken = False
        await room.deploy("app", "v2")
        assert room.saved == {"app": "v2"}


async def test_a_conflict_changes_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("one", "v1", hosts=("a.test",))
        with pytest.raises(HostConflictError):
            await room.deploy("two", "v2", hosts=("b.test", "a.test"))
        assert room.serving == {"one": ["v1"]}
        assert "v2" not in room.probes.times, "refused before anything was started"


async def test_a_conflict_that_arises_meanwhile(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v2=["refused", "refused", True]) as room:
        async with trio.open_nursery() as nursery:

            async def too_late() -> None:
                with pytest.raises(HostConflictError):
                    await room.deploy("two", "v2", hosts=("a.test",))

            nursery.start_soon(too_late)
            await wait_all_tasks_blocked()
            await room.deploy("one", "v1", hosts=("a.test",))
        assert room.serving == {"one": ["v1"]}
        assert room.saved == {"one": "v1"}


async def test_bad_options_change_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        for options in (
            request("no spaces", "v1"),
            request("app", "!"),
            attrs.evolve(request("app"), target_options=TargetOptions(response_timeout=-1)),
        ):
            with pytest.raises(InvalidOptionsError):
                await room.services.deploy(options)
        missing = str(tmp_path / "missing.pem")
        tls = ServiceOptions(
            hosts=("a.test",),
            tls_enabled=True,
            tls_certificate_path=missing,
            tls_private_key_path=missing,
        )
        with pytest.raises(CertificateError) as caught:
            await room.services.deploy(attrs.evolve(request("app"), service_options=tls))
        assert missing in caught.value.details[0]
        assert room.serving == {}
        assert room.probes.times == {}


# Cancellation


def test_cancelled_at_every_await(tmp_path: Path) -> None:
    seen = set()

    def attempt(step: int) -> bool:
        directory = tmp_path / str(step)

        async def main() -> bool:
            async with open_room(directory, v2=["refused", True]) as room:
                await room.deploy("app", "v1")
                old = room.active("app")
                flying = Request(old)
                with trio.CancelScope() as scope:
                    steps = Steps(step, scope.cancel)
                    trio.lowlevel.add_instrument(steps)
                    await room.deploy("app", "v2", drain=3)
                trio.lowlevel.remove_instrument(steps)
                current = room.serving["app"][0]
                assert room.saved == {"app": current}, "file and table disagree"
                assert old.retired == (current == "v2")
                assert not room.active("app").retired
                seen.add((scope.cancelled_caught, current))
                if current == "v2":
                    await old.wait_drained()
                    assert flying.aborted, "the drain goes on"
                else:
                    assert not flying.aborted
                    flying.end()
                # The other one is gone: only what serves is probed.
                room.probes.times.clear()
                await trio.sleep(10)
                assert list(room.probes.times) == [current]
                await room.deploy("app", "v3")
                assert room.serving == {"app": ["v3"]}
                return scope.cancelled_caught

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 10
    assert seen == {(True, "v1"), (True, "v2"), (False, "v2")}


# Several changes at once


async def test_concurrent_deploys_of_one_service(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v2=["x", "x", True]) as room:
        await room.deploy("app", "v0")
        made = [room.active("app")]
        async with trio.open_nursery() as nursery:
            for version in ("v1", "v2", "v3"):
                nursery.start_soon(room.deploy, "app", version)
        assert room.serving == {"app": ["v2"]}, "the last one to become healthy serves"
        assert room.saved == {"app": "v2"}
        assert made[0].retired
        room.probes.times.clear()
        await trio.sleep(5)
        assert list(room.probes.times) == ["v2"]


async def test_a_long_drain_delays_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("slow", "v1")
        flying = Request(room.active("slow"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: room.deploy("slow", "v2", drain=1000))
            await trio.sleep(1)
            start = trio.current_time()
            await room.deploy("other", "v1")
            await room.deploy("slow", "v3")
            await room.services.remove("other")
            assert trio.current_time() == start
            assert room.serving == {"slow": ["v3"]}
            assert not flying.aborted
            flying.end()


async def test_a_deploy_overtaken_by_a_removal(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v2=["x", "x", "x", True]) as room:
        await room.deploy("app", "v1")
        old = room.active("app")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(room.deploy, "app", "v2")
            await wait_all_tasks_blocked()
            await room.services.remove("app")
            assert room.serving == {}
            assert old.retired
        assert room.serving == {"app": ["v2"]}
        assert room.saved == {"app": "v2"}


async def test_removing_while_the_replaced_targets_drain(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        flying = Request(room.active("app"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(room.deploy, "app", "v2")
            await trio.sleep(1)
            await room.services.remove("app")
            assert room.serving == {}
            flying.end()


# Removing


async def test_remove_takes_the_service_out_at_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        await room.deploy("other", "v1")
        old = room.active("app")
        flying = Request(old)
        start = trio.current_time()
        await room.services.remove("app")
        assert trio.current_time() == start
        assert room.serving == {"other": ["v1"]}
        assert room.saved == {"other": "v1"}
        await trio.sleep(3600)
        assert not flying.aborted, "its requests end by themselves"
        flying.end()
        assert await old.wait_drained() == DrainResult(completed=1)


async def test_remove_an_unknown_service(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
            await room.services.remove("app")
        assert not room.state.path.exists()


# Stopping


async def test_nothing_changes_after_the_stop(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v1")
        room.services.close()
        with pytest.raises(ShuttingDownError):
            await room.deploy("app", "v2")
        with pytest.raises(ShuttingDownError):
            await room.services.remove("app")
        assert room.saved == {"app": "v1"}


async def test_a_deploy_does_not_switch_after_the_stop(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_room(tmp_path, v2=["x", "x", "x", True]) as room:
        await room.deploy("app", "v1")
        async with trio.open_nursery() as nursery:

            async def too_late() -> None:
                with pytest.raises(ShuttingDownError):
                    await room.deploy("app", "v2")

            nursery.start_soon(too_late)
            await wait_all_tasks_blocked()
            room.services.close()
        assert room.serving == {"app": ["v1"]}
        assert room.saved == {"app": "v1"}


async def test_before_the_start_there_is_nothing_to_change() -> None:
    services = Services(
        None,
        Lines().log(),
        probe=Probes(),
        connect=Connections,
        load_pages=load_error_pages,
        certificates=NoCertificates(),
        metrics=Metrics(),
    )
    with pytest.raises(ShuttingDownError):
        await services.deploy(request("app"))
    with pytest.raises(ShuttingDownError):
        await services.remove("app")
    assert services.describe() == []


async def test_without_a_state_file(autojump_clock: MockClock) -> None:
    services = Services(
        None,
        Lines().log(),
        probe=Probes(),
        connect=Connections,
        load_pages=load_error_pages,
        certificates=NoCertificates(),
        metrics=Metrics(),
    )
    assert services.restore() == []
    async with trio.open_nursery() as nursery:
        await services.start(nursery, [])
        await services.deploy(request("app"))
        await services.remove("app")
        nursery.cancel_scope.cancel()


# Restoring


async def save(path: Path, *services: SavedService) -> None:
    with StateFile(path / "kamal-proxy.state", state_format) as state:
        state.save(services)


async def test_restored_services_serve_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    await save(tmp_path, SavedService(name="app", active_targets=("v1", "v2")))
    before = (tmp_path / "kamal-proxy.state").read_bytes()
    async with open_room(tmp_path, v1=[HANG], v2=[HANG]) as room:
        assert room.serving == {"app": ["v1", "v2"]}
        assert room.active("app").choose(set()) is not None
        assert room.lines.messages == ["Restored saved state"]
        await trio.sleep(1)
        assert set(room.probes.times) == {"v1", "v2"}, "they are probed, too"
    assert (tmp_path / "kamal-proxy.state").read_bytes() == before


async def test_nothing_to_restore(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        assert room.lines.of("No previous state to restore") == [{"path": str(room.state.path)}]


async def test_restored_services_keep_what_they_do_not_use_now(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    await save(
        tmp_path,
        SavedService(
            name="app",
            active_targets=("v1",),
            active_readers=("r1",),
            rollout_targets=("v2",),
            service_options=ServiceOptions(hosts=("a.test",), tls_enabled=True),
            target_options=TargetOptions(buffer_requests=True),
        ),
    )
    async with open_room(tmp_path) as room:
        await room.deploy("other", "v1")
        (entry, _) = json.loads(room.state.path.read_bytes())
        assert entry["active_readers"] == ["r1"]
        assert entry["rollout_targets"] == ["v2"]
        assert entry["options"]["tls_enabled"] is True


@pytest.mark.parametrize("state", ["paused", "stopped"])
async def test_a_pause_survives_a_redeploy(
    tmp_path: Path, autojump_clock: MockClock, state: Any
) -> None:
    pause = SavedPause(state=state, stop_message="soon", fail_after=7)
    await save(tmp_path, SavedService(name="app", active_targets=("v1",), pause=pause))
    async with open_room(tmp_path) as room:
        await room.deploy("app", "v2", hosts=("new.test",))
        service = room.services.routes.get("app")
        assert service is not None
        assert service.pause == pause
        assert service.options.hosts == ("new.test",)
    with StateFile(tmp_path / "kamal-proxy.state", state_format) as again:
        (saved,) = again.load() or ()
        assert saved.pause == pause


# Describing


async def test_describes_services(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path, v3=[True, "x"]) as room:
        await room.deploy("zeta", "v1")
        old = room.active("zeta")
        flying = Request(old)
        removed = 0
        await room.deploy("alpha", "v2", "v3", hosts=("a.test", "b.test"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: room.deploy("zeta", "v4", drain=math.inf))
            await trio.sleep(3)
            Request(room.active("zeta"))
            assert room.services.describe() == [
                ServiceDescription(
                    name="alpha",
                    hosts=("a.test", "b.test"),
                    path_prefixes=("/",),
                    targets=("v2", "v3"),
                    healthy=("v2",),
                ),
                ServiceDescription(
                    name="zeta",
                    hosts=("zeta",),
                    path_prefixes=("/",),
                    targets=("v4",),
                    healthy=("v4",),
                    in_flight=1,
                    draining=1,
                ),
            ]
            flying.end()
            removed = room.services.describe()[1].draining
        assert removed == 0


async def test_drained_deployments_are_forgotten(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_room(tmp_path) as room:
        for number in range(20):
            await room.deploy("app", f"v{number}")
        assert len(room.services._draining) <= 1
