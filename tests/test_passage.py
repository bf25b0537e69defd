"""Bytes that pass between two sockets by themselves, event by event, mostly without a scheduler.

What tunnels make of it is in ``http/test_tunnel``. ``make sanitize`` runs this as well.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from kamal_proxy._fastpath import FrameTracker
from kamal_proxy.http.passage import Passage
from kamal_proxy.sockets import Poller, SocketStream
from tests.fuzzing import at_least
from tests.pairs import running_poller
from tests.test_fastpath_memory import ROUNDS, SANITIZED, occupied
from tests.websockets import BINARY, TEXT, frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import trio

CHUNK = 65536
PER_TURN = 4 * CHUNK
ROOM = 1 << 20  # asked for; the kernel gives about 400 KiB


class Watched(SocketStream):
    """A stream that keeps what it was told."""

    def __init__(self, sock: socket.socket, poller: Poller) -> None:
        super().__init__(sock, poller)
        self.told = 0

    def ready(self, events: int) -> None:
        self.told |= events
        super().ready(events)


@attrs.frozen(eq=False)
class Line:
    """A passage between two streams, and their far ends.

    Attributes:
        far: Where bytes are sent that come out of ``source``.
        out: Where those come that the passage has sent.
    """

    poller: Poller
    passage: Passage
    source: Watched
    far: socket.socket
    sink: SocketStream
    out: socket.socket

    def received(self) -> bytes:
        """Return what has come out and is there now."""
        data = b""
        try:
            while part := self.out.recv(CHUNK):
                data += part
        except BlockingIOError:
            pass
        return data

    def go_on(self) -> None:
        """Do what the task does that has taken what was left over."""
        assert self.passage.begin()
        self.passage.carry()


def flood(sock: socket.socket) -> int:
    """Send more than passes in one turn; return how much that was."""
    for _ in range(5):
        assert sock.send(bytes(CHUNK)) == CHUNK
    return 5 * CHUNK


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


@contextmanager
def polling() -> Iterator[Poller]:
    poller = Poller()
    try:
        yield poller
    finally:
        poller.close()
    assert len(poller) == 0


@contextmanager
def passing(
    poller: Poller,
    *,
    room: int = ROOM,
    frames: FrameTracker | None = None,
    clock: Callable[[], float] | None = None,
    pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
) -> Iterator[Line]:
    """Have a passage that carries; ``room`` is how much the sink's socket holds, in bytes."""
    with ExitStack() as stack:
        near, far = pair()
        source = Watched(near, poller)
        near.setblocking(False)
        poller.hand_over(near.fileno(), source)
        begin, out = pair()
        sink = poller.open_stream(begin)
        for stream in (source, sink):
            stack.callback(stream.close)
        for sock in (far, out):
            stack.enter_context(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        begin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        passage = Passage(poller, source, sink, frames, clock)
        assert passage.begin()
        source.watch()
        assert not passage.carry()
        yield Line(poller, passage, source, far, sink, out)


@pytest.fixture
def poller() -> Iterator[Poller]:
    with polling() as poller:
        yield poller


@pytest.fixture
def line(poller: Poller) -> Iterator[Line]:
    with passing(poller) as line:
        yield line


def test_bytes_pass_when_an_event_tells(line: Line) -> None:
    for number in range(3):
        line.far.send(b"x" * number + b"!")
        line.poller.tell()
        assert line.received() == b"x" * number + b"!"
    assert (line.passage.sent, line.passage.carries, line.source.told) == (6, True, 0)


def test_what_was_there_before_has_no_event(line: Line) -> None:
    line.passage.stop()
    line.far.send(b"early")
    line.poller.tell()
    again = Passage(line.poller, line.source, line.sink, None, None)
    again.begin()
    line.poller.tell()
    assert line.received() == b""
    assert not again.carry()
    assert line.received() == b"early"


def test_what_the_sink_does_not_take_is_left_over_and_nothing_more_is_read(poller: Poller) -> None:
    with passing(poller, room=4096) as line:
        sent = flood(line.far)
        poller.tell()

        rest = line.passage.take()
        assert rest
        assert len(rest) <= CHUNK
        assert (line.passage.carries, line.passage.take()) == (False, None)
        assert line.source.told & select.EPOLLIN
        line.far.send(b"y")
        poller.tell()
        out = line.received()
        assert line.passage.sent == len(out)
        assert out + rest == bytes(len(out) + len(rest))
        left = sent - len(out) - len(rest)
        assert len(line.source.receive_nowait(ROOM) or b"") == left + 1


def test_one_that_has_much_to_carry_stops_for_the_others(poller: Poller) -> None:
    with passing(poller) as flooded, passing(poller) as other:
        sent = flood(flooded.far)
        other.far.send(b"hi")
        assert not poller.tell()  # tasks come first
        assert (flooded.passage.sent, other.received()) == (PER_TURN, b"hi")
        assert poller.has_line
        got = len(flooded.received())
        # No event tells of the rest.
        assert poller.tell()
        got += len(flooded.received())
        assert got == sent > PER_TURN
        assert not poller.has_line


def test_one_that_was_stopped_in_line_reads_no_more(poller: Poller) -> None:
    with passing(poller) as line:
        flood(line.far)
        poller.tell()
        line.passage.stop()
        assert (poller.pollables[line.source.fileno()], line.passage.begin()) == (
            line.source,
            False,
        )
        poller.tell()
        assert line.passage.sent == PER_TURN
        assert line.source.receive_nowait()


async def test_one_that_was_stopped_in_line_wakes_its_task(nursery: trio.Nursery) -> None:
    got: list[bytes] = []
    async with running_poller() as poller:
        with passing(poller) as line:
            line.passage.stop()
            # The same with a task that waits.
            passage = Passage(poller, line.source, line.sink, None, None)

            async def read() -> None:
                got.append(await passage.receive())

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            flood(line.far)
            poller.tell()
            assert (passage.sent, passage.carries) == (PER_TURN, True)
            passage.stop()
            await wait_all_tasks_blocked()
            assert got == [bytes(CHUNK)]


@pytest.mark.parametrize("data", [b"", b"last words"])
def test_the_end_comes_after_the_bytes(line: Line, data: bytes) -> None:
    """Both within one event: there is none between them."""
    line.far.send(data)
    line.far.shutdown(socket.SHUT_WR)
    line.poller.tell()
    assert line.received() == data
    assert line.passage.take() == b""
    assert line.source.hung_up


def test_an_end_that_was_told_of_before_it_began(line: Line) -> None:
    line.passage.stop()
    line.far.send(b"last words")
    line.far.shutdown(socket.SHUT_WR)
    line.poller.tell()
    again = Passage(line.poller, line.source, line.sink, None, None)
    again.begin()
    again.carry()
    assert (line.received(), again.take()) == (b"last words", b"")


def test_a_source_that_is_reset(poller: Poller) -> None:
    with passing(poller, pair=tcp_pair) as line:
        line.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.far.close()
        poller.tell()
        with pytest.raises(ConnectionResetError):
            line.passage.take()
        assert line.source.connect_error_nowait()


def test_a_broken_sink_leaves_all_bytes_over(line: Line) -> None:
    line.out.close()
    line.far.send(b"for nobody")
    line.poller.tell()
    assert (line.passage.take(), line.passage.sent) == (b"for nobody", 0)


def test_room_is_told_to_whom_waits_for_it(line: Line) -> None:
    """The source is the sink of the other direction."""
    line.source.watch(writes=True)
    line.poller.tell()
    assert line.source.told == select.EPOLLOUT
    line.far.send(b"x")
    line.poller.tell()
    assert line.source.told == select.EPOLLOUT  # and no reader is woken
    assert line.received() == b"x"


def test_both_directions_between_two_streams(line: Line) -> None:
    back = Passage(line.poller, line.sink, line.source, None, None)
    back.begin()
    line.sink.watch()
    line.far.send(b"ping")
    line.out.send(b"pong")
    line.poller.tell()
    assert (line.received(), line.far.recv(10)) == (b"ping", b"pong")


def use_again(fd: int, poller: Poller, stack: ExitStack) -> tuple[SocketStream, socket.socket]:
    """Open a stream that has a descriptor which was closed before, and return it with its peer."""
    near, far = socket.socketpair()
    pair = [near, far]
    for at, sock in enumerate(pair):
        if sock.fileno() != fd:
            continue
        far = stack.enter_context(pair[1 - at])
        far.setblocking(False)
        stream = poller.open_stream(sock)
        stack.callback(stream.close)
        return stream, far
    raise AssertionError(f"{fd} is not the lowest descriptor that is free")


def test_a_closed_sink_whose_descriptor_is_another_connection_now(line: Line) -> None:
    with ExitStack() as stack:
        fd = line.sink.fileno()
        line.sink.close()
        _, stranger = use_again(fd, line.poller, stack)
        line.far.send(b"secret")
        line.poller.tell()
        assert (line.passage.carries, line.passage.sent) == (False, 0)
        assert line.source.told & select.EPOLLIN  # who waits meets it
        with pytest.raises(BlockingIOError):
            stranger.recv(10)


def test_a_closed_source_whose_descriptor_is_another_connection_now(line: Line) -> None:
    """Even while the passage is in line, and is told without an event."""
    with ExitStack() as stack:
        flood(line.far)
        line.poller.tell()
        fd = line.source.fileno()
        line.source.close()
        stream, stranger = use_again(fd, line.poller, stack)
        line.received()
        stranger.send(b"secret")
        line.poller.tell()
        assert line.received() == b""
        assert stream.receive_nowait() == b"secret"
        assert line.poller.pollables[fd] is stream
        line.passage.stop()
        assert line.poller.pollables[fd] is stream


class Broken(Exception):
    """What a clock fails with."""


def test_what_fails_inside_costs_one_connection(poller: Poller) -> None:
    def fail() -> float:
        raise Broken

    with passing(poller, clock=fail) as failing, passing(poller) as other:
        failing.far.send(b"x")
        other.far.send(b"y")
        poller.tell()
        assert other.received() == b"y"
        with pytest.raises(Broken):
            failing.passage.take()
        assert failing.source.told & select.EPOLLIN


def test_the_clock_says_when(poller: Poller) -> None:
    with passing(poller, clock=lambda: 7.5) as line:
        assert line.passage.last == 0
        line.far.send(b"x")
        poller.tell()
        assert line.passage.last == 7.5


def test_ends_that_were_closed(line: Line) -> None:
    line.sink.close()
    line.source.close()
    with pytest.raises(Exception, match="this stream was closed"):
        Passage(line.poller, line.source, line.sink, None, None)


STREAMS = st.lists(
    st.builds(
        frame,
        st.sampled_from([TEXT, BINARY]),
        st.sampled_from([0, 1, 125, 126, 9000, 70_000]).map(bytes),
        masked=st.booleans(),
    ),
    max_size=6,
).map(b"".join)


@pytest.mark.fuzz
@at_least(60)
@given(STREAMS, st.lists(st.integers(1, 90_000), max_size=8), st.booleans())
def test_the_tracker_has_seen_what_was_sent(data: bytes, sizes: list[int], is_slow: bool) -> None:
    """Whatever is left over in between, the bytes are the same and in order."""
    frames, twin = FrameTracker(), FrameTracker()
    with (
        polling() as poller,
        passing(poller, room=4096 if is_slow else ROOM, frames=frames) as line,
    ):
        at, got, number = 0, b"", 0
        while len(got) < len(data):
            part = data[at : at + (sizes[number] if number < len(sizes) else CHUNK)]
            number += 1
            if part:
                at += send_some(line.far, part)
            poller.tell()
            out = line.received()
            got += out
            twin.scan(out)
            assert (frames.frames, frames.at_boundary) == (twin.frames, twin.at_boundary)
            rest = line.passage.take()
            if rest is not None:
                assert rest
                got += rest
                for tracker in (frames, twin):
                    tracker.scan(rest)
                line.go_on()
        assert got == data
        assert frames.closing is False


def send_some(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


def exercise(rounds: int) -> None:
    """Take every way out, with passages that are stopped and such that are not."""
    with polling() as poller:
        for number in range(rounds):
            with passing(poller, room=4096, frames=FrameTracker(), clock=lambda: 1.0) as line:
                line.far.send(b"x" * 10_000)
                poller.tell()
                if number % 2:
                    line.passage.take()
                if number % 3:
                    line.passage.stop()
                if number % 5 == 0:
                    line.far.close()
                    poller.tell()


@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps what was freed")
def test_nothing_is_kept() -> None:
    exercise(200)
    descriptors = len(os.listdir("/proc/self/fd"))
    blocks, memory = occupied()
    exercise(rounds := ROUNDS // 50)
    blocks_after, memory_after = occupied()
    assert blocks_after - blocks < rounds // 10
    assert memory_after - memory < 1 << 20
    assert len(os.listdir("/proc/self/fd")) == descriptors
