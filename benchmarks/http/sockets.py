"""WebSockets for the benchmark: a target that echoes, and clients that keep one message on its way.

Every message has the same size, so both only count bytes: what is measured is the proxy between.

    python3 -m benchmarks.http.sockets target 9000
"""

from __future__ import annotations

import base64
import hashlib
import selectors
import socket
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import attrs

from benchmarks.processes import BenchmarkError, Running, free_port, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: Bytes of each message.
MESSAGE = 64

_MASK = b"mask"
_TEXT = 0x81  # the opcode, and that this frame is the whole message (RFC 6455 5.2)
_TO_TARGET = bytes([_TEXT, 0x80 | MESSAGE]) + _MASK + b"x" * MESSAGE
_TO_CLIENT = bytes([_TEXT, MESSAGE]) + b"y" * MESSAGE
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY = base64.b64encode(b"kamal-proxy-test")
_HELLO = (
    b"GET /ws HTTP/1.1\r\nHost: %b\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + _KEY + b"\r\n\r\n"
)
_TIMEOUT = 30.0


@attrs.frozen
class Echoes:
    """What the clients have seen.

    Attributes:
        messages: That arrived, in both directions together.
        per_second: Of these.
        median: Of the seconds from a message to its echo.
        p99: 99th percentile of the same.
        lost: Connections that ended before the time was over.
    """

    messages: int
    per_second: float
    median: float
    p99: float
    lost: int


@contextmanager
def target(folder: Path) -> Iterator[Running]:
    """Run the target in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.http.sockets", "target", str(port)]
    with running("sockets", command, port, folder) as program:
        yield program


def load(
    port: int, host: str, seconds: float, connections: int, opened: Callable[[], object]
) -> Echoes:
    """Let many clients send a message, wait for its echo, and send the next.

    Args:
        port: Port of the program.
        host: Host to ask for.
        seconds: How long.
        connections: How many clients.
        opened: Called when all are connected.

    Raises:
        BenchmarkError: a handshake fails.
    """
    waits: list[float] = []
    lost = 0
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        clients = [_open(port, host, stack) for _ in range(connections)]
        opened()
        begun = time.perf_counter()
        end = begun + seconds
        for client in clients:
            client.setblocking(False)
            client.send(_TO_TARGET)
            selector.register(client, selectors.EVENT_READ, _Client(time.perf_counter()))
        while (now := time.perf_counter()) < end and selector.get_map():
            for key, _ in selector.select(end - now):
                sock, state = key.fileobj, key.data
                assert isinstance(sock, socket.socket)
                try:
                    data = sock.recv(1 << 16)
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(sock)
                    lost += 1
                    continue
                state.received += len(data)
                while state.received >= len(_TO_CLIENT):
                    state.received -= len(_TO_CLIENT)
                    now = time.perf_counter()
                    waits.append(now - state.sent)
                    state.sent = now
                    sock.send(_TO_TARGET)
        took = time.perf_counter() - begun
    if len(waits) < 100:
        raise BenchmarkError(f"only {len(waits)} messages came back in {took:.1f} s")
    return Echoes(
        messages=2 * len(waits),
        per_second=2 * len(waits) / took,
        median=statistics.median(waits),
        p99=statistics.quantiles(waits, n=100)[98],
        lost=lost,
    )


@attrs.define
class _Client:
    sent: float
    received: int = 0


def _open(port: int, host: str, stack: ExitStack) -> socket.socket:
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), _TIMEOUT))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(_HELLO % host.encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        # One byte too many would be one of a message, but nobody has sent any yet.
        data = client.recv(4096)
        if not data:
            break
        head += data
    if not head.startswith(b"HTTP/1.1 101 "):
        raise BenchmarkError(f"no WebSocket: {head[:200]!r}")
    return client


def serve(port: int) -> None:
    """Be the target: answer handshakes, echo as many messages as came; for ever."""
    with socket.create_server(("127.0.0.1", port), backlog=4096) as listener:
        listener.setblocking(False)
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    client.setblocking(False)
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(client, selectors.EVENT_READ, _Connection())
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    if not _answer(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()


@attrs.define
class _Connection:
    head: bytes = b""
    is_open: bool = False
    received: int = 0


def _answer(client: socket.socket, connection: _Connection) -> bool:
    """Answer what has come; return whether the connection goes on."""
    try:
        data = client.recv(1 << 16)
        if not data:
            return False
        if connection.is_open:
            connection.received += len(data)
            count, connection.received = divmod(connection.received, len(_TO_TARGET))
            client.sendall(_TO_CLIENT * count)
            return True
        connection.head += data
        if b"\r\n\r\n" not in connection.head:
            return True
        connection.is_open = True
        return _shake_hands(client, connection.head)
    except OSError:
        return False


def _shake_hands(client: socket.socket, head: bytes) -> bool:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"sec-websocket-key":
            proof = base64.b64encode(hashlib.sha1(value.strip() + _GUID).digest())
            client.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + proof + b"\r\n\r\n"
            )
            return True
    # A health check.
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    return False


if __name__ == "__main__":
    serve(int(sys.argv[2]))
