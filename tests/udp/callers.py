"""Media servers and their callers, with real sockets: scripted ICE, DTLS, RTP and RTCP.

A server has an address of its own, because it has the ports of the proxy. It recognises the callers
that its signalling has chosen it for by the fragment of a user name (ufrag), and answers each
question with its name. A phone asks, and keeps all that it ever heard; what was meant for another
one fails the test in the end.

    async with open_calls() as calls:
        v1 = calls.server("v1")
        await calls.deploy(v1)
        assert await calls.phone().check(v1.invite()) == "v1"
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from tests.reference.media import look_at, number
from tests.scripted import LOCALHOST
from tests.udp.calling import (
    ERROR,
    ERROR_CODE,
    REQUEST,
    SUCCESS,
    bye,
    described,
    receiver_report,
    rtp,
    sender_report,
    stun,
)
from tests.udp.calling import request as binding_request
from tests.udp.serving import Room, World, open_services, open_world
from tests.udp.test_leases import free_range

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from kamal_proxy._fastpath import Relay
    from kamal_proxy.deployment import DrainResult
    from tests.udp.serving import Deploying

SOFTWARE = 0x8022  # an attribute of STUN that all may ignore
APPLICATION = 23  # records of DTLS that carry data
SHORT = 0.5  # seconds; a session that is silent for so long is over
IN_TURN = 0.1  # seconds between two words of who goes on talking
_HOPS = 4  # of a question and its answer, through the proxy
_ssrcs = itertools.count(0x1000)


def data_record(text: bytes) -> bytes:
    """Return a record of DTLS 1.2 under keys, which are nobody's here."""
    return struct.pack("!BHHHIH", APPLICATION, 0xFEFD, 1, 0, 7, len(text)) + text


def secret_report(ssrc: int, text: bytes) -> bytes:
    """Return what SRTCP looks like: a report, then what no length accounts for."""
    return receiver_report(ssrc) + b"\0" + text


@attrs.frozen
class Arrival:
    """A datagram as a server received it.

    Attributes:
        payload: What was in it.
        port: The server's port.
        source: The port that it came from.
    """

    payload: bytes
    port: int
    source: int


