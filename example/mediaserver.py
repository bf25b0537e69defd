"""A small WebRTC server to deploy: it sends every caller's own voice back. It needs aiortc.

Signalling and media are one process. ``POST /calls`` with an offer (``{"sdp": ..., "type": ...}``)
begins a call and answers with the server's name. ``GET /`` is a page that makes such a call, at
once if its address ends with ``#call``. ``GET /calls`` tells what each call has received. The media
of each call has a port of its own.

As every WebRTC server behind a proxy must, it advertises the proxy's address instead of its own,
and does not try the addresses of the caller: whoever calls it comes through the proxy. The proxy's
port P is port P here, so several servers on one machine need an address each. SIGTERM ends it at
once: a proxy that still had calls here would be found out.

    python3 example/mediaserver.py --host=127.0.0.2 --port=3001 --advertise=127.0.0.1 --version=v1
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

from aiortc import (
    MediaStreamTrack,
    RTCBundlePolicy,
    RTCConfiguration,
    RTCPeerConnection,
    RTCSessionDescription,
)

MAX_OFFER = 100_000  # bytes
MAX_CALLS = 100
ANSWER_LIMIT = 10.0  # seconds
PAGE = b"""\
<!doctype html>
<meta charset="utf-8">
<title>Call yourself</title>
<button>Call</button> <output>Nobody has called.</output>
<audio autoplay></audio>
<script>
const say = text => document.querySelector("output").value = text;
async function call() {
  const peer = new RTCPeerConnection();
  const microphone = await navigator.mediaDevices.getUserMedia({audio: true});
  microphone.getTracks().forEach(track => peer.addTrack(track, microphone));
  peer.ontrack = event => document.querySelector("audio").srcObject = event.streams[0];
  await peer.setLocalDescription();
  const offer = JSON.stringify(peer.localDescription);
  const response = await fetch("calls", {method: "POST", body: offer});
  const answer = await response.json();
  peer.onconnectionstatechange = () => say(answer.name + ": " + peer.connectionState);
  await peer.setRemoteDescription({type: answer.type, sdp: answer.sdp});
}
document.querySelector("button").onclick = () => call().catch(say);
if (location.hash === "#call") call().catch(say);
</script>
"""


class MediaLoop(asyncio.SelectorEventLoop):
    """A loop whose UDP sockets get the ports of a range; aiortc would take any port."""

    def __init__(self, ports: range) -> None:
        super().__init__()
        self._ports = ports

    async def create_datagram_endpoint(
        self,
        protocol_factory: Any,
        local_addr: Any = None,
        remote_addr: Any = None,
        **options: Any,
    ) -> Any:
        """Take the first port of the range that is free.

        Raises:
            OSError: there is none.
        """
        for port in self._ports:
            try:
                return await super().create_datagram_endpoint(
                    protocol_factory, (local_addr[0], port), remote_addr, **options
                )
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, "all media ports are taken")


class Calls:
    """The calls that go on.

    Attributes:
        name: The server's, told in every answer.
        host: The address that media comes to.
        advertised: The address that callers are told instead.
    """

    def __init__(self, name: str, host: str, advertised: str) -> None:
        self.name = name
        self.host = host
        self.advertised = advertised
        self._calls: dict[int, RTCPeerConnection] = {}
        self._numbers = itertools.count(1)

    async def begin(self, offer: dict[str, str]) -> dict[str, Any]:
        """Take a call; return the answer to its offer.

        Raises:
            KeyError, TypeError, ValueError: the offer is none, or there are too many calls.
        """
        if len(self._calls) >= MAX_CALLS:
            raise ValueError("there are too many calls")
        number = next(self._numbers)
        peer = RTCPeerConnection(
            RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
        )
        self._calls[number] = peer

        @peer.on("track")
        def on_track(track: MediaStreamTrack) -> None:
            peer.addTrack(track)  # back to where it came from

        @peer.on("connectionstatechange")
        async def on_change() -> None:
            if peer.connectionState in ("failed", "closed"):
                await self._end(number)

        try:
            # Without the caller's own addresses it learns them from what the proxy passes on.
            sdp = re.sub(r"a=(candidate:.*|end-of-candidates)\r\n", "", offer["sdp"])
            await peer.setRemoteDescription(RTCSessionDescription(sdp, offer["type"]))
            await peer.setLocalDescription(await peer.createAnswer())
            if "a=candidate:" not in peer.localDescription.sdp:
                raise ValueError("all media ports are taken")
            return {
                "name": self.name,
                "call": number,
                "type": peer.localDescription.type,
                "sdp": self._outside(peer.localDescription.sdp),
            }
        except BaseException:
            await self._end(number)
            raise

    async def counts(self) -> list[dict[str, Any]]:
        """Tell what each call has received of what its caller sent, in packets of RTP."""
        return [
            {"call": number, "received": report.packetsReceived, "lost": report.packetsLost}
            for number, peer in self._calls.items()
            for report in (await peer.getStats()).values()
            if report.type == "inbound-rtp"
        ]

    def _outside(self, sdp: str) -> str:
        return re.sub(rf"(?<![\d.]){re.escape(self.host)}(?![\d.])", self.advertised, sdp)

    async def _end(self, number: int) -> None:
        peer = self._calls.pop(number, None)
        if peer is not None:
            await peer.close()


class Signalling(ThreadingHTTPServer):
    """What callers and the proxy's health checks talk to; each request has a thread."""

    calls: Calls
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine where the calls are, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(ANSWER_LIMIT)


