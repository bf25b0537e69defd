"""The blocking client of the admin API, for the command line. Must not import the server side.

A proxy that is just starting is waited for. Whatever answers on the socket, a call ends in a
result or in a KamalProxyError with one sentence; what is read is bounded.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from kamal_proxy.control.messages import (
    API_PREFIX,
    EVENT_STREAM,
    CertificateDescription,
    Event,
    ServiceDescription,
    from_json,
    to_json,
)
from kamal_proxy.errors import (
    CertificateNotFoundError,
    ControlSocketError,
    InvalidOptionsError,
    KamalProxyError,
    ServiceNotFoundError,
)
from kamal_proxy.run_options import default_socket_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kamal_proxy.options import (
        DeployOptions,
        PauseOptions,
        RolloutOptions,
        RolloutSplit,
        StopOptions,
    )
    from kamal_proxy.udp.options import UdpDeployOptions

START_WAIT = 3.0  # seconds that a proxy may take to open its socket
POLL_INTERVAL = 0.05
REPLY_TIMEOUT = 60.0  # seconds without a byte, for calls that do not wait for targets
MAX_BODY = 16 * 1024 * 1024
MAX_EVENT = 1024 * 1024

T = TypeVar("T")


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class ControlClient:
    """Calls the proxy that listens on one Unix socket.

    Args:
        path: The socket; by default where the environment says.
        start_wait: Seconds to wait for a socket that is missing or refuses; START_WAIT by default.
        reply_timeout: Seconds without a byte that a call lasts that does not wait for targets;
            REPLY_TIMEOUT by default.
    """

    def __init__(
        self,
        path: Path | None = None,
        start_wait: float | None = None,
        reply_timeout: float | None = None,
    ) -> None:
        self._path = default_socket_path() if path is None else path
        self._start_wait = START_WAIT if start_wait is None else start_wait
        self._reply_timeout = REPLY_TIMEOUT if reply_timeout is None else reply_timeout

    def services(self) -> list[ServiceDescription]:
        """Return the proxy's services.

        Raises:
            KamalProxyError: the proxy can't be reached or answers nonsense.
        """
        with self._call("GET", "/services") as response:
            body = _read_json(response)
        if not isinstance(body, dict) or not isinstance(body.get("services"), list):
            raise _malformed("the list of services is missing")
        return [_decode(ServiceDescription, item) for item in body["services"]]

    def certificates(self) -> list[CertificateDescription]:
        """Return the proxy's certificates; raises as :meth:`services` does."""
        with self._call("GET", "/certificates") as response:
            body = _read_json(response)
        if not isinstance(body, dict) or not isinstance(body.get("certificates"), list):
            raise _malformed("the list of certificates is missing")
        return [_decode(CertificateDescription, item) for item in body["certificates"]]

    def renew_certificate(self, host: str) -> None:
        """Obtain a new certificate for a host now, and wait until it is there.

        Raises:
            CertificateNotFoundError: no certificate is obtained for that host.
            KamalProxyError: the certificate authority refuses, or the proxy can't be reached.
        """
        if not host:
            raise CertificateNotFoundError("no certificate is obtained for an empty name")
        path = f"/certificates/{quote(host, safe='', errors='surrogateescape')}/renew"
        with self._call("POST", path, patient=True):
            pass

    def remove(self, name: str) -> None:
        """Remove a service.

        Raises:
            ServiceNotFoundError: there is no such service.
            KamalProxyError: the proxy can't be reached or refuses.
        """
        self._order("DELETE", _service_path(name))

    def resume(self, name: str) -> None:
        """End the pause or stop of a service; raises as :meth:`remove` does."""
        self._order("POST", _service_path(name, "resume"))

    def set_rollout(self, name: str, split: RolloutSplit) -> None:
        """Choose which clients the rollout targets of a service serve.

        Raises:
            RolloutNotSetError: the service has no rollout targets.
            ServiceNotFoundError: there is no such service.
            KamalProxyError: the proxy can't be reached or refuses.
        """
        self._order("PUT", _service_path(name, "rollout", "split"), to_json(split))

    def stop_rollout(self, name: str) -> None:
        """Serve all clients of a service from its own targets; raises as :meth:`set_rollout`."""
        self._order("DELETE", _service_path(name, "rollout", "split"))

    def deploy(self, options: DeployOptions, on_event: Callable[[Event], None]) -> Event:
        """Deploy a service and wait for the end.

        Args:
            options: What to deploy.
            on_event: Called with each event but a failure, as it happens.

        Returns:
            The last event, which says how the drain went.

        Raises:
            KamalProxyError: the deploy failed; the proxy's own sentence and details.
            ControlSocketError: the proxy can't be reached, or ended in the middle.
        """
        path = _service_path(options.service)
        return self._follow("PUT", path, _unnamed(options), "deploy", on_event)

    def deploy_udp(self, options: UdpDeployOptions, on_event: Callable[[Event], None]) -> Event:
        """Deploy a UDP service and wait for the end, as :meth:`deploy` does.

        Raises:
            PortConflictError: another service has the port.
            KamalProxyError: as for :meth:`deploy`.
        """
        path = _service_path(options.service, collection="udp-services")
        return self._follow("PUT", path, _unnamed(options), "deploy", on_event)

    def deploy_rollout(
        self, name: str, options: RolloutOptions, on_event: Callable[[Event], None]
    ) -> Event:
        """Deploy the rollout targets of a service and wait for the end, as :meth:`deploy` does."""
        path = _service_path(name, "rollout")
        return self._follow("PUT", path, to_json(options), "deploy", on_event)

    def pause(self, name: str, options: PauseOptions, on_event: Callable[[Event], None]) -> Event:
        """Pause a service and wait until what was in flight has ended.

        Args:
            name: The service.
            options: How to pause it.
            on_event: Called with each event but a failure, as it happens.

        Returns:
            The last event, which says how the drain went.

        Raises:
            ResumedError: the service was resumed meanwhile.
            ServiceNotFoundError: there is no such service.
            ControlSocketError: the proxy can't be reached, or ended in the middle.
            KamalProxyError: the proxy refuses.
        """
        path = _service_path(name, "pause")
        return self._follow("POST", path, to_json(options), "pause", on_event)

    def stop(self, name: str, options: StopOptions, on_event: Callable[[Event], None]) -> Event:
        """Stop a service and wait until what was in flight has ended, as :meth:`pause` does."""
        path = _service_path(name, "stop")
        return self._follow("POST", path, to_json(options), "stop", on_event)

    def _order(self, method: str, path: str, body: object = None) -> None:
        """Make a call that has no answer but its status."""
        with self._call(method, path, body):
            pass

    def _follow(
        self, method: str, path: str, body: object, what: str, on_event: Callable[[Event], None]
    ) -> Event:
        """Make a call that is answered by events, and return the last of them."""
        # No time limit: it is the proxy that limits the wait for targets and the drain.
        with self._call(method, path, body, patient=True) as response:
            if response.headers.get_content_type() != EVENT_STREAM:
                raise _malformed("no stream of events")
            while True:
                event = _read_event(response, what)
                if event.event == "failed":
                    raise _error(event.code, event.message, event.details)
                on_event(event)
                if event.event == "done":
                    return event

    @contextmanager
    def _call(
        self, method: str, path: str, body: object = None, *, patient: bool = False
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect(None if patient else self._reply_timeout)
        try:
            with _io_errors():
                data = None if body is None else json.dumps(body).encode()
                headers = {} if data is None else {"Content-Type": "application/json"}
                connection.request(method, API_PREFIX + path, data, headers)
                response = connection.getresponse()
            with response:
                if not 200 <= response.status < 300:
                    raise _refusal(response)
                yield response
        finally:
            connection.close()

    def _connect(self, timeout: float | None) -> _UnixConnection:
        deadline = time.monotonic() + self._start_wait
        while True:
            connection = _UnixConnection(self._path, timeout)
            try:
                connection.connect()
            except OSError as error:
                connection.close()
                passing = (FileNotFoundError, ConnectionRefusedError, BlockingIOError)
                if not isinstance(error, passing) or time.monotonic() >= deadline:
                    # A path that is too long has no errno; the original calls it invalid.
                    reason = os.strerror(error.errno).lower() if error.errno else "invalid argument"
                    raise ControlSocketError(f"dial unix {self._path}: connect: {reason}") from None
            else:
                return connection
            time.sleep(POLL_INTERVAL)


@contextmanager
def _io_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ControlSocketError("the proxy did not answer in time") from None
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ControlSocketError(
            f"the proxy ended the connection before its answer was complete ({reason})"
        ) from error


def _service_path(name: str, *parts: str, collection: str = "services") -> str:
    if not name:
        raise ServiceNotFoundError("service not found")
    return "/".join(("", collection, quote(name, safe="", errors="surrogateescape"), *parts))


def _unnamed(options: DeployOptions | UdpDeployOptions) -> Any:
    """Return the body of a deploy, without the name, which is in the path."""
    body = to_json(options)
    del body["service"]
    return body


def _read_json(response: http.client.HTTPResponse) -> Any:
    with _io_errors():
        body = response.read(MAX_BODY + 1)
        if response.length and len(body) <= MAX_BODY:
            raise http.client.IncompleteRead(body, response.length)
    if len(body) > MAX_BODY:
        raise _malformed(f"more than {MAX_BODY} bytes")
    return _loads(body)


def _read_event(response: http.client.HTTPResponse, what: str) -> Event:
    with _io_errors():
        line = response.readline(MAX_EVENT + 1)
    if len(line) > MAX_EVENT:
        raise _malformed(f"an event of more than {MAX_EVENT} bytes")
    if not line.endswith(b"\n"):
        raise ControlSocketError(
            f"the proxy ended the connection before the {what} was complete; it may have stopped"
        )
    return _decode(Event, _loads(line))


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _malformed("not JSON") from None


def _decode(cls: type[T], data: object) -> T:
    try:
        return from_json(cls, data)
    except InvalidOptionsError as error:
        raise _malformed(str(error)) from None


def _malformed(why: str) -> ControlSocketError:
    return ControlSocketError(f"the proxy's answer makes no sense: {why}")


def _refusal(response: http.client.HTTPResponse) -> KamalProxyError:
    """Return the error that an answer outside 2xx stands for."""
    try:
        body = _read_json(response)
        error = body["error"]
        code, message, details = error["code"], error["message"], error.get("details", [])
        known = isinstance(code, str) and isinstance(message, str) and isinstance(details, list)
    except (ControlSocketError, LookupError, TypeError, AttributeError):
        known = False
    if not known:
        return _malformed(f"status {response.status} without a reason")
    return _error(code, message, tuple(map(str, details)))


def _error(code: str, message: str, details: tuple[str, ...]) -> KamalProxyError:
    """Return the error with that code; one that this version does not know is a plain one."""
    classes = [KamalProxyError]
    for cls in classes:
        if cls.code == code:
            return cls(message, details)
        classes.extend(cls.__subclasses__())
    return KamalProxyError(message, details)
