"""Plain RTP, with RTCP on the port beside it, through deploys: ffmpeg sends it, and plays it."""

from __future__ import annotations

import re
import socket
import struct
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.e2e.media_room import MediaRoom, free_range, open_media_room
from tests.e2e.programs import needs, open_program
from tests.e2e.udp_room import rows
from tests.reference.media import Looked, look_at
from tests.scripted import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.programs import Program
    from tests.running import Result

OLD, NEW = "127.0.0.2", "127.0.0.3"
QUIET = ("ffmpeg", "-hide_banner", "-nostdin", "-loglevel", "error")
PRINT_FRAMES = ("-c", "copy", "-flush_packets", "1", "-f", "framecrc", "pipe:1")
FRAME = r"^0, "  # what is printed of each
PACKET = 160  # bytes, and samples, of PCMU in 20 ms
GRACEFUL = ("--zero-downtime", "--drain-timeout=1s", "--force-kill-timeout=10s")

pytestmark = needs("ffmpeg", package="ffmpeg")


@pytest.fixture
async def room(directory: Path) -> AsyncIterator[MediaRoom]:
    """Provide a proxy with one pair of ports."""
    async with open_media_room(directory) as room:
        room.ports = free_range(2)
        yield room


# --- from a server to players --------------------------------------------------------------------


