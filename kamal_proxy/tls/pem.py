"""Certificates and keys in PEM files: reading and parsing them, or saying why that can't be done.

What is wrong is said with what would be right, because an operator reads it after a deploy; which
file it is about is said by the caller. Blocking file IO, which never waits for a FIFO or a device.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

#: Bytes that a file of certificates or a key may have.
MAX_FILE_SIZE: Final = 256 * 1024
MIN_RSA_BITS: Final = 2048
#: The elliptic curves that every TLS client knows, and how people call them.
CURVES: Final = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}

Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_KINDS = "ECDSA (P-256, P-384, P-521), RSA and Ed25519"
_CERTIFICATE_BEGIN = b"-----BEGIN CERTIFICATE-----"
_KEY_BEGIN = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
_ENCRYPTED_KEY = re.compile(
    rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: ?4,ENCRYPTED", re.MULTILINE
)
# What the parser raises that is not the caller's mistake.
_MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_DER_SEQUENCE = b"\x30"
_KIB = 1024


class UnusableError(Exception):
    """A file, or what was given instead, can't be used; says why."""


def read_file(path: str) -> bytes:
    """Read a file.

    Raises:
        UnusableError: it can't be read, is no regular file, is empty, or larger than MAX_FILE_SIZE.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnusableError("not a regular file")
            content = file.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UnusableError(f"{reason[:1].lower()}{reason[1:]}") from error
    except ValueError as error:
        raise UnusableError("not a path") from error
    if len(content) > MAX_FILE_SIZE:
        raise UnusableError(f"larger than {MAX_FILE_SIZE // _KIB} KiB")
    if not content.strip():
        raise UnusableError("the file is empty")
    return content


def _open(path: str, flags: int) -> int:
    # Does not wait for the other side of a FIFO.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def shown(path: str) -> str:
    """Return a path as it can be printed, whatever bytes it is made of."""
    return "".join(c if c.isprintable() else "\ufffd" for c in path)


def parse_certificates(data: bytes) -> tuple[x509.Certificate, ...]:
    """Parse certificates in PEM; what stands between them is skipped.

    Raises:
        UnusableError: there is none, or a malformed one.
    """
    if _CERTIFICATE_BEGIN not in data:
        if _KEY_BEGIN.search(data):
            raise UnusableError(
                "it holds a private key and no certificate; are the two files swapped?"
            )
        if data.startswith(_DER_SEQUENCE):
            raise UnusableError(
                "not PEM, but perhaps DER; openssl x509 -inform der -in OLD -out NEW converts it"
            )
        raise UnusableError("not PEM: there is no line -----BEGIN CERTIFICATE----- in it")
    try:
        chain = tuple(x509.load_pem_x509_certificates(data))
        for each in chain:
            # Parsed on first use.
            each.extensions, each.issuer, each.subject, each.not_valid_after_utc  # noqa: B018
    except _MALFORMED as error:
        raise UnusableError(f"a certificate in it is malformed: {_first_line(error)}") from error
    return chain


def parse_key(data: bytes) -> Key:
    """Parse a private key in PEM; what stands before it is skipped.

    Raises:
        UnusableError: there is none, or it is malformed, encrypted, of a kind or a curve that TLS
            clients or this proxy do not support, or too short.
    """
    if not _KEY_BEGIN.search(data):
        if _CERTIFICATE_BEGIN in data:
            raise UnusableError(
                "it holds a certificate and no private key; are the two files swapped?"
            )
        if data.startswith(_DER_SEQUENCE):
            raise UnusableError(
                "not PEM, but perhaps DER; openssl pkey -inform der -in OLD -out NEW converts it"
            )
        raise UnusableError("not PEM: there is no line -----BEGIN PRIVATE KEY----- in it")
    if _ENCRYPTED_KEY.search(data):
        raise UnusableError(
            "the key is encrypted, and nobody can be asked for its password; "
            "openssl pkey -in OLD -out NEW decrypts it"
        )
    try:
        key = serialization.load_pem_private_key(_only_key(data), password=None)
    except _MALFORMED as error:
        raise UnusableError(f"the key is malformed: {_first_line(error)}") from error
    if not isinstance(key, Key):
        raise UnusableError(f"keys of this kind are not supported; {_KINDS} are")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < MIN_RSA_BITS:
        raise UnusableError(
            f"an RSA key of {key.key_size} bits is too short; at least {MIN_RSA_BITS} are needed"
        )
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name not in CURVES:
        raise UnusableError(
            f"the curve {key.curve.name} is not supported; {', '.join(CURVES.values())} are"
        )
    return key


def _only_key(data: bytes) -> bytes:
    """Leave out what may stand before a key: its certificate, the parameters of its curve."""
    begin = _KEY_BEGIN.search(data)
    assert begin is not None
    return data[begin.start() :]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
