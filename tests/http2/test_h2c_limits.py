"""HTTP/2 targets that break the protocol, flood, starve, or send more than is asked for."""

from __future__ import annotations

import contextlib
import struct
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from h2.settings import SettingCodes
from hpack import Encoder

from kamal_proxy.http.h2_codec import TARGET_WINDOW as WINDOW
from kamal_proxy.http.h2_target import MAX_IDLE_FRAMES
from tests.http2.targets import Asked, H2Peer, answer, h2, h2c
from tests.running import Embedded, open_embedded
from tests.scripted import ConnectionCut, open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
ENHANCE_YOUR_CALM = 11


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded() as running:
        yield running


def frame(kind: int, stream_id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")
    return head + payload


def block(*fields: tuple[bytes, bytes]) -> bytes:
    """Encode fields without the table, so that any number of them can be made at any time."""
    encoder = Encoder()
    return encoder.encode([(name, value, True) for name, value in fields])


# Errors of one stream only


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ([(b":status", b"200"), (b"X-Upper", b"1")], "malformed field name b'X-Upper'"),
        ([(b":status", b"200"), (b"", b"1")], "malformed field name b''"),
        ([(b":status", b"200"), (b"a", b"x\ny: z")], "malformed value of b'a'"),
        ([(b":status", b"200"), (b"a", b"x\0")], "malformed value of b'a'"),
        ([(b":status", b"200"), (b"a", b" x")], "malformed value of b'a'"),
        ([(b":status", b"200"), (b":path", b"/")], "malformed field name b':path'"),
        ([(b":status", b"200"), (b"connection", b"close")], "field 'connection' in HTTP/2"),
        ([(b":status", b"200"), (b"upgrade", b"x")], "field 'upgrade' in HTTP/2"),
        ([(b"a", b"b")], "response without a status"),
        ([(b":status", b"20")], "response without a status"),
        ([(b":status", b"2000")], "response without a status"),
        ([(b":status", b"099")], "response without a status"),
        ([(b":status", b"101")], "status 101 in HTTP/2"),
    ],
)
async def test_a_malformed_response_costs_its_stream_only(
    proxy: Embedded, fields: list[tuple[bytes, bytes]], error: str
) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(1)
        await peer.wire.send(frame(HEADERS, asked.stream_id, block(*fields), END_HEADERS))
        await peer.wait(lambda: asked.reset is not None)
        assert asked.reset == 1  # PROTOCOL_ERROR
        await peer.respond(await peer.wait_request(2))
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 502
            line = await proxy.lines.wait_for_message("Error while proxying")
            assert line["error"] == f"malformed response: {error}"
            assert (await client.get()).status == 200
        assert len(upstream.peers) == 1


async def test_very_many_informational_responses(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(1)
        for _ in range(1000):
            await peer.wire.send(
                frame(HEADERS, asked.stream_id, block((b":status", b"103")), END_HEADERS)
            )
        await peer.wait(lambda: asked.reset is not None)
        await peer.respond(await peer.wait_request(2))
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await client.receive_response()).status == 502
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200


# Errors of the connection


def _bomb(asked: Asked) -> bytes:
    """One field in the table, then a byte for each of its thousands of uses."""
    encoder = Encoder()
    begin = encoder.encode([(b":status", b"200"), (b"a", b"x" * 4000)], huffman=False)
    return frame(HEADERS, asked.stream_id, begin + b"\xbe" * 10_000, END_HEADERS)


def _continued(asked: Asked) -> bytes:
    fields = block((b":status", b"200"), *((b"a", b"x" * 1000) for _ in range(200)))
    parts = [fields[start : start + 16_000] for start in range(0, len(fields), 16_000)]
    return frame(HEADERS, asked.stream_id, parts[0]) + b"".join(
        frame(CONTINUATION, asked.stream_id, part) for part in parts[1:]
    )


