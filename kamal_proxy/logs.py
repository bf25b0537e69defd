"""JSON log lines: one object per line, keys ``time``, ``level``, ``msg`` first, then the fields.

The shape is a contract (people grep and parse it). Writing never blocks the event loop for long:
the lines of one turn of the scheduler go to the descriptor together, as far as it takes them, the
others wait in a bounded queue, and what does not fit is counted and reported. Owns no policy about
what is logged.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections import deque
from json.encoder import encode_basestring
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PENDING = 8 * 1024 * 1024  # bytes of log kept while nobody reads it
_FILE_WRITE = 256 * 1024  # bytes at once, where that never blocks
_PIPE_BUF = 4096  # a pipe that polls writable takes this much without blocking (pipe(7))
_FLUSH_AT_EXIT = 1.0  # seconds

_quote = encode_basestring


class Log:
    """Formats log lines and hands each to ``write``, without its newline.

    Args:
        write: Takes one line; must not block for long and must not raise.
        debug: Whether debug lines are wanted.

    Attributes:
        write: As given.
        debug_enabled: Whether debug lines are wanted.
    """

    def __init__(self, write: Callable[[str], object], *, debug: bool = False) -> None:
        self.write = write
        self._second = -1
        self._prefix = ""
        self.debug_enabled = debug

    def debug(self, message: str, **fields: object) -> None:
        """Log at level DEBUG, if wanted."""
        if self.debug_enabled:
            self._line("DEBUG", message, fields)

    def info(self, message: str, **fields: object) -> None:
        """Log at level INFO."""
        self._line("INFO", message, fields)

    def warning(self, message: str, **fields: object) -> None:
        """Log at level WARN."""
        self._line("WARN", message, fields)

    def error(self, message: str, **fields: object) -> None:
        """Log at level ERROR."""
        self._line("ERROR", message, fields)

    def request(
        self,
        *,
        host: bytes,
        port: int,
        path: bytes,
        request_id: bytes,
        status: int,
        service: str,
        target: str,
        duration: int,
        method: bytes,
        req_content_length: int,
        req_content_type: bytes,
        resp_content_length: int,
        resp_content_type: bytes,
        client_addr: str,
        client_port: int,
        remote_addr: bytes,
        user_agent: bytes,
        proto: str,
        scheme: str,
        query: bytes,
        headers: list[tuple[str, bytes]],
        reason: str = "",
    ) -> None:
        """Log one served request; the keywords are the fields of the line, in the contract's order.

        ``duration`` is nanoseconds, ``req_content_length`` -1 for a chunked body, and ``headers``
        are further fields: (``req_<name>`` or ``resp_<name>``, value). ``reason`` is added, after
        all others, to the line of a request that did not end well.
        """
        line = (
            f'{{"time":"{self._time()}","level":"INFO","msg":"Request",'
            f'"host":{text(host)},"port":{port},"path":{text(path)},'
            f'"request_id":{text(request_id)},"status":{status},"service":{_quote(service)},'
            f'"target":{_quote(target)},"duration":{duration},"method":{text(method)},'
            f'"req_content_length":{req_content_length},'
            f'"req_content_type":{text(req_content_type)},'
            f'"resp_content_length":{resp_content_length},'
            f'"resp_content_type":{text(resp_content_type)},"client_addr":"{client_addr}",'
            f'"client_port":"{client_port}","remote_addr":{text(remote_addr)},'
            f'"user_agent":{text(user_agent)},"proto":"{proto}","scheme":"{scheme}",'
            f'"query":{text(query)}'
        )
        for name, value in headers:
            line += f",{_quote(name)}:{text(value)}"
        if reason:
            line += f',"reason":"{reason}"'
        self.write(line + "}")

    def _line(self, level: str, message: str, fields: dict[str, object]) -> None:
        line = f'{{"time":"{self._time()}","level":"{level}","msg":{_quote(message)}'
        for name, value in fields.items():
            line += f",{_quote(name)}:{_value(value)}"
        self.write(line + "}")

    def _time(self) -> str:
        """Return now as Go prints it: RFC 3339, nanoseconds without trailing zeros."""
        second, nanosecond = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = second_text(second)
        if not nanosecond:
            return self._prefix + "Z"
        return f"{self._prefix}.{nanosecond:09d}".rstrip("0") + "Z"


def second_text(second: int) -> str:
    """Return a second since 1970 as it begins the time of a line."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def text(value: bytes) -> str:
    """Return what came from the network as it is in a line, quotation marks included."""
    return _quote(value.decode("utf-8", "replace"))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(_value(item) for item in value) + "]"
    if isinstance(value, bytes):
        return text(value)
    return _quote(str(value).encode("utf-8", "replace").decode())


