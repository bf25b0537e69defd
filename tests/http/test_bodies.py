"""Buffered bodies: memory, spill files, quotas, full disks, cancellation; nothing stays behind."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import subprocess
import sys
import threading
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.http import bodies
from kamal_proxy.http.bodies import (
    BATCH,
    MAX_THREADS,
    Body,
    BodyTooLargeError,
    Spill,
    SpillFailedError,
    SpillFullError,
)
from tests.fuzzing import at_least

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIB = 1024 * 1024
PATIENCE = 30  # seconds until a thread that nobody let go gives up
CONTENT = random.Random(3).randbytes(3 * MIB)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where the files of a test go; at its end there is no file and no descriptor of one."""
    yield tmp_path
    assert open_files(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def open_files(directory: Path) -> list[int]:
    """Return the descriptors of this process for files under a directory, or for that itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if f"{target}/".startswith(f"{directory}/"):
            found.append(int(name))
    return found


def make(
    directory: Path | None, *, max_spill: int = 0, max_memory: int = 1024**3
) -> tuple[Spill, Callable[..., Body]]:
    """Return a spill, and what opens bodies of it that keep 10 bytes in memory."""
    spill = Spill(directory, max_spill, max_memory)

    def begin(memory: int = 10, limit: int = 0) -> Body:
        return spill.open(memory, limit)

    return spill, begin


async def fill(body: Body, size: int, step: int = 64 * 1024) -> None:
    """Write the first bytes of CONTENT and finish."""
    for start in range(0, size, step):
        await body.write(CONTENT[start : min(start + step, size)])
    await body.finish()


async def read(body: Body) -> bytes:
    found = [part async for part in body.parts()]
    assert all(0 < len(part) <= BATCH for part in found)
    return b"".join(found)


def used(spill: Spill) -> tuple[int, int]:
    return spill.memory, spill.spilled


# Memory and file


async def test_an_empty_body(directory: Path) -> None:
    spill, begin = make(directory)
    body = begin()
    await body.write(b"")
    await body.finish()
    assert (body.size, body.whole_nowait(), await read(body)) == (0, b"", b"")
    assert used(spill) == (0, 0)
    body.close()


async def test_a_small_body_needs_neither_file_nor_thread(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio.to_thread, "run_sync", None)
    spill, begin = make(directory)
    body = begin(memory=11)
    await body.write(b"hello ")
    await body.write(b"world")
    await body.finish()
    assert used(spill) == (11, 0)
    assert body.whole_nowait() == b"hello world"
    assert body.whole_nowait() is body.whole_nowait()
    assert await read(body) == b"hello world"
    assert used(spill) == (11, 0)
    body.close()
    body.close()
    assert used(spill) == (0, 0)


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("memory", [0, 1, 10])
@pytest.mark.parametrize("over", [-1, 0, 1, 40])
async def test_what_is_over_the_memory_of_a_body_is_on_disk(
    directory: Path, memory: int, over: int, step: int
) -> None:
    size = max(0, memory + over)
    spill, begin = make(directory)
    body = begin(memory)
    await fill(body, size, step)
    assert body.size == size
    assert used(spill) == (min(size, memory), max(0, size - memory))
    assert body.whole_nowait() == (CONTENT[:size] if size <= memory else None)
    assert await read(body) == CONTENT[:size]
    assert sum(os.fstat(each).st_size for each in open_files(directory)) == spill.spilled
    body.close()
    assert used(spill) == (0, 0)


@pytest.mark.parametrize("step", [1, 10, 11])
async def test_a_body_may_be_as_large_as_its_limit_and_no_larger(
    directory: Path, step: int
) -> None:
    spill, begin = make(directory)
    for memory in (0, 10, 100):
        body = begin(memory, limit=10)
        await fill(body, 10, step)
        assert await read(body) == CONTENT[:10]
        body.close()
        body = begin(memory, limit=10)
        with pytest.raises(BodyTooLargeError, match="larger than 10 bytes"):
            await fill(body, 11, step)
        with pytest.raises(RuntimeError, match="has failed"):
            await body.write(b"x")
        with pytest.raises(RuntimeError, match="has failed"):
            await body.finish()
        body.close()
        assert used(spill) == (0, 0)


@pytest.mark.parametrize("size", [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 3 * MIB])
@pytest.mark.parametrize("step", [10_000, BATCH, 3 * MIB])
async def test_a_body_is_read_as_often_as_wanted(directory: Path, size: int, step: int) -> None:
    spill, begin = make(directory)
    for memory in (0, 300_000):
        body = begin(memory)
        await fill(body, size, step)
        assert used(spill) == (min(memory, size), max(0, size - memory))
        assert await read(body) == CONTENT[:size]
        left_early = body.parts()
        first = await anext(left_early)
        assert await read(body) == CONTENT[:size]
        rest = [part async for part in left_early]
        assert b"".join([first, *rest]) == CONTENT[:size]
        body.close()


async def test_writes_are_collected_before_a_thread_is_asked(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "write_pending", is_open=True)
    spill, begin = make(directory)
    body = begin(memory=0)
    for written in range(1, 65):
        await body.write(b"x" * 4096)
        assert gate.calls == (written == 64)
        assert used(spill) == (0 if written == 64 else written * 4096, written * 4096)
    await body.finish()
    assert gate.calls == 1
    body.close()


async def test_tiny_writes_take_no_more_memory_than_is_counted(directory: Path) -> None:
    spill, begin = make(directory)
    body = begin(memory=MIB)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for start in range(0, MIB // 4, 2):
            await body.write(CONTENT[start : start + 2])
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert spill.memory == MIB // 4
    assert taken < 1.5 * spill.memory
    await body.finish()
    assert body.whole_nowait() == CONTENT[: MIB // 4]
    body.close()


async def test_the_file_is_private_and_has_no_name(directory: Path) -> None:
    await check_privacy(directory)


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSYS])
async def test_a_file_system_without_nameless_files(
    directory: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    refuse_nameless(monkeypatch, refusal)
    await check_privacy(directory)


async def test_a_name_that_cannot_be_removed_fails_the_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    refuse_nameless(monkeypatch, errno.EOPNOTSUPP)
    spill, begin = make(tmp_path)
    body = begin()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(SpillFailedError, match="Input/output error"):
            await fill(body, 11)
    body.close()
    assert open_files(tmp_path) == []
    assert used(spill) == (0, 0)


def refuse_nameless(monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    real = os.open

    def without(path: Any, flags: int, *args: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(refusal, os.strerror(refusal))
        return real(path, flags, *args, **named)

    monkeypatch.setattr(os, "open", without)


async def check_privacy(directory: Path) -> None:
    spill, begin = make(directory)
    body = begin()
    await fill(body, 5000)
    [descriptor] = open_files(directory)
    status = os.fstat(descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.listdir(directory) == []
    assert await read(body) == CONTENT[:5000]
    body.close()
    assert used(spill) == (0, 0)


async def test_without_a_directory_the_systems_is_used(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    _, begin = make(None)
    body = begin()
    await fill(body, 11)
    assert len(open_files(directory)) == 1
    body.close()


# What all bodies share


async def test_bodies_share_the_memory(directory: Path) -> None:
    spill, begin = make(directory, max_memory=100)
    first, second = begin(memory=80), begin(memory=80)
    await first.write(CONTENT[:60])
    await second.write(CONTENT[:60])
    assert used(spill) == (100, 20)
    first.close()
    assert used(spill) == (40, 20)
    await second.write(CONTENT[60:70])  # once in the file, always in the file
    await second.finish()
    assert used(spill) == (40, 30)
    third = begin(memory=80)
    await fill(third, 60)
    assert third.whole_nowait() == CONTENT[:60]
    assert await read(second) == CONTENT[:70]
    third.close()
    second.close()
    assert used(spill) == (0, 0)


async def test_without_any_memory_each_write_goes_to_disk(directory: Path) -> None:
    spill, begin = make(directory, max_memory=0)
    body = begin(memory=100)
    for end in range(1, 6):
        await body.write(CONTENT[end - 1 : end])
        assert used(spill) == (0, end)
        assert [os.fstat(each).st_size for each in open_files(directory)] == [end]
    await body.finish()
    assert await read(body) == CONTENT[:5]
    body.close()


@pytest.mark.parametrize("over", [0, 1])
async def test_bodies_share_the_quota(directory: Path, over: int) -> None:
    spill, begin = make(directory, max_spill=100)
    first, second = begin(), begin()
    await fill(first, 10 + 60)
    if over:
        with pytest.raises(SpillFullError, match="quota of 100 bytes"):
            await fill(second, 10 + 41)
        assert used(spill) == (20, 60)
    else:
        await fill(second, 10 + 40)
        assert used(spill) == (20, 100)
    small = begin()
    await fill(small, 10)  # one that needs no disk is not concerned
    first.close()
    third = begin()
    await fill(third, 10 + 60)
    assert await read(third) == CONTENT[:70]
    for body in (second, third, small):
        body.close()
    assert used(spill) == (0, 0)


# Disks that refuse


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, SpillFullError),
        (errno.EDQUOT, SpillFullError),
        (errno.EFBIG, SpillFullError),
        (errno.EIO, SpillFailedError),
        (errno.EMFILE, SpillFailedError),
        (errno.EROFS, SpillFailedError),
    ],
)
@pytest.mark.parametrize("size", [11, 10 + BATCH])
async def test_the_error_says_where_and_why(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    size: int,
) -> None:
    def refuse(directory: str) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(bodies, "_open_unlinked", refuse)
    spill, begin = make(directory)
    body = begin()
    with pytest.raises(kind) as caught:
        await fill(body, size, size)
    assert str(caught.value) == (
        f"can't write a buffered body in {directory}: {os.strerror(number)}"
    )
    with pytest.raises(RuntimeError, match="has failed"):
        await body.write(b"x")
    with pytest.raises(RuntimeError, match="has failed"):
        body.parts()
    body.close()
    assert used(spill) == (0, 0)


async def test_a_full_device(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: str) -> int:
        return os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)

    spill, begin = make(directory)
    body, other = begin(), begin()
    with monkeypatch.context() as patch:
        patch.setattr(bodies, "_open_unlinked", full)
        with pytest.raises(SpillFullError, match="No space left on device"):
            await fill(body, 11)
    await fill(other, 11)
    assert len(open_files(Path("/dev/full"))) == 1
    body.close()
    assert open_files(Path("/dev/full")) == []
    assert await read(other) == CONTENT[:11]
    other.close()
    assert used(spill) == (0, 0)


@pytest.mark.parametrize("place", ["missing", "file"])
async def test_a_directory_that_is_none(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    spill, begin = make(tmp_path / place)
    body = begin()
    with pytest.raises(SpillFailedError) as caught:
        await fill(body, 11)
    reason = {"missing": "No such file or directory", "file": "Not a directory"}[place]
    assert str(caught.value) == f"can't write a buffered body in {tmp_path / place}: {reason}"
    body.close()
    assert used(spill) == (0, 0)


async def test_a_system_without_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/nowhere"])
    spill, begin = make(None)
    body = begin()
    with pytest.raises(SpillFailedError, match="for temporary files: No usable"):
        await fill(body, 11)
    body.close()
    assert used(spill) == (0, 0)


async def test_a_file_that_lost_its_end(directory: Path) -> None:
    spill, begin = make(directory)
    body = begin()
    await fill(body, 10 + 2 * BATCH)
    [descriptor] = open_files(directory)
    os.ftruncate(descriptor, BATCH)
    with pytest.raises(SpillFailedError, match=r"can't read .* shorter than what was written"):
        await read(body)
    body.close()
    assert used(spill) == (0, 0)


# For what needs a process of its own: fills two bodies until the disk refuses, and recovers.
REFUSED = """
import os, resource, sys, trio
from pathlib import Path
from kamal_proxy.http.bodies import Spill, SpillFailedError, SpillFullError

directory, way = sys.argv[1:]

async def main():
    spill = Spill(Path(directory), 0, 1024**3)
    await trio.to_thread.run_sync(int)
    before = len(os.listdir("/proc/self/fd"))
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    elif way == "user" and os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    body = spill.open(1000, 0)
    try:
        for _ in range(100):
            await body.write(bytes(64 * 1024))
        await body.finish()
    except (SpillFullError, SpillFailedError) as error:
        print(type(error).__name__, error)
    body.close()
    assert (spill.memory, spill.spilled) == (0, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    assert way == "user" or os.listdir(directory) == []
    if way != "user":
        body = spill.open(1000, 0)
        await body.write(bytes(60_000))  # there is room again
        await body.finish()
        assert b"".join([part async for part in body.parts()]) == bytes(60_000)
        body.close()
    print("recovered")

trio.run(main)
"""


def run_refused(directory: Path, way: str, prefix: Sequence[str] = ()) -> list[str]:
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", REFUSED, str(directory), way],
        cwd=Path(bodies.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_limit_on_the_size_of_files(directory: Path) -> None:
    assert run_refused(directory, "limit") == [
        f"SpillFullError can't write a buffered body in {directory}: File too large",
        "recovered",
    ]


def test_a_directory_of_somebody_else(directory: Path) -> None:
    directory.chmod(0o555)
    assert run_refused(directory, "user") == [
        f"SpillFailedError can't write a buffered body in {directory}: Permission denied",
        "recovered",
    ]


def test_a_full_file_system(directory: Path) -> None:
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    script = 'mount -t tmpfs -o size=128k none "$0" && exec "$@"'
    prefix = [*mount, script, str(directory)]
    try:
        subprocess.run([*prefix, "true"], capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this process may not mount a file system")
    assert run_refused(directory, "mount", prefix) == [
        f"SpillFullError can't write a buffered body in {directory}: No space left on device",
        "recovered",
    ]


# Cancellation, and closing while a thread is at work


class Gate:
    """Stops threads at the door of a method of the file, until it is opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, method: str, *, is_open: bool = False
    ) -> None:
        self.entered = trio.Event()
        self.calls = 0
        self._open = threading.Event()
        if is_open:
            self._open.set()
        real: Callable[..., Any] = getattr(bodies._SpillFile, method)

        def gated(*args: Any) -> Any:
            trio.from_thread.run_sync(self.enter)
            assert self._open.wait(PATIENCE)
            return real(*args)

        monkeypatch.setattr(bodies._SpillFile, method, gated)

    def enter(self) -> None:
        self.calls += 1
        self.entered.set()

    def open(self) -> None:
        self._open.set()


@attrs.define
class Step:
    """A step of a body's life that needs a thread, and what comes before it."""

    method: str
    size: int = 0
    finished: bool = False

    async def prepare(self, body: Body) -> None:
        if self.size:
            await body.write(CONTENT[: self.size])
        if self.finished:
            await body.finish()

    async def __call__(self, body: Body) -> None:
        if self.finished:
            assert await read(body) == CONTENT[: self.size]
        elif self.size:
            await body.finish()
        else:
            await body.write(CONTENT[: 10 + BATCH])


STEPS = {
    "write": Step("write_pending"),
    "finish": Step("write_pending", size=1000),
    "read": Step("read", size=1000, finished=True),
}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


@contextmanager
def no_threads(spill: Spill) -> Iterator[None]:
    """Take all the threads that a spill may use."""
    holders = [object() for _ in range(MAX_THREADS)]
    for holder in holders:
        spill.limiter.acquire_on_behalf_of_nowait(holder)
    yield
    for holder in holders:
        spill.limiter.release_on_behalf_of(holder)


@each_step
async def test_cancelled_while_it_waits_for_a_thread(directory: Path, step: Step) -> None:
    spill, begin = make(directory)
    body = begin()
    await step.prepare(body)
    with no_threads(spill):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, body)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    if step.finished:
        assert await read(body) == CONTENT[: step.size]
    else:
        for call in (body.write(b"x"), body.finish()):
            with pytest.raises(RuntimeError, match="has failed"):
                await call
        assert open_files(directory) == []
    body.close()
    assert used(spill) == (0, 0)


