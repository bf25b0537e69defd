"""What each flag of deploy becomes, and what happens with the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy.cli.deploy import ACME_STAGING_DIRECTORY
from kamal_proxy.control.messages import from_json
from kamal_proxy.options import DeploymentOptions, DeployOptions, ServiceOptions
from kamal_proxy.target_options import HealthCheckOptions, PathTimeout, TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import ScriptedProxy

Command = Callable[..., tuple[int, str, str]]
DONE = {"event": "done", "elapsed": 1.0}


def sent(proxy: ScriptedProxy) -> DeployOptions:
    """Return what the last deploy asked for, as the server would understand it."""
    method, path, body = proxy.requests[-1]
    assert method == "PUT"
    return from_json(DeployOptions, {**body, "service": path.removeprefix("/v1/services/")})


def expected(
    path: Path,
    *,
    service: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    health: dict[str, Any] | None = None,
    deployment: dict[str, Any] | None = None,
    **rest: Any,
) -> DeployOptions:
    cache = str(path / "home/.config/kamal-proxy/certs")
    return DeployOptions(
        **{"service": "app", "targets": ("t1:80",), **rest},
        service_options=ServiceOptions(**{"acme_cache_path": cache, **(service or {})}),
        target_options=TargetOptions(
            health_check=HealthCheckOptions(**(health or {})), **(target or {})
        ),
        deployment_options=DeploymentOptions(**(deployment or {})),
    )


FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--target=t2:81,t3"], {"targets": ("t1:80", "t2:81", "t3")}),
    (["--read-target=r1:80", "--read-target", "r2"], {"read_targets": ("r1:80", "r2")}),
    (["--host=a.com,*.b.com", "--host", "c"], {"service": {"hosts": ("a.com", "*.b.com", "c")}}),
    (["--host="], {"service": {"hosts": ()}}),
    (["--path-prefix=/a/,b"], {"service": {"path_prefixes": ("/a", "/b")}}),
    (["--strip-path-prefix=false"], {"service": {"strip_prefix": False}}),
    (["--strip-path-prefix"], {}),
    (["--tls", "--host=a"], {"service": {"tls_enabled": True, "hosts": ("a",)}}),
    (["--tls=false"], {}),
    (
        ["--tls-certificate-path=/c", "--tls-private-key-path=/k"],
        {"service": {"tls_certificate_path": "/c", "tls_private_key_path": "/k"}},
    ),
    (
        ["--tls", "--tls-on-demand-url=/ask"],
        {"service": {"tls_enabled": True, "tls_on_demand_url": "/ask"}},
    ),
    (["--tls-staging"], {"service": {"acme_directory": ACME_STAGING_DIRECTORY}}),
    (["--tls-acme-cache-path=/x"], {"service": {"acme_cache_path": "/x"}}),
    (["--tls-acme-cache-path="], {"service": {"acme_cache_path": ""}}),
    (["--tls-redirect=false"], {"service": {"tls_redirect": False}}),
    (
        ["--tls", "--host=a", "--tls-client-ca=/ca.pem"],
        {"service": {"tls_enabled": True, "hosts": ("a",), "tls_client_ca_path": "/ca.pem"}},
    ),
    (["--target=h2c://t2:81"], {"targets": ("t1:80", "h2c://t2:81")}),
    (["--canonical-host=a"], {"service": {"canonical_host": "a"}}),
    (["--error-pages=/p"], {"service": {"error_page_path": "/p"}}),
    (["--writer-affinity-timeout=3s"], {"service": {"writer_affinity_timeout": 3.0}}),
    (["--read-target-websockets"], {"service": {"read_targets_accept_websockets": True}}),
    (["--exclude-metrics-path=/a,/b"], {"service": {"exclude_metrics_paths": ("/a", "/b")}}),
    (["--client-ip-header=CF-IP"], {"service": {"client_ip_header": "CF-IP"}}),
    (["--deploy-timeout=1m"], {"deployment": {"deploy_timeout": 60.0}}),
    (["--drain-timeout=500ms"], {"deployment": {"drain_timeout": 0.5}}),
    (["--force"], {"deployment": {"force": True}}),
    (["--health-check-interval=3s"], {"health": {"interval": 3.0}}),
    (["--health-check-timeout=3s"], {"health": {"timeout": 3.0}}),
    (["--health-check-path=/health"], {"health": {"path": "/health"}}),
    (["--health-check-port=0x50"], {"health": {"port": 80}}),
    (["--health-check-host=h:1"], {"health": {"host": "h:1"}}),
    (["--target-timeout=10s"], {"target": {"response_timeout": 10.0}}),
    (
        ["--path-timeout=/reports/=5m,/a=b=1.5s", "--path-timeout", '"/x,y=0",z=1ms'],
        {
            "target": {
                "path_timeouts": (
                    PathTimeout(path="/reports", timeout=300.0),
                    PathTimeout(path="/a=b", timeout=1.5),
                    PathTimeout(path="/x,y", timeout=0.0),
                    PathTimeout(path="/z", timeout=0.001),
                )
            }
        },
    ),
    (["--path-timeout=", "--path-timeout=/=1s"],
     {"target": {"path_timeouts": (PathTimeout(path="/", timeout=1.0),)}}),
    (["--websocket-idle-timeout=1h"], {"target": {"websocket_idle_timeout": 3600.0}}),
    (["--buffer-requests"], {"target": {"buffer_requests": True}}),
    (["--buffer-responses"], {"target": {"buffer_responses": True}}),
    (["--buffer-requests=false", "--buffer-responses=false"], {}),
    (["--buffer-memory=2000000"], {"target": {"max_memory_buffer_size": 2000000}}),
    (
        ["--buffer-requests=false", "--max-request-body=40000000"],
        {"target": {"max_request_body_size": 40000000}},
    ),
    (
        ["--buffer-responses", "--max-response-body=7"],
        {"target": {"buffer_responses": True, "max_response_body_size": 7}},
    ),
    (["--log-request-header=A,B"], {"target": {"log_request_headers": ("A", "B")}}),
    (["--log-response-header=A"], {"target": {"log_response_headers": ("A",)}}),
    (["--forward-headers"], {"target": {"forward_headers": True}}),
    (["--forward-headers=false"], {"target": {"forward_headers": False}}),
    (["--scope-cookie-paths"], {"target": {"scope_cookie_paths": True}}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "want"), FLAGS, ids=lambda value: " ".join(map(str, value)))
def test_flags_become_options(
    proxy: ScriptedProxy, command: Command, tmp_path: Path, flags: list[str], want: dict[str, Any]
) -> None:
    proxy.answer_events(DONE)
    assert command("deploy", "app", "--target=t1:80", *flags) == (0, "", "")
    assert sent(proxy) == expected(tmp_path, **want)


def test_the_table_has_every_flag() -> None:
    from kamal_proxy.cli.commands import find_command

    tried = {flag.partition("=")[0] for flags, _ in FLAGS for flag in flags}
    command, _ = find_command(["deploy"])
    declared = {flag.title for flag in command.grammar.flags.values()}
    assert declared - tried == {"-h, --help"}


FORM = "must be a path and a duration, such as /reports=5m"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/reports", f'invalid argument "/reports" for "--path-timeout" flag: "/reports" {FORM}'),
        ("=5m", f'invalid argument "=5m" for "--path-timeout" flag: "=5m" {FORM}'),
        ("/a=1s,/b", f'invalid argument "/a=1s,/b" for "--path-timeout" flag: "/b" {FORM}'),
        ("/a=1s,", f'invalid argument "/a=1s," for "--path-timeout" flag: "" {FORM}'),
        (
            "/reports=5",
            'invalid argument "/reports=5" for "--path-timeout" flag: '
            f'time: missing unit in duration "5"; it {FORM}',
        ),
        ("/a=", 'invalid argument "/a=" for "--path-timeout" flag: '
         f'time: invalid duration ""; it {FORM}'),
        ('"/a', r'invalid argument "\"/a" for "--path-timeout" flag: parse error on line 1, '
         'column 4: extraneous or missing " in quoted-field'),
        ("/a=-1s", "path-timeout of /a must not be negative"),
        ("/a?b=1s", "path-timeout '/a?b' must begin with a path without spaces, ? or #, such as "
         "/reports=5m"),
    ],
)  # fmt: skip
def test_path_timeouts_that_are_none(
    proxy: ScriptedProxy, command: Command, value: str, message: str
) -> None:
    argv = ["deploy", "app", "--target=t1:80", "--path-timeout", value]
    assert command(*argv) == (1, "", f"Error: {message}\n")
    assert proxy.requests == []


def test_remove(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answers.append(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert command("remove", "app-web") == (0, "", "")
    assert proxy.requests == [("DELETE", "/v1/services/app-web", None)]


@pytest.mark.parametrize("name", ["app web/é", "-x", ".."])
def test_any_name_can_be_removed(proxy: ScriptedProxy, command: Command, name: str) -> None:
    from urllib.parse import unquote

    proxy.answer_json(404, {"error": {"code": "service_not_found", "message": "service not found"}})
    assert command("rm", "--", name) == (1, "", "Error: service not found\n")
    path = proxy.requests[0][1]
    assert path.count("/") == 3
    assert unquote(path) == f"/v1/services/{name}"


def test_a_failed_deploy_tells_the_details_first(proxy: ScriptedProxy, command: Command) -> None:
    proxy.answer_events(
        {"event": "probe", "target": "t1:80", "result": "refused", "elapsed": 0.1},
        {
            "event": "failed",
            "code": "deploy_failed",
            "message": "target failed to become healthy within configured timeout (30s)",
            "details": ["t1:80: connection refused", "t2:80: status 500 \u001b[2J\u0007"],
        },
    )
    assert command("deploy", "app", "--target=t1:80,t2:80") == (
        1,
        "",
        "t1:80: connection refused\n"
        "t2:80: status 500 \\x1b[2J\\x07\n"
        "Error: target failed to become healthy within configured timeout (30s)\n",
    )
