"""What Kamal sends, as lines of a shell, to a real proxy with real applications.

The lines are Kamal's to the letter (``tests/kamal.py``); only ``docker exec kamal-proxy`` is a
function that runs the installed command here. As in a container, the locale is not set. Kamal reads
nothing but the exit code, but shows what was printed when that is not 0: success is silent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests import kamal
from tests.certificates import Authority, make_ca, self_signed
from tests.e2e.programs import needs, open_program
from tests.ports import free_port
from tests.running import (
    ROOT,
    START_LIMIT,
    Command,
    Instance,
    Result,
    environment,
    open_command,
    open_instance,
    state_path,
)
from tests.scripted import Response, Upstream, open_client, open_upstream, respond
from tests.secure import client_context, open_secure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# What comes before a line: the machine has no container of that name, and no such command.
DOCKER = """docker() { [ "$1 $2" = 'exec kamal-proxy' ] || exit 125; shift 2; "$@"; }
"""
SECOND = 1_000_000_000  # nanoseconds, as in the state file
SILENT = Result(0, "", "")


async def shell(directory: Path, line: str) -> Result:
    """Run a line of Kamal's."""
    variables = environment(directory)
    for name in [n for n in variables if n.startswith(("LC_", "LANG", "PYTHON")) or n == "TERM"]:
        del variables[name]
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    with trio.fail_after(60):
        done = await trio.run_process(
            ["sh", "-c", DOCKER + line],
            env=variables,
            cwd=directory,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@attrs.frozen
class Server:
    """A proxy that gets Kamal's lines, and what its visitors see.

    Attributes:
        command: The proxy.
    """

    command: Command

    async def run(self, line: str) -> None:
        """Run a line, which must succeed silently."""
        assert await shell(self.command.directory, line) == SILENT

    async def fail(self, line: str) -> list[str]:
        """Run a line that must fail; return what it printed to standard error."""
        result = await shell(self.command.directory, line)
        assert (result.code, result.out) == (1, "")
        return result.err.splitlines()

    async def get(self, path: str = "/", host: str = "a.example", headers: str = "") -> Response:
        async with open_client(self.command.port) as client:
            return await client.get(path, host, headers)

    async def requires(self, status: int, body: bytes = b"", host: str = "a.example") -> None:
        """Require how a request is answered, and how its body begins."""
        response = await self.get(host=host)
        assert (response.status, response.body[: len(body)]) == (status, body)

    def state(self, service: str) -> dict[str, Any]:
        """Return what is saved of a service."""
        services = json.loads(self.command.state_path.read_bytes())
        (found,) = [saved for saved in services if saved["name"] == service]
        assert isinstance(found, dict)
        return found


@pytest.fixture
def server(command: Command) -> Server:
    return Server(command)


@pytest.fixture
async def v1() -> AsyncIterator[Instance]:
    async with open_instance("v1") as instance:
        yield instance


@pytest.fixture
async def v2() -> AsyncIterator[Instance]:
    async with open_instance("v2") as instance:
        yield instance


# --- the life of an application -------------------------------------------------------------------


async def test_the_life_of_an_application(server: Server, v1: Instance, v2: Instance) -> None:
    await server.requires(404)
    await server.run(kamal.deploy("app-web", v1.target))  # kamal setup
    await server.requires(200, b"v1")
    await server.run(kamal.deploy("app-web", v2.target))  # kamal deploy
    await v1.kill()
    await server.requires(200, b"v2")
    await server.run(kamal.deploy("app-web", v2.target))  # kamal app boot, once more
    await server.requires(200, b"v2")
    await server.run(kamal.remove("app-web"))  # kamal app stop
    await server.requires(404)
    assert await server.fail(kamal.remove("app-web")) == ["Error: service not found"]
    await server.run(kamal.deploy("app-web", v2.target))  # kamal app start
    await server.requires(200, b"v2")
    assert json.loads(server.command.state_path.read_bytes())[0]["name"] == "app-web"


async def test_maintenance(server: Server, v1: Instance, v2: Instance) -> None:
    await server.run(kamal.deploy("app-web", v1.target))
    await server.run(kamal.stop("app-web", 30, "Back at noon"))
    stopped = await server.get()
    assert stopped.status == 503
    assert b"Back at noon" in stopped.body
    assert (await server.get("/up")).status == 200
    assert (await server.get("/up/")).status == 503

    await server.run(kamal.deploy("app-web", v2.target))  # goes on being stopped
    await v1.kill()
    await server.requires(503)
    await server.run(kamal.stop("app-web"))
    assert b"Back at noon" not in (await server.get()).body
    await server.run(kamal.resume("app-web"))
    await server.requires(200, b"v2")
    await server.run(kamal.resume("app-web"))  # kamal app live, once more
    await server.requires(200, b"v2")


@pytest.mark.parametrize("line", [kamal.stop("nobody"), kamal.resume("nobody")])
async def test_an_application_that_is_not_there(server: Server, line: str) -> None:
    assert await server.fail(line) == ["Error: service not found"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Hi, it's x=1", b"Hi, it&#39;s x=1"),
        ('a "quoted" \\ back', b"a &#34;quoted&#34; \\ back"),
        ("`id` $(id) $HOME <b>&", b"`id` $(id) $HOME &lt;b&gt;&amp;"),
        ("two\nlines", b"two\\nlines"),
        ("Gleich zurück — 直ぐ", "Gleich zurück — 直ぐ".encode()),
        ("--force", b"--force"),
        ("", b""),
    ],
)
async def test_messages(server: Server, v1: Instance, message: str, shown: bytes) -> None:
    await server.run(kamal.deploy("app-web", v1.target))
    await server.run(kamal.stop("app-web", 1.5, message))
    assert shown in (await server.get()).body


