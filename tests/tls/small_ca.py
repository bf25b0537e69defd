"""A certificate authority of a few lines, which a test can make lie, dawdle or break off.

It speaks real HTTPS and issues real certificates, and believes whoever orders one, unless the test
says otherwise. For honest behaviour there is Pebble; this one is for what Pebble never does.
"""

from __future__ import annotations

import base64
import datetime
import inspect
import json
import secrets
import ssl
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from tests.certificates import Authority, make_ca, pem
from tests.scripted import fail_hanging_test

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROBLEM = "urn:ietf:params:acme:error:"


@attrs.frozen
class Request:
    """What was asked for.

    Attributes:
        method: GET, HEAD or POST.
        path: The path.
        payload: What was inside of the signed message, decoded; None if it was empty.
        protected: Its protected header.
        user_agent: The User-Agent field.
    """

    method: str
    path: str
    payload: Any = None
    protected: dict[str, Any] = attrs.field(factory=dict)
    user_agent: str = ""


@attrs.frozen
class Answer:
    """What is answered: JSON, or a body as it is."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = attrs.field(factory=dict)
    nonce: bool = True

    def encode(self, *, head: bool) -> bytes:
        """Return the bytes of the response."""
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        kind = "application/problem+json" if self.status >= 400 else "application/json"
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **self.headers}
        if self.nonce:
            headers["Replay-Nonce"] = secrets.token_urlsafe(16)
        lines = [f"HTTP/1.1 {self.status} Whatever", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + (b"" if head else body)


def problem(code: str, detail: str, status: int = 400, **headers: str) -> Answer:
    """Answer with a problem document; underscores in the names of headers become hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"type": PROBLEM + code, "detail": detail}, named)


Raw: TypeAlias = Callable[[trio.SSLStream[trio.SocketStream]], Awaitable[object]]
Script: TypeAlias = Answer | Callable[[Request], Answer | Raw | None]


