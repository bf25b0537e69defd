"""The Tab key in real shells, with a real proxy whose services have the worst names it allows."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy import DeploymentOptions, DeployOptions, ServiceOptions
from tests.e2e.programs import needs
from tests.e2e.shells import BASH_COMPLETION, CLEAR, END, HOME, KINDS, MARK, TAB, open_shell
from tests.running import open_embedded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.running import Embedded

# Each would do or mean something if it got to the command line as it is.
NAMES = [
    "a$(touch${IFS}pwned)",
    "b`touch${IFS}pwned`",
    "c;touch${IFS}pwned",
    "d'e",
    'e"f',
    "f\\g",
    "g:h",
    "h=i",
    "i*",
    "j&touch${IFS}pwned",
    "k|touch${IFS}pwned",
    "l>pwned",
    "m{a,b}",
    "n#o",
    "o!!",
    "p~q",
    "q[a-z]",
    "r?",
    "s^t",
    "t%u",
    "u(touch${IFS}pwned)",
    "v\\:w",
    "w'$(touch${IFS}pwned)'",
    'x"$(touch${IFS}pwned)"',
    "y\\$(touch${IFS}pwned)",
    "z<(touch${IFS}pwned)",
]
# These begin with what has to be quoted to be typed.
TYPED = {"\\~": "~root", "\\#": "#hash", "\\$": "$HOME", "\\*": "*", "\\;": ";touch${IFS}pwned"}

LINES = {
    "kamal-proxy depl\t": "kamal-proxy deploy",
    "kamal-proxy deploy-\t": "kamal-proxy deploy-udp ",
    "kamal-proxy rollo\ts\t": "kamal-proxy rollout s",
    "kamal-proxy rollout se\t": "kamal-proxy rollout set ",
    "kamal-proxy help rollo\td\t": "kamal-proxy help rollout deploy ",
    "kamal-proxy r\tesu\t": "kamal-proxy resume ",
    "FOO=1 kamal-proxy resu\t": "FOO=1 kamal-proxy resume ",
    "true; kamal-proxy resu\t": "true; kamal-proxy resume ",
    "bin/kamal-proxy resu\t": "bin/kamal-proxy resume ",
    "~/bin/kamal-proxy resu\t": "~/bin/kamal-proxy resume ",
    "kamal-proxy nope \t": "kamal-proxy nope ",
    "kamal-proxy deploy web --canon\t": "kamal-proxy deploy web --canonical-host ",
    "kamal-proxy deploy-udp --protocol w\t": "kamal-proxy deploy-udp --protocol webrtc ",
    "kamal-proxy deploy-udp --protocol=w\t": "kamal-proxy deploy-udp --protocol=webrtc ",
    "kamal-proxy deploy --tls=f\t": "kamal-proxy deploy --tls=false ",
    "kamal-proxy deploy --error-pages pa\t": "kamal-proxy deploy --error-pages pages/",
    "kamal-proxy deploy --error-pages=pa\t": "kamal-proxy deploy --error-pages=pages/",
    "kamal-proxy deploy --error-pages ke\t": "kamal-proxy deploy --error-pages ke",
    "kamal-proxy deploy --tls-private-key-path ke\t": (
        "kamal-proxy deploy --tls-private-key-path key.pem "
    ),
    "kamal-proxy deploy --tls-private-key-path=ke\t": (
        "kamal-proxy deploy --tls-private-key-path=key.pem "
    ),
    "kamal-proxy deploy --tls-private-key-path=~/ke\t": (
        "kamal-proxy deploy --tls-private-key-path=~/key.pem "
    ),
    "kamal-proxy deploy --tls-private-key-path My\t": (
        "kamal-proxy deploy --tls-private-key-path My\\ key.pem "
    ),
    "kamal-proxy deploy --tls-private-key-path=My\\ k\t": (
        "kamal-proxy deploy --tls-private-key-path=My\\ key.pem "
    ),
    "kamal-proxy list > ke\t": "kamal-proxy list > key.pem ",
    # No proxy runs here.
    "kamal-proxy rm \t": "kamal-proxy rm ",
}


def shells(*names: str) -> pytest.MarkDecorator:
    """Run a test in shells; those that are not installed are skipped."""
    params = []
    for name in names or KINDS:
        shell = KINDS[name].command[0]
        marks = [needs(shell, package=shell)]
        if name == "bash, installed":
            reason = "bash-completion is not installed (apt-get install bash-completion)"
            marks.append(pytest.mark.skipif(not Path(BASH_COMPLETION).exists(), reason=reason))
        params.append(pytest.param(name, marks=marks, id=name))
    return pytest.mark.parametrize("name", params)


@asynccontextmanager
async def open_proxy_with(names: list[str], directory: Path) -> AsyncIterator[Embedded]:
    async with open_embedded(socket_path=directory / "kamal-proxy.sock") as proxy:
        for number, name in enumerate(names):
            await proxy.deploy(
                DeployOptions(
                    service=name,
                    targets=("127.0.0.1:9",),
                    service_options=ServiceOptions(hosts=(f"host-{number}.example",)),
                    deployment_options=DeploymentOptions(force=True),
                )
            )
        yield proxy


@pytest.mark.parametrize("part", range(2))
@shells()
async def test_lines_are_completed(directory: Path, name: str, part: int) -> None:
    lines = dict(list(LINES.items())[part::2])
    await trio.Path(directory, "pages").mkdir()
    for file in ("key.pem", "My key.pem"):
        await trio.Path(directory, file).touch()
    async with open_shell(KINDS[name], directory) as shell:
        completed = {typed: await shell.complete(typed) for typed in lines}
    assert completed == lines


@pytest.mark.parametrize("part", range(3))
@shells("bash", "zsh", "fish")
async def test_names_of_services_reach_a_command_as_they_are(
    directory: Path, name: str, part: int
) -> None:
    typed = {each[0]: each for each in NAMES} | TYPED
    assert len(typed) == len(NAMES) + len(TYPED)
    typed = dict(list(typed.items())[part::3])
    async with (
        open_proxy_with(list(typed.values()), directory),
        open_shell(KINDS[name], directory) as shell,
    ):
        for start, service in typed.items():
            # The command is printed instead of run.
            await shell.send(f"kamal-proxy rm {start}{TAB}{HOME}printf '\\x1e%s' {END}")
            written = await shell.run("")
            *_, rm, argument = written.split(MARK)
            assert (rm, argument) == ("rm", f"{service}DONE"), service
    assert not list(await trio.Path(directory).rglob("pwned"))


@shells("bash", "zsh", "fish")
async def test_names_are_found_in_quotes_too(directory: Path, name: str) -> None:
    async with (
        open_proxy_with(["shop-1", "co:lon"], directory),
        open_shell(KINDS[name], directory) as shell,
    ):
        for quote in "'\"":
            line = await shell.complete(f"kamal-proxy rm {quote}sh\t")
            assert line == f"kamal-proxy rm {quote}shop-1{quote} "
        assert await shell.complete("kamal-proxy rm co:\t") == "kamal-proxy rm co:lon "


@needs("bash", package="bash")
async def test_in_bash_words_may_be_broken_elsewhere(directory: Path) -> None:
    async with (
        open_proxy_with(["co:lon"], directory),
        open_shell(KINDS["bash"], directory) as shell,
    ):
        await shell.run("COMP_WORDBREAKS=' '")
        assert await shell.complete("kamal-proxy rm co:\t") == "kamal-proxy rm co:lon "
        line = await shell.complete("kamal-proxy deploy-udp --protocol=w\t")
        assert line == "kamal-proxy deploy-udp --protocol=webrtc "


@shells("zsh", "fish")
async def test_candidates_are_listed_with_what_they_mean(directory: Path, name: str) -> None:
    async with (
        open_proxy_with(["shop-1", "shop-2"], directory),
        open_shell(KINDS[name], directory) as shell,
    ):
        for typed, meaning in {
            "rollout ": "Choose which visitors go to the rollout targets",
            "stop web --": "What the error page tells visitors meanwhile",
            "rm shop-": "running, host-1.example",
        }.items():
            await shell.send(f"kamal-proxy {typed}{TAB}{TAB}")
            await shell.read_until(meaning)
            await shell.send(CLEAR)


@shells("bash", "zsh", "fish")
async def test_where_no_proxy_runs_nothing_is_said(directory: Path, name: str) -> None:
    async with open_shell(KINDS[name], directory) as shell:
        await shell.send(f"kamal-proxy rm {TAB}{TAB}{CLEAR}")
        written = await shell.run("true")
    assert "kamal-proxy rm" in written
    assert "Error" not in written
    assert "dial" not in written
