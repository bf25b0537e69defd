"""HTTP and UDP services behind one face: who is asked, one story of two drains, what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.all_services import AllServices
from kamal_proxy.control.messages import Event, ServiceDescription
from kamal_proxy.deployment import DrainResult
from kamal_proxy.errors import (
    InvalidOptionsError,
    KamalProxyError,
    ListenError,
    ResumedError,
    ServiceNotFoundError,
    ShuttingDownError,
    StateError,
)
from kamal_proxy.logs import Log
from kamal_proxy.options import (
    DeployOptions,
    PauseOptions,
    RolloutOptions,
    RolloutSplit,
    StopOptions,
)
from kamal_proxy.reports import Report
from kamal_proxy.udp.options import UdpDeployOptions
from tests.deploying import (
    Lines,
    Request,
    open_room,
    run_with_every_cancellation,
    save_in_this_thread,
)
from tests.pairs import Steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


NO_SPACE = StateError("can't save the state to /x: No space left on device")


@attrs.define(eq=False)
class FakeKind:
    """Services of one kind, whose drains last as long as a test says.

    Attributes:
        names: The services that there are.
        in_flight: What each of them is serving.
        drain: Seconds that a pause or a stop waits for it.
        result: How that ends.
        error: Raised by every change, at once.
        late_error: Raised by a pause or a stop after its drain.
        calls: What was asked for.
        ended: Those pauses and stops that came to their end.
    """

    log: Log
    names: set[str] = attrs.field(factory=set)
    in_flight: int = 0
    drain: float = 0.0
    result: DrainResult = attrs.field(factory=DrainResult)
    error: Exception | None = None
    late_error: Exception | None = None
    calls: list[tuple[object, ...]] = attrs.field(factory=list)
    ended: list[str] = attrs.field(factory=list)

    def has(self, name: str) -> bool:
        return name in self.names

    async def remove(self, name: str) -> None:
        await self._change("remove", name)
        self.names.discard(name)

    async def resume(self, name: str) -> None:
        await self._change("resume", name)

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        return await self._hold("pause", name, options, progress)

    async def stop_service(
        self, name: str, options: StopOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        return await self._hold("stop", name, options, progress)

    def close(self) -> None:
        self.calls.append(("close",))

    def describe(self) -> list[ServiceDescription]:
        return [
            ServiceDescription(name=name, in_flight=self.in_flight) for name in sorted(self.names)
        ]

    async def deploy(self, options: Any, progress: Callable[[Event], None] | None) -> DrainResult:
        return await self._take("deploy", options, progress)

    async def deploy_rollout(
        self, name: str, options: RolloutOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        return await self._take("deploy_rollout", name, options, progress)

    async def set_rollout(self, name: str, split: RolloutSplit) -> None:
        await self._take("set_rollout", name, split)

    async def stop_rollout(self, name: str) -> None:
        await self._take("stop_rollout", name)

    async def _take(self, *call: object) -> DrainResult:
        self.calls.append(call)
        await trio.lowlevel.checkpoint()
        return self.result

    async def _change(self, what: str, name: str, *options: object) -> None:
        self.calls.append((what, name, *options))
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        if name not in self.names:
            raise ServiceNotFoundError("service not found")

    async def _hold(
        self, what: str, name: str, options: object, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        report = Report(progress, self.log)
        await self._change(what, name, options)
        async with trio.open_nursery() as watchers:
            watchers.start_soon(report.tell_draining, lambda: self.in_flight)
            await trio.sleep(self.drain)
            watchers.cancel_scope.cancel()
        if self.late_error is not None:
            raise self.late_error
        self.ended.append(what)
        report.done(self.result)
        return self.result


@attrs.define(eq=False)
class House:
    """All services, both kinds of which have one named ``app``."""

    lines: Lines = attrs.field(factory=Lines)
    events: list[Event] = attrs.field(factory=list)
    http: FakeKind = attrs.field(init=False)
    udp: FakeKind = attrs.field(init=False)
    services: AllServices = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.http = FakeKind(self.lines.log(), {"app"})
        self.udp = FakeKind(self.lines.log(), {"app"})
        self.services = AllServices(self.http, self.udp, self.lines.log())

    async def do(self, change: str, name: str = "app") -> DrainResult | None:
        """Make one of the changes that both kinds know."""
        if change == "pause":
            return await self.services.pause(name, PAUSE, self.events.append)
        if change == "stop":
            return await self.services.stop_service(name, STOP, self.events.append)
        await (self.services.remove(name) if change == "remove" else self.services.resume(name))
        return None

    @property
    def told(self) -> list[tuple[str, int]]:
        return [(event.event, event.in_flight) for event in self.events]


PAUSE, STOP = PauseOptions(max_pause=7), StopOptions(message="back soon")
CHANGES: dict[str, tuple[object, ...]] = {
    "pause": ("pause", "app", PAUSE),
    "stop": ("stop", "app", STOP),
    "remove": ("remove", "app"),
    "resume": ("resume", "app"),
}
DONE = {"pause": "paused", "stop": "stopped", "remove": "removed", "resume": "resumed"}


@pytest.fixture
def house() -> House:
    return House()


# Who is asked


@pytest.mark.parametrize("having", [("http",), ("udp",), ("http", "udp")])
@pytest.mark.parametrize("change", CHANGES)
async def test_every_kind_that_has_the_name_is_asked(
    house: House, autojump_clock: MockClock, change: str, having: tuple[str, ...]
) -> None:
    for called in {"http", "udp"} - set(having):
        getattr(house, called).names = {"other"}
    await house.do(change)
    assert house.http.calls == [CHANGES[change]] * ("http" in having)
    assert house.udp.calls == [CHANGES[change]] * ("udp" in having)


@pytest.mark.parametrize("change", CHANGES)
async def test_a_name_that_no_kind_has_is_not_found(
    house: House, autojump_clock: MockClock, change: str
) -> None:
    with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
        await house.do(change, "nobody")
    assert (house.events, house.udp.calls) == ([], [])


async def test_what_one_kind_can_do_goes_to_that_kind(
    house: House, autojump_clock: MockClock
) -> None:
    deploy = DeployOptions(service="app", targets=("v1",))
    udp_deploy = UdpDeployOptions(service="app", targets=("v1:9000",))
    rollout, split = RolloutOptions(targets=("v2",)), RolloutSplit(percentage=10)
    house.http.result, house.udp.result = DrainResult(1, 2), DrainResult(3, 4)
    tell = house.events.append
    assert await house.services.deploy(deploy, tell) == DrainResult(1, 2)
    assert await house.services.deploy_udp(udp_deploy, tell) == DrainResult(3, 4)
    assert await house.services.deploy_rollout("app", rollout, tell) == DrainResult(1, 2)
    await house.services.set_rollout("app", split)
    await house.services.stop_rollout("app")
    assert house.http.calls == [
        ("deploy", deploy, tell),
        ("deploy_rollout", "app", rollout, tell),
        ("set_rollout", "app", split),
        ("stop_rollout", "app"),
    ]
    assert house.udp.calls == [("deploy", udp_deploy, tell)]


def test_all_are_described_by_name_and_http_first(house: House) -> None:
    house.http.names, house.udp.names = {"b", "app", "d"}, {"c", "app"}
    house.http.in_flight, house.udp.in_flight = 1, 2
    assert [(each.name, each.in_flight) for each in house.services.describe()] == [
        ("app", 1),
        ("app", 2),
        ("b", 1),
        ("c", 2),
        ("d", 1),
    ]


# One story of two drains


@pytest.mark.parametrize("change", ["pause", "stop"])
async def test_two_drains_are_told_as_one(
    house: House, autojump_clock: MockClock, change: str
) -> None:
    house.http.in_flight, house.http.drain, house.http.result = 3, 2.5, DrainResult(2, 1)
    house.udp.in_flight, house.udp.drain, house.udp.result = 40, 4.5, DrainResult(30, 10)
    assert await house.do(change) == DrainResult(32, 11)
    # The tasks of a nursery begin in any order: one kind is told first, then always both.
    assert house.told[0] in {("draining", 3), ("draining", 40)}
    assert house.told[1:] == [
        *[("draining", 43)] * 3,
        *[("draining", 40)] * 2,
        ("done", 0),
    ]
    assert [event.elapsed for event in house.events] == pytest.approx([0, 0, 1, 2, 3, 4, 4.5])
    assert (house.events[-1].completed, house.events[-1].cancelled) == (32, 11)


async def test_what_is_told_follows_what_is_in_flight(
    house: House, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    house.http.in_flight, house.http.drain = 5, 10
    house.udp.in_flight, house.udp.drain = 100, 10
    nursery.start_soon(house.do, "pause")
    await trio.sleep(1.5)
    house.http.in_flight, house.udp.in_flight = 4, 50
    await trio.sleep(2)
    assert house.told[-1] == ("draining", 54)


async def test_the_drain_of_one_kind_is_told_by_that_kind(
    house: House, autojump_clock: MockClock
) -> None:
    house.udp.names = set()
    house.http.in_flight, house.http.drain, house.http.result = 3, 1.5, DrainResult(2, 1)
    assert await house.do("pause") == DrainResult(2, 1)
    assert house.told == [("draining", 3), ("draining", 3), ("done", 0)]


class Probing(FakeKind):
    """A kind that tells more than that it drains."""

    async def pause(
        self, name: str, options: PauseOptions, progress: Callable[[Event], None] | None
    ) -> DrainResult:
        assert progress is not None
        await trio.sleep(2)
        progress(Event(event="probe", target="a1:80", elapsed=99.0))
        return DrainResult()


async def test_other_steps_are_told_with_the_time_of_the_whole(
    house: House, autojump_clock: MockClock
) -> None:
    probing = Probing(house.lines.log(), {"app"})
    services = AllServices(house.http, probing, house.lines.log())
    await services.pause("app", PAUSE, house.events.append)
    (probe,) = [event for event in house.events if event.event == "probe"]
    assert probe.target == "a1:80"
    assert probe.elapsed == pytest.approx(2)


async def test_without_progress_nothing_is_told(house: House, autojump_clock: MockClock) -> None:
    house.http.result, house.udp.drain = DrainResult(1, 0), 5
    assert await house.services.pause("app", PAUSE) == DrainResult(1, 0)
    assert await house.services.stop_service("app", STOP) == DrainResult(1, 0)
    assert house.lines.texts == []


async def test_progress_that_raises_harms_nothing(house: House, autojump_clock: MockClock) -> None:
    told: list[Event] = []

    def progress(event: Event) -> None:
        told.append(event)
        raise RuntimeError("no terminal")

    house.http.drain = house.udp.drain = 5
    house.udp.result = DrainResult(7, 0)
    assert await house.services.pause("app", PAUSE, progress) == DrainResult(7, 0)
    assert len(told) == 1
    assert house.lines.of("Progress callback failed") == [{"error": "RuntimeError('no terminal')"}]


# What went wrong


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("failing", "other"), [("http", "udp"), ("udp", "http")])
async def test_one_kind_that_fails_leaves_the_other_alone(
    house: House, autojump_clock: MockClock, change: str, failing: str, other: str
) -> None:
    getattr(house, failing).error = StateError(str(NO_SPACE), ["look at /x"])
    getattr(house, other).drain = 5
    getattr(house, other).result = DrainResult(2, 1)
    with pytest.raises(StateError) as caught:
        await house.do(change)
    assert str(caught.value) == (
        f"service app is {DONE[change]} for {other.upper()}, but not for {failing.upper()}: "
        "can't save the state to /x: No space left on device"
    )
    drained = [f"{other.upper()}: 2 finished, 1 cut off"]
    holds = change in ("pause", "stop")
    assert caught.value.details == (*(drained if holds else []), "look at /x")
    assert caught.value.__cause__ is getattr(house, failing).error
    assert getattr(house, other).ended == ([change] if holds else [])
    assert getattr(house, other).calls == [CHANGES[change]]
    assert {event.event for event in house.events} == ({"draining"} if holds else set())
    if change == "remove":
        # Once again is enough.
        getattr(house, failing).error = None
        await house.do("remove")
        assert house.services.describe() == []


async def test_the_others_drain_is_still_told_after_one_kind_failed(
    house: House, autojump_clock: MockClock
) -> None:
    house.http.in_flight, house.http.drain, house.http.late_error = 3, 2.5, NO_SPACE
    house.udp.in_flight, house.udp.drain = 40, 4.5
    with pytest.raises(StateError):
        await house.do("pause")
    assert house.told[1:] == [*[("draining", 43)] * 3, *[("draining", 40)] * 2]


@pytest.mark.parametrize(
    "error",
    [
        InvalidOptionsError("--drain-timeout must not be negative"),
        ShuttingDownError("the proxy is not running"),
    ],
)
async def test_what_both_say_is_said_once(
    house: House, autojump_clock: MockClock, error: Exception
) -> None:
    house.http.error = error
    house.udp.error = type(error)(str(error))
    with pytest.raises(type(error)) as caught:
        await house.do("pause")
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("late", ["http", "udp"])
async def test_both_fail_in_ways_of_their_own(
    house: House, autojump_clock: MockClock, late: str
) -> None:
    house.http.error, house.udp.error = NO_SPACE, ListenError("can't bind", ["port 9999"])
    if late == "http":  # whoever fails first, HTTP is told of first
        house.http.error, house.http.late_error, house.http.drain = None, NO_SPACE, 3
    with pytest.raises(StateError) as caught:
        await house.do("stop")
    assert str(caught.value) == (
        "service app is not stopped: HTTP: can't save the state to /x: No space left on device; "
        "UDP: can't bind"
    )
    assert caught.value.details == ("port 9999",)


@pytest.mark.parametrize("udp", ["held", "resumed"])
async def test_a_resume_is_told_as_it_is(house: House, autojump_clock: MockClock, udp: str) -> None:
    """A pause of UDP services may be over at once; a resume ends it all the same."""
    house.http.late_error = ResumedError("service app was resumed while it drained")
    if udp == "resumed":
        house.udp.late_error = ResumedError("service app was resumed while its sessions drained")
    with pytest.raises(ResumedError, match=r"^service app was resumed while it drained$"):
        await house.do("pause")


async def test_a_resume_does_not_hide_what_is_worse(
    house: House, autojump_clock: MockClock
) -> None:
    house.http.late_error = ResumedError("service app was resumed while it drained")
    house.udp.error = NO_SPACE
    with pytest.raises(
        StateError, match="HTTP: service app was resumed while it drained; UDP: can"
    ):
        await house.do("pause")


@pytest.mark.parametrize("gone", ["http", "udp"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_kind_that_was_removed_meanwhile_does_not_count(
    house: House, autojump_clock: MockClock, gone: str, change: str
) -> None:
    getattr(house, gone).error = ServiceNotFoundError("service not found")
    await house.do(change)
    other = house.udp if gone == "http" else house.http
    assert other.calls == [CHANGES[change]]


async def test_only_the_error_of_the_kind_that_is_left_counts(
    house: House, autojump_clock: MockClock
) -> None:
    house.http.error, house.udp.error = ServiceNotFoundError("service not found"), NO_SPACE
    with pytest.raises(StateError) as caught:
        await house.do("pause")
    assert caught.value is NO_SPACE


async def test_both_were_removed_meanwhile(house: House, autojump_clock: MockClock) -> None:
    house.http.error = ServiceNotFoundError("service not found")
    house.udp.error = ServiceNotFoundError("service not found")
    with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
        await house.do("remove")


@pytest.mark.parametrize("bug", [KeyError("oops"), ExceptionGroup("x", [OSError("oops")])])
async def test_a_bug_says_what_became_of_the_other_kind(
    house: House, autojump_clock: MockClock, bug: Exception
) -> None:
    house.udp.error, house.http.result = bug, DrainResult(1, 0)
    with pytest.raises(RuntimeError) as caught:
        await house.do("pause")
    assert str(caught.value) == (
        f"service app is paused for HTTP, but not for UDP: {bug!r}; HTTP: 1 finished, 0 cut off"
    )
    assert caught.value.__cause__ is bug


async def test_a_bug_beside_a_failure_is_a_bug(house: House, autojump_clock: MockClock) -> None:
    house.udp.error, house.http.error = KeyError("oops"), NO_SPACE
    with pytest.raises(RuntimeError, match=r"not paused: HTTP: can't save .*; UDP: KeyError"):
        await house.do("pause")


# Cancellation


async def test_cancelled_both_are(house: House, autojump_clock: MockClock) -> None:
    house.http.drain = house.udp.drain = 100
    with trio.move_on_after(2.5) as scope:
        await house.do("pause")
    assert scope.cancelled_caught
    assert (house.http.ended, house.udp.ended) == ([], [])
    assert {event.event for event in house.events} == {"draining"}
    assert house.lines.texts == []


async def test_a_failure_that_a_cancellation_hides_is_logged(
    house: House, autojump_clock: MockClock
) -> None:
    house.http.error, house.udp.drain = NO_SPACE, 100
    with trio.move_on_after(1) as scope:
        await house.do("pause")
    assert scope.cancelled_caught
    assert house.lines.of("HTTP service not paused") == [
        {"service": "app", "error": repr(NO_SPACE)}
    ]


def test_cancelled_at_every_await() -> None:
    seen = set()

    def attempt(step: int) -> bool:
        async def life() -> bool:
            house = House()
            house.http.drain, house.udp.drain = 1.5, 2.5
            with trio.CancelScope() as scope:
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                await house.do("pause")
            trio.lowlevel.remove_instrument(steps)
            dones = [event.event for event in house.events].count("done")
            assert dones == (not scope.cancelled_caught)
            assert house.lines.texts == []
            seen.add((scope.cancelled_caught, len(house.http.ended), len(house.udp.ended)))
            return scope.cancel_called

        return trio.run(life, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 5
    assert seen >= {(True, 0, 0), (True, 1, 0), (False, 1, 1)}


# With the real HTTP services


async def test_the_http_services_are_a_kind(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_in_this_thread(monkeypatch)
    async with open_room(tmp_path) as room:
        udp = FakeKind(room.lines.log(), {"app"}, in_flight=40, result=DrainResult(40, 0))
        services = AllServices(room.services, udp, room.lines.log())
        with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
            await services.pause("nobody", PAUSE)
        await room.deploy("app", "v1")
        assert (room.services.has("app"), room.services.has("nobody")) == (True, False)
        flying = Request(room.active("app"))
        room.events.clear()
        outcomes: list[object] = []

        async def pause() -> None:
            try:
                outcomes.append(await services.pause("app", PAUSE, room.events.append))
            except KamalProxyError as error:
                outcomes.append(error)

        room.nursery.start_soon(pause)
        await trio.sleep(2.5)
        assert room.service("app").pause.state == "paused"
        await services.resume("app")
        await wait_all_tasks_blocked()
        assert isinstance(outcomes[0], ResumedError)
        assert room.service("app").pause.state == "running"
        assert not flying.aborted
        assert udp.calls[-1] == ("resume", "app")

        room.events.clear()
        room.nursery.start_soon(pause)
        await trio.sleep(1.5)
        flying.end()
        await wait_all_tasks_blocked()
        assert outcomes[1] == DrainResult(41, 0)
        assert (room.events[-1].event, room.events[-1].completed) == ("done", 41)
        assert [event.event for event in room.events].count("done") == 1

        await services.remove("app")
        assert services.describe() == []
