"""The state file: what a crash or an error at any call leaves behind, the lock, the sentences."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy import state, state_format
from kamal_proxy.errors import StateError
from kamal_proxy.json_format import MAX_SIZE, StateFormatError
from kamal_proxy.options import ServiceOptions
from kamal_proxy.state import SavedPause, SavedService, StateFile
from kamal_proxy.state_format import encode
from kamal_proxy.target_options import TargetOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PLAIN = TargetOptions(forward_headers=True)
OLDER = (SavedService(name="app", target_options=PLAIN, active_targets=("v0:80",)),)
OLD = (SavedService(name="app", target_options=PLAIN, active_targets=("v1:80",)),)
NEW = (
    SavedService(
        name="app",
        service_options=ServiceOptions(hosts=("app.example.com",)),
        target_options=PLAIN,
        active_targets=("v2:80",),
        pause=SavedPause(state="stopped", stop_message="back soon"),
    ),
    SavedService(name="other", target_options=PLAIN, active_targets=("v1:80",)),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config" / "kamal-proxy.state"


@pytest.fixture
def file(path: Path) -> Iterator[StateFile[SavedService]]:
    with StateFile(path, state_format) as file:
        yield file


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def reload(path: Path) -> tuple[SavedService, ...] | None:
    with StateFile(path, state_format) as file:
        return file.load()


def test_opening_creates_the_directory_but_no_state(path: Path) -> None:
    with StateFile(path, state_format) as file:
        assert file.load() is None
        assert names(path) == ["kamal-proxy.state.lock"]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_is_saved_is_loaded(file: StateFile[SavedService], path: Path) -> None:
    file.save(NEW)
    assert file.load() == NEW
    assert names(path) == ["kamal-proxy.state", "kamal-proxy.state.lock"]
    assert path.read_bytes() == encode(NEW)


def test_the_mode_is_the_one_of_the_original(file: StateFile[SavedService], path: Path) -> None:
    before = os.umask(0o022)
    try:
        file.save(NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_previous_version_is_kept(file: StateFile[SavedService], path: Path) -> None:
    for services in (OLDER, OLD, NEW):
        file.save(services)
    assert file.previous_path.read_bytes() == encode(OLD)
    assert file.load() == NEW
    assert names(path) == [
        "kamal-proxy.state",
        "kamal-proxy.state.lock",
        "kamal-proxy.state.previous",
    ]


def test_the_previous_version_is_kept_by_the_first_save_of_a_run(path: Path) -> None:
    put(path, encode(OLD))
    with StateFile(path, state_format) as file:
        file.save(NEW)
        assert file.previous_path.read_bytes() == encode(OLD)


def test_saving_the_same_again_writes_nothing(file: StateFile[SavedService], path: Path) -> None:
    file.save(OLD)
    file.save(NEW)
    before = path.stat().st_ino, file.previous_path.stat().st_ino
    file.save(NEW)
    assert (path.stat().st_ino, file.previous_path.stat().st_ino) == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"[")])
def test_saving_the_same_again_repairs_what_somebody_broke(
    file: StateFile[SavedService], path: Path, damage: Callable[[Path], object]
) -> None:
    file.save(NEW)
    damage(path)
    file.save(NEW)
    assert file.load() == NEW
    assert file.previous_path.read_bytes() == encode(NEW)


def test_removing_every_service_saves_an_empty_list(
    file: StateFile[SavedService], path: Path
) -> None:
    file.save(NEW)
    file.save(())
    assert path.read_bytes() == b"[]\n"
    assert file.load() == ()


def test_a_closed_file_refuses_work(path: Path) -> None:
    file = StateFile(path, state_format)
    with pytest.raises(RuntimeError, match="not open"):
        file.load()
    with pytest.raises(RuntimeError, match="not open"):
        file.save(NEW)
    with file, pytest.raises(RuntimeError, match="open already"):
        file.open()
    file.close()
    with pytest.raises(RuntimeError, match="not open"):
        file.load()


# Damage


def test_a_state_cut_anywhere_is_an_error_and_stays_as_it_is(path: Path) -> None:
    content = encode(OLD).rstrip()
    put(path, b"")
    with StateFile(path, state_format) as file:
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(StateError, match=re.escape(str(path))):
                file.load()
            with pytest.raises(StateError, match=re.escape(str(path))):
                file.save(NEW)
            assert path.read_bytes() == content[:length]
        path.write_bytes(content)
        assert file.load() == OLD


def test_damage_is_told_with_its_place_and_the_way_out(
    file: StateFile[SavedService], path: Path
) -> None:
    path.write_bytes(b'[\n{"name":')
    with pytest.raises(StateError) as caught:
        file.load()
    assert str(caught.value) == (
        f"the saved state {path} can't be used: line 2 column 9: Expecting value; "
        f"repair it, or move {path} away to start without services"
    )
    file.previous_path.write_bytes(encode(OLD))
    with pytest.raises(StateError) as caught:
        file.load()
    assert str(caught.value) == (
        f"the saved state {path} can't be used: line 2 column 9: Expecting value; "
        f"its previous version {path}.previous is intact: copy it to {path} to start from it, "
        f"or move {path} away to start without services"
    )
    file.previous_path.write_bytes(b"[")
    with pytest.raises(StateError, match="; repair it, or move"):
        file.load()


def test_a_wrong_shape_names_service_and_key(file: StateFile[SavedService], path: Path) -> None:
    path.write_bytes(b'[{"name": "shop", "target_options": {"response_timeout": "30s"}}]')
    with pytest.raises(
        StateError, match=r"'shop': target_options\.response_timeout must be a whole number;"
    ):
        file.load()


def test_an_absurd_size_is_refused_without_reading_it_all(
    file: StateFile[SavedService], path: Path
) -> None:
    with path.open("wb") as sparse:
        sparse.truncate(MAX_SIZE + 1)
    with pytest.raises(StateError, match="larger than 67108864 bytes"):
        file.load()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_refused_without_waiting(
    file: StateFile[SavedService], path: Path, make: Callable[[Path], None]
) -> None:
    make(path)
    with pytest.raises(StateError, match="not a regular file"):
        file.load()


def test_a_file_for_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    with pytest.raises(StateError, match=re.escape(f"{tmp_path}/config/kamal-proxy.state: ")):
        StateFile(tmp_path / "config" / "kamal-proxy.state", state_format).open()


def test_what_could_not_be_read_again_is_not_saved(
    file: StateFile[SavedService], path: Path
) -> None:
    file.save(OLD)
    with pytest.raises(StateError, match=f"{re.escape(str(path))}: service 'app' occurs twice"):
        file.save(OLD + OLD)
    assert file.load() == OLD


def test_leftovers_of_a_crashed_run_are_removed_and_nothing_else(path: Path) -> None:
    put(path, encode(OLD))
    for name in (".kamal-proxy.state.1234.tmp", ".other.state.1.tmp", "kamal-proxy.state.tmp"):
        path.with_name(name).write_bytes(b"[")
    assert reload(path) == OLD
    assert names(path) == [
        ".other.state.1.tmp",
        "kamal-proxy.state",
        "kamal-proxy.state.lock",
        "kamal-proxy.state.tmp",
    ]


# The lock

HOLDER = """
import sys
from kamal_proxy import state_format
from kamal_proxy.state import StateFile
with StateFile(sys.argv[1], state_format):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(
            StateError, match=f"another kamal-proxy is using the saved state {re.escape(str(path))}"
        ):
            StateFile(path, state_format).open()
        holder.kill()
    with StateFile(path, state_format) as file:
        assert file.load() is None


