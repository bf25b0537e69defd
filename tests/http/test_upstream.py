"""The connections to one target: kept, aged, checked before use, addresses looked up again."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy import lookups
from kamal_proxy.http.upstream import (
    FRESH_AGE,
    MAX_IDLE,
    MAX_IDLE_AGE,
    ConnectError,
    UpstreamConnection,
    UpstreamPool,
)
from kamal_proxy.sockets import Poller
from tests.pairs import running_poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock


@attrs.define(eq=False)
class Place:
    """A pool, a listener that never accepts, and a resolver that does as it is told."""

    pool: UpstreamPool
    poller: Poller
    address: str
    lookups: int = 0
    patience: float = 0  # seconds that a lookup takes
    answer: list[str] | Exception = attrs.field(factory=list)

    async def resolve(
        self, host: str, port: int, limiter: trio.CapacityLimiter
    ) -> list[tuple[socket.AddressFamily, Any]]:
        assert (host, port) == ("web", 3000)
        self.lookups += 1
        await trio.sleep(self.patience)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [(socket.AF_UNIX, address) for address in self.answer]

    async def used(self) -> UpstreamConnection:
        """Open a connection and let it carry one exchange."""
        connection = await self.pool.connect()
        exchange(connection)
        return connection


def exchange(connection: UpstreamConnection) -> None:
    codec = connection.codec
    codec.request(b"GET", b"/", [(b"Host", b"web")])
    codec.end()
    codec.receive_data(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert codec.next_response() is not None
    assert codec.next_body() is None
    assert codec.received


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    path = str(tmp_path / "t.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(MAX_IDLE + 10)
        async with running_poller() as poller:
            made = Place(UpstreamPool(poller, "web", 3000, 4096), poller, path)
            made.answer = [path]
            monkeypatch.setattr(lookups, "resolve", made.resolve)
            yield made
            made.pool.close()


async def test_the_last_one_back_goes_out_first(place: Place, autojump_clock: MockClock) -> None:
    first, second = await place.used(), await place.used()
    was_reused = first.reused
    first.release()
    second.release()
    assert place.pool.take_idle(MAX_IDLE_AGE) is second
    assert place.pool.take_idle(MAX_IDLE_AGE) is first
    assert place.pool.take_idle(MAX_IDLE_AGE) is None
    assert (was_reused, first.reused) == (False, True)
    for connection in (first, second):
        connection.stream.close()


async def test_the_pool_is_bounded(place: Place, autojump_clock: MockClock) -> None:
    made = [await place.used() for _ in range(MAX_IDLE + 3)]
    for connection in made:
        connection.release()
    assert len(place.poller) == MAX_IDLE + 3, "for a moment, they may be wanted again at once"
    await trio.sleep(FRESH_AGE + 0.1)
    place.pool.trim()
    assert len(place.poller) == MAX_IDLE
    assert repr(place.pool) == f"<UpstreamPool web:3000 idle={MAX_IDLE}>"
    last = place.pool.take_idle(MAX_IDLE_AGE)
    assert last is made[-1]
    last.stream.close()


async def test_old_ones_are_closed(place: Place, autojump_clock: MockClock) -> None:
    old, young = await place.used(), await place.used()
    old.release()
    await trio.sleep(MAX_IDLE_AGE - 1)
    young.release()
    assert len(place.poller) == 2
    await trio.sleep(2)
    (await place.used()).release()
    assert len(place.poller) == 2, "the old one is gone"
    await trio.sleep(MAX_IDLE_AGE + 1)
    assert place.pool.take_idle(MAX_IDLE_AGE) is None
    assert len(place.poller) == 0
    (await place.used()).release()
    await trio.sleep(MAX_IDLE_AGE - 1)
    place.pool.trim()
    assert len(place.poller) == 1
    await trio.sleep(2)
    place.pool.trim()
    assert len(place.poller) == 0, "nobody has to ask for one"


async def test_a_request_that_must_not_be_repeated_wants_a_fresh_one(
    place: Place, autojump_clock: MockClock
) -> None:
    (await place.used()).release()
    await trio.sleep(FRESH_AGE + 0.1)
    assert place.pool.take_idle(FRESH_AGE) is None
    kept = place.pool.take_idle(MAX_IDLE_AGE)
    assert kept is not None, "it is still good for others"
    exchange(kept)
    kept.release()
    assert place.pool.take_idle(FRESH_AGE) is kept
    kept.stream.close()


@pytest.mark.parametrize("unasked", [b"", b"HTTP/1.1 408 \r\n"])
async def test_dead_ones_are_skipped(
    place: Place, autojump_clock: MockClock, unasked: bytes
) -> None:
    alive = await place.used()
    near, far = socket.socketpair()
    dead = UpstreamConnection(place.poller.open_stream(near), alive.codec, place.pool)
    dead.codec = type(alive.codec)(4096)
    exchange(dead)
    alive.release()
    dead.release()
    with far:
        if unasked:
            far.send(unasked)
        else:
            far.close()
        assert place.pool.take_idle(MAX_IDLE_AGE) is alive
    assert len(place.poller) == 1
    alive.stream.close()


async def test_one_in_the_middle_of_an_exchange_is_not_kept(
    place: Place, autojump_clock: MockClock
) -> None:
    connection = await place.pool.connect()
    connection.codec.request(b"GET", b"/", [(b"Host", b"web")])
    connection.release()
    assert place.pool.take_idle(MAX_IDLE_AGE) is None
    assert len(place.poller) == 0


async def test_one_that_has_not_sent_all_it_framed_is_not_kept(
    place: Place, autojump_clock: MockClock
) -> None:
    """Whatever comes next would be read as the rest of the request."""
    connection = await place.pool.connect()
    codec = connection.codec
    framed = codec.request(b"PUT", b"/", [(b"Host", b"web"), (b"Content-Length", b"4000000")])
    framed += codec.body(bytes(4_000_000)) + codec.end()
    with trio.move_on_after(1) as scope:
        await connection.send(framed)
    assert scope.cancelled_caught
    codec.receive_data(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    assert codec.next_response() is not None
    assert codec.next_body() is None
    assert codec.received

    connection.release()

    assert place.pool.take_idle(MAX_IDLE_AGE) is None
    assert len(place.poller) == 0


async def test_a_closed_pool_keeps_nothing(place: Place, autojump_clock: MockClock) -> None:
    idle, busy = await place.used(), await place.used()
    idle.release()
    place.pool.close()
    assert len(place.poller) == 1
    busy.release()
    assert len(place.poller) == 0


async def test_addresses_are_kept_for_a_moment(place: Place, autojump_clock: MockClock) -> None:
    for _ in range(3):
        (await place.pool.connect()).stream.close()
    assert place.lookups == 1
    await trio.sleep(6)
    (await place.pool.connect()).stream.close()
    assert place.lookups == 2


async def test_one_lookup_serves_all_that_wait(place: Place, autojump_clock: MockClock) -> None:
    place.patience = 4
    made: list[UpstreamConnection] = []

    async def connect() -> None:
        made.append(await place.pool.connect())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(connect)
    assert (place.lookups, len(made)) == (1, 30)
    assert trio.current_time() - start == pytest.approx(4)
    for connection in made:
        connection.stream.close()


class Turns(trio.abc.Instrument):
    """Counts the turns of the scheduler."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@pytest.mark.parametrize("known", [False, True])
