"""The unit for systemd, checked by systemd's own tools, and carried out as far as a test can.

A test can't count on systemd to run. What it would do for the unit is done by others: environment,
capabilities, a network of its own with ports below 1024, and the socket that it listens on.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections import defaultdict
from contextlib import asynccontextmanager
from subprocess import run
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy.durations import parse_duration
from kamal_proxy.run_options import RunOptions
from tests.e2e.namespaces import can_make_namespaces, open_namespace
from tests.e2e.programs import needs, open_program
from tests.ports import free_port
from tests.running import ROOT, command_line, kp, open_command, open_instance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.programs import Program

UNIT = ROOT / "docs" / "kamal-proxy.service"
EXPOSURE = 2.0  # by systemd's own scale, on which 10 is everything; a usual service has 9
PROGRAM = "/opt/kamal-proxy/bin/kamal-proxy"
LIMIT = 20.0  # seconds; a hang must fail a test

in_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="network namespaces can't be made here (unshare, ip)"
)


def settings() -> dict[str, list[str]]:
    """Return the unit's settings, each with its values in order."""
    found = defaultdict(list)
    for name, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        found[name].append(value)
    return dict(found)


def variables(directory: Path) -> list[str]:
    """Return what the unit sets in the environment, where a directory takes the place of /."""
    (text,) = settings()["Environment"]
    places = {"%S": directory / "state", "%t": directory / "run"}
    for specifier, place in places.items():
        (place / "kamal-proxy").mkdir(parents=True)  # StateDirectory and RuntimeDirectory
        text = text.replace(specifier, str(place))
    assert "%" not in text
    return text.split()


# --- the notification ----------------------------------------------------------------------------


@asynccontextmanager
async def open_manager(directory: Path) -> AsyncIterator[trio.socket.SocketType]:
    """Listen where systemd would, with ``notify`` in the directory for its socket."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        await listener.bind(str(directory / "notify"))
        with trio.fail_after(LIMIT):
            yield listener


async def test_it_tells_when_it_serves_and_when_it_stops(directory: Path) -> None:
    told = {"NOTIFY_SOCKET": str(directory / "notify")}
    async with (
        open_manager(directory) as manager,
        open_command(directory, variables=told, stop=False) as command,
    ):
        assert await manager.recv(100) == b"READY=1"
        assert (await command.kp("list")).code == 0
        command.process.terminate()
        assert await manager.recv(100) == b"STOPPING=1"
        assert await command.wait() == 0


async def test_a_start_that_fails_is_not_told_as_one(directory: Path) -> None:
    with (
        socket.socket() as other,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(directory / "notify"))
        manager.setblocking(False)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = await kp(
            directory, "run", f"--http-port={port}", "--https-port=0", "--bind=127.0.0.1",
            variables={"NOTIFY_SOCKET": str(directory / "notify")},
        )  # fmt: skip
        assert result.code == 1
        assert "address already in use" in result.err
        with pytest.raises(BlockingIOError):
            manager.recv(100)


async def test_a_manager_that_is_gone_keeps_it_from_nothing(directory: Path) -> None:
    told = {"NOTIFY_SOCKET": str(directory / "nobody")}
    async with open_command(directory, variables=told) as command:
        line = await command.lines.wait_for_message("systemd can't be told")
        assert (line["level"], line["state"]) == ("ERROR", "READY=1")
        assert (await command.kp("list")).code == 0


# --- the unit, as systemd reads it ---------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Provide the unit with a program that is there."""
    copy = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert text.count(f"ExecStart={PROGRAM} run\n") == 1
    copy.write_text(text.replace(PROGRAM, sys.executable))
    return copy


