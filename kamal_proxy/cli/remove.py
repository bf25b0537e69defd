"""``kamal-proxy remove``: takes a service out of the proxy."""


def remove(service: str, /) -> None:
    """Remove a service.

    Its hosts and paths are free again at once; requests in flight are not waited for.
    """
    from kamal_proxy.control.client import ControlClient

    ControlClient().remove(service)
