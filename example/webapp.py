"""A small web application to deploy: standard library only.

Every answer in JSON names the version and the instance that gave it, so that a client can tell who
served it; /page (page.html) shows people the same. The other paths show what a proxy does with
headers, cookies, streams and WebSockets; docs/tour.md uses them. SIGTERM keeps its default action
and ends the process at once, without finishing requests: a proxy that had lost track of one would
be found out.

    python3 example/webapp.py --port 3001 --version v1
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from io import BufferedIOBase

MAX_DELAY_MS = 60_000
MAX_SIZE = 100_000_000
PAGE = Path(__file__).with_name("page.html")
STREAM_PARTS = 5
STREAM_PAUSE = 0.2
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10  # opcodes of WebSocket frames


def frame(first: int, payload: bytes, mask: bytes = b"") -> bytes:
    """Build a WebSocket frame; ``first`` is its first byte, ``mask`` what a client needs."""
    size = len(payload)
    long, code = (0, size) if size < 126 else (2, 126) if size < 1 << 16 else (8, 127)
    head = bytes([first, code | (0x80 if mask else 0)]) + size.to_bytes(8, "big")[8 - long :]
    return head + mask + unmasked(payload, mask)


def receive_frame(stream: BufferedIOBase) -> tuple[int, bytes]:
    """Return the first byte of the next frame and its payload; EOFError if none came whole."""
    first, second = receive(stream, 2)
    size = second & 0x7F
    if size >= 126:
        size = int.from_bytes(receive(stream, 2 if size == 126 else 8), "big")
    mask = receive(stream, 4) if second & 0x80 else b""
    return first, unmasked(receive(stream, size), mask)


def receive(stream: BufferedIOBase, size: int) -> bytes:
    data = stream.read(size) if size <= MAX_SIZE else b""
    if len(data) < size:
        raise EOFError
    return data


def unmasked(payload: bytes, mask: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(payload, itertools.cycle(mask))) if mask else payload


def accept_of(key: str) -> str:
    """Return the Sec-WebSocket-Accept that answers a Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1(key.encode() + WEBSOCKET_GUID).digest()).decode()


class WebApp(ThreadingHTTPServer):
    """The application: its identity, and the moment from which it calls itself healthy."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, version: str, name: str, boot_seconds: float) -> None:
        super().__init__((host, port), Handler)
        self.version = version
        self.name = name
        self.healthy_at = time.monotonic() + boot_seconds

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, but not that a client went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One client connection."""

    server: WebApp
    protocol_version = "HTTP/1.1"
    # One write per answer: head and body in two segments would wait for a delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:  # the name http.server looks for
        """Answer one of the paths below, or any other path at once."""
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        booting = time.monotonic() < self.server.healthy_at
        if booting:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "still booting"})
        elif url.path == "/up":
            self._answer(HTTPStatus.OK, {"status": "up"})
        elif url.path == "/page":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
        elif url.path == "/slow" or url.path.startswith("/slow/"):
            delay = self._number(query, "ms", 1000, MAX_DELAY_MS)
            if delay is not None:
                time.sleep(delay / 1000)
                self._answer(HTTPStatus.OK, {"path": url.path})
        elif url.path == "/file":
            size = self._number(query, "size", 1000, MAX_SIZE)
            if size is not None:
                live = {"X-Accel-Buffering": "no"} if "live" in query else {}
                self._send(HTTPStatus.OK, "text/plain", b"." * (size - 1) + b"\n", live)
        elif url.path == "/headers":
            lines = "".join(f"{name}: {value}\n" for name, value in self.headers.items())
            self._send(HTTPStatus.OK, "text/plain", lines.encode())
        elif url.path == "/cookie":
            self._answer(HTTPStatus.OK, {"path": url.path}, {"Set-Cookie": "seen=yes; Path=/"})
        elif url.path == "/stream":
            who = f"{self.server.version} {self.server.name}"
            parts = (f"{who} {part}/{STREAM_PARTS}\n" for part in range(1, STREAM_PARTS + 1))
            self._stream("text/plain", parts)
        elif url.path == "/events":
            events = (f"data: {self.server.version} {n}\n\n" for n in itertools.count(1))
            self._stream("text/event-stream", events)
        elif url.path == "/ws":
            self._websocket()
        else:
            self._answer(HTTPStatus.OK, {"path": url.path})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Take the body and say how long it was."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length) <= MAX_SIZE):
            self.close_connection = True
            self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "there must be a Content-Length"})
            return
        received = len(self.rfile.read(int(length)))
        path = urlsplit(self.path).path
        # Nothing is written by a search, so that its client may go on with the read targets.
        headers = {"X-Writer-Affinity": "false"} if path == "/search" else None
        self._answer(HTTPStatus.OK, {"path": path, "received": received}, headers)

    def _number(self, query: dict[str, str], name: str, default: int, limit: int) -> int | None:
        """Return a number from the query; answer the request if it is none."""
        text = query.get(name, str(default))
        if text.isascii() and text.isdigit() and int(text) <= limit:
            return int(text)
        problem = f"{name} must be a whole number up to {limit}"
        self._answer(HTTPStatus.BAD_REQUEST, {"error": problem})
        return None

    def _answer(
        self, status: HTTPStatus, fields: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        who = {"version": self.server.version, "instance": self.server.name}
        body = json.dumps(who | fields).encode() + b"\n"
        self._send(status, "application/json", body, headers)

    def _send(
        self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, kind: str, parts: Iterable[str]) -> None:
        """Send one part after the other, with a pause after each."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "HEAD":
            return
        for part in parts:
            data = part.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
            time.sleep(STREAM_PAUSE)
        self.wfile.write(b"0\r\n\r\n")

    def _websocket(self) -> None:
        """Say who this is, and send every message back, until a Close frame comes."""
        key = self.headers.get("Sec-WebSocket-Key")
        if self.headers.get("Upgrade", "").lower() != "websocket" or not key:
            self._answer(HTTPStatus.UPGRADE_REQUIRED, {"error": "this is a WebSocket"})
            return
        self.close_connection = True
        self.send_response(HTTPStatus.SWITCHING_PROTOCOLS)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept_of(key))
        self.end_headers()
        first, payload = 0x80 | TEXT, f"this is {self.server.name}".encode()
        while True:
            if first & 15 != PONG:
                reply = 0x80 | PONG if first & 15 == PING else first
                self.wfile.write(frame(reply, payload))
                self.wfile.flush()
            if first & 15 == CLOSE:
                return
            try:
                first, payload = receive_frame(self.rfile)
            except EOFError:
                return

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write no access log: the proxy writes one."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small web application to deploy.")
    parser.add_argument("--host", default="127.0.0.1", help="address (%(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="0 takes a free one (%(default)s)")
    parser.add_argument("--version", default="v1", help="named in every answer (%(default)s)")
    parser.add_argument("--name", help="of this instance, named in every answer (the version)")
    parser.add_argument(
        "--boot-seconds",
        type=float,
        default=0.0,
        help="answer 503 to everything for so long, as a slow start would (%(default)s)",
    )
    options = parser.parse_args(argv)
    name = options.name or options.version
    host = options.host
    with WebApp(host, options.port, options.version, name, options.boot_seconds) as app:
        print(f"{name} listening on {host}:{app.server_address[1]}", flush=True)
        try:
            app.serve_forever()
        except KeyboardInterrupt:
            print(f"{name} stopped", flush=True)


if __name__ == "__main__":
    main()
