"""UDP services through the real command: deploys under traffic, what it prints, what it refuses."""

from __future__ import annotations

import re
import socket
from functools import partial
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.e2e.udp_room import NOTHING, Room, rows, udp_state_path, wait_switched
from tests.ports import free_port, is_free
from tests.running import command_line, environment, kp, open_command
from tests.scripted import LOCALHOST, open_client, open_upstream
from tests.udp.serving import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Command, Result
    from tests.udp.serving import Client, Target

PLAYERS = 4
SWITCHES = 2


# --- deploy, list, remove ------------------------------------------------------------------------


async def test_a_service_beside_an_http_service_of_its_name(command: Command, room: Room) -> None:
    target = room.target("v1")
    async with open_upstream() as web:
        await command.deploy("game", *web.flags())
        result = await room.deploy(command, target)

        assert (result.code, result.out, result.err) == (0, NOTHING, "")
        assert await rows(command) == [
            f"game * / {web.target} running no",
            f"game * udp/{room.port} {target} running no",
        ]
        assert await room.client().ask() == "v1"
        async with open_client(command.port) as client:
            assert (await client.get()).body == b"hello"

    removed = await command.kp("remove", "game")
    assert (removed.code, removed.out, removed.err) == (0, "", "")
    assert await rows(command) == []
    await until(partial(is_free, room.port))


async def test_a_removed_port_is_free_for_another_service(command: Command, room: Room) -> None:
    first, second, client = room.target("first"), room.target("second"), room.client()
    await room.deploy(command, first)
    assert await client.ask() == "first"
    taken = await command.kp("deploy-udp", "other", f"--target={second}", f"--port={room.port}")

    assert (taken.code, taken.out) == (1, "")
    assert taken.err == (
        f"service game already listens on udp/{room.port}\n"
        f"Error: port {room.port} is used by another service\n"
    )
    assert (await command.kp("remove", "game")).code == 0
    served = await command.kp("deploy-udp", "other", f"--target={second}", f"--port={room.port}")
    assert (served.code, served.out, served.err) == (0, NOTHING, "")
    assert await client.ask() == "second"
    assert await rows(command) == [f"other * udp/{room.port} {second} running no"]


async def test_another_port_is_left_when_its_sessions_are_over(
    command: Command, room: Room
) -> None:
    old, new, client = room.target("v1"), room.target("v2"), room.client()
    before = room.port
    await room.deploy(command, old)
    assert await client.ask() == "v1"
    room.port = free_port()

    result = await room.deploy(command, new)

    assert result.out == "0 sessions completed, 1 cut\n"
    assert await room.client().ask() == "v2"
    assert await rows(command) == [f"game * udp/{room.port} {new} running no"]
    await until(partial(is_free, before))


@pytest.mark.parametrize("how", ["UDP_PORT", "KAMAL_PROXY_UDP_PORT", "--udp-port"])
async def test_the_port_of_run(directory: Path, room: Room, how: str) -> None:
    flags = [f"{how}={room.port}"] if how.startswith("-") else []
    variables = {} if flags else {how: str(room.port)}
    target = room.target("v1")
    async with open_command(directory, *flags, variables=variables) as command:
        assert is_free(room.port), "nobody listens before there is a service"
        result = await command.kp("deploy-udp", "game", f"--target={target}")

        assert (result.code, result.out, result.err) == (0, NOTHING, "")
        assert await rows(command) == [f"game * udp/{room.port} {target} running no"]
        assert await room.client().ask() == "v1"


async def test_pause_stop_and_resume(command: Command, room: Room) -> None:
    client, late = room.client(), room.client()
    await room.deploy(command, room.target("v1"))
    assert await client.ask() == "v1"

    assert (await command.kp("pause", "game")).code == 0
    await late.send()  # dropped: what it asks next must be the first that is answered
    assert await client.ask() == "v1"
    assert (await rows(command))[0].endswith("paused no")
    assert (await command.kp("stop", "game")).code == 0
    await client.send()
    assert (await rows(command))[0].endswith("stopped no")
    assert (await command.kp("resume", "game")).code == 0
    assert await client.ask() == "v1"
    assert await late.ask() == "v1"


