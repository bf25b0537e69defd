"""A small web application to deploy: one file, standard library only.

Every answer names the version and the instance that gave it, so that a client can tell who
served it. SIGTERM keeps its default action and ends the process at once, without finishing
requests: a proxy that had lost track of one would be found out.

    python3 example/webapp.py --port 3001 --version v1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_DELAY_MS = 60_000
STREAM_PARTS = 5
STREAM_PAUSE = 0.2


class WebApp(ThreadingHTTPServer):
    """The application: its identity, and the moment from which it calls itself healthy."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, version: str, name: str, boot_seconds: float) -> None:
        super().__init__(("127.0.0.1", port), Handler)
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
        """Answer ``/up``, ``/slow?ms=N``, ``/stream``, or any other path at once."""
        url = urlsplit(self.path)
        booting = time.monotonic() < self.server.healthy_at
        if booting:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "still booting"})
        elif url.path == "/up":
            self._answer(HTTPStatus.OK, {"status": "up"})
        elif url.path == "/stream":
            self._stream()
        elif url.path == "/slow":
            delay = parse_qs(url.query).get("ms", ["1000"])[-1]
            if not (delay.isascii() and delay.isdigit() and int(delay) <= MAX_DELAY_MS):
                problem = f"ms must be a whole number up to {MAX_DELAY_MS}"
                self._answer(HTTPStatus.BAD_REQUEST, {"error": problem})
                return
            time.sleep(int(delay) / 1000)
            self._answer(HTTPStatus.OK, {"path": url.path})
        else:
            self._answer(HTTPStatus.OK, {"path": url.path})

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: HTTPStatus, fields: dict[str, str]) -> None:
        who = {"version": self.server.version, "instance": self.server.name}
        body = json.dumps(who | fields).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "HEAD":
            return
        for part in range(1, STREAM_PARTS + 1):
            line = f"{self.server.version} {self.server.name} {part}/{STREAM_PARTS}\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            time.sleep(STREAM_PAUSE)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write no access log: the proxy writes one."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small web application to deploy.")
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
    with WebApp(options.port, options.version, name, options.boot_seconds) as app:
        print(f"{name} listening on 127.0.0.1:{app.server_address[1]}", flush=True)
        try:
            app.serve_forever()
        except KeyboardInterrupt:
            print(f"{name} stopped", flush=True)


if __name__ == "__main__":
    main()
