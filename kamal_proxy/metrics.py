"""What is counted, and how Prometheus reads it; docs/metrics.md lists all metrics.

Counting touches plain numbers only, because it happens in the middle of every request.
prometheus_client gets to see them when they are asked for. No IO, and nothing global: each proxy
has its own numbers.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import attrs
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

# Upper bounds in seconds. Those of requests are the defaults of Prometheus's clients.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DEPLOY_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

PART_SAMPLES = 100  # rendered without letting another task run: about a millisecond

_METHODS = {
    method.encode(): method
    for method in (
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "CONNECT",
        "OPTIONS",
        "TRACE",
    )
}
_OTHER = "OTHER"
_SUM = -1  # where a histogram keeps its sum; before it one count per bucket, the last without bound

# What choose_encoder may hear of; it trips over versions that are no numbers, repeats those that it
# does not know, and spells names in two ways for some kinds of escaping.
_VERSIONS = ("", "version=0.0.4", "version=1.0.0")
_UTF8 = "escaping=allow-utf-8"
_OPENMETRICS = "application/openmetrics-text"
_EOF = b"# EOF\n"
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_COMMENTS = re.compile(rb"(?:# [^\n]*\n)*")

# The values of a series' labels; a bare text for the only one.
_Key: TypeAlias = str | tuple[str | int, ...]


class Metrics:
    """The numbers of one proxy.

    Values of labels may be any text. Series are never dropped, also when a service is removed, as
    is the convention of Prometheus: a counter that vanishes would lose what was not yet read.
    """

    def __init__(self) -> None:
        self._families: list[_Numbers | _Histogram] = []
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._runtime = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._runtime)

        self._in_flight = self._numbers(
            "kamal_proxy_http_in_flight_requests",
            "HTTP requests that are being served now.",
            ("service",),
            falls=True,
        )
        self._requests: dict[_Key, list[float]] = {}
        labels = ("service", "method", "status")
        self._families += [
            # Each request is counted once: the number of requests is that of their durations.
            _Numbers(
                "kamal_proxy_http_requests_total",
                "HTTP requests that have ended.",
                labels,
                rows=self._count_requests,
            ),
            _Histogram(
                "kamal_proxy_http_request_duration_seconds",
                "Time from the head of an HTTP request until its response was handed over.",
                labels,
                bounds=REQUEST_BUCKETS,
                values=self._requests,
            ),
        ]
        self._failures = self._numbers(
            "kamal_proxy_http_failures_total",
            "HTTP requests that the proxy could not serve to their end, by reason.",
            ("service", "reason"),
        )
        self._handshakes = self._numbers(
            "kamal_proxy_tls_handshakes_total",
            "TLS handshakes of clients that have ended, by how.",
            ("result",),
        )
        self._floods = self._numbers(
            "kamal_proxy_http_floods_total",
            "Connections of HTTP/2 and HTTP/3 that were closed for making work for nothing.",
            ("protocol", "reason"),
        )
        self._connects = self._numbers(
            "kamal_proxy_upstream_connects_total",
            "Attempts to open a connection to a target.",
            ("service", "result"),
        )
        self._reuses = self._numbers(
            "kamal_proxy_upstream_reuses_total",
            "Requests that were sent on a connection that was open already.",
            ("service",),
        )
        self._retries = self._numbers(
            "kamal_proxy_upstream_retries_total",
            "Times that a request was given to another connection or target.",
            ("service",),
        )
        self._upgraded = self._numbers(
            "kamal_proxy_upgraded_connections",
            "WebSockets and other upgraded connections that are open now.",
            ("service", "protocol"),
            falls=True,
        )
        self._upgrades = self._numbers(
            "kamal_proxy_upgrades_total",
            "Connections that were upgraded to a WebSocket or another protocol.",
            ("service", "protocol"),
        )
        self._websocket_closes = self._numbers(
            "kamal_proxy_websocket_drain_closes_total",
            "WebSockets that a drain ended, with a closing handshake (clean) or without (cut).",
            ("service", "result"),
        )
        self._probes = self._numbers(
            "kamal_proxy_probes_total", "Health checks of targets.", ("service", "result")
        )
        self._expiries = self._numbers(
            "kamal_proxy_certificate_expiry_timestamp_seconds",
            "When the certificate of a host expires, in seconds since 1970.",
            ("host",),
            falls=True,
        )
        self._certificate_attempts = self._numbers(
            "kamal_proxy_certificate_attempts_total",
            "Attempts to obtain a certificate from a certificate authority.",
            ("result",),
        )
        self._deploys: dict[_Key, list[float]] = {}
        self._families.append(
            _Histogram(
                "kamal_proxy_deploy_duration_seconds",
                "Time that a deploy took.",
                ("service", "result"),
                bounds=DEPLOY_BUCKETS,
                values=self._deploys,
            )
        )

    # --- counting --------------------------------------------------------------------------------

    def enter(self, service: str) -> None:
        """Count a request as in flight."""
        self._in_flight[service] += 1

    def leave(self, service: str) -> None:
        """Count a request as no longer in flight; never below zero."""
        count = self._in_flight[service]
        if count:
            self._in_flight[service] = count - 1

    def request(self, service: str, method: bytes, status: int, seconds: float) -> None:
        """Count a request that has ended; a method that is not well known counts as ``OTHER``.

        Args:
            service: Name of the service, empty if there was none.
            method: As received.
            status: What the client got, or 499.
            seconds: From the head of the request to the end of the response.
        """
        key = service, _METHODS.get(method, _OTHER), status
        _observe(self._requests, key, REQUEST_BUCKETS, seconds)

    def failure(self, service: str, reason: str) -> None:
        """Count a request that could not be served to its end."""
        self._failures[service, reason] += 1

    def connect(self, service: str, ok: bool) -> None:
        """Count an attempt to connect to a target."""
        self._connects[service, _result(ok)] += 1

    def reuse(self, service: str) -> None:
        """Count a request that used a kept connection to its target."""
        self._reuses[service] += 1

    def handshake(self, result: str) -> None:
        """Count a TLS handshake: ``ok``, or why it failed."""
        self._handshakes[result] += 1

    def flood(self, protocol: str, reason: str) -> None:
        """Count a connection that was closed because its client made work for nothing.

        Args:
            protocol: ``HTTP/2`` or ``HTTP/3``.
            reason: What there was too much of: one of the few words in ``http.h2_guard``.
        """
        self._floods[protocol, reason] += 1

    def retry(self, service: str) -> None:
        """Count a request that goes to another connection or target."""
        self._retries[service] += 1

    def upgraded(self, service: str, protocol: str, change: int) -> None:
        """Count an upgraded connection that begins or ends.

        Args:
            service: Name of the service.
            protocol: ``websocket`` or ``other``.
            change: 1 for the begin, -1 for the end; never counts below zero.
        """
        self._upgraded[service, protocol] = max(0, self._upgraded[service, protocol] + change)
        if change > 0:
            self._upgrades[service, protocol] += change

    def websocket_close(self, service: str, how: str) -> None:
        """Count a WebSocket that a drain ended; ``how`` is ``clean`` or ``cut``."""
        self._websocket_closes[service, how] += 1

    def probe(self, service: str, ok: bool) -> None:
        """Count a health check."""
        self._probes[service, _result(ok)] += 1

    def deploy(self, service: str, result: str, seconds: float) -> None:
        """Count a deploy that has ended, ``ok`` or ``failed``, and how long it took."""
        _observe(self._deploys, (service, result), DEPLOY_BUCKETS, seconds)

    def certificate_expiry(self, host: str, timestamp: float | None) -> None:
        """Tell when the certificate of a host expires.

        Args:
            host: The host.
            timestamp: Unix time; None if the proxy has no certificate for it any more, so that
                nobody is woken for a host that is gone.
        """
        if timestamp is None:
            self._expiries.pop(host, None)
        else:
            self._expiries[host] = int(timestamp)

    def certificate_attempt(self, ok: bool) -> None:
        """Count an attempt to obtain a certificate."""
        self._certificate_attempts[_result(ok)] += 1

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:  # noqa: A002
        """Add a gauge without labels.

        Args:
            name: Its whole name.
            help: One sentence.
            read: Returns its value; called whenever metrics are rendered, so it must be quick.

        Raises:
            ValueError: the name is malformed or taken.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} can't be the name of a metric")
        if name in self._gauges or name in {family.name for family in self._families}:
            raise ValueError(f"there is already a metric {name}")
        self._gauges[name] = help, read

    def table(
        self,
        name: str,
        help: str,  # noqa: A002
        labels: tuple[str, ...],
        rows: Callable[[], Iterable[tuple[tuple[str | int, ...], int]]],
        *,
        falls: bool = False,
    ) -> None:
        """Add a counter that somebody else counts, or a gauge.

        Args:
            name: Its whole name.
            help: One sentence.
            labels: Names of its labels.
            rows: Returns the values of the labels and the count of each series; called whenever
                metrics are rendered, so it must be quick.
            falls: Whether it is a gauge.
        """
        self._families.append(_Numbers(name, help, labels, rows=rows, falls=falls))

    def _numbers(
        self, name: str, documentation: str, labels: tuple[str, ...], *, falls: bool = False
    ) -> defaultdict[_Key, int]:
        values: defaultdict[_Key, int] = defaultdict(int)
        self._families.append(_Numbers(name, documentation, labels, rows=values.items, falls=falls))
        return values

    def _count_requests(self) -> list[tuple[_Key, int]]:
        return [(key, int(sum(series[:_SUM]))) for key, series in self._requests.items()]

    # --- rendering -------------------------------------------------------------------------------

    def render(self, accept: str) -> tuple[bytes, bytes]:
        """Return all metrics, in the text format or as OpenMetrics, and their content type.

        Args:
            accept: The Accept header of the request, whatever it is.
        """
        content_type, parts = self.render_parts(accept)
        return b"".join(parts), content_type

    def render_parts(self, accept: str) -> tuple[bytes, Iterator[bytes]]:
        """Like :meth:`render`, but return the content type and the parts of the body.

        Each part takes about a millisecond to render, so that others can have a turn in between.
        All of them show the moment of this call, but for what describes the process.
        """
        encoder, content_type = choose_encoder(_known_formats(accept))
        is_openmetrics = content_type.startswith(_OPENMETRICS)
        families = [family.pieces(is_openmetrics) for family in self._families]
        gauges = [
            GaugeMetricFamily(name, documentation, value=float(read()))
            for name, (documentation, read) in self._gauges.items()
        ]

        def render() -> Iterator[bytes]:
            for pieces in families:
                for number, piece in enumerate(pieces):
                    data = _encode(encoder, piece)
                    yield _without_comments(data) if number else data
            for metric in (*gauges, *self._runtime.collect()):
                yield _encode(encoder, metric)
            if is_openmetrics:
                yield _EOF

        return content_type.encode(), render()


