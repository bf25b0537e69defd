"""The document of the saved sessions: round trips, limits, and any damage that a file can have."""

from __future__ import annotations

import math
import re
import struct
import zlib
from ipaddress import ip_address
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.udp import saved_sessions
from kamal_proxy.udp.saved_sessions import (
    MAGIC,
    RECORD,
    SavedSession,
    ServiceSessions,
    SessionsDocument,
    SessionsFormatError,
    decode,
    encode,
    parse,
)
from tests.fuzzing import at_least

if TYPE_CHECKING:
    from collections.abc import Iterable

NOW = 1_790_000_000.25


def sixteen(address: str) -> bytes:
    parsed = ip_address(address)
    number = int(parsed) if parsed.version == 6 else 0xFFFF_0000_0000 | int(parsed)
    return number.to_bytes(16, "big")


def pack(sessions: Iterable[SavedSession], targets: tuple[str, ...]) -> bytes:
    """Write records as the relay does, obviously."""
    return b"".join(
        session.client
        + session.local
        + sixteen(session.target_address[0])
        + session.client_port.to_bytes(2, "little")
        + session.listener_port.to_bytes(2, "little")
        + session.target_address[1].to_bytes(2, "little")
        + session.source_port.to_bytes(2, "little")
        + session.client_scope.to_bytes(4, "little")
        + session.target_scope.to_bytes(4, "little")
        + round(session.idle * 1000).to_bytes(4, "little")
        + targets.index(session.target).to_bytes(2, "little")
        + bytes([session.answered])
        + b"\0"
        for session in sessions
    )


def packed(
    name: str, sessions: Iterable[SavedSession], targets: tuple[str, ...] = ("game-1:9999",)
) -> ServiceSessions:
    return ServiceSessions(name=name, targets=targets, records=pack(sessions, targets))


PLAYER = SavedSession(
    service="game",
    listener_port=9999,
    local=sixteen("192.0.2.1"),
    client=sixteen("198.51.100.7"),
    client_port=40_001,
    client_scope=0,
    target="game-2:9999",
    target_address=("10.0.0.2", 9999),
    target_scope=0,
    source_port=33_001,
    answered=True,
    idle=1.25,
)
NEIGHBOUR = SavedSession(
    service="game",
    listener_port=9998,
    local=sixteen("fe80::1"),
    client=sixteen("fe80::7"),
    client_port=65_535,
    client_scope=3,
    target="game-1:9999",
    target_address=("fe80::2", 9999),
    target_scope=2**32 - 1,
    source_port=1,
    answered=False,
    idle=(2**32 - 1) / 1000,
)
TARGETS = ("game-1:9999", "game-2:9999")
GAME = packed("game", [PLAYER, NEIGHBOUR], TARGETS)
VOICE = ServiceSessions(name="voice", targets=("[::1]:64738",), records=b"")
SAMPLE = encode(NOW, [GAME, VOICE])


def sealed(body: bytes) -> bytes:
    """Return a document of any content whose checksum is right."""
    return body + struct.pack("<I", zlib.crc32(body))


def test_what_is_saved_is_read_again() -> None:
    document = decode(SAMPLE)
    assert document == SessionsDocument(saved_at=NOW, services=(GAME, VOICE))
    assert list(parse(document.services[0])) == [PLAYER, NEIGHBOUR]
    assert list(parse(document.services[1])) == []


def test_a_record_has_the_layout_that_the_relay_writes() -> None:
    assert RECORD.size == 72
    assert GAME.records[:72].hex(" ", 4) == (
        "00000000 00000000 0000ffff c6336407 "  # client
        "00000000 00000000 0000ffff c0000201 "  # local
        "00000000 00000000 0000ffff 0a000002 "  # target
        "419c0f27 0f27e980 "  # ports of client, listener, target, source
        "00000000 00000000 e2040000 "  # scopes of client and target, 1250 ms
        "01000100"  # target 1, answered
    )


