"""The sessions of all UDP services as one binary document, which a restarted proxy reads again.

Pure: bytes to values and back, no files (``session_store.py`` has those) and no clock. The relay
packs and unpacks the records itself, because there may be tens of thousands; ``RECORD`` is their
layout, docs/state.md the whole document's. Nothing here decides which sessions are restored.
"""

from __future__ import annotations

import math
import struct
import zlib
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAGIC = b"kamal-proxy UDP sessions\n"
VERSION = 1
MAX_SIZE = 256 * 1024 * 1024  # the largest limit of one service, a million sessions, is 69 MiB

# client, local, target (16 bytes each, IPv4 as ::ffff:a.b.c.d); the ports of client, listener and
# target, and the upstream socket's own; the scopes of client and target; milliseconds without a
# datagram; the target's number in its service's table; flags; a byte that is zero.
RECORD = struct.Struct("<16s16s16sHHHHIIIHBB")
ANSWERED = 1
"""The flag of a session whose target has sent something."""
SECOND = 2
"""The flag of the other half, of a pair of ports, of the session in the record before."""

_START = struct.Struct("<HHd")  # version, number of services, when it was saved
_LENGTH = struct.Struct("<H")  # of a text, or of the table of targets
_RECORDS = struct.Struct("<I")  # number of records
_CHECKSUM = struct.Struct("<I")  # CRC-32 of all before it
_SMALLEST = len(MAGIC) + _START.size + _CHECKSUM.size
_MAX_COUNT = 0xFFFF


class SessionsFormatError(Exception):
    """Bytes are not a document of sessions; the text says why, without a file name."""


@attrs.frozen(kw_only=True)
class ServiceSessions:
    """The sessions of one service, packed.

    Attributes:
        name: The service.
        targets: ``host:port`` of each target as configured; records name them by their place.
        records: Whole records of ``RECORD``'s layout, one after the other.
    """

    name: str
    targets: tuple[str, ...]
    records: bytes = attrs.field(repr=lambda records: f"<{len(records)} bytes>")


@attrs.frozen(kw_only=True)
class SessionsDocument:
    """What was read again.

    Attributes:
        saved_at: When it was saved, in seconds since 1970.
        services: The services in the document's order; every record can be parsed.
    """

    saved_at: float
    services: tuple[ServiceSessions, ...]


@attrs.frozen(kw_only=True)
class SavedSession:
    """One session as it was saved. Addresses of 16 bytes have IPv4 as ``::ffff:a.b.c.d``.

    Attributes:
        service: Name of its service.
        listener_port: Port that the client sends to.
        local: Address that the client sends to, 16 bytes.
        client: Address of the client, 16 bytes.
        client_port: Port of the client.
        client_scope: Number of the interface of a link-local client (RFC 4007), otherwise 0.
        target: ``host:port`` of its target, as configured.
        target_address: Address and port that this was resolved to.
        target_scope: Number of the interface of a link-local target, otherwise 0.
        source_port: Port of ours that the target sees.
        answered: Whether the target has sent something.
        idle: Seconds without a datagram in either direction when it was saved.
        second: Whether it is the other half, of a pair of ports, of the session before.
    """

    service: str
    listener_port: int
    local: bytes
    client: bytes
    client_port: int
    client_scope: int
    target: str
    target_address: tuple[str, int]
    target_scope: int
    source_port: int
    answered: bool
    idle: float
    second: bool = False


def encode(saved_at: float, services: Iterable[ServiceSessions]) -> bytes:
    """Write the sessions of all services; what the records hold is not looked at.

    Args:
        saved_at: Now, in seconds since 1970.
        services: The services, each name once.

    Raises:
        SessionsFormatError: the result could not be read again; it must not be saved.
    """
    parts: list[bytes] = []
    names: set[str] = set()
    for service in services:
        if service.name in names:
            raise SessionsFormatError(f"service '{service.name}' occurs twice")
        names.add(service.name)
        count, rest = divmod(len(service.records), RECORD.size)
        if rest:
            raise SessionsFormatError(
                f"service '{service.name}': {len(service.records)} bytes are not whole records "
                f"of {RECORD.size} bytes"
            )
        parts.append(_encode_text(service.name))
        parts.append(_encode_count(len(service.targets), "targets"))
        parts.extend(map(_encode_text, service.targets))
        parts.append(_RECORDS.pack(count))
        parts.append(service.records)
    _require_time(saved_at)
    _encode_count(len(names), "services")
    parts[:0] = [MAGIC, _START.pack(VERSION, len(names), saved_at)]
    size = sum(map(len, parts)) + _CHECKSUM.size
    if size > MAX_SIZE:
        raise SessionsFormatError(f"its {size} bytes are more than {MAX_SIZE}")
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    parts.append(_CHECKSUM.pack(checksum))
    return b"".join(parts)