@attrs.frozen
class _Numbers:
    """A counter, or a gauge if it ``falls``; ``rows`` returns each series with its value."""

    name: str
    documentation: str
    labels: tuple[str, ...]
    rows: Callable[[], Iterable[tuple[_Key, int]]]
    falls: bool = False

    def pieces(self, _: bool) -> Iterator[Metric]:
        """Return the metric as it is now, in pieces that are quick to render.

        Without series there is none.
        """
        rows = list(self.rows())

        def build() -> Iterator[Metric]:
            make = GaugeMetricFamily if self.falls else CounterMetricFamily
            for start in range(0, len(rows), PART_SAMPLES):
                metric = make(self.name, self.documentation, labels=self.labels)
                for key, value in rows[start : start + PART_SAMPLES]:
                    metric.add_metric(_label_values(key), value)
                yield metric

        return build()


@attrs.frozen
class _Histogram:
    """A histogram with its series."""

    name: str
    documentation: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    values: dict[_Key, list[float]]

    def pieces(self, is_openmetrics: bool) -> Iterator[Metric]:
        """Return the metric as it is now, in pieces that are quick to render.

        Without series there is none.
        """
        rows = [(key, series.copy()) for key, series in self.values.items()]
        # Go writes le="1" in the text format; OpenMetrics wants 1.0, and its parsers insist.
        spell = floatToGoString if is_openmetrics else "{:g}".format
        bounds = [*map(spell, self.bounds), "+Inf"]
        size = PART_SAMPLES // (len(bounds) + 2)

        def build() -> Iterator[Metric]:
            for start in range(0, len(rows), size):
                metric = HistogramMetricFamily(self.name, self.documentation, labels=self.labels)
                for key, series in rows[start : start + size]:
                    buckets = list(zip(bounds, accumulate(series[:_SUM]), strict=True))
                    metric.add_metric(_label_values(key), buckets, series[_SUM])
                yield metric

        return build()


