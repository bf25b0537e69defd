"""Certificate authorities, certificates and keys for tests: made in memory, RSA keys once a run."""

from __future__ import annotations

import datetime
import functools
import ipaddress
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
KeyKind: TypeAlias = Literal["ec", "rsa", "ed25519"]

#: Certificates begin to be valid a little before now, as those of real authorities do.
_HEAD_START = datetime.timedelta(hours=1)


@attrs.frozen(eq=False)
class Issued:
    """A certificate and its key.

    Attributes:
        chain_pem: The leaf, then the intermediates; what a certificate file holds.
        key_pem: The private key (PKCS #8).
        certificate: The leaf.
        key: The private key.
    """

    chain_pem: bytes
    key_pem: bytes
    certificate: x509.Certificate
    key: Key

    def write(self, directory: Path, name: str = "tls") -> tuple[str, str]:
        """Write the two files and return their paths: certificate, key."""
        paths = directory / f"{name}.crt", directory / f"{name}.key"
        paths[0].write_bytes(self.chain_pem)
        paths[1].write_bytes(self.key_pem)
        return str(paths[0]), str(paths[1])


@attrs.frozen(eq=False)
class Authority:
    """A certificate authority: a root, or an intermediate whose chain ends below the root."""

    certificate: x509.Certificate
    key: Key
    above: tuple[x509.Certificate, ...] = ()  # the intermediates from this one upwards

    @property
    def pem(self) -> bytes:
        """This authority's own certificate: what clients of a root trust."""
        return pem(self.certificate)

    def issue(
        self,
        *names: str,
        key: KeyKind | Key = "ec",
        days: float = 90,
        not_before: datetime.datetime | None = None,
        client: bool = False,
        common_name: str | None = None,
    ) -> Issued:
        """Issue a certificate for DNS names and addresses.

        Args:
            names: What the subject alternative names hold; none of them leaves the extension out.
            key: Kind of key, or a key.
            days: How long it is valid.
            not_before: When that begins; a moment ago by default.
            client: Whether it is for TLS clients, not servers.
            common_name: The subject; the first name by default.
        """
        private = make_key(key)
        if common_name is None:
            common_name = names[0] if names else "test"
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = _builder(common_name, self.certificate.subject, private, days, not_before)
        builder = builder.add_extension(
            x509.BasicConstraints(ca=False, path_length=None), critical=True
        ).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(_alternative_names(names), critical=False)
        leaf = _signed(builder, self.key, self.certificate)
        return _issued(private, leaf, *self.above)

    def intermediate(self, name: str = "test intermediate") -> Authority:
        """Make an authority below this one; what it issues carries it in its chain."""
        private = make_key("ec")
        builder = _as_authority(
            _builder(name, self.certificate.subject, private, 3650, None), private
        )
        certificate = _signed(builder, self.key, self.certificate)
        return Authority(certificate, private, (certificate, *self.above))


def make_ca(name: str = "test CA", key: KeyKind = "ec") -> Authority:
    """Make a root authority, with a key of its own."""
    private = make_key(key)
    builder = _builder(name, _name(name), private, 3650, None)
    return Authority(_signed(_as_authority(builder, private), private, None), private)


def self_signed(
    common_name: str,
    *names: str,
    key: KeyKind | Key = "ec",
    days: float = 90,
    not_before: datetime.datetime | None = None,
) -> Issued:
    """Make a self-signed certificate; without names only its common name says whom it is for."""
    private = make_key(key)
    builder = _builder(common_name, _name(common_name), private, days, not_before)
    if names:
        builder = builder.add_extension(_alternative_names(names), critical=False)
    return _issued(private, _signed(builder, private, None))


def make_key(kind: KeyKind | Key = "ec") -> Key:
    """Make a private key; the RSA key (2048 bits) is the same one all along."""
    if kind == "rsa":
        return rsa_key(2048)
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return kind


@functools.cache
def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """Make the RSA key of this size; the same one all along, for they take long to make."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def pem(*certificates: x509.Certificate) -> bytes:
    """Write certificates one after another."""
    encoding = serialization.Encoding.PEM
    return b"".join(certificate.public_bytes(encoding) for certificate in certificates)


def key_pem(key: Key, *, password: bytes | None = None, traditional: bool = False) -> bytes:
    """Write a private key.

    Args:
        key: The key.
        password: Encrypts it.
        traditional: Whether in the format of before PKCS #8 (``BEGIN EC PRIVATE KEY``).
    """
    formats = serialization.PrivateFormat
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    layout = formats.TraditionalOpenSSL if traditional else formats.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, layout, encryption)


def _issued(key: Key, *chain: x509.Certificate) -> Issued:
    return Issued(pem(*chain), key_pem(key), chain[0], key)


def _name(common_name: str) -> x509.Name:
    if not common_name:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    common_name: str,
    issuer: x509.Name,
    key: Key,
    days: float,
    not_before: datetime.datetime | None,
) -> x509.CertificateBuilder:
    if not_before is None:
        not_before = datetime.datetime.now(datetime.UTC) - _HEAD_START
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_before + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _as_authority(builder: x509.CertificateBuilder, key: Key) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    ).add_extension(usage, critical=True)


def _signed(
    builder: x509.CertificateBuilder, key: Key, issuer: x509.Certificate | None
) -> x509.Certificate:
    if issuer is not None:
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value),
            critical=False,
        )
    # Ed25519 signs without a digest of its own.
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest)


def _alternative_names(names: tuple[str, ...]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_alternative_name(name) for name in names])


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
