"""What names and addresses stand for."""

from __future__ import annotations

import errno
import socket

import pytest
import trio

from kamal_proxy import lookups


async def test_no_thread_for_a_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    limiter = trio.CapacityLimiter(1)
    with pytest.raises(OSError, match="can't start new thread") as caught:
        await lookups.resolve("web.test", 80, limiter)
    assert caught.value.errno == errno.EAGAIN
    assert await lookups.resolve("127.0.0.1", 80, limiter), "an address needs none"


async def test_resolves_addresses() -> None:
    limiter = trio.CapacityLimiter(1)
    assert await lookups.resolve("127.0.0.1", 80, limiter) == [(socket.AF_INET, ("127.0.0.1", 80))]
    assert await lookups.resolve("::1", 81, limiter) == [(socket.AF_INET6, ("::1", 81, 0, 0))]
