"""Certificates are obtained and renewed in the background: real authorities, a clock of ours."""

from __future__ import annotations

import datetime
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from cryptography import x509

from kamal_proxy.errors import AcmeError, CertificateNotFoundError, CertificateStoreError
from kamal_proxy.logs import Log
from kamal_proxy.metrics import Metrics
from kamal_proxy.run_options import AcmeOptions
from kamal_proxy.tls import acme_client
from kamal_proxy.tls import issuer as issuer_module
from kamal_proxy.tls import store as store_module
from kamal_proxy.tls.attempt import Attempt
from kamal_proxy.tls.hosts import Authority, moment
from kamal_proxy.tls.issuer import THREADS, Issuer
from kamal_proxy.tls.schedule import DAY, HOUR, MINUTE, Ledger
from kamal_proxy.tls.store import CertificateStore
from tests.certificates import make_ca, make_key
from tests.running import Lines
from tests.tls.pebble import needs_pebble, open_pebble
from tests.tls.small_ca import Answer, Request, SmallCa, open_small_ca, problem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kamal_proxy.control.messages import CertificateDescription
    from kamal_proxy.tls.certificates import Certificate

A, B, C = "a.example.com", "b.example.com", "c.example.com"
PROBLEM = {"type": "urn:ietf:params:acme:error:unauthorized", "detail": "not yours"}


@attrs.define(eq=False)
class Clock:
    """The wall clock of a proxy, which a test can set."""

    offset: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@attrs.define(eq=False)
class Room:
    """An issuer with what surrounds it.

    Attributes:
        issuer: The issuer.
        authority: From where its hosts' certificates come.
        store: What is kept of them.
        clock: Its clock.
        lines: Its log.
        metrics: Its numbers.
    """

    issuer: Issuer
    authority: Authority
    store: CertificateStore
    clock: Clock
    lines: Lines
    metrics: Metrics

    def want(self, *hosts: str) -> None:
        """Want exactly these hosts."""
        self.issuer.set_wanted(dict.fromkeys(hosts, self.authority))

    def pass_time(self, seconds: float) -> None:
        """Set the clock, and have it looked at."""
        self.clock.offset += seconds
        self.issuer._wake()
        self.issuer._suggestions._news.set()

    def describe(self, host: str) -> CertificateDescription:
        """Return the row of a host."""
        return next(row for row in self.issuer.describe() if row.host == host)

    def messages(self, start: str = "Certificate") -> list[tuple[str, str]]:
        """Return what the log says of which hosts."""
        return [(each["msg"], each["host"]) for each in self.lines.all if "host" in each]

    def metric(self, name: str) -> list[str]:
        """Return the lines of a metric."""
        text = self.metrics.render("")[0].decode()
        return [each for each in text.splitlines() if each.startswith(f"kamal_proxy_{name}")]

    async def wait_for(self, message: str, host: str, number: int = 1) -> dict[str, Any]:
        """Wait for the line about a host that comes as that number."""
        seen = 0

        def wanted(line: dict[str, Any]) -> bool:
            nonlocal seen
            seen += line["msg"] == message and line.get("host") == host
            return seen == number

        return await self.lines.wait_for(wanted)


def make_room(directory: str, ca_file: str, path: Path, **options: str) -> Room:
    clock, lines, metrics = Clock(), Lines(), Metrics()
    acme = AcmeOptions(directory=directory, ca_file=ca_file, **options)
    issuer = Issuer(acme, Log(lines.add, debug=True), metrics, clock=clock)
    store = CertificateStore(path, directory)
    return Room(issuer, Authority("", str(path)), store, clock, lines, metrics)


@asynccontextmanager
async def running(room: Room) -> AsyncIterator[Room]:
    """Run the issuer of a room."""
    async with trio.open_nursery() as nursery:
        await nursery.start(room.issuer.run)
        yield room
        nursery.cancel_scope.cancel()


@pytest.fixture
async def ca() -> AsyncIterator[SmallCa]:
    async with open_small_ca() as made:
        yield made


@pytest.fixture
async def room(ca: SmallCa, tmp_path: Path) -> AsyncIterator[Room]:
    async with running(make_room(ca.directory, ca.ca_file, tmp_path)) as made:
        yield made


async def obtained(room: Room, host: str = A) -> Certificate:
    found = await room.issuer.wait(host)
    assert found is not None, room.lines.all
    assert found.names == (host,)
    return found


# Obtaining


