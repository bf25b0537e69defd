"""The options about the certificate authority, and what is counted of certificates."""

from __future__ import annotations

import pytest

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.metrics import Metrics
from kamal_proxy.run_options import AcmeOptions

DIRECTORY = "https://ca.example.com/acme/directory"
SECRET = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directory": DIRECTORY},
        {"directory": "https://127.0.0.1:14000/dir"},
        {"directory": "https://[::1]/dir?a=b"},
        {"directory": "https://ca.example.com"},
        {"email": "ops+tls@example.com"},
        {"eab_key_id": "kid-1", "eab_hmac_key": SECRET},
        {"eab_key_id": "kid-1", "eab_hmac_key": "c2VjcmV0c2VjcmV0c2VjcmV0=="},
        {"directory": DIRECTORY, "ca_file": "/etc/ca.pem"},
    ],
)
def test_options_that_can_be_used(options: dict[str, str]) -> None:
    AcmeOptions(**options).validate()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"directory": "http://ca.example.com/dir"}, "acme-directory .* must be an https URL"),
        ({"directory": "ca.example.com"}, "acme-directory 'ca.example.com' must be"),
        ({"directory": "https://"}, "acme-directory"),
        ({"directory": "https:///dir"}, "acme-directory"),
        ({"directory": "https://user:password@ca.example.com/"}, "acme-directory"),
        ({"directory": "https://ca.example.com/a b"}, "acme-directory"),
        ({"directory": "https://ca.example.com/\n"}, "acme-directory"),
        ({"directory": "https://ca.example.com/#x"}, "acme-directory"),
        ({"email": "ops"}, "acme-email 'ops' must be one address"),
        ({"email": "a@example.com,b@example.com"}, "acme-email"),
        ({"email": "Ops <ops@example.com>"}, "acme-email"),
        ({"eab_key_id": "kid-1"}, "acme-eab-hmac-key is missing"),
        ({"eab_hmac_key": SECRET}, "acme-eab-kid is missing"),
        ({"eab_key_id": "k", "eab_hmac_key": "short"}, "must be base64url"),
        ({"eab_key_id": "k", "eab_hmac_key": SECRET + "+/"}, "must be base64url"),
        ({"ca_file": "/etc/ca.pem"}, "acme-ca-file is of no use without acme-directory"),
    ],
)
def test_options_that_can_not(options: dict[str, str], why: str) -> None:
    with pytest.raises(InvalidOptionsError, match=why) as caught:
        AcmeOptions(**options).validate()
    assert SECRET not in str(caught.value)


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(AcmeOptions(eab_key_id="k", eab_hmac_key=SECRET))


def test_what_is_counted() -> None:
    metrics = Metrics()
    metrics.certificate_expiry("a.example.com", 1_800_000_000.7)
    metrics.certificate_expiry("b.example.com", 1_900_000_000.0)
    metrics.certificate_expiry("b.example.com", None)
    metrics.certificate_expiry("c.example.com", None)
    metrics.certificate_attempt(True)
    metrics.certificate_attempt(False)
    metrics.certificate_attempt(False)
    lines = metrics.render("")[0].decode().splitlines()
    assert [line for line in lines if line.startswith("kamal_proxy_certificate")] == [
        'kamal_proxy_certificate_expiry_timestamp_seconds{host="a.example.com"} 1.8e+09',
        'kamal_proxy_certificate_attempts_total{result="ok"} 1.0',
        'kamal_proxy_certificate_attempts_total{result="failed"} 2.0',
    ]