class _Only:
    """The registry of a single metric, as encoders want one."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


def _encode(encoder: Callable[[_Only], bytes], metric: Metric) -> bytes:
    return encoder(_Only(metric)).removesuffix(_EOF)


def _without_comments(data: bytes) -> bytes:
    """Leave out what the first piece of a metric has said of it."""
    comments = _COMMENTS.match(data)
    return data[comments.end() :] if comments else data


def _known_formats(accept: str) -> str:
    """Reduce an Accept header to what :func:`choose_encoder` can be trusted with."""
    known = []
    for item in accept.split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        version = next((each for each in parameters if each.startswith("version=")), "")
        if version in _VERSIONS:
            escaping = _UTF8 if _UTF8 in parameters else ""
            known.append(";".join((kind, version, escaping)))
    return ",".join(known)


def _label_values(key: _Key) -> list[str]:
    values = (key,) if isinstance(key, str) else key
    # A lone surrogate must not cost all other metrics.
    return [str(value).encode("utf-8", "backslashreplace").decode() for value in values]


def _observe(
    histogram: dict[_Key, list[float]], key: _Key, bounds: tuple[float, ...], seconds: float
) -> None:
    series = histogram.get(key)
    if series is None:
        series = histogram[key] = [0.0] * (len(bounds) + 2)
    series[bisect_left(bounds, seconds)] += 1
    series[_SUM] += seconds


def _result(ok: bool) -> str:
    return "ok" if ok else "failed"
