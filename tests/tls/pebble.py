"""A real certificate authority for tests: Pebble, the one that Let's Encrypt tests clients with.

Debian has it, with the DNS server that tells it where hosts are. It rejects nonces and forgets
validations by chance, as it is told; whatever it validates is on ports of the test's choice.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy.tls.contexts import challenge_context
from tests.certificates import make_ca
from tests.ports import free_port
from tests.scripted import fail_hanging_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from kamal_proxy.tls.certificates import Certificate

needs_pebble = pytest.mark.skipif(
    not (shutil.which("pebble") and shutil.which("pebble-challtestsrv")),
    reason="needs Debian's package pebble",
)

_TRY_AGAIN = 0.02  # seconds


@attrs.define(eq=False)
class Pebble:
    """A running authority.

    Attributes:
        directory: URL of its ACME directory.
        ca_file: What verifies it.
        http_port: Where it looks for HTTP-01 answers.
        tls_port: Where it looks for TLS-ALPN-01 answers.
        asked: The hosts and tokens for which it came by HTTP, in order.
        shaken: The hosts for which it came by TLS, in order.
    """

    directory: str
    ca_file: str
    http_port: int
    tls_port: int
    asked: list[tuple[str, str]] = attrs.field(factory=list)
    shaken: list[str] = attrs.field(factory=list)


@asynccontextmanager
async def open_pebble(
    *,
    token: Callable[[str], Any] | None = None,
    certificate: Callable[[str], Certificate | None] | None = None,
    nonce_reject: int = 20,
    reuse: int = 0,
    config: Mapping[str, Any] | None = None,
) -> AsyncIterator[Pebble]:
    """Run an authority and what it validates.

    Args:
        token: Returns the answer for a token, or None; it may be a coroutine function. Without it
            nobody listens on the port.
        certificate: Returns the certificate for the name of a TLS-ALPN-01 handshake, or None.
            Without it nobody listens.
        nonce_reject: Percentage of good nonces that it rejects.
        reuse: Percentage of validations that it remembers.
        config: Further settings of Pebble.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ca = make_ca("test authority of Pebble")
        (directory / "ca.pem").write_bytes(ca.pem)
        cert, key = ca.issue("localhost", "127.0.0.1").write(directory)
        acme, management, dns, names_management, http, tls = (free_port() for _ in range(6))
        settings = {
            "listenAddress": f"127.0.0.1:{acme}",
            "managementListenAddress": f"127.0.0.1:{management}",
            "certificate": cert,
            "privateKey": key,
            "httpPort": http,
            "tlsPort": tls,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": False,
            **(config or {}),
        }
        (directory / "pebble.json").write_text(json.dumps({"pebble": settings}))
        environment = os.environ | {
            "PEBBLE_VA_NOSLEEP": "1",
            "PEBBLE_WFE_NONCEREJECT": str(nonce_reject),
            "PEBBLE_AUTHZREUSE": str(reuse),
        }
        made = Pebble(f"https://127.0.0.1:{acme}/dir", str(directory / "ca.pem"), http, tls)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_hanging_test)
            nursery.start_soon(
                _run,
                [
                    "pebble-challtestsrv",
                    "-defaultIPv4=127.0.0.1",
                    "-defaultIPv6=",
                    *await _names_flags(f"127.0.0.1:{dns}"),
                    "-http01=",
                    "-https01=",
                    "-tlsalpn01=",
                    f"-management=127.0.0.1:{names_management}",
                ],
                environment,
            )
            await _wait_for_names(dns)
            nursery.start_soon(
                _run,
                [
                    "pebble",
                    f"-config={directory / 'pebble.json'}",
                    f"-dnsserver=127.0.0.1:{dns}",
                    "-strict",
                ],
                environment,
            )
            await _wait_for_listener(acme)
            if token is not None:
                await nursery.start(_serve_http, made, token)
            if certificate is not None:
                await nursery.start(_serve_tls, made, certificate)
            try:
                yield made
            finally:
                nursery.cancel_scope.cancel()


async def _names_flags(address: str) -> list[str]:
    """Return how the DNS server is told where to listen, which has changed with version 2.5."""
    shown = await trio.run_process(
        ["pebble-challtestsrv", "-h"], capture_stdout=True, capture_stderr=True, check=False
    )
    if b"-dnsserver" in shown.stdout + shown.stderr:
        return [f"-dnsserver={address}", "-doh="]
    return [f"-dns01={address}"]


async def _run(command: list[str], environment: Mapping[str, str]) -> None:
    """Run a program until cancelled; it must not end by itself."""
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    output = b""
    assert process.stdout is not None
    try:
        async for data in process.stdout:
            output = (output + data)[-10_000:]
        raise AssertionError(output.decode())
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def _wait_for_listener(port: int) -> None:
    """Wait until somebody accepts connections: Pebble says so before it does."""
    while True:
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            await trio.sleep(_TRY_AGAIN)
        else:
            return await stream.aclose()


async def _wait_for_names(port: int) -> None:
    """Wait until a DNS server answers."""
    query = bytes.fromhex("0001 0100 0001 0000 0000 0000 0161 0474657374 00 0001 0001")
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.connect(("127.0.0.1", port))
        while True:
            try:
                await sock.send(query)
                with trio.move_on_after(_TRY_AGAIN):
                    await sock.recv(512)
                    return
            except ConnectionRefusedError:
                await trio.sleep(_TRY_AGAIN)


async def _serve_http(
    made: Pebble, token: Callable[[str], Any], *, task_status: trio.TaskStatus[Any]
) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        data = b""
        async with stream:
            while b"\r\n\r\n" not in data:
                more = await stream.receive_some()
                if not more:
                    return
                data += more
            path = data.split(b" ", 2)[1].decode()
            host = next(
                line.partition(b":")[2].strip().decode()
                for line in data.split(b"\r\n")
                if line.lower().startswith(b"host:")
            )
            name = path.rpartition("/")[2]
            made.asked.append((host.partition(":")[0], name))
            answer = token(name)
            if hasattr(answer, "__await__"):
                answer = await answer
            if answer is None:
                await stream.send_all(b"HTTP/1.0 404 Not Found\r\n\r\nnothing here")
            else:
                await stream.send_all(b"HTTP/1.0 200 OK\r\n\r\n" + answer)

    await trio.serve_tcp(handle, made.http_port, host="127.0.0.1", task_status=task_status)


async def _serve_tls(
    made: Pebble,
    certificate: Callable[[str], Certificate | None],
    *,
    task_status: trio.TaskStatus[Any],
) -> None:
    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str, _: object) -> int | None:
        made.shaken.append(name)
        found = certificate(name)
        if found is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        connection.context = challenge_context(found)
        return None

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["acme-tls/1"])
    context.sni_callback = choose

    async def handle(stream: trio.SocketStream) -> None:
        secure = trio.SSLStream(stream, context, server_side=True)
        try:
            await secure.do_handshake()
            await secure.receive_some()
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(secure)

    await trio.serve_tcp(handle, made.tls_port, host="127.0.0.1", task_status=task_status)
