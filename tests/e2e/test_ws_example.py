"""The example's page and WebSocket visitors: they come back after a deploy, and lose nothing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from example import ws_load
from example.load import Request, record
from example.tally import tell
from example.webapp import CLOSE, TEXT, accept_of, frame, receive_frame
from example.ws_load import Visitor
from tests.e2e.browser import needs_browser, open_browser, wait_title
from tests.e2e.programs import open_program
from tests.running import ROOT, open_command, open_directory

if TYPE_CHECKING:
    import queue
    from collections.abc import AsyncIterator, Callable, Iterator
    from io import BufferedIOBase
    from pathlib import Path

WEBAPP = ROOT / "example" / "webapp.py"
LOCALHOST = "127.0.0.1"
GOING_AWAY = (1001).to_bytes(2, "big")

# --- visitors ------------------------------------------------------------------------------------


def greet(stream: BufferedIOBase) -> None:
    """Accept a WebSocket as the application does."""
    lines = iter(lambda: stream.readline().decode().strip(), "")
    key = next(line.split()[1] for line in lines if line.startswith("Sec-WebSocket-Key"))
    while stream.readline().strip():
        pass
    head = f"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: {accept_of(key)}\r\n\r\n"
    stream.write(head.encode())
    say(stream, "this is blue")


def say(stream: BufferedIOBase, text: str) -> None:
    stream.write(frame(0x80 | TEXT, text.encode()))
    stream.flush()


@contextmanager
def served(*parts: Callable[[BufferedIOBase], None]) -> Iterator[int]:
    """Play a part on each connection that comes, one after the other; provide the port."""

    def serve() -> None:
        for part in parts:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                greet(stream)
                part(stream)

    with socket.create_server((LOCALHOST, 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(20)
        assert not thread.is_alive()


def echo(stream: BufferedIOBase) -> None:
    say(stream, receive_frame(stream)[1].decode())


@contextmanager
def visitor(port: int) -> Iterator[Visitor]:
    one = Visitor(LOCALHOST, port, "ann")
    try:
        yield one
    finally:
        one.leave()


def test_a_visitor_who_is_told_to_go_comes_back_and_says_it_again() -> None:
    closed_with = []

    def send_away(stream: BufferedIOBase) -> None:
        assert receive_frame(stream)[1] == b"hello"
        stream.write(frame(0x80 | CLOSE, GOING_AWAY))
        stream.flush()
        closed_with.append(receive_frame(stream))

    with served(send_away, echo) as port, visitor(port) as ann:
        said = ann.say("hello")

    assert (said.instance, said.error, said.connection) == ("blue", "", "ann.2")
    assert said.slow, "it was said twice"
    assert closed_with == [(0x80 | CLOSE, GOING_AWAY)]


def test_a_visitor_who_is_cut_off_comes_back() -> None:
    with served(lambda stream: None, echo) as port, visitor(port) as ann:
        assert ann.say("hello").error == ""


def test_a_wrong_answer_is_a_loss() -> None:
    with served(lambda stream: say(stream, "bye")) as port, visitor(port) as ann:
        said = ann.say("hello")

    assert (said.instance, said.error) == ("", "blue says 'bye' to 'hello'")


def test_what_nobody_answers_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ws_load, "TIMEOUT", 0.3)
    with socket.create_server((LOCALHOST, 0)) as taken:
        port = taken.getsockname()[1]
    with visitor(port) as ann:
        assert "ConnectionRefusedError" in ann.say("hello").error


def test_a_load_that_breaks_does_not_look_like_one_that_lost_nothing() -> None:
    def break_down(_: threading.Event, __: queue.Queue[str]) -> None:
        raise LookupError("a mistake")

    with pytest.raises(LookupError, match="a mistake"):
        record([break_down], 0.0)


# --- the tally -----------------------------------------------------------------------------------


def test_the_tally_tells_who_answered_and_what_was_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("example.tally.PERIOD", 0.0)
    good = json.dumps(Request(1, 2, False, "blue", "", "ann.1"))
    bad = json.dumps(Request(1, 2, False, "", "status 502", "ann.1"))

    assert tell([good, good, bad]) == 1

    assert capsys.readouterr().out.splitlines() == [
        "1 sent, 0 lost; last second: 1 by blue",
        "2 sent, 0 lost; last second: 1 by blue",
        "lost: status 502",
        "3 sent, 1 lost; last second: no answers",
        "3 sent, 1 lost",
    ]


@pytest.mark.parametrize(("error", "code"), [("", 0), ("status 502", 1)])
def test_the_tally_fails_if_something_was_lost(error: str, code: int) -> None:
    line = json.dumps(Request(1, 2, False, "" if error else "blue", error, "ann.1"))
    done = subprocess.run(
        [sys.executable, "-m", "example.tally"], check=False, input=line, text=True, cwd=ROOT
    )
    assert done.returncode == code


# --- the page ------------------------------------------------------------------------------------


@asynccontextmanager
async def open_webapp(directory: Path, name: str) -> AsyncIterator[str]:
    """Start a replica and provide its target."""
    async with open_program(
        directory, sys.executable, str(WEBAPP), "--port=0", f"--name={name}"
    ) as app:
        await app.wait_for("listening on ")
        yield app.output.split()[-1]


def shown(title: str) -> tuple[str, int, int]:
    """Return who is connected, how many messages were answered, and what failed."""
    found = re.fullmatch(r"(\S+): (\d+) answered, (\d+) failed", title)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


@needs_browser
async def test_the_page_goes_on_through_a_deploy() -> None:
    async with (
        open_directory() as directory,
        open_webapp(directory, "v1-a") as old,
        open_webapp(directory, "v2-a") as new,
        open_command(directory) as command,
    ):
        await command.deploy("web", f"--target={old}")
        page = f"http://{LOCALHOST}:{command.port}/page"
        with trio.fail_after(60):
            async with open_browser(page) as home:
                await wait_title(home, lambda title: shown(title)[1] >= 2)
                await command.deploy("web", f"--target={new}", "--drain-timeout=1s")
                title = await wait_title(home, lambda title: shown(title)[0] == "v2-a")
                _, answered, _ = shown(title)
                title = await wait_title(home, lambda title: shown(title)[1] > answered + 1)

    assert shown(title)[0] == "v2-a"
    assert shown(title)[2] == 0, "no request failed"
