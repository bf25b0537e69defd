"""What is counted is what Prometheus reads, in both formats, whatever the labels say."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kamal_proxy.metrics import DEPLOY_BUCKETS, PART_SAMPLES, REQUEST_BUCKETS, Metrics
from tests.fuzzing import at_least

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = "text/plain;version=0.0.4"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
# What Prometheus 3 sends.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
CONTENT_TYPES = {
    "text/plain; version=0.0.4; charset=utf-8",
    "text/plain; version=1.0.0; charset=utf-8; escaping=underscores",
    "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
}

Labels = frozenset[tuple[str, str]]


def samples_of(metrics: Metrics, accept: str = TEXT) -> dict[tuple[str, Labels], float]:
    """Return what Prometheus reads of the proxy's own metrics."""
    body, content_type = metrics.render(accept)
    parse = (
        openmetrics.text_string_to_metric_families
        if content_type.startswith(b"application/openmetrics-text")
        else text_string_to_metric_families
    )
    found: dict[tuple[str, Labels], float] = {}
    for family in parse(body.decode()):
        for sample in family.samples:
            if sample.name.startswith("kamal_proxy_"):
                key = sample.name, frozenset(sample.labels.items())
                assert key not in found
                found[key] = sample.value
    return found


def sample(name: str, **labels: str) -> tuple[str, Labels]:
    return f"kamal_proxy_{name}", frozenset(labels.items())


@pytest.fixture(params=[TEXT, OPENMETRICS, PROMETHEUS], ids=["text", "openmetrics", "prometheus"])
def accept(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


# --- each call -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m: m.enter("web"), {sample("http_in_flight_requests", service="web"): 1}),
        (
            lambda m: m.failure("web", "target refused"),
            {sample("http_failures_total", service="web", reason="target refused"): 1},
        ),
        (
            lambda m: m.flood("HTTP/2", "frames"),
            {sample("http_floods_total", protocol="HTTP/2", reason="frames"): 1},
        ),
        (
            lambda m: m.connect("web", True),
            {sample("upstream_connects_total", service="web", result="ok"): 1},
        ),
        (
            lambda m: m.connect("web", False),
            {sample("upstream_connects_total", service="web", result="failed"): 1},
        ),
        (lambda m: m.reuse("web"), {sample("upstream_reuses_total", service="web"): 1}),
        (lambda m: m.retry("web"), {sample("upstream_retries_total", service="web"): 1}),
        (
            lambda m: m.upgraded("web", "websocket", 1),
            {
                sample("upgraded_connections", service="web", protocol="websocket"): 1,
                sample("upgrades_total", service="web", protocol="websocket"): 1,
            },
        ),
        (
            lambda m: m.websocket_close("web", "clean"),
            {sample("websocket_drain_closes_total", service="web", result="clean"): 1},
        ),
        (
            lambda m: m.probe("web", True),
            {sample("probes_total", service="web", result="ok"): 1},
        ),
        (
            lambda m: m.probe("web", False),
            {sample("probes_total", service="web", result="failed"): 1},
        ),
        (
            lambda m: m.gauge("kamal_proxy_spill_bytes", "Bytes.", lambda: 4096),
            {sample("spill_bytes"): 4096},
        ),
    ],
)
def test_one_call(
    accept: str, call: Callable[[Metrics], None], expected: dict[tuple[str, Labels], float]
) -> None:
    metrics = Metrics()
    call(metrics)

    assert samples_of(metrics, accept) == expected


def test_nothing_is_shown_of_what_never_happened(accept: str) -> None:
    assert samples_of(Metrics(), accept) == {}


def test_calls_add_up_by_service() -> None:
    metrics = Metrics()
    for service in ("web", "api", "web"):
        metrics.retry(service)
        metrics.connect(service, True)

    found = samples_of(metrics)

    assert found[sample("upstream_retries_total", service="web")] == 2
    assert found[sample("upstream_connects_total", service="web", result="ok")] == 2
    assert found[sample("upstream_connects_total", service="api", result="ok")] == 1


def test_two_proxies_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.retry("web")

    assert samples_of(other) == {}


# --- requests ------------------------------------------------------------------------------------


