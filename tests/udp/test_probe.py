"""Probing the targets of UDP services: real TCP listeners that accept, refuse and say nothing."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock

from kamal_proxy import lookups
from kamal_proxy.health import ProbeResult
from kamal_proxy.http.probe import HttpProbe
from kamal_proxy.listeners import listen_tcp
from kamal_proxy.target_options import HealthCheckOptions
from kamal_proxy.udp.options import UdpHealthCheckOptions
from kamal_proxy.udp.probe import HttpCheck, NoProbe, TcpProbe, probe_for
from tests.deploying import run_with_every_cancellation
from tests.pairs import Steps, running_poller

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kamal_proxy.probing import Probed


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
TCP = UdpHealthCheckOptions()


@attrs.frozen
class Target:
    host: str
    port: int = 9999

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"


async def probe(
    host: str, port: int, options: UdpHealthCheckOptions = TCP, *, lookups: int = 1
) -> ProbeResult:
    return await TcpProbe(trio.CapacityLimiter(lookups))(Target(host, port), options)


@contextmanager
def deaf(host: str, port: int = 0) -> Iterator[int]:
    """Yield a port on which the kernel answers nobody: as many wait as there is room for."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def resolve_to(
    monkeypatch: pytest.MonkeyPatch, *hosts: str, error: Exception | None = None
) -> None:
    async def resolve(host: str, port: int, limiter: object) -> list[tuple[int, tuple[str, int]]]:
        await trio.lowlevel.checkpoint()
        if error is not None:
            raise error
        return [(socket.AF_INET, (each, port)) for each in hosts]

    monkeypatch.setattr(lookups, "resolve", resolve)


# TCP


async def test_a_target_that_accepts_is_healthy() -> None:
    with listen_tcp("127.0.0.2", 0) as listener:
        port = listener.getsockname()[1]
        result = await probe("127.0.0.2", port)
        assert result == ProbeResult(True, "connected", f"tcp://127.0.0.2:{port}")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b"", "the end of the stream, not a reset"


async def test_another_port_can_be_probed() -> None:
    with listen_tcp("127.0.0.2", 0) as listener:
        port = listener.getsockname()[1]
        result = await probe("127.0.0.2", 1, UdpHealthCheckOptions(port=port))
    assert result == ProbeResult(True, "connected", f"tcp://127.0.0.2:{port}")


@needs_ipv6
async def test_an_ipv6_target() -> None:
    with listen_tcp("::1", 0) as listener:
        port = listener.getsockname()[1]
        result = await probe("::1", port)
    assert result == ProbeResult(True, "connected", f"tcp://[::1]:{port}")


async def test_a_target_that_refuses() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.2", 0))
        port = silent.getsockname()[1]
        result = await probe("127.0.0.2", port)
    assert result == ProbeResult(False, "connection refused", f"tcp://127.0.0.2:{port}")


async def test_a_target_that_does_not_answer(autojump_clock: MockClock) -> None:
    with deaf("127.0.0.2") as port:
        result = await probe("127.0.0.2", port, UdpHealthCheckOptions(timeout=2.5))
    assert result == ProbeResult(False, "no answer within 2.5s", f"tcp://127.0.0.2:{port}")
    assert trio.current_time() == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), None),
        (OSError(errno.EAGAIN, "can't start new thread"), None),
        (UnicodeError("label too long"), "malformed name"),
    ],
)
async def test_a_target_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str | None
) -> None:
    resolve_to(monkeypatch, error=error)
    result = await probe("game-1", 9999)
    reason = reason or error.args[1]
    assert result == ProbeResult(False, f"can't resolve game-1: {reason}", "tcp://game-1:9999")


async def test_a_malformed_name() -> None:
    result = await probe("x" * 64, 9999)
    assert result.reason == f"can't resolve {'x' * 64}: malformed name"


async def test_a_name_service_that_does_not_answer(autojump_clock: MockClock) -> None:
    limiter = trio.CapacityLimiter(1)
    limiter.acquire_on_behalf_of_nowait("a look-up that hangs")
    result = await TcpProbe(limiter)(Target("game-1"), TCP)
    assert result == ProbeResult(False, "no answer within 5s", "tcp://game-1:9999")


async def test_a_name_resolved_too_late(
    monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    async def resolve(host: str, port: int, limiter: object) -> list[tuple[int, tuple[str, int]]]:
        mock_clock.jump(10)  # something else held everything up
        return [(socket.AF_INET, ("127.0.0.2", port))]

    monkeypatch.setattr(lookups, "resolve", resolve)
    assert (await probe("game-1", 9999)).reason == "no answer within 5s"


async def test_a_name_without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch)
    assert await probe("game-1", 9999) == ProbeResult(False, "no address", "tcp://game-1:9999")


