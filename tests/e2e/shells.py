"""Interactive shells on a pseudo-terminal, whose Tab key completes command lines of kamal-proxy."""

from __future__ import annotations

import os
import sys
import termios
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from tests.running import environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

LIMIT = 60.0  # seconds; a hang must fail a test, not the whole run
MARK = "\x1e"  # which no shell writes by itself
TAB, HOME, END, CLEAR = "\t", "\x01", "\x05", "\x15"
SHOW = "\x18\x10"  # C-x C-p, which is bound below


@attrs.frozen
class Kind:
    """A shell and how it gets the script.

    Attributes:
        command: What starts it, without anybody's configuration.
        show: Binds C-x C-p to printing the line as it stands, between marks.
        load: Reads the script.
        install: Where the script is written before, in the home directory; empty for nowhere.
    """

    command: tuple[str, ...]
    show: str
    load: str
    install: str = ""


_BASH = Kind(
    ("bash", "--norc", "--noprofile", "-i"),
    r"""bind -x '"\C-x\C-p": printf "\x1e%s\x1e" "$READLINE_LINE"'""",
    "source <(kamal-proxy completion bash)",
)
_ZSH = Kind(
    ("zsh", "-f", "-i"),
    r"""show() { print -rn -- $'\x1e'"$BUFFER"$'\x1e' }; zle -N show; bindkey '^X^P' show""",
    "autoload -U compinit; compinit -D -u; source <(kamal-proxy completion zsh)",
)
_FISH = Kind(
    ("fish", "--private", "-i"),
    r"""bind \cx\cp 'printf "\x1e%s\x1e" (commandline | string collect)'""",
    "kamal-proxy completion fish | source",
)
BASH_COMPLETION = "/usr/share/bash-completion/bash_completion"
KINDS = {
    "bash": _BASH,
    "bash, installed": attrs.evolve(
        _BASH,
        load=f"source {BASH_COMPLETION}",
        install=".local/share/bash-completion/completions/kamal-proxy",
    ),
    "zsh": _ZSH,
    "zsh, installed": attrs.evolve(
        _ZSH,
        load="fpath=(~/.zfunc $fpath); autoload -U compinit; compinit -D -u",
        install=".zfunc/_kamal-proxy",
    ),
    "fish": _FISH,
    "fish, installed": attrs.evolve(
        _FISH, load="true", install=".config/fish/completions/kamal-proxy.fish"
    ),
}


class Shell:
    """A running shell."""

    def __init__(self, terminal: trio.lowlevel.FdStream) -> None:
        self._terminal = terminal
        self._written = ""

    async def send(self, keys: str) -> None:
        """Press keys."""
        await self._terminal.send_all(keys.encode())

    async def read_until(self, text: str) -> str:
        """Return what is written up to a text, and the text."""
        with trio.fail_after(LIMIT):
            while text not in self._written:
                data = await self._terminal.receive_some()
                assert data, f"the shell ended without {text!r}: {self._written!r}"
                self._written += data.decode(errors="replace")
        before, _, self._written = self._written.partition(text)
        return before + text

    async def run(self, line: str) -> str:
        """Run a line and return what was written meanwhile, the line too."""
        await self.send(f"{line}; echo DO''NE\r")
        return await self.read_until("DONE")

    async def complete(self, line: str) -> str:
        """Type a line with Tab keys in it, and return what stands there then."""
        await self.send(line + SHOW)
        await self.read_until(MARK)
        completed = await self.read_until(MARK)
        await self.send(CLEAR)
        return completed.removesuffix(MARK)


@asynccontextmanager
async def open_shell(kind: Kind, directory: Path) -> AsyncIterator[Shell]:
    """Start a shell in a directory, which is its home too, and load the script.

    ``kamal-proxy`` is there, too, as a program of that directory.
    """
    program = directory / "bin" / "kamal-proxy"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kamal_proxy "$@"\n')
    program.chmod(0o755)
    variables = {
        "PATH": f"{program.parent}:{os.environ.get('PATH', os.defpath)}",
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
    }
    if kind.install:
        script = await trio.run_process(
            [str(program), "completion", kind.command[0]],
            env=environment(directory, variables),
            capture_stdout=True,
        )
        place = directory / kind.install
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(script.stdout)
    async with _open_terminal(kind.command, directory, variables) as terminal:
        shell = Shell(terminal)
        await shell.run(kind.load)
        await shell.run(kind.show)
        yield shell


@asynccontextmanager
async def _open_terminal(
    command: Sequence[str], directory: Path, variables: dict[str, str]
) -> AsyncIterator[trio.lowlevel.FdStream]:
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (50, 132))
    async with trio.lowlevel.FdStream(master) as terminal:
        process = await trio.lowlevel.open_process(
            # A shell reads its keys from the terminal of its session.
            ["setsid", "--ctty", "--wait", *command],
            cwd=directory,
            env=environment(directory, variables),
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        try:
            yield terminal
        finally:
            # The terminal's end is the shell's, too.
            await terminal.aclose()
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await process.wait()
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
