"""UDP services with programs that others wrote on both ends: DNS, measured streams, and a game."""

from __future__ import annotations

import os
import re
import signal
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e.programs import needs, open_program, output_of
from tests.e2e.udp_room import NOTHING, Room, has_ipv6, wait_switched
from tests.ports import free_port
from tests.running import START_LIMIT
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.running import Command, Result

HOSTS = 50
QUERIES_A_SECOND = r"^\d+\.\d+: [\d.]+$"  # what dnsperf tells now and then
STREAM_REPORT = r"^\[ *\d+\] .* (\d+)/ *(\d+) \([\d.]+%\)$"
DNS_CLIENTS = 8


# --- DNS -----------------------------------------------------------------------------------------

KNOT_CONFIGURATION = """\
server:
    rundir: "{folder}"
    listen: {host}@{port}
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
    {extra}
database:
    storage: "{folder}"
log:
  - target: stdout
    any: info
template:
  - id: default
    storage: "{folder}"
    zonefile-sync: -1
    journal-content: none
zone:
  - domain: example.
  - domain: whoami.
    module: mod-whoami
"""
ZONE = """\
@ 300 SOA ns.example. admin.example. 1 3600 600 86400 300
@ 300 NS ns.example.
"""


@asynccontextmanager
async def open_knot(directory: Path, name: str, extra: str = "") -> AsyncIterator[str]:
    """Run a name server and yield its ``host:port``.

    Its zone ``example.`` tells its name, as the TXT of ``who``; ``whoami.`` has the address of the
    client that asks, or the one that a PROXY header tells, if ``extra`` allows that.
    """
    folder = directory / name
    folder.mkdir()
    port = free_port()
    hosts = "".join(f"h{number} 300 A 192.0.2.{number}\n" for number in range(HOSTS))
    (folder / "example.zone").write_text(f'{ZONE}ns 300 A 192.0.2.1\nwho 300 TXT "{name}"\n{hosts}')
    (folder / "whoami.zone").write_text(ZONE)
    (folder / "knot.conf").write_text(
        KNOT_CONFIGURATION.format(folder=folder, host=LOCALHOST, port=port, extra=extra)
    )
    async with open_program(directory, "knotd", "-c", str(folder / "knot.conf")) as knot:
        with trio.fail_after(START_LIMIT):
            await knot.wait_for("server started")
        yield f"{LOCALHOST}:{port}"


async def ask(directory: Path, server: str, *question: str, source: str = "") -> str:
    """Ask a name server once, as ``kdig`` does; return the answer in one line."""
    host, _, port = server.rpartition(":")
    bind = ["-b", source] if source else []
    flags = ["+short", "+notcp", "+retry=0", *bind]
    return (await output_of(directory, "kdig", f"@{host}", "-p", port, *question, *flags)).strip()