def test_the_lines_that_dashboards_for_the_original_read() -> None:
    metrics = Metrics()
    metrics.enter("web")
    metrics.request("web", b"GET", 200, 0.3)
    lines = metrics.render(TEXT)[0].decode().splitlines()
    ours = [line for line in lines if "kamal_proxy_" in line and not line.startswith("# HELP")]
    bounds = ("0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "+Inf")

    assert ours == [
        "# TYPE kamal_proxy_http_in_flight_requests gauge",
        'kamal_proxy_http_in_flight_requests{service="web"} 1.0',
        "# TYPE kamal_proxy_http_requests_total counter",
        'kamal_proxy_http_requests_total{method="GET",service="web",status="200"} 1.0',
        "# TYPE kamal_proxy_http_request_duration_seconds histogram",
        *(
            f'kamal_proxy_http_request_duration_seconds_bucket{{le="{bound}",method="GET",'
            f'service="web",status="200"}} {float(number >= 6)}'
            for number, bound in enumerate(bounds)
        ),
        "kamal_proxy_http_request_duration_seconds_count"
        '{method="GET",service="web",status="200"} 1.0',
        "kamal_proxy_http_request_duration_seconds_sum"
        '{method="GET",service="web",status="200"} 0.3',
    ]


def test_bounds_of_openmetrics_are_spelled_as_floats() -> None:
    metrics = Metrics()
    metrics.request("web", b"GET", 200, 0.3)
    body = metrics.render(OPENMETRICS)[0].decode()

    assert re.findall(r'le="(.*?)"', body) == [*map(str, REQUEST_BUCKETS), "+Inf"]


@pytest.mark.parametrize("bound", REQUEST_BUCKETS)
def test_a_bound_belongs_to_its_bucket(bound: float, accept: str) -> None:
    metrics = Metrics()
    metrics.request("", b"GET", 404, bound)
    metrics.request("", b"GET", 404, bound * 1.0001)
    metrics.request("", b"GET", 404, 1e6)

    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in samples_of(metrics, accept).items()
        if name == "kamal_proxy_http_request_duration_seconds_bucket"
    }

    assert list(buckets) == [*REQUEST_BUCKETS, float("inf")]
    assert [value for at, value in buckets.items() if at < bound] == [0] * (
        REQUEST_BUCKETS.index(bound)
    )
    assert buckets[bound] == 1
    assert {value for at, value in buckets.items() if bound < at < float("inf")} <= {2}
    assert buckets[float("inf")] == 3


@pytest.mark.parametrize(
    ("method", "counted"),
    [
        *(
            (method, method.decode())
            for method in b"GET HEAD POST PUT PATCH DELETE CONNECT OPTIONS TRACE".split()
        ),
        (b"PROPFIND", "OTHER"),
        (b"get", "OTHER"),
        (b"OTHER", "OTHER"),
        (b"", "OTHER"),
        (b"\xff\n", "OTHER"),
    ],
)
def test_methods(method: bytes, counted: str) -> None:
    metrics = Metrics()
    metrics.request("web", method, 200, 0.01)

    found = samples_of(metrics)

    labels = {"service": "web", "method": counted, "status": "200"}
    assert found[sample("http_requests_total", **labels)] == 1
    assert found[sample("http_request_duration_seconds_count", **labels)] == 1


def test_strange_methods_share_one_series() -> None:
    metrics = Metrics()
    for number in range(500):
        metrics.request("web", b"M%d" % number, 405, 0.01)

    found = samples_of(metrics)

    assert len(found) == 1 + len(REQUEST_BUCKETS) + 3
    assert found[sample("http_requests_total", service="web", method="OTHER", status="405")] == 500


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"GET", b"POST", b"BREW"]),
            st.sampled_from([200, 404, 499]),
            st.floats(0, 1e9),
        )
    )
)
def test_durations_agree_with_a_naive_count(requests: list[tuple[bytes, int, float]]) -> None:
    metrics = Metrics()
    expected: Counter[tuple[str, Labels]] = Counter()
    for method, status, seconds in requests:
        metrics.request("web", method, status, seconds)
        labels = {
            "service": "web",
            "method": "OTHER" if method == b"BREW" else method.decode(),
            "status": str(status),
        }
        expected[sample("http_requests_total", **labels)] += 1
        expected[sample("http_request_duration_seconds_count", **labels)] += 1
        for bound in (*REQUEST_BUCKETS, float("inf")):
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            key = sample("http_request_duration_seconds_bucket", le=le, **labels)
            expected[key] += seconds <= bound

    found = samples_of(metrics)
    sums = {key: found.pop(key) for key in list(found) if key[0].endswith("_sum")}

    assert found == expected
    assert sum(sums.values()) == pytest.approx(sum(seconds for _, _, seconds in requests))