# --- redeploys -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Traffic:
    """Clients that ask all the time, and insist on the answer of a target that may give it.

    Players stay on one port for a round, and so with one target. Newcomers ask once, each from a
    port of its own.

    Attributes:
        moments: Names that a new session may get at each moment; a deploy appends a new moment.
        round: Players that notice another round leave, and come back from another port.
        answers: How often each player was answered in its round, by its number.
        newcomers: How many newcomers were answered.
    """

    room: Room
    moments: list[frozenset[str]]
    round: int = 0
    answers: dict[int, int] = attrs.field(factory=dict)
    names: dict[int, str] = attrs.field(factory=dict)
    newcomers: int = 0
    stopping: bool = False
    _news: trio.Event = attrs.field(factory=trio.Event)

    async def play(self, number: int) -> None:
        """Be a player, round after round."""
        while not self.stopping:
            client, current = self.room.client(), self.round
            self.names[number] = await self.begin(client)
            self.answers[number] = 1
            while self.round == current and not self.stopping:
                assert await client.ask() == self.names[number], "a live session was moved"
                self.answers[number] += 1
                self._tell()
                await trio.sleep(0.005)  # the pace of this client; nothing waits for it

    async def come_and_go(self) -> None:
        """Be one newcomer after the other."""
        while not self.stopping:
            await self.begin(self.room.client())
            self.newcomers += 1
            self._tell()
            await trio.sleep(0.05)

    async def begin(self, client: Client) -> str:
        """Ask for the first time; return the name of the target."""
        asked = len(self.moments) - 1
        name = await client.ask()
        allowed = frozenset().union(*self.moments[asked:])
        assert name in allowed, f"a new session got {name} instead of {sorted(allowed)}"
        return name

    async def wait_more(self, name: str) -> None:
        """Wait until each player was answered some more by one target, and newcomers by any."""
        while set(self.names.values()) != {name} or len(self.names) < PLAYERS:
            await self._news.wait()
        players = {number: count + 5 for number, count in self.answers.items()}
        newcomers = self.newcomers + 3
        while self.newcomers < newcomers or any(
            self.answers[number] < count for number, count in players.items()
        ):
            await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


async def test_redeploys_under_traffic_lose_and_move_nothing(command: Command, room: Room) -> None:
    flags = ["--zero-downtime", "--session-timeout=2s"]
    current = room.target("v0")
    await room.deploy(command, current, *flags)
    traffic = Traffic(room, [frozenset({"v0"})])
    results: list[Result] = []
    async with trio.open_nursery() as nursery:
        for number in range(PLAYERS):
            nursery.start_soon(traffic.play, number)
        nursery.start_soon(traffic.come_and_go)
        for switch in range(1, SWITCHES + 1):
            following = room.target(f"v{switch}")
            await traffic.wait_more(current.name)
            traffic.moments.append(frozenset({current.name, following.name}))
            async with trio.open_nursery() as deploying:

                async def deploy(target: Target = following) -> None:
                    results.append(await room.deploy(command, target, *flags))

                deploying.start_soon(deploy)
                await wait_switched(command, following)
                traffic.moments.append(frozenset({following.name}))
                await traffic.wait_more(current.name)
                assert not results[switch - 1 :], "the drain waits for the players"
                traffic.round += 1
            current.die()  # nobody needs it any more
            current = following
        await traffic.wait_more(current.name)
        traffic.stopping = True

    for result in results:
        assert (result.code, result.err) == (0, "")
        completed = re.fullmatch(r"(\d+) sessions completed, 0 cut\n", result.out)
        assert completed, result.out
        assert int(completed[1]) >= PLAYERS
    drained = [line for line in command.lines.all if line["msg"] == "UDP service drained"]
    assert [f"{line['completed']} sessions completed, {line['cut']} cut\n" for line in drained] == [
        result.out for result in results
    ]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--drain-timeout=1m"],  # without effect: nothing is to go on
        ["--zero-downtime", "--drain-strategy=immediate"],
        ["--zero-downtime", "--drain-timeout=300ms"],
        ["--zero-downtime", "--drain-timeout=0s", "--force-kill-timeout=300ms",
         "--drain-strategy=timeout"],
    ],
    ids=["plain", "drain-timeout", "immediate", "graceful", "timeout"],
)  # fmt: skip
async def test_sessions_that_are_cut_begin_anew(
    command: Command, room: Room, flags: list[str]
) -> None:
    old, new = room.target("v1"), room.target("v2")
    clients = [room.client() for _ in range(3)]
    await room.deploy(command, old)
    for client in clients:
        assert await client.ask() == "v1"

    result = await room.deploy(command, new, *flags)

    assert (result.code, result.out, result.err) == (0, "0 sessions completed, 3 cut\n", "")
    old.die()
    for client in clients:
        assert await client.ask() == "v2"


