"""Back-off, budgets and renewal times: within Let's Encrypt's limits whatever happens."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.tls.schedule import (
    DAY,
    HOUR,
    MAX_HOST,
    MAX_REASON,
    MINUTE,
    WEEK,
    BackOff,
    Failure,
    Ledger,
    LedgerError,
    refusal,
    renewal_time,
    suggested_time,
)

NOW = 1_800_000_000.0
HOST = "app.example.com"


def refuse(ledger: Ledger, now: float, *, validations: int = 1, host: str = HOST) -> None:
    """Note what an attempt notes whose validations fail."""
    for _ in range(validations):
        ledger.order(now)
        ledger.validating(host, now)
    ledger.fail(host, now, Failure.REFUSED, "no such name")


def succeed(ledger: Ledger, host: str, now: float, challenge: str) -> None:
    """Note what an attempt notes that succeeds."""
    if challenge:
        ledger.validating(host, now)
        ledger.validated(host, now)
    ledger.issuing(host, now)
    ledger.succeed(host, challenge)


# What failed is left alone


def test_a_new_name_may_be_ordered_at_once() -> None:
    permit = Ledger().permit(HOST, NOW)
    assert (permit.at, permit.why) == (NOW, "")


def test_a_name_that_is_refused_is_left_alone_longer_and_longer() -> None:
    ledger = Ledger()
    now = NOW
    waits = []
    for _ in range(10):
        refuse(ledger, now)
        permit = ledger.permit(HOST, now)
        assert permit.why == "no such name"
        assert not permit.everyone
        waits.append((permit.at - now) / MINUTE)
        now = permit.at
    assert waits == [2, 10, 30, 60, 120, 240, 480, 720, 720, 720]
    assert ledger.permit("other.example.com", now).at == now


def test_the_wait_is_spread_by_chance() -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.REFUSED, "", spread=1.0)
    assert ledger.permit(HOST, NOW).at == pytest.approx(NOW + 2.2 * MINUTE)


def test_success_ends_the_back_off() -> None:
    ledger = Ledger()
    refuse(ledger, NOW)
    refuse(ledger, NOW)
    succeed(ledger, HOST, NOW + 1, "http-01")
    assert ledger.permit(HOST, NOW + 1).at == NOW + 1
    assert ledger.reason(HOST) == ""
    refuse(ledger, NOW + 1)
    assert ledger.permit(HOST, NOW + 1).at == NOW + 1 + 2 * MINUTE


def test_somebody_who_asks_for_it_need_not_wait_for_the_back_off() -> None:
    ledger = Ledger()
    refuse(ledger, NOW)
    assert ledger.permit(HOST, NOW, forced=True).at == NOW


def test_but_five_failed_validations_in_an_hour_are_never_reached() -> None:
    ledger = Ledger()
    for number in range(4):
        refuse(ledger, NOW + number)
    permit = ledger.permit(HOST, NOW + 10, forced=True)
    assert permit.at == NOW + HOUR
    assert "failed validations" in permit.why


def test_a_proxy_that_was_started_anew_waits_a_quarter_of_an_hour() -> None:
    ledger = Ledger()
    for hour in range(8):
        refuse(ledger, NOW + hour * HOUR)
    last = NOW + 7 * HOUR
    assert ledger.permit(HOST, last + MINUTE).at == last + 12 * HOUR
    assert ledger.permit(HOST, last + MINUTE, fresh=True).at == last + 15 * MINUTE
    assert ledger.permit(HOST, last + 2 * HOUR, fresh=True).at == last + 2 * HOUR


def test_a_refusal_without_a_validation_is_left_alone_as_well() -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.REFUSED, "policy")
    assert ledger.permit(HOST, NOW, fresh=True).at == NOW + 2 * MINUTE


# What the authority limits


def test_retry_after_is_kept_also_by_who_asks_for_it() -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.LIMITED, "too many", retry_after=500)
    for forced in (False, True):
        permit = ledger.permit(HOST, NOW, forced=forced, fresh=True)
        assert (permit.at, permit.why, permit.everyone) == (NOW + 500, "too many", False)
    assert ledger.permit("other.example.com", NOW).at == NOW


def test_a_limit_of_the_account_holds_for_all() -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.ALL_LIMITED, "too many orders", retry_after=500)
    permit = ledger.permit("other.example.com", NOW, forced=True)
    assert (permit.at, permit.why, permit.everyone) == (NOW + 500, "too many orders", True)
    assert ledger.permit("other.example.com", NOW + 501).at == NOW + 501


@pytest.mark.parametrize(
    ("retry_after", "expected"), [(None, HOUR), (0, 1), (1e12, WEEK), (7, 7), (-5, 1)]
)
def test_how_long_a_limit_lasts(retry_after: float | None, expected: float) -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.ALL_LIMITED, "", retry_after=retry_after)
    assert ledger.permit(HOST, NOW).at == NOW + expected


def test_retry_after_of_a_refusal_prolongs_the_back_off() -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.REFUSED, "", retry_after=900)
    assert ledger.permit(HOST, NOW).at == NOW + 900


# Budgets


def test_an_account_orders_less_than_three_hundred_times_in_three_hours() -> None:
    ledger = Ledger()
    now = NOW
    orders = 0
    while (permit := ledger.permit(f"host{orders}.example.com", now)).at <= now:
        ledger.order(now)
        orders += 1
        now += 1
    assert orders == 280
    assert permit.everyone
    assert permit.at == NOW + 3 * HOUR
    ledger.prune(permit.at)
    assert ledger.permit(HOST, permit.at).at == permit.at


def test_a_crash_loop_does_not_get_five_certificates_for_one_name_in_a_week() -> None:
    ledger = Ledger()
    for number in range(4):
        ledger = Ledger.decode(ledger.encode())
        assert ledger.permit(HOST, NOW + number, fresh=True).at == NOW + number
        ledger.order(NOW + number)
        succeed(ledger, HOST, NOW + number, "http-01")
    permit = ledger.permit(HOST, NOW + 5, fresh=True)
    assert permit.at == NOW + WEEK
    assert "certificates in a week" in permit.why
    assert ledger.permit(HOST, NOW + 5, forced=True).at == NOW + 5
    succeed(ledger, HOST, NOW + 5, "http-01")
    assert ledger.permit(HOST, NOW + 6, forced=True).at > NOW + 6


@pytest.mark.parametrize("lifetime", [DAY, 6 * HOUR, 2 * DAY, 6 * DAY, 90 * DAY, 5.0])
def test_certificates_that_do_not_last_are_renewed_in_time(lifetime: float) -> None:
    """Those of private authorities often last for a day."""
    ledger = Ledger()
    now = NOW
    for _ in range(20):
        ledger.prune(now)
        assert ledger.permit(HOST, now, lifetime=lifetime).at == now
        ledger.order(now)
        succeed(ledger, HOST, now, "")
        now = max(renewal_time(now, now + lifetime, 1.0), now + MINUTE)


steps = st.lists(
    st.tuples(
        st.sampled_from(["a.example.com", "b.example.com"]),
        st.sampled_from(["ok", "refused", "twice", "limited", "clock", "crash"]),
        st.floats(0, 6 * HOUR),
        st.booleans(),
    ),
    max_size=60,
)


@pytest.mark.fuzz
@given(steps)
def test_whatever_happens_the_limits_are_kept(course: list[tuple[str, str, float, bool]]) -> None:
    """Attempts are made as soon as they are allowed, forced or after restarts at random."""
    ledger = Ledger()
    now = NOW
    failed: list[tuple[str, float]] = []
    issued: list[tuple[str, float]] = []
    orders: list[float] = []
    for host, event, pause, flag in course:
        now += pause
        if event == "crash":
            ledger = Ledger.decode(ledger.encode())
            continue
        ledger.prune(now)
        tries = 2 if event == "twice" else 1
        for _ in range(tries):
            if ledger.permit(host, now, forced=flag, fresh=flag).at > now:
                break
            ledger.order(now)
            orders.append(now)
            if event in ("refused", "twice"):
                ledger.validating(host, now)
                failed.append((host, now))
            elif event == "ok":
                succeed(ledger, host, now, "http-01")
                issued.append((host, now))
        if event in ("refused", "twice"):
            ledger.fail(host, now, Failure.REFUSED, "no")
        elif event == "limited":
            ledger.fail(host, now, Failure.LIMITED, "no", retry_after=pause)
    for host in ("a.example.com", "b.example.com"):
        assert _most(failed, host, HOUR) < 5
        assert _most(issued, host, WEEK) <= 5


def _most(events: list[tuple[str, float]], host: str, within: float) -> int:
    times = [at for name, at in events if name == host]
    return max((sum(at <= each < at + within for each in times) for at in times), default=0)


def test_what_a_crash_has_interrupted_counts() -> None:
    ledger = Ledger()
    for number in range(4):
        ledger.validating(HOST, NOW + number)
        ledger = Ledger.decode(ledger.encode())
    assert ledger.permit(HOST, NOW + 9, fresh=True).at == NOW + HOUR
    for number in range(4):
        ledger.validated(HOST, NOW + number)
        ledger.validated(HOST, NOW + number)
        ledger.issuing(HOST, NOW + number)
    ledger = Ledger.decode(ledger.encode())
    assert ledger.permit(HOST, NOW + 9, fresh=True).at == NOW + WEEK
    ledger.not_issued(HOST, NOW + 2)
    ledger.not_issued(HOST, NOW + 2)
    assert ledger.permit(HOST, NOW + 9).at == NOW + 9


# Forgetting, clocks


def test_what_no_longer_matters_is_forgotten() -> None:
    ledger = Ledger()
    for number in range(1000):
        refuse(ledger, NOW, host=f"host{number}.example.com")
    ledger.prune(NOW + 2 * HOUR)
    assert len(ledger) == 1000, "the back-off is remembered"
    ledger.prune(NOW + 2 * DAY)
    assert len(ledger) == 0
    assert len(json.loads(ledger.encode())["orders"]) == 0


def test_the_kind_of_challenge_that_worked_is_remembered() -> None:
    ledger = Ledger()
    assert ledger.challenge(HOST) == ""
    succeed(ledger, HOST, NOW, "tls-alpn-01")
    succeed(ledger, HOST, NOW, "")
    ledger.prune(NOW + 60 * DAY)
    assert Ledger.decode(ledger.encode()).challenge(HOST) == "tls-alpn-01"


def test_but_not_of_all_names_that_there_ever_were() -> None:
    """Those of certificates on demand come and go."""
    ledger = Ledger()
    for number in range(2500):
        succeed(ledger, f"host{number}.example.com", NOW + number, "http-01")
    ledger.prune(NOW + 2500)
    assert len(ledger) == 2500, "they count for a week"
    ledger.prune(NOW + 8 * DAY)
    assert len(ledger) == 2000
    assert ledger.challenge("host2499.example.com") == "http-01"


def test_a_clock_that_was_years_ahead_keeps_nothing_waiting_for_years() -> None:
    ahead = NOW + 3650 * DAY
    ledger = Ledger()
    for number in range(4):
        refuse(ledger, ahead + number)
    succeed(ledger, "b.example.com", ahead, "")
    ledger.fail(HOST, ahead, Failure.ALL_LIMITED, "", retry_after=DAY)
    for number in range(300):
        ledger.order(ahead + number)
    ledger.prune(NOW)
    assert ledger.permit(HOST, NOW).at <= NOW + WEEK
    later = NOW + WEEK
    ledger.prune(later)
    assert ledger.permit(HOST, later).at == later


def test_a_clock_that_jumps_back_does_not_lose_count() -> None:
    ledger = Ledger()
    for number in range(4):
        refuse(ledger, NOW + number)
    ledger.prune(NOW - 30 * DAY)
    assert ledger.permit(HOST, NOW - 30 * DAY, forced=True).at == NOW - 30 * DAY + HOUR


# On disk


def test_a_ledger_survives() -> None:
    ledger = Ledger()
    refuse(ledger, NOW, validations=2)
    succeed(ledger, "b.example.com", NOW, "http-01")
    ledger.fail("c.example.com", NOW, Failure.LIMITED, "too many", retry_after=99)
    ledger.fail("d.example.com", NOW, Failure.ALL_LIMITED, "wait", retry_after=9)
    read = Ledger.decode(ledger.encode())
    assert read.encode() == ledger.encode()
    for host in (HOST, "b.example.com", "c.example.com"):
        assert read.permit(host, NOW) == ledger.permit(host, NOW)
        assert read.reason(host) == ledger.reason(host)


def test_the_words_of_an_authority_do_not_fill_the_disk() -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.REFUSED, "x" * 100_000)
    ledger.fail(HOST, NOW, Failure.ALL_LIMITED, "x" * 100_000)
    assert len(ledger.encode()) < 2 * MAX_REASON + 1000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"version":2}',
        b'{"version":1}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"version":1,"orders":[NaN],"limited_until":0,"limited_why":"","hosts":{}}',
        b'{"version":1,"orders":[1e999],"limited_until":0,"limited_why":"","hosts":{}}',
        b'{"version":1,"orders":[],"limited_until":0,"limited_why":"","hosts":[]}',
        b'{"version":1,"orders":[],"limited_until":0,"limited_why":"","hosts":{"a":{}}}',
        b'{"version":1,"orders":["x"],"limited_until":0,"limited_why":"","hosts":{}}',
    ],
)
def test_what_is_no_ledger(content: bytes) -> None:
    with pytest.raises(LedgerError):
        Ledger.decode(content)


@pytest.mark.parametrize("failures", ["1e999", "-1e999", "NaN", "1" + "0" * 400, "-100", "1000000"])
def test_numbers_that_nobody_has_counted(failures: str) -> None:
    ledger = Ledger()
    ledger.fail(HOST, NOW, Failure.REFUSED, "")
    content = ledger.encode().replace(b'"failures":1', b'"failures":' + failures.encode())
    with contextlib.suppress(LedgerError):
        read = Ledger.decode(content)
        read.fail(HOST, NOW, Failure.REFUSED, "")
        assert read.permit(HOST, NOW).at <= NOW + 12 * HOUR


@pytest.mark.fuzz
@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_a_ledger_or_not(content: bytes) -> None:
    with contextlib.suppress(LedgerError):
        Ledger.decode(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.fuzz
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "version": st.just(1),
            "orders": json_values,
            "limited_until": json_values,
            "limited_why": json_values,
            "hosts": json_values,
        },
    )
)
def test_any_document_is_a_ledger_or_not(document: dict[str, object]) -> None:
    try:
        ledger = Ledger.decode(json.dumps(document).encode())
    except LedgerError:
        return
    ledger.prune(NOW)
    assert math.isfinite(ledger.permit(HOST, NOW).at)


# Authorities that do not answer


def test_an_authority_that_does_not_answer_is_asked_less_and_less() -> None:
    back_off = BackOff()
    assert [back_off.fail() for _ in range(8)] == [15, 30, 60, 120, 240, 480, 900, 900]
    back_off.reset()
    assert back_off.fail(spread=1.0) == pytest.approx(16.5)


@pytest.mark.parametrize(("retry_after", "expected"), [(1, 15), (120, 120), (1e9, HOUR)])
def test_it_may_ask_for_more(retry_after: float, expected: float) -> None:
    assert BackOff().fail(retry_after) == expected


# Renewal


@given(st.floats(1, 10 * 365 * DAY), st.floats(0, 1))
def test_certificates_are_renewed_when_a_third_of_their_life_is_left(
    lifetime: float, spread: float
) -> None:
    at = renewal_time(NOW, NOW + lifetime, spread)
    assert 0.63 <= (at - NOW) / lifetime <= 0.67


def test_two_certificates_are_not_renewed_at_the_same_time() -> None:
    assert (
        renewal_time(NOW, NOW + 90 * DAY, 0.0) - renewal_time(NOW, NOW + 90 * DAY, 1.0) == 3 * DAY
    )


@pytest.mark.parametrize(
    ("suggested", "expected"),
    [
        (NOW + 50 * DAY, NOW + 50 * DAY),
        (NOW - 50 * DAY, NOW + DAY),  # all at once, but not again and again
        (NOW + 500 * DAY, NOW + 81 * DAY),
        (-math.inf, NOW + DAY),
        (math.inf, NOW + 81 * DAY),
    ],
)
def test_suggested_times_are_kept_within_reason(suggested: float, expected: float) -> None:
    assert suggested_time(NOW, NOW + 90 * DAY, suggested) == pytest.approx(expected)


# Names


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "a_b.example.com",
        "xn--bcher-kva.example",
        "localhost",
        "1.example",
        "a1",
        "x--",
    ],
)
def test_names_that_can_have_a_certificate(host: str) -> None:
    assert refusal(host) == ""


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "is an address"),
        ("2001:db8::1", "is an address"),
        ("fe80::1%eth0", "is an address"),
        ("*.example.com", "is a wildcard"),
        ("", "is not a name"),
        (".", "is not a name"),
        ("..", "is not a name"),
        ("a..b", "is not a name"),
        (".example.com", "is not a name"),
        ("example.com.", "is not a name"),
        ("../../etc/passwd", "is not a name"),
        ("a/b", "is not a name"),
        ("a+rsa", "is not a name"),
        ("Example.com", "is not a name"),
        ("b\u00fccher.example", "is not a name"),
        ("a\nb", "is not a name"),
        ("a.example\n", "is not a name"),
        ("a\0", "is not a name"),
        ("-a.example", "is not a name"),
        ("1.2.3", "is not a name"),
        ("a" * 64 + ".example", "is not a name"),
        ("a." * 120 + "com", "is longer than"),
    ],
)
def test_names_that_can_not(host: str, why: str) -> None:
    assert why in refusal(host)


@given(st.text(max_size=300))
def test_what_is_not_refused_is_the_name_of_a_file(host: str) -> None:
    if not refusal(host):
        assert len(host) <= MAX_HOST
        assert host.isascii()
        assert not set(host) & set("/\0+*% \n")
        assert not host.startswith((".", "-"))
