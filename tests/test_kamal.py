"""The lines of ``tests/kamal.py`` are those of Kamal's own tests, which the contract lists."""

from __future__ import annotations

from typing import Any

import pytest

from tests import kamal

LOGGED = (
    '--log-request-header="Cache-Control" --log-request-header="Last-Modified" '
    '--log-request-header="User-Agent"'
)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            kamal.deploy("app-web", "172.1.0.2:80"),
            'deploy app-web --target="172.1.0.2:80" --deploy-timeout="30s" --drain-timeout="30s" '
            f"--buffer-requests --buffer-responses {LOGGED}",
        ),
        (
            kamal.deploy(
                "app-web", "172.1.0.2:80", {"ssl": True, "host": "example.com,anotherexample.com"}
            ),
            'deploy app-web --target="172.1.0.2:80" --host="example.com" '
            '--host="anotherexample.com" --tls --deploy-timeout="30s" --drain-timeout="30s" '
            f"--buffer-requests --buffer-responses {LOGGED}",
        ),
        (
            kamal.deploy("app-web2", "123:80", {"response_timeout": 15}, deploy_timeout=6),
            'deploy app-web2 --target="123:80" --deploy-timeout="6s" --drain-timeout="30s" '
            f'--target-timeout="15s" --buffer-requests --buffer-responses {LOGGED}',
        ),
        (
            kamal.deploy(
                "app_with_roles-web",
                "1a2b3c4d5e6f:80",
                kamal.RICHEST,
                deploy_timeout=2,
                drain_timeout=2,
                error_pages=f"{kamal.APPS_CONFIG}/app_with_roles/error_pages/abc",
            ),
            'deploy app_with_roles-web --target="1a2b3c4d5e6f:80" --host="localhost" '
            '--deploy-timeout="2s" --drain-timeout="2s" --health-check-interval="1s" '
            '--health-check-timeout="1s" --health-check-path="/up" --target-timeout="2s" '
            '--buffer-requests="false" --buffer-responses="false" --buffer-memory="400000" '
            '--max-request-body="40000000" --max-response-body="40000000" --forward-headers '
            '--log-request-header="Cache-Control" --log-request-header="X-Forwarded-Proto" '
            '--log-response-header="X-Request-ID" --log-response-header="X-Request-Start" '
            '--error-pages="/home/kamal-proxy/.apps-config/app_with_roles/error_pages/abc"',
        ),
        (kamal.remove("app-web"), "remove app-web"),
        (kamal.resume("app-web"), "resume app-web"),
        (kamal.stop("app-web", None), "stop app-web"),
        (
            kamal.stop("app-web", 10, "Hi"),
            'stop app-web --drain-timeout="10s" --message="Hi"',
        ),
    ],
)
def test_what_runs_in_the_container(line: str, wanted: str) -> None:
    assert line == f"docker exec kamal-proxy kamal-proxy {wanted}"


BOOT = (
    "docker run --name kamal-proxy --network kamal --detach --restart unless-stopped "
    "--volume kamal-proxy-config:/home/kamal-proxy/.config/kamal-proxy "
)
APPS = "--volume $PWD/.kamal/proxy/apps-config:/home/kamal-proxy/.apps-config"


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (
            {"registry": "registry:4443", "debug": True, "metrics_port": 9090},
            "--publish 80:80 --publish 443:443 --log-opt max-size=10m --expose=9090 "
            "registry:4443/basecamp/kamal-proxy:v0.9.2 "
            'kamal-proxy run --debug --metrics-port "9090"',
        ),
        (
            {"bind_ips": ["0.0.0.0", "[::1]"], "http_port": 8080, "options": {"cpus": 0.5}},
            "--publish 0.0.0.0:8080:80 --publish 0.0.0.0:443:443 --publish [::1]:8080:80 "
            '--publish [::1]:443:443 --log-opt max-size=10m --cpus "0.5" '
            "basecamp/kamal-proxy:v0.9.2 kamal-proxy run",
        ),
        (
            {"publish": False, "repository": "custom/repo", "version": "v1.0.0"},
            "--log-opt max-size=10m custom/repo:v1.0.0 kamal-proxy run",
        ),
    ],
)
def test_how_the_container_is_run(run: dict[str, Any], wanted: str) -> None:
    assert kamal.run(run) == f"{BOOT}{APPS} {wanted}"


def test_how_the_container_is_run_without_config() -> None:
    assert kamal.start_or(kamal.run_without_config()) == (
        "docker container start kamal-proxy || echo $(cat .kamal/proxy/options 2> /dev/null || "
        'echo "--publish 80:80 --publish 443:443 --log-opt max-size=10m") '
        '$(cat .kamal/proxy/image 2> /dev/null || echo "basecamp/kamal-proxy"):'
        '$(cat .kamal/proxy/image_version 2> /dev/null || echo "v0.9.2") '
        '$(cat .kamal/proxy/run_command 2> /dev/null || echo "") '
        f"| xargs {BOOT}{APPS}"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("30s", '"30s"'),
        ("a b,c=d", '"a b,c=d"'),
        ('say "hi"', r'"say \"hi\""'),
        ("`id` $HOME ${HOME}", r'"\`id\` \$HOME ${HOME}"'),
        ("a\\b\nc", r'"a\\b\nc"'),
        ("zurück", '"zurück"'),
    ],
)
def test_quoting(value: str, text: str) -> None:
    assert kamal.quoted(value) == text
