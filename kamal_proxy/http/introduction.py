"""The PROXY protocol header with which a balancer's connection begins, before anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.proxy_protocol import ProxyHeaderError, parse_untrusted
from kamal_proxy.sockets import READ_SIZE

if TYPE_CHECKING:
    from kamal_proxy.listeners import Address
    from kamal_proxy.logs import Log
    from kamal_proxy.sockets import SocketStream


async def introduced(
    stream: SocketStream, address: Address, log: Log
) -> tuple[Address, bytes] | None:
    """Read the header that a peer owes; how long that may take is the caller's business.

    Args:
        stream: The connection.
        address: Whom it is from.
        log: Where a connection without a header is told of.

    Returns:
        Whom the connection is from, if the header says so, and what came after it; or None if what
        came is no such header.
    """
    data = b""
    try:
        while (header := parse_untrusted(data)) is None:
            more = await stream.receive(READ_SIZE)
            if not more:
                return None
            data += more
    except (ProxyHeaderError, trio.BrokenResourceError) as error:
        log.warning(
            "Connection refused: no PROXY protocol header",
            client_addr=address[0],
            error=str(error),
        )
        return None
    return header.source or address, data[header.size :]
