"""Clients of the HTTPS port: HTTP/1.1 inside TLS, over real sockets."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from tests.scripted import LOCALHOST, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.certificates import Authority, Issued


class SecureClient(Client):
    """A client inside TLS.

    Attributes:
        tls: Its stream.
    """

    def __init__(self, tls: trio.SSLStream[trio.SocketStream]) -> None:
        super().__init__(tls.transport_stream.socket)
        self.tls = tls

    async def send(self, data: bytes) -> None:
        await self.tls.send_all(data)

    async def _receive(self) -> bytes:
        try:
            return bytes(await self.tls.receive_some(65536))
        except trio.BrokenResourceError as error:
            raise OSError(str(error)) from error

    @property
    def names(self) -> set[str]:
        """The names in the certificate that the server showed."""
        shown = self.tls.getpeercert() or {}
        return {name for _, name in shown.get("subjectAltName", ())}


def client_context(
    authority: Authority | None,
    *,
    alpn: Sequence[str] = (),
    client: Issued | None = None,
    directory: str = "",
) -> ssl.SSLContext:
    """Return what a client verifies servers with.

    Args:
        authority: Whom it trusts; without one it does not verify anything.
        alpn: The protocols that it offers.
        client: Its own certificate, which is written into ``directory``.
        directory: For files.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=authority.pem.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if client is not None:
        path = f"{directory}/client.pem"
        with open(path, "wb") as file:
            file.write(client.key_pem + client.chain_pem)
        context.load_cert_chain(path)
    return context


@asynccontextmanager
async def open_secure(
    port: int, name: str | None, context: ssl.SSLContext
) -> AsyncIterator[SecureClient]:
    """Connect to an HTTPS port for the length of a block.

    Args:
        port: Where the proxy listens.
        name: The name to ask for; None asks for none.
        context: What to verify the server with.
    """
    async with await trio.open_tcp_stream(LOCALHOST, port) as stream:
        tls = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
        await tls.do_handshake()
        yield SecureClient(tls)
