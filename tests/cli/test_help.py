"""What help says: of every command, in every width, and that it is true."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

from kamal_proxy.cli.arguments import scan
from kamal_proxy.cli.commands import COMMANDS, Command, find_command
from kamal_proxy.cli.manual import PAGES
from tests.running import ROOT

Run = Callable[..., tuple[int, str, str]]

TITLES = ["Usage", "Aliases", "Commands", "Flags", "Examples", "Environment", "Files",
          "Exit status", "See also"]  # fmt: skip
every_command = pytest.mark.parametrize("subject", COMMANDS, ids=lambda command: command.path)


def sections(text: str) -> dict[str, list[str]]:
    """Return the lines of a help text by the title above them; what is first has none."""
    found: dict[str, list[str]] = {"": []}
    for line in text.splitlines():
        if re.fullmatch(r"\S.*:", line):
            found[line[:-1]] = []
        elif line:
            found[list(found)[-1]].append(line)
    return found


@pytest.fixture
def run(
    command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    return command


# --- which page ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [[], [""], ["help"], ["-h"], ["--help"], ["--help=false"], ["-h", "x"], ["--", "list"],
     ["help", ""], ["help", "--", "-x"], ["help", "--", "--", "list"]],
)  # fmt: skip
def test_of_the_program(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.startswith(
        "Switches web and UDP services to new versions without losing a request\n\n"
    )
    assert sections(out)["Usage"] == ["  kamal-proxy [command]"]
    assert sections(out)["Commands"] == [
        "  certs       Look after the certificates of services with TLS",
        "  completion  Print a script with which a shell completes this program's command lines",
        "  deploy      Deploy a service, or a new version of one, without losing a request",
        "  deploy-udp  Deploy a UDP service, or a new version of one",
        "  help        Show help for a command",
        "  list        List the services and where their requests and datagrams go",
        "  pause       Pause a service: new requests wait until it is resumed",
        "  remove      Remove a service",
        "  resume      Resume a service that was paused or stopped",
        "  rollout     Serve some visitors from new targets first",
        "  run         Run the proxy",
        "  stop        Stop a service: new requests get an error page (503) until it is resumed",
    ]
    assert sections(out)["Flags"] == ["  -h, --help   Show this help for kamal-proxy"]
    assert out.endswith("\n\n'kamal-proxy help [command]' says more about a command.\n")


@pytest.mark.parametrize(
    "argv", [["rm", "-h"], ["help", "rm"], ["help", "remove", "extra"], ["remove", "a", "b", "-h"]]
)
def test_of_a_command(run: Run, argv: list[str]) -> None:
    assert run(*argv) == (
        0,
        "Remove a service\n\n"
        "Its hosts and paths are free again at once; requests in flight are not waited for. "
        "A UDP service of that name is removed too: its sessions are cut and its port is free "
        "again. Fails if there is\nneither.\n\n"
        "Usage:\n  kamal-proxy remove <service> [flags]\n\n"
        "Aliases:\n  remove, rm\n\n"
        "Flags:\n  -h, --help   Show this help for remove\n\n"
        "Examples:\n  # Take a service away\n  kamal-proxy remove shop\n\n"
        "Environment:\n"
        "  KAMAL_PROXY_SOCKET        The Unix socket on which the proxy listens for commands\n"
        "  XDG_RUNTIME_DIR, TMPDIR   Without it the socket is kamal-proxy.sock in the first of "
        "these that is set, or in /tmp\n\n"
        "Exit status:\n"
        "  0     It is done\n"
        "  1     It failed; the last line on stderr says why\n"
        "  130   Interrupted with Ctrl-C; what the proxy has begun, it finishes\n"
        "  141   What read the output went away\n\n"
        "See also:\n  kamal-proxy help stop\n  kamal-proxy help deploy\n  kamal-proxy help list\n",
        "",
    )


@pytest.mark.parametrize(
    "argv",
    [["rollout"], ["rollout", "bogus"], ["rollout", "bogus", "set"], ["rollout", "-h"],
     ["rollout", "-h", "set"], ["rollout", "--help=false"], ["rollout", "--", "set", "a"],
     ["rollout", ""], ["help", "rollout"], ["help", "rollout", "bogus"],
     ["help", "--", "rollout", "-x", "set"], ["--help=0", "rollout"]],
)  # fmt: skip
def test_of_a_group(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "Serve some visitors from new targets first"
    assert sections(out)["Usage"] == ["  kamal-proxy rollout [command]"]
    assert sections(out)["Commands"] == [
        "  deploy    Deploy the rollout targets of a service, beside its own",
        "  set       Choose which visitors go to the rollout targets, by their cookie "
        "kamal-rollout",
        "  stop      Send all visitors of a service to its own targets again",
    ]
    assert sections(out)["Flags"] == ["  -h, --help   Show this help for rollout"]
    assert out.endswith("'kamal-proxy help rollout [command]' says more about a command.\n")


@pytest.mark.parametrize(
    "argv",
    [["help", "rollout", "stop"], ["rollout", "stop", "-h"], ["rollout", "--help=1", "stop"],
     ["-h=1", "rollout", "stop", "a", "b"], ["help", "rollout", "stop", "extra"]],
)  # fmt: skip
def test_of_a_command_in_a_group(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.startswith("Send all visitors of a service to its own targets again\n\n")
    assert sections(out)["Usage"] == ["  kamal-proxy rollout stop <service> [flags]"]
    assert sections(out)["Flags"] == ["  -h, --help   Show this help for stop"]


@pytest.mark.parametrize("words", [["nope", "x"], ["completion", "powershell"]])
def test_on_nothing_known(run: Run, words: list[str]) -> None:
    code, out, err = run("help", *words)
    assert (code, out) == (0, "")
    assert err.startswith(f"There is no help for '{' '.join(words)}'.\n\nUsage:\n")
    assert list(sections(err)) == ["", "Usage", "Commands", "Flags"]


@pytest.mark.parametrize("argv", [["completion"], ["help", "completion"], ["completion", "-h"]])
def test_completion_without_a_shell_says_which_there_are(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in sections(out)["Commands"]] == ["bash", "fish", "zsh"]


# --- what is on it -------------------------------------------------------------------------------


@every_command
def test_a_page_is_whole(run: Run, subject: Command) -> None:
    _, out, _ = run("help", *subject.words.split())
    found = sections(out)
    assert "not supported" not in out
    # Every flag is in one group.
    flags = [
        line.partition("--")[2].split()[0]
        for title, lines in found.items()
        for line in lines
        if title not in TITLES[4:] and re.match("  (    |-h, )--", line)
    ]
    assert sorted(flags) == sorted(subject.grammar.flags)
    if "Flags" in found:
        assert set(found) - {""} <= set(TITLES)
    else:
        assert found["Other flags"][-1].split()[:2] == ["-h,", "--help"]
    order = [title for title in found if title in TITLES]
    assert order == sorted(order, key=TITLES.index)
    assert {"Usage", "Examples", "Environment", "Exit status"} <= set(found)


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    assert set(PAGES) == {command.words for command in COMMANDS}


@every_command
def test_examples_can_be_typed_and_related_commands_exist(subject: Command) -> None:
    page = PAGES[subject.words]
    assert page.examples
    for line in page.examples.values():
        assert not re.search('[\\\\"]', line), "what help breaks into lines has no such quotes"
        simple = re.fullmatch(
            r"(?:\w+=\S+ )*(?:source <\()?kamal-proxy(.*?)(?:\)| > \S+| \| source)?", line
        )
        assert simple is not None, line
        arguments = shlex.split(simple[1])
        found, rest = find_command(arguments)
        scan(found.grammar, rest)
    related = [find_command(words.split())[0] for words in page.see_also]
    assert [other.words for other in related] == list(page.see_also)
    assert subject not in related


@every_command
@pytest.mark.parametrize("columns", [60, 80, 132])
def test_it_is_as_wide_as_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, subject: Command, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(*subject.words.split(), "--help")
    assert max(map(len, out.splitlines())) <= columns


def test_a_long_example_is_broken_as_it_may_be_typed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    for name in ("deploy", "stop"):
        examples = "\n".join(sections(run("help", name)[1])["Examples"])
        assert " \\\n    --" in examples
        lines = examples.replace(" \\\n", " ").splitlines()
        typed = [shlex.split(line) for line in lines if not line.startswith("  #")]
        assert typed == [shlex.split(line) for line in PAGES[name].examples.values()]


def test_it_is_plain_text(run: Run) -> None:
    for command in COMMANDS:
        _, out, _ = run("help", *command.words.split())
        assert all(line.isprintable() for line in out.splitlines())


# --- the flags -----------------------------------------------------------------------------------


def test_the_flags_of_deploy_are_in_groups(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = run("help", "deploy")
    found = sections(out)
    lines = found["Switching over"]
    assert (
        "      --drain-timeout duration             How long requests on the old targets may take "
        "to finish (default 30s)" in lines
    )
    assert '"/up"' in next(line for line in found["Health checks"] if "check-path" in line)
    assert "default" not in next(line for line in lines if "--force" in line)
    assert [title for title in found if title not in TITLES] == [
        "", "Where requests go", "TLS", "Switching over", "Health checks",
        "Requests and responses", "Buffering", "Log and metrics", "Other flags",
    ]  # fmt: skip


def test_the_defaults_of_deploy_udp_are_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = run("deploy-udp", "--help")
    about, _, rest = out.partition("Usage:\n")
    assert code == 0
    assert rest.startswith("  kamal-proxy deploy-udp <service> [flags]\n")
    for word in ("session", "drain", "--zero-downtime", "--protocol=webrtc"):
        assert word in about
    shown = dict(re.findall(r"^ +--(\S+) .* \(default (.*?)\)", rest, re.MULTILINE))
    assert shown == {
        "affinity-strategy": '"5-tuple"', "deploy-timeout": "30s", "drain-strategy": '"graceful"',
        "drain-timeout": "30s", "force-kill-timeout": "2m0s", "health-check": '"tcp"',
        "health-check-interval": "1s", "health-check-path": '"/up"', "health-check-timeout": "5s",
        "max-sessions": "10000", "protocol": '"udp"', "rtcp-policy": '"auto"',
        "session-affinity": "true", "session-timeout": "1m0s",
    }  # fmt: skip


@pytest.mark.parametrize("word", ["pause", "stop", "resume", "remove"])
def test_it_says_that_udp_services_are_meant_too(run: Run, word: str) -> None:
    _, out, _ = run("help", word)
    assert "UDP service of that name" in " ".join(out.split())


# --- the page of the documentation ---------------------------------------------------------------


def tables(words: str) -> dict[str, list[tuple[str, str]]]:
    """Return the flags in the tables of a command's section, by the heading above them."""
    page = (ROOT / "docs" / "commands.md").read_text()
    section = page.partition(f"\n## {words}\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### (.+)$", section, flags=re.MULTILINE)
    titles = ["", *parts[1::2]]
    rows = (re.findall(r"^\| `--([\w-]+)(?: ([^`]+))?` \|", p, re.MULTILINE) for p in parts[::2])
    return {title: flags for title, flags in zip(titles, rows, strict=True) if flags}


@pytest.mark.parametrize("words", ["run", "deploy", "deploy-udp", "pause", "stop"])
def test_the_page_lists_every_flag_in_the_same_groups(words: str) -> None:
    declared: dict[str, list[tuple[str, str]]] = {}
    for flag in find_command([words])[0].grammar.flags.values():
        if flag.name != "help":
            declared.setdefault(flag.group, []).append((flag.name, flag.kind.word))
    # Headings are links' targets: those of deploy-udp have more words than the groups of help.
    short = {next((g for g in declared if g and title.startswith(g)), title): rows
             for title, rows in tables(words).items()}  # fmt: skip
    assert {title: sorted(rows) for title, rows in short.items()} == {
        title: sorted(rows) for title, rows in declared.items()
    }
