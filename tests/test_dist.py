"""What ``make dist`` made: its contents, and that it installs and works outside this repository.

``make test-dist`` builds it and runs this. Packages are installed into new virtual environments, so
it needs the package registry.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

import kamal_proxy
from tests.certificates import make_ca
from tests.e2e.udp_room import NOTHING, open_room
from tests.http3.clients import H3Client
from tests.running import ROOT, kp, open_command, open_directory, open_instance
from tests.scripted import open_client

if TYPE_CHECKING:
    from collections.abc import Iterator

DIST = os.environ.get("TEST_DIST", "")
VERSION = kamal_proxy.__version__
EXTENSION = f"kamal_proxy/_fastpath{sysconfig.get_config_var('EXT_SUFFIX')}"
INFO = f"kamal_proxy-{VERSION}.dist-info"

pytestmark = pytest.mark.skipif(not DIST, reason="make test-dist builds what is tested here")


def made(pattern: str) -> Path:
    """Return the one file of this kind that was built."""
    (path,) = (ROOT / DIST).glob(pattern)
    return path


@pytest.fixture(scope="module")
def sdist() -> Path:
    return made("*.tar.gz")


@pytest.fixture(scope="module")
def wheel() -> Path:
    return made("*.whl")


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, bytes]:
    """Provide all files of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            entry.filename: archive.read(entry)
            for entry in archive.infolist()
            if not entry.is_dir()
        }


# --- contents ------------------------------------------------------------------------------------


def in_repository(*paths: str) -> set[str]:
    """Return the files at these paths that belong to the repository, new ones too."""
    listed = subprocess.run(
        # Git does not trust a repository of another user, which a container may have.
        ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", *paths],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_sdist_has_all_that_its_tests_need_and_nothing_that_was_built(sdist: Path) -> None:
    root = f"kamal_proxy-{VERSION}"
    assert sdist.name == f"{root}.tar.gz"
    with tarfile.open(sdist) as archive:
        members = {member.name.removeprefix(f"{root}/"): member for member in archive}
    files = {name for name, member in members.items() if member.isfile()}
    made_by_setuptools = {name for name in files if name.startswith("kamal_proxy.egg-info/")} | {
        "PKG-INFO",
        "setup.cfg",
    }

    assert files - made_by_setuptools == in_repository(
        *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"),
        *(".ci/check-tools", ".dockerignore", "Dockerfile", "Makefile", "mkdocs.yml"),
        *("kamal_proxy", "benchmarks", "docs", "example", "tests"),
    )
    assert all(member.isfile() or member.isdir() for member in members.values())


def test_the_wheel_has_what_runs_and_what_type_checkers_read(contents: dict[str, bytes]) -> None:
    modules = {name for name in in_repository("kamal_proxy") if not name.endswith((".pyx", ".pxi"))}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}

    assert {"kamal_proxy/py.typed", "kamal_proxy/_fastpath.pyi"} <= modules
    assert set(contents) == modules | {EXTENSION} | {f"{INFO}/{name}" for name in about}


def test_the_extension_has_neither_debug_information_nor_paths_of_this_machine(
    contents: dict[str, bytes],
) -> None:
    extension = contents[EXTENSION]
    assert b".debug_info" not in extension
    for path in {str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix} - {"/", "/usr"}:
        assert not re.search(rb"%b\b" % re.escape(os.fsencode(path)), extension), path


def test_package_registries_take_the_wheel(wheel: Path) -> None:
    # What is tagged as for any Linux, they refuse.
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = rf"manylinux_2_\d+_{os.uname().machine}"
    assert re.fullmatch(rf"kamal_proxy-{VERSION}-{python}-{python}-{tag}\.whl", wheel.name)


# --- a clean virtual environment -----------------------------------------------------------------


@attrs.frozen
class Home:
    """A virtual environment, and an empty directory to run its programs in."""

    venv: Path
    directory: Path

    def run(self, *command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of its programs."""
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KAMAL_PROXY_", "PYTHON"))
        }
        variables["PATH"] = f"{self.venv / 'bin'}:{os.environ['PATH'] if path is None else path}"
        return subprocess.run(
            [self.program(command[0]), *command[1:]],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=variables,
            timeout=500,
        )

    def program(self, name: str) -> str:
        """Return the path of one of its programs."""
        return str(self.venv / "bin" / name)

    def is_loaded_in(self, pid: int) -> bool:
        """Tell whether a process has the compiled part of this environment's package."""
        (extension,) = self.venv.glob(f"lib/python3*/site-packages/{EXTENSION}")
        return str(extension) in Path(f"/proc/{pid}/maps").read_text()


def make_home(tmp_path_factory: pytest.TempPathFactory, name: str) -> Home:
    home = Home(tmp_path_factory.mktemp(f"{name}-venv"), tmp_path_factory.mktemp(name))
    subprocess.run([sys.executable, "-m", "venv", home.venv], check=True)
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Home:
    """Install the wheel and what it depends on, where there is no compiler."""
    home = make_home(tmp_path_factory, "wheel")
    nothing = str(home.directory)
    assert shutil.which("cc", path=f"{home.venv / 'bin'}:{nothing}") is None
    done = home.run("pip", "install", "--only-binary=:all:", str(wheel), path=nothing)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope="module")
