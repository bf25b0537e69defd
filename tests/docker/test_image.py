"""The image, built and run as Kamal does it: ``make test-docker``.

The lines are Kamal's (``tests/kamal.py``). The engine of the tests (``.ci/with-docker``) has no
networks of its own, so a command named ``docker`` stands before the real one, which puts the
containers on the machine's network, where their ports are those that ``run.options`` name.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests import kamal
from tests.certificates import self_signed
from tests.ports import free_port
from tests.running import ROOT, Result
from tests.scripted import open_client

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE = os.environ.get("KAMAL_PROXY_TEST_IMAGE", "")
pytestmark = pytest.mark.skipif(not IMAGE, reason="make test-docker runs these")

REPOSITORY, _, VERSION = IMAGE.rpartition(":")
VOLUME = "kamal-proxy-config"
STATE = "/home/kamal-proxy/.config/kamal-proxy/kamal-proxy.state"
LIMIT = 60.0
STOP_LIMIT = 10.0  # what Docker gives a container, in seconds

# Said by Kamal, and not to be had here: its network, and ports that are published from there.
WRAPPER = """#!/bin/bash
words=()
while [ $# -gt 0 ]; do
  case $1 in
    --network) words+=(--network host); shift ;;
    --publish) shift ;;
    *) words+=("$1") ;;
  esac
  shift
