"""Which command runs, and every sentence and exit code a wrong command line gets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

Command = Callable[..., tuple[int, str, str]]
SERVER_SIDE = [
    "trio", "h11", "rich", "asyncio", "kamal_proxy.proxy", "kamal_proxy.process",
    "kamal_proxy.control.api", "kamal_proxy._fastpath",
]  # fmt: skip
USAGE = "Run 'kamal-proxy --help' for usage.\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["deploy"], "accepts 1 arg(s), received 0"),
        (["deploy", "a", "b"], "accepts 1 arg(s), received 2"),
        (["deploy", "a", "--target=xx", "--tls", "false"], "accepts 1 arg(s), received 2"),
        (["deploy", "--", "a", "--target=a:1"], "accepts 1 arg(s), received 2"),
        (["deploy", "--target", "--help"], "accepts 1 arg(s), received 0"),
        (["deploy", "--tls-certificate-path=x"], "accepts 1 arg(s), received 0"),
        (["deploy", "a"], 'required flag(s) "target" not set'),
        (["deploy", "--", "--help"], 'required flag(s) "target" not set'),
        (["deploy", "a", "--tls-private-key-path=x"], 'required flag(s) "target" not set'),
        (["deploy", "a", "--target"], "flag needs an argument: --target"),
        (["deploy", "a", "--nope"], "unknown flag: --nope"),
        (["deploy", "--help", "--nope"], "unknown flag: --nope"),
        (
            ["deploy", "a", "--target=xx", "--tls-certificate-path=x"],
            "if any flags in the group [tls-certificate-path tls-private-key-path] are set they "
            "must all be set; missing [tls-private-key-path]",
        ),
        (
            ["deploy", "a", "--target=xx", "--tls-private-key-path="],
            "if any flags in the group [tls-certificate-path tls-private-key-path] are set they "
            "must all be set; missing [tls-certificate-path]",
        ),
        (
            ["deploy", "a", "--max-request-body=4", "--max-response-body=4", "--tls"],
            "max-request-body can only be set when request buffering is enabled",
        ),
        (
            ["deploy", "a", "--max-response-body=0", "--tls"],
            "max-response-body can only be set when response buffering is enabled",
        ),
        (["deploy", "a", "--tls"], "service options invalid: host must be set when using TLS"),
        (
            ["deploy", "a", "--tls", "--host=a", "--path-prefix=/x"],
            "service options invalid: TLS settings must be specified on the root path service",
        ),
        (
            ["deploy", "a", "--target=xx", "--tls", "--host=*.a.com"],
            "automatic TLS does not support wildcards",
        ),
        (["deploy", "a", "--target="], "at least one target is required"),
        (["deploy", "a", "--target=ho:1,x"], "x :invalid host pattern"),
        (["remove"], "accepts 1 arg(s), received 0"),
        (["rm", "a", "b"], "accepts 1 arg(s), received 2"),
        (["remove", "a", "--target=x"], "unknown flag: --target"),
        (["list", "extra"], 'unknown command "extra" for "kamal-proxy list"'),
        (["ls", "--", "-x"], 'unknown command "-x" for "kamal-proxy list"'),
        (["--version"], "unknown flag: --version"),
        (["--nope"], "unknown flag: --nope"),
        (["--debug", "run"], "unknown flag: --debug"),
        (["-x"], "unknown shorthand flag: 'x' in -x"),
        (["help", "--nope"], "unknown flag: --nope"),
        (["pause", "x"], "pause is not supported yet by this version of kamal-proxy"),
        (["stop", "x"], "stop is not supported yet by this version of kamal-proxy"),
        (["resume", "x"], "resume is not supported yet by this version of kamal-proxy"),
        (["rollout", "set"], "rollout is not supported yet by this version of kamal-proxy"),
        (["help", "pause"], "pause is not supported yet by this version of kamal-proxy"),
    ],
)
def test_refused(command: Command, argv: list[str], message: str) -> None:
    assert command(*argv) == (1, "", f"Error: {message}\n")


@pytest.mark.parametrize(
    ("word", "suggestions"),
    [
        ("bogus", []),
        ("a", []),
        ("hel", []),
        ("lis", ["list"]),
        ("LIST", ["list"]),
        ("depl", ["deploy"]),
        ("deploi", ["deploy"]),
        ("remov", ["remove"]),
        ("r", ["run", "remove"]),
        ("l" * 10_000, []),
    ],
)
def test_unknown_command(command: Command, word: str, suggestions: list[str]) -> None:
    near = "".join(f"\t{name}\n" for name in suggestions)
    block = f"\nDid you mean this?\n{near}\n" if near else ""
    assert command(word, "--help") == (
        1, "", f'Error: unknown command "{word}" for "kamal-proxy"\n{block}{USAGE}'
    )  # fmt: skip


@pytest.mark.parametrize(
    "argv", [[], [""], ["help"], ["-h"], ["--help"], ["--help=false"], ["-h", "x"], ["--", "list"]]
)
def test_help_of_the_program(command: Command, argv: list[str]) -> None:
    code, out, err = command(*argv)
    assert (code, err) == (0, "")
    assert out.splitlines()[2:] == [
        "Usage:",
        "  kamal-proxy [command]",
        "",
        "Commands:",
        "  deploy    Deploy a service, or a new version of one, without losing a request",
        "  help      Show help for a command",
        "  list      List the services and where their requests go",
        "  remove    Remove a service",
        "  run       Run the proxy",
        "",
        "Flags:",
        "  -h, --help   Show this help for kamal-proxy",
        "",
        "'kamal-proxy help [command]' says more about a command.",
    ]


@pytest.mark.parametrize(
    "argv", [["rm", "-h"], ["help", "rm"], ["help", "remove", "extra"], ["remove", "a", "b", "-h"]]
)
def test_help_of_a_command(command: Command, argv: list[str]) -> None:
    assert command(*argv) == (
        0,
        "Remove a service\n\n"
        "Its hosts and paths are free again at once; requests in flight are not waited for.\n\n"
        "Usage:\n  kamal-proxy remove <service> [flags]\n\n"
        "Aliases:\n  remove, rm\n\n"
        "Flags:\n  -h, --help   Show this help for remove\n",
        "",
    )


def test_help_of_deploy_lists_every_flag(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = command("help", "deploy")
    lines = out.split("Flags:\n")[1].splitlines()
    assert code == 0
    assert len(lines) == 37
    names = [line[6:].split()[0] for line in lines]
    assert names == sorted(names)
    assert (
        "      --drain-timeout duration             How long requests on the old targets may take "
        "to finish (default 30s)" in lines
    )
    assert '"/up"' in next(line for line in lines if "--health-check-path" in line)
    assert "default" not in next(line for line in lines if "--force" in line)
    marked = {line.split()[0] for line in lines if line.endswith("[not supported yet]")}
    assert {"--tls", "--buffer-requests", "--read-target"} <= marked
    assert not marked & {"--target", "--host", "--force", "--forward-headers"}


def test_help_is_as_wide_as_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command("deploy", "--help")
    assert max(map(len, out.splitlines())) <= 80


def test_help_on_nothing_known(command: Command) -> None:
    code, out, err = command("help", "nope", "x")
    assert (code, out) == (0, "")
    assert err.startswith("There is no help for 'nope x'.\n\nUsage:\n")


def test_help_switched_off_runs_the_command(command: Command, tmp_path: Path) -> None:
    assert command("--help=false", "list", "-h=false") == (
        1,
        "",
        f"Error: dial unix {tmp_path}/kamal-proxy.sock: connect: no such file or directory\n",
    )


def _process(
    *argv: str | bytes, environment: dict[str, str] | None = None, program: str | None = None
) -> subprocess.CompletedProcess[bytes]:
    start = ["-m", "kamal_proxy"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *start, *argv],
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, **(environment or {})},
    )


def test_the_module_runs_as_a_program() -> None:
    done = _process("deploy", "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b'Error: required flag(s) "target" not set\n'


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "nonsense"])
def test_utf8_survives_every_locale(locale: str) -> None:
    done = _process("né\u2028", environment={"LC_ALL": locale, "PYTHONIOENCODING": "latin-1"})
    assert done.stderr.splitlines()[0].decode() == (
        'Error: unknown command "né\\u2028" for "kamal-proxy"'
    )


def test_bytes_that_are_not_utf8_are_shown() -> None:
    assert _process(b"--\xff\xc3\xa9").stderr == b"Error: unknown flag: --\\udcff\xc3\xa9\n"


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "kamal_proxy", "help"],
            stdout=out, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_is_no_traceback() -> None:
    program = (
        "import os, signal, sys\n"
        "from kamal_proxy.cli import main\n"
        "import kamal_proxy.control.client as client\n"
        "client.ControlClient.services = lambda self: signal.raise_signal(signal.SIGINT)\n"
        "sys.exit(main(['list']))"
    )
    done = _process(program=program)
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr == b"Error: interrupted; what the proxy has begun, it finishes\n"


@pytest.mark.parametrize("argv", [["list"], ["deploy", "a", "--target=xx"], ["rm", "a"], ["help"]])
def test_commands_import_nothing_of_the_server(argv: list[str]) -> None:
    program = (
        "import sys\n"
        "from kamal_proxy.cli import main\n"
        "import kamal_proxy.control.client as client\n"
        "client.START_WAIT = 0.0\n"
        f"main({argv!r})\n"
        f"heavy = set({SERVER_SIDE!r})\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    assert _process(program=program).stdout.decode().splitlines()[-1] == "heavy: []"
