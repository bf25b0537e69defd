"""The saved state on disk: one writer, atomic replacement, the previous version kept.

Synchronous file IO; the caller runs it in a thread, one call at a time. What is inside the file is
the business of the format that it is given. Imports no trio.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from kamal_proxy.errors import StateError
from kamal_proxy.json_format import MAX_SIZE, StateFormatError
from kamal_proxy.state_format import SavedPause, SavedRollout, SavedService

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

__all__ = ["SavedPause", "SavedRollout", "SavedService", "StateFile"]

_ADVICE = {
    errno.EACCES: "check owner and permissions",
    errno.EPERM: "check owner and permissions",
    errno.EROFS: "mount it writable",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or raise the quota",
}


S = TypeVar("S")


class StateFormat(Protocol[S]):
    """What is inside a state file; modules such as ``state_format`` are such formats."""

    def decode(self, content: bytes, /) -> tuple[S, ...]:
        """Read saved services; raises ``StateFormatError``."""

    def encode(self, services: Iterable[S], /) -> bytes:
        """Write services so that :meth:`decode` reads them; raises ``StateFormatError``."""


class StateFile(Generic[S]):
    """A state file of one proxy; a context manager that holds the lock while it is open.

    Args:
        path: The file. ``<path>.previous`` and ``<path>.lock`` lie beside it.
        state_format: What is inside.
    """

    def __init__(self, path: Path | str, state_format: StateFormat[S]) -> None:
        self.path = Path(path)
        self._format = state_format
        self.previous_path = self.path.with_name(self.path.name + ".previous")
        self.lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock: int | None = None
        self._loaded = False
        self._content: bytes | None = None  # what is known to be valid and durable at the path

    def open(self) -> Self:
        """Take the lock; create the directory (mode 0700) if there is none, but not the file.

        Raises:
            StateError: another proxy holds the lock, or the directory can't be written to.
        """
        if self._lock is not None:
            raise RuntimeError(f"state file {self.path} is open already")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _os_error("can't write beside the saved state", self.path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StateError(
                f"another kamal-proxy is using the saved state {self.path}; "
                "stop it first or use another data directory"
            ) from error
        except OSError as error:
            os.close(lock)
            raise _os_error("can't lock the saved state", self.lock_path, error) from error
        self._lock = lock
        return self

    def close(self) -> None:
        """Release the lock. Closing twice is harmless."""
        lock, self._lock = self._lock, None
        self._loaded, self._content = False, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def load(self) -> tuple[S, ...] | None:
        """Read the saved services, and remove what a crashed run left behind.

        Returns:
            The services in the file's order, or ``None`` when there is no file.

        Raises:
            StateError: the file is there but can't be read, or is not a complete saved state.
        """
        self._require_open()
        self._remove_leftovers()
        try:
            content = _read(self.path)
            services = None if content is None else self._format.decode(content)
        except StateFormatError as error:
            raise StateError(
                f"the saved state {self.path} can't be used: {error}; {self._way_out()}"
            ) from error
        except OSError as error:
            raise _os_error("can't read the saved state", self.path, error) from error
        self._loaded, self._content = True, content
        return services

    def save(self, services: Iterable[S]) -> None:
        """Replace the file, durably; keep what it held as the previous version.

        At every instant the path holds a complete state. When it holds the same already,
        nothing is written. A file that :meth:`load` refuses is never overwritten.

        Raises:
            StateError: nothing was saved, or the new state is in place but may not survive a power
                failure (only when the directory can't be synchronised).
        """
        self._require_open()
        try:
            content = self._format.encode(services)
        except StateFormatError as error:
            raise StateError(f"can't save the state to {self.path}: {error}") from error
        if not self._loaded:
            self.load()
        try:
            if content == self._content and _holds(self.path, content):
                return
            if self._content is not None:
                self._replace(self.previous_path, self._content)
            self._replace(self.path, content)
            self._synchronise_directory()
        except OSError as error:
            raise _os_error("can't save the state to", self.path, error) from error
        self._content = content

    def _require_open(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"state file {self.path} is not open")

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o644)
        try:
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            # The first error is the one to report; the next load removes what stays.
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _synchronise_directory(self) -> None:
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems can't synchronise a directory, and say so like this.
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        start = f".{self.path.name}."
        try:
            for name in os.listdir(self.path.parent):
                if name.startswith(start) and name.endswith(".tmp"):
                    os.unlink(self.path.with_name(name))
        except OSError as error:
            raise _os_error(
                "can't tidy the directory of the saved state", self.path, error
            ) from error

    def _way_out(self) -> str:
        """Tell what to do about a file that can't be used."""
        try:
            previous = _read(self.previous_path)
            intact = previous is not None and bool(self._format.decode(previous))
        except (OSError, StateFormatError):
            intact = False
        if intact:
            return (
                f"its previous version {self.previous_path} is intact: copy it to {self.path} to "
                f"start from it, or move {self.path} away to start without services"
            )
        return f"repair it, or move {self.path} away to start without services"


def _read(path: Path) -> bytes | None:
    """Return the file's bytes, ``None`` without a file; never waits, whatever lies at the path."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StateFormatError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_SIZE + 1)  # one more than decode accepts
    finally:
        os.close(descriptor)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return _read(path) == content
    except StateFormatError:
        return False


def _os_error(what: str, path: Path, error: OSError) -> StateError:
    sentence = f"{what} {path}: {error.strerror or error}"
    advice = _ADVICE.get(error.errno or 0)
    return StateError(
        f"{sentence}; {advice} (this process is user {os.geteuid()})" if advice else sentence
    )
