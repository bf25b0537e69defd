"""The programs that are compared, each set up to do the same work for a request.

Every proxy has one target, keeps connections to it, sets the forwarding headers and a request
id, and writes one log line of about the same size per request to a file.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from benchmarks.processes import BenchmarkError, Running, free_port, need, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# nginx limits the length of a word in its configuration.
LONGEST_RETURN = 2048

NGINX_CONF = """
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 10000; }}
http {{
    keepalive_timeout 300s;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/client_body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
}}
"""

UPSTREAM = """
    access_log off;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        {answer}
    }}
"""

PROXY = """
    log_format json escape=json '{{"time":"$time_iso8601","level":"INFO","msg":"Request",'
        '"host":"$host","port":$server_port,"path":"$uri","request_id":"$request_id",'
        '"status":$status,"service":"web","target":"$upstream_addr","duration":$request_time,'
        '"method":"$request_method","req_content_length":"$content_length",'
        '"req_content_type":"$content_type","resp_content_length":"$body_bytes_sent",'
        '"resp_content_type":"$sent_http_content_type","client_addr":"$remote_addr",'
        '"client_port":"$remote_port","remote_addr":"$remote_addr",'
        '"user_agent":"$http_user_agent","proto":"$server_protocol","scheme":"$scheme",'
        '"query":"$args"}}';
    access_log {folder}/access.log json;
    upstream web {{
        server 127.0.0.1:{target};
        keepalive 100;
        keepalive_requests 1000000000;
        keepalive_timeout 300s;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        {tls}
        location / {{
            proxy_pass http://web;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Request-ID $request_id;
            proxy_set_header X-Request-Start "t=$msec";
        }}
    }}
"""

# Tickets, as the others have them, and no cache, which they have not either.
TLS = """
        listen 127.0.0.1:{port} ssl http2 backlog=4096;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
"""


def certificate(folder: Path, host: str, key: str) -> tuple[Path, Path]:
    """Make a self-signed certificate and return its files: certificate, key."""
    kind = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["rsa:2048"]
    paths = folder / "tls.crt", folder / "tls.key"
    command = [need("openssl", "openssl"), "req", "-x509", "-nodes", "-newkey", *kind]
    command += ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
    command += ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@contextmanager
def upstream(folder: Path, payload: int) -> Iterator[Running]:
    """Run the target of all proxies: an nginx that answers every GET with ``payload`` bytes."""
    port = free_port()
    folder.mkdir()
    if payload <= LONGEST_RETURN:
        answer = f'location / {{ default_type text/plain; return 200 "{"x" * payload}"; }}'
    else:
        (folder / "payload").write_bytes(b"x" * payload)
        answer = (
            f"location / {{ root {folder}; try_files /payload =404; default_type text/plain;"
            " open_file_cache max=10; sendfile on; }"
        )
    with _nginx("upstream", folder, port, UPSTREAM.format(port=port, answer=answer)) as program:
        yield program


@contextmanager
def nginx(folder: Path, target: int, files: tuple[Path, Path] | None = None) -> Iterator[Running]:
    """Run nginx as a proxy with one worker; with the files of a certificate also over TLS."""
    port, tls_port = free_port(), free_port()
    folder.mkdir()
    tls = TLS.format(port=tls_port, certificate=files[0], key=files[1]) if files else ""
    http = PROXY.format(folder=folder, port=port, target=target, tls=tls)
    with _nginx("nginx", folder, port, http) as program:
        yield attrs.evolve(program, log=folder / "access.log", tls_port=tls_port)


@contextmanager
def kamal_proxy(
    name: str,
    command: Sequence[str],
    folder: Path,
    target: int,
    secure: tuple[str, Path, Path] | None = None,
) -> Iterator[Running]:
    """Run a kamal-proxy, or a program with the same command line, with one service deployed.

    Args:
        name: What it is called.
        command: How it is called.
        folder: Where it lives.
        target: Port of the service's target.
        secure: Host and files of a certificate, if the service is to be served over TLS too.

    Raises:
        BenchmarkError: it does not start, or its deploy fails.
    """
    port, tls_port = free_port(), free_port()
    folder.mkdir()
    flags = []
    if secure is not None:
        host, certificate, key = secure
        flags = [f"--host={host}", "--tls", "--tls-redirect=false"]
        flags += [f"--tls-certificate-path={certificate}", f"--tls-private-key-path={key}"]
    environment = {
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "KAMAL_PROXY_SOCKET": str(folder / "kamal-proxy.sock"),
        # The original always opens an HTTPS listener as well.
        "HTTPS_PORT": str(tls_port),
    }
    with running(
        name, [*command, "run", "--http-port", str(port)], port, folder, environment
    ) as it:
        deploy = subprocess.run(
            [*command, "deploy", "web", f"--target=127.0.0.1:{target}", *flags],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if deploy.returncode:
            raise BenchmarkError(f"{name} does not deploy: {deploy.stderr.strip()}")
        yield attrs.evolve(it, tls_port=tls_port)


@contextmanager
def _nginx(name: str, folder: Path, port: int, http: str) -> Iterator[Running]:
    user = "user root;" if os.geteuid() == 0 else ""
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, user=user, http=http))
    command = [need("nginx", "nginx"), "-c", str(conf), "-e", str(folder / "error.log")]
    with running(name, command, port, folder) as program:
        yield program
