"""Those who use what the story deploys, and the judgement of what they lost. Does no IO."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from example.load import Request
from example.sessions import Sessions, judge_sessions
from example.stage import milliseconds
from example.verdict import Deploy, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Sequence


@attrs.define(eq=False)
class Audience:
    """Those who use a service, and what became of all that they sent.

    Attributes:
        name: What they are called.
        sends: What they send.
        deploys: The deploys of the service, by version.
        records: What became of each.
    """

    name: str
    sends: str
    deploys: list[Deploy]
    records: list[Request] = attrs.field(factory=list)

    @property
    def lost(self) -> list[Request]:
        """What got no answer, or a wrong one."""
        return [record for record in self.records if record.error]

    def answers(self, since: float = 0.0) -> dict[str, int]:
        """Count the answers of each instance to what was sent after a moment."""
        counted = Counter(r.instance for r in self.records if not r.error and r.began >= since)
        return dict(sorted(counted.items()))

    @property
    def versions(self) -> dict[str, int]:
        """Count the answers of each version: those of v1-a and v1-b together."""
        counted: Counter[str] = Counter()
        for name, count in self.answers().items():
            counted[version_of(name)] += count
        return dict(counted)


@attrs.frozen
class Losses:
    """What was lost.

    Attributes:
        verdicts: One for each audience.
        sessions: What became of the sessions of the last audience, which is that of UDP.
        cut: Sessions that deploys cut.
        died: What was lost with a replica that was killed, which no proxy can help.
    """

    verdicts: tuple[Verdict, ...]
    sessions: Sessions
    cut: int
    died: int

    @property
    def nothing(self) -> bool:
        """Whether nothing was lost that could be kept, though there was something to lose."""
        clean = all(verdict.clean for verdict in self.verdicts)
        return clean and self.sessions.clean and not self.cut


def judge_losses(audiences: Sequence[Audience], killed: tuple[float, float], cut: int) -> Losses:
    """Return what audiences lost.

    Args:
        audiences: The last one is that of UDP.
        killed: From when until when a replica of the others' service was killed. What was under
            way then may be lost with it.
        cut: How many sessions deploys cut, by what they say.
    """
    verdicts = []
    died = 0
    for audience in audiences:
        spared = [
            record
            for record in audience.records
            if audience is audiences[-1] or not (record.error and _overlaps(record, killed))
        ]
        died += len(audience.records) - len(spared)
        records = [_by_version(record) for record in spared]
        verdicts.append(judge(records, audience.deploys))
    return Losses(tuple(verdicts), judge_sessions(records, verdicts[-1].switches), cut, died)


def table_of(audiences: Sequence[Audience], losses: Losses) -> Table:
    """Return what was lost, as a table."""
    table = Table(show_header=True, safe_box=True)
    table.add_column()
    for name in ("sent", "lost", "wrong", "median", "slowest"):
        table.add_column(name, justify="right")
    table.add_column("answered by")
    for audience, verdict in zip(audiences, losses.verdicts, strict=True):
        table.add_row(
            audience.sends,
            f"{verdict.requests:,}",
            f"{verdict.failures:,}",
            f"{verdict.wrong:,}",
            milliseconds(verdict.median),
            milliseconds(verdict.slowest),
            ", ".join(f"{name} {count:,}" for name, count in audience.versions.items()),
        )
    return table


def version_of(name: str) -> str:
    """Return the version of an instance, with which its name begins."""
    return name.partition("-")[0]


def _by_version(record: Request) -> Request:
    return record._replace(instance=version_of(record.instance))


def _overlaps(record: Request, moment: tuple[float, float]) -> bool:
    began, until = moment
    return record.began <= until and record.ended >= began
