"""``kamal-proxy pause``, ``stop`` and ``resume``: takes a service's visitors off its targets."""

import sys
from typing import Annotated

from cyclopts import Parameter

from kamal_proxy.cli.arguments import Duration, Service, Text
from kamal_proxy.cli.output import Progress
from kamal_proxy.options import PauseOptions, StopOptions

_PAUSE = PauseOptions()
_STOP = StopOptions()


def pause(
    service: Service,
    /,
    *,
    drain_timeout: Annotated[
        Duration, Parameter(help="How long requests in flight may take to finish")
    ] = _PAUSE.drain_timeout,
    max_pause: Annotated[
        Duration,
        Parameter(help="How long a request waits for the end of the pause before it fails"),
    ] = _PAUSE.max_pause,
) -> None:
    """Pause a service: new requests wait until it is resumed.

    Returns when the requests in flight have finished; those that have not at the drain timeout are
    cut. Fails if the service is resumed before that, and if there is none of that name.

    A request that has waited for the longest pause gets an error page (504). Requests for the
    service's health-check path are still answered, with 200. Neither a deploy nor a restart of the
    proxy ends a pause.

    A UDP service of that name is paused too: the datagrams of new sessions are dropped.
    """
    options = PauseOptions(drain_timeout=drain_timeout, max_pause=max_pause)
    options.validate()
    from kamal_proxy.control.client import ControlClient

    with Progress(sys.stderr, draining="in flight") as progress:
        ControlClient().pause(service, options, progress.show)


def stop(
    service: Service,
    /,
    *,
    drain_timeout: Annotated[
        Duration, Parameter(help="How long requests in flight may take to finish")
    ] = _STOP.drain_timeout,
    message: Annotated[
        Text, Parameter(help="What the error page tells visitors meanwhile")
    ] = _STOP.message,
) -> None:
    """Stop a service: new requests get an error page (503) until it is resumed.

    Returns when the requests in flight have finished; those that have not at the drain timeout are
    cut. Fails if the service is resumed before that, and if there is none of that name.

    Requests for the service's health-check path are still answered, with 200. Neither a deploy nor
    a restart of the proxy starts it again.

    A UDP service of that name is stopped too: all its datagrams are dropped.
    """
    options = StopOptions(drain_timeout=drain_timeout, message=message)
    options.validate()
    from kamal_proxy.control.client import ControlClient

    with Progress(sys.stderr, draining="in flight") as progress:
        ControlClient().stop(service, options, progress.show)


def resume(service: Service, /) -> None:
    """Resume a service that was paused or stopped.

    Requests that wait for the end of a pause go on. A UDP service of that name is resumed too.
    Returns at once. A service that serves is left as it is; fails if there is none of that name.
    """
    from kamal_proxy.control.client import ControlClient

    ControlClient().resume(service)
