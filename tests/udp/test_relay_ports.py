"""Source ports that the relay chooses: each once per target address, and given back at the end."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kamal_proxy._fastpath import SourcePorts
from tests.udp.relaying import Client, Driver, Peer, Target, driving, echo, free_range, needs_ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        yield driver


def use(driver: Driver, count: int) -> tuple[SourcePorts, range]:
    """Let a relay choose from some ports."""
    low, high = free_range(count)
    ports = SourcePorts(low, high)
    driver.relay.use_ports(ports)
    return ports, range(low, high + 1)


def begin(driver: Driver, target: Target) -> Client:
    """Begin a session with a target."""
    driver.targets = [target.number]
    client = driver.client()
    client.say(b"hi")
    before = len(target.received)
    driver.pump(lambda: len(target.received) > before)
    return client


def used(target: Target) -> list[int]:
    return [each.source[1] for each in target.received]


def test_ports_come_from_the_range_each_once(driver: Driver) -> None:
    _, ports = use(driver, 20)
    target = driver.target()
    for _ in range(20):
        begin(driver, target)
    assert sorted(used(target)) == list(ports)


def test_a_port_leads_to_several_targets(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    targets = [driver.target() for _ in range(5)]
    clients = []
    for place, target in enumerate(targets):
        target.answer = lambda datagram, place=place: [b"%d" % place]
        clients.append(begin(driver, target))
    driver.settle()
    assert [used(target) for target in targets] == [[port]] * 5
    assert [client.data for client in clients] == [[b"%d" % place] for place in range(5)]


@needs_ipv6
def test_a_port_leads_to_targets_of_both_families(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    four, six = driver.target(), driver.target("::1")
    for target in (four, six):
        target.answer = echo
        client = begin(driver, target)
        driver.pump(lambda client=client: client.received)  # type: ignore[misc]
        assert used(target) == [port]


def test_no_port_is_left(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    target = driver.target()
    begin(driver, target)
    newcomer = driver.client()
    newcomer.say(b"wait")
    with pytest.raises(OSError, match="annot assign requested address") as caught:
        driver.settle()
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert driver.relay.live == 1
    # It is given back with its session, and the newcomer may have it.
    driver.relay.end_some(driver.generation, 1)
    driver.admit(driver.newcomers()[0])
    driver.settle()
    assert target.data == [b"hi", b"wait"]
    assert used(target) == [port] * 2


def test_ports_are_given_back_again_and_again(driver: Driver) -> None:
    _, ports = use(driver, 3)
    target = driver.target()
    for _ in range(20):
        for _ in range(3):
            begin(driver, target)
        assert sorted(used(target)[-3:]) == list(ports)
        driver.relay.end_some(driver.generation, 3)


def test_all_ways_to_end_give_the_port_back(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    target, other = driver.target(), driver.target()
    begin(driver, target)
    driver.wait_for(1.1)
    assert driver.relay.evict()
    driver.generation = driver.relay.add_generation(0.2, 0.2)
    begin(driver, target)
    driver.pump(lambda: driver.relay.live == 0)
    driver.generation = driver.relay.add_generation(60.0, 60.0)
    client = begin(driver, target)
    driver.shut(target)
    client.say(b"hi")
    driver.pump(lambda: driver.refusals)
    assert driver.relay.move(driver.refusals[-1].session, driver.generation, other.number)
    driver.pump(lambda: other.received)
    reopened = driver.reopened(*target.where)
    reopened.number = target.number
    begin(driver, reopened)
    assert used(target) + used(other) + used(reopened) == [port] * 5


def test_a_target_that_can_not_be_reached_takes_no_port(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    unreachable = driver.relay.add_target("255.255.255.255", 9)  # needs SO_BROADCAST
    driver.targets = [unreachable]
    client = driver.client()
    client.say(b"hi")
    for _ in range(3):
        with pytest.raises(PermissionError):
            driver.settle()
        client.say(b"hi")
    target = driver.target()
    driver.targets = [target.number]
    driver.settle()
    assert used(target) == [port]


def test_ports_that_others_have_are_passed_over(driver: Driver) -> None:
    _, ports = use(driver, 5)
    target = driver.target()
    with Peer("127.0.0.1", ports[1]).sock, Peer("127.0.0.1", ports[4]).sock:
        for _ in range(3):
            begin(driver, target)
        assert sorted(used(target)) == [ports[0], ports[2], ports[3]]
        driver.client().say(b"hi")
        with pytest.raises(OSError, match=r"(annot assign|already in use)"):
            driver.settle()
    begin(driver, target)
    begin(driver, target)
    assert set(used(target)) == set(ports)


def test_many_ports_in_a_row_that_others_have(driver: Driver) -> None:
    """They cost nobody a session."""
    _, ports = use(driver, 200)
    target = driver.target()
    begin(driver, target)
    (place,) = (ports.index(port) for port in used(target))
    with ExitStack() as stack:
        for ahead in range(1, 140):
            stack.enter_context(Peer("127.0.0.1", ports[(place + ahead) % 200]).sock)
        begin(driver, target)
        assert used(target)[1] in {ports[(place + ahead) % 200] for ahead in range(140, 200)}


def test_two_numbers_of_one_address_share_its_ports(driver: Driver) -> None:
    """As two deployments with one target have them: otherwise two clients would look alike."""
    _, (port,) = use(driver, 1)
    target = driver.target()
    first = begin(driver, target)
    driver.targets = [driver.relay.add_target(*target.where)]
    driver.client().say(b"hi")
    with pytest.raises(OSError, match="annot assign requested address"):
        driver.settle()
    target.send(b"to the first", ("127.0.0.1", port))
    driver.settle()
    assert first.data == [b"to the first"]
    # That stays so when the first number is gone, and its session is not.
    driver.relay.drop_target(target.number)
    driver.client().say(b"hi")
    with pytest.raises(OSError, match="annot assign requested address"):
        driver.settle()
    driver.relay.end_some(driver.generation, 1)
    driver.client().say(b"last")
    driver.settle()
    assert target.data[-1] == b"last"


def test_two_relays_share_the_ports_of_a_target() -> None:
    with driving() as one, driving() as two:
        ports, (port,) = use(one, 1)
        two.relay.use_ports(ports)
        target = one.target()
        client = begin(one, target)
        number = two.relay.add_target(*target.where)
        two.targets = [number]
        two.client().say(b"hi")
        with pytest.raises(OSError, match="annot assign requested address"):
            two.settle()
        target.send(b"to the first", ("127.0.0.1", port))
        one.settle()
        assert client.data == [b"to the first"]
        one.relay.close()
        two.client().say(b"second")
        two.settle()
        target.read()
        assert target.data == [b"hi", b"second"]


def test_two_proxies_do_not_share_the_ports_of_a_target() -> None:
    """Each has a choice of its own: one of two equal sockets would get the answers to both."""
    with driving() as one, driving() as two:
        _, ports = use(one, 6)
        two.relay.use_ports(SourcePorts(ports[0], ports[-1]))
        target = one.target()
        two.targets = [two.relay.add_target(*target.where)]
        clients = []
        for place, driver in enumerate((one, two, one, two, one, two)):
            clients.append(driver.client())
            clients[-1].say(b"%d" % place)
            driver.settle()
            target.read()
        assert sorted(used(target)) == list(ports)
        assert target.data == [b"%d" % place for place in range(6)]
        for datagram in target.received:
            target.send(datagram.data, datagram.source)
        one.settle()
        two.settle()
        assert [client.data for client in clients] == [[b"%d" % place] for place in range(6)]


def test_a_port_of_another_proxy_is_passed_over_for_all_targets() -> None:
    """Its owner may be about to use it for any of them."""
    with driving() as one, driving() as two:
        _, (port,) = use(one, 1)
        two.relay.use_ports(SourcePorts(port, port))
        targets, own = [one.target(), one.target()], two.target()
        begin(one, targets[0])
        two.targets = [own.number]
        two.client().say(b"hi")
        with pytest.raises(OSError, match="annot assign requested address"):
            two.settle()
        # Also while there is only a further socket of that port.
        first, one.generation = one.generation, one.relay.add_generation(60.0, 60.0)
        begin(one, targets[1])
        one.relay.end_some(first, 1)
        two.client().say(b"hi")
        with pytest.raises(OSError, match="annot assign requested address"):
            two.settle()
        one.relay.end_some(one.generation, 9)
        begin(two, own)
        assert [*map(used, targets), used(own)] == [[port]] * 3


def test_ports_that_another_proxy_has_in_a_row_are_leapt_over(driver: Driver) -> None:
    """That costs nobody a session, also where the leap ends among ports that are ours."""
    ports, every = use(driver, 300)
    ours, theirs, free = every[:150], every[150:230], every[230:]
    target = driver.target()
    with driving() as other:
        other.relay.use_ports(SourcePorts(theirs[0], theirs[-1]))
        other.targets = [other.relay.add_target(*target.where)]
        for _ in theirs:
            other.client().say(b"theirs")
            other.settle()
        target.read()
        assert sorted(used(target)) == [*theirs]
        target.received.clear()
        # Ours are all that come before theirs, and the search goes on there.
        ports.avoid(ours[-1], free[-1])
        for _ in ours[:-1]:
            begin(driver, target)
        ports.allow(ours[-1], ours[-1])
        begin(driver, target)
        ports.allow(theirs[0], free[-1])
        begin(driver, target)
        assert sorted(used(target)[:-1]) == [*ours]
        assert used(target)[-1] in free


def test_adopted_sessions_keep_and_give_back_their_ports(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    target = driver.target()
    client = begin(driver, target)
    later = driver.relay.add_generation(60.0, 60.0)
    number = driver.relay.add_target(*target.where)
    driver.relay.adopt(driver.generation, later, {target.number: number})
    driver.relay.drop_target(target.number)
    client.say(b"again")
    driver.settle()
    driver.targets = [number]
    driver.client().say(b"none left")
    with pytest.raises(OSError, match="annot assign requested address"):
        driver.settle()
    driver.relay.end_some(later, 1)
    driver.client().say(b"last")
    driver.settle()
    assert target.data == [b"hi", b"again", b"last"]
    assert used(target) == [port] * 3


def test_sessions_without_affinity_have_the_port_of_each_target(driver: Driver) -> None:
    _, (port,) = use(driver, 1)
    driver.generation = driver.relay.add_generation(60.0, 60.0, affinity=False)
    driver.decide = driver.spread
    targets = [driver.target() for _ in range(3)]
    client = driver.client()
    for _ in range(6):
        client.say(b"hi")
    driver.settle()
    assert [used(target) for target in targets] == [[port] * 2] * 3
    # A session that can't have all of them has none.
    driver.client().say(b"hi")
    with pytest.raises(OSError, match="annot assign requested address"):
        driver.settle()
    driver.relay.end_some(driver.generation, 1)
    driver.client().say(b"last")
    driver.settle()
    assert targets[1].data == [b"hi", b"hi", b"last"]  # where the second session begins


def test_sessions_from_before_keep_the_kernels_port(driver: Driver) -> None:
    target = driver.target()
    client = begin(driver, target)
    _, ports = use(driver, 3)
    begin(driver, target)
    client.say(b"still here")
    driver.settle()
    before, chosen, still = used(target)
    assert before == still
    assert before not in ports
    assert chosen in ports
    driver.relay.end_some(driver.generation, 9)


def test_the_ports_of_a_relay_do_not_change(driver: Driver) -> None:
    ports = SourcePorts(30_000, 30_001)
    driver.relay.use_ports(ports)
    driver.relay.use_ports(ports)
    with pytest.raises(ValueError, match="keeps its source ports"):
        driver.relay.use_ports(SourcePorts(30_000, 30_001))


@pytest.mark.parametrize(("low", "high"), [(0, 10), (10, 9), (1, 65536), (65536, 65537), (0, 0)])
def test_what_is_no_range(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 65535"):
        SourcePorts(low, high)


def test_strangers_can_not_speak_before_the_target(driver: Driver) -> None:
    """A port of our choice is bound before it is connected; it hears the target only."""
    _, (port,) = use(driver, 1)
    target, stranger = driver.target(), driver.reopened("127.0.0.1", 0)
    client = begin(driver, target)
    stranger.send(b"forged", ("127.0.0.1", port))
    target.send(b"true", ("127.0.0.1", port))
    driver.settle()
    assert client.data == [b"true"]