@attrs.define(eq=False)
class MediaServer:
    """A server of calls, on an address of its own.

    It answers Binding requests with a ufrag of its own, DTLS of whoever it has recognised by
    that, and RTP and RTCP of anybody.

    Attributes:
        name: Its name.
        host: Its address.
        ports: Its ports.
        ufrags: Those that it has given away.
        stranger: The error that it tells to whom it does not know; 0: none.
        silent: Whether it answers nothing.
        received: All it ever received.
        ssrc: Under which it sends RTP.
    """

    name: str
    host: str
    ports: Sequence[int]
    management: int = 7880
    ufrags: set[bytes] = attrs.field(factory=set)
    stranger: int = 401
    silent: bool = False
    received: list[Arrival] = attrs.field(factory=list)
    ssrc: int = attrs.field(factory=_ssrcs.__next__)
    _sockets: list[trio.socket.SocketType] = attrs.field(factory=list)
    _recognised: set[tuple[int, int]] = attrs.field(factory=set)

    def __str__(self) -> str:
        return f"{self.host}:{self.management}"

    @property
    def lives(self) -> bool:
        """Whether its ports are open."""
        return bool(self._sockets)

    def live(self, world: World) -> None:
        """Begin to answer, on the same ports as ever."""
        assert not self._sockets
        for port in self.ports:
            sock = world.open_socket(self.host, port)
            self._sockets.append(sock)
            world.nursery.start_soon(self._serve, sock, port)

    def die(self) -> None:
        """Close its ports: what arrives from now on is refused. It forgets whom it knew."""
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        self._recognised.clear()

    def invite(self) -> bytes:
        """Return a new ufrag, as signalling would."""
        ufrag = b"%s-%d" % (self.name.encode(), len(self.ufrags))
        self.ufrags.add(ufrag)
        return ufrag

    async def send(self, payload: bytes, port: int, source: int) -> None:
        """Send something unasked, from one of its ports, to who sent from a port."""
        (sock,) = (each for each in self._sockets if each.getsockname()[1] == port)
        await sock.sendto(payload, (LOCALHOST, source))

    # What it has received

    def sources(self, port: int) -> set[int]:
        """Return the ports that it has received datagrams from, on one of its own."""
        return {each.source for each in self.received if each.port == port}

    @property
    def requests(self) -> int:
        """How many Binding requests it has received."""
        return sum(look_at(each.payload).stun_type == REQUEST for each in self.received)

    @property
    def byes(self) -> list[tuple[int, ...]]:
        """The sources of each BYE that it has received."""
        return [said for each in self.received if (said := look_at(each.payload).byes)]

    # Answering

    async def _serve(self, sock: trio.socket.SocketType, port: int) -> None:
        with suppress(trio.ClosedResourceError, OSError):
            while True:
                payload, (_, source) = await sock.recvfrom(65536)
                self.received.append(Arrival(payload, port, source))
                answer = b"" if self.silent else self._answer(payload, port, source)
                if answer:
                    await sock.sendto(answer, (LOCALHOST, source))

    def _answer(self, payload: bytes, port: int, source: int) -> bytes:
        looked, name = look_at(payload), self.name.encode()
        if looked.stun_type == REQUEST:
            transaction = number(payload[8:20])
            if ufrag_of(payload) in self.ufrags:
                self._recognised.add((port, source))
                return stun(SUCCESS, SOFTWARE, name, transaction=transaction)
            code = bytes([0, 0, *divmod(self.stranger, 100)])
            answer = stun(ERROR, ERROR_CODE, code + name, transaction=transaction)
            return answer if self.stranger else b""
        if payload[0] == APPLICATION and (port, source) in self._recognised:
            return data_record(name + b":" + payload[13:])
        if looked.kind == "rtp":
            return rtp(self.ssrc, name + b":" + payload[12:])
        if looked.kind == "rtcp" and not looked.plain:
            return secret_report(self.ssrc, name + b":" + payload[9:])
        if looked.kind == "rtcp" and not looked.byes:
            return sender_report(self.ssrc) + described(self.ssrc, name)
        return b""


def ufrag_of(payload: bytes) -> bytes:
    """Return whom a Binding request of :func:`tests.udp.calling.request` asks for."""
    return payload[24:].partition(b":")[0]


@attrs.frozen
class Heard:
    """A datagram as a phone received it.

    Attributes:
        kind: ``success``, ``error``, ``dtls``, ``rtp``, ``rtcp`` or ``srtcp``.
        name: The server that it is from.
        question: What it answers; nothing if that is RTCP.
        payload: All of it.
        port: The proxy's port.
    """

    kind: str
    name: str
    question: bytes
    payload: bytes
    port: int

    @property
    def byes(self) -> tuple[int, ...]:
        """The sources that say goodbye."""
        return look_at(self.payload).byes


def hear(payload: bytes, port: int) -> Heard:
    """Take an answer of a server apart."""
    looked = look_at(payload)
    if looked.kind == "stun":
        (size,) = struct.unpack("!H", payload[22:24])
        is_error = looked.stun_type == ERROR
        name = payload[24 + 4 * is_error : 24 + size]
        kind = "error" if is_error else "success"
        return Heard(kind, name.decode(), payload[8:20], payload, port)
    if looked.kind == "rtcp" and looked.plain:
        return Heard("rtcp", looked.cname.decode(), b"", payload, port)
    kind = "srtcp" if looked.kind == "rtcp" else looked.kind
    start = {"dtls": 13, "rtp": 12, "srtcp": 9}[kind]
    name, _, question = payload[start:].partition(b":")
    return Heard(kind, name.decode(), question, payload, port)


