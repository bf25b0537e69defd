"""Where buffered bodies live: in memory while they are small, then in an unlinked temporary file.

Owns the files, the threads that read and write them, and what all bodies of one proxy may take
together of memory and disk. Knows nothing of HTTP: when a body is buffered, and what a client hears
of an error, is decided by the caller.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import warnings
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

BATCH = 256 * 1024  # bytes for which one trip to a thread is worth its price
MAX_THREADS = 8  # more would only queue for the same disk
# Freeing an unlinked file takes the kernel 50 us per MiB (ext4, measured), and everybody waits.
LARGE_FILE = 4 * 1024 * 1024  # bytes
# Each piece costs about 50 bytes of its own; a client that sends two bytes at a time would
# otherwise take 25 times the memory that is counted.
_SMALL_PIECE = 512  # bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_Result = TypeVar("_Result")


class BodyTooLargeError(Exception):
    """A body is larger than its service allows."""


class SpillFullError(Exception):
    """There is no room on disk: of the proxy's own quota, or of the file system; the text says."""


class SpillFailedError(Exception):
    """A spill file can't be opened, written or read; the text says where and why."""


class Spill:
    """What the buffered bodies of one proxy take and may take, all together.

    Args:
        directory: Where the files are; ``None`` means the system's directory for temporary files.
        max_spill: Bytes that may lie there at once; 0 means no limit.
        max_memory: Bytes of all bodies in memory at once, those that wait to be written to disk
            included. Not counted: what callers hold, and up to ``MAX_THREADS`` batches on their way
            through a thread.

    Attributes:
        spilled: Bytes on disk now, or about to be written.
        memory: Bytes in memory now.
    """

    def __init__(self, directory: Path | None, max_spill: int, max_memory: int) -> None:
        self.directory = directory
        self.max_spill = max_spill
        self.max_memory = max_memory
        self.spilled = 0
        self.memory = 0
        self.limiter = trio.CapacityLimiter(MAX_THREADS)
        self._doomed: deque[int] = deque()
        self._discarding = False
        # Reentrant, because the garbage collector may discard a leaked body at any time.
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Spill memory={self.memory} spilled={self.spilled}>"

    def open(self, memory: int, limit: int) -> Body:
        """Begin a body; it must be closed.

        Args:
            memory: Bytes of it that are kept in memory if there is room; 0 means none.
            limit: Its largest size in bytes; 0 means no limit.
        """
        return Body(self, memory, limit)

    def reserve(self, size: int) -> None:
        """Take bytes of the quota.

        Raises:
            SpillFullError: so many are not left; none are taken.
        """
        if self.max_spill and self.spilled + size > self.max_spill:
            raise SpillFullError(
                f"the quota of {self.max_spill} bytes for buffered bodies on disk is used up"
            )
        self.spilled += size

    def discard(self, descriptor: int, size: int) -> None:
        """Close the descriptor of an unlinked file; one thread does it for all that are large.

        The quota of a large file is free for others a moment before its place on disk is.
        """
        if size < LARGE_FILE:
            _close(descriptor)
            return
        with self._lock:
            self._doomed.append(descriptor)
            if self._discarding:
                return
            self._discarding = True
        try:
            trio.lowlevel.start_thread_soon(
                self._close_doomed, lambda result: result.unwrap(), "close spilled bodies"
            )
        except RuntimeError:  # no thread can be started
            self._close_doomed()

    def _close_doomed(self) -> None:
        while True:
            with self._lock:
                if not self._doomed:
                    self._discarding = False
                    return
                descriptor = self._doomed.popleft()
            _close(descriptor)


