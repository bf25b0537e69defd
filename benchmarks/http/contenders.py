"""The programs that are compared, each set up to do the same work for a request.

Every proxy has one target for pages and one for WebSockets, keeps connections to the former, sets
the forwarding headers and a request id, and writes one log line of about the same size per request.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from benchmarks.processes import BenchmarkError, Running, compiled, free_port, need, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: The host that is asked for, and that the certificate is for.
HOST = "bench.test"
#: Sizes in bytes of what the target has; ``/`` is for small answers, and takes POST too.
PAGES = {"/4k": 4 << 10, "/64k": 64 << 10, "/1m": 1 << 20, "/1g": 1 << 30}


@attrs.frozen
class Site:
    """What every proxy is to serve.

    Attributes:
        pages: Port of the target.
        sockets: Port of the one for paths that begin with ``/ws``.
        certificate: File of the certificate for HOST.
        key: File of its key.
    """

    pages: int
    sockets: int
    certificate: Path
    key: Path


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
        default_type text/plain;
        location / {{ return 200 "Hello, world!"; }}
        location ~ ^/\\d+[kmg]$ {{ root {folder}; open_file_cache max=10; sendfile on; }}
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
        server 127.0.0.1:{site.pages};
        keepalive 100;
        keepalive_requests 1000000000;
        keepalive_timeout 300s;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        # Tickets, as the others have them, and no cache, which they have not either.
        listen 127.0.0.1:{tls_port} ssl http2 backlog=4096;
        ssl_certificate {site.certificate};
        ssl_certificate_key {site.key};
        ssl_protocols TLSv1.2 TLSv1.3;
        proxy_http_version 1.1;
        proxy_max_temp_file_size 0;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Forwarded-Host $http_host;
        proxy_set_header X-Request-ID $request_id;
        proxy_set_header X-Request-Start "t=$msec";
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $hop;
        set $hop "";
        location / {{
            proxy_pass http://web;
        }}
        location /ws {{
            set $hop "upgrade";
            proxy_pass http://127.0.0.1:{site.sockets};
            proxy_read_timeout 300s;
        }}
    }}
"""

HAPROXY_CONF = """
global
    nbthread 1
    maxconn 8000
    log stdout format raw local0 info
defaults
    mode http
    log global
    timeout connect 5s
    timeout client 300s
    timeout server 300s
    timeout http-keep-alive 300s
    timeout tunnel 300s
    http-reuse always
    option forwardfor
    unique-id-format %[uuid()]
    unique-id-header X-Request-ID
frontend web
    bind 127.0.0.1:{port} backlog 4096
    bind 127.0.0.1:{tls_port} backlog 4096 ssl crt {pem} alpn h2,http/1.1 ssl-min-ver TLSv1.2
    http-request set-header X-Forwarded-Proto %[ssl_fc,iif(https,http)]
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Request-Start t=%[date()]
    capture request header host len 64
    capture request header user-agent len 64
    capture request header content-type len 64
    capture response header content-type len 64
    log-format '{{"time":"%tr","level":"INFO","msg":"Request","host":"%[capture.req.hdr(0)]",\
"port":%fp,"path":"%HPO","request_id":"%ID","status":%ST,"service":"web","target":"%si:%sp",\
"duration":%Ta,"method":"%HM","req_content_length":%U,"req_content_type":"%[capture.req.hdr(2)]",\
"resp_content_length":%B,"resp_content_type":"%[capture.res.hdr(0)]","client_addr":"%ci",\
"client_port":"%cp","remote_addr":"%ci","user_agent":"%[capture.req.hdr(1)]","proto":"%HV",\
"scheme":"%ft","query":"%HQ"}}'
    use_backend sockets if {{ path_beg /ws }}
    default_backend pages
backend pages
    server one 127.0.0.1:{site.pages}
backend sockets
    server one 127.0.0.1:{site.sockets}
"""

CADDYFILE = """
{{
    admin off
    auto_https disable_redirects
    default_sni {host}
    skip_install_trust
}}
(site) {{
    log {{
        output file {folder}/access.log {{
            roll_disabled
        }}
        format json
    }}
    handle /ws* {{
        reverse_proxy 127.0.0.1:{site.sockets}
    }}
    handle {{
        reverse_proxy 127.0.0.1:{site.pages} {{
            header_up X-Request-ID {{http.request.uuid}}
            header_up X-Request-Start t={{time.now.unix_ms}}
        }}
    }}
}}
http://:{port} {{
    bind 127.0.0.1
    import site
}}
https://:{tls_port} {{
    bind 127.0.0.1
    tls {site.certificate} {site.key}
    import site
}}
"""


