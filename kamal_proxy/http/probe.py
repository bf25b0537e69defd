"""HTTP health checks: one GET on its own connection, redirects followed, a result in words.

Targets that are spoken with over HTTP/2 are probed over that; those that only know gRPC can be
asked what they say about their health themselves.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeAlias, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import trio

from kamal_proxy.durations import format_duration
from kamal_proxy.health import ProbeResult
from kamal_proxy.http.codec import ProtocolError
from kamal_proxy.http.h2_pool import new_pool
from kamal_proxy.http.upstream import ConnectError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kamal_proxy.http.codec import HeaderPairs, ResponseHead
    from kamal_proxy.http.target_side import Upstream
    from kamal_proxy.probing import Probed
    from kamal_proxy.sockets import Poller
    from kamal_proxy.target_options import HealthCheckOptions, TargetScheme

T = TypeVar("T")

USER_AGENT = b"kamal-proxy"
MAX_REDIRECTS = 10
_MAX_HEAD = 64 * 1024
_URL_CHARACTERS = "/?%:@!$&'()*+,;=~-._"  # whatever else a redirect holds is percent-encoded

# A health check of this path asks as the gRPC health checking protocol has it.
GRPC_HEALTH_PATH = "/grpc.health.v1.Health/Check"
_GRPC_REQUEST = b"\0\0\0\0\0"  # a message without fields: about the server as a whole
_GRPC_SERVING = b"\0\0\0\0\2\x08\1"
_MAX_GRPC_ANSWER = 1024

_Address: TypeAlias = tuple[str, int]


class HttpProbe:
    """Probes targets over HTTP; a :data:`kamal_proxy.deployment.Probe`."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller

    async def __call__(
        self, target: Probed, options: HealthCheckOptions, scheme: TargetScheme = "http"
    ) -> ProbeResult:
        """Probe a target once; takes no longer than ``options.timeout`` and never raises.

        Args:
            target: Which.
            options: How.
            scheme: What is spoken on the target's own port; on another it is HTTP/1.1.
        """
        path = options.path if options.path.startswith("/") else "/" + options.path
        port = options.port or target.port
        url = f"http://{target.host}:{port}{path}"
        host = options.host or (f"{target.host}:{options.port}" if options.port else target.name)
        h2c = (target.host.lower(), target.port) if scheme == "h2c" else None
        shown = f"h2c{url[4:]}" if h2c is not None and port == target.port else url
        reason = ""
        with trio.move_on_after(options.timeout) as scope:
            ok, reason = await self._follow(url, host, h2c)
        if scope.cancelled_caught:
            reason = f"no answer within {format_duration(options.timeout)}"
            return ProbeResult(False, reason, shown)
        return ProbeResult(ok, reason, shown)

    async def _follow(self, url: str, host: str, h2c: _Address | None) -> tuple[bool, str]:
        location = ""
        for _ in range(MAX_REDIRECTS):
            try:
                parts = urlsplit(url)
                assert parts.hostname is not None
                address = parts.hostname, parts.port or 80
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                if address == h2c and path == GRPC_HEALTH_PATH:
                    return await self._ask(address, host)
                scheme: TargetScheme = "h2c" if address == h2c else "http"
                status, location = await self._get(address, scheme, path, host)
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

    async def _get(
        self, address: _Address, scheme: TargetScheme, path: str, host: str
    ) -> tuple[int, str]:
        """Send one GET; return the status and where it redirects to."""
        headers = [
            *common_headers(host),
            (b"Accept", b"*/*"),
            # A probe must not hold a connection of a server that serves one at a time.
            (b"Connection", b"close"),
        ]

        async def get(upstream: Upstream) -> tuple[int, str]:
            head = await converse(upstream, b"GET", path, headers)
            return head.status, head.get(b"location").decode("latin-1")

        return await self._connected(address, scheme, get)

    async def _ask(self, address: _Address, host: str) -> tuple[bool, str]:
        """Ask a gRPC server for its health; return whether that is good, and what it said."""
        headers = [
            *common_headers(host),
            (b"Content-Type", b"application/grpc"),
            (b"TE", b"trailers"),
        ]

        async def ask(upstream: Upstream) -> tuple[bool, str]:
            head = await converse(upstream, b"POST", GRPC_HEALTH_PATH, headers, _GRPC_REQUEST)
            codec = upstream.codec
            message = codec.take_body()
            while not codec.received and len(message) <= _MAX_GRPC_ANSWER:
                await upstream.receive(None)
                message += codec.take_body()
            code = head.get(b"grpc-status") or dict(codec.trailers).get(b"grpc-status", b"")
            if head.status != 200 or (codec.received and code != b"0"):
                told = f", gRPC status {code.decode('latin-1')}" if code else ""
                return False, f"status {head.status}{told}"
            if message != _GRPC_SERVING:
                return False, "gRPC health: not serving"
            return True, "gRPC health: serving"

        return await self._connected(address, "h2c", ask)

    async def _connected(
        self,
        address: _Address,
        scheme: TargetScheme,
        converse: Callable[[Upstream], Awaitable[T]],
    ) -> T:
        """Open a connection for one exchange.

        Raises:
            ConnectError: that is not possible.
            ProtocolError: the target broke the protocol.
            trio.BrokenResourceError: it broke the connection.
        """
        pool = new_pool(self._poller, *address, scheme, _MAX_HEAD)
        answer: list[T] = []
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            try:
                upstream = await pool.connect()
                try:
                    answer.append(await converse(upstream))
                finally:
                    pool.close()  # so that the connection is not kept
                    upstream.release()
            except (ConnectError, ProtocolError, trio.BrokenResourceError) as error:
                failure = error  # a nursery would wrap it in a group
            pool.close()
        if failure is not None:
            raise failure
        return answer[0]


def common_headers(host: str) -> HeaderPairs:
    """Return what each of the proxy's own requests begins with."""
    return [(b"Host", host.encode("ascii", "replace")), (b"User-Agent", USER_AGENT)]


async def converse(
    upstream: Upstream, method: bytes, path: str, headers: HeaderPairs, body: bytes = b""
) -> ResponseHead:
    """Send a request and return the head of its final response."""
    codec = upstream.codec
    request = codec.request(method, quote(path, safe=_URL_CHARACTERS).encode(), headers)
    if body:
        request += codec.body(body)
    # It may have answered and closed without reading.
    with contextlib.suppress(trio.BrokenResourceError):
        await upstream.send(request + codec.end())
    while True:
        head = codec.next_response()
        if head is None:
            await upstream.receive(None)
        elif head.status >= 200:
            return head


def _describe(error: Exception) -> str:
    if isinstance(error, ProtocolError):
        return f"malformed response: {error}"
    if isinstance(error, trio.BrokenResourceError):
        return f"connection broke: {error}"
    return str(error)