# --- what rises and falls ------------------------------------------------------------------------


@given(st.lists(st.booleans()))
def test_in_flight_is_never_negative(entering: list[bool]) -> None:
    metrics = Metrics()
    expected = 0
    for enters in entering:
        (metrics.enter if enters else metrics.leave)("web")
        expected = max(0, expected + (1 if enters else -1))

    assert samples_of(metrics).get(sample("http_in_flight_requests", service="web"), 0) == expected


def test_in_flight_stays_at_zero_after_the_last_request() -> None:
    metrics = Metrics()
    metrics.enter("web")
    metrics.leave("web")

    assert samples_of(metrics) == {sample("http_in_flight_requests", service="web"): 0}


def test_upgraded_connections_come_and_go() -> None:
    metrics = Metrics()
    for protocol, change in (
        ("websocket", 1),
        ("websocket", 1),
        ("websocket", -1),
        ("other", 1),
        ("other", -1),
        ("other", -1),
    ):
        metrics.upgraded("web", protocol, change)

    assert samples_of(metrics) == {
        sample("upgraded_connections", service="web", protocol="websocket"): 1,
        sample("upgrades_total", service="web", protocol="websocket"): 2,
        sample("upgraded_connections", service="web", protocol="other"): 0,
        sample("upgrades_total", service="web", protocol="other"): 1,
    }


def test_deploys(accept: str) -> None:
    metrics = Metrics()
    metrics.deploy("web", "ok", 3.5)
    metrics.deploy("web", "ok", 700)
    metrics.deploy("web", "failed", 30)

    found = samples_of(metrics, accept)

    at = {
        (dict(labels)["result"], float(dict(labels)["le"])): value
        for (name, labels), value in found.items()
        if name == "kamal_proxy_deploy_duration_seconds_bucket"
    }
    assert [bound for result, bound in at if result == "ok"] == [*DEPLOY_BUCKETS, float("inf")]
    assert [at["ok", bound] for bound in (2.5, 5.0, 600.0, float("inf"))] == [0, 1, 1, 2]
    assert [at["failed", bound] for bound in (10.0, 30.0, float("inf"))] == [0, 1, 1]
    assert found[sample("deploy_duration_seconds_sum", service="web", result="ok")] == 703.5
    assert found[sample("deploy_duration_seconds_count", service="web", result="ok")] == 2


# --- gauges of others ----------------------------------------------------------------------------


def test_a_gauge_is_read_when_asked_for() -> None:
    metrics = Metrics()
    values = iter([1.5, 2.5])
    metrics.gauge("kamal_proxy_spill_bytes", "Bytes.", lambda: next(values))

    assert [samples_of(metrics)[sample("spill_bytes")] for _ in range(2)] == [1.5, 2.5]


@pytest.mark.parametrize(
    "name",
    ["kamal_proxy_twice", "kamal_proxy_http_requests_total", "kamal_proxy_upgraded_connections"],
)
def test_a_name_can_be_taken(name: str) -> None:
    metrics = Metrics()
    metrics.gauge("kamal_proxy_twice", "Once.", lambda: 1)

    with pytest.raises(ValueError, match=f"there is already a metric {name}"):
        metrics.gauge(name, "Again.", lambda: 2)


@pytest.mark.parametrize("name", ["", "two words", "1st", "naïve", "a\n"])
def test_a_malformed_name(name: str) -> None:
    with pytest.raises(ValueError, match="can't be the name of a metric"):
        Metrics().gauge(name, "None.", lambda: 1)


# --- both formats --------------------------------------------------------------------------------


def busy() -> Metrics:
    """Return metrics with more series than fit in one part."""
    metrics = Metrics()
    for number in range(150):
        service = f"service-{number}"
        metrics.enter(service)
        metrics.retry(service)
        metrics.request(service, b"GET", 200, number)
        metrics.deploy(service, "ok", number)
    metrics.gauge("kamal_proxy_spill_bytes", "Bytes.", lambda: 0)
    return metrics


def test_a_metric_is_described_once_however_many_parts_it_has(accept: str) -> None:
    body = busy().render(accept)[0].decode()
    described = re.findall(r"^# TYPE (\S+)", body, re.MULTILINE)

    assert len(described) == len(set(described))
    assert described == re.findall(r"^# HELP (\S+)", body, re.MULTILINE)
    assert body.count("# EOF\n") == body.endswith("# EOF\n") == (accept != TEXT)
    assert "_created" not in body


