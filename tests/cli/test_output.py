"""The table of list, byte for byte, and what a deploy shows on a terminal."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kamal_proxy.cli.output import Progress, table
from kamal_proxy.control.messages import Event

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedProxy, Terminal

Command = Callable[..., tuple[int, str, str]]
HEADER = (
    "\033[3;94mService\033[0m  \033[3;94mHost\033[0m  \033[3;94mPath\033[0m  "
    "\033[3;94mTarget\033[0m  \033[3;94mState\033[0m  \033[3;94mTLS\033[0m  \n"
)


def test_list_of_nothing(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answer_json(200, {"services": []})
    assert command("list") == (0, HEADER, "")


def test_list(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answer_json(
        200,
        {
            "services": [
                {"name": "zz", "targets": ["localhost:81", "foo:1"]},
                {
                    "name": "svcé",
                    "hosts": ["a.example.com", "b.example.com"],
                    "path_prefixes": ["/api"],
                    "targets": ["foo"],
                    "read_targets": ["ro:1"],
                    "rollout_targets": ["new:1"],
                    "state": "paused",
                    "tls": True,
                },
            ]
        },
    )
    code, out, err = command("ls")
    assert (code, err) == (0, "")
    # As the original prints it: padded by bytes, so the é makes its column one wider.
    assert out == (
        "\033[3;94mService\033[0m  \033[3;94mHost\033[0m                         "
        "\033[3;94mPath\033[0m  \033[3;94mTarget\033[0m              \033[3;94mState\033[0m    "
        "\033[3;94mTLS\033[0m  \n"
        "\033[1;34msvcé\033[0m    \033[ma.example.com,b.example.com\033[0m  "
        "\033[m/api\033[0m  \033[mfoo,ro:1\033[0m            \033[mpaused\033[0m   "
        "\033[myes\033[0m  \n"
        "\033[1;34mzz\033[0m       \033[m*\033[0m                            "
        "\033[m/\033[0m     \033[mlocalhost:81,foo:1\033[0m  \033[mrunning\033[0m  "
        "\033[mno\033[0m   \n"
    )


def test_list_as_json_has_every_field(proxy: ScriptedProxy, command: Command) -> None:
    stopped = {"name": "b", "hosts": ["é"], "state": "stopped", "stop_message": "\u001b[2J"}
    proxy.answer_json(200, {"services": [stopped, {"name": "a", "max_pause": 2}]})
    code, out, err = command("list", "--json")
    assert (code, err) == (0, "")
    a, b = json.loads(out)
    empty = {
        "name": "a", "hosts": [], "path_prefixes": [], "udp_ports": [], "protocol": "",
        "max_sessions": 0, "pairs_in_use": 0, "targets": [], "read_targets": [],
        "rollout_targets": [], "rollout_read_targets": [], "rollout_active": False,
        "rollout_percentage": 0, "rollout_allowlist": [], "healthy": [], "state": "running",
        "stop_message": "", "max_pause": 2.0, "tls": False, "in_flight": 0, "draining": 0,
    }  # fmt: skip
    assert a == empty
    assert b == {**empty, **stopped, "max_pause": 0.0}
    assert out.startswith('[\n  {\n    "name": "a",\n    "hosts": [],\n')
    assert out.endswith("  }\n]\n")
    assert "\033" not in out


def test_list_of_udp_services(proxy: ScriptedProxy, command: Command) -> None:
    udp = {"name": "b", "udp_ports": ["udp/9999"], "protocol": "udp", "targets": ["game-1:9999"]}
    web = {"name": "b", "path_prefixes": ["/"], "targets": ["web"]}
    rtc = {"name": "a", "udp_ports": ["udp/5000-6000", "udp/70-80"], "state": "stopped"}
    proxy.answer_json(200, {"services": [udp, web, rtc]})
    code, out, err = command("list")
    assert (code, err) == (0, "")
    rows = [re.sub(r"\033\[[0-9;]*m", "", line).split() for line in out.splitlines()]
    assert rows[1:] == [
        ["a", "*", "udp/5000-6000,udp/70-80", "stopped", "no"],
        ["b", "*", "/", "web", "running", "no"],
        ["b", "*", "udp/9999", "game-1:9999", "running", "no"],
    ]


def test_list_of_udp_services_as_json(proxy: ScriptedProxy, command: Command) -> None:
    udp = {
        "name": "b", "udp_ports": ["udp/7882", "udp/50000-60000"], "protocol": "webrtc",
        "max_sessions": 500, "pairs_in_use": 3, "targets": ["game-1:9999"],
        "in_flight": 7, "draining": 2,
    }  # fmt: skip
    proxy.answer_json(200, {"services": [udp, {"name": "b", "path_prefixes": ["/"]}]})
    web, other = json.loads(command("list", "--json")[1])
    assert (web["name"], web["udp_ports"]) == ("b", [])
    assert {name: other[name] for name in udp} == udp


def test_list_of_nothing_as_json(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answer_json(200, {"services": []})
    assert command("ls", "--json") == (0, "[]\n", "")


def test_table_pads_every_column() -> None:
    assert table([("a", "bb"), ("ccc", "d")]) == (
        "\033[3;94ma\033[0m    \033[3;94mbb\033[0m  \n\033[1;34mccc\033[0m  \033[md\033[0m   \n"
    )


EVENTS = [
    Event(event="probe", target="t1:80", result="connection refused", elapsed=0.05),
    Event(event="probe", target="t1:80", result="bad \033[2J status and a long text", elapsed=1.26),
    Event(event="probe", target="t1:80", result="status 200", ok=True, elapsed=61.4),
    Event(event="healthy", elapsed=61.4),
    Event(event="switched", elapsed=61.5),
    Event(event="draining", in_flight=2, elapsed=61.5),
    Event(event="draining", in_flight=1, elapsed=62.5),
    Event(event="draining", in_flight=0, elapsed=62.5),
    Event(event="something-new", elapsed=62.5),
    Event(event="done", elapsed=63.5, completed=1, cancelled=2),
]
CLEAR = "\r\033[K"
DRAINING = "on the old targets"


def test_progress_on_a_terminal(terminal: Terminal) -> None:
    with Progress(terminal.stream, DRAINING) as progress:
        for event in EVENTS:
            progress.show(event)
    assert terminal.read() == (
        f"{CLEAR}waiting   t1:80: connection refused, 50"
        f"{CLEAR}waiting   t1:80: bad \\x1b[2J status and"
        f"{CLEAR}healthy   all targets answer, after 1m1s\n"
        "switched  new requests go to the new targets\n"
        f"{CLEAR}draining  2 requests on the old targets"
        f"{CLEAR}draining  1 request on the old targets"
        f"{CLEAR}done      after 1m4s, 1 request finished, 2 requests cut off by the drain "
        "timeout\n"
    )


def test_progress_of_sessions(terminal: Terminal) -> None:
    progress = Progress(terminal.stream, DRAINING, unit="session", summary=False)
    with progress:
        for event in EVENTS[4:]:
            progress.show(event)
    assert terminal.read() == (
        "switched  new sessions go to the new targets\n"
        f"{CLEAR}draining  2 sessions on the old targets"
        f"{CLEAR}draining  1 session on the old targets"
        f"{CLEAR}done      after 1m4s\n"
    )


def test_progress_leaves_no_half_line_behind(terminal: Terminal) -> None:
    def fail() -> None:
        with Progress(terminal.stream, DRAINING) as progress:
            progress.show(EVENTS[0])
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert terminal.read().endswith(CLEAR)


def test_a_terminal_that_cannot_rewrite_gets_whole_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(terminal.stream, DRAINING) as progress:
        for event in EVENTS:
            progress.show(event)
    shown = terminal.read()
    assert "\033" not in shown
    assert [line.split()[0] for line in shown.splitlines()] == ["healthy", "switched", "done"]


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_no_progress_without_a_terminal(stream: io.StringIO | None) -> None:
    with Progress(stream, DRAINING) as progress:
        for event in EVENTS:
            progress.show(event)
    assert stream is None or stream.getvalue() == ""


def test_a_deploy_shows_progress_on_stderr_only(
    proxy: ScriptedProxy,
    command: Command,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy.answer_events({"event": "switched"}, {"event": "done", "elapsed": 0.25})
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    code, out, _ = command("deploy", "app", "--target=t1:80")
    assert (code, out) == (0, "")
    assert terminal.read() == (
        "switched  new requests go to the new targets\ndone      after 250ms\n"
    )
