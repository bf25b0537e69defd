"""What Kamal 2.12 says to a server: its shell lines, made from what ``deploy.yml`` holds.

The order, the names and the quoting are those of sections 1 to 3 of the contract. Nothing of Kamal
runs here; ``tests/test_kamal.py`` compares with the lines of Kamal's own tests.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONTAINER = "kamal-proxy"
MINIMUM_VERSION = "v0.9.2"
APPS_CONFIG = "/home/kamal-proxy/.apps-config"
PRUNE = "prune --force --filter label=org.opencontainers.image.title=kamal-proxy"

# What the richest application of Kamal's own tests has under ``proxy``.
RICHEST: dict[str, Any] = {
    "host": "localhost",
    "healthcheck": {"interval": 1, "timeout": 1, "path": "/up"},
    "response_timeout": 2,
    "buffering": {
        "requests": False,
        "responses": False,
        "memory": 400_000,
        "max_request_body": 40_000_000,
        "max_response_body": 40_000_000,
    },
    "forward_headers": True,
    "logging": {
        "request_headers": ["Cache-Control", "X-Forwarded-Proto"],
        "response_headers": ["X-Request-ID", "X-Request-Start"],
    },
}

START = f"docker container start {CONTAINER}"
STOP = f"docker container stop {CONTAINER}"
VERSION = f"docker inspect {CONTAINER} --format '{{{{.Config.Image}}}}' | awk -F: '{{print $NF}}'"
REMOVE_CONTAINER = f"docker container {PRUNE}"
REMOVE_IMAGE = f"docker image {PRUNE.replace('prune', 'prune --all')}"
MAKE_DIRECTORY = "mkdir -p .kamal/proxy/apps-config"
DETAILS = f"docker ps --filter 'name=^{CONTAINER}$'"
LOGS = f"docker logs {CONTAINER} --tail 100 --timestamps 2>&1"

_IMAGE = "basecamp/kamal-proxy"
_LOGGED = ("Cache-Control", "Last-Modified", "User-Agent")
_RUN = (
    f"docker run --name {CONTAINER} --network kamal --detach --restart unless-stopped "
    "--volume kamal-proxy-config:/home/kamal-proxy/.config/kamal-proxy"
)
_APPS_VOLUME = f"--volume $PWD/.kamal/proxy/apps-config:{APPS_CONFIG}"
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "`": r"\`"})


def quoted(value: object) -> str:
    """Return a value as Kamal writes it for the shell.

    A ``${NAME}`` stays one for the shell to replace; a newline becomes a backslash and an ``n``.
    """
    return '"' + re.sub(r"\$(?!\{[^}]*\})", r"\\$", str(value).translate(_ESCAPED)) + '"'


def deploy(
    service: str,
    target: str,
    proxy: Mapping[str, Any] | None = None,
    *,
    deploy_timeout: int = 30,
    drain_timeout: int = 30,
    error_pages: str | None = None,
    certificate: str | None = None,
) -> str:
    """Return the line that deploys.

    Args:
        service: The role's container prefix, or the accessory's service name.
        target: Container id and port.
        proxy: What ``deploy.yml`` holds under ``proxy``.
        deploy_timeout: That of ``deploy.yml``, in seconds.
        drain_timeout: Likewise.
        error_pages: Directory of the error pages in the container.
        certificate: Directory of a certificate of one's own in the container.
    """
    proxy = proxy or {}
    health, logging = proxy.get("healthcheck", {}), proxy.get("logging", {})
    buffering = {"requests": True, "responses": True} | proxy.get("buffering", {})
    options: dict[str, Any] = {
        "target": target,
        "host": proxy.get("hosts", _parts(proxy.get("host"))),
        "tls": True if proxy.get("ssl") else None,
        "tls-certificate-path": f"{certificate}/cert.pem" if certificate else None,
        "tls-private-key-path": f"{certificate}/key.pem" if certificate else None,
        "deploy-timeout": _seconds(deploy_timeout),
        "drain-timeout": _seconds(drain_timeout),
        "health-check-interval": _seconds(health.get("interval")),
        "health-check-timeout": _seconds(health.get("timeout")),
        "health-check-path": health.get("path"),
        "target-timeout": _seconds(proxy.get("response_timeout")),
        "buffer-requests": buffering["requests"],
        "buffer-responses": buffering["responses"],
        "buffer-memory": buffering.get("memory"),
        "max-request-body": buffering.get("max_request_body"),
        "max-response-body": buffering.get("max_response_body"),
        "path-prefix": proxy.get("path_prefixes", _parts(proxy.get("path_prefix"))),
        "strip-path-prefix": proxy.get("strip_path_prefix"),
        "forward-headers": proxy.get("forward_headers"),
        "tls-redirect": proxy.get("ssl_redirect"),
        "log-request-header": logging.get("request_headers", _LOGGED),
        "log-response-header": logging.get("response_headers"),
        "error-pages": error_pages,
    }
    return execute("deploy", service, *_flags(options))


def stop(service: str, drain_timeout: float | None = 30, message: str | None = None) -> str:
    """Return the line of ``kamal app maintenance``; times in seconds."""
    options = {"drain-timeout": _seconds(drain_timeout), "message": message}
    return execute("stop", service, *_flags(options))


def resume(service: str) -> str:
    """Return the line of ``kamal app live``."""
    return execute("resume", service)


def remove(service: str) -> str:
    """Return the line of ``kamal app stop``."""
    return execute("remove", service)


def execute(*words: str) -> str:
    """Return the line that runs a command in the proxy's container."""
    return " ".join(["docker", "exec", CONTAINER, "kamal-proxy", *words])


