"""What tests of the lane have in common: targets, whether it is used, what a proxy has counted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.http.exchange import Exchange
from kamal_proxy.http.lane import Lane
from tests.http.streams import HELLO, read_head

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    from kamal_proxy._fastpath import Visit
    from kamal_proxy.http.connection import ClientConnection
    from tests.running import Embedded

GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
LARGE_BODY = b"x" * 3_000_000
LARGE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(LARGE_BODY), LARGE_BODY)
_SAMPLE = re.compile(r"kamal_proxy_(http|upstream)_(\w+?)(?:_total)?(\{.*\})? ([0-9.e+]+)")
_COUNTED = {"requests", "failures", "connects", "reuses", "retries", "in_flight_requests"}


Turn: TypeAlias = "Callable[[trio.SocketStream], Awaitable[None]]"


@attrs.define
class Spy:
    """Counts what leaves the lane.

    Attributes:
        tasks: How often a connection got a task, at its beginning or later.
        given: How often that was in the middle of an exchange.
        exchanges: How many exchanges were those of tasks, to their end.
        entered: How often a connection entered a lane: accepted, or given back by a task.
    """

    tasks: int = 0
    given: int = 0
    exchanges: int = 0
    entered: int = 0


def spy_on_lanes(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Count, until the end of the test, what all lanes do."""
    spy = Spy()
    attend, give_away, enter = Lane._attend, Lane.give_away, Lane._enter

    def counting_attend(self: Lane, visit: Visit, connection: ClientConnection) -> None:
        spy.tasks += 1
        attend(self, visit, connection)

    def counting_give_away(self: Lane, *args: Any, **kwargs: Any) -> None:
        spy.given += 1
        give_away(self, *args, **kwargs)

    def counting_enter(self: Lane, visit: Visit) -> None:
        spy.entered += 1
        enter(self, visit)

    init = Exchange.__init__

    def counting_init(self: Exchange, *args: Any, **kwargs: Any) -> None:
        spy.exchanges += 1
        init(self, *args, **kwargs)

    monkeypatch.setattr(Exchange, "__init__", counting_init)
    monkeypatch.setattr(Lane, "_attend", counting_attend)
    monkeypatch.setattr(Lane, "give_away", counting_give_away)
    monkeypatch.setattr(Lane, "_enter", counting_enter)
    return spy


def counted(proxy: Embedded) -> dict[str, float]:
    """Return what a proxy has counted of HTTP, without what takes time."""
    text, _ = proxy.proxy.metrics()
    samples = (_SAMPLE.fullmatch(line) for line in text.decode().splitlines())
    return {
        f"{match[2]}{match[3] or ''}": float(match[4])
        for match in samples
        if match and match[2] in _COUNTED
    }


def taking_turns(*turns: Turn) -> Turn:
    """Answer the first request with hello, and let a function each deal with the next ones."""
    left = list(turns)

    async def answer(stream: trio.SocketStream) -> None:
        first = len(left) == len(turns)
        while await read_head(stream):
            if first or not left:
                first = False
                await stream.send_all(HELLO)
            else:
                await left.pop(0)(stream)
                if stream.socket.fileno() < 0:
                    return

    return answer


def saying(*parts: bytes) -> Turn:
    """Answer in parts."""

    async def say(stream: trio.SocketStream) -> None:
        for part in parts:
            await stream.send_all(part)
            await wait_all_tasks_blocked()

    return say


def saying_and_closing(*parts: bytes) -> Turn:
    """Answer in parts, and close."""

    async def say(stream: trio.SocketStream) -> None:
        await saying(*parts)(stream)
        await stream.aclose()

    return say


async def be_silent(_: trio.SocketStream) -> None:
    await trio.sleep_forever()
