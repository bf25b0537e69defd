"""Scripted targets for tests of deployments and services: no network, no HTTP.

A room is services with all that surrounds them; its state file is a real one.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from kamal_proxy import state_format
from kamal_proxy.control.messages import Event
from kamal_proxy.deployment import Deployment, Drain
from kamal_proxy.errors import StateError
from kamal_proxy.health import ProbeResult
from kamal_proxy.http.error_pages import load_error_pages
from kamal_proxy.logs import Log
from kamal_proxy.metrics import Metrics
from kamal_proxy.options import DeploymentOptions, DeployOptions, RolloutOptions, ServiceOptions
from kamal_proxy.services import Services
from kamal_proxy.state import SavedService, StateFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    import pytest

    from kamal_proxy.deployment import DrainResult
    from kamal_proxy.probing import Watched
    from kamal_proxy.router import RoutingTable
    from kamal_proxy.service import Service
    from kamal_proxy.target_options import HealthCheckOptions

HANG = "hang"


@attrs.define(eq=False)
class Probes:
    """Answers probes by a script: target name -> results in turn, the last one for ever.

    A result is True, a reason why not, or ``HANG``. Unknown targets are healthy.
    """

    script: dict[str, list[bool | str]] = attrs.field(factory=dict)
    times: dict[str, list[float]] = attrs.field(factory=dict)

    async def __call__(self, target: Watched, options: HealthCheckOptions) -> ProbeResult:
        self.times.setdefault(target.name, []).append(trio.current_time())
        await trio.lowlevel.checkpoint()
        results = self.script.get(target.name, [True])
        result = results.pop(0) if len(results) > 1 else results[0]
        if result == HANG:
            await trio.sleep_forever()
        url = f"http://{target.name}{options.path}"
        return ProbeResult(result is True, "status 200" if result is True else str(result), url)


class NoCertificates:
    """Obtains nothing, and has nothing against TLS."""

    def require_possible(self, options: ServiceOptions) -> None:
        """Allow everything."""

    def want(self, routes: RoutingTable) -> None:
        """Want nothing."""

    def try_again(self, service: str) -> None:
        """Try nothing."""


@attrs.define(eq=False)
class Connections:
    """Remembers whether it was closed, and how often it was trimmed before."""

    host: str
    port: int
    scheme: str
    closed: bool = False
    trimmed: int = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()

    def trim(self) -> None:
        assert not self.closed
        self.trimmed += 1

    def close(self) -> None:
        self.closed = True


@attrs.define(eq=False)
class Request:
    """A request in flight that ends when told to, at once or by itself."""

    deployment: Deployment
    obedient: bool = True
    aborted: bool = False
    drains: list[Drain] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.deployment.begin(self)

    def begin_drain(self, drain: Drain) -> None:
        self.drains.append(drain)

    def abort_drained(self) -> None:
        self.aborted = True
        if self.obedient:
            self.end()

    def end(self) -> None:
        self.deployment.end(self)


@attrs.define(eq=False)
class Lines:
    """Log lines as they were written."""

    texts: list[str] = attrs.field(factory=list)

    def log(self, *, debug: bool = False) -> Log:
        return Log(self.texts.append, debug=debug)

    def of(self, message: str) -> list[dict[str, Any]]:
        """Return the lines with that message, without the keys that all lines have."""
        documents = map(json.loads, self.texts)
        return [
            {key: value for key, value in line.items() if key not in ("time", "level", "msg")}
            for line in documents
            if line["msg"] == message
        ]

    @property
    def messages(self) -> list[str]:
        return [json.loads(text)["msg"] for text in self.texts]


def save_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads run in this one: a clock that jumps would not wait for another.

    Like a real one, it notices a cancellation before the call and never after it.
    """

    async def run_sync(
        call: Callable[..., object],
        *arguments: object,
        limiter: trio.CapacityLimiter,
        abandon_on_cancel: bool = False,
    ) -> object:
        await trio.lowlevel.checkpoint_if_cancelled()
        result = call(*arguments)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