done
exec {docker} "${{words[@]}}"
"""


@attrs.frozen
class Host:
    """A server that Kamal deploys to.

    Attributes:
        directory: The SSH user's home.
        port: Where the proxy serves HTTP.
        metrics_port: Where it serves metrics.
    """

    directory: Path
    port: int
    metrics_port: int

    @property
    def run_config(self) -> dict[str, Any]:
        """What ``deploy.yml`` holds under ``proxy.run``."""
        return {
            "repository": REPOSITORY,
            "version": VERSION,
            "debug": True,
            "metrics_port": self.metrics_port,
            "options": {"env": self.variables},
        }

    @property
    def variables(self) -> list[str]:
        """Return the ports as variables of the proxy's environment."""
        return [
            f"KAMAL_PROXY_HTTP_PORT={self.port}",
            "KAMAL_PROXY_HTTPS_PORT=0",
            "KAMAL_PROXY_BIND=127.0.0.1",
        ]

    async def line(self, line: str) -> Result:
        """Run a line as Kamal does over SSH."""
        with trio.fail_after(LIMIT):
            done = await trio.run_process(
                ["sh", "-c", line],
                cwd=self.directory,
                env={**os.environ, "PATH": f"{self.directory}/bin:{os.environ['PATH']}"},
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def run(self, line: str) -> str:
        """Run a line that must succeed, and return what it printed."""
        result = await self.line(line)
        assert result.code == 0, (line, result)
        return result.out.strip()

    async def kamal(self, line: str) -> None:
        """Run a command of the proxy, which must succeed silently."""
        assert await self.line(line) == Result(0, "", ""), line

    async def get(self, path: str = "/") -> tuple[int, bytes]:
        async with open_client(self.port) as client:
            response = await client.get(path)
            return response.status, response.body

    async def serves(self, version: str) -> None:
        """Require that a version of the application answers."""
        status, body = await self.get()
        assert (status, version.encode() in body) == (200, True), body

    async def messages(self) -> list[str]:
        """Return what the container has logged, oldest first."""
        logged = await self.run("docker logs kamal-proxy 2>&1")
        return [json.loads(line)["msg"] for line in logged.splitlines()]


def docker(*words: str) -> str:
    """Run the real command and return what it printed."""
    done = subprocess.run(["docker", *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Provide a server without containers and volumes."""
    wrapper = tmp_path / "bin" / "docker"
    wrapper.parent.mkdir()
    wrapper.write_text(WRAPPER.format(docker=shutil.which("docker")))
    wrapper.chmod(0o755)
    try:
        yield Host(tmp_path, free_port(), free_port())
    finally:
        for container in docker("ps", "--all", "--quiet").split():
            docker("rm", "--force", "--volumes", container)
        if VOLUME in docker("volume", "ls", "--quiet").split():
            docker("volume", "rm", VOLUME)


@contextmanager
def application(version: str) -> Iterator[tuple[str, str]]:
    """Run a version of the example application; provide its target and its container."""
    port = free_port()
    container = docker(
        *("run", "--detach", "--network", "host", "--volume", f"{ROOT}/example:/example:ro"),
        *(IMAGE, "python3", "/example/webapp.py", f"--port={port}", f"--version={version}"),
    )
    yield f"127.0.0.1:{port}", container


# --- the image ------------------------------------------------------------------------------------


def test_what_the_image_says() -> None:
    (image,) = json.loads(docker("image", "inspect", IMAGE))
    config = image["Config"]
    assert config["Cmd"] == ["kamal-proxy", "run"]
    assert config["Entrypoint"] is None
    assert config["User"] == "kamal-proxy:kamal-proxy"
    assert config["ExposedPorts"].keys() == {"80/tcp", "443/tcp"}
    assert config["Labels"]["org.opencontainers.image.title"] == "kamal-proxy"
    assert f"v{config['Labels']['org.opencontainers.image.version']}" == VERSION
    assert config.get("Healthcheck") is None
    assert config.get("Volumes") is None


def test_what_is_in_the_image() -> None:
    script = """
        set -e
        id -u; id -g; id -un; echo "$HOME"; pwd
        stat -c '%U:%G' ~/.config/kamal-proxy
        ls -A ~/.config/kamal-proxy | wc -l
        test -s /etc/ssl/certs/ca-certificates.crt
        python3 -c 'import sys; print(sys.flags.utf8_mode, sys.stdout.write_through)'
        command -v kamal-proxy
        for program in cc gcc make pip; do ! command -v $program; done
        ls /var/lib/apt/lists | wc -l
    """
    printed = docker("run", "--rm", "--network", "none", IMAGE, "sh", "-c", script).split()
    assert printed == [
        *("1001", "1001", "kamal-proxy", "/home/kamal-proxy", "/home/kamal-proxy"),
        *("kamal-proxy:kamal-proxy", "0", "1", "True", "/opt/kamal-proxy/bin/kamal-proxy", "0"),
    ]


def test_all_optional_parts_are_there() -> None:
    """HTTP/3 is an extra of the package, and no extra of the image."""
    done = "import aioquic, pylsqpack, kamal_proxy.http.http3, kamal_proxy._fastpath"
    docker("run", "--rm", "--network", "none", IMAGE, "python3", "-c", done)


def test_low_ports_without_root() -> None:
    """In an empty network of its own; as with Kamal, nothing comes after the image's name."""
    container = docker("run", "--detach", "--network", "none", IMAGE)
    try:
        script = "import http.client as h; c = h.HTTPConnection('127.0.0.1'); c.request('GET', '/')"
        # A command waits until the proxy listens.
        assert docker("exec", container, "kamal-proxy", "list", "--json") == "[]"
        ask = f"{script}; print(c.getresponse().status)"
        assert docker("exec", container, "python3", "-c", ask) == "404"
        first, *_ = docker("logs", container).splitlines()
        assert json.loads(first) == {
            **json.loads(first),
            "msg": "No previous state to restore",
            "path": STATE,
        }
    finally:
        docker("rm", "--force", "--volumes", container)


# --- Kamal's sequence -----------------------------------------------------------------------------


def is_recent(tag: str) -> bool:
    """Return what Kamal thinks of a version: numbers only, at least its minimum."""
    numbers = [int(part) for part in tag.removeprefix("v").split(".")]
    return numbers >= [int(part) for part in kamal.MINIMUM_VERSION.removeprefix("v").split(".")]


async def boot(host: Host) -> None:
    """Do what ``kamal proxy boot`` does."""
    tag = await host.line(kamal.VERSION)
    assert not tag.out.strip() or is_recent(tag.out.strip())
    await host.run(kamal.MAKE_DIRECTORY)
    await host.run(kamal.start_or(kamal.run(host.run_config)))


async def test_the_sequence_of_kamal(host: Host) -> None:
    await boot(host)
    with (
        application("v1") as (first, first_container),
        application("v2") as (second, second_container),
    ):
        await host.kamal(kamal.deploy("app-web", first))  # at once: Kamal does not wait
        await host.serves("v1")
        assert (await host.messages())[0] == "No previous state to restore"
        assert IMAGE in await host.run(kamal.DETAILS)
        await boot(host)  # as every deploy does
        assert await host.run(kamal.VERSION) == VERSION

        failures: list[object] = []
        asked, enough = 0, trio.Event()
        wanted = math.inf
        async with trio.open_nursery() as nursery:

            async def visit() -> None:
                nonlocal asked
                async with open_client(host.port) as client:
                    while True:
                        response = await client.get()
                        asked += 1
                        if asked >= wanted:
                            enough.set()
                        if response.status != 200:
                            failures.append(response)

            for _ in range(4):
                nursery.start_soon(visit)
            await host.kamal(kamal.deploy("app-web", second))
            docker("kill", first_container)
            wanted = asked + 100
            await enough.wait()
            nursery.cancel_scope.cancel()
        assert failures == []
        await host.serves("v2")

        await host.kamal(kamal.stop("app-web", 30, "Back at noon"))
        status, body = await host.get()
        assert (status, b"Back at noon" in body) == (503, True)
        assert (await host.get("/up"))[0] == 200
        await host.kamal(kamal.resume("app-web"))
        await host.serves("v2")

        # kamal proxy stop, start
        start = trio.current_time()
        await host.run(kamal.STOP)
        assert trio.current_time() - start < STOP_LIMIT
        assert docker("inspect", "kamal-proxy", "--format", "{{.State.ExitCode}}") == "0"
        assert (await host.messages())[-1] == "Server stopped"
        await host.run(kamal.START)
        await host.kamal(kamal.resume("app-web"))  # waits until it listens
        await host.serves("v2")

        # kamal proxy reboot: another container, the same volume
        before = docker("inspect", "kamal-proxy", "--format", "{{.Id}}")
        await host.run(kamal.STOP)
        await host.run(kamal.REMOVE_CONTAINER)
        assert (await host.line("docker inspect kamal-proxy")).code != 0
        await host.run(kamal.MAKE_DIRECTORY)
        await host.run(kamal.run(host.run_config))
        assert docker("inspect", "kamal-proxy", "--format", "{{.Id}}") != before
        await host.kamal(kamal.resume("app-web"))
        await host.serves("v2")
        assert (await host.messages())[0] == "Restored saved state"

        await host.kamal(kamal.remove("app-web"))  # kamal app stop
        assert (await host.get())[0] == 404
        assert "404" in await host.run(kamal.LOGS)
        result = await host.line(kamal.remove("app-web"))
        assert (result.code, result.err.strip()) == (1, "Error: service not found")

    # kamal proxy remove
    await host.run(kamal.STOP)
    await host.run(kamal.REMOVE_CONTAINER)
    docker("rm", "--force", second_container)  # which is of the same image here
    docker("save", IMAGE, "--output", str(host.directory / "image.tar"))
    await host.run(kamal.REMOVE_IMAGE)
    assert IMAGE not in docker("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    docker("load", "--input", str(host.directory / "image.tar"))


async def test_a_host_without_a_run_config(host: Host) -> None:
    """The image's own command, with options and version from files of ``boot_config``."""
    files = host.directory / ".kamal" / "proxy"
    await host.run(kamal.MAKE_DIRECTORY)
    (files / "options").write_text(" ".join(f"--env {variable}" for variable in host.variables))
    (files / "image").write_text(REPOSITORY)
    (files / "image_version").write_text(VERSION)
    await host.run(kamal.start_or(kamal.run_without_config()))
    with application("v1") as (target, _):
        await host.kamal(kamal.deploy("app-web", target))
        await host.serves("v1")
    assert docker("inspect", "kamal-proxy", "--format", "{{.Args}}") == "[run]"


async def test_a_stop_while_a_response_is_on_its_way(host: Host) -> None:
    await boot(host)
    with application("v1") as (target, _):
        await host.kamal(kamal.deploy("app-web", target))
        async with open_client(host.port) as client, trio.open_nursery() as nursery:
            await client.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
            await client.receive_until(b"v1 v1 1/5\n")
            nursery.start_soon(host.run, kamal.STOP)
            await client.receive_until(b"v1 v1 5/5\n")
    assert docker("inspect", "kamal-proxy", "--format", "{{.State.ExitCode}}") == "0"


async def test_error_pages_and_certificates_from_the_server(host: Host) -> None:
    """What Kamal uploads to ``apps-config`` belongs to root, and can be read."""
    await boot(host)
    uploaded = host.directory / ".kamal" / "proxy" / "apps-config" / "app"
    pages, tls = uploaded / "error_pages" / "abc", uploaded / "tls" / "web"
    pages.mkdir(parents=True)
    tls.mkdir(parents=True)
    (pages / "503.html").write_text("Custom Maintenance Page: {{ .Message }}")
    issued = self_signed("localhost", key="rsa")
    (tls / "cert.pem").write_bytes(issued.chain_pem)
    (tls / "key.pem").write_bytes(issued.key_pem)
    proxy = {"host": "localhost", "ssl": True, "ssl_redirect": False}
    with application("v1") as (target, _):
        await host.kamal(
            kamal.deploy(
                "app-web",
                target,
                proxy,
                error_pages=f"{kamal.APPS_CONFIG}/app/error_pages/abc",
                certificate=f"{kamal.APPS_CONFIG}/app/tls/web",
            )
        )
        await host.kamal(kamal.stop("app-web", 1, "zurück <b>"))
        async with open_client(host.port) as client:
            response = await client.get("/", "localhost")
    wanted = "Custom Maintenance Page: zurück &lt;b&gt;"
    assert (response.status, response.body.decode()) == (503, wanted)


async def test_a_volume_of_the_go_proxy(host: Host) -> None:
    """It belongs to 1001, as that image's user does, and is read and written."""
    with application("old") as (old, _), application("new") as (new, _):
        text = (ROOT / "tests" / "samples" / "go-kamal.state").read_text()
        (web, *_) = json.loads(text)
        web["active_targets"] = [old]
        (host.directory / "kamal-proxy.state").write_text(json.dumps([web]))
        docker(
            *("run", "--rm", "--network", "none", "--user", "0"),
            *("--volume", f"{VOLUME}:/volume", "--volume", f"{host.directory}:/from:ro", IMAGE),
            *("sh", "-c", "cp /from/kamal-proxy.state /volume && chown -R 1001:1001 /volume"),
        )
        await boot(host)
        await host.kamal(kamal.resume("app-web"))
        assert (await host.messages())[0] == "Restored saved state"
        async with open_client(host.port) as client:
            assert b"old" in (await client.get("/", "app.example")).body
            await host.kamal(kamal.deploy("app-web", new, {"host": "app.example"}))
            assert b"new" in (await client.get("/", "app.example")).body
    saved = await host.run(f"docker exec kamal-proxy cat {STATE}")
    assert json.loads(saved)[0]["active_targets"] == [new]