BREAKS: dict[str, tuple[Callable[[Asked], bytes], str]] = {
    "a frame that is too large": (
        lambda asked: frame(DATA, asked.stream_id, bytes(65_537)),
        "a frame of 65537 bytes, more than 65536",
    ),
    "a head that unpacks to too much": (_bomb, "Oversized header block"),
    "a head in very many frames": (_continued, "a head of more than 65536 bytes"),
    "empty parts of a head": (
        lambda asked: frame(HEADERS, asked.stream_id) + frame(CONTINUATION, asked.stream_id) * 100,
        "Too many continuation frames",
    ),
    "a head without its end": (
        lambda asked: frame(HEADERS, asked.stream_id) + frame(PING, 0, bytes(8)),
        "another frame in the middle of a head",
    ),
    "fields that can't be read": (
        lambda asked: frame(HEADERS, asked.stream_id, b"\xff\xff\xff\xff", END_HEADERS),
        "Error decoding header block",
    ),
    "a pushed response": (
        lambda asked: frame(PUSH, asked.stream_id, bytes((0, 0, 0, 2)) + block(), END_HEADERS),
        "Received pushed stream",
    ),
    "a stream of its own": (
        lambda asked: frame(HEADERS, 2, block((b":status", b"200")), END_HEADERS),
        "a stream that the target began",
    ),
    "a response on a stream that is not open": (
        lambda asked: frame(HEADERS, asked.stream_id + 2, block((b":status", b"200")), END_HEADERS),
        "not HTTP/2 as it should be",
    ),
    "a body before its head": (
        lambda asked: frame(DATA, asked.stream_id, b"x"),
        "cannot receive data before headers",
    ),
    "settings that can't be": (
        lambda asked: frame(SETTINGS, 0, struct.pack("!HI", SettingCodes.ENABLE_PUSH, 1)),
        "has invalid value 1",
    ),
    "a GOAWAY that is too short": (
        lambda asked: frame(GOAWAY, 0, b"123"),
        "a GOAWAY frame of 3 bytes",
    ),
    "pings": (
        lambda asked: frame(PING, 0, bytes(8)) * (MAX_IDLE_FRAMES + 100),
        "too many frames that carry nothing",
    ),
    "answers to pings that were never sent": (
        lambda asked: frame(PING, 0, bytes(8), ACK) * (MAX_IDLE_FRAMES + 100),
        "too many frames that carry nothing",
    ),
    "settings": (
        lambda asked: frame(SETTINGS, 0) * (MAX_IDLE_FRAMES + 100),
        "too many frames that carry nothing",
    ),
    "priorities": (
        lambda asked: frame(PRIORITY, asked.stream_id, bytes(5)) * (MAX_IDLE_FRAMES + 100),
        "too many frames that carry nothing",
    ),
    "frames of no known kind": (
        lambda asked: frame(0x42, 0, b"x") * (MAX_IDLE_FRAMES + 100),
        "too many frames that carry nothing",
    ),
    "windows": (
        lambda asked: frame(WINDOW_UPDATE, 0, bytes((0, 0, 0, 1))) * (MAX_IDLE_FRAMES + 100),
        "too many frames that carry nothing",
    ),
    "parts of a body without any of it": (
        lambda asked: (
            frame(HEADERS, asked.stream_id, block((b":status", b"200")), END_HEADERS)
            + frame(DATA, asked.stream_id, bytes((2, 0, 0)), PADDED) * (MAX_IDLE_FRAMES + 100)
        ),
        "too many frames that carry nothing",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
async def test_what_costs_the_connection(proxy: Embedded, what: str) -> None:
    """The connection ends, the target is told, and the next request gets another."""
    make, error = BREAKS[what]
    told = trio.Event()

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(1)
        await peer.wire.send(make(asked))
        await peer.wait_closed()
        told.set()

    async with open_upstream(h2(answer())) as upstream:
        upstream.script(h2(serve))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            with contextlib.suppress(ConnectionCut):  # where the response had begun
                response = await client.get()
                assert response.status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert error in line["error"]
        await told.wait()
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
        assert len(upstream.peers) == 2


# Flow control


async def test_a_client_that_reads_nothing_holds_up_its_target_and_nobody_else(
    proxy: Embedded,
) -> None:
    """Its response waits at the target, beyond the window; others pass on the same connection."""
    full = trio.Event()
    sent = 0

    async def serve(peer: H2Peer) -> None:
        nonlocal sent
        endless = await peer.wait_request(1)
        peer.head(endless)
        await peer.flush()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await peer.respond(await peer.wait_request(2))
                await peer.wait_closed()
                nursery.cancel_scope.cancel()

            nursery.start_soon(read)
            still = 0
            while still < 50:  # the proxy's and the client's kernel take some, in time
                window = min(peer.h2.local_flow_control_window(endless.stream_id), 16_384)
                if window:
                    still = 0
                    peer.h2.send_data(endless.stream_id, bytes(window))
                    sent += window
                    await peer.flush()
                else:
                    still += 1
                    await trio.sleep(0.01)
            full.set()
            await trio.sleep_forever()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port, receive_buffer=4096) as deaf:
            await deaf.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await full.wait()
            assert sent >= WINDOW
            async with open_client(proxy.port) as client:
                assert (await client.get()).status == 200
        assert len(upstream.peers) == 1


@pytest.mark.parametrize("buffered", [False, True])
async def test_a_target_that_takes_nothing_of_a_body(proxy: Embedded, buffered: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        await peer.wait(lambda: asked.reset is not None)
        assert (asked.reset, asked.body) == (8, b"")

    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
    async with open_upstream(h2(serve, settings)) as upstream:
        await proxy.deploy(h2c(upstream, response_timeout=0.2, buffer_requests=buffered))
        async with open_client(proxy.port) as client:
            response = await client.request(
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
            )
            assert response.status == 504


async def test_an_answer_to_a_body_that_is_not_wanted(proxy: Embedded) -> None:
    """The target refuses without taking any of it; the client hears that."""

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        await peer.respond(asked, b"too large", 413)
        await peer.wait_closed()

    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
    async with open_upstream(h2(serve, settings)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            response = await client.request(
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
            )
            assert (response.status, response.body) == (413, b"too large")


async def test_a_window_that_opens_late_and_a_little_at_a_time(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        for count in range(1, 6):
            peer.h2.increment_flow_control_window(1, asked.stream_id)
            await peer.flush()
            await peer.wait(partial(asked.has_at_least, count))
        await peer.respond(await peer.wait_request(), asked.body)
        await peer.wait_closed()

    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
    async with open_upstream(h2(serve, settings)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            response = await client.request(
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
            )
            assert response.body == b"hello"


async def test_a_table_of_any_size_is_kept_small(proxy: Embedded) -> None:
    """A target may offer a huge table of fields; what is not in it must still be readable."""
    peers: list[H2Peer] = []
    seen: list[Asked] = []

    async def serve(peer: H2Peer) -> None:
        peers.append(peer)
        await answer(seen=seen)(peer)

    settings = {SettingCodes.HEADER_TABLE_SIZE: 2**31}
    async with open_upstream(h2(serve, settings)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            for number in range(50):
                fields = f"X-{number}: {'v' * 500}\r\n"
                assert (await client.get(headers=fields)).status == 200
    assert [asked.get(b"x-%d" % n) for n, asked in enumerate(seen)] == [b"v" * 500] * 50
    assert peers[0].h2.decoder.header_table_size == 4096


async def test_padding_alone_takes_no_window_for_good(proxy: Embedded) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked)
        for _ in range(600):
            peer.h2.send_data(asked.stream_id, b"", pad_length=255)
        left = peer.h2.local_flow_control_window(asked.stream_id)
        await peer.flush()
        await peer.wait(lambda: peer.h2.local_flow_control_window(asked.stream_id) > left)
        peer.h2.send_data(asked.stream_id, b"hello", end_stream=True)
        await peer.flush()
        await peer.wait_closed()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).body == b"hello"


@pytest.mark.parametrize(("size", "status"), [(64 * 1024, 200), (4096, 502)])
async def test_the_largest_head_is_what_it_unpacks_to(size: int, status: int) -> None:
    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        begin = Encoder().encode([(b":status", b"200"), (b"a", b"x" * 2000)], huffman=False)
        await peer.wire.send(
            frame(HEADERS, asked.stream_id, begin + b"\xbe" * 3, END_HEADERS | END_STREAM)
        )
        await peer.wait_closed()

    async with open_embedded(max_head_size=size) as proxy, open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == status