async def talk(client: Client, name: str) -> None:
    """Ask all the time until somebody else answers than the target of that name."""
    while await client.ask() == name:  # noqa: ASYNC110
        await trio.sleep(0.01)  # the pace of this client; nothing waits for it


async def test_sessions_that_end_by_themselves_are_told_apart(command: Command, room: Room) -> None:
    old, new = room.target("v1"), room.target("v2")
    staying, leaving = room.client(), [room.client(), room.client()]
    await room.deploy(command, old, "--session-timeout=1500ms")
    results = []
    async with trio.open_nursery() as deploying, trio.open_nursery() as stay:

        async def deploy() -> None:
            flags = ["--zero-downtime", "--drain-timeout=6s"]
            results.append(await room.deploy(command, new, *flags))

        stay.start_soon(talk, staying, "v1")
        async with trio.open_nursery() as leave:
            for client in leaving:
                leave.start_soon(talk, client, "v1")
            await old.wait_received(10)
            deploying.start_soon(deploy)
            await wait_switched(command, new)
            leave.cancel_scope.cancel()
        await command.lines.wait_for_message("UDP service drained")
        stay.cancel_scope.cancel()  # what it asked when it was cut, nobody answered

    assert [result.out for result in results] == ["2 sessions completed, 1 cut\n"]
    assert await room.client().ask() == "v2"


async def test_a_target_in_both_sets_keeps_its_sessions(command: Command, room: Room) -> None:
    both, client = room.target("both"), room.client()
    await room.deploy(command, both)
    assert await client.ask() == "both"

    result = await room.deploy(command, both, "--drain-timeout=0s")

    assert (result.code, result.out, result.err) == (0, NOTHING, "")
    assert await client.ask() == "both"
    assert len(both.sources) == 1


async def test_the_drain_goes_on_without_the_command(command: Command, room: Room) -> None:
    old, new, staying = room.target("v1"), room.target("v2"), room.client()
    await room.deploy(command, old, "--session-timeout=1500ms")
    arguments = ["deploy-udp", "game", f"--target={new}", f"--port={room.port}", "--zero-downtime"]
    async with trio.open_nursery() as stay:
        stay.start_soon(talk, staying, "v1")
        await old.wait_received(3)
        process = await trio.lowlevel.open_process(
            command_line(*arguments), env=environment(command.directory)
        )
        try:
            await wait_switched(command, new)
            assert process.returncode is None
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

        assert await room.client().ask() == "v2"
        await old.wait_received(len(old.received) + 10)
        stay.cancel_scope.cancel()
    drained = await command.lines.wait_for_message("UDP service drained")
    assert (drained["completed"], drained["cut"]) == (1, 0)
    old.die()
    assert await room.client().ask() == "v2"


# --- what is refused, and what fails -------------------------------------------------------------