def test_the_document_has_the_layout_that_the_page_tells() -> None:
    expected = sealed(
        b"kamal-proxy UDP sessions\n"
        + struct.pack("<HHd", 1, 2, NOW)
        + b"\x04\0game\x02\0\x0b\0game-1:9999\x0b\0game-2:9999\x02\0\0\0"
        + GAME.records
        + b"\x05\0voice\x01\0\x0b\0[::1]:64738\0\0\0\0"
    )
    assert expected == SAMPLE


def test_no_sessions_is_a_document() -> None:
    assert decode(encode(0, [])) == SessionsDocument(saved_at=0, services=())
    assert decode(encode(0, iter([VOICE]))).services == (VOICE,)


def test_every_session_of_a_large_service_is_there() -> None:
    sessions = [
        attrs.evolve(PLAYER, client_port=number & 0xFFFF, source_port=number % 60_000 + 1)
        for number in range(70_000)
    ]
    (service,) = decode(encode(NOW, [packed("game", sessions, TARGETS)])).services
    assert list(parse(service)) == sessions


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (sixteen("10.0.0.2"), "10.0.0.2"),
        (sixteen("2001:db8::2"), "2001:db8::2"),
        (bytes(16), "::"),
        (bytes(12) + b"\x0a\0\0\x02", "::a00:2"),  # not IPv4-mapped
    ],
)
def test_the_targets_address_is_text(address: bytes, text: str) -> None:
    records = GAME.records[:32] + address + GAME.records[48:72]
    (session,) = parse(attrs.evolve(GAME, records=records))
    assert session.target_address == (text, 9999)


def test_what_is_many_is_not_shown() -> None:
    assert str(GAME) == (
        "ServiceSessions(name='game', targets=('game-1:9999', 'game-2:9999'), records=<144 bytes>)"
    )


# What is no document


