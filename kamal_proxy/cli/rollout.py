"""``kamal-proxy rollout``: new targets for some of a service's visitors."""

import sys
from typing import Annotated

from cyclopts import Parameter

from kamal_proxy.cli.arguments import Duration, HttpService, Int, Strings
from kamal_proxy.cli.output import Progress
from kamal_proxy.errors import UsageError
from kamal_proxy.options import DeploymentOptions, RolloutOptions, RolloutSplit

_DEPLOYMENT = DeploymentOptions()


def deploy(
    service: HttpService,
    /,
    *,
    target: Annotated[
        Strings | None,
        Parameter(help="Where the new version runs, as host or host:port (required; repeatable)"),
    ] = None,
    read_target: Annotated[
        Strings,
        Parameter(help="Where read-only requests to it may go, as host:port (repeatable)"),
    ] = (),
    deploy_timeout: Annotated[
        Duration, Parameter(help="How long the new targets may take to become healthy")
    ] = _DEPLOYMENT.deploy_timeout,
    drain_timeout: Annotated[
        Duration, Parameter(help="How long requests on the old rollout targets may take to finish")
    ] = _DEPLOYMENT.drain_timeout,
) -> None:
    """Deploy the rollout targets of a service, beside its own.

    Waits until every target is healthy, and for the requests on earlier rollout targets, which they
    replace. They get no requests before 'rollout set' says whose. All other options are those of
    the service. If it fails, nothing has changed.
    """
    if target is None:
        raise UsageError('required flag(s) "target" not set')
    options = RolloutOptions(
        targets=target,
        read_targets=read_target,
        deployment_options=DeploymentOptions(
            deploy_timeout=deploy_timeout, drain_timeout=drain_timeout
        ),
    )
    options.validate()
    from kamal_proxy.control.client import ControlClient

    with Progress(sys.stderr, draining="on the old rollout targets") as progress:
        ControlClient().deploy_rollout(service, options, progress.show)


def set_split(
    service: HttpService,
    /,
    *,
    percent: Annotated[
        Int | None, Parameter(help="Share of the visitors with the cookie, 0 to 100")
    ] = None,
    list: Annotated[  # noqa: A002  the name is the flag's
        Strings | None,
        Parameter(help="Value of the cookie that always goes to the rollout (repeatable)"),
    ] = None,
) -> None:
    """Choose which visitors go to the rollout targets, by their cookie kamal-rollout.

    Replaces what was set before. One value of the cookie always means the same side, and whoever is
    in at a lower percentage stays in at a higher one. Visitors without the cookie never go there.
    Returns at once; fails if the service has no rollout targets.
    """
    if percent is None and list is None:
        raise UsageError("at least one of the flags in the group [percent list] is required")
    split = RolloutSplit(percentage=percent or 0, allowlist=list)
    split.validate()
    from kamal_proxy.control.client import ControlClient

    ControlClient().set_rollout(service, split)


def stop(service: HttpService, /) -> None:
    """Send all visitors of a service to its own targets again.

    Returns at once. The rollout targets stay, so 'rollout set' can begin anew. Fails if there are
    none.
    """
    from kamal_proxy.control.client import ControlClient

    ControlClient().stop_rollout(service)
