"""Conversations with certificate authorities: Pebble, and one that lies, dawdles and breaks off."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from kamal_proxy.errors import AcmeError
from kamal_proxy.tls.acme_client import Account, AcmeClient, Obtained
from kamal_proxy.tls.acme_errors import UnknownAccountError, ValidationError, seconds_of
from kamal_proxy.tls.acme_messages import renewal_identifier
from kamal_proxy.tls.challenges import Answers, challenge_certificate
from kamal_proxy.tls.schedule import Failure
from kamal_proxy.tls.store import CertificateStore
from kamal_proxy.tls.transport import MAX_ANSWER
from tests.certificates import key_pem, make_ca, make_key, rsa_key
from tests.tls.pebble import needs_pebble, open_pebble
from tests.tls.small_ca import Answer, Request, SmallCa, open_small_ca, problem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.tls.pebble import Pebble

HOST = "app.example.com"


class Witness:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def validating(self) -> None:
        self.told.append("validating")

    def issuing(self) -> None:
        self.told.append("issuing")


KEY = key_pem(make_key("ec"))


@pytest.fixture
async def ca() -> AsyncIterator[SmallCa]:
    async with open_small_ca() as made:
        yield made


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def store(tmp_path: Path) -> CertificateStore:
    return CertificateStore(tmp_path, "test")


async def obtain(
    ca: SmallCa | Pebble,
    answers: Answers,
    store: CertificateStore,
    *,
    host: str = HOST,
    account: dict[str, str] | None = None,
    witness: Witness | None = None,
    **options: Any,
) -> Obtained:
    """Open an account and obtain a certificate, in a thread."""

    def talk() -> Obtained:
        client = AcmeClient(ca.directory, ca_file=ca.ca_file)
        try:
            client.open_account(KEY, **(account or {}))
            return client.obtain(host, answers, store, witness or Witness(), **options)
        finally:
            client.end()

    return await trio.to_thread.run_sync(talk)


async def failure(ca: SmallCa, answers: Answers, store: CertificateStore) -> AcmeError:
    """Return how that fails."""
    with pytest.raises(AcmeError) as caught:
        await obtain(ca, answers, store)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert list(store.path.parent.rglob("*+http-01")) == [], "no answer stays"
    return caught.value


def leaf(obtained: Obtained) -> x509.Certificate:
    return x509.load_pem_x509_certificate(obtained.chain_pem)


# Pebble


@needs_pebble
async def test_http_01(answers: Answers, store: CertificateStore) -> None:
    async with open_pebble(token=answers.token, nonce_reject=40) as pebble:
        obtained = await obtain(pebble, answers, store)
    assert obtained.challenge == "http-01"
    assert pebble.asked[0][0] == HOST
    names = leaf(obtained).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST]
    assert isinstance(leaf(obtained).public_key(), ec.EllipticCurvePublicKey)
    assert len(x509.load_pem_x509_certificates(obtained.chain_pem)) == 2
    assert b"BEGIN EC PRIVATE KEY" in obtained.key_pem
    assert answers.token(pebble.asked[0][1]) is None
    assert list(store.path.iterdir()) == []


@needs_pebble
async def test_http_01_by_another_process(answers: Answers, store: CertificateStore) -> None:
    """The authority comes to a process that only shares the store."""
    async with open_pebble(token=store.token) as pebble:
        assert (await obtain(pebble, answers, store)).challenge == "http-01"


@needs_pebble
async def test_tls_alpn_01(answers: Answers, store: CertificateStore) -> None:
    async with open_pebble(certificate=answers.certificate) as pebble:
        obtained = await obtain(pebble, answers, store, kinds=["tls-alpn-01"])
    assert obtained.challenge == "tls-alpn-01"
    assert set(pebble.shaken) == {HOST}
    assert answers.certificate(HOST) is None
    assert list(store.path.iterdir()) == []


@needs_pebble
async def test_tls_alpn_01_by_another_process(answers: Answers, store: CertificateStore) -> None:
    async with open_pebble(certificate=store.challenge) as pebble:
        obtained = await obtain(pebble, answers, store, kinds=["tls-alpn-01"])
    assert obtained.challenge == "tls-alpn-01"


@needs_pebble
async def test_a_validation_that_the_authority_remembers_is_not_repeated(
    answers: Answers, store: CertificateStore
) -> None:
    async with open_pebble(token=answers.token, reuse=100) as pebble:
        first = await obtain(pebble, answers, store)
        second = await obtain(pebble, answers, store)
    assert (first.challenge, second.challenge) == ("http-01", "")
    assert len(set(pebble.asked)) == 1
    assert first.key_pem != second.key_pem


@needs_pebble
@pytest.mark.parametrize("kind", ["http-01", "tls-alpn-01"])
async def test_nobody_listens(answers: Answers, store: CertificateStore, kind: str) -> None:
    async with open_pebble() as pebble:
        with pytest.raises(ValidationError) as caught:
            await obtain(pebble, answers, store, kinds=[kind])
    assert caught.value.kind == Failure.REFUSED
    assert caught.value.challenge == kind
    assert not caught.value.hopeless
    assert str(caught.value).startswith(f"{kind}: ")
    assert "onnect" in str(caught.value)


@needs_pebble
async def test_a_wrong_answer(answers: Answers, store: CertificateStore) -> None:
    certificate = make_ca().issue(HOST)
    async with open_pebble(
        token=lambda _: b"wrong", certificate=lambda _: _parsed(certificate)
    ) as pebble:
        with pytest.raises(ValidationError, match="did not match"):
            await obtain(pebble, answers, store)
        with pytest.raises(ValidationError, match="tls-alpn-01: "):
            await obtain(pebble, answers, store, kinds=["tls-alpn-01"])
    assert set(pebble.shaken) == {HOST}


def _parsed(issued: Any) -> Any:
    from kamal_proxy.tls.certificates import parse_certificate

    return parse_certificate(issued.chain_pem, issued.key_pem)


@needs_pebble
async def test_a_name_that_the_authority_refuses(answers: Answers, store: CertificateStore) -> None:
    async with open_pebble(config={"domainBlocklist": ["blocked.example"]}) as pebble:
        with pytest.raises(AcmeError) as caught:
            await obtain(pebble, answers, store, host="app.blocked.example")
    assert caught.value.kind == Failure.REFUSED
    assert "(rejectedIdentifier)" in str(caught.value)


@needs_pebble
async def test_external_account_binding(answers: Answers, store: CertificateStore) -> None:
    secret = base64.urlsafe_b64encode(b"0" * 32).decode().rstrip("=")
    other = base64.urlsafe_b64encode(b"1" * 32).decode().rstrip("=")
    config = {"externalAccountBindingRequired": True, "externalAccountMACKeys": {"kid-1": secret}}
    async with open_pebble(token=answers.token, config=config) as pebble:
        with pytest.raises(AcmeError, match="--acme-eab-kid") as caught:
            await obtain(pebble, answers, store)
        assert caught.value.kind == Failure.ACCOUNT
        for wrong in ({"eab_key_id": "kid-1", "eab_hmac_key": other}, {"eab_key_id": "kid-2"}):
            account = {"eab_hmac_key": secret, **wrong}
            with pytest.raises(AcmeError):
                await obtain(pebble, answers, store, account=account)
        right = {"eab_key_id": "kid-1", "eab_hmac_key": secret, "contact": "ops@example.com"}
        assert await obtain(pebble, answers, store, account=right)


@needs_pebble
async def test_one_account_for_a_key(answers: Answers, store: CertificateStore) -> None:
    def accounts() -> set[str]:
        found = set()
        for _ in range(2):
            client = AcmeClient(pebble.directory, ca_file=pebble.ca_file)
            found.add(client.open_account(KEY).url)
            client.end()
        return found

    async with open_pebble() as pebble:
        assert len(await trio.to_thread.run_sync(accounts)) == 1


# Requests


async def test_what_is_sent(ca: SmallCa, answers: Answers, store: CertificateStore) -> None:
    account = {"contact": "ops@example.com"}
    assert await obtain(ca, answers, store, account=account)
    assert {request.user_agent for request in ca.requests} == {"kamal-proxy"}
    sent = {request.path: request for request in ca.requests if request.method == "POST"}
    assert sent["/account"].payload == {
        "termsOfServiceAgreed": True,
        "contact": ["mailto:ops@example.com"],
    }
    assert sent["/account"].protected["alg"] == "ES256"
    assert sent["/order"].payload == {"identifiers": [{"type": "dns", "value": HOST}]}
    assert sent["/order"].protected["kid"] == ca.url("/accounts/1")
    assert sent["/challenge/0/http-01"].payload == {}


async def test_somebody_is_told_before_it_counts(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    witness = Witness()
    told: dict[str, list[str]] = {}

    def remember(request: Request) -> None:
        told[request.path.split("/")[1]] = witness.told.copy()

    ca.script["/"] = remember
    await obtain(ca, answers, store, witness=witness)
    assert told["authz"] == ["validating"]
    assert told["challenge"] == ["validating"]
    assert told["finalize"] == ["validating", "issuing"]
    assert witness.told == ["validating", "issuing"]


async def test_an_account_of_the_original_may_have_an_rsa_key(ca: SmallCa) -> None:
    client = AcmeClient(ca.directory, ca_file=ca.ca_file)
    await trio.to_thread.run_sync(client.open_account, key_pem(rsa_key(2048), traditional=True))
    client.end()
    assert ca.requests[-1].protected["alg"] == "RS256"


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"garbage",
        key_pem(make_key("ed25519")),
        key_pem(ec.generate_private_key(ec.SECP384R1())),
    ],
)
async def test_keys_that_no_account_can_have(ca: SmallCa, pem: bytes) -> None:
    client = AcmeClient(ca.directory, ca_file=ca.ca_file)
    with pytest.raises(AcmeError, match="key of the account") as caught:
        await trio.to_thread.run_sync(client.open_account, pem)
    assert caught.value.kind == Failure.ACCOUNT
    client.end()


async def test_a_known_account_is_used_as_it_is(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    def talk() -> Account:
        client = AcmeClient(ca.directory, ca_file=ca.ca_file)
        account = client.open_account(KEY)
        client.end()
        again = AcmeClient(ca.directory, ca_file=ca.ca_file, known=account)
        again.obtain(HOST, answers, store, Witness())
        again.end()
        return account

    account = await trio.to_thread.run_sync(talk)
    assert ca.paths.count("dir") == 1
    assert ca.paths.count("account") == 1
    assert KEY.decode() not in repr(account)


async def test_nonces_are_tried_again_and_again(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    rejected = 0

    def reject(request: Request) -> Answer | None:
        nonlocal rejected
        if request.method != "POST":
            return None
        rejected += 1
        return problem("badNonce", "stale") if rejected % 6 else None

    ca.script["/"] = reject
    assert await obtain(ca, answers, store)
    ca.script["/"] = lambda request: problem("badNonce", "stale") if request.payload else None
    error = await failure(ca, answers, store)
    assert error.kind == Failure.UNREACHABLE
    assert str(error) == "stale (badNonce)"


async def test_polls_until_it_is_done(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    ca.polls = 1
    assert await obtain(ca, answers, store)


async def test_an_order_that_replaces_says_so(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    first = await obtain(ca, answers, store)
    await obtain(ca, answers, store, replaces=first.chain_pem)
    ca.window = now, now
    await obtain(ca, answers, store, replaces=first.chain_pem)
    sent = [each.payload for each in ca.requests if each.path == "/order" and each.payload]
    assert ["replaces" in each for each in sent] == [False, False, True]
    key, serial = sent[2]["replaces"].split(".")
    number = int.from_bytes(base64.urlsafe_b64decode(serial + "=="), "big")
    assert number == ca.issued[0].serial_number
    assert key


@pytest.mark.parametrize("status", [400, 409])
async def test_an_authority_that_does_not_know_what_is_replaced_is_asked_without(
    ca: SmallCa, answers: Answers, store: CertificateStore, status: int
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    ca.window = now, now
    first = await obtain(ca, answers, store)
    ca.script["/order"] = lambda request: (
        problem("malformed", "what?", status)
        if request.payload and "replaces" in request.payload
        else None
    )
    assert await obtain(ca, answers, store, replaces=first.chain_pem)


# What an authority says is wrong


def refusing(ca: SmallCa, code: str, detail: str = "because") -> None:
    ca.refuse = lambda _host, _kind: {
        "type": f"urn:ietf:params:acme:error:{code}",
        "detail": detail,
    }


@pytest.mark.parametrize(
    ("code", "hopeless"),
    [("dns", True), ("caa", True), ("connection", False), ("unauthorized", False), ("tls", False)],
)
async def test_a_validation_that_fails(
    ca: SmallCa, answers: Answers, store: CertificateStore, code: str, hopeless: bool
) -> None:
    refusing(ca, code)
    error = await failure(ca, answers, store)
    assert isinstance(error, ValidationError)
    assert (error.kind, error.challenge, error.hopeless) == (Failure.REFUSED, "http-01", hopeless)
    assert str(error) == f"http-01: because ({code})"


async def test_words_of_any_length_and_shape(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    refusing(ca, "connection", "line\r\nline\x1b[31m\0 " + "x" * 10_000)
    text = str(await failure(ca, answers, store))
    assert text.startswith("http-01: line line [31m x")
    assert text.isprintable()
    assert len(text) < 600


@pytest.mark.parametrize(
    ("code", "detail", "kind"),
    [
        ("rejectedIdentifier", "policy", Failure.REFUSED),
        ("malformed", "bad name", Failure.REFUSED),
        ("somethingNew", "bad name", Failure.REFUSED),
        ("serverInternal", "oops", Failure.UNREACHABLE),
        ("unauthorized", "deactivated", Failure.ACCOUNT),
        ("userActionRequired", "new terms", Failure.ACCOUNT),
        ("rateLimited", "too many new orders (300) from this account", Failure.ALL_LIMITED),
        ("rateLimited", f'too many failed authorizations (5) for "{HOST}"', Failure.LIMITED),
        (
            "rateLimited",
            'too many certificates (50) already issued for "example.com"',
            Failure.LIMITED,
        ),
        ("rateLimited", f"too many for this exact set of identifiers: [{HOST}]", Failure.LIMITED),
        ("rateLimited", 'too many for "other.com"', Failure.ALL_LIMITED),
        ("rateLimited", 'too many for "com"', Failure.ALL_LIMITED),
    ],
)
async def test_an_order_that_is_refused(
    ca: SmallCa,
    answers: Answers,
    store: CertificateStore,
    code: str,
    detail: str,
    kind: Failure,
) -> None:
    ca.script["/order"] = problem(
        code, detail, 429 if code == "rateLimited" else 403, Retry_After="77"
    )
    error = await failure(ca, answers, store)
    assert error.kind == kind
    assert error.retry_after == 77
    assert str(error) == f"{detail} ({code})"


async def test_several_problems_are_all_told(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    document = {
        "type": "urn:ietf:params:acme:error:compound",
        "detail": "several",
        "subproblems": [
            {"type": "urn:ietf:params:acme:error:caa", "detail": "first"},
            {"type": "urn:ietf:params:acme:error:caa", "detail": "second"},
        ],
    }
    ca.script["/order"] = Answer(403, document)
    assert str(await failure(ca, answers, store)) == "several; first; second (compound)"


async def test_an_account_that_is_forgotten(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    ca.script["/order"] = problem("accountDoesNotExist", "who are you?")
    assert isinstance(await failure(ca, answers, store), UnknownAccountError)


async def test_no_challenge_that_can_be_answered(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    ca.kinds = ("dns-01", "made-up-01")
    error = await failure(ca, answers, store)
    assert "no challenge of the kinds http-01, tls-alpn-01" in str(error)
    assert error.kind == Failure.REFUSED


async def test_an_order_that_is_given_up(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    def give_up(request: Request) -> Answer | None:
        ca.orders[0]["status"] = "invalid"
        return ca._order(0)

    ca.script["/finalize"] = give_up
    assert "given up" in str(await failure(ca, answers, store))


# What an authority should not do


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/dir", Answer(500, b"<html>"), "answers with status 500"),
        ("/dir", Answer(404, b""), "answers with status 404"),
        ("/dir", Answer(200, b"<html>"), "can't be used"),
        ("/dir", Answer(200, b"[" * 100_000), "can't be used"),
        ("/dir", Answer(200, []), "can't be used"),
        ("/dir", Answer(200, "text"), "can't be used"),
        ("/dir", Answer(200, None), "can't be used"),
        ("/dir", Answer(200, {}), "can't be used"),
        ("/dir", Answer(200, {"meta": 7}), "can't be used"),
        ("/dir", Answer(200, {"newNonce": 7, "newAccount": [], "newOrder": {}}), "can't be used"),
        ("/dir", Answer(200, {"newNonce": "http://127.0.0.1/", "newAccount": "x"}), "reached"),
        ("/dir", Answer(200, {"newNonce": "file:///etc/passwd", "newAccount": "x"}), "reached"),
        ("/dir", Answer(302, b"", {"Location": "https://127.0.0.1/"}), "redirects to https://127"),
        ("/account", Answer(307, b"", {"Location": "/account"}), "redirects to /account"),
        ("/dir", Answer(200, b"x" * (MAX_ANSWER + 1)), "longer than"),
        ("/nonce", Answer(204, b"", nonce=False), "can't be used"),
        ("/account", Answer(201, {}, nonce=False), "can't be used"),
        ("/account", Answer(201, {}), "can't be used"),
        ("/account", Answer(429, b"busy"), "answers with status 429"),
        ("/account", Answer(400, {"type": 7, "detail": []}), ""),
        ("/account", Answer(400, []), ""),
        ("/account", Answer(400, {"type": "x", "subproblems": 7}), ""),
        ("/order", Answer(201, {}, {"Location": "x"}), "can't be used"),
        ("/order", Answer(201, {"status": "made-up"}), "can't be used"),
        ("/order", Answer(201, {"status": "pending", "authorizations": [1, 2]}), "can't be used"),
        ("/order", Answer(201, {"status": "pending", "authorizations": [7]}), "can't be used"),
        ("/authz", Answer(200, {}), "can't be used"),
        ("/authz", Answer(200, {"status": "pending", "challenges": 7}), "can't be used"),
        ("/authz", Answer(200, {"status": "pending", "challenges": []}), "no challenge"),
        (
            "/authz",
            Answer(200, {"status": "pending", "challenges": [{"type": "http-01", "url": "x"}]}),
            "can't be used",
        ),
        (
            "/authz",
            Answer(
                200,
                {
                    "status": "pending",
                    "challenges": [{"type": "http-01", "url": "https://x", "token": "../../x"}],
                },
            ),
            "can't be used",
        ),
        ("/authz", Answer(200, {"status": "invalid", "challenges": []}), "no challenge"),
        ("/challenge", Answer(500, b""), "status 500"),
        ("/finalize", problem("badCSR", "no"), "no (badCSR)"),
        ("/cert", Answer(200, b""), "can't be used"),
        ("/cert", Answer(200, b"garbage"), "can't be used"),
        ("/cert", Answer(404, b""), "status 404"),
    ],
)  # fmt: skip
async def test_answers_that_make_no_sense(
    ca: SmallCa,
    answers: Answers,
    store: CertificateStore,
    path: str,
    answer: Answer,
    words: str,
) -> None:
    ca.script[path] = answer
    assert words in str(await failure(ca, answers, store))


async def test_plain_http_is_not_spoken(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        ca.script["/dir"] = Answer(200, {"newNonce": url, "newAccount": url, "newOrder": url})
        assert "can't be reached" in str(await failure(ca, answers, store))
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_compressed_answer_is_measured_as_it_is_unpacked(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    import gzip

    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < MAX_ANSWER
    ca.script["/dir"] = Answer(200, bomb, {"Content-Encoding": "gzip"})
    assert "longer than" in str(await failure(ca, answers, store))


async def test_certificates_that_were_not_ordered(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    csr = ""

    def keep(request: Request) -> None:
        nonlocal csr
        csr = request.payload["csr"]

    ca.script["/finalize"] = keep
    ca.script["/cert"] = lambda _: Answer(body=ca.sign(csr, names=("other.example.com",)))
    assert "a certificate for other.example.com" in str(await failure(ca, answers, store))
    other = make_key("ec").public_key()
    ca.script["/cert"] = lambda _: Answer(body=ca.sign(csr, key=other))
    assert "does not belong" in str(await failure(ca, answers, store))
    ca.days = 1e-6
    del ca.script["/cert"]
    assert "has expired; is the clock right?" in str(await failure(ca, answers, store))


# Authorities that can't be reached


async def test_nobody_is_there(answers: Answers, store: CertificateStore, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "ca.pem").write_bytes(make_ca().pem)
    away = SmallCa(f"https://127.0.0.1:{port}/dir", str(tmp_path / "ca.pem"), make_ca())
    error = await failure(away, answers, store)
    assert error.kind == Failure.UNREACHABLE
    at = f"the certificate authority at {away.directory}"
    assert str(error) == f"{at} can't be reached: Connection refused"


async def test_it_is_somebody_else(ca: SmallCa, answers: Answers, store: CertificateStore) -> None:
    (store.path.parent / "other.pem").write_bytes(make_ca().pem)
    ca.ca_file = str(store.path.parent / "other.pem")
    error = await failure(ca, answers, store)
    assert error.kind == Failure.UNREACHABLE
    assert "can't be reached: its certificate is not good: " in str(error)
    assert ca.requests == []


@pytest.mark.parametrize("content", [None, b"garbage"])
async def test_a_file_of_certificates_that_is_none(
    ca: SmallCa, answers: Answers, store: CertificateStore, content: bytes | None
) -> None:
    path = store.path.parent / "none.pem"
    if content is not None:
        path.write_bytes(content)
    ca.ca_file = str(path)
    error = await failure(ca, answers, store)
    assert error.kind == Failure.UNREACHABLE


async def test_it_breaks_off(ca: SmallCa, answers: Answers, store: CertificateStore) -> None:
    async def half(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

    for path in ("/dir", "/account", "/order", "/authz", "/challenge", "/finalize", "/cert"):
        ca.script = {path: lambda _: half}
        assert (await failure(ca, answers, store)).kind == Failure.UNREACHABLE


# Ended from outside


CUT = [
    b"",
    b"HTTP/1.1 200 OK\r\nX-Slow: ",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n",
]


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        *(("/nonce", sent) for sent in CUT[:2]),
        *((path, CUT[2]) for path in ("/account", "/authz", "/finalize", "/cert")),
        *(("/dir", sent) for sent in CUT),
    ],
)
async def test_an_authority_that_dawdles_can_be_left(
    ca: SmallCa, answers: Answers, store: CertificateStore, path: str, sent: bytes
) -> None:
    reached = trio.Event()

    async def dawdle(stream: trio.SSLStream[trio.SocketStream]) -> None:
        if sent:
            await stream.send_all(sent)
        reached.set()
        await stream.receive_some()

    ca.script[path] = lambda _: dawdle
    client = AcmeClient(ca.directory, ca_file=ca.ca_file)

    def talk() -> None:
        client.open_account(KEY)
        client.obtain(HOST, answers, store, Witness())

    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await reached.wait()
            client.end()

        nursery.start_soon(end)
        with pytest.raises(AcmeError) as caught:
            await trio.to_thread.run_sync(talk)
    assert caught.value.kind == Failure.ENDED
    assert client.is_ended
    assert list(store.path.parent.rglob("*+http-01")) == []
    with pytest.raises(AcmeError, match="ended"):
        await trio.to_thread.run_sync(client.open_account, KEY)


async def test_a_wait_between_two_polls_can_be_left(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    ca.polls = 1_000_000
    client = AcmeClient(ca.directory, ca_file=ca.ca_file)
    token = ""

    def talk() -> None:
        client.open_account(KEY)
        client.obtain(HOST, answers, store, Witness())

    async with trio.open_nursery() as nursery:

        async def end() -> None:
            nonlocal token
            await ca.wait_for("authz", 3)
            token = next(store.path.glob("*+http-01")).name
            client.end()

        nursery.start_soon(end)
        with pytest.raises(AcmeError) as caught:
            await trio.to_thread.run_sync(talk)
    assert caught.value.kind == Failure.ENDED
    assert token
    assert list(store.path.iterdir()) == []


# When to renew (RFC 9773)


async def renewal(ca: SmallCa, pem: bytes) -> tuple[float | None, float]:
    client = AcmeClient(ca.directory, ca_file=ca.ca_file)
    try:
        return await trio.to_thread.run_sync(client.renewal_time, pem)
    finally:
        client.end()


async def test_an_authority_that_suggests_a_time(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    obtained = await obtain(ca, answers, store)
    start = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    ca.window = start, start + datetime.timedelta(days=2)
    at, again = await renewal(ca, leaf(obtained).public_bytes(Encoding.PEM))
    assert at is not None
    assert 0 <= at - start.timestamp() <= 2 * 86400
    assert again == pytest.approx(6 * 3600, abs=60)
    ca.script["/ari"] = lambda request: Answer(
        body=ca._ordinary(request).body, headers={"Retry-After": "4000"}
    )
    _, again = await renewal(ca, leaf(obtained).public_bytes(Encoding.PEM))
    assert again == pytest.approx(4000, abs=60)


async def test_an_authority_that_does_not(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    obtained = await obtain(ca, answers, store)
    at, again = await renewal(ca, leaf(obtained).public_bytes(Encoding.PEM))
    assert at is None
    assert again > 3600


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500, b""),
        Answer(200, {}),
        Answer(200, {"suggestedWindow": {}}),
        Answer(200, {"suggestedWindow": {"start": "yesterday", "end": "tomorrow"}}),
        Answer(200, {"suggestedWindow": 7}),
        Answer(200, []),
        problem("malformed", "no such certificate"),
    ],
)
async def test_suggestions_that_make_no_sense(
    ca: SmallCa, answers: Answers, store: CertificateStore, answer: Answer
) -> None:
    obtained = await obtain(ca, answers, store)
    now = datetime.datetime.now(datetime.UTC)
    ca.window = now, now
    ca.script["/ari"] = answer
    with pytest.raises(AcmeError):
        await renewal(ca, leaf(obtained).public_bytes(Encoding.PEM))


async def test_any_pem_can_be_asked_about(ca: SmallCa) -> None:
    now = datetime.datetime.now(datetime.UTC)
    ca.window = now, now
    for pem in (b"", b"garbage"):
        with pytest.raises(AcmeError):
            await renewal(ca, pem)


async def test_a_certificate_that_does_not_tell_its_issuers_key(
    ca: SmallCa, answers: Answers, store: CertificateStore
) -> None:
    """Those of small authorities may not; then it has no name by which to ask."""
    now = datetime.datetime.now(datetime.UTC)
    ca.window = now, now
    pem = make_ca().pem
    assert (await renewal(ca, pem))[0] is None
    assert await obtain(ca, answers, store, replaces=pem)
    assert "replaces" not in next(each.payload for each in ca.requests if each.path == "/order")


# Parts


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (None, None),
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("9" * 5000, None),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
        ("Fri, 99 Dec 1999 23:59:59 GMT", None),
        ("\u0661", 1),
    ],
)
def test_retry_after(field: str | None, expected: float | None) -> None:
    assert seconds_of(field) == expected


def test_retry_after_as_a_date() -> None:
    at = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert seconds_of(at) == pytest.approx(100, abs=5)


def test_the_certificate_of_rfc_8737() -> None:
    digest = hashlib.sha256(b"token.thumbprint").digest()
    chain, _ = challenge_certificate(HOST, digest)
    certificate = x509.load_pem_x509_certificate(chain)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == [HOST]
    proof = certificate.extensions.get_extension_for_oid(
        x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
    )
    assert proof.critical
    assert isinstance(proof.value, x509.UnrecognizedExtension)
    assert proof.value.value == b"\x04\x20" + digest
    certificate.verify_directly_issued_by(certificate)


def test_the_example_of_rfc_9773() -> None:
    """RFC 9773 appendix A."""
    pem = b"""-----BEGIN CERTIFICATE-----
