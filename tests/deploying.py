"""Scripted targets for tests of deployments and services: no network, no HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import trio

from kamal_proxy.deployment import Deployment
from kamal_proxy.health import ProbeResult
from kamal_proxy.logs import Log

if TYPE_CHECKING:
    from collections.abc import Callable

    from kamal_proxy.deployment import Target
    from kamal_proxy.options import HealthCheckOptions

HANG = "hang"


@attrs.define(eq=False)
class Probes:
    """Answers probes by a script: target name -> results in turn, the last one for ever.

    A result is True, a reason why not, or ``HANG``. Unknown targets are healthy.
    """

    script: dict[str, list[bool | str]] = attrs.field(factory=dict)
    times: dict[str, list[float]] = attrs.field(factory=dict)

    async def __call__(self, target: Target, options: HealthCheckOptions) -> ProbeResult:
        self.times.setdefault(target.name, []).append(trio.current_time())
        await trio.lowlevel.checkpoint()
        results = self.script.get(target.name, [True])
        result = results.pop(0) if len(results) > 1 else results[0]
        if result == HANG:
            await trio.sleep_forever()
        url = f"http://{target.name}{options.path}"
        return ProbeResult(result is True, "status 200" if result is True else str(result), url)


@attrs.define(eq=False)
class Connections:
    """Remembers whether it was closed."""

    host: str
    port: int
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@attrs.define(eq=False)
class Request:
    """A request in flight that ends when told to, at once or by itself."""

    deployment: Deployment
    obedient: bool = True
    aborted: bool = False

    def __attrs_post_init__(self) -> None:
        self.deployment.begin(self)

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


def run_with_every_cancellation(attempt: Callable[[int], bool], *, limit: int = 2000) -> int:
    """Call ``attempt`` with 1, 2, ... until it says that no step was left to cancel at."""
    for step in range(1, limit):
        if not attempt(step):
            return step
    raise AssertionError("it never ran to its end")
