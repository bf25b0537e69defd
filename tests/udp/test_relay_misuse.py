"""Calls that a relay refuses: on a closed one, with numbers that name nothing, with odd values."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy._fastpath import Relay, SourcePorts
from tests.udp.relaying import Driver, driving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED = bytes(16)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving("127.0.0.1") as driver:
        yield driver


CALLS: dict[str, Callable[[Relay, int], object]] = {
    "fileno": lambda relay, fd: relay.fileno(),
    "listen": lambda relay, fd: relay.listen(fd),
    "unlisten": lambda relay, fd: relay.unlisten(0),
    "unlisten_all": lambda relay, fd: relay.unlisten_all([0]),
    "pair": lambda relay, fd: relay.pair(0, 0),
    "add_target": lambda relay, fd: relay.add_target("127.0.0.1", 9),
    "drop_target": lambda relay, fd: relay.drop_target(0),
    "set_down": lambda relay, fd: relay.set_down(0, True),
    "add_generation": lambda relay, fd: relay.add_generation(1.0, 1.0),
    "let_go": lambda relay, fd: relay.let_go(0),
    "hurry": lambda relay, fd: relay.hurry(0),
    "assign": lambda relay, fd: relay.assign(0, 0),
    "end": lambda relay, fd: relay.end(0),
    "begin_goodbye": lambda relay, fd: relay.begin_goodbye(0),
    "goodbyes": lambda relay, fd: relay.goodbyes(0, 1),
    "say_goodbye": lambda relay, fd: relay.say_goodbye(0, b"", b""),
    "stuck": lambda relay, fd: relay.stuck(0, 0, 1.0, 1),
    "flows_to": lambda relay, fd: relay.flows_to(0),
    "adopt": lambda relay, fd: relay.adopt(0, 0, {}),
    "drop_generation": lambda relay, fd: relay.drop_generation(0),
    "sessions": lambda relay, fd: relay.sessions(0),
    "ended": lambda relay, fd: relay.ended(0),
    "end_some": lambda relay, fd: relay.end_some(0, 1),
    "use_ports": lambda relay, fd: relay.use_ports(SourcePorts(1000, 2000)),
    "run": lambda relay, fd: relay.run(1),
    "interrupt_by": lambda relay, fd: relay.interrupt_by(fd),
    "newcomers": lambda relay, fd: relay.newcomers(),
    "following": lambda relay, fd: relay.following(0),
    "opening": lambda relay, fd: relay.opening(0),
    "partner": lambda relay, fd: relay.partner(0),
    "join": lambda relay, fd: relay.join(0, 0),
    "undecided_from": lambda relay, fd: relay.undecided_from(0),
    "cease_asking": lambda relay, fd: relay.cease_asking(),
    "pins": lambda relay, fd: relay.pins(),
    "has_session": lambda relay, fd: relay.has_session(0),
    "ask": lambda relay, fd: relay.ask(0, [0], 1),
    "ask_again": lambda relay, fd: relay.ask_again(),
    "admit": lambda relay, fd: relay.admit(0, 0, [0]),
    "refuse": lambda relay, fd: relay.refuse(0, "failed"),
    "evict": lambda relay, fd: relay.evict(),
    "refusals": lambda relay, fd: relay.refusals(),
    "move": lambda relay, fd: relay.move(0, 0, 0),
    "export": lambda relay, fd: relay.export(0, {}),
    "restore": lambda relay, fd: relay.restore(0, bytes(18), 0, bytes(16), 0, 0, 0, False, 0.0),
}


@pytest.mark.parametrize("name", [*CALLS])
def test_a_closed_relay_does_nothing_more(driver: Driver, name: str) -> None:
    relay = Relay(SEED)
    fd = driver.listeners[0].fileno()
    relay.listen(fd)
    relay.add_target("127.0.0.1", 9)
    relay.add_generation(1.0, 1.0)
    relay.close()
    with pytest.raises(ValueError, match="closed"):
        CALLS[name](relay, fd)


def test_every_method_is_tried_on_a_closed_relay() -> None:
    methods = {name for name in dir(Relay) if callable(getattr(Relay, name))}
    public = {name for name in methods if not name.startswith("_")}
    assert public - CALLS.keys() == {"close", "counters"}


NOTHING: dict[str, Callable[[Relay, int], object]] = {
    "unlisten": lambda relay, number: relay.unlisten(number),
    "drop_target": lambda relay, number: relay.drop_target(number),
    "set_down": lambda relay, number: relay.set_down(number, True),
    "unlisten_all": lambda relay, number: relay.unlisten_all([number]),
    "pair": lambda relay, number: relay.pair(0, number),
    "let_go": lambda relay, number: relay.let_go(number),
    "hurry": lambda relay, number: relay.hurry(number),
    "assign": lambda relay, number: relay.assign(0, number),
    "begin_goodbye": lambda relay, number: relay.begin_goodbye(number),
    "goodbyes": lambda relay, number: relay.goodbyes(number, 1),
    "opening": lambda relay, number: relay.opening(number),
    "partner": lambda relay, number: relay.partner(number),
    "join": lambda relay, number: relay.join(number, 0),
    "undecided_from": lambda relay, number: relay.undecided_from(number),
    "cease_asking": lambda relay, number: relay.cease_asking(number),
    "has_session": lambda relay, number: relay.has_session(number),
    "ask": lambda relay, number: relay.ask(number, [0], 1),
    "stuck": lambda relay, number: relay.stuck(number, 0, 1.0, 1),
    "flows_to": lambda relay, number: relay.flows_to(number),
    "drop_generation": lambda relay, number: relay.drop_generation(number),
    "sessions": lambda relay, number: relay.sessions(number),
    "ended": lambda relay, number: relay.ended(number),
    "end_some": lambda relay, number: relay.end_some(number, 1),
    "following": lambda relay, number: relay.following(number),
    "admit": lambda relay, number: relay.admit(number, 0, [0]),
    "refuse": lambda relay, number: relay.refuse(number, "failed"),
    "move to a generation": lambda relay, number: relay.move(0, number, 0),
    "adopt": lambda relay, number: relay.adopt(number, 0, {}),
    "adopt by": lambda relay, number: relay.adopt(0, number, {}),
    "adopt to": lambda relay, number: relay.adopt(0, 0, {0: number}),
    "export": lambda relay, number: relay.export(number, {}),
    "restore on": lambda relay, number: relay.restore(
        number, bytes(18), 0, bytes(16), 0, 0, 0, False, 0.0
    ),
    "restore to a generation": lambda relay, number: relay.restore(
        0, bytes(18), 0, bytes(16), number, 0, 0, False, 0.0
    ),
    "restore to": lambda relay, number: relay.restore(
        0, bytes(18), 0, bytes(16), 0, number, 0, False, 0.0
    ),
}


@pytest.mark.parametrize("name", [*NOTHING])
@pytest.mark.parametrize("number", [1, 3, 4, 65535, 65536, 0xFFFFFFFF])
def test_numbers_that_name_nothing(driver: Driver, name: str, number: int) -> None:
    relay = Relay(SEED)
    relay.listen(driver.listeners[0].fileno())
    relay.add_target("127.0.0.1", 9)
    relay.add_generation(1.0, 1.0)
    with pytest.raises(
        ValueError, match=r"^there is no such (listener|target|generation|newcomer)$"
    ):
        NOTHING[name](relay, number)
    assert relay.live == 0
    relay.close()


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_a_seed_has_16_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Relay(bytes(size))


@pytest.mark.parametrize("seed", [None, "a text of 16 char", 16])
def test_a_seed_is_bytes(seed: Any) -> None:
    """What was never opened is not closed either."""
    with open(os.devnull) as file:
        standard = os.dup(0) if os.path.exists("/proc/self/fd/0") else -1
        try:
            os.dup2(file.fileno(), 0)
            with pytest.raises(TypeError):
                Relay(seed)
            assert os.path.sameopenfile(0, file.fileno())
        finally:
            if standard >= 0:
                os.dup2(standard, 0)
                os.close(standard)


@pytest.mark.parametrize(("client", "local"), [(17, 16), (19, 16), (0, 0), (18, 15), (18, 18)])
def test_ends_have_their_size(driver: Driver, client: int, local: int) -> None:
    target = driver.target()
    with pytest.raises(ValueError, match="wrong size"):
        driver.relay.restore(0, bytes(client), 0, bytes(local), 0, target.number, 0, False, 0.0)