def body(*, version: int = 1, count: int = 0, saved_at: float = NOW, rest: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<HHd", version, count, saved_at) + rest


def service(name: bytes, records: bytes = b"", *, count: int | None = None) -> bytes:
    """Return a service with one target."""
    number = len(records) // 72 if count is None else count
    return (
        len(name).to_bytes(2, "little")
        + name
        + b"\x01\0\x01\0t"
        + number.to_bytes(4, "little")
        + records
    )


def record(**changes: int) -> bytes:
    fields = {
        "client_port": 1,
        "listener_port": 1,
        "target_port": 1,
        "source_port": 1,
        "client_scope": 0,
        "target_scope": 0,
        "idle": 0,
        "target": 0,
        "flags": 0,
        "reserved": 0,
    }
    assert not set(changes) - set(fields)
    return RECORD.pack(bytes(16), bytes(16), bytes(16), *(fields | changes).values())


WRONG = [
    (b"", "it does not begin as saved UDP sessions do"),
    (b"[]\n", "it does not begin as saved UDP sessions do"),
    (MAGIC[:-1], "it does not begin as saved UDP sessions do"),
    (MAGIC, "it is cut short"),
    (sealed(body())[:-1], "it is cut short"),
    (sealed(body(version=2)), "it has version 2, and only 1 can be read"),
    (sealed(body())[:-1] + b"\xff", "its checksum is wrong: it is damaged or cut short"),
    (SAMPLE[:-1], "its checksum is wrong"),
    (SAMPLE + b"\0", "its checksum is wrong"),
    (sealed(body(saved_at=math.nan)), "nan is no time at which it can have been saved"),
    (sealed(body(saved_at=math.inf)), "inf is no time"),
    (sealed(body(saved_at=-1.0)), "-1.0 is no time"),
    (sealed(body(rest=b"abc")), "3 bytes follow the last service"),
    (sealed(body(count=1)), "it ends inside a service"),
    (sealed(body(count=2, rest=service(b"a"))), "it ends inside a service"),
    (sealed(body(count=1, rest=service(b"a")[:-1])), "it ends inside a service"),
    (sealed(body(count=1, rest=b"\xff\xffa")), "it ends inside a service"),
    (sealed(body(count=1, rest=b"\x01\0a\xff\xff")), "it ends inside a service"),
    (sealed(body(count=1, rest=service(b"a", record(), count=2))), "it ends inside a service"),
    (sealed(body(count=1, rest=service(b"a", count=2**32 - 1))), "it ends inside a service"),
    (sealed(body(count=1, rest=service(b"a", bytes(71), count=1))), "it ends inside a service"),
    (sealed(body(count=1, rest=service(b"a", bytes(73)))), "1 bytes follow the last service"),
    (sealed(body(count=1, rest=service(b"\xff"))), "a name in it is not UTF-8"),
    (sealed(body(count=2, rest=service(b"a") * 2)), "service 'a' occurs twice"),
    (
        sealed(body(count=1, rest=service(b"a", record() + record(listener_port=0)))),
        "service 'a': session 2 has a port 0",
    ),
    (sealed(body(count=1, rest=service(b"a", record(target_port=0)))), "has a port 0"),
    (sealed(body(count=1, rest=service(b"a", record(source_port=0)))), "has a port 0"),
    (
        sealed(body(count=1, rest=service(b"a", record(target=1)))),
        "service 'a': session 1 has target 1 of 1, counted from 0",
    ),
    (sealed(body(count=1, rest=service(b"a", record(flags=4)))), "has unknown flags"),
    (sealed(body(count=1, rest=service(b"a", record(reserved=1)))), "has unknown flags"),
]


@pytest.mark.parametrize(("content", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_document_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(SessionsFormatError, match=re.escape(reason)):
        decode(content)


def test_the_builders_above_make_documents() -> None:
    """Otherwise the refusals above could have other reasons than they say."""
    content = sealed(body(count=2, rest=service(b"a", record(client_port=0)) + service(b"b")))
    first, second = decode(content).services
    (session,) = parse(first)
    assert (session.service, session.client_port, session.target) == ("a", 0, "t")
    assert second == ServiceSessions(name="b", targets=("t",), records=b"")


def test_an_absurd_size_is_neither_read_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_sessions, "MAX_SIZE", len(SAMPLE))
    assert encode(NOW, [GAME, VOICE]) == SAMPLE
    assert decode(SAMPLE)
    with pytest.raises(SessionsFormatError, match=f"larger than {len(SAMPLE)} bytes"):
        decode(SAMPLE + b"\0")
    longer = attrs.evolve(VOICE, name="voices")
    with pytest.raises(SessionsFormatError, match=f"{len(SAMPLE) + 1} bytes are more than"):
        encode(NOW, [GAME, longer])


def test_a_document_cut_anywhere_is_refused() -> None:
    for length in range(len(SAMPLE)):
        with pytest.raises(SessionsFormatError):
            decode(SAMPLE[:length])


def test_a_changed_bit_anywhere_is_found() -> None:
    for bit in range(8 * len(SAMPLE)):
        changed = bytearray(SAMPLE)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SessionsFormatError):
            decode(bytes(changed))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (bytes(71), "service 'a': 71 bytes are not whole records of 72 bytes"),
        (record(target=1), "service 'a': session 1 has target 1 of 1"),
    ],
)
def test_records_that_are_none_are_refused_before_the_first(records: bytes, reason: str) -> None:
    with pytest.raises(SessionsFormatError, match=reason):
        parse(ServiceSessions(name="a", targets=("t",), records=records))


# What must not be written


EMPTY = ServiceSessions(name="a", targets=(), records=b"")


