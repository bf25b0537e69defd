"""What is sent to a certificate authority and taken from it, where the ``acme`` library lacks it.

Knows no network; what an authority has sent and can't be used raises ValueError or AcmeError.
"""

from __future__ import annotations

import base64
import hashlib
import time
from typing import TYPE_CHECKING, Any

from acme import challenges, messages
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from josepy.json_util import field

from kamal_proxy.errors import AcmeError, CertificateError
from kamal_proxy.tls.certificates import parse_certificate
from kamal_proxy.tls.challenges import TLS, key_pem
from kamal_proxy.tls.schedule import Failure

if TYPE_CHECKING:
    import requests
    from cryptography.hazmat.primitives.asymmetric import ec
    from josepy.jwk import JWK


@challenges.ChallengeResponse.register
class TlsAlpn01Response(challenges.KeyAuthorizationChallengeResponse):
    """What tells the authority that it can look."""

    typ = TLS


@challenges.Challenge.register
class TlsAlpn01(challenges.KeyAuthorizationChallenge):
    """The challenge to answer a handshake for the name with a certificate made for the purpose.

    The library lacks it (RFC 8737).
    """

    response_cls = TlsAlpn01Response
    typ = TLS

    def validation(self, account_key: JWK, **_: Any) -> bytes:
        """Return what the certificate has to contain: the digest of the key authorization."""
        return hashlib.sha256(self.key_authorization(account_key).encode()).digest()


class ReplacingOrder(messages.NewOrder):
    """An order that tells which certificate it replaces (RFC 9773 5)."""

    replaces: str = field("replaces")


def renewal_identifier(certificate_pem: bytes) -> str | None:
    """Return by which name an authority knows a certificate (RFC 9773 4.1); None if by none."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    try:
        extension = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return None
    issuer = extension.value.key_identifier
    if issuer is None:
        return None
    serial = certificate.serial_number
    # As in DER, where a first bit that is set would be a sign.
    encoded = serial.to_bytes(serial.bit_length() // 8 + 1, "big")
    return f"{_base64url(issuer)}.{_base64url(encoded)}"


def certificate_request(host: str, key: ec.EllipticCurvePrivateKey) -> messages.CertificateRequest:
    """Return the message that asks for the certificate of a name and a key."""
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return messages.CertificateRequest(csr=request)


def read_order(response: requests.Response) -> messages.Order:
    """Read an order."""
    order: messages.Order = messages.Order.from_json(response.json())
    return order


def read_authorization(response: requests.Response) -> messages.Authorization:
    """Read an authorization."""
    found: messages.Authorization = messages.Authorization.from_json(response.json())
    return found


def read_chain(pem: bytes, key: ec.EllipticCurvePrivateKey, host: str) -> bytes:
    """Return a chain as PEM if it is what was ordered.

    Args:
        pem: What the authority has sent.
        key: The key of the certificate.
        host: The name.

    Raises:
        AcmeError: it is for something else, or has expired.
    """
    what = "the certificate authority sent a certificate"
    try:
        certificate = parse_certificate(pem, key_pem(key))
    except CertificateError as error:
        raise AcmeError(
            f"{what} that can't be used: {error.details[0]}", kind=Failure.REFUSED
        ) from error
    if certificate.not_after <= time.time():
        raise AcmeError(f"{what} that has expired; is the clock right?", kind=Failure.REFUSED)
    if not certificate.matches(host):
        raise AcmeError(f"{what} for {', '.join(certificate.names)}", kind=Failure.REFUSED)
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificate.chain)


def address(value: object) -> str:
    """Return what must be a URL.

    Raises:
        ValueError: it is not even a text.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} where an address should be")
    return value


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
