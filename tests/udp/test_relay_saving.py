"""Sessions outlive the process: exported as records, read by `saved_sessions`, restored."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

import attrs
import pytest

from kamal_proxy._fastpath import Relay, SourcePorts
from kamal_proxy.udp.ports import listen_udp
from kamal_proxy.udp.saved_sessions import (
    ANSWERED,
    RECORD,
    SavedSession,
    ServiceSessions,
    decode,
    encode,
    parse,
)
from tests.udp.relaying import (
    Client,
    Driver,
    Target,
    driving,
    echo,
    end_of,
    free_range,
    needs_ipv6,
    open_descriptors,
    packed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = b"header "


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driving() as driver:
        yield driver


def saved(driver: Driver, *targets: Target, generation: int | None = None) -> list[SavedSession]:
    """Export, write, read and parse the sessions of a generation."""
    numbers = {target.number: place for place, target in enumerate(targets)}
    records = driver.relay.export(driver.generation if generation is None else generation, numbers)
    names = tuple(f"target-{place}:1" for place in range(len(targets)))
    service = ServiceSessions(name="game", targets=names, records=records)
    (read,) = decode(encode(time.time(), [service])).services
    return list(parse(read))


def restore(
    driver: Driver,
    session: SavedSession,
    target: int,
    *,
    header: bytes = b"",
    listener: int | None = None,
) -> None:
    driver.relay.restore(
        driver.numbers[0] if listener is None else listener,
        session.client + session.client_port.to_bytes(2),
        session.client_scope,
        session.local,
        driver.generation,
        target,
        session.source_port,
        session.answered,
        session.idle,
        header,
    )


def begin(driver: Driver, target: Target, client: Client) -> tuple[str, int]:
    """Begin a session; return what the target knows it by."""
    driver.targets = [target.number]
    client.say(b"begin")
    driver.settle()
    return target.received.pop().source


def test_what_a_record_holds(driver: Driver) -> None:
    one, two, three = (driver.target() for _ in range(3))
    first, second = driver.client("127.0.0.7", to="127.0.0.2"), driver.client()
    source = begin(driver, one, first)
    one.send(b"answer", source)
    other_source = begin(driver, two, second)
    begin(driver, three, driver.client())  # a target that is not asked for
    found = {session.client_port: session for session in saved(driver, two, one)}
    assert len(found) == 2
    session = found[first.where[1]]
    assert session == SavedSession(
        service="game",
        listener_port=driver.port,
        local=packed("127.0.0.2"),
        client=packed("127.0.0.7"),
        client_port=first.where[1],
        client_scope=0,
        target="target-1:1",
        target_address=one.where,
        target_scope=0,
        source_port=source[1],
        answered=True,
        idle=session.idle,
    )
    assert 0 <= session.idle < 60
    session = found[second.where[1]]
    assert (session.target, session.target_address) == ("target-0:1", two.where)
    assert (session.source_port, session.answered) == (other_source[1], False)
    assert session.local == packed("127.0.0.1")
    assert driver.relay.export(driver.generation, {}) == b""


@needs_ipv6
def test_what_a_record_of_ipv6_holds(driver: Driver) -> None:
    target, client = driver.target("::1"), driver.client("::1")
    source = begin(driver, target, client)
    (session,) = saved(driver, target)
    assert (session.client, session.local) == (packed("::1"), packed("::1"))
    assert session.target_address == target.where
    assert session.source_port == source[1]


def test_silence_is_recorded(driver: Driver) -> None:
    target = driver.target()
    begin(driver, target, driver.client())
    driver.wait_for(0.2)
    spoken = driver.client()
    begin(driver, target, spoken)
    idle = {session.client_port: session.idle for session in saved(driver, target)}
    recent = idle.pop(spoken.where[1])
    assert idle.popitem()[1] >= recent + 0.1


def test_which_sessions_are_exported(driver: Driver) -> None:
    target = driver.target()
    begin(driver, target, driver.client())
    other = driver.relay.add_generation(60.0, 60.0)
    assert saved(driver, target, generation=other) == []
    driver.generation = driver.relay.add_generation(60.0, 60.0, affinity=False)
    begin(driver, target, driver.client())
    assert saved(driver, target) == []
    assert driver.relay.sessions(driver.generation) == 1


def test_many_sessions_are_exported_and_restored() -> None:
    with driving("127.0.0.1", sockets=False) as driver:
        number = driver.relay.add_target("127.0.0.1", 9)
        ends = [end_of((f"10.{each >> 8}.{each & 255}.7", 1 + each)) for each in range(5000)]
        for end in ends:
            driver.relay.restore(
                0, end, 0, packed("127.0.0.1"), driver.generation, number, 0, False, 0.0
            )
        records = driver.relay.export(driver.generation, {number: 3})
        assert len(records) == 5000 * RECORD.size == 5000 * Relay.RECORD_SIZE
        found = [record[0] + record[3].to_bytes(2) for record in RECORD.iter_unpack(records)]
        assert sorted(found) == sorted(ends)
        assert {record[10] for record in RECORD.iter_unpack(records)} == {3}


def test_a_restored_session_goes_on() -> None:
    """The target and the client notice nothing: same ports, and what is sent meanwhile arrives."""
    with driving() as old, driving() as driver:
        target = old.target()
        client = old.client("127.0.0.7")
        source = begin(old, target, client)
        target.send(b"begun", source)
        old.settle()
        (session,) = saved(old, target)
        old.relay.close()
        with pytest.raises(ValueError, match="closed"):
            old.relay.run(1)
        for sock in old.listeners:
            sock.close()
        number = driver.relay.add_target(*target.where)
        listener = driver.relay.listen(again(driver, old.port))
        restore(driver, session, number, header=HEADER, listener=listener)
        client.say(b"I was there before")
        driver.settle()
        target.read()
        assert target.data == [HEADER + b"I was there before"]
        assert target.received[0].source == source
        target.send(b"so was I", source)
        driver.settle()
        client.read()
        assert client.data == [b"begun", b"so was I"]
        assert client.received[1].source == ("127.0.0.1", old.port)
        assert driver.relay.counters()["created"] == driver.relay.live == 1
        (record,) = RECORD.iter_unpack(driver.relay.export(driver.generation, {number: 0}))
        assert (record[0], record[3]) == (packed("127.0.0.7"), client.where[1])
        assert (record[6], record[11]) == (source[1], ANSWERED)


def again(driver: Driver, port: int) -> int:
    """Bind a port that was just given up; the driver closes it."""
    (sock,) = listen_udp([], port)
    driver.listeners.append(sock)
    return sock.fileno()


def test_an_unanswered_session_is_restored_as_such(driver: Driver) -> None:
    target = driver.target()
    begin(driver, target, driver.client())
    (session,) = saved(driver, target)
    driver.relay.end_some(driver.generation, 1)
    restore(driver, session, target.number)
    (restored,) = saved(driver, target)
    assert not restored.answered
    assert restored.source_port == session.source_port
    target.send(b"answer", ("127.0.0.1", restored.source_port))
    driver.settle()
    (restored,) = saved(driver, target)
    assert restored.answered


def test_a_taken_port_leaves_nothing_behind(driver: Driver) -> None:
    target = driver.target()
    client = driver.client()
    source = begin(driver, target, client)
    (session,) = saved(driver, target)
    driver.relay.end_some(driver.generation, 1)
    holder = driver.reopened("127.0.0.1", source[1])
    before = (open_descriptors(), driver.relay.changes)
    with pytest.raises(OSError, match="already in use") as caught:
        restore(driver, session, target.number, header=HEADER)
    assert caught.value.errno == errno.EADDRINUSE
    assert (open_descriptors(), driver.relay.changes) == before
    assert driver.relay.live == driver.relay.sessions(driver.generation) == 0
    # The client begins anew, with another port.
    assert begin(driver, target, client) != source
    driver.relay.end_some(driver.generation, 1)
    driver.shut(holder)
    restore(driver, session, target.number)
    assert driver.relay.live == 1
    # Nothing holds the target but its sessions.
    driver.relay.end_some(driver.generation, 1)
    driver.relay.drop_target(target.number)
    assert driver.relay.add_target("127.0.0.1", 9) == target.number


def test_a_session_is_restored_once(driver: Driver) -> None:
    target = driver.target()
    target.answer = echo
    client = driver.client()
    begin(driver, target, client)
    (session,) = saved(driver, target)
    with pytest.raises(ValueError, match="such a session already"):
        restore(driver, session, target.number)
    assert driver.relay.live == 1
    driver.relay.end_some(driver.generation, 1)
    restore(driver, session, target.number)
    with pytest.raises(ValueError, match="such a session already"):
        restore(driver, session, target.number)
    client.say(b"again")
    driver.pump(lambda: b"again" in client.data)


def test_restoring_with_ports_of_our_choice(driver: Driver) -> None:
    low, high = free_range(2)
    driver.relay.use_ports(SourcePorts(low, high))
    target, other = driver.target(), driver.target()
    clients = [driver.client() for _ in range(2)]
    sources = [begin(driver, target, client) for client in clients]
    sessions = {session.client_port: session for session in saved(driver, target)}
    driver.relay.end_some(driver.generation, 2)
    restore(driver, sessions[clients[0].where[1]], target.number)
    # The port of the other is free, but this one's is not, whoever asks for it.
    taken = attrs.evolve(sessions[clients[1].where[1]], source_port=sources[0][1])
    for number in (target.number, driver.relay.add_target(*target.where)):
        with pytest.raises(OSError, match="already in use"):
            restore(driver, taken, number)
    restore(driver, taken, other.number)
    assert driver.relay.live == 2
    for client, at in zip(clients, (target, other), strict=True):
        client.say(b"again")
        driver.pump(lambda at=at: at.received)  # type: ignore[misc]
        assert at.received.pop().source == sources[0]
    # A newcomer gets the port that is left, and it is the last.
    assert begin(driver, target, driver.client()) == sources[1]
    driver.targets = [target.number]
    driver.client().say(b"hi")
    with pytest.raises(OSError, match="annot assign requested address"):
        driver.settle()


def test_a_restored_session_hears_no_stranger(driver: Driver) -> None:
    target, stranger = driver.target(), driver.reopened("127.0.0.1", 0)
    client = driver.client()
    source = begin(driver, target, client)
    (session,) = saved(driver, target)
    driver.relay.end_some(driver.generation, 1)
    restore(driver, session, target.number)
    stranger.send(b"forged", source)
    target.send(b"true", source)
    driver.settle()
    assert client.data == [b"true"]
