"""What pages of the documentation show is done: their commands run, and print what the pages say.

Each room has a machine of its own to run them on: namespaces for network and mounts, in which all
ports are free, names of targets lead to addresses, and something answers there. A room is what
stands under one heading, or in a section whose headings go on from one to the next. Unless a block
of it starts a proxy, one runs already. ``docker exec kamal-proxy`` is left out before a command.

What can't be done here, ``tests/test_pages.py`` looks at: see ``to_run`` in ``tests/pages.py``.
docs/tour.md, docs/admin-api.md and example/README.md have tests of their own.
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from subprocess import DEVNULL, run
from typing import Any

import attrs
import pytest
import trio

from tests.certificates import make_ca
from tests.e2e.programs import needs
from tests.e2e.shell import LIMIT, Shell, comparable, open_shell, replace_words
from tests.pages import IN_CONTAINER, PAGES, Block, Example, blocks_in, name_of
from tests.running import ROOT, open_directory

NAMESPACES = ["unshare", "--map-root-user", "--net", "--mount"]
# Programs that not every machine has, and what brings them.
PACKAGES = {
    "curl": "curl",
    "ffmpeg": "ffmpeg",
    "iperf": "iperf",
    "jq": "jq",
    "openssl": "openssl",
}
# Pages that suppose too much that is theirs alone.
OWN_TESTS = {"tour.md", "admin-api.md", "example/README.md"}
# Each target's own, so that a proxy and its target can have the same port.
ADDRESSES = [f"192.168.7.{number}" for number in range(2, 250)]
# What differs from run to run besides what ``shell`` knows, or needs a past that no room has.
VARYING = (
    (r"\d+ sessions? completed, \d+ cut.*", "… sessions completed, … cut"),
    (r"(_sum\{.*\}) [\d.e-]+", r"\1 …"),
    (r"\(process \d+\)", "(process …)"),
)


@attrs.frozen
class Stage:
    """What a page supposes.

    Attributes:
        by_section: Whether a heading goes on where the one before it ended, in one section.
        flags: Those of the proxy that runs, by heading; those of ``""`` where no other are said.
        before: Commands before all others, by heading; those of ``""`` in every room.
        absent: Targets that are not there, by heading; all others that a room names are.
    """

    by_section: bool = False
    flags: dict[str, str] = attrs.field(factory=dict)
    before: dict[str, list[str]] = attrs.field(factory=dict)
    absent: dict[str, list[str]] = attrs.field(factory=dict)


PROXY = "203.0.113.10"  # its address on pages that name one
FLAGS = "--bind=127.0.0.1 --metrics-port=9090"
GREETED = "curl -s -o nothing http://127.0.0.1/"
DEPLOYED = "kamal-proxy deploy shop --target=shop-v2:3000"
TARGETS = ROOT / "tests" / "e2e" / "page_targets.py"
STAGES = {
    "README.md": Stage(
        by_section=True,
        flags={"": "--bind=127.0.0.1 --http-port=8080 --https-port=8443"},
        before={"": ["mkdir .demo", "export KAMAL_PROXY_SOCKET=$PWD/.demo/kamal-proxy.sock"]},
    ),
    "commands.md": Stage(
        before={
            **{heading: [DEPLOYED] for heading in ("pause", "stop", "rollout")},
            "": ["printf '#!/bin/sh\\n' > migrate", "chmod +x migrate"],
        }
    ),
    "getting-started.md": Stage(by_section=True),
    "metrics.md": Stage(
        before={
            "Metrics": [
                "kamal-proxy deploy web --target=web-1:3000 --host=127.0.0.1",
                *[GREETED] * 3,
                f"{GREETED} -H 'Host: other.example.com'",
                f"{GREETED} -X BREW",
            ]
        }
    ),
    "operations.md": Stage(
        before={
            "The log": [
                "kamal-proxy deploy shop --target=127.0.0.1:3001 --host=shop.example.com --force",
                "kamal-proxy deploy docs --target=docs-1:3000 --host=docs.example.com",
                f"{GREETED}cart -H 'Host: shop.example.com'",
                f"{GREETED}pay -H 'Host: shop.example.com'",
                f"{GREETED} -H 'Host: docs.example.com' -H 'X-Request-ID: 7d1c'",
                GREETED,
            ],
            **{
                heading: ["kamal-proxy deploy web --target=web-2:3000"]
                for heading in ("Backup", "Upgrade")
            },
        }
    ),
    "state.md": Stage(
        before={
            "When the proxy refuses the file": [
                "kamal-proxy deploy web --target=web-1:3000",
                "kamal-proxy deploy web --target=web-2:3000",
            ]
        }
    ),
    "udp.md": Stage(
        flags={"Addresses": ""},  # as most proxies run: on all addresses
        before={
            "Addresses": [
                f"ln -s {Path(sys.executable).resolve()} systemd-resolve",
                "coproc ./systemd-resolve -c 'import socket as s, sys; o = s.socket(type=2)\n"
                'o.bind(("127.0.0.53", 53)); print("bound", flush=True); sys.stdin.read()\'',
                "head -n 1 <&${COPROC[0]}",
            ]
        },
        absent={"Health checks": ["game-1:9999"], "Addresses": ["10.0.0.2:53"]},
    ),
    "webrtc.md": Stage(
        flags={"A stream in plain RTP": f"--bind={PROXY}"},
        before={"A stream in plain RTP": ["ffmpeg -v error -f lavfi -i testsrc=d=0.5 film.mp4"]},
    ),
}


def can_unshare() -> bool:
    try:
        command = [*NAMESPACES, "sh", "-c", "ip link set lo up && mount -t tmpfs none /tmp"]
        return run(command, stdin=DEVNULL, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not can_unshare(), reason="namespaces can't be made (unshare, ip, and the right to do it)"
)


@attrs.frozen
class Room:
    """Blocks whose commands run one after the other on one machine.

    Attributes:
        name: The page, and the heading or section.
        blocks: The blocks, in order.
    """

    name: str
    blocks: list[Block]

    @property
    def stage(self) -> Stage:
        """What the page supposes."""
        return STAGES.get(self.blocks[0].name, Stage())

    @property
    def examples(self) -> list[tuple[str, Example]]:
        """The commands that are run here, and where each stands."""
        return [
            (f"{block.name}:{example.line}: {example.command}", example)
            for block in self.blocks
            for example in block.to_run
        ]

    @property
    def before(self) -> list[str]:
        """The commands that come before them."""
        headings = dict.fromkeys(block.heading for block in self.blocks)
        return [command for name in headings for command in self.stage.before.get(name, ())]

    @property
    def commands(self) -> str:
        """All of these commands."""
        return "\n".join([*self.before, *(example.command for _, example in self.examples)])

    @property
    def targets(self) -> list[str]:
        """What they name as ``host:port`` and is not this machine's own."""
        found: set[str] = set()
        for line in self.commands.replace("\\\n", " ").splitlines():
            others = re.findall(r"--health-check-port=(\d+)", line)
            for ranges in re.findall(r"--port-ranges=(\S+)", line):
                others += re.findall(r"(\d+)-", ranges)
            for scheme, host, port in re.findall(
                r"--(?:read-)?target=(h2c://)?([\w.-]+)(:\d+)?", line
            ):
                found.add(f"{scheme}{host}{port or ':80'}")
                found |= {f"{host}:{other}" for other in others}
        return sorted(place for place in found if not place.startswith("127."))

    async def prepare(self, shell: Shell, directory: Path) -> None:
        """Make the machine, with all that is supposed to be there."""
        stage = self.stage
        hosts = sorted({re.sub(r"^h2c://|:\d+$", "", place) for place in self.targets})
        addresses = {
            host: host if re.fullmatch(r"[\d.]+", host) else address
            for host, address in zip(hosts, ADDRESSES, strict=False)
        }
        lines = [f"{address} {host}\n" for host, address in addresses.items()]
        (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        absent = {place for block in self.blocks for place in stage.absent.get(block.heading, ())}
        present = [place for place in self.targets if place not in absent]
        preparation = [
            "export PATH=$PWD/.venv/bin:$PATH",
            # Of the system, nothing outside of this directory can be written, whatever a page says.
            "mount --bind $PWD $PWD",
            "cd $PWD",
            "mount -o remount,bind,ro /",
            "export TMPDIR=$PWD",
            "ip link set lo up",
            *(f"ip address add {address}/32 dev lo" for address in (PROXY, *addresses.values())),
            "mount --bind hosts /etc/hosts",
            "mkfifo ready",
            f"python3 -P {TARGETS} {' '.join(present)} > ready & head -n 1 ready",
            *stage.before.get("", ()),
        ]
        if not re.search(r"\bkamal-proxy run\b", self.commands):
            flags = stage.flags.get(self.blocks[0].heading, stage.flags.get("", FLAGS))
            preparation += [
                f"kamal-proxy run {flags} > log & proxy=$!",
                "kamal-proxy list > nothing",  # waits for it
            ]
        for command in (*preparation, *self.before):
            text, code = await shell.run(command)
            assert code == 0, f"{command}: {text}"


def room_of(block: Block) -> str:
    stage = STAGES.get(block.name, Stage())
    return f"{block.name}: {block.section if stage.by_section else block.heading}"


def rooms() -> list[Room]:
    blocks = [
        block for page in PAGES if name_of(page) not in OWN_TESTS for block in blocks_in(page)
    ]
    made = [Room(name, list(group)) for name, group in groupby(blocks, room_of)]
    return [room for room in made if room.examples]


def parameter(room: Room) -> Any:
    programs = [name for name in PACKAGES if re.search(rf"\b{name} ", room.commands)]
    return pytest.param(
        room, id=room.name, marks=[needs(name, package=PACKAGES[name]) for name in programs]
    )


def write_certificates(directory: Path) -> Path:
    """Write what pages have in ``/certs``."""
    authority = make_ca()
    issued = authority.issue("app.example.com", "*.example.org")
    certificates = directory / "certs"
    certificates.mkdir()
    for name, content in (
        ("fullchain.pem", issued.chain_pem),
        ("key.pem", issued.key_pem),
        ("ca.pem", authority.pem),
    ):
        (certificates / name).write_bytes(content)
    return certificates


def looks_like(got: list[str], wanted: list[str]) -> bool:
    """Compare lines; one that is ``…`` stands for any number of others."""
    parts = ["(?:.*\n)*" if line == "…" else re.escape(line) + "\n" for line in wanted]
    return re.fullmatch("".join(parts), "".join(f"{line}\n" for line in got)) is not None


def lines_of(text: str) -> list[str]:
    for pattern, shown in VARYING:
        text = re.sub(pattern, shown, text)
    return comparable(text)


@pytest.mark.parametrize("room", [parameter(room) for room in rooms()])
async def test_the_commands_run_and_print_what_the_page_says(room: Room) -> None:
    async with open_directory() as directory, open_shell(directory, NAMESPACES) as shell:
        stand_ins = {
            "/certs": str(write_certificates(directory)),
            "/home/kamal-proxy": str(directory),
        }
        await room.prepare(shell, directory)
        for where, example in room.examples:
            command = replace_words(example.command.removeprefix(IN_CONTAINER), stand_ins)
            deadline = trio.current_time() + LIMIT
            while True:
                text, code = await shell.run(command)
                got = lines_of(text.replace(str(directory), ""))
                wanted = got if example.output is None else lines_of("\n".join(example.output))
                fits = code == example.code and looks_like(got, wanted)
                if fits or not is_repeatable(command) or trio.current_time() > deadline:
                    break
            assert code == example.code, f"{where}\n{text}"
            assert fits or got == wanted, where


def is_repeatable(command: str) -> bool:
    """Whether it reads what is written just after a client got its answer."""
    return bool(re.search(r"\blog\b|/metrics", command))


def test_there_are_rooms() -> None:
    assert len(rooms()) > 30
