"""The pages of the documentation as data: blocks of code, commands in them, and what these print.

What a block is, its language says. ``console`` has commands after ``$ ``, each with the lines that
it must print. ``sh`` has commands only, and so has what is indented, unless it looks like JSON or
like variables (``env``). A whole ``script`` begins with ``#!``. Everything else is no command. A
command goes on where a line ends with a backslash or a quote is open, and may end with a comment
after two spaces, whose meaning is the page's.

``<!-- not run: why -->`` before a block says that its commands can't be run by a test, and why.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "example" / "README.md",
)
# Languages of blocks without commands, the last one being none.
TEXTS = ("yaml", "json", "python", "go", "ini", "env", "script", "text", "")
# Programs whose commands no test runs. What can be checked about them, tests/test_pages.py checks.
ELSEWHERE = {
    "docker": "needs a daemon",
    "iptables": "changes the machine's firewall",
    "kamal": "needs servers",
    "make": "builds and tests the whole; .ci/run does that",
    "pip": "installs packages",
    "sysctl": "changes the machine",
}
# A block with one of these is about setting up a machine, and nothing of it is run.
AS_ROOT = {"apt-get", "sudo", "systemctl", "useradd"}

IN_CONTAINER = "docker exec kamal-proxy "  # is left out: the test's own proxy is meant

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(
    r"^```(?P<language>\w*)\n(?P<fenced>(?:.*\n)*?)```$"
    # Only after an empty line, or it goes on with the item of a list.
    r"|(?<=\n\n)(?P<indented>(?: {4}.*\n|\n(?= {4}))+)",
    re.MULTILINE,
)
_MARK = re.compile(r"<!-- not run: (.+?) -->\n+\Z", re.DOTALL)


@attrs.frozen
class Example:
    """One command of a page.

    Attributes:
        command: Without the comment; may have several lines.
        comment: What follows ``#``, or nothing.
        output: The lines that it must print; ``None`` where the page does not say.
        line: Its line in the page, from 1.
    """

    command: str
    comment: str
    output: list[str] | None
    line: int

    @property
    def words(self) -> list[str]:
        """The first command of a pipeline or a list, without assignments before it."""
        lexer = shlex.shlex(self.command.replace("\\\n", " "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = ""
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("();<>|&"):
                break
            if words or not re.match(r"\w+=", word):
                words.append(word)
        return words

    @property
    def program(self) -> str:
        """The name of the program that is run; nothing for assignments alone."""
        return (self.words or [""])[0].rpartition("/")[2]

    @property
    def code(self) -> int:
        """The exit code: that of the comment, or 1 where the output says that it failed."""
        if self.comment.startswith("exit "):
            return int(self.comment.removeprefix("exit "))
        return int((self.output or [""])[-1].startswith("Error: "))


@attrs.frozen
class Block:
    """A block of code.

    Attributes:
        page: Where it is.
        language: What it is in, as above.
        text: What it holds, with the indentation removed.
        line: The line of its first one in the page, from 1.
        heading: The text of the heading above it.
        section: The same of the second level.
        not_run: Why its commands can't be run, or nothing.
    """

    page: Path
    language: str
    text: str
    line: int
    heading: str
    section: str
    not_run: str

    @property
    def name(self) -> str:
        """The name of its page, as one would say it."""
        return name_of(self.page)

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"{self.name}:{self.line}"

    @property
    def to_run(self) -> list[Example]:
        """Those of its commands that a test runs."""
        examples = self.examples
        if self.not_run or AS_ROOT & {example.program for example in examples}:
            return []
        return [
            example
            for example in examples
            if example.program not in ELSEWHERE or example.command.startswith(IN_CONTAINER)
        ]

    @property
    def examples(self) -> list[Example]:
        """Its commands, in order."""
        lines = self.text.splitlines()
        if self.language == "console":
            starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
            assert starts[:1] == [0], f"{self.where}: a block begins with a command"
            return [
                _example(lines[start:end], self.line + start)
                for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)
            ]
        if self.language != "sh":
            return []
        found = []
        start = 0
        while start < len(lines):
            if not lines[start] or lines[start].startswith("#"):
                start += 1
                continue
            size = _size(lines[start:])
            example = _example(lines[start : start + size], self.line + start)
            found.append(attrs.evolve(example, output=None))
            start += size
        return found


def name_of(page: Path) -> str:
    """Return what a page is called: there is more than one README.md."""
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def blocks_in(page: Path) -> list[Block]:
    """Return the blocks of code of a page, in order."""
    text = page.read_text()
    # What is in a block is neither a heading nor another block.
    prose = FENCED.sub(lambda block: re.sub(r"[^\n]", "`", block[0]), text)
    headings = [
        (found.start(), len(found[1]), found[2])
        for found in re.finditer(r"^(#+) (.+)$", prose, re.MULTILINE)
    ]
    found = []
    for match in _BLOCK.finditer(text):
        indented = match["indented"]
        if indented is None:
            language, inside, start = match["language"], match["fenced"], match.start("fenced")
        else:
            inside, start = re.sub(r"^ {4}", "", indented, flags=re.MULTILINE), match.start()
            language = "sh"
            if inside[0] in "[{":
                language = "json"
            elif re.fullmatch(r"(\w+=.*\n)+", inside):
                language = "env"
        if language == "sh" and inside.startswith("#!"):
            language = "script"
        mark = _MARK.search(text, 0, match.start())
        why = mark[1] if mark else ""
        above = [(level, name) for place, level, name in headings if place < start]
        section = [name for level, name in above if level <= 2][-1]
        line = text.count("\n", 0, start) + 1
        found.append(Block(page, language, inside, line, above[-1][1], section, why))
    return found


def examples_in(page: Path) -> list[Example]:
    """Return the commands of a page that have an output, in order; at least one."""
    blocks = [block for block in blocks_in(page) if block.language == "console"]
    found = [example for block in blocks for example in block.examples]
    assert found, f"{page.name} has no examples"
    return found


def _example(lines: list[str], number: int) -> Example:
    size = _size(lines)
    command, _, comment = "\n".join(lines[:size]).removeprefix("$ ").partition("  # ")
    return Example(command.rstrip(), comment.strip(), lines[size:], number)


def _size(lines: list[str]) -> int:
    """Return how many of the lines are the first command."""
    return next(n for n in range(1, len(lines) + 1) if _is_whole("\n".join(lines[:n])))


def _is_whole(command: str) -> bool:
    if command.endswith("\\"):
        return False
    try:
        shlex.split(command, comments=True)
    except ValueError:  # an open quote
        return False
    return True
