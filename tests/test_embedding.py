"""A proxy inside a Trio program: the example of docs/embedding.md, and what that page promises."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

import kamal_proxy
from kamal_proxy import (
    DeployFailedError,
    DeploymentOptions,
    DeployOptions,
    Event,
    HostConflictError,
    InvalidOptionsError,
    KamalProxyError,
    ListenError,
    Proxy,
    RunOptions,
    ServiceNotFoundError,
    ServiceOptions,
    StateError,
    open_proxy,
)
from kamal_proxy.errors import ControlSocketError, ShuttingDownError
from tests.running import ROOT, Lines
from tests.scripted import (
    TIME_LIMIT,
    Client,
    ConnectionCut,
    Held,
    Peer,
    Upstream,
    open_client,
    open_upstream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

RUN = RunOptions(http_port=0, bind="127.0.0.1", shutdown_timeout=2)


def open_descriptors() -> list[str]:
    """Return what each open descriptor of this process is."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(name.partition(":")[0] for name in found)


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with open_proxy(RUN, log=lambda line: None) as running:
        yield running


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    async with open_client(proxy.http_port) as connection:
        yield connection


async def begin_held_request(client: Client, upstream: Upstream) -> None:
    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await upstream.wait_requests(1)


# --- the page ------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "embedding.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_example_runs_as_it_stands_and_prints_what_the_page_says(tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(blocks("python")[0])

    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == blocks("text")[0]


@pytest.mark.parametrize("name", kamal_proxy.__all__)
def test_every_public_name_is_there_and_on_the_page(name: str) -> None:
    page = (ROOT / "docs" / "embedding.md").read_text()

    assert getattr(kamal_proxy, name) is not None
    assert re.search(rf"\b{name}\b", page) or name == "__version__"


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'proxies'"):
        kamal_proxy.proxies  # noqa: B018


# --- starting and stopping -----------------------------------------------------------------------


async def test_port_zero_is_chosen_by_the_kernel(proxy: Proxy, client: Client) -> None:
    assert proxy.http_port > 0
    assert (await client.get()).status == 404
    assert repr(proxy) == f"<Proxy http_port={proxy.http_port} services=0>"


async def test_a_proxy_started_in_a_nursery_of_ones_own() -> None:
    async with trio.open_nursery() as nursery:
        lines = Lines()
        proxy = await nursery.start(Proxy(RUN, log=lines.add).run)
        async with open_client(proxy.http_port) as client:
            assert (await client.get()).status == 404
        assert not proxy.stopping
        proxy.stop()
        proxy.stop()
        assert proxy.stopping
    assert lines.all[-1]["msg"] == "Server stopped"


async def test_without_a_log_lines_go_to_the_standard_library(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="kamal_proxy"):
        async with open_proxy(RUN):
            pass

    messages = [json.loads(message)["msg"] for message in caplog.messages]
    if messages[0].startswith("Fewer client connections"):
        del messages[0]  # where the limit of open files is low
    assert (messages[0], messages[-1]) == ("Server started", "Server stopped")


async def test_before_the_start_and_after_the_end(upstream: Upstream) -> None:
    proxy = Proxy(RUN, log=lambda line: None)
    assert repr(proxy) == "<Proxy not running>"
    with pytest.raises(ShuttingDownError):
        _ = proxy.http_port
    with pytest.raises(ShuttingDownError):
        proxy.services()

    async with open_proxy(RUN, log=lambda line: None) as proxy:
        pass

    with pytest.raises(ShuttingDownError):
        await proxy.deploy(upstream.options())
    with pytest.raises(ShuttingDownError):
        await proxy.remove("web")


async def test_a_proxy_runs_once() -> None:
    async with open_proxy(RUN, log=lambda line: None) as proxy:
        with trio.fail_after(5), pytest.raises(RuntimeError, match="once"):
            await proxy.run()
    with pytest.raises(RuntimeError, match="once"):
        await proxy.run()


