"""The contract's section "Redirects, TLS": what plain HTTP, HTTPS and the commands show of it.

What needs a certificate authority, an application that is asked about hosts, or another version of
HTTP than 1.1 is in ``tests/tls``, ``tests/http2`` and ``tests/http3``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.certificates import self_signed
from tests.contract.steps import answered, kp, restarted
from tests.contract.tables import Row, Step, World, ask, play, row

WEB = kp("deploy web --target={a} --host=web.test,b.test")
CANONICAL = kp("deploy web --target={a} --host=web.test,b.test --canonical-host=web.test")
PAIR = (
    "if any flags in the group [tls-certificate-path tls-private-key-path] are set they must all "
    "be set; missing"
)
INVALID = "service options invalid:"
FILES = "--tls-certificate-path={directory}/tls.crt --tls-private-key-path={directory}/tls.key"
SECURE = kp(f"deploy web --target={{a}} --host=web.test,b.test --tls {FILES}")
HTTPS = {"https_port": 0}


def certificate(*names: str, file: str = "tls") -> Step:
    """Make a step: the files of a certificate for these names are there."""

    async def step(world: World) -> None:
        self_signed(names[0], *names).write(world.directory, file)

    return step


def secure(name: str = "web.test", **rest: Any) -> Step:
    """Make a step: a request for a host, in TLS for the same name or the one of ``tls``."""
    logs = {"scheme": "https", "proto": "HTTP/1.1", "service": "web"} | rest.pop("logs", {})
    sees = {"x-forwarded-proto": "https"}
    return ask(**{"host": name, "tls": name, "logs": logs, "sees": sees, **rest})


def redirected(location: str, path: str = "/", **rest: str) -> Step:
    """Make a step: a request is answered with 301 and the connection closed."""
    return answered(
        301,
        path,
        gets={"location": location, "connection": "close"},
        logs={"service": "web"},
        **rest,
    )


def refused(statement: str, flags: str, error: str) -> Row:
    """Make a row: a deploy with these flags fails and changes nothing."""
    deploy = f"deploy web --target={{a}} {flags}"
    return row(statement, kp(deploy, error=error), answered(404, reason="no_service"))


ROWS = [
    row(
        "TLS service over plain HTTP with tls-redirect: 301 to https, Connection: close",
        WEB,
        restarted("web", tls_enabled=True),
        redirected("https://web.test/a%20b//c?x=%20&y", "/a%20b//c?x=%20&y", host="web.test"),
        redirected("https://web.test/", method="POST"),
    ),
    row(
        "host without port, as the client sent it",
        WEB,
        restarted("web", tls_enabled=True),
        redirected("https://web.test/", host="web.test:8080"),
        redirected("https://B.Test/x", "/x", host="B.Test:80"),
    ),
    row(
        "the same for a service that was deployed with --tls",
        certificate("web.test", "b.test"),
        SECURE,
        redirected("https://b.test/x?y", "/x?y", host="b.test:80"),
        **HTTPS,
    ),
    row(
        "a service with a certificate of its own is served over HTTPS, and after a restart",
        certificate("web.test", "b.test"),
        SECURE,
        secure("web.test"),
        secure("b.test"),
        restarted(),
        secure("web.test"),
        **HTTPS,
    ),
    row(
        "X-Forwarded-* of clients are not believed with --tls",
        certificate("web.test"),
        SECURE,
        secure(
            headers=["X-Forwarded-Proto: http", "X-Forwarded-For: 192.0.2.7"],
            sees={"x-forwarded-proto": "https", "x-forwarded-for": "127.0.0.1"},
        ),
        **HTTPS,
    ),
    row(
        "TLS request to a non-TLS service: 503",
        certificate("web.test"),
        SECURE,
        kp("deploy plain --target={b} --host=plain.test"),
        answered(
            503,
            host="plain.test",
            tls="web.test",
            reason="tls_not_enabled",
            logs={"service": "plain", "scheme": "https"},
        ),
        ask(host="plain.test", reaches="b"),
        **HTTPS,
    ),
    row(
        "no SNI: the first TLS host's certificate",
        certificate("web.test"),
        kp("deploy plain --target={b} --host=plain.test"),
        SECURE,
        secure(tls=""),
        **HTTPS,
    ),
    row(
        "what is under a path of a host has the TLS settings of its root",
        certificate("web.test"),
        SECURE,
        kp("deploy api --target={b} --host=web.test --path-prefix=/api"),
        secure(path="/api/x", reaches="b", logs={"service": "api"}),
        answered(301, "/api/x", gets={"location": "https://web.test/api/x"}),
        **HTTPS,
    ),
    row(
        "--tls-redirect=false: both are served",
        certificate("web.test"),
        kp(f"deploy web --target={{a}} --host=web.test --tls --tls-redirect=false {FILES}"),
        ask(sees={"x-forwarded-proto": "http"}, logs={"scheme": "http"}),
        secure(),
        **HTTPS,
    ),
    row(
        "--canonical-host over HTTPS: 301 to it",
        certificate("web.test", "b.test"),
        kp(
            "deploy web --target={a} --host=web.test,b.test --canonical-host=web.test --tls "
            f"{FILES}"
        ),
        redirected("https://web.test/x?y", "/x?y", host="b.test", tls="b.test"),
        secure("web.test"),
        **HTTPS,
    ),
    row(
        "a certificate that can't be used: the deploy fails and changes nothing",
        certificate("web.test"),
        SECURE,
        certificate("web.test", file="other"),
        kp(
            "deploy web --target={b} --host=web.test --tls "
            "--tls-certificate-path={directory}/other.crt "
            "--tls-private-key-path={directory}/tls.key",
            error="unable to load certificate",
            details=["{directory}/tls.key"],
        ),
        secure(reaches="a"),
        **HTTPS,
    ),
    row(
        "an unknown ACME token is the service's business, before and after a redirect",
        certificate("web.test"),
        SECURE,
        redirected(
            "https://web.test/.well-known/acme-challenge/x", "/.well-known/acme-challenge/x"
        ),
        secure(path="/.well-known/acme-challenge/x"),
        **HTTPS,
    ),
    row(
        "without tls-redirect none",
        WEB,
        restarted("web", tls_enabled=True, tls_redirect=False),
        ask(),
    ),
    row(
        "--canonical-host: 301 to it",
        CANONICAL,
        redirected("http://web.test/x?y", "/x?y", host="b.test"),
        redirected("http://web.test/", host="b.test:8080"),
        ask(host="web.test"),
        ask(host="WEB.test:8080"),
    ),
    row(
        "in one hop with the scheme change",
        CANONICAL,
        restarted("web", tls_enabled=True),
        redirected("https://web.test/x?y", "/x?y", host="b.test:80"),
        redirected("https://web.test/", host="web.test"),
    ),
    row(
        "a redirect is the whole uri, prefix included",
        kp("deploy web --target={a} --path-prefix=/app --canonical-host=web.test"),
        redirected("http://web.test/app/x", "/app/x", host="any.test"),
    ),
    refused("--tls needs hosts", "--tls", f"{INVALID} host must be set when using TLS"),
    refused(
        "no wildcard for automatic certificates",
        "--tls --host=*.web.test",
        "automatic TLS does not support wildcards",
    ),
    refused(
        "and the root prefix",
        "--tls --host=web.test --path-prefix=/x",
        f"{INVALID} TLS settings must be specified on the root path service",
    ),
    refused(
        "--tls-certificate-path needs --tls-private-key-path",
        "--tls --host=web.test --tls-certificate-path=c.pem",
        f"{PAIR} [tls-private-key-path]",
    ),
    refused(
        "--tls-private-key-path needs --tls-certificate-path",
        "--tls --host=web.test --tls-private-key-path=k.pem",
        f"{PAIR} [tls-certificate-path]",
    ),
    refused(
        "--tls-on-demand-url replaces hosts",
        "--tls --host=web.test --tls-on-demand-url=/allowed",
        f"{INVALID} cannot set hosts when using a TLS on-demand URL",
    ),
    refused(
        "it is an absolute URL or a path",
        "--tls --tls-on-demand-url=ftp://a.test/",
        f"{INVALID} TLS on-demand URL 'ftp://a.test/' must be an absolute http(s) URL or a path",
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_redirects(shown: Row) -> None:
    await play(shown)
