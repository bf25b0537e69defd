"""A small UDP server to deploy, such as a game has one: one file, standard library only.

It answers each packet with its name, how many packets that client has sent so far, and the packet:
so a client can tell who served it, and whether its packets went to somebody else meanwhile. The
TCP port of the same number takes connections, which tells a proxy that the server is up. SIGTERM
ends it at once: a proxy that still had players here would be found out.

    python3 example/udpserver.py --port 7001 --version v1
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from typing import TypeAlias

MAX_PACKET = 65535
MAX_ECHO = 1200  # bytes of a packet that are sent back
MAX_PLAYERS = 10_000
TRIES = 100  # for a number that is free as a UDP and as a TCP port
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # a PROXY protocol header of version 2 begins with it

Address: TypeAlias = tuple[str, int]


class Players:
    """The clients and how many packets each has sent.

    If there are too many, the one silent for longest is forgotten. One that was silent for longer
    than ``forget_seconds`` is another one: sooner or later somebody else gets a port that is free.
    """

    def __init__(self, forget_seconds: float) -> None:
        self._forget_seconds = forget_seconds
        self._packets: OrderedDict[Address, tuple[int, float]] = OrderedDict()

    def count(self, client: Address, now: float) -> int:
        """Count a packet of a client; return how many it has sent."""
        packets, last = self._packets.get(client, (0, now))
        packets = 1 if now - last > self._forget_seconds else packets + 1
        self._packets[client] = packets, now
        self._packets.move_to_end(client)
        if len(self._packets) > MAX_PLAYERS:
            self._packets.popitem(last=False)
        return packets


def unwrapped(packet: bytes) -> tuple[Address, bytes]:
    """Split a packet into the client's address, from its PROXY protocol header, and the rest.

    Raises:
        ValueError: there is no such header, or none with IP addresses.
    """
    if not packet.startswith(SIGNATURE) or len(packet) < 16:
        raise ValueError("the packet has no PROXY protocol header")
    kind, end = packet[13], 16 + int.from_bytes(packet[14:16], "big")
    size = {0x12: 4, 0x22: 16}.get(kind, 0)  # of an address of UDP over IPv4 and IPv6
    if not size or len(packet) < end or end < 16 + 2 * size + 4:
        raise ValueError("the PROXY protocol header names no client")
    address = ipaddress.ip_address(packet[16 : 16 + size])
    port = int.from_bytes(packet[16 + 2 * size : 18 + 2 * size], "big")
    return (str(address), port), packet[end:]


def serve(sock: socket.socket, name: str, *, forget_seconds: float, proxy_protocol: bool) -> None:
    """Answer packets for ever; with the PROXY protocol, the answer names the client as well."""
    players = Players(forget_seconds)
    while True:
        packet, peer = sock.recvfrom(MAX_PACKET)
        client, told = peer, ""
        if proxy_protocol:
            try:
                client, packet = unwrapped(packet)
            except ValueError:
                continue  # it did not come through the proxy
            told = f"{client[0]} "
        answer = (
            f"{name} {players.count(client, time.monotonic())} {told}".encode() + packet[:MAX_ECHO]
        )
        sock.sendto(answer, peer)


def accept(listener: socket.socket, boot_seconds: float) -> None:
    """Take connections and end them, once the server calls itself up."""
    time.sleep(boot_seconds)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        connection.close()


def bound(host: str, port: int, health_port: int) -> tuple[socket.socket, socket.socket]:
    """Return a UDP socket and a TCP socket that refuses connections until it listens.

    Raises:
        OSError: a port is taken.
    """
    tries = 1 if port else TRIES
    while True:
        tries -= 1
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            udp.bind((host, port))
            tcp.bind((host, health_port or udp.getsockname()[1]))
            return udp, tcp
        except OSError:
            udp.close()
            tcp.close()
            if not tries:
                raise


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small UDP server to deploy.")
    parser.add_argument("--host", default="127.0.0.1", help="address (%(default)s)")
    parser.add_argument("--port", type=int, default=7000, help="0 takes a free one (%(default)s)")
    parser.add_argument("--version", default="v1", help="named in every answer (%(default)s)")
    parser.add_argument("--name", help="of this instance, named instead of the version")
    parser.add_argument(
        "--health-port",
        type=int,
        default=0,
        help="TCP port that takes connections; 0 means the number of the port (%(default)s)",
    )
    parser.add_argument(
        "--boot-seconds",
        type=float,
        default=0.0,
        help="refuse connections for so long, as a slow start would (%(default)s)",
    )
    parser.add_argument(
        "--forget-seconds",
        type=float,
        default=60.0,
        help="count a client anew that was silent for longer (%(default)s)",
    )
    parser.add_argument(
        "--proxy-protocol",
        action="store_true",
        help="each packet begins with a header that names its client (PROXY protocol 2)",
    )
    options = parser.parse_args(argv)
    name = options.name or options.version
    udp, tcp = bound(options.host, options.port, options.health_port)
    with udp, tcp:
        if not options.boot_seconds:
            tcp.listen()  # whoever reads the next line may connect at once
        print(f"{name} listening on {options.host}:{udp.getsockname()[1]}", flush=True)
        threading.Thread(target=accept, args=(tcp, options.boot_seconds), daemon=True).start()
        try:
            serve(
                udp,
                name,
                forget_seconds=options.forget_seconds,
                proxy_protocol=options.proxy_protocol,
            )
        except KeyboardInterrupt:
            print(f"{name} stopped", flush=True)


if __name__ == "__main__":
    main()
