"""The admin API over its real Unix socket: raw bytes in, raw bytes out."""

from __future__ import annotations

import json
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kamal_proxy import Event, Proxy, RunOptions, open_proxy
from kamal_proxy import __version__ as version
from kamal_proxy.control.api import MAX_BODY, REQUEST_TIMEOUT
from kamal_proxy.control.messages import to_json
from kamal_proxy.http.endpoint import MAX_HEAD
from tests.control.calling import (
    Api,
    Caller,
    Document,
    Progress,
    ScriptedServices,
    document,
    error_in,
    events_in,
    open_scripted,
    request,
)
from tests.running import Embedded, Lines, open_embedded
from tests.scripted import ConnectionCut, Held, Upstream, open_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@attrs.frozen
class ProxyApi(Api):
    """The admin API of an embedded proxy."""

    embedded: Embedded


@pytest.fixture
async def api(directory: Path) -> AsyncIterator[ProxyApi]:
    path = directory / "kamal-proxy.sock"
    async with open_embedded(socket_path=path) as embedded:
        yield ProxyApi(path, embedded)


# --- what the resources answer -------------------------------------------------------------------


async def test_version(api: ProxyApi) -> None:
    response = await api.call("GET", "/v1")

    assert response.status == 200
    assert response.get(b"content-type") == [b"application/json"]
    assert json.loads(response.body) == {"version": version, "api": 1}


async def test_a_query_is_ignored(api: ProxyApi) -> None:
    assert (await api.call("GET", "/v1?pretty=1")).status == 200


async def test_list_is_sorted_and_leaves_out_defaults(api: ProxyApi, upstream: Upstream) -> None:
    assert await api.services() == []

    await api.deploy(upstream.options("b", hosts=["b.example"], path_prefixes=["/x"]))
    await api.deploy(upstream.options("a", hosts=["a.example"]))

    a, b = await api.services()
    assert a == {
        "name": "a",
        "hosts": ["a.example"],
        "path_prefixes": ["/"],
        "targets": [upstream.target],
        "healthy": [upstream.target],
    }
    assert (b["name"], b["path_prefixes"]) == ("b", ["/x"])


async def test_deploy_streams_its_events_in_order(api: ProxyApi, upstream: Upstream) -> None:
    held = Held(upstream)
    upstream.script(held)
    options = upstream.options()
    first = await api.deploy(options)
    assert [event["event"] for event in first] == ["probe", "healthy", "switched", "done"]

    async with open_client(api.embedded.port) as client, api.caller() as caller:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_requests(1)
        await caller.send(request("PUT", "/v1/services/web", document(options)))
        await caller.begin_stream()

        probe = await caller.find_event("probe")
        assert probe.pop("elapsed") > 0
        assert probe == {
            "event": "probe",
            "target": upstream.target,
            "ok": True,
            "result": "status 200",
        }
        kept = [await caller.next_event() for _ in range(3)]
        assert [event and event["event"] for event in kept] == ["healthy", "switched", "draining"]
        assert kept[2] is not None
        assert kept[2]["in_flight"] == 1
        (service,) = await api.services()
        assert service["draining"] == 1

        held.release.set()
        assert (await client.receive_response()).body == b"held"
        last = await caller.find_event("done")
        assert last["completed"] == 1
        assert "cancelled" not in last
        assert await caller.next_event() is None
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"


async def test_failed_deploy_ends_the_stream_and_says_why(
    mock_clock: MockClock, api: ProxyApi, upstream: Upstream
) -> None:
    upstream.health = 503
    body = document(upstream.options(deploy_timeout=10))
    async with api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/web", body))
        await caller.begin_stream()
        probe = await caller.find_event("probe")
        mock_clock.jump(10)
        failed = await caller.find_event("failed")

        assert (probe["event"], probe["result"], "ok" in probe) == ("probe", "status 503", False)
        assert failed["code"] == "deploy_failed"
        assert failed["message"] == (
            "target failed to become healthy within configured timeout (10s)"
        )
        (detail,) = failed["details"]
        assert detail.startswith(f"target {upstream.target}: status 503 at http://127.0.0.1:")
        assert await caller.next_event() is None
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"
    assert await api.services() == []


