"""Networks that the operator named, and whether a peer's address is in one of them. Pure.

Addresses are asked for as the texts that sockets and header fields have them in. An IPv4 address
written in IPv6 (``::ffff:192.0.2.1``, RFC 4291 2.5.5.2) is the IPv4 address everywhere here.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_TEXT = 64  # the longest address has 45 characters, the name of an interface 15
_MAX_ANSWERS = 1024  # strangers choose the addresses
_MAPPED = range(0xFFFF_0000_0000, 0x1_0000_0000_0000)  # ::ffff:0:0/96


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse the text of an address, or return None if it is none.

    IPv4 in IPv6 becomes IPv4; a scope (``fe80::1%eth0``, RFC 4007 11) stays with the address.
    """
    if len(text) > _MAX_TEXT:
        return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if address.version == 6 and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class Networks:
    """A set of networks. It is true if it has any.

    Args:
        texts: Networks and single addresses, as ``run_options.py`` allows them: ``192.0.2.0/24``,
            ``2001:db8::/32``, ``10.1.2.3``.

    Raises:
        ValueError: a text is no network.
    """

    __slots__ = ("_answers", "_prefixes")

    def __init__(self, texts: Iterable[str]) -> None:
        # By version: for each mask the networks that have it, so that many cost as one.
        self._prefixes: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        self._answers: dict[str, bool] = {}
        for text in texts:
            network = ip_network(text)
            version, mask = network.version, int(network.netmask)
            first = int(network.network_address)
            if version == 6 and first in _MAPPED:  # whose prefix has 96 bits or more
                version, mask, first = 4, mask & 0xFFFFFFFF, first & 0xFFFFFFFF
            self._prefixes[version].setdefault(mask, set()).add(first)

    def __bool__(self) -> bool:
        return any(self._prefixes.values())

    def __contains__(self, address: str) -> bool:
        """Return whether an address is in one of the networks; what is no address is in none.

        A scope (``fe80::1%eth0``) says which link, not which address, and does not count.
        """
        answer = self._answers.get(address)
        if answer is None:
            answer = self._has(address)
            if len(address) <= _MAX_TEXT:
                if len(self._answers) >= _MAX_ANSWERS:
                    self._answers.clear()
                self._answers[address] = answer
        return answer

    def _has(self, text: str) -> bool:
        address = parse_address(text)
        if address is None:
            return False
        number = int(address)
        prefixes = self._prefixes[address.version]
        return any(number & mask in firsts for mask, firsts in prefixes.items())