class Handler(BaseHTTPRequestHandler):
    """Answers to one connection."""

    server: Signalling
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer ``/``, ``/calls`` and ``/up``."""
        if self.path == "/up":
            self._answer(200, "text/plain", b"ok\n")
        elif self.path == "/":
            self._answer(200, "text/html", PAGE)
        elif self.path == "/calls":
            self._answer_json(200, self.server.run(self.server.calls.counts()))
        else:
            self._answer(404, "text/plain", b"There is / and /calls and /up.\n")

    def do_POST(self) -> None:
        """Take a call."""
        size = int(self.headers.get("Content-Length", 0))
        if self.path != "/calls" or size > MAX_OFFER:
            self.close_connection = True
            self._answer(404, "text/plain", b"Offers are posted to /calls.\n")
            return
        try:
            offer = json.loads(self.rfile.read(size))
            self._answer_json(201, self.server.run(self.server.calls.begin(offer)))
        except (ValueError, KeyError, TypeError) as error:
            self._answer(400, "text/plain", f"No call: {error!r}\n".encode())

    def _answer_json(self, status: int, value: Any) -> None:
        self._answer(status, "application/json", json.dumps(value).encode() + b"\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write no access log: the proxy writes one."""


def ports_of(text: str) -> range:
    """Read ``FIRST-LAST``.

    Raises:
        ValueError: it is something else.
    """
    first, last = map(int, text.split("-"))
    if not 0 < first <= last < 65536:
        raise ValueError(text)
    return range(first, last + 1)


async def serve(server: Signalling) -> None:
    """Take calls for ever."""
    server.loop = asyncio.get_running_loop()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    print(f"{server.calls.name} listening on {host!s}:{port}", flush=True)
    await server.loop.create_future()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small WebRTC server to deploy.")
    parser.add_argument("--host", default="127.0.0.1", help="address it listens on (%(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="of its signalling (%(default)s)")
    parser.add_argument(
        "--media-ports",
        type=ports_of,
        default="50000-50019",
        help="UDP ports of the media, one for each call (%(default)s)",
    )
    parser.add_argument("--advertise", help="address that callers send media to; the proxy's")
    parser.add_argument("--version", default="v1", help="named in every answer (%(default)s)")
    options = parser.parse_args(argv)
    host = options.host
    with (
        # It has one address, also if that is of the loopback, which aiortc would leave out.
        patch("aioice.ice.get_host_addresses", lambda *_, **__: [host]),
        Signalling((host, options.port), Handler) as server,
        asyncio.Runner(loop_factory=lambda: MediaLoop(options.media_ports)) as runner,
    ):
        server.calls = Calls(options.version, host, options.advertise or host)
        try:
            runner.run(serve(server))
        except KeyboardInterrupt:
            print(f"{options.version} stopped", flush=True)


if __name__ == "__main__":
    main()