@needs_pebble
@pytest.mark.parametrize("kind", ["http-01", "tls-alpn-01"])
async def test_certificates_of_a_real_authority(tmp_path: Path, kind: str) -> None:
    made: list[Room] = []
    answers: dict[str, Any] = {
        "http-01": {"token": lambda token: made[0].issuer.validate(token)},
        "tls-alpn-01": {"certificate": lambda host: made[0].issuer.challenge_certificate(host)},
    }
    async with open_pebble(**answers[kind]) as pebble:
        room = make_room(pebble.directory, pebble.ca_file, tmp_path)
        made.append(room)
        room.want(A, B)
        async with running(room):
            first, second = await obtained(room, A), await obtained(room, B)
            assert first.fingerprint != second.fingerprint
            assert (await room.issuer.renew(A)).fingerprint != first.fingerprint
    assert Ledger.decode(room.store.ledger() or b"").challenge(A) == kind


@needs_pebble
async def test_renewals_of_a_real_authority_with_short_lives(tmp_path: Path) -> None:
    made: list[Room] = []
    async with open_pebble(
        token=lambda token: made[0].issuer.validate(token),
        # Seconds; from version 2.6 on they are in a profile.
        config={
            "certificateValidityPeriod": 8,
            "profiles": {"default": {"description": "short", "validityPeriod": 8}},
        },
    ) as pebble:
        room = make_room(pebble.directory, pebble.ca_file, tmp_path)
        made.append(room)
        room.want(A)
        async with running(room):
            first = await obtained(room)
            await room.wait_for("Certificate renewed", A)
            assert (await obtained(room)).fingerprint != first.fingerprint


async def test_what_is_told_of_a_certificate(ca: SmallCa, room: Room) -> None:
    room.want(A)
    assert room.describe(A).state == "obtaining"
    assert room.issuer.find(A) is None
    found = await obtained(room)
    assert room.issuer.find(A) is found
    (line,) = [each for each in room.lines.all if each["msg"] == "Certificate obtained"]
    assert (line["level"], line["host"], line["issuer"]) == ("INFO", A, "small authority")
    assert line["directory"] == ca.directory
    assert line["not_after"].endswith("Z")
    row = room.describe(A)
    assert (row.state, row.names, row.source) == ("valid", (A,), "acme")
    assert (row.issuer, row.key_type) == ("small authority", "ECDSA P-256")
    assert (row.not_after, row.last_error, row.next_attempt) == (found.not_after, "", 0)
    assert 56 * DAY < row.renew_at - room.clock() < 61 * DAY
    (metric,) = room.metric("certificate_expiry")
    name, value = metric.split(" ")
    assert name == f'kamal_proxy_certificate_expiry_timestamp_seconds{{host="{A}"}}'
    assert float(value) == found.not_after

    assert room.metric("certificate_attempts") == [
        'kamal_proxy_certificate_attempts_total{result="ok"} 1.0'
    ]
    room.want()
    assert room.metric("certificate_expiry") == []
    assert room.issuer.describe() == []


async def test_what_is_in_the_store_is_not_ordered(ca: SmallCa, tmp_path: Path) -> None:
    async with running(make_room(ca.directory, ca.ca_file, tmp_path)) as first:
        first.want(A)
        before = await obtained(first)
    async with running(make_room(ca.directory, ca.ca_file, tmp_path)) as second:
        second.want(A)
        assert (await obtained(second)).fingerprint == before.fingerprint
    assert len(ca.orders) == 1


async def test_a_certificate_of_the_store_that_can_not_be_used(ca: SmallCa, room: Room) -> None:
    room.store.path.mkdir()
    (room.store.path / A).write_text("garbage")
    room.want(A)
    await obtained(room)
    (line,) = [each for each in room.lines.all if each["msg"] == "Certificate can't be loaded"]
    assert line["host"] == A
    assert str(room.store.path / A) in line["error"]


