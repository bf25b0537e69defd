"""Whatever a certificate authority answers: an AcmeError of one line is the worst of it."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from requests.adapters import BaseAdapter

from kamal_proxy.errors import AcmeError, CertificateStoreError
from kamal_proxy.tls.acme_client import AcmeClient
from kamal_proxy.tls.challenges import Answers
from kamal_proxy.tls.store import CertificateStore
from tests.certificates import key_pem, make_ca, make_key
from tests.fuzzing import at_least

if TYPE_CHECKING:
    from collections.abc import Mapping

HOST = "app.example.com"
KEY = key_pem(make_key("ec"))
CERTIFICATE = make_ca().issue(HOST).chain_pem
TOKEN = "YSBjaGFsbGVuZ2UncyB0b2tlbiBvZiBlbm91Z2ggYml0cw"
URL = "https://ca.test"
NAME = {"type": "dns", "value": HOST}
CHALLENGES = [
    {"type": kind, "token": TOKEN, "status": "pending", "url": f"{URL}/challenge"}
    for kind in ("http-01", "tls-alpn-01", "dns-01")
]
ORDER = {
    "status": "pending",
    "identifiers": [NAME],
    "authorizations": [f"{URL}/authz"],
    "finalize": f"{URL}/finalize",
    "certificate": f"{URL}/cert",
}
WINDOW = {"start": "2026-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z"}
#: What an authority answers that means well, by the path; the order is ready at the second look.
GOOD: dict[str, Any] = {
    "/dir": {
        "newNonce": f"{URL}/nonce",
        "newAccount": f"{URL}/account",
        "newOrder": f"{URL}/order",
        "renewalInfo": f"{URL}/ari",
        "meta": {"termsOfService": f"{URL}/terms"},
    },
    "/nonce": {},
    "/account": {"status": "valid", "contact": []},
    "/order": ORDER,
    "/order/1": {**ORDER, "status": "ready"},
    "/authz": {"status": "pending", "identifier": NAME, "challenges": CHALLENGES},
    "/challenge": CHALLENGES[0],
    "/finalize": {**ORDER, "status": "valid"},
    "/cert": CERTIFICATE,
    "/ari": {"suggestedWindow": WINDOW},
}  # fmt: skip

words = st.sampled_from(
    ["", "valid", "invalid", "ready", "processing", "http-01", "dns", HOST, URL, TOKEN, "../x", "é"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words | st.sampled_from(["type", "status", "url", "error"]), inner)
    ),
    max_leaves=6,
)
PROBLEM = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "no", "subproblems": []}


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values inside a document."""
    found = [path]
    if isinstance(document, dict | list):
        inside = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in inside:
            found += places(value, (*path, key))
    return found


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a document with another value at a path."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


@st.composite
def scripts(draw: st.DrawFn) -> dict[str, tuple[int, Any, dict[str, str]]]:
    """Return answers of which one to three are odd: status, content, header fields."""
    script: dict[str, tuple[int, Any, dict[str, str]]] = {}
    for path, document in GOOD.items():
        content = document
        if path == "/authz" and draw(st.booleans()):
            content = {**document, "status": "valid"}
        script[path] = 200, content, {"Location": f"{URL}/order/1"}
    for path in draw(st.lists(st.sampled_from(sorted(GOOD)), min_size=1, max_size=3)):
        status, content, fields = script[path]
        where = draw(st.sampled_from(places(content)))
        content = draw(
            st.just(content)
            | st.binary(max_size=20)
            | values.map(lambda value, c=content, w=where: changed(c, w, value))  # type: ignore[misc]
            | st.dictionaries(st.sampled_from(sorted(PROBLEM)), values | words)
        )
        status = draw(st.sampled_from([status, 201, 204, 301, 400, 403, 404, 409, 429, 500, 503]))
        odd = st.dictionaries(
            st.sampled_from(["Location", "Replay-Nonce", "Retry-After", "Link", "Content-Type"]),
            st.text(st.characters(max_codepoint=255), max_size=20) | words,
            max_size=2,
        )
        script[path] = status, content, {**fields, **draw(odd)}
    return script


class Scripted(BaseAdapter):
    """Answers each request from a script, without any network."""

    def __init__(self, script: Mapping[str, tuple[int, Any, dict[str, str]]]) -> None:
        super().__init__()
        self._script = script

    def send(self, request: requests.PreparedRequest, **_: Any) -> requests.Response:  # type: ignore[override]
        """Return the answer for the path; 404 for any other."""
        assert request.url is not None
        path = request.url.removeprefix(URL)
        if path.startswith("/ari/"):  # followed by which certificate is meant
            path = "/ari"
        status, content, fields = self._script.get(path, (404, b"", {}))
        response = requests.Response()
        response.status_code = status
        response.url = request.url
        response.request = request
        response.headers.update({"Replay-Nonce": "bm9uY2U", **fields})
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        response.raw = io.BytesIO(body)
        return response

    def close(self) -> None:
        """Nothing is open."""


class Silent:
    """Is told, and says nothing."""

    def validating(self) -> None: ...

    def issuing(self) -> None: ...


def talk(script: Mapping[str, tuple[int, Any, dict[str, str]]], store: CertificateStore) -> None:
    client = AcmeClient(f"{URL}/dir")
    client._network.session.mount("https://", Scripted(script))
    client.end()  # it does not wait between two looks at an order
    try:
        client.open_account(KEY)
        client.renewal_time(CERTIFICATE)
        client.obtain(HOST, Answers(), store, Silent(), replaces=CERTIFICATE)
    finally:
        client.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CertificateStore:
    return CertificateStore(tmp_path_factory.mktemp("store"), "test")


@pytest.mark.fuzz
@at_least(150)
@given(scripts())
def test_any_answers(
    store: CertificateStore, script: Mapping[str, tuple[int, Any, dict[str, str]]]
) -> None:
    with pytest.raises((AcmeError, CertificateStoreError)) as caught:
        talk(script, store)  # at best the certificate has another key
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_good_answers_lead_to_the_end(store: CertificateStore) -> None:
    """Otherwise the odd ones at the end would never be read."""
    script = {
        path: (200, document, {"Location": f"{URL}/order/1"}) for path, document in GOOD.items()
    }
    script["/authz"] = 200, {**GOOD["/authz"], "status": "valid"}, {}
    script["/order/1"] = 200, {**ORDER, "status": "valid"}, {}
    with pytest.raises(AcmeError, match="does not belong"):
        talk(script, store)
