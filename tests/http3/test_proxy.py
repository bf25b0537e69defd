"""HTTP/3 through a whole proxy: its certificates, Alt-Svc, deploys, its end, and a browser."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kamal_proxy.options import ServiceOptions
from tests.certificates import make_ca
from tests.e2e.browser import dump_page, needs_browser
from tests.http3.clients import H3Client
from tests.running import open_embedded
from tests.scripted import deploy_options, open_upstream, respond
from tests.secure import client_context, open_secure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.certificates import Issued
    from tests.running import Embedded
    from tests.scripted import Upstream

AUTHORITY = make_ca()
UNRECOGNIZED_NAME = 0x100 + 112


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded(https_port=0, http3=True) as embedded:
        yield embedded


@pytest.fixture
def issued() -> Issued:
    return AUTHORITY.issue("a.test", "localhost")


def options(upstream: Upstream, issued: Issued, directory: Path, **more: Any) -> Any:
    certificate, key = issued.write(directory)
    return attrs.evolve(
        deploy_options("web", [upstream]),
        service_options=ServiceOptions(
            hosts=("a.test", "localhost"),
            tls_enabled=True,
            tls_certificate_path=certificate,
            tls_private_key_path=key,
            **more,
        ),
    )


async def connect(
    proxy: Embedded, nursery: trio.Nursery, name: str = "a.test", *, start: bool = True
) -> H3Client:
    """Open a connection."""
    address = ("127.0.0.1", proxy.https_port)
    client = H3Client(address, name=name, ca=AUTHORITY.pem)
    client.quic.connect(address, now=trio.current_time())
    nursery.start_soon(client.run)
    client.flush()
    await client.wait(lambda: client.open.is_set() or client.closing_code is not None)
    if start:
        client.start()
    return client


async def test_a_deploy_is_not_noticed(
    proxy: Embedded, issued: Issued, tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with open_upstream(respond(b"old")) as old, open_upstream(respond(b"new")) as new:
        await proxy.deploy(options(old, issued, tmp_path))
        client = await connect(proxy, nursery)
        assert (await client.get(host=b"a.test")).body == b"old"
        await proxy.deploy(options(new, issued, tmp_path))
        assert (await client.get(host=b"a.test")).body == b"new"
        [first, second] = proxy.lines.requests
        assert first["proto"] == second["proto"] == "HTTP/3.0"
        assert (first["scheme"], first["port"]) == ("https", proxy.https_port)
        assert first["client_port"] == second["client_port"]
        client.quic.close()
        client.flush()
        client.close()


async def test_clients_over_tcp_are_told(proxy: Embedded, issued: Issued, tmp_path: Path) -> None:
    async with open_upstream(respond(b"hello")) as upstream:
        await proxy.deploy(options(upstream, issued, tmp_path))
        async with open_secure(proxy.https_port, "a.test", client_context(AUTHORITY)) as client:
            response = await client.get("/", "a.test")
        assert response.get(b"alt-svc") == [b'h3=":%d"; ma=86400' % proxy.https_port]


async def test_a_name_that_is_not_served(
    proxy: Embedded, issued: Issued, tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with open_upstream(respond(b"hello")) as upstream:
        await proxy.deploy(options(upstream, issued, tmp_path))
        client = await connect(proxy, nursery, "other.test", start=False)
        assert client.closing_code == UNRECOGNIZED_NAME
        client.close()


async def test_the_proxy_stops(issued: Issued, tmp_path: Path, nursery: trio.Nursery) -> None:
    async with open_upstream(respond(b"hello")) as upstream:
        async with open_embedded(https_port=0, http3=True) as proxy:
            await proxy.deploy(options(upstream, issued, tmp_path))
            client = await connect(proxy, nursery)
            assert (await client.get(host=b"a.test")).status == 200
        await client.wait(lambda: client.closing_code is not None)
        assert client.closing_code == 0x100  # H3_NO_ERROR
        assert client.goaways
        client.close()


@needs_browser
async def test_a_browser(proxy: Embedded, issued: Issued, tmp_path: Path) -> None:
    key = issued.certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    pin = base64.b64encode(hashlib.sha256(key).digest()).decode()
    flags = (
        "--host-resolver-rules=MAP localhost 127.0.0.1",
        f"--ignore-certificate-errors-spki-list={pin}",
        f"--origin-to-force-quic-on=localhost:{proxy.https_port}",
    )
    async with open_upstream(respond(b"hello browser")) as upstream:
        await proxy.deploy(options(upstream, issued, tmp_path))
        page = await dump_page(f"https://localhost:{proxy.https_port}/page", *flags)
        assert "hello browser" in page
        [line] = [line for line in proxy.lines.requests if line["path"] == "/page"]
        assert (line["proto"], line["status"]) == ("HTTP/3.0", 200)
