"""What is offered for the word before the cursor, in cobra's protocol."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.cli import completion
from kamal_proxy.cli.commands import COMMANDS
from kamal_proxy.cli.completion import complete
from kamal_proxy.control.client import ControlClient
from kamal_proxy.udp.options import DRAIN_STRATEGIES
from tests.cli.test_grammar import TEXTS
from tests.e2e.programs import needs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import ScriptedProxy

Run = Callable[..., tuple[int, str, str]]

FILES, NOTHING, DIRECTORIES = 0, 4, 16
SERVICES = [
    {"name": "api", "hosts": ["a.example", "b.example"], "state": "paused"},
    {"name": "game", "udp_ports": ["udp/9999"]},
    {"name": "shop"},
    {"name": "shop", "udp_ports": ["udp/1"]},
    {"name": "--force"},
]


def offered(run: Run, *words: str) -> tuple[list[str], int]:
    """Return the candidates for the last word, and the number that says what else may stand."""
    code, out, err = run("__completeNoDesc", *words)
    assert (code, err) == (0, "")
    *candidates, last = out.splitlines()
    assert last.startswith(":")
    return candidates, int(last[1:])


def members(words: str) -> list[str]:
    return [c.name for c in COMMANDS if c.words and c.words.rpartition(" ")[0] == words]


# --- commands and flags --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ([], members("")),
        ([""], members("")),
        (["dep"], ["deploy", "deploy-udp"]),
        (["r"], ["run", "remove", "rm", "resume", "rollout"]),
        (["ls"], ["ls"]),
        (["nope"], []),
        (["nope", ""], []),
        (["rollout", ""], members("rollout")),
        (["rollout", "s"], ["set", "stop"]),
        (["rollout", "bogus", ""], []),
        (["certs", "l"], ["list", "ls"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["completion", "powershell", ""], []),
        (["--help=false", "lis"], ["list"]),
        (["help", ""], members("")),
        (["help", "rol"], ["rollout"]),
        (["help", "rollout", "d"], ["deploy"]),
        (["help", "list", ""], []),
        (["help", "nope", ""], []),
    ],
)
def test_commands(command: Run, line: list[str], candidates: list[str]) -> None:
    assert offered(command, *line) == (candidates, NOTHING)


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        (["-"], ["--help", "-h"]),
        (["rollout", "-"], ["--help", "-h"]),
        (["stop", "-"], ["--help", "-h", "--drain-timeout", "--message"]),
        (["stop", "a", "--d"], ["--drain-timeout"]),
        (["stop", "--m"], ["--message"]),
        (["stop", "--message", "a", "--m"], []),
        (["deploy", "--target=a", "--tar"], ["--target", "--target-timeout"]),
        (["deploy", "--tls", "--tls"], [
            "--tls-on-demand-url", "--tls-staging", "--tls-certificate-path",
            "--tls-private-key-path", "--tls-acme-cache-path", "--tls-client-ca", "--tls-redirect",
        ]),
        # Where no more words are taken, flags are offered unasked.
        (["stop", "a", ""], ["--help", "--drain-timeout", "--message"]),
        (["list", ""], ["--help", "--json"]),
        (["list", "--json", ""], ["--help"]),
        (["stop", "a", "x"], []),
        (["stop", "a", "--", ""], []),
        (["stop", "a", "--", "-"], []),
        (["deploy", "--nope", "-"], []),
        (["deploy", "--nope=1", ""], []),
    ],
)  # fmt: skip
def test_flags(command: Run, line: list[str], candidates: list[str]) -> None:
    assert offered(command, *line) == (candidates, NOTHING)


@pytest.mark.parametrize(
    ("line", "candidates", "others"),
    [
        (["deploy-udp", "--protocol", ""], ["udp", "webrtc"], NOTHING),
        (["deploy-udp", "--protocol="], ["udp", "webrtc"], NOTHING),
        (["deploy-udp", "--protocol=w"], ["webrtc"], NOTHING),
        (["deploy-udp", "--affinity-strategy", "s"], ["source-ip", "source-port"], NOTHING),
        (["deploy-udp", "--drain-strategy="], list(DRAIN_STRATEGIES), NOTHING),
        (["deploy-udp", "--rtcp-policy", "a"], ["adjacent", "auto"], NOTHING),
        (["deploy-udp", "--health-check", ""], ["tcp", "http", "none"], NOTHING),
        (["deploy", "--tls="], ["true", "false"], NOTHING),
        (["deploy", "--tls=f"], ["false"], NOTHING),
        (["run", "--http3="], ["true", "false"], NOTHING),
        (["deploy", "--error-pages", ""], [], DIRECTORIES),
        (["deploy", "--error-pages=/x"], [], DIRECTORIES),
        (["deploy", "--tls-certificate-path="], [], FILES),
        (["deploy", "--tls-private-key-path", "x"], [], FILES),
        (["run", "--spill-directory", "/"], [], DIRECTORIES),
        (["run", "--acme-ca-file="], [], FILES),
        # Values that nobody can know, also such as would be refused, and such as look like flags.
        (["deploy", "--host", ""], [], NOTHING),
        (["deploy", "--host", "--"], [], NOTHING),
        (["deploy", "--nope="], [], NOTHING),
        (["deploy", "--deploy-timeout=x", "--error-pages="], [], DIRECTORIES),
        (["deploy", "--message", "--error-pages="], [], NOTHING),
        (["rm", "--", "--help="], [], NOTHING),
    ],
)
def test_values(command: Run, line: list[str], candidates: list[str], others: int) -> None:
    assert offered(command, *line) == (candidates, others)


# --- what the proxy has --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        (["rm", ""], ["api", "game", "shop"]),
        (["remove", "s"], ["shop"]),
        (["pause", "--max-pause", "1m", ""], ["api", "game", "shop"]),
        (["resume", "g"], ["game"]),
        (["rm", "--", ""], ["api", "game", "shop", "--force"]),
        (["rm", "--", "-"], ["--force"]),
        (["deploy", ""], ["api", "shop"]),
        (["deploy", "--target=a", "sh"], ["shop"]),
        (["rollout", "set", ""], ["api", "shop"]),
        (["deploy-udp", ""], ["game", "shop"]),
    ],
)
def test_names_of_services(
    command: Run, proxy: ScriptedProxy, line: list[str], candidates: list[str]
) -> None:
    proxy.answer_json(200, {"services": SERVICES})
    assert offered(command, *line) == (candidates, NOTHING)
    assert proxy.requests == [("GET", "/v1/services", None)]


def test_names_come_with_what_they_are(command: Run, proxy: ScriptedProxy) -> None:
    proxy.answer_json(200, {"services": SERVICES})
    assert command("__complete", "rm", "")[1] == (
        "api\tpaused, a.example, b.example\ngame\trunning, udp/9999\nshop\trunning, all hosts\n:4\n"
    )


def test_hosts_whose_certificates_are_obtained(command: Run, proxy: ScriptedProxy) -> None:
    proxy.answer_json(
        200,
        {"certificates": [{"host": "a.example", "state": "failing"},
                          {"host": "b.example,c.example", "source": "file"}]},
    )  # fmt: skip
    assert command("__complete", "certs", "renew", "")[1] == "a.example\tfailing\n:4\n"


def test_a_name_that_would_end_the_line_is_not_offered(command: Run, proxy: ScriptedProxy) -> None:
    names = ["a\nb", "a\tb", "a\x1b[2Jb", "a\u2028b", "ab"]
    services: list[dict[str, Any]] = [{"name": name} for name in names]
    services[-1]["hosts"] = ["x\ny\x1b"]
    proxy.answer_json(200, {"services": services})
    assert command("__complete", "rm", "")[1] == "ab\trunning, x\\ny\\x1b\n:4\n"


@pytest.mark.parametrize(
    "name",
    ["$(x)", "`x`", "a;b", "a&b", "a|b", "a<b", "a'b", 'a"b', "a\\b", "a*", "a?", "[a]", "{a,b}",
     "~a", "=a", "#a", "!a", "a!b", "a^b", "a b", "a,b", "é"],
)  # fmt: skip
def test_scripts_of_the_original_get_no_name_that_a_shell_could_evaluate(
    command: Run, proxy: ScriptedProxy, name: str
) -> None:
    names = [name, "a-b_c.d:e@f%g+h", "--force"]
    for words in ("__complete", "__completeNoDesc"):
        proxy.answer_json(200, {"services": [{"name": each} for each in names]})
        candidates = command(words, "rm", "--", "")[1].splitlines()[:-1]
        assert [each.partition("\t")[0] for each in candidates] == names[1:]
    for words in ("__completeQuoting", "__completeQuotingNoDesc"):
        proxy.answer_json(200, {"services": [{"name": each} for each in names]})
        candidates = command(words, "rm", "--", "")[1].splitlines()[:-1]
        assert [each.partition("\t")[0] for each in candidates] == names


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"]
)
def test_a_proxy_that_answers_nonsense_is_passed_over(
    command: Run, proxy: ScriptedProxy, answer: bytes
) -> None:
    proxy.answers.append(answer)
    assert offered(command, "rm", "") == ([], NOTHING)
    assert len(proxy.requests) == 1


def test_no_proxy_is_passed_over_and_not_waited_for(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamal_proxy.control.client.START_WAIT", 1e9)
    assert offered(command, "rm", "") == ([], NOTHING)


def test_a_silent_proxy_is_not_waited_for_without_end(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completion.REPLY_TIMEOUT <= 1.0
    monkeypatch.setattr(completion, "REPLY_TIMEOUT", 0.01)
    monkeypatch.setattr("kamal_proxy.control.client.REPLY_TIMEOUT", 1e9)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "kamal-proxy.sock"))
        listener.listen()
        assert offered(command, "rm", "") == ([], NOTHING)


def test_flags_are_offered_without_asking_the_proxy(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ControlClient) -> list[Any]:
        raise AssertionError("it was asked")

    monkeypatch.setattr(ControlClient, "services", refuse)
    assert offered(command, "stop", "--m") == (["--message"], NOTHING)


# --- the protocol --------------------------------------------------------------------------------


def test_descriptions_stand_behind_a_tab(command: Run) -> None:
    assert command("__complete", "certs", "") == (
        0,
        "list\tList the certificates, when they expire and when they will be renewed\n"
        "renew\tObtain a new certificate for a host now, before it is due\n"
        ":4\n",
        "",
    )
    assert command("__complete", "rollout", "stop", "a", "")[1] == (
        "--help\tShow this help for stop\n:4\n"
    )
    assert "rm\tThe same as remove\n" in command("__complete", "rm")[1]


@pytest.mark.fuzz
@given(st.lists(TEXTS, max_size=6))
def test_whatever_was_typed_there_is_an_answer(line: list[str]) -> None:
    found = complete(line)
    typed = line[-1] if line else ""
    typed = typed.partition("=")[2] if typed.startswith("--") and "=" in typed else typed
    assert all(candidate.text.startswith(typed) for candidate in found.candidates)
    assert found.others in (FILES, NOTHING, DIRECTORIES)


# --- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_a_script_is_what_its_shell_can_read(command: Run, shell: str) -> None:
    code, out, err = command("completion", shell)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("#")
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    done = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_a_script_asks_for_descriptions_unless_told_not_to(command: Run, shell: str) -> None:
    _, out, _ = command("completion", shell)
    _, bare, _ = command("completion", shell, "--no-descriptions")
    assert ("__completeQuoting " in out) is (shell != "bash")  # which shows none
    assert "__completeQuoting " not in bare
    assert "__completeQuotingNoDesc " in bare


@needs("shellcheck", package="shellcheck")
def test_shellcheck_finds_nothing(command: Run) -> None:
    _, out, _ = command("completion", "bash")
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "--format=json", "-"],
        input=out, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout) == []