@attrs.define(eq=False)
class SmallCa:
    """A running authority.

    Attributes:
        directory: URL of its ACME directory.
        ca_file: What verifies it.
        script: The beginning of a path, and what is answered there instead: an answer, or what
            returns one; or None, for the ordinary answer; or a coroutine function that writes to
            the connection itself.
        requests: All requests, in order.
        refuse: Returns the problem of a host and a kind of challenge, as JSON data; None if there
            is none.
        kinds: The kinds of challenges it offers.
        days: How long its certificates are valid.
        window: What it suggests for renewals (RFC 9773): start and end; None if it does not.
        polls: How often an order and an authorization are looked at before they are done.
    """

    directory: str
    ca_file: str
    authority: Authority
    script: dict[str, Script] = attrs.field(factory=dict)
    requests: list[Request] = attrs.field(factory=list)
    refuse: Callable[[str, str], dict[str, Any] | None] = lambda _host, _kind: None
    kinds: tuple[str, ...] = ("dns-01", "http-01", "tls-alpn-01")
    days: float = 90.0
    window: tuple[datetime.datetime, datetime.datetime] | None = None
    polls: int = 0
    orders: list[dict[str, Any]] = attrs.field(factory=list)
    issued: list[x509.Certificate] = attrs.field(factory=list)
    changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def paths(self) -> list[str]:
        """What was asked for, without the numbers."""
        return [request.path.split("/")[1] for request in self.requests]

    async def wait_for(self, path: str, count: int = 1) -> None:
        """Wait until something was asked for that often."""
        while self.paths.count(path) < count:
            await self.changed.wait()

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return self.directory.removesuffix("/dir") + path

    def answer(self, request: Request) -> Answer | Raw:
        """Answer as an authority does, or as the script says."""
        for start, script in self.script.items():
            if request.path.startswith(start):
                found = script(request) if callable(script) else script
                if found is not None:
                    return found
        return self._ordinary(request)

    def _ordinary(self, request: Request) -> Answer:
        _, what, *rest = request.path.split("/")
        if what == "dir":
            urls = {
                "newNonce": self.url("/nonce"),
                "newAccount": self.url("/account"),
                "newOrder": self.url("/order"),
                "revokeCert": self.url("/revoke"),
                "keyChange": self.url("/key"),
            }
            if self.window is not None:
                urls["renewalInfo"] = self.url("/ari")
            return Answer(body=urls)
        if what == "nonce":
            return Answer(204, b"")
        if what == "account":
            return Answer(201, {"status": "valid"}, {"Location": self.url("/accounts/1")})
        if what == "ari":
            assert self.window is not None
            start, end = (each.isoformat().replace("+00:00", "Z") for each in self.window)
            return Answer(body={"suggestedWindow": {"start": start, "end": end}})
        if what == "order" and not rest:
            host = request.payload["identifiers"][0]["value"]
            self.orders.append({"host": host, "status": "pending", "polls": 0})
            return self._order(len(self.orders) - 1, 201)
        number = int(rest[0])
        order = self.orders[number]
        if what == "order":
            return self._order(number)
        if what == "authz":
            return self._authorization(number)
        if what == "challenge":
            error = self.refuse(order["host"], rest[1])
            order["status"] = "ready" if error is None else "invalid"
            order["error"], order["kind"], order["polls"] = error, rest[1], self.polls
            return Answer(body=self._challenge(number, rest[1]))
        if what == "finalize":
            order["chain"] = self.sign(request.payload["csr"])
            order["status"], order["polls"] = "valid", self.polls
            return self._order(number)
        assert what == "cert"
        return Answer(body=order["chain"])

    def _order(self, number: int, status: int = 200) -> Answer:
        order = self.orders[number]
        document = {
            "status": self._status(order, "processing"),
            "identifiers": [{"type": "dns", "value": order["host"]}],
            "authorizations": [self.url(f"/authz/{number}")],
            "finalize": self.url(f"/finalize/{number}"),
        }
        if document["status"] == "valid":
            document["certificate"] = self.url(f"/cert/{number}")
        return Answer(status, document, {"Location": self.url(f"/order/{number}")})

    def _authorization(self, number: int) -> Answer:
        order = self.orders[number]
        names = {"ready": "valid", "valid": "valid", "processing": "pending"}
        status = self._status(order, "pending")
        return Answer(
            body={
                "status": names.get(status, status),
                "identifier": {"type": "dns", "value": order["host"]},
                "challenges": [self._challenge(number, kind) for kind in self.kinds],
            }
        )

    def _status(self, order: dict[str, Any], meanwhile: str) -> str:
        if order["polls"] > 0:
            order["polls"] -= 1
            return meanwhile
        return str(order["status"])

    def _challenge(self, number: int, kind: str) -> dict[str, Any]:
        order = self.orders[number]
        token = base64.urlsafe_b64encode(f"{number:<20}{kind:<12}".encode()).decode().rstrip("=")
        found = {
            "type": kind,
            "token": token,
            "status": "pending",
            "url": self.url(f"/challenge/{number}/{kind}"),
        }
        if order.get("kind") == kind:
            error = order.get("error")
            found["status"] = "valid" if error is None else "invalid"
            if error is not None:
                found["error"] = error
        return found

    def sign(self, csr: str, *, names: tuple[str, ...] | None = None, key: Any = None) -> bytes:
        """Issue the certificate of a request, or one for other names or another key."""
        request = x509.load_der_x509_csr(base64.urlsafe_b64decode(csr + "=" * (-len(csr) % 4)))
        wanted = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if names is not None:
            wanted = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=5)
        ca = self.authority
        identifier = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(ca.certificate.subject)
            .public_key(key or request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=self.days))
            .add_extension(wanted, critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value),
                critical=False,
            )
            .sign(ca.key, hashes.SHA256())
        )
        self.issued.append(certificate)
        return pem(certificate) + ca.pem


@asynccontextmanager
async def open_small_ca() -> AsyncIterator[SmallCa]:
    """Run an authority."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        authority = make_ca("small authority")
        (directory / "ca.pem").write_bytes(authority.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("127.0.0.1").write(directory))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_hanging_test)
            made: SmallCa | None = None

            async def handle(stream: trio.SocketStream) -> None:
                assert made is not None
                secure = trio.SSLStream(stream, context, server_side=True)
                try:
                    await _converse(made, secure)
                except trio.BrokenResourceError:
                    pass
                finally:
                    await trio.aclose_forcefully(secure)

            serve = partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
            listeners = await nursery.start(serve)
            port = listeners[0].socket.getsockname()[1]
            made = SmallCa(f"https://127.0.0.1:{port}/dir", str(directory / "ca.pem"), authority)
            yield made
            nursery.cancel_scope.cancel()


async def _converse(ca: SmallCa, stream: trio.SSLStream[trio.SocketStream]) -> None:
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            more = await stream.receive_some()
            if not more:
                return
            data += more
        head, _, data = data.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (each.partition(":") for each in fields)
        }
        size = int(headers.get("content-length", 0))
        while len(data) < size:
            data += await stream.receive_some()
        body, data = data[:size], data[size:]
        method, path, _ = line.split(" ")
        payload, protected = None, {}
        if body:
            message = json.loads(body)
            protected = json.loads(_decoded(message["protected"]))
            payload = json.loads(_decoded(message["payload"]) or b"null")
        request = Request(method, path, payload, protected, headers.get("user-agent", ""))
        ca.requests.append(request)
        found = ca.answer(request)
        ca.changed.set()
        ca.changed = trio.Event()
        if isinstance(found, Answer):
            await stream.send_all(found.encode(head=method == "HEAD"))
        else:
            assert inspect.iscoroutinefunction(found)
            await found(stream)
            return


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
