"""``kamal-proxy deploy-udp``: the flags of a UDP deploy, and how they become ``UdpDeployOptions``.

Rules about values are in ``udp.options``.
"""

import sys
from typing import Annotated

from cyclopts import Parameter

from kamal_proxy.cli.arguments import Bool, Duration, Group, Int, Strings, Text, UdpService, choice
from kamal_proxy.cli.output import Progress, counted
from kamal_proxy.control.messages import Event
from kamal_proxy.errors import UsageError
from kamal_proxy.udp.options import (
    AFFINITY_STRATEGIES,
    DRAIN_STRATEGIES,
    HEALTH_CHECKS,
    PROTOCOLS,
    RTCP_POLICIES,
    SessionOptions,
    UdpDeploymentOptions,
    UdpDeployOptions,
    UdpHealthCheckOptions,
    UdpOptions,
)

_UDP = UdpOptions()
_SESSIONS = SessionOptions()
_HEALTH = UdpHealthCheckOptions()
_DEPLOYMENT = UdpDeploymentOptions()

# The groups of flags in help.
_ROUTES = Group("Where datagrams go")
_SESSION = Group("Sessions")
_SWITCH = Group("Switching over")
_CHECKS = Group("Health checks")

_PROTOCOL = choice(PROTOCOLS)
_RTCP_POLICY = choice(RTCP_POLICIES)
_AFFINITY_STRATEGY = choice(AFFINITY_STRATEGIES)
_DRAIN_STRATEGY = choice(DRAIN_STRATEGIES)
_HEALTH_CHECK = choice(HEALTH_CHECKS)
Protocol = Annotated[str, _PROTOCOL, _PROTOCOL.parameter()]
RtcpPolicy = Annotated[str, _RTCP_POLICY, _RTCP_POLICY.parameter()]
AffinityStrategy = Annotated[str, _AFFINITY_STRATEGY, _AFFINITY_STRATEGY.parameter()]
DrainStrategy = Annotated[str, _DRAIN_STRATEGY, _DRAIN_STRATEGY.parameter()]
HealthCheck = Annotated[str, _HEALTH_CHECK, _HEALTH_CHECK.parameter()]


