"""Calls through redeploys and restarts: each client stays with the server that knows it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy import PauseOptions, sockets
from kamal_proxy.cli.deploy_udp import _summary
from kamal_proxy.deployment import DrainResult
from kamal_proxy.udp import admission, names
from kamal_proxy.udp.ice import AskLimits
from tests.reference.media import look_at
from tests.udp.callers import Calls, MediaServer, Phone, open_calls
from tests.udp.calling import ALERT, record
from tests.udp.serving import free_port, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from pathlib import Path

SHORT = 0.5  # seconds; a session that is silent for so long is over
NEVER = 600.0  # a drain that waits for this is one that hangs
IN_TURN = 0.1  # seconds between two words of who goes on talking


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    async with open_calls() as opened:
        yield opened


async def keep_saying(say: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Say all of it again and again."""
    while True:
        for each in say:
            await each()
        await trio.sleep(IN_TURN)


async def gather(*waiting: Callable[[], Awaitable[object]]) -> None:
    """Wait for all of them."""
    async with trio.open_nursery() as nursery:
        for each in waiting:
            nursery.start_soon(each)


# Whose an ICE client is


@pytest.mark.parametrize("stranger", [401, 400, 0])
async def test_each_client_reaches_the_server_that_its_signalling_chose(
    calls: Calls, stranger: int
) -> None:
    servers = [calls.server(name, stranger=stranger) for name in ("v1", "v2", "v3")]
    await calls.deploy(*servers)
    for server in servers * 2:
        phone = calls.phone()
        assert await phone.check(server.invite()) == server.name
        assert [await phone.ask_data() for _ in range(3)] == [server.name] * 3
        assert phone.names == {server.name}, "nobody else's word comes through"
    for server in servers:
        kinds = [look_at(each.payload).kind for each in server.received]
        assert (kinds.count("stun"), kinds.count("dtls")) == (6, 6)
    # What the others were asked by is closed again.
    assert (calls.relay.live, calls.relay.sockets, calls.relay.undecided) == (6, 6, 0)


async def test_a_known_ufrag_asks_nobody_else(calls: Calls) -> None:
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, v2)
    ufrag = v1.invite()
    assert await calls.phone().check(ufrag) == "v1"
    await until(lambda: (v1.requests, v2.requests) == (1, 1))
    for port in calls.ports:  # other candidates, and other addresses of the client
        assert await calls.phone("127.0.0.99").check(ufrag, port) == "v1"
    await calls.settle()
    assert (v1.requests, v2.requests) == (5, 1)
    assert calls.counted("dropped", "held_back") <= 1
    # Another ufrag is another question, also of the same client.
    assert await calls.phone("127.0.0.99").check(v2.invite()) == "v2"
    await until(lambda: (v1.requests, v2.requests) == (6, 2))


async def test_clients_through_a_redeploy(calls: Calls) -> None:
    """The old one moves, a new one comes late to the old server, another to the new one."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    old, early, late, new = v1.invite(), v1.invite(), v1.invite(), v2.invite()
    phone = calls.phone()
    assert await phone.check(old) == "v1"
    assert await calls.phone().check(early) == "v1"
    deploying = await calls.begin(v2)
    assert [await phone.check(old), await phone.ask_data()] == ["v1", "v1"]
    assert v2.received == [], "who has a session is nobody's question"
    moved, second = calls.phone("127.0.0.9"), calls.phone()
    assert [await moved.check(old), await moved.ask_data()] == ["v1", "v1"]
    assert [await second.check(early), await second.ask_data()] == ["v1", "v1"]
    assert v2.received == []
    newcomer, latecomer = calls.phone(), calls.phone()
    assert [await newcomer.check(new), await newcomer.ask_data()] == ["v2", "v2"]
    assert [await latecomer.check(late), await latecomer.ask_data()] == ["v1", "v1"]
    row = calls.room.row("game")
    assert (row.in_flight, row.draining) == (1, 5)
    assert [phone.names for phone in (newcomer, latecomer)] == [{"v2"}, {"v1"}]
    assert not deploying.ended.is_set()


async def test_who_asked_too_early_reaches_the_server_as_soon_as_it_is_deployed(
    calls: Calls,
) -> None:
    """Signalling may be ahead of media."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    phone, ufrag = calls.phone(), v2.invite()
    for _ in range(3):
        await phone.say_request(ufrag)
    await until(lambda: v1.requests == 3)
    await calls.begin(v2)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_saying, [partial(phone.say_request, ufrag)])
            await phone.wait(lambda: "v2" in phone.names)
            nursery.cancel_scope.cancel()
    assert await phone.ask_data() == "v2"


