"""Redirects to the canonical host and to HTTPS: in one hop, with path and query as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from kamal_proxy import state_format
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state import SavedPause, SavedService, StateFile
from tests.running import open_embedded
from tests.scripted import deploy_options, open_client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Embedded
    from tests.scripted import Client, Response, Upstream


def options(upstream: Upstream, **service: Any) -> Any:
    return attrs.evolve(
        deploy_options("web", [upstream]), service_options=ServiceOptions(**service)
    )


def save(directory: Path, upstream: Upstream, pause: SavedPause, **service: Any) -> None:
    """Save a service, so that the next proxy begins with it."""
    with StateFile(directory / "kamal-proxy.state", state_format) as file:
        saved = SavedService(
            name="web",
            active_targets=(upstream.target,),
            service_options=ServiceOptions(**service),
            pause=pause,
        )
        file.save([saved])


def location(response: Response) -> bytes:
    """Return where a response redirects to; it must be a proper redirect."""
    assert response.status == 301
    assert response.get(b"connection") == [b"close"]
    assert response.get(b"content-length") == [b"%d" % len(response.body)]
    (value,) = response.get(b"location")
    return value


CANONICAL: dict[str, Any] = {"hosts": ("web.test", "b.test"), "canonical_host": "web.test"}


@pytest.mark.parametrize(
    ("host", "redirected"),
    [
        ("web.test", False),
        ("web.test:8080", False),
        ("WEB.Test", False),
        ("web.test.", False),
        ("b.test", True),
        ("b.test:8080", True),
        ("B.TEST.", True),
    ],
)
async def test_other_hosts_are_redirected(
    proxy: Embedded, upstream: Upstream, client: Client, host: str, redirected: bool
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.get("/x", host)
    if redirected:
        assert location(response) == b"http://web.test/x"
        assert await client.receive_eof() == b""
    else:
        assert (response.status, response.body) == (200, b"hello")
    assert len(upstream.requests) == (not redirected)


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/?",
        "/a%2Fb//c?x=%20y&z=a|b",
        "/a%2fb/../c/./?q",
        "/%E2%82%AC?%e2%82%ac",
        "//evil.test/",
        "/?next=http://evil.test/",
        "/a;b=c/d",
        "/\\evil",
        '/"<>^`{}',
    ],
)
async def test_path_and_query_are_kept_byte_for_byte(
    proxy: Embedded, upstream: Upstream, client: Client, target: str
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.get(target, "b.test")
    assert location(response) == b"http://web.test" + target.encode()


async def test_what_no_header_field_may_hold_is_encoded(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.get("/\u20ac?\u20ac", "b.test")
    assert location(response) == b"http://web.test/%E2%82%AC?%E2%82%AC"


async def test_the_path_prefix_is_kept(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(options(upstream, path_prefixes=("/app",), **CANONICAL))
    assert location(await client.get("/app/x?y", "b.test")) == b"http://web.test/app/x?y"


async def test_the_absolute_form_is_redirected_to_its_path(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.request(b"GET http://b.test:1/x?y HTTP/1.1\r\nHost: web.test\r\n\r\n")
    assert location(response) == b"http://web.test/x?y"


async def test_a_question_about_the_whole_server_is_redirected_to_the_host(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.request(b"OPTIONS * HTTP/1.1\r\nHost: b.test\r\n\r\n")
    assert location(response) == b"http://web.test"
    assert upstream.peers == []


@pytest.mark.parametrize("method", [b"HEAD", b"POST", b"PUT", b"OPTIONS"])
async def test_every_method_is_redirected(
    proxy: Embedded, upstream: Upstream, client: Client, method: bytes
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.request(
        method + b" /x HTTP/1.1\r\nHost: b.test\r\nContent-Length: 5\r\n\r\nhello"
    )
    assert location(response) == b"http://web.test/x"
    assert upstream.peers == []


async def test_a_body_that_never_comes_is_not_waited_for(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    response = await client.request(
        b"POST /x HTTP/1.1\r\nHost: b.test\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    )
    assert location(response) == b"http://web.test/x"
    assert response.informational == []


@pytest.mark.parametrize("written", ["::1", "[::1]"])
async def test_an_address_can_be_canonical(
    proxy: Embedded, upstream: Upstream, client: Client, written: str
) -> None:
    await proxy.deploy(options(upstream, hosts=(written, "b.test"), canonical_host=written))
    assert (await client.get("/", "[::1]:80")).body == b"hello"
    assert location(await client.get("/x", "b.test")) == b"http://[::1]/x"


async def test_a_service_for_every_host_can_have_a_canonical_one(
    proxy: Embedded, upstream: Upstream, client: Client
) -> None:
    await proxy.deploy(options(upstream, canonical_host="web.test"))
    assert (await client.get("/", "web.test")).body == b"hello"
    assert location(await client.get("/x", "any.test")) == b"http://web.test/x"
    async with open_client(proxy.port) as old:
        await old.send(b"GET /x HTTP/1.0\r\n\r\n")
        assert b"\r\nLocation: http://web.test/x\r\n" in await old.receive_eof()


async def test_a_redirect_comes_before_a_pause(tmp_path: Path, upstream: Upstream) -> None:
    save(tmp_path, upstream, SavedPause(state="paused", fail_after=20), **CANONICAL)
    async with open_embedded(data_directory=tmp_path) as proxy, open_client(proxy.port) as client:
        assert location(await client.get("/x", "b.test")) == b"http://web.test/x"
    async with open_embedded(data_directory=tmp_path) as proxy, open_client(proxy.port) as client:
        assert (await client.get("/up", "web.test")).status == 200


# HTTPS

TLS: dict[str, Any] = {"hosts": ("web.test", "b.test"), "tls_enabled": True}


@pytest.mark.parametrize(
    ("service", "host", "expected"),
    [
        (TLS, "web.test", b"https://web.test/a%20b?c"),
        (TLS, "Web.Test:8080", b"https://Web.Test/a%20b?c"),
        (TLS, "b.test", b"https://b.test/a%20b?c"),
        # One hop, for scheme and host.
        (TLS | CANONICAL, "b.test:80", b"https://web.test/a%20b?c"),
        (TLS | CANONICAL, "web.test", b"https://web.test/a%20b?c"),
        # Without the redirect of the scheme, only the host changes.
        (TLS | CANONICAL | {"tls_redirect": False}, "b.test", b"http://web.test/a%20b?c"),
        (TLS | CANONICAL | {"tls_redirect": False}, "web.test", None),
        (TLS | {"tls_redirect": False}, "b.test", None),
    ],
)
async def test_plain_http_is_redirected(
    tmp_path: Path,
    upstream: Upstream,
    service: dict[str, Any],
    host: str,
    expected: bytes | None,
) -> None:
    save(tmp_path, upstream, SavedPause(), **service)
    async with open_embedded(data_directory=tmp_path) as proxy, open_client(proxy.port) as client:
        response = await client.get("/a%20b?c", host)
        if expected is None:
            assert response.body == b"hello"
        else:
            assert location(response) == expected
    served = [request for request in upstream.requests if request.target != b"/up"]
    assert len(served) == (expected is None)


async def test_a_redirect_is_logged(proxy: Embedded, upstream: Upstream, client: Client) -> None:
    await proxy.deploy(options(upstream, **CANONICAL))
    await client.get("/x?y", "b.test")
    (line,) = await proxy.lines.wait_requests(1)
    logged = [line[key] for key in ("status", "host", "path", "query", "service", "target")]
    assert logged == [301, "b.test", "/x", "y", "web", ""]
    assert "reason" not in line
