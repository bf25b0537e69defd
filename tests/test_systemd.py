"""What systemd is told, over real sockets."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from kamal_proxy.systemd import READY, STOPPING, notify

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def listener() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def test_a_state_is_one_datagram(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify(READY)
        notify(STOPPING)
        assert [listener.recv(100) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


def test_a_name_may_be_abstract(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"kamal-proxy-test-{os.getpid()}"
    with listener:
        listener.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify(READY)
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize("name", [None, ""])
def test_without_the_variable_nobody_is_told(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if name is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setattr("kamal_proxy.systemd.socket.socket", refuse)
    notify(READY)


def test_a_socket_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with pytest.raises(FileNotFoundError):
        notify(READY)


def test_a_full_queue_is_not_waited_for_without_end(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamal_proxy.systemd._LIMIT", 0.01)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listener:
        listener.bind(str(tmp_path / "notify"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.connect(str(tmp_path / "notify"))
            with suppress(BlockingIOError):
                while True:
                    other.send(b"x")
        with pytest.raises(TimeoutError):
            notify(READY)
