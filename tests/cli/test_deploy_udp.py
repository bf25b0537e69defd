"""What each flag of deploy-udp becomes, which values it refuses, and what it prints at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy.cli.commands import find_command
from kamal_proxy.control.messages import from_json
from kamal_proxy.udp.options import (
    SessionOptions,
    UdpDeploymentOptions,
    UdpDeployOptions,
    UdpHealthCheckOptions,
    UdpOptions,
)

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedProxy, Terminal

Command = Callable[..., tuple[int, str, str]]
DONE = {"event": "done", "elapsed": 1.0}
SWITCHED = {"event": "switched", "elapsed": 0.5}
PREFIX = "/v1/udp-services/"


def sent(proxy: ScriptedProxy) -> UdpDeployOptions:
    """Return what the last deploy asked for, as the server would understand it."""
    method, path, body = proxy.requests[-1]
    assert method == "PUT"
    assert path.startswith(PREFIX)
    return from_json(UdpDeployOptions, {**body, "service": path.removeprefix(PREFIX)})


def expected(
    *,
    udp: dict[str, Any] | None = None,
    sessions: dict[str, Any] | None = None,
    health: dict[str, Any] | None = None,
    deployment: dict[str, Any] | None = None,
    **rest: Any,
) -> UdpDeployOptions:
    return UdpDeployOptions(
        **{"service": "game", "targets": ("game-1:9999",), **rest},
        udp_options=UdpOptions(
            sessions=SessionOptions(**(sessions or {})),
            health_check=UdpHealthCheckOptions(**(health or {})),
            **(udp or {}),
        ),
        deployment_options=UdpDeploymentOptions(**(deployment or {})),
    )


FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--target=[::1]:1,b:2", "--target", "c:3"],
     {"targets": ("game-1:9999", "[::1]:1", "b:2", "c:3")}),
    (["--port=9999"], {"udp": {"port": 9999}}),
    (["--port", "0x270F"], {"udp": {"port": 9999}}),
    (["--port=0"], {}),
    (["--protocol=udp", "--rtcp-policy=auto", "--port-ranges="], {}),
    (["--protocol=webrtc", "--port=7882"], {"udp": {"protocol": "webrtc", "port": 7882}}),
    (["--protocol=webrtc", "--port-ranges=50000-60000"],
     {"udp": {"protocol": "webrtc", "port_ranges": ("50000-60000",)}}),
    (["--protocol", "webrtc", "--port-ranges=100-200,300-400", "--rtcp-policy=separate-range"],
     {"udp": {"protocol": "webrtc", "port_ranges": ("100-200", "300-400"),
              "rtcp_policy": "separate-range"}}),
    (["--session-affinity=false"], {"sessions": {"affinity": False}}),
    (["--session-affinity"], {}),
    (["--session-affinity=false", "--session-affinity=T"], {}),
    (["--affinity-strategy=source-ip"], {"sessions": {"strategy": "source-ip"}}),
    (["--affinity-strategy", "source-port"], {"sessions": {"strategy": "source-port"}}),
    (["--session-timeout=1m30s"], {"sessions": {"timeout": 90.0}}),
    (["--max-sessions=1_000_000"], {"sessions": {"limit": 1_000_000}}),
    (["--proxy-protocol"], {"sessions": {"proxy_protocol": True}}),
    (["--proxy-protocol=false"], {}),
    (["--deploy-timeout=1m"], {"deployment": {"deploy_timeout": 60.0}}),
    (["--zero-downtime"], {"deployment": {"zero_downtime": True}}),
    (["--zero-downtime=false"], {}),
    (["--drain-strategy=immediate"], {"deployment": {"drain_strategy": "immediate"}}),
    (["--drain-strategy", "timeout"], {"deployment": {"drain_strategy": "timeout"}}),
    (["--drain-timeout=500ms"], {"deployment": {"drain_timeout": 0.5}}),
    (["--force-kill-timeout=2h", "--drain-timeout=2h"],
     {"deployment": {"drain_timeout": 7200.0, "force_kill_timeout": 7200.0}}),
    (["--force"], {"deployment": {"force": True}}),
    (["--health-check=none"], {"health": {"method": "none"}}),
    (["--health-check", "http", "--health-check-path=/health"],
     {"health": {"method": "http", "path": "/health"}}),
    (["--health-check-port=7000"], {"health": {"port": 7000}}),
    (["--health-check-interval=3s"], {"health": {"interval": 3.0}}),
    (["--health-check-timeout=3s"], {"health": {"timeout": 3.0}}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "want"), FLAGS, ids=lambda value: " ".join(map(str, value)))
def test_flags_become_options(
    proxy: ScriptedProxy, command: Command, flags: list[str], want: dict[str, Any]
) -> None:
    proxy.answer_events(DONE)
    argv = ["deploy-udp", "game", "--target=game-1:9999", *flags]
    calls = ", 0 got a BYE" if "webrtc" in str(want) else ""
    assert command(*argv) == (0, f"0 sessions completed, 0 cut{calls}\n", "")
    assert sent(proxy) == expected(**want)


def test_the_table_has_every_flag() -> None:
    tried = {flag.partition("=")[0] for flags, _ in FLAGS for flag in flags if flag[:2] == "--"}
    declared = {flag.title for flag in find_command(["deploy-udp"])[0].grammar.flags.values()}
    assert declared - tried == {"-h, --help"}
    assert tried <= declared


def test_nothing_but_what_differs_is_sent(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answer_events(DONE)
    command("deploy-udp", "a b", "--target=game-1:9999", "--zero-downtime")
    # What no service may be called never gets as far as the proxy.
    assert proxy.requests == []
    command("deploy-udp", "a%b", "--target=game-1:9999", "--zero-downtime")
    assert proxy.requests == [
        ("PUT", "/v1/udp-services/a%25b",
         {"targets": ["game-1:9999"], "deployment_options": {"zero_downtime": True}})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=game-2"], "target game-2 must have a port, such as game-2:9999"),
        (["--target=game-1:9999"], "target game-1:9999 is given twice"),
        (["--port=65536"], "port 65536 must be from 0 to 65535"),
        (["--port=-1"], "port -1 must be from 0 to 65535"),
        (["--protocol=tcp"], "protocol 'tcp' must be one of udp, webrtc"),
        (["--protocol=webrtc"],
         "protocol webrtc must have port-ranges, such as 10000-20000, or a port"),
        (["--protocol=webrtc", "--port=5", "--session-affinity=false"],
         "session-affinity must not be off with protocol webrtc: a call stays on its target"),
        (["--port-ranges=10000-20000,30000-40000"],
         "port-ranges 10000-20000,30000-40000 must come with protocol webrtc"),
        (["--port-ranges=20000-10000"],
         "port-ranges '20000-10000' must be the first and the last port, from 1 to 65535, such as "
         "10000-20000"),
        (["--rtcp-policy=adjacent"], "rtcp-policy adjacent must come with protocol webrtc"),
        (["--rtcp-policy=near"],
         "rtcp-policy 'near' must be one of adjacent, separate-range, auto"),
        (["--affinity-strategy=random"],
         "affinity-strategy 'random' must be one of 5-tuple, source-ip, source-port"),
        (["--session-timeout=0"], "session-timeout must be more than zero"),
        (["--max-sessions=0"], "max-sessions 0 must be from 1 to 1000000"),
        (["--drain-strategy="],
         "drain-strategy '' must be one of graceful, immediate, timeout"),
        (["--drain-timeout=3m"],
         "force-kill-timeout 2m0s must not be less than drain-timeout 3m0s"),
        (["--health-check=udp"], "health-check 'udp' must be one of tcp, http, none"),
        (["--health-check-path=/a b"],
         "health-check-path '/a b' must be a path without spaces, ? or #"),
        (["--session-timeout=60"], 'invalid argument "60" for "--session-timeout" flag: '
         'time: missing unit in duration "60"'),
        (["--max-sessions=many"], 'invalid argument "many" for "--max-sessions" flag: '
         'strconv.ParseInt: parsing "many": invalid syntax'),
        (["--zero-downtime=maybe"], 'invalid argument "maybe" for "--zero-downtime" flag: '
         'strconv.ParseBool: parsing "maybe": invalid syntax'),
    ],
)  # fmt: skip
def test_refused(proxy: ScriptedProxy, command: Command, flags: list[str], message: str) -> None:
    argv = ["deploy-udp", "game", "--target=game-1:9999", *flags]
    assert command(*argv) == (1, "", f"Error: {message}\n")
    assert proxy.requests == []


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({}, "0 sessions completed, 0 cut"),
        ({"completed": 12, "cancelled": 3}, "12 sessions completed, 3 cut"),
        ({"completed": 1}, "1 session completed, 0 cut"),
        ({"cancelled": 1}, "0 sessions completed, 1 cut"),
    ],
)
def test_the_counts_of_the_drain_are_printed(
    proxy: ScriptedProxy, command: Command, counts: dict[str, int], line: str
) -> None:
    proxy.answer_events(SWITCHED, {"event": "draining", "in_flight": 9}, {**DONE, **counts})
    assert command("deploy-udp", "game", "--target=game-1:9999") == (0, f"{line}\n", "")


CALLS = ["--protocol=webrtc", "--port-ranges=10000-20000"]


@pytest.mark.parametrize(
    ("flags", "counts", "line"),
    [
        (CALLS, {}, "0 sessions completed, 0 cut, 0 got a BYE"),
        (CALLS, {"completed": 3, "cancelled": 2, "goodbyes": 4, "cut_unsaid": 1},
         "3 sessions completed, 2 cut, 4 got a BYE; 1 SRTP session cut without goodbye"),
        (CALLS, {"cancelled": 2, "cut_unsaid": 2},
         "0 sessions completed, 2 cut, 0 got a BYE; 2 SRTP sessions cut without goodbye"),
        # What is replaced may have been another thing than what replaces it.
        ([], {"cancelled": 2, "goodbyes": 1}, "0 sessions completed, 2 cut, 1 got a BYE"),
    ],
)  # fmt: skip
def test_who_was_told_goodbye_is_printed(
    proxy: ScriptedProxy, command: Command, flags: list[str], counts: dict[str, int], line: str
) -> None:
    proxy.answer_events(SWITCHED, {**DONE, **counts})
    argv = ["deploy-udp", "calls", "--target=media-1:7880", *flags]
    assert command(*argv) == (0, f"{line}\n", "")


CLEAR = "\r\033[K"


def test_progress_on_a_terminal(
    proxy: ScriptedProxy,
    command: Command,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = {"event": "probe", "target": "g:1", "result": "refused", "elapsed": 0.25}
    proxy.answer_events(
        probe,
        {"event": "healthy", "elapsed": 0.5},
        SWITCHED,
        {"event": "draining", "in_flight": 15},
        {"event": "draining", "in_flight": 1},
        {**DONE, "completed": 12, "cancelled": 3},
    )
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    code, out, _ = command("deploy-udp", "game", "--target=g:1")
    assert (code, out) == (0, "12 sessions completed, 3 cut\n")
    assert terminal.read() == (
        f"{CLEAR}waiting   g:1: refused, 250ms"
        f"{CLEAR}healthy   all targets answer, after 500ms\n"
        "switched  new sessions go to the new targets\n"
        f"{CLEAR}draining  15 sessions on the old target"
        f"{CLEAR}draining  1 session on the old targets"
        f"{CLEAR}done      after 1s\n"
    )


def test_what_the_proxy_refuses(proxy: ScriptedProxy, command: Command) -> None:
    error = {"code": "port_conflict", "message": "port 9999 is used by another service"}
    proxy.answer_json(409, {"error": error})
    assert command("deploy-udp", "game", "--target=game-1:9999", "--port=9999") == (
        1, "", "Error: port 9999 is used by another service\n"
    )  # fmt: skip


def test_a_failed_deploy_prints_no_counts(proxy: ScriptedProxy, command: Command) -> None:
    failed = {"event": "failed", "code": "deploy_failed", "message": "why", "details": ["g: no"]}
    proxy.answer_events({"event": "probe", "target": "g:1", "result": "no"}, failed)
    assert command("deploy-udp", "game", "--target=g:1") == (1, "", "g: no\nError: why\n")


def test_a_proxy_that_goes_away(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answer_events(SWITCHED)
    assert command("deploy-udp", "game", "--target=g:1") == (
        1,
        "",
        "Error: the proxy ended the connection before the deploy was complete; "
        "it may have stopped\n",
    )
