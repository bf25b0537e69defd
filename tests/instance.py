"""One instance of an application, as a process: ``python tests/instance.py NAME PORT``.

Every body begins with its name and a space. It is threaded, keeps connections alive, and prints its
port once it listens. SIGTERM and SIGKILL end it at once: whoever stops it too early is found out.
"""

from __future__ import annotations

import hashlib
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 65536


class Instance(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    name = b""
    healthy = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Instance
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """``/slow?ms=``, ``/stream?parts=&ms=``, ``/big?bytes=``, ``/health?status=``, others."""
        url = urlsplit(self.path)
        query = {key: int(values[-1]) for key, values in parse_qs(url.query).items()}
        if url.path == "/stream":
            self._stream(query["parts"], query["ms"] / 1000)
        elif url.path == "/big":
            self._big(query["bytes"])
        elif url.path == "/up" and not self.server.healthy:
            self._answer(503, b"")
        else:
            if url.path == "/slow":
                time.sleep(query["ms"] / 1000)
            if url.path == "/health":
                self.server.healthy = query["status"] == 200
            self._answer(200, self.server.name + b" " + self.path.encode())

    def do_POST(self) -> None:
        """Answer with the name, and length and digest of the body."""
        digest = hashlib.sha256()
        length = 0
        for data in self._body():
            digest.update(data)
            length += len(data)
        self._answer(200, self.server.name + b" %d %s" % (length, digest.hexdigest().encode()))

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                data = self.rfile.read(min(left, BLOCK))
                if not data:
                    raise ConnectionError("the body was cut short")
                left -= len(data)
                yield data

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, parts: int, pause: float) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in range(parts):
            line = self.server.name + b" %d\n" % part
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            time.sleep(pause)
        self.wfile.write(b"0\r\n\r\n")

    def _big(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        block = bytes(BLOCK)
        while size:
            self.wfile.write(block[: min(size, BLOCK)])
            size -= min(size, BLOCK)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write no access log: the proxy writes one."""


def main() -> None:
    name, port = sys.argv[1:]
    with Instance(("127.0.0.1", int(port)), Handler) as instance:
        instance.name = name.encode()
        print(instance.server_address[1], flush=True)
        instance.serve_forever()


if __name__ == "__main__":
    main()