def home_from_source(tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Home:
    """Build and install the sdist, with HTTP/3."""
    home = make_home(tmp_path_factory, "sdist")
    done = home.run("pip", "install", f"kamal-proxy[http3] @ {sdist.as_uri()}")
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def installed(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Make the wheel's program what the test runs, from the empty directory."""
    monkeypatch.setenv("TEST_PROGRAM", home.program("kamal-proxy"))
    monkeypatch.chdir(home.directory)
    yield home
    assert list(home.directory.iterdir()) == []


def test_the_command_is_there(home: Home) -> None:
    by_name = home.run("kamal-proxy", "--help")
    by_module = home.run("python", "-m", "kamal_proxy", "--help")

    assert (by_name.returncode, by_name.stderr) == (0, "")
    assert by_name.stdout.startswith("Switches web and UDP services to new versions")
    assert (by_module.returncode, by_module.stdout) == (0, by_name.stdout)


def test_the_version(home: Home) -> None:
    done = home.run("python", "-c", "import kamal_proxy; print(kamal_proxy.__version__)")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{VERSION}\n", "")
    assert f"kamal-proxy=={VERSION}\n" in home.run("pip", "list", "--format=freeze").stdout


def test_no_dependency_is_missing_or_too_old(home: Home) -> None:
    done = home.run("pip", "check")
    assert (done.returncode, done.stdout) == (0, "No broken requirements found.\n")


async def test_a_web_and_a_udp_service(installed: Home) -> None:
    async with (
        open_directory() as directory,
        open_instance("v1") as instance,
        open_command(directory) as command,
        open_room() as room,
    ):
        assert installed.is_loaded_in(command.pid)
        await command.deploy("web", f"--target={instance.target}")
        async with open_client(command.port) as client:
            assert (await client.get("/hello")).body == b"v1 /hello"

        deployed = await room.deploy(command, room.target("g1"))
        assert (deployed.code, deployed.out, deployed.err) == (0, NOTHING, "")
        assert await room.client().ask() == "g1"

        assert (await command.kp("stop", "web")).code == 0
        async with open_client(command.port) as client:
            assert (await client.get("/hello")).status == 503


async def test_the_sdist_builds_what_serves_http3_with_that_extra(
    home_from_source: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nursery: trio.Nursery
) -> None:
    monkeypatch.setenv("TEST_PROGRAM", home_from_source.program("kamal-proxy"))
    monkeypatch.chdir(home_from_source.directory)
    authority = make_ca()
    certificate, key = authority.issue("a.test").write(tmp_path)
    async with (
        open_directory() as directory,
        open_instance("v1") as instance,
        open_command(directory, "--http3") as command,
    ):
        assert home_from_source.is_loaded_in(command.pid)
        await command.deploy(
            *("web", f"--target={instance.target}", "--host=a.test", "--tls"),
            *(f"--tls-certificate-path={certificate}", f"--tls-private-key-path={key}"),
        )
        address = ("127.0.0.1", command.https_port)
        client = H3Client(address, name="a.test", ca=authority.pem)
        client.quic.connect(address, now=trio.current_time())
        nursery.start_soon(client.run)
        client.flush()
        await client.open.wait()
        client.start()
        assert (await client.get(b"/hello", host=b"a.test")).body == b"v1 /hello"
        client.quic.close()
        client.flush()
        client.close()


async def test_without_the_extra_http3_says_what_is_missing(
    installed: Home, directory: Path
) -> None:
    result = await kp(directory, "run", "--http3", "--http-port=0", "--https-port=0")
    assert (result.code, "Server started" in result.out) == (1, False)
    assert result.err == (
        "Error: http3 needs the package aioquic; "
        "install it with: pip install 'kamal-proxy[http3]'\n"
    )


EMBEDDER = """\
import trio
from kamal_proxy import RunOptions, open_proxy

async def port() -> int:
    options = RunOptions(http_port=0, bind="127.0.0.1")
    async with open_proxy(options, log=lambda line: None) as proxy:
        return proxy.http_port

print(trio.run(port) > 0)
"""


def test_a_program_that_embeds_it_runs_and_its_types_are_checked(
    home: Home, tmp_path: Path
) -> None:
    program = tmp_path / "embedder.py"
    program.write_text(EMBEDDER)
    done = home.run("python", str(program))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")

    assert check_types(home, program) == (0, "Success: no issues found in 1 source file\n")
    program.write_text(EMBEDDER.replace("-> int", "-> str"))
    code, report = check_types(home, program)
    assert (code, "[return-value]" in report) == (1, True), report


def check_types(home: Home, program: Path) -> tuple[int, str]:
    """Check a program's types with this mypy, against the packages that are installed there."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-incremental"),
            *("--python-executable", home.program("python"), program),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=home.directory,
    )
    return done.returncode, done.stdout + done.stderr