def deploy_udp(
    service: UdpService,
    /,
    *,
    target: Annotated[
        Strings | None,
        _ROUTES,
        Parameter(
            help="Where the service runs, as host:port or [IPv6 address]:port (required; "
            "repeatable)"
        ),
    ] = None,
    port: Annotated[
        Int,
        _ROUTES,
        Parameter(
            help="UDP port to listen on; the --udp-port of run if not given, and none with "
            "--protocol=webrtc"
        ),
    ] = _UDP.port,
    protocol: Annotated[
        Protocol,
        _ROUTES,
        Parameter(help="What clients speak: udp, or webrtc (also plain RTP)"),
    ] = _UDP.protocol,
    port_ranges: Annotated[
        Strings,
        _ROUTES,
        Parameter(
            help="Ports of a WebRTC service, as 10000-20000; one range or two. Each leads to the "
            "port of the same number of the target"
        ),
    ] = _UDP.port_ranges,
    rtcp_policy: Annotated[
        RtcpPolicy,
        _ROUTES,
        Parameter(
            help="Which ports of the ranges are a pair for RTP and RTCP: adjacent (an even one and "
            "the next), separate-range (those at the same place of two ranges) or auto (the latter "
            "with two ranges)"
        ),
    ] = _UDP.rtcp_policy,
    session_affinity: Annotated[
        Bool,
        _SESSION,
        Parameter(
            help="Keep each session on one target; otherwise each datagram goes to the next one"
        ),
    ] = _SESSIONS.affinity,
    affinity_strategy: Annotated[
        AffinityStrategy,
        _SESSION,
        Parameter(
            help="What chooses the target of a new session: 5-tuple (both ends), source-ip (the "
            "client's address) or source-port (its address and port)"
        ),
    ] = _SESSIONS.strategy,
    session_timeout: Annotated[
        Duration,
        _SESSION,
        Parameter(help="How long a session may carry nothing in either direction before it ends"),
    ] = _SESSIONS.timeout,
    max_sessions: Annotated[
        Int,
        _SESSION,
        Parameter(help="Sessions at once; datagrams of more clients are dropped"),
    ] = _SESSIONS.limit,
    deploy_timeout: Annotated[
        Duration,
        _SWITCH,
        Parameter(help="How long the new targets may take to become healthy"),
    ] = _DEPLOYMENT.deploy_timeout,
    zero_downtime: Annotated[
        Bool,
        _SWITCH,
        Parameter(help="Let the sessions on the old targets go on after the switch"),
    ] = _DEPLOYMENT.zero_downtime,
    drain_strategy: Annotated[
        DrainStrategy,
        _SWITCH,
        Parameter(
            help="When sessions on the old targets are ended, with --zero-downtime: graceful (at "
            "the drain timeout), timeout (at the force-kill timeout) or immediate (at the switch)"
        ),
    ] = _DEPLOYMENT.drain_strategy,
    drain_timeout: Annotated[
        Duration,
        _SWITCH,
        Parameter(help="How long sessions on the old targets may take to end"),
    ] = _DEPLOYMENT.drain_timeout,
    force_kill_timeout: Annotated[
        Duration,
        _SWITCH,
        Parameter(
            help="How long until the last session on the old targets is cut; at least the drain "
            "timeout"
        ),
    ] = _DEPLOYMENT.force_kill_timeout,
    force: Annotated[
        Bool,
        _SWITCH,
        Parameter(help="Switch at once, without waiting for the targets to be healthy"),
    ] = _DEPLOYMENT.force,
    health_check: Annotated[
        HealthCheck,
        _CHECKS,
        Parameter(
            help="How targets are checked: tcp (a port accepts connections), http (it answers a "
            "GET with 2xx) or none"
        ),
    ] = _HEALTH.method,
    health_check_port: Annotated[
        Int,
        _CHECKS,
        Parameter(help="TCP port to check; 0 means the number of the target's own port"),
    ] = _HEALTH.port,
    health_check_path: Annotated[
        Text, _CHECKS, Parameter(help="Path to request, with --health-check=http")
    ] = _HEALTH.path,
    health_check_interval: Annotated[
        Duration, _CHECKS, Parameter(help="Time between two health checks of a target")
    ] = _HEALTH.interval,
    health_check_timeout: Annotated[
        Duration, _CHECKS, Parameter(help="Time in which each health check must finish")
    ] = _HEALTH.timeout,
    proxy_protocol: Annotated[
        Bool,
        _ROUTES,
        Parameter(
            help="Put a PROXY protocol header, version 2, in front of every datagram to a target"
        ),
    ] = _SESSIONS.proxy_protocol,
) -> None:
    """Deploy a UDP service, or a new version of one.

    Waits until every target is healthy and then switches: whoever sends a first datagram from then
    on gets a new target. If that fails, nothing has changed. Options are not remembered from one
    deploy to the next. A repeatable flag also takes several values at once, separated by commas.

    A session is what one address and port of a client sends to one port of the service, and what
    comes back. It stays on its target for life, and ends when it has carried nothing for the
    session timeout.

    With --zero-downtime the sessions on the old targets go on after the switch: with the drain
    strategy graceful until the drain timeout, with timeout until the force-kill timeout. Without
    it, or with the strategy immediate, the switch ends them. A target in both the old set and the
    new one keeps its sessions. Returns when the old sessions have ended, and prints how many
    ended by themselves and how many were cut.

    With --protocol=webrtc the ports of --port-ranges are those of a media server: port 10000 leads
    to port 10000 of the target, and the port in --target is only where its health is checked. Calls
    that drain are told goodbye at the drain timeout where their protocol lets a proxy do so, and
    cut at the force-kill timeout; how many were told, and how many could not be, is printed too.
    """
    if target is None:
        raise UsageError('required flag(s) "target" not set')
    options = UdpDeployOptions(
        service=service,
        targets=target,
        udp_options=UdpOptions(
            port=port,
            protocol=protocol,
            port_ranges=port_ranges,
            rtcp_policy=rtcp_policy,
            sessions=SessionOptions(
                affinity=session_affinity,
                strategy=affinity_strategy,
                timeout=session_timeout,
                limit=max_sessions,
                proxy_protocol=proxy_protocol,
            ),
            health_check=UdpHealthCheckOptions(
                method=health_check,
                path=health_check_path,
                port=health_check_port,
                interval=health_check_interval,
                timeout=health_check_timeout,
            ),
        ),
        deployment_options=UdpDeploymentOptions(
            deploy_timeout=deploy_timeout,
            zero_downtime=zero_downtime,
            drain_strategy=drain_strategy,
            drain_timeout=drain_timeout,
            force_kill_timeout=force_kill_timeout,
            force=force,
        ),
    )
    options.validate()
    from kamal_proxy.control.client import ControlClient

    # The counts of the drain are the command's output, on a terminal or not.
    progress = Progress(sys.stderr, draining="on the old targets", unit="session", summary=False)
    with progress:
        done = ControlClient().deploy_udp(options, progress.show)
    sys.stdout.write(f"{_summary(done, calls=protocol == 'webrtc')}\n")


def _summary(done: Event, *, calls: bool) -> str:
    """Return how the drain ended, in words; of calls also who was told goodbye."""
    text = f"{counted(done.completed, 'session')} completed, {done.cancelled} cut"
    if calls or done.goodbyes:
        text += f", {done.goodbyes} got a BYE"
    if done.cut_unsaid:
        text += f"; {counted(done.cut_unsaid, 'SRTP session')} cut without goodbye"
    return text
