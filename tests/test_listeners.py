"""Binding and accepting: on real sockets, without real time."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kamal_proxy import listeners
from kamal_proxy.errors import ControlSocketError, ListenError
from kamal_proxy.listeners import Clients, listen_tcp, listen_unix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio.testing import MockClock

    from kamal_proxy.listeners import Handle
    from kamal_proxy.sockets import Poller, SocketStream


# Listening


def test_listens_on_a_port_of_the_kernel() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        assert port > 0
        assert not listener.getblocking()


def test_a_port_in_use_is_named() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            listen_tcp("127.0.0.1", port)
    assert str(caught.value) == f"listen tcp 127.0.0.1:{port}: bind: address already in use"


def test_a_malformed_address_is_named() -> None:
    with pytest.raises(ListenError, match=r"listen tcp 127\.0\.0\.1\.5:80: "):
        listen_tcp("127.0.0.1.5", 80)


def test_a_low_port_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(ListenError) as caught:
        listen_tcp("127.0.0.1", 80)
    assert str(caught.value).startswith("listen tcp 127.0.0.1:80: bind: permission denied (")
    assert "CAP_NET_BIND_SERVICE" in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.sock"


def test_the_unix_socket_is_private_and_goes_away(path: Path) -> None:
    with listen_unix(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not listener.getblocking()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()
    assert listener.fileno() == -1


def test_the_unix_socket_goes_away_after_an_error_too(path: Path) -> None:
    with pytest.raises(RuntimeError), listen_unix(path) as listener:
        raise RuntimeError
    assert listener.fileno() == -1
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_living_socket_is_refused(path: Path) -> None:
    with listen_unix(path):
        with pytest.raises(ControlSocketError, match="another kamal-proxy is running") as caught:
            listen_unix(path).__enter__()
        assert str(path) in str(caught.value)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_what_is_not_a_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ControlSocketError, match="not a socket is in the way"):
        listen_unix(path).__enter__()
    path.with_name("link").symlink_to(path)
    with pytest.raises(ControlSocketError, match="not a socket is in the way"):
        listen_unix(path.with_name("link")).__enter__()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["no/such/directory.sock", "x" * 200])
def test_a_path_that_can_not_be_bound_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ControlSocketError, match="listen unix ") as caught:
        listen_unix(path).__enter__()
    assert str(path) in str(caught.value)


def test_a_socket_of_somebody_else_is_not_unlinked(path: Path) -> None:
    with listen_unix(path), socket.socket(socket.AF_UNIX) as other:
        path.rename(path.with_name("moved"))  # so that its inode is not used again
        other.bind(str(path))
    assert path.exists()


def test_a_socket_that_vanished_meanwhile(path: Path) -> None:
    with listen_unix(path):
        path.unlink()
    assert not path.exists()


# Accepting


def unexpected(error: OSError) -> None:
    pytest.fail(f"unexpected: {error}")


async def accepting(
    listener: socket.socket | ScriptedListener,
    poller: Poller,
    handle: Handle,
    clients: Clients,
    on_error: Callable[[OSError], None],
) -> None:
    await listeners.serve(
        cast("socket.socket", listener), poller, handle, clients=clients, on_error=on_error
    )


class ScriptedListener:
    """Accepts what a script says; a real socket tells that there is something to accept."""

    def __init__(self, *script: OSError | tuple[socket.socket, object] | socket.socket) -> None:
        self._script = list(script)
        self._bell, self._rope = socket.socketpair()
        self._rope.send(b"!")

    def accept(self) -> tuple[socket.socket, object]:
        if not self._script:
            self._bell.recv(1)
            raise BlockingIOError
        step = self._script.pop(0)
        if isinstance(step, OSError):
            raise step
        return cast("socket.socket", step), ("::ffff:192.0.2.1", 1234, 0, 0)

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        self._bell.close()
        self._rope.close()


async def test_accepts_until_cancelled(poller: Poller, path: Path) -> None:
    async def echo(stream: SocketStream, address: tuple[str, int]) -> None:
        assert address == ("", 0)
        while data := await stream.receive():
            await stream.send(data)

    with listen_unix(path) as listener:
        async with trio.open_nursery() as nursery, trio.open_nursery() as connections:

            async def accept() -> None:
                await accepting(
                    listener, poller, echo, Clients(connections, trio.Semaphore(10)), unexpected
                )

            nursery.start_soon(accept)
            for _ in range(3):
                async with await trio.open_unix_socket(str(path)) as client:
                    await client.send_all(b"ping")
                    assert await client.receive_some() == b"ping"
            nursery.cancel_scope.cancel()
    assert len(poller) == 0


async def test_the_limiter_holds_connections_in_the_backlog(poller: Poller, path: Path) -> None:
    serving = 0

    async def handle(stream: SocketStream, _: object) -> None:
        nonlocal serving
        serving += 1
        await stream.receive()
        serving -= 1

    limiter = trio.Semaphore(2)
    with listen_unix(path) as listener, ExitStack() as stack:
        async with trio.open_nursery() as nursery, trio.open_nursery() as connections:

            async def accept() -> None:
                await accepting(listener, poller, handle, Clients(connections, limiter), unexpected)

            nursery.start_soon(accept)
            clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(5)]
            for client in clients:
                client.connect(str(path))
            for left in (5, 4, 3, 2, 1):
                await wait_all_tasks_blocked()
                assert serving == min(2, left)
                clients[5 - left].close()
            await wait_all_tasks_blocked()
            assert serving == 0
            nursery.cancel_scope.cancel()
    assert limiter.value == 2


async def test_a_backlog_does_not_keep_others_from_their_turn(poller: Poller, path: Path) -> None:
    served: list[int] = []  # how many connections were accepted when each was first served

    async def handle(stream: SocketStream, _: object) -> None:
        served.append(len(poller))
        await stream.receive()

    with listen_unix(path) as listener, ExitStack() as stack:
        for _ in range(3 * listeners._ACCEPTS_PER_TURN):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await accepting(
                    listener, poller, handle, Clients(nursery, trio.Semaphore(1000)), unexpected
                )

            nursery.start_soon(accept)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(served) == 3 * listeners._ACCEPTS_PER_TURN
    # Which of the tasks that wait for their turn has it first is up to Trio.
    assert min(served) <= 2 * listeners._ACCEPTS_PER_TURN


async def test_a_connection_is_closed_when_its_handler_ends_or_is_cancelled(
    poller: Poller, path: Path
) -> None:
    async def handle(stream: SocketStream, _: object) -> None:
        if await stream.receive() == b"stay":
            await trio.sleep_forever()

    limiter = trio.Semaphore(10)
    with listen_unix(path) as listener, ExitStack() as stack:
        one, two = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await accepting(listener, poller, handle, Clients(nursery, limiter), unexpected)

            nursery.start_soon(accept)
            for client, what in ((one, b"go"), (two, b"stay")):
                client.connect(str(path))
                client.send(what)
            await wait_all_tasks_blocked()
            assert one.recv(1) == b""
            assert len(poller) == 1
            nursery.cancel_scope.cancel()
        assert two.recv(1) == b""
    assert limiter.value == 10
    assert len(poller) == 0


@pytest.mark.parametrize("code", sorted(listeners._CAPACITY_ERRNOS))
async def test_pauses_while_the_machine_has_no_room(
    poller: Poller, autojump_clock: MockClock, code: int
) -> None:
    near, far = socket.socketpair()
    listener = ScriptedListener(*[OSError(code, os.strerror(code)) for _ in range(120)], near)
    told: list[tuple[float, str | None]] = []
    accepted: list[tuple[float, tuple[str, int]]] = []

    async def handle(_: SocketStream, address: tuple[str, int]) -> None:
        accepted.append((trio.current_time() - start, address))

    def on_error(error: OSError) -> None:
        told.append((trio.current_time() - start, error.strerror))

    start = trio.current_time()
    with trio.move_on_after(100), far:
        async with trio.open_nursery() as nursery:
            await accepting(listener, poller, handle, Clients(nursery, trio.Semaphore(1)), on_error)
    listener.close()
    # Said at once, and again only after a while.
    assert told == [
        (0, os.strerror(code)),
        (pytest.approx(listeners._TELL_INTERVAL, abs=0.2), os.strerror(code)),
    ]
    ((when, who),) = accepted
    assert when == pytest.approx(12)
    assert who == ("192.0.2.1", 1234)


# accept(2) names these, and the kernel reports a few more that belong to one connection.
OF_ONE_CONNECTION = (
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EPROTO,
    errno.ETIMEDOUT,
)


async def test_errors_of_one_connection_are_skipped(
    poller: Poller, autojump_clock: MockClock
) -> None:
    near, far = socket.socketpair()
    errors = [OSError(code, "x") for code in OF_ONE_CONNECTION]
    listener = ScriptedListener(*errors, near)
    accepted: list[float] = []

    async def handle(_: SocketStream, __: object) -> None:
        accepted.append(trio.current_time() - start)

    start = trio.current_time()
    with trio.move_on_after(1), far:
        async with trio.open_nursery() as nursery:
            await accepting(
                listener, poller, handle, Clients(nursery, trio.Semaphore(1)), unexpected
            )
    listener.close()
    assert accepted == [0]


async def test_what_goes_wrong_with_one_connection_costs_that_one_only(
    poller: Poller, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even an error that nobody has thought of ends accepting."""
    (one, far), (two, other) = socket.socketpair(), socket.socketpair()
    listener = ScriptedListener(one, two)
    told: list[str | None] = []
    served: list[int] = []
    open_stream = poller.open_stream

    def fail_once(sock: socket.socket) -> SocketStream:
        monkeypatch.undo()
        raise OSError(errno.EINVAL, "Invalid argument")

    async def handle(stream: SocketStream, _: object) -> None:
        served.append(stream.fileno())

    monkeypatch.setattr(poller, "open_stream", fail_once)
    limiter = trio.Semaphore(1)
    with trio.move_on_after(1), far, other:
        async with trio.open_nursery() as nursery:
            clients = Clients(nursery, limiter)
            await accepting(listener, poller, handle, clients, lambda e: told.append(e.strerror))
    listener.close()
    assert poller.open_stream == open_stream
    assert (told, len(served), one.fileno()) == (["Invalid argument"], 1, -1)
    assert limiter.value == 1