async def test_stop_lets_requests_finish(upstream: Upstream) -> None:
    held = Held(upstream)
    upstream.script(held)
    async with open_proxy(RUN, log=lambda line: None) as proxy:
        await proxy.deploy(upstream.options())
        async with open_client(proxy.http_port) as client:
            await begin_held_request(client, upstream)
            proxy.stop()
            await trio.testing.wait_all_tasks_blocked()
            held.release.set()
            response = await client.receive_response()

            assert response.body == b"held"
            assert response.get(b"connection") == [b"close"]
            await client.wait_closed()


async def test_stop_takes_no_longer_than_it_may(
    upstream: Upstream, mock_clock: trio.testing.MockClock
) -> None:
    """A little less: who asked for it in time often ends the process when the time is over."""
    ended = trio.Event()
    upstream.script(Peer.wait_closed)
    options = attrs.evolve(RUN, shutdown_timeout=10)
    async with trio.open_nursery() as nursery:
        proxy = Proxy(options, log=lambda line: None)

        async def run(*, task_status: trio.TaskStatus[Any]) -> None:
            await proxy.run(task_status=task_status)
            ended.set()

        await nursery.start(run)
        await proxy.deploy(upstream.options())
        async with open_client(proxy.http_port) as client:
            # The rest of its body never comes, and so nothing of it ends by itself.
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nbody")
            await upstream.wait_peers(1)
            start = trio.current_time()
            proxy.stop()
            mock_clock.autojump_threshold = 0.05  # for sockets to do what they do
            assert (await client.receive_response()).status == 503
            assert 8 <= trio.current_time() - start <= 9
            await ended.wait()
            assert 9 <= trio.current_time() - start < 10


async def test_a_port_in_use_comes_out_of_start_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = RunOptions(http_port=port, bind="127.0.0.1")
        async with trio.open_nursery() as nursery:
            with pytest.raises(ListenError, match=f"listen tcp 127.0.0.1:{port}: bind: address"):
                await nursery.start(Proxy(options).run)


async def test_an_error_of_the_start_leaves_open_proxy_in_a_group() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        options = RunOptions(http_port=other.getsockname()[1], bind="127.0.0.1")
        with pytest.RaisesGroup(ListenError):
            async with open_proxy(options):
                raise AssertionError("it has started")


async def test_other_errors_of_the_start(directory: Path) -> None:
    (directory / "kamal-proxy.state").write_text("{")
    (directory / "file").touch()
    for options, error in (
        (RunOptions(http_port=70_000), InvalidOptionsError),
        (RunOptions(http3=True), InvalidOptionsError),
        (attrs.evolve(RUN, data_directory=directory), StateError),
        (attrs.evolve(RUN, socket_path=directory / "file"), ControlSocketError),
        (attrs.evolve(RUN, bind="no such host"), InvalidOptionsError),
        (attrs.evolve(RUN, bind="192.0.2.1"), ListenError),
    ):
        async with trio.open_nursery() as nursery:
            with pytest.raises(error) as caught:
                await nursery.start(Proxy(options, log=lambda line: None).run)
        assert isinstance(caught.value, KamalProxyError)


async def test_nothing_is_left_open(directory: Path) -> None:
    before = open_descriptors()
    options = attrs.evolve(RUN, data_directory=directory, socket_path=directory / "s")
    async with open_upstream() as upstream:
        async with open_proxy(options, log=lambda line: None) as proxy:
            await proxy.deploy(upstream.options())
            async with open_client(proxy.http_port) as client:
                assert (await client.get()).status == 200
            assert len(open_descriptors()) > len(before)
        with pytest.RaisesGroup(LookupError):
            async with (
                open_proxy(options, log=lambda line: None) as proxy,
                open_client(proxy.http_port) as client,
            ):
                assert (await client.get()).status == 200
                raise LookupError
        with pytest.RaisesGroup(ControlSocketError):
            async with open_proxy(attrs.evolve(options, socket_path=directory)):
                raise AssertionError("it has started")

    assert open_descriptors() == before
    assert not (directory / "s").exists()


