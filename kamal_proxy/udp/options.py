"""Every option of a UDP service and of its deploys, and the rules about their values.

Like ``kamal_proxy.options`` for HTTP services: constructors only normalise, ``validate`` holds the
rules, durations are seconds. What both kinds share is in ``rules``. Pure.
"""

from __future__ import annotations

import re

import attrs

from kamal_proxy.durations import format_duration
from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.rules import (
    MAX_NAME,
    require_between,
    require_not_negative,
    require_path,
    require_port,
    require_positive,
    require_service_name,
    require_word,
    target_port,
    texts,
)

PROTOCOLS = ("udp", "webrtc")
RTCP_POLICIES = ("adjacent", "separate-range", "auto")
AFFINITY_STRATEGIES = ("5-tuple", "source-ip", "source-port")
DRAIN_STRATEGIES = ("graceful", "immediate", "timeout")
HEALTH_CHECKS = ("tcp", "http", "none")
MAX_SESSIONS = 1_000_000  # that one service may be allowed
MAX_RANGES = 2

# Stricter than a target of HTTP: what a look-up does not even try (empty or overlong labels) is
# refused here, not again and again while the service runs.
_LABEL = r"[A-Za-z0-9_][-_A-Za-z0-9+]{0,62}"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)
_PORT_RANGE = re.compile(r"([0-9]{1,5})-([0-9]{1,5})", re.ASCII)


def split_udp_target(target: str) -> tuple[str, int]:
    """Split ``host:port`` of a UDP target into host and port.

    Args:
        target: The host is a name, an IPv4 address, or an IPv6 address in brackets.

    Returns:
        The host as a look-up takes it, an IPv6 address in its shortest form, and the port.

    Raises:
        InvalidOptionsError: the text is not a target, or has no port; the sentence names it.
    """
    host, colon, port = target.rpartition(":")
    if not colon or target.endswith("]"):
        host, port = target, ""
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        address = _ipv6(host[1:-1])
    elif _ipv6(target):
        raise InvalidOptionsError(
            f"target {target}: an IPv6 address goes in brackets, such as [::1]:9999"
        )
    else:
        address = host if _NAME.fullmatch(host) and len(host) <= MAX_NAME else ""
    if not address or (port and not re.fullmatch("[0-9]+", port)):
        raise InvalidOptionsError(
            f"target '{target}' is not a host and a port, such as game-1:9999 or [::1]:9999"
        )
    if not port:
        raise InvalidOptionsError(f"target {host} must have a port, such as {host}:9999")
    return address, target_port(target, port)


def _ipv6(text: str) -> str:
    """Return an IPv6 address in its shortest form, or nothing if the text is none."""
    if ":" not in text or "%" in text:
        return ""
    from ipaddress import IPv6Address  # seldom needed, and a command should start fast

    try:
        return str(IPv6Address(text))
    except ValueError:
        return ""


