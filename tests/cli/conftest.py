"""What the command's tests share: a clean environment, a scripted proxy, a terminal."""

from __future__ import annotations

import json
import os
import socket
import termios
import threading
from typing import TYPE_CHECKING, Any, TextIO

import pytest

from kamal_proxy.control import client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class ScriptedProxy:
    """Listens on a Unix socket, records each request and sends the next of its answers."""

    def __init__(self, path: Path) -> None:
        self.answers: list[bytes] = []
        self.requests: list[tuple[str, str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def answer_events(self, *events: dict[str, Any]) -> None:
        lines = [json.dumps(event).encode() + b"\n" for event in events]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
        self.answers.append(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        )

    def answer_json(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.answers.append(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (status, len(data))
            + data
        )

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as reader:
                method, path, _ = reader.readline().decode().split(" ")
                length = 0
                while (line := reader.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                body = json.loads(reader.read(length)) if length else None
                self.requests.append((method, path, body))
                connection.sendall(self.answers.pop(0))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEBUG", "HTTP_PORT", "HTTPS_PORT", "METRICS_PORT", "UDP_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("COLUMNS", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("KAMAL_PROXY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(client, "START_WAIT", 0.0)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[ScriptedProxy]:
    scripted = ScriptedProxy(tmp_path / "kamal-proxy.sock")
    yield scripted
    scripted.close()


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


Result = tuple[int, str, str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in this process; returns exit code, stdout and stderr."""
    from kamal_proxy.cli import main

    def run(*arguments: str) -> Result:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run
