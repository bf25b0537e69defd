"""HTTP/2 servers that others wrote, as targets: nghttpd, and nginx with its GOAWAYs."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from kamal_proxy import DeployOptions, HealthCheckOptions, TargetOptions
from tests.e2e.programs import needs, open_program
from tests.ports import free_port
from tests.running import Embedded, open_embedded
from tests.scripted import LOCALHOST, open_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BIG = bytes(range(256)) * 8192  # 2 MiB
CONFIGURATION = """
daemon off; master_process off; pid nginx.pid; error_log /dev/stderr;
events {}
http {
  access_log off;
  client_body_temp_path body; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u;
  scgi_temp_path s;
  server {
    listen 127.0.0.1:%d http2;
    keepalive_requests 30;
    location / { return 200 "hello"; }
  }
}
"""


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded() as running:
        yield running


def same(body: bytes, wanted: bytes) -> bool:
    """Compare without showing megabytes."""
    return body == wanted


async def deploy(proxy: Embedded, port: int, path: str) -> None:
    """Deploy a server that is about to listen."""
    check = HealthCheckOptions(path=path, interval=60.0)
    await proxy.deploy(
        DeployOptions(
            service="web",
            targets=(f"h2c://{LOCALHOST}:{port}",),
            target_options=TargetOptions(health_check=check),
        )
    )


@asynccontextmanager
async def open_nghttpd(proxy: Embedded, directory: Path, *options: str) -> AsyncIterator[None]:
    port = free_port()
    (directory / "big").write_bytes(BIG)
    (directory / "up").write_bytes(b"up")
    command = ["nghttpd", "--no-tls", f"--address={LOCALHOST}", *options, str(port)]
    async with open_program(directory, *command):
        await deploy(proxy, port, "/up")
        yield


@needs("nghttpd", package="nghttp2-server")
async def test_nghttpd_serves_files(proxy: Embedded, tmp_path: Path) -> None:
    """Padded, with small windows, two at a time on each connection, and with trailers."""
    options = ("--padding=200", "--max-concurrent-streams=2", "--trailer=x-sum: 1")
    async with open_nghttpd(proxy, tmp_path, *options):

        async def get() -> None:
            async with open_client(proxy.port) as client:
                for _ in range(3):
                    response = await client.get(
                        "/big", headers="TE: trailers\r\nConnection: TE\r\n"
                    )
                    assert same(response.body, BIG)
                    assert response.trailers == []  # a body of a length has none in HTTP/1.1
                    assert (await client.get("/none")).status == 404

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(get)


@needs("nghttpd", package="nghttp2-server")
async def test_nghttpd_takes_what_is_uploaded(proxy: Embedded, tmp_path: Path) -> None:
    async with (
        open_nghttpd(proxy, tmp_path, "--echo-upload", "--window-bits=14"),
        open_client(proxy.port) as client,
    ):
        head = b"POST /big HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(BIG)
        assert same((await client.request(head + BIG)).body, BIG)


@needs("nginx", package="nginx")
async def test_a_server_that_gives_up_its_connections_all_the_time(
    proxy: Embedded, tmp_path: Path
) -> None:
    """Each after thirty requests, while others are on their way on it: none is lost."""
    port = free_port()
    (tmp_path / "nginx.conf").write_text(CONFIGURATION % port)
    command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    async with open_program(tmp_path, *command):
        await deploy(proxy, port, "/")
        statuses: list[int] = []

        async def ask(request: bytes) -> None:
            async with open_client(proxy.port) as client:
                for _ in range(40):
                    response = await client.request(request)
                    statuses.append(response.status)

        post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
        async with trio.open_nursery() as nursery:
            for request in (post, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") * 8:
                nursery.start_soon(ask, request)
        assert statuses == [200] * 640
