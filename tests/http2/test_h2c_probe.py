"""Health checks of HTTP/2 targets: over h2c, as gRPC has them, over HTTP/1.1 on another port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kamal_proxy import DeploymentOptions, DeployOptions, HealthCheckOptions, TargetOptions
from kamal_proxy.errors import DeployFailedError
from kamal_proxy.http.probe import GRPC_HEALTH_PATH
from tests.http2.targets import Asked, H2Peer, answer, h2
from tests.running import Embedded, open_embedded
from tests.scripted import open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.scripted import Peer, Upstream

SERVING = b"\0\0\0\0\2\x08\1"
NOT_SERVING = b"\0\0\0\0\2\x08\2"


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded() as running:
        yield running


def options(upstream: Upstream, **check: object) -> DeployOptions:
    """Build the options of a deploy whose probes go to the target's own port."""
    return DeployOptions(
        service="web",
        targets=(f"h2c://{upstream.target}",),
        target_options=TargetOptions(
            health_check=HealthCheckOptions(interval=60.0, **check)  # type: ignore[arg-type]
        ),
        deployment_options=DeploymentOptions(deploy_timeout=0.4),
    )


async def failure(proxy: Embedded, upstream: Upstream, **check: object) -> str:
    """Deploy, which must fail; return what the last probe found."""
    with pytest.raises(DeployFailedError) as caught:
        await proxy.deploy(options(upstream, **check))
    (detail,) = caught.value.details
    return detail.removeprefix(f"target {upstream.target}: ").partition(" at h2c://")[0]


async def test_a_probe_speaks_http2(proxy: Embedded) -> None:
    seen: list[Asked] = []
    async with open_upstream(h2(answer(seen=seen))) as upstream:
        await proxy.deploy(options(upstream))
        assert seen[0].fields[:4] == [
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":authority", upstream.target.encode()),
            (b":path", b"/up"),
        ]
        assert seen[0].get(b"user-agent") == b"kamal-proxy"
        await upstream.peers[0].wait_closed()
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200


@pytest.mark.parametrize(
    ("status", "fields", "found"),
    [
        (503, [], "status 503"),
        (
            302,
            [(b"location", b"https://app.example/up")],
            "status 302, redirect to https://app.example/up (a probe follows redirects over plain "
            "HTTP only; exempt the health check path from the redirect)",
        ),
    ],
)
async def test_what_is_not_healthy(
    proxy: Embedded, status: int, fields: list[tuple[bytes, bytes]], found: str
) -> None:
    async def serve(peer: H2Peer) -> None:
        peer.head(await peer.wait_request(), status, *fields, end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        assert await failure(proxy, upstream) == found


@pytest.mark.parametrize("location", [b"/else", b"http://%s/else"])
async def test_a_redirect_to_the_target_itself(proxy: Embedded, location: bytes) -> None:
    """It is followed over HTTP/2 as well, whatever its scheme says."""
    paths: list[bytes | None] = []

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        paths.append(asked.get(b":path"))
        if len(paths) == 1:
            to = location.replace(b"%s", upstream.target.encode())
            peer.head(asked, 302, (b"location", to), end_stream=True)
        else:
            peer.head(asked, 204, end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(options(upstream))
    assert paths == [b"/up", b"/else"]


async def test_a_target_that_only_speaks_http1(proxy: Embedded) -> None:
    async def refuse(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        await peer.wait_closed()

    async with open_upstream(refuse) as upstream:
        found = await failure(proxy, upstream)
        assert "it speaks HTTP/1 here; leave out h2c:// to reach it so" in found


async def test_a_target_that_refuses_connections(proxy: Embedded) -> None:
    async with open_upstream() as upstream:
        upstream.stop_listening()
        assert await failure(proxy, upstream) == "connection refused"


async def test_another_port_is_probed_over_http1(proxy: Embedded) -> None:
    async with open_upstream(h2(answer())) as upstream, open_upstream() as health:
        await proxy.deploy(options(upstream, port=health.port))
        assert health.requests[0].target == b"/up"
        assert upstream.peers == []


def grpc(body: bytes, trailers: list[tuple[bytes, bytes]]) -> Callable[[H2Peer], Awaitable[None]]:
    """Return a script of a gRPC server that says this about its health."""

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        assert asked.get(b":method") == b"POST"
        assert asked.get(b"content-type") == b"application/grpc"
        assert asked.get(b"te") == b"trailers"
        assert asked.body == bytes(5)
        fields = (b"content-type", b"application/grpc")
        if body:
            peer.head(asked, 200, fields)
            peer.h2.send_data(asked.stream_id, body)
            peer.h2.send_headers(asked.stream_id, trailers, end_stream=True)
        else:  # all that there is to say, in the head
            peer.head(asked, 200, fields, *trailers, end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    return serve


OK = [(b"grpc-status", b"0")]


async def test_a_grpc_server_says_that_it_is_healthy(proxy: Embedded) -> None:
    async with open_upstream(h2(grpc(SERVING, OK))) as upstream:
        await proxy.deploy(options(upstream, path=GRPC_HEALTH_PATH))


@pytest.mark.parametrize(
    ("body", "trailers", "found"),
    [
        (NOT_SERVING, OK, "gRPC health: not serving"),
        (b"\0\0\0\0\0", OK, "gRPC health: not serving"),
        (b"x" * 10_000, OK, "gRPC health: not serving"),
        (b"", [(b"grpc-status", b"12")], "status 200, gRPC status 12"),
        (b"", [(b"grpc-status", b"0")], "gRPC health: not serving"),
        (SERVING, [(b"grpc-status", b"5")], "status 200, gRPC status 5"),
    ],
)
async def test_a_grpc_server_says_that_it_is_not(
    proxy: Embedded, body: bytes, trailers: list[tuple[bytes, bytes]], found: str
) -> None:
    async with open_upstream(h2(grpc(body, trailers))) as upstream:
        assert await failure(proxy, upstream, path=GRPC_HEALTH_PATH) == found
