"""Clients that others wrote, over TLS and a whole proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from kamal_proxy.options import ServiceOptions
from tests.certificates import make_ca
from tests.e2e.programs import needs, output_of
from tests.http2.clients import H2Client
from tests.running import open_embedded
from tests.scripted import LOCALHOST, deploy_options, ok, open_upstream, reply
from tests.secure import client_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kamal_proxy import DeployOptions
    from tests.running import Embedded
    from tests.scripted import Upstream

AUTHORITY = make_ca()


def service(upstream: Upstream, files: tuple[str, str]) -> DeployOptions:
    """Return what deploys a service for ``localhost``."""
    return attrs.evolve(
        deploy_options("web", [upstream]),
        service_options=ServiceOptions(
            hosts=("localhost",),
            tls_enabled=True,
            tls_certificate_path=files[0],
            tls_private_key_path=files[1],
        ),
    )


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Return the files of a certificate for ``localhost``."""
    return AUTHORITY.issue("localhost").write(tmp_path)


@pytest.fixture
async def proxy(upstream: Upstream, files: tuple[str, str]) -> AsyncIterator[Embedded]:
    """Return a proxy with a service for ``localhost``."""
    async with open_embedded(https_port=0) as embedded:
        await embedded.deploy(service(upstream, files))
        yield embedded


async def test_the_h2_library_inside_tls(proxy: Embedded) -> None:
    context = client_context(AUTHORITY, alpn=("h2", "http/1.1"))
    async with await trio.open_tcp_stream(LOCALHOST, proxy.proxy.https_port) as stream:
        tls = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
        await tls.do_handshake()
        assert tls.selected_alpn_protocol() == "h2"
        client = H2Client(tls)
        await client.open()
        for _ in range(3):
            answer = await client.get(host=b"localhost")
            assert (answer.status, bytes(answer.body)) == (200, b"hello")
    first = (await proxy.lines.wait_requests(3))[0]
    assert (first["proto"], first["scheme"]) == ("HTTP/2.0", "https")


async def test_a_client_that_reads_slowly_inside_tls_gets_every_byte(
    proxy: Embedded, upstream: Upstream
) -> None:
    body = bytes(range(256)) * 40_000
    upstream.script(reply(ok(body)))
    context = client_context(AUTHORITY, alpn=("h2",))
    async with await trio.open_tcp_stream(LOCALHOST, proxy.proxy.https_port) as stream:
        tls = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
        await tls.do_handshake()
        client = H2Client(tls, initial_window_size=2**30)
        await client.open()
        client.codec.increment_flow_control_window(2**30)
        large = await client.request(host=b"localhost")
        with trio.move_on_after(0.2):
            await trio.sleep_forever()  # whatever the kernels hold is full now
        # What it asks for meanwhile is looked at nevertheless.
        await client.request(b"/small", host=b"localhost")
        assert (await upstream.wait_requests(1)).target == b"/small"
        assert bytes((await client.answer(large)).body) == body


@needs("curl", package="curl")
async def test_curl(proxy: Embedded, tmp_path: Path) -> None:
    url = f"https://localhost:{proxy.proxy.https_port}/a"
    upload = "u" * 300_000
    arguments = (
        "-sS",
        "-k",
        "--http2",
        "--max-time",
        "20",
        "-w",
        " %{http_version} %{http_code}\n",
    )
    shown = await output_of(
        tmp_path, "curl", *arguments, "--data-binary", upload[:100_000], url, url
    )
    assert shown.split() == ["hello", "2", "200"] * 2
    assert proxy.lines.requests[0]["req_content_length"] == 100_000


@needs("nghttp", package="nghttp2-client")
async def test_nghttp(proxy: Embedded, tmp_path: Path) -> None:
    url = f"https://localhost:{proxy.proxy.https_port}/"
    shown = await output_of(tmp_path, "nghttp", "-v", "--no-verify-peer", url)
    assert "hello" in shown
    assert "END_STREAM" in shown
    assert "error_code=NO_ERROR" in shown


@needs("h2load", package="nghttp2-client")
async def test_h2load(proxy: Embedded, tmp_path: Path) -> None:
    url = f"https://localhost:{proxy.proxy.https_port}/"
    shown = await output_of(tmp_path, "h2load", "-n", "200", "-c", "2", "-m", "20", url)
    assert "200 succeeded, 0 failed, 0 errored" in shown


@needs("h2load", package="nghttp2-client")
async def test_deploys_under_load_lose_nothing(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], tmp_path: Path
) -> None:
    url = f"https://localhost:{proxy.proxy.https_port}/"
    shown = ""

    async def load(over: trio.CancelScope) -> None:
        nonlocal shown
        shown = await output_of(tmp_path, "h2load", "-n", "300", "-c", "3", "-m", "10", url)
        over.cancel()

    async with open_upstream() as other, trio.open_nursery() as nursery:
        over = trio.CancelScope()
        nursery.start_soon(load, over)
        deploys = 0
        with over:
            while True:
                await proxy.deploy(service(other if deploys % 2 else upstream, files))
                deploys += 1
    assert deploys > 1
    assert "300 succeeded, 0 failed, 0 errored" in shown
