"""Every rule about the options of UDP services, and the sentence that names what breaks it."""

from __future__ import annotations

import json
from ipaddress import IPv6Address
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.control.messages import from_json, to_json
from kamal_proxy.errors import InvalidOptionsError
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
    split_port_range,
    split_udp_target,
)

NAN = float("nan")


def refusal(options: Any) -> str:
    with pytest.raises(InvalidOptionsError) as caught:
        options.validate()
    assert type(caught.value) is InvalidOptionsError
    return str(caught.value)


def deploy(*targets: str, **fields: Any) -> UdpDeployOptions:
    return UdpDeployOptions(**{"service": "game", "targets": targets or ("g:1",), **fields})


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("game-1:9999", ("game-1", 9999)),
        ("x:1", ("x", 1)),
        ("172.1.0.2:65535", ("172.1.0.2", 65535)),
        ("my_app-1.local.:0000080", ("my_app-1.local.", 80)),
        ("a+b:1", ("a+b", 1)),
        ("[::1]:9999", ("::1", 9999)),
        ("[2001:0DB8::0:1]:9", ("2001:db8::1", 9)),
        # Python 3.13 writes it as it is here, older ones as ::ffff:c000:201.
        ("[::ffff:192.0.2.1]:9", (str(IPv6Address("::ffff:192.0.2.1")), 9)),
        ("a" * 63 + ":1", ("a" * 63, 1)),
    ],
)
def test_targets(target: str, parts: tuple[str, int]) -> None:
    assert split_udp_target(target) == parts
    deploy(target).validate()


@pytest.mark.parametrize(
    ("target", "example"),
    [("game-1", "game-1:9999"), ("game-1:", "game-1:9999"), ("192.0.2.1", "192.0.2.1:9999"),
     ("[::1]", "[::1]:9999"), ("[::1]:", "[::1]:9999")],
)  # fmt: skip
def test_a_port_must_be_given(target: str, example: str) -> None:
    host = example.removesuffix(":9999")
    assert refusal(deploy("g:1", target)) == f"target {host} must have a port, such as {example}"


@pytest.mark.parametrize("target", ["::1", "::1:9999", "2001:db8::1", "::"])
def test_an_ipv6_address_goes_in_brackets(target: str) -> None:
    assert refusal(deploy(target)) == (
        f"target {target}: an IPv6 address goes in brackets, such as [::1]:9999"
    )


@pytest.mark.parametrize(
    "target",
    ["", ":", ":80", "-web:80", "web:80:80", "web:udp", "udp://web:1", "web/x:1", "wéb:80",
     "web:80\n", "web\n:80", "web:٨٠", "web:+80", "web:-1", "web: 80", "user@web:1", "web 80",
     "a..b:1", ".:1",
     "a" * 64 + ":1", "a." * 128 + ":1", "[]:1", "[::1", "::1]:1", "[web]:1", "[192.0.2.1]:1",
     "[fe80::1%eth0]:1", "[::1]x:1", "[[::1]]:1", "[::1]9999", "1:2:3:4:5:6:7:8:9999", "\udcff:1"],
)  # fmt: skip
def test_texts_that_are_no_targets(target: str) -> None:
    assert refusal(deploy("g:1", target)) == (
        f"target '{target}' is not a host and a port, such as game-1:9999 or [::1]:9999"
    )


@pytest.mark.parametrize("port", ["0", "000", "65536", "9" * 5000])
@pytest.mark.parametrize("host", ["game", "[::1]"])
def test_target_ports_out_of_range(host: str, port: str) -> None:
    assert refusal(deploy(f"{host}:{port}")) == (
        f"target {host}:{port}: port must be from 1 to 65535"
    )


@pytest.mark.parametrize(
    ("targets", "twice"),
    [
        (("g:1", "g:1"), "g:1"),
        (("g:1", "h:1", "G:01"), "G:01"),
        (("[::1]:5", "[0:0::1]:5"), "[0:0::1]:5"),
    ],
)
def test_no_target_is_given_twice(targets: tuple[str, ...], twice: str) -> None:
    assert refusal(deploy(*targets)) == f"target {twice} is given twice"


