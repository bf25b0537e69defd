"""Certificates with their keys: read from files or memory, checked, and described in words.

Reading files blocks; the caller runs it in a thread. Which errors are possible in a file is
``pem``'s business, and how a connection uses a certificate is that of ``contexts``.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from kamal_proxy.errors import CertificateError
from kamal_proxy.tls.pem import (
    CURVES,
    Key,
    UnusableError,
    parse_certificates,
    parse_key,
    read_file,
    shown,
)

#: Seconds before its end from which on a certificate is warned of.
EXPIRES_SOON: Final = 14 * 24 * 3600.0

_SERVER_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}


@attrs.frozen(eq=False)
class Certificate:
    """A certificate for TLS servers, with its key; made by ``parse_certificate``.

    Attributes:
        pem: Key and chain in PEM, as what was checked is written anew.
        chain: The leaf, then what vouches for it.
        key: The private key of the leaf.
        names: Whom it is for, in lower case: the DNS names and addresses among the subject
            alternative names; the subject's common name if there are none.
        not_before: When it begins to be valid, in Unix seconds.
        not_after: When that ends, likewise.
        issuer: Who issued it: the common name, or all of the name if it has none.
        key_type: ``ECDSA P-256``, ``RSA 2048``, ``Ed25519``.
        serial: Its number at the issuer.
        fingerprint: SHA-256 of the leaf, in hex.
    """

    pem: bytes = attrs.field(repr=False)
    chain: tuple[x509.Certificate, ...] = attrs.field(repr=False)
    key: Key = attrs.field(repr=False)
    names: tuple[str, ...]
    not_before: float
    not_after: float
    issuer: str
    key_type: str
    serial: int
    fingerprint: str

    def matches(self, host: str) -> bool:
        """Return whether it is for a host; ``*`` stands for exactly one label (RFC 9525 6.3).

        Args:
            host: A DNS name or an address, in any case.
        """
        host = host.lower().removesuffix(".")
        return any(_matches(name, host) for name in self.names)

    def warnings(self, now: float) -> tuple[str, ...]:
        """Say what its clients may not like, though it can be used.

        Args:
            now: The time in Unix seconds.
        """
        found = []
        if now >= self.not_after:
            found.append("expired")
        elif now < self.not_before:
            found.append("not valid yet")
        elif self.not_after - now < EXPIRES_SOON:
            days = int((self.not_after - now) // (24 * 3600))
            found.append(f"expires in {days} day{'' if days == 1 else 's'}")
        leaf = self.chain[0]
        if not self.names:
            found.append("it names nobody whom it is for")
        if _is_for_clients_only(leaf):
            found.append("its extended key usage does not allow servers")
        for number, (lower, upper) in enumerate(zip(self.chain, self.chain[1:], strict=False), 2):
            if lower.issuer != upper.subject:
                found.append(
                    f"certificate {number} of the chain did not issue the one before it; clients "
                    "may not trust it"
                )
        if len(self.chain) == 1 and _names_its_issuer(leaf):
            found.append("the chain ends with it; most clients need the intermediates after it")
        return tuple(found)


def load_certificate(certificate_path: str, key_path: str) -> Certificate:
    """Read a certificate with its chain from one file and its key from another, or the same one.

    Never waits for a FIFO or a device. One that has expired, or is signed by itself, is accepted.

    Raises:
        CertificateError: ``details`` has a line for each file that can't be read, or for what
            ``parse_certificate`` refuses.
    """
    contents: list[bytes] = []
    problems: list[str] = []
    for path in (certificate_path, key_path):
        try:
            contents.append(read_file(path))
        except UnusableError as error:
            problems.append(f"{shown(path)}: {error}")
    if problems:
        raise certificate_error(*dict.fromkeys(problems))
    return parse_certificate(
        *contents, certificate_name=shown(certificate_path), key_name=shown(key_path)
    )


def parse_certificate(
    chain_pem: bytes,
    key_pem: bytes,
    *,
    certificate_name: str = "the certificate",
    key_name: str = "the private key",
) -> Certificate:
    """Check a certificate with its chain, and its key.

    Args:
        chain_pem: The leaf, then the intermediates.
        key_pem: The key of the leaf: PKCS #8, or the older formats of its kind.
        certificate_name: What errors call the certificate: its file.
        key_name: What they call the key.

    Raises:
        CertificateError: one of them is not PEM, is malformed, or is the other one; the key is
            encrypted, of an unsupported kind, too short, or not that of the first certificate.
            ``details`` says which.
    """
    problems: list[str] = []
    chain: tuple[x509.Certificate, ...] = ()
    names: tuple[str, ...] = ()
    key: Key | None = None
    try:
        chain = parse_certificates(chain_pem)
        names = _names(chain[0])
    except UnusableError as error:
        problems.append(f"{certificate_name}: {error}")
    try:
        key = parse_key(key_pem)
        key_type = _key_type(key)
    except UnusableError as error:
        problems.append(f"{key_name}: {error}")
    if problems or key is None:
        raise certificate_error(*problems)
    _check_pair(chain, key, certificate_name, key_name)
    leaf = chain[0]
    return Certificate(
        pem=_key_as_pem(key) + b"".join(_as_pem(each) for each in chain),
        chain=chain,
        key=key,
        names=names,
        not_before=leaf.not_valid_before_utc.timestamp(),
        not_after=leaf.not_valid_after_utc.timestamp(),
        issuer=_common_name(leaf.issuer) or leaf.issuer.rfc4514_string(),
        key_type=key_type,
        serial=leaf.serial_number,
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
    )


def certificate_error(*details: str) -> CertificateError:
    """Make the error about certificates; each detail names a file and what is wrong with it."""
    return CertificateError("unable to load certificate", details)


def _check_pair(
    chain: tuple[x509.Certificate, ...], key: Key, certificate_name: str, key_name: str
) -> None:
    wanted = _public_bytes(key.public_key())
    for number, each in enumerate(chain, 1):
        try:
            found = _public_bytes(each.public_key())
        except (ValueError, UnsupportedAlgorithm):
            continue  # of a kind that the key, which is supported, is not
        if found != wanted:
            continue
        if number == 1:
            return
        raise certificate_error(
            f"{certificate_name}: the private key belongs to certificate {number} in it; that one "
            "must come first, and then the intermediates"
        )
    raise certificate_error(f"{key_name}: the private key does not belong to the certificate")


def _public_bytes(key: object) -> bytes:
    encode = getattr(key, "public_bytes")  # noqa: B009  # every kind has it, but no common base
    encoded = encode(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert isinstance(encoded, bytes)
    return encoded


def _key_type(key: Key) -> str:
    if isinstance(key, rsa.RSAPrivateKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return f"ECDSA {CURVES[key.curve.name]}"
    return "Ed25519"


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    """Return whom a certificate is for."""
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        name = _common_name(leaf.subject).lower().removesuffix(".")
        return (name,) if name else ()
    names = extension.value.get_values_for_type(x509.DNSName)
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    every = [name.lower().removesuffix(".") for name in names] + [str(each) for each in addresses]
    return tuple(dict.fromkeys(every))


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    value = found[-1].value if found else ""
    return value if isinstance(value, str) else ""


def _matches(name: str, host: str) -> bool:
    if name == host:
        return True
    if name.startswith("*."):
        label, dot, rest = host.partition(".")
        return bool(label and dot) and rest == name[2:]
    try:
        return ip_address(name) == ip_address(host)
    except ValueError:
        return False


def _is_for_clients_only(leaf: x509.Certificate) -> bool:
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return False
    return not _SERVER_USAGES & set(usage.value)


def _names_its_issuer(leaf: x509.Certificate) -> bool:
    """Return whether a certificate tells where that of its issuer is: those of public CAs do."""
    try:
        access = leaf.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    except x509.ExtensionNotFound:
        return False
    issuers = AuthorityInformationAccessOID.CA_ISSUERS
    return any(each.access_method == issuers for each in access.value)


def _as_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_as_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
