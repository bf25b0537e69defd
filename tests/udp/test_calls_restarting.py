"""Calls across restarts of the proxy: they go on, from the ports that their servers know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kamal_proxy.deployment import DrainResult
from tests.udp.callers import open_calls
from tests.udp.serving import until

if TYPE_CHECKING:
    from pathlib import Path


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
            assert line == {"service": "game", "count": 13, "lost": 0}
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


async def test_as_many_pairs_as_sessions_go_on(tmp_path: Path) -> None:
    """Each is one, also where there is no room for another."""
    async with open_calls(tmp_path) as calls:
        await calls.deploy(calls.server("v1"), limit=2)
        pairs = [calls.pair(f"127.0.0.{20 + place}") for place in range(2)]
        for voice, control in pairs:
            assert [await voice.ask(), await control.report()] == ["v1", "v1"]
        await calls.restart()
        (line,) = calls.room.lines.of("UDP sessions restored")
        assert line == {"service": "game", "count": 2, "lost": 0}
        assert (calls.relay.live, calls.relay.pairs) == (2, 2)


@pytest.mark.parametrize(
    ("taken", "count", "lost"), [("first", 1, 0), ("second", 1, 0), ("both", 0, 1)]
)
async def test_half_a_pair_goes_on(tmp_path: Path, taken: str, count: int, lost: int) -> None:
    """Where the source port of the other half is taken; two pairs, of which the other is whole."""
    async with open_calls(tmp_path) as calls:
        v1 = calls.server("v1")
        await calls.deploy(v1)
        pairs = [calls.pair(), calls.pair()]
        for voice, control in pairs:
            assert [await voice.ask(), await control.report()] == ["v1", "v1"]
        halves = [v1.received[0], v1.received[1]]
        assert [half.port for half in halves] == [*calls.ports[:2]]
        await calls.stop()
        wanted = halves if taken == "both" else [halves[taken == "second"]]
        holders = [calls.world.open_socket("0.0.0.0", half.source) for half in wanted]
        await calls.start()
        (line,) = calls.room.lines.of("UDP sessions restored")
        assert line == {"service": "game", "count": 1 + count, "lost": lost}
        assert (calls.relay.live, calls.relay.pairs) == (1 + count, 1)
        for holder in holders:
            holder.close()


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
