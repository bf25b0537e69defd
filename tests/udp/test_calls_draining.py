"""How calls on replaced servers end, and who is told: both sides, the command, log and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from kamal_proxy.cli.deploy_udp import _summary
from kamal_proxy.deployment import DrainResult
from tests.udp.callers import SHORT, Calls, MediaServer, Phone, open_calls, saying
from tests.udp.calling import ALERT, record
from tests.udp.serving import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

NEVER = 600.0  # a drain that waits for this is one that hangs


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    async with open_calls() as opened:
        yield opened


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
    async with saying(*party.goes_on):
        result = await calls.deploy(v2, **options)
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
    options = {"zero_downtime": True, "drain_timeout": 0.2, "force_kill_timeout": 2.8}
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


async def test_calls_that_end_by_themselves(calls: Calls) -> None:
    """They say so: RTCP with BYE, an alert of DTLS. Two seconds of silence confirm it."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    (voice, control), phone = calls.pair(), calls.phone()
    assert [await voice.ask(), await control.report()] == ["v1", "v1"]
    assert await phone.ask() == "v1"
    deploying = await calls.begin(
        v2, drain_strategy="graceful", drain_timeout=NEVER, force_kill_timeout=NEVER
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
    deploying = await calls.begin(v2, timeout=SHORT, force_kill_timeout=1.2)
    moved, late = calls.phone(), calls.phone()
    assert [await moved.check(ufrag), await late.check(v1.invite())] == ["v1", "v1"]
    async with saying(moved.say_data, late.say_data):
        result = await deploying.wait()
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


@pytest.mark.parametrize("strategy", ["graceful", "timeout"])
async def test_removing_during_a_drain_ends_it(calls: Calls, strategy: str) -> None:
    """All are cut, nobody is told, and whoever waits for the drain hears of it."""
    v1, v2 = calls.server("v1"), calls.server("v2")
    await calls.deploy(v1)
    (voice, control), phone = calls.pair(), calls.phone()
    assert [await voice.ask(), await control.report()] == ["v1", "v1"]
    ufrag = v1.invite()
    assert await phone.check(ufrag) == "v1"
    deploying = await calls.begin(v2, drain_strategy=strategy, drain_timeout=NEVER)
    await calls.room.services.remove("game")
    assert await deploying.wait() == DrainResult(0, 2)
    assert calls.room.number("sessions_ended_total", reason="removed") == 2
    assert control.byes == []
    # Nothing is left, also not of what was learned.
    await calls.deploy(v2, v1)
    assert await calls.phone().check(ufrag) == "v1"
    await until(lambda: v2.requests == 1)
    assert calls.room.row("game").in_flight == 1