MIIBQzCB66ADAgECAgUAh2VDITAKBggqhkjOPQQDAjAVMRMwEQYDVQQDEwpFeGFt
cGxlIENBMCIYDzAwMDEwMTAxMDAwMDAwWhgPMDAwMTAxMDEwMDAwMDBaMBYxFDAS
BgNVBAMTC2V4YW1wbGUuY29tMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeBZu
7cbpAYNXZLbbh8rNIzuOoqOOtmxA1v7cRm//AwyMwWxyHz4zfwmBhcSrf47NUAFf
qzLQ2PPQxdTXREYEnKMjMCEwHwYDVR0jBBgwFoAUaYhba4dGQEHhs3uEe6CuLN4B
yNQwCgYIKoZIzj0EAwIDRwAwRAIge09+S5TZAlw5tgtiVvuERV6cT4mfutXIlwTb
+FYN/8oCIClDsqBklhB9KAelFiYt9+6FDj3z4KGVelYM5MdsO3pK
-----END CERTIFICATE-----"""
    assert renewal_identifier(pem) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


def test_the_digest_is_that_of_the_key_authorization() -> None:
    """RFC 8555 8.1, RFC 8737 3."""
    from acme.challenges import Challenge
    from josepy.jwk import JWKEC

    from kamal_proxy.tls.acme_messages import TlsAlpn01

    key = make_key("ec")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    token = base64.urlsafe_b64encode(b"x" * 32).decode().rstrip("=")
    challenge = Challenge.from_json({"type": "tls-alpn-01", "token": token})
    assert isinstance(challenge, TlsAlpn01)
    jwk = JWKEC(key=key)
    public = jwk.public_key().to_json()
    canonical = json.dumps(
        {name: public[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":")
    )
    thumbprint = base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest())
    authorization = f"{token}.{thumbprint.decode().rstrip('=')}"
    assert challenge.validation(jwk) == hashlib.sha256(authorization.encode()).digest()