async def test_all_that_wait_for_a_lookup_go_on_at_once(
    place: Place, autojump_clock: MockClock, known: bool
) -> None:
    """Under load a turn takes long: one after another would be seconds for the last."""
    place.patience = 1
    made: list[UpstreamConnection] = []

    async def connect() -> None:
        made.append(await place.pool.connect())

    if known:
        await connect()
    turns = Turns()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(connect)
        trio.lowlevel.add_instrument(turns)
    trio.lowlevel.remove_instrument(turns)
    for connection in made:
        connection.stream.close()
    assert len(made) == 50 + known
    assert turns.count < 25


async def test_a_lookup_that_is_given_up_leaves_the_others_theirs(
    place: Place, autojump_clock: MockClock
) -> None:
    place.patience = 4
    made: list[UpstreamConnection] = []

    async def connect() -> None:
        made.append(await place.pool.connect())

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1):
            await connect()
        nursery.start_soon(connect)
        nursery.start_soon(connect)
    assert (place.lookups, len(made)) == (2, 2)
    for connection in made:
        connection.stream.close()


async def test_a_failed_lookup_is_remembered_for_a_moment(
    place: Place, autojump_clock: MockClock
) -> None:
    good, place.answer = place.answer, socket.gaierror(-2, "Name or service not known")
    place.patience = 4
    failed = 0

    async def fail() -> None:
        nonlocal failed
        with pytest.raises(ConnectError, match=r"^can't resolve web: Name or service not known$"):
            await place.pool.connect()
        failed += 1

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(fail)
    place.answer = good
    await trio.sleep(0.9)
    await fail()
    assert (place.lookups, failed) == (1, 31)
    await trio.sleep(0.2)
    (await place.pool.connect()).stream.close()
    assert place.lookups == 2


async def test_looks_up_again_after_a_failure(place: Place, autojump_clock: MockClock) -> None:
    (await place.pool.connect()).stream.close()
    good, place.answer = place.answer, [place.address + ".gone"]
    await trio.sleep(6)
    with pytest.raises(ConnectError, match=r"^no such file or directory$"):
        await place.pool.connect()
    assert place.lookups == 2
    place.answer = good
    (await place.pool.connect()).stream.close()
    assert place.lookups == 3


async def test_a_stale_address_is_looked_up_again_at_once(
    place: Place, autojump_clock: MockClock
) -> None:
    dialer = place.pool._dialer
    dialer._addresses = [(socket.AF_UNIX, place.address + ".old")]  # type: ignore[list-item]
    dialer._resolved_at = trio.current_time()
    (await place.pool.connect()).stream.close()
    assert place.lookups == 1


async def test_the_next_address_is_tried(place: Place, autojump_clock: MockClock) -> None:
    place.answer = [place.address + ".gone", place.address]
    (await place.pool.connect()).stream.close()


async def test_a_name_service_that_fails(place: Place, autojump_clock: MockClock) -> None:
    good, place.answer = place.answer, socket.gaierror(-2, "Name or service not known")
    with pytest.raises(ConnectError, match=r"^can't resolve web: Name or service not known$"):
        await place.pool.connect()
    await trio.sleep(2)
    place.answer = UnicodeError("label too long")
    with pytest.raises(ConnectError, match=r"^can't resolve web: malformed name$"):
        await place.pool.connect()
    await trio.sleep(2)
    place.answer = good
    (await place.pool.connect()).stream.close()
    place.answer = socket.gaierror(-3, "Temporary failure in name resolution")
    await trio.sleep(10)
    (await place.pool.connect()).stream.close()
