"""Which target a request reaches: readers and writers, the writer cookie, rollout."""

from __future__ import annotations

import re
import time
from contextlib import AsyncExitStack, asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio.testing

from kamal_proxy import PauseOptions, RolloutOptions, RolloutSplit, ServiceOptions
from kamal_proxy.errors import DeployFailedError
from kamal_proxy.options import DeploymentOptions, DeployOptions
from kamal_proxy.target_options import HealthCheckOptions
from tests.running import open_embedded
from tests.scripted import deploy_options, ok, open_client, open_upstream, reply, respond

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from tests.running import Embedded
    from tests.scripted import Client, Response, Upstream

WEBSOCKET = "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
SWITCHED = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
WRITER = re.compile(rb"kamal-writer=([0-9]+); Path=/; Expires=([^;]+ GMT); HttpOnly")


@asynccontextmanager
async def open_upstreams(*names: str) -> AsyncIterator[list[Upstream]]:
    """Open targets that answer with their names."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_upstream(respond(name.encode()))) for name in names
        ]


def options(
    writers: Sequence[Upstream], readers: Sequence[Upstream] = (), **service: Any
) -> DeployOptions:
    """Build the options of a deploy with readers."""
    return attrs.evolve(
        deploy_options("web", writers),
        read_targets=tuple(reader.target for reader in readers),
        service_options=ServiceOptions(**service),
    )


def rollout(writers: Sequence[Upstream], readers: Sequence[Upstream] = ()) -> RolloutOptions:
    return RolloutOptions(
        targets=tuple(writer.target for writer in writers),
        read_targets=tuple(reader.target for reader in readers),
        deployment_options=DeploymentOptions(deploy_timeout=10),
    )


async def send(client: Client, method: str = "GET", headers: str = "") -> Response:
    """Send a request without a body."""
    request = f"{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n{headers}\r\n"
    return await client.request(request.encode())


async def bodies(client: Client, count: int, method: str = "GET", headers: str = "") -> list[bytes]:
    return [(await send(client, method, headers)).body for _ in range(count)]


# Readers and writers


async def test_reads_take_turns_over_the_readers(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w1", "w2", "r1", "r2") as (w1, w2, r1, r2):
        await proxy.deploy(options([w1, w2], [r1, r2]))
        assert await bodies(client, 4) == [b"r2", b"r1", b"r2", b"r1"]
        assert await bodies(client, 4, "POST") == [b"w2", b"w1", b"w2", b"w1"]
        heads = [(await send(client, "HEAD")).status for _ in range(2)]
        assert heads == [200, 200]
        lines = await proxy.lines.wait_requests(10)
        assert [line["target"] for line in lines[-2:]] == [r2.target, r1.target]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY"])
async def test_everything_else_writes(proxy: Embedded, client: Client, method: str) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader]))
        before = time.time()
        response = await send(client, method)
        after = time.time()
        assert response.body == b"w"
        (cookie,) = response.get(b"set-cookie")
        match = WRITER.fullmatch(cookie)
        assert match is not None, cookie
        milliseconds, expires = match.groups()
        assert before + 1 - 0.001 <= int(milliseconds) / 1000 <= after + 1
        end = parsedate_to_datetime(expires.decode()).timestamp()
        assert end == int(milliseconds) // 1000 + 1
        # Whoever has just written does not read what may be old.
        headers = f"Cookie: a=b; {cookie.decode().partition(';')[0]}\r\n"
        read = await send(client, "GET", headers)
        assert read.get(b"set-cookie") == [], "reading does not prolong it"


@pytest.mark.parametrize(
    ("offset", "form", "body"),
    [
        (9000, "%d", b"w"),
        (9000, "+%d", b"w"),
        (9000, '"%d"', b"w"),
        (-1, "%d", b"r"),
        (9000, "%d.0", b"r"),
        (9000, "x%d", b"r"),
        (9000, "%dx", b"r"),
        (9000, "-%d", b"r"),
        (9000, "%d" + 20 * "0", b"r"),
    ],
)
async def test_a_writer_cookie_counts_until_it_expires(
    proxy: Embedded, client: Client, offset: int, form: str, body: bytes
) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader]))
        value = form % (time.time() * 1000 + offset)
        response = await send(client, "GET", f"Cookie: kamal-writer={value}\r\n")
        assert response.body == body


async def test_a_target_can_say_that_nothing_was_written(proxy: Embedded, client: Client) -> None:
    answer = ok(b"hi").replace(b"Content", b"X-Writer-Affinity: %b\r\nX: y\r\nContent")
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader]))
        for value, cookies in ((b"false", 0), (b"true", 1), (b"", 1)):
            writer.script(reply(answer % value))
            response = await send(client, "POST")
            assert len(response.get(b"set-cookie")) == cookies
            assert response.get(b"x-writer-affinity") == []
            assert response.get(b"x") == [b"y"]
        reader.script(reply(answer % b"false"))
        assert (await send(client)).get(b"x-writer-affinity") == [b"false"], "it was no write"


async def test_a_targets_own_cookies_stay(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader]))
        writer.script(reply(ok(b"").replace(b"Content", b"Set-Cookie: a=b\r\nContent")))
        first, second = (await send(client, "POST")).get(b"set-cookie")
        assert first == b"a=b"
        assert WRITER.fullmatch(second)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_without_readers_there_is_no_affinity(
    proxy: Embedded, client: Client, method: str
) -> None:
    answer = ok(b"").replace(b"Content", b"X-Writer-Affinity: false\r\nContent")
    async with open_upstream(reply(answer)) as writer:
        await proxy.deploy(options([writer]))
        response = await send(client, method)
        assert response.get(b"set-cookie") == []
        assert response.get(b"x-writer-affinity") == [b"false"], "it is none of ours"


async def test_affinity_can_be_turned_off_or_last_longer(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader], writer_affinity_timeout=0))
        response = await send(client, "POST")
        assert (response.body, response.get(b"set-cookie")) == (b"w", [])
        before = time.time()
        await proxy.deploy(options([writer], [reader], writer_affinity_timeout=3600))
        (cookie,) = (await send(client, "POST")).get(b"set-cookie")
        match = WRITER.fullmatch(cookie)
        assert match is not None
        assert int(match[1]) >= int((before + 3600) * 1000)
        headers = f"Cookie: {cookie.decode().partition(';')[0]}\r\n"
        assert await bodies(client, 3, "GET", headers) == [b"w"] * 3
        assert await bodies(client, 1, "GET") == [b"r"]


@pytest.mark.parametrize("allowed", [False, True])
async def test_websockets_read_only_where_they_may(proxy: Embedded, allowed: bool) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader], read_targets_accept_websockets=allowed))
        (reader if allowed else writer).script(reply(SWITCHED + b"hi"))
        async with open_client(proxy.port) as client:
            await client.send(f"GET / HTTP/1.1\r\nHost: a\r\n{WEBSOCKET}\r\n".encode())
            head = await client.receive_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert (b"Set-Cookie: kamal-writer=" in head) == (not allowed)
            assert await client.receive_eof() == b"hi"
        (line,) = await proxy.lines.wait_requests(1)
        assert line["target"] == (reader if allowed else writer).target


async def test_readers_that_refuse_are_left_out(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w", "r1", "r2") as (writer, r1, r2):
        await proxy.deploy(options([writer], [r1, r2]))
        r1.stop_listening()
        assert await bodies(client, 4) == [b"r2"] * 4
    async with open_upstreams("w", "r1", "r2") as (writer, r1, r2):
        await proxy.deploy(options([writer], [r1, r2]))
        r1.stop_listening()
        r2.stop_listening()
        assert await bodies(client, 2) == [b"w"] * 2
        assert (await send(client)).get(b"set-cookie") == [], "it was read nevertheless"
        writer.stop_listening()
        for peer in writer.peers:
            peer.shutdown_write()
        response = await send(client)
        assert response.status == 502


async def test_a_write_never_goes_to_a_reader(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(options([writer], [reader]))
        writer.stop_listening()
        assert (await send(client, "POST")).status == 502
        assert reader.peers == []
        assert (await send(client, "GET")).body == b"r"


def probed(deploy: DeployOptions, interval: float = 60) -> DeployOptions:
    """Let every target answer its own probes."""
    check = HealthCheckOptions(interval=interval)
    return attrs.evolve(
        deploy, target_options=attrs.evolve(deploy.target_options, health_check=check)
    )


async def test_readers_must_be_healthy_for_a_deploy(proxy: Embedded, client: Client) -> None:
    async with (
        open_upstreams("w", "r") as (writer, reader),
        open_upstream(reply(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")) as broken,
    ):
        await proxy.deploy(probed(options([writer], [reader])))
        bad = probed(options([writer], [reader, broken]))
        bad = attrs.evolve(bad, deployment_options=DeploymentOptions(deploy_timeout=0.3))
        with pytest.raises(DeployFailedError) as caught:
            await proxy.deploy(bad)
        (detail,) = caught.value.details
        assert detail.startswith(f"target {broken.target}: status 500")
        assert await bodies(client, 2) == [b"r"] * 2


async def test_unhealthy_readers_are_out_of_rotation(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w", "r") as (writer, reader):
        await proxy.deploy(probed(options([writer], [reader]), interval=0.05))
        assert await bodies(client, 1) == [b"r"]
        reader.stop_listening()
        await proxy.lines.wait_for(
            lambda line: line.get("target") == reader.target and line.get("state") == "unhealthy"
        )
        assert await bodies(client, 2) == [b"w"] * 2


# Rollout


@pytest.mark.parametrize(
    ("cookie", "body"),
    [
        # What the Go proxy did with --percent 33 --list x,y&z.
        ("kamal-rollout=x", b"new"),
        ('kamal-rollout="x"', b"new"),
        ("a=b; kamal-rollout =x", b"new"),
        ("kamal-rollout=y&z", b"new"),
        ("kamal-rollout=", b"old"),
        ("kamal-rollout", b"old"),
        ("kamal-rollout=zzz; kamal-rollout=x", b"old"),
        ("kamal-rollout=foo", b"old"),
        ("kamal-rollout=bar", b"old"),
        ("Kamal-Rollout=x", b"old"),
        ("a=kamal-rollout=x", b"old"),
        ("kamal-rollouts=x; xkamal-rollout=x", b"old"),
    ],
)
async def test_who_is_chosen(proxy: Embedded, client: Client, cookie: str, body: bytes) -> None:
    async with open_upstreams("old", "new") as (old, new):
        await proxy.deploy(options([old]))
        await proxy.proxy.deploy_rollout("web", rollout([new]))
        await proxy.proxy.set_rollout("web", RolloutSplit(percentage=33, allowlist=("x", "y&z")))
        assert (await send(client, "GET", f"Cookie: {cookie}\r\n")).body == body


async def test_shares_follow_the_cookie(proxy: Embedded, client: Client) -> None:
    """FNV-1a: ``foo`` has 0xa9f37ed7, 66.4 %; ``foobar`` has 0xbf9cf968, 74.8 %."""
    async with open_upstreams("old", "new") as (old, new):
        await proxy.deploy(options([old]))
        await proxy.proxy.deploy_rollout("web", rollout([new]))

        values = ("foo", "foobar")

        async def answers() -> list[bytes]:
            return [
                (await send(client, "GET", header)).body
                for header in ("", *(f"Cookie: kamal-rollout={value}\r\n" for value in values))
            ]

        assert await answers() == [b"old", b"old", b"old"], "without a split"
        for percentage, expected in (
            (0, [b"old", b"old", b"old"]),
            (66, [b"old", b"old", b"old"]),
            (67, [b"old", b"new", b"old"]),
            (74, [b"old", b"new", b"old"]),
            (75, [b"old", b"new", b"new"]),
            (100, [b"old", b"new", b"new"]),
        ):
            await proxy.proxy.set_rollout("web", RolloutSplit(percentage=percentage))
            assert await answers() == expected, percentage
        await proxy.proxy.stop_rollout("web")
        assert await answers() == [b"old", b"old", b"old"]


async def test_a_rollout_has_readers_of_its_own(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("w", "r", "nw", "nr") as (writer, reader, new_writer, new_reader):
        await proxy.deploy(options([writer], [reader]))
        await proxy.proxy.deploy_rollout("web", rollout([new_writer], [new_reader]))
        await proxy.proxy.set_rollout("web", RolloutSplit(allowlist=("x",)))
        chosen = "Cookie: kamal-rollout=x\r\n"
        assert (await send(client, "GET")).body == b"r"
        assert (await send(client, "GET", chosen)).body == b"nr"
        response = await send(client, "POST", chosen)
        assert response.body == b"nw"
        assert len(response.get(b"set-cookie")) == 1
        # One pool's failure is not made good by the other.
        new_reader.stop_listening()
        for peer in new_reader.peers:
            peer.shutdown_write()
        assert (await send(client, "GET", chosen)).body == b"nw"


async def test_another_deploy_and_another_rollout(proxy: Embedded, client: Client) -> None:
    async with open_upstreams("a1", "a2", "r1", "r2") as (a1, a2, r1, r2):
        chosen = "Cookie: kamal-rollout=x\r\n"

        async def answers() -> tuple[bytes, bytes]:
            return (await send(client)).body, (await send(client, "GET", chosen)).body

        await proxy.deploy(options([a1]))
        await proxy.proxy.deploy_rollout("web", rollout([r1]))
        await proxy.proxy.set_rollout("web", RolloutSplit(percentage=100))
        assert await answers() == (b"a1", b"r1")
        await proxy.deploy(options([a2]))
        assert await answers() == (b"a2", b"r1")
        await proxy.proxy.deploy_rollout("web", rollout([r2]))
        assert await answers() == (b"a2", b"r2")
        await proxy.proxy.stop_rollout("web")
        assert await answers() == (b"a2", b"a2")
        await proxy.proxy.set_rollout("web", RolloutSplit(percentage=100))
        assert await answers() == (b"a2", b"r2")
        await proxy.proxy.remove("web")
        assert (await send(client, "GET", chosen)).status == 404


async def test_a_pause_holds_both(proxy: Embedded) -> None:
    async with (
        open_upstreams("old", "new") as (old, new),
        open_client(proxy.port) as one,
        open_client(proxy.port) as two,
    ):
        await proxy.deploy(options([old]))
        await proxy.proxy.deploy_rollout("web", rollout([new]))
        await proxy.proxy.set_rollout("web", RolloutSplit(percentage=100))
        await proxy.proxy.pause("web", PauseOptions())
        await one.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await two.send(b"GET / HTTP/1.1\r\nHost: a\r\nCookie: kamal-rollout=x\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert old.peers == new.peers == []
        await proxy.proxy.resume("web")
        assert (await one.receive_response()).body == b"old"
        assert (await two.receive_response()).body == b"new"


async def test_a_rollout_survives_a_restart(tmp_path: Path) -> None:
    async with open_upstreams("old", "new", "reader") as (old, new, reader):
        async with open_embedded(data_directory=tmp_path) as first:
            await first.deploy(options([old]))
            await first.proxy.deploy_rollout("web", rollout([new], [reader]))
            await first.proxy.set_rollout("web", RolloutSplit(allowlist=("x",)))
        async with (
            open_embedded(data_directory=tmp_path) as second,
            open_client(second.port) as client,
        ):
            chosen = "Cookie: kamal-rollout=x\r\n"
            assert (await send(client)).body == b"old"
            assert (await send(client, "GET", chosen)).body == b"reader"
            assert (await send(client, "POST", chosen)).body == b"new"
