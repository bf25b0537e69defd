"""The targets that a page of the documentation names, as one process that answers for all of them.

python page_targets.py NAME:PORT h2c://NAME:PORT ...    writes a line when all of them listen

A target answers every HTTP request, with 200, and every datagram, with the datagram. One given as
``h2c://`` is a gRPC server that says that it is healthy.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc  # type: ignore[import-untyped]

MAX_PACKET = 65535
SERVERS: list[grpc.Server] = []  # one that is forgotten stops


class Handler(BaseHTTPRequestHandler):
    """Answers everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def echo(sock: socket.socket) -> None:
    while True:
        packet, client = sock.recvfrom(MAX_PACKET)
        sock.sendto(packet, client)


def serve_grpc(place: str) -> None:
    def check(_: bytes, __: object) -> bytes:
        return b"\x08\x01"  # status: SERVING

    server = grpc.server(futures.ThreadPoolExecutor(1))
    methods = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    handler = grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(place)
    server.start()
    SERVERS.append(server)


def serve(place: str) -> None:
    if place.startswith("h2c://"):
        serve_grpc(place.removeprefix("h2c://"))
        return
    host, _, port = place.rpartition(":")
    address = host, int(port)
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(address)
    threading.Thread(target=echo, args=(udp,)).start()
    threading.Thread(target=ThreadingHTTPServer(address, Handler).serve_forever).start()


if __name__ == "__main__":
    for place in sys.argv[1:]:
        serve(place)
    print("ready", flush=True)
    signal.pause()
