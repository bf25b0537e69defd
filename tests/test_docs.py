"""What the documentation shows is what happens: examples run, links lead somewhere, flags exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

import kamal_proxy
from kamal_proxy._fastpath import DROP_REASONS, END_REASONS
from kamal_proxy.cli.arguments import scan
from kamal_proxy.cli.commands import find_command
from kamal_proxy.control.api import _STATUS as STATUSES
from kamal_proxy.control.messages import CertificateDescription, ServiceDescription
from kamal_proxy.http.reasons import Reason
from kamal_proxy.metrics import Metrics
from kamal_proxy.options import DeployOptions
from kamal_proxy.udp.metrics import UdpMetrics
from kamal_proxy.udp.options import UdpDeployOptions
from tests.e2e.programs import needs
from tests.pages import FENCED, PAGES, Example, examples_in
from tests.running import ROOT, Command, Embedded, open_instance

if TYPE_CHECKING:
    from pathlib import Path

    from tests.scripted import Client


# --- the examples of the admin API ---------------------------------------------------------------


def comparable(lines: list[str]) -> list[str]:
    """Leave out times, the proxy's version, and how often something was repeated."""
    timeless = [re.sub(r'"elapsed": [0-9.e-]+', '"elapsed": T', line) for line in lines]
    timeless = [re.sub(r'"version": "[0-9.]+"', '"version": V', line) for line in timeless]
    return [line for i, line in enumerate(timeless) if not i or line != timeless[i - 1]]


@needs("curl", package="curl")
async def test_the_curl_examples_do_what_the_page_says(command: Command) -> None:
    examples = examples_in(ROOT / "docs" / "admin-api.md")
    assert len(examples) > 10
    refusing = socket.socket()
    with refusing:
        refusing.bind(("127.0.0.1", 0))  # and does not listen
        async with open_instance("web") as instance:
            actual = {
                "127.0.0.1:3001": instance.target,
                "127.0.0.1:9": f"127.0.0.1:{refusing.getsockname()[1]}",
            }
            for example in examples:
                await check(example, command.directory / "kamal-proxy.sock", actual)


