"""The file of the saved sessions: replaced whole or not at all, private, nothing odd is read."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy.errors import StateError
from kamal_proxy.udp import session_store
from kamal_proxy.udp.session_store import SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable

OLD, NEW = b"old sessions", b"new sessions, " * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kamal-proxy-udp.sessions"


@pytest.fixture
def store(path: Path) -> SessionStore:
    return SessionStore(path)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_without_a_file_nothing_is_loaded(store: SessionStore, path: Path) -> None:
    assert store.load() is None
    assert names(path) == []


def test_what_is_saved_is_loaded(store: SessionStore, path: Path) -> None:
    for content in (OLD, NEW, b"", OLD):
        store.save(content)
        assert SessionStore(str(path)).load() == content
        assert names(path) == [path.name]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_the_owner_may_read_it(store: SessionStore, path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store.save(OLD)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_replaced_by_one_that_they_can_not(
    store: SessionStore, path: Path
) -> None:
    path.write_bytes(OLD)
    path.chmod(0o644)
    store.save(NEW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_remove_takes_all_away(store: SessionStore, path: Path) -> None:
    store.save(OLD)
    path.with_name(f".{path.name}.tmp").write_bytes(b"half")
    store.remove()
    assert names(path) == []
    store.remove()
    assert store.load() is None


def test_a_leftover_of_a_crash_is_no_obstacle(store: SessionStore, path: Path) -> None:
    leftover = path.with_name(f".{path.name}.tmp")
    leftover.write_bytes(b"half")
    leftover.chmod(0o400)
    store.save(NEW)
    assert store.load() == NEW
    assert names(path) == [path.name]


# What lies at the path


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_link(path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(OLD)
    path.symlink_to(target)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize(
    "make",
    [os.mkdir, os.mkfifo, make_link, make_loop, make_dangling_link],
    ids=lambda f: f.__name__,
)
def test_what_is_no_regular_file_is_refused_without_waiting(
    store: SessionStore, path: Path, make: Callable[[Path], None]
) -> None:
    make(path)
    with pytest.raises(StateError) as caught:
        store.load()
    assert str(caught.value) == (
        f"the saved UDP sessions {path} can't be used: it is not a regular file"
    )


def test_a_socket_is_refused(store: SessionStore, path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(path.parent)  # the path of a socket must be short
    make_socket(Path(path.name))
    with pytest.raises(StateError, match=r"can't read the UDP sessions from .*: No such device"):
        store.load()


@pytest.mark.parametrize("make", [os.mkfifo, make_link, make_loop, make_dangling_link])
def test_what_is_odd_is_replaced_and_not_followed(
    store: SessionStore, path: Path, make: Callable[[Path], None]
) -> None:
    make(path)
    others = {name: path.with_name(name).read_bytes() for name in names(path) if name == "target"}
    store.save(NEW)
    assert stat.S_ISREG(path.lstat().st_mode)
    assert store.load() == NEW
    assert names(path) == sorted([path.name, *others])
    for name, content in others.items():
        assert path.with_name(name).read_bytes() == content


def test_a_link_in_place_of_the_temporary_file_is_not_followed(
    store: SessionStore, path: Path
) -> None:
    target = path.with_name("target")
    target.write_bytes(OLD)
    path.with_name(f".{path.name}.tmp").symlink_to(target)
    store.save(NEW)
    assert target.read_bytes() == OLD
    assert store.load() == NEW


def test_a_directory_is_told_and_stays(store: SessionStore, path: Path) -> None:
    path.mkdir()
    with pytest.raises(StateError) as caught:
        store.save(NEW)
    assert str(caught.value) == f"can't save the UDP sessions to {path}: Is a directory"
    with pytest.raises(
        StateError, match=f"can't remove the UDP sessions in {re.escape(str(path))}"
    ):
        store.remove()
    assert names(path) == [path.name]


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "gone" / "sessions")
    assert store.load() is None
    store.remove()
    with pytest.raises(StateError, match="gone/sessions: No such file or directory"):
        store.save(NEW)


def test_an_absurd_size_is_neither_read_nor_written(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(OLD)
    monkeypatch.setattr(session_store, "MAX_SIZE", len(OLD))
    assert store.load() == OLD
    with pytest.raises(StateError, match=f"{len(OLD) + 1} bytes are more than {len(OLD)}"):
        store.save(OLD + b"!")
    assert store.load() == OLD
    path.write_bytes(OLD + b"!")
    with pytest.raises(StateError, match=f"can't be used: it is larger than {len(OLD)} bytes"):
        store.load()


# Errors and crashes


class Crash(BaseException):
    """The process ends here: nothing after it happens."""


class FailingOs:
    """Passes calls on to ``os``, but one of those that a save makes fails."""

    NAMES = ("open", "write", "close", "replace")

    def __init__(self, failing: int = -1, error: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self._failing = failing
        self._error = error

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.NAMES:
            return real

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._failing and self._error is not None:
                if name == "close":
                    real(*args)
                raise self._error
            if name == "write":
                args = (args[0], args[1][:9000])  # in pieces, as a file system may
            return real(*args)

        return call


CALLS = ["open", "write", "write", "close", "replace"]


def test_a_save_makes_these_calls(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FailingOs()
    monkeypatch.setattr(session_store, "os", fake)
    store.save(NEW)
    assert fake.calls == CALLS
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("call", range(len(CALLS)))
def test_an_error_at_any_call_leaves_the_old_file(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    store.save(OLD)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(session_store, "os", FailingOs(call, error))
    with pytest.raises(StateError) as caught:
        store.save(NEW)
    assert str(caught.value) == f"can't save the UDP sessions to {path}: No space left on device"
    monkeypatch.undo()
    assert names(path) == [path.name]
    assert store.load() == OLD
    store.save(NEW)
    assert store.load() == NEW


@pytest.mark.parametrize("call", range(len(CALLS)))
def test_a_crash_at_any_call_leaves_the_old_file(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    store.save(OLD)
    fake = FailingOs(call, Crash())
    fake.unlink = fail  # type: ignore[attr-defined]  # a process that is gone tidies nothing
    monkeypatch.setattr(session_store, "os", fake)
    with pytest.raises(Crash):
        store.save(NEW)
    monkeypatch.undo()
    assert store.load() == OLD
    assert len(names(path)) <= 2
    store.save(NEW)
    assert store.load() == NEW
    assert names(path) == [path.name]


def fail(*args: object) -> None:
    raise OSError(errno.EIO, "gone")


def test_a_file_that_cannot_be_read_is_told(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(OLD)
    error = OSError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(session_store, "os", FailingOs(0, error))
    with pytest.raises(StateError) as caught:
        store.load()
    assert str(caught.value) == f"can't read the UDP sessions from {path}: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_told(store: SessionStore, path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(StateError, match="Permission denied"):
            store.save(OLD)
    finally:
        path.parent.chmod(0o700)
