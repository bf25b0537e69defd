"""Looking up the names of targets, again and again: what a scripted name service says."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import lookups
from kamal_proxy.udp.names import LOOKUP_INTERVAL, LookupFailedError, SocketAddress, TargetName
from tests.deploying import Lines, run_with_every_cancellation
from tests.pairs import Steps

A, B = "192.0.2.1", "192.0.2.2"
UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@attrs.define(eq=False)
class NameService:
    """Answers look-ups by a script: each answer in turn, the last one for ever."""

    answers: list[list[str] | Exception]
    times: list[float] = attrs.field(factory=list)
    patience: float = 0  # seconds that a look-up takes

    async def resolve(
        self, host: str, port: int, limiter: object, kind: socket.SocketKind
    ) -> list[tuple[socket.AddressFamily, Any]]:
        assert (host, port, kind) == ("game-1", 9999, socket.SOCK_DGRAM)
        self.times.append(trio.current_time())
        await trio.sleep(self.patience)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [
            (socket.AF_INET6, (each, port, 0, 0)) if ":" in each else (socket.AF_INET, (each, port))
            for each in answer
        ]


def name_served_by(
    monkeypatch: pytest.MonkeyPatch, *answers: list[str] | Exception
) -> tuple[TargetName, NameService]:
    service = NameService(list(answers))
    monkeypatch.setattr(lookups, "resolve", service.resolve)
    return TargetName("game-1", 9999, trio.CapacityLimiter(1)), service


@attrs.define(eq=False)
class Kept:
    """A name that is kept fresh, and what came of it."""

    name: TargetName
    lines: Lines = attrs.field(factory=Lines)
    seen: list[tuple[float, tuple[SocketAddress, ...]]] = attrs.field(factory=list)
    news: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        log = self.lines.log(debug=True)
        await self.name.keep_fresh(log, self.changed, task_status=task_status)

    def changed(self) -> None:
        self.seen.append((trio.current_time(), self.name.addresses))
        self.news.set()
        self.news = trio.Event()

    async def wait_changes(self, count: int) -> None:
        while len(self.seen) < count:
            await self.news.wait()

    async def run_for(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.run()

    @property
    def warnings(self) -> list[str]:
        return [text for text in self.lines.texts if '"level":"WARN"' in text]


# Once


async def test_a_name_stands_for_nothing_until_it_is_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, _ = name_served_by(monkeypatch, [A, "2001:db8::1"])
    assert not name.addresses
    assert await name.resolve()
    assert name.addresses == ((A, 9999), ("2001:db8::1", 9999, 0, 0))


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.1", ("192.0.2.1", 9999)),
        ("2001:db8::1", ("2001:db8::1", 9999, 0, 0)),
        ("::ffff:192.0.2.1", ("192.0.2.1", 9999)),
    ],
)
async def test_an_address_is_never_looked_up(
    monkeypatch: pytest.MonkeyPatch, host: str, address: tuple[object, ...]
) -> None:
    async def resolve(*_: object) -> None:
        pytest.fail("looked up")

    monkeypatch.setattr(lookups, "resolve", resolve)
    name = TargetName(host, 9999, trio.CapacityLimiter(1))
    assert name.addresses == (address,)
    with trio.testing.assert_checkpoints():
        assert not await name.resolve()
    with trio.testing.assert_checkpoints():
        await Kept(name).run()
    name.poke()
    assert name.addresses == (address,)


async def test_each_address_is_told_once_and_ipv4_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = name_served_by(monkeypatch, [B, f"::ffff:{A}", A, B])
    await name.resolve()
    assert name.addresses == ((B, 9999), (A, 9999))


async def test_another_order_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name service rotates its answers; clients must not follow it from host to host."""
    name, _ = name_served_by(monkeypatch, [A, B], [B, A], [B])
    changes, seen = [], []
    for _ in range(3):
        changes.append(await name.resolve())
        seen.append([address[0] for address in name.addresses])
    assert changes == [True, False, True]
    assert seen == [[A, B], [A, B], [B]]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UNKNOWN, "Name or service not known"),
        (OSError(errno.EAGAIN, "can't start new thread"), "can't start new thread"),
        (UnicodeError("label too long"), "malformed name"),
    ],
)
async def test_a_failure_is_a_sentence_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    name, _ = name_served_by(monkeypatch, [A], error)
    await name.resolve()
    with pytest.raises(LookupFailedError) as caught:
        await name.resolve()
    assert str(caught.value) == f"can't resolve game-1: {reason}"
    assert name.addresses == ((A, 9999),)


async def test_a_malformed_name() -> None:
    name = TargetName("x" * 64, 9999, trio.CapacityLimiter(1))
    with pytest.raises(LookupFailedError, match=r"^can't resolve x{64}: malformed name$"):
        await name.resolve()


async def test_the_resolver_of_the_system() -> None:
    name = TargetName("localhost", 9999, trio.CapacityLimiter(1))
    assert name.addresses == ()
    assert await name.resolve()
    assert set(name.addresses) <= {("127.0.0.1", 9999), ("::1", 9999, 0, 0)}
    assert not await name.resolve()