async def check(example: Example, path: Path, actual: dict[str, str]) -> None:
    text = example.command.replace("curl ", "curl -w '%{stderr}%{http_code}' ", 1)
    for shown, real in actual.items():
        text = re.sub(rf"{re.escape(shown)}\b", real, text)
    with trio.fail_after(60):
        done = await trio.run_process(
            ["bash", "-c", text],
            env={**os.environ, "SOCKET": str(path)},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    output = done.stdout.decode()
    for shown, real in actual.items():
        output = output.replace(real, shown)

    assert (done.returncode, done.stderr.decode()) == (0, example.comment), example.command
    assert comparable(output.splitlines()) == comparable(example.output or []), example.command


def fields_of(options: type, prefix: str = "") -> set[str]:
    """Return the paths of all fields of a class of options, as JSON has them."""
    found: set[str] = set()
    for field in attrs.fields(attrs.resolve_types(options)):
        if attrs.has(field.type):
            found |= fields_of(field.type, f"{prefix}{field.name}.")
        else:
            found.add(prefix + field.name)
    return found


@pytest.mark.parametrize(
    ("heading", "options", "elsewhere"),
    [
        ("Deploy", DeployOptions, {"service"}),
        ("Deploy a UDP service", UdpDeployOptions, {"service"}),
        ("List", ServiceDescription, set()),
        ("Certificates", CertificateDescription, set()),
    ],
    ids=["deploy", "deploy-udp", "list", "certificates"],
)
def test_every_field_is_on_the_page(heading: str, options: type, elsewhere: set[str]) -> None:
    text = section("admin-api.md", heading).rpartition("| Field |")[2]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert listed == fields_of(options) - elsewhere


def test_the_codes_of_errors_are_those_of_the_page() -> None:
    text = section("admin-api.md", "Errors")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    # It is told as an invalid option where it belongs to one.
    told = {code: status for code, status in STATUSES.items() if code != "invalid_duration"}
    for code, status in told.items():
        assert rows[code].partition(",")[0] == str(status), code
    assert set(rows) - {"code"} == {*told, "bad_request", "certificate_store", "deploy_failed"}


# --- links ---------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return FENCED.sub("", page.read_text())


def anchors_in(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors_in(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_this_repository_that_are_named_exist(page: Path) -> None:
    roots = "kamal_proxy|tests|docs|example|benchmarks"
    for name in re.findall(rf"`((?:{roots})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


# --- command lines -------------------------------------------------------------------------------


def command_lines(page: Path) -> list[str]:
    """Return what follows the program's name wherever a page shows a command line."""
    text = page.read_text().replace("\\\n", "")
    shown = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
    shown += re.findall(r"^    (\S.*)$", prose(page), re.MULTILINE)
    shown += re.findall(r"`([^`\n]+)`", prose(page))
    lines = []
    for line in shown:
        # What follows is the shell's.
        line = re.split(r" (?:[&|;]|[12]?>)", line)[0]
        start = re.match(
            r"(?:\$ )?(?:\w+=\S+ )*(?:\.venv/bin/|docker compose exec proxy )?kamal-proxy( .*)",
            line,
        )
        if start:
            lines.append(start[1])
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_follow_the_grammar(page: Path) -> None:
    for line in command_lines(page):
        arguments = shlex.split(line, comments=True)
        if arguments and arguments[-1] in ("...", "…"):
            arguments.pop()
        found, rest = find_command(arguments)
        scan(found.grammar, rest)  # raises for an unknown flag and for a malformed value


def test_command_lines_are_found() -> None:
    assert len([line for page in PAGES for line in command_lines(page)]) > 10


# --- versions ------------------------------------------------------------------------------------


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    (latest, *_) = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert latest == kamal_proxy.__version__


# --- the log -------------------------------------------------------------------------------------


async def test_the_fields_of_a_request_are_those_of_the_page(
    proxy: Embedded, client: Client
) -> None:
    page = (ROOT / "docs" / "http.md").read_text()
    table, _, reasons = page.partition("## What is logged")[2].partition("The `reason` is one of")
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`([\w<>]+)`", row)]
    assert listed[-3:] == ["req_<name>", "resp_<name>", "reason"]

    await client.get("/x?y")  # which no service answers
    (line,) = await proxy.lines.wait_requests(1)

    assert list(line) == [*listed[:-3], "reason"]
    words = re.findall(
        r"`([a-z_]+)`[,|\s]", "\n".join(re.findall(r"^\| `.*?\|", reasons, re.MULTILINE))
    )
    assert sorted(words) == sorted(set(Reason) - {Reason.IDLE})


# --- UDP -----------------------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    """Return the text under a heading, up to the next one of its level."""
    text = (ROOT / "docs" / page).read_text()
    found = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert found, f"{page} has no section {heading}"
    return found


def in_first_column(text: str) -> list[str]:
    """Return what tables have in backticks in their first column."""
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]


def test_the_example_of_a_udp_service_runs_and_prints_what_the_page_says(tmp_path: Path) -> None:
    example = section("embedding.md", "A UDP service")
    code, output = (block for _, block in FENCED.findall(example))
    program = tmp_path / "example.py"
    program.write_text(code)

    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == output


def test_every_end_of_a_session_and_every_drop_is_explained() -> None:
    assert sorted(in_first_column(section("udp.md", "Sessions"))) == sorted(END_REASONS)
    assert sorted(in_first_column(section("udp.md", "Dropped datagrams"))) == sorted(DROP_REASONS)


def test_flags_that_are_recommended_exist() -> None:
    text = section("udp.md", "Which flags for which server")
    recommended = re.findall(r"`(--[^`]+)`", re.sub(FENCED, "", text))
    assert len(recommended) > 5
    grammar = find_command(["deploy-udp"])[0].grammar
    for flags in recommended:
        scan(grammar, ["game", "--target=game-1:9999", *shlex.split(flags)])


def test_the_metrics_of_udp_services_are_those_of_the_page() -> None:
    shown: dict[str, set[str]] = {}

    class Shown(Metrics):
        def table(self, name: str, *arguments: Any, **_: Any) -> None:
            _, labels, _ = arguments
            shown[name.removeprefix("kamal_proxy_udp_")] = set(labels)

    UdpMetrics(Shown(), lambda: ())

    text = section("metrics.md", "UDP services")
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge) \| (.*?) \|", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(shown)
    for name, kind, labels in rows:
        # In brackets are the values of the label before.
        assert set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", labels))) == shown[name], name
        assert name.endswith("_total") == (kind == "counter"), name
    items = [item for item in text.split("\n- ") if item.startswith("The `reason`")]
    words = [sorted(set(re.findall(r"`([a-z_]+)`", item)) - {"reason"}) for item in items]
    assert words == [sorted(END_REASONS), sorted(DROP_REASONS)]


# --- the rooms -----------------------------------------------------------------------------------

PACKAGE = ROOT / "kamal_proxy"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def imported_by(path: Path, *, for_types: bool = False) -> set[str]:
    """Return the modules that a module imports at its top level, or only for its types."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    guards = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    nodes = [n for guard in guards for n in guard.body] if for_types else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports name the whole path"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found


def modules() -> dict[str, Path]:
    """Return every module of the package by its path inside it."""
    found = {str(p.relative_to(PACKAGE)): p for p in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 30
    return found


def test_every_room_is_on_the_page_and_every_room_of_the_page_exists() -> None:
    rooms = ARCHITECTURE.read_text().partition("## The rooms")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `([\w/.]+)` \|", rooms, re.MULTILINE))
    real = {
        name
        for name in modules()
        if not name.startswith("cli/") and not name.endswith(("/__init__.py", "__main__.py"))
    }

    assert listed == real | {"cli/", "_fastpath.pyx"}


def test_pure_modules_do_no_io_and_read_no_clock() -> None:
    text = ARCHITECTURE.read_text().partition("Arrows point down")[2]
    pure = re.findall(r"`([\w/]+\.py)`", text.partition("do no IO")[0])
    impure = {"trio", "socket", "ssl", "time", "random", "select", "subprocess", "threading"}
    assert len(pure) > 9

    for name in set(pure) - {"cli/run.py"}:
        imported = {module.partition(".")[0] for module in imported_by(PACKAGE / name)}
        assert not imported & impure, name
        ours = {m for m in imported_by(PACKAGE / name) if m.startswith("kamal_proxy.")}
        assert not ours & {"kamal_proxy.sockets", "kamal_proxy.deployment"}, name


def test_arrows_point_down() -> None:
    server = ("proxy", "process", "services", "sockets", "http", "deployment", "control.api")
    for name, path in modules().items():
        imported = imported_by(path)
        every = imported | imported_by(path, for_types=True)

        def among(names: tuple[str, ...], imported: set[str]) -> list[str]:
            starts = tuple(f"kamal_proxy.{n}" for n in names)
            return [
                m for m in imported if m in starts or m.startswith(tuple(s + "." for s in starts))
            ]

        if name.startswith("cli/") or name in ("control/client.py", "control/messages.py"):
            assert not among(server, every), name
        if name not in ("process.py", "__init__.py"):
            assert not among(("proxy",), every), name
        assert not among(("process",), every), name
        if not name.startswith(("cli/", "__main__")):
            assert not among(("cli",), every), name
        if name in ("deployment.py", "balancer.py", "health.py", "state.py", "state_format.py"):
            assert not among(("http", "control", "services", "router"), every), name
        if name.startswith("http/"):
            assert not among(("control", "services"), every), name
        if name == "sockets.py":
            users = ("http", "control", "services", "deployment")
            options = ("options", "run_options", "target_options")
            assert not among(users + options, every), name