async def test_a_bad_image(server: Server, v1: Instance, upstream: Upstream) -> None:
    await server.run(kamal.deploy("app-web", v1.target))
    state = server.command.state_path.read_bytes()
    upstream.stop_listening()
    said = await server.fail(kamal.deploy("app-web", upstream.target, deploy_timeout=2))
    assert said[-1] == "Error: target failed to become healthy within configured timeout (2s)"
    await server.requires(200, b"v1")
    assert server.command.state_path.read_bytes() == state


async def test_deploy_returns_when_the_old_container_may_be_stopped(
    server: Server, v1: Instance, v2: Instance
) -> None:
    await server.run(kamal.deploy("app-web", v1.target))
    async with open_client(server.command.port) as client, trio.open_nursery() as nursery:
        await client.send(b"GET /stream?parts=20&ms=100 HTTP/1.1\r\nHost: a.example\r\n\r\n")
        await client.receive_until(b"v1 0\n")
        nursery.start_soon(server.run, kamal.deploy("app-web", v2.target))
        # The stream is v1's to its end, though v1 is killed as soon as deploy has returned.
        assert (await client.receive_until(b"v1 19\n")).count(b"v1") == 19
    await v1.kill()
    await server.requires(200, b"v2")


async def test_a_request_that_outlives_the_drain(
    server: Server, v1: Instance, v2: Instance
) -> None:
    await server.run(kamal.deploy("app-web", v1.target))
    async with open_client(server.command.port) as client, trio.open_nursery() as nursery:
        await client.send(b"GET /slow?ms=30000 HTTP/1.1\r\nHost: a.example\r\n\r\n")
        nursery.start_soon(server.run, kamal.deploy("app-web", v2.target, drain_timeout=1))
        assert (await client.receive_response()).status == 504
    await server.requires(200, b"v2")


