"""HTTP health checks: one GET on its own connection, redirects followed, a result in words."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

import trio

from kamal_proxy.durations import format_duration
from kamal_proxy.health import ProbeResult
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.upstream import ConnectError, UpstreamPool

if TYPE_CHECKING:
    from kamal_proxy.options import HealthCheckOptions
    from kamal_proxy.probing import Probed
    from kamal_proxy.sockets import Poller

USER_AGENT = b"kamal-proxy"
MAX_REDIRECTS = 10
_MAX_HEAD = 64 * 1024
_URL_CHARACTERS = "/?%:@!$&'()*+,;=~-._"  # whatever else a redirect holds is percent-encoded


class HttpProbe:
    """Probes targets over HTTP; a :data:`kamal_proxy.deployment.Probe`."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller

    async def __call__(self, target: Probed, options: HealthCheckOptions) -> ProbeResult:
        """Probe a target once; takes no longer than ``options.timeout`` and never raises."""
        path = options.path if options.path.startswith("/") else "/" + options.path
        url = f"http://{target.host}:{options.port or target.port}{path}"
        host = options.host or (f"{target.host}:{options.port}" if options.port else target.name)
        reason = ""
        with trio.move_on_after(options.timeout) as scope:
            ok, reason = await self._follow(url, host)
        if scope.cancelled_caught:
            return ProbeResult(False, f"no answer within {format_duration(options.timeout)}", url)
        return ProbeResult(ok, reason, url)

    async def _follow(self, url: str, host: str) -> tuple[bool, str]:
        location = ""
        for _ in range(MAX_REDIRECTS):
            try:
                status, location = await self._get(url, host)
            except (ConnectError, ProtocolError, trio.BrokenResourceError) as error:
                where = f" (redirected to {url})" if location else ""
                return False, f"{_describe(error)}{where}"
            if status not in (301, 302, 303, 307, 308) or not location:
                where = f" at {url}" if location else ""
                return 200 <= status <= 299, f"status {status}{where}"
            try:
                target = urlsplit(urljoin(url, location))
                hostname, port = target.hostname, target.port
            except ValueError:
                return False, f"status {status} with a malformed redirect to {location[:200]!r}"
            url = target.geturl()
            if target.scheme != "http" or not hostname:
                return False, (
                    f"status {status}, redirect to {location[:200]} (a probe follows redirects "
                    "over plain HTTP only; exempt the health check path from the redirect)"
                )
            host = hostname if port is None else f"{hostname}:{port}"
        return False, f"more than {MAX_REDIRECTS} redirects"

    async def _get(self, url: str, host: str) -> tuple[int, str]:
        """Send one GET; return the status and where it redirects to."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        pool = UpstreamPool(self._poller, parts.hostname, parts.port or 80, _MAX_HEAD)
        connection = await pool.connect()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            request = connection.codec.request(
                b"GET",
                quote(path, safe=_URL_CHARACTERS).encode(),
                [
                    (b"Host", host.encode("ascii", "replace")),
                    (b"User-Agent", USER_AGENT),
                    (b"Accept", b"*/*"),
                    # A probe must not hold a connection of a server that serves one at a time.
                    (b"Connection", b"close"),
                ],
            )
            # It may have answered and closed without reading.
            with contextlib.suppress(trio.BrokenResourceError):
                await connection.stream.send(request + connection.codec.end())
            while True:
                head = connection.codec.next_response()
                if head is not None and head.status >= 200:
                    return head.status, head.get(b"location").decode("latin-1")
                if head is None:
                    connection.codec.receive_data(await connection.stream.receive())
        finally:
            connection.stream.close()


def _describe(error: Exception) -> str:
    if isinstance(error, ProtocolError):
        return f"malformed response: {error}"
    if isinstance(error, trio.BrokenResourceError):
        return f"connection broke: {error}"
    return str(error)
