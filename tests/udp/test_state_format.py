"""The document of the UDP services: its text, unknown keys, damage, round trips."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.json_format import StateFormatError
from kamal_proxy.state_format import SavedPause
from kamal_proxy.udp.options import (
    AFFINITY_STRATEGIES,
    HEALTH_CHECKS,
    MAX_SESSIONS,
    RTCP_POLICIES,
    SessionOptions,
    UdpHealthCheckOptions,
    UdpOptions,
)
from kamal_proxy.udp.state_format import SavedUdpService, decode, encode
from tests.fuzzing import at_least

GAME = SavedUdpService(name="game", options=UdpOptions(port=9999), targets=("game-1:9999",))
CALLS = SavedUdpService(
    name="calls",
    options=UdpOptions(
        protocol="webrtc",
        port_ranges=("10000-19999", "20000-29999"),
        rtcp_policy="separate-range",
        sessions=SessionOptions(
            affinity=True, strategy="source-ip", timeout=0.5, limit=7, proxy_protocol=True
        ),
        health_check=UdpHealthCheckOptions(
            method="http", path="/health", port=7880, interval=2, timeout=1.5
        ),
    ),
    targets=("10.0.0.1:7880", "[::1]:7880"),
    pause=SavedPause(state="stopped", stop_message="<later>", fail_after=30),
)
SAMPLE = (
    rb'[{"name":"game","options":{"port":9999,"protocol":"udp","port_ranges":[],'
    rb'"rtcp_policy":"auto","session_affinity":true,"affinity_strategy":"5-tuple",'
    rb'"session_timeout":60000000000,"max_sessions":10000,"proxy_protocol":false,'
    rb'"health_check":{"method":"tcp","path":"/up","port":0,"interval":1000000000,'
    rb'"timeout":5000000000}},"active_targets":["game-1:9999"],'
    rb'"pause_controller":{"state":0,"stop_message":"","fail_after":0}},'
    rb'{"name":"calls","options":{"port":0,"protocol":"webrtc",'
    rb'"port_ranges":["10000-19999","20000-29999"],"rtcp_policy":"separate-range",'
    rb'"session_affinity":true,"affinity_strategy":"source-ip","session_timeout":500000000,'
    rb'"max_sessions":7,"proxy_protocol":true,"health_check":{"method":"http","path":"/health",'
    rb'"port":7880,"interval":2000000000,"timeout":1500000000}},'
    rb'"active_targets":["10.0.0.1:7880","[::1]:7880"],'
    rb'"pause_controller":{"state":2,"stop_message":"\u003clater\u003e",'
    rb'"fail_after":30000000000}}]' + b"\n"
)


def document(*services: dict[str, Any]) -> bytes:
    return json.dumps(services).encode()


def test_the_text_is_the_one_that_the_page_tells() -> None:
    assert encode([GAME, CALLS]) == SAMPLE
    assert decode(SAMPLE) == (GAME, CALLS)


def test_no_services_is_a_state() -> None:
    assert encode([]) == b"[]\n"
    assert decode(b"[]\n") == ()


@pytest.mark.parametrize(
    "service",
    [
        {"name": "game", "options": {"port": 9999}},
        {"name": "game", "options": {"port": 9999, "health_check": {}}, "pause_controller": {}},
        {
            "name": "game",
            "options": {
                "port": 9999,
                "protocol": None,
                "port_ranges": None,
                "session_affinity": None,
                "session_timeout": None,
                "health_check": None,
            },
            "active_targets": None,
            "pause_controller": None,
        },
    ],
)
def test_missing_and_null_mean_the_default(service: dict[str, Any]) -> None:
    assert decode(document(service)) == (attrs.evolve(GAME, targets=()),)


def test_unknown_keys_survive_at_every_level() -> None:
    service = {
        "name": "game",
        "labels": {"a": [1, 2.5, None]},
        "options": {
            "new": True,
            "port": 9999,
            "session_timeout": 10**9,
            "health_check": {"newest": [{"deep": 1}], "port": 1},
        },
        "pause_controller": {"since": 3},
    }
    (loaded,) = decode(document(service))
    assert loaded.options.sessions.timeout == 1
    (written,) = json.loads(encode([loaded]))
    assert written["labels"] == {"a": [1, 2.5, None]}
    assert written["options"]["new"] is True
    assert written["options"]["health_check"]["newest"] == [{"deep": 1}]
    assert written["pause_controller"]["since"] == 3
    assert decode(encode([loaded])) == (loaded,)
    # What is known is never taken from there.
    changed = attrs.evolve(
        loaded, extra={"name": "other", "options": {"port": 1, "session_timeout": 1, "x": 2}}
    )
    (written,) = json.loads(encode([changed]))
    assert written["name"] == "game"
    assert (written["options"]["port"], written["options"]["session_timeout"]) == (9999, 10**9)
    assert written["options"]["x"] == 2


WRONG = [
    (b"", "it is empty"),
    (b"{}", "it must be a list of services"),
    (b"[null]", "service number 1 must be an object"),
    (b"[{}]", "service number 1: name is missing"),
    (b'[\n{"name" "a"}]', "line 2 column 9: Expecting ':' delimiter"),
    (b'[{"name": "\xff"}]', "byte 12 is not UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (document({"name": "a"}), "service 'a': options.port is missing"),
    (document({"name": "a", "options": {"port": 0}}), "service 'a': options.port is missing"),
    (
        document({"name": "a", "options": {"protocol": "webrtc"}}),
        "service 'a': protocol webrtc must have port-ranges, such as 10000-20000, or a port",
    ),
    (
        document({"name": "a", "options": {"port": 1, "port_ranges": ["1-2"]}}),
        "service 'a': port-ranges 1-2 must come with protocol webrtc",
    ),
    (document({"name": "a", "options": []}), "service 'a': options must be an object"),
    (document({"name": "a", "options": {"port": "1"}}), "options.port must be a whole number"),
    (document({"name": "a", "options": {"port": 65536}}), "service 'a': port 65536 must be from"),
    (document({"name": "a", "options": {"port": -1}}), "service 'a': port -1 must be from"),
    (document({"name": "a", "options": {"port_ranges": "1-2"}}), "port_ranges must be a list"),
    (document({"name": "a", "options": {"port_ranges": [1]}}), "port_ranges[0] must be a string"),
    (
        document({"name": "a", "options": {"port_ranges": ["2-1"]}}),
        "service 'a': port-ranges '2-1'",
    ),
    (document({"name": "a", "options": {"protocol": "sctp"}}), "service 'a': protocol 'sctp' must"),
    (document({"name": "a", "options": {"rtcp_policy": ""}}), "service 'a': rtcp-policy '' must"),
    (
        document({"name": "a", "options": {"session_affinity": 1}}),
        "service 'a': options.session_affinity must be true or false",
    ),
    (
        document({"name": "a", "options": {"affinity_strategy": "x"}}),
        "service 'a': affinity-strategy 'x' must be one of 5-tuple, source-ip, source-port",
    ),
    (
        document({"name": "a", "options": {"session_timeout": 1.5}}),
        "service 'a': options.session_timeout must be a whole number",
    ),
    (
        document({"name": "a", "options": {"session_timeout": 0}}),
        "'a': session-timeout must be more",
    ),
    (
        document({"name": "a", "options": {"max_sessions": 0}}),
        "service 'a': max-sessions 0 must be",
    ),
    (
        document({"name": "a", "options": {"health_check": {"method": "udp"}}}),
        "service 'a': health-check 'udp' must be one of tcp, http, none",
    ),
    (
        document({"name": "a", "options": {"health_check": {"port": True}}}),
        "service 'a': options.health_check.port must be a whole number",
    ),
    (
        document({"name": "a", "options": {"health_check": {"interval": -1}}}),
        "service 'a': health-check-interval must be more than zero",
    ),
    (
        document({"name": "a", "options": {"port": 1}, "active_targets": ["b:1", "b"]}),
        "service 'a': active_targets[1]: target b must have a port, such as b:9999",
    ),
    (
        document({"name": "a", "options": {"port": 1}, "active_targets": ["::1"]}),
        "service 'a': active_targets[0]: target ::1: an IPv6 address goes in brackets",
    ),
    (
        document({"name": "a", "options": {"port": 1}, "pause_controller": {"state": 3}}),
        "service 'a': pause_controller.state must be 0, 1 or 2",
    ),
    (
        document({"name": "a", "options": {"port": 1}}, {"name": "a", "options": {"port": 2}}),
        "service 'a' occurs twice",
    ),
]


@pytest.mark.parametrize(("content", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_is_not_a_state_is_refused_with_the_place(content: bytes, reason: str) -> None:
    with pytest.raises(StateFormatError, match=re.escape(reason)):
        decode(content)


def test_a_state_cut_anywhere_is_refused() -> None:
    end = SAMPLE.rindex(b"]") + 1
    for length in range(end):
        with pytest.raises(StateFormatError):
            decode(SAMPLE[:length])
    assert decode(SAMPLE[:end]) == (GAME, CALLS)


@pytest.mark.parametrize(
    "service",
    [
        attrs.evolve(GAME, name=""),
        attrs.evolve(GAME, options=UdpOptions()),
        attrs.evolve(GAME, options=UdpOptions(protocol="webrtc")),
        attrs.evolve(GAME, options=UdpOptions(port=9999, sessions=SessionOptions(limit=0))),
        attrs.evolve(GAME, targets=("no target",)),
        attrs.evolve(GAME, extra={"x": float("nan")}),
    ],
)
def test_what_could_not_be_read_again_is_never_written(service: SavedUdpService) -> None:
    with pytest.raises(StateFormatError):
        encode([service])


texts = st.text(max_size=20)
seconds = st.integers(1, 10**15).map(lambda nanoseconds: nanoseconds / 10**9)
ports = st.integers(1, 65_535)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)
shared_sessions = {
    "strategy": st.sampled_from(AFFINITY_STRATEGIES),
    "timeout": seconds,
    "limit": st.integers(1, MAX_SESSIONS),
    "proxy_protocol": st.booleans(),
}
sessions = st.builds(SessionOptions, affinity=st.booleans(), **shared_sessions)
sessions_of_calls = st.builds(SessionOptions, **shared_sessions)
shared = {
    "health_check": st.builds(
        UdpHealthCheckOptions,
        method=st.sampled_from(HEALTH_CHECKS),
        path=st.sampled_from(["/up", "up", "/a/\u00e9<&>", "/%20"]),
        port=st.integers(0, 65_535),
        interval=seconds,
        timeout=seconds,
    ),
}
calls = {"protocol": st.just("webrtc"), "sessions": sessions_of_calls, **shared}
options = (
    st.builds(UdpOptions, port=ports, sessions=sessions, **shared)
    | st.builds(
        UdpOptions,
        port=st.integers(0, 65_535),
        port_ranges=st.sampled_from([("1-2", "3-3"), ("40-50", "10-20")]),
        rtcp_policy=st.sampled_from(RTCP_POLICIES),
        **calls,
    )
    | st.builds(
        UdpOptions,
        port=ports,
        port_ranges=st.sampled_from([(), ("1-65535",)]),
        rtcp_policy=st.sampled_from(["adjacent", "auto"]),
        **calls,
    )
    | st.builds(UdpOptions, port_ranges=st.just(("7-8",)), **calls)
)
services = st.builds(
    SavedUdpService,
    name=texts.filter(bool),
    options=options,
    targets=st.lists(
        st.builds("{}:{}".format, st.sampled_from(["game-1", "10.0.0.1", "a_b.example."]), ports)
        | st.ip_addresses(v=6).map(lambda address: f"[{address}]:9"),
        max_size=3,
    ).map(tuple),
    pause=st.builds(
        SavedPause,
        state=st.sampled_from(["running", "paused", "stopped"]),
        stop_message=texts,
        fail_after=seconds,
    ),
    extra=st.dictionaries(st.sampled_from(["http", "labels", "x"]), json_values, max_size=2),
)


@pytest.mark.fuzz
@at_least(100)
@given(st.lists(services, max_size=2, unique_by=lambda service: service.name))
def test_every_state_survives(saved: list[SavedUdpService]) -> None:
    content = encode(saved)
    assert content.count(b"\n") == 1
    assert decode(content) == tuple(saved)
    assert encode(decode(content)) == content


def test_the_strategy_states_every_option() -> None:
    """An option added later must be added to the format and to the strategy above."""
    (written,) = json.loads(encode([GAME]))
    # The five of SessionOptions lie among those of the service.
    assert len(attrs.fields(SessionOptions)) == 5
    names = {field.name for field in attrs.fields(UdpOptions)} - {"sessions"}
    assert set(written["options"]) == names | {
        "session_affinity",
        "affinity_strategy",
        "session_timeout",
        "max_sessions",
        "proxy_protocol",
    }
    health_check = {field.name for field in attrs.fields(UdpHealthCheckOptions)}
    assert set(written["options"]["health_check"]) == health_check


@pytest.mark.fuzz
@at_least(200)
@given(st.binary(max_size=60) | st.text('[]{}",:0123name e-+.\\u', max_size=60).map(str.encode))
def test_noise_is_refused_or_can_be_written_again(content: bytes) -> None:
    with contextlib.suppress(StateFormatError):
        assert encode(decode(content))


@pytest.mark.fuzz
@at_least(200)
@given(
    st.integers(0, len(SAMPLE)), st.integers(0, 20), st.binary(max_size=5) | texts.map(str.encode)
)
def test_a_mutated_state_is_refused_or_can_be_written_again(at: int, gone: int, new: bytes) -> None:
    with contextlib.suppress(StateFormatError):
        assert encode(decode(SAMPLE[:at] + new + SAMPLE[at + gone :]))