async def test_an_unknown_ufrag_reaches_nobody(calls: Calls) -> None:
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, v2, timeout=SHORT)
    phone = calls.phone()
    for _ in range(3):
        await phone.say_request(b"nobody")
    await phone.say_data()
    await phone.say_voice()
    await until(lambda: calls.counted("dropped", "held_back") == 6)
    assert calls.counted("dropped", "undecided") == 2
    assert (calls.relay.live, calls.relay.undecided) == (1, 1)
    assert (v1.requests, v2.requests) == (len(v1.received), len(v2.received)) == (3, 3)
    await until(lambda: calls.relay.live == 0)
    assert calls.counted("ended", "unanswered") == 1
    assert (calls.relay.undecided, calls.relay.sockets, phone.heard) == (0, 0, [])
    # Nothing was learned of it.
    await phone.say_request(b"nobody")
    await until(lambda: (v1.requests, v2.requests) == (4, 4))


async def test_the_only_server_may_say_what_it_likes(calls: Calls) -> None:
    """Nobody else's client can be meant."""
    v1 = calls.server("v1")
    await calls.deploy(v1)
    phone = calls.phone()
    question = await phone.say_request(b"nobody")
    assert (await phone.wait_answer(question)).kind == "error"


async def test_a_server_that_is_gone_is_not_asked(calls: Calls) -> None:
    v1, v2, v3 = calls.server("v1"), calls.server("v2"), calls.server("v3")
    await calls.deploy(v1, v2, v3)
    v1.die()
    phone, ufrag = calls.phone(), v2.invite()
    assert await phone.check(ufrag) == "v2"
    assert await phone.ask_data() == "v2"
    assert calls.room.number("sessions_moved_total") == 0


async def test_ice_restarts_with_another_server_from_the_same_port(calls: Calls) -> None:
    """Its server has died, and the signalling chose another one."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, v2)
    phone = calls.phone()
    assert await phone.check(v1.invite()) == "v1"
    v1.die()
    ufrag = v2.invite()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_saying, [partial(phone.say_request, ufrag)])
        await phone.wait(lambda: "v2" in phone.names)
        nursery.cancel_scope.cancel()
    assert await phone.ask_data() == "v2"


async def test_a_server_that_comes_a_moment_later(calls: Calls) -> None:
    """Its port was closed when it was first asked."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, v2)
    phone, ufrag = calls.phone(), v2.invite()
    v2.die()
    for _ in range(3):
        await phone.say_request(ufrag)
    await until(lambda: v1.requests == 3)
    v2.live(calls.world)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_saying, [partial(phone.say_request, ufrag)])
            await phone.wait(lambda: any(each.kind == "success" for each in phone.heard))
            nursery.cancel_scope.cancel()
    assert await phone.ask_data() == "v2"


@pytest.mark.parametrize("at_once", [False, True])
async def test_media_that_comes_before_the_first_check(calls: Calls, at_once: bool) -> None:
    """A call whose session was cut, or lost in a crash, goes on talking before it asks again."""
    servers = [calls.server(name) for name in ("v1", "v2", "v3")]
    await calls.deploy(*servers)
    for server in servers * 3:
        phone = calls.phone()
        await phone.say_data()
        if not at_once:
            await calls.settle()
        assert await phone.check(server.invite()) == server.name
        assert await phone.ask_data() == server.name
        assert phone.names == {server.name}, "nor does the one that it had say that it is not its"


async def test_a_role_conflict_is_the_word_of_its_server(calls: Calls) -> None:
    v1, v2 = calls.server("v1", stranger=487), calls.server("v2")
    await calls.deploy(v1, v2)
    phone = calls.phone()
    question = await phone.say_request(b"any")
    answer = await phone.wait_answer(question)
    assert (answer.kind, answer.name) == ("error", "v1")
    assert calls.relay.undecided == 0


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
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_saying, [partial(newcomer.say_request, ufrag)])
        await newcomer.wait(lambda: newcomer.heard)
        nursery.cancel_scope.cancel()
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


