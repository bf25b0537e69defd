"""The document of the saved state: the Go proxy's samples, older versions, damage, round trips."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.json_format import StateFormatError
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state_format import SavedPause, SavedRollout, SavedService, decode, encode
from kamal_proxy.target_options import HealthCheckOptions, PathTimeout, TargetOptions

SAMPLES = Path(__file__).parent / "samples"


def document(*services: dict[str, Any]) -> bytes:
    return json.dumps(services).encode()


def test_the_go_sample_is_understood() -> None:
    shop, blog, pay = decode((SAMPLES / "go.state").read_bytes())
    assert shop == SavedService(
        name="shop",
        service_options=ServiceOptions(
            hosts=("shop.example.com", "*.shop.example.com"),
            path_prefixes=("/api", "/v2"),
            strip_prefix=False,
            acme_cache_path="/srv/certs",
            error_page_path="pages",
            writer_affinity_timeout=0.0,
            exclude_metrics_paths=("/ping",),
            client_ip_header="X-Real-Ip",
        ),
        target_options=TargetOptions(
            health_check=HealthCheckOptions(path="/health", port=9000, interval=1.5, host="shop"),
            response_timeout=90.5,
            buffer_requests=True,
            max_memory_buffer_size=0,
            max_request_body_size=7_000_000,
            log_request_headers=("Cache-Control", "User-Agent"),
            forward_headers=True,
        ),
        active_targets=("10.0.0.1:3000", "shop-2:3000"),
        active_readers=("reader_1:3000",),
        rollout_targets=("10.0.0.3:3000",),
        rollout=SavedRollout(percentage=33, percentage_split_point=1417339207.3500001),
    )
    assert blog.name == "bløg"
    assert blog.service_options.hosts == ()
    assert blog.pause == SavedPause(
        state="stopped", stop_message='gone <b>fishing</b> & more\n\u2028"q" é'
    )
    assert pay.pause == SavedPause(state="paused", fail_after=45.0)
    assert pay.target_options.forward_headers is False
    assert pay.service_options.tls_certificate_path == "cert.pem"
    assert pay.rollout_readers == ("10.0.0.7:80",)
    assert pay.rollout is not None
    assert pay.rollout.allowlist == ("alice",)


def test_the_go_sample_survives_byte_for_byte() -> None:
    content = (SAMPLES / "go.state").read_bytes()
    assert encode(decode(content)) == content


def test_what_versions_before_0_9_wrote_is_understood() -> None:
    first, second, third = decode((SAMPLES / "go-before-0.9.state").read_bytes())
    assert first.service_options.hosts == ("first.example.com",)
    assert first.service_options.tls_enabled
    assert first.service_options.tls_redirect
    assert first.service_options.acme_directory == "https://acme.example.com/directory"
    assert first.active_targets == ("10.0.0.1:80",)
    assert first.rollout_targets == ()
    assert second.service_options.hosts == ("a.example.com", "b.example.com")
    assert second.service_options.tls_enabled
    assert not second.service_options.tls_redirect
    assert second.rollout_targets == ("10.0.0.3:80",)
    assert second.rollout == SavedRollout(percentage=50, percentage_split_point=2147483647.5)
    assert third.service_options.hosts == ()
    assert third.service_options.path_prefixes == ("/app",)
    assert not third.service_options.tls_redirect
    assert not third.service_options.strip_prefix
    assert third.service_options.writer_affinity_timeout == 1.0
    assert third.target_options.response_timeout == 10.0
    assert [service.extra for service in (first, second, third)] == [{}, {}, {}]


def test_todays_keys_win_over_those_of_older_versions() -> None:
    (service,) = decode(
        document(
            {
                "name": "app",
                "options": {
                    "hosts": ["new.example.com"],
                    "path_prefixes": ["/new"],
                    "tls_enabled": False,
                    "tls_hostname": "old.example.com",
                    "tls_redirect": True,
                    "tls_disable_redirect": True,
                },
                "active_targets": ["new:80"],
                "rollout_targets": ["new:81"],
                "active_target": "old:80",
                "rollout_target": "old:81",
                "host": "older.example.com",
                "hosts": ["old.example.com"],
                "path_prefixes": ["/old"],
            }
        )
    )
    assert service.service_options == ServiceOptions(
        hosts=("new.example.com",), path_prefixes=("/new",)
    )
    assert (service.active_targets, service.rollout_targets) == (("new:80",), ("new:81",))


@pytest.mark.parametrize(
    "service",
    [
        {"name": "app"},
        {"name": "app", "options": {}, "target_options": {"health_check_config": {}}},
        {"name": "app", "options": None, "target_options": None, "pause_controller": None},
        {
            "name": "app",
            "options": {"hosts": None, "path_prefixes": [], "exclude_metrics_paths": None},
            "target_options": {
                "health_check_config": {"interval": 0, "timeout": 0},
            },
            "pause_controller": {},
        },
        {"name": "app", "target_options": {"response_timeout": -1, "log_request_headers": []}},
    ],
)
def test_missing_null_and_impossible_zero_mean_the_default(service: dict[str, Any]) -> None:
    assert decode(document(service)) == (SavedService(name="app"),)


def test_zero_that_can_be_meant_is_kept() -> None:
    (service,) = decode(
        document(
            {
                "name": "app",
                "options": {"writer_affinity_timeout": 0, "strip_prefix": False},
                "target_options": {
                    "response_timeout": 0,
                    "max_memory_buffer_size": 0,
                    "health_check_config": {"path": ""},
                },
                "pause_controller": {"state": 1, "fail_after": 0},
            }
        )
    )
    assert service.service_options.writer_affinity_timeout == 0
    assert not service.service_options.strip_prefix
    assert service.target_options.response_timeout == 0
    assert service.target_options.max_memory_buffer_size == 0
    assert service.target_options.health_check.path == ""
    assert service.pause == SavedPause(state="paused")


def test_sizes_and_timeouts_below_zero_mean_zero() -> None:
    """As the Go proxy has it: no limit, no memory, no timeout."""
    (service,) = decode(
        document(
            {
                "name": "app",
                "target_options": {
                    "max_memory_buffer_size": -100,
                    "max_request_body_size": -1,
                    "max_response_body_size": -(2**63),
                    "path_timeouts": {"/slow": -5, "/": 10**9},
                },
            }
        )
    )
    options = service.target_options
    assert (options.max_memory_buffer_size, options.max_request_body_size) == (0, 0)
    assert options.max_response_body_size == 0
    assert options.path_timeouts == (
        PathTimeout(path="/slow", timeout=0),
        PathTimeout(path="/", timeout=1),
    )
    options.validate()


def test_unknown_keys_survive_at_every_level() -> None:
    service = {
        "name": "app",
        "udp": {"ports": [1, 2.5, None]},
        "options": {"new": True, "hosts": ["a.example.com"]},
        "target_options": {
            "newer": "x",
            "forward_headers": True,
            "health_check_config": {"newest": [{"deep": 1}]},
        },
        "pause_controller": {"since": 3},
        "rollout_controller": {"seed": 4},
    }
    (loaded,) = decode(document(service))
    assert loaded.service_options.hosts == ("a.example.com",)
    (written,) = json.loads(encode([loaded]))
    assert written["udp"] == {"ports": [1, 2.5, None]}
    assert written["options"]["new"] is True
    assert written["target_options"]["newer"] == "x"
    assert written["target_options"]["health_check_config"]["newest"] == [{"deep": 1}]
    assert written["pause_controller"]["since"] == 3
    assert written["rollout_controller"]["seed"] == 4
    assert decode(encode([loaded])) == (loaded,)
    # What is known is never taken from there, and a rollout that ended takes its extras along.
    ended = attrs.evolve(loaded, rollout=None, extra={**loaded.extra, "name": "other"})
    (written,) = json.loads(encode([ended]))
    assert written["name"] == "app"
    assert written["rollout_controller"] is None


def test_options_that_only_this_proxy_has_are_written_only_if_they_say_something() -> None:
    """A state file that moves on to the Go proxy is as that would write it."""
    said = SavedService(
        name="app",
        service_options=ServiceOptions(
            hosts=("a.test",), tls_enabled=True, tls_client_ca_path="/ca.pem"
        ),
        target_options=TargetOptions(forward_headers=False, websocket_idle_timeout=3600.0),
    )
    (written,) = json.loads(encode([said]))
    assert written["options"]["tls_client_ca_path"] == "/ca.pem"
    assert written["target_options"]["websocket_idle_timeout"] == 3600 * 10**9
    assert decode(encode([said])) == (said,)
    (silent,) = json.loads(encode([SavedService(name="app")]))
    assert "tls_client_ca_path" not in silent["options"]
    assert not {"path_timeouts", "websocket_idle_timeout"} & set(silent["target_options"])


@pytest.mark.parametrize("tls", [True, False])
def test_forward_headers_is_resolved_when_written(tls: bool) -> None:
    service = SavedService(name="app", service_options=ServiceOptions(tls_enabled=tls))
    assert service.target_options.forward_headers is None
    (written,) = json.loads(encode([service]))
    assert written["target_options"]["forward_headers"] is not tls


def test_no_services_is_a_state() -> None:
    assert encode([]) == b"[]\n"
    assert decode(b"[]\n") == ()


def test_what_go_escapes_is_escaped_and_a_lone_surrogate_replaced() -> None:
    pause = SavedPause(state="stopped", stop_message="<&>\u2028\u2029\x00\ud800é")
    content = encode([SavedService(name="app", pause=pause)])
    assert rb'"\u003c\u0026\u003e\u2028\u2029\u0000' + "\ufffdé".encode() + b'"' in content
    assert decode(content)[0].pause.stop_message == "<&>\u2028\u2029\x00\ufffdé"


LONE = "a\ud800b"


@pytest.mark.parametrize(
    "service",
    [
        {"name": LONE},
        {"options": {"hosts": [LONE]}},
        {"options": {"path_prefixes": ["/" + LONE]}},
        {"options": {"canonical_host": LONE}},
        {"options": {"client_ip_header": LONE}},
        {"options": {"error_page_path": "/" + LONE}},
        {"options": {"exclude_metrics_paths": [LONE]}},
        {"target_options": {"health_check_config": {"path": "/" + LONE}}},
        {"target_options": {"health_check_config": {"host": LONE}}},
        {"target_options": {"log_request_headers": [LONE]}},
        {"target_options": {"path_timeouts": {"/" + LONE: 1}}},
        {"pause_controller": {"state": 2, "stop_message": LONE}},
        {"rollout_controller": {"allowlist": [LONE]}},
    ],
)
def test_a_lone_surrogate_is_replaced_when_it_is_read(service: dict[str, Any]) -> None:
    """It fits into no header, log line, metric or answer."""
    (read,) = decode(document({"name": "app"} | service))
    known = str(attrs.evolve(read, extra={}))
    assert "\\ud800" not in known
    assert "a\ufffdb" in known


WRONG = [
    (b"", "it is empty"),
    (b" \n", "it is empty"),
    (b"null", "it must be a list of services"),
    (b"{}", "it must be a list of services"),
    (b"0", "it must be a list of services"),
    (b"[null]", "service number 1 must be an object"),
    (b"[{}]", "service number 1: name is missing"),
    (b'[{"name": ""}]', "service number 1: name is missing"),
    (b'[{"name": "a"}, {"name": 5}]', "service number 2: name must be a string"),
    (b'[{"name": "a"}, {"name": "a"}]', "service 'a' occurs twice"),
    (b"[]\n[]", "line 2 column 1: Extra data"),
    (b'[\n{"name" "a"}]', "line 2 column 9: Expecting ':' delimiter"),
    (b'\xef\xbb\xbf[{"name": "a"}]', "BOM"),
    (b'[{"name": "\xff"}]', "byte 12 is not UTF-8"),
    (b'[{"name": "a\x01"}]', "Invalid control character"),
    (b"[" * 100_000, "nested too deeply"),
    (b'[{"name": "a", "x": ' + b"9" * 5000 + b"}]", "digits"),
    (b'[{"name": "a", "x": 1e999}]', "1e999 is too large a number"),
    (b'[{"name": "a", "x": NaN}]', "NaN is not a number that JSON has"),
    (b'[{"name": "a", "options": []}]', "service 'a': options must be an object"),
    (b'[{"name": "a", "options": {"hosts": "x"}}]', "service 'a': options.hosts must be a list"),
    (b'[{"name": "a", "options": {"hosts": ["x", 1]}}]', "options.hosts[1] must be a string"),
    (b'[{"name": "a", "options": {"tls_enabled": 1}}]', "options.tls_enabled must be true or"),
    (
        b'[{"name": "a", "options": {"writer_affinity_timeout": 1.5}}]',
        "service 'a': options.writer_affinity_timeout must be a whole number",
    ),
    (
        b'[{"name": "a", "target_options": {"health_check_config": {"port": true}}}]',
        "service 'a': target_options.health_check_config.port must be a whole number",
    ),
    (
        b'[{"name": "a", "target_options": {"max_request_body_size": 9223372036854775808}}]',
        "target_options.max_request_body_size does not fit into 64 bits",
    ),
    (
        b'[{"name": "a", "active_targets": ["http://b"]}]',
        "active_targets[0]: target http://b: give",
    ),
    (b'[{"name": "a", "active_target": "b/c"}]', "service 'a': active_target[0]: b/c :invalid"),
    (b'[{"name": "a", "pause_controller": {"state": 3}}]', "pause_controller.state must be 0, 1"),
    (b'[{"name": "a", "pause_controller": {"state": -1}}]', "pause_controller.state must be 0, 1"),
    (b'[{"name": "a", "rollout_controller": 1}]', "service 'a': rollout_controller must be an obj"),
    (
        b'[{"name": "a", "rollout_controller": {"percentage_split_point": "1"}}]',
        "service 'a': rollout_controller.percentage_split_point must be a number",
    ),
]


@pytest.mark.parametrize(("content", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_is_not_a_state_is_refused_with_the_place(content: bytes, reason: str) -> None:
    with pytest.raises(StateFormatError, match=re.escape(reason)):
        decode(content)


def test_an_absurd_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode([SavedService(name="app")])
    monkeypatch.setattr("kamal_proxy.json_format.MAX_SIZE", len(content))
    assert len(decode(content)) == 1
    with pytest.raises(StateFormatError, match="larger than"):
        decode(content + b" ")


def test_a_state_cut_anywhere_is_refused() -> None:
    content = (SAMPLES / "go.state").read_bytes()
    whole = decode(content)
    end = content.rindex(b"]") + 1
    for length in range(end):
        with pytest.raises(StateFormatError):
            decode(content[:length])
    assert decode(content[:end]) == whole


@pytest.mark.parametrize(
    "service",
    [
        SavedService(name=""),
        SavedService(name="a", target_options=TargetOptions(max_request_body_size=2**63)),
        SavedService(name="a", active_targets=("no target",)),
        SavedService(name="a", rollout=SavedRollout(percentage_split_point=float("inf"))),
        SavedService(name="a", extra={"x": float("nan")}),
    ],
)
def test_what_could_not_be_read_again_is_never_written(service: SavedService) -> None:
    with pytest.raises(StateFormatError):
        encode([service])


texts = st.text(max_size=20)
lists = st.lists(texts, max_size=3).map(tuple)
sizes = st.integers(-(2**63), 2**63 - 1)
limits = st.integers(0, 2**63 - 1)
seconds = st.integers(0, 10**15).map(lambda nanoseconds: nanoseconds / 10**9)
more_seconds = st.integers(1, 10**15).map(lambda nanoseconds: nanoseconds / 10**9)
targets = st.lists(
    st.from_regex(r"(h2c://)?[A-Za-z0-9_][-_.A-Za-z0-9+]{1,20}(:80)?", fullmatch=True), max_size=2
).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)
services = st.builds(
    SavedService,
    name=st.text(min_size=1, max_size=20),
    service_options=st.builds(
        ServiceOptions,
        hosts=lists,
        path_prefixes=lists,
        strip_prefix=st.booleans(),
        tls_enabled=st.booleans(),
        tls_certificate_path=texts,
        tls_private_key_path=texts,
        tls_on_demand_url=texts,
        tls_redirect=st.booleans(),
        canonical_host=texts,
        acme_directory=texts,
        acme_cache_path=texts,
        error_page_path=texts,
        writer_affinity_timeout=seconds,
        read_targets_accept_websockets=st.booleans(),
        exclude_metrics_paths=lists,
        client_ip_header=texts,
        tls_client_ca_path=texts,
    ),
    target_options=st.builds(
        TargetOptions,
        health_check=st.builds(
            HealthCheckOptions,
            path=texts,
            port=sizes,
            interval=more_seconds,
            timeout=more_seconds,
            host=texts,
        ),
        response_timeout=more_seconds,
        buffer_requests=st.booleans(),
        buffer_responses=st.booleans(),
        max_memory_buffer_size=limits,
        max_request_body_size=limits,
        max_response_body_size=limits,
        log_request_headers=lists,
        log_response_headers=lists,
        forward_headers=st.booleans(),
        scope_cookie_paths=st.booleans(),
        path_timeouts=st.lists(
            st.builds(PathTimeout, path=texts, timeout=seconds),
            max_size=2,
            unique_by=lambda limit: limit.path,
        ).map(tuple),
        websocket_idle_timeout=seconds,
    ),
    active_targets=targets,
    active_readers=targets,
    rollout_targets=targets,
    rollout_readers=targets,
    pause=st.builds(
        SavedPause,
        state=st.sampled_from(["running", "paused", "stopped"]),
        stop_message=texts,
        fail_after=seconds,
    ),
    rollout=st.none()
    | st.builds(
        SavedRollout,
        percentage=sizes,
        percentage_split_point=st.floats(0, 2**32),
        allowlist=lists,
    ),
    extra=st.dictionaries(st.sampled_from(["udp", "labels", "x"]), json_values, max_size=2),
)


@pytest.mark.fuzz
@given(st.lists(services, max_size=3, unique_by=lambda service: service.name))
def test_every_state_survives(saved: list[SavedService]) -> None:
    content = encode(saved)
    assert content.count(b"\n") == 1
    assert decode(content) == tuple(saved)
    assert encode(decode(content)) == content


def test_the_strategy_states_every_option() -> None:
    """An option added later must be added to the format and to the strategy above."""
    (written,) = json.loads(encode([SavedService(name="app")]))
    service_options = {field.name for field in attrs.fields(ServiceOptions)}
    # Written only if they say something.
    own = {"path_timeouts", "websocket_idle_timeout", "tls_client_ca_path"}
    target_options = {field.name for field in attrs.fields(TargetOptions)} - {"health_check"} - own
    health_check = {field.name for field in attrs.fields(HealthCheckOptions)}
    assert set(written["options"]) == service_options - own
    assert set(written["target_options"]) == target_options | {"health_check_config"}
    assert set(written["target_options"]["health_check_config"]) == health_check


@pytest.mark.fuzz
@given(st.binary(max_size=60) | st.text('[]{}",:0123name e-+.\\u', max_size=60).map(str.encode))
def test_noise_is_refused_or_can_be_written_again(content: bytes) -> None:
    with contextlib.suppress(StateFormatError):
        assert encode(decode(content))
