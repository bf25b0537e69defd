"""Calls through redeploys: each client stays with the server that knows it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from kamal_proxy import PauseOptions, lookups
from kamal_proxy.deployment import DrainResult
from kamal_proxy.proxy_protocol import encode_v2
from kamal_proxy.udp import names
from tests.ports import free_port
from tests.reference.media import look_at
from tests.scripted import LOCALHOST
from tests.udp.callers import SHORT, Calls, open_calls, saying
from tests.udp.serving import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    async with open_calls() as opened:
        yield opened


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
        async with saying(partial(phone.say_request, ufrag)):
            await phone.wait(lambda: "v2" in phone.names)
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
    async with saying(partial(phone.say_request, ufrag)):
        await phone.wait(lambda: "v2" in phone.names)
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
        async with saying(partial(phone.say_request, ufrag)):
            await phone.wait(lambda: any(each.kind == "success" for each in phone.heard))
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


# Targets that stay


async def test_a_server_in_both_sets_is_not_drained(calls: Calls) -> None:
    v1, v2, v3 = calls.server("v1"), calls.server("v2"), calls.server("v3")
    await calls.deploy(v1, v2)
    invited = {server: server.invite() for server in (v1, v2)}
    phones = {server: calls.phone() for server in invited}
    for server, phone in phones.items():
        assert await phone.check(invited[server]) == server.name
    # So many that hardly ever all of them begin on one server.
    pairs = [calls.pair(f"127.0.0.{20 + place}") for place in range(20)]
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


@pytest.mark.parametrize("former", [False, True])
async def test_each_target_gets_the_header_that_its_own_deploy_wants(
    calls: Calls, former: bool
) -> None:
    """Also whoever is asked, or joined, while another deploy is the one that serves."""
    v1, v2 = calls.server("v1", silent=True), calls.server("v2", silent=True)
    await calls.deploy(v1, proxy_protocol=former)
    voice, control = calls.pair("127.0.0.9")
    await control.say_report()
    await until(lambda: v1.received)
    await calls.begin(v2, proxy_protocol=not former)
    unknown, hashed = calls.phone("127.0.0.10"), calls.phone("127.0.0.11")
    await unknown.say_request(b"nobody")
    await voice.say_voice()
    await hashed.say_voice()
    await until(lambda: (len(v1.received), len(v2.received)) == (3, 2))
    await hashed.say_request(b"nobody")  # as its own target is silent, the other one is asked
    await until(lambda: (len(v1.received), len(v2.received)) == (4, 3))
    headers = {
        encode_v2(phone.address, (LOCALHOST, phone.to), datagram=True) for phone in calls.phones
    }
    for server, has_header in ((v1, former), (v2, not former)):
        for payload in (each.payload for each in server.received):
            begun = {header for header in headers if payload.startswith(header)}
            assert len(begun) == has_header
            kind = look_at(payload[len(max(begun, default=b"")) :]).kind
            assert kind in ("stun", "rtp", "rtcp")


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

    monkeypatch.setattr(lookups, "resolve", resolve)
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
