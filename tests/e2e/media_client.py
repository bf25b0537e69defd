"""What calls a media server, as a process of its own: ``python tests/e2e/media_client.py HOST``.

It calls from an address of this machine with aiortc, and is told what to do by lines of JSON, which
it answers each by a line; see :class:`tests.e2e.media_room.Callers`. Everything it sends goes to
where the answer of the signalling says.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from contextlib import suppress
from typing import Any
from unittest.mock import patch
from urllib.request import Request, urlopen

from aioice.ice import CandidatePair
from aiortc import (
    AudioStreamTrack,
    RTCBundlePolicy,
    RTCConfiguration,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError

SMALL = [codec for codec in RTCRtpSender.getCapabilities("audio").codecs if codec.name == "PCMU"]
ANSWER_LIMIT = 20.0  # seconds


class Call:
    """A call; it sends 50 packets a second and counts what comes back."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._peer = RTCPeerConnection(
            RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
        )
        self._peer.addTransceiver(AudioStreamTrack()).setCodecPreferences(SMALL)
        self._peer.on("track", self._on_track)
        self._peer.on("connectionstatechange", self._on_state)
        self._listening: asyncio.Task[None] | None = None
        self._frames = 0
        self._news = asyncio.Event()

    async def begin(self, url: str) -> dict[str, Any]:
        """Call; return who answered, and on which port of what is told in the answer."""
        await self._peer.setLocalDescription(await self._peer.createOffer())
        offer = self._peer.localDescription
        signal = ask_janus if url.endswith("/janus") else post
        answer = await asyncio.to_thread(signal, url, {"type": offer.type, "sdp": offer.sdp})
        await self._peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
        (candidate,) = self._connection.remote_candidates
        where = {"host": candidate.host, "port": candidate.port}
        return {"name": answer["name"], "call": answer["call"]} | where

    async def listen(self, frames: int) -> None:
        """Wait for so many frames of sound more."""
        wanted = self._frames + frames
        while self._frames < wanted:
            if self._peer.connectionState in ("failed", "closed"):
                raise ConnectionError(f"the call is {self._peer.connectionState}")
            await self._news.wait()

    async def move(self, packets: int) -> None:
        """Go on from another port, as a telephone does that leaves a network.

        Args:
            packets: How many packets of the media go there before the server is asked whether it
                can be reached from there (RFC 8445 7.2.2); more than none is what a router does
                that gives a new port to what it translates.
        """
        ice = self._connection
        (before,) = ice._protocols
        await ice.get_component_candidates(1, [self._host])
        (after,) = (protocol for protocol in ice._protocols if protocol is not before)
        pair = CandidatePair(after, ice.remote_candidates[0])
        ice._check_list.append(pair)
        came = first_media(after)
        if packets:
            ice._nominated[1] = pair
            sent = await self._sent()
            while await self._sent() < sent + packets:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        prefer(ice, pair)
        ice._nominating.clear()  # the other pair has its nomination behind it
        await ice.check_start(pair)
        if ice._nominated[1] is not pair or pair.state is not CandidatePair.State.SUCCEEDED:
            raise ConnectionError(f"the server was not reached from the new port: {pair.state}")
        await came.wait()  # until then the server sends to the old port
        ice._protocols.remove(before)
        await before.close()

    async def counts(self) -> dict[str, int]:
        """Return how many packets came back, and how many were missing between them."""
        for report in (await self._peer.getStats()).values():
            if report.type == "inbound-rtp":
                return {"received": report.packetsReceived, "lost": report.packetsLost}
        return {"received": 0, "lost": 0}

    async def hang_up(self) -> None:
        """End the call, and tell the server so."""
        await self._peer.close()
        if self._listening is not None:
            await self._listening

    @property
    def _connection(self) -> Any:
        (transceiver,) = self._peer.getTransceivers()
        return transceiver.sender.transport.transport._connection

    async def _sent(self) -> int:
        reports = (await self._peer.getStats()).values()
        return sum(report.packetsSent for report in reports if report.type == "outbound-rtp")

    def _on_track(self, track: Any) -> None:
        self._listening = asyncio.create_task(self._hear(track))

    async def _hear(self, track: Any) -> None:
        with suppress(MediaStreamError):  # at its end
            while True:
                await track.recv()
                self._frames += 1
                self._tell()

    def _on_state(self) -> None:
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def post(url: str, body: Any = None) -> Any:
    """Post JSON, or get some; return the answer."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data), timeout=ANSWER_LIMIT) as response:
        return json.load(response)


def ask_janus(url: str, offer: dict[str, str]) -> dict[str, Any]:
    """Call a Janus server's echo (its REST interface; each of its events is waited for)."""
    name = post(f"{url}/info")["server-name"]
    session = post(url, {"janus": "create", "transaction": "1"})["data"]["id"]
    attach = {"janus": "attach", "plugin": "janus.plugin.echotest", "transaction": "2"}
    handle = post(f"{url}/{session}", attach)["data"]["id"]
    # It must not send to the caller but through the proxy.
    offer["sdp"] = re.sub(r"a=(candidate:.*|end-of-candidates)\r\n", "", offer["sdp"])
    message = {"janus": "message", "body": {"audio": True}, "jsep": offer, "transaction": "3"}
    post(f"{url}/{session}/{handle}", message)
    while "jsep" not in (event := post(f"{url}/{session}?maxev=1")):
        pass
    return {"name": name, "call": handle, **event["jsep"]}


def prefer(ice: Any, preferred: CandidatePair) -> None:
    """Let a pair have the highest priority: some servers stay with the pair that has it."""
    build = ice.build_request

    def build_request(pair: CandidatePair, nominate: bool) -> Any:
        request = build(pair, nominate)
        request.attributes["PRIORITY"] += pair is preferred
        return request

    ice.build_request = build_request


def first_media(protocol: Any) -> asyncio.Event:
    """Return what is set when media comes to a socket: RTP or RTCP, by its first byte."""
    came, take = asyncio.Event(), protocol.datagram_received

    def datagram_received(data: bytes, address: Any) -> None:
        if 128 <= data[0] < 192:
            came.set()
        take(data, address)

    protocol.datagram_received = datagram_received
    return came


async def obey(calls: dict[str, Call], host: str, do: str, told: dict[str, Any]) -> Any:
    """Do what a line says."""
    if do == "begin":
        call = calls[told["who"]] = Call(host)
        return await call.begin(told["url"])
    if do == "listen":
        await asyncio.gather(*(calls[who].listen(told["frames"]) for who in told["who"]))
        return None
    if do == "move":
        return await calls[told["who"]].move(told["packets"])
    if do == "counts":
        return await calls[told["who"]].counts()
    assert do == "hang_up", do
    return await calls.pop(told["who"]).hang_up()


async def work(host: str) -> None:
    """Obey until there are no more lines."""
    calls: dict[str, Call] = {}
    print(json.dumps("ready"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        try:
            answer = {"answer": await obey(calls, host, told.pop("do"), told)}
        except (ConnectionError, OSError) as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


def main() -> None:
    (host,) = sys.argv[1:]
    with patch("aioice.ice.get_host_addresses", lambda *_, **__: [host]):
        asyncio.run(work(host))


if __name__ == "__main__":
    main()
