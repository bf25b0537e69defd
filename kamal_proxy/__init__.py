"""A proxy that makes deployments invisible. This module is the public API and nothing else.

The names are loaded on first use, so that the command line, which needs few of them, starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kamal_proxy.control.messages import CertificateDescription, Event, ServiceDescription
    from kamal_proxy.errors import (
        AcmeError,
        CertificateError,
        CertificateNotFoundError,
        CertificateStoreError,
        DeployFailedError,
        ErrorPagesError,
        HostConflictError,
        InvalidOptionsError,
        KamalProxyError,
        ListenError,
        PortConflictError,
        ResumedError,
        RolloutNotSetError,
        ServiceNotFoundError,
        StateError,
    )
    from kamal_proxy.options import (
        DeploymentOptions,
        DeployOptions,
        PauseOptions,
        RolloutOptions,
        RolloutSplit,
        ServiceOptions,
        StopOptions,
    )
    from kamal_proxy.proxy import Proxy, open_proxy
    from kamal_proxy.run_options import AcmeOptions, RunOptions
    from kamal_proxy.target_options import HealthCheckOptions, PathTimeout, TargetOptions
    from kamal_proxy.udp.options import (
        SessionOptions,
        UdpDeploymentOptions,
        UdpDeployOptions,
        UdpHealthCheckOptions,
        UdpOptions,
    )

    __version__: str

__all__ = [
    "AcmeError",
    "AcmeOptions",
    "CertificateDescription",
    "CertificateError",
    "CertificateNotFoundError",
    "CertificateStoreError",
    "DeployFailedError",
    "DeployOptions",
    "DeploymentOptions",
    "ErrorPagesError",
    "Event",
    "HealthCheckOptions",
    "HostConflictError",
    "InvalidOptionsError",
    "KamalProxyError",
    "ListenError",
    "PathTimeout",
    "PauseOptions",
    "PortConflictError",
    "Proxy",
    "ResumedError",
    "RolloutNotSetError",
    "RolloutOptions",
    "RolloutSplit",
    "RunOptions",
    "ServiceDescription",
    "ServiceNotFoundError",
    "ServiceOptions",
    "SessionOptions",
    "StateError",
    "StopOptions",
    "TargetOptions",
    "UdpDeployOptions",
    "UdpDeploymentOptions",
    "UdpHealthCheckOptions",
    "UdpOptions",
    "__version__",
    "open_proxy",
]

_HOMES = {
    "kamal_proxy.control.messages": ("CertificateDescription", "Event", "ServiceDescription"),
    "kamal_proxy.errors": (
        "AcmeError",
        "CertificateError",
        "CertificateNotFoundError",
        "CertificateStoreError",
        "DeployFailedError",
        "ErrorPagesError",
        "HostConflictError",
        "InvalidOptionsError",
        "KamalProxyError",
        "ListenError",
        "PortConflictError",
        "ResumedError",
        "RolloutNotSetError",
        "ServiceNotFoundError",
        "StateError",
    ),
    "kamal_proxy.options": (
        "DeployOptions",
        "DeploymentOptions",
        "PauseOptions",
        "RolloutOptions",
        "RolloutSplit",
        "ServiceOptions",
        "StopOptions",
    ),
    "kamal_proxy.proxy": ("Proxy", "open_proxy"),
    "kamal_proxy.run_options": ("AcmeOptions", "RunOptions"),
    "kamal_proxy.target_options": ("HealthCheckOptions", "PathTimeout", "TargetOptions"),
    "kamal_proxy.udp.options": (
        "SessionOptions",
        "UdpDeployOptions",
        "UdpDeploymentOptions",
        "UdpHealthCheckOptions",
        "UdpOptions",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to load than all of the above

        return version("kamal-proxy")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