class LineWriter:
    """Writes lines to a descriptor that may be slow, such as the pipe behind ``docker logs``.

    While :meth:`run` runs, it writes what was added since its last turn; otherwise each line is
    written at once.

    Args:
        fd: The descriptor; it stays in blocking mode, because others may share it.
        max_pending: Bytes kept while the descriptor takes none; further lines are dropped.
    """

    def __init__(self, fd: int, max_pending: int = MAX_PENDING) -> None:
        self._fd = fd
        self._max_pending = max_pending
        self._pending: deque[bytes] = deque()
        self._pending_size = 0
        self._dropped = 0
        self._broken = False
        self._added = trio.Event()
        self._is_running = False
        # A file takes any amount at once.
        self._at_once = _FILE_WRITE if stat.S_ISREG(os.fstat(fd).st_mode) else _PIPE_BUF
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, line: str) -> None:
        """Write one line, or queue it, or count it as dropped."""
        if self._broken:
            return
        data = line.encode("utf-8", "replace") + b"\n"
        if self._pending_size + len(data) > self._max_pending:
            self._write_some(0)
            if self._pending_size + len(data) > self._max_pending:
                self._dropped += 1
                return
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size == len(data):
            if self._is_running:
                self._added.set()
            else:
                self._write_some(0)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what was queued as the descriptor takes it, until cancelled."""
        task_status.started()
        self._is_running = True
        try:
            while True:
                self._added = trio.Event()
                while not self._write_some(0):
                    await trio.lowlevel.wait_writable(self._fd)
                self._report_dropped()
                await self._added.wait()
        finally:
            self._is_running = False

    def close(self) -> None:
        """Write what is still queued, waiting for a slow reader no longer than a second."""
        deadline = time.monotonic() + _FLUSH_AT_EXIT
        while self._pending and not self._broken and time.monotonic() < deadline:
            self._write_some(100)
            self._report_dropped()

    def _report_dropped(self) -> None:
        """Say how many lines were dropped, once there is room for saying it."""
        if self._dropped and not self._pending:
            dropped, self._dropped = self._dropped, 0
            Log(self.write).warning("Log lines dropped: nobody read them", count=dropped)

    def _next_part(self) -> bytes:
        """Return the beginning of what is to be written: as much as may be written at once."""
        parts = []
        size = 0
        for line in self._pending:
            parts.append(line)
            size += len(line)
            if size >= self._at_once:
                break
        return b"".join(parts)[: self._at_once]

    def _write_some(self, patience: int) -> bool:
        """Write until nothing is left or the descriptor takes no more; True if nothing is left.

        Args:
            patience: Milliseconds to wait for the descriptor each time.
        """
        pending = self._pending
        try:
            while pending and self._poll.poll(patience):
                written = os.write(self._fd, self._next_part())
                self._pending_size -= written
                while written and written >= len(pending[0]):
                    written -= len(pending.popleft())
                if written:
                    pending[0] = pending[0][written:]
        except OSError:
            # The reader is gone for good; a proxy must outlive its log.
            self._broken = True
            pending.clear()
            self._pending_size = 0
        return not pending