def test_parts_are_small_and_together_the_whole(accept: str) -> None:
    metrics = busy()
    content_type, parts = metrics.render_parts(accept)
    rendered = list(parts)
    ours = b"".join(rendered).partition(b"# HELP process_")[0]

    assert max(part.count(b"\n") for part in rendered) <= PART_SAMPLES + 2
    whole, same_content_type = metrics.render(accept)
    assert (ours, content_type) == (whole.partition(b"# HELP process_")[0], same_content_type)
    assert len(samples_of(metrics, accept)) == 150 * (3 + 14 + 15) + 1


def test_all_parts_show_one_moment(accept: str) -> None:
    metrics = busy()
    before = metrics.render(accept)[0].partition(b"# HELP process_")[0]
    _, parts = metrics.render_parts(accept)
    rendered = [next(parts)]
    metrics.enter("service-0")
    metrics.retry("new")
    metrics.request("service-149", b"GET", 200, 1)
    metrics.request("new", b"GET", 200, 1)
    metrics.deploy("service-149", "ok", 1)
    rendered += parts

    assert b"".join(rendered).partition(b"# HELP process_")[0] == before


def test_the_process_describes_itself(accept: str) -> None:
    lines = Metrics().render(accept)[0].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    assert float(values["process_resident_memory_bytes"]) > 1e6
    assert float(values["process_open_fds"]) >= 3
    assert "process_cpu_seconds_total" in values
    assert any(name.startswith("python_info{") for name in values)
    assert any(name.startswith("python_gc_collections_total{") for name in values)


any_text = st.text() | st.text(st.sampled_from('\\"\n\r\t,={}# é☃𝄞\u2028\x00\x85a'))


@pytest.mark.fuzz
@at_least(100)
@given(any_text, any_text, st.binary(), st.integers(), st.sampled_from([TEXT, PROMETHEUS]))
def test_any_label_is_read_back(
    service: str, reason: str, method: bytes, status: int, accept: str
) -> None:
    metrics = Metrics()
    metrics.enter(service)
    metrics.failure(service, reason)
    metrics.request(service, method, status, 0.2)

    found = samples_of(metrics, accept)

    assert found[sample("http_in_flight_requests", service=service)] == 1
    assert found[sample("http_failures_total", service=service, reason=reason)] == 1
    requests = [dict(labels) for name, labels in found if name.endswith("_requests_total")]
    counted = requests[0].pop("method")
    assert requests == [{"service": service, "status": str(status)}]
    assert counted in ("OTHER", method.decode("latin-1"))


def test_a_lone_surrogate_does_not_cost_the_other_metrics(accept: str) -> None:
    metrics = Metrics()
    metrics.retry("a\ud800")
    metrics.retry("a\udc00")

    assert samples_of(metrics, accept) == {
        sample("upstream_retries_total", service=r"a\ud800"): 1,
        sample("upstream_retries_total", service=r"a\udc00"): 1,
    }


@pytest.mark.fuzz
@at_least(300)
@given(
    st.text()
    | st.lists(
        st.lists(
            st.sampled_from(
                [
                    "application/openmetrics-text",
                    "text/plain",
                    "version=1.0.0",
                    "version=0.0.4",
                    "version=2.0.0",
                    "version=1.x",
                    "version=",
                    "version",
                    "version=" + "9" * 5000,
                    "escaping=allow-utf-8",
                    "escaping=values",
                    "escaping=dots",
                    "q=0.1",
                    "",
                ]
            )
        ).map(";".join)
    ).map(",".join)
)
@example("application/openmetrics-text;version=1.x")
@example("application/openmetrics-text;version=3\x80")
def test_any_accept_header(accept: str) -> None:
    metrics = Metrics()
    metrics.request("web", b"GET", 200, 0.3)

    body, content_type = metrics.render(accept)

    assert content_type.decode() in CONTENT_TYPES
    assert body.endswith(b"# EOF\n") == content_type.startswith(b"application/openmetrics-text")
    assert b'kamal_proxy_http_requests_total{method="GET",service="web",status="200"} 1.0' in body


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        (TEXT, "text/plain; version=0.0.4"),
        ("text/plain;version=0.0.4;q=0.2,*/*;q=0.1", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=2.0.0", "text/plain; version=0.0.4"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        (PROMETHEUS, "application/openmetrics-text; version=1.0.0"),
    ],
)
def test_formats(accept: str, chosen: str) -> None:
    assert Metrics().render(accept)[1].decode().startswith(chosen)
