"""The relay keeps nothing of a session that has ended, and little of one that lives.

``make sanitize`` runs all tests of the relay under AddressSanitizer, and this leak check for long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import SourcePorts
from tests.test_fastpath_memory import ROUNDS, SANITIZED, occupied
from tests.udp.calling import (
    ALERT,
    HANDSHAKE,
    bye,
    described,
    error,
    receiver_report,
    record,
    request,
    rtp,
    success,
)
from tests.udp.relaying import (
    Client,
    Driver,
    Newcomer,
    driving,
    free_range,
    open_descriptors,
    packed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = bytes(52)
LOCAL = packed("127.0.0.1")
EACH = 250  # sessions of one batch that begin in each way

# In a process of its own: what others have freed would be used again and not be counted.
GROWTH = """
import resource, socket, sys
from kamal_proxy._fastpath import Relay

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def begin(numbers):
    for number in numbers:
        client = number.to_bytes(16) + b"\\0\\1"
        for listener in listeners:
            relay.restore(
                listener, client, 0, bytes(16), generation, target, 0, False, 0.0, bytes(28),
                second=listener != listeners[0],
            )

with (
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
):
    sock.bind(("127.0.0.1", 0))
    other.bind(("127.0.0.1", 0))
    relay = Relay(bytes(16), sockets=False)
    listeners = [relay.listen(sock.fileno())]
    if "pair" in sys.argv:
        listeners.append(relay.listen(other.fileno()))
        relay.pair(*listeners)
    target = relay.add_target("127.0.0.1", 9)
    generation = relay.add_generation(60.0, 30.0, media="media" in sys.argv)
    begin(range(500))
    before = resident()
    begin(range(500, 10500))
    print(resident() - before)
    relay.close()
"""

# What the collector frees may have been cleared before.
GARBAGE = """
import gc, socket, sys
from kamal_proxy._fastpath import Relay, SourcePorts

class Holder:
    pass

def leave(sock):
    relay = Relay(bytes(16))
    relay.use_ports(SourcePorts(*map(int, sys.argv[1:])))
    listener = relay.listen(sock.fileno())
    target = relay.add_target("127.0.0.1", 9)
    generation = relay.add_generation(60.0, 30.0)
    for number in range(10):
        client = number.to_bytes(18)
        relay.restore(listener, client, 0, bytes(16), generation, target, 0, False, 0.0)
    holder = Holder()
    holder.relay, holder.itself = relay, holder

gc.disable()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("127.0.0.1", 0))
    for _ in range(20):
        leave(sock)
    print(gc.collect() >= 20)
"""


def run_alone(program: str, *arguments: str) -> str:
    """Run a program in a process of its own, with this process's package."""
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, f"it ended with {result.returncode}"
    return result.stdout


def restore(driver: Driver, numbers: Sequence[int], generation: int, target: int) -> None:
    for number in numbers:
        client = number.to_bytes(16) + b"\0\1"
        header = HEADER if number % 2 else b""
        driver.relay.restore(
            0, client, 0, LOCAL, generation, target, 0, not number % 3, 0.0, header
        )


