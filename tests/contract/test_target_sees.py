"""The contract's section "What the target sees", statement by statement.

Not covered: https as X-Forwarded-Proto and forward-headers being off by default with ``--tls``,
which come with TLS. ``tests/http/test_forwarding.py`` and ``tests/http/test_client_address.py``
have the fields in depth.
"""

from __future__ import annotations

import re

import pytest

from tests.contract.steps import kp, scripts
from tests.contract.tables import Row, ask, play, row

WEB = kp("deploy web --target={a}")
NOT_FORWARDING = kp("deploy web --target={a} --forward-headers=false")
INCOMING = (
    "X-Forwarded-For: 192.0.2.1, 192.0.2.2",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: first.test",
)
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
MILLISECONDS = re.compile(r"t=1[0-9]{12}")
SWITCHED = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"
ADDED = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-request-id",
         "x-request-start", "x-kamal-target")  # fmt: skip


def dropped(*lines: str) -> Row:
    """Make a row: these lines, each with a name of its own, do not pass, and another does."""
    return row(
        f"does not pass: {lines[0]}",
        WEB,
        ask(
            headers=[*lines, "X-Other: 1"],
            sees={line.partition(":")[0].lower(): None for line in lines} | {"x-other": "1"},
        ),
    )


def upgraded(statement: str, *lines: str, connection: str | None, upgrade: str | None) -> Row:
    """Make a row about what of a request for an upgrade the target sees."""
    return row(
        statement, WEB, ask(headers=lines, sees={"connection": connection, "upgrade": upgrade})
    )


