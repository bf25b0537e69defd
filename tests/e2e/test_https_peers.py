"""HTTPS with clients that others wrote: openssl, h2load through redeploys, Chromium."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, TextMessage

from tests.certificates import make_ca
from tests.e2e.browser import needs_browser, open_browser
from tests.e2e.programs import needs, open_program, output_of
from tests.running import open_instance
from tests.scripted import open_upstream

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Command
    from tests.scripted import Peer


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Return what deploys a service with TLS for ``localhost``; its CA is in ``ca.pem``."""
    authority = make_ca()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    certificate, key = authority.issue("localhost", "127.0.0.1").write(tmp_path)
    return [
        "--host=localhost",
        "--tls",
        f"--tls-certificate-path={certificate}",
        f"--tls-private-key-path={key}",
    ]


async def shake(command: Command, directory: Path, *options: str) -> str:
    """Let openssl connect and print what was agreed on."""
    script = (
        f"echo | openssl s_client -connect 127.0.0.1:{command.https_port} -servername localhost "
        f"-CAfile {directory / 'ca.pem'} {' '.join(options)}; true"
    )
    return await output_of(directory, "sh", "-c", script)


@needs("openssl", package="openssl")
async def test_openssl(command: Command, flags: list[str], tmp_path: Path) -> None:
    async with open_instance("v1") as instance:
        await command.deploy("web", f"--target={instance.target}", *flags)
        shown = await shake(command, tmp_path, "-alpn", "h2,http/1.1")
        assert "Verify return code: 0 (ok)" in shown
        assert re.search(r"New, TLSv1.3, Cipher is TLS_\w+_(GCM|POLY1305)_SHA\d+", shown)
        assert "ALPN protocol: h2" in shown
        shown = await shake(command, tmp_path, "-tls1_2")
        assert re.search(r"Cipher is ECDHE-ECDSA-(AES\d+-GCM|CHACHA20)", shown)
        assert "Secure Renegotiation IS supported" in shown
        for old in (
            "-tls1_1",
            "-tls1_2 -cipher ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0",
            "-tls1_2 -cipher DHE-RSA-AES128-GCM-SHA256",
        ):
            assert "Cipher is (NONE)" in await shake(command, tmp_path, old)
        session = tmp_path / "session"
        await shake(command, tmp_path, "-tls1_2", f"-sess_out {session}")
        assert "Reused, TLSv1.2" in await shake(command, tmp_path, "-tls1_2", f"-sess_in {session}")


@needs("h2load", package="nghttp2-client")
async def test_redeploys_under_http2_load(
    command: Command, flags: list[str], tmp_path: Path
) -> None:
    async with open_instance("v0") as first:
        await command.deploy("web", f"--target={first.target}", *flags)
        url = f"https://localhost:{command.https_port}/slow?ms=20"
        # Of itself, h2load 1.70 tells a pipe how far it is when it has finished.
        load = ["stdbuf", "-oL", "h2load", "-n", "2000", "-c", "4", "-m", "10", url]
        async with open_program(tmp_path, *load) as program, trio.open_nursery() as instances:
            await program.wait_for("progress: 10%")
            current = first
            switches = 0
            while "finished in" not in program.output:
                switches += 1
                following = await instances.start(_live, f"v{switches}")
                await command.deploy("web", f"--target={following.target}", *flags)
                await current.kill()
                current = following
            shown = await program.wait()
            instances.cancel_scope.cancel()
    assert switches >= 2
    assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in shown
    assert "2000 2xx, 0 3xx, 0 4xx, 0 5xx" in shown


async def _live(name: str, *, task_status: trio.TaskStatus[Any]) -> None:
    async with open_instance(name) as instance:
        task_status.started(instance)
        await trio.sleep_forever()


PAGE = b"""<!doctype html><title>page</title><script>
const kind = () => performance.getEntriesByType("navigation")[0].nextHopProtocol;
addEventListener("load", () => {
  const socket = new WebSocket(`wss://${location.host}/cable`);
  socket.onopen = () => socket.send("over " + kind());
  socket.onmessage = event => fetch("/heard?" + encodeURIComponent(event.data));
});
</script>"""


class Application:
    """A page that opens a WebSocket and tells what came of it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.heard = trio.Event()

    async def __call__(self, peer: Peer) -> None:
        while (request := await peer.receive_request()) is not None:
            path = request.target.decode()
            self.paths.append(path)
            if request.get(b"upgrade"):
                await self._talk(peer, request.head)
                return
            body = PAGE if path == "/" else b""
            await peer.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            if path.startswith("/heard"):
                self.heard.set()

    async def _talk(self, peer: Peer, head: bytes) -> None:
        connection = WSConnection(ConnectionType.SERVER)
        connection.receive_data(head)
        next(connection.events())
        await peer.send(connection.send(AcceptConnection()))
        while data := await peer.receive_some():
            connection.receive_data(data)
            for event in connection.events():
                if isinstance(event, TextMessage):
                    await peer.send(connection.send(TextMessage(f"echo {event.data}")))
                elif isinstance(event, CloseConnection):
                    await peer.send(connection.send(event.response()))
                    return


@needs_browser
async def test_a_browser_speaks_http2_and_websocket_over_it(
    command: Command, flags: list[str]
) -> None:
    application = Application()
    async with open_upstream(application) as upstream:
        await command.deploy("web", *upstream.flags(), *flags)
        url = f"https://localhost:{command.https_port}/"
        async with open_browser(url, "--ignore-certificate-errors"):
            await application.heard.wait()
        assert "/heard?echo%20over%20h2" in application.paths
        line = await command.lines.wait_for(lambda line: line.get("path") == "/cable")
    assert (line["proto"], line["scheme"]) == ("HTTP/2.0", "https")
    assert {each["client_port"] for each in command.lines.requests if each["path"] == "/"} == {
        line["client_port"]
    }
