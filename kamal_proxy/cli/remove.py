"""``kamal-proxy remove``: takes a service out of the proxy, also a UDP service."""

from kamal_proxy.cli.arguments import Service


def remove(service: Service, /) -> None:
    """Remove a service.

    Its hosts and paths are free again at once; requests in flight are not waited for. A UDP service
    of that name is removed too: its sessions are cut and its port is free again. Fails if there is
    neither.
    """
    from kamal_proxy.control.client import ControlClient

    ControlClient().remove(service)