async def test_remove(api: ProxyApi, upstream: Upstream) -> None:
    held = Held(upstream)
    upstream.script(held)
    await api.deploy(upstream.options())
    async with open_client(api.embedded.port) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await upstream.wait_requests(1)

        response = await api.call("DELETE", "/v1/services/web")

        assert (response.status, response.body) == (204, b"")
        assert await api.services() == []
        held.release.set()
        assert (await client.receive_response()).body == b"held"
        assert (await client.get()).status == 404


async def test_a_name_is_percent_encoded(api: ProxyApi, upstream: Upstream) -> None:
    body = document(upstream.options())

    assert (await api.call("PUT", "/v1/services/a%2Db%25", body)).status == 200

    assert [service["name"] for service in await api.services()] == ["a-b%"]
    assert (await api.call("DELETE", "/v1/services/a-b%25")).status == 204


async def test_the_document_may_repeat_the_name(api: ProxyApi, upstream: Upstream) -> None:
    body = to_json(upstream.options("web"))

    assert events_in(await api.call("PUT", "/v1/services/web", body))[-1]["event"] == "done"
    error = error_in(await api.call("PUT", "/v1/services/other", body))
    assert error["message"] == "the document names service 'web', the URL 'other'"


async def test_a_body_may_be_chunked(api: ProxyApi, upstream: Upstream) -> None:
    data = json.dumps(document(upstream.options())).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, data[i : i + 1]) for i in range(len(data)))
    async with api.caller() as caller:
        head = request("PUT", "/v1/services/web", headers="Transfer-Encoding: chunked\r\n")
        response = await caller.request(head + chunks + b"0\r\n\r\n")

    assert events_in(response)[-1]["event"] == "done"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({}, "invalid_options", "missing field targets"),
        ({"targets": []}, "invalid_options", "at least one target is required"),
        ({"targets": "a:1"}, "invalid_options", "targets must be a list"),
        ({"targets": ["a:1", 2]}, "invalid_options", "targets[1] must be a string"),
        ({"targets": [" :1"]}, "invalid_options", " :1 :invalid host pattern"),
        ({"targets": ["a:1"], "target": 1}, "invalid_options", "unknown field target"),
        (
            {"targets": ["aa:1"], "target_options": {"health_check": {"intervall": 1}}},
            "invalid_options",
            "unknown field target_options.health_check.intervall",
        ),
        (
            {"targets": ["aa:1"], "deployment_options": {"deploy_timeout": "30s"}},
            "invalid_options",
            "deployment_options.deploy_timeout must be a number",
        ),
        (
            {"targets": ["aa:1"], "deployment_options": {"force": 1}},
            "invalid_options",
            "deployment_options.force must be true or false",
        ),
        (
            {"targets": ["aa:1"], "deployment_options": []},
            "invalid_options",
            "deployment_options must be a JSON object",
        ),
        (
            {"targets": ["aa:1"], "deployment_options": {"drain_timeout": -1}},
            "invalid_options",
            "drain-timeout must not be negative",
        ),
        (
            {"targets": ["aa:1"], "service_options": {"hosts": ["http://a"]}},
            "invalid_options",
            "host 'http://a' must be a bare host name, without scheme or port",
        ),
        (
            {"targets": ["aa:1"], "service_options": {"tls_enabled": True}},
            "invalid_options",
            "service options invalid: host must be set when using TLS",
        ),
        (
            {"targets": ["aa:1"], "read_targets": ["b"]},
            "invalid_options",
            "b :invalid host pattern",
        ),
        (
            {"targets": ["aa:1"], "target_options": {"path_timeouts": [{"path": "/a"}]}},
            "invalid_options",
            "missing field target_options.path_timeouts[0].timeout",
        ),
    ],
)
async def test_options_that_cannot_be_used(
    api: ProxyApi, body: Document, code: str, message: str
) -> None:
    response = await api.call("PUT", "/v1/services/web", body)

    assert response.status == 422
    assert error_in(response) == {"code": code, "message": message, "details": []}
    assert await api.services() == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"targets": ["aa:1"], "service_options": {"path_prefixes": ["/\\ud800"]}}',
        b'{"targets": ["aa:1"], "service_options": {"path_prefixes": ["/\\udcff"]}}',
        b'{"targets": ["aa:1"], "target_options": {"health_check": {"path": "/\\udcff"}}}',
        b'{"targets": ["aa:1"], "target_options": {"health_check": {"host": "\\udcff"}}}',
        b'{"targets": ["aa:1"], "deployment_options": {"drain_timeout": 1%b}}' % (b"0" * 400),
        b'{"targets": ["aa:1"], "target_options": {"health_check": {"interval": 1%b}}}'
        % (b"0" * 400),
    ],
    ids=["prefix", "prefix-byte", "probe-path", "probe-host", "duration", "interval"],
)
async def test_values_that_no_peer_can_be_sent(api: ProxyApi, body: bytes) -> None:
    """Half a character of UTF-16, a byte that was not UTF-8, a number over all bounds."""
    response = await api.call("PUT", "/v1/services/web", body)

    assert response.status == 422
    assert error_in(response)["code"] == "invalid_options"
    assert (await api.call("GET", "/v1")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/", None, 404, "bad_request"),
        ("GET", "/v2", None, 404, "bad_request"),
        ("GET", "/v1/", None, 404, "bad_request"),
        ("PUT", "/v1/services/", b"{}", 404, "bad_request"),
        ("PUT", "/v1/services/web/", b"{}", 404, "bad_request"),
        ("GET", "/v1services", None, 404, "bad_request"),
        ("GET", "//v1", None, 404, "bad_request"),
        ("DELETE", "/v1/services/web", None, 404, "service_not_found"),
        ("DELETE", "/v1/services/a%2Fb", None, 404, "service_not_found"),
        ("PUT", "/v1/services/a%2Fb", {"targets": ["aa:1"]}, 422, "invalid_options"),
        ("PUT", "/v1/services/%FF", {"targets": ["aa:1"]}, 422, "invalid_options"),
        ("POST", "/v1", b"{}", 405, "bad_request"),
        ("POST", "/v1/services", b"{}", 405, "bad_request"),
        ("GET", "/v1/services/web", None, 405, "bad_request"),
        ("PUT", "/v1/services/web", None, 400, "bad_request"),
        ("PUT", "/v1/services/web", b"{", 400, "bad_request"),
        ("PUT", "/v1/services/web", b"\xff\xfe", 400, "bad_request"),
        ("PUT", "/v1/services/web", b"[]", 400, "bad_request"),
        ("PUT", "/v1/services/web", b'{"targets": ["aa:1"], "x": NaN}', 400, "bad_request"),
        ("PUT", "/v1/services/web", b'{"x": -Infinity}', 400, "bad_request"),
        ("PUT", "/v1/services/web", b'{"x": ' + b"[" * 100_000, 400, "bad_request"),
        ("PUT", "/v1/services/web", b'{"x":' * 100_000, 400, "bad_request"),
    ],
)
async def test_calls_that_make_no_sense(
    api: ProxyApi, method: str, path: str, body: object, status: int, code: str
) -> None:
    async with api.caller() as caller:
        response = await caller.call(method, path, body)

        assert (response.status, error_in(response)["code"]) == (status, code)
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"


