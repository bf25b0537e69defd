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
        (["deploy-udp"], "accepts 1 arg(s), received 0"),
        (["deploy-udp", "a", "b"], "accepts 1 arg(s), received 2"),
        (["deploy-udp", "a", "--target=xx:1", "--zero-downtime", "false"],
         "accepts 1 arg(s), received 2"),
        (["deploy-udp", "a"], 'required flag(s) "target" not set'),
        (["deploy-udp", "a", "--force-kill-timeout=0"], 'required flag(s) "target" not set'),
        (["deploy-udp", "a", "--target="], "at least one target is required"),
        (["deploy-udp", "a", "--host=x"], "unknown flag: --host"),
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
        (["list", "--json=x"], 'invalid argument "x" for "--json" flag: '
         'strconv.ParseBool: parsing "x": invalid syntax'),
        (["pause"], "accepts 1 arg(s), received 0"),
        (["pause", "a", "b"], "accepts 1 arg(s), received 2"),
        (["pause", "a", "--message=b"], "unknown flag: --message"),
        (["pause", "a", "--max-pause=5"], 'invalid argument "5" for "--max-pause" flag: '
         'time: missing unit in duration "5"'),
        (["pause", "a", "--max-pause=-1s"], "max-pause must not be negative"),
        (["pause", "a", "--drain-timeout=-1s"], "drain-timeout must not be negative"),
        (["stop", "a", "--message", "b", "c"], "accepts 1 arg(s), received 2"),
        (["stop", "a", "10s", "hello"], "accepts 1 arg(s), received 3"),
        (["stop", "a", "--max-pause=1s"], "unknown flag: --max-pause"),
        (["stop", "a", "--drain-timeout=-1s"], "drain-timeout must not be negative"),
        (["resume"], "accepts 1 arg(s), received 0"),
        (["resume", "a", "--drain-timeout=1s"], "unknown flag: --drain-timeout"),
        (["resume", ""], "service not found"),
        (["rollout", "--nope"], "unknown flag: --nope"),
        (["rollout", "--x", "1", "set", "a"], "unknown flag: --x"),
        (["--x=1", "rollout", "set"], "unknown flag: --x"),
        (["rollout", "-h=x"], 'invalid argument "x" for "-h, --help" flag: '
         'strconv.ParseBool: parsing "x": invalid syntax'),
        (["rollout", "deploy"], "accepts 1 arg(s), received 0"),
        (["rollout", "deploy", "a"], 'required flag(s) "target" not set'),
        (["rollout", "deploy", "a", "--target="], "at least one target is required"),
        (["rollout", "deploy", "a", "--target=xx", "--force"], "unknown flag: --force"),
        (["rollout", "deploy", "a", "--target=xx", "--read-target=x"], "x :invalid host pattern"),
        (["rollout", "deploy", "a", "--target=xx", "--deploy-timeout=-1s"],
         "deploy-timeout must not be negative"),
        (["rollout", "set"], "accepts 1 arg(s), received 0"),
        (["rollout", "set", "a"],
         "at least one of the flags in the group [percent list] is required"),
        (["rollout", "set", "a", "--percent"], "flag needs an argument: --percent"),
        (["rollout", "set", "a", "--percent=5.5"], 'invalid argument "5.5" for "--percent" flag: '
         'strconv.ParseInt: parsing "5.5": invalid syntax'),
        (["rollout", "set", "a", "--percent=101"], "percent 101 must be from 0 to 100"),
        (["rollout", "set", "a", "--percent", "-1"], "percent -1 must be from 0 to 100"),
        (["rollout", "stop"], "accepts 1 arg(s), received 0"),
        (["rollout", "set", "a", "--percent=1", "b"], "accepts 1 arg(s), received 2"),
        (["-h", "rollout", "set"],
         'unknown command "set" for "kamal-proxy"\nRun \'kamal-proxy --help\' for usage.'),
        (["completion", "powershell"], 'unknown command "powershell" for "kamal-proxy completion"'
         "\n\nThere are:\n\tbash\n\tfish\n\tzsh\n\nRun 'kamal-proxy completion --help' for usage."),
        (["completion", "ba"], 'unknown command "ba" for "kamal-proxy completion"'
         "\n\nDid you mean this?\n\tbash\n\nRun 'kamal-proxy completion --help' for usage."),
        (["completion", "bash", "x"], 'unknown command "x" for "kamal-proxy completion bash"'),
    ],
)  # fmt: skip
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
        ("depl", ["deploy", "deploy-udp"]),
        ("deploy-up", ["deploy-udp"]),
        ("deployudp", ["deploy-udp"]),
        ("deploi", ["deploy"]),
        ("remov", ["remove"]),
        ("r", ["run", "remove", "resume", "rollout"]),
        ("res", ["run", "resume"]),
        ("rollou", ["rollout"]),
        ("rollout-set", []),
        ("sto", ["stop"]),
        ("l" * 10_000, []),
    ],
)
def test_unknown_command(command: Command, word: str, suggestions: list[str]) -> None:
    near = "".join(f"\t{name}\n" for name in suggestions)
    block = f"\nDid you mean this?\n{near}\n" if near else ""
    assert command(word, "--help") == (
        1, "", f'Error: unknown command "{word}" for "kamal-proxy"\n{block}{USAGE}'
    )  # fmt: skip


def test_help_switched_off_runs_the_command(command: Command, tmp_path: Path) -> None:
    for words in (["list"], ["rollout", "stop", "app"]):
        assert command("--help=false", *words, "-h=false") == (
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


@pytest.mark.parametrize(
    "argv",
    [["list"], ["list", "--json"], ["deploy", "a", "--target=xx"],
     ["deploy-udp", "a", "--target=xx:1"], ["rm", "a"], ["pause", "a"],
     ["stop", "a"], ["resume", "a"], ["rollout"], ["rollout", "deploy", "a", "--target=xx"],
     ["rollout", "set", "a", "--percent=1"], ["rollout", "stop", "a"], ["help"],
     ["completion", "bash"], ["__complete", "rm", ""]],
)  # fmt: skip
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
