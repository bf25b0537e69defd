"""The contract's section "Services, routing", statement by statement.

Not covered: TLS itself. Inheriting it is shown by what plain HTTP is redirected to.
"""

from __future__ import annotations

import pytest

from tests.contract.steps import answered, kp, listed, restarted, table
from tests.contract.tables import Row, ask, play, row

CONFLICT = "host settings conflict with another service"
EXACT_WILD_ALL = (
    kp("deploy exact --target={a} --host=www.web.test"),
    kp("deploy wild --target={b} --host=*.web.test"),
    kp("deploy all --target={c}"),
)

ROWS = [
    row(
        "a service has a name, hosts, prefixes, options, an active and perhaps a rollout pool",
        kp("deploy web --target={a} --host=web.test,*.web.test --path-prefix=/x --path-prefix=/y"),
        listed(
            name="web",
            hosts=["web.test", "*.web.test"],
            path_prefixes=["/x", "/y"],
            targets=["{a}"],
            rollout_targets=[],
        ),
        kp("rollout deploy web --target={b}"),
        listed(name="web", targets=["{a}"], rollout_targets=["{b}"]),
    ),
    row(
        "no hosts: catch-all, * in list; no prefixes: /",
        kp("deploy web --target={a}"),
        table("web * / {a} running no"),
        ask("/any/path", host="any.test"),
        ask("/", host="127.0.0.1"),
    ),
    row("exact host first", *EXACT_WILD_ALL, ask(host="www.web.test", logs={"service": "exact"})),
    row(
        "then *.rest for exactly one leading label",
        *EXACT_WILD_ALL,
        ask(host="b.web.test", reaches="b", logs={"service": "wild"}),
        ask(host="a.b.web.test", reaches="c", logs={"service": "all"}),
        ask(host="web.test", reaches="c", logs={"service": "all"}),
    ),
    row(
        "then the catch-all",
        *EXACT_WILD_ALL,
        ask(host="other.test", reaches="c", logs={"service": "all"}),
    ),
    row(
        "the request's port is ignored",
        *EXACT_WILD_ALL,
        ask(host="www.web.test:8443", sees={"host": "www.web.test:8443"}),
        ask(host="b.web.test:1", reaches="b"),
    ),
    row(
        "the longest prefix wins",
        kp("deploy root --target={a} --host=web.test"),
        kp("deploy api --target={b} --host=web.test --path-prefix=/api"),
        kp("deploy v2 --target={c} --host=web.test --path-prefix=/api/v2"),
        ask("/"),
        ask("/api/v1", reaches="b"),
        ask("/api/v2/x", reaches="c"),
    ),
    row(
        "within a host, not over hosts",
        kp("deploy exact --target={a} --host=web.test"),
        kp("deploy long --target={b} --path-prefix=/api"),
        ask("/api/x", host="web.test", logs={"service": "exact"}),
        ask("/api/x", host="other.test", reaches="b", logs={"service": "long"}),
    ),
    row(
        "a prefix matches whole segments",
        kp("deploy api --target={a} --path-prefix=/api"),
        ask("/api"),
        ask("/api/"),
        ask("/api/x"),
        ask("/api?x"),
        answered(404, "/apix", reason="no_service"),
        answered(404, "/ap", reason="no_service"),
        answered(404, "/x/api", reason="no_service"),
        answered(404, "/", reason="no_service"),
    ),
    row(
        "prefixes are normalised to / and the rest trimmed of slashes",
        kp("deploy one --target={a} --path-prefix=one"),
        kp("deploy two --target={a} --path-prefix=/two/"),
        kp("deploy three --target={a} --path-prefix=//three/x//"),
        kp("deploy root --target={a} --path-prefix="),
        table(
            "one * /one {a} running no",
            "root * / {a} running no",
            "three * /three/x {a} running no",
            "two * /two {a} running no",
        ),
        ask("/two/y", sees={":path": "/y"}, logs={"service": "two"}),
    ),
    row(
        "the target sees the path without the prefix",
        kp("deploy api --target={a} --path-prefix=/api"),
        ask("/api/x/y", sees={":path": "/x/y"}),
    ),
    row(
        "/ if nothing remains",
        kp("deploy api --target={a} --path-prefix=/api"),
        ask("/api", sees={":path": "/"}),
        ask("/api/", sees={":path": "/"}),
        ask("/api?q", sees={":path": "/?q"}),
    ),
    row(
        "without strip-path-prefix, the whole path",
        kp("deploy api --target={a} --path-prefix=/api --strip-path-prefix=false"),
        ask("/api/x/y", sees={":path": "/api/x/y"}),
        ask("/api", sees={":path": "/api"}),
    ),
    row(
        "percent-encoding and the raw query reach the target byte for byte",
        kp("deploy root --target={a}"),
        kp("deploy api --target={b} --path-prefix=/api"),
        ask(
            "/a%2Fb/%7e//../.?x=%20&y=a+b&z=%C3%A9;|?",
            sees={":path": "/a%2Fb/%7e//../.?x=%20&y=a+b&z=%C3%A9;|?"},
        ),
        ask("/api/a%2fb%20c//?%zz&=", reaches="b", sees={":path": "/a%2fb%20c//?%zz&="}),
        ask("/?", sees={":path": "/?"}),
    ),
    row(
        "a second service that claims a host and prefix fails and changes nothing",
        kp("deploy web --target={a} --host=web.test,b.test"),
        kp("deploy other --target={b} --host=c.test,b.test", error=CONFLICT),
        table("web web.test,b.test / {a} running no"),
        ask(host="b.test"),
        answered(404, host="c.test", reason="no_service"),
        kp("deploy other --target={b} --host=web.test --path-prefix=/api"),
        kp("deploy third --target={c} --host=web.test --path-prefix=/x,/api", error=CONFLICT),
        ask("/api", reaches="b"),
        ask("/x"),
    ),
    row(
        "so does one that is deployed again with what another has",
        kp("deploy web --target={a} --host=web.test"),
        kp("deploy other --target={b} --host=b.test"),
        kp("deploy other --target={c} --host=web.test", error=CONFLICT),
        ask(host="web.test"),
        ask(host="b.test", reaches="b"),
    ),
    row(
        "no service for a request: 404 page",
        kp("deploy web --target={a} --host=web.test"),
        answered(
            404,
            host="other.test",
            gets={"content-type": "text/html; charset=utf-8", "connection": None},
            reason="no_service",
            logs={"service": "", "resp_content_type": "text/html; charset=utf-8"},
        ),
    ),
    row(
        "without a root prefix, tls and tls-redirect are those of the host's root-path service",
        kp("deploy api --target={a} --host=web.test --path-prefix=/api"),
        kp("deploy web --target={b} --host=web.test"),
        restarted("web", tls_enabled=True),
        table("api web.test /api {a} running yes", "web web.test / {b} running yes"),
        answered(301, "/api", gets={"location": "https://web.test/api"}),
        restarted("web", tls_redirect=False),
        ask("/api"),
    ),
]


@pytest.mark.parametrize("shown", ROWS, ids=str)
async def test_routing(shown: Row) -> None:
    await play(shown)
