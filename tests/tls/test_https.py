"""HTTPS with certificates of the services' own, through a whole proxy."""

from __future__ import annotations

import json
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from kamal_proxy.errors import CertificateError, InvalidOptionsError
from kamal_proxy.options import ServiceOptions
from kamal_proxy.proxy_protocol import encode_v2
from kamal_proxy.tls import files as tls_files
from kamal_proxy.tls import reloading, selection
from kamal_proxy.tls.certificates import certificate_error
from kamal_proxy.tls.files import TlsFiles
from tests.certificates import make_ca, self_signed
from tests.running import open_command, open_embedded, open_instance
from tests.scripted import (
    LOCALHOST,
    ConnectionCut,
    deploy_options,
    ok,
    open_client,
    open_upstream,
    reply,
)
from tests.secure import client_context, open_secure
from tests.tls.hellos import real_hello

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kamal_proxy.control.messages import Event
    from tests.running import Embedded
    from tests.scripted import Upstream

AUTHORITY = make_ca()
TRUSTING = client_context(AUTHORITY)


def options(
    upstream: Upstream, files: tuple[str, str] | None, *hosts: str, name: str = "web", **more: Any
) -> Any:
    """Return what deploys a service with a certificate; without files it has no TLS."""
    own: dict[str, Any] = {}
    if files is not None:
        own = {
            "tls_enabled": True,
            "tls_certificate_path": files[0],
            "tls_private_key_path": files[1],
        }
    return attrs.evolve(
        deploy_options(name, [upstream]),
        service_options=ServiceOptions(hosts=hosts, **{**own, **more}),
    )


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded(https_port=0) as embedded:
        yield embedded


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Return the files of a certificate for ``a.test`` and ``*.b.test``."""
    return AUTHORITY.issue("a.test", "*.b.test").write(tmp_path)


async def test_a_connection_carries_requests(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    await proxy.deploy(options(upstream, files, "a.test", "*.b.test"))
    async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
        for path in ("/1", "/2"):
            response = await client.get(path, "a.test")
            assert (response.status, response.body) == (200, b"hello")
    assert [request.get(b"x-forwarded-proto") for request in upstream.requests] == [[b"https"]] * 2
    first, second = await proxy.lines.wait_requests(2)
    assert (first["scheme"], first["port"], first["service"]) == ("https", proxy.https_port, "web")
    assert first["client_port"] == second["client_port"]
    async with open_secure(proxy.https_port, "x.b.test", TRUSTING) as client:
        assert (await client.get("/", "x.b.test")).status == 200


async def test_each_name_gets_its_certificate(
    proxy: Embedded, upstream: Upstream, tmp_path: Path
) -> None:
    kinds = {"a.test": "ec", "b.test": "rsa", "*.c.test": "ed25519"}
    for number, (host, kind) in enumerate(kinds.items()):
        authority = AUTHORITY.intermediate() if kind == "rsa" else AUTHORITY
        issued = authority.issue(host, key=kind)  # type: ignore[arg-type]  # a literal
        files = issued.write(tmp_path, f"{number}")
        await proxy.deploy(options(upstream, files, host, name=f"s{number}"))
    for asked, shown in (
        ("a.test", "a.test"),
        ("b.test", "b.test"),
        ("x.c.test", "*.c.test"),
    ):
        async with open_secure(proxy.https_port, asked, TRUSTING) as client:
            assert client.names == {shown}
            assert (await client.get("/", asked)).status == 200


async def test_no_name_is_the_first_service_with_tls(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], tmp_path: Path
) -> None:
    other = AUTHORITY.issue("z.test").write(tmp_path, "z")
    await proxy.deploy(options(upstream, None, "plain.test", name="plain"))
    await proxy.deploy(options(upstream, files, "a.test", name="first"))
    await proxy.deploy(options(upstream, other, "z.test", name="another"))
    nameless = client_context(AUTHORITY)
    nameless.check_hostname = False
    async with open_secure(proxy.https_port, None, nameless) as client:
        assert client.names == {"a.test", "*.b.test"}
        assert (await client.get("/", "z.test")).status == 200
    # Some clients name the address of their URL, though they must not.
    async with open_client(proxy.https_port) as raw:
        await raw.send(real_hello("nine.test").replace(b"nine.test", b"127.0.0.1"))
        assert (await raw.receive_exactly(1)) == b"\x16"


@pytest.mark.parametrize("name", ["c.test", "x.y.b.test", "plain.test"])
async def test_other_names_get_an_alert(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], name: str
) -> None:
    await proxy.deploy(options(upstream, files, "a.test", "*.b.test"))
    await proxy.deploy(options(upstream, None, "plain.test", name="plain"))
    with pytest.raises(trio.BrokenResourceError) as caught:
        async with open_secure(proxy.https_port, name, TRUSTING):
            pass
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert caught.value.__cause__.reason == "TLSV1_UNRECOGNIZED_NAME"


async def test_a_host_without_tls_is_refused_inside_tls(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    await proxy.deploy(options(upstream, files, "a.test"))
    await proxy.deploy(options(upstream, None, "plain.test", name="plain"))
    async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
        assert (await client.get("/", "plain.test")).status == 503
        assert (await client.get("/", "nobody.test")).status == 404
        assert (await client.get("/", "a.test")).status == 200
    assert [line.get("reason") for line in await proxy.lines.wait_requests(3)] == [
        "tls_not_enabled",
        "no_service",
        None,
    ]


async def test_a_part_of_a_host_shares_its_certificate(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    await proxy.deploy(options(upstream, files, "a.test"))
    api = options(upstream, None, "a.test", name="api", path_prefixes=("/api",))
    await proxy.deploy(api)
    async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
        assert (await client.get("/api/x", "a.test")).status == 200
        # It was not deployed with TLS itself, and so believes what its clients say.
        believing = await client.get("/api/x", "a.test", "X-Forwarded-For: 192.0.2.9\r\n")
        assert believing.status == 200
        await client.get("/x", "a.test", "X-Forwarded-For: 192.0.2.9\r\n")
    assert (await proxy.lines.wait_requests(1))[0]["service"] == "api"
    shown = [request.get(b"x-forwarded-for") for request in upstream.requests[1:]]
    assert shown == [[f"192.0.2.9, {LOCALHOST}".encode()], [LOCALHOST.encode()]]


async def test_plain_http_on_the_port(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    await proxy.deploy(options(upstream, files, "a.test"))
    async with open_client(proxy.https_port) as client:
        response = await client.get("/", "a.test")
        assert response.status == 400
        assert b"HTTPS" in response.body
        assert await client.receive_eof() == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 600,
        b"\x16\x03\x01\xff\xff" + b"\xff" * 100,
        b"SSH-2.0-scanner\r\n",
        b"\0" * 64,
        b"",
    ],
)
async def test_garbage_on_the_port(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], sent: bytes
) -> None:
    await proxy.deploy(options(upstream, files, "a.test"))
    async with open_client(proxy.https_port) as client:
        await client.send(sent)
        client.sock.shutdown(socket.SHUT_WR)
        await client.wait_closed()
    async with open_secure(proxy.https_port, "a.test", TRUSTING) as secure:
        assert (await secure.get("/", "a.test")).status == 200


async def test_strangers_are_told_of_in_one_line(upstream: Upstream) -> None:
    async with open_embedded(https_port=0) as proxy:
        for _ in range(5):
            async with open_client(proxy.https_port) as client:
                await client.send(b"GET / HTTP/1.1\r\n\r\n")
                await client.wait_closed()
        for _ in range(3):
            with pytest.raises(trio.BrokenResourceError):
                async with open_secure(proxy.https_port, "c.test", TRUSTING):
                    pass
        shown = proxy.proxy.metrics()[0].decode()
        assert 'kamal_proxy_tls_handshakes_total{result="plain HTTP"} 5.0' in shown
        assert 'kamal_proxy_tls_handshakes_total{result="unknown name"} 3.0' in shown
        lines = proxy.lines
    (line,) = [line for line in lines.all if line["msg"] == "TLS handshakes failed"]
    assert line["count"] == 8
    assert line["reasons"] == ["5 plain HTTP", "3 unknown name"]
    assert (line["clients"], line["client_addr"]) == (1, LOCALHOST)


async def test_a_handshake_has_its_time(upstream: Upstream, files: tuple[str, str]) -> None:
    async with open_embedded(https_port=0, head_timeout=0.2) as proxy:
        await proxy.deploy(options(upstream, files, "a.test"))
        async with open_client(proxy.https_port) as client:
            await client.send(b"\x16\x03\x01\x02\x00")
            assert await client.receive_eof() == b""
        assert "timeout" in proxy.proxy.metrics()[0].decode()


async def test_no_protocol_in_common(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    await proxy.deploy(options(upstream, files, "a.test"))
    with pytest.raises(trio.BrokenResourceError) as caught:
        async with open_secure(
            proxy.https_port, "a.test", client_context(AUTHORITY, alpn=["imap"])
        ):
            pass
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert "no application protocol" in str(caught.value.__cause__)


async def test_a_session_is_resumed_also_after_a_redeploy(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    context = client_context(AUTHORITY)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    await proxy.deploy(options(upstream, files, "a.test"))
    assert await trio.to_thread.run_sync(_resumed, proxy.https_port, context, None) is not None
    session = await trio.to_thread.run_sync(_resumed, proxy.https_port, context, None)
    await proxy.deploy(options(upstream, files, "a.test"))
    assert await trio.to_thread.run_sync(_resumed, proxy.https_port, context, session) is session


def _resumed(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> ssl.SSLSession | None:
    """Connect; return the session given if it was resumed, else the new one."""
    with (
        socket.create_connection((LOCALHOST, port)) as plain,
        context.wrap_socket(plain, server_hostname="a.test", session=session) as secure,
    ):
        assert secure.session_reused == (session is not None)
        return session or secure.session


async def test_sessions_of_clients_without_tickets_are_few(
    proxy: Embedded,
    upstream: Upstream,
    files: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "_MAX_SESSIONS", 3)
    context = client_context(AUTHORITY)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET
    await proxy.deploy(options(upstream, files, "a.test"))

    def connect(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        with (
            socket.create_connection((LOCALHOST, proxy.https_port)) as plain,
            context.wrap_socket(plain, server_hostname="a.test", session=session) as secure,
        ):
            found = secure.session, secure.session_reused
            secure.unwrap()  # else the server does not keep it
            return found

    first, _ = await trio.to_thread.run_sync(connect, None)
    assert (await trio.to_thread.run_sync(connect, first))[1]
    for _ in range(4):
        assert not (await trio.to_thread.run_sync(connect, None))[1]
    assert not (await trio.to_thread.run_sync(connect, first))[1]


async def test_a_balancer_introduces_its_clients_before_tls(
    upstream: Upstream, files: tuple[str, str]
) -> None:
    async with open_embedded(https_port=0, proxy_protocol_from=(LOCALHOST,)) as proxy:
        await proxy.deploy(options(upstream, files, "a.test"))
        stream = await trio.open_tcp_stream(LOCALHOST, proxy.https_port)
        await stream.send_all(encode_v2(("192.0.2.7", 4000), ("192.0.2.1", 443)))
        secure = trio.SSLStream(stream, TRUSTING, server_hostname="a.test", https_compatible=True)
        await secure.send_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert b"200 OK" in await secure.receive_some()
        await secure.aclose()
        (line,) = await proxy.lines.wait_requests(1)
        assert line["client_addr"] == "192.0.2.7"
        async with open_client(proxy.https_port) as client:
            await client.send(b"\x16\x03\x01\x02\x00")
            assert await client.receive_eof() == b""
        await proxy.lines.wait_for_message("Connection refused: no PROXY protocol header")


# Bad files, and files that change


@pytest.mark.parametrize(
    ("certificate", "key", "problem"),
    [
        ("missing.crt", "tls.key", "missing.crt: no such file or directory"),
        ("tls.crt", "tls.crt", "are the two files swapped?"),
        ("tls.crt", "other.key", "does not belong to"),
    ],
)
async def test_a_deploy_with_bad_files_changes_nothing(
    proxy: Embedded,
    upstream: Upstream,
    files: tuple[str, str],
    tmp_path: Path,
    certificate: str,
    key: str,
    problem: str,
) -> None:
    AUTHORITY.issue("a.test").write(tmp_path, "other")
    await proxy.deploy(options(upstream, files, "a.test"))
    bad = str(tmp_path / certificate), str(tmp_path / key)
    with pytest.raises(CertificateError, match="unable to load certificate") as caught:
        await proxy.deploy(options(upstream, bad, "a.test"))
    assert problem in " ".join(caught.value.details).lower() or problem in " ".join(
        caught.value.details
    )
    async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
        assert (await client.get("/", "a.test")).status == 200


async def test_a_chain_that_openssl_refuses_is_refused_at_the_deploy(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ones it refuses is its own matter: such as those with signatures by SHA-1."""

    def refuse(*_: object, **__: object) -> None:
        raise certificate_error("OpenSSL refuses a.test: ca md too weak")

    monkeypatch.setattr(tls_files, "server_context", refuse)
    with pytest.raises(CertificateError, match="unable to load certificate"):
        await proxy.deploy(options(upstream, files, "a.test"))
    assert proxy.proxy.services() == []