async def test_no_room_to_watch_a_listener(
    poller: Poller, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = socket.socketpair()
    listener = ScriptedListener(near)
    told: list[str | None] = []
    accepted: list[float] = []
    start = trio.current_time()

    def fail(fd: int, pollable: object) -> None:
        if trio.current_time() - start > 5:
            monkeypatch.undo()
        raise OSError(errno.ENOSPC, "No space left on device")

    async def handle(_: SocketStream, __: object) -> None:
        accepted.append(trio.current_time() - start)

    monkeypatch.setattr(poller, "watch_listener", fail)
    with trio.move_on_after(10), far:
        async with trio.open_nursery() as nursery:
            clients = Clients(nursery, trio.Semaphore(1))
            await accepting(listener, poller, handle, clients, lambda e: told.append(e.strerror))
    listener.close()
    assert told == ["No space left on device"]
    assert accepted == [pytest.approx(5.1, abs=0.2)]


async def test_any_other_error_ends_accepting(poller: Poller) -> None:
    listener = ScriptedListener(OSError(errno.EINVAL, "not a listener"))
    limiter = trio.Semaphore(1)

    async def handle(_: SocketStream, __: object) -> None:
        pytest.fail("nothing was accepted")

    async with trio.open_nursery() as nursery:
        with pytest.raises(OSError, match="not a listener"):
            await accepting(listener, poller, handle, Clients(nursery, limiter), unexpected)
    listener.close()
    assert limiter.value == 1
