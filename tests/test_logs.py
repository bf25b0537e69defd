"""Log lines: their exact shape, what is escaped, and a writer that never blocks."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from kamal_proxy.logs import LineWriter, Log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEYS = [
    *["time", "level", "msg", "host", "port", "path", "request_id", "status", "service", "target"],
    *["duration", "method", "req_content_length", "req_content_type", "resp_content_length"],
    *["resp_content_type", "client_addr", "client_port", "remote_addr", "user_agent", "proto"],
    *["scheme", "query"],
]
REQUEST: dict[str, Any] = {
    "host": b"app.test",
    "port": 80,
    "path": b"/",
    "request_id": b"id",
    "status": 200,
    "service": "app",
    "target": "web:80",
    "duration": 1234,
    "method": b"GET",
    "req_content_length": -1,
    "req_content_type": b"",
    "resp_content_length": 5,
    "resp_content_type": b"text/plain",
    "client_addr": "192.0.2.7",
    "client_port": 4711,
    "remote_addr": b"1.1.1.1",
    "user_agent": b"curl",
    "proto": "HTTP/1.1",
    "scheme": "http",
    "query": b"a=b",
    "headers": [],
}


def test_a_request_line() -> None:
    lines: list[str] = []
    Log(lines.append).request(**{**REQUEST, "headers": [("req_x", b"1"), ("resp_y", b"2")]})
    line = json.loads(lines[0])
    assert list(line) == [*KEYS, "req_x", "resp_y"]
    assert line["level"] == "INFO"
    assert line["msg"] == "Request"
    assert line["client_port"] == "4711"
    assert (line["status"], line["duration"], line["req_content_length"]) == (200, 1234, -1)
    assert (line["path"], line["req_x"], line["resp_y"]) == ("/", "1", "2")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'a"b\\c', 'a"b\\c'),
        (b"\n\r\t\0\x1f\x7f", "\n\r\t\0\x1f\x7f"),
        ("é✓\u2028".encode(), "é✓\u2028"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd" * 3),
    ],
)
def test_escaping(raw: bytes, text: str) -> None:
    lines: list[str] = []
    fields = {key: raw for key, value in REQUEST.items() if isinstance(value, bytes)}
    Log(lines.append).request(**{**REQUEST, **fields})
    assert "\n" not in lines[0]
    lines[0].encode()
    line = json.loads(lines[0])
    assert all(line[key] == text for key in fields)


def test_levels_and_values() -> None:
    lines: list[str] = []
    log = Log(lines.append)
    log.debug("unwanted")
    log.info("a", b=True, n=1, f=0.5, l=("x", 'y"'), raw=b"\xff", lone="\ud800")
    log.warning("b")
    log.error("c")
    Log(lines.append, debug=True).debug("d")
    documents = [json.loads(line) for line in lines]
    assert [(d["level"], d["msg"]) for d in documents] == [
        ("INFO", "a"),
        ("WARN", "b"),
        ("ERROR", "c"),
        ("DEBUG", "d"),
    ]
    del documents[0]["time"]
    first = {"level": "INFO", "msg": "a", "b": True, "n": 1, "f": 0.5}
    assert documents[0] == {**first, "l": ["x", 'y"'], "raw": "\ufffd", "lone": "?"}


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_700_000_000_123_456_789, "2023-11-14T22:13:20.123456789Z"),
        (1_700_000_000_120_000_000, "2023-11-14T22:13:20.12Z"),
        (1_700_000_000_000_000_010, "2023-11-14T22:13:20.00000001Z"),
        (1_700_000_010_000_000_000, "2023-11-14T22:13:30Z"),
    ],
)
def test_time(monkeypatch: pytest.MonkeyPatch, nanoseconds: int, text: str) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds)
    lines: list[str] = []
    Log(lines.append).info("x")
    assert json.loads(lines[0])["time"] == text


@settings(deadline=None, max_examples=100)
@given(st.text(), st.binary(max_size=20))
def test_every_line_is_one_json_document(text: str, raw: bytes) -> None:
    lines: list[str] = []
    Log(lines.append).info("x", text=text, raw=raw)
    assert "\n" not in lines[0]
    assert json.loads(lines[0])["text"] == text
    lines[0].encode()


# Writing


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    ends = list(os.pipe())
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


def read(end: int) -> bytes:
    data = b""
    while True:
        try:
            part = os.read(end, 1 << 20)
        except BlockingIOError:
            return data
        data += part


def numbered(count: int) -> list[str]:
    return [f"{number:08d}" + "x" * 1000 for number in range(count)]


def test_a_line_is_written_at_once(pipe: list[int]) -> None:
    writer = LineWriter(pipe[1])
    writer.write("hello")
    assert read(pipe[0]) == b"hello\n"
    writer.write("é" * 5000)
    assert read(pipe[0]) == "é".encode() * 5000 + b"\n"


async def test_lines_of_one_turn_are_written_together(
    pipe: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def write(fd: int, data: bytes) -> int:
        sizes.append(len(data))
        return real(fd, data)

    real = os.write
    monkeypatch.setattr(os, "write", write)
    path = tmp_path / "log"
    lines = numbered(40)
    size = sum(len(line) + 1 for line in lines)
    with path.open("wb") as file:
        for fd in (pipe[1], file.fileno()):
            writer = LineWriter(fd)
            async with trio.open_nursery() as nursery:
                await nursery.start(writer.run)
                for line in lines[:20]:
                    writer.write(line)
                assert not sizes, "nobody has had a turn yet"
                await wait_all_tasks_blocked()
                assert sum(sizes) == size / 2
                assert max(sizes) <= 4096 or fd == file.fileno()
                assert len(sizes) == (1 if fd == file.fileno() else -(-size // 2 // 4096))
                nursery.cancel_scope.cancel()
            sizes.clear()
            for line in lines[20:]:
                writer.write(line)
            assert len(sizes) == 20
            sizes.clear()
        assert path.read_text().split() == lines
    assert read(pipe[0]).decode().split() == lines


async def test_a_full_pipe_never_blocks_and_keeps_order(pipe: list[int]) -> None:
    writer = LineWriter(pipe[1])
    lines = numbered(500)
    got = b""
    async with trio.open_nursery() as nursery:
        await nursery.start(writer.run)
        for line in lines:
            writer.write(line)
        for _ in range(100):
            got += read(pipe[0])
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert got.decode().split() == lines


async def test_what_does_not_fit_is_counted_and_reported(pipe: list[int]) -> None:
    writer = LineWriter(pipe[1], max_pending=20_000)
    lines = numbered(500)
    got = b""
    async with trio.open_nursery() as nursery:
        await nursery.start(writer.run)
        for line in lines:
            writer.write(line)
        for _ in range(20):
            got += read(pipe[0])
            await wait_all_tasks_blocked()
        writer.write("after")
        await wait_all_tasks_blocked()
        got += read(pipe[0])
        nursery.cancel_scope.cancel()
    texts = got.decode().splitlines()
    kept = len(texts) - 2
    assert texts[:kept] == lines[:kept]
    report = json.loads(texts[-2])
    assert (report["level"], report["count"]) == ("WARN", len(lines) - kept)
    assert texts[-1] == "after"


def test_a_broken_pipe_is_survived() -> None:
    reader, end = os.pipe()
    writer = LineWriter(end)
    os.close(reader)
    writer.write("lost")
    writer.write("lost, too")
    writer.close()
    os.close(end)


async def test_a_pipe_that_breaks_while_lines_wait() -> None:
    reader, end = os.pipe()
    writer = LineWriter(end)
    async with trio.open_nursery() as nursery:
        await nursery.start(writer.run)
        for line in numbered(200):
            writer.write(line)
        await wait_all_tasks_blocked()
        os.close(reader)
        await wait_all_tasks_blocked()
        writer.write("lost")
        nursery.cancel_scope.cancel()
    writer.close()
    os.close(end)


def test_close_writes_what_waits(pipe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LineWriter(pipe[1])
    lines = numbered(70)
    for line in lines:
        writer.write(line)
    got = read(pipe[0])
    writer.close()
    assert (got + read(pipe[0])).decode().split() == lines


def test_close_gives_up_after_its_limit(pipe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 0.4
        return now

    monkeypatch.setattr(time, "monotonic", monotonic)
    writer = LineWriter(pipe[1])
    for line in numbered(200):
        writer.write(line)
    writer.close()
    assert now < 3
    assert len(read(pipe[0])) > 50_000, "as much as the pipe took"