async def test_no_method_of_a_resource_is_also_told_to_head(api: ProxyApi) -> None:
    async with api.caller() as caller:
        response = await caller.call("HEAD", "/v1")

        assert (response.status, response.body) == (405, b"")
        assert response.get(b"allow") == [b"GET"]
        assert (await caller.call("GET", "/v1")).status == 200


@pytest.mark.parametrize("sent", [b"", b" " * (MAX_BODY + 1)], ids=["announced", "sent"])
async def test_too_large_a_body(api: ProxyApi, sent: bytes) -> None:
    async with api.caller() as caller, trio.open_nursery() as nursery:
        head = request("PUT", "/v1/services/web", headers=f"Content-Length: {MAX_BODY + 1}\r\n")

        async def send() -> None:
            try:
                await caller.send(head + sent)
            except OSError:
                return  # it need not be read to its end

        nursery.start_soon(send)
        response = await caller.receive_response(b"PUT")

    assert (response.status, error_in(response)["code"]) == (413, "bad_request")
    assert response.get(b"connection") == [b"close"]


async def test_host_conflict(api: ProxyApi, upstream: Upstream) -> None:
    await api.deploy(upstream.options("web", hosts=["a.example"]))
    body = document(upstream.options("other", hosts=["b.example", "A.Example"]))

    response = await api.call("PUT", "/v1/services/other", body)

    assert response.status == 409
    assert error_in(response) == {
        "code": "host_conflict",
        "message": "host settings conflict with another service",
        "details": ["service web already serves a.example with path prefix /"],
    }
    assert [service["name"] for service in await api.services()] == ["web"]


