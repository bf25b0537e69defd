"""pause, stop, resume and rollout over the admin API, before services that do as they are told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.control.messages import Event
from kamal_proxy.errors import (
    DeployFailedError,
    ErrorPagesError,
    HostConflictError,
    KamalProxyError,
    ListenError,
    PortConflictError,
    ResumedError,
    RolloutNotSetError,
    ServiceNotFoundError,
    StateError,
)
from kamal_proxy.options import (
    DeploymentOptions,
    DeployOptions,
    PauseOptions,
    RolloutOptions,
    RolloutSplit,
    StopOptions,
)
from kamal_proxy.udp.options import (
    SessionOptions,
    UdpDeploymentOptions,
    UdpDeployOptions,
    UdpHealthCheckOptions,
    UdpOptions,
)
from tests.control.calling import (
    Progress,
    ScriptedApi,
    ScriptedServices,
    error_in,
    events_in,
    open_scripted,
    request,
)
from tests.running import Lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ROLLOUT = {"targets": ["t1:80"]}
LONG: list[tuple[str, str, object]] = [
    ("PUT", "/v1/services/web", ROLLOUT),
    ("POST", "/v1/services/web/pause", {}),
    ("POST", "/v1/services/web/stop", {}),
    ("PUT", "/v1/services/web/rollout", ROLLOUT),
    ("PUT", "/v1/udp-services/web", ROLLOUT),
]
SHORT: list[tuple[str, str, object]] = [
    ("DELETE", "/v1/services/web", None),
    ("POST", "/v1/services/web/resume", None),
    ("PUT", "/v1/services/web/rollout/split", {"percentage": 5}),
    ("DELETE", "/v1/services/web/rollout/split", None),
]


@pytest.fixture
def services() -> ScriptedServices:
    return ScriptedServices()


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
async def api(
    directory: Path, services: ScriptedServices, lines: Lines
) -> AsyncIterator[ScriptedApi]:
    async with open_scripted(directory / "s", services, lines) as api:
        yield api


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "call"),
    [
        ("PUT", "web", ROLLOUT, ("deploy", DeployOptions(service="web", targets=("t1:80",)))),
        ("POST", "web/pause", {}, ("pause", "web", PauseOptions())),
        ("POST", "a%2Fb%20/pause", {"drain_timeout": 0, "max_pause": 1.5},
         ("pause", "a/b ", PauseOptions(drain_timeout=0.0, max_pause=1.5))),
        ("POST", "pause/pause", {}, ("pause", "pause", PauseOptions())),
        ("POST", "web/stop?x", {"message": "Back at 5 <é>"},
         ("stop_service", "web", StopOptions(message="Back at 5 <é>"))),
        ("PUT", "web/rollout", ROLLOUT,
         ("deploy_rollout", "web", RolloutOptions(targets=("t1:80",)))),
        ("PUT", "web/rollout",
         {"targets": ["t1:80"], "read_targets": ["r1"], "deployment_options": {"force": True}},
         ("deploy_rollout", "web",
          RolloutOptions(targets=("t1:80",), read_targets=("r1",),
                         deployment_options=DeploymentOptions(force=True)))),
    ],
)  # fmt: skip
async def test_what_takes_long(
    api: ScriptedApi,
    services: ScriptedServices,
    method: str,
    path: str,
    body: object,
    call: tuple[object, ...],
) -> None:
    async def play(progress: Progress) -> None:
        progress(Event(event="draining", in_flight=2))
        progress(Event(event="done", elapsed=0.5, completed=1, cancelled=1))

    services.play = play
    response = await api.call(method, f"/v1/services/{path}", body)

    assert response.get(b"content-type") == [b"application/x-ndjson"]
    assert events_in(response) == [
        {"event": "draining", "in_flight": 2},
        {"event": "done", "elapsed": 0.5, "completed": 1, "cancelled": 1},
    ]
    assert services.begun == [call]


UDP_DOCUMENT = {
    "targets": ["game-1:9999", "[::1]:1"],
    "udp_options": {
        "port": 9999,
        "sessions": {"affinity": False, "strategy": "source-ip", "timeout": 5, "limit": 3},
        "health_check": {"method": "http", "path": "/health", "port": 7000},
    },
    "deployment_options": {
        "zero_downtime": True, "drain_strategy": "timeout", "drain_timeout": 1,
        "force_kill_timeout": 2.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("path", ["game", "game?x", "%67ame"])
@pytest.mark.parametrize("named", [{}, {"service": "game"}], ids=["in the path", "in both"])
async def test_deploys_of_udp_services(
    api: ScriptedApi, services: ScriptedServices, path: str, named: dict[str, str]
) -> None:
    async def play(progress: Progress) -> None:
        progress(Event(event="switched"))
        progress(Event(event="draining", in_flight=2))
        progress(Event(event="done", elapsed=0.5, completed=12, cancelled=3))

    services.play = play
    response = await api.call("PUT", f"/v1/udp-services/{path}", {**UDP_DOCUMENT, **named})

    assert events_in(response) == [
        {"event": "switched"},
        {"event": "draining", "in_flight": 2},
        {"event": "done", "elapsed": 0.5, "completed": 12, "cancelled": 3},
    ]
    options = UdpDeployOptions(
        service="game",
        targets=("game-1:9999", "[::1]:1"),
        udp_options=UdpOptions(
            port=9999,
            sessions=SessionOptions(affinity=False, strategy="source-ip", timeout=5.0, limit=3),
            health_check=UdpHealthCheckOptions(method="http", path="/health", port=7000),
        ),
        deployment_options=UdpDeploymentOptions(
            zero_downtime=True, drain_strategy="timeout", drain_timeout=1.0, force_kill_timeout=2.5
        ),
    )
    assert services.begun == [("deploy_udp", options)]


@pytest.mark.parametrize(
    ("method", "path", "body", "call"),
    [
        ("DELETE", "web", None, ("remove", "web")),
        ("POST", "web/resume", None, ("resume", "web")),
        ("POST", "%C3%A9%2F/resume", None, ("resume", "é/")),
        ("PUT", "web/rollout/split", {}, ("set_rollout", "web", RolloutSplit())),
        ("PUT", "web/rollout/split", {"percentage": 100, "allowlist": ["a", ""]},
         ("set_rollout", "web", RolloutSplit(percentage=100, allowlist=("a", "")))),
        ("DELETE", "web/rollout/split", None, ("stop_rollout", "web")),
    ],
)  # fmt: skip
async def test_what_is_short(
    api: ScriptedApi,
    services: ScriptedServices,
    method: str,
    path: str,
    body: object,
    call: tuple[object, ...],
) -> None:
    response = await api.call(method, f"/v1/services/{path}", body)

    assert (response.status, response.body) == (204, b"")
    assert services.begun == [call]


async def test_all_calls_share_one_connection(api: ScriptedApi, services: ScriptedServices) -> None:
    async with api.caller() as caller:
        await caller.send(b"".join(request(*call) for call in LONG + SHORT))
        answers = [await caller.receive_response(call[0].encode()) for call in LONG + SHORT]

    assert [answer.status for answer in answers] == [200] * 5 + [204] * 4
    assert len(services.ended) == 9


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "web/pause", None, 400, "the body is not JSON: Expecting value"),
        ("POST", "web/pause", b"{", 400, "the body is not JSON: Expecting"),
        ("POST", "web/stop", b"[]", 400, "the body must be a JSON object"),
        ("PUT", "web/rollout", b"\xff", 400, "the body is not JSON: "),
        ("PUT", "web/rollout/split", b'{"percentage": NaN}', 400, "the body is not JSON: NaN"),
        ("POST", "web/pause", {"message": "x"}, 422, "unknown field message"),
        ("POST", "web/pause", {"max_pause": "30s"}, 422, "max_pause must be a number"),
        ("POST", "web/pause", {"max_pause": -1}, 422, "max-pause must not be negative"),
        ("POST", "web/pause", {"drain_timeout": None}, 422, "drain_timeout must be a number"),
        ("POST", "web/stop", {"drain_timeout": -0.1}, 422, "drain-timeout must not be negative"),
        ("POST", "web/stop", b'{"message": "\\ud800"}', 422, "message must be Unicode text"),
        ("POST", "web/stop", {"message": ["x"]}, 422, "message must be a string"),
        ("PUT", "web/rollout", {}, 422, "missing field targets"),
        ("PUT", "web/rollout", {"targets": []}, 422, "at least one target is required"),
        ("PUT", "web/rollout", {"targets": ["t1", "x"]}, 422, "x :invalid host pattern"),
        ("PUT", "web/rollout", {"targets": ["t1"], "service_options": {}}, 422,
         "unknown field service_options"),
        ("PUT", "web/rollout", {"targets": ["t1"], "deployment_options": {"deploy_timeout": -1}},
         422, "deploy-timeout must not be negative"),
        ("PUT", "web/rollout/split", {"percentage": 101}, 422, "percent 101 must be from 0 to 100"),
        ("PUT", "web/rollout/split", {"percentage": 5.5}, 422, "percentage must be a whole number"),
        ("PUT", "web/rollout/split", {"percent": 5}, 422, "unknown field percent"),
        ("PUT", "web/rollout/split", {"allowlist": "a"}, 422, "allowlist must be a list"),
        ("GET", "web/pause", None, 405, "GET is not possible here; use POST"),
        ("PUT", "web/pause", b"{}", 405, "PUT is not possible here; use POST"),
        ("DELETE", "web/stop", None, 405, "DELETE is not possible here; use POST"),
        ("DELETE", "web/pause", None, 405, "DELETE is not possible here; use POST"),
        ("GET", "web/resume", None, 405, "GET is not possible here; use POST"),
        ("POST", "web/rollout", b"{}", 405, "POST is not possible here; use PUT"),
        ("DELETE", "web/rollout", None, 405, "DELETE is not possible here; use PUT"),
        ("POST", "web/rollout/split", b"{}", 405,
         "POST is not possible here; use PUT or DELETE"),
        ("POST", "/pause", b"{}", 404, "no such resource: /v1/services//pause"),
        ("POST", "web/pause/", b"{}", 404, "no such resource: /v1/services/web/pause/"),
        ("POST", "web/pause/now", b"{}", 404, "no such resource: "),
        ("POST", "web/PAUSE", b"{}", 404, "no such resource: "),
        ("POST", "web%2Fpause", b"{}", 405, "POST is not possible here; use PUT or DELETE"),
        ("PUT", "web/split", b"{}", 404, "no such resource: "),
        ("PUT", "web/rollout/split/x", b"{}", 404, "no such resource: "),
        ("DELETE", "web/x", None, 404, "no such resource: /v1/services/web/x"),
    ],
)  # fmt: skip
async def test_calls_that_make_no_sense(
    api: ScriptedApi,
    services: ScriptedServices,
    method: str,
    path: str,
    body: object,
    status: int,
    message: str,
) -> None:
    async with api.caller() as caller:
        response = await caller.call(method, f"/v1/services/{path}", body)

        assert response.status == status
        assert error_in(response)["message"].startswith(message)
        assert error_in(response)["code"] == ("invalid_options" if status == 422 else "bad_request")
        assert bool(response.get(b"allow")) == (status == 405)
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"
    assert services.begun == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "message"),
    [
        ("PUT", "/game", None, 400, "bad_request",
         "the body is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("PUT", "/game", {}, 422, "invalid_options", "missing field targets"),
        ("PUT", "/game", {"targets": []}, 422, "invalid_options",
         "at least one target is required"),
        ("PUT", "/game", {"targets": ["game-1"]}, 422, "invalid_options",
         "target game-1 must have a port, such as game-1:9999"),
        ("PUT", "/game", {"targets": ["g:1"], "service": "other"}, 422, "invalid_options",
         "the document names service 'other', the URL 'game'"),
        ("PUT", "/a%2Fb", {"targets": ["g:1"]}, 422, "invalid_options",
         "service name 'a/b' must be 1 to 255 printable ASCII characters without spaces or "
         "slashes"),
        ("PUT", "/game", {"targets": ["g:1"], "service_options": {}}, 422, "invalid_options",
         "unknown field service_options"),
        ("PUT", "/game", {"targets": ["g:1"], "udp_options": {"ports": 1}}, 422,
         "invalid_options", "unknown field udp_options.ports"),
        ("PUT", "/game", {"targets": ["g:1"], "udp_options": {"port": "9999"}}, 422,
         "invalid_options", "udp_options.port must be a whole number"),
        ("PUT", "/game", {"targets": ["g:1"], "udp_options": {"port": 65536}}, 422,
         "invalid_options", "port 65536 must be from 0 to 65535"),
        ("PUT", "/game", {"targets": ["g:1"], "udp_options": {"sessions": {"limit": 0}}}, 422,
         "invalid_options", "max-sessions 0 must be from 1 to 1000000"),
        ("PUT", "/game",
         {"targets": ["g:1"], "udp_options": {"sessions": {"strategy": "sticky"}}}, 422,
         "invalid_options",
         "affinity-strategy 'sticky' must be one of 5-tuple, source-ip, source-port"),
        ("PUT", "/game", {"targets": ["g:1"], "deployment_options": {"drain_timeout": 300}}, 422,
         "invalid_options", "force-kill-timeout 2m0s must not be less than drain-timeout 5m0s"),
        ("PUT", "/game", {"targets": ["g:1"], "udp_options": {"protocol": "webrtc"}}, 422,
         "invalid_options",
         "protocol webrtc must have port-ranges, such as 10000-20000, or a port"),
        ("GET", "/game", None, 405, "bad_request", "GET is not possible here; use PUT"),
        ("DELETE", "/game", None, 405, "bad_request", "DELETE is not possible here; use PUT"),
        ("GET", "", None, 404, "bad_request",
         "no such resource: /v1/udp-services (the API begins at /v1)"),
        ("PUT", "/", {"targets": ["g:1"]}, 404, "bad_request",
         "no such resource: /v1/udp-services/ (the API begins at /v1)"),
        ("POST", "/game/pause", {}, 404, "bad_request",
         "no such resource: /v1/udp-services/game/pause (the API begins at /v1)"),
    ],
)  # fmt: skip
async def test_deploys_of_udp_services_that_make_no_sense(
    api: ScriptedApi,
    services: ScriptedServices,
    method: str,
    path: str,
    body: object,
    status: int,
    code: str,
    message: str,
) -> None:
    async with api.caller() as caller:
        response = await caller.call(method, f"/v1/udp-services{path}", body)

        assert response.status == status
        assert error_in(response) == {"code": code, "message": message, "details": []}
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"
    assert services.begun == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ServiceNotFoundError("service not found"), 404),
        (RolloutNotSetError("rollout target not set"), 409),
        (ResumedError("resumed meanwhile"), 409),
        (HostConflictError("another service has it"), 409),
        (PortConflictError("port 9999 is used by another service"), 409),
        (ErrorPagesError("unable to load error pages", ["why"]), 422),
        (StateError("can't write"), 500),
        (ListenError("listen udp :53: bind: permission denied"), 500),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
@pytest.mark.parametrize("call", LONG + SHORT, ids=lambda call: f"{call[0]} {call[1]}")
async def test_errors_before_anything_happened(
    api: ScriptedApi,
    services: ScriptedServices,
    call: tuple[str, str, object],
    error: KamalProxyError,
    status: int,
) -> None:
    async def fail(_: Progress | None = None) -> None:
        raise error

    services.play = services.order = fail
    async with api.caller() as caller:
        response = await caller.call(*call)

        assert response.status == status
        assert error_in(response) == {
            "code": error.code, "message": error.message, "details": list(error.details)
        }  # fmt: skip
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"


@pytest.mark.parametrize("call", LONG, ids=lambda call: f"{call[0]} {call[1]}")
@pytest.mark.parametrize(
    "error", [ResumedError("resumed meanwhile"), DeployFailedError("not healthy", ["t1: 500"])]
)
async def test_errors_in_the_middle_end_the_stream(
    api: ScriptedApi,
    services: ScriptedServices,
    call: tuple[str, str, object],
    error: KamalProxyError,
) -> None:
    async def play(progress: Progress) -> None:
        progress(Event(event="draining", in_flight=1))
        raise error

    services.play = play
    draining, failed = events_in(await api.call(*call))

    assert draining == {"event": "draining", "in_flight": 1}
    assert (failed["event"], failed["code"], failed["message"]) == (
        "failed", error.code, error.message
    )  # fmt: skip
    assert tuple(failed.get("details", ())) == error.details


# --- bugs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "what"),
    [*zip(LONG, ("Deploy", "Pause", "Stop", "Rollout deploy", "UDP deploy"), strict=True)],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bug_costs_one_operation(
    api: ScriptedApi,
    services: ScriptedServices,
    lines: Lines,
    call: tuple[str, str, object],
    what: str,
) -> None:
    async def play(_: Progress) -> None:
        raise LookupError("a bug")

    services.play = play
    (failed,) = events_in(await api.call(*call))

    assert (failed["event"], failed["code"]) == ("failed", "error")
    (line,) = lines.all
    assert (line["msg"], line["service"], line["error"]) == (
        f"{what} failed", "web", "LookupError('a bug')"
    )  # fmt: skip
    assert (await api.call("GET", "/v1")).status == 200


@pytest.mark.parametrize("call", SHORT, ids=lambda call: f"{call[0]} {call[1]}")
async def test_a_bug_costs_one_connection(
    api: ScriptedApi, services: ScriptedServices, lines: Lines, call: tuple[str, str, object]
) -> None:
    async def fail() -> None:
        raise LookupError("a bug")

    services.order = fail
    async with api.caller() as caller:
        await caller.send(request(*call))
        await caller.wait_closed()

    assert [line["msg"] for line in lines.all] == ["Admin API call failed"]
    assert (await api.call("GET", "/v1")).status == 200


# --- clients that come and go, and the end -------------------------------------------------------


@pytest.mark.parametrize("call", LONG, ids=lambda call: f"{call[0]} {call[1]}")
@pytest.mark.parametrize("reads", [False, True], ids=["at once", "in the middle"])
async def test_a_client_that_leaves_cancels_nothing(
    api: ScriptedApi,
    services: ScriptedServices,
    lines: Lines,
    call: tuple[str, str, object],
    reads: bool,
) -> None:
    left = trio.Event()

    async def play(progress: Progress) -> None:
        progress(Event(event="draining", in_flight=1))
        await left.wait()
        for _ in range(100):
            progress(Event(event="draining", in_flight=1))
            await trio.lowlevel.checkpoint()
        progress(Event(event="done"))

    services.play = play
    async with api.caller() as caller:
        await caller.send(request(*call))
        if reads:
            await caller.begin_stream()
            assert await caller.next_event() == {"event": "draining", "in_flight": 1}
        else:
            await services.wait_begun(1)
    left.set()

    await services.wait_ended(1)
    assert lines.all == []
    assert (await api.call("GET", "/v1")).status == 200


@pytest.mark.parametrize("call", SHORT, ids=lambda call: f"{call[0]} {call[1]}")
async def test_what_is_short_is_finished_for_a_client_that_left(
    api: ScriptedApi, services: ScriptedServices, lines: Lines, call: tuple[str, str, object]
) -> None:
    left = trio.Event()
    services.order = left.wait
    async with api.caller() as caller:
        await caller.send(request(*call))
        await services.wait_begun(1)
    await wait_all_tasks_blocked()
    assert services.ended == []
    left.set()

    await services.wait_ended(1)
    assert lines.all == []


@pytest.mark.parametrize("call", LONG + SHORT, ids=lambda call: f"{call[0]} {call[1]}")
async def test_a_client_that_leaves_in_the_middle_of_its_call_asks_for_nothing(
    api: ScriptedApi, services: ScriptedServices, call: tuple[str, str, object]
) -> None:
    async with api.caller() as caller:
        await caller.send(request(*call)[:-1])
    await wait_all_tasks_blocked()

    assert services.begun == []


@pytest.mark.parametrize("call", LONG, ids=lambda call: f"{call[0]} {call[1]}")
@pytest.mark.parametrize("begun", [False, True], ids=["before the stream", "in the stream"])
async def test_operations_fail_when_the_proxy_stops(
    api: ScriptedApi, services: ScriptedServices, call: tuple[str, str, object], begun: bool
) -> None:
    async def play(progress: Progress) -> None:
        if begun:
            progress(Event(event="draining", in_flight=1))
        await trio.sleep_forever()

    services.play = play
    async with api.caller() as caller:
        await caller.send(request(*call))
        await services.wait_begun(1)
        if begun:
            await caller.begin_stream()
            await caller.next_event()
        api.operations.cancel_scope.cancel()

        if begun:
            failed = await caller.find_event("failed")
            assert await caller.next_event() is None
        else:
            response = await caller.receive_response(call[0].encode())
            assert response.status == 503
            failed = error_in(response)
    assert (failed["code"], failed["message"]) == ("shutting_down", "the proxy is shutting down")
    assert services.ended == []


async def test_a_drain_that_takes_long_holds_up_nobody(
    api: ScriptedApi, services: ScriptedServices
) -> None:
    resumed = trio.Event()

    async def play(progress: Progress) -> None:
        progress(Event(event="draining", in_flight=1))
        await resumed.wait()
        raise ResumedError("resumed meanwhile")

    async def order() -> None:
        resumed.set()

    services.play, services.order = play, order
    async with api.caller() as caller:
        await caller.send(request("POST", "/v1/services/web/pause", {}))
        await caller.begin_stream()
        assert json.loads((await api.call("GET", "/v1/services")).body) == {"services": []}
        assert (await api.call("POST", "/v1/services/web/resume")).status == 204
        failed = await caller.find_event("failed")

    assert failed["code"] == "resumed"
