"""A client that speaks HTTP/3 with aioquic over a real UDP socket, and can break its rules."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.h3.connection import H3Connection, encode_frame
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.events import (
    HandshakeCompleted,
    PingAcknowledged,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)

from kamal_proxy.http.h3_socket import listen_quic
from kamal_proxy.http.http3 import Http3Server
from tests.http import answers
from tests.http.streams import World
from tests.http3.quic import Quic, configuration
from tests.http3.serving import certificate
from tests.scripted import fail_hanging_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioquic.quic.events import QuicEvent

    from tests.http.answers import Fields

GOAWAY = 0x7
CONTROL = 3  # the stream that a server opens first


@attrs.define(eq=False)
class Answer(answers.Answer):
    """What has come on one stream.

    Attributes:
        stopped: The code with which the server wants no more of the request, else None.
    """

    stopped: int | None = None


class H3Client(Quic):
    """A client connection.

    Attributes:
        answers: What has come, by stream.
        goaways: The streams that GOAWAY frames named.
        http: aioquic's HTTP/3 connection.
    """

    def __init__(self, server: tuple[str, int], **options: Any) -> None:
        super().__init__(configuration(**options), server)
        self.answers: dict[int, Answer] = {}
        self.http: Any = None
        self.open = trio.Event()
        self._control = bytearray()
        self.handle = self._handle

    @property
    def goaways(self) -> list[int]:
        """The streams that GOAWAY frames on the control stream named."""
        found = []
        buffer = Buffer(data=bytes(self._control))
        assert buffer.pull_uint_var() == 0
        while not buffer.eof():
            kind = buffer.pull_uint_var()
            payload = buffer.pull_bytes(buffer.pull_uint_var())
            if kind == GOAWAY:
                found.append(Buffer(data=payload).pull_uint_var())
        return found

    def start(self) -> None:
        """Open the control stream and those of QPACK."""
        self.http = H3Connection(self.quic)
        # It knows nothing of HEAD.
        self.http._check_content_length = lambda _: None
        self.flush()

    def _handle(self, event: QuicEvent) -> None:
        self.events.append(event)
        if isinstance(event, HandshakeCompleted):
            self.open.set()
        elif isinstance(event, StreamDataReceived) and event.stream_id == CONTROL:
            self._control += event.data
        answer = self.answers.get(getattr(event, "stream_id", -1), Answer())
        if isinstance(event, StreamReset):
            answer.reset = event.error_code
        elif isinstance(event, StopSendingReceived):
            answer.stopped = event.error_code
        if self.http is None:
            return
        for found in self.http.handle_event(event):
            answer = self.answers.setdefault(found.stream_id, Answer())
            if isinstance(found, HeadersReceived):
                status = int(dict(found.headers).get(b":status", b"0"))
                if 100 <= status < 200:
                    answer.informational.append(status)
                elif status:
                    answer.fields = found.headers
                else:
                    answer.trailers = found.headers
            elif isinstance(found, DataReceived):
                answer.body += found.data
            answer.ended = answer.ended or found.stream_ended

    def request(
        self, path: bytes = b"/", *, body: bytes | None = None, end: bool = True, **more: Any
    ) -> int:
        """Send a request (see :func:`request_fields`) and return its stream."""
        return self.send_fields(answers.request_fields(path, **more), body=body, end=end)

    def send_fields(self, fields: Fields, *, body: bytes | None = None, end: bool = True) -> int:
        """Send any fields as the head of a request and return its stream."""
        stream_id = self.quic.get_next_available_stream_id()
        self.answers[stream_id] = Answer()
        self.http.send_headers(stream_id, list(fields), end_stream=end and body is None)
        if body is not None:
            self.http.send_data(stream_id, body, end_stream=end)
        self.flush()
        return stream_id

    def send_data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send a part of a body."""
        self.http.send_data(stream_id, data, end_stream=end)
        self.flush()

    def send_bytes(self, data: bytes, *, stream_id: int | None = None, end: bool = False) -> int:
        """Send any bytes on a stream, a new request stream unless one is named; return it."""
        if stream_id is None:
            stream_id = self.quic.get_next_available_stream_id()
        self.answers.setdefault(stream_id, Answer())
        self.quic.send_stream_data(stream_id, data, end_stream=end)
        self.flush()
        return stream_id

    def send_frame(self, kind: int, payload: bytes, **more: Any) -> int:
        """Send any frame on a stream."""
        return self.send_bytes(encode_frame(kind, payload), **more)

    def open_unidirectional(self, data: bytes, *, end: bool = False) -> int:
        """Send any bytes on a new unidirectional stream; return it."""
        stream_id = self.quic.get_next_available_stream_id(is_unidirectional=True)
        return self.send_bytes(data, stream_id=stream_id, end=end)

    def cancel(self, stream_id: int, code: int = 0x10C) -> None:
        """Cancel a request, both ways."""
        self.quic.reset_stream(stream_id, code)
        self.quic.stop_stream(stream_id, code)
        self.flush()

    async def answer(self, stream_id: int) -> Answer:
        """Wait for a whole response, or the reset of the stream, and return it."""
        answer = self.answers[stream_id]
        await self.wait(
            lambda: answer.ended or answer.reset is not None or self.closing_code is not None
        )
        if not answer.ended and answer.reset is None:
            raise EOFError(f"closed with {self.closing_code}")
        return answer

    async def get(self, path: bytes = b"/", **more: Any) -> Answer:
        """Send a request and return its whole response."""
        return await self.answer(self.request(path, **more))

    async def wait_stopped(self, stream_id: int) -> None:
        """Wait until the server wants no more of a stream."""
        answer = self.answers[stream_id]
        await self.wait(lambda: answer.stopped is not None)

    async def ping(self) -> None:
        """Wait until the server has acknowledged all that was sent."""
        self.quic.send_ping(len(self.events) + 10)
        self.flush()
        count = len(self.events)
        await self.wait(
            lambda: (
                self.closing_code is not None
                or any(isinstance(event, PingAcknowledged) for event in self.events[count:])
            )
        )


@attrs.define(eq=False)
class Front:
    """HTTP/3 in front of the server of a world."""

    world: World
    server: Http3Server
    address: tuple[str, int]
    nursery: trio.Nursery
    running: trio.CancelScope
    ended: trio.Event
    clients: list[H3Client] = attrs.field(factory=list)

    async def connect(self, *, start: bool = True, **options: Any) -> H3Client:
        """Open a connection."""
        client = H3Client(self.address, **options)
        self.clients.append(client)
        client.quic.connect(self.address, now=trio.current_time())
        self.nursery.start_soon(client.run)
        client.flush()
        await client.open.wait()
        if start:
            client.start()
        return client


@asynccontextmanager
async def open_front(world: World, **options: Any) -> AsyncIterator[Front]:
    """Serve HTTP/3 for the server of a world; all is closed at the end."""
    sock = listen_quic("127.0.0.1", 0)
    server = Http3Server(
        world.server, [sock], lambda _: certificate("example.com"), options.pop("limit", 100)
    )
    front: Front | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_hanging_test)
            running, ended = trio.CancelScope(), trio.Event()

            async def run(task_status: trio.TaskStatus[None]) -> None:
                with running:
                    await server.run(task_status=task_status)
                ended.set()

            await nursery.start(run)
            address = ("127.0.0.1", sock.getsockname()[1])
            front = Front(world, server, address, nursery, running, ended)
            yield front
            for client in front.clients:
                client.quic.close()
                client.flush()
            while world.server.connections:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    finally:
        sock.close()
        for client in front.clients if front else ():
            client.close()
