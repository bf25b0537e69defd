"""A client that speaks HTTP/2 with the h2 library over any stream, and can break its rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h2.events as events
import trio
from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.settings import SettingCodes, Settings

from kamal_proxy.sockets import SocketStream
from tests.http.answers import Answer, request_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.http.answers import Fields
    from tests.http.streams import World


class PriorKnowledge(SocketStream):
    """A plain stream on which HTTP/2 was agreed on by other means than TLS."""

    __slots__ = ()
    alpn = "h2"


class _StateMachine(H2ConnectionStateMachine):
    """The library's, without its belief that nothing follows a GOAWAY (RFC 9113 6.8)."""

    def process_input(self, input_: ConnectionInputs) -> list[events.Event]:
        if input_ is ConnectionInputs.RECV_GOAWAY:
            return []
        return super().process_input(input_)


class _Codec(H2Connection):
    def clear_outbound_data_buffer(self) -> None:
        """Keep what is to be sent, also after a GOAWAY."""


class H2Client:
    """A client connection.

    Attributes:
        stream: Its stream.
        codec: The library's connection.
        answers: What has come, by stream.
        order: The stream of each DATA frame that has come.
        goaways: The last stream and the code of each GOAWAY that has come.
        pongs: How many PING answers have come.
        closed: Whether the server has closed the connection.
        taking: Whether windows are opened again for what has come.
        answering: Whether it sends by itself what the library wants to say.
    """

    def __init__(self, stream: trio.abc.Stream, **settings: int) -> None:
        self.stream = stream
        self.codec = _Codec(
            H2Configuration(
                client_side=True,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=True,
            )
        )
        self.codec.state_machine = _StateMachine()
        # What a server must never be made to see, the tests want to send.
        wanted = {SettingCodes[name.upper()]: value for name, value in settings.items()}
        self.codec.local_settings = Settings(
            client=True, initial_values={SettingCodes.ENABLE_PUSH: 0, **wanted}
        )
        self.answers: dict[int, Answer] = {}
        self.order: list[int] = []
        self.goaways: list[tuple[int, int]] = []
        self.pongs = 0
        self.closed = False
        self.taking = True
        self.answering = True

    async def open(self) -> None:
        """Send the preface."""
        self.codec.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        """Send what the library has framed."""
        data = self.codec.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def request(
        self, path: bytes = b"/", *, body: bytes | None = None, end: bool = True, **more: Any
    ) -> int:
        """Send a request and return its stream.

        Args:
            path: Its path.
            body: Its body; at most what the windows allow now.
            end: Whether it ends with that.
            more: As for :func:`request_fields`.
        """
        fields = request_fields(path, **more)
        return await self.send_fields(fields, end=end and body is None, body=body, last=end)

    async def send_fields(
        self, fields: Fields, *, end: bool = True, body: bytes | None = None, last: bool = True
    ) -> int:
        """Send any fields as the head of a request and return its stream."""
        stream_id = self.codec.get_next_available_stream_id()
        self.answers[stream_id] = Answer()
        self.codec.send_headers(stream_id, list(fields), end_stream=end)
        if body is not None:
            for start in range(0, len(body), 16384):
                self.codec.send_data(stream_id, body[start : start + 16384])
            if last:
                self.codec.end_stream(stream_id)
        await self.flush()
        return stream_id

    async def send_data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send a part of a body, at most what the window allows now."""
        self.codec.send_data(stream_id, data, end_stream=end)
        await self.flush()

    async def reset(self, stream_id: int, code: int = 8) -> None:
        """Cancel a stream."""
        self.codec.reset_stream(stream_id, code)
        await self.flush()

    async def ping(self) -> None:
        """Wait until the server has answered a PING: it has seen everything before."""
        wanted = self.pongs + 1
        self.codec.ping(b"12345678")
        await self.flush()
        await self.wait(lambda: self.pongs >= wanted)

    async def wait(self, wanted: Callable[[], object]) -> None:
        """Read until something is true, or the server has closed the connection."""
        while not wanted():
            if self.closed:
                raise EOFError(f"closed, {self.goaways=}")
            await self.read()

    async def answer(self, stream_id: int) -> Answer:
        """Wait for a whole response, or the reset of the stream, and return it."""
        answer = self.answers[stream_id]
        await self.wait(lambda: answer.ended or answer.reset is not None)
        return answer

    async def get(self, path: bytes = b"/", **more: Any) -> Answer:
        """Send a request and return its whole response."""
        return await self.answer(await self.request(path, **more))

    async def wait_closed(self) -> None:
        """Read until the server has closed the connection."""
        while not self.closed:
            await self.read()

    async def read(self) -> None:
        """Read once."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self.closed = True
            return
        for event in self.codec.receive_data(data):
            self._handle(event)
        if self.answering:
            await self.flush()

    def _handle(self, event: events.Event) -> None:
        answer = self.answers.get(getattr(event, "stream_id", None) or 0, Answer())
        match event:
            case events.InformationalResponseReceived():
                answer.informational.append(int(dict(event.headers)[b":status"]))
            case events.ResponseReceived():
                answer.fields = list(event.headers)
            case events.TrailersReceived():
                answer.trailers = list(event.headers)
            case events.DataReceived():
                self.order.append(event.stream_id)
                answer.body += event.data
                if self.taking:
                    self.codec.acknowledge_received_data(
                        event.flow_controlled_length, event.stream_id
                    )
            case events.StreamEnded():
                answer.ended = True
            case events.StreamReset():
                answer.reset = int(event.error_code or 0)
            case events.ConnectionTerminated():
                self.goaways.append((event.last_stream_id or 0, int(event.error_code or 0)))
            case events.PingAckReceived():
                self.pongs += 1


async def open_h2(world: World, **settings: int) -> H2Client:
    """Open a connection to the server of a world, HTTP/2 agreed on beforehand."""
    stream, far = world.pair()
    stream.__class__ = PriorKnowledge
    world.nursery.start_soon(world.serve, stream)
    client = H2Client(far, **settings)
    await client.open()
    return client
