"""The front of the HTTPS port, interrupted at every step: nothing is left over, nobody else waits.

Cancelled, told that the proxy stops, or left by its client: while the hello is read, while the
application is asked, while a certificate is obtained, in the handshake and after it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock

from kamal_proxy.http.https import HttpsFront
from kamal_proxy.metrics import Metrics
from kamal_proxy.networks import Networks
from kamal_proxy.options import RunOptions, ServiceOptions
from kamal_proxy.tls.certificates import parse_certificate
from kamal_proxy.tls.files import TlsFiles
from kamal_proxy.tls.hello import ClientHello
from kamal_proxy.tls.hosts import Authority
from kamal_proxy.tls.on_demand import Answer, OnDemand
from kamal_proxy.tls.selection import NoCertificateError, Selection
from tests.certificates import make_ca
from tests.deploying import Lines, run_with_every_cancellation
from tests.pairs import Steps, running_poller, stream_pair
from tests.secure import client_context

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

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

    async def _ask(self, service: str, path: str, host: str) -> Answer:
        self.asked.append(host)
        await trio.sleep(0.1)
        return Answer(200, b"")

    def stop(self) -> None:
        """Do what a proxy does that stops."""
        self.front.close()
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
            world, scope = World(), trio.CancelScope()
            answers: list[bytes] = []
            async with running_poller() as poller:
                with stream_pair(poller) as (stream, far):
                    steps = Steps(step, lambda: interrupt(world, scope, far))

                    async def serve() -> None:
                        with scope:
                            await world.front.handle(stream, CLIENT)
                        stream.close()

                    async def go() -> None:
                        answers.append(await visit(far))

                    trio.lowlevel.add_instrument(steps)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(go)
                        nursery.start_soon(serve)
                    trio.lowlevel.remove_instrument(steps)
                assert len(poller) == 0, "the connection is closed, whoever had it"
                assert not world.front._opening
                assert answers == [b"hello" if world.greeter.served else b""]
                assert world.greeter.lines.messages == []
                if world.greeter.closing:
                    assert 'result="timeout"' not in world.greeter.metrics.render("")[0].decode()
                # Nobody else suffers: the name is asked about, and its certificate is obtained.
                world.greeter.closing = False
                with stream_pair(poller) as (stream, far):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(world.front.handle, stream, CLIENT)
                        assert await visit(far) == b"hello"
                        far.shutdown(2)
                assert world.asked in (["a.test"], ["a.test", "a.test"])
                assert set(world.issuer.requested) == {"a.test"}
                assert len(poller) == 0
            return steps.count >= step

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    assert run_with_every_cancellation(attempt) > 20


def test_a_certificate_that_openssl_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each handshake costs as little as any that fails, and no line of the log."""
    # What OpenSSL takes depends on its security level, which is not ours to choose.
    weak = attrs.evolve(CERTIFICATE, pem=b"-----BEGIN CERTIFICATE-----\n")
    monkeypatch.setattr(SlowIssuer, "find", lambda self, host: weak)

    async def main() -> None:
        world = World()
        async with running_poller() as poller:
            with stream_pair(poller) as (stream, far):
                async with trio.open_nursery() as nursery:

                    async def serve() -> None:
                        await world.front.handle(stream, CLIENT)
                        stream.close()

                    nursery.start_soon(serve)
                    assert await visit(far) == b""
        assert world.greeter.lines.messages == []
        shown = world.greeter.metrics.render("")[0].decode()
        assert 'kamal_proxy_tls_handshakes_total{result="unusable certificate"} 1.0' in shown

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
        await selection.context_for(ClientHello(server_name=name))
    assert issuer.requested == []


@pytest.mark.parametrize(("hosts", "chosen"), [((), ""), (("1.2.3.4",), "1.2.3.4")])
def test_an_address_is_no_name_that_everything_includes(
    hosts: tuple[str, ...], chosen: str
) -> None:
    class Routes(Everything):
        def secure(self, host: str) -> Everything:
            return Routes(options=ServiceOptions(tls_enabled=True, hosts=hosts))

    selection = Selection(Routes, cast("Issuer", None), cast("OnDemand", None), cast("Any", None))
    assert selection._asked("1.2.3.4") == chosen