async def test_no_path_is_no_file(proxy: Embedded, upstream: Upstream) -> None:
    with pytest.raises(CertificateError) as caught:
        await proxy.deploy(options(upstream, ("a\0b", "a\0b"), "a.test"))
    assert "not a path" in caught.value.details[0]


async def test_a_look_at_files_that_goes_wrong(
    proxy: Embedded,
    upstream: Upstream,
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It costs neither the proxy nor the other services."""
    monkeypatch.setattr(reloading, "INTERVAL", 0.01)
    refresh = TlsFiles.refresh

    def fail(self: TlsFiles) -> bool:
        if self.certificate is not None and self.certificate.matches("z.test"):
            raise RuntimeError("can't start new thread")
        return refresh(self)

    other = AUTHORITY.issue("z.test").write(tmp_path, "z")
    await proxy.deploy(options(upstream, other, "z.test", name="z"))
    await proxy.deploy(options(upstream, files, "a.test", name="a"))
    monkeypatch.setattr(TlsFiles, "refresh", fail)
    line = await proxy.lines.wait_for_message("Certificate can't be looked at")
    assert (line["service"], "new thread" in line["error"]) == ("z", True)
    new = AUTHORITY.issue("a.test", "new.test").write(tmp_path, "new")
    os.replace(new[0], files[0])
    os.replace(new[1], files[1])
    await proxy.lines.wait_for_message("Certificate reloaded")


async def test_tls_needs_an_https_port(upstream: Upstream, files: tuple[str, str]) -> None:
    async with open_embedded() as proxy:
        assert proxy.https_port == 0
        with pytest.raises(InvalidOptionsError, match="TLS needs HTTPS"):
            await proxy.deploy(options(upstream, files, "a.test"))


async def test_changed_files_are_used(
    proxy: Embedded,
    upstream: Upstream,
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reloading, "INTERVAL", 0.01)
    await proxy.deploy(options(upstream, files, "a.test"))
    async with open_secure(proxy.https_port, "a.test", TRUSTING) as old:
        new = AUTHORITY.issue("a.test", "new.test")
        # Half a change is none, and is not complained of at once.
        replacement = tmp_path / "replacement"
        replacement.write_bytes(new.chain_pem)
        os.replace(replacement, files[0])
        await proxy.lines.wait_for_message(
            "Certificate can't be used; what was read before still is"
        )
        async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
            assert "new.test" not in client.names
        replacement.write_bytes(new.key_pem)
        os.replace(replacement, files[1])
        await proxy.lines.wait_for_message("Certificate reloaded")
        async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
            assert "new.test" in client.names
        # What was open goes on.
        assert (await old.get("/", "a.test")).status == 200


async def test_a_missing_file_at_a_restart_costs_that_service_only(
    upstream: Upstream, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "INTERVAL", 0.01)
    other = AUTHORITY.issue("z.test").write(tmp_path, "z")
    run: dict[str, Any] = {"https_port": 0, "data_directory": tmp_path / "data"}
    async with open_embedded(**run) as proxy:
        await proxy.deploy(options(upstream, files, "a.test", name="a"))
        await proxy.deploy(options(upstream, other, "z.test", name="z"))
    os.rename(files[1], tmp_path / "kept")
    async with open_embedded(**run) as proxy:
        line = await proxy.lines.wait_for_message(
            "Service is not served over HTTPS until its files can be used"
        )
        assert (line["level"], line["service"]) == ("ERROR", "a")
        # It is not as if there was something that goes on being used.
        again = await proxy.lines.wait_for(
            lambda other: other is not line and other["level"] == "ERROR"
        )
        assert again["msg"] == line["msg"]
        assert "no such file" in json.dumps(line).lower()
        async with open_secure(proxy.https_port, "z.test", TRUSTING) as client:
            assert (await client.get("/", "z.test")).status == 200
        with pytest.raises(trio.BrokenResourceError):
            async with open_secure(proxy.https_port, "a.test", TRUSTING):
                pass
        async with open_client(proxy.port) as plain:
            assert (await plain.get("/", "a.test")).status == 301
        os.rename(tmp_path / "kept", files[1])
        await proxy.lines.wait_for_message("Certificate reloaded")
        async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
            assert (await client.get("/", "a.test")).status == 200


async def test_what_clients_may_refuse_is_told(
    proxy: Embedded, upstream: Upstream, tmp_path: Path
) -> None:
    files = self_signed("localhost", days=3).write(tmp_path)
    await proxy.deploy(options(upstream, files, "localhost", "a.test"))
    line = await proxy.lines.wait_for_message("Certificate may be refused by clients")
    assert line["details"] == ["it is not for a.test", "expires in 2 days"]
    # Kamal's own tests have one with only a common name.
    async with open_secure(proxy.https_port, "localhost", client_context(None)) as client:
        assert (await client.get("/", "localhost")).status == 200


# Clients with certificates


async def test_clients_must_have_a_certificate(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], tmp_path: Path
) -> None:
    guests = make_ca("guests")
    (tmp_path / "ca.pem").write_bytes(guests.pem)
    await proxy.deploy(
        options(upstream, files, "a.test", tls_client_ca_path=str(tmp_path / "ca.pem"))
    )
    open_files = AUTHORITY.issue("open.test").write(tmp_path, "open")
    await proxy.deploy(options(upstream, open_files, "open.test", name="open"))
    directory = str(tmp_path)
    guest = client_context(
        AUTHORITY, client=guests.issue("guest", client=True), directory=directory
    )
    async with open_secure(proxy.https_port, "a.test", guest) as client:
        assert (await client.get("/", "a.test")).status == 200
    stranger = client_context(
        AUTHORITY, client=AUTHORITY.issue("x", client=True), directory=directory
    )
    for context in (TRUSTING, stranger):
        # In TLS 1.3 the client hears of it with its first read.
        with pytest.raises((trio.BrokenResourceError, ConnectionCut)):
            async with open_secure(proxy.https_port, "a.test", context) as client:
                await client.get("/", "a.test")
    async with open_secure(proxy.https_port, "open.test", TRUSTING) as client:
        assert (await client.get("/", "open.test")).status == 200
        # Who asked for another name was not asked for a certificate.
        assert (await client.get("/", "a.test")).status == 421
        assert (await client.get("/", "open.test")).status == 200
    api = options(upstream, None, "a.test", name="api", path_prefixes=("/api",))
    await proxy.deploy(api)
    async with open_secure(proxy.https_port, "open.test", TRUSTING) as client:
        assert (await client.get("/api", "a.test")).status == 421


async def test_a_part_of_several_hosts_is_as_closed_as_each_of_them(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str], tmp_path: Path
) -> None:
    """What is open on one host must not lead into the other."""
    (tmp_path / "ca.pem").write_bytes(make_ca("guests").pem)
    closed = options(upstream, files, "a.test", tls_client_ca_path=str(tmp_path / "ca.pem"))
    await proxy.deploy(closed)
    open_files = AUTHORITY.issue("open.test").write(tmp_path, "open")
    await proxy.deploy(options(upstream, open_files, "open.test", name="open"))
    await proxy.deploy(options(upstream, None, "plain.test", name="plain"))
    hosts = ("plain.test", "open.test", "a.test")
    await proxy.deploy(options(upstream, None, *hosts, name="api", path_prefixes=("/api",)))
    async with open_secure(proxy.https_port, "open.test", TRUSTING) as client:
        statuses = [(await client.get("/api", host)).status for host in hosts]
    assert statuses == [503, 200, 421]
    for host, status in zip(hosts, (200, 301, 301), strict=True):
        async with open_client(proxy.port) as plain:
            assert (await plain.get("/api", host)).status == status


async def test_other_authorities_need_another_connection(
    proxy: Embedded,
    upstream: Upstream,
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client of the old ones must not be refused for as long as its connection lasts."""
    monkeypatch.setattr(reloading, "INTERVAL", 0.01)
    guests, ca_file = make_ca("guests"), tmp_path / "ca.pem"
    ca_file.write_bytes(guests.pem)
    await proxy.deploy(options(upstream, files, "a.test", tls_client_ca_path=str(ca_file)))
    guest = client_context(
        AUTHORITY, client=guests.issue("guest", client=True), directory=str(tmp_path)
    )
    async with open_secure(proxy.https_port, "a.test", guest) as client:
        assert (await client.get("/", "a.test")).status == 200
        (tmp_path / "new.pem").write_bytes(guests.pem + make_ca("others").pem)
        os.replace(tmp_path / "new.pem", ca_file)
        await proxy.lines.wait_for_message("Certificate reloaded")
        assert (await client.get("/", "a.test")).status == 421
        assert await client.receive_eof() == b""
    async with open_secure(proxy.https_port, "a.test", guest) as client:
        assert (await client.get("/", "a.test")).status == 200


async def test_client_certificates_and_plain_http_exclude_each_other(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    with pytest.raises(InvalidOptionsError, match="plain HTTP"):
        await proxy.deploy(
            options(upstream, files, "a.test", tls_client_ca_path="ca", tls_redirect=False)
        )


# Deploys and the end


async def test_a_redeploy_drains_what_came_by_tls(
    proxy: Embedded, upstream: Upstream, files: tuple[str, str]
) -> None:
    started, release = trio.Event(), trio.Event()

    async def slow(peer: Any) -> None:
        await peer.receive_request()
        started.set()
        await release.wait()
        await peer.send(ok(b"old"))

    async with open_upstream(slow) as old, trio.open_nursery() as nursery:
        await proxy.deploy(options(old, files, "a.test"))
        async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            await started.wait()
            switched = trio.Event()

            def progress(event: Event) -> None:
                if event.event == "switched":
                    switched.set()

            nursery.start_soon(proxy.proxy.deploy, options(upstream, files, "a.test"), progress)
            await switched.wait()
            async with open_secure(proxy.https_port, "a.test", TRUSTING) as other:
                assert (await other.get("/", "a.test")).body == b"hello"
            release.set()
            assert (await client.receive_response()).body == b"old"
            assert (await client.get("/", "a.test")).body == b"hello"


async def test_the_end_waits_for_requests_and_not_for_handshakes(
    upstream: Upstream, files: tuple[str, str]
) -> None:
    started, release = trio.Event(), trio.Event()

    async def slow(peer: Any) -> None:
        await peer.receive_request()
        started.set()
        await release.wait()
        await peer.send(ok(b"late"))

    async with (
        open_upstream(slow) as target,
        open_embedded(https_port=0, shutdown_timeout=10.0) as proxy,
    ):
        await proxy.deploy(options(target, files, "a.test"))
        async with (
            open_client(proxy.https_port) as silent,
            open_secure(proxy.https_port, "a.test", TRUSTING) as client,
        ):
            await client.send(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
            await started.wait()
            proxy.proxy.stop()
            assert await silent.receive_eof() == b""
            release.set()
            assert (await client.receive_response()).body == b"late"
            assert await client.receive_eof() == b""


async def test_a_large_response_and_a_reset(proxy: Embedded, files: tuple[str, str]) -> None:
    body = os.urandom(3_000_000)
    async with open_upstream(reply(ok(body))) as upstream:
        await proxy.deploy(options(upstream, files, "a.test"))
        async with open_secure(proxy.https_port, "a.test", TRUSTING) as client:
            response = await client.get("/", "a.test")
            assert response.body == body


async def test_the_command(files: tuple[str, str], directory: Path) -> None:
    async with open_command(directory) as command, open_instance("v1") as instance:
        await command.deploy(
            "web",
            f"--target={instance.target}",
            "--host=a.test",
            "--tls",
            f"--tls-certificate-path={files[0]}",
            f"--tls-private-key-path={files[1]}",
        )
        async with open_secure(command.https_port, "a.test", TRUSTING) as client:
            assert (await client.get("/", "a.test")).status == 200
        result = await command.kp(
            "deploy",
            "web",
            f"--target={instance.target}",
            "--host=a.test",
            "--tls",
            "--tls-certificate-path=/no",
            "--tls-private-key-path=/no",
        )
        assert (result.code, result.out) == (1, "")
        assert result.err == "/no: no such file or directory\nError: unable to load certificate\n"
        assert "a.test" in (await command.kp("list")).out
