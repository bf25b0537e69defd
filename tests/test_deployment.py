"""Deployments: probing, health, rotation, drains, and cancellation at every await."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.deployment import _UNWIND, Deployment, DrainResult, Target
from kamal_proxy.health import ProbeResult, TargetState
from kamal_proxy.target_options import HealthCheckOptions
from tests.deploying import HANG, Connections, Lines, Probes, Request, run_with_every_cancellation
from tests.pairs import Steps

if TYPE_CHECKING:
    from collections.abc import Callable


def deployment(
    probes: Callable[..., object],
    *targets: str,
    readers: tuple[str, ...] = (),
    lines: Lines | None = None,
    trusted: bool = False,
    forced: bool = False,
) -> Deployment:
    return Deployment(
        targets or ("a1:80",),
        readers=readers,
        health_check=HealthCheckOptions(interval=1.0),
        probe=probes,  # type: ignore[arg-type]  # a probe is any such callable
        connect=Connections,
        log=(lines or Lines()).log(),
        trusted=trusted,
        forced=forced,
    )


def states(made: Deployment) -> list[str]:
    return [str(target.health.state) for target in made.targets]


def all_closed(made: Deployment) -> bool:
    return all(target.connections.closed for target in made.targets)  # type: ignore[attr-defined]


# Health


async def test_its_targets_are_probed_while_it_is_active(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    probes = Probes({"b1:80": ["refused", "refused", True]})
    made = deployment(probes, "a1:80", "b1:80")
    await nursery.start(made.run)
    start = trio.current_time()
    await made.watch.wait_until_healthy()
    assert trio.current_time() - start == pytest.approx(0.15)
    assert states(made) == ["healthy", "healthy"]
    made.retire(1)
    probes.times.clear()
    await trio.sleep(10)
    assert probes.times == {}


async def test_kept_connections_are_trimmed_with_each_probe(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    probes = Probes({"a1:80": [True, "refused", True]})
    made = deployment(probes)
    await nursery.start(made.run)
    await trio.sleep(9.5)
    connections = made.targets[0].connections
    assert connections.trimmed == len(probes.times["a1:80"]) == 10  # type: ignore[attr-defined]
    nursery.cancel_scope.cancel()


# Rotation


@pytest.mark.parametrize(
    ("targets", "trusted", "forced", "script", "expected"),
    [
        (("a1:80",), False, False, {"a1:80": ["refused"]}, {"a1:80"}),
        (("a1:80",), False, False, {"a1:80": [True, "refused"]}, {"a1:80"}),
        (("a1:80", "b1:80"), False, False, {"a1:80": ["refused"]}, {"b1:80"}),
        (("a1:80", "b1:80"), False, False, {"a1:80": [HANG], "b1:80": [HANG]}, {None}),
        (("a1:80", "b1:80"), False, True, {"a1:80": [HANG], "b1:80": ["x"]}, {"a1:80", "b1:80"}),
        (("a1:80", "b1:80"), False, True, {"a1:80": [True, "x"]}, {"b1:80"}),
        (("a1:80", "b1:80"), True, False, {"a1:80": [HANG], "b1:80": [HANG]}, {"a1:80", "b1:80"}),
        (("a1:80", "b1:80"), True, False, {"a1:80": ["refused"]}, {"b1:80"}),
    ],
)
async def test_who_is_chosen(
    nursery: trio.Nursery,
    targets: tuple[str, ...],
    trusted: bool,
    forced: bool,
    script: dict[str, list[bool | str]],
    expected: set[str | None],
    autojump_clock: MockClock,
) -> None:
    made = deployment(Probes(script), *targets, trusted=trusted, forced=forced)
    await nursery.start(made.run)
    await trio.sleep(5)
    chosen = [made.choose(set()) for _ in range(4)]
    assert {target and target.name for target in chosen} == expected
    nursery.cancel_scope.cancel()


def test_a_target_knows_where_it_is() -> None:
    (target,) = deployment(Probes(), "web-1").targets
    assert (target.name, target.host, target.port) == ("web-1", "web-1", 80)
    assert (target.connections.host, target.connections.port) == ("web-1", 80)  # type: ignore[attr-defined]


# Read targets


@pytest.mark.parametrize(
    ("script", "reading", "expected"),
    [
        ({}, True, "r2 r1 r2 r1"),
        ({}, False, "w2 w1 w2 w1"),
        ({"r1:80": ["refused"]}, True, "r2 r2 r2 r2"),
        ({"r1:80": ["refused"], "r2:80": ["refused"]}, True, "w2 w1 w2 w1"),
        ({"w1:80": ["refused"]}, False, "w2 w2 w2 w2"),
        ({"w1:80": ["refused"], "w2:80": ["refused"]}, False, "- - - -"),
        ({"w1:80": ["refused"], "w2:80": ["refused"]}, True, "r2 r1 r2 r1"),
    ],
)
async def test_who_reads_and_who_writes(
    nursery: trio.Nursery,
    script: dict[str, list[bool | str]],
    reading: bool,
    expected: str,
    autojump_clock: MockClock,
) -> None:
    made = deployment(Probes(script), "w1:80", "w2:80", readers=("r1:80", "r2:80"), trusted=True)
    assert made.has_readers
    assert (made.writer_names, made.reader_names) == (("w1:80", "w2:80"), ("r1:80", "r2:80"))
    await nursery.start(made.run)
    await trio.sleep(5)
    chosen = [made.choose(set(), reading=reading) for _ in range(4)]
    assert " ".join(target.host if target else "-" for target in chosen) == expected
    nursery.cancel_scope.cancel()


async def test_a_lone_writer_always_serves_and_a_lone_reader_does_not(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    probes = Probes({"w1:80": [True, "refused"], "r1:80": [True, "refused"]})
    made = deployment(probes, "w1:80", readers=("r1:80",))
    await nursery.start(made.run)
    await made.watch.wait_until_healthy()
    reader, writer = made.choose(set(), reading=True), made.choose(set())
    assert reader is not None
    assert writer is not None
    assert (reader.name, writer.name) == ("r1:80", "w1:80")
    await trio.sleep(5)
    assert states(made) == ["unhealthy", "unhealthy"]
    assert made.choose(set(), reading=True) is writer
    assert made.choose(set()) is writer
    assert made.choose({writer}, reading=True) is None
    nursery.cancel_scope.cancel()


async def test_a_reader_that_has_failed_a_request_is_avoided(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes(), "w1:80", readers=("r1:80", "r2:80"), trusted=True)
    failed: set[Target] = set()
    order = []
    while (target := made.choose(failed, reading=True)) is not None:
        order.append(target.host)
        failed.add(target)
    assert sorted(order[:2]) == ["r1", "r2"]
    assert order[2:] == ["w1"]


async def test_readers_must_become_healthy_too(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes({"r1:80": ["refused"] * 3 + [True]}), "w1:80", readers=("r1:80",))
    await nursery.start(made.run)
    start = trio.current_time()
    await made.watch.wait_until_healthy()
    assert trio.current_time() - start == pytest.approx(0.35)
    nursery.cancel_scope.cancel()


# Draining


async def test_a_drain_in_service(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A paused service drains, and goes on."""
    made = deployment(Probes())
    await nursery.start(made.run)
    assert await made.drain(10) == DrainResult()
    ending, lasting = Request(made), Request(made)
    start = trio.current_time()
    async with trio.open_nursery() as drains:

        async def drain() -> None:
            assert await made.drain(10) == DrainResult(completed=1, cancelled=1)

        drains.start_soon(drain)
        await trio.sleep(1)
        later = Request(made)
        ending.end()
    assert trio.current_time() - start == pytest.approx(10)
    assert (ending.aborted, lasting.aborted, later.aborted) == (False, True, False)
    assert later.drains == []
    (seen,) = lasting.drains
    assert seen.deadline - start == pytest.approx(10)
    assert not made.drained
    assert not made.retired
    assert made.in_flight == 1
    assert not all_closed(made)
    made.retire(1)
    assert await made.wait_drained() == DrainResult(cancelled=1)
    assert later.aborted