# Plain RTP


async def test_pairs_through_redeploys(calls: Calls) -> None:
    v1, v2, v3 = calls.server("v1"), calls.server("v2"), calls.server("v3")
    await calls.deploy(v1)
    whole, half, early = (calls.pair(f"127.0.0.{20 + place}") for place in range(3))
    assert [await whole[0].ask(), await whole[1].report()] == ["v1", "v1"]
    assert await half[0].ask() == "v1"
    assert await early[1].report() == "v1"
    await calls.begin(v2)
    assert await half[1].report() == "v1", "its other half is there"
    assert await early[0].ask() == "v1"
    assert [await whole[0].ask(), await whole[1].report()] == ["v1", "v1"]
    row = calls.room.row("game")
    assert (row.in_flight, row.draining, row.pairs_in_use) == (0, 3, 3)
    new = calls.pair("127.0.0.9")
    assert [await new[1].report(), await new[0].ask()] == ["v2", "v2"]
    await calls.begin(v3)
    newest = calls.pair("127.0.0.10")
    assert [await newest[0].ask(), await newest[1].report()] == ["v3", "v3"]
    for pair, name in ((whole, "v1"), (half, "v1"), (early, "v1"), (new, "v2"), (newest, "v3")):
        assert [await pair[0].ask(), await pair[1].report()] == [name] * 2
        assert [phone.names for phone in pair] == [{name}] * 2
    row = calls.room.row("game")
    assert (row.in_flight, row.draining, row.pairs_in_use) == (1, 4, 5)
    assert calls.room.number("sessions_created_total") == 5
    for server, count in ((v1, 3), (v2, 1), (v3, 1)):
        assert [len(server.sources(port)) for port in calls.ports] == [count, count, 0, 0]


async def test_pairs_among_several_servers(calls: Calls) -> None:
    servers = [calls.server(name) for name in ("v1", "v2", "v3")]
    await calls.deploy(*servers)
    reached = set()
    for place in range(20):
        pair = calls.pair(f"127.0.0.{20 + place}")
        first, second = pair[::-1] if place % 2 else pair
        assert await first.ask() == await second.ask()
        reached |= first.names
    assert len(reached) > 1
    assert (calls.relay.live, calls.relay.pairs) == (20, 20)


async def test_as_many_pairs_as_sessions(calls: Calls) -> None:
    """A pair counts once, though it has two sockets."""
    v1, limit = calls.server("v1"), 3
    await calls.deploy(v1, limit=limit)
    for place in range(limit):
        voice, control = calls.pair(f"127.0.0.{20 + place}")
        assert [await voice.ask(), await control.report()] == ["v1", "v1"]
    await calls.phone("127.0.0.9").say_voice()
    await until(lambda: calls.counted("dropped", "session_limit") == 1)
    assert (calls.relay.live, calls.relay.pairs) == (limit, limit)


async def test_the_second_half_comes_through_a_pause(calls: Calls) -> None:
    """It belongs to a call that goes on."""
    v1 = calls.server("v1")
    await calls.deploy(v1)
    voice, control = calls.pair()
    stranger = calls.phone("127.0.0.9")
    assert await voice.ask() == "v1"
    await calls.room.services.pause("game", PauseOptions())
    assert await control.report() == "v1"
    await stranger.say_voice()
    await until(lambda: calls.counted("dropped", "paused") == 1)
    assert calls.relay.live == 1


# How drains end


@attrs.frozen
class Party:
    """One caller of each kind.

    Attributes:
        talking: RTP with RTCP; goes on whatever it is told.
        polite: The same; falls silent when it is told goodbye.
        muxed: RTP and RTCP on one port; goes on.
        mute: RTP without RTCP, which falls silent.
        encrypted: WebRTC; goes on.
        secret: RTP with SRTCP; goes on.
    """

    talking: tuple[Phone, Phone]
    polite: tuple[Phone, Phone]
    muxed: Phone
    mute: Phone
    encrypted: Phone
    secret: tuple[Phone, Phone]

    @property
    def phones(self) -> list[Phone]:
        """All of their phones."""
        pairs = (*self.talking, *self.polite, *self.secret)
        return [*pairs, self.muxed, self.mute, self.encrypted]

    @property
    def goes_on(self) -> list[Callable[[], Awaitable[object]]]:
        """What is said again and again by those that go on."""
        return [
            self.talking[0].say_voice,
            self.talking[1].say_report,
            self.muxed.say_voice,
            self.encrypted.say_data,
            self.secret[0].say_voice,
        ]


