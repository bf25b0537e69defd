"""TLS contexts for the server's side: what is offered to whom, and with which certificate.

The floor is the same for every service: TLS 1.2 with forward secrecy and authenticated encryption.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from kamal_proxy.tls.certificates import certificate_error
from kamal_proxy.tls.pem import UnusableError, parse_certificates, read_file, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kamal_proxy.tls.certificates import Certificate

#: The protocol of connections that only validate a name (RFC 8737 3).
ACME_ALPN: Final = "acme-tls/1"

# For TLS 1.2; those of 1.3 are all of this kind.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def server_context(
    certificate: Certificate, *, client_ca: bytes | None = None, alpn: Sequence[str] = ()
) -> ssl.SSLContext:
    """Make a context that serves one certificate. Sessions of one context resume in it only.

    Args:
        certificate: What it serves.
        client_ca: Clients must show a certificate that one of these issued
            (``load_client_ca``).
        alpn: The protocols to offer, best first. A client that knows none of them is served
            without one.

    Raises:
        CertificateError: OpenSSL does not take the certificate, or the authorities.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    # Renegotiation costs a handshake for the asking, and compression gives secrets away.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # One that can be used once costs a third less than two, and each new connection brings another.
    context.num_tickets = 1
    if alpn:
        context.set_alpn_protocols(list(alpn))
    _load(context, certificate)
    if client_ca is not None:
        try:
            context.load_verify_locations(cadata=client_ca.decode())
        except (ssl.SSLError, ValueError) as error:
            raise certificate_error(f"OpenSSL refuses the client authorities: {error}") from error
        # An intermediate that is given is trusted by itself, without its root.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def challenge_context(certificate: Certificate) -> ssl.SSLContext:
    """Make a context for the connections with which an ACME server validates a name (RFC 8737)."""
    return server_context(certificate, alpn=[ACME_ALPN])


def load_client_ca(path: str) -> bytes:
    """Read the authorities whose client certificates are accepted.

    Returns:
        The certificates in PEM, one after another, as ``server_context`` takes them.

    Raises:
        CertificateError: the file can't be read, or is not PEM with at least one certificate.
    """
    try:
        authorities = parse_certificates(read_file(path))
        for number, each in enumerate(authorities, 1):
            if not _is_authority(each):
                which = "it" if len(authorities) == 1 else f"certificate {number}"
                raise UnusableError(
                    f"{which} is not a certificate authority's, and so can't vouch for clients"
                )
    except UnusableError as error:
        raise certificate_error(f"{shown(path)}: {error}") from error
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in authorities)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except x509.ExtensionNotFound:
        # Roots of version 1 say nothing; one that signed itself is the only one it vouches for.
        return certificate.issuer == certificate.subject
    return constraints.value.ca


def _load(context: ssl.SSLContext, certificate: Certificate) -> None:
    """Give a context its certificate: the bytes that were checked, from no file on a disk."""
    descriptor = os.memfd_create("certificate")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(certificate.pem)
        # The password is never asked for: the key is not encrypted, and nobody sits there.
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
    except OSError as error:  # which ssl.SSLError is too
        names = ", ".join(certificate.names) or "a certificate without names"
        raise certificate_error(f"OpenSSL refuses {names}: {error}") from error
    finally:
        os.close(descriptor)
