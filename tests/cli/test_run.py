"""Where run takes its options from."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kamal_proxy.cli.arguments import quote
from kamal_proxy.cli.commands import find_command
from kamal_proxy.errors import ListenError
from kamal_proxy.run_options import RunOptions

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
        ({"UDP_PORT": "9998"}, [], {"udp_port": 9998}),
        ({"KAMAL_PROXY_UDP_PORT": "9999", "UDP_PORT": "9998"}, [], {"udp_port": 9999}),
        ({"KAMAL_PROXY_UDP_PORT": "9999"}, ["--udp-port", "0x2710"], {"udp_port": 10000}),
        ({"UDP_PORT": "many"}, [], {}),
        ({"KAMAL_PROXY_HTTP_PORT": "82"}, ["--http-port=83"], {"http_port": 83}),
        ({"KAMAL_PROXY_DEBUG": "1"}, ["--debug=false"], {}),
        ({"KAMAL_PROXY_DEBUG": "0", "DEBUG": "1"}, [], {}),
        ({"HTTP_PORT": "+81"}, [], {"http_port": 81}),
        ({"HTTP_PORT": "0010"}, [], {"http_port": 10}),
        ({"METRICS_PORT": "0"}, [], {}),
        ({}, ["--metrics-port=0", "--http3=false"], {}),
        ({}, ["--metrics-port", "9090"], {"metrics_port": 9090}),
        ({}, ["--debug", "--metrics-port", "9090"], {"metrics_port": 9090, "debug": True}),
        # A flag is preferred to its variable, which then may hold anything.
        ({"KAMAL_PROXY_HEAD_TIMEOUT": "nonsense"}, ["--head-timeout=5s"], {"head_timeout": 5.0}),
        ({"KAMAL_PROXY_BIND": "192.0.2.1"}, ["--bind="], {"bind": ()}),
        ({"KAMAL_PROXY_SPILL_DIRECTORY": "/x"}, ["--spill-directory="], {}),
        ({"KAMAL_PROXY_SPILL_DIRECTORY": ""}, [], {}),
        ({"KAMAL_PROXY_BIND": ""}, [], {}),
        ({"KAMAL_PROXY_MAX_SPILL": "0"}, [], {"max_spill": 0}),
        # The new ones have no name without the prefix.
        ({"BIND": "192.0.2.1", "HEAD_TIMEOUT": "x", "MAX_HEADERS": "1"}, [], {}),
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
            **{"https_port": 443, **expected},
        )
    ]


SETTINGS: list[tuple[str, str, str, Any]] = [
    ("--bind", "192.0.2.1,2001:db8::1", "bind", ("192.0.2.1", "2001:db8::1")),
    ("--trusted-proxy", "192.0.2.0/24,198.51.100.7", "trusted_proxies",
     ("192.0.2.0/24", "198.51.100.7")),
    ("--proxy-protocol-from", "2001:db8::/32", "proxy_protocol_from", ("2001:db8::/32",)),
    ("--head-timeout", "1m", "head_timeout", 60.0),
    ("--idle-timeout", "1h", "idle_timeout", 3600.0),
    ("--stall-timeout", "500ms", "stall_timeout", 0.5),
    ("--shutdown-timeout", "0", "shutdown_timeout", 0.0),
    ("--max-head-size", "0x2000", "max_head_size", 8192),
    ("--max-headers", "50", "max_headers", 50),
    ("--max-connections", "1_000", "max_connections", 1000),
    ("--max-spill", "5", "max_spill", 5),
    ("--max-buffer-memory", "6", "max_buffer_memory", 6),
    ("--spill-directory", "/var/spill", "spill_directory", Path("/var/spill")),
    ("--http3", "true", "http3", True),
    ("--lane", "false", "lane", False),
    ("--acme-directory", "https://ca.test/dir", "acme.directory", "https://ca.test/dir"),
    ("--acme-email", "ops@a.test", "acme.email", "ops@a.test"),
]  # fmt: skip


@pytest.mark.parametrize("by_variable", [False, True], ids=["flag", "variable"])
@pytest.mark.parametrize(("flag", "text", "field", "value"), SETTINGS)
def test_settings(
    served: list[RunOptions],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    text: str,
    field: str,
    value: object,
    by_variable: bool,
) -> None:
    argv = [f"{flag}={text}"]
    if by_variable:
        monkeypatch.setenv(variable_of(flag), text)
        argv = []
    assert command("run", *argv) == (0, "", "")
    assert attrgetter(field)(served[0]) == value


def test_an_account_of_an_authority(
    served: list[RunOptions], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "c2VjcmV0c2VjcmV0c2VjcmV0"
    monkeypatch.setenv("KAMAL_PROXY_ACME_EAB_HMAC_KEY", secret)
    flags = ["--acme-directory=https://ca.test/d", "--acme-eab-kid=k", "--acme-ca-file=/ca.pem"]
    assert command("run", *flags) == (0, "", "")
    acme = served[0].acme
    assert (acme.eab_key_id, acme.eab_hmac_key, acme.ca_file) == ("k", secret, "/ca.pem")
    assert secret not in repr(served[0])
    code, _, err = command("run", "--acme-email=nobody")
    assert (code, err) == (
        1,
        "Error: acme-email 'nobody' must be one address, such as ops@example.com\n",
    )


def variable_of(flag: str) -> str:
    return "KAMAL_PROXY_" + flag.removeprefix("--").upper().replace("-", "_")


def test_the_table_of_settings_is_complete() -> None:
    declared = {flag.title for flag in find_command(["run"])[0].grammar.flags.values()}
    without_prefix = {"--debug", "--http-port", "--https-port", "--metrics-port", "--udp-port"}
    assert declared == (
        {flag for flag, *_ in SETTINGS}
        | without_prefix
        | {"--acme-ca-file", "--acme-eab-hmac-key", "--acme-eab-kid", "-h, --help"}
    )


def test_repeatable_settings_add_up(served: list[RunOptions], command: Command) -> None:
    assert command("run", "--bind=192.0.2.1", "--bind", "::1,::2") == (0, "", "")
    assert served[0].bind == ("192.0.2.1", "::1", "::2")


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--bind", "a.example",
         "bind 'a.example' is not an IP address (such as 192.0.2.1 or 2001:db8::1)"),
        ("--bind", '"', 'parse error on line 1, column 2: extraneous or missing " in '
         "quoted-field"),
        ("--trusted-proxy", "192.0.2.0/24,x", "trusted-proxy 'x' is not a network (such as "
         "192.0.2.0/24 or 2001:db8::/32)"),
        ("--proxy-protocol-from", "x", "proxy-protocol-from 'x' is not a network (such as "
         "192.0.2.0/24 or 2001:db8::/32)"),
        ("--head-timeout", "30", 'time: missing unit in duration "30"'),
        ("--head-timeout", "", 'time: invalid duration ""'),
        ("--idle-timeout", "0s", "idle-timeout must be more than zero"),
        ("--shutdown-timeout", "-1s", "shutdown-timeout must not be negative"),
        ("--max-headers", "many", 'strconv.ParseInt: parsing "many": invalid syntax'),
        ("--max-head-size", "1", "max-head-size must be at least 1024 bytes"),
        ("--max-spill", "-1", "max-spill must not be negative"),
    ],
)  # fmt: skip
def test_a_bad_variable_is_named(
    served: list[RunOptions],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    value: str,
    reason: str,
) -> None:
    variable = variable_of(flag)
    monkeypatch.setenv(variable, value)
    assert command("run") == (
        1, "", f"Error: invalid value {quote(value)} for {variable}: {reason}\n"
    )  # fmt: skip
    assert served == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--http-port=-1"], "http-port -1 must be from 0 to 65535"),
        (["--https-port=65536"], "https-port 65536 must be from 0 to 65535"),
        (["--bind=example.com"],
         "bind 'example.com' is not an IP address (such as 192.0.2.1 or 2001:db8::1)"),
        (["--trusted-proxy=10.0.0.0/8,10.1.1.1/8"],
         "trusted-proxy '10.1.1.1/8' is not a network (such as 192.0.2.0/24 or 2001:db8::/32); "
         "clear the bits after the prefix"),
        (["--max-connections=0"], "max-connections must be more than zero"),
        (["--head-timeout=30"], 'invalid argument "30" for "--head-timeout" flag: '
         'time: missing unit in duration "30"'),
        (["--http-port=1"], "listen tcp :1: bind: permission denied"),
        (["--udp-port=0"], "udp-port 0 must be from 1 to 65535"),
        (["--udp-port=65536"], "udp-port 65536 must be from 1 to 65535"),
    ],
)  # fmt: skip
def test_refused(served: list[RunOptions], command: Command, argv: list[str], message: str) -> None:
    assert command("run", *argv) == (1, "", f"Error: {message}\n")
    assert served == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HTTP_PORT", "70000", "http-port 70000 must be from 0 to 65535"),
        ("UDP_PORT", "0", "udp-port 0 must be from 1 to 65535"),
    ],
)
def test_a_port_of_the_environment_is_validated(
    served: list[RunOptions],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert command("run") == (1, "", f"Error: {message}\n")
    assert served == []


def test_the_socket_of_the_environment(
    served: list[RunOptions], command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KAMAL_PROXY_SOCKET", str(tmp_path / "own.sock"))
    assert command("run") == (0, "", "")
    assert served[0].socket_path == tmp_path / "own.sock"
