"""The front of the HTTPS port, interrupted at every step: nothing is left over, nobody else waits.

Cancelled, told that the proxy stops, or left by its client: while the hello is read, while the
application is asked, while a certificate is obtained, in the handshake and after it.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy.http.https import HttpsFront
from kamal_proxy.listeners import Clients
from kamal_proxy.metrics import Metrics
from kamal_proxy.networks import Networks
from kamal_proxy.options import ServiceOptions
from kamal_proxy.run_options import RunOptions
from kamal_proxy.tls.certificates import parse_certificate
from kamal_proxy.tls.files import TlsFiles
from kamal_proxy.tls.hello import ClientHello
from kamal_proxy.tls.hosts import Authority
from kamal_proxy.tls.on_demand import Answer, OnDemand
from kamal_proxy.tls.selection import NoCertificateError, Selection
from kamal_proxy.tls.stream import Handshake
from tests.certificates import make_ca
from tests.deploying import Lines, run_with_every_cancellation
from tests.pairs import Steps, running_poller, stream_pair
from tests.secure import client_context
from tests.tls.peers import Peer

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable

    from kamal_proxy.http.server import HttpServer
    from kamal_proxy.listeners import Address
    from kamal_proxy.sockets import SocketStream
    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.issuer import Issuer

CLIENT = ("192.0.2.7", 4000)
AUTHORITY = make_ca()
ISSUED = AUTHORITY.issue("a.test")
CERTIFICATE = parse_certificate(ISSUED.chain_pem, ISSUED.key_pem)
TRUSTING = client_context(AUTHORITY)


@attrs.frozen
class Everything:
    """A service that takes every host that its application wants."""

    name: str = "web"
    options: ServiceOptions = attrs.field(
        factory=lambda: ServiceOptions(tls_enabled=True, tls_on_demand_url="/ask")
    )
    tls: TlsFiles = attrs.field(factory=lambda: TlsFiles(ServiceOptions(tls_enabled=True)))

    def secure(self, host: str) -> Everything:
        """Return itself: it is all that is served."""
        return self


class SlowIssuer:
    """Has no certificate at hand, and each answer takes a while.

    Attributes:
        requested: Of which hosts one was wanted.
    """

    def __init__(self) -> None:
        self.requested: list[str] = []

    def find(self, host: str) -> Certificate | None:
        """Return none."""
        return None

    async def load(self, host: str, authority: Authority) -> Certificate | None:
        """Return none, in a while."""
        await trio.sleep(0.1)
        return None

    def request(self, host: str, authority: Authority) -> None:
        """Take note."""
        self.requested.append(host)

    async def wait(self, host: str) -> Certificate | None:
        """Return one, in a while."""
        await trio.sleep(0.1)
        return CERTIFICATE


class Greeter:
    """What a server of HTTP is to the front; says hello inside TLS.

    Attributes:
        served: How many connections it has served.
    """

    def __init__(self) -> None:
        self.options = RunOptions(https_port=0)
        self.lines = Lines()
        self.log = self.lines.log()
        self.metrics = Metrics()
        self.proxy_protocol_from = Networks(())
        self.closing = False
        self.served = 0

    async def handle(self, stream: SocketStream, address: Address) -> None:
        """Serve one connection."""
        if self.closing:
            return
        assert address == CLIENT
        with contextlib.suppress(trio.BrokenResourceError):
            if await stream.receive():
                await stream.send(b"hello")
                self.served += 1


class World:
    """A front, and what it is made of."""

    def __init__(self) -> None:
        self.greeter = Greeter()
        self.issuer = SlowIssuer()
        self.asked: list[str] = []
        self.front = HttpsFront(
            cast("HttpServer", self.greeter),
            Selection(
                Everything,
                cast("Issuer", self.issuer),
                OnDemand(self._ask, self.greeter.log),
                lambda _: Authority("", "certs"),
            ),
        )

    @asynccontextmanager
    async def running(self, stream: SocketStream) -> AsyncIterator[trio.CancelScope]:
        """Serve one connection; wait until it is over. Yields what cancels all that is done."""
        limiter = trio.Semaphore(1)
        limiter.acquire_nowait()
        async with trio.open_nursery() as everything, trio.open_nursery() as acceptors:
            self._acceptors = acceptors
            self.front._closed = False
            acceptors.start_soon(self.front.run)
            self.begin(Clients(everything, limiter), stream)
            yield everything.cancel_scope
            await limiter.acquire()
            acceptors.cancel_scope.cancel()

    def begin(self, clients: Clients, stream: SocketStream) -> None:
        """Have a connection opened."""
        serve = functools.partial(clients.serve, self.greeter.handle)
        self.front.begin(clients, serve, stream, CLIENT)

    async def _ask(self, service: str, path: str, host: str) -> Answer:
        self.asked.append(host)
        await trio.sleep(0.1)
        return Answer(200, b"")

    def stop(self) -> None:
        """Do what a proxy does that stops."""
        self._acceptors.cancel_scope.cancel()
        self.greeter.closing = True


async def visit(far: socket.socket) -> bytes:
    """Go through a handshake and say something; return the answer."""
    wire = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    stream = trio.SSLStream(wire, TRUSTING, server_hostname="a.test", https_compatible=True)
    try:
        await stream.send_all(b"hi")
        return bytes(await stream.receive_some())
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return b""


def cancel(world: World, scope: trio.CancelScope, far: socket.socket) -> None:
    scope.cancel()


def stop(world: World, scope: trio.CancelScope, far: socket.socket) -> None:
    world.stop()


def leave(world: World, scope: trio.CancelScope, far: socket.socket) -> None:
    far.shutdown(2)


@pytest.mark.parametrize("interrupt", [cancel, stop, leave])
def test_interrupted_at_every_step(
    interrupt: Callable[[World, trio.CancelScope, socket.socket], None],
) -> None:
    def attempt(step: int) -> bool:
        async def main() -> bool:
            world = World()
            answers: list[bytes] = []
            async with running_poller() as poller:
                with stream_pair(poller) as (stream, far):

                    async def go() -> None:
                        answers.append(await visit(far))

                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(go)
                        async with world.running(stream) as scope:
                            steps = Steps(step, functools.partial(interrupt, world, scope, far))
                            trio.lowlevel.add_instrument(steps)
                    trio.lowlevel.remove_instrument(steps)
                assert len(poller) == 0, "the connection is closed, whoever had it"
                assert not world.front._openings
                assert answers == [b"hello" if world.greeter.served else b""]
                assert not set(world.greeter.lines.messages) - {"TLS handshakes failed"}
                if world.greeter.closing:
                    assert 'result="timeout"' not in world.greeter.metrics.render("")[0].decode()
                # Nobody else suffers: the name is asked about, and its certificate is obtained.
                world.greeter.closing = False
                with stream_pair(poller) as (stream, far):
                    async with world.running(stream):
                        assert await visit(far) == b"hello"
                        far.shutdown(2)
                assert world.asked in (["a.test"], ["a.test", "a.test"])
                assert set(world.issuer.requested) == {"a.test"}
                assert len(poller) == 0
            return steps.count >= step

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 20


def test_a_certificate_that_openssl_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each handshake costs as little as any that fails, and no line of the log for itself."""
    # What OpenSSL takes depends on its security level, which is not ours to choose.
    weak = attrs.evolve(CERTIFICATE, pem=b"-----BEGIN CERTIFICATE-----\n")
    monkeypatch.setattr(SlowIssuer, "find", lambda self, host: weak)

    async def main() -> None:
        world = World()
        async with running_poller() as poller:
            with stream_pair(poller) as (stream, far):
                async with world.running(stream):
                    assert await visit(far) == b""
        assert not set(world.greeter.lines.messages) - {"TLS handshakes failed"}
        shown = world.greeter.metrics.render("")[0].decode()
        assert 'kamal_proxy_tls_handshakes_total{result="unusable certificate"} 1.0' in shown

    trio.run(main, clock=MockClock(autojump_threshold=0))


