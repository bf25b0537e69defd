"""The running command: routing, balancing by health, odd targets, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.running import open_instance
from tests.scripted import open_client, open_upstream, respond

if TYPE_CHECKING:
    from tests.running import Command
    from tests.scripted import Peer, Upstream

MEGABYTE = 1024 * 1024
BIG = 200 * MEGABYTE


async def test_routing(command: Command) -> None:
    services = {
        "every": ["--path-prefix=/"],
        "every-api": ["--path-prefix=/api"],
        "exact": ["--host=www.a.example"],
        "wild": ["--host=*.a.example"],
        "wild-deep": ["--host=*.a.example", "--path-prefix=/api/v2", "--strip-path-prefix=false"],
        "apex": ["--host=a.example", "--host=other.example"],
        "apex-api": ["--host=a.example", "--path-prefix=/api,/v2"],
    }
    expected = {
        ("www.a.example", "/"): "exact",
        ("www.a.example", "/api/v2"): "exact",
        ("WWW.A.Example:8080", "/"): "exact",
        ("www.a.example.", "/"): "exact",
        ("x.a.example", "/"): "wild",
        ("x.a.example", "/api"): "wild",
        ("x.a.example", "/api/v2/y"): "wild-deep",
        ("x.a.example", "/api/v22"): "wild",
        ("x.y.a.example", "/"): "every",
        ("a.example", "/"): "apex",
        ("other.example", "/api"): "apex",
        ("a.example", "/api"): "apex-api",
        ("a.example", "/v2/x"): "apex-api",
        ("a.example", "/apis"): "apex",
        ("b.example", "/"): "every",
        ("b.example", "/api/x"): "every-api",
        ("127.0.0.1", "/"): "every",
        ("", "/"): "every",
    }
    async with trio.open_nursery() as nursery:

        async def serve(name: str, *, task_status: trio.TaskStatus[Upstream]) -> None:
            async def tell(peer: Peer) -> None:
                while (request := await peer.receive_request()) is not None:
                    body = name.encode() + b" " + request.target
                    await peer.send(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                    )

            async with open_upstream(tell) as upstream:
                task_status.started(upstream)
                await trio.sleep_forever()

        async with trio.open_nursery() as deploys:
            for name, flags in services.items():
                upstream = await nursery.start(serve, name)
                deploys.start_soon(command.deploy, name, *[*upstream.flags(), *flags])
        async with open_client(command.port) as client:
            found = {}
            for host, path in expected:
                body = (await client.get(path, host=host)).body.decode()
                found[host, path] = body.split()[0]
            stripped = (await client.get("/%61pi/x%2f?a=%20&b", host="b.example")).body
            kept = (await client.get("/api/v2/x?y", host="x.a.example")).body
        nursery.cancel_scope.cancel()

    assert found == expected
    assert stripped == b"every-api /x%2f?a=%20&b"
    assert kept == b"wild-deep /api/v2/x?y"


async def names(command: Command, count: int) -> set[str]:
    """Return who answers that many requests; all must be answered."""
    found = set()
    async with open_client(command.port) as client:
        for _ in range(count):
            response = await client.get()
            assert response.status == 200
            found.add(response.body.split()[0].decode())
    return found


async def set_health(port: int, status: int) -> None:
    async with open_client(port) as client:
        assert (await client.get(f"/health?status={status}")).status == 200


async def wait_state(command: Command, target: str, state: str, since: int) -> None:
    seen = command.lines.all[:since]
    await command.lines.wait_for(
        lambda line: (
            line["msg"] == "Target health updated"
            and (line["target"], line["state"]) == (target, state)
            and not any(line is old for old in seen)
        )
    )


async def test_unhealthy_targets_leave_the_rotation_and_come_back(command: Command) -> None:
    async with open_instance("one") as one, open_instance("two") as two:
        await command.deploy(
            "web", f"--target={one.target},{two.target}", "--health-check-interval=50ms"
        )
        assert await names(command, 4) == {"one", "two"}
        async with open_client(command.port) as client:  # in turn
            turns = [(await client.get()).body.split()[0] for _ in range(6)]
        assert turns[0::2] == [turns[0]] * 3
        assert turns[1::2] == [turns[1]] * 3

        mark = len(command.lines.all)
        await set_health(one.port, 503)
        await wait_state(command, one.target, "unhealthy", mark)
        assert await names(command, 6) == {"two"}

        mark = len(command.lines.all)
        await set_health(one.port, 200)
        await wait_state(command, one.target, "healthy", mark)
        assert await names(command, 6) == {"one", "two"}

        mark = len(command.lines.all)
        await set_health(one.port, 503)
        await set_health(two.port, 503)
        await wait_state(command, one.target, "unhealthy", mark)
        await wait_state(command, two.target, "unhealthy", mark)
        async with open_client(command.port) as client:
            assert (await client.get()).status == 503

        mark = len(command.lines.all)
        await set_health(two.port, 200)
        await wait_state(command, two.target, "healthy", mark)
        assert await names(command, 3) == {"two"}


async def test_killed_target_is_not_noticed_by_clients(command: Command) -> None:
    async with open_instance("one") as one, open_instance("two") as two:
        await command.deploy("web", f"--target={one.target},{two.target}")
        async with open_client(command.port) as client:
            for number in range(40):
                if number == 10:
                    await one.kill()
                assert (await client.get()).status == 200


async def test_single_target_that_dies_and_comes_back(command: Command) -> None:
    async with open_instance("first") as first:
        await command.deploy("web", f"--target={first.target}", "--health-check-interval=50ms")
        assert await names(command, 2) == {"first"}
        await first.kill()
        await wait_state(command, first.target, "unhealthy", 0)
        async with open_client(command.port) as client:
            response = await client.get()
            assert response.status == 502  # it is tried all the same: probes lag behind
            async with open_instance("again", port=first.port):
                assert (await client.get()).body.startswith(b"again ")


@pytest.mark.parametrize("declared", [10, 11])
async def test_target_that_answers_before_it_reads(command: Command, declared: int) -> None:
    """Such as ``echo ... | nc -l``; Kamal's own tests deploy one, and probe it at ``/``."""

    async def netcat(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nHello Ruby\n" % declared)

    async with open_upstream(netcat) as upstream, open_client(command.port) as client:
        await command.deploy(
            "netcat", f"--target={upstream.target}", "--health-check-path=/", "--host=netcat"
        )
        for _ in range(20):
            response = await client.get(host="netcat")
            assert (response.status, response.body) == (200, b"Hello Ruby\n"[:declared])
        assert (await command.kp("remove", "netcat")).code == 0
        assert (await client.get(host="netcat")).status == 404


def resident_size(pid: int) -> int:
    """Return the memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
async def test_memory_is_bounded_whatever_the_size_of_a_body(command: Command) -> None:
    async with open_instance("big") as big, open_client(command.port) as client:
        await command.deploy("web", f"--target={big.target}")
        await client.get(f"/big?bytes={MEGABYTE}")
        before = resident_size(command.pid)

        await client.send(b"GET /big?bytes=%d HTTP/1.1\r\nHost: a\r\n\r\n" % BIG)
        await client.receive_until(b"\r\n\r\n")
        client.received.clear()
        left = BIG
        while left:
            left -= len(await client.receive_some())
            client.received.clear()

        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % BIG)
        for _ in range(BIG // MEGABYTE):
            await client.send(bytes(MEGABYTE))
        response = await client.receive_response(b"POST")
        assert response.body.startswith(b"big %d " % BIG)

        grown = resident_size(command.pid) - before
        assert grown < 30 * MEGABYTE, f"grew by {grown // MEGABYTE} MiB"
    lines = await command.lines.wait_requests(3)
    assert lines[1]["resp_content_length"] == BIG
    assert lines[2]["req_content_length"] == BIG


async def test_many_connections_at_once(command: Command) -> None:
    async def ask() -> None:
        async with open_client(command.port) as client:
            for _ in range(3):
                assert (await client.get()).body == b"x"

    async with open_upstream(respond(b"x")) as upstream:
        await command.deploy("web", *upstream.flags())
        async with trio.open_nursery() as nursery:
            for _ in range(150):
                nursery.start_soon(ask)
        assert len(await command.lines.wait_requests(450)) == 450