async def test_a_certificate_that_nobody_has_thought_of(
    ca: SmallCa, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise x509.DuplicateExtension("twice", x509.ObjectIdentifier("2.5.29.17"))

    issued = make_ca().issue(A)
    room.store.save(A, issued.chain_pem, issued.key_pem)
    monkeypatch.setattr(store_module, "parse_certificate", fail)
    room.want(A)
    line = await room.wait_for("Certificate can't be loaded", A)
    assert "DuplicateExtension" in line["error"]
    await obtained(room)


async def test_no_thread_can_be_started(
    ca: SmallCa, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trio.to_thread.run_sync

    async def fail(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", fail)
    room.want(A)
    await room.lines.wait_for_message("Certificates can't be loaded")
    monkeypatch.setattr(trio.to_thread, "run_sync", real)
    await obtained(room)


async def test_many_at_once_are_obtained_a_few_at_a_time(ca: SmallCa, room: Room) -> None:
    under_way = most = 0

    def count(request: Request) -> None:
        nonlocal under_way, most
        under_way += 1 if request.path == "/order" else -1
        most = max(most, under_way)

    ca.script["/order"] = lambda request: count(request) if request.path == "/order" else None
    ca.script["/cert"] = count
    hosts = [f"host{number}.example.com" for number in range(30)]
    room.want(*hosts)
    for host in hosts:
        await obtained(room, host)
    assert most <= THREADS
    assert ca.paths.count("account") <= THREADS, "the account is looked up once"
    assert ca.paths.count("account") == 1


async def test_hundreds_of_certificates_are_loaded(ca: SmallCa, tmp_path: Path) -> None:
    room = make_room(ca.directory, ca.ca_file, tmp_path)
    hosts = [f"host{number}.example.com" for number in range(300)]
    authority, key = make_ca(), make_key("ec")
    for host in hosts:
        issued = authority.issue(host, key=key)
        room.store.save(host, issued.chain_pem, issued.key_pem)
    room.want(*hosts)
    async with running(room):
        for host in hosts:
            assert await room.issuer.wait(host) is not None
    assert ca.orders == []
    assert len(room.metric("certificate_expiry")) == 300


async def test_everything_is_written_down_before_it_is_ordered(ca: SmallCa, room: Room) -> None:
    seen: list[bytes] = []

    def look(request: Request) -> None:
        if request.path == "/order":
            seen.append(room.store.ledger() or b"")

    ca.script["/order"] = look
    room.want(A)
    await obtained(room)
    assert len(Ledger.decode(seen[0])._orders) == 1


async def test_nothing_is_ordered_that_could_not_be_written_down(ca: SmallCa, room: Room) -> None:
    (room.store.path / "acme_attempts+json").mkdir(parents=True)
    room.want(A)
    line = await room.wait_for("Certificate can't be obtained", A)
    assert "acme_attempts+json" in line["error"]
    assert ca.requests == []
    assert await room.issuer.wait(A) is None
    (room.store.path / "acme_attempts+json").rmdir()
    room.pass_time(HOUR)
    await obtained(room)


async def test_a_ledger_that_is_none_is_begun_anew(ca: SmallCa, room: Room) -> None:
    room.store.path.mkdir()
    (room.store.path / "acme_attempts+json").write_text("garbage")
    room.want(A)
    await obtained(room)
    await room.lines.wait_for_message("Certificate attempts are counted anew")


async def test_what_can_not_be_kept_is_not_ordered_again_and_again(ca: SmallCa, room: Room) -> None:
    (room.store.path / A).mkdir(parents=True)
    room.want(A)
    for number in range(1, 5):
        line = await room.wait_for("Certificate can't be obtained", A, number)
        assert str(room.store.path / A) in line["error"]
        room.pass_time(HOUR)
    line = await room.wait_for("Certificate has to wait", A)
    assert "4 certificates in a week" in line["error"]
    assert len(ca.issued) == 4


async def test_what_is_refused_in_the_end_does_not_count(ca: SmallCa, room: Room) -> None:
    ca.script["/finalize"] = problem("caa", "forbidden")
    room.want(A)
    for number in range(1, 7):
        line = await room.wait_for("Certificate can't be obtained", A, number)
        assert line["error"] == "forbidden (caa)"
        room.pass_time(DAY)
    ca.script.clear()
    await room.wait_for("Certificate obtained", A)


# What fails


async def test_a_name_that_fails_is_left_alone(ca: SmallCa, room: Room) -> None:
    ca.refuse = lambda host, _kind: PROBLEM if host == A else None
    room.want(A, B)
    await obtained(room, B)
    line = await room.wait_for("Certificate can't be obtained", A)
    assert line["level"] == "ERROR"
    assert (
        line["error"] == "http-01: not yours (unauthorized); tls-alpn-01: not yours (unauthorized)"
    )
    assert line["next_attempt"].endswith("Z")
    for _ in range(100):
        room.issuer.request(A, room.authority)
        assert await room.issuer.wait(A) is None, "handshakes fail at once"
    row = room.describe(A)
    assert (row.state, row.last_error, row.names) == ("failing", line["error"], ())
    assert 2 * MINUTE - 5 < row.next_attempt - room.clock() < 3 * MINUTE
    room.pass_time(MINUTE)
    assert await room.issuer.wait(A) is None
    assert room.messages().count(("Certificate can't be obtained", A)) == 1
    assert sorted(room.metric("certificate_attempts")) == [
        'kamal_proxy_certificate_attempts_total{result="failed"} 1.0',
        'kamal_proxy_certificate_attempts_total{result="ok"} 1.0',
    ]
    ca.refuse = lambda _host, _kind: None
    room.pass_time(2 * MINUTE)
    await obtained(room)
    assert room.describe(A).state == "valid"


async def test_a_crash_loop_does_not_fail_five_times_in_an_hour(
    ca: SmallCa, tmp_path: Path
) -> None:
    ca.refuse = lambda _host, _kind: PROBLEM
    for number in range(4):
        room = make_room(ca.directory, ca.ca_file, tmp_path)
        room.clock.offset = 16 * MINUTE * number
        room.want(A)
        async with running(room):
            await room.lines.wait_for(lambda line: line.get("host") == A)
    assert ca.paths.count("challenge") == 4


async def test_the_other_kind_of_challenge_is_tried_and_remembered(ca: SmallCa, room: Room) -> None:
    ca.refuse = lambda _host, kind: PROBLEM if kind == "http-01" else None
    room.want(A)
    await obtained(room)
    await room.issuer.renew(A)
    kinds = [each.path.rpartition("/")[2] for each in ca.requests if "challenge" in each.path]
    assert kinds == ["http-01", "tls-alpn-01", "tls-alpn-01"]
    assert ("Certificate can't be obtained", A) not in room.messages()


async def test_what_no_challenge_can_help_is_not_tried_twice(ca: SmallCa, room: Room) -> None:
    dns = {"type": "urn:ietf:params:acme:error:dns", "detail": "NXDOMAIN"}
    ca.refuse = lambda _host, _kind: dns
    room.want(A)
    line = await room.wait_for("Certificate can't be obtained", A)
    assert line["error"] == "http-01: NXDOMAIN (dns)"
    assert ca.paths.count("challenge") == 1


async def test_somebody_may_have_mended_it(ca: SmallCa, room: Room) -> None:
    ca.refuse = lambda _host, _kind: {"type": "urn:x:dns", "detail": "NXDOMAIN"}
    room.want(A)
    for number in (1, 2, 3):
        await room.wait_for("Certificate can't be obtained", A, number)
        room.pass_time(15 * MINUTE)
        room.issuer.try_again([A, B])
    ca.refuse = lambda _host, _kind: None
    room.issuer.try_again([A.upper() + "."])
    await obtained(room)


async def test_an_authority_that_is_down_is_not_asked_by_each_host(ca: SmallCa, room: Room) -> None:
    ca.script["/dir"] = Answer(503, b"", {"Retry-After": "60"})
    hosts = [f"host{number}.example.com" for number in range(20)]
    room.want(*hosts)
    await room.lines.wait_for_message("Certificate can't be obtained")
    for host in hosts:
        assert await room.issuer.wait(host) is None
    assert len(room.messages()) <= THREADS
    assert "answers with status 503" in room.lines.all[0]["error"]
    asked = len(ca.requests)
    room.pass_time(30)
    await trio.testing.wait_all_tasks_blocked()
    assert len(ca.requests) == asked
    ca.script.clear()
    room.pass_time(HOUR)
    for host in hosts:
        await obtained(room, host)


async def test_an_authority_that_was_down_once_is_not_distrusted(ca: SmallCa, room: Room) -> None:
    room.want(A)
    await obtained(room)
    ca.script["/dir"] = ca.script["/nonce"] = Answer(503, b"")
    live = room.issuer._hosts[A].authority
    for failures in (1, 2, 3):
        with pytest.raises(AcmeError, match="status 503"):
            await room.issuer.renew(A)
        assert live.back_off.failures == failures
    assert live.hold_until > room.clock() + 30
    line = [each for each in room.lines.all if each["msg"] == "Certificate can't be renewed"][-1]
    assert line["next_attempt"] == moment(room.describe(A).renew_at), "it is good until then"
    ca.script.clear()
    await room.issuer.renew(A)
    assert live.back_off.failures == 0


async def test_a_limit_of_the_account_holds_all_hosts(ca: SmallCa, room: Room) -> None:
    ca.script["/order"] = problem(
        "rateLimited", "too many new orders (300) from this account", 429, Retry_After="7200"
    )
    room.want(A)
    line = await room.wait_for("Certificate can't be obtained", A)
    assert line["error"] == "too many new orders (300) from this account (rateLimited)"
    ca.script.clear()
    room.want(A, B)
    assert await room.issuer.wait(B) is None
    with pytest.raises(AcmeError, match="too many new orders"):
        await room.issuer.renew(B)
    assert ca.paths.count("order") == 1
    assert 7200 - 60 < room.describe(B).next_attempt - room.clock() <= 7200
    room.pass_time(7201)
    await obtained(room, A)
    await obtained(room, B)


async def test_a_limit_of_a_name_holds_only_that_name(ca: SmallCa, room: Room) -> None:
    def limit(request: Request) -> Answer | None:
        if request.payload and A in str(request.payload):
            return problem(
                "rateLimited", f'too many certificates for "{A}"', 429, Retry_After="99999"
            )
        return None

    ca.script["/order"] = limit
    room.want(A)
    await room.wait_for("Certificate can't be obtained", A)
    room.want(A, B)
    await obtained(room, B)
    assert room.describe(A).next_attempt - room.clock() > 99_900


async def test_the_budget_of_orders(ca: SmallCa, room: Room) -> None:
    ledger = Ledger()
    for _ in range(278):
        ledger.order(room.clock())
    room.store.save_ledger(ledger.encode())
    hosts = [f"host{number}.example.com" for number in range(10)]
    room.want(*hosts)
    line = await room.lines.wait_for_message("Certificate has to wait")
    assert "280 orders in 3 hours" in line["error"]
    found = [await room.issuer.wait(host) for host in hosts]
    assert sum(each is not None for each in found) == 2
    assert {room.describe(host).state for host in hosts} == {"valid", "obtaining"}
    lines = [each for each in room.lines.all if each["msg"] == "Certificate has to wait"]
    assert len(lines) <= THREADS
    room.pass_time(3 * HOUR + MINUTE)
    for host in hosts:
        await obtained(room, host)


async def test_an_account_that_was_forgotten_is_made_again(ca: SmallCa, room: Room) -> None:
    room.want(A)
    await obtained(room)
    forgotten = True

    def forget(request: Request) -> Answer | None:
        nonlocal forgotten
        if request.path == "/account":
            forgotten = False
        if forgotten and request.path == "/order":
            return problem("accountDoesNotExist", "who are you?")
        return None

    ca.script["/"] = forget
    room.want(A, B)
    await obtained(room, B)
    assert ca.paths.count("account") == 2
    ca.script["/"] = lambda request: (
        problem("accountDoesNotExist", "who?") if request.path == "/order" else None
    )
    room.want(A, B, C)
    line = await room.wait_for("Certificate can't be obtained", C)
    assert line["error"] == "who? (accountDoesNotExist)"


async def test_an_attempt_that_takes_too_long(
    ca: SmallCa, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_module, "ATTEMPT_LIMIT", 0.5)

    async def dawdle(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.receive_some()

    ca.script["/dir"] = lambda _: dawdle
    room.want(A)
    line = await room.wait_for("Certificate can't be obtained", A)
    assert "it was not done in" in line["error"]
    monkeypatch.undo()
    ca.script.clear()
    room.pass_time(HOUR)
    await obtained(room)


async def test_a_bug_costs_one_attempt(
    ca: SmallCa, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Attempt) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(Attempt, "run", fail)
    room.want(A)
    await room.wait_for("Certificate attempt failed", A)
    await room.wait_for("Certificate can't be obtained", A)
    monkeypatch.undo()
    room.pass_time(HOUR)
    await obtained(room)


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "*.example.com", "a..b"])
async def test_hosts_that_no_certificate_is_for(ca: SmallCa, room: Room, host: str) -> None:
    room.want(host, B)
    room.want(host, B)
    await obtained(room, B)
    name = host.strip("[]")
    assert await room.issuer.wait(name) is None
    assert room.describe(name).state == "failing"
    (line,) = [each for each in room.lines.all if each["host"] == name]
    assert line["msg"] == "Certificate can't be obtained"
    with pytest.raises(AcmeError):
        await room.issuer.renew(host)
    room.issuer.try_again([host])
    assert {order["host"] for order in ca.orders} == {B}


# Renewing


async def test_a_certificate_is_renewed_while_it_is_good(ca: SmallCa, room: Room) -> None:
    room.want(A)
    first = await obtained(room)
    room.pass_time(55 * DAY)
    await trio.testing.wait_all_tasks_blocked()
    assert room.issuer.find(A) is first
    room.pass_time(6 * DAY)
    await room.wait_for("Certificate renewed", A)
    second = room.issuer.find(A)
    assert second is not None
    assert second.fingerprint != first.fingerprint
    stored = room.store.load(A, room.clock())
    assert stored is not None
    assert stored.fingerprint == second.fingerprint


async def test_what_can_not_be_renewed_goes_on_being_used(ca: SmallCa, room: Room) -> None:
    room.want(A)
    first = await obtained(room)
    ca.refuse = lambda _host, _kind: PROBLEM
    room.pass_time(61 * DAY)
    line = await room.wait_for("Certificate can't be renewed", A)
    assert "not yours" in line["error"]
    assert room.issuer.find(A) is first
    assert room.describe(A).state == "failing"
    room.pass_time(30 * DAY)
    await room.wait_for("Certificate can't be renewed", A, 2)
    assert room.issuer.find(A) is None
    assert await room.issuer.wait(A) is first, "an expired one is better than none"
    assert room.describe(A).state == "expired"
    ca.refuse = lambda _host, _kind: None
    room.pass_time(-91 * DAY)
    assert room.issuer.find(A) is first, "the clock was wrong"


async def test_what_has_expired_in_the_store_is_renewed_at_once(ca: SmallCa, room: Room) -> None:
    old = make_ca().issue(A, days=1, not_before=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    room.store.save(A, old.chain_pem, old.key_pem)
    room.want(A)
    found = await obtained(room)
    assert found.not_after > room.clock()


async def test_an_authority_may_want_it_earlier(ca: SmallCa, room: Room) -> None:
    """As it does when it has to revoke many."""
    now = datetime.datetime.now(datetime.UTC)
    ca.window = now - datetime.timedelta(days=2), now - datetime.timedelta(days=1)
    room.want(A)
    first = await obtained(room)
    room.pass_time(MINUTE)
    await ca.wait_for("ari")
    await room.lines.wait_for(lambda _: True)
    while room.describe(A).renew_at > room.clock() + DAY:
        await trio.testing.wait_all_tasks_blocked()
    assert room.describe(A).renew_at == pytest.approx(first.not_before + DAY), "no endless loop"
    assert room.issuer.find(A) is first
    room.pass_time(DAY)
    await room.wait_for("Certificate renewed", A)
    orders = [each.payload for each in ca.requests if each.path == "/order" and each.payload]
    assert ["replaces" in each for each in orders] == [False, True]


async def test_an_authority_that_can_not_be_asked_when(ca: SmallCa, room: Room) -> None:
    now = datetime.datetime.now(datetime.UTC)
    ca.window = now, now
    ca.script["/ari"] = Answer(500, b"")
    room.want(A)
    await obtained(room)
    room.pass_time(MINUTE)
    await room.lines.wait_for_message("Renewal can't be asked for")
    assert room.describe(A).state == "valid"


async def test_renewing_on_request(ca: SmallCa, room: Room) -> None:
    room.want(A)
    first = await obtained(room)
    second = await room.issuer.renew(A.upper())
    assert second.fingerprint != first.fingerprint
    assert room.issuer.find(A) is second
    with pytest.raises(CertificateNotFoundError, match=f"no certificate is obtained for {B}"):
        await room.issuer.renew(B)
    ca.refuse = lambda _host, _kind: PROBLEM
    with pytest.raises(AcmeError, match="not yours"):
        await room.issuer.renew(A)
    assert room.issuer.find(A) is second
    (room.store.path / "acme_attempts+json").unlink()
    (room.store.path / "acme_attempts+json").mkdir()
    with pytest.raises(CertificateStoreError):
        await room.issuer.renew(A)


async def test_renewing_again_and_again_ends_at_the_limit(ca: SmallCa, room: Room) -> None:
    room.want(A)
    await obtained(room)
    for _ in range(4):
        await room.issuer.renew(A)
    with pytest.raises(AcmeError, match="5 certificates in a week are enough"):
        await room.issuer.renew(A)
    assert len(ca.orders) == 5
    assert room.issuer.find(A) is not None


async def test_renewing_what_is_removed_meanwhile(ca: SmallCa, room: Room) -> None:
    room.want(A)
    await obtained(room)
    ca.polls = 1_000_000
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def renew() -> None:
            with pytest.raises(AcmeError, match="is not wanted any more"):
                await room.issuer.renew(A)

        await ca.wait_for("challenge", 2)
        room.want()


# Clocks


async def test_a_clock_that_was_years_ahead(ca: SmallCa, room: Room) -> None:
    """As it may be until the time is asked for on the network."""
    room.clock.offset = 4000 * DAY
    ca.script["/dir"] = Answer(503, b"")
    room.want(A)
    await room.wait_for("Certificate can't be obtained", A)
    ca.script.clear()
    room.pass_time(-4000 * DAY)
    await room.wait_for("Certificate obtained", A)


async def test_a_clock_that_was_years_behind(ca: SmallCa, room: Room) -> None:
    room.clock.offset = -4000 * DAY
    ca.refuse = lambda _host, _kind: PROBLEM
    room.want(A)
    await room.wait_for("Certificate can't be obtained", A)
    ca.refuse = lambda _host, _kind: None
    room.pass_time(4000 * DAY)
    await obtained(room)


# Several processes


async def test_two_that_share_a_store_order_once(ca: SmallCa, tmp_path: Path) -> None:
    first, second = (make_room(ca.directory, ca.ca_file, tmp_path) for _ in range(2))
    hosts = [f"host{number}.example.com" for number in range(6)]
    first.want(*hosts)
    second.want(*hosts)
    async with running(first), running(second):
        for host in hosts:
            one, other = await obtained(first, host), await obtained(second, host)
            assert one.fingerprint == other.fingerprint
    assert len(ca.orders) == len(hosts)
    assert len(first.lines.all) + len(second.lines.all) == len(hosts)


async def test_one_answers_for_the_other(ca: SmallCa, tmp_path: Path) -> None:
    first, second = (make_room(ca.directory, ca.ca_file, tmp_path) for _ in range(2))
    second.want(B)
    ca.polls = 1_000_000
    async with running(first):
        first.want(A)
        await ca.wait_for("challenge")
        (token,) = first.issuer._answers._tokens
        answer = first.issuer.http_answer(token)
        assert answer is not None
        assert answer.startswith(token.encode() + b".")
        assert second.issuer.http_answer(token) is None
        assert await second.issuer.validate(token) == answer
        assert await first.issuer.validate(token) == answer
        assert await second.issuer.validate("unknown") is None
        assert await second.issuer.validate("../../etc/passwd") is None
        assert await second.issuer.validate_tls(A) is None
    ca.kinds = ("tls-alpn-01",)
    async with running(first):
        first.want(C)
        await ca.wait_for("challenge", 2)
        mine, others = first.issuer.challenge_certificate(C), await second.issuer.validate_tls(C)
        assert mine is not None
        assert others is not None
        assert mine.fingerprint == others.fingerprint
        assert second.issuer.challenge_certificate(C) is None
        assert await second.issuer.validate_tls("../x") is None


async def test_renewing_what_another_process_renews(ca: SmallCa, tmp_path: Path) -> None:
    first, second = (make_room(ca.directory, ca.ca_file, tmp_path) for _ in range(2))
    async with running(first), running(second):
        for room in (first, second):
            room.want(A)
            await obtained(room)
        found: list[Certificate] = []
        async with trio.open_nursery() as nursery:
            for room in (first, second):

                @nursery.start_soon
                async def renew(room: Room = room) -> None:
                    found.append(await room.issuer.renew(A))

    assert found[0].fingerprint == found[1].fingerprint
    assert len(ca.orders) == 2


async def test_what_another_process_has_renewed_is_taken(ca: SmallCa, tmp_path: Path) -> None:
    first, second = (make_room(ca.directory, ca.ca_file, tmp_path) for _ in range(2))
    async with running(first), running(second):
        ca.days = 1
        first.want(A)
        await obtained(first)
        second.want(A)
        old = await obtained(second)
        ca.days = 90
        new = await first.issuer.renew(A)
        assert second.issuer.find(A) is old
        second.pass_time(0.7 * DAY)
        while second.issuer.find(A) is old:
            await trio.testing.wait_all_tasks_blocked()
        found = second.issuer.find(A)
        assert found is not None
        assert found.fingerprint == new.fingerprint
    assert len(ca.orders) == 2


CRASHES = """
import sys, trio
from kamal_proxy.logs import Log
from kamal_proxy.metrics import Metrics
from kamal_proxy.run_options import AcmeOptions
from kamal_proxy.tls.issuer import Authority, Issuer
directory, ca_file, path = sys.argv[1:]
issuer = Issuer(AcmeOptions(directory=directory, ca_file=ca_file), Log(print), Metrics())
issuer.set_wanted({"a.example.com": Authority("", path)})
trio.run(issuer.run)
"""


@pytest.mark.parametrize("at", ["nonce", "account", "order", "challenge", "finalize", "cert"])
async def test_a_process_that_is_killed(ca: SmallCa, tmp_path: Path, at: str) -> None:
    """In the middle of any request: what it leaves is whole, and nobody waits for it."""
    killed = trio.Event()

    async def kill(_: trio.SSLStream[trio.SocketStream]) -> None:
        process.kill()
        await process.wait()
        killed.set()

    ca.script[f"/{at}"] = lambda _: None if killed.is_set() else kill
    command = [sys.executable, "-c", CRASHES, ca.directory, ca.ca_file, str(tmp_path)]
    process = await trio.lowlevel.open_process(command)
    await killed.wait()
    async with running(make_room(ca.directory, ca.ca_file, tmp_path)) as room:
        room.want(A)
        await obtained(room)
    ledger = Ledger.decode(room.store.ledger() or b"")
    assert len(ledger._orders) == 2, "the first was written down before it was made"
    assert len(ca.orders) == 1 + (at in ("challenge", "finalize", "cert"))
    names = {path.name for path in room.store.path.iterdir()}
    left = {name for name in names if name.endswith("+http-01")}
    assert names - left == {A, "acme_account+key", "acme_attempts+json"}
    assert len(left) == (at == "challenge")


# Coming and going


async def test_a_host_that_is_removed_while_its_certificate_is_obtained(
    ca: SmallCa, room: Room
) -> None:
    ca.polls = 1_000_000
    room.want(A)
    await ca.wait_for("challenge")
    room.want(B)
    assert await room.issuer.wait(A) is None
    ca.polls = 0
    await obtained(room, B)
    assert [row.host for row in room.issuer.describe()] == [B]
    assert [host for _, host in room.messages()] == [B]
    while list(room.store.path.glob("*+http-01")) or list(room.store.path.glob("*+lock")):
        await trio.testing.wait_all_tasks_blocked()
    room.want(A, B)
    await obtained(room, A)


async def test_another_directory_for_the_same_host(ca: SmallCa, room: Room, tmp_path: Path) -> None:
    """Such as Let's Encrypt's own after that for staging."""
    room.want(A)
    first = await obtained(room)
    other = Authority(ca.url("/dir?other"), str(tmp_path))
    ca.script["/dir?other"] = Answer(500, b"")
    room.issuer.set_wanted({A: other})
    assert room.issuer.find(A) is first, "better than nothing"
    await room.wait_for("Certificate can't be obtained", A)
    assert room.issuer.find(A) is first
    room.issuer.set_wanted({A: room.authority})
    while room.issuer.find(A) is first:
        await trio.testing.wait_all_tasks_blocked()
    again = room.issuer.find(A)
    assert again is not None
    assert again.fingerprint == first.fingerprint, "it was in its store"


async def test_stopping_while_certificates_are_obtained(
    ca: SmallCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acme_client, "TIMEOUT", 600)
    room = make_room(ca.directory, ca.ca_file, tmp_path)

    async def dawdle(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        await trio.sleep_forever()

    ca.script["/finalize"] = lambda _: dawdle
    async with running(room):
        room.want(A, B)
        await ca.wait_for("finalize", 2)
    while leftovers := [path.name for path in room.store.path.iterdir() if "+" in path.name]:
        if set(leftovers) == {"acme_account+key", "acme_attempts+json"}:
            break
        await trio.testing.wait_all_tasks_blocked()
    assert not (room.store.path / A).exists()
    ca.script.clear()
    async with running(make_room(ca.directory, ca.ca_file, tmp_path)) as again:
        again.want(A, B)
        await obtained(again, A)
        await obtained(again, B)


async def test_waiting_is_the_callers_deadline(ca: SmallCa, room: Room) -> None:
    ca.polls = 1_000_000
    room.want(A)
    await ca.wait_for("challenge")
    with trio.move_on_after(0.05) as scope:
        await room.issuer.wait(A)
    assert scope.cancelled_caught


# On demand


async def test_a_host_that_no_deploy_has_named(ca: SmallCa, room: Room) -> None:
    assert await room.issuer.load(A, room.authority) is None
    assert room.issuer.describe() == []
    assert ca.requests == []
    room.issuer.request(A, room.authority)
    found = await obtained(room)
    assert await room.issuer.load(A, room.authority) is found
    room.want(B)
    assert room.issuer.find(A) is found, "only what was wanted is forgotten"
    room.want(A, B)
    room.want(B)
    assert room.issuer.find(A) is None


async def test_it_is_loaded_after_a_restart(ca: SmallCa, room: Room, tmp_path: Path) -> None:
    room.issuer.request(A, room.authority)
    found = await obtained(room)
    async with running(make_room(ca.directory, ca.ca_file, tmp_path)) as again:
        loaded = await again.issuer.load(A, again.authority)
        assert loaded is not None
        assert loaded.fingerprint == found.fingerprint
        assert again.issuer.find(A) is loaded
        again.pass_time(61 * DAY)
        again.issuer.find(A)
        await again.wait_for("Certificate renewed", A)


async def test_it_is_not_renewed_once_nobody_asks_for_it(ca: SmallCa, room: Room) -> None:
    room.issuer.request(A, room.authority)
    await obtained(room)
    room.pass_time(61 * DAY)
    while room.issuer.describe():
        await trio.testing.wait_all_tasks_blocked()
    assert len(ca.orders) == 1


async def test_there_are_not_more_of_them_than_fit(
    ca: SmallCa, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_module, "MAX_ON_DEMAND", 3)
    room.want(A)
    for number in range(10):
        room.clock.offset += 1
        room.issuer.request(f"host{number}.example.com", room.authority)
    assert [row.host for row in room.issuer.describe()] == [
        A, "host7.example.com", "host8.example.com", "host9.example.com"
    ]  # fmt: skip


async def test_a_request_does_not_choose_another_authority(ca: SmallCa, room: Room) -> None:
    room.want(A)
    await obtained(room)
    room.issuer.request(A, Authority("https://other.example/", room.authority.cache_path))
    assert room.describe(A).directory == ca.directory


async def test_stored_rubbish_is_told(ca: SmallCa, room: Room) -> None:
    room.store.path.mkdir()
    (room.store.path / A).write_text("garbage")
    assert await room.issuer.load(A, room.authority) is None
    await room.wait_for("Certificate can't be loaded", A)
    assert await room.issuer.load("*", room.authority) is None


# Options


async def test_only_the_authority_of_the_options_gets_what_they_say(
    ca: SmallCa, tmp_path: Path
) -> None:
    room = make_room("https://elsewhere.invalid/dir", ca.ca_file, tmp_path, email="ops@example.com")
    room.issuer.set_wanted({A: Authority(ca.directory, str(tmp_path))})
    async with running(room):
        line = await room.wait_for("Certificate can't be obtained", A)
    assert "its certificate is not good" in line["error"], "the file is not for this authority"