@needs("systemd-analyze", package="systemd")
def test_systemd_finds_nothing_wrong_with_it(unit: Path) -> None:
    done = run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, complaints) == (0, [])
    unit.write_text(unit.read_text().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    done = run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "NoNewPrivilege" in done.stderr


@needs("systemd-analyze", package="systemd")
def test_systemd_finds_it_little_exposed(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = run(command, capture_output=True, text=True, check=False)
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None, done.stderr
    assert float(exposure[1]) <= EXPOSURE


def test_it_gives_requests_in_flight_their_time() -> None:
    (signal_name,) = settings()["KillSignal"]
    assert signal.Signals[signal_name] == signal.SIGTERM
    (stop,) = settings()["TimeoutStopSec"]
    assert parse_duration(stop) > RunOptions().shutdown_timeout
    assert settings()["Type"] == ["notify"]


# --- the unit, carried out -----------------------------------------------------------------------


@asynccontextmanager
async def open_unit(
    directory: Path, enter: list[str], capabilities: str, *wrapper: str
) -> AsyncIterator[Program]:
    """Run what the unit runs, in a network namespace, with some capabilities and no others."""
    ((start,), (ambient,)) = (settings()[name] for name in ("ExecStart", "AmbientCapabilities"))
    assert settings()["CapabilityBoundingSet"] == [ambient]
    assert ambient == "CAP_NET_BIND_SERVICE"
    assert settings()["NoNewPrivileges"] == ["yes"]
    arguments = start.removeprefix(PROGRAM).split()
    limited = [f"--{kind}={capabilities}" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
    # Without these bits the user 0 of the namespace could do anything in it.
    setpriv = ["setpriv", "--securebits=+noroot,+noroot_locked", "--no-new-privs", *limited]
    environment = ["env", "-u", "XDG_RUNTIME_DIR", *variables(directory)]
    environment.append(f"NOTIFY_SOCKET={directory / 'notify'}")
    command = [*enter, *environment, *setpriv, *wrapper, *command_line(*arguments)]
    async with open_program(directory, *command) as program:
        yield program


async def inside(enter: list[str], code: str) -> str:
    """Run a little Python in a namespace and return what it prints."""
    done = await trio.run_process([*enter, sys.executable, "-c", code], capture_stdout=True)
    return done.stdout.decode().strip()


@needs("setpriv", package="util-linux")
@in_namespaces
async def test_it_serves_low_ports_with_one_capability_alone(directory: Path) -> None:
    async with (
        open_namespace() as namespace,
        open_manager(directory) as manager,
        open_unit(directory, namespace.enter, "-all,+net_bind_service") as program,
    ):
        assert await manager.recv(100) == b"READY=1"
        status = await trio.Path(f"/proc/{program.process.pid}/status").read_text()
        masks = re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\t(\w+)$", status, re.MULTILINE)
        assert {int(mask, 16) for mask in masks} == {1 << 10}  # CAP_NET_BIND_SERVICE
        assert "NoNewPrivs:\t1\n" in status
        for port in (80, 443):
            code = f"import socket; socket.create_connection(('127.0.0.1', {port})); print('open')"
            assert await inside(namespace.enter, code) == "open"

        path = str(directory / "run" / "kamal-proxy" / "kamal-proxy.sock")
        told = {"KAMAL_PROXY_SOCKET": path, "HOME": str(directory / "state" / "kamal-proxy")}
        result = await kp(directory, "deploy", "web", "--target=127.0.0.1:9", "--force",
                          variables=told)  # fmt: skip
        assert (result.code, result.err) == (0, "")
        result = await kp(directory, "deploy-udp", "dns", "--target=127.0.0.1:9", "--port=53",
                          "--force", variables=told)  # fmt: skip
        assert (result.code, result.err) == (0, "")
        state = directory / "state/kamal-proxy/.config/kamal-proxy/kamal-proxy.state"
        assert "127.0.0.1:9" in await trio.Path(state).read_text()

        program.process.terminate()
        assert await manager.recv(100) == b"STOPPING=1"
        assert "Server stopped" in await program.wait()


@needs("setpriv", package="util-linux")
@in_namespaces
async def test_without_that_capability_it_does_not(directory: Path) -> None:
    async with (
        open_namespace() as namespace,
        open_unit(directory, namespace.enter, "-all") as program,
    ):
        with trio.fail_after(LIMIT):
            await program.wait_for("permission denied")


# --- what the unit forbids -----------------------------------------------------------------------


def system_calls(filters: list[str]) -> set[str]:
    """Return the system calls that a unit's filters leave, of sets those that systemd says."""
    listing = run(
        ["systemd-analyze", "--no-pager", "syscall-filter"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    sets: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if line.startswith("@"):
            sets[line] = members = []
        elif line.startswith("    ") and not line.startswith("    #"):
            members.append(line.strip())

    def expanded(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        return set().union(*map(expanded, sets[name]))

    left: set[str] = set()
    for each in filters:
        named = set().union(*map(expanded, each.removeprefix("~").split()))
        left = left - named if each.startswith("~") else left | named
    # These are always allowed (systemd.exec(5)).
    return left | expanded("@default") | {"execve", "exit", "exit_group"}


def can_trace() -> bool:
    try:
        done = run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_trace(), reason="programs can't be traced here (strace)")
@needs("systemd-analyze", package="systemd")
async def test_it_forbids_nothing_that_the_proxy_does(directory: Path) -> None:
    traced = directory / "trace"
    calls = ["strace", "-f", "-qq", "-o", str(traced)]
    async with (
        open_instance("web") as instance,
        open_command(directory, "--http3", wrapper=calls, stop=False) as command,
    ):
        await command.deploy("web", f"--target={instance.target}")
        await command.deploy("auto", f"--target={instance.target}", "--host=a.example", "--tls")
        udp = ("deploy-udp", "game", "--target=localhost:9", f"--port={free_port()}", "--force")
        assert (await command.kp(*udp)).code == 0
        with trio.fail_after(LIMIT):
            async with await trio.open_tcp_stream("127.0.0.1", command.port) as stream:
                await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
                assert (await stream.receive_some()).startswith(b"HTTP/1")
        assert (await command.kp("remove", "web")).code == 0
        # strace keeps signals to itself; the proxy is its only child.
        children = trio.Path(f"/proc/{command.pid}/task/{command.pid}/children")
        os.kill(int(await children.read_text()), signal.SIGTERM)
        assert await command.wait() == 0
    text = await trio.Path(traced).read_text()
    used = set(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))
    assert {"epoll_wait", "accept4", "socket", "renameat"} & used
    assert used <= system_calls(settings()["SystemCallFilter"])
    families = set(re.findall(r"\bsocket\((AF_\w+)", text))
    (allowed,) = settings()["RestrictAddressFamilies"]
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= families <= set(allowed.split())
