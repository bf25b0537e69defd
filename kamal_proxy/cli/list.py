"""``kamal-proxy list``: what is being served."""

import sys
from json import dumps
from typing import Annotated

import attrs
from cyclopts import Parameter

from kamal_proxy.cli.arguments import Bool
from kamal_proxy.cli.output import table


def list_services(
    *,
    json: Annotated[
        Bool, Parameter(help="Print all that is known of them, as JSON, instead of a table")
    ] = False,
) -> None:
    """List the services and where their requests and datagrams go.

    The table has their names, hosts (* for all), path prefixes or UDP ports, targets (those for
    reading at the end), whether they are running, paused or stopped, and whether they have TLS.
    """
    from kamal_proxy.control.client import ControlClient

    # An HTTP and a UDP service may have the same name; the first has no UDP ports.
    services = sorted(ControlClient().services(), key=lambda each: (each.name, each.udp_ports))
    if json:
        sys.stdout.write(dumps([attrs.asdict(service) for service in services], indent=2) + "\n")
        return
    rows = [("Service", "Host", "Path", "Target", "State", "TLS")]
    rows.extend(
        (
            service.name,
            ",".join(service.hosts) or "*",
            ",".join(service.udp_ports or service.path_prefixes) or "/",
            ",".join((*service.targets, *service.read_targets)),
            service.state,
            "yes" if service.tls else "no",
        )
        for service in services
    )
    sys.stdout.write(table(rows))
