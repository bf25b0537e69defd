"""The file that the UDP sessions are kept in between two runs of the proxy.

Synchronous file IO; the caller runs it in a thread, one call at a time, and holds the lock of the
saved state (``state.py``), so that there is one writer. What is inside is ``saved_sessions``'
business. Imports no trio.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

from kamal_proxy.errors import StateError
from kamal_proxy.udp.saved_sessions import MAX_SIZE


class SessionStore:
    """The saved sessions of one proxy.

    Args:
        path: The file. Its directory must be there; ``.<name>.tmp`` lies beside it during a save.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        # Always the same name: crashes leave one of them at most, which the next save removes.
        # The last save may come while a thread is still busy with the one before.
        self._lock = threading.Lock()
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")

    def save(self, content: bytes) -> None:
        """Replace the file; only its owner may read it, because it says who talks to whom.

        A process that dies halfway leaves the old file. Nothing is synchronised: this runs every
        few seconds on the disk of the application, and all that a power failure can cost are the
        sessions, which it has ended anyway. What it leaves then may be cut; the checksum tells.

        Raises:
            StateError: nothing was saved.
        """
        if len(content) > MAX_SIZE:
            raise StateError(
                f"can't save the UDP sessions to {self.path}: {len(content)} bytes are more than "
                f"{MAX_SIZE}"
            )
        try:
            with self._lock:
                self._replace(content)
        except OSError as error:
            raise self._os_error("can't save the UDP sessions to", error) from error

    def load(self) -> bytes | None:
        """Return what was saved, or None if there is no file; never waits, whatever lies there.

        Raises:
            StateError: it can't be read, is larger than a document of sessions can be, or is not a
                regular file (a symbolic link neither: nobody but this class makes the file).
        """
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise self._unusable("it is not a regular file")
                if status.st_size > MAX_SIZE:
                    raise self._unusable(f"it is larger than {MAX_SIZE} bytes")
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read(status.st_size)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # what O_NOFOLLOW says of a symbolic link
                raise self._unusable("it is not a regular file") from error
            raise self._os_error("can't read the UDP sessions from", error) from error

    def remove(self) -> None:
        """Remove the file, and what a crashed save left; it is no error if there is none.

        Raises:
            StateError: it is still there.
        """
        try:
            self._temporary.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._os_error("can't remove the UDP sessions in", error) from error

    def _replace(self, content: bytes) -> None:
        self._temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self._temporary, flags, 0o600)
        try:
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
            os.replace(self._temporary, self.path)
        except BaseException:
            # The first error is the one to report; the next save removes what stays.
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            raise

    def _unusable(self, why: str) -> StateError:
        return StateError(f"the saved UDP sessions {self.path} can't be used: {why}")

    def _os_error(self, what: str, error: OSError) -> StateError:
        return StateError(f"{what} {self.path}: {error.strerror or error}")