@pytest.mark.parametrize(
    ("saved_at", "services", "reason"),
    [
        (math.nan, [], "nan is no time"),
        (-0.5, [], "-0.5 is no time"),
        (NOW, [EMPTY, EMPTY], "service 'a' occurs twice"),
        (NOW, [attrs.evolve(EMPTY, records=bytes(73))], "'a': 73 bytes are not whole records"),
        (NOW, [attrs.evolve(EMPTY, name="a\ud800")], r"'a\ud800' can't be written as UTF-8"),
        (NOW, [attrs.evolve(EMPTY, targets=("\udfff",))], r"'\udfff' can't be written"),
        (NOW, [attrs.evolve(EMPTY, name="é" * 40_000)], "80000 bytes of a name are more than"),
        (NOW, [attrs.evolve(EMPTY, targets=("t",) * 65_536)], "65536 targets are more than 65535"),
        (NOW, [attrs.evolve(EMPTY, name=str(n)) for n in range(65_536)], "65536 services are more"),
    ],
    ids=range(9),
)
def test_what_could_not_be_read_again_is_not_written(
    saved_at: float, services: list[ServiceSessions], reason: str
) -> None:
    with pytest.raises(SessionsFormatError, match=re.escape(reason)):
        encode(saved_at, services)


# Anything

names = st.text(max_size=12)


def possible(noise: bytes) -> bytes:
    """Make a record of 72 bytes: no port 0 where there can't be one, one of 3 targets, a flag."""
    values = list(RECORD.unpack(noise))
    if noise[0] < 128:
        values[2] = sixteen("0.0.0.0")[:12] + values[2][12:]
    values[4:7] = [port or 1 for port in values[4:7]]
    values[10:] = [values[10] % 3, values[11] % 2, 0]
    return RECORD.pack(*values)


whole_records = st.binary(min_size=72, max_size=72).map(possible)
some_services = st.lists(
    st.builds(
        ServiceSessions,
        name=names,
        targets=st.lists(names, min_size=3, max_size=5, unique=True).map(tuple),
        records=st.lists(whole_records, max_size=3).map(b"".join),
    ),
    max_size=4,
    unique_by=lambda service: service.name,
)
times = st.floats(min_value=0, allow_infinity=False, allow_nan=False)


@pytest.mark.fuzz
@at_least(100)
@given(times, some_services)
def test_every_document_survives(saved_at: float, services: list[ServiceSessions]) -> None:
    document = decode(encode(saved_at, services))
    assert document == SessionsDocument(saved_at=saved_at, services=tuple(services))
    for service in document.services:
        sessions = list(parse(service))
        assert pack(sessions, service.targets) == service.records
        assert {session.service for session in sessions} <= {service.name}


def checked(content: bytes) -> None:
    """Read anything: it is refused, or every session of it can be had and written again."""
    try:
        document = decode(content)
    except SessionsFormatError:
        return
    for service in document.services:
        assert len(list(parse(service))) * RECORD.size == len(service.records)
    assert encode(document.saved_at, document.services) == content


@pytest.mark.fuzz
@at_least(200)
@given(st.binary(max_size=300))
def test_noise_is_refused_or_can_be_written_again(content: bytes) -> None:
    checked(content)
    checked(sealed(MAGIC + content))
    # With few services, names are reached.
    checked(sealed(body(count=len(content) % 4, rest=content)))


edits = st.lists(
    st.tuples(st.integers(0, len(SAMPLE)), st.integers(0, 80), st.binary(max_size=80)), max_size=4
)


@pytest.mark.fuzz
@at_least(300)
@given(edits, st.booleans())
def test_a_mutated_document_is_refused_or_can_be_written_again(
    edits: list[tuple[int, int, bytes]], seal: bool
) -> None:
    content = bytearray(SAMPLE[:-4])
    for at, gone, new in edits:
        content[at : at + gone] = new
    checked(sealed(bytes(content)) if seal else bytes(content) + SAMPLE[-4:])


@pytest.mark.fuzz
@at_least(100)
@given(st.integers(0, 4), st.binary(max_size=72 * 3 + 1))
def test_any_records_are_refused_or_parsed(targets: int, records: bytes) -> None:
    table = tuple(map(str, range(targets)))
    try:
        sessions = list(parse(ServiceSessions(name="a", targets=table, records=records)))
    except SessionsFormatError:
        return
    assert pack(sessions, table) == records