async def test_a_state_that_cannot_be_saved_changes_nothing(
    directory: Path, upstream: Upstream
) -> None:
    path, data = directory / "s", directory / "data"
    async with open_embedded(socket_path=path, data_directory=data) as embedded:
        api = ProxyApi(path, embedded)
        await api.deploy(upstream.options())
        (data / "kamal-proxy.state.previous").mkdir()

        removed = await api.call("DELETE", "/v1/services/web")
        redeployed = await api.deploy(upstream.options(path_prefixes=["/x"]))

        assert (removed.status, error_in(removed)["code"]) == (500, "state")
        assert (redeployed[-1]["event"], redeployed[-1]["code"]) == ("failed", "state")
        assert str(data) in redeployed[-1]["message"]
        assert [service["path_prefixes"] for service in await api.services()] == [["/"]]
        (data / "kamal-proxy.state.previous").rmdir()
        assert (await api.call("DELETE", "/v1/services/web")).status == 204


# --- clients that come and go --------------------------------------------------------------------


async def test_a_client_that_leaves_at_once_does_not_cancel_its_deploy(
    api: ProxyApi, upstream: Upstream
) -> None:
    async with api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/web", document(upstream.options())))

    await api.embedded.lines.wait_for_message("Deployed")
    assert [service["name"] for service in await api.services()] == ["web"]


