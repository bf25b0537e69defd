"""``kamal-proxy list``: what is being served."""

import sys

from kamal_proxy.cli.output import table


def list_services() -> None:
    """List the services and where their requests go."""
    from kamal_proxy.control.client import ControlClient

    rows = [("Service", "Host", "Path", "Target", "State", "TLS")]
    rows.extend(
        (
            service.name,
            ",".join(service.hosts) or "*",
            ",".join(service.path_prefixes) or "/",
            ",".join(service.targets),
            service.state,
            "yes" if service.tls else "no",
        )
        for service in sorted(ControlClient().services(), key=lambda service: service.name)
    )
    sys.stdout.write(table(rows))
