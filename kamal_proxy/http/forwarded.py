"""Which addresses a request passed through, and which of them is the client's. Pure.

The Forwarded field (RFC 7239), read and written, and the walk back through what proxies told, in
Forwarded or X-Forwarded-For. Whether a peer is believed at all is decided by the caller.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

from kamal_proxy.networks import parse_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kamal_proxy.networks import Networks

# No request passes through so many proxies; more can only be meant to cost time.
MAX_ELEMENTS: Final = 100

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_PAIR = re.compile(
    rb"(?P<name>%b)=(?:(?P<token>%b)"
    # RFC 9110 5.6.4
    rb'|"(?P<quoted>(?:[\t \x21\x23-\x5B\x5D-\x7E\x80-\xFF]|\\[\t \x21-\x7E\x80-\xFF])*+)")'
    % (_TOKEN, _TOKEN)
)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_ONLY_TOKEN = re.compile(_TOKEN)
_QUOTABLE = re.compile(rb"[\t \x21-\x7E\x80-\xFF]++")
_TO_ESCAPE = re.compile(rb'["\\]')
# RFC 7239 6, and IPv6 without brackets, which X-Forwarded-For has where no port is told.
_NODE = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]{2,45})\]|(?P<ipv4>[0-9.]{7,15}))"
    r"(?::(?:[0-9]{1,5}|_[A-Za-z0-9._\-]{1,64}))?"
    r"|(?P<bare>[0-9A-Fa-f:.]{2,45})"
)
_OBFUSCATED = re.compile(r"_[A-Za-z0-9._\-]+")


@attrs.frozen
class Element:
    """What one proxy told of the request that it got; texts as they came, empty when missing.

    Attributes:
        for_: Who sent the request: an address with or without port, ``unknown`` or ``_name``.
        by: Where the proxy got it, in the same form.
        host: The Host field that came with it.
        proto: The scheme, ``http`` or ``https``.
    """

    for_: str = ""
    by: str = ""
    host: str = ""
    proto: str = ""

    @property
    def address(self) -> str:
        """The address in :attr:`for_`, without brackets and port; empty if it names none."""
        return node_address(self.for_)


def parse_untrusted(value: bytes) -> list[Element] | None:
    """Parse the value of a Forwarded field (RFC 7239 4).

    Spaces around semicolons are accepted, which the grammar has no place for but senders use.
    Empty elements of the list are left out (RFC 9110 5.6.1), unknown parameters too.

    Returns:
        The elements, the nearest proxy's last; None if the value is malformed or has more than
        ``MAX_ELEMENTS`` of them.
    """
    elements: list[Element] = []
    pairs: dict[bytes, str] = {}
    is_begun = False  # an element may have no pair, but then has a semicolon
    needs_mark = False
    position = 0
    while True:
        while (mark := value[position : position + 1]) in (b" ", b"\t"):
            position += 1
        if mark in (b"", b","):
            if is_begun and len(elements) == MAX_ELEMENTS:
                return None
            if is_begun:
                elements.append(_element(pairs))
            if not mark:
                return elements
            pairs, is_begun = {}, False
        elif mark == b";":
            is_begun = True
        else:
            pair = _PAIR.match(value, position)
            # RFC 7239 4: no parameter twice
            if pair is None or needs_mark or pair["name"].lower() in pairs:
                return None
            pairs[pair["name"].lower()] = _text(pair)
            position = pair.end()
            is_begun = needs_mark = True
            continue
        needs_mark = False
        position += 1


def believable_untrusted(values: Sequence[bytes]) -> list[bytes]:
    """Return the Forwarded fields of a request that can be believed, oldest first.

    A field that is malformed hides itself and those before it, but not the ones that nearer
    proxies added.
    """
    kept: list[bytes] = []
    for value in reversed(values):
        if parse_untrusted(value) is None:
            break
        kept.append(value)
    return kept[::-1]


def _text(pair: re.Match[bytes]) -> str:
    quoted: bytes | None = pair["quoted"]
    value = pair["token"] if quoted is None else _ESCAPED.sub(rb"\1", quoted)
    return value.decode("latin-1")


def _element(pairs: dict[bytes, str]) -> Element:
    return Element(*(pairs.get(name, "") for name in (b"for", b"by", b"host", b"proto")))


def element(for_: bytes | str, host: bytes, proto: str) -> bytes:
    """Write an element of a Forwarded field (RFC 7239 4).

    Args:
        for_: Address of the client, without port, or ``_name``; anything else is ``unknown``.
        host: Host of the request; left out when empty or not writable (it has a control character).
        proto: Scheme of the request; likewise.
    """
    text = for_ if isinstance(for_, str) else for_.decode("latin-1")
    pairs = [b"for=" + _node(text)]
    for name, value in ((b"host=", host), (b"proto=", proto.encode("latin-1", "replace"))):
        if _ONLY_TOKEN.fullmatch(value):
            pairs.append(name + value)
        elif _QUOTABLE.fullmatch(value):
            pairs.append(name + b'"' + _TO_ESCAPE.sub(rb"\\\g<0>", value) + b'"')
    return b";".join(pairs)


def _node(text: str) -> bytes:
    address = parse_address(text)
    if address is None:
        return text.encode() if _OBFUSCATED.fullmatch(text) else b"unknown"
    if address.version == 4:
        return str(address).encode()
    return b'"[%b]"' % str(address).partition("%")[0].encode()


def node_address(node: str) -> str:
    """Return the address that an entry of X-Forwarded-For, or a node of Forwarded, names.

    Args:
        node: ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1``, ``[2001:db8::1]`` or
            ``[2001:db8::1]:80``.

    Returns:
        The address in its shortest form (RFC 5952), IPv4 in IPv6 as IPv4; empty if it names none.
    """
    found = _NODE.fullmatch(node)
    if found is None:
        return ""
    text = found["ipv6"] or found["ipv4"] or found["bare"]
    if found["ipv6"] and ":" not in text:
        return ""
    address = parse_address(text)
    return "" if address is None else str(address)


def nearest_untrusted(chain: Sequence[str], trusted: Networks, peer: str) -> str:
    """Choose the client's address: the nearest one whose word for what lies before is not taken.

    Each address was told by the one after it, and the last by the peer. So the walk goes from the
    peer to the left, for as long as the addresses are trusted ones.

    Args:
        chain: The entries of X-Forwarded-For, or what ``for`` names in the elements of Forwarded,
            the nearest last.
        trusted: The networks of the proxies that are believed.
        peer: Address of the peer; empty for one that has none, which is not trusted.

    Returns:
        The first address that is not trusted, or the farthest when all are. The walk ends before
        an entry that names no address, and after ``MAX_ELEMENTS`` entries.
    """
    nearest = peer
    for entry in chain[: -MAX_ELEMENTS - 1 : -1]:
        if nearest not in trusted:
            break
        address = node_address(entry)
        if not address:
            break
        nearest = address
    return nearest