async def test_roles_and_applications_side_by_side(
    server: Server, v1: Instance, v2: Instance
) -> None:
    async with trio.open_nursery() as nursery:  # kamal's boot.parallel_roles
        for i in range(6):
            instance = v1 if i % 2 else v2
            line = kamal.deploy(f"app-role{i}", instance.target, {"host": f"{i}.example"})
            nursery.start_soon(server.run, line)
    for i in range(6):
        await server.requires(200, b"v1" if i % 2 else b"v2", f"{i}.example")
    said = await server.fail(kamal.deploy("other-web", v1.target, {"host": "3.example"}))
    assert said[-1] == "Error: host settings conflict with another service"
    await server.run(kamal.remove("app-role3"))
    await server.requires(404, host="3.example")
    await server.requires(200, b"v2", "4.example")


async def test_an_accessory(server: Server) -> None:
    """As Kamal's own tests have one: ``nc -l`` in a loop, which answers before it has read."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nnetcat"

    async def listen_once_at_a_time(stream: trio.SocketStream) -> None:
        async with one, stream:
            await stream.send_all(answer)

    one = trio.Lock()
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1)
        nursery.start_soon(trio.serve_listeners, listen_once_at_a_time, [listener])
        target = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        proxy = {"host": "netcat", "healthcheck": {"path": "/", "interval": 1}}
        for _ in range(2):  # kamal accessory boot, restart
            await server.run(kamal.deploy("app-netcat", target, proxy))
            await server.requires(200, b"netcat", "netcat")
            await server.run(kamal.remove("app-netcat"))
            await server.requires(404, host="netcat")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "line",
    [
        # No longer sent; Kamal 2.0 separated flags by a space.
        'deploy app-web --target "{}" --deploy-timeout "30s" --buffer-requests',
        "deploy app-web --target={}",
    ],
)
async def test_lines_of_older_versions(server: Server, v1: Instance, line: str) -> None:
    await server.run(kamal.execute(line.format(v1.target)))
    await server.requires(200, b"v1")


# --- what deploy.yml holds ------------------------------------------------------------------------

HEALTH = "target_options.health_check_config"
# Each option once; those that need other values for others have a row of their own.
ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {},
        {
            "options.hosts": [""],
            "options.path_prefixes": ["/"],
            "options.tls_enabled": False,
            "target_options.buffer_requests": True,
            "target_options.buffer_responses": True,
            "target_options.forward_headers": True,
            "target_options.log_request_headers": ["Cache-Control", "Last-Modified", "User-Agent"],
        },
    ),
    (
        {
            "host": "a.example,b.example",
            "healthcheck": {"interval": 3, "timeout": 4, "path": "/healthy"},
            "response_timeout": 10,
            # Refused if the flag were not given; Kamal gives it, and says false.
            "buffering": {
                "requests": False,
                "responses": False,
                "memory": 2_000_000,
                "max_request_body": 40_000_000,
                "max_response_body": 0,
            },
            "forward_headers": False,
            "ssl_redirect": False,
            "logging": {"request_headers": ["X-A"], "response_headers": ["X-B", "x-request-ID"]},
        },
        {
            "options.hosts": ["a.example", "b.example"],
            f"{HEALTH}.interval": 3 * SECOND,
            f"{HEALTH}.timeout": 4 * SECOND,
            f"{HEALTH}.path": "/healthy",
            "target_options.response_timeout": 10 * SECOND,
            "target_options.buffer_requests": False,
            "target_options.buffer_responses": False,
            "target_options.max_memory_buffer_size": 2_000_000,
            "target_options.max_request_body_size": 40_000_000,
            "target_options.max_response_body_size": 0,
            "target_options.forward_headers": False,
            "options.tls_redirect": False,
            "target_options.log_request_headers": ["X-A"],
            "target_options.log_response_headers": ["X-B", "X-Request-Id"],
        },
    ),
    (
        {
            "hosts": ["a.example", "c.example"],
            "ssl": True,
            "path_prefixes": ["/"],
            "strip_path_prefix": True,
            "ssl_redirect": True,
        },
        {
            "options.hosts": ["a.example", "c.example"],
            "options.tls_enabled": True,
            "options.tls_redirect": True,
            "options.strip_prefix": True,
            "target_options.forward_headers": False,
        },
    ),
    (
        {"host": "a.example", "ssl": True, "forward_headers": True},
        {"target_options.forward_headers": True},
    ),
    (
        {"hosts": ["*.b.example"], "path_prefix": "/api,/oauth", "strip_path_prefix": False},
        {
            "options.hosts": ["*.b.example"],
            "options.path_prefixes": ["/api", "/oauth"],
            "options.strip_prefix": False,
        },
    ),
]


async def test_each_option(server: Server, v1: Instance) -> None:
    for number, (proxy, saved) in enumerate(ROWS):
        service = f"app-{number}"
        await server.run(kamal.deploy(service, v1.target, proxy))
        state = server.state(service)
        assert state["active_targets"] == [v1.target]
        for path, wanted in saved.items():
            value: Any = state
            for key in path.split("."):
                value = value[key]
            assert value == wanted, (proxy, path)
        await server.run(kamal.remove(service))


async def test_all_options_at_once(server: Server, v1: Instance, tmp_path: Path) -> None:
    """The richest line of Kamal's own tests, and what the visitors notice of it."""
    (tmp_path / "503.html").write_text("Custom Maintenance Page: {{ .Message }}")
    await server.run(
        kamal.deploy(
            "app_with_roles-web",
            v1.target,
            kamal.RICHEST,
            deploy_timeout=2,
            drain_timeout=2,
            error_pages=str(tmp_path),
        )
    )
    response = await server.get(
        host="localhost", headers="Cache-Control: no-store\r\nX-Forwarded-Proto: https\r\n"
    )
    assert (response.status, response.body[:2]) == (200, b"v1")
    (line,) = await server.command.lines.wait_requests(1)
    assert (line["req_cache_control"], line["req_x_forwarded_proto"]) == ("no-store", "https")
    assert {"resp_x_request_id", "resp_x_request_start"} <= line.keys()
    late = await server.get("/slow?ms=5000", "localhost")
    assert late.status == 504

    await server.run(kamal.stop("app_with_roles-web", 1, "<Hi>"))
    page = await server.get(host="localhost")
    assert (page.status, page.body) == (503, b"Custom Maintenance Page: &lt;Hi&gt;")
    await server.run(kamal.stop("app_with_roles-web"))
    assert (await server.get(host="localhost")).body == b"Custom Maintenance Page: "


