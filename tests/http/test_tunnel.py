"""A tunnel over socket pairs: bytes, ends, and the closing of WebSockets, with a mock clock.

Everything is tested twice: with bytes that pass by themselves, and through Python.
"""

from __future__ import annotations

import math
import random
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Event, Message, Ping, TextMessage
from wsproto.extensions import PerMessageDeflate

from kamal_proxy.deployment import Drain
from kamal_proxy.http.reasons import Reason
from kamal_proxy.http.tunnel import CLOSE_TIMEOUT, Tunnel
from kamal_proxy.sockets import Poller, SocketStream
from tests.deploying import run_with_every_cancellation
from tests.fuzzing import at_least
from tests.http.streams import read_all
from tests.pairs import Steps, running_poller
from tests.websockets import (
    BINARY,
    CLOSE,
    CONTINUATION,
    GOING_AWAY,
    PING,
    TEXT,
    Frame,
    frame,
    read_frames,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

WINDOW = 30.0
ANSWER = frame(CLOSE, b"\x03\xe9", masked=True)
MEGABYTE = 1024 * 1024
TIME_LIMIT = 1e6  # seconds of the mock clock: what waits for ever has failed


class OtherStream(SocketStream):
    """Stands for all ends that are more than a socket: their bytes pass through Python."""

    __slots__ = ()


STREAM: type[SocketStream] = SocketStream


@pytest.fixture(params=[SocketStream, OtherStream], scope="module", autouse=True)
def _both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    with patch.object(sys.modules[__name__], "STREAM", request.param):
        yield


def open_ends(
    poller: Poller,
) -> tuple[SocketStream, socket.socket, SocketStream, socket.socket]:
    """Return the streams of a client and a target, each followed by its far end."""
    ends: list[tuple[SocketStream, socket.socket]] = []
    for _ in range(2):
        near, far = socket.socketpair()
        stream = poller.open_stream(near)
        if STREAM is OtherStream:
            stream = OtherStream(*stream.release())
            stream.tell(stream)
        ends.append((stream, far))
    return *ends[0], *ends[1]


@attrs.define(eq=False)
class Running:
    """A tunnel that runs, and the far ends of its two connections.

    Attributes:
        tunnel: The tunnel.
        client: The client's end.
        target: The target's end.
        ended: Set when it has ended and both streams are closed.
        ended_at: When that was.
    """

    tunnel: Tunnel
    client: trio.SocketStream
    target: trio.SocketStream
    ended: trio.Event = attrs.field(factory=trio.Event)
    ended_at: float = math.nan

    def drain(self, window: float = WINDOW) -> Drain:
        drain = Drain(trio.current_time() + window)
        self.tunnel.begin_drain(drain)
        return drain

    def drain_at_once(self) -> None:
        """Begin a drain whose random moment is now."""
        with patch("random.uniform", return_value=0.0):
            self.drain()


@asynccontextmanager
async def open_tunnel(
    *,
    websocket: bool = True,
    from_client: bytes = b"",
    from_target: bytes = b"",
    drain: Drain | None = None,
    stall_timeout: float = math.inf,
    idle_timeout: float = 0.0,
) -> AsyncIterator[Running]:
    """Run a tunnel; its owner closes the streams after it, as an exchange does."""
    async with running_poller() as poller, trio.open_nursery() as nursery:
        client, client_end, target, target_end = open_ends(poller)
        streams = client, target
        tunnel = Tunnel(
            *streams, websocket=websocket, stall_timeout=stall_timeout, idle_timeout=idle_timeout
        )
        running = Running(
            tunnel,
            trio.SocketStream(trio.socket.from_stdlib_socket(client_end)),
            trio.SocketStream(trio.socket.from_stdlib_socket(target_end)),
        )

        async def run() -> None:
            try:
                await tunnel.run(from_client, from_target, drain)
            finally:
                for stream in streams:
                    stream.close()
                running.ended_at = trio.current_time()
                running.ended.set()

        nursery.start_soon(run)
        async with running.client, running.target:
            await wait_all_tasks_blocked()
            with trio.fail_after(TIME_LIMIT):
                yield running
        nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        assert more, f"ended after {data!r}"
        data += more
    return data


async def receive_close(stream: trio.SocketStream) -> float:
    """Receive a Close frame 1001 and nothing else; return when it came."""
    assert await receive(stream, len(GOING_AWAY)) == GOING_AWAY
    return trio.current_time()


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("websocket", [True, False])
async def test_bytes_pass_both_ways_and_the_early_ones_first(
    autojump_clock: MockClock, websocket: bool
) -> None:
    async with open_tunnel(
        websocket=websocket, from_client=b"\x81\x81early", from_target=b"\x82\x04soon"
    ) as running:
        await running.client.send_all(b" and late")
        await running.target.send_all(b" and then")
        assert await receive(running.target, 16) == b"\x81\x81early and late"
        assert await receive(running.client, 15) == b"\x82\x04soon and then"

        await running.client.send_eof()
        assert await read_all(running.target) == b""
        assert not running.ended.is_set()
        await running.target.send_eof()
        assert await read_all(running.client) == b""
        await running.ended.wait()

        assert (running.tunnel.sent, running.tunnel.reason) == (15, None)
        assert running.tunnel.clean


PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


@pytest.mark.fuzz
@at_least(60)
@given(PIECES, PIECES, st.booleans())
def test_any_bytes_pass_as_they_are(
    from_client: list[bytes], from_target: list[bytes], websocket: bool
) -> None:
    """Nothing that peers send is the proxy's business, be it frames or not."""

    async def send(stream: trio.SocketStream, pieces: list[bytes]) -> None:
        for piece in pieces:
            await stream.send_all(piece)

    async def main() -> None:
        async with open_tunnel(websocket=websocket) as running:
            said, answered = b"".join(from_client), b"".join(from_target)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, running.client, from_client)
                nursery.start_soon(send, running.target, from_target)
                assert await receive(running.target, len(said)) == said
                assert await receive(running.client, len(answered)) == answered
            await running.client.send_eof()
            assert await read_all(running.target) == b""
            await running.target.send_eof()
            assert await read_all(running.client) == b""
            await running.ended.wait()
            assert running.tunnel.sent == len(answered)

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("websocket", [True, False])
async def test_much_passes_both_ways_at_once(autojump_clock: MockClock, websocket: bool) -> None:
    """In pieces of any size, to readers that are slow at times: in order, and nothing is lost."""
    chance = random.Random(5)
    data = [frame(BINARY, chance.randbytes(3 * MEGABYTE)) for _ in range(2)]
    got = [b"", b""]

    async def send(stream: trio.SocketStream, data: bytes) -> None:
        at = 0
        while at < len(data):
            size = chance.choice([1, 64, 5000, 200_000])
            await stream.send_all(data[at : at + size])
            at += size
        await stream.send_eof()

    async def read(stream: trio.SocketStream, number: int) -> None:
        while part := await stream.receive_some(chance.choice([100, 5000, 200_000])):
            got[number] += part
            if chance.random() < 0.2:
                await trio.sleep(0.001)

    async with open_tunnel(websocket=websocket) as running:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, running.client, data[0])
            nursery.start_soon(send, running.target, data[1])
            nursery.start_soon(read, running.target, 0)
            nursery.start_soon(read, running.client, 1)
        await running.ended.wait()
        assert got == data
        assert running.tunnel.sent == len(data[1])