async def begin_party(calls: Calls, server: MediaServer) -> Party:
    """Let all of them have a session with the only server."""
    hosts = (f"127.0.0.{20 + number}" for number in range(6))
    talking, polite, secret = (calls.pair(next(hosts)) for _ in range(3))
    party = Party(
        talking,
        polite,
        calls.phone(next(hosts)),
        calls.phone(next(hosts)),
        calls.phone(next(hosts)),
        secret,
    )
    for voice, control in (talking, polite):
        assert [await voice.ask(), await control.report()] == [server.name] * 2
    assert [await party.muxed.ask(), await party.muxed.report()] == [server.name] * 2
    assert await party.mute.ask() == server.name
    assert await party.encrypted.check(server.invite()) == server.name
    assert await party.encrypted.ask_data() == server.name
    assert [await secret[0].ask(), await secret[1].ask_secret()] == [server.name] * 2
    assert calls.room.row("game").in_flight == 6
    return party


async def drain(calls: Calls, **options: Any) -> tuple[Party, MediaServer, DrainResult]:
    """Redeploy with one caller of each kind; the line in the log and all counts agree."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    party = await begin_party(calls, v1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_saying, party.goes_on)
        result = await calls.deploy(v2, **options)
        nursery.cancel_scope.cancel()
    done = calls.room.events[-1]
    assert done.event == "done"
    assert result == DrainResult(done.completed, done.cancelled, done.goodbyes, done.cut_unsaid)
    (line,) = calls.room.lines.of("UDP service drained")
    assert line == {
        "service": "game",
        "completed": result.completed,
        "cut": result.cancelled,
        "goodbyes": result.goodbyes,
        "cut_unsaid": result.cut_unsaid,
    }
    assert calls.room.number("goodbyes_total") == result.goodbyes
    assert calls.room.number("cut_unsaid_total") == result.cut_unsaid
    assert calls.room.number("sessions_ended_total", reason="cut") == result.cancelled
    assert calls.room.row("game").draining == 0
    return party, v1, result


def told(calls: Calls) -> str:
    """Return what the command prints at its end."""
    return _summary(calls.room.events[-1], calls=True)


async def wait_goodbyes(party: Party, server: MediaServer) -> None:
    """Wait for what both sides are told, where RTCP goes; and nobody is told anything else."""
    callers = [party.talking[1], party.polite[1], party.muxed]
    await until(lambda: all(phone.byes for phone in callers) and len(server.byes) == 3)
    for phone in party.phones:
        assert phone.byes == ([(server.ssrc,)] if phone in callers else [])
        for heard in phone.heard:
            if heard.byes:
                assert heard.name == server.name, "the CNAME that the server has shown"
                assert b"server is being replaced" in heard.payload
    assert sorted(server.byes) == sorted((phone.ssrc,) for phone in callers)
    for each in server.received:
        if b"server is being replaced" in each.payload:
            assert b"\x06caller" in each.payload
    assert len([each for each in server.received if b"being replaced" in each.payload]) == 3


async def test_graceful_says_goodbye_at_the_drain_timeout(calls: Calls) -> None:
    """Who falls silent then is over after two seconds, and who does not is cut at the end."""
    options = {"zero_downtime": True, "drain_timeout": 0.3, "force_kill_timeout": 3.2}
    party, server, result = await drain(calls, **options)
    await wait_goodbyes(party, server)
    assert result == DrainResult(2, 4, goodbyes=3, cut_unsaid=2)
    assert told(calls) == (
        "2 sessions completed, 4 cut, 3 got a BYE; 2 SRTP sessions cut without goodbye"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"zero_downtime": True, "drain_strategy": "immediate"},
        {"drain_strategy": "immediate"},
        {"drain_strategy": "graceful"},
        {"drain_strategy": "timeout"},
    ],
)
async def test_a_cut_at_the_switch_says_goodbye(calls: Calls, options: dict[str, Any]) -> None:
    party, server, result = await drain(calls, **options)
    await wait_goodbyes(party, server)
    assert result == DrainResult(0, 6, goodbyes=3, cut_unsaid=2)
    assert told(calls) == (
        "0 sessions completed, 6 cut, 3 got a BYE; 2 SRTP sessions cut without goodbye"
    )


async def test_timeout_says_no_goodbye(calls: Calls) -> None:
    party, server, result = await drain(
        calls,
        zero_downtime=True,
        drain_strategy="timeout",
        drain_timeout=0.1,
        force_kill_timeout=SHORT,
    )
    assert result == DrainResult(0, 6, cut_unsaid=2)
    assert not any(phone.byes for phone in party.phones)
    assert server.byes == []
    assert told(calls) == (
        "0 sessions completed, 6 cut, 0 got a BYE; 2 SRTP sessions cut without goodbye"
    )


async def test_a_side_that_has_said_nothing_is_told_nothing(calls: Calls) -> None:
    """No source of the server's was forwarded to the client; the server is told its client's."""
    v1, v2 = calls.server("v1", silent=True), calls.server("v2")
    await calls.deploy(v1)
    voice, control = calls.pair()
    await voice.say_voice()
    await control.say_voice()  # it opens the port for RTCP
    await until(lambda: len(v1.received) == 2)
    result = await calls.deploy(v2)
    assert result == DrainResult(0, 1, goodbyes=1)
    await until(lambda: v1.byes == [(voice.ssrc,)])
    (said,) = (each for each in v1.received if b"being replaced" in each.payload)
    assert b"caller" not in said.payload, "its name is made up"
    assert (voice.heard, control.heard) == ([], [])


@pytest.mark.parametrize("strategy", ["graceful", "timeout"])
async def test_calls_that_end_by_themselves(calls: Calls, strategy: str) -> None:
    """They say so: RTCP with BYE, an alert of DTLS. Two seconds of silence confirm it."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    (voice, control), phone = calls.pair(), calls.phone()
    assert [await voice.ask(), await control.report()] == ["v1", "v1"]
    assert await phone.check(v1.invite()) == "v1"
    deploying = await calls.begin(
        v2, drain_strategy=strategy, drain_timeout=NEVER, force_kill_timeout=NEVER
    )
    await control.say_bye()
    await phone.say(record(ALERT))
    assert await deploying.wait() == DrainResult(2)
    assert calls.counted("ended", "bye") == 1
    assert calls.counted("ended", "dtls_closed") == 1
    assert control.byes == []


