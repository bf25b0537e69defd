"""The layout of the package: which room may know of which, and which rooms are pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kamal_proxy

ROOT = Path(kamal_proxy.__file__).parent

# Lower knows nothing of higher; rooms on one line may know each other only where ALLOWED says so.
# ``control.messages`` and ``logs`` are far down because they are plain data and a plain sink.
LAYERS = [
    {"errors", "_fastpath"},
    {
        "durations",
        "logs",
        "lookups",
        "matching",
        "metrics",
        "networks",
        "proxy_protocol",
        "rules",
        "systemd",
    },
    {"run_options", "target_options", "udp.options", "json_format"},
    {"options"},
    {"balancer", "health", "control.messages", "state_format"},
    {"state", "sockets", "control.client", "probing"},
    {"deployment", "listeners", "tls"},
    {"service"},
    {"router"},
    {"certificates", "saved_routes"},
    {"http", "reports"},
    {"holding", "switching"},
    {"restoring"},
    {"services", "udp"},
    {"all_services"},
    # The admin API and the metrics are served by the project's own HTTP codec.
    {"control.api", "metrics_server"},
    {"proxy"},
    {"process"},
]
CLI_MAY_KNOW = {
    "cli", "errors", "durations", "rules", "options", "run_options", "target_options",
    "udp.options", "control.messages", "control.client",
}  # fmt: skip
PURE = {
    "balancer",
    "control.messages",
    "durations",
    "errors",
    "health",
    "http.client_side",
    "http.codec",
    "http.cookies",
    "http.forwarded",
    "http.h2_codec",
    "http.h2_fields",
    "http.h2_frames",
    "http.h2_guard",
    "http.h2_turns",
    "http.h3_codec",
    "http.headers",
    "http.markup",
    "http.pages",
    "http.stream_heads",
    "http.templates",
    "http.websocket",
    "json_format",
    "matching",
    "networks",
    "options",
    "proxy_protocol",
    "router",
    "rules",
    "run_options",
    "state_format",
    "target_options",
    "tls.hello",
    "tls.schedule",
    "udp.affinity",
    "udp.drains",
    "udp.ice",
    "udp.options",
    "udp.ranges",
    "udp.rtcp",
    "udp.saved_sessions",
    "udp.state_format",
    "udp.stun",
}
IMPURE = {"trio", "socket", "ssl", "time", "random"}
# ``router`` only names Service in types; service.py holds a live Deployment and is not pure.


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    """Return the part of a module's name that the layers speak of."""
    if name.startswith(("http", "cli", "tls", "udp")) and name != "udp.options":
        return name.split(".")[0]
    return name


def imports(name: str, *, types: bool = True, lazy: bool = True) -> set[str]:
    """Return what a module imports: our modules without the package's name, others as they are.

    Args:
        types: Whether imports under ``TYPE_CHECKING`` count.
        lazy: Whether imports inside functions count.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                ours = full.removeprefix("kamal_proxy.") in MODULES
                found.add(full if ours else module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return {each.removeprefix("kamal_proxy.") for each in found}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name in MODULES or name == "_fastpath"}


def layer(name: str) -> int:
    for number, rooms in enumerate(LAYERS):
        if room(name) in rooms:
            return number
    raise AssertionError(f"{name} has no place in the layers")


INSIDE = sorted(
    name for name in MODULES if name not in ("", "__main__", "control") and room(name) != "cli"
)


@pytest.mark.parametrize("name", INSIDE)
def test_arrows_point_down(name: str) -> None:
    for other in ours(imports(name)):
        assert room(other) == room(name) or layer(other) < layer(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name) == "cli"))
def test_the_command_never_loads_the_server(name: str) -> None:
    known = {room(other) for other in ours(imports(name))}
    allowed = CLI_MAY_KNOW | {"process"} if name == "cli.run" else CLI_MAY_KNOW
    assert known <= allowed
    assert "process" not in ours(imports(name, lazy=False))


def test_nothing_but_its_starters_knows_the_proxy() -> None:
    users = {name for name in MODULES if "proxy" in imports(name)}
    assert users <= {"", "process", "cli.run"}
    assert "proxy" not in imports("", types=False), "the public names are loaded on first use"


def test_http_and_udp_do_not_know_each_other() -> None:
    for name in MODULES:
        if room(name) == "http":
            assert not {other for other in ours(imports(name)) if other.startswith("udp")}
        if name.startswith("udp"):
            assert "http" not in {room(other) for other in ours(imports(name))}


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules(name: str) -> None:
    seen: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        found = imports(current, types=False)
        roots = {each.split(".")[0] for each in found}
        assert not roots & IMPURE, f"{name}, through {current}"
        todo += [each for each in ours(found) if each in MODULES]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_owns(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring
    assert not name.split(".")[-1].startswith(("util", "helper"))


def run(script: str) -> str:
    """Return what a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["kamal_proxy", "kamal_proxy.cli", "kamal_proxy.cli.commands", "kamal_proxy.control.client"],
)
def test_a_command_starts_without_the_server(module: str) -> None:
    script = (
        f"import sys, {module}\n"
        "server = {'trio', 'h11', 'h2', 'cryptography', 'acme', 'requests',\n"
        "          'kamal_proxy.proxy', 'kamal_proxy.http', 'kamal_proxy.tls'}\n"
        "print(*sorted(server & set(sys.modules)))"
    )
    assert run(script) == ""


def test_a_proxy_without_http3_needs_no_aioquic() -> None:
    """It is an extra: who has not installed it must be able to load everything else."""
    others = [
        f"kamal_proxy.{name}"
        for name in MODULES
        if name and not name.startswith(("http.h3_", "__main__"))
    ]
    script = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(['aioquic', 'pylsqpack']))\n"
        f"for name in {others}: importlib.import_module(name)\n"
        "print('loaded')"
    )
    assert run(script) == "loaded"


def test_only_a_proxy_that_obtains_certificates_loads_the_library_for_that() -> None:
    """It takes memory and time, and so does that of HTTP/3."""
    script = (
        "import sys, trio, kamal_proxy\n"
        "options = kamal_proxy.RunOptions(http_port=0, https_port=0, bind='127.0.0.1')\n"
        "async def main():\n"
        "    async with kamal_proxy.open_proxy(options) as proxy:\n"
        "        libraries = {'acme', 'josepy', 'OpenSSL', 'requests', 'urllib3', 'aioquic'}\n"
        "        print(bool(proxy.https_port), *sorted(libraries & set(sys.modules)))\n"
        "trio.run(main)"
    )
    assert run(script) == "True"