def run(run: Mapping[str, Any]) -> str:
    """Return the line that starts the proxy as ``proxy.run`` of ``deploy.yml`` says."""
    image = "/".join(filter(None, [run.get("registry"), run.get("repository", _IMAGE)]))
    options = {"debug": run.get("debug") or None, "metrics-port": run.get("metrics_port")}
    words = [
        _RUN,
        _APPS_VOLUME,
        *_published(run),
        f"--log-opt max-size={run.get('log_max_size', '10m')}",
        *([f"--expose={run['metrics_port']}"] if "metrics_port" in run else []),
        *_flags(run.get("options", {}), " "),
        f"{image}:{run.get('version', MINIMUM_VERSION)}",
        "kamal-proxy run",
        *_flags(options, " "),
    ]
    return " ".join(words)


def run_without_config(options: str = "--publish 80:80 --publish 443:443") -> str:
    """Return the line that starts the proxy when ``deploy.yml`` has no ``proxy.run``.

    Args:
        options: What is used if there is no ``.kamal/proxy/options``, besides the log's size.
    """
    return (
        f'echo $(cat .kamal/proxy/options 2> /dev/null || echo "{options} --log-opt max-size=10m") '
        f'$(cat .kamal/proxy/image 2> /dev/null || echo "{_IMAGE}"):'
        f'$(cat .kamal/proxy/image_version 2> /dev/null || echo "{MINIMUM_VERSION}") '
        '$(cat .kamal/proxy/run_command 2> /dev/null || echo "") '
        f"| xargs {_RUN} {_APPS_VOLUME}"
    )


def start_or(line: str) -> str:
    """Return the line of ``kamal proxy boot``: a container that is there is started again."""
    return f"{START} || {line}"


def _published(run: Mapping[str, Any]) -> Iterator[str]:
    if not run.get("publish", True):
        return
    for address in run.get("bind_ips", [""]):
        before = f"{address}:" if address else ""
        yield f"--publish {before}{run.get('http_port', 80)}:80"
        yield f"--publish {before}{run.get('https_port', 443)}:443"


def _flags(options: Mapping[str, Any], between: str = "=") -> list[str]:
    flags = []
    for name, values in options.items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is True:
                flags.append(f"--{name}")
            elif value is not None:
                text = str(value).lower() if value is False else value
                flags.append(f"--{name}{between}{quoted(text)}")
    return flags


def _parts(value: str | None) -> list[str]:
    return value.split(",") if value else []


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value}s"
