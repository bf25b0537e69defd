"""The connections to HTTP/2 targets: shared, limited, given up by the target, broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from h2.settings import SettingCodes

from kamal_proxy import RolloutOptions
from kamal_proxy.http import exchange, h2_pool, upload
from kamal_proxy.http import upstream as upstream_module
from tests.http2.targets import Asked, H2Peer, answer, h2, h2c, stay
from tests.running import Embedded, open_embedded
from tests.scripted import ConnectionCut, Peer, open_client, open_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.scripted import Response

POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"


@pytest.fixture
async def proxy() -> AsyncIterator[Embedded]:
    async with open_embedded() as running:
        yield running


async def get_many(proxy: Embedded, count: int) -> list[Response]:
    """Send requests at the same time."""
    responses: list[Response] = []

    async def get() -> None:
        async with open_client(proxy.port) as client:
            responses.append(await client.get())

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(get)
    return responses


def together(count: int) -> H2Peers:
    return H2Peers(count)


@attrs.define(eq=False)
class H2Peers:
    """A script that answers no request before so many have come, on all connections together."""

    count: int
    most: int = 0
    _here: trio.Event = attrs.field(factory=trio.Event)
    _arrived: int = 0

    async def __call__(self, peer: H2Peer) -> None:
        async with trio.open_nursery() as nursery:

            async def answer_when_all_are_here() -> None:
                await self._here.wait()
                for asked in peer.requests.values():
                    await peer.respond(asked)

            nursery.start_soon(answer_when_all_are_here)
            known = 0
            while await peer.receive():
                self.most = max(self.most, len(peer.requests))
                self._arrived += len(peer.requests) - known
                known = len(peer.requests)
                if self._arrived >= self.count:
                    self._here.set()


async def test_requests_share_a_connection(proxy: Embedded) -> None:
    peers = together(20)
    async with open_upstream(h2(peers)) as upstream:
        await proxy.deploy(h2c(upstream))
        responses = await get_many(proxy, 20)
        assert [response.status for response in responses] == [200] * 20
        assert (len(upstream.peers), peers.most) == (1, 20)
    text = proxy.proxy.metrics()[0].decode()
    opened = [line for line in text.splitlines() if "upstream_connects" in line and "web" in line]
    assert opened
    assert sum(float(line.rsplit(" ", 1)[1]) for line in opened) == 1


async def test_as_many_requests_on_a_connection_as_its_target_takes(proxy: Embedded) -> None:
    peers = together(7)
    settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 3}
    async with open_upstream(h2(peers, settings)) as upstream:
        await proxy.deploy(h2c(upstream))
        responses = await get_many(proxy, 7)
        assert [response.status for response in responses] == [200] * 7
        assert (len(upstream.peers), peers.most) == (3, 3)


async def test_a_limit_of_our_own(proxy: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kamal_proxy.http.h2_target.MAX_STREAMS", 2)
    peers = together(4)
    async with open_upstream(h2(peers)) as upstream:
        await proxy.deploy(h2c(upstream))
        assert len(await get_many(proxy, 4)) == 4
        assert (len(upstream.peers), peers.most) == (2, 2)


async def test_a_target_that_takes_no_requests(proxy: Embedded) -> None:
    settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 0}
    async with open_upstream(h2(stay, settings)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == "the target takes no requests on an HTTP/2 connection"
        await proxy.wait_streams(1)


async def test_one_attempt_to_connect_for_all(proxy: Embedded) -> None:
    """The target is down: all that wait hear of it at once, and none tries by itself."""
    async with open_upstream(h2(stay)) as upstream:
        await proxy.deploy(h2c(upstream))
        upstream.stop_listening()
        responses = await get_many(proxy, 5)
        assert [response.status for response in responses] == [502] * 5


async def test_a_client_that_leaves_does_not_end_the_attempt_of_others(proxy: Embedded) -> None:
    accepted, go_on = trio.Event(), trio.Event()

    async def slow(wire: Peer) -> None:
        accepted.set()
        await go_on.wait()
        await h2(answer())(wire)

    async with open_upstream(slow) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as leaves:
            await leaves.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await accepted.wait()
        async with open_client(proxy.port) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await proxy.wait_streams_at_least(2)
            go_on.set()
            assert (await client.receive_response()).status == 200
        assert len(upstream.peers) == 1


# The target gives a connection up


async def test_a_target_that_goes_away_finishes_what_it_has_begun(proxy: Embedded) -> None:
    """Streams up to the last one go on, later ones get another connection, then it is closed."""
    gone, more, closed = trio.Event(), trio.Event(), trio.Event()

    async def serve(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        peer.head(asked)
        peer.h2.send_data(asked.stream_id, b"be")
        await peer.wire.send(peer.h2.data_to_send() + goaway(asked.stream_id))
        gone.set()
        await more.wait()
        peer.h2.send_data(asked.stream_id, b"gun", end_stream=True)
        await peer.flush()
        await peer.wait_closed()
        closed.set()

    async with open_upstream(h2(answer(b"second"))) as upstream:
        upstream.script(h2(serve))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as first, open_client(proxy.port) as second:
            await first.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await first.receive_until(b"be\r\n")
            await gone.wait()
            assert (await second.get()).body == b"second"
            more.set()
            assert (await first.receive_until(b"0\r\n\r\n")).endswith(b"gun\r\n0\r\n\r\n")
            await closed.wait()
        assert len(upstream.peers) == 2


async def test_an_idle_connection_that_is_given_up_is_closed(proxy: Embedded) -> None:
    idle, closed = trio.Event(), trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.respond(await peer.wait_request())
        await idle.wait()
        await peer.wire.send(goaway(1))
        await peer.wait_closed()
        closed.set()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
            await proxy.lines.wait_requests(1)
            idle.set()
            await closed.wait()


def goaway(last: int, code: int = 0, debug: bytes = b"") -> bytes:
    """Return a GOAWAY frame; the library would not let the target go on after its own."""
    payload = last.to_bytes(4, "big") + code.to_bytes(4, "big") + debug
    return len(payload).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + payload


@pytest.mark.parametrize("refusal", ["goaway", "reset"])
@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        POST,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("buffered", [False, True])
async def test_what_was_not_processed_is_sent_again(
    proxy: Embedded, refusal: str, request_: bytes, buffered: bool
) -> None:
    """Whatever the method: the target has said that it did nothing with it."""
    seen: list[Asked] = []

    async def refuse(peer: H2Peer) -> None:
        asked = await peer.wait_request()
        if refusal == "goaway":
            await peer.wire.send(goaway(0))
            await peer.wait_closed()
            return
        peer.h2.reset_stream(asked.stream_id, 7)
        await peer.flush()
        again = await peer.wait_request(2)
        seen.append(again)
        await peer.respond(again)
        await peer.wait_closed()

    async with open_upstream(h2(answer(seen=seen))) as upstream:
        upstream.script(h2(refuse))
        await proxy.deploy(h2c(upstream, buffer_requests=buffered))
        async with open_client(proxy.port) as client:
            response = await client.request(request_)
            assert (response.status, response.body) == (200, b"hello")
        (asked,) = seen
        assert asked.body == (b"" if request_.startswith(b"GET") else b"body")
        assert len(upstream.peers) == (2 if refusal == "goaway" else 1)


async def test_a_body_that_has_begun_is_sent_again_from_its_start(proxy: Embedded) -> None:
    begun = trio.Event()

    async def refuse(peer: H2Peer) -> None:
        asked = await peer.wait_request(whole=False)
        await peer.wait(lambda: asked.body == b"one ")
        begun.set()
        await peer.wait(lambda: asked.body == b"one two ")
        await peer.wire.send(goaway(0))
        await peer.wait_closed()

    seen: list[Asked] = []
    async with open_upstream(h2(answer(seen=seen))) as upstream:
        upstream.script(h2(refuse))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\none ")
            await begun.wait()
            await client.send(b"two ")
            await upstream.wait_peers(2)
            await client.send(b"three")
            assert (await client.receive_response(b"POST")).status == 200
    assert [asked.body for asked in seen] == [b"one two three"]


async def test_a_body_too_long_to_remember_is_not_sent_again(
    proxy: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "MAX_GIVEN", 3)

    async def refuse(peer: H2Peer) -> None:
        await peer.wait_request()
        await peer.wire.send(goaway(0, 11, b"too_many_pings"))
        await peer.wait_closed()

    async with open_upstream(h2(answer())) as upstream:
        upstream.script(h2(refuse))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.request(POST)).status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == (
            "not processed by the target: GOAWAY ENHANCE_YOUR_CALM too_many_pings"
        )


async def test_a_target_that_refuses_every_request(proxy: Embedded) -> None:
    """It is asked a few times; then its sibling is, and without one the client hears of it."""
    refused = 0

    async def refuse(peer: H2Peer) -> None:
        nonlocal refused
        while await peer.receive():
            for asked in peer.requests.values():
                if asked.ended and asked.reset is None:
                    asked.reset = 7
                    refused += 1
                    peer.h2.reset_stream(asked.stream_id, 7)
                    await peer.flush()

    async with open_upstream(h2(refuse)) as bad, open_upstream(h2(answer(b"good"))) as good:
        await proxy.deploy(h2c(bad))
        async with open_client(proxy.port) as client:
            assert (await client.request(POST)).status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert (line["error"], refused) == ("reset by the target: REFUSED_STREAM", 5)
        both = attrs.evolve(h2c(bad), targets=(f"h2c://{bad.target}", f"h2c://{good.target}"))
        await proxy.deploy(both)
        async with open_client(proxy.port) as client:
            for _ in range(4):
                assert (await client.request(POST)).body == b"good"


# The connection breaks


async def breaks(peer: H2Peer) -> None:
    """Answer a request, and close when the second one comes."""
    await peer.respond(await peer.wait_request(1))
    await peer.wait_request(2)


@pytest.mark.parametrize(
    ("request_", "status"), [(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200), (POST, 502)]
)
async def test_a_connection_that_breaks_under_a_request(
    proxy: Embedded, request_: bytes, status: int
) -> None:
    """Only what may be sent twice is sent again, on another connection, and once."""
    async with open_upstream(h2(answer())) as upstream:
        upstream.script(h2(breaks))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
            assert (await client.request(request_)).status == status
        assert len(upstream.peers) == (2 if status == 200 else 1)


async def test_a_connection_that_breaks_when_it_has_said_something(proxy: Embedded) -> None:
    """The target may have done a lot by then: the request is not sent again."""

    async def serve(peer: H2Peer) -> None:
        await peer.respond(await peer.wait_request(1))
        peer.head(await peer.wait_request(2), 103)
        await peer.flush()

    async with open_upstream(h2(answer())) as upstream:
        upstream.script(h2(serve))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
            response = await client.get()
            assert (response.informational, response.status) == ([103], 502)
        assert len(upstream.peers) == 1


async def test_a_connection_that_breaks_at_its_first_request(proxy: Embedded) -> None:
    async def close(peer: H2Peer) -> None:
        await peer.wait_request()

    async with open_upstream(h2(close)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 502
        assert len(upstream.peers) == 1


async def test_an_idle_connection_that_was_closed_is_not_used(proxy: Embedded) -> None:
    async with open_upstream(h2(answer())) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            await client.request(POST)
            upstream.peers[0].reset()
            await proxy.wait_streams(1)
            assert (await client.request(POST)).status == 200
        assert len(upstream.peers) == 2


@pytest.mark.parametrize("answers", [True, False])
async def test_a_connection_is_asked_before_what_must_not_be_sent_twice(
    proxy: Embedded, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """After a while without a sign of it, a PING tells whether the target is still there."""
    monkeypatch.setattr(exchange, "FRESH_AGE", -1.0)
    monkeypatch.setattr("kamal_proxy.http.h2_target.PING_TIMEOUT", 25.0 if answers else 0.05)

    async def deaf(peer: H2Peer) -> None:
        await peer.respond(await peer.wait_request())
        await peer.wire.receive_some()
        await trio.sleep_forever()

    async with open_upstream(h2(answer())) as upstream:
        if not answers:
            upstream.script(h2(deaf))
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            for _ in range(3):
                assert (await client.request(POST)).status == 200
        assert len(upstream.peers) == (1 if answers else 2)


async def test_idle_connections_are_closed_after_a_while(
    proxy: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    goodbye = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.respond(await peer.wait_request())
        await peer.wait_closed()
        assert peer.said_goodbye
        goodbye.set()

    monkeypatch.setattr(h2_pool, "MAX_IDLE_AGE", 0.0)
    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream, interval=0.02))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 200
            await goodbye.wait()
            await proxy.wait_streams(1)


# What is no HTTP/2


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "not HTTP/2 as it should be: it speaks HTTP/1 here; leave out h2c:// to reach it so",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP/2 as it should be: it does not speak HTTP/2 here"),
        (b"", "closed by the target"),
    ],
)
async def test_what_does_not_speak_http2(proxy: Embedded, data: bytes, error: str) -> None:
    async def serve(peer: Peer) -> None:
        await peer.receive_some()
        await peer.send(data)

    async with open_upstream(serve) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == f"no HTTP/2 connection: {error}"
        await proxy.wait_streams(0)


async def test_what_says_nothing_at_all(proxy: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_pool, "CONNECT_TIMEOUT", 0.1)
    monkeypatch.setattr(upstream_module, "CONNECT_TIMEOUT", 5.0)

    async def silent(peer: Peer) -> None:
        await peer.wait_closed()

    async with open_upstream(silent) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as client:
            assert (await client.get()).status == 502
        line = await proxy.lines.wait_for_message("Error while proxying")
        assert line["error"] == "no HTTP/2 settings within 0.1s; does the target speak h2c?"


async def test_the_end_of_the_proxy_ends_its_connections() -> None:
    async with open_upstream(h2(answer())) as upstream:
        async with open_embedded() as proxy:
            await proxy.deploy(h2c(upstream))
            async with open_client(proxy.port) as client:
                assert (await client.get()).status == 200
        await upstream.peers[0].wait_closed()


async def test_a_client_of_a_stream_whose_connection_breaks_is_cut(proxy: Embedded) -> None:
    """All of them, for they share it."""
    here = trio.Event()

    async def serve(peer: H2Peer) -> None:
        for number in (1, 2):
            asked = await peer.wait_request(number)
            peer.head(asked)
            peer.h2.send_data(asked.stream_id, b"begun")
            await peer.flush()
        await here.wait()

    async with open_upstream(h2(serve)) as upstream:
        await proxy.deploy(h2c(upstream))
        async with open_client(proxy.port) as one, open_client(proxy.port) as two:
            for client in (one, two):
                await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                client.unread(await client.receive_until(b"begun"))
            here.set()
            for client in (one, two):
                with pytest.raises(ConnectionCut) as cut:
                    await client.receive_response()
                assert cut.value.body == b"begun"


async def test_targets_survive_a_restart(tmp_path: Path) -> None:
    """What is spoken with them is saved with them, also for readers and a rollout."""
    async with open_upstream(h2(answer())) as upstream:
        target = f"h2c://{upstream.target}"
        async with open_embedded(data_directory=tmp_path) as proxy:
            await proxy.deploy(attrs.evolve(h2c(upstream), read_targets=(target,)))
            await proxy.proxy.deploy_rollout("web", RolloutOptions(targets=(target,)))
        async with open_embedded(data_directory=tmp_path) as proxy:
            async with open_client(proxy.port) as client:
                assert (await client.get()).status == 200
                assert (await client.request(POST)).status == 200
            (service,) = proxy.proxy.services()
            assert (service.targets, service.read_targets, service.rollout_targets) == (
                (target,),
                (target,),
                (target,),
            )
            assert set(service.healthy) == {target}
