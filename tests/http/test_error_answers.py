"""A service's own error pages: for what the proxy answers itself, and for nothing else."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy import PauseOptions, StopOptions
from kamal_proxy.errors import ErrorPagesError
from kamal_proxy.http.error_pages import ErrorPages, load_error_pages
from kamal_proxy.options import ServiceOptions
from tests.running import open_embedded
from tests.scripted import Held, deploy_options, open_client, reply

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Embedded
    from tests.scripted import Client, Upstream

PAGES = {
    "404.html": "<p>nothing here",
    "413.html": "<p>too much",
    "502.html": "<p>broken",
    "503.html": "<p>{{ if .Message }}stopped: {{ .Message }}{{ else }}nobody{{ end }}",
    "504.html": "<p>too slow",
}


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Write a directory of error pages."""
    directory = tmp_path / "pages"
    directory.mkdir()
    for name, text in PAGES.items():
        directory.joinpath(name).write_text(text)
    return directory


def options(upstream: Upstream, pages: Path | None, **target: Any) -> Any:
    plain = deploy_options("web", [upstream])
    return attrs.evolve(
        plain,
        service_options=ServiceOptions(path_prefixes=("/app",), error_page_path=str(pages or "")),
        target_options=attrs.evolve(plain.target_options, **target),
    )


async def test_a_refused_connection(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages))
    upstream.stop_listening()
    response = await client.get("/app")
    assert (response.status, response.body) == (502, b"<p>broken")
    assert response.get(b"content-type") == [b"text/html; charset=utf-8"]
    assert response.get(b"content-length") == [b"9"]
    head = await client.request(b"HEAD /app HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (head.status, head.body, head.get(b"content-length")) == (502, b"", [b"9"])


async def test_a_target_that_is_too_slow(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages, response_timeout=0.01))
    upstream.script(Held(upstream))
    response = await client.get("/app")
    assert (response.status, response.body) == (504, b"<p>too slow")


async def test_a_body_that_is_too_large(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages, buffer_requests=True, max_request_body_size=4))
    response = await client.request(
        b"POST /app HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
    )
    assert (response.status, response.body) == (413, b"<p>too much")


async def test_a_stopped_service(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages))
    for message, body in (
        ("", b"<p>nobody"),
        ('back at <noon> & "later"', b"<p>stopped: back at &lt;noon&gt; &amp; &#34;later&#34;"),
        ("{{ .Message }}", b"<p>stopped: {{ .Message }}"),
    ):
        await proxy.proxy.stop_service("web", StopOptions(message=message))
        response = await client.get("/app")
        assert (response.status, response.body) == (503, body)


async def test_an_expired_pause(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages))
    await proxy.proxy.pause("web", PauseOptions(max_pause=0))
    response = await client.get("/app")
    assert (response.status, response.body) == (504, b"<p>too slow")


async def test_a_status_without_a_page_of_its_own(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    pages.joinpath("502.html").unlink()
    await proxy.deploy(options(upstream, pages))
    upstream.stop_listening()
    response = await client.get("/app")
    assert response.status == 502
    assert b"<title>" in response.body, "the built-in page"


async def test_no_service_has_no_pages(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages))
    response = await client.get("/other")
    assert response.status == 404
    assert response.body != b"<p>nothing here"


@pytest.mark.parametrize("status", [404, 413, 500, 502, 503, 504])
async def test_a_targets_own_errors_pass_through(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path, status: int
) -> None:
    await proxy.deploy(options(upstream, pages))
    upstream.script(reply(b"HTTP/1.1 %d No\r\nContent-Length: 4\r\nA: b\r\n\r\nmine" % status))
    response = await client.get("/app")
    assert (response.status, response.body, response.get(b"a")) == (status, b"mine", [b"b"])


# When pages come and go


async def test_pages_are_those_of_the_last_deploy(
    proxy: Embedded, upstream: Upstream, client: Client, pages: Path
) -> None:
    await proxy.deploy(options(upstream, pages))
    await proxy.proxy.stop_service("web", StopOptions())
    shutil.rmtree(pages)
    assert (await client.get("/app")).body == b"<p>nobody"
    with pytest.raises(ErrorPagesError) as caught:
        await proxy.deploy(options(upstream, pages))
    assert caught.value.details == (f"{pages}: no such directory",)
    assert (await client.get("/app")).body == b"<p>nobody", "nothing has changed"
    await proxy.deploy(options(upstream, None))
    response = await client.get("/app")
    assert response.status == 503
    assert b"<title>" in response.body


@pytest.mark.parametrize("there", [True, False])
async def test_pages_after_a_restart(
    tmp_path: Path, upstream: Upstream, pages: Path, there: bool
) -> None:
    async with open_embedded(data_directory=tmp_path) as first:
        await first.deploy(options(upstream, pages))
        await first.proxy.stop_service("web", StopOptions())
    if not there:
        shutil.rmtree(pages)
    async with (
        open_embedded(data_directory=tmp_path) as second,
        open_client(second.port) as client,
    ):
        response = await client.get("/app")
        assert response.status == 503
        assert (response.body == b"<p>nobody") == there
        complaints = [line for line in second.lines.all if line["level"] == "ERROR"]
        assert [line["msg"] for line in complaints] == (
            [] if there else ["Service is served with the built-in error pages"]
        )


async def test_a_directory_that_hangs_holds_up_nobody_else(
    upstream: Upstream, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one on a network file system; its own deploy can be given up at any time."""
    begun, go_on = trio.Event(), threading.Event()

    def hang(directory: str) -> ErrorPages:
        trio.from_thread.run_sync(begun.set)
        go_on.wait(30)  # seconds, lest a failing test hang as well
        return load_error_pages(directory)

    monkeypatch.setattr("kamal_proxy.proxy.load_error_pages", hang)
    async with open_embedded(data_directory=tmp_path / "data") as proxy:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(proxy.deploy, options(upstream, pages))
                await begun.wait()
                await proxy.deploy(upstream.options("other"))
                nursery.cancel_scope.cancel()
        finally:
            go_on.set()
        assert [service.name for service in proxy.proxy.services()] == ["other"]
