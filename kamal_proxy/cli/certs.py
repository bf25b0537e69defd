"""``kamal-proxy certs``: the certificates of services with TLS."""

import sys
import time
from datetime import UTC, datetime
from json import dumps
from typing import Annotated

import attrs
from cyclopts import Parameter

from kamal_proxy.cli.arguments import Bool, Host
from kamal_proxy.cli.output import printable, table

_DAY = 86_400.0  # seconds


def list_certificates(
    *,
    json: Annotated[
        Bool, Parameter(help="Print all that is known of them, as JSON, instead of a table")
    ] = False,
) -> None:
    """List the certificates, when they expire and when they will be renewed.

    After the table comes a line for each that could not be obtained, with the words of the
    certificate authority.
    """
    from kamal_proxy.control.client import ControlClient

    certificates = ControlClient().certificates()
    if json:
        documents = [attrs.asdict(certificate) for certificate in certificates]
        sys.stdout.write(dumps(documents, indent=2) + "\n")
        return
    rows = [("Host", "From", "State", "Issuer", "Expires", "Renewal")]
    rows.extend(
        (
            printable(certificate.host),
            certificate.source,
            certificate.state,
            printable(certificate.issuer) or "-",
            _moment(certificate.not_after),
            _moment(certificate.next_attempt or certificate.renew_at),
        )
        for certificate in certificates
    )
    sys.stdout.write(table(rows))
    for certificate in certificates:
        if certificate.last_error:
            sys.stdout.write(printable(f"{certificate.host}: {certificate.last_error}") + "\n")


def renew(host: Host, /) -> None:
    """Obtain a new certificate for a host now, before it is due.

    Waits until it is there. If the certificate authority refuses, the command fails with its words,
    and the certificate that is there stays in use. Authorities limit how often a certificate may be
    asked for: Let's Encrypt to five times a week for one host.
    """
    from kamal_proxy.control.client import ControlClient

    ControlClient().renew_certificate(host)


def _moment(seconds: float) -> str:
    """Say when something is, in UTC, and how far from now."""
    if not seconds:
        return "-"
    moment = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    days = (seconds - time.time()) / _DAY
    if days < 0:
        return f"{moment} (over)"
    return f"{moment} ({days:.0f}d)" if days >= 2 else f"{moment} ({days * 24:.0f}h)"
