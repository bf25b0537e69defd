"""certs: the table of certificates, its JSON, and what a renewal asks of the proxy."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy.cli import certs

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedProxy

Command = Callable[..., tuple[int, str, str]]

NOW = 1_800_000_000.0  # 2027-01-15 08:00 UTC
DAY = 86_400.0
HOUR = 3600.0
OBTAINED = {
    "host": "app.example.com",
    "names": ["app.example.com"],
    "issuer": "E7",
    "key_type": "ECDSA P-256",
    "not_after": NOW + 90 * DAY,
    "renew_at": NOW + 60 * DAY,
    "directory": "https://ca.test/directory",
}
OWN = {
    "host": "a.test,*.b.test",
    "names": ["a.test", "*.b.test"],
    "source": "file",
    "issuer": "test CA",
    "not_after": NOW + 1.5 * DAY,
}
FAILING = {
    "host": "new.example.com",
    "state": "failing",
    "next_attempt": NOW + 2 * HOUR,
    "last_error": "DNS problem: NXDOMAIN\n\x1b[31m looking up A",
}
EXPIRED = {
    "host": "old.example.com",
    "state": "expired",
    "issuer": "E7",
    "not_after": NOW - DAY,
    "renew_at": NOW - 30 * DAY,
    "next_attempt": NOW + 2.4 * DAY,
    "last_error": "timeout",
}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        time = staticmethod(lambda: NOW)

    monkeypatch.setattr(certs, "time", Clock)


def answer(proxy: ScriptedProxy, *certificates: dict[str, Any]) -> None:
    proxy.answer_json(200, {"certificates": list(certificates)})


def cells(line: str) -> list[str]:
    """Return the cells of one row, without their colours."""
    return [cell.strip() for cell in re.findall(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", line)]


@pytest.mark.parametrize("words", [["certs", "list"], ["certs", "ls"]], ids=" ".join)
def test_list(proxy: ScriptedProxy, command: Command, words: list[str]) -> None:
    answer(proxy, OWN, OBTAINED, FAILING, EXPIRED)
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert proxy.requests == [("GET", "/v1/certificates", None)]
    *rows, failing, expired = out.splitlines()
    assert [cells(row) for row in rows] == [
        ["Host", "From", "State", "Issuer", "Expires", "Renewal"],
        ["a.test,*.b.test", "file", "valid", "test CA", "2027-01-16 20:00 (36h)", "-"],
        ["app.example.com", "acme", "valid", "E7", "2027-04-15 08:00 (90d)",
         "2027-03-16 08:00 (60d)"],
        ["new.example.com", "acme", "failing", "-", "-", "2027-01-15 10:00 (2h)"],
        # When it is tried again counts, not when it was due.
        ["old.example.com", "acme", "expired", "E7", "2027-01-14 08:00 (over)",
         "2027-01-17 17:36 (2d)"],
    ]  # fmt: skip
    # What an authority says can't steer the terminal.
    assert failing == r"new.example.com: DNS problem: NXDOMAIN\n\x1b[31m looking up A"
    assert expired == "old.example.com: timeout"


def test_list_of_nothing(proxy: ScriptedProxy, command: Command) -> None:
    answer(proxy)
    code, out, err = command("certs", "list")
    assert (code, err) == (0, "")
    (header,) = out.splitlines()
    assert cells(header)[0] == "Host"


def test_list_as_json(proxy: ScriptedProxy, command: Command) -> None:
    answer(proxy, OWN, FAILING)
    code, out, err = command("certs", "list", "--json")
    assert (code, err) == (0, "")
    own, failing = json.loads(out)
    assert own == {
        **OWN,
        "state": "valid",
        "key_type": "",
        "renew_at": 0.0,
        "next_attempt": 0.0,
        "last_error": "",
        "directory": "",
    }
    assert failing["last_error"] == FAILING["last_error"]
    answer(proxy)
    assert command("certs", "list", "--json") == (0, "[]\n", "")


def test_the_clock_is_the_real_one(
    proxy: ScriptedProxy, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certs, "time", time)
    answer(proxy, {"host": "a.test", "not_after": time.time() + 10.5 * HOUR})
    assert re.search(r"\((10|11)h\)", command("certs", "list")[1])


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("app.example.com", "app.example.com"),
        ("*.B.test", "%2A.B.test"),
        ("a/../b?c", "a%2F..%2Fb%3Fc"),
        ("é.test", "%C3%A9.test"),
    ],
)
def test_renew(proxy: ScriptedProxy, command: Command, host: str, place: str) -> None:
    proxy.answers.append(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert command("certs", "renew", host) == (0, "", "")
    assert proxy.requests == [("POST", f"/v1/certificates/{place}/renew", None)]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "certificate_not_found", "no certificate is obtained for a.test"),
        (502, "acme", "a.test: DNS problem: NXDOMAIN looking up A for a.test"),
        (500, "certificate_store", "/certs/a.test: no space left on device"),
    ],
)
def test_a_renewal_that_fails(
    proxy: ScriptedProxy, command: Command, status: int, code: str, sentence: str
) -> None:
    proxy.answer_json(status, {"error": {"code": code, "message": sentence}})
    assert command("certs", "renew", "a.test") == (1, "", f"Error: {sentence}\n")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["certs", "renew"], "accepts 1 arg(s), received 0"),
        (["certs", "renew", "a", "b"], "accepts 1 arg(s), received 2"),
        (["certs", "list", "--all"], "unknown flag: --all"),
        (["certs", "list", "a"], 'unknown command "a" for "kamal-proxy certs list"'),
    ],
)
def test_refused(command: Command, argv: list[str], sentence: str) -> None:
    assert command(*argv) == (1, "", f"Error: {sentence}\n")


def test_without_a_proxy(command: Command) -> None:
    for argv in (["certs", "list"], ["certs", "renew", "a.test"]):
        code, out, err = command(*argv)
        assert (code, out) == (1, "")
        assert err.endswith("connect: no such file or directory\n")


def test_help_of_the_group(command: Command) -> None:
    code, out, err = command("certs")
    assert (code, err) == (0, "")
    usage = out.partition("Examples:\n")[0]
    assert [line.split()[0] for line in usage.splitlines() if line.startswith("  ")] == [
        "kamal-proxy",
        "list",
        "renew",
        "-h,",
    ]
