"""Certificates and keys: what is accepted, what it is like, and what is said about the others."""

from __future__ import annotations

import base64
import contextlib
import datetime
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.errors import CertificateError
from kamal_proxy.tls.certificates import Certificate, load_certificate, parse_certificate
from kamal_proxy.tls.pem import UnusableError, parse_certificates, parse_key
from tests.certificates import (
    Authority,
    Issued,
    Key,
    KeyKind,
    key_pem,
    make_ca,
    make_key,
    pem,
    rsa_key,
    self_signed,
)
from tests.fuzzing import at_least
from tests.no_files import make_device, make_directory, make_fifo, make_loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DAY = 24 * 3600.0
BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SWAPPED = "are the two files swapped?"


@pytest.fixture(scope="module")
def ca() -> Authority:
    return make_ca()


def parsed(issued: Issued) -> Certificate:
    return parse_certificate(issued.chain_pem, issued.key_pem)


def refused(chain_pem: bytes, key: bytes) -> list[str]:
    with pytest.raises(CertificateError) as caught:
        parse_certificate(chain_pem, key, certificate_name="tls.crt", key_name="tls.key")
    assert str(caught.value) == "unable to load certificate"
    assert caught.value.code == "certificate"
    assert caught.value.details
    return list(caught.value.details)


# What is accepted


def test_what_a_certificate_is_like(ca: Authority) -> None:
    issued = ca.issue(
        "App.Test", "*.app.test", "192.0.2.1", "2001:DB8::1", not_before=BEGIN, days=90
    )
    certificate = parsed(issued)
    assert certificate.names == ("app.test", "*.app.test", "192.0.2.1", "2001:db8::1")
    assert certificate.not_before == BEGIN.timestamp()
    assert certificate.not_after == BEGIN.timestamp() + 90 * DAY
    assert certificate.issuer == "test CA"
    assert certificate.key_type == "ECDSA P-256"
    assert certificate.serial == issued.certificate.serial_number
    assert certificate.fingerprint == issued.certificate.fingerprint(hashes.SHA256()).hex()
    assert certificate.chain == (issued.certificate,)
    assert certificate.pem == issued.key_pem + issued.chain_pem
    assert certificate != parsed(issued), "a live object: each is itself"


def test_its_key_is_not_shown(ca: Authority) -> None:
    shown = repr(parsed(ca.issue("app.test")))
    assert "app.test" in shown
    assert "PRIVATE" not in shown
    assert "PrivateKey" not in shown


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("ec", "ECDSA P-256"),
        (ec.generate_private_key(ec.SECP384R1()), "ECDSA P-384"),
        (ec.generate_private_key(ec.SECP521R1()), "ECDSA P-521"),
        ("rsa", "RSA 2048"),
        ("ed25519", "Ed25519"),
    ],
)
def test_kinds_of_keys(ca: Authority, key: KeyKind | Key, kind: str) -> None:
    issued = ca.issue("app.test", key=key)
    assert parsed(issued).key_type == kind
    assert parse_certificate(issued.chain_pem, key_pem(issued.key)).key_type == kind


@pytest.mark.parametrize("key", ["ec", "rsa"])
def test_older_formats_of_keys(ca: Authority, key: KeyKind) -> None:
    issued = ca.issue("app.test", key=key)
    older = key_pem(issued.key, traditional=True)
    assert b"BEGIN PRIVATE" not in older
    assert parse_certificate(issued.chain_pem, older).pem == issued.key_pem + issued.chain_pem


def test_parameters_before_a_key(ca: Authority) -> None:
    """Such files are what ``openssl ecparam -genkey`` writes."""
    issued = ca.issue("app.test")
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    key = parameters + key_pem(issued.key, traditional=True)
    assert parse_certificate(issued.chain_pem, key).key_type == "ECDSA P-256"


def test_text_around_and_other_line_ends(ca: Authority) -> None:
    issued = ca.intermediate().issue("app.test")
    noise = b"subject=CN = app.test\nissuer=CN = test CA\n\n"
    chain = noise + issued.chain_pem.replace(b"-----BEGIN", noise + b"-----BEGIN")
    for change in (bytes, lambda data: data.replace(b"\n", b"\r\n")):
        certificate = parse_certificate(change(chain), change(noise + issued.key_pem + noise))
        assert certificate.pem == issued.key_pem + issued.chain_pem, "it is written anew"