class Wakings(trio.abc.Instrument):
    """Counts the steps of a tunnel's tasks."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += "Tunnel._run" in task.name


async def test_between_plain_sockets_messages_wake_no_task(autojump_clock: MockClock) -> None:
    async with open_tunnel() as running:
        wakings = Wakings()
        trio.lowlevel.add_instrument(wakings)
        for _ in range(10):
            await running.client.send_all(frame(TEXT, b"ping", masked=True))
            await receive(running.target, 10)
            await running.target.send_all(frame(TEXT, b"pong"))
            await receive(running.client, 6)
        trio.lowlevel.remove_instrument(wakings)
        assert (wakings.count == 0) is (STREAM is SocketStream)
        assert running.tunnel.sent == 60


async def test_a_stream_that_somebody_else_closes(autojump_clock: MockClock) -> None:
    async with running_poller() as poller:
        for number in range(2):
            client, client_end, target, target_end = open_ends(poller)
            tunnel = Tunnel(client, target, websocket=True, stall_timeout=5, idle_timeout=0)
            with client_end, target_end:
                with pytest.RaisesGroup(trio.ClosedResourceError, flatten_subgroups=True):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(tunnel.run, b"", b"", None)
                        await wait_all_tasks_blocked()
                        (client, target)[number].close()
                client.close()
                target.close()


@pytest.mark.parametrize("websocket", [True, False])
@pytest.mark.parametrize("slow", ["client", "target"])
async def test_a_side_that_does_not_read_stops_the_other_one(
    autojump_clock: MockClock, websocket: bool, slow: str
) -> None:
    async with open_tunnel(websocket=websocket) as running, trio.open_nursery() as nursery:
        reader, writer = running.client, running.target
        if slow == "target":
            reader, writer = writer, reader
        data = random.Random(1).randbytes(4 * MEGABYTE)
        sent = 0

        async def send() -> None:
            nonlocal sent
            for at in range(0, len(data), 4096):
                await writer.send_all(data[at : at + 4096])
                sent += 4096
            await writer.send_eof()

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        assert sent < MEGABYTE  # what the kernel's buffers hold, and one read of the tunnel's
        await reader.send_all(b"the other way is open")
        assert await receive(writer, 21) == b"the other way is open"
        await wait_all_tasks_blocked()
        assert sent < MEGABYTE

        assert await read_all(reader) == data


@pytest.mark.parametrize(
    ("slow", "reason"),
    [("client", Reason.CLIENT_STALLED), ("target", Reason.TARGET_TIMEOUT)],
)
async def test_a_side_that_takes_nothing_for_too_long_ends_it(
    autojump_clock: MockClock, slow: str, reason: Reason
) -> None:
    async with open_tunnel(websocket=False, stall_timeout=20) as running:
        writer = running.target if slow == "client" else running.client
        await trio.sleep(7)
        with pytest.raises(trio.BrokenResourceError):
            await writer.send_all(bytes(4 * MEGABYTE))
        await running.ended.wait()

        assert (running.tunnel.reason, running.ended_at) == (reason, 27)
        assert not running.tunnel.clean


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["client", "target"])
async def test_half_a_connection_of_another_protocol_goes_on(
    autojump_clock: MockClock, first: str
) -> None:
    async with open_tunnel(websocket=False) as running:
        early, late = running.client, running.target
        if first == "target":
            early, late = late, early
        await early.send_all(b"all I have")
        await early.send_eof()
        assert await read_all(late) == b"all I have"
        await trio.sleep(80_000)
        await late.send_all(b"much later")
        await late.send_eof()
        assert await read_all(early) == b"much later"
        await running.ended.wait()


@pytest.mark.parametrize("first", ["client", "target"])
async def test_half_a_websocket_is_given_a_moment(autojump_clock: MockClock, first: str) -> None:
    async with open_tunnel() as running:
        early, late = running.client, running.target
        if first == "target":
            early, late = late, early
        await early.send_eof()
        assert await read_all(late) == b""
        await late.send_all(b"\x81\x00")
        assert await read_all(early) == b"\x81\x00"
        await running.ended.wait()

        assert (running.ended_at, running.tunnel.reason) == (CLOSE_TIMEOUT, None)


@pytest.mark.parametrize("websocket", [True, False])
@pytest.mark.parametrize("first", ["client", "target"])
async def test_a_side_that_breaks_its_connection_ends_the_other(
    autojump_clock: MockClock, websocket: bool, first: str
) -> None:
    async with open_tunnel(websocket=websocket) as running:
        early, late = running.client, running.target
        if first == "target":
            early, late = late, early
        await late.send_all(b"unread")
        await wait_all_tasks_blocked()
        await early.aclose()  # which resets a connection that has unread bytes
        assert await read_all(late) == b""
        await running.ended.wait()

        assert (running.ended_at, running.tunnel.reason) == (0, None)


@pytest.mark.parametrize("websocket", [True, False])
async def test_both_sides_break_at_once(autojump_clock: MockClock, websocket: bool) -> None:
    async with open_tunnel(websocket=websocket, from_client=b"a", from_target=b"b") as running:
        await wait_all_tasks_blocked()
        await running.client.send_all(b"on its way")
        await running.client.aclose()  # with something unread
        await running.target.aclose()
        await running.ended.wait()

        assert (running.ended_at, running.tunnel.reason) == (0, None)


@pytest.mark.parametrize("websocket", [True, False])
async def test_the_last_words_of_a_target_that_broke_off_reach_a_slow_client(
    autojump_clock: MockClock, websocket: bool
) -> None:
    words = b"\x82\x7f" + (300_000).to_bytes(8, "big") + random.Random(2).randbytes(300_000)
    async with open_tunnel(websocket=websocket) as running, trio.open_nursery() as nursery:
        nursery.start_soon(running.target.send_all, words)
        await wait_all_tasks_blocked()
        await running.client.send_all(b"unread")
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks
        await running.target.aclose()
        await running.client.send_all(b"into the void")
        await wait_all_tasks_blocked()

        assert await read_all(running.client) == words
        await running.ended.wait()


# --- idle ----------------------------------------------------------------------------------------


async def test_no_idle_limit_by_default(autojump_clock: MockClock) -> None:
    async with open_tunnel() as running:
        await trio.sleep(80_000)
        await running.client.send_all(b"\x81\x80" + bytes(4))
        assert await receive(running.target, 6) == b"\x81\x80" + bytes(4)


async def test_an_idle_websocket_is_closed(autojump_clock: MockClock) -> None:
    """A byte in either direction counts."""
    async with open_tunnel(idle_timeout=10) as running:
        await trio.sleep(9)
        await running.client.send_all(frame(PING, masked=True))
        await trio.sleep(9)
        await running.target.send_all(frame(PING))
        assert await receive(running.client, 2) == frame(PING)
        assert await receive_close(running.client) == 28
        await running.client.send_all(ANSWER)
        await receive(running.target, len(frame(PING, masked=True) + ANSWER))
        await running.target.aclose()
        assert await read_all(running.client) == b""
        await running.client.aclose()
        await running.ended.wait()

        assert (running.tunnel.reason, running.tunnel.clean) == (Reason.WEBSOCKET_IDLE, True)
        assert running.ended_at == 28


async def test_an_idle_websocket_stuck_in_a_frame_is_cut(autojump_clock: MockClock) -> None:
    async with open_tunnel(idle_timeout=10, from_target=b"\x81\x05abc") as running:
        assert await read_all(running.client) == b"\x81\x05abc"
        assert [f.opcode for f in read_frames(await read_all(running.target))] == [CLOSE]
        assert running.tunnel.reason is Reason.WEBSOCKET_IDLE
        assert running.ended_at == 10 + 2 * CLOSE_TIMEOUT - 1


async def test_the_idle_limit_is_for_websockets(autojump_clock: MockClock) -> None:
    async with open_tunnel(websocket=False, idle_timeout=10) as running:
        await trio.sleep(1000)
        await running.target.send_all(b"x")
        assert await receive(running.client, 1) == b"x"


# --- drains --------------------------------------------------------------------------------------


async def test_the_moments_are_spread_over_the_window(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", random.Random(3).uniform)
    moments = []

    async def one(begin: trio.Event) -> None:
        async with open_tunnel() as running:
            await begin.wait()
            running.drain()
            moments.append(await receive_close(running.client))

    async with trio.open_nursery() as nursery:
        begin = trio.Event()
        for _ in range(40):
            nursery.start_soon(one, begin)
        await wait_all_tasks_blocked()
        await trio.sleep(100)
        begin.set()

    assert len(set(moments)) == 40
    latest = WINDOW - CLOSE_TIMEOUT - 1
    fifths = [int((moment - 100) / latest * 5) for moment in moments]
    assert set(fifths) == {0, 1, 2, 3, 4}


async def test_a_client_that_answers_closes_the_target_too(autojump_clock: MockClock) -> None:
    async with open_tunnel() as running:
        running.drain()
        moment = await receive_close(running.client)
        await running.target.send_all(frame(TEXT, b"nothing follows a Close frame"))
        await running.client.send_all(frame(TEXT, b"last words", masked=True) + ANSWER)
        last = await receive(running.target, len(frame(TEXT, b"last words", masked=True) + ANSWER))
        assert [(f.opcode, f.masked) for f in read_frames(last)] == [(TEXT, True), (CLOSE, True)]
        await running.target.send_all(frame(CLOSE, b"\x03\xe9"))
        await running.target.aclose()
        assert await read_all(running.client) == b""
        await running.client.aclose()
        await running.ended.wait()

        assert (running.tunnel.reason, running.tunnel.clean) == (Reason.DRAINED, True)
        assert running.ended_at == moment
        assert running.tunnel.sent == len(GOING_AWAY)


async def test_a_client_that_answers_but_never_closes(autojump_clock: MockClock) -> None:
    """The handshake is over when the target has closed: nobody waits for the client's end."""
    async with open_tunnel() as running:
        running.drain()
        moment = await receive_close(running.client)
        await running.client.send_all(ANSWER)
        await receive(running.target, len(ANSWER))
        await running.target.aclose()
        assert await read_all(running.client) == b""
        await running.ended.wait()

        assert (running.ended_at, running.tunnel.clean) == (moment, True)


