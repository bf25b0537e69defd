"""The relays that are compared, each with one service for the same target.

Every one listens on 127.0.0.1 only, has a connected socket to the target for each client, and
lets a session last longer than the benchmark needs. Being told their address, nginx and the bare
relay need no control messages; kamal-proxy listens as it always does, on every address.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from benchmarks import processes
from benchmarks.processes import BenchmarkError, Running, need, running
from benchmarks.udp.network import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAM_PACKAGE = "libnginx-mod-stream"
STREAM_MODULE = "ngx_stream_module.so"

# One worker, so that one client's datagrams stay in order and reuseport has nothing to share out.
# The server for TCP shows that nginx is ready; see ``running``.
NGINX_CONF = """
daemon off;
{load_module}
{user}
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{
    worker_connections {connections};
    multi_accept on;
}}
stream {{
    server {{
        listen 127.0.0.1:{port} udp rcvbuf=4m sndbuf=4m;
        proxy_pass 127.0.0.1:{target};
        proxy_timeout 60s;
    }}
    server {{
        listen 127.0.0.1:{port};
        return "";
    }}
}}
"""


@attrs.frozen
class Proxy:
    """A running kamal-proxy, and how it is told what to do.

    Attributes:
        program: The process; its port is the one for HTTP.
    """

    program: Running
    _command: Sequence[str]
    _environment: Mapping[str, str]

    def deploy_udp(self, service: str, target: str, *flags: str) -> None:
        """Deploy a UDP service whose target is not checked.

        Raises:
            BenchmarkError: the deploy fails.
        """
        deploy = ["deploy-udp", service, f"--target={target}", "--health-check=none", *flags]
        done = subprocess.run(
            [*self._command, *deploy],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **self._environment},
        )
        if done.returncode:
            raise BenchmarkError(f"kamal-proxy does not deploy: {done.stderr.strip()}")


@contextmanager
def empty_proxy(command: Sequence[str], folder: Path, *flags: str) -> Iterator[Proxy]:
    """Run kamal-proxy without a service.

    Args:
        command: How it is called.
        folder: Where its state and its log go; it is made.
        flags: Of ``run``.

    Raises:
        BenchmarkError: it does not start.
    """
    folder.mkdir()
    http_port = processes.free_port()
    environment = {
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "KAMAL_PROXY_SOCKET": str(folder / "kamal-proxy.sock"),
        "HTTPS_PORT": str(processes.free_port()),
    }
    run = [*command, "run", f"--http-port={http_port}", *flags]
    with running("kamal", run, http_port, folder, environment) as program:
        yield Proxy(program, command, environment)


@contextmanager
def kamal_proxy(
    command: Sequence[str], folder: Path, target: int, sessions: int
) -> Iterator[Running]:
    """Run kamal-proxy with one UDP service.

    Args:
        command: How it is called.
        folder: Where its state and its log go; it is made.
        target: The echo server's port.
        sessions: The most sessions that the service takes.

    Raises:
        BenchmarkError: it does not start, or its deploy fails.
    """
    port = free_port()
    with empty_proxy(command, folder) as proxy:
        flags = (f"--port={port}", f"--max-sessions={sessions}")
        proxy.deploy_udp("game", f"127.0.0.1:{target}", *flags)
        yield attrs.evolve(proxy.program, port=port)


@contextmanager
def nginx(folder: Path, target: int, sessions: int, descriptors: int) -> Iterator[Running]:
    """Run nginx with a UDP proxy in its stream module.

    Args:
        folder: Where its files go; it is made.
        target: The echo server's port.
        sessions: The most sessions that it must take.
        descriptors: The files that it may open.

    Raises:
        BenchmarkError: it is not there, has no stream module, or does not start.
    """
    folder.mkdir()
    port = free_port()
    conf = folder / "nginx.conf"
    conf.write_text(
        NGINX_CONF.format(
            load_module=_load_stream_module(),
            user="user root;" if os.geteuid() == 0 else "",
            descriptors=descriptors,
            # One for the client's side of a session, one for the target's.
            connections=2 * sessions + 500,
            folder=folder,
            port=port,
            target=target,
        )
    )
    command = [need("nginx", "nginx"), "-c", str(conf), "-e", str(folder / "error.log")]
    with running("nginx", command, port, folder) as program:
        yield program


@contextmanager
def bare(relay: Path, folder: Path, target: int) -> Iterator[Running]:
    """Run the bare relay.

    Args:
        relay: The compiled ``bare.c``.
        folder: Where its log goes; it is made.
        target: The echo server's port.
    """
    folder.mkdir()
    port = free_port()
    with running("bare", [str(relay), str(port), str(target)], port, folder) as program:
        yield program


def nginx_version() -> str:
    """Return what nginx calls itself, such as ``nginx/1.22.1``.

    Raises:
        BenchmarkError: it is not there, or has no stream module.
    """
    _load_stream_module()
    return re.sub(r".*: ", "", _nginx_build().splitlines()[0])


def _load_stream_module() -> str:
    """Return the line that makes nginx know ``stream``, which is a package of its own on Debian.

    Raises:
        BenchmarkError: there is no such module.
    """
    build = _nginx_build()
    if re.search(r"--with-stream(\s|$)", build):
        return ""
    path = re.search(r"--modules-path=(\S+)", build)
    module = Path(path[1] if path else "/usr/lib/nginx/modules") / STREAM_MODULE
    if not module.exists():
        raise BenchmarkError(
            f"nginx has no stream module {module}: apt-get install {STREAM_PACKAGE}"
        )
    return f"load_module {module};"


def _nginx_build() -> str:
    done = subprocess.run(
        [need("nginx", "nginx"), "-V"], check=True, capture_output=True, text=True
    )
    return done.stderr