async def test_error_pages_that_were_not_uploaded(
    server: Server, v1: Instance, tmp_path: Path
) -> None:
    line = kamal.deploy("app-web", v1.target, error_pages=str(tmp_path))
    assert (await server.fail(line))[-1] == "Error: unable to load error pages"


async def test_a_certificate_of_ones_own(server: Server, v1: Instance, tmp_path: Path) -> None:
    """As Kamal writes it: PEM, the key in PKCS#8, RSA, and for ``localhost`` by its common name."""
    issued = self_signed("localhost", key="rsa")
    directory = tmp_path / "app" / "tls" / "web"
    directory.mkdir(parents=True)
    (directory / "cert.pem").write_bytes(issued.chain_pem)
    (directory / "key.pem").write_bytes(issued.key_pem)
    proxy = {"host": "localhost", "ssl": True}
    line = kamal.deploy("app-web", v1.target, proxy, certificate=str(directory))
    await server.run(line)
    context = client_context(None)
    async with open_secure(server.command.https_port, "localhost", context) as client:
        assert (await client.get("/", "localhost")).body.startswith(b"v1")
    plain = await server.get("/x?y=1", "localhost")
    assert (plain.status, plain.get(b"location")) == (301, [b"https://localhost/x?y=1"])

    (directory / "key.pem").write_bytes(make_ca().issue("localhost").key_pem)
    assert (await server.fail(line))[-1] == "Error: unable to load certificate"
    async with open_secure(server.command.https_port, "localhost", context) as client:
        assert (await client.get("/", "localhost")).body.startswith(b"v1")