async def test_a_client_that_never_answers(autojump_clock: MockClock) -> None:
    """Both are told, the target by a masked frame of the proxy's own, and cut after a while."""
    async with open_tunnel() as running:
        await running.client.send_all(frame(TEXT, b"hi", masked=True))
        running.drain()
        moment = await receive_close(running.client)
        received = read_frames(await read_all(running.target))
        assert await read_all(running.client) == b""

        assert received[0].payload == b"hi"
        assert received[1:] == [Frame(CLOSE, b"\x03\xe9", fin=True, masked=True)]
        assert running.ended_at == moment + CLOSE_TIMEOUT
        assert (running.tunnel.reason, running.tunnel.clean) == (Reason.DRAINED, False)


async def test_a_client_silent_within_a_frame_leaves_the_target_no_close(
    autojump_clock: MockClock,
) -> None:
    """A frame within a frame would be part of it."""
    begun = frame(TEXT, b"never complete", masked=True)[:-1]
    async with open_tunnel(from_client=begun) as running:
        running.drain()
        await receive_close(running.client)
        assert await read_all(running.target) == begun


async def test_a_target_that_does_not_close_after_the_answer_is_cut(
    autojump_clock: MockClock,
) -> None:
    async with open_tunnel() as running:
        running.drain()
        moment = await receive_close(running.client)
        await trio.sleep(2)
        await running.client.send_all(ANSWER)
        assert await read_all(running.target) == ANSWER

        assert running.ended_at == moment + CLOSE_TIMEOUT
        assert not running.tunnel.clean


