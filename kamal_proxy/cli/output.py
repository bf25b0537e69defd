"""What commands show: the table of ``list``, the progress of a change, and errors.

Progress is for people only: without a terminal nothing of it is written.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Self, TextIO

from kamal_proxy.durations import format_duration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from kamal_proxy.control.messages import Event
    from kamal_proxy.errors import KamalProxyError

_HEADER, _FIRST, _PLAIN, _RESET = "\033[3;94m", "\033[1;34m", "\033[m", "\033[0m"
_CLEAR_LINE = "\r\033[K"
_LABEL = 10  # columns of the word that begins a line of progress


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the first being the header, byte for byte as the original does.

    Columns are padded by their length in UTF-8 and always coloured.
    """
    widths = [max(map(_length, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            style = _HEADER if number == 0 else _FIRST if index == 0 else _PLAIN
            cells.append(f"{style}{cell}{_RESET}{' ' * (width - _length(cell))}  ")
        lines.append("".join(cells) + "\n")
    return "".join(lines)


def _length(cell: str) -> int:
    return len(cell.encode("utf-8", "surrogatepass"))


def print_error(error: KamalProxyError) -> None:
    """Print an error's details and then its sentence to stderr."""
    if sys.stderr is None:
        return
    for line in error.details:
        sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.write(f"Error: {error}\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """Escape control characters; what a target answered must not steer the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class Progress:
    """Shows the events of a change on a terminal; use it as a context manager.

    Results of probes and the number of requests in flight share one line that is rewritten in
    place; what is settled gets a line of its own.

    Args:
        stream: Where to show them; nothing is written unless it is a terminal.
        draining: Which requests those are whose end is waited for, after their number.
        unit: The noun for one of what is in flight.
        summary: Whether the last line tells how the drain went; a command that prints that as its
            result needs it only once.
    """

    def __init__(
        self,
        stream: TextIO | None,
        draining: str,
        *,
        unit: str = "request",
        summary: bool = True,
    ) -> None:
        self._draining = draining
        self._unit = unit
        self._tells_drain = summary
        self._stream = stream if stream is not None and stream.isatty() else None
        self._rewrites = os.environ.get("TERM", "dumb") != "dumb"
        self._probes: dict[str, int] = {}
        self._line_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clear()

    def show(self, event: Event) -> None:
        """Show one event; kinds that this version does not know are passed over."""
        if self._stream is None:
            return
        digits = 3 if event.elapsed < 1 else 1 if event.elapsed < 60 else 0
        after = format_duration(round(event.elapsed, digits))
        match event.event:
            case "probe" if not event.ok:
                tries = self._probes[event.target] = self._probes.get(event.target, 0) + 1
                times = f" ({tries} tries)" if tries > 1 else ""
                self._rewrite("waiting", f"{event.target}: {event.result}{times}, {after}")
            case "healthy":
                self._settle("healthy", f"all targets answer, after {after}")
            case "switched":
                self._settle("switched", f"new {self._unit}s go to the new targets")
            case "draining" if event.in_flight:
                left = counted(event.in_flight, self._unit)
                self._rewrite("draining", f"{left} {self._draining}")
            case "done":
                self._settle("done", self._summary(event, after))

    def _summary(self, event: Event, after: str) -> str:
        parts = [f"after {after}"]
        if event.completed and self._tells_drain:
            parts.append(f"{counted(event.completed, self._unit)} finished")
        if event.cancelled and self._tells_drain:
            parts.append(f"{counted(event.cancelled, self._unit)} cut off by the drain timeout")
        return ", ".join(parts)

    def _rewrite(self, label: str, text: str) -> None:
        if self._stream is None or not self._rewrites:
            return
        line = f"{label:<{_LABEL}}{printable(text)}"
        self._stream.write(_CLEAR_LINE + line[: self._columns() - 1])
        self._stream.flush()
        self._line_open = True

    def _settle(self, label: str, text: str) -> None:
        self._clear()
        if self._stream is not None:
            self._stream.write(f"{label:<{_LABEL}}{text}\n")
            self._stream.flush()

    def _clear(self) -> None:
        if self._line_open and self._stream is not None:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._line_open = False

    def _columns(self) -> int:
        assert self._stream is not None
        # A pseudo-terminal whose size nobody set says 0.
        return os.get_terminal_size(self._stream.fileno()).columns or 80


def counted(count: int, unit: str) -> str:
    """Return a number of things in words, such as ``1 session`` or ``2 sessions``."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