def test_the_lock_is_also_kept_within_a_process(file: StateFile[SavedService], path: Path) -> None:
    with pytest.raises(StateError, match="another kamal-proxy"):
        StateFile(path, state_format).open()
    file.close()
    StateFile(path, state_format).open().close()


# Other formats


class Lines:
    """A format without JSON: a name per line."""

    def decode(self, content: bytes) -> tuple[str, ...]:
        if not content.endswith(b"."):
            raise StateFormatError("the last line must be a dot")
        return tuple(content.decode().split("\n")[:-1])

    def encode(self, services: Iterable[str]) -> bytes:
        names = tuple(services)
        if "" in names:
            raise StateFormatError("a name is empty")
        return "\n".join([*names, "."]).encode()


def test_what_is_inside_is_up_to_the_format(path: Path) -> None:
    with StateFile(path, Lines()) as file:
        file.save(["a", "b"])
        file.save(["c"])
        assert (path.read_bytes(), file.previous_path.read_bytes()) == (b"c\n.", b"a\nb\n.")
        assert file.load() == ("c",)
        with pytest.raises(StateError, match=r"can't save the state to .*: a name is empty"):
            file.save([""])
        put(path, b"c")
        with pytest.raises(StateError) as caught:
            file.load()
    assert str(caught.value) == (
        f"the saved state {path} can't be used: the last line must be a dot; its previous version "
        f"{path}.previous is intact: copy it to {path} to start from it, or move {path} away to "
        "start without services"
    )


# Failures of the operating system


class Crash(BaseException):
    """The process ends here: nothing after it has an effect."""