def test_several_targets() -> None:
    deploy("g:1", "g:2", "h:1", "[::1]:1", "[::2]:1").validate()


def test_a_target_is_required() -> None:
    assert refusal(UdpDeployOptions(service="g", targets=())) == "at least one target is required"


@pytest.mark.parametrize("name", ["game", "~", "x" * 255])
def test_service_names(name: str) -> None:
    deploy(service=name).validate()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "x" * 256, "a\n", "\udcff"])
def test_texts_that_are_no_service_names(name: str) -> None:
    assert refusal(deploy(service=name)) == (
        f"service name '{name}' must be 1 to 255 printable ASCII characters without spaces or "
        "slashes"
    )


@given(st.text("ab1.:[]%-_ \n\udcff", max_size=12))
def test_any_text_is_a_target_or_refused(text: str) -> None:
    try:
        host, port = split_udp_target(text)
    except InvalidOptionsError as error:
        assert text.split(":")[0] in str(error)  # noqa: PT017  both outcomes are right here
    else:
        assert 1 <= port <= 65535
        # What a look-up takes: an address, or a name that can be encoded for DNS.
        assert ":" not in host or IPv6Address(host)
        assert ":" in host or host.encode("idna")
        shown = f"[{host}]" if ":" in host else host
        assert split_udp_target(f"{shown}:{port}") == (host, port)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (UdpHealthCheckOptions(method="udp"),
         "health-check 'udp' must be one of tcp, http, none"),
        (UdpHealthCheckOptions(path="/a b"),
         "health-check-path '/a b' must be a path without spaces, ? or #"),
        (UdpHealthCheckOptions(port=-1), "health-check-port -1 must be from 0 to 65535"),
        (UdpHealthCheckOptions(port=65536), "health-check-port 65536 must be from 0 to 65535"),
        (UdpHealthCheckOptions(interval=0.0), "health-check-interval must be more than zero"),
        (UdpHealthCheckOptions(timeout=NAN), "health-check-timeout must be more than zero"),
        (SessionOptions(strategy="5-Tuple"),
         "affinity-strategy '5-Tuple' must be one of 5-tuple, source-ip, source-port"),
        (SessionOptions(timeout=0.0), "session-timeout must be more than zero"),
        (SessionOptions(timeout=-1.0), "session-timeout must be more than zero"),
        (SessionOptions(timeout=NAN), "session-timeout must be more than zero"),
        (SessionOptions(limit=0), "max-sessions 0 must be from 1 to 1000000"),
        (SessionOptions(limit=1_000_001), "max-sessions 1000001 must be from 1 to 1000000"),
        (UdpOptions(port=-1), "port -1 must be from 0 to 65535"),
        (UdpOptions(port=65536), "port 65536 must be from 0 to 65535"),
        (UdpOptions(protocol=""), "protocol '' must be one of udp, webrtc"),
        (UdpOptions(rtcp_policy="near"),
         "rtcp-policy 'near' must be one of adjacent, separate-range, auto"),
        (UdpOptions(sessions=SessionOptions(limit=0)),
         "max-sessions 0 must be from 1 to 1000000"),
        (UdpOptions(health_check=UdpHealthCheckOptions(port=-2)),
         "health-check-port -2 must be from 0 to 65535"),
        (UdpDeploymentOptions(deploy_timeout=-1.0), "deploy-timeout must not be negative"),
        (UdpDeploymentOptions(drain_strategy="slow"),
         "drain-strategy 'slow' must be one of graceful, immediate, timeout"),
        (UdpDeploymentOptions(drain_timeout=-0.1), "drain-timeout must not be negative"),
        (UdpDeploymentOptions(force_kill_timeout=-1.0),
         "force-kill-timeout must not be negative"),
        (UdpDeploymentOptions(force_kill_timeout=NAN), "force-kill-timeout must not be negative"),
        (UdpDeploymentOptions(drain_timeout=90.0, force_kill_timeout=1.5),
         "force-kill-timeout 1.5s must not be less than drain-timeout 1m30s"),
        (UdpDeploymentOptions(drain_timeout=120.001),
         "force-kill-timeout 2m0s must not be less than drain-timeout 2m0.001s"),
        (deploy(udp_options=UdpOptions(port=-1)), "port -1 must be from 0 to 65535"),
        (deploy(deployment_options=UdpDeploymentOptions(deploy_timeout=-1.0)),
         "deploy-timeout must not be negative"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(options: Any, message: str) -> None:
    assert refusal(options) == message


@pytest.mark.parametrize(
    "options",
    [
        UdpHealthCheckOptions(),
        UdpHealthCheckOptions(path="up", port=65535),
        *(UdpHealthCheckOptions(method=word) for word in HEALTH_CHECKS),
        *(SessionOptions(strategy=word) for word in AFFINITY_STRATEGIES),
        SessionOptions(limit=1),
        SessionOptions(limit=1_000_000, timeout=0.001),
        UdpOptions(),
        UdpOptions(port=65535),
        *(UdpOptions(protocol=word, port=1) for word in PROTOCOLS),
        *(
            UdpOptions(protocol="webrtc", port_ranges=("1-2", "5-9"), rtcp_policy=word)
            for word in RTCP_POLICIES
        ),
        UdpOptions(protocol="webrtc", port_ranges=("1-2",)),
        UdpOptions(protocol="webrtc", port_ranges=("1-2",), rtcp_policy="adjacent", port=1),
        UdpOptions(protocol="webrtc", port=7882, rtcp_policy="adjacent"),
        *(UdpDeploymentOptions(drain_strategy=word) for word in DRAIN_STRATEGIES),
        UdpDeploymentOptions(drain_timeout=120.0),
        UdpDeploymentOptions(deploy_timeout=0.0, drain_timeout=0.0, force_kill_timeout=0.0),
        deploy(),
    ],
)
def test_values_that_work(options: Any) -> None:
    options.validate()


# --- ranges of ports -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ports"),
    [("10000-20000", (10000, 20000)), ("1-65535", (1, 65535)), ("7-7", (7, 7))],
)
def test_port_ranges(text: str, ports: tuple[int, int]) -> None:
    assert split_port_range(text) == ports


