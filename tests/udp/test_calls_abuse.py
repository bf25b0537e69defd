"""What strangers may cost calls: limits of what is asked for them, and words that they forge."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy.udp import admission
from kamal_proxy.udp.ice import AskLimits
from tests.udp.callers import IN_TURN, SHORT, Calls, open_calls, saying
from tests.udp.calling import ALERT, record
from tests.udp.serving import until
from tests.udp.test_limits import FAIR_CHANCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    async with open_calls() as opened:
        yield opened


# Limits


async def test_how_many_clients_of_an_address_are_asked_for(calls: Calls) -> None:
    v1, v2 = calls.server("v1", stranger=0), calls.server("v2", stranger=0)
    await calls.deploy(v1, v2, timeout=SHORT)
    limit = AskLimits().each
    for _ in range(limit + 10):
        await calls.phone("127.0.0.9").say_request(b"nobody")
    await until(lambda: calls.counted("dropped", "ask_limit") == 10)
    assert calls.relay.undecided == limit
    assert await calls.phone("127.0.0.10").check(v1.invite()) == "v1", "others are not its fault"
    (line,) = calls.room.lines.of("UDP sessions shed")
    assert line == {"service": "game", "reason": "ask_limit"}
    assert calls.room.number("dropped_datagrams_total", reason="ask_limit") == 10
    await until(lambda: calls.relay.undecided == 0)
    assert await calls.phone("127.0.0.9").check(v2.invite()) == "v2"


async def test_how_many_clients_are_asked_for_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "AskLimits", partial(AskLimits, total=3))
    async with open_calls() as calls:
        v1, v2 = calls.server("v1", stranger=0), calls.server("v2", stranger=0)
        await calls.deploy(v1, v2)
        known = v1.invite()
        assert await calls.phone().check(known) == "v1"
        for host in range(10, 15):
            await calls.phone(f"127.0.0.{host}").say_request(b"nobody")
        await until(lambda: calls.counted("dropped", "ask_limit") == 2)
        assert calls.relay.undecided == 3
        assert await calls.phone().check(known) == "v1", "a known one is no question"
        assert await calls.phone(to=calls.ports[2]).ask() in ("v1", "v2"), "nor is plain RTP"


async def test_who_is_not_asked_for_takes_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "AskLimits", partial(AskLimits, total=1))
    async with open_calls() as calls:
        v1, v2 = calls.server("v1", silent=True), calls.server("v2", silent=True)
        await calls.deploy(v1, v2, limit=2)
        await calls.phone().say_voice()
        await until(lambda: len(v1.received) + len(v2.received) == 1)
        await trio.sleep(FAIR_CHANCE)
        await calls.phone().say_request(b"nobody")
        await until(lambda: calls.relay.undecided == 1)
        await calls.phone("127.0.0.9").say_request(b"nobody")
        await until(lambda: calls.counted("dropped", "ask_limit") == 1)
        assert calls.counted("ended", "evicted") == 0, "though one has had its time"
        # Who can be served still finds room.
        await calls.phone("127.0.0.9").say_voice()
        await until(lambda: calls.counted("ended", "evicted") == 1)


async def test_a_full_network_makes_room_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "AskLimits", partial(AskLimits, each=2))
    async with open_calls() as calls:
        v1, v2 = calls.server("v1", stranger=0), calls.server("v2", stranger=0)
        await calls.deploy(v1, v2)
        other = calls.phone("127.0.0.10")
        phones = [calls.phone("127.0.0.9") for _ in range(3)]
        for phone in (other, *phones[:2]):
            await phone.say_request(b"nobody")
            await calls.settle()
        await trio.sleep(FAIR_CHANCE)
        await phones[2].say_request(b"nobody")
        await until(lambda: calls.relay.counters()["created"] == 4)
        assert (calls.counted("ended", "evicted"), calls.relay.undecided) == (1, 3)
        for phone in (other, *phones[1:]):  # their sessions go on
            assert await phone.check(v1.invite()) == "v1"
        assert calls.relay.counters()["created"] == 4


@pytest.mark.parametrize("host", ["127.0.0.200", "127.0.0.20"])
async def test_a_flood_keeps_nobody_out_for_long(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Neither whose address is his own, nor who has one in common with those that flood."""
    monkeypatch.setattr(admission, "AskLimits", partial(AskLimits, total=24, each=4))
    async with open_calls() as calls, trio.open_nursery() as nursery:
        v1, v2 = calls.server("v1", stranger=0), calls.server("v2", stranger=0)
        await calls.deploy(v1, v2)
        strangers = [calls.phone(f"127.0.0.{20 + place % 10}") for place in range(400)]

        async def flood() -> None:
            while True:
                for stranger in strangers:
                    await stranger.say_request(b"nobody")
                    await trio.sleep(0.005)

        nursery.start_soon(flood)
        await until(lambda: calls.relay.undecided == 24 and calls.counted("dropped", "ask_limit"))
        for server in (v1, v2):
            phone, ufrag = calls.phone(host), server.invite()
            async with saying(partial(phone.say_request, ufrag)):
                await phone.wait(lambda phone=phone: phone.heard)  # type: ignore[misc]
            assert await phone.ask_data() == server.name
        nursery.cancel_scope.cancel()
        # The flood had held its places, which it would have given back after ten seconds.
        assert calls.counted("ended", "unanswered") == 0
        assert calls.counted("ended", "evicted") > 0