def test_both_in_one_file(ca: Authority, tmp_path: Path) -> None:
    issued = ca.intermediate().issue("app.test")
    path = tmp_path / "both.pem"
    for content in (issued.key_pem + issued.chain_pem, issued.chain_pem + issued.key_pem):
        path.write_bytes(content)
        assert len(load_certificate(str(path), str(path)).chain) == 2


def test_a_self_signed_certificate_with_only_a_common_name() -> None:
    certificate = parsed(self_signed("App.Test."))
    assert certificate.names == ("app.test",)
    assert certificate.issuer == "App.Test."
    assert certificate.warnings(certificate.not_before) == ()


def test_the_common_name_counts_only_without_alternative_names(ca: Authority) -> None:
    assert parsed(ca.issue("a.test", common_name="b.test")).names == ("a.test",)


def test_a_certificate_without_names(ca: Authority) -> None:
    certificate = parsed(ca.issue(common_name=""))
    assert certificate.names == ()
    assert not certificate.matches("")
    assert certificate.warnings(certificate.not_before) == ("it names nobody whom it is for",)


def test_an_issuer_without_a_common_name() -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Example")])
    key = make_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(BEGIN)
        .not_valid_after(BEGIN + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    assert parse_certificate(pem(certificate), key_pem(key)).issuer == "O=Example"


# Names


@pytest.mark.parametrize(
    ("name", "host", "matches"),
    [
        ("app.test", "app.test", True),
        ("app.test", "APP.test.", True),
        ("app.test", "www.app.test", False),
        ("app.test", "", False),
        ("*.app.test", "www.app.test", True),
        ("*.app.test", "WWW.app.test", True),
        ("*.app.test", "app.test", False),
        ("*.app.test", ".app.test", False),
        ("*.app.test", "a.b.app.test", False),
        ("*.app.test", "a.xapp.test", False),
        ("*.app.test", "*.app.test", True),
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8:0:0::1", True),
        ("2001:db8::1", "2001:DB8::1", True),
        ("2001:db8::1", "2001:db8::2", False),
    ],
)
def test_matching(ca: Authority, name: str, host: str, matches: bool) -> None:
    assert parsed(ca.issue(name)).matches(host) is matches
    assert parsed(ca.issue("other.test", name)).matches(host) is matches


# Warnings


@pytest.mark.parametrize(
    ("at", "warning"),
    [
        (-1.0, "not valid yet"),
        (0.0, None),
        (90 * DAY - 14 * DAY, None),
        (90 * DAY - 14 * DAY + 1, "expires in 13 days"),
        (90 * DAY - 1.5 * DAY, "expires in 1 day"),
        (90 * DAY - 1, "expires in 0 days"),
        (90 * DAY, "expired"),
    ],
)
def test_warnings_about_time(ca: Authority, at: float, warning: str | None) -> None:
    certificate = parsed(ca.issue("app.test", not_before=BEGIN, days=90))
    expected = () if warning is None else (warning,)
    assert certificate.warnings(BEGIN.timestamp() + at) == expected


def test_an_expired_certificate_is_accepted(ca: Authority) -> None:
    assert parsed(ca.issue("app.test", not_before=BEGIN, days=1)).names == ("app.test",)


def test_a_warning_about_the_chain(ca: Authority) -> None:
    middle = ca.intermediate()
    issued = middle.issue("app.test")
    inner = middle.intermediate("inner").issue("app.test")
    right = parsed(inner)
    assert [len(each.chain) for each in (parsed(issued), right)] == [2, 3]
    assert right.warnings(right.not_before) == ()
    wrong = parse_certificate(issued.chain_pem + make_ca("other").pem, issued.key_pem)
    assert wrong.warnings(wrong.not_before) == (
        "certificate 3 of the chain did not issue the one before it; clients may not trust it",
    )
    leaf, first, second = inner.chain_pem.split(b"-----BEGIN")[1:]
    mixed = b"".join(b"-----BEGIN" + each for each in (leaf, second, first))
    assert len(parse_certificate(mixed, inner.key_pem).warnings(right.not_before)) == 2


def test_a_warning_about_missing_intermediates() -> None:
    ca = make_ca()
    key = make_key()
    access = x509.AuthorityInformationAccess(
        [
            x509.AccessDescription(
                AuthorityInformationAccessOID.CA_ISSUERS,
                x509.UniformResourceIdentifier("http://ca.test/ca.crt"),
            )
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(BEGIN)
        .not_valid_after(BEGIN + datetime.timedelta(days=90))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("app.test")]), critical=True)
        .add_extension(access, critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    alone = parse_certificate(pem(certificate), key_pem(key))
    assert alone.warnings(alone.not_before) == (
        "the chain ends with it; most clients need the intermediates after it",
    )
    whole = parse_certificate(pem(certificate, ca.certificate), key_pem(key))
    assert whole.warnings(whole.not_before) == ()


def test_a_warning_about_its_usage(ca: Authority) -> None:
    certificate = parsed(ca.issue("app.test", client=True))
    assert certificate.warnings(certificate.not_before) == (
        "its extended key usage does not allow servers",
    )


# What is refused


def test_files_that_are_swapped(ca: Authority) -> None:
    issued = ca.issue("app.test")
    assert refused(issued.key_pem, issued.chain_pem) == [
        f"tls.crt: it holds a private key and no certificate; {SWAPPED}",
        f"tls.key: it holds a certificate and no private key; {SWAPPED}",
    ]
    older = key_pem(issued.key, traditional=True)
    assert SWAPPED in refused(older, issued.key_pem)[0]
    assert refused(issued.chain_pem, issued.chain_pem) == [
        f"tls.key: it holds a certificate and no private key; {SWAPPED}"
    ]


def test_what_is_not_pem(ca: Authority) -> None:
    issued = ca.issue("app.test")
    assert refused(b"hello", b"\xff\xfe") == [
        "tls.crt: not PEM: there is no line -----BEGIN CERTIFICATE----- in it",
        "tls.key: not PEM: there is no line -----BEGIN PRIVATE KEY----- in it",
    ]
    der = issued.certificate.public_bytes(serialization.Encoding.DER)
    key = base64.b64decode(b"".join(issued.key_pem.splitlines()[1:-1]))
    assert refused(der, key) == [
        "tls.crt: not PEM, but perhaps DER; openssl x509 -inform der -in OLD -out NEW converts it",
        "tls.key: not PEM, but perhaps DER; openssl pkey -inform der -in OLD -out NEW converts it",
    ]
    request = b"-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"
    assert "BEGIN CERTIFICATE" in refused(request, issued.key_pem)[0]


def test_what_is_malformed(ca: Authority) -> None:
    issued = ca.issue("app.test")
    lines = issued.chain_pem.splitlines(keepends=True)
    cut = b"".join([*lines[:3], lines[-1]])
    [line] = refused(cut, issued.key_pem)
    assert line.startswith("tls.crt: a certificate in it is malformed: ")
    [line] = refused(issued.chain_pem + cut, issued.key_pem)
    assert line.startswith("tls.crt: a certificate in it is malformed: ")
    [line] = refused(b"".join(lines[:-1]), issued.key_pem)
    assert line.startswith("tls.crt: a certificate in it is malformed: ")
    lines = issued.key_pem.splitlines(keepends=True)
    [line] = refused(issued.chain_pem, lines[0] + lines[1][:20] + b"\n" + lines[-1])
    assert line.startswith("tls.key: the key is malformed: ")


@pytest.mark.parametrize("traditional", [False, True])
def test_an_encrypted_key(ca: Authority, traditional: bool) -> None:
    issued = ca.issue("app.test")
    key = key_pem(issued.key, password=b"secret", traditional=traditional)
    assert refused(issued.chain_pem, key) == [
        "tls.key: the key is encrypted, and nobody can be asked for its password; "
        "openssl pkey -in OLD -out NEW decrypts it"
    ]


def test_a_key_of_another_certificate(ca: Authority) -> None:
    issued = ca.issue("app.test")
    for other in (make_key("ec"), make_key("rsa"), make_key("ed25519")):
        assert refused(issued.chain_pem, key_pem(other)) == [
            "tls.key: the private key does not belong to the certificate"
        ]


def test_a_leaf_that_does_not_come_first(ca: Authority) -> None:
    middle = ca.intermediate()
    issued = middle.issue("app.test")
    leaf, upper = issued.chain_pem.split(b"-----BEGIN")[1:]
    chain = b"-----BEGIN" + upper + b"-----BEGIN" + leaf
    assert refused(chain, issued.key_pem) == [
        "tls.crt: the private key belongs to certificate 2 in it; that one must come first, and "
        "then the intermediates"
    ]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (rsa_key(1024), "an RSA key of 1024 bits is too short; at least 2048 are needed"),
        (
            ec.generate_private_key(ec.SECP256K1()),
            "the curve secp256k1 is not supported; P-256, P-384, P-521 are",
        ),
        (
            ec.generate_private_key(ec.SECP224R1()),
            "the curve secp224r1 is not supported; P-256, P-384, P-521 are",
        ),
        (
            ed448.Ed448PrivateKey.generate(),
            "keys of this kind are not supported; ECDSA (P-256, P-384, P-521), RSA and Ed25519 are",
        ),
        (
            dsa.generate_private_key(1024),
            "keys of this kind are not supported; ECDSA (P-256, P-384, P-521), RSA and Ed25519 are",
        ),
    ],
)
def test_keys_of_other_kinds(
    ca: Authority, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, reason: str
) -> None:
    # The certificate is for another key: what is wrong with this one comes first.
    issued = ca.issue("app.test")
    assert refused(issued.chain_pem, key_pem(key)) == [f"tls.key: {reason}"]