async def test_a_huge_frame_is_completed_first(autojump_clock: MockClock) -> None:
    """It may take longer than the closing handshake: there is time until the deadline."""
    data = frame(BINARY, bytes(300_000))
    async with open_tunnel(from_target=data[:1000]) as running:
        running.drain()
        await trio.sleep(WINDOW - 3)
        assert await receive(running.client, 1000) == data[:1000]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.target.send_all, data[1000:] + frame(TEXT, b"dropped"))
            rest = await receive(running.client, len(data) - 1000 + len(GOING_AWAY))
        await running.client.send_all(ANSWER)
        assert await receive(running.target, len(ANSWER)) == ANSWER

        assert rest == data[1000:] + GOING_AWAY
        assert trio.current_time() == WINDOW - 3


async def test_a_frame_that_never_ends(autojump_clock: MockClock) -> None:
    """The client can't be told, but the target is, before the deadline."""
    async with open_tunnel(from_target=b"\x82\x7f\x7f" + b"\xff" * 7) as running:
        running.drain()
        assert await read_all(running.client) == b"\x82\x7f\x7f" + b"\xff" * 7
        (told,) = read_frames(await read_all(running.target))

        assert (told.opcode, told.payload, told.masked) == (CLOSE, b"\x03\xe9", True)
        assert running.ended_at == WINDOW - 1
        assert running.tunnel.reason is Reason.DRAINED