# --- the container's command ----------------------------------------------------------------------


async def test_a_deploy_that_comes_before_the_proxy_listens(directory: Path, v1: Instance) -> None:
    """Kamal does not wait between ``docker run`` and its first ``docker exec``."""
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def deploy() -> None:
            assert await shell(directory, kamal.deploy("app-web", v1.target)) == SILENT
            ended.set()

        nursery.start_soon(deploy)
        async with open_command(directory) as command:
            await ended.wait()
            await Server(command).requires(200, b"v1")


async def test_the_command_with_all_that_kamal_can_give(directory: Path) -> None:
    async with open_command(directory, "--debug", "--metrics-port", "0") as command:
        first = command.lines.all[0]
        assert first["msg"] == "No previous state to restore"
        started = await command.lines.wait_for_message("Server started")
        assert {"http", "https"} <= started.keys()


async def test_the_command_with_variables(directory: Path) -> None:
    """The image's own ``CMD``, with what a user put under ``run.options.env``."""
    port = free_port()
    variables = {
        **environment(directory),
        "KAMAL_PROXY_HTTP_PORT": str(port),
        "KAMAL_PROXY_HTTPS_PORT": "0",
        "KAMAL_PROXY_BIND": "127.0.0.1",
        "HTTP_PORT": "1",  # the prefixed one wins
    }
    process = await trio.lowlevel.open_process(
        [Path(sys.executable).with_name("kamal-proxy"), "run"], env=variables, cwd=ROOT
    )
    try:
        with trio.fail_after(START_LIMIT):
            assert (await shell(directory, kamal.remove("nobody"))).code == 1  # it listens
            async with open_client(port) as client:
                assert (await client.get()).status == 404
            process.terminate()
            assert await process.wait() == 0
    finally:
        process.kill()


@needs("nginx", package="nginx")
async def test_behind_a_load_balancer(server: Server, v1: Instance, tmp_path: Path) -> None:
    """As in Kamal's own tests: nginx before the proxies, which speaks HTTP/1.0 to them."""
    async with open_instance("v2") as other:
        await server.run(kamal.deploy("app-web", v1.target, {"host": "app.example"}))
        port = free_port()
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; upstream all {{ server 127.0.0.1:{server.command.port}; }}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://all; "
            "proxy_http_version 1.0; proxy_set_header Host $host; proxy_read_timeout 10s; } } }\n"
        )
        async with open_program(tmp_path, "nginx", "-p", str(tmp_path), "-c", "nginx.conf"):
            with trio.fail_after(START_LIMIT):
                while True:
                    try:
                        client = await trio.open_tcp_stream("127.0.0.1", port)
                        break
                    except OSError:
                        await trio.sleep(0.05)
            await client.aclose()
            async with open_client(port) as visitor:
                assert (await visitor.get(host="app.example")).body.startswith(b"v1")
                assert (await visitor.get(host="b.example")).status == 404
                await server.run(kamal.deploy("app-web", other.target, {"host": "app.example"}))
                assert (await visitor.get(host="app.example")).body.startswith(b"v2")


# --- a volume of the Go proxy ---------------------------------------------------------------------

