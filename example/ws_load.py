"""Visitors who talk to a WebSocket through a proxy, and a record of every message.

Each says one number after the other, and waits for the application to say it back. When told to go
away, or cut off, a visitor comes back at once and says again what was not answered, as a good page
does (page.html): a message is lost only if nobody answers it in time. Writes the same records as
load.py, where a slow answer is one that had to be asked for twice.

    python3 -m example.ws_load --port 8080 --seconds 5
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from example.chat import send, shake_hands
from example.load import TIMEOUT, Request, record
from example.webapp import CLOSE, PING, PONG, TEXT, receive_frame

if TYPE_CHECKING:
    import queue
    import threading

GREETING = "this is "
PAUSE = 0.1  # seconds until another try


class Visitor:
    """One visitor with one WebSocket, opened again whenever it was closed.

    Args:
        host: Where the proxy is.
        port: Where it listens.
        name: What the visitor is called in the records.
    """

    def __init__(self, host: str, port: int, name: str) -> None:
        self._address = host, port
        self._name = name
        self._opened = 0
        self._sock: socket.socket | None = None
        self._instance = ""

    def say(self, text: str) -> Request:
        """Say something, again if need be, and wait until it is said back."""
        began = time.monotonic()
        again = False
        while True:
            error = ""
            try:
                answer = self._exchange(text)
                if answer != text:
                    error = f"{self._instance} says {answer!r} to {text!r}"
            except (OSError, EOFError) as problem:
                self.leave()
                error = f"{type(problem).__name__}: {problem}"
                if time.monotonic() - began < TIMEOUT:
                    again = True
                    time.sleep(PAUSE)
                    continue
            name = f"{self._name}.{self._opened}"
            instance = "" if error else self._instance
            return Request(began, time.monotonic(), again, instance, error, name)

    def leave(self) -> None:
        """Close the WebSocket, if there is one."""
        if self._sock is not None:
            with suppress(OSError):  # it can't send what it still has, which is said again
                self._stream.close()
            self._sock.close()
            self._sock = None

    def _exchange(self, text: str) -> str:
        if self._sock is None:
            self._enter()
        send(self._stream, TEXT, text.encode())
        return self._hear()

    def _enter(self) -> None:
        self._opened += 1
        self._sock = socket.create_connection(self._address, timeout=TIMEOUT)
        self._stream = self._sock.makefile("rwb")
        host, port = self._address
        status = shake_hands(self._stream, f"{host}:{port}", "/ws")
        if status != 101:
            raise ConnectionError(f"refused with {status}")
        self._instance = self._hear().removeprefix(GREETING)

    def _hear(self) -> str:
        """Return the next message.

        Raises:
            EOFError: there is none, because the WebSocket was closed or cut off.
        """
        while True:
            first, payload = receive_frame(self._stream)
            opcode = first & 15
            if opcode == CLOSE:
                send(self._stream, CLOSE, payload)
                raise EOFError(f"closed with {int.from_bytes(payload[:2], 'big')}")
            if opcode == PING:
                send(self._stream, PONG, payload)
            elif opcode != PONG:
                return payload.decode()


def talk(visitor: Visitor, interval: float, done: threading.Event, out: queue.Queue[str]) -> None:
    """Say a number every ``interval`` seconds."""
    number = 0
    while not done.wait(interval):
        number += 1
        out.put(json.dumps(visitor.say(str(number))))
    visitor.leave()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Visitors of a WebSocket, with a record of it.")
    parser.add_argument("--host", default="127.0.0.1", help="of the proxy (%(default)s)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--visitors", type=int, default=4)
    parser.add_argument("--interval", type=float, default=0.2, help="seconds between messages")
    parser.add_argument("--seconds", type=float, help="stop by itself after so long")
    options = parser.parse_args(argv)
    visitors = [
        Visitor(options.host, options.port, f"visitor{number}")
        for number in range(options.visitors)
    ]
    record([partial(talk, visitor, options.interval) for visitor in visitors], options.seconds)


if __name__ == "__main__":
    main()
