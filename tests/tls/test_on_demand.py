"""Certificates for hosts that only the application knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy.logs import Log
from kamal_proxy.options import ServiceOptions
from kamal_proxy.run_options import AcmeOptions
from kamal_proxy.tls.on_demand import BURST, DENIAL_LASTS, Answer, OnDemand, with_host
from tests.running import Lines, open_embedded
from tests.scripted import deploy_options, ok, open_upstream
from tests.secure import client_context, open_secure
from tests.tls.pebble import needs_pebble, open_pebble

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

    from tests.running import Embedded
    from tests.scripted import Upstream

ANY = client_context(None)
NO = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 300\r\n\r\n" + b"x" * 300


def options(upstream: Upstream, url: str = "/allowed") -> Any:
    return attrs.evolve(
        deploy_options("web", [upstream]),
        service_options=ServiceOptions(tls_enabled=True, tls_on_demand_url=url),
    )


@attrs.define(eq=False)
class Judge:
    """An application that allows names that begin with ``good``.

    Attributes:
        asked: The paths that it was asked, with the Host.
    """

    asked: list[tuple[str, bytes]] = attrs.field(factory=list)

    async def __call__(self, peer: Any) -> None:
        """Serve a connection; anything else is answered with its path."""
        while (request := await peer.receive_request()) is not None:
            path = request.target.decode()
            if path.startswith("/allowed"):
                (host,) = request.get(b"host")
                self.asked.append((path, host))
                await peer.send(ok(b"yes") if "host=good" in path else NO)
            else:
                await peer.send(ok(path.encode()))


async def refused(proxy: Embedded, name: str) -> bool:
    try:
        async with open_secure(proxy.https_port, name, ANY):
            return False
    except trio.BrokenResourceError as error:
        return "unrecognized name" in str(error.__cause__)


@needs_pebble
@pytest.mark.parametrize("external", [False, True], ids=["through the service", "by URL"])
async def test_the_application_decides(tmp_path: Path, external: bool) -> None:
    judge = Judge()
    async with open_pebble() as pebble, open_upstream(judge) as upstream:
        run: dict[str, Any] = {
            "http_port": pebble.http_port,
            "https_port": pebble.tls_port,
            "data_directory": tmp_path,
            "acme": AcmeOptions(directory=pebble.directory, ca_file=pebble.ca_file),
        }
        url = f"http://{upstream.target}/allowed?key=1" if external else "/allowed"
        asked = f"{url.partition(upstream.target)[2] if external else url}"
        async with open_embedded(**run) as proxy:
            await proxy.deploy(options(upstream, url))
            assert await refused(proxy, "bad.test")
            line = await proxy.lines.wait_for_message("TLS on-demand: denied")
            assert (line["host"], line["status"], line["body"]) == ("bad.test", 403, "x" * 256)
            async with open_secure(proxy.https_port, "good.test", ANY) as client:
                assert (await client.get("/x", "good.test")).body == b"/x"
            # A denial is remembered, and a certificate needs no question.
            assert await refused(proxy, "bad.test")
            async with open_secure(proxy.https_port, "good.test", ANY) as client:
                assert (await client.get("/x", "good.test")).status == 200
            questions = [
                (with_host(asked, "bad.test"), b"bad.test"),
                (with_host(asked, "good.test"), b"good.test"),
            ]
            assert judge.asked == questions
        # Also after a restart.
        async with open_embedded(**run) as proxy:
            async with open_secure(proxy.https_port, "good.test", ANY) as client:
                assert (await client.get("/x", "good.test")).status == 200
            assert judge.asked == questions


async def test_an_application_that_does_not_answer(tmp_path: Path) -> None:
    async def silent(peer: Any) -> None:
        await peer.receive_request()
        await trio.sleep_forever()

    async with (
        open_upstream(silent) as upstream,
        open_embedded(https_port=0, data_directory=tmp_path) as proxy,
    ):
        await proxy.deploy(options(upstream))
        assert await refused(proxy, "slow.test")
        line = await proxy.lines.wait_for_message("TLS on-demand: no answer")
        assert line["error"] == "none in 2s"


async def test_urls_that_lead_nowhere(tmp_path: Path, upstream: Upstream) -> None:
    for url in ("http://127.0.0.1:1/x", "https://127.0.0.1:1/x"):
        async with open_embedded(https_port=0, data_directory=tmp_path / "d") as proxy:
            await proxy.deploy(options(upstream, url))
            assert await refused(proxy, "a.test")
            await proxy.lines.wait_for_message("TLS on-demand: no answer")


@pytest.mark.parametrize("external", [False, True], ids=["through the service", "by URL"])
@pytest.mark.parametrize("status", [200, 403])
async def test_a_body_that_never_ends(tmp_path: Path, external: bool, status: int) -> None:
    """Who says yes need not say more, and a no that breaks off is a no."""
    asked: list[bytes] = []

    async def begin(peer: Any) -> None:
        asked.append((await peer.receive_request()).target)
        head = b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % status
        await peer.send(head + (b"" if status == 200 else b"zz\r\n"))
        if status == 200:
            await peer.receive_eof()

    async with (
        open_upstream(begin) as upstream,
        open_embedded(https_port=0, data_directory=tmp_path) as proxy,
    ):
        url = f"http://{upstream.target}/x#part" if external else "/x#part"
        await proxy.deploy(options(upstream, url))
        assert await refused(proxy, "a.test") == (status != 200)
        assert asked == [b"/x?host=a.test"]
        told = [
            (line["msg"], line.get("status"))
            for line in proxy.lines.all
            if "on-demand" in line["msg"]
        ]
        assert told == ([] if status == 200 else [("TLS on-demand: denied", 403)])


@attrs.define(eq=False)
class Application:
    """Answers questions as it is told, and remembers them."""

    status: int = 403
    asked: list[str] = attrs.field(factory=list)
    answer: Callable[[], Any] = trio.lowlevel.checkpoint

    async def __call__(self, service: str, path: str, host: str) -> Answer:
        self.asked.append(host)
        await self.answer()
        return Answer(self.status, b"")


@attrs.frozen
class Service:
    name: str = "web"
    options: ServiceOptions = attrs.field(
        factory=lambda: ServiceOptions(tls_enabled=True, tls_on_demand_url="/ask")
    )
    tls: None = None


@pytest.mark.parametrize(
    "name", ["", "localhost", "192.0.2.1", "a b.test", "a..test", "x" * 64 + ".test", "1.2.3.4.5"]
)
async def test_what_is_no_name_is_not_asked_about(name: str) -> None:
    application = Application(200)
    assert not await OnDemand(application, Log(Lines().add)).allows(Service(), name)
    assert application.asked == []


async def test_a_denial_lasts(autojump_clock: MockClock) -> None:
    application = Application()
    gate = OnDemand(application, Log(Lines().add))
    for _ in range(3):
        assert not await gate.allows(Service(), "a.test")
    assert len(application.asked) == 1
    application.status = 200
    await trio.sleep(DENIAL_LASTS)
    assert await gate.allows(Service(), "a.test")
    # A deploy with another URL asks anew.
    application.status = 403
    assert not await gate.allows(Service(), "b.test")
    other = Service(options=ServiceOptions(tls_enabled=True, tls_on_demand_url="/other"))
    application.status = 200
    assert await gate.allows(other, "b.test")


async def test_many_who_ask_for_one_name_are_one_question() -> None:
    go = trio.Event()
    application = Application(200, answer=go.wait)
    gate = OnDemand(application, Log(Lines().add))
    results: list[bool] = []

    async def ask() -> None:
        results.append(await gate.allows(Service(), "a.test"))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as first:
            async with trio.open_nursery() as impatient:
                impatient.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(9):
                    nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                assert len(application.asked) == 1
                first.cancel()
        # Its client is gone; the others go on with a question of their own.
        await trio.testing.wait_all_tasks_blocked()
        assert len(application.asked) == 2
        go.set()
    assert results == [True] * 9


async def test_a_flood_of_names(autojump_clock: MockClock) -> None:
    application, lines = Application(), Lines()
    gate = OnDemand(application, Log(lines.add))
    for number in range(1000):
        assert not await gate.allows(Service(), f"n{number}.test")
    assert len(application.asked) == BURST
    assert [line["msg"] for line in lines.all].count(
        "TLS on-demand: too many names are asked for; some handshakes are refused"
    ) == 1
    await trio.sleep(1)
    application.status = 200
    assert await gate.allows(Service(), "good.test")