def decode(content: bytes) -> SessionsDocument:
    """Read a document that :func:`encode` wrote.

    Raises:
        SessionsFormatError: it is none, of another version, damaged or cut short, or it holds a
            record that no session can have.
    """
    if len(content) > MAX_SIZE:
        raise SessionsFormatError(f"it is larger than {MAX_SIZE} bytes")
    if not content.startswith(MAGIC):
        raise SessionsFormatError("it does not begin as saved UDP sessions do")
    if len(content) < _SMALLEST:
        raise SessionsFormatError("it is cut short")
    version, count, saved_at = _START.unpack_from(content, len(MAGIC))
    if version != VERSION:
        raise SessionsFormatError(f"it has version {version}, and only {VERSION} can be read")
    end = len(content) - _CHECKSUM.size
    if _CHECKSUM.unpack_from(content, end) != (zlib.crc32(memoryview(content)[:end]),):
        raise SessionsFormatError("its checksum is wrong: it is damaged or cut short")
    _require_time(saved_at)
    reader = _Reader(content, len(MAGIC) + _START.size, end)
    services = tuple(_decode_service(reader) for _ in range(count))
    if reader.left:
        raise SessionsFormatError(f"{reader.left} bytes follow the last service")
    names: set[str] = set()
    for service in services:
        if service.name in names:
            raise SessionsFormatError(f"service '{service.name}' occurs twice")
        names.add(service.name)
        _check_records(service)
    return SessionsDocument(saved_at=saved_at, services=services)


def parse(service: ServiceSessions) -> Iterator[SavedSession]:
    """Yield the sessions of one service, in the order of its records.

    Raises:
        SessionsFormatError: the records are not those of sessions. It is raised before the first
            session, and never for what :func:`decode` returned.
    """
    _check_records(service)
    return _parse(service)


def _parse(service: ServiceSessions) -> Iterator[SavedSession]:
    texts: dict[bytes, str] = {}  # a few targets have many sessions, and text is slow to make
    for record in RECORD.iter_unpack(service.records):
        client, local, address, client_port, listener_port, target_port, source_port = record[:7]
        client_scope, target_scope, idle, target, flags, _ = record[7:]
        text = texts.get(address)
        if text is None:
            text = texts[address] = _address_text(address)
        yield SavedSession(
            service=service.name,
            listener_port=listener_port,
            local=local,
            client=client,
            client_port=client_port,
            client_scope=client_scope,
            target=service.targets[target],
            target_address=(text, target_port),
            target_scope=target_scope,
            source_port=source_port,
            answered=bool(flags & ANSWERED),
            idle=idle / 1000,
            second=bool(flags & SECOND),
        )


def _check_records(service: ServiceSessions) -> None:
    where = f"service '{service.name}'"
    if len(service.records) % RECORD.size:
        raise SessionsFormatError(
            f"{where}: {len(service.records)} bytes are not whole records of {RECORD.size} bytes"
        )
    targets = len(service.targets)
    for number, record in enumerate(RECORD.iter_unpack(service.records), 1):
        listener_port, target_port, source_port = record[4:7]
        target, flags, reserved = record[10:]
        if not (listener_port and target_port and source_port):
            raise SessionsFormatError(f"{where}: session {number} has a port 0")
        if target >= targets:
            raise SessionsFormatError(
                f"{where}: session {number} has target {target} of {targets}, counted from 0"
            )
        if flags & ~(ANSWERED | SECOND) or reserved:
            raise SessionsFormatError(f"{where}: session {number} has unknown flags")


def _address_text(address: bytes) -> str:
    ipv6 = IPv6Address(address)
    return str(ipv6.ipv4_mapped or ipv6)


def _require_time(saved_at: float) -> None:
    if not (math.isfinite(saved_at) and saved_at >= 0):
        raise SessionsFormatError(f"{saved_at} is no time at which it can have been saved")


def _encode_count(count: int, of: str) -> bytes:
    if count > _MAX_COUNT:
        raise SessionsFormatError(f"{count} {of} are more than {_MAX_COUNT}")
    return _LENGTH.pack(count)


def _encode_text(text: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise SessionsFormatError(f"{text!a} can't be written as UTF-8") from error
    return _encode_count(len(encoded), "bytes of a name") + encoded


class _Reader:
    """Takes a document apart from front to back; nothing is read behind its end."""

    def __init__(self, content: bytes, at: int, end: int) -> None:
        self._content = content
        self._at = at
        self._end = end

    @property
    def left(self) -> int:
        return self._end - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise SessionsFormatError("it ends inside a service")
        at = self._at
        self._at += size
        return self._content[at : self._at]

    def number(self, layout: struct.Struct) -> int:
        number: int = layout.unpack(self.take(layout.size))[0]
        return number

    def text(self) -> str:
        try:
            return self.take(self.number(_LENGTH)).decode()
        except UnicodeDecodeError as error:
            raise SessionsFormatError("a name in it is not UTF-8") from error


def _decode_service(reader: _Reader) -> ServiceSessions:
    name = reader.text()
    targets = tuple(reader.text() for _ in range(reader.number(_LENGTH)))
    records = reader.take(reader.number(_RECORDS) * RECORD.size)
    return ServiceSessions(name=name, targets=targets, records=records)
