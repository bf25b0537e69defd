"""Steady UDP load on a proxy, as players of a game make it, and a record of every packet.

Each player plays match after match, each from a port of its own, and sends numbered packets at a
steady rate without waiting for answers. The server counts a player's packets, so that its answer
shows whether some went to a server that did not know the player. A process of its own, which writes
the same records as load.py and ends when standard input does. Nothing is sent twice: what a player
would notice is a failure.

    python3 -m example.udp_load --port 9999 --seconds 5
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import random
import selectors
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from example.load import Request

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 2.0  # seconds after which an answer has not come


class Match:
    """One match of one player: what it sends from its port, and the answers that it waits for."""

    def __init__(self, address: tuple[str, int], name: str) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.connect(address)
        self.sock.setblocking(False)
        self.name = name
        self.waiting: dict[int, float] = {}  # number of a packet -> when it was sent
        self._sent = 0
        self._lost = 0

    def send(self) -> None:
        """Send the next packet."""
        self._sent += 1
        self.waiting[self._sent] = time.monotonic()
        try:
            self.sock.send(f"{self.name} {self._sent}".encode())
        except ConnectionRefusedError:
            return  # told of an earlier packet; neither will be answered

    def receive(self) -> list[Request]:
        """Return what became of the packets whose answers have come."""
        found: list[Request] = []
        while True:
            try:
                answer = self.sock.recv(65536)
            except BlockingIOError:
                return found
            except ConnectionRefusedError:
                continue  # the packet that was refused will not be answered
            found.append(self._judge(answer, time.monotonic()))

    def _judge(self, answer: bytes, now: float) -> Request:
        try:
            instance, count, name, number = answer.decode().split()
            counted, asked = int(count), int(number)
        except ValueError:
            return Request(now, now, False, "", "it is no answer of the server", self.name)
        began = self.waiting.pop(asked, None) if name == self.name else None
        error = ""
        if began is None:
            error = "an answer that nobody waits for"
        elif not asked - self._lost <= counted <= asked:
            error = f"{instance} counts {counted} packets, not {asked}"
        return Request(began or now, now, False, "" if error else instance, error, self.name)

    def give_up(self, sent_before: float) -> list[Request]:
        """Return the packets that were sent before a time and not answered: they are lost."""
        lost = [number for number, began in self.waiting.items() if began < sent_before]
        self._lost += len(lost)
        now = time.monotonic()
        return [
            Request(self.waiting.pop(number), now, False, "", "no answer", self.name)
            for number in lost
        ]


class Load:
    """The players.

    Args:
        address: Host and port that they send to.
        interval: Seconds between two packets of a player.
        match_seconds: How long a match lasts at most; at least half of that.
        keep_seconds: How long nobody else gets the port of a match that is over: longer than the
            proxy may take the next to have it for the same player.
    """

    def __init__(
        self,
        address: tuple[str, int],
        interval: float,
        match_seconds: float,
        keep_seconds: float,
    ) -> None:
        self._address = address
        self._interval = interval
        self._match_seconds = match_seconds
        self._keep_seconds = keep_seconds
        self._playing = True
        self._selector = selectors.DefaultSelector()
        self._matches: set[Match] = set()
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()

    def run(self, players: int, seconds: float | None) -> None:
        """Play, for so many seconds or until standard input ends."""
        if seconds is None:
            self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        else:
            self._later(time.monotonic() + seconds, self._stop)
        for player in range(players):
            self._play(f"player{player}", time.monotonic())
        while self._playing or self._due:
            self._wait()
            while self._due and self._due[0][0] <= time.monotonic():
                due, _, action = heapq.heappop(self._due)
                action(due)

    def _wait(self) -> None:
        timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, Match):
                self._write(key.data.receive())
            elif not os.read(key.fd, 4096):
                self._selector.unregister(key.fd)
                self._stop(time.monotonic())
        if not self._playing and not any(match.waiting for match in self._matches):
            self._due.clear()

    def _play(self, player: str, now: float) -> None:
        """Begin the first match of a player, which sends when the others do not."""
        numbers = itertools.count(1)

        def begin(now: float) -> None:
            if not self._playing:
                return
            match = Match(self._address, f"{player}.{next(numbers)}")
            self._matches.add(match)
            self._selector.register(match.sock, selectors.EVENT_READ, match)
            end = now + self._match_seconds * random.uniform(0.5, 1.0)
            self._later(now, partial(self._tick, match, end, begin))

        self._later(now + random.random() * self._interval, begin)

    def _tick(self, match: Match, end: float, begin: Callable[[float], None], due: float) -> None:
        """Send a packet and think of the next; a late one delays the rest, no bursts."""
        now = time.monotonic()
        self._write(match.give_up(now - TIMEOUT))
        if not self._playing:
            return
        if due < end:
            match.send()
            self._later(max(due + self._interval, now), partial(self._tick, match, end, begin))
        else:
            begin(due)
            self._later(now + self._keep_seconds, partial(self._leave, match))

    def _stop(self, now: float) -> None:
        """Send nothing more; wait for the last answers."""
        self._playing = False
        for match in self._matches:
            self._later(now + TIMEOUT, partial(self._leave, match))

    def _leave(self, match: Match, now: float) -> None:
        if match in self._matches:
            self._write(match.give_up(now))
            self._matches.discard(match)
            self._selector.unregister(match.sock)
            match.sock.close()

    def _later(self, due: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (due, next(self._order), action))

    def _write(self, records: list[Request]) -> None:
        for record in records:
            print(json.dumps(record), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Steady UDP load with a record of it.")
    parser.add_argument("--host", default="127.0.0.1", help="of the game (%(default)s)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--players", type=int, default=20)
    parser.add_argument("--rate", type=float, default=200.0, help="packets a second, in all")
    parser.add_argument("--match-seconds", type=float, default=3.0, help="longest match")
    parser.add_argument(
        "--keep-seconds", type=float, default=5.0, help="longer than the session timeout"
    )
    parser.add_argument("--seconds", type=float, help="stop by itself after so long")
    options = parser.parse_args(argv)
    interval = options.players / options.rate
    address = options.host, options.port
    load = Load(address, interval, options.match_seconds, options.keep_seconds)
    load.run(options.players, options.seconds)


if __name__ == "__main__":
    main()
