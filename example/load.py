"""Steady keep-alive load on a proxy, and a record of every request: the demo's measuring tool.

Runs as a process of its own, so that nothing else slows its clock. Writes one JSON line per
request to standard output and ends when standard input does. Uses the standard library's HTTP
client, which shares no code with the proxy; with TLS every other client speaks HTTP/2 instead.
Nothing is retried: what a client would notice is a failure.

    python3 example/load.py --port 8080 --seconds 5
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import ssl
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HOST = "localhost"
TIMEOUT = 10.0


class Request(NamedTuple):
    """What one request did.

    Attributes:
        began: When it was sent, seconds of the machine's monotonic clock.
        ended: When its answer was complete or had failed, on the same clock.
        slow: Whether the application was asked to take its time.
        instance: Who answered, from the body; empty after a failure.
        error: What went wrong; empty if nothing did.
        connection: Which TCP connection carried it: ``client.how-many-th``.
    """

    began: float
    ended: float
    slow: bool
    instance: str
    error: str
    connection: str


class Connection(http.client.HTTPConnection):
    """A keep-alive connection that counts how often it had to be opened."""

    opened = 0

    def connect(self) -> None:
        """Open it; the client does so by itself when it finds it closed."""
        self.opened += 1
        super().connect()

    def get(self, path: str) -> tuple[int, bytes]:
        """Send one request and return the status and the body of its answer."""
        self.request("GET", path)
        response = self.getresponse()
        return response.status, response.read()


class SecureConnection(Connection, http.client.HTTPSConnection):
    """The same inside TLS."""


class Transport(Protocol):
    """A connection, of whatever protocol."""

    opened: int

    def get(self, path: str) -> tuple[int, bytes]:
        """Send one request and return the status and the body of its answer."""

    def close(self) -> None:
        """Close the connection; the next request opens it again."""


def transport(port: int, number: int, ca: str, host: str = "127.0.0.1") -> Transport:
    """Return the connection of one client.

    Args:
        port: Where the proxy listens.
        number: Which client it is.
        ca: A file of the certificate that is trusted; empty for plain HTTP.
        host: Where the proxy is, for plain HTTP; with TLS it is on this machine.
    """
    if not ca:
        return Connection(host, port, timeout=TIMEOUT)
    context = ssl.create_default_context(cafile=ca)
    if number % 2 == 0:
        return SecureConnection(HOST, port, timeout=TIMEOUT, context=context)
    from example.load_h2 import Http2Connection  # the only part that needs more than Python

    context.set_alpn_protocols(["h2"])
    return Http2Connection(HOST, port, context, TIMEOUT)


class Client:
    """One client with one connection, opened again after a failure."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._http = transport
        self._name = name

    def get(self, path: str, *, slow: bool = False) -> Request:
        """Send one request and wait for its whole answer."""
        instance = error = ""
        began = time.monotonic()
        try:
            status, body = self._http.get(path)
            if status == http.client.OK:
                instance = instance_in(body)
            else:
                error = f"status {status}"
        except (OSError, http.client.HTTPException, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        ended = time.monotonic()
        if error:
            self._http.close()
        connection = f"{self._name}.{self._http.opened}"
        return Request(began, ended, slow, instance, error, connection)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


def instance_in(body: bytes) -> str:
    """Return the instance that a body names.

    Raises:
        ValueError: the body is not an answer of the example application.
    """
    answer = json.loads(body)
    instance = answer.get("instance") if isinstance(answer, dict) else None
    if not instance:
        raise ValueError("the body names no instance")
    return str(instance)


def steady(client: Client, interval: float, done: threading.Event, out: queue.Queue[str]) -> None:
    """Send a small request every ``interval`` seconds; a late one delays the rest, no bursts."""
    due = time.monotonic() + random.random() * interval
    while not done.wait(max(0.0, due - time.monotonic())):
        out.put(json.dumps(client.get("/")))
        due = max(due + interval, time.monotonic())
    client.close()


def slow(client: Client, longest: float, done: threading.Event, out: queue.Queue[str]) -> None:
    """Keep one slow request in flight; they end at different times on different connections."""
    while not done.is_set():
        milliseconds = int(1000 * longest * random.uniform(0.5, 1.0))
        record = client.get(f"/slow?ms={milliseconds}", slow=True)
        out.put(json.dumps(record))
        if record.error:
            done.wait(0.1)
    client.close()


def record(
    workers: Iterable[Callable[[threading.Event, queue.Queue[str]], None]], seconds: float | None
) -> None:
    """Run each worker in a thread, and print what they put in the queue, line by line.

    Args:
        workers: Each returns when the event is set.
        seconds: When to set it; None means when standard input ends.
    """
    done = threading.Event()
    out: queue.Queue[str] = queue.Queue()
    running: list[Future[None]] = []

    def stop() -> None:
        if seconds is None:
            sys.stdin.buffer.read()
        else:
            time.sleep(seconds)
        done.set()
        wait(running)
        out.put("")

    todo = list(workers)
    with ThreadPoolExecutor(len(todo) + 1) as threads:
        running += [threads.submit(worker, done, out) for worker in todo]
        threads.submit(stop)
        while line := out.get():
            print(line, flush=True)
    for worker in running:
        worker.result()  # what went wrong in it, if anything


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Steady keep-alive load with a record of it.")
    parser.add_argument("--host", default="127.0.0.1", help="of plain HTTP (%(default)s)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second, in all")
    parser.add_argument("--slow-connections", type=int, default=2)
    parser.add_argument("--slow-seconds", type=float, default=1.5, help="longest slow request")
    parser.add_argument("--seconds", type=float, help="stop by itself after so long")
    parser.add_argument("--ca", default="", help="use TLS, and trust the certificate in this file")
    options = parser.parse_args(argv)

    interval = options.connections / options.rate

    def client(kind: str, number: int) -> Client:
        carrier = transport(options.port, number, options.ca, options.host)
        return Client(carrier, f"{kind}{number}")

    clients = [client("client", number) for number in range(options.connections)]
    patient = [client("slow", number) for number in range(options.slow_connections)]
    workers = [partial(steady, one, interval) for one in clients]
    workers += [partial(slow, one, options.slow_seconds) for one in patient]
    record(workers, options.seconds)


if __name__ == "__main__":
    main()
