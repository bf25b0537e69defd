"""What tests of the lane have in common: whether it is used, and what a proxy has counted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs

from kamal_proxy.http.exchange import Exchange
from kamal_proxy.http.lane import Lane

if TYPE_CHECKING:
    import pytest

    from kamal_proxy._fastpath import Visit
    from kamal_proxy.http.connection import ClientConnection
    from tests.running import Embedded

GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
_SAMPLE = re.compile(r"kamal_proxy_(http|upstream)_(\w+?)(?:_total)?(\{.*\})? ([0-9.e+]+)")
_COUNTED = {"requests", "failures", "connects", "reuses", "retries", "in_flight_requests"}


@attrs.define
class Spy:
    """Counts what leaves the lane.

    Attributes:
        tasks: How often a connection got a task, at its beginning or later.
        given: How often that was in the middle of an exchange.
        exchanges: How many exchanges were those of tasks, to their end.
        back: Connections that a task gave back.
    """

    tasks: int = 0
    given: int = 0
    exchanges: int = 0
    back: int = 0


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
        spy.back += visit.was_served
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
