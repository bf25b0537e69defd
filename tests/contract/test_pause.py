"""The contract's section "Pause, stop, resume", statement by statement.

``tests/http/test_pause.py`` and ``tests/test_holding.py`` have waiting and draining in depth.
"""

from __future__ import annotations

import re

import pytest

from tests.contract.steps import (
    answered,
    begin,
    finish,
    finished,
    holds,
    kp,
    listed,
    logged,
    meanwhile,
    release,
    restarted,
    table,
    unfinished,
)
from tests.contract.tables import Row, ask, play, row
from tests.contract.test_errors import page

WEB = kp("deploy web --target={a}")
EMPTY = {":body": b"", "content-length": "0"}
ESCAPED = re.escape(b"&lt;b&gt; &amp; &#34;soon&#34;")


def health_path(command: str, elsewhere: int, reason: str) -> Row:
    return row(
        f"after {command.split()[0]}: GET and HEAD on exactly the health-check path get 200, empty",
        kp("deploy web --target={a} --health-check-path=/ready"),
        kp(command),
        ask("/ready", reaches="", gets=EMPTY, logs={"target": "", "service": "web"}),
        ask("/ready", method="HEAD", reaches="", gets=EMPTY),
        ask("/ready?x", reaches="", gets=EMPTY),
        answered(elsewhere, "/ready/", reason=reason),
        answered(elsewhere, "/ready/x", reason=reason),
        answered(elsewhere, "/up", reason=reason),
        answered(elsewhere, "/ready", method="POST", reason=reason),
    )


ROWS = [
    row(
        "pause: new requests wait",
        WEB,
        kp("pause web"),
        table("web * / {a} paused no"),
        begin("one", ask(), waits=True),
        begin("two", ask(method="POST", body=b"body", sees={":body": b"body"}), waits=True),
        unfinished("one"),
        unfinished("two"),
        kp("resume web"),
        finish("one"),
        finish("two"),
    ),
    row(
        "up to --max-pause (30s), then 504",
        WEB,
        kp("pause web"),
        listed(name="web", state="paused", max_pause=30.0),
        kp("pause web --max-pause=20ms"),
        answered(504, reason="pause_expired"),
    ),
    row(
        "in-flight ones drain, and pause returns after that",
        WEB,
        holds("a"),
        begin("old", ask()),
        meanwhile("pause", kp("pause web")),
        logged("Service paused", service="web"),
        unfinished("pause"),
        release("a"),
        finish("old"),
        finished("pause"),
        logged("Service drained", service="web"),
    ),
    row(
        "no longer than --drain-timeout",
        WEB,
        holds("a"),
        begin("old", answered(504, reaches="a", target="{a}", reason="drained")),
        kp("pause web --drain-timeout=20ms"),
        finish("old"),
    ),
    row(
        "stop drains as well",
        WEB,
        holds("a"),
        begin("old", ask()),
        meanwhile("stop", kp("stop web")),
        logged("Service stopped", service="web"),
        answered(503, reason="stopped"),
        unfinished("stop"),
        release("a"),
        finish("old"),
        finished("stop"),
    ),
    row(
        "stop --message: 503 page with the message, HTML-escaped",
        WEB,
        kp("stop web --message='<b> & \"soon\"'"),
        table("web * / {a} stopped no"),
        answered(503, gets=page(rb"(?s).*" + ESCAPED + rb".*"), reason="stopped"),
    ),
    row(
        "a later stop without a message resets it",
        WEB,
        kp("stop web --message=Hi"),
        kp("stop web"),
        listed(name="web", state="stopped", stop_message=""),
        answered(503, gets=page(rb"(?s)(?!.*Hi).*"), reason="stopped"),
    ),
    row(
        "requests that wait are told when a paused service is stopped",
        WEB,
        kp("pause web"),
        begin("waiting", answered(503, gets=page(b"(?s).*Gone.*"), reason="stopped"), waits=True),
        kp("stop web --message=Gone"),
        finish("waiting"),
    ),
    row(
        "resume lets waiting requests go, to the targets of then",
        WEB,
        kp("pause web"),
        begin("waiting", ask(reaches="b"), waits=True),
        kp("deploy web --target={b}"),
        unfinished("waiting"),
        kp("resume web"),
        finish("waiting"),
        table("web * / {b} running no"),
    ),
    row(
        "resume ends a stop",
        WEB,
        kp("stop web"),
        kp("resume web"),
        ask(),
    ),
    health_path("pause web --max-pause=0", 504, "pause_expired"),
    health_path("stop web", 503, "stopped"),
    row(
        "while it runs, the health-check path is the target's",
        WEB,
        ask("/up", reaches="a"),
    ),
    row(
        "a stop survives restarts, with its message",
        WEB,
        kp("stop web --message='<b> & \"soon\"'"),
        restarted(),
        listed(name="web", state="stopped", stop_message='<b> & "soon"'),
        answered(503, gets=page(rb"(?s).*" + ESCAPED + rb".*"), reason="stopped"),
        kp("resume web"),
        restarted(),
        ask(),
    ),
    row(
        "a pause survives restarts, with its limit",
        WEB,
        kp("pause web --max-pause=20s"),
        restarted(),
        listed(name="web", state="paused", max_pause=20.0),
        begin("waiting", ask(), waits=True),
        kp("resume web"),
        finish("waiting"),
    ),
    row(
        "of a service that is not there",
        kp("pause nobody", error="service not found"),
        kp("stop nobody", error="service not found"),
        kp("resume nobody", error="service not found"),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_pause(shown: Row) -> None:
    await play(shown)