@attrs.define(eq=False)
class Phone:
    """One socket of a caller.

    Attributes:
        to: The proxy's port that it sends to, if nothing else is said.
        heard: All that it has heard.
        strange: What it has heard that answers no question of its own.
        ssrc: Under which it sends RTP.
    """

    sock: trio.socket.SocketType
    to: int
    heard: list[Heard] = attrs.field(factory=list)
    strange: list[bytes] = attrs.field(factory=list)
    ssrc: int = attrs.field(factory=_ssrcs.__next__)
    _asked: set[bytes] = attrs.field(factory=set)
    _news: trio.Event = attrs.field(factory=trio.Event)
    _questions: itertools.count[int] = attrs.field(factory=itertools.count)

    @property
    def address(self) -> tuple[str, int]:
        """Its own."""
        host, port = self.sock.getsockname()
        return host, port

    @property
    def names(self) -> set[str]:
        """The servers that it has heard."""
        return {each.name for each in self.heard}

    @property
    def byes(self) -> list[tuple[int, ...]]:
        """The sources of each BYE that it has heard."""
        return [each.byes for each in self.heard if each.byes]

    # Saying, without waiting

    async def say(self, payload: bytes, port: int = 0) -> None:
        """Send anything."""
        await self.sock.sendto(payload, (LOCALHOST, port or self.to))

    async def say_request(self, ufrag: bytes, port: int = 0) -> bytes:
        """Send a Binding request; return the number of its transaction."""
        question = self._question()
        await self.say(binding_request(ufrag, transaction=number(question)), port)
        return question

    async def say_voice(self, port: int = 0) -> bytes:
        """Send RTP."""
        question = self._question()
        await self.say(rtp(self.ssrc, question), port)
        return question

    async def say_data(self, port: int = 0) -> bytes:
        """Send DTLS."""
        question = self._question()
        await self.say(data_record(question), port)
        return question

    async def say_report(self, port: int = 0) -> None:
        """Send RTCP with the name ``caller``."""
        await self.say(sender_report(self.ssrc) + described(self.ssrc, b"caller"), port)

    async def say_secret(self, port: int = 0) -> bytes:
        """Send SRTCP."""
        question = self._question()
        await self.say(secret_report(self.ssrc, question), port)
        return question

    async def say_bye(self, port: int = 0, ssrc: int = 0) -> None:
        """Send RTCP that says goodbye, by default in its own name."""
        ssrc = ssrc or self.ssrc
        await self.say(receiver_report(ssrc) + bye(ssrc), port)

    # Asking: all return the name of who has answered

    async def check(self, ufrag: bytes, port: int = 0) -> str:
        """Send a Binding request, and wait for the answer to it."""
        return (await self.wait_answer(await self.say_request(ufrag, port))).name

    async def ask(self, port: int = 0) -> str:
        """Send RTP, and wait for the answer to it."""
        return (await self.wait_answer(await self.say_voice(port))).name

    async def ask_data(self, port: int = 0) -> str:
        """Send DTLS, and wait for the answer to it."""
        return (await self.wait_answer(await self.say_data(port))).name

    async def ask_secret(self, port: int = 0) -> str:
        """Send SRTCP, and wait for the answer to it."""
        return (await self.wait_answer(await self.say_secret(port))).name

    async def report(self, port: int = 0) -> str:
        """Send RTCP, and wait for more RTCP than there was."""
        before = len(self.reports)
        await self.say_report(port)
        await self.wait(lambda: len(self.reports) > before)
        return self.reports[-1].name

    @property
    def reports(self) -> list[Heard]:
        """The RTCP that it has heard, but for goodbyes."""
        return [each for each in self.heard if each.kind == "rtcp" and not each.byes]

    async def wait_answer(self, question: bytes) -> Heard:
        """Wait for the answer to a question."""
        await self.wait(lambda: any(each.question == question for each in self.heard))
        (answer,) = (each for each in self.heard if each.question == question)
        return answer

    async def wait(self, condition: Callable[[], object]) -> None:
        """Wait until something is true that depends on what it has heard."""
        while not condition():
            await self._news.wait()

    def _question(self) -> bytes:
        question = b"%06x%06d" % (self.ssrc, next(self._questions))
        self._asked.add(question)
        return question

    async def listen(self) -> None:
        """Hear all that comes, from where it was asked only."""
        with suppress(trio.ClosedResourceError):
            while True:
                payload, (host, port) = await self.sock.recvfrom(65536)
                heard = hear(payload, port)
                if host != LOCALHOST or (heard.question and heard.question not in self._asked):
                    self.strange.append(payload)
                self.heard.append(heard)
                self._news.set()
                self._news = trio.Event()