class Body:
    """One body: written once from start to end, then read as often as is needed, then closed.

    Its bytes stay in memory while there is room for them; from the first that finds none on, they
    go to a file. Of those, up to ``BATCH`` bytes or one write wait in memory for a thread; where
    ``Spill.max_memory`` leaves no room for them to wait, each write is a trip to a thread.

    One task writes. ``close`` may be called at any time, by any task: while a thread is at work on
    the file, everything is freed when that thread is done.

    Attributes:
        size: Bytes written so far.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_file",
        "_finished",
        "_held",
        "_limit",
        "_memory",
        "_pieces",
        "_spill",
        "_users",
        "_writing",
        "size",
    )

    def __init__(self, spill: Spill, memory: int, limit: int) -> None:
        self.size = 0
        self._spill = spill
        self._memory = memory
        self._limit = limit
        self._pieces: list[bytes] = []
        self._held = 0  # bytes in the pieces
        self._file: _SpillFile | None = None
        self._users = 0  # threads at work on the file
        self._writing = True
        self._finished = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Body size={self.size} in_memory={self._held}>"

    def __del__(self) -> None:
        # A leak is a mistake of the caller, but must not take room from everybody else for good.
        # The counters are not locked: it is the interpreter's lock that makes this safe even when
        # the garbage collector runs in another thread.
        if not self._closed:
            self.close()
            sentence = f"body never closed: {self!r}"
            warnings.warn(sentence, ResourceWarning, stacklevel=1, source=self)

    async def write(self, data: bytes) -> None:
        """Add bytes; after an error or a cancellation the body can only be closed.

        Is not a checkpoint unless a thread is needed. Once a thread writes, a cancellation waits
        for it.

        Raises:
            BodyTooLargeError: the body would be larger than its limit.
            SpillFullError: the quota or the file system has no room for it.
            SpillFailedError: the file can't be opened or written.
            trio.ClosedResourceError: the body was closed, maybe while this was waiting.
        """
        if not self._writing:
            self._refuse()
        if not data:
            return
        size = self.size + len(data)
        self._writing = False  # for good, unless all goes well
        if self._limit and size > self._limit:
            raise BodyTooLargeError(f"the body is larger than {self._limit} bytes")
        if self._file is None:
            data = self._keep(data)
        if data:
            await self._spill_over(data)
        self.size = size
        self._writing = True

    async def finish(self) -> None:
        """Declare the body whole, and write what still waits to be written.

        Raises:
            SpillFullError: the file system has no room for it.
            SpillFailedError: the file can't be opened or written.
            trio.ClosedResourceError: the body was closed, maybe while this was waiting.
        """
        if not self._writing:
            self._refuse()
        self._writing = False
        if self._file is not None and self._file.pending:
            await self._flush(self._file)
        self._finished = True

    def whole_nowait(self) -> bytes | None:
        """Return the finished body if all of it is in memory, else None."""
        self._require_finished()
        if self._file is not None:
            return None
        if len(self._pieces) != 1:
            # A new list, because a reader may be on its way through the old one.
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def parts(self) -> AsyncIterator[bytes]:
        """Return an iterator over the finished body, in pieces of 1 to ``BATCH`` bytes.

        Each call begins at the start. An iterator may be left at any point and needs no closing. It
        raises SpillFailedError if the file can't be read, and trio.ClosedResourceError if the body
        was closed.
        """
        self._require_finished()
        return _Parts(self, self._pieces)

    def close(self) -> None:
        """Free memory, file and quota. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._writing = self._finished = False
        if not self._users:
            self._release()

    def _keep(self, data: bytes) -> bytes:
        """Keep in memory what there is room for, and return the rest."""
        spill = self._spill
        room = min(self._memory - self._held, spill.max_memory - spill.memory)
        size = len(data)
        rest = b""
        if room < size:
            data, rest, size = data[:room], data[room:], room
        if size:
            _append(self._pieces, data)
            self._held += size
            spill.memory += size
        return rest

    async def _spill_over(self, data: bytes) -> None:
        spill, file, size = self._spill, self._file, len(data)
        if file is None:
            file = self._file = _SpillFile(spill.directory)
        spill.reserve(size)
        file.reserved += size
        _append(file.pending, data)
        may_wait = spill.memory + size <= spill.max_memory
        if may_wait:
            file.held += size
            spill.memory += size
        if not may_wait or file.held >= BATCH:
            await self._flush(file)

    async def _read(self, offset: int) -> bytes:
        """Return up to ``BATCH`` bytes of what is in the file; empty at its end."""
        file = self._file
        if file is None or offset == file.size:
            return b""
        return await self._in_thread("read", file, partial(file.read, offset))

    async def _flush(self, file: _SpillFile) -> None:
        await self._in_thread("write", file, file.write_pending)
        self._spill.memory -= file.held
        file.held = 0

    async def _in_thread(
        self, doing: str, file: _SpillFile, call: Callable[[], _Result]
    ) -> _Result:
        # The thread gets the file, never the body: the last reference to a body that leaked would
        # otherwise be dropped in the thread. The thread is never abandoned, so whoever waits here
        # knows that the descriptor is no longer in use afterwards.
        self._users += 1
        try:
            result = await trio.to_thread.run_sync(call, limiter=self._spill.limiter)
        except OSError as error:
            kind = SpillFullError if error.errno in _FULL else SpillFailedError
            place = file.place or "the directory for temporary files"
            raise kind(
                f"can't {doing} a buffered body in {place}: {error.strerror or error}"
            ) from error
        finally:
            self._users -= 1
            if self._closed and not self._users:
                self._release()
        if self._closed:
            self._refuse()
        return result

    def _release(self) -> None:
        spill, file = self._spill, self._file
        self._pieces = []
        spill.memory -= self._held
        self._held = 0
        if file is None:
            return
        self._file = None
        spill.memory -= file.held
        spill.spilled -= file.reserved
        if file.descriptor is not None:
            spill.discard(file.descriptor, file.size)

    def _require_finished(self) -> None:
        if not self._finished:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._closed:
            raise trio.ClosedResourceError("the body was closed")
        if self._finished:
            raise RuntimeError("the body is finished already")
        raise RuntimeError("the body is not finished, or has failed")


