"""What pages of the documentation show and no test can run is at least possible.

Each block of code is one that is run, by ``tests/e2e/test_pages.py``, or one that is looked at
here: a new kind of block fails a test until somebody says what becomes of it.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import yaml

import kamal_proxy
from kamal_proxy.cli.arguments import scan
from kamal_proxy.cli.commands import find_command
from kamal_proxy.udp import state_format
from tests.pages import ELSEWHERE, PAGES, ROOT, TEXTS, Block, Example, blocks_in, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCKS = [block for page in PAGES for block in blocks_in(page)]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What `kamal`, `systemctl` and `docker` are asked to do on these pages, after a look at their help.
VERBS: dict[str, set[tuple[str, ...]]] = {
    "kamal": {
        ("deploy",),
        ("setup",),
        ("proxy", "boot"),
        ("proxy", "details"),
        ("proxy", "logs"),
        ("proxy", "reboot"),
    },
    "systemctl": {("daemon-reload",), ("enable",), ("restart",), ("status",), ("stop",)},
    "docker": {
        ("build",),
        ("compose",),
        ("container", "inspect"),
        ("cp",),
        ("exec",),
        ("inspect",),
        ("kill",),
        ("logs",),
        ("network", "create"),
        ("push",),
        ("run",),
        ("start",),
        ("stop",),
    },
}
# Keys of `proxy.run` that Kamal knows, and the oldest proxy that it works with.
RUN_KEYS = {
    *("http_port", "https_port", "bind_ips", "publish", "metrics_port", "debug", "log_max_size"),
    *("registry", "repository", "version", "options"),
}
OLDEST = (0, 9, 2)


def examples() -> list[tuple[Block, Example]]:
    return [(block, example) for block in BLOCKS for example in block.examples]


def commands_of(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yield where a program is called, and its arguments."""
    for block, example in examples():
        if example.program == program:
            yield f"{block.name}:{example.line}: {example.command}", example.words[1:]


def check_grammar(arguments: list[str]) -> None:
    """Raise an error if they are no command line of ours."""
    command, rest = find_command(arguments)
    scan(command.grammar, rest)


def check_variable(pair: str) -> None:
    """Raise an error if it sets nothing of ``run``."""
    name, _, value = pair.partition("=")
    flag = name.removeprefix("KAMAL_PROXY_").lower().replace("_", "-")
    assert name.startswith("KAMAL_PROXY_"), pair
    check_grammar(["run", f"--{flag}={value}"])


def parsed(language: str) -> list[Block]:
    found = [block for block in BLOCKS if block.language == language]
    assert found
    return found


# --- nothing is left over ------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_known_to_be_none_to_run(page: Path) -> None:
    for block in blocks_in(page):
        assert block.language in ("console", "sh", *TEXTS), f"{block.where}: {block.language}"
        assert block.examples or block.language in TEXTS, f"{block.where}: no commands"
        if block.language in ("", "text"):  # no command hides there
            assert not re.search(r"^(\$ |kamal-proxy |docker |sudo )", block.text, re.MULTILINE), (
                block.where
            )
        if block.not_run:
            assert block.examples, f"{block.where}: there is nothing to run"


def test_programs_that_no_test_runs_are_on_the_pages() -> None:
    """A list that outlives its reasons would let new commands through."""
    used = {example.program for _, example in examples()}
    assert used >= set(ELSEWHERE)


# --- programs that no test runs ------------------------------------------------------------------


def test_targets_of_make_exist_and_its_variables_are_used() -> None:
    called = list(commands_of("make"))
    assert called
    for where, words in called:
        for word in words:
            name, assigned, _ = word.partition("=")
            pattern = rf"\$\({name}\)|^export {name}\b" if assigned else rf"^{name}:"
            assert re.search(pattern, MAKEFILE, re.MULTILINE), where


@pytest.mark.parametrize("program", VERBS)
def test_what_programs_are_asked_to_do_they_can(program: str) -> None:
    for where, words in commands_of(program):
        verbs = tuple(word for word in words[:2] if not word.startswith("-"))
        assert verbs[:1] in VERBS[program] or verbs in VERBS[program], where


def test_containers_of_the_proxy_are_run_as_kamal_runs_them() -> None:
    found = 0
    for where, words in commands_of("docker"):
        if not (words[0] == "run" and "--detach" in words and "kamal-proxy:" in where):
            continue
        found += 1
        place = next(i for i, word in enumerate(words) if re.search(r"/?kamal-proxy:", word))
        version = words[place].rpartition(":")[2]
        assert re.fullmatch(r"v?\d+(\.\d+)*", version), f"{where}: Kamal can't compare {version}"
        assert tuple(map(int, version.removeprefix("v").split("."))) >= OLDEST, where
        options = " ".join(words[:place]).replace("=", " ")
        assert "--name kamal-proxy" in options, where
        assert "--volume kamal-proxy-config:/home/kamal-proxy/.config/kamal-proxy" in options, where
        assert "--restart unless-stopped" in options, where
        assert "--network host" in options or (
            "--network kamal" in options and "--publish 80:80 --publish 443:443" in options
        ), where
        if command := words[place + 1 :]:
            assert command[:2] == ["kamal-proxy", "run"], where
            check_grammar(command[1:])
    assert found