# --- errors of the members -----------------------------------------------------------------------


async def test_errors_of_deploy_and_remove(proxy: Proxy, upstream: Upstream) -> None:
    await proxy.deploy(upstream.options("web"))

    with pytest.raises(HostConflictError, match="host settings conflict") as conflict:
        await proxy.deploy(upstream.options("other"))
    assert conflict.value.details == ("service web already serves every host with path prefix /",)
    with pytest.raises(InvalidOptionsError, match="service name 'a b'"):
        await proxy.deploy(upstream.options("a b"))
    upstream.health = 500
    with pytest.raises(DeployFailedError, match="failed to become healthy") as failed:
        await proxy.deploy(upstream.options("web", deploy_timeout=0))
    (detail,) = failed.value.details
    assert detail.startswith(f"target {upstream.target}: ")
    with pytest.raises(ServiceNotFoundError, match="service not found"):
        await proxy.remove("other")
    assert [service.name for service in proxy.services()] == ["web"]


# --- cancellation --------------------------------------------------------------------------------


async def test_cancelling_the_nursery_cuts_requests_and_closes_everything(
    upstream: Upstream,
) -> None:
    upstream.script(Held(upstream))
    lines = Lines()
    async with trio.open_nursery() as nursery:
        proxy = await nursery.start(Proxy(RUN, log=lines.add).run)
        await proxy.deploy(upstream.options())
        async with open_client(proxy.http_port) as client:
            await begin_held_request(client, upstream)

            nursery.cancel_scope.cancel()

            with trio.CancelScope(shield=True), pytest.raises(ConnectionCut):
                await client.receive_response()
    assert len(lines.requests) == 1
    with (
        pytest.raises(OSError, match="refused"),
        socket.create_connection(("127.0.0.1", proxy.http_port)),
    ):
        raise AssertionError("it still listens")