def test_an_extension_that_comes_twice(ca: Authority) -> None:
    """A certificate that only a broken tool makes: the identifier of its key is there twice."""
    issued = ca.issue("app.test")
    der = issued.certificate.public_bytes(serialization.Encoding.DER)
    identifier = bytes.fromhex("0603551d0e")  # subject key identifier
    authority = bytes.fromhex("0603551d23")
    assert der.count(authority) == 1
    twice = der.replace(authority, identifier)
    text = b"-----BEGIN CERTIFICATE-----\n%b-----END CERTIFICATE-----\n" % base64.encodebytes(twice)
    [line] = refused(text, issued.key_pem)
    assert line.startswith("tls.crt: a certificate in it is malformed: ")


# Files


def test_loading(ca: Authority, tmp_path: Path) -> None:
    issued = ca.issue("app.test")
    paths = issued.write(tmp_path)
    certificate = load_certificate(*paths)
    for path in paths:
        os.unlink(path)
    assert certificate.names == ("app.test",)


def details(certificate_path: object, key_path: object) -> list[str]:
    with pytest.raises(CertificateError) as caught:
        load_certificate(str(certificate_path), str(key_path))
    return list(caught.value.details)


def make_nothing(path: Path) -> None:
    """There is no such file."""


def make_empty(path: Path) -> None:
    path.write_bytes(b" \n")


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_fifo, "not a regular file"),
        (make_device, "not a regular file"),
        (make_directory, "is a directory"),
        (make_loop, "too many levels of symbolic links"),
        (make_nothing, "no such file or directory"),
        (make_empty, "the file is empty"),
        (make_large, "larger than 256 KiB"),
    ],
)
def test_files_that_can_not_be_read(
    ca: Authority, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    bad = tmp_path / "bad.pem"
    make(bad)
    certificate_path, key_path = ca.issue("app.test").write(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert details(bad, key_path) == [f"{bad}: {reason}"]
    assert details(certificate_path, bad) == [f"{bad}: {reason}"]
    assert details(bad, bad) == [f"{bad}: {reason}"]
    other = tmp_path / "other"
    assert details(other, bad) == [f"{other}: no such file or directory", f"{bad}: {reason}"]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_may_not_be_read(ca: Authority, tmp_path: Path) -> None:
    certificate_path, key_path = ca.issue("app.test").write(tmp_path)
    os.chmod(key_path, 0)
    assert details(certificate_path, key_path) == [f"{key_path}: permission denied"]


def test_the_size_of_a_file_is_limited(ca: Authority, tmp_path: Path) -> None:
    issued = ca.issue("app.test")
    certificate_path, key_path = issued.write(tmp_path)
    with open(certificate_path, "ab") as file:
        file.write(b"\n" * (256 * 1024 - len(issued.chain_pem)))
    assert load_certificate(certificate_path, key_path).names == ("app.test",)
    with open(certificate_path, "ab") as file:
        file.write(b"\n")
    assert details(certificate_path, key_path) == [f"{certificate_path}: larger than 256 KiB"]


def test_errors_name_the_files(ca: Authority, tmp_path: Path) -> None:
    issued = ca.issue("app.test")
    certificate_path, key_path = issued.write(tmp_path)
    assert details(key_path, key_path)[0].startswith(f"{key_path}: it holds a private key")
    with open(key_path, "wb") as file:
        file.write(key_pem(make_key()))
    assert details(certificate_path, key_path) == [
        f"{key_path}: the private key does not belong to the certificate"
    ]


@pytest.mark.parametrize("path", ["/\0", "/\ud800"])
def test_what_is_no_path(path: str) -> None:
    assert details(path, path) == ["/\ufffd: not a path"]


def test_what_openssl_writes(tmp_path: Path) -> None:
    """The real tool: a self-signed certificate as a user makes it, with an encrypted key too."""
    certificate_path, key_path = tmp_path / "a.crt", tmp_path / "a.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3"
    subprocess.run(
        [*command.split(), "-subj", "/CN=app.test", "-keyout", key_path, "-out", certificate_path],
        check=True,
        capture_output=True,
    )
    certificate = load_certificate(str(certificate_path), str(key_path))
    assert certificate.names == ("app.test",)
    assert certificate.key_type == "ECDSA P-256"
    encrypted = tmp_path / "b.key"
    subprocess.run(
        [*["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in"], key_path, "-out", encrypted],
        check=True,
        capture_output=True,
    )
    assert "is encrypted" in details(certificate_path, encrypted)[0]


# Any bytes

ISSUED = self_signed("app.test", "app.test", "192.0.2.1")


@pytest.mark.fuzz
@at_least(200)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_changed_certificates_and_keys(changes: list[tuple[int, int]], certificate: bool) -> None:
    kind = b"CERTIFICATE" if certificate else b"PRIVATE KEY"
    pem_bytes = ISSUED.chain_pem if certificate else ISSUED.key_pem
    der = bytearray(base64.b64decode(b"".join(pem_bytes.splitlines()[1:-1])))
    for position, value in changes:
        der[position % len(der)] = value
    text = b"-----BEGIN %b-----\n%b-----END %b-----\n" % (kind, base64.encodebytes(der), kind)
    chain, key = (text, ISSUED.key_pem) if certificate else (ISSUED.chain_pem, text)
    try:
        found = parse_certificate(chain, key)
    except CertificateError:
        return
    found.warnings(0.0)
    found.matches("app.test")


LINES = [
    b"-----BEGIN CERTIFICATE-----",
    b"-----END CERTIFICATE-----",
    b"-----BEGIN PRIVATE KEY-----",
    b"-----END PRIVATE KEY-----",
    b"-----BEGIN EC PRIVATE KEY-----",
    b"-----BEGIN EC PARAMETERS-----",
    b"-----BEGIN ENCRYPTED PRIVATE KEY-----",
    b"Proc-Type: 4,ENCRYPTED",
    b"",
    b"AAAA",
    b"=",
    ISSUED.chain_pem,
    ISSUED.key_pem,
    b"\n".join(ISSUED.chain_pem.splitlines()[1:-1]),
    b"\n".join(ISSUED.key_pem.splitlines()[1:-1]),
]
FILES = st.lists(st.sampled_from(LINES) | st.binary(max_size=20), max_size=8).map(b"\n".join)


@pytest.mark.fuzz
@at_least(200)
@given(FILES, FILES)
def test_any_files(chain: bytes, key: bytes) -> None:
    with contextlib.suppress(CertificateError):
        parse_certificate(chain, key)
    with contextlib.suppress(UnusableError):
        parse_certificates(key)
    with contextlib.suppress(UnusableError):
        parse_key(chain)