@pytest.mark.parametrize("window", [0.0, 0.5, 4.0, 6.0])
async def test_in_a_short_window_both_are_told_as_well(
    autojump_clock: MockClock, window: float
) -> None:
    async with open_tunnel() as running:
        running.drain(window)
        assert await read_all(running.client) == GOING_AWAY
        (told,) = read_frames(await read_all(running.target))

        assert (told.opcode, told.payload, told.masked) == (CLOSE, b"\x03\xe9", True)
        assert running.ended_at <= window


async def test_close_frames_go_between_fragments(autojump_clock: MockClock) -> None:
    """And between the control frames that interrupt a message; never within one."""
    begun = frame(TEXT, b"a", fin=False) + frame(PING, b"p") + frame(CONTINUATION, b"b", fin=False)
    async with open_tunnel(from_target=begun) as running:
        running.drain()
        got = await receive(running.client, len(begun) + len(GOING_AWAY))

        assert got == begun + GOING_AWAY
        client = Connection(ConnectionType.CLIENT)
        client.receive_data(got)
        assert isinstance(list(client.events())[-1], CloseConnection)


async def test_a_compressed_stream_is_no_obstacle(autojump_clock: MockClock) -> None:
    def deflating(kind: ConnectionType) -> Connection:
        extension = PerMessageDeflate()
        extension._enabled = True
        return Connection(kind, [extension])

    target, client = deflating(ConnectionType.SERVER), deflating(ConnectionType.CLIENT)
    messages = [f"message {number} " * 50 for number in range(20)]
    sent = b"".join(target.send(TextMessage(message)) for message in messages)
    assert len(sent) < len("".join(messages)) / 4
    events: list[Event] = []
    async with open_tunnel() as running:
        running.drain()
        await running.target.send_all(sent[:-3])  # the last message is not complete
        await trio.sleep(WINDOW / 2)
        await running.target.send_all(sent[-3:])
        client.receive_data(await receive(running.client, len(sent)))
        client.receive_data(await receive(running.client, len(GOING_AWAY)))
        events += client.events()

    assert [e.data for e in events if isinstance(e, Message)] == messages
    assert isinstance(events[-1], CloseConnection)
    assert events[-1].code == 1001