@each_step
async def test_cancelled_before_it_begins(directory: Path, step: Step) -> None:
    spill, begin = make(directory)
    body = begin()
    await step.prepare(body)
    with trio.CancelScope() as scope:
        scope.cancel()
        await step(body)
    assert scope.cancelled_caught
    body.close()
    assert used(spill) == (0, 0)


@each_step
async def test_cancelled_while_a_thread_is_at_work(
    directory: Path, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    spill, begin = make(directory)
    body = begin()
    await step.prepare(body)
    gate = Gate(monkeypatch, step.method)
    before = used(spill)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, body)
        await gate.entered.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1  # it waits for the thread
            if step is not STEPS["write"]:
                assert used(spill) == before
            gate.open()
    # The thread had begun, so what it did is done, and the body is as good as before.
    if step is STEPS["write"]:
        await body.finish()
    assert await read(body) == CONTENT[: body.size]
    assert body.size == (step.size or 10 + BATCH)
    body.close()
    assert used(spill) == (0, 0)


@each_step
async def test_closed_while_a_thread_is_at_work(
    directory: Path, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    spill, begin = make(directory)
    body = begin()
    await step.prepare(body)
    gate = Gate(monkeypatch, step.method)
    refused = False

    async def use() -> None:
        nonlocal refused
        with pytest.raises(trio.ClosedResourceError):
            await step(body)
        refused = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await gate.entered.wait()
        descriptors = open_files(directory)
        taken = used(spill)
        body.close()
        body.close()
        # The thread may still use the descriptor, and what it writes takes place.
        assert open_files(directory) == descriptors
        assert used(spill) == taken
        gate.open()
    assert refused
    assert used(spill) == (0, 0)
    assert open_files(directory) == []


async def test_closed_while_two_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill, begin = make(directory)
    body = begin()
    await fill(body, 1000)
    gate = Gate(monkeypatch, "read")

    async def use() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await read(body)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        nursery.start_soon(use)
        await gate.entered.wait()
        body.close()
        gate.open()
    assert gate.calls == 2
    assert used(spill) == (0, 0)


async def test_a_write_that_fails_after_the_body_was_closed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill, begin = make(directory / "missing")
    body = begin()
    gate = Gate(monkeypatch, "write_pending")

    async def use() -> None:
        with pytest.raises(SpillFailedError):
            await fill(body, 11)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await gate.entered.wait()
        body.close()
        gate.open()
    assert used(spill) == (0, 0)


async def test_a_second_writer_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, begin = make(directory)
    body = begin(memory=0)
    gate = Gate(monkeypatch, "write_pending")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(body.write, CONTENT[:BATCH])
        await gate.entered.wait()
        with pytest.raises(RuntimeError):
            await body.write(b"x")
        gate.open()
    await body.finish()
    assert await read(body) == CONTENT[:BATCH]
    body.close()


async def test_no_more_threads_than_allowed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill, begin = make(directory)
    gate = Gate(monkeypatch, "write_pending")
    opened = [begin() for _ in range(MAX_THREADS + 3)]
    async with trio.open_nursery() as nursery:
        for body in opened:
            nursery.start_soon(fill, body, 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert spill.limiter.borrowed_tokens == MAX_THREADS
        assert spill.limiter.statistics().tasks_waiting == 3
        gate.open()
    for body in opened:
        assert await read(body) == CONTENT[:1000]
        body.close()
    assert used(spill) == (0, 0)


# Using it wrongly, and closing


async def test_each_thing_in_its_time(directory: Path) -> None:
    _, begin = make(directory)
    body = begin()
    await body.write(CONTENT[:20])
    for early in (body.whole_nowait, body.parts):
        with pytest.raises(RuntimeError, match="not finished"):
            early()
    await body.finish()
    for late in (body.write(b"x"), body.finish()):
        with pytest.raises(RuntimeError, match="finished already"):
            await late
    begun, started = body.parts(), body.parts()
    await anext(started)
    body.close()
    for over in (body.write(b"x"), body.finish(), anext(begun), anext(started)):
        with pytest.raises(trio.ClosedResourceError):
            await over
    for gone in (body.whole_nowait, body.parts):
        with pytest.raises(trio.ClosedResourceError):
            gone()


@pytest.mark.parametrize("size", [5, 11, 1000])
async def test_a_body_that_nobody_closed_gives_all_back_and_tells(
    directory: Path, size: int
) -> None:
    spill, begin = make(directory)
    body = begin()
    await fill(body, size)
    with pytest.warns(ResourceWarning, match=rf"body never closed: <Body size={size} "):
        del body
    assert used(spill) == (0, 0)


class Closing:
    """Watches which thread closes a file, and stops all but this one until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, expected: int) -> None:
        self.threads: list[int] = []
        self.go = threading.Event()
        self.done = threading.Event()
        real = bodies._close

        def close(descriptor: int) -> None:
            self.threads.append(threading.get_ident())
            if threading.current_thread() is not threading.main_thread():
                assert self.go.wait(PATIENCE)
            real(descriptor)
            if len(self.threads) == expected:
                self.done.set()

        monkeypatch.setattr(bodies, "_close", close)


async def test_large_files_are_freed_in_one_thread(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "LARGE_FILE", 1000)
    closing = Closing(monkeypatch, expected=4)
    started = 0
    start = trio.lowlevel.start_thread_soon

    def count(*args: Any) -> None:
        nonlocal started
        started += 1
        start(*args)

    spill, begin = make(directory)
    small = begin(memory=0)
    await fill(small, 999)
    large = [begin(memory=0) for _ in range(3)]
    for body in large:
        await fill(body, 1000)
    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", count)
    for body in (small, *large):
        body.close()
    assert started == 1
    assert used(spill) == (0, 0)
    closing.go.set()
    assert closing.done.wait(PATIENCE)
    assert closing.threads[0] == threading.get_ident()
    assert threading.get_ident() not in closing.threads[1:]
    assert len(set(closing.threads[1:])) == 1


async def test_large_files_are_freed_even_without_a_thread(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(bodies, "LARGE_FILE", 1)
    closing = Closing(monkeypatch, expected=2)
    _, begin = make(directory)
    opened = [begin(memory=0), begin(memory=0)]
    for body in opened:
        await fill(body, 10)
    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
    for body in opened:
        body.close()
    assert closing.threads == [threading.get_ident()] * 2


# Any order of everything


SIZES = st.integers(0, 20) | st.integers(0, 5000) | st.integers(BATCH - 20, BATCH + 20)
LIMITS = st.just(0) | st.integers(0, 2 * BATCH)
STEP = st.tuples(
    st.sampled_from(["open", "write", "write", "write", "finish", "read", "close"]),
    st.integers(0, 3),
    SIZES,
    LIMITS,
)


@pytest.mark.fuzz
@at_least(150)
@given(st.lists(STEP, max_size=40), LIMITS, LIMITS)
def test_any_life_of_several_bodies(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int, int]],
    max_spill: int,
    max_memory: int,
) -> None:
    directory = tmp_path_factory.getbasetemp()
    spill = Spill(directory, max_spill, max_memory)
    trio.run(live, spill, steps)
    assert used(spill) == (0, 0)
    assert open_files(directory) == []


async def live(spill: Spill, steps: list[tuple[str, int, int, int]]) -> None:
    """Take the steps with up to four bodies, and compare them with what was written to them."""
    living: dict[int, Body] = {}
    written: dict[int, bytes] = {}
    limits: dict[int, int] = {}
    finished: set[int] = set()

    def close(which: int) -> None:
        living.pop(which).close()
        finished.discard(which)

    async def write(which: int, size: int) -> None:
        start = len(written[which]) % MIB
        data = CONTENT[start : start + size]
        grown = len(written[which]) + size
        before = spill.spilled
        try:
            await living[which].write(data)
        except BodyTooLargeError:
            assert 0 < limits[which] < grown
            close(which)
        except SpillFullError:
            assert 0 < spill.max_spill < before + size
            close(which)
        else:
            assert not limits[which] or grown <= limits[which] or not size
            written[which] += data
            assert living[which].size == grown

    for action, which, size, limit in steps:
        if action == "open" and which not in living:
            living[which] = spill.open(size, limit)
            written[which], limits[which] = b"", limit
        elif which not in living:
            continue
        elif action == "close":
            close(which)
        elif action == "write" and which not in finished:
            await write(which, size)
        elif action == "finish" and which not in finished:
            await living[which].finish()
            finished.add(which)
        elif action == "read" and which in finished:
            assert living[which].whole_nowait() in (None, written[which])
            assert await read(living[which]) == written[which]
        assert 0 <= spill.memory <= spill.max_memory
        assert spill.spilled >= 0
        assert not spill.max_spill or spill.spilled <= spill.max_spill

    for which in set(living) - finished:
        await living[which].finish()
    # Every byte is in one place, and none of those that were given up.
    assert spill.memory + spill.spilled == sum(len(written[which]) for which in living)
    for which in list(living):
        assert await read(living[which]) == written[which]
        close(which)
