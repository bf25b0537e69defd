"""What a certificate authority is answered that looks at a host, by any process that has the host.

The process that has ordered a certificate has its answers in memory; the others, to which the
authority may come as well, find them in the store that they share. Strangers ask too: what they
ask for may be anything, and nothing of it is remembered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from kamal_proxy.errors import CertificateStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.challenges import Answers
    from kamal_proxy.tls.store import CertificateStore

T = TypeVar("T")


class Validations:
    """The answers to all challenges.

    Args:
        answers: Those of this process.
        stores: Returns the stores that others may have put theirs into.
    """

    def __init__(self, answers: Answers, stores: Callable[[], Iterable[CertificateStore]]) -> None:
        self._answers = answers
        self._stores = stores
        self._limiter = trio.CapacityLimiter(2)

    async def http(self, token: str) -> bytes | None:
        """Return the answer to an HTTP-01 challenge; None if there is none.

        Args:
            token: The last segment of the path that was asked for.
        """
        answer = self._answers.token(token)
        return await self._find(lambda store: store.token(token)) if answer is None else answer

    async def tls(self, host: str) -> Certificate | None:
        """Return the certificate that answers a TLS-ALPN-01 challenge; None if there is none.

        Args:
            host: The name of the handshake.
        """
        answer = self._answers.certificate(host)
        return await self._find(lambda store: store.challenge(host)) if answer is None else answer

    async def _find(self, look: Callable[[CertificateStore], T | None]) -> T | None:
        stores = tuple(self._stores())

        def find() -> T | None:
            for store in stores:
                try:
                    found = look(store)
                except CertificateStoreError:
                    # A store that can't be read is told of when a certificate is to be kept there.
                    continue
                if found is not None:
                    return found
            return None

        if not stores:
            return None
        return await trio.to_thread.run_sync(find, limiter=self._limiter, abandon_on_cancel=True)
