"""gRPC through the real command: a real client over TLS, real servers behind h2c."""

from __future__ import annotations

import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy.http.probe import GRPC_HEALTH_PATH
from tests.certificates import make_ca
from tests.running import START_LIMIT, Command, open_command, open_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = Path(__file__).with_name("grpc_program.py")
HOST = "grpc.test"
AUTHORITY = make_ca()


@attrs.define(eq=False)
class Program:
    """A process whose lines are read one by one."""

    process: trio.Process
    _rest: bytes = b""

    async def line(self) -> str:
        """Return its next line."""
        assert self.process.stdout is not None
        with trio.fail_after(START_LIMIT):
            while b"\n" not in self._rest:
                more = await self.process.stdout.receive_some()
                assert more, "the process has ended"
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    async def tell(self, text: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(text.encode() + b"\n")

    async def ask(self, text: str) -> Any:
        """Send it a line and return what it answers."""
        await self.tell(text)
        return json.loads(await self.line())


@asynccontextmanager
async def open_program(*arguments: str) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", str(PROGRAM), *arguments], stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Program(process)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


@attrs.define(eq=False)
class Server:
    """A gRPC server."""

    program: Program
    target: str


@asynccontextmanager
async def open_server(name: str) -> AsyncIterator[Server]:
    async with open_program("serve", name) as program:
        port = await program.line()
        yield Server(program, f"h2c://127.0.0.1:{port}")


@attrs.define(eq=False)
class Room:
    """A proxy with HTTPS, and a client."""

    command: Command
    client: Program
    files: tuple[str, str]

    async def deploy(self, server: Server, *more: str) -> None:
        await self.command.deploy(
            "grpc",
            f"--target={server.target}",
            f"--host={HOST}",
            "--tls",
            f"--tls-certificate-path={self.files[0]}",
            f"--tls-private-key-path={self.files[1]}",
            f"--health-check-path={GRPC_HEALTH_PATH}",
            *more,
        )


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    files = AUTHORITY.issue(HOST).write(tmp_path)
    authority = tmp_path / "ca.pem"
    authority.write_bytes(AUTHORITY.pem)
    async with open_directory() as home, open_command(home, "--https-port=0") as command:
        started = await command.lines.wait_for_message("Server started")
        async with open_program("call", str(started["https"]), HOST, str(authority)) as client:
            yield Room(command, client, files)


async def test_calls_of_all_kinds(room: Room) -> None:
    async with open_server("one") as server:
        await room.deploy(server)
        ask = room.client.ask
        told = await ask("unary hello")
        assert told["reply"] == "one hello me"
        assert told["begin"] == [["x-begin", "1"]]
        assert sorted(told["end"]) == [["x-end", "2"], ["x-end-bin", "b'\\x00\\xff'"]]
        assert await ask("unary fail") == {
            "code": "NOT_FOUND",
            "details": "no such thing, zut à lors",
        }
        assert (await ask("unary big"))["reply"] == 1_000_000
        assert (await ask("stream 200"))["replies"] == [str(number) for number in range(200)]
        assert (await ask("collect 500"))["reply"] == "500000"
        await ask("talk")
        for text in ("a", "b", "c"):
            assert (await ask(f"say {text}"))["reply"] == f"one {text}"
        assert (await ask("end"))["rest"] == []
        line = (await room.command.lines.wait_requests(1))[0]
        assert (line["proto"], line["status"], line["path"]) == (
            "HTTP/2.0",
            200,
            "/test.Service/Unary",
        )
        assert line["target"] == server.target.removeprefix("h2c://")


async def test_a_deadline_and_a_cancellation_reach_the_server(room: Room) -> None:
    async with open_server("one") as server:
        await room.deploy(server)
        assert (await room.client.ask("unary wait 0.2"))["code"] == "DEADLINE_EXCEEDED"
        assert [await server.program.line(), await server.program.line()] == [
            "waiting",
            "cancelled",
        ]
        await room.client.tell("cancel")
        assert await server.program.line() == "waiting"
        assert await room.client.ask("now") == {"cancelled": True}
        assert await server.program.line() == "cancelled"


async def test_a_redeploy_in_the_middle_of_a_call(room: Room) -> None:
    """The call goes on where it began, new ones go to the new server, and none fails."""
    async with open_server("old") as old, open_server("new") as new:
        await room.deploy(old)
        await room.client.ask("talk")
        assert (await room.client.ask("say before"))["reply"] == "old before"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(room.deploy, new, "--drain-timeout=20s")
            names: dict[str, int] = {}
            while "new" not in names:
                names = await room.client.ask("many 20")
                assert set(names) <= {"old", "new"}, names
            assert (await room.client.ask("say after"))["reply"] == "old after"
            assert (await room.client.ask("end"))["rest"] == []
        assert set(await room.client.ask("many 20")) == {"new"}


async def test_what_a_drain_cuts(room: Room) -> None:
    async with open_server("old") as old, open_server("new") as new:
        await room.deploy(old)
        await room.client.tell("unary wait")
        assert await old.program.line() == "waiting"
        await room.deploy(new, "--drain-timeout=100ms")
        told = json.loads(await room.client.line())
        assert told["code"] == "UNAVAILABLE"  # what gRPC makes of status 504
        assert await old.program.line() == "cancelled"


async def test_a_server_that_is_gone(room: Room) -> None:
    async with open_server("one") as server:
        await room.deploy(server)
        assert (await room.client.ask("unary hello"))["reply"] == "one hello me"
    assert (await room.client.ask("unary hello"))["code"] == "UNAVAILABLE"
