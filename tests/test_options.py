"""Every rule about the values of options, and the sentence that names what breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kamal_proxy.errors import InvalidOptionsError
from kamal_proxy.options import DeploymentOptions, DeployOptions, ServiceOptions
from kamal_proxy.run_options import (
    AcmeOptions,
    RunOptions,
    default_data_directory,
    default_socket_path,
)
from kamal_proxy.target_options import HealthCheckOptions, TargetOptions, split_scheme, split_target


def refusal(options: Any) -> str:
    with pytest.raises(InvalidOptionsError) as caught:
        options.validate()
    assert type(caught.value) is InvalidOptionsError
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("1a2b3c4d5e6f:80", ("1a2b3c4d5e6f", 80)),
        ("172.1.0.2:8080", ("172.1.0.2", 8080)),
        ("web", ("web", 80)),
        ("my_app-1.local:1", ("my_app-1.local", 1)),
        ("_x", ("_x", 80)),
        ("a+b:65535", ("a+b", 65535)),
        ("web:0000080", ("web", 80)),
    ],
)
def test_targets(target: str, parts: tuple[str, int]) -> None:
    assert split_target(target) == parts


@pytest.mark.parametrize(
    "target",
    ["", "x", "x:80", ":80", "-web:80", "web:", "web:80:80", "web:http", "web/x",
     "[::1]:80", "::1", "wéb:80", "web:80\n", "web:٨٠", "user@web", "web 80"],
)  # fmt: skip
def test_texts_that_are_no_targets(target: str) -> None:
    for options in (
        DeployOptions(service="app", targets=(target,)),
        DeployOptions(service="app", targets=("web",), read_targets=(target,)),
    ):
        assert refusal(options) == f"{target} :invalid host pattern"


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("web:3000", ("http", "web", 3000)),
        ("h2c://web:3000", ("h2c", "web", 3000)),
        ("h2c://10.0.0.1", ("h2c", "10.0.0.1", 80)),
    ],
)
def test_what_is_spoken_with_a_target(target: str, parts: tuple[str, str, int]) -> None:
    DeployOptions(service="app", targets=(target,), read_targets=(target,)).validate()
    assert (split_scheme(target)[0], *split_target(target)) == parts


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("http://web:1", "give web:1 without a scheme, or h2c://web:1 for HTTP/2"),
        ("https://web:1", "targets are reached without TLS; give web:1 for HTTP/1.1, or "
         "h2c://web:1 for HTTP/2"),
        ("h2://web:1", "targets are reached without TLS; give web:1 for HTTP/1.1, or "
         "h2c://web:1 for HTTP/2"),
        ("grpc://web:1", "give h2c://web:1 for gRPC and HTTP/2"),
        ("H2C://web:1", "give h2c://web:1 for gRPC and HTTP/2"),
        ("tcp://web:1", "no scheme but h2c:// is known; give web:1 for HTTP/1.1"),
    ],
)  # fmt: skip
def test_schemes_that_are_none(target: str, advice: str) -> None:
    for options in (
        DeployOptions(service="app", targets=(target,)),
        DeployOptions(service="app", targets=("web",), read_targets=(target,)),
    ):
        assert refusal(options) == f"target {target}: {advice}"


@pytest.mark.parametrize("target", ["h2c://", "h2c://x", "h2c://web:", "h2c://web/", "h2c:web:1"])
def test_no_targets_behind_a_scheme(target: str) -> None:
    options = DeployOptions(service="app", targets=(target,))
    assert refusal(options) == f"{target} :invalid host pattern"


@pytest.mark.parametrize("port", ["0", "000", "65536", "99999999999999999999"])
def test_target_ports_out_of_range(port: str) -> None:
    options = DeployOptions(service="app", targets=(f"web:{port}",))
    assert refusal(options) == f"target web:{port}: port must be from 1 to 65535"


@pytest.mark.parametrize("name", ["app-web", "a", "app.1_x", "x" * 255, "~", "-x"])
def test_service_names(name: str) -> None:
    DeployOptions(service=name, targets=("web",)).validate()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "x" * 256, "a\n", "\x7f", "\udcff"])
def test_texts_that_are_no_service_names(name: str) -> None:
    assert refusal(DeployOptions(service=name, targets=("web",))) == (
        f"service name '{name}' must be 1 to 255 printable ASCII characters without spaces or "
        "slashes"
    )


def test_a_target_is_required() -> None:
    assert refusal(DeployOptions(service="a", targets=())) == "at least one target is required"


@pytest.mark.parametrize(
    "host",
    ["example.com", "a", "localhost", "*.example.com", "my_app.internal", "xn--bcher-kva.example",
     "1.2.3.4", "::1", "[::1]", "a.", "A.Example", "a" * 255],
)  # fmt: skip
def test_hosts(host: str) -> None:
    ServiceOptions(hosts=(host,)).validate()


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("a b", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("-a", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("a..b", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("*a.com", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("a.*.com", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("*.*.com", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("bücher.de", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("a\n", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("a" * 256, "is not a valid host name (such as app.example.com or *.example.com)"),
        ("*", "is not a host name; leave --host out to serve all hosts"),
        ("a,b", "is not a host name; give each host on its own"),
        ("https://a", "must be a bare host name, without scheme or port"),
        (":80", "must be a bare host name, without scheme or port"),
        ("1.2.3.4:80", "must be a bare host name, without scheme or port"),
        ("[::1", "must be a bare host name, without scheme or port"),
        ("fe80::1%eth0", "must be a bare host name, without scheme or port"),
        ("a:80", "must be a bare host name, without scheme or port"),
    ],
)
def test_texts_that_are_no_hosts(host: str, why: str) -> None:
    assert refusal(ServiceOptions(hosts=("ok.com", host))) == f"host '{host}' {why}"


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("a b", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("a\r\nSet-Cookie: b=c", "must be a bare host name, without scheme or port"),
        ("a\r\nb", "is not a valid host name (such as app.example.com or *.example.com)"),
        ("example.com:8080", "must be a bare host name, without scheme or port"),
        ("http://example.com/", "must be a bare host name, without scheme or port"),
        ("a,b", "is not a host name; give each host on its own"),
        ("*.example.com", "must be one host, not a wildcard"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_texts_that_are_no_canonical_hosts(host: str, why: str, listed: bool) -> None:
    options = ServiceOptions(hosts=("*.example.com",) if listed else (), canonical_host=host)
    assert refusal(options) == f"canonical-host '{host}' {why}"


@pytest.mark.parametrize(
    "name",
    ["Host", "content-length", "Transfer-Encoding", "Connection", "Expect", "TE", "Upgrade",
     "Trailer", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Request-ID", "X-Request-Start"],
)  # fmt: skip
def test_fields_that_tell_no_client_address(name: str) -> None:
    assert refusal(ServiceOptions(client_ip_header=name)) == (
        f"client-ip-header '{name}' has another meaning; name the header in which your CDN or "
        "balancer tells the client's address"
    )


def test_a_service_has_at_most_so_many_hosts() -> None:
    hosts = tuple(f"h{number}" for number in range(1001))
    ServiceOptions(hosts=hosts[:1000]).validate()
    assert refusal(ServiceOptions(hosts=hosts)) == "a service can have at most 1000 hosts"


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ((), ("/",)),
        (None, ("/",)),
        (("",), ("/",)),
        (("/",), ("/",)),
        (("api",), ("/api",)),
        (("/api/",), ("/api",)),
        (("//a/b//",), ("/a/b",)),
        (("/a", "b/"), ("/a", "/b")),
    ],
)
def test_path_prefixes(given: tuple[str, ...], normal: tuple[str, ...]) -> None:
    options = ServiceOptions(path_prefixes=given)
    options.validate()
    assert options.path_prefixes == normal


@pytest.mark.parametrize("given", [(), None, ("",)])
def test_every_host_has_one_form(given: tuple[str, ...]) -> None:
    assert ServiceOptions(hosts=given).hosts == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ServiceOptions(path_prefixes=("/a b",)),
         "path-prefix '/a b' must be a path without spaces, ? or #"),
        (ServiceOptions(path_prefixes=("/a?b",)),
         "path-prefix '/a?b' must be a path without spaces, ? or #"),
        (ServiceOptions(path_prefixes=("/a#b",)),
         "path-prefix '/a#b' must be a path without spaces, ? or #"),
        (ServiceOptions(writer_affinity_timeout=-1.0),
         "writer-affinity-timeout must not be negative"),
        (ServiceOptions(client_ip_header="a b"),
         "client-ip-header 'a b' is not a valid header name"),
        (HealthCheckOptions(path="/a b"),
         "health-check-path '/a b' must be a path without spaces, ? or #"),
        (HealthCheckOptions(path="/a#b"),
         "health-check-path '/a#b' must be a path without spaces, ? or #"),
        (HealthCheckOptions(port=-1), "health-check-port -1 must be from 0 to 65535"),
        (HealthCheckOptions(port=65536), "health-check-port 65536 must be from 0 to 65535"),
        (HealthCheckOptions(interval=0.0), "health-check-interval must be more than zero"),
        (HealthCheckOptions(timeout=-1.0), "health-check-timeout must be more than zero"),
        (HealthCheckOptions(timeout=float("nan")), "health-check-timeout must be more than zero"),
        (HealthCheckOptions(host="a b"), "health-check-host 'a b' is not a valid host"),
        (HealthCheckOptions(host="a\r\nX: y"), "health-check-host 'a\r\nX: y' is not a valid host"),
        (TargetOptions(health_check=HealthCheckOptions(port=-2)),
         "health-check-port -2 must be from 0 to 65535"),
        (TargetOptions(response_timeout=-1.0), "target-timeout must not be negative"),
        (TargetOptions(max_memory_buffer_size=-1), "buffer-memory must not be negative"),
        (TargetOptions(max_request_body_size=-1), "max-request-body must not be negative"),
        (TargetOptions(max_response_body_size=-1), "max-response-body must not be negative"),
        (TargetOptions(log_request_headers=("A", "b c")),
         "log-request-header 'b c' is not a valid header name"),
        (TargetOptions(log_response_headers=("",)),
         "log-response-header '' is not a valid header name"),
        (DeploymentOptions(deploy_timeout=-1.0), "deploy-timeout must not be negative"),
        (DeploymentOptions(drain_timeout=-1.0), "drain-timeout must not be negative"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(options: Any, message: str) -> None:
    assert refusal(options) == message


PREFIX = "service options invalid: "


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tls_on_demand_url": "/x"}, PREFIX + "TLS must be enabled to use a TLS on-demand URL"),
        ({"tls_enabled": True}, PREFIX + "host must be set when using TLS"),
        ({"tls_enabled": True, "hosts": ("a",), "path_prefixes": ("/x",)},
         PREFIX + "TLS settings must be specified on the root path service"),
        ({"tls_enabled": True, "hosts": ("*.a",)}, "automatic TLS does not support wildcards"),
        ({"tls_enabled": True, "hosts": ("*.a",), "path_prefixes": ("/x",)},
         PREFIX + "TLS settings must be specified on the root path service"),
        ({"tls_enabled": True, "hosts": ("a",), "tls_on_demand_url": "/x"},
         PREFIX + "cannot set hosts when using a TLS on-demand URL"),
        ({"tls_enabled": True, "tls_certificate_path": "c", "tls_on_demand_url": "/x"},
         PREFIX + "cannot use a custom TLS certificate with a TLS on-demand URL"),
        ({"tls_enabled": True, "canonical_host": "c", "tls_on_demand_url": "/x"},
         PREFIX + "cannot set a canonical host when using a TLS on-demand URL"),
        ({"tls_enabled": True, "tls_on_demand_url": "ftp://x"},
         PREFIX + "TLS on-demand URL 'ftp://x' must be an absolute http(s) URL or a path"),
        ({"tls_client_ca_path": "/ca.pem", "hosts": ("a",)},
         PREFIX + "TLS must be enabled to ask clients for certificates"),
        ({"tls_enabled": True, "hosts": ("a",), "tls_client_ca_path": "/ca.pem",
          "tls_redirect": False},
         PREFIX + "clients could avoid their certificates over plain HTTP; leave out "
         "--tls-redirect=false or --tls-client-ca"),
        ({"hosts": ("a", "b"), "canonical_host": "c"},
         PREFIX + "canonical-host 'c' must be present in the hosts list: [a b]"),
    ],
)  # fmt: skip
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    assert refusal(ServiceOptions(**fields)) == message


@pytest.mark.parametrize(
    ("given", "missing"), [("certificate", "private-key"), ("private_key", "certificate")]
)
def test_half_of_a_certificate(given: str, missing: str) -> None:
    """Half of it would be a service with certificates from elsewhere, or with none."""
    half: dict[str, Any] = {f"tls_{given}_path": "/x"}
    options = ServiceOptions(hosts=("a",), tls_enabled=True, **half)
    assert refusal(DeployOptions(service="s", targets=("ab",), service_options=options)) == (
        f"tls-certificate-path and tls-private-key-path go together; tls-{missing}-path is missing"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"tls_enabled": True, "hosts": ("a", "b"), "canonical_host": "b"},
        {"tls_enabled": True, "hosts": ("*.a",), "tls_certificate_path": "c",
         "tls_private_key_path": "k"},
        {"tls_enabled": True, "tls_on_demand_url": "https://ask.example/ok?x=1"},
        {"tls_enabled": True, "tls_on_demand_url": "/ask"},
        {"tls_enabled": True, "tls_on_demand_url": "/ask", "tls_client_ca_path": "/ca.pem"},
        {"tls_enabled": True, "hosts": ("a",), "tls_client_ca_path": "/ca.pem"},
        {"canonical_host": "anything"},
    ],
)  # fmt: skip
def test_no_contradictions(fields: dict[str, Any]) -> None:
    ServiceOptions(**fields).validate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"http_port": -1}, "http-port -1 must be from 0 to 65535"),
        ({"https_port": 65536}, "https-port 65536 must be from 0 to 65535"),
        ({"metrics_port": 70000}, "metrics-port 70000 must be from 0 to 65535"),
        ({"udp_port": 0}, "udp-port 0 must be from 1 to 65535"),
        ({"udp_port": 65536}, "udp-port 65536 must be from 1 to 65535"),
        ({"head_timeout": 0.0}, "head-timeout must be more than zero"),
        ({"idle_timeout": -1.0}, "idle-timeout must be more than zero"),
        ({"shutdown_timeout": -1.0}, "shutdown-timeout must not be negative"),
        ({"max_head_size": 1023}, "max-head-size must be at least 1024 bytes"),
        ({"max_connections": 0}, "max-connections must be more than zero"),
        ({"max_headers": 0}, "max-headers must be more than zero"),
        ({"max_spill": -1}, "max-spill must not be negative"),
        ({"max_buffer_memory": -1}, "max-buffer-memory must not be negative"),
        (
            {"bind": "localhost"},
            "bind 'localhost' is not an IP address (such as 192.0.2.1 or 2001:db8::1)",
        ),
        (
            {"trusted_proxies": ("10.0.0.0/8", "ten")},
            "trusted-proxy 'ten' is not a network (such as 192.0.2.0/24 or 2001:db8::/32)",
        ),
        (
            {"proxy_protocol_from": ("10.0.0.1/8",)},
            "proxy-protocol-from '10.0.0.1/8' is not a network (such as 192.0.2.0/24 or "
            "2001:db8::/32); clear the bits after the prefix",
        ),
        ({"http3": True}, "http3 needs an https-port"),
    ],
)
def test_run_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        RunOptions(**fields).validate()
    assert str(caught.value) == message


def test_run_options_at_their_defaults() -> None:
    RunOptions().validate()
    assert RunOptions().udp_port == 8080


def test_files_of_the_data_directory() -> None:
    nothing, saved = RunOptions(), RunOptions(data_directory=Path("/d"))
    for options in (nothing, saved):
        options.validate()
    assert nothing.state_path is nothing.udp_state_path is nothing.udp_sessions_path is None
    assert saved.state_path == Path("/d/kamal-proxy.state")
    assert saved.udp_state_path == Path("/d/kamal-proxy-udp.state")
    assert saved.udp_sessions_path == Path("/d/kamal-proxy-udp.sessions")


@pytest.mark.parametrize(
    ("environment", "data", "socket"),
    [
        ({}, "/tmp/.config/kamal-proxy", "/tmp/kamal-proxy.sock"),
        ({"HOME": "/h"}, "/h/.config/kamal-proxy", "/tmp/kamal-proxy.sock"),
        ({"HOME": "/h", "TMPDIR": "/t"}, "/h/.config/kamal-proxy", "/t/kamal-proxy.sock"),
        ({"TMPDIR": "/t", "XDG_RUNTIME_DIR": "/r"}, "/t/.config/kamal-proxy",
         "/r/kamal-proxy.sock"),
        ({"HOME": "", "XDG_RUNTIME_DIR": "", "KAMAL_PROXY_SOCKET": ""}, "/tmp/.config/kamal-proxy",
         "/tmp/kamal-proxy.sock"),
        ({"XDG_RUNTIME_DIR": "/r", "KAMAL_PROXY_SOCKET": "/s/own"}, "/tmp/.config/kamal-proxy",
         "/s/own"),
    ],
)  # fmt: skip
def test_places(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], data: str, socket: str
) -> None:
    for name in ("HOME", "TMPDIR", "XDG_RUNTIME_DIR", "KAMAL_PROXY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_data_directory() == Path(data)
    assert default_socket_path() == Path(socket)


def test_an_https_port_may_be_left_out_or_chosen_by_the_kernel() -> None:
    for port in (None, 0, 443):
        RunOptions(https_port=port).validate()
    RunOptions(https_port=0, http3=True).validate()


SECRET = "c2VjcmV0c2VjcmV0c2VjcmV0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            (
                {"directory": directory},
                f"acme-directory '{directory}' must be an https URL, such as "
                "https://ca.example.com/acme/directory",
            )
            for directory in ("ca.test", "http://ca.test/d", "https://", "https://ca.test/ d",
                              "https://me@ca.test/d", "https://ca.test/d#x", "https://ca.test?d")
        ),
        *(
            (
                {"email": email},
                f"acme-email '{email}' must be one address, such as ops@example.com",
            )
            for email in ("ops", "@a.test", "a@b@c", "a@b.test,c@d.test", "Ops <a@b.test>", "a @b")
        ),
        (
            {"eab_key_id": "k"},
            "acme-eab-kid and acme-eab-hmac-key go together; acme-eab-hmac-key is missing",
        ),
        (
            {"eab_hmac_key": SECRET},
            "acme-eab-kid and acme-eab-hmac-key go together; acme-eab-kid is missing",
        ),
        *(
            (
                {"eab_key_id": "k", "eab_hmac_key": key},
                "acme-eab-hmac-key must be base64url, as the certificate authority shows it",
            )
            for key in ("short", SECRET[:-1] + "+", SECRET + "===", SECRET + " ")
        ),
        (
            {"ca_file": "/ca.pem"},
            "acme-ca-file is of no use without acme-directory: Let's Encrypt is verified as any "
            "web site is",
        ),
    ],
)  # fmt: skip
def test_authorities_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    assert refusal(AcmeOptions(**fields)) == message
    assert refusal(RunOptions(acme=AcmeOptions(**fields))) == message


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"directory": "https://ca.test"},
        {"directory": "https://[::1]:14000/dir?x=1", "ca_file": "/ca.pem"},
        {"email": "a.b+c@d.test", "eab_key_id": "k", "eab_hmac_key": SECRET},
        {"eab_key_id": "k", "eab_hmac_key": SECRET + "=="},
    ],
)
def test_authorities(fields: dict[str, Any]) -> None:
    RunOptions(acme=AcmeOptions(**fields)).validate()


def test_the_secret_of_an_account_is_not_shown() -> None:
    options = RunOptions(acme=AcmeOptions(eab_key_id="the-id", eab_hmac_key=SECRET))
    assert "the-id" in repr(options)
    assert SECRET not in repr(options)


def test_certificates_are_kept_in_the_data_directory() -> None:
    assert RunOptions().certificates_path is None
    assert RunOptions(data_directory=Path("/d")).certificates_path == Path("/d/certs")


def test_names_of_logged_headers_are_written_as_the_go_proxy_writes_them() -> None:
    options = TargetOptions(log_request_headers=("x-request-ID", "A", "b c", "etag-"))
    assert options.log_request_headers == ("X-Request-Id", "A", "b c", "Etag-")