@pytest.mark.parametrize(
    "text",
    ["", "10000", "-", "1-", "-1", "0-5", "1-65536", "20000-10000", "1-2-3", "1 - 2", "a-b",
     "1-2\n", "٢-٣", "000001-2", "1--2"],
)  # fmt: skip
def test_texts_that_are_no_port_ranges(text: str) -> None:
    assert refusal(UdpOptions(port_ranges=(text,))) == (
        f"port-ranges '{text}' must be the first and the last port, from 1 to 65535, such as "
        "10000-20000"
    )


def test_two_port_ranges() -> None:
    UdpOptions(protocol="webrtc", port_ranges=("10-20", "21-30")).validate()
    UdpOptions(protocol="webrtc", port_ranges=("21-30", "10-20")).validate()


@pytest.mark.parametrize(
    "ranges", [("10-20", "20-30"), ("20-30", "10-20"), ("10-40", "20-30"), ("5-5", "5-5")]
)
def test_port_ranges_have_nothing_in_common(ranges: tuple[str, ...]) -> None:
    assert refusal(UdpOptions(port_ranges=ranges)) == (
        f"port-ranges {','.join(ranges)} must have no port in common"
    )


def test_port_ranges_are_at_most_two() -> None:
    assert refusal(UdpOptions(port_ranges=("1-2", "3-4", "5-6"))) == (
        "port-ranges 1-2,3-4,5-6 must be at most 2 ranges"
    )


