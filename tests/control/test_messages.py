"""JSON of the admin API: nothing gets lost on the way, nothing unknown is believed."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.control.messages import (
    CertificateDescription,
    Event,
    ServiceDescription,
    from_json,
    to_json,
)
from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.options import (
    DeploymentOptions,
    DeployOptions,
    PauseOptions,
    RolloutOptions,
    RolloutSplit,
    ServiceOptions,
    StopOptions,
)
from kamal_proxy.target_options import HealthCheckOptions, PathTimeout, TargetOptions

NAMES = st.text("abc-é", min_size=1, max_size=5)
LISTS = st.lists(NAMES, max_size=3).map(tuple)
SECONDS = st.floats(0, 1e6)

DEPLOYMENTS = st.builds(
    DeploymentOptions, deploy_timeout=SECONDS, drain_timeout=SECONDS, force=st.booleans()
)
DEPLOYS = st.builds(
    DeployOptions,
    service=NAMES,
    targets=LISTS,
    read_targets=LISTS,
    service_options=st.builds(
        ServiceOptions, hosts=LISTS, path_prefixes=LISTS, tls_enabled=st.booleans(),
        tls_client_ca_path=NAMES,
        strip_prefix=st.booleans(), canonical_host=NAMES, writer_affinity_timeout=SECONDS,
    ),
    target_options=st.builds(
        TargetOptions,
        health_check=st.builds(
            HealthCheckOptions, path=NAMES, port=st.integers(0, 65535), host=NAMES
        ),
        forward_headers=st.none() | st.booleans(),
        max_request_body_size=st.integers(0, 2**63 - 1),
        log_request_headers=LISTS,
        path_timeouts=st.lists(
            st.builds(PathTimeout, path=NAMES, timeout=SECONDS), max_size=3
        ).map(tuple),
        websocket_idle_timeout=SECONDS,
    ),
    deployment_options=DEPLOYMENTS,
)  # fmt: skip
CHANGES = st.one_of(
    st.builds(PauseOptions, drain_timeout=SECONDS, max_pause=SECONDS),
    st.builds(StopOptions, drain_timeout=SECONDS, message=NAMES),
    st.builds(RolloutOptions, targets=LISTS, read_targets=LISTS, deployment_options=DEPLOYMENTS),
    st.builds(RolloutSplit, percentage=st.integers(0, 100), allowlist=LISTS),
)


@pytest.mark.fuzz
@given(DEPLOYS)
def test_deploys_survive_the_way(options: DeployOptions) -> None:
    assert from_json(DeployOptions, json.loads(json.dumps(to_json(options)))) == options


@pytest.mark.fuzz
@given(CHANGES)
def test_other_changes_survive_the_way(
    options: PauseOptions | StopOptions | RolloutOptions | RolloutSplit,
) -> None:
    assert from_json(type(options), json.loads(json.dumps(to_json(options)))) == options


@pytest.mark.fuzz
@given(st.builds(
    Event, event=NAMES, elapsed=SECONDS, ok=st.booleans(), details=LISTS,
    goodbyes=st.integers(0, 10**6), cut_unsaid=st.integers(0, 10**6),
))  # fmt: skip
def test_events_survive_the_way(event: Event) -> None:
    assert from_json(Event, json.loads(json.dumps(to_json(event)))) == event


@pytest.mark.fuzz
@given(st.builds(
    ServiceDescription, name=NAMES, hosts=LISTS, tls=st.booleans(), read_targets=LISTS,
    rollout_active=st.booleans(), rollout_percentage=st.integers(0, 100), rollout_allowlist=LISTS,
    stop_message=NAMES, max_pause=SECONDS, udp_ports=LISTS, protocol=NAMES,
    max_sessions=st.integers(0, 10**6), pairs_in_use=st.integers(0, 10**6),
))  # fmt: skip
def test_descriptions_survive_the_way(description: ServiceDescription) -> None:
    again = from_json(ServiceDescription, json.loads(json.dumps(to_json(description))))
    assert again == description


@pytest.mark.fuzz
@given(st.builds(
    CertificateDescription, host=NAMES, names=LISTS, source=NAMES, state=NAMES, issuer=NAMES,
    key_type=NAMES, not_after=SECONDS, renew_at=SECONDS, next_attempt=SECONDS, last_error=NAMES,
    directory=NAMES,
))  # fmt: skip
def test_certificates_survive_the_way(description: CertificateDescription) -> None:
    again = from_json(CertificateDescription, json.loads(json.dumps(to_json(description))))
    assert again == description


def test_what_is_at_its_default_is_left_out() -> None:
    options = DeployOptions(service="app", targets=("t:1",))
    assert to_json(options) == {"service": "app", "targets": ["t:1"]}
    assert to_json(Event(event="done")) == {"event": "done"}


def test_tri_state_is_kept() -> None:
    for value in (None, True, False):
        options = TargetOptions(forward_headers=value)
        assert from_json(TargetOptions, to_json(options)).forward_headers is value


BASE = {"service": "app", "targets": ["t:1"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nope": 1}, "unknown field nope"),
        ({"service_options": {"host": ["a"]}}, "unknown field service_options.host"),
        (
            {"target_options": {"health_check": {"intervall": 1}}},
            "unknown field target_options.health_check.intervall",
        ),
        ({"service": 1}, "service must be a string"),
        ({"service": None}, "service must be a string"),
        ({"targets": "t:1"}, "targets must be a list"),
        ({"targets": ["t:1", 2]}, "targets[1] must be a string"),
        ({"service_options": []}, "service_options must be a JSON object"),
        ({"service_options": {"tls_enabled": 1}}, "service_options.tls_enabled must be true or "
         "false"),
        ({"service_options": {"tls_enabled": "true"}}, "service_options.tls_enabled must be true "
         "or false"),
        ({"target_options": {"buffer_requests": None}}, "target_options.buffer_requests must be "
         "true or false"),
        ({"target_options": {"forward_headers": 0}}, "target_options.forward_headers must be true "
         "or false"),
        ({"target_options": {"max_request_body_size": 1.0}}, "target_options.max_request_body_size "
         "must be a whole number"),
        ({"target_options": {"max_request_body_size": True}}, "target_options."
         "max_request_body_size must be a whole number"),
        ({"deployment_options": {"drain_timeout": "30s"}}, "deployment_options.drain_timeout must "
         "be a number"),
        ({"deployment_options": {"drain_timeout": True}}, "deployment_options.drain_timeout must "
         "be a number"),
        ({"deployment_options": {"drain_timeout": 10**400}}, "deployment_options.drain_timeout "
         "must fit 64 bits"),
        ({"target_options": {"max_request_body_size": 2**63}},
         "target_options.max_request_body_size must fit 64 bits"),
        ({"targets": ["web:80", "\ud800"]}, "targets[1] must be Unicode text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        from_json(DeployOptions, {**BASE, **change})
    assert str(caught.value) == message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidOptionsError, match=r"^missing field targets$"):
        from_json(DeployOptions, {"service": "app"})


@pytest.mark.parametrize("data", [None, [], "x", 1, True])
def test_a_document_is_an_object(data: object) -> None:
    with pytest.raises(InvalidOptionsError, match=r"^the document must be a JSON object$"):
        from_json(DeployOptions, data)


def test_whole_numbers_and_nulls_of_other_clients_are_taken() -> None:
    options = from_json(
        DeployOptions,
        {**BASE, "deployment_options": {"drain_timeout": 3}, "service_options": {"hosts": None}},
    )
    assert options.deployment_options.drain_timeout == 3.0
    assert options.service_options.hosts == ()


@pytest.mark.fuzz
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([field.name for cls in (DeployOptions, ServiceOptions, TargetOptions)
                         for field in attrs.fields(cls)]), inner, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_any_document_is_read_or_refused(data: object) -> None:
    try:
        options = from_json(DeployOptions, data)
    except InvalidOptionsError as error:
        assert str(error)  # noqa: PT017  both outcomes are right here
    else:
        assert from_json(DeployOptions, to_json(options)) == options
