"""The routing table of one proxy and what is saved of it, which never disagree.

The table is replaced whole, in one assignment, once the state is written. Which services are in it
and what they do is not this module's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kamal_proxy.errors import ServiceNotFoundError
from kamal_proxy.router import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.service import Service
    from kamal_proxy.state import SavedService, StateFile


class SavedRoutes:
    """The routing table of this moment.

    Args:
        state: Where it is saved; ``None`` saves nothing.
        on_change: Told each new table.

    Attributes:
        table: The table; never changed, only replaced.
        lock: Held by whoever changes it, from the look at the old one to the end of
            :meth:`replace`; never while a drain is waited for.
    """

    def __init__(
        self,
        state: StateFile[SavedService] | None,
        on_change: Callable[[RoutingTable], None],
    ) -> None:
        self._state = state
        self._on_change = on_change
        # A thread of its own: neither a slow name service nor a slow directory may hold it up.
        self._saving = trio.CapacityLimiter(1)
        self.table = RoutingTable()
        self.lock = trio.Lock()

    def service(self, name: str) -> Service:
        """Return a service as it is now.

        Raises:
            ServiceNotFoundError: there is none of that name.
        """
        service = self.table.get(name)
        if service is None:
            raise ServiceNotFoundError("service not found")
        return service

    async def replace(self, table: RoutingTable) -> None:
        """Save the state, then switch to the new table; if it can't be saved, nothing changes.

        The write is not abandoned when cancelled, so that file and table never disagree.

        Raises:
            StateError: the state could not be saved.
        """
        if self._state is not None:
            saved = [service.saved() for service in table]
            await trio.to_thread.run_sync(self._state.save, saved, limiter=self._saving)
        self.show(table)

    def show(self, table: RoutingTable) -> None:
        """Switch to another table, which is saved already."""
        self.table = table
        self._on_change(table)