async def test_a_client_that_leaves_in_the_middle_does_not_cancel_its_deploy(
    api: ProxyApi, upstream: Upstream
) -> None:
    upstream.health = 503
    body = document(upstream.options(interval=0.01))
    async with api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/web", body))
        await caller.begin_stream()
        await caller.find_event("probe")
    upstream.health = 200

    await api.embedded.lines.wait_for_message("Deployed")
    assert [service["name"] for service in await api.services()] == ["web"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_deploys_nothing(
    api: ProxyApi, upstream: Upstream
) -> None:
    call = request("PUT", "/v1/services/web", document(upstream.options()))
    async with api.caller() as caller:
        await caller.send(call[:-1])

    await api.embedded.wait_streams(0)
    assert await api.services() == []
    assert not [line for line in api.embedded.lines.all if line["level"] == "ERROR"]


async def test_calls_on_one_connection(api: ProxyApi, upstream: Upstream) -> None:
    body = document(upstream.options())
    async with api.caller() as caller:
        await caller.send(
            request("GET", "/v1")
            + request("PUT", "/v1/services/web", body)
            + request("GET", "/v1/services/web")
            + request("DELETE", "/v1/services/web")
            + request("GET", "/v1/services", headers="Connection: close\r\n")
        )
        answers = [
            await caller.receive_response(method)
            for method in (b"GET", b"PUT", b"GET", b"DELETE", b"GET")
        ]
        await caller.wait_closed()

    assert [answer.status for answer in answers] == [200, 200, 405, 204, 200]
    assert json.loads(answers[-1].body) == {"services": []}


async def test_a_deploy_that_takes_long_holds_up_nobody(api: ProxyApi, upstream: Upstream) -> None:
    waiting = document(upstream.options("waiting", hosts=["w.example"], interval=0.01))
    upstream.health = 503
    async with api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/waiting", waiting))
        await caller.begin_stream()
        await caller.find_event("probe")

        forced = await api.deploy(upstream.options("forced", force=True))
        assert forced[-1]["event"] == "done"
        assert [service["name"] for service in await api.services()] == ["forced"]
        assert (await api.call("DELETE", "/v1/services/forced")).status == 204

        upstream.health = 200
        await caller.find_event("done")
    assert [service["name"] for service in await api.services()] == ["waiting"]


async def test_fifty_lists_at_once(api: ProxyApi, upstream: Upstream) -> None:
    await api.deploy(upstream.options())
    seen: list[list[Document]] = []

    async def list_services() -> None:
        seen.append(await api.services())

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(list_services)

    assert [[service["name"] for service in services] for services in seen] == [["web"]] * 50


async def test_twenty_deploys_at_once(api: ProxyApi, upstream: Upstream) -> None:
    ends: list[Document] = []

    async def deploy(host: str) -> None:
        ends.append((await api.deploy(upstream.options(f"of-{host}", hosts=[host])))[-1])

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(deploy, f"h{number % 10}")

    assert [end["event"] for end in ends] == ["done"] * 20
    assert len(await api.services()) == 10


# --- bad clients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00\xff\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /v1 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1 HTTP/1.1\nHost: localhost\n\n", 400),
        (request("PUT", "/v1/services/a", headers="Content-Length: 1\r\n" * 2) + b"{", 400),
        (
            request("PUT", "/v1/services/a", headers="Transfer-Encoding: chunked\r\n") + b"z\r\n",
            400,
        ),
        (request("GET", "/v1", headers="X: " + "x" * MAX_HEAD), 431),
        (b"x" * (MAX_HEAD + 1), 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
async def test_what_is_not_http(api: ProxyApi, sent: bytes, status: int) -> None:
    async with api.caller() as caller:
        await caller.send(sent)
        response = await caller.receive_response()
        await caller.wait_closed()

    assert response.status == status
    assert (await api.call("GET", "/v1")).status == 200
    assert not [line for line in api.embedded.lines.all if line["level"] == "ERROR"]


@asynccontextmanager
async def open_patient(path: Path) -> AsyncIterator[tuple[Proxy, Api]]:
    """Run a proxy for a test whose own time goes by faster than any limit on tests."""
    options = RunOptions(http_port=0, bind="127.0.0.1", socket_path=path)
    async with open_proxy(options, log=lambda line: None) as proxy:
        yield proxy, Api(path)


async def drip(caller: Caller, data: bytes, until: float) -> None:
    """Send ``data`` again and again, each time before the patience for one read can end."""
    while trio.current_time() < until:
        await trio.sleep(REQUEST_TIMEOUT / 4)
        await caller.send(data)


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /v1 HTTP/1.1\r\nX: ",
        request("PUT", "/v1/services/a", headers="Content-Length: 99\r\n"),
    ],
    ids=["head", "body"],
)
async def test_a_request_must_arrive_in_time(
    autojump_clock: MockClock, directory: Path, begin: bytes
) -> None:
    async with open_patient(directory / "s") as (_, api), api.caller() as caller:
        await caller.send(begin)
        began = trio.current_time()
        with pytest.raises(ConnectionError):
            await drip(caller, b" ", began + 10 * REQUEST_TIMEOUT)

        assert trio.current_time() <= began + 1.5 * REQUEST_TIMEOUT
        assert (await api.call("GET", "/v1")).status == 200