async def test_each_address_has_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.3")
    with deaf("127.0.0.2") as port:
        with listen_tcp("127.0.0.3", port):
            assert (await probe("game-1", port)).ok
        assert trio.current_time() == pytest.approx(2.5)
        result = await probe("game-1", port)
        assert result.reason == "connection refused"
        assert trio.current_time() == pytest.approx(5)
        with deaf("127.0.0.3", port):
            result = await probe("game-1", port)
        assert result.reason == "no answer within 5s"
        assert trio.current_time() == pytest.approx(10)


async def test_the_next_address_is_tried_at_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.4")
    with listen_tcp("127.0.0.3", 0) as listener, deaf("127.0.0.4", listener.getsockname()[1]):
        assert (await probe("game-1", listener.getsockname()[1])).ok
    assert trio.current_time() == 0


class Sockets(trio.abc.SocketFactory):
    """Makes sockets that are bound to an address first, or none."""

    def __init__(self, bound_to: tuple[str, int] | None) -> None:
        self._bound_to = bound_to

    def socket(self, family: int = -1, type: int = -1, proto: int = 0) -> Any:  # noqa: A002
        if self._bound_to is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sock = socket.socket(family, type, proto)
        sock.bind(self._bound_to)
        return trio.socket.from_stdlib_socket(sock)


async def test_a_connection_to_itself_is_no_target() -> None:
    """The kernel may choose the very port that is probed, and TCP lets both ends be one."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = silent.getsockname()
    trio.socket.set_custom_socket_factory(Sockets(address))
    result = await probe(*address)
    assert result == ProbeResult(False, "connection refused", f"tcp://127.0.0.1:{address[1]}")


async def test_no_descriptor_left() -> None:
    trio.socket.set_custom_socket_factory(Sockets(None))
    result = await probe("127.0.0.1", 9999)
    assert result.reason == "too many open files"


# The others


async def test_nothing_is_probed() -> None:
    with trio.testing.assert_checkpoints():
        result = await NoProbe()(Target("game-1"), UdpHealthCheckOptions(method="none"))
    assert result == ProbeResult(True, "not checked", "")


async def test_http_is_asked_as_the_options_say() -> None:
    asked: list[object] = []

    async def http(target: Probed, options: HealthCheckOptions) -> ProbeResult:
        await trio.lowlevel.checkpoint()
        asked.append((target.name, target.host, target.port, options))
        return ProbeResult(False, "status 503", "http://game-1:9999/health")

    options = UdpHealthCheckOptions(
        method="http", path="/health", port=8080, interval=2.0, timeout=3.0
    )
    result = await HttpCheck(http)(Target("game-1"), options)
    assert result == ProbeResult(False, "status 503", "http://game-1:9999/health")
    assert asked == [
        (
            "game-1:9999",
            "game-1",
            9999,
            HealthCheckOptions(path="/health", port=8080, interval=2.0, timeout=3.0),
        )
    ]


@needs_ipv6
async def test_http_reaches_an_ipv6_target() -> None:
    requests: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        requests.append(await stream.receive_some())
        await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with running_poller() as poller, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="::1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        # It says that it wants a target of an HTTP service, and uses what all targets have.
        check = HttpCheck(cast("Any", HttpProbe(poller)))
        result = await check(Target("::1", 1), UdpHealthCheckOptions(method="http", port=port))
        nursery.cancel_scope.cancel()
    assert result == ProbeResult(True, "status 204", f"http://[::1]:{port}/up")
    assert f"\r\nHost: [::1]:{port}\r\n".encode() in requests[0]


async def _never(target: Probed, options: HealthCheckOptions) -> ProbeResult:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("method", "kind"), [("tcp", TcpProbe), ("http", HttpCheck), ("none", NoProbe)]
)
def test_the_method_says_which(method: str, kind: type) -> None:
    options = UdpHealthCheckOptions(method=method)
    made = probe_for(options, lookups=trio.CapacityLimiter(1), http=_never)
    assert type(made) is kind


# Cancellation


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_cancelled_at_every_await(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket is left behind; an unclosed one would also warn."""
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.4")

    def attempt(step: int) -> bool:
        async def life() -> bool:
            with deaf("127.0.0.2") as port, listen_tcp("127.0.0.4", port):
                before = descriptors()
                with trio.CancelScope() as scope:
                    steps = Steps(step, scope.cancel)
                    trio.lowlevel.add_instrument(steps)
                    assert (await probe("game-1", port)).ok
                    trio.lowlevel.remove_instrument(steps)
                assert descriptors() == before
                return scope.cancel_called

        return trio.run(life, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 3