class BrokenState(StateFile[SavedService]):
    """A state file that can be read, but not written once ``broken`` is set."""

    broken = False

    def save(self, services: Iterable[SavedService]) -> None:
        if self.broken:
            raise StateError("no space left")
        super().save(services)


def request(
    name: str,
    *targets: str,
    readers: tuple[str, ...] = (),
    hosts: tuple[str, ...] = (),
    timeout: float = 5,
    drain: float = 10,
    force: bool = False,
) -> DeployOptions:
    """Build the options of a deploy; a service answers to its own name."""
    return DeployOptions(
        service=name,
        targets=targets or ("v1",),
        read_targets=readers,
        service_options=ServiceOptions(hosts=hosts or (name,)),
        deployment_options=DeploymentOptions(
            deploy_timeout=timeout, drain_timeout=drain, force=force
        ),
    )


@attrs.define(eq=False)
class Room:
    """Services with all that surrounds them.

    Attributes:
        events: What was told about the changes that were made through it.
    """

    services: Services
    probes: Probes
    lines: Lines
    state: BrokenState
    nursery: trio.Nursery
    events: list[Event] = attrs.field(factory=list)

    async def deploy(self, name: str, *targets: str, **options: Any) -> DrainResult:
        return await self.services.deploy(request(name, *targets, **options), self.events.append)

    async def deploy_rollout(
        self, name: str, *targets: str, readers: tuple[str, ...] = (), **options: Any
    ) -> DrainResult:
        deployment = request(name, *targets, **options).deployment_options
        rollout = RolloutOptions(
            targets=targets, read_targets=readers, deployment_options=deployment
        )
        return await self.services.deploy_rollout(name, rollout, self.events.append)

    @property
    def serving(self) -> dict[str, list[str]]:
        """Active targets in the routing table, by service."""
        return {s.name: [t.name for t in s.active.targets] for s in self.services.routes}

    @property
    def saved(self) -> dict[str, str]:
        """First active target on disk, by service."""
        if not self.state.path.exists():
            return {}
        return {
            entry["name"]: entry["active_targets"][0]
            for entry in json.loads(self.state.path.read_bytes())
        }

    @property
    def agrees(self) -> bool:
        """Whether the file says what the routing table does."""
        before = self.state.path.read_bytes()
        self.state.save([service.saved() for service in self.services.routes])
        return self.state.path.read_bytes() == before

    def service(self, name: str) -> Service:
        """Return a service of the routing table."""
        service = self.services.routes.get(name)
        assert service is not None
        return service

    def active(self, name: str) -> Deployment:
        """Return the active deployment of a service."""
        return self.service(name).active

    def rollout(self, name: str) -> Deployment:
        """Return the rollout deployment of a service."""
        deployment = self.service(name).rollout
        assert deployment is not None
        return deployment


@asynccontextmanager
async def open_room(path: Path, **script: list[bool | str]) -> AsyncIterator[Room]:
    """Run services whose state is in a directory, and whose targets do what ``script`` says."""
    probes, lines = Probes(dict(script)), Lines()
    with BrokenState(path / "kamal-proxy.state", state_format) as state:
        services = Services(
            state,
            lines.log(),
            probe=probes,
            connect=Connections,
            load_pages=load_error_pages,
            certificates=NoCertificates(),
            metrics=Metrics(),
        )
        async with trio.open_nursery() as nursery:
            await services.start(nursery, services.restore())
            yield Room(services, probes, lines, state, nursery)
            nursery.cancel_scope.cancel()


def run_with_every_cancellation(attempt: Callable[[int], bool], *, limit: int = 2000) -> int:
    """Call ``attempt`` with 1, 2, ... until it says that no step was left to cancel at."""
    for step in range(1, limit):
        if not attempt(step):
            return step
    raise AssertionError("it never ran to its end")