async def test_an_idle_connection_is_kept_until_the_proxy_stops(
    autojump_clock: MockClock, directory: Path
) -> None:
    async with open_patient(directory / "s") as (proxy, api), api.caller() as caller:
        assert (await caller.call("GET", "/v1")).status == 200
        await trio.sleep(100 * REQUEST_TIMEOUT)
        assert (await caller.call("GET", "/v1")).status == 200

        proxy.stop()
        await caller.wait_closed()


# --- the socket, and the end ---------------------------------------------------------------------


async def test_only_the_owner_may_connect(directory: Path) -> None:
    path = directory / "s"
    async with open_embedded(socket_path=path):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600

    assert not path.exists()


async def test_a_deploy_fails_when_the_proxy_stops(api: ProxyApi, upstream: Upstream) -> None:
    upstream.health = 503
    body = document(upstream.options(interval=0.01))
    async with api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/web", body))
        await caller.begin_stream()
        await caller.find_event("probe")

        api.embedded.proxy.stop()

        failed = await caller.find_event("failed")
        assert failed["code"] == "shutting_down"
        assert await caller.next_event() is None
        await caller.wait_closed()


# --- the server alone, before services that do as they are told ----------------------------------


async def test_a_client_that_does_not_read_holds_up_nothing_and_still_learns_the_end(
    directory: Path,
) -> None:
    probes = 20_000

    async def play(progress: Progress) -> None:
        for number in range(probes):
            progress(Event(event="probe", elapsed=float(number), result="x" * 200))
        progress(Event(event="done", completed=7))

    services = ScriptedServices(play)
    async with open_scripted(directory / "s", services, Lines()) as api, api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/web", {"targets": ["aa:1"]}))
        await services.wait_ended(1)
        await wait_all_tasks_blocked()
        await caller.begin_stream()
        events = []
        while (event := await caller.next_event()) is not None:
            events.append(event)
        last = events.pop()

        numbers = [event.get("elapsed", 0.0) for event in events]
        assert numbers == sorted(numbers)
        assert 0 < len(numbers) < probes, "what is over the limit is missed"
        assert last == {"event": "done", "completed": 7}
        assert (await caller.call("GET", "/v1")).status == 200


async def test_a_client_that_never_reads_is_given_up(
    autojump_clock: MockClock, directory: Path
) -> None:
    async def play(progress: Progress) -> None:
        for _ in range(900):
            progress(Event(event="probe", result="x" * 10_000))
        progress(Event(event="done"))

    services = ScriptedServices(play)
    async with open_scripted(directory / "s", services, Lines()) as api, api.caller() as caller:
        await caller.send(request("PUT", "/v1/services/web", {"targets": ["aa:1"]}))
        await trio.sleep(2 * REQUEST_TIMEOUT)

        with pytest.raises(ConnectionCut):
            await caller.receive_response(b"PUT")


async def test_a_bug_in_a_deploy_costs_one_call(directory: Path) -> None:
    async def play(progress: Progress) -> None:
        progress(Event(event="probe", result="status 200", ok=True))
        raise LookupError("a bug")

    lines = Lines()
    async with open_scripted(directory / "s", ScriptedServices(play), lines) as api:
        response = await api.call("PUT", "/v1/services/web", {"targets": ["aa:1"]})

        assert events_in(response)[-1]["event"] == "failed"
        assert (await api.call("GET", "/v1")).status == 200
    assert [line for line in lines.all if "a bug" in str(line)], "it is logged"