async def test_a_drain_that_is_called_off_cuts_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    request = Request(made)
    with trio.move_on_after(3) as scope:
        await made.drain(10)
    assert scope.cancelled_caught
    (seen,) = request.drains
    assert seen.called_off
    await trio.sleep(100)
    assert not request.aborted
    request.end()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("within", [5, 10, 15])
async def test_what_one_drain_cuts_is_cut_for_all(
    nursery: trio.Nursery, within: float, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    Request(made)
    results = []

    async def drain(seconds: float) -> None:
        results.append(await made.drain(seconds))

    async with trio.open_nursery() as drains:
        drains.start_soon(drain, 10)
        drains.start_soon(drain, within)
        await wait_all_tasks_blocked()
        made.retire(20)
    assert results == [DrainResult(0, 1)] * 2
    assert await made.wait_drained() == DrainResult(0, 1)


async def test_a_drain_with_nothing_in_flight_is_over_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    start = trio.current_time()
    made.retire(30)
    assert await made.wait_drained() == DrainResult(0, 0)
    assert trio.current_time() == start
    assert all_closed(made)


async def test_a_drain_ends_with_the_last_request(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    before = Request(made)
    before.end()
    requests = [Request(made) for _ in range(3)]
    start = trio.current_time()
    made.retire(30)
    for count, request in enumerate(requests, 1):
        await trio.sleep(1)
        assert made.in_flight == len(requests) - count + 1
        assert not all_closed(made)
        request.end()
    assert await made.wait_drained() == DrainResult(completed=3, cancelled=0)
    assert trio.current_time() - start == pytest.approx(3)
    assert not any(request.aborted for request in requests)
    assert all_closed(made)


async def test_the_deadline_cuts_what_is_left(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    quick, slow, slower = (Request(made) for _ in range(3))
    start = trio.current_time()
    made.retire(10)
    await trio.sleep(1)
    quick.end()
    assert await made.wait_drained() == DrainResult(completed=1, cancelled=2)
    assert trio.current_time() - start == pytest.approx(10)
    assert (quick.aborted, slow.aborted, slower.aborted) == (False, True, True)
    assert made.in_flight == 0


async def test_no_time_to_drain(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    request = Request(made)
    made.retire(0)
    assert await made.wait_drained() == DrainResult(0, 1)
    assert request.aborted


async def test_a_request_that_can_not_end_is_left_behind(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    Request(made, obedient=False)
    start = trio.current_time()
    made.retire(10)
    assert await made.wait_drained() == DrainResult(0, 1)
    assert trio.current_time() - start == pytest.approx(10 + _UNWIND)
    assert all_closed(made)


async def test_retiring_stops_the_probes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    probes = Probes()
    made = deployment(probes)
    await nursery.start(made.run)
    request = Request(made)
    await trio.sleep(2.5)
    made.retire(30)
    await trio.sleep(10)
    assert len(probes.times["a1:80"]) == 3
    assert states(made) == ["healthy"]
    request.end()


async def test_an_unhealthy_target_gets_nothing_while_it_drains(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A request that must be sent again chooses once more, whatever has happened meanwhile."""
    made = deployment(Probes({"b1:80": [True, "refused"]}), "a1:80", "b1:80")
    await nursery.start(made.run)
    await trio.sleep(5)
    assert states(made) == ["healthy", "unhealthy"]
    request = Request(made)
    made.retire(30)
    chosen = [made.choose(set()) for _ in range(4)]
    assert {target and target.name for target in chosen} == {"a1:80"}
    request.end()


async def test_retiring_in_the_middle_of_a_probe(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lines = Lines()
    made = deployment(Probes({"a1:80": [HANG]}), lines=lines)
    await nursery.start(made.run)
    await wait_all_tasks_blocked()
    made.retire(30)
    assert await made.wait_drained() == DrainResult()
    assert states(made) == ["adding"]
    assert lines.messages == []


@pytest.mark.parametrize("ok", [True, False])
async def test_a_probe_that_ends_as_its_deployment_is_retired_changes_nothing(
    nursery: trio.Nursery, ok: bool, autojump_clock: MockClock
) -> None:
    finish = trio.Event()
    told: list[object] = []
    lines = Lines()

    async def probe(_: Target, __: HealthCheckOptions) -> ProbeResult:
        await finish.wait()
        return ProbeResult(ok, "in the last moment", "")

    made = deployment(probe, lines=lines)
    made.watch.on_probe = lambda *what: told.append(what)
    await nursery.start(made.run)
    await wait_all_tasks_blocked()
    finish.set()
    made.retire(30)
    await made.wait_drained()
    assert states(made) == ["adding"]
    assert lines.messages == []
    assert told == []


async def test_a_retired_deployment_takes_no_requests(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    made.retire(1)
    with pytest.raises(AssertionError):
        Request(made)
    await made.wait_drained()


async def test_ending_twice_is_harmless(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    made = deployment(Probes())
    await nursery.start(made.run)
    request = Request(made)
    request.end()
    request.end()
    assert made.in_flight == 0
    nursery.cancel_scope.cancel()


async def test_says_what_it_is(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    made = deployment(Probes(), "a1:80", "b1:81")
    assert repr(made) == "<Deployment a1:80,b1:81 active in_flight=0>"
    await nursery.start(made.run)
    request = Request(made)
    made.retire(30)
    assert repr(made) == "<Deployment a1:80,b1:81 draining in_flight=1>"
    request.end()
    await made.wait_drained()
    assert repr(made) == "<Deployment a1:80,b1:81 drained in_flight=0>"


# Cancellation


async def test_cancelled_while_probing_closes_the_connections(autojump_clock: MockClock) -> None:
    made = deployment(Probes({"a1:80": [HANG]}))
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        nursery.cancel_scope.cancel()
    assert all_closed(made)
    await made.wait_drained()


async def test_cancelled_while_draining_closes_the_connections(autojump_clock: MockClock) -> None:
    made = deployment(Probes())
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        Request(made)
        made.retire(30)
        await wait_all_tasks_blocked()
        assert not all_closed(made)
        nursery.cancel_scope.cancel()
    assert all_closed(made)
    await made.wait_drained()


def test_cancelled_at_every_await() -> None:
    def attempt(step: int) -> bool:
        async def life() -> bool:
            made = deployment(Probes({"a1:80": ["refused", True]}), "a1:80", "b1:80")
            with trio.CancelScope() as scope:
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                async with trio.open_nursery() as nursery:
                    await nursery.start(made.run)
                    await made.watch.wait_until_healthy()
                    stubborn, quick = Request(made, obedient=False), Request(made)
                    made.retire(1)
                    quick.end()
                    await made.wait_drained()
                    stubborn.end()
                trio.lowlevel.remove_instrument(steps)
            assert all_closed(made) or not made._drained.is_set()
            if made._drained.is_set():
                await made.wait_drained()
            return scope.cancel_called

        return trio.run(life, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 10


@pytest.mark.parametrize("state", list(TargetState))
def test_states_are_words_of_the_log(state: TargetState) -> None:
    assert f"{state}" == state.value == state.name.lower()
