"""pause, stop, resume and rollout: what they ask of the proxy, and what becomes of the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedProxy, Terminal

Command = Callable[..., tuple[int, str, str]]
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
DONE = {"event": "done", "elapsed": 1.0, "completed": 2, "cancelled": 1}
DRAINING = {"event": "draining", "in_flight": 3}


@pytest.mark.parametrize(
    ("argv", "method", "path", "body"),
    [
        (["pause", "app"], "POST", "app/pause", {}),
        (["pause", "app", "--drain-timeout=1m", "--max-pause", "500ms"], "POST", "app/pause",
         {"drain_timeout": 60.0, "max_pause": 0.5}),
        (["pause", "--max-pause=30s", "--max-pause=0", "app"], "POST", "app/pause",
         {"max_pause": 0.0}),
        # As Kamal sends them.
        (["stop", "app-web", "--drain-timeout=30s"], "POST", "app-web/stop", {}),
        (["stop", "app-web", "--drain-timeout=10s", "--message=Hi"], "POST", "app-web/stop",
         {"drain_timeout": 10.0, "message": "Hi"}),
        (["stop", "app-web", "--drain-timeout=1.5s"], "POST", "app-web/stop",
         {"drain_timeout": 1.5}),
        (["stop", "a", '--message=Back, at "5"\\n=é <b>'], "POST", "a/stop",
         {"message": 'Back, at "5"\\n=é <b>'}),
        (["stop", "a", "--message="], "POST", "a/stop", {}),
        (["stop", "--message", "--message", "a"], "POST", "a/stop", {"message": "--message"}),
        (["rollout", "deploy", "app", "--target=t1:80"], "PUT", "app/rollout",
         {"targets": ["t1:80"]}),
        (["rollout", "deploy", "app", "--target=t1:80,t2", "--target", "t3:1",
          "--read-target=r1:80", "--deploy-timeout=5s", "--drain-timeout=0"], "PUT", "app/rollout",
         {"targets": ["t1:80", "t2", "t3:1"], "read_targets": ["r1:80"],
          "deployment_options": {"deploy_timeout": 5.0, "drain_timeout": 0.0}}),
    ],
)  # fmt: skip
def test_what_takes_long(
    proxy: ScriptedProxy, command: Command, argv: list[str], method: str, path: str, body: Any
) -> None:
    proxy.answer_events(DRAINING, DONE)
    assert command(*argv) == (0, "", "")
    assert proxy.requests == [(method, f"/v1/services/{path}", body)]


@pytest.mark.parametrize(
    ("argv", "method", "path", "body"),
    [
        (["resume", "app-web"], "POST", "app-web/resume", None),
        (["resume", "--", "-a b/é"], "POST", "-a%20b%2F%C3%A9/resume", None),
        (["rollout", "set", "app", "--percent=20"], "PUT", "app/rollout/split",
         {"percentage": 20}),
        (["rollout", "set", "app", "--percent=0"], "PUT", "app/rollout/split", {}),
        (["rollout", "set", "app", "--list="], "PUT", "app/rollout/split", {}),
        (["rollout", "--list=a,b", "set", "app", "--list", "c d", "--percent", "0x10"], "PUT",
         "app/rollout/split", {"percentage": 16, "allowlist": ["a", "b", "c d"]}),
        (["rollout", "stop", "app"], "DELETE", "app/rollout/split", None),
    ],
)  # fmt: skip
def test_what_is_short(
    proxy: ScriptedProxy, command: Command, argv: list[str], method: str, path: str, body: Any
) -> None:
    proxy.answers.append(NO_CONTENT)
    assert command(*argv) == (0, "", "")
    assert proxy.requests == [(method, f"/v1/services/{path}", body)]


ALL = [
    ["pause", "app"], ["stop", "app"], ["resume", "app"],
    ["rollout", "deploy", "app", "--target=t1:80"],
    ["rollout", "set", "app", "--percent=1"], ["rollout", "stop", "app"],
]  # fmt: skip


@pytest.mark.parametrize("argv", ALL, ids=" ".join)
def test_what_the_proxy_refuses(proxy: ScriptedProxy, command: Command, argv: list[str]) -> None:
    proxy.answer_json(404, {"error": {"code": "service_not_found", "message": "service not found"}})
    assert command(*argv) == (1, "", "Error: service not found\n")


def test_a_rollout_without_targets(proxy: ScriptedProxy, command: Command) -> None:
    error = {"code": "rollout_not_set", "message": "rollout target not set"}
    proxy.answer_json(409, {"error": error})
    assert command("rollout", "set", "app", "--percent=1") == (
        1, "", "Error: rollout target not set\n"
    )  # fmt: skip


def test_a_pause_that_was_ended_meanwhile(proxy: ScriptedProxy, command: Command) -> None:
    failed = {"event": "failed", "code": "resumed", "message": "resumed", "details": ["why"]}
    proxy.answer_events(DRAINING, failed)
    assert command("pause", "app") == (1, "", "why\nError: resumed\n")


@pytest.mark.parametrize(
    ("argv", "what"),
    [(ALL[0], "pause"), (ALL[1], "stop"), (ALL[3], "deploy")],
    ids=["pause", "stop", "rollout"],
)
def test_a_proxy_that_goes_away(
    proxy: ScriptedProxy, command: Command, argv: list[str], what: str
) -> None:
    proxy.answer_events(DRAINING)
    assert command(*argv) == (
        1,
        "",
        f"Error: the proxy ended the connection before the {what} was complete; "
        "it may have stopped\n",
    )


CLEAR = "\r\033[K"


@pytest.mark.parametrize(
    ("argv", "which"),
    [
        (ALL[0], "in flight"),
        (ALL[1], "in flight"),
        (ALL[3], "on the old rollout targets"),
    ],
    ids=["pause", "stop", "rollout"],
)
def test_progress_on_a_terminal(
    proxy: ScriptedProxy,
    command: Command,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    which: str,
) -> None:
    proxy.answer_events(DRAINING, {"event": "draining", "in_flight": 1}, DONE)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    code, out, _ = command(*argv)
    assert (code, out) == (0, "")
    shown = [f"draining  {count} {which}"[:39] for count in ("3 requests", "1 request")]
    assert terminal.read() == (
        f"{CLEAR}{shown[0]}{CLEAR}{shown[1]}"
        f"{CLEAR}done      after 1s, 2 requests finished, 1 request cut off by the drain timeout\n"
    )