OWN = frame(CLOSE, b"\x03\xe8bye")


@pytest.mark.parametrize("cut", range(len(OWN) + 1))
async def test_a_target_that_closes_by_itself_at_that_moment(
    autojump_clock: MockClock, cut: int
) -> None:
    """The client gets one Close frame, whichever was first."""
    async with open_tunnel(from_target=OWN[:cut]) as running:
        running.drain_at_once()
        await wait_all_tasks_blocked()
        await running.target.send_all(OWN[cut:] + frame(TEXT, b"nothing follows"))
        told = await receive(running.client, len(OWN if cut else GOING_AWAY))

        assert told == (OWN if cut else GOING_AWAY)


async def test_a_close_in_the_same_packet_as_the_end_of_a_frame(
    autojump_clock: MockClock,
) -> None:
    begun = frame(TEXT, b"text")
    async with open_tunnel(from_target=begun[:3]) as running:
        running.drain()
        await trio.sleep(WINDOW - 2)
        await running.target.send_all(begun[3:] + OWN)
        assert await receive(running.client, len(begun) + 4) == begun + GOING_AWAY


@pytest.mark.fuzz
@at_least(80)
@given(
    st.lists(
        st.builds(
            frame,
            st.sampled_from([TEXT, BINARY, CONTINUATION, PING]),
            st.integers(0, 300).map(bytes),
            fin=st.booleans(),
        ),
        max_size=6,
    ),
    st.lists(st.integers(1, 200), max_size=12),
    st.integers(0, 12),
)
def test_wherever_the_moment_falls_the_close_frame_is_at_a_boundary(
    frames: list[bytes], sizes: list[int], moment: int
) -> None:
    stream, at = b"".join(frames), 0
    pieces = []
    for size in sizes:
        pieces.append(stream[at : at + size])
        at += size
    pieces.append(stream[at:])

    async def main() -> None:
        async with open_tunnel() as running:
            got = b""
            for number, piece in enumerate(pieces):
                if number == moment:
                    running.drain_at_once()
                    await wait_all_tasks_blocked()
                await running.target.send_all(piece)
                await wait_all_tasks_blocked()
            if moment >= len(pieces):
                running.drain_at_once()
            got += await read_all(running.client)
            passed = b"".join(frames[: len(read_frames(got)) - 1])
            assert got == passed + GOING_AWAY
            assert len(passed) >= len(b"".join(pieces[:moment]))

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("reads", [3, 40, 150])
async def test_a_close_frame_within_a_flood_is_at_a_boundary(
    autojump_clock: MockClock, reads: int
) -> None:
    """Whether the client reads as fast as the target sends, or the tunnel has to wait for it."""
    chance = random.Random(reads)
    sent: list[bytes] = []
    got = b""

    async def send(running: Running) -> None:
        while running.tunnel.reason is None:
            sent.append(frame(BINARY, chance.randbytes(chance.choice([5, 3000, 150_000]))))
            await running.target.send_all(sent[-1])

    async with open_tunnel() as running, trio.open_nursery() as nursery:
        nursery.start_soon(send, running)
        for _ in range(reads):
            got += await running.client.receive_some(chance.choice([1000, 100_000]))
        running.drain_at_once()
        got += await read_all(running.client)

    frames = read_frames(got)
    assert got == b"".join(sent[: len(frames) - 1]) + GOING_AWAY
    assert len(frames) > 2