async def test_a_deploy_cancelled_before_the_switch_changes_nothing(
    proxy: Proxy, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(upstream.options())
    async with open_upstream() as other:
        other.health = 500
        with trio.CancelScope() as scope:

            def cancel(event: Event) -> None:
                assert event.event == "probe"
                scope.cancel()

            await proxy.deploy(other.options(), cancel)

        assert scope.cancelled_caught
        (service,) = proxy.services()
        assert service.targets == (upstream.target,)
        assert (await client.get()).status == 200
        assert not other.requests


async def test_a_deploy_cancelled_after_the_switch_drains_all_the_same(
    proxy: Proxy, upstream: Upstream, client: Client
) -> None:
    held = Held(upstream)
    upstream.script(held)
    await proxy.deploy(upstream.options())
    await begin_held_request(client, upstream)
    async with open_upstream() as other:
        with trio.CancelScope() as scope:

            def cancel(event: Event) -> None:
                if event.event == "draining":
                    scope.cancel()

            await proxy.deploy(other.options(), cancel)

        assert scope.cancelled_caught
        (service,) = proxy.services()
        assert (service.targets, service.draining) == ((other.target,), 1)
        held.release.set()
        assert (await client.receive_response()).body == b"held"
        assert (await client.get()).status == 200
        assert len(other.requests) == 1
        assert proxy.services()[0].draining == 0


async def test_a_deploy_fails_when_the_proxy_stops(upstream: Upstream) -> None:
    upstream.health = 500
    errors: list[KamalProxyError] = []
    began = trio.Event()

    async def deploy(proxy: Proxy) -> None:
        with pytest.raises(ShuttingDownError) as caught:
            await proxy.deploy(upstream.options(), lambda event: began.set())
        errors.append(caught.value)

    async with trio.open_nursery() as nursery, open_proxy(RUN, log=lambda line: None) as proxy:
        nursery.start_soon(deploy, proxy)
        await began.wait()

    assert len(errors) == 1


# --- when the machine fails it -------------------------------------------------------------------


async def test_lookups_that_hang_hold_up_nothing_else(
    directory: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio offers 40 threads to all; more lookups than that must leave some for the state."""
    asked, answered = threading.Event(), threading.Event()
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> object:
        if host.endswith(".test") and not options["flags"] & socket.AI_NUMERICHOST:
            asked.set()
            answered.wait(2 * TIME_LIMIT)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    stuck = DeployOptions(service="stuck", targets=tuple(f"t{n}.test:80" for n in range(45)))
    options = attrs.evolve(RUN, data_directory=directory)
    try:
        async with (
            open_proxy(options, log=lambda line: None) as proxy,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(proxy.deploy, stuck)
            await trio.testing.wait_all_tasks_blocked()
            await proxy.deploy(upstream.options())
            await proxy.remove("web")
            assert asked.is_set()
            assert not answered.is_set()
            nursery.cancel_scope.cancel()
    finally:
        answered.set()


async def test_no_thread_to_be_had_costs_one_request_not_the_proxy(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    async def run_sync(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    reason = "can't resolve web.test: can't start new thread"
    lines = Lines()
    named = DeployOptions(
        service="named",
        targets=("web.test:80",),
        service_options=ServiceOptions(hosts=("named.example",)),
        deployment_options=DeploymentOptions(force=True),
    )
    async with open_proxy(RUN, log=lines.add) as proxy:
        await proxy.deploy(named)
        async with open_client(proxy.http_port) as client:
            assert (await client.get(host="named.example")).status == 502
            await proxy.deploy(upstream.options())
            assert (await client.get()).status == 200
        assert (await lines.wait_for_message("Error while proxying"))["error"] == reason
        assert (await lines.wait_for_message("Healthcheck failed"))["error"] == reason


# --- two in one program --------------------------------------------------------------------------


async def test_two_proxies_do_not_interfere(directory: Path, upstream: Upstream) -> None:
    first_log, second_log = Lines(), Lines()
    one = attrs.evolve(RUN, data_directory=directory / "1", socket_path=directory / "1.sock")
    two = attrs.evolve(RUN, data_directory=directory / "2", socket_path=directory / "2.sock")
    async with open_upstream() as other, open_proxy(one, log=first_log.add) as first:
        async with open_proxy(two, log=second_log.add) as second:
            assert first.http_port != second.http_port
            await first.deploy(upstream.options("a"))
            await second.deploy(other.options("b"))
            async with open_client(second.http_port) as client:
                assert (await client.get("/second")).status == 200

            assert [service.name for service in first.services()] == ["a"]
            assert [service.name for service in second.services()] == ["b"]
            assert not first_log.requests
            assert [line["path"] for line in second_log.requests] == ["/second"]

        async with open_client(first.http_port) as client:
            assert (await client.get("/first")).status == 200
        await first.remove("a")
    assert [line["path"] for line in first_log.requests] == ["/first"]
    assert len(second_log.requests) == 1
    assert (len(upstream.requests), len(other.requests)) == (1, 1)


async def test_a_second_proxy_on_the_same_socket_or_state_is_refused(directory: Path) -> None:
    shared_socket = attrs.evolve(RUN, socket_path=directory / "s")
    shared_state = attrs.evolve(RUN, data_directory=directory)
    for options, error, sentence in (
        (shared_socket, ControlSocketError, "another kamal-proxy is running"),
        (shared_state, StateError, "another kamal-proxy is using the saved state"),
    ):
        async with open_proxy(options, log=lambda line: None) as first:
            async with trio.open_nursery() as nursery:
                with pytest.raises(error, match=sentence):
                    await nursery.start(Proxy(options, log=lambda line: None).run)
            async with open_client(first.http_port) as client:
                assert (await client.get()).status == 404, "the first one is unharmed"
