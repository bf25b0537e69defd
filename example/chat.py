"""A WebSocket client for the command line: standard library only, for the example application.

    python3 -m example.chat ws://127.0.0.1:8080/ws hello world

Sends each word, prints every message that comes, and closes when as many came as were sent, and one
more with which the application greets. With --stay it waits for the other side to close.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from base64 import b64encode
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from example.webapp import CLOSE, PING, PONG, TEXT, accept_of, frame, receive_frame

if TYPE_CHECKING:
    from io import BufferedIOBase

NORMAL = (1000).to_bytes(2, "big")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Talk to a WebSocket.")
    parser.add_argument("url", help="such as ws://127.0.0.1:8080/ws")
    parser.add_argument("words", nargs="*", help="messages to send")
    parser.add_argument("--stay", action="store_true", help="wait until the other side closes")
    options = parser.parse_args(argv)
    url = urlsplit(options.url)
    with (
        socket.create_connection((url.hostname, url.port or 80)) as sock,
        sock.makefile("rwb") as stream,
    ):
        status = shake_hands(stream, url.netloc, url.path or "/")
        if status != 101:
            print(f"refused with {status}")
            return 1
        for word in options.words:
            send(stream, TEXT, word.encode())
        return listen(stream, -1 if options.stay else 1 + len(options.words))


def shake_hands(stream: BufferedIOBase, host: str, path: str) -> int:
    """Ask for a WebSocket and return the status of the answer."""
    key = b64encode(os.urandom(16)).decode()
    stream.write(
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    stream.flush()
    status, *headers = iter(lambda: stream.readline().decode().strip(), "")
    accepted = f"sec-websocket-accept: {accept_of(key)}".lower()
    code = int(status.split()[1])
    return 0 if code == 101 and accepted not in map(str.lower, headers) else code


def listen(stream: BufferedIOBase, messages: int) -> int:
    """Print what comes until a side closes; close after so many messages, never if negative."""
    while True:
        try:
            first, payload = receive_frame(stream)
        except EOFError:
            print("cut off")
            return 1
        opcode = first & 15
        if opcode == CLOSE:
            if messages:
                send(stream, CLOSE, payload)
            print(f"closed with {int.from_bytes(payload[:2], 'big')}")
            return 0
        if opcode == PING:
            send(stream, PONG, payload)
        elif opcode != PONG:
            print(payload.decode(), flush=True)
            messages -= 1
            if not messages:
                send(stream, CLOSE, NORMAL)


def send(stream: BufferedIOBase, opcode: int, payload: bytes) -> None:
    stream.write(frame(0x80 | opcode, payload, os.urandom(4)))
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