async def test_a_client_that_takes_nothing_is_cut_in_time(autojump_clock: MockClock) -> None:
    async with open_tunnel(stall_timeout=60) as running, trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await running.target.send_all(frame(BINARY, bytes(4 * MEGABYTE)))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        running.drain(20)
        await running.ended.wait()

        assert running.ended_at == 19
        assert running.tunnel.reason is Reason.DRAINED


async def test_a_drain_that_is_called_off_leaves_it_alone(autojump_clock: MockClock) -> None:
    async with open_tunnel() as running:
        drain = running.drain(10)
        drain.called_off = True
        await trio.sleep(1000)
        running.tunnel.begin_drain(drain)  # its deadline has passed, but it is nothing any more
        await trio.sleep(1000)
        await running.target.send_all(frame(TEXT, b"still here"))
        assert await receive(running.client, 12) == frame(TEXT, b"still here")
        assert running.tunnel.reason is None

        running.drain()  # another one is meant
        assert 2000 <= await receive_close(running.client) <= 2000 + WINDOW


async def test_a_drain_without_deadline_closes_nothing(autojump_clock: MockClock) -> None:
    async with open_tunnel(drain=Drain(math.inf)) as running:
        await trio.sleep(80_000)
        await running.target.send_all(frame(TEXT, b"still here"))
        assert await receive(running.client, 12) == frame(TEXT, b"still here")