@asynccontextmanager
async def saying(*words: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Say all of it again and again for the length of a block."""

    async def keep_saying() -> None:
        while True:
            for word in words:
                await word()
            await trio.sleep(IN_TURN)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_saying)
        yield
        nursery.cancel_scope.cancel()


@attrs.define(eq=False)
class Calls:
    """A service of calls, with its servers and its callers, which outlive the proxy.

    Attributes:
        world: Where they live.
        ports: The service's ports, from an even one on.
        path: Directory of the state, if it is saved.
        room: The service.
        phones: All phones there ever were.
    """

    world: World
    ports: range
    path: Path | None
    room: Room = attrs.field(init=False)
    phones: list[Phone] = attrs.field(factory=list)
    _stack: AsyncExitStack = attrs.field(factory=AsyncExitStack)
    _probe: trio.socket.SocketType = attrs.field(init=False)
    _hosts: itertools.count[int] = attrs.field(factory=lambda: itertools.count(2))

    def __attrs_post_init__(self) -> None:
        self._probe = self.world.open_socket()

    @property
    def relay(self) -> Relay:
        """The service's relay."""
        return self.room.installed().relay

    def counted(self, kind: str, reason: str) -> int:
        """Return how many datagrams were ``dropped``, or sessions have ``ended``, for a reason."""
        count: int = self.relay.counters()[kind][reason]
        return count

    async def settle(self) -> None:
        """Wait until nothing can happen any more but by time.

        Loopback hands datagrams over in order, though on a busy machine not at once: when one that
        was sent after all others has arrived, these have too.
        """
        for _ in range(_HOPS):
            await self._probe.sendto(b"", self._probe.getsockname())
            await self._probe.recvfrom(1)
            await wait_all_tasks_blocked(0.001)

    # Who takes part

    def server(self, name: str, **options: Any) -> MediaServer:
        """Return a new server, which answers."""
        server = MediaServer(name, f"127.0.0.{next(self._hosts)}", self.ports, **options)
        server.live(self.world)
        return server

    def phone(self, host: str = LOCALHOST, port: int = 0, *, to: int = 0) -> Phone:
        """Return a new phone, which sends to the first port unless something else is said."""
        phone = Phone(self.world.open_socket(host, port), to or self.ports[0])
        self.phones.append(phone)
        self.world.nursery.start_soon(phone.listen)
        return phone

    def pair(self, host: str = LOCALHOST) -> tuple[Phone, Phone]:
        """Return the two phones of a caller with a port for RTP and one for RTCP."""
        voice, control = self.phone(host), self.phone(host, to=self.ports[1])
        control.ssrc = voice.ssrc
        return voice, control

    # Changes

    async def deploy(self, *servers: MediaServer | str, **options: Any) -> DrainResult:
        """Deploy, and wait until the drain is over."""
        return await self.room.deploy("game", *map(str, servers), **self._options(options))

    async def begin(self, *servers: MediaServer | str, **options: Any) -> Deploying:
        """Begin a deploy, and wait until it has switched; a patient one if nothing is said."""
        return await self.room.begin("game", *map(str, servers), **self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        ranges = (f"{self.ports[0]}-{self.ports[-1]}",)
        return {"protocol": "webrtc", "port": 0, "port_ranges": ranges} | options

    async def start(self) -> None:
        """Start a proxy."""
        self.room = await self._stack.enter_async_context(open_services(self.path, self.world))

    async def stop(self) -> None:
        """Stop the proxy."""
        await self._stack.aclose()

    async def restart(self) -> None:
        """Let another proxy go on with state and sessions."""
        await self.stop()
        await self.start()


@asynccontextmanager
async def open_calls(path: Path | None = None, *, ports: int = 4) -> AsyncIterator[Calls]:
    """Run a service for the length of a block; nobody may have heard what was another's.

    Args:
        path: Directory where services and sessions are saved; None saves nothing.
        ports: How many ports there are.
    """
    async with open_world() as world:
        calls = Calls(world, free_range(ports), path)
        await calls.start()
        try:
            yield calls
        finally:
            await calls.stop()
        assert [phone.strange for phone in calls.phones if phone.strange] == []