def test_commands_in_the_container_are_commands() -> None:
    found = 0
    for where, words in commands_of("docker"):
        if words[0] == "exec":
            assert words[1] == "kamal-proxy", where
            if words[2] == "kamal-proxy":
                check_grammar(words[3:])
                found += 1
    for _, words in commands_of("sudo"):
        if words[0] == "kamal-proxy":
            check_grammar(words[1:])
    assert found


def test_settings_of_the_kernel_exist() -> None:
    # Connection tracking's are there once somebody uses it; older kernels show the others in the
    # first network namespace only, and this may be a container.
    hidden = {"net.core.rmem_max", "net.core.wmem_max", "net.core.netdev_max_backlog"}
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"\bnet\.(?:core|ipv4|netfilter)\.\w+", text))
    assert len(named) > 8
    for name in named - hidden:
        known = Path("/proc/sys", name.replace(".", "/")).exists()
        assert known or name.startswith("net.netfilter.nf_conntrack_"), name


def test_what_pip_installs_is_this_package() -> None:
    found = 0
    for page in PAGES:
        for line in re.findall(r"\bpip install ([^\n`]+)", page.read_text()):
            for name, extra in re.findall(r"\b(kamal[-_]proxy)\b(?:\[(\w+)\])?", line):
                assert name.replace("_", "-") == PROJECT["name"], f"{name_of(page)}: {line}"
                assert not extra or extra in PROJECT["optional-dependencies"], (
                    f"{name_of(page)}: {line}"
                )
                found += 1
    assert found


# --- documents -----------------------------------------------------------------------------------


def test_documents_can_be_read() -> None:
    for block in parsed("yaml"):
        assert isinstance(yaml.safe_load(block.text), dict), block.where
    for block in parsed("json"):
        try:
            json.loads(block.text)
        except ValueError:  # or a document in each line
            for line in block.text.splitlines():
                json.loads(line)
    for block in parsed("ini"):
        text = block.text if block.text.startswith("[") else f"[section]\n{block.text}"
        configparser.ConfigParser().read_string(text, block.where)


def test_what_kamal_is_told_of_the_proxy_it_understands() -> None:
    found = 0
    for block in parsed("yaml"):
        run: dict[str, Any] = yaml.safe_load(block.text).get("proxy", {}).get("run", {})
        if not run:
            continue
        found += 1
        assert set(run) <= RUN_KEYS, block.where
        if "version" in run:
            assert tuple(map(int, run["version"].removeprefix("v").split("."))) >= OLDEST
        options = run.get("options", {})
        for pair in options.get("env", ()):
            check_variable(pair)
        for published in options.get("publish", ()):
            assert re.fullmatch(r"(\S+:)?\d+:\d+/udp", published), f"{block.where}: {published}"
    assert found


def test_scripts_and_files_of_variables_can_be_read() -> None:
    for block in BLOCKS:
        if block.language == "env":
            for line in block.text.splitlines():
                check_variable(line)
        elif block.language == "script":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def test_the_udp_services_of_a_state_file_are_what_the_proxy_reads() -> None:
    (block,) = [block for block in parsed("json") if block.name == "state.md"]
    (service,) = state_format.decode(block.text.encode())
    assert service.name == "game"


def test_programs_compile_and_say_what_the_package_takes() -> None:
    for block in parsed("python"):
        code = re.sub(r"^except\*", "except*", block.text, flags=re.MULTILINE)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
        tree = compile(code, block.where, "exec", flags)
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            called = getattr(kamal_proxy, call.func.id, None)
            if isinstance(called, type) and attrs.has(called):
                known = {field.alias for field in attrs.fields(called)}
                given = {keyword.arg for keyword in call.keywords}
                assert given <= known, f"{block.where}: {call.func.id}"


# --- what the proxy says -------------------------------------------------------------------------


def test_lines_of_the_log_that_are_named_are_written_somewhere() -> None:
    package = ROOT / "kamal_proxy"
    code = "".join(path.read_text() for path in sorted(package.rglob("*.py")))
    named = {text for page in PAGES for text in re.findall(r'`"msg":"([^"]+)"', page.read_text())}
    assert len(named) > 10
    for text in named:
        assert f'"{text}' in code, text


def test_metrics_that_are_named_are_explained() -> None:
    http, udp = (ROOT / "docs" / "metrics.md").read_text().split("\n## UDP services\n")
    known = [
        prefix + name
        for prefix, text in (("", http), ("udp_", udp))
        for name in re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram)", text, re.MULTILINE)
    ]
    assert len(known) > 25
    for page in PAGES:
        for name in re.findall(r"\bkamal_proxy_(\w+)", page.read_text()):
            # Some are the beginning of several.
            beginning = re.sub(r"_(count|sum|bucket)$", "", name)
            assert any(one.startswith(beginning) for one in known), f"{name_of(page)}: {name}"


# --- alerts --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (apt-get install prometheus)",
)
def test_alerts_are_what_prometheus_understands(tmp_path: Path) -> None:
    table = (ROOT / "docs" / "metrics.md").read_text().partition("## What to alert on")[2]
    rows = re.findall(r"^\| ([^|`]+) \| `(.+?)`(.*) \|$", table.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 10
    rules = [
        {
            "alert": re.sub(r"\W+", "_", title),
            "expr": expression.replace(r"\|", "|"),
            **({"for": "1m"} if "for a minute" in rest else {}),
        }
        for title, expression, rest in rows
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "kamal-proxy", "rules": rules}]}))

    done = subprocess.run(
        ["promtool", "check", "rules", str(path)], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout
