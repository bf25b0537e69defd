"""What contexts agree to: protocols, suites, resumption, client certificates; against OpenSSL."""

from __future__ import annotations

import contextlib
import os
import ssl
from typing import TYPE_CHECKING

import attrs
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kamal_proxy.errors import CertificateError
from kamal_proxy.tls.certificates import Certificate, parse_certificate
from kamal_proxy.tls.contexts import (
    ACME_ALPN,
    challenge_context,
    load_client_ca,
    server_context,
)
from tests.certificates import (
    Authority,
    Issued,
    Key,
    KeyKind,
    key_pem,
    make_ca,
    make_key,
    pem,
    self_signed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

V = ssl.TLSVersion
BOTH = pytest.mark.parametrize("version", [V.TLSv1_2, V.TLSv1_3])


@pytest.fixture(scope="module")
def ca() -> Authority:
    return make_ca()


@pytest.fixture(scope="module")
def server(ca: Authority) -> Certificate:
    return parsed(ca.issue("app.test"))


def parsed(issued: Issued) -> Certificate:
    return parse_certificate(issued.chain_pem, issued.key_pem)


def client_context(
    ca: Authority,
    version: ssl.TLSVersion | None = None,
    *,
    alpn: Sequence[str] = (),
    certificate: Issued | None = None,
    directory: Path | None = None,
) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.pem.decode())
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if certificate is not None:
        assert directory is not None
        context.load_cert_chain(*certificate.write(directory, "client"))
    return context


def connect(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    *,
    name: str = "app.test",
    session: ssl.SSLSession | None = None,
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Do a handshake in memory; a byte goes from the server to the client after it."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(up, down, server_side=True)
    theirs = client.wrap_bio(down, up, server_hostname=name, session=session)
    for _ in range(4):
        for side in (theirs, ours):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    # In TLS 1.3 a client learns only now that it was refused, and gets what it can resume with.
    ours.write(b"x")
    assert theirs.read(1) == b"x"
    return ours, theirs


@BOTH
def test_a_handshake(ca: Authority, server: Certificate, version: ssl.TLSVersion) -> None:
    ours, theirs = connect(server_context(server), client_context(ca, version))
    assert ours.version() == theirs.version() == version.name.replace("_", ".")
    assert theirs.getpeercert(binary_form=True) is not None
    assert ours.selected_alpn_protocol() is None


def test_both_versions_are_offered(ca: Authority, server: Certificate) -> None:
    ours, _ = connect(server_context(server), client_context(ca))
    assert ours.version() == "TLSv1.3"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_older_versions_are_refused(ca: Authority, server: Certificate) -> None:
    context = client_context(ca)
    context.minimum_version = context.maximum_version = V.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="unsupported protocol"):
        connect(server_context(server), context)


@pytest.mark.parametrize(
    "suite",
    [
        "ECDHE-ECDSA-AES128-SHA256",
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-RSA-AES128-SHA256",
        "AES128-GCM-SHA256",
        "DHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES128-CCM",
    ],
)
def test_weak_suites_are_refused(ca: Authority, suite: str) -> None:
    context = client_context(ca, V.TLSv1_2)
    context.set_ciphers(suite)
    key: KeyKind = "ec" if "ECDSA" in suite else "rsa"
    with pytest.raises(ssl.SSLError, match="no shared cipher"):
        connect(server_context(parsed(ca.issue("app.test", key=key))), context)


@pytest.mark.parametrize(
    "suite",
    [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-RSA-CHACHA20-POLY1305",
    ],
)
def test_strong_suites(ca: Authority, suite: str) -> None:
    context = client_context(ca, V.TLSv1_2)
    context.set_ciphers(suite)
    key: KeyKind = "ec" if "ECDSA" in suite else "rsa"
    ours, _ = connect(server_context(parsed(ca.issue("app.test", key=key))), context)
    cipher = ours.cipher()
    assert cipher is not None
    assert cipher[0] == suite


@BOTH
@pytest.mark.parametrize(
    "key",
    [
        "ec",
        "rsa",
        "ed25519",
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
    ],
)
def test_all_kinds_of_keys_are_served(
    ca: Authority, key: KeyKind | Key, version: ssl.TLSVersion
) -> None:
    connect(server_context(parsed(ca.issue("app.test", key=key))), client_context(ca, version))


@BOTH
def test_the_whole_chain_is_sent(ca: Authority, version: ssl.TLSVersion) -> None:
    issued = ca.intermediate().intermediate("second").issue("app.test")
    connect(server_context(parsed(issued)), client_context(ca, version))
    alone = parse_certificate(pem(issued.certificate), issued.key_pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(server_context(alone), client_context(ca, version))


def test_a_self_signed_certificate_is_served() -> None:
    issued = self_signed("app.test", "app.test")
    authority = Authority(issued.certificate, issued.key)
    connect(server_context(parsed(issued)), client_context(authority))


# Protocols


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        (["h2", "http/1.1"], ["h2", "http/1.1"], "h2"),
        (["h2", "http/1.1"], ["http/1.1", "h2"], "h2"),
        (["h2", "http/1.1"], ["http/1.1"], "http/1.1"),
        (["h2", "http/1.1"], ["spdy/3"], None),
        (["h2", "http/1.1"], [], None),
        ([], ["h2"], None),
    ],
)
def test_protocols(
    ca: Authority, server: Certificate, offered: list[str], wanted: list[str], chosen: str | None
) -> None:
    context = server_context(server, alpn=offered)
    ours, theirs = connect(context, client_context(ca, alpn=wanted))
    assert ours.selected_alpn_protocol() == theirs.selected_alpn_protocol() == chosen


def test_a_context_for_validation(ca: Authority, server: Certificate) -> None:
    context = challenge_context(server)
    ours, _ = connect(context, client_context(ca, alpn=["acme-tls/1"]))
    assert ours.selected_alpn_protocol() == "acme-tls/1" == ACME_ALPN
    ours, _ = connect(context, client_context(ca, alpn=["h2"]))
    assert ours.selected_alpn_protocol() is None


# Resumption


@BOTH
def test_resumption(ca: Authority, server: Certificate, version: ssl.TLSVersion) -> None:
    context, client = server_context(server), client_context(ca, version)
    ours, theirs = connect(context, client)
    assert not ours.session_reused
    assert theirs.session is not None
    assert theirs.session.has_ticket
    again, theirs = connect(context, client, session=theirs.session)
    assert again.session_reused
    assert theirs.session_reused


@BOTH
def test_sessions_of_another_context_do_not_resume(
    ca: Authority, server: Certificate, version: ssl.TLSVersion
) -> None:
    client = client_context(ca, version)
    _, theirs = connect(server_context(server), client)
    again, _ = connect(server_context(server), client, session=theirs.session)
    assert not again.session_reused


@BOTH
def test_resumption_with_client_certificates(
    ca: Authority, server: Certificate, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    context = server_context(server, client_ca=ca.pem)
    issued = ca.issue("alice", client=True)
    client = client_context(ca, version, certificate=issued, directory=tmp_path)
    _, theirs = connect(context, client)
    again, _ = connect(context, client, session=theirs.session)
    assert again.session_reused
    # Of whom it was is known still.
    assert again.getpeercert(binary_form=True) is not None


# Renegotiation


def test_renegotiation_and_compression_are_off(server: Certificate) -> None:
    context = server_context(server)
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION


# Clients' certificates


@BOTH
@pytest.mark.parametrize("kind", ["own", "of an intermediate", "self-signed"])
def test_client_certificates_are_accepted(
    ca: Authority, server: Certificate, version: ssl.TLSVersion, kind: str, tmp_path: Path
) -> None:
    trusted = make_ca("clients")
    pin = self_signed("bob")
    issued = {
        "own": trusted.issue("alice", client=True),
        "of an intermediate": trusted.intermediate().issue("alice", client=True),
        "self-signed": pin,
    }[kind]
    context = server_context(server, client_ca=trusted.pem + pem(pin.certificate))
    client = client_context(ca, version, certificate=issued, directory=tmp_path)
    ours, _ = connect(context, client)
    assert ours.getpeercert(binary_form=True) is not None


def test_an_intermediate_is_trusted_without_its_root(
    ca: Authority, server: Certificate, tmp_path: Path
) -> None:
    root = make_ca("clients")
    middle, other = root.intermediate(), root.intermediate("other")
    context = server_context(server, client_ca=middle.pem)
    connect(
        context,
        client_context(ca, certificate=middle.issue("alice", client=True), directory=tmp_path),
    )
    # The root vouches for the other one too, but it is not trusted.
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(
            context,
            client_context(ca, certificate=other.issue("eve", client=True), directory=tmp_path),
        )


@BOTH
@pytest.mark.parametrize("kind", ["none", "of another authority", "a server's", "expired"])
def test_client_certificates_are_refused(
    ca: Authority, server: Certificate, version: ssl.TLSVersion, kind: str, tmp_path: Path
) -> None:
    trusted = make_ca("clients")
    expired = self_signed("x", days=1).certificate.not_valid_before_utc.replace(year=2020)
    issued = {
        "none": None,
        "of another authority": make_ca("clients").issue("eve", client=True),
        "a server's": trusted.issue("app.test"),
        "expired": trusted.issue("alice", client=True, not_before=expired, days=1),
    }[kind]
    client = client_context(ca, version, certificate=issued, directory=tmp_path)
    with pytest.raises(ssl.SSLError) as caught:
        connect(server_context(server, client_ca=trusted.pem), client)
    assert caught.value.reason == (
        "PEER_DID_NOT_RETURN_A_CERTIFICATE" if issued is None else "CERTIFICATE_VERIFY_FAILED"
    )


def test_clients_need_no_certificate_by_default(
    ca: Authority, server: Certificate, tmp_path: Path
) -> None:
    issued = make_ca("any").issue("alice", client=True)
    client = client_context(ca, certificate=issued, directory=tmp_path)
    ours, _ = connect(server_context(server), client)
    assert ours.getpeercert(binary_form=True) is None


def test_loading_client_authorities(ca: Authority, server: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(b"the first:\n" + ca.pem + b"the second:\n" + make_ca("other").pem)
    loaded = load_client_ca(str(path))
    assert loaded.startswith(ca.pem)
    assert loaded.count(b"BEGIN CERTIFICATE") == 2
    server_context(server, client_ca=loaded)


def refused(path: Path) -> str:
    with pytest.raises(CertificateError) as caught:
        load_client_ca(str(path))
    [detail] = caught.value.details
    assert detail.startswith(f"{path}: ")
    return detail.removeprefix(f"{path}: ")


def test_client_authorities_that_are_none(ca: Authority, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    assert refused(path) == "no such file or directory"
    path.write_bytes(b"")
    assert refused(path) == "the file is empty"
    path.write_bytes(b"hello")
    assert refused(path).startswith("not PEM")
    issued = ca.issue("app.test")
    path.write_bytes(issued.key_pem)
    assert refused(path).startswith("it holds a private key and no certificate")
    path.write_bytes(issued.chain_pem)
    reason = "is not a certificate authority's, and so can't vouch for clients"
    assert refused(path) == f"it {reason}"
    path.write_bytes(ca.pem + issued.chain_pem)
    assert refused(path) == f"certificate 2 {reason}"


# Loading


def test_nothing_is_left_open(server: Certificate) -> None:
    before = len(os.listdir("/proc/self/fd"))
    server_context(server)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_openssl_refuses_is_told(ca: Authority, server: Certificate) -> None:
    before = len(os.listdir("/proc/self/fd"))
    other = attrs.evolve(server, pem=ca.issue("other.test").key_pem + pem(server.chain[0]))
    with pytest.raises(CertificateError) as caught:
        server_context(other)
    [detail] = caught.value.details
    assert detail.startswith("OpenSSL refuses app.test: ")
    with pytest.raises(CertificateError) as caught:
        server_context(server, client_ca=b"-----BEGIN CERTIFICATE-----\n")
    [detail] = caught.value.details
    assert detail.startswith("OpenSSL refuses the client authorities: ")
    assert len(os.listdir("/proc/self/fd")) == before


def test_nobody_is_asked_for_a_password(server: Certificate) -> None:
    """A key that is encrypted is refused before; OpenSSL would ask at the terminal."""
    encrypted = key_pem(make_key(), password=b"secret")
    with pytest.raises(CertificateError):
        server_context(attrs.evolve(server, pem=encrypted + pem(server.chain[0])))
