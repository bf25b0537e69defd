"""Certificates over the admin API: described, renewed, and what an authority says to that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import trio

from kamal_proxy.control.client import ControlClient
from kamal_proxy.control.messages import CertificateDescription, from_json
from kamal_proxy.errors import (
    AcmeError,
    CertificateError,
    CertificateNotFoundError,
    CertificateStoreError,
    InvalidOptionsError,
    KamalProxyError,
)
from kamal_proxy.options import DeployOptions
from kamal_proxy.run_options import AcmeOptions
from tests.certificates import make_ca
from tests.control.calling import (
    Api,
    ScriptedCertificates,
    ScriptedServices,
    document,
    error_in,
    events_in,
    open_scripted,
)
from tests.running import Lines, open_embedded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.control.calling import Document
    from tests.scripted import Upstream

AUTHORITY = make_ca()
WORDS = "a.test: DNS problem: NXDOMAIN looking up A for a.test"
OBTAINED = CertificateDescription(
    host="a.test",
    names=("a.test",),
    issuer="E7",
    key_type="ECDSA P-256",
    not_after=1.5e9,
    renew_at=1.4e9,
    directory="https://ca.test/dir",
)
FAILING = CertificateDescription(
    host="b.test", state="failing", next_attempt=1.4e9, last_error=WORDS
)


@pytest.fixture
def certificates() -> ScriptedCertificates:
    return ScriptedCertificates([OBTAINED, FAILING])


async def ask(path: Path, call: Callable[[ControlClient], Any]) -> Any:
    """Let the blocking client do something."""
    return await trio.to_thread.run_sync(call, ControlClient(path))


def deploy(upstream: Upstream, **service_options: Any) -> Document:
    """Return the body of a deploy."""
    return document(upstream.options()) | {"service_options": service_options}


# --- scripted ones -------------------------------------------------------------------------------


async def test_list(directory: Path, certificates: ScriptedCertificates) -> None:
    path = directory / "s"
    async with open_scripted(path, ScriptedServices(), Lines(), certificates) as api:
        response = await api.call("GET", "/v1/certificates")
        assert response.status == 200
        obtained, failing = json.loads(response.body)["certificates"]
        assert obtained == {
            "host": "a.test",
            "names": ["a.test"],
            "issuer": "E7",
            "key_type": "ECDSA P-256",
            "not_after": 1.5e9,
            "renew_at": 1.4e9,
            "directory": "https://ca.test/dir",
        }
        assert failing == {
            "host": "b.test",
            "state": "failing",
            "next_attempt": 1.4e9,
            "last_error": WORDS,
        }
        assert await ask(path, ControlClient.certificates) == [OBTAINED, FAILING]
        certificates.described.clear()
        assert await ask(path, ControlClient.certificates) == []


async def test_renew(directory: Path, certificates: ScriptedCertificates) -> None:
    path = directory / "s"
    async with open_scripted(path, ScriptedServices(), Lines(), certificates) as api:
        response = await api.call("POST", "/v1/certificates/b%2Etest/renew")
        assert (response.status, response.body) == (204, b"")
        await ask(path, lambda client: client.renew_certificate("a.test"))
    assert certificates.renewed == ["b.test", "a.test"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (AcmeError(WORDS, ("a line", "another"), kind="dns", retry_after=60.0), 502, "acme"),
        (CertificateStoreError("/certs/a.test: no space left"), 500, "certificate_store"),
        (CertificateNotFoundError("no certificate is obtained for a.test"), 404,
         "certificate_not_found"),
    ],
    ids=["authority", "store", "gone"],
)  # fmt: skip
async def test_a_renewal_that_fails_says_why(
    directory: Path,
    certificates: ScriptedCertificates,
    error: KamalProxyError,
    status: int,
    code: str,
) -> None:
    path = directory / "s"
    certificates.error = error
    async with open_scripted(path, ScriptedServices(), Lines(), certificates) as api:
        response = await api.call("POST", "/v1/certificates/a.test/renew")
        assert response.status == status
        assert error_in(response) == {
            "code": code,
            "message": str(error),
            "details": list(error.details),
        }
        with pytest.raises(KamalProxyError) as caught:
            await ask(path, lambda client: client.renew_certificate("a.test"))
    assert type(caught.value) is type(error)
    assert (str(caught.value), caught.value.details) == (str(error), error.details)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/certificates/c.test/renew", 404, "certificate_not_found"),
        ("POST", "/v1/certificates/%FF/renew", 404, "certificate_not_found"),
        ("POST", "/v1/certificates//renew", 404, "bad_request"),
        ("GET", "/v1/certificates/a.test/renew", 405, "bad_request"),
        ("GET", "/v1/certificates/a.test", 404, "bad_request"),
        ("DELETE", "/v1/certificates", 405, "bad_request"),
    ],
)
async def test_calls_that_make_no_sense(
    directory: Path,
    certificates: ScriptedCertificates,
    method: str,
    path: str,
    status: int,
    code: str,
) -> None:
    where = directory / "s"
    async with (
        open_scripted(where, ScriptedServices(), Lines(), certificates) as api,
        api.caller() as caller,
    ):
        response = await caller.call(method, path)
        assert (response.status, error_in(response)["code"]) == (status, code)
        assert (await caller.call("GET", "/v1")).status == 200, "the connection is kept"
    assert certificates.renewed == []


# --- those of a proxy ----------------------------------------------------------------------------


async def test_a_services_own(directory: Path, upstream: Upstream, tmp_path: Path) -> None:
    path = directory / "s"
    certificate, key = AUTHORITY.issue("a.test", "*.b.test", key="rsa").write(tmp_path)
    body = deploy(
        upstream,
        hosts=["a.test", "*.b.test"],
        tls_enabled=True,
        tls_certificate_path=certificate,
        tls_private_key_path=key,
    )
    async with open_embedded(socket_path=path, https_port=0) as proxy:
        api = Api(path)
        assert events_in(await api.call("PUT", "/v1/services/web", body))[-1]["event"] == "done"
        assert [service["tls"] for service in await api.services()] == [True]
        (own,) = await ask(path, ControlClient.certificates)
        assert own == proxy.proxy.certificates()[0]
        assert (own.host, own.names) == ("a.test,*.b.test", ("a.test", "*.b.test"))
        assert (own.source, own.state, own.issuer) == ("file", "valid", "test CA")
        assert (own.key_type, own.renew_at, own.directory) == ("RSA 2048", 0.0, "")
        with pytest.raises(CertificateNotFoundError, match=r"a\.test"):
            await ask(path, lambda client: client.renew_certificate("a.test"))


async def test_files_that_cannot_be_used_are_named(
    directory: Path, upstream: Upstream, tmp_path: Path
) -> None:
    path = directory / "s"
    certificate, key = AUTHORITY.issue("a.test").write(tmp_path)
    body = deploy(
        upstream,
        hosts=["a.test"],
        tls_enabled=True,
        tls_certificate_path=key,
        tls_private_key_path=certificate,
    )
    async with open_embedded(socket_path=path, https_port=0):
        response = await Api(path).call("PUT", "/v1/services/web", body)
        assert response.status == 422
        error = error_in(response)
        assert (error["code"], error["message"]) == ("certificate", "unable to load certificate")
        assert any(certificate in line or key in line for line in error["details"])
        options = from_json(DeployOptions, {"service": "web", **body})
        with pytest.raises(CertificateError, match="unable to load certificate") as caught:
            await ask(path, lambda client: client.deploy(options, lambda _: None))
        assert caught.value.details == tuple(error["details"])
        assert await Api(path).services() == []


async def test_an_authority_that_cannot_be_reached(
    directory: Path, upstream: Upstream, tmp_path: Path
) -> None:
    path = directory / "s"
    acme = AcmeOptions(directory="https://127.0.0.1:1/dir")
    run: dict[str, Any] = {"socket_path": path, "https_port": 0, "data_directory": tmp_path}
    async with open_embedded(**run, acme=acme) as proxy:
        body = deploy(upstream, hosts=["a.test"], tls_enabled=True)
        response = await Api(path).call("PUT", "/v1/services/web", body)
        assert events_in(response)[-1]["event"] == "done"
        await proxy.lines.wait_for_message("Certificate can't be obtained")
        (row,) = await ask(path, ControlClient.certificates)
        assert (row.host, row.source, row.state) == ("a.test", "acme", "failing")
        assert row.directory == acme.directory
        with pytest.raises(AcmeError, match=r"127\.0\.0\.1"):
            await ask(path, lambda client: client.renew_certificate("A.Test."))


async def test_without_https_nothing_has_tls(directory: Path, upstream: Upstream) -> None:
    path = directory / "s"
    body = deploy(upstream, hosts=["a.test"], tls_enabled=True)
    async with open_embedded(socket_path=path):
        response = await Api(path).call("PUT", "/v1/services/web", body)
        assert (response.status, error_in(response)["code"]) == (422, InvalidOptionsError.code)
        assert await ask(path, ControlClient.certificates) == []