async def test_a_drain_that_began_before_it(autojump_clock: MockClock) -> None:
    async with open_tunnel(drain=Drain(10.0)) as running:
        assert await receive_close(running.client) <= 5


async def test_a_drain_whose_deadline_passed_before_it(autojump_clock: MockClock) -> None:
    await trio.sleep(50)
    async with open_tunnel(drain=Drain(10.0)) as running:
        assert await receive_close(running.client) == 50


async def test_two_drains_close_once(autojump_clock: MockClock) -> None:
    async with open_tunnel(idle_timeout=1) as running:
        running.drain()
        running.drain(20)
        assert await read_all(running.client) == GOING_AWAY
        assert len(read_frames(await read_all(running.target))) == 1


async def test_another_protocol_is_left_to_the_deadline(autojump_clock: MockClock) -> None:
    async with open_tunnel(websocket=False) as running:
        running.drain(10)
        await trio.sleep(1000)
        await running.target.send_all(b"x")
        assert await receive(running.client, 1) == b"x"


# --- at every moment -----------------------------------------------------------------------------


async def speak(running: Running) -> None:
    """Let both sides say something and close, the target with a reset."""
    await running.client.send_all(frame(TEXT, b"question", masked=True))
    await running.target.send_all(frame(TEXT, b"answer"))
    await receive(running.client, 8)
    await running.client.send_all(b"unread")
    await running.target.aclose()
    await running.ended.wait()


def run_with_steps(
    act: Callable[[Running], object], main: Callable[[Running], Awaitable[None]], at: int
) -> bool:
    """Call ``act`` after one step of the scheduler; return whether there was such a step."""
    reached = False

    async def whole() -> None:
        nonlocal reached
        async with open_tunnel() as running:
            steps = Steps(at, lambda: act(running))
            trio.lowlevel.add_instrument(steps)
            await main(running)
            trio.lowlevel.remove_instrument(steps)
            reached = steps.count >= at

    trio.run(whole, clock=MockClock(autojump_threshold=0))
    return reached


def test_a_drain_may_begin_at_any_step() -> None:
    """Also while the tunnel is about to end."""

    def act(running: Running) -> None:
        running.tunnel.begin_drain(Drain(trio.current_time() + WINDOW))

    assert run_with_every_cancellation(lambda at: run_with_steps(act, speak, at)) > 10


def test_cancellation_at_every_step() -> None:
    """Whatever it was doing, its owner gets the streams back and nothing goes on."""

    def attempt(at: int) -> bool:
        reached = False

        async def main() -> None:
            nonlocal reached
            async with running_poller() as poller:
                client, client_end, target, target_end = open_ends(poller)
                streams = client, target
                tunnel = Tunnel(*streams, websocket=True, stall_timeout=5, idle_timeout=20)
                with client_end, target_end, trio.CancelScope() as scope:
                    steps = Steps(at, scope.cancel)
                    trio.lowlevel.add_instrument(steps)
                    target_end.send(frame(TEXT, b"answer") + b"\x82\x7f")
                    client_end.send(frame(PING, masked=True))
                    await tunnel.run(b"a", b"b", Drain(trio.current_time() + WINDOW))
                trio.lowlevel.remove_instrument(steps)
                reached = steps.count >= at
                for stream in streams:
                    stream.close()
            if reached:
                assert not tunnel.clean

        trio.run(main, clock=MockClock(autojump_threshold=0))
        return reached

    assert run_with_every_cancellation(attempt) > 10


async def test_control_frames_of_the_client_pass_while_it_is_asked_to_close(
    autojump_clock: MockClock,
) -> None:
    """The target's answers to them do not: nothing follows its Close frame."""
    server = Connection(ConnectionType.SERVER)
    async with open_tunnel() as running:
        running.drain()
        await receive_close(running.client)
        await running.client.send_all(frame(PING, b"x", masked=True) + ANSWER)
        server.receive_data(await receive(running.target, 7 + len(ANSWER)))
        events = list(server.events())

        assert [type(event) for event in events] == [Ping, CloseConnection]