# --- what belongs to one protocol only -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "webrtc"},
         "protocol webrtc must have port-ranges, such as 10000-20000, or a port"),
        ({"port_ranges": ("1-2", "5-6")}, "port-ranges 1-2,5-6 must come with protocol webrtc"),
        ({"port_ranges": ("1-2",), "port": 9999},
         "port-ranges 1-2 must come with protocol webrtc"),
        ({"rtcp_policy": "adjacent"}, "rtcp-policy adjacent must come with protocol webrtc"),
        ({"rtcp_policy": "separate-range", "port": 9999},
         "rtcp-policy separate-range must come with protocol webrtc"),
        ({"rtcp_policy": "separate-range", "port_ranges": ("1-2",), "protocol": "webrtc"},
         "rtcp-policy separate-range must have two port-ranges, such as 10000-19999,20000-29999"),
        ({"rtcp_policy": "separate-range", "port": 5, "protocol": "webrtc"},
         "rtcp-policy separate-range must have two port-ranges, such as 10000-19999,20000-29999"),
        ({"protocol": "webrtc", "port": 5, "sessions": SessionOptions(affinity=False)},
         "session-affinity must not be off with protocol webrtc: a call stays on its target"),
    ],
)  # fmt: skip
def test_what_belongs_to_one_protocol_only(fields: dict[str, Any], message: str) -> None:
    assert refusal(UdpOptions(**fields)) == message
    assert refusal(deploy(udp_options=UdpOptions(**fields))) == message


# --- as JSON -------------------------------------------------------------------------------------

TEXTS = st.text("abc-é:[", max_size=5)
LISTS = st.lists(TEXTS, max_size=3).map(tuple)
SECONDS = st.floats(0, 1e6)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
# A field that is left at its default would survive without being sent, so each has a strategy.
FIELDS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    UdpHealthCheckOptions: {
        "method": TEXTS, "path": TEXTS, "port": NUMBERS, "interval": SECONDS, "timeout": SECONDS,
    },
    SessionOptions: {
        "affinity": st.booleans(), "strategy": TEXTS, "timeout": SECONDS, "limit": NUMBERS,
        "proxy_protocol": st.booleans(),
    },
    UdpDeploymentOptions: {
        "deploy_timeout": SECONDS, "zero_downtime": st.booleans(), "drain_strategy": TEXTS,
        "drain_timeout": SECONDS, "force_kill_timeout": SECONDS, "force": st.booleans(),
    },
}  # fmt: skip
FIELDS[UdpOptions] = {
    "port": NUMBERS, "protocol": TEXTS, "port_ranges": LISTS, "rtcp_policy": TEXTS,
    "sessions": st.builds(SessionOptions, **FIELDS[SessionOptions]),
    "health_check": st.builds(UdpHealthCheckOptions, **FIELDS[UdpHealthCheckOptions]),
}  # fmt: skip
FIELDS[UdpDeployOptions] = {
    "service": TEXTS,
    "targets": LISTS,
    "udp_options": st.builds(UdpOptions, **FIELDS[UdpOptions]),
    "deployment_options": st.builds(UdpDeploymentOptions, **FIELDS[UdpDeploymentOptions]),
}


@pytest.mark.fuzz
@given(st.builds(UdpDeployOptions, **FIELDS[UdpDeployOptions]))
def test_deploys_survive_the_way(options: UdpDeployOptions) -> None:
    assert from_json(UdpDeployOptions, json.loads(json.dumps(to_json(options)))) == options


@pytest.mark.parametrize("cls", FIELDS)
def test_every_field_is_tried(cls: type[Any]) -> None:
    assert {field.name for field in attrs.fields(cls)} == set(FIELDS[cls])


def test_nulls_of_other_clients_are_taken() -> None:
    document = {"service": "g", "targets": None, "udp_options": {"port_ranges": None}}
    options = from_json(UdpDeployOptions, document)
    assert (options.targets, options.udp_options.port_ranges) == ((), ())


@pytest.mark.fuzz
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([field.name for cls in (UdpDeployOptions, UdpOptions, SessionOptions)
                         for field in attrs.fields(cls)]), inner, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_any_document_is_read_or_refused(data: object) -> None:
    try:
        options = from_json(UdpDeployOptions, data)
        options.validate()
    except InvalidOptionsError as error:
        assert str(error)  # noqa: PT017  both outcomes are right here
    else:
        assert from_json(UdpDeployOptions, to_json(options)) == options