def split_port_range(text: str) -> tuple[int, int]:
    """Return the first and the last port of a range such as ``10000-20000``.

    Raises:
        InvalidOptionsError: the text is not a range of ports; the sentence names it.
    """
    match = _PORT_RANGE.fullmatch(text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise InvalidOptionsError(
            f"port-ranges '{text}' must be the first and the last port, from 1 to 65535, such as "
            "10000-20000"
        )
    return first, last


@attrs.frozen(kw_only=True)
class UdpHealthCheckOptions:
    """How a UDP service's target is probed. No probe is ever a datagram.

    Attributes:
        method: ``tcp``: the port accepts a connection; ``http``: it answers a GET with 2xx;
            ``none``: every target counts as healthy.
        path: Path of the GET request (``http``).
        port: TCP port to probe; 0 means the number of the target's own port.
        interval: Seconds between two probes.
        timeout: Seconds in which each probe must finish.
    """

    method: str = "tcp"
    path: str = "/up"
    port: int = 0
    interval: float = 1.0
    timeout: float = 5.0

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_word("health-check", self.method, HEALTH_CHECKS)
        require_path("health-check-path", self.path)
        require_port("health-check-port", self.port, lowest=0)
        require_positive("health-check-interval", self.interval)
        require_positive("health-check-timeout", self.timeout)


@attrs.frozen(kw_only=True)
class SessionOptions:
    """How clients' sessions are bound to targets, and how long they last.

    Attributes:
        affinity: Whether all datagrams of a session go to one target; otherwise each datagram goes
            to the next one.
        strategy: What chooses the target of a new session: ``5-tuple``, both ends; ``source-ip``,
            the client's address; ``source-port``, its address and port.
        timeout: Seconds without a datagram in either direction after which a session is over.
        limit: Sessions at once.
        proxy_protocol: Whether each datagram to a target begins with a PROXY protocol header.
    """

    affinity: bool = True
    strategy: str = "5-tuple"
    timeout: float = 60.0
    limit: int = 10_000
    proxy_protocol: bool = False

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_word("affinity-strategy", self.strategy, AFFINITY_STRATEGIES)
        require_positive("session-timeout", self.timeout)
        require_between("max-sessions", self.limit, 1, MAX_SESSIONS)


@attrs.frozen(kw_only=True)
class UdpOptions:
    """What a UDP service listens on, and how; saved with the service.

    Attributes:
        port: UDP port to listen on; 0 means ``RunOptions.udp_port``, and with WebRTC none but those
            of the ranges.
        protocol: ``udp`` or ``webrtc``.
        port_ranges: Ranges of ports of a WebRTC service, such as ``10000-20000``; at most two. Each
            port stands for the one of the same number of every target.
        rtcp_policy: Which ports of the ranges are a pair for RTP and RTCP: ``adjacent``, an even
            one and the next; ``separate-range``, those at the same place of two ranges; ``auto``,
            the latter if there are two ranges, else the former.
        sessions: How sessions are bound to targets.
        health_check: How targets are probed.
    """

    port: int = 0
    protocol: str = "udp"
    port_ranges: tuple[str, ...] = attrs.field(default=(), converter=texts)
    rtcp_policy: str = "auto"
    sessions: SessionOptions = attrs.field(factory=SessionOptions)
    health_check: UdpHealthCheckOptions = attrs.field(factory=UdpHealthCheckOptions)

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work."""
        require_port("port", self.port, lowest=0)
        require_word("protocol", self.protocol, PROTOCOLS)
        self._validate_ranges()
        require_word("rtcp-policy", self.rtcp_policy, RTCP_POLICIES)
        if self.protocol == "webrtc":
            self._validate_webrtc()
        else:
            self._validate_udp()
        self.sessions.validate()
        self.health_check.validate()

    def _validate_ranges(self) -> None:
        ranges = [split_port_range(text) for text in self.port_ranges]
        if len(ranges) > MAX_RANGES:
            raise InvalidOptionsError(
                f"port-ranges {','.join(self.port_ranges)} must be at most {MAX_RANGES} ranges"
            )
        if len(ranges) == MAX_RANGES:
            (_, end), (start, _) = sorted(ranges)
            if start <= end:
                raise InvalidOptionsError(
                    f"port-ranges {','.join(self.port_ranges)} must have no port in common"
                )

    def _validate_webrtc(self) -> None:
        if not self.port_ranges and not self.port:
            raise InvalidOptionsError(
                "protocol webrtc must have port-ranges, such as 10000-20000, or a port"
            )
        if self.rtcp_policy == "separate-range" and len(self.port_ranges) < MAX_RANGES:
            raise InvalidOptionsError(
                "rtcp-policy separate-range must have two port-ranges, such as "
                "10000-19999,20000-29999"
            )
        if not self.sessions.affinity:
            raise InvalidOptionsError(
                "session-affinity must not be off with protocol webrtc: a call stays on its target"
            )

    def _validate_udp(self) -> None:
        if self.port_ranges:
            raise InvalidOptionsError(
                f"port-ranges {','.join(self.port_ranges)} must come with protocol webrtc"
            )
        if self.rtcp_policy != "auto":
            raise InvalidOptionsError(
                f"rtcp-policy {self.rtcp_policy} must come with protocol webrtc"
            )


@attrs.frozen(kw_only=True)
class UdpDeploymentOptions:
    """How one deploy of a UDP service is carried out; not remembered.

    Attributes:
        deploy_timeout: Seconds in which every new target must become healthy.
        zero_downtime: Whether sessions on the old targets go on after the switch; otherwise they
            are ended by it.
        drain_strategy: When these sessions are ended: ``graceful``, at the drain timeout;
            ``timeout``, at the force-kill timeout; ``immediate``, at the switch.
        drain_timeout: Seconds from the switch that sessions may take to end by themselves.
        force_kill_timeout: Seconds from the switch after which no session is left; at least the
            drain timeout.
        force: Switch at once, without waiting for health.
    """

    deploy_timeout: float = 30.0
    zero_downtime: bool = False
    drain_strategy: str = "graceful"
    drain_timeout: float = 30.0
    force_kill_timeout: float = 120.0
    force: bool = False

    def validate(self) -> None:
        """Raise InvalidOptionsError for a value that can't work or a contradiction."""
        require_not_negative("deploy-timeout", self.deploy_timeout)
        require_word("drain-strategy", self.drain_strategy, DRAIN_STRATEGIES)
        require_not_negative("drain-timeout", self.drain_timeout)
        require_not_negative("force-kill-timeout", self.force_kill_timeout)
        if self.force_kill_timeout < self.drain_timeout:
            raise InvalidOptionsError(
                f"force-kill-timeout {format_duration(self.force_kill_timeout)} must not be less "
                f"than drain-timeout {format_duration(self.drain_timeout)}"
            )


@attrs.frozen(kw_only=True)
class UdpDeployOptions:
    """Everything that one deploy of a UDP service states. Options are not sticky between deploys.

    Attributes:
        service: Name of the service. An HTTP service may have the same.
        targets: ``host:port`` of each target, ``[address]:port`` for IPv6.
    """

    service: str
    targets: tuple[str, ...] = attrs.field(converter=texts)
    udp_options: UdpOptions = attrs.field(factory=UdpOptions)
    deployment_options: UdpDeploymentOptions = attrs.field(factory=UdpDeploymentOptions)

    def validate(self) -> None:
        """Check everything that can be checked without the running proxy.

        Raises:
            InvalidOptionsError: a value can't work; the sentence names the option and the value.
        """
        require_service_name(self.service)
        if not self.targets:
            raise InvalidOptionsError("at least one target is required")
        seen = set()
        for target in self.targets:
            host, port = split_udp_target(target)
            if (host.lower(), port) in seen:
                raise InvalidOptionsError(f"target {target} is given twice")
            seen.add((host.lower(), port))
        self.udp_options.validate()
        self.deployment_options.validate()