async def test_how_many_requests_of_a_client_are_passed_on(calls: Calls) -> None:
    v1, v2 = calls.server("v1", stranger=0), calls.server("v2", stranger=0)
    await calls.deploy(v1, v2)
    phone, count = calls.phone(), 500
    for _ in range(count):
        await phone.say_request(b"nobody")
    await until(lambda: v1.requests + calls.counted("dropped", "ask_limit") == count)
    assert v1.requests == v2.requests >= 50
    assert calls.counted("dropped", "ask_limit") > 0


async def test_an_undecided_client_makes_room(calls: Calls) -> None:
    """Nothing that goes both ways does."""
    v1, v2 = calls.server("v1", stranger=0), calls.server("v2", stranger=0)
    await calls.deploy(v1, v2, limit=2)
    talking, asking = calls.phone(), calls.phone()
    assert await talking.check(v1.invite()) == "v1"
    await asking.say_request(b"nobody")
    await until(lambda: calls.relay.live == 2)
    newcomer, ufrag = calls.phone(), v2.invite()
    async with saying(partial(newcomer.say_request, ufrag)):
        await newcomer.wait(lambda: newcomer.heard)
    assert calls.counted("ended", "evicted") == 1
    assert await talking.ask_data() == "v1"


# Strangers


async def test_what_strangers_forge_cuts_nobody(calls: Calls) -> None:
    """From ports of their own, and in the client's very name."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, v2)
    phone, ufrag = calls.phone(), v1.invite()
    voice, control = calls.pair()
    assert await phone.check(ufrag) == "v1"
    name = await voice.ask()
    assert await control.report() == name
    sources = [server.sources(port) for server in (v1, v2) for port in calls.ports]
    await calls.begin(v2)
    stranger, other = calls.phone("127.0.0.66"), calls.phone("127.0.0.66")
    assert await stranger.check(ufrag) == "v1", "it may know the ufrag, and that is all"
    await stranger.say(record(ALERT))
    await other.say_bye(ssrc=voice.ssrc)
    await other.say_bye(calls.ports[1], ssrc=voice.ssrc)
    await phone.say(record(ALERT))
    await phone.say_request(b"somebody else's")
    await control.say_bye()
    with trio.move_on_after(2.5):
        while True:
            await phone.ask_data()
            await voice.ask()
            await trio.sleep(IN_TURN)
    assert phone.names == {"v1"}
    assert voice.names == {name}
    for server, port in ((v1, calls.ports[0]), (v2, calls.ports[0])):
        was = sources.pop(0 if server is v1 else -len(calls.ports))
        assert was <= server.sources(port)
    ended = calls.relay.counters()["ended"]
    assert ended["cut"] == 0
    assert calls.room.row("game").draining >= 1


async def test_a_forged_check_moves_no_plain_call(calls: Calls) -> None:
    """Though its ufrag is right: a server that talks to its client keeps it."""
    servers = [calls.server("v1"), calls.server("v2")]
    await calls.deploy(*servers)
    voice, control = calls.pair()
    name = await voice.ask()
    assert await control.report() == name
    (other,) = (server for server in servers if server.name != name)
    ufrag = other.invite()
    with trio.move_on_after(1.5):
        while True:
            await voice.say_request(ufrag)
            assert await voice.ask() == name
            await trio.sleep(IN_TURN)
    assert [await control.report(), await voice.ask()] == [name, name]
    assert (calls.relay.live, calls.relay.pairs) == (1, 1)


async def test_a_stranger_that_asks_for_a_known_ufrag_from_many_ports(calls: Calls) -> None:
    """The sessions are its own, and count."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, v2, limit=5)
    phone, ufrag = calls.phone(), v1.invite()
    assert await phone.check(ufrag) == "v1"
    for _ in range(10):
        await calls.phone("127.0.0.66").say_request(ufrag)
    await until(lambda: calls.counted("dropped", "session_limit") == 6)
    assert await phone.ask_data() == "v1"
    assert v2.requests == 1