def at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a certificate at once, so that no connection needs a task before it speaks."""
    monkeypatch.setattr(SlowIssuer, "find", lambda self, host: CERTIFICATE)


def counted(world: World) -> set[str]:
    """Return what became of handshakes, as metrics show it."""
    lines = world.greeter.metrics.render("")[0].decode().splitlines()
    return {line.partition("{")[2] for line in lines if "handshakes_total{" in line}


def test_a_silent_client_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its hello, in the middle of it, and after the handshake: that is no failure."""
    at_hand(monkeypatch)

    async def main() -> None:
        world = World()
        patience = world.greeter.options.head_timeout
        async with running_poller() as poller:
            for said in (b"", b"\x16\x03\x01\x02\x00"):
                begun = trio.current_time()
                with stream_pair(poller) as (stream, far):
                    async with world.running(stream):
                        far.send(said)
                    assert trio.current_time() - begun == patience
            assert counted(world) == {'result="timeout"} 2.0'}
            with stream_pair(poller) as (stream, far):
                wire = trio.SocketStream(trio.socket.from_stdlib_socket(far))
                client = trio.SSLStream(wire, TRUSTING, server_hostname="a.test")
                async with world.running(stream):
                    await trio.sleep(patience / 2)
                    await client.do_handshake()
                    begun = trio.current_time()
                    assert await client.receive_some() == b"", "it is told that this is the end"
                assert trio.current_time() - begun == patience
            assert counted(world) == {'result="timeout"} 2.0', 'result="ok"} 1.0'}
            assert world.greeter.served == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_clients_run_out_of_time_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    at_hand(monkeypatch)

    async def main() -> None:
        world = World()
        patience = world.greeter.options.head_timeout
        async with running_poller() as poller, contextlib.AsyncExitStack() as stack:
            limiter = trio.Semaphore(0)
            everything = await stack.enter_async_context(trio.open_nursery())
            everything.start_soon(world.front.run)
            pairs = [stack.enter_context(stream_pair(poller)) for _ in range(5)]
            for stream, _ in pairs:
                world.begin(Clients(everything, limiter), stream)
                await trio.sleep(1)
            pairs[1][1].close()  # it has left already when its time is over
            await trio.sleep(patience - 5 + 0.5)
            for ended in (2, 2, 3, 4, 5):
                assert limiter.value == ended
                await trio.sleep(1)
            everything.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_client_that_reads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for the server's part of the handshake for a while."""
    at_hand(monkeypatch)

    async def main() -> None:
        world = World()
        async with running_poller() as poller:
            with stream_pair(poller) as (stream, far):
                filled = 0
                while taken := stream.send_nowait(bytes(1 << 16)):
                    filled += taken
                async with world.running(stream):
                    peer = Peer(far, TRUSTING, name="a.test")
                    with pytest.raises(ssl.SSLWantReadError):
                        peer.tls.do_handshake()
                    far.send(peer.pending())
                    far.send(b"\x14\x03\x03\x00\x01\x01")  # which is ignored, but arrives first
                    await wait_all_tasks_blocked()
                    assert world.front._openings
                    while filled:
                        filled -= len(far.recv(min(filled, 1 << 16)))
                        await wait_all_tasks_blocked()
                    while not peer.shaken:
                        peer.shake()
                        await wait_all_tasks_blocked()
                    peer.send(b"hi")
                    await wait_all_tasks_blocked()
                    assert peer.receive() == b"hello"
            assert counted(world) == {'result="ok"} 1.0'}

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("said", [b"hi", b""])
def test_what_a_client_has_said_when_the_proxy_stops(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """A request that lies in the socket is served, though nobody has read it yet."""
    at_hand(monkeypatch)

    async def main() -> None:
        world = World()
        async with running_poller() as poller:
            with stream_pair(poller) as (stream, far):
                async with world.running(stream):
                    peer = Peer(far, TRUSTING, name="a.test")
                    while not peer.shaken:
                        peer.shake()
                        await wait_all_tasks_blocked()
                    if said:
                        peer.send(said)
                    world._acceptors.cancel_scope.cancel()
                assert peer.receive() == (b"hello" if said else b"")
                assert peer.ended

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_bug_costs_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    at_hand(monkeypatch)

    def fail(self: Handshake, data: bytes) -> None:
        raise ZeroDivisionError("oops")

    async def main() -> None:
        world = World()
        async with running_poller() as poller:
            with stream_pair(poller) as (stream, far), monkeypatch.context() as broken:
                broken.setattr(Handshake, "proceed", fail)
                async with world.running(stream):
                    assert await visit(far) == b""
            assert "Connection failed" in world.greeter.lines.messages
            with stream_pair(poller) as (stream, far):
                async with world.running(stream):
                    assert await visit(far) == b"hello"
                    far.shutdown(2)

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("hosts", "name"), [((), "a.test"), ((), ""), (("*.test",), "a.test")])
async def test_strangers_choose_no_names(hosts: tuple[str, ...], name: str) -> None:
    """The Go proxy has taken --tls without hosts, and saved it: that must not order anything."""

    class Legacy(Everything):
        def secure(self, host: str) -> Everything:
            return Legacy(options=ServiceOptions(tls_enabled=True, hosts=hosts))

    issuer = SlowIssuer()
    selection = Selection(
        Legacy, cast("Issuer", issuer), cast("OnDemand", None), lambda _: Authority("", "certs")
    )
    with pytest.raises(NoCertificateError, match="not allowed"):
        await selection.wait_for(ClientHello(server_name=name))
    assert issuer.requested == []


@pytest.mark.parametrize(("hosts", "chosen"), [((), ""), (("1.2.3.4",), "1.2.3.4")])
def test_an_address_is_no_name_that_everything_includes(
    hosts: tuple[str, ...], chosen: str
) -> None:
    class Routes(Everything):
        def secure(self, host: str) -> Everything:
            return Routes(options=ServiceOptions(tls_enabled=True, hosts=hosts))

    selection = Selection(Routes, cast("Issuer", None), cast("OnDemand", None), cast("Any", None))
    assert selection._named("1.2.3.4") == chosen
