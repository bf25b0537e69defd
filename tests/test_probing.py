"""Probing: when, what becomes of health, what is logged and told, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.health import Health, ProbeResult
from kamal_proxy.probing import Watch
from kamal_proxy.target_options import HealthCheckOptions
from tests.deploying import HANG, Lines, Probes, run_with_every_cancellation
from tests.pairs import Steps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@attrs.define(eq=False)
class Place:
    """A target with nothing but what probing needs.

    Attributes:
        seen: Its state at each of its results, before they moved it.
    """

    name: str
    health: Health = attrs.field(factory=lambda: Health(1.0))
    seen: list[str] = attrs.field(factory=list)

    def note(self) -> None:
        self.seen.append(str(self.health.state))


@attrs.define(eq=False)
class Watching:
    """A watch and its targets."""

    places: tuple[Place, ...]
    watch: Watch[Place, HealthCheckOptions]

    @property
    def states(self) -> list[str]:
        return [str(place.health.state) for place in self.places]


def watching(
    probe: Callable[[Place, HealthCheckOptions], Awaitable[ProbeResult]],
    *names: str,
    lines: Lines | None = None,
    debug: bool = False,
) -> Watching:
    places = tuple(Place(name) for name in names or ("a1:80",))
    log = (lines or Lines()).log(debug=debug)
    return Watching(places, Watch(places, HealthCheckOptions(), probe, log, Place.note))


# Health


async def test_healthy_when_all_targets_are(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = watching(Probes({"b1:80": ["refused", "refused", True]}), "a1:80", "b1:80")
    await nursery.start(made.watch.run)
    start = trio.current_time()
    await made.watch.wait_until_healthy()
    assert trio.current_time() - start == pytest.approx(0.15)
    assert made.states == ["healthy", "healthy"]
    nursery.cancel_scope.cancel()


async def test_not_healthy_when_the_first_fails_before_the_last_answers(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    probes = Probes({"a1:80": [True, "refused"], "b1:80": ["x"] * 7 + [True]})
    made = watching(probes, "a1:80", "b1:80")
    await nursery.start(made.watch.run)
    with trio.move_on_after(60) as scope:
        await made.watch.wait_until_healthy()
    assert scope.cancelled_caught
    assert made.states == ["unhealthy", "healthy"]
    nursery.cancel_scope.cancel()


async def test_probe_times(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    failing: list[bool | str] = ["refused"] * 7
    probes = Probes({"a1:80": [*failing, True, True, "refused", "refused", True]})
    made = watching(probes)
    start = trio.current_time()
    await nursery.start(made.watch.run)
    await trio.sleep(9)
    delays = [0, 0.05, 0.15, 0.35, 0.75, 1.55, 2.55, 3.55, 4.55, 5.55, 6.55, 7.55, 8.55]
    assert [time - start for time in probes.times["a1:80"]] == pytest.approx(delays)
    nursery.cancel_scope.cancel()


async def test_a_slow_probe_does_not_delay_the_next_any_further(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    begun = []

    async def probe(_: Place, __: HealthCheckOptions) -> ProbeResult:
        begun.append(trio.current_time())
        await trio.sleep(0.75)
        return ProbeResult(True, "status 200", "")

    made = watching(probe)
    await nursery.start(made.watch.run)
    await trio.sleep(3.5)
    assert [time - begun[0] for time in begun] == pytest.approx([0, 1, 2, 3])
    nursery.cancel_scope.cancel()


async def test_targets_are_probed_side_by_side(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    probes = Probes({"a1:80": [HANG]})
    made = watching(probes, "a1:80", "b1:80")
    await nursery.start(made.watch.run)
    await trio.sleep(2.5)
    assert len(probes.times["a1:80"]) == 1
    assert len(probes.times["b1:80"]) == 3
    nursery.cancel_scope.cancel()


async def test_each_change_is_logged_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    lines = Lines()
    results: list[bool | str] = ["refused", "refused", "timeout", True, True, "timeout", "timeout"]
    made = watching(Probes({"a1:80": [*results, True]}), lines=lines)
    await nursery.start(made.watch.run)
    await trio.sleep(20)
    assert lines.of("Target health updated") == [
        {"target": "a1:80", "state": "healthy", "was": "adding"},
        {"target": "a1:80", "state": "unhealthy", "was": "healthy"},
        {"target": "a1:80", "state": "healthy", "was": "unhealthy"},
    ]
    assert [line["error"] for line in lines.of("Healthcheck failed")] == [
        "refused",
        "timeout",
        "timeout",
    ]
    assert lines.of("Healthcheck failed")[0]["url"] == "http://a1:80/up"
    nursery.cancel_scope.cancel()


async def test_every_failed_probe_is_logged_when_debugging(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lines = Lines()
    made = watching(Probes({"a1:80": ["refused"] * 4 + [True]}), lines=lines, debug=True)
    await nursery.start(made.watch.run)
    await trio.sleep(5)
    assert len(lines.of("Healthcheck failed")) == 4
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [RuntimeError("bad luck"), ExceptionGroup("x", [OSError()])])
async def test_a_probe_that_raises_has_failed(
    nursery: trio.Nursery, error: Exception, autojump_clock: MockClock
) -> None:
    lines = Lines()
    told: list[tuple[bool, str]] = []
    probed = 0

    async def probe(_: Place, __: HealthCheckOptions) -> ProbeResult:
        nonlocal probed
        await trio.lowlevel.checkpoint()
        probed += 1
        if probed in (1, 4):
            raise error
        return ProbeResult(True, "status 200", "")

    made = watching(probe, lines=lines)
    made.watch.on_probe = lambda _, result: told.append((result.ok, result.reason))
    await nursery.start(made.watch.run)
    await trio.sleep(5)
    assert [ok for ok, _ in told[:5]] == [False, True, True, False, True]
    assert repr(error) in told[0][1]
    assert lines.of("Probe failed") == [{"target": "a1:80", "error": repr(error)}] * 2
    assert [line["state"] for line in lines.of("Target health updated")] == [
        "healthy",
        "unhealthy",
        "healthy",
    ]
    nursery.cancel_scope.cancel()


async def test_each_probe_is_told_while_somebody_listens(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    told: list[tuple[str, bool]] = []
    made = watching(Probes({"a1:80": ["refused", True]}))
    made.watch.on_probe = lambda target, result: told.append((target.name, result.ok))
    await nursery.start(made.watch.run)
    await made.watch.wait_until_healthy()
    made.watch.on_probe = None
    await trio.sleep(10)
    assert told == [("a1:80", False), ("a1:80", True)]
    nursery.cancel_scope.cancel()


async def test_a_result_is_noted_before_it_moves_the_health(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = watching(Probes({"a1:80": ["refused", True, "refused", True]}))
    await nursery.start(made.watch.run)
    await trio.sleep(3)
    assert made.places[0].seen == ["adding", "adding", "healthy", "unhealthy"]
    nursery.cancel_scope.cancel()


# The end


async def test_stopped_it_probes_no_more(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    probes = Probes({"b1:80": [HANG]})
    made = watching(probes, "a1:80", "b1:80")
    with trio.fail_after(60):
        async with trio.open_nursery() as watch:
            await watch.start(made.watch.run)
            await trio.sleep(2.5)
            made.watch.stop()
    probes.times.clear()
    await trio.sleep(10)
    assert probes.times == {}
    assert made.states == ["healthy", "adding"]


@pytest.mark.parametrize("ok", [True, False])
async def test_a_result_that_comes_too_late_is_ignored(
    nursery: trio.Nursery, ok: bool, autojump_clock: MockClock
) -> None:
    finish = trio.Event()
    told: list[object] = []
    lines = Lines()

    async def probe(_: Place, __: HealthCheckOptions) -> ProbeResult:
        await finish.wait()
        return ProbeResult(ok, "in the last moment", "")

    made = watching(probe, lines=lines)
    made.watch.on_probe = lambda *what: told.append(what)
    await nursery.start(made.watch.run)
    await wait_all_tasks_blocked()
    finish.set()
    made.watch.stop()
    await wait_all_tasks_blocked()
    assert (made.states, made.places[0].seen) == (["adding"], [])
    assert (lines.messages, told) == ([], [])
    with trio.move_on_after(1) as waiting:
        await made.watch.wait_until_healthy()
    assert waiting.cancelled_caught


async def test_stopped_before_it_runs(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    made = watching(Probes())
    made.watch.stop()
    await nursery.start(made.watch.run)
    await wait_all_tasks_blocked()
    assert made.places[0].seen == []


async def test_without_targets_there_is_nothing_to_wait_for() -> None:
    watch = Watch[Place, HealthCheckOptions]((), HealthCheckOptions(), Probes(), Lines().log())
    with trio.fail_after(5):
        await watch.run()


def test_cancelled_at_every_await() -> None:
    def attempt(step: int) -> bool:
        async def life() -> bool:
            made = watching(Probes({"a1:80": ["refused", True]}), "a1:80", "b1:80")
            with trio.CancelScope() as scope:
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                async with trio.open_nursery() as nursery:
                    await nursery.start(made.watch.run)
                    await made.watch.wait_until_healthy()
                    made.watch.stop()
                trio.lowlevel.remove_instrument(steps)
            assert scope.cancelled_caught or made.states == ["healthy", "healthy"]
            return scope.cancel_called

        return trio.run(life, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 5
