"""The contract's section "Errors, pages", statement by statement.

Not covered: 503 for a TLS request to a service without TLS, which comes with TLS.
``tests/http/test_reasons.py`` has every reason in depth, ``tests/http/test_templates.py`` the
template language.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio

from tests.contract.steps import (
    answered,
    begin,
    finish,
    health,
    holds,
    kp,
    logged,
    release,
    scripts,
)
from tests.contract.tables import Row, World, ask, play, row

if TYPE_CHECKING:
    from tests.contract.tables import Step

HTML = {"content-type": "text/html; charset=utf-8"}
WEB = kp("deploy web --target={a}")
PAGES = kp("deploy web --target={a} --error-pages={directory}/pages")
LIMIT = "--buffer-requests --max-request-body=4 --buffer-responses --max-response-body=4"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"
FAST = "--health-check-interval=10ms"


def built_in(status: int) -> bytes:
    return rb"(?s)<!DOCTYPE html>.*<title>.*\(%d\)</title>.*" % status


def page(pattern: bytes) -> dict[str, object]:
    """Return what a client gets with an error page."""
    return HTML | {":body": Body(pattern)}


class Body:
    """Equal to every body that matches."""

    def __init__(self, pattern: bytes) -> None:
        self.pattern = pattern

    def __eq__(self, other: object) -> bool:
        return isinstance(other, bytes) and re.fullmatch(self.pattern, other) is not None

    def __hash__(self) -> int:
        return hash(self.pattern)


def pages(**texts: str) -> Step:
    """Make a step that writes a directory of error pages, by ``_`` and status."""

    async def step(world: World) -> None:
        directory = world.directory / "pages"
        directory.mkdir(exist_ok=True)
        for name, text in texts.items():
            directory.joinpath(f"{name.strip('_')}.html").write_text(text)

    return step


async def client_leaves(world: World) -> None:
    client, _, _ = world.pending.pop("leaving")
    port = str(client.sock.getsockname()[1])
    with patch("kamal_proxy.http.downstream.GONE_GRACE", 0.01):
        client.close()
        line = await world.proxy.lines.wait_for(lambda line: line.get("client_port") == port)
    assert (line["status"], line["reason"], line["service"]) == (499, "client_gone", "web")


async def longer_than_the_timeout(world: World) -> None:
    await trio.sleep(0.1)  # no synchronisation: this time itself must do no harm


def own_error(status: int) -> Row:
    return row(
        f"a target's own {status} passes through untouched",
        pages(_404="mine", _503="mine", _500="mine", _502="mine", _504="mine", _413="mine"),
        PAGES,
        scripts("a", b"HTTP/1.1 %d No\r\nX-One: 1\r\nContent-Length: 3\r\n\r\nits" % status),
        ask(
            status=status,
            gets={":body": b"its", "x-one": "1", "content-type": None},
            logs={"reason": None},
        ),
    )


ROWS = [
    row("built-in page for 404", answered(404, gets=page(built_in(404)), reason="no_service")),
    row(
        "built-in page for 413",
        kp(f"deploy web --target={{a}} {LIMIT}"),
        answered(
            413, method="POST", body=b"12345", gets=page(built_in(413)), reason="request_too_large"
        ),
    ),
    row(
        "built-in page for 502",
        kp("deploy web --target={refused} --force"),
        answered(502, gets=page(built_in(502)), target="{refused}", reason="target_refused"),
    ),
    row(
        "built-in page for 503",
        WEB,
        kp("stop web"),
        answered(503, gets=page(built_in(503)), reason="stopped"),
    ),
    row(
        "built-in page for 504",
        WEB,
        kp("pause web --max-pause=0"),
        answered(504, gets=page(built_in(504)), reason="pause_expired"),
    ),
    row(
        "other codes: a bare heading",
        kp(f"deploy web --target={{a}} {LIMIT}"),
        scripts("a", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
        answered(
            500,
            gets=page(b"<h1>500 Internal Server Error</h1>"),
            reaches="a",
            target="{a}",
            reason="response_too_large",
        ),
        answered(
            400,
            "/%zz",
            gets=page(b"<h1>400 Bad Request</h1>"),
            reason="bad_request",
        ),
    ),
    row(
        "--error-pages must hold at least one page, or the deploy fails and changes nothing",
        WEB,
        kp("deploy web --target={b} --error-pages={directory}", error="unable to load error pages"),
        kp(
            "deploy web --target={b} --error-pages={directory}/none",
            error="unable to load error pages",
        ),
        ask(reaches="a"),
    ),
    row(
        "they override the built-in ones, each by its status",
        pages(_503="<p>own", _504="<p>late"),
        PAGES,
        kp("stop web"),
        answered(503, gets=page(b"<p>own"), reason="stopped"),
        kp("pause web --max-pause=0"),
        answered(504, gets=page(b"<p>late"), reason="pause_expired"),
        kp("resume web"),
        scripts("a", b""),
        answered(502, gets=page(built_in(502)), reaches="a", target="{a}", reason="target_failed"),
    ),
    row(
        "per service",
        pages(_503="<p>own"),
        kp("deploy web --target={a} --host=web.test --error-pages={directory}/pages"),
        kp("deploy other --target={a} --host=other.test"),
        kp("stop web"),
        kp("stop other"),
        answered(503, host="web.test", gets=page(b"<p>own"), reason="stopped"),
        answered(503, host="other.test", gets=page(built_in(503)), reason="stopped"),
    ),
    row(
        "{{ .Message }}, escaped",
        pages(_503="<p>Maintenance: {{ .Message }}"),
        PAGES,
        kp("stop web --message='<b>\"5\" & it'\"'\"'s +1'"),
        answered(
            503,
            gets=page(re.escape(b"<p>Maintenance: &lt;b&gt;&#34;5&#34; &amp; it&#39;s &#43;1")),
            reason="stopped",
        ),
        kp("stop web"),
        answered(503, gets=page(b"<p>Maintenance: "), reason="stopped"),
    ),
    row(
        "{{ if .Message }} {{ else }} {{ end }}",
        pages(_503="<p>{{ if .Message }}we say {{ .Message }}{{ else }}nothing{{ end }}!"),
        PAGES,
        kp("stop web --message=Hi"),
        answered(503, gets=page(b"<p>we say Hi!"), reason="stopped"),
        kp("stop web"),
        answered(503, gets=page(b"<p>nothing!"), reason="stopped"),
    ),
    *map(own_error, (404, 413, 500, 502, 503, 504)),
    row(
        "413 for a body over the limit",
        kp(f"deploy web --target={{a}} {LIMIT}"),
        ask(method="POST", body=b"1234"),
        answered(413, method="POST", body=b"12345", reason="request_too_large"),
        answered(
            413,
            method="POST",
            headers=["Transfer-Encoding: chunked"],
            body=b"3\r\n123\r\n2\r\n45\r\n0\r\n\r\n",
            reason="request_too_large",
        ),
    ),
    row(
        "504 for a target that takes longer than --target-timeout",
        kp("deploy web --target={a} --target-timeout=30ms"),
        holds("a"),
        answered(504, reaches="a", target="{a}", reason="target_timeout"),
    ),
    row(
        "504 for an expired pause",
        WEB,
        kp("pause web --max-pause=10ms"),
        answered(504, reason="pause_expired"),
        logged("Rejecting request due to expired pause", service="web", path="/"),
    ),
    row(
        "504 for a drained request",
        WEB,
        holds("a"),
        begin("old", answered(504, reaches="a", target="{a}", reason="drained")),
        kp("deploy web --target={b} --drain-timeout=10ms"),
        finish("old"),
    ),
    row("503 for a stopped service", WEB, kp("stop web"), answered(503, reason="stopped")),
    row(
        "503 for no healthy target",
        kp(f"deploy web --target={{a}},{{b}} {FAST}"),
        health("a", 503),
        health("b", 503),
        logged("Target health updated", target="{a}", state="unhealthy"),
        logged("Target health updated", target="{b}", state="unhealthy"),
        answered(503, reason="no_healthy_target"),
    ),
    row(
        "502 for a target that refused",
        kp("deploy web --target={refused} --force"),
        answered(502, target="{refused}", reason="target_refused"),
    ),
    row(
        "502 for a target that broke",
        WEB,
        scripts("a", b"", b"HTTP/1.1 2", b"nonsense\r\n\r\n"),
        *[answered(502, reaches="a", target="{a}", reason="target_failed")] * 3,
        logged("Error while proxying", target="{a}", path="/"),
    ),
    row(
        "a target that broke within its response: the status stands, the connection is cut",
        WEB,
        scripts("a", CUT),
        ask(cut=b"part", logs={"reason": "target_failed"}),
    ),
    row(
        "400 for a malformed chunked body",
        WEB,
        answered(
            400,
            method="POST",
            headers=["Transfer-Encoding: chunked"],
            body=b"2\r\nhi\r\nxyz\r\n",
            target="{a}",
            reason="bad_request",
        ),
        kp(f"deploy web --target={{a}} {LIMIT}"),
        answered(
            400,
            method="POST",
            headers=["Transfer-Encoding: chunked"],
            body=b"2\r\nhi\r\nxyz\r\n",
            reason="bad_request",
        ),
    ),
    row(
        "499 in the log for a client that went away",
        WEB,
        holds("a"),
        begin("leaving", ask()),
        client_leaves,
    ),
    row(
        "--target-timeout bounds the wait for the head only; a body has no limit",
        kp("deploy web --target={a} --target-timeout=50ms"),
        holds("a", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n12", b"34"),
        begin("slow", ask(gets={":body": b"1234"})),
        longer_than_the_timeout,
        release("a"),
        finish("slow"),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_errors(shown: Row) -> None:
    await play(shown)
