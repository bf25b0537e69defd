"""Judges what became of the sessions of a recorded UDP load, beside what verdict.py says. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from example.load import Request
    from example.verdict import Switch


@attrs.frozen
class Sessions:
    """The numbers. A session is what one client sends from one port.

    Attributes:
        count: All sessions.
        moved: Those that more than one instance answered.
        late: Those that began after a switch, and yet got the instance that was replaced.
        kept: For each switch, those that went on with the replaced instance after it.
    """

    count: int
    moved: int
    late: int
    kept: tuple[int, ...]

    @property
    def clean(self) -> bool:
        """Whether all were where they belong, and every switch had some to keep."""
        return not self.moved and not self.late and all(self.kept)


def judge_sessions(requests: Iterable[Request], switches: Sequence[Switch]) -> Sessions:
    """Return what became of the sessions that ``requests`` are the packets of."""
    began: dict[str, float] = {}
    heard: dict[str, dict[str, float]] = {}  # session -> instance -> its last answer
    for request in requests:
        name = request.connection
        began[name] = min(request.began, began.get(name, request.began))
        instances = heard.setdefault(name, {})
        if not request.error:
            last = instances.get(request.instance, request.ended)
            instances[request.instance] = max(request.ended, last)
    late, kept = set(), []
    for switch in switches:
        moment = switch.moment
        on_old = [
            name
            for name, instances in heard.items()
            if moment is not None and instances.get(switch.old, moment) > moment
        ]
        late |= {name for name in on_old if moment is not None and began[name] > moment}
        kept.append(sum(1 for name in on_old if name not in late))
    return Sessions(
        count=len(began),
        moved=sum(1 for instances in heard.values() if len(instances) > 1),
        late=len(late),
        kept=tuple(kept),
    )