def certificate(folder: Path, key: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for HOST and return its files: certificate, key.

    Args:
        folder: Where they are written.
        key: ``ec`` (P-256) or ``rsa`` (2,048 bits).
    """
    kind = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["rsa:2048"]
    paths = folder / "tls.crt", folder / "tls.key"
    command = [need("openssl", "openssl"), "req", "-x509", "-nodes", "-newkey", *kind]
    command += ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    command += ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@contextmanager
def upstream(folder: Path) -> Iterator[Running]:
    """Run the target of all proxies: an nginx with PAGES."""
    port = free_port()
    folder.mkdir()
    for path, size in PAGES.items():
        with (folder / path[1:]).open("wb") as page:
            page.truncate(size)
    with _nginx("upstream", folder, port, UPSTREAM.format(port=port, folder=folder)) as program:
        yield program


@contextmanager
def nginx(folder: Path, site: Site) -> Iterator[Running]:
    """Run nginx with one worker."""
    port, tls_port = free_port(), free_port()
    folder.mkdir()
    http = PROXY.format(folder=folder, port=port, tls_port=tls_port, site=site)
    with _nginx("nginx", folder, port, http) as program:
        yield attrs.evolve(program, log=folder / "access.log", tls_port=tls_port)


@contextmanager
def haproxy(folder: Path, site: Site) -> Iterator[Running]:
    """Run HAProxy with one thread."""
    port, tls_port = free_port(), free_port()
    folder.mkdir()
    pem, conf = folder / "both.pem", folder / "haproxy.cfg"
    pem.write_bytes(site.certificate.read_bytes() + site.key.read_bytes())
    conf.write_text(HAPROXY_CONF.format(port=port, tls_port=tls_port, pem=pem, site=site))
    command = [need("haproxy", "haproxy"), "-db", "-f", str(conf)]
    with running("haproxy", command, port, folder) as program:
        yield attrs.evolve(program, tls_port=tls_port)


@contextmanager
def caddy(folder: Path, site: Site) -> Iterator[Running]:
    """Run Caddy with as many threads as it takes."""
    port, tls_port = free_port(), free_port()
    folder.mkdir()
    conf = folder / "Caddyfile"
    conf.write_text(
        CADDYFILE.format(folder=folder, host=HOST, port=port, tls_port=tls_port, site=site)
    )
    command = [need("caddy", "caddy"), "run", "--config", str(conf)]
    environment = {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with running("caddy", command, port, folder, environment) as program:
        yield attrs.evolve(program, log=folder / "access.log", tls_port=tls_port)


@contextmanager
def bare(folder: Path, site: Site) -> Iterator[Running]:
    """Run a relay of connections to the target for WebSockets, which does nothing else."""
    port = free_port()
    folder.mkdir()
    program = compiled(Path(__file__).with_name("bare.c"), folder)
    with running("bare", [str(program), str(port), str(site.sockets)], port, folder) as relay:
        yield relay


@contextmanager
def kamal_proxy(name: str, command: Sequence[str], folder: Path, site: Site) -> Iterator[Running]:
    """Run a kamal-proxy, or a program with the same command line, with both targets deployed.

    Args:
        name: What it is called.
        command: How it is called.
        folder: Where it lives.
        site: What it serves.

    Raises:
        BenchmarkError: it does not start, or a deploy fails.
    """
    port, tls_port = free_port(), free_port()
    folder.mkdir()
    tls = [
        "--tls",
        "--tls-redirect=false",
        f"--tls-certificate-path={site.certificate}",
        f"--tls-private-key-path={site.key}",
    ]
    environment = {
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "KAMAL_PROXY_SOCKET": str(folder / "kamal-proxy.sock"),
    }
    run = [*command, "run", "--http-port", str(port), "--https-port", str(tls_port)]
    with running(name, run, port, folder, environment) as program:
        for service, target, flags in (
            ("web", site.pages, tls),
            ("sockets", site.sockets, ["--path-prefix=/ws"]),
        ):
            deploy = [*command, "deploy", service, f"--target=127.0.0.1:{target}", f"--host={HOST}"]
            done = subprocess.run(
                deploy + flags,
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, **environment},
            )
            if done.returncode:
                raise BenchmarkError(f"{name} does not deploy: {done.stderr.strip()}")
        yield attrs.evolve(program, tls_port=tls_port)


@contextmanager
def _nginx(name: str, folder: Path, port: int, http: str) -> Iterator[Running]:
    user = "user root;" if os.geteuid() == 0 else ""
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, user=user, http=http))
    command = [need("nginx", "nginx"), "-c", str(conf), "-e", str(folder / "error.log")]
    with running(name, command, port, folder) as program:
        yield program
