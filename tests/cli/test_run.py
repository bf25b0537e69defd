"""Where run takes its options from."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy.errors import ListenError
from kamal_proxy.options import RunOptions

if TYPE_CHECKING:
    from pathlib import Path

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    """Put a server in place that only notes its options."""
    options: list[RunOptions] = []

    class Server(ModuleType):
        @staticmethod
        def serve(given: RunOptions) -> None:
            assert gc.isenabled()
            if given.http_port == 1:
                raise ListenError("listen tcp :1: bind: permission denied")
            options.append(given)

    monkeypatch.setitem(sys.modules, "kamal_proxy.process", Server("kamal_proxy.process"))
    return options


@pytest.mark.parametrize(
    ("environment", "argv", "expected"),
    [
        ({}, [], {}),
        ({}, ["extra", "--", "more"], {}),
        ({}, ["--debug", "--http-port", "8080", "--https-port=0x1F"],
         {"debug": True, "http_port": 8080, "https_port": 31}),
        ({"HTTP_PORT": "81", "HTTPS_PORT": "444", "DEBUG": "T"}, [],
         {"http_port": 81, "https_port": 444, "debug": True}),
        ({"KAMAL_PROXY_HTTP_PORT": "82", "HTTP_PORT": "81"}, [], {"http_port": 82}),
        ({"KAMAL_PROXY_HTTP_PORT": "82"}, ["--http-port=83"], {"http_port": 83}),
        ({"KAMAL_PROXY_DEBUG": "1"}, ["--debug=false"], {}),
        ({"KAMAL_PROXY_DEBUG": "0", "DEBUG": "1"}, [], {}),
        ({"HTTP_PORT": "+81"}, [], {"http_port": 81}),
        ({"HTTP_PORT": "0010"}, [], {"http_port": 10}),
        ({"METRICS_PORT": "0"}, [], {}),
        ({}, ["--metrics-port=0", "--http3=false"], {}),
        # A value that is none means the default, even where the plain variable is right.
        ({"KAMAL_PROXY_HTTP_PORT": "", "HTTP_PORT": "81"}, [], {}),
        ({"HTTP_PORT": "0x50", "HTTPS_PORT": "1_0", "DEBUG": "yes", "METRICS_PORT": "1.5"}, [], {}),
        ({"HTTP_PORT": " 81"}, [], {}),
        ({"HTTP_PORT": "9" * 400}, [], {}),
    ],
)  # fmt: skip
def test_options(
    served: list[RunOptions],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    argv: list[str],
    expected: dict[str, Any],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command("run", *argv) == (0, "", "")
    assert served == [
        RunOptions(
            data_directory=tmp_path / "home/.config/kamal-proxy",
            socket_path=tmp_path / "kamal-proxy.sock",
            **expected,
        )
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--http-port=-1"], "http-port -1 must be from 0 to 65535"),
        (["--https-port=65536"], "https-port 65536 must be from 0 to 65535"),
        (["--metrics-port", "9090"],
         "--metrics-port is not supported yet by this version of kamal-proxy"),
        (["--http3"], "--http3 is not supported yet by this version of kamal-proxy"),
        (["--http-port=1"], "listen tcp :1: bind: permission denied"),
        (["--udp-port=1"], "unknown flag: --udp-port"),
    ],
)  # fmt: skip
def test_refused(served: list[RunOptions], command: Command, argv: list[str], message: str) -> None:
    assert command("run", *argv) == (1, "", f"Error: {message}\n")
    assert served == []


def test_a_port_of_the_environment_is_validated(
    served: list[RunOptions], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PORT", "70000")
    assert command("run") == (1, "", "Error: http-port 70000 must be from 0 to 65535\n")
    assert served == []


def test_the_socket_of_the_environment(
    served: list[RunOptions], command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KAMAL_PROXY_SOCKET", str(tmp_path / "own.sock"))
    assert command("run") == (0, "", "")
    assert served[0].socket_path == tmp_path / "own.sock"
