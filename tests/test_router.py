"""Routing: host order, longest prefix, conflicts, inherited TLS; against an obvious twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamal_proxy.errors import HostConflictError
from kamal_proxy.options import ServiceOptions
from kamal_proxy.router import RoutingTable
from kamal_proxy.service import Service
from kamal_proxy.target_options import TargetOptions
from kamal_proxy.tls.files import TlsFiles
from tests.reference import routing

if TYPE_CHECKING:
    from kamal_proxy.deployment import Deployment

NO_DEPLOYMENT = cast("Deployment", None)  # routing never looks at it


def service(
    name: str,
    hosts: tuple[str, ...] = (),
    prefixes: tuple[str, ...] = (),
    *,
    tls: bool = False,
    redirect: bool = True,
) -> Service:
    options = ServiceOptions(
        hosts=hosts, path_prefixes=prefixes, tls_enabled=tls, tls_redirect=redirect
    )
    return Service(
        name=name,
        options=options,
        target_options=TargetOptions(),
        active=NO_DEPLOYMENT,
        tls=TlsFiles(options) if tls else None,
    )


def table(*services: Service) -> RoutingTable:
    routes = RoutingTable()
    for each in services:
        routes = routes.with_service(each)
    return routes


def found(routes: RoutingTable, host: str, path: str) -> tuple[str, str] | None:
    match = routes.find(host, path.encode())
    return None if match is None else (match[0].name, match[1].decode())


ROUTES = table(
    service("all"),
    service("all-api", (), ("/api",)),
    service("exact", ("a.example.com",)),
    service("exact-api", ("a.example.com",), ("/api", "/api/v2/deep", "/x")),
    service("v2", ("a.example.com",), ("/api/v2",)),
    service("wild", ("*.example.com",)),
    service("only-api", ("api.example.org",), ("/api",)),
    service("two", ("one.test", "two.test")),
    service("v6", ("::1",)),
    service("shouting", ("SHOUT.Test.",)),
)


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        ("nowhere", "/", ("all", "/")),
        ("", "/", ("all", "/")),
        ("nowhere", "/api", ("all-api", "/api")),
        ("nowhere", "/api/", ("all-api", "/api")),
        ("nowhere", "/apix", ("all", "/")),
        ("nowhere", "/ap", ("all", "/")),
        ("nowhere", "/x/api", ("all", "/")),
        ("nowhere", "/API", ("all", "/")),
        ("a.example.com", "/", ("exact", "/")),
        ("a.example.com", "/api/x", ("exact-api", "/api")),
        ("a.example.com", "/api/v2", ("v2", "/api/v2")),
        ("a.example.com", "/api/v2x", ("exact-api", "/api")),
        ("a.example.com", "/api/v2/deep/er", ("exact-api", "/api/v2/deep")),
        ("a.example.com", "/api/v2/deeper", ("v2", "/api/v2")),
        ("b.example.com", "/", ("wild", "/")),
        ("b.example.com", "/api", ("wild", "/")),
        # Exactly one leading label.
        ("b.c.example.com", "/", ("all", "/")),
        ("example.com", "/", ("all", "/")),
        (".example.com", "/", ("all", "/")),
        # A host that is claimed answers alone.
        ("api.example.org", "/api/1", ("only-api", "/api")),
        ("api.example.org", "/", None),
        ("one.test", "/", ("two", "/")),
        ("two.test", "/", ("two", "/")),
        ("::1", "/", ("v6", "/")),
        ("shout.test", "/", ("shouting", "/")),
    ],
)
def test_finds(host: str, path: str, expected: tuple[str, str] | None) -> None:
    assert found(ROUTES, host, path) == expected


def test_an_empty_table_finds_nothing() -> None:
    assert RoutingTable().find("a", b"/") is None
    assert table(service("a", ("a",))).find("b", b"/") is None


def test_a_table_never_changes() -> None:
    empty = RoutingTable()
    one = empty.with_service(service("a", ("a",)))
    two = one.with_service(service("b", ("b",)))
    without = two.without_service("a")
    assert [[s.name for s in routes] for routes in (empty, one, two, without)] == [
        [],
        ["a"],
        ["a", "b"],
        ["b"],
    ]
    assert found(two, "a", "/") == ("a", "/")
    assert found(without, "a", "/") is None


def test_a_service_replaces_the_one_of_its_name() -> None:
    routes = table(service("a", ("old", "kept")), service("a", ("kept", "new")))
    assert found(routes, "old", "/") is None
    assert found(routes, "kept", "/") == ("a", "/")
    assert found(routes, "new", "/") == ("a", "/")
    assert routes.without_service("unknown").get("a") is routes.get("a")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((), ()),
        (("a",), ("a",)),
        (("a", "b"), ("c", "b")),
        (("A.test",), ("a.TEST",)),
        (("a.test.",), ("a.test",)),
        (("[::1]",), ("::1",)),
        (("*.a",), ("*.a",)),
    ],
)
def test_conflicts(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    one, two = service("one", first), service("two", second)
    for holder, claimant in ((one, two), (two, one)):
        routes = table(holder)
        with pytest.raises(HostConflictError) as caught:
            routes.with_service(claimant)
        assert str(caught.value) == "host settings conflict with another service"
        assert holder.name in caught.value.details[0]
        assert [s.name for s in routes] == [holder.name]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (service("one"), service("two", ("a",))),
        (service("one", ("*.a",)), service("two", ("b.a",))),
        (service("one", ("a",)), service("two", ("a",), ("/api",))),
        (service("one", ("a",), ("/api",)), service("two", ("a",), ("/api/v2",))),
    ],
)
def test_no_conflict(first: Service, second: Service) -> None:
    for order in ((first, second), (second, first)):
        assert len(list(table(*order))) == 2


@pytest.mark.parametrize(
    ("root", "inherits"),
    [
        (service("root", ("a.test",), tls=True, redirect=False), (True, False)),
        (service("root", ("a.test",), tls=True), (True, True)),
        (service("root", ("a.test",)), (False, True)),
        (service("root", ("*.test",), tls=True, redirect=False), (True, False)),
        (service("root", (), tls=True, redirect=False), (True, False)),
        (service("root", ("b.test",), tls=True, redirect=False), (False, True)),
        (service("root", ("a.test",), ("/other",), tls=True, redirect=False), (False, True)),
    ],
)
def test_tls_is_inherited_from_the_root_service(root: Service, inherits: tuple[bool, bool]) -> None:
    leaf = service("leaf", ("a.test",), ("/api",))
    for order in ((root, leaf), (leaf, root)):
        got = table(*order).get("leaf")
        assert got is not None
        assert (got.options.tls_enabled, got.options.tls_redirect) == inherits
        assert got.tls is (root.tls if inherits[0] else None)
        alone = table(*order).without_service("root").get("leaf")
        assert alone is not None
        assert (alone.options.tls_enabled, alone.options.tls_redirect) == (False, True)
        assert alone.tls is None


def test_a_redeployed_root_passes_on_its_new_files() -> None:
    """Also where no option of what is under it changes by that."""
    leaf = service("leaf", ("a.test",), ("/api",))
    routes = table(service("root", ("a.test",), tls=True), leaf)
    again = service("root", ("a.test",), tls=True)
    got = routes.with_service(again).get("leaf")
    assert got is not None
    assert got.tls is again.tls is not None


def test_what_is_inherited_reaches_requests() -> None:
    routes = table(service("leaf", ("a.test",), ("/api",)), service("root", ("a.test",), tls=True))
    match = routes.find("a.test", b"/api/x")
    assert match is not None
    assert match[0].options.tls_enabled
    assert match[0] is routes.get("leaf")


SECURE = table(
    service("plain", ("a.test", "plain.test")),
    service("first", ("b.test",), tls=True),
    service("api", ("b.test", "c.test"), ("/api",)),
    service("wild", ("*.test",), tls=True),
    service("exact", ("x.wild.test",)),
    service("deeper", ("*.wild.test",), tls=True),
)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("b.test", "first"),  # and not what is under a path of it
        ("any.test", "wild"),
        ("y.wild.test", "deeper"),
        ("", "first"),
        ("c.test", "wild"),  # whose settings the service under its path has, too
        # A host whose root is claimed answers alone, with TLS or without.
        ("a.test", None),
        ("plain.test", None),
        ("x.wild.test", None),
        ("test", None),
        ("x.y.wild.test", None),
    ],
)
def test_who_has_the_tls_settings_of_a_host(host: str, name: str | None) -> None:
    found = SECURE.secure(host)
    assert (found and found.name) == name


def test_each_host_of_a_part_has_its_own_settings() -> None:
    """What one host has must not open the other, and no request may be sent where nobody is."""
    closed = service("closed", ("closed.test",), tls=True)
    plain = service("plain", ("plain.test",))
    wild = service("wild", ("*.wild.test",), tls=True, redirect=False)
    hosts = ("plain.test", "closed.test", "a.wild.test", "nobody.test")
    for order in (hosts, hosts[::-1]):
        leaf = service("leaf", order, ("/api",))
        for services in ((closed, plain, wild, leaf), (leaf, wild, plain, closed)):
            routes = table(*services)
            # Also after another change, which begins with what was inherited.
            for each in (routes, routes.with_service(service("other", ("other.test",)))):
                got = {host: each.find(host, b"/api") for host in hosts}
                settings = {
                    host: (
                        match[0].options.tls_enabled,
                        match[0].options.tls_redirect,
                        match[0].tls,
                    )
                    for host, match in got.items()
                    if match is not None
                }
                assert settings == {
                    "plain.test": (False, True, None),
                    "closed.test": (True, True, closed.tls),
                    "a.wild.test": (True, False, wild.tls),
                    "nobody.test": (False, True, None),
                }
                for host, (enabled, _, _) in settings.items():
                    assert (each.secure(host) is not None) == enabled


def test_no_name_is_a_host_with_a_certificate() -> None:
    """A part of a host is none, and who takes every host has none at hand."""
    every, named = service("every", tls=True), service("named", ("a.test",), tls=True)
    part = service("part", (), ("/api",))
    chosen = table(part, every, named).secure("")
    assert chosen is named
    assert table(part, every).secure("") is every


def test_no_name_without_tls() -> None:
    assert RoutingTable().secure("") is None
    assert table(service("a", ("a.test",))).secure("") is None
    for_all = table(service("all", tls=True))
    for host in ("", "a.test", "192.0.2.1"):
        chosen = for_all.secure(host)
        assert chosen is not None
        assert chosen.name == "all"


LABELS = st.sampled_from(["a", "b"])
HOSTS = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
PATTERNS = st.one_of(HOSTS, HOSTS.map(lambda host: f"*.{host}"))
PATHS = st.lists(st.sampled_from(["x", "xy", "y"]), max_size=3).map(lambda s: "/" + "/".join(s))
SERVICES = st.lists(
    st.tuples(
        st.lists(PATTERNS, max_size=2, unique=True).map(tuple),
        st.lists(PATHS, max_size=2, unique=True).map(tuple),
    ),
    max_size=6,
)


def claims(one: Service) -> set[tuple[str, str]]:
    return {(h, p) for h in one.options.hosts or ("",) for p in one.options.path_prefixes}


@settings(deadline=None, max_examples=200)
@given(SERVICES, HOSTS, PATHS, st.booleans())
def test_agrees_with_its_twin(
    specs: list[tuple[tuple[str, ...], tuple[str, ...]]], host: str, path: str, trailing: bool
) -> None:
    routes = RoutingTable()
    accepted: list[Service] = []
    for number, (hosts, prefixes) in enumerate(specs):
        candidate = service(str(number), hosts, prefixes)
        clash = any(claims(candidate) & claims(other) for other in accepted)
        try:
            routes = routes.with_service(candidate)
        except HostConflictError:
            assert clash
        else:
            assert not clash
            accepted.append(candidate)
    if trailing and path != "/":
        path += "/"
    assert found(routes, host, path) == routing.find(accepted, host, path)