def question(name: str) -> bytes:
    """Build a query for the TXT records of a name (RFC 1035 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\x12\x34\x01\x00\x00\x01" + bytes(6) + labels + b"\0" + b"\x00\x10\x00\x01"


@needs("knotd", "kdig", "dnsperf", package="knot knot-dnsutils dnsperf")
async def test_a_name_server_is_replaced_under_queries(
    command: Command, directory: Path, room: Room
) -> None:
    server, who = f"{LOCALHOST}:{room.port}", ("who.example", "TXT")
    queries = "".join(f"h{number}.example A\n" for number in range(HOSTS))
    (directory / "queries").write_text(queries)
    load = ["dnsperf", "-s", LOCALHOST, "-p", str(room.port), "-d", "queries", "-l", "60"]
    results: list[Result] = []
    async with open_knot(directory, "knot-1") as old, open_knot(directory, "knot-2") as new:
        result = await room.deploy(command, old, "--session-timeout=2s")
        assert (result.code, result.out, result.err) == (0, NOTHING, "")
        assert await ask(directory, server, *who) == '"knot-1"'
        async with (
            open_program(
                directory, *load, "-c", str(DNS_CLIENTS), "-T", "1", "-Q", "400", "-S", "0.2"
            ) as perf,
            trio.open_nursery() as nursery,
        ):
            await perf.wait_count(QUERIES_A_SECOND, 3)

            async def deploy() -> None:
                results.append(await room.deploy(command, new, "--zero-downtime"))

            nursery.start_soon(deploy)
            await wait_switched(command, new)
            assert await ask(directory, server, *who) == '"knot-2"'
            await perf.wait_count(QUERIES_A_SECOND, perf.count(QUERIES_A_SECOND) + 3)
            assert not results, "the drain waits for the clients"
            perf.process.send_signal(signal.SIGINT)
            report = await perf.wait()
        assert await ask(directory, server, *who) == '"knot-2"'

    numbers = {name: int(count) for name, count in re.findall(r"Queries (\w+): +(\d+)", report)}
    assert numbers["sent"] == numbers["completed"] + numbers.get("interrupted", 0) > 100, report
    assert numbers["lost"] == 0, report
    assert re.search(rf"Response codes: +NOERROR {numbers['completed']} \(100", report), report
    completed = re.fullmatch(r"(\d+) sessions completed, 0 cut\n", results[0].out)
    assert completed, results[0].out
    assert int(completed[1]) in (DNS_CLIENTS, DNS_CLIENTS + 1)  # kdig's may be over


@needs("knotd", "dnsperf", package="knot dnsperf")
async def test_name_servers_take_turns_without_affinity(
    command: Command, directory: Path, room: Room
) -> None:
    (directory / "queries").write_text("who.example TXT\n" * 100)
    async with open_knot(directory, "knot-1") as one, open_knot(directory, "knot-2") as two:
        flags = [f"--target={two}", "--session-affinity=false"]
        result = await room.deploy(command, one, *flags)
        assert (result.code, result.out, result.err) == (0, NOTHING, "")
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((LOCALHOST, room.port))
            answered: list[bytes] = []
            for _ in range(10):
                await sock.send(question("who.example"))
                answered += re.findall(b"knot-[12]", await sock.recv(512))
        load = ["dnsperf", "-s", LOCALHOST, "-p", str(room.port), "-d", "queries", "-c", "2"]
        report = await output_of(directory, *load, "-q", "20", "-T", "1")

    assert sorted(answered) == [b"knot-1"] * 5 + [b"knot-2"] * 5
    assert re.search(r"Queries completed: +100 \(100", report), report


@needs("knotd", "kdig", package="knot knot-dnsutils")
async def test_a_name_server_is_told_the_client(
    command: Command, directory: Path, room: Room
) -> None:
    if "+[no]proxy=" not in await output_of(directory, "kdig", "--help"):
        pytest.skip("this kdig does not know +proxy: Knot DNS 3.2 or later is needed")
    server, who = f"{LOCALHOST}:{room.port}", ("whoami", "A")
    async with open_knot(directory, "knot", f"proxy-allowlist: {LOCALHOST}") as knot:
        header = f"+proxy=192.0.2.7#5300-{LOCALHOST}#53"  # that knot believes headers at all
        assert await ask(directory, knot, *who, header) == "192.0.2.7"
        await room.deploy(command, knot)
        assert await ask(directory, server, *who, source="127.0.0.7") == LOCALHOST

        await room.deploy(command, knot, "--proxy-protocol")

        assert await ask(directory, server, *who, source="127.0.0.7") == "127.0.0.7"
        assert await ask(directory, server, *who, source="127.0.0.8") == "127.0.0.8"
        if has_ipv6():
            assert await ask(directory, f"::1:{room.port}", "whoami", "AAAA") == "::1"


# --- a measured stream ---------------------------------------------------------------------------


@needs("iperf", package="iperf")
async def test_a_stream_arrives_whole_and_in_order(
    command: Command, directory: Path, room: Room
) -> None:
    port = free_port()
    flags = ["-u", "-l", "1200", "-p"]
    async with open_program(directory, "iperf", "-s", "-B", LOCALHOST, *flags, str(port)) as server:
        await server.wait_for("Server listening on UDP port")
        result = await room.deploy(command, f"{LOCALHOST}:{port}", "--health-check=none")
        assert (result.code, result.out, result.err) == (0, NOTHING, "")

        stream = ["iperf", "-c", LOCALHOST, "-t", "2", "-b", "20m", *flags, str(room.port)]
        client = await output_of(directory, *stream)
        await server.wait_count(STREAM_REPORT, 1)

    reports = re.findall(STREAM_REPORT, server.output, re.MULTILINE)
    assert len(reports) == 1, server.output
    lost, total = map(int, reports[0])
    assert lost == 0, server.output
    assert total > 4000, server.output
    assert "out-of-order" not in server.output
    assert "Server Report:" in client, "the server's answer came back"


# --- a game --------------------------------------------------------------------------------------


@asynccontextmanager
async def open_teeworlds(directory: Path, name: str) -> AsyncIterator[str]:
    """Run a game server, which tells no other server that it is there; yield its ``host:port``."""
    port = free_port()
    settings = (f"sv_port {port}", f"bindaddr {LOCALHOST}", "sv_register 0", f"sv_name {name}")
    async with open_program(directory, "teeworlds-server", *settings) as server:
        with trio.fail_after(START_LIMIT):
            await server.wait_for("[server]: version")
        yield f"{LOCALHOST}:{port}"


class Browser:
    """What looks for games, as the client of Teeworlds 0.7 does (its ``shared/network.cpp``).

    A server first gives it a token, which is good for nobody but the address and port that asked
    for it, at this one server.
    """

    def __init__(self, room: Room) -> None:
        self._sock, self._to = room.client().sock, (LOCALHOST, room.port)
        self._own = os.urandom(4)
        self._token = b""

    async def get_token(self) -> None:
        """Ask for a token: a control message, 5, that is as large as 512 bytes make it."""
        await self._sock.sendto(b"\x04\0\0\xff\xff\xff\xff\x05" + self._own + bytes(512), self._to)
        answer, _ = await self._sock.recvfrom(2048)
        assert answer[3:8] == self._own + b"\x05"
        self._token = answer[8:12]

    async def ask(self) -> str:
        """Ask for the server's information with the token; return its name."""
        await self._sock.sendto(
            b"\x21" + self._token + self._own + b"\xff\xff\xff\xffgie3\x07", self._to
        )
        answer, _ = await self._sock.recvfrom(2048)
        assert answer[:5] == b"\x21" + self._own
        head, _, rest = answer[9:].partition(b"\x07")
        assert head == b"\xff\xff\xff\xffinf3"
        return rest.split(b"\0")[1].decode()  # after the version


@needs("teeworlds-server", package="teeworlds-server")
async def test_players_find_the_game_that_they_were_in(
    command: Command, directory: Path, room: Room
) -> None:
    results: list[Result] = []
    async with (
        open_teeworlds(directory, "tee-1") as old,
        open_teeworlds(directory, "tee-2") as new,
    ):
        flags = ["--health-check=none", "--session-timeout=2s"]
        result = await room.deploy(command, old, *flags)
        assert (result.code, result.out, result.err) == (0, NOTHING, "")
        before, after = Browser(room), Browser(room)
        await before.get_token()
        assert await before.ask() == "tee-1"
        async with trio.open_nursery() as nursery:

            async def deploy() -> None:
                results.append(await room.deploy(command, new, *flags, "--zero-downtime"))

            nursery.start_soon(deploy)
            await wait_switched(command, new)
            await after.get_token()
            for _ in range(5):
                assert await before.ask() == "tee-1"
                assert await after.ask() == "tee-2"
        assert [result.out for result in results] == ["1 session completed, 0 cut\n"]
        await before.get_token()
        assert await before.ask() == "tee-2"