# What the Go proxy (d929067) had saved after LINES, in a container.
SAMPLE = ROOT / "tests" / "samples" / "go-kamal.state"
HEALTHY = {"healthcheck": {"path": "/"}}
PAGES = f"{kamal.APPS_CONFIG}/app/error_pages/abc"
CERTIFICATE = f"{kamal.APPS_CONFIG}/app/tls/web"
LINES = [
    kamal.deploy(
        "app-web",
        "1a2b3c4d5e6f:80",
        {"host": "app.example", "healthcheck": {"path": "/", "interval": 3}},
    ),
    kamal.deploy(
        "app-api",
        "6f5e4d3c2b1a:80",
        {
            "host": "api.example",
            "response_timeout": 10,
            "buffering": {"requests": False, "max_request_body": 40_000_000},
            "logging": {"response_headers": ["X-Request-ID"]},
            **HEALTHY,
        },
    ),
    kamal.deploy(
        "app-secure",
        "1a2b3c4d5e6f:80",
        {"host": "secure.example", "ssl": True, **HEALTHY},
        certificate=CERTIFICATE,
    ),
    kamal.deploy(
        "shop-web", "6f5e4d3c2b1a:80", {"host": "shop.example", **HEALTHY}, error_pages=PAGES
    ),
    kamal.stop("shop-web", 30, "Back <soon>"),
]


@attrs.frozen
class Volume:
    """The places that the sample names, on this machine.

    Attributes:
        old: The application at the first target.
        new: The application at the other.
        authority: Who has issued the certificate.
        places: What stands for what in the sample.
    """

    old: Upstream
    new: Upstream
    authority: Authority
    places: dict[str, str]

    def here(self, text: str) -> str:
        """Return a text of the sample with the places of this machine."""
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text


@pytest.fixture
async def volume(directory: Path) -> AsyncIterator[Volume]:
    authority = make_ca()
    pages, tls = directory / "pages", directory / "tls"
    pages.mkdir()
    (pages / "503.html").write_text("Page: {{ .Message }}")
    tls.mkdir()
    issued = authority.issue("secure.example")
    (tls / "cert.pem").write_bytes(issued.chain_pem)
    (tls / "key.pem").write_bytes(issued.key_pem)
    async with open_upstream(respond(b"old")) as old, open_upstream(respond(b"new")) as new:
        places = {
            "1a2b3c4d5e6f:80": old.target,
            "6f5e4d3c2b1a:80": new.target,
            CERTIFICATE: str(tls),
            PAGES: str(pages),
            "/home/kamal-proxy/": f"{directory}/",
        }
        yield Volume(old, new, authority, places)


async def require_all_served(server: Server, volume: Volume) -> None:
    await server.requires(200, b"old", "app.example")
    await server.requires(200, b"new", "api.example")
    stopped = await server.get("/page", "shop.example")  # "/" is its health check
    assert (stopped.status, stopped.body) == (503, b"Page: Back &lt;soon&gt;")
    context = client_context(volume.authority)
    async with open_secure(server.command.https_port, "secure.example", context) as client:
        assert (await client.get("/", "secure.example")).body == b"old"


async def test_a_volume_that_the_go_proxy_wrote(directory: Path, volume: Volume) -> None:
    """``kamal proxy reboot`` to this proxy: all is there at once, and the next deploy works."""
    text = volume.here(SAMPLE.read_text())
    path = state_path(directory)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    async with open_command(directory) as command:
        server = Server(command)
        assert command.lines.all[0]["msg"] == "Restored saved state"
        assert path.read_text() == text
        await require_all_served(server, volume)

        proxy = {"host": "app.example", **HEALTHY}
        await server.run(kamal.deploy("app-web", volume.new.target, proxy))
        await server.requires(200, b"new", "app.example")
        before = {saved["name"]: saved for saved in json.loads(text)}
        after = {saved["name"]: saved for saved in json.loads(path.read_bytes())}
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] != after[name]} == {"app-web"}


async def test_the_same_lines_leave_the_same_state(server: Server, volume: Volume) -> None:
    """So that ``kamal proxy reboot`` to the Go proxy finds what it would have written itself."""
    for line in LINES:
        await server.run(volume.here(line))
    await require_all_served(server, volume)
    wanted = json.loads(volume.here(SAMPLE.read_text()))
    saved = json.loads(server.command.state_path.read_bytes())
    assert sorted(saved, key=_name) == sorted(wanted, key=_name)


def _name(service: dict[str, str]) -> str:
    return service["name"]