class _Parts:
    """One pass over a body. Not an async generator: those must be closed when left early."""

    __slots__ = ("_batches", "_body", "_offset")

    def __init__(self, body: Body, pieces: list[bytes]) -> None:
        self._body = body
        self._batches = _batches(pieces)
        self._offset = 0  # in the file

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        self._body._require_finished()
        part = next(self._batches, b"")
        if not part:
            part = await self._body._read(self._offset)
            self._offset += len(part)
        if not part:
            raise StopAsyncIteration
        return part


class _SpillFile:
    """The part of one body that is not for memory. Its methods block, and run in threads.

    Attributes:
        place: The directory; empty until a thread has looked for the system's.
        pending: What waits to be written.
        held: Bytes of it that are counted as memory.
        reserved: Bytes taken of the quota.
        descriptor: The open file; None before the first write.
        size: Bytes in it.
    """

    __slots__ = ("descriptor", "held", "pending", "place", "reserved", "size")

    def __init__(self, directory: Path | None) -> None:
        self.place = "" if directory is None else str(directory)
        self.pending: list[bytes] = []
        self.held = 0
        self.reserved = 0
        self.descriptor: int | None = None
        self.size = 0

    def write_pending(self) -> None:
        """Write what is pending, into a new file the first time; may raise any OSError."""
        self.place = self.place or tempfile.gettempdir()
        if self.descriptor is None:
            self.descriptor = _open_unlinked(self.place)
        rest = memoryview(b"".join(self.pending))
        while rest:
            written = os.write(self.descriptor, rest)
            self.size += written
            rest = rest[written:]
        self.pending = []

    def read(self, offset: int) -> bytes:
        """Return 1 to ``BATCH`` bytes from an offset before the end; may raise any OSError."""
        assert self.descriptor is not None
        data = os.pread(self.descriptor, min(BATCH, self.size - offset), offset)
        if not data:
            raise OSError(errno.EIO, "the file is shorter than what was written to it")
        return data


def _open_unlinked(directory: str) -> int:
    """Open a new file without a name, for reading and writing, by its owner only."""
    # Kernels, file systems and sandboxes without O_TMPFILE refuse it with different errors. What
    # else may be wrong, the second way reports.
    with contextlib.suppress(OSError):
        flags = os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC
        return os.open(directory, flags, 0o600)
    descriptor, path = tempfile.mkstemp(prefix="kamal-proxy-", dir=directory)
    try:
        os.unlink(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _close(descriptor: int) -> None:
    # Network file systems report at the close what they could not write. The file has no name any
    # more and nobody wants it; the descriptor is closed all the same.
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _append(pieces: list[bytes], data: bytes) -> None:
    if len(data) < _SMALL_PIECE and pieces and len(pieces[-1]) < _SMALL_PIECE:
        pieces[-1] += data
    else:
        pieces.append(data)


def _batches(pieces: list[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in pieces of up to ``BATCH``, small neighbours joined."""
    batch: list[bytes] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece) > BATCH:
            yield b"".join(batch)
            batch, size = [], 0
        if len(piece) > BATCH:
            for start in range(0, len(piece), BATCH):
                yield piece[start : start + BATCH]
        else:
            batch.append(piece)
            size += len(piece)
    if batch:
        yield b"".join(batch)