# One of each place that refuses; tests/cli/test_deploy_udp.py has all of them.
REFUSED = [
    (["--port=9999"], 'required flag(s) "target" not set'),
    (["--target=game"], "target game must have a port, such as game:9999"),
    (["--target=game:1", "--session-timeout=60"],
     'invalid argument "60" for "--session-timeout" flag: time: missing unit in duration "60"'),
    (["--target=game:1", "--drain-timeout=3m"],
     "force-kill-timeout 2m0s must not be less than drain-timeout 3m0s"),
]  # fmt: skip


async def test_bad_input_is_refused(command: Command) -> None:
    for flags, sentence in REFUSED:
        result = await command.kp("deploy-udp", "game", *flags)

        assert (result.code, result.out) == (1, "")
        assert result.err.splitlines()[-1] == f"Error: {sentence}"
    assert await rows(command) == []
    assert not udp_state_path(command).exists()


async def test_a_failed_deploy_changes_nothing(command: Command, room: Room) -> None:
    client = room.client()
    await room.deploy(command, room.target("v1"))
    assert await client.ask() == "v1"
    listed = await rows(command)
    state = udp_state_path(command).read_bytes()
    unhealthy = room.target("v2", healthy=False)
    result = await room.deploy(command, unhealthy, "--deploy-timeout=1s")

    assert (result.code, result.out) == (1, "")
    *details, sentence = result.err.splitlines()
    assert sentence == "Error: target failed to become healthy within configured timeout (1s)"
    assert len(details) == 1
    assert details[0].startswith(f"target {unhealthy}: connection refused at tcp://{unhealthy}")
    for helpful in ("--health-check-port", "--health-check none"):
        assert helpful in details[0]
    assert unhealthy.received == [], "a check is never a datagram"
    assert await client.ask() == "v1"
    assert await room.client().ask() == "v1"
    assert await rows(command) == listed
    assert udp_state_path(command).read_bytes() == state


async def test_a_failed_first_deploy_leaves_nothing(command: Command, room: Room) -> None:
    with socket.socket() as closed:
        closed.bind((LOCALHOST, 0))  # bound but not listening: refuses
        target = f"{LOCALHOST}:{closed.getsockname()[1]}"
        flags = [f"--target={target}", f"--port={room.port}", "--deploy-timeout=300ms"]
        result = await command.kp("deploy-udp", "game", *flags)

    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == (
        "Error: target failed to become healthy within configured timeout (300ms)"
    )
    assert await rows(command) == []
    assert is_free(room.port)
    assert not udp_state_path(command).exists()


async def test_a_taken_port_is_named_with_its_owner(command: Command, room: Room) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", room.port))
        result = await room.deploy(command, room.target("v1"))

    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(
        rf"Error: listen udp :{room.port}: bind: address already in use by .+ \(process \d+\)\n",
        result.err,
    )
    assert await rows(command) == []


async def test_a_check_on_another_port_or_of_none(command: Command, room: Room) -> None:
    silent = room.target("v1", healthy=False)
    async with open_upstream() as web:
        web.health = 404
        http = ["--health-check=http", f"--health-check-port={web.health_port}"]
        refused = await room.deploy(command, silent, *http, "--deploy-timeout=300ms")
        web.health = 200
        for flags in (http, [f"--health-check-port={web.port}"], ["--health-check=none"]):
            result = await room.deploy(command, silent, *flags)
            assert (result.code, result.out, result.err) == (0, NOTHING, "")

    assert refused.code == 1
    assert f"target {silent}: status 404 at http://127.0.0.1:{web.health_port}/up" in refused.err


async def test_deploying_without_a_proxy(directory: Path) -> None:
    result = await kp(directory, "deploy-udp", "game", "--target=127.0.0.1:7001")

    assert (result.code, result.out) == (1, "")
    assert result.err == (
        f"Error: dial unix {directory}/kamal-proxy.sock: connect: no such file or directory\n"
    )
