"""Any order of changes under traffic: no request is lost, or answered by whom it must not be.

Each example runs a proxy, targets that answer with their name, and clients that never rest. A model
keeps for each kind of client when which target, or which refusal, was the right answer. A change
is awaited until it has taken effect; its drain goes on while further changes are made.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from kamal_proxy import PauseOptions, RolloutOptions, RolloutSplit, StopOptions
from kamal_proxy.errors import (
    DeployFailedError,
    ResumedError,
    RolloutNotSetError,
    ServiceNotFoundError,
)
from kamal_proxy.options import DeploymentOptions
from kamal_proxy.services import Services
from tests.running import Embedded, open_embedded
from tests.scripted import Peer, Script, Upstream, ok, open_client, open_upstream

if TYPE_CHECKING:
    from kamal_proxy.control.messages import Event
    from kamal_proxy.deployment import Deployment
    from kamal_proxy.router import RoutingTable
    from tests.scripted import Client, Response

Kind = Literal["plain", "chosen"]
KINDS: tuple[Kind, ...] = ("plain", "chosen")  # the second has a cookie of the rollout
PATIENT = 60.0  # seconds; no drain and no pause gets that long here
# A step of a real proxy with all around it costs too much for as many as other tests get.
EXAMPLES = settings(
    deadline=None,
    max_examples=max(15, settings().max_examples // 40),
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # what depends on timing does not shrink
)


@attrs.define(eq=False)
class Asked:
    """A request, and what became of it.

    Attributes:
        started: When it was sent, on the clock of the model; likewise the other times.
        reached: Which targets it reached, and when.
        left: Whether its client hung up.
    """

    number: int
    kind: Kind
    started: int
    ended: float = math.inf
    status: int = 0
    body: bytes = b""
    reached: list[tuple[str, int]] = attrs.field(factory=list)
    gate: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    left: bool = False


@attrs.define
class Model:
    """What the service is, and what was the right answer when."""

    active: str = ""
    rollout: str = ""
    split: bool = False  # whether the rollout gets those who have its cookie
    pause: str = "running"
    right: dict[tuple[Kind, str], list[tuple[float, float]]] = attrs.field(factory=dict)
    _open: dict[tuple[Kind, str], float] = attrs.field(factory=dict)

    def answer(self, kind: Kind) -> str:
        """Return the target that answers now, or the status of the refusal; nothing in a pause."""
        if not self.active:
            return "404"
        if self.pause != "running":
            return "503" if self.pause == "stopped" else ""
        return self.rollout if kind == "chosen" and self.split and self.rollout else self.active

    def changed(self, began: float, now: float) -> None:
        """Take note that the answers may be other ones, at some moment since ``began``."""
        current = {(kind, answer) for kind in KINDS if (answer := self.answer(kind))}
        for key in self._open.keys() - current:
            self.right.setdefault(key, []).append((self._open.pop(key), now))
        for key in current - self._open.keys():
            self._open[key] = began

    def was_right(self, kind: Kind, answer: str, since: float, until: float) -> bool:
        """Return whether an answer was the right one at some moment."""
        spans = list(self.right.get((kind, answer), ()))
        if (kind, answer) in self._open:
            spans.append((self._open[kind, answer], math.inf))
        return any(first <= until and last >= since for first, last in spans)


class Life:
    """One example: a proxy, its targets, its clients, and the model of it."""

    def __init__(self, proxy: Embedded, targets: trio.Nursery, nursery: trio.Nursery) -> None:
        self.proxy = proxy
        self.model = Model()
        self.asked: list[Asked] = []
        self.cuts: list[list[float]] = []  # from when to when requests were cut
        self.deployments: set[Deployment] = set()
        self._targets = targets
        self._nursery = nursery
        self._clock = itertools.count()
        self._names = itertools.count()
        self._resumed = 0
        self._resting = False
        self.model.changed(self.now(), self.now())

    def now(self) -> int:
        return next(self._clock)

    # Clients

    def ask(self, kind: Kind) -> Asked:
        request = Asked(len(self.asked), kind, self.now())
        self.asked.append(request)
        return request

    async def send(self, client: Client, request: Asked, path: str, headers: str = "") -> Response:
        if request.kind == "chosen":
            headers += "Cookie: kamal-rollout=x\r\n"
        response = await client.get(f"/{path}/{request.number}", headers=headers)
        request.status, request.body = response.status, response.body
        request.ended = self.now()
        return response

    async def once(self, request: Asked, path: str) -> None:
        """Send a request and take exactly one answer."""
        with request.scope:
            async with open_client(self.proxy.port) as client:
                await self.send(client, request, path, "Connection: close\r\n")
                assert await client.receive_eof() == b""

    async def again_and_again(self, kind: Kind) -> None:
        """Send one request after another, until told to rest."""
        while not self._resting:
            async with open_client(self.proxy.port) as client:
                while not self._resting:
                    response = await self.send(client, self.ask(kind), "fast")
                    if response.get(b"connection") == [b"close"]:
                        break

    # Targets

    async def new_target(self) -> tuple[str, Upstream]:
        name = f"t{next(self._names)}"
        return name, await self._targets.start(self._be_target, name)

    async def _be_target(self, name: str, *, task_status: trio.TaskStatus[Upstream]) -> None:
        async with open_upstream(self.answering(name)) as upstream:
            task_status.started(upstream)
            await trio.sleep_forever()

    def answering(self, name: str) -> Script:
        async def serve(peer: Peer) -> None:
            while (received := await peer.receive_request()) is not None:
                _, path, number = received.target.split(b"/")
                request = self.asked[int(number)]
                request.reached.append((name, self.now()))
                if path == b"slow":
                    await request.gate.wait()
                await peer.send(ok(f"{name} {request.number}".encode()))

        return serve

    # Changes

    async def change(
        self,
        run: Callable[[Callable[[Event], None]], Any],
        effect: dict[str, Any],
        sign: Sequence[str],
        *,
        cut: bool,
        resumable: bool = False,
    ) -> None:
        """Begin a change; return once it has taken effect.

        Args:
            run: Makes the change, telling the callback.
            effect: What is another then in the model.
            sign: Events that say that it has taken effect.
            cut: Whether it cuts what is in flight.
            resumable: Whether a resume ends it early.
        """
        began, effective = self.now(), trio.Event()
        span = [began, math.inf]
        if cut:
            self.cuts.append(span)
        resumed = self._resumed

        def progress(event: Event) -> None:
            if event.event in sign and not effective.is_set():
                self._effective(began, effect)
                effective.set()

        async def background() -> None:
            try:
                await run(progress)
            except ResumedError:
                assert resumable
                assert self._resumed > resumed
            assert effective.is_set()
            span[1] = self.now()

        self._nursery.start_soon(background)
        await effective.wait()

    def _effective(self, began: float, effect: dict[str, Any]) -> None:
        for name, value in effect.items():
            setattr(self.model, name, value)
        self.model.changed(began, self.now())
        for service in self._routes():
            self.deployments.update(service.deployments)

    def _routes(self) -> RoutingTable:
        http = self.proxy.proxy._running().services._http
        assert isinstance(http, Services)
        return http.routes

    async def refused(self, error: type[Exception], call: Callable[..., Any], *args: Any) -> None:
        """Make a change that must fail, and change nothing."""
        before = self._routes()
        with pytest.raises(error):
            await call(*args)
        assert self._routes() is before

    async def deploy(self, number: int) -> None:
        name, upstream = await self.new_target()
        cut = number % 4 == 0
        options = upstream.options(drain_timeout=0.0 if cut else PATIENT)
        await self.change(
            lambda progress: self.proxy.proxy.deploy(options, progress),
            {"active": name},
            ["switched"],
            cut=cut,
        )

    async def deploy_fails(self, number: int) -> None:
        _, upstream = await self.new_target()
        upstream.health = 500
        options = upstream.options(deploy_timeout=0.01)
        await self.refused(DeployFailedError, self.proxy.proxy.deploy, options)

    async def deploy_rollout(self, number: int) -> None:
        name, upstream = await self.new_target()
        cut = number % 4 == 0
        options = RolloutOptions(
            targets=(upstream.target,),
            deployment_options=DeploymentOptions(
                drain_timeout=0.0 if cut else PATIENT,
                # Rollout targets are probed where the service says: at its active target's port.
                force=True,
            ),
        )
        call = self.proxy.proxy.deploy_rollout
        if not self.model.active:
            await self.refused(ServiceNotFoundError, call, "web", options)
            return
        await self.change(
            lambda progress: call("web", options, progress),
            {"rollout": name},
            ["switched"],
            cut=cut,
        )

    async def pause(self, number: int) -> None:
        cut = number % 4 == 0
        options = PauseOptions(drain_timeout=0.0 if cut else PATIENT, max_pause=PATIENT)
        await self._hold("paused", self.proxy.proxy.pause, options, cut)

    async def stop(self, number: int) -> None:
        cut = number % 4 == 0
        options = StopOptions(drain_timeout=0.0 if cut else PATIENT)
        await self._hold("stopped", self.proxy.proxy.stop_service, options, cut)

    async def _hold(self, state: str, call: Callable[..., Any], options: Any, cut: bool) -> None:
        if not self.model.active:
            await self.refused(ServiceNotFoundError, call, "web", options)
            return
        await self.change(
            lambda progress: call("web", options, progress),
            {"pause": state},
            ["draining", "done"],
            cut=cut,
            resumable=True,
        )

    async def _at_once(
        self, effect: dict[str, Any], error: type[Exception] | None, call: Any, *args: Any
    ) -> None:
        if not self.model.active:
            error = ServiceNotFoundError
        if error is not None:
            await self.refused(error, call, *args)
            return
        began = self.now()
        await call(*args)
        self._effective(began, effect)

    async def resume(self, number: int) -> None:
        self._resumed += 1
        await self._at_once({"pause": "running"}, None, self.proxy.proxy.resume, "web")

    async def remove(self, number: int) -> None:
        gone = {"active": "", "rollout": "", "split": False, "pause": "running"}
        await self._at_once(gone, None, self.proxy.proxy.remove, "web")

    async def set_rollout(self, number: int) -> None:
        split = [
            RolloutSplit(percentage=0),
            RolloutSplit(percentage=100),
            RolloutSplit(allowlist=("x",)),
            RolloutSplit(allowlist=("y",)),
        ][number % 4]
        error = None if self.model.rollout else RolloutNotSetError
        effect = {"split": number % 4 in (1, 2)}
        await self._at_once(effect, error, self.proxy.proxy.set_rollout, "web", split)

    async def stop_rollout(self, number: int) -> None:
        await self._at_once({"split": False}, None, self.proxy.proxy.stop_rollout, "web")

    # Single requests

    async def fast(self, number: int) -> None:
        """Let a request be answered, or wait for the end of a pause."""
        request = self.ask(KINDS[number % 2])
        if self.model.answer(request.kind):
            await self.once(request, "fast")
        else:
            self._nursery.start_soon(self.once, request, "fast")

    async def slow(self, number: int) -> None:
        """Leave a request in flight."""
        self._nursery.start_soon(self.once, self.ask(KINDS[number % 2]), "slow")

    async def release(self, number: int) -> None:
        """Let targets answer some of what is in flight."""
        for request in self.asked[number % 3 :: 3]:
            request.gate.set()

    async def hang_up(self, number: int) -> None:
        """Let a client go whose request is in flight or waits."""
        pending = [request for request in self.asked if request.ended == math.inf]
        for request in pending[number::8]:
            request.left = True
            request.scope.cancel()

    # The end

    async def finish(self) -> None:
        """Let everything end that goes on."""
        if self.model.pause != "running":
            await self.resume(0)
        self._resting = True
        for request in self.asked:
            request.gate.set()

    async def check(self) -> None:
        """Hold every answer against the model, and find nothing left behind."""
        for request in self.asked:
            self._check(request)
        if self.model.active:
            (described,) = self.proxy.proxy.services()
            assert described.state == "running"
            await self.proxy.proxy.remove("web")
        assert self.proxy.proxy.services() == []
        for deployment in self.deployments:
            await deployment.wait_drained()
            assert deployment.in_flight == 0
        await self.proxy.wait_streams(0)
        answered = [request for request in self.asked if not request.left]
        await self.proxy.lines.wait_requests(len(answered))
        numbers = [int(line["path"].rpartition("/")[2]) for line in self.proxy.lines.requests]
        assert len(numbers) == len(set(numbers)), "logged twice"
        assert {request.number for request in answered} <= set(numbers)
        metrics, _ = self.proxy.proxy.metrics()
        for line in metrics.splitlines():
            if line.startswith(b"kamal_proxy_http_in_flight_requests{"):
                assert line.endswith(b" 0.0"), line
        errors = [line for line in self.proxy.lines.all if line["level"] == "ERROR"]
        assert errors == []

    def _check(self, request: Asked) -> None:
        kind, since, until = request.kind, request.started, request.ended
        assert len(request.reached) <= 1, "no request is sent twice"
        for name, when in request.reached:
            assert self.model.was_right(kind, name, since, when), (name, request)
        if request.left:
            return
        if request.status == 200:
            ((name, _),) = request.reached
            assert request.body == f"{name} {request.number}".encode()
        elif request.status == 504:
            assert any(first <= until and last >= since for first, last in self.cuts), request
        else:
            assert request.status in (404, 503), request
            assert request.reached == []
            assert self.model.was_right(kind, str(request.status), since, until), request


STEPS: tuple[Callable[[Life, int], Any], ...] = (
    Life.deploy,
    Life.deploy,
    Life.deploy_fails,
    Life.deploy_rollout,
    Life.set_rollout,
    Life.set_rollout,
    Life.stop_rollout,
    Life.pause,
    Life.pause,
    Life.stop,
    Life.resume,
    Life.resume,
    Life.remove,
    Life.fast,
    Life.slow,
    Life.slow,
    Life.slow,
    Life.release,
    Life.hang_up,
)
Steps = list[tuple[Callable[[Life, int], Any], int]]


async def live(steps: Steps, directory: Path) -> None:
    async with trio.open_nursery() as targets, open_embedded(data_directory=directory) as proxy:
        async with trio.open_nursery() as nursery:
            life = Life(proxy, targets, nursery)
            await life.deploy(1)
            for kind in KINDS:
                nursery.start_soon(life.again_and_again, kind)
            for step, number in steps:
                await step(life, number)
            await life.finish()
        await life.check()
        targets.cancel_scope.cancel()


@pytest.mark.fuzz
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 7)), min_size=5, max_size=30))
@example([(Life.pause, 1), (Life.slow, 0), (Life.deploy, 1), (Life.resume, 0), (Life.fast, 0)])
@example([(Life.slow, 0), (Life.pause, 1), (Life.resume, 0), (Life.pause, 0), (Life.remove, 0)])
@example(
    [
        *[(Life.deploy_rollout, 1), (Life.set_rollout, 1), (Life.slow, 1), (Life.slow, 0)],
        *[(Life.pause, 1), (Life.stop, 1), (Life.deploy_rollout, 0), (Life.deploy, 0)],
        *[(Life.fast, 1), (Life.resume, 0), (Life.fast, 1), (Life.stop_rollout, 0)],
    ]
)
@EXAMPLES
def test_any_order_of_changes(steps: Steps) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        patch("kamal_proxy.http.downstream.GONE_GRACE", 0.01),
    ):
        trio.run(live, steps, Path(directory))
