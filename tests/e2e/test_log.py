"""The log that people grep: one line for each request, the contract's keys in its order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.running import REQUEST_FIELDS, open_command
from tests.scripted import ConnectionCut, open_client, reply

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Command
    from tests.scripted import Upstream

KEYS = ["time", "level", "msg", *REQUEST_FIELDS]


async def test_request_line(command: Command, upstream: Upstream) -> None:
    await command.deploy(
        "web",
        *upstream.flags(),
        "--log-request-header=Cache-Control,X-Two",
        "--log-response-header=X-Request-ID",
    )
    upstream.script(
        reply(
            b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nX-Request-ID: theirs\r\n"
            b"Content-Length: 3\r\n\r\nabc"
        )
    )
    async with open_client(command.port) as client:
        own_port = client.sock.getsockname()[1]
        await client.request(
            b'POST /a%20b/%22"?q=%20&x HTTP/1.1\r\nHost: App.example:81\r\nX-Two: 1\r\nX-Two: 2\r\n'
            b"Content-Type: text/x\r\nContent-Length: 2\r\nUser-Agent: a\xc3\xa9\\\r\n"
            b"X-Request-ID: id-1\r\nX-Forwarded-For: 10.0.0.1\r\n\r\nhi"
        )
        (line,) = await command.lines.wait_requests(1)

    assert list(line) == [*KEYS, "req_cache_control", "req_x_two", "resp_x_request_id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", line.pop("time"))
    assert 0 < line.pop("duration") < 60e9
    assert line == {
        "level": "INFO",
        "msg": "Request",
        "host": "App.example:81",
        "port": command.port,
        "path": '/a b/""',
        "request_id": "id-1",
        "status": 201,
        "service": "web",
        "target": upstream.target,
        "method": "POST",
        "req_content_length": 2,
        "req_content_type": "text/x",
        "resp_content_length": 3,
        "resp_content_type": "text/plain",
        "client_addr": "127.0.0.1",
        "client_port": str(own_port),
        "remote_addr": "10.0.0.1",
        "user_agent": "a\u00e9\\",
        "proto": "HTTP/1.1",
        "scheme": "http",
        "query": "q=%20&x",
        "req_cache_control": "",
        "req_x_two": "1,2",
        "resp_x_request_id": "theirs",
    }


async def test_every_kind_of_request_has_one_line_of_the_same_shape(
    command: Command, upstream: Upstream
) -> None:
    await command.deploy("web", *upstream.flags(), "--host=a.example")
    expected = []
    for data, status in (
        (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", 200),
        (b"HEAD / HTTP/1.1\r\nHost: a.example\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\n\r\n", 505),
        (b"GET / HTTP/1.0\r\nHost: a.example\r\n\r\n", 200),
        (b"GET", 499),
    ):
        async with open_client(command.port) as client:
            await client.send(data)
            if status == 499:
                client.shutdown_write()
                await client.receive_eof()
            else:
                method = b"HEAD" if data.startswith(b"HEAD") else b"GET"
                assert (await client.receive_response(method)).status == status
            expected.append(status)
            lines = await command.lines.wait_requests(len(expected))
    assert [line["status"] for line in lines] == expected
    for line in lines:
        ended_well = line["status"] == 200
        assert list(line) == (KEYS if ended_well else [*KEYS, "reason"])


async def test_broken_targets_are_told(command: Command, upstream: Upstream) -> None:
    await command.deploy("web", *upstream.flags())
    upstream.script(reply(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"))
    async with open_client(command.port) as client:
        await client.send(b"GET /cut HTTP/1.1\r\nHost: a\r\n\r\n")
        client.unread(await client.receive_until(b"part"))
        with pytest.raises(ConnectionCut):
            await client.receive_response()
        (line,) = await command.lines.wait_requests(1)

    assert (line["status"], line["resp_content_length"]) == (200, 4)
    error = await command.lines.wait_for_message("Error while proxying")
    assert (error["level"], error["target"], error["path"]) == ("ERROR", upstream.target, "/cut")


async def test_a_log_that_nobody_reads_does_not_stop_serving(
    directory: Path, upstream: Upstream
) -> None:
    count = 1500  # many times what a pipe holds
    async with open_command(directory, read_output=False) as command:
        await command.deploy("web", *upstream.flags())
        async with open_client(command.port) as client:
            for _ in range(count):
                assert (await client.get("/" + "x" * 300)).status == 200
        assert (await command.kp("list")).code == 0
        assert len(command.lines.all) < 10