async def test_sessions_that_come_during_a_drain_count_too(calls: Calls) -> None:
    """Those that the new address of a client makes, and late clients of the old server."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1, timeout=SHORT)
    ufrag = v1.invite()
    first = calls.phone()
    assert await first.check(ufrag) == "v1"
    deploying = await calls.begin(v2, timeout=SHORT, force_kill_timeout=2.0)
    moved, late = calls.phone(), calls.phone()
    assert [await moved.check(ufrag), await late.check(v1.invite())] == ["v1", "v1"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_saying, [moved.say_data, late.say_data])
        result = await deploying.wait()
        nursery.cancel_scope.cancel()
    assert result == DrainResult(1, 2, cut_unsaid=2)


async def test_a_client_that_finds_another_server_has_not_completed(calls: Calls) -> None:
    """It was asked for when the switch came, and then found on the new server."""
    v1, v2, v3 = calls.server("v1"), calls.server("v2"), calls.server("v3")
    v2.silent = True
    await calls.deploy(v1, v2)
    phone, ufrag = calls.phone(), v2.invite()
    await phone.say_request(ufrag)
    await until(lambda: v2.requests == 1)
    deploying = await calls.begin(v2, v3, force_kill_timeout=SHORT)
    v2.silent = False
    assert await phone.check(ufrag) == "v2"
    assert await deploying.wait() == DrainResult()
    assert await phone.ask_data() == "v2"
    assert calls.room.row("game").in_flight == 1


async def test_each_generation_is_told_in_its_own_time(calls: Calls) -> None:
    servers = [calls.server(name) for name in ("v1", "v2", "v3")]
    pairs = []
    deploys = []
    for place, server in enumerate(servers):
        deploys.append(
            await calls.begin(
                server,
                drain_strategy="graceful",
                drain_timeout=(0.0, NEVER, 0.2)[place],
                force_kill_timeout=NEVER,
            )
        )
        pairs.append(calls.pair(f"127.0.0.{20 + place}"))
        assert [await pairs[-1][0].ask(), await pairs[-1][1].report()] == [server.name] * 2
    # What v3 has replaced, which is v2, is told by the last deploy.
    await pairs[1][1].wait(lambda: pairs[1][1].byes)
    assert await deploys[2].wait() == DrainResult(1, goodbyes=1)
    assert [await voice.ask() for voice, _ in pairs] == ["v1", "v3", "v3"]
    assert [control.byes for _, control in pairs] == [[], [(servers[1].ssrc,)], []]
    assert not deploys[1].ended.is_set()


async def test_removing_during_a_drain_ends_it(calls: Calls) -> None:
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    (voice, control), phone = calls.pair(), calls.phone()
    assert [await voice.ask(), await control.report()] == ["v1", "v1"]
    ufrag = v1.invite()
    assert await phone.check(ufrag) == "v1"
    deploying = await calls.begin(v2)
    await calls.room.services.remove("game")
    result = await deploying.wait()
    assert (result.goodbyes, result.cut_unsaid, control.byes) == (0, 0, [])
    # Nothing is left, also not of what was learned.
    await calls.deploy(v2, v1)
    assert await calls.phone().check(ufrag) == "v1"
    await until(lambda: v2.requests == 1)
    assert calls.room.row("game").in_flight == 1


# Targets that stay


async def test_a_server_in_both_sets_is_not_drained(calls: Calls) -> None:
    v1, v2, v3 = calls.server("v1"), calls.server("v2"), calls.server("v3")
    await calls.deploy(v1, v2)
    invited = {server: server.invite() for server in (v1, v2)}
    phones = {server: calls.phone() for server in invited}
    for server, phone in phones.items():
        assert await phone.check(invited[server]) == server.name
    pairs = [calls.pair(f"127.0.0.{20 + place}") for place in range(8)]
    on = {pair: await pair[0].ask() for pair in pairs}
    assert set(on.values()) == {"v1", "v2"}
    staying = [pair for pair in pairs if on[pair] == "v2"]
    result = await calls.deploy(v2, v3)
    assert result.cancelled == len(pairs) - len(staying) + 1
    assert result.cut_unsaid == 1
    assert await phones[v2].ask_data() == "v2"
    for pair in staying:
        assert [await pair[1].report(), await pair[0].ask()] == ["v2", "v2"]
    moved = calls.phone()
    requests = v3.requests
    assert await moved.check(invited[v2]) == "v2"
    assert v3.requests == requests, "the ufrag is known as before"
    assert calls.room.row("game").in_flight == len(staying) + 2
    # And it goes on being so.
    result = await calls.deploy(v2)
    assert result.cancelled == 0
    assert await phones[v2].ask_data() == "v2"
    assert await calls.phone().check(invited[v2]) == "v2"


async def test_another_management_port_is_the_same_server(calls: Calls) -> None:
    """A redeploy with another one asks it twice, and its client has one session."""
    v1 = calls.server("v1")
    await calls.deploy(v1)
    old, ufrag = calls.phone(), v1.invite()
    assert await old.check(ufrag) == "v1"
    await calls.begin(f"{v1.host}:7881")
    assert await old.ask_data() == "v1"
    new = calls.phone()
    assert await new.check(v1.invite()) == "v1"
    await until(lambda: calls.relay.undecided == 0)
    assert [await new.ask_data(), await old.ask_data()] == ["v1", "v1"]
    assert (calls.relay.live, calls.relay.sockets) == (2, 2)


async def test_from_plain_udp_to_webrtc_and_back(calls: Calls) -> None:
    port = calls.ports[0]
    v1, v2 = calls.server("v1", management=port), calls.server("v2", management=port)
    plain: dict[str, Any] = {"protocol": "udp", "port": port, "port_ranges": ()}
    media: dict[str, Any] = {"port": port, "port_ranges": ()}
    await calls.deploy(v1, **plain)
    first = calls.phone()
    assert await first.check(v1.invite()) == "v1"
    deploying = await calls.begin(v1, **media, force_kill_timeout=SHORT)
    assert calls.room.row("game").protocol == "webrtc"
    second = calls.phone()
    assert await second.check(v1.invite()) == "v1"
    assert [await first.ask_data(), await second.ask_data()] == ["v1", "v1"]
    row = calls.room.row("game")
    assert (row.in_flight, row.draining) == (1, 1)
    assert await deploying.wait() == DrainResult(0, 1)
    deploying = await calls.begin(v2, **plain, force_kill_timeout=SHORT)
    assert calls.room.row("game").protocol == "udp"
    third = calls.phone()
    assert await third.check(v2.invite()) == "v2"
    assert [await second.ask_data(), await third.ask_data()] == ["v1", "v2"]
    assert await deploying.wait() == DrainResult(0, 1, cut_unsaid=1)
    assert calls.room.row("game").in_flight == 1


async def test_other_ports(calls: Calls) -> None:
    """Sessions of ports that are left drain there; the others go on without their target."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    low, high = (f"{calls.ports[0]}-{calls.ports[1]}", f"{calls.ports[2]}-{calls.ports[3]}")
    await calls.deploy(v1, port_ranges=(low,))
    first = calls.phone()
    ufrag = v1.invite()
    assert await first.check(ufrag) == "v1"
    deploying = await calls.begin(v2, port_ranges=(high,), force_kill_timeout=SHORT)
    assert await first.ask_data() == "v1"
    assert await calls.phone(to=calls.ports[2]).check(v2.invite()) == "v2"
    assert await calls.phone(to=calls.ports[2]).check(ufrag) == "v1"
    assert await deploying.wait() == DrainResult(0, 2, cut_unsaid=2)