def exercise(driver: Driver, clients: list[Client], rounds: int) -> None:
    """Begin sessions in every way and end them in every way, refused calls included."""
    for batch in range(1, rounds // EACH + 2):
        one_batch(driver, clients, range(batch << 32, (batch << 32) + EACH))


def one_batch(driver: Driver, clients: list[Client], numbers: range) -> None:
    relay = driver.relay
    targets = driver.targets = [relay.add_target("127.0.0.1", 9) for _ in range(3)]
    former, later = relay.add_generation(60.0, 60.0), relay.add_generation(60.0, 60.0)
    spread = relay.add_generation(60.0, 60.0, affinity=False)
    restore(driver, numbers, former, targets[0])
    with pytest.raises(ValueError, match="already"):
        restore(driver, numbers[:1], former, targets[0])
    with pytest.raises(ValueError, match="no such target"):
        restore(driver, range(1), former, 99)
    records = relay.export(former, {targets[0]: 1})
    assert len(records) == len(numbers) * relay.RECORD_SIZE
    relay.adopt(former, later, {targets[0]: targets[1]})
    assert relay.end_some(later, EACH // 2) == EACH // 2
    refuse = partial(relay.refuse, reason="failed")
    for generation, decide in (
        (former, driver.admit),
        (spread, driver.spread),
        (spread, lambda newcomer: refuse(newcomer.number)),
        (spread, lambda newcomer: None),
        (former, driver.admit),
    ):
        driver.generation, driver.decide = generation, decide
        for client in clients:
            client.say(bytes(1400))
            client.say(bytes(1200), segment=400)
        driver.turn()
        relay.end_some(generation, len(clients))
    relay.let_go(spread)
    relay.unlisten(0)
    assert relay.live == 0
    assert relay.listen(driver.listeners[0].fileno()) == 0
    for generation in (former, later, spread):
        relay.drop_generation(generation)
    for target in targets:
        relay.drop_target(target)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
def test_nothing_is_kept_of_sessions() -> None:
    with driving("127.0.0.1", sockets=False) as driver:
        driver.header = HEADER
        clients = [driver.client() for _ in range(8)]
        exercise(driver, clients, EACH * 10)
        blocks, memory = occupied()
        begun = driver.relay.counters()["created"]
        rounds = max(ROUNDS, EACH * 10)
        exercise(driver, clients, rounds)
        blocks_after, memory_after = occupied()
        assert driver.relay.counters()["created"] - begun >= rounds
        assert blocks_after - blocks < rounds // 100
        assert memory_after - memory < 1 << 20


def one_batch_of_calls(driver: Driver, legs: list[Client], numbers: range) -> None:
    """Begin calls in every way that needs no answer, and end them in every way."""
    relay = driver.relay
    alone, *pair = range(3)
    relay.pair(*pair)
    targets = driver.targets = [relay.add_target("127.0.0.1", 0) for _ in range(3)]
    driver.generation = relay.add_generation(60.0, 60.0, media=True)
    later = relay.add_generation(60.0, 60.0, media=True)
    for number in numbers[:: len(pair)]:
        client = number.to_bytes(16) + b"\0\1"
        header = HEADER if number % 4 else b""
        for listener in pair:
            relay.restore(
                listener,
                client,
                0,
                LOCAL,
                driver.generation,
                targets[0],
                0,
                True,
                0.0,
                header,
                second=listener != pair[0],
            )
    assert relay.pairs == EACH // 2
    records = relay.export(driver.generation, {targets[0]: 1})
    assert len(records) == EACH * relay.RECORD_SIZE
    relay.begin_goodbye(driver.generation)
    for session, *_ in relay.goodbyes(driver.generation, EACH // 4):
        assert relay.move(session, later, targets[1])
        assert relay.end(session)
        assert not relay.end(session)
    relay.adopt(driver.generation, later, {targets[0]: targets[2]})

    def fail(newcomer: Newcomer) -> None:
        with pytest.raises(ValueError, match="no such session"):
            relay.join(newcomer.number, 1 << 63)
        with pytest.raises(ValueError, match="no such target"):
            relay.admit(newcomer.number, later, [*targets, 99], asking=1)

    for decide in (driver.pair_up, driver.ask, fail, driver.pair_up):
        driver.decide = decide
        for data in (
            rtp(1) * 2,
            receiver_report(1) + described(1, bytes(200)),
            receiver_report(2) + described(2, b"another") + bye(1, 2),
            record(HANDSHAKE) + record(ALERT),
            request(),
        ):
            for leg in legs:
                leg.say(data)
            driver.turn()
        relay.hurry(driver.generation)
        relay.goodbyes(driver.generation, 1)
        relay.end_some(driver.generation, len(legs) // 2)
    relay.unlisten_all([alone, *pair])
    assert relay.live == relay.undecided == 0
    driver.turn()  # what newcomers have said is forgotten
    for place, sock in enumerate(driver.listeners):
        assert relay.listen(sock.fileno()) == place
    for generation in (driver.generation, later):
        relay.drop_generation(generation)
    for target in targets:
        relay.drop_target(target)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
def test_nothing_is_kept_of_calls() -> None:
    with driving("127.0.0.1", sockets=False) as driver:
        driver.listen_to_pair()
        driver.header = HEADER
        legs = [leg for _ in range(4) for leg in driver.caller()] + [driver.client()]

        def exercise_calls(rounds: int) -> None:
            for batch in range(1, rounds // EACH + 2):
                one_batch_of_calls(driver, legs, range(batch << 32, (batch << 32) + EACH))

        exercise_calls(EACH * 10)
        blocks, memory = occupied()
        rounds = max(ROUNDS // 4, EACH * 10)
        exercise_calls(rounds)
        blocks_after, memory_after = occupied()
        assert blocks_after - blocks < rounds // 100
        assert memory_after - memory < 1 << 20


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
def test_nothing_is_kept_of_who_was_asked() -> None:
    """Of targets that lost, with their sockets; a quarter of the clients never finds its own."""
    with driving("127.0.0.1") as driver:
        media = driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
        driver.header, driver.decide = HEADER, driver.ask
        targets = [driver.target() for _ in range(4)]
        named = receiver_report(2) + described(2, bytes(200))
        for target, answer in zip(targets, (success(), error(487), success()), strict=False):
            said = (error(401), answer, named)
            target.answer = lambda _, said=said: said
        silent = targets[3].number
        clients = [driver.client() for _ in range(20)]

        def find(rounds: int) -> None:
            for turn in range(rounds):
                driver.targets = [targets[(turn + place) % 4].number for place in range(3)]
                if turn % 4 == 3:
                    driver.targets = [silent, silent, silent]
                for client in clients:
                    client.say(request())
                    client.say(receiver_report(1) + described(1, bytes(200)))
                driver.settle()
                # So many may be too often; then nobody was asked.
                undecided = 20 if turn % 4 == 3 else 0
                assert driver.relay.undecided == undecided or "ask_limit" in driver.dropped()
                driver.relay.end_some(media, 99)
                assert driver.relay.sockets == 0
                for peer in (*clients, *targets):
                    peer.received.clear()
                driver.pins.clear()

        find(20)
        before = open_descriptors()
        blocks, memory = occupied()
        rounds = max(ROUNDS // 1000, 50)
        find(rounds)
        blocks_after, memory_after = occupied()
        assert blocks_after - blocks < rounds * 20 // 100
        assert memory_after - memory < 1 << 20
        assert open_descriptors() == before


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
def test_nothing_is_kept_of_relays() -> None:
    def live(rounds: int) -> None:
        for _ in range(rounds):
            with driving("127.0.0.1", sockets=False) as driver:
                driver.relay.use_ports(SourcePorts(1, 65535))
                target = driver.relay.add_target("127.0.0.1", 9)
                restore(driver, range(50), driver.generation, target)
                driver.decide = lambda newcomer: None
                driver.client().say(b"undecided")
                driver.turn()
                driver.listen_to_pair()
                driver.generation = driver.relay.add_generation(60.0, 60.0, media=True)
                driver.targets = [target, target]
                for decide in (driver.pair_up, driver.pair_up, driver.ask):
                    driver.decide = decide
                    driver.caller()[0].say(receiver_report(1) + described(1, bytes(200)))
                    driver.turn()

    rounds = max(ROUNDS // 500, 50)
    live(rounds)
    before = open_descriptors()
    growths = []
    for _ in range(3):
        _, memory = occupied()
        live(rounds)
        growths.append(occupied()[1] - memory)
    # The heap grows now and then, in between what other tests have freed; a leak always does.
    assert min(growths) < 1 << 20
    assert open_descriptors() == before


@pytest.mark.skipif(SANITIZED, reason="the sanitizer needs room of its own")
@pytest.mark.parametrize(
    ("arguments", "most"), [([], 1024), (["media"], 1024), (["media", "pair"], 1536)]
)
def test_a_session_takes_little_memory(arguments: list[str], most: int) -> None:
    each = int(run_alone(GROWTH, *arguments)) / 10_000
    assert 100 < each <= most, f"{each} bytes"


def test_a_relay_may_be_garbage() -> None:
    assert run_alone(GARBAGE, *map(str, free_range(400))) == "True\n"
