"""Asking an application itself whether a host may have a certificate (see ``tls.on_demand``)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

import trio

from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.probe import common_headers, converse
from kamal_proxy.http.upstream import ConnectError
from kamal_proxy.tls.on_demand import ALLOWED, SHOWN, Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.http.target_side import Pool
    from kamal_proxy.router import RoutingTable


class ApplicationAsker:
    """Asks services; a :class:`kamal_proxy.tls.on_demand.Ask`.

    Args:
        routes: Returns the routing table of this moment.
    """

    def __init__(self, routes: Callable[[], RoutingTable]) -> None:
        self._routes = routes

    async def __call__(self, service: str, path: str, host: str) -> Answer:
        """Send a GET to one of a service's targets; how long that may take is the caller's matter.

        Raises:
            OSError: it can't be asked, or its answer makes no sense; the text says why.
        """
        found = self._routes().get(service)
        target = None if found is None else found.active.choose(set(), reading=False)
        if target is None:
            raise OSError("no healthy target")
        pool = cast("Pool", target.connections)
        try:
            upstream = await pool.connect()
        except ConnectError as error:
            raise OSError(f"{target.name}: {error}") from error
        try:
            headers = [*common_headers(host), (b"Accept", b"*/*")]
            head = await converse(upstream, b"GET", path, headers)
            body = b""
            # What is said with a yes is not read: it may be long in coming. A no that breaks off
            # is a no nevertheless.
            with contextlib.suppress(ProtocolError, trio.BrokenResourceError):
                while head.status != ALLOWED:
                    body += upstream.codec.take_body()
                    if upstream.codec.received or len(body) >= SHOWN:
                        break
                    await upstream.receive(None)
        except (ProtocolError, trio.BrokenResourceError) as error:
            raise OSError(f"{target.name}: {error}") from error
        finally:
            upstream.release()
        return Answer(head.status, body[:SHOWN])
