"""Certificates from a real authority, through a whole proxy: obtained, served, renewed, kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy.errors import CertificateNotFoundError, InvalidOptionsError
from kamal_proxy.options import ServiceOptions
from kamal_proxy.run_options import AcmeOptions
from tests.running import open_embedded
from tests.scripted import deploy_options, open_client
from tests.secure import client_context, open_secure
from tests.tls.pebble import needs_pebble, open_pebble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.running import Embedded
    from tests.scripted import Upstream
    from tests.tls.pebble import Pebble

ANY = client_context(None)


def options(upstream: Upstream, *hosts: str, name: str = "web", **more: Any) -> Any:
    return attrs.evolve(
        deploy_options(name, [upstream]),
        service_options=ServiceOptions(hosts=hosts, **{"tls_enabled": True, **more}),
    )


@pytest.fixture
async def pebble() -> AsyncIterator[Pebble]:
    async with open_pebble() as authority:
        yield authority


def run_options(pebble: Pebble, directory: Path) -> dict[str, Any]:
    """Return options with which the authority finds the proxy."""
    return {
        "http_port": pebble.http_port,
        "https_port": pebble.tls_port,
        "data_directory": directory,
        "acme": AcmeOptions(directory=pebble.directory, ca_file=pebble.ca_file),
    }


async def status(proxy: Embedded, host: str, path: str = "/") -> int:
    async with open_secure(proxy.https_port, host, ANY) as client:
        return (await client.get(path, host)).status


@needs_pebble
async def test_a_deploy_obtains_certificates(
    pebble: Pebble, upstream: Upstream, tmp_path: Path
) -> None:
    async with open_embedded(**run_options(pebble, tmp_path)) as proxy:
        await proxy.deploy(options(upstream, "a.test", "b.test"))
        # The first handshake waits for what is under way.
        assert await status(proxy, "a.test") == 200
        assert await status(proxy, "b.test") == 200
        first, second = proxy.proxy.certificates()
        assert (first.host, first.names, first.state) == ("a.test", ("a.test",), "valid")
        assert first.directory == pebble.directory
        assert "Pebble" in first.issuer
        assert (second.host, second.key_type) == ("b.test", "ECDSA P-256")
        assert 'certificate_expiry_timestamp_seconds{host="a.test"}' in (
            proxy.proxy.metrics()[0].decode()
        )
        lines = [line for line in proxy.lines.all if line["msg"] == "Certificate obtained"]
        assert {line["host"] for line in lines} == {"a.test", "b.test"}
    async with open_embedded(**run_options(pebble, tmp_path)) as proxy:
        # They are kept: nothing is ordered again.
        assert await status(proxy, "a.test") == 200
        assert [line for line in proxy.lines.all if line["msg"] == "Certificate obtained"] == []


@needs_pebble
async def test_the_authority_is_answered_before_any_redirect(
    pebble: Pebble, upstream: Upstream, tmp_path: Path
) -> None:
    """What is not known of a challenge is the application's business."""
    async with open_embedded(**run_options(pebble, tmp_path)) as proxy:
        await proxy.deploy(
            options(upstream, "a.test", "b.test", canonical_host="a.test", name="web")
        )
        assert await status(proxy, "b.test") == 301
        async with open_client(proxy.port) as client:
            response = await client.get("/.well-known/acme-challenge/unknown", "a.test")
            assert response.status == 301
        await proxy.deploy(options(upstream, "c.test", tls_enabled=False, name="plain"))
        async with open_client(proxy.port) as client:
            response = await client.get("/.well-known/acme-challenge/own", "c.test")
            assert (response.status, response.body) == (200, b"hello")


@needs_pebble
async def test_a_certificate_is_renewed_on_request(
    pebble: Pebble, upstream: Upstream, tmp_path: Path
) -> None:
    async with open_embedded(**run_options(pebble, tmp_path)) as proxy:
        await proxy.deploy(options(upstream, "a.test"))
        async with open_secure(proxy.https_port, "a.test", ANY) as old:
            assert (await old.get("/", "a.test")).status == 200
            before = old.tls.getpeercert(binary_form=True)
            await proxy.proxy.renew_certificate("a.test")
            async with open_secure(proxy.https_port, "a.test", ANY) as new:
                assert new.tls.getpeercert(binary_form=True) != before
            assert (await old.get("/", "a.test")).status == 200
        with pytest.raises(CertificateNotFoundError, match=r"x\.test"):
            await proxy.proxy.renew_certificate("x.test")


async def test_no_authority(upstream: Upstream, tmp_path: Path) -> None:
    """A deploy does not wait for certificates; a handshake fails cleanly."""
    acme = AcmeOptions(directory="https://127.0.0.1:1/dir")
    async with open_embedded(https_port=0, data_directory=tmp_path, acme=acme) as proxy:
        await proxy.deploy(options(upstream, "a.test"))
        line = await proxy.lines.wait_for_message("Certificate can't be obtained")
        assert line["host"] == "a.test"
        with pytest.raises(trio.BrokenResourceError) as caught:
            async with open_secure(proxy.https_port, "a.test", ANY):
                pass
        assert "internal error" in str(caught.value.__cause__)
        (row,) = proxy.proxy.certificates()
        assert row.state == "failing"
        assert "127.0.0.1" in row.last_error
        assert row.next_attempt > 0


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [
        (("*.a.test",), "automatic TLS does not support wildcards"),
        (("192.0.2.1",), "192.0.2.1 is an address"),
        (("a.test",), "needs a directory for certificates"),
    ],
)
async def test_what_can_never_be_obtained_is_refused(
    upstream: Upstream, hosts: tuple[str, ...], sentence: str
) -> None:
    async with open_embedded(https_port=0) as proxy:
        with pytest.raises(InvalidOptionsError, match=sentence):
            await proxy.deploy(options(upstream, *hosts))
