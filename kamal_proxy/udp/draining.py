"""The end of the sessions of a UDP deployment that was taken out of use, and the count of it.

They live in the service's relay, where they carry the deployment's generation. A plan of ``drains``
says when which of them end; here is seen to it, and the parties of calls are told.
"""

from __future__ import annotations

import os
from base64 import b64encode
from typing import TYPE_CHECKING, TypeAlias

import trio

from kamal_proxy.deployment import DrainResult
from kamal_proxy.udp.rtcp import goodbye

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kamal_proxy._fastpath import Relay
    from kamal_proxy.udp.drains import DrainPlan

_TOLD_AT_ONCE = 50  # calls; telling them takes about a millisecond
_REASON = "server is being replaced"
# A session, whether it is encrypted, and the sources and the name of its client and its target.
_Call: TypeAlias = tuple[int, bool, tuple[int, ...], bytes, tuple[int, ...], bytes]
_ENDED_AT_ONCE = 200  # sessions; closing their sockets takes about a millisecond


class SessionDrain:
    """The drain of one generation of sessions.

    Args:
        relay: Where they live.
        generation: What the relay knows them by.

    Attributes:
        result: How it ended, once that is over.
    """

    def __init__(self, relay: Relay, generation: int) -> None:
        self._relay = relay
        self._generation = generation
        self._empty = trio.Event()
        self._goodbyes = self._unsaid = 0
        self._removed = False
        self.result = DrainResult()

    def notice_empty(self) -> None:
        """Look whether there is no session left to wait for."""
        if not self._relay.sessions(self._generation):
            self._empty.set()

    def end_now(self) -> None:
        """End all sessions, because the service was removed; nobody is told goodbye."""
        self._removed = True
        self._empty.set()

    async def run(self, plan: DrainPlan, joined: Callable[[], int]) -> None:
        """Wait until no session is left, and end those that the plan says.

        Args:
            plan: When which sessions end.
            joined: Returns how many sessions have come since this began, without those that have
                left.
        """
        relay = self._relay
        sessions = relay.sessions(self._generation)
        cut = -self._count_cut()
        relay.let_go(self._generation)
        self.notice_empty()
        try:
            await self._end_sessions(plan)
        finally:  # a service that is removed ends sooner, and whoever waits is told of that too
            cut += self._count_cut()
            left = relay.sessions(self._generation)
            completed = max(0, sessions + joined() - cut - left)
            # One that was counted may have ended by itself before its turn came.
            unsaid = min(self._unsaid, cut)
            self.result = DrainResult(completed, cut, self._goodbyes, unsaid)

    async def _end_sessions(self, plan: DrainPlan) -> None:
        """Wait for the sessions' ends, and end those that are left when the plan says so."""
        relay, began = self._relay, trio.current_time()
        if plan.goodbye_after is not None:
            await self._wait_empty(began + plan.goodbye_after)
            await self._say_goodbye()
        if plan.end_silent_after is not None:
            await self._wait_empty(began + plan.end_silent_after)
            relay.hurry(self._generation)
        await self._wait_empty(began + plan.cut_after)
        await self._count_encrypted()
        while relay.sessions(self._generation):
            relay.end_some(self._generation, _ENDED_AT_ONCE, removed=self._removed)
            await trio.lowlevel.checkpoint()

    def _count_cut(self) -> int:
        """Return how many sessions have ever been cut, also by a removal of the service."""
        ended = self._relay.ended(self._generation)
        return ended["cut"] + ended["removed"]

    async def _wait_empty(self, deadline: float) -> None:
        """Wait until no session is left, but not longer than until a time on Trio's clock."""
        with trio.move_on_at(deadline):
            await self._empty.wait()

    async def _say_goodbye(self) -> None:
        """Tell both sides of each call that it ends (RFC 3550 7.2), where that can be told.

        Only plain RTP can be: SRTCP needs keys that only the two sides have. Nor is anybody told of
        the removal of a service.
        """
        if self._removed:
            return
        async for session, encrypted, client, client_name, target, target_name in self._calls():
            if not encrypted and (client or target):
                self._goodbyes += self._relay.say_goodbye(
                    session,
                    goodbye(target, target_name or _made_up_name(), _REASON) if target else b"",
                    goodbye(client, client_name or _made_up_name(), _REASON) if client else b"",
                )

    async def _count_encrypted(self) -> None:
        """Count the calls that are cut next without a goodbye, because nobody can say it."""
        if not self._removed:
            self._unsaid = sum([encrypted async for _, encrypted, *_ in self._calls()])

    async def _calls(self) -> AsyncIterator[_Call]:
        """Yield the sessions that there are now, and let others have their turns meanwhile."""
        self._relay.begin_goodbye(self._generation)
        while calls := self._relay.goodbyes(self._generation, _TOLD_AT_ONCE):
            for call in calls:
                yield call
            await trio.lowlevel.checkpoint()


def _made_up_name() -> bytes:
    """Return a CNAME for a source whose own was never seen (RFC 7022 4.2)."""
    return b64encode(os.urandom(12))