ROWS = [
    row(
        "Host as the client sent it",
        WEB,
        *(ask(host=host, sees={"host": host}) for host in ("a.test", "B.Test:8080", "[::1]:80")),
    ),
    dropped("Connection: close"),
    dropped("Keep-Alive: timeout=5"),
    dropped("Proxy-Connection: keep-alive"),
    dropped("Proxy-Authenticate: Basic"),
    dropped("Proxy-Authorization: Basic eA=="),
    dropped("TE: gzip"),
    dropped("Upgrade: other"),
    dropped("Connection: keep-alive, X-One, x-TWO", "X-One: 1", "X-Two: 2"),
    row(
        "nor does the client's own framing",
        WEB,
        ask(
            method="POST",
            headers=["Transfer-Encoding: chunked"],
            body=b"2;a=b\r\nhi\r\n0\r\n\r\n",
            sees={":body": b"hi"},
        ),
    ),
    row(
        "nor those of a response",
        WEB,
        scripts(
            "a",
            b"HTTP/1.1 200 OK\r\nConnection: X-One\r\nX-One: 1\r\nKeep-Alive: 5\r\nX-Two: 2\r\n"
            b"Proxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n",
        ),
        ask(
            gets={
                "connection": None,
                "x-one": None,
                "keep-alive": None,
                "proxy-authenticate": None,
                "x-two": "2",
            }
        ),
    ),
    row(
        "Upgrade and its Connection pass for a real upgrade",
        WEB,
        scripts("a", SWITCHED),
        ask(
            headers=["Connection: keep-alive, Upgrade", "Upgrade: other"],
            sees={"connection": re.compile("(?i)upgrade"), "upgrade": "other"},
            status=101,
            gets={"connection": re.compile("(?i)upgrade"), "upgrade": "other"},
        ),
    ),
    upgraded("Upgrade without Connection is none", "Upgrade: x", connection=None, upgrade=None),
    upgraded(
        "nor is Connection without Upgrade", "Connection: upgrade", connection=None, upgrade=None
    ),
    row(
        "TE: trailers passes",
        WEB,
        ask(headers=["TE: trailers"], sees={"te": "trailers"}),
        ask(headers=["Connection: TE", "TE: gzip, trailers"], sees={"te": "trailers"}),
    ),
    row(
        "X-Forwarded-For: the client's address",
        WEB,
        ask(sees={"x-forwarded-for": "127.0.0.1"}, logs={"remote_addr": "127.0.0.1"}),
    ),
    row(
        "with forward-headers, the default, appended to what came in",
        WEB,
        ask(
            headers=INCOMING,
            sees={"x-forwarded-for": "192.0.2.1, 192.0.2.2, 127.0.0.1"},
            logs={"client_addr": "127.0.0.1", "remote_addr": "192.0.2.1, 192.0.2.2"},
        ),
        ask(
            headers=["X-Forwarded-For: 192.0.2.1", "X-Forwarded-For: 192.0.2.2"],
            sees={"x-forwarded-for": "192.0.2.1, 192.0.2.2, 127.0.0.1"},
        ),
        kp("deploy web --target={a} --forward-headers"),
        ask(headers=INCOMING, sees={"x-forwarded-for": "192.0.2.1, 192.0.2.2, 127.0.0.1"}),
    ),
    row(
        "X-Forwarded-Proto: http or https; X-Forwarded-Host: the Host",
        WEB,
        ask(
            host="web.test:81",
            sees={"x-forwarded-proto": "http", "x-forwarded-host": "web.test:81"},
        ),
    ),
    row(
        "with forward-headers, incoming values are kept",
        WEB,
        ask(
            headers=INCOMING,
            sees={"x-forwarded-proto": "https", "x-forwarded-host": "first.test"},
        ),
    ),
    row(
        "without forward-headers, all three are replaced",
        NOT_FORWARDING,
        ask(
            headers=INCOMING,
            sees={
                "x-forwarded-for": "127.0.0.1",
                "x-forwarded-proto": "http",
                "x-forwarded-host": "web.test",
            },
        ),
    ),
    row(
        "Forwarded from clients is dropped",
        WEB,
        ask(headers=["Forwarded: for=192.0.2.1"], sees={"forwarded": None}),
        NOT_FORWARDING,
        ask(headers=["Forwarded: for=192.0.2.1"], sees={"forwarded": None}),
    ),
    row(
        "--client-ip-header: its value, if present, becomes the incoming X-Forwarded-For",
        kp("deploy web --target={a} --client-ip-header=X-Real-IP"),
        ask(
            headers=["X-Real-IP: 192.0.2.9", *INCOMING],
            sees={"x-forwarded-for": "192.0.2.9, 127.0.0.1", "x-real-ip": "192.0.2.9"},
            logs={"remote_addr": "192.0.2.9"},
        ),
        ask(headers=INCOMING, sees={"x-forwarded-for": "192.0.2.1, 192.0.2.2, 127.0.0.1"}),
        ask(headers=["X-Real-IP:"], sees={"x-forwarded-for": "127.0.0.1"}),
        kp("deploy web --target={a} --client-ip-header=X-Real-IP --forward-headers=false"),
        ask(headers=["X-Real-IP: 192.0.2.9"], sees={"x-forwarded-for": "127.0.0.1"}),
    ),
    row(
        "X-Request-ID: kept or a new UUID4",
        WEB,
        ask(
            headers=["X-Request-ID: mine"],
            sees={"x-request-id": "mine"},
            logs={"request_id": "mine"},
        ),
        ask(sees={"x-request-id": UUID4}, logs={"request_id": UUID4}),
        NOT_FORWARDING,
        ask(headers=["X-Request-ID: mine"], sees={"x-request-id": "mine"}),
    ),
    row(
        "X-Request-Start: t=<unix ms>, kept or set",
        WEB,
        ask(headers=["X-Request-Start: t=1"], sees={"x-request-start": "t=1"}),
        ask(sees={"x-request-start": MILLISECONDS}),
    ),
    row(
        "X-Kamal-Target: host:port, set",
        WEB,
        ask(sees={"x-kamal-target": "{a}"}),
    ),
    row(
        "appended to an incoming one only with forward-headers",
        WEB,
        ask(headers=["X-Kamal-Target: b:80"], sees={"x-kamal-target": "b:80, {a}"}),
        NOT_FORWARDING,
        ask(headers=["X-Kamal-Target: b:80"], sees={"x-kamal-target": "{a}"}),
    ),
    row(
        "none of these is added to the response",
        WEB,
        ask(gets=dict.fromkeys(ADDED)),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_target_sees(shown: Row) -> None:
    await play(shown)
