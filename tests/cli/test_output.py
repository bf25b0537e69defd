"""The table of list, byte for byte, and what a deploy shows on a terminal."""

from __future__ import annotations

import io
import os
import sys
import termios
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

import pytest

from kamal_proxy.cli.output import Progress, table
from kamal_proxy.control.messages import Event

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedProxy

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
        "\033[m/api\033[0m  \033[mfoo\033[0m                 \033[mpaused\033[0m   "
        "\033[myes\033[0m  \n"
        "\033[1;34mzz\033[0m       \033[m*\033[0m                            "
        "\033[m/\033[0m     \033[mlocalhost:81,foo:1\033[0m  \033[mrunning\033[0m  "
        "\033[mno\033[0m   \n"
    )


def test_table_pads_every_column() -> None:
    assert table([("a", "bb"), ("ccc", "d")]) == (
        "\033[3;94ma\033[0m    \033[3;94mbb\033[0m  \n\033[1;34mccc\033[0m  \033[md\033[0m   \n"
    )


class Terminal:
    """A pseudo-terminal of 40 columns."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 40))
        self.stream: TextIO = open(slave, "w", encoding="utf-8")  # noqa: SIM115  closed in read

    def read(self) -> str:
        """Return all that was written; nothing can be written afterwards."""
        # The mark tells where to stop: a closed pseudo-terminal may drop what was not yet read.
        self.stream.write("\0")
        self.stream.flush()
        data = b""
        while not data.endswith(b"\0"):
            data += os.read(self._master, 4096)
        self.stream.close()
        return data[:-1].decode().replace("\r\n", "\n")

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


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


def test_progress_on_a_terminal(terminal: Terminal) -> None:
    with Progress(terminal.stream) as progress:
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


def test_progress_leaves_no_half_line_behind(terminal: Terminal) -> None:
    def fail() -> None:
        with Progress(terminal.stream) as progress:
            progress.show(EVENTS[0])
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert terminal.read().endswith(CLEAR)


def test_a_terminal_that_cannot_rewrite_gets_whole_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(terminal.stream) as progress:
        for event in EVENTS:
            progress.show(event)
    shown = terminal.read()
    assert "\033" not in shown
    assert [line.split()[0] for line in shown.splitlines()] == ["healthy", "switched", "done"]


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_no_progress_without_a_terminal(stream: io.StringIO | None) -> None:
    with Progress(stream) as progress:
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
