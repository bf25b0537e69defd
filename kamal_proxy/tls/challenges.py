"""How a certificate authority is shown that a host is ours: the two challenges, and their answers.

Those are HTTP-01 (RFC 8555 8.3) and TLS-ALPN-01 (RFC 8737). Answers are in memory, for this
process, and in the store, for those that share it.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kamal_proxy.tls.certificates import parse_certificate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from acme.challenges import KeyAuthorizationChallenge
    from josepy.jwk import JWK

    from kamal_proxy.tls.certificates import Certificate
    from kamal_proxy.tls.store import CertificateStore

HTTP = "http-01"
TLS = "tls-alpn-01"
#: In the order in which they are tried. HTTP-01 works behind a CDN as well, and with any of the
#: proxies that share a store.
KINDS = (HTTP, TLS)

_ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
_OCTET_STRING = 4  # the tag in DER
_VALID_FOR = datetime.timedelta(days=7)


def challenge_certificate(host: str, digest: bytes) -> tuple[bytes, bytes]:
    """Make the certificate that answers a TLS-ALPN-01 challenge (RFC 8737 3).

    Args:
        host: The name to be validated.
        digest: What the challenge demands.

    Returns:
        The certificate and its key, as PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID_FOR)
        .not_valid_after(now + _VALID_FOR)
        # Critical, since the subject is empty (RFC 5280 4.2.1.6).
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
        .add_extension(
            x509.UnrecognizedExtension(
                _ACME_IDENTIFIER, bytes((_OCTET_STRING, len(digest))) + digest
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem(key)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as Go's autocert writes it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


class Answers:
    """The answers that can be given now; written by threads, read by the event loop."""

    def __init__(self) -> None:
        self._tokens: dict[str, bytes] = {}
        self._certificates: dict[str, Certificate] = {}

    def token(self, token: str) -> bytes | None:
        """Return the answer to an HTTP-01 challenge."""
        return self._tokens.get(token)

    def certificate(self, host: str) -> Certificate | None:
        """Return the certificate that answers a TLS-ALPN-01 challenge."""
        return self._certificates.get(host)

    @contextlib.contextmanager
    def shown(
        self,
        store: CertificateStore,
        host: str,
        challenge: KeyAuthorizationChallenge,
        account_key: JWK,
    ) -> Iterator[None]:
        """Answer a challenge meanwhile.

        Args:
            store: Where other processes look for answers.
            host: The name to be validated.
            challenge: The challenge.
            account_key: The private key of the account.

        Raises:
            CertificateStoreError: the answer can't be saved.
        """
        if challenge.typ == TLS:
            digest = challenge.validation(account_key)
            files = challenge_certificate(host, digest)
            certificate = parse_certificate(*files)
            try:
                store.save_challenge(host, *files)
                self._certificates[host] = certificate
                yield
            finally:
                # Another attempt, at another authority, may have begun meanwhile.
                if self._certificates.get(host) is certificate:
                    del self._certificates[host]
                store.remove_challenge(host)
        else:
            token = challenge.encode("token")
            try:
                store.save_token(token, challenge.key_authorization(account_key).encode())
                self._tokens[token] = challenge.key_authorization(account_key).encode()
                yield
            finally:
                self._tokens.pop(token, None)
                store.remove_token(token)