class FailingOs:
    """The os module, of which the ``failing``-th call that changes something fails.

    With an error number the call raises that error, once; without, the process dies there: every
    later call has no effect either, except that descriptors are closed, as the kernel does.
    A failing write has written half.
    """

    CHANGES = frozenset({"open", "write", "fsync", "replace", "unlink"})

    def __init__(self, failing: int = -1, error: int | None = None) -> None:
        self.failing = failing
        self.error = error
        self.calls: list[str] = []
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def call(*arguments: Any) -> Any:
            if self.dead:
                raise Crash(name)
            self.calls.append(name)
            if len(self.calls) - 1 != self.failing:
                return real(*arguments)
            if name == "write":
                descriptor, content = arguments
                os.write(descriptor, content[: len(content) // 2])
            if self.error is None:
                self.dead = True
                raise Crash(name)
            raise OSError(self.error, os.strerror(self.error))

        return call


def open_with(
    monkeypatch: pytest.MonkeyPatch, path: Path, fake: FailingOs
) -> StateFile[SavedService]:
    """Open a state that holds OLD, with OLDER before it; then let the fake take over."""
    put(path, encode(OLD))
    path.with_name(path.name + ".previous").write_bytes(encode(OLDER))
    file = StateFile(path, state_format).open()
    assert file.load() == OLD
    monkeypatch.setattr(state, "os", fake)
    return file


def calls_of_a_save() -> list[str]:
    one_file = ["open", "write", "fsync", "replace"]
    # The previous version, the state, and then the directory.
    return [*one_file, *one_file, "open", "fsync"]


def test_a_save_makes_these_calls(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    fake = FailingOs()
    file = open_with(monkeypatch, path, fake)
    file.save(NEW)
    assert fake.calls == calls_of_a_save()
    file.close()


@pytest.mark.parametrize("call", range(len(calls_of_a_save())))
def test_a_crash_at_any_call_leaves_a_complete_state(
    monkeypatch: pytest.MonkeyPatch, path: Path, call: int
) -> None:
    fake = FailingOs(failing=call)
    file = open_with(monkeypatch, path, fake)
    with pytest.raises(Crash):
        file.save(NEW)
    monkeypatch.undo()
    file.close()
    renamed = call > 7
    assert path.read_bytes() == encode(NEW if renamed else OLD)
    assert path.with_name(path.name + ".previous").read_bytes() in (encode(OLDER), encode(OLD))
    assert reload(path) == (NEW if renamed else OLD)
    assert not [name for name in names(path) if name.endswith(".tmp")]
    with StateFile(path, state_format) as again:
        again.save(NEW)
        assert again.load() == NEW


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", range(len(calls_of_a_save())))
def test_an_error_at_any_call_is_told_and_the_next_save_works(
    monkeypatch: pytest.MonkeyPatch, path: Path, call: int, number: int
) -> None:
    fake = FailingOs(failing=call, error=number)
    file = open_with(monkeypatch, path, fake)
    with pytest.raises(StateError) as caught:
        file.save(NEW)
    assert str(caught.value).startswith(f"can't save the state to {path}: {os.strerror(number)}")
    renamed = call > 7
    assert path.read_bytes() == encode(NEW if renamed else OLD)
    assert not [name for name in names(path) if name.endswith(".tmp")]
    file.save(NEW)
    assert path.read_bytes() == encode(NEW)
    assert file.previous_path.read_bytes() == encode(OLD)
    monkeypatch.undo()
    assert file.load() == NEW
    file.close()


def test_a_full_disk_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    file = open_with(monkeypatch, path, FailingOs(failing=1, error=errno.ENOSPC))
    with pytest.raises(StateError) as caught:
        file.save(NEW)
    assert str(caught.value) == (
        f"can't save the state to {path}: No space left on device; "
        f"free some space (this process is user {os.geteuid()})"
    )
    file.close()


def test_a_directory_that_cannot_be_synchronised_at_all_is_accepted(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    file = open_with(monkeypatch, path, FailingOs(failing=9, error=errno.EINVAL))
    file.save(NEW)
    assert file.load() == NEW
    file.close()


def test_an_unsynchronised_save_is_not_taken_for_done(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    fake = FailingOs(failing=9, error=errno.EIO)
    file = open_with(monkeypatch, path, fake)
    with pytest.raises(StateError, match="Input/output error"):
        file.save(NEW)
    file.save(NEW)
    assert fake.calls == calls_of_a_save() * 2
    file.save(NEW)
    assert fake.calls[-1] == "open"  # the comparison; nothing is written any more
    assert len(fake.calls) == 2 * len(calls_of_a_save()) + 1
    file.close()


def test_the_lock_file_that_cannot_be_made_is_told(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setattr(state, "os", FailingOs(failing=0, error=errno.EROFS))
    with pytest.raises(StateError) as caught:
        StateFile(path, state_format).open()
    assert str(caught.value) == (
        f"can't write beside the saved state {path}: Read-only file system; "
        f"mount it writable (this process is user {os.geteuid()})"
    )


def test_a_file_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    put(path, encode(OLD))
    with StateFile(path, state_format) as file:
        monkeypatch.setattr(state, "os", FailingOs(failing=0, error=errno.EACCES))
        with pytest.raises(StateError) as caught:
            file.load()
        assert str(caught.value) == (
            f"can't read the saved state {path}: Permission denied; "
            f"check owner and permissions (this process is user {os.geteuid()})"
        )
        monkeypatch.undo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_told(path: Path) -> None:
    path.parent.mkdir(mode=0o500)
    with pytest.raises(StateError, match="Permission denied; check owner and permissions"):
        StateFile(path, state_format).open()