@attrs.define(eq=False)
class Streamer:
    """A server of one stream (RTSP, RFC 2326): told to play, it streams until it is torn down.

    As it is behind a proxy, it tells the proxy's address, and streams to where a player's first
    packets come from: those that open a way through a router.

    Attributes:
        host: Its address; its ports of the media are those of the proxy.
        ports: The ports of RTP and RTCP.
        number: The SSRC of its stream.
        port: Where it listens to RTSP.
        heard: What RTCP it has received.
        packets: How many packets it has sent.
        torn_down: Set when its player has left.
        told_goodbye: Set when it was said goodbye to by RTCP.
    """

    host: str
    ports: range
    number: int
    port: int = 0
    heard: list[Looked] = attrs.field(factory=list)
    packets: int = 0
    torn_down: trio.Event = attrs.field(factory=trio.Event)
    told_goodbye: trio.Event = attrs.field(factory=trio.Event)
    _sockets: list[trio.socket.SocketType] = attrs.field(factory=list)

    @property
    def target(self) -> str:
        """Where its health can be checked."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """What a player opens."""
        return f"rtsp://{self.host}:{self.port}/"

    async def live(self, nursery: trio.Nursery) -> None:
        """Serve until the nursery is cancelled."""
        listeners = await trio.open_tcp_listeners(0, host=self.host)
        self.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, self._serve, listeners)
        for port in self.ports:  # a player's first packets come before it says what to play
            sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sockets.append(sock)
            await sock.bind((self.host, port))
        nursery.start_soon(self._hear)

    def close(self) -> None:
        """Give its ports of the media back."""
        for sock in self._sockets:
            sock.close()

    async def _serve(self, stream: trio.SocketStream) -> None:
        received = b""
        async with stream, trio.open_nursery() as nursery:
            async for data in stream:
                received += data
                while b"\r\n\r\n" in received:
                    head, _, received = received.partition(b"\r\n\r\n")
                    await stream.send_all(self._answer(head.decode(), nursery))
            nursery.cancel_scope.cancel()

    def _answer(self, request: str, nursery: trio.Nursery) -> bytes:
        method = request.split()[0]
        fields = dict(re.findall(r"^(\w+): *(.*?)\r?$", request, re.MULTILINE))
        headers, body = [f"CSeq: {fields['CSeq']}", "Session: 1"], ""
        if method == "OPTIONS":
            headers.append("Public: DESCRIBE, SETUP, PLAY, TEARDOWN")
        elif method == "DESCRIBE":
            body = "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=audio 0 RTP/AVP 0\r\n"
            headers += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
        elif method == "SETUP":
            where = f"server_port={self.ports[0]}-{self.ports[1]};source={LOCALHOST}"
            headers.append(f"Transport: {fields['Transport']};{where};ssrc={self.number:08X}")
        elif method == "PLAY":
            nursery.start_soon(self._stream)
        elif method == "TEARDOWN":
            self.torn_down.set()
            nursery.cancel_scope.cancel()
        return "\r\n".join(["RTSP/1.0 200 OK", *headers, "", body]).encode()

    async def _stream(self) -> None:
        _, player = await self._sockets[0].recvfrom(2048)
        while True:
            head = struct.pack("!BBHI", 0x80, 0, self.packets, self.packets * PACKET)
            packet = head + struct.pack("!I", self.number) + bytes(PACKET)
            await self._sockets[0].sendto(packet, player)
            self.packets += 1
            await trio.sleep(0.02)

    async def _hear(self) -> None:
        rtcp = self._sockets[1]
        while True:
            data, player = await rtcp.recvfrom(2048)
            self.heard.append(look_at(data))
            if self.heard[-1].byes:
                self.told_goodbye.set()
            if len(self.heard) == 1:  # a sender report and a name (RFC 3550 6.4.1, 6.5)
                report = struct.pack("!BBHIQIII", 0x80, 200, 6, self.number, 0, 0, 0, 0)
                name = struct.pack("!BBHIBB4sxx", 0x81, 202, 3, self.number, 1, 4, b"tv@1")
                await rtcp.sendto(report + name, player)


@asynccontextmanager
async def open_streamers(ports: range) -> AsyncIterator[tuple[Streamer, Streamer]]:
    """Run an old and a new server."""
    async with trio.open_nursery() as nursery:
        old, new = Streamer(OLD, ports, 0x01010101), Streamer(NEW, ports, 0x02020202)
        with closing(old), closing(new):
            await old.live(nursery)
            await new.live(nursery)
            yield old, new
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_player(directory: Path, streamer: Streamer) -> AsyncIterator[Program]:
    """Run a program that plays a stream, over UDP."""
    source = ("-rtsp_transport", "udp", "-analyzeduration", "100000", "-i", streamer.url)
    async with open_program(directory, *QUIET, *source, *PRINT_FRAMES) as player:
        yield player


async def test_a_player_is_told_that_its_stream_ends(directory: Path, room: MediaRoom) -> None:
    results: list[Result] = []
    async with open_streamers(room.ports) as (old, new), trio.open_nursery() as nursery:
        result = await room.deploy_media(old.target)
        assert (result.code, result.err) == (0, "")
        async with open_player(directory, old) as player:
            await player.wait_count(FRAME, 25)

            async def deploy() -> None:
                results.append(await room.deploy_media(new.target, flags=GRACEFUL))

            nursery.start_soon(deploy)
            await room.wait_switched(new.target)
            async with open_player(directory, new) as other:
                await other.wait_count(FRAME, 25)
                await player.wait()  # without a word from its server, it would play on
                await other.wait_count(FRAME, other.count(FRAME) + 25)
            await old.torn_down.wait()
            assert player.count(FRAME) >= old.packets - 5, "no packet was lost"
            await old.told_goodbye.wait()
            first, *_, last = old.heard
            assert last.plain
            assert last.byes == first.senders == (0,), "the player's, which was told as well"
            assert not new.told_goodbye.is_set()
    assert [(result.code, result.err) for result in results] == [(0, "")]
    assert results[0].out == "1 session completed, 0 cut, 1 got a BYE\n"


# --- from a sender to listeners ------------------------------------------------------------------

LISTEN = """\
v=0
o=- 0 0 IN IP4 {host}
s=-
c=IN IP4 {host}
t=0 0
m=audio {port} RTP/AVP 0
"""


@asynccontextmanager
async def open_listener(directory: Path, host: str, ports: range) -> AsyncIterator[Program]:
    """Run a program that takes a stream on a pair of ports, and reports to who sends it."""
    path = directory / f"{host}.sdp"
    path.write_text(LISTEN.format(host=host, port=ports[0]))
    source = ("-protocol_whitelist", "file,udp,rtp", "-sdp_flags", "rtcp_to_source")
    bind = ("-localaddr", host, "-analyzeduration", "100000", "-i", str(path))
    async with open_program(directory, *QUIET, *source, *bind, *PRINT_FRAMES) as listener:
        yield listener


async def test_a_listener_is_told_that_its_sender_goes_elsewhere(
    directory: Path, room: MediaRoom
) -> None:
    tone = ("-re", "-f", "lavfi", "-i", "sine=sample_rate=8000", "-c:a", "pcm_mulaw")
    to = ("-f", "rtp", f"rtp://{LOCALHOST}:{room.ports[0]}")
    async with (
        open_listener(directory, OLD, room.ports) as old,
        open_listener(directory, NEW, room.ports) as new,
    ):
        await room.deploy_media(f"{OLD}:1", flags=["--health-check=none"])
        async with open_program(directory, *QUIET, *tone, *to) as sender:
            await old.wait_count(FRAME, 5)
            assert new.count(FRAME) == 0

            result = await room.deploy_media(f"{NEW}:1", flags=["--health-check=none", *GRACEFUL])

            await old.wait()  # it has ended by itself, and well
            assert (result.code, result.err) == (0, "")
            # The sender heeds no goodbye, and goes on to where somebody listens.
            assert result.out == "1 session completed, 0 cut, 1 got a BYE\n"
            await new.wait_count(FRAME, 5)
            assert sender.process.returncode is None
            assert (await rows(room.command))[0].endswith(f"{NEW}:1 running no")
