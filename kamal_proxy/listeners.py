"""Listening sockets: binding TCP ports and Unix sockets, accepting connections.

Says in words why something can't be bound. What happens on a connection is its handler's business.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import socket
import stat
from typing import TYPE_CHECKING, TypeAlias

import attrs
import outcome
import trio

from kamal_proxy.errors import ControlSocketError, ListenError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from kamal_proxy.sockets import Poller, SocketStream

Address: TypeAlias = tuple[str, int]
Begin: TypeAlias = "Callable[[SocketStream, Address], None]"
Handle: TypeAlias = "Callable[[SocketStream, Address], Awaitable[None]]"

BACKLOG = 4096

# accept() can fail for want of these; the connection waits in the backlog meanwhile.
_CAPACITY_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
# accept() reports errors of the connection it would have returned (accept(2)).
_ACCEPT_AGAIN_ERRNOS = {
    errno.ECONNABORTED,
    errno.EPERM,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EOPNOTSUPP,
    errno.ETIMEDOUT,
}
_TELL_INTERVAL = 10.0  # seconds
# The others have a turn after so many connections, as accepting one need not block.
_ACCEPTS_PER_TURN = 16


def listen_tcp(bind: str, port: int) -> socket.socket:
    """Bind a TCP listener; an empty ``bind`` listens on all addresses, IPv4 and IPv6.

    ``::`` means all of IPv6 only, so that ``0.0.0.0`` can be listened on beside it.

    Raises:
        ListenError: naming the address and what to do.
    """
    name = f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
    try:
        family, address = _listen_address(bind, port)
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenError(f"listen tcp {name}: {reason(error)}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(bind))
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = privilege_hint(error, port)
        raise ListenError(f"listen tcp {name}: bind: {reason(error)}{hint}") from error
    return sock


def _listen_address(bind: str, port: int) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    if bind:
        family, _, _, _, address = socket.getaddrinfo(
            bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return family, address
    if socket.has_dualstack_ipv6():
        return socket.AF_INET6, ("::", port)
    return socket.AF_INET, ("0.0.0.0", port)  # noqa: S104  # all addresses is what was asked for


def reason(error: OSError) -> str:
    """Say what went wrong in words: ``address already in use``."""
    return (error.strerror or str(error)).lower()


def privilege_hint(error: OSError, port: int) -> str:
    """Return what to do about a port that only privileged processes may bind, in brackets.

    Empty if that is not why binding it failed.
    """
    if error.errno == errno.EACCES and 0 < port < 1024:
        return (
            " (ports below 1024 need the capability CAP_NET_BIND_SERVICE or the sysctl "
            f"net.ipv4.ip_unprivileged_port_start={port}; or choose another port)"
        )
    return ""


@contextlib.contextmanager
def listen_unix(path: Path) -> Iterator[socket.socket]:
    """Bind a Unix socket with mode 0600 and unlink it at the end.

    A socket file that nobody listens on any more is replaced.

    Raises:
        ControlSocketError: the path is in use by a living process, is not a socket, or can't be
            bound; the sentence names it.
    """
    _remove_stale_socket(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            # The mode of the descriptor becomes the mode of the file, so it is never wider.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(path))
            sock.setblocking(False)
            sock.listen(BACKLOG)
            identity = path.stat()
        except OSError as error:
            raise ControlSocketError(f"listen unix {path}: bind: {reason(error)}") from error
        try:
            yield sock
        finally:
            # Another process may have put its own socket there meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == identity.st_ino:
                    path.unlink()
    finally:
        sock.close()


def _remove_stale_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ControlSocketError(f"listen unix {path}: {reason(error)}") from error
    if not stat.S_ISSOCK(mode):
        raise ControlSocketError(f"listen unix {path}: a file that is not a socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            raise ControlSocketError(f"listen unix {path}: {reason(error)}") from error
    raise ControlSocketError(
        f"listen unix {path}: another kamal-proxy is running; stop it first, or set "
        "KAMAL_PROXY_SOCKET to another path"
    )


@attrs.frozen
class Clients:
    """The connections that were accepted: where they live, and how many there may be.

    Attributes:
        nursery: Where their tasks are.
        limiter: Acquired for each of them, released when it ends. Several listeners may share one:
            while none of them has a connection to accept, none of them holds it.
    """

    nursery: trio.Nursery
    limiter: trio.Semaphore

    def serve(self, handle: Handle, stream: SocketStream, address: Address) -> None:
        """Let a connection have a task of its own.

        Args:
            handle: Called with the stream and the client's address; it must not raise, and the
                stream is closed after it.
            stream: The connection.
            address: The client's.
        """
        self.nursery.start_soon(self._serve, handle, stream, address)

    async def _serve(self, handle: Handle, stream: SocketStream, address: Address) -> None:
        try:
            await handle(stream, address)
        finally:
            self.leave(stream)

    def leave(self, stream: SocketStream) -> None:
        """Close a connection; another may be accepted in its place."""
        stream.close()
        self.limiter.release()


async def serve(
    listener: socket.socket,
    poller: Poller,
    handle: Handle,
    *,
    clients: Clients,
    on_error: Callable[[OSError], None],
) -> None:
    """Accept connections until cancelled, and handle each in a task of its own.

    Args and Raises are those of :func:`accept`, and of :meth:`Clients.serve`.
    """
    begin = functools.partial(clients.serve, handle)
    await accept(listener, poller, begin, clients=clients, on_error=on_error)


async def accept(
    listener: socket.socket,
    poller: Poller,
    begin: Begin,
    *,
    clients: Clients,
    on_error: Callable[[OSError], None],
) -> None:
    """Accept connections until cancelled.

    Args:
        listener: A listening, non-blocking socket; the caller closes it.
        poller: Poller of the streams. Accepting, too, is done in its task.
        begin: Called with each stream and the client's address; it must not raise, and sees to it
            that ``clients.leave`` is called once.
        clients: What the connections are from now on.
        on_error: Told why accepting pauses (out of descriptors, of memory), but not more often
            than every few seconds.

    Raises:
        OSError: the listener is none.
    """
    acceptor = _Acceptor(listener, poller, begin, clients.limiter)
    told = -math.inf
    while True:
        error = await acceptor.wait_stopped()
        if error is None:
            # A place is free once this returns; whoever accepts first has it.
            await clients.limiter.acquire()
            clients.limiter.release()
        else:
            if trio.current_time() - told > _TELL_INTERVAL:
                told = trio.current_time()
                on_error(error)
            await trio.sleep(0.1)


class _Acceptor:
    """Accepts connections in the poller's task, until something is in the way."""

    def __init__(
        self, listener: socket.socket, poller: Poller, begin: Begin, limiter: trio.Semaphore
    ) -> None:
        self._listener = listener
        self._poller = poller
        self._begin = begin
        self._limiter = limiter
        self._waiter: trio.lowlevel.Task | None = None

    async def wait_stopped(self) -> OSError | None:
        """Accept until that is not possible for now, or until cancelled.

        Returns:
            Why it is not; None if there may be no more connections.

        Raises:
            OSError: it will never be.
        """
        fd = self._listener.fileno()
        self._waiter = trio.lowlevel.current_task()
        try:
            self._poller.watch_listener(fd, self)
        except OSError as full:  # the kernel has no room for it
            return full

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._poller.forget_listener(fd)
            return trio.lowlevel.Abort.SUCCEEDED

        error: OSError | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return error

    def ready(self, _: int) -> None:
        """Accept what waits (called by the poller)."""
        # What is left is told of again, after the others have had their turn.
        for _attempt in range(_ACCEPTS_PER_TURN):
            if not self._limiter.value:
                self._stop(outcome.Value(None))
                return
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _ACCEPT_AGAIN_ERRNOS:
                    continue
                transient = error.errno in _CAPACITY_ERRNOS
                self._stop(outcome.Value(error) if transient else outcome.Error(error))
                return
            try:
                stream = self._poller.open_stream(sock)
            except OSError as error:  # whatever it is, it is this connection's only
                sock.close()
                self._stop(outcome.Value(error))
                return
            self._limiter.acquire_nowait()
            self._begin(stream, _client_address(address))

    def _stop(self, why: outcome.Outcome[OSError | None]) -> None:
        assert self._waiter is not None
        self._poller.forget_listener(self._listener.fileno())
        trio.lowlevel.reschedule(self._waiter, why)


def _client_address(address: object) -> Address:
    """Normalise what accept() tells: IPv4 in IPv6 becomes IPv4, a Unix peer has no address."""
    if not isinstance(address, tuple):
        return "", 0
    host, port = address[:2]
    return host.removeprefix("::ffff:"), port
