"""The contract's section "Redirects, TLS": what plain HTTP and the commands show of it.

Not covered, because it comes with TLS: the ACME HTTP-01 path, which is served before any redirect;
certificates, on-demand issuance, TLS-ALPN-01, HTTP/2, HTTP/3 and Alt-Svc, connections without SNI,
``--tls-staging``, the certificates' cache. A deploy with ``--tls`` that breaks no rule is refused
as not supported yet, so rows that need one change the saved state.
"""

from __future__ import annotations

import pytest

from tests.contract.steps import answered, kp, restarted
from tests.contract.tables import Row, Step, ask, play, row

WEB = kp("deploy web --target={a} --host=web.test,b.test")
CANONICAL = kp("deploy web --target={a} --host=web.test,b.test --canonical-host=web.test")
PAIR = (
    "if any flags in the group [tls-certificate-path tls-private-key-path] are set they must all "
    "be set; missing"
)
INVALID = "service options invalid:"


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
    refused(
        "TLS that breaks no rule is refused by this version",
        "--tls --host=web.test",
        "--tls is not supported yet by this version of kamal-proxy",
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_redirects(shown: Row) -> None:
    await play(shown)
