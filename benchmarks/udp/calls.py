"""What calls cost a kamal-proxy: a range of ports, and a look at the media, beside plain UDP.

All services are those of one proxy, and their rounds alternate. One and the same load goes through
each of them: RTP, with a client of its own for each call. What differs is what the service is told
that it is, and how many ports it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs

from benchmarks.udp.measuring import DATAGRAMS, cpu_seconds
from benchmarks.udp.media import SERVER, Packets
from benchmarks.udp.shapes import Shape
from benchmarks.udp.weighing import Weight, weigh

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benchmarks.udp.contenders import Proxy
    from benchmarks.udp.media import Media

FEW = 4
# The ports of all services but the one with many.
OTHER_PORTS = 1 + 1 + FEW + FEW


@attrs.frozen
class Way:
    """Ways through the proxy: one service, or several of one port each.

    Attributes:
        webrtc: Whether the proxy looks at the media.
        ports: The ports, in a row.
    """

    webrtc: bool
    ports: range

    def deploy(self, proxy: Proxy) -> None:
        """Deploy it. Plain UDP has one port for each service.

        Raises:
            BenchmarkError: the deploy fails.
        """
        first, last = self.ports.start, self.ports.stop - 1
        if self.webrtc:
            # The port of the target is where its health would be checked.
            flags = ("--protocol=webrtc", f"--port-ranges={first}-{last}")
            proxy.deploy_udp(str(self), f"{SERVER}:{first}", *flags)
        else:
            for port in self.ports:
                proxy.deploy_udp(f"plain-{port}", f"{SERVER}:{port}", f"--port={port}")

    def __str__(self) -> str:
        return f"{'webrtc' if self.webrtc else 'plain'}-{self.ports.start}"


@attrs.frozen
class Turn:
    """One turn of one way.

    Attributes:
        cpu: Seconds of CPU of the proxy for a datagram.
        packets: What the load reports.
    """

    cpu: float
    packets: Packets


@attrs.frozen
class Calls:
    """What was measured.

    Attributes:
        ways: In the order in which they took turns; the last is the one with many ports.
        few: What the service of calls with few ports weighs.
        many: What the one with many weighs.
        turns: By shape and way, one for each round.
    """

    ways: Sequence[Way]
    few: Weight
    many: Weight
    turns: dict[Shape, dict[Way, list[Turn]]]

    def wrong(self) -> int:
        """Return how many packets were not what a call had sent."""
        return sum(turn.packets.wrong for turn in self._all())

    def _all(self) -> Iterator[Turn]:
        for of_shape in self.turns.values():
            for turns in of_shape.values():
                yield from turns


def ways_of(ports: range) -> list[Way]:
    """Share out ports: to plain UDP and to calls, with one port, with few, and calls with many.

    Args:
        ports: ``OTHER_PORTS``, and as many more as the last way has.
    """
    ways = []
    for webrtc, count in ((False, 1), (True, 1), (False, FEW), (True, FEW)):
        ways.append(Way(webrtc, ports[:count]))
        ports = ports[count:]
    return [*ways, Way(True, ports)]


def measure_calls(
    proxy: Proxy,
    media: Media,
    ways: Sequence[Way],
    shapes: Iterable[Shape],
    rounds: int,
    packets: int,
) -> Calls:
    """Deploy all services on an empty proxy, weigh the last two, and measure all in turns.

    Args:
        proxy: It has nothing deployed, and listens on its own address only.
        media: What talks to it; it serves all ports.
        ways: The services, of ``ways_of``.
        shapes: How many calls there are at a time, from few to many.
        rounds: How many turns each way has with each shape.
        packets: How many in a turn.

    Raises:
        BenchmarkError: a deploy fails, or nothing is answered.
    """
    *others, few, many = ways
    for way in others:
        way.deploy(proxy)
    # Before there is traffic: what would end meanwhile would be taken off the weight.
    few_weight, many_weight = (
        weigh(proxy.program, len(way.ports), partial(way.deploy, proxy)) for way in (few, many)
    )
    turns: dict[Shape, dict[Way, list[Turn]]] = {}
    for shape in shapes:
        turns[shape] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                turns[shape][way].append(_turn(proxy, media, way, shape, packets))
    return Calls(ways, few_weight, many_weight, turns)


def _turn(proxy: Proxy, media: Media, way: Way, shape: Shape, packets: int) -> Turn:
    media.run(way.ports, shape, max(shape.sessions, packets // 10))
    before = cpu_seconds(proxy.program)
    report = media.run(way.ports, shape, packets)
    used = cpu_seconds(proxy.program) - before
    return Turn(used / (DATAGRAMS * packets), report)