async def test_threads_are_bounded_and_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Semaphore(0), threading.Event()
    running = most = 0
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> object:
        nonlocal running, most
        if options["flags"] & socket.AI_NUMERICHOST:
            return look_up(host, port, **options)
        running += 1
        most = max(most, running)
        asked.release()
        answered.wait(60)
        running -= 1
        raise AGAIN

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    limiter = trio.CapacityLimiter(2)
    names = [TargetName(f"t{n}.test", 9999, limiter) for n in range(5)]
    try:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(name.resolve)
            await wait_all_tasks_blocked()
            for _ in range(2):
                asked.acquire(timeout=60)
            # A cancellation does not wait for the name service.
            nursery.cancel_scope.cancel()
    finally:
        answered.set()
    assert most == 2


# Again and again


async def test_looks_up_every_half_minute_more_or_less(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    name, service = name_served_by(monkeypatch, [A])
    await name.resolve()
    await Kept(name).run_for(100 * LOOKUP_INTERVAL)
    gaps = [b - a for a, b in zip(service.times, service.times[1:], strict=False)]
    assert len(gaps) > 90
    assert min(gaps) >= 0.9 * LOOKUP_INTERVAL
    assert max(gaps) <= 1.1 * LOOKUP_INTERVAL
    assert len(set(gaps)) > 10, "many targets must not ask at the same moment"


async def test_a_change_is_told_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    name, service = name_served_by(monkeypatch, [A], [A], [B], [B])
    await name.resolve()
    kept = Kept(name)
    await kept.run_for(10 * LOOKUP_INTERVAL)
    assert kept.seen == [(service.times[2], ((B, 9999),))]
    (line,) = kept.lines.of("Target address changed")
    assert line["target"] == "game-1:9999"


async def test_a_poke_has_the_name_looked_up(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    name, service = name_served_by(monkeypatch, [A], [B])
    await name.resolve()
    kept = Kept(name)
    await nursery.start(kept.run)
    await trio.sleep(10)
    name.poke()
    await wait_all_tasks_blocked()
    assert service.times == [0, 10]
    assert kept.seen == [(10, ((B, 9999),))]


async def test_pokes_cost_one_lookup_a_second(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    name, service = name_served_by(monkeypatch, [A])
    service.patience = 0.25
    await name.resolve()
    await nursery.start(Kept(name).run)
    for _ in range(100):
        name.poke()
        await trio.sleep(0.0625)
    # A second after each answer; the last poke came during a look-up, and is not forgotten.
    await trio.sleep(5)
    assert service.times == [0, 1.25, 2.5, 3.75, 5, 6.25, 7.5]


async def test_a_poke_is_done_with_after_the_lookup(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    name, service = name_served_by(monkeypatch, [A])
    await name.resolve()
    await nursery.start(Kept(name).run)
    await trio.sleep(10)
    name.poke()
    await trio.sleep(0.5 * LOOKUP_INTERVAL)
    assert service.times == [0, 10]


async def test_a_name_never_resolved_is_looked_up_every_second(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    name, service = name_served_by(monkeypatch, UNKNOWN, UNKNOWN, UNKNOWN, [A])
    kept = Kept(name)
    await kept.run_for(20)
    assert service.times == [0, 1, 2, 3]
    assert kept.seen == [(3, ((A, 9999),))]


async def test_a_failure_keeps_the_addresses_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    name, service = name_served_by(monkeypatch, [A], UNKNOWN)
    await name.resolve()
    kept = Kept(name)
    await kept.run_for(100 * LOOKUP_INTERVAL)
    assert len(service.times) > 90
    assert name.addresses == ((A, 9999),)
    assert kept.seen == []
    lines = kept.lines.of("Target lookup failed")
    assert len(lines) > 90
    assert lines[0] == {
        "target": "game-1:9999",
        "error": "can't resolve game-1: Name or service not known",
    }
    assert len(kept.warnings) == 1


async def test_another_reason_is_said_but_not_every_second(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    name, _ = name_served_by(monkeypatch, *[UNKNOWN, AGAIN] * 300, AGAIN)
    kept = Kept(name)
    await kept.run_for(599.5)
    assert len(kept.lines.of("Target lookup failed")) == 600
    assert 9 <= len(kept.warnings) <= 10


async def test_a_failure_after_a_success_is_news(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    name, _ = name_served_by(monkeypatch, [A], UNKNOWN, [A], [A], [A], [A], UNKNOWN, [A])
    await name.resolve()
    kept = Kept(name)
    await kept.run_for(10 * LOOKUP_INTERVAL)
    assert len(kept.warnings) == 2


# Cancellation


def test_cancelled_at_every_await(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it knows and what was told of it agree, and it can be kept fresh again."""

    def attempt(step: int) -> bool:
        async def life() -> bool:
            name, service = name_served_by(monkeypatch, UNKNOWN, [A], [B], AGAIN, [A])
            service.patience = 0.5
            kept = Kept(name)
            with trio.CancelScope() as scope:
                steps = Steps(step, scope.cancel)
                trio.lowlevel.add_instrument(steps)
                async with trio.open_nursery() as nursery:
                    await nursery.start(kept.run)
                    await trio.sleep(10)
                    name.poke()
                    await kept.wait_changes(3)
                    nursery.cancel_scope.cancel()
                trio.lowlevel.remove_instrument(steps)
            assert name.addresses == (kept.seen[-1][1] if kept.seen else ())
            service.answers = [["192.0.2.3"]]
            seen = len(kept.seen)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kept.run)
                await kept.wait_changes(seen + 1)
                nursery.cancel_scope.cancel()
            assert name.addresses == (("192.0.2.3", 9999),)
            return scope.cancel_called

        return trio.run(life, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 10