# Names


async def test_a_name_that_stands_for_another_address(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is on the old address stays there, also from a new port; new clients find the new one."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    current, port = v1, free_port()

    async def resolve(host: str, number: int, *_: object) -> list[tuple[Any, Any]]:
        assert host == "media-1"
        return [(2, (current.host, number))]

    monkeypatch.setattr(sockets, "resolve", resolve)
    monkeypatch.setattr(names.TargetName.keep_fresh, "__defaults__", (SHORT,))
    await calls.deploy(f"media-1:{port}")
    ufrag = v1.invite()
    phone, (voice, control) = calls.phone(), calls.pair("127.0.0.9")
    assert [await phone.check(ufrag), await voice.ask()] == ["v1", "v1"]
    current = v2
    (target,) = calls.room.installed().deployments.values()
    await until(lambda: target.targets[0].current == (v2.host, port))
    assert [await phone.ask_data(), await voice.ask()] == ["v1", "v1"]
    assert await control.report() == "v1", "its other half is there"
    moved = calls.phone()
    assert await moved.check(ufrag) == "v1"
    assert v2.received == []
    assert await calls.phone().check(v2.invite()) == "v2"
    assert await calls.phone("127.0.0.10").ask() == "v2"
    row = calls.room.row("game")
    assert (row.in_flight, row.draining) == (5, 0)


# Restarts


async def test_calls_go_on_across_restarts(tmp_path: Path) -> None:
    """From the ports that their servers know; ufrags are forgotten, and found again."""
    async with open_calls(tmp_path) as calls:
        servers = v1, v2 = [calls.server(name) for name in ("v1", "v2")]
        await calls.deploy(v1, v2)
        phones = {calls.phone(): server for server in servers * 3}
        ufrags = {phone: server.invite() for phone, server in phones.items()}
        for phone, server in phones.items():
            assert await phone.check(ufrags[phone]) == server.name
        pairs = {calls.pair(f"127.0.0.{20 + place}"): "" for place in range(6)}
        for pair in pairs:
            pairs[pair] = await pair[0].ask()
            assert await pair[1].report() == pairs[pair]
        half = calls.phone("127.0.0.9", to=calls.ports[1])
        name = await half.report()
        known = [{port: server.sources(port) for port in calls.ports} for server in servers]
        requests = [server.requests for server in servers]
        for _ in range(2):
            await calls.restart()
            (line,) = calls.room.lines.of("UDP sessions restored")
            assert line == {"service": "game", "count": 19, "lost": 0}
            row = calls.room.row("game")
            assert (row.in_flight, row.pairs_in_use) == (13, 6)
            for pair, each in pairs.items():
                assert [await pair[0].ask(), await pair[1].report()] == [each] * 2
            for phone, server in phones.items():
                assert await phone.ask_data() == server.name
            assert await half.report() == name
        assert [{port: s.sources(port) for port in calls.ports} for s in servers] == known
        assert [server.requests for server in servers] == requests
        # Each is known as its server's, so that nobody else is asked.
        await calls.restart()
        for phone, server in phones.items():
            assert await phone.check(ufrags[phone]) == server.name
        await calls.settle()
        requests = [count + 3 for count in requests]
        assert [server.requests for server in servers] == requests
        # The other half joins what was restored.
        assert await calls.phone("127.0.0.9").ask() == name
        assert calls.room.row("game").in_flight == 13
        # Their next addresses are a question again, once.
        for phone, server in list(phones.items())[:2]:
            for _ in range(2):
                assert await calls.phone().check(ufrags[phone]) == server.name
        await calls.settle()
        assert sum(server.requests for server in servers) == sum(requests) + 2 * 3


async def test_calls_of_one_address_stay_two_across_a_restart(tmp_path: Path) -> None:
    """Though they use the two ports of a pair, and the same server: neither ends with the other."""
    async with open_calls(tmp_path) as calls:
        v1 = calls.server("v1")
        await calls.deploy(v1)
        phones = calls.pair()
        for phone in phones:
            assert await phone.check(v1.invite()) == "v1"
        assert calls.relay.live == 2
        await calls.restart()
        assert (calls.relay.live, calls.relay.pairs) == (2, 0)
        assert [await phone.ask_data() for phone in phones] == ["v1"] * 2


async def test_a_restored_call_is_told_goodbye(tmp_path: Path) -> None:
    """As far as it was heard since then."""
    async with open_calls(tmp_path) as calls:
        v1, v2 = calls.server("v1"), calls.server("v2")
        await calls.deploy(v1)
        voice, control = calls.pair()
        phone = calls.phone()
        assert [await voice.ask(), await control.report()] == ["v1", "v1"]
        assert await phone.check(v1.invite()) == "v1"
        await calls.restart()
        assert [await voice.ask(), await phone.ask_data()] == ["v1", "v1"]
        result = await calls.deploy(v2)
        assert result == DrainResult(0, 2, goodbyes=1, cut_unsaid=1)
        await control.wait(lambda: control.byes == [(v1.ssrc,)])
        await until(lambda: v1.byes == [(voice.ssrc,)])


async def test_nobody_got_a_goodbye_that_names_nobody(tmp_path: Path) -> None:
    """Who has not spoken since the restart is unknown."""
    async with open_calls(tmp_path) as calls:
        v1, v2 = calls.server("v1"), calls.server("v2")
        await calls.deploy(v1)
        voice, control = calls.pair()
        assert [await voice.ask(), await control.report()] == ["v1", "v1"]
        await calls.restart()
        assert await calls.deploy(v2) == DrainResult(0, 1)
        assert [await voice.ask(), await control.report()] == ["v2", "v2"]
        assert (control.byes, v1.byes) == ([], [])


async def test_those_that_drained_come_back_as_new_clients(tmp_path: Path) -> None:
    """Their server is none any more."""
    async with open_calls(tmp_path) as calls:
        v1, v2 = calls.server("v1"), calls.server("v2")
        await calls.deploy(v1)
        old, voice = calls.phone(), calls.phone("127.0.0.9")
        assert [await old.check(v1.invite()), await voice.ask()] == ["v1", "v1"]
        await calls.begin(v2)
        new = calls.phone()
        assert await new.check(v2.invite()) == "v2"
        await calls.restart()
        assert calls.relay.live == 1
        assert [await new.ask_data(), await voice.ask()] == ["v2", "v2"]
        assert await old.check(v2.invite()) == "v2", "ICE restarts from the same port"


async def test_who_was_asked_for_is_not_saved(tmp_path: Path) -> None:
    async with open_calls(tmp_path) as calls:
        v1, v2 = calls.server("v1", stranger=0), calls.server("v2", silent=True)
        await calls.deploy(v1, v2)
        phone, ufrag = calls.phone(), v2.invite()
        await phone.say_request(ufrag)
        await until(lambda: v1.requests == v2.requests == 1)
        await calls.restart()
        assert (calls.relay.live, calls.relay.undecided) == (0, 0)
        v2.silent = False
        assert await phone.check(ufrag) == "v2"
